package timeout

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
	"weak"

	"github.com/stretchr/testify/require"
)

type baseFunc func(*http.Request) (*http.Response, error)

func (f baseFunc) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

const limit = 30 * time.Second

func newRequest(ctx context.Context, t *testing.T) *http.Request {
	t.Helper()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://example.com/", nil)
	require.NoError(t, err)
	return req
}

func response(body io.Reader) *http.Response {
	rc, ok := body.(io.ReadCloser)
	if !ok {
		rc = io.NopCloser(body)
	}
	return &http.Response{StatusCode: http.StatusOK, Header: http.Header{}, Body: rc}
}

// A silent base never answers, but leaves when it is told to.
func silent(req *http.Request) (*http.Response, error) {
	<-req.Context().Done()
	return nil, context.Cause(req.Context())
}

// A closeCounter is a response body.
type closeCounter struct {
	io.Reader
	err    error
	closes atomic.Int32
}

func (c *closeCounter) Close() error {
	c.closes.Add(1)
	if r, ok := c.Reader.(io.Closer); ok {
		r.Close()
	}
	return c.err
}

func requireExceeded(t *testing.T, err error, text string) {
	t.Helper()
	require.EqualError(t, err, text)
	require.ErrorIs(t, err, context.DeadlineExceeded)
	require.NotErrorIs(t, err, context.Canceled)
	var timeout net.Error
	require.ErrorAs(t, err, &timeout)
	require.True(t, timeout.Timeout())
	require.True(t, (&url.Error{Err: err}).Timeout())
	require.True(t, (&url.Error{Err: err}).Temporary())
}

func TestHeadersLimit(t *testing.T) {
	for name, base := range map[string]baseFunc{
		"cause": silent,
		"plain error": func(req *http.Request) (*http.Response, error) {
			<-req.Context().Done()
			return nil, req.Context().Err() // Canceled, which the caller did not do
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				start := time.Now()
				resp, err := (&Transport{Base: base, Headers: limit}).RoundTrip(newRequest(ctx, t))
				require.Equal(t, limit, time.Since(start))
				require.Nil(t, resp)
				requireExceeded(t, err, "tripper: no response headers within 30s")
				require.Equal(t, &Exceeded{"no response headers", limit}, err)
				require.NoError(t, ctx.Err(), "the caller's context")
			})
		})
	}
}

func TestNoLimits(t *testing.T) {
	req := newRequest(t.Context(), t)
	want := response(strings.NewReader("abc"))
	base := baseFunc(func(r *http.Request) (*http.Response, error) {
		require.Same(t, req, r)
		return want, nil
	})
	resp, err := (&Transport{Base: base}).RoundTrip(req)
	require.NoError(t, err)
	require.Same(t, want, resp)

	refused := errors.New("refused")
	resp, err = (&Transport{Base: base, Hold: func(r *http.Request, resp *http.Response) (*http.Response, error) {
		require.Same(t, req, r)
		require.Same(t, want, resp)
		return nil, refused
	}}).RoundTrip(req)
	require.Nil(t, resp)
	require.Equal(t, refused, err)
}

func TestNoHeadersLimit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		tr := &Transport{Idle: limit, Base: baseFunc(func(*http.Request) (*http.Response, error) {
			time.Sleep(10 * limit)
			return response(strings.NewReader("abc")), nil
		})}
		resp, err := tr.RoundTrip(newRequest(t.Context(), t))
		require.NoError(t, err)
		requireReads(t, "abc", resp)
	})
}

func requireReads(t *testing.T, want string, resp *http.Response) {
	t.Helper()
	got, err := io.ReadAll(resp.Body)
	require.NoError(t, err)
	require.Equal(t, want, string(got))
	require.NoError(t, resp.Body.Close())
}

