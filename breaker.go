package tripper

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"reflect"
	"sync"
	"sync/atomic"
	"time"

	"github.com/tripper-go/tripper/internal/sse"
)

// State is the state of a circuit breaker.
type State int

const (
	Closed   State = iota // requests pass; failures in a row are counted
	Open                  // requests are rejected
	HalfOpen              // a few requests pass, to see whether the service is back
)

var stateNames = [...]string{"CLOSED", "OPEN", "HALF_OPEN"}

// String returns CLOSED, OPEN or HALF_OPEN.
func (s State) String() string {
	if s < 0 || int(s) >= len(stateNames) {
		return fmt.Sprintf("State(%d)", int(s))
	}
	return stateNames[s]
}

// MarshalText gives what String does.
func (s State) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// UnmarshalText reads what MarshalText gives.
func (s *State) UnmarshalText(text []byte) error {
	for i, name := range stateNames {
		if name == string(text) {
			*s = State(i)
			return nil
		}
	}
	return fmt.Errorf("tripper: unknown state %q", text)
}

// Outcome is what an attempt tells the circuit breaker.
type Outcome int

const (
	Ignored Outcome = iota // says nothing about the service; an answered probe still shows that it lives
	Success
	Failure
)

// ErrRejected is what every error matches (errors.Is) that refuses a request
// locally, with nothing sent. It is never retried.
var ErrRejected = errors.New("tripper: request rejected")

// An OpenError rejects a request because its service's circuit breaker is open
// (or half-open, with all its probes under way). It matches ErrRejected. It is
// shared by all requests that are rejected between two transitions: do not
// change it.
type OpenError struct {
	Service string
	Until   time.Time // when the next probe is let through; in the past while probes are under way
	Last    error     // the failure that opened the breaker
}

// Error names the service, the time and the failure. It holds no URL.
func (e *OpenError) Error() string {
	return fmt.Sprintf("tripper: circuit breaker open for %s until %s: %v", e.Service, e.Until.Format(time.RFC3339), e.Last)
}

// Is reports whether target is ErrRejected. Last is not looked into: it is
// another request's error.
func (e *OpenError) Is(target error) bool { return target == ErrRejected }

var errTripped = errors.New("tripped by hand")

// A breaker is the state machine of one service. Its methods take the time as
// an argument and require that mu is held.
//
// Every attempt carries the generation it was admitted in, and each transition
// begins a new one, so a late result changes nothing.
type breaker struct {
	policy  *BreakerPolicy
	service string
	gate    *atomic.Uint64 // where a healthy service's attempts look instead of here

	rejection atomic.Pointer[rejection] // what an open or half-open breaker answers; nil when closed

	mu          sync.Mutex // guards the fields below, and writes of gate and rejection
	state       State
	since       time.Time // when state began
	generation  uint64
	failures    int           // in a row; CLOSED
	successes   int           // of probes; HALF_OPEN
	probes      int           // under way; HALF_OPEN
	recovery    time.Duration // how long the next opening lasts
	outage      time.Time     // when CLOSED was left
	cause       error         // of the last failure that counted
	lastFailure time.Time     // also of one that came too late to count
	lastCause   error
	window      window

	spent        [3]time.Duration // in each state, without the current stay
	transitions  uint64
	recoveries   uint64
	recoveryTime time.Duration

	pending    []StateChange // not delivered yet
	delivering bool
}

// The gate of a service is its breaker's generation and three flags.
const (
	gateShut      = 1 << iota // an attempt needs the breaker's word to pass
	gateWatched               // its success must be told to the breaker
	gateForgotten             // the registry has let go of the service; set only while nobody uses it
	gateShift     = iota
)

func newBreaker(service string, policy *BreakerPolicy, gate *atomic.Uint64, now time.Time) *breaker {
	return &breaker{service: service, policy: policy, gate: gate, since: now, recovery: policy.RecoveryTimeout}
}

// A permit lets one attempt through.
type permit struct {
	generation uint64
	probe      bool
}

// admit lets an attempt through, or returns why not.
func (b *breaker) admit(now time.Time) (permit, *OpenError) {
	if b.state == Open && !now.Before(b.rejection.Load().Until) {
		b.transition(HalfOpen, now, b.rejection.Load().Last)
	}
	switch {
	case b.state == Closed:
		return permit{generation: b.generation}, nil
	case b.state == HalfOpen && b.probes < b.policy.SuccessThreshold-b.successes:
		b.probes++
		return permit{b.generation, true}, nil
	}
	return permit{}, &b.rejection.Load().OpenError
}

