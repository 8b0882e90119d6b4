package fault

import (
	"fmt"
	"net/http"
	"net/textproto"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"
)

// refused reports whether t says that net/http, or x/net/http2 in its place,
// does not send req as it stands.
//
// What the text complains of has to be there in the request. Only if the text
// cannot be a proxy's, or if nobody knows the request, it is enough that the whole
// of it is one that net/http writes: a Layer may have sent another request.
func refused(req *http.Request, t text) bool {
	s := withoutPrefix(t.s)
	if req != nil && slices.Contains(complaints(req), s) || t.own && t.s == http2Prefix+errTooManyFields {
		return true
	}
	return (t.own || req == nil || !mayConnect(req)) && isComplaint(s)
}

// withoutPrefix drops what HTTP/2 puts before some of its texts, but not in every
// version.
func withoutPrefix(s string) string { return strings.TrimPrefix(s, http2Prefix) }

// What net/http says about requests, apart from what it quotes.
const (
	noURL        = "http: nil Request.URL"
	noHeader     = "http: nil Request.Header"
	noHost       = "http: no Host in request URL"
	noHostAtAll  = "http: Request.Write on Request with no Host or URL set"
	badHost      = "http: invalid Host header"
	badHost2     = "invalid Host header"
	control      = "net/http: can't write control character in Request.URL"
	requestURI   = "http: Request.RequestURI can't be set in client requests"
	badScheme2   = "unsupported scheme"
	notEncrypted = "unencrypted HTTP/2 not enabled"
	badProtocol  = "invalid :protocol header in non-CONNECT request"
	noExtended   = "net/http: extended connect not supported by peer"
)

// complaints returns what net/http says about each thing in req that it refuses.
func complaints(req *http.Request) []string {
	if req.URL == nil {
		return []string{noURL, noHostAtAll}
	}
	if req.Header == nil {
		return []string{noHeader}
	}
	all := slices.Concat(aboutFields("header", req.Header), aboutFields("trailer", req.Trailer), aboutURL(req), aboutHTTP2(req))
	if req.Method != "" && !isToken(req.Method) {
		all = append(all, fmt.Sprintf("net/http: invalid method %q", req.Method))
	}
	if req.ContentLength != 0 && req.Body == nil {
		all = append(all, fmt.Sprintf("http: Request.ContentLength=%d with nil Body", req.ContentLength))
	}
	if req.RequestURI != "" {
		all = append(all, requestURI)
	}
	for key := range req.Trailer {
		if key = textproto.CanonicalMIMEHeaderKey(key); isFraming(key) {
			all = append(all, fmt.Sprintf("invalid Trailer key %q", key))
		}
	}
	return all
}

// aboutFields returns what net/http says about the fields of a header or trailer.
func aboutFields(where string, fields http.Header) (all []string) {
	for name, values := range fields {
		if !isToken(name) {
			all = append(all, fmt.Sprintf("net/http: invalid %s field name %q", where, name),
				fmt.Sprintf("invalid HTTP %s name %q", where, name))
		}
		if slices.ContainsFunc(values, hasControl) {
			all = append(all, fmt.Sprintf("net/http: invalid %s field value for %q", where, name),
				fmt.Sprintf("invalid HTTP %s value for header %q", where, name))
		}
	}
	return all
}

func aboutURL(req *http.Request) (all []string) {
	u := req.URL
	switch u.Scheme {
	case "https":
	case "http":
		all = append(all, notEncrypted)
	default:
		all = append(all, fmt.Sprintf("unsupported protocol scheme %q", u.Scheme), badScheme2)
	}
	if u.Host == "" {
		all = append(all, noHost)
	}
	if host := req.Host; !isHost(host) || host == "" && !isHost(u.Host) {
		all = append(all, badHost, badHost2)
	}
	for _, s := range []string{u.RequestURI(), u.Opaque, u.Scheme} {
		if strings.ContainsFunc(s, isControl) {
			all = append(all, control)
		}
	}
	return all
}

// aboutHTTP2 returns what net/http refuses only once it has an HTTP/2 connection.
func aboutHTTP2(req *http.Request) (all []string) {
	for _, name := range []string{"Upgrade", "Transfer-Encoding", "Connection"} {
		if values := req.Header[name]; isForHTTP1(name, values) {
			all = append(all, fmt.Sprintf("invalid %s request header: %q", name, values))
		}
	}
	if protocol := req.Header[":protocol"]; len(protocol) > 0 && protocol[0] != "" {
		if req.Method == http.MethodConnect {
			all = append(all, noExtended)
		} else {
			all = append(all, badProtocol)
		}
	}
	if path := req.URL.RequestURI(); !isPath(path) {
		all = append(all, fmt.Sprintf("invalid request :path %q", path),
			fmt.Sprintf("invalid request :path %q from URL.Opaque = %q", path, req.URL.Opaque))
	}
	return all
}

// isForHTTP1 reports whether HTTP/2 has no place for a field that is about one
// connection.
func isForHTTP1(name string, values []string) bool {
	if len(values) == 0 {
		return false
	}
	first := strings.ToLower(values[0])
	switch name {
	case "Upgrade":
		return values[0] != "" && values[0] != "chunked"
	case "Transfer-Encoding":
		return len(values) > 1 || values[0] != "" && values[0] != "chunked"
	}
	return len(values) > 1 || first != "" && first != "close" && first != "keep-alive"
}

func isFraming(key string) bool {
	return key == "Transfer-Encoding" || key == "Trailer" || key == "Content-Length"
}

func isPath(s string) bool { return strings.HasPrefix(s, "/") || s == "*" }

