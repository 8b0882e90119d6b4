package tripper

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/http/cookiejar"
	"net/http/httptest"
	"net/http/httptrace"
	"net/http/httputil"
	"net/textproto"
	"net/url"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// transportFunc is a RoundTripper made of a function.
type transportFunc func(*http.Request) (*http.Response, error)

func (f transportFunc) RoundTrip(req *http.Request) (*http.Response, error) { return f(req) }

// transportBody is a body that counts how often it is closed, and gives nothing
// afterwards.
type transportBody struct {
	io.Reader
	closes atomic.Int32
}

func (b *transportBody) Read(p []byte) (int, error) {
	if b.closes.Load() > 0 {
		return 0, http.ErrBodyReadAfterClose
	}
	return b.Reader.Read(p)
}

func (b *transportBody) Close() error { b.closes.Add(1); return nil }

func transportAnswer(status int, body string, header ...string) *http.Response {
	resp := &http.Response{
		StatusCode: status, Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1, ContentLength: -1,
		Header: http.Header{}, Body: &transportBody{Reader: strings.NewReader(body)},
	}
	for i := 0; i+1 < len(header); i += 2 {
		resp.Header.Set(header[i], header[i+1])
	}
	return resp
}

// transportScript is a base that treats each request as net/http does: it
// reads the body, closes it, and answers. An answer is a status, an error, or
// a function; the last one stays.
type transportScript struct {
	answers []any

	mu        sync.Mutex
	requests  []*http.Request
	bodies    []string
	responses []*http.Response
	pages     []io.ReadCloser // the bodies of the responses, as they were
}

func (s *transportScript) RoundTrip(req *http.Request) (*http.Response, error) {
	var body []byte
	if req.Body != nil {
		body, _ = io.ReadAll(req.Body)
		req.Body.Close()
	}
	s.mu.Lock()
	answer := s.answers[min(len(s.requests), len(s.answers)-1)]
	s.requests = append(s.requests, req)
	s.bodies = append(s.bodies, string(body))
	s.mu.Unlock()
	switch a := answer.(type) {
	case error:
		return nil, a
	case func(*http.Request) (*http.Response, error):
		return a(req)
	case *http.Response:
		return s.answer(req, a), nil
	}
	return s.answer(req, transportAnswer(answer.(int), "answer "+strconv.Itoa(len(s.requests)))), nil
}

func (s *transportScript) answer(req *http.Request, resp *http.Response) *http.Response {
	s.mu.Lock()
	defer s.mu.Unlock()
	resp.Request = req
	s.responses = append(s.responses, resp)
	s.pages = append(s.pages, resp.Body)
	return resp
}

// transportEager is a Policy that retries without a wait worth the name, a
// budget or a breaker, and retries every method.
func transportEager() Policy {
	return Policy{
		Retry:   RetryPolicy{MinWait: 1, MaxWait: 1, Jitter: JitterNone, Replay: ReplayAny, Budget: Budget{Ratio: -1}},
		Breaker: BreakerPolicy{FailureThreshold: -1},
	}
}

// transportSteady waits exactly 1s, 2s, 4s and never opens a breaker.
func transportSteady() Policy {
	p := transportEager()
	p.Retry.MinWait, p.Retry.MaxWait = time.Second, 10*time.Second
	return p
}

func transportRequest(t testing.TB, method, target string, body io.Reader) *http.Request {
	req, err := http.NewRequestWithContext(t.Context(), method, target, body)
	require.NoError(t, err)
	return req
}

func transportRead(t testing.TB, resp *http.Response) string {
	text, err := io.ReadAll(resp.Body)
	require.NoError(t, err)
	require.NoError(t, resp.Body.Close())
	return string(text)
}

// transportSurvive runs f where a panic or a Goexit of it does no harm.
func transportSurvive(f func()) (panicked any) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		defer func() { panicked = recover() }()
		f()
	}()
	<-done
	return panicked
}

const transportURL = "http://api.example.com/v1/messages"

// What goes through a Transport looks the same to both ends as over the bare
// base, with and without a retry, on HTTP/1 and HTTP/2.

// transportCase is one exchange. The client's side returns what it saw.
type transportCase struct {
	name    string
	handler http.HandlerFunc
	client  func(t *testing.T, c *http.Client, url string) string
	once    bool // nothing comes after a first 503: it ends the exchange
}

// transportSeen is the server's view of a request.
func transportSeen(r *http.Request, body string) string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s %s %s host=%t length=%d encoding=%v body=%d:%.40q\n",
		r.Proto, r.Method, r.RequestURI, strings.HasPrefix(r.Host, "127.0.0.1:"), r.ContentLength, r.TransferEncoding, len(body), body)
	if !strings.HasPrefix(r.Host, "127.0.0.1:") {
		fmt.Fprintf(&b, "Host %s\n", r.Host)
	}
	for _, h := range []http.Header{r.Header, r.Trailer} {
		for _, k := range slices.Sorted(maps.Keys(h)) {
			fmt.Fprintf(&b, "%s: %q\n", k, h[k])
		}
	}
	return b.String()
}

// transportGot is the client's view of a response.
func transportGot(resp *http.Response, err error) string {
	if err != nil {
		return "error: " + err.Error()
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil && resp.ProtoMajor == 2 {
		err = errors.New("broken off") // its text has the number of the stream
	}
	resp.Header.Del("Date")
	var b strings.Builder
	fmt.Fprintf(&b, "%s %s length=%d encoding=%v uncompressed=%t close=%t body=%q err=%v\n", resp.Proto, resp.Status,
		resp.ContentLength, resp.TransferEncoding, resp.Uncompressed, resp.Close, body, err)
	for _, h := range []http.Header{resp.Header, resp.Trailer} {
		for _, k := range slices.Sorted(maps.Keys(h)) {
			fmt.Fprintf(&b, "%s: %q\n", k, h[k])
		}
	}
	return b.String()
}

func transportDo(method string, body func() io.Reader, change func(*http.Request)) func(*testing.T, *http.Client, string) string {
	return func(t *testing.T, c *http.Client, target string) string {
		var r io.Reader
		if body != nil {
			r = body()
		}
		req := transportRequest(t, method, target+"/path?q=1", r)
		if change != nil {
			change(req)
		}
		resp, err := c.Do(req)
		if err == nil && resp.Request != req && resp.Request.URL.User == nil {
			return "resp.Request is not the caller's own"
		}
		return transportGot(resp, err)
	}
}

func transportOK(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "fine") }

func transportBytes() io.Reader { return strings.NewReader("some bytes") }

// transportPlain hides everything but Read, so there is no GetBody and no length.
func transportPlain() io.Reader { return struct{ io.Reader }{transportBytes()} }

// A transportTrailing body sets the trailer of its request at its end.
type transportTrailing struct {
	io.Reader
	req *http.Request
}

func (b *transportTrailing) Read(p []byte) (int, error) {
	n, err := b.Reader.Read(p)
	if err == io.EOF {
		b.req.Trailer.Set("X-Sum", "42")
	}
	return n, err
}

func transportTrailer(getBody bool) func(*http.Request) {
	return func(req *http.Request) {
		req.Trailer = http.Header{"X-Sum": nil}
		body := func() (io.ReadCloser, error) {
			req.Trailer["X-Sum"] = nil // not to be taken from an attempt before
			return io.NopCloser(&transportTrailing{transportBytes(), req}), nil
		}
		req.Body, _ = body()
		req.ContentLength, req.GetBody = -1, nil
		if getBody {
			req.GetBody = body
		}
	}
}

