// Package engine runs the retry loop of go-retryablehttp over attempts of any
// kind.
//
// The loop belongs to a retryablehttp.Client, which makes its attempts through
// an http.Client. That one would follow redirects, refuse a RequestURI and wrap
// errors. So it never sees the real request or a real response: it gets to see
// stand-ins, while the real ones stay with the caller of Run.
package engine

import (
	"context"
	"net/http"
	"net/url"
	"time"

	"github.com/hashicorp/go-retryablehttp"
)

// Steps are what the loop is made of. They are called one after the other, by
// the goroutine that called Run.
type Steps interface {
	Wait() time.Duration // before the retry that has been decided
	Prepare() error      // gets ready for it; an error ends the loop
	Attempt()            // makes it
	Decide() bool        // whether there is another one
}

// Run makes up to retries retries, the first of which has been decided already.
// It returns when Decide says so, with nil; when ctx ends during a wait, with
// its error; or with the error of Prepare.
func Run(ctx context.Context, retries int, steps Steps) error {
	l := &loop{steps: steps}
	l.client.Transport = l
	l.engine = retryablehttp.Client{
		HTTPClient:   &l.client,
		RetryMax:     retries,
		CheckRetry:   l.check,
		Backoff:      l.backoff,
		PrepareRetry: l.prepare,
		ErrorHandler: retryablehttp.PassthroughErrorHandler,
	}
	_, err := l.engine.Do(&retryablehttp.Request{Request: standIn.WithContext(ctx)})
	return err
}

var (
	standIn         = &http.Request{Method: http.MethodGet, URL: &url.URL{Scheme: "http", Host: "tripper.invalid"}, Header: http.Header{}}
	standInResponse = &http.Response{StatusCode: http.StatusOK, Body: http.NoBody}
)

// A loop is the transport below the engine. Its first round trip stands for the
// attempt that has been made before Run was called.
type loop struct {
	steps  Steps
	engine retryablehttp.Client
	client http.Client
	begun  bool // the first round trip is over
}

func (l *loop) RoundTrip(*http.Request) (*http.Response, error) {
	if l.begun {
		l.steps.Attempt()
	}
	return standInResponse, nil
}

func (l *loop) check(context.Context, *http.Response, error) (bool, error) {
	if !l.begun {
		l.begun = true
		return true, nil
	}
	return l.steps.Decide(), nil
}

func (l *loop) backoff(_, _ time.Duration, _ int, _ *http.Response) time.Duration {
	return l.steps.Wait()
}

func (l *loop) prepare(*http.Request) error { return l.steps.Prepare() }
