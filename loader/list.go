// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
)

// List returns what is attached to the devices of this network namespace, by device and program, as
// Loader.Attached does, but from what the kernel holds: also where no agent is running. It changes nothing.
func List(linkDir string) ([]Attached, error) {
	all := []Attached{}
	pins, err := os.ReadDir(linkDir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("read the folder of link pins: %w", err)
	}
	for _, p := range pins {
		h, program, ok := hookOf(p.Name())
		if !ok {
			continue
		}
		pinned, err := link.LoadPinnedLink(filepath.Join(linkDir, p.Name()), nil)
		if errors.Is(err, fs.ErrNotExist) {
			continue // a running agent has just removed it
		}
		if err != nil {
			return nil, fmt.Errorf("open pinned link %s: %w", p.Name(), err)
		}
		attached := alive(pinned, h)
		pinned.Close()
		device, err := net.InterfaceByIndex(h.device)
		if attached && err == nil {
			all = append(all, Attached{Device: device.Name, Index: h.device, Program: program, Method: "tcx"})
		}
	}
	devices, err := netlink.LinkList()
	if err != nil {
		return nil, fmt.Errorf("list devices: %w", err)
	}
	for _, d := range devices {
		err := eachFilter(d, func(_ netlink.Filter, program string) error {
			if program != "" {
				all = append(all, Attached{d.Attrs().Name, d.Attrs().Index, program, "clsact"})
			}
			return nil
		})
		if err != nil {
			return nil, fmt.Errorf("list filters of %s: %w", d.Attrs().Name, err)
		}
	}
	slices.SortFunc(all, func(a, b Attached) int {
		return cmp.Or(strings.Compare(a.Device, b.Device), strings.Compare(a.Program, b.Program))
	})
	return all, nil
}
