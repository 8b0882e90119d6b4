package integration

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"

	"github.com/anthropics/anthropic-sdk-go"
	anthropicoption "github.com/anthropics/anthropic-sdk-go/option"
	"github.com/aws/aws-sdk-go-v2/aws"
	awshttp "github.com/aws/aws-sdk-go-v2/aws/transport/http"
	"github.com/aws/aws-sdk-go-v2/credentials"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	"github.com/aws/smithy-go"
	"github.com/coder/websocket"
	"github.com/openai/openai-go/v3"
	openaioption "github.com/openai/openai-go/v3/option"
	"github.com/slack-go/slack"
	"github.com/stretchr/testify/require"
	"github.com/stripe/stripe-go/v85"
	"go.opentelemetry.io/contrib/instrumentation/net/http/otelhttp"
	"golang.org/x/oauth2"
	"google.golang.org/genai"
)

// A wrapper puts a RoundTripper of somebody else around another one.
type wrapper func(http.RoundTripper) http.RoundTripper

// A client is what somebody points at a service.
type client struct {
	name string

	// call makes one call and returns what its caller gets from the service,
	// which is "hello" of a healthy one.
	call    func(ctx context.Context, url string, hc *http.Client) (string, error)
	healthy step

	// fault answers with a status and an error in the service's shape, which
	// says "try again, please".
	fault func(status int, headers ...string) step

	// inspect returns what the client's own error says: the status, and the
	// service's body or the part of it that the error keeps.
	inspect func(err error) (status int, body string, ok bool)

	// stainless clients retry by themselves, and their switch is left alone:
	// tripper tells them not to.
	stainless bool

	bodiless bool // its error keeps nothing of the service's body

	below, layer, above wrapper // where somebody else's RoundTripper sits
}

const plea = "try again, please"

func clients() []client {
	return []client{
		anthropicClient(), openaiClient(), genaiClient(), s3Get(), s3Put(), stripeClient(), slackClient(), webSocketClient(), tokenClient(),
		plain("oauth2 below", func(c *client) { c.below = withToken }),
		plain("oauth2 above", func(c *client) { c.above = withToken }),
		plain("otelhttp as a Layer", func(c *client) { c.layer = withSpans }),
		plain("otelhttp above", func(c *client) { c.above = withSpans }),
	}
}

// each runs a test for every client that it applies to.
func each(t *testing.T, applies func(client) bool, test func(t *testing.T, c client)) {
	t.Parallel()
	for _, c := range clients() {
		if applies(c) {
			t.Run(c.name, func(t *testing.T) {
				t.Parallel()
				test(t, c)
			})
		}
	}
}

func every(client) bool       { return true }
func stainless(c client) bool { return c.stainless }
func others(c client) bool    { return !c.stainless }
func asJSON(body string) step { return answer(http.StatusOK, "application/json", body) }
func withToken(rt http.RoundTripper) http.RoundTripper {
	return &oauth2.Transport{Source: oauth2.StaticTokenSource(&oauth2.Token{AccessToken: "token"}), Base: rt}
}
func withSpans(rt http.RoundTripper) http.RoundTripper { return otelhttp.NewTransport(rt) }

// The Claude SDK retries twice by itself and says so in X-Stainless-Retry-Count.
// It needs no switch.
func newAnthropic(url string, hc *http.Client) anthropic.Client {
	return anthropic.NewClient(anthropicoption.WithoutEnvironmentDefaults(), anthropicoption.WithBaseURL(url),
		anthropicoption.WithAPIKey("key"), anthropicoption.WithHTTPClient(hc))
}

var claudeRequest = anthropic.MessageNewParams{
	Model: "claude-test", MaxTokens: 64,
	Messages: []anthropic.MessageParam{anthropic.NewUserMessage(anthropic.NewTextBlock("Say hello."))},
}

