package chaostest

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	cryptorand "crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"flag"
	"fmt"
	"io"
	"log"
	"math/big"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httptrace"
	"net/url"
	"os"
	"runtime"
	"runtime/pprof"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/tripper-go/tripper"
)

var seedFlag = flag.Uint64("chaos.seed", 0, "seed of the chaos run; 0: a random one")

const (
	workers = 64
	patient = 20 * time.Second // for what must happen, but takes its time
)

// 20,000 requests through a faulty network end in documented ways, and leave
// nothing behind.
func TestChaos(t *testing.T) {
	requests, seed := 20_000, *seedFlag
	if testing.Short() {
		requests = 2_000
	}
	if seed == 0 {
		seed = rand.Uint64()
	}
	t.Logf("-chaos.seed %d", seed)

	limit := max(500*time.Millisecond, 4*latency(t))
	t.Logf("limit %v", limit)
	chaos(t, limit, seed+1, 300, false) // what is made once and stays
	goroutines, files, heap := runtime.NumGoroutine(), openFiles(), liveHeap()
	goroutines++ // Eventually has one
	chaos(t, limit, seed, requests, !testing.Short())
	if !assert.Eventually(t, func() bool { return runtime.NumGoroutine() <= goroutines }, patient, 10*time.Millisecond) {
		_ = pprof.Lookup("goroutine").WriteTo(os.Stderr, 1)
	}
	assert.Eventually(t, func() bool { return openFiles() <= files }, patient, 10*time.Millisecond, "file descriptors")
	assert.Eventually(t, func() bool { return liveHeap() <= heap+2<<20 }, patient, 50*time.Millisecond, "heap")
}

// openFiles returns how many file descriptors are open, or 0 where that is not
// to be found out.
func openFiles() int {
	files, _ := os.ReadDir("/proc/self/fd")
	return len(files)
}

func liveHeap() uint64 {
	runtime.GC()
	runtime.GC() // what pools let go of
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}

// latency returns how long a request to a healthy server takes at worst, while
// the machine is as busy as it is.
func latency(t *testing.T) time.Duration {
	server := httptest.NewServer(&Recorder{})
	defer server.Close()
	proxy, err := NewProxy(server.Listener.Addr().String(), "", Mix{Turns: 1})
	require.NoError(t, err)
	defer proxy.Close()
	wire := &http.Transport{MaxIdleConnsPerHost: workers}
	defer wire.CloseIdleConnections()
	var worst atomic.Int64
	var all sync.WaitGroup
	for range workers {
		all.Go(func() {
			for range 5 {
				start := time.Now()
				resp, err := (&http.Client{Transport: wire}).Get("http://" + proxy.Addr())
				if !assert.NoError(t, err) {
					return
				}
				_, _ = io.Copy(io.Discard, resp.Body)
				resp.Body.Close()
				for took := int64(time.Since(start)); ; {
					if w := worst.Load(); took <= w || worst.CompareAndSwap(w, took) {
						break
					}
				}
			}
		})
	}
	all.Wait()
	return time.Duration(worst.Load())
}

// A world is the services, and one Transport for them all.
type world struct {
	t         *testing.T
	limit     time.Duration // of what does not come at all
	seed      uint64
	services  []*service
	close     []func()
	transport *tripper.Transport
	base      *base
	client    *http.Client
	hasty     *http.Client // with a Timeout
	trusted   tls.Certificate
	unclosed  atomic.Int64 // request bodies
	complaint atomic.Int64

	retriesTold atomic.Uint64
	mu          sync.Mutex
	states      map[string][]tripper.StateChange
}