func TestSlowBodyIsNotCutByTheHeadersLimit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var sent context.Context
		tr := &Transport{Headers: limit, Base: baseFunc(func(req *http.Request) (*http.Response, error) {
			sent = req.Context()
			time.Sleep(limit - 1)
			return response(trickle(sent, 100, time.Minute)), nil
		})}
		resp, err := tr.RoundTrip(newRequest(t.Context(), t))
		require.NoError(t, err)
		requireReads(t, strings.Repeat("x", 100), resp)
		require.Error(t, sent.Err(), "ends with the body")
	})
}

// trickle returns a body of n bytes, one after each pause, that ends with ctx.
func trickle(ctx context.Context, n int, pause time.Duration) io.ReadCloser {
	r, w := io.Pipe()
	go func() {
		defer w.Close()
		for range n {
			select {
			case <-time.After(pause):
			case <-ctx.Done():
				w.CloseWithError(context.Cause(ctx))
			}
			if _, err := w.Write([]byte("x")); err != nil {
				return
			}
		}
	}()
	return r
}

// Headers that come in the instant of the limit are either in time, and then the
// body is all right, or late.
func TestHeadersAtTheLimit(t *testing.T) {
	var late int
	for i := range 100 {
		synctest.Test(t, func(t *testing.T) {
			body := &closeCounter{}
			early := time.After(limit) // comes just before the limit
			tr := &Transport{Headers: limit, Base: baseFunc(func(req *http.Request) (*http.Response, error) {
				if i%3 == 0 {
					early = time.After(limit) // just after it
				}
				<-early
				body.Reader = trickle(req.Context(), 3, time.Second)
				return response(body), nil
			})}
			resp, err := tr.RoundTrip(newRequest(t.Context(), t))
			if err != nil {
				late++
				require.Nil(t, resp)
				requireExceeded(t, err, "tripper: no response headers within 30s")
			} else {
				requireReads(t, "xxx", resp)
			}
			require.EqualValues(t, 1, body.closes.Load())
		})
	}
	t.Logf("%d of 100 were late", late)
}

// A base that does not look at its context answers too late.
func TestLateResponseIsClosed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		body := &closeCounter{Reader: strings.NewReader("abc")}
		tr := &Transport{Headers: limit, Base: baseFunc(func(*http.Request) (*http.Response, error) {
			time.Sleep(2 * limit)
			return response(body), nil
		})}
		resp, err := tr.RoundTrip(newRequest(t.Context(), t))
		require.Nil(t, resp)
		requireExceeded(t, err, "tripper: no response headers within 30s")
		require.EqualValues(t, 1, body.closes.Load())
	})
}

func TestCallersEndIsTheCallersError(t *testing.T) {
	reason := errors.New("reason")
	for name, test := range map[string]struct {
		end  func(context.Context) (context.Context, context.CancelFunc)
		want error
	}{
		"cancel": {func(ctx context.Context) (context.Context, context.CancelFunc) {
			ctx, cancel := context.WithCancel(ctx)
			time.AfterFunc(limit/2, cancel)
			return ctx, cancel
		}, context.Canceled},
		"cause": {func(ctx context.Context) (context.Context, context.CancelFunc) {
			ctx, cancel := context.WithCancelCause(ctx)
			time.AfterFunc(limit/2, func() { cancel(reason) })
			return ctx, func() { cancel(nil) }
		}, reason},
		"deadline": {func(ctx context.Context) (context.Context, context.CancelFunc) {
			return context.WithTimeout(ctx, limit/2)
		}, context.DeadlineExceeded},
	} {
		t.Run(name, func(t *testing.T) {
			for _, delay := range []time.Duration{0, limit} { // of a base that is slow to leave
				synctest.Test(t, func(t *testing.T) {
					ctx, cancel := test.end(t.Context())
					defer cancel()
					tr := &Transport{Headers: limit, Base: baseFunc(func(req *http.Request) (*http.Response, error) {
						defer time.Sleep(delay)
						return silent(req)
					})}
					_, err := tr.RoundTrip(newRequest(ctx, t))
					require.Equal(t, test.want, err)
				})
			}
		})
	}
}

