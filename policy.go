package tripper

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math"
	"net/http"
	"reflect"
	"slices"
	"time"

	"github.com/hashicorp/go-retryablehttp"

	"github.com/tripper-go/tripper/internal/fault"
	"github.com/tripper-go/tripper/internal/hosts"
	"github.com/tripper-go/tripper/internal/pace"
)

// Policy says how requests to a service are retried and when its circuit
// breaker opens. The zero Policy is ready: three attempts with waits from 1s
// doubling to 10s, and a breaker per host that opens after five failures in a
// row, for 60s. A Policy is a plain value; copy and change it freely until it
// is given to a Transport.
type Policy struct {
	// Service names the breaker, the retry budget and the row of stats, such as
	// "claude_api". Policies with the same name share all three. Empty: each
	// host is its own service.
	Service string

	Retry   RetryPolicy
	Breaker BreakerPolicy

	// Timeout limits each attempt until its response headers have come; the
	// body may take as long as it likes (see Idle). An attempt that exceeds it
	// fails with an error whose Timeout method reports true, and is retried.
	// Zero means no limit.
	Timeout time.Duration

	// Idle limits the silence within a response body: how long one Read may
	// wait for the server. The time that the caller takes between two reads
	// does not count. Zero means no limit.
	Idle time.Duration

	// HoldStream holds back a response of type text/event-stream until its
	// first real event (comments and ping events are none; at most 64 KiB are
	// held). If the stream ends, breaks off or begins with an error event that
	// a retry may cure (overloaded_error, rate_limit_error, api_error,
	// timeout_error, and OpenAI's like them) before that, the attempt has failed and is retried. From
	// the first event on nothing is held, and nothing is sent again; an error
	// event then means for the breaker what its status would. Timeout covers the
	// hold. False means that streams are passed on as they come.
	HoldStream bool

	// TotalTimeout limits all attempts and waits together, until the headers of
	// the response that the caller gets. Unlike a context's deadline it never
	// cuts a body. Zero means no limit.
	TotalTimeout time.Duration

	// SDK says how to treat SDKs that retry by themselves. Zero means SDKAuto.
	SDK SDK
}

// RetryPolicy says what is retried, how often, and how long to wait. The zero
// RetryPolicy has the defaults given at each field. Its functions are called by
// the goroutines of requests and must be safe for concurrent use.
type RetryPolicy struct {
	// MaxAttempts is the number of attempts in all, the first one included.
	// Zero means 3; 1 means never retry.
	MaxAttempts int

	// MinWait and MaxWait bound the wait before a retry, which doubles from
	// MinWait. Zero means 1s and 10s (MinWait, if that is longer than 10s).
	MinWait time.Duration
	MaxWait time.Duration

	// Jitter spreads the waits. Zero means JitterEqual.
	Jitter Jitter

	// MaxRetryAfter is the longest wait that a server may ask for with
	// Retry-After. A response that asks for more goes to the caller at once.
	// Zero means 60s.
	MaxRetryAfter time.Duration

	// MaxElapsed is how long after the request's start a retry may still
	// begin. Zero means no limit.
	MaxElapsed time.Duration

	// Replay says which requests may be sent again. Zero means ReplaySafe.
	Replay Replay

	// IdempotencyKey gives each POST and PATCH request that has none an
	// Idempotency-Key header (draft-ietf-httpapi-idempotency-key-header), the
	// same on every attempt. The caller's request is not changed.
	IdempotencyKey bool

	// BodyLimit is how many bytes of a request body without GetBody are kept,
	// as they are sent, so that they can be sent again. A longer body streams
	// through and has one attempt, unless it can seek. Zero means 1 MiB; below
	// zero means that such bodies are never sent again. All bodies together are
	// bounded by Transport.ReplayMemory.
	BodyLimit int64

	// Budget limits the retries of the service as a whole. The zero Budget
	// allows 20% of its requests and 10 a second.
	Budget Budget

	// CheckRetry decides whether an attempt's result is to be retried. Errors
	// come to it as *url.Error. A returned error replaces the attempt's result
	// when it is not retried. Nil means the function CheckRetry.
	CheckRetry retryablehttp.CheckRetry

	// Backoff chooses the wait before a retry; its attemptNum is 0 before the
	// first one. A server's Retry-After still comes first: the wait is never
	// shorter. Nil means exponential backoff as Jitter says.
	Backoff retryablehttp.Backoff

	// Prepare may change the request of each retry, for example to sign it
	// again. It gets a copy whose headers and URL are its own. An error ends
	// the retries and is returned to the caller. Nil means nothing to do.
	Prepare func(*http.Request) error
}

