package integration

import (
	"context"
	"errors"
	"maps"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/anthropics/anthropic-sdk-go"
	"github.com/openai/openai-go/v3"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/tripper-go/tripper"
)

// patience is how long a test waits for what should come at once.
func patience() <-chan time.Time { return time.After(20 * time.Second) }

// A stack is a client over tripper over a service.
type stack struct {
	*tripper.Transport
	http    *http.Client
	service *service
	retries *retries
}

// retries are the events of an Observer.
type retries struct {
	mu     sync.Mutex
	events []tripper.RetryEvent
}

func (r *retries) add(e tripper.RetryEvent) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.events = append(r.events, e)
}

func (r *retries) all() []tripper.RetryEvent {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.events)
}

// newStack puts c over s with three attempts and waits of no consequence.
func newStack(c client, s *service, change ...func(*tripper.Transport)) *stack {
	st := &stack{service: s, retries: &retries{}}
	st.Transport = &tripper.Transport{
		Base: c.below.around(s.base()),
		Policy: tripper.Policy{
			Service: "api",
			Retry:   tripper.RetryPolicy{MaxAttempts: 3, MinWait: time.Millisecond, MaxWait: 2 * time.Millisecond, Replay: tripper.ReplayAny},
		},
		Observers: []*tripper.Observer{{Retry: st.retries.add}},
	}
	if c.layer != nil {
		st.Layers = []tripper.Layer{tripper.Layer(c.layer)}
	}
	for _, f := range change {
		f(st.Transport)
	}
	st.http = &http.Client{Transport: c.above.around(st.Transport)}
	return st
}

func (w wrapper) around(rt http.RoundTripper) http.RoundTripper {
	if w == nil {
		return rt
	}
	return w(rt)
}

// call makes one call of c.
func (st *stack) call(t *testing.T, c client) (string, error) {
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	return c.call(ctx, st.service.URL, st.http)
}

// requireWire checks how many requests came over the wire, and that they are
// what tripper says it sent.
func (st *stack) requireWire(t *testing.T, n int) []received {
	t.Helper()
	wire := st.service.wire()
	require.Len(t, wire, n, "requests on the wire")
	stats, ok := st.Stats("api")
	require.True(t, ok)
	require.EqualValues(t, n, stats.Attempts, "attempts: %+v", stats)
	assert.Equal(t, stats.Requests, stats.OK+stats.Failed+stats.Rejected+stats.Cancelled, "%+v", stats)
	assert.Equal(t, stats.Attempts, stats.Successes+stats.Failures+stats.Ignored, "%+v", stats)
	return wire
}

func requireSame(t *testing.T, wire []received) {
	t.Helper()
	for i := range wire {
		require.Equal(t, wire[0].Method, wire[i].Method)
		require.Equal(t, wire[0].Path, wire[i].Path)
		require.Equal(t, wire[0].Length, wire[i].Length)
		require.Equal(t, wire[0].Body, wire[i].Body)
	}
}

// changing are the headers that differ from one call to the next.
var changing = []string{"Amz-Sdk-Invocation-Id", "X-Amz-Date", "Authorization", "Idempotency-Key", "Sec-Websocket-Key",
	"Traceparent", "X-Stripe-Client-Telemetry"}

func TestServiceSeesTheBareRequest(t *testing.T) {
	each(t, every, func(t *testing.T, c client) {
		s := play(t, c.healthy)
		st := newStack(c, s)
		bare := *st
		bare.http = &http.Client{Transport: c.above.around(c.layer.around(c.below.around(s.base())))}
		want, err := bare.call(t, c)
		require.NoError(t, err)

		got, err := st.call(t, c)
		require.NoError(t, err)
		require.Equal(t, want, got)

		wire := s.wire()
		require.Len(t, wire, 2)
		requireSame(t, wire)
		require.Equal(t, slices.Sorted(maps.Keys(wire[0].Header)), slices.Sorted(maps.Keys(wire[1].Header)))
		for _, name := range changing {
			wire[0].Header.Del(name)
			wire[1].Header.Del(name)
		}
		require.Equal(t, wire[0].Header, wire[1].Header)
	})
}

func TestOneRequestIsEnough(t *testing.T) {
	each(t, every, func(t *testing.T, c client) {
		st := newStack(c, play(t, c.healthy))
		got, err := st.call(t, c)
		require.NoError(t, err)
		require.Equal(t, "hello", got)
		st.requireWire(t, 1)
		require.Empty(t, st.retries.all())
	})
}

func TestRecovers(t *testing.T) {
	faults := map[string]func(client) []step{
		"from a reset": func(client) []step { return []step{reset} },
		"from a 503":   func(c client) []step { return []step{c.fault(http.StatusServiceUnavailable)} },
		"from a 529":   func(c client) []step { return []step{c.fault(529)} },
		"from both":    func(c client) []step { return []step{reset, c.fault(http.StatusServiceUnavailable)} },
	}
	t.Parallel()
	for name, fault := range faults {
		t.Run(name, func(t *testing.T) {
			each(t, every, func(t *testing.T, c client) {
				steps := fault(c)
				st := newStack(c, play(t, append(steps, c.healthy)...))
				got, err := st.call(t, c)
				require.NoError(t, err)
				require.Equal(t, "hello", got)
				requireSame(t, st.requireWire(t, len(steps)+1))
				stats, _ := st.Stats("api")
				require.EqualValues(t, 1, stats.Recovered)
			})
		})
	}
}

