package hosts

import (
	"fmt"
	"net/url"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func pattern(t testing.TB, s string) Pattern {
	t.Helper()
	p, err := ParsePattern(s)
	require.NoError(t, err)
	return p
}

var serviceNames = []struct{ scheme, authority, want string }{
	{"https", "api.example.com", "api.example.com"},
	{"https", "API.Example.COM", "api.example.com"},
	{"https", "api.example.com.", "api.example.com"},
	{"https", "api.example.com:443", "api.example.com"},
	{"https", "API.example.com.:443", "api.example.com"},
	{"https", "api.example.com:", "api.example.com"},
	{"https", "api.example.com:80", "api.example.com:80"},
	{"https", "api.example.com.:8443", "api.example.com:8443"},
	{"https", "API.example.com:8443", "api.example.com:8443"},
	{"http", "api.example.com", "api.example.com"},
	{"http", "api.example.com:80", "api.example.com"},
	{"http", "api.example.com:443", "api.example.com:443"},
	{"ws", "api.example.com:80", "api.example.com"},
	{"wss", "api.example.com:443", "api.example.com"},
	{"", "api.example.com:443", "api.example.com:443"},
	{"other", "api.example.com:80", "api.example.com:80"},
	{"http", "localhost:8080", "localhost:8080"},
	{"http", "10.0.0.1:80", "10.0.0.1"},
	{"http", "[::1]", "[::1]"},
	{"http", "[::1]:", "[::1]"},
	{"http", "[::1]:80", "[::1]"},
	{"http", "[::1]:8080", "[::1]:8080"},
	{"https", "[2001:DB8::1]:443", "[2001:db8::1]"},
	{"http", "[2001:DB8::1]:443", "[2001:db8::1]:443"},
	{"http", "[fe80::1%en0]:80", "[fe80::1%en0]"},
	{"http", "[fe80::1%eth0.100]:81", "[fe80::1%eth0.100]:81"},
	{"https", "BÜCHER.example:443", "bücher.example"},
	{"https", "xn--bcher-kva.example", "xn--bcher-kva.example"},
	{"http", "", ""},
}

func TestServiceName(t *testing.T) {
	for _, tt := range serviceNames {
		assert.Equal(t, tt.want, ServiceName(tt.scheme, tt.authority), "%s://%s", tt.scheme, tt.authority)
		assert.Equal(t, tt.want, Split(tt.authority).For(tt.scheme), "%s://%s", tt.scheme, tt.authority)
		assert.Equal(t, tt.want, ServiceName(tt.scheme, tt.want), "again")
	}
}

func TestCanonicalNamesCostNothing(t *testing.T) {
	var table Table[int]
	for _, s := range []string{"api.example.com", "*.example.com", "localhost:8080"} {
		table.Add(pattern(t, s), 1)
	}
	for _, authority := range []string{"api.example.com", "api.example.com:443", "api.example.com.", "api.example.com:", "localhost:8080", "[::1]:9", "[::1]"} {
		assert.Zero(t, testing.AllocsPerRun(100, func() {
			_ = ServiceName("https", authority)
			_ = WithoutDefaultPort("https", authority)
			table.Find("https", Split(authority))
		}), authority)
	}
}

func TestWithoutDefaultPort(t *testing.T) {
	for _, tt := range []struct{ scheme, host, want string }{
		{"https", "a:443", "a"}, {"http", "a:80", "a"}, {"https", "a:80", "a:80"}, {"http", "a:443", "a:443"}, {"https", "a", "a"},
		{"https", "[::1]:443", "[::1]"}, {"https", "a:1443", "a:1443"}, {"http", "a:8080", "a:8080"}, {"wss", "a:443", "a:443"},
		{"https", "", ""}, {"http", ":80", ""}, {"https", "443", "443"}, {"http", "80", "80"},
	} {
		assert.Equal(t, tt.want, WithoutDefaultPort(tt.scheme, tt.host), "%s://%s", tt.scheme, tt.host)
	}
}

func TestParsePattern(t *testing.T) {
	for _, s := range []string{"example.com", "EXAMPLE.com.", "localhost:8080", "*.example.com", "*.example.com:8443",
		"127.0.0.1", "127.0.0.1:1", "[::1]", "[::1]:65535", "[fe80::1%en0]", "[fe80::1%25en0]:80", "xn--bcher-kva.example", "bücher.example",
		"under_score.example", "*.internal", "*.bücher.example", "a-b.example", "example.com:"} {
		_, err := ParsePattern(s)
		assert.NoError(t, err, s)
	}
	const host, port = "is no host: want one such as", "want 1 to 65535"
	for s, wish := range map[string]string{
		"": host, " ": host, ".": host, "*.": host, "**.example.com": host, "*.*.example.com": host,
		"api.*.com": host, "*example.com": host, ".example.com": host, "a..example.com": host,
		" example.com": host, "example.com ": host, "exam ple.com": host, "example.com\n": host, "exam\u00a0ple.com": host, "exam\x00ple.com": host,
		"http://example.com": host, "https://example.com/": host, "https://example.com:443": host, "//example.com": host,
		"example.com/v1": host, "example.com:8080/v1": host, "example.com?q=1": host, "example.com#top": host,
		"user@example.com": host, "user:secret@example.com": host, "user:secret@example.com:8080": host,
		"a.example,b.example": host, "a.example|b.example": host, "exam\xffple.com": host, "exam%41ple.com": host,
		"::1": host, "[::1": host, "::1]": host, "[::1]x": host, "[example.com]": host, "*.[::1]": host, "[1.2.3.4]": host, "[]": host,
		"[fe80::1%]": host, "[fe80::1%a b]": host, "[fe80::1%a/b]": host, "[fe80::1%a]b]": host, "[fe80::1%a%b]": host,
		"example.com:0": port, "example.com:65536": port, "example.com:99999999999999999999": port,
		"example.com:-1": port, "example.com:+1": port, "example.com:http": port, "example.com:080": port, "*:8080": host, ":8080": host,
		"*": "is no host: want the policy of every other host in Policy",
	} {
		_, err := ParsePattern(s)
		if assert.Error(t, err, "%q", s) {
			assert.Contains(t, err.Error(), fmt.Sprintf("tripper: Hosts[%q] ", s))
			assert.Contains(t, err.Error(), wish)
		}
	}
}

func TestPatternsOfOneHostAreEqual(t *testing.T) {
	for _, pair := range [][2]string{{"API.example.com", "api.example.com"}, {"api.example.com", "api.example.com."},
		{"API.example.com:8080", "api.example.com.:8080"}, {"*.Example.com", "*.example.com"}, {"[::A]", "[::a]"},
		{"[fe80::1%25en0]", "[fe80::1%en0]"}, {"BÜCHER.example", "bücher.example"}} {
		assert.Equal(t, pattern(t, pair[0]), pattern(t, pair[1]))
	}
	for _, pair := range [][2]string{{"example.com", "example.com:8080"}, {"example.com", "*.example.com"},
		{"*.example.com", "*.example.com:8080"}, {"example.com", "example.com:443"}, {"example.com:80", "example.com:443"}} {
		assert.NotEqual(t, pattern(t, pair[0]), pattern(t, pair[1]))
	}
}

func TestPatternService(t *testing.T) {
	for _, tt := range []struct {
		pattern, own, want string
		depends            bool
	}{
		{"API.example.com.", "", "api.example.com", false},
		{"api.example.com:8080", "", "api.example.com:8080", false},
		{"api.example.com:443", "", "api.example.com", true},
		{"api.example.com:80", "", "api.example.com", true},
		{"*.example.com", "", "", false},
		{"*.example.com:8080", "", "", false},
		{"[::1]:81", "", "[::1]:81", false},
		{"*.example.com", "mine", "mine", false},
		{"api.example.com:80", "mine", "mine", true},
	} {
		p := pattern(t, tt.pattern)
		assert.Equal(t, tt.want, p.Service(tt.own), tt.pattern)
		assert.Equal(t, tt.depends, p.DependsOnScheme(), tt.pattern)
	}
}

func TestValid(t *testing.T) {
	for _, name := range []string{"example.com", "localhost", "localhost:8080", "127.0.0.1:80", "[::1]", "[::1]:80", "[fe80::1%en0]", "bücher.example", "a_b"} {
		assert.True(t, Valid(name), name)
	}
	for _, name := range []string{"", "*", "*.example.com", "http://example.com", "example.com/", "a b", "a:0", "a:x", "a:080", ":80", "::1", "[::1", "a..b", ".a",
		"u@a", "a?b", "claude api", "a\n"} {
		assert.False(t, Valid(name), name)
	}
}

func TestFind(t *testing.T) {
	patterns := []string{"api.example.com:8443", "api.example.com", "*.example.com", "*.eu.example.com", "*.com", "*.example.com:9000",
		"localhost:8080", "127.0.0.1", "[::1]:9000", "[::1]", "[fe80::1%25en0]", "secure.test:443", "plain.test:80", "PLAIN.test."}
	var table Table[string]
	for _, s := range patterns {
		table.Add(pattern(t, s), s)
	}
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
		{"https", "", ""},
		{"https", "example.org", ""},
		{"http", "localhost:8080", "localhost:8080"},
		{"http", "localhost", ""},
		{"http", "localhost:80800", ""},
		{"http", "127.0.0.1:5000", "127.0.0.1"},
		{"http", "[::1]:9000", "[::1]:9000"},
		{"http", "[::1]:80", "[::1]"},
		{"http", "[::2]", ""},
		{"http", "[fe80::1%en0]:81", "[fe80::1%25en0]"},
		{"http", "[fe80::1%en1]", ""},
		{"https", "secure.test", "secure.test:443"},
		{"wss", "secure.test", "secure.test:443"},
		{"https", "secure.test:443", "secure.test:443"},
		{"http", "secure.test:443", "secure.test:443"},
		{"http", "secure.test", ""},
		{"http", "plain.test", "plain.test:80"},
		{"https", "plain.test", "PLAIN.test."},
		{"https", "plain.test:80", "plain.test:80"},
		{"", "plain.test", "PLAIN.test."},
	} {
		got, ok := table.Find(tt.scheme, Split(tt.host))
		assert.Equal(t, tt.want, got, "%s://%s", tt.scheme, tt.host)
		assert.Equal(t, tt.want != "", ok, "%s://%s", tt.scheme, tt.host)
	}
	_, ok := new(Table[int]).Find("https", Split("api.example.com"))
	assert.False(t, ok)
}