func anthropicClient() client {
	return client{
		name: "anthropic", stainless: true,
		call: func(ctx context.Context, url string, hc *http.Client) (string, error) {
			c := newAnthropic(url, hc)
			m, err := c.Messages.New(ctx, claudeRequest)
			if err != nil {
				return "", err
			}
			return m.Content[0].Text, nil
		},
		healthy: asJSON(`{"id":"msg_1","type":"message","role":"assistant","model":"claude-test",
			"content":[{"type":"text","text":"hello"}],"stop_reason":"end_turn","usage":{"input_tokens":9,"output_tokens":1}}`),
		fault: func(status int, headers ...string) step {
			kind := map[int]string{429: "rate_limit_error", 529: "overloaded_error"}[status]
			if kind == "" {
				kind = "api_error"
			}
			return answer(status, "application/json", fmt.Sprintf(
				`{"type":"error","error":{"type":%q,"message":%q},"request_id":"req_1"}`, kind, plea), headers...)
		},
		inspect: func(err error) (int, string, bool) {
			e, ok := errors.AsType[*anthropic.Error](err)
			if !ok {
				return 0, "", false
			}
			return e.StatusCode, e.RawJSON(), true
		},
	}
}

// The OpenAI SDK does as the Claude SDK does.
func newOpenAI(url string, hc *http.Client) openai.Client {
	return openai.NewClient(openaioption.WithBaseURL(url), openaioption.WithAPIKey("key"), openaioption.WithHTTPClient(hc))
}

var gptRequest = openai.ChatCompletionNewParams{
	Model: "gpt-test", Messages: []openai.ChatCompletionMessageParamUnion{openai.UserMessage("Say hello.")},
}

func openaiClient() client {
	return client{
		name: "openai", stainless: true,
		call: func(ctx context.Context, url string, hc *http.Client) (string, error) {
			c := newOpenAI(url, hc)
			m, err := c.Chat.Completions.New(ctx, gptRequest)
			if err != nil {
				return "", err
			}
			return m.Choices[0].Message.Content, nil
		},
		healthy: asJSON(`{"id":"chatcmpl_1","object":"chat.completion","created":1,"model":"gpt-test",
			"choices":[{"index":0,"message":{"role":"assistant","content":"hello"},"finish_reason":"stop"}]}`),
		fault: func(status int, headers ...string) step {
			return answer(status, "application/json", fmt.Sprintf(
				`{"error":{"message":%q,"type":"server_error","param":null,"code":null}}`, plea), headers...)
		},
		inspect: func(err error) (int, string, bool) {
			e, ok := errors.AsType[*openai.Error](err)
			if !ok {
				return 0, "", false
			}
			return e.StatusCode, e.RawJSON(), true
		},
	}
}

// The Gen AI SDK retries only when HTTPOptions.RetryOptions is set: leave it nil.
func newGenAI(ctx context.Context, url string, hc *http.Client) (*genai.Client, error) {
	return genai.NewClient(ctx, &genai.ClientConfig{
		APIKey: "key", Backend: genai.BackendGeminiAPI, HTTPClient: hc, HTTPOptions: genai.HTTPOptions{BaseURL: url},
	})
}

func genaiClient() client {
	return client{
		name: "genai",
		call: func(ctx context.Context, url string, hc *http.Client) (string, error) {
			c, err := newGenAI(ctx, url, hc)
			if err != nil {
				return "", err
			}
			m, err := c.Models.GenerateContent(ctx, "gemini-test", genai.Text("Say hello."), nil)
			if err != nil {
				return "", err
			}
			return m.Text(), nil
		},
		healthy: asJSON(`{"candidates":[{"content":{"role":"model","parts":[{"text":"hello"}]},"finishReason":"STOP"}]}`),
		fault: func(status int, headers ...string) step {
			return answer(status, "application/json", fmt.Sprintf(
				`{"error":{"code":%d,"message":%q,"status":"UNAVAILABLE"}}`, status, plea), headers...)
		},
		inspect: func(err error) (int, string, bool) {
			e, ok := errors.AsType[genai.APIError](err)
			return e.Code, e.Message, ok
		},
	}
}

