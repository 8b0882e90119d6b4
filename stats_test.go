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

	"github.com/stretchr/testify/assert"
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

// statsWatch keeps what an Observer is told, as lines.
type statsWatch struct {
	mu    sync.Mutex // guards lines
	lines []string
}

func (w *statsWatch) say(format string, args ...any) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.lines = append(w.lines, fmt.Sprintf(format, args...))
}

func (w *statsWatch) observer() *Observer {
	return &Observer{
		Attempt: func(e AttemptEvent) {
			w.say("%s %s attempt %d: %d %v %v after %v", e.Service, e.Method, e.Attempt, e.Status, e.Outcome, e.Err, e.Duration)
		},
		Retry:       func(e RetryEvent) { w.say("retry %d in %v: %v", e.Attempt, e.Wait, e.Cause) },
		StateChange: func(c StateChange) { w.say("%s %v to %v by %v", c.Service, c.From, c.To, c.Origin) },
		Service:     func(name string) { w.say("service %s", name) },
	}
}

func statsSlow(after time.Duration, step any) tripptest.Func {
	return func(req *http.Request) (*http.Response, error) {
		closeBody(req)
		select {
		case <-time.After(after):
		case <-req.Context().Done():
			return nil, req.Context().Err()
		}
		return tripptest.Script(step).RoundTrip(&http.Request{})
	}
}

func TestObserverSeesEachAttempt(t *testing.T) {
	early := func() *http.Response {
		return tripptest.Answer(200, "event: error\ndata: {\"type\":\"error\",\"error\":{\"type\":\"overloaded_error\"}}\n\n", "Content-Type", "text/event-stream")
	}
	tests := map[string]struct {
		steps []any
		want  []string
	}{
		"success":   {[]any{statsSlow(time.Second, 200)}, []string{"attempt 1: 200 success <nil> after 1s"}},
		"not found": {[]any{statsSlow(time.Second, 404)}, []string{"attempt 1: 404 success <nil> after 1s"}},
		"a retry": {[]any{statsSlow(time.Second, 503), statsSlow(2*time.Second, 200)}, []string{
			"attempt 1: 503 failure <nil> after 1s", "attempt 2: 200 success <nil> after 2s"}},
		"too many requests": {[]any{429, 200}, []string{"attempt 1: 429 ignored <nil> after 0s", "attempt 2: 200 success <nil> after 0s"}},
		"an error": {[]any{errors.New("no way to https://api.example.com/v1?key=secret"), 200}, []string{
			"attempt 1: 0 failure no way to https://api.example.com/v1* after 0s", "attempt 2: 200 success <nil> after 0s"}},
		"the breaker opens": {[]any{503}, []string{"attempt 1: 503 failure <nil> after 0s", "attempt 2: 503 failure <nil> after 0s"}},
		"the caller leaves": {[]any{statsSlow(time.Hour, 200)}, []string{"attempt 1: 0 ignored context canceled after 1m0s"}},
		"a stream that begins with an error": {[]any{early(), 200}, []string{
			"attempt 1: 0 failure * after 0s", "attempt 2: 200 success <nil> after 0s"}},
		"no response": {[]any{tripptest.Func(func(*http.Request) (*http.Response, error) { return nil, nil })}, []string{
			"attempt 1: 0 failure tripper: the base RoundTripper returned neither a response nor an error after 0s"}},
	}
	for name, test := range tests {
		for _, layers := range [][]Layer{nil, {func(next http.RoundTripper) http.RoundTripper { return benchLayer{next} }}} {
			t.Run(fmt.Sprint(name, " ", len(layers)), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					var watch statsWatch
					tr := &Transport{Base: tripptest.Script(test.steps...), Layers: layers,
						Observers: []*Observer{{}, {Attempt: watch.observer().Attempt}, {Attempt: func(e AttemptEvent) {
							assert.Equal(t, "mine", e.Context.Value(statsKey{}))
							assert.Equal(t, e.Duration, time.Since(e.Start))
						}}},
						Policy: Policy{HoldStream: true, Breaker: BreakerPolicy{FailureThreshold: 2},
							Retry: RetryPolicy{Jitter: JitterNone}}}
					ctx, cancel := context.WithCancel(context.WithValue(t.Context(), statsKey{}, "mine"))
					time.AfterFunc(time.Minute, cancel)
					req := tripptest.Request(t, ctx, http.MethodGet, "")
					req.URL.RawQuery = "key=secret"
					resp, err := tr.RoundTrip(req)
					closeResponse(resp)
					requireStatsLines(t, test.want, watch.lines)
					if name == "the breaker opens" {
						require.NoError(t, err)
						_, err = tr.RoundTrip(req)
						require.ErrorIs(t, err, ErrRejected)
						require.Len(t, watch.lines, 2, "what is rejected is no attempt")
					}
				})
			})
		}
	}
}

