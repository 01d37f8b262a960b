// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
)

// suite is a package whose tests a kernel decides.
type suite struct {
	name   string            // unique
	folder string            // in the module
	rungs  map[string]string // by file; "" is that of all others
}

// suites are run with -test.short: floods, races and benchmarks stay on the host.
func suites() []suite {
	return []suite{
		{"maps", "maps", map[string]string{"": "maps"}},
		{"loader", "loader", map[string]string{
			"program_test.go": "program", "selection_test.go": "program", "answers_test.go": "program", "load_test.go": "program",
			"attach_test.go": "attach", "": "node",
		}},
		{"node", "node", map[string]string{"": "netlink"}},
		{"agent", "agent", map[string]string{"": "agent"}},
	}
}

// rungNames is the order of the table.
var rungNames = [...]string{"maps", "program", "attach", "node", "netlink", "agent"}

// built is a suite's tests as a program that runs anywhere.
type built struct {
	suite
	binary string
	dir    string            // where its tests expect to run
	tests  map[string]string // rung by test
}

// build makes the test binary of a suite, static, in `dir`. It is nil if none of its tests fits `run`.
func (s suite) build(ctx context.Context, module, dir, run string) (*built, error) {
	first, _, _ := strings.Cut(run, "/")
	fits, err := regexp.Compile(first)
	if err != nil {
		return nil, fmt.Errorf("choose tests: %w", err)
	}
	b := &built{suite: s, binary: filepath.Join(dir, s.name+".test"), dir: filepath.Join(module, s.folder), tests: map[string]string{}}
	files, err := filepath.Glob(filepath.Join(b.dir, "*_test.go"))
	if err != nil {
		return nil, err
	}
	function := regexp.MustCompile(`(?m)^func (Test\w+)\(`)
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			return nil, err
		}
		rung, ok := s.rungs[filepath.Base(file)]
		if !ok {
			rung = s.rungs[""]
		}
		for _, match := range function.FindAllSubmatch(text, -1) {
			if name := string(match[1]); name != "TestMain" && fits.MatchString(name) {
				b.tests[name] = rung
			}
		}
	}
	if len(b.tests) == 0 {
		return nil, nil
	}
	// Debug information is half of it, and a guest reads it through a slow file system.
	cmd := exec.CommandContext(ctx, "go", "test", "-c", "-tags", "vmtest", "-ldflags", "-w", "-o", b.binary, "./"+s.folder)
	cmd.Dir, cmd.Env = module, append(os.Environ(), "CGO_ENABLED=0")
	if err := runCommand(cmd); err != nil {
		return nil, fmt.Errorf("build the tests of %s: %w", s.folder, err)
	}
	return b, nil
}

// onlyRungs leaves what of the suites and of an expression for tests belongs to some rungs.
func onlyRungs(suites []*built, run string, rungs []string) (some []*built, _ string) {
	var names []string
	for _, s := range suites {
		before := len(names)
		for test, rung := range s.tests {
			if slices.Contains(rungs, rung) {
				names = append(names, test)
			}
		}
		if len(names) > before {
			some = append(some, s)
		}
	}
	slices.Sort(names)
	_, subtests, _ := strings.Cut(run, "/")
	return some, "^(" + strings.Join(names, "|") + ")$/" + subtests
}