// The AWS SDK retries twice by itself. Its switch is the Retryer.
func newS3(url string, hc *http.Client) *s3.Client {
	return s3.New(s3.Options{
		Region: "eu-central-1", BaseEndpoint: aws.String(url), UsePathStyle: true, HTTPClient: hc,
		Credentials: aws.NewCredentialsCache(credentials.NewStaticCredentialsProvider(awsKey.AccessKeyID, awsKey.SecretAccessKey, "")),
		Retryer:     aws.NopRetryer{},

		RequestChecksumCalculation: aws.RequestChecksumCalculationWhenSupported, // as config.LoadDefaultConfig has it
	})
}

func s3Client(name string) client {
	return client{
		name: name,
		fault: func(status int, headers ...string) step {
			return answer(status, "application/xml", fmt.Sprintf(`<?xml version="1.0" encoding="UTF-8"?>
				<Error><Code>SlowDown</Code><Message>%s</Message><RequestId>1</RequestId></Error>`, plea), headers...)
		},
		inspect: func(err error) (int, string, bool) {
			e, ok := errors.AsType[*awshttp.ResponseError](err)
			api, ok2 := errors.AsType[smithy.APIError](err)
			if !ok || !ok2 {
				return 0, "", false
			}
			return e.HTTPStatusCode(), api.ErrorCode() + ": " + api.ErrorMessage(), true
		},
	}
}

func s3Get() client {
	c := s3Client("s3 get")
	c.call = func(ctx context.Context, url string, hc *http.Client) (string, error) {
		out, err := newS3(url, hc).GetObject(ctx, &s3.GetObjectInput{Bucket: aws.String("b"), Key: aws.String("a file.txt")})
		if err != nil {
			return "", err
		}
		defer out.Body.Close()
		b, err := io.ReadAll(out.Body)
		return string(b), err
	}
	c.healthy = signed(answer(http.StatusOK, "text/plain", "hello"))
	return c
}

func s3Put() client {
	c := s3Client("s3 put")
	c.call = func(ctx context.Context, url string, hc *http.Client) (string, error) {
		out, err := newS3(url, hc).PutObject(ctx, &s3.PutObjectInput{
			Bucket: aws.String("b"), Key: aws.String("a file.txt"), Body: strings.NewReader("contents"),
		})
		if err != nil {
			return "", err
		}
		return aws.ToString(out.ETag), nil
	}
	c.healthy = signed(answer(http.StatusOK, "text/plain", "", "ETag", "hello"))
	return c
}

// The Stripe SDK retries twice by itself. Its switch is MaxNetworkRetries.
func newStripe(url string, hc *http.Client) *stripe.Client {
	return stripe.NewClient("sk_test_key", stripe.WithBackends(stripe.NewBackendsWithConfig(&stripe.BackendConfig{
		URL: stripe.String(url), HTTPClient: hc, MaxNetworkRetries: stripe.Int64(0), LeveledLogger: &stripe.LeveledLogger{},
	})))
}

func stripeClient() client {
	return client{
		name: "stripe",
		call: func(ctx context.Context, url string, hc *http.Client) (string, error) {
			c, err := newStripe(url, hc).V1Customers.Create(ctx, &stripe.CustomerCreateParams{Name: stripe.String("hello")})
			if err != nil {
				return "", err
			}
			return c.Name, nil
		},
		healthy: asJSON(`{"id":"cus_1","object":"customer","name":"hello"}`),
		fault: func(status int, headers ...string) step {
			return answer(status, "application/json", fmt.Sprintf(
				`{"error":{"type":"api_error","message":%q}}`, plea), headers...)
		},
		inspect: func(err error) (int, string, bool) {
			e, ok := errors.AsType[*stripe.Error](err)
			if !ok {
				return 0, "", false
			}
			return e.HTTPStatusCode, e.Msg, true
		},
	}
}

