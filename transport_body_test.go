package tripper

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"reflect"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/tripper-go/tripper/internal/replay"
)

// A transportUpload is a request body of some kind, with every reader that was
// handed out for it.
type transportUpload struct {
	text     string
	length   int64 // the request's ContentLength
	getBody  bool
	seek     bool
	recorded bool // the Transport stands between the base and the body

	mu   sync.Mutex
	made []*transportBody
}

const transportLimit = 64 // the BodyLimit of the tests below

func transportUploads() map[string]*transportUpload {
	long := strings.Repeat("long ", transportLimit)
	return map[string]*transportUpload{
		"GetBody":                  {text: "some bytes", length: 10, getBody: true},
		"GetBody, long":            {text: long, length: int64(len(long)), getBody: true},
		"no GetBody":               {text: "some bytes", length: 10, recorded: true},
		"unknown length":           {text: "some bytes", length: -1, recorded: true},
		"too long":                 {text: long, length: int64(len(long))},
		"too long, unknown length": {text: long, length: -1, recorded: true},
		"seeker":                   {text: long, length: int64(len(long)), seek: true, recorded: true},
	}
}

// open makes a reader of the body.
func (u *transportUpload) open() io.ReadCloser {
	r := strings.NewReader(u.text)
	if u.seek { // nobody can tell whether it is closed
		return io.NopCloser(io.NewSectionReader(r, 0, int64(len(u.text))))
	}
	body := &transportBody{Reader: struct{ io.Reader }{r}}
	u.mu.Lock()
	u.made = append(u.made, body)
	u.mu.Unlock()
	return body
}

func (u *transportUpload) request(t *testing.T) *http.Request {
	req := transportRequest(t, "POST", transportURL, u.open())
	req.Header.Set("X-Mine", "1")
	req.ContentLength = u.length
	if u.getBody {
		req.GetBody = func() (io.ReadCloser, error) { return u.open(), nil }
	}
	return req
}

// checkClosed checks that everything handed out was closed once. More than
// once is allowed where the base has closed it before something panicked: the
// Transport can know of that only if it stood in between.
func (u *transportUpload) checkClosed(t *testing.T, panicked bool) {
	t.Helper()
	for i, body := range u.made {
		if n := body.closes.Load(); panicked && !u.recorded {
			assert.GreaterOrEqual(t, n, int32(1), "closes of request body %d", i+1)
		} else {
			assert.EqualValues(t, 1, n, "closes of request body %d", i+1)
		}
	}
}

// transportFreeze returns a function that checks that nothing of req has
// changed since.
func transportFreeze(req *http.Request) func(*testing.T) {
	was, url, header := *req, *req.URL, req.Header.Clone()
	pointer := func(v any) uintptr { return reflect.ValueOf(v).Pointer() }
	return func(t *testing.T) {
		t.Helper()
		assert.Same(t, was.URL, req.URL)
		assert.Equal(t, url, *req.URL)
		assert.Equal(t, pointer(was.Header), pointer(req.Header), "the Header map")
		assert.Equal(t, header, req.Header)
		assert.True(t, was.Body == req.Body, "the Body")
		assert.Equal(t, pointer(was.GetBody), pointer(req.GetBody), "GetBody")
		assert.True(t, was.Context() == req.Context(), "the context")
		assert.Equal(t, []any{was.Method, was.ContentLength, was.Host, was.RequestURI, was.Close, was.TransferEncoding, was.Trailer},
			[]any{req.Method, req.ContentLength, req.Host, req.RequestURI, req.Close, req.TransferEncoding, req.Trailer})
	}
}

// transportWatch reads what must not be written, so that the race detector
// sees who writes it.
func transportWatch(req *http.Request) {
	go func() {
		seen := *req
		seen.URL = new(*req.URL)
		seen.Header = req.Header.Clone()
	}()
}