func transportCases() []transportCase {
	set := func(k, v string) func(*http.Request) { return func(r *http.Request) { r.Header.Set(k, v) } }
	return []transportCase{
		{name: "GET", handler: transportOK, client: transportDo("GET", nil, nil)},
		{name: "HEAD", handler: transportOK, client: transportDo("HEAD", nil, nil)},
		{name: "DELETE with a body", handler: transportOK, client: transportDo("DELETE", transportBytes, nil)},
		{name: "POST with GetBody", handler: transportOK, client: transportDo("POST", transportBytes, nil)},
		{name: "POST chunked", handler: transportOK, client: transportDo("POST", transportPlain, nil)},
		{name: "PUT chunked, of nothing", handler: transportOK, client: transportDo("PUT", func() io.Reader {
			return struct{ io.Reader }{strings.NewReader("")}
		}, nil)},
		{name: "PUT of a known length without GetBody", handler: transportOK, client: transportDo("PUT", transportPlain, func(r *http.Request) {
			r.ContentLength = 10
		})},
		{name: "POST NoBody", handler: transportOK, client: transportDo("POST", func() io.Reader { return http.NoBody }, nil)},
		{name: "POST nil body", handler: transportOK, client: transportDo("POST", nil, nil)},
		{name: "own Host", handler: transportOK, client: transportDo("GET", nil, func(r *http.Request) { r.Host = "other.example.com" })},
		{name: "user info", handler: transportOK, client: transportDo("GET", nil, func(r *http.Request) {
			r.URL.User = url.UserPassword("user", "secret")
		})},
		{name: "Expect, read", handler: transportOK, client: transportDo("POST", transportBytes, set("Expect", "100-continue"))},
		{name: "Expect, recorded", handler: transportOK, client: transportDo("POST", transportPlain, set("Expect", "100-continue"))},
		{name: "request trailer with GetBody", handler: transportOK, client: transportDo("POST", nil, transportTrailer(true))},
		{name: "request trailer without GetBody", handler: transportOK, client: transportDo("POST", nil, transportTrailer(false))},
		{name: "gzip", handler: transportZipped, client: transportDo("GET", nil, nil)},
		{name: "gzip by hand", handler: transportZipped, client: transportDo("GET", nil, set("Accept-Encoding", "gzip"))},
		{name: "no user agent", handler: transportOK, client: transportDo("GET", nil, set("User-Agent", ""))},
		{name: "close", handler: transportOK, client: transportDo("GET", nil, func(r *http.Request) { r.Close = true })},
		{name: "opaque URL", handler: transportOK, client: transportDo("GET", nil, func(r *http.Request) {
			r.URL.Opaque = "//" + r.URL.Host + "/%2Fraw"
		})},
		{name: "response trailer", client: transportDo("GET", nil, nil), handler: func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Trailer", "X-Sum")
			io.WriteString(w, "fine")
			w.Header().Set("X-Sum", "7")
			w.Header().Set(http.TrailerPrefix+"X-Late", "8")
		}},
		{name: "chunks", client: transportDo("GET", nil, nil), handler: func(w http.ResponseWriter, _ *http.Request) {
			for range 3 {
				io.WriteString(w, "chunk ")
				w.(http.Flusher).Flush()
			}
		}},
		{name: "early hints", client: transportHints, handler: func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Link", "</style.css>")
			w.WriteHeader(http.StatusEarlyHints)
			io.WriteString(w, "fine")
		}},
		{name: "204", client: transportDo("GET", nil, nil), handler: func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(204) }},
		{name: "304", client: transportDo("GET", nil, nil), handler: func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Etag", `"a"`)
			w.WriteHeader(304)
		}},
		{name: "404", client: transportDo("GET", nil, nil), handler: http.NotFound},
		{name: "broken off", client: transportDo("GET", nil, nil), handler: func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Length", "100")
			io.WriteString(w, "half of it")
			w.(http.Flusher).Flush()
			panic(http.ErrAbortHandler)
		}},
		{name: "302 with cookies", client: transportRedirected("GET", ""), handler: transportRedirect(302)},
		{name: "303 of a POST", client: transportRedirected("POST", "form"), handler: transportRedirect(303)},
		{name: "307 of a POST", client: transportRedirected("POST", "form"), handler: transportRedirect(307)},
		{name: "307 of a POST without GetBody", client: transportDo("POST", transportPlain, nil), handler: transportRedirect(307)},
		{name: "302 not followed", client: transportNotFollowed, handler: transportRedirect(302)},
		{name: "302 with an unreadable Location", client: transportUnreadable, handler: func(w http.ResponseWriter, _ *http.Request) {
			w.Header()["Location"] = []string{"http://[bad:%zz"}
			w.WriteHeader(302)
		}},
		{name: "302 without Location", client: transportDo("GET", nil, nil), handler: func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(302)
		}},
		{name: "invalid header", once: true, handler: transportOK, client: transportDo("POST", transportBytes, func(r *http.Request) {
			r.Header["Bad Name"] = []string{"x"}
		})},
		{name: "invalid method", once: true, handler: transportOK, client: transportDo("POST", transportBytes, func(r *http.Request) { r.Method = "BAD METHOD" })},
		{name: "no host", once: true, handler: transportOK, client: transportDo("POST", transportBytes, func(r *http.Request) { r.URL.Host = "" })},
		{name: "unknown scheme", once: true, handler: transportOK, client: transportDo("POST", transportBytes, func(r *http.Request) { r.URL.Scheme = "gopher" })},
		{name: "nil Header", handler: transportOK, client: transportDo("POST", transportBytes, func(r *http.Request) { r.Header = nil })},
	}
}

func transportZipped(w http.ResponseWriter, r *http.Request) {
	if r.Header.Get("Accept-Encoding") != "gzip" {
		return
	}
	w.Header().Set("Content-Encoding", "gzip")
	z := gzip.NewWriter(w)
	io.WriteString(z, "fine")
	z.Close()
}

func transportHints(t *testing.T, c *http.Client, target string) string {
	var hints []string
	ctx := httptrace.WithClientTrace(t.Context(), &httptrace.ClientTrace{
		Got1xxResponse: func(code int, h textproto.MIMEHeader) error {
			hints = append(hints, fmt.Sprint(code, h))
			return nil
		},
	})
	resp, err := c.Do(transportRequest(t, "GET", target, nil).WithContext(ctx))
	return transportGot(resp, err) + fmt.Sprint(hints)
}

// transportRedirect sends /path to /end with a cookie.
func transportRedirect(status int) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/end" {
			io.WriteString(w, "the end")
			return
		}
		http.SetCookie(w, &http.Cookie{Name: "session", Value: "abc"})
		w.Header().Set("Location", "/end")
		w.WriteHeader(status)
	}
}

func transportRedirected(method, form string) func(*testing.T, *http.Client, string) string {
	return func(t *testing.T, c *http.Client, target string) string {
		c.Jar, _ = cookiejar.New(nil)
		var hops []string
		c.CheckRedirect = func(req *http.Request, via []*http.Request) error {
			hops = append(hops, fmt.Sprint(req.Method, req.URL.Path, len(via), req.Response.StatusCode))
			return nil
		}
		var body io.Reader
		if form != "" {
			body = strings.NewReader(form)
		}
		resp, err := c.Do(transportRequest(t, method, target+"/path", body))
		return transportGot(resp, err) + fmt.Sprint(hops)
	}
}

func transportNotFollowed(t *testing.T, c *http.Client, target string) string {
	c.CheckRedirect = func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
	return transportDo("GET", nil, nil)(t, c, target)
}

// transportUnreadable goes around the http.Client, which would give an error.
func transportUnreadable(t *testing.T, c *http.Client, target string) string {
	resp, err := c.Transport.RoundTrip(transportRequest(t, "GET", target, nil))
	direct := transportGot(resp, err)
	resp, err = c.Get(target)
	return direct + transportGot(resp, err)
}

// transportFirst answers the first request with a 503 in handler's place. It says
// that nothing was done, so that ReplaySafe retries a POST, too.
func transportFirst(handler http.Handler) http.HandlerFunc {
	var n atomic.Int32
	return func(w http.ResponseWriter, r *http.Request) {
		if n.Add(1) > 1 {
			handler.ServeHTTP(w, r)
			return
		}
		if r.Header.Get("Expect") == "" {
			io.Copy(io.Discard, r.Body)
		}
		w.Header().Set("Retry-After", "0")
		w.WriteHeader(http.StatusServiceUnavailable)
	}
}

// transportServe starts a server for handler and returns its URL and a base
// that reaches it.
func transportServe(t *testing.T, http2 bool, handler http.Handler) (string, *http.Transport) {
	srv := httptest.NewUnstartedServer(handler)
	if http2 {
		srv.EnableHTTP2 = true
		srv.StartTLS()
	} else {
		srv.Start()
	}
	base := srv.Client().Transport.(*http.Transport)
	t.Cleanup(func() { base.CloseIdleConnections(); srv.Close() })
	return srv.URL, base
}

// exchange runs c over what wrap makes of a base, and returns what the server
// and the client saw.
func (c transportCase) exchange(t *testing.T, http2, refuse bool, wrap func(http.RoundTripper) http.RoundTripper) (server, client string) {
	var mu sync.Mutex
	var seen string
	var handler http.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		mu.Lock()
		seen += transportSeen(r, string(body))
		if err != nil {
			seen += err.Error()
		}
		mu.Unlock()
		c.handler(w, r)
	})
	if refuse {
		handler = transportFirst(handler)
	}
	target, base := transportServe(t, http2, handler)
	client = c.client(t, &http.Client{Transport: wrap(base)}, target)
	_, host, _ := strings.Cut(target, "://")
	mu.Lock()
	defer mu.Unlock()
	return strings.ReplaceAll(seen, host, "SERVER"), strings.ReplaceAll(client, host, "SERVER")
}

// transportVariants are the Transports that must not show.
func transportVariants() map[string]func(http.RoundTripper) http.RoundTripper {
	with := func(change func(*Transport)) func(http.RoundTripper) http.RoundTripper {
		return func(base http.RoundTripper) http.RoundTripper {
			tr := &Transport{Base: base, Policy: transportEager()}
			change(tr)
			return tr
		}
	}
	nothing := func(next http.RoundTripper) http.RoundTripper {
		return transportFunc(next.RoundTrip)
	}
	return map[string]func(http.RoundTripper) http.RoundTripper{
		"plain": with(func(tr *Transport) { tr.Policy.Breaker = BreakerPolicy{} }),
		"full": with(func(tr *Transport) {
			tr.Layers = []Layer{nothing}
			tr.Policy.Timeout, tr.Policy.Idle, tr.Policy.TotalTimeout = time.Minute, time.Minute, time.Hour
			tr.Policy.HoldStream = true
			tr.Policy.Breaker = BreakerPolicy{FailureRate: 1, SlowCall: time.Minute}
			tr.Observers = []*Observer{{
				Attempt: func(AttemptEvent) {}, Retry: func(RetryEvent) {}, StateChange: func(StateChange) {}, Service: func(string) {},
			}}
			tr.Policy.Retry.MaxElapsed = time.Hour
			tr.Policy.Retry.Replay = ReplaySafe
			tr.Policy.Retry.Prepare = func(*http.Request) error { return nil }
		}),
	}
}

