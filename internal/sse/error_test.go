package sse

import (
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func TestEventErrors(t *testing.T) {
	long := `"` + strings.Repeat("x", 2*maxKept) + `"`
	tests := []struct {
		event, data string
		kind        string
		status      int
	}{
		{"error", `{"type":"error","error":{"type":"overloaded_error","message":"Overloaded"}}`, "overloaded_error", 529},
		{"error", `{"type":"error","error":{"details":null,"type":"rate_limit_error"},"request_id":"req_1"}`, "rate_limit_error", 429},
		{"error", `{"type":"error","error":{"type":"timeout_error","message":` + long + `}}`, "timeout_error", 504},
		{"error", `{"type":"error","error":{"type":"new_error"}}`, "new_error", 0},
		{"error", `oops`, "", 0},
		{"error", `[{"type":"api_error"}]`, "", 0},
		{"error", `{}`, "", 0},
		{"error", `{"type":"error","code":"server_error","message":"x","param":null,"sequence_number":1}`, "server_error", 500},
		{"error", `{"type":"error","code":"ERR_SOMETHING"}`, "ERR_SOMETHING", 0},
		{"error", `{"type":"server_error"}`, "server_error", 500},
		{"response.failed", `{"type":"response.failed","response":{"id":"resp_1","status":"failed",` +
			`"output":[{"type":"api_error"}],"error":{"code":"rate_limit_exceeded","message":"x"},"instructions":` + long + `}}`,
			"rate_limit_exceeded", 429},
		{"response.failed", `{"type":"response.failed","response":{"error":null,"status":"failed"}}`, "", 0},
		{"", `{"error":{"message":"x","type":"server_error","param":null,"code":null}}`, "server_error", 500},
		{"message", `{"error":{"type":"server_error"}}`, "server_error", 500},
		{"", `{"error" : {"type":"invalid_request_error","code":"context_length_exceeded"}}`, "invalid_request_error", 400},
		{"", `{"error":{"type":"invalid_request_error","code":"invalid_api_key"}}`, "invalid_request_error", 401},
		{"", `{"error":{"type":"tokens","code":"rate_limit_exceeded"}}`, "tokens", 429},
		{"", `{"error":{"type":"insufficient_quota","code":"credit_balance_exhausted"}}`, "insufficient_quota", 429},
		{"", `{"error":{"type":"service_unavailable_error","code":"server_is_overloaded"}}`, "service_unavailable_error", 503},
		{"", `{"error":{"type":"server_error","code":"brand_new"}}`, "server_error", 500},
		{"", `{"error":{"code":503,"message":"x","status":"UNAVAILABLE"}}`, "UNAVAILABLE", 503},
		{"", `{"error":{"status":502}}`, "", 502},
		{"", `{"error":{"code":200}}`, "", 0},
		{"", `{"error":{"code":5.03e2}}`, "", 0},
		{"", `{"error":{"type":"None","code":"429"}}`, "None", 429},
		{"", `{"id":"gen-1","error":{"code":"server_error","message":"x"},"choices":[{"delta":{}}]}`, "server_error", 500},
	}
	for _, test := range tests {
		got := eventError(test.event, []byte(test.data)[:min(len(test.data), maxKept)])
		if assert.NotNil(t, got, test.data) {
			assert.Equal(t, EventError{test.kind, test.status}, *got, test.data)
		}
	}
}

func TestOtherEventsAreNoErrors(t *testing.T) {
	for _, test := range [][2]string{
		{"", `{"choices":[{"delta":{"content":"\"error\":{\"type\":1}"}}]}`},
		{"", `{"choices":[{"error":{"type":"server_error"}}]}`},
		{"", `{"choices":[],"error":null}`},
		{"", `{"error":"a text"}`},
		{"", `{"kind":"error","x":{}}`},
		{"", `[{"error":{"type":"server_error"}}]`},
		{"", `"error":{"type":"server_error"}`},
		{"", `error`},
		{"", `[DONE]`},
		{"content_block_delta", `{"error":{"type":"server_error"}}`},
		{"response.completed", `{"response":{"error":{"code":"server_error"}}}`},
		{"message_start", `{"type":"error"}`},
	} {
		assert.Nil(t, eventError(test[0], []byte(test[1])), test[1])
	}
}

func TestTextOfAnEventError(t *testing.T) {
	assert.EqualError(t, &EventError{}, "error event")
	assert.EqualError(t, &EventError{Status: 503}, "error event")
	assert.EqualError(t, &EventError{Type: "overloaded_error"}, `error event: "overloaded_error"`)
	assert.EqualError(t, &EventError{Type: "a\n" + strings.Repeat("é", 50)}, `error event: "a\n`+strings.Repeat("é", 38)+`"`)
}

func TestWhatARetryMayCure(t *testing.T) {
	for status, want := range map[int]bool{0: false, 400: false, 401: false, 408: true, 409: false, 429: true,
		499: false, 500: true, 529: true, 599: true, 600: false} {
		assert.Equal(t, want, curable(status), status)
	}
}

// The look that each event costs finds no error in vain, and allocates nothing.
func TestAHealthyStreamIsNotParsed(t *testing.T) {
	data := []byte(`{"id":"chatcmpl-1","choices":[{"index":0,"delta":{"content":" \"error\":{"},"finish_reason":null}],"error":null}`)
	require.False(t, mayHoldError(data))
	assert.Zero(t, testing.AllocsPerRun(100, func() { eventError("", data) }))
}

func FuzzEventError(f *testing.F) {
	f.Add("error", []byte(`{"type":"error","error":{"type":"overloaded_error"}}`))
	f.Add("response.failed", []byte(`{"response":{"error":{"code":503}}}`))
	f.Add("", []byte(`{"error":{"code":1e9,"type":[{}]}}`))
	f.Fuzz(func(t *testing.T, event string, data []byte) {
		if e := eventError(event, data); e != nil {
			assert.True(t, e.Status == 0 || e.Status >= 400 && e.Status <= 599)
			assert.LessOrEqual(t, len(e.Type), 3*len(data)) // invalid bytes become U+FFFD
		}
	})
}
