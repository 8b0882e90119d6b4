package tripper

import (
	"cmp"
	"context"
	"iter"
	"log/slog"
	"net/http"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/tripper-go/tripper/internal/circuit"
	"github.com/tripper-go/tripper/internal/hosts"
	"github.com/tripper-go/tripper/internal/pace"
	"github.com/tripper-go/tripper/internal/redact"
	"github.com/tripper-go/tripper/internal/registry"
)

// Stats is what one service has been through. Its counters only grow. They
// reconcile once nothing is in flight:
//
//	Requests = OK + Failed + Rejected + Cancelled
//	Attempts = Successes + Failures + Ignored
//
// A request whose response the caller has is over; an attempt is over when its
// response body has ended.
type Stats struct {
	Service string `json:"service"`

	State               State     `json:"state"`
	Since               time.Time `json:"since"`                        // when State began
	OpenUntil           time.Time `json:"open_until,omitzero"`          // of the last opening; zero when CLOSED
	ConsecutiveFailures int       `json:"consecutive_failures"`         // in CLOSED
	HalfOpenSuccesses   int       `json:"half_open_successes"`          // in HALF_OPEN
	LastFailure         time.Time `json:"last_failure,omitzero"`        // when; zero means none yet
	LastFailureCause    string    `json:"last_failure_cause,omitempty"` // what

	Requests  uint64 `json:"requests"`
	OK        uint64 `json:"ok"`        // answered, with anything but 408, 429 and 500 to 599
	Failed    uint64 `json:"failed"`    // an error, one of those statuses, or an event stream that died early
	Rejected  uint64 `json:"rejected"`  // ended by an ErrRejected
	Cancelled uint64 `json:"cancelled"` // by the caller

	Attempts       uint64 `json:"attempts"` // that the breaker let through
	Successes      uint64 `json:"successes"`
	Failures       uint64 `json:"failures"`
	Ignored        uint64 `json:"ignored"`
	StreamFailures uint64 `json:"stream_failures"` // response bodies that broke off

	Retries    uint64     `json:"retries"`
	Recovered  uint64     `json:"recovered"` // requests that were OK after a retry
	Exhausted  uint64     `json:"exhausted"` // requests that ran out of attempts
	Suppressed Suppressed `json:"suppressed"`

	BudgetTokens float64 `json:"budget_tokens"` // retries that the budget allows now; 0 without a budget

	Transitions  uint64        `json:"transitions"`
	Opened       uint64        `json:"opened"` // transitions to OPEN
	HalfOpened   uint64        `json:"half_opened"`
	Closed       uint64        `json:"closed"`
	TimeClosed   time.Duration `json:"time_closed_ns"`
	TimeOpen     time.Duration `json:"time_open_ns"`
	TimeHalfOpen time.Duration `json:"time_half_open_ns"`
	Recoveries   uint64        `json:"recoveries"`       // returns to CLOSED through successful probes
	RecoveryTime time.Duration `json:"recovery_time_ns"` // the sum of how long each took since CLOSED was left
}

// Suppressed counts the retries that were wanted but not made, by reason.
type Suppressed struct {
	Budget     uint64 `json:"budget"`      // the service's retry budget was empty
	Deadline   uint64 `json:"deadline"`    // the wait would have outlasted the deadline or MaxElapsed
	RetryAfter uint64 `json:"retry_after"` // the server asked for more than MaxRetryAfter
	Body       uint64 `json:"body"`        // the request body could not be sent again
	Method     uint64 `json:"method"`      // ReplaySafe: the request might have been executed
	Breaker    uint64 `json:"breaker"`     // the breaker has opened meanwhile
}

// A RetryEvent tells of a retry before its wait begins.
type RetryEvent struct {
	Context context.Context // of the request, for what it carries, such as a trace
	Service string
	Method  string
	URL     string        // without user info, query and fragment
	Attempt int           // the number of the attempt to come, 2 for the first retry
	Max     int           // MaxAttempts
	Wait    time.Duration // until then
	Cause   error         // what the attempt before came to
}