func TestWaitsAsA429Asks(t *testing.T) {
	each(t, every, func(t *testing.T, c client) {
		// The more precise header counts.
		limited := c.fault(http.StatusTooManyRequests, "Retry-After-Ms", "25", "Retry-After", "1")
		fraction := c.fault(http.StatusTooManyRequests, "Retry-After", "0.015")
		st := newStack(c, play(t, limited, fraction, c.healthy))
		got, err := st.call(t, c)
		require.NoError(t, err)
		require.Equal(t, "hello", got)
		requireSame(t, st.requireWire(t, 3))

		waits := st.retries.all()
		require.Len(t, waits, 2)
		require.Equal(t, 25*time.Millisecond, waits[0].Wait)
		require.Equal(t, 15*time.Millisecond, waits[1].Wait)
	})
}

func TestLastAnswerReachesTheCaller(t *testing.T) {
	t.Parallel()
	for _, status := range []int{http.StatusServiceUnavailable, http.StatusTooManyRequests, http.StatusInternalServerError} {
		t.Run(strconv.Itoa(status), func(t *testing.T) {
			each(t, every, func(t *testing.T, c client) {
				st := newStack(c, play(t, c.fault(status, "Retry-After-Ms", "1", "Retry-After", "1")))
				_, err := st.call(t, c)
				c.requireAnswer(t, err, status)
				requireSame(t, st.requireWire(t, 3))
				stats, _ := st.Stats("api")
				require.EqualValues(t, 1, stats.Exhausted)
			})
		})
	}
}

func TestNoRetryForOtherErrors(t *testing.T) {
	each(t, every, func(t *testing.T, c client) {
		st := newStack(c, play(t, c.fault(http.StatusBadRequest)))
		_, err := st.call(t, c)
		c.requireAnswer(t, err, http.StatusBadRequest)
		st.requireWire(t, 1)
	})
}

func TestAWaitThatIsTooLongIsLeftToTheCaller(t *testing.T) {
	each(t, every, func(t *testing.T, c client) {
		st := newStack(c, play(t, c.fault(http.StatusTooManyRequests, "Retry-After", "3600")))
		_, err := st.call(t, c)
		c.requireAnswer(t, err, http.StatusTooManyRequests)
		st.requireWire(t, 1)
		stats, _ := st.Stats("api")
		require.EqualValues(t, 1, stats.Suppressed.RetryAfter)
	})
}

func TestLastErrorReachesTheCaller(t *testing.T) {
	each(t, others, func(t *testing.T, c client) {
		st := newStack(c, play(t, reset))
		_, err := st.call(t, c)
		failed, ok := errors.AsType[*tripper.RetryError](err)
		require.True(t, ok, "%T: %v", err, err)
		require.Equal(t, 3, failed.Attempts)
		require.ErrorIs(t, err, syscall.ECONNRESET)
		requireSame(t, st.requireWire(t, 3))
	})
}

func TestTimeoutOfEveryAttempt(t *testing.T) {
	each(t, others, func(t *testing.T, c client) {
		h := newHang()
		st := newStack(c, play(t, h.step), attemptTimeout)
		_, err := st.call(t, c)
		timeout, ok := errors.AsType[interface {
			error
			Timeout() bool
		}](err)
		require.True(t, ok && timeout.Timeout(), "%T: %v", err, err)
		st.requireWire(t, 3)
		for range 3 {
			receive(t, h.left, "the client to leave")
		}
	})
}

func attemptTimeout(tr *tripper.Transport) { tr.Policy.Timeout = 50 * time.Millisecond }

func opensAfterOneCall(tr *tripper.Transport) { tr.Policy.Breaker.FailureThreshold = 3 }

func TestOpenBreaker(t *testing.T) {
	each(t, others, func(t *testing.T, c client) {
		st := newStack(c, play(t, c.fault(http.StatusServiceUnavailable)), opensAfterOneCall)
		_, err := st.call(t, c)
		c.requireAnswer(t, err, http.StatusServiceUnavailable)

		_, err = st.call(t, c)
		open, ok := errors.AsType[*tripper.OpenError](err)
		require.True(t, ok, "%T: %v", err, err)
		require.ErrorIs(t, err, tripper.ErrRejected)
		require.Equal(t, "api", open.Service)
		require.ErrorContains(t, open.Last, "503")
		require.Contains(t, err.Error(), "circuit breaker open for api")
		st.requireWire(t, 3)
	})
}

