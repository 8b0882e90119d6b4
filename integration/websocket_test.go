package integration

import (
	"bytes"
	"net/http"
	"testing"
	"time"

	"github.com/coder/websocket"
	"github.com/stretchr/testify/require"

	"github.com/tripper-go/tripper"
)

// A WebSocket through all that can be between its client and the connection:
// the body of the 101 is the connection and must stay one.
func TestWebSocketStaysOpen(t *testing.T) {
	t.Parallel()
	c := webSocketClient()
	c.below, c.layer, c.above = withToken, withSpans, withToken
	st := newStack(c, play(t, c.fault(http.StatusServiceUnavailable), echoWebSocket), func(tr *tripper.Transport) {
		// Limits of a response do not end a conversation: every read is longer
		// than this Idle.
		tr.Policy.Timeout, tr.Policy.Idle, tr.Policy.HoldStream = time.Minute, time.Nanosecond, true
	})
	conn, resp, err := websocket.Dial(t.Context(), st.service.URL, &websocket.DialOptions{HTTPClient: st.http})
	require.NoError(t, err)
	defer conn.CloseNow()
	require.Equal(t, http.StatusSwitchingProtocols, resp.StatusCode)
	conn.SetReadLimit(1 << 21)

	echo := make(chan []byte, 1)
	go func() {
		defer close(echo)
		for {
			_, b, err := conn.Read(t.Context())
			if err != nil {
				return
			}
			echo <- b
		}
	}()
	for _, size := range []int{1, 1 << 10, 1 << 20} {
		sent := bytes.Repeat([]byte{'x'}, size)
		require.NoError(t, conn.Write(t.Context(), websocket.MessageBinary, sent))
		select {
		case got := <-echo:
			require.True(t, bytes.Equal(sent, got), "%d bytes came back as %d others", size, len(got))
		case <-patience():
			require.Fail(t, "no echo")
		}
	}
	require.NoError(t, conn.Close(websocket.StatusNormalClosure, ""))
	st.requireWire(t, 2)
}

// What is not a 101 is the service's answer, with its body.
func TestWebSocketRefused(t *testing.T) {
	t.Parallel()
	c := webSocketClient()
	st := newStack(c, play(t, c.fault(http.StatusForbidden)))
	_, err := st.call(t, c)
	c.requireAnswer(t, err, http.StatusForbidden)
	require.ErrorContains(t, err, "expected handshake response status code 101 but got 403")
	st.requireWire(t, 1)
}
