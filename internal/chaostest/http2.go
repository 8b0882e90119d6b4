package chaostest

import (
	"encoding/binary"
	"io"
	"net"
	"sync/atomic"
)

// The few parts of HTTP/2 (RFC 9113, sections 4.1 and 6) that a Refuser speaks.
const (
	preface = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

	frameHeaders   = 0x1
	frameReset     = 0x3
	frameSettings  = 0x4
	frameGoAway    = 0x7
	flagAck        = 0x1 // of SETTINGS
	flagEndStream  = 0x1 // of HEADERS and DATA
	flagEndHeaders = 0x4
	refusedStream  = 0x7  // an error code
	statusOK       = 0x88 // of a header block: ":status: 200"
)

// A Refuser is an HTTP/2 server that does not process its first requests. The
// others it answers with 200.
type Refuser struct {
	GoAway  bool         // refuses the whole connection instead of a stream
	Refused atomic.Int64 // how many requests so far
	Refuse  int64        // how many in all
	Served  atomic.Int64
}

// Serve speaks to one client, until it or the connection is gone.
func (r *Refuser) Serve(c net.Conn) {
	defer c.Close()
	if _, err := io.ReadFull(c, make([]byte, len(preface))); err != nil {
		return
	}
	writeFrame(c, frameSettings, 0, 0, nil)
	for refused := uint32(0); ; {
		kind, flags, stream, err := readFrame(c)
		switch {
		case err != nil:
			return
		case kind == frameSettings && flags&flagAck == 0:
			writeFrame(c, frameSettings, flagAck, 0, nil)
		case kind == frameHeaders && r.Refused.Load() < r.Refuse:
			r.Refused.Add(1)
			if refused = stream; r.GoAway {
				writeFrame(c, frameGoAway, 0, 0, make([]byte, 8)) // the last stream is 0, and there was no error
			} else {
				writeFrame(c, frameReset, 0, stream, binary.BigEndian.AppendUint32(nil, refusedStream))
			}
		case kind <= frameHeaders && flags&flagEndStream != 0 && stream > refused:
			r.Served.Add(1)
			writeFrame(c, frameHeaders, flagEndHeaders|flagEndStream, stream, []byte{statusOK})
		}
	}
}

func readFrame(c net.Conn) (kind, flags byte, stream uint32, err error) {
	var head [9]byte
	if _, err = io.ReadFull(c, head[:]); err != nil {
		return
	}
	length := int64(head[0])<<16 | int64(head[1])<<8 | int64(head[2])
	_, err = io.CopyN(io.Discard, c, length)
	return head[3], head[4], binary.BigEndian.Uint32(head[5:]), err
}

// writeFrame leaves errors to the next read.
func writeFrame(c net.Conn, kind, flags byte, stream uint32, payload []byte) {
	frame := []byte{0, 0, byte(len(payload)), kind, flags}
	frame = binary.BigEndian.AppendUint32(frame, stream)
	_, _ = c.Write(append(frame, payload...))
}
