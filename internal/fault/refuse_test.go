package fault

import (
	"errors"
	"io"
	"log"
	"net"
	"net/http"
	"net/url"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/tripper-go/tripper/internal/replay"
)

var quiet = log.New(io.Discard, "", 0)

// A refusal is a change of a valid request that net/http does not accept.
type refusal struct {
	change func(*http.Request)
	sent   bool // something of the request may have been sent
}

// Over either protocol.
var refusals = map[string]refusal{
	"no URL":        {change: func(r *http.Request) { r.URL = nil }},
	"no header":     {change: func(r *http.Request) { r.Header = nil }},
	"field name":    {change: func(r *http.Request) { r.Header["a b"] = nil }},
	"empty name":    {change: func(r *http.Request) { r.Header[""] = []string{"x"} }},
	"name in UTF-8": {change: func(r *http.Request) { r.Header["Größe"] = nil }},
	"quoted name":   {change: func(r *http.Request) { r.Header["a\"\\\x00\n"] = nil }},
	"field value":   {change: func(r *http.Request) { r.Header["A"] = []string{"fine", "a\nb"} }},
	"value DEL":     {change: func(r *http.Request) { r.Header["A"] = []string{"\x7f"} }},
	"trailer name":  {change: func(r *http.Request) { r.Trailer = http.Header{"a b": nil} }},
	"trailer value": {change: func(r *http.Request) { r.Trailer = http.Header{"A": {"\x00"}} }},
	":protocol":     {change: func(r *http.Request) { r.Header[":protocol"] = []string{"websocket"} }},
	"no host":       {change: func(r *http.Request) { r.URL.Host = "" }},
	"scheme":        {change: func(r *http.Request) { r.URL.Scheme = "ftp" }},
	"no scheme":     {change: func(r *http.Request) { r.URL.Scheme = "" }},
	"Trailer key": {change: func(r *http.Request) {
		body(r, "x")
		r.ContentLength, r.Trailer = -1, http.Header{"trailer": nil}
	}},
	"host not in UTF-8": {change: func(r *http.Request) { r.Host = "xn--a\u0300\xff.example" }},
	"body longer":       {change: func(r *http.Request) { body(r, "12345"); r.ContentLength = 4 }, sent: true},
	"body fails": {change: func(r *http.Request) {
		r.Method, r.ContentLength = http.MethodPost, -1
		r.Body = failing{&replay.ReadError{Err: io.ErrUnexpectedEOF}}
	}, sent: true},
}

// Over HTTP/1 only.
var refusals1 = map[string]refusal{
	"method":                 {change: func(r *http.Request) { r.Method = "G T" }},
	"quoted method":          {change: func(r *http.Request) { r.Method = `"` }},
	"length without body":    {change: func(r *http.Request) { r.ContentLength = 5 }},
	"no length without body": {change: func(r *http.Request) { r.ContentLength = -1 }},
	"control in query":       {change: func(r *http.Request) { r.URL.RawQuery = "a\x01" }},
	"control in opaque":      {change: func(r *http.Request) { r.URL.Opaque = "//host/\x7f" }},
	"body shorter":           {change: func(r *http.Request) { body(r, "1234"); r.ContentLength = 9 }, sent: true},
	"no body at all":         {change: func(r *http.Request) { body(r, ""); r.ContentLength = 9 }, sent: true},
}

