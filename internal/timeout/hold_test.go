package timeout

import (
	"context"
	"errors"
	"io"
	"net/http"
	"runtime"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
)

// readFirst is a Hold that waits for the body's first piece.
func readFirst(_ *http.Request, resp *http.Response) (*http.Response, error) {
	p := make([]byte, 1)
	if _, err := io.ReadFull(resp.Body, p); err != nil {
		return nil, &carrier{resp, err}
	}
	resp.Body = struct {
		io.Reader
		io.Closer
	}{io.MultiReader(strings.NewReader(string(p)), resp.Body), resp.Body}
	return resp, nil
}

// A carrier is an error with a response that can be read.
type carrier struct {
	resp *http.Response
	error
}

func (c *carrier) Unwrap() error { return c.error }

// The limit covers the hold, and only that.
func TestHoldInTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		req := newRequest(t.Context(), t)
		tr := &Transport{Headers: limit, Base: baseFunc(func(req *http.Request) (*http.Response, error) {
			time.Sleep(limit / 2)
			return response(trickle(req.Context(), 5, limit/2-1)), nil
		}), Hold: func(r *http.Request, resp *http.Response) (*http.Response, error) {
			require.Same(t, req, r)
			require.Same(t, req, resp.Request)
			require.IsType(t, (*body)(nil), resp.Body)
			return readFirst(r, resp)
		}}
		resp, err := tr.RoundTrip(req)
		require.NoError(t, err)
		requireReads(t, "xxxxx", resp)
	})
}

func TestHoldTooLong(t *testing.T) {
	deaf := func(*http.Request) io.Reader { r, _ := io.Pipe(); return r } // ends when it is closed
	for name, start := range map[string]func(*http.Request) io.Reader{
		"deaf":    deaf,
		"trickle": func(req *http.Request) io.Reader { return trickle(req.Context(), 5, limit) },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				body := &closeCounter{}
				var sent context.Context
				tr := &Transport{Headers: limit, Hold: readFirst, Base: baseFunc(func(req *http.Request) (*http.Response, error) {
					sent = req.Context()
					time.Sleep(limit / 2)
					body.Reader = start(req)
					return response(body), nil
				})}
				begin := time.Now()
				resp, err := tr.RoundTrip(newRequest(t.Context(), t))
				require.Equal(t, limit, time.Since(begin))
				require.Nil(t, resp)
				requireExceeded(t, err, "tripper: no response headers within 30s")
				require.Equal(t, err, context.Cause(sent))
				require.EqualValues(t, 1, body.closes.Load())
			})
		})
	}
}

// Each Read during the hold is under the limit of Idle.
func TestSilenceWhileHeld(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		tr := &Transport{Headers: 3 * limit, Idle: limit, Hold: readFirst, Base: baseFunc(func(*http.Request) (*http.Response, error) {
			r, _ := io.Pipe()
			return response(r), nil
		})}
		_, err := tr.RoundTrip(newRequest(t.Context(), t))
		var c *carrier
		require.ErrorAs(t, err, &c)
		requireExceeded(t, c.error, "tripper: nothing of the response body within 30s")
		require.NoError(t, c.resp.Body.Close())
	})
}

func TestResponseInAnErrorStaysReadable(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		failed := errors.New("failed")
		var sent context.Context
		tr := &Transport{Headers: limit, Base: baseFunc(func(req *http.Request) (*http.Response, error) {
			sent = req.Context()
			return response(trickle(sent, 3, limit)), nil
		}), Hold: func(_ *http.Request, resp *http.Response) (*http.Response, error) {
			return nil, &carrier{resp, failed}
		}}
		resp, err := tr.RoundTrip(newRequest(t.Context(), t))
		require.Nil(t, resp)
		require.ErrorIs(t, err, failed)
		got, err := io.ReadAll(err.(*carrier).resp.Body)
		require.NoError(t, err)
		require.Equal(t, "xxx", string(got))
		require.NoError(t, sent.Err())
	})
}

// The caller leaves during the hold: that is no exceeded limit.
func TestCallerLeavesDuringTheHold(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		time.AfterFunc(limit/2, cancel)
		tr := &Transport{Headers: limit, Hold: readFirst, Base: baseFunc(func(req *http.Request) (*http.Response, error) {
			return response(trickle(req.Context(), 3, limit)), nil
		})}
		begin := time.Now()
		_, err := tr.RoundTrip(newRequest(ctx, t))
		require.Equal(t, limit/2, time.Since(begin))
		require.ErrorIs(t, err, context.Canceled)
		err.(*carrier).resp.Body.Close()
	})
}

func TestSwitchedProtocolIsNotHeld(t *testing.T) {
	want := connection{}
	tr := &Transport{Headers: limit, Base: baseFunc(func(*http.Request) (*http.Response, error) {
		return &http.Response{StatusCode: http.StatusSwitchingProtocols, Body: want}, nil
	}), Hold: func(*http.Request, *http.Response) (*http.Response, error) { panic("hold") }}
	resp, err := tr.RoundTrip(newRequest(t.Context(), t))
	require.NoError(t, err)
	require.Equal(t, want, resp.Body)
}

func TestAbruptEndOfTheHold(t *testing.T) {
	for name, end := range map[string]func(){
		"panic":  func() { panic("hold") },
		"Goexit": runtime.Goexit,
	} {
		t.Run(name, func(t *testing.T) {
			body := &closeCounter{Reader: strings.NewReader("abc")}
			var sent context.Context
			tr := &Transport{Headers: limit, Base: baseFunc(func(req *http.Request) (*http.Response, error) {
				sent = req.Context()
				return response(body), nil
			}), Hold: func(*http.Request, *http.Response) (*http.Response, error) { end(); return nil, nil }}
			req := newRequest(t.Context(), t)
			done := make(chan struct{})
			go func() {
				defer close(done)
				defer func() { _ = recover() }()
				_, _ = tr.RoundTrip(req)
			}()
			<-done
			require.EqualValues(t, 1, body.closes.Load())
			require.Error(t, sent.Err())
		})
	}
}

// One Transport limits each attempt, another one the whole request.
func TestStackedLimits(t *testing.T) {
	for _, test := range []struct {
		inner, outer time.Duration
		want         *Exceeded
	}{
		{limit, 2 * limit, &Exceeded{"no response headers", limit}},
		{2 * limit, limit, &Exceeded{"no response", limit}},
	} {
		synctest.Test(t, func(t *testing.T) {
			var sent context.Context
			tr := &Transport{Headers: test.outer, What: "no response", Total: true, Base: &Transport{
				Headers: test.inner, Base: baseFunc(func(req *http.Request) (*http.Response, error) {
					sent = req.Context()
					<-sent.Done()
					return nil, sent.Err() // Canceled
				}),
			}}
			begin := time.Now()
			_, err := tr.RoundTrip(newRequest(t.Context(), t))
			require.Equal(t, limit, time.Since(begin))
			require.Equal(t, test.want, err)
			require.Equal(t, test.want, context.Cause(sent))
		})
	}
	require.EqualError(t, &Exceeded{"no response", limit}, "tripper: no response within 30s")
}
