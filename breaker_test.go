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
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/tripper-go/tripper/internal/tripptest"
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

// The state machine with its defaults: 5 failures, 60s, 2 successes.
func TestBreakerStateMachine(t *testing.T) {
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

// Calls go through the breaker.
func TestBreakerWrapsCalls(t *testing.T) {
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
		"a client error is a success, too many requests are passed over": func(t *testing.T, tr *Transport, s *breakerSwitch) {
			for range 4 {
				breakerDo(tr)
			}
			s.status.Store(429)
			for range 10 {
				require.NoError(t, breakerDo(tr))
			}
			st := breakerStats(t, tr)
			require.Equal(t, Closed, st.State)
			require.Equal(t, 4, st.ConsecutiveFailures, "a 429 neither counts nor resets")
			require.EqualValues(t, 10, st.Ignored)
			s.status.Store(404)
			require.NoError(t, breakerDo(tr))
			st = breakerStats(t, tr)
			require.Zero(t, st.ConsecutiveFailures, "a 404 comes from a live service")
			require.EqualValues(t, 1, st.Successes)
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

// The breaker that opens during a request's
// attempts ends its retries.
func TestBreakerEndsRetries(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &breakerSwitch{}
		p := Policy{Retry: RetryPolicy{MaxAttempts: 10, Jitter: JitterNone}, Breaker: BreakerPolicy{FailureThreshold: 3}}
		tr := &Transport{Base: s, Policy: p}
		start := time.Now()
		err := breakerDo(tr)
		require.EqualValues(t, 3, s.calls.Load())
		require.Equal(t, 3*time.Second, time.Since(start), "the waits before the attempts, and none after the last")
		require.ErrorIs(t, err, errBreakerDown)
		require.NotErrorIs(t, err, ErrRejected, "it was sent")
		var gaveUp *RetryError
		require.ErrorAs(t, err, &gaveUp)
		require.Equal(t, 3, gaveUp.Attempts)
		var open *OpenError
		require.ErrorAs(t, gaveUp.Stopped, &open)
		require.ErrorIs(t, open.Last, errBreakerDown)
		st := breakerStats(t, tr)
		require.Equal(t, []uint64{1, 1, 3, 2, 1}, []uint64{st.Requests, st.Failed, st.Attempts, st.Retries, st.Suppressed.Breaker})
		requireBreakerReconciles(t, st)
	})
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

// breakerHeld is a base that holds each call until it is told how to end.
var breakerHeld = breakerBase(func(req *http.Request) (*http.Response, error) {
	return req.Context().Value(breakerCallKey{}).(*breakerCall).serve(req)
})

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
		}
		code, asked, _ := strings.Cut(how, "/")
		status, _ := strconv.Atoi(code)
		resp := breakerAnswer(status)
		if asked != "" {
			resp.Header.Set("Retry-After", asked)
		}
		return resp, nil
	case <-req.Context().Done():
		return nil, req.Context().Err()
	}
}

// breakerBegin starts a call in a bubble. It is done at once if it is rejected.
func breakerBegin(tr *Transport) *breakerCall {
	c := &breakerCall{finish: make(chan string), end: make(chan error, 1)}
	c.ctx, c.cancel = context.WithCancel(context.WithValue(context.Background(), breakerCallKey{}, c))
	go func() {
		defer func() {
			if p := recover(); p != nil && p != "panic" {
				panic(p)
			}
			c.done = true
		}()
		c.resp, c.err = tr.RoundTrip(breakerRequest(c.ctx))
	}()
	synctest.Wait()
	return c
}

// endAs ends the call, which the base holds.
func (c *breakerCall) endAs(how string) {
	if how == "cancel" {
		c.cancel()
	} else {
		c.finish <- how
	}
	synctest.Wait()
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

// A breakerDriver takes the breaker of a Transport through steps, in a bubble.
type breakerDriver struct {
	t    *testing.T
	tr   *Transport
	held []*breakerCall
}

// do takes one step: "ok", "fail", "cancel" or what serve understands is a whole
// attempt, "begin" one that is held and "end-HOW" the end of the one held for
// longest; "x" must be rejected; "reset", "trip-30s".
func (d *breakerDriver) do(step string) {
	d.t.Helper()
	word, arg, _ := strings.Cut(step, "-")
	switch word {
	case "begin":
		d.held = append(d.held, d.begin(step))
	case "end":
		d.held[0].endAs(breakerHow(arg))
		require.True(d.t, d.held[0].done, step)
		d.held = d.held[1:]
	case "x":
		c := breakerBegin(d.tr)
		require.True(d.t, c.done && !c.reached, step)
		require.ErrorIs(d.t, c.err, ErrRejected, step)
	case "reset":
		require.True(d.t, d.tr.Reset(breakerHost))
	case "trip":
		wait, err := time.ParseDuration(arg)
		require.NoError(d.t, err)
		require.True(d.t, d.tr.Trip(breakerHost, wait, nil))
	default:
		c := d.begin(step)
		c.endAs(breakerHow(step))
		require.True(d.t, c.done, step)
	}
}

func (d *breakerDriver) begin(step string) *breakerCall {
	d.t.Helper()
	c := breakerBegin(d.tr)
	require.True(d.t, c.reached, step)
	return c
}

func breakerHow(word string) string {
	switch word {
	case "ok":
		return "200"
	case "fail":
		return "error"
	}
	return word
}

// A breakerStep waits, does what the words say and expects a state.
type breakerStep struct {
	after time.Duration
	do    string
	state State
}

type breakerSteps map[string]struct {
	policy BreakerPolicy
	steps  []breakerStep
}

func (tests breakerSteps) run(t *testing.T) {
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				d := &breakerDriver{t: t, tr: &Transport{Base: breakerHeld, Policy: breakerOnce(test.policy)}}
				defer func() {
					for _, c := range d.held {
						c.cancel()
					}
				}()
				for i, step := range test.steps {
					time.Sleep(step.after)
					for _, word := range strings.Fields(step.do) {
						d.do(word)
					}
					require.Equal(t, step.state, breakerStats(t, d.tr).State, "step %d: %+v", i, step)
				}
			})
		})
	}
}

func TestBreakerOpensAndRecovers(t *testing.T) {
	breakerSteps{
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
			{0, "503/300 fail", Open}, // only the failure that trips is asked
			{time.Minute, "503/300", Open},
			{5*time.Minute - 1, "x", Open},
			{1, "fail", Open},
			{time.Minute, "503/30", Open}, // never shorter than RecoveryTimeout
			{time.Minute - 1, "x", Open},
			{1, "503/3600", Open}, // ten minutes at most
			{10*time.Minute - 1, "x", Open},
			{1, "ok", HalfOpen},
		}},
		"a recovery longer than what servers may ask": {BreakerPolicy{FailureThreshold: 1, RecoveryTimeout: time.Hour}, []breakerStep{
			{0, "503/300", Open},
			{time.Hour - 1, "x", Open},
			{1, "ok", HalfOpen},
		}},
	}.run(t)
}