// A transportSituation is a way for a request to go.
type transportSituation struct {
	name   string
	ctx    func(context.Context) (context.Context, context.CancelFunc)
	change func(*Transport)
	base   func(req *http.Request, next http.RoundTripper) (*http.Response, error)

	dies   bool // by panic or Goexit
	closed bool // …after the base has closed the body
}

func transportSituations() []transportSituation {
	broken := errors.New("broken")
	situations := []transportSituation{
		{name: "retries exhausted"},
		{name: "success", change: transportAnswers(200)},
		{name: "success after a retry", change: transportAnswers(503, 200)},
		{name: "success after an error", change: transportAnswers(broken, 200)},
		{name: "not to be retried", change: transportAnswers(404)},
		{name: "errors to the end", change: transportAnswers(broken)},
		{name: "a single attempt", change: func(tr *Transport) { tr.Policy.Retry.MaxAttempts = 1 }},
		{name: "open breaker", change: func(tr *Transport) {
			tr.Policy.Service, tr.Policy.Breaker = "tripped", BreakerPolicy{}
			tr.Trip("tripped", time.Hour, nil)
		}},
		{name: "breaker opens on the way", change: func(tr *Transport) { tr.Policy.Breaker = BreakerPolicy{FailureThreshold: 2} }},
		{name: "breaker opens in a wait", change: func(tr *Transport) {
			tr.Policy.Service, tr.Policy.Breaker = "tripped", BreakerPolicy{}
			time.AfterFunc(500*time.Millisecond, func() { tr.Trip("tripped", time.Hour, nil) })
		}},
		{name: "invalid configuration", change: func(tr *Transport) { tr.Policy.Timeout = -1 }},
		{name: "invalid WithRetry", ctx: func(ctx context.Context) (context.Context, context.CancelFunc) {
			return WithRetry(ctx, func(r *RetryPolicy) { r.MaxAttempts = -1 }), func() {}
		}},
		{name: "cancelled before", ctx: func(ctx context.Context) (context.Context, context.CancelFunc) {
			ctx, cancel := context.WithCancel(ctx)
			cancel()
			return ctx, cancel
		}},
		{name: "expired before", ctx: func(ctx context.Context) (context.Context, context.CancelFunc) {
			return context.WithTimeout(ctx, -1)
		}},
		{name: "cancelled in a wait", ctx: func(ctx context.Context) (context.Context, context.CancelFunc) {
			ctx, cancel := context.WithCancel(ctx)
			time.AfterFunc(500*time.Millisecond, cancel)
			return ctx, cancel
		}},
		{name: "deadline too near", ctx: func(ctx context.Context) (context.Context, context.CancelFunc) {
			return context.WithTimeout(ctx, 500*time.Millisecond)
		}},
		{name: "no budget", change: func(tr *Transport) { tr.Policy.Retry.Budget = Budget{MinPerSecond: 0.001} }},
		{name: "ReplaySafe", change: func(tr *Transport) {
			tr.Policy.Retry.Replay = ReplaySafe
			transportAnswers(500)(tr)
		}},
		{name: "IdempotencyKey", change: func(tr *Transport) { tr.Policy.Retry.IdempotencyKey = true }},
		{name: "Timeout", change: func(tr *Transport) { tr.Policy.Timeout = time.Second },
			base: func(req *http.Request, _ http.RoundTripper) (*http.Response, error) {
				defer req.Body.Close()
				<-req.Context().Done()
				return nil, req.Context().Err()
			}},
		{name: "Prepare fails", change: func(tr *Transport) {
			tr.Policy.Retry.Prepare = func(*http.Request) error { return broken }
		}},
		{name: "CheckRetry gives an error", change: func(tr *Transport) {
			tr.Policy.Retry.CheckRetry = func(context.Context, *http.Response, error) (bool, error) { return false, broken }
		}},
		{name: "Layer refuses", change: func(tr *Transport) {
			tr.Layers = []Layer{func(http.RoundTripper) http.RoundTripper {
				return transportFunc(func(r *http.Request) (*http.Response, error) {
					r.Body.Close()
					return nil, ErrRejected
				})
			}}
		}},
		{name: "base does not read", base: func(req *http.Request, _ http.RoundTripper) (*http.Response, error) {
			req.Body.Close()
			return transportAnswer(503, ""), nil
		}},
		{name: "base reads a little", base: func(req *http.Request, _ http.RoundTripper) (*http.Response, error) {
			req.Body.Read(make([]byte, 4))
			req.Body.Close()
			return nil, broken
		}},
		{name: "base closes late", base: func(req *http.Request, _ http.RoundTripper) (*http.Response, error) {
			go func() {
				for {
					time.Sleep(400 * time.Millisecond)
					if _, err := req.Body.Read(make([]byte, 4)); err != nil {
						req.Body.Close()
						return
					}
				}
			}()
			return transportAnswer(503, ""), nil
		}},
		{name: "base closes twice", base: func(req *http.Request, next http.RoundTripper) (*http.Response, error) {
			resp, err := next.RoundTrip(req)
			if _, own := req.Body.(*replay.Attempt); own {
				req.Body.Close()
			}
			return resp, err
		}},
	}
	return append(situations, transportDeaths()...)
}

