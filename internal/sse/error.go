package sse

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/http"
	"strconv"
)

// An EventError is an error that a service reports in a stream, since it has
// already answered with status 200.
type EventError struct {
	Type   string // the error's type, or its code; empty if there is none
	Status int    // the HTTP status that the error would have had otherwise; 0 if unknown
}

// Error gives the type, which the service chooses, shortened and quoted.
func (e *EventError) Error() string {
	if e.Type == "" {
		return "error event"
	}
	return fmt.Sprintf("error event: %.40q", e.Type)
}

// statuses has the HTTP status of each type and code of an error.
var statuses = map[string]int{
	// Claude, https://docs.anthropic.com/en/api/errors
	"invalid_request_error": http.StatusBadRequest,
	"authentication_error":  http.StatusUnauthorized,
	"billing_error":         http.StatusPaymentRequired,
	"permission_error":      http.StatusForbidden,
	"not_found_error":       http.StatusNotFound,
	"conflict_error":        http.StatusConflict,
	"request_too_large":     http.StatusRequestEntityTooLarge,
	"rate_limit_error":      http.StatusTooManyRequests,
	"api_error":             http.StatusInternalServerError,
	"timeout_error":         http.StatusGatewayTimeout,
	"overloaded_error":      529,

	// OpenAI, https://platform.openai.com/docs/guides/error-codes, the codes of
	// a failed response, and what services with the same API say
	"invalid_request":                      http.StatusBadRequest,
	"invalid_prompt":                       http.StatusBadRequest,
	"invalid_value":                        http.StatusBadRequest,
	"invalid_type":                         http.StatusBadRequest,
	"invalid_image":                        http.StatusBadRequest,
	"invalid_image_format":                 http.StatusBadRequest,
	"invalid_image_mode":                   http.StatusBadRequest,
	"invalid_image_url":                    http.StatusBadRequest,
	"invalid_base64_image":                 http.StatusBadRequest,
	"image_content_policy_violation":       http.StatusBadRequest,
	"image_file_not_found":                 http.StatusBadRequest,
	"image_file_too_large":                 http.StatusBadRequest,
	"image_parse_error":                    http.StatusBadRequest,
	"image_too_large":                      http.StatusBadRequest,
	"image_too_small":                      http.StatusBadRequest,
	"empty_image_file":                     http.StatusBadRequest,
	"failed_to_download_image":             http.StatusBadRequest,
	"unsupported_image_media_type":         http.StatusBadRequest,
	"unsupported_parameter":                http.StatusBadRequest,
	"unsupported_value":                    http.StatusBadRequest,
	"unknown_parameter":                    http.StatusBadRequest,
	"missing_required_parameter":           http.StatusBadRequest,
	"string_above_max_length":              http.StatusBadRequest,
	"context_length_exceeded":              http.StatusBadRequest,
	"content_filter":                       http.StatusBadRequest,
	"content_policy_violation":             http.StatusBadRequest,
	"authentication":                       http.StatusUnauthorized,
	"invalid_authentication":               http.StatusUnauthorized,
	"invalid_api_key":                      http.StatusUnauthorized,
	"permission_denied":                    http.StatusForbidden,
	"insufficient_permissions":             http.StatusForbidden,
	"unsupported_country_region_territory": http.StatusForbidden,
	"not_found":                            http.StatusNotFound,
	"model_not_found":                      http.StatusNotFound,
	"request_timeout":                      http.StatusRequestTimeout,
	"rate_limit_exceeded":                  http.StatusTooManyRequests,
	"tokens":                               http.StatusTooManyRequests,
	"requests":                             http.StatusTooManyRequests,
	"slow_down":                            http.StatusTooManyRequests,
	"insufficient_quota":                   http.StatusTooManyRequests,
	"quota_exceeded":                       http.StatusTooManyRequests,
	"credit_balance_exhausted":             http.StatusTooManyRequests,
	"server_error":                         http.StatusInternalServerError,
	"internal_error":                       http.StatusInternalServerError,
	"internal_server_error":                http.StatusInternalServerError,
	"bad_gateway":                          http.StatusBadGateway,
	"service_unavailable":                  http.StatusServiceUnavailable,
	"service_unavailable_error":            http.StatusServiceUnavailable,
	"server_is_overloaded":                 http.StatusServiceUnavailable,
	"engine_overloaded":                    http.StatusServiceUnavailable,
	"engine_overloaded_error":              http.StatusServiceUnavailable,
	"gateway_timeout":                      http.StatusGatewayTimeout,
	"timeout":                              http.StatusGatewayTimeout,
	"vector_store_timeout":                 http.StatusGatewayTimeout,
}

