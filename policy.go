package tripper

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"maps"
	"math"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/hashicorp/go-retryablehttp"

	"github.com/tripper-go/tripper/internal/replay"
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
	// timeout_error) before that, the attempt has failed and is retried. From
	// the first event on nothing is held, and nothing is sent again; an error
	// event then counts as a failure of the stream. False means that streams
	// are passed on as they come.
	HoldStream bool
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

	// Replay says which requests may be sent again. Zero means ReplayAny.
	Replay Replay

	// IdempotencyKey gives each POST and PATCH request that has none an
	// Idempotency-Key header (draft-ietf-httpapi-idempotency-key-header), the
	// same on every attempt. The caller's request is not changed.
	IdempotencyKey bool

	// BodyLimit is how many bytes of a request body without GetBody are kept,
	// as they are sent, so that they can be sent again. A longer body streams
	// through and has one attempt. One that can seek is kept by none of its
	// bytes, but by where it was handed over. Zero means 64 KiB; below zero
	// means that such bodies are never sent again.
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
	// FailureThreshold is how many failures in a row open the breaker.
	// Zero means 5; below zero means that there is no breaker at all.
	FailureThreshold int

	// RecoveryTimeout is how long the breaker stays open before it lets probes
	// through. Zero means 60s.
	RecoveryTimeout time.Duration

	// SuccessThreshold is how many successful probes close the breaker, and
	// also how many may be under way at a time. Zero means 2.
	SuccessThreshold int

	// MaxRecoveryTimeout, if longer than RecoveryTimeout, makes the time that
	// the breaker stays open double at every failed recovery up to this.
	// Zero means that it stays RecoveryTimeout.
	MaxRecoveryTimeout time.Duration

	// FailureRate also opens the breaker when this share of the attempts
	// within Window failed, once there are MinRequests of them: 0.5 is half.
	// Ignored attempts do not count. Zero means off. It costs each attempt a
	// look at the clock and a lock.
	FailureRate float64
	Window      time.Duration // zero means 10s
	MinRequests int           // zero means 20

	// SlowCall counts an attempt whose response headers take longer than this
	// as a failure. Zero means off. It costs each attempt two looks at the
	// clock.
	SlowCall time.Duration

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

// Replay says which requests may be sent again.
type Replay int

