package pace

import (
	"fmt"
	"math"
	"net/http"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func TestRetryAfter(t *testing.T) {
	now := time.Date(2026, time.March, 1, 12, 0, 0, 0, time.UTC)
	in30 := now.Add(30 * time.Second)
	absent := time.Duration(-1)
	for _, tt := range []struct {
		ms, value string
		want      time.Duration
	}{
		{"", "", absent},
		{"", "0", 0},
		{"", "7", 7 * time.Second},
		{"", " 7 ", 7 * time.Second},
		{"", "007", 7 * time.Second},
		{"", "1.5", 1500 * time.Millisecond},
		{"", "0.001", time.Millisecond},
		{"250", "", 250 * time.Millisecond},
		{"250", "7", 250 * time.Millisecond},
		{" 250 ", "7", 250 * time.Millisecond},
		{"0.5", "", 500 * time.Microsecond},
		{"0", "7", 0},
		{"-250", "7", 7 * time.Second},
		{"soon", "7", 7 * time.Second},
		{"NaN", "7", 7 * time.Second},
		{"soon", "", absent},
		{"250", in30.Format(http.TimeFormat), 250 * time.Millisecond},
		{"", in30.Format(http.TimeFormat), 30 * time.Second},
		{"", in30.Format("Monday, 02-Jan-06 15:04:05 GMT"), 30 * time.Second},
		{"", in30.Format(time.ANSIC), 30 * time.Second},
		{"", " " + in30.Format(http.TimeFormat) + " ", 30 * time.Second},
		{"", now.Format(http.TimeFormat), 0},
		{"", now.Add(-time.Hour).Format(http.TimeFormat), 0},
		{"", "Thu, 01 Jan 1970 00:00:00 GMT", 0},
		{"", "Fri, 31 Dec 9999 23:59:59 GMT", math.MaxInt64},
		{"", "9223372036", 9223372036 * time.Second},
		{"", "9223372036.854775807", math.MaxInt64}, // as a float64 it is the next number already
		{"", "9223372037", math.MaxInt64},
		{"", "9223372037.0", math.MaxInt64},
		{"", strings.Repeat("9", 40) + "." + strings.Repeat("9", 40), math.MaxInt64},
		{"", strings.Repeat("9", 40), math.MaxInt64},
		{"", strings.Repeat("9", 100_000), math.MaxInt64},
		{"", strings.Repeat("0", 4000) + "7", 7 * time.Second},
		{"", "7." + strings.Repeat("0", 4000) + "1", 7 * time.Second},
		{"9223372036855", "", math.MaxInt64},
		{strings.Repeat("9", 40), "7", math.MaxInt64},
	} {
		h := http.Header{}
		if tt.ms != "" {
			h.Set("retry-after-ms", tt.ms)
		}
		if tt.value != "" {
			h.Set("Retry-After", tt.value)
		}
		got, ok := RetryAfter(h, now)
		assert.Equal(t, tt.want != absent, ok, "%q %q", tt.ms, tt.value)
		assert.Equal(t, max(0, tt.want), got, "%q %q", tt.ms, tt.value)
	}
	got, ok := RetryAfter(nil, now)
	assert.False(t, ok)
	assert.Zero(t, got)
	got, ok = RetryAfter(http.Header{"Retry-After": {"5", "9"}}, now)
	assert.True(t, ok)
	assert.Equal(t, 5*time.Second, got, "the first value counts")
}

// A decimal fraction means what it says: not a nanosecond less, which floating
// point would make of 0.57s and others.
func TestRetryAfterFractionsAreExact(t *testing.T) {
	now := time.Now()
	for ms := range 10000 {
		want := time.Duration(ms) * time.Millisecond
		seconds, _ := RetryAfter(http.Header{"Retry-After": {fmt.Sprintf("%d.%03d", ms/1000, ms%1000)}}, now)
		require.Equal(t, want, seconds)
		millis, _ := RetryAfter(http.Header{"Retry-After-Ms": {strconv.Itoa(ms)}}, now)
		require.Equal(t, want, millis)
	}
}

// Only digits are a number, with a decimal fraction at most.
func TestRetryAfterUnreadable(t *testing.T) {
	for _, v := range []string{"-1", "-0", "-0.001", "+5", "1e1", "1e30", "1e400", "-1e400", "1E3", "0x1p4", "0x10", "0b1", "1_000", "1,5", "1.2.3",
		".5", "5.", ".", "Inf", "+Inf", "-Inf", "Infinity", "infinity", "NaN", "nan", "7 seconds", "7s", "7 7", "5, 9", "\u0667", "\uff17",
		"tomorrow", "", " ", "\x00", "2026-03-01T12:00:30Z", "Sun, 01 Mar 2026 12:00:30 +0000"} {
		for _, key := range []string{"Retry-After", "Retry-After-Ms"} {
			wait, ok := RetryAfter(http.Header{key: {v}}, time.Now())
			assert.False(t, ok, "%s: %q", key, v)
			assert.Zero(t, wait, "%s: %q", key, v)
		}
		wait, ok := RetryAfter(http.Header{"Retry-After-Ms": {v}, "Retry-After": {"7"}}, time.Now())
		assert.True(t, ok, "%q", v)
		assert.Equal(t, 7*time.Second, wait, "%q", v)
	}
}

// A date is the server's, so it is seen from the server's Date.
func TestRetryAfterIsSeenFromDate(t *testing.T) {
	server := time.Date(2026, time.March, 1, 12, 0, 0, 0, time.UTC)
	for _, off := range []time.Duration{-24 * time.Hour, -time.Hour, 0, time.Hour, 24 * time.Hour} {
		now := server.Add(off) // by the client's clock
		for _, tt := range []struct {
			date string
			want time.Duration
		}{
			{server.Format(http.TimeFormat), 30 * time.Second},
			{server.Format("Monday, 02-Jan-06 15:04:05 GMT"), 30 * time.Second},
			{" " + server.Format(time.ANSIC) + " ", 30 * time.Second},
			{server.Add(time.Minute).Format(http.TimeFormat), 0},
			{"Mon, 01 Jan 0001 00:00:00 GMT", math.MaxInt64},
			{"soon", max(0, 30*time.Second-off)},
			{"", max(0, 30*time.Second-off)},
		} {
			h := http.Header{"Date": {tt.date}, "Retry-After": {server.Add(30 * time.Second).Format(http.TimeFormat)}}
			wait, ok := RetryAfter(h, now)
			assert.True(t, ok)
			assert.Equal(t, tt.want, wait, "Date %q, a clock that is off by %v", tt.date, off)
			h.Set("Retry-After", "9")
			wait, _ = RetryAfter(h, now)
			assert.Equal(t, 9*time.Second, wait, "seconds need no clock")
		}
	}
}

func FuzzRetryAfter(f *testing.F) {
	for _, s := range []string{"", "7", "1.5", "-1", "9223372037", "1e30", "+5", ".5", "NaN", "Inf", "0x1p-2", "1_0", strings.Repeat("9", 40),
		"Sun, 01 Mar 2026 12:00:30 GMT", "Sunday, 01-Mar-26 12:00:30 GMT", "Sun Mar  1 12:00:30 2026", " ", "\xff"} {
		f.Add(s, "", int64(1772366400))
		f.Add("", s, int64(1772366400))
	}
	f.Fuzz(func(t *testing.T, ms, value string, unix int64) {
		h := http.Header{"Retry-After-Ms": {ms}, "Retry-After": {value}}
		now := time.Unix(unix%(1<<37), 0)
		wait, ok := RetryAfter(h, now)
		later, okLater := RetryAfter(h, now.Add(time.Second))
		preferred, okPreferred := RetryAfter(http.Header{"Retry-After-Ms": {ms}}, now)
		ordinary, okOrdinary := RetryAfter(http.Header{"Retry-After": {value}}, now)
		switch {
		case wait < 0 || !ok && wait != 0:
			t.Errorf("%q %q: %v %v", ms, value, wait, ok)
		case ok != okLater || later > wait:
			t.Errorf("%q %q: %v, but %v a second later", ms, value, wait, later)
		case wait-later > time.Second:
			t.Errorf("%q %q: %v, but only %v a second later", ms, value, wait, later)
		case okPreferred && wait != preferred, !okPreferred && (ok != okOrdinary || wait != ordinary):
			t.Errorf("%q %q: %v, alone %v and %v", ms, value, wait, preferred, ordinary)
		}
		n, err := strconv.ParseInt(value, 10, 64)
		// A float64 has every nanosecond of about a hundred days.
		off := ordinary - time.Duration(max(0, n))*time.Second
		if err == nil && okOrdinary && ordinary != math.MaxInt64 && (off != 0 && n < 9e6 || off.Abs() > time.Microsecond) {
			t.Errorf("%q: %v", value, ordinary)
		}
		if looks := strings.Trim(strings.TrimSpace(value), "0123456789."); okOrdinary && looks != "" {
			if _, err := http.ParseTime(strings.TrimSpace(value)); err != nil {
				t.Errorf("%q is read as %v", value, ordinary)
			}
		}
	})
}
