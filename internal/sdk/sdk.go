// Package sdk speaks with SDKs that retry by themselves: those made by Stainless,
// for the Claude and OpenAI APIs among others. They retry every error, but obey
// the x-should-retry header of a response
// (https://github.com/anthropics/anthropic-sdk-go, internal/requestconfig).
package sdk

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"math"
	"net/http"
	"strconv"
	"time"
)

// Retries reports whether req comes from such an SDK.
func Retries(req *http.Request) bool {
	_, ok := req.Header["X-Stainless-Retry-Count"]
	return ok
}

// MarkFinal tells the SDK not to retry after resp.
func MarkFinal(resp *http.Response) {
	if resp.Header == nil {
		resp.Header = make(http.Header)
	}
	resp.Header.Set("X-Should-Retry", "false")
}

// Answer returns a final response to req where there is none. Its body has the
// shape of the APIs' own errors. A wait above zero is said in Retry-After, in
// whole seconds.
func Answer(req *http.Request, status int, wait time.Duration, message string) *http.Response {
	body, _ := json.Marshal(map[string]any{ // strings marshal without an error
		"type":  "error",
		"error": map[string]string{"type": errorType(status), "message": message},
	})
	resp := &http.Response{
		Status: fmt.Sprintf("%d %s", status, http.StatusText(status)), StatusCode: status,
		Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1,
		Header:        http.Header{"Content-Type": {"application/json"}},
		ContentLength: int64(len(body)),
		Body:          io.NopCloser(bytes.NewReader(body)),
		Request:       req,
	}
	if wait > 0 {
		resp.Header.Set("Retry-After", strconv.Itoa(int(math.Ceil(wait.Seconds()))))
	}
	MarkFinal(resp)
	return resp
}

// errorType is what the Claude API calls an error with this status
// (https://docs.anthropic.com/en/api/errors).
func errorType(status int) string {
	switch status {
	case http.StatusTooManyRequests:
		return "rate_limit_error"
	case http.StatusGatewayTimeout, http.StatusRequestTimeout:
		return "timeout_error"
	case 529:
		return "overloaded_error"
	}
	return "api_error"
}
