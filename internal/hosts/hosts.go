// Package hosts parses host names and patterns of them, and finds what belongs
// to a host.
//
// A host is a name, an IPv4 address, or an IPv6 address in brackets, with its zone
// if it has one. Names of other alphabets are taken as they come: "bücher.example"
// and "xn--bcher-kva.example" are two.
package hosts

import (
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"
)

// A Name is a host in lower case without a trailing dot, and a port or "".
type Name struct{ Host, Port string }

// Split splits the authority of a URL. It allocates only when there is an
// upper-case letter.
func Split(authority string) Name {
	host, port := authority, ""
	if i := strings.LastIndexByte(host, ':'); i >= 0 && i > strings.LastIndexByte(host, ']') {
		host, port = host[:i], host[i+1:]
	}
	return Name{strings.ToLower(strings.TrimRight(host, ".")), port}
}

// For returns the name of the service that a host is by itself: the host, and the
// port unless it is the scheme's default. It allocates only to join the two; see
// ServiceName.
func (n Name) For(scheme string) string {
	if n.Port == "" || n.Port == defaultPort(scheme) {
		return n.Host
	}
	return n.Host + ":" + n.Port
}

// ServiceName returns Split(authority).For(scheme). It allocates nothing when the
// authority, or the part of it that counts, is written that way already.
func ServiceName(scheme, authority string) string {
	n := Split(authority)
	if len(authority) == len(n.Host)+len(":")+len(n.Port) && strings.HasPrefix(authority, n.Host) && n.Port != "" && n.Port != defaultPort(scheme) {
		return authority
	}
	return n.For(scheme)
}

// WithoutDefaultPort cuts the scheme's default port off host. It knows http and
// https, and looks at nothing else: the success path cannot afford more.
func WithoutDefaultPort(scheme, host string) string {
	n := len(host)
	switch {
	case n >= 4 && host[n-4] == ':' && host[n-3:] == "443" && scheme == "https":
		return host[:n-4]
	case n >= 3 && host[n-3] == ':' && host[n-2:] == "80" && scheme == "http":
		return host[:n-3]
	}
	return host
}

func defaultPort(scheme string) string {
	switch scheme {
	case "https", "wss":
		return "443"
	case "http", "ws":
		return "80"
	}
	return ""
}

// ParsePattern reads a key of Transport.Hosts, such as "api.example.com",
// "localhost:8080" or "*.example.com". The percent sign before an IPv6 address's
// zone may be written as in a URL: "[fe80::1%25en0]".
func ParsePattern(pattern string) (Pattern, error) {
	if pattern == "*" {
		return Pattern{}, fmt.Errorf("tripper: Hosts[%q] is no host: want the policy of every other host in Policy", pattern)
	}
	n := Split(pattern)
	host, wild := strings.CutPrefix(n.Host, "*.")
	if address, zone, ok := strings.Cut(host, "%25"); ok && zone != "]" {
		host = address + "%" + zone
	}
	// With one of these it is a URL, or more than a host in some other way.
	if !validHost(host) || wild && host[0] == '[' || strings.ContainsAny(n.Port, "/@?#%\\ \t\r\n") {
		return Pattern{}, fmt.Errorf(`tripper: Hosts[%q] is no host: want one such as "api.example.com", "localhost:8080" or "*.example.com"`, pattern)
	}
	if n.Port != "" && !validPort(n.Port) {
		return Pattern{}, fmt.Errorf("tripper: Hosts[%q] has port %q: want 1 to 65535", pattern, n.Port)
	}
	if wild {
		host = "." + host
	}
	return Pattern{Name{host, n.Port}}, nil
}

// Valid reports whether name is a host that a request can go to, with or without
// a port. A wildcard is none.
func Valid(name string) bool {
	n := Split(name)
	return validHost(n.Host) && (n.Port == "" || validPort(n.Port))
}

func validHost(host string) bool {
	if literal, ok := strings.CutPrefix(host, "["); ok {
		literal, ok = strings.CutSuffix(literal, "]")
		address, err := netip.ParseAddr(literal)
		return ok && err == nil && address.Is6() && !strings.ContainsFunc(address.Zone(), func(r rune) bool { return r == '%' || !allowed(r) })
	}
	return !strings.ContainsFunc(host, func(r rune) bool { return !allowed(r) }) && !slices.Contains(strings.Split(host, "."), "")
}

// allowed reports whether a host's name may hold r. What is not UTF-8 is a
// RuneError.
func allowed(r rune) bool {
	if r < utf8.RuneSelf {
		return r == '-' || r == '_' || r == '.' || unicode.IsLetter(r) || unicode.IsDigit(r)
	}
	return !unicode.IsSpace(r) && !unicode.IsControl(r) && r != utf8.RuneError
}

func validPort(port string) bool {
	n, err := strconv.ParseUint(port, 10, 16)
	return err == nil && n > 0 && strconv.FormatUint(n, 10) == port
}

// A Pattern stands for one host, with or without a port, or for all names below
// one. Two that stand for the same are equal.
type Pattern struct {
	name Name // the host begins with a dot if it stands for all names below
}

// DependsOnScheme reports whether it depends on a request's scheme whether the
// pattern's port is a part of the service's name.
func (p Pattern) DependsOnScheme() bool { return p.name.Port == "80" || p.name.Port == "443" }

// Service returns the service that a host of this pattern has under a policy
// that names the service own; "" is a policy that names none. It returns "" if
// each host is a service of its own and the pattern stands for many.
func (p Pattern) Service(own string) string {
	switch {
	case own != "":
		return own
	case p.name.Host[0] == '.':
		return ""
	case p.DependsOnScheme():
		return p.name.Host
	}
	return p.name.For("")
}

// A Table finds what belongs to a host. The zero Table is empty. Adding must be
// over before finding begins; many may find at a time.
type Table[V any] struct{ rows map[Name]V }

// Add adds what belongs to the hosts of a pattern.
func (t *Table[V]) Add(p Pattern, v V) {
	if t.rows == nil {
		t.rows = make(map[Name]V)
	}
	t.rows[p.name] = v
}

// Find looks for the host with its port first, then for the host, then for the
// longest wildcard that the host is below, again with the port first. A host
// without a port has the scheme's.
func (t *Table[V]) Find(scheme string, n Name) (v V, ok bool) {
	if len(t.rows) == 0 {
		return v, false
	}
	if n.Port == "" {
		n.Port = defaultPort(scheme)
	}
	for {
		if v, ok = t.rows[n]; ok {
			return v, true
		}
		if v, ok = t.rows[Name{Host: n.Host}]; ok {
			return v, true
		}
		// "a.b.c" is below ".b.c", and that is below ".c".
		dot := strings.IndexByte(n.Host[min(1, len(n.Host)):], '.')
		if dot < 0 {
			return v, false
		}
		n.Host = n.Host[dot+1:]
	}
}
