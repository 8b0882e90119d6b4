package tripper

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"reflect"
	"strings"
	"sync/atomic"
	"time"

	"github.com/tripper-go/tripper/internal/circuit"
	"github.com/tripper-go/tripper/internal/fault"
	"github.com/tripper-go/tripper/internal/redact"
	"github.com/tripper-go/tripper/internal/sse"
)

// State is the state of a circuit breaker.
type State int

const (
	Closed   State = iota // requests pass; failures in a row are counted
	Open                  // requests are rejected
	HalfOpen              // a few requests pass, to see whether the service is back
)

var stateNames = []string{"CLOSED", "OPEN", "HALF_OPEN"}

// String returns CLOSED, OPEN or HALF_OPEN.
func (s State) String() string { return nameOf(stateNames, int(s), "State") }

// MarshalText gives what String does.
func (s State) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// UnmarshalText reads what MarshalText gives, in upper or lower case.
func (s *State) UnmarshalText(text []byte) error { return parseName(s, stateNames, text, "state") }

// Outcome is what an attempt tells the circuit breaker.
type Outcome int

const (
	Ignored Outcome = iota // says nothing about the service
	Success
	Failure
)

var outcomeNames = []string{"ignored", "success", "failure"}

// String returns ignored, success or failure.
func (o Outcome) String() string { return nameOf(outcomeNames, int(o), "Outcome") }

// MarshalText gives what String does.
func (o Outcome) MarshalText() ([]byte, error) { return []byte(o.String()), nil }

// UnmarshalText reads what MarshalText gives, in upper or lower case.
func (o *Outcome) UnmarshalText(text []byte) error {
	return parseName(o, outcomeNames, text, "outcome")
}

// Origin is what is behind a change of a breaker's state.
type Origin int

const (
	OriginAttempts  Origin = iota // what attempts have shown, and time
	OriginHand                    // Trip or Reset
	OriginFleet                   // other processes
	OriginForgotten               // the registry lets go of the service
)

var originNames = []string{"attempts", "hand", "fleet", "forgotten"}

// String returns attempts, hand, fleet or forgotten.
func (o Origin) String() string { return nameOf(originNames, int(o), "Origin") }

// MarshalText gives what String does.
func (o Origin) MarshalText() ([]byte, error) { return []byte(o.String()), nil }

// UnmarshalText reads what MarshalText gives, in upper or lower case.
func (o *Origin) UnmarshalText(text []byte) error { return parseName(o, originNames, text, "origin") }

func nameOf(names []string, i int, kind string) string {
	if i < 0 || i >= len(names) {
		return fmt.Sprintf("%s(%d)", kind, i)
	}
	return names[i]
}

func parseName[T ~int](into *T, names []string, text []byte, kind string) error {
	for i, name := range names {
		if strings.EqualFold(name, string(text)) {
			*into = T(i)
			return nil
		}
	}
	return fmt.Errorf("tripper: unknown %s %q: want one of %s", kind, text, strings.Join(names, ", "))
}

// ErrRejected is what every error matches (errors.Is) that refuses a request
// locally, with nothing of it sent. It is never retried.
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

var (
	errTripped    = errors.New("tripped by hand")
	errNoResponse = errors.New("tripper: the base RoundTripper returned neither a response nor an error")
)

// attempt sends req to the service s, under the policy p, if the breaker admits
// it. The life of s goes on for as long. Whoever calls it counts the attempt's
// success if r says that it went well.
func (st *state) attempt(s *service, p *policy, req *http.Request, r *result) {
	pass, ok := s.breaker.Pass()
	if !ok {
		var no *circuit.Rejection
		if pass, no = s.breaker.Admit(req.Context(), time.Now()); no != nil {
			closeBody(req)
			st.logRejection(s, no)
			r.err = (*OpenError)(no)
			return
		}
	}
	s.counts.attempts.Add(1)
	a := attempt{state: st, service: s, policy: p, req: req, pass: pass}
	defer a.settleAnyhow(r)
	if pass.Probe || !ok && s.policy.Load().circuit.Off() { // Admit may have changed the state
		st.deliver(s)
	}
	a.start = p.clock(req, &st.tell)
	resp, err := p.base.RoundTrip(req)
	a.returned = true
	if err == nil && resp != nil && resp.StatusCode < 400 && p.plain {
		a.resp, r.resp = resp, resp
		a.succeed(r)
	} else {
		r.judge(req, resp, err)
		a.resp = r.answer()
		a.settle(r)
	}
	a.done = true
}

