// Package hosts parses host names and patterns of them, and finds what belongs
// to a host.
package hosts

import (
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
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

// ServiceName returns the name of a host that is its own service: the host, and
// the port unless it is the scheme's default. It allocates nothing when the
// authority is written that way already.
func ServiceName(scheme, authority string) string {
	n := Split(authority)
	if n.Port == "" || n.Port == defaultPort(scheme) {
		return n.Host
	}
	if strings.HasPrefix(authority, n.Host) && len(authority) == len(n.Host)+1+len(n.Port) {
		return authority
	}
	return n.Host + ":" + n.Port
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

// A Pattern stands for one host, with or without a port, or for all names below
// one.
type Pattern struct {
	name Name // the host begins with a dot if it stands for all names below
}

// ParsePattern reads a key of Transport.Hosts, such as "api.example.com",
// "localhost:8080" or "*.example.com".
func ParsePattern(pattern string) (Pattern, error) {
	if pattern == "*" {
		return Pattern{}, fmt.Errorf(`tripper: Hosts["*"] is no host: the policy of every host that Hosts does not name is Transport.Policy`)
	}
	n := Split(pattern)
	host, wild := strings.CutPrefix(n.Host, "*.")
	n.Host = host
	if !validHost(n.Host) || wild && n.Host[0] == '[' || strings.ContainsAny(pattern, "/@?#%\\ \t\r\n") {
		return Pattern{}, fmt.Errorf(`tripper: Hosts[%q] is no host: want one such as "api.example.com", "localhost:8080" or "*.example.com"`, pattern)
	}
	if n.Port != "" && !validPort(n.Port) {
		return Pattern{}, fmt.Errorf("tripper: Hosts[%q] has port %q: want 1 to 65535", pattern, n.Port)
	}
	if wild {
		n.Host = "." + n.Host
	}
	return Pattern{n}, nil
}

// Valid reports whether name is a host that a request can go to, with or without
// a port.
func Valid(name string) bool {
	n := Split(name)
	return !strings.ContainsAny(name, "/@?#%\\ \t\r\n*") && validHost(n.Host) && (n.Port == "" || validPort(n.Port))
}

func validHost(host string) bool {
	if literal, ok := strings.CutPrefix(host, "["); ok {
		address, err := netip.ParseAddr(strings.TrimSuffix(literal, "]"))
		return strings.HasSuffix(literal, "]") && err == nil && address.Is6()
	}
	return !strings.ContainsAny(host, "*:[]") && !slices.Contains(strings.Split(host, "."), "")
}

func validPort(port string) bool {
	n, err := strconv.ParseUint(port, 10, 16)
	return err == nil && n > 0 && strconv.FormatUint(n, 10) == port
}

// DependsOnScheme reports whether it depends on a request's scheme whether the
// pattern's port is a part of the service's name.
func (p Pattern) DependsOnScheme() bool { return p.name.Port == "80" || p.name.Port == "443" }

// Service returns the service that a host of this pattern has under a policy
// that names the service own, or "" if there are many.
func (p Pattern) Service(own string) string {
	switch {
	case own != "":
		return own
	case p.name.Host[0] == '.':
		return ""
	case p.name.Port == "", p.DependsOnScheme():
		return p.name.Host
	}
	return p.name.Host + ":" + p.name.Port
}

// A Table finds what belongs to a host. The zero Table is empty. Adding must be
// over before finding begins.
type Table[V any] struct{ rows map[Name]V }

// Add adds what belongs to the hosts of a pattern.
func (t *Table[V]) Add(p Pattern, v V) {
	if t.rows == nil {
		t.rows = make(map[Name]V)
	}
	t.rows[p.name] = v
}

// Find looks for the host with its port first, then for the host, then for the
// longest pattern that the host is below.
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
		label := strings.IndexByte(n.Host[min(1, len(n.Host)):], '.')
		if label < 0 {
			return v, false
		}
		n.Host = n.Host[label+1:]
	}
}
