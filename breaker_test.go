package tripper

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// A breakerBase is a RoundTripper made of a function.
type breakerBase func(*http.Request) (*http.Response, error)

func (f breakerBase) RoundTrip(req *http.Request) (*http.Response, error) { return f(req) }

var errBreakerDown = errors.New("the service is down")

// breakerOnce is a Policy without retries: each request is one attempt.
func breakerOnce(b BreakerPolicy) Policy {
	return Policy{Retry: RetryPolicy{MaxAttempts: 1}, Breaker: b}
}

func breakerAnswer(status int) *http.Response {
	return &http.Response{StatusCode: status, Header: http.Header{}, Body: http.NoBody}
}

const breakerHost = "api.example.com"

func breakerRequest(ctx context.Context) *http.Request {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "https://"+breakerHost+"/v1/messages", nil)
	if err != nil {
		panic(err)
	}
	return req
}

// A breakerSwitch is a base that answers with one status until told otherwise;
// below 100 it fails.
type breakerSwitch struct{ status, calls atomic.Int64 }

func (s *breakerSwitch) RoundTrip(*http.Request) (*http.Response, error) {
	s.calls.Add(1)
	if status := int(s.status.Load()); status >= 100 {
		return breakerAnswer(status), nil
	}
	return nil, errBreakerDown
}

func breakerDo(tr *Transport) error {
	resp, err := tr.RoundTrip(breakerRequest(context.Background()))
	if err == nil && resp.Body != nil {
		resp.Body.Close()
	}
	return err
}

func breakerStats(t *testing.T, tr *Transport) Stats {
	t.Helper()
	st, ok := tr.Stats(breakerHost)
	require.True(t, ok)
	return st
}

func requireBreakerReconciles(t *testing.T, st Stats) {
	t.Helper()
	require.Equal(t, st.Requests, st.OK+st.Failed+st.Rejected+st.Cancelled, "requests: %+v", st)
	require.Equal(t, st.Attempts, st.Successes+st.Failures+st.Ignored, "attempts: %+v", st)
}

// The seed's seven tests of the state machine, with its defaults: 5 failures,
// 60s, 2 successes.
func TestSeedStateMachine(t *testing.T) {
	tests := map[string]func(*testing.T, *Transport, *breakerSwitch){
		"starts closed": func(t *testing.T, tr *Transport, s *breakerSwitch) {
			s.status.Store(200)
			require.NoError(t, breakerDo(tr))
			require.Equal(t, Closed, breakerStats(t, tr).State)
		},
		"opens after the threshold of failures": func(t *testing.T, tr *Transport, _ *breakerSwitch) {
			for range 4 {
				require.ErrorIs(t, breakerDo(tr), errBreakerDown)
				require.Equal(t, Closed, breakerStats(t, tr).State)
			}
			require.ErrorIs(t, breakerDo(tr), errBreakerDown)
			require.Equal(t, Open, breakerStats(t, tr).State)
		},
		"a success resets the count": func(t *testing.T, tr *Transport, s *breakerSwitch) {
			for range 4 {
				breakerDo(tr)
			}
			s.status.Store(200)
			breakerDo(tr)
			s.status.Store(0)
			for range 4 {
				breakerDo(tr)
			}
			st := breakerStats(t, tr)
			require.Equal(t, Closed, st.State)
			require.Equal(t, 4, st.ConsecutiveFailures)
		},
		"half-open after the recovery timeout": func(t *testing.T, tr *Transport, s *breakerSwitch) {
			breakerOpenByFailing(t, tr)
			s.status.Store(200)
			time.Sleep(time.Minute - 1)
			require.ErrorIs(t, breakerDo(tr), ErrRejected)
			time.Sleep(time.Nanosecond)
			require.NoError(t, breakerDo(tr))
			require.Equal(t, HalfOpen, breakerStats(t, tr).State)
		},
		"closes after the threshold of successes": func(t *testing.T, tr *Transport, s *breakerSwitch) {
			breakerOpenByFailing(t, tr)
			s.status.Store(200)
			time.Sleep(time.Minute)
			breakerDo(tr)
			require.Equal(t, 1, breakerStats(t, tr).HalfOpenSuccesses)
			breakerDo(tr)
			require.Equal(t, Closed, breakerStats(t, tr).State)
		},
		"reopens on a failure in half-open": func(t *testing.T, tr *Transport, s *breakerSwitch) {
			breakerOpenByFailing(t, tr)
			time.Sleep(time.Minute)
			s.status.Store(200)
			breakerDo(tr)
			s.status.Store(0)
			breakerDo(tr)
			st := breakerStats(t, tr)
			require.Equal(t, Open, st.State)
			require.True(t, st.OpenUntil.Equal(time.Now().Add(time.Minute)))
		},
		"stats and reset": func(t *testing.T, tr *Transport, _ *breakerSwitch) {
			breakerOpenByFailing(t, tr)
			st := breakerStats(t, tr)
			require.Equal(t, 5, st.ConsecutiveFailures)
			require.True(t, st.LastFailure.Equal(time.Now()))
			require.Equal(t, errBreakerDown.Error(), st.LastFailureCause)
			require.True(t, tr.Reset(breakerHost))
			st = breakerStats(t, tr)
			require.Equal(t, Closed, st.State)
			require.Zero(t, st.ConsecutiveFailures)
			require.True(t, st.OpenUntil.IsZero())
		},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := &breakerSwitch{}
				test(t, &Transport{Base: s, Policy: breakerOnce(BreakerPolicy{})}, s)
			})
		})
	}
}

func breakerOpenByFailing(t *testing.T, tr *Transport) {
	t.Helper()
	for range 5 {
		require.ErrorIs(t, breakerDo(tr), errBreakerDown)
	}
	require.Equal(t, Open, breakerStats(t, tr).State)
}

// The seed's four tests of calls wrapped by the breaker.
func TestSeedWrappedCalls(t *testing.T) {
	tests := map[string]func(*testing.T, *Transport, *breakerSwitch){
		"a success passes": func(t *testing.T, tr *Transport, s *breakerSwitch) {
			s.status.Store(200)
			require.NoError(t, breakerDo(tr))
			require.EqualValues(t, 1, breakerStats(t, tr).Successes)
		},
		"a failure passes and counts": func(t *testing.T, tr *Transport, _ *breakerSwitch) {
			require.Equal(t, errBreakerDown, breakerDo(tr))
			st := breakerStats(t, tr)
			require.Equal(t, 1, st.ConsecutiveFailures)
			require.EqualValues(t, 1, st.Failures)
		},
		"an open breaker blocks the call": func(t *testing.T, tr *Transport, s *breakerSwitch) {
			breakerOpenByFailing(t, tr)
			err := breakerDo(tr)
			var open *OpenError
			require.ErrorAs(t, err, &open)
			require.Equal(t, breakerHost, open.Service)
			require.EqualValues(t, 5, s.calls.Load())
		},
		"an error that is not retryable is not recorded": func(t *testing.T, tr *Transport, s *breakerSwitch) {
			for range 4 {
				breakerDo(tr)
			}
			s.status.Store(404)
			for range 10 {
				require.NoError(t, breakerDo(tr))
			}
			st := breakerStats(t, tr)
			require.Equal(t, Closed, st.State)
			require.Equal(t, 4, st.ConsecutiveFailures, "a 404 neither counts nor resets")
			require.EqualValues(t, 10, st.Ignored)
		},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := &breakerSwitch{}
				test(t, &Transport{Base: s, Policy: breakerOnce(BreakerPolicy{})}, s)
			})
		})
	}
}

// The seed's integration of both: the breaker that opens during a request's
// attempts ends its retries.
func TestSeedBreakerEndsRetries(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &breakerSwitch{}
		p := Policy{Retry: RetryPolicy{MaxAttempts: 10, Jitter: JitterNone}, Breaker: BreakerPolicy{FailureThreshold: 3}}
		tr := &Transport{Base: s, Policy: p}
		start := time.Now()
		err := breakerDo(tr)
		require.EqualValues(t, 3, s.calls.Load())
		require.Equal(t, 3*time.Second, time.Since(start), "the waits before the attempts, and none after the last")
		require.ErrorIs(t, err, ErrRejected)
		var gaveUp *RetryError
		require.ErrorAs(t, err, &gaveUp)
		require.Equal(t, 3, gaveUp.Attempts)
		var open *OpenError
		require.ErrorAs(t, err, &open)
		require.ErrorIs(t, open.Last, errBreakerDown)
		st := breakerStats(t, tr)
		require.Equal(t, []uint64{1, 1, 3, 2}, []uint64{st.Requests, st.Rejected, st.Attempts, st.Retries})
		requireBreakerReconciles(t, st)
	})
}

// A breakerDriver takes one breaker through steps at given times, without a
// Transport.
type breakerDriver struct {
	t    *testing.T
	b    *breaker
	gate atomic.Uint64
	now  time.Time
	held []permit
}

