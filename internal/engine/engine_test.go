package engine

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptrace"
	"runtime"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// A recorder is steps that take down what is asked of them.
type recorder struct {
	log       []string
	wait      time.Duration
	prepare   func(n int) error // nil: no error
	attempts  int               // made
	wanted    int               // Decide says yes until so many were made
	onAttempt func()
}

func (r *recorder) Wait() time.Duration {
	r.log = append(r.log, "wait")
	return r.wait
}

func (r *recorder) Prepare() error {
	r.log = append(r.log, "prepare")
	if r.prepare != nil {
		return r.prepare(r.attempts + 1)
	}
	return nil
}

func (r *recorder) Attempt() {
	r.log = append(r.log, "attempt")
	r.attempts++
	if r.onAttempt != nil {
		r.onAttempt()
	}
}

func (r *recorder) Decide() bool {
	r.log = append(r.log, "decide")
	return r.attempts < r.wanted
}

var round = []string{"wait", "prepare", "attempt", "decide"}

func rounds(n int) (all []string) {
	for range n {
		all = append(all, round...)
	}
	return all
}

func TestRounds(t *testing.T) {
	for _, test := range []struct{ retries, wanted, made int }{
		{0, 5, 0}, {1, 0, 1}, {1, 1, 1}, {5, 1, 1}, {5, 3, 3}, {5, 5, 5},
		{1, 9, 1}, {3, 9, 3}, {20, 99, 20}, // the bound
	} {
		t.Run(fmt.Sprintf("%+v", test), func(t *testing.T) {
			r := &recorder{wanted: test.wanted}
			require.NoError(t, Run(context.Background(), test.retries, r))
			require.Equal(t, rounds(test.made), r.log)
		})
	}
}

// The steps decide how long a wait is, down to none and below.
func TestWaits(t *testing.T) {
	for _, wait := range []time.Duration{-time.Hour, 0, 1, time.Second, 24 * time.Hour} {
		synctest.Test(t, func(t *testing.T) {
			start := time.Now()
			r := &recorder{wanted: 3, wait: wait}
			require.NoError(t, Run(context.Background(), 10, r))
			require.Equal(t, max(0, 3*wait), time.Since(start))
			require.Equal(t, rounds(3), r.log)
		})
	}
}

func TestPrepareEndsIt(t *testing.T) {
	cause := errors.New("the body is gone")
	for at := 1; at <= 3; at++ {
		r := &recorder{wanted: 9, prepare: func(n int) error {
			if n == at {
				return cause
			}
			return nil
		}}
		require.Equal(t, cause, Run(context.Background(), 9, r), "as it is")
		require.Equal(t, append(rounds(at-1), "wait", "prepare"), r.log)
	}
}

func TestContextEndsInTheWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		start := time.Now()
		ctx, cancel := context.WithTimeout(context.Background(), 25*time.Second)
		defer cancel()
		r := &recorder{wanted: 9, wait: 10 * time.Second}
		require.Equal(t, context.DeadlineExceeded, Run(ctx, 9, r), "as it is")
		require.Equal(t, 25*time.Second, time.Since(start))
		require.Equal(t, append(rounds(2), "wait"), r.log)
	})
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(context.Background())
		time.AfterFunc(time.Second, cancel)
		require.Equal(t, context.Canceled, Run(ctx, 9, &recorder{wanted: 9, wait: time.Minute}))
	})
	synctest.Test(t, func(t *testing.T) { // before Run
		ctx, cancel := context.WithCancel(context.Background())
		cancel()
		r := &recorder{wanted: 9, wait: time.Minute}
		require.Equal(t, context.Canceled, Run(ctx, 9, r))
		require.Equal(t, []string{"wait"}, r.log)
	})
}

// A context that ends during an attempt is the steps' business: they have the
// result and are asked what to do.
func TestContextEndsInAnAttempt(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	r := &recorder{wanted: 1, onAttempt: cancel}
	require.NoError(t, Run(ctx, 9, r))
	require.Equal(t, rounds(1), r.log)
}

// What steps do to unwind a goroutine goes through.
func TestPanicsGoThrough(t *testing.T) {
	r := &recorder{wanted: 9, onAttempt: func() { panic("base") }}
	require.PanicsWithValue(t, "base", func() { _ = Run(context.Background(), 9, r) })
	require.NoError(t, Run(context.Background(), 1, &recorder{}), "nothing shared is left in pieces")
}

// A bubble ends only when all of its goroutines have, so a timer or a goroutine
// that stays behind fails the test.
func TestNoGoroutineIsLeft(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithTimeout(context.Background(), time.Hour)
		defer cancel()
		require.NoError(t, Run(ctx, 3, &recorder{wanted: 9, wait: time.Second}))
		require.Error(t, Run(ctx, 3, &recorder{wanted: 9, wait: 2 * time.Hour}))
	})
}

// Steps run on the goroutine that called Run: Goexit ends that one.
func TestStepsRunOnTheCaller(t *testing.T) {
	returned, done := false, make(chan struct{})
	go func() {
		defer close(done)
		_ = Run(context.Background(), 3, &recorder{wanted: 9, onAttempt: runtime.Goexit})
		returned = true
	}()
	<-done
	require.False(t, returned)
}

// The stand-ins are shared; nobody may change them, and nobody may see them in
// a trace of the real request.
func TestRunsAreIndependent(t *testing.T) {
	ctx := httptrace.WithClientTrace(context.Background(), &httptrace.ClientTrace{
		GetConn: func(string) { t.Error("the stand-in goes nowhere") },
	})
	var all sync.WaitGroup
	for i := range 32 {
		all.Go(func() {
			for range 50 {
				r := &recorder{wanted: i % 4}
				assert.NoError(t, Run(ctx, 4, r))
				assert.Equal(t, max(1, i%4), r.attempts)
			}
		})
	}
	all.Wait()
	assert.Empty(t, standIn.Header)
	assert.Equal(t, http.NoBody, standInResponse.Body)
	assert.Nil(t, standInResponse.Request)
}

// quiet is steps that allocate nothing.
type quiet struct{}

func (quiet) Wait() time.Duration { return 0 }
func (quiet) Prepare() error      { return nil }
func (quiet) Attempt()            {}
func (quiet) Decide() bool        { return false }

func TestAllocations(t *testing.T) {
	n := testing.AllocsPerRun(200, func() { _ = Run(context.Background(), 1, quiet{}) })
	t.Logf("%v allocations for one retry", n)
	require.LessOrEqual(t, n, 18.0)
}

func BenchmarkRun(b *testing.B) {
	b.ReportAllocs()
	for b.Loop() {
		_ = Run(context.Background(), 1, quiet{})
	}
}
