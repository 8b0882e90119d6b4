// Package pace says how long to wait before a retry, and how many retries a
// service can afford.
package pace

import (
	"math/rand/v2"
	"time"
)

// Jitter is how waits are spread, in the order of the root package's constants.
type Jitter int

// With d = Min·2ⁿ before retry n, every wait stays within Min and Max.
const (
	Equal        Jitter = iota // evenly from [d, 2d), from [Max/2, Max) once d reaches Max
	Full                       // evenly from [0, d), but at least Min
	Decorrelated               // evenly from [Min, 3·the wait before)
	None                       // d
)

// A Backoff is an exponential backoff within [Min, Max]. Neither is below zero,
// and Max is not below Min.
type Backoff struct {
	Min, Max time.Duration
	Jitter   Jitter
}

// Wait returns the wait before retry n (0, 1, …), given the wait before it.
func (b Backoff) Wait(n int, last time.Duration) time.Duration {
	n = max(0, n)
	d := b.Max // Min·2ⁿ, held to Max
	if b.Min <= b.Max>>n {
		d = b.Min << n
	}
	switch b.Jitter {
	case Full:
		return max(b.Min, between(0, d))
	case Decorrelated:
		return between(b.Min, b.held(max(last, b.Min), 3))
	case None:
		return d
	}
	if d == b.Max {
		return between(max(b.Min, d/2), d)
	}
	return between(d, b.held(d, 2))
}

// held returns d·times, held to Max without overflowing.
func (b Backoff) held(d, times time.Duration) time.Duration {
	if d > b.Max/times {
		return b.Max
	}
	return d * times
}

// between draws evenly from [low, high); it is low if there is nothing between.
func between(low, high time.Duration) time.Duration {
	if high <= low {
		return low
	}
	return low + rand.N(high-low)
}
