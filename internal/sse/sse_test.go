package sse

import (
	"context"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"runtime"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

type roundTripper func(*http.Request) (*http.Response, error)

func (f roundTripper) RoundTrip(req *http.Request) (*http.Response, error) { return f(req) }

type closeCounter struct {
	io.Reader
	closed int
}

func (c *closeCounter) Close() error { c.closed++; return nil }

func roundTrip(t *testing.T, body io.ReadCloser, header http.Header) (*http.Response, error) {
	t.Helper()
	base := roundTripper(func(req *http.Request) (*http.Response, error) {
		return &http.Response{StatusCode: http.StatusOK, Header: header, Body: body, Request: req}, nil
	})
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, "https://api.example.com/", nil)
	require.NoError(t, err)
	return (&Transport{Base: base}).RoundTrip(req)
}

func eventStream() http.Header {
	return http.Header{"Content-Type": {"text/event-stream; charset=utf-8"}}
}

const (
	ping       = ": comment\n\nevent: ping\ndata: {\"type\": \"ping\"}\n\n"
	first      = "event: message_start\ndata: {\"type\":\"message_start\"}\n\n"
	overloaded = "event: error\ndata: {\"type\":\"error\",\"error\":{\"type\":\"overloaded_error\",\"message\":\"Overloaded\"}}\n\n"
	invalid    = "event: error\ndata: {\"type\":\"error\",\"error\":{\"type\":\"invalid_request_error\"}}\n\n"
)

var errBroken = errors.New("connection reset")

func TestBeginnings(t *testing.T) {
	tests := []struct {
		name, stream string
		end          error  // nil: EOF
		failure      string // "": begins well
	}{
		{"event", first, nil, ""},
		{"event after pings and comments", ping + ping + first, nil, ""},
		{"event, then the stream breaks off", first, errBroken, ""},
		{"event without a name", "data: {}\n\n", nil, ""},
		{"data before the name", "data: x\nevent: a\n\n", nil, ""},
		{"CRLF", strings.ReplaceAll(first, "\n", "\r\n"), nil, ""},
		{"CR", strings.ReplaceAll(first, "\n", "\r"), nil, ""},
		{"byte order mark", "\ufeff" + first, nil, ""},
		{"event and an error in one piece", first + overloaded, nil, ""},
		{"error that no retry cures", invalid, nil, ""},
		{"error that is no JSON", "event: error\ndata: oops\n\n", nil, ""},
		{"error without a name that no retry cures", "data: {\"error\":{\"type\":\"invalid_request_error\"}}\n\n", nil, ""},
		{"passing error without a name", "data: {\"error\":{\"type\":\"server_error\"}}\n\ndata: [DONE]\n\n", nil, `error event: "server_error"`},
		{"passing error over several lines", "data: {\"error\":\ndata: {\"code\":503}}\n\n", nil, "error event"},
		{"only the last event", "data: [DONE]\n\n", nil, ""},
		{"very long event", "data: " + strings.Repeat("x", 2*maxHeld), nil, ""},
		{"nothing", "", nil, "unexpected EOF"},
		{"only pings", ping + ping, nil, "unexpected EOF"},
		{"event without data", "event: message_start\n\n", nil, "unexpected EOF"},
		{"half an event", "event: message_start\ndata: {", nil, "unexpected EOF"},
		{"breaks off at once", "", errBroken, "connection reset"},
		{"breaks off after a ping", ping, errBroken, "connection reset"},
		{"passing error", overloaded, nil, `error event: "overloaded_error"`},
		{"passing error, named after its data", "data: {\"error\":{\"type\":\"api_error\"}}\nevent: error\n\n", nil, `error event: "api_error"`},
		{"passing error after a ping", ping + overloaded, nil, `error event: "overloaded_error"`},
		{"passing error, CRLF", strings.ReplaceAll(overloaded, "\n", "\r\n"), nil, `error event: "overloaded_error"`},
	}
	pieces := map[string]func(io.Reader) io.Reader{
		"whole":             func(r io.Reader) io.Reader { return r },
		"byte by byte":      iotest.OneByteReader,
		"halves":            iotest.HalfReader,
		"data with the end": iotest.DataErrReader,
	}
	for _, test := range tests {
		for how, cut := range pieces {
			t.Run(test.name+", "+how, func(t *testing.T) {
				source := io.Reader(strings.NewReader(test.stream))
				if test.end != nil {
					source = io.MultiReader(source, iotest.ErrReader(test.end))
				}
				body := &closeCounter{Reader: cut(source)}
				resp, err := roundTrip(t, body, eventStream())
				if test.failure != "" {
					var failure *Failure
					require.ErrorAs(t, err, &failure)
					assert.Nil(t, resp)
					assert.EqualError(t, failure.Unwrap(), test.failure)
					resp = failure.Response
				} else {
					require.NoError(t, err)
				}
				got, err := io.ReadAll(resp.Body)
				assert.Equal(t, test.end, err)
				assert.Equal(t, test.stream, string(got), "nothing is lost or changed")
				require.NoError(t, resp.Body.Close())
				assert.Equal(t, 1, body.closed)
			})
		}
	}
}

