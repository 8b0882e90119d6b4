// Package replay hands one request body to several attempts in turn.
//
// A request body can be read only once. A Body keeps what its source gives as
// the first attempt reads it, up to a limit, so that later attempts can read
// the same bytes again and then go on with the rest. Nothing is read ahead: a
// pipe streams as it would without. A source that can seek is rewound to where
// it was handed over instead, and nothing is kept.
package replay

import (
	"errors"
	"io"
	"sync"
	"time"
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

func asReadError(err error) error {
	if _, ok := errors.AsType[*ReadError](err); ok {
		return err
	}
	return &ReadError{err}
}

var (
	errOver     = errors.New("tripper: read of a request body whose attempt is over")
	errPanicked = errors.New("tripper: the request body's Read did not return")
)

// A Body is the body of one request. Its source is closed once: when nobody
// needs it any more and the last attempt that had it has been closed.
//
// What is to be kept is read from the source by a goroutine of its own, into a
// buffer of its own. That way an attempt that is closed can leave in the middle
// of a Read that hangs, as net/http's HTTP/2 demands of a body, and what the
// Read brings in the end is there for the next attempt.
type Body struct {
	src   io.ReadCloser
	seek  io.Seeker // src, if it can be rewound to start
	start int64
	limit int64

	mu      sync.Mutex // never held during a call to src
	changed sync.Cond  // something below, or in an Attempt
	current *Attempt   // the one that may read
	at      *Attempt   // the one whose place in the body seek is at
	busy    bool       // src is being read
	kept    []byte     // what src gave so far
	end     error      // what src says after kept; nil while it is not known
	lost    bool       // kept is not all that was read: no further attempt
	over    bool       // no further attempt will come
	closed  bool       // src has been closed

	panicked any // by src.Read
}

// New returns a Body for src, of which it keeps at most limit bytes, and its
// first attempt. A limit below zero, or a length above it (-1 if it is not
// known), means that there will be no further attempt.
func New(src io.ReadCloser, length, limit int64) (*Body, *Attempt) {
	b := &Body{src: src, limit: limit}
	b.changed.L = &b.mu
	if s, ok := src.(io.Seeker); ok && limit >= 0 {
		if at, err := s.Seek(0, io.SeekCurrent); err == nil {
			b.seek, b.start = s, at
		}
	}
	b.lost = b.seek == nil && (limit < 0 || length > limit)
	b.current = b.attempt()
	b.at = b.current
	return b, b.current
}

func (b *Body) attempt() *Attempt {
	return &Attempt{body: b, released: make(chan struct{})}
}

// Replayable reports whether Next would return an attempt now.
func (b *Body) Replayable() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return !b.lost && !b.over
}

// Next ends the attempt before and returns a new one that reads the body from
// its beginning, or nil if that is not possible.
func (b *Body) Next() *Attempt {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.lost || b.over {
		return nil
	}
	if !b.current.started {
		b.current.release() // it will never read
	}
	a := b.attempt()
	a.before, b.current = b.current.released, a
	b.changed.Broadcast()
	return a
}

// Finish says that no further attempt will come. The source is closed as soon
// as the last attempt is.
func (b *Body) Finish() { b.finish(false) }

// Abort is Finish for an attempt that nobody will close any more.
func (b *Body) Abort() { b.finish(true) }

func (b *Body) finish(abort bool) {
	b.mu.Lock()
	b.over = true
	if abort {
		b.current.close()
	}
	unused, busy := b.unused(), b.busy
	b.mu.Unlock()
	switch {
	case unused && busy:
		go b.src.Close() // which may have to wait for the Read, as a server's request body does
	case unused:
		b.src.Close()
	}
}

// unused reports whether src is to be closed now, by whoever asks. It requires
// that mu is held.
func (b *Body) unused() bool {
	if b.closed || !b.current.closed || !b.over && !b.lost && b.end == nil {
		return false
	}
	b.closed = true
	return true
}

const fetchSize = 32 << 10 // what io.Copy asks for

var buffers = sync.Pool{New: func() any { return new([fetchSize]byte) }}

