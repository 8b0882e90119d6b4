package integration

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	v4 "github.com/aws/aws-sdk-go-v2/aws/signer/v4"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	"github.com/aws/smithy-go"
	"github.com/stretchr/testify/require"

	"github.com/tripper-go/tripper"
)

var awsKey = aws.Credentials{AccessKeyID: "AKIATEST", SecretAccessKey: "secret"}

// signS3 signs r as of now. S3 takes the path as it is.
func signS3(r *http.Request, now time.Time) error {
	hash := r.Header.Get("X-Amz-Content-Sha256")
	return v4.NewSigner().SignHTTP(r.Context(), awsKey, r, hash, "s3", "eu-central-1", now,
		func(o *v4.SignerOptions) { o.DisableURIPathEscaping = true })
}

// signed is S3's door: what is not signed, or not signed at about the time of
// the service, does not get to inner.
func signed(inner step) step { return signedAt(time.Now, inner) }

func signedAt(now func() time.Time, inner step) step {
	return func(w http.ResponseWriter, r *http.Request) {
		date, err := time.Parse("20060102T150405Z", r.Header.Get("X-Amz-Date"))
		code := ""
		switch skew := now().Sub(date).Abs(); {
		case err != nil, !wellSigned(r, date):
			code = "SignatureDoesNotMatch"
		case skew > 15*time.Minute:
			code = "RequestTimeTooSkewed"
		default:
			inner(w, r)
			return
		}
		answer(http.StatusForbidden, "application/xml", fmt.Sprintf("<Error><Code>%s</Code><Message>no</Message></Error>", code))(w, r)
	}
}

// wellSigned signs what r says was signed once more, and compares.
func wellSigned(r *http.Request, date time.Time) bool {
	_, rest, _ := strings.Cut(r.Header.Get("Authorization"), "SignedHeaders=")
	names, _, _ := strings.Cut(rest, ",")
	again := &http.Request{Method: r.Method, URL: &url.URL{Host: r.Host, Path: r.URL.Path, RawPath: r.URL.RawPath, RawQuery: r.URL.RawQuery},
		Host: r.Host, Header: http.Header{}}
	for _, name := range strings.Split(names, ";") {
		switch name = http.CanonicalHeaderKey(name); name {
		case "Host":
		case "Content-Length":
			again.ContentLength = r.ContentLength
		default:
			again.Header[name] = r.Header[name]
		}
	}
	return signS3(again, date) == nil && again.Header.Get("Authorization") == r.Header.Get("Authorization")
}

// sameHash reports whether a request's body is the one that was signed.
func sameHash(r received) bool {
	sum := sha256.Sum256([]byte(r.Body))
	return hex.EncodeToString(sum[:]) == r.Header.Get("X-Amz-Content-Sha256")
}

func TestS3RefusesWhatIsNotSigned(t *testing.T) {
	t.Parallel()
	s := play(t, signed(answer(http.StatusOK, "text/plain", "hello")))
	c := newS3(s.URL, &http.Client{Transport: forge{s.base()}})
	_, err := c.GetObject(t.Context(), &s3.GetObjectInput{Bucket: aws.String("b"), Key: aws.String("k")})
	requireCode(t, err, "SignatureDoesNotMatch")
}

// forge changes a header after it was signed.
type forge struct{ base http.RoundTripper }

func (f forge) RoundTrip(r *http.Request) (*http.Response, error) {
	r = r.Clone(r.Context())
	r.Header.Set("Amz-Sdk-Invocation-Id", "another")
	return f.base.RoundTrip(r)
}

func requireCode(t *testing.T, err error, code string) {
	t.Helper()
	api, ok := errors.AsType[smithy.APIError](err)
	require.True(t, ok, "%T: %v", err, err)
	require.Equal(t, code, api.ErrorCode())
}

func TestS3SignatureSurvivesRetries(t *testing.T) {
	each(t, func(c client) bool { return strings.HasPrefix(c.name, "s3") }, func(t *testing.T, c client) {
		st := newStack(c, play(t, signed(reset), signed(c.fault(http.StatusServiceUnavailable)), c.healthy))
		_, err := st.call(t, c)
		require.NoError(t, err)
		wire := st.requireWire(t, 3)
		requireSame(t, wire)
		for _, r := range wire {
			require.True(t, sameHash(r), r)
			require.Equal(t, wire[0].Header, r.Header)
		}
	})
}

