package pace

import (
	"math"
	"net/http"
	"strconv"
	"strings"
	"time"
)

// RetryAfter returns how long a response's headers ask a client to wait before
// it retries, and whether they do: retry-after-ms in milliseconds, else
// Retry-After (RFC 9110, section 10.2.3) in seconds or as an HTTP date. Of
// several values the first one counts.
//
// A number is digits, with a decimal point between digits at most: "3" or "1.5",
// but not ".5", "5." or "+5". A date is seen from the response's own Date, since
// the two clocks may differ, or from now if it has none that can be read. The
// wait is never negative: a date that has passed gives 0, and what no Duration
// holds gives the longest one. A value that cannot be read counts as absent.
func RetryAfter(h http.Header, now time.Time) (time.Duration, bool) {
	if d, ok := parseWait(first(h, "Retry-After-Ms"), time.Millisecond); ok {
		return d, true
	}
	v := first(h, "Retry-After")
	if d, ok := parseWait(v, time.Second); ok {
		return d, true
	}
	if v == "" { // mostly; ParseTime would allocate three errors
		return 0, false
	}
	at, err := http.ParseTime(v)
	if err != nil {
		return 0, false
	}
	if date, err := http.ParseTime(first(h, "Date")); err == nil {
		now = date
	}
	return max(0, at.Sub(now)), true
}

// first returns the first value of a header, whose name is in canonical form.
func first(h http.Header, key string) string {
	if values := h[key]; len(values) > 0 {
		return strings.TrimSpace(values[0])
	}
	return ""
}

func parseWait(s string, unit time.Duration) (time.Duration, bool) {
	whole, fraction, point := strings.Cut(s, ".")
	if !digits(whole) || point && !digits(fraction) {
		return 0, false
	}
	v, _ := strconv.ParseFloat(s, 64) // its one error is a number too large, for which it gives +Inf
	if v = math.Round(v * float64(unit)); v < math.MaxInt64 {
		return time.Duration(v), true
	}
	return math.MaxInt64, true
}

func digits(s string) bool {
	return s != "" && strings.Trim(s, "0123456789") == ""
}
