package circuit

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

var (
	errDown = errors.New("the service is down")
	errHand = errors.New("tripped by hand")
	begin   = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
)

// usual is what a policy without any settings resolves to.
var usual = Config{FailureThreshold: 5, RecoveryTimeout: time.Minute, SuccessThreshold: 2}

func usualWith(change func(*Config)) Config {
	c := usual
	change(&c)
	return c
}

// A driver takes one breaker through steps at given times, through the same
// door as the root package.
type driver struct {
	t    *testing.T
	b    *Breaker
	now  time.Time
	held []Permit
}

func newDriver(t *testing.T, c Config) *driver {
	d := &driver{t: t, b: &Breaker{}, now: begin}
	d.b.Init("api", &c, begin)
	return d
}

func (d *driver) admit() (Permit, *Rejection) { return admit(d.b, d.now) }

func admit(b *Breaker, now time.Time) (Permit, *Rejection) {
	if p, ok := b.Pass(); ok {
		return p, nil
	}
	return b.Admit(context.Background(), now)
}

func record(b *Breaker, p Permit, v Verdict, now time.Time) {
	if v.Outcome != Success || !b.Indifferent(p) {
		b.Record(p, v, now)
	}
}

var verdicts = map[string]Verdict{
	"ok":     {Outcome: Success, Ended: true},
	"fail":   {Outcome: Failure, Cause: errDown},
	"ignore": {},
	"ask30s": {Outcome: Failure, Cause: errDown, Asked: 30 * time.Second},
	"ask5m":  {Outcome: Failure, Cause: errDown, Asked: 5 * time.Minute},
	"ask1h":  {Outcome: Failure, Cause: errDown, Asked: time.Hour},
}

func (d *driver) verdict(name string) Verdict {
	v, ok := verdicts[name]
	require.True(d.t, ok, name)
	return v
}

// take takes the attempt that is held for longest.
func (d *driver) take() Permit {
	p := d.held[0]
	d.held = d.held[1:]
	return p
}

// do takes one step: a verdict's name is a whole attempt; "begin" is one that
// is held, "answer" is the answer of the one held for longest, whose body is
// held then, and "end-NAME" is the end of the one held for longest; "x" must be
// rejected; "reset"; "trip-30s".
func (d *driver) do(step string) {
	d.t.Helper()
	word, arg, _ := strings.Cut(step, "-")
	switch word {
	case "begin":
		p, no := d.admit()
		require.Nil(d.t, no, step)
		d.held = append(d.held, p)
	case "answer":
		d.held = append(d.held, d.b.Answer(d.take(), context.Background(), d.now))
	case "end":
		record(d.b, d.take(), d.verdict(arg), d.now)
	case "x":
		_, no := d.admit()
		require.NotNil(d.t, no, step)
	case "reset":
		d.b.Reset(d.now, ByHand)
	case "trip":
		wait, err := time.ParseDuration(arg)
		require.NoError(d.t, err)
		d.b.Trip(d.now.Add(wait), d.now, errHand, ByHand)
	default:
		p, no := d.admit()
		require.Nil(d.t, no, step)
		record(d.b, p, d.verdict(word), d.now)
	}
}

func (d *driver) state() State { return d.b.Snapshot(d.now).State }

func (d *driver) changes() (all []Change) {
	d.b.Deliver(func(c Change) { all = append(all, c) })
	return all
}

// A step waits, does what the words say and expects a state.
type step struct {
	after time.Duration
	do    string
	state State
}

type script struct {
	config Config
	steps  []step
}

func (s script) run(t *testing.T) {
	d := newDriver(t, s.config)
	for i, step := range s.steps {
		d.now = d.now.Add(step.after)
		for _, word := range strings.Fields(step.do) {
			d.do(word)
		}
		require.Equal(t, step.state, d.state(), "step %d: %+v", i, step)
	}
}

func runScripts(t *testing.T, scripts map[string]script) {
	for name, s := range scripts {
		t.Run(name, s.run)
	}
}

