package redact

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"os"
	"strconv"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

var errDown = errors.New("the service is down")

func parse(t testing.TB, raw string) *url.URL {
	u, err := url.Parse(raw)
	require.NoError(t, err)
	return u
}

func urlError(u *url.URL) error {
	return &url.Error{Op: "Get", URL: u.String(), Err: errDown}
}

// leaks are what bases put into their errors. Each secret has SECRET in it.
var leaks = map[string]func(*url.URL) error{
	"whole URL":     func(u *url.URL) error { return errors.New("cannot reach " + u.String()) },
	"quoted URL":    func(u *url.URL) error { return fmt.Errorf("cannot reach %q", u) },
	"url.Error":     urlError,
	"nested":        func(u *url.URL) error { return fmt.Errorf("proxy: %w", urlError(u)) },
	"twice":         func(u *url.URL) error { return &url.Error{Op: "Get", URL: u.String(), Err: urlError(u)} },
	"joined":        func(u *url.URL) error { return errors.Join(errDown, urlError(u)) },
	"only its text": func(u *url.URL) error { return fmt.Errorf("proxy: %v", urlError(u)) },
	"redacted":      func(u *url.URL) error { return errors.New("cannot reach " + u.Redacted()) },
	"query":         func(u *url.URL) error { return errors.New("bad query " + u.RawQuery) },
	"unescaped": func(u *url.URL) error {
		q, _ := url.QueryUnescape(strings.ReplaceAll(u.RawQuery, "%zz", "%25zz"))
		return errors.New("bad query " + q)
	},
	"one key":        func(u *url.URL) error { return errors.New("bad key " + u.Query().Get("key")) },
	"escaped value":  func(u *url.URL) error { return errors.New("bad token " + url.QueryEscape(u.Query().Get("token"))) },
	"value in path":  func(u *url.URL) error { return errors.New("bad token " + url.PathEscape(u.Query().Get("token"))) },
	"quoted value":   func(u *url.URL) error { return fmt.Errorf("bad token %q", u.Query().Get("quote")) },
	"raw value":      func(*url.URL) error { return errors.New("bad token raw%2fSECRET") },
	"no key":         func(*url.URL) error { return errors.New("bad token alone-SECRET") },
	"reordered":      func(u *url.URL) error { return errors.New("bad query " + u.Query().Encode()) },
	"a longer":       func(u *url.URL) error { return errors.New("bad value " + u.Query().Get("longer")) },
	"overlapping":    func(*url.URL) error { return errors.New("abcd-SECRETkey-SECRET") },
	"user info":      func(u *url.URL) error { return errors.New("bad login " + u.User.String()) },
	"password":       func(u *url.URL) error { p, _ := u.User.Password(); return errors.New("bad password " + p) },
	"raw password":   func(*url.URL) error { return errors.New("bad password pass%2FSECRET") },
	"user name":      func(u *url.URL) error { return errors.New("unknown user " + u.User.Username()) },
	"fragment":       func(u *url.URL) error { return errors.New("odd fragment " + u.Fragment) },
	"request's line": func(u *url.URL) error { return fmt.Errorf("dial: %q", "GET "+u.RequestURI()) },
}

func TestSecretsStaySecret(t *testing.T) {
	u := parse(t, "https://user-SECRET:pass%2FSECRET@api.example.com/path?short=abcd&key=key-SECRET&token=a%2FSECRET%2Bb&longer=abcd-SECRET"+
		"&low=raw%2fSECRET&quote=%22q-SECRET%5C&alone-SECRET&bad=%zz-SECRET#frag-SECRET")
	for name, leak := range leaks {
		err := leak(u)
		text := Error(u, err).Error()
		assert.NotContains(t, text, "SECRET", name)
		assert.NotEqual(t, err.Error(), text, name)
	}
	assert.Equal(t, "https://api.example.com/path", URL(u))
}

// A base may ask somebody else on the way, whose URL has secrets, too.
func TestSecretsOfAnotherURL(t *testing.T) {
	u := parse(t, "https://api.example.com/path")
	for _, raw := range []string{"https://proxy.example/?k=SECRET", "https://user:SECRET@proxy.example/", "http://a/%zz?k=SECRET", "http://a/#SECRET",
		"http://user:pa/SECRET@a/", "?SECRET", "http://a/?k=SECRET\x7f", "http:opaque?SECRET", "http://a/?k=%zz;SECRET"} {
		other := &url.Error{Op: "Get", URL: raw, Err: errDown}
		for i, err := range []error{other, fmt.Errorf("proxy: %w", other), errors.Join(errDown, fmt.Errorf("proxy: %w", other)),
			&url.Error{Op: "Get", URL: u.String(), Err: other}, fmt.Errorf("%w, and again: %w", other, other), own{other, "cannot reach " + raw},
			own{other, fmt.Sprintf("cannot reach %q", raw)}} {
			clean := Error(u, err)
			assert.NotContains(t, clean.Error(), "SECRET", "%s, %d", raw, i)
			assert.ErrorIs(t, clean, errDown)
			assert.NotContains(t, Error(nil, err).Error(), "SECRET", "%s, %d", raw, i)
		}
	}
}

// An own error says in its own words what it wraps.
type own struct {
	error
	text string
}

func (o own) Error() string { return o.text }
func (o own) Unwrap() error { return o.error }

