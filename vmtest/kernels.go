// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"context"
	_ "embed" // the table of kernels
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

//go:embed kernels.txt
var kernelTable string

// kernel is a kernel to run tests on.
type kernel struct {
	name    string
	pattern string // of Debian packages; empty: image is a path that someone has named, or it is the host's
	image   string // boot/vmlinuz-VERSION below the folder that has lib/modules/VERSION
	needs   string // the only way to give a guest its root, or empty
	lacks   []string
	rungs   []string // nil: all
}

// hostKernel is the kernel that this process runs on.
const hostKernel = "host"

func parseKernels(table string) ([]kernel, error) {
	var all []kernel
	for line := range strings.Lines(table) {
		fields := strings.Fields(line)
		if len(fields) == 0 || strings.HasPrefix(fields[0], "#") {
			continue
		}
		if len(fields) < 2 {
			return nil, fmt.Errorf("kernel %s: no package", fields[0])
		}
		k := kernel{name: fields[0], pattern: fields[1]}
		for _, f := range fields[2:] {
			key, value, _ := strings.Cut(f, "=")
			switch key {
			case "needs":
				k.needs = value
			case "lacks":
				k.lacks = strings.Split(value, ",")
			case "rungs":
				k.rungs = strings.Split(value, ",")
			default:
				return nil, fmt.Errorf("kernel %s: unknown %q", k.name, f)
			}
		}
		all = append(all, k)
	}
	return all, nil
}

// chooseKernels returns the kernels of a comma-separated list of names and paths; all, and the host's, if it is
// empty.
func chooseKernels(list string) ([]kernel, error) {
	table, err := parseKernels(kernelTable)
	if err != nil {
		return nil, err
	}
	table = append(table, kernel{name: hostKernel})
	if list == "" {
		return table, nil
	}
	var chosen []kernel
	for name := range strings.SplitSeq(list, ",") {
		i := slices.IndexFunc(table, func(k kernel) bool { return k.name == name })
		switch {
		case i >= 0:
			chosen = append(chosen, table[i])
		case strings.Contains(name, "/"):
			path, err := filepath.Abs(name)
			if err != nil {
				return nil, err
			}
			chosen = append(chosen, kernel{name: strings.TrimPrefix(filepath.Base(path), "vmlinuz-"), image: path})
		default:
			return nil, fmt.Errorf("no kernel %q in vmtest/kernels.txt, and no path to an image", name)
		}
	}
	return chosen, nil
}

// version is the VERSION of an image's boot/vmlinuz-VERSION.
func (k kernel) version() string { return strings.TrimPrefix(filepath.Base(k.image), "vmlinuz-") }

// fetch downloads and unpacks the newest package of a kernel below `cache`, unless it is there, and sets its
// image. Nothing is installed.
func (k *kernel) fetch(ctx context.Context, cache string) error {
	if k.pattern == "" {
		return nil
	}
	name, err := newestPackage(ctx, k.pattern)
	if err != nil {
		return fmt.Errorf("find the kernel %s: %w", k.name, err)
	}
	version := strings.TrimPrefix(name, "linux-image-")
	dir := filepath.Join(cache, "kernels", version)
	k.image = filepath.Join(dir, "boot", "vmlinuz-"+version)
	if _, err := os.Stat(k.image); err == nil {
		return nil
	}
	// Unpacked beside it and renamed: what is there is whole.
	if err := os.MkdirAll(filepath.Dir(dir), 0o755); err != nil {
		return err
	}
	work, err := os.MkdirTemp(filepath.Dir(dir), ".new-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(work)
	if err := os.Chmod(work, 0o755); err != nil { // apt downloads as a user of its own
		return err
	}
	download := exec.CommandContext(ctx, "apt-get", "-q", "-o", "APT::Sandbox::User=root", "download", name)
	download.Dir = work
	if err := runCommand(download); err != nil {
		return fmt.Errorf("download %s: %w", name, err)
	}
	packages, err := filepath.Glob(filepath.Join(work, "*.deb"))
	if err != nil || len(packages) != 1 {
		return fmt.Errorf("download %s: %d packages came", name, len(packages))
	}
	unpacked := filepath.Join(work, "root")
	if err := runCommand(exec.CommandContext(ctx, "dpkg-deb", "-x", packages[0], unpacked)); err != nil {
		return fmt.Errorf("unpack %s: %w", name, err)
	}
	// The package leaves this to its installation.
	if err := runCommand(exec.CommandContext(ctx, "depmod", "-b", unpacked, version)); err != nil {
		return fmt.Errorf("list the modules of %s: %w", name, err)
	}
	if err := os.Rename(unpacked, dir); err != nil && !errors.Is(err, os.ErrExist) {
		return err
	}
	_, err = os.Stat(k.image)
	return err
}

// newestPackage returns the name of the newest package that fits, of those that apt can download.
func newestPackage(ctx context.Context, pattern string) (string, error) {
	out, err := exec.CommandContext(ctx, "apt-cache", "pkgnames", "linux-image-").Output()
	if err != nil {
		return "", fmt.Errorf("list packages: %w", err)
	}
	fits := packagePattern(pattern)
	var names []string
	for lines := bufio.NewScanner(strings.NewReader(string(out))); lines.Scan(); {
		if fits.MatchString(lines.Text()) {
			names = append(names, lines.Text())
		}
	}
	slices.SortFunc(names, func(a, b string) int { return compareVersions(b, a) })
	for _, name := range names {
		// Names outlive their packages.
		out, err := exec.CommandContext(ctx, "apt-cache", "policy", name).Output()
		if err == nil && len(out) > 0 && !strings.Contains(string(out), "Candidate: (none)") {
			return name, nil
		}
	}
	return "", fmt.Errorf("apt has no package %s: is there a mirror of Debian in its sources, and was `apt-get update` run?", pattern)
}

// packagePattern makes a pattern's `*` digits and what comes between numbers, so that no flavour fits another's.
func packagePattern(pattern string) *regexp.Regexp {
	return regexp.MustCompile("^" + strings.ReplaceAll(regexp.QuoteMeta(pattern), `\*`, `[0-9][0-9.-]*(\+deb[0-9]+)?`) + "$")
}

// compareVersions compares names by the numbers in them.
func compareVersions(a, b string) int {
	numbers := func(s string) (all []int) {
		for _, digits := range regexp.MustCompile(`[0-9]+`).FindAllString(s, -1) {
			n, _ := strconv.Atoi(digits)
			all = append(all, n)
		}
		return all
	}
	return slices.Compare(numbers(a), numbers(b))
}

// runCommand runs a command; the error has what it said.
func runCommand(cmd *exec.Cmd) error {
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w: %s", filepath.Base(cmd.Path), err, strings.TrimSpace(string(out)))
	}
	return nil
}