func TestBreakerSteps(t *testing.T) {
	breakerSteps{
		"ignored in closed": {BreakerPolicy{FailureThreshold: 2}, []breakerStep{
			{0, "fail 429 cancel 429", Closed},
			{0, "fail", Open}, // passed over
		}},
		"a client error ends the row": {BreakerPolicy{FailureThreshold: 2}, []breakerStep{
			{0, "fail 404 fail 401 fail", Closed},
			{0, "fail", Open},
		}},
		"ignored in half-open": {BreakerPolicy{FailureThreshold: 1}, []breakerStep{
			{0, "fail", Open},
			{time.Minute, "cancel 429 cancel 429 429", HalfOpen}, // gives its place back, shows nothing
			{0, "404 begin x", HalfOpen},                         // the service lives
			{0, "end-404", Closed},
		}},
		"late results of closed": {BreakerPolicy{FailureThreshold: 2}, []breakerStep{
			{0, "begin begin begin begin fail fail", Open},
			{0, "end-ok end-fail", Open},
			{time.Minute, "begin end-ok", HalfOpen}, // the third held is from before
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
		"a hung probe loses its place": {BreakerPolicy{FailureThreshold: 1, SuccessThreshold: 3}, []breakerStep{
			{0, "fail", Open},
			{time.Minute, "begin begin begin", HalfOpen},
			{time.Minute - 1, "x", HalfOpen},
			{1, "begin begin begin x", HalfOpen},
			{0, "end-ok end-ok end-ok", Closed}, // and no more than its place
		}},
		"a hung probe that fails": {BreakerPolicy{FailureThreshold: 1}, []breakerStep{
			{0, "fail", Open},
			{time.Minute, "begin begin", HalfOpen},
			{time.Hour, "ok", HalfOpen},
			{0, "end-fail x", Open},
		}},
		"the row goes by admission": {BreakerPolicy{FailureThreshold: 3}, []breakerStep{
			{0, "fail begin fail begin fail begin fail", Closed},
			{0, "end-ok end-ok end-ok", Closed},
			{0, "ok fail begin fail", Closed},
			{0, "end-ok fail", Closed}, // the success stood before these two
			{0, "fail", Open},
		}},
		"a late failure closes the gap": {BreakerPolicy{FailureThreshold: 3}, []breakerStep{
			{0, "fail begin fail", Closed},
			{0, "end-fail", Open},
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
	}.run(t)
}

// A slot of the window is a tenth of it: what is a whole Window old is
// forgotten, what is nine tenths old still counts.
func TestBreakerFailureRate(t *testing.T) {
	half := BreakerPolicy{FailureThreshold: 100, FailureRate: 0.5, Window: 10 * time.Second, MinRequests: 4}
	alone := half
	alone.FailureThreshold = -1
	breakerSteps{
		"rate":                 {half, []breakerStep{{0, "ok ok fail", Closed}, {0, "fail x", Open}}},
		"rate alone":           {alone, []breakerStep{{0, "ok ok ok ok fail fail fail", Closed}, {0, "fail x", Open}}},
		"below the rate":       {half, []breakerStep{{0, "ok ok ok fail fail ok fail ok", Closed}}},
		"too few requests":     {half, []breakerStep{{0, "fail fail fail", Closed}, {0, "fail", Open}}},
		"enough at a success":  {half, []breakerStep{{0, "fail fail fail", Closed}, {0, "ok", Open}}},
		"ignored do not count": {half, []breakerStep{{0, "fail 429 cancel 429 429 fail", Closed}}},
		"no failure, no trip":  {half, []breakerStep{{0, "ok ok ok ok ok ok", Closed}}},
		"under way": {half, []breakerStep{
			{0, "begin begin begin begin fail fail fail", Closed},
			{0, "fail", Open},
		}},
		"under way for longer than the window": {half, []breakerStep{
			{0, "begin begin begin begin", Closed},
			{10 * time.Second, "fail fail fail", Closed},
			{0, "fail", Open},
		}},
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
			{9*time.Second + 999*time.Millisecond, "fail", Open},
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
	}.run(t)
}

// What each step tells: who changed, when, why and until when.
func TestBreakerChanges(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		changes := &breakerChanges{}
		tr := &Transport{Base: breakerHeld, Policy: breakerOnce(BreakerPolicy{FailureThreshold: 2}), Observers: changes.observers()}
		d := &breakerDriver{t: t, tr: tr}
		at := func(after time.Duration, steps ...string) time.Time {
			time.Sleep(after)
			for _, s := range steps {
				d.do(s)
			}
			return time.Now()
		}
		opened := at(0, "fail", "503")
		probed := at(time.Minute, "ok")
		reopened := at(time.Second, "503/300")
		probedAgain := at(5*time.Minute, "ok")
		closed := at(time.Second, "ok")
		tripped := at(time.Second, "trip-30s")
		longer := at(time.Second, "trip-1m")
		probedLast := at(time.Minute, "ok")
		reset := at(time.Second, "reset")
		status := errors.New("503 Service Unavailable")
		want := []StateChange{
			{From: Closed, To: Open, At: opened, Failures: 2, Until: probed, Cause: status},
			{From: Open, To: HalfOpen, At: probed, Cause: status},
			{From: HalfOpen, To: Open, At: reopened, Failures: 2, Until: probedAgain, Asked: 5 * time.Minute, Cause: status},
			{From: Open, To: HalfOpen, At: probedAgain, Cause: status},
			{From: HalfOpen, To: Closed, At: closed},
			{From: Closed, To: Open, At: tripped, Until: tripped.Add(30 * time.Second), Cause: errTripped, Origin: OriginHand},
			{From: Open, To: Open, At: longer, Until: longer.Add(time.Minute), Cause: errTripped, Origin: OriginHand},
			{From: Open, To: HalfOpen, At: probedLast, Cause: errTripped},
			{From: HalfOpen, To: Closed, At: reset, Origin: OriginHand},
		}
		require.Len(t, changes.all, len(want))
		for i, got := range changes.all {
			w := want[i]
			assert.Equal(t, w.Origin == OriginAttempts, got.Context != nil, "change %d", i)
			if got.Context != nil {
				assert.NotNil(t, got.Context.Value(breakerCallKey{}), "change %d: the context of its request", i)
			}
			if w.Cause != nil && assert.Error(t, got.Cause, "change %d", i) {
				assert.Equal(t, w.Cause.Error(), got.Cause.Error(), "change %d", i)
				got.Cause = w.Cause
			}
			w.Service, got.Context = breakerHost, nil
			assert.Equal(t, w, got, "change %d", i)
		}
		st := breakerStats(t, tr)
		require.Equal(t, []uint64{8, 3, 3, 2}, []uint64{st.Transitions, st.Opened, st.HalfOpened, st.Closed})
		require.EqualValues(t, 1, st.Recoveries)
		require.Equal(t, closed.Sub(opened), st.RecoveryTime)
	})
}

// A late failure does not become the reason of what it has no part in.
func TestBreakerLateFailureIsNotTheCause(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		changes := &breakerChanges{}
		tr := &Transport{Base: breakerHeld, Policy: breakerOnce(BreakerPolicy{FailureThreshold: 1}), Observers: changes.observers()}
		d := &breakerDriver{t: t, tr: tr}
		for _, s := range []string{"begin", "503", "end-fail"} {
			d.do(s)
		}
		time.Sleep(time.Minute)
		d.do("ok")
		require.ErrorContains(t, changes.all[1].Cause, "503")
	})
}

