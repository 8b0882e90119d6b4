package timeout

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net/http"
	"reflect"
	"runtime"
	"strings"
	"sync"
)

// An upload is a request body whose Reads pause a watch. Close is the body's own
// and may run beside a Read.
//
// Until the headers have come, the body is read in another goroutine. net/http
// over HTTP/1 waits for a Read that is under way even when the context has ended,
// and closing the body does not always end its Read: not if it is the body of a
// request to a server, as in a proxy. So a Read that has been too slow is left
// behind, with a buffer of its own. It ends when the body gives something, or is
// closed.
type upload struct {
	io.ReadCloser
	watch *watch
	ctx   context.Context // of the attempt
	done  chan result     // one place: a Read that was left behind needs nobody to end
}

func newUpload(ctx context.Context, body io.ReadCloser, w *watch) *upload {
	return &upload{body, w, ctx, make(chan result, 1)}
}

func (u *upload) Read(p []byte) (int, error) {
	paused, late := u.watch.pause()
	switch {
	case late != nil:
		return 0, late // nobody wants the rest
	case !paused:
		return u.ReadCloser.Read(p)
	}
	defer u.watch.resume()
	go u.read(len(p))
	var r result
	select {
	case r = <-u.done:
	case <-u.ctx.Done():
		if late := u.slow(); late != nil {
			return 0, late
		}
		r = <-u.done // as without a limit: Base, or its caller, may rely on it
	}
	switch {
	case r.panicked != nil:
		panic(r.panicked)
	case !r.returned:
		runtime.Goexit()
	}
	n := copy(p, r.buf[:r.n])
	buffers.Put(r.buf)
	return n, r.err
}

// A result is how a Read in another goroutine has ended.
type result struct {
	buf      *[32 << 10]byte
	n        int
	err      error
	returned bool
	panicked any
}

var buffers = sync.Pool{New: func() any { return new([32 << 10]byte) }}

// read reads up to size bytes. How it ends is told, also if that is a panic or
// Goexit: it belongs to whoever called Read.
func (u *upload) read(size int) {
	r := result{buf: buffers.Get().(*[32 << 10]byte)}
	defer func() {
		if !r.returned {
			r.panicked = recover()
		}
		u.done <- r
	}()
	r.n, r.err = u.ReadCloser.Read(r.buf[:min(size, len(r.buf))])
	r.returned = true
}

// slow returns the error of a Read that was too slow.
func (u *upload) slow() error {
	if late, ok := errors.AsType[*SlowBodyError](context.Cause(u.ctx)); ok {
		return late
	}
	return nil
}

var (
	nopCloser         = reflect.TypeOf(io.NopCloser(nil))
	nopCloserWriterTo = reflect.TypeOf(io.NopCloser(struct {
		io.Reader
		io.WriterTo
	}{}))
)

// canStall reports whether there is a request body and its Reads may take time.
// A body that knows how much is left is in memory, and so are the readers that
// http.NewRequest knows. net/http looks for these, too, and must find them.
func canStall(body io.ReadCloser) bool {
	if body == nil || body == http.NoBody {
		return false
	}
	if _, ok := body.(interface{ Len() int }); ok {
		return false
	}
	if kind := reflect.TypeOf(body); kind != nopCloser && kind != nopCloserWriterTo {
		return true
	}
	switch reflect.ValueOf(body).Field(0).Interface().(type) {
	case *bytes.Reader, *bytes.Buffer, *strings.Reader:
		return false
	}
	return true
}
