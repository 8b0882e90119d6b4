package tripper

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"reflect"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
	"unsafe"

	"github.com/stretchr/testify/require"

	"github.com/tripper-go/tripper/internal/registry"
	"github.com/tripper-go/tripper/internal/tripptest"
)

var errStatsDown = errors.New("the service is down")

func statsAnswer(status int) *http.Response { return tripptest.Answer(status, "") }

// statsOK is a base that answers everything at once.
var statsOK = tripptest.Func(func(*http.Request) (*http.Response, error) { return statsAnswer(200), nil })

// A statsSwitch is a base that answers with one status until told otherwise;
// below 100 it fails.
type statsSwitch struct{ status atomic.Int64 }

func (s *statsSwitch) RoundTrip(req *http.Request) (*http.Response, error) {
	closeBody(req)
	if status := int(s.status.Load()); status >= 100 {
		return statsAnswer(status), nil
	}
	return nil, errStatsDown
}

// statsOnce is a Policy without retries: each request is one attempt.
func statsOnce(b BreakerPolicy) Policy {
	return Policy{Retry: RetryPolicy{MaxAttempts: 1}, Breaker: b}
}

// statsStream is a response whose body has nothing but its end.
func statsStream(end error) *http.Response {
	resp := statsAnswer(200)
	resp.Body = statsBody{end}
	return resp
}

type statsBody struct{ end error }

func (b statsBody) Read([]byte) (int, error) { return 0, b.end }
func (b statsBody) Close() error             { return nil }

func requireStatsReconcile(t *testing.T, st Stats) {
	t.Helper()
	require.Equal(t, st.Requests, st.OK+st.Failed+st.Rejected+st.Cancelled, "requests: %+v", st)
	require.Equal(t, st.Attempts, st.Successes+st.Failures+st.Ignored, "attempts: %+v", st)
}

// statsShortcuts counts the hosts that lead straight to a service.
func statsShortcuts(tr *Transport) (n int) {
	for range tr.load().config.Load().shortcuts.All() {
		n++
	}
	return n
}

func statsGet(tr *Transport, host string) (*http.Response, error) {
	return tr.RoundTrip(&http.Request{Method: http.MethodGet, URL: &url.URL{Scheme: "https", Host: host, Path: "/"}})
}

// statsTouch makes a request that nothing can go wrong with.
func statsTouch(t testing.TB, tr *Transport, host string) {
	if _, err := statsGet(tr, host); err != nil {
		t.Fatal(host, err)
	}
}

func statsHas(tr *Transport, service string) bool {
	_, ok := tr.Stats(service)
	return ok
}

// statsFill makes n services and returns their names, the oldest first.
func statsFill(t testing.TB, tr *Transport, n int) []string {
	names := make([]string, n)
	for i := range names {
		names[i] = fmt.Sprintf("h%d.example.com", i)
		statsTouch(t, tr, names[i])
	}
	return names
}

func statsCount(tr *Transport) (n int) {
	for range tr.All() {
		n++
	}
	return n
}

func TestRegistryIsBounded(t *testing.T) {
	tr := &Transport{Base: statsOK, Hosts: map[string]Policy{"named.example.com": {}, "*.wild.example.com": {Service: "wild"}}}
	u := &url.URL{Scheme: "https", Path: "/"}
	req := &http.Request{Method: http.MethodGet, URL: u}
	for i := range 100_000 {
		u.Host = "h" + strconv.Itoa(i) + ".example.com"
		if _, err := tr.RoundTrip(req); err != nil {
			t.Fatal(err)
		}
	}
	require.Equal(t, registry.Max+2, statsCount(tr))
	require.True(t, statsHas(tr, "named.example.com"))
	require.True(t, statsHas(tr, "wild"))
	require.True(t, statsHas(tr, "h99999.example.com"))
	require.LessOrEqual(t, statsShortcuts(tr), registry.Max, "no shortcut leads to what is forgotten")
}

// The bound holds also for names that have no shortcut by their host: those of
// the function Service, and of hosts whose policy depends on the port.
func TestRegistryIsBoundedWithoutShortcuts(t *testing.T) {
	tests := map[string]*Transport{
		"Service": {Base: statsOK, Service: func(req *http.Request) string { return "model " + req.URL.Host }},
		"port":    {Base: statsOK, Hosts: map[string]Policy{"*.example.com:443": {}}},
	}
	for name, tr := range tests {
		t.Run(name, func(t *testing.T) {
			require.NotPanics(t, func() { statsFill(t, tr, registry.Max+1000) })
			require.Equal(t, registry.Max, statsCount(tr))
		})
	}
}

