package sse

import "bytes"

// A parser follows a stream of events line by line, whatever pieces it comes
// in. It keeps only the first bytes of a line and of an event's data.
type parser struct {
	line    []byte
	started bool // past a byte order mark
	wasCR   bool // the last line ended in one: a line feed belongs to it

	event   []byte
	data    []byte
	hasData bool

	begun  bool        // there was a real event
	failed *EventError // the first error event
	early  *EventError // the same, if no real event came before it
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
		p.event = append(p.event[:0], value...)
	case "data":
		if p.hasData {
			p.add([]byte("\n"))
		}
		p.hasData = true
		p.add(value)
	}
}

func (p *parser) add(data []byte) {
	p.data = append(p.data, data[:min(len(data), maxKept-len(p.data))]...)
}

// dispatch ends an event. One without data is none, says the format.
func (p *parser) dispatch() {
	if p.hasData && string(p.event) != "ping" {
		if p.failed == nil {
			p.failed = eventError(string(p.event), p.data)
			if !p.begun {
				p.early = p.failed
			}
		}
		p.begun = true
	}
	p.event, p.data, p.hasData = p.event[:0], p.data[:0], false
}