var (
	atOnce  = usualWith(func(c *Config) { c.FailureThreshold = 1 })
	atTwo   = usualWith(func(c *Config) { c.FailureThreshold = 2 })
	growing = usualWith(func(c *Config) { c.FailureThreshold, c.MaxRecoveryTimeout = 1, time.Hour })
)

func TestSteps(t *testing.T) {
	runScripts(t, map[string]script{
		"failures in a row": {usual, []step{
			{0, "fail fail fail fail ok", Closed},
			{0, "fail fail fail fail", Closed},
			{time.Hour, "fail", Open},
			{0, "x x", Open},
		}},
		"threshold of one": {Config{FailureThreshold: 1, SuccessThreshold: 1, RecoveryTimeout: time.Second}, []step{
			{0, "ok fail x", Open},
			{time.Second, "ok", Closed},
			{0, "fail x", Open},
		}},
		"recovery": {usual, []step{
			{0, "fail fail fail fail fail", Open},
			{time.Minute - 1, "x", Open},
			{1, "begin begin x", HalfOpen},
			{0, "end-ok x", HalfOpen}, // one success missing, one probe under way
			{0, "end-ok", Closed},
			{0, "fail fail fail fail", Closed}, // counted from nothing
			{0, "fail", Open},
		}},
		"more successes": {usualWith(func(c *Config) { c.FailureThreshold, c.SuccessThreshold = 1, 4 }), []step{
			{0, "fail", Open},
			{time.Minute, "begin begin begin begin x", HalfOpen},
			{0, "end-ok end-ok end-ok x", HalfOpen},
			{0, "end-ignore begin x", HalfOpen},
			{0, "end-ok", Closed},
		}},
		"any failure in half-open": {usualWith(func(c *Config) { c.FailureThreshold, c.SuccessThreshold = 1, 3 }), []step{
			{0, "fail", Open},
			{time.Minute, "ok ok", HalfOpen},
			{0, "fail x", Open},
			{time.Minute - 1, "x", Open},
			{1, "ok ok", HalfOpen}, // the successes of before do not count
			{0, "ok", Closed},
		}},
		"the server asks for longer": {atTwo, []step{
			{0, "ask5m fail", Open}, // only the failure that trips is asked
			{time.Minute, "ask5m", Open},
			{5*time.Minute - 1, "x", Open},
			{1, "fail", Open},
			{time.Minute, "ask30s", Open}, // never shorter than RecoveryTimeout
			{time.Minute - 1, "x", Open},
			{1, "ask1h", Open}, // ten minutes at most
			{10*time.Minute - 1, "x", Open},
			{1, "ok", HalfOpen},
		}},
		"ignored in half-open": {atOnce, []step{
			{0, "fail", Open},
			{time.Minute, "ignore ignore ignore ignore", HalfOpen}, // gives its place back, shows nothing
			{0, "ok begin x", HalfOpen},
			{0, "end-ignore begin x end-ok", Closed},
		}},
		"off": {Config{FailureThreshold: -1, RecoveryTimeout: time.Minute, SuccessThreshold: 1}, []step{
			{0, "fail fail fail fail fail fail fail fail", Closed},
			{0, "trip-30s x", Open},
			{30 * time.Second, "begin", Closed}, // there is nothing to find out
		}},
		"observe": {usualWith(func(c *Config) { c.FailureThreshold, c.Observe = 1, true }), []step{
			{0, "fail ok ok fail", Open},
			{time.Minute, "begin begin begin fail", HalfOpen}, // the last has no place and counts for nothing
			{0, "end-ok end-ok", Closed},
			{0, "end-fail", Closed},
		}},
	})
}

