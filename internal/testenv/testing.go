// SPDX-License-Identifier: Apache-2.0

package testenv

import (
	"context"
	"os"
	"testing"
	"time"
)

// NewLab is OpenLab for a test; the lab ends with it. The test fails if the lab saw what it should not, as
// Lab.CheckStrict says; a test that means to do such things ends with Lab.ResetCounters.
func NewLab(t testing.TB, c Config) *Lab {
	t.Helper()
	RequireRoot(t)
	l, err := OpenLab(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second) // that of the test has ended
		defer cancel()
		if err := l.CheckStrict(ctx); err != nil {
			t.Errorf("the lab was not as strict as it should be: %v", err)
		}
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
	return l
}

// RequireRoot skips a test that cannot make network namespaces.
func RequireRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("SKIPPED, NOT TESTED: network namespaces want root")
	}
}
