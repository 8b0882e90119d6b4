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
	known   = 64 << 10 // … and of one that says how long it is
	moment  = 100 * time.Millisecond
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
	go func() {
		_, _ = io.CopyN(io.Discard, d.body, limit+1) // the end, too
		d.close()
	}()
	// Mostly the rest is at hand, and has been read when this goroutine gets its
	// turn again: no need for a timer then.
	runtime.Gosched()
	if !d.closed.Load() && !d.wait() {
		go d.close()
		d.wait()
	}
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

type drain struct {
	body    io.ReadCloser
	closing atomic.Bool
	closed  atomic.Bool
	done    chan struct{} // closed when the body is
}

func (d *drain) close() {
	if !d.closing.Swap(true) {
		d.body.Close()
		d.closed.Store(true)
		close(d.done)
	}
}

// wait reports whether the body has been closed within a moment.
func (d *drain) wait() bool {
	timer := time.NewTimer(moment)
	defer timer.Stop()
	select {
	case <-d.done:
		return true
	case <-timer.C:
		return false
	}
}
