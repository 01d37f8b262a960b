// SPDX-License-Identifier: Apache-2.0

// Vmtest runs what a kernel decides on each kernel of kernels.txt, in guests of virtme-ng, and on the one it runs on.
// It is for developers, who call it by `make vmtest`; docs/testing.md says how.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"
)

// The one version that the flags of run.go are known to fit.
const virtmeNG = "virtme-ng==1.42"

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	if err := run(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "vmtest:", err)
		stop()
		os.Exit(1)
	}
}

func run(ctx context.Context) error {
	names := flag.String("kernel", "", "kernels by `name` or path of an image, with commas between; all if empty")
	tests := flag.String("run", "", "run the tests that fit this `regexp` alone")
	shell := flag.Bool("shell", false, "open a shell in a guest of the one kernel instead")
	update := flag.Bool("update", false, "write the golden file of the verifier's instruction counts anew, for these kernels")
	flag.Parse()

	kernels, err := chooseKernels(*names)
	if err != nil {
		return err
	}
	if *shell && (len(kernels) != 1 || kernels[0].name == hostKernel) {
		return errors.New("a shell is opened on one kernel: name it")
	}
	cache, err := cacheDir()
	if err != nil {
		return err
	}
	m, err := prepare(ctx, kernels, cache)
	if err != nil {
		return err
	}
	if *shell {
		return m.shell(ctx, kernels[0])
	}
	module, err := os.Getwd()
	if err != nil {
		return err
	}
	if _, err := os.Stat("go.mod"); err != nil {
		return errors.New("run it in the root of the module")
	}
	work, err := os.MkdirTemp("", "vmtest-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(work)
	var all []*built
	for _, s := range suites() {
		b, err := s.build(ctx, module, work, *tests)
		if err != nil {
			return err
		}
		if b != nil {
			all = append(all, b)
		}
	}
	if len(all) == 0 {
		return fmt.Errorf("no test fits %q", *tests)
	}

	logs := filepath.Join(module, ".cache", "vmtest")
	limits := limits{boot: 5 * time.Minute, test: 5 * time.Minute, guest: 20 * time.Minute}
	results := make([]*result, len(kernels))
	var group errgroup.Group
	group.SetLimit(runtime.NumCPU()) // a guest without KVM keeps one busy
	for i, k := range kernels {
		group.Go(func() error {
			results[i] = m.run(ctx, k, all, *tests, logs, limits)
			return nil
		})
	}
	group.Wait()
	fmt.Printf("\nconsoles and output: %s\n", logs)
	print(os.Stdout, results)
	if *update {
		if err := updateCounts(filepath.Join(module, "loader", "testdata", "instructions.txt"), results); err != nil {
			return err
		}
	}
	if slices.ContainsFunc(results, func(r *result) bool { return !r.ok() }) {
		return errors.New("a kernel failed")
	}
	return nil
}

// cacheDir is where kernels and virtme-ng are kept between runs, of all checkouts.
func cacheDir() (string, error) {
	base, err := os.UserCacheDir()
	if err != nil {
		base, err = filepath.Abs(".cache")
	}
	dir := filepath.Join(base, "lbagent", "vmtest")
	if err == nil {
		err = os.MkdirAll(dir, 0o755)
	}
	return dir, err
}

// prepare gets what guests need, where it is missing.
func prepare(ctx context.Context, kernels []kernel, cache string) (machine, error) {
	var m machine
	if !slices.ContainsFunc(kernels, func(k kernel) bool { return k.name != hostKernel }) {
		return m, nil
	}
	m.virtiofsd = rustVirtiofsd(ctx)
	m.vng = filepath.Join(cache, virtmeNG, "bin", "vng")
	if _, err := os.Stat(m.vng); err != nil {
		dir := filepath.Join(cache, virtmeNG)
		if err := runCommand(exec.CommandContext(ctx, "python3", "-m", "venv", "--clear", dir)); err != nil {
			return m, fmt.Errorf("make a virtual environment for virtme-ng: %w", err)
		}
		if err := patiently(ctx, func() error {
			return runCommand(exec.CommandContext(ctx, filepath.Join(dir, "bin", "pip"), "install", "-q", virtmeNG))
		}); err != nil {
			return m, fmt.Errorf("install virtme-ng: %w", err)
		}
	}
	kvm := false
	for i := range kernels {
		k := &kernels[i]
		if k.name == hostKernel {
			continue
		}
		if k.fetch(ctx, cache) != nil { // the lists may be older than what the mirror has
			if err := patiently(ctx, func() error {
				if err := runCommand(exec.CommandContext(ctx, "apt-get", "-qq", "update")); err != nil {
					return fmt.Errorf("update the lists of packages: %w", err)
				}
				return k.fetch(ctx, cache)
			}); err != nil {
				return m, err
			}
		}
		if !kvm {
			kvm, m.kvm = true, probeKVM(ctx, k.image)
		}
	}
	return m, nil
}

// patiently tries three times what a mirror may refuse for a moment.
func patiently(ctx context.Context, download func() error) error {
	for try := 1; ; try++ {
		err := download()
		if err == nil || try == 3 || ctx.Err() != nil {
			return err
		}
		fmt.Printf("%v; once more in %v\n", err, pause)
		select {
		case <-time.After(pause):
		case <-ctx.Done():
		}
	}
}

const pause = 10 * time.Second

// shell is a guest with the terminal of this process.
func (m machine) shell(ctx context.Context, k kernel) error {
	var args []string
	for _, a := range m.vngArgs(k) {
		if a != "-v" {
			args = append(args, a)
		}
	}
	cmd := exec.CommandContext(ctx, m.vng, args...)
	cmd.Env = m.environment()
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	return cmd.Run()
}

// updateCounts replaces the lines of the series that were counted.
func updateCounts(path string, results []*result) error {
	text, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	counted := map[string]bool{}
	var lines []string
	for _, r := range results {
		for _, line := range r.counts {
			lines = append(lines, line)
			counted[strings.Fields(line)[0]] = true
		}
	}
	var comments []string
	for line := range strings.Lines(string(text)) {
		line = strings.TrimRight(line, "\n")
		if strings.HasPrefix(line, "#") {
			comments = append(comments, line)
		} else if fields := strings.Fields(line); len(fields) > 0 && !counted[fields[0]] {
			lines = append(lines, line)
		}
	}
	slices.Sort(lines)
	return os.WriteFile(path, []byte(strings.Join(append(comments, slices.Compact(lines)...), "\n")+"\n"), 0o644)
}
