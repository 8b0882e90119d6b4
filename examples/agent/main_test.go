package main

import (
	"bytes"
	"context"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func TestRun(t *testing.T) {
	var out bytes.Buffer
	require.NoError(t, run(t.Context(), &out))
	text := out.String()
	lines := map[string][]string{}
	_, table, _ := strings.Cut(text, "What became of the services:")
	for line := range strings.Lines(table) {
		if fields := strings.Fields(line); len(fields) > 1 {
			lines[fields[0]] = fields
		}
	}
	for service, state := range map[string]string{
		"weather.test": "CLOSED", "flaky.test": "CLOSED", "limited.test": "CLOSED", "orders.test": "CLOSED",
		"gone.test": "OPEN", "hangs.test": "OPEN",
	} {
		require.Contains(t, lines, service, text)
		assert.Equal(t, state, lines[service][1], service)
	}
	for _, service := range []string{"weather.test", "flaky.test", "limited.test", "orders.test"} {
		assert.Equal(t, "4", lines[service][3], "%s: every action has succeeded\n%s", service, text)
	}
	assert.Contains(t, text, "8 requests placed 4 orders")
	assert.Contains(t, text, "5000 strangers were called once each; 4096 services")
	assert.NotContains(t, text, "secret")
}

func TestRunCanBeStopped(t *testing.T) {
	ctx, stop := context.WithCancel(t.Context())
	stop()
	assert.ErrorIs(t, run(ctx, &bytes.Buffer{}), context.Canceled)
}