type statsKey struct{}

// requireStatsLines compares lines about testHost. A * stands for any text.
func requireStatsLines(t *testing.T, want, got []string) {
	t.Helper()
	require.Len(t, got, len(want), "%q", got)
	for i := range want {
		pattern := strings.ReplaceAll(regexp.QuoteMeta(testHost+" GET "+want[i]), `\*`, ".*")
		require.Regexp(t, "^"+pattern+"$", got[i])
	}
}

// A service is told of once, and before the first attempt to it. Those that the
// configuration names begin with the first use, whatever it is.
func TestObserverSeesServicesBegin(t *testing.T) {
	var watch statsWatch
	base := tripptest.Func(func(req *http.Request) (*http.Response, error) {
		watch.say("sent to %s", req.URL.Host)
		return statsAnswer(200), nil
	})
	tr := &Transport{Base: base, Hosts: map[string]Policy{"named.example.com": {}, "*.wild.example.com": {Service: "wild"}},
		Observers: []*Observer{{Service: watch.observer().Service}}}
	require.Equal(t, testHost, tr.ServiceOf(tripptest.Request(t, t.Context(), http.MethodGet, "")))
	slices.Sort(watch.lines)
	require.Equal(t, []string{"service named.example.com", "service wild"}, watch.lines)
	watch.lines = nil
	for range 2 {
		for _, host := range []string{"named.example.com", "a.wild.example.com", "API.example.com", "api.example.com:443"} {
			statsTouch(t, tr, host)
		}
	}
	require.True(t, tr.Trip("tripped.example.com", time.Hour, nil))
	require.True(t, tr.Trip("tripped.example.com", time.Hour, nil))
	_, err := statsGet(tr, "tripped.example.com")
	require.ErrorIs(t, err, ErrRejected)
	require.Equal(t, []string{
		"sent to named.example.com", "sent to a.wild.example.com", "service api.example.com", "sent to API.example.com", "sent to api.example.com:443",
		"sent to named.example.com", "sent to a.wild.example.com", "sent to API.example.com", "sent to api.example.com:443",
		"service tripped.example.com",
	}, watch.lines)
}

// Hooks may call any method, and see what they are told of.
func TestHooksMayCallEverything(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var tr *Transport
		var calls [4]int
		inside := false // the hooks of what a hook has done are told, too
		try := func(hook int, service string) {
			calls[hook]++
			st, ok := tr.Stats(service)
			assert.True(t, ok)
			assert.Equal(t, service, st.Service)
			assert.Contains(t, statsAllNames(tr), service)
			tr.Forgotten()
			assert.NoError(t, tr.Validate())
			assert.Equal(t, "other.example.com", tr.ServiceOf(&http.Request{URL: &url.URL{Scheme: "https", Host: "other.example.com"}}))
			tr.CloseIdleConnections()
			if inside {
				return
			}
			inside = true
			defer func() { inside = false }()
			assert.True(t, tr.Trip("another.example.com", time.Hour, nil))
			assert.True(t, tr.Reset("another.example.com"))
			assert.True(t, tr.Trip(service, time.Hour, nil))
			assert.True(t, tr.Reset(service))
			statsTouch(t, tr, "fine.example.com")
		}
		base := tripptest.Func(func(req *http.Request) (*http.Response, error) {
			if req.URL.Host == "fine.example.com" {
				return statsAnswer(200), nil
			}
			return statsAnswer(503), nil
		})
		tr = &Transport{Base: base, Hosts: map[string]Policy{"named.example.com": {}}, Observers: []*Observer{{
			Attempt:     func(e AttemptEvent) { try(0, e.Service) },
			Retry:       func(e RetryEvent) { try(1, e.Service) },
			StateChange: func(c StateChange) { try(2, c.Service) },
			Service:     func(name string) { try(3, name) },
		}}}
		for range 4 {
			resp, err := get(tr)
			require.NoError(t, err)
			require.Equal(t, 503, resp.StatusCode)
		}
		for hook, n := range calls {
			require.NotZero(t, n, hook)
		}
		for st := range tr.All() {
			require.Equal(t, Closed, st.State, st.Service)
			requireStatsReconcile(t, st)
		}
	})
}