func newBreakerDriver(t *testing.T, p BreakerPolicy) *breakerDriver {
	resolved := Policy{Breaker: p}.withDefaults().Breaker
	d := &breakerDriver{t: t, now: time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)}
	d.b = newBreaker("api", &resolved, &d.gate, d.now)
	if p.FailureRate > 0 {
		d.gate.Store(gateWatched) // as a service begins
	}
	return d
}

var breakerVerdicts = map[string]verdict{
	"ok":     {outcome: Success, answered: true},
	"fail":   {outcome: Failure, cause: errBreakerDown},
	"503":    {outcome: Failure, answered: true, cause: statusError(503)},
	"404":    {outcome: Ignored, answered: true},
	"cancel": {outcome: Ignored},
	"ask30s": {outcome: Failure, answered: true, cause: statusError(429), asked: 30 * time.Second},
	"ask5m":  {outcome: Failure, answered: true, cause: statusError(429), asked: 5 * time.Minute},
	"ask1h":  {outcome: Failure, answered: true, cause: statusError(429), asked: time.Hour},
}

// do takes one step: a verdict's name is a whole attempt, "begin" one that is
// held and "end-NAME" the end of the one held for longest; "x" must be
// rejected; "reset", "trip-30s".
func (d *breakerDriver) do(step string) {
	d.t.Helper()
	word, arg, _ := strings.Cut(step, "-")
	switch word {
	case "begin":
		p, rejection := d.b.admit(d.now)
		require.Nil(d.t, rejection, step)
		d.held = append(d.held, p)
	case "end":
		p := d.held[0]
		d.held = d.held[1:]
		d.b.record(p, d.verdict(arg), d.now)
	case "x":
		_, rejection := d.b.admit(d.now)
		require.NotNil(d.t, rejection, step)
	case "reset":
		d.b.close(d.now)
	case "trip":
		wait, err := time.ParseDuration(arg)
		require.NoError(d.t, err)
		d.b.openUntil(d.now.Add(wait), d.now, errTripped)
	default:
		p, rejection := d.b.admit(d.now)
		require.Nil(d.t, rejection, step)
		d.b.record(p, d.verdict(word), d.now)
	}
}

func (d *breakerDriver) verdict(name string) verdict {
	v, ok := breakerVerdicts[name]
	require.True(d.t, ok, name)
	return v
}

// A breakerStep waits, does what the words say and expects a state.
type breakerStep struct {
	after time.Duration
	do    string
	state State
}