func TestBreakerOff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, changes := &breakerSwitch{}, &breakerChanges{}
		tr := &Transport{Base: s, Policy: breakerOnce(BreakerPolicy{FailureThreshold: -1}), Observers: changes.observers()}
		for range 100 {
			require.ErrorIs(t, breakerDo(tr), errBreakerDown)
		}
		s.status.Store(200)
		require.NoError(t, breakerDo(tr))
		require.False(t, tr.Reset(breakerHost), "there is nothing to reset")
		st := breakerStats(t, tr)
		require.Equal(t, Closed, st.State)
		require.Equal(t, []uint64{101, 101, 100, 1}, []uint64{st.Requests, st.Attempts, st.Failures, st.Successes})
		// Stats tells of failures also where nothing acts on them.
		require.Equal(t, errBreakerDown.Error(), st.LastFailureCause)
		require.False(t, st.LastFailure.IsZero())

		// Tripped by hand, it rejects; then it closes without probes.
		require.True(t, tr.Trip(breakerHost, time.Hour, nil))
		require.ErrorIs(t, breakerDo(tr), ErrRejected)
		require.True(t, tr.Reset(breakerHost))
		require.NoError(t, breakerDo(tr))
		require.True(t, tr.Trip(breakerHost, time.Hour, nil))
		s.status.Store(0)
		time.Sleep(time.Hour)
		require.ErrorIs(t, breakerDo(tr), errBreakerDown)
		st = breakerStats(t, tr)
		require.Equal(t, Closed, st.State)
		requireBreakerReconciles(t, st)
		changes.requireInOrder(t, 4)
		require.Equal(t, OriginAttempts, changes.all[3].Origin)
		require.NoError(t, changes.all[3].Cause, "it closes")
	})
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
			resp := breakerAnswer(503)
			resp.Header.Set("Retry-After", asked)
			return resp, nil
		})
		tr := &Transport{Base: base, Policy: breakerOnce(BreakerPolicy{FailureThreshold: 1})}
		for _, c := range []struct {
			asked string
			open  time.Duration
		}{{"120", 2 * time.Minute}, {"5", time.Minute}, {"99999999999999999999", 10 * time.Minute}, {"1e30", time.Minute}, {"-7", time.Minute}, {"soon", time.Minute}} {
			asked = c.asked
			require.NoError(t, breakerDo(tr))
			require.Equal(t, c.open, time.Until(breakerStats(t, tr).OpenUntil), c.asked)
			tr.Reset(breakerHost)
		}
	})
}

// A model of the breaker, written to be obvious: it keeps every attempt of a
// generation and counts them anew each time.
type breakerModel struct {
	p        BreakerPolicy
	state    State
	era      int // attempts of earlier eras are late
	until    time.Time
	recovery time.Duration
	proven   bool             // a response has ended well since the last opening by attempts
	row      []*breakerFlight // of this era, in the order of their admission
	passed   int              // probes of this era
	left     time.Time        // when CLOSED was left

	recoveries uint64
	recovering time.Duration
	told       []breakerChange
	moves      uint64 // without those from OPEN to OPEN

	attempts, rejections, successes, failures, ignored, streamFailures uint64
}

type breakerChange struct{ from, to State }

// A breakerFlight is one attempt.
type breakerFlight struct {
	era          int
	probe        bool
	answered     bool // a probe whose body is still to end
	over         bool
	outcome      Outcome // once it is over
	began, ended time.Time
}

func newBreakerModel(p BreakerPolicy) *breakerModel {
	p = Policy{Breaker: p}.withDefaults().Breaker
	return &breakerModel{p: p, recovery: p.RecoveryTimeout, proven: true}
}

func (m *breakerModel) move(to State, now time.Time) {
	if m.state == Closed && to != Closed {
		m.left = now
	}
	if m.state != to || to == Open {
		m.told = append(m.told, breakerChange{m.state, to})
	}
	if m.state != to {
		m.moves++
	}
	m.state, m.row, m.passed = to, nil, 0
	m.era++
}

func (m *breakerModel) open(until, now time.Time) {
	m.until = until
	m.move(Open, now)
}

func (m *breakerModel) trip(until, now time.Time) {
	if m.state == Closed && m.proven { // what earlier recoveries have grown to is over
		m.recovery = m.p.RecoveryTimeout
	}
	m.open(until, now)
}

func (m *breakerModel) reset(now time.Time) {
	m.recovery, m.proven = m.p.RecoveryTimeout, true
	m.move(Closed, now)
}

// probing counts the probes of this era that hold a place.
func (m *breakerModel) probing(now time.Time) (n int) {
	for _, f := range m.row {
		if f.probe && !f.answered && !f.over && now.Sub(f.began) < m.p.RecoveryTimeout {
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
	if m.state == Open || m.state == HalfOpen && m.probing(now) >= m.p.SuccessThreshold-m.passed {
		m.rejections++
		return nil
	}
	m.attempts++
	return m.admit(now)
}

func (m *breakerModel) admit(now time.Time) *breakerFlight {
	f := &breakerFlight{era: m.era, probe: m.state == HalfOpen, began: now}
	m.row = append(m.row, f)
	return f
}

// answer is told of the headers of a stream. It returns the flight that its
// body is.
func (m *breakerModel) answer(f *breakerFlight, now time.Time) *breakerFlight {
	if !f.probe || f.era != m.era {
		return f
	}
	m.pass(now)
	if m.state == Closed {
		return m.admit(now)
	}
	f.answered = true
	return f
}

// pass is told of the success of a probe.
func (m *breakerModel) pass(now time.Time) {
	m.passed++
	if m.passed == m.p.SuccessThreshold {
		m.recoveries++
		m.recovering += now.Sub(m.left)
		m.move(Closed, now)
	}
}

func (m *breakerModel) end(f *breakerFlight, o Outcome, asked time.Duration, now time.Time) {
	switch o {
	case Success:
		m.successes++
	case Failure:
		m.failures++
	case Ignored:
		m.ignored++
	}
	if f.era != m.era {
		return
	}
	f.over, f.outcome, f.ended = true, o, now
	switch {
	case o == Success:
		m.proven = true
		switch {
		case f.probe && !f.answered:
			m.pass(now)
		case !f.probe && m.overRate(now): // there are enough requests now
			m.fail(0, now)
		}
	case o == Ignored:
		if !f.probe && m.p.FailureThreshold > 0 && m.rowOf(f) >= m.p.FailureThreshold { // it joins two rows
			m.fail(0, now)
		}
	case o == Failure && (f.probe || m.tooMany(f, now)):
		m.fail(asked, now)
	}
}

func (m *breakerModel) fail(asked time.Duration, now time.Time) {
	switch {
	case m.state == Closed && m.proven:
		m.recovery = m.p.RecoveryTimeout
	case m.p.MaxRecoveryTimeout > m.p.RecoveryTimeout:
		m.recovery = min(m.p.MaxRecoveryTimeout, 2*m.recovery)
	}
	m.proven = false
	m.open(now.Add(max(m.recovery, min(asked, 10*time.Minute))), now)
}

func (m *breakerModel) tooMany(f *breakerFlight, now time.Time) bool {
	return m.p.FailureThreshold > 0 && m.rowOf(f) >= m.p.FailureThreshold || m.overRate(now)
}

// rowOf counts the failures of the row that f belongs to.
func (m *breakerModel) rowOf(f *breakerFlight) int {
	i := slices.Index(m.row, f)
	inRow := m.failedBefore(i)
	if f.outcome == Failure {
		inRow++
	}
	for _, g := range m.row[i+1:] {
		if !g.over || g.outcome == Success {
			break
		}
		if g.outcome == Failure {
			inRow++
		}
	}
	return inRow
}

// failedBefore counts the row of failures that ends before the attempt i.
func (m *breakerModel) failedBefore(i int) (n int) {
	for i--; i >= 0 && m.row[i].over && m.row[i].outcome != Success; i-- {
		if m.row[i].outcome == Failure {
			n++
		}
	}
	return n
}

// overRate looks at what ended, or began and is under way, in this tenth of the
// Window and the nine before.
func (m *breakerModel) overRate(now time.Time) bool {
	if m.p.FailureRate == 0 {
		return false
	}
	tenth := func(at time.Time) int64 { return int64(at.Sub(m.row[0].began) / (m.p.Window / 10)) }
	total, failed := 0, 0
	for _, f := range m.row {
		last := f.began
		if f.over {
			last = f.ended
		}
		if tenth(last) <= tenth(now)-10 || f.over && f.outcome == Ignored {
			continue
		}
		total++
		if f.over && f.outcome == Failure {
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
		p.FailureThreshold = []int{8, -1}[r.IntN(2)]
		p.FailureRate = []float64{0.25, 0.5, 0.55, 1}[r.IntN(4)]
		p.Window = time.Duration(1+r.IntN(10)) * 10 * time.Second
		p.MinRequests = 1 + r.IntN(20)
	}
	return p
}

// The model against a whole Transport: attempts are held open in the base and
// end in any order and way. A few random numbers stay, one is new each time.
func TestBreakerModel(t *testing.T) {
	for _, random := range []uint64{1, 2, 3, 4, 5, 6, 7, 8, rand.Uint64N(1 << 32)} {
		t.Run(strconv.FormatUint(random, 10), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := rand.New(rand.NewPCG(random, 1))
				w := newBreakerWorld(t, randomBreakerPolicy(r))
				defer w.abandon()
				for i := range 4000 {
					step := w.step(r)
					if diff := w.diff(); diff != "" {
						t.Fatalf("%d, step %d, %s: %+v: %s", random, i, step, w.model.p, diff)
					}
				}
				w.land(r)
			})
		})
	}
}

