package tripper

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log"
	"math"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httptrace"
	"net/url"
	"os"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/iotest"
	"testing/synctest"
	"time"

	"github.com/hashicorp/go-retryablehttp"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/tripper-go/tripper/internal/replay"
)

// The seed's tests of retryable errors, carried over by meaning: one subtest
// for each of the five.
func TestSeedErrorDetection(t *testing.T) {
	timeout := fmt.Errorf("read: %w", os.ErrDeadlineExceeded)
	retried := func(steps ...policyStep) func(*testing.T) {
		return func(t *testing.T) {
			for _, step := range steps {
				base, _, _ := policyTrip(t, RetryPolicy{}, policyRequest(t, http.MethodPost), step)
				assert.Len(t, base.at, 3, "%+v", step)
			}
		}
	}
	policyBubble(t, "timeouts", retried(policyStep{err: timeout}, policyStep{err: &net.DNSError{IsTimeout: true}}))
	policyBubble(t, "connection errors", retried(policyStep{err: policyDialError}, policyStep{err: syscall.ECONNRESET},
		policyStep{err: io.ErrUnexpectedEOF}, policyStep{err: io.EOF}))
	policyBubble(t, "server errors", retried(policyStep{status: 500}, policyStep{status: 502}, policyStep{status: 503},
		policyStep{status: 504}, policyStep{status: 529}, policyStep{status: 599}))
	policyBubble(t, "408 and 429", retried(policyStep{status: 408}, policyStep{status: 429}))
	policyBubble(t, "nothing else", func(t *testing.T) {
		for _, step := range []policyStep{{status: 200}, {status: 302}, {status: 400}, {status: 401}, {status: 403},
			{status: 404}, {status: 422}, {status: 499}, {err: ErrRejected}, {err: &replay.ReadError{Err: io.EOF}}} {
			base, _, _ := policyTrip(t, RetryPolicy{}, policyRequest(t, http.MethodPost), step)
			assert.Len(t, base.at, 1, "%+v", step)
		}
	})
}

// The seed's tests of retry_with_backoff, carried over by meaning: one subtest
// for each of the four.
func TestSeedBackoff(t *testing.T) {
	none := RetryPolicy{Jitter: JitterNone}
	policyBubble(t, "success needs no retry", func(t *testing.T) {
		base, resp, err := policyTrip(t, none, policyRequest(t, http.MethodGet), policyStep{status: 200})
		require.NoError(t, err)
		assert.Equal(t, 200, resp.StatusCode)
		assert.Equal(t, policySeconds(0), base.at)
	})
	policyBubble(t, "success after failures", func(t *testing.T) {
		base, resp, err := policyTrip(t, none, policyRequest(t, http.MethodGet),
			policyStep{status: 503}, policyStep{err: syscall.ECONNRESET}, policyStep{status: 200})
		require.NoError(t, err)
		assert.Equal(t, 200, resp.StatusCode)
		assert.Equal(t, policySeconds(0, 1, 3), base.at)
	})
	policyBubble(t, "gives up after MaxAttempts", func(t *testing.T) {
		base, _, err := policyTrip(t, none, policyRequest(t, http.MethodGet), policyStep{err: syscall.ECONNREFUSED})
		assert.Equal(t, &RetryError{Attempts: 3, Err: syscall.ECONNREFUSED}, err)
		assert.Equal(t, policySeconds(0, 1, 3), base.at)
	})
	policyBubble(t, "waits double up to MaxWait", func(t *testing.T) {
		r := RetryPolicy{Jitter: JitterNone, MaxAttempts: 7}
		base, resp, err := policyTrip(t, r, policyRequest(t, http.MethodGet), policyStep{status: 500})
		require.NoError(t, err)
		assert.Equal(t, 500, resp.StatusCode)
		assert.Equal(t, policySeconds(0, 1, 3, 7, 15, 25, 35), base.at)
	})
}

func TestDefaultPolicySpellsOutTheZeroPolicy(t *testing.T) {
	require.Equal(t, Policy{
		Retry: RetryPolicy{
			MaxAttempts: 3, MinWait: time.Second, MaxWait: 10 * time.Second, Jitter: JitterEqual,
			MaxRetryAfter: 60 * time.Second, Replay: ReplayAny, BodyLimit: 64 << 10,
			Budget: Budget{Ratio: 0.2, MinPerSecond: 10},
		},
		Breaker: BreakerPolicy{
			FailureThreshold: 5, RecoveryTimeout: 60 * time.Second, SuccessThreshold: 2,
			Window: 10 * time.Second, MinRequests: 20,
		},
	}, DefaultPolicy())
	require.Equal(t, DefaultPolicy(), Policy{}.withDefaults())
}

func TestPresets(t *testing.T) {
	type preset struct {
		policy           Policy
		service          string
		attempts         int
		minWait, maxWait time.Duration
		timeout          time.Duration
	}
	for name, want := range map[string]preset{
		"DefaultPolicy": {DefaultPolicy(), "", 3, time.Second, 10 * time.Second, 0},
		"HighTraffic":   {HighTraffic(), "", 2, 500 * time.Millisecond, 5 * time.Second, 0},
		"Critical":      {Critical(), "", 5, 2 * time.Second, 30 * time.Second, 0},
		"BackgroundJob": {BackgroundJob(), "", 10, 5 * time.Second, 60 * time.Second, 0},
		"Claude":        {Claude(), "claude_api", 3, time.Second, 10 * time.Second, 180 * time.Second},
		"Agent":         {Agent(), "agent_http", 3, time.Second, 10 * time.Second, 30 * time.Second},
	} {
		t.Run(name, func(t *testing.T) {
			p := DefaultPolicy()
			p.Service, p.Timeout, p.HoldStream = want.service, want.timeout, name == "Claude"
			p.Retry.MaxAttempts, p.Retry.MinWait, p.Retry.MaxWait = want.attempts, want.minWait, want.maxWait
			assert.Equal(t, p, want.policy, "everything else is the default")
			assert.Equal(t, want.policy, want.policy.withDefaults(), "nothing is left to resolve")
			assert.NoError(t, (&Transport{Policy: want.policy}).Validate())
		})
	}
}

// A field that is set stays as it is, whatever the others are.
func TestDefaultsReplaceOnlyZeroFields(t *testing.T) {
	set := func(v reflect.Value) {
		for _, field := range v.Fields() {
			switch {
			case field.CanInt():
				field.SetInt(3)
			case field.CanFloat():
				field.SetFloat(0.5)
			}
		}
	}
	var p Policy
	set(reflect.ValueOf(&p.Retry).Elem())
	set(reflect.ValueOf(&p.Retry.Budget).Elem())
	set(reflect.ValueOf(&p.Breaker).Elem())
	require.Equal(t, p, p.withDefaults())

	for _, b := range []Budget{{Ratio: 0.5}, {MinPerSecond: 1}, {Ratio: -1}} {
		assert.Equal(t, b, RetryPolicy{Budget: b}.withDefaults().Budget, "a Budget is taken literally once a field is set")
	}
	assert.Equal(t, int64(-1), RetryPolicy{BodyLimit: -1}.withDefaults().BodyLimit)
	assert.Equal(t, -1, Policy{Breaker: BreakerPolicy{FailureThreshold: -1}}.withDefaults().Breaker.FailureThreshold)
	assert.Equal(t, 20*time.Second, RetryPolicy{MinWait: 20 * time.Second}.withDefaults().MaxWait, "never below MinWait")
}

// policyMistakes has each field of a Policy with values that cannot work.
var policyMistakes = []struct {
	field, value, want string
	make               func(*Policy)
}{
	{"Timeout", "-1s", "zero", func(p *Policy) { p.Timeout = -time.Second }},
	{"Idle", "-1s", "zero", func(p *Policy) { p.Idle = -time.Second }},
	{"Retry.MaxAttempts", "-1", "zero", func(p *Policy) { p.Retry.MaxAttempts = -1 }},
	{"Retry.MinWait", "-1ms", "zero", func(p *Policy) { p.Retry.MinWait = -time.Millisecond }},
	{"Retry.MaxWait", "-1m0s", "zero", func(p *Policy) { p.Retry.MaxWait = -time.Minute }},
	{"Retry.MaxWait", "500ms", "at least MinWait, which is 1s", func(p *Policy) { p.Retry.MaxWait = time.Second / 2 }},
	{"Retry.MaxWait", "2s", "at least MinWait, which is 3s", func(p *Policy) {
		p.Retry.MinWait, p.Retry.MaxWait = 3*time.Second, 2*time.Second
	}},
	{"Retry.Jitter", "-1", "one of the Jitter constants", func(p *Policy) { p.Retry.Jitter = -1 }},
	{"Retry.Jitter", "4", "one of the Jitter constants", func(p *Policy) { p.Retry.Jitter = JitterNone + 1 }},
	{"Retry.MaxRetryAfter", "-1ns", "zero", func(p *Policy) { p.Retry.MaxRetryAfter = -1 }},
	{"Retry.MaxElapsed", "-1ns", "zero", func(p *Policy) { p.Retry.MaxElapsed = -1 }},
	{"Retry.Replay", "-1", "ReplayAny or ReplaySafe", func(p *Policy) { p.Retry.Replay = -1 }},
	{"Retry.Replay", "2", "ReplayAny or ReplaySafe", func(p *Policy) { p.Retry.Replay = ReplaySafe + 1 }},
	{"Retry.Budget.Ratio", "NaN", "a share", func(p *Policy) { p.Retry.Budget.Ratio = math.NaN() }},
	{"Retry.Budget.Ratio", "+Inf", "a share", func(p *Policy) { p.Retry.Budget.Ratio = math.Inf(1) }},
	{"Retry.Budget.MinPerSecond", "-1", "zero or more", func(p *Policy) { p.Retry.Budget.MinPerSecond = -1 }},
	{"Retry.Budget.MinPerSecond", "NaN", "zero or more", func(p *Policy) { p.Retry.Budget.MinPerSecond = math.NaN() }},
	{"Retry.Budget.MinPerSecond", "+Inf", "zero or more", func(p *Policy) { p.Retry.Budget.MinPerSecond = math.Inf(1) }},
	{"Breaker.RecoveryTimeout", "-1s", "zero", func(p *Policy) { p.Breaker.RecoveryTimeout = -time.Second }},
	{"Breaker.SuccessThreshold", "-1", "zero", func(p *Policy) { p.Breaker.SuccessThreshold = -1 }},
	{"Breaker.MaxRecoveryTimeout", "-1s", "zero, or at least RecoveryTimeout, which is 1m0s", func(p *Policy) {
		p.Breaker.MaxRecoveryTimeout = -time.Second
	}},
	{"Breaker.MaxRecoveryTimeout", "30s", "zero, or at least RecoveryTimeout, which is 1m0s", func(p *Policy) {
		p.Breaker.MaxRecoveryTimeout = 30 * time.Second
	}},
	{"Breaker.FailureRate", "-0.1", "from 0 (off) to 1", func(p *Policy) { p.Breaker.FailureRate = -0.1 }},
	{"Breaker.FailureRate", "50", "from 0 (off) to 1", func(p *Policy) { p.Breaker.FailureRate = 50 }},
	{"Breaker.FailureRate", "NaN", "from 0 (off) to 1", func(p *Policy) { p.Breaker.FailureRate = math.NaN() }},
	{"Breaker.Window", "-1s", "zero", func(p *Policy) { p.Breaker.Window = -time.Second }},
	{"Breaker.MinRequests", "-1", "zero", func(p *Policy) { p.Breaker.MinRequests = -1 }},
	{"Breaker.SlowCall", "-1s", "zero", func(p *Policy) { p.Breaker.SlowCall = -time.Second }},
}

func TestValidateNamesFieldValueAndWish(t *testing.T) {
	for _, m := range policyMistakes {
		var p Policy
		m.make(&p)
		message := func(where string) string { return fmt.Sprintf("tripper: %s.%s is %s: want ", where, m.field, m.value) }
		t.Run(m.field+" "+m.value, func(t *testing.T) {
			err := (&Transport{Policy: p}).Validate()
			require.Error(t, err)
			assert.NotContains(t, err.Error(), "\n", "one problem")
			assert.Contains(t, err.Error(), message("Policy"))
			assert.Contains(t, err.Error(), m.want)
			err = (&Transport{Hosts: map[string]Policy{"*.example.com": p}}).Validate()
			require.Error(t, err)
			assert.Contains(t, err.Error(), message(`Hosts["*.example.com"]`))
		})
	}
}

