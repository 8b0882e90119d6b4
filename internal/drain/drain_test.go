package drain

import (
	"bufio"
	"bytes"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"testing/iotest"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

type body struct {
	io.Reader
	read, closed int
}

func (b *body) Read(p []byte) (int, error) {
	n, err := b.Reader.Read(p)
	b.read += n
	return n, err
}

func (b *body) Close() error { b.closed++; return nil }

type endless struct{}

func (endless) Read(p []byte) (int, error) { return len(p), nil }

func TestClose(t *testing.T) {
	tests := []struct {
		name   string
		reader io.Reader
		length int64
		most   int
		least  int
	}{
		{"empty", bytes.NewReader(nil), 0, 0, 0},
		{"short", bytes.NewReader(make([]byte, 100)), -1, 100, 100},
		{"short, known", bytes.NewReader(make([]byte, 100)), 100, 100, 100},
		{"long, known", bytes.NewReader(make([]byte, known)), known, known, known},
		{"too long, known", bytes.NewReader(make([]byte, 2*known)), 2 * known, unknown + 1, 0},
		{"endless", endless{}, -1, unknown + 1, unknown + 1},
		{"longer than it says", endless{}, 10, 11, 11},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			b := &body{Reader: test.reader}
			Close(&http.Response{Body: b, ContentLength: test.length})
			assert.LessOrEqual(t, b.read, test.most)
			assert.GreaterOrEqual(t, b.read, test.least)
			assert.Equal(t, 1, b.closed)
		})
	}
	Close(nil)
	Close(&http.Response{})
	Close(&http.Response{Body: http.NoBody})
}

// A body that stalls costs a moment, and its reader ends when it is closed.
func TestCloseDoesNotWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, w := io.Pipe()
		defer w.Close()
		begin := time.Now()
		Close(&http.Response{Body: r, ContentLength: -1})
		assert.Equal(t, moment, time.Since(begin))
	})
}

// One whose Close does not end its Read costs no more, nor does one whose Close
// hangs.
func TestCloseDoesNotWaitForStubbornBodies(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, w := io.Pipe()
		begin := time.Now()
		Close(&http.Response{Body: io.NopCloser(r), ContentLength: -1})
		assert.Equal(t, moment, time.Since(begin))
		w.Close() // lets the reader go
	})
	synctest.Test(t, func(t *testing.T) {
		b := hangingClose{make(chan struct{})}
		begin := time.Now()
		Close(&http.Response{Body: b, ContentLength: -1})
		assert.Equal(t, 2*moment, time.Since(begin))
		close(b.gate)
	})
}

type hangingClose struct{ gate chan struct{} }

func (hangingClose) Read([]byte) (int, error) { return 0, io.EOF }
func (b hangingClose) Close() error           { <-b.gate; return nil }

func TestInMemory(t *testing.T) {
	for want, bodies := range map[bool][]io.ReadCloser{
		true: {io.NopCloser(strings.NewReader("x")), io.NopCloser(bytes.NewReader(nil)), io.NopCloser(&bytes.Buffer{}),
			struct {
				*bytes.Reader
				io.Closer
			}{}},
		false: {io.NopCloser(endless{}), io.NopCloser(bufio.NewReader(endless{})), io.NopCloser(io.LimitReader(strings.NewReader("x"), 1)),
			&body{Reader: strings.NewReader("x")}, http.NoBody},
	} {
		for _, b := range bodies {
			assert.Equal(t, want, inMemory(b), "%T", b)
		}
	}
	text := strings.NewReader(strings.Repeat("x", 2*unknown))
	Close(&http.Response{Body: io.NopCloser(text), ContentLength: -1})
	assert.Equal(t, unknown-1, text.Len())
}

func TestKeep(t *testing.T) {
	broken := errors.New("connection reset")
	tests := []struct {
		name   string
		size   int
		end    error // nil: EOF
		length int64
		lost   bool
	}{
		{"empty", 0, nil, 0, false},
		{"short", 100, nil, -1, false},
		{"short, known", 100, nil, 100, false},
		{"shorter than it says", 100, io.ErrUnexpectedEOF, 200, false},
		{"longer than it says", 100, nil, 10, false},
		{"breaks off", 3000, broken, -1, false},
		{"breaks off at once", 0, broken, 100, false},
		{"as long as may be", known, nil, -1, false},
		{"as long as may be, known", known, nil, known, false},
		{"too long", known + 1, nil, -1, true},
		{"too long, known", known + 1, nil, known + 1, true},
		{"much longer than it says", known + 1, nil, 10, true},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			content := bytes.Repeat([]byte("0123456789abcdef"), known/16+1)[:test.size]
			reader := io.Reader(bytes.NewReader(content))
			if test.end != nil {
				reader = io.MultiReader(reader, iotest.ErrReader(test.end))
			}
			b := &body{Reader: reader}
			resp := &http.Response{StatusCode: 503, Body: b, ContentLength: test.length, Trailer: http.Header{"A": {"b"}}}
			kept := Keep(resp)
			assert.Equal(t, 1, b.closed)
			if test.lost {
				assert.Nil(t, kept)
				assert.LessOrEqual(t, b.read, known+1)
				return
			}
			require.Same(t, resp, kept)
			assert.Same(t, kept, Keep(kept), "a second time")
			got, err := io.ReadAll(kept.Body)
			assert.Equal(t, test.end, err)
			assert.True(t, bytes.Equal(content, got))
			assert.Equal(t, test.length, kept.ContentLength)
			assert.Equal(t, http.Header{"A": {"b"}}, kept.Trailer)
			require.NoError(t, kept.Body.Close())
			_, err = kept.Body.Read(make([]byte, 1))
			assert.Equal(t, http.ErrBodyReadAfterClose, err)
			assert.Equal(t, 1, b.closed)
		})
	}
}

