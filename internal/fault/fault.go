// Package fault says what an error of net/http means: whose fault it is, and
// whether anything of the request was sent. It is the one place that looks at an
// error's text.
//
// An error is told by its type, or by its identity: net/http has errors without a
// type that are always the same value. What is left has nothing but a text. Such
// a text is compared whole, and with what net/http would say about this request.
// It is never searched: net/http quotes its peers, and the reason that a proxy
// gives for refusing a CONNECT is the whole text of an error.
package fault

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"reflect"
	"slices"

	"github.com/tripper-go/tripper/internal/replay"
	"github.com/tripper-go/tripper/internal/timeout"
)

// A Kind says whose fault an error is.
type Kind int

const (
	// Service is the service, or the way to it: another attempt may do better.
	Service Kind = iota

	// Final is the service again, but another attempt would fail as well: a
	// certificate that one side does not accept, no TLS, a fatal TLS alert.
	Final

	// Caller is the caller: a request that net/http refuses to send, a body that
	// cannot be read, an error of its httptrace hook.
	Caller

	// Cancelled is the caller, too, who has cancelled the request.
	Cancelled

	// Proxy is a proxy that refuses for good, or that nobody can trust. It says
	// nothing about the service.
	Proxy
)

// A Fault is what an error means.
type Fault struct {
	Kind      Kind
	NeverSent bool // nothing of the request reached the service
}

// Of says what err means as the result of sending req. A nil req is one that
// nobody knows; then more rests on the text alone.
func Of(req *http.Request, err error) Fault {
	if err == nil {
		return Fault{}
	}
	if callersOwn(err) {
		return Fault{Kind: Caller}
	}
	if cancelled(req, err) {
		return Fault{Kind: Cancelled}
	}
	sent := !neverSent(err)
	if untrusted, handshake := insecure(err); untrusted {
		kind := Final
		if toProxy(err) {
			kind = Proxy
		}
		return Fault{Kind: kind, NeverSent: handshake || !sent}
	}
	if isIDNA(err) {
		return Fault{Kind: Caller, NeverSent: true}
	}
	if refusedBySOCKS(err) {
		return Fault{Kind: Proxy, NeverSent: true}
	}
	for _, t := range textsOf(err) {
		if f := ofText(req, t); f != (Fault{}) {
			return f
		}
	}
	return Fault{NeverSent: !sent}
}

// ofText says what t means by itself.
func ofText(req *http.Request, t text) Fault {
	switch {
	case refused(req, t):
		return Fault{Kind: Caller, NeverSent: true}
	case wrongBody(req, t):
		return Fault{Kind: Caller}
	}
	if status := connectStatus(req, t); status != 0 {
		return Fault{Kind: kindOfConnect(status), NeverSent: true}
	}
	return Fault{}
}

// IsTimeout reports whether err, or any error that it wraps, says of itself that
// it is a timeout.
func IsTimeout(err error) bool {
	return contains(err, func(err error) bool {
		t, ok := err.(interface{ Timeout() bool })
		return ok && t.Timeout()
	})
}

// callersOwn reports whether err comes from code of the caller's: its request
// body or its hook.
func callersOwn(err error) bool {
	if is[*replay.ReadError](err) || is[*timeout.SlowBodyError](err) || is[*HookError](err) {
		return true
	}
	// The cause of an HTTP/2 stream's error is not in the chain.
	stream, ok := errors.AsType[streamError](err)
	return ok && is[*HookError](stream.Cause)
}

// cancelled reports whether the caller cancelled req.
func cancelled(req *http.Request, err error) bool {
	if errors.Is(err, context.Canceled) {
		// Whoever merges contexts makes Canceled of a deadline.
		return req == nil || req.Context().Err() != context.DeadlineExceeded
	}
	return slices.ContainsFunc(textsOf(err), func(t text) bool {
		if t.s != errCancelled && t.s != errCancelledWaiting {
			return false
		}
		known := known()
		return t.leaf == known.cancelled || t.leaf == known.waiting || cancelClosed(req) || req != nil && !mayConnect(req)
	})
}

func cancelClosed(req *http.Request) bool {
	if req == nil {
		return false
	}
	select {
	case <-req.Cancel: //lint:ignore SA1019 callers still use it
		return true
	default:
		return false
	}
}

func is[E error](err error) bool {
	_, ok := errors.AsType[E](err)
	return ok
}

// contains reports whether f is true for err or for any error that it wraps.
func contains(err error, f func(error) bool) bool {
	if err == nil {
		return false
	}
	if f(err) {
		return true
	}
	switch wrapper := err.(type) {
	case interface{ Unwrap() error }:
		return contains(wrapper.Unwrap(), f)
	case interface{ Unwrap() []error }:
		for _, err := range wrapper.Unwrap() {
			if contains(err, f) {
				return true
			}
		}
	}
	return false
}

// A text is what an error says that has nothing but a text.
type text struct {
	s    string
	leaf error // the innermost error

	// own means that net/http has wrapped it in a way in which it wraps nothing
	// whose whole text is a peer's.
	own bool
}

var (
	errorString = reflect.TypeOf(errors.New(""))
	wrapError   = reflect.TypeOf(fmt.Errorf("%w", errors.New("")))
)

const (
	brokenPrefix = "net/http: HTTP/1.x transport connection broken: "
	http2Prefix  = "http2: "
)

// textsOf returns what the innermost errors of err say that have no type of their
// own, with the prefix that HTTP/2 puts before some of them.
func textsOf(err error) []text { return appendTexts(nil, err, text{}) }

func appendTexts(all []text, err error, t text) []text {
	if several, ok := err.(interface{ Unwrap() []error }); ok {
		for _, err := range several.Unwrap() {
			all = appendTexts(all, err, text{})
		}
		return all
	}
	next := errors.Unwrap(err)
	switch {
	case next == nil && reflect.TypeOf(err) != errorString:
		return all
	case next == nil:
		if t.leaf = err; t.s == "" {
			t.s = err.Error()
		}
		return append(all, t)
	case isNothingWritten(err):
		t.own = true
	case reflect.TypeOf(err) != wrapError:
	case err.Error() == brokenPrefix+next.Error():
		t.own = true
	case err.Error() == http2Prefix+next.Error() && errors.Unwrap(next) == nil:
		t.own, t.s = true, err.Error()
	}
	return appendTexts(all, next, t)
}

// mayConnect reports whether a proxy's reason phrase may be the whole text of an
// error of req: only https has the proxy CONNECT.
func mayConnect(req *http.Request) bool {
	return req == nil || req.URL == nil || req.URL.Scheme != "http"
}
