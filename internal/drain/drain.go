// Package drain lets go of responses that nobody wants.
package drain

import (
	"bytes"
	"io"
	"net/http"
	"reflect"
	"runtime"
	"strings"
	"sync/atomic"
	"time"
)

const (
	unknown = 4 << 10  // bytes read of a body of unknown length …
	known   = 64 << 10 // … and of one that says how long it is, or that is kept
	moment  = 100 * time.Millisecond

	firstRead = 1 << 10 // the buffer for a body of unknown length, at first
)

// Close reads the rest of a response, so that its connection can be used
// again, and closes it. It reads no more than a little, and waits no longer
// than a moment: a body that stalls is closed, also if that does not end the
// Read or if Close itself hangs. A nil response is none.
func Close(resp *http.Response) {
	if resp == nil || resp.Body == nil {
		return
	}
	if resp.Body == http.NoBody {
		resp.Body.Close()
		return
	}
	limit := int64(unknown)
	if resp.ContentLength >= 0 && resp.ContentLength <= known {
		limit = resp.ContentLength
	}
	if inMemory(resp.Body) {
		_, _ = io.CopyN(io.Discard, resp.Body, limit+1)
		resp.Body.Close()
		return
	}
	d := &drain{body: resp.Body, done: make(chan struct{})}
	go d.discard(limit + 1) // the end, too
	if !d.wait() {
		go d.close()
		d.wait()
	}
}

// Keep lets go of a response like Close, but keeps what its body still has, up
// to 64 KiB, so that the response can be returned later. It returns resp with a
// body that gives these bytes from memory and then ends as the old body did. It
// returns nil if the response is lost: its body is longer, or stalls, or panics.
func Keep(resp *http.Response) *http.Response {
	if resp == nil || resp.Body == nil {
		return resp
	}
	if resp.Body == http.NoBody {
		resp.Body.Close()
		return resp
	}
	if _, ok := resp.Body.(*keptBody); ok {
		return resp
	}
	d := &drain{body: resp.Body}
	size := firstRead
	if resp.Request == nil || resp.Request.Method != http.MethodHead { // an answer to HEAD has the length of another body
		if resp.ContentLength > known {
			d.abandon()
			return nil
		}
		if resp.ContentLength >= 0 {
			size = int(resp.ContentLength) + 1 // room to read the end, too
		}
	}
	if inMemory(resp.Body) {
		d.read(size)
		resp.Body.Close()
	} else {
		d.done = make(chan struct{})
		go d.keep(size)
		if !d.wait() && !d.whole.Load() {
			go d.close()
			return nil
		}
	}
	if !d.whole.Load() {
		return nil
	}
	// In place: net/http writes the trailer into this very response.
	resp.Body = &keptBody{rest: d.kept, end: d.end}
	return resp
}

var (
	nopCloser         = reflect.TypeOf(io.NopCloser(nil))
	nopCloserWriterTo = reflect.TypeOf(io.NopCloser(struct {
		io.Reader
		io.WriterTo
	}{}))
)

// inMemory reports whether body cannot stall, as those that caches and stubs
// answer with: one that knows how much is left, or a reader of memory in an
// io.NopCloser. net/http looks into request bodies in the same way.
func inMemory(body io.ReadCloser) bool {
	if _, ok := body.(interface{ Len() int }); ok {
		return true
	}
	if kind := reflect.TypeOf(body); kind != nopCloser && kind != nopCloserWriterTo {
		return false
	}
	switch reflect.ValueOf(body).Field(0).Interface().(type) {
	case *strings.Reader, *bytes.Reader, *bytes.Buffer:
		return true
	}
	return false
}

// A drain reads a body in a goroutine of its own, and closes it.
type drain struct {
	body    io.ReadCloser
	closing atomic.Bool
	closed  atomic.Bool
	done    chan struct{} // closed when the body is

	kept  []byte      // written by the goroutine that reads, read by others once whole is true
	end   error       // the same
	whole atomic.Bool // kept and end are all that the body had
}

// abandon closes a body that nobody reads.
func (d *drain) abandon() {
	d.done = make(chan struct{})
	go d.close()
	d.wait()
}

func (d *drain) discard(limit int64) {
	defer d.finish()
	_, _ = io.CopyN(io.Discard, d.body, limit)
}

func (d *drain) keep(size int) {
	defer d.finish()
	d.read(size)
}

// finish closes the body after the last Read. A panic of the body ends here:
// nobody wants the response any more, and in this goroutine, which is not the
// caller's, the panic would end the program.
func (d *drain) finish() {
	_ = recover()
	d.close()
}

// read reads the body to its end, into a buffer of this size at first.
func (d *drain) read(size int) {
	kept := make([]byte, 0, size)
	// A body that is being closed has taken too long. It may be one that gives
	// nothing again and again.
	for !d.closing.Load() {
		if len(kept) == cap(kept) {
			kept = append(kept, 0)[:len(kept)]
		}
		n, err := d.body.Read(kept[len(kept):min(cap(kept), known+1)])
		kept = kept[:len(kept)+n]
		switch {
		case len(kept) > known:
			return
		case err != nil:
			d.kept, d.end = kept, err
			d.whole.Store(true)
			return
		}
	}
}

func (d *drain) close() {
	if d.closing.Swap(true) {
		return
	}
	defer func() {
		_ = recover() // see finish
		d.closed.Store(true)
		close(d.done)
	}()
	d.body.Close()
}

// wait reports whether the body has been closed within a moment.
func (d *drain) wait() bool {
	// Mostly the rest is at hand, and has been read when this goroutine gets its
	// turn again: no need for a timer then.
	runtime.Gosched()
	if d.closed.Load() {
		return true
	}
	timer := time.NewTimer(moment)
	defer timer.Stop()
	select {
	case <-d.done:
		return true
	case <-timer.C:
		return false
	}
}

// A keptBody gives out what was kept of a body. Close may run beside Read.
type keptBody struct {
	rest   []byte // only Read uses it, and Len
	end    error  // that comes after rest
	closed atomic.Bool
}

// Len is how much is left. It also says that this body is in memory.
func (b *keptBody) Len() int { return len(b.rest) }

func (b *keptBody) Read(p []byte) (int, error) {
	if b.closed.Load() {
		return 0, http.ErrBodyReadAfterClose
	}
	if len(b.rest) == 0 {
		return 0, b.end
	}
	n := copy(p, b.rest)
	b.rest = b.rest[n:]
	return n, nil
}

func (b *keptBody) Close() error {
	b.closed.Store(true)
	return nil
}
