package timeout

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
)

func post(ctx context.Context, t *testing.T, body io.Reader) *http.Request {
	t.Helper()
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://example.com/", body)
	require.NoError(t, err)
	return req
}

// upThenWait is a base that reads the request body and then waits this long
// with its answer.
func upThenWait(wait time.Duration) baseFunc {
	return func(req *http.Request) (*http.Response, error) {
		defer req.Body.Close()
		if _, err := io.Copy(io.Discard, req.Body); err != nil {
			return nil, err
		}
		select {
		case <-time.After(wait):
			return response(strings.NewReader("abc")), nil
		case <-req.Context().Done():
			return nil, req.Context().Err()
		}
	}
}

// pieces is a request body that gives one byte after each pause.
func pieces(pauses ...time.Duration) io.Reader {
	return readFunc(func(p []byte) (int, error) {
		if len(pauses) == 0 {
			return 0, io.EOF
		}
		time.Sleep(pauses[0])
		pauses = pauses[1:]
		return copy(p, "x"), nil
	})
}

func TestSlowUploads(t *testing.T) {
	almost := limit - 1
	for _, test := range []struct {
		name   string
		pauses []time.Duration
		wait   time.Duration // of the service, after the upload
		takes  time.Duration // until the error, or the answer
		want   string
	}{
		{"fast", nil, almost, almost, ""},
		{"slow", []time.Duration{almost, almost, almost}, almost, 4 * almost, ""},
		{"slow, then a silent service", []time.Duration{almost, almost}, 2 * limit, 2*almost + limit, "tripper: no response headers within 30s"},
		{"fast, then a silent service", nil, 2 * limit, limit, "tripper: no response headers within 30s"},
		{"short pause, then a silent service", []time.Duration{1}, 2 * limit, limit + 1, "tripper: no response headers within 30s"},
		{"stalls", []time.Duration{10 * limit}, 0, limit, "tripper: the request body gave nothing within 30s"},
		{"slow, then stalls", []time.Duration{almost, 10 * limit}, 0, almost + limit, "tripper: the request body gave nothing within 30s"},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				begin := time.Now()
				var failed time.Duration
				base := baseFunc(func(req *http.Request) (*http.Response, error) {
					context.AfterFunc(req.Context(), func() { failed = time.Since(begin) })
					return upThenWait(test.wait)(req)
				})
				tr := &Transport{Base: base, Headers: limit}
				resp, err := tr.RoundTrip(post(t.Context(), t, pieces(test.pauses...)))
				if test.want == "" {
					require.NoError(t, err)
					require.Equal(t, test.takes, time.Since(begin))
					requireReads(t, "abc", resp)
					return
				}
				require.EqualError(t, err, test.want)
				require.True(t, err.(interface{ Timeout() bool }).Timeout())
				synctest.Wait()
				require.Equal(t, test.takes, failed)
				require.Equal(t, failed, time.Since(begin), "also if the Read goes on")
				time.Sleep(10 * limit) // until that has ended
			})
		})
	}
}

// What the service has used up of its time before a pause stays used.
func TestTimeBeforeAPauseCounts(t *testing.T) {
	for _, before := range []time.Duration{limit / 3, limit - 1} {
		for _, pause := range []time.Duration{limit / 2, limit - 1} {
			synctest.Test(t, func(t *testing.T) {
				tr := &Transport{Headers: limit, Base: baseFunc(func(req *http.Request) (*http.Response, error) {
					time.Sleep(before)
					return upThenWait(10 * limit)(req)
				})}
				begin := time.Now()
				_, err := tr.RoundTrip(post(t.Context(), t, pieces(pause)))
				requireExceeded(t, err, "tripper: no response headers within 30s")
				require.Equal(t, limit+pause, time.Since(begin))
			})
		}
	}
}