// clock returns the time if anybody will ask how long an attempt took.
func (p *policy) clock(req *http.Request, tell *tellers) (start time.Time) {
	if _, ok := req.Context().Deadline(); ok || p.Breaker.SlowCall > 0 || p.TotalTimeout > 0 || len(tell.attempt) > 0 {
		start = time.Now()
	}
	return start
}

// An attempt is one on its way through the breaker to the base.
type attempt struct {
	state    *state
	service  *service
	policy   *policy
	req      *http.Request
	pass     circuit.Permit
	start    time.Time // zero if nobody asks
	resp     *http.Response
	returned bool // the base has, and the request's body is closed
	settled  bool // the breaker has been told, or the end of the response body will tell it
	done     bool // nothing has panicked
}

// settleAnyhow settles an attempt that has panicked or called Goexit. It closes
// what there is, and leaves nothing of it in r.
func (a *attempt) settleAnyhow(r *result) {
	if a.done {
		return
	}
	switch {
	case !a.settled:
		a.service.settle(a.pass, circuit.Verdict{Context: a.req.Context()})
		defer a.state.deliver(a.service) // last, for a hook may panic as well
	case r.well: // and then a hook has panicked; whoever counts successes will not see it
		a.service.counts.successes.Add(1)
	}
	if !a.returned {
		closeBody(a.req)
	}
	closeResponse(a.resp)
	*r = result{}
}

// succeed settles a successful attempt, or has the end of its response body do
// that. A probe's answer counts at once.
func (a *attempt) succeed(r *result) {
	s, told := a.service, a.pass.Probe
	switch {
	case streams(a.resp):
		if told {
			a.pass = s.breaker.Answer(a.pass, a.req.Context(), time.Now())
		}
		s.life.Begin() // for the body; the attempt's own use goes on, so that it succeeds
		b := &body{ReadCloser: a.resp.Body, req: a.req, state: a.state, service: s, pass: a.pass}
		if !a.start.IsZero() {
			b.excused.Store(a.hurried())
		}
		a.resp.Body = b
	case s.breaker.Indifferent(a.pass):
		r.well = true
	default:
		s.settle(a.pass, circuit.Verdict{Context: a.req.Context(), Outcome: circuit.Success, Ended: true})
		told = true
	}
	a.settled = true
	if told {
		a.state.deliver(s)
	}
}

// settle draws the conclusions from a result that need not be a success.
func (a *attempt) settle(r *result) {
	took := time.Duration(0)
	if !a.start.IsZero() {
		took = time.Since(a.start)
	}
	v := a.verdict(r, took)
	if v.Outcome == circuit.Success && r.err == nil {
		a.succeed(r)
	} else {
		a.service.settle(a.pass, v)
		a.settled = true
		a.state.deliver(a.service)
	}
	if len(a.state.tell.attempt) > 0 {
		a.state.tellAttempt(a, r, Outcome(v.Outcome), took)
	}
}

// verdict says what r tells the breaker.
func (a *attempt) verdict(r *result, took time.Duration) circuit.Verdict {
	v := circuit.Verdict{Context: a.req.Context(), Outcome: circuit.Outcome(a.policy.outcome(a.req, r, a.start, took)), Ended: true}
	slow := a.policy.Breaker.SlowCall
	switch {
	case slow > 0 && took > slow && v.Outcome != circuit.Failure && (r.err == nil || ended(a.req) != nil):
		v.Outcome, v.Cause = circuit.Failure, fmt.Errorf("slow call: no response headers within %v", slow)
	case v.Outcome == circuit.Failure:
		v.Cause = cause(a.req, r)
	}
	if resp := r.answer(); v.Outcome == circuit.Failure && resp != nil {
		v.Asked, _ = RetryAfter(resp.Header, time.Now())
	}
	return v
}