// Error takes nothing away that is not secret, and keeps the error's type.
func TestErrorKeepsWhatItCan(t *testing.T) {
	u := parse(t, "https://api.example.com/path?a=1&key=secret-key")
	op := &net.OpError{Op: "dial", Err: errDown}
	require.NoError(t, Error(u, nil))
	for _, err := range []error{op, &url.Error{Op: "Get", URL: u.String(), Err: op},
		&url.Error{Op: "Get", URL: "https://b/?x=1", Err: &url.Error{Op: "Get", URL: u.String(), Err: op}}} {
		require.Same(t, op, Error(u, err))
	}
	clean := Error(u, fmt.Errorf("with secret-key: %w", op))
	require.EqualError(t, clean, "with xxxxx: dial: the service is down")
	require.ErrorIs(t, clean, op)
	require.Same(t, clean, Error(u, clean), "clean already")

	nested := Error(u, fmt.Errorf("proxy: %w", urlError(u)))
	require.EqualError(t, nested, "proxy: the service is down")
	var inner *url.Error
	require.ErrorAs(t, nested, &inner)

	require.EqualError(t, Error(parse(t, "http://a/?ab=cd&e"), errors.New("abcde")), "abcde", "too short to be a secret")
}

func TestTimeoutSurvives(t *testing.T) {
	u := parse(t, "https://api.example.com/?key=secret-key")
	for _, tt := range []struct {
		err       error
		timeout   bool
		temporary bool
	}{
		{os.ErrDeadlineExceeded, true, true},
		{context.DeadlineExceeded, true, true},
		{&net.DNSError{IsTemporary: true}, false, true},
		{&net.OpError{Op: "read", Err: os.ErrDeadlineExceeded}, true, true},
		{errDown, false, false},
	} {
		clean := Error(u, fmt.Errorf("with secret-key: %w", tt.err))
		require.IsType(t, (*cleanError)(nil), clean)
		outer := &url.Error{Op: "Get", URL: "https://api.example.com/", Err: clean}
		assert.Equal(t, tt.timeout, outer.Timeout(), "%v", tt.err)
		assert.Equal(t, tt.temporary, outer.Temporary(), "%v", tt.err)
	}
}

func TestURL(t *testing.T) {
	for raw, want := range map[string]string{
		"https://user:pass@api.example.com:8443/a%2Fb/c?key=1#top": "https://api.example.com:8443/a%2Fb/c",
		"https://api.example.com":                                  "https://api.example.com",
		"https://api.example.com?":                                 "https://api.example.com",
		"http://[fe80::1%25en0]:80/":                               "http://[fe80::1%25en0]:80/",
		"mailto:someone?subject=secret":                            "mailto:someone",
		"http+unix:///run/a.sock?k=1":                              "http+unix:///run/a.sock",
		"/path?k=1":                                                "/path",
	} {
		assert.Equal(t, want, URL(parse(t, raw)))
	}
	assert.Equal(t, "http://a/b%2fc", URL(&url.URL{Scheme: "http", Host: "x", Opaque: "//user:p@a/b%2fc?key=1#2"}))
	assert.Equal(t, "http://a", URL(&url.URL{Scheme: "http", Opaque: "//user:p@a?key=1"}))
	assert.Empty(t, URL(nil))
}

func TestStatusError(t *testing.T) {
	require.EqualError(t, StatusError(529), "529")
	require.EqualError(t, StatusError(http.StatusServiceUnavailable), "503 Service Unavailable")
	require.Equal(t, StatusError(503), StatusError(503))
}

// No secret of four bytes or more is left, in whatever form an error has it.
func FuzzRedact(f *testing.F) {
	f.Add("user", "p@ss/word", "secret key", "frag", "bad %s", byte(0))
	f.Add("", "aaaa", "aaaaaaa", "aaaab", "aaaaaaaa%saaaaa", byte(1))
	f.Add("\"quo\\te", "\xff\xfe\x00\n", "%zz;&=+", "#?@:", "", byte(2))
	f.Add("abcdef", "defghi", "ghij", "jabc", "abcdefghijabc %s", byte(3))
	f.Fuzz(func(t *testing.T, name, password, value, fragment, around string, how byte) {
		u := &url.URL{Scheme: "https", Host: "h", Path: "/", User: url.UserPassword(name, password), Fragment: fragment,
			RawQuery: "k=" + url.QueryEscape(value) + "&" + value}
		text := strings.ReplaceAll(around, "%s", []string{u.String(), password, value, u.RawQuery, fragment, strconv.Quote(u.String())}[how%6])
		err := errors.New(text)
		switch how / 6 % 4 {
		case 1:
			err = &url.Error{Op: "Get", URL: u.String(), Err: err}
		case 2:
			err = fmt.Errorf("%s: %w", text, urlError(u))
		case 3:
			u, err = nil, own{urlError(u), text}
		}
		clean := Error(u, err).Error()
		for _, secret := range []string{name, password, value, fragment} {
			// The placeholder is not to be taken for a secret.
			if len(secret) >= shortest && !strings.Contains(secret, "x") && strings.Contains(clean, secret) &&
				!strings.Contains("the service is down", secret) {
				t.Errorf("%q is left in %q of %q", secret, clean, err)
			}
		}
	})
}