func transportAnswers(answers ...any) func(*Transport) {
	return func(tr *Transport) { tr.Base.(*transportScript).answers = answers }
}

// transportDeaths are the situations in which a base, a layer or a hook
// panics, or calls Goexit.
func transportDeaths() []transportSituation {
	var situations []transportSituation
	for name, die := range map[string]func(){"panics": func() { panic("dead") }, "calls Goexit": runtime.Goexit} {
		for _, attempt := range []int{1, 2} {
			situations = append(situations, transportSituation{
				name: fmt.Sprintf("base %s in attempt %d", name, attempt), dies: true,
				base: func(req *http.Request, next http.RoundTripper) (*http.Response, error) {
					if Attempt(req.Context()) == attempt {
						req.Body.Read(make([]byte, 4))
						die()
					}
					return next.RoundTrip(req)
				},
			}, transportSituation{
				name: fmt.Sprintf("base %s after attempt %d", name, attempt), dies: true, closed: true,
				base: func(req *http.Request, next http.RoundTripper) (*http.Response, error) {
					resp, err := next.RoundTrip(req)
					if Attempt(req.Context()) == attempt {
						resp.Body.Close()
						die()
					}
					return resp, err
				},
			})
		}
		situations = append(situations, transportHookDeaths(name, die)...)
	}
	return situations
}

func transportHookDeaths(name string, die func()) []transportSituation {
	return []transportSituation{
		{name: "Service " + name, dies: true, change: func(tr *Transport) {
			tr.Service = func(*http.Request) string { die(); return "" }
		}},
		{name: "Layer " + name, dies: true, change: func(tr *Transport) {
			tr.Layers = []Layer{func(http.RoundTripper) http.RoundTripper {
				return transportFunc(func(*http.Request) (*http.Response, error) { die(); return nil, nil })
			}}
		}},
		{name: "Observer.Retry " + name, dies: true, change: func(tr *Transport) {
			tr.Observers = []*Observer{{Retry: func(RetryEvent) { die() }}}
		}},
		{name: "Prepare " + name, dies: true, change: func(tr *Transport) {
			tr.Policy.Retry.Prepare = func(*http.Request) error { die(); return nil }
		}},
		{name: "CheckRetry " + name, dies: true, change: func(tr *Transport) {
			tr.Policy.Retry.CheckRetry = func(context.Context, *http.Response, error) (bool, error) { die(); return false, nil }
		}},
		{name: "Outcome " + name, dies: true, closed: true, change: func(tr *Transport) {
			tr.Policy.Breaker = BreakerPolicy{Outcome: func(*http.Response, error) Outcome { die(); return Success }}
		}},
		{name: "Outcome, of a retry, " + name, dies: true, closed: true, change: func(tr *Transport) {
			n := 0
			tr.Policy.Breaker = BreakerPolicy{Outcome: func(resp *http.Response, err error) Outcome {
				if n++; n == 2 {
					die()
				}
				return DefaultOutcome(resp, err)
			}}
		}},
		{name: "Observer.StateChange, of a result, " + name, dies: true, closed: true, change: func(tr *Transport) {
			tr.Policy.Breaker = BreakerPolicy{FailureThreshold: 1}
			tr.Observers = []*Observer{{StateChange: func(StateChange) { die() }}}
		}},
		{name: "Observer.StateChange, of a probe, " + name, dies: true, change: func(tr *Transport) {
			tr.Policy.Service, tr.Policy.Breaker = "tripped", BreakerPolicy{}
			tr.Observers = []*Observer{{StateChange: func(c StateChange) {
				if c.To == HalfOpen {
					die()
				}
			}}}
			tr.Trip("tripped", time.Millisecond, nil)
			time.Sleep(time.Second)
		}},
		{name: "Backoff " + name, dies: true, change: func(tr *Transport) {
			tr.Policy.Retry.Backoff = func(time.Duration, time.Duration, int, *http.Response) time.Duration { die(); return 0 }
		}},
	}
}

