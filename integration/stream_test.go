package integration

import (
	"context"
	"errors"
	"io"
	"iter"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/anthropics/anthropic-sdk-go"
	"github.com/stretchr/testify/require"
	"google.golang.org/genai"

	"github.com/tripper-go/tripper"
)

// A streamer is a client that reads a stream of events.
type streamer struct {
	client
	stream func(ctx context.Context, url string, hc *http.Client) iter.Seq2[string, error]
	events []string // as they come over the wire; all but pings reach the reader
	want   []string // what the reader gets of each
}

func streamers() []streamer {
	return []streamer{anthropicStreamer(), openaiStreamer(), genaiStreamer()}
}

func eachStreamer(t *testing.T, test func(t *testing.T, s streamer)) {
	t.Parallel()
	for _, s := range streamers() {
		t.Run(s.name, func(t *testing.T) {
			t.Parallel()
			test(t, s)
		})
	}
}

const (
	pingEvent    = "event: ping\ndata: {\"type\": \"ping\"}\n\n"
	commentEvent = ": waiting\n\n"
)

func claudeError(kind string) string {
	return `event: error` + "\n" + `data: {"type":"error","error":{"type":"` + kind + `","message":"` + plea + `"}}` + "\n\n"
}

func anthropicStreamer() streamer {
	s := streamer{client: anthropicClient()}
	for _, e := range []struct{ kind, data string }{
		{"message_start", `{"type":"message_start","message":{"id":"msg_1","type":"message","role":"assistant","content":[],"model":"claude-test","usage":{"input_tokens":9,"output_tokens":1}}}`},
		{"content_block_start", `{"type":"content_block_start","index":0,"content_block":{"type":"text","text":""}}`},
		{"ping", `{"type": "ping"}`},
		{"content_block_delta", `{"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":"hel"}}`},
		{"content_block_delta", `{"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":"lo"}}`},
		{"content_block_stop", `{"type":"content_block_stop","index":0}`},
		{"message_delta", `{"type":"message_delta","delta":{"stop_reason":"end_turn"},"usage":{"output_tokens":2}}`},
		{"message_stop", `{"type":"message_stop"}`},
	} {
		s.events = append(s.events, "event: "+e.kind+"\ndata: "+e.data+"\n\n")
		if e.kind != "ping" {
			s.want = append(s.want, e.data)
		}
	}
	s.stream = func(ctx context.Context, url string, hc *http.Client) iter.Seq2[string, error] {
		return func(yield func(string, error) bool) {
			c := newAnthropic(url, hc)
			events := c.Messages.NewStreaming(ctx, claudeRequest)
			yieldEvents(events, yield)
		}
	}
	return s
}

// yieldEvents passes on what the stream of a Stainless SDK gives.
func yieldEvents[E interface{ RawJSON() string }](events interface {
	Next() bool
	Current() E
	Err() error
	Close() error
}, yield func(string, error) bool) {
	defer events.Close()
	for events.Next() {
		if !yield(events.Current().RawJSON(), nil) {
			return
		}
	}
	if events.Err() != nil {
		yield("", events.Err())
	}
}

func openaiStreamer() streamer {
	s := streamer{client: openaiClient()}
	for _, delta := range []string{`{"role":"assistant","content":""}`, `{"content":"hel"}`, `{"content":"lo"}`} {
		data := `{"id":"chatcmpl_1","object":"chat.completion.chunk","created":1,"model":"gpt-test","choices":[{"index":0,"delta":` + delta + `}]}`
		s.events, s.want = append(s.events, "data: "+data+"\n\n"), append(s.want, data)
	}
	s.events = append(s.events, "data: [DONE]\n\n")
	s.stream = func(ctx context.Context, url string, hc *http.Client) iter.Seq2[string, error] {
		return func(yield func(string, error) bool) {
			c := newOpenAI(url, hc)
			events := c.Chat.Completions.NewStreaming(ctx, gptRequest)
			yieldEvents(events, yield)
		}
	}
	return s
}

