// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
)

// cleanUp ends and removes all that there is of the demo, from the last, and looks whether that is so. It does
// all of it whatever fails, and nothing twice.
func (d *demo) cleanUp() error {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	if d.client != nil && d.client.stop != nil {
		d.client.close() // first: what follows would break its connections
	}
	var errs []error
	for _, close := range slices.Backward(d.closers) {
		errs = append(errs, close(ctx))
	}
	d.closers = nil
	errs = append(errs, d.leftovers())
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("clean up: %w", err)
	}
	d.screen.say("nothing is left: no pin, mount, file, process or namespace")
	return nil
}

// removeAgent stops the agent, has `lbagent cleanup` do its work on the node, and looks whether it did.
func (d *demo) removeAgent(ctx context.Context) error {
	stopErr := d.agent.stop()
	d.ledger.begin("stop the agent, and clean up")
	before, err := d.attachedPrograms(ctx)
	if err != nil {
		return errors.Join(stopErr, err)
	}
	removed, err := d.agent.run(ctx, "cleanup")
	if err != nil {
		return errors.Join(stopErr, err)
	}
	d.screen.show("$ lbagent cleanup\n" + head(strings.ReplaceAll(removed, d.bpffs+"/", ""), 4))
	after, err := d.attachedPrograms(ctx)
	if err != nil {
		return errors.Join(stopErr, err)
	}
	if len(after) > 0 {
		err = fmt.Errorf("lbagent cleanup left the programs %v", after)
	}
	// The kernel may have files of its own beside them, in any BPF file system.
	for _, path := range []string{filepath.Join(d.bpffs, "lbagent"), filepath.Join(d.folder, "lbagent.sock")} {
		if _, e := os.Lstat(path); !errors.Is(e, fs.ErrNotExist) {
			err = errors.Join(err, fmt.Errorf("lbagent cleanup left %s (%v)", path, e))
		}
	}
	if err == nil {
		d.ledger.saw("%d programs detached, all pins removed", len(before))
	}
	return errors.Join(stopErr, err)
}

// attachedPrograms asks the kernel, not the agent, which BPF programs the node's devices have.
func (d *demo) attachedPrograms(ctx context.Context) (programs []string, err error) {
	err = d.lab.Node.Do(func() error {
		programs, err = tcxPrograms()
		return err
	})
	if err != nil {
		return nil, err
	}
	filters, err := d.clsactPrograms(ctx)
	return append(programs, filters...), err
}

// tcxPrograms names what is attached by tcx, which the bpftool of Debian 12 does not show.
func tcxPrograms() (programs []string, err error) {
	devices, err := net.Interfaces()
	if err != nil {
		return nil, err
	}
	for _, device := range devices {
		for _, hook := range []ebpf.AttachType{ebpf.AttachTCXIngress, ebpf.AttachTCXEgress} {
			result, err := link.QueryPrograms(link.QueryOptions{Target: device.Index, Attach: hook})
			if errors.Is(err, ebpf.ErrNotSupported) || errors.Is(err, syscall.EINVAL) {
				return nil, nil // a kernel without tcx
			}
			if err != nil {
				return nil, fmt.Errorf("ask for the programs of %s: %w", device.Name, err)
			}
			for _, p := range result.Programs {
				programs = append(programs, fmt.Sprintf("%d at %v of %s", p.ID, hook, device.Name))
			}
		}
	}
	return programs, nil
}

func (d *demo) clsactPrograms(ctx context.Context) (programs []string, err error) {
	out, err := output(ctx, d.lab.Node.Namespace, command("bpftool", "-j", "net", "show"))
	if err != nil {
		return nil, err
	}
	var shown []map[string][]struct {
		DevName, Kind, Name string
	}
	if err := json.Unmarshal([]byte(out), &shown); err != nil {
		return nil, fmt.Errorf("read what bpftool says: %w", err)
	}
	for _, hooks := range shown {
		for _, p := range hooks["tc"] {
			if strings.HasPrefix(p.Kind, "clsact/") {
				programs = append(programs, p.Name+" at "+p.Kind+" of "+p.DevName)
			}
		}
	}
	return programs, nil
}

// leftovers looks for what this process should have removed.
func (d *demo) leftovers() error {
	var errs []error
	if d.folder != "" {
		if _, err := os.Lstat(d.folder); err == nil {
			errs = append(errs, fmt.Errorf("the folder %s is left", d.folder))
		}
		mounts, err := os.ReadFile("/proc/self/mounts")
		errs = append(errs, err)
		if strings.Contains(string(mounts), d.folder) {
			errs = append(errs, fmt.Errorf("a mount in %s is left", d.folder))
		}
	}
	children, err := childProcesses()
	errs = append(errs, err)
	if len(children) > 0 {
		errs = append(errs, fmt.Errorf("processes are left: %v", children))
	}
	held, err := heldNamespaces()
	errs = append(errs, err)
	if held > 0 {
		errs = append(errs, fmt.Errorf("%d network namespaces are still held", held))
	}
	return errors.Join(errs...)
}

// childProcesses names this process's children, those that have ended and were not waited for included.
func childProcesses() (children []string, err error) {
	files, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil {
		return nil, err
	}
	for _, f := range files {
		text, err := os.ReadFile(f)
		if err != nil {
			continue // it has ended
		}
		// PID (NAME) STATE PPID; the name may have anything in it.
		name, rest, _ := cutLast(string(text), ")")
		fields := strings.Fields(rest)
		if len(fields) > 1 && fields[1] == strconv.Itoa(os.Getpid()) {
			children = append(children, name+")")
		}
	}
	return children, nil
}

func cutLast(s, sep string) (before, after string, found bool) {
	if i := strings.LastIndex(s, sep); i >= 0 {
		return s[:i], s[i+len(sep):], true
	}
	return s, "", false
}

// heldNamespaces counts the network namespaces that an open file of this process keeps alive. They have no
// names, and so end with the last that holds them.
func heldNamespaces() (held int, err error) {
	files, err := filepath.Glob("/proc/self/fd/*")
	if err != nil {
		return 0, err
	}
	for _, f := range files {
		if target, err := os.Readlink(f); err == nil && strings.HasPrefix(target, "net:[") {
			held++
		}
	}
	return held, nil
}
