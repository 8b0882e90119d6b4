// Package tripper gives every call of an HTTP client retries with exponential
// backoff and a circuit breaker per service, with no change at the call sites:
//
//	client := &http.Client{Transport: &tripper.Transport{}}
//
// A [Transport] is an [http.RoundTripper]. It goes into an http.Client, a
// httputil.ReverseProxy or the client of an SDK. Its zero value makes three
// attempts with waits from 1s doubling to 10s, and opens a host's breaker after
// five failures in a row, for 60s. A request passes
//
//	http.Client → Transport: retry (outermost) → Layers → breaker (innermost) → Base
//
// so that each attempt passes the breaker and an open one ends the retries.
//
// [Policy] says what a service needs, [Transport.Hosts] which host gets which
// policy, and [Transport.Stats] what happened.
package tripper

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/url"
	"reflect"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/tripper-go/tripper/internal/circuit"
	"github.com/tripper-go/tripper/internal/drain"
	"github.com/tripper-go/tripper/internal/engine"
	"github.com/tripper-go/tripper/internal/fault"
	"github.com/tripper-go/tripper/internal/hosts"
	"github.com/tripper-go/tripper/internal/redact"
	"github.com/tripper-go/tripper/internal/registry"
	"github.com/tripper-go/tripper/internal/replay"
	"github.com/tripper-go/tripper/internal/sdk"
	"github.com/tripper-go/tripper/internal/sse"
	"github.com/tripper-go/tripper/internal/timeout"
)

// A Transport is an http.RoundTripper that retries, and trips. The zero value
// is ready to use. Its fields must not be changed after its first use; it is
// safe for concurrent use and must not be copied.
//
// It never changes the caller's request, closes its body exactly once, returns
// the last response as it came when attempts run out, and follows no redirects.
// Attempts that need it send a copy of the request, so Base's deprecated
// CancelRequest does not find them; cancel the request's context.
type Transport struct {
	// Base sends the attempts. Nil means http.DefaultTransport.
	Base http.RoundTripper

	// Policy is for every host that Hosts does not name.
	Policy Policy

	// Hosts has the policies of single hosts: "api.anthropic.com",
	// "localhost:8080", "*.example.com" (all names below example.com). A
	// request's host and port are looked up first, then its host, then the
	// longest wildcard. Each policy stands alone: its zero fields mean the
	// defaults, not what Policy says.
	Hosts map[string]Policy

	// Service names the service of a request: what shares one breaker, one
	// retry budget and one row of stats, for example a model or an endpoint.
	// Nil, or a result of "", means the policy's Service, else the host in
	// lower case without the scheme's default port. It must be safe for
	// concurrent use, and say the same each time it is asked about a request.
	// The breaker of a name works by the policy of the host that had it first.
	Service func(*http.Request) string

	// Layers sit between retry and breaker and see every attempt: a rate
	// limiter of your own, request signing. The first is outermost.
	Layers []Layer

	// Logger gets a line for each change of a breaker, at most one a second for
	// the requests that each rejects, and at most ten a second for each service
	// about its retries. Nil means silence.
	Logger *slog.Logger

	// Observers are told of what happens, in this order. Nil means nobody is.
	Observers []*Observer

	// ReplayMemory is how many bytes all recorded request bodies together may
	// hold (see RetryPolicy.BodyLimit). A body for which there is no room has
	// one attempt. Zero means 256 MiB.
	ReplayMemory int64

	used atomic.Pointer[state] // made of the fields above at the first use
	mu   sync.Mutex            // held while it is made
}

// A Layer wraps the RoundTripper that it is given into one that does more. To
// refuse a request for good it returns an error that matches ErrRejected.
type Layer func(next http.RoundTripper) http.RoundTripper

// A RetryError is the final error of a request that made more than one attempt,
// or whose retries something local ended.
type RetryError struct {
	Attempts int   // made
	Err      error // of the last one

	// Stopped is what ended the retries before MaxAttempts, such as the
	// *OpenError of a breaker that has opened meanwhile. Nil if nothing did. It
	// is not part of the chain of wrapped errors: the request was sent.
	Stopped error
}

// Error says how many attempts were made, and what the last one came to.
func (e *RetryError) Error() string {
	attempts := "attempts"
	if e.Attempts == 1 {
		attempts = "attempt"
	}
	return fmt.Sprintf("tripper: giving up after %d %s: %s", e.Attempts, attempts, strings.TrimPrefix(e.Err.Error(), "tripper: "))
}

// Unwrap returns the error of the last attempt.
func (e *RetryError) Unwrap() error { return e.Err }

// Timeout reports whether the last attempt's error is a timeout. (url.Error
// asks the error that it wraps, and looks no deeper.)
func (e *RetryError) Timeout() bool { return fault.IsTimeout(e.Err) }

// Temporary reports whether the last attempt's error calls itself temporary.
func (e *RetryError) Temporary() bool {
	cause, ok := errors.AsType[interface {
		error
		Temporary() bool
	}](e.Err)
	return ok && cause.Temporary()
}

