// Package integration runs real clients over a [tripper.Transport]: the SDKs of
// several services, OAuth2, OpenTelemetry, WebSockets and full-duplex HTTP/2.
//
// It has no code but tests. Each points a client at a service of its own on the
// loopback interface, which answers in the shape of the real one, fails on cue
// and keeps what the wire brought. It is a module of its own so that the
// clients stay out of the requirements of the root module.
//
// [tripper.Transport]: https://pkg.go.dev/github.com/tripper-go/tripper#Transport
package integration
