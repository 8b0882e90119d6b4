package pace

import (
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func newBucket(b Budget, now time.Time) *Bucket {
	k := &Bucket{}
	k.Init(b, now)
	return k
}

// Each step asks for retries at a time, when the service has had so many
// requests, and says how many it gets.
func TestBudgetSteps(t *testing.T) {
	type step struct {
		at       time.Duration
		requests uint64
		ask      int
		want     int
	}
	standard := Budget{Ratio: 0.2, MinPerSecond: 10}
	for _, tt := range []struct {
		name   string
		budget Budget
		steps  []step
	}{
		{"fresh: ten seconds' worth", standard, []step{{0, 1, 500, 100}, {0, 1, 9, 0}}},
		{"earns by time", standard, []step{{0, 0, 500, 100}, {time.Second, 0, 50, 10}, {time.Second, 0, 50, 0}, {1500 * time.Millisecond, 0, 50, 5}}},
		{"earns by requests", standard, []step{{0, 0, 500, 100}, {0, 1000, 500, 200}, {0, 1000, 500, 0}, {0, 1010, 500, 2}}},
		{"earns by both", standard, []step{{0, 0, 500, 100}, {time.Second, 1000, 500, 210}, {2 * time.Second, 2000, 500, 210}}},
		{"long idle: ten seconds' worth", standard, []step{{0, 0, 500, 100}, {time.Hour, 0, 500, 100}, {time.Hour, 0, 500, 0}}},
		{"long busy without retries: ten seconds' worth", standard, []step{
			{0, 0, 500, 100}, {time.Hour, 3600 * 1000, 9999, 100 + 2000}, {time.Hour, 3600 * 1000, 9999, 0}}},
		{"what was saved goes stale", standard, []step{{10 * time.Second, 10000, 1, 1}, {time.Minute, 10000, 9999, 100}}},
		{"ratio alone", Budget{Ratio: 0.5}, []step{{0, 1, 9, 0}, {0, 2, 9, 1}, {0, 3, 9, 0}, {0, 4, 9, 1}, {time.Second, 4, 9, 0}}},
		{"ratio above one", Budget{Ratio: 2}, []step{{0, 1, 9, 2}, {0, 2, 9, 2}}},
		{"time alone", Budget{MinPerSecond: 1}, []step{{0, 999, 99, 10}, {time.Second, 9999, 99, 1}, {time.Hour, 99999, 99, 10}}},
		{"a retry every ten seconds", Budget{MinPerSecond: 0.1}, []step{{0, 1, 9, 1}, {9 * time.Second, 2, 9, 0}, {11 * time.Second, 3, 9, 1}}},
		{"a retry every twenty seconds", Budget{MinPerSecond: 0.05}, []step{
			{0, 1, 9, 1}, {19 * time.Second, 2, 9, 0}, {20 * time.Second, 2, 9, 1}, {time.Hour, 3, 9, 1}, {time.Hour, 3, 9, 0}}},
		{"few requests", Budget{Ratio: 0.5}, []step{
			{time.Minute, 1, 9, 0}, {2 * time.Minute, 2, 9, 1}, {3 * time.Minute, 3, 9, 0}, {4 * time.Minute, 4, 9, 1}, {5 * time.Hour, 9, 9, 1}}},
		{"few requests, a small share", Budget{Ratio: 0.01}, []step{{0, 99, 9, 0}, {time.Hour, 100, 9, 1}, {2 * time.Hour, 199, 9, 0}, {3 * time.Hour, 200, 9, 1}}},
		{"nothing at all", Budget{}, []step{{0, 1, 9, 0}, {time.Hour, 1000, 9, 0}}},
		{"none", Budget{Ratio: -1}, []step{{0, 0, 9999, 9999}}},
		{"none, whatever else", Budget{Ratio: -0.1, MinPerSecond: 1}, []step{{0, 0, 9999, 9999}}},
		{"a count that went back", Budget{Ratio: 0.5}, []step{{0, 4, 9, 2}, {0, 3, 9, 0}, {0, 3, 9, 0}}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			start := time.Now()
			k := newBucket(tt.budget, start)
			for i, s := range tt.steps {
				got := 0
				for range s.ask {
					if k.Spend(tt.budget, start.Add(s.at), s.requests) {
						got++
					}
				}
				require.Equal(t, s.want, got, "step %d", i)
			}
		})
	}
}

// A trickle of requests that all need their retries never notices the budget.
func TestBudgetIgnoresATrickle(t *testing.T) {
	budget, start := Budget{Ratio: 0.2, MinPerSecond: 10}, time.Now()
	for _, rate := range []struct {
		every   time.Duration
		retries int
	}{{time.Second, 2}, {time.Minute, 9}, {250 * time.Millisecond, 2}} {
		k := newBucket(budget, start)
		for i := range 10000 {
			for range rate.retries {
				if !k.Spend(budget, start.Add(time.Duration(i)*rate.every), uint64(i)) {
					t.Fatalf("request %d of one every %v", i, rate.every)
				}
			}
		}
	}
}

