package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/tripper-go/tripper"
)

var binary string // of this package, built by TestMain

func TestMain(m *testing.M) {
	dir, err := os.MkdirTemp("", "claudeproxy")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	code := 1
	if err := build(dir); err != nil {
		fmt.Fprintln(os.Stderr, err)
	} else {
		code = m.Run()
	}
	os.RemoveAll(dir)
	os.Exit(code)
}

// build builds the binary, with the race detector if the tests have it.
func build(dir string) error {
	binary = filepath.Join(dir, "claudeproxy")
	args := []string{"build", "-o", binary}
	if info, ok := debug.ReadBuildInfo(); ok && slices.Contains(info.Settings, debug.BuildSetting{Key: "-race", Value: "true"}) {
		args = append(args, "-race")
	}
	out, err := exec.Command("go", append(args, ".")...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("go build: %w\n%s", err, out)
	}
	return nil
}

// patience is how long a process may take for anything. Nothing waits for it
// to pass unless something is broken.
const patience = 30 * time.Second

// command is the binary with these arguments. It is killed when it takes too
// long, which ends the reading of its output and so the test.
func command(t *testing.T, args ...string) *exec.Cmd {
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	t.Cleanup(cancel)
	cmd := exec.CommandContext(ctx, binary, args...)
	cmd.Env = append(os.Environ(), "GORACE=atexit_sleep_ms=0") // a second for each process otherwise
	return cmd
}

// finished runs the binary to its end.
func finished(t *testing.T, args ...string) (code int, stdout, stderr string) {
	cmd := command(t, args...)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	err := cmd.Run()
	if exit, ok := errors.AsType[*exec.ExitError](err); !ok {
		require.NoError(t, err)
	} else {
		code = exit.ExitCode()
	}
	return code, out.String(), errs.String()
}

// A proxy is a process that serves an upstream.
type proxy struct {
	t    *testing.T
	cmd  *exec.Cmd
	url  string
	logs *log
}

// startProxy starts one and waits until it listens.
func startProxy(t *testing.T, upstream string, args ...string) *proxy {
	cmd := command(t, append([]string{"-listen", "127.0.0.1:0", "-upstream", upstream}, args...)...)
	p := &proxy{t: t, cmd: cmd, logs: &log{news: make(chan struct{})}}
	p.start()
	return p
}

// startTrustingProxy starts one for an upstream with a certificate of its own.
func startTrustingProxy(t *testing.T, upstream *httptest.Server) *proxy {
	file := filepath.Join(t.TempDir(), "cert.pem")
	cert := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: upstream.Certificate().Raw})
	require.NoError(t, os.WriteFile(file, cert, 0o600))
	p := &proxy{t: t, logs: &log{news: make(chan struct{})}}
	p.cmd = command(t, "-listen", "127.0.0.1:0", "-upstream", upstream.URL)
	p.cmd.Env = append(p.cmd.Env, "SSL_CERT_FILE="+file)
	p.start()
	return p
}

func (p *proxy) start() {
	t := p.t
	p.cmd.Stderr = p.logs
	stdout, err := p.cmd.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, p.cmd.Start())
	t.Cleanup(func() {
		if p.cmd.ProcessState == nil {
			_ = p.cmd.Process.Kill()
			_ = p.cmd.Wait()
		}
		assert.NotContains(t, p.logs.String(), "DATA RACE")
		assert.NotContains(t, p.logs.String(), "panic")
		if t.Failed() {
			t.Logf("stderr of the proxy:\n%s", p.logs)
		}
	})
	line, err := bufio.NewReader(stdout).ReadString('\n')
	require.NoError(t, err, p.logs)
	url, ok := strings.CutPrefix(strings.TrimSpace(line), "listening on ")
	require.True(t, ok, line)
	require.Regexp(t, `^http://127\.0\.0\.1:[1-9][0-9]*$`, url)
	p.url = url
}

// stop sends the signal and returns the exit code.
func (p *proxy) stop(signal os.Signal) int {
	require.NoError(p.t, p.cmd.Process.Signal(signal))
	return p.wait()
}

func (p *proxy) wait() int {
	err := p.cmd.Wait()
	if _, ok := errors.AsType[*exec.ExitError](err); !ok {
		require.NoError(p.t, err)
	}
	return p.cmd.ProcessState.ExitCode()
}

