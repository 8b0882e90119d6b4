package main

import (
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"math"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"slices"
	"strconv"
	"time"

	"github.com/tripper-go/tripper"
)

func newTransport() *tripper.Transport {
	base := http.DefaultTransport.(*http.Transport).Clone()
	base.DisableCompression = true // bodies pass as they are
	base.MaxIdleConnsPerHost = base.MaxIdleConns
	return &tripper.Transport{Base: base, Policy: tripper.Claude()}
}

const statsPath = "/debug/tripper"

// newProxy returns the proxy: everything goes to upstream, through transport,
// except for the statistics. It is no ServeMux, which would redirect requests
// whose paths it finds unclean.
func newProxy(upstream *url.URL, transport *tripper.Transport, log *slog.Logger) http.Handler {
	proxy := &httputil.ReverseProxy{
		Rewrite: func(r *httputil.ProxyRequest) {
			r.SetURL(upstream)
			r.Out.Header.Del("Accept-Encoding")    // HoldStream cannot look into what is compressed
			r.Out.URL.RawQuery = r.In.URL.RawQuery // also what net/url cannot parse: nothing here looks at it
		},
		Transport:     transport,
		FlushInterval: -1, // an event is of use when it happens
		ErrorHandler:  answerError,
		ErrorLog:      slog.NewLogLogger(log.Handler(), slog.LevelWarn),
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == statsPath {
			answerStats(w, r, transport)
			return
		}
		proxy.ServeHTTP(w, r)
	})
}

func answerStats(w http.ResponseWriter, r *http.Request, transport *tripper.Transport) {
	if r.Method != http.MethodGet && r.Method != http.MethodHead {
		w.Header().Set("Allow", "GET, HEAD")
		writeError(w, http.StatusMethodNotAllowed, "invalid_request_error", statsPath+" answers GET")
		return
	}
	writeJSON(w, http.StatusOK, slices.AppendSeq([]tripper.Stats{}, transport.All()))
}

// statusClientLeft is what nginx logs for a client that did not wait.
const statusClientLeft = 499

// answerError answers a request whose chain ended with an error instead of a
// response, in the shape of the Claude API's own errors.
func answerError(w http.ResponseWriter, r *http.Request, err error) {
	if r.Context().Err() != nil {
		w.WriteHeader(statusClientLeft) // which nobody reads but the log
		return
	}
	if open, ok := errors.AsType[*tripper.OpenError](err); ok {
		w.Header().Set("Retry-After", seconds(time.Until(open.Until)))
		writeError(w, http.StatusServiceUnavailable, "overloaded_error", err.Error())
		return
	}
	w.Header().Set("X-Should-Retry", "false") // all that was sensible has been tried
	if timeout, ok := errors.AsType[net.Error](err); ok && timeout.Timeout() {
		writeError(w, http.StatusGatewayTimeout, "timeout_error", err.Error())
		return
	}
	writeError(w, http.StatusBadGateway, "api_error", err.Error())
}

// seconds returns d as a Retry-After: whole seconds, at least one.
func seconds(d time.Duration) string {
	return strconv.Itoa(max(1, int(math.Ceil(d.Seconds()))))
}

// An apiError is the body of the Claude API's error answers.
type apiError struct {
	Type  string `json:"type"` // "error"
	Error struct {
		Type    string `json:"type"`
		Message string `json:"message"`
	} `json:"error"`
}

func writeError(w http.ResponseWriter, status int, kind, message string) {
	e := apiError{Type: "error"}
	e.Error.Type, e.Error.Message = kind, message
	writeJSON(w, status, e)
}

func writeJSON(w http.ResponseWriter, status int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(v) // fails only when the client has left
}

// logged logs a line for each request that is over. Queries are left out: keys
// travel there.
func logged(next http.Handler, log *slog.Logger) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		start := time.Now()
		answer := &statusWriter{ResponseWriter: w}
		message, level := "request broke off", slog.LevelWarn // ReverseProxy panics when a body does
		defer func() {
			if r.Context().Err() != nil && (level == slog.LevelWarn || answer.status == statusClientLeft) {
				message, level = "client left", slog.LevelInfo
			}
			log.Log(r.Context(), level, message, "method", r.Method, "path", r.URL.Path,
				"status", answer.status, "took", time.Since(start))
		}()
		next.ServeHTTP(answer, r)
		message, level = "request", slog.LevelInfo
	})
}

// A statusWriter remembers the status of the response.
type statusWriter struct {
	http.ResponseWriter
	status int
}

func (w *statusWriter) WriteHeader(status int) {
	w.status = status // the last one counts: informational ones come before
	w.ResponseWriter.WriteHeader(status)
}

// Unwrap lets http.ResponseController flush and hijack.
func (w *statusWriter) Unwrap() http.ResponseWriter { return w.ResponseWriter }

// serveUntil serves until ctx ends, and then lets running requests end for as
// long as drain.
func serveUntil(ctx context.Context, server *http.Server, listener net.Listener, drain time.Duration, log *slog.Logger) error {
	failed := make(chan error, 1)
	go func() { failed <- server.Serve(listener) }()
	select {
	case err := <-failed:
		return err
	case <-ctx.Done():
	}
	log.Info("shutting down: no new requests, running ones may end", "drain", drain)
	patience, cancel := context.WithTimeout(context.Background(), drain)
	defer cancel()
	if err := server.Shutdown(patience); err != nil {
		log.Warn("drain time is over: running requests are cut", "drain", drain)
		return server.Close()
	}
	log.Info("all requests have ended")
	return nil
}
