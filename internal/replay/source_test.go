package replay

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"strings"
	"testing"
	"testing/iotest"
	"testing/synctest"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// A picky source counts its Seeks, all of which but the first do as told.
type picky struct {
	*source
	r     *bytes.Reader
	seeks int
	back  func(offset int64) (int64, error) // nil: seeks in r
}

func newPicky(t *testing.T, content []byte) *picky {
	r := bytes.NewReader(content)
	return &picky{source: newSource(t, r), r: r}
}

func (p *picky) Seek(offset int64, whence int) (int64, error) {
	if p.seeks++; p.seeks == 1 || p.back == nil {
		return p.r.Seek(offset, whence)
	}
	return p.back(offset)
}

// Of a reader without Close http.NewRequest makes an io.NopCloser.
func TestHiddenReadersAreRewound(t *testing.T) {
	want := text(1000)
	hidden := func(r io.Reader) io.ReadCloser {
		req, err := http.NewRequest(http.MethodPost, "http://example.com", r)
		require.NoError(t, err)
		return req.Body
	}
	file := openFile(t, append([]byte("head"), want...), 4)
	section := io.NewSectionReader(bytes.NewReader(append([]byte("head"), want...)), 4, 1000)
	begun := bytes.NewReader(append([]byte("head"), want...))
	requireReadsFull(t, []byte("head"), begun)
	for name, src := range map[string]io.ReadCloser{
		"section": hidden(section),
		"file":    io.NopCloser(file),
		"bytes":   hidden(begun),
		"string":  io.NopCloser(strings.NewReader(string(want))),
	} {
		t.Run(name, func(t *testing.T) {
			b, a := New(src, -1, 3, nil)
			for range 3 {
				requireReads(t, want, a)
				require.Nil(t, b.kept)
				require.True(t, b.Replayable())
				a = b.Next()
				require.NotNil(t, a)
			}
			requireReadsFull(t, want[:10], a) // and not to its end
			a.Close()
			requireReads(t, want, b.Next())
			b.Abort()
		})
	}
}

// A Seek that goes nowhere does no harm to a body that fits.
func TestOtherSeekerIsRecorded(t *testing.T) {
	src := newPicky(t, text(100))
	src.back = func(int64) (int64, error) { return 0, errors.New("cannot go back") }
	b, a := New(src, -1, 100, nil)
	for range 3 {
		requireReads(t, text(100), a)
		a = b.Next()
		require.NotNil(t, a)
	}
	require.Equal(t, 1, src.seeks, "to see where it is")
	b.Abort()
	src.requireClosed(1)
}

func TestLongSeekerIsRewoundByNext(t *testing.T) {
	want := text(1000)
	for _, length := range []int64{-1, 1000} {
		src := newPicky(t, want)
		src.Reader = iotest.HalfReader(src.r)
		b, a := New(src, length, 100, nil)
		requireReadsFull(t, want[:200], a)
		require.False(t, b.Replayable())
		require.Nil(t, b.Next(), "the base may still read")
		requireReads(t, want[200:], a)
		_, err := a.Read(make([]byte, 1))
		require.Equal(t, io.EOF, err, "again")
		for round := range 3 {
			require.True(t, b.Replayable())
			a = b.Next()
			require.NotNil(t, a)
			require.Equal(t, 2+round, src.seeks, "before the answer in hand is given up")
			requireReads(t, want, a)
			require.NoError(t, a.Close())
		}
		src.requireClosed(0)
		b.Finish()
		src.requireClosed(1)
	}
}

func TestLongSeekerIsRewoundWhenTheSecondAttemptFindsOut(t *testing.T) {
	want := text(1000)
	src := newPicky(t, want)
	src.Reader = iotest.HalfReader(src.r)
	b, a := New(src, -1, 500, nil)
	requireReadsFull(t, want[:300], a)
	a.Close()
	a = b.Next()
	requireReads(t, want, a)
	require.Equal(t, 1, src.seeks)
	a.Close()
	requireReads(t, want, b.Next())
	require.Equal(t, 2, src.seeks)
	b.Abort()
	src.requireClosed(1)
}

// An attempt that has not begun leaves nothing to rewind.
func TestUnreadSeekerIsNotRewound(t *testing.T) {
	src := newPicky(t, text(1000))
	src.back = func(int64) (int64, error) { return 0, errors.New("cannot go back") }
	b, _ := New(src, 1000, 100, nil)
	require.True(t, b.Replayable())
	a := b.Next()
	requireReads(t, text(1000), a)
	require.Equal(t, 1, src.seeks)
	require.Nil(t, b.Next())
	b.Abort()
	src.requireClosed(1)
}

func TestLongSeekerThatCannotGoBack(t *testing.T) {
	for name, back := range map[string]func(int64) (int64, error){
		"error":     func(int64) (int64, error) { return 0, errors.New("cannot go back") },
		"elsewhere": func(offset int64) (int64, error) { return offset + 1, nil },
	} {
		t.Run(name, func(t *testing.T) {
			src := newPicky(t, text(1000))
			src.back = back
			b, a := New(src, -1, 100, nil)
			requireReads(t, text(1000), a)
			a.Close()
			require.Nil(t, b.Next())
			require.False(t, b.Replayable())
			require.Nil(t, b.Next())
			require.Equal(t, 2, src.seeks)
			b.Finish()
			src.requireClosed(1)
		})
	}
}