// A service is a server, the network before it, and what the client has seen
// of both.
type service struct {
	name, url string
	share     int
	policy    tripper.Policy
	recorder  *Recorder
	proxy     *Proxy // nil: nobody listens

	calls    []*call // guarded by mu
	mu       sync.Mutex
	requests atomic.Uint64

	// How the requests ended.
	ok, failed, rejected, cancelled atomic.Uint64
	eitherWay                       atomic.Uint64 // failed or cancelled, who knows
	retryErrors                     atomic.Uint64
	recovered                       atomic.Uint64
	held                            atomic.Uint64 // ok or failed: event streams that were held

	// How the attempts ended.
	attempts, failures atomic.Uint64
	outcomes           atomic.Uint64 // that were failures, as the breaker asked for them
	broken             atomic.Uint64 // of the response bodies
}

// complain reports what must not be.
func (w *world) complain(format string, args ...any) {
	if w.complaint.Add(1) <= 30 {
		w.t.Errorf(format, args...)
	}
}

// chaos lets so many requests go through a new world, and looks at what was
// seen. When thorough, everything must have happened.
func chaos(t *testing.T, limit time.Duration, seed uint64, requests int, thorough bool) {
	w := &world{t: t, limit: limit, seed: seed, states: make(map[string][]tripper.StateChange)}
	defer func() {
		for _, f := range w.close {
			f()
		}
	}()
	w.trusted = certificate(t, net.IPv4(127, 0, 0, 1))
	w.build()

	start := time.Now()
	var next atomic.Int64
	var all sync.WaitGroup
	for range workers {
		all.Go(func() {
			for i := next.Add(1); i <= int64(requests); i = next.Add(1) {
				w.newCall(uint64(i)).do()
			}
		})
	}
	all.Wait()
	t.Logf("%d requests in %v", requests, time.Since(start).Round(time.Millisecond))

	assert.Eventually(t, func() bool { return w.base.open.Load() == 0 }, patient, time.Millisecond, "response bodies")
	assert.Eventually(t, func() bool { return w.unclosed.Load() == 0 }, patient, time.Millisecond, "request bodies")
	w.client.CloseIdleConnections()
	var stats []tripper.Stats
	assert.Eventually(t, func() bool {
		stats = slices.Collect(w.transport.All())
		return !slices.ContainsFunc(stats, func(st tripper.Stats) bool { return st.Attempts != st.Successes+st.Failures+st.Ignored })
	}, patient, time.Millisecond, "attempts in flight")
	assert.Len(t, stats, len(w.services))
	for _, st := range stats {
		t.Run(st.Service, func(t *testing.T) {
			s := w.services[slices.IndexFunc(w.services, func(s *service) bool { return s.name == st.Service })]
			s.checkCalls(t)
			s.checkStats(t, st)
			s.checkStates(t, w, st)
		})
	}
	var retries uint64
	for _, st := range stats {
		retries += st.Retries
	}
	assert.GreaterOrEqual(t, w.retriesTold.Load(), retries, "told of before their waits")
	if thorough {
		w.checkCoverage(stats)
	}
}

const (
	steady = "steady" // and sends everything again
	stormy = "stormy"
	secure = "secure"
	h2     = "h2"
	gone   = "gone"
)

