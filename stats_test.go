package tripper

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
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
)

// statsOK is a base that answers everything at once.
var statsOK = breakerBase(func(*http.Request) (*http.Response, error) { return breakerAnswer(200), nil })

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

func TestTableAgainstMap(t *testing.T) {
	for _, seed := range breakerSeeds(5) {
		t.Run("seed="+strconv.FormatUint(seed, 10), func(t *testing.T) {
			r := rand.New(rand.NewPCG(seed, 2))
			var tab table
			require.Nil(t, tab.get("x"), "an empty table")
			model := map[string]*route{}
			names := statsNames(r, 200)
			for i := range 20_000 {
				name := names[r.IntN(len(names))]
				switch known := model[name]; {
				case known == nil && r.IntN(3) > 0:
					model[name] = &route{host: name}
					tab.put(model[name])
				case known != nil && r.IntN(2) == 0:
					tab.remove(known)
					delete(model, name)
				}
				if tab.get(name) != model[name] {
					t.Fatalf("seed %d, step %d: get(%q)", seed, i, name)
				}
				if i%500 == 0 {
					requireStatsTable(t, &tab, model, names)
				}
			}
		})
	}
}

// statsNames are names of all lengths that like to be confused.
func statsNames(r *rand.Rand, n int) []string {
	names := map[string]bool{"": true, "a": true, "aaaaaaaa": true, "aaaaaaaaa": true, "aaaaaaaaaaaaaaaa": true}
	for len(names) < n {
		b := make([]byte, r.IntN(40))
		for i := range b {
			b[i] = "ab.\x00"[r.IntN(4)]
		}
		names[string(b)] = true
	}
	return slices.Sorted(maps.Keys(names))
}

func requireStatsTable(t *testing.T, tab *table, model map[string]*route, names []string) {
	t.Helper()
	for _, name := range names {
		if tab.get(name) != model[name] {
			t.Fatalf("get(%q)", name)
		}
	}
	byHost := func(a, b *route) int { return cmp.Compare(a.host, b.host) }
	require.Equal(t, slices.SortedFunc(maps.Values(model), byHost), slices.SortedFunc(tab.all(), byHost))
	require.Equal(t, len(model), tab.live)
	if p := tab.slots.Load(); p != nil {
		require.Less(t, tab.used, len(*p), "a free slot ends every search")
	}
}

// Names that come and go do not make the table grow, and removing what is not
// there harms nothing.
func TestTableStaysSmall(t *testing.T) {
	var tab table
	require.NotPanics(t, func() { tab.remove(&route{host: "never"}) })
	keep := &route{host: "keep"}
	tab.put(keep)
	for i := range 100_000 {
		r := &route{host: strconv.Itoa(i)}
		tab.put(r)
		tab.remove(r)
		tab.remove(r)
	}
	require.Same(t, keep, tab.get("keep"))
	require.LessOrEqual(t, len(*tab.slots.Load()), 16)
	require.Equal(t, 1, tab.live)
}

// Similar names spread: no search looks at more than a few slots.
func TestTableSpreadsNames(t *testing.T) {
	for _, form := range []string{"h%d.example.com", "%d", "10.0.0.%d:8080", "api.example.com:%d", "a-host-of-%d-characters.internal.example.com"} {
		var tab table
		for i := range maxServices {
			tab.put(&route{host: fmt.Sprintf(form, i)})
		}
		slots, longest, run := *tab.slots.Load(), 0, 0
		for i := range slots {
			if run++; slots[i].Load() == nil {
				run = 0
			}
			longest = max(longest, run)
		}
		require.Less(t, longest, 400, form) // of 8,192; a poor hash makes one run of 4,096
	}
}