func TestValidateReportsEveryProblem(t *testing.T) {
	var p Policy
	wrong := map[string]bool{}
	for _, m := range policyMistakes {
		if !wrong[m.field] { // a field holds one wrong value at a time
			wrong[m.field] = true
			m.make(&p)
		}
	}
	err := (&Transport{
		Policy: p, Layers: []Layer{nil},
		Hosts: map[string]Policy{"": {}, "api.example.com": p},
	}).Validate()
	require.Error(t, err)
	for field := range wrong {
		assert.Contains(t, err.Error(), "tripper: Policy."+field+" is ")
		assert.Contains(t, err.Error(), `tripper: Hosts["api.example.com"].`+field+" is ")
	}
	assert.Contains(t, err.Error(), `tripper: Hosts[""] is no host: want `)
	assert.Contains(t, err.Error(), "tripper: Layers[0] is nil: want a Layer")
}

func TestValidateAccepts(t *testing.T) {
	for name, tr := range map[string]*Transport{
		"zero":   {},
		"limits": {Policy: Policy{Retry: RetryPolicy{MaxAttempts: 1, MinWait: 1, MaxWait: 1, MaxRetryAfter: 1, BodyLimit: -1}}},
		"huge": {Policy: Policy{Timeout: math.MaxInt64, Retry: RetryPolicy{
			MaxAttempts: math.MaxInt, MinWait: math.MaxInt64, MaxWait: math.MaxInt64, BodyLimit: math.MaxInt64}}},
		"long MinWait alone": {Policy: Policy{Retry: RetryPolicy{MinWait: time.Hour}}},
		"no budget":          {Policy: Policy{Retry: RetryPolicy{Budget: Budget{Ratio: -1}}}},
		"no breaker":         {Policy: Policy{Breaker: BreakerPolicy{FailureThreshold: -1}}},
		"recovery":           {Policy: Policy{Breaker: BreakerPolicy{MaxRecoveryTimeout: time.Minute, FailureRate: 1}}},
		"base of functions":  {Base: policyBase(nil)},
	} {
		assert.NoError(t, tr.Validate(), name)
	}
	tr := &Transport{}
	tr.Base = tr
	assert.ErrorContains(t, tr.Validate(), "tripper: Base is the Transport itself: want ")
}

func TestValidateHostPatterns(t *testing.T) {
	for _, pattern := range []string{"example.com", "EXAMPLE.com.", "localhost:8080", "*.example.com", "*.example.com:8443",
		"127.0.0.1", "127.0.0.1:1", "[::1]", "[::1]:65535", "xn--bcher-kva.example", "under_score.example", "*.internal"} {
		assert.NoError(t, (&Transport{Hosts: map[string]Policy{pattern: {}}}).Validate(), pattern)
	}
	const host, port = "is no host: want one such as", "want 1 to 65535"
	for pattern, wish := range map[string]string{
		"": host, " ": host, ".": host, "*": host, "*.": host, "**.example.com": host, "*.*.example.com": host,
		"api.*.com": host, "*example.com": host, ".example.com": host, "a..example.com": host,
		" example.com": host, "example.com ": host, "exam ple.com": host, "example.com\n": host,
		"http://example.com": host, "https://example.com/": host, "https://example.com:443": host, "//example.com": host,
		"example.com/v1": host, "example.com:8080/v1": host, "example.com?q=1": host, "example.com#top": host,
		"user@example.com": host, "user:secret@example.com": host, "user:secret@example.com:8080": host,
		"::1": host, "[::1": host, "::1]": host, "[::1]x": host, "[example.com]": host, "*.[::1]": host,
		"example.com:0": port, "example.com:65536": port, "example.com:99999999999999999999": port,
		"example.com:-1": port, "example.com:http": port, "example.com:080": port, "*:8080": host, ":8080": host,
	} {
		err := (&Transport{Hosts: map[string]Policy{pattern: {}}}).Validate()
		if assert.Error(t, err, pattern) {
			assert.Contains(t, err.Error(), fmt.Sprintf("tripper: Hosts[%q] ", pattern))
			assert.Contains(t, err.Error(), wish)
		}
	}
}

func TestValidateRefusesOneHostTwice(t *testing.T) {
	for _, pair := range [][2]string{{"API.example.com", "api.example.com"}, {"api.example.com", "api.example.com."},
		{"API.example.com:8080", "api.example.com.:8080"}, {"*.Example.com", "*.example.com"}, {"[::A]", "[::a]"}} {
		err := (&Transport{Hosts: map[string]Policy{pair[0]: {}, pair[1]: {}}}).Validate()
		assert.ErrorContains(t, err, fmt.Sprintf("tripper: Hosts[%q] and Hosts[%q] are the same host: want one of them", pair[0], pair[1]))
	}
	for _, pair := range [][2]string{{"example.com", "example.com:8080"}, {"example.com", "*.example.com"},
		{"*.example.com", "*.example.com:8080"}, {"example.com", "example.com:443"}, {"example.com:80", "example.com:443"}} {
		assert.NoError(t, (&Transport{Hosts: map[string]Policy{pair[0]: {}, pair[1]: {}}}).Validate(), "%v", pair)
	}
}

// What one service's policies share must be the same in all of them.
func TestValidateSharedService(t *testing.T) {
	three := BreakerPolicy{FailureThreshold: 3}
	one := func(*http.Response, error) Outcome { return Success }
	two := func(*http.Response, error) Outcome { return Failure }
	named := func(p Policy) Policy { p.Service = "s"; return p }
	outcome := func(f func(*http.Response, error) Outcome) Policy {
		return named(Policy{Breaker: BreakerPolicy{Outcome: f}})
	}
	for _, tt := range []struct {
		name   string
		policy Policy
		hosts  map[string]Policy
		ok     bool
	}{
		{"equal", Policy{}, map[string]Policy{"a.example": named(Policy{}), "b.example": named(Policy{})}, true},
		{"equal once spelled out", named(Policy{}), map[string]Policy{"a.example": named(DefaultPolicy())}, true},
		{"different in what is not shared", named(Policy{Timeout: 1}), map[string]Policy{
			"a.example": named(Policy{Idle: 1, Retry: RetryPolicy{MaxAttempts: 9, Replay: ReplaySafe, Jitter: JitterNone}})}, true},
		{"breaker of two hosts", Policy{}, map[string]Policy{"a.example": named(Policy{}), "b.example": named(Policy{Breaker: three})}, false},
		{"breaker of Policy", named(Policy{}), map[string]Policy{"a.example": named(Policy{Breaker: three})}, false},
		{"budget", named(Policy{}), map[string]Policy{"a.example": named(Policy{Retry: RetryPolicy{Budget: Budget{Ratio: 1}}})}, false},
		{"wildcards", Policy{}, map[string]Policy{"*.a.example": named(Policy{}), "*.b.example": named(Policy{Breaker: three})}, false},
		{"name of another host", Policy{}, map[string]Policy{"a.example": {}, "b.example": {Service: "a.example", Breaker: three}}, false},
		{"no name, hosts of their own", Policy{Breaker: three}, map[string]Policy{"a.example": {}, "*.b.example": {}}, true},
		{"two names", Policy{}, map[string]Policy{"a.example": named(Policy{}), "b.example": {Service: "b", Breaker: three}}, true},
		{"same Outcome", outcome(one), map[string]Policy{"a.example": outcome(one)}, true},
		{"another Outcome", outcome(one), map[string]Policy{"a.example": outcome(two)}, false},
		{"Outcome and none", outcome(one), map[string]Policy{"a.example": outcome(nil)}, false},
		{"DefaultOutcome, spelled out", outcome(DefaultOutcome), map[string]Policy{"a.example": outcome(nil)}, true},
		// https://a.example is the service "a.example", with its port or without.
		{"default port", Policy{}, map[string]Policy{"a.example": {}, "a.example:443": {Breaker: three}}, false},
		{"both default ports", Policy{}, map[string]Policy{"a.example:80": {}, "a.example:443": {Breaker: three}}, false},
		{"another port", Policy{}, map[string]Policy{"a.example": {}, "a.example:8443": {Breaker: three}}, true},
	} {
		err := (&Transport{Policy: tt.policy, Hosts: tt.hosts}).Validate()
		if tt.ok {
			assert.NoError(t, err, tt.name)
		} else if assert.Error(t, err, tt.name) {
			assert.Contains(t, err.Error(), "name the same service", tt.name)
			assert.Contains(t, err.Error(), "with different Breaker or Budget: want them equal", tt.name)
		}
	}
}

func TestInvalidTransportSendsNothing(t *testing.T) {
	base := &policyScript{steps: []policyStep{{status: 200}}}
	tr := &Transport{Base: base, Policy: Policy{Timeout: -1}, Hosts: map[string]Policy{"*": {}}}
	want := tr.Validate()
	require.Error(t, want)
	for range 2 {
		body := &policyBody{Reader: strings.NewReader("hello")}
		req := policyRequest(t, http.MethodPost)
		req.Body = body
		resp, err := tr.RoundTrip(req)
		assert.Nil(t, resp)
		assert.EqualError(t, err, want.Error())
		assert.Equal(t, int32(1), body.closes.Load())
		_, err = tr.RoundTrip(policyRequest(t, http.MethodGet))
		assert.EqualError(t, err, want.Error())
	}
	assert.Empty(t, base.at)
	_, ok := tr.Stats("api.example.com")
	assert.False(t, ok)
	assert.False(t, tr.Trip("api.example.com", time.Second))
	assert.False(t, tr.Reset("api.example.com"))
	for s := range tr.All() {
		assert.Fail(t, "a service of an invalid Transport", s.Service)
	}
}

func TestWithRetryIsValidated(t *testing.T) {
	base := &policyScript{steps: []policyStep{{status: 200}}}
	tr := &Transport{Base: base}
	body := &policyBody{Reader: strings.NewReader("hello")}
	ctx := WithRetry(t.Context(), RetryPolicy{MaxAttempts: -2, MaxElapsed: -1})
	req := policyRequest(t, http.MethodPost).WithContext(ctx)
	req.Body = body
	resp, err := tr.RoundTrip(req)
	assert.Nil(t, resp)
	assert.ErrorContains(t, err, "tripper: WithRetry.MaxAttempts is -2: want zero (the default) or more")
	assert.ErrorContains(t, err, "tripper: WithRetry.MaxElapsed is -1ns: want ")
	assert.Equal(t, int32(1), body.closes.Load())
	assert.Empty(t, base.at)
}

// A request's own policy replaces its host's whole, defaults included.
func TestWithRetryReplacesThePolicy(t *testing.T) {
	policyBubble(t, "policy", func(t *testing.T) {
		host := RetryPolicy{MaxAttempts: 9, MinWait: time.Minute, MaxWait: time.Hour, Jitter: JitterNone}
		req := policyRequest(t, http.MethodGet)
		req = req.WithContext(WithRetry(req.Context(), RetryPolicy{Jitter: JitterNone}))
		base, _, err := policyTrip(t, host, req, policyStep{status: 500})
		require.NoError(t, err)
		assert.Equal(t, policySeconds(0, 1, 3), base.at)
	})
	policyBubble(t, "budget", func(t *testing.T) {
		base := &policyScript{steps: []policyStep{{status: 500}}}
		tr := policyTransport(base, RetryPolicy{Budget: Budget{Ratio: 0.001}})
		own := func(b Budget) (attempts int) {
			before := len(base.at)
			req := policyRequest(t, http.MethodGet)
			_, err := tr.RoundTrip(req.WithContext(WithRetry(req.Context(), RetryPolicy{Budget: b})))
			require.NoError(t, err)
			return len(base.at) - before
		}
		assert.Equal(t, 1, own(Budget{}), "the service's budget stays")
		assert.Equal(t, 1, own(Budget{Ratio: 1, MinPerSecond: 100}), "a request cannot raise it")
		assert.Equal(t, 3, own(Budget{Ratio: -1}), "but can do without")
	})
}

func TestWaitWithoutJitter(t *testing.T) {
	for _, tt := range []struct {
		minWait, maxWait time.Duration
		want             []time.Duration
	}{
		{0, 0, policySeconds(1, 2, 4, 8, 10, 10)},
		{3 * time.Second, 0, policySeconds(3, 6, 10, 10)},
		{time.Second, 8 * time.Second, policySeconds(1, 2, 4, 8, 8)},
		{5 * time.Second, 5 * time.Second, policySeconds(5, 5, 5)},
		{20 * time.Second, 0, policySeconds(20, 20)},
		{1, 5, []time.Duration{1, 2, 4, 5, 5}},
		{math.MaxInt64/2 + 1, math.MaxInt64, []time.Duration{math.MaxInt64/2 + 1, math.MaxInt64, math.MaxInt64}},
	} {
		r := RetryPolicy{MinWait: tt.minWait, MaxWait: tt.maxWait, Jitter: JitterNone}.withDefaults()
		var got []time.Duration
		for n := range tt.want {
			got = append(got, r.wait(n, 0))
		}
		assert.Equal(t, tt.want, got)
	}
	r := RetryPolicy{MinWait: 1, MaxWait: math.MaxInt64, Jitter: JitterNone}
	assert.Equal(t, time.Duration(1<<62), r.wait(62, 0))
	for _, n := range []int{63, 64, 65, 1000, math.MaxInt} {
		assert.Equal(t, time.Duration(math.MaxInt64), r.wait(n, 0), "n = %d", n)
	}
}