// A StateChange tells of a transition of a service's breaker, or, from OPEN to
// OPEN, of a new end of an opening.
type StateChange struct {
	Context  context.Context // of the request behind it; nil without one
	Service  string
	From, To State
	At       time.Time
	Failures int           // with To == Open: in a row, when CLOSED was left
	Until    time.Time     // with To == Open: when the next probe is let through
	Asked    time.Duration // with To == Open: what the server asked for; 0 if it did not
	Cause    error         // the failure behind it; nil when closing
	Origin   Origin
}

// An AttemptEvent tells of an attempt at its response headers (with HoldStream,
// at the first event of a stream) or at its error.
type AttemptEvent struct {
	Context  context.Context // of the request, as the base had it
	Service  string
	Method   string
	Attempt  int // 1 for the first
	Start    time.Time
	Duration time.Duration
	Status   int // of the response; 0 with an error
	Outcome  Outcome
	Err      error // without the secrets of the request's URL
}

// An Observer is told of what happens. Functions that are nil cost nothing. They
// are called by the goroutine of a request, may be called concurrently, and may
// call any method of the Transport.
type Observer struct {
	// Attempt is told of each attempt after its response headers or its error.
	Attempt func(AttemptEvent)

	// Retry is told of each retry before its wait.
	Retry func(RetryEvent)

	// StateChange is told of each change of a breaker, in order for each service.
	StateChange func(StateChange)

	// Service is told of each service that begins, before the first attempt of
	// the request that it begins with. Those that the configuration names begin
	// with the Transport's first use. Another request to the service that comes
	// at the same moment does not wait.
	Service func(name string)
}

// tellers are the functions of the Observers that are not nil.
type tellers struct {
	attempt []func(AttemptEvent)
	retry   []func(RetryEvent)
	change  []func(StateChange)
	service []func(string)
	begun   atomic.Bool // the services of the configuration have been told of
}

func (t *tellers) add(observers []*Observer) {
	for _, o := range observers {
		if o.Attempt != nil {
			t.attempt = append(t.attempt, o.Attempt)
		}
		if o.Retry != nil {
			t.retry = append(t.retry, o.Retry)
		}
		if o.StateChange != nil {
			t.change = append(t.change, o.StateChange)
		}
		if o.Service != nil {
			t.service = append(t.service, o.Service)
		}
	}
}

// A service is what shares one breaker, one budget and one row of stats. One
// that is healthy consists of little more than counters; the rest is made when
// something first goes wrong.
type service struct {
	name    string
	life    registry.Life
	breaker circuit.Breaker
	policy  atomic.Pointer[policy] // the one that its breaker and its budget work by
	counts  counters
	trouble atomic.Pointer[trouble]
	created time.Time
}

// counters are those that a request without trouble moves. They only grow. How
// many requests have ended well, each with its only attempt, is what the life of
// the service counts.
type counters struct {
	requests  atomic.Uint64
	attempts  atomic.Uint64 // that the breaker let through
	ok        atomic.Uint64 // requests that are OK, but did not end well with their first attempt
	successes atomic.Uint64 // attempts likewise
}

// trouble is the part of a service that only failures need.
type trouble struct {
	budget pace.Bucket

	failed, rejected, cancelled       atomic.Uint64
	failures, ignored, streamFailures atomic.Uint64
	retries, recovered                atomic.Uint64
	suppressed                        [obstacles]atomic.Uint64

	rejections pacer // of log lines
	lines      pacer
}

// An obstacle is why a retry that is wanted is not made.
type obstacle int

const (
	none obstacle = iota
	tooManyAttempts
	unsafeMethod
	askedTooMuch
	noTime
	breakerOpen
	bodyGone
	noBudget
	refused // by a Layer
	obstacles
)

var obstacleNames = [obstacles]string{
	"", "attempts", "method", "retry_after", "deadline", "breaker", "body", "budget", "rejected",
}