func TestCallersCancelEndsTheBody(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		tr := &Transport{Headers: limit, Idle: limit, Base: baseFunc(func(req *http.Request) (*http.Response, error) {
			return response(trickle(req.Context(), 10, time.Second)), nil
		})}
		resp, err := tr.RoundTrip(newRequest(ctx, t))
		require.NoError(t, err)
		time.AfterFunc(2500*time.Millisecond, cancel)
		got, err := io.ReadAll(resp.Body)
		require.Equal(t, "xx", string(got))
		require.Equal(t, context.Canceled, err)
		require.NoError(t, resp.Body.Close())
	})
}

func TestBaseErrorIsPassedOn(t *testing.T) {
	refused := errors.New("refused")
	tr := &Transport{Headers: limit, Idle: limit, Base: baseFunc(func(*http.Request) (*http.Response, error) { return nil, refused })}
	resp, err := tr.RoundTrip(newRequest(t.Context(), t))
	require.Nil(t, resp)
	require.Equal(t, refused, err)

	tr.Base = baseFunc(func(*http.Request) (*http.Response, error) { return nil, nil })
	resp, err = tr.RoundTrip(newRequest(t.Context(), t))
	require.Nil(t, resp)
	require.NoError(t, err)
}

func TestPanicOfBaseEndsTheContext(t *testing.T) {
	var sent context.Context
	tr := &Transport{Headers: limit, Base: baseFunc(func(req *http.Request) (*http.Response, error) {
		sent = req.Context()
		panic("base")
	})}
	require.PanicsWithValue(t, "base", func() { tr.RoundTrip(newRequest(t.Context(), t)) })
	require.Equal(t, context.Canceled, context.Cause(sent))
}

// A timer that went on, or a context that hung on to a parent that lives longer,
// would keep the request's context in memory.
func TestNothingIsLeftBehind(t *testing.T) {
	for name, base := range map[string]baseFunc{
		"panic":   func(*http.Request) (*http.Response, error) { panic("base") },
		"error":   func(*http.Request) (*http.Response, error) { return nil, io.EOF },
		"no body": func(*http.Request) (*http.Response, error) { return response(http.NoBody), nil },
		"body":    func(*http.Request) (*http.Response, error) { return response(strings.NewReader("abc")), nil },
		"closed":  func(*http.Request) (*http.Response, error) { return response(strings.NewReader("abc")), nil },
	} {
		t.Run(name, func(t *testing.T) {
			parent, cancel := context.WithCancel(t.Context())
			defer cancel()
			mark := roundTripMarked(parent, t, base, name != "closed")
			for range 3 {
				runtime.GC()
			}
			require.Nil(t, mark.Value())
		})
	}
}

type markKey struct{}

// roundTripMarked sends a request with a value in its context, and lets go of it.
func roundTripMarked(parent context.Context, t *testing.T, base baseFunc, read bool) weak.Pointer[[64]byte] {
	t.Helper()
	value := new([64]byte)
	req := newRequest(context.WithValue(parent, markKey{}, value), t)
	mark := weak.Make(value)
	func() {
		defer func() { _ = recover() }()
		resp, err := (&Transport{Base: base, Headers: time.Hour, Idle: time.Hour}).RoundTrip(req)
		switch {
		case err != nil:
		case read:
			_, _ = io.ReadAll(resp.Body)
			resp.Body.Close()
		default:
			resp.Body.Close()
		}
	}()
	return mark
}

func TestIdleLimit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, w := io.Pipe()
		body := &closeCounter{Reader: r}
		var sent context.Context
		tr := &Transport{Idle: limit, Base: baseFunc(func(req *http.Request) (*http.Response, error) {
			sent = req.Context()
			return response(body), nil
		})}
		resp, err := tr.RoundTrip(newRequest(t.Context(), t))
		require.NoError(t, err)
		go w.Write([]byte("abc"))
		p := make([]byte, 8)
		n, err := resp.Body.Read(p)
		require.NoError(t, err)
		require.Equal(t, "abc", string(p[:n]))

		start := time.Now()
		n, err = resp.Body.Read(p)
		require.Equal(t, limit, time.Since(start))
		require.Zero(t, n)
		requireExceeded(t, err, "tripper: nothing of the response body within 30s")
		require.Equal(t, err, context.Cause(sent))
		_, again := resp.Body.Read(p)
		require.Equal(t, err, again)
		require.NoError(t, resp.Body.Close())
		require.EqualValues(t, 1, body.closes.Load())
	})
}

