package fault

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func TestKnownErrors(t *testing.T) {
	k := known()
	assert.EqualError(t, k.cancelled, errCancelled)
	assert.EqualError(t, k.waiting, errCancelledWaiting)
	assert.EqualError(t, k.tooLong, errBodyTooLong)
	assert.EqualError(t, k.tooManyFields, errTooManyFields)
	for range 20 { // whichever way it goes
		assert.Same(t, k.cancelled, cancelledError())
		assert.Same(t, k.waiting, waitingError())
		assert.Same(t, k.tooLong, tooLongError())
		assert.Same(t, k.tooManyFields, tooManyFieldsError())
	}
}

// They leave nothing behind, and need no real time.
func TestKnownErrorsInABubble(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		start := time.Now()
		for _, err := range []error{cancelledError(), waitingError(), tooLongError(), tooManyFieldsError()} {
			assert.Error(t, err)
		}
		assert.Zero(t, time.Since(start))
	})
}

// The ways in which a caller cancels a request.
func TestCancelled(t *testing.T) {
	for name, start := range map[string]func(*http.Transport, *http.Request) (*http.Request, func()){
		"context": func(_ *http.Transport, req *http.Request) (*http.Request, func()) {
			ctx, cancel := context.WithCancel(req.Context())
			return req.WithContext(ctx), cancel
		},
		"Cancel": func(_ *http.Transport, req *http.Request) (*http.Request, func()) {
			cancel := make(chan struct{})
			req.Cancel = cancel //lint:ignore SA1019 this is what it is about
			return req, func() { close(cancel) }
		},
		"CancelRequest": func(tr *http.Transport, req *http.Request) (*http.Request, func()) {
			return req, func() { tr.CancelRequest(req) } //lint:ignore SA1019 this is what it is about
		},
	} {
		t.Run(name+" in flight", func(t *testing.T) {
			tr, cancel := newTransport(t, ""), make(chan func(), 1)
			addr := listen(t, func(c net.Conn) {
				_, _ = c.Read(make([]byte, 1))
				(<-cancel)()
				_, _ = io.Copy(io.Discard, c)
			})
			req, f := start(tr, newRequest(t, http.MethodGet, "http://"+addr, nil))
			cancel <- f
			requireCancelled(t, req, errorOf(t, tr, req))
		})
		t.Run(name+" before", func(t *testing.T) {
			tr, over := newTransport(t, ""), make(chan struct{})
			defer close(over)
			req, cancel := start(tr, newRequest(t, http.MethodGet, "https://api.example.com/", nil))
			var once sync.Once
			tr.DialContext = func(context.Context, string, string) (net.Conn, error) {
				once.Do(cancel)
				<-over
				return nil, io.EOF
			}
			requireCancelled(t, req, errorOf(t, tr, req))
		})
	}
}

func requireCancelled(t *testing.T, req *http.Request, err error) {
	for _, err := range asReturned(err) {
		require.Equal(t, Fault{Kind: Cancelled}, Of(req, err), "%T %v", err, err)
		require.Equal(t, Fault{Kind: Cancelled}, Of(nil, err), "%T %v", err, err)
	}
}

func TestCancelledOverHTTP2(t *testing.T) {
	srv, tr := newServer(t, true, true)
	req := newRequest(t, http.MethodPost, srv.URL, nil)
	cancel, over := make(chan struct{}), make(chan struct{})
	defer close(over)
	req.Cancel = cancel //lint:ignore SA1019 this is what it is about
	req.ContentLength, req.Body = -1, &endless{started: cancel, over: over}
	requireCancelled(t, req, errorOf(t, tr, req))
}

// An endless body closes started at the first Read and gives nothing.
type endless struct {
	once    sync.Once
	started chan<- struct{}
	over    <-chan struct{}
}

func (e *endless) Read([]byte) (int, error) {
	e.once.Do(func() { close(e.started) })
	<-e.over
	return 0, io.EOF
}

func (*endless) Close() error { return nil }

// x/net/http2 has an error of its own with the same text.
func TestCancelledByTextAlone(t *testing.T) {
	err := errors.New(errCancelled)
	req := newRequest(t, http.MethodGet, "https://api.example.com/", nil)
	assert.Equal(t, Service, Of(req, err).Kind, "a proxy may have said so")
	assert.Equal(t, Service, Of(nil, err).Kind)
	cancel := make(chan struct{})
	req.Cancel = cancel //lint:ignore SA1019 this is what it is about
	assert.Equal(t, Service, Of(req, err).Kind)
	close(cancel)
	assert.Equal(t, Cancelled, Of(req, err).Kind)
}