func TestBreakerSteps(t *testing.T) {
	tests := map[string]struct {
		policy BreakerPolicy
		steps  []breakerStep
	}{
		"failures in a row": {BreakerPolicy{}, []breakerStep{
			{0, "fail 503 fail 503 ok", Closed},
			{0, "fail fail fail fail", Closed},
			{time.Hour, "fail", Open},
			{0, "x x", Open},
		}},
		"threshold of one": {BreakerPolicy{FailureThreshold: 1, SuccessThreshold: 1, RecoveryTimeout: time.Second}, []breakerStep{
			{0, "ok fail x", Open},
			{time.Second, "ok", Closed},
			{0, "fail x", Open},
		}},
		"recovery": {BreakerPolicy{}, []breakerStep{
			{0, "fail fail fail fail fail", Open},
			{time.Minute - 1, "x", Open},
			{1, "begin begin x", HalfOpen},
			{0, "end-ok x", HalfOpen}, // one success missing, one probe under way
			{0, "end-ok", Closed},
			{0, "fail fail fail fail", Closed}, // counted from nothing
			{0, "fail", Open},
		}},
		"more successes": {BreakerPolicy{FailureThreshold: 1, SuccessThreshold: 4}, []breakerStep{
			{0, "fail", Open},
			{time.Minute, "begin begin begin begin x", HalfOpen},
			{0, "end-ok end-ok end-ok x", HalfOpen},
			{0, "end-cancel begin x", HalfOpen},
			{0, "end-ok", Closed},
		}},
		"any failure in half-open": {BreakerPolicy{FailureThreshold: 1, SuccessThreshold: 3}, []breakerStep{
			{0, "fail", Open},
			{time.Minute, "ok ok", HalfOpen},
			{0, "fail x", Open},
			{time.Minute - 1, "x", Open},
			{1, "ok ok", HalfOpen}, // the successes of before do not count
			{0, "ok", Closed},
		}},
		"failed recoveries grow": {BreakerPolicy{FailureThreshold: 1, MaxRecoveryTimeout: 3 * time.Minute}, []breakerStep{
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
		"reset ends the growth": {BreakerPolicy{FailureThreshold: 1, MaxRecoveryTimeout: time.Hour}, []breakerStep{
			{0, "fail", Open},
			{time.Minute, "fail", Open},
			{2 * time.Minute, "fail", Open},
			{0, "reset", Closed},
			{0, "fail", Open},
			{time.Minute - 1, "x", Open},
			{1, "ok", HalfOpen},
		}},
		"no growth by default": {BreakerPolicy{FailureThreshold: 1}, []breakerStep{
			{0, "fail", Open},
			{time.Minute, "fail", Open},
			{time.Minute, "fail", Open},
			{time.Minute, "ok", HalfOpen},
		}},
		"the server asks for longer": {BreakerPolicy{FailureThreshold: 2}, []breakerStep{
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
		"a recovery longer than what servers may ask": {BreakerPolicy{FailureThreshold: 1, RecoveryTimeout: time.Hour}, []breakerStep{
			{0, "ask5m", Open},
			{time.Hour - 1, "x", Open},
			{1, "ok", HalfOpen},
		}},
		"ignored in closed": {BreakerPolicy{FailureThreshold: 2}, []breakerStep{
			{0, "fail 404 cancel 404", Closed},
			{0, "fail", Open}, // neither counted nor reset
		}},
		"ignored in half-open": {BreakerPolicy{FailureThreshold: 1}, []breakerStep{
			{0, "fail", Open},
			{time.Minute, "cancel cancel cancel cancel", HalfOpen}, // gives its place back, shows nothing
			{0, "404 begin x", HalfOpen},                           // answered: the service lives
			{0, "end-404", Closed},
		}},
		"late results of closed": {BreakerPolicy{FailureThreshold: 2}, []breakerStep{
			{0, "begin begin begin begin fail fail", Open},
			{0, "end-ok end-fail", Open},
			{time.Minute, "begin end-ok", HalfOpen}, // the second held is from before
			{0, "begin x end-fail x", HalfOpen},
			{0, "end-ok end-ok", Closed},
		}},
		"late results of half-open": {BreakerPolicy{FailureThreshold: 1}, []breakerStep{
			{0, "fail", Open},
			{time.Minute, "begin begin end-fail", Open}, // one probe left from this round
			{time.Minute, "begin begin x", HalfOpen},
			{0, "end-ok x", HalfOpen}, // its success is not one of this round's
			{0, "end-ok end-ok", Closed},
		}},
		"a late failure after closing": {BreakerPolicy{FailureThreshold: 1, SuccessThreshold: 2}, []breakerStep{
			{0, "begin fail", Open},
			{time.Minute, "ok ok", Closed},
			{0, "end-fail", Closed},
		}},
		"reset in every state": {BreakerPolicy{FailureThreshold: 2}, []breakerStep{
			{0, "fail reset fail", Closed},
			{0, "fail reset", Closed},
			{0, "fail fail", Open},
			{time.Minute, "begin reset", Closed},
			{0, "end-fail fail", Closed}, // the probe is late
			{0, "fail", Open},
		}},
		"trip in every state": {BreakerPolicy{FailureThreshold: 1}, []breakerStep{
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
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			runBreakerSteps(t, newBreakerDriver(t, test.policy), test.steps)
		})
	}
}

func runBreakerSteps(t *testing.T, d *breakerDriver, steps []breakerStep) {
	t.Helper()
	for i, step := range steps {
		d.now = d.now.Add(step.after)
		for _, word := range strings.Fields(step.do) {
			d.do(word)
		}
		require.Equal(t, step.state, d.b.state, "step %d: %+v", i, step)
	}
}

// A slot of the window is a tenth of it: what is a whole Window old is
// forgotten, what is nine tenths old still counts.
func TestBreakerFailureRate(t *testing.T) {
	half := BreakerPolicy{FailureThreshold: 100, FailureRate: 0.5, Window: 10 * time.Second, MinRequests: 4}
	tests := map[string]struct {
		policy BreakerPolicy
		steps  []breakerStep
	}{
		"rate":                    {half, []breakerStep{{0, "ok ok fail", Closed}, {0, "fail", Open}}},
		"below the rate":          {half, []breakerStep{{0, "ok ok ok fail fail ok fail ok", Closed}}},
		"too few requests":        {half, []breakerStep{{0, "fail fail fail", Closed}, {0, "fail", Open}}},
		"a success fills them up": {half, []breakerStep{{0, "fail fail fail", Closed}, {0, "ok", Open}}},
		"ignored do not count":    {half, []breakerStep{{0, "fail 404 cancel 404 404 fail", Closed}}},
		"no failure, no trip":     {half, []breakerStep{{0, "ok ok ok ok ok ok", Closed}}},
		"slides out": {half, []breakerStep{
			{0, "fail fail fail", Closed},
			{10 * time.Second, "ok ok ok", Closed},
			{0, "fail", Closed}, // one of four
		}},
		"slides out slot by slot": {half, []breakerStep{
			{0, "fail fail", Closed},
			{time.Second, "fail", Closed},
			{9 * time.Second, "ok ok", Closed}, // 1 of 3: the first second is over
			{0, "fail", Open},                  // 2 of 4
		}},
		"still in the window": {half, []breakerStep{
			{0, "fail fail fail", Closed},
			{9*time.Second + 999*time.Millisecond, "ok", Open},
		}},
		"a slot is used again": {half, []breakerStep{
			{0, "fail fail fail", Closed},
			{30 * time.Second, "ok ok ok", Closed},
			{0, "fail", Closed},
		}},
		"closing forgets the window": {half, []breakerStep{
			{0, "ok ok fail fail", Open},
			{time.Minute, "ok ok", Closed},
			{0, "fail fail fail", Closed},
			{0, "fail", Open},
		}},
		"reset forgets the window": {half, []breakerStep{
			{0, "ok fail fail reset fail fail fail", Closed},
			{0, "fail", Open},
		}},
		"failures in a row still count": {BreakerPolicy{FailureThreshold: 2, FailureRate: 1}, []breakerStep{{0, "ok fail fail", Open}}},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			runBreakerSteps(t, newBreakerDriver(t, test.policy), test.steps)
		})
	}
}

// 0.55 of 100 are 55, although 0.55*100 is a little more in floating point.
func TestBreakerFailureRateIsExact(t *testing.T) {
	for percent := 1; percent <= 100; percent++ {
		p := BreakerPolicy{FailureThreshold: 1000, FailureRate: float64(percent) / 100, MinRequests: 100}
		d := newBreakerDriver(t, p)
		for range 100 - percent {
			d.do("ok")
		}
		for range percent - 1 {
			d.do("fail")
		}
		require.Equal(t, Closed, d.b.state, "%d%%", percent)
		d.do("fail")
		assert.Equal(t, Open, d.b.state, "%d%%", percent)
	}
}

func TestBreakerGrowingRecoveryNeverOverflows(t *testing.T) {
	d := newBreakerDriver(t, BreakerPolicy{FailureThreshold: 1, RecoveryTimeout: 1 << 62, MaxRecoveryTimeout: 1<<63 - 1})
	d.do("fail")
	d.now = d.now.Add(1 << 62)
	d.do("fail")
	d.do("x")
	require.True(t, d.b.rejection.Load().Until.After(d.now))
}

// What a step tells: who changed, when, why and until when.
func TestBreakerChanges(t *testing.T) {
	d := newBreakerDriver(t, BreakerPolicy{FailureThreshold: 2})
	at := func(after time.Duration, steps ...string) time.Time {
		d.now = d.now.Add(after)
		for _, s := range steps {
			d.do(s)
		}
		return d.now
	}
	opened := at(0, "fail", "503")
	probed := at(time.Minute, "ok")
	reopened := at(time.Second, "ask5m")
	probedAgain := at(5*time.Minute, "ok")
	closed := at(time.Second, "ok")
	tripped := at(time.Second, "trip-30s")
	probedLast := at(30*time.Second, "begin")
	require.Equal(t, []StateChange{
		{Service: "api", From: Closed, To: Open, At: opened, Failures: 2, Until: probed, Cause: statusError(503)},
		{Service: "api", From: Open, To: HalfOpen, At: probed, Failures: 2, Cause: statusError(503)},
		{Service: "api", From: HalfOpen, To: Open, At: reopened, Failures: 2, Until: probedAgain, Cause: statusError(429)},
		{Service: "api", From: Open, To: HalfOpen, At: probedAgain, Failures: 2, Cause: statusError(429)},
		{Service: "api", From: HalfOpen, To: Closed, At: closed, Failures: 2},
		{Service: "api", From: Closed, To: Open, At: tripped, Until: tripped.Add(30 * time.Second), Cause: errTripped},
		{Service: "api", From: Open, To: HalfOpen, At: probedLast, Cause: errTripped},
	}, d.b.pending)
	require.EqualValues(t, 1, d.b.recoveries)
	require.Equal(t, closed.Sub(opened), d.b.recoveryTime)
}

// A late failure does not become the reason of what it has no part in.
func TestBreakerLateFailureIsNotTheCause(t *testing.T) {
	d := newBreakerDriver(t, BreakerPolicy{FailureThreshold: 1})
	for _, s := range []string{"begin", "503", "end-fail"} {
		d.do(s)
	}
	d.now = d.now.Add(time.Minute)
	d.do("begin")
	require.Equal(t, error(statusError(503)), d.b.pending[1].Cause)
}

func TestBreakerOff(t *testing.T) {
	s := &breakerSwitch{}
	tr := &Transport{Base: s, Policy: breakerOnce(BreakerPolicy{FailureThreshold: -1, FailureRate: 0.1, MinRequests: 1})}
	for range 100 {
		require.ErrorIs(t, breakerDo(tr), errBreakerDown)
	}
	s.status.Store(200)
	require.NoError(t, breakerDo(tr))
	require.False(t, tr.Trip(breakerHost, time.Hour), "there is no breaker")
	require.NoError(t, breakerDo(tr))
	st := breakerStats(t, tr)
	require.Equal(t, Closed, st.State)
	require.Equal(t, []uint64{102, 102, 100, 2}, []uint64{st.Requests, st.Attempts, st.Failures, st.Successes})
	requireBreakerReconciles(t, st)
	// Stats tells of failures also where nothing acts on them.
	require.Equal(t, errBreakerDown.Error(), st.LastFailureCause)
	require.False(t, st.LastFailure.IsZero())
}

func TestBreakerSlowCall(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		took, status := time.Duration(0), 200
		base := breakerBase(func(*http.Request) (*http.Response, error) {
			time.Sleep(took)
			return breakerAnswer(status), nil
		})
		tr := &Transport{Base: base, Policy: breakerOnce(BreakerPolicy{FailureThreshold: 2, SlowCall: time.Second})}
		took = time.Second
		require.NoError(t, breakerDo(tr))
		require.Zero(t, breakerStats(t, tr).ConsecutiveFailures)
		took++
		require.NoError(t, breakerDo(tr), "the answer is the caller's all the same")
		require.Equal(t, 1, breakerStats(t, tr).ConsecutiveFailures)
		status = 404
		require.NoError(t, breakerDo(tr))
		st := breakerStats(t, tr)
		require.Equal(t, Open, st.State)
		require.Contains(t, st.LastFailureCause, "slow call")
		require.Equal(t, []uint64{3, 2, 1}, []uint64{st.OK, st.Failures, st.Successes})
		requireBreakerReconciles(t, st)
	})
}

func TestBreakerServerDirectedOpening(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		asked := "120"
		base := breakerBase(func(*http.Request) (*http.Response, error) {
			resp := breakerAnswer(429)
			resp.Header.Set("Retry-After", asked)
			return resp, nil
		})
		tr := &Transport{Base: base, Policy: breakerOnce(BreakerPolicy{FailureThreshold: 1})}
		for _, c := range []struct {
			asked string
			open  time.Duration
		}{{"120", 2 * time.Minute}, {"5", time.Minute}, {"1e30", 10 * time.Minute}, {"-7", time.Minute}, {"soon", time.Minute}} {
			asked = c.asked
			require.NoError(t, breakerDo(tr))
			require.Equal(t, c.open, time.Until(breakerStats(t, tr).OpenUntil), c.asked)
			tr.Reset(breakerHost)
		}
	})
}

// A model of the breaker, written to be obvious: it keeps lists and counts them
// anew each time.
type breakerModel struct {
	p          BreakerPolicy
	state      State
	era        int // attempts of earlier eras are late
	until      time.Time
	recovery   time.Duration
	flying     []*breakerFlight
	marks      []breakerMark // of this era; CLOSED
	passed     int           // probes of this era
	left       time.Time     // when CLOSED was left
	recoveries uint64
	recovering time.Duration
	changes    []breakerChange

	attempts, rejections, successes, failures, ignored uint64
}

type breakerChange struct{ from, to State }

type breakerFlight struct {
	era   int
	probe bool
}

type breakerMark struct {
	at     time.Time
	failed bool
}

func newBreakerModel(p BreakerPolicy) *breakerModel {
	p = Policy{Breaker: p}.withDefaults().Breaker
	return &breakerModel{p: p, recovery: p.RecoveryTimeout}
}

func (m *breakerModel) move(to State, now time.Time) {
	if m.state == Closed && to != Closed {
		m.left = now
	}
	if m.state != to {
		m.changes = append(m.changes, breakerChange{m.state, to})
	}
	if to == Closed {
		m.recovery = m.p.RecoveryTimeout
	}
	m.state, m.marks, m.passed = to, nil, 0
	m.era++
}