// The waits of each jitter fill what its rule says, evenly, and never leave it.
func TestWaitWithJitter(t *testing.T) {
	const s = time.Second
	for _, tt := range []struct {
		jitter    Jitter
		n         int
		last      time.Duration
		low, high time.Duration // drawn evenly from [low, high) …
		atLow     float64       // … but for this share, which the bound raises to low
	}{
		{JitterEqual, 0, 0, 1 * s, 2 * s, 0},
		{JitterEqual, 1, 0, 2 * s, 4 * s, 0},
		{JitterEqual, 2, 0, 4 * s, 8 * s, 0},
		{JitterEqual, 3, 0, 8 * s, 10 * s, 0},
		{JitterEqual, 4, 0, 5 * s, 10 * s, 0},
		{JitterEqual, 99, 0, 5 * s, 10 * s, 0},
		{JitterFull, 0, 0, 1 * s, 1 * s, 1},
		{JitterFull, 1, 0, 1 * s, 2 * s, 0.5},
		{JitterFull, 2, 0, 1 * s, 4 * s, 0.25},
		{JitterFull, 3, 0, 1 * s, 8 * s, 0.125},
		{JitterFull, 4, 0, 1 * s, 10 * s, 0.1},
		{JitterDecorrelated, 0, 0, 1 * s, 3 * s, 0},
		{JitterDecorrelated, 1, 2 * s, 1 * s, 6 * s, 0},
		{JitterDecorrelated, 2, 5 * s, 1 * s, 10 * s, 0},
		{JitterDecorrelated, 3, time.Hour, 1 * s, 10 * s, 0},
		{JitterDecorrelated, 3, math.MaxInt64, 1 * s, 10 * s, 0},
	} {
		t.Run(fmt.Sprintf("jitter %d n %d last %v", tt.jitter, tt.n, tt.last), func(t *testing.T) {
			r := RetryPolicy{Jitter: tt.jitter}.withDefaults()
			const draws = 4000
			var atLow, between int
			lowest, highest, sum := tt.high, tt.low, time.Duration(0)
			for range draws {
				d := r.wait(tt.n, tt.last)
				if d == tt.low {
					atLow++
					continue
				}
				if d < tt.low || d >= tt.high {
					t.Fatalf("a wait of %v", d)
				}
				between++
				sum += d
				lowest, highest = min(lowest, d), max(highest, d)
			}
			assert.InDelta(t, tt.atLow, float64(atLow)/draws, 0.06)
			if between > draws/4 {
				span := (tt.high - tt.low).Seconds()
				assert.InDelta(t, tt.low.Seconds(), lowest.Seconds(), span/20)
				assert.InDelta(t, tt.high.Seconds(), highest.Seconds(), span/20)
				assert.InDelta(t, (tt.low+tt.high).Seconds()/2, (sum / time.Duration(between)).Seconds(), span/20)
			}
		})
	}
}

// Where doubling or tripling would overflow, there still is a jitter.
func TestWaitAtTheEndOfNumbers(t *testing.T) {
	for _, r := range []RetryPolicy{{Jitter: JitterEqual}, {Jitter: JitterDecorrelated}} {
		r.MinWait, r.MaxWait = time.Second, math.MaxInt64
		longest := time.Duration(0)
		for range 2000 {
			longest = max(longest, r.wait(33, math.MaxInt64/2))
		}
		assert.Greater(t, longest, time.Duration(math.MaxInt64/20*19), "jitter %d", r.Jitter)
	}
}

func TestWaitStaysWithinItsBounds(t *testing.T) {
	for jitter := JitterEqual; jitter <= JitterNone; jitter++ {
		for _, bounds := range [][2]time.Duration{{1, 1}, {1, 2}, {2, 3}, {time.Second, time.Second},
			{1, math.MaxInt64}, {math.MaxInt64 - 1, math.MaxInt64}, {math.MaxInt64, math.MaxInt64}, {math.MaxInt64 / 3, math.MaxInt64 / 2}} {
			for _, n := range []int{0, 1, 2, 31, 61, 62, 63, 64, 1 << 40, math.MaxInt} {
				policyCheckWait(t, RetryPolicy{Jitter: jitter, MinWait: bounds[0], MaxWait: bounds[1]}, n, 0)
				policyCheckWait(t, RetryPolicy{Jitter: jitter, MinWait: bounds[0], MaxWait: bounds[1]}, n, math.MaxInt64)
			}
		}
	}
}

func FuzzWait(f *testing.F) {
	f.Add(int64(time.Second), int64(10*time.Second), 4, int64(0), byte(JitterEqual))
	f.Add(int64(1), int64(math.MaxInt64), 62, int64(math.MaxInt64), byte(JitterDecorrelated))
	f.Add(int64(0), int64(0), math.MaxInt, int64(-1), byte(JitterFull))
	f.Fuzz(func(t *testing.T, minWait, maxWait int64, n int, last int64, jitter byte) {
		r := RetryPolicy{MinWait: time.Duration(minWait), MaxWait: time.Duration(maxWait), Jitter: Jitter(jitter % 4)}
		if n < 0 || len(r.validate("")) > 0 {
			t.Skip()
		}
		policyCheckWait(t, r, n, time.Duration(last))
	})
}

func policyCheckWait(t *testing.T, r RetryPolicy, n int, last time.Duration) {
	t.Helper()
	r = r.withDefaults()
	wait := r.wait(n, last)
	if wait < r.MinWait || wait > r.MaxWait {
		t.Errorf("wait(%d, %d) is %d, not within %d and %d, with jitter %d", n, last, wait, r.MinWait, r.MaxWait, r.Jitter)
	}
}

// Through a Transport, each decorrelated wait depends on the one before.
func TestDecorrelatedWaitsGrowFromTheLast(t *testing.T) {
	policyBubble(t, "waits", func(t *testing.T) {
		r := RetryPolicy{Jitter: JitterDecorrelated, MaxAttempts: 60, MinWait: time.Second, MaxWait: time.Hour}
		base, _, _ := policyTrip(t, r, policyRequest(t, http.MethodGet), policyStep{status: 500})
		last, longest := time.Second, time.Duration(0)
		for _, wait := range base.gaps() {
			assert.GreaterOrEqual(t, wait, time.Second)
			assert.Less(t, wait, 3*last)
			last, longest = wait, max(longest, wait)
		}
		assert.Greater(t, longest, 3*time.Second, "they never grew")
	})
}

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
		{"", "1e1", 10 * time.Second},
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
		{"", in30.Format(time.RFC3339), absent},
		{"", "-1", absent},
		{"", "-0.001", absent},
		{"", "-1e400", absent},
		{"", "-Inf", absent},
		{"", "NaN", absent},
		{"", "nan", absent},
		{"", "tomorrow", absent},
		{"", "7 seconds", absent},
		{"", "7s", absent},
		{"", "1,5", absent},
		{"", "9223372036", 9223372036 * time.Second},
		{"", "9223372036.854775807", math.MaxInt64}, // as a float64 it is the next number already
		{"", "9223372037", math.MaxInt64},
		{"", "1e30", math.MaxInt64},
		{"", "1e400", math.MaxInt64},
		{"", "Inf", math.MaxInt64},
		{"", strings.Repeat("9", 40), math.MaxInt64},
		{"", strings.Repeat("9", 4000), math.MaxInt64},
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

func FuzzRetryAfter(f *testing.F) {
	for _, s := range []string{"", "7", "1.5", "-1", "9223372037", "1e30", "NaN", "Inf", "0x1p-2", "1_0", strings.Repeat("9", 40),
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
	})
}

// The server's word is kept to the nanosecond when it is longer than the
// backoff, on every status that is retried.
func TestServerWaitIsKept(t *testing.T) {
	for _, status := range []int{408, 429, 500, 502, 503, 529} {
		policyBubble(t, strconv.Itoa(status), func(t *testing.T) {
			date := time.Now().Add(30 * time.Second).UTC().Format(http.TimeFormat)
			base, _, err := policyTrip(t, RetryPolicy{MaxAttempts: 5}, policyRequest(t, http.MethodPost),
				policyStep{status: status, header: []string{"Retry-After", "7"}},
				policyStep{status: status, header: []string{"retry-after-ms", "4250"}},
				policyStep{status: status, header: []string{"Retry-After", date}},
				policyStep{status: status, header: []string{"Retry-After", "60"}},
				policyStep{status: 200})
			require.NoError(t, err)
			assert.Equal(t, []time.Duration{0, 7 * time.Second, 11250 * time.Millisecond, 30 * time.Second, 90 * time.Second}, base.at)
		})
	}
	policyBubble(t, "x-should-retry", func(t *testing.T) {
		base, _, err := policyTrip(t, RetryPolicy{}, policyRequest(t, http.MethodPost),
			policyStep{status: 409, header: []string{"x-should-retry", "true", "Retry-After", "7"}}, policyStep{status: 200})
		require.NoError(t, err)
		assert.Equal(t, policySeconds(0, 7), base.at)
	})
	policyBubble(t, "one attempt's word is not the next one's", func(t *testing.T) {
		base, _, _ := policyTrip(t, RetryPolicy{Jitter: JitterNone, MaxAttempts: 4}, policyRequest(t, http.MethodGet),
			policyStep{status: 429, header: []string{"Retry-After", "30"}}, policyStep{err: io.EOF}, policyStep{status: 500})
		assert.Equal(t, policySeconds(0, 30, 32, 36), base.at)
	})
}

func TestServerWaitTooLong(t *testing.T) {
	too := func(value string) policyStep { return policyStep{status: 429, header: []string{"Retry-After", value}} }
	for name, tt := range map[string]struct {
		retry    RetryPolicy
		deadline time.Duration
		step     policyStep
		want     Suppressed
	}{
		"MaxRetryAfter by default": {step: too("60.1"), want: Suppressed{RetryAfter: 1}},
		"MaxRetryAfter":            {retry: RetryPolicy{MaxRetryAfter: 5 * time.Second}, step: too("6"), want: Suppressed{RetryAfter: 1}},
		"MaxRetryAfter, ms": {step: policyStep{status: 503, header: []string{"retry-after-ms", "60001"}},
			want: Suppressed{RetryAfter: 1}},
		"date":                {step: too("Fri, 31 Dec 9999 23:59:59 GMT"), want: Suppressed{RetryAfter: 1}},
		"9223372037":          {step: too("9223372037"), want: Suppressed{RetryAfter: 1}},
		"1e30":                {step: too("1e30"), want: Suppressed{RetryAfter: 1}},
		"Inf":                 {step: too("Inf"), want: Suppressed{RetryAfter: 1}},
		"40 digits":           {step: too(strings.Repeat("9", 40)), want: Suppressed{RetryAfter: 1}},
		"9223372037, Backoff": {retry: RetryPolicy{Backoff: retryablehttp.DefaultBackoff}, step: too("9223372037"), want: Suppressed{RetryAfter: 1}},
		"no bound but the numbers'": {retry: RetryPolicy{MaxRetryAfter: math.MaxInt64}, deadline: time.Hour,
			step: too("9223372037"), want: Suppressed{Deadline: 1}},
		"deadline":                    {deadline: 5 * time.Second, step: too("7"), want: Suppressed{Deadline: 1}},
		"deadline exactly":            {deadline: 7 * time.Second, step: too("7"), want: Suppressed{Deadline: 1}},
		"deadline and backoff":        {deadline: time.Second, step: policyStep{status: 500}, want: Suppressed{Deadline: 1}},
		"deadline and custom Backoff": {retry: RetryPolicy{Backoff: policyFixedBackoff(time.Hour)}, deadline: time.Minute, step: policyStep{status: 500}, want: Suppressed{Deadline: 1}},
		"MaxElapsed":                  {retry: RetryPolicy{MaxElapsed: 5 * time.Second}, step: too("7"), want: Suppressed{Deadline: 1}},
		"MaxElapsed and backoff":      {retry: RetryPolicy{MaxElapsed: time.Second / 2}, step: policyStep{status: 500}, want: Suppressed{Deadline: 1}},
		"MaxElapsed, hugest wait": {retry: RetryPolicy{MaxElapsed: 2 * time.Second, MaxRetryAfter: math.MaxInt64},
			step: policyStep{status: 429, header: []string{"Retry-After", "Inf"}, takes: time.Second}, want: Suppressed{Deadline: 1}},
	} {
		policyBubble(t, name, func(t *testing.T) {
			req := policyRequest(t, http.MethodGet)
			if tt.deadline > 0 {
				ctx, cancel := context.WithTimeout(req.Context(), tt.deadline)
				defer cancel()
				req = req.WithContext(ctx)
			}
			base := &policyScript{steps: []policyStep{tt.step}}
			tr := policyTransport(base, tt.retry)
			start := time.Now()
			resp, err := tr.RoundTrip(req)
			require.NoError(t, err)
			assert.Equal(t, tt.step.takes, time.Since(start), "nothing waits")
			assert.Equal(t, tt.step.status, resp.StatusCode)
			assert.Equal(t, "answer 1", policyReadAll(t, resp))
			assert.Equal(t, policySeconds(0), base.at)
			assert.Equal(t, tt.want, policyStats(t, tr).Suppressed)
		})
	}
}