func genaiStreamer() streamer {
	s := streamer{client: genaiClient()}
	for _, text := range []string{"hel", "lo", "!"} {
		s.events = append(s.events, `data: {"candidates":[{"content":{"role":"model","parts":[{"text":"`+text+`"}]}}]}`+"\r\n\r\n")
		s.want = append(s.want, text)
	}
	s.stream = func(ctx context.Context, url string, hc *http.Client) iter.Seq2[string, error] {
		return func(yield func(string, error) bool) {
			c, err := newGenAI(ctx, url, hc)
			if err != nil {
				yield("", err)
				return
			}
			for m, err := range c.Models.GenerateContentStream(ctx, "gemini-test", genai.Text("Say hello."), nil) {
				if err != nil {
					yield("", err)
					return
				}
				if !yield(m.Text(), nil) {
					return
				}
			}
		}
	}
	return s
}

// sse streams events and then ends as end does.
func sse(end step, events ...string) step {
	return func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "text/event-stream; charset=utf-8")
		w.WriteHeader(http.StatusOK)
		w.(http.Flusher).Flush()
		for _, e := range events {
			io.WriteString(w, e)
			w.(http.Flusher).Flush()
		}
		end(w, r)
	}
}

func ends(http.ResponseWriter, *http.Request) {}

// inStep sends each event only when the reader has had the one before.
type inStep struct {
	streamer
	had chan struct{}
}

func (s inStep) step(w http.ResponseWriter, r *http.Request) {
	sse(ends)(w, r)
	read := len(s.want)
	for _, e := range s.events {
		io.WriteString(w, e)
		w.(http.Flusher).Flush()
		if read == 0 || strings.HasPrefix(e, "event: ping") {
			continue
		}
		read--
		select {
		case <-s.had:
		case <-r.Context().Done():
			return
		}
	}
}

// read reads a stream to its end.
func (st *stack) read(t *testing.T, s streamer) (events []string, err error) {
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	for e, err := range s.stream(ctx, st.service.URL, st.http) {
		if err != nil {
			return events, err
		}
		events = append(events, e)
	}
	return events, nil
}

// A tap keeps the bytes of the response bodies that pass it.
type tap struct {
	http.RoundTripper
	mu    sync.Mutex
	bytes strings.Builder
}

func (p *tap) RoundTrip(r *http.Request) (*http.Response, error) {
	resp, err := p.RoundTripper.RoundTrip(r)
	if err == nil {
		resp.Body = &tapped{resp.Body, p}
	}
	return resp, err
}

type tapped struct {
	io.ReadCloser
	tap *tap
}

func (b *tapped) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	b.tap.mu.Lock()
	defer b.tap.mu.Unlock()
	b.tap.bytes.Write(p[:n])
	return n, err
}

func holding(tr *tripper.Transport) { tr.Policy.HoldStream = true }
func passing(*tripper.Transport)    {}

func TestStreamArrivesAsItIsProduced(t *testing.T) {
	for name, mode := range map[string]func(*tripper.Transport){"as it comes": passing, "held until it begins": holding} {
		t.Run(name, func(t *testing.T) {
			eachStreamer(t, func(t *testing.T, s streamer) {
				steps := inStep{s, make(chan struct{})}
				st := newStack(s.client, play(t, s.fault(http.StatusServiceUnavailable), steps.step), mode)
				seen := &tap{RoundTripper: st.http.Transport}
				st.http.Transport = seen

				ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
				defer cancel()
				var events []string
				for e, err := range s.stream(ctx, st.service.URL, st.http) {
					require.NoError(t, err)
					events = append(events, e)
					select {
					case steps.had <- struct{}{}:
					case <-ctx.Done():
						require.Fail(t, "the service is not waiting for its reader")
					}
				}
				require.Equal(t, s.want, events)
				require.Equal(t, strings.Join(s.events, ""), seen.bytes.String())
				st.requireWire(t, 2)
				stats, _ := st.Stats("api")
				require.EqualValues(t, 0, stats.StreamFailures)
			})
		})
	}
}

func TestStreamThatIsCancelled(t *testing.T) {
	eachStreamer(t, func(t *testing.T, s streamer) {
		h := newHang()
		st := newStack(s.client, play(t, sse(h.step, s.events[0])), holding)
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		var last error
		for _, err := range s.stream(ctx, st.service.URL, st.http) {
			last = err
			cancel()
		}
		require.ErrorIs(t, last, context.Canceled)
		receive(t, h.left, "the client to leave")
		st.requireWire(t, 1)
		stats, _ := st.Stats("api")
		require.EqualValues(t, 0, stats.Failures, "the service is not to blame: %+v", stats)
		require.EqualValues(t, 0, stats.StreamFailures, "%+v", stats)
	})
}

