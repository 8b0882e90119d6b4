package main

import (
	"fmt"
	"io"
	"math"
	"strconv"
	"strings"
)

// A table is one of Markdown.
type table struct {
	title string
	note  string
	head  []string
	rows  [][]string
}

func (t *table) row(cells ...string) { t.rows = append(t.rows, cells) }

func (t *table) write(w io.Writer) {
	if len(t.rows) == 0 {
		return
	}
	fmt.Fprintf(w, "\n### %s\n\n", t.title)
	if t.note != "" {
		fmt.Fprintf(w, "%s\n\n", t.note)
	}
	line := func(cells []string) { fmt.Fprintf(w, "| %s |\n", strings.Join(cells, " | ")) }
	line(t.head)
	rule := []string{"---"}
	for range t.head[1:] {
		rule = append(rule, "---:")
	}
	line(rule)
	for _, row := range t.rows {
		line(row)
	}
}

const nothing = "–" // in a cell: does not apply

func times(ratio float64) string {
	switch {
	case math.IsNaN(ratio) || math.IsInf(ratio, 0) || ratio < 0:
		return nothing
	case ratio >= 10:
		return thousands(ratio) + "×"
	}
	return fmt.Sprintf("%.2g×", ratio)
}

func nanos(c cost) string {
	if c.ns < 1000 {
		return fmt.Sprintf("%.0f ±%.0f", c.ns, c.spread)
	}
	return thousands(c.ns) + " ±" + thousands(c.spread)
}

// count gives small counts as they are, and averages that are not whole.
func count(v float64) string {
	if rounded := math.Round(v); math.Abs(v-rounded) < 0.02 {
		return strconv.Itoa(int(rounded))
	}
	return fmt.Sprintf("%.2f", v)
}

func thousands(v float64) string {
	digits := strconv.FormatInt(int64(math.Round(v)), 10)
	sign := ""
	if digits[0] == '-' {
		sign, digits = "-", digits[1:]
	}
	for i := len(digits) - 3; i > 0; i -= 3 {
		digits = digits[:i] + "," + digits[i:]
	}
	return sign + digits
}

func duration(ns float64) string {
	if ns < 1e6 {
		return fmt.Sprintf("%.1f µs", ns/1e3)
	}
	return fmt.Sprintf("%.1f ms", ns/1e6)
}

func size(bytes float64) string {
	switch {
	case bytes >= 1<<20:
		return fmt.Sprintf("%.1f MiB", bytes/(1<<20))
	case bytes >= 10<<10:
		return fmt.Sprintf("%.0f KiB", bytes/(1<<10))
	}
	return thousands(bytes) + " B"
}