// stoppedBy tells what has refused a retry.
func stoppedBy(err error) obstacle {
	if is[*OpenError](err) {
		return breakerOpen
	}
	return refused
}

func newService(name string, p *policy, now time.Time) *service {
	s := &service{name: name, created: now}
	s.policy.Store(p)
	s.breaker.Init(name, &p.circuit, now)
	return s
}

// rest returns the part of s that only failures need.
func (s *service) rest() *trouble {
	if t := s.trouble.Load(); t != nil {
		return t
	}
	t := &trouble{}
	t.budget.Init(s.budget(), s.created)
	if !s.trouble.CompareAndSwap(nil, t) {
		return s.trouble.Load()
	}
	return t
}

func (s *service) budget() pace.Budget { return pace.Budget(s.policy.Load().Retry.Budget) }

// spend takes a token of the service's budget for a retry.
func (s *service) spend() bool {
	return s.rest().budget.Spend(s.budget(), time.Now(), s.counts.requests.Load())
}

// tokens returns what the service's budget holds.
func (s *service) tokens(now time.Time, requests uint64) float64 {
	b := s.budget()
	if b.Ratio < 0 {
		return 0
	}
	if t := s.trouble.Load(); t != nil {
		return t.budget.Tokens(b, now, requests)
	}
	var fresh pace.Bucket // a service without trouble does not get any for being looked at
	fresh.Init(b, s.created)
	return fresh.Tokens(b, now, requests)
}

// The registry sees a service as follows.

// Life returns what says whether s is in use.
func (s *service) Life() *registry.Life { return &s.life }

// Name returns the name of s.
func (s *service) Name() string { return s.name }

// Forgettable reports whether nothing but a use of s keeps it.
func (s *service) Forgettable() bool { return s.breaker.Forgettable(time.Now()) }

// Forget ends s, if its breaker is not open.
func (s *service) Forget() bool { return s.breaker.Forget(time.Now()) }

// stats takes a snapshot. What ends is read before what begins, so that the
// sums never exceed what they are compared with.
func (s *service) stats(now time.Time) Stats {
	st := Stats{Service: s.name}
	b := s.breaker.Snapshot(now)
	st.State, st.Since, st.OpenUntil = State(b.State), b.Since, b.Until
	st.ConsecutiveFailures, st.HalfOpenSuccesses = b.Failures, b.Successes
	st.LastFailure = b.LastFailure
	if b.LastCause != nil {
		st.LastFailureCause = b.LastCause.Error()
	}
	st.TimeClosed, st.TimeOpen, st.TimeHalfOpen = b.Spent[Closed], b.Spent[Open], b.Spent[HalfOpen]
	st.Opened, st.HalfOpened, st.Closed = b.Entered[Open], b.Entered[HalfOpen], b.Entered[Closed]
	st.Transitions = st.Opened + st.HalfOpened + st.Closed
	st.Recoveries, st.RecoveryTime = b.Recoveries, b.RecoveryTime
	if t := s.trouble.Load(); t != nil {
		t.fill(&st)
	}
	well := s.life.EndedWell()
	st.OK, st.Successes = well+s.counts.ok.Load(), well+s.counts.successes.Load()
	st.Attempts, st.Requests = s.counts.attempts.Load(), s.counts.requests.Load()
	st.BudgetTokens = s.tokens(now, st.Requests)
	return st
}

func (t *trouble) fill(st *Stats) {
	st.Failed, st.Rejected, st.Cancelled = t.failed.Load(), t.rejected.Load(), t.cancelled.Load()
	st.Failures, st.Ignored, st.StreamFailures = t.failures.Load(), t.ignored.Load(), t.streamFailures.Load()
	st.Retries, st.Recovered, st.Exhausted = t.retries.Load(), t.recovered.Load(), t.suppressed[tooManyAttempts].Load()
	st.Suppressed = Suppressed{
		Budget: t.suppressed[noBudget].Load(), Deadline: t.suppressed[noTime].Load(), RetryAfter: t.suppressed[askedTooMuch].Load(),
		Body: t.suppressed[bodyGone].Load(), Method: t.suppressed[unsafeMethod].Load(), Breaker: t.suppressed[breakerOpen].Load(),
	}
}