func isControl(r rune) bool { return r < ' ' || r == 0x7f }

// hasControl reports whether v cannot be the value of a field.
func hasControl(v string) bool {
	return strings.ContainsFunc(v, func(r rune) bool { return isControl(r) && r != '\t' })
}

// isToken reports whether s is a token of RFC 9110, section 5.6.2.
func isToken(s string) bool {
	return s != "" && !strings.ContainsFunc(s, func(r rune) bool {
		return r <= ' ' || r >= 0x7f || strings.ContainsRune(`"(),/:;<=>?@[\]{}`, r)
	})
}

// isHost reports whether net/http sends s as a Host. It writes one beyond ASCII in
// another form.
func isHost(s string) bool {
	return !strings.ContainsFunc(s, func(r rune) bool {
		return r <= ' ' || r == 0x7f || r < utf8.RuneSelf && strings.ContainsRune("\"#/<>?@\\^`{|}", r)
	})
}

// A shape is a text that net/http writes about a request, followed by one thing
// of the request, quoted.
type shape struct {
	before string
	wrong  func(string) bool // the quoted thing is one that net/http refuses
}

func isBadName(s string) bool  { return !isToken(s) }
func isBadPath(s string) bool  { return !isPath(s) }
func isFieldKey(s string) bool { return isToken(s) || s == ":protocol" }
func isBadScheme(s string) bool {
	return s != "http" && s != "https"
}

var shapes = []shape{
	{"net/http: invalid header field name ", isBadName},
	{"net/http: invalid header field value for ", isToken},
	{"net/http: invalid trailer field name ", isBadName},
	{"net/http: invalid trailer field value for ", isToken},
	{"net/http: invalid method ", isBadName},
	{"unsupported protocol scheme ", isBadScheme},
	{"invalid HTTP header name ", isBadName},
	{"invalid HTTP header value for header ", isFieldKey},
	{"invalid HTTP trailer name ", isBadName},
	{"invalid HTTP trailer value for header ", isFieldKey},
	{"invalid Trailer key ", isFraming},
	{"invalid request :path ", isBadPath},
}

// isComplaint reports whether the whole of s is a text by which net/http refuses a
// request.
func isComplaint(s string) bool {
	switch s {
	case noURL, noHeader, noHost, noHostAtAll, badHost, badHost2, control, requestURI,
		badScheme2, notEncrypted, badProtocol, noExtended:
		return true
	}
	for _, shape := range shapes {
		if quoted, ok := strings.CutPrefix(s, shape.before); ok {
			what, rest, ok := unquote(quoted)
			return ok && shape.wrong(what) && (rest == "" || isOpaque(shape, rest))
		}
	}
	if length, ok := strings.CutPrefix(s, "http: Request.ContentLength="); ok {
		length, ok = strings.CutSuffix(length, " with nil Body")
		return ok && isNumber(length)
	}
	for _, name := range []string{"Upgrade", "Transfer-Encoding", "Connection"} {
		if list, ok := strings.CutPrefix(s, "invalid "+name+" request header: "); ok {
			return isForHTTP1(name, unquoteList(list))
		}
	}
	return false
}

// isOpaque reports whether rest is what net/http adds about a path that it has
// from URL.Opaque.
func isOpaque(s shape, rest string) bool {
	opaque, ok := strings.CutPrefix(rest, " from URL.Opaque = ")
	_, rest, whole := unquote(opaque)
	return s.before == "invalid request :path " && ok && whole && rest == ""
}

// unquote reads what %q has written at the beginning of s.
func unquote(s string) (what, rest string, ok bool) {
	quoted, err := strconv.QuotedPrefix(s)
	if err != nil {
		return "", "", false
	}
	what, err = strconv.Unquote(quoted)
	return what, s[len(quoted):], err == nil && strconv.Quote(what) == quoted
}

// unquoteList reads the whole of s as what %q makes of a []string; nil if it is
// nothing like that.
func unquoteList(s string) (values []string) {
	s, ok := strings.CutPrefix(s, "[")
	for ok {
		var what string
		if what, s, ok = unquote(s); !ok {
			break
		}
		values = append(values, what)
		if s == "]" {
			return values
		}
		s, ok = strings.CutPrefix(s, " ")
	}
	return nil
}

func isNumber(s string) bool {
	n, err := strconv.ParseInt(s, 10, 64)
	return err == nil && strconv.FormatInt(n, 10) == s
}

// isIDNA reports whether err is about a host that has no form in ASCII. The
// package that says so is part of net/http, and of x/net.
func isIDNA(err error) bool {
	return contains(err, func(err error) bool {
		t := reflect.TypeOf(err)
		if t.Kind() == reflect.Pointer {
			t = t.Elem()
		}
		return strings.HasSuffix(t.PkgPath(), "golang.org/x/net/idna")
	})
}

// wrongBody reports whether t says that the body of req, or what follows it, is
// not what the request has announced. Such a text cannot be checked against the
// request any more, so it must be one that no proxy can have written.
func wrongBody(req *http.Request, t text) bool {
	trusted := t.own || req == nil || !mayConnect(req)
	switch {
	case t.s == errBodyTooLong:
		return trusted || t.leaf == known().tooLong
	case withoutPrefix(t.s) == errTooManyFields:
		return trusted || t.leaf == known().tooManyFields
	case !trusted:
		return false
	}
	numbers, ok := strings.CutPrefix(t.s, "http: ContentLength=")
	announced, length, two := strings.Cut(numbers, " with Body length ")
	return ok && two && isNumber(announced) && isNumber(length) && announced != length
}