// A service that is away for longer than a signature lives.
func TestS3PrepareSignsAgain(t *testing.T) {
	t.Parallel()
	for _, again := range []bool{false, true} {
		t.Run(fmt.Sprint(again), func(t *testing.T) {
			t.Parallel()
			later := time.Now().Add(20 * time.Minute)
			c := s3Put()
			healthy := signedAt(func() time.Time { return later }, answer(http.StatusOK, "text/plain", "", "ETag", "hello"))
			st := newStack(c, play(t, signed(c.fault(http.StatusServiceUnavailable)), healthy), func(tr *tripper.Transport) {
				if again {
					tr.Policy.Retry.Prepare = func(r *http.Request) error { return signS3(r, later) }
				}
			})
			_, err := st.call(t, c)
			wire := st.requireWire(t, 2)
			requireSame(t, wire)
			dates := []string{wire[0].Header.Get("X-Amz-Date"), wire[1].Header.Get("X-Amz-Date")}
			if !again {
				requireCode(t, err, "RequestTimeTooSkewed")
				require.Equal(t, dates[0], dates[1])
				return
			}
			require.NoError(t, err)
			require.Equal(t, later.UTC().Format("20060102T150405Z"), dates[1])
			require.NotEqual(t, dates[0], dates[1])
			require.NotEqual(t, wire[0].Header.Get("Authorization"), wire[1].Header.Get("Authorization"))
		})
	}
}

// The SDK gives its requests no GetBody, so a body is kept as it is sent, up to
// BodyLimit.
func TestS3LargeUpload(t *testing.T) {
	t.Parallel()
	contents := bytes.Repeat([]byte("0123456789abcdef"), 100<<10/16)
	put := func(c *client) {
		c.call = func(ctx context.Context, url string, hc *http.Client) (string, error) {
			out, err := newS3(url, hc).PutObject(ctx, &s3.PutObjectInput{
				Bucket: aws.String("b"), Key: aws.String("k"), Body: bytes.NewReader(contents),
			})
			if err != nil {
				return "", err
			}
			return aws.ToString(out.ETag), nil
		}
	}
	c := s3Put()
	put(&c)
	t.Run("past the limit it has one attempt", func(t *testing.T) {
		t.Parallel()
		st := newStack(c, play(t, c.fault(http.StatusServiceUnavailable), c.healthy), func(tr *tripper.Transport) {
			tr.Policy.Retry.BodyLimit = 64 << 10
		})
		_, err := st.call(t, c)
		c.requireAnswer(t, err, http.StatusServiceUnavailable)
		st.requireWire(t, 1)
		stats, _ := st.Stats("api")
		require.EqualValues(t, 1, stats.Suppressed.Body)
	})
	t.Run("below it, it recovers", func(t *testing.T) {
		t.Parallel()
		st := newStack(c, play(t, reset, c.fault(http.StatusServiceUnavailable), c.healthy), func(tr *tripper.Transport) {
			tr.Policy.Retry.BodyLimit = 200 << 10
		})
		_, err := st.call(t, c)
		require.NoError(t, err)
		for _, r := range st.requireWire(t, 3) {
			require.Equal(t, string(contents), r.Body)
			require.True(t, sameHash(r))
		}
	})
}

// Over TLS the SDK sends chunks of its own making with a checksum behind them.
func TestS3ChunkedUploadWithTrailer(t *testing.T) {
	t.Parallel()
	c := s3Put()
	c.call = func(ctx context.Context, url string, hc *http.Client) (string, error) {
		out, err := newS3(url, hc).PutObject(ctx, &s3.PutObjectInput{
			Bucket: aws.String("b"), Key: aws.String("k"), Body: io.MultiReader(strings.NewReader("contents")), ContentLength: aws.Int64(8),
		})
		if err != nil {
			return "", err
		}
		return aws.ToString(out.ETag), nil
	}
	st := newStack(c, playTLS(t, c.fault(http.StatusServiceUnavailable), c.fault(http.StatusInternalServerError), c.healthy))
	got, err := st.call(t, c)
	require.NoError(t, err)
	require.Equal(t, "hello", got)
	wire := st.requireWire(t, 3)
	requireSame(t, wire)
	require.Contains(t, wire[0].Header.Get("Content-Encoding"), "aws-chunked")
	require.Contains(t, wire[0].Body, "x-amz-checksum")
}
