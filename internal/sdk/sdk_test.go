package sdk

import (
	"encoding/json"
	"net/http"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func request(t *testing.T, count string) *http.Request {
	req, err := http.NewRequest(http.MethodPost, "https://api.example.com/", nil)
	require.NoError(t, err)
	if count != "" {
		req.Header.Set("X-Stainless-Retry-Count", count)
	}
	return req
}

func TestRetries(t *testing.T) {
	assert.False(t, Retries(request(t, "")))
	assert.True(t, Retries(request(t, "0")))
	assert.True(t, Retries(request(t, "2")))
	assert.False(t, Retries(&http.Request{}))
}

func TestMarkFinal(t *testing.T) {
	resp := &http.Response{Header: http.Header{"X-Should-Retry": {"true"}}}
	MarkFinal(resp)
	assert.Equal(t, http.Header{"X-Should-Retry": {"false"}}, resp.Header)
	resp = &http.Response{}
	MarkFinal(resp)
	assert.Equal(t, http.Header{"X-Should-Retry": {"false"}}, resp.Header)
}

func TestAnswer(t *testing.T) {
	const message = `it said "no"`
	for _, test := range []struct {
		code       int
		wait       time.Duration
		status     string
		kind       string
		retryAfter string
	}{
		{503, 0, "503 Service Unavailable", "api_error", ""},
		{503, 1500 * time.Millisecond, "503 Service Unavailable", "api_error", "2"},
		{503, time.Minute, "503 Service Unavailable", "api_error", "60"},
		{504, 0, "504 Gateway Timeout", "timeout_error", ""},
		{429, time.Millisecond, "429 Too Many Requests", "rate_limit_error", "1"},
	} {
		req := request(t, "0")
		resp := Answer(req, test.code, test.wait, message)
		assert.Equal(t, test.code, resp.StatusCode)
		assert.Equal(t, test.status, resp.Status)
		assert.Same(t, req, resp.Request)
		assert.Equal(t, "false", resp.Header.Get("X-Should-Retry"))
		assert.Equal(t, test.retryAfter, resp.Header.Get("Retry-After"))
		var body struct {
			Type  string
			Error struct{ Type, Message string }
		}
		require.NoError(t, json.NewDecoder(resp.Body).Decode(&body))
		assert.Equal(t, "error", body.Type)
		assert.Equal(t, test.kind, body.Error.Type)
		assert.Equal(t, message, body.Error.Message)
	}
}
