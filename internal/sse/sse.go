// Package sse tells streams of server-sent events that begin well from those
// that die early. The format is that of
// https://html.spec.whatwg.org/multipage/server-sent-events.html.
package sse

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"mime"
	"net/http"
)

// A Transport holds back each text/event-stream that Base answers with until
// its first real event: one that has data and is no ping. If the stream ends,
// breaks off or reports a passing error before that, the attempt has failed.
// Afterwards the stream flows as it comes.
type Transport struct {
	Base http.RoundTripper
}

// A Failure is the error of an attempt whose stream died early. Whoever has it
// last either returns or closes the response.
type Failure struct {
	Response *http.Response // as it came; reading its body meets what happened
	Err      error
}

// Error says why the stream failed.
func (f *Failure) Error() string {
	return "tripper: event stream failed before its first event: " + f.Err.Error()
}

// Unwrap returns Err.
func (f *Failure) Unwrap() error { return f.Err }

// maxHeld bounds what is held back; a longer beginning counts as an event.
const maxHeld = 64 << 10

// RoundTrip returns a *Failure for a stream that died early.
func (t *Transport) RoundTrip(req *http.Request) (*http.Response, error) {
	resp, err := t.Base.RoundTrip(req)
	if err != nil || !isEventStream(resp) {
		return resp, err
	}
	b := &Body{rc: resp.Body}
	failure := b.hold()
	if failure == nil {
		resp.Body = b
		return resp, nil
	}
	if req.Context().Err() != nil {
		resp.Body.Close()
		return nil, context.Cause(req.Context())
	}
	resp.Body = b
	return nil, &Failure{resp, failure}
}

func isEventStream(resp *http.Response) bool {
	if resp == nil || resp.StatusCode != http.StatusOK || resp.Body == nil || resp.Body == http.NoBody ||
		resp.Header.Get("Content-Encoding") != "" {
		return false
	}
	kind, _, _ := mime.ParseMediaType(resp.Header.Get("Content-Type"))
	return kind == "text/event-stream"
}

// A Body is an event stream whose beginning has been looked at.
type Body struct {
	rc     io.ReadCloser
	held   []byte // read but not given out
	err    error  // that comes after held
	parser parser
}

// hold reads up to the first real event, and returns why there is none.
func (b *Body) hold() error {
	chunk := make([]byte, 4<<10)
	for len(b.held) < maxHeld {
		n, err := b.rc.Read(chunk)
		b.held = append(b.held, chunk[:n]...)
		b.parser.feed(chunk[:n])
		b.err = err
		switch {
		case b.parser.passing:
			return b.parser.failed
		case b.parser.begun:
			return nil
		case err == io.EOF:
			return io.ErrUnexpectedEOF
		case err != nil:
			return err
		}
	}
	return nil
}

// Failed returns the error event that the stream has had so far, or nil.
func (b *Body) Failed() error { return b.parser.failed }

// Read gives what was held, and then what comes.
func (b *Body) Read(p []byte) (int, error) {
	if len(b.held) > 0 {
		n := copy(p, b.held)
		if b.held = b.held[n:]; len(b.held) == 0 {
			b.held = nil
		}
		return n, nil
	}
	if b.err != nil {
		return 0, b.err
	}
	n, err := b.rc.Read(p)
	b.parser.feed(p[:n])
	return n, err
}

// Close closes the stream.
func (b *Body) Close() error { return b.rc.Close() }

// A parser follows a stream of events line by line, whatever pieces it comes
// in. It keeps only the first bytes of a line and of an event's data.
type parser struct {
	line    []byte
	started bool // past a byte order mark
	wasCR   bool // the last line ended in one: a line feed belongs to it

	event   string
	data    []byte
	hasData bool

	begun   bool  // there was a real event
	failed  error // the first error event
	passing bool  // it was the first event of all, and a retry may cure it
}

const maxKept = 4 << 10 // of a line, and of an event's data

// feed takes the next bytes.
func (p *parser) feed(chunk []byte) {
	for len(chunk) > 0 {
		if p.wasCR && chunk[0] == '\n' {
			chunk = chunk[1:]
		}
		p.wasCR = false
		end := bytes.IndexAny(chunk, "\r\n")
		if end < 0 {
			p.keep(chunk)
			return
		}
		p.keep(chunk[:end])
		p.wasCR = chunk[end] == '\r'
		chunk = chunk[end+1:]
		p.endLine()
	}
}

func (p *parser) keep(part []byte) {
	p.line = append(p.line, part[:min(len(part), maxKept-len(p.line))]...)
}

func (p *parser) endLine() {
	line := p.line
	p.line = p.line[:0]
	if !p.started {
		line, p.started = bytes.TrimPrefix(line, []byte("\ufeff")), true
	}
	if len(line) == 0 {
		p.dispatch()
		return
	}
	field, value, _ := bytes.Cut(line, []byte(":"))
	value = bytes.TrimPrefix(value, []byte(" "))
	switch string(field) {
	case "event":
		p.event = string(value)
	case "data":
		p.hasData = true
		p.data = append(p.data, value[:min(len(value), maxKept-len(p.data))]...)
	}
}

// dispatch ends an event. One without data is none, says the format.
func (p *parser) dispatch() {
	if p.hasData && p.event != "ping" {
		if p.event == "error" && p.failed == nil {
			p.fail()
		}
		p.begun = true
	}
	p.event, p.data, p.hasData = "", p.data[:0], false
}

// fail notes an error event. The types are those of the Claude API,
// https://docs.anthropic.com/en/api/errors.
func (p *parser) fail() {
	var report struct {
		Error struct{ Type string }
	}
	p.failed = errors.New("error event")
	if json.Unmarshal(p.data, &report) != nil || report.Error.Type == "" {
		return
	}
	switch report.Error.Type {
	case "overloaded_error", "rate_limit_error", "api_error", "timeout_error":
		p.passing = !p.begun
	}
	p.failed = fmt.Errorf("error event: %.40q", report.Error.Type)
}