func TestKeepWithoutABody(t *testing.T) {
	assert.Nil(t, Keep(nil))
	for _, b := range []io.ReadCloser{nil, http.NoBody} {
		resp := &http.Response{Body: b}
		assert.Same(t, resp, Keep(resp))
		assert.Equal(t, b, resp.Body)
	}
	// The length is that of what GET would have had.
	resp := &http.Response{Body: &body{Reader: strings.NewReader("")}, ContentLength: 1 << 40,
		Request: &http.Request{Method: http.MethodHead}}
	assert.Same(t, resp, Keep(resp))
}

// stubborn is a body whose parts hang until its gate opens.
type stubborn struct {
	gate          chan struct{}
	reads, closes bool // these hang
	closed        atomic.Bool
}

func (s *stubborn) Read([]byte) (int, error) {
	if s.reads {
		<-s.gate
	}
	return 0, io.EOF
}

func (s *stubborn) Close() error {
	s.closed.Store(true)
	if s.closes {
		<-s.gate
	}
	return nil
}

func TestKeepDoesNotWait(t *testing.T) {
	for _, test := range []struct {
		reads, closes, lost bool
		length              int64
	}{
		{reads: true, lost: true, length: -1},
		{reads: true, closes: true, lost: true, length: -1},
		{closes: true, length: -1}, // everything has been read
		{closes: true, length: known + 1, lost: true},
	} {
		synctest.Test(t, func(t *testing.T) {
			b := &stubborn{gate: make(chan struct{}), reads: test.reads, closes: test.closes}
			begin := time.Now()
			kept := Keep(&http.Response{Body: b, ContentLength: test.length})
			assert.Equal(t, moment, time.Since(begin))
			assert.Equal(t, test.lost, kept == nil)
			synctest.Wait()
			assert.True(t, b.closed.Load())
			close(b.gate) // all goroutines end now, or the bubble complains
		})
	}
}

type readFunc func([]byte) (int, error)

func (f readFunc) Read(p []byte) (int, error) { return f(p) }
func (readFunc) Close() error                 { return nil }

// A body that gives nothing again and again ends, too.
func TestKeepEndsABodyThatGivesNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := readFunc(func([]byte) (int, error) { time.Sleep(time.Millisecond); return 0, nil })
		assert.Nil(t, Keep(&http.Response{Body: b, ContentLength: -1}))
		time.Sleep(2 * time.Millisecond) // the bubble complains about a goroutine that still reads
		synctest.Wait()
	})
}

func TestPanicsOfABodyEndThere(t *testing.T) {
	b := readFunc(func([]byte) (int, error) { panic("read") })
	assert.Nil(t, Keep(&http.Response{Body: b}))
	b = func([]byte) (int, error) { runtime.Goexit(); return 0, nil }
	assert.Nil(t, Keep(&http.Response{Body: b}))
	Close(&http.Response{Body: b})
}

func TestKeptBodyIsInMemory(t *testing.T) {
	resp := Keep(&http.Response{Body: io.NopCloser(strings.NewReader("sorry")), ContentLength: 5})
	assert.True(t, inMemory(resp.Body))
	Close(resp)
}

func TestKeepIsFrugal(t *testing.T) {
	page := strings.Repeat("x", 300)
	count := func(use func(*http.Response)) float64 {
		b := &body{Reader: strings.NewReader(page)}
		return testing.AllocsPerRun(100, func() {
			b.Reader.(*strings.Reader).Reset(page)
			use(&http.Response{Body: b, ContentLength: 300})
		})
	}
	closing, keeping := count(Close), count(func(r *http.Response) { Keep(r) })
	t.Logf("Close %v, Keep %v", closing, keeping)
	assert.LessOrEqual(t, keeping, closing+3)
}

// Both sorts of connection are used again, and a trailer is kept.
func TestKeepOnTheWire(t *testing.T) {
	for _, h2 := range []bool{false, true} {
		srv := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Trailer", "Why")
			w.WriteHeader(http.StatusServiceUnavailable)
			_, _ = io.WriteString(w, r.RemoteAddr)
			w.Header().Set("Why", "busy")
		}))
		srv.EnableHTTP2 = h2
		srv.StartTLS()
		defer srv.Close()
		addresses := map[string]bool{}
		for range 3 {
			resp, err := srv.Client().Get(srv.URL)
			require.NoError(t, err)
			require.NotNil(t, Keep(resp))
			got, err := io.ReadAll(resp.Body)
			require.NoError(t, err)
			addresses[string(got)] = true
			assert.Equal(t, "busy", resp.Trailer.Get("Why"))
		}
		assert.Len(t, addresses, 1)
	}
}