// A hook that panics takes its request with it, and nothing else.
func TestHooksMayPanic(t *testing.T) {
	hooks := map[string]func(*Observer){
		"Attempt":     func(o *Observer) { o.Attempt = func(AttemptEvent) { panic("hook") } },
		"Retry":       func(o *Observer) { o.Retry = func(RetryEvent) { panic("hook") } },
		"StateChange": func(o *Observer) { o.StateChange = func(StateChange) { panic("hook") } },
		"Service":     func(o *Observer) { o.Service = func(string) { panic("hook") } },
	}
	for name, set := range hooks {
		for _, hosts := range []map[string]Policy{nil, {"named.example.com": {}}} {
			t.Run(fmt.Sprint(name, " ", len(hosts)), func(t *testing.T) {
				o := &Observer{}
				set(o)
				synctest.Test(t, func(t *testing.T) { requireStatsSurvives(t, o, hosts) })
			})
		}
	}
}

func requireStatsSurvives(t *testing.T, o *Observer, hosts map[string]Policy) {
	s := &statsSwitch{}
	tr := &Transport{Base: s, Hosts: hosts, Observers: []*Observer{o}, Policy: Policy{
		Retry: RetryPolicy{Replay: ReplayAny}, Breaker: BreakerPolicy{FailureThreshold: 2}}}
	for i := range 9 {
		upload := &statsUpload{Reader: strings.NewReader("question")}
		req, err := http.NewRequest(http.MethodPost, "https://"+testHost, upload)
		require.NoError(t, err)
		statsAnyhow(tr, req)
		require.EqualValues(t, 1, upload.closes.Load(), i)
		time.Sleep(2 * time.Minute)
		if i == 2 {
			s.status.Store(200)
		}
	}
	require.Equal(t, Closed, statsOf(t, tr, testHost).State, "it is not wedged")
}

// statsSurvive calls f, which may panic or call Goexit.
func statsSurvive(f func()) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		defer func() { _ = recover() }()
		f()
	}()
	<-done
}

// statsAnyhow makes a request that may end in any way, and reads the response.
func statsAnyhow(tr *Transport, req *http.Request) {
	statsSurvive(func() {
		resp, err := tr.RoundTrip(req)
		if err == nil {
			_, _ = io.Copy(io.Discard, resp.Body)
			resp.Body.Close()
		}
	})
}

// A statsUpload is a request body that counts how often it is closed.
type statsUpload struct {
	io.Reader
	closes atomic.Int32
}

func (u *statsUpload) Close() error { u.closes.Add(1); return nil }