func TestStreamThatItsReaderLeaves(t *testing.T) {
	eachStreamer(t, func(t *testing.T, s streamer) {
		h := newHang()
		st := newStack(s.client, play(t, sse(h.step, s.events[0])), holding)
		for _, err := range s.stream(t.Context(), st.service.URL, st.http) {
			require.NoError(t, err)
			break
		}
		receive(t, h.left, "the client to leave")
		st.requireWire(t, 1)
		stats, _ := st.Stats("api")
		require.EqualValues(t, 0, stats.Failures, "%+v", stats)
	})
}

// With HoldStream a stream that comes to nothing is an attempt that failed.

func TestHeldStreamThatDiesBeforeItsFirstEventIsRetried(t *testing.T) {
	deaths := map[string]step{
		"broken off":           sse(reset),
		"ended":                sse(ends),
		"broken off in a line": sse(reset, "event: mess"),
		"broken off in a data": sse(reset, "data: {\"type\""),
	}
	for name, death := range deaths {
		t.Run(name, func(t *testing.T) {
			eachStreamer(t, func(t *testing.T, s streamer) {
				st := newStack(s.client, play(t, death, sse(ends, s.events...)), holding)
				got, err := st.read(t, s)
				require.NoError(t, err)
				require.Equal(t, s.want, got)
				requireSame(t, st.requireWire(t, 2))
				stats, _ := st.Stats("api")
				require.EqualValues(t, 1, stats.Recovered)
				require.EqualValues(t, 1, stats.Failures)
			})
		})
	}
}

func TestHeldStreamWithPingsThatDiesIsRetried(t *testing.T) {
	t.Parallel()
	s := anthropicStreamer()
	for name, death := range map[string]step{
		"after a ping":               sse(reset, pingEvent),
		"after a comment":            sse(reset, commentEvent),
		"after both":                 sse(ends, commentEvent, pingEvent, commentEvent),
		"after a ping in two pieces": sse(ends, pingEvent[:15], pingEvent[15:]),
		"after a ping with CRLF":     sse(ends, strings.ReplaceAll(pingEvent, "\n", "\r\n")),
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			st := newStack(s.client, play(t, death, sse(ends, s.events...)), holding)
			got, err := st.read(t, s)
			require.NoError(t, err)
			require.Equal(t, s.want, got)
			st.requireWire(t, 2)
		})
	}
}

func TestHeldStreamThatBeginsWithAnErrorIsRetried(t *testing.T) {
	t.Parallel()
	s := anthropicStreamer()
	for _, kind := range []string{"overloaded_error", "rate_limit_error", "api_error", "timeout_error"} {
		failing := claudeError(kind)
		for name, first := range map[string]step{
			kind:                    sse(ends, failing),
			kind + " after a ping":  sse(ends, commentEvent, pingEvent, failing),
			kind + " in two pieces": sse(ends, failing[:20], failing[20:]),
			kind + " then silence":  sse(newHang().step, failing),
		} {
			t.Run(name, func(t *testing.T) {
				t.Parallel()
				st := newStack(s.client, play(t, first, sse(ends, s.events...)), holding)
				got, err := st.read(t, s)
				require.NoError(t, err)
				require.Equal(t, s.want, got)
				st.requireWire(t, 2)
			})
		}
	}
}

func TestHeldStreamWithAnErrorThatNoRetryCures(t *testing.T) {
	t.Parallel()
	s := anthropicStreamer()
	st := newStack(s.client, play(t, sse(ends, claudeError("invalid_request_error"))), holding)
	got, err := st.read(t, s)
	require.Empty(t, got)
	requireClaudeError(t, err, "invalid_request_error")
	st.requireWire(t, 1)
}

func requireClaudeError(t *testing.T, err error, kind string) {
	t.Helper()
	e, ok := errors.AsType[*anthropic.Error](err)
	require.True(t, ok, "%T: %v", err, err)
	require.EqualValues(t, kind, e.Type())
	require.Contains(t, e.RawJSON(), plea)
}

