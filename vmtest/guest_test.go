//go:build vmtest

// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TestDeliberate: whatever goes wrong in a real guest makes the run fail, soon, and its console's last lines say
// why. `make vmtest` runs it; the tag keeps it out of `make test`.
func TestDeliberate(t *testing.T) {
	kernels, err := chooseKernels(cmp.Or(os.Getenv("KERNEL"), "6.1"))
	if err != nil {
		t.Fatal(err)
	}
	cache, err := cacheDir()
	if err != nil {
		t.Fatal(err)
	}
	m, err := prepare(t.Context(), kernels, cache)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		test           string
		limits         limits
		error, console string
	}{
		{"TestFail", short, "TestFail failed", "deliberate: fail"},
		{"TestHang", short, "TestHang did not end within 20s", "deliberate: hang"},
		{"TestPanic", short, "the guest ended in TestPanic", "sysrq triggered crash"},
		{"TestMemory", limits{boot: 5 * time.Minute, test: 3 * time.Minute, guest: 8 * time.Minute}, "the kernel said: ", "Out of memory: Killed process"},
	} {
		t.Run(c.test, func(t *testing.T) {
			t.Parallel()
			start := time.Now()
			r := m.run(t.Context(), kernels[0], failures(t, c.test), c.test, t.TempDir(), c.limits)
			if took := time.Since(start); took > c.limits.guest+10*time.Second {
				t.Errorf("it took %v", took)
			}
			if r.ok() || !strings.Contains(strings.Join(r.errors, "\n"), c.error) {
				t.Errorf("errors %q, want %q", r.errors, c.error)
			}
			if c.test == "TestHang" {
				wantGoroutine(t, r)
			}
			var table strings.Builder
			print(&table, []*result{r})
			if !strings.Contains(table.String(), c.console) {
				t.Errorf("the console's last lines lack %q:\n%s", c.console, table.String())
			}
		})
	}

	t.Run("no boot", func(t *testing.T) {
		t.Parallel()
		image := filepath.Join(t.TempDir(), "boot", "vmlinuz-none")
		if err := os.MkdirAll(filepath.Dir(image), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(image, make([]byte, 1<<20), 0o644); err != nil {
			t.Fatal(err)
		}
		r := m.run(t.Context(), kernel{name: "none", image: image}, failures(t, "TestPass"), "TestPass", t.TempDir(),
			limits{boot: 10 * time.Second, test: time.Second, guest: 20 * time.Second})
		if r.ok() || !r.retried || r.booted {
			t.Errorf("errors %q, retried %v, booted %v", r.errors, r.retried, r.booted)
		}
	})
}