// Readers need no lock: whatever is in the table all the time is always found.
func TestTableReadersBesideWriter(t *testing.T) {
	var tab table
	fixed := []*route{}
	for i := range 50 {
		fixed = append(fixed, &route{host: fmt.Sprint("fixed", i)})
		tab.put(fixed[i])
	}
	var over atomic.Bool
	var readers sync.WaitGroup
	for range 4 {
		readers.Go(func() {
			for i := 0; !over.Load(); i++ {
				want := fixed[i%len(fixed)]
				if tab.get(want.host) != want {
					t.Errorf("%s is not found", want.host)
					return
				}
				if i%50 == 0 {
					runtime.Gosched()
				}
			}
		})
	}
	live := []*route{}
	for i := range 20_000 {
		r := &route{host: fmt.Sprint("passing", i)}
		tab.put(r)
		live = append(live, r)
		if len(live) > 10 {
			tab.remove(live[0])
			live = live[1:]
		}
	}
	over.Store(true)
	readers.Wait()
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
	require.Equal(t, maxServices+2, statsCount(tr))
	require.True(t, statsHas(tr, "named.example.com"))
	require.True(t, statsHas(tr, "wild"))
	require.True(t, statsHas(tr, "h99999.example.com"))
	c := tr.load()
	require.LessOrEqual(t, c.byHost.live, maxServices, "no shortcut leads to what is forgotten")
	require.LessOrEqual(t, len(*c.byName.slots.Load()), 8*maxServices)
	require.LessOrEqual(t, len(*c.byHost.slots.Load()), 8*maxServices)
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
			require.NotPanics(t, func() { statsFill(t, tr, maxServices+1000) })
			require.Equal(t, maxServices, statsCount(tr))
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
			names := statsFill(t, tr, maxServices)
			arrange(names)
			for _, host := range names {
				statsTouch(t, tr, host)
			}
			for i, host := range names {
				require.True(t, statsHas(tr, host), i)
				statsTouch(t, tr, fmt.Sprint("new", i))
				require.False(t, statsHas(tr, host), i)
			}
			require.Equal(t, maxServices, statsCount(tr))
		})
	}
}

// A host that is only reached because a Layer leads there is in use as well.
func TestRegistryKnowsHostsOfLayers(t *testing.T) {
	lead := func(next http.RoundTripper) http.RoundTripper {
		return breakerBase(func(req *http.Request) (*http.Response, error) {
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
	for i := range 2 * maxServices {
		statsTouch(t, tr, fmt.Sprintf("h%d.example.com", i))
		if i%10 == 0 {
			statsTouch(t, tr, "virtual.example.com")
		}
	}
	st, ok := tr.Stats("real.example.com")
	require.True(t, ok)
	require.EqualValues(t, 1+2*maxServices/10+1, st.Attempts, "it was never forgotten")
}

// What is open or in use is never forgotten, also when it is the longest idle.
func TestRegistryKeepsOpenAndBusy(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		release := make(chan struct{})
		tr := &Transport{Base: breakerBase(func(req *http.Request) (*http.Response, error) {
			switch name, _, _ := strings.Cut(req.URL.Host, "-"); name {
			case "held":
				<-release
			case "stream":
				return breakerStreamOf(io.EOF)(req), nil
			case "down":
				return nil, errBreakerDown
			}
			return breakerAnswer(200), nil
		}), Policy: breakerOnce(BreakerPolicy{FailureThreshold: 1, RecoveryTimeout: time.Minute})}
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
			require.True(t, tr.Trip(fmt.Sprint("tripped-", i), time.Minute))
		}
		synctest.Wait()
		statsFill(t, tr, maxServices+1000)
		for _, name := range kept {
			require.True(t, statsHas(tr, name), name)
		}
		require.LessOrEqual(t, statsCount(tr), maxServices)

		// Nothing holds them any more.
		close(release)
		for _, s := range streams {
			s.Close()
		}
		time.Sleep(time.Minute)
		for i := range maxServices {
			statsTouch(t, tr, fmt.Sprint("more-", i))
		}
		for _, name := range kept {
			require.False(t, statsHas(tr, name), name)
		}
		require.Equal(t, maxServices, statsCount(tr))
	})
}

// When all are in use the registry exceeds its bound, and each new name looks
// at a few of them only. It is within its bound again once they are idle.
func TestRegistryCrowdOfBusyServices(t *testing.T) {
	var streams []io.Closer
	tr := &Transport{Base: breakerBase(func(req *http.Request) (*http.Response, error) {
		return breakerStreamOf(io.EOF)(req), nil
	})}
	open := func(host string) {
		resp, err := statsGet(tr, host)
		require.NoError(t, err)
		streams = append(streams, resp.Body)
	}
	for i := range maxServices + 500 {
		open(fmt.Sprint("h", i))
	}
	require.Equal(t, maxServices+500, statsCount(tr))
	before := statsUsed(tr)
	open("another")
	looked := 0
	for name, used := range statsUsed(tr) {
		if was, ok := before[name]; ok && was != used {
			looked++
		}
	}
	require.LessOrEqual(t, looked, 16)
	for _, s := range streams {
		s.Close()
	}
	open("last")
	require.Equal(t, maxServices, statsCount(tr))
}

