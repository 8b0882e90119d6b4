package fault

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"net"
	"net/http"
	"reflect"
)

// insecure reports whether TLS has failed in a way that another attempt would
// meet as well, and if so, whether for certain during the handshake.
func insecure(err error) (final, handshake bool) {
	if badCertificate(err) || noTLS(err) {
		return true, true
	}
	code, ok := peerAlert(err)
	if !ok || code == alertCloseNotify || code == alertInternalError {
		return false, false
	}
	return true, handshakeAlert[code]
}

// badCertificate reports whether this side did not accept the server's
// certificate, or the server did not accept its encrypted hello.
func badCertificate(err error) bool {
	return is[*tls.CertificateVerificationError](err) || is[*tls.ECHRejectionError](err) ||
		is[x509.UnknownAuthorityError](err) || is[x509.HostnameError](err) || is[x509.CertificateInvalidError](err) ||
		is[x509.SystemRootsError](err) || is[x509.ConstraintViolationError](err) || is[x509.InsecureAlgorithmError](err) ||
		is[x509.UnhandledCriticalExtension](err)
}

// noTLS reports whether the server does not speak TLS. A bad record later on has
// the same type, but not the connection; it is one that has broken.
func noTLS(err error) bool {
	if errors.Is(err, http.ErrSchemeMismatch) {
		return true
	}
	header, ok := errors.AsType[tls.RecordHeaderError](err)
	return ok && (header.Conn != nil || header.Msg == "unsupported SSLv2 handshake received")
}

const (
	alertCloseNotify   = 0  // no error, RFC 8446, section 6.1
	alertInternalError = 80 // "such as a memory allocation failure", section 6.2
)

// handshakeAlert has the alerts that a server sends only while it does not yet
// process anything: about versions, algorithms, names and certificates (RFC 8446,
// section 6.2).
var handshakeAlert = [256]bool{
	40: true, 41: true, 42: true, 43: true, 44: true, 45: true, 46: true, 48: true, 49: true,
	70: true, 71: true, 86: true, 109: true, 110: true, 111: true, 112: true, 113: true, 114: true,
	115: true, 116: true, 120: true, 121: true,
}

// peerAlert returns the code of a fatal alert that the peer has sent. The type of
// it is crypto/tls's own: a number. An alert of this side does not count: it says
// that what came from the peer was damaged.
func peerAlert(err error) (code uint8, ok bool) {
	contains(err, func(err error) bool {
		if alert, isAlert := err.(tls.AlertError); isAlert {
			code, ok = uint8(alert), true
			return true
		}
		op, isOp := err.(*net.OpError)
		if !isOp {
			return false
		}
		if alert := reflect.ValueOf(op.Err); op.Op == "remote error" && alert.Kind() == reflect.Uint8 {
			code, ok = uint8(alert.Uint()), true
		}
		return ok || op.Op == "local error"
	})
	return code, ok
}
