package main

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync/atomic"
)

// A scripted base answers the n-th request, counted from 1, with the status
// that answer says; 0 means an error.
type scripted struct {
	answer func(n int, req *http.Request) int
	calls  atomic.Int64
	bodies []string // of the requests; their senders are not concurrent
}

var errReset = errors.New("connection reset by peer")

func (b *scripted) RoundTrip(req *http.Request) (*http.Response, error) {
	n := int(b.calls.Add(1))
	if req.Body != nil {
		text, err := io.ReadAll(req.Body)
		req.Body.Close()
		if err != nil {
			return nil, err
		}
		b.bodies = append(b.bodies, string(text))
	}
	status := b.answer(n, req)
	if status == 0 {
		return nil, errReset
	}
	return &http.Response{
		StatusCode: status, ProtoMajor: 1, ProtoMinor: 1, Header: http.Header{}, Request: req,
		Body: io.NopCloser(strings.NewReader("answer")), ContentLength: 6,
	}, nil
}

func always(status int) func(int, *http.Request) int {
	return func(int, *http.Request) int { return status }
}

// check reports whether c does what it claims when it is configured as s says.
// Nothing is measured that has not passed.
func check(c contender, s settings) error {
	checks := []func(contender, settings) error{checkPasses}
	if c.retries {
		checks = append(checks, checkRetries, checkGivesUp, checkBody)
	}
	if c.breaks {
		checks = append(checks, checkOpens)
	}
	for _, check := range checks {
		if err := check(c, s); err != nil {
			return fmt.Errorf("%s does not do what it claims: %w", c.name, err)
		}
	}
	return nil
}

// send sends one request and returns what its caller sees of the answer.
func send(rt http.RoundTripper, method, host, body string) (status int, text string, err error) {
	var r io.Reader
	if body != "" {
		r = strings.NewReader(body)
	}
	req, err := http.NewRequest(method, "http://"+host+"/", r)
	if err != nil {
		return 0, "", err
	}
	resp, err := rt.RoundTrip(req)
	if err != nil {
		return 0, "", err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	return resp.StatusCode, string(b), err
}

// want compares the outcome of a send and the number of requests that base got.
func (b *scripted) want(what string, calls, status int, rt http.RoundTripper, method, body string) error {
	got, text, err := send(rt, method, "a.example", body)
	if err != nil || got != status || text != "answer" || int(b.calls.Load()) != calls {
		return fmt.Errorf("%s: got status %d, body %q, error %v after %d calls of the base, want status %d after %d",
			what, got, text, err, b.calls.Load(), status, calls)
	}
	return nil
}

func checkPasses(c contender, s settings) error {
	base := &scripted{answer: always(http.StatusOK)}
	return base.want("a success", 1, http.StatusOK, c.wrap(base, s), http.MethodGet, "")
}

// checkRetries wants one failed answer and one error to be retried.
func checkRetries(c contender, s settings) error {
	base := &scripted{answer: func(n int, _ *http.Request) int { return []int{503, 0, 200}[n-1] }}
	return base.want("503, an error, 200", 3, http.StatusOK, c.wrap(base, s), http.MethodGet, "")
}

func checkGivesUp(c contender, s settings) error {
	base := &scripted{answer: always(http.StatusServiceUnavailable)}
	return base.want("always 503", s.attempts, http.StatusServiceUnavailable, c.wrap(base, s), http.MethodGet, "")
}

func checkBody(c contender, s settings) error {
	base := &scripted{answer: func(n int, _ *http.Request) int { return []int{503, 200}[n-1] }}
	if err := base.want("a POST that is retried", 2, http.StatusOK, c.wrap(base, s), http.MethodPost, "hello"); err != nil {
		return err
	}
	if strings.Join(base.bodies, " ") != "hello hello" {
		return fmt.Errorf("a POST that is retried: the base got the bodies %q", base.bodies)
	}
	return nil
}

// checkOpens wants the breaker of one host to open at the failure that it is
// told to, to end that request's retries, to reject the next request without
// calling the base, and to leave another host alone.
func checkOpens(c contender, s settings) error {
	base := &scripted{answer: func(_ int, req *http.Request) int {
		if req.URL.Host == "a.example" {
			return http.StatusServiceUnavailable
		}
		return http.StatusOK
	}}
	rt := c.wrap(base, s)
	if err := fail(rt, s, "a.example"); err != nil {
		return err
	}
	if got := int(base.calls.Load()); got != s.failures {
		return fmt.Errorf("a breaker that is to open after %d failures let %d pass", s.failures, got)
	}
	if _, _, err := send(rt, http.MethodGet, "a.example", ""); !rejected(err) {
		return fmt.Errorf("an open breaker answered %v", err)
	}
	if got := int(base.calls.Load()); got != s.failures {
		return errors.New("an open breaker let a request pass")
	}
	if status, _, err := send(rt, http.MethodGet, "b.example", ""); err != nil || status != http.StatusOK {
		return fmt.Errorf("another host's open breaker gave status %d, error %v", status, err)
	}
	return nil
}

// fail sends requests to a host that fails until rt rejects one.
func fail(rt http.RoundTripper, s settings, host string) error {
	for range s.failures + 1 {
		if _, _, err := send(rt, http.MethodGet, host, ""); rejected(err) {
			return nil
		}
	}
	return fmt.Errorf("no breaker has opened after %d failed requests", s.failures+1)
}