// A body cut off by the limit must never look complete. This one can only be
// closed once its Read has ended.
func TestSilenceIsNoEOF(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var reading sync.Mutex
		tr := &Transport{Idle: limit, Base: baseFunc(func(req *http.Request) (*http.Response, error) {
			return response(struct {
				io.Reader
				io.Closer
			}{readFunc(func([]byte) (int, error) {
				reading.Lock()
				defer reading.Unlock()
				<-req.Context().Done()
				return 0, io.EOF
			}), closeFunc(func() error {
				reading.Lock()
				defer reading.Unlock()
				return nil
			})}), nil
		})}
		resp, err := tr.RoundTrip(newRequest(t.Context(), t))
		require.NoError(t, err)
		_, err = resp.Body.Read(make([]byte, 1))
		requireExceeded(t, err, "tripper: nothing of the response body within 30s")
	})
}

type readFunc func([]byte) (int, error)

func (f readFunc) Read(p []byte) (int, error) { return f(p) }

func TestIdleLimitLetsAStreamMove(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		tr := &Transport{Headers: limit, Idle: limit, Base: baseFunc(func(req *http.Request) (*http.Response, error) {
			return response(trickle(req.Context(), 5000, limit-1)), nil
		})}
		resp, err := tr.RoundTrip(newRequest(t.Context(), t))
		require.NoError(t, err)
		requireReads(t, strings.Repeat("x", 5000), resp) // 41 hours
	})
}

func TestIdleLimitLetsTheConsumerBeSlow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		tr := &Transport{Idle: limit, Base: baseFunc(func(*http.Request) (*http.Response, error) {
			return response(strings.NewReader("abc")), nil
		})}
		resp, err := tr.RoundTrip(newRequest(t.Context(), t))
		require.NoError(t, err)
		for _, want := range "abc" {
			time.Sleep(2 * limit)
			p := make([]byte, 1)
			_, err := resp.Body.Read(p)
			require.NoError(t, err)
			require.Equal(t, byte(want), p[0])
		}
		time.Sleep(2 * limit)
		requireReads(t, "", resp)
	})
}

// Data in the instant of the limit is not followed by a cut that comes out of
// the blue: the Read says at once how it ended.
func TestDataAtTheIdleLimit(t *testing.T) {
	var late int
	for range 100 {
		synctest.Test(t, func(t *testing.T) {
			tr := &Transport{Idle: limit, Base: baseFunc(func(req *http.Request) (*http.Response, error) {
				return response(trickle(req.Context(), 2, limit)), nil
			})}
			resp, err := tr.RoundTrip(newRequest(t.Context(), t))
			require.NoError(t, err)
			synctest.Wait() // the data will come just before the limit
			_, err = resp.Body.Read(make([]byte, 1))
			if err != nil {
				late++
				requireExceeded(t, err, "tripper: nothing of the response body within 30s")
			}
			ended := resp.Body.(*body).closed.Load()
			synctest.Wait()
			require.Equal(t, err != nil, ended || resp.Body.(*body).closed.Load())
			resp.Body.Close()
		})
	}
	t.Logf("%d of 100 were late", late)
}

