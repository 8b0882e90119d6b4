package main

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"regexp"
	"runtime"
	"runtime/debug"
	"strings"
	"time"
)

// A report collects what was measured, in the order of the cases.
type report struct {
	contenders []contender
	micros     []microResult
	traffics   []trafficResult
	uploads    []uploadResult
	crowds     map[string]crowd
	crowdSize  int
}

type microResult struct {
	micro
	costs map[string]cost
}

type trafficResult struct {
	traffic
	comparisons map[string][]comparison
}

type uploadResult struct {
	name    string
	uploads map[string]upload
}

// A benchmark is a case by the name that -run selects it with.
type benchmark struct {
	name string
	run  func(*report, options) error
}

func benchmarks() []benchmark {
	var all []benchmark
	for _, m := range micros() {
		all = append(all, benchmark{m.name, func(r *report, o options) error {
			costs, err := m.measure(r.contenders, o)
			r.micros = append(r.micros, microResult{m, costs})
			return err
		}})
	}
	for _, t := range traffics() {
		all = append(all, benchmark{t.name, func(r *report, o options) error {
			comparisons, err := t.measure(r.contenders, o)
			r.traffics = append(r.traffics, trafficResult{t, comparisons})
			return err
		}})
	}
	for _, getBody := range []bool{true, false} {
		name := "upload of 64 MiB with GetBody"
		if !getBody {
			name = "upload of 64 MiB without GetBody"
		}
		all = append(all, benchmark{name, func(r *report, o options) error {
			uploads, err := measureUploads(r.contenders, o, getBody)
			r.uploads = append(r.uploads, uploadResult{name, uploads})
			return err
		}})
	}
	return append(all, benchmark{"heap of idle hosts", (*report).measureCrowds})
}

func (r *report) measureCrowds(o options) error {
	r.crowds, r.crowdSize = map[string]crowd{}, o.hosts
	hosts := manyHosts(o.hosts)
	for _, c := range r.contenders {
		result, err := measureCrowd(c, hosts)
		if err != nil {
			return fmt.Errorf("heap: %s: %w", c.name, err)
		}
		r.crowds[c.name] = result
	}
	return nil
}

func (r *report) write(w io.Writer, command string) {
	writeHeader(w, r.contenders, command)
	for _, t := range []table{
		r.overheadRatios(), r.growth(), r.trafficRatios(),
		r.nanoseconds(), r.allocations(), r.uploadTable(), r.crowdTable(),
	} {
		t.write(w)
	}
}

// writeHeader says what the figures hold for.
func writeHeader(w io.Writer, cs []contender, command string) {
	fmt.Fprintf(w, "%s, %s, %s/%s, %s, GOMAXPROCS=%d: `%s`\n\n", time.Now().UTC().Format(time.DateOnly),
		runtime.Version(), runtime.GOOS, runtime.GOARCH, cpu(), runtime.GOMAXPROCS(0), command)
	versions := moduleVersions()
	var texts []string
	for _, c := range cs {
		for _, path := range c.modules {
			texts = append(texts, path[strings.Index(path, "/")+1:]+" "+versions[path])
		}
	}
	fmt.Fprintf(w, "Equal settings: %d attempts, waits from %v doubling to %v, a breaker for each host that opens after "+
		"%d failures for %gs and closes after %d successes; go-retryablehttp alone has no breaker. Each was seen to do this before it was measured. "+
		"Versions: %s.\n", standard.attempts, standard.minWait, standard.maxWait, standard.failures, standard.recovery.Seconds(),
		standard.successes, strings.Join(texts, ", "))
}

func moduleVersions() map[string]string {
	versions := map[string]string{}
	if info, ok := debug.ReadBuildInfo(); ok {
		for _, m := range info.Deps {
			versions[m.Path] = m.Version
			if m.Replace != nil {
				versions[m.Path] = "as in this tree"
			}
		}
	}
	return versions
}

// cpu returns the processor's name where the system tells it.
func cpu() string {
	f, err := os.Open("/proc/cpuinfo")
	if err != nil {
		return fmt.Sprintf("%d processors", runtime.NumCPU())
	}
	defer f.Close()
	name := regexp.MustCompile(`^model name\s*:\s*(.+)`)
	for lines := bufio.NewScanner(f); lines.Scan(); {
		if m := name.FindStringSubmatch(lines.Text()); m != nil {
			return fmt.Sprintf("%s with %d processors", m[1], runtime.NumCPU())
		}
	}
	return fmt.Sprintf("%d processors", runtime.NumCPU())
}

