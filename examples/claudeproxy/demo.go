package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/tripper-go/tripper"
)

// A step of the script is one request, and what the upstream does to its
// attempts. A step with a heading begins a new part of the day.
type step struct {
	heading string
	at      float64 // nominal seconds
	stream  bool
	slow    bool // the stream is produced slowly
	faults  []fault
}

const (
	outageBegins = 20 * time.Second
	outageEnds   = 38 * time.Second
)

// badDay is the script. Nothing of it falls so close to the edges of the outage
// or of the breaker's recovery that a busy machine could change the story.
var badDay = []step{
	{heading: "A healthy service", at: 0},
	{at: 0.5, stream: true},

	{heading: "Failures that come and go: the proxy retries", at: 2.5, faults: []fault{overloaded}},
	{at: 3.5, stream: true, faults: []fault{overloaded, internalError}},
	{at: 6},
	{at: 7, faults: []fault{rateLimited(3 * time.Second)}},
	{at: 8, faults: []fault{reset}},
	{at: 9, stream: true, slow: true},
	{at: 12, stream: true, faults: []fault{internalError}},

	{heading: "What a retry cannot help: a wait beyond what is tolerable, and a stream that breaks off",
		at: 15, faults: []fault{rateLimited(2 * time.Minute), rateLimited(2 * time.Minute)}},
	{at: 16, stream: true, faults: []fault{breakOff}},
	{at: 18},

	{heading: "An outage, from 20s to 38s: the breaker opens", at: 20.5},
	{at: 21.5, stream: true},
	{at: 23},
	{at: 25.5},
	{at: 27, stream: true},
	{at: 29},
	{at: 31, stream: true},
	{at: 35},
	{at: 36.5, stream: true},

	{heading: "The outage is over; the breaker finds out when its recovery time has passed", at: 40},
	{at: 42, stream: true},
	{at: 46.5},
	{at: 48, stream: true},
	{at: 49.5},

	{heading: "Back to normal", at: 52, stream: true, faults: []fault{overloaded}},
	{at: 54, faults: []fault{reset}},
	{at: 55, stream: true},
	{at: 57},
}

// demoPolicy is the proxy's policy but for one thing, which the demonstration
// says: a whole recovery must fit into a minute.
func demoPolicy() tripper.Policy {
	p := tripper.Claude()
	p.Breaker.RecoveryTimeout = 10 * time.Second
	return p
}

// accelerate makes every time of p pass faster by the factor.
func accelerate(p tripper.Policy, factor float64) tripper.Policy {
	for _, d := range []*time.Duration{
		&p.Timeout, &p.Idle, &p.TotalTimeout,
		&p.Retry.MinWait, &p.Retry.MaxWait, &p.Retry.MaxRetryAfter, &p.Retry.MaxElapsed,
		&p.Breaker.RecoveryTimeout, &p.Breaker.MaxRecoveryTimeout, &p.Breaker.Window, &p.Breaker.SlowCall, &p.Breaker.MinDeadline,
	} {
		*d = time.Duration(float64(*d) / factor)
	}
	p.Retry.Budget.MinPerSecond *= factor
	return p
}

var silent = slog.New(slog.DiscardHandler)

// A show is one run of the demonstration.
type show struct {
	clock     clock
	transport *tripper.Transport
	upstream  *upstream // behind the proxy
	twin      *upstream // has the same day, without a proxy in front of it
	proxied   string    // URL of the proxy
	direct    string    // URL of the twin
	client    *http.Client

	mu  sync.Mutex // guards the fields below
	out io.Writer
	tally
}

// A tally compares the requests with those sent directly.
type tally struct {
	requests, failed, failedDirectly int
	saved                            int // failed directly only
	refusedInVain                    int // failed through the proxy only
}

