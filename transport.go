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
	"net/http/httptrace"
	"net/url"
	"reflect"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/go-retryablehttp"

	"github.com/tripper-go/tripper/internal/drain"
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

	// Layers sit between retry and breaker and see every attempt: a bulkhead,
	// a rate limiter, request signing. The first is outermost.
	Layers []Layer

	// Logger gets a line for each retry and each change of a breaker, and at
	// most one a second for the requests that one rejects. Nil means silence.
	Logger *slog.Logger

	// OnRetry is told of each retry before its wait. OnStateChange is told of
	// each transition of a breaker, in order for each service. Both are called
	// by the goroutine of a request, may be called concurrently, and may call
	// any method of the Transport. Nil means nobody is told.
	OnRetry       func(RetryEvent)
	OnStateChange func(StateChange)

	chain atomic.Pointer[chain] // made of the fields above at the first use
	mu    sync.Mutex            // held while it is made
}

// A Layer wraps the RoundTripper that it is given into one that does more. To
// refuse a request for good it returns an error that matches ErrRejected.
type Layer func(next http.RoundTripper) http.RoundTripper

// A RetryError is the error of a request that made more than one attempt.
type RetryError struct {
	Attempts int   // made
	Err      error // of the last one
}

// Error says how many attempts were made, and what the last one came to.
func (e *RetryError) Error() string {
	return fmt.Sprintf("tripper: giving up after %d attempts: %s", e.Attempts, strings.TrimPrefix(e.Err.Error(), "tripper: "))
}

// Unwrap returns the error of the last attempt.
func (e *RetryError) Unwrap() error { return e.Err }

// Timeout reports whether the last attempt's error is a timeout. (url.Error
// asks the error that it wraps, and looks no deeper.)
func (e *RetryError) Timeout() bool { return isTimeout(e.Err) }

// Temporary reports whether the last attempt's error calls itself temporary.
func (e *RetryError) Temporary() bool {
	cause, ok := errors.AsType[interface {
		error
		Temporary() bool
	}](e.Err)
	return ok && cause.Temporary()
}

func isTimeout(err error) bool {
	cause, ok := errors.AsType[interface {
		error
		Timeout() bool
	}](err)
	return ok && cause.Timeout()
}

type retryKey struct{}

// ownRetry is a request's own RetryPolicy, resolved.
type ownRetry struct {
	RetryPolicy
	err error
}

// WithRetry returns a context whose requests are retried as r says instead of
// their host's policy. Of r.Budget only a Ratio below zero counts, which frees
// the request from its service's budget. A request whose r is not valid fails
// with the error that Validate would give.
func WithRetry(ctx context.Context, r RetryPolicy) context.Context {
	own := &ownRetry{r.withDefaults(), errors.Join(r.validate("WithRetry")...)}
	return context.WithValue(ctx, retryKey{}, own)
}

type attemptKey struct{}

// Attempt returns which attempt of its request a Layer or Base is in, given
// the context of the request that it has: 1 for the first.
func Attempt(ctx context.Context) int {
	if n, ok := ctx.Value(attemptKey{}).(int); ok {
		return n
	}
	return 1
}

// A chain is what a Transport's fields amount to.
type chain struct {
	registry
	transport *Transport
	err       error // what is wrong with them
	base      http.RoundTripper
	layers    http.RoundTripper // nil without Layers
	policy    *policy
	hosts     map[hostPort]*policy
	direct    bool // the host alone leads to the service
}

// A policy is a Policy with its defaults resolved.
type policy struct {
	Policy
	base    http.RoundTripper
	service *service // the one that it names; nil: each host its own
	plain   bool     // without anything that the common case has not
}