func TestTransportLooksLikeItsBase(t *testing.T) {
	for _, http2 := range []bool{false, true} {
		for _, c := range transportCases() {
			t.Run(fmt.Sprintf("http2=%t/%s", http2, c.name), func(t *testing.T) {
				server, client := c.exchange(t, http2, false, func(base http.RoundTripper) http.RoundTripper { return base })
				for name, wrap := range transportVariants() {
					for _, refuse := range []bool{false, true} {
						if refuse && c.once {
							continue
						}
						s, got := c.exchange(t, http2, refuse, wrap)
						assert.Equal(t, server, s, "%s, retry=%t: the server's side", name, refuse)
						assert.Equal(t, client, got, "%s, retry=%t: the client's side", name, refuse)
					}
				}
			})
		}
	}
}

// What is no request at all goes to the base, whose error it is.
func TestTransportLeavesBadRequestsToItsBase(t *testing.T) {
	for _, wrong := range []*http.Request{
		{Header: http.Header{}},
		{},
		{URL: &url.URL{Scheme: "http", Host: "example.com"}},
		{URL: &url.URL{Scheme: "http"}, Header: http.Header{}},
		{URL: &url.URL{}, Header: http.Header{}},
		{URL: &url.URL{Scheme: "", Host: "example.com"}, Header: http.Header{}},
		{URL: &url.URL{Scheme: "http", Host: "example.com"}, Header: http.Header{"A": {"bad\nvalue"}}},
	} {
		bare := &transportBody{Reader: transportBytes()}
		wrong.Body, wrong.ContentLength = bare, 10
		_, want := (&http.Transport{}).RoundTrip(wrong)
		require.Error(t, want)

		for name, wrap := range transportVariants() {
			body := &transportBody{Reader: transportBytes()}
			wrong.Body = body
			resp, err := wrap(&http.Transport{}).RoundTrip(wrong)
			assert.Nil(t, resp)
			assert.EqualError(t, err, want.Error(), name)
			assert.Equal(t, bare.closes.Load(), body.closes.Load(), "%s: closes, %v", name, want)
		}
	}
}

// A body that is not as long as the request says is the caller's fault: it is
// neither sent again nor held against the service.
func TestTransportWrongContentLength(t *testing.T) {
	broken := func(text string) error {
		return fmt.Errorf("net/http: HTTP/1.x transport connection broken: %w", errors.New(text))
	}
	for _, wrong := range []error{ // which is what net/http says, unless the server answers first
		broken("http: ContentLength=9 with Body length 10"),
		errors.New("http2: request body larger than specified content length"),
	} {
		tr := &Transport{Base: transportFunc(func(req *http.Request) (*http.Response, error) {
			closeBody(req)
			return nil, wrong
		})}
		req := transportRequest(t, "PUT", "http://api.example.com", transportPlain())
		req.ContentLength = 9
		_, err := tr.RoundTrip(req)
		assert.Equal(t, wrong, err)
		st, _ := tr.Stats("api.example.com")
		assert.Equal(t, []uint64{1, 0, 0}, []uint64{st.Attempts, st.Retries, st.Failures}, "attempts, retries, failures")
	}
}

// An http.Client recognises this error by its type, not through wrappers.
func TestTransportKeepsErrorTypesOfTheFirstAttempt(t *testing.T) {
	target, base := transportServe(t, false, http.HandlerFunc(transportOK))
	client := &http.Client{Transport: &Transport{Base: base, Policy: transportEager()}}
	_, err := client.Get(strings.Replace(target, "http:", "https:", 1))
	require.ErrorIs(t, err, http.ErrSchemeMismatch)
}

// ReverseProxy and upgrades.

func transportProxy(t *testing.T, target string, tr http.RoundTripper) string {
	backend, err := url.Parse(target)
	require.NoError(t, err)
	front := httptest.NewServer(&httputil.ReverseProxy{
		Rewrite:   func(r *httputil.ProxyRequest) { r.SetURL(backend); r.SetXForwarded() },
		Transport: tr,
	})
	t.Cleanup(front.Close)
	return front.URL
}

// ReverseProxy sets RequestURI, which an http.Client in between would refuse.
func TestTransportBehindReverseProxy(t *testing.T) {
	for _, refuse := range []bool{false, true} {
		for _, method := range []string{"GET", "POST"} {
			t.Run(fmt.Sprintf("%s/retry=%t", method, refuse), func(t *testing.T) {
				var handler http.HandlerFunc = func(w http.ResponseWriter, r *http.Request) {
					body, _ := io.ReadAll(r.Body)
					fmt.Fprintf(w, "%s %s %s %q", r.Method, r.RequestURI, r.Header.Get("X-Forwarded-For"), body)
				}
				if refuse {
					handler = transportFirst(handler)
				}
				target, base := transportServe(t, false, handler)
				tr := &Transport{Base: base, Policy: transportEager()}
				front := transportProxy(t, target, tr)
				resp, err := http.DefaultClient.Do(transportRequest(t, method, front+"/a?b=c", transportPlain()))
				require.NoError(t, err)
				require.Equal(t, 200, resp.StatusCode)
				require.Equal(t, method+` /a?b=c 127.0.0.1 "some bytes"`, transportRead(t, resp))
			})
		}
	}
}

// transportEcho upgrades a connection and sends each line back.
func transportEcho(w http.ResponseWriter, r *http.Request) {
	if r.Header.Get("Upgrade") != "echo" {
		http.Error(w, "upgrade, please", http.StatusBadRequest)
		return
	}
	conn, rw, err := w.(http.Hijacker).Hijack()
	if err != nil {
		return
	}
	defer conn.Close()
	io.WriteString(conn, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n")
	for {
		line, err := rw.ReadString('\n')
		if err != nil {
			return
		}
		io.WriteString(conn, "echo "+line)
	}
}

func TestTransportUpgrade(t *testing.T) {
	for name, wrap := range transportVariants() {
		for _, refuse := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s/retry=%t", name, refuse), func(t *testing.T) {
				handler := http.HandlerFunc(transportEcho)
				if refuse {
					handler = transportFirst(handler)
				}
				target, base := transportServe(t, false, handler)
				req := transportRequest(t, "GET", target, nil)
				req.Header.Set("Connection", "Upgrade")
				req.Header.Set("Upgrade", "echo")
				resp, err := (&http.Client{Transport: wrap(base)}).Do(req)
				require.NoError(t, err)
				require.Equal(t, 101, resp.StatusCode)
				require.Same(t, req, resp.Request)
				stream, ok := resp.Body.(io.ReadWriteCloser)
				require.True(t, ok, "the body of a 101 is %T", resp.Body)
				transportTalk(t, stream)
				require.NoError(t, stream.Close())
			})
		}
	}
}

func transportTalk(t *testing.T, stream io.ReadWriter) {
	lines := bufio.NewReader(stream)
	for _, line := range []string{"one\n", "two\n"} {
		_, err := io.WriteString(stream, line)
		require.NoError(t, err)
		answer, err := lines.ReadString('\n')
		require.NoError(t, err)
		require.Equal(t, "echo "+line, answer)
	}
}

func TestTransportUpgradeThroughReverseProxy(t *testing.T) {
	for name, wrap := range transportVariants() {
		t.Run(name, func(t *testing.T) {
			target, base := transportServe(t, false, transportFirst(http.HandlerFunc(transportEcho)))
			front := transportProxy(t, target, wrap(base))
			conn, err := net.Dial("tcp", strings.TrimPrefix(front, "http://"))
			require.NoError(t, err)
			defer conn.Close()
			io.WriteString(conn, "GET / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n")
			lines := bufio.NewReader(conn)
			resp, err := http.ReadResponse(lines, nil)
			require.NoError(t, err)
			require.Equal(t, 101, resp.StatusCode)
			transportTalk(t, struct {
				io.Reader
				io.Writer
			}{lines, conn})
		})
	}
}

// Results.

func TestTransportResults(t *testing.T) {
	broken := errors.New("broken")
	for _, c := range []struct {
		name     string
		answers  []any
		status   int
		err      error
		attempts int
		elapsed  time.Duration
	}{
		{"success", []any{200}, 200, nil, 1, 0},
		{"recovered from a status", []any{503, 200}, 200, nil, 2, time.Second},
		{"recovered from an error", []any{broken, 200}, 200, nil, 2, time.Second},
		{"recovered late", []any{broken, 503, 200}, 200, nil, 3, 3 * time.Second},
		{"not to be retried", []any{404}, 404, nil, 1, 0},
		{"a redirect", []any{302}, 302, nil, 1, 0},
		{"retried into what is not", []any{503, 404}, 404, nil, 2, time.Second},
		{"exhausted with a status", []any{503, 500, 529}, 529, nil, 3, 3 * time.Second},
		{"exhausted with an error", []any{503, 500, broken}, 0, broken, 3, 3 * time.Second},
		{"exhausted with a status after an error", []any{broken, broken, 503}, 503, nil, 3, 3 * time.Second},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				base := &transportScript{answers: c.answers}
				tr := &Transport{Base: base, Policy: transportSteady()}
				req := transportRequest(t, "GET", transportURL, nil)
				start := time.Now()
				resp, err := tr.RoundTrip(req)
				require.Equal(t, c.elapsed, time.Since(start))
				require.Len(t, base.requests, c.attempts)
				transportCheckDiscarded(t, base, resp)
				if c.err != nil {
					require.Nil(t, resp)
					require.Equal(t, &RetryError{Attempts: c.attempts, Err: c.err}, err)
					return
				}
				require.NoError(t, err)
				require.Equal(t, c.status, resp.StatusCode)
				require.Same(t, req, resp.Request)
				require.Equal(t, fmt.Sprint("answer ", c.attempts), transportRead(t, resp))
			})
		})
	}
}

