package integration

import (
	"errors"
	"net/http"
	"strconv"
	"testing"

	"github.com/stretchr/testify/require"
	"go.opentelemetry.io/contrib/instrumentation/net/http/otelhttp"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"

	"github.com/tripper-go/tripper"
)

// traced returns a wrapper whose spans are recorded under names with the number
// of the attempt.
func traced(name string) (wrapper, *tracetest.SpanRecorder) {
	spans := tracetest.NewSpanRecorder()
	provider := trace.NewTracerProvider(trace.WithSpanProcessor(spans))
	return func(rt http.RoundTripper) http.RoundTripper {
		return otelhttp.NewTransport(rt, otelhttp.WithTracerProvider(provider), otelhttp.WithPropagators(propagation.TraceContext{}),
			otelhttp.WithSpanNameFormatter(func(_ string, r *http.Request) string {
				return name + " " + strconv.Itoa(tripper.Attempt(r.Context()))
			}))
	}, spans
}

func statusOf(span trace.ReadOnlySpan) string {
	for _, a := range span.Attributes() {
		if a.Key == attribute.Key("http.response.status_code") {
			return strconv.FormatInt(a.Value.AsInt64(), 10)
		}
	}
	return span.Status().Code.String()
}

// As a Layer otelhttp makes a span of each attempt, above the Transport one of
// the request, whose children those are.
func TestOTelSpans(t *testing.T) {
	t.Parallel()
	layer, attempts := traced("attempt")
	above, requests := traced("request")
	c := plain("", func(c *client) { c.layer, c.above = layer, above })
	st := newStack(c, play(t, reset, c.fault(http.StatusServiceUnavailable), c.healthy))
	got, err := st.call(t, c)
	require.NoError(t, err)
	require.Equal(t, "hello", got)
	wire := st.requireWire(t, 3)
	requireSame(t, wire)

	require.Len(t, requests.Ended(), 1)
	request := requests.Ended()[0]
	require.Equal(t, "request 1", request.Name())
	require.Equal(t, "200", statusOf(request))
	ended := attempts.Ended()
	require.Len(t, ended, 3)
	for i, want := range []string{"Error", "503", "200"} {
		require.Equal(t, "attempt "+strconv.Itoa(i+1), ended[i].Name())
		require.Equal(t, want, statusOf(ended[i]))
		require.Equal(t, request.SpanContext().SpanID(), ended[i].Parent().SpanID())
		id := ended[i].SpanContext()
		require.Equal(t, "00-"+id.TraceID().String()+"-"+id.SpanID().String()+"-01", wire[i].Header.Get("Traceparent"))
	}
}

func TestOTelSpanOfARejection(t *testing.T) {
	t.Parallel()
	layer, attempts := traced("attempt")
	above, requests := traced("request")
	c := plain("", func(c *client) { c.layer, c.above = layer, above })
	st := newStack(c, play(t, c.healthy))
	require.True(t, st.Trip("api", 0, nil))
	_, err := st.call(t, c)
	_, ok := errors.AsType[*tripper.OpenError](err)
	require.True(t, ok, "%T: %v", err, err)
	st.requireWire(t, 0)
	for _, spans := range [][]trace.ReadOnlySpan{attempts.Ended(), requests.Ended()} {
		require.Len(t, spans, 1)
		require.Equal(t, codes.Error, spans[0].Status().Code)
		require.Contains(t, spans[0].Status().Description, "circuit breaker open for api")
	}
}

// Spans around a stream do not hold it up, and last as long as it does.
func TestOTelAroundAStream(t *testing.T) {
	eachStreamer(t, func(t *testing.T, s streamer) {
		layer, attempts := traced("attempt")
		above, requests := traced("request")
		s.layer, s.above = layer, above
		steps := inStep{s, make(chan struct{})}
		st := newStack(s.client, play(t, sse(reset), steps.step), holding)
		var got []string
		for e, err := range s.stream(t.Context(), st.service.URL, st.http) {
			require.NoError(t, err)
			got = append(got, e)
			require.Empty(t, requests.Ended())
			select {
			case steps.had <- struct{}{}:
			case <-patience():
				require.Fail(t, "the service is not waiting for its reader")
			}
		}
		require.Equal(t, s.want, got)
		st.requireWire(t, 2)
		require.Len(t, requests.Ended(), 1)
		require.Len(t, attempts.Ended(), 2)
	})
}