// The Slack client retries only with OptionRetry: leave it out.
func slackClient() client {
	return client{
		name: "slack", bodiless: true,
		call: func(ctx context.Context, url string, hc *http.Client) (string, error) {
			m, err := slack.New("token", slack.OptionAPIURL(url+"/"), slack.OptionHTTPClient(hc)).AuthTestContext(ctx)
			if err != nil {
				return "", err
			}
			return m.Team, nil
		},
		healthy: asJSON(`{"ok":true,"team":"hello"}`),
		fault: func(status int, headers ...string) step {
			return answer(status, "application/json", `{"ok":false,"error":"ratelimited"}`, headers...)
		},
		inspect: func(err error) (int, string, bool) {
			if _, ok := errors.AsType[*slack.RateLimitedError](err); ok {
				return http.StatusTooManyRequests, "", true
			}
			e, ok := errors.AsType[slack.StatusCodeError](err)
			return e.Code, "", ok
		},
	}
}

// An answerError is the response that a call got instead of what it wanted.
type answerError struct {
	error
	status int
	body   string
}

func (e *answerError) Unwrap() error { return e.error }

func inspectAnswer(err error) (int, string, bool) {
	e, ok := errors.AsType[*answerError](err)
	if !ok {
		return 0, "", false
	}
	return e.status, e.body, true
}

func textFault(status int, headers ...string) step {
	return answer(status, "text/plain", plea, headers...)
}

// The WebSocket client does not retry.
func webSocketClient() client {
	return client{
		name: "websocket",
		call: func(ctx context.Context, url string, hc *http.Client) (string, error) {
			conn, resp, err := websocket.Dial(ctx, url, &websocket.DialOptions{HTTPClient: hc})
			if err != nil {
				if resp != nil {
					b, _ := io.ReadAll(resp.Body)
					err = &answerError{err, resp.StatusCode, string(b)}
				}
				return "", err
			}
			defer conn.CloseNow()
			if err := conn.Write(ctx, websocket.MessageText, []byte("hello")); err != nil {
				return "", err
			}
			_, echo, err := conn.Read(ctx)
			if err != nil {
				return "", err
			}
			return string(echo), conn.Close(websocket.StatusNormalClosure, "")
		},
		healthy: echoWebSocket,
		fault:   textFault,
		inspect: inspectAnswer,
	}
}

// echoWebSocket sends back what it gets.
func echoWebSocket(w http.ResponseWriter, r *http.Request) {
	conn, err := websocket.Accept(w, r, nil)
	if err != nil {
		return
	}
	defer conn.CloseNow()
	conn.SetReadLimit(1 << 21)
	for {
		kind, b, err := conn.Read(r.Context())
		if err != nil || conn.Write(r.Context(), kind, b) != nil {
			return
		}
	}
}

// plain is an http.Client itself, with somebody else's RoundTripper around.
func plain(name string, change func(*client)) client {
	c := client{
		name: name,
		call: func(ctx context.Context, url string, hc *http.Client) (string, error) {
			req, err := http.NewRequestWithContext(ctx, http.MethodPost, url+"/path", bytes.NewReader([]byte("question")))
			if err != nil {
				return "", err
			}
			resp, err := hc.Do(req)
			if err != nil {
				return "", err
			}
			defer resp.Body.Close()
			b, err := io.ReadAll(resp.Body)
			if resp.StatusCode != http.StatusOK {
				return "", &answerError{errors.New(resp.Status), resp.StatusCode, string(b)}
			}
			return string(b), err
		},
		healthy: answer(http.StatusOK, "text/plain", "hello"),
		fault:   textFault,
		inspect: inspectAnswer,
	}
	change(&c)
	return c
}

// requireAnswer checks that err is the client's own error for an answer of the
// service, with the service's body.
func (c client) requireAnswer(t *testing.T, err error, status int) {
	t.Helper()
	got, body, ok := c.inspect(err)
	require.True(t, ok, "not the client's own error: %T: %v", err, err)
	require.Equal(t, status, got)
	if !c.bodiless {
		require.Contains(t, body, plea)
	}
}
