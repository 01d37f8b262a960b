// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"
)

// limits bound what runs in a guest.
type limits struct {
	boot  time.Duration // until the boot marker
	test  time.Duration // one top-level test
	guest time.Duration // all of it
}

// machine says how guests are run here.
type machine struct {
	vng       string
	kvm       bool
	virtiofsd bool // the Rust one is in PATH; virtme-ng refuses QEMU's own
}

// The lines by which a guest says how far it is. Judge by them: an exit code can be vng's or QEMU's as well.
const (
	markBoot  = "vmtest: booted"
	markBegin = "vmtest: begin "
	markEnd   = "vmtest: end "
	markDone  = "vmtest: done"
)

// Found by no guest, and slow to look for.
const blacklist = "module_blacklist=ahci,libahci,libata,sr_mod,cdrom,sg,kvm,kvm_amd,kvm_intel,powernow_k8,psmouse," +
	"evdev,iTCO_wdt,i2c_i801,lpc_ich,pcspkr,serio_raw,button,scsi_mod,i6300esb,qemu_fw_cfg"

// complaint is what a kernel writes when it is broken, or when we have broken it.
var complaint = regexp.MustCompile(`WARNING: CPU|BUG:|Oops|Kernel panic|Out of memory|blocked for more than`)

// script is what runs in the guest, or on the host: each suite's tests, between marks.
func script(suites []*built, guest bool, run string) string {
	var b strings.Builder
	b.WriteString("#!/bin/sh\n")
	if guest {
		b.WriteString("mount -t bpf bpf /sys/fs/bpf || exit 1\n")
		// Else each new namespace has a device of every kind of tunnel that a test has made.
		b.WriteString("echo 1 >/proc/sys/net/core/fb_tunnels_only_for_init_net\n")
		// What no system call asks for by itself.
		b.WriteString("for module in tun br_netfilter; do modprobe $module 2>/dev/null; done\n")
	}
	fmt.Fprintf(&b, "exec 3<&0\necho '%s'\n", markBoot)
	for _, s := range suites {
		fmt.Fprintf(&b, "cd %s\necho '%s%s'\n", quote(s.dir), markBegin, s.name)
		// Lines, not blocks, reach the host at once: a test binary does not buffer what it writes.
		fmt.Fprintf(&b, "%s -test.short -test.v=test2json -test.run %s 2>&1 &\ntest=$!\n", quote(s.binary), quote(run))
		// A line from outside has a test that hangs say where.
		b.WriteString("{ read line && kill -QUIT $test; } <&3 >/dev/null 2>&1 &\nlistener=$!\n")
		b.WriteString("wait $test\nstatus=$?\nkill $listener 2>/dev/null\n")
		fmt.Fprintf(&b, "echo; echo \"%s%s $status\"\n", markEnd, s.name)
	}
	fmt.Fprintf(&b, "echo '%s'\n", markDone)
	return b.String()
}

