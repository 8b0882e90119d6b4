// Package tripptest has what the tests of all packages share: one scripted base,
// and one set of builders of requests and answers.
package tripptest

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"testing"
)

// A Func is a RoundTripper made of a function.
type Func func(*http.Request) (*http.Response, error)

// RoundTrip calls f.
func (f Func) RoundTrip(req *http.Request) (*http.Response, error) { return f(req) }

// Answer returns a response with a body, http.NoBody if it is empty. The header
// is given as key, value, key, value.
func Answer(status int, body string, header ...string) *http.Response {
	h := make(http.Header)
	for i := 0; i+1 < len(header); i += 2 {
		h.Add(header[i], header[i+1])
	}
	resp := &http.Response{
		Status: fmt.Sprintf("%d %s", status, http.StatusText(status)), StatusCode: status,
		Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1,
		Header: h, ContentLength: int64(len(body)), Body: http.NoBody,
	}
	if body != "" {
		resp.Body = io.NopCloser(strings.NewReader(body))
	}
	return resp
}

// A Base is a RoundTripper that follows a script: each attempt takes the next
// step, and the last step stays. A step is a status, an error, a *http.Response
// (for one attempt only) or a Func. It reads and closes each request body, as a
// RoundTripper must.
type Base struct {
	mu     sync.Mutex // guards the fields below
	steps  []any
	sent   int
	bodies []string
}

// Script returns a Base with these steps.
func Script(steps ...any) *Base { return &Base{steps: steps} }

// Sent returns how many attempts there were.
func (b *Base) Sent() int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.sent
}

// Bodies returns the request bodies of the attempts.
func (b *Base) Bodies() []string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return append([]string(nil), b.bodies...)
}

// RoundTrip takes the next step.
func (b *Base) RoundTrip(req *http.Request) (*http.Response, error) {
	var body []byte
	if req.Body != nil {
		var err error
		body, err = io.ReadAll(req.Body)
		req.Body.Close()
		if err != nil {
			b.next("")
			return nil, err
		}
	}
	switch step := b.next(string(body)).(type) {
	case int:
		return Answer(step, ""), nil
	case error:
		return nil, step
	case *http.Response:
		return step, nil
	case Func:
		return step(req)
	default:
		return nil, fmt.Errorf("tripptest: a step is a %T: want a status, an error, a response or a Func", step)
	}
}

func (b *Base) next(body string) any {
	b.mu.Lock()
	defer b.mu.Unlock()
	step := b.steps[min(b.sent, len(b.steps)-1)]
	b.sent++
	b.bodies = append(b.bodies, body)
	return step
}

// Request returns a request to https://api.example.com/v1 with a body that has
// GetBody, none if it is empty.
func Request(t testing.TB, ctx context.Context, method, body string) *http.Request {
	t.Helper()
	var r io.Reader
	if body != "" {
		r = strings.NewReader(body)
	}
	req, err := http.NewRequestWithContext(ctx, method, "https://api.example.com/v1", r)
	if err != nil {
		t.Fatal(err)
	}
	return req
}

// Plain hides everything of a reader but its Read, so that http.NewRequest gives
// its request no GetBody.
func Plain(r io.Reader) io.Reader { return struct{ io.Reader }{r} }