// However a request goes, its body is closed once, what is discarded of the
// responses too, and nothing of the request changes.
func TestTransportClosesOnceAndChangesNothing(t *testing.T) {
	for _, s := range transportSituations() {
		for kind := range transportUploads() {
			for chain, change := range transportChains() {
				t.Run(s.name+"/"+kind+"/"+chain, func(t *testing.T) {
					synctest.Test(t, func(t *testing.T) { s.run(t, transportUploads()[kind], change) })
				})
			}
		}
	}
}

// transportChains are ways for the chain to be longer.
func transportChains() map[string]func(*Transport) {
	return map[string]func(*Transport){
		"short":        func(*Transport) {},
		"TotalTimeout": func(tr *Transport) { tr.Policy.TotalTimeout = time.Hour },
		"HoldStream":   func(tr *Transport) { tr.Policy.HoldStream = true },
		"Layers": func(tr *Transport) {
			tr.Layers = append(tr.Layers, func(next http.RoundTripper) http.RoundTripper { return transportFunc(next.RoundTrip) })
		},
		"Timeout and Idle": func(tr *Transport) {
			if tr.Policy.Timeout == 0 {
				tr.Policy.Timeout, tr.Policy.Idle = 30*time.Minute, time.Hour
			}
		},
	}
}

func (s transportSituation) run(t *testing.T, upload *transportUpload, change func(*Transport)) {
	script := &transportScript{answers: []any{503}}
	tr := &Transport{Base: script, Policy: transportSteady()}
	tr.Policy.Retry.BodyLimit = transportLimit
	if s.change != nil {
		s.change(tr)
	}
	change(tr)
	if s.base != nil {
		tr.Base = transportFunc(func(req *http.Request) (*http.Response, error) { return s.base(req, script) })
	}
	req := upload.request(t)
	if s.ctx != nil {
		ctx, cancel := s.ctx(req.Context())
		defer cancel()
		req = req.WithContext(ctx)
	}
	check := transportFreeze(req)
	transportWatch(req)
	var resp *http.Response
	var err error
	returned := false
	transportSurvive(func() {
		resp, err = tr.RoundTrip(req)
		returned = true
	})
	if s.dies && returned { // an upload that has one attempt may spare it
		require.False(t, upload.getBody || upload.seek, "it should not have returned")
	}
	require.False(t, resp != nil && err != nil, "a response and an error")
	synctest.Wait()
	transportCheckDiscarded(t, script, resp)
	if resp != nil {
		transportRead(t, resp)
	}
	time.Sleep(time.Minute) // for whoever closes late
	check(t)
	upload.checkClosed(t, s.closed || s.dies && len(tr.Layers) > 0)
	for st := range tr.All() {
		assert.Equal(t, st.Requests, st.OK+st.Failed+st.Rejected+st.Cancelled, "requests of %+v", st)
		assert.Equal(t, st.Attempts, st.Successes+st.Failures+st.Ignored, "attempts of %+v", st)
	}
}