// do sends a request. No connection is shared: each test's end closes its own.
func (p *proxy) do(ctx context.Context, method, path, body string) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, method, p.url+path, strings.NewReader(body))
	require.NoError(p.t, err)
	req.Header.Set("X-Api-Key", "sk-test")
	req.Header.Set("Content-Type", "application/json")
	transport := &http.Transport{}
	p.t.Cleanup(transport.CloseIdleConnections)
	return (&http.Client{Transport: transport, Timeout: patience}).Do(req)
}

func (p *proxy) send(method, path, body string) (*http.Response, string) {
	resp, err := p.do(p.t.Context(), method, path, body)
	require.NoError(p.t, err)
	defer resp.Body.Close()
	answer, err := io.ReadAll(resp.Body)
	require.NoError(p.t, err)
	return resp, string(answer)
}

func (p *proxy) stats() tripper.Stats {
	resp, body := p.send("GET", "/debug/tripper", "")
	require.Equal(p.t, 200, resp.StatusCode)
	require.Equal(p.t, "application/json", resp.Header.Get("Content-Type"))
	var all []tripper.Stats
	require.NoError(p.t, json.Unmarshal([]byte(body), &all), body)
	require.Len(p.t, all, 1)
	require.Equal(p.t, "claude_api", all[0].Service)
	return all[0]
}

// A log is what a process writes to its stderr.
type log struct {
	mu   sync.Mutex
	text strings.Builder
	news chan struct{} // closed at the next write
}

func (l *log) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	close(l.news)
	l.news = make(chan struct{})
	return l.text.Write(p)
}

func (l *log) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}

// await waits until the log contains s.
func (l *log) await(t *testing.T, s string) {
	timeout := time.After(patience)
	for {
		l.mu.Lock()
		found, news := strings.Contains(l.text.String(), s), l.news
		l.mu.Unlock()
		if found {
			return
		}
		select {
		case <-news:
		case <-timeout:
			require.Fail(t, "not in the log: "+s)
		}
	}
}

// await waits for ch to be closed or to give something.
func await[T any](t *testing.T, ch <-chan T, what string) T {
	select {
	case v := <-ch:
		return v
	case <-time.After(patience):
		require.Fail(t, "waited in vain for "+what)
		panic("not reached")
	}
}

// serve serves an upstream.
func serve(t *testing.T, handler http.HandlerFunc) string {
	server := httptest.NewServer(handler)
	closeAtEnd(t, server)
	return server.URL
}

func serveHTTP2(t *testing.T, handler http.HandlerFunc) *httptest.Server {
	server := httptest.NewUnstartedServer(handler)
	server.EnableHTTP2 = true
	server.StartTLS()
	closeAtEnd(t, server)
	return server
}

// closeAtEnd also releases the handlers that still run, through the contexts of
// their requests.
func closeAtEnd(t *testing.T, server *httptest.Server) {
	t.Cleanup(func() {
		server.CloseClientConnections()
		server.Close()
	})
}

func sendEvent(w http.ResponseWriter, name string) {
	w.Header().Set("Content-Type", "text/event-stream")
	fmt.Fprintf(w, "event: %s\ndata: {\"type\":%q}\n\n", name, name)
	_ = http.NewResponseController(w).Flush()
}

func readEvent(t *testing.T, stream *bufio.Reader) string {
	var event strings.Builder
	for {
		line, err := stream.ReadString('\n')
		require.NoError(t, err, event.String())
		if line == "\n" {
			return event.String()
		}
		event.WriteString(line)
	}
}