// The longest-idle service goes first, whatever order they were made in.
func TestRegistryForgetsTheLongestIdle(t *testing.T) {
	orders := map[string]func([]string){
		"touched in reverse":   slices.Reverse[[]string],
		"touched in any order": func(names []string) { rand.Shuffle(len(names), reflect.Swapper(names)) },
	}
	for name, arrange := range orders {
		t.Run(name, func(t *testing.T) {
			tr := &Transport{Base: statsOK}
			names := statsFill(t, tr, registry.Max)
			arrange(names)
			for _, host := range names {
				statsTouch(t, tr, host)
			}
			gone := 0 // of names, always the first ones
			for i := range names {
				statsTouch(t, tr, fmt.Sprint("new", i))
				for gone < len(names) && !statsHas(tr, names[gone]) {
					gone++
				}
				if i%100 == 99 {
					require.Equal(t, len(names)-gone+i+1, statsCount(tr), "others are still there")
				}
				if i == registry.Max/2 { // enough requests have looked for what was touched
					require.Equal(t, registry.Max, statsCount(tr))
				}
			}
			require.Equal(t, len(names), gone)
			require.Equal(t, registry.Max, statsCount(tr))
		})
	}
}

// A host that is only reached because a Layer leads there is in use as well.
func TestRegistryKnowsHostsOfLayers(t *testing.T) {
	lead := func(next http.RoundTripper) http.RoundTripper {
		return tripptest.Func(func(req *http.Request) (*http.Response, error) {
			if strings.HasPrefix(req.URL.Host, "virtual") {
				copied := *req.URL
				copied.Host = "real.example.com"
				req = req.Clone(req.Context())
				req.URL = &copied
			}
			return next.RoundTrip(req)
		})
	}
	tr := &Transport{Base: statsOK, Layers: []Layer{lead}}
	statsTouch(t, tr, "virtual.example.com")
	for i := range 2 * registry.Max {
		statsTouch(t, tr, fmt.Sprintf("h%d.example.com", i))
		if i%10 == 0 {
			statsTouch(t, tr, "virtual.example.com")
		}
	}
	st, ok := tr.Stats("real.example.com")
	require.True(t, ok)
	require.EqualValues(t, 1+2*registry.Max/10+1, st.Attempts, "it was never forgotten")
}

// What is open or in use is never forgotten, also when it is the longest idle.
func TestRegistryKeepsOpenAndBusy(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		release := make(chan struct{})
		tr := &Transport{Base: tripptest.Func(func(req *http.Request) (*http.Response, error) {
			switch name, _, _ := strings.Cut(req.URL.Host, "-"); name {
			case "held":
				<-release
			case "stream":
				return statsStream(io.EOF), nil
			case "down":
				return nil, errStatsDown
			}
			return statsAnswer(200), nil
		}), Policy: statsOnce(BreakerPolicy{FailureThreshold: 1, RecoveryTimeout: time.Minute})}
		var kept []string
		var streams []io.Closer
		for i := range 40 {
			kept = append(kept, fmt.Sprint("held-", i), fmt.Sprint("stream-", i), fmt.Sprint("down-", i), fmt.Sprint("tripped-", i))
			go statsGet(tr, fmt.Sprint("held-", i))
			resp, err := statsGet(tr, fmt.Sprint("stream-", i))
			require.NoError(t, err)
			streams = append(streams, resp.Body)
			statsGet(tr, fmt.Sprint("down-", i))
			statsTouch(t, tr, fmt.Sprint("tripped-", i))
			require.True(t, tr.Trip(fmt.Sprint("tripped-", i), time.Minute, nil))
		}
		synctest.Wait()
		statsFill(t, tr, registry.Max+1000)
		for _, name := range kept {
			require.True(t, statsHas(tr, name), name)
		}
		require.LessOrEqual(t, statsCount(tr), registry.Max)

		// Nothing holds them any more.
		close(release)
		for _, s := range streams {
			s.Close()
		}
		time.Sleep(time.Minute)
		for i := range registry.Max {
			statsTouch(t, tr, fmt.Sprint("more-", i))
		}
		for _, name := range kept {
			require.False(t, statsHas(tr, name), name)
		}
		require.Equal(t, registry.Max, statsCount(tr))
	})
}

