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
		timeout    bool
		wait       time.Duration
		status     string
		retryAfter string
	}{
		{false, 0, "503 Service Unavailable", ""},
		{true, 0, "504 Gateway Timeout", ""},
		{false, 1500 * time.Millisecond, "503 Service Unavailable", "2"},
		{false, time.Minute, "503 Service Unavailable", "60"},
	} {
		req := request(t, "0")
		resp := Answer(req, test.timeout, test.wait, message)
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
		assert.Equal(t, "api_error", body.Error.Type)
		assert.Equal(t, message, body.Error.Message)
	}
}
