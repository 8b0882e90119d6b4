package fault

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/tripper-go/tripper/internal/replay"
	"github.com/tripper-go/tripper/internal/timeout"
)

func TestOfTypes(t *testing.T) {
	never := Fault{NeverSent: true}
	final := Fault{Kind: Final, NeverSent: true}
	for _, c := range []struct {
		err  error
		want Fault
	}{
		{nil, Fault{}},
		{io.EOF, Fault{}},
		{io.ErrUnexpectedEOF, Fault{}},
		{errors.New("http: server closed idle connection"), Fault{}},
		{context.DeadlineExceeded, Fault{}},
		{os.ErrDeadlineExceeded, Fault{}},
		{&net.OpError{Op: "read", Err: syscall.ECONNRESET}, Fault{}},
		{&net.OpError{Op: "write", Err: syscall.EPIPE}, Fault{}},
		{&net.OpError{Op: "dial", Err: syscall.ECONNREFUSED}, never},
		{&net.OpError{Op: "proxyconnect", Err: syscall.ECONNREFUSED}, never},
		{&net.OpError{Op: "socks connect", Err: io.EOF}, never},
		{&net.OpError{Op: "socks connect", Err: errors.New("unknown error host unreachable")}, never},
		{&net.OpError{Op: "socks connect", Err: errors.New("username/password authentication failed")}, Fault{Kind: Proxy, NeverSent: true}},
		{&net.DNSError{Err: "no such host", IsNotFound: true}, never},
		{errors.Join(&net.OpError{Op: "dial", Err: io.EOF}, &net.OpError{Op: "dial", Err: io.EOF}), never},
		{errors.Join(&net.OpError{Op: "dial", Err: io.EOF}, io.EOF), Fault{}},
		{&tls.CertificateVerificationError{Err: x509.UnknownAuthorityError{}}, final},
		{x509.HostnameError{Certificate: &x509.Certificate{}}, final},
		{x509.UnknownAuthorityError{}, final},
		{x509.CertificateInvalidError{Reason: x509.Expired}, final},
		{x509.SystemRootsError{}, final},
		{&tls.ECHRejectionError{}, final},
		{http.ErrSchemeMismatch, final},
		{tls.RecordHeaderError{Msg: "unsupported SSLv2 handshake received"}, final},
		{tls.RecordHeaderError{Msg: "first record does not look like a TLS handshake", Conn: newNowhere()}, final},
		{tls.RecordHeaderError{Msg: "received record with version 301 when expecting version 303"}, Fault{}},
		{tls.RecordHeaderError{Msg: "oversized record received with length 40000"}, Fault{}},
		{&net.OpError{Op: "proxyconnect", Err: x509.UnknownAuthorityError{}}, Fault{Kind: Proxy, NeverSent: true}},
		{context.Canceled, Fault{Kind: Cancelled}},
		{&net.OpError{Op: "dial", Err: context.Canceled}, Fault{Kind: Cancelled}},
		{&replay.ReadError{Err: context.Canceled}, Fault{Kind: Caller}},
		{&timeout.SlowBodyError{}, Fault{Kind: Caller}},
		{&timeout.Exceeded{}, Fault{}},
		{&HookError{io.EOF}, Fault{Kind: Caller}},
	} {
		assert.Equal(t, c.want, Of(nil, c.err), "%T %v", c.err, c.err)
		if c.err != nil {
			wrapped := fmt.Errorf("a layer: %w", &url.Error{Op: "Get", URL: "https://x/", Err: c.err})
			assert.Equal(t, c.want, Of(newRequest(t, http.MethodGet, "https://x/", nil), wrapped), "%T %v", c.err, c.err)
		}
	}
}

func TestACancelledContextThatIsADeadline(t *testing.T) {
	ctx, stop := context.WithDeadline(t.Context(), time.Now().Add(-time.Second))
	defer stop()
	req := newRequest(t, http.MethodGet, "https://x/", nil).WithContext(ctx)
	assert.Equal(t, Service, Of(req, context.Canceled).Kind)
}

type lukewarm struct{ error }

func (lukewarm) Timeout() bool   { return false }
func (l lukewarm) Unwrap() error { return l.error }