// forgotten sums up the services that the registry has let go of.
type forgotten struct {
	mu  sync.Mutex // guards sum
	sum Stats
}

func (f *forgotten) add(st Stats) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.sum = f.sum.plus(st)
}

// plus returns the sums of the counters of s and o.
func (s Stats) plus(o Stats) Stats {
	for _, c := range []struct{ into, from *uint64 }{
		{&s.Requests, &o.Requests}, {&s.OK, &o.OK}, {&s.Failed, &o.Failed}, {&s.Rejected, &o.Rejected}, {&s.Cancelled, &o.Cancelled},
		{&s.Attempts, &o.Attempts}, {&s.Successes, &o.Successes}, {&s.Failures, &o.Failures}, {&s.Ignored, &o.Ignored},
		{&s.StreamFailures, &o.StreamFailures}, {&s.Retries, &o.Retries}, {&s.Recovered, &o.Recovered}, {&s.Exhausted, &o.Exhausted},
		{&s.Suppressed.Budget, &o.Suppressed.Budget}, {&s.Suppressed.Deadline, &o.Suppressed.Deadline},
		{&s.Suppressed.RetryAfter, &o.Suppressed.RetryAfter}, {&s.Suppressed.Body, &o.Suppressed.Body},
		{&s.Suppressed.Method, &o.Suppressed.Method}, {&s.Suppressed.Breaker, &o.Suppressed.Breaker},
		{&s.Transitions, &o.Transitions}, {&s.Opened, &o.Opened}, {&s.HalfOpened, &o.HalfOpened}, {&s.Closed, &o.Closed},
		{&s.Recoveries, &o.Recoveries},
	} {
		*c.into += *c.from
	}
	s.TimeClosed += o.TimeClosed
	s.TimeOpen += o.TimeOpen
	s.TimeHalfOpen += o.TimeHalfOpen
	s.RecoveryTime += o.RecoveryTime
	return s
}

// Stats returns what the service has been through, and whether there is such a
// service. Services are named as Transport.Service says; those that the
// configuration names exist from the start.
func (t *Transport) Stats(service string) (Stats, bool) {
	s := t.load().services.Get(service)
	if s == nil {
		return Stats{}, false
	}
	return s.stats(time.Now()), true
}

// All returns the stats of every service, sorted by name.
func (t *Transport) All() iter.Seq[Stats] {
	return func(yield func(Stats) bool) {
		byName := func(a, b *service) int { return cmp.Compare(a.name, b.name) }
		for _, s := range slices.SortedFunc(t.load().services.All, byName) {
			if !yield(s.stats(time.Now())) {
				return
			}
		}
	}
}

// Forgotten returns the sums of the counters of the services that have been let
// go of: together with All they account for every request. Its other fields are
// zero.
func (t *Transport) Forgotten() Stats {
	f := &t.load().forgotten
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.sum
}

// Reset closes the service's breaker and clears the counts that it decides by;
// Stats goes on counting. Attempts in flight no longer count for the breaker.
// It reports whether there is such a service with a breaker, or one that was
// tripped.
func (t *Transport) Reset(name string) bool {
	return t.steer(name, func(s *service) bool {
		now := time.Now()
		if s.policy.Load().circuit.Off() && s.breaker.Forgettable(now) && s.breaker.Snapshot(now).State == circuit.Closed {
			return false
		}
		s.breaker.Reset(now, circuit.ByHand)
		return true
	})
}