// demo runs the script and prints what happens. It ends early when ctx does.
func demo(ctx context.Context, speed float64, out io.Writer) error {
	c := clock{time.Now(), speed}
	s := &show{clock: c, out: out, upstream: newUpstream(c, badDay), twin: newUpstream(c, badDay)}
	stop, err := s.start()
	if err != nil {
		return err
	}
	defer stop()
	s.introduce()
	s.play(ctx)
	if ctx.Err() != nil {
		s.print("\nInterrupted.")
	}
	s.conclude()
	return nil
}

// start starts the two upstreams and the proxy.
func (s *show) start() (stop func(), err error) {
	var stops []func()
	stop = func() {
		for _, f := range stops {
			f()
		}
	}
	serve := func(handler http.Handler) string {
		if err != nil {
			return ""
		}
		base, end, e := startLocal(handler)
		if err = e; e == nil {
			stops = append(stops, end)
		}
		return base
	}
	s.transport = newTransport()
	s.transport.Policy = accelerate(demoPolicy(), s.clock.speed)
	s.transport.Observers = []*tripper.Observer{{Retry: s.onRetry, StateChange: s.onStateChange}}
	s.client = &http.Client{Transport: http.DefaultTransport.(*http.Transport).Clone()}
	stops = append(stops, s.transport.CloseIdleConnections, s.client.CloseIdleConnections)

	behind := serve(s.upstream.handler())
	s.direct = serve(s.twin.handler())
	if err == nil {
		upstreamURL, _ := url.Parse(behind) // of our own making
		s.proxied = serve(newProxy(upstreamURL, s.transport, silent))
	}
	if err != nil {
		stop()
	}
	return stop, err
}

// startLocal serves handler on a free port of loopback and returns its URL.
func startLocal(handler http.Handler) (base string, stop func(), err error) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", nil, err
	}
	server := newServer(handler, silent)
	go func() { _ = server.Serve(listener) }()
	return "http://" + listener.Addr().String(), func() { server.Close() }, nil
}

func (s *show) introduce() {
	p := demoPolicy()
	s.print("A bad day of the Claude API, and the proxy in front of it: a minute of traffic, %v times as fast.", s.clock.speed)
	s.print("All times below are nominal. The API is embedded; connections, proxy, retries and breaker are real.")
	s.print("The proxy's policy is tripper.Claude(): %d attempts, waits from %v to %v; the breaker opens after %d failures in a row,",
		p.Retry.MaxAttempts, p.Retry.MinWait, p.Retry.MaxWait, p.Breaker.FailureThreshold)
	s.print("here for %v instead of %v. Every request is also sent directly to a twin of the API, to compare.",
		p.Breaker.RecoveryTimeout, tripper.Claude().Breaker.RecoveryTimeout)
}

// play sends the script's requests, each at its time, and waits for their ends.
func (s *show) play(ctx context.Context) {
	var running sync.WaitGroup
	defer running.Wait()
	for i, st := range badDay {
		at := time.Duration(st.at * float64(time.Second))
		if !s.clock.sleep(ctx, at-s.clock.now()) {
			return
		}
		if st.heading != "" {
			s.print("\n%s", st.heading)
		}
		running.Go(func() { s.request(ctx, i+1, st) })
	}
}

// request sends one request both ways and prints how it went.
func (s *show) request(ctx context.Context, number int, st step) {
	var direct result
	var beside sync.WaitGroup
	beside.Go(func() { direct = s.send(ctx, s.direct, number, st.stream) })
	r := s.send(ctx, s.proxied, number, st.stream)
	at := s.clock.now() // the twin may take longer
	beside.Wait()
	if ctx.Err() != nil {
		return
	}
	line := fmt.Sprintf("%v (%s, %.1fs)", r, plural(s.upstream.saw(number), "attempt"), r.took.Seconds())
	switch {
	case direct.failed() && !r.failed():
		line += "   [directly: " + direct.String() + "]"
	case r.failed() && !direct.failed():
		line += "   [directly: fine]"
	}
	s.line(at, number, "%s", line)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.add(r.failed(), direct.failed())
}