// BreakerPolicy says when a service's circuit breaker opens and how it closes
// again (https://martinfowler.com/bliki/CircuitBreaker.html). The zero
// BreakerPolicy has the defaults given at each field.
type BreakerPolicy struct {
	// FailureThreshold is how many failures in a row open the breaker: attempts
	// that it admitted one after the other and that have all failed, at their
	// answer or when their body broke off. Ignored attempts in between are passed
	// over; one that has succeeded or is still under way ends the row. Zero means
	// 5; below zero means that rows do not count: with a FailureRate the breaker
	// opens by the rate alone; without one there is none at all.
	FailureThreshold int

	// RecoveryTimeout is how long the breaker stays open before it lets probes
	// through. Zero means 60s.
	RecoveryTimeout time.Duration

	// SuccessThreshold is how many successful probes close the breaker, and
	// also how many may be under way at a time. A probe that has not come back
	// within RecoveryTimeout gives its place to another. Zero means 2.
	SuccessThreshold int

	// MaxRecoveryTimeout, if longer than RecoveryTimeout, makes the time that
	// the breaker stays open double at every failed recovery up to this.
	// Zero means that it stays RecoveryTimeout.
	MaxRecoveryTimeout time.Duration

	// FailureRate also opens the breaker when this share of the attempts
	// that ended within Window, or began in it and are still under way, failed,
	// once there are MinRequests of them: 0.5 is half. Ignored attempts do not
	// count. Zero means off. It costs each attempt a look at the clock and a
	// lock.
	FailureRate float64
	Window      time.Duration // zero means 10s
	MinRequests int           // zero means 20

	// SlowCall counts an attempt whose response headers take longer than this
	// as a failure, also if its caller has left by then. Zero means off. It costs
	// each attempt two looks at the clock.
	SlowCall time.Duration

	// MinDeadline is how much time a caller's deadline must have left the service
	// for its passing to count as a failure; otherwise it is ignored. Zero means
	// one second, or Timeout if that is shorter.
	MinDeadline time.Duration

	// Observe makes the breaker count, change its state and tell of it, but
	// reject nothing, not even when tripped by hand: to try a policy in
	// production.
	Observe bool

	// Outcome says what the result of an attempt tells the breaker. It is not
	// asked about attempts that the caller cancelled: they are ignored.
	// Nil means DefaultOutcome. It must be safe for concurrent use.
	Outcome func(*http.Response, error) Outcome
}

// Budget limits retries to a share of a service's requests, so that an outage
// is not multiplied by the number of attempts. It is a token bucket: each
// request earns Ratio, each second earns MinPerSecond, each retry spends one,
// and it holds at most what ten seconds earn
// (https://twitter.github.io/finagle/guide/Glossary.html, "Retry Budget").
// A service starts with ten seconds' worth of MinPerSecond.
//
// The zero Budget means {Ratio: 0.2, MinPerSecond: 10}. If either field is
// set, both are taken as they stand. A Ratio below zero means no budget:
// retries are not limited.
type Budget struct {
	Ratio        float64
	MinPerSecond float64
}

// Jitter is how waits are spread so that clients do not retry in step. With
// d = MinWait·2ⁿ before retry n (0, 1, …), every wait stays within MinWait and
// MaxWait. JitterFull and JitterDecorrelated are those of
// https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/.
type Jitter int

const (
	JitterEqual        Jitter = iota // evenly from [d, 2d), from [MaxWait/2, MaxWait) once d reaches MaxWait
	JitterFull                       // evenly from [0, d), but at least MinWait
	JitterDecorrelated               // evenly from [MinWait, 3·the wait before)
	JitterNone                       // d
)

var jitterNames = []string{"equal", "full", "decorrelated", "none"}

// String returns equal, full, decorrelated or none.
func (j Jitter) String() string { return nameOf(jitterNames, int(j), "Jitter") }

// MarshalText gives what String does.
func (j Jitter) MarshalText() ([]byte, error) { return []byte(j.String()), nil }

// UnmarshalText reads what MarshalText gives, in upper or lower case.
func (j *Jitter) UnmarshalText(text []byte) error { return parseName(j, jitterNames, text, "jitter") }

// Replay says which requests may be sent again.
type Replay int

