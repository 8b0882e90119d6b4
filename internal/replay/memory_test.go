package replay

import (
	"bytes"
	"io"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"testing/iotest"
	"testing/synctest"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func TestMemoryIsCounted(t *testing.T) {
	memory := &Memory{Limit: 100}
	b1, a1 := New(newSource(t, bytes.NewReader(text(60))), 60, 1000, memory)
	requireReads(t, text(60), a1)
	require.EqualValues(t, 60, memory.Used())
	b2, a2 := New(newSource(t, bytes.NewReader(text(40))), 40, 1000, memory)
	requireReads(t, text(40), a2)
	require.EqualValues(t, 100, memory.Used())
	a1.Close()
	require.EqualValues(t, 100, memory.Used(), "an attempt may still come")
	requireReads(t, text(60), b1.Next())
	b1.Finish()
	require.EqualValues(t, 40, memory.Used())
	b2.Abort()
	require.Zero(t, memory.Used())
}

// A body for which there is no room streams through all the same.
func TestNoRoomInMemory(t *testing.T) {
	memory := &Memory{Limit: 100}
	want := text(150)
	src := newSource(t, iotest.OneByteReader(bytes.NewReader(want)))
	b, a := New(src, 150, 1000, memory)
	requireReadsFull(t, want[:100], a)
	require.EqualValues(t, 100, memory.Used())
	require.True(t, b.Replayable())
	requireReads(t, want[100:], a)
	require.False(t, b.Replayable())
	require.Nil(t, b.Next())
	require.Zero(t, memory.Used(), "nobody needs it any more")
	a.Close()
	src.requireClosed(1)
	b.Finish()
	require.Zero(t, memory.Used())
}

// A body that found no room leaves what others have.
func TestNoRoomTakesNothingFromOthers(t *testing.T) {
	memory := &Memory{Limit: 100}
	b1, a1 := New(newSource(t, bytes.NewReader(text(60))), -1, 1000, memory)
	requireReads(t, text(60), a1)
	b2, a2 := New(newSource(t, bytes.NewReader(text(60))), -1, 1000, memory)
	requireReads(t, text(60), a2)
	require.EqualValues(t, 60, memory.Used())
	require.Nil(t, b2.Next())
	b2.Abort()
	requireReads(t, text(60), b1.Next())
	b1.Abort()
	require.Zero(t, memory.Used())
}

// What can seek is rewound when there is no room for it.
func TestNoRoomForASeeker(t *testing.T) {
	memory := &Memory{Limit: 100}
	want, r := text(150), bytes.NewReader(text(150))
	src := newSource(t, r)
	b, a := New(seekable{src, r}, -1, 1000, memory)
	requireReads(t, want, a)
	require.Zero(t, memory.Used())
	requireReads(t, want, b.Next())
	b.Abort()
	src.requireClosed(1)
}

func TestNoMemoryIsNeededForFiles(t *testing.T) {
	memory := &Memory{}
	b, a := New(openFile(t, text(150), 0), -1, 1000, memory)
	requireReads(t, text(150), a)
	requireReads(t, text(150), b.Next())
	require.Zero(t, memory.Used())
	b.Abort()
}

func TestMemoryIsGivenBack(t *testing.T) {
	for name, test := range map[string]struct {
		err error // of the source
		end func(b *Body, a *Attempt)
	}{
		"close, finish":      {nil, func(b *Body, a *Attempt) { a.Close(); b.Finish() }},
		"finish, close":      {nil, func(b *Body, a *Attempt) { b.Finish(); a.Close() }},
		"abort":              {nil, func(b *Body, a *Attempt) { b.Abort() }},
		"finish, read":       {nil, func(b *Body, a *Attempt) { b.Finish(); io.ReadAll(a) }},
		"finish, read more":  {nil, func(b *Body, a *Attempt) { b.Finish(); a.Read(make([]byte, 1)) }},
		"read, finish":       {nil, func(b *Body, a *Attempt) { io.ReadAll(a); b.Finish() }},
		"read error":         {io.ErrUnexpectedEOF, func(b *Body, a *Attempt) { io.ReadAll(a) }},
		"read error, unread": {io.ErrUnexpectedEOF, func(b *Body, a *Attempt) { io.ReadAll(a); a.Close(); b.Finish(); b.Abort() }},
		"next, finish": {nil, func(b *Body, _ *Attempt) {
			next := b.Next()
			b.Finish()
			next.Close()
		}},
		"read, next, abort": {nil, func(b *Body, a *Attempt) { io.ReadAll(a); b.Next(); b.Abort(); a.Close() }},
	} {
		t.Run(name, func(t *testing.T) {
			memory := &Memory{Limit: 1000}
			var r io.Reader = bytes.NewReader(text(500))
			if test.err != nil {
				r = io.MultiReader(r, failing{test.err})
			}
			b, a := New(newSource(t, r), -1, 600, memory)
			_, err := a.Read(make([]byte, 3))
			require.NoError(t, err)
			require.EqualValues(t, 3, memory.Used())
			test.end(b, a)
			require.Zero(t, memory.Used())
			a.Close()
			b.Finish()
			b.Abort()
			require.Zero(t, memory.Used())
		})
	}
}

// A read that is under way while its attempt gives way belongs to the next one,
// whether there is room for it or not. One that comes when all is over belongs
// to nobody.
func TestMemoryOfAReadUnderWay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		memory := &Memory{Limit: 2}
		r, w := io.Pipe()
		b, a := New(newSource(t, r), -1, 100, memory)
		hung(a)
		next := b.Next()
		w.Write([]byte("abc"))
		synctest.Wait()
		require.EqualValues(t, 3, memory.Used())
		requireReadsFull(t, []byte("abc"), next)
		b.Abort()
		require.Zero(t, memory.Used())
	})
	synctest.Test(t, func(t *testing.T) {
		memory := &Memory{Limit: 100}
		r, w := io.Pipe()
		b, a := New(io.NopCloser(r), -1, 100, memory)
		hung(a)
		b.Abort()
		w.Write([]byte("abc"))
		synctest.Wait()
		require.Zero(t, memory.Used())
		require.Nil(t, b.kept)
	})
}