func TestLaterErrorEvent(t *testing.T) {
	for _, event := range []string{overloaded, invalid} {
		resp, err := roundTrip(t, io.NopCloser(iotest.OneByteReader(strings.NewReader(first+ping+event))), eventStream())
		require.NoError(t, err)
		body := resp.Body.(*Body)
		assert.Nil(t, body.Failed())
		_, err = io.ReadAll(body)
		require.NoError(t, err)
		assert.NotNil(t, body.Failed())
	}
}

func TestOtherResponsesPassUntouched(t *testing.T) {
	for name, header := range map[string]http.Header{
		"no type": {},
		"JSON":    {"Content-Type": {"application/json"}},
		"gzip":    {"Content-Type": {"text/event-stream"}, "Content-Encoding": {"gzip"}},
	} {
		t.Run(name, func(t *testing.T) {
			body := io.NopCloser(strings.NewReader(overloaded))
			resp, err := roundTrip(t, body, header)
			require.NoError(t, err)
			assert.Equal(t, body, resp.Body)
		})
	}
}

// From the first event on each event is there as soon as it is sent: the
// writer waits for the reader before it goes on.
func TestFlowsAsItComes(t *testing.T) {
	r, w := io.Pipe()
	read := make(chan string)
	go func() {
		defer w.Close()
		for _, event := range []string{first, "data: 2\n\n", "data: 3\n\n"} {
			_, _ = io.WriteString(w, event)
			if got := <-read; got != event {
				w.CloseWithError(errors.New("got " + got))
				return
			}
		}
	}()
	resp, err := roundTrip(t, r, eventStream())
	require.NoError(t, err)
	buf := make([]byte, 1<<10)
	for {
		n, err := resp.Body.Read(buf)
		if err == io.EOF {
			return
		}
		require.NoError(t, err)
		read <- string(buf[:n])
	}
}

func TestCancelledWhileHeld(t *testing.T) {
	cause := errors.New("gone")
	ctx, cancel := context.WithCancelCause(t.Context())
	body := &closeCounter{Reader: io.MultiReader(strings.NewReader(ping), readerFunc(func([]byte) (int, error) {
		cancel(cause)
		return 0, errBroken
	}))}
	base := roundTripper(func(req *http.Request) (*http.Response, error) {
		return &http.Response{StatusCode: http.StatusOK, Header: eventStream(), Body: body}, nil
	})
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "https://api.example.com/", nil)
	require.NoError(t, err)
	_, err = (&Transport{Base: base}).RoundTrip(req)
	assert.Equal(t, cause, err)
	assert.Equal(t, 1, body.closed)
}

type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }

func TestFailedTellsOfAnErrorThatPassed(t *testing.T) {
	resp, err := roundTrip(t, io.NopCloser(strings.NewReader(invalid)), eventStream())
	require.NoError(t, err)
	assert.Equal(t, &EventError{"invalid_request_error", 400}, resp.Body.(*Body).Failed())
}

// The other methods may be called while a Read is under way.
func TestFailedAndCloseBesideRead(t *testing.T) {
	r, w := io.Pipe()
	go func() { _, _ = io.WriteString(w, first) }()
	resp, err := roundTrip(t, r, eventStream())
	require.NoError(t, err)
	body := resp.Body.(*Body)
	ended := make(chan error)
	go func() {
		_, err := io.Copy(io.Discard, body)
		ended <- err
	}()
	go func() { _, _ = io.WriteString(w, overloaded) }()
	for body.Failed() == nil {
		runtime.Gosched()
	}
	require.NoError(t, body.Close())
	assert.Equal(t, io.ErrClosedPipe, <-ended)
	assert.Equal(t, 529, body.Failed().Status)
}

