package main

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"runtime"
	"time"
)

// A flow is a request body of a given length that is produced as it is read.
type flow struct{ left int64 }

func (f *flow) Read(p []byte) (int, error) {
	if f.left == 0 {
		return 0, io.EOF
	}
	n := min(f.left, int64(len(p)))
	f.left -= n
	return int(n), nil
}

func (f *flow) Close() error { return nil }

// receiving takes an upload and notes when it began to arrive and how large the
// heap was meanwhile.
type receiving struct {
	size  int
	begun time.Time
	peak  uint64
}

func (b *receiving) RoundTrip(req *http.Request) (*http.Response, error) {
	defer req.Body.Close()
	buf, total := make([]byte, 32<<10), 0
	for {
		n, err := req.Body.Read(buf)
		if b.begun.IsZero() {
			b.begun = time.Now()
		}
		if before := total; before == 0 || before>>22 != (before+n)>>22 { // every 4 MiB
			b.peak = max(b.peak, heap())
		}
		total += n
		if err != nil && err != io.EOF || err == io.EOF && total != b.size {
			return nil, fmt.Errorf("got %d bytes, then %v", total, err)
		}
		if err == io.EOF {
			return respond(req, http.StatusOK, http.NoBody, 0), nil
		}
	}
}

func heap() uint64 {
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}

// An upload is what one costs.
type upload struct {
	firstByte       float64 // ns until the base gets it
	allocated, peak float64 // bytes
}

// sendUpload sends one with GetBody and a known length, or one that has
// neither, such as a pipe.
func sendUpload(c contender, size int64, getBody bool) (upload, error) {
	base := &receiving{}
	rt := c.wrap(base, standard)
	send := func(size int64) error {
		*base = receiving{size: int(size)}
		req := newRequest(http.MethodPost, "api.example.com")
		req.Body, req.ContentLength = &flow{size}, -1
		if getBody {
			req.ContentLength = size
			req.GetBody = func() (io.ReadCloser, error) { return &flow{size}, nil }
		}
		return expect200(rt.RoundTrip(req))
	}
	if err := send(1); err != nil { // whose like the contender has seen before
		return upload{}, err
	}
	runtime.GC()
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	start := time.Now()
	err := send(size)
	runtime.ReadMemStats(&after)
	return upload{
		firstByte: float64(base.begun.Sub(start)),
		allocated: float64(after.TotalAlloc - before.TotalAlloc),
		peak:      max(0, float64(base.peak)-float64(before.HeapAlloc)),
	}, err
}

// measureUploads returns the medians of each contender.
func measureUploads(cs []contender, o options, getBody bool) (map[string]upload, error) {
	medians := map[string]upload{}
	for _, c := range cs {
		var first, allocated, peak []float64
		for range o.uploads {
			u, err := sendUpload(c, 64<<20, getBody)
			if err != nil {
				return nil, fmt.Errorf("upload: %s: %w", c.name, err)
			}
			first, allocated, peak = append(first, u.firstByte), append(allocated, u.allocated), append(peak, u.peak)
		}
		medians[c.name] = upload{median(first), median(allocated), median(peak)}
	}
	return medians, nil
}

// A crowd is what remains of many hosts that were called once or twice.
type crowd struct {
	held  int     // hosts that something is kept of
	bytes float64 // kept of all of them
	ns    float64 // for a request when they are called in turn a second time
}

func measureCrowd(c contender, hosts []string) (crowd, error) {
	collect := func() float64 {
		runtime.GC()
		runtime.GC() // what a finalizer or a sync.Pool held on to
		return float64(heap())
	}
	before := collect()
	rt := c.wrap(plain{}, standard)
	req := newRequest(http.MethodGet, "api.example.com")
	pass := func() (time.Duration, error) {
		start := time.Now()
		for _, host := range hosts {
			req.URL.Host = host
			if err := expect200(rt.RoundTrip(req)); err != nil {
				return 0, err
			}
		}
		return time.Since(start), nil
	}
	_, first := pass()
	took, second := pass()
	result := crowd{ns: float64(took) / float64(len(hosts)), bytes: max(0, collect()-before)}
	if c.held != nil {
		result.held = c.held(rt)
	}
	runtime.KeepAlive(rt)
	runtime.KeepAlive(req)
	return result, errors.Join(first, second)
}

func manyHosts(n int) []string {
	hosts := make([]string, n)
	for i := range hosts {
		hosts[i] = fmt.Sprintf("host-%d.example.com", i)
	}
	return hosts
}