func quote(s string) string { return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'" }

const plainQEMU = "qemu"

// runner names the way in which a kernel is run here.
func (m machine) runner(k kernel) (name string) {
	switch {
	case k.name == hostKernel:
		return "directly"
	case m.virtiofsd:
		name = "vng+virtiofs"
	case k.needs == "virtiofs":
		name = plainQEMU
	default:
		name = "vng+9p"
	}
	if m.kvm {
		name += "+kvm"
	}
	return name
}

// cpus is how many a guest has. Emulated, a second one doubles the time that a test takes, and has guests die of code
// that the kernel changes while the other runs it.
func (m machine) cpus() string {
	if m.kvm {
		return "2"
	}
	return "1"
}

// vngArgs is the command line of virtme-ng, but for what runs in the guest.
func (m machine) vngArgs(k kernel) []string {
	args := []string{"-v", "-r", k.image, "--memory", "1G", "--cpus", m.cpus(), "--user", "root", "--append", blacklist}
	if !m.kvm {
		args = append(args, "--disable-kvm") // else it takes /dev/kvm for granted where that opens
	}
	if !m.virtiofsd {
		args = append(args, "--force-9p")
	}
	return args
}

// environment has virtme-ng's other programs in PATH.
func (m machine) environment() []string {
	return append(os.Environ(), "PATH="+filepath.Dir(m.vng)+":"+os.Getenv("PATH"))
}

// run runs the suites on a kernel. A guest that dies before its boot marker is tried once more; one that dies later
// has been killed by what ran in it.
func (m machine) run(ctx context.Context, k kernel, suites []*built, run, logs string, l limits) *result {
	r := m.once(ctx, k, suites, run, logs, l)
	if !r.booted && k.name != hostKernel && ctx.Err() == nil {
		fmt.Printf("%s: the guest died before it had booted, and is tried once more: %s\n", k.name, strings.Join(r.errors, "; "))
		again := m.once(ctx, k, suites, run, logs, l)
		again.retried = true
		return again
	}
	return r
}

func (m machine) once(ctx context.Context, k kernel, suites []*built, run, logs string, l limits) *result {
	r := newResult(k, suites)
	start := time.Now()
	defer func() { r.took = time.Since(start) }()
	r.runner = m.runner(k)
	if err := m.start(ctx, k, suites, run, logs, l, r); err != nil {
		r.fail("%v", err)
	}
	return r
}

func (m machine) start(ctx context.Context, k kernel, suites []*built, run, logs string, l limits, r *result) error {
	guest, plain := k.name != hostKernel, strings.HasPrefix(r.runner, plainQEMU)
	rungs := k.rungs
	if plain {
		rungs = []string{"program"} // the others need modules and programs
	}
	if rungs != nil {
		if suites, run = onlyRungs(suites, run, rungs); len(suites) == 0 {
			r.booted, r.done = true, true
			fmt.Printf("%s: none of these tests is of its rungs: %q\n", k.name, rungs)
			return nil
		}
	}
	dir := filepath.Join(logs, k.name)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	// Beside the binaries, which the guest sees.
	path := filepath.Join(filepath.Dir(suites[0].binary), "run-"+k.name+".sh")
	if err := os.WriteFile(path, []byte(script(suites, guest, run)), 0o755); err != nil {
		return err
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	cmd := exec.CommandContext(ctx, "sh", path)
	switch {
	case plain:
		initramfs := path + ".cpio"
		if err := writeInitramfs(initramfs, path, suites); err != nil {
			return fmt.Errorf("make an initramfs: %w", err)
		}
		cmd = exec.CommandContext(ctx, "qemu-system-x86_64", m.qemuArgs(k.image, initramfs, "/dev/stderr")...)
	case guest:
		cmd = exec.CommandContext(ctx, m.vng, append(m.vngArgs(k), "--", "sh "+path)...)
	}
	cmd.Env = m.environment()
	// A group of its own: to kill vng alone would leave QEMU.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = 5 * time.Second
	stdin, err := cmd.StdinPipe()
	if err != nil {
		return err
	}
	stdout, err := cmd.StdoutPipe() // a pipe: vng spoils a file
	if err != nil {
		return err
	}
	consoleFile, err := os.Create(filepath.Join(dir, "console"))
	if err != nil {
		return err
	}
	defer consoleFile.Close()
	console := &tail{to: consoleFile}
	cmd.Stderr = console
	outputFile, err := os.Create(filepath.Join(dir, "output"))
	if err != nil {
		return err
	}
	defer outputFile.Close()
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start the guest: %w", err)
	}

	watch := newWatchdog(l, cancel, func() { io.WriteString(stdin, "quit\n") })
	defer watch.stop()
	err = r.read(io.TeeReader(stdout, outputFile), watch)
	if err != nil {
		cancel(err)
	}
	exit := cmd.Wait()
	syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) // what it may have left
	r.console = console.lines
	if cause := context.Cause(ctx); cause != nil {
		r.fail("%v", cause)
	}
	switch {
	case !r.booted:
		r.fail("the guest did not boot: %v", exit)
	case !r.done && r.running != "":
		r.fail("the guest ended in %s: %v", r.running, exit)
	case !r.done:
		r.fail("the guest ended before its tests did: %v", exit)
	}
	if guest {
		for _, line := range console.complaints {
			r.fail("the kernel said: %s", line)
		}
	}
	return nil
}

// tail keeps the last lines of what is written to it, and those that are complaints, and passes all on.
type tail struct {
	to         io.Writer
	partial    string
	lines      []string
	complaints []string
}

const tailLines = 40