// The breaker and the counters get a request back whose base dies.
func TestTransportCountsTheDead(t *testing.T) {
	for _, die := range []func(){func() { panic("dead") }, runtime.Goexit} {
		base := &transportScript{answers: []any{func(*http.Request) (*http.Response, error) { die(); return nil, nil }}}
		tr := &Transport{Base: base}
		for range 10 {
			transportSurvive(func() { tr.RoundTrip(transportRequest(t, "GET", transportURL, nil)) })
		}
		st, _ := tr.Stats("api.example.com")
		require.Equal(t, []uint64{10, 10, 10, 10}, []uint64{st.Requests, st.Failed, st.Attempts, st.Ignored})
		require.Equal(t, Closed, st.State)
	}
}

func TestTransportPassesAPanicOn(t *testing.T) {
	for _, attempt := range []int{1, 2} {
		p := transportEager()
		tr := &Transport{Policy: p, Base: transportFunc(func(r *http.Request) (*http.Response, error) {
			if Attempt(r.Context()) == attempt {
				panic("what the base says")
			}
			return transportAnswer(503, ""), nil
		})}
		require.PanicsWithValue(t, "what the base says", func() { tr.RoundTrip(transportRequest(t, "GET", transportURL, nil)) })
	}
}

// A base may go on reading the body after it has answered. The next attempt
// sends the same bytes nevertheless, and nothing races.
func TestTransportBaseReadsOnAfterItsAnswer(t *testing.T) {
	for kind, upload := range transportUploads() {
		t.Run(kind, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var bodies []string
				var released atomic.Bool
				base := transportFunc(func(req *http.Request) (*http.Response, error) {
					if Attempt(req.Context()) > 1 {
						assert.True(t, released.Load() || upload.getBody, "the body of the attempt before is still open")
						body, err := io.ReadAll(req.Body)
						bodies = append(bodies, fmt.Sprintf("%s%v", body, err))
						req.Body.Close()
						return transportAnswer(200, ""), nil
					}
					req.Body.Read(make([]byte, 3))
					go func() {
						defer req.Body.Close()
						defer released.Store(true)
						for err := error(nil); err == nil; {
							_, err = req.Body.Read(make([]byte, 3))
							_, _, _ = req.Header.Get("X-Mine"), req.URL.String(), req.ContentLength
							time.Sleep(1500 * time.Millisecond) // the retry is due after one second
						}
					}()
					return transportAnswer(503, ""), nil
				})
				p := transportSteady()
				p.Retry.BodyLimit = transportLimit
				p.Retry.Prepare = func(r *http.Request) error { r.Header.Set("X-Mine", "2"); return nil }
				tr := &Transport{Base: base, Policy: p}
				req := upload.request(t)
				check := transportFreeze(req)
				resp, err := tr.RoundTrip(req)
				require.NoError(t, err)
				check(t)
				if resp.StatusCode == 200 {
					require.Equal(t, []string{upload.text + "<nil>"}, bodies)
				} else {
					require.True(t, strings.HasPrefix(kind, "too long"), "the retry is missing")
				}
				time.Sleep(time.Hour)
				upload.checkClosed(t, false)
			})
		})
	}
}

