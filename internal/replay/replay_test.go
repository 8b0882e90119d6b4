package replay

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/iotest"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// A source is a request body that knows how it was treated.
type source struct {
	io.Reader
	t        testing.TB
	closeErr error
	closes   atomic.Int32
	reading  atomic.Bool
	hasty    bool // a Read may meet a Close, as http.Request.Body must allow
}

func newSource(t testing.TB, r io.Reader) *source { return &source{t: t, Reader: r} }

func (s *source) Read(p []byte) (int, error) {
	assert.False(s.t, s.reading.Swap(true), "two Reads at a time")
	defer s.reading.Store(false)
	assert.True(s.t, s.hasty || s.closes.Load() == 0, "Read after Close")
	return s.Reader.Read(p)
}

func (s *source) Close() error {
	s.closes.Add(1)
	if c, ok := s.Reader.(io.Closer); ok {
		c.Close()
	}
	return s.closeErr
}

func (s *source) requireClosed(want int32) {
	s.t.Helper()
	require.Equal(s.t, want, s.closes.Load(), "Close calls")
}

// A seekable source is one over something that can seek.
type seekable struct {
	*source
	io.Seeker
}

// A reader that always has the same error.
type failing struct{ err error }

func (f failing) Read([]byte) (int, error) { return 0, f.err }

// An idler gives nothing on every other Read, as a Reader may.
type idler struct {
	r    io.Reader
	idle bool
}

func (i *idler) Read(p []byte) (int, error) {
	if i.idle = !i.idle; i.idle {
		return 0, nil
	}
	return i.r.Read(p)
}

func text(n int) []byte {
	p := make([]byte, n)
	for i := range p {
		p[i] = byte(i*7 + i>>8)
	}
	return p
}

func requireReads(t *testing.T, want []byte, r io.Reader) {
	t.Helper()
	got, err := io.ReadAll(r)
	require.NoError(t, err)
	require.True(t, bytes.Equal(want, got), "got %d bytes, want %d, or others", len(got), len(want))
}

func requireReadsFull(t *testing.T, want []byte, r io.Reader) {
	t.Helper()
	got := make([]byte, len(want))
	_, err := io.ReadFull(r, got)
	require.NoError(t, err)
	require.Equal(t, want, got)
}

func TestAttemptsReadTheSame(t *testing.T) {
	for name, wrap := range map[string]func(io.Reader) io.Reader{
		"plain":         func(r io.Reader) io.Reader { return r },
		"byte by byte":  iotest.OneByteReader,
		"halves":        iotest.HalfReader,
		"data with EOF": iotest.DataErrReader,
		"0, nil":        func(r io.Reader) io.Reader { return &idler{r: r} },
	} {
		for _, size := range []int{0, 1, 511, 5000} {
			t.Run(name, func(t *testing.T) {
				want := text(size)
				src := newSource(t, wrap(bytes.NewReader(want)))
				b, a := New(src, -1, 5000, nil)
				for range 4 {
					requireReads(t, want, a)
					n, err := a.Read(make([]byte, 1))
					require.Zero(t, n)
					require.Equal(t, io.EOF, err)
					require.NoError(t, a.Close())
					a = b.Next()
					require.NotNil(t, a)
				}
				b.Finish()
				require.NoError(t, a.Close())
				src.requireClosed(1)
			})
		}
	}
}

func TestNextContinuesWhereTheLastOneStopped(t *testing.T) {
	want := text(1000)
	src := newSource(t, bytes.NewReader(want))
	b, a := New(src, 1000, 1000, nil)
	for _, n := range []int{0, 300, 100, 0, 999} { // more and fewer bytes than before
		requireReadsFull(t, want[:n], a)
		require.NoError(t, a.Close())
		a = b.Next()
		require.NotNil(t, a)
	}
	requireReads(t, want, a)
	src.requireClosed(0)
	require.NoError(t, a.Close())
	src.requireClosed(1) // all of it is kept
	a = b.Next()
	requireReads(t, want, a)
}