// A rejection spares the requests that it meets a look at the clock: until due,
// they know that it is too early for a probe.
type rejection struct {
	OpenError
	due   atomic.Bool
	timer *time.Timer // sets due; nil if it is set from the start
}

// dueBefore is how long before Until a rejection is due: enough for a timer to
// be late.
const dueBefore = 100 * time.Millisecond

func newRejection(e OpenError, now time.Time) *rejection {
	r := &rejection{OpenError: e}
	if early := e.Until.Sub(now) - dueBefore; early > 0 {
		r.timer = time.AfterFunc(early, func() { r.due.Store(true) })
	} else {
		r.due.Store(true)
	}
	return r
}

// over says that the breaker is no longer open because of r.
func (r *rejection) over() {
	if r != nil && r.timer != nil {
		r.timer.Stop()
	}
}

// stands reports whether r still rejects.
func (r *rejection) stands() bool { return !r.due.Load() || time.Until(r.Until) > 0 }

// A verdict is what an attempt has shown.
type verdict struct {
	outcome  Outcome
	answered bool          // there was a response
	cause    error         // of a Failure
	asked    time.Duration // how long the server asked to be left alone
}

// record takes the verdict on an attempt that admit let through.
func (b *breaker) record(p permit, v verdict, now time.Time) {
	if v.outcome == Failure {
		b.lastFailure, b.lastCause = now, v.cause // for Stats alone
	}
	if b.policy.FailureThreshold < 0 || p.generation != b.generation {
		return
	}
	if v.outcome == Failure {
		b.cause = v.cause
	}
	switch b.state {
	case Closed:
		b.recordClosed(v, now)
	case HalfOpen:
		b.probes--
		b.recordProbe(v, now)
	}
	b.setGate()
}

func (b *breaker) recordClosed(v verdict, now time.Time) {
	switch v.outcome {
	case Ignored:
		return
	case Success:
		b.failures = 0
	case Failure:
		b.failures++
	}
	tooMany := b.failures >= b.policy.FailureThreshold
	if b.policy.FailureRate > 0 {
		total, failed := b.window.add(v.outcome == Failure, now, b.policy.Window)
		tooMany = tooMany || total >= b.policy.MinRequests && failed > 0 && float64(failed)/float64(total) >= b.policy.FailureRate
	}
	if tooMany {
		b.open(now, v.asked, b.cause)
	}
}

func (b *breaker) recordProbe(v verdict, now time.Time) {
	switch {
	case v.outcome == Failure:
		if longest := b.policy.MaxRecoveryTimeout; longest > b.recovery {
			b.recovery = min(b.recovery, longest-b.recovery) + b.recovery // doubled, held to longest
		}
		b.open(now, v.asked, v.cause)
	case v.outcome == Success, v.answered:
		b.successes++
		if b.successes >= b.policy.SuccessThreshold {
			b.recoveries++
			b.recoveryTime += now.Sub(b.outage)
			b.close(now)
		}
	}
}

// longestAsked bounds how long a server's Retry-After keeps a breaker open.
const longestAsked = 10 * time.Minute

func (b *breaker) open(now time.Time, asked time.Duration, cause error) {
	b.openUntil(now.Add(max(b.recovery, min(asked, longestAsked))), now, cause)
}

func (b *breaker) openUntil(until, now time.Time, cause error) {
	b.rejection.Swap(newRejection(OpenError{Service: b.service, Until: until, Last: cause}, now)).over()
	b.transition(Open, now, cause)
}

func (b *breaker) close(now time.Time) {
	b.recovery = b.policy.RecoveryTimeout
	b.transition(Closed, now, nil)
}

// transition is the one place where the state changes. From a state to itself
// it only begins a new generation.
func (b *breaker) transition(to State, now time.Time, cause error) {
	from := b.state
	if from != to {
		change := StateChange{Service: b.service, From: from, To: to, At: now, Failures: b.failures, Cause: cause}
		if to == Open {
			change.Until = b.rejection.Load().Until
		}
		b.pending = append(b.pending, change)
		b.spent[from] += now.Sub(b.since)
		b.transitions++
		b.since = now
		if from == Closed {
			b.outage = now
		}
		b.state = to
	}
	b.generation++
	b.successes, b.probes = 0, 0
	if to == Closed {
		b.failures, b.window = 0, window{}
		b.rejection.Swap(nil).over()
	}
	b.setGate()
}

