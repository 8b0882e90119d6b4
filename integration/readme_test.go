package integration

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// Every Go snippet of the README compiles as it stands, those with an SDK too.
func TestReadmeSnippetsCompile(t *testing.T) {
	readme, err := os.ReadFile("../README.md")
	require.NoError(t, err)
	snippets := regexp.MustCompile("(?s)```go\n(.*?)```").FindAllStringSubmatch(string(readme), -1)
	require.NotEmpty(t, snippets)
	sdks := regexp.MustCompile(`anthropic-sdk-go|openai-go|aws-sdk-go|slack-go|stripe-go|genai`)
	compiled := 0
	for _, snippet := range snippets {
		if !sdks.MatchString(snippet[1]) {
			continue // compiled by the root module
		}
		file := filepath.Join(t.TempDir(), "main.go")
		require.NoError(t, os.WriteFile(file, []byte(snippet[1]), 0o600))
		out, err := exec.CommandContext(t.Context(), "go", "vet", file).CombinedOutput()
		assert.NoError(t, err, "%s\n%s", out, snippet[1])
		compiled++
	}
	assert.GreaterOrEqual(t, compiled, 5)
}