func TestCloseEndsARead(t *testing.T) {
	for _, idle := range []time.Duration{0, limit} {
		synctest.Test(t, func(t *testing.T) {
			r, _ := io.Pipe()
			body := &closeCounter{Reader: r}
			tr := &Transport{Headers: limit, Idle: idle, Base: baseFunc(func(*http.Request) (*http.Response, error) {
				return response(body), nil
			})}
			resp, err := tr.RoundTrip(newRequest(t.Context(), t))
			require.NoError(t, err)
			time.AfterFunc(time.Second, func() { resp.Body.Close() })
			_, err = resp.Body.Read(make([]byte, 1))
			require.Equal(t, io.ErrClosedPipe, err)
			require.NoError(t, resp.Body.Close())
			require.EqualValues(t, 1, body.closes.Load())
		})
	}
}

// Closing may read the rest of a body, to use its connection again.
func TestContextLivesUntilTheBodyIsClosed(t *testing.T) {
	broken := errors.New("close")
	var sent context.Context
	body := &closeCounter{Reader: strings.NewReader("abc"), err: broken}
	tr := &Transport{Headers: limit, Base: baseFunc(func(req *http.Request) (*http.Response, error) {
		sent = req.Context()
		return response(struct {
			io.Reader
			io.Closer
		}{body, closeFunc(func() error {
			require.NoError(t, sent.Err())
			return body.Close()
		})}), nil
	})}
	resp, err := tr.RoundTrip(newRequest(t.Context(), t))
	require.NoError(t, err)
	_, err = io.ReadAll(resp.Body)
	require.NoError(t, err)
	require.NoError(t, sent.Err())
	require.Equal(t, broken, resp.Body.Close())
	require.Error(t, sent.Err())
}

type closeFunc func() error

func (f closeFunc) Close() error { return f() }

func TestResponseIsPassedOn(t *testing.T) {
	req := newRequest(t.Context(), t)
	ctx := req.Context()
	for _, body := range []io.ReadCloser{http.NoBody, nil} {
		var sent *http.Request
		tr := &Transport{Headers: limit, Idle: limit, Base: baseFunc(func(r *http.Request) (*http.Response, error) {
			sent = r
			return &http.Response{StatusCode: http.StatusNoContent, Request: r, Body: body}, nil
		})}
		resp, err := tr.RoundTrip(req)
		require.NoError(t, err)
		require.Equal(t, body, resp.Body)
		require.Same(t, req, resp.Request)
		require.NotSame(t, req, sent)
		require.Error(t, sent.Context().Err(), "nothing is left to do")
		require.Equal(t, ctx, req.Context())
	}
}

type connection struct{ net.Conn }

func (connection) CloseWrite() error { return nil }

func TestSwitchedProtocolKeepsItsConnection(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client, server := net.Pipe()
		var sent context.Context
		tr := &Transport{Headers: limit, Idle: limit, Base: baseFunc(func(req *http.Request) (*http.Response, error) {
			sent = req.Context()
			return &http.Response{StatusCode: http.StatusSwitchingProtocols, Body: connection{client}}, nil
		})}
		ctx, cancel := context.WithCancel(t.Context())
		resp, err := tr.RoundTrip(newRequest(ctx, t))
		require.NoError(t, err)
		require.Equal(t, connection{client}, resp.Body)
		require.Implements(t, (*interface{ CloseWrite() error })(nil), resp.Body)

		time.Sleep(10 * limit) // neither limit is for it
		require.NoError(t, sent.Err())
		go func() { _, _ = io.WriteString(server, "pong") }()
		p := make([]byte, 4)
		_, err = io.ReadFull(resp.Body, p)
		require.NoError(t, err)
		require.Equal(t, "pong", string(p))
		require.NoError(t, resp.Body.Close())
		cancel()
		require.Error(t, sent.Err())
	})
}

// serve runs test against a server for HTTP/1 and one for HTTP/2.
func serve(t *testing.T, handler http.HandlerFunc, test func(t *testing.T, url string, tr *http.Transport)) {
	for _, h2 := range []bool{false, true} {
		t.Run(fmt.Sprintf("HTTP%d", 1+map[bool]int{true: 1}[h2]), func(t *testing.T) {
			srv := httptest.NewUnstartedServer(handler)
			srv.EnableHTTP2 = h2
			srv.StartTLS()
			t.Cleanup(srv.Close)
			test(t, srv.URL, srv.Client().Transport.(*http.Transport))
		})
	}
}

