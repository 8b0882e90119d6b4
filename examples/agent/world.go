package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"time"
)

// A world is the services that the agent meets. One server plays all of them.
type world struct {
	server *httptest.Server
	closed chan struct{}

	mu     sync.Mutex
	calls  map[string]int // by host
	placed map[string]int // how often an order was asked for, by its key
}

func newWorld() *world {
	w := &world{closed: make(chan struct{}), calls: map[string]int{}, placed: map[string]int{}}
	w.server = httptest.NewServer(w)
	return w
}

func (w *world) close() {
	close(w.closed)
	w.server.Close()
}

// transport leads every name to the server, but one to nowhere.
func (w *world) transport() http.RoundTripper {
	dialer := &net.Dialer{}
	return &crowd{&http.Transport{
		DialContext: func(ctx context.Context, network, address string) (net.Conn, error) {
			if strings.HasPrefix(address, "gone.test:") {
				return nil, &net.OpError{Op: "dial", Net: network, Err: errors.New("connection refused")}
			}
			return dialer.DialContext(ctx, network, w.server.Listener.Addr().String())
		},
	}}
}

// A crowd answers for the strangers itself: thousands of connections would show
// nothing more.
type crowd struct{ *http.Transport }

func (c *crowd) RoundTrip(req *http.Request) (*http.Response, error) {
	if !strings.HasSuffix(req.URL.Host, ".strangers.test") {
		return c.Transport.RoundTrip(req)
	}
	if req.Body != nil {
		req.Body.Close()
	}
	return &http.Response{StatusCode: http.StatusOK, Status: "200 OK", Body: http.NoBody, Request: req}, nil
}

// orders returns how many orders were placed, by how many requests.
func (w *world) orders() (placed, requests int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, times := range w.placed {
		requests += times
	}
	return len(w.placed), requests
}

func (w *world) call(host string) int {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.calls[host]++
	return w.calls[host]
}

func (w *world) ServeHTTP(rw http.ResponseWriter, req *http.Request) {
	n := w.call(req.Host)
	switch req.Host {
	case "flaky.test": // every other call fails
		if n%2 == 1 {
			http.Error(rw, "out of order", http.StatusServiceUnavailable)
			return
		}
	case "limited.test": // wants to be left alone for a while
		if n%3 == 1 {
			rw.Header().Set("Retry-After-Ms", fmt.Sprint(scaled(2*time.Second).Milliseconds()))
			http.Error(rw, "slow down", http.StatusTooManyRequests)
			return
		}
	case "hangs.test": // never answers
		select {
		case <-req.Context().Done():
		case <-w.closed:
		}
		return
	case "orders.test":
		w.order(rw, req, n)
		return
	}
	fmt.Fprint(rw, "fine")
}

// order places an order, unless its key is known, and now and then loses the
// connection before it can say so.
func (w *world) order(rw http.ResponseWriter, req *http.Request, n int) {
	w.mu.Lock()
	w.placed[req.Header.Get("Idempotency-Key")]++
	w.mu.Unlock()
	if n%2 == 1 {
		panic(http.ErrAbortHandler)
	}
	fmt.Fprint(rw, "ordered")
}