// fetch reads from src on behalf of the attempt by, which has read all of kept.
func (b *Body) fetch(by *Attempt, size int) {
	buf := buffers.Get().(*[fetchSize]byte)
	n, err := 0, errPanicked
	defer func() {
		b.fetched(by, buf[:n], err, recover())
		buffers.Put(buf)
	}()
	n, err = b.src.Read(buf[:min(size, fetchSize)])
}

func (b *Body) fetched(by *Attempt, p []byte, err error, panicked any) {
	b.mu.Lock()
	defer b.mu.Unlock()
	// What has been promised to a next attempt must not be lost.
	if b.current == by && int64(len(b.kept)+len(p)) > b.limit {
		b.lost = true
	}
	b.kept = append(b.kept, p...)
	if err != nil {
		b.end = b.ended(err)
	}
	b.busy, b.panicked = false, panicked
	b.changed.Broadcast()
}

// ended takes down an error of src and returns how a Read tells it. It requires
// that mu is held.
func (b *Body) ended(err error) error {
	if err == io.EOF {
		return err
	}
	b.lost = true
	return asReadError(err)
}

// An Attempt reads the Body once from its beginning. Like any request body it
// may be closed while a Read is under way, and more than once.
type Attempt struct {
	body     *Body
	before   <-chan struct{} // released, of the attempt before
	released chan struct{}   // closed when the attempt has let go of the body

	// Guarded by body.mu.
	pos     int // in body.kept
	started bool
	free    bool // released is closed
	closed  bool
}

// Wait, of an attempt that Next has returned, returns once the attempt before
// has let go of the body: it was closed, has read all of it, or never began. It
// gives up after limit, or when done is closed; the attempt before cannot read
// any more in any case.
func (a *Attempt) Wait(done <-chan struct{}, limit time.Duration) {
	select {
	case <-a.before:
		return
	default:
	}
	timer := time.NewTimer(limit)
	defer timer.Stop()
	select {
	case <-a.before:
	case <-done:
	case <-timer.C:
	}
}

// Read gives what is kept and then what the source gives.
func (a *Attempt) Read(p []byte) (int, error) {
	b := a.body
	b.mu.Lock()
	defer b.mu.Unlock()
	a.started = true
	for fetched := false; b.current == a && !a.closed; {
		switch {
		case a.pos < len(b.kept), b.end != nil, fetched && !b.busy, len(p) == 0:
			return a.take(p)
		case b.busy:
			b.changed.Wait()
		case b.seek != nil, b.lost, b.over:
			return a.direct(p)
		default:
			b.busy, fetched = true, true
			go b.fetch(a, len(p))
		}
	}
	return 0, errOver
}

// take reads from what is kept. It requires that body.mu is held.
func (a *Attempt) take(p []byte) (int, error) {
	b := a.body
	if b.panicked != nil {
		panic(b.panicked) // where the caller of Read may expect it
	}
	n := copy(p, b.kept[a.pos:])
	a.pos += n
	if a.pos < len(b.kept) {
		return n, nil
	}
	if b.end != nil {
		a.release()
	}
	return n, b.end
}

// direct reads from src, of which nothing needs to be kept, once a has read all
// that was. It requires that body.mu is held, but not during its call to src.
func (a *Attempt) direct(p []byte) (n int, err error) {
	b := a.body
	b.kept, a.pos = nil, 0
	b.busy, err = true, errPanicked
	rewind := b.seek != nil && b.at != a
	b.at = a
	b.mu.Unlock()
	defer func() {
		b.mu.Lock()
		b.busy = false
		b.changed.Broadcast()
		if err != nil {
			err = b.ended(err)
			a.release()
		}
	}()
	if rewind {
		if _, err = b.seek.Seek(b.start, io.SeekStart); err != nil {
			return 0, err
		}
	}
	return b.src.Read(p)
}

// Close ends the attempt. It returns the error of closing the source if that is
// what it does.
func (a *Attempt) Close() error {
	b := a.body
	b.mu.Lock()
	a.close()
	unused := b.unused()
	b.mu.Unlock()
	if unused {
		return b.src.Close()
	}
	return nil
}

// close requires that body.mu is held.
func (a *Attempt) close() {
	a.closed = true
	a.release()
	a.body.changed.Broadcast()
}

// release requires that body.mu is held.
func (a *Attempt) release() {
	if !a.free {
		a.free = true
		close(a.released)
	}
}
