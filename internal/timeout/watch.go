package timeout

import (
	"context"
	"io"
	"sync"
	"time"
)

// A watch runs the limit on the response headers. It stands still while the
// request body is being read.
//
// Its timer is never stopped for a pause. It rings no later than the earliest
// time at which something can be over, and is set again if nothing is. So a Read
// of the request body costs two looks at the clock, and a ring that comes too
// early, or once too often, does no harm.
type watch struct {
	limit  time.Duration
	what   string
	cancel context.CancelCauseFunc

	mu     sync.Mutex // guards the rest
	timer  *time.Timer
	rings  time.Time // when timer does
	begun  time.Time // plus all pauses that have ended: the limit counts from here
	reads  int       // of the request body, under way
	paused time.Time // since when, if reads > 0
	held   io.Closer // the response body, while it is being held
	came   bool      // the headers have; there are no more pauses
	over   bool      // the limit has been exceeded, or does not matter any more
	late   error     // how it has been exceeded
}

func (t *Transport) newWatch(cancel context.CancelCauseFunc) *watch {
	now := time.Now()
	w := &watch{limit: t.Headers, what: t.What, cancel: cancel, begun: now, rings: now.Add(t.Headers)}
	if w.what == "" {
		w.what = "no response headers"
	}
	w.mu.Lock() // the timer may ring at once
	defer w.mu.Unlock()
	w.timer = time.AfterFunc(t.Headers, w.ring)
	return w
}

// ring ends the attempt if a limit has been exceeded.
func (w *watch) ring() {
	if held := w.check(); held != nil {
		held.Close() // it may be one that does not look at its context
	}
}

// check returns what is to be closed.
func (w *watch) check() io.Closer {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.over {
		return nil
	}
	now := time.Now()
	since := w.begun
	if w.reads > 0 {
		since = w.paused
	}
	if left := w.limit - now.Sub(since); left > 0 {
		w.setTimer(now, left)
		return nil
	}
	var late error = &Exceeded{w.what, w.limit}
	if w.reads > 0 {
		late = &SlowBodyError{w.limit}
	}
	w.over, w.late = true, late
	w.cancel(late) // still locked: whoever sees late sees it as the context's cause
	return w.held
}

// setTimer is called with mu locked.
func (w *watch) setTimer(now time.Time, left time.Duration) {
	w.rings = now.Add(left)
	w.timer.Reset(left)
}

// pause begins a Read of the request body. It reports whether resume is due
// after it, and returns the error if the limit has been exceeded.
func (w *watch) pause() (bool, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.came || w.over {
		return false, w.late
	}
	if w.reads++; w.reads == 1 {
		w.paused = time.Now()
	}
	return true, nil
}

func (w *watch) resume() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.came || w.over {
		return
	}
	if w.reads--; w.reads == 0 {
		w.goOn()
	}
}

// goOn ends a pause. It is called with mu locked.
func (w *watch) goOn() {
	now := time.Now()
	w.begun = w.begun.Add(now.Sub(w.paused))
	// The timer may have been set for the end of the longest pause.
	if left := w.limit - now.Sub(w.begun); now.Add(left).Before(w.rings) {
		w.setTimer(now, left)
	}
}

// hold says that the headers have come and that the limit goes on, for what is
// being held. It reports whether there is still time. A nil watch has no limit.
func (w *watch) hold(held io.Closer) bool {
	if w == nil {
		return true
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.came, w.held = true, held
	if w.reads > 0 && !w.over {
		w.reads = 0
		w.goOn()
	}
	return !w.over
}

// stop ends the limit, and returns the error if it has been exceeded. A nil
// watch has none.
func (w *watch) stop() error {
	if w == nil {
		return nil
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.over, w.held = true, nil
	w.timer.Stop()
	return w.late
}
