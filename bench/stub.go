package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"time"
)

// A sender is what one goroutine sends, apart in memory from what the others do.
type sender struct {
	_    [128]byte
	req  http.Request
	resp http.Response
	url  url.URL
	next int
	_    [128]byte
}

// A request to a stub brings the response that it wants along, in the field
// that http.Client uses for redirects, so that the base allocates nothing and
// goroutines share nothing that would be measured in the contenders' place.
func newSender(method, host string) *sender {
	req, err := http.NewRequest(method, "http://"+host+"/", nil)
	if err != nil {
		panic(err)
	}
	s := &sender{
		req:  *req,
		resp: http.Response{Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1, Header: http.Header{}},
		url:  *req.URL,
	}
	s.req.URL, s.req.Response = &s.url, &s.resp
	return s
}

func newRequest(method, host string) *http.Request { return &newSender(method, host).req }

func respond(req *http.Request, status int, body io.ReadCloser, length int64) *http.Response {
	resp := req.Response
	resp.StatusCode, resp.Body, resp.ContentLength = status, body, length
	return resp
}

// plain reads the request's body and answers 200 without one.
type plain struct{}

func (plain) RoundTrip(req *http.Request) (*http.Response, error) {
	if req.Body != nil {
		if _, err := io.Copy(io.Discard, req.Body); err != nil {
			return nil, err
		}
		req.Body.Close()
	}
	return respond(req, http.StatusOK, http.NoBody, 0), nil
}

// A page is a response body of some bytes that can be used again.
type page struct{ left int }

func (p *page) Read(b []byte) (int, error) {
	if p.left == 0 {
		return 0, io.EOF
	}
	n := min(p.left, len(b))
	p.left -= n
	return n, nil
}

func (p *page) Close() error { return nil }

const pageSize = 2 << 10

// paging answers 200 with a page. It serves one goroutine.
type paging struct{ page page }

func (b *paging) RoundTrip(req *http.Request) (*http.Response, error) {
	b.page.left = pageSize
	return respond(req, http.StatusOK, &b.page, pageSize), nil
}

// flaky fails every other request, with a 503 or with an error, and answers the
// ones between with 200. It serves one goroutine.
type flaky struct {
	err   error // nil: a 503 with a page
	calls int
	page  page
}

func (b *flaky) RoundTrip(req *http.Request) (*http.Response, error) {
	b.calls++
	switch {
	case b.calls%2 == 0:
		return respond(req, http.StatusOK, http.NoBody, 0), nil
	case b.err != nil:
		return nil, b.err
	}
	b.page.left = 100
	return respond(req, http.StatusServiceUnavailable, &b.page, 100), nil
}

// failing answers 503, always.
type failing struct{}

func (failing) RoundTrip(req *http.Request) (*http.Response, error) {
	if req.Response == nil {
		req.Response = &http.Response{Header: http.Header{}}
	}
	return respond(req, http.StatusServiceUnavailable, http.NoBody, 0), nil
}

// An operation is what is repeated and measured.
type operation func() error

// get sends GETs to the hosts in turn.
func get(hosts int) func(http.RoundTripper) operation {
	names := make([]string, hosts)
	for i := range names {
		names[i] = fmt.Sprintf("api-%d.example.com", i)
	}
	return func(rt http.RoundTripper) operation {
		s := newSender(http.MethodGet, names[0])
		return func() error {
			s.url.Host = names[s.next]
			if s.next++; s.next == len(names) {
				s.next = 0
			}
			return expect200(rt.RoundTrip(&s.req))
		}
	}
}

func expect200(resp *http.Response, err error) error {
	if err != nil {
		return err
	}
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("got status %d", resp.StatusCode)
	}
	return resp.Body.Close()
}

// post sends a body of 2 KiB as http.NewRequest makes it of a bytes.Reader.
func post(rt http.RoundTripper) operation {
	data := make([]byte, 2<<10)
	reader := bytes.NewReader(data)
	body := io.NopCloser(reader)
	req := newRequest(http.MethodPost, "api.example.com")
	req.ContentLength = reader.Size()
	req.GetBody = func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(data)), nil }
	return func() error {
		reader.Reset(data)
		req.Body = body // some contenders leave another one there
		return expect200(rt.RoundTrip(req))
	}
}

// read reads the response's body to its end.
func read(rt http.RoundTripper) operation {
	req, buf := newRequest(http.MethodGet, "api.example.com"), make([]byte, 4<<10)
	return func() error {
		resp, err := rt.RoundTrip(req)
		if err != nil {
			return err
		}
		total := 0
		for err == nil {
			var n int
			n, err = resp.Body.Read(buf)
			total += n
		}
		if err != io.EOF || total != pageSize {
			return fmt.Errorf("got a body of %d bytes, then %v", total, err)
		}
		return resp.Body.Close()
	}
}

// reject expects the breaker to be open.
func reject(rt http.RoundTripper) operation {
	req := newRequest(http.MethodGet, "api.example.com")
	return func() error {
		if _, err := rt.RoundTrip(req); err == nil {
			return errors.New("the open breaker let a request pass")
		}
		return nil
	}
}

// twice is what a retry comes down to without any machinery: one request that
// fails, a wait, one that does not.
func twice(base http.RoundTripper) operation {
	req := newRequest(http.MethodGet, "api-0.example.com")
	return func() error {
		if resp, err := base.RoundTrip(req); err == nil {
			resp.Body.Close()
		}
		timer := time.NewTimer(hardlyWaiting.minWait)
		<-timer.C
		return expect200(base.RoundTrip(req))
	}
}
