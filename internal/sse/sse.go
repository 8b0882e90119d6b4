// Package sse tells streams of server-sent events that begin well from those
// that die early. The format is that of
// https://html.spec.whatwg.org/multipage/server-sent-events.html.
package sse

import (
	"context"
	"io"
	"net/http"
	"strings"
	"sync/atomic"
)

// A Transport is a RoundTripper that passes what Base answers through Hold.
type Transport struct {
	Base http.RoundTripper
}

// RoundTrip returns a *Failure for a stream that died early.
func (t *Transport) RoundTrip(req *http.Request) (*http.Response, error) {
	resp, err := t.Base.RoundTrip(req)
	if err != nil || resp == nil {
		return resp, err
	}
	return Hold(req, resp)
}

// A Failure is the error of an attempt whose stream died early. Whoever has it
// last either returns or closes the response.
type Failure struct {
	Response *http.Response // as it came; reading its body meets what happened
	Err      error          // an *EventError, io.ErrUnexpectedEOF if there was no event, or what the read said
}

// Error says why the stream failed.
func (f *Failure) Error() string {
	return "tripper: event stream failed before its first event: " + f.Err.Error()
}

// Unwrap returns Err.
func (f *Failure) Unwrap() error { return f.Err }

// maxHeld bounds what is held back; a longer beginning counts as an event.
const maxHeld = 64 << 10

// Hold holds back a response to req that is an event stream until its first
// real event: one that has data, other than a ping. If the stream ends, breaks off
// or reports an error that a retry may cure before that, the attempt has failed:
// Hold returns a *Failure. Other streams flow as they come from then on, with a
// *Body for their body. Other responses are returned as they are.
func Hold(req *http.Request, resp *http.Response) (*http.Response, error) {
	if req.Method == http.MethodHead || !isEventStream(resp) {
		return resp, nil
	}
	if resp.Body == nil || resp.Body == http.NoBody {
		resp.Body = http.NoBody
		return nil, &Failure{resp, io.ErrUnexpectedEOF}
	}
	b := &Body{rc: resp.Body}
	looked := false
	defer func() {
		if !looked { // a Read has panicked or called Goexit
			b.Close()
		}
	}()
	failure := b.hold()
	looked = true
	if failure == nil {
		resp.Body = b
		return resp, nil
	}
	if ctx := req.Context(); ctx.Err() != nil {
		b.Close()
		return nil, context.Cause(ctx)
	}
	resp.Body = b
	return nil, &Failure{resp, failure}
}

func isEventStream(resp *http.Response) bool {
	if resp.StatusCode != http.StatusOK || resp.Header.Get("Content-Encoding") != "" {
		return false
	}
	kind, _, _ := strings.Cut(resp.Header.Get("Content-Type"), ";")
	return strings.EqualFold(strings.TrimSpace(kind), "text/event-stream")
}

// A Body is an event stream whose beginning has been looked at. Failed and Close
// may be called beside a Read: what the other fields hold belongs to Read.
type Body struct {
	rc     io.ReadCloser
	held   []byte // read but not given out
	err    error  // that comes after held
	parser parser
	failed atomic.Pointer[EventError] // the parser's, for Failed
}

// hold reads up to the first real event, and returns why there is none.
func (b *Body) hold() error {
	chunk := make([]byte, 4<<10)
	for len(b.held) < maxHeld {
		n, err := b.rc.Read(chunk)
		b.held = append(b.held, chunk[:n]...)
		b.feed(chunk[:n])
		b.err = err
		switch {
		case b.parser.early != nil && curable(b.parser.early.Status):
			return b.parser.early
		case b.parser.begun:
			return nil
		case err == io.EOF:
			return io.ErrUnexpectedEOF
		case err != nil:
			return err
		}
	}
	return nil
}

func (b *Body) feed(chunk []byte) {
	b.parser.feed(chunk)
	if b.parser.failed != nil {
		b.failed.Store(b.parser.failed)
	}
}

// curable reports whether a retry may cure an error with this status.
func curable(status int) bool {
	return status == http.StatusRequestTimeout || status == http.StatusTooManyRequests ||
		status >= 500 && status <= 599
}

// Failed returns the first error event that has been read so far, or nil.
func (b *Body) Failed() *EventError { return b.failed.Load() }

// Read gives what was held, and then what comes.
func (b *Body) Read(p []byte) (int, error) {
	if len(b.held) > 0 {
		n := copy(p, b.held)
		if b.held = b.held[n:]; len(b.held) == 0 {
			b.held = nil
		}
		return n, nil
	}
	if b.err != nil {
		return 0, b.err
	}
	n, err := b.rc.Read(p)
	b.feed(p[:n])
	return n, err
}

// Close closes the stream.
func (b *Body) Close() error { return b.rc.Close() }