func TestRegistryNamedServices(t *testing.T) {
	tr := &Transport{
		Base:   statsOK,
		Policy: Policy{Service: "rest"},
		Hosts: map[string]Policy{
			"API.example.com":  {},
			"localhost:8080":   {},
			"*.claude.example": {Service: "claude_api"},
			"claude.example":   {Service: "claude_api"},
			"*.each.example":   {},
		},
	}
	names := []string{"api.example.com", "claude_api", "localhost:8080", "rest"}
	require.Equal(t, names, statsAllNames(tr), "from the start")
	for host, service := range map[string]string{
		"api.example.com.": "api.example.com", "a.b.claude.example": "claude_api", "claude.example": "claude_api",
		"localhost:8080": "localhost:8080", "localhost": "rest", "elsewhere": "rest", "a.each.example": "a.each.example",
	} {
		before, _ := tr.Stats(service)
		statsTouch(t, tr, host)
		after, _ := tr.Stats(service)
		require.Equal(t, before.Requests+1, after.Requests, host)
	}
	for i := range registry.Max + 1000 {
		statsTouch(t, tr, fmt.Sprintf("h%d.each.example", i))
	}
	for _, name := range names {
		require.True(t, statsHas(tr, name))
	}
	require.False(t, statsHas(tr, "API.example.com"), "names are as they are given")
	require.False(t, tr.Reset("nobody"))
	require.False(t, tr.Trip("nobody here", time.Hour, nil))
	require.False(t, tr.Trip("elsewhere", time.Hour, nil), "it is a part of the service rest")
	require.True(t, tr.Reset("rest"))
}

func statsAllNames(tr *Transport) (names []string) {
	for st := range tr.All() {
		names = append(names, st.Service)
	}
	return names
}

func TestRegistryAliasesShare(t *testing.T) {
	tr := &Transport{Base: statsOK}
	for _, u := range []string{"https://API.example.com/a", "https://api.example.com.", "https://api.example.com:443/b",
		"http://api.example.com:80", "http://api.example.com", "https://Api.Example.Com.:443", "https://user:pass@api.example.com?q"} {
		req, err := http.NewRequest(http.MethodGet, u, nil)
		require.NoError(t, err)
		for range 2 { // by the long way and by the shortcut
			_, err = tr.RoundTrip(req)
			require.NoError(t, err)
		}
	}
	require.Equal(t, []string{testHost}, statsAllNames(tr))
	require.EqualValues(t, 14, statsOf(t, tr, testHost).Requests)
	for _, host := range []string{"api.example.com:8443", "api.example.com:80", "[::1]:443", "[::1]"} {
		statsTouch(t, tr, host)
	}
	require.Equal(t, []string{"[::1]", testHost, "api.example.com:80", "api.example.com:8443"}, statsAllNames(tr))
}

func TestRegistryServiceFunc(t *testing.T) {
	tr := &Transport{Base: statsOK, Service: func(req *http.Request) string { return strings.Trim(req.URL.Path, "/") },
		Hosts: map[string]Policy{"named.example": {Service: "named"}}}
	for _, u := range []string{"https://a.example/m1", "https://b.example/m1", "https://b.example/m2", "https://c.example/", "https://named.example/"} {
		req, err := http.NewRequest(http.MethodGet, u, nil)
		require.NoError(t, err)
		_, err = tr.RoundTrip(req)
		require.NoError(t, err)
	}
	require.Equal(t, []string{"c.example", "m1", "m2", "named"}, statsAllNames(tr))
	st, _ := tr.Stats("m1")
	require.EqualValues(t, 2, st.Requests)
}

func TestAllIsSortedAndMayStop(t *testing.T) {
	tr := &Transport{Base: statsOK}
	require.Empty(t, statsAllNames(tr))
	statsFill(t, tr, 300)
	names := statsAllNames(tr)
	require.Len(t, names, 300)
	require.True(t, slices.IsSorted(names))
	require.Equal(t, names, statsAllNames(tr))
	for st := range tr.All() {
		require.Equal(t, names[0], st.Service)
		break
	}
}

// A service's name, errors and log lines do not keep the URL of the request
// that made it.
func TestRegistryLetsGoOfURLs(t *testing.T) {
	tr := &Transport{Base: tripptest.Func(func(*http.Request) (*http.Response, error) { return nil, errStatsDown }),
		Policy: statsOnce(BreakerPolicy{FailureThreshold: 1})}
	freed := make(chan struct{})
	requestStatsBigURL(t, tr, freed)
	for range 500 {
		runtime.GC()
		select {
		case <-freed:
			require.True(t, statsHas(tr, "big.example.com"))
			return
		default:
			runtime.Gosched()
		}
	}
	t.Fatal("something still refers to the URL")
}