func (m *breakerModel) open(until, now time.Time) {
	m.until = until
	m.move(Open, now)
}

// probing counts the probes of this era that are under way.
func (m *breakerModel) probing() (n int) {
	for _, f := range m.flying {
		if f.era == m.era && f.probe {
			n++
		}
	}
	return n
}

// begin returns nil if the attempt is rejected.
func (m *breakerModel) begin(now time.Time) *breakerFlight {
	if m.state == Open && !now.Before(m.until) {
		m.move(HalfOpen, now)
	}
	if m.state == Open || m.state == HalfOpen && m.probing() >= m.p.SuccessThreshold-m.passed {
		m.rejections++
		return nil
	}
	f := &breakerFlight{era: m.era, probe: m.state == HalfOpen}
	m.flying = append(m.flying, f)
	m.attempts++
	return f
}

func (m *breakerModel) end(f *breakerFlight, v verdict, now time.Time) {
	kept := m.flying[:0]
	for _, g := range m.flying {
		if g != f {
			kept = append(kept, g)
		}
	}
	m.flying = kept
	if f.probe && v.answered && v.outcome == Ignored {
		v.outcome = Success
	}
	switch v.outcome {
	case Success:
		m.successes++
	case Failure:
		m.failures++
	case Ignored:
		m.ignored++
	}
	if f.era != m.era || v.outcome == Ignored {
		return
	}
	if m.state == HalfOpen {
		m.endProbe(v, now)
		return
	}
	m.marks = append(m.marks, breakerMark{now, v.outcome == Failure})
	if m.streak() >= m.p.FailureThreshold || m.overRate(now) {
		m.fail(v, now)
	}
}

func (m *breakerModel) endProbe(v verdict, now time.Time) {
	if v.outcome == Failure {
		if m.p.MaxRecoveryTimeout > 0 {
			m.recovery = min(m.p.MaxRecoveryTimeout, 2*m.recovery)
		}
		m.fail(v, now)
		return
	}
	m.passed++
	if m.passed == m.p.SuccessThreshold {
		m.recoveries++
		m.recovering += now.Sub(m.left)
		m.move(Closed, now)
	}
}

func (m *breakerModel) fail(v verdict, now time.Time) {
	m.open(now.Add(max(m.recovery, min(v.asked, 10*time.Minute))), now)
}

func (m *breakerModel) streak() (n int) {
	for i := len(m.marks) - 1; i >= 0 && m.marks[i].failed; i-- {
		n++
	}
	return n
}

// overRate looks at the marks of this tenth of the Window and the nine before.
func (m *breakerModel) overRate(now time.Time) bool {
	if m.p.FailureRate == 0 {
		return false
	}
	tenth := func(at time.Time) int64 { return int64(at.Sub(m.marks[0].at) / (m.p.Window / 10)) }
	total, failed := 0, 0
	for i := len(m.marks) - 1; i >= 0 && tenth(m.marks[i].at) > tenth(now)-10; i-- {
		total++
		if m.marks[i].failed {
			failed++
		}
	}
	return total >= m.p.MinRequests && failed > 0 && float64(failed)/float64(total) >= m.p.FailureRate
}

func randomBreakerPolicy(r *rand.Rand) BreakerPolicy {
	p := BreakerPolicy{
		FailureThreshold: 1 + r.IntN(5),
		SuccessThreshold: 1 + r.IntN(4),
		RecoveryTimeout:  time.Duration(1+r.IntN(60)) * time.Second,
	}
	if r.IntN(2) == 0 {
		p.MaxRecoveryTimeout = 5 * p.RecoveryTimeout
	}
	if r.IntN(2) == 0 {
		p.FailureThreshold = 8
		p.FailureRate = []float64{0.25, 0.5, 0.55, 1}[r.IntN(4)]
		p.Window = time.Duration(1+r.IntN(10)) * 10 * time.Second
		p.MinRequests = 1 + r.IntN(20)
	}
	return p
}

// breakerSeeds are a few that stay, and one that is new each time.
func breakerSeeds(n uint64) (seeds []uint64) {
	for i := range n {
		seeds = append(seeds, i+1)
	}
	return append(seeds, rand.Uint64N(1<<32))
}

func TestBreakerModel(t *testing.T) {
	for _, seed := range breakerSeeds(11) {
		t.Run("seed="+strconv.FormatUint(seed, 10), func(t *testing.T) {
			r := rand.New(rand.NewPCG(seed, 0))
			p := randomBreakerPolicy(r)
			c := &breakerComparison{newBreakerDriver(t, p), newBreakerModel(p), nil}
			for i := range 10_000 {
				step := c.step(r)
				if diff := c.diff(); diff != "" {
					t.Fatalf("seed %d, step %d, %s: %s", seed, i, step, diff)
				}
			}
		})
	}
}

// A breakerComparison takes the machine and the model through the same steps.
type breakerComparison struct {
	*breakerDriver
	model  *breakerModel
	flying []breakerPair
}

type breakerPair struct {
	permit permit
	flight *breakerFlight
}

func (c *breakerComparison) step(r *rand.Rand) string {
	switch n := r.IntN(100); {
	case n < 45:
		pass, rejection := c.b.admit(c.now)
		flight := c.model.begin(c.now)
		require.Equal(c.t, flight == nil, rejection != nil, "admitted")
		if flight != nil {
			c.flying = append(c.flying, breakerPair{pass, flight})
		}
		return "begin"
	case n < 85 && len(c.flying) > 0:
		i := r.IntN(len(c.flying))
		pair := c.flying[i]
		c.flying[i] = c.flying[len(c.flying)-1]
		c.flying = c.flying[:len(c.flying)-1]
		names := []string{"ok", "ok", "ok", "ok", "fail", "503", "404", "cancel", "ask30s", "ask1h"}
		name := names[r.IntN(len(names))]
		c.b.record(pair.permit, breakerVerdicts[name], c.now)
		c.model.end(pair.flight, breakerVerdicts[name], c.now)
		return name
	case n < 97:
		// Short steps mostly, and now and then one to the very end of an opening.
		d := time.Duration(r.Int64N(int64(2 * time.Second)))
		if r.IntN(6) == 0 && c.model.state == Open {
			d = max(0, c.model.until.Sub(c.now)-time.Duration(r.IntN(2)))
		}
		c.now = c.now.Add(d)
		return "wait " + d.String()
	case n < 98:
		c.b.close(c.now)
		c.model.move(Closed, c.now)
		return "reset"
	default:
		until := c.now.Add(time.Duration(r.IntN(90)) * time.Second)
		c.b.openUntil(until, c.now, errTripped)
		c.model.open(until, c.now)
		return "trip"
	}
}

// A breakerView is what can be seen of the machine and of the model.
type breakerView struct {
	state                  State
	until                  time.Time
	streak, passed, probes int
	recovery, recovering   time.Duration
	recoveries             uint64
	changes, told          int
	change                 breakerChange // the last one
}

func (m *breakerModel) view() breakerView {
	v := breakerView{state: m.state, recovery: m.recovery, recoveries: m.recoveries, recovering: m.recovering,
		passed: m.passed, probes: m.probing(), changes: len(m.changes), told: len(m.changes)}
	if m.state == Closed {
		v.streak = m.streak()
	} else {
		v.until = m.until
	}
	if len(m.changes) > 0 {
		v.change = m.changes[len(m.changes)-1]
	}
	return v
}

func viewBreaker(b *breaker) breakerView {
	v := breakerView{state: b.state, recovery: b.recovery, recoveries: b.recoveries, recovering: b.recoveryTime,
		passed: b.successes, probes: b.probes, changes: int(b.transitions), told: len(b.pending)}
	if b.state == Closed {
		v.streak = b.failures
	}
	if rejection := b.rejection.Load(); rejection != nil {
		v.until = rejection.Until
	}
	if n := len(b.pending); n > 0 {
		v.change = breakerChange{b.pending[n-1].From, b.pending[n-1].To}
	}
	return v
}

func (c *breakerComparison) diff() string {
	got, want, gate := viewBreaker(c.b), c.model.view(), c.gate.Load()
	switch {
	case got != want:
		return fmt.Sprintf("\ngot  %+v\nwant %+v", got, want)
	case got.probes > c.b.policy.SuccessThreshold-got.passed:
		return "more probes than successes are missing"
	case (gate&gateShut != 0) != (got.state != Closed) || (c.b.rejection.Load() != nil) != (got.state != Closed):
		return "the gate is not what the state says"
	case got.state == Closed && gate&gateWatched == 0 && (got.streak > 0 || c.b.policy.FailureRate > 0):
		return "the gate does not send successes to the breaker"
	case gate>>gateShift != c.b.generation:
		return "the gate has another generation"
	}
	return ""
}

