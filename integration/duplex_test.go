package integration

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/tripper-go/tripper"
)

// A duplex service speaks as gRPC does: HTTP/2, one stream of lines each way at
// the same time, and how it went in the trailers. Its first requests go to the
// steps.
type duplex struct {
	*httptest.Server
	steps    []step
	requests atomic.Int64
}

type connKey struct{}

func playDuplex(t *testing.T, steps ...step) *duplex {
	d := &duplex{steps: steps}
	d.Server = httptest.NewUnstartedServer(d)
	d.EnableHTTP2 = true
	d.Config.ConnContext = func(ctx context.Context, c net.Conn) context.Context { return context.WithValue(ctx, connKey{}, c) }
	d.StartTLS()
	t.Cleanup(func() {
		d.CloseClientConnections()
		d.Close()
	})
	return d
}

func (d *duplex) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	n := int(d.requests.Add(1))
	if n <= len(d.steps) {
		d.steps[n-1](w, r)
		return
	}
	w.Header().Set("Content-Type", "application/grpc")
	w.Header().Set("Trailer", "Grpc-Status")
	w.WriteHeader(http.StatusOK)
	w.(http.Flusher).Flush()
	for lines := bufio.NewScanner(r.Body); lines.Scan(); {
		io.WriteString(w, "echo "+lines.Text()+"\n")
		w.(http.Flusher).Flush()
	}
	w.Header().Set("Grpc-Status", "0")
}

// resetConn breaks the whole connection off.
func resetConn(_ http.ResponseWriter, r *http.Request) {
	conn := r.Context().Value(connKey{}).(interface{ NetConn() net.Conn }).NetConn()
	conn.(*net.TCPConn).SetLinger(0)
	conn.Close()
}

// resetStream breaks off this request alone.
func resetStream(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }

// afterALine does what inner does once the first line has come.
func afterALine(inner step) step {
	return func(w http.ResponseWriter, r *http.Request) {
		bufio.NewReader(r.Body).ReadString('\n')
		inner(w, r)
	}
}

// A talk is one request of both directions.
type talk struct {
	t     *testing.T
	say   *io.PipeWriter
	resp  *http.Response
	hears *bufio.Reader
}

func (d *duplex) transport(t *testing.T, change ...func(*tripper.Transport)) *tripper.Transport {
	base := d.Client().Transport.(*http.Transport)
	tr := &tripper.Transport{Base: base, Policy: tripper.Policy{
		Service: "api", Retry: tripper.RetryPolicy{MinWait: time.Millisecond, MaxWait: 2 * time.Millisecond, Replay: tripper.ReplayAny},
	}}
	for _, f := range change {
		f(tr)
	}
	return tr
}

// begin opens a talk whose first line is on its way while nothing has been
// answered yet.
func (d *duplex) begin(ctx context.Context, t *testing.T, tr *tripper.Transport) (*talk, error) {
	body, say := io.Pipe()
	t.Cleanup(func() { say.Close() })
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, d.URL, body)
	require.NoError(t, err)
	req.Header.Set("Content-Type", "application/grpc")
	req.Header.Set("TE", "trailers")
	go io.WriteString(say, "one\n")
	resp, err := (&http.Client{Transport: tr}).Do(req)
	if err != nil {
		return nil, err
	}
	t.Cleanup(func() { resp.Body.Close() })
	require.Equal(t, 2, resp.ProtoMajor)
	return &talk{t, say, resp, bufio.NewReader(resp.Body)}, nil
}

// goOn says a line and hears its echo, again and again: each side's next line
// needs the other's.
func (k *talk) goOn() {
	k.t.Helper()
	k.hear("echo one\n")
	for _, line := range []string{"two", "three", "four"} {
		_, err := io.WriteString(k.say, line+"\n")
		require.NoError(k.t, err)
		k.hear("echo " + line + "\n")
	}
	k.say.Close()
	rest, err := io.ReadAll(k.hears)
	require.NoError(k.t, err)
	require.Empty(k.t, rest)
	require.Equal(k.t, "0", k.resp.Trailer.Get("Grpc-Status"))
}

func (k *talk) hear(want string) {
	k.t.Helper()
	got, err := k.hears.ReadString('\n')
	require.NoError(k.t, err)
	require.Equal(k.t, want, got)
}

func limited(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	t.Cleanup(cancel)
	return ctx
}

