package tripper_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"strings"
	"time"

	"github.com/tripper-go/tripper"
)

// answers is a base that gives its statuses one after the other, the last one
// for ever. Real programs leave Base nil or set their own http.Transport.
func answers(statuses ...int) http.RoundTripper {
	return roundTripper(func(req *http.Request) (*http.Response, error) {
		status := statuses[0]
		if len(statuses) > 1 {
			statuses = statuses[1:]
		}
		return &http.Response{
			StatusCode: status, Header: http.Header{}, Request: req,
			Body: io.NopCloser(strings.NewReader(http.StatusText(status))),
		}, nil
	})
}

type roundTripper func(*http.Request) (*http.Response, error)

func (f roundTripper) RoundTrip(req *http.Request) (*http.Response, error) { return f(req) }

// soon makes the examples quick; see RetryPolicy for the defaults.
var soon = tripper.RetryPolicy{MinWait: time.Millisecond, MaxWait: 10 * time.Millisecond}

func Example() {
	transport := &tripper.Transport{
		Base:   answers(503, 503, 200),
		Policy: tripper.Policy{Retry: soon},
	}
	client := &http.Client{Transport: transport}

	resp, err := client.Get("https://api.example.com/data")
	if err != nil {
		fmt.Println(err)
		return
	}
	defer resp.Body.Close()
	body, _ := io.ReadAll(resp.Body)
	fmt.Println(resp.StatusCode, string(body))
	// Output: 200 OK
}

func ExampleTransport_hosts() {
	transport := &tripper.Transport{
		Base:   answers(200),
		Policy: tripper.Agent(), // every other host
		Hosts: map[string]tripper.Policy{
			"api.anthropic.com": tripper.Claude(),
			"*.example.com":     tripper.HighTraffic(), // each name below a service of its own
			"localhost:8080":    {Service: "backend"},
		},
	}
	client := &http.Client{Transport: transport}
	for _, url := range []string{
		"https://api.anthropic.com/v1/messages", "https://a.example.com/", "https://B.example.com:443/",
		"http://localhost:8080/", "https://anything.else/",
	} {
		resp, err := client.Get(url)
		if err != nil {
			fmt.Println(err)
			return
		}
		resp.Body.Close()
	}
	for s := range transport.All() {
		fmt.Println(s.Service, s.Requests, s.State)
	}
	// Output:
	// a.example.com 1 CLOSED
	// agent_http 1 CLOSED
	// b.example.com 1 CLOSED
	// backend 1 CLOSED
	// claude_api 1 CLOSED
}

func ExampleTransport_service() {
	transport := &tripper.Transport{
		Base: answers(200),
		Service: func(req *http.Request) string { // a breaker for each model
			return req.Header.Get("X-Model")
		},
	}
	req, _ := http.NewRequest(http.MethodPost, "https://llm.example.com/v1", strings.NewReader("{}"))
	req.Header.Set("X-Model", "small")
	resp, err := transport.RoundTrip(req)
	if err != nil {
		fmt.Println(err)
		return
	}
	resp.Body.Close()
	stats, ok := transport.Stats("small")
	fmt.Println(ok, stats.OK)
	// Output: true 1
}

func ExampleObserver() {
	transport := &tripper.Transport{
		Base: answers(503, 503, 503, 503, 503),
		Policy: tripper.Policy{
			Service: "my_service",
			Retry:   tripper.RetryPolicy{MinWait: time.Millisecond, Jitter: tripper.JitterNone},
		},
		Observers: []*tripper.Observer{{
			Attempt: func(e tripper.AttemptEvent) {
				fmt.Printf("attempt %d: %d, %v\n", e.Attempt, e.Status, e.Outcome)
			},
			Retry: func(e tripper.RetryEvent) {
				fmt.Printf("attempt %d of %d in %v: %v\n", e.Attempt, e.Max, e.Wait, e.Cause)
			},
			StateChange: func(c tripper.StateChange) {
				fmt.Println(c.Service, c.From, "->", c.To)
			},
			Service: func(name string) { fmt.Println("new service", name) },
		}},
	}
	client := &http.Client{Transport: transport}
	for range 3 {
		resp, err := client.Get("https://api.example.com/data?key=secret")
		var open *tripper.OpenError
		if errors.As(err, &open) {
			fmt.Println("open, last:", open.Last)
			continue
		}
		fmt.Println(resp.StatusCode)
		resp.Body.Close()
	}
	// Output:
	// new service my_service
	// attempt 1: 503, failure
	// attempt 2 of 3 in 1ms: 503 Service Unavailable
	// attempt 2: 503, failure
	// attempt 3 of 3 in 2ms: 503 Service Unavailable
	// attempt 3: 503, failure
	// 503
	// attempt 1: 503, failure
	// attempt 2 of 3 in 1ms: 503 Service Unavailable
	// my_service CLOSED -> OPEN
	// attempt 2: 503, failure
	// 503
	// open, last: 503 Service Unavailable
}

func ExampleTransport_logger() {
	transport := &tripper.Transport{
		Base:   answers(429, 200),
		Policy: tripper.Policy{Retry: tripper.RetryPolicy{MinWait: time.Millisecond, Jitter: tripper.JitterNone}},
		Logger: slog.New(slog.NewTextHandler(os.Stdout, &slog.HandlerOptions{
			ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
				if a.Key == slog.TimeKey {
					return slog.Attr{}
				}
				return a
			},
		})),
	}
	req, _ := http.NewRequest(http.MethodGet, "https://user:pass@api.example.com/data?key=secret", nil)
	resp, err := transport.RoundTrip(req)
	if err != nil {
		fmt.Println(err)
		return
	}
	resp.Body.Close()
	// Output: level=WARN msg=retrying service=api.example.com method=GET url=https://api.example.com/data attempt=2 max=3 wait=1ms cause="429 Too Many Requests"
}