// transportCheckDiscarded checks that the body of every response but the one that
// was returned has been closed once. That one may have been, if it was kept in
// memory for a retry that did not come; whoever reads it will see.
func transportCheckDiscarded(t *testing.T, base *transportScript, returned *http.Response) {
	t.Helper()
	for i, resp := range base.responses {
		closes := base.pages[i].(*transportBody).closes.Load()
		if resp == returned {
			assert.LessOrEqual(t, closes, int32(1), "closes of response %d, which was returned", i+1)
		} else {
			assert.EqualValues(t, 1, closes, "closes of response %d", i+1)
		}
	}
}

// inner makes the wrapped body of a success visible.
func (b *body) inner() *transportBody { return b.ReadCloser.(*transportBody) }

func TestTransportFinalResponseIsUntouched(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		last := transportAnswer(503, strings.Repeat("long ", 5000), "X-Request-Id", "7")
		body, header := last.Body, last.Header.Clone()
		tr := &Transport{Base: &transportScript{answers: []any{429, 503, last}}, Policy: transportSteady()}
		resp, err := tr.RoundTrip(transportRequest(t, "GET", transportURL, nil))
		require.NoError(t, err)
		require.Same(t, last, resp)
		require.Equal(t, body, resp.Body)
		require.Equal(t, header, resp.Header)
		require.Len(t, transportRead(t, resp), 25000)
	})
}

func TestTransportNeverReturnsResponseAndError(t *testing.T) {
	broken := errors.New("broken")
	layered := func(next http.RoundTripper) http.RoundTripper {
		return transportFunc(func(r *http.Request) (*http.Response, error) {
			resp, _ := next.RoundTrip(r)
			return resp, broken
		})
	}
	for _, c := range []struct {
		name   string
		base   func() (*http.Response, error)
		layers []Layer
		err    error
	}{
		{"both of the base", func() (*http.Response, error) { return transportAnswer(200, "x"), broken }, nil, broken},
		{"both of a Layer", func() (*http.Response, error) { return transportAnswer(200, "x"), nil }, []Layer{layered}, broken},
		{"nothing", func() (*http.Response, error) { return nil, nil }, nil, errNoResponse},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var given []*http.Response
				tr := &Transport{Policy: transportSteady(), Layers: c.layers, Base: transportFunc(func(*http.Request) (*http.Response, error) {
					resp, err := c.base()
					if resp != nil {
						given = append(given, resp)
					}
					return resp, err
				})}
				resp, err := tr.RoundTrip(transportRequest(t, "GET", transportURL, nil))
				require.Nil(t, resp)
				require.ErrorIs(t, err, c.err)
				for _, resp := range given {
					b, ok := resp.Body.(*transportBody)
					if !ok {
						b = resp.Body.(*body).inner()
					}
					require.EqualValues(t, 1, b.closes.Load())
				}
			})
		})
	}
}

// resp.Request is what the caller handed over, not the copy of an attempt.
func TestTransportResponseNamesTheCallersRequest(t *testing.T) {
	for name, wrap := range transportVariants() {
		for _, refuse := range []bool{false, true} {
			for _, method := range []string{"GET", "POST"} {
				handler := http.HandlerFunc(transportOK)
				if refuse {
					handler = transportFirst(handler)
				}
				target, base := transportServe(t, false, handler)
				tr := wrap(base).(*Transport)
				tr.Policy.Retry.IdempotencyKey = true
				req := transportRequest(t, method, target, transportPlain())
				resp, err := tr.RoundTrip(req)
				require.NoError(t, err)
				require.Same(t, req, resp.Request, "%s %s retry=%t", method, name, refuse)
				resp.Body.Close()
			}
		}
	}
}

// Errors.

// transportCheckURLError checks what an http.Client has made of an error.
func transportCheckURLError(t *testing.T, err error, target string) *url.Error {
	t.Helper()
	require.Error(t, err)
	outer, ok := err.(*url.Error)
	require.True(t, ok, "%T", err)
	var nested *url.Error
	require.False(t, errors.As(outer.Err, &nested), "a second *url.Error in %v", err)
	require.Equal(t, 1, strings.Count(err.Error(), target), "the URL in %v", err)
	return outer
}

func TestTransportRefusedConnection(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	l.Close()
	target := "http://" + l.Addr().String() + "/x"
	for _, attempts := range []int{1, 3} {
		p := transportEager()
		p.Retry.MaxAttempts = attempts
		client := &http.Client{Transport: &Transport{Base: &http.Transport{}, Policy: p}}
		_, err = client.Post(target, "text/plain", transportPlain())
		outer := transportCheckURLError(t, err, target)
		require.Equal(t, "Post", outer.Op)
		require.ErrorIs(t, err, syscall.ECONNREFUSED)
		require.False(t, outer.Timeout())
		var several *RetryError
		if attempts == 1 {
			require.False(t, errors.As(err, &several), "one attempt, no RetryError")
			continue
		}
		require.ErrorAs(t, err, &several)
		require.Equal(t, 3, several.Attempts)
		require.Contains(t, err.Error(), "tripper: giving up after 3 attempts: dial tcp")
		require.IsType(t, &net.OpError{}, several.Err)
	}
}

// Whatever times out says so to whoever asks the http.Client's error.
func TestTransportTimeouts(t *testing.T) {
	hang := transportFunc(func(r *http.Request) (*http.Response, error) {
		select {
		case <-r.Context().Done():
			return nil, context.Cause(r.Context())
		case <-r.Cancel: //lint:ignore SA1019 an http.Client with a Timeout uses it
			return nil, errors.New("net/http: request canceled")
		}
	})
	slowDial := &http.Transport{DialContext: func(ctx context.Context, network, _ string) (net.Conn, error) {
		return nil, &net.OpError{Op: "dial", Net: network, Err: os.ErrDeadlineExceeded}
	}}
	for _, c := range []struct {
		name     string
		base     http.RoundTripper
		attempt  time.Duration // Policy.Timeout
		client   time.Duration // http.Client.Timeout
		deadline time.Duration // of the context
		attempts int
		is       error
		elapsed  time.Duration
	}{
		{"Policy.Timeout", hang, time.Second, 0, 0, 3, context.DeadlineExceeded, 6 * time.Second},
		{"http.Client.Timeout", hang, 0, time.Second, 0, 1, nil, time.Second},
		{"http.Client.Timeout in a later attempt", hang, time.Second, 2500 * time.Millisecond, 0, 2, nil, 2500 * time.Millisecond},
		{"deadline", hang, 0, 0, time.Second, 1, context.DeadlineExceeded, time.Second},
		{"deadline in a later attempt", hang, time.Second, 0, 2500 * time.Millisecond, 2, context.DeadlineExceeded, 2500 * time.Millisecond},
		{"dial", slowDial, 0, 0, 0, 3, os.ErrDeadlineExceeded, 3 * time.Second},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				p := transportSteady()
				p.Timeout = c.attempt
				client := &http.Client{Timeout: c.client, Transport: &Transport{Base: c.base, Policy: p}}
				ctx := t.Context()
				if c.deadline > 0 {
					var cancel context.CancelFunc
					ctx, cancel = context.WithTimeout(ctx, c.deadline)
					defer cancel()
				}
				start := time.Now()
				_, err := client.Do(transportRequest(t, "GET", transportURL, nil).WithContext(ctx))
				require.Equal(t, c.elapsed, time.Since(start))
				outer := transportCheckURLError(t, err, transportURL)
				require.True(t, outer.Timeout(), "Timeout() of %v", err)
				if c.is != nil {
					require.ErrorIs(t, err, c.is)
				}
				require.NotErrorIs(t, err, context.Canceled)
				if c.client > 0 {
					return // an http.Client that has timed out drops the error below
				}
				var several *RetryError
				require.Equal(t, c.attempts > 1, errors.As(err, &several))
				if several != nil {
					require.Equal(t, c.attempts, several.Attempts)
				}
			})
		})
	}
}

type transportNetError struct{ timeout, temporary bool }

func (e transportNetError) Error() string   { return "net error" }
func (e transportNetError) Timeout() bool   { return e.timeout }
func (e transportNetError) Temporary() bool { return e.temporary }

func TestRetryErrorSpeaksForItsCause(t *testing.T) {
	for _, e := range []transportNetError{{true, false}, {false, true}, {false, false}} {
		err := &RetryError{Attempts: 3, Err: fmt.Errorf("wrapped: %w", e)}
		require.Equal(t, e.timeout, err.Timeout())
		require.Equal(t, e.temporary, err.Temporary())
		require.ErrorIs(t, err, e)
		require.EqualError(t, err, "tripper: giving up after 3 attempts: wrapped: net error")
	}
	plain := &RetryError{Attempts: 2, Err: errors.New("plain")}
	require.False(t, plain.Timeout())
	require.False(t, plain.Temporary())
}