func (b *breaker) setGate() {
	g := b.generation << gateShift
	if b.state != Closed {
		g |= gateShut
	}
	if b.failures > 0 || b.policy.FailureRate > 0 {
		g |= gateWatched
	}
	if b.gate.Load() != g {
		b.gate.Store(g)
	}
}

// A window counts the outcomes of about the last Window, in ten slots.
type window struct {
	slots []windowSlot
	start time.Time
}

type windowSlot struct {
	turn          int64 // which time around the clock the counts are of
	total, failed int
}

// add counts an outcome and returns the sums.
func (w *window) add(failed bool, now time.Time, length time.Duration) (total, failures int) {
	const n = 10
	if w.slots == nil {
		w.slots, w.start = make([]windowSlot, n), now
	}
	turn := int64(now.Sub(w.start) / max(1, length/n))
	slot := &w.slots[turn%n]
	if slot.turn != turn {
		*slot = windowSlot{turn: turn}
	}
	slot.total++
	if failed {
		slot.failed++
	}
	for _, s := range w.slots {
		if s.turn > turn-n {
			total += s.total
			failures += s.failed
		}
	}
	return total, failures
}

// roundTrip is the breaking RoundTripper: one attempt of req, to the service s,
// through its breaker to the base. The attempt has been counted already.
func (s *service) roundTrip(c *chain, p *policy, counts *cell, req *http.Request) (*http.Response, error) {
	pass, open := s.admit()
	if open != nil {
		counts.others.Add(^uint64(0))
		closeBody(req)
		c.logRejection(s, open)
		return nil, open
	}
	var resp *http.Response
	settled, returned := false, false
	defer func() {
		if returned {
			return
		}
		// The base or a hook has panicked or called Goexit.
		if !settled {
			s.settle(c, pass, verdict{})
		}
		closeResponse(resp)
	}()
	if pass.probe {
		c.deliver(s.rest().breaker)
	}
	var start time.Time
	if p.Breaker.SlowCall > 0 {
		start = time.Now()
	}
	resp, err := oneResult(p.base.RoundTrip(req))
	slow := p.Breaker.SlowCall > 0 && err == nil && time.Since(start) > p.Breaker.SlowCall
	outcome := p.outcome(req, resp, err)
	settled = true
	s.conclude(c, p, pass, outcome, slow, req, resp, err)
	returned = true
	return resp, err
}

// conclude draws the conclusions from the result of an attempt.
func (s *service) conclude(c *chain, p *policy, pass permit, outcome Outcome, slow bool, req *http.Request, resp *http.Response, err error) {
	if outcome == Success && !slow {
		s.succeed(c, pass, req, resp)
	} else {
		s.settle(c, pass, p.judge(outcome, slow, req, resp, err))
	}
}

// succeed settles a successful attempt, or has the end of its response body do
// that. The headers are enough for a probe.
func (s *service) succeed(c *chain, pass permit, req *http.Request, resp *http.Response) {
	switch {
	case streams(resp) && !pass.probe:
		resp.Body = &body{ReadCloser: resp.Body, req: req, chain: c, service: s, generation: pass.generation}
	case s.healthy(pass):
		s.hot.cell().successes.Add(1)
	default:
		s.settle(c, pass, verdict{outcome: Success, answered: true})
	}
}

var errNoResponse = errors.New("tripper: the base RoundTripper returned neither a response nor an error")

// oneResult mends what a RoundTripper must not return: both a response and an
// error, or neither.
func oneResult(resp *http.Response, err error) (*http.Response, error) {
	switch {
	case err == nil && resp == nil:
		return nil, errNoResponse
	case err != nil && resp != nil:
		closeResponse(resp)
		return nil, err
	}
	return resp, err
}

// outcome says what the result of an attempt tells the breaker.
func (p *policy) outcome(req *http.Request, resp *http.Response, err error) Outcome {
	switch {
	case err != nil && cancelled(req, err):
		return Ignored
	case p.Breaker.Outcome != nil:
		return p.Breaker.Outcome(resp, err)
	}
	return DefaultOutcome(resp, err)
}