// contextKey finds what this package keeps in a request's context.
type contextKey struct{}

// contextValue says of a context either how its requests are to be retried, or
// which attempt of a request it belongs to.
type contextValue struct {
	change  func(*RetryPolicy)
	attempt int // zero: it belongs to none
}

func valueOf(ctx context.Context) *contextValue {
	v, _ := ctx.Value(contextKey{}).(*contextValue)
	return v
}

// An attemptContext is the context of an attempt. It does what context.WithValue
// would, with one allocation instead of two.
type attemptContext struct {
	context.Context
	value contextValue
}

func ofAttempt(ctx context.Context, number int) context.Context {
	return &attemptContext{ctx, contextValue{attempt: number}}
}

// Value returns the value for a key.
func (c *attemptContext) Value(key any) any {
	if key == (contextKey{}) {
		return &c.value
	}
	return c.Context.Value(key)
}

// WithRetry returns a context whose requests are retried by their own policy:
// change gets a copy of their host's RetryPolicy, with every default resolved,
// and changes what it wants. Of the Budget only a Ratio below zero counts, which
// frees the request from its service's budget. A request whose policy is not
// valid then fails with the error that Validate would give. A nil change changes
// nothing. It must be safe for concurrent use if the context is used so.
func WithRetry(ctx context.Context, change func(*RetryPolicy)) context.Context {
	return context.WithValue(ctx, contextKey{}, &contextValue{change: change})
}

// Attempt returns which attempt of its request a Layer or Base is in, given
// the context of the request that it has: 1 for the first.
func Attempt(ctx context.Context) int {
	if v := valueOf(ctx); v != nil && v.attempt > 0 {
		return v.attempt
	}
	return 1
}

// A state is what a Transport has become at its first use. The services live as
// long as the Transport; the configuration stands apart and could be exchanged.
type state struct {
	transport *Transport
	err       error // what is wrong with the fields
	base      http.RoundTripper
	memory    replay.Memory
	tell      tellers
	services  registry.Registry[service, *service]
	forgotten forgotten
	config    atomic.Pointer[config]

	compose   func()            // makes layers at its first call, and panics at each if a Layer has
	layers    http.RoundTripper // after compose; nil without Layers
	layersErr error
}

// A config is what the configuration amounts to.
type config struct {
	policy *policy
	hosts  hosts.Table[*policy]
	direct bool // the host alone leads to the service

	// shortcuts lead a host, as a request has it, to its service.
	shortcuts registry.Table[route]
	mu        sync.Mutex  // guards others, and writes of shortcuts
	others    int         // shortcuts to services that hosts share
	full      atomic.Bool // there is no room for more of those
}

// A route leads a request to its service, under the policy of its host.
type route struct {
	service *service
	policy  *policy
}

// A policy is a Policy with its defaults resolved.
type policy struct {
	Policy
	base    http.RoundTripper
	circuit circuit.Config
	service string // the service that it names; "": each host its own
	plain   bool   // an attempt's answer below 400 is a success, and nobody asks how long it took

	straight bool // a simple request needs nothing before its first attempt
}

func (t *Transport) load() *state {
	if s := t.used.Load(); s != nil {
		return s
	}
	t.mu.Lock()
	s := t.used.Load()
	if s == nil {
		s = newState(t)
		t.used.Store(s)
	}
	t.mu.Unlock()
	s.tellNew()
	return s
}

// begin is load for the first request.
func (t *Transport) begin(req *http.Request) *state {
	returned := false
	defer func() {
		if !returned { // a hook has panicked or called Goexit
			closeBody(req)
		}
	}()
	st := t.load()
	returned = true
	return st
}

func newState(t *Transport) *state {
	s := &state{transport: t, err: t.Validate(), base: t.Base}
	s.compose = sync.OnceFunc(s.composeLayers)
	if s.base == nil {
		s.base = http.DefaultTransport
	}
	if s.err != nil {
		return s
	}
	s.tell.add(t.Observers)
	s.memory.Limit = t.ReplayMemory
	if s.memory.Limit == 0 {
		s.memory.Limit = 256 << 20
	}
	c := &config{direct: t.Service == nil}
	c.policy = s.newPolicy(t.Policy)
	s.pin(t.Policy.Service, c.policy)
	for pattern, p := range t.Hosts {
		parsed, _ := hosts.ParsePattern(pattern) // valid, says Validate
		resolved := s.newPolicy(p)
		c.hosts.Add(parsed, resolved)
		if parsed.DependsOnScheme() {
			c.direct = false
			if p.Service == "" {
				continue
			}
		}
		s.pin(parsed.Service(p.Service), resolved)
	}
	s.config.Store(c)
	return s
}

// pin makes a service that the configuration names.
func (st *state) pin(name string, p *policy) {
	if name != "" {
		st.services.Add(name, true, func(name string) *service { return newService(name, p, time.Now()) })
	}
}

