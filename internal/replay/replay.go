// Package replay hands one request body to several attempts in turn.
//
// A request body can be read only once. A Body keeps what its source gives as
// the first attempt reads it, up to a limit, so that later attempts can read
// the same bytes again and then go on with the rest. Nothing is read ahead: a
// pipe streams as it would without.
//
// A source that is known to go back, such as a file, is rewound to where it was
// handed over instead, and nothing is kept. Any other source that says that it
// can seek is recorded, too, for many cannot go back. It is rewound only when it
// turns out to be longer than what may be kept: while there still is an answer to
// return if that fails.
package replay

import (
	"errors"
	"io"
	"sync"
	"time"
)

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
	src     io.ReadCloser
	seek    io.Seeker // src, if it can be rewound to start
	start   int64
	trusted bool // seek is sure to go back
	limit   int64
	memory  *Memory

	mu      sync.Mutex // guards the fields below and those of Attempts; never held during a call to src
	changed sync.Cond  // something below, or in an Attempt
	current *Attempt   // the one that may read
	at      *Attempt   // the one whose place in the body seek is at; it says nothing unless rewind
	busy    bool       // src is being read, or rewound
	seeking bool       // it is being rewound by Next
	kept    []byte     // what src gave so far
	held    int64      // how many bytes of it are taken from memory
	end     error      // what src says after kept; nil while it is not known
	rewind  bool       // a next attempt has src rewound: nothing more is recorded
	lost    bool       // kept is not all that was read, and rewinding is no way out: no further attempt
	over    bool       // no further attempt will come
	closed  bool       // src has been closed

	panicked any // by src.Read
}

// New returns a Body for src, of which it keeps at most limit bytes and no more
// than memory has room for, and its first attempt. A limit below zero, or a
// length above it (-1 if it is not known) of a source that cannot seek, means
// that there will be no further attempt.
func New(src io.ReadCloser, length, limit int64, memory *Memory) (*Body, *Attempt) {
	b := &Body{src: src, limit: limit, memory: memory}
	b.changed.L = &b.mu
	if limit >= 0 {
		b.seek, b.start, b.trusted = seeker(src)
	}
	b.current = b.attempt()
	switch {
	case b.trusted:
		b.rewind, b.at = true, b.current
	case limit < 0, length > limit:
		b.stopRecording()
	}
	return b, b.current
}

func (b *Body) attempt() *Attempt {
	return &Attempt{body: b, released: make(chan struct{})}
}

// Replayable reports whether Next would return an attempt now, as far as can be
// told before a source is rewound.
func (b *Body) Replayable() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return !b.lost && !b.over && (!b.rewind || b.trusted || b.untouched() || b.idle())
}

// untouched reports whether src is where the next attempt wants it, because the
// current one has not read any of it. It requires that mu is held.
func (b *Body) untouched() bool { return b.at == b.current && !b.current.started }

// idle reports whether the current attempt has let go of src, which can then be
// rewound. It requires that mu is held.
func (b *Body) idle() bool { return !b.busy && (b.current.free || !b.current.started) }

// Next ends the attempt before and returns a new one that reads the body from
// its beginning, or nil if that is not possible: the attempt before may go on
// then.
func (b *Body) Next() *Attempt {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.lost || b.over {
		return nil
	}
	a, before := b.attempt(), b.current
	if b.rewind && !b.goBack(a) {
		return nil
	}
	if !before.started {
		before.release() // it will never read
	}
	a.before, b.current = before.released, a
	b.changed.Broadcast()
	return a
}

// goBack makes src ready for the next attempt, and reports whether there can be
// one. It requires that mu is held, but not during its call to src.
func (b *Body) goBack(next *Attempt) bool {
	switch {
	case b.untouched():
		b.at = next
		return true
	case !b.idle():
		return b.trusted // the first Read of the next attempt will rewind it
	case !b.seekStart():
		b.lost = true
		b.tidy()
		return false
	}
	b.at, b.end = next, nil
	b.drop()
	return !b.over && !b.lost // they may have come meanwhile
}

// seekStart rewinds src for Next. It requires that mu is held, but not during its
// call to src. That must not meet a Close of src, which is made up for here.
func (b *Body) seekStart() (ok bool) {
	b.busy, b.seeking = true, true
	b.mu.Unlock()
	defer func() {
		b.mu.Lock()
		b.busy, b.seeking = false, false
		b.changed.Broadcast()
		if b.unused() {
			go b.src.Close()
		}
	}()
	at, err := b.seek.Seek(b.start, io.SeekStart)
	return err == nil && at == b.start
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
	b.tidy()
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
	all := b.end != nil && !b.rewind // of src is kept
	if b.closed || b.seeking || !b.current.closed || !b.over && !b.lost && !all {
		return false
	}
	b.closed = true
	return true
}

// stopRecording says that what src has given is too much to be kept. It requires
// that mu is held, and is called on behalf of the current attempt.
func (b *Body) stopRecording() {
	if b.seek == nil {
		b.lost = true
		return
	}
	b.rewind, b.at = true, b.current
}

// tidy lets go of what is kept if nobody will read it any more. It requires that
// mu is held.
func (b *Body) tidy() {
	if b.current.free && (b.over || b.lost || b.rewind) {
		b.drop()
	}
}

// drop lets go of what is kept and gives its memory back. It requires that mu is
// held.
func (b *Body) drop() {
	b.memory.add(-b.held)
	b.kept, b.held, b.current.pos = nil, 0, 0
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
	b.record(by, int64(len(p)))
	b.kept = append(b.kept, p...)
	if err != nil {
		b.end = b.ended(err)
	}
	b.busy, b.panicked = false, panicked
	b.tidy()
	b.changed.Broadcast()
}

// record takes the memory for n bytes more, or stops recording. The bytes are
// the current attempt's in any case. It requires that mu is held.
func (b *Body) record(by *Attempt, n int64) {
	switch {
	case b.over, n == 0:
	case b.current != by: // they have been promised to a next attempt
		b.memory.add(n)
		b.held += n
	case n > b.limit-int64(len(b.kept)), !b.memory.take(n):
		b.stopRecording()
	default:
		b.held += n
	}
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
	pos     int   // in body.kept
	end     error // how its reading has ended
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
		case a.end != nil:
			return 0, a.end
		case a.pos < len(b.kept), b.end != nil, fetched && !b.busy, len(p) == 0:
			return a.take(p)
		case b.busy:
			b.changed.Wait()
		case b.rewind, b.lost, b.over:
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
		a.end = b.end
		a.release()
	}
	return n, a.end
}

// direct reads from src, of which nothing needs to be kept, once a has read all
// that was. It requires that body.mu is held, but not during its call to src.
func (a *Attempt) direct(p []byte) (n int, err error) {
	b := a.body
	b.drop()
	b.busy, err = true, errPanicked
	rewind := b.rewind && b.at != a
	b.at = a
	b.mu.Unlock()
	defer func() {
		b.mu.Lock()
		b.busy = false
		b.changed.Broadcast()
		if err != nil {
			err = b.ended(err)
			a.end = err
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
		a.body.tidy()
	}
}
