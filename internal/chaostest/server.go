package chaostest

import (
	"fmt"
	"hash/crc32"
	"io"
	"math/rand/v2"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
)

// The headers by which client and server know what belongs together.
const (
	IDHeader   = "X-Chaos-Id"   // of a request, and of its answer
	HashHeader = "X-Chaos-Hash" // of the body, of requests and answers
)

// Hash returns the HashHeader of a body.
func Hash(body []byte) string { return strconv.FormatUint(uint64(crc32.ChecksumIEEE(body)), 16) }

// Seen is what the server has seen of one request.
type Seen struct {
	Method   string
	Key      string // Idempotency-Key
	Arrived  int    // how many times a handler began
	Executed int    // … and had read the whole body
	Damaged  int    // … but not the one that the client meant
}

// A Recorder is an http.Handler that remembers the requests by their IDs. Its
// answers depend on Seed and the number of the request alone: most are 200s,
// some are errors, before or after the request was executed, and some break off.
type Recorder struct {
	Seed uint64
	// Trouble is the share of requests that are not answered well.
	Trouble float64

	number atomic.Uint64
	mu     sync.Mutex
	seen   map[string]Seen
}

// Seen returns what the server has seen of the request id.
func (s *Recorder) Seen(id string) Seen {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.seen[id]
}

// Arrived returns how many times a handler began.
func (s *Recorder) Arrived() uint64 { return s.number.Load() }

func (s *Recorder) note(r *http.Request, change func(*Seen)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.seen == nil {
		s.seen = make(map[string]Seen)
	}
	seen := s.seen[r.Header.Get(IDHeader)]
	seen.Method, seen.Key = r.Method, r.Header.Get("Idempotency-Key")
	change(&seen)
	s.seen[r.Header.Get(IDHeader)] = seen
}

// ServeHTTP answers as the schedule says, and remembers the request.
func (s *Recorder) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	rnd := rand.New(rand.NewPCG(s.Seed, s.number.Add(1)))
	s.note(r, func(seen *Seen) { seen.Arrived++ })
	w.Header().Set(IDHeader, r.Header.Get(IDHeader))
	status := http.StatusOK
	if rnd.Float64() < s.Trouble {
		status = turnAway(w, rnd)
		if status == 0 {
			return
		}
	}
	body, err := io.ReadAll(r.Body)
	if err != nil {
		panic(http.ErrAbortHandler)
	}
	s.note(r, func(seen *Seen) {
		seen.Executed++
		if Hash(body) != r.Header.Get(HashHeader) {
			seen.Damaged++
		}
	})
	if status == abort {
		panic(http.ErrAbortHandler)
	}
	if rnd.IntN(50) == 0 {
		w.Header().Set("Connection", "close") // over HTTP/2 that is a GOAWAY
	}
	answer(w, rnd, status)
}

const abort = -1

// turnAway draws what trouble a request meets. It returns 0 if it has answered
// it, and else the status to answer it with once it has been executed.
func turnAway(w http.ResponseWriter, rnd *rand.Rand) int {
	switch rnd.IntN(8) {
	case 0:
		w.WriteHeader(http.StatusServiceUnavailable)
	case 1:
		w.Header().Set("Retry-After-Ms", "5")
		answer(w, rnd, http.StatusTooManyRequests)
	case 2:
		answer(w, rnd, 529)
	case 3:
		panic(http.ErrAbortHandler)
	case 4:
		return http.StatusInternalServerError
	case 5:
		return http.StatusBadGateway
	case 6:
		return http.StatusNotFound
	case 7:
		return abort
	}
	return 0
}

// answer sends a body of a random size, with or without its length.
func answer(w http.ResponseWriter, rnd *rand.Rand, status int) {
	sizes := [...]int{0, 1, 100, 2000, 10_000}
	size := sizes[rnd.IntN(len(sizes))]
	if rnd.IntN(40) == 0 {
		size = 100_000 // more than buffers hold
	}
	body, kind := Text(rnd.Uint64(), size), "application/octet-stream"
	if status == http.StatusOK && rnd.IntN(6) == 0 {
		body, kind = events(rnd), EventStream
	}
	w.Header().Set(HashHeader, Hash(body))
	w.Header().Set("Content-Type", kind)
	if rnd.IntN(2) == 0 {
		w.Header().Set("Content-Length", fmt.Sprint(len(body)))
	}
	w.WriteHeader(status)
	half := len(body) / 2
	_, _ = w.Write(body[:half])
	if rnd.IntN(4) == 0 {
		_ = http.NewResponseController(w).Flush()
	}
	_, _ = w.Write(body[half:])
}

// EventStream is the type of some answers. A few of them die early.
const EventStream = "text/event-stream"

func events(rnd *rand.Rand) []byte {
	const ping = ": hello\n\nevent: ping\ndata: {}\n\n"
	switch rnd.IntN(8) {
	case 0:
		return []byte(ping)
	case 1:
		return []byte(ping + `event: error` + "\n" + `data: {"type":"error","error":{"type":"api_error"}}` + "\n\n")
	}
	return []byte(ping + strings.Repeat("event: content_block_delta\ndata: {\"type\":\"content_block_delta\"}\n\n", 1+rnd.IntN(30)))
}

// Text returns size bytes that follow from seed.
func Text(seed uint64, size int) []byte {
	var key [32]byte
	for i := range 8 {
		key[i] = byte(seed >> (8 * i))
	}
	text := make([]byte, size)
	_, _ = rand.NewChaCha8(key).Read(text)
	return text
}
