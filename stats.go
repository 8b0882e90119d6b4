package tripper

import (
	"cmp"
	"container/heap"
	"context"
	"errors"
	"fmt"
	"iter"
	"log/slog"
	"math/bits"
	"math/rand/v2"
	"net/http"
	"net/url"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"
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

	Transitions  uint64        `json:"transitions"`
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

// A StateChange tells of a transition of a service's breaker.
type StateChange struct {
	Service  string
	From, To State
	At       time.Time
	Failures int       // in a row, when CLOSED was left
	Until    time.Time // with To == Open: when the next probe is let through
	Cause    error     // the failure behind it; nil when closing
}

// A service is what shares one breaker, one budget and one row of stats. One
// that is healthy consists of little more than a gate and counters; the rest is
// made when something first goes wrong.
type service struct {
	route                 // its name, as the host that is its own service
	gate    atomic.Uint64 // see gateShut
	hot     counters
	trouble atomic.Pointer[trouble]
	used    atomic.Uint64 // when, in ticks of the registry
	created time.Time
}

// trouble is the part of a service that only failures need.
type trouble struct {
	breaker *breaker
	budget  struct {
		sync.Mutex
		bucket
	}
	lastLog atomic.Int64 // when a rejection was last logged, since the service's creation

	failed, rejected, cancelled       atomic.Uint64
	failures, ignored, streamFailures atomic.Uint64
	retries, recovered, exhausted     atomic.Uint64
	noBudget, noTime, tooLong, noBody atomic.Uint64
	unsafeMethod                      atomic.Uint64
}

func newService(name string, p *policy, now time.Time) *service {
	s := &service{created: now}
	s.route = route{name, p, s}
	if p.Breaker.FailureRate > 0 && p.Breaker.FailureThreshold > 0 {
		s.gate.Store(gateWatched)
	}
	return s
}

// rest returns the part of s that only failures need.
func (s *service) rest() *trouble {
	if t := s.trouble.Load(); t != nil {
		return t
	}
	t := &trouble{breaker: newBreaker(s.host, &s.policy.Breaker, &s.gate, s.created)}
	t.budget.bucket = newBucket(s.policy.Retry.Budget, s.created)
	if !s.trouble.CompareAndSwap(nil, t) {
		return s.trouble.Load()
	}
	return t
}

// inUse reports whether a request or an attempt is in flight.
func (s *service) inUse() bool {
	st := s.stats(time.Time{})
	return st.Requests != st.OK+st.Failed+st.Rejected+st.Cancelled || st.Attempts != st.Successes+st.Failures+st.Ignored
}

// stats takes a snapshot. What ends is read before what begins, so that the
// sums never exceed what they are compared with.
func (s *service) stats(now time.Time) Stats {
	st := Stats{Service: s.host, Since: s.created}
	if t := s.trouble.Load(); t != nil {
		t.fill(&st, now)
	}
	if st.State == Closed {
		st.TimeClosed += max(0, now.Sub(st.Since)) // now may be from just before Since
	}
	s.hot.fill(&st)
	return st
}

func (t *trouble) fill(st *Stats, now time.Time) {
	t.breaker.mu.Lock()
	b := t.breaker
	st.State, st.Since = b.state, b.since
	st.ConsecutiveFailures, st.HalfOpenSuccesses = b.failures, b.successes
	if r := b.rejection.Load(); r != nil {
		st.OpenUntil = r.Until
	}
	st.LastFailure = b.lastFailure
	if b.lastCause != nil {
		st.LastFailureCause = b.lastCause.Error()
	}
	st.TimeClosed, st.TimeOpen, st.TimeHalfOpen = b.spent[Closed], b.spent[Open], b.spent[HalfOpen]
	switch b.state {
	case Open:
		st.TimeOpen += max(0, now.Sub(b.since))
	case HalfOpen:
		st.TimeHalfOpen += max(0, now.Sub(b.since))
	}
	st.Transitions, st.Recoveries, st.RecoveryTime = b.transitions, b.recoveries, b.recoveryTime
	t.breaker.mu.Unlock()

	st.Failed, st.Rejected, st.Cancelled = t.failed.Load(), t.rejected.Load(), t.cancelled.Load()
	st.Failures, st.Ignored, st.StreamFailures = t.failures.Load(), t.ignored.Load(), t.streamFailures.Load()
	st.Retries, st.Recovered, st.Exhausted = t.retries.Load(), t.recovered.Load(), t.exhausted.Load()
	st.Suppressed = Suppressed{
		Budget: t.noBudget.Load(), Deadline: t.noTime.Load(), RetryAfter: t.tooLong.Load(),
		Body: t.noBody.Load(), Method: t.unsafeMethod.Load(),
	}
}

// counters are those that every request moves. They begin as one cell; when
// two processors are seen to fight over it there are many, and a goroutine
// stays with one of them.
type counters struct {
	one  cell
	many atomic.Pointer[[]paddedCell] // a power of two of them
}

// A cell counts together what mostly happens together: a request and its first
// attempt, an answer and the attempt's success.
type cell struct {
	requests  atomic.Uint64 // each with its first attempt
	well      atomic.Uint64 // answers that are OK, each with its attempt's success
	ok        atomic.Uint64 // other answers
	successes atomic.Uint64 // other attempts' successes
	unsent    atomic.Uint64 // first attempts that were not made after all, or counted as others
	others    atomic.Uint64 // attempts
}

type paddedCell struct {
	cell
	_ [128 - unsafe.Sizeof(cell{})]byte // two lines: processors fetch them in pairs
}

func (c *counters) cell() *cell {
	many := c.many.Load()
	if many == nil {
		return &c.one
	}
	// Goroutines have stacks of their own: their addresses spread them.
	var onStack byte
	hash := uint64(uintptr(unsafe.Pointer(&onStack))>>11) * 0x9E3779B97F4A7C15 >> 32
	return &(*many)[hash&uint64(len(*many)-1)].cell
}

// request counts a request and its first attempt. It returns the cell for what
// becomes of them.
func (c *counters) request() *cell {
	k := c.cell()
	if n := k.requests.Load(); !k.requests.CompareAndSwap(n, n+1) {
		k.requests.Add(1)
		c.spread()
	}
	return k
}

// spread makes many cells of one: eight for each processor, up to 64.
func (c *counters) spread() {
	if c.many.Load() == nil {
		many := make([]paddedCell, 1<<min(6, bits.Len(uint(8*runtime.GOMAXPROCS(0)-1))))
		c.many.CompareAndSwap(nil, &many)
	}
}

func (c *counters) all(yield func(*cell) bool) {
	if !yield(&c.one) {
		return
	}
	if many := c.many.Load(); many != nil {
		for i := range *many {
			if !yield(&(*many)[i].cell) {
				return
			}
		}
	}
}

// begun returns how many requests there have been.
func (c *counters) begun() (n uint64) {
	for k := range c.all {
		n += k.requests.Load()
	}
	return n
}

func (c *counters) fill(st *Stats) {
	var unsent uint64
	for k := range c.all { // what ends
		well := k.well.Load()
		st.OK += well + k.ok.Load()
		st.Successes += well + k.successes.Load()
		unsent += k.unsent.Load()
	}
	for k := range c.all { // what begins
		requests := k.requests.Load()
		st.Requests += requests
		st.Attempts += requests + k.others.Load()
	}
	st.Attempts -= unsent
}

// A route leads a request to its service, under the policy of its host.
type route struct {
	host    string
	policy  *policy
	service *service
}

// A table finds routes by a name, without a lock and without allocating. It is
// open addressing with linear probing; writers need registry.mu.
type table struct {
	slots atomic.Pointer[[]atomic.Pointer[route]] // a power of two of them
	used  int                                     // slots that are not nil
	live  int                                     // of these, the ones not removed
}

var removed = &route{} // holds the place of a route that is gone

// hashKeys make it unknown to those who choose hosts which of them collide.
var hashKeys = [2]uint64{rand.Uint64(), rand.Uint64()}

// firstSlot hashes name, in the manner of wyhash: maphash takes several times
// as long for a host's few bytes.
func firstSlot(name string, slots []atomic.Pointer[route]) int {
	h, rest := hashKeys[0]^uint64(len(name)), name
	for len(rest) > 16 {
		h = mix(h^eightBytes(rest), hashKeys[1]^eightBytes(rest[8:]))
		rest = rest[16:]
	}
	if len(name) >= 16 {
		rest = name[len(name)-16:] // the same loads for every length
	}
	if len(rest) >= 8 {
		h = mix(h^eightBytes(rest), hashKeys[1]^eightBytes(rest[len(rest)-8:]))
	} else {
		for i := range len(rest) {
			h = mix(h^uint64(rest[i]), hashKeys[1])
		}
	}
	return int(h) & (len(slots) - 1)
}

func mix(a, b uint64) uint64 {
	hi, lo := bits.Mul64(a, b)
	return hi ^ lo
}

func eightBytes(s string) uint64 {
	_ = s[7]
	return uint64(s[0]) | uint64(s[1])<<8 | uint64(s[2])<<16 | uint64(s[3])<<24 |
		uint64(s[4])<<32 | uint64(s[5])<<40 | uint64(s[6])<<48 | uint64(s[7])<<56
}

func (t *table) get(name string) *route {
	p := t.slots.Load()
	if p == nil {
		return nil
	}
	slots := *p
	for i := firstSlot(name, slots); ; i = (i + 1) & (len(slots) - 1) {
		r := slots[i].Load()
		if r == nil || r.host == name && r != removed {
			return r
		}
	}
}

// put requires that there is no route with r's name.
func (t *table) put(r *route) {
	p := t.slots.Load()
	if p == nil || t.used >= len(*p)/2 {
		p = t.rebuild()
	}
	t.insert(*p, r)
}

func (t *table) insert(slots []atomic.Pointer[route], r *route) {
	i := firstSlot(r.host, slots)
	for slots[i].Load() != nil {
		i = (i + 1) & (len(slots) - 1)
	}
	slots[i].Store(r)
	t.used++
	t.live++
}

// rebuild makes a table with room, without the removed routes.
func (t *table) rebuild() *[]atomic.Pointer[route] {
	size := 16
	for size < 4*t.live {
		size *= 2
	}
	routes := slices.Collect(t.all())
	slots := make([]atomic.Pointer[route], size)
	t.used, t.live = 0, 0
	for _, r := range routes {
		t.insert(slots, r)
	}
	t.slots.Store(&slots)
	return &slots
}

func (t *table) remove(r *route) {
	p := t.slots.Load()
	if p == nil {
		return
	}
	slots := *p
	for i := firstSlot(r.host, slots); slots[i].Load() != nil; i = (i + 1) & (len(slots) - 1) {
		if slots[i].CompareAndSwap(r, removed) {
			t.live--
			return
		}
	}
}

func (t *table) all() iter.Seq[*route] {
	return func(yield func(*route) bool) {
		p := t.slots.Load()
		if p == nil {
			return
		}
		for i := range *p {
			if r := (*p)[i].Load(); r != nil && r != removed && !yield(r) {
				return
			}
		}
	}
}

// maxServices bounds the services that are not named in the configuration.
const maxServices = 4096

// A registry holds the services. It finds them without a lock.
type registry struct {
	byName table // every service
	byHost table // the shortcut of Transports whose routes depend on the host alone

	// clock ticks when another service than the one before is used. Nobody
	// looks at it until the registry is half full.
	clock   atomic.Uint64
	crowded atomic.Bool
	full    atomic.Bool // byHost has no room for hosts that share a service

	mu     sync.Mutex // guards the fields below, and writes of the tables
	idle   idleHeap   // the services that may be forgotten
	others int        // hosts in byHost that share a service
}

// add makes the service name, unless it exists by now.
func (g *registry) add(name string, p *policy, pinned bool) *service {
	g.mu.Lock()
	defer g.mu.Unlock()
	if r := g.byName.get(name); r != nil {
		return r.service
	}
	now := time.Now()
	s := newService(strings.Clone(name), p, now) // name may be a part of a long URL
	if !pinned {                                 // by the configuration
		g.makeRoom(now)
		s.used.Store(g.clock.Add(1))
		heap.Push(&g.idle, idleEntry{s.used.Load(), s})
		g.crowded.Store(len(g.idle) >= maxServices/2)
	}
	g.byName.put(&s.route)
	return s
}

// shortcut makes host lead straight to s under the policy p. There is room for
// every service that is its host's own, and for maxServices other hosts.
func (g *registry) shortcut(host string, p *policy, s *service) {
	own := s.host == host && s.policy == p
	if !own && g.full.Load() {
		return
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.byHost.get(host) != nil || g.byName.get(s.host) != &s.route { // forgotten meanwhile
		return
	}
	if own {
		g.byHost.put(&s.route)
		return
	}
	g.byHost.put(&route{strings.Clone(host), p, s})
	g.others++
	g.full.Store(g.others >= maxServices)
}

// touch notes that s is used now.
func (g *registry) touch(s *service) {
	if g.crowded.Load() && s.used.Load() != g.clock.Load() {
		s.used.Store(g.clock.Add(1))
	}
}

// makeRoom forgets the service that has been idle for longest, once there are
// maxServices. One in use or open stays; so that a crowd of those does not make
// every call slow, only a few candidates are looked at each time, and the
// registry exceeds its bound until some of them can go. It requires mu.
func (g *registry) makeRoom(now time.Time) {
	for candidates := 16; len(g.idle) >= maxServices && candidates > 0; {
		oldest := &g.idle[0]
		switch s := oldest.service; {
		case oldest.used != s.used.Load():
			oldest.used = s.used.Load()
			heap.Fix(&g.idle, 0)
		case s.forget(now):
			heap.Pop(&g.idle)
			g.byName.remove(&s.route)
			g.byHost.remove(&s.route)
		default:
			s.used.Store(g.clock.Add(1))
			candidates--
		}
	}
}

// forget shuts s off from further use, unless it is in use or open. A request
// counts itself first and looks at the gate then, so one of the two sides sees
// the other.
func (s *service) forget(now time.Time) bool {
	gate := s.gate.Load()
	if !s.gate.CompareAndSwap(gate, gate|gateForgotten) {
		return false
	}
	st := s.stats(now)
	if !s.inUse() && (st.State == Closed || !now.Before(st.OpenUntil)) && s.gate.Load()&gateForgotten != 0 {
		return true
	}
	s.gate.CompareAndSwap(gate|gateForgotten, gate) // if not, an attempt that was just ending has set it anew
	return false
}

// An idleHeap has the longest-idle service on top, as far as known: entries
// are brought up to date only when they get there.
type idleHeap []idleEntry

type idleEntry struct {
	used    uint64
	service *service
}

func (h idleHeap) Len() int           { return len(h) }
func (h idleHeap) Less(i, j int) bool { return h[i].used < h[j].used }
func (h idleHeap) Swap(i, j int)      { h[i], h[j] = h[j], h[i] }
func (h *idleHeap) Push(e any)        { *h = append(*h, e.(idleEntry)) }
func (h *idleHeap) Pop() any {
	old := *h
	last := old[len(old)-1]
	old[len(old)-1] = idleEntry{}
	*h = old[:len(old)-1]
	return last
}

// Stats returns what the service has been through, and whether there is such a
// service. Services are named as Transport.Service says; those that the
// configuration names exist from the start.
func (t *Transport) Stats(service string) (Stats, bool) {
	r := t.load().byName.get(service)
	if r == nil {
		return Stats{}, false
	}
	return r.service.stats(time.Now()), true
}

// All returns the stats of every service, sorted by name.
func (t *Transport) All() iter.Seq[Stats] {
	return func(yield func(Stats) bool) {
		routes := slices.SortedFunc(t.load().byName.all(), func(a, b *route) int { return cmp.Compare(a.host, b.host) })
		for _, r := range routes {
			if !yield(r.service.stats(time.Now())) {
				return
			}
		}
	}
}

// Reset closes the service's breaker and clears the counts that it decides by;
// Stats goes on counting. Attempts in flight no longer count for the breaker.
// It reports whether there is such a service with a breaker.
func (t *Transport) Reset(service string) bool {
	return t.steer(service, func(b *breaker, now time.Time) { b.close(now) })
}

// Trip opens the service's breaker by hand for d, or for its RecoveryTimeout if
// d is not above zero. Attempts in flight no longer count for the breaker. It
// reports whether there is such a service with a breaker.
func (t *Transport) Trip(service string, d time.Duration) bool {
	return t.steer(service, func(b *breaker, now time.Time) {
		if d <= 0 {
			d = b.recovery
		}
		b.openUntil(now.Add(d), now, errTripped)
	})
}

func (t *Transport) steer(service string, do func(*breaker, time.Time)) bool {
	c := t.load()
	c.mu.Lock() // the registry does not forget the service meanwhile
	r := c.byName.get(service)
	if r == nil || r.policy.Breaker.FailureThreshold < 0 {
		c.mu.Unlock()
		return false
	}
	b := r.service.rest().breaker
	b.mu.Lock()
	do(b, time.Now())
	b.mu.Unlock()
	c.mu.Unlock()
	c.deliver(b)
	return true
}

// deliver tells of b's transitions in order, without holding its lock, so that
// hooks may call any method. What comes to pass meanwhile is told by whoever is
// telling already.
func (c *chain) deliver(b *breaker) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.delivering || len(b.pending) == 0 {
		return
	}
	b.delivering = true
	defer func() { b.delivering = false }()
	for len(b.pending) > 0 {
		change := b.pending[0]
		b.pending = b.pending[1:]
		func() {
			b.mu.Unlock()
			defer b.mu.Lock() // also when a hook panics
			c.announce(change)
		}()
	}
}

func (c *chain) announce(change StateChange) {
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
	c.log(context.Background(), level, message, attrs...)
	if c.transport.OnStateChange != nil {
		c.transport.OnStateChange(change)
	}
}

// tellRetry tells of the retry that k is about to wait for.
func (c *chain) tellRetry(k *call) {
	if c.transport.Logger == nil && c.transport.OnRetry == nil {
		return
	}
	e := RetryEvent{
		Context: k.req.Context(), Service: k.service.host, Method: valueOr(k.req.Method, http.MethodGet), URL: cleanURL(k.req.URL),
		Attempt: k.attempts + 1, Max: k.retry.MaxAttempts, Wait: k.wait, Cause: cause(k.req, k.resp, k.err),
	}
	c.log(k.req.Context(), slog.LevelWarn, "retrying",
		slog.String("service", e.Service), slog.String("method", e.Method), slog.String("url", e.URL),
		slog.Int("attempt", e.Attempt), slog.Int("max", e.Max), slog.Duration("wait", e.Wait), slog.Any("cause", e.Cause))
	if c.transport.OnRetry != nil {
		c.transport.OnRetry(e)
	}
}

// logRejection logs at most one rejection a second for each service.
func (c *chain) logRejection(s *service, e *OpenError) {
	if c.transport.Logger == nil {
		return
	}
	t, now := s.rest(), int64(time.Since(s.created))
	last := t.lastLog.Load()
	if last != 0 && now-last < int64(time.Second) || !t.lastLog.CompareAndSwap(last, max(1, now)) {
		return
	}
	c.log(context.Background(), slog.LevelError, "circuit breaker open: request rejected",
		slog.String("service", e.Service), slog.Time("until", e.Until), slog.Any("cause", e.Last))
}

func (c *chain) log(ctx context.Context, level slog.Level, message string, attrs ...slog.Attr) {
	if l := c.transport.Logger; l != nil {
		l.LogAttrs(ctx, level, message, attrs...)
	}
}

// A statusError is a response as the cause of something.
type statusError int

func (e statusError) Error() string {
	return strings.TrimSpace(fmt.Sprintf("%d %s", int(e), http.StatusText(int(e))))
}

// A cleanError is an error without the secrets of its request's URL.
type cleanError struct {
	error
	text string
}

func (e *cleanError) Error() string { return e.text }
func (e *cleanError) Unwrap() error { return e.error }

// cause returns what an attempt came to, fit for logs, events and messages: no
// user info and no query of the request's URL.
func cause(req *http.Request, resp *http.Response, err error) error {
	if err == nil {
		return statusError(resp.StatusCode)
	}
	for {
		nested, ok := errors.AsType[*url.Error](err)
		if !ok || nested.Err == nil {
			break
		}
		err = nested.Err // without the URL in front of it
	}
	text := err.Error()
	clean := text
	for _, secret := range secrets(req.URL) {
		clean = strings.ReplaceAll(clean, secret, "xxxxx")
	}
	if clean == text {
		return err
	}
	return &cleanError{err, clean}
}

// secrets returns what must not be told of u, in the forms that it may take in
// a text, longest first. What is shorter than four bytes is no secret, and would
// be found everywhere.
func secrets(u *url.URL) []string {
	if u.RawQuery == "" && u.User == nil && u.Fragment == "" {
		return nil
	}
	query := u.Query()
	found := []string{u.RawQuery, query.Encode(), u.Fragment, u.EscapedFragment()}
	for _, values := range query {
		for _, v := range values {
			found = append(found, v, url.QueryEscape(v), url.PathEscape(v))
		}
	}
	if u.User != nil {
		login := u.User.String()
		name, password, _ := strings.Cut(login, ":") // escaped
		plain, _ := u.User.Password()
		found = append(found, login, name, password, plain, u.User.Username())
	}
	found = slices.DeleteFunc(found, func(s string) bool { return len(s) < 4 })
	slices.SortFunc(found, func(a, b string) int { return len(b) - len(a) })
	return found
}

// cleanURL returns u without user info, query and fragment: keys travel there.
func cleanURL(u *url.URL) string {
	return (&url.URL{Scheme: u.Scheme, Opaque: u.Opaque, Host: u.Host, Path: u.Path, RawPath: u.RawPath}).String()
}