func (t *tally) add(failed, failedDirectly bool) {
	t.requests++
	for count, so := range map[*int]bool{
		&t.failed: failed, &t.failedDirectly: failedDirectly,
		&t.saved: failedDirectly && !failed, &t.refusedInVain: failed && !failedDirectly,
	} {
		if so {
			*count++
		}
	}
}

// A result is what a client gets to see of a request.
type result struct {
	status int
	kind   string        // of an error answer
	wait   time.Duration // that an error answer asks for; nominal
	events int           // of a stream
	first  time.Duration // until its first event; nominal
	took   time.Duration // nominal
	err    error
}

func (r result) failed() bool { return r.err != nil || r.status != http.StatusOK }

func (r result) String() string {
	switch {
	case r.err != nil && r.events > 0:
		return fmt.Sprintf("BROKEN after %d events: %v", r.events, brief(r.err))
	case r.err != nil:
		return "FAILED: " + brief(r.err)
	case r.status == http.StatusServiceUnavailable:
		return "REFUSED by the breaker: 503 " + r.kind
	case r.wait > 0:
		return fmt.Sprintf("FAILED: %d %s, retry-after %.0fs", r.status, r.kind, r.wait.Seconds())
	case r.status != http.StatusOK:
		return fmt.Sprintf("FAILED: %d %s", r.status, r.kind)
	case r.events > 0:
		return fmt.Sprintf("ok: %d events, the first after %.1fs", r.events, r.first.Seconds())
	}
	return "ok"
}

// brief returns err without the addresses that precede its cause.
func brief(err error) string {
	switch {
	case errors.Is(err, syscall.ECONNRESET), errors.Is(err, syscall.EPIPE):
		return "connection reset"
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return "connection closed"
	}
	return err.Error()
}

// send sends a request to the API, or to the proxy, at base.
func (s *show) send(ctx context.Context, base string, number int, stream bool) (r result) {
	start := time.Now()
	defer func() { r.took = s.clock.nominal(time.Since(start)) }()
	body, _ := json.Marshal(messagesRequest{ // of plain values: cannot fail
		Model: "claude-sonnet-4-5", MaxTokens: 64, Stream: stream,
		Messages: []message{{Role: "user", Content: "A line about rain, please."}},
	})
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, base+messagesPath(number), bytes.NewReader(body))
	if err != nil {
		return result{err: err}
	}
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("Anthropic-Version", "2023-06-01")
	resp, err := s.client.Do(req)
	if err != nil {
		return result{err: err}
	}
	defer discardBody(resp)
	r.status = resp.StatusCode
	switch {
	case r.status != http.StatusOK:
		var e apiError
		r.err = json.NewDecoder(resp.Body).Decode(&e)
		r.kind = e.Error.Type
		asked, _ := tripper.RetryAfter(resp.Header, time.Now())
		r.wait = s.clock.nominal(asked)
	case stream:
		s.readEvents(resp.Body, start, &r)
	default:
		var answer struct{ Type string }
		r.err = json.NewDecoder(resp.Body).Decode(&answer)
	}
	return r
}

// discardBody lets the connection of a response be used again.
func discardBody(resp *http.Response) {
	_, _ = io.Copy(io.Discard, resp.Body)
	resp.Body.Close()
}

// readEvents reads a stream up to its message_stop.
func (s *show) readEvents(stream io.Reader, start time.Time, r *result) {
	lines := bufio.NewScanner(stream)
	for lines.Scan() {
		event, ok := strings.CutPrefix(lines.Text(), "event: ")
		if !ok {
			continue
		}
		if r.events++; r.events == 1 {
			r.first = s.clock.nominal(time.Since(start))
		}
		if event == "message_stop" {
			return
		}
	}
	r.err = lines.Err()
	if r.err == nil {
		r.err = io.ErrUnexpectedEOF
	}
}

