// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/lbagent/lbagent/loader"
	"github.com/lbagent/lbagent/node"
)

func newCheck(p *places) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "check",
		Short: "Say what this kernel and machine can do, and what that means",
		Long: "Say what this kernel and machine can do, and what that means: what the agent needs, which features of\n" +
			"the kernel it found by trying them, and which devices it would attach to by default. Nothing is changed.\n" +
			"Exits 0 if the agent can run here, 1 if not.",
		Example: "  lbagent check\n  lbagent check -o json | jq .features",
		Args:    usage(cobra.NoArgs),
	}
	out := addOutput(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		r := checkMachine(p.bpfRoot)
		if err := out.print(cmd.OutOrStdout(), r, func(w io.Writer) { showReport(w, r) }); err != nil {
			return err
		}
		if !r.OK {
			return errSaid
		}
		return nil
	}
	return cmd
}

// report is what there is to say of a machine.
type report struct {
	OK        bool        `json:"ok"` // the agent can run here
	Kernel    string      `json:"kernel"`
	Checks    []check     `json:"checks"`
	Features  []feature   `json:"features"` // empty where the kernel could not be tried
	Devices   []device    `json:"devices"`
	Uncovered []uncovered `json:"uncovered"`
}

// check is one thing that the agent needs, or had better have.
type check struct {
	Name    string `json:"name"`
	Result  result `json:"result"`
	Found   string `json:"found"`
	Meaning string `json:"meaning,omitempty"` // where the result is not ok
}

type result string

const (
	ok      result = "ok"
	warning result = "warning"
	failure result = "error"
)

// feature is something that not every kernel has and that the agent can do without.
type feature struct {
	Name    string `json:"name"`
	Present bool   `json:"present"`
	Since   string `json:"since"` // the first kernel
	Without string `json:"without"`
}

type device struct {
	Name string `json:"name"`
	Role string `json:"role"`
}

type uncovered struct {
	Name   string `json:"name"`
	Reason string `json:"reason"`
}

func checkMachine(bpfRoot string) report {
	r := report{OK: true, Features: []feature{}, Devices: []device{}, Uncovered: []uncovered{}}
	r.Kernel, _ = readLine("/proc/sys/kernel/osrelease")
	r.Checks = []check{checkPrivileges(), checkBPFFS(bpfRoot)}

	programs := check{Name: "programs", Result: ok, Found: "the kernel takes BPF programs"}
	if found, err := loader.Probe(); errors.Is(err, fs.ErrPermission) {
		programs = check{"programs", failure, syscall.EPERM.Error(),
			"the agent cannot run: it lacks privileges, or what it runs in (a user namespace, seccomp, lockdown) forbids BPF"}
	} else if err != nil {
		programs = check{"programs", failure, err.Error(), "the agent cannot run: the kernel does not take its programs"}
	} else {
		r.Features = features(found)
	}
	r.Checks = append(r.Checks, programs,
		checkForwarding("net.ipv4.ip_forward", "IPv4"), checkForwarding("net.ipv6.conf.all.forwarding", "IPv6"))
	r.Checks = append(r.Checks, r.checkDevices())
	for _, c := range r.Checks {
		r.OK = r.OK && c.Result != failure
	}
	return r
}

// The capabilities that the agent needs, by their numbers in the kernel.
const (
	capNetAdmin = 12
	capSysAdmin = 21
	capPerfmon  = 38
	capBPF      = 39
)

func checkPrivileges() check {
	c := check{Name: "privileges", Result: ok, Found: fmt.Sprintf("uid %d", os.Geteuid())}
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return check{c.Name, failure, err.Error(), "without /proc nothing can be said"}
	}
	var held uint64
	for line := range strings.Lines(string(status)) {
		if value, found := strings.CutPrefix(line, "CapEff:"); found {
			held, err = strconv.ParseUint(strings.TrimSpace(value), 16, 64)
		}
	}
	if err != nil {
		return check{c.Name, failure, err.Error(), "the capabilities of this process are not known"}
	}
	has := func(capability int) bool { return held&(1<<capability) != 0 }
	var missing []string
	if !has(capNetAdmin) {
		missing = append(missing, "CAP_NET_ADMIN")
	}
	if !has(capSysAdmin) {
		if !has(capBPF) {
			missing = append(missing, "CAP_BPF")
		}
		if !has(capPerfmon) {
			missing = append(missing, "CAP_PERFMON")
		}
	}
	if len(missing) > 0 {
		c.Result, c.Found = failure, c.Found+" without "+strings.Join(missing, ", ")
		c.Meaning = "the agent cannot load or attach programs: run it as root"
	}
	return c
}