// A base may send the end of the stream together with the last bytes.
func TestEOFComesWithTheLastBytes(t *testing.T) {
	b, a := New(newSource(t, iotest.DataErrReader(strings.NewReader("abc"))), 3, 3, nil)
	for range 2 {
		n, err := a.Read(make([]byte, 8))
		require.Equal(t, 3, n)
		require.Equal(t, io.EOF, err)
		a = b.Next()
	}
}

func TestEmptyReadsTakeNothing(t *testing.T) {
	src := newSource(t, failing{errors.New("read")})
	b, a := New(src, -1, 10, nil)
	n, err := a.Read(nil)
	require.Zero(t, n)
	require.NoError(t, err)
	require.NotNil(t, b.Next())

	b, a = New(newSource(t, strings.NewReader("abc")), -1, 10, nil)
	requireReadsFull(t, []byte("ab"), a)
	_, err = a.Read(nil)
	require.NoError(t, err)
	requireReads(t, []byte("abc"), b.Next())
}

func TestZeroReadsArePassedOn(t *testing.T) {
	_, a := New(newSource(t, &idler{r: strings.NewReader("abc")}), -1, 10, nil)
	n, err := a.Read(make([]byte, 8))
	require.Zero(t, n)
	require.NoError(t, err)
}

func TestLimit(t *testing.T) {
	for _, size := range []int{99, 100, 101, 64 << 10} {
		want := text(size)
		src := newSource(t, bytes.NewReader(want))
		b, a := New(src, -1, 100, nil)
		require.True(t, b.Replayable())
		requireReads(t, want, a)
		require.NoError(t, a.Close())
		src.requireClosed(1)
		require.Equal(t, size <= 100, b.Replayable())
		if size > 100 {
			require.Nil(t, b.Next())
			continue
		}
		requireReads(t, want, b.Next())
	}
}

func TestRecordingIsDropped(t *testing.T) {
	for name, end := range map[string]func(b *Body, a *Attempt){
		"past the limit": func(_ *Body, a *Attempt) { requireReadsFull(t, text(101), iotest.OneByteReader(a)) },
		"finished":       func(b *Body, a *Attempt) { requireReadsFull(t, text(50), a); b.Finish() },
	} {
		t.Run(name, func(t *testing.T) {
			src := newSource(t, iotest.OneByteReader(bytes.NewReader(text(1000))))
			b, a := New(src, -1, 100, nil)
			end(b, a)
			require.NotNil(t, b.kept)
			rest, err := io.ReadAll(a)
			require.NoError(t, err)
			require.Equal(t, text(1000)[1000-len(rest):], rest)
			require.Nil(t, b.kept)
			a.Close()
			src.requireClosed(1)
		})
	}
}

// What is past the limit is found out by a retry only.
func TestLimitExceededByTheSecondAttempt(t *testing.T) {
	want := text(300)
	src := newSource(t, iotest.OneByteReader(bytes.NewReader(want)))
	b, a := New(src, -1, 200, nil)
	requireReadsFull(t, want[:200], a)
	a.Close()
	a = b.Next()
	requireReads(t, want, a)
	require.Nil(t, b.Next())
	src.requireClosed(0)
	a.Close()
	src.requireClosed(1)
}

func TestLengthAboveTheLimit(t *testing.T) {
	for name, open := range map[string]func(src io.ReadCloser) (*Body, *Attempt){
		"length":     func(src io.ReadCloser) (*Body, *Attempt) { return New(src, 101, 100, nil) },
		"none kept":  func(src io.ReadCloser) (*Body, *Attempt) { return New(src, 3, -1, nil) },
		"and seeker": func(src io.ReadCloser) (*Body, *Attempt) { return New(seekable{src.(*source), nil}, 3, -1, nil) },
	} {
		t.Run(name, func(t *testing.T) {
			src := newSource(t, strings.NewReader("abc"))
			b, a := open(src)
			require.False(t, b.Replayable())
			require.Nil(t, b.Next())
			requireReads(t, []byte("abc"), a)
			require.NoError(t, a.Close())
			src.requireClosed(1)
			require.Nil(t, b.Next())

			_, a = open(newSource(t, failing{errors.New("broken")}))
			_, err := a.Read(make([]byte, 1))
			require.IsType(t, (*ReadError)(nil), err, "the caller's fault all the same")
		})
	}
}