const (
	// ReplaySafe retries the idempotent methods (RFC 9110, section 9.2.2) and
	// requests with an Idempotency-Key. Others are retried only when the attempt
	// did nothing: it was never sent (dialling, the TLS handshake or CONNECT
	// failed), the server refused the HTTP/2 stream (RFC 9113, section 8.7), or it
	// answered 429, 529, or 503 with a Retry-After.
	ReplaySafe Replay = iota

	// ReplayAny retries requests of every method.
	ReplayAny
)

var replayNames = []string{"safe", "any"}

// String returns safe or any.
func (r Replay) String() string { return nameOf(replayNames, int(r), "Replay") }

// MarshalText gives what String does.
func (r Replay) MarshalText() ([]byte, error) { return []byte(r.String()), nil }

// UnmarshalText reads what MarshalText gives, in upper or lower case.
func (r *Replay) UnmarshalText(text []byte) error { return parseName(r, replayNames, text, "replay") }

// SDK says how to treat requests of SDKs that retry by themselves: those with an
// X-Stainless-Retry-Count, such as the Claude and OpenAI SDKs send.
type SDK int

const (
	// SDKAuto tells such an SDK, by x-should-retry: false, not to retry a final
	// answer, and gives it an answer also where there is none.
	SDKAuto SDK = iota

	// SDKOff treats its requests like all others.
	SDKOff
)

// DefaultPolicy returns what the zero Policy means, with every default spelled
// out.
func DefaultPolicy() Policy { return Policy{}.withDefaults() }

// HighTraffic returns a Policy for services called so often that failing fast
// beats waiting: 2 attempts, waits from 0.5s to 5s.
func HighTraffic() Policy {
	return attempts(2, 500*time.Millisecond, 5*time.Second)
}

// Critical returns a Policy for services whose success is worth a wait: 5
// attempts, waits from 2s to 30s. Its breaker opens after 10 failures in a row,
// more than one request can cause.
func Critical() Policy {
	p := attempts(5, 2*time.Second, 30*time.Second)
	p.Breaker.FailureThreshold = 10
	return p
}

// BackgroundJob returns a Policy for work that nobody waits for: 10 attempts,
// waits from 5s to 60s. Its breaker opens after 20 failures in a row, more than
// one request can cause.
func BackgroundJob() Policy {
	p := attempts(10, 5*time.Second, time.Minute)
	p.Breaker.FailureThreshold = 20
	return p
}

// Claude returns the Policy for the Claude API: service "claude_api", every
// method retried, 180s for each attempt until its response headers, HoldStream,
// and request bodies of up to 32 MiB, the API's own limit.
func Claude() Policy {
	p := OpenAI()
	p.Service, p.Timeout = "claude_api", 180*time.Second
	return p
}

// OpenAI returns the Policy for the OpenAI API: service "openai_api", every
// method retried, HoldStream, and request bodies of up to 32 MiB.
func OpenAI() Policy {
	p := DefaultPolicy()
	p.Service, p.HoldStream = "openai_api", true
	p.Retry.Replay, p.Retry.BodyLimit = ReplayAny, 32<<20
	return p
}

// Agent returns the Policy for the HTTP actions of agents: service
// "agent_http", every method retried, with an Idempotency-Key for each POST and
// PATCH, and 30s for each attempt until its response headers. Clear Service to
// give each host a breaker of its own.
func Agent() Policy {
	p := DefaultPolicy()
	p.Service, p.Timeout = "agent_http", 30*time.Second
	p.Retry.Replay, p.Retry.IdempotencyKey = ReplayAny, true
	return p
}

func attempts(n int, minWait, maxWait time.Duration) Policy {
	p := DefaultPolicy()
	p.Retry.MaxAttempts, p.Retry.MinWait, p.Retry.MaxWait = n, minWait, maxWait
	return p
}

// withDefaults returns p with its zero fields resolved.
func (p Policy) withDefaults() Policy {
	p.Retry = p.Retry.withDefaults()
	b := &p.Breaker
	setDefault(&b.FailureThreshold, 5)
	setDefault(&b.RecoveryTimeout, time.Minute)
	setDefault(&b.SuccessThreshold, 2)
	setDefault(&b.Window, 10*time.Second)
	setDefault(&b.MinRequests, 20)
	return p
}

