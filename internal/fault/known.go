package fault

import (
	"bytes"
	"context"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"time"
)

const (
	errCancelled        = "net/http: request canceled"
	errCancelledWaiting = "net/http: request canceled while waiting for connection"
	errBodyTooLong      = "http2: request body larger than specified content length"
	errTooManyFields    = "request header list larger than peer's advertised limit"
)

// knownErrors are errors of net/http that have no type and no name outside, but
// are always the same values. A proxy can make an error with such a text, but
// never one of these.
type knownErrors struct {
	cancelled, waiting error // by Request.Cancel or Transport.CancelRequest
	tooLong            error // of the body of an HTTP/2 request
	tooManyFields      error // of its header or trailer
}

// known has net/http make these errors, over a connection that leads nowhere. It
// does so once, when an error with one of the texts has come.
var known = sync.OnceValue(func() knownErrors {
	return knownErrors{cancelledError(), waitingError(), tooLongError(), tooManyFieldsError()}
})

func waitingError() error {
	cancel, over := make(chan struct{}), make(chan struct{})
	defer close(over)
	return provoke(errCancelledWaiting, false, request(nil, cancel), func() (net.Conn, error) {
		close(cancel)
		<-over
		return nil, net.ErrClosed
	})
}

func cancelledError() error {
	conn := newNowhere()
	defer conn.Close()
	return provoke(errCancelled, false, request(nil, conn.written), conn.dial)
}

func tooLongError() error {
	conn := newNowhere()
	defer conn.Close()
	req := request(strings.NewReader("ab"), nil)
	req.ContentLength = 1
	return provoke(errBodyTooLong, true, req, conn.dial)
}

// SETTINGS frames of HTTP/2 (RFC 9113, section 6.5): one with a single setting,
// MAX_HEADER_LIST_SIZE, and an acknowledgement.
const (
	oneByteOfFields = "\x00\x00\x06\x04\x00\x00\x00\x00\x00" + "\x00\x06\x00\x00\x00\x01"
	settingsAck     = "\x00\x00\x00\x04\x01\x00\x00\x00\x00"
)

// If the limit comes too late for the header, the trailer meets it.
func tooManyFieldsError() error {
	conn := newNowhere()
	defer conn.Close()
	conn.says <- []byte(oneByteOfFields)
	req := request(pause(conn.obeyed), nil)
	req.Trailer = http.Header{"A": {"a"}}
	return provoke(errTooManyFields, true, req, conn.dial)
}

func request(body io.Reader, cancel <-chan struct{}) *http.Request {
	req, _ := http.NewRequest(http.MethodPost, "http://nowhere.invalid/", body) // the URL is valid
	req.Cancel = cancel                                                         //lint:ignore SA1019 it is one of the things that these errors are about
	return req
}

// provoke sends req over what dial returns and gives back the error without a
// type that it ends with, if that has the text.
func provoke(text string, http2 bool, req *http.Request, dial func() (net.Conn, error)) error {
	tr := &http.Transport{
		DialContext: func(context.Context, string, string) (net.Conn, error) { return dial() },
		Protocols:   new(http.Protocols),
	}
	tr.Protocols.SetHTTP1(!http2)
	tr.Protocols.SetUnencryptedHTTP2(http2)
	defer tr.CloseIdleConnections()
	ctx, stop := context.WithTimeout(req.Context(), 5*time.Second) // should another net/http behave in another way
	defer stop()
	resp, err := tr.RoundTrip(req.WithContext(ctx))
	if err == nil {
		resp.Body.Close()
		return nil
	}
	for _, said := range textsOf(err) {
		if said.leaf.Error() == text {
			return said.leaf
		}
	}
	return nil
}

// A nowhere is a connection that takes everything and says at most one thing.
type nowhere struct {
	says    chan []byte
	written chan struct{} // closed at the first Write
	obeyed  chan struct{} // closed when the client has acknowledged SETTINGS
	ended   chan struct{}

	onceWritten, onceObeyed, onceEnded sync.Once
}

func newNowhere() *nowhere {
	return &nowhere{
		says: make(chan []byte, 1), written: make(chan struct{}), obeyed: make(chan struct{}), ended: make(chan struct{}),
	}
}

func (n *nowhere) dial() (net.Conn, error) { return n, nil }

func (n *nowhere) Read(p []byte) (int, error) {
	select {
	case said := <-n.says:
		return copy(p, said), nil // what is said is shorter than any buffer
	case <-n.ended:
		return 0, net.ErrClosed
	}
}

func (n *nowhere) Write(p []byte) (int, error) {
	n.onceWritten.Do(func() { close(n.written) })
	if bytes.Contains(p, []byte(settingsAck)) {
		n.onceObeyed.Do(func() { close(n.obeyed) })
	}
	return len(p), nil
}

func (n *nowhere) Close() error {
	n.onceEnded.Do(func() { close(n.ended) })
	return nil
}

func (*nowhere) LocalAddr() net.Addr              { return &net.TCPAddr{} }
func (*nowhere) RemoteAddr() net.Addr             { return &net.TCPAddr{} }
func (*nowhere) SetDeadline(time.Time) error      { return nil }
func (*nowhere) SetReadDeadline(time.Time) error  { return nil }
func (*nowhere) SetWriteDeadline(time.Time) error { return nil }

// A pause is an empty request body that ends when the channel is closed.
type pause <-chan struct{}

func (p pause) Read([]byte) (int, error) {
	<-p
	return 0, io.EOF
}