func TestLargeBodyCostsNoMemory(t *testing.T) {
	const size = 64 << 20
	for _, length := range []int64{-1, size} {
		src := newSource(t, io.LimitReader(zeros{}, size))
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		_, a := New(src, length, 64<<10, nil)
		n, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, a, make([]byte, 32<<10))
		runtime.ReadMemStats(&after)
		require.NoError(t, err)
		require.EqualValues(t, size, n)
		require.Less(t, after.TotalAlloc-before.TotalAlloc, uint64(1<<20))
	}
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }

// Nothing is read that the attempt has not asked for, so a pipe streams.
func TestNothingIsReadAhead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var taken atomic.Int64
		r, w := io.Pipe()
		b, a := New(newSource(t, r), -1, 100, nil)
		go func() {
			for range 3 {
				n, err := w.Write([]byte("abc"))
				if err != nil {
					return
				}
				taken.Add(int64(n))
			}
		}()
		synctest.Wait()
		require.Zero(t, taken.Load())
		requireReadsFull(t, []byte("abc"), a)
		synctest.Wait()
		require.EqualValues(t, 3, taken.Load())
		b.Abort()
	})
}

func openFile(t *testing.T, content []byte, offset int64) *os.File {
	t.Helper()
	name := filepath.Join(t.TempDir(), "body")
	require.NoError(t, os.WriteFile(name, content, 0o600))
	f, err := os.Open(name)
	require.NoError(t, err)
	_, err = f.Seek(offset, io.SeekStart)
	require.NoError(t, err)
	return f
}

func TestFileIsRewoundToItsOffset(t *testing.T) {
	want := text(200_000)
	for _, read := range []int{0, 1, 40_000, 199_000, 200_000} {
		f := openFile(t, append([]byte("head"), want...), 4)
		src := newSource(t, f)
		b, a := New(seekable{src, f}, int64(len(want)), 100, nil)
		for range 3 {
			requireReadsFull(t, want[:read], a)
			require.NoError(t, a.Close())
			a = b.Next()
			require.NotNil(t, a)
		}
		requireReads(t, want, a)
		require.Nil(t, b.kept)
		a.Close()
		src.requireClosed(0)
		b.Finish()
		src.requireClosed(1)
		require.Nil(t, b.Next())
	}
}

// The base may go on reading after its RoundTrip has returned.
func TestFileStaysOpenUntilTheLastAttemptIsClosed(t *testing.T) {
	want := text(100_000)
	f := openFile(t, want, 0)
	b, a := New(f, -1, 100, nil)
	requireReads(t, want, a)
	a.Close()
	a = b.Next()
	requireReadsFull(t, want[:10], a)
	b.Finish()
	requireReads(t, want[10:], a)
	require.NoError(t, a.Close())
	_, err := f.Read(make([]byte, 1))
	require.ErrorIs(t, err, os.ErrClosed)
}

func TestFileThatCannotBeRewound(t *testing.T) {
	f := openFile(t, []byte("abc"), 0)
	b, a := New(f, 3, 100, nil)
	requireReads(t, []byte("abc"), a)
	a.Close()
	a = b.Next()
	f.Close() // behind our back
	_, err := a.Read(make([]byte, 1))
	require.IsType(t, (*ReadError)(nil), err)
	require.ErrorIs(t, err, os.ErrClosed)
	require.Nil(t, b.Next())
}

// A pipe of the operating system is an os.File that cannot seek.
func TestFileThatCannotSeekIsRecorded(t *testing.T) {
	r, w, err := os.Pipe()
	require.NoError(t, err)
	_, err = w.WriteString("abc")
	require.NoError(t, err)
	w.Close()
	b, a := New(r, -1, 100, nil)
	requireReads(t, []byte("abc"), a)
	require.NoError(t, a.Close())
	requireReads(t, []byte("abc"), b.Next())
}