func (r RetryPolicy) withDefaults() RetryPolicy {
	setDefault(&r.MaxAttempts, 3)
	setDefault(&r.MinWait, time.Second)
	setDefault(&r.MaxWait, max(10*time.Second, r.MinWait))
	setDefault(&r.MaxRetryAfter, time.Minute)
	setDefault(&r.BodyLimit, 1<<20)
	setDefault(&r.Budget, Budget{Ratio: 0.2, MinPerSecond: 10})
	return r
}

func setDefault[T comparable](field *T, value T) {
	var zero T
	if *field == zero {
		*field = value
	}
}

// A check collects what is wrong with a configuration.
type check struct {
	where string // the struct whose fields are looked at, "Policy.Retry"
	errs  []error
}

func (c *check) want(ok bool, field string, value any, want string) {
	if !ok {
		c.errs = append(c.errs, fmt.Errorf("tripper: %s.%s is %v: want %s", c.where, field, value, want))
	}
}

func notNegative[T int | time.Duration](c *check, field string, v T) {
	c.want(v >= 0, field, v, "zero (the default) or more")
}

// limit wants a limit in time, and finds the one that was given without a unit.
func (c *check) limit(field string, d time.Duration) {
	notNegative(c, field, d)
	c.want(d <= 0 || d >= time.Microsecond, field, d, "a time.Duration with a unit, such as 30*time.Second")
}

func (p Policy) validate(where string) []error {
	c := &check{where: where}
	c.limit("Timeout", p.Timeout)
	notNegative(c, "Idle", p.Idle)
	c.limit("TotalTimeout", p.TotalTimeout)
	c.want(p.SDK == SDKAuto || p.SDK == SDKOff, "SDK", int(p.SDK), "SDKAuto or SDKOff")
	if slow := p.Breaker.SlowCall; slow > 0 && p.Timeout > 0 {
		c.want(slow <= p.Timeout, "Breaker.SlowCall", slow, fmt.Sprintf("at most Timeout, which is %v: no attempt takes longer", p.Timeout))
	}
	return slices.Concat(c.errs, p.Retry.validate(where+".Retry"), p.Breaker.validate(where+".Breaker"))
}

func (r RetryPolicy) validate(where string) []error {
	c := &check{where: where}
	d := r.withDefaults()
	notNegative(c, "MaxAttempts", r.MaxAttempts)
	notNegative(c, "MinWait", r.MinWait)
	notNegative(c, "MaxWait", r.MaxWait)
	c.want(r.MaxWait <= 0 || d.MinWait <= r.MaxWait, "MaxWait", r.MaxWait,
		fmt.Sprintf("at least MinWait, which is %v", d.MinWait))
	c.want(r.Jitter >= JitterEqual && r.Jitter <= JitterNone, "Jitter", int(r.Jitter), "one of the Jitter constants")
	notNegative(c, "MaxRetryAfter", r.MaxRetryAfter)
	notNegative(c, "MaxElapsed", r.MaxElapsed)
	c.want(r.MaxElapsed <= 0 || r.MaxElapsed >= d.MinWait, "MaxElapsed", r.MaxElapsed,
		fmt.Sprintf("at least MinWait, which is %v: no retry could begin", d.MinWait))
	c.want(r.Replay == ReplayAny || r.Replay == ReplaySafe, "Replay", int(r.Replay), "ReplayAny or ReplaySafe")
	c.want(r.Budget.Ratio <= 10 && !math.IsInf(r.Budget.Ratio, 0), "Budget.Ratio", r.Budget.Ratio,
		"a share of the requests, such as 0.2 for 20%, or below zero for no budget")
	c.want(r.Budget.MinPerSecond >= 0 && !math.IsInf(r.Budget.MinPerSecond, 0), "Budget.MinPerSecond", r.Budget.MinPerSecond,
		"zero or more retries a second")
	return c.errs
}

func (b BreakerPolicy) validate(where string) []error {
	c := &check{where: where}
	d := Policy{Breaker: b}.withDefaults().Breaker
	notNegative(c, "RecoveryTimeout", b.RecoveryTimeout)
	notNegative(c, "SuccessThreshold", b.SuccessThreshold)
	c.want(b.MaxRecoveryTimeout == 0 || b.MaxRecoveryTimeout > 0 && b.MaxRecoveryTimeout >= d.RecoveryTimeout, "MaxRecoveryTimeout", b.MaxRecoveryTimeout,
		fmt.Sprintf("zero, or at least RecoveryTimeout, which is %v", d.RecoveryTimeout))
	c.want(b.FailureRate >= 0 && b.FailureRate <= 1, "FailureRate", b.FailureRate, "a share from 0 (off) to 1")
	notNegative(c, "Window", b.Window)
	notNegative(c, "MinRequests", b.MinRequests)
	notNegative(c, "SlowCall", b.SlowCall)
	notNegative(c, "MinDeadline", b.MinDeadline)
	return c.errs
}