// A pattern of an address with a zone fits what net/url makes of its URL.
func TestZoneAsInAURL(t *testing.T) {
	var table Table[bool]
	table.Add(pattern(t, "[fe80::1%25en0]:8080"), true)
	u, err := url.Parse("http://[FE80::1%25en0]:8080/")
	require.NoError(t, err)
	_, ok := table.Find(u.Scheme, Split(u.Host))
	require.True(t, ok, u.Host)
}

func FuzzHost(f *testing.F) {
	for _, host := range []string{"api.example.com", "API.example.com.:443", "localhost:8080", "[::1]:80", "[2001:DB8::1]", "a..", "a::443", "a:.",
		":8080", ".", "::", "[", "]:", "\u0130.example", "a\xffB", "*.example.com", "a:80:443", "a:b", "%41.example", "[fe80::1%25En0]:80"} {
		f.Add(host)
	}
	f.Fuzz(func(t *testing.T, host string) {
		n := Split(host) // of anything that a hand-made URL may hold
		if n.Host != strings.ToLower(n.Host) || strings.HasSuffix(n.Host, ".") {
			t.Errorf("%q: host %q", host, n.Host)
		}
		for _, scheme := range []string{"", "http", "https"} {
			if name := ServiceName(scheme, host); name != n.For(scheme) {
				t.Errorf("%q: service %q, but %q", host, name, n.For(scheme))
			}
		}
		u, err := url.Parse("https://" + host + "/")
		if err != nil || u.Host == "" {
			return // net/http could not send it
		}
		for _, scheme := range []string{"http", "https"} {
			name := ServiceName(scheme, u.Host)
			for _, alias := range []string{name, strings.ToUpper(name), WithoutDefaultPort(scheme, u.Host)} {
				lower := strings.ToLower(alias) // for some letters it is not what they fold to
				if again := ServiceName(scheme, alias); again != name && lower == strings.ToLower(name) {
					t.Errorf("%s://%s: service %q, but %q of %q", scheme, u.Host, name, again, alias)
				}
			}
		}
	})
}