// A kill switch: nothing is sent to the service, not even the first request to
// it, until it is switched on again.
func ExampleTransport_Trip() {
	transport := &tripper.Transport{Base: answers(200)}
	client := &http.Client{Transport: transport}

	transport.Trip("api.example.com", time.Hour, errors.New("switched off for maintenance"))
	_, err := client.Get("https://api.example.com/")
	var open *tripper.OpenError
	fmt.Println(errors.Is(err, tripper.ErrRejected), errors.As(err, &open))
	fmt.Println(open.Service, "is open:", open.Last)

	transport.Reset("api.example.com")
	resp, err := client.Get("https://api.example.com/")
	if err != nil {
		fmt.Println(err)
		return
	}
	resp.Body.Close()
	fmt.Println(resp.StatusCode)
	// Output:
	// true true
	// api.example.com is open: switched off for maintenance
	// 200
}

// By default a 429 says nothing about the service: it asks for patience. This
// Outcome counts it as a failure, and leaves everything else as it is.
func ExampleBreakerPolicy_outcome() {
	transport := &tripper.Transport{
		Base: answers(429),
		Policy: tripper.Policy{
			Service: "my_service",
			Retry:   tripper.RetryPolicy{MaxAttempts: 1},
			Breaker: tripper.BreakerPolicy{
				FailureThreshold: 2,
				Outcome: func(resp *http.Response, err error) tripper.Outcome {
					if err == nil && resp.StatusCode == http.StatusTooManyRequests {
						return tripper.Failure
					}
					return tripper.DefaultOutcome(resp, err)
				},
			},
		},
	}
	client := &http.Client{Transport: transport}
	for range 3 {
		resp, err := client.Get("https://api.example.com/")
		if err != nil {
			fmt.Println("rejected:", errors.Is(err, tripper.ErrRejected))
			continue
		}
		resp.Body.Close()
		fmt.Println(resp.StatusCode)
	}
	// Output:
	// 429
	// 429
	// rejected: true
}

func ExampleTransport_Validate() {
	transport := &tripper.Transport{Policy: tripper.Policy{Retry: tripper.RetryPolicy{MaxAttempts: -1}}}
	fmt.Println(transport.Validate())
	// Output: tripper: Policy.Retry.MaxAttempts is -1: want zero (the default) or more
}

func ExampleWithRetry() {
	transport := &tripper.Transport{
		Base:   answers(503, 503, 503, 503, 200),
		Policy: tripper.Policy{Retry: soon},
	}
	client := &http.Client{Transport: transport}

	// This request is worth more attempts than others to the same host. Everything
	// else of the host's policy stays.
	ctx := tripper.WithRetry(context.Background(), func(r *tripper.RetryPolicy) { r.MaxAttempts = 5 })
	req, _ := http.NewRequestWithContext(ctx, http.MethodGet, "https://api.example.com/", nil)
	resp, err := client.Do(req)
	if err != nil {
		fmt.Println(err)
		return
	}
	resp.Body.Close()
	fmt.Println(resp.StatusCode)
	// Output: 200
}

func ExampleLayer() {
	tag := func(next http.RoundTripper) http.RoundTripper {
		return roundTripper(func(req *http.Request) (*http.Response, error) {
			fmt.Println("attempt", tripper.Attempt(req.Context()))
			return next.RoundTrip(req)
		})
	}
	transport := &tripper.Transport{
		Base: answers(503, 200), Policy: tripper.Policy{Retry: soon}, Layers: []tripper.Layer{tag},
	}
	resp, err := (&http.Client{Transport: transport}).Get("https://api.example.com/")
	if err != nil {
		fmt.Println(err)
		return
	}
	resp.Body.Close()
	// Output:
	// attempt 1
	// attempt 2
}

func ExampleRetryPolicy_replaySafe() {
	lost := roundTripper(func(req *http.Request) (*http.Response, error) {
		fmt.Printf("sent, key %t\n", req.Header.Get("Idempotency-Key") != "")
		return nil, io.ErrUnexpectedEOF // was it executed? nobody knows
	})
	try := func(r tripper.RetryPolicy) {
		r.MinWait, r.MaxAttempts = time.Millisecond, 2
		client := &http.Client{Transport: &tripper.Transport{Base: lost, Policy: tripper.Policy{Retry: r}}}
		_, err := client.Post("https://api.example.com/", "text/plain", strings.NewReader("pay"))
		fmt.Println(err)
	}
	try(tripper.RetryPolicy{}) // ReplaySafe
	try(tripper.RetryPolicy{IdempotencyKey: true})
	try(tripper.RetryPolicy{Replay: tripper.ReplayAny})
	// Output:
	// sent, key false
	// Post "https://api.example.com/": unexpected EOF
	// sent, key true
	// sent, key true
	// Post "https://api.example.com/": tripper: giving up after 2 attempts: unexpected EOF
	// sent, key false
	// sent, key false
	// Post "https://api.example.com/": tripper: giving up after 2 attempts: unexpected EOF
}

func ExampleRetryAfter() {
	now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	for _, value := range []string{"120", "1.5", "Fri, 02 Jan 2026 03:05:05 GMT", "soon"} {
		wait, ok := tripper.RetryAfter(http.Header{"Retry-After": {value}}, now)
		fmt.Println(wait, ok)
	}
	// Output:
	// 2m0s true
	// 1.5s true
	// 1m0s true
	// 0s false
}
