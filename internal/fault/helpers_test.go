package fault

import (
	"bufio"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// newServer starts a server that answers a GET with 200, and a POST not at all.
func newServer(t *testing.T, http2, secure bool) (*httptest.Server, *http.Transport) {
	t.Helper()
	srv := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if _, err := io.Copy(io.Discard, r.Body); err == nil && r.Method == http.MethodPost {
			<-r.Context().Done()
		}
	}))
	srv.Config.MaxHeaderBytes = 4 << 10
	srv.Config.ErrorLog = quiet
	srv.EnableHTTP2 = http2
	if secure {
		srv.StartTLS()
	} else {
		srv.Start()
	}
	t.Cleanup(srv.Close)
	tr := srv.Client().Transport.(*http.Transport)
	t.Cleanup(tr.CloseIdleConnections)
	return srv, tr
}

// listen starts a server that is not net/http's: serve has each connection.
func listen(t testing.TB, serve func(net.Conn)) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				serve(c)
			}()
		}
	}()
	return l.Addr().String()
}

// answering reads the head of a request and answers it with raw bytes.
func answering(answer string) func(net.Conn) {
	return func(c net.Conn) {
		r := bufio.NewReader(c)
		for {
			line, err := r.ReadString('\n')
			if err != nil {
				return
			}
			if strings.TrimSpace(line) == "" {
				break
			}
		}
		_, _ = io.WriteString(c, answer)
	}
}

// newTransport returns a Transport that trusts nobody, by way of a proxy if there
// is one.
func newTransport(t testing.TB, proxy string) *http.Transport {
	tr := &http.Transport{TLSClientConfig: &tls.Config{}}
	if proxy != "" {
		u, err := url.Parse(proxy)
		require.NoError(t, err)
		tr.Proxy = http.ProxyURL(u)
	}
	t.Cleanup(tr.CloseIdleConnections)
	return tr
}

// errorOf sends req, which has to fail.
func errorOf(t testing.TB, rt http.RoundTripper, req *http.Request) error {
	t.Helper()
	resp, err := rt.RoundTrip(req)
	if err == nil {
		resp.Body.Close()
	}
	require.Error(t, err)
	return err
}

func newRequest(t testing.TB, method, url string, body io.Reader) *http.Request {
	t.Helper()
	req, err := http.NewRequest(method, url, body)
	require.NoError(t, err)
	return req
}

// plain hides what http.NewRequest knows about a body.
func plain(s string) io.Reader { return struct{ io.Reader }{strings.NewReader(s)} }

// asReturned gives err as a RoundTripper and an http.Client give it.
func asReturned(err error) []error {
	return []error{err, &url.Error{Op: "Get", URL: "https://api.example.com/", Err: err}, errors.Join(err)}
}