func (st *state) newPolicy(p Policy) *policy {
	d := p.withDefaults()
	b := d.Breaker
	resolved := &policy{Policy: d, base: st.base, service: p.Service, circuit: circuit.Config{
		FailureThreshold: b.FailureThreshold, RecoveryTimeout: b.RecoveryTimeout, MaxRecoveryTimeout: b.MaxRecoveryTimeout,
		SuccessThreshold: b.SuccessThreshold, FailureRate: b.FailureRate, Window: b.Window, MinRequests: b.MinRequests, Observe: b.Observe,
	}}
	resolved.plain = b.Outcome == nil && b.SlowCall == 0 && len(st.tell.attempt) == 0
	r := &d.Retry
	resolved.straight = r.CheckRetry == nil && r.MaxElapsed == 0 && !r.IdempotencyKey && p.TotalTimeout == 0
	switch {
	case p.Timeout > 0 || p.Idle > 0:
		limited := &timeout.Transport{Base: st.base, Headers: p.Timeout, Idle: p.Idle}
		if p.HoldStream {
			limited.Hold = sse.Hold
		}
		resolved.base = limited
	case p.HoldStream:
		resolved.base = &sse.Transport{Base: st.base}
	}
	return resolved
}

// composeLayers makes the chain of the Layers. It runs outside of all locks: the
// function of a Layer may call any method of the Transport but RoundTrip.
func (st *state) composeLayers() {
	layers := st.transport.Layers
	for i := len(layers) - 1; i >= 0; i-- {
		if st.layers == nil {
			st.layers = (*bottom)(st)
		}
		if st.layers = layers[i](st.layers); st.layers == nil {
			st.layersErr = fmt.Errorf("tripper: Layers[%d] returned nil: want a RoundTripper", i)
			return
		}
	}
}

// route finds the service and the policy of a request. The service is nil if the
// request is not to any service.
func (st *state) route(req *http.Request) (*service, *policy) {
	c := st.config.Load()
	if c.direct {
		if r := c.shortcuts.Get(hosts.WithoutDefaultPort(req.URL.Scheme, req.URL.Host)); r != nil {
			return r.service, r.policy
		}
	}
	return st.find(c, req)
}

// find does what a shortcut spares.
func (st *state) find(c *config, req *http.Request) (*service, *policy) {
	returned := false
	defer func() {
		if !returned { // Transport.Service or a hook has panicked or called Goexit
			closeBody(req)
		}
	}()
	name, p := st.nameOf(c, req)
	returned = name == ""
	if name == "" {
		return nil, p
	}
	s := st.service(name, p)
	returned = true
	if c.direct {
		st.shortcut(c, hosts.WithoutDefaultPort(req.URL.Scheme, req.URL.Host), s, p)
	}
	return s, p
}

// nameOf returns the name of the service that req goes to, and the policy of its
// host.
func (st *state) nameOf(c *config, req *http.Request) (string, *policy) {
	p := c.policy
	if found, ok := c.hosts.Find(req.URL.Scheme, hosts.Split(req.URL.Host)); ok {
		p = found
	}
	if choose := st.transport.Service; choose != nil {
		if name := choose(req); name != "" {
			return name, p
		}
	}
	if p.service != "" {
		return p.service, p
	}
	return hosts.ServiceName(req.URL.Scheme, req.URL.Host), p
}

// service returns the service of that name, which begins if there is none.
func (st *state) service(name string, p *policy) *service {
	if s := st.services.Get(name); s != nil {
		return s
	}
	s, isNew, gone := st.services.Add(name, false, func(name string) *service { return newService(name, p, time.Now()) })
	for _, g := range gone {
		st.letGo(g)
	}
	for _, g := range gone { // an Observer may panic: all of them are in the sums by now
		st.deliver(g)
	}
	if isNew {
		st.tellService(s)
	}
	return s
}