func TestDemo(t *testing.T) {
	t.Parallel()
	start := time.Now()
	code, stdout, stderr := finished(t)
	require.Equal(t, 0, code, stderr)
	require.Less(t, time.Since(start), 30*time.Second)
	assert.Empty(t, stderr)

	for _, want := range []string{
		`\d+\.\ds  #01  message  ok \(1 attempt, \d+\.\ds\)`,
		`#03  message  529: attempt 2 of 3 in \d\.\ds`,
		`#03  message  ok \(2 attempts, \d\.\ds\)   \[directly: FAILED: 529 overloaded_error\]`,
		`#04  stream   500 Internal Server Error: attempt 3 of 3 in \d\.\ds`,
		`#04  stream   ok: 14 events, .* \(3 attempts, .*\)`,
		`#06  message  429 Too Many Requests: attempt 2 of 3 in 3\.0s`,
		`#07  message  connection reset: attempt 2 of 3 in \d\.\ds`,
		`#10  message  FAILED: 429 rate_limit_error, retry-after 120s \(1 attempt, .*\)`,
		`#11  stream   BROKEN after 6 events: connection closed \(1 attempt, .*\)`,
		`breaker claude_api: CLOSED -> OPEN: 5 failures`,
		`#\d\d  \S+ +REFUSED by the breaker: 503 overloaded_error \(0 attempts, .*\)`,
		`breaker claude_api: OPEN -> HALF_OPEN`,
		`breaker claude_api: HALF_OPEN -> CLOSED`,
		`#30  message  ok \(1 attempt, .*\)`,
		`SERVICE +REQUESTS +OK +FAILED +REJECTED .*\nclaude_api +30 `,
		`SERVICE +ATTEMPTS .*\nclaude_api +\d+ .* CLOSED `,
		`30 requests, of which a client saw fail: \d+ through the proxy, \d+ without it\.`,
	} {
		assert.Regexp(t, want, stdout)
	}
	changes := slices.Collect(transitions(stdout))
	require.NotEmpty(t, changes)
	assert.True(t, strings.HasPrefix(changes[0], "CLOSED"), changes)
	assert.True(t, strings.HasSuffix(changes[len(changes)-1], "CLOSED"), changes)
}

// transitions yields the breaker's state changes that a demo has printed.
func transitions(stdout string) func(yield func(string) bool) {
	return func(yield func(string) bool) {
		for line := range strings.Lines(stdout) {
			if _, change, ok := strings.Cut(line, "breaker claude_api: "); ok {
				change, _, _ = strings.Cut(strings.TrimSpace(change), ":")
				if !yield(change) {
					return
				}
			}
		}
	}
}

func TestDemoIsInterrupted(t *testing.T) {
	t.Parallel()
	cmd := command(t)
	pipe, err := cmd.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, cmd.Start())
	stdout := bufio.NewReader(pipe)
	for line := ""; !strings.Contains(line, "#01"); {
		line, err = stdout.ReadString('\n')
		require.NoError(t, err)
	}
	require.NoError(t, cmd.Process.Signal(os.Interrupt))
	rest, err := io.ReadAll(stdout)
	require.NoError(t, err)
	require.NoError(t, cmd.Wait())
	assert.Contains(t, string(rest), "Interrupted.")
	assert.Contains(t, string(rest), "Summary")
	assert.NotContains(t, string(rest), "#30")
}

func TestHelp(t *testing.T) {
	t.Parallel()
	code, stdout, stderr := finished(t, "-h")
	assert.Equal(t, 0, code)
	assert.Empty(t, stderr)
	for _, name := range []string{"-listen", "-upstream", "-drain", "-speed", "/debug/tripper"} {
		assert.Contains(t, stdout, name)
	}
}

func TestUsageErrors(t *testing.T) {
	t.Parallel()
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer taken.Close()

	for _, c := range []struct{ args, want string }{
		{"-nonsense", "-nonsense"},
		{"-drain soon -listen 127.0.0.1:0", "-drain"},
		{"-drain -1s -listen 127.0.0.1:0", "-drain is -1s"},
		{"-drain 1s", "it needs -listen or -upstream"},
		{"-speed 0", "-speed is 0"},
		{"-speed NaN", "-speed is NaN"},
		{"-speed 2 -listen 127.0.0.1:0", "does not go with"},
		{"serve", `unexpected argument "serve"`},
		{"-listen nonsense", "missing port"},
		{"-listen 127.0.0.1:99999", "invalid port"},
		{"-listen " + taken.Addr().String(), "address already in use"},
		{"-upstream api.anthropic.com", `scheme ""`},
		{"-upstream ftp://127.0.0.1", `scheme "ftp"`},
		{"-upstream http://", "no host"},
		{"-upstream http://:80", "no host"},
		{"-upstream http://127.0.0.1:99999", "port 99999"},
		{"-upstream http://127.0.0.1:x", "no URL"},
		{"-upstream http://user:secret@127.0.0.1", "user info"},
		{"-upstream http://user:secret@127.0.0.1:%zz", "no URL"},
		{"-upstream http://127.0.0.1/?key=secret", "query"},
		{"-upstream http://127.0.0.1/\nx", "no URL"},
	} {
		t.Run(c.args, func(t *testing.T) {
			code, stdout, stderr := finished(t, strings.Split(c.args, " ")...)
			assert.Equal(t, 2, code)
			assert.Empty(t, stdout)
			assert.Equal(t, 1, strings.Count(stderr, "\n"), stderr)
			assert.True(t, strings.HasPrefix(stderr, "claudeproxy: ") && strings.HasSuffix(stderr, "\n"), stderr)
			assert.Contains(t, stderr, c.want)
			assert.NotContains(t, stderr, "secret")
		})
	}
}