func TestHeldStreamIsNotSentAgainOnceItHasBegun(t *testing.T) {
	eachStreamer(t, func(t *testing.T, s streamer) {
		st := newStack(s.client, play(t, sse(reset, s.events[0])), holding)
		got, err := st.read(t, s)
		require.Error(t, err)
		require.Equal(t, s.want[:1], got)
		st.requireWire(t, 1)
		stats, _ := st.Stats("api")
		require.EqualValues(t, 1, stats.StreamFailures)
		require.EqualValues(t, 1, stats.Failures)
	})
}

func TestErrorLaterInAHeldStreamIsAStreamFailure(t *testing.T) {
	t.Parallel()
	s := anthropicStreamer()
	st := newStack(s.client, play(t, sse(ends, s.events[0], claudeError("overloaded_error"))), holding)
	got, err := st.read(t, s)
	requireClaudeError(t, err, "overloaded_error")
	require.Equal(t, s.want[:1], got)
	st.requireWire(t, 1)
	stats, _ := st.Stats("api")
	require.EqualValues(t, 1, stats.StreamFailures)
	require.EqualValues(t, 1, stats.Failures)
}

func TestHeldStreamPassesWhatCameBeforeItsFirstEvent(t *testing.T) {
	t.Parallel()
	s := anthropicStreamer()
	events := append([]string{commentEvent, pingEvent, pingEvent}, s.events...)
	st := newStack(s.client, play(t, sse(ends, events...)), holding)
	seen := &tap{RoundTripper: st.http.Transport}
	st.http.Transport = seen
	got, err := st.read(t, s)
	require.NoError(t, err)
	require.Equal(t, s.want, got)
	require.Equal(t, strings.Join(events, ""), seen.bytes.String())
	st.requireWire(t, 1)
}

func TestHeldStreamThatNeverBegins(t *testing.T) {
	t.Run("the last error event is the answer", func(t *testing.T) {
		t.Parallel()
		s := anthropicStreamer()
		st := newStack(s.client, play(t, sse(ends, pingEvent, claudeError("overloaded_error"))), holding)
		got, err := st.read(t, s)
		require.Empty(t, got)
		requireClaudeError(t, err, "overloaded_error")
		st.requireWire(t, 3)
		stats, _ := st.Stats("api")
		require.EqualValues(t, 3, stats.Failures)
		require.EqualValues(t, 1, stats.Exhausted)
	})
	t.Run("broken off", func(t *testing.T) {
		eachStreamer(t, func(t *testing.T, s streamer) {
			st := newStack(s.client, play(t, sse(reset)), holding)
			got, err := st.read(t, s)
			require.Error(t, err)
			require.Empty(t, got)
			st.requireWire(t, 3)
		})
	})
	t.Run("the breaker opens", func(t *testing.T) {
		t.Parallel()
		s := anthropicStreamer()
		st := newStack(s.client, play(t, sse(ends, claudeError("overloaded_error"))), holding, opensAfterOneCall)
		_, err := st.read(t, s)
		require.Error(t, err)
		_, err = st.read(t, s)
		s.requireSynthesized(t, err, http.StatusServiceUnavailable, "circuit breaker open for api")
		st.requireWire(t, 3)
	})
}

func TestHeldStreamIsCancelledBeforeItBegins(t *testing.T) {
	eachStreamer(t, func(t *testing.T, s streamer) {
		h := newHang()
		st := newStack(s.client, play(t, sse(h.step)), holding)
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		go func() {
			<-h.arrived
			cancel()
		}()
		var last error
		for _, err := range s.stream(ctx, st.service.URL, st.http) {
			last = err
		}
		require.ErrorIs(t, last, context.Canceled)
		receive(t, h.left, "the client to leave")
		st.requireWire(t, 1)
		stats, _ := st.Stats("api")
		require.EqualValues(t, 0, stats.Failures, "%+v", stats)
	})
}

func TestStreamIsNotHeldUnlessAskedFor(t *testing.T) {
	require.False(t, tripper.DefaultPolicy().HoldStream)
	require.True(t, tripper.Claude().HoldStream)
	eachStreamer(t, func(t *testing.T, s streamer) {
		st := newStack(s.client, play(t, sse(reset), sse(ends, s.events...)))
		_, err := st.read(t, s)
		require.Error(t, err)
		st.requireWire(t, 1)
	})
}
