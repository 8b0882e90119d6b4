package tripper_test

import (
	"go/format"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// Every Go snippet of the README is a whole program that compiles as it stands.
// Those that use an SDK are compiled by the module in integration.
func TestReadmeSnippetsCompile(t *testing.T) {
	readme, err := os.ReadFile("README.md")
	require.NoError(t, err)
	snippets := regexp.MustCompile("(?s)```go\n(.*?)```").FindAllStringSubmatch(string(readme), -1)
	require.NotEmpty(t, snippets)
	foreign := regexp.MustCompile(`"[a-z]+\.[a-z]+/[^"]*"`)
	compiled := 0
	for _, snippet := range snippets {
		source := snippet[1]
		formatted, err := format.Source([]byte(source))
		require.NoError(t, err, source)
		assert.Equal(t, string(formatted), source, "gofmt")
		if strings.Join(foreign.FindAllString(source, -1), "") != `"github.com/tripper-go/tripper"` {
			continue
		}
		file := filepath.Join(t.TempDir(), "main.go")
		require.NoError(t, os.WriteFile(file, []byte(source), 0o600))
		out, err := exec.CommandContext(t.Context(), "go", "vet", file).CombinedOutput()
		assert.NoError(t, err, "%s\n%s", out, source)
		compiled++
	}
	assert.GreaterOrEqual(t, compiled, 5)
}
