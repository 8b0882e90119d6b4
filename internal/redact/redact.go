// Package redact makes errors and URLs fit for logs, events and messages: they
// must not tell user info, queries and fragments, where keys travel.
package redact

import (
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
)

// URL returns u without user info, query and fragment.
func URL(u *url.URL) string {
	if u == nil {
		return ""
	}
	// Opaque is what a request wrote by hand: it may hold all that a URL holds.
	opaque, _, _ := strings.Cut(u.Opaque, "#")
	opaque, _, _ = strings.Cut(opaque, "?")
	if authority, ok := strings.CutPrefix(opaque, "//"); ok {
		host, path, slash := strings.Cut(authority, "/")
		if opaque = "//" + host[strings.LastIndexByte(host, '@')+1:]; slash {
			opaque += "/" + path
		}
	}
	return (&url.URL{Scheme: u.Scheme, Opaque: opaque, Host: u.Host, Path: u.Path, RawPath: u.RawPath}).String()
}

// StatusError returns a response's status as the cause of something.
func StatusError(code int) error { return statusError(code) }

type statusError int

func (e statusError) Error() string {
	return strings.TrimSpace(fmt.Sprintf("%d %s", int(e), http.StatusText(int(e))))
}

// placeholder stands where a secret was.
const placeholder = "xxxxx"

// Error returns err without the secrets of u, the URL of its request, and
// without what any url.Error in err puts in front, with its own URL's secrets. It
// is err itself, or what a url.Error wraps, if nothing else is to be taken away.
// Whatever err wraps can still be found.
func Error(u *url.URL, err error) error {
	if err == nil {
		return nil
	}
	found, nested := secrets(u), urlErrors(err, nil)
	err = unwrapURL(err)
	text := err.Error()
	for _, e := range nested {
		text = strings.ReplaceAll(text, e.Error(), e.Err.Error())
		found = append(found, secretsOf(e.URL)...)
	}
	if text = conceal(text, found); text == err.Error() {
		return err
	}
	return &cleanError{err, text}
}

// unwrapURL takes off the url.Errors that err begins with.
func unwrapURL(err error) error {
	for {
		e, ok := err.(*url.Error)
		if !ok || e == nil || e.Err == nil {
			return err
		}
		err = e.Err
	}
}

// urlErrors adds to found the url.Errors that err wraps, the outer ones first.
func urlErrors(err error, found []*url.Error) []*url.Error {
	if e, ok := err.(*url.Error); ok && e != nil && e.Err != nil {
		found = append(found, e)
	}
	switch w := err.(type) {
	case interface{ Unwrap() error }:
		if inner := w.Unwrap(); inner != nil {
			found = urlErrors(inner, found)
		}
	case interface{ Unwrap() []error }:
		for _, inner := range w.Unwrap() {
			found = urlErrors(inner, found)
		}
	}
	return found
}

// A cleanError is an error with another text.
type cleanError struct {
	err  error
	text string
}

func (e *cleanError) Error() string { return e.text }
func (e *cleanError) Unwrap() error { return e.err }

// Timeout reports whether the error is a timeout. (url.Error asks the error that
// it wraps, and looks no deeper.)
func (e *cleanError) Timeout() bool {
	cause, ok := errors.AsType[interface {
		error
		Timeout() bool
	}](e.err)
	return ok && cause.Timeout()
}

// Temporary reports whether the error calls itself temporary.
func (e *cleanError) Temporary() bool {
	cause, ok := errors.AsType[interface {
		error
		Temporary() bool
	}](e.err)
	return ok && cause.Temporary()
}

// shortest is how long a secret is at least. What is shorter would be found
// everywhere.
const shortest = 4

// conceal puts a placeholder where text has any of the secrets. Those that
// overlap or touch go together, so that no piece of one is left.
func conceal(text string, secrets []string) string {
	type place struct{ from, to int }
	var places []place
	slices.Sort(secrets)
	for _, s := range slices.Compact(secrets) {
		if len(s) < shortest {
			continue
		}
		for from := 0; ; from++ {
			i := strings.Index(text[from:], s)
			if i < 0 {
				break
			}
			from += i
			places = append(places, place{from, from + len(s)})
		}
	}
	if len(places) == 0 {
		return text
	}
	slices.SortFunc(places, func(a, b place) int { return a.from - b.from })
	var clean strings.Builder
	end := 0
	for i, p := range places {
		if i == 0 || p.from > end {
			clean.WriteString(text[end:p.from])
			clean.WriteString(placeholder)
		}
		end = max(end, p.to)
	}
	clean.WriteString(text[end:])
	return clean.String()
}

// secrets returns what must not be told of u, in the forms that it may take in
// a text.
func secrets(u *url.URL) []string {
	if u == nil || u.RawQuery == "" && u.User == nil && u.Fragment == "" && u.Opaque == "" {
		return nil
	}
	found := append(querySecrets(u.RawQuery), forms(u.Fragment, u.EscapedFragment())...)
	if u.User != nil {
		login := u.User.String()
		name, password, _ := strings.Cut(login, ":") // escaped
		plain, _ := u.User.Password()
		found = append(found, forms(login, name, password, plain, u.User.Username(), u.User.Username()+":"+plain)...)
	}
	if u.Opaque != "" {
		found = append(found, cutSecrets(u.Opaque)...)
	}
	return found
}

// secretsOf is secrets of a URL that may be none.
func secretsOf(raw string) []string {
	u, err := url.Parse(raw)
	if err != nil {
		return cutSecrets(raw)
	}
	return secrets(u)
}

// cutSecrets finds secrets of what cannot be parsed by the places where they
// must be.
func cutSecrets(raw string) []string {
	rest, fragment, _ := strings.Cut(raw, "#")
	rest, query, _ := strings.Cut(rest, "?")
	found := append(querySecrets(query), forms(fragment)...)
	_, authority, ok := strings.Cut(rest, "//")
	if !ok {
		return found
	}
	// A password may hold a slash that was not escaped: net/url then takes what is
	// before the slash for the host.
	if at := strings.LastIndexByte(authority, '@'); at >= 0 {
		name, password, _ := strings.Cut(authority[:at], ":")
		found = append(found, forms(authority[:at], name, password)...)
	}
	return found
}

// querySecrets returns a query, its values, and what stands there without a key.
// Unlike url.Values it leaves nothing out that is not well formed.
func querySecrets(query string) []string {
	if query == "" {
		return nil
	}
	found := forms(query)
	if values, err := url.ParseQuery(query); err == nil {
		found = append(found, forms(values.Encode())...) // another order
	}
	for _, pair := range strings.FieldsFunc(query, func(r rune) bool { return r == '&' || r == ';' }) {
		_, value, ok := strings.Cut(pair, "=")
		if !ok {
			value = pair
		}
		found = append(found, forms(value)...)
	}
	return found
}

// forms returns the secrets as they stand, unescaped, escaped, and as %q has
// them.
func forms(secrets ...string) []string {
	var found []string
	for _, s := range secrets {
		all := []string{s}
		if plain, err := url.QueryUnescape(s); err == nil {
			all = append(all, plain, url.QueryEscape(plain), url.PathEscape(plain))
		}
		if plain, err := url.PathUnescape(s); err == nil { // which leaves a plus as it is
			all = append(all, plain)
		}
		for _, form := range all {
			quoted := strconv.Quote(form)
			found = append(found, form, quoted[1:len(quoted)-1])
		}
	}
	return found
}
