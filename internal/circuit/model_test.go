package circuit

import (
	"context"
	"math/rand/v2"
	"strconv"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// A model is a breaker as it is told: slow, and easy to believe. It remembers
// every attempt since the last transition.
type model struct {
	c        Config
	state    State
	until    time.Time
	cause    error
	attempts []*flight // of this generation, as they were admitted
	passed   int       // probes
	failures int
	recovery time.Duration
	proven   bool
	changes  []Change

	since, left, lastFailure time.Time
	counted                  error // the cause of the last failure that counted
	lastCause                error
	spent                    [3]time.Duration
	entered                  [3]uint64
	recoveries               uint64
	recovering               time.Duration
}

type flight struct {
	began, ended time.Time
	fate         fate
	probe        bool
	answered     bool
}

type fate int

const (
	flying fate = iota
	succeeded
	failed
	ignored
)

func newModel(c Config) *model {
	return &model{c: c, since: begin, recovery: c.RecoveryTimeout, proven: true}
}

func (m *model) off() bool { return m.c.FailureThreshold == -1 && m.c.FailureRate == 0 }

// current reports whether f is of this generation.
func (m *model) current(f *flight) bool {
	for _, g := range m.attempts {
		if f == g {
			return true
		}
	}
	return false
}

func (m *model) move(to State, c Change) {
	c.From, c.To = m.state, to
	if to == Open {
		c.Until, c.Failures = m.until, m.failures
	}
	if to != m.state || to == Open {
		m.changes = append(m.changes, c)
	}
	if m.state == Closed {
		m.left = c.At
	}
	if to != m.state {
		m.spent[m.state] += c.At.Sub(m.since)
		m.entered[to]++
		m.since = c.At
	}
	if to == Closed {
		m.failures, m.until = 0, time.Time{}
	}
	m.state, m.attempts, m.passed = to, nil, 0
}

// begin returns nil if the attempt is rejected.
func (m *model) begin(now time.Time) *flight {
	if m.state == Open && !now.Before(m.until) {
		if change := (Change{Context: context.Background(), At: now}); m.off() {
			m.move(Closed, change)
		} else {
			change.Cause = m.cause
			m.move(HalfOpen, change)
		}
	}
	f := &flight{began: now, probe: m.state == HalfOpen}
	switch {
	case m.state == Closed, m.state == HalfOpen && m.probing(now)+m.passed < m.c.SuccessThreshold:
		m.attempts = append(m.attempts, f)
	case m.c.Observe:
		f.probe = false // and of no generation
	default:
		return nil
	}
	return f
}

// probing counts the probes that hold a place.
func (m *model) probing(now time.Time) (n int) {
	for _, f := range m.attempts {
		if f.fate == flying && !f.answered && now.Sub(f.began) < m.c.RecoveryTimeout {
			n++
		}
	}
	return n
}

// answer returns the flight that the body of f is.
func (m *model) answer(f *flight, now time.Time) *flight {
	if !f.probe || f.answered {
		return f
	}
	current := m.current(f)
	f.answered = true
	if current {
		m.pass(now, context.Background())
	}
	if current && m.state == Closed {
		return m.begin(now)
	}
	return f
}

func (m *model) pass(now time.Time, ctx context.Context) {
	m.passed++
	if m.passed == m.c.SuccessThreshold {
		m.recoveries++
		m.recovering += now.Sub(m.left)
		m.move(Closed, Change{Context: ctx, At: now})
	}
}

func (m *model) end(f *flight, v Verdict, now time.Time) {
	if v.Outcome == Failure {
		m.lastFailure, m.lastCause = now, v.Cause
	}
	if !m.current(f) {
		return
	}
	f.ended = now
	f.fate = map[Outcome]fate{Success: succeeded, Failure: failed, Ignored: ignored}[v.Outcome]
	if v.Outcome == Success {
		m.proven = true
	}
	switch {
	case m.state == Closed && !m.off():
		if v.Outcome == Failure {
			m.counted = v.Cause
		}
		row := 0
		if v.Outcome != Success {
			row = m.row(f)
		}
		if m.c.FailureThreshold > 0 && row >= m.c.FailureThreshold || v.Outcome != Ignored && m.overRate(now) {
			m.failures = row
			m.open(Verdict{Cause: m.counted, Asked: v.Asked}, now)
		}
	case m.state == HalfOpen && v.Outcome == Failure:
		m.open(v, now)
	case m.state == HalfOpen && v.Outcome == Success && !f.answered:
		m.pass(now, nil)
	}
}

func (m *model) open(v Verdict, now time.Time) {
	if m.state == Closed && m.proven {
		m.recovery = m.c.RecoveryTimeout
	} else {
		m.recovery = max(m.c.RecoveryTimeout, min(2*m.recovery, m.c.MaxRecoveryTimeout))
	}
	m.proven = false
	asked := min(v.Asked, 10*time.Minute)
	m.until, m.cause = now.Add(max(m.recovery, asked)), v.Cause
	m.move(Open, Change{At: now, Asked: asked, Cause: v.Cause})
}

// row counts the failures around f, back and ahead to the nearest attempt that
// has succeeded or is under way.
func (m *model) row(f *flight) (n int) {
	for _, g := range m.attempts {
		switch {
		case g.fate == failed:
			n++
		case g.fate == ignored:
		case m.before(g, f):
			n = 0
		default:
			return n
		}
	}
	return n
}

func (m *model) before(a, b *flight) bool {
	for _, f := range m.attempts {
		if f == a || f == b {
			return f == a
		}
	}
	return false
}

// tail is the row that the next attempt would go on with.
func (m *model) tail() int {
	if m.off() || len(m.attempts) == 0 || m.attempts[len(m.attempts)-1].fate == flying || m.attempts[len(m.attempts)-1].fate == succeeded {
		return 0
	}
	return m.row(m.attempts[len(m.attempts)-1])
}

// overRate looks at this tenth of the Window and the nine before.
func (m *model) overRate(now time.Time) bool {
	if m.c.FailureRate == 0 {
		return false
	}
	start := m.attempts[0].began
	recent := func(at time.Time) bool {
		tenth := m.c.Window / 10
		return int64(at.Sub(start)/tenth) > int64(now.Sub(start)/tenth)-10
	}
	total, bad := 0, 0
	for _, f := range m.attempts {
		switch {
		case f.fate == flying && recent(f.began), f.fate == succeeded && recent(f.ended):
			total++
		case f.fate == failed && recent(f.ended):
			total++
			bad++
		}
	}
	return total >= m.c.MinRequests && bad > 0 && float64(bad)/float64(total) >= m.c.FailureRate
}

func (m *model) trip(until, now time.Time) {
	if m.state == Closed {
		m.failures = m.tail()
		if m.proven {
			m.recovery = m.c.RecoveryTimeout
		}
	}
	m.until, m.cause = until, errHand
	m.move(Open, Change{At: now, Cause: errHand, Origin: ByHand})
}

func (m *model) reset(now time.Time) {
	m.recovery, m.proven = m.c.RecoveryTimeout, true
	m.move(Closed, Change{At: now, Origin: ByHand})
}

func (m *model) forget(now time.Time) bool {
	if now.Before(m.until) {
		return false
	}
	if m.state != Closed {
		m.move(Closed, Change{At: now, Origin: ByForgetting})
	}
	return true
}

func (m *model) snapshot(now time.Time) Snapshot {
	s := Snapshot{State: m.state, Since: m.since, Until: m.until, Failures: m.failures, Successes: m.passed,
		LastFailure: m.lastFailure, LastCause: m.lastCause, Spent: m.spent, Entered: m.entered,
		Recoveries: m.recoveries, RecoveryTime: m.recovering}
	if m.state == Closed {
		s.Failures = m.tail()
	}
	s.Spent[s.State] += now.Sub(s.Since)
	return s
}

func randomConfig(r *rand.Rand) Config {
	c := Config{
		FailureThreshold: 1 + r.IntN(5),
		SuccessThreshold: 1 + r.IntN(4),
		RecoveryTimeout:  time.Duration(1+r.IntN(30)) * time.Second,
		Observe:          r.IntN(6) == 0,
	}
	if r.IntN(2) == 0 {
		c.MaxRecoveryTimeout = time.Duration(1+r.IntN(6)) * c.RecoveryTimeout
	}
	if r.IntN(2) == 0 {
		c.FailureRate = []float64{0.25, 0.5, 0.55, 1}[r.IntN(4)]
		c.Window = time.Duration(1+r.IntN(30)) * time.Second
		c.MinRequests = 1 + r.IntN(12)
	}
	if r.IntN(4) == 0 {
		c.FailureThreshold = -1
	}
	return c
}

// A comparison takes the machine and the model through the same steps.
type comparison struct {
	*driver
	r      *rand.Rand
	model  *model
	flying []pair
	told   []Change
}

type pair struct {
	permit Permit
	flight *flight
}

func (c *comparison) step() string {
	switch n := c.r.IntN(100); {
	case n < 40:
		return c.begin()
	case n < 80 && len(c.flying) > 0:
		return c.end()
	case n < 94:
		return c.pass()
	case n < 96:
		c.b.Reset(c.now, ByHand)
		c.model.reset(c.now)
		return "reset"
	case n < 98:
		require.Equal(c.t, c.b.Forgettable(c.now), c.b.Forget(c.now))
		c.model.forget(c.now)
		return "forget"
	}
	until := c.now.Add(time.Duration(c.r.IntN(40)) * time.Second)
	c.b.Trip(until, c.now, errHand, ByHand)
	c.model.trip(until, c.now)
	return "trip"
}

func (c *comparison) begin() string {
	p, no := c.admit()
	f := c.model.begin(c.now)
	if (f == nil) != (no != nil) {
		c.t.Fatalf("admission: the model has %+v, the breaker rejects with %+v", f, no)
	}
	if f == nil {
		require.Equal(c.t, Rejection{"api", c.model.until, c.model.cause}, *no)
		return "rejected"
	}
	require.Equal(c.t, f.probe, p.Probe)
	c.flying = append(c.flying, pair{p, f})
	return "begin"
}

func (c *comparison) end() string {
	i := c.r.IntN(len(c.flying))
	if c.r.IntN(2) == 0 {
		i = len(c.flying) - 1 // rows need neighbours that end soon
	}
	p := c.flying[i]
	name := []string{"answer", "ok", "ok", "fail", "fail", "fail", "fail", "ignore", "ask30s", "ask1h"}[c.r.IntN(10)]
	if name == "answer" && !p.flight.answered {
		c.flying[i] = pair{c.b.Answer(p.permit, context.Background(), c.now), c.model.answer(p.flight, c.now)}
		return name
	}
	c.flying = append(c.flying[:i], c.flying[i+1:]...)
	v, ok := verdicts[name]
	if !ok {
		name, v = "ok", verdicts["ok"]
	}
	record(c.b, p.permit, v, c.now)
	c.model.end(p.flight, v, c.now)
	return name
}

// pass lets time pass: a little mostly, and now and then as much as it takes for
// probes to expire or for the opening to end.
func (c *comparison) pass() string {
	d := time.Duration(c.r.Int64N(int64(2 * time.Second)))
	switch c.r.IntN(8) {
	case 0:
		d = c.model.c.RecoveryTimeout - time.Duration(c.r.IntN(2))
	case 1, 2, 3:
		if c.model.state == Open {
			d = max(0, c.model.until.Sub(c.now)-time.Duration(c.r.IntN(2)))
		}
	}
	c.now = c.now.Add(d)
	return "wait " + d.String()
}

func (c *comparison) check(seed uint64, step string) {
	got, want := c.b.Snapshot(c.now), c.model.snapshot(c.now)
	if got != want {
		c.t.Fatalf("seed %d, %+v, %s:\ngot  %+v\nwant %+v", seed, c.model.c, step, got, want)
	}
	require.Equal(c.t, c.now.Before(c.model.until), !c.b.Forgettable(c.now))
	blocked := c.b.Blocked(time.Second, c.now) != nil
	require.Equal(c.t, !c.model.c.Observe && c.model.until.Sub(c.now) > time.Second, blocked)
	c.told = append(c.told, c.changes()...)
	require.Len(c.t, c.told, len(c.model.changes), "seed %d, %s", seed, step)
	if n := len(c.told); n > 0 && c.told[n-1] != c.model.changes[n-1] {
		c.t.Fatalf("seed %d, %s:\ntold %+v\nwant %+v", seed, step, c.told[n-1], c.model.changes[n-1])
	}
}

// 2,500 short schedules: the first ones are the same each time, the others new.
func TestModel(t *testing.T) {
	seen := map[string]int{}
	first := rand.Uint64N(1 << 32)
	for i := range uint64(2500) {
		seed := i
		if i >= 500 {
			seed = first + i
		}
		r := rand.New(rand.NewPCG(seed, 0))
		config := randomConfig(r)
		c := &comparison{driver: newDriver(t, config), r: r, model: newModel(config)}
		for j := range 100 {
			step := c.step()
			c.check(seed, "step "+strconv.Itoa(j)+" "+step)
		}
		for _, change := range c.told {
			seen[strconv.Itoa(int(change.From))+strconv.Itoa(int(change.To))+strconv.Itoa(int(change.Origin))]++
		}
	}
	for _, kind := range []string{"010", "120", "210", "200", "100", "011", "111", "211", "101", "201", "103", "203"} {
		require.Greater(t, seen[kind], 20, "changes of the kind %s are rare: %v", kind, seen)
	}
}
