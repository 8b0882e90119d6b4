package circuit

import (
	"math"
	"time"
)

// slots is how many parts a window has. An attempt is forgotten between one
// Window and nine tenths of one after it ended.
const slots = 10

// A window counts the attempts that have ended within about the last Window,
// and those that began in it and are still under way. The latter keep fast
// failures from looking like all there is while slow successes are under way.
type window struct {
	slots  []slot
	start  time.Time
	latest int32 // the turn looked at last
}

type slot struct {
	turn          int32 // which time around the clock the counts are of
	underWay      int   // began in this turn and have not ended
	total, failed int   // ended in this turn
}

// at returns the slot of now, and its turn. It must be called before anything
// is counted.
func (w *window) at(now time.Time, length time.Duration) (*slot, int32) {
	turn := now.Sub(w.start) / max(1, length/slots)
	if w.slots == nil || turn > math.MaxInt32 {
		*w, turn = window{slots: make([]slot, slots), start: now}, 0
	}
	// A caller may have looked at its clock well before others that were here
	// already: turns never go back.
	w.latest = max(w.latest, int32(max(0, turn)))
	s := &w.slots[w.latest%slots]
	if s.turn != w.latest {
		*s = slot{turn: w.latest}
	}
	return s, w.latest
}

// begin counts an attempt that begins, and returns its turn.
func (w *window) begin(now time.Time, length time.Duration) int32 {
	s, turn := w.at(now, length)
	s.underWay++
	return turn
}

// end counts the end of an attempt that began in the turn began, and returns
// the sums.
func (w *window) end(began int32, outcome Outcome, now time.Time, length time.Duration) (total, failed int) {
	s, turn := w.at(now, length)
	if b := &w.slots[began%slots]; b.turn == began && b.underWay > 0 {
		b.underWay--
	}
	if outcome != Ignored {
		s.total++
	}
	if outcome == Failure {
		s.failed++
	}
	for i := range w.slots {
		if s := &w.slots[i]; s.turn > turn-slots {
			total += s.total + s.underWay
			failed += s.failed
		}
	}
	return total, failed
}