func FuzzHostPattern(f *testing.F) {
	for _, s := range []string{"api.example.com", "*.Example.com.:8443", "*", "http://a/", "a@b", "[::1]:1", "[::1", "::1", "a:080", "*.a..", "a b",
		"[fe80::1%25en0]", "[fe80::1%25]", "[fe80::1%25%]", "bücher.example", "a:"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		p, err := ParsePattern(s)
		if err != nil {
			if Valid(s) {
				t.Errorf("%q is a host, but %v", s, err)
			}
			return
		}
		if strings.ContainsAny(s, " /@?#\t\r\n") || p.name.Host == "" || p.name.Host != strings.ToLower(p.name.Host) {
			t.Errorf("%q is taken for %q", s, p)
		}
		var table Table[int]
		table.Add(p, 7)
		host := strings.Replace(s, "*", "Www", 1)
		// As net/url gives it: not with an escaped zone.
		if u, err := url.Parse("http://" + host); err == nil {
			host = u.Host
		}
		for _, scheme := range []string{"http", "https"} {
			if v, _ := table.Find(scheme, Split(host)); v != 7 {
				t.Errorf("%q does not match %s://%s", s, scheme, host)
			}
		}
		if own := p.Service(""); own != "" && (!Valid(own) || !p.DependsOnScheme() && ServiceName("https", own) != own) {
			t.Errorf("%q has the service %q", s, own)
		}
	})
}