func TestSourceIsClosedOnce(t *testing.T) {
	broken := io.MultiReader(strings.NewReader("ab"), failing{errors.New("broken")})
	for name, test := range map[string]struct {
		src io.Reader
		run func(b *Body, a *Attempt)
	}{
		"never read":       {nil, func(b *Body, a *Attempt) { a.Close(); b.Finish() }},
		"finish first":     {nil, func(b *Body, a *Attempt) { b.Finish(); a.Close() }},
		"read then finish": {nil, func(b *Body, a *Attempt) { io.ReadAll(a); b.Finish(); a.Close() }},
		"read on after finish": {nil, func(b *Body, a *Attempt) {
			a.Read(make([]byte, 1))
			b.Finish()
			io.ReadAll(a)
			a.Close()
		}},
		"abort":             {nil, func(b *Body, a *Attempt) { b.Abort() }},
		"abort, then close": {nil, func(b *Body, a *Attempt) { io.ReadAll(a); b.Abort(); a.Close(); b.Finish() }},
		"close, then abort": {nil, func(b *Body, a *Attempt) { a.Close(); b.Abort(); a.Close() }},
		"abort in between":  {nil, func(b *Body, a *Attempt) { a.Close(); b.Next(); b.Abort() }},
		"read error":        {broken, func(b *Body, a *Attempt) { io.ReadAll(a); a.Close(); b.Finish() }},
		"read error last":   {broken, func(b *Body, a *Attempt) { b.Finish(); io.ReadAll(a); a.Close() }},
		"two attempts": {nil, func(b *Body, a *Attempt) {
			a.Read(make([]byte, 1))
			a.Close()
			a = b.Next()
			io.ReadAll(a)
			a.Close()
			b.Finish()
		}},
		"the first one is closed last": {nil, func(b *Body, a *Attempt) {
			a2 := b.Next()
			a2.Close()
			b.Finish()
			a.Close()
		}},
		"lost recording": {bytes.NewReader(text(1000)), func(b *Body, a *Attempt) { io.ReadAll(a); a.Close(); b.Finish() }},
		"lost, unread rest": {bytes.NewReader(text(100_000)), func(b *Body, a *Attempt) {
			a.Read(make([]byte, 200))
			b.Finish()
			a.Close()
		}},
	} {
		for _, kind := range []string{"recorded", "seeker"} {
			t.Run(name+"/"+kind, func(t *testing.T) {
				r := test.src
				if r == nil {
					r = strings.NewReader("abcdef")
				}
				src := newSource(t, r)
				s, ok := r.(io.Seeker)
				if kind == "seeker" && !ok {
					t.Skip("does not seek")
				}
				var b *Body
				var a *Attempt
				if kind == "seeker" {
					b, a = New(seekable{src, s}, -1, 100, nil)
				} else {
					b, a = New(src, -1, 100, nil)
				}
				test.run(b, a)
				src.requireClosed(1)
				a.Close()
				b.Finish()
				b.Abort()
				src.requireClosed(1)
				_, err := a.Read(make([]byte, 1))
				require.Equal(t, errOver, err)
			})
		}
	}
}

// As long as an attempt has not been closed, its base may still read.
func TestSourceIsNotClosedBeforeTheAttempt(t *testing.T) {
	src := newSource(t, strings.NewReader("abc"))
	b, a := New(src, -1, 100, nil)
	b.Finish()
	requireReads(t, []byte("abc"), a)
	src.requireClosed(0)
	a.Close()
	src.requireClosed(1)
}