// A breakerWorld has a Transport and the model of its one breaker.
type breakerWorld struct {
	t      *testing.T
	tr     *Transport
	model  *breakerModel
	calls  []*breakerCall
	told   *breakerChanges
	exists bool      // the service does
	start  time.Time // since when

	requests, ok, failed, cancelled uint64
}

func newBreakerWorld(t *testing.T, p BreakerPolicy) *breakerWorld {
	w := &breakerWorld{t: t, model: newBreakerModel(p), told: &breakerChanges{}}
	w.tr = &Transport{Policy: breakerOnce(p), Base: breakerHeld, Observers: w.told.observers()}
	return w
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
		if r.IntN(10) == 0 && w.model.state == HalfOpen { // probes lose their places
			d = w.model.p.RecoveryTimeout - time.Duration(r.IntN(2))
		}
		time.Sleep(d)
		return "wait " + d.String()
	case n < 98:
		require.Equal(w.t, w.exists, w.tr.Reset(breakerHost))
		if w.exists {
			w.model.reset(time.Now())
		}
		return "reset"
	default:
		d := time.Duration(1+r.IntN(90)) * time.Second
		require.True(w.t, w.tr.Trip(breakerHost, d, nil))
		w.exist()
		w.model.trip(time.Now().Add(d), time.Now())
		return "trip"
	}
}

func (w *breakerWorld) exist() {
	if !w.exists {
		w.exists, w.start = true, time.Now()
	}
}

func (w *breakerWorld) begin() {
	w.exist()
	w.requests++
	flight := w.model.begin(time.Now())
	c := breakerBegin(w.tr)
	require.Equal(w.t, flight != nil, c.reached, "admitted")
	require.Equal(w.t, flight == nil, c.done)
	if flight == nil {
		require.ErrorIs(w.t, c.err, ErrRejected)
		c.cancel()
		return
	}
	c.flight = flight
	w.calls = append(w.calls, c)
}

var breakerEndings = []string{"200", "200", "200", "404", "429", "503", "503/90", "error", "cancel", "panic", "goexit", "stream", "stream", "stream"}

// finish ends one call in the base, or one stream.
func (w *breakerWorld) finish(r *rand.Rand, i int) string {
	c := w.calls[i]
	if c.resp != nil {
		w.forget(i)
		return w.finishStream(r, c)
	}
	how := breakerEndings[r.IntN(len(breakerEndings))]
	c.endAs(how)
	require.True(w.t, c.done)
	o, asked := Ignored, time.Duration(0)
	switch how {
	case "200", "404", "stream":
		o = Success
		w.ok++
	case "503", "error", "503/90":
		o = Failure
		if how == "503/90" {
			asked = 90 * time.Second
		}
		w.failed++
	case "panic", "goexit", "429":
		w.failed++
	case "cancel":
		require.ErrorIs(w.t, c.err, context.Canceled)
		w.cancelled++
	}
	if how == "stream" {
		c.flight = w.model.answer(c.flight, time.Now())
		return how
	}
	w.model.end(c.flight, o, asked, time.Now())
	w.forget(i)
	c.cancel()
	return how
}

// finishStream lets a stream end well or badly, or be closed or cancelled.
func (w *breakerWorld) finishStream(r *rand.Rand, c *breakerCall) string {
	o, how := Success, []string{"EOF", "broken", "closed", "cancelled"}[r.IntN(4)]
	switch how {
	case "EOF":
		c.end <- io.EOF
	case "broken":
		c.end <- io.ErrUnexpectedEOF
		o = Failure
		w.model.streamFailures++
	case "cancelled":
		c.cancel()
		o = Ignored
	}
	if how != "closed" {
		_, err := c.resp.Body.Read(make([]byte, 1))
		require.Error(w.t, err)
	}
	c.resp.Body.Close()
	c.cancel()
	w.model.end(c.flight, o, 0, time.Now())
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
	got.TimeClosed, got.TimeOpen, got.TimeHalfOpen = 0, 0, 0
	got.Exhausted, got.BudgetTokens, got.Opened, got.HalfOpened, got.Closed = 0, 0, 0, 0, 0
	want := Stats{Service: breakerHost, State: m.state, HalfOpenSuccesses: m.passed,
		Requests: w.requests, OK: w.ok, Failed: w.failed, Rejected: m.rejections, Cancelled: w.cancelled,
		Attempts: m.attempts, Successes: m.successes, Failures: m.failures, Ignored: m.ignored, StreamFailures: m.streamFailures,
		Transitions: m.moves, Recoveries: m.recoveries, RecoveryTime: m.recovering}
	if m.state == Closed {
		want.ConsecutiveFailures = m.failedBefore(len(m.row))
	} else {
		want.OpenUntil = m.until
	}
	told := w.told.all
	switch {
	case got != want:
		return fmt.Sprintf("\ngot  %+v\nwant %+v", got, want)
	case len(told) != len(m.told) || len(told) > 0 && (breakerChange{told[len(told)-1].From, told[len(told)-1].To}) != m.told[len(told)-1]:
		return "the hook was told of other changes"
	case st.TimeClosed+st.TimeOpen+st.TimeHalfOpen != time.Since(w.start):
		return "more or less time in states than there was"
	case st.Opened+st.HalfOpened+st.Closed != st.Transitions:
		return "the transitions do not add up"
	}
	return ""
}