// What an attempt is in the middle of reading when the next one is due is not
// lost to that.
func TestTransportRetryDuringARead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, w := io.Pipe()
		var got string
		base := transportFunc(func(req *http.Request) (*http.Response, error) {
			if Attempt(req.Context()) > 1 {
				body, err := io.ReadAll(req.Body)
				got = fmt.Sprintf("%s%v", body, err)
				req.Body.Close()
				return transportAnswer(200, ""), nil
			}
			go func() {
				io.Copy(io.Discard, req.Body)
				req.Body.Close()
			}()
			return transportAnswer(503, ""), nil
		})
		go func() {
			io.WriteString(w, "begun, ")
			time.Sleep(3 * time.Second) // the retry is due after one
			io.WriteString(w, "read by the first attempt, ")
			io.WriteString(w, "done")
			w.Close()
		}()
		tr := &Transport{Base: base, Policy: transportSteady()}
		resp, err := tr.RoundTrip(transportRequest(t, "POST", transportURL, r))
		require.NoError(t, err)
		require.Equal(t, 200, resp.StatusCode)
		require.Equal(t, "begun, read by the first attempt, done<nil>", got)
		resp.Body.Close()
	})
}

// A server may answer before it has read the upload.
func TestTransportRetriesAnEarlyAnswer(t *testing.T) {
	data := make([]byte, 1<<20)
	rand.NewChaCha8([32]byte{}).Read(data)
	for _, http2 := range []bool{false, true} {
		for _, kind := range []string{"GetBody", "file"} {
			t.Run(fmt.Sprintf("http2=%t/%s", http2, kind), func(t *testing.T) {
				var n atomic.Int32
				target, base := transportServe(t, http2, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
					if n.Add(1) == 1 {
						w.WriteHeader(503)
						return
					}
					body, err := io.ReadAll(r.Body)
					fmt.Fprint(w, bytes.Equal(data, body), err)
				}))
				var body io.Reader = bytes.NewReader(data)
				if kind == "file" {
					body = transportFile(t, data, 0)
				}
				client := &http.Client{Transport: &Transport{Base: base, Policy: transportEager()}}
				resp, err := client.Post(target, "", body)
				require.NoError(t, err)
				require.Equal(t, 200, resp.StatusCode)
				require.Equal(t, "true <nil>", transportRead(t, resp))
			})
		}
	}
}

// Bodies that can be sent again, and those that cannot.

func transportFile(t *testing.T, data []byte, offset int64) *os.File {
	name := filepath.Join(t.TempDir(), "upload")
	require.NoError(t, os.WriteFile(name, data, 0o600))
	f, err := os.Open(name)
	require.NoError(t, err)
	t.Cleanup(func() { f.Close() })
	_, err = f.Seek(offset, io.SeekStart)
	require.NoError(t, err)
	return f
}

func TestTransportResendsAFileFromItsOffset(t *testing.T) {
	for _, length := range []int64{-1, 6} {
		var bodies []string
		target, base := transportServe(t, false, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			body, _ := io.ReadAll(r.Body)
			bodies = append(bodies, string(body))
			w.WriteHeader(503)
		}))
		f := transportFile(t, []byte("0123456789"), 4)
		req := transportRequest(t, "POST", target, f)
		req.ContentLength = length
		p := transportEager()
		p.Retry.BodyLimit = 1 // of no concern to what can seek
		resp, err := (&http.Client{Transport: &Transport{Base: base, Policy: p}}).Do(req)
		require.NoError(t, err)
		require.Equal(t, 503, resp.StatusCode)
		resp.Body.Close()
		require.Equal(t, []string{"456789", "456789", "456789"}, bodies)
		require.ErrorIs(t, f.Close(), os.ErrClosed, "the file is closed when all is over")
	}
}

