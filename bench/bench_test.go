package main

import (
	"bytes"
	"io"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func byName(t *testing.T, name string) contender {
	for _, c := range contenders() {
		if c.name == name {
			return c
		}
	}
	t.Fatalf("no contender %q", name)
	return contender{}
}

func forEach(t *testing.T, suits func(contender) bool, test func(*testing.T, contender)) {
	for _, c := range contenders() {
		if suits(c) {
			t.Run(c.name, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) { test(t, c) })
			})
		}
	}
}

func all(contender) bool       { return true }
func retries(c contender) bool { return c.retries }
func breaks(c contender) bool  { return c.breaks }

// The check that precedes the measurements, with the settings of both kinds.
func TestContenders(t *testing.T) {
	forEach(t, all, func(t *testing.T, c contender) {
		require.NoError(t, check(c, standard))
		require.NoError(t, check(c, hardlyWaiting))
	})
}

// The check has to find a contender that does not do what it claims.
func TestCheckFindsFalseClaims(t *testing.T) {
	wrong := standard
	synctest.Test(t, func(t *testing.T) {
		for _, name := range []string{"bare", "go-retryablehttp"} {
			c := byName(t, name)
			c.retries, c.breaks = true, true
			assert.Error(t, check(c, standard), name)
		}
		forgetful := byName(t, tripperName)
		forgetful.wrap = func(base http.RoundTripper, s settings) http.RoundTripper {
			wrong.failures = s.failures + 1
			return newTripper(base, wrong)
		}
		assert.ErrorContains(t, check(forgetful, standard), "open after 5 failures")

		impatient := byName(t, "failsafehttp")
		impatient.wrap = func(base http.RoundTripper, s settings) http.RoundTripper {
			wrong = s
			wrong.attempts--
			return newFailsafe(base, wrong)
		}
		assert.ErrorContains(t, check(impatient, standard), "503, an error, 200")

		shared := byName(t, "rehttp + gobreaker")
		shared.wrap = func(base http.RoundTripper, s settings) http.RoundTripper {
			return newRehttp(newBreakers(base, s).(*perHost).build(), s)
		}
		assert.ErrorContains(t, check(shared, standard), "another host")
	})
}

// Each contender waits 1s and 2s before its retries.
func TestEqualWaits(t *testing.T) {
	forEach(t, retries, func(t *testing.T, c contender) {
		base := &scripted{answer: always(http.StatusServiceUnavailable)}
		start := time.Now()
		_, _, err := send(c.wrap(base, standard), http.MethodGet, "a.example", "")
		require.NoError(t, err)
		assert.Equal(t, 3*time.Second, time.Since(start))
	})
}

// Each breaker lets a probe through after 60s, and closes after two.
func TestEqualRecovery(t *testing.T) {
	forEach(t, breaks, func(t *testing.T, c contender) {
		healthy := false
		base := &scripted{answer: func(int, *http.Request) int {
			if healthy {
				return http.StatusOK
			}
			return http.StatusServiceUnavailable
		}}
		rt := c.wrap(base, standard)
		require.NoError(t, fail(rt, standard, "a.example"))
		healthy = true

		time.Sleep(standard.recovery - 11*time.Second) // the retries before it opened have waited, too
		_, _, err := send(rt, http.MethodGet, "a.example", "")
		require.True(t, rejected(err), "%v", err)

		time.Sleep(12 * time.Second)
		for range standard.successes {
			status, _, err := send(rt, http.MethodGet, "a.example", "")
			require.NoError(t, err)
			require.Equal(t, http.StatusOK, status)
		}

		healthy = false
		before := base.calls.Load()
		require.NoError(t, fail(rt, standard, "a.example"))
		assert.EqualValues(t, standard.failures, base.calls.Load()-before, "closed, it takes all failures again to open")
	})
}

// What is held for many hosts is bounded for tripper only.
func TestCrowd(t *testing.T) {
	for _, c := range []struct {
		name        string
		hosts, held int
	}{
		{tripperName, 5000, 4096},
		{"go-retryablehttp", 100, 0},
		{"go-retryablehttp + gobreaker", 100, 100},
		{"rehttp + gobreaker", 100, 100},
		{"failsafehttp", 100, 100},
	} {
		result, err := measureCrowd(byName(t, c.name), manyHosts(c.hosts))
		require.NoError(t, err, c.name)
		assert.Equal(t, c.held, result.held, c.name)
	}
}

// What a contender does to an upload shows in bytes, not in time.
func TestUpload(t *testing.T) {
	const size = 32 << 20
	// Without GetBody it keeps the first BodyLimit bytes, 1 MiB, in a buffer that
	// grows, and lets go of them when there are more.
	for getBody, most := range map[bool]float64{true: 1e6, false: 8e6} {
		streaming, err := sendUpload(byName(t, tripperName), size, getBody)
		require.NoError(t, err)
		assert.Less(t, streaming.allocated, most)
		assert.Less(t, streaming.peak, most)
	}
	buffering, err := sendUpload(byName(t, "rehttp + gobreaker"), size, true)
	require.NoError(t, err)
	assert.Greater(t, buffering.peak, float64(size))
}