// land ends what is in flight: the sums are right.
func (w *breakerWorld) land(r *rand.Rand) {
	for len(w.calls) > 0 {
		step := w.finish(r, 0)
		require.Empty(w.t, w.diff(), step)
	}
	requireBreakerReconciles(w.t, breakerStats(w.t, w.tr))
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
	tr.Trip(breakerHost, 1, nil)
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
	tr := &Transport{Policy: policy, Base: base, Observers: changes.observers()}
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
				tr.Trip(breakerHost, 1, nil)
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

func (c *breakerChanges) observers() []*Observer { return breakerObserver(c.add) }

func breakerObserver(told func(StateChange)) []*Observer {
	return []*Observer{{StateChange: told}}
}

// requireInOrder expects these transitions, beside new ends of an opening.
func (c *breakerChanges) requireInOrder(t *testing.T, transitions uint64) {
	t.Helper()
	state, n := Closed, 0
	for i, change := range c.all {
		require.Equal(t, state, change.From, "change %d", i)
		if change.To != state || state != Open {
			require.NotEqual(t, state, change.To)
			n++
		}
		state = change.To
	}
	require.EqualValues(t, transitions, n)
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
		"deadline, and nothing has come": {read: true, failure: 1, streamFailures: 1, consecutive: 1, leave: func(ctx context.Context) (context.Context, context.CancelFunc) {
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

// A stream counts in its place among the attempts when it ends, and not before;
// one from before the breaker opened changes nothing.
func TestBreakerStreamCountsWhenItEnds(t *testing.T) {
	for _, end := range []error{io.EOF, io.ErrUnexpectedEOF} {
		status := 503
		tr := breakerStreaming(func(req *http.Request) *http.Response {
			if status != 200 {
				return breakerAnswer(status)
			}
			return breakerStreamOf(end)(req)
		})
		for range 2 {
			require.NoError(t, breakerDo(tr))
		}
		status = 200
		stream, err := tr.RoundTrip(breakerRequest(t.Context()))
		require.NoError(t, err)
		require.Zero(t, breakerStats(t, tr).ConsecutiveFailures)
		status = 503
		for range 2 {
			require.NoError(t, breakerDo(tr))
		}
		require.Equal(t, 2, breakerStats(t, tr).ConsecutiveFailures)
		_, err = stream.Body.Read(make([]byte, 1))
		require.Equal(t, end, err)
		want := Closed
		if end != io.EOF { // five in a row
			want = Open
		}
		require.Equal(t, want, breakerStats(t, tr).State)

		tr.Reset(breakerHost)
		status = 200
		late, err := tr.RoundTrip(breakerRequest(t.Context()))
		require.NoError(t, err)
		tr.Trip(breakerHost, time.Hour, nil)
		require.NoError(t, late.Body.Close())
		st := breakerStats(t, tr)
		require.Equal(t, Open, st.State)
		requireBreakerReconciles(t, st)
	}
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
// bodies end. (A 404 is an answer like others.)
func TestBreakerErrorPagesAreSettledAtTheirHeaders(t *testing.T) {
	for _, status := range []int{503, 429} {
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
		tr.Trip(breakerHost, time.Hour, nil)
		require.ErrorContains(t, breakerDo(tr), "tripped by hand")
		tr.Trip(breakerHost, time.Hour, errors.New("maintenance"))
		require.ErrorContains(t, breakerDo(tr), ": maintenance")
	})
}

func TestBreakerRejectsWithoutAllocating(t *testing.T) {
	tr := &Transport{Base: &breakerSwitch{}, Policy: Policy{Service: breakerHost}}
	req := breakerRequest(t.Context())
	require.True(t, tr.Trip(breakerHost, time.Hour, nil))
	var err error
	require.Zero(t, testing.AllocsPerRun(1000, func() { _, err = tr.RoundTrip(req) }))
	require.ErrorIs(t, err, ErrRejected)
}

// A rejected request's body is closed, and the base does not hear of it.
func TestBreakerRejectionClosesBody(t *testing.T) {
	s := &breakerSwitch{}
	policy := Policy{Service: breakerHost}
	tr := &Transport{Base: s, Policy: policy}
	tr.Trip(breakerHost, time.Hour, nil)
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
	tr = &Transport{Base: s, Policy: breakerOnce(BreakerPolicy{FailureThreshold: 1}), Observers: breakerObserver(func(c StateChange) {
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
			assert.True(t, tr.Trip(breakerHost, time.Hour, nil))
			assert.True(t, tr.Reset(breakerHost))
		case 4:
			assert.ErrorIs(t, breakerDo(tr), errBreakerDown) // opens once more
		}
		depth--
	})}
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
	}), Observers: breakerObserver(func(c StateChange) {
		assert.False(t, busy.Swap(true), "one at a time")
		runtime.Gosched()
		changes.add(c)
		busy.Store(false)
	})}
	var all sync.WaitGroup
	for i := range 16 {
		all.Go(func() {
			for j := range 200 {
				breakerDo(tr)
				if i == 0 && j%10 == 0 {
					tr.Trip(breakerHost, 1, nil)
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
					tr.Observers = breakerObserver(func(c StateChange) {
						changes.add(c)
						if c.To == at && deaths == 0 {
							deaths++
							die()
						}
					})
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
	tr.Trip(breakerHost, time.Second, nil)
	time.Sleep(time.Second)
	for range 2 {
		die()
		require.Equal(t, HalfOpen, breakerStats(t, tr).State)
	}
	for _, body := range bodies {
		require.EqualValues(t, 1, body.closed.Load(), "a request's body is closed once")
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

func TestBreakerObserves(t *testing.T) {
	for name, p := range map[string]BreakerPolicy{
		"row":  {FailureThreshold: 2, Observe: true},
		"rate": {FailureThreshold: -1, FailureRate: 0.5, MinRequests: 2, Observe: true},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s, changes := &breakerSwitch{}, &breakerChanges{}
				tr := &Transport{Base: s, Policy: breakerOnce(p), Observers: changes.observers()}
				for range 5 {
					require.Equal(t, errBreakerDown, breakerDo(tr))
				}
				require.Equal(t, Open, breakerStats(t, tr).State)
				s.status.Store(200)
				require.NoError(t, breakerDo(tr))
				require.Equal(t, Open, breakerStats(t, tr).State, "what is let through all the same shows nothing")
				time.Sleep(time.Minute)
				for range 2 {
					require.NoError(t, breakerDo(tr))
				}
				require.Equal(t, Closed, breakerStats(t, tr).State)

				require.True(t, tr.Trip(breakerHost, time.Hour, nil))
				require.NoError(t, breakerDo(tr))
				st := breakerStats(t, tr)
				require.Equal(t, Open, st.State)
				require.Equal(t, []uint64{9, 9, 0}, []uint64{st.Requests, st.Attempts, st.Rejected})
				requireBreakerReconciles(t, st)
				changes.requireInOrder(t, 4)
			})
		})
	}
}

// A retry goes through, too, and more probes than are needed.
func TestBreakerObservesAtHalfOpen(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		tr := &Transport{Base: breakerHeld, Policy: breakerOnce(BreakerPolicy{Observe: true})}
		tr.Trip(breakerHost, time.Second, nil)
		time.Sleep(time.Second)
		calls := []*breakerCall{}
		for range 5 {
			c := breakerBegin(tr)
			require.True(t, c.reached)
			calls = append(calls, c)
		}
		require.Equal(t, HalfOpen, breakerStats(t, tr).State)
		for i := range calls[:3] {
			calls[4-i].endAs("error") // these were no probes
			require.Equal(t, HalfOpen, breakerStats(t, tr).State)
		}
		calls[0].endAs("200")
		calls[1].endAs("200")
		st := breakerStats(t, tr)
		require.Equal(t, Closed, st.State)
		requireBreakerReconciles(t, st)

		s := &breakerSwitch{}
		p := Policy{Breaker: BreakerPolicy{FailureThreshold: 1, Observe: true}}
		tr = &Transport{Base: s, Policy: p}
		require.ErrorIs(t, breakerDo(tr), errBreakerDown)
		require.EqualValues(t, 3, s.calls.Load(), "the retries are made")
	})
}

// breakerHanging is a base that never answers.
var breakerHanging = breakerBase(func(req *http.Request) (*http.Response, error) {
	<-req.Context().Done()
	return nil, req.Context().Err()
})

func TestBreakerMinDeadline(t *testing.T) {
	tests := map[string]struct {
		policy   Policy
		deadline time.Duration
		opens    bool
		cause    string
	}{
		"5ms":                        {Policy{}, 5 * time.Millisecond, false, ""},
		"just below a second":        {Policy{}, time.Second - 1, false, ""},
		"a second":                   {Policy{}, time.Second, true, "deadline"},
		"of its own":                 {Policy{Breaker: BreakerPolicy{MinDeadline: 5 * time.Millisecond}}, 5 * time.Millisecond, true, "deadline"},
		"longer":                     {Policy{Breaker: BreakerPolicy{MinDeadline: time.Minute}}, time.Minute - 1, false, ""},
		"Timeout is shorter":         {Policy{Timeout: 2 * time.Millisecond}, 5 * time.Millisecond, true, "2ms"},
		"below a shorter Timeout":    {Policy{Timeout: 100 * time.Millisecond}, 99 * time.Millisecond, false, ""},
		"Timeout and its own":        {Policy{Timeout: time.Second, Breaker: BreakerPolicy{MinDeadline: 100 * time.Millisecond}}, 100 * time.Millisecond, true, "deadline"},
		"a slow call is one before":  {Policy{Breaker: BreakerPolicy{SlowCall: time.Millisecond}}, 5 * time.Millisecond, true, "slow call"},
		"no slow call yet":           {Policy{Breaker: BreakerPolicy{SlowCall: 5 * time.Millisecond}}, 5 * time.Millisecond, false, ""},
		"TotalTimeout is no service": {Policy{TotalTimeout: 5 * time.Millisecond}, time.Hour, false, ""},
		"TotalTimeout":               {Policy{TotalTimeout: 2 * time.Second}, time.Hour, true, ""},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				test.policy.Retry.MaxAttempts = 1
				tr := &Transport{Policy: test.policy, Base: breakerHanging}
				for range 5 {
					ctx, cancel := context.WithTimeout(t.Context(), test.deadline)
					_, err := tr.RoundTrip(breakerRequest(ctx))
					var timeout interface{ Timeout() bool }
					require.ErrorAs(t, err, &timeout)
					require.True(t, timeout.Timeout())
					cancel()
				}
				st := breakerStats(t, tr)
				requireBreakerReconciles(t, st)
				require.EqualValues(t, 5, st.Failed, "for the caller it has failed in any case")
				require.Equal(t, test.opens, st.State == Open)
				require.Contains(t, st.LastFailureCause, test.cause)
				if !test.opens {
					require.EqualValues(t, 5, st.Ignored)
				}
			})
		})
	}
}

