package main

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"time"
)

// A clock runs faster than real by a factor. What it shows is called nominal:
// the time since its start in a world where it runs right.
type clock struct {
	start time.Time
	speed float64
}

func (c clock) nominal(real time.Duration) time.Duration {
	return time.Duration(float64(real) * c.speed)
}

func (c clock) real(nominal time.Duration) time.Duration {
	return time.Duration(float64(nominal) / c.speed)
}

func (c clock) at(t time.Time) time.Duration { return c.nominal(t.Sub(c.start)) }
func (c clock) now() time.Duration           { return c.at(time.Now()) }

// sleep waits for a nominal time, or returns false when ctx ends first.
func (c clock) sleep(ctx context.Context, nominal time.Duration) bool {
	timer := time.NewTimer(c.real(nominal))
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// A fault is how an attempt goes wrong. The zero fault is none.
type fault struct {
	status     int           // of an error answer …
	kind       string        // … and its type, as the Claude API names it
	retryAfter time.Duration // nominal
	reset      bool          // the connection is reset, without an answer
	breaksOff  int           // the stream breaks off after so many pieces of text
}

var (
	overloaded    = fault{status: 529, kind: "overloaded_error"}
	internalError = fault{status: 500, kind: "api_error"}
	reset         = fault{reset: true}
	breakOff      = fault{breaksOff: 3}
)

func rateLimited(retryAfter time.Duration) fault {
	return fault{status: 429, kind: "rate_limit_error", retryAfter: retryAfter}
}

// An upstream has the shape of the Claude API's Messages API, and a bad day: it
// does to each attempt of each request what its script says. During the outage
// it resets every connection.
type upstream struct {
	clock  clock
	script []step

	mu       sync.Mutex
	attempts map[int]int // seen of each request
	outage   int         // attempts seen during the outage
}

func newUpstream(clock clock, script []step) *upstream {
	return &upstream{clock: clock, script: script, attempts: make(map[int]int)}
}

// messagesPath is the path of the request with this number. The number before
// the API's own path lets the upstream and the hooks, which see nothing of a
// request but its URL, tell requests apart.
func messagesPath(number int) string { return fmt.Sprintf("/%d/v1/messages", number) }

func numberOf(path string) int {
	first, _, _ := strings.Cut(strings.TrimPrefix(path, "/"), "/")
	n, _ := strconv.Atoi(first)
	return n
}

func (u *upstream) handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("POST /{number}/v1/messages", u.messages)
	return mux
}

// A messagesRequest is what the upstream looks at of a request's body.
type messagesRequest struct {
	Model     string    `json:"model"`
	MaxTokens int       `json:"max_tokens"`
	Stream    bool      `json:"stream,omitempty"`
	Messages  []message `json:"messages"`
}

type message struct {
	Role    string `json:"role"`
	Content string `json:"content"`
}

func (u *upstream) messages(w http.ResponseWriter, r *http.Request) {
	var req messagesRequest
	if err := json.NewDecoder(r.Body).Decode(&req); err != nil || req.Model == "" || req.MaxTokens < 1 || len(req.Messages) == 0 {
		writeError(w, http.StatusBadRequest, "invalid_request_error", "want model, max_tokens and messages")
		return
	}
	number := numberOf(r.URL.Path)
	f := u.next(number)
	slow := number <= len(u.script) && u.script[max(0, number-1)].slow
	switch {
	case f.reset:
		resetConnection(w)
	case f.status != 0:
		if f.retryAfter > 0 { // in fractions of a second: this API's time is accelerated
			w.Header().Set("Retry-After", strconv.FormatFloat(u.clock.real(f.retryAfter).Seconds(), 'f', 3, 64))
		}
		writeError(w, f.status, f.kind, "a bad day")
	case req.Stream:
		u.stream(w, r, req.Model, f.breaksOff, slow)
	case u.clock.sleep(r.Context(), 300*time.Millisecond):
		writeJSON(w, http.StatusOK, map[string]any{
			"id": "msg_bad_day", "type": "message", "role": "assistant", "model": req.Model,
			"content":     []any{map[string]any{"type": "text", "text": strings.Join(pieces, "")}},
			"stop_reason": "end_turn", "usage": map[string]int{"input_tokens": 9, "output_tokens": len(pieces)},
		})
	}
}

// next counts an attempt of a request and returns what becomes of it.
func (u *upstream) next(number int) fault {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.attempts[number]++
	if now := u.clock.now(); now >= outageBegins && now < outageEnds {
		u.outage++
		return reset
	}
	if number < 1 || number > len(u.script) {
		return fault{}
	}
	if faults, attempt := u.script[number-1].faults, u.attempts[number]; attempt <= len(faults) {
		return faults[attempt-1]
	}
	return fault{}
}

// saw returns how many attempts of a request have arrived.
func (u *upstream) saw(number int) int {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.attempts[number]
}

// sawInAll returns how many attempts have arrived, and how many of them during
// the outage.
func (u *upstream) sawInAll() (all, outage int) {
	u.mu.Lock()
	defer u.mu.Unlock()
	for _, n := range u.attempts {
		all += n
	}
	return all, u.outage
}

func resetConnection(w http.ResponseWriter) {
	conn, _, err := http.NewResponseController(w).Hijack()
	if err != nil {
		panic(http.ErrAbortHandler)
	}
	if tcp, ok := conn.(*net.TCPConn); ok {
		_ = tcp.SetLinger(0) // so that closing resets
	}
	conn.Close()
}

// pieces are the text of every answer, as a stream delivers it.
var pieces = []string{"Rain", " on", " the", " roof", ",", " all", " night", "."}

// stream sends the events of an answer as they come about, and breaks off after
// so many pieces of text if that is not zero.
func (u *upstream) stream(w http.ResponseWriter, r *http.Request, model string, breaksOff int, slow bool) {
	pace := 150 * time.Millisecond
	if slow {
		pace = 800 * time.Millisecond
	}
	w.Header().Set("Content-Type", "text/event-stream")
	w.Header().Set("Cache-Control", "no-cache")
	send := func(event string, fields map[string]any) {
		fields["type"] = event
		data, _ := json.Marshal(fields) // of plain values: cannot fail
		fmt.Fprintf(w, "event: %s\ndata: %s\n\n", event, data)
		_ = http.NewResponseController(w).Flush() // fails only when the client has left, as sleep sees
	}
	send("message_start", map[string]any{"message": map[string]any{
		"id": "msg_bad_day", "type": "message", "role": "assistant", "model": model, "content": []any{},
		"stop_reason": nil, "usage": map[string]int{"input_tokens": 9, "output_tokens": 1},
	}})
	send("content_block_start", map[string]any{"index": 0, "content_block": map[string]any{"type": "text", "text": ""}})
	send("ping", map[string]any{})
	for i, text := range pieces {
		if breaksOff > 0 && i == breaksOff {
			panic(http.ErrAbortHandler) // the connection is closed in the middle
		}
		if !u.clock.sleep(r.Context(), pace) {
			return
		}
		send("content_block_delta", map[string]any{"index": 0, "delta": map[string]any{"type": "text_delta", "text": text}})
	}
	send("content_block_stop", map[string]any{"index": 0})
	send("message_delta", map[string]any{
		"delta": map[string]any{"stop_reason": "end_turn"}, "usage": map[string]int{"output_tokens": len(pieces)},
	})
	send("message_stop", map[string]any{})
}