func (w *world) build() {
	quick := []Fault{ResetUnsent, ResetBefore, ResetDuring, ResetAfter, HalfBody, Refuse, Drip, Garbage}
	plain := slices.Concat(quick, quick, quick, []Fault{Hang, HangAnswered, HangBody}) // which cost time
	overTLS := append(plain, Impostor, TLSPlain, TLSHangUp)

	policy := tripper.Policy{
		Retry:   tripper.RetryPolicy{MinWait: time.Millisecond, MaxWait: 8 * time.Millisecond, Replay: tripper.ReplaySafe, BodyLimit: 64 << 10},
		Breaker: tripper.BreakerPolicy{RecoveryTimeout: 20 * time.Millisecond},
		Timeout: w.limit,
		Idle:    w.limit,
	}
	free := policy
	free.Retry.Budget.Ratio = -1
	forGone, forStormy, forSecure, forH2, forSteady := free, free, policy, free, policy
	forSteady.Retry.Replay = tripper.ReplayAny
	forStormy.Retry.MaxAttempts = 5
	forStormy.Retry.Budget = tripper.Budget{Ratio: 0.05, MinPerSecond: 0.1}
	forStormy.HoldStream, forH2.HoldStream = true, true
	forStormy.Breaker.FailureRate, forStormy.Breaker.MaxRecoveryTimeout = 0.6, 80*time.Millisecond
	forSecure.Retry.Jitter = tripper.JitterFull

	startTLS := func(s *httptest.Server) {
		s.TLS = &tls.Config{Certificates: []tls.Certificate{w.trusted}}
		s.StartTLS()
	}
	w.add(steady, 40, forSteady, Mix{Faults: plain, Share: 0.5, Turns: 40, Outage: 6}, 0.02, (*httptest.Server).Start)
	w.add(stormy, 25, forStormy, Mix{Faults: plain, Share: 0.9, Turns: 8, Outage: 20}, 0.1, (*httptest.Server).Start)
	w.add(secure, 12, forSecure, Mix{Faults: overTLS, Share: 0.9, Turns: 10, Outage: 15}, 0.05, startTLS)
	w.add(h2, 18, forH2, Mix{Faults: overTLS, Share: 0.9, Turns: 20}, 0.05, func(s *httptest.Server) {
		s.EnableHTTP2 = true
		s.Config.HTTP2 = &http.HTTP2Config{MaxConcurrentStreams: 5} // more at first get REFUSED_STREAM
		startTLS(s)
	})
	w.addGone(gone, 5, forGone)
	w.dial()
}

// add makes a service.
func (w *world) add(name string, share int, p tripper.Policy, mix Mix, trouble float64, startServer func(*httptest.Server)) {
	mix.Seed = w.seed + uint64(len(w.services))
	s := &service{name: name, share: share, policy: p, recorder: &Recorder{Seed: mix.Seed, Trouble: trouble}}
	start := func(start func(*httptest.Server)) *httptest.Server {
		server := httptest.NewUnstartedServer(s.recorder)
		server.Config.ErrorLog = log.New(io.Discard, "", 0)
		start(server)
		w.close = append(w.close, server.Close)
		return server
	}
	scheme, impostor := "http://", ""
	server := start(startServer)
	if server.TLS != nil {
		scheme = "https://"
		impostor = start(func(s *httptest.Server) {
			s.TLS = &tls.Config{Certificates: []tls.Certificate{certificate(w.t)}} // for no address
			s.StartTLS()
		}).Listener.Addr().String()
	}
	var err error
	s.proxy, err = NewProxy(server.Listener.Addr().String(), impostor, mix)
	require.NoError(w.t, err)
	w.close = append([]func(){s.proxy.Close}, w.close...)
	s.url = scheme + s.proxy.Addr()
	w.services = append(w.services, s)
}

func (w *world) addGone(name string, share int, p tripper.Policy) {
	port, err := NewClosedPort()
	require.NoError(w.t, err)
	w.close = append(w.close, port.Close)
	w.services = append(w.services, &service{name: name, share: share, policy: p, recorder: &Recorder{}, url: "http://" + port.Addr()})
}

// certificate returns one that signs itself: httptest's costs much more time.
func certificate(t *testing.T, addresses ...net.IP) tls.Certificate {
	key, err := ecdsa.GenerateKey(elliptic.P256(), cryptorand.Reader)
	require.NoError(t, err)
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour), IPAddresses: addresses}
	der, err := x509.CreateCertificate(cryptorand.Reader, template, template, key.Public(), key)
	require.NoError(t, err)
	leaf, err := x509.ParseCertificate(der)
	require.NoError(t, err)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key, Leaf: leaf}
}

