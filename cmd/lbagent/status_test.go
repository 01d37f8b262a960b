// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/json"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/lbagent/lbagent/api"
	"github.com/lbagent/lbagent/internal/testenv"
	"github.com/lbagent/lbagent/loader"
)

// golden compares with a file in testdata, or writes it with -update.
func golden(t *testing.T, file, got string) {
	t.Helper()
	path := filepath.Join("testdata", file)
	if *update {
		if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), got); diff != "" {
		t.Errorf("%s (write it anew with -update): %s", path, diff)
	}
}

// TestStatusPage: the page of an agent that has something to say of everything.
func TestStatusPage(t *testing.T) {
	now := time.Date(2030, 1, 1, 12, 0, 0, 0, time.UTC)
	s := api.Status{
		Running: true, Version: "v1.2.3", PID: 42, Started: now.Add(-time.Hour), NodeName: "node",
		Source: &api.Source{Path: "/m", Synced: true, Held: true, HeldFiles: []string{"/m/web.yaml"}, LastChange: now.Add(-time.Minute)},
		Apply:  &api.Apply{Pending: 2, Failures: 3, LastError: "service default/web: no room", LastApply: now.Add(-time.Second)},
		Programs: []loader.Attached{
			{Device: "eth0", Index: 2, Program: "node_in", Method: "tcx"}, {Device: "eth0", Index: 2, Program: "node_out", Method: "tcx"}},
		NodePortAddresses: []netip.Addr{netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("2001:db8::1")},

		Uncovered: []api.Uncovered{{Device: "cni0", Index: 3, Reason: "a bridge without programs"}},
		Listeners: []api.Listener{{Name: "metrics", Address: "127.0.0.1:10249"},
			{Name: "healthz", Address: "127.0.0.1:10256", Error: "listen tcp 127.0.0.1:10256: bind: address already in use"},
			{Name: "health check default/web", Address: "10.0.0.1:32000"}},
		AttachError: "attach pod_in to veth0: no",
		Maps:        []api.Map{{Name: "flows", Entries: 4, MaxEntries: 1024}},
		Reasons:     map[string]uint64{"reply": 10, "forward": 12},
		Problems: []api.Problem{
			{File: "/m/web.yaml", Document: 1, Message: "did not parse", Severity: "error"},
			{File: "/m/a.yaml", Document: 2, Object: "Service default/a", Field: "spec.type", Message: "not served", Severity: "not yet"},
		},
		Features: &loader.Features{TCX: true},
	}
	var page strings.Builder
	showStatus(&page, s, now)
	golden(t, "status-page.txt", page.String())
	if rows := agentRows(api.Status{Running: true}, now); !strings.HasPrefix(rows[2][1], "nowhere: ") {
		t.Errorf("NodePorts without an address: %q", rows[2])
	}
	keys, err := json.MarshalIndent(s, "", "  ")
	if err != nil {
		t.Fatal(err)
	}
	golden(t, "status-page.json", string(keys)+"\n")
}

// TestCheck: where these tests can run the agent can, and the report says so.
func TestCheck(t *testing.T) {
	testenv.RequireRoot(t)
	root := filepath.Join(t.TempDir(), "bpf", "lbagent")
	var out, errors strings.Builder
	code := execute(t.Context(), []string{"check", "--bpf-root", root, "-o", "json"}, &out, &errors)
	var r report
	if err := json.Unmarshal([]byte(out.String()), &r); err != nil {
		t.Fatalf("%v: %s%s", err, &out, &errors)
	}
	if code != exitDone || !r.OK || r.Kernel == "" {
		t.Errorf("exit %d, %+v", code, r)
	}
	if want := len(features(loader.Features{})); len(r.Features) != want {
		t.Errorf("%d features, want %d", len(r.Features), want)
	}
	if _, err := os.Stat(filepath.Dir(root)); err == nil {
		t.Error("check made a folder")
	}
	// No device is up in this network namespace.
	results := map[string]result{}
	for _, c := range r.Checks {
		results[c.Name] = c.Result
		if (c.Result == ok) != (c.Meaning == "") {
			t.Errorf("%s is %s, which means %q", c.Name, c.Result, c.Meaning)
		}
	}
	if results["devices"] != warning || results["privileges"] != ok || results["programs"] != ok {
		t.Errorf("results %v", results)
	}
}

// TestCheckFails: a machine without what the agent needs is told apart, and why.
func TestCheckFails(t *testing.T) {
	r := report{Kernel: "5.0", Checks: []check{{"programs", failure, "no BPF", "the agent cannot run"}}}
	var out strings.Builder
	showReport(&out, r)
	for _, want := range []string{"kernel 5.0", "error: programs: the agent cannot run\n", "the agent cannot run here\n"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("%q is not in: %s", want, &out)
		}
	}
}