// An http.Client's Timeout is a deadline like others, and so is what is left of
// one for a later attempt.
func TestBreakerMinDeadlineOfAClientAndOfARetry(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		tr := &Transport{Base: breakerHanging, Policy: breakerOnce(BreakerPolicy{FailureThreshold: 1})}
		client := &http.Client{Transport: tr, Timeout: 5 * time.Millisecond}
		_, err := client.Get("https://" + breakerHost)
		require.ErrorIs(t, err, context.DeadlineExceeded)
		require.EqualValues(t, 1, breakerStats(t, tr).Ignored)
		client.Timeout = time.Second
		_, err = client.Get("https://" + breakerHost)
		require.ErrorIs(t, err, context.DeadlineExceeded)
		require.Equal(t, Open, breakerStats(t, tr).State)

		p := Policy{Retry: RetryPolicy{Jitter: JitterNone}}
		tr = &Transport{Policy: p, Base: breakerBase(func(req *http.Request) (*http.Response, error) {
			if Attempt(req.Context()) == 1 {
				return breakerAnswer(503), nil
			}
			return breakerHanging(req)
		})}
		ctx, cancel := context.WithTimeout(t.Context(), 1500*time.Millisecond)
		defer cancel()
		_, err = tr.RoundTrip(breakerRequest(ctx))
		require.ErrorIs(t, err, context.DeadlineExceeded)
		st := breakerStats(t, tr)
		require.Equal(t, []uint64{2, 1, 1}, []uint64{st.Attempts, st.Failures, st.Ignored})
		requireBreakerReconciles(t, st)
	})
}

// A stream that its reader leaves by its own deadline says nothing when it has
// brought something, or had no time to.
func TestBreakerStreamLeftByItsDeadline(t *testing.T) {
	tests := map[string]struct {
		policy   Policy
		deadline time.Duration
		brings   bool
		ignored  bool
	}{
		"it has brought something":    {Policy{}, 10 * time.Second, true, true},
		"it has brought nothing":      {Policy{}, 10 * time.Second, false, false},
		"it had no time":              {Policy{}, 5 * time.Millisecond, false, true},
		"it had enough time for it":   {Policy{Breaker: BreakerPolicy{MinDeadline: time.Millisecond}}, 5 * time.Millisecond, false, false},
		"behind a Timeout":            {Policy{Timeout: time.Minute, Idle: time.Hour}, 10 * time.Second, true, true},
		"behind a Timeout, no time":   {Policy{Timeout: time.Minute, Idle: time.Hour}, 5 * time.Millisecond, false, true},
		"behind a Timeout, nothing":   {Policy{Timeout: time.Minute, Idle: time.Hour}, 10 * time.Second, false, false},
		"Idle is the service's fault": {Policy{Idle: time.Second}, 10 * time.Second, true, false},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				test.policy.Retry.MaxAttempts = 1
				tr := &Transport{Policy: test.policy, Base: breakerBase(func(req *http.Request) (*http.Response, error) {
					resp := breakerAnswer(200)
					resp.Body = &breakerStream{ctx: req.Context()}
					if test.brings {
						resp.Body = breakerBoth{io.MultiReader(strings.NewReader("tick"), resp.Body), resp.Body}
					}
					return resp, nil
				})}
				for range 6 {
					ctx, cancel := context.WithTimeout(t.Context(), test.deadline)
					resp, err := tr.RoundTrip(breakerRequest(ctx))
					if !test.ignored && errors.Is(err, ErrRejected) {
						cancel()
						continue
					}
					require.NoError(t, err)
					_, err = io.Copy(io.Discard, resp.Body)
					require.Error(t, err)
					resp.Body.Close()
					cancel()
				}
				st := breakerStats(t, tr)
				requireBreakerReconciles(t, st)
				require.Equal(t, test.ignored, st.State == Closed)
				require.Equal(t, test.ignored, st.Ignored == 6)
				require.Equal(t, test.ignored, st.StreamFailures == 0)
			})
		})
	}
}