func TestMedian(t *testing.T) {
	assert.Equal(t, 2.0, median([]float64{3, 1, 2}))
	assert.Equal(t, 2.5, median([]float64{4, 1, 2, 3}))
	assert.Equal(t, 0.0, median(nil))
	assert.Equal(t, 1.0, spread([]float64{1, 2, 3, 90}))
}

func TestFormats(t *testing.T) {
	assert.Equal(t, "-1,234,567", thousands(-1234567))
	assert.Equal(t, "999", thousands(999))
	assert.Equal(t, "8.4×", times(8.4))
	assert.Equal(t, "1,234×", times(1234))
	assert.Equal(t, nothing, times(-1))
	assert.Equal(t, "0", count(0.004))
	assert.Equal(t, "1.50", count(1.5))
	assert.Equal(t, "64.0 MiB", size(64<<20))
	assert.Equal(t, "51.4 µs", duration(51400))
	assert.Equal(t, "198.0 ms", duration(198e6))
}

// Every case runs, and every table is printed.
func TestMeasure(t *testing.T) {
	o := options{procs: 2, rounds: 1, slice: time.Microsecond, netSlice: time.Millisecond, uploads: 0, hosts: 200, run: regexp.MustCompile("")}
	var page, progress bytes.Buffer
	require.NoError(t, measure(o, "go run . -x", &page, &progress))
	text := page.String()
	assert.Contains(t, text, time.Now().UTC().Format(time.DateOnly))
	assert.Contains(t, text, runtime.Version())
	assert.Contains(t, text, "GOMAXPROCS=2: `go run . -x`")
	assert.Equal(t, 7, strings.Count(text, "\n### "))
	rows := markdownTables(t, text)
	for _, b := range benchmarks() {
		assert.Contains(t, progress.String(), b.name+"\n")
		if !strings.Contains(b.name, "heap") {
			assert.Contains(t, strings.Join(slices.Collect(maps.Keys(rows)), "\n"), b.name)
		}
	}
	assert.Contains(t, rows, "heap in all")
}

func TestCommand(t *testing.T) {
	file := filepath.Join(t.TempDir(), "table.md")
	args := []string{"-quick", "-rounds", "2", "-run", "POST|rejection"}
	var out, progress bytes.Buffer
	require.Equal(t, 0, command(args, &out, &progress), progress.String())
	require.Equal(t, 0, command(append(args, "-o", file), io.Discard, &progress), progress.String())
	written, err := os.ReadFile(file)
	require.NoError(t, err)
	for _, page := range []string{out.String(), string(written)} {
		rows := markdownTables(t, page)
		assert.Contains(t, rows, "POST of 2 KiB with GetBody")
		assert.Contains(t, rows, "rejection by an open breaker")
		assert.NotContains(t, rows, "GET, 1 host")
		assert.Contains(t, page, "`go run . -quick -rounds 2 -run")
	}
}

// markdownTables checks the tables of a page and returns the first cells of
// their rows.
func markdownTables(t *testing.T, page string) map[string]bool {
	rows := map[string]bool{}
	lines := strings.Split(page, "\n")
	for i := 0; i < len(lines); i++ {
		if !strings.HasPrefix(lines[i], "|") {
			continue
		}
		assert.Empty(t, lines[i-1], "a table begins after an empty line")
		columns := strings.Count(lines[i], "|")
		assert.Equal(t, "| --- |"+strings.Repeat(" ---: |", columns-2), lines[i+1])
		for ; i < len(lines) && strings.HasPrefix(lines[i], "|"); i++ {
			assert.Equal(t, columns, strings.Count(lines[i], "|"), lines[i])
			rows[strings.TrimSpace(strings.Split(lines[i], "|")[1])] = true
		}
	}
	assert.NotEmpty(t, rows)
	return rows
}

func TestWrongArguments(t *testing.T) {
	for _, args := range [][]string{{"-run", "("}, {"-rounds", "-1"}, {"more"}, {"-unknown"}} {
		var stderr bytes.Buffer
		assert.Equal(t, 2, command(args, io.Discard, &stderr), args)
		assert.NotEmpty(t, stderr.String(), args)
	}
	var stderr bytes.Buffer
	assert.Equal(t, 1, command([]string{"-run", "no such case"}, io.Discard, &stderr))
	assert.Contains(t, stderr.String(), "no case matches")
	assert.Equal(t, 0, command([]string{"-h"}, io.Discard, io.Discard))
}