// The breaker opens during the attempts of a call: that ends them, and the caller
// gets the answer in hand.
func TestBreakerThatOpensEndsTheRetries(t *testing.T) {
	each(t, others, func(t *testing.T, c client) {
		st := newStack(c, play(t, c.fault(http.StatusServiceUnavailable)), func(tr *tripper.Transport) {
			tr.Policy.Breaker.FailureThreshold = 2
		})
		_, err := st.call(t, c)
		c.requireAnswer(t, err, http.StatusServiceUnavailable)
		st.requireWire(t, 2)
		stats, _ := st.Stats("api")
		require.EqualValues(t, 1, stats.Suppressed.Breaker)
	})
}

func TestCancelInMidFlight(t *testing.T) {
	each(t, every, func(t *testing.T, c client) {
		h := newHang()
		st := newStack(c, play(t, h.step))
		ctx, cancel := context.WithCancel(t.Context())
		go func() {
			<-h.arrived
			cancel()
		}()
		_, err := c.call(ctx, st.service.URL, st.http)
		require.ErrorIs(t, err, context.Canceled)
		receive(t, h.left, "the client to leave")
		st.requireWire(t, 1)
		stats, _ := st.Stats("api")
		require.EqualValues(t, 1, stats.Cancelled)
		require.EqualValues(t, 1, stats.Ignored, "the service is not to blame")
	})
}

func TestCancelDuringTheWait(t *testing.T) {
	each(t, every, func(t *testing.T, c client) {
		ctx, cancel := context.WithCancel(t.Context())
		st := newStack(c, play(t, c.fault(http.StatusServiceUnavailable, "Retry-After", "59"), c.healthy), func(tr *tripper.Transport) {
			tr.Observers = []*tripper.Observer{{Retry: func(tripper.RetryEvent) { cancel() }}}
		})
		_, err := c.call(ctx, st.service.URL, st.http)
		require.ErrorIs(t, err, context.Canceled)
		st.requireWire(t, 1)
	})
}

// The SDKs made by Stainless retry whatever is an error. What tripper has given
// up therefore comes to them as a response that they take for the last word.

func TestStainlessGetsTheLastErrorAsAnAnswer(t *testing.T) {
	each(t, stainless, func(t *testing.T, c client) {
		st := newStack(c, play(t, reset))
		_, err := st.call(t, c)
		st.requireWire(t, 3)
		c.requireSynthesized(t, err, http.StatusServiceUnavailable, "connection reset")
	})
}

func TestStainlessGetsTheLastTimeoutAsAnAnswer(t *testing.T) {
	each(t, stainless, func(t *testing.T, c client) {
		h := newHang()
		st := newStack(c, play(t, h.step), attemptTimeout)
		_, err := st.call(t, c)
		st.requireWire(t, 3)
		c.requireSynthesized(t, err, http.StatusGatewayTimeout, "no response headers")
	})
}

func TestStainlessGetsTheOpenBreakerAsAnAnswer(t *testing.T) {
	each(t, stainless, func(t *testing.T, c client) {
		st := newStack(c, play(t, c.fault(http.StatusServiceUnavailable)), opensAfterOneCall)
		_, err := st.call(t, c)
		c.requireAnswer(t, err, http.StatusServiceUnavailable)

		_, err = st.call(t, c)
		st.requireWire(t, 3)
		header := c.requireSynthesized(t, err, http.StatusServiceUnavailable, "circuit breaker open for api")
		wait, ok := tripper.RetryAfter(header, time.Now())
		require.True(t, ok)
		require.InDelta(t, time.Minute, wait, float64(20*time.Second), "until the breaker may close")
		stats, _ := st.Stats("api")
		require.EqualValues(t, 1, stats.Rejected, "the SDK came once")
	})
}

func TestStainlessGetsTheAnswerInHandWhenTheBreakerOpens(t *testing.T) {
	each(t, stainless, func(t *testing.T, c client) {
		st := newStack(c, play(t, c.fault(http.StatusServiceUnavailable)), func(tr *tripper.Transport) {
			tr.Policy.Breaker.FailureThreshold = 2
		})
		_, err := st.call(t, c)
		st.requireWire(t, 2)
		c.requireAnswer(t, err, http.StatusServiceUnavailable)
		require.Equal(t, "false", answerOf(err).Header.Get("X-Should-Retry"))
	})
}

// requireSynthesized checks that err is the SDK's own error for an answer of
// tripper's, and returns the headers of that answer.
func (c client) requireSynthesized(t *testing.T, err error, status int, message string) http.Header {
	t.Helper()
	got, body, ok := c.inspect(err)
	require.True(t, ok, "not the SDK's own error: %T: %v", err, err)
	require.Equal(t, status, got)
	require.Contains(t, body, map[int]string{http.StatusServiceUnavailable: "api_error", http.StatusGatewayTimeout: "timeout_error"}[status])
	require.Contains(t, body, message)
	header := answerOf(err).Header
	require.Equal(t, "false", header.Get("X-Should-Retry"))
	require.True(t, strings.HasPrefix(header.Get("Content-Type"), "application/json"), header)
	return header
}

// answerOf returns the response that an SDK's own error is about.
func answerOf(err error) *http.Response {
	if e, ok := errors.AsType[*anthropic.Error](err); ok {
		return e.Response
	}
	if e, ok := errors.AsType[*openai.Error](err); ok {
		return e.Response
	}
	return nil
}
