package drain

import (
	"bufio"
	"bytes"
	"io"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
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