// The same model against a whole Transport: attempts are held open in the base
// and end in any order and way.
func TestBreakerModelRoundTrip(t *testing.T) {
	for _, seed := range breakerSeeds(5) {
		t.Run("seed="+strconv.FormatUint(seed, 10), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := rand.New(rand.NewPCG(seed, 1))
				p := randomBreakerPolicy(r)
				w := newBreakerWorld(t, p)
				defer w.abandon()
				for i := range 10_000 {
					step := w.step(r)
					if diff := w.diff(); diff != "" {
						t.Fatalf("seed %d, step %d, %s: %s", seed, i, step, diff)
					}
				}
				w.land(r)
			})
		})
	}
}

// A breakerWorld has a Transport and the model of its one breaker.
type breakerWorld struct {
	t       *testing.T
	tr      *Transport
	model   *breakerModel
	calls   []*breakerCall
	changes []breakerChange
	start   time.Time // of the first request, which makes the service

	requests, ok, failed, cancelled, streamFailures uint64
}

// A breakerCall is one request, held in the base and then, if it streams, by
// its caller.
type breakerCall struct {
	flight  *breakerFlight
	ctx     context.Context
	cancel  context.CancelFunc
	finish  chan string // how the base ends the attempt
	reached bool
	done    bool
	resp    *http.Response
	err     error
	end     chan error // how the stream ends
}

type breakerCallKey struct{}

func newBreakerWorld(t *testing.T, p BreakerPolicy) *breakerWorld {
	w := &breakerWorld{t: t, model: newBreakerModel(p)}
	w.tr = &Transport{
		Policy: breakerOnce(p),
		Base: breakerBase(func(req *http.Request) (*http.Response, error) {
			return req.Context().Value(breakerCallKey{}).(*breakerCall).serve(req)
		}),
		OnStateChange: func(c StateChange) { w.changes = append(w.changes, breakerChange{c.From, c.To}) },
	}
	return w
}

func (c *breakerCall) serve(req *http.Request) (*http.Response, error) {
	c.reached = true
	select {
	case how := <-c.finish:
		switch how {
		case "error":
			return nil, errBreakerDown
		case "panic":
			panic(how)
		case "goexit":
			runtime.Goexit()
		case "stream":
			resp := breakerAnswer(200)
			resp.Body = &breakerStream{ctx: req.Context(), end: c.end}
			return resp, nil
		case "asked":
			resp := breakerAnswer(503)
			resp.Header.Set("Retry-After", "90")
			return resp, nil
		}
		status, _ := strconv.Atoi(how)
		return breakerAnswer(status), nil
	case <-req.Context().Done():
		return nil, req.Context().Err()
	}
}

// A breakerStream is a body that ends as it is told.
type breakerStream struct {
	ctx    context.Context
	end    chan error
	closed atomic.Int32
}

func (s *breakerStream) Read([]byte) (int, error) {
	select {
	case err := <-s.end:
		return 0, err
	case <-s.ctx.Done():
		return 0, s.ctx.Err()
	}
}

func (s *breakerStream) Close() error {
	s.closed.Add(1)
	return nil
}

func (w *breakerWorld) step(r *rand.Rand) string {
	switch n := r.IntN(100); {
	case n < 42 && len(w.calls) < 12:
		w.begin()
		return "begin"
	case n < 88 && len(w.calls) > 0:
		return w.finish(r, r.IntN(len(w.calls)))
	case n < 97:
		d := time.Duration(r.Int64N(int64(3 * time.Second)))
		if r.IntN(4) == 0 && w.model.state == Open {
			d = max(0, time.Until(w.model.until)-time.Duration(r.IntN(2)))
		}
		time.Sleep(d)
		return "wait " + d.String()
	case n < 98:
		require.Equal(w.t, w.requests > 0, w.tr.Reset(breakerHost))
		if w.requests > 0 {
			w.model.move(Closed, time.Now())
		}
		return "reset"
	default:
		d := time.Duration(1+r.IntN(90)) * time.Second
		require.Equal(w.t, w.requests > 0, w.tr.Trip(breakerHost, d))
		if w.requests > 0 {
			w.model.open(time.Now().Add(d), time.Now())
		}
		return "trip"
	}
}

func (w *breakerWorld) begin() {
	c := &breakerCall{finish: make(chan string), end: make(chan error, 1)}
	c.ctx, c.cancel = context.WithCancel(context.WithValue(context.Background(), breakerCallKey{}, c))
	go func() {
		defer func() {
			if p := recover(); p != nil && p != "panic" {
				panic(p)
			}
			c.done = true
		}()
		c.resp, c.err = w.tr.RoundTrip(breakerRequest(c.ctx))
	}()
	if w.requests == 0 {
		w.start = time.Now()
	}
	w.requests++
	c.flight = w.model.begin(time.Now())
	synctest.Wait()
	require.Equal(w.t, c.flight != nil, c.reached, "admitted")
	require.Equal(w.t, c.flight == nil, c.done)
	if c.flight == nil {
		require.ErrorIs(w.t, c.err, ErrRejected)
		c.cancel()
		return
	}
	w.calls = append(w.calls, c)
}

var breakerEndings = []string{"200", "200", "200", "404", "503", "asked", "error", "cancel", "panic", "goexit", "stream", "stream", "stream"}

// finish ends one call in the base, or one stream.
func (w *breakerWorld) finish(r *rand.Rand, i int) string {
	c := w.calls[i]
	if c.resp != nil {
		w.forget(i)
		return w.finishStream(r, c)
	}
	how := breakerEndings[r.IntN(len(breakerEndings))]
	if how == "cancel" {
		c.cancel()
	} else {
		c.finish <- how
	}
	synctest.Wait()
	require.True(w.t, c.done)
	v := verdict{}
	switch how {
	case "200", "stream":
		v = breakerVerdicts["ok"]
		w.ok++
	case "404":
		v = breakerVerdicts["404"]
		w.ok++
	case "503", "error", "asked":
		v = breakerVerdicts["fail"]
		if how == "asked" {
			v.asked = 90 * time.Second
		}
		w.failed++
	case "panic", "goexit":
		w.failed++
	case "cancel":
		require.ErrorIs(w.t, c.err, context.Canceled)
		w.cancelled++
	}
	if how != "stream" || c.flight.probe { // headers settle a probe
		w.model.end(c.flight, v, time.Now())
	}
	if how != "stream" {
		w.forget(i)
		c.cancel()
	}
	return how
}

// finishStream lets a stream end well or badly, or be closed or cancelled.
func (w *breakerWorld) finishStream(r *rand.Rand, c *breakerCall) string {
	v, how := breakerVerdicts["ok"], []string{"EOF", "broken", "closed", "cancelled"}[r.IntN(4)]
	switch how {
	case "EOF":
		c.end <- io.EOF
	case "broken":
		c.end <- io.ErrUnexpectedEOF
		v = breakerVerdicts["fail"]
	case "cancelled":
		c.cancel()
		v = verdict{}
	}
	if how != "closed" {
		_, err := c.resp.Body.Read(make([]byte, 1))
		require.Error(w.t, err)
	}
	c.resp.Body.Close()
	c.cancel()
	if !c.flight.probe {
		if how == "broken" {
			w.streamFailures++
		}
		w.model.end(c.flight, v, time.Now())
	}
	return "stream " + how
}

func (w *breakerWorld) forget(i int) {
	w.calls[i] = w.calls[len(w.calls)-1]
	w.calls = w.calls[:len(w.calls)-1]
}

// diff compares the Stats with the model's and with what the caller has seen.
func (w *breakerWorld) diff() string {
	st, ok := w.tr.Stats(breakerHost)
	if !ok {
		return "" // nothing was sent yet
	}
	got, m := st, w.model
	if st.State != Closed {
		got.ConsecutiveFailures = 0 // says the same as before the opening
	}
	got.Since, got.LastFailure, got.LastFailureCause = time.Time{}, time.Time{}, ""
	got.TimeClosed, got.TimeOpen, got.TimeHalfOpen, got.Exhausted = 0, 0, 0, 0
	v := m.view()
	want := Stats{Service: breakerHost, State: v.state, OpenUntil: v.until, ConsecutiveFailures: v.streak, HalfOpenSuccesses: v.passed,
		Requests: w.requests, OK: w.ok, Failed: w.failed, Rejected: m.rejections, Cancelled: w.cancelled,
		Attempts: m.attempts, Successes: m.successes, Failures: m.failures, Ignored: m.ignored, StreamFailures: w.streamFailures,
		Transitions: uint64(v.changes), Recoveries: v.recoveries, RecoveryTime: v.recovering}
	switch {
	case got != want:
		return fmt.Sprintf("\ngot  %+v\nwant %+v", got, want)
	case len(w.changes) != v.changes || v.changes > 0 && w.changes[v.changes-1] != v.change:
		return "the hook was told of other changes"
	case st.TimeClosed+st.TimeOpen+st.TimeHalfOpen != time.Since(w.start):
		return "more or less time in states than there was"
	}
	return ""
}

