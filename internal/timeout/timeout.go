// Package timeout limits how long a RoundTripper may be silent, without ever
// cutting a response that is moving.
package timeout

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"sync/atomic"
	"time"
)

// A Transport limits the requests to Base. Zero means no limit.
type Transport struct {
	Base    http.RoundTripper
	Headers time.Duration // until the response headers have come
	Idle    time.Duration // within one Read of the response body
}

// An exceeded limit is an error that says so to whoever asks for Timeout.
type exceeded struct {
	what  string
	limit time.Duration
}

func (e *exceeded) Error() string   { return fmt.Sprintf("tripper: %s within %v", e.what, e.limit) }
func (e *exceeded) Timeout() bool   { return true }
func (e *exceeded) Temporary() bool { return true }

// Is makes it match what net/http's own timeouts match.
func (e *exceeded) Is(target error) bool { return target == context.DeadlineExceeded }

// RoundTrip sends a copy of req whose context ends when a limit is exceeded.
func (t *Transport) RoundTrip(req *http.Request) (*http.Response, error) {
	ctx, cancel := context.WithCancelCause(req.Context())
	kept := false // ctx goes on with the response
	defer func() {
		if !kept {
			cancel(nil)
		}
	}()
	late := &exceeded{"no response headers", t.Headers}
	inTime := func() bool { return true }
	if t.Headers > 0 {
		inTime = time.AfterFunc(t.Headers, func() { cancel(late) }).Stop
		defer inTime() // also when Base panics
	}
	resp, err := t.Base.RoundTrip(req.WithContext(ctx))
	if !inTime() {
		cancel(late) // it may not have come to that yet
		if context.Cause(ctx) == error(late) {
			if resp != nil && resp.Body != nil {
				resp.Body.Close()
			}
			return nil, late
		}
		// The caller was first.
	}
	if err != nil || resp == nil {
		return resp, err
	}
	resp.Request = req
	switch {
	case resp.StatusCode == http.StatusSwitchingProtocols:
		// The body is a connection, which must stay what it is. Its context
		// ends with the caller's.
		kept = true
	case resp.Body != nil && resp.Body != http.NoBody:
		kept = true
		resp.Body = &body{ReadCloser: resp.Body, cancel: cancel, idle: t.Idle}
	}
	return resp, nil
}

// A body is a response body that ends its context when it ends.
type body struct {
	io.ReadCloser
	cancel context.CancelCauseFunc
	idle   time.Duration
	timer  *time.Timer // runs during a Read; nil before the first
	silent error       // the limit was exceeded
	closed atomic.Bool
}

func (b *body) Read(p []byte) (int, error) {
	if b.silent != nil {
		return 0, b.silent
	}
	n, err := b.read(p)
	if err != nil {
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
		b.timer = time.AfterFunc(b.idle, b.silence)
	} else {
		b.timer.Reset(b.idle)
	}
	defer func() {
		// What the Read says now may be due to silence, even an io.EOF.
		if !b.timer.Stop() {
			b.silent = &exceeded{"nothing of the response body", b.idle}
			err = b.silent
		}
	}()
	return b.ReadCloser.Read(p)
}

// silence ends a Read that has waited too long.
func (b *body) silence() {
	b.cancel(nil)
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
