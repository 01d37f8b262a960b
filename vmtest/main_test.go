// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

var short = limits{boot: 5 * time.Minute, test: 20 * time.Second, guest: 6 * time.Minute}

// failures are the tests of testdata/failures, which do what their names say.
func failures(t *testing.T, run string) []*built {
	t.Helper()
	module, err := filepath.Abs("..")
	if err != nil {
		t.Fatal(err)
	}
	b, err := suite{"failures", "vmtest/testdata/failures", map[string]string{"": "failures"}}.build(t.Context(), module, t.TempDir(), run)
	if err != nil {
		t.Fatal(err)
	}
	return []*built{b}
}

// TestOnHost: the same runner without a guest.
func TestOnHost(t *testing.T) {
	for _, c := range []struct {
		test   string
		limits limits
		rung   tally
		error  string
	}{
		{"TestPass", short, tally{passed: 1}, ""},
		{"TestFail", short, tally{failed: 1}, "TestFail failed"},
		{"TestSkip", short, tally{skipped: 1}, "TestSkip was skipped: no wish to"},
		{"TestHang", limits{boot: time.Minute, test: time.Second, guest: time.Minute}, tally{}, "TestHang did not end within 1s"},
		{"TestHang", limits{boot: time.Minute, test: time.Minute, guest: time.Second}, tally{}, "the guest did not end within 1s"},
	} {
		t.Run(c.test, func(t *testing.T) {
			start := time.Now()
			r := machine{}.run(t.Context(), kernel{name: hostKernel}, failures(t, c.test), c.test, t.TempDir(), c.limits)
			if took := time.Since(start); took > 30*time.Second {
				t.Errorf("it took %v", took)
			}
			if r.ok() != (c.error == "") || !strings.Contains(strings.Join(r.errors, "\n"), c.error) {
				t.Errorf("errors %q, want %q", r.errors, c.error)
			}
			if c.test == "TestHang" {
				wantGoroutine(t, r)
			}
			var got tally
			if g := r.rungs["failures"]; g != nil {
				got = *g
			}
			if got.passed != c.rung.passed || got.failed != c.rung.failed || got.skipped != c.rung.skipped {
				t.Errorf("counted %+v, want %+v", got, c.rung)
			}
		})
	}
}

// wantGoroutine looks for the place where TestHang hangs.
func wantGoroutine(t *testing.T, r *result) {
	t.Helper()
	var table strings.Builder
	print(&table, []*result{r})
	if !strings.Contains(table.String(), "failures.TestHang(") {
		t.Errorf("nothing says where it hangs:\n%s", table.String())
	}
}

func TestPatiently(t *testing.T) {
	for failures, calls := range map[int]int{0: 1, 2: 3, 9: 3} {
		synctest.Test(t, func(t *testing.T) {
			n := 0
			err := patiently(t.Context(), func() error {
				if n++; n <= failures {
					return errors.New("no answer")
				}
				return nil
			})
			if n != calls || (err == nil) != (failures < 3) {
				t.Errorf("%d failures: %d calls and %v", failures, n, err)
			}
		})
	}
}

func TestKernels(t *testing.T) {
	all, err := chooseKernels("")
	if err != nil {
		t.Fatal(err)
	}
	if len(all) < 4 || all[len(all)-1].name != hostKernel {
		t.Errorf("all kernels are %+v", all)
	}
	own, err := chooseKernels("6.1,/k/boot/vmlinuz-7.0-mine")
	if err != nil {
		t.Fatal(err)
	}
	if len(own) != 2 || own[0].lacks[0] != "tcx" || own[1].version() != "7.0-mine" || own[1].image != "/k/boot/vmlinuz-7.0-mine" {
		t.Errorf("a list gives %+v", own)
	}
	for _, list := range []string{"5.10", "6.1,"} {
		if _, err := chooseKernels(list); err == nil {
			t.Errorf("%q is taken", list)
		}
	}
	for _, table := range []string{"6.1", "6.1 linux-image-6.1.*-amd64 wants=luck"} {
		if _, err := parseKernels(table); err == nil {
			t.Errorf("the table %q is taken", table)
		}
	}
}

func TestNewest(t *testing.T) {
	names := []string{
		"linux-image-6.1.0-9-amd64", "linux-image-6.1.0-56-amd64", "linux-image-6.1.0-56-cloud-amd64",
		"linux-image-6.1.0-57-rt-amd64", "linux-image-6.1.0-57-amd64-unsigned", "linux-image-6.1.0-57-amd64-dbg",
		"linux-image-6.12.101+deb12-amd64", "linux-image-6.12.99+deb12-amd64", "linux-image-6.12.100+deb12-cloud-amd64",
	}
	for pattern, want := range map[string]string{
		"linux-image-6.1.*-amd64":        "linux-image-6.1.0-56-amd64",
		"linux-image-6.1.*-cloud-amd64":  "linux-image-6.1.0-56-cloud-amd64",
		"linux-image-6.12.*-amd64":       "linux-image-6.12.101+deb12-amd64",
		"linux-image-6.12.*-cloud-amd64": "linux-image-6.12.100+deb12-cloud-amd64",
	} {
		var fits []string
		for _, name := range names {
			if packagePattern(pattern).MatchString(name) {
				fits = append(fits, name)
			}
		}
		if got := slices.MaxFunc(fits, compareVersions); got != want {
			t.Errorf("%s: %s of %q, want %s", pattern, got, fits, want)
		}
	}
}

func TestMustNotSkip(t *testing.T) {
	debian := kernel{name: "6.1", pattern: "linux-image-6.1.*-amd64", lacks: []string{"tcx"}}
	for reason, may := range map[string]bool{
		"this kernel has no tcx": true, "this kernel has no bond devices": false,
		tooLong + ": minutes": true, "needs root: loads BPF programs": false, "no reason": false,
	} {
		if got := debian.mustNotSkip(reason); (got == "") != may {
			t.Errorf("%s: %q", reason, got)
		}
	}
	if got := (kernel{name: hostKernel}).mustNotSkip("this kernel has no bond devices"); got != "" {
		t.Errorf("on the host: %q", got)
	}
}

func TestOnlyRungs(t *testing.T) {
	loader := &built{tests: map[string]string{"TestLoad": "program", "TestAttach": "attach", "TestReach": "node"}}
	agent := &built{tests: map[string]string{"TestLife": "agent"}}
	some, run := onlyRungs([]*built{loader, agent}, "TestLoad|TestAttach/clsact", []string{"program", "attach"})
	if len(some) != 1 || some[0] != loader || run != "^(TestAttach|TestLoad)$/clsact" {
		t.Errorf("%v, %s", some, run)
	}
}

func TestUpdateCounts(t *testing.T) {
	path := filepath.Join(t.TempDir(), "instructions.txt")
	if err := os.WriteFile(path, []byte("# what it is\n6.1 node_in 1\n6.1 gone 9\n6.18 node_in 2\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	// Two flavours of a series count the same.
	counted := []*result{{counts: []string{"6.1 pod_in 4", "6.1 node_in 3"}}, {counts: []string{"6.1 node_in 3"}}, {}}
	if err := updateCounts(path, counted); err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if want := "# what it is\n6.1 node_in 3\n6.1 pod_in 4\n6.18 node_in 2\n"; string(text) != want {
		t.Errorf("got\n%swant\n%s", text, want)
	}
}