func (t *tail) Write(b []byte) (int, error) {
	parts := strings.Split(t.partial+string(b), "\n")
	t.partial = parts[len(parts)-1]
	for _, line := range parts[:len(parts)-1] {
		line = strings.TrimRight(line, "\r")
		t.lines = append(t.lines, line)
		if complaint.MatchString(line) {
			t.complaints = append(t.complaints, line)
		}
	}
	t.lines = t.lines[max(0, len(t.lines)-tailLines):]
	return t.to.Write(b)
}

// watchdog ends a guest that takes too long: to boot, for one test, or in all.
type watchdog struct {
	limits  limits
	cancel  context.CancelCauseFunc
	quit    func() // has the test binary write its goroutines and end
	expired atomic.Pointer[error]
	guest   *time.Timer
	step    *time.Timer
}

// quitTime is what a test binary gets to write its goroutines, before the guest is killed.
const quitTime = 10 * time.Second

func newWatchdog(l limits, cancel context.CancelCauseFunc, quit func()) *watchdog {
	w := &watchdog{limits: l, cancel: cancel, quit: quit}
	w.guest = w.after(l.guest, "the guest")
	w.step = time.AfterFunc(l.boot, func() { cancel(tooLate("the boot", l.boot)) })
	return w
}

func tooLate(what string, limit time.Duration) error {
	return fmt.Errorf("%s did not end within %v", what, limit)
}

func (w *watchdog) after(limit time.Duration, what string) *time.Timer {
	return time.AfterFunc(limit, func() {
		if err := tooLate(what, limit); w.expired.CompareAndSwap(nil, &err) {
			w.quit()
			time.AfterFunc(quitTime, func() { w.cancel(err) })
		}
	})
}

// begin replaces the step that is timed.
func (w *watchdog) begin(what string, limit time.Duration) {
	w.step.Stop()
	w.step = w.after(limit, what)
}

func (w *watchdog) stop() {
	w.step.Stop()
	w.guest.Stop()
}

// read reads what the script writes.
func (r *result) read(output io.Reader, watch *watchdog) error {
	var events *converter
	defer func() {
		if events != nil {
			events.close()
		}
	}()
	lines := bufio.NewReader(output)
	for {
		line, err := lines.ReadString('\n')
		text := strings.TrimRight(line, "\r\n")
		switch {
		case text == markBoot:
			r.booted = true
			watch.step.Stop()
		case strings.HasPrefix(text, markBegin):
			r.running = "the suite " + strings.TrimPrefix(text, markBegin)
			watch.begin(r.running, watch.limits.test)
			if events, err = newConverter(r, strings.TrimPrefix(text, markBegin), watch); err != nil {
				return err
			}
		case strings.HasPrefix(text, markEnd) && events != nil:
			closed := events.close()
			events = nil
			watch.step.Stop()
			name, status, _ := strings.Cut(strings.TrimPrefix(text, markEnd), " ")
			if expired := watch.expired.Load(); expired != nil {
				return *expired
			}
			r.ended(name, status)
			if closed != nil {
				return closed
			}
		case text == markDone:
			r.done, r.running = true, ""
		case events != nil:
			if _, err := io.WriteString(events, text+"\n"); err != nil {
				return err
			}
		}
		if errors.Is(err, io.EOF) || errors.Is(err, os.ErrClosed) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// probeKVM tells whether KVM runs guests, by booting one: there are machines where /dev/kvm opens and no guest
// starts. The image has no root and panics at once.
func probeKVM(ctx context.Context, image string) bool {
	if f, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0); err != nil {
		return false
	} else {
		f.Close()
	}
	ctx, cancel := context.WithTimeout(ctx, 15*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, "qemu-system-x86_64", "-accel", "kvm", "-cpu", "host", "-m", "512", "-nodefaults",
		"-no-reboot", "-display", "none", "-serial", "stdio", "-kernel", image, "-append", "console=ttyS0 panic=-1")
	cmd.WaitDelay = time.Second
	out, _ := cmd.Output() // it cannot end well
	return strings.Contains(string(out), "Linux version")
}

// rustVirtiofsd tells whether the virtiofsd in PATH is the one that virtme-ng takes.
func rustVirtiofsd(ctx context.Context) bool {
	out, err := exec.CommandContext(ctx, "virtiofsd", "--version").CombinedOutput()
	return err == nil && regexp.MustCompile(`(?m)^virtiofsd \d`).Match(out)
}

// seconds is for the table.
func seconds(d time.Duration) string { return strconv.FormatFloat(d.Seconds(), 'f', 0, 64) }
