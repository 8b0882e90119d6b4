package pace

import (
	"sync"
	"time"
)

// A Budget limits retries to a share of a service's requests: each request earns
// Ratio, each second earns MinPerSecond, each retry spends one
// (https://twitter.github.io/finagle/guide/Glossary.html, "Retry Budget"). A
// Ratio below zero means that retries are not limited.
type Budget struct {
	Ratio        float64
	MinPerSecond float64
}

// limited reports whether b limits anything.
func (b Budget) limited() bool { return b.Ratio >= 0 }

// A Bucket is the token bucket of one service's Budget. It holds what ten seconds
// earn, and one token at least: with less it would never let a retry through,
// though a Budget of {MinPerSecond: 0.05} promises one every 20 seconds.
//
// Requests are counted elsewhere already, so the bucket earns for them only when
// it is asked: a service that needs no retries pays nothing for its budget. It is
// safe for concurrent use, after Init.
type Bucket struct {
	mu    sync.Mutex // guards level
	level level
}

// A level is what a bucket holds at a time.
type level struct {
	at       time.Time // when it last earned
	requests uint64    // of the service by then
	recent   float64   // requests of about the last ten seconds
	tokens   float64
}

const span = 10 // seconds whose earnings a bucket holds

// Init fills k for a service that begins now. It holds ten seconds' worth of
// MinPerSecond, and one token at least if MinPerSecond is above zero: the service
// has had no retry yet, so the first one need not wait until it is earned. With a
// Ratio alone it is empty until requests have earned something.
func (k *Bucket) Init(b Budget, now time.Time) { k.level = full(b, now, 0) }

func full(b Budget, now time.Time, requests uint64) level {
	l := level{at: now, requests: requests, tokens: span * b.MinPerSecond}
	if b.MinPerSecond > 0 {
		l.tokens = max(1, l.tokens)
	}
	return l
}

// Spend takes a token for one retry, if there is one, at a time when the service
// has had so many requests in all.
func (k *Bucket) Spend(b Budget, now time.Time, requests uint64) bool {
	if !b.limited() {
		return true
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	k.level = k.level.earn(b, now, requests)
	if k.level.tokens < 1 {
		return false
	}
	k.level.tokens--
	return true
}

// Tokens returns what k holds now. It spends nothing and changes nothing. It is 0
// if retries are not limited.
func (k *Bucket) Tokens(b Budget, now time.Time, requests uint64) float64 {
	if !b.limited() {
		return 0
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.level.earn(b, now, requests).tokens
}

// Clamp changes the Budget from old to b: what has been earned until now is old's
// affair, and no more of it is kept than b lets k hold. Who has had no limit
// starts with a full bucket.
func (k *Bucket) Clamp(old, b Budget, now time.Time, requests uint64) {
	if old == b || !b.limited() {
		return
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if old.limited() {
		k.level = k.level.earn(old, now, requests).held(b)
	} else {
		k.level = full(b, now, requests)
	}
}

// earn returns the level at a later time. Callers may come out of order, and a
// request that has been taken back may make the count go back: neither earns
// anything.
func (l level) earn(b Budget, now time.Time, requests uint64) level {
	elapsed := max(0, now.Sub(l.at).Seconds())
	earned := float64(max(requests, l.requests) - l.requests)
	l.tokens += b.Ratio*earned + b.MinPerSecond*elapsed
	if elapsed > span {
		earned *= span / elapsed // of these only the last ten seconds are recent
	}
	l.recent = l.recent*max(0, 1-elapsed/span) + earned
	l.requests = max(requests, l.requests)
	if now.After(l.at) {
		l.at = now
	}
	return l.held(b)
}

// held returns l with no more tokens than b lets a bucket hold.
func (l level) held(b Budget) level {
	l.tokens = min(l.tokens, max(1, span*b.MinPerSecond+b.Ratio*l.recent))
	return l
}
