// Agent runs the HTTP actions of an agent: calls to whatever hosts a model
// comes up with, in every state of health. Each host has a breaker of its own,
// a POST is sent again only where that does no harm, and a crowd of hosts that
// are called once leaves no trace.
//
//	go run ./examples/agent
//
// It needs no network: the services are embedded, and their names lead to the
// loopback. Times run a hundred times faster than in earnest.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/signal"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/tripper-go/tripper"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := run(ctx, os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "agent:", err)
		os.Exit(1)
	}
}

// faster is how much faster than in earnest the times of the policy run.
const faster = 100

// policy is the Agent preset, with a breaker for each host instead of one for
// all of them, and safe for actions that must not happen twice.
func policy() tripper.Policy {
	p := tripper.Agent()
	p.Service = ""
	p.Retry.Replay = tripper.ReplaySafe
	p.Retry.IdempotencyKey = true
	p.Timeout /= faster
	p.Retry.MinWait /= faster
	p.Retry.MaxWait /= faster
	p.Breaker.RecoveryTimeout /= faster
	return p
}

// An action is what the agent wants done.
type action struct{ method, url, body string }

func run(ctx context.Context, out io.Writer) error {
	world := newWorld()
	defer world.close()
	transport := &tripper.Transport{
		Base:   world.transport(),
		Policy: policy(),
		Observers: []*tripper.Observer{{StateChange: func(c tripper.StateChange) {
			fmt.Fprintf(out, "      %s: %s -> %s\n", c.Service, c.From, c.To)
		}}},
	}
	defer transport.CloseIdleConnections()
	client := &http.Client{Transport: transport}

	fmt.Fprintln(out, "Actions on services of mixed health; an attempt may take 30s, here 300ms:")
	for round := 1; round <= 4; round++ {
		fmt.Fprintf(out, "round %d\n", round)
		for _, a := range []action{
			{http.MethodGet, "http://weather.test/today", ""},
			{http.MethodGet, "http://flaky.test/search?q=tripper&key=secret", ""},
			{http.MethodPost, "http://orders.test/new", `{"item": "tea"}`},
			{http.MethodGet, "http://limited.test/quota", ""},
			{http.MethodGet, "http://gone.test/", ""},
			{http.MethodGet, "http://hangs.test/", ""},
		} {
			if err := ctx.Err(); err != nil {
				return err
			}
			fmt.Fprintf(out, "  %-4s %-20s %s\n", a.method, host(a.url), perform(ctx, client, a))
		}
	}

	report(out, transport, world)
	return visitStrangers(ctx, out, client, transport)
}

func host(url string) string {
	name, _, _ := strings.Cut(strings.TrimPrefix(url, "http://"), "/")
	return name
}

// perform does an action and returns what a model would be told of it.
func perform(ctx context.Context, client *http.Client, a action) string {
	req, err := http.NewRequestWithContext(ctx, a.method, a.url, strings.NewReader(a.body))
	if err != nil {
		return "not a request: " + err.Error()
	}
	resp, err := client.Do(req)
	var open *tripper.OpenError
	var network net.Error
	switch {
	case errors.As(err, &open):
		return fmt.Sprintf("not tried, the service is down (%v)", open.Last)
	case errors.As(err, &network) && network.Timeout():
		return "timed out"
	case err != nil:
		return "failed, the service cannot be reached"
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	if err != nil {
		return "answer broke off"
	}
	return fmt.Sprintf("%d %s", resp.StatusCode, body)
}

func report(out io.Writer, transport *tripper.Transport, world *world) {
	fmt.Fprintln(out, "\nWhat became of the services:")
	table := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(table, "SERVICE\tSTATE\tREQUESTS\tOK\tFAILED\tREJECTED\tATTEMPTS\tRETRIES\tLAST FAILURE")
	for s := range transport.All() {
		fmt.Fprintf(table, "%s\t%s\t%d\t%d\t%d\t%d\t%d\t%d\t%s\n", s.Service, s.State,
			s.Requests, s.OK, s.Failed, s.Rejected, s.Attempts, s.Retries, short(s.LastFailureCause))
	}
	table.Flush()
	orders, requests := world.orders()
	fmt.Fprintf(out, "\n%d requests placed %d orders: the service knows a retry by its key.\n", requests, orders)
}

// visitStrangers calls many hosts once each.
func visitStrangers(ctx context.Context, out io.Writer, client *http.Client, transport *tripper.Transport) error {
	const strangers = 5000
	for i := range strangers {
		if err := ctx.Err(); err != nil {
			return err
		}
		perform(ctx, client, action{http.MethodGet, fmt.Sprintf("http://host-%d.strangers.test/", i), ""})
	}
	remembered := 0
	for range transport.All() {
		remembered++
	}
	fmt.Fprintf(out, "%d strangers were called once each; %d services are remembered now.\n", strangers, remembered)
	return nil
}

func short(s string) string {
	const most = 60
	if len(s) > most {
		return s[:most-1] + "…"
	}
	return s
}

// scaled is how long a service takes for what takes d in earnest.
func scaled(d time.Duration) time.Duration { return d / faster }
