package tripper

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/tripper-go/tripper/internal/tripptest"
)

// quick is a policy whose retries do not wait.
func quick() Policy {
	return Policy{Retry: RetryPolicy{MinWait: time.Millisecond, MaxWait: time.Millisecond}}
}

func get(tr *Transport) (*http.Response, error) {
	req, _ := http.NewRequest(http.MethodGet, "https://api.example.com/v1", nil)
	return tr.RoundTrip(req)
}

func statsOf(t *testing.T, tr *Transport, name string) Stats {
	t.Helper()
	st, ok := tr.Stats(name)
	require.True(t, ok, name)
	require.Equal(t, st.Requests, st.OK+st.Failed+st.Rejected+st.Cancelled, "requests: %+v", st)
	require.Equal(t, st.Attempts, st.Successes+st.Failures+st.Ignored, "attempts: %+v", st)
	return st
}

const testHost = "api.example.com"

func TestTooManyRequestsDoNotOpenTheBreaker(t *testing.T) {
	for _, callers := range []int{1, 5, 20, 100} {
		synctest.Test(t, func(t *testing.T) {
			var mu sync.Mutex
			told := make(map[string]bool)
			base := tripptest.Func(func(req *http.Request) (*http.Response, error) {
				mu.Lock()
				defer mu.Unlock()
				if id := req.Header.Get("Caller"); !told[id] {
					told[id] = true
					return tripptest.Answer(429, "slow down", "Retry-After", "1"), nil
				}
				return tripptest.Answer(200, "fine"), nil
			})
			tr := &Transport{Base: base, Policy: Policy{Retry: RetryPolicy{Budget: Budget{Ratio: -1}}}}
			var wg sync.WaitGroup
			for i := range callers {
				wg.Go(func() {
					req := tripptest.Request(t, context.Background(), http.MethodPost, "x")
					req.Header.Set("Caller", fmt.Sprint(i))
					resp, err := tr.RoundTrip(req)
					if assert.NoError(t, err) {
						assert.Equal(t, 200, resp.StatusCode)
						resp.Body.Close()
					}
				})
			}
			wg.Wait()
			st := statsOf(t, tr, testHost)
			assert.Equal(t, Closed, st.State)
			assert.Zero(t, st.Transitions)
			assert.EqualValues(t, callers, st.Ignored)
			assert.EqualValues(t, callers, st.OK)
		})
	}
}

func TestTheAnswerInHandGoesToTheCaller(t *testing.T) {
	policy := quick()
	policy.Breaker.FailureThreshold = 1
	base := tripptest.Script(tripptest.Answer(500, "the reason"))
	tr := &Transport{Base: base, Policy: policy}
	resp, err := get(tr)
	require.NoError(t, err)
	body, err := io.ReadAll(resp.Body)
	require.NoError(t, err)
	assert.Equal(t, "the reason", string(body))
	assert.Equal(t, 1, base.Sent())
	st := statsOf(t, tr, testHost)
	assert.Equal(t, Open, st.State)
	assert.EqualValues(t, 1, st.Suppressed.Breaker)
	assert.EqualValues(t, 1, st.Failed)

	_, err = get(tr)
	require.ErrorIs(t, err, ErrRejected)
	assert.EqualValues(t, 1, statsOf(t, tr, testHost).Rejected)
}

func TestAnErrorInHandSaysWhatStoppedTheRetries(t *testing.T) {
	policy := quick()
	policy.Breaker.FailureThreshold = 1
	down := errors.New("the service is down")
	tr := &Transport{Base: tripptest.Script(down), Policy: policy}
	_, err := get(tr)
	var final *RetryError
	require.ErrorAs(t, err, &final)
	assert.Equal(t, 1, final.Attempts)
	assert.ErrorIs(t, err, down)
	assert.NotErrorIs(t, err, ErrRejected)
	var open *OpenError
	require.ErrorAs(t, final.Stopped, &open)
}