func TestTransportResendsIdenticalBytes(t *testing.T) {
	const limit = 1 << 20 // the default
	for _, c := range []struct {
		size, length, limit int64
		attempts            int
	}{
		{0, -1, 0, 3},
		{1, -1, 0, 3},
		{limit, -1, 0, 3},
		{limit, limit, 0, 3},
		{limit + 1, -1, 0, 1},
		{limit + 1, limit + 1, 0, 1},
		{100, -1, 100, 3},
		{101, -1, 100, 1},
		{1, 1, -1, 1},
	} {
		t.Run(fmt.Sprintf("%+v", c), func(t *testing.T) {
			data := make([]byte, c.size)
			rand.NewChaCha8([32]byte{1}).Read(data)
			var got [][]byte
			target, base := transportServe(t, false, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				body, _ := io.ReadAll(r.Body)
				got = append(got, body)
				w.WriteHeader(503)
			}))
			p := transportEager()
			p.Retry.BodyLimit = c.limit
			tr := &Transport{Base: base, Policy: p}
			req := transportRequest(t, "POST", target, struct{ io.Reader }{bytes.NewReader(data)})
			req.ContentLength = c.length
			resp, err := tr.RoundTrip(req)
			require.NoError(t, err)
			require.Equal(t, 503, resp.StatusCode)
			resp.Body.Close()
			require.Len(t, got, c.attempts)
			for _, body := range got {
				require.True(t, bytes.Equal(data, body))
			}
			st, _ := tr.Stats(strings.TrimPrefix(target, "http://"))
			require.Equal(t, c.attempts == 1, st.Suppressed.Body == 1)
		})
	}
}

// A body that cannot be had again leaves the caller with the answer in hand.
func TestTransportGetBodyFails(t *testing.T) {
	broken := errors.New("broken")
	for _, c := range []struct {
		answers []any
		works   int // so many times
		want    error
	}{{[]any{503}, 0, nil}, {[]any{503}, 1, nil}, {[]any{broken}, 0, broken}, {[]any{broken}, 1, &RetryError{Attempts: 2, Err: broken}}} {
		synctest.Test(t, func(t *testing.T) {
			base := &transportScript{answers: c.answers}
			tr := &Transport{Base: base, Policy: transportSteady()}
			req := transportRequest(t, "POST", transportURL, transportBytes())
			getBody, calls := req.GetBody, 0
			req.GetBody = func() (io.ReadCloser, error) {
				if calls++; calls > c.works {
					return nil, errors.New("no second body")
				}
				return getBody()
			}
			start := time.Now()
			resp, err := tr.RoundTrip(req)
			require.Equal(t, time.Duration(c.works)*time.Second, time.Since(start), "no wait for what cannot be")
			require.Len(t, base.requests, c.works+1)
			require.Equal(t, c.want, err)
			transportCheckDiscarded(t, base, resp)
			if c.want == nil {
				require.Equal(t, fmt.Sprint("answer ", c.works+1), transportRead(t, resp))
			}
			st, _ := tr.Stats("api.example.com")
			require.EqualValues(t, 1, st.Suppressed.Body)
		})
	}
}

// A request body that fails is the caller's error: sent once, held against
// nobody.
func TestTransportBodyThatCannotBeRead(t *testing.T) {
	broken := errors.New("disk on fire")
	target, base := transportServe(t, false, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { io.Copy(io.Discard, r.Body) }))
	tr := &Transport{Base: base}
	body := io.MultiReader(strings.NewReader("some"), transportFailing{broken})
	_, err := (&http.Client{Transport: tr}).Post(target, "", body)
	transportCheckURLError(t, err, target)
	require.ErrorIs(t, err, broken)
	st, _ := tr.Stats(strings.TrimPrefix(target, "http://"))
	require.Equal(t, []uint64{1, 0, 1}, []uint64{st.Attempts, st.Failures, st.Ignored})
}

type transportFailing struct{ err error }

func (f transportFailing) Read([]byte) (int, error) { return 0, f.err }

// Streams.

// transportZeros is so many bytes.
type transportZeros struct{ left int64 }

func (z *transportZeros) Read(p []byte) (int, error) {
	if z.left == 0 {
		return 0, io.EOF
	}
	n := min(int64(len(p)), z.left)
	clear(p[:n])
	z.left -= n
	return int(n), nil
}

func transportHeap() int64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