// dial makes the clients.
func (w *world) dial() {
	roots := x509.NewCertPool()
	roots.AddCert(w.trusted.Leaf)
	wire := &http.Transport{
		TLSClientConfig:     &tls.Config{RootCAs: roots, CurvePreferences: []tls.CurveID{tls.X25519}},
		ForceAttemptHTTP2:   true,
		MaxIdleConnsPerHost: workers,
		// Without pings a connection that hangs is used on and on.
		HTTP2: &http.HTTP2Config{SendPingTimeout: w.limit / 2, PingTimeout: w.limit / 2},
	}
	w.base = &base{world: w, next: wire}
	w.transport = &tripper.Transport{
		Base:  w.base,
		Hosts: make(map[string]tripper.Policy),
		Observers: []*tripper.Observer{{
			Retry: func(tripper.RetryEvent) { w.retriesTold.Add(1) },
			StateChange: func(c tripper.StateChange) {
				w.mu.Lock()
				defer w.mu.Unlock()
				w.states[c.Service] = append(w.states[c.Service], c)
			},
		}},
	}
	for _, s := range w.services {
		s.policy.Service = s.name
		if s.name != steady { // which is to go the straight way
			s.policy.Breaker.Outcome = s.outcome
		}
		u, err := url.Parse(s.url)
		require.NoError(w.t, err)
		w.transport.Hosts[u.Host] = s.policy
	}
	require.NoError(w.t, w.transport.Validate())
	w.client = &http.Client{Transport: &outside{world: w, next: w.transport}}
	w.hasty = &http.Client{Transport: w.client.Transport, Timeout: 100 * time.Millisecond}
}

func (s *service) outcome(resp *http.Response, err error) tripper.Outcome {
	o := tripper.DefaultOutcome(resp, err)
	if o == tripper.Failure {
		s.outcomes.Add(1)
	}
	return o
}

// A call is one request of a client.
type call struct {
	*world
	service *service
	rnd     *rand.Rand // of the goroutine of the request
	id      string
	method  string
	keyed   bool
	broken  bool // the request body breaks off
	leaves  bool // the caller means to cancel

	left     atomic.Bool  // the caller has cancelled, or is about to
	attempts atomic.Int64 // that Base has seen
	conns    atomic.Int64 // that they got
	status   int          // of the answer; 0: none

	text   []byte // of the request body
	mu     sync.Mutex
	bodies []*source
}

type callKey struct{}

var errLeft = errors.New("the caller has left")

func callOf(ctx context.Context) *call { return ctx.Value(callKey{}).(*call) }

func (w *world) newCall(i uint64) *call {
	rnd := rand.New(rand.NewPCG(w.seed, i))
	c := &call{world: w, rnd: rnd, id: fmt.Sprint(i)}
	share := rnd.IntN(100)
	for _, c.service = range w.services {
		if share -= c.service.share; share < 0 {
			break
		}
	}
	methods := [...]string{"GET", "GET", "GET", "HEAD", "PUT", "PUT", "DELETE", "POST", "POST", "POST", "POST", "PATCH"}
	c.method = methods[rnd.IntN(len(methods))]
	c.keyed = (c.method == "POST" || c.method == "PATCH") && rnd.IntN(3) == 0
	c.service.requests.Add(1)
	c.service.mu.Lock()
	c.service.calls = append(c.service.calls, c)
	c.service.mu.Unlock()
	return c
}

// once reports whether the request must not be executed twice.
func (c *call) once() bool {
	return c.service.policy.Retry.Replay == tripper.ReplaySafe && !c.keyed && (c.method == "POST" || c.method == "PATCH")
}

