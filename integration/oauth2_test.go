package integration

import (
	"context"
	"errors"
	"net/http"
	"net/url"
	"strconv"
	"sync/atomic"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/oauth2"
	"golang.org/x/oauth2/clientcredentials"

	"github.com/tripper-go/tripper"
)

func token(text string) step {
	return asJSON(`{"access_token":"` + text + `","token_type":"Bearer","expires_in":3600}`)
}

// A tokenClient asks for a token; the request for it goes over tripper too.
func tokenClient() client {
	return client{
		name: "token endpoint",
		call: func(ctx context.Context, url string, hc *http.Client) (string, error) {
			token, err := clientID(url).Token(context.WithValue(ctx, oauth2.HTTPClient, hc))
			if err != nil {
				return "", err
			}
			return token.AccessToken, nil
		},
		healthy: token("hello"),
		fault: func(status int, headers ...string) step {
			return answer(status, "application/json", `{"error":"temporarily_unavailable","error_description":"`+plea+`"}`, headers...)
		},
		inspect: func(err error) (int, string, bool) {
			e, ok := errors.AsType[*oauth2.RetrieveError](err)
			if !ok {
				return 0, "", false
			}
			return e.Response.StatusCode, string(e.Body), true
		},
	}
}

// Without an AuthStyle the first request that fails is made once more in the
// other style, which doubles the attempts.
func clientID(endpoint string) *clientcredentials.Config {
	return &clientcredentials.Config{ClientID: "id", ClientSecret: "secret", TokenURL: endpoint + "/token", AuthStyle: oauth2.AuthStyleInParams}
}

// Above tripper: one token for all attempts of a request.
func TestOAuth2AboveTakesOneToken(t *testing.T) {
	t.Parallel()
	tokens := play(t, reset, token("first"), token("second"))
	api := play(t, reset, textFault(http.StatusServiceUnavailable), answer(http.StatusOK, "text/plain", "hello"))
	tr := newStack(client{}, api, func(tr *tripper.Transport) { tr.Policy.Service = "" }).Transport
	hc := clientID(tokens.URL).Client(context.WithValue(t.Context(), oauth2.HTTPClient, &http.Client{Transport: tr}))

	resp, err := hc.Post(api.URL, "text/plain", nil)
	require.NoError(t, err)
	resp.Body.Close()
	require.Equal(t, http.StatusOK, resp.StatusCode)
	require.Len(t, tokens.wire(), 2, "the token's own request recovers")
	require.Len(t, api.wire(), 3)
	for _, r := range api.wire() {
		require.Equal(t, "Bearer first", r.Header.Get("Authorization"))
	}
}

// Below tripper: each attempt asks for a token, so one that has expired during a
// wait is replaced.
func TestOAuth2BelowAsksForEachAttempt(t *testing.T) {
	t.Parallel()
	var asked atomic.Int64
	c := plain("", func(c *client) {
		c.below = func(rt http.RoundTripper) http.RoundTripper {
			return &oauth2.Transport{Base: rt, Source: sourceFunc(func() (*oauth2.Token, error) {
				return &oauth2.Token{AccessToken: "number " + strconv.FormatInt(asked.Add(1), 10)}, nil
			})}
		}
	})
	st := newStack(c, play(t, reset, c.fault(http.StatusServiceUnavailable), c.healthy))
	got, err := st.call(t, c)
	require.NoError(t, err)
	require.Equal(t, "hello", got)
	wire := st.requireWire(t, 3)
	requireSame(t, wire)
	for i, r := range wire {
		require.Equal(t, "Bearer number "+strconv.Itoa(i+1), r.Header.Get("Authorization"))
	}
}

type sourceFunc func() (*oauth2.Token, error)

func (f sourceFunc) Token() (*oauth2.Token, error) { return f() }

// Whoever refuses the token, its error comes through both sides.
func TestOAuth2TokenIsRefused(t *testing.T) {
	t.Parallel()
	for name, below := range map[string]bool{"above": false, "below": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			tokens := play(t, answer(http.StatusBadRequest, "application/json", `{"error":"invalid_client","error_description":"`+plea+`"}`))
			source := clientID(tokens.URL).TokenSource(t.Context())
			wrap := func(rt http.RoundTripper) http.RoundTripper { return &oauth2.Transport{Source: source, Base: rt} }
			c := plain(name, func(c *client) {
				if below {
					c.below = wrap
				} else {
					c.above = wrap
				}
			})
			api := play(t, c.healthy)
			_, err := newStack(c, api).call(t, c)
			refused, ok := errors.AsType[*oauth2.RetrieveError](err)
			require.True(t, ok, "%T: %v", err, err)
			require.Equal(t, "invalid_client", refused.ErrorCode)
			require.Contains(t, string(refused.Body), plea)
			require.Empty(t, api.wire())
			outer, ok := errors.AsType[*url.Error](err)
			require.True(t, ok)
			_, twice := errors.AsType[*url.Error](outer.Err)
			require.False(t, twice, "the URL is named once: %v", err)
		})
	}
}