func TestHeadIsNotHeld(t *testing.T) {
	resp := &http.Response{StatusCode: http.StatusOK, Header: eventStream(), Body: http.NoBody}
	got, err := Hold(&http.Request{Method: http.MethodHead}, resp)
	require.NoError(t, err)
	assert.Same(t, resp, got)
	assert.Equal(t, http.NoBody, got.Body)
}

func TestOnlyStatus200IsHeld(t *testing.T) {
	for _, status := range []int{201, 204, 400, 503} {
		resp := &http.Response{StatusCode: status, Header: eventStream(), Body: http.NoBody}
		got, err := Hold(&http.Request{}, resp)
		require.NoError(t, err)
		assert.Same(t, resp, got)
	}
}

func TestEmptyStreamHasFailed(t *testing.T) {
	for _, body := range []io.ReadCloser{nil, http.NoBody} {
		resp := &http.Response{StatusCode: http.StatusOK, Header: eventStream(), Body: body}
		_, err := Hold(&http.Request{}, resp)
		var failure *Failure
		require.ErrorAs(t, err, &failure)
		assert.Same(t, resp, failure.Response)
		assert.Equal(t, http.NoBody, resp.Body)
		assert.Equal(t, io.ErrUnexpectedEOF, failure.Err)
	}
}

func TestOnTheWire(t *testing.T) {
	handlers := map[string]struct {
		handler http.HandlerFunc
		failed  bool // for GET
	}{
		"length 0":     {func(w http.ResponseWriter, _ *http.Request) { w.Header().Set("Content-Length", "0") }, true},
		"flushed":      {func(w http.ResponseWriter, _ *http.Request) { w.(http.Flusher).Flush() }, true},
		"returns":      {func(http.ResponseWriter, *http.Request) {}, true},
		"has an event": {func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, first) }, false},
	}
	for name, test := range handlers {
		for _, h2 := range []bool{false, true} {
			srv := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				w.Header().Set("Content-Type", "text/event-stream")
				test.handler(w, r)
			}))
			srv.EnableHTTP2 = h2
			srv.StartTLS()
			defer srv.Close()
			client := &http.Client{Transport: &Transport{Base: srv.Client().Transport}}
			resp, err := client.Get(srv.URL)
			var failure *Failure
			if assert.Equal(t, test.failed, errors.As(err, &failure), "%s, HTTP/2: %v", name, h2); failure != nil {
				resp = failure.Response
			}
			resp.Body.Close()
			resp, err = client.Head(srv.URL)
			require.NoError(t, err)
			resp.Body.Close()
		}
	}
}

func TestAbruptEndOfTheHold(t *testing.T) {
	for name, end := range map[string]func(){
		"panic":  func() { panic("read") },
		"Goexit": runtime.Goexit,
	} {
		t.Run(name, func(t *testing.T) {
			body := &closeCounter{Reader: readerFunc(func([]byte) (int, error) { end(); return 0, nil })}
			resp := &http.Response{StatusCode: http.StatusOK, Header: eventStream(), Body: body}
			req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "https://api.example.com/", nil)
			require.NoError(t, err)
			done := make(chan struct{})
			go func() {
				defer close(done)
				defer func() { _ = recover() }()
				_, _ = Hold(req, resp)
			}()
			<-done
			assert.Equal(t, 1, body.closed)
		})
	}
}

// Whatever comes in whatever pieces, what the parser concludes is the same,
// and it keeps only a little.
func FuzzParser(f *testing.F) {
	for _, seed := range []string{first, ping, overloaded, invalid, "data: {\"error\":{\"code\":503}}\n\n", "\ufeffdata\r\r\n\n", "data:\n\n", strings.Repeat("x", 9000) + "\n"} {
		f.Add([]byte(seed), uint8(3))
	}
	f.Fuzz(func(t *testing.T, stream []byte, size uint8) {
		var whole, cut parser
		whole.feed(stream)
		for rest := stream; len(rest) > 0; {
			n := min(len(rest), int(size)+1)
			cut.feed(rest[:n])
			rest = rest[n:]
		}
		assert.Equal(t, whole.begun, cut.begun)
		assert.Equal(t, whole.early, cut.early)
		assert.Equal(t, whole.failed, cut.failed)
		assert.LessOrEqual(t, len(cut.line), maxKept)
		assert.LessOrEqual(t, len(cut.data), maxKept)
	})
}