// do makes the request, and reads its answer in one way or another.
func (c *call) do() {
	ctx, cancel := context.WithCancelCause(context.WithValue(c.world.t.Context(), callKey{}, c))
	defer cancel(nil)
	leave := func() {
		c.left.Store(true)
		cancel([]error{nil, errLeft}[len(c.id)%2])
	}
	client, leaveLater := c.client, false
	way := c.rnd.IntN(40)
	c.leaves = way <= 4
	switch way {
	case 0:
		leave()
	case 1, 2, 3:
		defer time.AfterFunc(time.Duration(c.rnd.IntN(30_000))*time.Microsecond, leave).Stop()
	case 4:
		leaveLater = true
	case 5:
		var stop context.CancelFunc
		ctx, stop = context.WithTimeout(ctx, time.Duration(c.rnd.IntN(60))*time.Millisecond)
		defer stop()
	case 6:
		client = c.hasty
	case 7:
		attempts := 1 + c.rnd.IntN(4)
		ctx = tripper.WithRetry(ctx, func(r *tripper.RetryPolicy) {
			r.MaxAttempts, r.MinWait, r.MaxWait, r.Replay = attempts, time.Millisecond, 2*time.Millisecond, tripper.ReplaySafe
		})
	}
	req := c.request(ctx)
	resp, err := client.Do(req)
	if (resp == nil) == (err == nil) {
		c.complain("%s: response %v and error %v", c, resp, err)
	}
	if err != nil {
		c.checkClientError(err)
		c.calmDown(err)
		return
	}
	defer resp.Body.Close()
	c.checkHeaders(resp)
	if leaveLater {
		leave()
	}
	c.read(resp)
}

func (c *call) String() string {
	return fmt.Sprintf("request %s (%s %s)", c.id, c.method, c.service.name)
}

func (c *call) request(ctx context.Context) *http.Request {
	req, err := http.NewRequestWithContext(ctx, c.method, c.service.url+"/"+c.id, nil)
	require.NoError(c.world.t, err)
	req.Header.Set(IDHeader, c.id)
	if c.keyed {
		req.Header.Set("Idempotency-Key", c.id)
	}
	if c.method != "GET" && c.method != "HEAD" {
		c.giveBody(req)
	}
	req.Header.Set(HashHeader, Hash(c.text))
	return req
}

// giveBody gives req a body of some kind, or none.
func (c *call) giveBody(req *http.Request) {
	kind := c.rnd.IntN(20)
	if kind < 5 {
		return
	}
	sizes := [...]int{0, 10, 1000, 20_000}
	size := sizes[c.rnd.IntN(len(sizes))]
	if kind == 18 {
		size = 65<<10 + c.rnd.IntN(100_000) // too long to be kept
	}
	c.text = Text(c.rnd.Uint64(), size)
	reader := bytes.NewReader(c.text)
	switch {
	case kind < 10:
		req.Body, req.ContentLength = c.source(reader), int64(size)
		req.GetBody = func() (io.ReadCloser, error) { return c.source(bytes.NewReader(c.text)), nil }
	case kind < 13:
		req.Body, req.ContentLength = c.source(reader), int64(size)
	case kind < 16, kind == 18:
		req.Body = c.source(reader)
	case kind < 18:
		r, w := io.Pipe()
		req.Body = c.source(r)
		go func() {
			_, _ = w.Write(c.text[:size/2])
			_, _ = w.Write(c.text[size/2:])
			w.Close()
		}()
	default:
		c.broken = true
		req.Body = c.source(io.MultiReader(reader, brokenReader{}))
	}
}

type brokenReader struct{}

var errBroken = errors.New("the request body is broken")

func (brokenReader) Read([]byte) (int, error) { return 0, errBroken }

// A source is a request body that counts how often it is closed.
type source struct {
	io.Reader
	closes atomic.Int64
	open   *atomic.Int64 // of all sources, how many are
}

func (s *source) Close() error {
	if s.closes.Add(1) == 1 {
		s.open.Add(-1)
	}
	if c, ok := s.Reader.(io.Closer); ok {
		return c.Close()
	}
	return nil
}

func (c *call) source(r io.Reader) *source {
	c.unclosed.Add(1)
	s := &source{Reader: r, open: &c.unclosed}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.bodies = append(c.bodies, s)
	return s
}

// checkClientError looks at an error as the http.Client returns it.
func (c *call) checkClientError(err error) {
	outer, ok := err.(*url.Error)
	if !ok {
		c.complain("%s: error %T: %v", c, err, err)
		return
	}
	if inner, ok := errors.AsType[*url.Error](outer.Err); ok {
		c.complain("%s: a second url.Error: %v", c, inner)
	}
}