const (
	// ReplayAny retries requests of every method.
	ReplayAny Replay = iota

	// ReplaySafe retries the idempotent methods (RFC 9110, section 9.2.2) and
	// requests with an Idempotency-Key. Others are retried only when the
	// attempt provably did nothing: it was never sent, the server refused the
	// HTTP/2 stream (RFC 9113, section 8.7), or it answered 429, 503 or 529.
	ReplaySafe
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
// attempts, waits from 2s to 30s.
func Critical() Policy {
	return attempts(5, 2*time.Second, 30*time.Second)
}

// BackgroundJob returns a Policy for work that nobody waits for: 10 attempts,
// waits from 5s to 60s.
func BackgroundJob() Policy {
	return attempts(10, 5*time.Second, time.Minute)
}

// Claude returns the Policy for the Claude API: service "claude_api", 180s for
// each attempt until its response headers, and HoldStream.
func Claude() Policy {
	p := DefaultPolicy()
	p.Service, p.Timeout, p.HoldStream = "claude_api", 180*time.Second, true
	return p
}

// Agent returns the Policy for the HTTP actions of agents: service
// "agent_http", and 30s for each attempt until its response headers. Clear
// Service to give each host a breaker of its own.
func Agent() Policy {
	p := DefaultPolicy()
	p.Service, p.Timeout = "agent_http", 30*time.Second
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
	setDefault(&r.BodyLimit, 64<<10)
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

func (p Policy) validate(where string) []error {
	c := &check{where: where}
	notNegative(c, "Timeout", p.Timeout)
	notNegative(c, "Idle", p.Idle)
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
	c.want(r.Replay == ReplayAny || r.Replay == ReplaySafe, "Replay", int(r.Replay), "ReplayAny or ReplaySafe")
	c.want(!math.IsNaN(r.Budget.Ratio) && !math.IsInf(r.Budget.Ratio, 0), "Budget.Ratio", r.Budget.Ratio,
		"a share of the requests, or below zero for no budget")
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
	return c.errs
}

// Validate reports what is wrong with t's configuration: every field that
// cannot work, by name, value and what is wanted. It changes nothing and may
// be called at any time.
func (t *Transport) Validate() error {
	errs := t.Policy.validate("Policy")
	if t.Base == http.RoundTripper(t) {
		errs = append(errs, errors.New("tripper: Base is the Transport itself: want the RoundTripper below it"))
	}
	for i, layer := range t.Layers {
		if layer == nil {
			errs = append(errs, fmt.Errorf("tripper: Layers[%d] is nil: want a Layer", i))
		}
	}
	patterns := make(map[hostPort]string)
	shared := map[string]namedPolicy{t.Policy.Service: {"Policy", t.Policy}}
	delete(shared, "") // an unnamed Policy gives each host a service of its own
	for _, pattern := range slices.Sorted(maps.Keys(t.Hosts)) {
		p, field := t.Hosts[pattern], fmt.Sprintf("Hosts[%q]", pattern)
		errs = append(errs, p.validate(field)...)
		key, err := parsePattern(pattern)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		if other, ok := patterns[key]; ok {
			errs = append(errs, fmt.Errorf("tripper: Hosts[%q] and Hosts[%q] are the same host: want one of them", other, pattern))
		}
		patterns[key] = pattern
		name := key.mayName(p)
		if name == "" {
			continue
		}
		if other, ok := shared[name]; ok && !other.policy.sameService(p) {
			errs = append(errs, fmt.Errorf(
				"tripper: %s and %s name the same service %q with different Breaker or Budget: want them equal", other.field, field, name))
		}
		shared[name] = namedPolicy{field, p}
	}
	return errors.Join(errs...)
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

// A hostPort is a host in lower case without a trailing dot, and a port or "".
// In a pattern a host that begins with a dot stands for every name below it.
type hostPort struct{ host, port string }

func parsePattern(pattern string) (hostPort, error) {
	hp := canonicalHost(pattern)
	name, wild := strings.CutPrefix(hp.host, "*.")
	literal, bracketed := strings.CutPrefix(name, "[")
	ok := !strings.ContainsAny(pattern, "/@?#%\\ \t\r\n")
	if bracketed {
		address, err := netip.ParseAddr(strings.TrimSuffix(literal, "]"))
		ok = ok && !wild && strings.HasSuffix(literal, "]") && err == nil && address.Is6()
	} else {
		ok = ok && !strings.ContainsAny(name, "*:[]") && !slices.Contains(strings.Split(name, "."), "")
	}
	if !ok {
		return hp, fmt.Errorf(`tripper: Hosts[%q] is no host: want one such as "api.example.com", "localhost:8080" or "*.example.com"`, pattern)
	}
	port, err := strconv.ParseUint(hp.port, 10, 16)
	if hp.port != "" && (err != nil || strconv.FormatUint(port, 10) != hp.port || port == 0) {
		return hp, fmt.Errorf("tripper: Hosts[%q] has port %q: want 1 to 65535", pattern, hp.port)
	}
	if wild {
		hp.host = "." + name
	}
	return hp, nil
}

// mayName returns the service that a host of the pattern hp has under the
// policy p, or "" if there are many. With the ports 80 and 443 it depends on
// the scheme whether the port is part of the name.
func (hp hostPort) mayName(p Policy) string {
	switch {
	case p.Service != "":
		return p.Service
	case hp.host[0] == '.':
		return ""
	case hp.port == "", hp.schemes():
		return hp.host
	}
	return hp.host + ":" + hp.port
}

// schemes reports whether hp's port is some scheme's default port.
func (hp hostPort) schemes() bool { return hp.port == "80" || hp.port == "443" }

// canonicalHost splits the authority of a URL. It allocates only when there is
// an upper-case letter.
func canonicalHost(authority string) hostPort {
	host, port := authority, ""
	if i := strings.LastIndexByte(host, ':'); i >= 0 && i > strings.LastIndexByte(host, ']') {
		host, port = host[:i], host[i+1:]
	}
	return hostPort{strings.ToLower(strings.TrimRight(host, ".")), port}
}

func defaultPort(scheme string) string {
	switch scheme {
	case "https", "wss":
		return "443"
	case "http", "ws":
		return "80"
	}
	return ""
}

// CheckRetry is the default of RetryPolicy.CheckRetry. It retries timeouts and
// connection errors, and the statuses 408, 429 and 500 to 599; a response's
// x-should-retry header, true or false, overrides the status of any error
// response. It does not retry once ctx has ended, nor certificate, scheme and
// header errors, a server that does not speak TLS, a request body that could
// not be read, and whatever is an ErrRejected. It never returns an error.
func CheckRetry(ctx context.Context, resp *http.Response, err error) (bool, error) {
	if err != nil {
		return ctx.Err() == nil && !permanent(err), nil
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

// permanent reports whether another attempt would fail with err as well.
func permanent(err error) bool {
	return errors.Is(err, ErrRejected) || errors.Is(err, errNoResponse) || errors.Is(err, http.ErrSchemeMismatch) || invalidRequest(err) || badCertificate(err) ||
		is[*replay.ReadError](err) || noTLS(err) || cancelRequested(err)
}

// cancelRequested reports whether the caller has ended a request in a way that
// its context does not show, by http.Transport.CancelRequest. net/http has no
// type for this error.
func cancelRequested(err error) bool {
	return strings.Contains(err.Error(), "net/http: request canceled")
}

// noTLS reports whether the server does not speak TLS. A bad record later on,
// which crypto/tls tells by its text alone, is a broken connection.
func noTLS(err error) bool {
	header, ok := errors.AsType[tls.RecordHeaderError](err)
	later := strings.HasPrefix(header.Msg, "received record") || strings.HasPrefix(header.Msg, "oversized record")
	return ok && (header.Conn != nil || !later)
}

// badCertificate reports whether one side did not accept the other's
// certificate.
func badCertificate(err error) bool {
	if is[*tls.CertificateVerificationError](err) || is[x509.UnknownAuthorityError](err) ||
		is[x509.HostnameError](err) || is[x509.CertificateInvalidError](err) || is[x509.SystemRootsError](err) {
		return true
	}
	// A fatal alert of the peer; its type is crypto/tls's own.
	alert, ok := errors.AsType[*net.OpError](err)
	return ok && alert.Op == "remote error" && strings.Contains(alert.Error(), "certificate")
}

// invalidRequest reports whether err says that the request could not be sent
// as it stands. net/http has no types for these errors.
func invalidRequest(err error) bool {
	text := err.Error()
	for _, s := range []string{"unsupported protocol scheme", "invalid header field", "invalid trailer field",
		"net/http: invalid method", "no Host in request URL", "nil Request.URL", "nil Request.Header",
		"http: ContentLength=", "request body larger than specified content length"} {
		if strings.Contains(text, s) {
			return true
		}
	}
	return false
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

// provablyIdle reports whether an attempt with this result did nothing at the
// server: it was never sent, or was turned away.
func provablyIdle(resp *http.Response, err error) bool {
	if err == nil {
		return resp.StatusCode == http.StatusTooManyRequests || resp.StatusCode == http.StatusServiceUnavailable ||
			resp.StatusCode == 529 // overloaded, of the Claude API and others
	}
	if op, ok := errors.AsType[*net.OpError](err); ok && (op.Op == "dial" || op.Op == "proxyconnect") {
		return true
	}
	stream, ok := errors.AsType[http2StreamError](err)
	return ok && stream.Code == 0x7 || unprocessed(err) // REFUSED_STREAM
}

// unprocessed reports whether net/http would have sent the request again on
// another HTTP/2 stream, had it been able to: its body has no GetBody. That
// error keeps no more than the text of why.
func unprocessed(err error) bool {
	_, why, ok := strings.Cut(err.Error(), "http2: Transport: cannot retry err [")
	return ok && (strings.Contains(why, "REFUSED_STREAM") || strings.Contains(why, "graceful shutdown GOAWAY"))
}

// http2StreamError is what net/http's HTTP/2 stream errors turn into for
// errors.As: they look for a struct with these fields.
type http2StreamError struct {
	StreamID uint32
	Code     uint32
	Cause    error
}

func (http2StreamError) Error() string { return "HTTP/2 stream error" }

// DefaultOutcome is the default of BreakerPolicy.Outcome. Transport errors,
// timeouts, 408, 429 and 500 to 599 are failures. Ignored are other 4xx, which
// a live service gives, and what says nothing about the service: a cancelled
// context, and a request that could not be sent as it stands.
func DefaultOutcome(resp *http.Response, err error) Outcome {
	switch {
	case err != nil && (errors.Is(err, context.Canceled) || errors.Is(err, ErrRejected) ||
		is[*replay.ReadError](err) || invalidRequest(err)):
		return Ignored
	case err != nil || resp == nil || failedStatus(resp.StatusCode):
		return Failure
	case resp.StatusCode >= 400:
		return Ignored
	}
	return Success
}

// RetryAfter returns how long a response's headers ask a client to wait before
// it retries, and whether they do: retry-after-ms in milliseconds, else
// Retry-After (RFC 9110, section 10.2.3) in seconds, fractions included, or as
// an HTTP date in any of its three forms, seen from now. The wait is never
// negative: a date that has passed gives 0, and what no Duration holds gives
// the longest one. Negative and unreadable values count as absent.
func RetryAfter(h http.Header, now time.Time) (time.Duration, bool) {
	if d, ok := parseWait(first(h, "Retry-After-Ms"), time.Millisecond); ok {
		return d, true
	}
	v := strings.TrimSpace(first(h, "Retry-After"))
	if d, ok := parseWait(v, time.Second); ok {
		return d, true
	}
	if v == "" {
		return 0, false
	}
	at, err := http.ParseTime(v)
	if err != nil {
		return 0, false
	}
	return max(0, at.Sub(now)), true
}

func parseWait(s string, unit time.Duration) (time.Duration, bool) {
	if s == "" {
		return 0, false
	}
	v, err := strconv.ParseFloat(strings.TrimSpace(s), 64)
	if err != nil && !errors.Is(err, strconv.ErrRange) || math.IsNaN(v) || v < 0 {
		return 0, false
	}
	if v = math.Round(v * float64(unit)); v < math.MaxInt64 {
		return time.Duration(v), true
	}
	return math.MaxInt64, true
}

// wait returns the backoff before retry n (0, 1, …), given the wait before it.
func (r *RetryPolicy) wait(n int, last time.Duration) time.Duration {
	d := r.MaxWait // MinWait·2ⁿ, held to MaxWait
	if r.MinWait <= r.MaxWait>>n {
		d = r.MinWait << n
	}
	switch r.Jitter {
	case JitterFull:
		return max(r.MinWait, between(0, d))
	case JitterDecorrelated:
		return between(r.MinWait, r.held(max(last, r.MinWait), 3))
	case JitterNone:
		return d
	}
	if d == r.MaxWait {
		return between(max(r.MinWait, d/2), d)
	}
	return between(d, r.held(d, 2))
}

// held returns d·times, held to MaxWait without overflowing.
func (r *RetryPolicy) held(d, times time.Duration) time.Duration {
	if d > r.MaxWait/times {
		return r.MaxWait
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

// A bucket is the token bucket of one service's Budget. Requests are counted
// elsewhere already, so it earns for them only when a retry asks: a service
// that needs no retries pays nothing for its budget.
type bucket struct {
	last     time.Time // when it last earned
	requests uint64    // of the service by then
	recent   float64   // requests of about the last ten seconds
	tokens   float64
}

const budgetSpan = 10 // seconds whose earnings a bucket holds

func newBucket(budget Budget, now time.Time) bucket {
	return bucket{last: now, tokens: budgetSpan * budget.MinPerSecond}
}

// spend takes a token for one retry, if there is one, at a time when the
// service has had so many requests in all.
func (b *bucket) spend(budget Budget, now time.Time, requests uint64) bool {
	if budget.Ratio < 0 {
		return true
	}
	// A request that has been taken back may make the count go back by one.
	elapsed, earned := now.Sub(b.last).Seconds(), max(0, float64(requests)-float64(b.requests))
	if elapsed > budgetSpan {
		earned *= budgetSpan / elapsed // older requests no longer count
	}
	b.last, b.requests = now, requests
	b.recent = b.recent*max(0, 1-elapsed/budgetSpan) + earned
	b.tokens += budget.Ratio*earned + budget.MinPerSecond*elapsed
	b.tokens = min(b.tokens, budgetSpan*budget.MinPerSecond+budget.Ratio*b.recent)
	if b.tokens < 1 {
		return false
	}
	b.tokens--
	return true
}
