package circuit

import (
	"context"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func TestThousandAtHalfOpen(t *testing.T) {
	for places := 1; places <= 4; places++ {
		c := usualWith(func(c *Config) { c.SuccessThreshold = places })
		d := newDriver(t, c)
		d.b.Trip(d.now, d.now, errHand, ByHand)
		var admitted []Permit
		var mu sync.Mutex
		var all sync.WaitGroup
		ready := make(chan struct{})
		for range 1000 {
			all.Go(func() {
				<-ready
				if p, no := admit(d.b, begin); no == nil {
					mu.Lock()
					defer mu.Unlock()
					admitted = append(admitted, p)
				}
			})
		}
		close(ready)
		all.Wait()
		require.Len(t, admitted, places)
		for _, p := range admitted {
			require.True(t, p.Probe)
			require.Equal(t, HalfOpen, d.state())
			record(d.b, p, verdicts["ok"], d.now)
		}
		require.Equal(t, Closed, d.state())
	}
}

// Goroutines that all come and go as probes: there are never more of them than
// successes are missing.
func TestProbesUnderWayAreBounded(t *testing.T) {
	const places = 3
	d := newDriver(t, usualWith(func(c *Config) { c.SuccessThreshold = places }))
	d.b.Trip(d.now, d.now, errHand, ByHand)
	var inside, probes atomic.Int64
	var all sync.WaitGroup
	for range 100 {
		all.Go(func() {
			for range 200 {
				p, no := admit(d.b, begin)
				if no != nil {
					continue
				}
				probes.Add(1)
				assert.LessOrEqual(t, inside.Add(1), int64(places))
				inside.Add(-1)
				record(d.b, p, Verdict{Outcome: Ignored}, begin) // gives the place back
			}
		})
	}
	all.Wait()
	require.GreaterOrEqual(t, probes.Load(), int64(places))
	require.Equal(t, HalfOpen, d.state())
}

// requireInOrder checks that each change begins where the one before ended.
func requireInOrder(t *testing.T, told []Change, s Snapshot) {
	t.Helper()
	state, entered := Closed, [3]uint64{}
	for i, c := range told {
		require.Equal(t, state, c.From, "change %d of %d", i, len(told))
		state = c.To
		if c.From != c.To {
			entered[c.To]++
		}
	}
	require.Equal(t, s.State, state)
	require.Equal(t, s.Entered, entered, "each transition is told once")
}

// Everything at the same time. Changes are told one at a time and in order, and
// afterwards the breaker still opens and closes.
func TestEverythingAtOnce(t *testing.T) {
	for name, c := range map[string]Config{
		"rows": {FailureThreshold: 3, SuccessThreshold: 2, RecoveryTimeout: time.Microsecond, MaxRecoveryTimeout: time.Millisecond},
		"rate": {FailureThreshold: -1, FailureRate: 0.5, MinRequests: 5, Window: time.Millisecond, SuccessThreshold: 2, RecoveryTimeout: time.Microsecond},
	} {
		t.Run(name, func(t *testing.T) {
			d := newDriver(t, c)
			var told []Change // no lock: only one is told at a time
			tell := func(c Change) { told = append(told, c) }
			var all sync.WaitGroup
			for i := range 16 {
				all.Go(func() {
					for j := range 1500 {
						stir(d.b, i*1500+j)
						d.b.Deliver(tell)
					}
				})
			}
			all.Wait()
			d.b.Deliver(tell)
			requireInOrder(t, told, d.b.Snapshot(time.Now()))
			d.now = time.Now().Add(time.Hour)
			d.b.Reset(d.now, ByHand)
			requireWorks(t, d)
		})
	}
}

// stir does one thing of every kind, by n.
func stir(b *Breaker, n int) {
	now := time.Now()
	switch n % 50 {
	case 0:
		b.Trip(now.Add(time.Microsecond), now, errHand, ByHand)
	case 1:
		b.Reset(now, ByHand)
	case 2:
		b.Forget(now)
	case 3:
		b.Snapshot(now)
		b.Blocked(0, now)
	}
	p, no := admit(b, now)
	if no != nil {
		return
	}
	switch n % 7 {
	case 0, 1, 2:
		record(b, p, verdicts["ok"], time.Now())
	case 3:
		p = b.Answer(p, context.Background(), time.Now())
		record(b, p, verdicts["ok"], time.Now())
	case 4:
		record(b, p, Verdict{Outcome: Ignored}, time.Now())
	default:
		record(b, p, verdicts["fail"], time.Now())
	}
}

// requireWorks takes d from CLOSED through all states and back.
func requireWorks(t *testing.T, d *driver) {
	t.Helper()
	for range 5 {
		if d.state() == Closed {
			d.do("fail")
		}
	}
	require.Equal(t, Open, d.state())
	d.do("x")
	d.now = d.b.Snapshot(d.now).Until
	d.do("ok")
	require.Equal(t, HalfOpen, d.state())
	d.do("ok")
	require.Equal(t, Closed, d.state())
}

// Each number is given once, however many ask.
func TestNumbersAreUnique(t *testing.T) {
	d := newDriver(t, usual)
	given := make([][]Permit, 8)
	var all sync.WaitGroup
	for i := range given {
		all.Go(func() {
			for range 2000 {
				p, no := admit(d.b, begin)
				if no == nil {
					given[i] = append(given[i], p)
				}
				if len(given[i])%100 == 0 {
					d.b.Reset(begin, ByHand)
				}
			}
		})
	}
	all.Wait()
	seen := map[uint64]bool{}
	for _, permits := range given {
		last := uint64(0)
		for _, p := range permits {
			require.False(t, seen[p.number])
			require.Greater(t, p.number, last)
			seen[p.number], last = true, p.number
		}
	}
	require.Len(t, seen, 16_000)
}

func TestTellMayCallAnything(t *testing.T) {
	d := newDriver(t, atOnce)
	var told []Change
	tell := func(c Change) {
		told = append(told, c)
		d.b.Deliver(func(Change) { t.Error("told in the middle of another") })
		if len(told) == 1 {
			d.b.Snapshot(d.now)
			d.b.Reset(d.now, ByHand)
			d.b.Trip(d.now.Add(time.Second), d.now, errHand, ByFleet)
		}
	}
	d.do("fail")
	d.b.Deliver(tell)
	requireInOrder(t, told, d.b.Snapshot(d.now))
	require.Len(t, told, 3, "what comes to pass meanwhile is told too")
}

func TestTellMayPanic(t *testing.T) {
	d := newDriver(t, atOnce)
	d.do("fail")
	d.b.Reset(d.now, ByHand)
	require.Panics(t, func() { d.b.Deliver(func(Change) { panic("hook") }) })
	var told []Change
	d.b.Deliver(func(c Change) { told = append(told, c) })
	require.Len(t, told, 1, "the one that panicked is not told again")
	require.Equal(t, Closed, told[0].To)
	requireWorks(t, d)
}