// A request reaches the upstream as the client sent it, and nothing about the
// client is added.
func TestRequestPassesUnchanged(t *testing.T) {
	t.Parallel()
	arrived := make(chan *http.Request, 1)
	upstream := serve(t, func(w http.ResponseWriter, r *http.Request) {
		arrived <- r
		w.Header().Set("Request-Id", "req_1")
		w.WriteHeader(http.StatusTeapot)
		fmt.Fprint(w, "short and stout")
	})
	p := startProxy(t, upstream+"/base")
	resp, body := p.send("POST", "/v1//messages?beta=true;x", "{}")
	got := await(t, arrived, "the request")
	assert.Equal(t, http.StatusTeapot, resp.StatusCode)
	assert.Equal(t, "req_1", resp.Header.Get("Request-Id"))
	assert.Equal(t, "short and stout", body)
	assert.Equal(t, "POST /base/v1//messages", got.Method+" "+got.URL.Path)
	assert.Equal(t, "beta=true;x", got.URL.RawQuery)
	assert.Equal(t, strings.TrimPrefix(upstream, "http://"), got.Host)
	assert.Equal(t, "sk-test", got.Header.Get("X-Api-Key"))
	assert.Empty(t, got.Header.Values("X-Forwarded-For"))
	p.logs.await(t, `msg=request method=POST path=/v1//messages status=418`)
	assert.NotContains(t, p.logs.String(), "beta")
}

// The upstream sends an event only when the client has the one before: a proxy
// that held one back would hold up both.
func TestStreamIsNotBuffered(t *testing.T) {
	t.Parallel()
	names := []string{"message_start", "ping", "content_block_delta", "message_stop"}
	for _, protocol := range []string{"HTTP/1.1", "HTTP/2.0"} { // the Claude API speaks both
		t.Run(protocol, func(t *testing.T) {
			t.Parallel()
			received := make(chan string)
			handler := func(w http.ResponseWriter, r *http.Request) {
				w.Header().Set("Protocol", r.Proto)
				for _, name := range names {
					sendEvent(w, name)
					select {
					case <-received:
					case <-r.Context().Done():
						return
					}
				}
			}
			var p *proxy
			if protocol == "HTTP/2.0" {
				p = startTrustingProxy(t, serveHTTP2(t, handler))
			} else {
				p = startProxy(t, serve(t, handler))
			}
			resp, err := p.do(t.Context(), "POST", "/v1/messages", `{"stream":true}`)
			require.NoError(t, err)
			defer resp.Body.Close()
			assert.Equal(t, protocol, resp.Header.Get("Protocol"))
			assert.Equal(t, "text/event-stream", resp.Header.Get("Content-Type"))
			stream := bufio.NewReader(resp.Body)
			for _, name := range names {
				assert.Equal(t, fmt.Sprintf("event: %s\ndata: {\"type\":%q}\n", name, name), readEvent(t, stream))
				received <- name
			}
			_, err = stream.ReadByte()
			assert.Equal(t, io.EOF, err)
		})
	}
}

func TestClientThatLeavesCancelsItsRequest(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name   string
		stream bool // the client leaves in the middle of one, not before the answer
	}{{"before the answer", false}, {"during a stream", true}} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			arrived, cancelled := make(chan struct{}), make(chan struct{})
			upstream := serve(t, func(w http.ResponseWriter, r *http.Request) {
				_, _ = io.Copy(io.Discard, r.Body) // as long as there is a rest, net/http does not look for the end
				if c.stream {
					sendEvent(w, "message_start")
				}
				close(arrived)
				<-r.Context().Done()
				close(cancelled)
			})
			p := startProxy(t, upstream)
			ctx, leave := context.WithCancel(t.Context())
			defer leave()
			left := make(chan error, 1)
			go func() {
				resp, err := p.do(ctx, "POST", "/v1/messages", `{"stream":true}`)
				if err == nil {
					_, err = io.Copy(io.Discard, resp.Body)
					resp.Body.Close()
				}
				left <- err
			}()
			await(t, arrived, "the request")
			leave()
			assert.ErrorIs(t, await(t, left, "the client"), context.Canceled)
			await(t, cancelled, "the upstream's request to be cancelled")
			p.logs.await(t, `msg="client left"`)
			st := p.stats()
			assert.Equal(t, uint64(1), st.Attempts, "never retried")
			assert.Zero(t, st.Failures, "not the service's fault")
			assert.Equal(t, tripper.Closed, st.State)
			if !c.stream {
				assert.Equal(t, uint64(1), st.Cancelled)
			}
		})
	}
}