// After the answer nothing of the request body matters, not even to a hold.
func TestNoPauseAfterTheAnswer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, w := io.Pipe()
		tr := &Transport{Headers: limit, Hold: readFirst, Base: baseFunc(func(req *http.Request) (*http.Response, error) {
			go func() { _, _ = io.Copy(io.Discard, req.Body) }()
			time.Sleep(limit / 2) // all of it a pause
			return response(trickle(req.Context(), 2, 2*limit)), nil
		})}
		begin := time.Now()
		_, err := tr.RoundTrip(post(t.Context(), t, r))
		requireExceeded(t, err, "tripper: no response headers within 30s")
		require.Equal(t, limit/2+limit, time.Since(begin))
		w.Close()
	})
	synctest.Test(t, func(t *testing.T) {
		r, w := io.Pipe()
		tr := &Transport{Headers: limit, Base: baseFunc(func(req *http.Request) (*http.Response, error) {
			go func() { _, _ = io.Copy(io.Discard, req.Body) }()
			return response(trickle(req.Context(), 3, limit)), nil
		})}
		resp, err := tr.RoundTrip(post(t.Context(), t, r))
		require.NoError(t, err)
		requireReads(t, "xxx", resp)
		w.Close()
	})
}

// Once the limit has been exceeded the body is not read any more.
func TestNoReadAfterTheLimit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		tr := &Transport{Headers: limit, Base: baseFunc(func(req *http.Request) (*http.Response, error) {
			<-req.Context().Done()
			_, err := req.Body.Read(make([]byte, 1))
			require.Equal(t, context.Cause(req.Context()), err)
			return nil, err
		})}
		_, err := tr.RoundTrip(post(t.Context(), t, pieces(10*limit)))
		requireExceeded(t, err, "tripper: no response headers within 30s")
	})
}

func TestTotalCountsTheUpload(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		req := post(t.Context(), t, pieces(limit/2, limit/2, limit/2))
		tr := &Transport{Headers: limit, Total: true, What: "no response", Base: baseFunc(func(sent *http.Request) (*http.Response, error) {
			_, wrapped := sent.Body.(*upload)
			require.False(t, wrapped)
			return upThenWait(0)(sent)
		})}
		_, err := tr.RoundTrip(req)
		requireExceeded(t, err, "tripper: no response within 30s")
	})
}

func TestWhichBodiesAreWrapped(t *testing.T) {
	file, err := os.Open(os.DevNull)
	require.NoError(t, err)
	defer file.Close()
	for want, bodies := range map[bool][]io.Reader{
		false: {nil, http.NoBody, strings.NewReader("x"), bytes.NewReader([]byte("x")), bytes.NewBufferString("x")},
		true:  {file, pieces(0), io.LimitReader(strings.NewReader("x"), 1)},
	} {
		for _, b := range bodies {
			req := post(t.Context(), t, b)
			tr := &Transport{Headers: limit, Base: baseFunc(func(sent *http.Request) (*http.Response, error) {
				_, wrapped := sent.Body.(*upload)
				require.Equal(t, want, wrapped, "%T", b)
				require.Equal(t, req.ContentLength, sent.ContentLength)
				require.Equal(t, req.GetBody == nil, sent.GetBody == nil)
				return response(http.NoBody), nil
			})}
			_, err := tr.RoundTrip(req)
			require.NoError(t, err)
		}
	}
}

// Close is passed on as it comes, also beside a Read.
func TestUploadIsClosed(t *testing.T) {
	broken := errors.New("close")
	r, _ := io.Pipe()
	b := &closeCounter{Reader: r, err: broken}
	tr := &Transport{Headers: limit, Base: baseFunc(func(sent *http.Request) (*http.Response, error) {
		read := make(chan error)
		go func() {
			_, err := sent.Body.Read(make([]byte, 1))
			read <- err
		}()
		require.Equal(t, broken, sent.Body.Close())
		require.Equal(t, io.ErrClosedPipe, <-read)
		return nil, broken
	})}
	_, err := tr.RoundTrip(post(t.Context(), t, b))
	require.Equal(t, broken, err)
	require.EqualValues(t, 1, b.closes.Load())
}

