// Command bench measures what tripper and its peers cost, side by side in one
// run, and prints it as Markdown:
//
//	cd bench && go run .
//
// Every contender is configured alike and is seen to retry, to open its breaker
// and to keep hosts apart before it is measured. Rounds are interleaved, because
// a machine is never quiet for long; what is printed are medians.
package main

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"regexp"
	"runtime"
	"strings"
	"time"
)

// options are how long to measure what.
type options struct {
	procs    int // for everything, and so many goroutines in the parallel cases
	rounds   int
	slice    time.Duration // for one contender in a round, over a stub
	netSlice time.Duration // and over connections
	uploads  int           // of each kind
	hosts    int           // of the crowd
	run      *regexp.Regexp
	out      string
}

var (
	thorough = options{procs: 2, rounds: 150, slice: 3 * time.Millisecond, netSlice: 25 * time.Millisecond, uploads: 5, hosts: 100_000}
	quick    = options{procs: 2, rounds: 10, slice: time.Millisecond, netSlice: 10 * time.Millisecond, uploads: 1, hosts: 20_000}
)

func main() {
	os.Exit(command(os.Args[1:], os.Stdout, os.Stderr))
}

// command returns the exit code: 2 for wrong arguments.
func command(args []string, stdout, stderr io.Writer) int {
	o, err := parse(args, stderr)
	switch {
	case errors.Is(err, flag.ErrHelp):
		return 0
	case err != nil:
		return 2
	}
	var page bytes.Buffer
	if err := measure(o, strings.Join(append([]string{"go run ."}, args...), " "), &page, stderr); err != nil {
		fmt.Fprintln(stderr, "bench:", err)
		return 1
	}
	if o.out != "" {
		err = os.WriteFile(o.out, page.Bytes(), 0o666)
	} else {
		_, err = stdout.Write(page.Bytes())
	}
	if err != nil {
		fmt.Fprintln(stderr, "bench:", err)
		return 1
	}
	return 0
}

func parse(args []string, stderr io.Writer) (options, error) {
	flags := flag.NewFlagSet("bench", flag.ContinueOnError)
	flags.SetOutput(stderr)
	short := flags.Bool("quick", false, "take seconds instead of minutes; the figures are rough")
	run := flags.String("run", "", "measure only the cases whose names match this regular `expression`")
	rounds := flags.Int("rounds", 0, "go through the contenders this `many` times for each case (default 150, with -quick 10)")
	out := flags.String("o", "", "write the tables to this `file` instead of standard output")
	if err := flags.Parse(args); err != nil {
		return options{}, err
	}
	o := thorough
	if *short {
		o = quick
	}
	if *rounds > 0 {
		o.rounds = *rounds
	}
	o.out = *out
	expression, err := regexp.Compile(*run)
	switch {
	case err != nil:
	case flags.NArg() > 0:
		err = fmt.Errorf("unexpected argument %q", flags.Arg(0))
	case *rounds < 0:
		err = fmt.Errorf("-rounds is %d: want more than zero", *rounds)
	}
	if err != nil {
		fmt.Fprintln(stderr, "bench:", err)
	}
	o.run = expression
	return o, err
}

// measure checks the contenders, measures the cases that o selects and writes
// the tables to page.
func measure(o options, command string, page, progress io.Writer) error {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(o.procs))
	r := &report{contenders: contenders()}
	for _, c := range r.contenders {
		if err := check(c, hardlyWaiting); err != nil {
			return err
		}
	}
	selected := 0
	for _, b := range benchmarks() {
		if !o.run.MatchString(b.name) {
			continue
		}
		selected++
		fmt.Fprintln(progress, b.name)
		if err := b.run(r, o); err != nil {
			return err
		}
	}
	if selected == 0 {
		return fmt.Errorf("no case matches %q", o.run)
	}
	r.write(page, command)
	return nil
}