// In an outage, retries come to 20% of the requests and ten a second.
func TestBudgetLimitsAnOutage(t *testing.T) {
	budget, start := Budget{Ratio: 0.2, MinPerSecond: 10}, time.Now()
	for _, rate := range []int{100, 1000, 3000} {
		k, retries := newBucket(budget, start), 0
		const seconds = 60
		for i := range rate * seconds {
			now := start.Add(time.Duration(i) * time.Second / time.Duration(rate))
			for range 2 {
				if k.Spend(budget, now, uint64(i+1)) {
					retries++
				}
			}
		}
		want := 0.2*float64(rate*seconds) + 10*seconds + 100
		assert.InDelta(t, want, retries, 0.01*want, "%d requests a second", rate)
	}
}

// A Budget of so much a second lets that much through, however little it is.
func TestBudgetOverAnHour(t *testing.T) {
	for _, perSecond := range []float64{0.005, 0.05, 0.1, 0.7, 3} {
		budget, start := Budget{MinPerSecond: perSecond}, time.Now()
		k, retries := newBucket(budget, start), 0
		for at := time.Duration(0); at <= time.Hour; at += 100 * time.Millisecond {
			if k.Spend(budget, start.Add(at), 0) {
				retries++
			}
		}
		want := 3600*perSecond + max(1, 10*perSecond)
		assert.InDelta(t, want, retries, 1, "%v a second", perSecond)
	}
}

func TestTokens(t *testing.T) {
	budget, start := Budget{Ratio: 0.2, MinPerSecond: 10}, time.Now()
	k := newBucket(budget, start)
	require.EqualValues(t, 100, k.Tokens(budget, start, 0))
	for range 30 {
		require.True(t, k.Spend(budget, start, 0))
	}
	for range 9 { // asking changes nothing
		require.EqualValues(t, 80, k.Tokens(budget, start.Add(time.Second), 0))
		require.EqualValues(t, 70, k.Tokens(budget, start, 0))
		require.EqualValues(t, 90, k.Tokens(budget, start, 100))
		require.EqualValues(t, 100, k.Tokens(budget, start.Add(time.Hour), 0))
	}
	require.Zero(t, k.Tokens(Budget{Ratio: -1}, start, 0))
}

func TestClamp(t *testing.T) {
	start := time.Now()
	none := Budget{Ratio: -1}
	for _, tt := range []struct {
		name    string
		old, b  Budget
		want    float64 // tokens a second later, after ten retries at the start
		already uint64  // requests by then
	}{
		{"the same", Budget{MinPerSecond: 5}, Budget{MinPerSecond: 5}, 45, 0},
		{"less", Budget{MinPerSecond: 5}, Budget{MinPerSecond: 1}, 10, 0},
		{"more is not given at once", Budget{MinPerSecond: 5}, Budget{MinPerSecond: 500}, 45, 0},
		{"requests of before earn by the old", Budget{Ratio: 0.1, MinPerSecond: 5}, Budget{Ratio: 1, MinPerSecond: 5}, 55, 100},
		{"one token at least can be held", Budget{MinPerSecond: 5}, Budget{MinPerSecond: 0.01}, 1, 0},
		{"a limit for the first time", none, Budget{MinPerSecond: 5}, 50, 1000},
		{"no limit any more", Budget{MinPerSecond: 5}, none, 0, 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			k := newBucket(tt.old, start)
			for range 10 {
				require.True(t, k.Spend(tt.old, start, 0))
			}
			now := start.Add(time.Second)
			k.Clamp(tt.old, tt.b, now, tt.already)
			require.InDelta(t, tt.want, k.Tokens(tt.b, now, tt.already), 1e-9)
		})
	}
}

// However many ask at a time, no more get a retry than there are tokens.
func TestBudgetUnderConcurrency(t *testing.T) {
	budget, start := Budget{Ratio: 0.5, MinPerSecond: 1}, time.Now()
	k := newBucket(budget, start)
	var requests, got atomic.Int64
	var all sync.WaitGroup
	for range 8 {
		all.Go(func() {
			for range 1000 {
				n := requests.Add(1)
				if k.Spend(budget, start, uint64(n)) {
					got.Add(1)
				}
				k.Tokens(budget, start, uint64(n))
				k.Clamp(budget, Budget{Ratio: 0.5, MinPerSecond: 1.5}, start, uint64(n))
			}
		})
	}
	all.Wait()
	require.InDelta(t, 8000*0.5+10, got.Load(), 1)
	require.Less(t, k.Tokens(budget, start, 8000), 1.0)
}