func get(t *testing.T, url string, tr *Transport) (*http.Response, error) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url, nil)
	require.NoError(t, err)
	return (&http.Client{Transport: tr}).Do(req)
}

func TestHeadersLimitOnTheWire(t *testing.T) {
	handler := func(w http.ResponseWriter, r *http.Request) { <-r.Context().Done() } // told to leave
	serve(t, handler, func(t *testing.T, url string, base *http.Transport) {
		_, err := get(t, url, &Transport{Base: base, Headers: 10 * time.Millisecond})
		require.ErrorContains(t, err, "tripper: no response headers within 10ms")
		require.ErrorIs(t, err, context.DeadlineExceeded)
		require.True(t, err.(net.Error).Timeout())
	})
}

func TestIdleLimitOnTheWire(t *testing.T) {
	handler := func(w http.ResponseWriter, r *http.Request) {
		io.WriteString(w, "data: 1\n\n")
		w.(http.Flusher).Flush()
		<-r.Context().Done()
	}
	serve(t, handler, func(t *testing.T, url string, base *http.Transport) {
		resp, err := get(t, url, &Transport{Base: base, Headers: time.Minute, Idle: 50 * time.Millisecond})
		require.NoError(t, err)
		got, err := io.ReadAll(resp.Body)
		require.True(t, strings.HasPrefix("data: 1\n\n", string(got))) // all of it, where 50ms are enough for that
		requireExceeded(t, err, "tripper: nothing of the response body within 50ms")
		require.NoError(t, resp.Body.Close())
	})
}

func TestConnectionIsUsedAgain(t *testing.T) {
	var dialled atomic.Int32
	handler := func(w http.ResponseWriter, r *http.Request) { io.Copy(w, r.Body); io.WriteString(w, r.RemoteAddr) }
	serve(t, handler, func(t *testing.T, url string, base *http.Transport) {
		dialled.Store(0)
		base.DialContext = func(ctx context.Context, network, addr string) (net.Conn, error) {
			dialled.Add(1)
			return new(net.Dialer).DialContext(ctx, network, addr)
		}
		tr := &Transport{Base: base, Headers: time.Minute, Idle: time.Minute}
		for range 5 {
			resp, err := get(t, url, tr)
			require.NoError(t, err)
			_, err = io.Copy(io.Discard, resp.Body)
			require.NoError(t, err)
			require.NoError(t, resp.Body.Close())
		}
		require.EqualValues(t, 1, dialled.Load())
	})
}

// A request body that goes on after the response headers is not cut.
func TestFullDuplexOnTheWire(t *testing.T) {
	handler := func(w http.ResponseWriter, r *http.Request) {
		http.NewResponseController(w).EnableFullDuplex()
		w.WriteHeader(http.StatusOK)
		w.(http.Flusher).Flush()
		in := bufio.NewScanner(r.Body)
		for in.Scan() {
			fmt.Fprintln(w, strings.ToUpper(in.Text()))
			w.(http.Flusher).Flush()
		}
	}
	serve(t, handler, func(t *testing.T, url string, base *http.Transport) {
		r, w := io.Pipe()
		req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, url, r)
		require.NoError(t, err)
		tr := &Transport{Base: base, Headers: time.Minute, Idle: time.Minute}
		resp, err := tr.RoundTrip(req)
		require.NoError(t, err)
		out := bufio.NewScanner(resp.Body)
		for _, word := range []string{"one", "two", "three"} {
			fmt.Fprintln(w, word)
			require.True(t, out.Scan())
			require.Equal(t, strings.ToUpper(word), out.Text())
		}
		w.Close()
		require.False(t, out.Scan())
		require.NoError(t, out.Err())
		require.NoError(t, resp.Body.Close())
	})
}
