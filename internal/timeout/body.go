package timeout

import (
	"context"
	"io"
	"sync/atomic"
	"time"
)

// A body is a response body that ends its context when it is closed or breaks
// off. Not when it has been read: over HTTP/2 the response may end while the
// request body is still being sent, and net/http stops that at the context's end.
type body struct {
	io.ReadCloser
	cancel context.CancelCauseFunc
	idle   time.Duration
	closed atomic.Bool

	// Only Read uses these.
	timer  *time.Timer // runs during a Read; nil before the first
	late   *Exceeded   // set before the timer; silence reads it, too
	silent bool        // the limit was exceeded
}

func (b *body) Read(p []byte) (int, error) {
	if b.silent {
		return 0, b.late
	}
	n, err := b.read(p)
	if err != nil && err != io.EOF {
		b.cancel(nil)
	}
	return n, err
}

// read is a Read within the limit.
func (b *body) read(p []byte) (n int, err error) {
	if b.idle <= 0 {
		return b.ReadCloser.Read(p)
	}
	if b.timer == nil {
		b.late = &Exceeded{"nothing of the response body", b.idle}
		b.timer = time.AfterFunc(b.idle, b.silence)
	} else {
		b.timer.Reset(b.idle)
	}
	defer func() {
		// What the Read says now may be due to silence, even an io.EOF.
		if !b.timer.Stop() {
			b.silent, err = true, b.late
		}
	}()
	return b.ReadCloser.Read(p)
}

// silence ends a Read that has waited too long.
func (b *body) silence() {
	b.cancel(b.late)
	b.Close()
}

// Close may run beside a Read, which it ends.
func (b *body) Close() error {
	defer b.cancel(nil) // afterwards: Base may want to read the rest
	if b.closed.Swap(true) {
		return nil
	}
	return b.ReadCloser.Close()
}