// An error, too, goes to the caller at once, as it came.
func TestDeadlineEndsRetriesOfErrors(t *testing.T) {
	policyBubble(t, "deadline", func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
		defer cancel()
		base := &policyScript{steps: []policyStep{{err: syscall.ECONNRESET}}}
		tr := policyTransport(base, RetryPolicy{Jitter: JitterNone})
		_, err := tr.RoundTrip(policyRequest(t, http.MethodGet).WithContext(ctx))
		assert.Equal(t, &RetryError{Attempts: 2, Err: syscall.ECONNRESET}, err)
		assert.Equal(t, policySeconds(0, 1), base.at)
		assert.Equal(t, Suppressed{Deadline: 1}, policyStats(t, tr).Suppressed)
	})
}

// MaxElapsed is about when a retry begins, from the request's start on; what
// attempts take counts.
func TestMaxElapsed(t *testing.T) {
	run := func(t *testing.T, maxElapsed, takes time.Duration) []time.Duration {
		base := &policyScript{steps: []policyStep{{status: 500, takes: takes}}}
		tr := policyTransport(base, RetryPolicy{Jitter: JitterNone, MaxAttempts: 9, MaxElapsed: maxElapsed})
		resp, err := tr.RoundTrip(policyRequest(t, http.MethodGet))
		require.NoError(t, err)
		assert.Equal(t, 500, resp.StatusCode)
		assert.Equal(t, Suppressed{Deadline: 1}, policyStats(t, tr).Suppressed)
		return base.at
	}
	policyBubble(t, "a retry may begin at that moment", func(t *testing.T) {
		assert.Equal(t, policySeconds(0, 1, 3), run(t, 3*time.Second, 0))
	})
	policyBubble(t, "but not after", func(t *testing.T) {
		assert.Equal(t, policySeconds(0, 1), run(t, 3*time.Second-1, 0))
	})
	policyBubble(t, "attempts take time", func(t *testing.T) {
		assert.Equal(t, policySeconds(0, 6), run(t, 12*time.Second, 5*time.Second))
	})
}

// Values that make no sense leave the wait to the backoff.
func TestServerWaitUnreadable(t *testing.T) {
	for _, value := range []string{"NaN", "-1", "-9223372037", "soon", "0", "1e-30", "Thu, 01 Jan 1970 00:00:00 GMT"} {
		policyBubble(t, value, func(t *testing.T) {
			base, _, err := policyTrip(t, RetryPolicy{Jitter: JitterNone}, policyRequest(t, http.MethodGet),
				policyStep{status: 429, header: []string{"Retry-After", value}})
			require.NoError(t, err)
			assert.Equal(t, policySeconds(0, 1, 3), base.at)
		})
	}
}

// No jitter and no Backoff of go-retryablehttp makes a wait shorter than asked.
func TestServerWaitIsNeverShortened(t *testing.T) {
	retries := map[string]RetryPolicy{
		"equal":        {Jitter: JitterEqual},
		"full":         {Jitter: JitterFull},
		"decorrelated": {Jitter: JitterDecorrelated},
		"none":         {Jitter: JitterNone},
	}
	for name, backoff := range map[string]retryablehttp.Backoff{
		"DefaultBackoff":               retryablehttp.DefaultBackoff,
		"LinearJitterBackoff":          retryablehttp.LinearJitterBackoff,
		"RateLimitLinearJitterBackoff": retryablehttp.RateLimitLinearJitterBackoff,
		"nothing":                      policyFixedBackoff(0),
		"negative":                     policyFixedBackoff(math.MinInt64),
	} {
		retries[name] = RetryPolicy{Backoff: backoff}
	}
	for name, r := range retries {
		policyBubble(t, name, func(t *testing.T) {
			const attempts = 30
			r.MaxAttempts, r.MinWait, r.MaxWait = attempts, time.Millisecond, 50*time.Millisecond
			for _, status := range []int{429, 500, 503} {
				base, _, err := policyTrip(t, r, policyRequest(t, http.MethodGet),
					policyStep{status: status, header: []string{"Retry-After", "3"}})
				require.NoError(t, err)
				require.Len(t, base.at, attempts)
				for _, wait := range base.gaps() {
					require.Equal(t, 3*time.Second, wait)
				}
			}
		})
	}
}

// A Backoff gets the bounds, the number of the retry from 0 and the response.
func TestCustomBackoff(t *testing.T) {
	policyBubble(t, "arguments", func(t *testing.T) {
		var calls []string
		backoff := func(low, high time.Duration, n int, resp *http.Response) time.Duration {
			status := 0
			if resp != nil {
				status = resp.StatusCode
			}
			calls = append(calls, fmt.Sprint(low, high, n, status))
			return time.Duration(n+1) * time.Minute
		}
		base, _, err := policyTrip(t, RetryPolicy{Backoff: backoff, MaxAttempts: 4, MinWait: 2 * time.Second}, policyRequest(t, http.MethodGet),
			policyStep{status: 503}, policyStep{err: io.EOF}, policyStep{status: 429})
		require.NoError(t, err)
		assert.Equal(t, []string{fmt.Sprint(2*time.Second, 10*time.Second, 0, 503), fmt.Sprint(2*time.Second, 10*time.Second, 1, 0),
			fmt.Sprint(2*time.Second, 10*time.Second, 2, 429)}, calls)
		assert.Equal(t, policySeconds(0, 60, 180, 360), base.at, "it may exceed MaxWait")
	})
	policyBubble(t, "DefaultBackoff", func(t *testing.T) {
		base, _, err := policyTrip(t, RetryPolicy{Backoff: retryablehttp.DefaultBackoff, MaxAttempts: 6}, policyRequest(t, http.MethodGet),
			policyStep{status: 500})
		require.NoError(t, err)
		assert.Equal(t, policySeconds(0, 1, 3, 7, 15, 25), base.at)
	})
	policyBubble(t, "negative", func(t *testing.T) {
		base := &policyScript{steps: []policyStep{{status: 500}}}
		tr := policyTransport(base, RetryPolicy{Backoff: policyFixedBackoff(-time.Hour)})
		tr.OnRetry = func(e RetryEvent) { assert.Zero(t, e.Wait) }
		_, err := tr.RoundTrip(policyRequest(t, http.MethodGet))
		require.NoError(t, err)
		assert.Equal(t, policySeconds(0, 0, 0), base.at)
	})
}

// The policies of go-retryablehttp plug in unchanged: what they retry is
// retried, and what they do not ends the request.
func TestCheckRetryOfRetryablehttp(t *testing.T) {
	untrusted := &tls.CertificateVerificationError{Err: x509.UnknownAuthorityError{}}
	scheme := errors.New(`unsupported protocol scheme "ftp"`)
	steps := []struct {
		step     policyStep
		attempts int
	}{
		{policyStep{status: 200}, 1}, {policyStep{status: 404}, 1}, {policyStep{status: 408}, 1}, {policyStep{status: 501}, 1},
		{policyStep{status: 429}, 3}, {policyStep{status: 500}, 3}, {policyStep{status: 529}, 3},
		{policyStep{err: syscall.ECONNRESET}, 3}, {policyStep{err: io.EOF}, 3},
		{policyStep{err: untrusted}, 1}, {policyStep{err: scheme}, 1}, {policyStep{err: errors.New("stopped after 10 redirects")}, 1},
		{policyStep{err: errors.New("net/http: invalid header field name")}, 1}, {policyStep{err: ErrRejected}, 1},
	}
	for name, check := range map[string]retryablehttp.CheckRetry{
		"DefaultRetryPolicy":         retryablehttp.DefaultRetryPolicy,
		"ErrorPropagatedRetryPolicy": retryablehttp.ErrorPropagatedRetryPolicy,
	} {
		for _, tt := range steps {
			policyBubble(t, fmt.Sprintf("%s %d %v", name, tt.step.status, tt.step.err), func(t *testing.T) {
				base, resp, err := policyTrip(t, RetryPolicy{CheckRetry: check}, policyRequest(t, http.MethodGet), tt.step)
				assert.Len(t, base.at, tt.attempts)
				switch {
				case tt.step.err == nil:
					require.NoError(t, err)
					assert.Equal(t, tt.step.status, resp.StatusCode)
					assert.Equal(t, fmt.Sprintf("answer %d", tt.attempts), policyReadAll(t, resp), "the body is readable")
				case tt.attempts == 1:
					assert.Equal(t, tt.step.err, err, "as it came: the outer client wraps it in a url.Error")
				default:
					assert.Equal(t, &RetryError{Attempts: 3, Err: tt.step.err}, err)
				}
			})
		}
	}
}

func TestCustomCheckRetryGetsURLErrors(t *testing.T) {
	policyBubble(t, "error", func(t *testing.T) {
		var got []error
		check := func(_ context.Context, resp *http.Response, err error) (bool, error) {
			assert.Nil(t, resp)
			got = append(got, err)
			return len(got) < 2, nil
		}
		req := policyRequest(t, http.MethodPost)
		req.URL, _ = url.Parse("https://user:secret@api.example.com/v1?key=secret")
		base, _, err := policyTrip(t, RetryPolicy{CheckRetry: check}, req, policyStep{err: io.EOF}, policyStep{err: io.ErrUnexpectedEOF})
		assert.Len(t, base.at, 2)
		assert.Equal(t, &RetryError{Attempts: 2, Err: io.ErrUnexpectedEOF}, err)
		require.Len(t, got, 2)
		wrapped, ok := got[0].(*url.Error)
		require.True(t, ok, "%T", got[0])
		assert.Equal(t, "Post", wrapped.Op)
		assert.Equal(t, io.EOF, wrapped.Err)
		assert.NotContains(t, wrapped.Error(), "secret")
		assert.Equal(t, `Post "https://api.example.com/v1": EOF`, wrapped.Error())
	})
	policyBubble(t, "method", func(t *testing.T) {
		req := policyRequest(t, http.MethodGet)
		req.Method = "" // means GET
		var got error
		check := func(_ context.Context, _ *http.Response, err error) (bool, error) { got = err; return false, nil }
		policyTrip(t, RetryPolicy{CheckRetry: check}, req, policyStep{err: io.EOF})
		assert.EqualError(t, got, `Get "https://api.example.com/v1": EOF`)
	})
}

func TestCustomCheckRetry(t *testing.T) {
	policyBubble(t, "any response", func(t *testing.T) {
		check := func(_ context.Context, resp *http.Response, _ error) (bool, error) {
			return resp.StatusCode == 202, nil
		}
		base, resp, err := policyTrip(t, RetryPolicy{CheckRetry: check}, policyRequest(t, http.MethodGet),
			policyStep{status: 202}, policyStep{status: 202}, policyStep{status: 200})
		require.NoError(t, err)
		assert.Equal(t, 200, resp.StatusCode)
		assert.Len(t, base.at, 3)
	})
	policyBubble(t, "its error replaces the response", func(t *testing.T) {
		mine := errors.New("mine")
		check := func(context.Context, *http.Response, error) (bool, error) { return false, mine }
		base, resp, err := policyTrip(t, RetryPolicy{CheckRetry: check}, policyRequest(t, http.MethodGet), policyStep{status: 200})
		assert.Nil(t, resp)
		assert.Same(t, mine, err)
		assert.Equal(t, int32(1), base.bodies[0].closes.Load(), "the response's body is closed")
	})
	policyBubble(t, "its error beside a retry means nothing", func(t *testing.T) {
		check := func(context.Context, *http.Response, error) (bool, error) { return true, errors.New("mine") }
		base, resp, err := policyTrip(t, RetryPolicy{CheckRetry: check}, policyRequest(t, http.MethodGet), policyStep{status: 200})
		require.NoError(t, err)
		assert.Len(t, base.at, 3)
		assert.Equal(t, "answer 3", policyReadAll(t, resp))
	})
	policyBubble(t, "the request's context", func(t *testing.T) {
		type key struct{}
		req := policyRequest(t, http.MethodGet)
		req = req.WithContext(context.WithValue(req.Context(), key{}, "value"))
		check := func(ctx context.Context, _ *http.Response, _ error) (bool, error) {
			assert.Equal(t, "value", ctx.Value(key{}))
			return false, nil
		}
		policyTrip(t, RetryPolicy{CheckRetry: check}, req, policyStep{status: 200})
	})
}