func TestRowsOfFailures(t *testing.T) {
	runScripts(t, map[string]script{
		"ignored is passed over": {atTwo, []step{
			{0, "fail ignore ignore", Closed},
			{0, "fail", Open},
		}},
		"one under way ends the row": {atTwo, []step{
			{0, "fail begin fail", Closed},
			{0, "end-fail", Open}, // and joins two rows when it fails
		}},
		"one under way that succeeds": {atTwo, []step{
			{0, "fail begin fail end-ok", Closed},
			{0, "fail", Open},
		}},
		"an ignored one joins two rows": {usualWith(func(c *Config) { c.FailureThreshold = 3 }), []step{
			{0, "fail begin fail end-ignore", Closed},
			{0, "fail", Open},
		}},
		"breaking off later": {atTwo, []step{
			{0, "begin begin begin answer answer answer", Closed},
			{time.Hour, "end-fail end-ok end-fail", Closed},
			{0, "fail", Open},
		}},
		"fast failures do not overtake slow successes": {atTwo, []step{
			{0, "begin fail begin fail begin fail", Closed},
			{time.Minute, "end-ok end-ok end-ok", Closed},
			{0, "fail", Open},
		}},
		"streams that end well hide no outage": {atTwo, []step{
			{0, "begin begin begin fail end-ok end-ok", Closed},
			{0, "fail", Open},
		}},
	})
}

func TestGenerations(t *testing.T) {
	runScripts(t, map[string]script{
		"late results of closed": {atTwo, []step{
			{0, "begin begin begin begin fail fail", Open},
			{0, "end-ok end-fail", Open},
			{time.Minute, "begin end-ok", HalfOpen}, // the second held is from before
			{0, "begin x end-fail x", HalfOpen},
			{0, "end-ok end-ok", Closed},
		}},
		"late results of half-open": {atOnce, []step{
			{0, "fail", Open},
			{time.Minute, "begin begin end-fail", Open}, // one probe left from this round
			{time.Minute, "begin begin x", HalfOpen},
			{0, "end-ok x", HalfOpen}, // its success is not one of this round's
			{0, "end-ok end-ok", Closed},
		}},
		"a late failure after closing": {atOnce, []step{
			{0, "begin fail", Open},
			{time.Minute, "ok ok", Closed},
			{0, "end-fail", Closed},
		}},
		"reset in every state": {atTwo, []step{
			{0, "fail reset fail", Closed},
			{0, "fail reset", Closed},
			{0, "fail fail", Open},
			{time.Minute, "begin reset", Closed},
			{0, "end-fail fail", Closed}, // the probe is late
			{0, "fail", Open},
		}},
		"trip in every state": {atOnce, []step{
			{0, "begin trip-30s x", Open},
			{29 * time.Second, "end-ok x", Open},
			{time.Second, "ok", HalfOpen},
			{0, "begin trip-2m end-ok x", Open},
			{time.Minute, "trip-2m x", Open}, // from now
			{2*time.Minute - 1, "x", Open},
			{1, "ok ok", Closed},
			{0, "fail trip-1s", Open}, // also shorter than it would be
			{time.Second, "ok", HalfOpen},
		}},
		"a probe that hangs": {atOnce, []step{
			{0, "fail", Open},
			{time.Minute, "begin begin x", HalfOpen},
			{time.Minute - 1, "x", HalfOpen},
			{1, "begin begin x", HalfOpen},   // both have lost their places
			{0, "end-ok end-ok", Closed},     // and count all the same
			{0, "end-fail end-fail", Closed}, // these are late
		}},
		"a probe that hangs and fails": {atOnce, []step{
			{0, "fail", Open},
			{time.Minute, "begin", HalfOpen},
			{time.Hour, "ok end-fail", Open},
		}},
	})
}

func TestBodiesOfProbes(t *testing.T) {
	runScripts(t, map[string]script{
		"the answer settles it": {atOnce, []step{
			{0, "fail", Open},
			{time.Minute, "begin answer begin x", HalfOpen},
			{0, "end-ok x", HalfOpen}, // the first one's body shows nothing more
			{0, "answer", Closed},
			{0, "end-ok", Closed},
		}},
		"breaking off in half-open": {atOnce, []step{
			{0, "fail", Open},
			{time.Minute, "begin answer", HalfOpen},
			{0, "end-fail x", Open},
		}},
		"breaking off after it has closed the breaker": {atTwo, []step{
			{0, "fail fail", Open},
			{time.Minute, "ok begin answer", Closed},
			{0, "end-fail", Closed},
			{0, "fail", Open}, // the second in the row
		}},
		"the other body is of half-open": {atOnce, []step{
			{0, "fail", Open},
			{time.Minute, "begin begin answer answer", Closed},
			{0, "end-fail", Closed},
			{0, "end-fail", Open},
		}},
		"left by its caller": {atOnce, []step{
			{0, "fail", Open},
			{time.Minute, "begin answer end-ignore", HalfOpen},
			{0, "ok", Closed},
		}},
	})
}