// All and Forgotten together account for every request, also to services that
// are no longer kept.
func TestForgottenAccountsForTheRest(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const hosts = 7000
		var n, told atomic.Int64
		base := tripptest.Func(func(req *http.Request) (*http.Response, error) {
			closeBody(req)
			switch n.Add(1) % 7 {
			case 0:
				return nil, errStatsDown
			case 1:
				return statsAnswer(429), nil
			case 2:
				return statsStream(io.ErrUnexpectedEOF), nil
			case 3:
				return nil, context.Canceled
			case 4:
				return tripptest.Answer(200, "fine"), nil
			}
			return statsAnswer(200), nil
		})
		tr := &Transport{Base: base, Policy: Policy{Retry: RetryPolicy{MinWait: time.Millisecond, MaxAttempts: 2}, Breaker: BreakerPolicy{FailureThreshold: 1, RecoveryTimeout: time.Second}},
			Observers: []*Observer{{StateChange: func(c StateChange) {
				if c.Origin == OriginForgotten {
					told.Add(1)
					assert.Equal(t, Closed, c.To)
				}
			}}}}
		require.Equal(t, Stats{}, tr.Forgotten())
		for i := range 2 * hosts {
			resp, err := statsGet(tr, fmt.Sprintf("h%d.example.com", i/2)) // twice in a row
			if err == nil {
				_, _ = io.Copy(io.Discard, resp.Body)
				resp.Body.Close()
			}
			if i%100 == 0 {
				time.Sleep(time.Second)
			}
		}
		sum := tr.Forgotten()
		require.NotZero(t, sum.Requests)
		require.NotZero(t, told.Load())
		require.GreaterOrEqual(t, sum.Closed, uint64(told.Load()))
		require.Empty(t, sum.Service)
		require.True(t, sum.Since.IsZero())
		requireStatsReconcile(t, sum)
		for st := range tr.All() {
			requireStatsReconcile(t, st)
			sum = sum.plus(st)
		}
		require.EqualValues(t, 2*hosts, sum.Requests)
		require.EqualValues(t, n.Load(), sum.Attempts)
		require.Equal(t, sum.Transitions, sum.Opened+sum.HalfOpened+sum.Closed)
		for name, count := range map[string]uint64{"ok": sum.OK, "failed": sum.Failed, "rejected": sum.Rejected, "cancelled": sum.Cancelled,
			"stream failures": sum.StreamFailures, "retries": sum.Retries, "ignored": sum.Ignored} {
			require.NotZero(t, count, name)
		}
	})
}

// Also if a hook panics when it is told of a service that goes.
func TestForgottenWithAHookThatPanics(t *testing.T) {
	died := 0
	tr := &Transport{Base: statsOK, Observers: []*Observer{{StateChange: func(c StateChange) {
		if c.Origin == OriginForgotten {
			died++
			panic("hook")
		}
	}}}}
	const hosts = registry.Max + 100
	for i := range hosts {
		host := fmt.Sprintf("h%d.example.com", i)
		if i < 50 {
			require.True(t, tr.Trip(host, 1, nil))
		}
		statsAnyhow(tr, &http.Request{Method: http.MethodGet, URL: &url.URL{Scheme: "https", Host: host}})
		if i < 50 {
			require.True(t, tr.Trip(host, 1, nil))
		}
	}
	sum := tr.Forgotten()
	for st := range tr.All() {
		sum = sum.plus(st)
	}
	require.Equal(t, 50, died)
	require.EqualValues(t, hosts-died, sum.Requests, "those that died had not begun")
	require.Equal(t, sum.Requests, sum.OK+sum.Rejected)
}

func TestServiceOf(t *testing.T) {
	tr := &Transport{
		Base:    statsOK,
		Hosts:   map[string]Policy{"claude.example": {Service: "claude_api"}, "*.wild.example": {Service: "wild"}, "localhost:8080": {}},
		Service: func(req *http.Request) string { return req.Header.Get("Model") },
	}
	request := func(target, model string) *http.Request {
		req, err := http.NewRequest(http.MethodGet, target, nil)
		require.NoError(t, err)
		req.Header.Set("Model", model)
		return req
	}
	before := statsAllNames(tr)
	for _, c := range []struct{ target, model, want string }{
		{"https://claude.example/v1", "", "claude_api"},
		{"https://claude.example:443/v1", "", "claude_api"},
		{"https://a.wild.example", "", "wild"},
		{"http://localhost:8080", "", "localhost:8080"},
		{"https://api.example.com", "", "api.example.com"},
		{"https://api.example.com:443", "", "api.example.com"},
		{"https://api.example.com:8443", "", "api.example.com:8443"},
		{"https://api.example.com", "small", "small"},
	} {
		req := request(c.target, c.model)
		require.Equal(t, c.want, tr.ServiceOf(req), c)
		require.Zero(t, testing.AllocsPerRun(100, func() { tr.ServiceOf(req) }), c)
	}
	require.Equal(t, "api.example.com", tr.ServiceOf(request("https://API.Example.com.", "")))
	require.Equal(t, "small", tr.ServiceOf(request("file:///etc", "small")))
	require.Empty(t, tr.ServiceOf(request("file:///etc", "")))
	require.Empty(t, tr.ServiceOf(nil))
	require.Empty(t, tr.ServiceOf(&http.Request{}))
	require.Equal(t, before, statsAllNames(tr), "it begins none")
	invalid := &Transport{ReplayMemory: -1}
	require.Empty(t, invalid.ServiceOf(request("https://api.example.com", "")))
}

