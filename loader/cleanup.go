// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/lbagent/lbagent/maps"
)

// MountBPF makes sure that `root`, a folder of pins, is on a BPF file system: where its parent is not, one is
// mounted there and stays.
func MountBPF(root string) error {
	parent := filepath.Dir(root)
	if err := os.MkdirAll(parent, 0o755); err != nil {
		return fmt.Errorf("make the folder %s: %w", parent, err)
	}
	on, err := onBPF(parent)
	if err != nil || on {
		return err
	}
	if err := unix.Mount("bpf", parent, "bpf", 0, "mode=0700"); err != nil {
		return fmt.Errorf("mount a BPF file system at %s: %w", parent, err)
	}
	return nil
}

func onBPF(path string) (bool, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(path, &st); err != nil {
		return false, fmt.Errorf("look at the file system of %s: %w", path, err)
	}
	return st.Type == unix.BPF_FS_MAGIC, nil
}

// Cleanup detaches every program of ours from the devices of this network namespace and removes all pins
// below `root`, whatever version made them. It returns what it removed, a line each. A BPF file system that
// MountBPF has mounted stays.
//
// Returns maps.ErrInUse, having done nothing, if an agent is running with this root.
func Cleanup(root string) (removed []string, err error) {
	if lock, err := os.Open(filepath.Join(root, "maps")); err == nil {
		defer lock.Close()
		if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("%w with %s: stop it first", maps.ErrInUse, root)
		}
	}
	// Links before maps, so that no program runs with half of its maps listed; filters by what they are.
	devices, err := netlink.LinkList()
	if err != nil {
		return nil, fmt.Errorf("list devices: %w", err)
	}
	for _, d := range devices {
		var ours []string
		err := eachFilter(d, func(_ netlink.Filter, program string) error {
			if program != "" {
				ours = append(ours, "filter "+program+" of "+d.Attrs().Name)
			}
			return nil
		})
		if err == nil && len(ours) > 0 {
			err = removeFilters(d.Attrs().Index, func(string) bool { return true })
		}
		if err != nil {
			return removed, fmt.Errorf("remove filters of %s: %w", d.Attrs().Name, err)
		}
		removed = append(removed, ours...)
	}
	for _, kind := range []string{"links", "maps"} {
		pins, err := os.ReadDir(filepath.Join(root, kind))
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return removed, fmt.Errorf("read the pins: %w", err)
		}
		for _, p := range pins {
			path := filepath.Join(root, kind, p.Name())
			if h, _, ok := hookOf(p.Name()); ok && kind == "links" {
				if err := detachPin(path, h); err != nil {
					return removed, fmt.Errorf("detach %s: %w", p.Name(), err)
				}
			}
			if err := os.Remove(path); err != nil {
				return removed, fmt.Errorf("remove a pin: %w", err)
			}
			removed = append(removed, "pin "+path)
		}
		if err := os.Remove(filepath.Join(root, kind)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return removed, fmt.Errorf("remove the folder of pins: %w", err)
		}
	}
	if err := os.Remove(root); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return removed, fmt.Errorf("remove the folder of pins: %w", err)
	}
	return removed, nil
}

func detachPin(path string, h hook) error {
	l, err := link.LoadPinnedLink(path, nil)
	if err != nil {
		return err
	}
	defer l.Close()
	return detachLink(l, h)
}