func TestTheAnswerStaysInHandWhenTheRetryIsRejected(t *testing.T) {
	refuse := errors.New("no room")
	layer := func(next http.RoundTripper) http.RoundTripper {
		return tripptest.Func(func(req *http.Request) (*http.Response, error) {
			if Attempt(req.Context()) > 1 {
				return nil, fmt.Errorf("%w: %w", ErrRejected, refuse)
			}
			return next.RoundTrip(req)
		})
	}
	base := tripptest.Script(tripptest.Answer(503, "busy"))
	tr := &Transport{Base: base, Policy: quick(), Layers: []Layer{layer}}
	resp, err := get(tr)
	require.NoError(t, err)
	body, _ := io.ReadAll(resp.Body)
	assert.Equal(t, "busy", string(body))
	assert.Equal(t, 503, resp.StatusCode)
	st := statsOf(t, tr, testHost)
	assert.EqualValues(t, 1, st.Failed)
	assert.Zero(t, st.Rejected)
	assert.Zero(t, st.Retries)
}

func TestWithRetryStartsFromTheHostsPolicy(t *testing.T) {
	policy := quick()
	policy.Retry.IdempotencyKey = true
	base := tripptest.Script(500)
	tr := &Transport{Base: tripptest.Func(func(req *http.Request) (*http.Response, error) {
		assert.NotEmpty(t, req.Header.Get("Idempotency-Key"))
		return base.RoundTrip(req)
	}), Hosts: map[string]Policy{testHost: policy}}
	ctx := WithRetry(context.Background(), func(r *RetryPolicy) {
		assert.True(t, r.IdempotencyKey)
		assert.Equal(t, 3, r.MaxAttempts)
		r.MaxAttempts = 4
	})
	resp, err := tr.RoundTrip(tripptest.Request(t, ctx, http.MethodPost, "pay"))
	require.NoError(t, err)
	assert.Equal(t, 500, resp.StatusCode)
	assert.Equal(t, 4, base.Sent())

	ctx = WithRetry(context.Background(), func(r *RetryPolicy) { r.MaxAttempts = -1 })
	_, err = tr.RoundTrip(tripptest.Request(t, ctx, http.MethodPost, "pay"))
	require.ErrorContains(t, err, "WithRetry.MaxAttempts is -1")
}

func TestTheZeroValueExecutesNothingTwice(t *testing.T) {
	lost := errors.New("connection lost")
	for name, test := range map[string]struct {
		first any
		sent  int
	}{
		"answer lost":          {lost, 1},
		"500":                  {500, 1},
		"bare 503":             {503, 1},
		"503 that asks for it": {tripptest.Answer(503, "", "Retry-After", "0"), 2},
		"429":                  {429, 2},
		"529":                  {529, 2},
	} {
		t.Run(name, func(t *testing.T) {
			base := tripptest.Script(test.first, 200)
			tr := &Transport{Base: base, Policy: quick()}
			_, _ = tr.RoundTrip(tripptest.Request(t, context.Background(), http.MethodPost, "x"))
			assert.Equal(t, test.sent, base.Sent())
			base = tripptest.Script(test.first, 200)
			tr = &Transport{Base: base, Policy: quick()}
			_, _ = tr.RoundTrip(tripptest.Request(t, context.Background(), http.MethodPut, "x"))
			assert.Equal(t, 2, base.Sent(), "an idempotent method is sent again")
		})
	}
}

func TestAHungProbeLosesItsPlace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		mode := "down"
		base := tripptest.Func(func(req *http.Request) (*http.Response, error) {
			switch mode {
			case "down":
				return nil, errors.New("down")
			case "hang":
				<-req.Context().Done()
				return nil, req.Context().Err()
			}
			return tripptest.Answer(200, ""), nil
		})
		tr := &Transport{Base: base, Policy: Policy{Retry: RetryPolicy{MaxAttempts: 1}}}
		for range 5 {
			_, _ = get(tr)
		}
		require.Equal(t, Open, statsOf(t, tr, testHost).State)
		time.Sleep(time.Minute)
		mode = "hang"
		ctx, cancel := context.WithCancel(context.Background())
		var wg sync.WaitGroup
		for range 2 {
			wg.Go(func() { _, _ = tr.RoundTrip(tripptest.Request(t, ctx, http.MethodGet, "")) })
		}
		synctest.Wait()
		mode = "well"
		_, err := get(tr)
		require.ErrorIs(t, err, ErrRejected)
		time.Sleep(time.Minute)
		for range 2 {
			_, err = get(tr)
			require.NoError(t, err)
		}
		st, _ := tr.Stats(testHost)
		assert.Equal(t, Closed, st.State)
		cancel()
		wg.Wait()
		statsOf(t, tr, testHost)
	})
}