// Over HTTP/2 only.
var refusals2 = map[string]refusal{
	"h2c": {change: func(r *http.Request) {
		r.Header = http.Header{"Connection": {"Upgrade, HTTP2-Settings"}, "Upgrade": {"h2c"}, "Http2-Settings": {"AAMAAABk"}}
	}},
	"upgrades":       {change: func(r *http.Request) { r.Header["Upgrade"] = []string{"a\"b", "c d"} }},
	"Connection":     {change: func(r *http.Request) { r.Header["Connection"] = []string{"x-hop"} }},
	"two of those":   {change: func(r *http.Request) { r.Header["Connection"] = []string{"close", "close"} }},
	"encoding":       {change: func(r *http.Request) { r.Header["Transfer-Encoding"] = []string{"gzip"} }},
	"Host":           {change: func(r *http.Request) { r.Host = "a b" }},
	"path":           {change: func(r *http.Request) { r.URL.Path = "no-slash" }},
	"path of opaque": {change: func(r *http.Request) { r.URL.Opaque = `mail"to` }},
	"big header":     {change: func(r *http.Request) { r.Header.Set("A", strings.Repeat("a", 10<<10)) }},
	"big trailer": {change: func(r *http.Request) {
		body(r, "x")
		r.ContentLength, r.Trailer = -1, http.Header{"A": {strings.Repeat("a", 10<<10)}}
	}, sent: true},
}

type failing struct{ err error }

func (f failing) Read([]byte) (int, error) { return 0, f.err }
func (f failing) Close() error             { return nil }

func body(r *http.Request, s string) {
	r.Method, r.Body, r.ContentLength = http.MethodPost, io.NopCloser(plain(s)), int64(len(s))
}

func TestWhatNetHTTPRefusesIsTheCallersFault(t *testing.T) {
	for protocol, tables := range map[string][]map[string]refusal{
		"HTTP/1.1": {refusals, refusals1}, "HTTP/1.1 with TLS": {refusals, refusals1}, "HTTP/2.0": {refusals, refusals2},
	} {
		srv, tr := newServer(t, protocol == "HTTP/2.0", protocol != "HTTP/1.1")
		for _, table := range tables {
			for name, r := range table {
				t.Run(protocol+" "+name, func(t *testing.T) {
					// From here on the limits of the server are known.
					resp, err := tr.RoundTrip(newRequest(t, http.MethodGet, srv.URL, nil))
					require.NoError(t, err)
					resp.Body.Close()
					require.Contains(t, protocol, resp.Proto)
					r.test(t, tr, srv.URL)
				})
			}
		}
	}
}

func (r refusal) test(t *testing.T, tr http.RoundTripper, url string) {
	var req *http.Request
	err := net.ErrClosed
	// Once in a long while net/http itself finds the connection closed by its own
	// hand, and forgets why.
	for n := 0; n < 10 && errors.Is(err, net.ErrClosed); n++ {
		req = newRequest(t, http.MethodGet, url, nil)
		r.change(req)
		err = errorOf(t, tr, req)
	}
	for _, err := range asReturned(err) {
		if f := Of(req, err); r.sent {
			assert.Equal(t, Caller, f.Kind, "%v", err)
		} else {
			assert.Equal(t, Fault{Kind: Caller, NeverSent: true}, f, "%T %v", err, err)
		}
		assert.Equal(t, Caller, Of(nil, err).Kind, "nobody knows the request: %v", err)
	}
	// The same error says nothing about another request, if a proxy can write it.
	for _, said := range textsOf(err) {
		other := newRequest(t, http.MethodPost, "https://api.example.com/", plain("x"))
		assert.Equal(t, Service, Of(other, errors.New(said.s)).Kind, "%v", err)
	}
}

// A request that goes on over a connection that was used before meets the same.
func TestRefusalsByWayOfAProxy(t *testing.T) {
	addr := listen(t, answering("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"))
	tr := newTransport(t, "http://"+addr)
	req := newRequest(t, http.MethodGet, "http://api.example.com/", nil)
	req.Host = "a b"
	assert.Equal(t, Fault{Kind: Caller, NeverSent: true}, Of(req, errorOf(t, tr, req)))
}

func TestRefusalsOfAnHTTPClient(t *testing.T) {
	client := &http.Client{}
	req := newRequest(t, http.MethodGet, "https://api.example.com/", nil)
	req.RequestURI = "/"
	_, err := client.Do(req)
	assert.Equal(t, Fault{Kind: Caller, NeverSent: true}, Of(req, err))
	_, err = client.Do(&http.Request{})
	assert.Equal(t, Fault{Kind: Caller, NeverSent: true}, Of(&http.Request{}, err))
}