// shortcut makes host lead straight to s under the policy p. There is room for
// every service that is its host's own, and for registry.Max other hosts.
func (st *state) shortcut(c *config, host string, s *service, p *policy) {
	own := s.name == host
	if !own && c.full.Load() {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.shortcuts.Get(host) != nil || !st.services.Has(s) { // forgotten meanwhile
		return
	}
	if own {
		host = s.name
	} else {
		host = strings.Clone(host) // it may be a part of a long URL
		c.others++
		c.full.Store(c.others >= registry.Max)
	}
	c.shortcuts.Put(host, &route{s, p})
}

// letGo ends what led to a service that has just been forgotten, and keeps its
// sums.
func (st *state) letGo(s *service) {
	c := st.config.Load()
	c.mu.Lock()
	if r := c.shortcuts.Get(s.name); r != nil && r.service == s {
		c.shortcuts.Remove(s.name, r)
	}
	c.mu.Unlock()
	st.forgotten.add(s.stats(time.Now()))
}

// enter finds the service of a request and begins to use it, so that it is not
// forgotten. Its life has to be ended afterwards.
func (st *state) enter(req *http.Request) (*service, *policy) {
	for {
		s, p := st.route(req)
		if s == nil || s.life.Begin() {
			if s != nil {
				st.services.Touch(&s.life)
			}
			return s, p
		}
		st.unlink(s) // it has just been forgotten
	}
}

// unlink removes a shortcut that was made while its service was being forgotten.
func (st *state) unlink(s *service) {
	c := st.config.Load()
	c.mu.Lock()
	defer c.mu.Unlock()
	if r := c.shortcuts.Get(s.name); r != nil && r.service == s {
		c.shortcuts.Remove(s.name, r)
	}
}

// RoundTrip sends req to Base, again if need be. It returns the response of the
// last attempt, or its error; after more than one attempt that is a
// *RetryError. An open breaker gives an *OpenError.
func (t *Transport) RoundTrip(req *http.Request) (*http.Response, error) {
	st := t.used.Load()
	if st == nil {
		st = t.begin(req)
	}
	if err := st.refuse(req); err != nil {
		closeBody(req)
		return nil, err
	}
	if req.URL == nil {
		return st.base.RoundTrip(req) // which says so
	}
	s, p := st.enter(req)
	if s == nil {
		return st.base.RoundTrip(req) // not a request to any service
	}
	s.counts.requests.Add(1)
	if p.straight && st.layers == nil && simple(req) {
		return st.goStraight(s, p, req)
	}
	k := call{state: st, service: s, policy: p, retry: &p.Retry, req: req}
	if p.TotalTimeout > 0 {
		return k.within(p.TotalTimeout)
	}
	return k.run()
}

// simple reports whether the first attempt sends req as it is, and nothing has
// to be remembered of it.
func simple(req *http.Request) bool {
	if hasBody(req) && (req.GetBody == nil || !replay.InMemory(req.Body)) {
		return false
	}
	ctx := req.Context()
	return ctx.Err() == nil && valueOf(ctx) == nil && !fault.HasHook(ctx)
}

// goStraight makes the first attempt of a simple request. If that does not go
// well, the request becomes a call, with this attempt behind it. To begin with a
// call would cost the success path a quarter more.
func (st *state) goStraight(s *service, p *policy, req *http.Request) (*http.Response, error) {
	var r result
	handedOver := false
	defer func() {
		switch {
		case handedOver: // the call ends the use of s
		case r.well:
			s.life.EndWell()
		default: // Base or a hook has panicked or called Goexit
			s.rest().failed.Add(1)
			s.life.End()
		}
	}()
	st.attempt(s, p, req, &r)
	if r.well {
		if r.resp.Request != req {
			r.resp.Request = req
		}
		return r.resp, nil
	}
	handedOver = true
	k := call{state: st, service: s, policy: p, retry: &p.Retry, req: req, model: req, result: r, attempts: 1}
	if !k.sent() {
		k.attempts = 0
	}
	return k.run()
}

// refuse returns why req, like every request, cannot be sent, or nil.
func (st *state) refuse(req *http.Request) error {
	if st.err != nil || len(st.transport.Layers) == 0 {
		return st.err
	}
	returned := false
	defer func() {
		if !returned { // the function of a Layer has panicked or called Goexit
			closeBody(req)
		}
	}()
	st.compose()
	returned = true
	return st.layersErr
}

// ServiceOf returns the name of the service that req would go to now, "" if
// none. It begins no service and allocates nothing if the host is in lower case.
func (t *Transport) ServiceOf(req *http.Request) string {
	st := t.load()
	if st.err != nil || req == nil || req.URL == nil {
		return ""
	}
	name, _ := st.nameOf(st.config.Load(), req)
	return name
}

// CloseIdleConnections closes those of Base, if it knows how to.
func (t *Transport) CloseIdleConnections() {
	base := t.Base
	if base == nil {
		base = http.DefaultTransport
	}
	if c, ok := base.(interface{ CloseIdleConnections() }); ok {
		c.CloseIdleConnections()
	}
}

// A result is what an attempt, or all of them, came to. It is made once, by
// judge, and carried as a value.
type result struct {
	resp  *http.Response
	err   error
	early *sse.Failure // err, if an event stream died before its first event
	fault fault.Fault  // of err
	well  bool         // it is a success of which nobody has been told yet
}

// judge makes r what a RoundTripper's answer to req means.
func (r *result) judge(req *http.Request, resp *http.Response, err error) {
	switch {
	case err == nil && resp == nil:
		err = errNoResponse
	case err == nil:
		*r = result{resp: resp}
		return
	case resp != nil: // which must not be
		closeResponse(resp)
	}
	if req != nil && errors.Is(err, context.Canceled) {
		// Not every Base returns the cause. It was not the caller who cancelled.
		if total, ok := errors.AsType[*timeout.Exceeded](context.Cause(req.Context())); ok {
			err = total
		}
	}
	*r = result{err: err}
	if early, ok := errors.AsType[*sse.Failure](err); ok {
		r.early = early
		return
	}
	r.fault = fault.Of(req, err)
}

// answer returns the response that r is or brings, or nil.
func (r *result) answer() *http.Response {
	if r.early != nil {
		return r.early.Response
	}
	return r.resp
}

// status returns the status that r amounts to: a stream that begins with an
// error event means what its status would. It is 0 for an error.
func (r *result) status() int {
	if r.early != nil {
		if event, ok := errors.AsType[*sse.EventError](r.early.Err); ok {
			return event.Status
		}
		return 0
	}
	if r.resp != nil {
		return r.resp.StatusCode
	}
	return 0
}

// sent reports whether the attempt has passed the breaker.
func (r *result) sent() bool { return r.err == nil || !errors.Is(r.err, ErrRejected) }

// A call is a request on its way through its attempts. It belongs to the
// goroutine of the request, on whose stack it stays until a retry is made.
type call struct {
	state   *state
	service *service
	policy  *policy
	retry   *RetryPolicy
	req     *http.Request // the caller's
	model   *http.Request // what every attempt sends: req, or a copy with more headers
	start   time.Time     // set with MaxElapsed or TotalTimeout

	attempts int           // made
	body     *replay.Body  // a recorded body; nil: GetBody gives each attempt its own
	sending  *http.Request // whose body may still have to be closed
	final    bool          // the result asks for a retry, but gets none

	result                // of the attempt before; it stays in hand until the next one has been sent
	wait    time.Duration // before the next attempt
	next    io.ReadCloser // its body, if there is one
	stopped error         // what ended the retries
	dropped error         // the error of Prepare
}

// within runs the call with a limit until the headers of its final response.
func (k *call) within(limit time.Duration) (*http.Response, error) {
	heap := *k
	heap.start = time.Now()
	limited := timeout.Transport{Headers: limit, Total: true, What: "no response", Base: roundTripFunc(func(req *http.Request) (*http.Response, error) {
		heap.req = req
		return heap.run()
	})}
	resp, err := limited.RoundTrip(k.req)
	if late, ok := err.(*timeout.Exceeded); ok { // it has taken the place of what run returned
		heap.req, heap.final = k.req, true
		r := heap.finish(result{err: late})
		return r.resp, r.err
	}
	return resp, err
}

type roundTripFunc func(*http.Request) (*http.Response, error)

func (f roundTripFunc) RoundTrip(req *http.Request) (*http.Response, error) { return f(req) }

// run makes the attempts. The first leaves its result in the call, and so do the
// others: a result is too large to be handed from function to function on the
// success path.
func (k *call) run() (*http.Response, error) {
	returned := false
	defer func() {
		if !returned { // Base, a Layer or a hook has panicked or called Goexit
			k.service.rest().failed.Add(1)
			k.abort()
		}
		if k.well {
			k.service.life.EndWell()
		} else {
			k.service.life.End()
		}
	}()
	if k.model == nil {
		k.first()
	}
	switch {
	case k.well: // nothing else is to be said
	case k.err == nil && k.resp.StatusCode < 400 && k.retry.CheckRetry == nil:
		k.service.counts.ok.Add(1)
	default:
		k.conclude()
	}
	if k.body != nil {
		k.body.Finish()
	}
	if k.resp != nil && k.resp.Request != k.req {
		k.resp.Request = k.req
	}
	returned = true
	return k.resp, k.err
}

// conclude retries the result if need be, and makes it what the caller gets.
func (k *call) conclude() {
	if k.attempts > 0 && k.retry.mayRetry(&k.result) {
		heap := *k                    // it escapes into the engine
		*k = call{service: k.service} // what there is to close is heap's
		heap.again()
		*k = heap
	}
	k.count()
	k.result = k.finish(k.result)
}

// count counts how the request ended.
func (k *call) count() {
	s, r := k.service, &k.result
	switch {
	case r.err == nil && !failedStatus(r.resp.StatusCode):
		s.counts.ok.Add(1)
		if k.attempts > 1 {
			s.rest().recovered.Add(1)
		}
	case !r.sent():
		s.rest().rejected.Add(1)
	case r.err != nil && r.early == nil && cancelled(k.req, r):
		s.rest().cancelled.Add(1)
	default:
		s.rest().failed.Add(1)
	}
}

// finish returns r as the caller gets it: a response, or an error. An SDK that
// retries by itself gets a response also where there is none.
func (k *call) finish(r result) result {
	if r.early != nil {
		return result{resp: r.early.Response}
	}
	if r.err == nil {
		return r
	}
	final := k.final || !r.sent()
	if own := replay.Cause(r.err); own != nil {
		r.err = own // as net/http gives it
	}
	if r.sent() && (k.attempts > 1 || k.stopped != nil) {
		r.err = &RetryError{Attempts: k.attempts, Err: redact.Error(k.req.URL, r.err), Stopped: k.stopped}
	}
	if final && k.forSDK() {
		return result{resp: k.sdkAnswer(r.err)}
	}
	return r
}

// forSDK reports whether the caller is an SDK that retries by itself.
func (k *call) forSDK() bool { return k.policy.SDK == SDKAuto && sdk.Retries(k.req) }

// sdkAnswer returns err as a response. Such an SDK retries every error, which
// would only multiply the attempts, but it obeys a response.
func (k *call) sdkAnswer(err error) *http.Response {
	var wait time.Duration
	if open, ok := errors.AsType[*OpenError](err); ok {
		wait = max(time.Second, time.Until(open.Until))
	}
	status := http.StatusServiceUnavailable
	if fault.IsTimeout(err) {
		status = http.StatusGatewayTimeout
	}
	return sdk.Answer(k.req, status, wait, redact.Error(k.req.URL, err).Error())
}

// first makes the first attempt.
func (k *call) first() {
	ctx := k.req.Context()
	v := valueOf(ctx)
	k.sending = k.req // to be closed if WithRetry's function panics
	if v != nil && v.change != nil {
		if err := k.ownPolicy(v.change); err != nil {
			closeBody(k.req)
			k.result = result{err: err, fault: fault.Fault{Kind: fault.Caller}}
			return
		}
	}
	if ctx.Err() != nil {
		closeBody(k.req)
		k.judge(k.req, nil, context.Cause(ctx)) // as net/http has it
		return
	}
	if k.retry.MaxElapsed > 0 && k.start.IsZero() {
		k.start = time.Now()
	}
	k.model = k.req
	if k.retry.givesKey(k.req) {
		k.model = withKey(k.req)
	}
	k.sending = k.model
	watched := fault.WatchHook(ctx)
	if v != nil { // it is this request's, and not for those that a Layer makes with its context
		watched = ofAttempt(watched, 1)
	}
	if v != nil || fault.HasHook(ctx) {
		k.sending = k.model.WithContext(watched)
	}
	k.takeFirstBody()
	k.send()
}

// ownPolicy takes the request's own policy for the one of its host.
func (k *call) ownPolicy(change func(*RetryPolicy)) error {
	own := k.policy.Retry
	change(&own)
	own = own.withDefaults()
	k.retry = &own
	return errors.Join(own.validate("WithRetry")...)
}

func withKey(req *http.Request) *http.Request {
	keyed := req.WithContext(req.Context())
	if keyed.Header = req.Header.Clone(); keyed.Header == nil {
		keyed.Header = make(http.Header)
	}
	keyed.Header.Set("Idempotency-Key", rand.Text())
	return keyed
}

// takeFirstBody records the body of the first attempt if it may be needed again
// and GetBody will not give it. A body that might fail by itself is watched.
func (k *call) takeFirstBody() {
	if !hasBody(k.req) || k.req.GetBody != nil && replay.InMemory(k.req.Body) {
		return
	}
	if k.sending == k.req {
		k.sending = k.req.WithContext(k.req.Context())
	}
	limit := k.retry.BodyLimit
	if k.req.GetBody != nil || k.retry.MaxAttempts <= 1 {
		k.sending.Body = replay.Watch(k.req.Body)
		return
	}
	body, attempt := replay.New(k.req.Body, k.req.ContentLength, limit, &k.state.memory)
	k.body, k.sending.Body = body, attempt
}

// send makes one attempt, through the Layers if there are any.
func (k *call) send() {
	req := k.sending
	k.attempts++
	switch {
	case k.state.layers != nil:
		resp, err := k.state.layers.RoundTrip(req)
		k.judge(req, resp, err)
	case req.URL != k.req.URL && (req.URL.Host != k.req.URL.Host || req.URL.Scheme != k.req.URL.Scheme):
		k.sending = nil                   // its body is closed there, whatever happens
		k.state.elsewhere(req, &k.result) // Prepare has changed it
	default:
		k.sending = nil
		k.sendStraight(req)
	}
	k.sending = nil // its body is closed
	if !k.sent() {
		k.attempts--
	}
}

// sendStraight makes one attempt at the request's own service.
func (k *call) sendStraight(req *http.Request) {
	k.state.attempt(k.service, k.policy, req, &k.result)
	if k.well && (k.attempts > 1 || k.retry.CheckRetry != nil) {
		k.service.counts.successes.Add(1)
		k.well = false
	}
}

// bottom is the RoundTripper below the Layers. A Layer may have changed the
// host, so it looks for the service anew.
type bottom state

func (b *bottom) RoundTrip(req *http.Request) (*http.Response, error) {
	var r result
	(*state)(b).elsewhere(req, &r)
	if r.early != nil { // a Layer may drop the error, and the response with it
		if kept := drain.Keep(r.early.Response); kept != nil {
			r.early.Response = kept
		}
	}
	return r.resp, r.err
}

// elsewhere makes one attempt of req at the service that it goes to by itself.
func (st *state) elsewhere(req *http.Request, r *result) {
	var s *service
	var p *policy
	if req.URL != nil {
		s, p = st.enter(req)
	}
	if s == nil {
		resp, err := st.base.RoundTrip(req)
		r.judge(req, resp, err)
		return
	}
	defer s.life.End()
	st.attempt(s, p, req, r)
	if r.well {
		s.counts.successes.Add(1)
		r.well = false
	}
}

// again decides about the first attempt's result and, if it is to be retried,
// has go-retryablehttp's loop make the other attempts.
func (k *call) again() {
	returned := false
	defer func() {
		if !returned {
			k.abort()
		}
	}()
	if k.Decide() {
		ctx, stop := waitContext(k.req)
		defer stop()
		if err := engine.Run(ctx, k.retry.MaxAttempts-1, k); err != nil {
			k.result = k.giveUp(err)
		}
	}
	returned = true
}

// giveUp ends the call after the engine stopped between two attempts: because
// the caller left, or because the next request could not be prepared.
func (k *call) giveUp(err error) result {
	k.closeResult()
	k.closeNext()
	switch {
	case k.dropped != nil:
		return result{err: k.dropped, fault: fault.Fault{Kind: fault.Caller}}
	case context.Cause(k.req.Context()) != nil:
		err = context.Cause(k.req.Context())
	case ended(k.req) != nil: // through Request.Cancel, which http.Client closes at its Timeout
		err = ended(k.req)
	}
	k.attempts = min(k.attempts, 1) // the caller's own end of it comes as it is
	return result{err: err, fault: fault.Fault{Kind: fault.Cancelled}}
}

// abort closes what nobody else will close any more.
func (k *call) abort() {
	k.closeResult()
	if k.body != nil {
		k.body.Abort()
		return
	}
	if k.sending != nil {
		closeBody(k.sending)
	}
	k.closeNext()
}

func (k *call) closeResult() {
	closeResponse(k.result.answer())
	k.result = result{}
}

func (k *call) closeNext() {
	if k.next != nil {
		k.next.Close()
		k.next = nil
	}
}

// Wait returns the wait before the next attempt.
func (k *call) Wait() time.Duration { return k.wait }

// Attempt makes the next attempt. If nothing of it is sent, the result before
// stays in hand.
func (k *call) Attempt() {
	before := k.result
	k.result = result{}
	k.send()
	if !k.sent() {
		k.result, k.stopped = before, k.err
		return
	}
	k.service.rest().retries.Add(1)
	closeResponse(before.answer()) // it is in memory
}

// Decide reports whether the result in hand is to be retried, and gets ready for
// it.
func (k *call) Decide() bool {
	if k.stopped != nil {
		k.suppress(stoppedBy(k.stopped))
		return false
	}
	if ended(k.req) != nil || !k.retry.mayRetry(&k.result) || !k.wanted() {
		return false
	}
	var why obstacle
	if k.wait, why = k.plan(time.Now()); why == none {
		why = k.afford()
	}
	if why != none {
		k.suppress(why)
		return false
	}
	k.state.tellRetry(k)
	k.keep()
	return true
}

// keep lets go of the result's connection, and keeps the result as long as it
// may still have to be returned.
func (k *call) keep() {
	resp := k.result.answer()
	if resp == nil {
		return
	}
	kept := drain.Keep(resp)
	switch {
	case kept == nil: // it was too long
		k.result = result{err: redact.StatusError(resp.StatusCode)}
	case k.early != nil:
		k.early.Response = kept
	default:
		k.resp = kept
	}
}

// wanted asks CheckRetry about the result.
func (k *call) wanted() bool {
	ctx := k.req.Context()
	if k.retry.CheckRetry == nil {
		return k.result.retryable()
	}
	var retry bool
	var err error
	if k.err == nil {
		retry, err = k.retry.CheckRetry(ctx, k.resp, nil)
	} else {
		method := valueOr(k.req.Method, http.MethodGet)
		wrapped := &url.Error{Op: method[:1] + strings.ToLower(method[1:]), URL: redact.URL(k.req.URL), Err: k.err}
		if retry, err = k.retry.CheckRetry(ctx, nil, wrapped); err == error(wrapped) {
			err = nil // the caller's http.Client wraps it
		}
	}
	switch {
	case retry:
	case err != nil:
		closeResponse(k.result.answer())
		k.judge(k.req, nil, err)
	case k.result.retryable():
		k.markFinal() // an SDK that retries by itself would not ask this CheckRetry
	}
	return retry
}

func valueOr(s, otherwise string) string {
	if s == "" {
		return otherwise
	}
	return s
}

// plan returns the wait before the next attempt, or what is in its way.
func (k *call) plan(now time.Time) (time.Duration, obstacle) {
	r := k.retry
	switch {
	case k.attempts >= r.MaxAttempts:
		return 0, tooManyAttempts
	case r.Replay == ReplaySafe && !idempotent(k.model) && !k.result.provablyIdle():
		return 0, unsafeMethod
	}
	wait := r.next(k.attempts-1, k.wait, k.resp)
	if resp := k.result.answer(); resp != nil {
		if asked, ok := RetryAfter(resp.Header, now); ok {
			if asked > r.MaxRetryAfter {
				return 0, askedTooMuch
			}
			wait = max(wait, asked)
		}
	}
	if k.outlasts(now, wait) {
		return 0, noTime
	}
	if no := k.service.breaker.Blocked(wait, now); no != nil {
		k.stopped = (*OpenError)(no)
		return 0, breakerOpen
	}
	return wait, none
}

// outlasts reports whether a wait from now on would outlast the request.
func (k *call) outlasts(now time.Time, wait time.Duration) bool {
	if deadline, ok := k.req.Context().Deadline(); ok && deadline.Sub(now) <= wait {
		return true
	}
	if k.start.IsZero() {
		return false
	}
	elapsed := now.Sub(k.start)
	return k.retry.MaxElapsed > 0 && wait > k.retry.MaxElapsed-elapsed ||
		k.policy.TotalTimeout > 0 && wait >= k.policy.TotalTimeout-elapsed
}

// afford takes what the next attempt needs: a token of the budget and a request
// body. It returns what is missing.
func (k *call) afford() obstacle {
	switch {
	case k.body != nil && !k.body.Replayable():
		return bodyGone // and nothing is spent
	case k.retry.Budget.Ratio >= 0 && !k.service.spend():
		return noBudget
	case !k.takeBody(): // last, for it ends an upload that may still be going on
		return bodyGone
	}
	return none
}

// takeBody gets the body of the next attempt while there still is a result to
// return if that fails.
func (k *call) takeBody() bool {
	if !hasBody(k.req) {
		return true
	}
	if k.body != nil {
		attempt := k.body.Next()
		if attempt != nil {
			k.next = attempt
		}
		return attempt != nil
	}
	if k.req.GetBody == nil { // it was not recorded
		return false
	}
	next, err := k.req.GetBody()
	if err == nil {
		k.next = replay.Watch(next)
	}
	return err == nil
}

// suppress says that a retry that was wanted is not made, and why.
func (k *call) suppress(why obstacle) {
	k.service.rest().suppressed[why].Add(1)
	k.markFinal()
	k.state.tellNoRetry(k, why)
}

// markFinal notes that the result is final though it may look like one to retry,
// and tells an SDK that retries by itself.
func (k *call) markFinal() {
	k.final = true
	if resp := k.result.answer(); resp != nil && k.forSDK() {
		sdk.MarkFinal(resp)
	}
}

// bodyRelease is how long a retry waits for Base to let go of the body of the
// attempt before.
const bodyRelease = 5 * time.Second

// Prepare makes the next attempt's request.
func (k *call) Prepare() error {
	if err := ended(k.req); err != nil {
		return err
	}
	if a, ok := k.next.(*replay.Attempt); ok {
		a.Wait(k.req.Context().Done(), bodyRelease)
	}
	ctx := ofAttempt(fault.WatchHook(k.req.Context()), k.attempts+1)
	if k.retry.Prepare == nil {
		k.sending = k.model.WithContext(ctx)
	} else {
		k.sending = k.model.Clone(ctx)
		k.sending.Trailer = k.model.Trailer // filled in while the body is read
	}
	if k.next != nil {
		k.sending.Body, k.next = k.next, nil
	}
	if k.retry.Prepare == nil {
		return nil
	}
	body := k.sending.Body
	err := k.retry.Prepare(k.sending)
	if body != nil && k.sending.Body != body {
		body.Close() // Prepare has put another one in its place
	}
	if err != nil {
		closeBody(k.sending)
		k.sending, k.dropped = nil, err
	}
	return err
}

// waitContext returns a context that ends when the caller ends req.
func waitContext(req *http.Request) (context.Context, context.CancelFunc) {
	ctx, stop := req.Context(), context.CancelFunc(func() {})
	//lint:ignore SA1019 callers still use it
	if cancel := req.Cancel; cancel != nil {
		ctx, stop = context.WithCancel(ctx)
		go func() {
			select {
			case <-cancel:
				stop()
			case <-ctx.Done():
			}
		}()
	}
	return ctx, stop
}

// ended returns how the caller has ended req, or nil. An http.Client with a
// Timeout ends it through both the context and the older channel.
func ended(req *http.Request) error {
	if err := req.Context().Err(); err != nil {
		return err
	}
	select {
	case <-req.Cancel: //lint:ignore SA1019 callers still use it
		if deadline, ok := req.Context().Deadline(); ok && time.Until(deadline) <= 0 {
			return context.DeadlineExceeded
		}
		return context.Canceled
	default:
		return nil
	}
}

// late reports whether it was time that ended req: the context's deadline, or
// TotalTimeout.
func late(req *http.Request) bool {
	why := ended(req)
	if why == context.Canceled {
		return is[*timeout.Exceeded](context.Cause(req.Context()))
	}
	return why != nil
}

// cancelled reports whether r comes of the caller's cancelling req, by whatever
// means.
func cancelled(req *http.Request, r *result) bool {
	if ended(req) != nil {
		return !late(req)
	}
	return r.fault.Kind == fault.Cancelled
}

func closeBody(req *http.Request) {
	if req.Body != nil {
		req.Body.Close()
	}
}

func closeResponse(resp *http.Response) {
	if resp != nil && resp.Body != nil {
		resp.Body.Close()
	}
}

func hasBody(req *http.Request) bool { return req.Body != nil && reflect.TypeOf(req.Body) != noBody }