// A breaker that opens under a request ends its retries. What is in hand goes to
// the caller, as it would if the attempts had run out.
func TestTransportOpenBreakerEndsRetries(t *testing.T) {
	broken := errors.New("broken")
	for _, c := range []struct {
		threshold int
		answer    any
	}{{1, 503}, {2, 503}, {3, 503}, {1, broken}, {2, broken}, {3, broken}} {
		synctest.Test(t, func(t *testing.T) {
			base := &transportScript{answers: []any{c.answer}}
			p := transportSteady()
			p.Retry.MaxAttempts, p.Breaker.FailureThreshold = 6, c.threshold
			tr := &Transport{Base: base, Policy: p}
			resp, err := tr.RoundTrip(transportRequest(t, "GET", transportURL, nil))
			require.Len(t, base.requests, c.threshold)
			transportCheckDiscarded(t, base, resp)
			require.NotErrorIs(t, err, ErrRejected, "it was sent")
			if c.answer == broken {
				transportCheckStopped(t, err, c.threshold, broken)
			} else {
				require.NoError(t, err)
				require.Equal(t, fmt.Sprint("answer ", c.threshold), transportRead(t, resp))
			}
			_, err = tr.RoundTrip(transportRequest(t, "GET", transportURL, nil))
			require.IsType(t, &OpenError{}, err)
			require.ErrorIs(t, err, ErrRejected)
			require.Len(t, base.requests, c.threshold, "nothing is sent to an open breaker")
			st, _ := tr.Stats("api.example.com")
			require.Equal(t, []uint64{2, 1, 1, 1}, []uint64{st.Requests, st.Failed, st.Rejected, st.Suppressed.Breaker})
		})
	}
}

// transportCheckStopped checks the error of a request whose retries an open
// breaker has ended.
func transportCheckStopped(t *testing.T, err error, attempts int, last error) {
	t.Helper()
	several, ok := err.(*RetryError)
	require.True(t, ok, "%T", err)
	require.Equal(t, attempts, several.Attempts)
	require.Equal(t, last, several.Err)
	open, ok := several.Stopped.(*OpenError)
	require.True(t, ok, "%T", several.Stopped)
	require.Equal(t, "api.example.com", open.Service)
	var inChain *OpenError
	require.False(t, errors.As(err, &inChain))
}

// Configuration of single requests and of layers.

func TestTransportInvalidConfiguration(t *testing.T) {
	base := &transportScript{answers: []any{200}}
	tr := &Transport{Base: base, Policy: Policy{Retry: RetryPolicy{MaxAttempts: -1}}}
	for range 2 {
		body := &transportBody{Reader: transportBytes()}
		resp, err := tr.RoundTrip(transportRequest(t, "POST", transportURL, body))
		require.Nil(t, resp)
		require.ErrorContains(t, err, "Policy.Retry.MaxAttempts is -1")
		require.EqualError(t, err, tr.Validate().Error())
		require.EqualValues(t, 1, body.closes.Load())
	}
	require.Empty(t, base.requests)
}

func TestWithRetry(t *testing.T) {
	for _, c := range []struct {
		change   func(*RetryPolicy)
		attempts int
		err      string
	}{
		{func(r *RetryPolicy) { r.MaxAttempts = 1 }, 1, ""},
		{func(r *RetryPolicy) { r.MaxAttempts = 5 }, 5, ""},
		{func(r *RetryPolicy) {}, 2, ""}, // the host's own
		{nil, 2, ""},
		{func(r *RetryPolicy) { *r = RetryPolicy{Replay: ReplayAny} }, 3, ""}, // the defaults
		{func(r *RetryPolicy) { r.Replay = ReplaySafe }, 1, ""},
		{func(r *RetryPolicy) { r.MaxWait = -1 }, 0, "tripper: WithRetry.MaxWait is -1ns"},
	} {
		synctest.Test(t, func(t *testing.T) {
			base := &transportScript{answers: []any{503}}
			p := transportSteady()
			p.Retry.MaxAttempts = 2
			tr := &Transport{Base: base, Policy: p}
			body := &transportBody{Reader: transportBytes()}
			req := transportRequest(t, "POST", transportURL, body).WithContext(WithRetry(t.Context(), c.change))
			resp, err := tr.RoundTrip(req)
			require.Len(t, base.requests, c.attempts)
			require.EqualValues(t, 1, body.closes.Load())
			if c.err != "" {
				require.Nil(t, resp)
				require.ErrorContains(t, err, c.err)
				return
			}
			require.NoError(t, err)
			require.Equal(t, slices.Repeat([]string{"some bytes"}, c.attempts), base.bodies)

			_, err = tr.RoundTrip(transportRequest(t, "GET", transportURL, nil))
			require.NoError(t, err)
			require.Len(t, base.requests, c.attempts+2, "others keep the policy")
		})
	}
}

// The function of WithRetry gets a copy with every default resolved.
func TestWithRetryGetsTheHostsPolicy(t *testing.T) {
	p := transportSteady()
	p.Retry.IdempotencyKey = true
	tr := &Transport{
		Base:  &transportScript{answers: []any{200}},
		Hosts: map[string]Policy{"api.example.com": p},
	}
	want := Policy{Retry: p.Retry}.withDefaults().Retry
	for range 2 { // the second is not told what the first has changed
		ctx := WithRetry(t.Context(), func(r *RetryPolicy) {
			assert.Equal(t, want, *r)
			r.MaxAttempts, r.BodyLimit = 9, 9
		})
		resp, err := tr.RoundTrip(transportRequest(t, "GET", transportURL, nil).WithContext(ctx))
		require.NoError(t, err)
		resp.Body.Close()
	}
}

func TestLayersSeeEveryAttempt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var seen []string
		note := func(name string, r *http.Request) { seen = append(seen, fmt.Sprint(name, Attempt(r.Context()))) }
		layer := func(name string) Layer {
			return func(next http.RoundTripper) http.RoundTripper {
				return transportFunc(func(r *http.Request) (*http.Response, error) {
					note(name, r)
					return next.RoundTrip(r)
				})
			}
		}
		script := &transportScript{answers: []any{503, errors.New("broken"), 200}}
		tr := &Transport{
			Policy: transportSteady(),
			Layers: []Layer{layer("outer"), layer("inner")},
			Base:   transportFunc(func(r *http.Request) (*http.Response, error) { note("base", r); return script.RoundTrip(r) }),
		}
		resp, err := tr.RoundTrip(transportRequest(t, "GET", transportURL, nil))
		require.NoError(t, err)
		require.Equal(t, 200, resp.StatusCode)
		require.Equal(t, []string{
			"outer1", "inner1", "base1", "outer2", "inner2", "base2", "outer3", "inner3", "base3",
		}, seen)
		require.Equal(t, 1, Attempt(t.Context()), "a context of nobody's attempt")
		resp.Body.Close()
	})
}

// A Layer's refusal is final, and says nothing about the service. It is the
// result only of a request of which nothing was sent.
func TestLayerRefuses(t *testing.T) {
	broken := errors.New("broken")
	for _, answer := range []any{503, broken} {
		for _, from := range []int{1, 2, 3} {
			synctest.Test(t, func(t *testing.T) { transportRefusal(t, answer, from) })
		}
	}
}

// transportRefusal has a Layer refuse the attempts from that one on.
func transportRefusal(t *testing.T, answer any, from int) {
	full := fmt.Errorf("bulkhead full: %w", ErrRejected)
	refuse := func(next http.RoundTripper) http.RoundTripper {
		return transportFunc(func(r *http.Request) (*http.Response, error) {
			if Attempt(r.Context()) < from {
				return next.RoundTrip(r)
			}
			r.Body.Close()
			return nil, full
		})
	}
	base := &transportScript{answers: []any{answer}}
	p := transportSteady()
	p.Retry.MaxAttempts, p.Breaker = 5, BreakerPolicy{}
	tr := &Transport{Base: base, Layers: []Layer{refuse}, Policy: p}
	body := &transportBody{Reader: transportBytes()}
	resp, err := tr.RoundTrip(transportRequest(t, "POST", transportURL, body))
	require.EqualValues(t, 1, body.closes.Load())
	require.Len(t, base.requests, from-1)
	transportCheckDiscarded(t, base, resp)
	st, _ := tr.Stats("api.example.com")
	if from == 1 {
		require.Nil(t, resp)
		require.Equal(t, full, err)
		require.Equal(t, []uint64{1, 1, 0, 0, 0}, []uint64{st.Requests, st.Rejected, st.Failed, st.Attempts, st.Failures})
		return
	}
	if answer == 503 {
		require.NoError(t, err)
		require.Equal(t, fmt.Sprint("answer ", from-1), transportRead(t, resp))
	} else {
		require.Nil(t, resp)
		require.Equal(t, &RetryError{Attempts: from - 1, Err: answer.(error), Stopped: full}, err)
	}
	n := uint64(from - 1)
	require.Equal(t, []uint64{1, 0, 1, n, n, n - 1}, []uint64{st.Requests, st.Rejected, st.Failed, st.Attempts, st.Failures, st.Retries})
}

func TestPrepare(t *testing.T) {
	for _, body := range []func() io.Reader{nil, transportBytes, transportPlain} {
		synctest.Test(t, func(t *testing.T) {
			base := &transportScript{answers: []any{503}}
			p := transportSteady()
			prepared := 0
			p.Retry.Prepare = func(r *http.Request) error {
				prepared++
				r.Header.Add("X-Signature", strconv.Itoa(Attempt(r.Context())))
				r.Header["X-Old"][0] = "changed"
				r.URL.RawQuery = "attempt=" + strconv.Itoa(Attempt(r.Context()))
				r.URL.Path = "/elsewhere"
				return nil
			}
			tr := &Transport{Base: base, Policy: p}
			var r io.Reader
			if body != nil {
				r = body()
			}
			req := transportRequest(t, "POST", transportURL, r)
			req.Header.Set("X-Old", "old")
			_, err := tr.RoundTrip(req)
			require.NoError(t, err)
			require.Equal(t, 2, prepared, "before each retry, and only then")
			require.Equal(t, http.Header{"X-Old": {"old"}}, req.Header)
			require.Equal(t, transportURL, req.URL.String())
			require.Equal(t, "/v1/messages", base.requests[0].URL.Path)
			for i, sent := range base.requests[1:] {
				n := strconv.Itoa(i + 2)
				require.Equal(t, http.Header{"X-Old": {"changed"}, "X-Signature": {n}}, sent.Header)
				require.Equal(t, "http://api.example.com/elsewhere?attempt="+n, sent.URL.String())
				require.Equal(t, base.bodies[0], base.bodies[i+1])
			}
		})
	}
}