func TestSourceIsClosedOnceByManyGoroutines(t *testing.T) {
	for range 100 {
		synctest.Test(t, func(t *testing.T) {
			r, w := io.Pipe()
			src := &source{t: t, Reader: r, hasty: true}
			b, a := New(src, -1, 100, nil)
			a2 := b.Next()
			for range 4 {
				go a.Close()
				go a2.Close()
				go b.Finish()
			}
			go io.ReadAll(a2)
			go func() { w.Write([]byte("abc")); w.Close() }()
			go b.Abort()
			synctest.Wait()
			src.requireClosed(1)
		})
	}
}

func TestCloseReturnsTheSourcesError(t *testing.T) {
	broken := errors.New("close")
	t.Run("all read", func(t *testing.T) {
		src := &source{t: t, Reader: strings.NewReader("abc"), closeErr: broken}
		b, a := New(src, -1, 100, nil)
		requireReads(t, []byte("abc"), a)
		require.Equal(t, broken, a.Close())
		require.NoError(t, a.Close())
		require.NoError(t, b.Next().Close())
	})
	t.Run("finished", func(t *testing.T) {
		src := &source{t: t, Reader: strings.NewReader("abc"), closeErr: broken}
		b, a := New(src, -1, 100, nil)
		b.Finish()
		requireReads(t, []byte("abc"), a)
		require.Equal(t, broken, a.Close())
	})
	t.Run("lost", func(t *testing.T) {
		src := &source{t: t, Reader: strings.NewReader("abc"), closeErr: broken}
		_, a := New(src, -1, 1, nil)
		requireReads(t, []byte("abc"), a)
		require.Equal(t, broken, a.Close())
	})
}

type result struct {
	n   int
	err error
}

// hung starts a Read of a that hangs, and returns where its result will be.
func hung(a *Attempt) <-chan result {
	c := make(chan result, 1)
	go func() {
		n, err := a.Read(make([]byte, 100))
		c <- result{n, err}
	}()
	synctest.Wait()
	return c
}

func TestCloseBreaksOffARead(t *testing.T) {
	for name, limit := range map[string]int64{"recorded": 100, "not replayable": -1} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r, _ := io.Pipe()
				src := newSource(t, r)
				b, a := New(src, -1, limit, nil)
				read := hung(a)
				a.Close()
				require.Error(t, (<-read).err)
				b.Finish()
				synctest.Wait()
				src.requireClosed(1)
			})
			synctest.Test(t, func(t *testing.T) {
				r, _ := io.Pipe()
				src := newSource(t, r)
				b, a := New(src, -1, limit, nil)
				read := hung(a)
				b.Finish() // the base reads on after its RoundTrip
				synctest.Wait()
				src.requireClosed(0)
				require.Empty(t, read)
				a.Close()
				require.Error(t, (<-read).err)
				synctest.Wait()
				src.requireClosed(1)
			})
			synctest.Test(t, func(t *testing.T) {
				r, _ := io.Pipe()
				src := newSource(t, r)
				b, a := New(src, -1, limit, nil)
				read := hung(a)
				b.Abort()
				require.Error(t, (<-read).err)
				synctest.Wait()
				src.requireClosed(1)
			})
		})
	}
}

// What an attempt was in the middle of reading when it was closed is read by
// the next one, however long the recording gets by that.
func TestNextGetsWhatABrokenOffReadBrings(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, w := io.Pipe()
		src := newSource(t, r)
		b, a := New(src, -1, 5, nil)
		go w.Write([]byte("abc"))
		requireReadsFull(t, []byte("abc"), a)
		first := hung(a)
		a.Close()
		require.Equal(t, result{0, errOver}, <-first)

		a = b.Next()
		requireReadsFull(t, []byte("abc"), a)
		second := hung(a) // waits for the same bytes
		go w.Write([]byte("defgh"))
		require.Equal(t, result{5, nil}, <-second)
		a.Close()

		a = b.Next()
		w.Close()
		requireReads(t, []byte("abcdefgh"), a)
		a.Close()
		require.True(t, b.Replayable(), "all of it is kept")
		b.Finish()
		src.requireClosed(1)
	})
}