// Trip opens the service's breaker by hand for d, or for its RecoveryTimeout if
// d is not above zero. The requests that it rejects are told cause; nil means
// "tripped by hand". Attempts in flight no longer count for the breaker. It works
// for a service with no breaker, too, which closes again when d is over, and for
// one that has not been seen yet, if it is a host that is its own service, or if
// Transport.Service may name it. It reports whether the service is open now.
func (t *Transport) Trip(name string, d time.Duration, cause error) bool {
	st := t.load()
	if st.err != nil {
		return false
	}
	if st.services.Get(name) == nil {
		p := st.policyOf(name)
		if p == nil {
			return false
		}
		st.service(name, p)
	}
	if cause == nil {
		cause = errTripped
	}
	return t.steer(name, func(s *service) bool {
		wait := d
		if wait <= 0 {
			wait = s.policy.Load().circuit.RecoveryTimeout
		}
		now := time.Now()
		s.breaker.Trip(now.Add(wait), now, cause, circuit.ByHand)
		return true
	})
}

// policyOf returns the policy that a service of that name would have, or nil if
// there cannot be one.
func (st *state) policyOf(service string) *policy {
	c := st.config.Load()
	p := c.policy
	if hosts.Valid(service) {
		if found, ok := c.hosts.Find("", hosts.Split(service)); ok {
			p = found
		}
		if p.service == "" && hosts.ServiceName("", service) == service {
			return p
		}
	}
	if st.transport.Service != nil && service != "" {
		return p
	}
	return nil
}

// steer calls do with the service while it cannot be forgotten.
func (t *Transport) steer(name string, do func(*service) bool) (done bool) {
	st := t.load()
	var steered *service
	st.services.Keep(name, func(s *service) { steered, done = s, do(s) })
	if done {
		st.deliver(steered)
	}
	return done
}

// tellNew tells of the services that the configuration names, once.
func (st *state) tellNew() {
	if len(st.tell.service) == 0 || st.tell.begun.Swap(true) {
		return
	}
	for _, s := range slices.Collect(st.services.All) {
		st.tellService(s)
	}
}

func (st *state) tellService(s *service) {
	for _, tell := range st.tell.service {
		tell(s.name)
	}
}

// deliver tells of what has changed at s, in order.
func (st *state) deliver(s *service) {
	s.breaker.Deliver(func(c circuit.Change) {
		st.announce(StateChange{
			Context: c.Context, Service: s.name, From: State(c.From), To: State(c.To), At: c.At, Failures: c.Failures,
			Until: c.Until, Asked: c.Asked, Cause: c.Cause, Origin: Origin(c.Origin),
		})
	})
}

func (st *state) announce(change StateChange) {
	level, message := slog.LevelInfo, "circuit breaker closed"
	switch {
	case change.To == HalfOpen:
		message = "circuit breaker half-open"
	case change.To == Open && change.From == HalfOpen:
		level, message = slog.LevelWarn, "circuit breaker reopened"
	case change.To == Open:
		level, message = slog.LevelError, "circuit breaker opened"
	}
	attrs := []slog.Attr{
		slog.String("service", change.Service),
		slog.String("from", change.From.String()),
		slog.String("to", change.To.String()),
	}
	if change.To == Open {
		attrs = append(attrs, slog.Int("failures", change.Failures), slog.Time("until", change.Until), slog.Any("cause", change.Cause))
	}
	if change.Origin != OriginAttempts {
		attrs = append(attrs, slog.String("origin", change.Origin.String()))
	}
	st.log(context.Background(), level, message, attrs...)
	for _, tell := range st.tell.change {
		tell(change)
	}
}

// tellAttempt tells of an attempt that has come back.
func (st *state) tellAttempt(a *attempt, r *result, outcome Outcome, took time.Duration) {
	e := AttemptEvent{
		Context: a.req.Context(), Service: a.service.name, Method: valueOr(a.req.Method, http.MethodGet),
		Attempt: Attempt(a.req.Context()), Start: a.start, Duration: took, Outcome: outcome,
	}
	if r.err != nil {
		e.Err = redact.Error(a.req.URL, r.err)
	} else {
		e.Status = r.resp.StatusCode
	}
	for _, tell := range st.tell.attempt {
		tell(e)
	}
}

