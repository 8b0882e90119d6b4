package tripper

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/http"
	"runtime"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// The benchmarks run over a base that costs next to nothing; "bare" is that
// base alone, what is above it is the price of a Transport.

// benchBase answers with the same response again and again. Its body, if it
// has one, is always at its end.
type benchBase struct{ resp *http.Response }

func (b benchBase) RoundTrip(req *http.Request) (*http.Response, error) {
	if req.Body != nil {
		req.Body.Close()
	}
	return b.resp, nil
}

// benchBody is a response body without an end to reach but its own.
type benchBody struct{}

func (benchBody) Read([]byte) (int, error) { return 0, io.EOF }
func (benchBody) Close() error             { return nil }

func benchResponse(status int) *http.Response {
	return &http.Response{StatusCode: status, Header: http.Header{}, Body: http.NoBody}
}

// benchStreaming gives each response a fresh body, for a Transport to watch.
type benchStreaming struct{ resp *http.Response }

func (b benchStreaming) RoundTrip(*http.Request) (*http.Response, error) {
	b.resp.Body = benchBody{}
	return b.resp, nil
}

// benchFailing fails every other time.
type benchFailing struct {
	n             int
	failure, fine *http.Response
}

func (b *benchFailing) RoundTrip(*http.Request) (*http.Response, error) {
	if b.n++; b.n%2 == 1 {
		return b.failure, nil
	}
	return b.fine, nil
}

func benchRetrying(base http.RoundTripper) *Transport {
	return &Transport{Base: base, Policy: Policy{
		Retry:   RetryPolicy{MinWait: time.Nanosecond, MaxWait: time.Nanosecond, Budget: Budget{Ratio: -1}},
		Breaker: BreakerPolicy{FailureThreshold: 1 << 30},
	}}
}

func benchRequests(b testing.TB, hosts int) []*http.Request {
	requests := make([]*http.Request, hosts)
	for i := range requests {
		req, err := http.NewRequest("GET", fmt.Sprintf("https://api%d.example.com/v1/messages", i), nil)
		require.NoError(b, err)
		requests[i] = req
	}
	return requests
}

func benchPost(b testing.TB) *http.Request {
	req, err := http.NewRequest("POST", "https://api.example.com/v1/messages", bytes.NewReader(make([]byte, 2<<10)))
	require.NoError(b, err)
	return req
}

// benchBoth runs f over base alone and over a Transport on it.
func benchBoth(b *testing.B, base http.RoundTripper, f func(*testing.B, http.RoundTripper)) {
	b.Run("bare", func(b *testing.B) { b.ReportAllocs(); f(b, base) })
	b.Run("tripper", func(b *testing.B) { b.ReportAllocs(); f(b, &Transport{Base: base}) })
}

// benchLoop sends req again and again.
func benchLoop(b *testing.B, rt http.RoundTripper, req *http.Request) {
	for b.Loop() {
		resp, err := rt.RoundTrip(req)
		if err != nil {
			b.Fatal(err)
		}
		resp.Body.Close()
	}
}

func BenchmarkSuccess(b *testing.B) {
	base := benchBase{benchResponse(200)}
	for _, hosts := range []int{1, 1000} {
		requests := benchRequests(b, hosts)
		b.Run(fmt.Sprintf("serial/hosts=%d", hosts), func(b *testing.B) {
			benchBoth(b, base, func(b *testing.B, rt http.RoundTripper) {
				for i := 0; b.Loop(); i++ {
					if _, err := rt.RoundTrip(requests[i%hosts]); err != nil {
						b.Fatal(err)
					}
				}
			})
		})
		b.Run(fmt.Sprintf("parallel/hosts=%d", hosts), func(b *testing.B) {
			benchBoth(b, base, func(b *testing.B, rt http.RoundTripper) {
				b.RunParallel(func(pb *testing.PB) {
					for i := 0; pb.Next(); i++ {
						if _, err := rt.RoundTrip(requests[i%hosts]); err != nil {
							b.Error(err)
						}
					}
				})
			})
		})
	}
}

func BenchmarkSuccessWithBody(b *testing.B) {
	req := benchRequests(b, 1)[0]
	benchBoth(b, benchStreaming{benchResponse(200)}, func(b *testing.B, rt http.RoundTripper) { benchLoop(b, rt, req) })
}

func BenchmarkPost(b *testing.B) {
	req := benchPost(b)
	benchBoth(b, benchBase{benchResponse(200)}, func(b *testing.B, rt http.RoundTripper) { benchLoop(b, rt, req) })
}