// Validate reports what is wrong with t's configuration: every field that
// cannot work, by name, value and what is wanted. It changes nothing and may
// be called at any time.
func (t *Transport) Validate() error {
	errs := t.Policy.validate("Policy")
	switch base := reflect.ValueOf(t.Base); {
	case t.Base == http.RoundTripper(t):
		errs = append(errs, errors.New("tripper: Base is the Transport itself: want the RoundTripper below it"))
	case base.Kind() == reflect.Pointer && base.IsNil():
		errs = append(errs, fmt.Errorf("tripper: Base is a nil %T: want a RoundTripper, or no Base at all", t.Base))
	}
	if t.ReplayMemory < 0 {
		errs = append(errs, fmt.Errorf("tripper: ReplayMemory is %d: want zero (the default) or more", t.ReplayMemory))
	}
	for i, layer := range t.Layers {
		if layer == nil {
			errs = append(errs, fmt.Errorf("tripper: Layers[%d] is nil: want a Layer", i))
		}
	}
	for i, o := range t.Observers {
		if o == nil {
			errs = append(errs, fmt.Errorf("tripper: Observers[%d] is nil: want an Observer", i))
		}
	}
	return errors.Join(append(errs, t.validateHosts()...)...)
}

// validateHosts looks at each host's policy, and at what they have in common.
func (t *Transport) validateHosts() (errs []error) {
	patterns := make(map[hosts.Pattern]string)
	shared := map[string]namedPolicy{t.Policy.Service: {"Policy", t.Policy}}
	delete(shared, "") // an unnamed Policy gives each host a service of its own
	for _, pattern := range slices.Sorted(maps.Keys(t.Hosts)) {
		p, field := t.Hosts[pattern], fmt.Sprintf("Hosts[%q]", pattern)
		errs = append(errs, p.validate(field)...)
		key, err := hosts.ParsePattern(pattern)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		if other, ok := patterns[key]; ok {
			errs = append(errs, fmt.Errorf("tripper: Hosts[%q] and Hosts[%q] are the same host: want one of them", other, pattern))
		}
		patterns[key] = pattern
		name := key.Service(p.Service)
		if name == "" {
			continue
		}
		if other, ok := shared[name]; ok && !other.policy.sameService(p) {
			errs = append(errs, fmt.Errorf(
				"tripper: %s and %s name the same service %q with different Breaker or Budget: want them equal", other.field, field, name))
		}
		shared[name] = namedPolicy{field, p}
	}
	return errs
}

type namedPolicy struct {
	field  string
	policy Policy
}

// sameService reports whether p and q ask the same of what policies of one
// service share: its breaker and its budget.
func (p Policy) sameService(q Policy) bool {
	p, q = p.withDefaults(), q.withDefaults()
	outcomes := [2]uintptr{}
	for i, b := range []*BreakerPolicy{&p.Breaker, &q.Breaker} {
		if b.Outcome == nil {
			b.Outcome = DefaultOutcome
		}
		outcomes[i] = reflect.ValueOf(b.Outcome).Pointer()
		b.Outcome = nil
	}
	return outcomes[0] == outcomes[1] && p.Retry.Budget == q.Retry.Budget && reflect.DeepEqual(p.Breaker, q.Breaker)
}

// CheckRetry is the default of RetryPolicy.CheckRetry. It retries timeouts and
// connection errors, and the statuses 408, 429 and 500 to 599; a response's
// x-should-retry header, true or false, overrides the status of any error
// response. It does not retry once ctx has ended, nor what is the caller's own
// fault (a request that net/http refuses, a body that cannot be read), what a
// server or a proxy has refused for good (a certificate, a fatal TLS alert, a 4xx
// to CONNECT), and whatever is an ErrRejected. It never returns an error.
func CheckRetry(ctx context.Context, resp *http.Response, err error) (bool, error) {
	if err != nil {
		var r result
		r.judge(nil, nil, err)
		return ctx.Err() == nil && r.retryable(), nil
	}
	return resp != nil && resp.StatusCode >= 400 && retryableAnswer(resp) && ctx.Err() == nil, nil
}