func TestGrowingRecovery(t *testing.T) {
	runScripts(t, map[string]script{
		"failed recoveries grow": {usualWith(func(c *Config) { c.FailureThreshold, c.MaxRecoveryTimeout = 1, 3*time.Minute }), []step{
			{0, "fail", Open},
			{time.Minute, "fail", Open},
			{2*time.Minute - 1, "x", Open},
			{1, "fail", Open},
			{3*time.Minute - 1, "x", Open},
			{1, "fail", Open},
			{3*time.Minute - 1, "x", Open},
			{1, "ok ok", Closed}, // and start over
			{0, "fail", Open},
			{time.Minute, "fail", Open},
			{2*time.Minute - 1, "x", Open},
			{1, "ok ok", Closed},
		}},
		"an answer alone does not end the growth": {growing, []step{
			{0, "fail", Open},
			{time.Minute, "begin begin answer answer", Closed},
			{0, "end-ok end-fail", Open}, // the first body is of HALF_OPEN
			{2*time.Minute - 1, "x", Open},
			{1, "begin begin answer answer", Closed},
			{0, "begin end-ok end-ok", Closed}, // now a response has ended well
			{0, "end-fail", Open},
			{time.Minute, "ok", HalfOpen},
		}},
		"reset ends the growth": {growing, []step{
			{0, "fail", Open},
			{time.Minute, "fail", Open},
			{2 * time.Minute, "fail", Open},
			{0, "reset", Closed},
			{0, "fail", Open},
			{time.Minute - 1, "x", Open},
			{1, "ok", HalfOpen},
		}},
		"what has ended does not come back after a trip": {growing, []step{
			{0, "fail", Open},
			{time.Minute, "fail", Open},
			{2 * time.Minute, "fail", Open},
			{4 * time.Minute, "ok ok", Closed}, // the next one starts over
			{0, "trip-30s", Open},
			{30 * time.Second, "fail", Open}, // one failed recovery
			{2 * time.Minute, "ok", HalfOpen},
		}},
		"no growth by default": {atOnce, []step{
			{0, "fail", Open},
			{time.Minute, "fail", Open},
			{time.Minute, "fail", Open},
			{time.Minute, "ok", HalfOpen},
		}},
	})
}

func TestGrowingRecoveryNeverOverflows(t *testing.T) {
	d := newDriver(t, Config{FailureThreshold: 1, SuccessThreshold: 1, RecoveryTimeout: 1 << 62, MaxRecoveryTimeout: 1<<63 - 1})
	d.do("fail")
	d.now = d.now.Add(1 << 62)
	d.do("fail")
	d.do("x")
	require.True(t, d.b.Snapshot(d.now).Until.After(d.now))
}

