package tripper

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding"
	"errors"
	"fmt"
	"io"
	"log"
	"math"
	"net"
	"net/http"
	"net/http/httptest"
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
	"github.com/tripper-go/tripper/internal/tripptest"
)

func TestWhatIsRetried(t *testing.T) {
	timeout := fmt.Errorf("read: %w", os.ErrDeadlineExceeded)
	retried := func(steps ...policyStep) func(*testing.T) {
		return func(t *testing.T) {
			for _, step := range steps {
				base, _, _ := policyTrip(t, policyAny, policyRequest(t, http.MethodPost), step)
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
			base, _, _ := policyTrip(t, policyAny, policyRequest(t, http.MethodPost), step)
			assert.Len(t, base.at, 1, "%+v", step)
		}
	})
}

func TestBackoff(t *testing.T) {
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
			MaxRetryAfter: 60 * time.Second, Replay: ReplaySafe, BodyLimit: 1 << 20,
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
	for name, want := range map[string]struct {
		policy Policy
		change func(*Policy)
	}{
		"DefaultPolicy": {DefaultPolicy(), func(*Policy) {}},
		"HighTraffic": {HighTraffic(), func(p *Policy) {
			p.Retry.MaxAttempts, p.Retry.MinWait, p.Retry.MaxWait = 2, 500*time.Millisecond, 5*time.Second
		}},
		"Critical": {Critical(), func(p *Policy) {
			p.Retry.MaxAttempts, p.Retry.MinWait, p.Retry.MaxWait = 5, 2*time.Second, 30*time.Second
			p.Breaker.FailureThreshold = 10
		}},
		"BackgroundJob": {BackgroundJob(), func(p *Policy) {
			p.Retry.MaxAttempts, p.Retry.MinWait, p.Retry.MaxWait = 10, 5*time.Second, 60*time.Second
			p.Breaker.FailureThreshold = 20
		}},
		"Claude": {Claude(), func(p *Policy) {
			p.Service, p.Timeout, p.HoldStream = "claude_api", 180*time.Second, true
			p.Retry.Replay, p.Retry.BodyLimit = ReplayAny, 32<<20
		}},
		"OpenAI": {OpenAI(), func(p *Policy) {
			p.Service, p.HoldStream = "openai_api", true
			p.Retry.Replay, p.Retry.BodyLimit = ReplayAny, 32<<20
		}},
		"Agent": {Agent(), func(p *Policy) {
			p.Service, p.Timeout = "agent_http", 30*time.Second
			p.Retry.Replay, p.Retry.IdempotencyKey = ReplayAny, true
		}},
	} {
		t.Run(name, func(t *testing.T) {
			p := DefaultPolicy()
			want.change(&p)
			assert.Equal(t, p, want.policy, "everything else is the default")
			assert.Equal(t, want.policy, want.policy.withDefaults(), "nothing is left to resolve")
			assert.NoError(t, (&Transport{Policy: want.policy}).Validate())
		})
	}
}

// One request alone makes all its attempts: its own failures do not open the
// breaker of a preset, nor do they come near it.
func TestPresetsOutlastOneRequest(t *testing.T) {
	for name, p := range map[string]Policy{"DefaultPolicy": DefaultPolicy(), "HighTraffic": HighTraffic(), "Critical": Critical(),
		"BackgroundJob": BackgroundJob(), "Claude": Claude(), "OpenAI": OpenAI(), "Agent": Agent()} {
		policyBubble(t, name, func(t *testing.T) {
			p.Service = "s"
			base := &policyScript{steps: []policyStep{{status: 500}}}
			tr := &Transport{Base: base, Policy: p}
			resp, err := tr.RoundTrip(policyRequest(t, http.MethodGet))
			require.NoError(t, err)
			assert.Equal(t, 500, resp.StatusCode)
			assert.Len(t, base.at, p.Retry.MaxAttempts)
			s, _ := tr.Stats("s")
			assert.Equal(t, Closed, s.State)
			assert.Equal(t, uint64(1), s.Exhausted)
			assert.Equal(t, p.Retry.MaxAttempts, s.ConsecutiveFailures)
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
	{"Timeout", "30ns", "a time.Duration with a unit, such as 30*time.Second", func(p *Policy) { p.Timeout = 30 }},
	{"Idle", "-1s", "zero", func(p *Policy) { p.Idle = -time.Second }},
	{"TotalTimeout", "-1s", "zero", func(p *Policy) { p.TotalTimeout = -time.Second }},
	{"TotalTimeout", "30ns", "a time.Duration with a unit", func(p *Policy) { p.TotalTimeout = 30 }},
	{"SDK", "-1", "SDKAuto or SDKOff", func(p *Policy) { p.SDK = -1 }},
	{"SDK", "2", "SDKAuto or SDKOff", func(p *Policy) { p.SDK = SDKOff + 1 }},
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
	{"Retry.MaxElapsed", "999ms", "at least MinWait, which is 1s", func(p *Policy) { p.Retry.MaxElapsed = time.Second - time.Millisecond }},
	{"Retry.MaxElapsed", "2s", "at least MinWait, which is 3s", func(p *Policy) { p.Retry.MinWait, p.Retry.MaxElapsed = 3*time.Second, 2*time.Second }},
	{"Retry.Replay", "-1", "ReplayAny or ReplaySafe", func(p *Policy) { p.Retry.Replay = -1 }},
	{"Retry.Replay", "2", "ReplayAny or ReplaySafe", func(p *Policy) { p.Retry.Replay = ReplayAny + 1 }},
	{"Retry.Budget.Ratio", "NaN", "a share", func(p *Policy) { p.Retry.Budget.Ratio = math.NaN() }},
	{"Retry.Budget.Ratio", "+Inf", "a share", func(p *Policy) { p.Retry.Budget.Ratio = math.Inf(1) }},
	{"Retry.Budget.Ratio", "20", "a share of the requests, such as 0.2 for 20%", func(p *Policy) { p.Retry.Budget.Ratio = 20 }},
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
	{"Breaker.SlowCall", "31s", "at most Timeout, which is 30s", func(p *Policy) {
		p.Timeout, p.Breaker.SlowCall = 30*time.Second, 31*time.Second
	}},
	{"Breaker.MinDeadline", "-1s", "zero", func(p *Policy) { p.Breaker.MinDeadline = -time.Second }},
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
		Policy: p, Layers: []Layer{nil}, Observers: []*Observer{{}, nil}, ReplayMemory: -1, Base: (*http.Transport)(nil),
		Hosts: map[string]Policy{"": {}, "*": {}, "api.example.com": p},
	}).Validate()
	require.Error(t, err)
	for field := range wrong {
		assert.Contains(t, err.Error(), "tripper: Policy."+field+" is ")
		assert.Contains(t, err.Error(), `tripper: Hosts["api.example.com"].`+field+" is ")
	}
	assert.Contains(t, err.Error(), `tripper: Hosts[""] is no host: want `)
	assert.Contains(t, err.Error(), "tripper: Layers[0] is nil: want a Layer")
	assert.Contains(t, err.Error(), "tripper: Observers[1] is nil: want an Observer")
	assert.Contains(t, err.Error(), "tripper: ReplayMemory is -1: want zero (the default) or more")
	assert.Contains(t, err.Error(), "tripper: Base is a nil *http.Transport: want a RoundTripper, or no Base at all")
	assert.Contains(t, err.Error(), `tripper: Hosts["*"] is no host: want the policy of every other host in Policy`)
	assert.NotContains(t, err.Error(), "Observers[0]")
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
		"base of no pointer": {Base: policyValue{}},
		"a large ratio":      {Policy: Policy{Retry: RetryPolicy{Budget: Budget{Ratio: 10}}}},
		"MaxElapsed":         {Policy: Policy{Retry: RetryPolicy{MaxElapsed: time.Second}}},
		"SlowCall":           {Policy: Policy{Timeout: time.Second, Breaker: BreakerPolicy{SlowCall: time.Second}}},
		"SlowCall alone":     {Policy: Policy{Breaker: BreakerPolicy{SlowCall: time.Hour}}},
		"short limits":       {Policy: Policy{Timeout: time.Microsecond, Idle: time.Microsecond, TotalTimeout: time.Microsecond}},
		"rate alone":         {Policy: Policy{Breaker: BreakerPolicy{FailureThreshold: -1, FailureRate: 0.5}}},
		"observer":           {Observers: []*Observer{{}}},
	} {
		assert.NoError(t, tr.Validate(), name)
	}
	tr := &Transport{}
	tr.Base = tr
	assert.ErrorContains(t, tr.Validate(), "tripper: Base is the Transport itself: want ")
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
		{"different in what is not shared", named(Policy{Timeout: time.Second}), map[string]Policy{
			"a.example": named(Policy{Idle: time.Second, Retry: RetryPolicy{MaxAttempts: 9, Replay: ReplayAny, Jitter: JitterNone}})}, true},
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
	assert.False(t, tr.Trip("api.example.com", time.Second, nil))
	assert.False(t, tr.Reset("api.example.com"))
	for s := range tr.All() {
		assert.Fail(t, "a service of an invalid Transport", s.Service)
	}
	assert.Empty(t, tr.ServiceOf(policyRequest(t, http.MethodGet)))
	assert.Equal(t, Stats{}, tr.Forgotten())
}

