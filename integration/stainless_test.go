package integration

import (
	"context"
	"errors"
	"net/http"
	"testing"

	anthropicoption "github.com/anthropics/anthropic-sdk-go/option"
	openaioption "github.com/openai/openai-go/v3/option"
	"github.com/stretchr/testify/require"

	"github.com/tripper-go/tripper"
)

// retryCount is the header by which tripper knows an SDK that retries by
// itself. Without it, and without the SDK's retries, errors come through as
// they are.
const retryCount = "X-Stainless-Retry-Count"

func unmarked() []client {
	a, o := anthropicClient(), openaiClient()
	a.call = func(ctx context.Context, url string, hc *http.Client) (string, error) {
		c := newAnthropic(url, hc)
		_, err := c.Messages.New(ctx, claudeRequest, anthropicoption.WithMaxRetries(0), anthropicoption.WithHeaderDel(retryCount))
		return "", err
	}
	o.call = func(ctx context.Context, url string, hc *http.Client) (string, error) {
		c := newOpenAI(url, hc)
		_, err := c.Chat.Completions.New(ctx, gptRequest, openaioption.WithMaxRetries(0), openaioption.WithHeaderDel(retryCount))
		return "", err
	}
	return []client{a, o}
}

func TestStainlessWithoutItsMarkGetsErrors(t *testing.T) {
	t.Parallel()
	for _, c := range unmarked() {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			st := newStack(c, play(t, reset), opensAfterOneCall)
			_, err := st.call(t, c)
			failed, ok := errors.AsType[*tripper.RetryError](err)
			require.True(t, ok, "%T: %v", err, err)
			require.Equal(t, 3, failed.Attempts)

			_, err = st.call(t, c)
			open, ok := errors.AsType[*tripper.OpenError](err)
			require.True(t, ok, "%T: %v", err, err)
			require.Equal(t, "api", open.Service)
			wire := st.requireWire(t, 3)
			require.NotContains(t, wire[0].Header, retryCount)
		})
	}
}

// The SDK numbers its own retries: the service sees none.
func TestStainlessDoesNotRetryOnTop(t *testing.T) {
	each(t, stainless, func(t *testing.T, c client) {
		for _, fault := range []step{c.fault(http.StatusServiceUnavailable), c.fault(http.StatusBadRequest, "X-Should-Retry", "true"), reset} {
			st := newStack(c, play(t, fault))
			_, err := st.call(t, c)
			for _, r := range st.requireWire(t, 3) {
				require.Equal(t, "0", r.Header.Get(retryCount))
			}
			last := answerOf(err)
			require.NotNil(t, last, "not the SDK's own error: %T: %v", err, err)
			require.Equal(t, "false", last.Header.Get("X-Should-Retry"))
		}
	})
}

// Retries that the policy does not allow are not the SDK's to make, either.
func TestStainlessDoesNotRetryInstead(t *testing.T) {
	each(t, stainless, func(t *testing.T, c client) {
		for name, change := range map[string]func(*tripper.RetryPolicy){
			"one attempt":     func(r *tripper.RetryPolicy) { r.MaxAttempts = 1 },
			"ReplaySafe":      func(r *tripper.RetryPolicy) { r.Replay = tripper.ReplaySafe },
			"an empty budget": func(r *tripper.RetryPolicy) { r.Budget = tripper.Budget{Ratio: 0.001} },
			"its CheckRetry": func(r *tripper.RetryPolicy) {
				r.CheckRetry = func(context.Context, *http.Response, error) (bool, error) { return false, nil }
			},
		} {
			t.Run(name, func(t *testing.T) {
				st := newStack(c, play(t, c.fault(http.StatusInternalServerError)), func(tr *tripper.Transport) { change(&tr.Policy.Retry) })
				_, err := st.call(t, c)
				c.requireAnswer(t, err, http.StatusInternalServerError)
				st.requireWire(t, 1)
			})
		}
	})
}