// eventError returns the error that an event reports, or nil. Claude names the
// event "error", as OpenAI's Responses do, or "response.failed". OpenAI's other
// streams, and those like them, have no names but an error object in the data.
func eventError(event string, data []byte) *EventError {
	switch event {
	case "error", "response.failed":
		var r report
		r.read(data)
		return r.eventError()
	case "", "message": // the format's own name for an event without one
		if !mayHoldError(data) {
			return nil
		}
		var r report
		if r.read(data); r.found {
			return r.eventError()
		}
	}
	return nil
}

// mayHoldError is a cheap look for a member "error" that is an object. Most
// events of a stream are not worth more.
func mayHoldError(data []byte) bool {
	const space = " \t\r\n"
	for {
		_, after, found := bytes.Cut(data, []byte(`"error"`))
		if !found {
			return false
		}
		value, colon := bytes.CutPrefix(bytes.TrimLeft(after, space), []byte(":"))
		if colon && bytes.HasPrefix(bytes.TrimLeft(value, space), []byte("{")) {
			return true
		}
		data = after
	}
}

// A report is what an error event says. What stands in the error object goes
// before what stands around it.
type report struct {
	found         bool // there is an error object
	inside, about words
}

// The words of an error; whole numbers are kept as text, too.
type words struct{ kind, code, status string }

// read takes what it understands from data, which may have been cut short.
func (r *report) read(data []byte) {
	dec := json.NewDecoder(bytes.NewReader(data))
	dec.UseNumber()
	if token, err := dec.Token(); err == nil && token == json.Delim('{') {
		r.members(dec, &r.about)
	}
}

// members reads what follows the opening brace of an object whose words go into
// w. It reports false when the data is at its end, or is no JSON.
func (r *report) members(dec *json.Decoder, w *words) bool {
	for dec.More() {
		name, err := dec.Token()
		if err != nil {
			return false
		}
		value, err := dec.Token()
		if err != nil {
			return false
		}
		switch value := value.(type) {
		case json.Delim:
			if !r.nested(dec, w, name, value) {
				return false
			}
		case string:
			w.note(name, value)
		case json.Number:
			if _, err := value.Int64(); err == nil {
				w.note(name, value.String())
			}
		}
	}
	_, err := dec.Token() // the closing brace
	return err == nil
}

// nested reads an object or array that is a member of another.
func (r *report) nested(dec *json.Decoder, w *words, name json.Token, open json.Delim) bool {
	around := w != &r.inside
	switch {
	case open == '{' && around && name == "error":
		r.found = true
		return r.members(dec, &r.inside)
	case open == '{' && w == &r.about && name == "response":
		var response words // an object with words of its own, which are not about the error
		return r.members(dec, &response)
	}
	for depth := 1; depth > 0; {
		token, err := dec.Token()
		if err != nil {
			return false
		}
		switch token {
		case json.Delim('{'), json.Delim('['):
			depth++
		case json.Delim('}'), json.Delim(']'):
			depth--
		}
	}
	return true
}

func (w *words) note(name json.Token, value string) {
	switch name {
	case "type":
		w.kind = value
	case "code":
		w.code = value
	case "status":
		w.status = value
	}
}

func (r *report) eventError() *EventError {
	w := r.inside
	if !r.found {
		w = r.about
		if w.kind == "error" || w.kind == "response.failed" {
			w.kind = "" // the event's type, not the error's
		}
	}
	e := new(EventError)
	for _, word := range []string{w.kind, w.code, w.status} {
		if _, err := strconv.Atoi(word); err != nil && e.Type == "" {
			e.Type = word
		}
	}
	// A code says more than a type: OpenAI calls both an unknown model and a
	// wrong key an invalid_request_error.
	for _, word := range []string{w.code, w.status, w.kind} {
		if e.Status == 0 {
			e.Status = statusOf(word)
		}
	}
	return e
}

func statusOf(word string) int {
	if n, err := strconv.Atoi(word); err == nil && n >= 400 && n <= 599 {
		return n
	}
	return statuses[word]
}
