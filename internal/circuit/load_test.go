package circuit

import (
	"container/heap"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// A load is calls at a steady pace. Each one gets its fate from the service.
type load struct {
	every   time.Duration
	service func(r *rand.Rand, now time.Time) call
}

// A call is answered after some time, unless it has failed by then; the body of
// one that streams ends later still.
type call struct {
	takes   time.Duration
	fails   bool
	streams time.Duration // after the answer
	breaks  bool
}

// An event is something that happens to a call.
type event struct {
	at time.Time
	do func()
}

type events []event

func (e events) Len() int           { return len(e) }
func (e events) Less(i, j int) bool { return e[i].at.Before(e[j].at) }
func (e events) Swap(i, j int)      { e[i], e[j] = e[j], e[i] }
func (e *events) Push(x any)        { *e = append(*e, x.(event)) }
func (e *events) Pop() any {
	old := *e
	last := old[len(old)-1]
	*e = old[:len(old)-1]
	return last
}

// A simulation drives one breaker with loads, in virtual time.
type simulation struct {
	*driver
	r      *rand.Rand
	events events
}

func (s *simulation) after(d time.Duration, do func()) { heap.Push(&s.events, event{s.now.Add(d), do}) }

func (s *simulation) start(l load) {
	s.call(l.service(s.r, s.now))
	s.after(l.every, func() { s.start(l) })
}

func (s *simulation) call(c call) {
	p, no := s.admit()
	if no != nil {
		return
	}
	verdict := func(bad bool) Verdict {
		if bad {
			return verdicts["fail"]
		}
		return verdicts["ok"]
	}
	s.after(c.takes, func() {
		if c.fails || c.streams == 0 {
			record(s.b, p, verdict(c.fails), s.now)
			return
		}
		p = s.b.Answer(p, nil, s.now)
		s.after(c.streams, func() { record(s.b, p, verdict(c.breaks), s.now) })
	})
}

// run lets d pass, and returns when the breaker was opened first, or zero.
func (s *simulation) run(d time.Duration) (opened time.Duration) {
	from, end := s.now, s.now.Add(d)
	for len(s.events) > 0 && !s.events[0].at.After(end) {
		e := heap.Pop(&s.events).(event)
		s.now = e.at
		e.do()
		if s.b.gate.Load()&shut != 0 {
			return s.now.Sub(from)
		}
	}
	s.now = end
	return 0
}

func newSimulation(t *testing.T, seed uint64) *simulation {
	return &simulation{driver: newDriver(t, usual), r: rand.New(rand.NewPCG(seed, 1))}
}

// Services that do their job but for a few calls. They are told apart from an
// outage however long their calls take, and however fast the others fail.
func TestLoadsThatNeverOpen(t *testing.T) {
	failing := func(takes time.Duration, share float64) func(*rand.Rand, time.Time) call {
		return func(r *rand.Rand, _ time.Time) call {
			if r.Float64() < share {
				return call{fails: true}
			}
			return call{takes: takes}
		}
	}
	breaking := func(r *rand.Rand, _ time.Time) call {
		if r.Float64() < 0.02 {
			return call{takes: time.Second, streams: time.Duration(r.Int64N(int64(2 * time.Minute))), breaks: true}
		}
		return call{takes: time.Second, streams: 2 * time.Minute}
	}
	for name, l := range map[string]load{
		"ten a second of 3s, 5% fail at once":          {100 * time.Millisecond, failing(3*time.Second, 0.05)},
		"a hundred a second of 1s, 1% fail at once":    {10 * time.Millisecond, failing(time.Second, 0.01)},
		"a thousand a second of 0.2s, 2% fail at once": {time.Millisecond, failing(200*time.Millisecond, 0.02)},
		"one a second of a minute, 10% fail at once":   {time.Second, failing(time.Minute, 0.1)},
		"one stream a second of two minutes, 2% break": {time.Second, breaking},
	} {
		t.Run(name, func(t *testing.T) {
			for seed := range uint64(max(1, min(5, l.every/(20*time.Millisecond)))) {
				s := newSimulation(t, seed)
				s.start(l)
				require.Zero(t, s.run(10*time.Minute), "opened after this, seed %d", seed)
			}
		})
	}
}

// An outage in which calls fail at once is found within two seconds, also while
// calls from before it still go on well.
func TestLoadsThatOpen(t *testing.T) {
	outage := begin.Add(5 * time.Minute)
	from := func(before call) func(*rand.Rand, time.Time) call {
		return func(_ *rand.Rand, now time.Time) call {
			if now.Before(outage) {
				return before
			}
			return call{takes: 10 * time.Millisecond, fails: true}
		}
	}
	for name, before := range map[string]call{
		"fast calls":              {takes: 10 * time.Millisecond},
		"slow calls go on":        {takes: time.Minute},
		"streams go on":           {takes: time.Second, streams: 2 * time.Minute},
		"streams that also break": {takes: time.Second, streams: 2 * time.Minute, breaks: true},
	} {
		t.Run(name, func(t *testing.T) {
			s := newSimulation(t, 0)
			if before.breaks {
				before.breaks = false
				s.start(load{time.Minute, func(*rand.Rand, time.Time) call { return call{streams: 2 * time.Minute, breaks: true} }})
			}
			s.start(load{100 * time.Millisecond, from(before)})
			require.Zero(t, s.run(outage.Sub(begin)-1))
			opened := s.run(time.Minute)
			require.NotZero(t, opened)
			require.LessOrEqual(t, opened, 2*time.Second)
		})
	}
}