// Lines about retries come at most ten times a second for each service. The next
// one then says how many were left out, and none is forgotten.
func TestLogRetriesTenTimesASecond(t *testing.T) {
	tests := map[string]struct {
		message string
		policy  RetryPolicy
	}{
		"retrying":     {"retrying", RetryPolicy{MinWait: time.Hour, MaxWait: time.Hour}},
		"not retrying": {`"not retrying"`, RetryPolicy{MaxElapsed: 1500 * time.Millisecond, MinWait: 1500 * time.Millisecond}},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var log bytes.Buffer
				test.policy.Budget = Budget{Ratio: -1}
				tr := &Transport{Base: tripptest.Script(503), Logger: statsLogger(&log),
					Policy: Policy{Retry: test.policy, Breaker: BreakerPolicy{FailureThreshold: -1}}}
				const seconds, each = 5, 50
				services := []string{"a.example.com", "b.example.com"}
				var all sync.WaitGroup
				ctx, cancel := context.WithCancel(t.Context())
				for range seconds * each {
					for _, host := range services {
						all.Go(func() {
							req := tripptest.Request(t, ctx, http.MethodGet, "")
							req.URL.Host = host
							resp, _ := tr.RoundTrip(req)
							closeResponse(resp)
						})
						synctest.Wait()
					}
					time.Sleep(time.Second / each)
				}
				cancel()
				all.Wait()
				require.NotContains(t, strings.ReplaceAll(log.String(), "msg="+test.message, ""), "msg=")
				for _, host := range services {
					lines, leftOut := statsLeftOut(t, log.String(), host)
					require.Equal(t, 10*seconds, lines)
					require.Equal(t, slices.Repeat([]int{each - 10}, seconds-1), leftOut)
				}
			})
		})
	}
}

// statsLeftOut counts the lines about a service, and returns what they say was
// left out.
func statsLeftOut(t *testing.T, log, service string) (lines int, leftOut []int) {
	for line := range strings.Lines(log) {
		if !strings.Contains(line, "service="+service+" ") {
			continue
		}
		lines++
		if _, text, ok := strings.Cut(line, "left_out="); ok {
			n, err := strconv.Atoi(strings.TrimSpace(text))
			require.NoError(t, err)
			leftOut = append(leftOut, n)
		}
	}
	return lines, leftOut
}

// A statsStorm is a base, a Layer, hooks and a Service that do everything that
// they may do, and what became of the requests.
type statsStorm struct {
	tr       *Transport
	calm     atomic.Bool // nothing goes wrong any more
	sent     atomic.Uint64
	requests atomic.Uint64
	uploads  sync.Map // of *statsUpload

	mu     sync.Mutex // guards the fields below
	states map[string]State
	wrong  []string
}