//go:noinline
func requestStatsBigURL(t *testing.T, tr *Transport, freed chan struct{}) {
	raw := []byte("https://big.example.com/" + strings.Repeat("x", 1<<20))
	runtime.AddCleanup(&raw[0], func(freed chan struct{}) { close(freed) }, freed)
	u, err := url.Parse(unsafe.String(&raw[0], len(raw)))
	require.NoError(t, err)
	for range 3 {
		_, err = tr.RoundTrip(&http.Request{Method: http.MethodGet, URL: u})
		require.Error(t, err)
	}
}

// Services made and forgotten by many goroutines at once.
func TestRegistryConcurrentChurn(t *testing.T) {
	tr := &Transport{Base: statsOK}
	var all sync.WaitGroup
	for g := range 8 {
		all.Go(func() {
			r := rand.New(rand.NewPCG(uint64(g), 3))
			for i := range 2000 {
				host := fmt.Sprintf("h%d.example.com", r.IntN(3*registry.Max))
				statsTouch(t, tr, host)
				switch i % 100 {
				case 0:
					tr.Stats(host)
				case 1:
					tr.Trip(host, 1, nil)
				case 2:
					tr.Reset(host)
				}
			}
		})
	}
	all.Wait()
	require.LessOrEqual(t, statsCount(tr), registry.Max)
	st := tr.load()
	for r := range st.config.Load().shortcuts.All() {
		require.Same(t, r.service, st.services.Get(r.service.name), "a shortcut to a service that is forgotten")
	}
}

// One service called from everywhere: nothing is lost on the way to more cells.
func TestCountersUnderConcurrency(t *testing.T) {
	tr := &Transport{Base: statsOK, Policy: Policy{Service: testHost}}
	var over atomic.Bool
	var reader, all sync.WaitGroup
	reader.Go(func() {
		var last Stats
		for !over.Load() {
			st, _ := tr.Stats(testHost)
			if st.Requests < last.Requests || st.OK < last.OK || st.OK > st.Requests || st.Successes > st.Attempts {
				t.Errorf("%+v after %+v", st, last)
				return
			}
			last = st
			runtime.Gosched()
		}
	})
	for range 50 {
		all.Go(func() {
			for range 500 {
				statsTouch(t, tr, "any.example.com")
			}
		})
	}
	all.Wait()
	over.Store(true)
	reader.Wait()
	st := statsOf(t, tr, testHost)
	require.Equal(t, []uint64{25_000, 25_000, 25_000, 25_000}, []uint64{st.Requests, st.OK, st.Attempts, st.Successes})
}

// A statsFaulty is a server that has faults, and counts what it has seen.
type statsFaulty struct {
	attempts []atomic.Int32 // by request
	seen     [2]map[string]*atomic.Int64
	leave    sync.Map // of requests: what cancels them
}

var statsFaults = append(slices.Repeat([]string{"ok"}, 20), "404", "429", "429", "503", "503", "503", "reset", "half", "slow")

func newStatsFaulty(requests int) *statsFaulty {
	f := &statsFaulty{attempts: make([]atomic.Int32, requests)}
	for i := range f.seen {
		f.seen[i] = map[string]*atomic.Int64{}
		for _, fault := range statsFaults {
			f.seen[i][fault] = new(atomic.Int64)
		}
	}
	return f
}

func (f *statsFaulty) sum(service int, faults ...string) (n uint64) {
	for _, fault := range faults {
		n += uint64(f.seen[service][fault].Load())
	}
	return n
}

func (f *statsFaulty) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	_, _ = io.Copy(io.Discard, req.Body)
	id, _ := strconv.Atoi(req.Header.Get("X-Request"))
	attempt := f.attempts[id].Add(1)
	fault := statsFaults[rand.New(rand.NewPCG(uint64(id), uint64(attempt))).IntN(len(statsFaults))]
	f.seen[id%2][fault].Add(1)
	switch fault {
	case "ok":
		_, _ = io.WriteString(w, "all is well")
	case "reset", "half":
		hangUp(w, fault == "half")
	case "slow":
		leave, _ := f.leave.Load(id)
		leave.(context.CancelFunc)()
		<-req.Context().Done()
	default:
		status, _ := strconv.Atoi(fault)
		w.WriteHeader(status)
	}
}