// BenchmarkReject is a request to an open breaker.
func BenchmarkReject(b *testing.B) {
	tr, req := benchOpen(b)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := tr.RoundTrip(req); err == nil {
			b.Fatal("not rejected")
		}
	}
}

func benchOpen(b testing.TB) (*Transport, *http.Request) {
	tr := &Transport{Base: benchBase{benchResponse(200)}, Policy: Policy{Service: "open"}}
	require.True(b, tr.Trip("open", time.Hour, nil))
	return tr, benchRequests(b, 1)[0]
}

// BenchmarkRetry is a request whose second attempt succeeds; "bare" is two
// requests.
func BenchmarkRetry(b *testing.B) {
	base := &benchFailing{failure: benchResponse(503), fine: benchResponse(200)}
	req := benchRequests(b, 1)[0]
	b.Run("bare", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			base.RoundTrip(req)
			base.RoundTrip(req)
		}
	})
	b.Run("tripper", func(b *testing.B) { b.ReportAllocs(); benchLoop(b, benchRetrying(base), req) })
}

// TestAllocs holds what the benchmarks show: the common case allocates nothing.
func TestAllocs(t *testing.T) {
	get, post := benchRequests(t, 1)[0], benchPost(t)
	fine, streaming := benchBase{benchResponse(200)}, benchStreaming{benchResponse(200)}
	open, rejected := benchOpen(t)
	nothing := []Layer{func(next http.RoundTripper) http.RoundTripper { return benchLayer{next} }}
	timely := Policy{Retry: RetryPolicy{Replay: ReplaySafe, MaxElapsed: time.Minute}}
	for _, c := range []struct {
		name string
		rt   *Transport
		req  *http.Request
		want float64
	}{
		{"GET", &Transport{Base: fine}, get, 0},
		{"404", &Transport{Base: benchBase{benchResponse(404)}}, get, 0},
		{"POST with GetBody", &Transport{Base: fine}, post, 0},
		{"response with a body", &Transport{Base: streaming}, get, 1},
		{"rejected", open, rejected, 0},
		{"GET through a Layer", &Transport{Base: fine, Layers: nothing}, get, 0},
		{"POST through a Layer", &Transport{Base: fine, Layers: nothing}, post, 0},
		{"404 through a Layer", &Transport{Base: benchBase{benchResponse(404)}, Layers: nothing}, get, 0},
		{"response with a body through a Layer", &Transport{Base: streaming, Layers: nothing}, get, 1},
		{"GET with MaxElapsed", &Transport{Base: fine, Policy: timely}, get, 0},
		{"POST with MaxElapsed", &Transport{Base: fine, Policy: timely}, post, 0},
		{"response with a body and MaxElapsed", &Transport{Base: streaming, Policy: timely}, get, 1},
		{"MaxElapsed through a Layer", &Transport{Base: fine, Policy: timely, Layers: nothing}, get, 0},
		{"GET with a rate", &Transport{Base: fine, Policy: Policy{Breaker: BreakerPolicy{FailureRate: 0.5}}}, get, 0},
		{"GET with SlowCall", &Transport{Base: fine, Policy: Policy{Breaker: BreakerPolicy{SlowCall: time.Minute}}}, get, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			allocs := testing.AllocsPerRun(200, func() { benchDo(t, c.rt, c.req) })
			require.Equal(t, c.want, allocs)
		})
	}
}

// A benchLayer does nothing.
type benchLayer struct{ next http.RoundTripper }

func (l benchLayer) RoundTrip(req *http.Request) (*http.Response, error) {
	return l.next.RoundTrip(req)
}

func benchDo(t testing.TB, rt http.RoundTripper, req *http.Request) {
	resp, err := rt.RoundTrip(req)
	if err == nil {
		resp.Body.Close()
	} else if !errors.Is(err, ErrRejected) {
		t.Error(err)
	}
}

// A retry may cost something, but not much.
func TestAllocsOfARetry(t *testing.T) {
	failing := &benchFailing{failure: benchResponse(503), fine: benchResponse(200)}
	tr, get := benchRetrying(failing), benchRequests(t, 1)[0]
	require.LessOrEqual(t, testing.AllocsPerRun(200, func() { benchDo(t, tr, get) }), 20.0)
}

// The wrapper of a response body is all that such a response costs.
func TestAllocatedBytes(t *testing.T) {
	tr, get := &Transport{Base: benchStreaming{benchResponse(200)}}, benchRequests(t, 1)[0]
	benchDo(t, tr, get) // the first request makes the service
	const requests = 1000
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	for range requests {
		benchDo(t, tr, get)
	}
	runtime.ReadMemStats(&after)
	require.InDelta(t, 64, float64(after.TotalAlloc-before.TotalAlloc)/requests, 4)
}