func retryableAnswer(resp *http.Response) bool {
	switch first(resp.Header, "X-Should-Retry") {
	case "true":
		return true
	case "false":
		return false
	}
	return failedStatus(resp.StatusCode)
}

// first is h.Get for a key in canonical form, which Get would check each time.
func first(h http.Header, key string) string {
	if values := h[key]; len(values) > 0 {
		return values[0]
	}
	return ""
}

func failedStatus(code int) bool {
	return code == http.StatusRequestTimeout || code == http.StatusTooManyRequests || code >= 500 && code <= 599
}

func is[E error](err error) bool {
	_, ok := errors.AsType[E](err)
	return ok
}

// idempotent reports whether req may be executed twice (RFC 9110, section
// 9.2.2). Like net/http it takes a key that is present but empty for a promise
// that is not sent.
func idempotent(req *http.Request) bool {
	switch req.Method {
	case "", http.MethodGet, http.MethodHead, http.MethodOptions, http.MethodTrace, http.MethodPut, http.MethodDelete:
		return true
	}
	return hasIdempotencyKey(req.Header)
}

func hasIdempotencyKey(h http.Header) bool {
	_, ok := h["Idempotency-Key"]
	if !ok {
		_, ok = h["X-Idempotency-Key"]
	}
	return ok
}

// provablyIdle reports whether the attempt did nothing at the server: it was never
// sent, or the server says that it turned it away. A 503 alone does not say so:
// proxies answer it when the connection breaks after the request was sent.
func (r *result) provablyIdle() bool {
	switch r.status() {
	case http.StatusTooManyRequests, 529: // overloaded, of the Claude API and others
		return true
	case http.StatusServiceUnavailable:
		return r.early != nil || first(r.resp.Header, "Retry-After") != "" || first(r.resp.Header, "Retry-After-Ms") != ""
	}
	return r.fault.NeverSent
}

// retryable reports whether CheckRetry would retry r.
func (r *result) retryable() bool {
	switch {
	case r.early != nil: // it was held, and can only have failed in a way that a retry may cure
		return true
	case r.err != nil:
		return retryableError(r.err, r.fault)
	}
	return r.resp.StatusCode >= 400 && retryableAnswer(r.resp)
}

func retryableError(err error, f fault.Fault) bool {
	return f.Kind == fault.Service && !errors.Is(err, ErrRejected) && !errors.Is(err, errNoResponse)
}

// mayRetry reports whether r is a result to think about.
func (r *RetryPolicy) mayRetry(got *result) bool {
	if got.err != nil {
		return got.sent()
	}
	return r.CheckRetry != nil || got.retryable()
}

// DefaultOutcome is the default of BreakerPolicy.Outcome. Transport errors,
// timeouts, 408 and 500 to 599 are failures. Ignored is what says nothing about
// the service: 429, by which a live service asks for patience, a cancelled
// context, a proxy's refusal, and a request that could not be sent as it stands.
// Everything else is a success, other 4xx included: a live service gives them.
func DefaultOutcome(resp *http.Response, err error) Outcome {
	if err == nil && resp == nil {
		return Failure
	}
	r := result{resp: resp}
	if err != nil {
		r.judge(nil, nil, err)
	}
	return r.outcome()
}

// RetryAfter returns how long a response's headers ask a client to wait before
// it retries, and whether they do: retry-after-ms in milliseconds, else
// Retry-After (RFC 9110, section 10.2.3) in seconds, fractions included, or as
// an HTTP date, seen from the answer's own Date or, without one, from now. The
// wait is never negative: a date that has passed gives 0, and what no Duration
// holds gives the longest one. Unreadable values count as absent.
func RetryAfter(h http.Header, now time.Time) (time.Duration, bool) { return pace.RetryAfter(h, now) }

// next returns the wait before retry n (0, 1, …), given the wait before it.
func (r *RetryPolicy) next(n int, last time.Duration, resp *http.Response) time.Duration {
	if r.Backoff != nil {
		return max(0, r.Backoff(r.MinWait, r.MaxWait, n, resp))
	}
	return pace.Backoff{Min: r.MinWait, Max: r.MaxWait, Jitter: pace.Jitter(r.Jitter)}.Wait(n, last)
}

// givesKey reports whether req is to get an Idempotency-Key.
func (r *RetryPolicy) givesKey(req *http.Request) bool {
	return r.IdempotencyKey && (req.Method == http.MethodPost || req.Method == http.MethodPatch) && !hasIdempotencyKey(req.Header)
}