// outcome says what the result of an attempt tells the breaker. The caller's
// own end of it says nothing, but for a deadline that left the service
// MinDeadline and more.
func (p *policy) outcome(req *http.Request, r *result, start time.Time, took time.Duration) Outcome {
	if r.err != nil && r.early == nil {
		switch {
		case cancelled(req, r):
			return Ignored
		case late(req) && !start.IsZero() && took < p.minDeadline():
			return Ignored
		}
	}
	if p.Breaker.Outcome != nil {
		return p.Breaker.Outcome(r.resp, r.err)
	}
	if r.fault.Kind == fault.Cancelled && late(req) {
		return Failure // it was time, though the error does not say so
	}
	return r.outcome()
}

// outcome is the default outcome of r.
func (r *result) outcome() Outcome {
	if status := r.status(); status > 0 {
		return statusOutcome(status)
	}
	if r.early == nil && (!r.sent() || r.fault.Kind == fault.Caller || r.fault.Kind == fault.Cancelled || r.fault.Kind == fault.Proxy) {
		return Ignored
	}
	return Failure
}

// statusOutcome is what a response's status tells the breaker. A 429 comes from
// a live service that asks for patience.
func statusOutcome(status int) Outcome {
	switch {
	case status == http.StatusTooManyRequests:
		return Ignored
	case failedStatus(status):
		return Failure
	}
	return Success
}

// hurried reports whether the caller's deadline leaves the service less than
// MinDeadline.
func (a *attempt) hurried() bool {
	deadline, ok := a.req.Context().Deadline()
	return ok && deadline.Sub(a.start) < a.policy.minDeadline()
}

func (p *policy) minDeadline() time.Duration {
	least := cmp.Or(p.Breaker.MinDeadline, time.Second)
	if p.Breaker.MinDeadline == 0 && p.Timeout > 0 {
		least = min(least, p.Timeout)
	}
	return least
}

// settle tells the breaker what an attempt has shown, and counts it.
func (s *service) settle(pass circuit.Permit, v circuit.Verdict) {
	if v.Outcome != circuit.Success || !s.breaker.Indifferent(pass) {
		s.breaker.Record(pass, v, time.Now())
	}
	switch v.Outcome {
	case circuit.Success:
		s.counts.successes.Add(1)
	case circuit.Failure:
		s.rest().failures.Add(1)
	default:
		s.rest().ignored.Add(1)
	}
}

// streams reports whether the end of resp's body is still to come. A 101's
// body is the connection itself, which its caller must get as it is.
func streams(resp *http.Response) bool {
	return resp.Body != nil && reflect.TypeOf(resp.Body) != noBody && resp.StatusCode != http.StatusSwitchingProtocols
}

// noBody is compared instead of http.NoBody: types compare faster than values.
var noBody = reflect.TypeOf(http.NoBody)

// A body is the response body of a successful attempt. How it ends settles the
// attempt, so that a service whose streams break off is opened.
type body struct {
	io.ReadCloser
	req     *http.Request
	state   *state
	service *service
	pass    circuit.Permit
	excused atomic.Bool // the caller's deadline says nothing: the body has given something, or there was too little time
	settled atomic.Bool
}

func (b *body) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	if n > 0 && !b.excused.Load() {
		b.excused.Store(true)
	}
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
	defer b.service.life.End()
	var event *sse.EventError
	if events, ok := b.ReadCloser.(*sse.Body); ok {
		event = events.Failed()
	}
	s := b.service
	if err == io.EOF && event == nil && s.breaker.Indifferent(b.pass) {
		s.counts.successes.Add(1)
		return
	}
	v := circuit.Verdict{Context: b.req.Context(), Outcome: circuit.Success, Ended: true}
	switch {
	case event != nil:
		v.Outcome, v.Cause = circuit.Failure, event
		if event.Status > 0 {
			v.Outcome = circuit.Outcome(statusOutcome(event.Status))
		}
	case err == io.EOF:
	case ended(b.req) != nil && (!late(b.req) || b.excused.Load()):
		v.Outcome = circuit.Ignored // the caller has left
	case errors.Is(err, context.Canceled) && fault.Of(b.req, err).Kind == fault.Cancelled:
		v.Outcome = circuit.Ignored
	default:
		v.Outcome, v.Cause = circuit.Failure, redact.Error(b.req.URL, err)
	}
	if v.Outcome == circuit.Failure {
		s.rest().streamFailures.Add(1)
	}
	s.settle(b.pass, v)
	b.state.deliver(s)
}