// A file that was closed behind our back is found out while there still is an
// answer to return.
func TestClosedFileIsNotSentAgain(t *testing.T) {
	f := openFile(t, text(100), 0)
	b, a := New(f, -1, 1000, nil)
	requireReads(t, text(100), a)
	f.Close()
	require.Nil(t, b.Next())
	require.False(t, b.Replayable())
}

// A Close must not meet the Seek of a source that may not expect that.
func TestFinishDuringASeek(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		src := newPicky(t, text(1000))
		b, a := New(src, -1, 100, nil)
		src.back = func(offset int64) (int64, error) {
			b.Finish()
			synctest.Wait()
			src.requireClosed(0)
			return offset, nil
		}
		requireReads(t, text(1000), a)
		a.Close()
		require.Nil(t, b.Next())
		synctest.Wait()
		src.requireClosed(1)
	})
}

// The Read that finds out that the body is too long may also be its last one.
func TestLongSeekerThatEndsAtOnce(t *testing.T) {
	src := newPicky(t, text(150))
	src.Reader = iotest.DataErrReader(src.r)
	b, a := New(src, -1, 100, nil)
	p := make([]byte, 200)
	n, err := a.Read(p)
	require.Equal(t, 150, n)
	require.Equal(t, io.EOF, err)
	a.Close()
	src.requireClosed(0)
	requireReads(t, text(150), b.Next())
	b.Abort()
	src.requireClosed(1)
}

func TestPanicOfASeek(t *testing.T) {
	src := newPicky(t, text(1000))
	b, a := New(src, -1, 100, nil)
	requireReads(t, text(1000), a)
	src.back = func(int64) (int64, error) { panic("seek") }
	require.PanicsWithValue(t, "seek", func() { b.Next() })
	_, err := a.Read(make([]byte, 1))
	require.Equal(t, io.EOF, err)
	b.Abort()
	src.requireClosed(1)
}

// A device says that it can seek.
func TestDeviceIsNotTrusted(t *testing.T) {
	f, err := os.Open(os.DevNull)
	require.NoError(t, err)
	defer f.Close()
	_, _, trusted := seeker(f)
	require.False(t, trusted)
}

func inMemory() map[string]io.ReadCloser {
	return map[string]io.ReadCloser{
		"nil":     nil,
		"NoBody":  http.NoBody,
		"bytes":   io.NopCloser(bytes.NewReader([]byte("abc"))),
		"buffer":  io.NopCloser(bytes.NewBufferString("abc")),
		"strings": io.NopCloser(strings.NewReader("abc")),
	}
}

func notInMemory(t *testing.T) map[string]io.ReadCloser {
	return map[string]io.ReadCloser{
		"source":         newSource(t, strings.NewReader("abc")),
		"hidden":         io.NopCloser(failing{io.ErrUnexpectedEOF}),
		"hidden nothing": io.NopCloser(nil),
		"file":           openFile(t, []byte("abc"), 0),
		"typed nil":      io.NopCloser((*bytes.Buffer)(nil)),
		"embedded":       struct{ io.ReadCloser }{io.NopCloser(strings.NewReader("abc"))},
	}
}

func TestInMemory(t *testing.T) {
	for name, body := range inMemory() {
		assert.True(t, InMemory(body), name)
		assert.Zero(t, testing.AllocsPerRun(100, func() { InMemory(body) }), name)
		assert.True(t, Watch(body) == body, name)
	}
	for name, body := range notInMemory(t) {
		assert.False(t, InMemory(body), name)
		assert.Zero(t, testing.AllocsPerRun(100, func() { InMemory(body) }), name)
		assert.False(t, Watch(body) == body, name)
	}
}

func TestWatchTellsErrors(t *testing.T) {
	broken := errors.New("broken")
	src := &source{t: t, Reader: io.MultiReader(strings.NewReader("abc"), failing{broken}), closeErr: io.ErrClosedPipe}
	body := Watch(src)
	got, err := io.ReadAll(body)
	require.Equal(t, "abc", string(got))
	require.Equal(t, &ReadError{broken}, err)
	require.Equal(t, io.ErrClosedPipe, body.Close())
	src.requireClosed(1)

	body = Watch(newSource(t, strings.NewReader("abc")))
	requireReads(t, []byte("abc"), body)
	require.True(t, Watch(body) == body, "watched already")
	_, a := New(newSource(t, failing{broken}), -1, 1, nil)
	require.Same(t, a, Watch(a))
}

// net/http and others compare bodies, also ones that cannot be compared.
func TestWatchedBodiesCanBeCompared(t *testing.T) {
	type odd struct {
		io.ReadCloser
		_ []byte
	}
	body := Watch(odd{ReadCloser: newSource(t, strings.NewReader("abc"))})
	require.NotPanics(t, func() { require.True(t, body == Watch(body)) })
}

func TestCause(t *testing.T) {
	broken := errors.New("broken")
	read := &ReadError{broken}
	for _, err := range []error{read, fmt.Errorf("net/http: %w", read), &url.Error{Op: "Post", Err: read}, errors.Join(io.EOF, read)} {
		require.True(t, Cause(err) == broken, "%v", err)
	}
	for _, err := range []error{nil, broken, io.EOF, fmt.Errorf("wrapped: %w", broken)} {
		require.NoError(t, Cause(err))
	}
}
