package fault

import (
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// decisive are texts that net/http writes and that decide something when it does.
var decisive = []string{
	noURL, noHeader, noHost, noHostAtAll, badHost, control, requestURI, noExtended, http2Prefix + badScheme2,
	http2Prefix + notEncrypted, http2Prefix + badProtocol, http2Prefix + badHost2, http2Prefix + errTooManyFields,
	errTooManyFields, errCancelled, errCancelledWaiting, errBodyTooLong,
	`net/http: invalid method "GET"`, `net/http: invalid method "G T"`, `net/http: invalid header field name "a b"`,
	`net/http: invalid header field value for "Accept"`, `net/http: invalid trailer field name "a b"`,
	`unsupported protocol scheme "ftp"`, `http: Request.ContentLength=5 with nil Body`, `http: ContentLength=5 with Body length 4`,
	`http2: invalid Upgrade request header: ["h2c"]`, `http2: invalid request :path "x"`, `invalid Trailer key "Trailer"`,
	brokenPrefix + `http: ContentLength=5 with Body length 4`, context.Canceled.Error(), "tls: bad certificate",
	"remote error: tls: bad certificate", "x509: certificate signed by unknown authority", http.ErrSchemeMismatch.Error(),
}

// Those of decisive, and what decides whether anything was sent.
func hostile() []string {
	return append([]string{
		goAway, unusable, noConn, goAwayCode + "NO_ERROR", "net/http: TLS handshake timeout", "Forbidden", "Bad Gateway",
		"http2: Transport: cannot retry err [" + goAway + "] after Request.Body was written; define Request.GetBody to avoid this error",
		"http2: Transport: cannot retry err [stream error: stream ID 1; REFUSED_STREAM] after Request.Body was written; define Request.GetBody to avoid this error",
		"dial tcp: connection refused", "proxyconnect tcp: EOF", "stream error: stream ID 1; REFUSED_STREAM",
	}, decisive...)
}

// requests are valid, and have what some of the texts are about.
func requests(t testing.TB, url string) []*http.Request {
	get := newRequest(t, http.MethodGet, url, nil)
	post := newRequest(t, http.MethodPost, url, strings.NewReader("12345"))
	trailer := newRequest(t, http.MethodPost, url, plain("12345"))
	trailer.ContentLength, trailer.Trailer = -1, http.Header{"A": {"a"}}
	return []*http.Request{get, post, trailer}
}

func TestWordsOfAServerDecideNothing(t *testing.T) {
	for _, words := range hostile() {
		for _, answer := range []string{
			words, words + "\r\n\r\n", "HTTP/1.1 " + words + "\r\n\r\n", "HTTP/1.1 2" + words + "\r\n\r\n",
			"HTTP/1.1 200 OK\r\n" + words + "\r\n", "HTTP/1.1 200 OK\r\n " + words + "\r\n\r\n",
			"HTTP/1.1 200 OK\r\nContent-Length: " + words + "\r\n\r\n", "HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: " + words + "\r\n\r\n",
			"HTTP/1.1 200 OK\r\nTransfer-Encoding: " + words + "\r\n\r\n", "HTTP/1.1 103 " + words + "\r\n" + words,
			words + " 200 OK\r\n\r\n",
		} {
			url := "http://" + listen(t, answering(answer))
			for _, req := range requests(t, url) {
				if resp, err := newTransport(t, "").RoundTrip(req); err != nil {
					for _, err := range asReturned(err) {
						assert.Equal(t, Fault{}, Of(req, err), "%q: %v", answer, err)
						assert.Equal(t, Fault{}, Of(nil, err), "%q: %v", answer, err)
					}
				} else {
					resp.Body.Close()
				}
			}
		}
	}
}

func TestWordsOfAProxyDecideNothing(t *testing.T) {
	for _, words := range decisive {
		for _, answer := range []string{"HTTP/1.1 502 " + words + "\r\n\r\n", "HTTP/1.1 403 " + words + "\r\n\r\n", words + "\r\n\r\n"} {
			tr := newTransport(t, "http://"+listen(t, answering(answer)))
			for _, req := range requests(t, "https://api.example.com/") {
				err := errorOf(t, tr, req)
				for _, err := range asReturned(err) {
					assert.Equal(t, Service, Of(req, err).Kind, "%q: %v", answer, err)
				}
			}
		}
	}
}

// frame returns a frame of HTTP/2.
func frame(kind, flags byte, stream uint32, payload []byte) []byte {
	head := binary.BigEndian.AppendUint32(nil, uint32(len(payload))<<8|uint32(kind))
	head = append(head, flags)
	return append(binary.BigEndian.AppendUint32(head, stream), payload...)
}

// overHTTP2 speaks HTTP/2 without TLS: it answers the first request with frames.
func overHTTP2(t testing.TB, frames ...[]byte) (url string, tr *http.Transport) {
	tr = newTransport(t, "")
	tr.Protocols = new(http.Protocols)
	tr.Protocols.SetUnencryptedHTTP2(true)
	return "http://" + listen(t, func(c net.Conn) {
		if _, err := io.ReadFull(c, make([]byte, len("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"))); err != nil {
			return
		}
		_, _ = c.Write(frame(4, 0, 0, nil))
		head := make([]byte, 9)
		for {
			if _, err := io.ReadFull(c, head); err != nil {
				return
			}
			if _, err := io.CopyN(io.Discard, c, int64(binary.BigEndian.Uint32(head)>>8)); err != nil {
				return
			}
			if head[3] == 1 {
				break
			}
		}
		for _, f := range frames {
			_, _ = c.Write(f)
		}
		// A connection that is closed at once loses what was written to it.
		_ = c.(*net.TCPConn).CloseWrite()
		_, _ = io.Copy(io.Discard, c)
	}), tr
}

func goAwayFrame(last, code uint32, debug string) []byte {
	payload := binary.BigEndian.AppendUint32(nil, last)
	return frame(7, 0, 0, append(binary.BigEndian.AppendUint32(payload, code), debug...))
}

func resetFrame(stream, code uint32) []byte {
	return frame(3, 0, stream, binary.BigEndian.AppendUint32(nil, code))
}

func TestWordsOverHTTP2DecideNothing(t *testing.T) {
	for _, words := range hostile() {
		url, tr := overHTTP2(t, goAwayFrame(1, 0, words))
		for _, req := range requests(t, url) {
			err := errorOf(t, tr, req)
			require.Contains(t, err.Error(), "debug=")
			assert.Equal(t, Fault{}, Of(req, err), "%v", err)
			assert.Equal(t, Fault{}, Of(nil, err), "%v", err)
		}
	}
}

func TestWhatHTTP2DidNotProcess(t *testing.T) {
	for name, c := range map[string]struct {
		frame []byte
		never bool
	}{
		"refused":              {resetFrame(1, refusedStream), true},
		"reset":                {resetFrame(1, 8), false},
		"reset by error":       {resetFrame(1, 2), false},
		"protocol error":       {resetFrame(1, 1), false},
		"last stream below":    {goAwayFrame(0, 0, ""), true},
		"below, with an error": {goAwayFrame(0, 11, "too many"), true},
		"below, unknown error": {goAwayFrame(0, 999, ""), true},
		"last stream":          {goAwayFrame(1, 0, ""), false},
		"connection closed":    {nil, false},
	} {
		t.Run(name, func(t *testing.T) {
			url, tr := overHTTP2(t, c.frame)
			req := newRequest(t, http.MethodPost, url, plain("x")) // without GetBody
			err := errorOf(t, tr, req)
			for _, err := range asReturned(err) {
				assert.Equal(t, Fault{NeverSent: c.never}, Of(req, err), "%T %v", err, err)
			}
		})
	}
}

func TestWhyHTTP2CannotRetry(t *testing.T) {
	for why, never := range map[string]bool{
		goAway: true, unusable: true,
		"stream error: stream ID 3; REFUSED_STREAM":                              true,
		"stream error: stream ID 4294967295; REFUSED_STREAM; received from peer": true,
		"stream error: stream ID 3; PROTOCOL_ERROR; received from peer":          false,
		"stream error: stream ID x; REFUSED_STREAM":                              false,
		"stream error: stream ID 3; CANCEL; REFUSED_STREAM":                      false,
		"REFUSED_STREAM":   false,
		goAway + " of a b": false,
	} {
		s := "http2: Transport: cannot retry err [" + why + "] after Request.Body was written; define Request.GetBody to avoid this error"
		assert.Equal(t, Fault{NeverSent: never}, Of(nil, errors.New(s)), s)
		assert.Equal(t, Fault{}, Of(nil, errors.New(s+".")), s)
		assert.Equal(t, Fault{}, Of(nil, errors.New("x"+s)), s)
	}
	for s, never := range map[string]bool{
		goAwayCode + "NO_ERROR": true, goAwayCode + "unknown error code 0x2a": true, goAwayCode + "unknown error code 0x2a ": false,
		goAwayCode + "unknown error code 0x02a": false, goAwayCode + "HELLO": false, goAwayCode: false,
	} {
		assert.Equal(t, Fault{NeverSent: never}, Of(nil, errors.New(s)), s)
	}
}

// memory is a connection whose peer gives one answer to whatever it is told.
type memory struct {
	nowhere
	answer io.Reader
}

func (m *memory) Read(p []byte) (int, error) {
	<-m.written
	return m.answer.Read(p)
}

// unwritable is a connection that takes nothing.
type unwritable struct {
	nowhere
	err error
}

func (u *unwritable) Write([]byte) (int, error) { return 0, u.err }

// net/http does not always say that it has written nothing: its goroutines race
// to tell of the broken connection. But it says so sooner or later, and it is
// never anybody's fault but the service's.
func TestAConnectionThatTakesNothing(t *testing.T) {
	for _, why := range []error{syscall.EPIPE, errors.New("Forbidden"), errors.New("Bad Gateway")} {
		neverSent := false
		for range 100 {
			conn := &unwritable{nowhere{ended: make(chan struct{})}, why}
			tr := newTransport(t, "")
			tr.DialTLSContext = func(context.Context, string, string) (net.Conn, error) { return conn, nil }
			req := newRequest(t, http.MethodPost, "https://api.example.com/", plain("x"))
			got := Of(req, errorOf(t, tr, req))
			assert.Equal(t, Service, got.Kind, "%v", why)
			neverSent = neverSent || got.NeverSent
		}
		assert.True(t, neverSent, "%v", why)
	}
	broken := errors.New("Forbidden")
	assert.Equal(t, Fault{}, Of(nil, fmt.Errorf(brokenPrefix+"%w", broken)), "a proxy's words are never in here")
}

func FuzzOf(f *testing.F) {
	for _, words := range hostile() {
		f.Add(words, "HTTP/1.1 200 OK\r\n"+words+"\r\n\r\n")
	}
	f.Add("", "HTTP/1.1 103 Early Hints\r\nA: b\r\n\r\n")
	f.Fuzz(func(t *testing.T, phrase, answer string) {
		err := exchange(t, "http://api.example.com/", "", answer)
		if err != nil {
			require.Equal(t, Fault{}, Of(newRequest(t, http.MethodGet, "http://api.example.com/", nil), err), "%v", err)
			require.Equal(t, Fault{}, Of(nil, err), "%v", err)
		}
		err = exchange(t, "https://api.example.com/", "http://proxy.example.com/", "HTTP/1.1 502 "+phrase+"\r\n\r\n")
		req := newRequest(t, http.MethodGet, "https://api.example.com/", nil)
		switch kind := Of(req, err).Kind; kind {
		case Service:
		case Proxy:
			status := phrases()[strings.ToLower(textsOf(err)[0].s)]
			require.True(t, status >= 400 && status < 500, "%q is %d", phrase, status)
		default:
			require.Fail(t, "a proxy's words decided", "%q is %d", phrase, kind)
		}
	})
}

// exchange sends a request and has its peer give one answer.
func exchange(t *testing.T, target, proxy, answer string) error {
	conn := &memory{nowhere: nowhere{written: make(chan struct{}), ended: make(chan struct{}), obeyed: make(chan struct{})}, answer: strings.NewReader(answer)}
	tr := &http.Transport{
		DialContext:     func(context.Context, string, string) (net.Conn, error) { return conn, nil },
		TLSClientConfig: &tls.Config{InsecureSkipVerify: true},
	}
	if proxy != "" {
		u, err := url.Parse(proxy)
		require.NoError(t, err)
		tr.Proxy = http.ProxyURL(u)
	}
	defer tr.CloseIdleConnections()
	ctx, stop := context.WithTimeout(t.Context(), 10*time.Second)
	defer stop()
	resp, err := tr.RoundTrip(newRequest(t, http.MethodGet, target, nil).WithContext(ctx))
	if err == nil {
		resp.Body.Close()
	}
	return err
}

// A stream is an HTTP/2 stream error as net/http makes it.
type stream streamError

func (s stream) Error() string { return "stream error" }

func (s stream) As(target any) bool {
	as, ok := target.(*streamError)
	if ok {
		*as = streamError(s)
	}
	return ok
}

func TestStreamErrors(t *testing.T) {
	for code := range uint32(16) {
		for _, err := range asReturned(stream{StreamID: 1, Code: code}) {
			assert.Equal(t, Fault{NeverSent: code == 7}, Of(nil, err), "%d", code)
		}
	}
	assert.Equal(t, Fault{Kind: Caller}, Of(nil, stream{Code: 1, Cause: &HookError{io.EOF}}))
}