func statsUsed(tr *Transport) map[string]uint64 {
	used := map[string]uint64{}
	for r := range tr.load().byName.all() {
		used[r.host] = r.service.used.Load()
	}
	return used
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
	for i := range maxServices + 1000 {
		statsTouch(t, tr, fmt.Sprintf("h%d.each.example", i))
	}
	for _, name := range names {
		require.True(t, statsHas(tr, name))
	}
	require.False(t, statsHas(tr, "API.example.com"), "names are as they are given")
	require.False(t, tr.Reset("nobody"))
	require.False(t, tr.Trip("nobody", time.Hour))
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
	require.Equal(t, []string{breakerHost}, statsAllNames(tr))
	require.EqualValues(t, 14, breakerStats(t, tr).Requests)
	for _, host := range []string{"api.example.com:8443", "api.example.com:80", "[::1]:443", "[::1]"} {
		statsTouch(t, tr, host)
	}
	require.Equal(t, []string{"[::1]", breakerHost, "api.example.com:80", "api.example.com:8443"}, statsAllNames(tr))
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
	tr := &Transport{Base: breakerBase(func(*http.Request) (*http.Response, error) { return nil, errBreakerDown }),
		Policy: breakerOnce(BreakerPolicy{FailureThreshold: 1})}
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

// Requests that meet at the bound: the next name to be forgotten is the next
// one to be asked for. What is in use stays, and nothing is counted where
// nobody looks.
func TestRegistryEnterBesideForget(t *testing.T) {
	var lost atomic.Int64
	var tr *Transport
	tr = &Transport{Base: breakerBase(func(req *http.Request) (*http.Response, error) {
		r := tr.load().byName.get(req.URL.Host)
		if r == nil || !r.service.inUse() {
			lost.Add(1)
		}
		if rand.IntN(4) == 0 {
			runtime.Gosched()
		}
		return breakerAnswer([]int{200, 200, 200, 503}[rand.IntN(4)]), nil
	}), Policy: breakerOnce(BreakerPolicy{FailureThreshold: 3, RecoveryTimeout: 1})}
	const callers, each, hosts = 8, 1500, maxServices + 3
	statsFillAnyhow(tr, maxServices)
	var next atomic.Int64
	var all sync.WaitGroup
	for range callers {
		all.Go(func() {
			for range each {
				statsGet(tr, fmt.Sprintf("h%d.example.com", next.Add(1)%hosts))
			}
		})
	}
	all.Go(func() {
		for range 20 {
			for st := range tr.All() {
				tr.Reset(st.Service)
				break
			}
			runtime.Gosched()
		}
	})
	all.Wait()
	require.Zero(t, lost.Load(), "attempts of services that are forgotten")
	require.LessOrEqual(t, statsCount(tr), maxServices+callers)
	for st := range tr.All() {
		requireBreakerReconciles(t, st)
	}
}

func statsFillAnyhow(tr *Transport, n int) {
	for i := range n {
		statsGet(tr, fmt.Sprintf("h%d.example.com", i))
	}
}

// An attempt that ends while its service is looked at for forgetting sets the
// gate anew. The service is not forgotten then, or its gate says so.
func TestRegistryForgetBesideEndingAttempt(t *testing.T) {
	p := Policy{}.withDefaults()
	s := newService("api", &policy{Policy: p}, time.Now())
	b := s.rest().breaker
	s.hot.request()
	b.mu.Lock()
	forgotten := make(chan bool)
	go func() { forgotten <- s.forget(time.Now()) }()
	for s.gate.Load()&gateForgotten == 0 {
		runtime.Gosched()
	}
	// It is at the breaker's lock; the attempt in flight gets there first.
	b.record(permit{}, breakerVerdicts["fail"], time.Now())
	s.rest().failures.Add(1)
	s.rest().failed.Add(1)
	b.mu.Unlock()
	if <-forgotten {
		require.NotZero(t, s.gate.Load()&gateForgotten, "requests still get in, but nobody can find what they count")
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
				host := fmt.Sprintf("h%d.example.com", r.IntN(3*maxServices))
				statsTouch(t, tr, host)
				switch i % 100 {
				case 0:
					tr.Stats(host)
				case 1:
					tr.Trip(host, 1)
				case 2:
					tr.Reset(host)
				}
			}
		})
	}
	all.Wait()
	require.LessOrEqual(t, statsCount(tr), maxServices)
	c := tr.load()
	for r := range c.byHost.all() {
		require.Same(t, r, c.byName.get(r.host), "a shortcut to a service that is forgotten")
	}
	require.Equal(t, statsCount(tr), len(c.idle))
}