// land ends what is in flight: every place is given back, the sums are right.
func (w *breakerWorld) land(r *rand.Rand) {
	for len(w.calls) > 0 {
		step := w.finish(r, 0)
		require.Empty(w.t, w.diff(), step)
	}
	requireBreakerReconciles(w.t, breakerStats(w.t, w.tr))
	require.Zero(w.t, w.model.probing())
	require.Zero(w.t, w.tr.load().byName.get(breakerHost).service.rest().breaker.probes)
}

// abandon ends what a failed test has left, so that its bubble can end.
func (w *breakerWorld) abandon() {
	for _, c := range w.calls {
		c.cancel()
	}
}

// However many come at once, HALF_OPEN lets through what it needs.
func TestBreakerThousandAtHalfOpen(t *testing.T) {
	const callers, places = 1000, 3
	var inside, rejected atomic.Int64
	all := make(chan struct{})
	arrive := func(n *atomic.Int64) {
		n.Add(1)
		if inside.Load()+rejected.Load() == callers {
			close(all)
		}
	}
	var arriving sync.Mutex
	base := breakerBase(func(*http.Request) (*http.Response, error) {
		arriving.Lock()
		arrive(&inside)
		arriving.Unlock()
		<-all
		return breakerAnswer(200), nil
	})
	tr := &Transport{Policy: Policy{Service: breakerHost, Retry: RetryPolicy{MaxAttempts: 1}, Breaker: BreakerPolicy{SuccessThreshold: places}}, Base: base}
	tr.Trip(breakerHost, 1)
	var callersDone sync.WaitGroup
	for range callers {
		callersDone.Go(func() {
			if err := breakerDo(tr); err != nil {
				assert.ErrorIs(t, err, ErrRejected)
				arriving.Lock()
				arrive(&rejected)
				arriving.Unlock()
			}
		})
	}
	callersDone.Wait()
	require.EqualValues(t, places, inside.Load())
	st := breakerStats(t, tr)
	require.Equal(t, Closed, st.State)
	require.EqualValues(t, callers-places, st.Rejected)
	requireBreakerReconciles(t, st)
}

// A thousand goroutines with every kind of outcome, beside Reset, Trip and
// Stats. Nothing is lost, and the service can still close its breaker.
func TestBreakerThousandGoroutines(t *testing.T) {
	var sent atomic.Uint64
	endings := []string{"200", "200", "200", "404", "503", "error", "panic", "goexit", "stream"}
	base := breakerBase(func(req *http.Request) (*http.Response, error) {
		sent.Add(1)
		runtime.Gosched()
		call := &breakerCall{finish: make(chan string, 1), end: make(chan error, 1)}
		call.finish <- endings[rand.IntN(len(endings))]
		call.end <- []error{io.EOF, io.ErrUnexpectedEOF}[rand.IntN(2)]
		return call.serve(req)
	})
	policy := breakerOnce(BreakerPolicy{FailureThreshold: 3, RecoveryTimeout: 1})
	policy.Service = breakerHost
	changes := &breakerChanges{}
	tr := &Transport{Policy: policy, Base: base, OnStateChange: changes.add}
	var all sync.WaitGroup
	for i := range 1000 {
		all.Go(func() {
			for range 10 {
				breakerDoAnyhow(tr)
			}
			switch i % 50 {
			case 0:
				tr.Reset(breakerHost)
			case 1:
				tr.Trip(breakerHost, 1)
			case 2:
				tr.Stats(breakerHost)
			}
		})
	}
	all.Wait()
	st := breakerStats(t, tr)
	requireBreakerReconciles(t, st)
	require.EqualValues(t, 10_000, st.Requests)
	require.Equal(t, sent.Load(), st.Attempts)
	changes.requireInOrder(t, st.Transitions)
	require.Zero(t, tr.load().byName.get(breakerHost).service.rest().breaker.probes)
}

// breakerDoAnyhow makes a request and reads its answer, in a goroutine of its
// own that may panic or exit.
func breakerDoAnyhow(tr *Transport) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		defer func() { _ = recover() }()
		resp, err := tr.RoundTrip(breakerRequest(context.Background()))
		if err == nil {
			_, _ = io.Copy(io.Discard, resp.Body)
			resp.Body.Close()
		}
	}()
	<-done
}

// breakerChanges collects what OnStateChange is told.
type breakerChanges struct {
	mu  sync.Mutex
	all []StateChange
}

func (c *breakerChanges) add(change StateChange) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.all = append(c.all, change)
}

func (c *breakerChanges) requireInOrder(t *testing.T, transitions uint64) {
	t.Helper()
	state := Closed
	for i, change := range c.all {
		require.Equal(t, state, change.From, "change %d", i)
		require.NotEqual(t, change.From, change.To)
		state = change.To
	}
	require.EqualValues(t, transitions, len(c.all))
}

// breakerStreaming returns a Transport whose only answer is resp with the body
// rc.
func breakerStreaming(resp func(*http.Request) *http.Response) *Transport {
	policy := breakerOnce(BreakerPolicy{})
	policy.Service = breakerHost
	return &Transport{Policy: policy, Base: breakerBase(func(req *http.Request) (*http.Response, error) { return resp(req), nil })}
}

func breakerStreamOf(end ...error) func(*http.Request) *http.Response {
	return func(req *http.Request) *http.Response {
		resp := breakerAnswer(200)
		s := &breakerStream{ctx: req.Context(), end: make(chan error, 10)}
		for _, err := range end {
			s.end <- err
		}
		resp.Body = s
		return resp
	}
}

func TestBreakerStreamEndings(t *testing.T) {
	tests := map[string]struct {
		end                         error // nil: none
		read                        bool
		leave                       func(context.Context) (context.Context, context.CancelFunc)
		success, failure, ignored   uint64
		streamFailures, consecutive int
	}{
		"read to the end": {end: io.EOF, read: true, success: 1},
		"closed early":    {success: 1},
		"breaks off":      {end: io.ErrUnexpectedEOF, read: true, failure: 1, streamFailures: 1, consecutive: 1},
		"caller cancels": {read: true, ignored: 1, leave: func(ctx context.Context) (context.Context, context.CancelFunc) {
			ctx, cancel := context.WithCancel(ctx)
			time.AfterFunc(time.Second, cancel)
			return ctx, cancel
		}},
		"deadline": {read: true, failure: 1, streamFailures: 1, consecutive: 1, leave: func(ctx context.Context) (context.Context, context.CancelFunc) {
			return context.WithTimeout(ctx, time.Second)
		}},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ends := []error{}
				if test.end != nil {
					ends = append(ends, test.end)
				}
				tr, ctx := breakerStreaming(breakerStreamOf(ends...)), t.Context()
				if test.leave != nil {
					var cancel context.CancelFunc
					ctx, cancel = test.leave(ctx)
					defer cancel()
				}
				resp, err := tr.RoundTrip(breakerRequest(ctx))
				require.NoError(t, err)
				st := breakerStats(t, tr)
				require.EqualValues(t, 1, st.OK)
				require.Zero(t, st.Successes+st.Failures+st.Ignored, "nothing is known yet")
				if test.read {
					_, err := resp.Body.Read(make([]byte, 1))
					require.Error(t, err)
				}
				require.NoError(t, resp.Body.Close())
				require.NoError(t, resp.Body.Close(), "a second Close is harmless")
				st = breakerStats(t, tr)
				require.Equal(t, []uint64{test.success, test.failure, test.ignored}, []uint64{st.Successes, st.Failures, st.Ignored})
				require.EqualValues(t, test.streamFailures, st.StreamFailures)
				require.Equal(t, test.consecutive, st.ConsecutiveFailures)
				requireBreakerReconciles(t, st)
			})
		})
	}
}

func TestBreakerOpensAfterFiveBrokenStreams(t *testing.T) {
	tr := breakerStreaming(breakerStreamOf(io.ErrUnexpectedEOF))
	for i := range 5 {
		require.Equal(t, Closed, breakerStats(t, tr).State, "after %d", i)
		resp, err := tr.RoundTrip(breakerRequest(t.Context()))
		require.NoError(t, err)
		_, err = io.Copy(io.Discard, resp.Body)
		require.Equal(t, io.ErrUnexpectedEOF, err)
		resp.Body.Close()
	}
	require.ErrorIs(t, breakerDo(tr), ErrRejected)
	st := breakerStats(t, tr)
	require.Equal(t, Open, st.State)
	require.EqualValues(t, 5, st.StreamFailures)
	require.Equal(t, io.ErrUnexpectedEOF.Error(), st.LastFailureCause)
}