type breakerBoth struct {
	io.Reader
	io.Closer
}

// An error event means what its status would, at the stream's beginning and
// later.
func TestBreakerErrorEvents(t *testing.T) {
	claude := func(kind string) string {
		return "event: error\ndata: {\"type\":\"error\",\"error\":{\"type\":\"" + kind + "\",\"message\":\"m\"}}\n\n"
	}
	openAI := func(kind, code string) string {
		return "data: {\"error\":{\"message\":\"m\",\"type\":\"" + kind + "\",\"param\":null,\"code\":" + code + "}}\n\n"
	}
	tests := map[string]struct {
		event   string
		outcome Outcome
	}{
		"invalid_request_error":        {claude("invalid_request_error"), Success},
		"authentication_error":         {claude("authentication_error"), Success},
		"not_found_error":              {claude("not_found_error"), Success},
		"request_too_large":            {claude("request_too_large"), Success},
		"rate_limit_error":             {claude("rate_limit_error"), Ignored},
		"api_error":                    {claude("api_error"), Failure},
		"timeout_error":                {claude("timeout_error"), Failure},
		"overloaded_error":             {claude("overloaded_error"), Failure},
		"OpenAI server_error":          {openAI("server_error", "null"), Failure},
		"OpenAI invalid_request_error": {openAI("invalid_request_error", "null"), Success},
		"OpenAI invalid_api_key":       {openAI("invalid_request_error", `"invalid_api_key"`), Success},
		"OpenAI rate_limit_exceeded":   {openAI("requests", `"rate_limit_exceeded"`), Ignored},
	}
	for name, test := range tests {
		for _, before := range []string{"", "event: message_start\ndata: {\"type\":\"message_start\"}\n\n"} {
			t.Run(fmt.Sprintf("%s/%d", name, len(before)), func(t *testing.T) {
				p := Claude()
				p.Service, p.Retry.MaxAttempts = breakerHost, 1
				tr := &Transport{Policy: p, Base: breakerBase(func(*http.Request) (*http.Response, error) {
					return tripptest.Answer(200, before+test.event, "Content-Type", "text/event-stream"), nil
				})}
				for range 5 {
					resp, err := tr.RoundTrip(breakerRequest(t.Context()))
					require.NoError(t, err)
					all, err := io.ReadAll(resp.Body)
					require.NoError(t, err)
					require.Equal(t, before+test.event, string(all))
					resp.Body.Close()
				}
				st := breakerStats(t, tr)
				requireBreakerReconciles(t, st)
				require.Equal(t, test.outcome == Failure, st.State == Open)
				want := map[Outcome]uint64{test.outcome: 5}
				require.Equal(t, []uint64{want[Success], want[Failure], want[Ignored]}, []uint64{st.Successes, st.Failures, st.Ignored})
			})
		}
	}
}

func TestBreakerTrip(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		changes, s := &breakerChanges{}, &breakerSwitch{}
		s.status.Store(200)
		tr := &Transport{Base: s, Policy: breakerOnce(BreakerPolicy{}), Observers: changes.observers(), Hosts: map[string]Policy{
			"shared.example.com": {Service: "shared"},
			"*.off.example.com":  breakerOnce(BreakerPolicy{FailureThreshold: -1, RecoveryTimeout: time.Second}),
		}}
		closedForInventory := errors.New("closed for inventory")
		require.False(t, tr.Reset(breakerHost), "nobody has seen it")
		require.True(t, tr.Trip(breakerHost, time.Hour, closedForInventory), "not seen yet")
		err := breakerDo(tr)
		var open *OpenError
		require.ErrorAs(t, err, &open)
		require.Equal(t, closedForInventory, open.Last)
		require.Zero(t, s.calls.Load())
		require.Equal(t, closedForInventory.Error(), changes.all[0].Cause.Error())

		require.True(t, tr.Trip(breakerHost, 2*time.Hour, nil))
		st := breakerStats(t, tr)
		require.True(t, st.OpenUntil.Equal(time.Now().Add(2*time.Hour)))
		require.Equal(t, []uint64{1, 1}, []uint64{st.Transitions, st.Opened}, "a new end is no transition")
		again := changes.all[1]
		require.Equal(t, []State{Open, Open}, []State{again.From, again.To})
		require.True(t, again.Until.Equal(st.OpenUntil))
		require.Equal(t, errTripped, again.Cause)
		require.Equal(t, OriginHand, again.Origin)

		require.True(t, tr.Trip("a.off.example.com", 0, nil), "not seen yet, and no breaker")
		st, ok := tr.Stats("a.off.example.com")
		require.True(t, ok)
		require.Equal(t, Open, st.State)
		require.True(t, st.OpenUntil.Equal(time.Now().Add(time.Second)), "0 means RecoveryTimeout")
		require.True(t, tr.Reset("a.off.example.com"))
		require.False(t, tr.Reset("a.off.example.com"), "it is closed, and has no breaker")
		require.Equal(t, OriginHand, changes.all[3].Origin)

		for _, name := range []string{"", "shared.example.com", "API.example.com", "no host", "https://a"} {
			require.False(t, tr.Trip(name, time.Hour, nil), name)
			_, ok := tr.Stats(name)
			require.False(t, ok, name)
		}
		require.True(t, tr.Trip("shared", time.Hour, nil), "the configuration names it")
		require.True(t, tr.Trip("localhost:8080", time.Hour, nil))

		tr = &Transport{Base: s, Service: func(*http.Request) string { return "model x" }}
		require.True(t, tr.Trip("model x", time.Hour, nil), "Transport.Service may name it")
		require.ErrorIs(t, breakerDo(tr), ErrRejected)
	})
}

// A service with no breaker that was tripped for a while closes by the first
// request after that, and tells so before the attempt.
func TestBreakerOffTellsThatItCloses(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		changes := &breakerChanges{}
		tr := &Transport{Policy: breakerOnce(BreakerPolicy{FailureThreshold: -1}), Observers: changes.observers(),
			Base: breakerBase(func(*http.Request) (*http.Response, error) {
				assert.Len(t, changes.all, 2)
				return breakerAnswer(200), nil
			})}
		require.True(t, tr.Trip(breakerHost, time.Second, nil))
		time.Sleep(time.Second)
		require.NoError(t, breakerDo(tr))
		changes.requireInOrder(t, 2)
		closed := changes.all[1]
		require.Equal(t, []State{Open, Closed}, []State{closed.From, closed.To})
		require.Equal(t, OriginAttempts, closed.Origin)
		require.NotNil(t, closed.Context)
		require.NoError(t, closed.Cause)
	})
}