func newStatsStorm() *statsStorm {
	s := &statsStorm{states: map[string]State{}}
	quick := RetryPolicy{MinWait: time.Millisecond, MaxWait: time.Second, Replay: ReplayAny}
	s.tr = &Transport{
		Base: tripptest.Func(s.answer),
		Layers: []Layer{func(next http.RoundTripper) http.RoundTripper {
			return tripptest.Func(func(req *http.Request) (*http.Response, error) { return s.layer(next, req) })
		}},
		Policy: Policy{Retry: quick, Breaker: BreakerPolicy{FailureThreshold: 2, RecoveryTimeout: 10 * time.Second}},
		Hosts: map[string]Policy{
			"hot0.example.com": {Retry: quick, Breaker: BreakerPolicy{FailureThreshold: 3, RecoveryTimeout: time.Second, MaxRecoveryTimeout: time.Minute}},
			"hot1.example.com": {Retry: quick, HoldStream: true, Timeout: 5 * time.Second, Idle: 5 * time.Second},
			"hot2.example.com": {Retry: quick, TotalTimeout: 3 * time.Second, Breaker: BreakerPolicy{FailureThreshold: -1, FailureRate: 0.3, MinRequests: 5}},
			"hot3.example.com": {Retry: RetryPolicy{MinWait: time.Millisecond, MaxElapsed: time.Minute, IdempotencyKey: true}, Breaker: BreakerPolicy{SlowCall: time.Second}},
			"hot4.example.com": {Retry: quick, Breaker: BreakerPolicy{FailureThreshold: -1}},
			"hot5.example.com": {Retry: quick, Breaker: BreakerPolicy{FailureThreshold: 2, Observe: true}},
		},
		Logger: slog.New(slog.DiscardHandler),
	}
	s.tr.Observers = []*Observer{{
		Attempt:     func(e AttemptEvent) { s.chance(e.Service, 300) },
		Retry:       func(e RetryEvent) { s.chance(e.Service, 300) },
		StateChange: s.changed,
		Service:     func(name string) { s.tr.Stats(name) },
	}}
	return s
}

// chance panics, calls Goexit or calls some method of the Transport, once in n
// times each.
func (s *statsStorm) chance(service string, n int) {
	if s.calm.Load() {
		return
	}
	switch rand.IntN(n) {
	case 0:
		panic("storm")
	case 1:
		runtime.Goexit()
	case 2:
		s.tr.Trip(service, time.Duration(rand.IntN(20))*time.Second, nil)
	case 3:
		s.tr.Reset(service)
	case 4:
		s.tr.Stats(service)
	}
}

// changed sees that the changes of those services that are never forgotten come
// in order.
func (s *statsStorm) changed(c StateChange) {
	if strings.HasPrefix(c.Service, "hot") {
		s.mu.Lock()
		if was := s.states[c.Service]; was != c.From {
			s.wrong = append(s.wrong, fmt.Sprintf("%s: %v to %v, but it was %v", c.Service, c.From, c.To, was))
		}
		s.states[c.Service] = c.To
		s.mu.Unlock()
	}
	if s.calm.Load() {
		return
	}
	switch rand.IntN(200) { // it does not panic: a request that dies before it is sent would be missing from the sums
	case 0:
		s.tr.Trip(c.Service, time.Second, nil)
	case 1:
		s.tr.Reset(c.Service)
	}
}

func (s *statsStorm) layer(next http.RoundTripper, req *http.Request) (*http.Response, error) {
	if rand.IntN(400) == 0 && !s.calm.Load() {
		panic("layer")
	}
	return next.RoundTrip(req)
}

func (s *statsStorm) answer(req *http.Request) (*http.Response, error) {
	s.sent.Add(1)
	defer closeBody(req)
	if s.calm.Load() {
		return tripptest.Answer(200, "fine"), nil
	}
	if req.Body != nil && rand.IntN(4) > 0 {
		_, _ = io.Copy(io.Discard, req.Body)
	}
	select {
	case <-time.After(time.Duration(rand.IntN(3)) * 700 * time.Millisecond):
	case <-req.Context().Done():
		return nil, context.Cause(req.Context())
	}
	switch rand.IntN(40) {
	case 0:
		panic("base")
	case 1:
		runtime.Goexit()
	case 2, 3, 4, 5:
		return tripptest.Answer(503, "down"), nil
	case 6, 7:
		return tripptest.Answer(429, "slow down", "Retry-After", "1"), nil
	case 8, 9:
		return nil, errStatsDown
	case 10, 11:
		return statsStream(io.ErrUnexpectedEOF), nil
	case 12:
		resp := statsStream(io.EOF)
		resp.Header.Set("Content-Type", "text/event-stream")
		return resp, nil
	case 13:
		return nil, nil
	}
	return tripptest.Answer(200, "fine"), nil
}

