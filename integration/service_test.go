package integration

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"
)

// A step is how a service answers one request.
type step func(w http.ResponseWriter, r *http.Request)

// received is a request as it came over the wire.
type received struct {
	Method string
	Path   string
	Header http.Header
	Length int64
	Body   string
}

// A service plays its steps, one a request; the last one answers all further
// requests.
type service struct {
	*httptest.Server
	t     *testing.T
	tls   bool
	mu    sync.Mutex
	steps []step
	seen  []received
}

// play starts a service over plain HTTP.
func play(t *testing.T, steps ...step) *service {
	s := &service{t: t, steps: steps}
	s.Server = httptest.NewServer(s)
	t.Cleanup(s.stop)
	return s
}

// playTLS starts a service over TLS, which speaks HTTP/2 as well.
func playTLS(t *testing.T, steps ...step) *service {
	s := &service{t: t, steps: steps, tls: true}
	s.Server = httptest.NewUnstartedServer(s)
	s.EnableHTTP2 = true
	s.StartTLS()
	t.Cleanup(s.stop)
	return s
}

func (s *service) stop() {
	s.CloseClientConnections() // hanging steps end
	s.Close()
}

func (s *service) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	seen := received{r.Method, r.URL.Path, r.Header.Clone(), r.ContentLength, ""}
	body, err := io.ReadAll(r.Body)
	seen.Body = string(body)
	if err != nil {
		seen.Body += "\n" + err.Error() // no other body is equal to it
	}
	s.mu.Lock()
	n := min(len(s.seen), len(s.steps)-1)
	s.seen = append(s.seen, seen)
	s.mu.Unlock()
	s.steps[n](w, r)
}

// wire returns the requests so far.
func (s *service) wire() []received {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]received(nil), s.seen...)
}

// base returns a RoundTripper to the service with connections of its own.
func (s *service) base() *http.Transport {
	base := &http.Transport{ForceAttemptHTTP2: s.tls}
	if s.tls {
		base.TLSClientConfig = s.Client().Transport.(*http.Transport).TLSClientConfig.Clone()
	}
	s.t.Cleanup(base.CloseIdleConnections)
	return base
}

// answer answers with a body and headers, given as name and value in turn.
func answer(status int, contentType, body string, headers ...string) step {
	return func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", contentType)
		for i := 0; i < len(headers); i += 2 {
			w.Header().Set(headers[i], headers[i+1])
		}
		w.WriteHeader(status)
		io.WriteString(w, body)
	}
}

// reset breaks the connection off with a TCP reset.
func reset(w http.ResponseWriter, _ *http.Request) {
	conn, _, err := w.(http.Hijacker).Hijack()
	if err != nil {
		panic(fmt.Errorf("cannot reset: %w", err))
	}
	conn.(*net.TCPConn).SetLinger(0)
	conn.Close()
}

// A hang never answers, and tells when a request has come and when its client
// has left.
type hang struct{ arrived, left chan struct{} }

func newHang() *hang { return &hang{make(chan struct{}, 100), make(chan struct{}, 100)} }

func (h *hang) step(_ http.ResponseWriter, r *http.Request) {
	h.arrived <- struct{}{}
	<-r.Context().Done()
	h.left <- struct{}{}
}

// receive waits for c, but not for ever.
func receive(t *testing.T, c <-chan struct{}, what string) {
	t.Helper()
	select {
	case <-c:
	case <-t.Context().Done():
		require.Fail(t, "test over", "waiting for: %s", what)
	case <-patience():
		require.Fail(t, "waited too long", "for: %s", what)
	}
}
