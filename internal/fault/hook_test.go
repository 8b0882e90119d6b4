package fault

import (
	"context"
	"errors"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httptrace"
	"net/textproto"
	"os"
	"sync/atomic"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// hinting answers each request with a 103 first.
func hinting(t *testing.T, http2 bool) (string, *http.Transport) {
	srv := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(http.StatusEarlyHints)
		w.WriteHeader(http.StatusOK)
	}))
	srv.Config.ErrorLog = quiet
	srv.EnableHTTP2 = http2
	srv.StartTLS()
	t.Cleanup(srv.Close)
	return srv.URL, srv.Client().Transport.(*http.Transport)
}

func TestAnErrorOfTheHookIsTheCallers(t *testing.T) {
	sorry := errors.New("no hints, please")
	for _, http2 := range []bool{false, true} {
		url, tr := hinting(t, http2)
		var calls atomic.Int32
		ctx := httptrace.WithClientTrace(t.Context(), &httptrace.ClientTrace{
			Got1xxResponse: func(int, textproto.MIMEHeader) error { calls.Add(1); return sorry },
		})
		req := newRequest(t, http.MethodGet, url, nil).WithContext(WatchHook(ctx))
		err := errorOf(t, tr, req)
		for _, err := range asReturned(err) {
			assert.Equal(t, Fault{Kind: Caller}, Of(req, err), "%T %v", err, err)
		}
		assert.EqualValues(t, 1, calls.Load())
		assert.Contains(t, err.Error(), sorry.Error())
		if !http2 {
			assert.ErrorIs(t, err, sorry)
		}
	}
}

func TestHooksAreCalledOnce(t *testing.T) {
	url, tr := hinting(t, false)
	calls := make(map[string]*atomic.Int32)
	for _, name := range []string{"1xx", "outer 1xx", "get", "got", "dial", "wrote", "byte"} {
		calls[name] = new(atomic.Int32)
	}
	ctx := httptrace.WithClientTrace(t.Context(), &httptrace.ClientTrace{
		Got1xxResponse: func(code int, _ textproto.MIMEHeader) error {
			assert.Equal(t, 103, code)
			calls["outer 1xx"].Add(1)
			return nil
		},
	})
	ctx = httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{
		Got1xxResponse:       func(int, textproto.MIMEHeader) error { calls["1xx"].Add(1); return nil },
		GetConn:              func(string) { calls["get"].Add(1) },
		GotConn:              func(httptrace.GotConnInfo) { calls["got"].Add(1) },
		ConnectStart:         func(string, string) { calls["dial"].Add(1) },
		WroteRequest:         func(httptrace.WroteRequestInfo) { calls["wrote"].Add(1) },
		GotFirstResponseByte: func() { calls["byte"].Add(1) },
	})
	ctx = WatchHook(WatchHook(ctx))
	// A Layer may add a trace, too.
	var added atomic.Int32
	ctx = httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{GetConn: func(string) { added.Add(1) }})
	resp, err := tr.RoundTrip(newRequest(t, http.MethodGet, url, nil).WithContext(ctx))
	require.NoError(t, err)
	resp.Body.Close()
	for name, n := range calls {
		assert.EqualValues(t, 1, n.Load(), name)
	}
	assert.EqualValues(t, 1, added.Load())
}

type key struct{}

func TestWatchHookKeepsTheContext(t *testing.T) {
	parent, cancel := context.WithCancelCause(context.WithValue(t.Context(), key{}, "mine"))
	hook := &httptrace.ClientTrace{Got1xxResponse: func(int, textproto.MIMEHeader) error { return nil }}
	ctx := WatchHook(httptrace.WithClientTrace(parent, hook))
	assert.Equal(t, "mine", ctx.Value(key{}))
	other := &httptrace.ClientTrace{}
	assert.Same(t, other, WatchHook(httptrace.WithClientTrace(context.WithValue(parent, key{}, other), hook)).Value(key{}))
	assert.NoError(t, httptrace.ContextClientTrace(ctx).Got1xxResponse(103, nil))
	child, stop := context.WithCancel(ctx)
	defer stop()
	cancel(net.ErrClosed)
	<-child.Done()
	assert.Equal(t, net.ErrClosed, context.Cause(child))
}

func TestWatchHookWithoutAHook(t *testing.T) {
	for _, ctx := range []context.Context{
		context.Background(),
		context.WithValue(t.Context(), key{}, 1),
		httptrace.WithClientTrace(t.Context(), &httptrace.ClientTrace{GetConn: func(string) {}}),
	} {
		assert.True(t, ctx == WatchHook(ctx))
		assert.Zero(t, testing.AllocsPerRun(100, func() { WatchHook(ctx) }))
	}
}

func TestHookError(t *testing.T) {
	assert.True(t, (&HookError{os.ErrDeadlineExceeded}).Timeout())
	assert.False(t, (&HookError{net.ErrClosed}).Timeout())
	assert.EqualError(t, &HookError{net.ErrClosed}, net.ErrClosed.Error())
	twice := WatchHook(WatchHook(httptrace.WithClientTrace(t.Context(), &httptrace.ClientTrace{
		Got1xxResponse: func(int, textproto.MIMEHeader) error { return net.ErrClosed },
	})))
	err := httptrace.ContextClientTrace(twice).Got1xxResponse(103, nil)
	assert.Equal(t, &HookError{net.ErrClosed}, err)
}