// judge makes the verdict on an attempt that was no success, or a slow one.
func (p *policy) judge(outcome Outcome, slow bool, req *http.Request, resp *http.Response, err error) verdict {
	v := verdict{outcome: outcome, answered: err == nil}
	switch {
	case outcome == Failure:
		v.cause = cause(req, resp, err)
	case slow:
		v.outcome, v.cause = Failure, fmt.Errorf("slow call: no response headers within %v", p.Breaker.SlowCall)
	}
	if v.outcome == Failure && resp != nil {
		v.asked, _ = RetryAfter(resp.Header, time.Now())
	}
	return v
}

// streams reports whether the end of resp's body is still to come. A 101's
// body is the connection itself, which its caller must get as it is.
func streams(resp *http.Response) bool {
	return resp.Body != nil && reflect.TypeOf(resp.Body) != noBody && resp.StatusCode != http.StatusSwitchingProtocols
}

// noBody is compared instead of http.NoBody: types compare faster than values.
var noBody = reflect.TypeOf(http.NoBody)

// healthy reports whether nothing has gone wrong since pass was given, so that
// the breaker need not know of a success.
func (s *service) healthy(pass permit) bool { return s.gate.Load() == pass.generation<<gateShift }

// admit asks the breaker to let an attempt through. If that makes it a probe,
// there may be a transition to deliver.
func (s *service) admit() (permit, *OpenError) {
	pass := permit{}
	if gate := s.gate.Load(); gate&gateShut == 0 {
		pass.generation = gate >> gateShift
	} else {
		b := s.rest().breaker
		if r := b.rejection.Load(); r != nil && s.gate.Load()&gateShut != 0 && r.stands() {
			return pass, &r.OpenError // without the lock
		}
		b.mu.Lock()
		admitted, rejection := b.admit(time.Now())
		b.mu.Unlock()
		if rejection != nil {
			return pass, rejection
		}
		pass = admitted
	}
	return pass, nil
}

// settle tells the breaker what an attempt has shown, and counts it.
func (s *service) settle(c *chain, pass permit, v verdict) {
	r := s.rest()
	r.breaker.mu.Lock()
	r.breaker.record(pass, v, time.Now())
	r.breaker.mu.Unlock()
	switch { // from here on the attempt does not keep the service from being forgotten
	case v.outcome == Failure:
		r.failures.Add(1)
	case v.outcome == Success, pass.probe && v.answered:
		s.hot.cell().successes.Add(1)
	default:
		r.ignored.Add(1)
	}
	c.deliver(r.breaker)
}

// blocked returns the rejection that an attempt after wait would meet, as far
// as can be told now.
func (s *service) blocked(wait time.Duration) *OpenError {
	if s.gate.Load()&gateShut == 0 {
		return nil
	}
	b := s.rest().breaker
	b.mu.Lock()
	defer b.mu.Unlock()
	if r := b.rejection.Load(); b.state == Open && time.Until(r.Until) > wait {
		return &r.OpenError
	}
	return nil
}

// A body is the response body of a successful attempt while the breaker is
// closed. How it ends settles the attempt, so that a service whose streams
// break off is opened.
type body struct {
	io.ReadCloser
	req        *http.Request
	chain      *chain
	service    *service
	generation uint64
	settled    atomic.Bool
}

func (b *body) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	if err != nil {
		b.settle(err)
	}
	return n, err
}

// Close ends a body well: its reader has had enough.
func (b *body) Close() error {
	b.settle(io.EOF)
	return b.ReadCloser.Close()
}

func (b *body) settle(err error) {
	if b.settled.Load() || b.settled.Swap(true) {
		return
	}
	if events, ok := b.ReadCloser.(*sse.Body); ok && events.Failed() != nil {
		err = events.Failed()
	}
	pass := permit{generation: b.generation}
	if err == io.EOF && b.service.healthy(pass) {
		b.service.hot.cell().successes.Add(1)
		return
	}
	v := verdict{outcome: Success, answered: true}
	switch {
	case err == io.EOF:
	case cancelled(b.req, err):
		v.outcome = Ignored
	default:
		b.service.rest().streamFailures.Add(1)
		v.outcome, v.cause = Failure, cause(b.req, nil, err)
	}
	b.service.settle(b.chain, pass, v)
}