// hangUp resets the connection, or closes it in the middle of a body.
func hangUp(w http.ResponseWriter, half bool) {
	conn, _, err := w.(http.Hijacker).Hijack()
	if err != nil {
		panic(err)
	}
	if half {
		_, _ = io.WriteString(conn, "HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf")
	} else {
		_ = conn.(*net.TCPConn).SetLinger(0)
	}
	conn.Close()
}

// A statsTally is what the callers of one service have seen.
type statsTally struct {
	requests, ok, failed, rejected, cancelled, recovered atomic.Uint64
}

func (f *statsFaulty) call(t *testing.T, client *http.Client, u string, id int, tally *statsTally) {
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	f.leave.Store(id, cancel)
	// A POST: net/http itself does not send it twice.
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, u, strings.NewReader("question"))
	if err != nil {
		t.Error(err)
		return
	}
	req.Header.Set("X-Request", strconv.Itoa(id))
	tally.requests.Add(1)
	resp, err := client.Do(req)
	switch {
	case errors.Is(err, ErrRejected):
		tally.rejected.Add(1)
	case errors.Is(err, context.Canceled):
		tally.cancelled.Add(1)
	case err != nil || failedStatus(resp.StatusCode):
		tally.failed.Add(1)
	default:
		tally.ok.Add(1)
		if f.attempts[id].Load() > 1 {
			tally.recovered.Add(1)
		}
	}
	if err == nil {
		_, _ = io.Copy(io.Discard, resp.Body)
		resp.Body.Close()
	}
}

// Ten thousand requests through a bad day, for a service whose breaker is in
// use and one that has none: the counters are what server and callers saw.
func TestCountersReconcile(t *testing.T) {
	const requests, callers = 10_000, 16
	faulty := newStatsFaulty(requests)
	server := httptest.NewServer(faulty)
	defer server.Close()
	base := &http.Transport{MaxIdleConnsPerHost: callers}
	defer base.CloseIdleConnections()
	retry := RetryPolicy{MinWait: 1, MaxWait: time.Millisecond, Replay: ReplayAny, Budget: Budget{Ratio: -1}}
	tr := &Transport{Base: base, Service: func(req *http.Request) string { return strings.Trim(req.URL.Path, "/") }}
	tr.Hosts = map[string]Policy{
		"localhost": {Retry: retry, Breaker: BreakerPolicy{FailureThreshold: 2, RecoveryTimeout: time.Millisecond}},
		"127.0.0.1": {Retry: retry, Breaker: BreakerPolicy{FailureThreshold: -1}},
	}
	bare := server.URL + "/bare"
	guarded := strings.Replace(server.URL, "127.0.0.1", "localhost", 1) + "/guarded"
	base.DialContext = func(ctx context.Context, network, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, network, server.Listener.Addr().String())
	}
	client := &http.Client{Transport: tr}
	var tallies [2]statsTally
	var next atomic.Int64
	var all sync.WaitGroup
	for range callers {
		all.Go(func() {
			for id := int(next.Add(1)) - 1; id < requests; id = int(next.Add(1)) - 1 {
				faulty.call(t, client, []string{bare, guarded}[id%2], id, &tallies[id%2])
			}
		})
	}
	all.Wait()
	for i, name := range []string{"bare", "guarded"} {
		st, ok := tr.Stats(name)
		require.True(t, ok)
		requireStatsMatch(t, st, faulty, i, &tallies[i])
	}
	requireStatsBare(t, tr, faulty, &tallies[0])
	st, _ := tr.Stats("guarded")
	require.NotZero(t, st.Rejected)
	require.NotZero(t, st.Recoveries)
}

// requireStatsMatch compares what must agree with any breaker.
func requireStatsMatch(t *testing.T, st Stats, f *statsFaulty, service int, tally *statsTally) {
	t.Helper()
	requireStatsReconcile(t, st)
	require.Equal(t,
		[]uint64{tally.requests.Load(), tally.ok.Load(), tally.failed.Load(), tally.rejected.Load(), tally.cancelled.Load(), tally.recovered.Load()},
		[]uint64{st.Requests, st.OK, st.Failed, st.Rejected, st.Cancelled, st.Recovered}, "%+v", st)
	require.Equal(t, f.sum(service, "ok", "404", "429", "503", "reset", "half", "slow"), st.Attempts, "%+v", st)
	started := uint64(0)
	for id := service; id < len(f.attempts); id += 2 {
		if f.attempts[id].Load() > 0 {
			started++
		}
	}
	require.Equal(t, st.Attempts-started, st.Retries)
}