func TestDuplex(t *testing.T) {
	t.Parallel()
	unavailable := textFault(http.StatusServiceUnavailable)
	limitedAnswer := textFault(http.StatusTooManyRequests, "Retry-After", "0.002")
	for name, steps := range map[string][]step{
		"at once":                       nil,
		"after a 503":                   {unavailable},
		"after a 429":                   {limitedAnswer},
		"after a 503 amid the upload":   {afterALine(unavailable)},
		"after a reset":                 {resetConn},
		"after a reset amid the upload": {afterALine(resetConn)},
		"after a reset stream":          {afterALine(resetStream)},
		"after both":                    {afterALine(resetConn), unavailable},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			d := playDuplex(t, steps...)
			tr := d.transport(t)
			talk, err := d.begin(limited(t), t, tr)
			require.NoError(t, err)
			talk.goOn()
			require.EqualValues(t, len(steps)+1, d.requests.Load())
			stats, _ := tr.Stats("api")
			require.EqualValues(t, len(steps)+1, stats.Attempts)
			require.EqualValues(t, 1, stats.Successes)
		})
	}
}

// A stream that breaks off after it has begun is its reader's to see.
func TestDuplexThatBreaksOff(t *testing.T) {
	t.Parallel()
	d := playDuplex(t, func(w http.ResponseWriter, r *http.Request) {
		io.WriteString(w, "echo one\n")
		w.(http.Flusher).Flush()
		bufio.NewReader(r.Body).ReadString('\n')
		resetStream(w, r)
	})
	tr := d.transport(t)
	talk, err := d.begin(limited(t), t, tr)
	require.NoError(t, err)
	talk.hear("echo one\n")
	_, err = talk.hears.ReadString('\n')
	require.Error(t, err)
	require.NotErrorIs(t, err, io.EOF)
	require.EqualValues(t, 1, d.requests.Load())
	stats, _ := tr.Stats("api")
	require.EqualValues(t, 1, stats.StreamFailures)
	require.EqualValues(t, 1, stats.Failures)
}

func TestDuplexFails(t *testing.T) {
	t.Parallel()
	t.Run("with the last answer", func(t *testing.T) {
		t.Parallel()
		unavailable := textFault(http.StatusServiceUnavailable)
		d := playDuplex(t, unavailable, unavailable, unavailable)
		talk, err := d.begin(limited(t), t, d.transport(t))
		require.NoError(t, err)
		require.Equal(t, http.StatusServiceUnavailable, talk.resp.StatusCode)
		body, err := io.ReadAll(talk.hears)
		require.NoError(t, err)
		require.Equal(t, plea, string(body))
		require.EqualValues(t, 3, d.requests.Load())
	})
	t.Run("with the last error", func(t *testing.T) {
		t.Parallel()
		broken := afterALine(resetStream)
		d := playDuplex(t, broken, broken, broken)
		_, err := d.begin(limited(t), t, d.transport(t))
		failed, ok := errors.AsType[*tripper.RetryError](err)
		require.True(t, ok, "%T: %v", err, err)
		require.Equal(t, 3, failed.Attempts)
		require.EqualValues(t, 3, d.requests.Load())
	})
	t.Run("with an open breaker", func(t *testing.T) {
		t.Parallel()
		d := playDuplex(t)
		tr := d.transport(t)
		require.True(t, tr.Trip("api", 0, nil))
		_, err := d.begin(limited(t), t, tr)
		_, ok := errors.AsType[*tripper.OpenError](err)
		require.True(t, ok, "%T: %v", err, err)
		require.EqualValues(t, 0, d.requests.Load())
	})
	t.Run("when its caller leaves", func(t *testing.T) {
		t.Parallel()
		h := newHang()
		d := playDuplex(t, afterALine(h.step))
		ctx, cancel := context.WithCancel(limited(t))
		go func() {
			<-h.arrived
			cancel()
		}()
		_, err := d.begin(ctx, t, d.transport(t))
		require.ErrorIs(t, err, context.Canceled)
		receive(t, h.left, "the client to leave")
		require.EqualValues(t, 1, d.requests.Load())
	})
}

// What was said before a fault is kept up to BodyLimit; past it the request has
// one attempt, and nothing is lost of what it says.
func TestDuplexPastTheBodyLimit(t *testing.T) {
	t.Parallel()
	d := playDuplex(t, func(w http.ResponseWriter, r *http.Request) {
		io.CopyN(io.Discard, r.Body, 1<<10)
		textFault(http.StatusServiceUnavailable)(w, r)
	})
	tr := d.transport(t, func(tr *tripper.Transport) { tr.Policy.Retry.BodyLimit = 64 })
	body, say := io.Pipe()
	go func() {
		say.Write(bytes.Repeat([]byte("x"), 1<<10))
		say.Close()
	}()
	req, err := http.NewRequestWithContext(limited(t), http.MethodPost, d.URL, body)
	require.NoError(t, err)
	resp, err := (&http.Client{Transport: tr}).Do(req)
	require.NoError(t, err)
	resp.Body.Close()
	require.Equal(t, http.StatusServiceUnavailable, resp.StatusCode)
	require.EqualValues(t, 1, d.requests.Load())
	stats, _ := tr.Stats("api")
	require.EqualValues(t, 1, stats.Suppressed.Body)
}