// What is rejected locally is never retried, whatever a CheckRetry says that
// does not know ErrRejected.
func TestRejectionsAreNeverRetried(t *testing.T) {
	always := func(context.Context, *http.Response, error) (bool, error) { return true, nil }
	policyBubble(t, "layer", func(t *testing.T) {
		base, calls := &policyScript{steps: []policyStep{{status: 200}}}, 0
		tr := policyTransport(base, RetryPolicy{CheckRetry: always})
		tr.Layers = []Layer{func(http.RoundTripper) http.RoundTripper {
			return policyBase(func(*http.Request) (*http.Response, error) {
				calls++
				return nil, fmt.Errorf("queue full: %w", ErrRejected)
			})
		}}
		_, err := tr.RoundTrip(policyRequest(t, http.MethodGet))
		assert.EqualError(t, err, "queue full: tripper: request rejected")
		assert.Equal(t, 1, calls)
	})
	policyBubble(t, "breaker that is about to let probes through", func(t *testing.T) {
		base := &policyScript{steps: []policyStep{{status: 200}}}
		tr := &Transport{Base: base, Policy: Policy{Service: "s", Retry: RetryPolicy{CheckRetry: always, Jitter: JitterNone}}}
		tr.Trip("s", time.Second/2) // less than the wait before a retry
		start := time.Now()
		_, err := tr.RoundTrip(policyRequest(t, http.MethodGet))
		var open *OpenError
		assert.ErrorAs(t, err, &open)
		assert.Zero(t, time.Since(start))
		assert.Empty(t, base.at)
	})
}

func TestCheckRetry(t *testing.T) {
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	check := func(ctx context.Context, resp *http.Response, err error) bool {
		retry, checkErr := CheckRetry(ctx, resp, err)
		assert.NoError(t, checkErr)
		return retry
	}
	for code := 100; code <= 700; code++ {
		want := code == 408 || code == 429 || code >= 500 && code <= 599
		assert.Equal(t, want, check(t.Context(), policyAnswer(code), nil), "%d", code)
		assert.Equal(t, code >= 400, check(t.Context(), policyAnswer(code, "x-should-retry", "true"), nil), "%d true", code)
		assert.False(t, check(t.Context(), policyAnswer(code, "x-should-retry", "false"), nil), "%d false", code)
		assert.Equal(t, want, check(t.Context(), policyAnswer(code, "x-should-retry", "maybe"), nil), "%d maybe", code)
		assert.False(t, check(ended, policyAnswer(code, "x-should-retry", "true"), nil), "%d ended", code)
	}
	assert.False(t, check(t.Context(), nil, nil))
	assert.True(t, check(t.Context(), &http.Response{StatusCode: 500}, nil), "no Header at all")

	for _, err := range []error{io.EOF, io.ErrUnexpectedEOF, syscall.ECONNRESET, syscall.ECONNREFUSED, syscall.EPIPE, policyDialError,
		os.ErrDeadlineExceeded, context.DeadlineExceeded, // of an attempt: the request's own context goes on
		errors.New("http: server closed idle connection"), &net.DNSError{IsNotFound: true}, http.ErrServerClosed} {
		assert.True(t, check(t.Context(), nil, err), "%v", err)
		assert.True(t, check(t.Context(), nil, &url.Error{Op: "Get", URL: "https://example.com", Err: err}), "%v", err)
		assert.False(t, check(ended, nil, err), "%v, ended", err)
	}
	for _, err := range []error{ErrRejected, &OpenError{}, errNoResponse, &replay.ReadError{Err: io.EOF},
		tls.RecordHeaderError{}, http.ErrSchemeMismatch, &tls.CertificateVerificationError{Err: x509.UnknownAuthorityError{}},
		x509.UnknownAuthorityError{}, x509.HostnameError{Certificate: &x509.Certificate{}}, x509.CertificateInvalidError{}, x509.SystemRootsError{}} {
		assert.False(t, check(t.Context(), nil, err), "%v", err)
		assert.False(t, check(t.Context(), nil, fmt.Errorf("wrapped: %w", err)), "wrapped %v", err)
		assert.False(t, check(t.Context(), nil, &url.Error{Op: "Get", URL: "https://example.com", Err: err}), "%v", err)
	}
}

// Errors as net/http makes them for requests that it cannot send.
func TestUnsendableRequestsHaveOneAttempt(t *testing.T) {
	for name, change := range map[string]func(*http.Request){
		"scheme":       func(r *http.Request) { r.URL.Scheme = "ftp" },
		"no scheme":    func(r *http.Request) { r.URL.Scheme = "" },
		"method":       func(r *http.Request) { r.Method = "G T" },
		"header name":  func(r *http.Request) { r.Header = http.Header{"a b": {"c"}} },
		"header value": func(r *http.Request) { r.Header.Set("A", "b\n") },
		"trailer":      func(r *http.Request) { r.Trailer = http.Header{"a b": {"c"}} },
		"nil header":   func(r *http.Request) { r.Header = nil },
	} {
		t.Run(name, func(t *testing.T) {
			base := &policyCount{base: &http.Transport{}}
			tr := &Transport{Base: base, Policy: policyQuick()}
			req := policyRequest(t, http.MethodPost)
			change(req)
			_, err := tr.RoundTrip(req)
			require.Error(t, err)
			assert.Equal(t, int32(1), base.attempts.Load(), "%v", err)
			assert.NotContains(t, err.Error(), "attempts")
			assert.Equal(t, uint64(1), policyStats(t, tr).Ignored, "it says nothing about the service")
		})
	}
	t.Run("nil URL", func(t *testing.T) {
		base := &policyCount{base: &http.Transport{}}
		_, err := (&Transport{Base: base, Policy: policyQuick()}).RoundTrip(&http.Request{Header: http.Header{}})
		assert.EqualError(t, err, "http: nil Request.URL")
		assert.Equal(t, int32(1), base.attempts.Load())
	})
}

// A request whose body fails to read is not sent again.
func TestUnreadableBodyHasOneAttempt(t *testing.T) {
	srv := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { _, _ = io.Copy(io.Discard, r.Body) }))
	defer srv.Close()
	mine := errors.New("disk on fire")
	base := &policyCount{base: srv.Client().Transport}
	tr := &Transport{Base: base, Policy: policyQuick()}
	body := io.MultiReader(strings.NewReader("hello"), iotest.ErrReader(mine))
	_, err := (&http.Client{Transport: tr}).Post(srv.URL, "text/plain", body)
	assert.ErrorIs(t, err, mine)
	assert.Equal(t, int32(1), base.attempts.Load())
}

// Certificates do not get better by asking again, and a server that speaks no
// TLS does not learn it.
func TestTLSErrorsHaveOneAttempt(t *testing.T) {
	quiet := func(srv *httptest.Server) *httptest.Server {
		srv.Config.ErrorLog = log.New(io.Discard, "", 0)
		return srv
	}
	ok := http.HandlerFunc(func(http.ResponseWriter, *http.Request) {})
	secure := quiet(httptest.NewUnstartedServer(ok))
	secure.StartTLS()
	defer secure.Close()
	strict := quiet(httptest.NewUnstartedServer(ok))
	strict.TLS = &tls.Config{ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: x509.NewCertPool(),
		MaxVersion: tls.VersionTLS12} // whose alert comes within the handshake
	strict.StartTLS()
	defer strict.Close()
	plain := quiet(httptest.NewServer(ok))
	defer plain.Close()
	pool := x509.NewCertPool()
	pool.AddCert(secure.Certificate())
	century := func() time.Time { return time.Now().AddDate(100, 0, 0) }
	var (
		unknown  x509.UnknownAuthorityError
		hostname x509.HostnameError
		expired  x509.CertificateInvalidError
		record   tls.RecordHeaderError
		remote   *net.OpError
	)
	for _, tt := range []struct {
		name   string
		url    string
		config *tls.Config
		target any
	}{
		{"unknown authority", secure.URL, &tls.Config{}, &unknown},
		{"other host", secure.URL, &tls.Config{RootCAs: pool, ServerName: "other.test"}, &hostname},
		{"expired", secure.URL, &tls.Config{RootCAs: pool, Time: century}, &expired},
		{"client certificate refused", strict.URL, &tls.Config{RootCAs: pool, Certificates: secure.TLS.Certificates}, &remote},
		{"no TLS", strings.Replace(plain.URL, "http:", "https:", 1), &tls.Config{}, &record},
	} {
		t.Run(tt.name, func(t *testing.T) {
			real := &http.Transport{TLSClientConfig: tt.config}
			defer real.CloseIdleConnections()
			base := &policyCount{base: real}
			tr := &Transport{Base: base, Policy: policyQuick()}
			req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, tt.url, nil)
			require.NoError(t, err)
			_, err = tr.RoundTrip(req)
			require.ErrorAs(t, err, tt.target)
			assert.Equal(t, int32(1), base.attempts.Load())
			for s := range tr.All() {
				assert.Equal(t, uint64(1), s.Failures, "but the breaker counts it")
			}
		})
	}
	_, err := (&http.Client{Transport: &Transport{}}).Get(strings.Replace(plain.URL, "http:", "https:", 1))
	assert.ErrorIs(t, err, http.ErrSchemeMismatch, "http.Client still recognises it")
}

// policyResults are the results of an attempt, and whether it provably did
// nothing at the server.
var policyResults = []struct {
	name string
	step policyStep
	idle bool
}{
	{"408", policyStep{status: 408}, false},
	{"429", policyStep{status: 429}, true},
	{"500", policyStep{status: 500}, false},
	{"502", policyStep{status: 502}, false},
	{"503", policyStep{status: 503}, true},
	{"504", policyStep{status: 504}, false},
	{"529", policyStep{status: 529}, true},
	{"409 with x-should-retry", policyStep{status: 409, header: []string{"x-should-retry", "true"}}, false},
	{"reset", policyStep{err: &net.OpError{Op: "read", Err: syscall.ECONNRESET}}, false},
	{"write", policyStep{err: &net.OpError{Op: "write", Err: syscall.EPIPE}}, false},
	{"EOF", policyStep{err: io.EOF}, false},
	{"timeout", policyStep{err: os.ErrDeadlineExceeded}, false},
	{"dial", policyStep{err: policyDialError}, true},
	{"dial, wrapped", policyStep{err: fmt.Errorf("wrapped: %w", policyDialError)}, true},
	{"proxy", policyStep{err: &net.OpError{Op: "proxyconnect", Err: io.EOF}}, true},
	{"REFUSED_STREAM", policyStep{err: policyStreamError{StreamID: 3, Code: 0x7}}, true},
	{"REFUSED_STREAM, wrapped", policyStep{err: fmt.Errorf("wrapped: %w", policyStreamError{Code: 0x7})}, true},
	{"CANCEL", policyStep{err: policyStreamError{Code: 0x8}}, false},
	{"INTERNAL_ERROR", policyStep{err: policyStreamError{Code: 0x2}}, false},
	{"no connection", policyStep{err: io.EOF, trace: func(c *httptrace.ClientTrace) { c.GetConn("") }}, true},
	{"connection", policyStep{err: io.EOF, trace: policyConnected}, false},
}

func policyConnected(c *httptrace.ClientTrace) {
	c.GetConn("")
	c.GotConn(httptrace.GotConnInfo{})
}