// linesASecond bounds the log lines about each service's retries.
const linesASecond = 10

// tellRetry tells of the retry that k is about to wait for.
func (st *state) tellRetry(k *call) {
	if st.transport.Logger == nil && len(st.tell.retry) == 0 {
		return
	}
	e := RetryEvent{
		Context: k.req.Context(), Service: k.service.name, Method: valueOr(k.req.Method, http.MethodGet), URL: redact.URL(k.req.URL),
		Attempt: k.attempts + 1, Max: k.retry.MaxAttempts, Wait: k.wait, Cause: cause(k.req, &k.result),
	}
	if st.transport.Logger != nil {
		st.logRetry(k, "retrying", slog.Int("attempt", e.Attempt), slog.Int("max", e.Max), slog.Duration("wait", e.Wait), slog.Any("cause", e.Cause))
	}
	for _, tell := range st.tell.retry {
		tell(e)
	}
}

// tellNoRetry tells that a retry that was wanted is not made. A request that was
// to have one attempt wanted none.
func (st *state) tellNoRetry(k *call, why obstacle) {
	if st.transport.Logger == nil || k.retry.MaxAttempts == 1 {
		return
	}
	st.logRetry(k, "not retrying", slog.Int("attempts", k.attempts), slog.String("reason", obstacleNames[why]), slog.Any("cause", cause(k.req, &k.result)))
}

// logRetry logs a line about k's retries, unless there have been too many.
func (st *state) logRetry(k *call, message string, attrs ...slog.Attr) {
	ok, leftOut := k.service.rest().lines.allow(time.Since(k.service.created), linesASecond)
	if !ok {
		return
	}
	all := append([]slog.Attr{
		slog.String("service", k.service.name), slog.String("method", valueOr(k.req.Method, http.MethodGet)), slog.String("url", redact.URL(k.req.URL)),
	}, attrs...)
	if leftOut > 0 {
		all = append(all, slog.Int("left_out", leftOut))
	}
	st.log(k.req.Context(), slog.LevelWarn, message, all...)
}

// logRejection logs at most one rejection a second for each service.
func (st *state) logRejection(s *service, e *circuit.Rejection) {
	if st.transport.Logger == nil {
		return
	}
	ok, leftOut := s.rest().rejections.allow(time.Since(s.created), 1)
	if !ok {
		return
	}
	attrs := []slog.Attr{slog.String("service", e.Service), slog.Time("until", e.Until), slog.Any("cause", e.Last)}
	if leftOut > 0 {
		attrs = append(attrs, slog.Int("left_out", leftOut))
	}
	st.log(context.Background(), slog.LevelError, "circuit breaker open: request rejected", attrs...)
}

// A pacer lets through so many lines a second, and counts the others.
type pacer struct {
	mu      sync.Mutex // guards the fields below
	begun   bool
	second  time.Duration // when the second began that is counted now
	lines   int           // let through in it
	leftOut int           // since the last line that was let through
}

// allow reports whether there may be another line, and how many were left out
// before it.
func (p *pacer) allow(now time.Duration, most int) (ok bool, leftOut int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.begun || now-p.second >= time.Second {
		p.begun, p.second, p.lines = true, now, 0
	}
	if p.lines >= most {
		p.leftOut++
		return false, 0
	}
	leftOut = p.leftOut
	p.lines++
	p.leftOut = 0
	return true, leftOut
}

func (st *state) log(ctx context.Context, level slog.Level, message string, attrs ...slog.Attr) {
	if l := st.transport.Logger; l != nil {
		l.LogAttrs(ctx, level, message, attrs...)
	}
}

// cause returns what an attempt came to, fit for logs, events and messages: no
// user info and no query of the request's URL.
func cause(req *http.Request, r *result) error {
	if r.err == nil {
		return redact.StatusError(r.resp.StatusCode)
	}
	return redact.Error(req.URL, r.err)
}
