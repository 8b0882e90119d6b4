// Package chaostest puts a faulty network between an HTTP client and a server
// that remembers what it did.
package chaostest

import (
	"bytes"
	"io"
	"math/rand/v2"
	"net"
	"sync"
	"sync/atomic"
	"time"
)

// A Fault is what befalls a connection.
type Fault int

const (
	None         Fault = iota
	Refuse             // reset as soon as it is there
	ResetUnsent        // reset when a request comes, which the server never sees
	ResetBefore        // reset when the answer comes, of which the client sees nothing
	ResetDuring        // reset amid the response headers
	ResetAfter         // reset amid the response body
	HalfBody           // closed in good order amid the response body
	Hang               // a request goes nowhere, and nothing comes until the client gives up
	HangAnswered       // the answer goes nowhere
	HangBody           // silence amid the response body
	Drip               // the answer comes in small pieces
	Garbage            // the answer is no HTTP, or no TLS
	Impostor           // another server answers: one with a bad certificate
	TLSPlain           // plain text instead of a TLS handshake
	TLSHangUp          // closed amid the TLS handshake
	faults
)

var faultNames = [faults]string{"none", "refuse", "reset unsent", "reset before headers", "reset during headers",
	"reset after headers", "half a body", "hang", "hang answered", "hang in body", "drip", "garbage", "impostor",
	"plain text for TLS", "hang up in handshake"}

// String names the fault.
func (f Fault) String() string { return faultNames[f] }

// A Plan is what befalls one connection: the Fault strikes the exchange number
// Turn, from 0. An exchange begins when the client sends after the server did.
type Plan struct {
	Fault Fault
	Turn  int
}

// A Mix draws plans. The plan of a connection depends on Seed and the
// connection's number alone.
type Mix struct {
	Seed   uint64
	Faults []Fault
	Share  float64 // of the connections that a fault befalls
	Turns  int     // a fault strikes one of so many exchanges
	Outage int     // of each hundred connections so many in a row are refused
}

// Plan returns the plan of connection n.
func (m Mix) Plan(n int) Plan {
	if n%100 >= 100-m.Outage {
		return Plan{Fault: Refuse}
	}
	r := rand.New(rand.NewPCG(m.Seed, uint64(n)))
	if r.Float64() >= m.Share {
		return Plan{}
	}
	return Plan{m.Faults[r.IntN(len(m.Faults))], r.IntN(m.Turns)}
}

// A Proxy listens on the loopback and carries connections to a server as its
// Mix says.
type Proxy struct {
	target, impostor string
	mix              Mix
	listener         net.Listener
	struck           [faults]atomic.Int64
	all              sync.WaitGroup

	mu     sync.Mutex
	closed bool
	open   map[net.Conn]bool
}

// NewProxy returns a Proxy that carries connections to target, or to impostor.
func NewProxy(target, impostor string, mix Mix) (*Proxy, error) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	p := &Proxy{target: target, impostor: impostor, mix: mix, listener: listener, open: make(map[net.Conn]bool)}
	p.all.Go(p.accept)
	return p, nil
}

// Addr returns the address that the proxy listens on.
func (p *Proxy) Addr() string { return p.listener.Addr().String() }

// Struck returns how many times each fault of the mix has struck.
func (p *Proxy) Struck() map[Fault]int64 {
	counts := make(map[Fault]int64)
	for _, f := range p.mix.Faults {
		counts[f] = p.struck[f].Load()
	}
	return counts
}

// Close breaks off every connection and waits until they are gone.
func (p *Proxy) Close() {
	p.listener.Close()
	p.mu.Lock()
	p.closed = true
	for c := range p.open {
		c.Close()
	}
	p.mu.Unlock()
	p.all.Wait()
}

func (p *Proxy) accept() {
	for n := 0; ; n++ {
		c, err := p.listener.Accept()
		if err != nil {
			return
		}
		p.track(c)
		p.all.Go(func() { p.serve(c, p.mix.Plan(n)) })
	}
}

func (p *Proxy) track(c net.Conn) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		c.Close()
		return
	}
	p.open[c] = true
}

// drop closes c in good order.
func (p *Proxy) drop(c net.Conn) {
	p.mu.Lock()
	delete(p.open, c)
	p.mu.Unlock()
	c.Close()
}

// reset makes that the other side of c sees a reset when c is closed.
func reset(c net.Conn) { _ = c.(*net.TCPConn).SetLinger(0) }