func TestIsTimeout(t *testing.T) {
	for _, err := range []error{os.ErrDeadlineExceeded, context.DeadlineExceeded, &timeout.Exceeded{}, lukewarm{os.ErrDeadlineExceeded},
		errors.Join(io.EOF, os.ErrDeadlineExceeded), &url.Error{Err: fmt.Errorf("x: %w", os.ErrDeadlineExceeded)}} {
		assert.True(t, IsTimeout(err), "%v", err)
	}
	for _, err := range []error{nil, io.EOF, lukewarm{io.EOF}, errors.Join(io.EOF, lukewarm{io.EOF}), context.Canceled} {
		assert.False(t, IsTimeout(err), "%v", err)
	}
}

// A server ends the handshake with each alert there is.
func TestFatalAlerts(t *testing.T) {
	for code := range 256 {
		addr := listen(t, func(c net.Conn) {
			_, _ = c.Read(make([]byte, 4<<10)) // the client's hello
			_, _ = c.Write([]byte{21, 3, 3, 0, 2, 2, byte(code)})
			_, _ = c.Read(make([]byte, 1))
		})
		req := newRequest(t, http.MethodGet, "https://"+addr, nil)
		err := errorOf(t, newTransport(t, ""), req)
		made := &net.OpError{Op: "remote error", Err: tls.AlertError(code)}
		if code == alertInternalError || code == alertCloseNotify {
			assert.Equal(t, Fault{}, Of(req, err), "%d: %v", code, err)
			assert.Equal(t, Service, Of(nil, made).Kind)
		} else {
			assert.Equal(t, Final, Of(req, err).Kind, "%d: %v", code, err)
			assert.Equal(t, Of(req, err), Of(nil, made), "%d", code)
		}
		assert.Equal(t, Fault{}, Of(nil, &net.OpError{Op: "local error", Err: tls.AlertError(code)}), "%d", code)
	}
	assert.True(t, Of(nil, &net.OpError{Op: "remote error", Err: tls.AlertError(48)}).NeverSent, "unknown certificate authority")
	assert.False(t, Of(nil, &net.OpError{Op: "remote error", Err: tls.AlertError(20)}).NeverSent, "bad record")
}

func TestCertificates(t *testing.T) {
	srv := httptest.NewUnstartedServer(http.NotFoundHandler())
	srv.Config.ErrorLog = quiet
	srv.StartTLS()
	defer srv.Close()
	req := newRequest(t, http.MethodGet, srv.URL, nil)
	err := errorOf(t, newTransport(t, ""), req)
	assert.Equal(t, Fault{Kind: Final, NeverSent: true}, Of(req, err), "not trusted: %v", err)

	other := newRequest(t, http.MethodGet, "https://other.example.net/", nil)
	tr := srv.Client().Transport.(*http.Transport).Clone()
	tr.DialContext = func(ctx context.Context, network, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, network, srv.Listener.Addr().String())
	}
	defer tr.CloseIdleConnections()
	tr.TLSClientConfig.ServerName = ""
	err = errorOf(t, tr, other)
	assert.Equal(t, Fault{Kind: Final, NeverSent: true}, Of(other, err), "another name: %v", err)
}

func TestAClientCertificateThatIsMissing(t *testing.T) {
	for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
		srv := httptest.NewUnstartedServer(http.NotFoundHandler())
		srv.Config.ErrorLog = quiet
		srv.TLS = &tls.Config{ClientAuth: tls.RequireAndVerifyClientCert, MaxVersion: version}
		srv.StartTLS()
		req := newRequest(t, http.MethodGet, srv.URL, nil)
		tr := srv.Client().Transport.(*http.Transport)
		var err error
		for range 50 { // with TLS 1.3 the request may be written, and break, before the alert is read
			if err = errorOf(t, tr, req); Of(req, err).Kind == Final {
				break
			}
		}
		assert.Equal(t, Fault{Kind: Final, NeverSent: true}, Of(req, err), "%x: %v", version, err)
		srv.Close()
	}
}

func TestNoTLS(t *testing.T) {
	srv, _ := newServer(t, false, false)
	req := newRequest(t, http.MethodGet, strings.Replace(srv.URL, "http:", "https:", 1), nil)
	tr := newTransport(t, "")
	assert.Equal(t, Fault{Kind: Final, NeverSent: true}, Of(req, errorOf(t, tr, req)))
	_, err := (&http.Client{Transport: tr}).Do(req)
	require.ErrorIs(t, err, http.ErrSchemeMismatch)
	assert.Equal(t, Fault{Kind: Final, NeverSent: true}, Of(req, err))
	assert.Equal(t, Fault{Kind: Final, NeverSent: true}, Of(nil, err))
}