// calmDown waits a little when the breaker is open, so that a run is not over
// before the network is.
func (c *call) calmDown(err error) {
	if !errors.Is(err, tripper.ErrRejected) {
		return
	}
	pause := time.NewTimer(time.Duration(20+c.rnd.IntN(80)) * time.Millisecond)
	<-pause.C
}

func (c *call) checkHeaders(resp *http.Response) {
	if id := resp.Header.Get(IDHeader); id != c.id {
		c.complain("%s: got the answer to %q, status %d", c, id, resp.StatusCode)
	}
}

// read reads all of the response body, or some, or nothing.
func (c *call) read(resp *http.Response) {
	how := c.rnd.IntN(20)
	if how == 0 {
		return
	}
	if how == 1 {
		_, _ = io.CopyN(io.Discard, resp.Body, 1+c.rnd.Int64N(3000))
		return
	}
	text, err := io.ReadAll(resp.Body)
	switch {
	case err != nil && errors.Is(err, context.Canceled) && !c.left.Load():
		c.complain("%s: body: %v, but nobody has cancelled", c, err)
	case err == nil && c.method != "HEAD" && resp.Header.Get(HashHeader) != "" && Hash(text) != resp.Header.Get(HashHeader):
		c.complain("%s: %d bytes of the body are not what the server sent", c, len(text))
	}
}

// outside sits between http.Client and Transport.
type outside struct {
	*world
	next *tripper.Transport
}

func (o *outside) CloseIdleConnections() { o.next.CloseIdleConnections() }

func (o *outside) RoundTrip(req *http.Request) (*http.Response, error) {
	c := callOf(req.Context())
	before, header := *req, req.Header.Clone()
	resp, err := o.next.RoundTrip(req)
	if before.Body != req.Body || before.ContentLength != req.ContentLength || before.URL != req.URL || len(header) != len(req.Header) {
		c.complain("%s: the request was changed", c)
	}
	if (resp == nil) == (err == nil) {
		c.complain("%s: response %v and error %v", c, resp, err)
	}
	if err != nil {
		c.failed(req, err)
		return resp, err
	}
	if resp.Request != req {
		c.complain("%s: the response is another request's", c)
	}
	c.answered(resp)
	return resp, nil
}

func failedStatus(code int) bool { return code == 408 || code == 429 || code >= 500 && code <= 599 }

func (c *call) answered(resp *http.Response) {
	c.status = resp.StatusCode
	if c.broken && resp.StatusCode == http.StatusOK {
		c.complain("%s: answered %d without its whole body", c, resp.StatusCode)
	}
	switch {
	case failedStatus(resp.StatusCode):
		c.service.failed.Add(1)
		return
	case c.service.policy.HoldStream && resp.Header.Get("Content-Type") == EventStream:
		c.service.held.Add(1) // one that died early is failed
		return
	case c.attempts.Load() > 1:
		c.service.recovered.Add(1)
	}
	c.service.ok.Add(1)
}

// failed looks at an error as the Transport returns it, and counts it.
func (c *call) failed(req *http.Request, err error) {
	s, attempts := c.service, c.attempts.Load()
	if strings.Contains(err.Error(), "tripper.invalid") {
		c.complain("%s: error about something else: %v", c, err)
	}
	// How many attempts an error is about.
	about := int64(1)
	if several, ok := err.(*tripper.RetryError); ok {
		s.retryErrors.Add(1)
		about = int64(several.Attempts)
		if about < 2 && several.Stopped == nil || errors.As(several.Err, &several) {
			c.complain("%s: %d attempts: %v", c, about, err)
		}
	}
	ended := req.Context().Err() != nil
	open, rejected := errors.AsType[*tripper.OpenError](err)
	cancelled := errors.Is(err, context.Canceled) || errors.Is(err, errLeft)
	switch {
	case about > 1 && about != attempts, about == 1 && attempts > 1 && !ended, about == 1 && attempts == 0 && !ended && !rejected:
		c.complain("%s: after %d attempts an error of %d: %v", c, attempts, about, err)
	case rejected && (open.Service != s.name || !errors.Is(err, tripper.ErrRejected)):
		c.complain("%s: rejected by %s: %v", c, open.Service, err)
	case cancelled && !c.left.Load():
		c.complain("%s: cancelled, but not by the caller: %v", c, err)
	}
	switch {
	case rejected:
		s.rejected.Add(1)
	case cancelled:
		s.cancelled.Add(1)
	case c.left.Load(), strings.Contains(err.Error(), "net/http: request canceled"):
		// The latter is also what net/http gives to a request that gets the
		// connection of one whose caller has just left.
		s.eitherWay.Add(1)
	default:
		s.failed.Add(1)
	}
}