// requireStatsBare compares, where no breaker interferes, every outcome.
func requireStatsBare(t *testing.T, tr *Transport, f *statsFaulty, tally *statsTally) {
	t.Helper()
	st, _ := tr.Stats("bare")
	require.Equal(t,
		[]uint64{f.sum(0, "ok", "404"), f.sum(0, "503", "reset", "half"), f.sum(0, "429", "slow"), f.sum(0, "half"), 0, 0},
		[]uint64{st.Successes, st.Failures, st.Ignored, st.StreamFailures, st.Rejected, st.Transitions}, "%+v", st)
	require.Equal(t, tally.failed.Load(), st.Exhausted, "each failed after its last attempt")
	require.Equal(t, Suppressed{}, st.Suppressed)
}

func TestStatsJSON(t *testing.T) {
	filled := Stats{}
	fillStats(reflect.ValueOf(&filled).Elem(), new(int64))
	filled.State = HalfOpen
	text, err := json.Marshal(filled)
	require.NoError(t, err)
	var back Stats
	require.NoError(t, json.Unmarshal(text, &back))
	require.Equal(t, filled, back)

	var keys map[string]any
	require.NoError(t, json.Unmarshal(text, &keys))
	require.Equal(t, "HALF_OPEN", keys["state"])
	require.Equal(t, reflect.TypeFor[Stats]().NumField(), len(keys))
	require.Len(t, keys["suppressed"], reflect.TypeFor[Suppressed]().NumField())
	snake := regexp.MustCompile(`"([^"]+)":`)
	for _, match := range snake.FindAllStringSubmatch(string(text), -1) {
		require.Regexp(t, `^[a-z]+(_[a-z]+)*$`, match[1])
	}

	text, err = json.Marshal(Stats{Service: "new"})
	require.NoError(t, err)
	require.NotContains(t, string(text), "open_until")
	require.NotContains(t, string(text), "last_failure")
	require.Contains(t, string(text), `"state":"CLOSED"`)
	require.Error(t, json.Unmarshal([]byte(`{"state":"AJAR"}`), &back))
}

// fillStats gives each field a value of its own.
func fillStats(v reflect.Value, n *int64) {
	for i := range v.NumField() {
		*n++
		switch f := v.Field(i); f.Interface().(type) {
		case string:
			f.SetString(fmt.Sprint("text", *n))
		case time.Time:
			f.Set(reflect.ValueOf(time.Unix(*n, *n).UTC()))
		case uint64:
			f.SetUint(uint64(*n))
		case float64:
			f.SetFloat(float64(*n))
		case Suppressed:
			fillStats(f, n)
		default:
			f.SetInt(*n % 3)
		}
	}
}

// statsLogger writes lines whose times do not depend on the time zone.
func statsLogger(w io.Writer) *slog.Logger {
	return slog.New(slog.NewTextHandler(w, &slog.HandlerOptions{Level: slog.LevelDebug, ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
		if a.Value.Kind() == slog.KindTime {
			a.Value = slog.TimeValue(a.Value.Time().UTC())
		}
		return a
	}}))
}

// The lines that an outage leaves in the log. UPDATE_GOLDEN=1 writes them anew.
func TestLogLines(t *testing.T) {
	var log bytes.Buffer
	synctest.Test(t, func(t *testing.T) {
		s := &statsSwitch{}
		tr := &Transport{Base: s, Logger: statsLogger(&log),
			Policy: Policy{Retry: RetryPolicy{Jitter: JitterNone, Replay: ReplayAny}, Breaker: BreakerPolicy{FailureThreshold: 3}}}
		ask := func(after time.Duration, status int) {
			time.Sleep(after)
			s.status.Store(int64(status))
			req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, "https://user:secret@api.example.com/v1/messages?key=secret#top", nil)
			require.NoError(t, err)
			if resp, err := tr.RoundTrip(req); err == nil {
				resp.Body.Close()
			}
		}
		ask(0, 200) // nothing to tell
		ask(0, 404) // nor here
		ask(0, 503) // retries, opens
		for range 20 {
			ask(250*time.Millisecond, 200) // rejected for five seconds
		}
		ask(time.Minute, 0) // half-open, opens again
		ask(time.Minute, 200)
		ask(0, 200) // closed
		require.True(t, tr.Trip(testHost, time.Second, nil))
		require.True(t, tr.Reset(testHost))
	})
	const golden = "testdata/log.golden"
	if os.Getenv("UPDATE_GOLDEN") != "" {
		require.NoError(t, os.WriteFile(golden, log.Bytes(), 0o644))
	}
	want, err := os.ReadFile(golden)
	require.NoError(t, err)
	require.Equal(t, string(want), log.String())
}