func TestTheWayToTheService(t *testing.T) {
	silent := listen(t, func(c net.Conn) { _, _ = io.Copy(io.Discard, c) })
	dead, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	dead.Close()

	tr := newTransport(t, "")
	tr.TLSHandshakeTimeout = time.Millisecond
	req := newRequest(t, http.MethodGet, "https://"+silent, nil)
	err = errorOf(t, tr, req)
	assert.Equal(t, Fault{NeverSent: true}, Of(req, err), "%v", err)
	assert.True(t, IsTimeout(err))

	tr = newTransport(t, "")
	tr.ResponseHeaderTimeout = time.Millisecond
	req = newRequest(t, http.MethodGet, "http://"+silent, nil)
	err = errorOf(t, tr, req)
	assert.Equal(t, Fault{}, Of(req, err), "%v", err)
	assert.True(t, IsTimeout(err))

	req = newRequest(t, http.MethodGet, "http://"+dead.Addr().String(), nil)
	assert.Equal(t, Fault{NeverSent: true}, Of(req, errorOf(t, newTransport(t, ""), req)))

	for _, scheme := range []string{"http", "https", "socks5"} {
		tr := newTransport(t, scheme+"://"+dead.Addr().String())
		req := newRequest(t, http.MethodGet, "https://api.example.com/", nil)
		assert.Equal(t, Fault{NeverSent: true}, Of(req, errorOf(t, tr, req)), scheme)
	}
}

func TestAProxyThatRefusesToConnect(t *testing.T) {
	for status := 201; status < 600; status++ {
		phrase := http.StatusText(status)
		if phrase == "" {
			continue
		}
		tr := newTransport(t, "http://"+listen(t, answering(fmt.Sprintf("HTTP/1.1 %d %s\r\n\r\n", status, phrase))))
		req := newRequest(t, http.MethodPost, "https://api.example.com/", plain("x"))
		err := errorOf(t, tr, req)
		want := Fault{NeverSent: true}
		if status/100 == 4 && status != 408 && status != 425 && status != 429 {
			want.Kind = Proxy
		}
		for _, err := range asReturned(err) {
			assert.Equal(t, want, Of(req, err), "%d: %v", status, err)
			assert.Equal(t, want, Of(nil, err), "%d: %v", status, err)
		}
		clear := newRequest(t, http.MethodPost, "http://api.example.com/", plain("x"))
		assert.Equal(t, Fault{}, Of(clear, err), "nobody asks a proxy to connect for this")
	}
	req := newRequest(t, http.MethodGet, "https://api.example.com/", nil)
	for phrase, want := range map[string]Fault{
		"not allowed": {Kind: Proxy, NeverSent: true}, "FORBIDDEN": {Kind: Proxy, NeverSent: true},
		"Blocked by policy": {}, "Forbidden by policy": {},
	} {
		tr := newTransport(t, "http://"+listen(t, answering("HTTP/1.1 403 "+phrase+"\r\n\r\n")))
		assert.Equal(t, want, Of(req, errorOf(t, tr, req)), phrase)
	}
}

func TestASOCKSProxyThatRefuses(t *testing.T) {
	for code, want := range map[byte]Kind{1: Service, 2: Proxy, 3: Service, 4: Service, 5: Service, 6: Service, 7: Proxy, 8: Proxy, 99: Service} {
		tr := newTransport(t, "socks5://"+listen(t, func(c net.Conn) {
			_, _ = io.ReadFull(c, make([]byte, 3))
			_, _ = c.Write([]byte{5, 0})
			_, _ = c.Read(make([]byte, 256))
			_, _ = c.Write([]byte{5, code, 0, 1, 0, 0, 0, 0, 0, 0})
		}))
		req := newRequest(t, http.MethodGet, "http://api.example.com/", nil)
		err := errorOf(t, tr, req)
		assert.Equal(t, Fault{Kind: want, NeverSent: true}, Of(req, err), "%d: %v", code, err)
	}
	tr := newTransport(t, "socks5://u:p@"+listen(t, func(c net.Conn) {
		_, _ = io.ReadFull(c, make([]byte, 4))
		_, _ = c.Write([]byte{5, 0xff})
	}))
	req := newRequest(t, http.MethodGet, "http://api.example.com/", nil)
	assert.Equal(t, Fault{Kind: Proxy, NeverSent: true}, Of(req, errorOf(t, tr, req)))
}