// One service called from everywhere: nothing is lost on the way to more cells.
func TestCountersUnderConcurrency(t *testing.T) {
	tr := &Transport{Base: statsOK, Policy: Policy{Service: breakerHost}}
	var over atomic.Bool
	var reader, all sync.WaitGroup
	reader.Go(func() {
		var last Stats
		for !over.Load() {
			st, _ := tr.Stats(breakerHost)
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
	st := breakerStats(t, tr)
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
	retry := RetryPolicy{MinWait: 1, MaxWait: time.Millisecond, Budget: Budget{Ratio: -1}}
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
	requireBreakerReconciles(t, st)
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
		[]uint64{f.sum(0, "ok"), f.sum(0, "429", "503", "reset", "half"), f.sum(0, "404", "slow"), f.sum(0, "half"), 0, 0},
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
		s := &breakerSwitch{}
		tr := &Transport{Base: s, Logger: statsLogger(&log),
			Policy: Policy{Retry: RetryPolicy{Jitter: JitterNone}, Breaker: BreakerPolicy{FailureThreshold: 3}}}
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
		require.True(t, tr.Trip(breakerHost, time.Second))
		require.True(t, tr.Reset(breakerHost))
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
			require.True(t, tr.Trip(host, time.Hour))
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
		tr := &Transport{Base: &breakerSwitch{}}
		for range 3 {
			require.Error(t, breakerDo(tr))
		}
		require.Equal(t, Open, breakerStats(t, tr).State)
	})
	require.Empty(t, log.String())
}

// statsLeaks are what bases put into their errors. Each secret has SECRET in it.
var statsLeaks = map[string]func(*url.URL) error{
	"whole URL": func(u *url.URL) error { return errors.New("cannot reach " + u.String()) },
	"url.Error": statsURLError,
	"nested":    func(u *url.URL) error { return fmt.Errorf("proxy: %w", statsURLError(u)) },
	"twice":     func(u *url.URL) error { return &url.Error{Op: "Get", URL: u.String(), Err: statsURLError(u)} },
	"joined":    func(u *url.URL) error { return errors.Join(errBreakerDown, statsURLError(u)) },
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
	return &url.Error{Op: "Get", URL: u.String(), Err: errBreakerDown}
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
		OnRetry: func(e RetryEvent) {
			fmt.Fprintf(&said, "%+v %v\n", e, e.Cause)
		},
		OnStateChange: func(c StateChange) { fmt.Fprintf(&said, "%+v %v\n", c, c.Cause) },
		Base: breakerBase(func(req *http.Request) (*http.Response, error) {
			if requests++; requests == 1 {
				return breakerStreamOf(leak(req.URL))(req), nil
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
		require.NoError(t, json.NewEncoder(&said).Encode(breakerStats(t, tr)))
	}
	require.Equal(t, Open, breakerStats(t, tr).State)
	return said.String()
}

// cause takes nothing away that is not secret, and keeps the error's type.
func TestCauseKeepsWhatItCan(t *testing.T) {
	req, err := http.NewRequest(http.MethodGet, "https://api.example.com/path?a=1&key=secret-key", nil)
	require.NoError(t, err)
	op := &net.OpError{Op: "dial", Err: errBreakerDown}
	require.Same(t, op, cause(req, nil, op))
	require.Same(t, op, cause(req, nil, &url.Error{Op: "Get", URL: "https://api.example.com/?key=secret-key", Err: op}))
	secret := fmt.Errorf("with secret-key: %w", op)
	cleaned := cause(req, nil, secret)
	require.Equal(t, "with xxxxx: dial: the service is down", cleaned.Error())
	require.ErrorIs(t, cleaned, op)
	require.Equal(t, "529", cause(req, breakerAnswer(529), nil).Error())
	require.Equal(t, "503 Service Unavailable", cause(req, breakerAnswer(503), nil).Error())
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
	const n = maxServices + 100
	statsFill(t, tr, n)
	live := 0
	for range tr.load().byHost.all() {
		live++
	}
	require.Equal(t, maxServices, live)
	statsFill(t, tr, n)
	st, _ := tr.Stats("all")
	require.EqualValues(t, 2*n, st.OK)
	require.Len(t, slices.Collect(tr.All()), 1)
}

func TestTripWithoutATime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		tr := &Transport{Policy: Policy{Service: "s"}}
		require.True(t, tr.Trip("s", 0))
		st, _ := tr.Stats("s")
		require.Equal(t, time.Now().Add(time.Minute), st.OpenUntil)
	})
}