// A Layer may send another request than the one that it got.
func TestRefusalsOfAnotherRequest(t *testing.T) {
	srv, tr := newServer(t, true, true)
	req := newRequest(t, http.MethodGet, srv.URL, nil)
	req.Header.Set("Upgrade", "h2c")
	assert.Equal(t, Caller, Of(newRequest(t, http.MethodGet, srv.URL, nil), errorOf(t, tr, req)).Kind)
}

// x/net/http2 puts its prefix before other texts, or none.
func TestTextsOfXNet(t *testing.T) {
	req := newRequest(t, http.MethodGet, "ftp://api.example.com/", nil)
	req.URL.Path, req.Header = "no-slash", http.Header{"Upgrade": {"h2c"}, "a b": {"\n"}, ":protocol": {"x"}}
	req.Trailer = http.Header{"Content-Length": nil}
	for _, s := range []string{
		`http2: invalid Upgrade request header: ["h2c"]`, `invalid request :path "no-slash"`, `http2: unsupported scheme`,
		`invalid HTTP header name "a b"`, `invalid HTTP header value for header "a b"`, `invalid Trailer key "Content-Length"`,
		`http2: invalid :protocol header in non-CONNECT request`,
	} {
		assert.Equal(t, Caller, Of(req, errors.New(s)).Kind, s)
	}
	plain := newRequest(t, http.MethodGet, "http://api.example.com/", nil)
	assert.Equal(t, Caller, Of(plain, errors.New("http2: unencrypted HTTP/2 not enabled")).Kind)
	connect := newRequest(t, http.MethodConnect, "https://api.example.com/", nil)
	connect.Header[":protocol"] = []string{"websocket"}
	assert.Equal(t, Caller, Of(connect, errors.New("net/http: extended connect not supported by peer")).Kind)
}

// Texts that are almost those of net/http.
var almost = []string{
	"", "http2: ", `net/http: invalid method "GET"`, `net/http: invalid method "G T`, `net/http: invalid method "G T" `,
	`net/http: invalid method "G T" from URL.Opaque = "x"`, "net/http: invalid method `G T`", `net/http: invalid method 'G'`,
	`net/http: invalid header field name "Accept"`, `net/http: invalid header field name a b`, ` net/http: invalid method "G T"`,
	`unsupported protocol scheme "https"`, `unsupported protocol scheme "\x66tp"`, `invalid request :path "/"`,
	`invalid request :path "x" from URL.Opaque = y`, `invalid Trailer key "Etag"`, `invalid Upgrade request header: ["h2c"`,
	`invalid Upgrade request header: []`, `invalid Upgrade request header: ["chunked"]`, `invalid Upgrade request header: "h2c"`,
	`invalid Upgrade request header: ["h2c",]`, `invalid Connection request header: ["Close"]`, `http: nil Request.URL.`,
	`http: Request.ContentLength=x with nil Body`, `http: Request.ContentLength=05 with nil Body`, `http: ContentLength=4 with Body length 4`,
	`http: ContentLength=9 with Body length 4 `, `http: ContentLength= with Body length `, `malformed HTTP response "http: nil Request.URL"`,
}

func TestTextsThatAreAlmostThose(t *testing.T) {
	for _, s := range almost {
		assert.Equal(t, Service, Of(nil, errors.New(s)).Kind, "%q", s)
		assert.Equal(t, Service, Of(newRequest(t, http.MethodGet, "http://api.example.com/", nil), errors.New(s)).Kind, "%q", s)
	}
}

type typed string

func (e typed) Error() string { return string(e) }

func TestOtherTypesAreNotReadAsTexts(t *testing.T) {
	for _, s := range []string{noURL, errCancelled, goAway, `net/http: invalid method "G T"`, "Forbidden"} {
		assert.Equal(t, Fault{}, Of(nil, typed(s)), s)
		assert.Equal(t, Fault{}, Of(nil, &url.Error{Op: "Get", URL: "https://x/", Err: typed(s)}), s)
	}
}
