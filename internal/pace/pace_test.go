package pace

import (
	"fmt"
	"math"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
)

func seconds(seconds ...int) (d []time.Duration) {
	for _, s := range seconds {
		d = append(d, time.Duration(s)*time.Second)
	}
	return d
}

func TestWaitWithoutJitter(t *testing.T) {
	for _, tt := range []struct {
		low, high time.Duration
		want      []time.Duration
	}{
		{time.Second, 10 * time.Second, seconds(1, 2, 4, 8, 10, 10)},
		{3 * time.Second, 10 * time.Second, seconds(3, 6, 10, 10)},
		{time.Second, 8 * time.Second, seconds(1, 2, 4, 8, 8)},
		{5 * time.Second, 5 * time.Second, seconds(5, 5, 5)},
		{20 * time.Second, 20 * time.Second, seconds(20, 20)},
		{1, 5, []time.Duration{1, 2, 4, 5, 5}},
		{math.MaxInt64/2 + 1, math.MaxInt64, []time.Duration{math.MaxInt64/2 + 1, math.MaxInt64, math.MaxInt64}},
	} {
		b := Backoff{Min: tt.low, Max: tt.high, Jitter: None}
		var got []time.Duration
		for n := range tt.want {
			got = append(got, b.Wait(n, 0))
		}
		assert.Equal(t, tt.want, got)
	}
	b := Backoff{Min: 1, Max: math.MaxInt64, Jitter: None}
	assert.Equal(t, time.Duration(1<<62), b.Wait(62, 0))
	for _, n := range []int{63, 64, 65, 1000, math.MaxInt} {
		assert.Equal(t, time.Duration(math.MaxInt64), b.Wait(n, 0), "n = %d", n)
	}
}

// The waits of each jitter fill what its rule says, evenly, and never leave it.
func TestWaitWithJitter(t *testing.T) {
	const s = time.Second
	for _, tt := range []struct {
		jitter    Jitter
		n         int
		last      time.Duration
		low, high time.Duration // drawn evenly from [low, high) …
		atLow     float64       // … but for this share, which the bound raises to low
	}{
		{Equal, 0, 0, 1 * s, 2 * s, 0},
		{Equal, 1, 0, 2 * s, 4 * s, 0},
		{Equal, 2, 0, 4 * s, 8 * s, 0},
		{Equal, 3, 0, 8 * s, 10 * s, 0},
		{Equal, 4, 0, 5 * s, 10 * s, 0},
		{Equal, 99, 0, 5 * s, 10 * s, 0},
		{Full, 0, 0, 1 * s, 1 * s, 1},
		{Full, 1, 0, 1 * s, 2 * s, 0.5},
		{Full, 2, 0, 1 * s, 4 * s, 0.25},
		{Full, 3, 0, 1 * s, 8 * s, 0.125},
		{Full, 4, 0, 1 * s, 10 * s, 0.1},
		{Decorrelated, 0, 0, 1 * s, 3 * s, 0},
		{Decorrelated, 1, 2 * s, 1 * s, 6 * s, 0},
		{Decorrelated, 2, 5 * s, 1 * s, 10 * s, 0},
		{Decorrelated, 3, time.Hour, 1 * s, 10 * s, 0},
		{Decorrelated, 3, math.MaxInt64, 1 * s, 10 * s, 0},
	} {
		t.Run(fmt.Sprintf("jitter %d n %d last %v", tt.jitter, tt.n, tt.last), func(t *testing.T) {
			b := Backoff{Min: s, Max: 10 * s, Jitter: tt.jitter}
			const draws = 4000
			var atLow, between int
			lowest, highest, sum := tt.high, tt.low, time.Duration(0)
			for range draws {
				d := b.Wait(tt.n, tt.last)
				if d == tt.low {
					atLow++
					continue
				}
				if d < tt.low || d >= tt.high {
					t.Fatalf("a wait of %v", d)
				}
				between++
				sum += d
				lowest, highest = min(lowest, d), max(highest, d)
			}
			assert.InDelta(t, tt.atLow, float64(atLow)/draws, 0.06)
			if between > draws/4 {
				span := (tt.high - tt.low).Seconds()
				assert.InDelta(t, tt.low.Seconds(), lowest.Seconds(), span/20)
				assert.InDelta(t, tt.high.Seconds(), highest.Seconds(), span/20)
				assert.InDelta(t, (tt.low+tt.high).Seconds()/2, (sum / time.Duration(between)).Seconds(), span/20)
			}
		})
	}
}

// Where doubling or tripling would overflow, there still is a jitter.
func TestWaitAtTheEndOfNumbers(t *testing.T) {
	for _, b := range []Backoff{{Jitter: Equal}, {Jitter: Decorrelated}} {
		b.Min, b.Max = time.Second, math.MaxInt64
		longest := time.Duration(0)
		for range 2000 {
			longest = max(longest, b.Wait(33, math.MaxInt64/2))
		}
		assert.Greater(t, longest, time.Duration(math.MaxInt64/20*19), "jitter %d", b.Jitter)
	}
}

func TestWaitStaysWithinItsBounds(t *testing.T) {
	for jitter := Equal; jitter <= None; jitter++ {
		for _, bounds := range [][2]time.Duration{{1, 1}, {1, 2}, {2, 3}, {time.Second, time.Second},
			{1, math.MaxInt64}, {math.MaxInt64 - 1, math.MaxInt64}, {math.MaxInt64, math.MaxInt64}, {math.MaxInt64 / 3, math.MaxInt64 / 2}} {
			for _, n := range []int{0, 1, 2, 31, 61, 62, 63, 64, 1 << 40, math.MaxInt} {
				checkWait(t, Backoff{Jitter: jitter, Min: bounds[0], Max: bounds[1]}, n, 0)
				checkWait(t, Backoff{Jitter: jitter, Min: bounds[0], Max: bounds[1]}, n, math.MaxInt64)
			}
		}
	}
}

func FuzzWait(f *testing.F) {
	f.Add(int64(time.Second), int64(10*time.Second), 4, int64(0), byte(Equal))
	f.Add(int64(1), int64(math.MaxInt64), 62, int64(math.MaxInt64), byte(Decorrelated))
	f.Add(int64(0), int64(0), math.MaxInt, int64(-1), byte(Full))
	f.Fuzz(func(t *testing.T, minWait, maxWait int64, n int, last int64, jitter byte) {
		b := Backoff{Min: time.Duration(minWait), Max: time.Duration(maxWait), Jitter: Jitter(jitter % 4)}
		if n < 0 || minWait < 0 || maxWait < minWait {
			t.Skip()
		}
		checkWait(t, b, n, time.Duration(last))
	})
}

func checkWait(t *testing.T, b Backoff, n int, last time.Duration) {
	t.Helper()
	wait := b.Wait(n, last)
	if wait < b.Min || wait > b.Max {
		t.Errorf("wait(%d, %d) is %d, not within %d and %d, with jitter %d", n, last, wait, b.Min, b.Max, b.Jitter)
	}
}

// Each decorrelated wait depends on the one before.
func TestDecorrelatedWaitsGrowFromTheLast(t *testing.T) {
	b := Backoff{Min: time.Second, Max: time.Hour, Jitter: Decorrelated}
	last, longest := time.Duration(0), time.Duration(0)
	for n := range 60 {
		wait := b.Wait(n, last)
		assert.GreaterOrEqual(t, wait, time.Second)
		assert.Less(t, wait, 3*max(last, time.Second))
		last, longest = wait, max(longest, wait)
	}
	assert.Greater(t, longest, 3*time.Second, "they never grew")
}