func TestWithRetryIsValidated(t *testing.T) {
	base := &policyScript{steps: []policyStep{{status: 200}}}
	tr := &Transport{Base: base}
	body := &policyBody{Reader: strings.NewReader("hello")}
	ctx := WithRetry(t.Context(), func(r *RetryPolicy) { r.MaxAttempts, r.MaxElapsed = -2, -1 })
	req := policyRequest(t, http.MethodPost).WithContext(ctx)
	req.Body = body
	resp, err := tr.RoundTrip(req)
	assert.Nil(t, resp)
	assert.ErrorContains(t, err, "tripper: WithRetry.MaxAttempts is -2: want zero (the default) or more")
	assert.ErrorContains(t, err, "tripper: WithRetry.MaxElapsed is -1ns: want ")
	assert.Equal(t, int32(1), body.closes.Load())
	assert.Empty(t, base.at)
}

// A request's own policy begins as its host's, with the defaults resolved.
func TestWithRetryChangesThePolicy(t *testing.T) {
	host := RetryPolicy{MaxAttempts: 9, MinWait: time.Minute, MaxWait: time.Hour, Jitter: JitterNone}
	own := func(t *testing.T, change func(*RetryPolicy)) []time.Duration {
		req := policyRequest(t, http.MethodGet)
		base, _, err := policyTrip(t, host, req.WithContext(WithRetry(req.Context(), change)), policyStep{status: 500})
		require.NoError(t, err)
		return base.at
	}
	policyBubble(t, "a copy", func(t *testing.T) {
		at := own(t, func(r *RetryPolicy) {
			assert.Equal(t, host.withDefaults(), *r)
			r.MaxAttempts = 3
		})
		assert.Equal(t, policySeconds(0, 60, 180), at, "the rest stays")
	})
	policyBubble(t, "zero means the default", func(t *testing.T) {
		assert.Equal(t, policySeconds(0, 1, 3), own(t, func(r *RetryPolicy) { *r = RetryPolicy{Jitter: JitterNone} }))
	})
	policyBubble(t, "nothing", func(t *testing.T) {
		assert.Len(t, own(t, func(*RetryPolicy) {}), 9)
		assert.Len(t, own(t, nil), 9)
	})
	policyBubble(t, "the host's own is not changed", func(t *testing.T) {
		base := &policyScript{steps: []policyStep{{status: 500}}}
		tr := policyTransport(base, host)
		for _, change := range []func(*RetryPolicy){func(r *RetryPolicy) { r.MaxAttempts = 1 }, nil} {
			req := policyRequest(t, http.MethodGet)
			_, err := tr.RoundTrip(req.WithContext(WithRetry(req.Context(), change)))
			require.NoError(t, err)
		}
		assert.Len(t, base.at, 1+9)
	})
	policyBubble(t, "the last one counts", func(t *testing.T) {
		req := policyRequest(t, http.MethodGet)
		ctx := WithRetry(req.Context(), func(r *RetryPolicy) { r.MaxAttempts = 2 })
		ctx = WithRetry(ctx, func(r *RetryPolicy) { assert.Equal(t, 9, r.MaxAttempts) })
		base, _, err := policyTrip(t, host, req.WithContext(ctx), policyStep{status: 500})
		require.NoError(t, err)
		assert.Len(t, base.at, 9)
	})
	policyBubble(t, "budget", func(t *testing.T) {
		base := &policyScript{steps: []policyStep{{status: 500}}}
		tr := policyTransport(base, RetryPolicy{Budget: Budget{Ratio: 0.001}})
		own := func(b Budget) (attempts int) {
			before := len(base.at)
			req := policyRequest(t, http.MethodGet)
			ctx := WithRetry(req.Context(), func(r *RetryPolicy) { r.Budget = b })
			_, err := tr.RoundTrip(req.WithContext(ctx))
			require.NoError(t, err)
			return len(base.at) - before
		}
		assert.Equal(t, 1, own(Budget{}), "the service's budget stays")
		assert.Equal(t, 1, own(Budget{Ratio: 1, MinPerSecond: 100}), "a request cannot raise it")
		assert.Equal(t, 3, own(Budget{Ratio: -1}), "but can do without")
	})
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

// The server's word is kept to the nanosecond when it is longer than the
// backoff, on every status that is retried.
func TestServerWaitIsKept(t *testing.T) {
	for _, status := range []int{408, 429, 500, 502, 503, 529} {
		policyBubble(t, strconv.Itoa(status), func(t *testing.T) {
			date := time.Now().Add(30 * time.Second).UTC().Format(http.TimeFormat)
			base, _, err := policyTrip(t, RetryPolicy{MaxAttempts: 5, Replay: ReplayAny}, policyRequest(t, http.MethodPost),
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
		base, _, err := policyTrip(t, policyAny, policyRequest(t, http.MethodPost),
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
		"40 digits":           {step: too(strings.Repeat("9", 40)), want: Suppressed{RetryAfter: 1}},
		"9223372037, Backoff": {retry: RetryPolicy{Backoff: retryablehttp.DefaultBackoff}, step: too("9223372037"), want: Suppressed{RetryAfter: 1}},
		"no bound but the numbers'": {retry: RetryPolicy{MaxRetryAfter: math.MaxInt64}, deadline: time.Hour,
			step: too("9223372037"), want: Suppressed{Deadline: 1}},
		"deadline":                    {deadline: 5 * time.Second, step: too("7"), want: Suppressed{Deadline: 1}},
		"deadline exactly":            {deadline: 7 * time.Second, step: too("7"), want: Suppressed{Deadline: 1}},
		"deadline and backoff":        {deadline: time.Second, step: policyStep{status: 500}, want: Suppressed{Deadline: 1}},
		"deadline and custom Backoff": {retry: RetryPolicy{Backoff: policyFixedBackoff(time.Hour)}, deadline: time.Minute, step: policyStep{status: 500}, want: Suppressed{Deadline: 1}},
		"MaxElapsed":                  {retry: RetryPolicy{MaxElapsed: 5 * time.Second}, step: too("7"), want: Suppressed{Deadline: 1}},
		"MaxElapsed and backoff":      {retry: RetryPolicy{MaxElapsed: time.Second, Jitter: JitterNone}, step: policyStep{status: 500, takes: 1}, want: Suppressed{Deadline: 1}},
		"MaxElapsed, hugest wait": {retry: RetryPolicy{MaxElapsed: 2 * time.Second, MaxRetryAfter: math.MaxInt64},
			step: policyStep{status: 429, header: []string{"Retry-After", strings.Repeat("9", 40)}, takes: time.Second}, want: Suppressed{Deadline: 1}},
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
	for _, value := range []string{"NaN", "-1", "-9223372037", "soon", "0", "1e1", "0x1p4", "+5", "Inf", "Infinity", "1e30", "Thu, 01 Jan 1970 00:00:00 GMT"} {
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
		told := 0
		tr.Observers = []*Observer{{Retry: func(e RetryEvent) { told++; assert.Zero(t, e.Wait) }}}
		_, err := tr.RoundTrip(policyRequest(t, http.MethodGet))
		require.NoError(t, err)
		assert.Equal(t, policySeconds(0, 0, 0), base.at)
		assert.Equal(t, 2, told)
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
		base, _, err := policyTrip(t, RetryPolicy{CheckRetry: check, Replay: ReplayAny}, req, policyStep{err: io.EOF}, policyStep{err: io.ErrUnexpectedEOF})
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
		tr.Trip("s", time.Second/2, nil) // less than the wait before a retry
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
		tls.RecordHeaderError{Conn: &net.TCPConn{}}, http.ErrSchemeMismatch, &tls.CertificateVerificationError{Err: x509.UnknownAuthorityError{}},
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
	{"503", policyStep{status: 503}, false},
	{"503 with Retry-After", policyStep{status: 503, header: []string{"Retry-After", "1"}}, true},
	{"503 with retry-after-ms", policyStep{status: 503, header: []string{"retry-after-ms", "1"}}, true},
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
	{"overloaded as first event", policyStep{status: 200, stream: policyErrorEvent("overloaded_error")}, true},
	{"rate limit as first event", policyStep{status: 200, stream: policyErrorEvent("rate_limit_error")}, true},
	{"server error as first event", policyStep{status: 200, stream: policyErrorEvent("api_error")}, false},
	{"stream without an event", policyStep{status: 200, stream: ": nothing"}, false},
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
			if tt.method == "HEAD" && result.step.stream != "" {
				continue // no stream will come
			}
			policyBubble(t, fmt.Sprintf("%s %s %s", tt.method, tt.key, result.name), func(t *testing.T) {
				req := policyRequest(t, tt.method)
				req.Method = tt.method
				if tt.key != "" {
					req.Header.Set(tt.key, "1")
				}
				base := &policyScript{steps: []policyStep{result.step}}
				tr := policyTransport(base, RetryPolicy{Replay: ReplaySafe})
				tr.Policy.HoldStream = true
				resp, err := tr.RoundTrip(req)
				want, suppressed := 1, uint64(1)
				if tt.safe || result.idle {
					want, suppressed = 3, 0
				}
				assert.Len(t, base.at, want)
				assert.Equal(t, Suppressed{Method: suppressed}, policyStats(t, tr).Suppressed)
				switch {
				case result.step.err != nil:
					assert.ErrorIs(t, err, result.step.err)
				case result.step.stream != "":
					require.NoError(t, err)
					assert.Equal(t, result.step.stream, policyReadAll(t, resp))
				default:
					require.NoError(t, err)
					assert.Equal(t, fmt.Sprintf("answer %d", want), policyReadAll(t, resp))
				}
			})
		}
	}
}

func TestReplayAnyRetriesEveryMethod(t *testing.T) {
	for _, method := range []string{"GET", "POST", "PATCH", "DELETE", "PROPFIND"} {
		for _, result := range policyResults {
			policyBubble(t, method+" "+result.name, func(t *testing.T) {
				base := &policyScript{steps: []policyStep{result.step}}
				tr := policyTransport(base, policyAny)
				tr.Policy.HoldStream = true
				_, _ = tr.RoundTrip(policyRequest(t, method))
				assert.Len(t, base.at, 3)
			})
		}
	}
}

// Each attempt is judged by itself.
func TestReplaySafeLooksAtTheLatestAttempt(t *testing.T) {
	lost, sent := policyStep{err: policyDialError}, policyStep{err: io.EOF}
	policyBubble(t, "sent after lost", func(t *testing.T) {
		base, _, err := policyTrip(t, RetryPolicy{}, policyRequest(t, http.MethodPost), lost, sent)
		assert.Len(t, base.at, 2)
		assert.Equal(t, &RetryError{Attempts: 2, Err: io.EOF}, err)
	})
	policyBubble(t, "lost after refused", func(t *testing.T) {
		base, _, err := policyTrip(t, RetryPolicy{}, policyRequest(t, http.MethodPost), policyStep{status: 429}, lost, sent)
		assert.Len(t, base.at, 3)
		assert.Equal(t, &RetryError{Attempts: 3, Err: io.EOF}, err)
	})
	policyBubble(t, "executed after refused", func(t *testing.T) {
		base, resp, err := policyTrip(t, RetryPolicy{}, policyRequest(t, http.MethodPost), policyStep{status: 529}, policyStep{status: 503}, lost)
		require.NoError(t, err)
		assert.Len(t, base.at, 2)
		assert.Equal(t, "answer 2", policyReadAll(t, resp))
	})
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

// Real failures to connect: a port that nobody listens at, and a server that
// never answers in the TLS handshake.
func TestReplaySafeRetriesWhatWasNeverSent(t *testing.T) {
	closed, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	require.NoError(t, closed.Close())
	silent, err := net.Listen("tcp", "127.0.0.1:0") // the kernel connects, and nobody accepts
	require.NoError(t, err)
	defer silent.Close()
	rude, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer rude.Close()
	go func() {
		for {
			conn, err := rude.Accept()
			if err != nil {
				return
			}
			_, _ = conn.Read(make([]byte, 1)) // the request has begun to come
			conn.Close()
		}
	}()
	post := func(t *testing.T, url string) (attempts int32, err error) {
		real := &http.Transport{TLSHandshakeTimeout: 20 * time.Millisecond}
		defer real.CloseIdleConnections()
		base := &policyCount{base: real}
		p := policyQuick()
		p.Retry.Replay = ReplaySafe
		_, err = (&http.Client{Transport: &Transport{Base: base, Policy: p}}).Post(url, "text/plain", strings.NewReader("hello"))
		return base.attempts.Load(), err
	}
	t.Run("dial", func(t *testing.T) {
		attempts, err := post(t, "http://"+closed.Addr().String())
		assert.ErrorIs(t, err, syscall.ECONNREFUSED)
		assert.Equal(t, int32(3), attempts)
	})
	t.Run("TLS handshake", func(t *testing.T) {
		attempts, err := post(t, "https://"+silent.Addr().String())
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
	r := RetryPolicy{IdempotencyKey: true, Replay: ReplayAny}
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
		r := RetryPolicy{IdempotencyKey: true, Replay: ReplayAny, Prepare: func(req *http.Request) error { req.Header.Set("Signature", "new"); return nil }}
		req := policyRequest(t, http.MethodPost)
		base, _, _ := policyTrip(t, r, req, policyStep{status: 500})
		assert.Len(t, slices.Compact(keys(base)), 1)
		assert.Equal(t, "new", base.headers[2].Get("Signature"))
		assert.Empty(t, req.Header)
	})
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
		tr := policyTransport(base, RetryPolicy{Budget: Budget{MinPerSecond: 0.1}, Jitter: JitterNone, Replay: ReplayAny})
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
		case code == 408, code >= 500 && code <= 599:
			want = Failure
		case code == 429:
			want = Ignored
		}
		assert.Equal(t, want, DefaultOutcome(policyAnswer(code), nil), "%d", code)
		assert.Equal(t, want, DefaultOutcome(policyAnswer(code, "x-should-retry", "true"), nil), "%d: that is about retries", code)
	}
	for _, err := range []error{io.EOF, syscall.ECONNREFUSED, policyDialError, context.DeadlineExceeded, os.ErrDeadlineExceeded,
		&tls.CertificateVerificationError{Err: x509.UnknownAuthorityError{}}, tls.RecordHeaderError{Conn: &net.TCPConn{}}, errNoResponse, policyStreamError{Code: 7}} {
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
		tr := &Transport{}
		for range 3 { // by the long way, and by the shortcut
			policyCheckService(t, tr, tt.scheme, tt.host, tt.want)
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
	tr := &Transport{Hosts: map[string]Policy{}, Policy: Policy{Service: "none"}}
	for _, pattern := range patterns {
		tr.Hosts[pattern] = Policy{Service: pattern}
	}
	require.NoError(t, tr.Validate())
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
		want := tt.want
		if want == "" {
			want = "none"
		}
		for range 3 {
			policyCheckService(t, tr, tt.scheme, tt.host, want)
		}
	}
}

// A host's policy stands alone: its zero fields do not fall back on Policy.
func TestHostPolicyStandsAlone(t *testing.T) {
	tr := &Transport{Policy: Policy{Service: "all", Timeout: time.Hour, Retry: RetryPolicy{MaxAttempts: 9}},
		Hosts: map[string]Policy{"api.example.com": {Idle: time.Second}}}
	_, p := tr.load().route(policyRequest(t, http.MethodGet))
	assert.Equal(t, Policy{Idle: time.Second}.withDefaults(), p.Policy)
	_, ok := tr.Stats("api.example.com")
	assert.True(t, ok, "a service of its own, from the start")
}

// A pattern without a port gives its policy to every port; each port is a
// service all the same, as without Hosts, so that a broken one does not take
// its neighbours along.
func TestPortsAreServicesOfTheirOwn(t *testing.T) {
	for name, hosts := range map[string]map[string]Policy{"no Hosts": nil, "host": {"localhost": {Timeout: time.Second}}, "Service": {"localhost": {Service: "local"}}} {
		tr := &Transport{Hosts: hosts}
		want := []string{"localhost", "localhost:8080", "localhost:9090"}
		if name == "Service" {
			want = []string{"local", "local", "local"}
		}
		for i, host := range []string{"localhost", "localhost:8080", "localhost:9090"} {
			policyCheckService(t, tr, "http", host, want[i])
		}
	}
}

func TestServiceOfATransport(t *testing.T) {
	tr := &Transport{
		Service: func(req *http.Request) string { return req.Header.Get("Model") },
		Policy:  Policy{Service: "default"},
		Hosts:   map[string]Policy{"api.example.com": {Timeout: time.Second}, "*.example.com": {Service: "wild", Timeout: time.Minute}},
	}
	for _, tt := range []struct {
		model, host, service string
		timeout              time.Duration
	}{
		{"opus", "api.example.com", "opus", time.Second},
		{"", "api.example.com", "api.example.com", time.Second},
		{"", "x.example.com", "wild", time.Minute},
		{"", "example.org", "default", 0},
		{"haiku", "example.org", "haiku", 0},
	} {
		for range 2 {
			req := &http.Request{URL: &url.URL{Scheme: "https", Host: tt.host}, Header: http.Header{"Model": {tt.model}}}
			assert.Equal(t, tt.service, tr.ServiceOf(req))
			s, p := tr.load().route(req)
			assert.Equal(t, tt.service, s.name)
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
		used := &Transport{}
		policyRoute(used, "https", host) // of anything that a hand-made URL may hold
		u, err := url.Parse("https://" + host + "/")
		if err != nil || u.Host == "" {
			return // net/http could not send it
		}
		name := policyRoute(used, "https", u.Host)
		if name == "" {
			return // of dots alone
		}
		if strings.ToLower(name) != name {
			t.Errorf("%q: service %q", u.Host, name)
		}
		if again := policyRoute(used, "https", name); again != name {
			t.Errorf("%q: service %q, then %q", u.Host, name, again)
		}
		bare, _, _ := strings.Cut(name, ":")
		policyCheckHistory(t, used, u.Host, name, strings.ToUpper(name), name+".", bare+":443", bare+":80")
	})
}

// policyCheckHistory checks that which service a host belongs to does not
// depend on what was asked before.
func policyCheckHistory(t *testing.T, used *Transport, hosts ...string) {
	for range 2 {
		for _, host := range hosts {
			for _, scheme := range []string{"https", "http"} {
				if u, err := url.Parse(scheme + "://" + host); err != nil || u.Host != host {
					continue
				}
				fresh := policyRoute(&Transport{}, scheme, host)
				if got := policyRoute(used, scheme, host); got != fresh {
					t.Errorf("%s %q: service %q, then %q", scheme, host, fresh, got)
				}
				if got := used.ServiceOf(policyTo(scheme, host)); got != fresh {
					t.Errorf("%s %q: service %q, but ServiceOf says %q", scheme, host, fresh, got)
				}
			}
		}
	}
}

// Whatever Validate takes for a host matches that host.
func FuzzHostsMatch(f *testing.F) {
	for _, pattern := range []string{"api.example.com", "*.Example.com.:8443", "*", "http://a/", "a@b", "[::1]:1", "[::1", "::1", "a:080", "*.a..", "a b"} {
		f.Add(pattern)
	}
	f.Fuzz(func(t *testing.T, pattern string) {
		tr := &Transport{Hosts: map[string]Policy{pattern: {Timeout: 7 * time.Second}}}
		if tr.Validate() != nil {
			return
		}
		host := strings.Replace(pattern, "*", "Www", 1)
		for _, scheme := range []string{"http", "https"} {
			if _, p := tr.load().route(policyTo(scheme, host)); p.Timeout != 7*time.Second {
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
		{"exhausted", policyAny, true, []policyStep{failing}, 3, []string{"false"}},
		{"one attempt", RetryPolicy{MaxAttempts: 1}, true, []policyStep{failing}, 1, []string{"false"}},
		{"another client", policyAny, false, []policyStep{failing}, 3, nil},
		{"Retry-After too long", policyAny, true, []policyStep{{status: 429, header: []string{"Retry-After", "900"}}}, 1, []string{"false"}},
		{"MaxElapsed", RetryPolicy{MaxElapsed: time.Second, Jitter: JitterNone}, true, []policyStep{{status: 529, takes: 1}}, 1, []string{"false"}},
		{"budget", RetryPolicy{Budget: Budget{Ratio: 0.1}}, true, []policyStep{failing}, 1, []string{"false"}},
		{"not safe", RetryPolicy{}, true, []policyStep{{status: 500}}, 1, []string{"false"}},
		{"the server's true is spent", policyAny, true, []policyStep{{status: 409, header: allow}}, 3, []string{"false"}},
		{"the server's true, another client", policyAny, false, []policyStep{{status: 409, header: allow}}, 3, []string{"true"}},
		{"the server's false", policyAny, true, []policyStep{{status: 500, header: deny}}, 1, []string{"false"}},
		{"not retryable", policyAny, true, []policyStep{{status: 404}}, 1, nil},
		{"success", policyAny, true, []policyStep{failing, {status: 200}}, 2, nil},
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
		resp, err := policyTransport(base, policyAny).RoundTrip(req)
		require.NoError(t, err)
		assert.Equal(t, "false", resp.Header.Get("x-should-retry"))
	})
}

// SDKOff treats an SDK like everybody else.
func TestSDKOff(t *testing.T) {
	run := func(t *testing.T, sdk SDK, step policyStep) (*http.Response, error) {
		tr := policyTransport(&policyScript{steps: []policyStep{step}}, policyAny)
		tr.Policy.SDK = sdk
		req := policyRequest(t, http.MethodPost)
		req.Header.Set("X-Stainless-Retry-Count", "0")
		return tr.RoundTrip(req)
	}
	for _, step := range []policyStep{{status: 529}, {status: 409, header: []string{"x-should-retry", "true"}}} {
		policyBubble(t, strconv.Itoa(step.status), func(t *testing.T) {
			resp, err := run(t, SDKOff, step)
			require.NoError(t, err)
			assert.Equal(t, policyAnswer(step.status, step.header...).Header, resp.Header, "as it came")
			assert.Equal(t, "answer 3", policyReadAll(t, resp))
			resp, err = run(t, SDKAuto, step)
			require.NoError(t, err)
			assert.Equal(t, "false", resp.Header.Get("x-should-retry"))
		})
	}
	policyBubble(t, "error", func(t *testing.T) {
		_, err := run(t, SDKOff, policyStep{err: io.EOF})
		assert.Equal(t, &RetryError{Attempts: 3, Err: io.EOF}, err)
		resp, err := run(t, SDKAuto, policyStep{err: io.EOF})
		require.NoError(t, err)
		assert.Equal(t, 503, resp.StatusCode)
	})
	policyBubble(t, "rejection", func(t *testing.T) {
		_, err := run(t, SDKOff, policyStep{err: ErrRejected})
		assert.Equal(t, ErrRejected, err)
	})
}

func TestTextForms(t *testing.T) {
	type text interface {
		fmt.Stringer
		encoding.TextMarshaler
	}
	for _, tt := range []struct {
		kind  string
		names []string
		value func(int) text
		read  func(string) (text, error)
	}{
		{"State", []string{"CLOSED", "OPEN", "HALF_OPEN"}, func(i int) text { return State(i) },
			func(s string) (text, error) { v := State(-1); err := v.UnmarshalText([]byte(s)); return v, err }},
		{"Outcome", []string{"ignored", "success", "failure"}, func(i int) text { return Outcome(i) },
			func(s string) (text, error) { v := Outcome(-1); err := v.UnmarshalText([]byte(s)); return v, err }},
		{"Origin", []string{"attempts", "hand", "fleet", "forgotten"}, func(i int) text { return Origin(i) },
			func(s string) (text, error) { v := Origin(-1); err := v.UnmarshalText([]byte(s)); return v, err }},
		{"Jitter", []string{"equal", "full", "decorrelated", "none"}, func(i int) text { return Jitter(i) },
			func(s string) (text, error) { v := Jitter(-1); err := v.UnmarshalText([]byte(s)); return v, err }},
		{"Replay", []string{"safe", "any"}, func(i int) text { return Replay(i) },
			func(s string) (text, error) { v := Replay(-1); err := v.UnmarshalText([]byte(s)); return v, err }},
	} {
		for i, name := range tt.names {
			v := tt.value(i)
			assert.Equal(t, name, v.String())
			written, err := v.MarshalText()
			require.NoError(t, err)
			assert.Equal(t, name, string(written))
			for _, form := range []string{name, strings.ToUpper(name), strings.ToLower(name)} {
				got, err := tt.read(form)
				require.NoError(t, err, form)
				assert.Equal(t, v, got, form)
			}
		}
		for _, i := range []int{-1, len(tt.names)} {
			assert.Equal(t, fmt.Sprintf("%s(%d)", tt.kind, i), tt.value(i).String())
		}
		for _, form := range []string{"", "0", "nonsense", tt.names[0] + " "} {
			got, err := tt.read(form)
			assert.EqualError(t, err, fmt.Sprintf("tripper: unknown %s %q: want one of %s",
				strings.ToLower(tt.kind), form, strings.Join(tt.names, ", ")))
			assert.Equal(t, tt.value(-1), got, "what was there stays")
		}
	}
	assert.Equal(t, []any{Closed, Open, HalfOpen}, []any{State(0), State(1), State(2)})
	assert.Equal(t, []any{Ignored, Success, Failure}, []any{Outcome(0), Outcome(1), Outcome(2)})
	assert.Equal(t, []any{OriginAttempts, OriginHand, OriginFleet, OriginForgotten}, []any{Origin(0), Origin(1), Origin(2), Origin(3)})
	assert.Equal(t, []any{JitterEqual, JitterFull, JitterDecorrelated, JitterNone}, []any{Jitter(0), Jitter(1), Jitter(2), Jitter(3)})
	assert.Equal(t, []any{ReplaySafe, ReplayAny}, []any{Replay(0), Replay(1)})
}

// policyHang is a base that never answers. It ends with its context, like
// net/http with the cause, or else like many others with the plain error.
func policyHang(plain bool) policyBase {
	return func(req *http.Request) (*http.Response, error) {
		if req.Body != nil {
			defer req.Body.Close()
			_, _ = io.Copy(io.Discard, req.Body)
		}
		<-req.Context().Done()
		if plain {
			return nil, req.Context().Err()
		}
		return nil, context.Cause(req.Context())
	}
}

// policyThen answers with its steps, and hangs after them.
func policyThen(plain bool, steps ...policyStep) policyBase {
	script := &policyScript{steps: steps}
	return func(req *http.Request) (*http.Response, error) {
		if len(script.at) == len(steps) {
			return policyHang(plain)(req)
		}
		return script.RoundTrip(req)
	}
}

func TestTotalTimeoutEndsAttempts(t *testing.T) {
	for _, plain := range []bool{false, true} {
		for name, tt := range map[string]struct {
			policy   Policy
			steps    []policyStep // before the base hangs
			attempts int
			failures uint64
			ignored  uint64
		}{
			"the first":            {Policy{}, nil, 1, 1, 0},
			"the first of one":     {Policy{Retry: RetryPolicy{MaxAttempts: 1}}, nil, 1, 1, 0},
			"the second":           {Policy{}, []policyStep{{status: 500, takes: 2 * time.Second}}, 2, 2, 0},
			"the second, too soon": {Policy{}, []policyStep{{status: 500, takes: 3500 * time.Millisecond}}, 2, 1, 1},
			"after a Timeout":      {Policy{Timeout: 2500 * time.Millisecond}, nil, 2, 2, 0},
			"the third":            {Policy{}, []policyStep{{err: io.EOF}, {status: 503}}, 3, 3, 0},
			"MinDeadline":          {Policy{Breaker: BreakerPolicy{MinDeadline: 6 * time.Second}}, nil, 1, 0, 1},
			"MinDeadline reached":  {Policy{Breaker: BreakerPolicy{MinDeadline: 5 * time.Second}}, nil, 1, 1, 0},
		} {
			policyBubble(t, fmt.Sprintf("%s, plain error %v", name, plain), func(t *testing.T) {
				p := tt.policy
				p.TotalTimeout, p.Retry.Jitter = 5*time.Second, JitterNone
				tr := &Transport{Base: policyThen(plain, tt.steps...), Policy: p}
				start := time.Now()
				_, err := tr.RoundTrip(policyRequest(t, http.MethodGet))
				assert.Equal(t, 5*time.Second, time.Since(start))
				assert.ErrorContains(t, err, "no response within 5s")
				assert.ErrorIs(t, err, context.DeadlineExceeded)
				assert.NotErrorIs(t, err, context.Canceled)
				var timeout net.Error
				require.ErrorAs(t, err, &timeout)
				assert.True(t, timeout.Timeout())
				var final *RetryError
				if assert.Equal(t, tt.attempts > 1, errors.As(err, &final), "%v", err) && final != nil {
					assert.Equal(t, tt.attempts, final.Attempts)
				}
				s := policyStats(t, tr)
				assert.Equal(t, uint64(1), s.Failed)
				assert.Equal(t, tt.failures, s.Failures)
				assert.Equal(t, tt.ignored, s.Ignored)
				assert.Equal(t, uint64(tt.attempts), s.Attempts)
			})
		}
	}
}

// A wait that would outlast TotalTimeout is not begun: what is in hand goes to
// the caller at once.
func TestTotalTimeoutEndsWaits(t *testing.T) {
	for name, tt := range map[string]struct {
		total time.Duration
		step  policyStep
		took  time.Duration
		sent  int
	}{
		"second wait":    {6 * time.Second, policyStep{status: 500, takes: 2 * time.Second}, 5 * time.Second, 2},
		"to the moment":  {7 * time.Second, policyStep{status: 500, takes: 2 * time.Second}, 5 * time.Second, 2},
		"a moment more":  {7*time.Second + 1, policyStep{status: 500}, 3 * time.Second, 3},
		"first wait":     {time.Second, policyStep{status: 500}, 0, 1},
		"Retry-After":    {5 * time.Second, policyStep{status: 429, header: []string{"Retry-After", "7"}}, 0, 1},
		"error":          {6 * time.Second, policyStep{err: io.EOF, takes: 2 * time.Second}, 5 * time.Second, 2},
		"error, at once": {time.Second, policyStep{err: io.EOF}, 0, 1},
	} {
		policyBubble(t, name, func(t *testing.T) {
			base := &policyScript{steps: []policyStep{tt.step}}
			tr := policyTransport(base, RetryPolicy{Jitter: JitterNone})
			tr.Policy.TotalTimeout = tt.total
			start := time.Now()
			resp, err := tr.RoundTrip(policyRequest(t, http.MethodGet))
			assert.Equal(t, tt.took, time.Since(start))
			assert.Len(t, base.at, tt.sent)
			switch {
			case tt.step.err == nil:
				require.NoError(t, err)
				assert.Equal(t, tt.step.status, resp.StatusCode)
				assert.Equal(t, fmt.Sprintf("answer %d", tt.sent), policyReadAll(t, resp))
			case tt.sent == 1:
				assert.Equal(t, tt.step.err, err)
			default:
				assert.Equal(t, &RetryError{Attempts: tt.sent, Err: tt.step.err}, err)
			}
			deadline := uint64(1)
			if tt.sent == 3 {
				deadline = 0
			}
			assert.Equal(t, Suppressed{Deadline: deadline}, policyStats(t, tr).Suppressed)
		})
	}
}

// policyLive is a response body that ends with its request's context.
type policyLive struct {
	ctx    context.Context
	closed atomic.Bool
}

func (b *policyLive) Read(p []byte) (int, error) {
	select {
	case <-b.ctx.Done():
		return 0, context.Cause(b.ctx)
	case <-time.After(time.Hour):
		return copy(p, "x"), nil
	}
}

func (b *policyLive) Close() error { b.closed.Store(true); return nil }

func TestTotalTimeoutNeverCutsABody(t *testing.T) {
	for _, failures := range []int{0, 2} {
		for name, p := range map[string]Policy{"alone": {}, "Timeout": {Timeout: time.Second}, "Idle": {Idle: 2 * time.Hour}} {
			policyBubble(t, fmt.Sprintf("%s, after %d failures", name, failures), func(t *testing.T) {
				var body *policyLive
				sent := 0
				p.TotalTimeout, p.Retry.Jitter = 5*time.Second, JitterNone
				tr := &Transport{Policy: p, Base: policyBase(func(req *http.Request) (*http.Response, error) {
					if sent++; sent <= failures {
						return policyAnswer(500), nil
					}
					body = &policyLive{ctx: req.Context()}
					return &http.Response{StatusCode: 200, Header: http.Header{}, Body: body}, nil
				})}
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				req := policyRequest(t, http.MethodGet).WithContext(ctx)
				resp, err := tr.RoundTrip(req)
				require.NoError(t, err)
				assert.Same(t, req, resp.Request)
				buf := make([]byte, 8)
				for range 3 {
					n, err := resp.Body.Read(buf)
					require.NoError(t, err)
					assert.Equal(t, "x", string(buf[:n]))
				}
				cancel()
				_, err = resp.Body.Read(buf)
				assert.ErrorIs(t, err, context.Canceled, "the caller's own context still ends it")
				require.NoError(t, resp.Body.Close())
				assert.True(t, body.closed.Load())
				assert.Error(t, body.ctx.Err(), "nothing is left behind")
				assert.Equal(t, uint64(1), policyStats(t, tr).OK)
			})
		}
	}
}

func TestTotalTimeoutCountsTheUpload(t *testing.T) {
	policyBubble(t, "upload", func(t *testing.T) {
		tr := &Transport{Policy: Policy{TotalTimeout: 5 * time.Second}, Base: policyBase(func(req *http.Request) (*http.Response, error) {
			defer req.Body.Close()
			for buf := make([]byte, 1); req.Context().Err() == nil; {
				if _, err := req.Body.Read(buf); err != nil {
					return policyAnswer(200), nil
				}
			}
			return nil, context.Cause(req.Context())
		})}
		req := policyRequest(t, http.MethodPost)
		body := &policySlowBody{}
		req.Body, req.ContentLength = body, -1
		start := time.Now()
		_, err := tr.RoundTrip(req)
		assert.ErrorContains(t, err, "no response within 5s")
		assert.Less(t, time.Since(start), 7*time.Second, "it ends with the Read that is under way")
		assert.Equal(t, int32(1), body.closes.Load())
	})
}

// policySlowBody gives a byte every two seconds until it is closed, for half a
// minute.
type policySlowBody struct {
	reads  int
	closes atomic.Int32
}

func (b *policySlowBody) Read(p []byte) (int, error) {
	time.Sleep(2 * time.Second)
	if b.reads++; b.reads > 15 {
		return 0, io.EOF
	}
	return copy(p, "x"), nil
}

func (b *policySlowBody) Close() error { b.closes.Add(1); return nil }

// A body is sent again as without TotalTimeout.
func TestTotalTimeoutSendsBodiesAgain(t *testing.T) {
	text := strings.Repeat("x", 5000)
	for name, body := range map[string]io.Reader{
		"in memory": strings.NewReader(text),
		"recorded":  io.MultiReader(strings.NewReader(text)),
		"can seek":  io.NewSectionReader(strings.NewReader(text), 0, int64(len(text))),
	} {
		policyBubble(t, name, func(t *testing.T) {
			base := tripptest.Script(500, 500, 200)
			r := policyAny
			if name == "can seek" {
				r.BodyLimit = 100
			}
			tr := policyTransport(base, r)
			tr.Policy.TotalTimeout = time.Minute
			req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, "https://api.example.com/v1", body)
			require.NoError(t, err)
			resp, err := tr.RoundTrip(req)
			require.NoError(t, err)
			assert.Equal(t, 200, resp.StatusCode)
			assert.Equal(t, []string{text, text, text}, base.Bodies())
		})
	}
}

// Who ended the request first decides what the caller is told.
func TestTotalTimeoutBesideTheCallersOwnEnd(t *testing.T) {
	policyBubble(t, "cancel", func(t *testing.T) {
		tr := &Transport{Base: policyHang(false), Policy: Policy{TotalTimeout: 5 * time.Second}}
		ctx, cancel := context.WithCancel(t.Context())
		time.AfterFunc(2*time.Second, cancel)
		_, err := tr.RoundTrip(policyRequest(t, http.MethodGet).WithContext(ctx))
		assert.Equal(t, context.Canceled, err)
		s := policyStats(t, tr)
		assert.Equal(t, uint64(1), s.Cancelled)
		assert.Equal(t, uint64(1), s.Ignored)
	})
	policyBubble(t, "deadline", func(t *testing.T) {
		tr := &Transport{Base: policyHang(false), Policy: Policy{TotalTimeout: 5 * time.Second}}
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
		defer cancel()
		_, err := tr.RoundTrip(policyRequest(t, http.MethodGet).WithContext(ctx))
		assert.Equal(t, context.DeadlineExceeded, err)
		s := policyStats(t, tr)
		assert.Equal(t, uint64(1), s.Failed)
		assert.Equal(t, uint64(1), s.Failures)
	})
	policyBubble(t, "a deadline later on", func(t *testing.T) {
		tr := &Transport{Base: policyHang(false), Policy: Policy{TotalTimeout: 5 * time.Second}}
		ctx, cancel := context.WithTimeout(t.Context(), 9*time.Second)
		defer cancel()
		_, err := tr.RoundTrip(policyRequest(t, http.MethodGet).WithContext(ctx))
		assert.ErrorContains(t, err, "no response within 5s")
	})
	policyBubble(t, "an SDK that retries by itself", func(t *testing.T) {
		tr := &Transport{Base: policyHang(false), Policy: Policy{TotalTimeout: 5 * time.Second}}
		req := policyRequest(t, http.MethodPost)
		req.Header.Set("X-Stainless-Retry-Count", "0")
		resp, err := tr.RoundTrip(req)
		require.NoError(t, err)
		assert.Equal(t, http.StatusGatewayTimeout, resp.StatusCode)
		assert.Equal(t, "false", resp.Header.Get("X-Should-Retry"))
		assert.Contains(t, policyReadAll(t, resp), "no response within 5s")
	})
}

// The breaker opens by what TotalTimeout ends, if the service had its time.
func TestTotalTimeoutAndTheBreaker(t *testing.T) {
	for total, want := range map[time.Duration]State{5 * time.Second: Open, 500 * time.Millisecond: Closed} {
		policyBubble(t, total.String(), func(t *testing.T) {
			tr := &Transport{Base: policyHang(false), Policy: Policy{TotalTimeout: total}}
			for range 5 {
				_, err := tr.RoundTrip(policyRequest(t, http.MethodGet))
				require.Error(t, err)
			}
			assert.Equal(t, want, policyStats(t, tr).State)
		})
	}
}

// policyBase is a function as a base.
type policyBase func(*http.Request) (*http.Response, error)

func (f policyBase) RoundTrip(req *http.Request) (*http.Response, error) { return f(req) }

// policyValue is a base that is no pointer.
type policyValue struct{}

func (policyValue) RoundTrip(*http.Request) (*http.Response, error) { return nil, ErrRejected }

// policyAny retries every method.
var policyAny = RetryPolicy{Replay: ReplayAny}

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
	stream string // an event stream as the answer
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
	time.Sleep(step.takes)
	if step.err != nil {
		return nil, step.err
	}
	body := &policyBody{Reader: strings.NewReader(fmt.Sprintf("answer %d", len(s.at)))}
	s.bodies = append(s.bodies, body)
	resp := policyAnswer(step.status, step.header...)
	if step.stream != "" {
		body.Reader = strings.NewReader(step.stream)
		resp.Header.Set("Content-Type", "text/event-stream")
	}
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
	return Policy{Retry: RetryPolicy{MinWait: 1, MaxWait: 1, Replay: ReplayAny}, Breaker: BreakerPolicy{FailureThreshold: 100}}
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

func policyTo(scheme, host string) *http.Request {
	return &http.Request{URL: &url.URL{Scheme: scheme, Host: host}}
}

// policyRoute returns the service that a request to host uses, "" if none.
func policyRoute(tr *Transport, scheme, host string) string {
	s, _ := tr.load().route(policyTo(scheme, host))
	if s == nil {
		return ""
	}
	return s.name
}

// policyCheckService checks which service requests to host use, and that
// ServiceOf says the same.
func policyCheckService(t *testing.T, tr *Transport, scheme, host, want string) {
	t.Helper()
	assert.Equal(t, want, tr.ServiceOf(policyTo(scheme, host)), "%s://%s", scheme, host)
	assert.Equal(t, want, policyRoute(tr, scheme, host), "%s://%s", scheme, host)
}

func policyErrorEvent(kind string) string {
	return "event: error\ndata: {\"type\":\"error\",\"error\":{\"type\":\"" + kind + "\"}}\n\n"
}