func TestNextBreaksOffAReadOfTheAttemptBefore(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, w := io.Pipe()
		b, a := New(newSource(t, r), -1, 3, nil)
		read := hung(a)
		a2 := b.Next()
		require.Equal(t, result{0, errOver}, <-read)
		go func() { w.Write([]byte("abcdef")); w.Close() }()
		synctest.Wait()
		require.True(t, b.Replayable(), "promised to a2")
		requireReads(t, []byte("abcdef"), a2)
		b.Abort()
	})
}

// A server's request body, for one, is not closed before its Read returns. A
// response that has come must not wait for that.
func TestFinishDoesNotWaitForARead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, w := io.Pipe()
		src := &locked{ReadCloser: r}
		b, a := New(src, -1, 100, nil)
		read := hung(a)
		a.Close()
		require.Equal(t, result{0, errOver}, <-read)
		b.Finish()
		w.Write([]byte("abc"))
		synctest.Wait()
		require.True(t, src.closed)
	})
}

type locked struct {
	sync.Mutex
	io.ReadCloser
	closed bool
}

func (l *locked) Read(p []byte) (int, error) {
	l.Lock()
	defer l.Unlock()
	return l.ReadCloser.Read(p)
}

func (l *locked) Close() error {
	l.Lock()
	defer l.Unlock()
	l.closed = true
	return nil
}

// The base of an earlier attempt that goes on reading in another goroutine gets
// no more of the body, and the next attempt gets all of it.
func TestLateReaderDoesNoDamage(t *testing.T) {
	want := text(20_000)
	for range 20 {
		src := newSource(t, iotest.HalfReader(bytes.NewReader(want)))
		b, a := New(src, -1, int64(len(want)), nil)
		testLateReader(t, want, b, a)
		src.requireClosed(1)
		b, a = New(io.NopCloser(bytes.NewReader(want)), -1, 0, nil)
		testLateReader(t, want, b, a)
	}
}

func testLateReader(t *testing.T, want []byte, b *Body, a *Attempt) {
	var late sync.WaitGroup
	for round := range 3 {
		begun := make(chan struct{})
		late.Go(func() { readLate(t, a, want, min(round, 1)*1000, begun) })
		<-begun
		next := b.Next()
		require.NotNil(t, next)
		requireReadsFull(t, want[:1000], next)
		late.Wait()
		a = next
	}
	requireReads(t, want, b.Next())
	b.Abort()
}

// readLate reads a from the offset at until it ends, and closes begun amid that.
func readLate(t *testing.T, a *Attempt, want []byte, at int, begun chan struct{}) {
	var once sync.Once
	defer once.Do(func() { close(begun) })
	p := make([]byte, 100)
	for i := 0; ; i++ {
		n, err := a.Read(p)
		assert.Equal(t, want[at:at+n], p[:n])
		clear(p) // the buffer is the reader's
		at += n
		if i == 3 {
			once.Do(func() { close(begun) })
		}
		if err != nil {
			assert.Contains(t, []error{errOver, io.EOF}, err)
			return
		}
	}
}

func TestWait(t *testing.T) {
	const limit = 5 * time.Second
	for name, test := range map[string]struct {
		before func(a *Attempt) // what the attempt before does
		done   time.Duration
		want   time.Duration
	}{
		"closed":       {func(a *Attempt) { a.Read(make([]byte, 1)); a.Close() }, 0, 0},
		"read to EOF":  {func(a *Attempt) { io.ReadAll(a) }, 0, 0},
		"never began":  {func(a *Attempt) {}, 0, 0},
		"gives up":     {func(a *Attempt) { a.Read(make([]byte, 1)) }, 0, limit},
		"done":         {func(a *Attempt) { a.Read(make([]byte, 1)) }, time.Second, time.Second},
		"closes later": {func(a *Attempt) { a.Read(make([]byte, 1)); time.AfterFunc(2*time.Second, func() { a.Close() }) }, 0, 2 * time.Second},
	} {
		for kind, open := range map[string]func() io.ReadCloser{
			"recorded": func() io.ReadCloser { return newSource(t, strings.NewReader("abc")) },
			"trusted":  func() io.ReadCloser { return io.NopCloser(strings.NewReader("abc")) },
		} {
			t.Run(name+"/"+kind, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					b, a := New(open(), -1, 100, nil)
					test.before(a)
					ctx := t.Context()
					if test.done > 0 {
						var cancel context.CancelFunc
						ctx, cancel = context.WithTimeout(ctx, test.done)
						defer cancel()
					}
					next := b.Next()
					start := time.Now()
					next.Wait(ctx.Done(), limit)
					require.Equal(t, test.want, time.Since(start))
					requireReads(t, []byte("abc"), next)
					b.Abort()
				})
			})
		}
	}
}

