// Claudeproxy is a reverse proxy for the Claude API that retries, and trips.
//
// Without arguments it shows what that is good for: it starts an API that has a
// bad day and the proxy in front of it, both on loopback, sends a scripted
// minute of traffic at accelerated time and prints what happens.
//
//	go run ./examples/claudeproxy
//
// With an upstream it is the proxy itself, at real time:
//
//	go run ./examples/claudeproxy -listen 127.0.0.1:8080 -upstream https://api.anthropic.com
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"syscall"
	"time"
)

const usage = `Claudeproxy is a reverse proxy for the Claude API that retries, and trips.

Without -listen and -upstream it shows a bad day of an embedded API, a minute of
traffic at accelerated time, and exits. With either of them it is a proxy, which
answers its statistics as JSON at /debug/tripper; Ctrl-C drains and exits.

`

const (
	exitOK     = 0
	exitFailed = 1
	exitUsage  = 2
)

type config struct {
	demo     bool
	listen   string
	upstream *url.URL
	drain    time.Duration
	speed    float64
}

func main() { os.Exit(run(os.Args[1:], os.Stdout, os.Stderr)) }

func run(args []string, stdout, stderr io.Writer) int {
	c, err := parse(args, stdout)
	if errors.Is(err, flag.ErrHelp) {
		return exitOK
	}
	if err != nil {
		return complain(stderr, err, exitUsage)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	context.AfterFunc(ctx, stop) // a second signal ends the process at once

	if c.demo {
		if err := demo(ctx, c.speed, stdout); err != nil {
			return complain(stderr, err, exitFailed)
		}
		return exitOK
	}
	listener, err := net.Listen("tcp", c.listen)
	if err != nil {
		return complain(stderr, fmt.Errorf("-listen: %w", err), exitUsage)
	}
	fmt.Fprintf(stdout, "listening on http://%s\n", listener.Addr())
	if err := c.serve(ctx, listener, slog.New(slog.NewTextHandler(stderr, nil))); err != nil {
		return complain(stderr, err, exitFailed)
	}
	return exitOK
}

// complain prints err as one line and returns the exit code.
func complain(stderr io.Writer, err error, code int) int {
	fmt.Fprintf(stderr, "claudeproxy: %s\n", strings.ReplaceAll(err.Error(), "\n", " "))
	return code
}

// parse reads the flags. Asked for help it prints it and returns flag.ErrHelp.
func parse(args []string, stdout io.Writer) (config, error) {
	var c config
	flags := flag.NewFlagSet("claudeproxy", flag.ContinueOnError)
	flags.SetOutput(io.Discard) // an error is printed once, by the caller
	flags.StringVar(&c.listen, "listen", "127.0.0.1:8080", "`address` to serve the proxy on; port 0 takes a free one")
	upstream := flags.String("upstream", "https://api.anthropic.com", "`URL` of the API that the proxy leads to")
	flags.DurationVar(&c.drain, "drain", 30*time.Second, "how long running requests may take to end after Ctrl-C")
	flags.Float64Var(&c.speed, "speed", 10, "how many times faster than real the demonstration runs, 1 to 20")
	switch err := flags.Parse(args); {
	case errors.Is(err, flag.ErrHelp):
		flags.SetOutput(stdout)
		fmt.Fprint(stdout, usage)
		flags.PrintDefaults()
		return c, err
	case err != nil:
		return c, err
	case flags.NArg() > 0:
		return c, fmt.Errorf("unexpected argument %q: there are only flags, see -h", flags.Arg(0))
	}
	given := make(map[string]bool)
	flags.Visit(func(f *flag.Flag) { given[f.Name] = true })
	c.demo = !given["listen"] && !given["upstream"]
	return c, c.check(given, *upstream)
}

func (c *config) check(given map[string]bool, upstream string) error {
	switch {
	case c.demo && given["drain"]:
		return errors.New("-drain is for the proxy: it needs -listen or -upstream")
	case !c.demo && given["speed"]:
		return errors.New("-speed is for the demonstration: it does not go with -listen or -upstream")
	case c.drain < 0:
		return fmt.Errorf("-drain is %v: want 0 or more", c.drain)
	case !(c.speed >= 1 && c.speed <= 20):
		return fmt.Errorf("-speed is %v: want 1 to 20", c.speed)
	}
	u, err := parseUpstream(upstream)
	c.upstream = u
	return err
}

// parseUpstream accepts what requests can be led to. It names no part of a URL
// that could be a secret.
func parseUpstream(s string) (*url.URL, error) {
	const want = "want one such as https://api.anthropic.com"
	u, err := url.Parse(s)
	if err != nil {
		if parse, ok := errors.AsType[*url.Error](err); ok {
			err = parse.Err // without the URL
		}
		return nil, fmt.Errorf("-upstream is no URL: %w: %s", err, want)
	}
	switch {
	case u.Scheme != "http" && u.Scheme != "https":
		return nil, fmt.Errorf("-upstream has the scheme %q: %s", u.Scheme, want)
	case u.Hostname() == "":
		return nil, errors.New("-upstream has no host: " + want)
	case u.User != nil || u.RawQuery != "" || u.Fragment != "":
		return nil, errors.New("-upstream has user info, a query or a fragment, which are not passed on: " + want)
	}
	if port := u.Port(); port != "" {
		if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 {
			return nil, fmt.Errorf("-upstream has the port %s: want 1 to 65535", port)
		}
	}
	return u, nil
}

// serve runs the proxy until ctx ends.
func (c *config) serve(ctx context.Context, listener net.Listener, log *slog.Logger) error {
	transport := newTransport()
	transport.Logger = log
	defer transport.CloseIdleConnections()
	server := newServer(logged(newProxy(c.upstream, transport, log), log), log)
	return serveUntil(ctx, server, listener, c.drain, log)
}

// newServer returns a server whose limits leave streams alone: none of them
// applies to a request that has been read.
func newServer(handler http.Handler, log *slog.Logger) *http.Server {
	return &http.Server{
		Handler:           handler,
		ReadHeaderTimeout: 10 * time.Second,
		IdleTimeout:       2 * time.Minute,
		ErrorLog:          slog.NewLogLogger(log.Handler(), slog.LevelWarn),
	}
}