func TestUploadsOnTheWire(t *testing.T) {
	const small = time.Second // TLS takes its part of it
	handler := func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		if r.URL.Path == "/silent" {
			<-r.Context().Done()
		}
	}
	tests := map[string]struct {
		path string
		body func() io.Reader
		want error
	}{
		"slow":   {"/", func() io.Reader { return every(small/10, 15) }, nil},
		"stalls": {"/", func() io.Reader { r, _ := io.Pipe(); return r }, &SlowBodyError{small}},
		"silent": {"/silent", func() io.Reader { return every(small/10, 5) }, &Exceeded{"no response headers", small}},
	}
	serve(t, handler, func(t *testing.T, url string, base *http.Transport) {
		for name, test := range tests {
			t.Run(name, func(t *testing.T) {
				t.Parallel()
				req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, url+test.path, test.body())
				require.NoError(t, err)
				resp, err := (&Transport{Base: base, Headers: small}).RoundTrip(req)
				if test.want != nil {
					require.Equal(t, test.want, err)
					return
				}
				require.NoError(t, err)
				requireReads(t, "", resp)
			})
		}
	})
}

// every returns n bytes, one after each pause of real time.
func every(pause time.Duration, n int) io.Reader {
	r, w := io.Pipe()
	var write func()
	write = func() {
		if n--; n < 0 {
			w.Close()
			return
		}
		_, _ = io.WriteString(w, "x")
		time.AfterFunc(pause, write)
	}
	time.AfterFunc(pause, write)
	return r
}

// Over HTTP/2 a response may end while the request is still being sent. Reading
// it to its end must not stop that, nor must an empty one.
func TestUploadGoesOnAfterTheResponse(t *testing.T) {
	for name, frames := range map[string][]byte{
		"with a body": append(frame(frameHeaders, flagEndHeaders, []byte{status200}), frame(frameData, flagEndStream, []byte("abc"))...),
		"empty":       frame(frameHeaders, flagEndHeaders|flagEndStream, []byte{status200}),
	} {
		t.Run(name, func(t *testing.T) {
			listener, err := net.Listen("tcp", "127.0.0.1:0")
			require.NoError(t, err)
			defer listener.Close()
			uploaded := make(chan string, 1)
			go func() { uploaded <- earlyAnswer(listener, frames) }()

			base := &http.Transport{Protocols: new(http.Protocols)}
			base.Protocols.SetUnencryptedHTTP2(true)
			defer base.CloseIdleConnections()
			r, w := io.Pipe()
			req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, "http://"+listener.Addr().String(), r)
			require.NoError(t, err)
			resp, err := (&Transport{Base: base, Headers: time.Minute, Idle: time.Minute}).RoundTrip(req)
			require.NoError(t, err)
			_, err = io.ReadAll(resp.Body)
			require.NoError(t, err)
			for range 20 {
				_, err = io.WriteString(w, "x")
				require.NoError(t, err)
			}
			w.Close()
			require.Equal(t, strings.Repeat("x", 20), <-uploaded)
			require.NoError(t, resp.Body.Close())
		})
	}
}

// The few parts of HTTP/2 (RFC 9113, sections 4.1 and 6) that earlyAnswer speaks.
const (
	preface        = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
	frameData      = 0x0
	frameHeaders   = 0x1
	frameReset     = 0x3
	frameSettings  = 0x4
	flagAck        = 0x1
	flagEndStream  = 0x1
	flagEndHeaders = 0x4
	status200      = 0x88 // a header block
)

// frame builds a frame, which is of stream 1 unless it is about settings.
func frame(kind, flags byte, payload []byte) []byte {
	var stream uint32
	if kind != frameSettings {
		stream = 1
	}
	head := []byte{0, 0, byte(len(payload)), kind, flags}
	return append(binary.BigEndian.AppendUint32(head, stream), payload...)
}