func (p *Proxy) serve(client net.Conn, plan Plan) {
	defer p.drop(client)
	switch plan.Fault {
	case Refuse:
		p.struck[Refuse].Add(1)
		reset(client)
		return
	case TLSPlain, TLSHangUp:
		_, _ = client.Read(make([]byte, 4<<10)) // unread bytes would make a reset of the close
		p.struck[plan.Fault].Add(1)
		if plan.Fault == TLSPlain {
			_, _ = io.WriteString(client, "HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")
		}
		return
	}
	target := p.target
	if plan.Fault == Impostor {
		p.struck[Impostor].Add(1)
		target = p.impostor
	}
	server, err := net.Dial("tcp", target)
	if err != nil {
		return
	}
	p.track(server)
	defer p.drop(server)
	l := &link{proxy: p, plan: plan, client: client, server: server}
	l.quiet.Store(true)
	var both sync.WaitGroup
	both.Go(l.requests)
	both.Go(l.answers)
	both.Wait()
}

// A link is a connection on its way through the proxy.
type link struct {
	proxy          *Proxy
	plan           Plan
	client, server net.Conn
	quiet          atomic.Bool  // it was the server that sent last, or nobody
	turn           atomic.Int64 // how many exchanges have begun
	once           sync.Once    // the fault strikes once
}

// strikes reports whether the fault is now to strike, if it is one of these.
func (l *link) strikes(these ...Fault) bool {
	now := false
	for _, f := range these {
		if f == l.plan.Fault && l.turn.Load() > int64(l.plan.Turn) {
			l.once.Do(func() {
				l.proxy.struck[f].Add(1)
				now = true
			})
		}
	}
	return now
}

// cut ends the connection.
func (l *link) cut(withReset bool) {
	if withReset {
		reset(l.client)
		reset(l.server)
	}
	l.client.Close()
	l.server.Close()
}

// requests carries what the client sends.
func (l *link) requests() {
	defer l.server.Close()
	chunk := make([]byte, 32<<10)
	for {
		n, err := l.client.Read(chunk)
		if err != nil {
			return
		}
		if l.quiet.Swap(false) {
			l.turn.Add(1)
		}
		switch {
		case l.strikes(ResetUnsent):
			l.cut(true)
			return
		case l.strikes(Hang):
			_, _ = io.Copy(io.Discard, l.client)
			return
		case l.strikes(Garbage):
			_, _ = io.WriteString(l.client, "SSH-2.0-OpenSSH_9.6\r\n\x00\xff\x17\r\n\r\n")
			l.cut(false)
			return
		}
		if _, err := l.server.Write(chunk[:n]); err != nil {
			return
		}
	}
}

// answers carries what the server sends.
func (l *link) answers() {
	defer l.client.Close()
	chunk := make([]byte, 32<<10)
	for {
		n, err := l.server.Read(chunk)
		if err != nil {
			return
		}
		l.quiet.Store(true)
		p := chunk[:n]
		if l.interrupts(p) {
			return
		}
		if l.plan.Fault == Drip && l.turn.Load() > int64(l.plan.Turn) {
			l.strikes(Drip)
			if !l.drip(p) {
				return
			}
			continue
		}
		if _, err := l.client.Write(p); err != nil {
			return
		}
	}
}

// interrupts lets a fault that strikes answers strike p. It reports whether
// one has.
func (l *link) interrupts(p []byte) bool {
	if !l.strikes(ResetBefore, ResetDuring, ResetAfter, HalfBody, HangAnswered, HangBody) {
		return false
	}
	switch l.plan.Fault {
	case ResetDuring:
		_, _ = l.client.Write(p[:min(len(p), 40)])
	case ResetAfter, HalfBody, HangBody:
		end := bytes.Index(p, []byte("\r\n\r\n")) + 4 // of the headers, or near the beginning
		_, _ = l.client.Write(p[:end+(len(p)-end)/2])
	}
	switch l.plan.Fault {
	case HangAnswered, HangBody:
		_, _ = io.Copy(io.Discard, l.server) // until the client closes, and requests the server's side
	default:
		l.cut(l.plan.Fault != HalfBody)
	}
	return true
}

// drip sends p in eight pieces. It reports whether the client took them.
func (l *link) drip(p []byte) bool {
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for piece := len(p)/8 + 1; len(p) > 0; <-tick.C {
		n := min(piece, len(p))
		if _, err := l.client.Write(p[:n]); err != nil {
			return false
		}
		p = p[n:]
	}
	return true
}

// A ClosedPort is an address that refuses connections: it is taken, but nobody
// listens there.
type ClosedPort struct{ near, far net.Conn }

// NewClosedPort returns a ClosedPort on the loopback.
func NewClosedPort() (*ClosedPort, error) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	defer listener.Close()
	near, err := net.Dial("tcp", listener.Addr().String())
	if err != nil {
		return nil, err
	}
	far, err := listener.Accept()
	if err != nil {
		near.Close()
		return nil, err
	}
	return &ClosedPort{near, far}, nil
}

// Addr returns the address.
func (c *ClosedPort) Addr() string { return c.near.LocalAddr().String() }

// Close lets the address go.
func (c *ClosedPort) Close() {
	c.near.Close()
	c.far.Close()
}
