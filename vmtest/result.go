// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"text/tabwriter"
	"time"
)

// result is what came of one kernel.
type result struct {
	kernel  kernel
	runner  string
	suites  map[string]*built
	rungs   map[string]*tally
	booted  bool
	done    bool
	retried bool
	running string // the test that runs, or the suite
	errors  []string
	console []string // its last lines
	said    []string // by a test that did not end
	took    time.Duration
	counts  []string // verifier's instruction counts, as the golden file has them
}

// tally counts the tests of a rung; those that have subtests are not counted, but their subtests.
type tally struct {
	passed, failed, skipped int
	seconds                 float64
	skips                   map[string]int // by reason
}

func newResult(k kernel, suites []*built) *result {
	r := &result{kernel: k, suites: map[string]*built{}, rungs: map[string]*tally{}}
	for _, s := range suites {
		r.suites[s.name] = s
	}
	return r
}

func (r *result) fail(format string, args ...any) {
	r.errors = append(r.errors, fmt.Sprintf(format, args...))
}

func (r *result) rung(suite, test string) *tally {
	top, _, _ := strings.Cut(test, "/")
	name := r.suites[suite].tests[top]
	if name == "" {
		name = suite
	}
	if r.rungs[name] == nil {
		r.rungs[name] = &tally{skips: map[string]int{}}
	}
	return r.rungs[name]
}

// ended notes how a test binary ended.
func (r *result) ended(suite, status string) {
	if status != "0" {
		r.fail("the tests of %s ended with status %s", suite, status)
	}
}

// converter makes events of what a test binary writes, by test2json.
type converter struct {
	io.WriteCloser
	cmd  *exec.Cmd
	done chan struct{}
}

// event is one of test2json's.
type event struct {
	Action  string
	Test    string
	Output  string
	Elapsed float64
}

func newConverter(r *result, suite string, watch *watchdog) (*converter, error) {
	if r.suites[suite] == nil {
		return nil, fmt.Errorf("the guest speaks of a suite %q", suite)
	}
	c := &converter{cmd: exec.Command("go", "tool", "test2json", "-t"), done: make(chan struct{})}
	var err error
	if c.WriteCloser, err = c.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	out, err := c.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := c.cmd.Start(); err != nil {
		return nil, fmt.Errorf("start test2json: %w", err)
	}
	go func() {
		defer close(c.done)
		r.follow(suite, out, watch)
	}()
	return c, nil
}

// close waits until all events have been read.
func (c *converter) close() error {
	c.WriteCloser.Close()
	<-c.done
	return c.cmd.Wait()
}

var skipReason = regexp.MustCompile(`^\s*\S+\.go:\d+: (.*)$`)

// follow counts the tests of a suite and says what they do, as they do it.
func (r *result) follow(suite string, events io.Reader, watch *watchdog) {
	parents, output := map[string]bool{}, map[string][]string{}
	lines := bufio.NewScanner(events)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		var e event
		if err := json.Unmarshal(lines.Bytes(), &e); err != nil || e.Test == "" {
			continue
		}
		parent, _, sub := cutLast(e.Test)
		switch e.Action {
		case "run":
			if sub {
				parents[parent] = true
			} else {
				r.running = e.Test
				watch.begin(e.Test, watch.limits.test)
			}
		case "output":
			text := strings.TrimRight(e.Output, "\n")
			if _, count, found := strings.Cut(text, "instructions: "); found {
				r.counts = append(r.counts, count)
			}
			if trimmed := strings.TrimSpace(text); !strings.HasPrefix(trimmed, "=== ") && !strings.HasPrefix(trimmed, "--- ") {
				output[e.Test] = append(output[e.Test], text)
			}
		case "pass", "fail", "skip":
			t := r.rung(suite, e.Test)
			if !sub {
				t.seconds += e.Elapsed
				r.running = "the suite " + suite
				watch.begin(r.running, watch.limits.test)
				fmt.Printf("%-10s %-8s %s %s (%.1f s)\n", r.kernel.name, suite, e.Action, e.Test, e.Elapsed)
			}
			r.count(t, e, parents[e.Test], output[e.Test])
			delete(output, e.Test)
		}
	}
	for _, test := range sortedKeys(output) {
		r.said = append(r.said, output[test]...)
	}
}

