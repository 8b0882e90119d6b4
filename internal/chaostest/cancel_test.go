package chaostest

import (
	"context"
	"errors"
	"net/http"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/tripper-go/tripper"
)

// On a busy machine http.Client's Timeout closes Request.Cancel before the
// context has noticed its deadline. That is a deadline all the same.
func TestTimeoutDuringAWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const limit = time.Second
		transport := &tripper.Transport{
			Base:   roundTripper(func(*http.Request) (*http.Response, error) { return nil, errors.New("reset") }),
			Policy: tripper.Policy{Service: "s"},
			Observers: []*tripper.Observer{{
				Retry: func(tripper.RetryEvent) { time.Sleep(limit / 2) }, // the wait was to end in time
			}},
		}
		transport.Policy.Retry.MinWait, transport.Policy.Retry.Jitter = limit*3/4, tripper.JitterNone
		ctx := lateContext{t.Context(), time.Now().Add(limit)}
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://example.com", nil)
		require.NoError(t, err)
		cancel := make(chan struct{})
		req.Cancel = cancel //lint:ignore SA1019 http.Client uses it
		time.AfterFunc(limit, func() { close(cancel) })

		_, err = transport.RoundTrip(req)
		require.ErrorIs(t, err, context.DeadlineExceeded)
		stats, _ := transport.Stats("s")
		require.EqualValues(t, 1, stats.Failed)
	})
}

// A lateContext does not end at its deadline.
type lateContext struct {
	context.Context
	deadline time.Time
}

func (c lateContext) Deadline() (time.Time, bool) { return c.deadline, true }

type roundTripper func(*http.Request) (*http.Response, error)

func (f roundTripper) RoundTrip(req *http.Request) (*http.Response, error) { return f(req) }
