package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"runtime"
	"slices"
	"strings"
	"sync"
	"time"
)

// A server answers /page with 1 KiB, and /events with a stream whose second
// event it holds back until the client has seen the first.
type server struct {
	*httptest.Server
	base http.RoundTripper // with connections that are kept alive
	seen chan struct{}
}

const mostClients = 64

func newServer() *server {
	s := &server{
		base: &http.Transport{MaxIdleConnsPerHost: mostClients, DisableCompression: true},
		seen: make(chan struct{}, 1),
	}
	mux := http.NewServeMux()
	page := []byte(strings.Repeat("x", 1<<10))
	mux.HandleFunc("/page", func(w http.ResponseWriter, _ *http.Request) { w.Write(page) })
	mux.HandleFunc("/events", s.events)
	s.Server = httptest.NewServer(mux)
	return s
}

func (s *server) events(w http.ResponseWriter, req *http.Request) {
	w.Header().Set("Content-Type", "text/event-stream")
	io.WriteString(w, "event: message_start\ndata: {}\n\n")
	if err := http.NewResponseController(w).Flush(); err != nil {
		return
	}
	select {
	case <-s.seen:
		io.WriteString(w, "event: message_stop\ndata: {}\n\n")
	case <-req.Context().Done():
	}
}

// A figure is something that a contender does in a slice of time.
type figure struct {
	name   string
	format func(float64) string
}

func perSecond(v float64) string { return thousands(v) + "/s" }

// A traffic is a case over real connections to this machine itself.
type traffic struct {
	name    string
	figures []figure
	run     func(*server, *http.Client, time.Duration) ([]float64, error) // the figures' values
}

func traffics() []traffic {
	figures := []figure{{"requests/s", perSecond}, {"p50", duration}, {"p99", duration}}
	clients := func(n int) func(*server, *http.Client, time.Duration) ([]float64, error) {
		return func(s *server, c *http.Client, slice time.Duration) ([]float64, error) { return s.load(c, n, slice) }
	}
	return []traffic{
		{"loopback, 2 clients", figures, clients(2)},
		{"loopback, 64 clients", figures, clients(mostClients)},
		{"SSE", []figure{{"time to the first event", duration}}, (*server).firstEvents},
	}
}

// load sends requests one after the other from each of n goroutines.
func (s *server) load(client *http.Client, n int, slice time.Duration) ([]float64, error) {
	took := make([][]float64, n)
	errs := make([]error, n)
	var done sync.WaitGroup
	start := time.Now()
	for i := range n {
		done.Go(func() {
			for more := true; more; more = time.Since(start) < slice && errs[i] == nil {
				begin := time.Now()
				errs[i] = s.page(client)
				took[i] = append(took[i], float64(time.Since(begin)))
			}
		})
	}
	done.Wait()
	elapsed := time.Since(start).Seconds()
	all := slices.Sorted(slices.Values(slices.Concat(took...)))
	return []float64{float64(len(all)) / elapsed, quantile(all, 0.50), quantile(all, 0.99)}, errors.Join(errs...)
}

func quantile(sorted []float64, q float64) float64 {
	return sorted[min(len(sorted)-1, int(q*float64(len(sorted))))]
}

func (s *server) page(client *http.Client) error {
	resp, err := client.Get(s.URL + "/page")
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if n, err := io.Copy(io.Discard, resp.Body); err != nil || n != 1<<10 {
		return fmt.Errorf("got %d bytes, error %v", n, err)
	}
	return nil
}

// firstEvents reads one stream after the other.
func (s *server) firstEvents(client *http.Client, slice time.Duration) ([]float64, error) {
	var took []float64
	start := time.Now()
	for len(took) == 0 || time.Since(start) < slice {
		begin := time.Now()
		resp, err := client.Get(s.URL + "/events")
		if err != nil {
			return nil, err
		}
		events := bufio.NewReader(resp.Body)
		line, err := events.ReadString('\n')
		took = append(took, float64(time.Since(begin)))
		s.seen <- struct{}{}
		rest, _ := io.ReadAll(events)
		resp.Body.Close()
		if err != nil || line != "event: message_start\n" || !strings.Contains(string(rest), "message_stop") {
			return nil, fmt.Errorf("got the event %q, then %q, error %v", line, rest, err)
		}
	}
	return []float64{median(took)}, nil
}

// A comparison is a contender's figure beside that of the bare base in the
// same round.
type comparison struct{ ratio, spread, value float64 }

// measure returns a comparison for each figure of each contender.
func (t traffic) measure(cs []contender, o options) (map[string][]comparison, error) {
	s := newServer()
	defer s.Close()
	clients := map[string]*http.Client{}
	for _, c := range cs {
		clients[c.name] = &http.Client{Transport: c.wrap(s.base, standard)}
		if _, err := t.run(s, clients[c.name], o.netSlice/4); err != nil { // also opens the connections
			return nil, fmt.Errorf("%s: %s: %w", t.name, c.name, err)
		}
	}
	values := map[string][][]float64{} // of a round
	for round := range o.rounds {
		for i := range cs {
			name := cs[(round+i)%len(cs)].name
			runtime.GC()
			v, err := t.run(s, clients[name], o.netSlice)
			if err != nil {
				return nil, fmt.Errorf("%s: %s: %w", t.name, name, err)
			}
			values[name] = append(values[name], v)
		}
	}
	comparisons := map[string][]comparison{}
	for name, rounds := range values {
		for f := range t.figures {
			comparisons[name] = append(comparisons[name], compare(rounds, values["bare"], f))
		}
	}
	return comparisons, nil
}

func compare(rounds, bare [][]float64, figure int) comparison {
	var ratios, values []float64
	for round := range rounds {
		ratios = append(ratios, rounds[round][figure]/bare[round][figure])
		values = append(values, rounds[round][figure])
	}
	return comparison{median(ratios), spread(ratios), median(values)}
}