// 64 MiB go through without being kept.
func TestTransportDoesNotKeepUploads(t *testing.T) {
	const size = 64 << 20
	for _, c := range []struct {
		name    string
		length  int64
		getBody bool
	}{{"no GetBody", -1, false}, {"GetBody", size, true}} {
		t.Run(c.name, func(t *testing.T) {
			var peak, total int64
			target, base := transportServe(t, false, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				for {
					n, err := io.CopyN(io.Discard, r.Body, 16<<20)
					total += n
					if err != nil {
						break
					}
					peak = max(peak, transportHeap())
				}
				if !c.getBody {
					w.WriteHeader(503) // which is not retried, for want of the body
				}
			}))
			req := transportRequest(t, "POST", target, &transportZeros{size})
			req.ContentLength = c.length
			if c.getBody {
				req.GetBody = func() (io.ReadCloser, error) { return io.NopCloser(&transportZeros{size}), nil }
			}
			before := transportHeap()
			resp, err := (&http.Client{Transport: &Transport{Base: base, Policy: transportEager()}}).Do(req)
			require.NoError(t, err)
			resp.Body.Close()
			require.EqualValues(t, size, total)
			require.Less(t, peak-before, int64(8<<20), "growth of the heap")
		})
	}
}

// The first bytes arrive before the last ones are produced.
func TestTransportStreamsUploads(t *testing.T) {
	for _, http2 := range []bool{false, true} {
		for _, c := range []struct {
			name    string
			length  int64
			getBody bool
		}{{"unknown length", -1, false}, {"known length", 10, false}, {"too long", 2 << 20, false}, {"GetBody", -1, true}} {
			t.Run(fmt.Sprintf("http2=%t/%s", http2, c.name), func(t *testing.T) {
				arrived := make(chan struct{})
				target, base := transportServe(t, http2, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
					io.ReadFull(r.Body, make([]byte, 5))
					close(arrived)
					n, err := io.Copy(io.Discard, r.Body)
					fmt.Fprint(w, n, err)
				}))
				r, w := io.Pipe()
				go func() {
					io.WriteString(w, "first")
					select {
					case <-arrived:
						io.CopyN(w, &transportZeros{4 << 20}, max(10, c.length)-5)
						w.Close()
					case <-time.After(10 * time.Second):
						w.CloseWithError(errors.New("the first bytes were held back"))
					}
				}()
				req := transportRequest(t, "POST", target, r)
				req.ContentLength = c.length
				if c.getBody {
					req.GetBody = func() (io.ReadCloser, error) { return nil, errors.New("not needed") }
				}
				resp, err := (&http.Client{Transport: &Transport{Base: base, Policy: transportEager()}}).Do(req)
				require.NoError(t, err)
				require.Equal(t, fmt.Sprintf("%d <nil>", max(10, c.length)-5), transportRead(t, resp))
			})
		}
	}
}

// On HTTP/2 a request can go on while its response comes, for longer than
// BodyLimit.
func TestTransportFullDuplex(t *testing.T) {
	for name, wrap := range transportVariants() {
		t.Run(name, func(t *testing.T) {
			target, base := transportServe(t, true, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				w.(http.Flusher).Flush()
				for lines := bufio.NewReader(r.Body); ; w.(http.Flusher).Flush() {
					line, err := lines.ReadString('\n')
					if err != nil {
						return
					}
					io.WriteString(w, "echo "+line)
				}
			}))
			r, w := io.Pipe()
			resp, err := wrap(base).RoundTrip(transportRequest(t, "POST", target, r))
			require.NoError(t, err)
			answers := bufio.NewReader(resp.Body)
			for i := range 100 {
				line := strings.Repeat("x", 16<<10) + fmt.Sprintln(i)
				_, err := io.WriteString(w, line)
				require.NoError(t, err)
				answer, err := answers.ReadString('\n')
				require.NoError(t, err)
				require.Equal(t, "echo "+line, answer)
			}
			require.NoError(t, w.Close())
			_, err = answers.ReadByte()
			require.Equal(t, io.EOF, err)
			require.NoError(t, resp.Body.Close())
		})
	}
}
