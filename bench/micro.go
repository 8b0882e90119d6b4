package main

import (
	"fmt"
	"math"
	"net/http"
	"runtime"
	"slices"
	"sync"
	"time"
)

// A micro is a case over a stub base, measured in nanoseconds.
type micro struct {
	name      string
	parallel  bool
	settings  settings
	base      func() http.RoundTripper
	op        func(http.RoundTripper) operation
	reference func(http.RoundTripper) operation // op's counterpart for the bare base; nil: op itself
	opened    bool                              // the breaker is open: only for contenders that have one, and nothing is sent
	retried   bool                              // only for contenders that retry
}

func micros() []micro {
	plainBase := func() http.RoundTripper { return plain{} }
	flakyBase := func(err error) func() http.RoundTripper {
		return func() http.RoundTripper { return &flaky{err: err} }
	}
	one, thousand := get(1), get(1000)
	untilTomorrow := hardlyWaiting
	untilTomorrow.recovery = 24 * time.Hour
	return []micro{
		{name: "GET, 1 host", settings: standard, base: plainBase, op: one},
		{name: "GET, 1 host, parallel", settings: standard, base: plainBase, op: one, parallel: true},
		{name: "GET, 1,000 hosts", settings: standard, base: plainBase, op: thousand},
		{name: "GET, 1,000 hosts, parallel", settings: standard, base: plainBase, op: thousand, parallel: true},
		{name: "POST of 2 KiB with GetBody", settings: standard, base: plainBase, op: post},
		{name: "GET, response of 2 KiB read to its end", settings: standard, base: func() http.RoundTripper { return &paging{} }, op: read},
		{name: "rejection by an open breaker", settings: untilTomorrow, base: func() http.RoundTripper { return failing{} }, op: reject, opened: true},
		{name: "503, then 200", settings: hardlyWaiting, base: flakyBase(nil), op: one, reference: twice, retried: true},
		{name: "connection error, then 200", settings: hardlyWaiting, base: flakyBase(errReset), op: one, reference: twice, retried: true},
	}
}

func (m micro) suits(c contender) bool {
	switch {
	case m.opened:
		return c.breaks
	case m.retried:
		return c.retries || c.name == "bare"
	}
	return true
}

// A lane is one contender in one case.
type lane struct {
	ops     []operation // one for each goroutine
	n       int         // how often in a batch
	samples []sample
}

type sample struct{ ns, allocs, bytes float64 } // for one operation

func (m micro) lane(c contender, procs int) (*lane, error) {
	base := m.base()
	rt := c.wrap(base, m.settings)
	if m.opened {
		if err := fail(rt, m.settings, "api.example.com"); err != nil {
			return nil, err
		}
	}
	op := m.op
	if c.name == "bare" && m.reference != nil {
		op = m.reference
	}
	l := &lane{n: 1 << 10} // the first batch calls every host
	if !m.parallel {
		procs = 1
	}
	for range procs {
		l.ops = append(l.ops, op(rt))
	}
	return l, nil
}

// calibrate finds out how many operations fill about a slice of time, when
// nothing else has the processor.
func (l *lane) calibrate(slice time.Duration) error {
	for {
		ns := math.Inf(1)
		for range 3 {
			s, err := l.batch()
			if err != nil {
				return err
			}
			ns = min(ns, s.ns)
		}
		if ns*float64(l.n) >= float64(slice)/2 {
			l.n = max(1, int(float64(slice)/ns))
			return nil
		}
		l.n *= 2
	}
}

// batch does n operations on each goroutine.
func (l *lane) batch() (sample, error) {
	var before, after runtime.MemStats
	runtime.GC() // what the batch before has left is not for this one to clean up
	runtime.ReadMemStats(&before)
	took, err := l.run()
	runtime.ReadMemStats(&after)
	n := float64(l.n * len(l.ops))
	return sample{
		ns:     float64(took) / n,
		allocs: float64(after.Mallocs-before.Mallocs) / n,
		bytes:  float64(after.TotalAlloc-before.TotalAlloc) / n,
	}, err
}

// run returns how long the goroutines took in sum: an operation that is as
// fast beside another as alone has the same time then.
func (l *lane) run() (time.Duration, error) {
	if len(l.ops) == 1 {
		return repeat(l.ops[0], l.n)
	}
	var all struct {
		sync.Mutex
		took time.Duration
		err  error
	}
	var done sync.WaitGroup
	start := make(chan struct{})
	for _, op := range l.ops {
		done.Go(func() {
			<-start
			took, err := repeat(op, l.n)
			all.Lock()
			defer all.Unlock()
			all.took += took
			if err != nil {
				all.err = err
			}
		})
	}
	close(start)
	done.Wait()
	return all.took, all.err
}

func repeat(op operation, n int) (time.Duration, error) {
	start := time.Now()
	for range n {
		if err := op(); err != nil {
			return 0, err
		}
	}
	return time.Since(start), nil
}

// A cost is what a contender adds to the bare base; for the bare base, all.
type cost struct {
	ns, spread    float64 // medians over the rounds: of the cost, and of its distance from that
	allocs, bytes float64
}

// measure goes through the contenders round by round, so that what else the
// machine does meets all of them, and compares within each round.
func (m micro) measure(cs []contender, o options) (map[string]cost, error) {
	lanes := map[string]*lane{}
	var names []string
	for _, c := range cs {
		if !m.suits(c) {
			continue
		}
		l, err := m.lane(c, o.procs)
		if err == nil {
			err = l.calibrate(o.slice)
		}
		if err != nil {
			return nil, fmt.Errorf("%s: %s: %w", m.name, c.name, err)
		}
		lanes[c.name] = l
		names = append(names, c.name)
	}
	for round := range o.rounds {
		for i := range names {
			name := names[(round+i)%len(names)]
			s, err := lanes[name].batch()
			if err != nil {
				return nil, fmt.Errorf("%s: %s: %w", m.name, name, err)
			}
			lanes[name].samples = append(lanes[name].samples, s)
		}
	}
	costs := map[string]cost{}
	for name, l := range lanes {
		reference := lanes["bare"]
		if name == "bare" {
			reference = nil
		}
		costs[name] = l.cost(reference)
	}
	return costs, nil
}

func (l *lane) cost(reference *lane) cost {
	var ns, allocs, bytes []float64
	for round, s := range l.samples {
		var r sample
		if reference != nil {
			r = reference.samples[round]
		}
		ns = append(ns, s.ns-r.ns)
		allocs = append(allocs, s.allocs-r.allocs)
		bytes = append(bytes, s.bytes-r.bytes)
	}
	return cost{median(ns), spread(ns), median(allocs), median(bytes)}
}

func median(v []float64) float64 {
	if len(v) == 0 {
		return 0
	}
	v = slices.Sorted(slices.Values(v))
	return (v[(len(v)-1)/2] + v[len(v)/2]) / 2
}

// spread is the median distance from the median.
func spread(v []float64) float64 {
	m := median(v)
	distances := make([]float64, len(v))
	for i, x := range v {
		distances[i] = max(x-m, m-x)
	}
	return median(distances)
}