// A service that is forgotten after an opening tells of its closing, and leaves
// its sums.
func TestBreakerForgottenTellsThatItCloses(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, changes := &breakerSwitch{}, &breakerChanges{}
		tr := &Transport{Base: s, Policy: breakerOnce(BreakerPolicy{}), Observers: changes.observers()}
		const longOpen = "long.example.com"
		require.True(t, tr.Trip(longOpen, 24*time.Hour, nil))
		breakerOpenByFailing(t, tr)
		s.status.Store(200)
		time.Sleep(time.Minute)
		request := func(i int) {
			req := breakerRequest(t.Context())
			req.URL.Host = fmt.Sprintf("h%d.example.com", i)
			_, err := tr.RoundTrip(req)
			require.NoError(t, err)
		}
		for i := range 5000 {
			request(i)
		}
		_, ok := tr.Stats(breakerHost)
		require.False(t, ok, "it is forgotten")
		st, ok := tr.Stats(longOpen)
		require.True(t, ok, "an opening that is not over is kept")
		require.Equal(t, Open, st.State)
		require.Len(t, changes.all, 3)
		last := changes.all[2]
		require.True(t, last.At.Equal(time.Now()))
		last.At = time.Time{}
		require.Equal(t, StateChange{Service: breakerHost, From: Open, To: Closed, Origin: OriginForgotten}, last)
		gone := tr.Forgotten()
		require.EqualValues(t, 5, gone.Failures)
		require.Equal(t, []uint64{1, 0, 1, 2}, []uint64{gone.Opened, gone.HalfOpened, gone.Closed, gone.Transitions})
		total := gone.Requests
		for st := range tr.All() {
			total += st.Requests
		}
		require.EqualValues(t, 5005, total)
	})
}

// What counts of a probe's stream is its answer. When it breaks off before the
// service has shown that it can end one, the breaker opens for longer.
func TestBreakerProbeWhoseStreamBreaksOff(t *testing.T) {
	for _, threshold := range []int{1, 2} {
		t.Run(strconv.Itoa(threshold), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				p := BreakerPolicy{FailureThreshold: 1, SuccessThreshold: threshold, MaxRecoveryTimeout: time.Hour}
				tr := &Transport{Base: breakerHeld, Policy: breakerOnce(p)}
				d := &breakerDriver{t: t, tr: tr}
				stream := func(end error) {
					c := d.begin("stream")
					c.endAs("stream")
					c.end <- end
					_, err := c.resp.Body.Read(make([]byte, 1))
					require.Equal(t, end, err)
					require.NoError(t, c.resp.Body.Close())
				}
				d.do("fail")
				for i, wait := range []time.Duration{time.Minute, 2 * time.Minute, 4 * time.Minute, 8 * time.Minute} {
					require.Equal(t, wait, time.Until(breakerStats(t, tr).OpenUntil), "opening %d", i)
					time.Sleep(wait)
					stream(io.ErrUnexpectedEOF)
					require.Equal(t, Open, breakerStats(t, tr).State)
				}
				time.Sleep(16 * time.Minute)
				for range threshold {
					stream(io.EOF)
				}
				require.Equal(t, Closed, breakerStats(t, tr).State)
				d.do("fail")
				st := breakerStats(t, tr)
				require.Equal(t, time.Minute, time.Until(st.OpenUntil), "it starts over")
				require.EqualValues(t, 4, st.StreamFailures)
				requireBreakerReconciles(t, st)
			})
		})
	}
}

// Recoveries by streams none of which ends well are none: the time until the
// next grows, also when the breaker has closed between.
func TestBreakerRecoveriesWithoutAWholeAnswer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := BreakerPolicy{FailureThreshold: 2, MaxRecoveryTimeout: 3 * time.Minute}
		tr := &Transport{Base: breakerHeld, Policy: breakerOnce(p)}
		d := &breakerDriver{t: t, tr: tr}
		d.do("fail")
		d.do("fail")
		for _, wait := range []time.Duration{time.Minute, 2 * time.Minute, 3 * time.Minute, 3 * time.Minute} {
			require.Equal(t, wait, time.Until(breakerStats(t, tr).OpenUntil))
			time.Sleep(wait)
			probes := []*breakerCall{d.begin("1"), d.begin("2")}
			for _, c := range probes {
				c.endAs("stream")
			}
			require.Equal(t, Closed, breakerStats(t, tr).State, "their answers count")
			more := d.begin("3")
			more.endAs("stream")
			for _, c := range append(probes, more) {
				c.end <- io.ErrUnexpectedEOF
				_, err := c.resp.Body.Read(make([]byte, 1))
				require.Error(t, err)
				c.resp.Body.Close()
			}
			require.Equal(t, Open, breakerStats(t, tr).State)
		}
		requireBreakerReconciles(t, breakerStats(t, tr))
	})
}

// A body of a round of probes that is over changes nothing.
func TestBreakerLateBodyOfAProbe(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		tr := &Transport{Base: breakerHeld, Policy: breakerOnce(BreakerPolicy{FailureThreshold: 1})}
		d := &breakerDriver{t: t, tr: tr}
		d.do("fail")
		time.Sleep(time.Minute)
		probe := d.begin("probe")
		probe.endAs("stream")
		require.Equal(t, 1, breakerStats(t, tr).HalfOpenSuccesses)
		d.do("ok")
		require.Equal(t, Closed, breakerStats(t, tr).State)
		probe.end <- io.ErrUnexpectedEOF
		_, err := probe.resp.Body.Read(make([]byte, 1))
		require.Error(t, err)
		st := breakerStats(t, tr)
		require.Equal(t, Closed, st.State)
		require.EqualValues(t, 1, st.StreamFailures)
		requireBreakerReconciles(t, st)
	})
}

func TestBreakerTextForms(t *testing.T) {
	var o Outcome
	require.NoError(t, o.UnmarshalText([]byte("FAILURE")))
	require.Equal(t, Failure, o)
	require.ErrorContains(t, o.UnmarshalText([]byte("maybe")), `"maybe"`)
	var g Origin
	for origin, text := range map[Origin]string{OriginAttempts: "attempts", OriginHand: "hand", OriginFleet: "fleet", OriginForgotten: "forgotten"} {
		require.Equal(t, text, origin.String())
		require.NoError(t, g.UnmarshalText([]byte(text)))
		require.Equal(t, origin, g)
	}
	var s State
	require.NoError(t, s.UnmarshalText([]byte("half_open")))
	require.Equal(t, HalfOpen, s)
}

// An Observer that panics at a service's end spoils the request that made room,
// and no sums.
func TestBreakerForgottenInSpiteOfAPanic(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, told := &breakerSwitch{}, 0
		tr := &Transport{Base: s, Policy: breakerOnce(BreakerPolicy{}), Observers: breakerObserver(func(c StateChange) {
			if c.Origin == OriginForgotten {
				told++
				panic("observer")
			}
		})}
		breakerOpenByFailing(t, tr)
		s.status.Store(200)
		time.Sleep(time.Minute)
		panics := 0
		for i := range 5000 {
			req := breakerRequest(t.Context())
			req.URL.Host = fmt.Sprintf("h%d.example.com", i)
			if breakerPanics(func() { _, _ = tr.RoundTrip(req) }) {
				panics++
			}
		}
		require.Equal(t, []int{1, 1}, []int{told, panics})
		total := tr.Forgotten()
		require.EqualValues(t, 5, total.Failures)
		for st := range tr.All() {
			total = total.plus(st)
		}
		require.EqualValues(t, 5004, total.Requests, "one has made no request")
		requireBreakerReconciles(t, total)
	})
}