// A slot of the window is a tenth of it: what is a whole Window old is
// forgotten, what is nine tenths old still counts.
func TestFailureRate(t *testing.T) {
	half := Config{FailureThreshold: -1, FailureRate: 0.5, Window: 10 * time.Second, MinRequests: 4, RecoveryTimeout: time.Minute, SuccessThreshold: 2}
	withRow := half
	withRow.FailureThreshold, withRow.MinRequests = 2, 100
	runScripts(t, map[string]script{
		"rate":                 {half, []step{{0, "ok ok fail", Closed}, {0, "fail", Open}}},
		"below the rate":       {half, []step{{0, "ok ok ok ok fail fail ok fail", Closed}}},
		"too few requests":     {half, []step{{0, "fail fail fail", Closed}, {0, "fail", Open}}},
		"enough at a success":  {half, []step{{0, "fail fail fail", Closed}, {0, "ok", Open}}},
		"ignored do not count": {half, []step{{0, "fail ignore ignore ignore ignore fail", Closed}}},
		"under way":            {half, []step{{0, "begin begin begin begin begin fail fail fail", Closed}, {0, "end-ok fail", Closed}, {0, "fail", Open}}},
		"a body breaks off":    {half, []step{{0, "begin answer ok ok fail", Closed}, {time.Second, "end-fail", Open}}},
		"slides out": {half, []step{
			{0, "fail fail fail", Closed},
			{10 * time.Second, "ok ok ok", Closed},
			{0, "fail", Closed}, // one of four
		}},
		"slides out slot by slot": {half, []step{
			{0, "fail fail", Closed},
			{time.Second, "fail", Closed},
			{9 * time.Second, "ok ok", Closed}, // 1 of 3: the first second is over
			{0, "fail", Open},                  // 2 of 4
		}},
		"still in the window": {half, []step{
			{0, "fail fail fail", Closed},
			{9*time.Second + 999*time.Millisecond, "ok", Open},
		}},
		"a slot is used again": {half, []step{
			{0, "fail fail fail", Closed},
			{30 * time.Second, "ok ok ok", Closed},
			{0, "fail", Closed},
		}},
		"closing forgets the window": {half, []step{
			{0, "ok ok fail fail", Open},
			{time.Minute, "ok ok", Closed},
			{0, "fail fail fail", Closed},
			{0, "fail", Open},
		}},
		"reset forgets the window": {half, []step{
			{0, "ok fail fail reset fail fail fail", Closed},
			{0, "fail", Open},
		}},
		"rows still count": {withRow, []step{{0, "ok fail fail", Open}}},
	})
}

// 0.55 of 100 are 55, although 0.55*100 is a little more in floating point.
func TestFailureRateIsExact(t *testing.T) {
	for percent := 1; percent <= 100; percent++ {
		d := newDriver(t, Config{FailureThreshold: -1, FailureRate: float64(percent) / 100, MinRequests: 100, Window: time.Minute, RecoveryTimeout: 1, SuccessThreshold: 1})
		for range 100 - percent {
			d.do("ok")
		}
		for range percent - 1 {
			d.do("fail")
		}
		require.Equal(t, Closed, d.state(), "%d%%", percent)
		d.do("fail")
		assert.Equal(t, Open, d.state(), "%d%%", percent)
	}
}

// A goroutine may come with a time from long before another's, and a service
// may stay closed for longer than turns can be counted.
func TestFailureRateAtOddTimes(t *testing.T) {
	for name, jump := range map[string]time.Duration{"back": -time.Hour - 3*time.Millisecond, "far ahead": 1<<31*time.Millisecond + 3*time.Millisecond, "farther ahead": 1<<63 - 1} {
		t.Run(name, func(t *testing.T) {
			d := newDriver(t, Config{FailureThreshold: -1, FailureRate: 0.5, Window: 10 * time.Millisecond, MinRequests: 4, RecoveryTimeout: 1, SuccessThreshold: 1})
			d.do("begin")
			d.do("begin")
			d.now = d.now.Add(jump)
			for _, s := range []string{"begin", "end-fail", "end-fail", "end-fail"} {
				d.do(s)
			}
			require.Equal(t, Closed, d.state())
			d.do("fail")
			require.Equal(t, Open, d.state())
		})
	}
}