// Every service has a second of its own.
func TestLogRejectionsOnceASecond(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log bytes.Buffer
		tr := &Transport{Base: statsOK, Logger: statsLogger(&log)}
		services := []string{"a.example.com", "b.example.com"}
		for _, host := range services {
			statsTouch(t, tr, host)
			require.True(t, tr.Trip(host, time.Hour, nil))
		}
		count := func() int { return strings.Count(log.String(), "circuit breaker open: request rejected") }
		for second := range 10 {
			for range 100 {
				for _, host := range services {
					_, err := statsGet(tr, host)
					require.ErrorIs(t, err, ErrRejected)
				}
				time.Sleep(10 * time.Millisecond)
			}
			require.LessOrEqual(t, count(), 2*(second+1))
			require.GreaterOrEqual(t, count(), 2*(second+1)-2)
		}
	})
}

// A nil Logger is silent, also where slog has a default.
func TestLogNilIsSilent(t *testing.T) {
	var log bytes.Buffer
	was := slog.Default()
	slog.SetDefault(statsLogger(&log))
	defer slog.SetDefault(was)
	synctest.Test(t, func(t *testing.T) {
		tr := &Transport{Base: &statsSwitch{}}
		for range 3 {
			_, err := get(tr)
			require.Error(t, err)
		}
		require.Equal(t, Open, statsOf(t, tr, testHost).State)
	})
	require.Empty(t, log.String())
}

// statsLeaks are what bases put into their errors. Each secret has SECRET in it.
var statsLeaks = map[string]func(*url.URL) error{
	"whole URL": func(u *url.URL) error { return errors.New("cannot reach " + u.String()) },
	"url.Error": statsURLError,
	"nested":    func(u *url.URL) error { return fmt.Errorf("proxy: %w", statsURLError(u)) },
	"twice":     func(u *url.URL) error { return &url.Error{Op: "Get", URL: u.String(), Err: statsURLError(u)} },
	"joined":    func(u *url.URL) error { return errors.Join(errStatsDown, statsURLError(u)) },
	"redacted":  func(u *url.URL) error { return errors.New("cannot reach " + u.Redacted()) },
	"query":     func(u *url.URL) error { return errors.New("bad query " + u.RawQuery) },
	"one key":   func(u *url.URL) error { return errors.New("bad key " + u.Query().Get("key")) },
	"raw value": func(u *url.URL) error { return errors.New("bad token " + url.QueryEscape(u.Query().Get("token"))) },
	"reordered": func(u *url.URL) error { return errors.New("bad query " + u.Query().Encode()) },
	"a longer":  func(u *url.URL) error { return errors.New("bad value " + u.Query().Get("longer")) },
	"user info": func(u *url.URL) error { return errors.New("bad login " + u.User.String()) },
	"password":  func(u *url.URL) error { p, _ := u.User.Password(); return errors.New("bad password " + p) },
	"raw pass": func(u *url.URL) error {
		_, p, _ := strings.Cut(u.User.String(), ":")
		return errors.New("bad password " + p)
	},
	"user name":  func(u *url.URL) error { return errors.New("unknown user " + u.User.Username()) },
	"fragment":   func(u *url.URL) error { return errors.New("odd fragment " + u.Fragment) },
	"no request": func(u *url.URL) error { return fmt.Errorf("dial: %q", "GET "+u.RequestURI()) },
}

func statsURLError(u *url.URL) error {
	return &url.Error{Op: "Get", URL: u.String(), Err: errStatsDown}
}

// The user info and the query of a URL are in nothing that is ours.
func TestSecretsStaySecret(t *testing.T) {
	const raw = "https://user-SECRET:pass%2FSECRET@api.example.com/path?short=abcd&key=key-SECRET&token=a%2FSECRET%2Bb&longer=abcd-SECRET#frag-SECRET"
	for name, leak := range statsLeaks {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				for range 3 { // the values of a query come in any order
					said := statsEverythingSaid(t, raw, leak)
					require.Contains(t, said, "https://api.example.com/path")
					if at := strings.Index(said, "SECRET"); at >= 0 {
						t.Fatalf("%s", said[max(0, at-60):at+6])
					}
				}
			})
		})
	}
}