func (s *show) onRetry(e tripper.RetryEvent) {
	u, err := url.Parse(e.URL)
	if err != nil {
		return // it has been a URL before
	}
	s.line(s.clock.now(), numberOf(u.Path), "%s: attempt %d of %d in %.1fs",
		brief(e.Cause), e.Attempt, e.Max, s.clock.nominal(e.Wait).Seconds())
}

func (s *show) onStateChange(c tripper.StateChange) {
	why := ""
	if c.To == tripper.Open {
		why = fmt.Sprintf(": %s; nothing is sent until %.1fs", brief(c.Cause), s.clock.at(c.Until).Seconds())
		if c.From == tripper.Closed {
			why = fmt.Sprintf(": %s, the last one", plural(c.Failures, "failure")) + why
		}
	}
	s.print("%6.1fs  ===  breaker %s: %v -> %v%s", s.clock.at(c.At).Seconds(), c.Service, c.From, c.To, why)
}

// line prints a line about a request.
func (s *show) line(at time.Duration, number int, format string, args ...any) {
	kind := "message"
	if number >= 1 && number <= len(badDay) && badDay[number-1].stream {
		kind = "stream"
	}
	s.print("%6.1fs  #%02d  %-7s  %s", at.Seconds(), number, kind, fmt.Sprintf(format, args...))
}

func (s *show) print(format string, args ...any) {
	s.mu.Lock()
	defer s.mu.Unlock()
	fmt.Fprintf(s.out, format+"\n", args...)
}

// conclude prints the stats and the comparison.
func (s *show) conclude() {
	s.print("\nStats of the transport\n%s", s.stats())
	all, outage := s.upstream.sawInAll()
	allDirect, outageDirect := s.twin.sawInAll()
	t := s.tally
	s.print("Summary")
	s.print("%s, of which a client saw fail: %d through the proxy, %d without it.", plural(t.requests, "request"), t.failed, t.failedDirectly)
	s.print("Retries saved %d. The breaker, still open when the service was back, refused %d that would have gone well.", t.saved, t.refusedInVain)
	s.print("The API was sent %s, %d of them during its outage (directly: %d and %d, without any retry).",
		plural(all, "attempt"), outage, allDirect, outageDirect)
}

// stats returns the transport's stats as two tables.
func (s *show) stats() string {
	var table strings.Builder
	seconds := func(real time.Duration) string { return fmt.Sprintf("%.1fs", s.clock.nominal(real).Seconds()) }
	w := tabwriter.NewWriter(&table, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "SERVICE\tREQUESTS\tOK\tFAILED\tREJECTED\tCANCELLED\tRETRIES\tRECOVERED\tEXHAUSTED\tNOT RETRIED")
	for st := range s.transport.All() {
		not := st.Suppressed
		fmt.Fprintf(w, "%s\t%d\t%d\t%d\t%d\t%d\t%d\t%d\t%d\t%d\n", st.Service, st.Requests, st.OK, st.Failed, st.Rejected,
			st.Cancelled, st.Retries, st.Recovered, st.Exhausted, not.Budget+not.Deadline+not.RetryAfter+not.Body+not.Method)
	}
	fmt.Fprintln(w)
	fmt.Fprintln(w, "SERVICE\tATTEMPTS\tSUCCESSES\tFAILURES\tBROKEN STREAMS\tSTATE\tCHANGES\tCLOSED\tOPEN\tHALF_OPEN\tRECOVERIES")
	for st := range s.transport.All() {
		fmt.Fprintf(w, "%s\t%d\t%d\t%d\t%d\t%v\t%d\t%s\t%s\t%s\t%d\n", st.Service, st.Attempts, st.Successes, st.Failures,
			st.StreamFailures, st.State, st.Transitions, seconds(st.TimeClosed), seconds(st.TimeOpen), seconds(st.TimeHalfOpen), st.Recoveries)
	}
	w.Flush() // into memory: cannot fail
	return table.String()
}

func plural(n int, what string) string {
	if n != 1 {
		what += "s"
	}
	return fmt.Sprintf("%d %s", n, what)
}