func (r *result) count(t *tally, e event, parent bool, output []string) {
	switch {
	case e.Action == "fail":
		if !parent || len(output) > 0 {
			t.failed++
			r.fail("%s", strings.Join(append([]string{e.Test + " failed"}, firstSaid(output)...), "\n\t"))
		}
	case e.Action == "skip":
		reason := "no reason"
		for _, line := range output {
			if match := skipReason.FindStringSubmatch(line); match != nil {
				reason = match[1]
			}
		}
		t.skipped++
		t.skips[reason]++
		if complaint := r.kernel.mustNotSkip(reason); complaint != "" {
			r.fail("%s was skipped: %s: %s", e.Test, reason, complaint)
		}
	case !parent:
		t.passed++
	}
}

// mustNotSkip says what is wrong with a skip for that reason, if something is: a rung that is not run proves
// nothing.
func (k kernel) mustNotSkip(reason string) string {
	if strings.HasPrefix(reason, tooLong) {
		return ""
	}
	feature, ok := strings.CutPrefix(reason, "this kernel has no ")
	switch {
	case !ok:
		return "only what a kernel lacks, or what is too long for a guest, may be skipped"
	case k.pattern == "" || slices.Contains(k.lacks, feature):
		return "" // of the host's kernel and of other people's we know nothing
	}
	return "it should have it, by vmtest/kernels.txt"
}

// tooLong is what tests say that are left out with -short.
const tooLong = "too long for -short"

func cutLast(test string) (parent, name string, sub bool) {
	i := strings.LastIndexByte(test, '/')
	if i < 0 {
		return "", test, false
	}
	return test[:i], test[i+1:], true
}

// ok tells whether all that was to run did, and passed.
func (r *result) ok() bool { return len(r.errors) == 0 }

// saidLines is enough for what a test says, and for its goroutines; the output file has them all.
const saidLines = 200

func firstSaid(lines []string) []string { return lines[:min(len(lines), saidLines)] }

// print writes the consoles of guests that failed, the table of all kernels, what was skipped and why, and what
// failed: last, so that a log that was cut to its end still has it.
func print(w io.Writer, results []*result) {
	for _, r := range results {
		if !r.ok() && len(r.console) > 0 {
			fmt.Fprintf(w, "%s: the last lines of its console:\n\t%s\n", r.kernel.name, strings.Join(r.console, "\n\t"))
		}
	}
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "KERNEL\tRUNG\tPASSED\tFAILED\tSKIPPED\tSECONDS\tRUNNER")
	for _, r := range results {
		version := r.kernel.name
		if r.kernel.image != "" {
			version += " (" + r.kernel.version() + ")"
		}
		for _, name := range r.rungsInOrder() {
			g := r.rungs[name]
			fmt.Fprintf(t, "%s\t%s\t%d\t%d\t%d\t%.0f\t%s\n", version, name, g.passed, g.failed, g.skipped, g.seconds, r.runner)
		}
		verdict := "ok"
		if !r.ok() {
			verdict = "FAILED"
		}
		if r.retried {
			verdict += ", second try"
		}
		fmt.Fprintf(t, "%s\tall\t\t\t\t%s\t%s\n", version, seconds(r.took), verdict)
	}
	t.Flush()
	for _, r := range results {
		for _, name := range r.rungsInOrder() {
			skips := r.rungs[name].skips
			for _, reason := range sortedKeys(skips) {
				fmt.Fprintf(w, "%s: %s: %d skipped: %s\n", r.kernel.name, name, skips[reason], reason)
			}
		}
	}
	for _, r := range results {
		if len(r.said) > 0 {
			fmt.Fprintf(w, "%s: what did not end said:\n\t%s\n", r.kernel.name, strings.Join(firstSaid(r.said), "\n\t"))
		}
		for _, e := range r.errors {
			fmt.Fprintf(w, "%s: %s\n", r.kernel.name, e)
		}
	}
}

func (r *result) rungsInOrder() []string {
	var names []string
	for _, name := range rungNames {
		if r.rungs[name] != nil {
			names = append(names, name)
		}
	}
	for _, name := range sortedKeys(r.rungs) {
		if !slices.Contains(names, name) {
			names = append(names, name)
		}
	}
	return names
}

func sortedKeys[V any](m map[string]V) []string {
	var keys []string
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}
