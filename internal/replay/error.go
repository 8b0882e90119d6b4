package replay

import (
	"errors"
	"io"
	"sync/atomic"
)

// A ReadError says that a request body could not be read: the fault is the
// caller's, not the service's, and sending it again would fail as well.
type ReadError struct{ Err error }

// Error says what the source did.
func (e *ReadError) Error() string { return e.Err.Error() }

// Unwrap returns the source's error.
func (e *ReadError) Unwrap() error { return e.Err }

// Timeout reports whether the source timed out. (url.Error asks the error that
// it wraps, and looks no deeper.)
func (e *ReadError) Timeout() bool {
	cause, ok := errors.AsType[interface {
		error
		Timeout() bool
	}](e.Err)
	return ok && cause.Timeout()
}

// Cause returns the error that a request body's own Read has returned, if err
// tells of one, or nil. A caller may compare it with the one that it knows: what
// net/http puts around it is gone.
func Cause(err error) error {
	if e, ok := errors.AsType[*ReadError](err); ok {
		return e.Err
	}
	return nil
}

func asReadError(err error) error {
	if _, ok := errors.AsType[*ReadError](err); ok {
		return err
	}
	return &ReadError{err}
}

// A watched body is one whose errors are told from the service's. It is used as a
// pointer, which can be compared whatever the body is. It is closed once, also if
// a RoundTripper panics after closing it, and those above it close it again.
type watched struct {
	io.ReadCloser
	closed atomic.Bool
}

func (w *watched) Close() error {
	if w.closed.Swap(true) {
		return nil
	}
	return w.ReadCloser.Close()
}

func (w *watched) Read(p []byte) (int, error) {
	n, err := w.ReadCloser.Read(p)
	if err != nil && err != io.EOF {
		err = asReadError(err)
	}
	return n, err
}

// Watch returns a body that reads and closes body, and whose Read returns its
// errors as *ReadError. It is for bodies that need no recording, because GetBody
// gives another one or because there is one attempt. A body that cannot fail, or
// that tells its errors in this way already, is returned as it is.
func Watch(body io.ReadCloser) io.ReadCloser {
	if InMemory(body) {
		return body
	}
	switch body.(type) {
	case *watched, *Attempt:
		return body
	}
	return &watched{ReadCloser: body}
}
