package chaostest

import (
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/tripper-go/tripper"
)

// What breaks in an established TLS connection is the connection: another
// attempt gets a new one. A server that never spoke TLS would not speak it then.
func TestGarbageInTLS(t *testing.T) {
	for name, test := range map[string]struct {
		plan     Plan
		attempts uint64
	}{
		"established":  {Plan{Garbage, 1}, 2},
		"in handshake": {Plan{TLSPlain, 0}, 1},
	} {
		t.Run(name, func(t *testing.T) {
			server := httptest.NewUnstartedServer(&Recorder{})
			server.Config.ErrorLog = log.New(io.Discard, "", 0)
			server.StartTLS()
			defer server.Close()
			mix := Mix{Faults: []Fault{test.plan.Fault}, Share: 0.5, Turns: 2}
			for mix.Plan(0) != test.plan || mix.Plan(1) != (Plan{}) {
				mix.Seed++
			}
			proxy, err := NewProxy(server.Listener.Addr().String(), "", mix)
			require.NoError(t, err)
			defer proxy.Close()

			transport := &tripper.Transport{Base: server.Client().Transport, Policy: tripper.Policy{Service: "tls"}}
			transport.Policy.Retry.MinWait = time.Millisecond
			defer transport.CloseIdleConnections()
			resp, err := (&http.Client{Transport: transport}).Get("https://" + proxy.Addr())
			if err == nil {
				resp.Body.Close()
			}
			stats, _ := transport.Stats("tls")
			require.Equal(t, test.attempts, stats.Attempts, "%v", err)
			require.Equal(t, test.attempts == 2, err == nil, "%v", err)
			require.EqualValues(t, 1, proxy.Struck()[test.plan.Fault])
		})
	}
}
