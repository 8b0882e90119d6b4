package fault

import (
	"errors"
	"fmt"
	"net"
	"net/http"
	"reflect"
	"strconv"
	"strings"
	"sync"
)

// neverSent reports whether err says that nothing of the request has reached the
// service. Of joined errors each one has to say so.
func neverSent(err error) bool {
	if several, ok := err.(interface{ Unwrap() []error }); ok {
		for _, err := range several.Unwrap() {
			if !neverSent(err) {
				return false
			}
		}
		return len(several.Unwrap()) > 0
	}
	if op, ok := err.(*net.OpError); ok && (op.Op == "dial" || op.Op == "proxyconnect" || isSOCKS(op)) {
		return true
	}
	if _, ok := err.(*net.DNSError); ok || isNothingWritten(err) || isOf(err, "net/http", "tlsHandshakeTimeoutError") {
		return true
	}
	if stream, ok := asStream(err); ok {
		return stream.Code == refusedStream
	}
	if next := errors.Unwrap(err); next != nil {
		return neverSent(next)
	}
	return reflect.TypeOf(err) == errorString && unprocessed(err.Error())
}

// isOf reports whether err is of a type that its package keeps to itself.
func isOf(err error, pkg, name string) bool {
	t := reflect.TypeOf(err)
	return t.Name() == name && t.PkgPath() == pkg
}

// isNothingWritten reports whether err is how net/http marks that a connection
// has broken before the first byte of the request was written.
func isNothingWritten(err error) bool { return isOf(err, "net/http", "nothingWrittenError") }

// toProxy reports whether err came on the way to a proxy.
func toProxy(err error) bool {
	return contains(err, func(err error) bool {
		op, ok := err.(*net.OpError)
		return ok && op.Op == "proxyconnect"
	})
}

// A streamError is what an HTTP/2 stream error of net/http or of x/net/http2
// turns into for errors.As: they look for a struct with these fields.
type streamError struct {
	StreamID uint32
	Code     uint32
	Cause    error
}

func (streamError) Error() string { return "HTTP/2 stream error" }

// asStream returns err itself as a streamError, if it is one.
func asStream(err error) (stream streamError, ok bool) {
	as, ok := err.(interface{ As(any) bool })
	return stream, ok && as.As(&stream)
}

const refusedStream = 0x7 // RFC 9113, section 8.7

const (
	goAway     = "http2: Transport received Server's graceful shutdown GOAWAY"
	goAwayCode = "http2: Transport received GOAWAY from server ErrCode:"
	unusable   = "http2: client conn not usable"
	noConn     = "http2: client conn could not be established"
)

// unprocessed reports whether s is one of the texts by which HTTP/2 tells that
// the request got no stream, or one above the last that the server looks at. A
// proxy could write them, too, but whoever gets its answer has sent nothing.
func unprocessed(s string) bool {
	if s == goAway || s == unusable || s == noConn {
		return true
	}
	if code, ok := strings.CutPrefix(s, goAwayCode); ok {
		return errorCodes[code] || isUnknownCode(code)
	}
	// net/http would have sent the request again, but its body has no GetBody.
	why, ok := strings.CutPrefix(s, "http2: Transport: cannot retry err [")
	why, whole := strings.CutSuffix(why, "] after Request.Body was written; define Request.GetBody to avoid this error")
	if !ok || !whole {
		return false
	}
	return why == goAway || why == unusable || isRefusedStream(why)
}

// isRefusedStream reports whether s is the text of a REFUSED_STREAM.
func isRefusedStream(s string) bool {
	id, ok := strings.CutPrefix(strings.TrimSuffix(s, "; received from peer"), "stream error: stream ID ")
	id, refused := strings.CutSuffix(id, "; REFUSED_STREAM")
	_, err := strconv.ParseUint(id, 10, 32)
	return ok && refused && err == nil
}

// errorCodes has the names of HTTP/2's error codes (RFC 9113, section 7).
var errorCodes = map[string]bool{
	"NO_ERROR": true, "PROTOCOL_ERROR": true, "INTERNAL_ERROR": true, "FLOW_CONTROL_ERROR": true,
	"SETTINGS_TIMEOUT": true, "STREAM_CLOSED": true, "FRAME_SIZE_ERROR": true, "REFUSED_STREAM": true,
	"CANCEL": true, "COMPRESSION_ERROR": true, "CONNECT_ERROR": true, "ENHANCE_YOUR_CALM": true,
	"INADEQUATE_SECURITY": true, "HTTP_1_1_REQUIRED": true,
}

func isUnknownCode(s string) bool {
	var code uint32
	_, err := fmt.Sscanf(s, "unknown error code 0x%x", &code)
	return err == nil && s == fmt.Sprintf("unknown error code 0x%x", code)
}

// connectStatus returns the status with which a proxy refused CONNECT, or 0. All
// that net/http keeps of its answer is the reason phrase, as an error without a
// type. A phrase of the proxy's own making cannot be told from other errors.
func connectStatus(req *http.Request, t text) int {
	if t.own || !mayConnect(req) {
		return 0
	}
	return phrases()[strings.ToLower(t.s)]
}

// phrases has the status of each usual reason phrase, in lower case.
var phrases = sync.OnceValue(func() map[string]int {
	all := map[string]int{
		// Those of RFC 9110 where net/http has older ones.
		"content too large": 413, "uri too long": 414, "range not satisfiable": 416, "unprocessable content": 422,
		// What nginx has for 405, and so for every CONNECT.
		"not allowed": 405,
	}
	for status := 201; status < 600; status++ {
		if phrase := http.StatusText(status); phrase != "" {
			all[strings.ToLower(phrase)] = status
		}
	}
	return all
})

// kindOfConnect says what a proxy's status means. Three of the 4xx ask for
// another attempt.
func kindOfConnect(status int) Kind {
	switch {
	case status == http.StatusRequestTimeout, status == http.StatusTooEarly, status == http.StatusTooManyRequests:
		return Service
	case status >= 400 && status < 500:
		return Proxy
	}
	return Service
}

func isSOCKS(op *net.OpError) bool { return strings.HasPrefix(op.Op, "socks ") }

// refusedBySOCKS reports whether a SOCKS proxy refuses for good. Its answers are
// numbers, of which net/http makes these texts.
func refusedBySOCKS(err error) bool {
	return contains(err, func(err error) bool {
		op, ok := err.(*net.OpError)
		if !ok || !isSOCKS(op) || reflect.TypeOf(op.Err) != errorString {
			return false
		}
		switch op.Err.Error() {
		case "no acceptable authentication methods", "username/password authentication failed", "invalid username/password",
			"unknown error connection not allowed by ruleset", "unknown error command not supported",
			"unknown error address type not supported":
			return true
		}
		return false
	})
}
