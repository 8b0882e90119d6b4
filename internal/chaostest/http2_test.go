package chaostest

import (
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/tripper-go/tripper"
)

// A server that refuses a stream, or says goodbye before it, has not processed
// it (RFC 9113, section 8.7), so that even a POST may be sent again. net/http
// does that itself unless there is a body without GetBody.
func TestRefusedHTTP2(t *testing.T) {
	for _, goAway := range []bool{false, true} {
		name := "REFUSED_STREAM"
		if goAway {
			name = "GOAWAY"
		}
		t.Run(name, func(t *testing.T) {
			server := &Refuser{GoAway: goAway, Refuse: 1}
			url := serve(t, server)
			wire := &http.Transport{Protocols: new(http.Protocols)}
			wire.Protocols.SetUnencryptedHTTP2(true)
			transport := &tripper.Transport{Base: wire, Policy: tripper.Policy{
				Service: "h2",
				Retry:   tripper.RetryPolicy{MinWait: time.Millisecond, Replay: tripper.ReplaySafe},
			}}
			var open atomic.Int64
			open.Store(1)
			body := &source{Reader: strings.NewReader("hello"), open: &open}
			req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, url, body)
			require.NoError(t, err)
			resp, err := (&http.Client{Transport: transport}).Do(req)
			require.NoError(t, err)
			_, err = io.Copy(io.Discard, resp.Body)
			require.NoError(t, err)
			resp.Body.Close()
			transport.CloseIdleConnections()

			require.Equal(t, http.StatusOK, resp.StatusCode)
			require.EqualValues(t, 1, server.Refused.Load())
			require.EqualValues(t, 1, server.Served.Load())
			require.Eventually(t, func() bool { return body.closes.Load() == 1 }, patient, time.Millisecond)
			stats, _ := transport.Stats("h2")
			require.EqualValues(t, 2, stats.Attempts)
			require.EqualValues(t, 1, stats.Recovered)
		})
	}
}

// serve lets r answer on the loopback.
func serve(t *testing.T, r *Refuser) (url string) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	var all sync.WaitGroup
	var mu sync.Mutex
	var open []net.Conn
	all.Go(func() {
		for {
			c, err := listener.Accept()
			if err != nil {
				return
			}
			mu.Lock()
			open = append(open, c)
			mu.Unlock()
			all.Go(func() { r.Serve(c) })
		}
	})
	t.Cleanup(func() {
		listener.Close()
		mu.Lock()
		for _, c := range open {
			c.Close()
		}
		mu.Unlock()
		all.Wait()
	})
	return "http://" + listener.Addr().String()
}