// base sits between Transport and the wire.
type base struct {
	*world
	next *http.Transport
	open atomic.Int64 // response bodies
}

func (b *base) CloseIdleConnections() { b.next.CloseIdleConnections() }

func (b *base) RoundTrip(req *http.Request) (*http.Response, error) {
	c := callOf(req.Context())
	s := c.service
	s.attempts.Add(1)
	if n := c.attempts.Add(1); n != int64(tripper.Attempt(req.Context())) {
		c.complain("%s: attempt %d says that it is %d", c, n, tripper.Attempt(req.Context()))
	}
	req = req.WithContext(httptrace.WithClientTrace(req.Context(), &httptrace.ClientTrace{
		GotConn: func(httptrace.GotConnInfo) { c.conns.Add(1) },
	}))
	if body, ok := req.Body.(*source); ok {
		req.Body = &closedOnce{source: body} // net/http closes some twice
	}
	if req.GetBody != nil { // net/http's HTTP/2 does not close all that it gets
		req.GetBody = func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(c.text)), nil }
	}
	resp, err := b.next.RoundTrip(req)
	_, hasty := req.Context().Deadline() // whose end says nothing, and may come at any moment
	if !c.leaves && !c.broken && !hasty && (err != nil || err == nil && failedStatus(resp.StatusCode) && resp.StatusCode != http.StatusTooManyRequests) {
		s.failures.Add(1)
	}
	if resp != nil && resp.Body != http.NoBody {
		b.open.Add(1)
		resp.Body = &openBody{ReadCloser: resp.Body, base: b, call: c}
	}
	return resp, err
}

type closedOnce struct {
	*source
	once sync.Once
}

func (c *closedOnce) Close() (err error) {
	c.once.Do(func() { err = c.source.Close() })
	return err
}

type openBody struct {
	io.ReadCloser
	base         *base
	call         *call
	once, broken sync.Once
	closed       atomic.Bool
}

func (o *openBody) Read(p []byte) (int, error) {
	n, err := o.ReadCloser.Read(p)
	if err != nil && err != io.EOF || o.closed.Load() { // a limit on silence closes the body amid a Read
		o.broken.Do(func() { o.call.service.broken.Add(1) })
	}
	return n, err
}

func (o *openBody) Close() error {
	o.closed.Store(true)
	o.once.Do(func() { o.base.open.Add(-1) })
	return o.ReadCloser.Close()
}

// checkCalls compares what the callers saw with what the server did.
func (s *service) checkCalls(t *testing.T) {
	var conns, attempts int64
	for _, c := range s.calls {
		seen := s.recorder.Seen(c.id)
		conns, attempts = conns+c.conns.Load(), attempts+c.attempts.Load()
		if int64(seen.Arrived) > c.conns.Load() {
			c.complain("%s: arrived %d times over %d connections", c, seen.Arrived, c.conns.Load())
		}
		if c.once() && seen.Executed > 1 {
			c.complain("%s: executed %d times in %d attempts", c, seen.Executed, c.attempts.Load())
		}
		if c.status == 200 && seen.Executed == 0 {
			c.complain("%s: answered %d, but never executed", c, c.status)
		}
		if seen.Damaged > 0 || c.broken && seen.Executed > 0 {
			c.complain("%s: executed %d times, %d of them damaged", c, seen.Executed, seen.Damaged)
		}
		for i, b := range c.bodies {
			if n := b.closes.Load(); n != 1 {
				c.complain("%s: its body %d of %d was closed %d times", c, i, len(c.bodies), n)
			}
		}
	}
	t.Logf("%d attempts, %d connections got, %d arrived", attempts, conns, s.recorder.Arrived())
	assert.LessOrEqual(t, s.recorder.Arrived(), uint64(conns))
}