func TestOverloadIsRecovered(t *testing.T) {
	t.Parallel()
	bodies := make(chan string, 3)
	var attempts atomic.Int32
	upstream := serve(t, func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		bodies <- string(body)
		if attempts.Add(1) == 1 {
			writeError(w, 529, "overloaded_error", "Overloaded")
			return
		}
		fmt.Fprint(w, `{"type":"message"}`)
	})
	p := startProxy(t, upstream)
	sent := `{"messages":"` + strings.Repeat("rain ", 50_000) + `"}` // longer than the default BodyLimit
	resp, body := p.send("POST", "/v1/messages?key=secret", sent)
	assert.Equal(t, 200, resp.StatusCode)
	assert.Equal(t, `{"type":"message"}`, body)
	require.Len(t, bodies, 2)
	assert.True(t, sent == <-bodies, "the body of the first attempt")
	assert.True(t, sent == <-bodies, "the body of the second attempt")

	st := p.stats()
	assert.Equal(t, [4]uint64{1, 1, 1, 1}, [4]uint64{st.Requests, st.OK, st.Retries, st.Recovered})
	p.logs.await(t, "level=WARN msg=retrying service=claude_api method=POST url="+upstream+"/v1/messages attempt=2 max=3")
	assert.NotContains(t, p.logs.String(), "secret")
}

func TestOpenBreakerAnswers(t *testing.T) {
	t.Parallel()
	var attempts atomic.Int32
	upstream := serve(t, func(w http.ResponseWriter, r *http.Request) {
		attempts.Add(1)
		w.Header().Set("X-Should-Retry", "false") // one attempt a request, so nothing waits
		writeError(w, 500, "api_error", "boom")
	})
	p := startProxy(t, upstream)
	for range 5 {
		resp, body := p.send("POST", "/v1/messages", "{}")
		assert.Equal(t, 500, resp.StatusCode)
		assert.Contains(t, body, "boom", "the last answer is the upstream's")
	}
	resp, body := p.send("POST", "/v1/messages", "{}")
	assert.Equal(t, int32(5), attempts.Load(), "nothing is sent")
	assert.Equal(t, 503, resp.StatusCode)
	wait, err := strconv.Atoi(resp.Header.Get("Retry-After"))
	require.NoError(t, err)
	assert.True(t, 1 <= wait && wait <= 60, wait)
	assertAPIError(t, resp, body, "overloaded_error", "circuit breaker open for claude_api")

	st := p.stats()
	assert.Equal(t, tripper.Open, st.State)
	assert.Equal(t, uint64(1), st.Rejected)
	p.logs.await(t, `level=ERROR msg="circuit breaker opened" service=claude_api`)
}

func assertAPIError(t *testing.T, resp *http.Response, body, kind, message string) {
	assert.Equal(t, "application/json", resp.Header.Get("Content-Type"))
	var e apiError
	require.NoError(t, json.Unmarshal([]byte(body), &e), body)
	assert.Equal(t, "error", e.Type)
	assert.Equal(t, kind, e.Error.Type)
	assert.Contains(t, e.Error.Message, message)
}

// A certificate that nobody trusts is an error that is not retried.
func TestUnreachableUpstreamAnswers(t *testing.T) {
	t.Parallel()
	upstream := httptest.NewUnstartedServer(http.NotFoundHandler())
	upstream.Config.ErrorLog = newServer(nil, silent).ErrorLog
	upstream.StartTLS()
	defer upstream.Close()
	p := startProxy(t, upstream.URL)
	resp, body := p.send("POST", "/v1/messages", "{}")
	assert.Equal(t, 502, resp.StatusCode)
	assert.Equal(t, "false", resp.Header.Get("X-Should-Retry"))
	assertAPIError(t, resp, body, "api_error", "certificate")
}

type timeoutError struct{ error }

func (timeoutError) Timeout() bool   { return true }
func (timeoutError) Temporary() bool { return true }