func TestOutcomeThatCallsAnErrorASuccess(t *testing.T) {
	policy := quick()
	policy.Retry.MaxAttempts = 1
	policy.Breaker.Outcome = func(*http.Response, error) Outcome { return Success }
	tr := &Transport{Base: tripptest.Script(errors.New("down")), Policy: policy}
	_, err := get(tr)
	require.ErrorContains(t, err, "down")
	assert.EqualValues(t, 1, statsOf(t, tr, testHost).Successes)
}

func TestPrepareMayChangeTheHostAndTheBody(t *testing.T) {
	policy := quick()
	closed := 0
	policy.Retry.Prepare = func(req *http.Request) error {
		req.URL.Host = "other.example.com"
		req.Body = closer{strings.NewReader("another"), func() { closed++ }}
		return nil
	}
	base := tripptest.Script(429, 200)
	tr := &Transport{Base: base, Policy: policy}
	resp, err := tr.RoundTrip(tripptest.Request(t, context.Background(), http.MethodPost, "one"))
	require.NoError(t, err)
	assert.Equal(t, 200, resp.StatusCode)
	assert.Equal(t, 1, closed)
	assert.Equal(t, []string{"one", "another"}, base.Bodies())
	other, _ := tr.Stats("other.example.com")
	assert.EqualValues(t, 1, other.Successes)
	first, _ := tr.Stats(testHost)
	assert.EqualValues(t, 1, first.Ignored)
	assert.EqualValues(t, 1, first.OK)
}

type closer struct {
	io.Reader
	close func()
}

func (c closer) Close() error { c.close(); return nil }

func TestAPanicOfWithRetrysFunctionClosesTheBody(t *testing.T) {
	tr := &Transport{Base: tripptest.Script(200)}
	req := tripptest.Request(t, WithRetry(context.Background(), func(*RetryPolicy) { panic("oops") }), http.MethodPost, "x")
	closed := 0
	req.Body = closer{strings.NewReader("x"), func() { closed++ }}
	assert.PanicsWithValue(t, "oops", func() { _, _ = tr.RoundTrip(req) })
	assert.Equal(t, 1, closed)
}

func TestCountersOnlyGrowBesideRejections(t *testing.T) {
	tr := &Transport{Base: tripptest.Script(200), Policy: quick()}
	require.True(t, tr.Trip(testHost, time.Hour, nil))
	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		for {
			select {
			case <-stop:
				return
			default:
				_, _ = get(tr)
			}
		}
	}()
	var before Stats
	for range 20_000 {
		st, _ := tr.Stats(testHost)
		require.GreaterOrEqual(t, st.Requests, before.Requests)
		require.GreaterOrEqual(t, st.Attempts, before.Attempts)
		require.GreaterOrEqual(t, st.Rejected, before.Rejected)
		before = st
	}
	close(stop)
	<-stopped
	assert.Zero(t, statsOf(t, tr, testHost).Attempts)
}

// uncomparable is a context whose type cannot be compared.
type uncomparable struct {
	context.Context
	_ []int
}

func TestContextsNeedNotBeComparable(t *testing.T) {
	tr := &Transport{Base: tripptest.Script(503, 200, 200), Policy: quick()}
	for _, ctx := range []context.Context{context.Background(), WithRetry(context.Background(), nil)} {
		resp, err := tr.RoundTrip(tripptest.Request(t, uncomparable{Context: ctx}, http.MethodGet, ""))
		require.NoError(t, err)
		assert.Equal(t, 200, resp.StatusCode)
	}
}
