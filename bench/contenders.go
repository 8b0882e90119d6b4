package main

import (
	"context"
	"errors"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/PuerkitoBio/rehttp"
	"github.com/failsafe-go/failsafe-go/circuitbreaker"
	"github.com/failsafe-go/failsafe-go/failsafehttp"
	"github.com/hashicorp/go-retryablehttp"
	"github.com/sony/gobreaker/v2"

	"github.com/tripper-go/tripper"
)

// settings are what every contender is given.
type settings struct {
	attempts         int
	minWait, maxWait time.Duration // doubling
	failures         int           // in a row that open a breaker
	successes        int           // of probes that close it
	recovery         time.Duration
}

var (
	standard = settings{attempts: 3, minWait: time.Second, maxWait: 10 * time.Second, failures: 5, successes: 2, recovery: time.Minute}

	// What a retry costs besides its wait shows when there is next to none.
	// (Zero means something else to most of the contenders.)
	hardlyWaiting = standard.withWaits(1, 2)
)

func (s settings) withWaits(lowest, longest time.Duration) settings {
	s.minWait, s.maxWait = lowest, longest
	return s
}

// A contender is one way to make a client resilient.
type contender struct {
	name    string
	modules []string // whose versions matter
	wrap    func(http.RoundTripper, settings) http.RoundTripper
	retries bool
	breaks  bool                        // with a breaker for each host
	held    func(http.RoundTripper) int // how many hosts it keeps something of; nil: none
}

const tripperName = "tripper"

// contenders has the bare base, which all are compared with, first.
func contenders() []contender {
	return []contender{
		{
			name: "bare",
			wrap: func(base http.RoundTripper, _ settings) http.RoundTripper { return base },
		}, {
			name: tripperName, retries: true, breaks: true,
			modules: []string{"github.com/tripper-go/tripper"},
			wrap:    newTripper,
			held: func(rt http.RoundTripper) (n int) {
				for range rt.(*tripper.Transport).All() {
					n++
				}
				return n
			},
		}, {
			name: "go-retryablehttp", retries: true,
			modules: []string{"github.com/hashicorp/go-retryablehttp"},
			wrap:    newRetryable,
		}, {
			name: "go-retryablehttp + gobreaker", retries: true, breaks: true,
			modules: []string{"github.com/sony/gobreaker/v2"},
			wrap: func(base http.RoundTripper, s settings) http.RoundTripper {
				return newRetryable(newBreakers(base, s), s)
			},
			held: func(rt http.RoundTripper) int {
				return rt.(*retryablehttp.RoundTripper).Client.HTTPClient.Transport.(*perHost).len()
			},
		}, {
			name: "rehttp + gobreaker", retries: true, breaks: true,
			modules: []string{"github.com/PuerkitoBio/rehttp"},
			wrap: func(base http.RoundTripper, s settings) http.RoundTripper {
				return newRehttp(newBreakers(base, s), s)
			},
			held: func(rt http.RoundTripper) int { return rt.(*rehttp.Transport).RoundTripper.(*perHost).len() },
		}, {
			name: "failsafehttp", retries: true, breaks: true,
			modules: []string{"github.com/failsafe-go/failsafe-go"},
			wrap:    newFailsafe,
			held:    func(rt http.RoundTripper) int { return rt.(*perHost).len() },
		},
	}
}

func newTripper(base http.RoundTripper, s settings) http.RoundTripper {
	return &tripper.Transport{Base: base, Policy: tripper.Policy{
		Retry: tripper.RetryPolicy{
			MaxAttempts: s.attempts, MinWait: s.minWait, MaxWait: s.maxWait, Jitter: tripper.JitterNone, Replay: tripper.ReplayAny,
			// The others have no budget. This one is kept, and is never empty.
			Budget: tripper.Budget{Ratio: float64(s.attempts), MinPerSecond: 10},
		},
		Breaker: tripper.BreakerPolicy{FailureThreshold: s.failures, RecoveryTimeout: s.recovery, SuccessThreshold: s.successes},
	}}
}

// newRetryable does not retry what a breaker below it has rejected, and gives
// the last response to its caller, as the others do.
func newRetryable(base http.RoundTripper, s settings) http.RoundTripper {
	return &retryablehttp.RoundTripper{Client: &retryablehttp.Client{
		HTTPClient:   &http.Client{Transport: base},
		RetryMax:     s.attempts - 1,
		RetryWaitMin: s.minWait, RetryWaitMax: s.maxWait,
		Backoff: retryablehttp.DefaultBackoff,
		CheckRetry: func(ctx context.Context, resp *http.Response, err error) (bool, error) {
			if rejected(err) {
				return false, nil
			}
			return retryablehttp.DefaultRetryPolicy(ctx, resp, err)
		},
		ErrorHandler: retryablehttp.PassthroughErrorHandler,
	}}
}