func TestAnswerError(t *testing.T) {
	open := &tripper.OpenError{Service: "claude_api", Until: time.Now().Add(90 * time.Minute), Last: errors.New("529")}
	probing := &tripper.OpenError{Service: "claude_api", Until: time.Now().Add(-time.Minute), Last: errors.New("529")}
	late := timeoutError{errors.New("too late")}
	for _, c := range []struct {
		name       string
		err        error
		status     int
		kind       string
		retryAfter string
		again      string // X-Should-Retry
	}{
		{"open", open, 503, "overloaded_error", "5400", ""},
		{"open, after a retry", &tripper.RetryError{Attempts: 2, Err: open}, 503, "overloaded_error", "5400", ""},
		{"open, with probes under way", probing, 503, "overloaded_error", "1", ""},
		{"open, after a timeout", &tripper.OpenError{Until: open.Until, Last: late}, 503, "overloaded_error", "5400", ""},
		{"timeout", late, 504, "timeout_error", "", "false"},
		{"timeouts", &tripper.RetryError{Attempts: 3, Err: late}, 504, "timeout_error", "", "false"},
		{"else", syscall.ECONNREFUSED, 502, "api_error", "", "false"},
		{"else, retried", &tripper.RetryError{Attempts: 3, Err: syscall.ECONNREFUSED}, 502, "api_error", "", "false"},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := httptest.NewRecorder()
			answerError(w, httptest.NewRequest("POST", "/v1/messages", nil), c.err)
			assert.Equal(t, c.status, w.Code)
			assert.Equal(t, c.retryAfter, w.Header().Get("Retry-After"))
			assert.Equal(t, c.again, w.Header().Get("X-Should-Retry"))
			assertAPIError(t, w.Result(), w.Body.String(), c.kind, c.err.Error())
		})
	}
}

func TestStatsAnswerOnlyGET(t *testing.T) {
	t.Parallel()
	p := startProxy(t, serve(t, func(w http.ResponseWriter, r *http.Request) { t.Error("the upstream was asked") }))
	st := p.stats()
	assert.Equal(t, tripper.Closed, st.State)
	assert.Zero(t, st.Requests)
	resp, body := p.send("POST", "/debug/tripper", "")
	assert.Equal(t, 405, resp.StatusCode)
	assertAPIError(t, resp, body, "invalid_request_error", "GET")
}

func TestShutdownDrains(t *testing.T) {
	t.Parallel()
	for _, signal := range []os.Signal{os.Interrupt, syscall.SIGTERM} {
		t.Run(signal.String(), func(t *testing.T) {
			t.Parallel()
			goOn := make(chan struct{})
			upstream := serve(t, func(w http.ResponseWriter, r *http.Request) {
				sendEvent(w, "message_start")
				select {
				case <-goOn:
					sendEvent(w, "message_stop")
				case <-r.Context().Done():
				}
			})
			p := startProxy(t, upstream)
			resp, err := p.do(t.Context(), "POST", "/v1/messages", `{"stream":true}`)
			require.NoError(t, err)
			defer resp.Body.Close()
			stream := bufio.NewReader(resp.Body)
			assert.Contains(t, readEvent(t, stream), "message_start")

			require.NoError(t, p.cmd.Process.Signal(signal))
			p.logs.await(t, "shutting down")
			close(goOn)
			assert.Contains(t, readEvent(t, stream), "message_stop")
			_, err = stream.ReadByte()
			assert.Equal(t, io.EOF, err)
			assert.Equal(t, 0, p.wait())
			assert.Contains(t, p.logs.String(), "all requests have ended")
		})
	}
}

func TestDrainIsBounded(t *testing.T) {
	t.Parallel()
	upstream := serve(t, func(w http.ResponseWriter, r *http.Request) {
		sendEvent(w, "message_start")
		<-r.Context().Done()
	})
	p := startProxy(t, upstream, "-drain", "10ms")
	resp, err := p.do(t.Context(), "POST", "/v1/messages", `{"stream":true}`)
	require.NoError(t, err)
	defer resp.Body.Close()
	assert.Equal(t, 0, p.stop(os.Interrupt))
	assert.Contains(t, p.logs.String(), "drain time is over")
	_, err = io.ReadAll(resp.Body)
	assert.Error(t, err, "the stream is cut, and the client can tell")
}

func TestShutdownWhenIdle(t *testing.T) {
	t.Parallel()
	p := startProxy(t, "http://127.0.0.1:1")
	assert.Equal(t, 0, p.stop(syscall.SIGTERM))
}