func TestReadError(t *testing.T) {
	broken := errors.New("broken")
	src := newSource(t, io.MultiReader(strings.NewReader("abc"), failing{broken}))
	b, a := New(src, -1, 100, nil)
	got, err := io.ReadAll(a)
	require.Equal(t, "abc", string(got))
	require.IsType(t, (*ReadError)(nil), err)
	require.ErrorIs(t, err, broken)
	require.EqualError(t, err, "broken")
	_, err = a.Read(make([]byte, 1))
	require.ErrorIs(t, err, broken, "again")
	require.False(t, b.Replayable())
	require.Nil(t, b.Next())
	a.Close()
	src.requireClosed(1)
}

// The error comes while a next attempt has been promised already.
func TestReadErrorAfterNext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		broken := errors.New("broken")
		r, w := io.Pipe()
		b, a := New(newSource(t, r), -1, 100, nil)
		go w.Write([]byte("abc"))
		requireReadsFull(t, []byte("abc"), a)
		hung(a)
		a = b.Next()
		w.CloseWithError(broken)
		got, err := io.ReadAll(a)
		require.Equal(t, "abc", string(got))
		require.ErrorIs(t, err, broken)
		require.Nil(t, b.Next())
		b.Abort()
	})
}

func TestReadErrorIsNotWrappedTwice(t *testing.T) {
	inner := &ReadError{errors.New("broken")}
	_, a := New(newSource(t, failing{inner}), -1, 100, nil)
	_, err := a.Read(make([]byte, 1))
	require.Same(t, inner, err)
}

func TestReadErrorTimeout(t *testing.T) {
	require.True(t, (&ReadError{os.ErrDeadlineExceeded}).Timeout())
	require.False(t, (&ReadError{io.ErrUnexpectedEOF}).Timeout())
}

type readFunc func([]byte) (int, error)

func (f readFunc) Read(p []byte) (int, error) { return f(p) }

// A panic of the caller's body must come out where it would without us.
func TestPanicOfTheSource(t *testing.T) {
	for _, limit := range []int64{100, -1} {
		src := newSource(t, readFunc(func([]byte) (int, error) { panic("read") }))
		b, a := New(src, -1, limit, nil)
		require.PanicsWithValue(t, "read", func() { a.Read(make([]byte, 1)) })
		require.Nil(t, b.Next())
		b.Abort()
		src.requireClosed(1)
	}
}

func TestGoexitOfTheSource(t *testing.T) {
	src := newSource(t, readFunc(func([]byte) (int, error) { runtime.Goexit(); return 0, nil }))
	b, a := New(src, -1, 100, nil)
	_, err := a.Read(make([]byte, 1))
	require.ErrorIs(t, err, errPanicked)
	b.Abort()
	src.requireClosed(1)
}

// net/http's HTTP/2 closes the body of a stream that was reset, and waits for
// the Read under way to return.
func TestHTTP2StreamIsResetWhileTheBodyHangs(t *testing.T) {
	srv := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		io.ReadFull(r.Body, make([]byte, 3))
		panic(http.ErrAbortHandler)
	}))
	srv.EnableHTTP2 = true
	srv.StartTLS()
	defer srv.Close()

	r, w := io.Pipe()
	go w.Write([]byte("abc")) // and no more
	src := newSource(t, r)
	b, a := New(src, -1, 100, nil)
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, srv.URL, a)
	require.NoError(t, err)
	_, err = srv.Client().Transport.RoundTrip(req)
	require.ErrorContains(t, err, "stream error")
	require.NotNil(t, b.Next())
	b.Abort()
	require.Eventually(t, func() bool { return src.closes.Load() == 1 }, 20*time.Second, time.Millisecond)
}

