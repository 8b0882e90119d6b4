// Package circuit is the state machine of a circuit breaker.
//
//	CLOSED --(a row of failures, or too many in a window)--> OPEN
//	OPEN --(time)--> HALF_OPEN
//	HALF_OPEN --(enough successes)--> CLOSED
//	HALF_OPEN --(any failure)--> OPEN
//
// Time is an argument of every method that needs it. The zero time is never
// looked at: a closed breaker that has nothing to remember needs no clock.
package circuit

import (
	"context"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// State is the state of a breaker.
type State int

// The states, in the order in which the root package has them.
const (
	Closed State = iota
	Open
	HalfOpen
)

// Outcome is what an attempt tells the breaker.
type Outcome int

// The outcomes, in the order in which the root package has them.
const (
	Ignored Outcome = iota
	Success
	Failure
)

// Origin is what is behind a transition.
type Origin int

// The origins, in the order in which the root package has them.
const (
	ByAttempts Origin = iota
	ByHand
	ByFleet
	ByForgetting
)

// A Config says when a breaker opens and how it closes again. All of its fields
// are resolved: zero means zero.
type Config struct {
	FailureThreshold   int // failures in a row that open it; below zero: rows do not count
	RecoveryTimeout    time.Duration
	MaxRecoveryTimeout time.Duration
	SuccessThreshold   int
	FailureRate        float64 // zero: the rate does not count
	Window             time.Duration
	MinRequests        int
	Observe            bool // rejects nothing
}

// Off reports whether attempts never open the breaker.
func (c *Config) Off() bool { return c.FailureThreshold < 0 && c.FailureRate <= 0 }

// grows reports whether failed recoveries make the next one later.
func (c *Config) grows() bool { return c.MaxRecoveryTimeout > c.RecoveryTimeout }

// The gate is one word: the number of the attempt admitted last, and flags
// above it. An attempt that passes a closed breaker takes the next number with
// a single atomic addition, and sees the flags in the same word.
//
// 2^60 numbers last for 36 years at a thousand million attempts a second.
const (
	shut    = 1 << 63 // not CLOSED: only Admit lets attempts through
	timed   = 1 << 62 // attempts and their ends are counted in a window: Admit and Record must know of each
	watched = 1 << 61 // a response that ends well must be told: the growing recovery time then starts over
	numbers = 1<<60 - 1
)

// A Breaker is the breaker of one service. It must be given to Init before its
// first use, must not be copied, and is safe for concurrent use.
//
// Each attempt that it admits gets a number, and each transition begins a new
// generation with the number after the last one given. So a late result shows
// by its number that it belongs to a generation that is over, and changes
// nothing.
type Breaker struct {
	gate    atomic.Uint64           // written with mu of the machine held, but for the additions of Pass
	config  atomic.Pointer[Config]  // never nil after Init
	machine atomic.Pointer[machine] // nil until something goes wrong
	name    string
	created time.Time
}

// Init prepares b for the service name.
func (b *Breaker) Init(name string, config *Config, now time.Time) {
	b.name, b.created = name, now
	b.config.Store(config)
	if config.FailureRate > 0 {
		b.gate.Store(timed)
	}
}

// A machine is the part of a breaker that only trouble needs.
type machine struct {
	rejection atomic.Pointer[Rejection] // what an OPEN or HALF_OPEN breaker answers; nil when CLOSED; written with mu held

	mu        sync.Mutex // guards everything below
	state     State
	since     time.Time // when state began
	first     uint64    // the first number of this generation
	rows      rows      // CLOSED
	window    window    // CLOSED, with a FailureRate
	failures  int       // in the row that made it leave CLOSED
	cause     error     // of the last failure that counted; CLOSED
	successes int       // of probes; HALF_OPEN
	probes    []probe   // those that hold a place; HALF_OPEN
	outage    time.Time // when CLOSED was left

	recovery time.Duration // of the last opening by attempts
	proven   bool          // a response has ended well since then, or there was no opening

	lastFailure time.Time // also of one that came too late to count
	lastCause   error

	spent        [3]time.Duration // in each state, without the current stay
	entered      [3]uint64        // transitions to each state
	recoveries   uint64
	recoveryTime time.Duration

	pending    []Change // not delivered yet
	delivering bool
}

// A probe holds a place from its admission on, for RecoveryTimeout at most: one
// that hangs must not keep everybody out.
type probe struct {
	number uint64
	since  time.Time
}

// A Rejection is why an attempt is not admitted. It is shared by all attempts
// that are rejected between two transitions. The root package's OpenError has
// the same fields, and is made of it by conversion.
type Rejection struct {
	Service string
	Until   time.Time
	Last    error
}

// A Change tells of a transition, or of a new end of an opening (OPEN to OPEN).
type Change struct {
	Context  context.Context // of the request behind it; nil without one
	From, To State
	At       time.Time
	Failures int
	Until    time.Time
	Asked    time.Duration
	Cause    error
	Origin   Origin
}

// A Permit lets one attempt through. The zero Permit counts for nothing.
type Permit struct {
	Probe    bool
	answered bool  // a probe's: its answer has counted, and only its body is still to end
	turn     int32 // in which turn of the window it began
	number   uint64
}

// A Verdict is what an attempt has shown.
type Verdict struct {
	Context context.Context // of its request
	Outcome Outcome
	Ended   bool          // of a Success: the response has ended well
	Cause   error         // of a Failure
	Asked   time.Duration // how long the server asked to be left alone
}

// longestAsked bounds how long a server can keep a breaker open.
const longestAsked = 10 * time.Minute

// Pass lets an attempt through a closed breaker. It takes no lock and no look
// at the clock. When it returns false, Admit has to be asked.
func (b *Breaker) Pass() (Permit, bool) {
	if b.gate.Load()&(shut|timed) != 0 {
		return Permit{}, false
	}
	g := b.gate.Add(1)
	return Permit{number: g & numbers}, g&(shut|timed) == 0
}

// Admit lets an attempt through, or returns why not. It may make the attempt
// the first probe; then there is a change to deliver.
func (b *Breaker) Admit(ctx context.Context, now time.Time) (Permit, *Rejection) {
	c, m := b.config.Load(), b.slow()
	if r := m.rejection.Load(); r != nil && now.Before(r.Until) && !c.Observe {
		return Permit{}, r // without the lock
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.state == Open && !now.Before(m.rejection.Load().Until) {
		if c.Off() { // there is nothing to find out: it was opened by hand, for a while
			b.transition(m, Closed, Change{Context: ctx, At: now})
		} else {
			b.transition(m, HalfOpen, Change{Context: ctx, At: now, Cause: m.rejection.Load().Last})
		}
	}
	switch {
	case m.state == Closed:
		return b.enter(m, c, now), nil
	case m.state == HalfOpen && m.placesLeft(c, now) > 0:
		p := Permit{Probe: true, number: b.gate.Add(1) & numbers}
		m.probes = append(m.probes, probe{p.number, now})
		return p, nil
	case c.Observe:
		return Permit{}, nil
	}
	return Permit{}, m.rejection.Load()
}

// enter admits an attempt in CLOSED. It requires mu.
func (b *Breaker) enter(m *machine, c *Config, now time.Time) Permit {
	p := Permit{number: b.gate.Add(1) & numbers}
	if c.FailureRate > 0 {
		p.turn = m.window.begin(now, c.Window)
	}
	return p
}

// placesLeft forgets the probes that have been away for too long, and returns
// how many more may begin. It requires mu.
func (m *machine) placesLeft(c *Config, now time.Time) int {
	kept := m.probes[:0]
	for _, p := range m.probes {
		if now.Sub(p.since) < c.RecoveryTimeout {
			kept = append(kept, p)
		}
	}
	m.probes = kept
	return c.SuccessThreshold - m.successes - len(m.probes)
}

// Indifferent reports whether the breaker needs no word of the success of p:
// it is closed and a success changes nothing.
func (b *Breaker) Indifferent(p Permit) bool {
	return !p.Probe && b.gate.Load()&(timed|watched) == 0
}

// Record takes the verdict on an attempt that has ended. There may be a change
// to deliver afterwards.
func (b *Breaker) Record(p Permit, v Verdict, now time.Time) {
	c, m := b.config.Load(), b.slow()
	m.mu.Lock()
	defer m.mu.Unlock()
	b.record(m, c, p, v, now)
}

// Answer takes the success of an attempt whose response body is still to end.
// It returns the permit by which Record is to be told of that end. Only a
// probe's answer counts by itself; its body belongs to the generation that the
// answer has begun.
func (b *Breaker) Answer(p Permit, ctx context.Context, now time.Time) Permit {
	if !p.Probe {
		return p
	}
	c, m := b.config.Load(), b.slow()
	m.mu.Lock()
	defer m.mu.Unlock()
	current := p.number >= m.first
	b.record(m, c, p, Verdict{Context: ctx, Outcome: Success}, now)
	if current && m.state == Closed {
		return b.enter(m, c, now)
	}
	p.answered = true
	return p
}

// record requires mu.
func (b *Breaker) record(m *machine, c *Config, p Permit, v Verdict, now time.Time) {
	if v.Outcome == Failure {
		m.lastFailure, m.lastCause = now, v.Cause // for Snapshot alone
	}
	if p.number < m.first {
		return // of a generation that is over, or of none
	}
	if v.Outcome == Success && v.Ended && !m.proven {
		m.proven = true
		b.gate.And(^uint64(watched))
	}
	switch m.state {
	case Closed:
		b.recordClosed(m, c, p, v, now)
	case HalfOpen:
		b.recordProbe(m, c, p, v, now)
	}
}

// recordClosed requires mu.
func (b *Breaker) recordClosed(m *machine, c *Config, p Permit, v Verdict, now time.Time) {
	if c.Off() {
		return
	}
	if v.Outcome == Failure {
		m.cause = v.Cause
	}
	tooMany, failures := false, 0
	if v.Outcome != Success {
		failures = m.rows.add(p.number, v.Outcome == Failure)
		tooMany = c.FailureThreshold >= 0 && failures >= c.FailureThreshold
	}
	if c.FailureRate > 0 {
		total, failed := m.window.end(p.turn, v.Outcome, now, c.Window)
		tooMany = tooMany || v.Outcome != Ignored && total >= c.MinRequests && failed > 0 && float64(failed)/float64(total) >= c.FailureRate
	}
	if tooMany {
		m.failures = failures
		// An ignored attempt may have joined two rows, and a success may have made
		// the requests enough: then the failure before is the cause.
		b.open(m, c, now, Verdict{Context: v.Context, Cause: m.cause, Asked: v.Asked})
	}
}

// recordProbe requires mu.
func (b *Breaker) recordProbe(m *machine, c *Config, p Permit, v Verdict, now time.Time) {
	m.probes = slices.DeleteFunc(m.probes, func(held probe) bool { return held.number == p.number })
	switch {
	case v.Outcome == Failure:
		b.open(m, c, now, v)
	case v.Outcome == Success && !p.answered:
		m.successes++
		if m.successes >= c.SuccessThreshold {
			m.recoveries++
			m.recoveryTime += now.Sub(m.outage)
			b.transition(m, Closed, Change{Context: v.Context, At: now})
		}
	}
}

// open opens the breaker because of the failure v. The time until probes grows
// if the recovery before has failed: in HALF_OPEN, or in CLOSED before a single
// response has ended well. It requires mu.
func (b *Breaker) open(m *machine, c *Config, now time.Time, v Verdict) {
	switch {
	case m.state == Closed && m.proven:
		m.recovery = c.RecoveryTimeout
	case c.grows():
		m.recovery = min(m.recovery, c.MaxRecoveryTimeout-m.recovery) + m.recovery // doubled, held to the longest
	}
	m.proven = false
	asked := min(v.Asked, longestAsked)
	b.openUntil(m, now.Add(max(m.recovery, asked)), Change{Context: v.Context, At: now, Asked: asked, Cause: v.Cause})
}

// openUntil requires mu.
func (b *Breaker) openUntil(m *machine, until time.Time, change Change) {
	m.rejection.Store(&Rejection{Service: b.name, Until: until, Last: change.Cause})
	b.transition(m, Open, change)
}

// transition is the one place where the state changes. It begins a new
// generation, also from OPEN to OPEN. It requires mu.
func (b *Breaker) transition(m *machine, to State, change Change) {
	from, now := m.state, change.At
	if from == Closed {
		m.outage = now
	}
	change.From, change.To = from, to
	if to == Open {
		change.Until, change.Failures = m.rejection.Load().Until, m.failures
	}
	if from != to {
		m.spent[from] += now.Sub(m.since)
		m.entered[to]++
		m.since, m.state = now, to
	}
	if from != to || to == Open {
		m.pending = append(m.pending, change)
	}
	m.successes, m.probes = 0, nil
	m.rows, m.window = rows{}, window{}
	m.cause = nil
	if to == Closed {
		m.failures = 0
		m.rejection.Store(nil)
	}
	m.first = b.turnGate(m)&numbers + 1
}

// turnGate brings the flags of the gate up to date, and returns the gate as it
// was at the instant from which they hold. It requires mu.
func (b *Breaker) turnGate(m *machine) uint64 {
	var flags uint64
	c := b.config.Load()
	if m.state != Closed {
		flags |= shut
	}
	if c.FailureRate > 0 {
		flags |= timed
	}
	if m.state == Closed && !m.proven && c.grows() {
		flags |= watched
	}
	for {
		g := b.gate.Load()
		if b.gate.CompareAndSwap(g, g&numbers|flags) {
			return g
		}
	}
}

// slow returns the machine, which it makes at the first call.
func (b *Breaker) slow() *machine {
	if m := b.machine.Load(); m != nil {
		return m
	}
	m := &machine{since: b.created, first: 1, recovery: b.config.Load().RecoveryTimeout, proven: true}
	if !b.machine.CompareAndSwap(nil, m) {
		return b.machine.Load()
	}
	return m
}

// Blocked returns the rejection that an attempt after wait would meet, as far as
// can be told now, or nil.
func (b *Breaker) Blocked(wait time.Duration, now time.Time) *Rejection {
	m := b.machine.Load()
	if m == nil || b.config.Load().Observe {
		return nil
	}
	if r := m.rejection.Load(); r != nil && r.Until.Sub(now) > wait {
		return r
	}
	return nil
}

// Trip opens the breaker until then. Attempts under way no longer count.
func (b *Breaker) Trip(until, now time.Time, cause error, origin Origin) {
	m := b.slow()
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.state == Closed {
		m.failures = m.rows.current(b.gate.Load() & numbers)
		if m.proven { // what earlier recoveries have grown to is over
			m.recovery = b.config.Load().RecoveryTimeout
		}
	}
	b.openUntil(m, until, Change{At: now, Cause: cause, Origin: origin})
}

// Reset closes the breaker and clears what it decides by. Attempts under way no
// longer count.
func (b *Breaker) Reset(now time.Time, origin Origin) {
	c, m := b.config.Load(), b.slow()
	m.mu.Lock()
	defer m.mu.Unlock()
	m.recovery, m.proven = c.RecoveryTimeout, true
	b.transition(m, Closed, Change{At: now, Origin: origin})
}

// Forget closes the breaker of a service that nobody uses, and reports whether
// the service may be forgotten. An opening that is not over must be kept.
func (b *Breaker) Forget(now time.Time) bool {
	if !b.Forgettable(now) {
		return false
	}
	if m := b.machine.Load(); m != nil {
		m.mu.Lock()
		defer m.mu.Unlock()
		if m.state != Closed {
			b.transition(m, Closed, Change{At: now, Origin: ByForgetting})
		}
	}
	return true
}

// Forgettable reports whether Forget would say so.
func (b *Breaker) Forgettable(now time.Time) bool {
	m := b.machine.Load()
	if m == nil {
		return true
	}
	r := m.rejection.Load()
	return r == nil || !now.Before(r.Until)
}

// Deliver tells of the changes in order, one at a time and without holding the
// lock, so that tell may call any method. What comes to pass meanwhile is told
// by whoever is telling already.
func (b *Breaker) Deliver(tell func(Change)) {
	m := b.machine.Load()
	if m == nil {
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.delivering || len(m.pending) == 0 {
		return
	}
	m.delivering = true
	defer func() { m.delivering = false }()
	for len(m.pending) > 0 {
		change := m.pending[0]
		m.pending = m.pending[1:]
		func() {
			m.mu.Unlock()
			defer m.mu.Lock() // also when tell panics
			tell(change)
		}()
	}
}

// A Snapshot is what a breaker has been through.
type Snapshot struct {
	State        State
	Since        time.Time // when State began
	Until        time.Time // of the opening; zero when CLOSED
	Failures     int       // in the row that goes on, or that opened the breaker
	Successes    int       // of probes; HALF_OPEN
	LastFailure  time.Time
	LastCause    error
	Spent        [3]time.Duration // in each state, by now
	Entered      [3]uint64        // transitions to each state
	Recoveries   uint64
	RecoveryTime time.Duration
}

// Snapshot returns what the breaker has been through by now.
func (b *Breaker) Snapshot(now time.Time) Snapshot {
	s := Snapshot{Since: b.created}
	if m := b.machine.Load(); m != nil {
		m.mu.Lock()
		s = Snapshot{
			State: m.state, Since: m.since, Failures: m.failures, Successes: m.successes,
			LastFailure: m.lastFailure, LastCause: m.lastCause, Spent: m.spent, Entered: m.entered,
			Recoveries: m.recoveries, RecoveryTime: m.recoveryTime,
		}
		if r := m.rejection.Load(); r != nil {
			s.Until = r.Until
		}
		if m.state == Closed {
			s.Failures = m.rows.current(b.gate.Load() & numbers)
		}
		m.mu.Unlock()
	}
	s.Spent[s.State] += max(0, now.Sub(s.Since)) // now may be from just before Since
	return s
}
