package fault

import (
	"context"
	"net/http/httptrace"
	"net/textproto"
)

// A HookError is the error of a caller's own httptrace hook.
type HookError struct{ Err error }

// Error says what the hook says.
func (e *HookError) Error() string { return e.Err.Error() }

// Unwrap returns the hook's error.
func (e *HookError) Unwrap() error { return e.Err }

// Timeout reports whether the hook's error is a timeout. (url.Error asks the
// error that it wraps, and looks no deeper.)
func (e *HookError) Timeout() bool { return IsTimeout(e.Err) }

// HasHook reports whether WatchHook has anything to watch. (Contexts must not be
// compared: their types need not be comparable.)
func HasHook(ctx context.Context) bool {
	trace := httptrace.ContextClientTrace(ctx)
	return trace != nil && trace.Got1xxResponse != nil
}

// WatchHook returns a context in which an error of the Got1xxResponse hook, the
// only one that can fail, comes as a *HookError. Without such a hook it is ctx
// itself.
func WatchHook(ctx context.Context) context.Context {
	if !HasHook(ctx) {
		return ctx
	}
	trace := httptrace.ContextClientTrace(ctx)
	hook, copied := trace.Got1xxResponse, *trace
	copied.Got1xxResponse = func(code int, header textproto.MIMEHeader) error {
		err := hook(code, header)
		if err == nil || is[*HookError](err) {
			return err
		}
		return &HookError{err}
	}
	return &watched{ctx, trace, &copied}
}

// A watched context has another trace. httptrace.WithClientTrace would put the
// other one beside the caller's, and each of its hooks would be called twice.
type watched struct {
	context.Context
	trace, instead *httptrace.ClientTrace
}

func (w *watched) Value(key any) any {
	v := w.Context.Value(key)
	if trace, ok := v.(*httptrace.ClientTrace); ok && trace == w.trace {
		return w.instead
	}
	return v
}