func newRehttp(base http.RoundTripper, s settings) http.RoundTripper {
	retry := rehttp.RetryAll(
		rehttp.RetryMaxRetries(s.attempts-1),
		rehttp.RetryAny(
			rehttp.RetryStatuses(http.StatusRequestTimeout, http.StatusTooManyRequests),
			rehttp.RetryStatusInterval(500, 600),
			rehttp.RetryIsErr(func(err error) bool { return err != nil && !rejected(err) }),
		),
	)
	return rehttp.NewTransport(base, retry, func(a rehttp.Attempt) time.Duration {
		return min(s.minWait<<a.Index, s.maxWait)
	})
}

// newFailsafe makes a stack for each host: a policy is shared by all that goes
// through it.
func newFailsafe(base http.RoundTripper, s settings) http.RoundTripper {
	return newPerHost(func() http.RoundTripper {
		retry := failsafehttp.NewRetryPolicyBuilder().
			WithMaxAttempts(s.attempts).
			WithBackoff(s.minWait, s.maxWait).
			AbortOnErrors(circuitbreaker.ErrOpen).
			ReturnLastFailure().
			Build()
		breaker := circuitbreaker.NewBuilder[*http.Response]().
			HandleIf(func(resp *http.Response, err error) bool { return err != nil || failed(resp) }).
			WithFailureThreshold(uint(s.failures)).
			WithSuccessThreshold(uint(s.successes)).
			WithDelay(s.recovery).
			Build()
		return failsafehttp.NewRoundTripper(base, retry, breaker)
	})
}

// newBreakers puts a breaker for each host before base: what one writes by hand.
func newBreakers(base http.RoundTripper, s settings) http.RoundTripper {
	return newPerHost(func() http.RoundTripper {
		return &breaking{base, gobreaker.NewCircuitBreaker[*http.Response](gobreaker.Settings{
			MaxRequests: uint32(s.successes),
			Timeout:     s.recovery,
			ReadyToTrip: func(c gobreaker.Counts) bool { return int(c.ConsecutiveFailures) >= s.failures },
		})}
	})
}

// breaking is a RoundTripper behind a gobreaker.
type breaking struct {
	base    http.RoundTripper
	breaker *gobreaker.CircuitBreaker[*http.Response]
}

var errFailed = errors.New("the response is a failure")

func (b *breaking) RoundTrip(req *http.Request) (*http.Response, error) {
	resp, err := b.breaker.Execute(func() (*http.Response, error) {
		resp, err := b.base.RoundTrip(req)
		if err == nil && failed(resp) {
			err = errFailed
		}
		return resp, err
	})
	if err == errFailed {
		err = nil
	}
	return resp, err
}

// perHost has a RoundTripper for each host. (A sync.Map in its place allocates
// on every look-up, for the key.)
type perHost struct {
	build  func() http.RoundTripper
	mu     sync.RWMutex
	byHost map[string]http.RoundTripper
}

func newPerHost(build func() http.RoundTripper) *perHost {
	return &perHost{build: build, byHost: map[string]http.RoundTripper{}}
}

func (p *perHost) RoundTrip(req *http.Request) (*http.Response, error) {
	p.mu.RLock()
	rt := p.byHost[req.URL.Host]
	p.mu.RUnlock()
	if rt == nil {
		rt = p.add(req.URL.Host)
	}
	return rt.RoundTrip(req)
}

func (p *perHost) add(host string) http.RoundTripper {
	p.mu.Lock()
	defer p.mu.Unlock()
	if rt := p.byHost[host]; rt != nil {
		return rt
	}
	rt := p.build()
	p.byHost[strings.Clone(host)] = rt // host is a part of a whole URL
	return rt
}

func (p *perHost) len() int {
	p.mu.RLock()
	defer p.mu.RUnlock()
	return len(p.byHost)
}

func failed(resp *http.Response) bool {
	return resp.StatusCode == http.StatusRequestTimeout || resp.StatusCode == http.StatusTooManyRequests || resp.StatusCode >= 500
}

// rejected reports whether an open breaker of any of the contenders is behind err.
func rejected(err error) bool {
	for _, open := range []error{gobreaker.ErrOpenState, gobreaker.ErrTooManyRequests, circuitbreaker.ErrOpen, tripper.ErrRejected} {
		if errors.Is(err, open) {
			return true
		}
	}
	return false
}