// A success that is only known at the end of its stream ends a row of failures
// then; one from before the breaker opened changes nothing.
func TestBreakerStreamCountsWhenItEnds(t *testing.T) {
	status := 200
	tr := breakerStreaming(func(req *http.Request) *http.Response {
		if status != 200 {
			return breakerAnswer(status)
		}
		return breakerStreamOf(io.EOF)(req)
	})
	stream, err := tr.RoundTrip(breakerRequest(t.Context()))
	require.NoError(t, err)
	status = 503
	for range 4 {
		require.NoError(t, breakerDo(tr))
	}
	require.Equal(t, 4, breakerStats(t, tr).ConsecutiveFailures)
	_, err = stream.Body.Read(make([]byte, 1))
	require.Equal(t, io.EOF, err)
	require.Zero(t, breakerStats(t, tr).ConsecutiveFailures)

	status = 200
	late, err := tr.RoundTrip(breakerRequest(t.Context()))
	require.NoError(t, err)
	tr.Trip(breakerHost, time.Hour)
	require.NoError(t, late.Body.Close())
	st := breakerStats(t, tr)
	require.Equal(t, Open, st.State)
	requireBreakerReconciles(t, st)
}

// Responses whose end is known at their headers are settled there, and keep
// their bodies.
func TestBreakerAnswersWithoutStream(t *testing.T) {
	tests := map[string]*http.Response{
		"204":     {StatusCode: 204, Body: http.NoBody},
		"304":     {StatusCode: 304, Body: http.NoBody},
		"no body": {StatusCode: 200, Body: http.NoBody},
		"nil":     {StatusCode: 200},
	}
	for name, answer := range tests {
		t.Run(name, func(t *testing.T) {
			tr := breakerStreaming(func(*http.Request) *http.Response { return answer })
			req := breakerRequest(t.Context())
			req.Method = http.MethodHead
			body := answer.Body
			resp, err := tr.RoundTrip(req)
			require.NoError(t, err)
			require.Equal(t, body, resp.Body)
			st := breakerStats(t, tr)
			require.EqualValues(t, 1, st.Successes)
			requireBreakerReconciles(t, st)
		})
	}
}

// A failure and an ignored answer are settled at their headers, however their
// bodies end.
func TestBreakerErrorPagesAreSettledAtTheirHeaders(t *testing.T) {
	for _, status := range []int{503, 404} {
		tr := breakerStreaming(func(req *http.Request) *http.Response {
			resp := breakerStreamOf(io.ErrUnexpectedEOF)(req)
			resp.StatusCode = status
			return resp
		})
		resp, err := tr.RoundTrip(breakerRequest(t.Context()))
		require.NoError(t, err)
		requireBreakerReconciles(t, breakerStats(t, tr))
		_, _ = io.Copy(io.Discard, resp.Body)
		resp.Body.Close()
		st := breakerStats(t, tr)
		requireBreakerReconciles(t, st)
		require.Zero(t, st.StreamFailures)
	}
}

type breakerConn struct{ bytes.Buffer }

func (*breakerConn) Close() error { return nil }

func TestBreakerKeepsUpgradedConnections(t *testing.T) {
	conn := &breakerConn{}
	tr := breakerStreaming(func(*http.Request) *http.Response {
		return &http.Response{StatusCode: http.StatusSwitchingProtocols, Body: conn}
	})
	resp, err := tr.RoundTrip(breakerRequest(t.Context()))
	require.NoError(t, err)
	rwc, ok := resp.Body.(io.ReadWriteCloser)
	require.True(t, ok)
	_, err = rwc.Write([]byte("ping"))
	require.NoError(t, err)
	require.Equal(t, "ping", conn.String())
	requireBreakerReconciles(t, breakerStats(t, tr))
}

// A reader and a closer at the same time settle the attempt once.
func TestBreakerStreamSettlesOnce(t *testing.T) {
	tr := breakerStreaming(breakerStreamOf(io.ErrUnexpectedEOF, io.ErrUnexpectedEOF, io.ErrUnexpectedEOF, io.ErrUnexpectedEOF))
	for range 200 {
		tr.Reset(breakerHost)
		resp, err := tr.RoundTrip(breakerRequest(t.Context()))
		require.NoError(t, err)
		var both sync.WaitGroup
		for range 2 {
			both.Go(func() { _, _ = resp.Body.Read(make([]byte, 1)) })
			both.Go(func() { resp.Body.Close() })
		}
		both.Wait()
	}
	st := breakerStats(t, tr)
	require.EqualValues(t, 200, st.Attempts)
	require.Equal(t, st.Failures, st.StreamFailures)
	requireBreakerReconciles(t, st)
}

func TestBreakerOpenError(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &breakerSwitch{}
		tr := &Transport{Base: s, Policy: breakerOnce(BreakerPolicy{FailureThreshold: 1})}
		breakerDo(tr)
		err := breakerDo(tr)
		open, ok := err.(*OpenError)
		require.True(t, ok, "bare: %T", err)
		require.Equal(t, breakerHost, open.Service)
		require.True(t, open.Until.Equal(time.Now().Add(time.Minute)))
		require.Equal(t, errBreakerDown, open.Last)
		require.ErrorIs(t, err, ErrRejected)
		require.NotErrorIs(t, err, errBreakerDown, "it is another request's error")
		require.Nil(t, errors.Unwrap(err))
		require.Equal(t, "tripper: circuit breaker open for api.example.com until "+
			open.Until.Format(time.RFC3339)+": the service is down", err.Error())
		require.Same(t, open, breakerDo(tr))

		s.status.Store(503)
		time.Sleep(time.Minute)
		breakerDo(tr)
		require.ErrorContains(t, breakerDo(tr), "503 Service Unavailable")
		tr.Trip(breakerHost, time.Hour)
		require.ErrorContains(t, breakerDo(tr), "tripped by hand")
	})
}

func TestBreakerRejectsWithoutAllocating(t *testing.T) {
	tr := &Transport{Base: &breakerSwitch{}, Policy: Policy{Service: breakerHost}}
	req := breakerRequest(t.Context())
	require.True(t, tr.Trip(breakerHost, time.Hour))
	var err error
	require.Zero(t, testing.AllocsPerRun(1000, func() { _, err = tr.RoundTrip(req) }))
	require.ErrorIs(t, err, ErrRejected)
}

// A rejected request's body is closed, and the base does not hear of it.
func TestBreakerRejectionClosesBody(t *testing.T) {
	s := &breakerSwitch{}
	policy := Policy{Service: breakerHost}
	tr := &Transport{Base: s, Policy: policy}
	tr.Trip(breakerHost, time.Hour)
	body := &breakerStream{ctx: t.Context()}
	req := breakerRequest(t.Context())
	req.Method, req.Body = http.MethodPost, body
	_, err := tr.RoundTrip(req)
	require.ErrorIs(t, err, ErrRejected)
	require.EqualValues(t, 1, body.closed.Load())
	require.Zero(t, s.calls.Load())
}

// A hook may call whatever it likes, and is told of what that changes after it
// has returned.
func TestBreakerHookMayCallAnything(t *testing.T) {
	s := &breakerSwitch{}
	changes := &breakerChanges{}
	var tr *Transport
	depth := 0
	tr = &Transport{Base: s, Policy: breakerOnce(BreakerPolicy{FailureThreshold: 1}), OnStateChange: func(c StateChange) {
		depth++
		assert.Equal(t, 1, depth, "one at a time")
		changes.add(c)
		switch len(changes.all) {
		case 1: // opened
			assert.Equal(t, Open, breakerStats(t, tr).State)
			assert.ErrorIs(t, breakerDo(tr), ErrRejected)
			for range tr.All() {
			}
			assert.True(t, tr.Reset(breakerHost))
		case 2: // closed by the hook
			assert.True(t, tr.Trip(breakerHost, time.Hour))
			assert.True(t, tr.Reset(breakerHost))
		case 4:
			assert.ErrorIs(t, breakerDo(tr), errBreakerDown) // opens once more
		}
		depth--
	}}
	require.ErrorIs(t, breakerDo(tr), errBreakerDown)
	changes.requireInOrder(t, 5)
	require.Equal(t, Open, breakerStats(t, tr).State)
}

func TestBreakerHooksInOrderUnderConcurrency(t *testing.T) {
	changes := &breakerChanges{}
	busy := atomic.Bool{}
	policy := breakerOnce(BreakerPolicy{FailureThreshold: 1, SuccessThreshold: 1, RecoveryTimeout: 1})
	policy.Service = breakerHost
	tr := &Transport{Policy: policy, Base: breakerBase(func(*http.Request) (*http.Response, error) {
		return breakerAnswer([]int{200, 503}[rand.IntN(2)]), nil
	}), OnStateChange: func(c StateChange) {
		assert.False(t, busy.Swap(true), "one at a time")
		runtime.Gosched()
		changes.add(c)
		busy.Store(false)
	}}
	var all sync.WaitGroup
	for i := range 16 {
		all.Go(func() {
			for j := range 200 {
				breakerDo(tr)
				if i == 0 && j%10 == 0 {
					tr.Trip(breakerHost, 1)
					tr.Reset(breakerHost)
				}
			}
		})
	}
	all.Wait()
	changes.requireInOrder(t, breakerStats(t, tr).Transitions)
}

