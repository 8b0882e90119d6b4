package replay

import (
	"bytes"
	"io"
	"net/http"
	"os"
	"reflect"
	"strings"
)

// http.NewRequest hides every reader that has no Close in an io.NopCloser, which
// is one of two types.
var (
	nopCloser         = reflect.TypeOf(io.NopCloser(nil))
	nopCloserWriterTo = reflect.TypeOf(io.NopCloser(struct {
		io.Reader
		io.WriterTo
	}{}))
)

// reveal returns the reader that body hides, or body.
func reveal(body io.ReadCloser) io.Reader {
	if kind := reflect.TypeOf(body); kind == nopCloser || kind == nopCloserWriterTo {
		r, _ := reflect.ValueOf(body).Field(0).Interface().(io.Reader)
		return r
	}
	return body
}

// InMemory reports whether body has all its bytes in memory, so that reading it
// cannot fail. No body is one as well. Every POST asks, so it is cheap.
func InMemory(body io.ReadCloser) bool {
	if body == nil || body == http.NoBody {
		return true
	}
	switch r := reveal(body).(type) {
	case *bytes.Reader:
		return r != nil
	case *bytes.Buffer:
		return r != nil
	case *strings.Reader:
		return r != nil
	}
	return false
}

// seeker returns what can rewind src, and where src is now; or nil. With trusted
// it is of a type that is known to go back when told to.
func seeker(src io.ReadCloser) (s io.Seeker, start int64, trusted bool) {
	s, ok := reveal(src).(io.Seeker)
	if !ok {
		return nil, 0, false
	}
	switch r := s.(type) {
	case *bytes.Reader, *strings.Reader, *io.SectionReader:
		trusted = true
	case *os.File: // which may be a pipe or a device
		info, err := r.Stat()
		trusted = err == nil && info.Mode().IsRegular()
	}
	start, err := s.Seek(0, io.SeekCurrent)
	if err != nil {
		return nil, 0, false
	}
	return s, start, trusted
}