func checkBPFFS(bpfRoot string) check {
	c := check{Name: "bpf file system", Result: ok}
	parent := filepath.Dir(bpfRoot)
	var st syscall.Statfs_t
	err := syscall.Statfs(parent, &st)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		c.Found = parent + " is not there; the agent makes it and mounts one"
	case err != nil:
		return check{c.Name, failure, fmt.Sprintf("look at %s: %v", parent, err), "maps cannot be pinned there: choose another --bpf-root"}
	case st.Type == 0xcafe4a11: // BPF_FS_MAGIC
		c.Found = "mounted at " + parent
	default:
		c.Found = "not mounted at " + parent + "; the agent mounts one"
	}
	return c
}

func checkForwarding(sysctl, family string) check {
	value, err := readLine("/proc/sys/" + strings.ReplaceAll(sysctl, ".", "/"))
	if errors.Is(err, fs.ErrNotExist) {
		return check{sysctl, warning, "not there", "this kernel has no " + family + ": services are served in the other family only"}
	}
	if err != nil {
		return check{sysctl, warning, err.Error(), "it is not known whether " + family + " is routed"}
	}
	c := check{Name: sysctl, Result: ok, Found: value}
	if value == "0" {
		c.Result = warning
		c.Meaning = "the host routes no " + family + ": packets of others to services with backends behind another device are dropped; " +
			"set it to 1"
	}
	return c
}

// checkDevices says which devices get programs by default, and which do not.
func (r *report) checkDevices() check {
	c := check{Name: "devices", Result: ok}
	host, err := node.List()
	if err != nil {
		return check{c.Name, failure, err.Error(), "the agent cannot follow this host's devices"}
	}
	var config node.Config
	config.Defaults()
	attach, without := node.Select(host, config)
	for _, a := range attach {
		r.Devices = append(r.Devices, device{a.Name, a.Role.String()})
	}
	for _, u := range without {
		r.Uncovered = append(r.Uncovered, uncovered{u.Name, u.Reason})
	}
	c.Found = fmt.Sprintf("%d get programs by default", len(attach))
	switch {
	case len(attach) == 0:
		c.Result, c.Meaning = warning, "no packet is translated until a device is there; name devices with --devices and --pod-devices"
	case len(without) > 0:
		c.Result, c.Meaning = warning, "replies can leave untranslated, see below"
	}
	return c
}

// features says what each feature is for. One that loader.Features has and that is not here would not be
// shown; there are two.
func features(f loader.Features) []feature {
	return []feature{
		{"tcx", f.TCX, "6.6", "programs are attached by clsact filters; others that attach there can come before them"},
		{"csumIPv6", f.CsumIPv6, "6.16", "IPv6 packets that a device has summed up are summed up by the kernel once more: right, a little slower"},
	}
}

func showReport(w io.Writer, r report) {
	fmt.Fprintf(w, "kernel %s\n\n", r.Kernel)
	rows := [][]string{{"CHECK", "RESULT", "FOUND"}}
	for _, c := range r.Checks {
		rows = append(rows, []string{c.Name, string(c.Result), c.Found})
	}
	columns(w, rows)
	for _, c := range r.Checks {
		if c.Meaning != "" {
			fmt.Fprintf(w, "%s: %s: %s\n", c.Result, c.Name, c.Meaning)
		}
	}
	if len(r.Features) > 0 {
		fmt.Fprintln(w)
		rows = [][]string{{"FEATURE", "PRESENT", "SINCE", "WITHOUT IT"}}
		for _, f := range r.Features {
			rows = append(rows, []string{f.Name, yes(f.Present), f.Since, f.Without})
		}
		columns(w, rows)
	}
	if len(r.Devices) > 0 {
		fmt.Fprintln(w)
		rows = [][]string{{"DEVICE", "PROGRAMS OF A"}}
		for _, d := range r.Devices {
			rows = append(rows, []string{d.Name, d.Role})
		}
		columns(w, rows)
	}
	if len(r.Uncovered) > 0 {
		fmt.Fprintln(w)
		rows = [][]string{{"DEVICE WITHOUT PROGRAMS", "REASON"}}
		for _, u := range r.Uncovered {
			rows = append(rows, []string{u.Name, u.Reason})
		}
		columns(w, rows)
	}
	fmt.Fprintln(w)
	if r.OK {
		fmt.Fprintln(w, "the agent can run here")
	} else {
		fmt.Fprintln(w, "the agent cannot run here")
	}
}

func readLine(path string) (string, error) {
	text, err := os.ReadFile(path)
	return strings.TrimSpace(string(text)), err
}