// request makes one of all kinds of requests.
func (s *statsStorm) request() {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	switch rand.IntN(6) {
	case 0:
		time.AfterFunc(time.Duration(rand.IntN(2000))*time.Millisecond, cancel)
	case 1:
		ctx, cancel = context.WithTimeout(ctx, time.Duration(rand.IntN(3000))*time.Millisecond)
		defer cancel()
	case 2:
		ctx = WithRetry(ctx, func(r *RetryPolicy) { r.MaxAttempts = 1 + rand.IntN(4) })
	}
	host := fmt.Sprintf("hot%d.example.com", rand.IntN(6))
	if rand.IntN(2) == 0 {
		host = fmt.Sprintf("h%d.example.com", rand.IntN(7000))
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "https://"+host+"/", nil)
	if rand.IntN(3) == 0 {
		upload := &statsUpload{Reader: strings.NewReader("question")}
		s.uploads.Store(upload, true)
		req, err = http.NewRequestWithContext(ctx, http.MethodPost, "https://"+host+"/", upload)
	}
	if err != nil {
		panic(err)
	}
	s.requests.Add(1)
	statsAnyhow(s.tr, req)
	statsSurvive(func() { s.meddle(host) })
}

// meddle does what a program may do beside its requests.
func (s *statsStorm) meddle(host string) {
	switch rand.IntN(200) {
	case 0:
		s.tr.Trip(host, time.Duration(rand.IntN(60))*time.Second, nil)
	case 1:
		s.tr.Reset(host)
	case 2:
		for st := range s.tr.All() {
			if st.OK+st.Failed+st.Rejected+st.Cancelled > st.Requests || st.Successes+st.Failures+st.Ignored > st.Attempts {
				s.mu.Lock()
				s.wrong = append(s.wrong, fmt.Sprintf("%+v", st))
				s.mu.Unlock()
			}
		}
	case 3:
		s.tr.Forgotten()
	}
}

// Panics, Goexit, callers that leave, Trip, Reset and more hosts than are kept:
// afterwards everything reconciles and nothing is wedged. A goroutine that is
// left would fail the test as well: its bubble would not end.
func TestStorm(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStatsStorm()
		var all sync.WaitGroup
		for range 32 {
			all.Go(func() {
				for range 700 {
					s.request()
				}
			})
		}
		all.Wait()
		time.Sleep(10 * time.Minute) // every opening is over
		synctest.Wait()
		s.calm.Store(true)
		require.Empty(t, s.wrong)
		s.uploads.Range(func(upload, _ any) bool {
			require.EqualValues(t, 1, upload.(*statsUpload).closes.Load())
			return true
		})
		requireStatsStorm(t, s)
		// Whoever is asked now answers, and closes its breaker.
		for st := range s.tr.All() {
			for range 4 {
				resp, err := statsGet(s.tr, st.Service)
				require.NoError(t, err, st.Service)
				resp.Body.Close()
				s.requests.Add(1)
			}
		}
		for st := range s.tr.All() {
			require.Equal(t, Closed, st.State, st.Service)
		}
		requireStatsStorm(t, s)
	})
}

// requireStatsStorm compares the counters with what really was.
func requireStatsStorm(t *testing.T, s *statsStorm) {
	t.Helper()
	sum := s.tr.Forgotten()
	requireStatsReconcile(t, sum)
	require.NotZero(t, sum.Requests)
	for st := range s.tr.All() {
		requireStatsReconcile(t, st)
		sum = sum.plus(st)
	}
	require.Equal(t, s.requests.Load(), sum.Requests)
	require.Equal(t, s.sent.Load(), sum.Attempts)
	require.Equal(t, sum.Transitions, sum.Opened+sum.HalfOpened+sum.Closed)
}