// What a step tells: from where to where, when, why and until when.
func TestChanges(t *testing.T) {
	d := newDriver(t, atTwo)
	at := func(after time.Duration, steps ...string) time.Time {
		d.now = d.now.Add(after)
		for _, s := range steps {
			d.do(s)
		}
		return d.now
	}
	opened := at(0, "fail", "fail")
	probed := at(time.Minute, "ok")
	reopened := at(time.Second, "ask5m")
	probedAgain := at(5*time.Minute, "ok")
	closed := at(time.Second, "ok")
	tripped := at(time.Second, "fail", "trip-30s")
	longer := at(time.Second, "trip-2m")
	probedLast := at(2*time.Minute, "begin")
	reset := at(0, "reset", "reset")
	ctx := context.Background()
	require.Equal(t, []Change{
		{From: Closed, To: Open, At: opened, Failures: 2, Until: probed, Cause: errDown},
		{Context: ctx, From: Open, To: HalfOpen, At: probed, Cause: errDown},
		{From: HalfOpen, To: Open, At: reopened, Failures: 2, Until: probedAgain, Asked: 5 * time.Minute, Cause: errDown},
		{Context: ctx, From: Open, To: HalfOpen, At: probedAgain, Cause: errDown},
		{From: HalfOpen, To: Closed, At: closed},
		{From: Closed, To: Open, At: tripped, Failures: 1, Until: tripped.Add(30 * time.Second), Cause: errHand, Origin: ByHand},
		{From: Open, To: Open, At: longer, Failures: 1, Until: longer.Add(2 * time.Minute), Cause: errHand, Origin: ByHand},
		{Context: ctx, From: Open, To: HalfOpen, At: probedLast, Cause: errHand},
		{From: HalfOpen, To: Closed, At: reset, Origin: ByHand},
	}, d.changes())
	s := d.b.Snapshot(d.now)
	require.Equal(t, [3]uint64{2, 3, 3}, s.Entered, "OPEN to OPEN is no transition")
	require.EqualValues(t, 1, s.Recoveries)
	require.Equal(t, closed.Sub(opened), s.RecoveryTime)
	require.Equal(t, d.now.Sub(begin), s.Spent[Closed]+s.Spent[Open]+s.Spent[HalfOpen])
}

// A late failure does not become the reason of what it has no part in.
func TestLateFailureIsNotTheCause(t *testing.T) {
	d := newDriver(t, atOnce)
	d.do("begin")
	d.do("fail")
	late := errors.New("late")
	d.b.Record(d.take(), Verdict{Outcome: Failure, Cause: late}, d.now)
	d.now = d.now.Add(time.Minute)
	d.do("begin")
	require.Equal(t, errDown, d.changes()[1].Cause)
	require.Equal(t, late, d.b.Snapshot(d.now).LastCause)
}

// The oldest runs are forgotten; a row at the end is found beside any number of
// them.
func TestManyRuns(t *testing.T) {
	d := newDriver(t, usual)
	for range 10 * maxRuns {
		d.do("ok")
		d.do("fail")
	}
	require.Equal(t, Closed, d.state())
	require.Len(t, d.b.machine.Load().rows.runs, maxRuns)
	for range 4 {
		d.do("fail")
	}
	require.Equal(t, Open, d.state())
}

func TestClosedAllocatesNothing(t *testing.T) {
	d := newDriver(t, growing)
	require.Zero(t, testing.AllocsPerRun(100, func() {
		p, _ := d.admit()
		record(d.b, p, Verdict{Outcome: Success, Ended: true}, d.now)
	}))
	require.Nil(t, d.b.machine.Load(), "a healthy breaker needs no machine")
	d.do("fail")
	require.Zero(t, testing.AllocsPerRun(100, func() { _, _ = d.admit() }))
}

// Successes are told to a closed breaker only while its growth may end.
func TestIndifferent(t *testing.T) {
	d := newDriver(t, growing)
	indifferent := func() bool {
		p, _ := d.admit()
		defer d.b.Record(p, Verdict{Outcome: Ignored}, d.now)
		return d.b.Indifferent(p)
	}
	require.True(t, indifferent())
	d.do("fail")
	d.now = d.now.Add(time.Minute)
	require.False(t, indifferent(), "a probe")
	for _, s := range []string{"begin", "begin", "answer", "answer"} {
		d.do(s)
	}
	require.Equal(t, Closed, d.state())
	require.False(t, indifferent(), "no response has ended well")
	d.do("ok")
	require.True(t, indifferent())
}