// statsEverythingSaid lets a service fail, and a stream of it, and returns all
// that was said of it.
func statsEverythingSaid(t *testing.T, raw string, leak func(*url.URL) error) string {
	var said bytes.Buffer
	requests := 0
	tr := &Transport{
		Policy: Policy{Breaker: BreakerPolicy{FailureThreshold: 3}},
		Logger: slog.New(slog.NewJSONHandler(&said, nil)),
		Observers: []*Observer{{
			Attempt:     func(e AttemptEvent) { e.Context = nil; fmt.Fprintf(&said, "%+v %v\n", e, e.Err) },
			Retry:       func(e RetryEvent) { e.Context = nil; fmt.Fprintf(&said, "%+v %v\n", e, e.Cause) },
			StateChange: func(c StateChange) { c.Context = nil; fmt.Fprintf(&said, "%+v %v\n", c, c.Cause) },
		}},
		Base: tripptest.Func(func(req *http.Request) (*http.Response, error) {
			if requests++; requests == 1 {
				return statsStream(leak(req.URL)), nil
			}
			return nil, leak(req.URL)
		}),
	}
	for range 3 {
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, raw, nil)
		require.NoError(t, err)
		resp, err := tr.RoundTrip(req)
		if err == nil {
			_, _ = resp.Body.Read(make([]byte, 1))
			resp.Body.Close()
		}
		var open *OpenError
		if errors.As(err, &open) {
			fmt.Fprintln(&said, open, open.Last)
		}
		require.NoError(t, json.NewEncoder(&said).Encode(statsOf(t, tr, testHost)))
	}
	require.Equal(t, Open, statsOf(t, tr, testHost).State)
	return said.String()
}

// cause takes nothing away that is not secret, and keeps the error's type.
func TestCauseKeepsWhatItCan(t *testing.T) {
	req, err := http.NewRequest(http.MethodGet, "https://api.example.com/path?a=1&key=secret-key", nil)
	require.NoError(t, err)
	op := &net.OpError{Op: "dial", Err: errStatsDown}
	require.Same(t, op, cause(req, &result{err: op}))
	require.Same(t, op, cause(req, &result{err: &url.Error{Op: "Get", URL: "https://api.example.com/?key=secret-key", Err: op}}))
	secret := fmt.Errorf("with secret-key: %w", op)
	cleaned := cause(req, &result{err: secret})
	require.Equal(t, "with xxxxx: dial: the service is down", cleaned.Error())
	require.ErrorIs(t, cleaned, op)
	require.Equal(t, "529", cause(req, &result{resp: statsAnswer(529)}).Error())
	require.Equal(t, "503 Service Unavailable", cause(req, &result{resp: statsAnswer(503)}).Error())
}

// A healthy service that is idle takes little: its share of the tables and of
// the heap included.
func TestMemoryOfIdleService(t *testing.T) {
	const n = 4000
	names := make([]string, n)
	for i := range names {
		names[i] = fmt.Sprintf("host-%d.example.com", i)
	}
	tr := &Transport{Base: statsOK}
	tr.load()
	before := statsHeap()
	for _, name := range names {
		statsTouch(t, tr, name)
	}
	each := float64(statsHeap()-before) / n
	runtime.KeepAlive(tr)
	runtime.KeepAlive(names)
	t.Logf("%.0f bytes for each idle service", each)
	require.LessOrEqual(t, each, 500.0)
}

func statsHeap() int64 {
	runtime.GC()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

// Hosts that share a service take the shortcut, too, but no more than so many.
func TestShortcutsOfASharedServiceAreBounded(t *testing.T) {
	tr := &Transport{Base: statsOK, Policy: Policy{Service: "all"}}
	const n = registry.Max + 100
	statsFill(t, tr, n)
	require.Equal(t, registry.Max, statsShortcuts(tr))
	statsFill(t, tr, n)
	st, _ := tr.Stats("all")
	require.EqualValues(t, 2*n, st.OK)
	require.Len(t, slices.Collect(tr.All()), 1)
}

func TestTripWithoutATime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		tr := &Transport{Policy: Policy{Service: "s"}}
		require.True(t, tr.Trip("s", 0, nil))
		st, _ := tr.Stats("s")
		require.Equal(t, time.Now().Add(time.Minute), st.OpenUntil)
	})
}