func TestPrepareFails(t *testing.T) {
	for _, fails := range []int{2, 3} {
		synctest.Test(t, func(t *testing.T) {
			noKey := errors.New("no key")
			base := &transportScript{answers: []any{503}}
			p := transportSteady()
			p.Retry.Prepare = func(r *http.Request) error {
				if Attempt(r.Context()) == fails {
					return noKey
				}
				return nil
			}
			tr := &Transport{Base: base, Policy: p}
			resp, err := tr.RoundTrip(transportRequest(t, "POST", transportURL, transportPlain()))
			require.Nil(t, resp)
			require.ErrorIs(t, err, noKey)
			if fails == 2 {
				require.Equal(t, noKey, err)
			} else {
				require.Equal(t, &RetryError{Attempts: 2, Err: noKey}, err)
			}
			require.Len(t, base.requests, fails-1)
			transportCheckDiscarded(t, base, nil)
		})
	}
}

// A transportClosing body cannot be compared.
type transportClosing struct {
	io.Reader
	close func()
}

func (b transportClosing) Close() error { b.close(); return nil }

// Prepare may put another body in the place of the one that it finds. Whether it
// has must not depend on what can be compared.
func TestPrepareOfBodies(t *testing.T) {
	for name, prepare := range map[string]func(*http.Request) error{
		"keeps it":     func(*http.Request) error { return nil },
		"replaces it":  func(r *http.Request) error { r.Body = io.NopCloser(transportBytes()); return nil },
		"removes it":   func(r *http.Request) error { r.Body, r.ContentLength = nil, 0; return nil },
		"fails":        func(*http.Request) error { return errors.New("no key") },
		"fails, later": func(r *http.Request) error { r.Body = io.NopCloser(transportBytes()); return errors.New("no key") },
	} {
		t.Run(name, func(t *testing.T) {
			p := transportEager()
			p.Retry.Prepare = prepare
			tr := &Transport{Base: &transportScript{answers: []any{503, 200}}, Policy: p}
			opened, closed := 0, 0
			req := transportRequest(t, "POST", transportURL, nil)
			req.GetBody = func() (io.ReadCloser, error) {
				opened++
				return transportClosing{transportBytes(), func() { closed++ }}, nil
			}
			req.Body, _ = req.GetBody()
			resp, err := tr.RoundTrip(req)
			if strings.HasPrefix(name, "fails") {
				require.EqualError(t, err, "no key")
			} else {
				require.NoError(t, err)
				require.Equal(t, 200, resp.StatusCode)
			}
			require.Equal(t, []int{2, 2}, []int{opened, closed})
		})
	}
}

// Time.

// TotalTimeout ends what still waits for a response, and nothing else.
func TestTransportTotalTimeout(t *testing.T) {
	hang := func(r *http.Request) (*http.Response, error) {
		<-r.Context().Done()
		return nil, r.Context().Err() // not the context's cause, as net/http has it
	}
	for _, c := range []struct {
		name     string
		answers  []any
		limit    time.Duration
		attempts int
		elapsed  time.Duration
		status   int // 0: an error
	}{
		{"in the first attempt", []any{hang}, 2 * time.Second, 1, 2 * time.Second, 0},
		{"in a later attempt", []any{503, hang}, 2500 * time.Millisecond, 2, 2500 * time.Millisecond, 0},
		{"before a wait that it would outlast", []any{503}, 2500 * time.Millisecond, 2, time.Second, 503},
		{"just before the end of a wait", []any{503}, 3 * time.Second, 2, time.Second, 503},
		{"not at all", []any{503}, 3*time.Second + 1, 3, 3 * time.Second, 503},
		{"not in a body", []any{503, 200}, 2 * time.Second, 2, time.Second, 200},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				p := transportSteady()
				p.TotalTimeout = c.limit
				base := &transportScript{answers: c.answers}
				tr := &Transport{Base: base, Policy: p}
				req := transportRequest(t, "POST", transportURL, transportPlain())
				start := time.Now()
				resp, err := tr.RoundTrip(req)
				require.Equal(t, c.elapsed, time.Since(start))
				require.Len(t, base.requests, c.attempts)
				transportCheckDiscarded(t, base, resp)
				st, _ := tr.Stats("api.example.com")
				if c.status == 0 {
					transportCheckLate(t, err, c.attempts)
					require.Equal(t, []uint64{1, uint64(c.attempts), 0}, []uint64{st.Failed, st.Failures, st.Cancelled})
					return
				}
				require.NoError(t, err)
				require.Equal(t, c.status, resp.StatusCode)
				require.Same(t, req, resp.Request)
				time.Sleep(time.Hour)
				require.Equal(t, fmt.Sprint("answer ", c.attempts), transportRead(t, resp))
			})
		})
	}
}

// transportCheckLate checks the error of TotalTimeout.
func transportCheckLate(t *testing.T, err error, attempts int) {
	t.Helper()
	require.ErrorIs(t, err, context.DeadlineExceeded)
	require.NotErrorIs(t, err, context.Canceled)
	timeout, ok := err.(interface{ Timeout() bool })
	require.True(t, ok && timeout.Timeout())
	var several *RetryError
	require.Equal(t, attempts > 1, errors.As(err, &several))
	if attempts > 1 {
		require.Equal(t, attempts, several.Attempts)
	}
}

// The time that the caller's own body takes is a part of TotalTimeout, and a body
// is seen as what it is.
func TestTransportTotalTimeoutAndUploads(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := transportSteady()
		p.TotalTimeout, p.Retry.BodyLimit = 10*time.Second, 1
		tr := &Transport{Base: &transportScript{answers: []any{503, 200}}, Policy: p}
		resp, err := tr.RoundTrip(transportRequest(t, "POST", transportURL, transportFile(t, []byte("0123456789"), 4)))
		require.NoError(t, err)
		require.Equal(t, 200, resp.StatusCode, "a file can be sent again")
		transportRead(t, resp)

		r, w := io.Pipe()
		tr = &Transport{Policy: p, Base: transportFunc(func(r *http.Request) (*http.Response, error) {
			go func() {
				io.Copy(io.Discard, r.Body)
				r.Body.Close()
			}()
			<-r.Context().Done()
			return nil, context.Cause(r.Context())
		})}
		time.AfterFunc(time.Minute, func() { w.Close() })
		start := time.Now()
		_, err = tr.RoundTrip(transportRequest(t, "POST", transportURL, r))
		require.Equal(t, 10*time.Second, time.Since(start))
		require.EqualError(t, err, "tripper: no response within 10s")
		time.Sleep(time.Hour)
	})
}

// A request that waits for its retry can be ended in several ways.
func TestTransportCancelledWait(t *testing.T) {
	reason := errors.New("the user left")
	type end struct {
		req  *http.Request
		stop func()
		is   error
	}
	for name, begin := range map[string]func(*testing.T) end{
		"context": func(t *testing.T) end {
			ctx, cancel := context.WithCancel(t.Context())
			return end{transportRequest(t, "POST", transportURL, transportPlain()).WithContext(ctx), cancel, context.Canceled}
		},
		"context with a cause": func(t *testing.T) end {
			ctx, cancel := context.WithCancelCause(t.Context())
			return end{transportRequest(t, "POST", transportURL, transportPlain()).WithContext(ctx), func() { cancel(reason) }, reason}
		},
		"channel": func(t *testing.T) end {
			cancel := make(chan struct{})
			req := transportRequest(t, "POST", transportURL, transportPlain())
			req.Cancel = cancel //lint:ignore SA1019 callers still use it
			return end{req, func() { close(cancel) }, context.Canceled}
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				base := &transportScript{answers: []any{503}}
				tr := &Transport{Base: base, Policy: transportSteady()}
				e := begin(t)
				body := &transportBody{Reader: e.req.Body}
				e.req.Body = body
				time.AfterFunc(1500*time.Millisecond, e.stop)
				start := time.Now()
				resp, err := tr.RoundTrip(e.req)
				require.Equal(t, 1500*time.Millisecond, time.Since(start))
				require.Nil(t, resp)
				require.Equal(t, e.is, err)
				require.Len(t, base.requests, 2)
				require.EqualValues(t, 1, body.closes.Load())
				transportCheckDiscarded(t, base, nil)
				st, _ := tr.Stats("api.example.com")
				require.EqualValues(t, 1, st.Cancelled)
			})
		})
	}
}

// A request that was over before it began is not sent.
func TestTransportEndedBefore(t *testing.T) {
	cancelled, cancel := context.WithCancelCause(context.Background())
	cancel(errors.New("the user left"))
	expired, stop := context.WithTimeout(context.Background(), -1)
	defer stop()
	for _, ctx := range []context.Context{cancelled, expired} {
		base := &transportScript{answers: []any{200}}
		tr := &Transport{Base: base}
		body := &transportBody{Reader: transportBytes()}
		resp, err := tr.RoundTrip(transportRequest(t, "POST", transportURL, body).WithContext(ctx))
		require.Nil(t, resp)
		require.Equal(t, context.Cause(ctx), err)
		require.Empty(t, base.requests)
		require.EqualValues(t, 1, body.closes.Load())
	}
}