// checkStats compares what the Transport counted with what was seen.
func (s *service) checkStats(t *testing.T, st tripper.Stats) {
	t.Logf("%+v", st)
	assert.Equal(t, s.requests.Load(), st.Requests, "requests")
	assert.Equal(t, st.Requests, st.OK+st.Failed+st.Rejected+st.Cancelled, "requests")
	assertWithin(t, s.ok.Load(), s.held.Load(), st.OK, "ok")
	assert.Equal(t, s.rejected.Load(), st.Rejected, "rejected")
	assertWithin(t, s.recovered.Load(), s.held.Load(), st.Recovered, "recovered")
	assertWithin(t, s.failed.Load(), s.eitherWay.Load()+s.held.Load(), st.Failed, "failed")
	assertWithin(t, s.cancelled.Load(), s.eitherWay.Load(), st.Cancelled, "cancelled")

	var retries uint64
	for _, c := range s.calls {
		retries += uint64(max(1, c.attempts.Load()) - 1)
	}
	assert.Equal(t, s.attempts.Load(), st.Attempts, "attempts")
	assert.Equal(t, retries, st.Retries, "retries")
	assert.GreaterOrEqual(t, st.Failures, s.failures.Load(), "failures")
	if s.policy.Breaker.Outcome != nil {
		assertWithin(t, s.outcomes.Load(), st.StreamFailures, st.Failures, "failures")
	}
	assert.LessOrEqual(t, st.StreamFailures, s.broken.Load(), "stream failures")
}

// assertWithin asserts that got is sure, or more by up to unsure.
func assertWithin(t *testing.T, sure, unsure, got uint64, what string) {
	t.Helper()
	assert.GreaterOrEqual(t, got, sure, what)
	assert.LessOrEqual(t, got, sure+unsure, what)
}

// checkStates looks at the transitions, as told.
func (s *service) checkStates(t *testing.T, w *world, st tripper.Stats) {
	w.mu.Lock()
	defer w.mu.Unlock()
	state := tripper.Closed
	for _, c := range w.states[s.name] {
		if c.From != state || c.From == c.To {
			w.complain("%s: %v after %v", s.name, c, state)
		}
		state = c.To
	}
	assert.Equal(t, st.State, state)
	assert.EqualValues(t, st.Transitions, len(w.states[s.name]))
}

// checkCoverage asserts that what this test is about has happened.
func (w *world) checkCoverage(stats []tripper.Stats) {
	happened, struck := make(map[string]uint64), make(map[Fault]int64)
	for _, st := range stats {
		for what, n := range map[string]uint64{
			"ok": st.OK, "failed": st.Failed, "rejected": st.Rejected, "cancelled": st.Cancelled,
			"recovered": st.Recovered, "exhausted": st.Exhausted, "stream failures": st.StreamFailures, "recoveries": st.Recoveries,
			"no budget": st.Suppressed.Budget, "no body": st.Suppressed.Body, "unsafe": st.Suppressed.Method,
		} {
			happened[what] += n
		}
	}
	for _, s := range w.services {
		happened["retry errors"] += s.retryErrors.Load()
		if s.proxy != nil {
			for f, n := range s.proxy.Struck() {
				struck[f] += n
			}
		}
	}
	w.t.Log(happened, struck)
	for what, n := range happened {
		assert.NotZero(w.t, n, what)
	}
	for f, n := range struck {
		assert.NotZero(w.t, n, "%v", f)
	}
}