func TestReplaySafe(t *testing.T) {
	for _, tt := range []struct {
		method, key string
		safe        bool
	}{
		{"", "", true}, {"GET", "", true}, {"HEAD", "", true}, {"OPTIONS", "", true}, {"TRACE", "", true}, {"PUT", "", true}, {"DELETE", "", true},
		{"POST", "", false}, {"PATCH", "", false}, {"CONNECT", "", false}, {"PROPFIND", "", false}, {"get", "", false},
		{"POST", "Idempotency-Key", true}, {"PATCH", "Idempotency-Key", true}, {"POST", "X-Idempotency-Key", true}, {"POST", "X-Request-Id", false},
	} {
		for _, result := range policyResults {
			policyBubble(t, fmt.Sprintf("%s %s %s", tt.method, tt.key, result.name), func(t *testing.T) {
				req := policyRequest(t, tt.method)
				req.Method = tt.method
				if tt.key != "" {
					req.Header.Set(tt.key, "1")
				}
				base := &policyScript{steps: []policyStep{result.step}}
				tr := policyTransport(base, RetryPolicy{Replay: ReplaySafe})
				resp, err := tr.RoundTrip(req)
				want, suppressed := 1, uint64(1)
				if tt.safe || result.idle {
					want, suppressed = 3, 0
				}
				assert.Len(t, base.at, want)
				assert.Equal(t, Suppressed{Method: suppressed}, policyStats(t, tr).Suppressed)
				if result.step.err == nil {
					require.NoError(t, err)
					assert.Equal(t, fmt.Sprintf("answer %d", want), policyReadAll(t, resp))
				} else {
					assert.ErrorIs(t, err, result.step.err)
				}
			})
		}
	}
}

func TestReplayAnyRetriesEveryMethod(t *testing.T) {
	for _, method := range []string{"GET", "POST", "PATCH", "DELETE", "PROPFIND"} {
		for _, result := range policyResults {
			policyBubble(t, method+" "+result.name, func(t *testing.T) {
				base, _, _ := policyTrip(t, RetryPolicy{}, policyRequest(t, method), result.step)
				assert.Len(t, base.at, 3)
			})
		}
	}
}

// A key that is present but empty promises as much, and is not sent: net/http
// reads it so.
func TestReplaySafeWithAnEmptyKey(t *testing.T) {
	policyBubble(t, "POST", func(t *testing.T) {
		req := policyRequest(t, http.MethodPost)
		req.Header["Idempotency-Key"] = nil
		base, _, _ := policyTrip(t, RetryPolicy{Replay: ReplaySafe, IdempotencyKey: true}, req, policyStep{status: 500})
		assert.Len(t, base.at, 3)
		assert.Empty(t, base.headers[0].Values("Idempotency-Key"))
	})
}

// Each attempt is judged by its own connection.
func TestReplaySafeLooksAtTheLatestAttempt(t *testing.T) {
	lost := policyStep{err: io.EOF, trace: func(c *httptrace.ClientTrace) { c.GetConn("") }}
	sent := policyStep{err: io.EOF, trace: policyConnected}
	policyBubble(t, "sent after lost", func(t *testing.T) {
		base, _, err := policyTrip(t, RetryPolicy{Replay: ReplaySafe}, policyRequest(t, http.MethodPost), lost, sent)
		assert.Len(t, base.at, 2)
		assert.Equal(t, &RetryError{Attempts: 2, Err: io.EOF}, err)
	})
	policyBubble(t, "lost after refused", func(t *testing.T) {
		refused := policyStep{status: 503, trace: policyConnected}
		base, _, err := policyTrip(t, RetryPolicy{Replay: ReplaySafe}, policyRequest(t, http.MethodPost), refused, lost, sent)
		assert.Len(t, base.at, 3)
		assert.Equal(t, &RetryError{Attempts: 3, Err: io.EOF}, err)
	})
}

// Real failures to connect: a port that nobody listens at, and a server that
// hangs up instead of a TLS handshake.
func TestReplaySafeRetriesWhatWasNeverSent(t *testing.T) {
	silent, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	require.NoError(t, silent.Close())
	rude, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer rude.Close()
	go func() {
		for {
			conn, err := rude.Accept()
			if err != nil {
				return
			}
			_, _ = conn.Read(make([]byte, 1)) // the handshake has begun
			conn.Close()
		}
	}()
	post := func(t *testing.T, url string) (attempts int32, err error) {
		real := &http.Transport{}
		defer real.CloseIdleConnections()
		base := &policyCount{base: real}
		p := policyQuick()
		p.Retry.Replay = ReplaySafe
		_, err = (&http.Client{Transport: &Transport{Base: base, Policy: p}}).Post(url, "text/plain", strings.NewReader("hello"))
		return base.attempts.Load(), err
	}
	t.Run("dial", func(t *testing.T) {
		attempts, err := post(t, "http://"+silent.Addr().String())
		assert.ErrorIs(t, err, syscall.ECONNREFUSED)
		assert.Equal(t, int32(3), attempts)
	})
	t.Run("TLS handshake", func(t *testing.T) {
		attempts, err := post(t, "https://"+rude.Addr().String())
		assert.Error(t, err)
		assert.Equal(t, int32(3), attempts)
	})
	t.Run("hang-up after the request", func(t *testing.T) {
		attempts, err := post(t, "http://"+rude.Addr().String())
		assert.Error(t, err)
		assert.Equal(t, int32(1), attempts, "it may have been executed")
	})
}

func TestIdempotencyKey(t *testing.T) {
	keys := func(base *policyScript) (keys []string) {
		for _, h := range base.headers {
			keys = append(keys, h.Get("Idempotency-Key"))
		}
		return keys
	}
	r := RetryPolicy{IdempotencyKey: true}
	for _, method := range []string{http.MethodPost, http.MethodPatch} {
		policyBubble(t, method, func(t *testing.T) {
			seen := map[string]bool{}
			for range 2 {
				req := policyRequest(t, method)
				req.Header.Set("A", "b")
				base, resp, err := policyTrip(t, r, req, policyStep{status: 500}, policyStep{err: io.EOF}, policyStep{status: 200})
				require.NoError(t, err)
				got := keys(base)
				require.Len(t, got, 3)
				assert.GreaterOrEqual(t, len(got[0]), 20, "hard to guess")
				assert.Equal(t, got[:1], slices.Compact(got), "the same on every attempt")
				assert.Equal(t, "b", base.headers[2].Get("A"))
				assert.Equal(t, http.Header{"A": {"b"}}, req.Header, "the caller's header is not changed")
				assert.Same(t, req, resp.Request)
				seen[got[0]] = true
			}
			assert.Len(t, seen, 2, "each request has its own")
		})
	}
	for _, method := range []string{"", "GET", "HEAD", "PUT", "DELETE", "OPTIONS", "PROPFIND"} {
		policyBubble(t, "not for "+method, func(t *testing.T) {
			req := policyRequest(t, method)
			req.Method = method
			base, _, _ := policyTrip(t, r, req, policyStep{status: 500})
			assert.Equal(t, []string{"", "", ""}, keys(base))
		})
	}
	for _, name := range []string{"Idempotency-Key", "X-Idempotency-Key"} {
		policyBubble(t, "the caller's own "+name, func(t *testing.T) {
			req := policyRequest(t, http.MethodPost)
			req.Header.Set(name, "mine")
			base, _, _ := policyTrip(t, r, req, policyStep{status: 500})
			require.Len(t, base.headers, 3)
			for _, h := range base.headers {
				assert.Equal(t, http.Header{name: {"mine"}}, h)
			}
		})
	}
	policyBubble(t, "makes a POST safe", func(t *testing.T) {
		base, _, _ := policyTrip(t, RetryPolicy{IdempotencyKey: true, Replay: ReplaySafe}, policyRequest(t, http.MethodPost), policyStep{err: io.EOF})
		assert.Len(t, base.at, 3)
	})
	policyBubble(t, "also with one attempt", func(t *testing.T) {
		base, _, _ := policyTrip(t, RetryPolicy{IdempotencyKey: true, MaxAttempts: 1}, policyRequest(t, http.MethodPost), policyStep{status: 200})
		assert.NotEmpty(t, base.headers[0].Get("Idempotency-Key"))
	})
	policyBubble(t, "no header at all", func(t *testing.T) {
		req := policyRequest(t, http.MethodPost)
		req.Header = nil
		base, _, _ := policyTrip(t, r, req, policyStep{status: 200})
		assert.NotEmpty(t, base.headers[0].Get("Idempotency-Key"))
		assert.Nil(t, req.Header)
	})
	policyBubble(t, "survives Prepare", func(t *testing.T) {
		r := RetryPolicy{IdempotencyKey: true, Prepare: func(req *http.Request) error { req.Header.Set("Signature", "new"); return nil }}
		req := policyRequest(t, http.MethodPost)
		base, _, _ := policyTrip(t, r, req, policyStep{status: 500})
		assert.Len(t, slices.Compact(keys(base)), 1)
		assert.Equal(t, "new", base.headers[2].Get("Signature"))
		assert.Empty(t, req.Header)
	})
}

// Each step asks for retries at a time, when the service has had so many
// requests, and says how many it gets.
func TestBudgetSteps(t *testing.T) {
	type step struct {
		at       time.Duration
		requests uint64
		ask      int
		want     int
	}
	standard := DefaultPolicy().Retry.Budget
	for _, tt := range []struct {
		name   string
		budget Budget
		steps  []step
	}{
		{"fresh: ten seconds' worth", standard, []step{{0, 1, 500, 100}, {0, 1, 9, 0}}},
		{"earns by time", standard, []step{{0, 0, 500, 100}, {time.Second, 0, 50, 10}, {time.Second, 0, 50, 0}, {1500 * time.Millisecond, 0, 50, 5}}},
		{"earns by requests", standard, []step{{0, 0, 500, 100}, {0, 1000, 500, 200}, {0, 1000, 500, 0}, {0, 1010, 500, 2}}},
		{"earns by both", standard, []step{{0, 0, 500, 100}, {time.Second, 1000, 500, 210}, {2 * time.Second, 2000, 500, 210}}},
		{"long idle: ten seconds' worth", standard, []step{{0, 0, 500, 100}, {time.Hour, 0, 500, 100}, {time.Hour, 0, 500, 0}}},
		{"long busy without retries: ten seconds' worth", standard, []step{
			{0, 0, 500, 100}, {time.Hour, 3600 * 1000, 9999, 100 + 2000}, {time.Hour, 3600 * 1000, 9999, 0}}},
		{"what was saved goes stale", standard, []step{{10 * time.Second, 10000, 1, 1}, {time.Minute, 10000, 9999, 100}}},
		{"ratio alone", Budget{Ratio: 0.5}, []step{{0, 1, 9, 0}, {0, 2, 9, 1}, {0, 3, 9, 0}, {0, 4, 9, 1}, {time.Second, 4, 9, 0}}},
		{"ratio above one", Budget{Ratio: 2}, []step{{0, 1, 9, 2}, {0, 2, 9, 2}}},
		{"time alone", Budget{MinPerSecond: 1}, []step{{0, 999, 99, 10}, {time.Second, 9999, 99, 1}, {time.Hour, 99999, 99, 10}}},
		{"a retry every ten seconds", Budget{MinPerSecond: 0.1}, []step{{0, 1, 9, 1}, {9 * time.Second, 2, 9, 0}, {11 * time.Second, 3, 9, 1}}},
		{"none", Budget{Ratio: -1}, []step{{0, 0, 9999, 9999}}},
		{"none, whatever else", Budget{Ratio: -0.1, MinPerSecond: 1}, []step{{0, 0, 9999, 9999}}},
		{"a count that went back", Budget{Ratio: 0.5}, []step{{0, 4, 9, 2}, {0, 3, 9, 0}, {0, 3, 9, 0}}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			start := time.Now()
			b := newBucket(tt.budget, start)
			for i, s := range tt.steps {
				got := 0
				for range s.ask {
					if b.spend(tt.budget, start.Add(s.at), s.requests) {
						got++
					}
				}
				require.Equal(t, s.want, got, "step %d", i)
			}
		})
	}
}

// A trickle of requests that all need their retries never notices the budget.
func TestBudgetIgnoresATrickle(t *testing.T) {
	budget, start := DefaultPolicy().Retry.Budget, time.Now()
	for _, rate := range []struct {
		every   time.Duration
		retries int
	}{{time.Second, 2}, {time.Minute, 9}, {250 * time.Millisecond, 2}} {
		b := newBucket(budget, start)
		for i := range 10000 {
			for range rate.retries {
				if !b.spend(budget, start.Add(time.Duration(i)*rate.every), uint64(i)) {
					t.Fatalf("request %d of one every %v", i, rate.every)
				}
			}
		}
	}
}

// In an outage, retries come to 20% of the requests and ten a second.
func TestBudgetLimitsAnOutage(t *testing.T) {
	budget, start := DefaultPolicy().Retry.Budget, time.Now()
	for _, rate := range []int{100, 1000, 3000} {
		b, retries := newBucket(budget, start), 0
		const seconds = 60
		for i := range rate * seconds {
			now := start.Add(time.Duration(i) * time.Second / time.Duration(rate))
			for range 2 {
				if b.spend(budget, now, uint64(i+1)) {
					retries++
				}
			}
		}
		want := 0.2*float64(rate*seconds) + 10*seconds + 100
		assert.InDelta(t, want, retries, 0.01*want, "%d requests a second", rate)
	}
}