// Kinds of sources.
const (
	plain   = iota
	seeks   // says that it can seek
	trusted // is known to
)

// replayRandomly sends a body of size bytes through attempts that end at random
// places, and compares what they get. The decisions follow from seed.
func replayRandomly(t *testing.T, seed uint64, size, limit int64, kind int) {
	rnd := rand.New(rand.NewPCG(seed, 0))
	want := text(int(size))
	file := bytes.NewReader(want)
	src := newSource(t, chunks(rnd, file))
	var body io.ReadCloser = src
	switch kind {
	case seeks:
		body = seekable{src, file}
	case trusted:
		body = io.NopCloser(file)
	case plain:
		if rnd.IntN(2) == 0 {
			src.Reader = iotest.DataErrReader(src.Reader)
		}
	}
	memory := &Memory{Limit: size}
	b, a := New(body, -1, limit, memory)
	reached := 0 // by any attempt
	for range 20 {
		n, ended := readRandomly(t, rnd, a, want)
		reached = max(reached, n)
		closed := rnd.IntN(2) == 0
		if closed {
			require.NoError(t, a.Close())
		}
		recorded := reached <= int(limit)
		can := recorded || kind == trusted || kind == seeks && (closed || ended || !a.started)
		require.Equal(t, can, b.Replayable(), "reached %d", reached)
		next := b.Next()
		require.Equal(t, can, next != nil, "reached %d", reached)
		if next == nil && kind == seeks {
			require.NoError(t, a.Close())
			next = b.Next()
			require.NotNil(t, next, "it has let go now")
		}
		if next == nil {
			break
		}
		a = next
	}
	b.Finish()
	b.Abort()
	require.Zero(t, memory.Used())
	if kind != trusted {
		src.requireClosed(1)
	}
}

// readRandomly reads a up to some place, and returns how far it got and whether
// that was the end.
func readRandomly(t *testing.T, rnd *rand.Rand, a *Attempt, want []byte) (at int, ended bool) {
	stop := rnd.IntN(len(want) + len(want)/4 + 2)
	for at < stop {
		p := make([]byte, rnd.IntN(2000))
		n, err := a.Read(p)
		require.True(t, bytes.Equal(want[at:at+n], p[:n]), "bytes %d to %d", at, at+n)
		at += n
		if err != nil {
			require.Equal(t, io.EOF, err)
			require.Equal(t, len(want), at)
			return at, true
		}
	}
	return at, false
}

// chunks returns what r has in pieces of random sizes, some of them empty.
func chunks(rnd *rand.Rand, r io.Reader) io.Reader {
	rnd = rand.New(rand.NewPCG(rnd.Uint64(), 1))
	return readFunc(func(p []byte) (int, error) { return r.Read(p[:rnd.IntN(len(p)+1)]) })
}

func TestRandomAttempts(t *testing.T) {
	for seed := range uint64(600) {
		size := []int64{0, 1, 100, 10_000}[seed%4]
		limit := []int64{size, size - 1, size / 2, 3, 0}[seed%5]
		replayRandomly(t, seed, size, max(0, limit), int(seed%3))
	}
}

func FuzzReplay(f *testing.F) {
	f.Add(uint64(1), uint16(1000), uint16(1000), byte(plain))
	f.Add(uint64(2), uint16(1000), uint16(999), byte(plain))
	f.Add(uint64(3), uint16(1000), uint16(0), byte(seeks))
	f.Add(uint64(4), uint16(1000), uint16(0), byte(trusted))
	f.Fuzz(func(t *testing.T, seed uint64, size, limit uint16, kind byte) {
		replayRandomly(t, seed, int64(size), int64(limit), int(kind%3))
	})
}
