// SPDX-License-Identifier: Apache-2.0

package testenv

import (
	"context"
	"os"
	"testing"
	"time"
)

// NewLab is OpenLab for a test; the lab ends with it.
func NewLab(t testing.TB, c Config) *Lab {
	t.Helper()
	RequireRoot(t)
	l, err := OpenLab(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
	return l
}

// CheckWhenDone has the test fail if by its end the lab has seen what it should not, as CheckStrict says. What
// is registered with t.Cleanup before this call happens after the check: so what translates packets must be, for
// without it the last segments of a connection are such packets. A test that means to send them ends with
// ResetCounters.
func (l *Lab) CheckWhenDone(t testing.TB) {
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second) // that of the test has ended
		defer cancel()
		if err := l.CheckStrict(ctx); err != nil {
			t.Errorf("the lab was not as strict as it should be: %v", err)
		}
	})
}

// RequireRoot skips a test that cannot make network namespaces.
func RequireRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("SKIPPED, NOT TESTED: network namespaces want root")
	}
}