// earlyAnswer serves one request over HTTP/2. It answers at the headers, and
// returns what it gets of the body: all of it, or what came before a reset.
func earlyAnswer(listener net.Listener, answer []byte) (got string) {
	conn, err := listener.Accept()
	if err != nil {
		return err.Error()
	}
	defer conn.Close()
	_, _ = io.ReadFull(conn, make([]byte, len(preface)))
	_, _ = conn.Write(frame(frameSettings, 0, nil))
	for {
		var head [9]byte
		if _, err := io.ReadFull(conn, head[:]); err != nil {
			return got + err.Error()
		}
		payload := make([]byte, int(head[0])<<16|int(head[1])<<8|int(head[2]))
		if _, err := io.ReadFull(conn, payload); err != nil {
			return got + err.Error()
		}
		switch kind, flags := head[3], head[4]; {
		case kind == frameSettings && flags&flagAck == 0:
			_, _ = conn.Write(frame(frameSettings, flagAck, nil))
		case kind == frameHeaders:
			_, _ = conn.Write(answer)
		case kind == frameReset:
			return got + "reset"
		case kind == frameData:
			if got += string(payload); flags&flagEndStream != 0 {
				return got
			}
		}
	}
}

// A proxy's client stalls. Closing the body that it sends does not end a Read.
func TestStalledUploadThroughAProxy(t *testing.T) {
	const small = time.Second
	handler := func(_ http.ResponseWriter, r *http.Request) { _, _ = io.Copy(io.Discard, r.Body) }
	serve(t, handler, func(t *testing.T, upstream string, base *http.Transport) {
		target, err := url.Parse(upstream)
		require.NoError(t, err)
		failed := make(chan error, 1)
		front := httptest.NewServer(&httputil.ReverseProxy{
			Rewrite:      func(r *httputil.ProxyRequest) { r.SetURL(target) },
			Transport:    &Transport{Base: base, Headers: small},
			ErrorHandler: func(_ http.ResponseWriter, _ *http.Request, err error) { failed <- err },
		})
		defer front.Close()
		conn, err := net.Dial("tcp", front.Listener.Addr().String())
		require.NoError(t, err)
		defer conn.Close()
		_, err = io.WriteString(conn, "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nabc")
		require.NoError(t, err)
		require.Equal(t, &SlowBodyError{small}, <-failed)
	})
}

// However a Read of the body ends, it ends so for whoever called it.
func TestAbruptEndOfAnUpload(t *testing.T) {
	for name, end := range map[string]func(){
		"panic":  func() { panic("read") },
		"Goexit": runtime.Goexit,
	} {
		t.Run(name, func(t *testing.T) {
			req := post(t.Context(), t, readFunc(func([]byte) (int, error) { end(); return 0, nil }))
			got := make(chan any, 1)
			go func() {
				defer func() { got <- recover() }()
				_, _ = (&Transport{Base: upThenWait(0), Headers: limit}).RoundTrip(req)
				got <- "returned"
			}()
			require.Equal(t, map[string]any{"panic": "read", "Goexit": nil}[name], <-got)
		})
	}
}

// The caller's cancel does not leave a Read behind.
func TestCancelWaitsForTheRead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		time.AfterFunc(1, cancel)
		begin := time.Now()
		_, err := (&Transport{Base: upThenWait(limit), Headers: limit}).RoundTrip(post(ctx, t, pieces(limit/2)))
		require.Equal(t, context.Canceled, err)
		require.Equal(t, limit/2, time.Since(begin))
	})
}

// Reads, the answer and the ring of the timer may all come at once.
func TestWatchUnderStress(t *testing.T) {
	var late, slow, well atomic.Int32
	for i := range 300 {
		pause := time.Duration(i%3) * 100 * time.Microsecond
		tr := &Transport{Headers: 100 * time.Microsecond, Base: baseFunc(func(req *http.Request) (*http.Response, error) {
			done := make(chan struct{})
			go func() {
				defer close(done)
				_, _ = io.Copy(io.Discard, req.Body)
			}()
			if i%2 == 0 {
				<-done
			}
			return response(strings.NewReader("abc")), nil
		})}
		r, w := io.Pipe()
		time.AfterFunc(pause, func() { _, _ = io.WriteString(w, "x"); w.Close() })
		resp, err := tr.RoundTrip(post(t.Context(), t, r))
		switch {
		case err == nil:
			well.Add(1)
			requireReads(t, "abc", resp)
		case errors.As(err, new(*SlowBodyError)):
			slow.Add(1)
		default:
			require.IsType(t, (*Exceeded)(nil), err)
			late.Add(1)
		}
	}
	t.Logf("well %d, slow %d, late %d", well.Load(), slow.Load(), late.Load())
}