// A retry that cannot begin in time is not waited for.
func TestTransportAnswersAtOnceWhenTheWaitIsTooLong(t *testing.T) {
	broken := errors.New("broken")
	for _, c := range []struct {
		name       string
		answers    []any
		deadline   time.Duration
		client     time.Duration
		maxElapsed time.Duration
		attempts   int
		elapsed    time.Duration
	}{
		{"deadline", []any{503}, 900 * time.Millisecond, 0, 0, 1, 0},
		{"deadline at the wait's end", []any{503}, time.Second, 0, 0, 1, 0},
		{"deadline, an error", []any{broken}, 900 * time.Millisecond, 0, 0, 1, 0},
		{"deadline of the second wait", []any{503}, 2500 * time.Millisecond, 0, 0, 2, time.Second},
		{"http.Client.Timeout", []any{503}, 0, 900 * time.Millisecond, 0, 1, 0},
		{"http.Client.Timeout of the second wait", []any{503}, 0, 2500 * time.Millisecond, 0, 2, time.Second},
		{"MaxElapsed", []any{transportAnswer(503, "answer 1", "Retry-After", "2")}, 0, 0, 1900 * time.Millisecond, 1, 0},
		{"MaxElapsed of the second wait", []any{503}, 0, 0, 2500 * time.Millisecond, 2, time.Second},
		{"MaxElapsed, an error", []any{503, broken}, 0, 0, 2500 * time.Millisecond, 2, time.Second},
		{"MaxElapsed just reached", []any{503}, 0, 0, 3 * time.Second, 3, 3 * time.Second},
		{"Retry-After", []any{transportAnswer(503, "answer 1", "Retry-After", "30")}, 20 * time.Second, 0, 0, 1, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				base := &transportScript{answers: c.answers}
				p := transportSteady()
				p.Retry.MaxElapsed = c.maxElapsed
				tr := &Transport{Base: base, Policy: p}
				ctx := t.Context()
				if c.deadline > 0 {
					var cancel context.CancelFunc
					ctx, cancel = context.WithTimeout(ctx, c.deadline)
					defer cancel()
				}
				start := time.Now()
				client := &http.Client{Transport: tr, Timeout: c.client}
				resp, err := client.Do(transportRequest(t, "GET", transportURL, nil).WithContext(ctx))
				require.Equal(t, c.elapsed, time.Since(start))
				require.Len(t, base.requests, c.attempts)
				if _, failed := c.answers[len(c.answers)-1].(error); failed {
					require.Nil(t, resp)
					require.ErrorIs(t, err, broken)
				} else {
					require.NoError(t, err)
					require.Equal(t, fmt.Sprint("answer ", c.attempts), transportRead(t, resp))
				}
				st, _ := tr.Stats("api.example.com")
				if c.attempts < 3 {
					require.EqualValues(t, 1, st.Suppressed.Deadline)
				}
			})
		})
	}
}

// Nothing is left running by a request that has ended in whatever way, also
// while its context and its channel go on.
func TestTransportLeavesNoGoroutines(t *testing.T) {
	for i, end := range []func(cancel func(), quit chan struct{}){
		func(func(), chan struct{}) {},
		func(cancel func(), _ chan struct{}) { time.AfterFunc(500*time.Millisecond, cancel) },
		func(_ func(), quit chan struct{}) { time.AfterFunc(500*time.Millisecond, func() { close(quit) }) },
	} {
		synctest.Test(t, func(t *testing.T) {
			before := transportGoroutines()
			p := transportSteady()
			p.Timeout, p.Idle = 10*time.Second, 10*time.Second
			tr := &Transport{Base: &transportScript{answers: []any{503}}, Policy: p}
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			req := transportRequest(t, "POST", transportURL, transportPlain()).WithContext(ctx)
			quit := make(chan struct{})
			req.Cancel = quit //lint:ignore SA1019 callers still use it
			end(cancel, quit)
			if resp, err := tr.RoundTrip(req); err == nil {
				transportRead(t, resp)
			}
			synctest.Wait()
			require.Equal(t, before, transportGoroutines(), "goroutines before and after request %d", i)
		})
	}
}

// transportGoroutines counts the goroutines that this module has started.
func transportGoroutines() int {
	stacks := make([]byte, 1<<20)
	stacks = stacks[:runtime.Stack(stacks, true)]
	return bytes.Count(stacks, []byte("created by github.com/tripper-go/tripper"))
}

// Discarded responses.

// transportStuck is the body of an error page that goes wrong.
type transportStuck struct {
	read   func(p []byte, closed <-chan struct{}) (int, error)
	close  func()
	once   sync.Once
	closed chan struct{}
}

func (s *transportStuck) Read(p []byte) (int, error) { return s.read(p, s.closed) }

func (s *transportStuck) Close() error {
	s.once.Do(func() { close(s.closed) })
	if s.close != nil {
		s.close()
	}
	return nil
}

func TestTransportDiscardsInAMoment(t *testing.T) {
	for _, c := range []struct {
		name   string
		length int64
		body   func(release <-chan struct{}) *transportStuck
	}{
		{"endless", -1, func(<-chan struct{}) *transportStuck {
			return &transportStuck{read: func(p []byte, _ <-chan struct{}) (int, error) { return len(p), nil }}
		}},
		{"longer than it said", 10, func(<-chan struct{}) *transportStuck {
			return &transportStuck{read: func(p []byte, _ <-chan struct{}) (int, error) { return len(p), nil }}
		}},
		{"huge", 1 << 40, func(<-chan struct{}) *transportStuck {
			return &transportStuck{read: func(p []byte, _ <-chan struct{}) (int, error) { return len(p), nil }}
		}},
		{"drips", -1, func(<-chan struct{}) *transportStuck {
			return &transportStuck{read: func(p []byte, closed <-chan struct{}) (int, error) {
				select {
				case <-time.After(30 * time.Millisecond):
					return 1, nil
				case <-closed:
					return 0, errors.New("closed")
				}
			}}
		}},
		{"stalls until closed", -1, func(<-chan struct{}) *transportStuck {
			return &transportStuck{read: func(_ []byte, closed <-chan struct{}) (int, error) { <-closed; return 0, io.EOF }}
		}},
		{"stalls on", 100, func(release <-chan struct{}) *transportStuck {
			return &transportStuck{read: func([]byte, <-chan struct{}) (int, error) { <-release; return 0, io.EOF }}
		}},
		{"stalls on, Close too", -1, func(release <-chan struct{}) *transportStuck {
			return &transportStuck{
				read:  func([]byte, <-chan struct{}) (int, error) { <-release; return 0, io.EOF },
				close: func() { <-release },
			}
		}},
		{"Close blocks", 0, func(release <-chan struct{}) *transportStuck {
			return &transportStuck{
				read:  func([]byte, <-chan struct{}) (int, error) { return 0, io.EOF },
				close: func() { <-release },
			}
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				release := make(chan struct{})
				defer close(release)
				page := c.body(release)
				page.closed = make(chan struct{})
				resp := transportAnswer(503, "")
				resp.Body, resp.ContentLength = page, c.length
				tr := &Transport{Base: &transportScript{answers: []any{resp, 200}}, Policy: transportSteady()}
				ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
				defer cancel()
				start := time.Now()
				done := make(chan error, 1)
				go func() {
					resp, err := tr.RoundTrip(transportRequest(t, "GET", transportURL, nil).WithContext(ctx))
					if err == nil {
						resp.Body.Close()
					}
					done <- err
				}()
				select {
				case err := <-done:
					require.NoError(t, err)
				case <-time.After(30 * time.Second):
					t.Fatal("the retry waits for the discarded body")
				}
				require.LessOrEqual(t, time.Since(start), time.Second+250*time.Millisecond)
				select {
				case <-page.closed:
				default:
					t.Fatal("the discarded body is not closed")
				}
			})
		})
	}
}

// The first answer stalls until the retry has arrived.
func TestTransportRetriesWhileTheErrorPageStalls(t *testing.T) {
	for _, http2 := range []bool{false, true} {
		retried := make(chan struct{})
		var n atomic.Int32
		target, base := transportServe(t, http2, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if n.Add(1) > 1 {
				close(retried)
				return
			}
			w.WriteHeader(503)
			io.WriteString(w, "half a")
			w.(http.Flusher).Flush()
			select {
			case <-retried:
			case <-t.Context().Done():
			}
		}))
		client := &http.Client{Transport: &Transport{Base: base, Policy: transportEager()}}
		resp, err := client.Get(target)
		require.NoError(t, err)
		require.Equal(t, 200, resp.StatusCode)
		resp.Body.Close()
	}
}