// breakerPanics reports whether f panics or ends its goroutine.
func breakerPanics(f func()) (panicked bool) {
	done := make(chan bool)
	go func() {
		returned := false
		defer func() {
			_ = recover()
			done <- !returned
		}()
		f()
		returned = true
	}()
	return <-done
}

// A hook that panics, or ends the goroutine, spoils its own request only: no
// place is lost, the counters are right, and later changes are told.
func TestBreakerSurvivesPanickingHooks(t *testing.T) {
	for name, die := range map[string]func(){"panic": func() { panic("hook") }, "Goexit": runtime.Goexit} {
		for _, at := range []State{Open, HalfOpen, Closed} {
			t.Run(name+" at "+at.String(), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					s, changes := &breakerSwitch{}, &breakerChanges{}
					tr := &Transport{Base: s, Policy: breakerOnce(BreakerPolicy{FailureThreshold: 1, SuccessThreshold: 1})}
					deaths := 0
					tr.OnStateChange = func(c StateChange) {
						changes.add(c)
						if c.To == at && deaths == 0 {
							deaths++
							die()
						}
					}
					died := breakerPanics(func() { breakerDo(tr) })
					require.Equal(t, at == Open, died)
					s.status.Store(200)
					for range 3 { // one may die
						time.Sleep(time.Minute)
						breakerPanics(func() { breakerDo(tr) })
					}
					require.Equal(t, 1, deaths)
					st := breakerStats(t, tr)
					require.Equal(t, Closed, st.State, "the breaker has recovered")
					require.NoError(t, breakerDo(tr))
					requireBreakerReconciles(t, breakerStats(t, tr))
					changes.requireInOrder(t, 3)
				})
			})
		}
	}
}

// What the base, or the caller's Outcome, does to its goroutine does not hold a
// place, and closes the request's body.
func TestBreakerSurvivesPanickingBase(t *testing.T) {
	for name, die := range map[string]func(){"panic": func() { panic("base") }, "Goexit": runtime.Goexit} {
		for _, where := range []string{"base", "Outcome"} {
			t.Run(name+" in "+where, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					dying := ""
					p := breakerOnce(BreakerPolicy{FailureThreshold: 1, SuccessThreshold: 1})
					p.Service = breakerHost
					if where == "Outcome" { // without one, requests take the short way
						p.Breaker.Outcome = func(resp *http.Response, err error) Outcome {
							if dying == "Outcome" {
								die()
							}
							return DefaultOutcome(resp, err)
						}
					}
					answered := &breakerStream{ctx: t.Context()}
					tr := &Transport{Policy: p, Base: breakerBase(func(req *http.Request) (*http.Response, error) {
						if dying == "base" {
							die()
						}
						closeBody(req)
						resp := breakerAnswer(200)
						resp.Body = answered
						return resp, nil
					})}
					requireBreakerSurvives(t, tr, func() { dying = where }, func() { dying = "" })
					if where == "Outcome" {
						require.EqualValues(t, 4, answered.closed.Load(), "answers that nobody gets are closed")
					}
				})
			})
		}
	}
}

// requireBreakerSurvives lets attempts die in CLOSED and in HALF_OPEN, and then
// recover.
func requireBreakerSurvives(t *testing.T, tr *Transport, sicken, heal func()) {
	t.Helper()
	request := func() *breakerStream {
		body := &breakerStream{ctx: t.Context()}
		req := breakerRequest(t.Context())
		req.Method, req.Body, req.GetBody = http.MethodPost, body, func() (io.ReadCloser, error) { return body, nil }
		resp, err := tr.RoundTrip(req)
		assert.NoError(t, err)
		resp.Body.Close()
		return body
	}
	sicken()
	bodies := []*breakerStream{}
	die := func() {
		body := &breakerStream{ctx: t.Context()}
		bodies = append(bodies, body)
		require.True(t, breakerPanics(func() {
			req := breakerRequest(t.Context())
			req.Method, req.Body, req.GetBody = http.MethodPost, body, func() (io.ReadCloser, error) { return body, nil }
			tr.RoundTrip(req)
		}))
	}
	die()
	st := breakerStats(t, tr)
	require.Equal(t, []uint64{1, 1, 1, 1}, []uint64{st.Requests, st.Failed, st.Attempts, st.Ignored})
	require.Equal(t, Closed, st.State)
	tr.Trip(breakerHost, time.Second)
	time.Sleep(time.Second)
	for range 2 {
		die()
		require.Equal(t, HalfOpen, breakerStats(t, tr).State)
	}
	for _, body := range bodies {
		require.NotZero(t, body.closed.Load())
	}
	heal()
	request()
	st = breakerStats(t, tr)
	require.Equal(t, Closed, st.State)
	requireBreakerReconciles(t, st)
	require.Equal(t, []uint64{4, 3, 1, 3, 1}, []uint64{st.Requests, st.Failed, st.OK, st.Ignored, st.Successes})
}

// What a base must not return: both a response and an error, or neither.
func TestBreakerMendsOddResults(t *testing.T) {
	body := &breakerStream{ctx: t.Context()}
	both := breakerAnswer(200)
	both.Body = body
	var resp *http.Response
	var err error
	policy := breakerOnce(BreakerPolicy{})
	policy.Service = breakerHost
	tr := &Transport{Policy: policy, Base: breakerBase(func(*http.Request) (*http.Response, error) { return resp, err })}

	resp, err = both, errBreakerDown
	gotResp, gotErr := tr.RoundTrip(breakerRequest(t.Context()))
	require.Nil(t, gotResp)
	require.Equal(t, errBreakerDown, gotErr)
	require.EqualValues(t, 1, body.closed.Load())

	resp, err = nil, nil
	gotResp, gotErr = tr.RoundTrip(breakerRequest(t.Context()))
	require.Nil(t, gotResp)
	require.ErrorContains(t, gotErr, "tripper: ")
	st := breakerStats(t, tr)
	require.Equal(t, []uint64{2, 2, 2, 2}, []uint64{st.Requests, st.Failed, st.Attempts, st.Failures})
	require.Equal(t, 2, st.ConsecutiveFailures)
}

// The caller's cancelled context says nothing about the service; the deadline
// that passes while it hangs does.
func TestBreakerContextEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		policy := breakerOnce(BreakerPolicy{FailureThreshold: 2})
		policy.Service = breakerHost
		tr := &Transport{Policy: policy, Base: breakerBase(func(req *http.Request) (*http.Response, error) {
			<-req.Context().Done()
			return nil, fmt.Errorf("gave up: %w", req.Context().Err())
		})}
		for range 5 {
			ctx, cancel := context.WithCancel(t.Context())
			time.AfterFunc(time.Second, cancel)
			_, err := tr.RoundTrip(breakerRequest(ctx))
			require.ErrorIs(t, err, context.Canceled)
		}
		st := breakerStats(t, tr)
		require.Equal(t, Closed, st.State)
		require.Equal(t, []uint64{5, 5, 0}, []uint64{st.Cancelled, st.Ignored, st.Failures})
		for range 2 {
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			_, err := tr.RoundTrip(breakerRequest(ctx))
			require.ErrorIs(t, err, context.DeadlineExceeded)
			cancel()
		}
		st = breakerStats(t, tr)
		require.Equal(t, Open, st.State)
		require.Equal(t, []uint64{2, 2}, []uint64{st.Failed, st.Failures})
		requireBreakerReconciles(t, st)
	})
}

// Nothing is sent and nothing counted against the service when the context has
// ended before.
func TestBreakerNothingSentNothingCounted(t *testing.T) {
	s := &breakerSwitch{}
	tr := &Transport{Base: s, Policy: Policy{Service: breakerHost}}
	for _, end := range []func() context.Context{
		func() context.Context {
			ctx, cancel := context.WithCancel(t.Context())
			cancel()
			return ctx
		},
		func() context.Context {
			ctx, cancel := context.WithDeadline(t.Context(), time.Now().Add(-time.Hour))
			cancel()
			return ctx
		},
	} {
		_, err := tr.RoundTrip(breakerRequest(end()))
		require.Error(t, err)
	}
	st := breakerStats(t, tr)
	require.Zero(t, s.calls.Load())
	require.Zero(t, st.ConsecutiveFailures)
	require.Equal(t, []uint64{2, 1, 1, 0}, []uint64{st.Requests, st.Cancelled, st.Failed, st.Attempts})
	requireBreakerReconciles(t, st)
}

func TestStateText(t *testing.T) {
	for state, text := range map[State]string{Closed: "CLOSED", Open: "OPEN", HalfOpen: "HALF_OPEN"} {
		require.Equal(t, text, state.String())
		var back State
		require.NoError(t, back.UnmarshalText([]byte(text)))
		require.Equal(t, state, back)
	}
	require.Equal(t, "State(7)", State(7).String())
	require.Equal(t, "State(-1)", State(-1).String())
	var s State
	require.ErrorContains(t, s.UnmarshalText([]byte("AJAR")), `"AJAR"`)
}
