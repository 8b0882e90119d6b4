// Package timeout limits how long a RoundTripper may be silent, without ever
// cutting a response that is moving.
package timeout

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"time"
)

// A Transport limits the requests to Base. Zero means no limit.
//
// Headers limits the time until the response headers have come and Hold has
// returned. The time that Reads of the request body take does not count: then it
// is the caller who makes the service wait. But one such Read may take no longer
// than Headers, or else the request ends with a *SlowBodyError.
type Transport struct {
	Base    http.RoundTripper
	Headers time.Duration
	Idle    time.Duration // within one Read of the response body

	// Total makes Headers a limit on everything: the Reads of the request body
	// count, too. Then Base gets the caller's own body, not a wrapped one.
	Total bool

	// What has not come when the limit of Headers is exceeded, for the error's
	// text. Empty means "no response headers".
	What string

	// Hold, if not nil, gets each response of Base, except those that switch
	// protocols, and returns it or an error. The body is already under the limit
	// of Idle. If Hold returns an error, the response is its own to close, at once
	// or later; until then the body can be read.
	Hold func(*http.Request, *http.Response) (*http.Response, error)
}

// Exceeded is the error of a limit: What did not come in time. It is also the
// cause of the attempt's context.
type Exceeded struct {
	What  string
	Limit time.Duration
}

// Error says what did not come, and within which limit.
func (e *Exceeded) Error() string { return fmt.Sprintf("tripper: %s within %v", e.What, e.Limit) }

// Timeout reports true.
func (e *Exceeded) Timeout() bool { return true }

// Temporary reports true, as net/http's own timeouts do.
func (e *Exceeded) Temporary() bool { return true }

// Is makes it match what net/http's own timeouts match.
func (e *Exceeded) Is(target error) bool { return target == context.DeadlineExceeded }

// SlowBodyError is the error of a request whose own body stalled. The service is
// not to blame.
type SlowBodyError struct {
	Limit time.Duration
}

// Error says how long the body gave nothing.
func (e *SlowBodyError) Error() string {
	return fmt.Sprintf("tripper: the request body gave nothing within %v", e.Limit)
}

// Timeout reports true.
func (e *SlowBodyError) Timeout() bool { return true }

// RoundTrip sends a copy of req whose context ends when a limit is exceeded.
func (t *Transport) RoundTrip(req *http.Request) (*http.Response, error) {
	if t.Headers <= 0 && t.Idle <= 0 {
		resp, err := t.Base.RoundTrip(req)
		if err == nil && resp != nil && t.Hold != nil {
			return t.Hold(req, resp)
		}
		return resp, err
	}
	ctx, cancel := context.WithCancelCause(req.Context())
	a := attempt{Transport: t, req: req, cancel: cancel}
	defer a.end()
	sent := req.WithContext(ctx)
	if t.Headers > 0 {
		a.watch = t.newWatch(cancel)
		if !t.Total && canStall(req.Body) {
			sent.Body = newUpload(ctx, req.Body, a.watch)
		}
	}
	resp, err := t.Base.RoundTrip(sent)
	if err == nil && resp != nil {
		resp, err = a.answered(resp)
	}
	if late := a.watch.stop(); late != nil && context.Cause(ctx) == late { // otherwise the caller was first
		if a.open != nil {
			a.open.Close()
		}
		a.kept = false
		return nil, late
	}
	a.returned = true
	return resp, err
}

// An attempt is one RoundTrip. Only its goroutine uses it.
type attempt struct {
	*Transport
	req      *http.Request
	cancel   context.CancelCauseFunc
	watch    *watch    // nil without a limit on the headers
	open     io.Closer // the body of Base's response
	kept     bool      // the context goes on with the body
	returned bool
}

// end is deferred. Without a return, Base or Hold has panicked or called Goexit.
func (a *attempt) end() {
	a.watch.stop()
	if a.kept && !a.returned {
		a.open.Close()
		a.kept = false
	}
	if !a.kept {
		a.cancel(nil)
	}
}

// answered wraps the body of a response and holds it.
func (a *attempt) answered(resp *http.Response) (*http.Response, error) {
	resp.Request = a.req
	if resp.StatusCode == http.StatusSwitchingProtocols {
		// The body is a connection, which must stay what it is. Its context
		// ends with the caller's.
		a.open, a.kept = resp.Body, resp.Body != nil
		return resp, nil
	}
	// With http.NoBody everything is over. It is HTTP/1 that has it: over HTTP/2,
	// where the request may still be on its way, an empty body is another one.
	if resp.Body != nil && resp.Body != http.NoBody {
		b := &body{ReadCloser: resp.Body, cancel: a.cancel, idle: a.Idle}
		a.open, a.kept = b, true
		resp.Body = b
	}
	if a.Hold == nil || !a.watch.hold(a.open) {
		return resp, nil
	}
	return a.Hold(a.req, resp)
}