// An outage under many callers at once: the budget holds, and who gets no
// retry gets the answer in hand.
func TestBudgetHoldsUnderConcurrency(t *testing.T) {
	policyBubble(t, "outage", func(t *testing.T) {
		const requests = 500
		var attempts atomic.Int64
		base := policyBase(func(*http.Request) (*http.Response, error) {
			attempts.Add(1)
			return policyAnswer(503), nil
		})
		tr := policyTransport(base, RetryPolicy{MinWait: time.Second, MaxWait: time.Second})
		var wg sync.WaitGroup
		for range requests {
			wg.Go(func() {
				resp, err := tr.RoundTrip(policyRequest(t, http.MethodGet))
				if assert.NoError(t, err) {
					assert.Equal(t, 503, resp.StatusCode)
					assert.Equal(t, "answer", policyReadAll(t, resp))
				}
			})
		}
		wg.Wait()
		s := policyStats(t, tr)
		retries := int(attempts.Load()) - requests
		assert.LessOrEqual(t, retries, 100+requests/5+10*2, "a burst, a fifth, and ten for each of two seconds")
		assert.GreaterOrEqual(t, retries, 100)
		assert.Equal(t, uint64(retries), s.Retries)
		assert.Equal(t, uint64(requests), s.Exhausted+s.Suppressed.Budget)
		assert.Positive(t, s.Suppressed.Budget)
	})
}

func TestBudgetSuppressesRetries(t *testing.T) {
	policyBubble(t, "response in hand", func(t *testing.T) {
		base := &policyScript{steps: []policyStep{{status: 503}}}
		tr := policyTransport(base, RetryPolicy{Budget: Budget{MinPerSecond: 0.1}, Jitter: JitterNone})
		body := &policyBody{Reader: strings.NewReader("hello")}
		req := policyRequest(t, http.MethodPost)
		req.Body = body
		start := time.Now()
		resp, err := tr.RoundTrip(req)
		require.NoError(t, err)
		assert.Equal(t, 503, resp.StatusCode)
		assert.Equal(t, "answer 2", policyReadAll(t, resp))
		assert.Equal(t, time.Second, time.Since(start), "one retry, and no wait for the next")
		s := policyStats(t, tr)
		assert.Equal(t, Suppressed{Budget: 1}, s.Suppressed)
		assert.Equal(t, uint64(1), s.Retries)
		assert.Zero(t, s.Exhausted)
		assert.Equal(t, int32(1), body.closes.Load())
	})
	policyBubble(t, "error in hand", func(t *testing.T) {
		base := &policyScript{steps: []policyStep{{err: io.EOF}}}
		tr := policyTransport(base, RetryPolicy{Budget: Budget{Ratio: 0.5}})
		_, err := tr.RoundTrip(policyRequest(t, http.MethodGet))
		assert.Equal(t, io.EOF, err)
		assert.Equal(t, Suppressed{Budget: 1}, policyStats(t, tr).Suppressed)
		_, err = tr.RoundTrip(policyRequest(t, http.MethodGet))
		assert.Equal(t, &RetryError{Attempts: 2, Err: io.EOF}, err, "two requests have earned one retry")
	})
	policyBubble(t, "unlimited", func(t *testing.T) {
		base := &policyScript{steps: []policyStep{{status: 500}}}
		tr := policyTransport(base, RetryPolicy{Budget: Budget{Ratio: -1}, MaxAttempts: 1000, MinWait: 1, MaxWait: 1})
		_, err := tr.RoundTrip(policyRequest(t, http.MethodGet))
		require.NoError(t, err)
		assert.Len(t, base.at, 1000)
	})
	policyBubble(t, "of the service, not of the host", func(t *testing.T) {
		base := &policyScript{steps: []policyStep{{status: 500}}}
		tr := policyTransport(base, RetryPolicy{Budget: Budget{MinPerSecond: 0.1}})
		tr.Policy.Service = "both"
		for _, host := range []string{"a.example", "b.example"} {
			req := policyRequest(t, http.MethodGet)
			req.URL.Host = host
			_, err := tr.RoundTrip(req)
			require.NoError(t, err)
		}
		assert.Len(t, base.at, 3, "one retry for both")
	})
}

func TestDefaultOutcome(t *testing.T) {
	for code := 100; code <= 700; code++ {
		want := Success
		switch {
		case code == 408, code == 429, code >= 500 && code <= 599:
			want = Failure
		case code >= 400:
			want = Ignored
		}
		assert.Equal(t, want, DefaultOutcome(policyAnswer(code), nil), "%d", code)
		assert.Equal(t, want, DefaultOutcome(policyAnswer(code, "x-should-retry", "true"), nil), "%d: that is about retries", code)
	}
	for _, err := range []error{io.EOF, syscall.ECONNREFUSED, policyDialError, context.DeadlineExceeded, os.ErrDeadlineExceeded,
		&tls.CertificateVerificationError{Err: x509.UnknownAuthorityError{}}, tls.RecordHeaderError{}, errNoResponse, policyStreamError{Code: 7}} {
		assert.Equal(t, Failure, DefaultOutcome(nil, err), "%v", err)
	}
	for _, err := range []error{context.Canceled, ErrRejected, &OpenError{}, &replay.ReadError{Err: io.EOF},
		errors.New(`unsupported protocol scheme "ftp"`), errors.New(`net/http: invalid header field value for "A"`)} {
		assert.Equal(t, Ignored, DefaultOutcome(nil, err), "%v", err)
		assert.Equal(t, Ignored, DefaultOutcome(nil, fmt.Errorf("wrapped: %w", err)), "%v", err)
	}
	assert.Equal(t, Failure, DefaultOutcome(nil, nil))
}

func TestServiceNames(t *testing.T) {
	for _, tt := range []struct{ scheme, host, want string }{
		{"https", "api.example.com", "api.example.com"},
		{"https", "API.Example.COM", "api.example.com"},
		{"https", "api.example.com.", "api.example.com"},
		{"https", "api.example.com:443", "api.example.com"},
		{"https", "API.example.com.:443", "api.example.com"},
		{"https", "api.example.com:", "api.example.com"},
		{"https", "api.example.com:80", "api.example.com:80"},
		{"https", "api.example.com.:8443", "api.example.com:8443"},
		{"http", "api.example.com", "api.example.com"},
		{"http", "api.example.com:80", "api.example.com"},
		{"http", "api.example.com:443", "api.example.com:443"},
		{"http", "localhost:8080", "localhost:8080"},
		{"http", "10.0.0.1:80", "10.0.0.1"},
		{"http", "[::1]", "[::1]"},
		{"http", "[::1]:80", "[::1]"},
		{"http", "[::1]:8080", "[::1]:8080"},
		{"https", "[2001:DB8::1]:443", "[2001:db8::1]"},
		{"http", "[2001:DB8::1]:443", "[2001:db8::1]:443"},
	} {
		c := (&Transport{}).load()
		for range 3 { // by the long way, and by the shortcut
			assert.Equal(t, tt.want, policyServiceOf(c, tt.scheme, tt.host), "%s://%s", tt.scheme, tt.host)
		}
	}
}

// Aliases of one host are one service, also when it is reached by the shortcut.
func TestAliasesAreOneService(t *testing.T) {
	hosts := []string{"API.example.com", "api.example.com.", "api.example.com:443", "api.example.com", "Api.Example.Com.:443"}
	for _, patterns := range []map[string]Policy{nil, {"API.example.com": {}}, {"api.example.com.:443": {}}, {"*.Example.com.": {}}, {"other.example:80": {}}} {
		base := policyBase(func(*http.Request) (*http.Response, error) { return policyAnswer(200), nil })
		tr := &Transport{Base: base, Hosts: patterns}
		for _, host := range slices.Concat(hosts, hosts) {
			req := policyRequest(t, http.MethodGet)
			req.URL.Host = host
			resp, err := tr.RoundTrip(req)
			require.NoError(t, err)
			resp.Body.Close()
		}
		assert.Equal(t, uint64(2*len(hosts)), policyStats(t, tr).Requests, "%v", patterns)
	}
}

func TestHostsPrecedence(t *testing.T) {
	patterns := []string{"api.example.com:8443", "api.example.com", "*.example.com", "*.eu.example.com", "*.com", "*.example.com:9000",
		"localhost:8080", "127.0.0.1", "[::1]:9000", "[::1]", "secure.test:443", "plain.test:80", "PLAIN.test."}
	tr := &Transport{Hosts: map[string]Policy{}}
	for i, pattern := range patterns {
		tr.Hosts[pattern] = Policy{Timeout: time.Duration(i + 1)}
	}
	require.NoError(t, tr.Validate())
	c := tr.load()
	for _, tt := range []struct{ scheme, host, want string }{
		{"https", "api.example.com:8443", "api.example.com:8443"},
		{"https", "API.example.com.:8443", "api.example.com:8443"},
		{"https", "api.example.com", "api.example.com"},
		{"https", "api.example.com:443", "api.example.com"},
		{"http", "api.example.com:1234", "api.example.com"},
		{"https", "api.example.com:9000", "api.example.com"}, // the host before the wildcard's port
		{"https", "www.example.com", "*.example.com"},
		{"https", "WWW.Example.Com.", "*.example.com"},
		{"https", "www.example.com:9000", "*.example.com:9000"},
		{"https", "a.b.example.com", "*.example.com"},
		{"https", "a.eu.example.com", "*.eu.example.com"},
		{"https", "a.b.eu.example.com", "*.eu.example.com"},
		{"https", "a.eu.example.com:9000", "*.eu.example.com"}, // the longest wildcard before the port
		{"https", "eu.example.com", "*.example.com"},
		{"https", "example.com", "*.com"},
		{"https", "notexample.com", "*.com"},
		{"https", "com", ""},
		{"https", "example.org", ""},
		{"http", "localhost:8080", "localhost:8080"},
		{"http", "localhost", ""},
		{"http", "localhost:80800", ""},
		{"http", "127.0.0.1:5000", "127.0.0.1"},
		{"http", "[::1]:9000", "[::1]:9000"},
		{"http", "[::1]:80", "[::1]"},
		{"http", "[::2]", ""},
		{"https", "secure.test", "secure.test:443"},
		{"https", "secure.test:443", "secure.test:443"},
		{"http", "secure.test:443", "secure.test:443"},
		{"http", "secure.test", ""},
		{"http", "plain.test", "plain.test:80"},
		{"https", "plain.test", "PLAIN.test."},
		{"https", "plain.test:80", "plain.test:80"},
	} {
		for range 3 {
			_, p := c.route(&http.Request{URL: &url.URL{Scheme: tt.scheme, Host: tt.host}})
			got := ""
			if p.Timeout > 0 {
				got = patterns[p.Timeout-1]
			}
			assert.Equal(t, tt.want, got, "%s://%s", tt.scheme, tt.host)
		}
	}
}

// A host's policy stands alone: its zero fields do not fall back on Policy.
func TestHostPolicyStandsAlone(t *testing.T) {
	tr := &Transport{Policy: Policy{Service: "all", Timeout: time.Hour, Retry: RetryPolicy{MaxAttempts: 9}},
		Hosts: map[string]Policy{"api.example.com": {Idle: 1}}}
	_, p := tr.load().route(policyRequest(t, http.MethodGet))
	assert.Equal(t, Policy{Idle: 1}.withDefaults(), p.Policy)
	_, ok := tr.Stats("api.example.com")
	assert.True(t, ok, "a service of its own, from the start")
}

// A pattern without a port gives its policy to every port; each port is a
// service all the same, as without Hosts, so that a broken one does not take
// its neighbours along.
func TestPortsAreServicesOfTheirOwn(t *testing.T) {
	for name, hosts := range map[string]map[string]Policy{"no Hosts": nil, "host": {"localhost": {Timeout: 1}}, "Service": {"localhost": {Service: "local"}}} {
		c := (&Transport{Hosts: hosts}).load()
		want := []string{"localhost", "localhost:8080", "localhost:9090"}
		if name == "Service" {
			want = []string{"local", "local", "local"}
		}
		for i, host := range []string{"localhost", "localhost:8080", "localhost:9090"} {
			assert.Equal(t, want[i], policyServiceOf(c, "http", host), name)
		}
	}
}