// Many bodies share a memory that is too small for them. Each is read, closed,
// finished and sent again by several goroutines at a time.
func TestMemoryUnderConcurrency(t *testing.T) {
	const bodies, size = 8, 5000
	memory := &Memory{Limit: 3 * size}
	var most atomic.Int64
	var all sync.WaitGroup
	for i := range uint64(bodies) {
		all.Go(func() {
			rnd := rand.New(rand.NewPCG(i, 2))
			for range 100 {
				r := bytes.NewReader(text(size))
				src := &source{t: t, Reader: iotest.HalfReader(r), hasty: true}
				var body io.ReadCloser = src
				if rnd.IntN(3) == 0 {
					body = seekable{src, r}
				}
				b, a := New(body, -1, int64(rnd.IntN(2*size)), memory)
				mistreat(rnd, b, a, func() { most.Store(max(most.Load(), memory.Used())) })
				assert.Eventually(t, func() bool { return src.closes.Load() == 1 }, 1e10, 1e5)
			}
		})
	}
	all.Wait()
	require.Positive(t, most.Load())
	require.LessOrEqual(t, most.Load(), memory.Limit+bodies*fetchSize)
	require.Zero(t, memory.Used())
}

// mistreat sends b in a few attempts, whose bases read and close at any time.
func mistreat(rnd *rand.Rand, b *Body, a *Attempt, look func()) {
	var bases sync.WaitGroup
	for range rnd.IntN(4) + 1 {
		stop, closes := rnd.IntN(6000), rnd.IntN(2) == 0
		attempt := a
		bases.Go(func() {
			_, _ = io.CopyN(io.Discard, attempt, int64(stop))
			if closes {
				attempt.Close()
			}
			look()
		})
		if rnd.IntN(2) == 0 {
			bases.Wait()
		}
		next := b.Next()
		if next == nil {
			break
		}
		a = next
	}
	bases.Go(b.Finish)
	bases.Go(b.Abort)
	bases.Wait()
}
