// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"strings"
	"testing"

	"github.com/lbagent/lbagent/internal/testenv"
)

// TestRun measures everything for a moment: every program meets the reasons that it should, and the table has
// a number in every place.
func TestRun(t *testing.T) {
	testenv.RequireRoot(t)
	var out bytes.Buffer
	if err := run(&out, sizes{rounds: 2, packets: 512, flows: []uint32{1, 1 << 12}, main: 1 << 12}); err != nil {
		t.Fatalf("%+v", err)
	}
	for _, want := range []string{"client, 4k flows, v6", "reply, 1 flows, v4", "ingress, v6 / flows + frontends", "the program itself", "ids, 40 bytes, 4k flows", "source ranges, 4, v6"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("no row %q", want)
		}
	}
	for _, wrong := range []string{"NaN", "Inf"} {
		if strings.Contains(out.String(), wrong) {
			t.Errorf("%s in the table", wrong)
		}
	}
	if t.Failed() {
		t.Log(out.String())
	}
}