func (t *Transport) load() *chain {
	if c := t.chain.Load(); c != nil {
		return c
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.chain.Load() == nil {
		t.chain.Store(newChain(t))
	}
	return t.chain.Load()
}

func newChain(t *Transport) *chain {
	c := &chain{transport: t, err: t.Validate(), base: t.Base, direct: t.Service == nil}
	if c.err != nil {
		return c
	}
	if c.base == nil {
		c.base = http.DefaultTransport
	}
	c.hosts = make(map[hostPort]*policy, len(t.Hosts))
	c.policy = c.newPolicy(t.Policy)
	for pattern, p := range t.Hosts {
		key, _ := parsePattern(pattern) // valid, says Validate
		c.hosts[key] = c.newPolicy(p)
		if key.schemes() {
			c.direct = false
		} else if name := key.mayName(p); name != "" {
			c.add(name, c.hosts[key], true)
		}
	}
	for i := len(t.Layers) - 1; i >= 0; i-- {
		if c.layers == nil {
			c.layers = (*breaking)(c)
		}
		if c.layers = t.Layers[i](c.layers); c.layers == nil {
			c.err = fmt.Errorf("tripper: Layers[%d] returned nil: want a RoundTripper", i)
			break
		}
	}
	return c
}

func (c *chain) newPolicy(p Policy) *policy {
	resolved := &policy{Policy: p.withDefaults(), base: c.base}
	r := p.Retry
	resolved.plain = len(c.transport.Layers) == 0 && r.CheckRetry == nil && r.Replay == ReplayAny && r.MaxElapsed == 0 &&
		!r.IdempotencyKey && p.Breaker.Outcome == nil && p.Breaker.SlowCall == 0
	if p.Timeout > 0 || p.Idle > 0 {
		resolved.base = &timeout.Transport{Base: c.base, Headers: p.Timeout, Idle: p.Idle}
	}
	if p.HoldStream {
		resolved.base = &sse.Transport{Base: resolved.base}
	}
	if p.Service != "" {
		resolved.service = c.add(p.Service, resolved, true)
	}
	return resolved
}

// route finds the service and the policy of a request.
func (c *chain) route(req *http.Request) (*service, *policy) {
	if c.direct {
		if r := c.byHost.get(withoutDefaultPort(req.URL.Scheme, req.URL.Host)); r != nil {
			return r.service, r.policy
		}
	}
	return c.findRoute(req)
}

func withoutDefaultPort(scheme, host string) string {
	n := len(host)
	switch {
	case n >= 4 && host[n-4] == ':' && host[n-3:] == "443" && scheme == "https":
		return host[:n-4]
	case n >= 3 && host[n-3] == ':' && host[n-2:] == "80" && scheme == "http":
		return host[:n-3]
	}
	return host
}

// findRoute does what the shortcut of route spares.
func (c *chain) findRoute(req *http.Request) (*service, *policy) {
	scheme, hp := req.URL.Scheme, canonicalHost(req.URL.Host)
	p := c.policyFor(scheme, hp)
	if name := c.nameOf(req); name != "" {
		return c.serviceNamed(name, p), p
	}
	name := hp.host
	if hp.port != "" && hp.port != defaultPort(scheme) {
		name += ":" + hp.port
	}
	s := p.service
	if s == nil {
		s = c.serviceNamed(name, p)
	}
	if c.direct {
		c.shortcut(name, p, s)
	}
	return s, p
}

// nameOf asks Transport.Service.
func (c *chain) nameOf(req *http.Request) string {
	if c.transport.Service == nil {
		return ""
	}
	returned := false
	defer func() {
		if !returned { // it has panicked or called Goexit
			closeBody(req)
		}
	}()
	name := c.transport.Service(req)
	returned = true
	return name
}

func (c *chain) serviceNamed(name string, p *policy) *service {
	if r := c.byName.get(name); r != nil {
		return r.service
	}
	return c.add(name, p, false)
}

// policyFor looks for host and port first, then the host, then the longest
// wildcard.
func (c *chain) policyFor(scheme string, hp hostPort) *policy {
	if len(c.hosts) == 0 {
		return c.policy
	}
	if hp.port == "" {
		hp.port = defaultPort(scheme)
	}
	for {
		if p := c.hosts[hp]; p != nil {
			return p
		}
		if p := c.hosts[hostPort{host: hp.host}]; p != nil {
			return p
		}
		label := strings.IndexByte(hp.host[min(1, len(hp.host)):], '.')
		if label < 0 {
			return c.policy
		}
		hp.host = hp.host[label+1:]
	}
}

// enter counts a request to its service, which is not forgotten from then on.
func (c *chain) enter(req *http.Request) (*service, *policy, *cell) {
	for {
		s, p := c.route(req)
		k := s.hot.request()
		if s.gate.Load()&gateForgotten == 0 {
			c.touch(s)
			return s, p, k
		}
		k.requests.Add(^uint64(0)) // the service has just been forgotten
	}
}

// RoundTrip sends req to Base, again if need be. It returns the response of the
// last attempt, or its error; after more than one attempt that is a
// *RetryError. An open breaker gives an *OpenError.
func (t *Transport) RoundTrip(req *http.Request) (*http.Response, error) {
	c := t.chain.Load()
	if c == nil {
		c = t.load()
	}
	if c.err != nil {
		closeBody(req)
		return nil, c.err
	}
	if req.URL == nil || req.URL.Host == "" {
		return c.base.RoundTrip(req) // not a request to any service
	}
	ctx := req.Context()
	own, _ := ctx.Value(retryKey{}).(*ownRetry)
	if own != nil && own.err != nil {
		closeBody(req)
		return nil, own.err
	}
	s, p, counts := c.enter(req)
	if own == nil && p.plain && (req.GetBody != nil || !hasBody(req)) && ctx.Err() == nil {
		return c.goStraight(s, p, counts, req)
	}
	retry := &p.Retry
	if own != nil {
		retry = &own.RetryPolicy
	}
	counts.unsent.Add(1) // attempt counts it, if it is made
	return c.goOn(newCall(c, s, p, retry, req), counts, nil, nil)
}

// goStraight is the common case in one piece: the first attempt of a request
// that needs nothing else comes back well. It allocates nothing but the wrapper
// of a response body.
func (c *chain) goStraight(s *service, p *policy, counts *cell, req *http.Request) (*http.Response, error) {
	pass, open := s.admit()
	if open != nil {
		counts.unsent.Add(1)
		s.rest().rejected.Add(1)
		closeBody(req)
		c.logRejection(s, open)
		return finalError(req, open)
	}
	const (
		sending = iota
		answered
		counted
		done
	)
	stage, resp := sending, (*http.Response)(nil)
	defer func() {
		if stage == done {
			return
		}
		// Base or a hook has panicked or called Goexit.
		if stage == sending {
			s.settle(c, pass, verdict{})
			closeBody(req)
		}
		if stage != counted {
			s.rest().failed.Add(1)
		}
		closeResponse(resp)
	}()
	if pass.probe {
		c.deliver(s.rest().breaker)
	}
	resp, err := p.base.RoundTrip(req)
	stage = answered
	if err == nil && resp != nil && resp.StatusCode < 400 {
		if !streams(resp) && s.healthy(pass) {
			counts.well.Add(1)
		} else {
			counts.ok.Add(1)
			stage = counted
			s.succeed(c, pass, req, resp)
		}
		stage = done
		return resp, nil
	}
	resp, err = oneResult(resp, err)
	s.conclude(c, p, pass, p.outcome(req, resp, err), false, req, resp, err)
	stage = done
	if !p.Retry.mayRetry(resp, err) {
		s.count(counts, 1, req, resp, err)
		return resp, err
	}
	k := newCall(c, s, p, &p.Retry, req)
	k.attempts = 1
	return c.goOn(k, counts, resp, err)
}

// goOn makes the attempts of k from where it stands: none or one so far.
func (c *chain) goOn(k *call, counts *cell, resp *http.Response, err error) (*http.Response, error) {
	returned := false
	defer func() {
		if !returned { // Base, a Layer or a hook has panicked or called Goexit
			k.service.rest().failed.Add(1)
			k.abort()
		}
	}()
	if k.attempts == 0 {
		resp, err = k.first()
	}
	if k.attempts > 0 && k.retry.mayRetry(resp, err) {
		resp, err = k.again(resp, err)
	}
	if k.body != nil {
		k.body.Finish()
	}
	returned = true
	k.service.count(counts, k.attempts, k.req, resp, err)
	if early, ok := errors.AsType[*sse.Failure](err); ok {
		resp, err = early.Response, nil
	}
	if err != nil && (k.final || errors.Is(err, ErrRejected)) {
		resp, err = finalError(k.req, err)
	}
	if resp != nil && resp.Request != k.req {
		resp.Request = k.req
	}
	return resp, err
}

// attempt passes req through the Layers and the breaker.
func (c *chain) attempt(s *service, p *policy, req *http.Request) (*http.Response, error) {
	if c.layers != nil {
		return oneResult(c.layers.RoundTrip(req))
	}
	k := s.hot.cell()
	k.others.Add(1)
	return s.roundTrip(c, p, k, req)
}

// breaking is the RoundTripper below the Layers. A Layer may have changed the
// host, so it looks for the service anew, as enter does.
type breaking chain

func (b *breaking) RoundTrip(req *http.Request) (*http.Response, error) {
	c := (*chain)(b)
	if req.URL == nil || req.URL.Host == "" {
		return c.base.RoundTrip(req)
	}
	for {
		s, p := c.route(req)
		k := s.hot.cell()
		k.others.Add(1)
		if s.gate.Load()&gateForgotten == 0 {
			c.touch(s)
			return s.roundTrip(c, p, k, req)
		}
		k.others.Add(^uint64(0))
	}
}

// count counts how a request ended.
func (s *service) count(counts *cell, attempts int, req *http.Request, resp *http.Response, err error) {
	switch {
	case err == nil && !failedStatus(resp.StatusCode):
		counts.ok.Add(1)
		if attempts > 1 {
			s.rest().recovered.Add(1)
		}
	case errors.Is(err, ErrRejected):
		s.rest().rejected.Add(1)
	case err != nil && cancelled(req, err):
		s.rest().cancelled.Add(1)
	default:
		s.rest().failed.Add(1)
	}
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

// cancelled reports whether err comes of the caller's cancelling req, by
// whatever means.
func cancelled(req *http.Request, err error) bool {
	why := ended(req)
	return why == context.Canceled || why == nil && cancelRequested(err)
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

func (r *RetryPolicy) givesKey(req *http.Request) bool {
	return r.IdempotencyKey && (req.Method == http.MethodPost || req.Method == http.MethodPatch) && !hasIdempotencyKey(req.Header)
}

// mayRetry reports whether the result of an attempt is one to think about.
func (r *RetryPolicy) mayRetry(resp *http.Response, err error) bool {
	if err != nil {
		return !errors.Is(err, ErrRejected)
	}
	return r.CheckRetry != nil || resp.StatusCode >= 400 && retryableAnswer(resp)
}

// A call is a request on its way through its attempts. It belongs to the
// goroutine of the request.
type call struct {
	chain   *chain
	service *service
	policy  *policy
	retry   *RetryPolicy
	req     *http.Request // the caller's
	model   *http.Request // what every attempt sends: req, or a copy with more headers
	start   time.Time     // set with MaxElapsed only

	attempts int
	sent     *http.Request // by the attempt under way, or about to be
	conn     *connTrace    // of the latest attempt; nil if nobody asks
	body     *replay.Body  // a recorded body; nil: GetBody gives each attempt its own
	resp     *http.Response
	err      error

	final   bool          // the latest result asks for a retry, but gets none
	wait    time.Duration // before the next attempt
	next    io.ReadCloser // its body, if there is one
	engine  retryablehttp.Client
	client  http.Client
	resumed bool  // the engine has been handed the first result, and told to retry
	dropped error // the error of Prepare
}

func newCall(c *chain, s *service, p *policy, retry *RetryPolicy, req *http.Request) *call {
	return &call{chain: c, service: s, policy: p, retry: retry, req: req, model: req}
}

// first makes the first attempt.
func (k *call) first() (*http.Response, error) {
	ctx := k.req.Context()
	if ctx.Err() != nil {
		closeBody(k.req)
		return nil, context.Cause(ctx) // as net/http has it
	}
	k.attempts = 1
	if k.retry.MaxElapsed > 0 {
		k.start = time.Now()
	}
	if k.retry.givesKey(k.req) {
		k.model = k.req.WithContext(ctx)
		k.model.Header = k.req.Header.Clone()
		if k.model.Header == nil {
			k.model.Header = make(http.Header)
		}
		k.model.Header.Set("Idempotency-Key", rand.Text())
	}
	k.sent = k.model
	traced := k.trace(ctx)
	body, attempt := k.record()
	if body != nil || traced != ctx {
		k.sent = k.model.WithContext(traced)
	}
	if body != nil {
		k.body, k.sent.Body = body, attempt
	}
	return k.send()
}

func (k *call) send() (*http.Response, error) {
	resp, err := k.chain.attempt(k.service, k.policy, k.sent)
	k.sent = nil // its body is closed
	return resp, err
}

func (k *call) record() (*replay.Body, io.ReadCloser) {
	if k.retry.MaxAttempts <= 1 || !hasBody(k.req) || k.req.GetBody != nil {
		return nil, nil
	}
	return replay.New(k.req.Body, k.req.ContentLength, k.retry.BodyLimit)
}

// again decides about the first attempt's result and, if it is to be retried,
// makes the other attempts. The loop is go-retryablehttp's. Its http.Client
// gets to see a stand-in of the request and of each response: it would follow
// redirects, refuse a RequestURI and wrap errors.
func (k *call) again(resp *http.Response, err error) (*http.Response, error) {
	k.resp, k.err = resp, err
	if !k.decide() {
		return k.resp, k.err
	}
	ctx, stop := waitContext(k.req)
	defer stop()
	k.client = http.Client{Transport: (*resume)(k)}
	k.engine = retryablehttp.Client{
		HTTPClient:   &k.client,
		RetryMax:     k.retry.MaxAttempts - 1,
		CheckRetry:   k.check,
		Backoff:      func(time.Duration, time.Duration, int, *http.Response) time.Duration { return k.wait },
		PrepareRetry: k.prepare,
		ErrorHandler: retryablehttp.PassthroughErrorHandler,
	}
	if _, err := k.engine.Do(&retryablehttp.Request{Request: standIn.WithContext(ctx)}); err != nil {
		return nil, k.giveUp(err)
	}
	return k.resp, k.wrap(k.err)
}

var (
	standIn         = &http.Request{Method: http.MethodGet, URL: &url.URL{Scheme: "http", Host: "tripper.invalid"}, Header: http.Header{}}
	standInResponse = &http.Response{StatusCode: http.StatusOK, Body: http.NoBody}
)

// resume is the call as the engine's transport: it hands out the first result,
// and then makes further attempts.
type resume call

func (r *resume) RoundTrip(*http.Request) (*http.Response, error) {
	k := (*call)(r)
	if k.resumed {
		k.resp, k.err = k.send()
		if !errors.Is(k.err, ErrRejected) {
			k.service.rest().retries.Add(1)
		}
	}
	return standInResponse, nil
}

// check is the engine's CheckRetry.
func (k *call) check(context.Context, *http.Response, error) (bool, error) {
	if !k.resumed {
		k.resumed = true
		return true, nil
	}
	return k.decide(), nil
}

// giveUp ends the call after the engine stopped between two attempts: because
// the caller left, or because the next request could not be prepared.
func (k *call) giveUp(err error) error {
	k.resp = nil
	k.closeNext()
	switch {
	case k.dropped != nil:
		return k.wrap(k.dropped)
	case context.Cause(k.req.Context()) != nil:
		return context.Cause(k.req.Context())
	case ended(k.req) != nil: // through Request.Cancel, which http.Client closes at its Timeout
		return ended(k.req)
	}
	return err
}

// wrap returns err as the caller gets it.
func (k *call) wrap(err error) error {
	attempts := k.attempts
	if errors.Is(err, ErrRejected) {
		attempts-- // nothing was sent
	}
	if err == nil || attempts <= 1 {
		return err
	}
	return &RetryError{attempts, err}
}

// abort closes what nobody else will close any more.
func (k *call) abort() {
	closeResponse(k.resp)
	if k.body != nil {
		k.body.Abort()
		return
	}
	if k.sent != nil {
		closeBody(k.sent)
	}
	k.closeNext()
}

func (k *call) closeNext() {
	if k.next != nil {
		k.next.Close()
		k.next = nil
	}
}

// decide reports whether the latest result is to be retried, and gets ready
// for it. It may put an error into the place of the result.
func (k *call) decide() bool {
	if ended(k.req) != nil || !k.retry.mayRetry(k.resp, k.err) {
		return false
	}
	retry, err := k.wanted()
	switch {
	case retry:
	case err != nil:
		k.replace(err)
		return false
	default:
		// An SDK that retries by itself would not ask the caller's CheckRetry.
		if k.retry.CheckRetry != nil && (k.err != nil || retryableAnswer(k.resp)) {
			k.markFinal()
		}
		return false
	}
	obstacle := k.forbidden()
	if obstacle == nil {
		if open := k.service.blocked(k.wait); open != nil {
			k.chain.logRejection(k.service, open)
			k.replace(open)
			k.attempts++
			return false
		}
		obstacle = k.unaffordable()
	}
	if obstacle != nil {
		obstacle.Add(1)
		k.markFinal()
		return false
	}
	k.chain.tellRetry(k)
	k.discard()
	return true
}

// replace puts err into the place of the latest result.
func (k *call) replace(err error) {
	k.discard()
	k.resp, k.err = nil, err
}

// discard lets go of the latest result.
func (k *call) discard() {
	if early, ok := errors.AsType[*sse.Failure](k.err); ok {
		early.Response.Body.Close()
	}
	drain.Close(k.resp)
	k.resp, k.err = nil, nil
}

// wanted asks CheckRetry about the latest result.
func (k *call) wanted() (bool, error) {
	ctx := k.req.Context()
	if k.retry.CheckRetry == nil {
		return CheckRetry(ctx, k.resp, k.err)
	}
	if k.err == nil {
		return k.retry.CheckRetry(ctx, k.resp, nil)
	}
	method := valueOr(k.req.Method, http.MethodGet)
	wrapped := &url.Error{Op: method[:1] + strings.ToLower(method[1:]), URL: cleanURL(k.req.URL), Err: k.err}
	retry, err := k.retry.CheckRetry(ctx, nil, wrapped)
	if err == error(wrapped) {
		err = k.err // the caller's http.Client wraps it
	}
	return retry, err
}

func valueOr(s, otherwise string) string {
	if s == "" {
		return otherwise
	}
	return s
}

// forbidden sets the wait before the next attempt, and returns the counter of
// the rule that forbids that attempt, or nil.
func (k *call) forbidden() *atomic.Uint64 {
	t := k.service.rest()
	switch {
	case k.attempts >= k.retry.MaxAttempts:
		return &t.exhausted
	case k.retry.Replay == ReplaySafe && !idempotent(k.model) && !k.conn.neverSent() && !provablyIdle(k.resp, k.err):
		return &t.unsafeMethod
	}
	if k.retry.Backoff != nil {
		k.wait = max(0, k.retry.Backoff(k.retry.MinWait, k.retry.MaxWait, k.attempts-1, k.resp))
	} else {
		k.wait = k.retry.wait(k.attempts-1, k.wait)
	}
	if k.resp != nil {
		if asked, ok := RetryAfter(k.resp.Header, time.Now()); ok {
			if asked > k.retry.MaxRetryAfter {
				return &t.tooLong
			}
			k.wait = max(k.wait, asked)
		}
	}
	if deadline, ok := k.req.Context().Deadline(); ok && time.Until(deadline) <= k.wait ||
		k.retry.MaxElapsed > 0 && k.wait > k.retry.MaxElapsed-time.Since(k.start) {
		return &t.noTime
	}
	return nil
}

// unaffordable takes what the next attempt needs: a token of the budget and a
// request body. It returns the counter of what is missing, or nil.
func (k *call) unaffordable() *atomic.Uint64 {
	t := k.service.rest()
	switch {
	case k.body != nil && !k.body.Replayable():
		return &t.noBody // and nothing is spent
	case !k.spend():
		return &t.noBudget
	case !k.takeBody(): // last, for it ends an upload that may still be going on
		return &t.noBody
	}
	return nil
}

// spend takes a token of the service's budget.
func (k *call) spend() bool {
	if k.retry.Budget.Ratio < 0 {
		return true
	}
	budget := &k.service.rest().budget
	budget.Lock()
	defer budget.Unlock()
	return budget.spend(k.service.policy.Retry.Budget, time.Now(), k.service.hot.begun())
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
	next, err := k.req.GetBody()
	if err == nil {
		k.next = next
	}
	return err == nil
}

// markFinal notes that the latest result is final though it may look like one
// to retry, and tells an SDK that retries by itself.
func (k *call) markFinal() {
	k.final = true
	if k.resp != nil && sdk.Retries(k.req) {
		sdk.MarkFinal(k.resp)
	}
}

// finalError returns err as req's caller gets it, where retries of its own would
// only multiply the attempts. An SDK that retries every error but obeys a
// response gets a response, which it turns into its typed error.
func finalError(req *http.Request, err error) (*http.Response, error) {
	if !sdk.Retries(req) {
		return nil, err
	}
	var wait time.Duration
	if open, ok := errors.AsType[*OpenError](err); ok {
		wait = max(time.Second, time.Until(open.Until))
	}
	return sdk.Answer(req, isTimeout(err), wait, cause(req, nil, err).Error()), nil
}

// bodyRelease is how long a retry waits for Base to let go of the body of the
// attempt before.
const bodyRelease = 5 * time.Second

// prepare is the engine's PrepareRetry: it makes the next attempt's request.
func (k *call) prepare(*http.Request) error {
	if err := ended(k.req); err != nil {
		return err
	}
	if a, ok := k.next.(*replay.Attempt); ok {
		a.Wait(k.req.Context().Done(), bodyRelease)
	}
	ctx := k.trace(context.WithValue(k.req.Context(), attemptKey{}, k.attempts+1))
	if k.retry.Prepare == nil {
		k.sent = k.model.WithContext(ctx)
	} else {
		k.sent = k.model.Clone(ctx)
		k.sent.Trailer = k.model.Trailer // filled in while the body is read
	}
	if k.next != nil {
		k.sent.Body, k.next = k.next, nil
	}
	if k.retry.Prepare != nil {
		if err := k.retry.Prepare(k.sent); err != nil {
			closeBody(k.sent)
			k.sent, k.dropped = nil, err
			return err
		}
	}
	k.attempts++
	return nil
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

// A connTrace sees whether an attempt got a connection.
type connTrace struct{ wanted, got atomic.Bool }

// neverSent reports whether Base asked for a connection and got none. A Base
// that does not tell might have sent the request.
func (c *connTrace) neverSent() bool { return c != nil && c.wanted.Load() && !c.got.Load() }

// trace watches the next attempt, if it depends on that whether there is
// another one.
func (k *call) trace(ctx context.Context) context.Context {
	if k.retry.Replay != ReplaySafe || k.retry.MaxAttempts <= 1 || idempotent(k.model) {
		return ctx
	}
	c := &connTrace{}
	k.conn = c
	return httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{
		GetConn: func(string) { c.wanted.Store(true) },
		GotConn: func(httptrace.GotConnInfo) { c.got.Store(true) },
	})
}
