// SPDX-License-Identifier: Apache-2.0

package lbagent_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"os/exec"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/lbagent/lbagent"

// folders is every folder with Go code and what of ours it may import: the table of docs/architecture.md.
var folders = map[string][]string{
	"lb":              {},
	"maps":            {"lb"},
	"loader":          {"maps"},
	"node":            {},
	"balance":         {"lb"},
	"source":          {},
	"source/manifest": {"lb"},
	"resolve":         {"lb"},
	"reconcile":       {"lb", "balance", "maps"},
	"health":          {"lb"},
	"metrics":         {"lb", "maps"},
	"api":             {"lb", "maps", "loader", "health"},
	"agent":           {"lb", "maps", "loader", "node", "source", "source/manifest", "resolve", "reconcile", "health", "metrics", "api"},
	// The command line reads what it shows where it is: pinned maps, this kernel, this host, manifests.
	"cmd/lbagent":      {"lb", "maps", "loader", "node", "source", "source/manifest", "resolve", "api", "agent"},
	"internal/testenv": {},
	"internal/model":   {}, // it knows nothing of how the others go about it
	"internal/bench":   {"lb", "maps", "loader", "internal/testenv"},
	"examples/demo":    {"api", "internal/testenv"}, // it runs the command line, as a user does
	"vmtest":           {},                          // it builds and runs the tests of others
}

// outsiders are modules of others that only some folders may import.
var outsiders = map[string][]string{
	"k8s.io/":                        {"source", "source/manifest", "resolve", "internal/model"},
	"github.com/vishvananda/netlink": {"loader", "node", "internal/testenv"},
	"github.com/vishvananda/netns":   {"loader", "node", "internal/testenv"},
	"github.com/prometheus/":         {"metrics"},
	"golang.org/x/sys/unix":          {"maps", "loader", "node", "internal/testenv", "internal/bench"}, // maps: mmap, flock, membarrier
}

// TestImports holds the rule that data goes one way. Tests of a folder may import what they like.
func TestImports(t *testing.T) {
	list := exec.Command("go", "list", "-json=ImportPath,Imports", "./...")
	var stderr bytes.Buffer
	list.Stderr = &stderr
	out, err := list.Output()
	if err != nil {
		t.Fatalf("%v: %s", err, stderr.String())
	}
	seen := 0
	for decoder := json.NewDecoder(bytes.NewReader(out)); ; seen++ {
		var p struct {
			ImportPath string
			Imports    []string
		}
		if err := decoder.Decode(&p); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		for _, complaint := range complaints(p.ImportPath, p.Imports) {
			t.Error(complaint)
		}
	}
	if seen < 8 {
		t.Errorf("go list names %d packages: is this the root of the module?", seen)
	}
}

func TestComplaints(t *testing.T) {
	for _, c := range []struct {
		folder  string
		imports []string
		want    int
	}{
		{"lb", []string{"fmt", "net/netip"}, 0},
		{"lb", []string{module + "/maps"}, 1},
		{"util", []string{"fmt"}, 1},
		{"resolve", []string{"k8s.io/api/core/v1", module + "/lb"}, 0},
		{"reconcile", []string{"k8s.io/api/core/v1", module + "/resolve"}, 2},
		{"agent", []string{"golang.org/x/sys/unix"}, 1},
		{"api", []string{module + "/agent"}, 1},
		{"health", []string{"net/http", module + "/maps", "github.com/prometheus/client_golang/prometheus"}, 2},
	} {
		if got := complaints(module+"/"+c.folder, c.imports); len(got) != c.want {
			t.Errorf("%s with %q: %q, want %d complaints", c.folder, c.imports, got, c.want)
		}
	}
}

func complaints(pkg string, imports []string) (all []string) {
	folder := strings.TrimPrefix(strings.TrimPrefix(pkg, module), "/")
	if folder == "" {
		return nil // the module's root, which has this test alone
	}
	allowed, known := folders[folder]
	if !known {
		return []string{folder + ": not in the table of folders: see docs/architecture.md"}
	}
	for _, imported := range imports {
		if ours, ok := strings.CutPrefix(imported, module+"/"); ok && !slices.Contains(allowed, ours) {
			all = append(all, folder+" must not import "+ours)
		}
		for outsider, who := range outsiders {
			if strings.HasPrefix(imported, outsider) && !slices.Contains(who, folder) {
				all = append(all, folder+" must not import "+imported)
			}
		}
	}
	return all
}