// A connection can be used again once the end of its response has been seen.
func TestTransportReadsErrorPagesToTheirEnd(t *testing.T) {
	for _, c := range []struct {
		size, length int64
		end          bool
	}{
		{0, -1, true}, {0, 0, true}, {1, -1, true}, {4 << 10, -1, true}, {4 << 10, 4 << 10, true},
		{60 << 10, 60 << 10, true}, {1 << 20, 1 << 20, false}, {1 << 20, -1, false},
	} {
		page := &transportPage{left: c.size}
		resp := transportAnswer(503, "")
		resp.Body, resp.ContentLength = page, c.length
		tr := &Transport{Base: &transportScript{answers: []any{resp, 200}}, Policy: transportEager()}
		_, err := tr.RoundTrip(transportRequest(t, "GET", transportURL, nil))
		require.NoError(t, err)
		require.Equal(t, c.end, page.ended, "%+v", c)
		require.True(t, page.closed)
		if !c.end {
			require.LessOrEqual(t, c.size-page.left, int64(64<<10+1), "too much read of %+v", c)
		}
	}
}

// A transportPage tells its end only after its last byte, as a chunked body
// does when the last chunk is late.
type transportPage struct {
	left          int64
	ended, closed bool
}

func (p *transportPage) Read(b []byte) (int, error) {
	n := min(int64(len(b)), p.left)
	p.left -= n
	if n == 0 {
		p.ended = true
		return 0, io.EOF
	}
	return int(n), nil
}

func (p *transportPage) Close() error { p.closed = true; return nil }

// transportConns counts the connections that srv accepts.
func transportConns(srv *httptest.Server) *atomic.Int32 {
	var n atomic.Int32
	srv.Config.ConnState = func(_ net.Conn, s http.ConnState) {
		if s == http.StateNew {
			n.Add(1)
		}
	}
	return &n
}

// Twenty calls that are retried once each share one connection.
func TestTransportKeepsConnections(t *testing.T) {
	for _, page := range []struct {
		size  int
		known bool // a Content-Length says so
	}{{0, true}, {0, false}, {1 << 10, true}, {1 << 10, false}, {4 << 10, true}, {4 << 10, false}, {60 << 10, true}} {
		for name, body := range map[string]func() io.Reader{"GET": nil, "POST": transportBytes, "POST without GetBody": transportPlain} {
			t.Run(fmt.Sprintf("%s/%d/%t", name, page.size, page.known), func(t *testing.T) {
				var n atomic.Int32
				srv := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
					io.Copy(io.Discard, r.Body)
					if n.Add(1)%2 == 0 {
						io.WriteString(w, "fine")
						return
					}
					if page.known {
						w.Header().Set("Content-Length", strconv.Itoa(page.size))
					}
					w.WriteHeader(503)
					w.Write(bytes.Repeat([]byte("x"), page.size))
					if !page.known {
						w.(http.Flusher).Flush() // its end comes on its own
					}
				}))
				conns := transportConns(srv)
				srv.Start()
				defer srv.Close()
				client := &http.Client{Transport: &Transport{Base: srv.Client().Transport, Policy: transportEager()}}
				for range 20 {
					method, r := "GET", io.Reader(nil)
					if body != nil {
						method, r = "POST", body()
					}
					resp, err := client.Do(transportRequest(t, method, srv.URL, r))
					require.NoError(t, err)
					require.Equal(t, "fine", transportRead(t, resp))
				}
				require.EqualValues(t, 40, n.Load())
				// One, and some more on a busy machine: net/http does not wait
				// for long until a request is written when its answer is read.
				require.LessOrEqual(t, conns.Load(), int32(4), "connections")
			})
		}
	}
}

// transportPool counts the calls of CloseIdleConnections.
type transportPool struct {
	http.RoundTripper
	closed int
}

func (p *transportPool) CloseIdleConnections() { p.closed++ }

func TestCloseIdleConnections(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		pool := &transportPool{RoundTripper: &transportScript{answers: []any{503, errors.New("broken")}}}
		p := transportSteady()
		p.Timeout = time.Minute
		tr := &Transport{Base: pool, Policy: p, Layers: []Layer{func(next http.RoundTripper) http.RoundTripper { return next }}}
		client := &http.Client{Transport: tr}
		_, err := client.Get(transportURL)
		require.Error(t, err)
		ctx, cancel := context.WithCancel(t.Context())
		time.AfterFunc(time.Millisecond, cancel)
		_, err = client.Do(transportRequest(t, "GET", transportURL, nil).WithContext(ctx))
		require.ErrorIs(t, err, context.Canceled)
		require.Zero(t, pool.closed, "a failure leaves the pool alone")

		client.CloseIdleConnections()
		require.Equal(t, 1, pool.closed)
		(&http.Client{Transport: &Transport{Base: &transportScript{}}}).CloseIdleConnections() // has none
	})
}

// Many at once.

func TestTransportConcurrentUse(t *testing.T) {
	var n atomic.Int64
	target, base := transportServe(t, false, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		switch n.Add(1) % 4 {
		case 0:
			w.WriteHeader(503)
		case 1:
			panic(http.ErrAbortHandler)
		default:
			if err == nil {
				fmt.Fprintf(w, "%s %s %s", r.Method, r.URL.Path, body)
			}
		}
	}))
	base.MaxConnsPerHost = 64 // not a storm of dials, some of which the system would refuse
	p := transportEager()
	p.Retry.MaxAttempts = 100
	p.Retry.Prepare = func(r *http.Request) error { r.Header.Set("X-Attempt", strconv.Itoa(Attempt(r.Context()))); return nil }
	var sent atomic.Uint64 // net/http resends some by itself, so the server cannot tell
	tr := &Transport{Policy: p, Base: transportFunc(func(r *http.Request) (*http.Response, error) {
		sent.Add(1)
		return base.RoundTrip(r)
	})}
	var wg sync.WaitGroup
	for g := range 200 {
		wg.Go(func() {
			for i := range 3 {
				transportConcurrentCall(t, tr, target, g, i)
			}
		})
	}
	wg.Wait()
	st, ok := tr.Stats(strings.TrimPrefix(target, "http://"))
	require.True(t, ok)
	require.Equal(t, []uint64{600, 600, sent.Load(), sent.Load(), sent.Load() - 600},
		[]uint64{st.Requests, st.OK, st.Attempts, st.Successes + st.Failures, st.Retries})
}

func transportConcurrentCall(t *testing.T, tr *Transport, target string, g, i int) {
	method, text := "POST", fmt.Sprintf("body of %d.%d", g, i)
	var body io.Reader = strings.NewReader(text)
	switch i % 3 {
	case 0:
		method, text, body = "GET", "", nil
	case 1:
		body = struct{ io.Reader }{body}
	}
	path := fmt.Sprintf("/%d/%d", g, i)
	req, err := http.NewRequest(method, target+path, body)
	if !assert.NoError(t, err) {
		return
	}
	req.Header.Set("X-Mine", path)
	resp, err := tr.RoundTrip(req)
	if !assert.NoError(t, err) {
		return
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(resp.Body)
	assert.NoError(t, err)
	assert.Equal(t, method+" "+path+" "+text, string(answer))
	assert.Equal(t, http.Header{"X-Mine": {path}}, req.Header)
}

// Stats are found by the name of the service.

func TestTransportStatsByName(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		tr := &Transport{
			Base:   &transportScript{answers: []any{503, 200}},
			Policy: transportSteady(),
			Hosts:  map[string]Policy{"named.example.com": {Service: "named"}},
			Service: func(r *http.Request) string {
				return r.Header.Get("X-Model")
			},
		}
		for _, c := range []struct{ url, model string }{
			{"http://API.example.com:80/a", ""}, {"http://api.example.com./b", ""},
			{"https://named.example.com/", ""}, {"https://api.example.com/", "opus"},
		} {
			req := transportRequest(t, "GET", c.url, nil)
			req.Header.Set("X-Model", c.model)
			resp, err := tr.RoundTrip(req)
			require.NoError(t, err)
			transportRead(t, resp)
		}
		var names []string
		for st := range tr.All() {
			names = append(names, st.Service)
		}
		require.Equal(t, []string{"api.example.com", "named", "opus"}, names)
		st, ok := tr.Stats("api.example.com")
		require.True(t, ok)
		require.Equal(t, []uint64{2, 2, 3, 2, 1, 1, 1},
			[]uint64{st.Requests, st.OK, st.Attempts, st.Successes, st.Failures, st.Retries, st.Recovered})
		_, ok = tr.Stats("API.example.com:80")
		require.False(t, ok)
	})
}

// A Layer that makes nothing is a bad configuration; one that panics does so
// for each request.
func TestTransportBrokenLayers(t *testing.T) {
	body := transportPlain()
	tr := &Transport{Layers: []Layer{func(http.RoundTripper) http.RoundTripper { return nil }}}
	_, err := tr.RoundTrip(transportRequest(t, "POST", "http://api.example.com", body))
	assert.EqualError(t, err, "tripper: Layers[0] returned nil: want a RoundTripper")

	base := &transportScript{answers: []any{200}}
	tr = &Transport{Base: base, Layers: []Layer{func(http.RoundTripper) http.RoundTripper { panic("layer") }}}
	for range 2 {
		body := &transportBody{Reader: transportBytes()}
		assert.PanicsWithValue(t, "layer", func() {
			_, _ = tr.RoundTrip(transportRequest(t, "POST", "http://api.example.com", body))
		})
		assert.EqualValues(t, 1, body.closes.Load())
	}
	assert.Empty(t, base.requests, "nothing goes past a Layer that could not be made")
}

func TestTransportClosesIdleConnectionsOfTheDefault(t *testing.T) {
	was := http.DefaultTransport
	defer func() { http.DefaultTransport = was }()
	base := &transportPool{RoundTripper: &transportScript{}}
	http.DefaultTransport = base
	(&http.Client{Transport: &Transport{}}).CloseIdleConnections()
	assert.Equal(t, 1, base.closed)
}