// table has a column for each contender but those named.
func (r *report) table(title, note, first string, without ...string) (table, []contender) {
	t := table{title: title, note: note, head: []string{first}}
	var columns []contender
next:
	for _, c := range r.contenders {
		for _, name := range without {
			if c.name == name {
				continue next
			}
		}
		columns = append(columns, c)
		t.head = append(t.head, c.name)
	}
	return t, columns
}

// perContender fills a row.
func perContender[T any](t *table, columns []contender, first string, values map[string]T, format func(T) string) {
	cells := []string{first}
	for _, c := range columns {
		cell := nothing
		if v, ok := values[c.name]; ok {
			cell = format(v)
		}
		cells = append(cells, cell)
	}
	t.row(cells...)
}

func (r *report) overheadRatios() table {
	t, columns := r.table("Time added to a request, as a multiple of what tripper adds",
		"Over a stub base, medians over interleaved rounds. A rejection sends nothing, so all of its time counts.", "case", "bare")
	for _, m := range r.micros {
		own := m.costs[tripperName].ns
		perContender(&t, columns, m.name, m.costs, func(c cost) string { return times(c.ns / own) })
	}
	return t
}

// growth compares the cases of a successful GET with the first.
func (r *report) growth() table {
	t, columns := r.table("Time added to a successful GET, as a multiple of what the same adds with 1 host and no parallel request",
		"In parallel, the time that each of the requests takes.", "case", "bare")
	var first map[string]cost
	for _, m := range r.micros {
		switch {
		case first == nil && m.name == "GET, 1 host":
			first = m.costs
		case first != nil && strings.HasPrefix(m.name, "GET, 1") && !m.retried:
			ratios := map[string]float64{}
			for name, c := range m.costs {
				ratios[name] = c.ns / first[name].ns
			}
			perContender(&t, columns, m.name, ratios, times)
		}
	}
	return t
}

func (r *report) trafficRatios() table {
	t, columns := r.table("Real connections to this machine itself, as a multiple of the bare base",
		"Medians of the ratios within each round, ± their median distance from it. A handler, a client and keep-alive connections in one process.",
		"case", "bare")
	t.head = append(t.head, "bare, absolute")
	for _, tr := range r.traffics {
		for f, figure := range tr.figures {
			values := map[string]comparison{}
			for name, c := range tr.comparisons {
				values[name] = c[f]
			}
			perContender(&t, columns, tr.name+": "+figure.name, values, func(c comparison) string {
				return fmt.Sprintf("%.3f ±%.3f", c.ratio, c.spread)
			})
			last := &t.rows[len(t.rows)-1]
			*last = append(*last, figure.format(values["bare"].value))
		}
	}
	return t
}

func (r *report) nanoseconds() table {
	t, columns := r.table("Nanoseconds added to the bare base",
		"Medians over interleaved rounds, ± their median distance from it. The column of the bare base is all that it takes, "+
			"which is two calls and the shortest wait in the cases with a retry.", "case")
	for _, m := range r.micros {
		perContender(&t, columns, m.name, m.costs, nanos)
	}
	return t
}

func (r *report) allocations() table {
	t, columns := r.table("Allocations and bytes added to the bare base", "", "case")
	for _, m := range r.micros {
		perContender(&t, columns, m.name, m.costs, func(c cost) string {
			return fmt.Sprintf("%s, %s", count(c.allocs), size(c.bytes))
		})
	}
	return t
}

func (r *report) uploadTable() table {
	t, columns := r.table("Uploads of 64 MiB",
		"Until the base gets the first byte of a body that is produced as it is read; bytes allocated; the largest the heap grew meanwhile.", "case")
	for _, u := range r.uploads {
		perContender(&t, columns, u.name+": first byte", u.uploads, func(u upload) string { return duration(u.firstByte) })
		perContender(&t, columns, u.name+": allocated", u.uploads, func(u upload) string { return size(u.allocated) })
		perContender(&t, columns, u.name+": heap", u.uploads, func(u upload) string { return size(u.peak) })
	}
	return t
}

func (r *report) crowdTable() table {
	t, columns := r.table(fmt.Sprintf("%s hosts, each called twice and idle since", thousands(float64(r.crowdSize))),
		"Tripper keeps a bounded number of services and forgets the one that has been idle for longest.", "")
	if r.crowds == nil {
		return t
	}
	perContender(&t, columns, "hosts that something is kept of", r.crowds, func(c crowd) string { return thousands(float64(c.held)) })
	perContender(&t, columns, "heap for each of these", r.crowds, func(c crowd) string {
		if c.held == 0 {
			return nothing
		}
		return size(c.bytes / float64(c.held))
	})
	perContender(&t, columns, "heap in all", r.crowds, func(c crowd) string { return size(c.bytes) })
	perContender(&t, columns, "ns for a request to the next of the hosts", r.crowds, func(c crowd) string { return thousands(c.ns) })
	return t
}