func TestServiceOfATransport(t *testing.T) {
	tr := &Transport{
		Service: func(req *http.Request) string { return req.Header.Get("Model") },
		Policy:  Policy{Service: "default"},
		Hosts:   map[string]Policy{"api.example.com": {Timeout: 1}, "*.example.com": {Service: "wild", Timeout: 2}},
	}
	c := tr.load()
	for _, tt := range []struct {
		model, host, service string
		timeout              time.Duration
	}{
		{"opus", "api.example.com", "opus", 1},
		{"", "api.example.com", "api.example.com", 1},
		{"", "x.example.com", "wild", 2},
		{"", "example.org", "default", 0},
		{"haiku", "example.org", "haiku", 0},
	} {
		for range 2 {
			req := &http.Request{URL: &url.URL{Scheme: "https", Host: tt.host}, Header: http.Header{"Model": {tt.model}}}
			s, p := c.route(req)
			assert.Equal(t, tt.service, s.host)
			assert.Equal(t, tt.timeout, p.Timeout)
		}
	}
}

func FuzzHost(f *testing.F) {
	for _, host := range []string{"api.example.com", "API.example.com.:443", "localhost:8080", "[::1]:80", "[2001:DB8::1]", "a..", "a::443", "a:.",
		":8080", ".", "::", "[", "]:", "\u0130.example", "a\xffB", "*.example.com", "a:80:443", "a:b", "%41.example", "[fe80::1%25En0]:80"} {
		f.Add(host)
	}
	f.Fuzz(func(t *testing.T, host string) {
		hp := canonicalHost(host) // of anything that a hand-made URL may hold
		if hp.host != strings.ToLower(hp.host) {
			t.Errorf("%q: host %q", host, hp.host)
		}
		used := (&Transport{}).load()
		policyServiceOf(used, "https", host)

		u, err := url.Parse("https://" + host + "/")
		if err != nil || u.Host == "" {
			return // net/http could not send it
		}
		name := policyJoin(canonicalHost(u.Host))
		if again := policyJoin(canonicalHost(name)); again != name {
			t.Errorf("%q: canonical %q, then %q", u.Host, name, again)
		}
		policyCheckHistory(t, used, u.Host, name, strings.ToUpper(name), name+".", hp.host+":443", hp.host+":80")
	})
}

// policyCheckHistory checks that which service a host belongs to does not
// depend on what was asked before.
func policyCheckHistory(t *testing.T, used *chain, hosts ...string) {
	for range 2 {
		for _, host := range hosts {
			for _, scheme := range []string{"https", "http"} {
				if u, err := url.Parse(scheme + "://" + host); err != nil || u.Host != host {
					continue
				}
				fresh := policyServiceOf((&Transport{}).load(), scheme, host)
				if got := policyServiceOf(used, scheme, host); got != fresh {
					t.Errorf("%s %q: service %q, then %q", scheme, host, fresh, got)
				}
			}
		}
	}
}

func FuzzHostPattern(f *testing.F) {
	for _, pattern := range []string{"api.example.com", "*.Example.com.:8443", "*", "http://a/", "a@b", "[::1]:1", "[::1", "::1", "a:080", "*.a..", "a b"} {
		f.Add(pattern)
	}
	f.Fuzz(func(t *testing.T, pattern string) {
		tr := &Transport{Hosts: map[string]Policy{pattern: {Timeout: 7}}}
		hp, err := parsePattern(pattern)
		if (err == nil) != (tr.Validate() == nil) {
			t.Fatalf("%q: %v, but %v", pattern, err, tr.Validate())
		}
		if err != nil {
			return
		}
		if strings.ContainsAny(pattern, " /@?#\t\r\n") || hp.host == "" || hp.host != strings.ToLower(hp.host) {
			t.Errorf("%q is taken for %q", pattern, hp)
		}
		host := strings.Replace(pattern, "*", "Www", 1)
		for _, scheme := range []string{"http", "https"} {
			if _, p := tr.load().route(&http.Request{URL: &url.URL{Scheme: scheme, Host: host}}); p.Timeout != 7 {
				t.Errorf("%q does not match %s://%s", pattern, scheme, host)
			}
		}
	})
}

// An SDK that retries by itself is told when that has been done already.
func TestFinalAnswerToAnSDK(t *testing.T) {
	final := func(t *testing.T, r RetryPolicy, stainless bool, steps ...policyStep) (attempts int, flag []string) {
		req := policyRequest(t, http.MethodPost)
		if stainless {
			req.Header.Set("X-Stainless-Retry-Count", "0")
		}
		base, resp, err := policyTrip(t, r, req, steps...)
		require.NoError(t, err)
		return len(base.at), resp.Header.Values("x-should-retry")
	}
	failing, deny, allow := policyStep{status: 529}, []string{"x-should-retry", "false"}, []string{"x-should-retry", "true"}
	for _, tt := range []struct {
		name      string
		retry     RetryPolicy
		stainless bool
		steps     []policyStep
		attempts  int
		want      []string
	}{
		{"exhausted", RetryPolicy{}, true, []policyStep{failing}, 3, []string{"false"}},
		{"one attempt", RetryPolicy{MaxAttempts: 1}, true, []policyStep{failing}, 1, []string{"false"}},
		{"another client", RetryPolicy{}, false, []policyStep{failing}, 3, nil},
		{"Retry-After too long", RetryPolicy{}, true, []policyStep{{status: 429, header: []string{"Retry-After", "900"}}}, 1, []string{"false"}},
		{"MaxElapsed", RetryPolicy{MaxElapsed: 1}, true, []policyStep{failing}, 1, []string{"false"}},
		{"budget", RetryPolicy{Budget: Budget{Ratio: 0.1}}, true, []policyStep{failing}, 1, []string{"false"}},
		{"not safe", RetryPolicy{Replay: ReplaySafe}, true, []policyStep{{status: 500}}, 1, []string{"false"}},
		{"the server's true is spent", RetryPolicy{}, true, []policyStep{{status: 409, header: allow}}, 3, []string{"false"}},
		{"the server's true, another client", RetryPolicy{}, false, []policyStep{{status: 409, header: allow}}, 3, []string{"true"}},
		{"the server's false", RetryPolicy{}, true, []policyStep{{status: 500, header: deny}}, 1, []string{"false"}},
		{"not retryable", RetryPolicy{}, true, []policyStep{{status: 404}}, 1, nil},
		{"success", RetryPolicy{}, true, []policyStep{failing, {status: 200}}, 2, nil},
	} {
		policyBubble(t, tt.name, func(t *testing.T) {
			attempts, flag := final(t, tt.retry, tt.stainless, tt.steps...)
			assert.Equal(t, tt.attempts, attempts)
			assert.Equal(t, tt.want, flag)
		})
	}
	policyBubble(t, "no header in the answer", func(t *testing.T) {
		base := policyBase(func(*http.Request) (*http.Response, error) { return &http.Response{StatusCode: 500}, nil })
		req := policyRequest(t, http.MethodPost)
		req.Header.Set("X-Stainless-Retry-Count", "1")
		resp, err := policyTransport(base, RetryPolicy{}).RoundTrip(req)
		require.NoError(t, err)
		assert.Equal(t, "false", resp.Header.Get("x-should-retry"))
	})
}

// policyBase is a function as a base.
type policyBase func(*http.Request) (*http.Response, error)

func (f policyBase) RoundTrip(req *http.Request) (*http.Response, error) { return f(req) }

// policyCount counts what a base is given.
type policyCount struct {
	base     http.RoundTripper
	attempts atomic.Int32
}

func (c *policyCount) RoundTrip(req *http.Request) (*http.Response, error) {
	c.attempts.Add(1)
	return c.base.RoundTrip(req)
}

// policyScript is a base that plays its steps in turn, the last one again and
// again, and notes each attempt. It is for one request at a time.
type policyScript struct {
	steps   []policyStep
	start   time.Time
	at      []time.Duration // when attempts began, since the first
	headers []http.Header
	bodies  []*policyBody // of the responses
}

type policyStep struct {
	status int
	header []string // names and values
	err    error
	takes  time.Duration
	trace  func(*httptrace.ClientTrace)
}

func (s *policyScript) RoundTrip(req *http.Request) (*http.Response, error) {
	now := time.Now()
	if s.start.IsZero() {
		s.start = now
	}
	s.at = append(s.at, now.Sub(s.start))
	s.headers = append(s.headers, req.Header.Clone())
	if req.Body != nil {
		_, _ = io.Copy(io.Discard, req.Body)
		req.Body.Close()
	}
	step := s.steps[min(len(s.at), len(s.steps))-1]
	if trace := httptrace.ContextClientTrace(req.Context()); trace != nil && step.trace != nil {
		step.trace(trace)
	}
	time.Sleep(step.takes)
	if step.err != nil {
		return nil, step.err
	}
	body := &policyBody{Reader: strings.NewReader(fmt.Sprintf("answer %d", len(s.at)))}
	s.bodies = append(s.bodies, body)
	resp := policyAnswer(step.status, step.header...)
	resp.Body, resp.Request = body, req
	return resp, nil
}

// gaps returns the waits between the attempts.
func (s *policyScript) gaps() (gaps []time.Duration) {
	for i := range s.at[1:] {
		gaps = append(gaps, s.at[i+1]-s.at[i])
	}
	return gaps
}

// policyBody counts how often it is closed.
type policyBody struct {
	io.Reader
	closes atomic.Int32
}

func (b *policyBody) Close() error {
	b.closes.Add(1)
	return nil
}

// policyStreamError is an error like those of net/http's HTTP/2, which no
// other package can name: errors.As finds any struct with the same fields.
type policyStreamError struct {
	StreamID uint32
	Code     policyStreamCode
	Cause    error
}

type policyStreamCode uint32

func (e policyStreamError) Error() string { return fmt.Sprintf("stream error: code %d", e.Code) }

func (e policyStreamError) As(target any) bool {
	to, from := reflect.ValueOf(target).Elem(), reflect.ValueOf(e)
	if to.Kind() != reflect.Struct || to.NumField() != from.NumField() {
		return false
	}
	for field, value := range from.Fields() {
		same := to.FieldByName(field.Name)
		if !same.IsValid() || !value.Type().ConvertibleTo(same.Type()) {
			return false
		}
		same.Set(value.Convert(same.Type()))
	}
	return true
}

var policyDialError = &net.OpError{Op: "dial", Net: "tcp", Err: syscall.ECONNREFUSED}

// policyBubble runs a subtest in a bubble of its own.
func policyBubble(t *testing.T, name string, f func(*testing.T)) {
	t.Helper()
	t.Run(name, func(t *testing.T) { synctest.Test(t, f) })
}

// policyTransport retries as r says, without a breaker that could end it.
func policyTransport(base http.RoundTripper, r RetryPolicy) *Transport {
	return &Transport{Base: base, Policy: Policy{Retry: r, Breaker: BreakerPolicy{FailureThreshold: -1}}}
}

// policyQuick is for real connections: it retries without a wait.
func policyQuick() Policy {
	return Policy{Retry: RetryPolicy{MinWait: 1, MaxWait: 1}, Breaker: BreakerPolicy{FailureThreshold: 100}}
}

// policyTrip makes one request with r against a script.
func policyTrip(t *testing.T, r RetryPolicy, req *http.Request, steps ...policyStep) (*policyScript, *http.Response, error) {
	t.Helper()
	base := &policyScript{steps: steps}
	resp, err := policyTransport(base, r).RoundTrip(req)
	require.True(t, (resp == nil) != (err == nil), "a response or an error")
	return base, resp, err
}

func policyRequest(t *testing.T, method string) *http.Request {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, "https://api.example.com/v1", nil)
	require.NoError(t, err)
	return req
}

func policyAnswer(status int, header ...string) *http.Response {
	h := http.Header{}
	for i := 0; i < len(header); i += 2 {
		h.Set(header[i], header[i+1])
	}
	return &http.Response{StatusCode: status, Header: h, Body: io.NopCloser(strings.NewReader("answer"))}
}

func policyReadAll(t *testing.T, resp *http.Response) string {
	t.Helper()
	var text bytes.Buffer
	_, err := text.ReadFrom(resp.Body)
	assert.NoError(t, err)
	assert.NoError(t, resp.Body.Close())
	return text.String()
}

// policyStats returns the stats of policyRequest's service.
func policyStats(t *testing.T, tr *Transport) Stats {
	t.Helper()
	s, ok := tr.Stats("api.example.com")
	require.True(t, ok)
	return s
}

func policySeconds(seconds ...int) (d []time.Duration) {
	for _, s := range seconds {
		d = append(d, time.Duration(s)*time.Second)
	}
	return d
}

func policyFixedBackoff(d time.Duration) retryablehttp.Backoff {
	return func(time.Duration, time.Duration, int, *http.Response) time.Duration { return d }
}

func policyServiceOf(c *chain, scheme, host string) string {
	s, _ := c.route(&http.Request{URL: &url.URL{Scheme: scheme, Host: host}})
	return s.host
}

func policyJoin(hp hostPort) string {
	if hp.port == "" {
		return hp.host
	}
	return hp.host + ":" + hp.port
}
