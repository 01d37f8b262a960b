// SPDX-License-Identifier: Apache-2.0

package main

import (
	"testing"
)

// TestWritten: every flag of run is there, set or not, as it would be written; what /configz answers.
func TestWritten(t *testing.T) {
	run, _, err := newRoot().Find([]string{"run"})
	if err != nil {
		t.Fatal(err)
	}
	if err := run.ParseFlags([]string{"--devices", "eth0,eth1", "--bpf-root=/sys/fs/bpf/x", "--silent-backend-timeout=off", "--metrics-bind-address="}); err != nil {
		t.Fatal(err)
	}
	got := written(run.Flags())
	for flag, want := range map[string]string{
		"devices": "eth0,eth1", "bpf-root": "/sys/fs/bpf/x", "silent-backend-timeout": "off", "metrics-bind-address": "",
		"healthz-bind-address": "127.0.0.1:10256", "socket": "/run/lbagent/lbagent.sock", "nodeport-addresses": "primary,localhost",
		"flows": "0",
	} {
		if value, ok := got[flag]; !ok || value != want {
			t.Errorf("--%s is %q, want %q", flag, value, want)
		}
	}
	if _, ok := got["help"]; ok {
		t.Error("--help is among the flags")
	}
}
