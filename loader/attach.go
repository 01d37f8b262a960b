// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// hook is a place where a program of ours can be: one per device and direction.
type hook struct {
	device  int
	ingress bool
}

// attachment is a program at a hook.
type attachment struct {
	device  string
	program string    // its name, which is also the pin's
	link    link.Link // nil where a clsact filter holds it
	pinned  bool
}

func (a attachment) close() error {
	if a.link == nil {
		return nil
	}
	return a.link.Close()
}

// pinName is PROGRAM_IFINDEX: names of devices may have dots, and a BPF file system refuses those.
func pinName(program string, device int) string { return program + "_" + strconv.Itoa(device) }

// Attached is a program at a device, for people.
type Attached struct {
	Device  string `json:"device"`
	Index   int    `json:"index"`
	Program string `json:"program"`
	Method  string `json:"method"` // tcx or clsact
}

// Attached lists what is attached, by device and program.
func (l *Loader) Attached() []Attached {
	var all []Attached
	for h, a := range l.hooks {
		method := "clsact"
		if a.link != nil {
			method = "tcx"
		}
		all = append(all, Attached{Device: a.device, Index: h.device, Program: a.program, Method: method})
	}
	slices.SortFunc(all, func(a, b Attached) int {
		return cmp.Or(cmp.Compare(a.Device, b.Device), cmp.Compare(a.Program, b.Program))
	})
	return all
}

// Set makes `devices` the ones that have our programs: it attaches to those that lack them, replaces
// programs that another process has left, and takes them from all other devices. What fails is in the
// error and is tried again by the next call; all else is done. A device that is gone is no error.
func (l *Loader) Set(devices []Device) error {
	wanted := map[hook]Device{}
	for _, d := range devices {
		wanted[hook{d.Index, true}] = d
		wanted[hook{d.Index, false}] = d
	}
	if err := l.adopt(); err != nil {
		return err
	}
	var errs []error
	// A reply must never be without its translation: egress comes before ingress, and goes after it.
	for _, ingress := range []bool{false, true} {
		for _, h := range sorted(wanted) {
			if h.ingress == ingress {
				errs = append(errs, l.attach(h, wanted[h]))
			}
		}
	}
	for _, ingress := range []bool{true, false} {
		for _, h := range sorted(l.hooks) {
			if _, keep := wanted[h]; !keep && h.ingress == ingress {
				errs = append(errs, l.detach(h))
			}
		}
	}
	return errors.Join(errs...)
}

func sorted[V any](m map[hook]V) []hook {
	hooks := make([]hook, 0, len(m))
	for h := range m {
		hooks = append(hooks, h)
	}
	slices.SortFunc(hooks, func(a, b hook) int { return cmp.Compare(a.device, b.device) })
	return hooks
}

// adopt opens the links that an earlier process has pinned, once, so that they are replaced or taken away
// as if they were ours. Pins whose device is gone are removed.
func (l *Loader) adopt() error {
	if !l.adopted {
		if err := l.adoptFilters(); err != nil {
			return err
		}
	}
	l.adopted = true
	if l.config.LinkDir == "" {
		return nil
	}
	if err := os.MkdirAll(l.config.LinkDir, 0o700); err != nil {
		return fmt.Errorf("make the folder of link pins: %w", err)
	}
	entries, err := os.ReadDir(l.config.LinkDir)
	if err != nil {
		return fmt.Errorf("read the folder of link pins: %w", err)
	}
	for _, e := range entries {
		h, program, ok := hookOf(e.Name())
		if !ok {
			continue
		}
		a, held := l.hooks[h]
		if held && a.program == program && a.link != nil && alive(a.link, h) {
			continue
		}
		path := filepath.Join(l.config.LinkDir, e.Name())
		pinned, err := link.LoadPinnedLink(path, nil)
		if err != nil {
			return fmt.Errorf("open pinned link %s: %w", e.Name(), err)
		}
		// Its device is gone, or a crash has left the program of another role or a filter beside this one.
		if !alive(pinned, h) || held && (a.link == nil || alive(a.link, h)) {
			if err := errors.Join(detachLink(pinned, h), pinned.Close(), os.Remove(path)); err != nil {
				return fmt.Errorf("remove the stale pin %s: %w", e.Name(), err)
			}
			continue
		}
		if held {
			a.close()
		}
		// Without a device's name, for attach to see that the program is another process's.
		l.hooks[h] = attachment{program: program, link: pinned, pinned: true}
	}
	return nil
}

// adoptFilters is adopt for clsact filters, which the kernel keeps without a pin.
func (l *Loader) adoptFilters() error {
	devices, err := netlink.LinkList()
	if err != nil {
		return fmt.Errorf("list devices: %w", err)
	}
	for _, d := range devices {
		err := eachFilter(d, func(f netlink.Filter, program string) error {
			if program != "" {
				l.hooks[hook{d.Attrs().Index, strings.HasSuffix(program, "_in")}] = attachment{program: program}
			}
			return nil
		})
		if err != nil {
			return fmt.Errorf("list filters of %s: %w", d.Attrs().Name, err)
		}
	}
	return nil
}

// hookOf returns the hook that a pin is for.
func hookOf(pin string) (h hook, program string, ok bool) {
	i := strings.LastIndexByte(pin, '_')
	if i < 0 {
		return h, "", false
	}
	device, err := strconv.Atoi(pin[i+1:])
	program = pin[:i]
	if err != nil || !strings.HasSuffix(program, "_in") && !strings.HasSuffix(program, "_out") {
		return h, "", false
	}
	return hook{device, strings.HasSuffix(program, "_in")}, program, true
}

// alive tells whether a link still holds a program at the device: the kernel cuts it when the device goes,
// and the index may be another's by now.
func alive(l link.Link, h hook) bool {
	info, err := l.Info()
	if err != nil || info.TCX() == nil {
		return false
	}
	return int(info.TCX().Ifindex) == h.device
}

func (l *Loader) attach(h hook, d Device) (err error) {
	a, held := l.hooks[h]
	name, program, err := l.program(h, d)
	if err != nil {
		return err
	}
	filter, err := l.wantsFilter(h)
	if err != nil {
		return fmt.Errorf("list filters of %s: %w", d.Name, err)
	}
	if held && a.link != nil && !alive(a.link, h) {
		l.drop(h, a)
		held = false
	}
	switch {
	case !held:
	case a.program != name || filter != (a.link == nil):
		// The device has another role than before, or its filters have changed. Ours first, then the old
		// one goes, so no packet is without a program; both at once are harmless, the second finds
		// nothing to do.
		defer func() {
			if err == nil {
				err = l.drop(h, a)
			}
		}()
		held = false
	case a.device != "" && !filter:
		return nil // ours, in place
		// A filter may have been taken away by others; setting it again is cheap and atomic.
	}

	next := attachment{device: d.Name, program: name}
	if filter {
		err = l.setFilter(h, name, program)
	} else if held && a.link != nil {
		err = a.link.Update(program) // the upgrade: one call, no packet is without a program
		next.link, next.pinned = a.link, a.pinned
	} else {
		next.link, next.pinned, err = l.attachTCX(h, name, program)
	}
	if errors.Is(err, unix.ENODEV) {
		return nil // went while we looked; whoever follows the devices will say so
	}
	if err != nil {
		return fmt.Errorf("attach %s to %s: %w", name, d.Name, err)
	}
	l.hooks[h] = next
	return nil
}

// wantsFilter tells whether a hook's program is to be a clsact filter: before 6.6, and at egress where others have
// filters, since tcx programs run before every filter, and the others are to see real addresses.
func (l *Loader) wantsFilter(h hook) (bool, error) {
	if l.clsact || h.ingress {
		return l.clsact, nil
	}
	dev, err := netlink.LinkByIndex(h.device)
	if err != nil {
		return false, ignoreGone(err)
	}
	others := false
	err = eachFilter(dev, func(f netlink.Filter, program string) error {
		others = others || program == "" && f.Attrs().Parent == netlink.HANDLE_MIN_EGRESS
		return nil
	})
	return others, err
}

func (l *Loader) program(h hook, d Device) (string, *ebpf.Program, error) {
	p, err := l.programs(d.LinkHeader)
	if err != nil {
		return "", nil, err
	}
	switch {
	case d.Role == Pod && h.ingress:
		return "pod_in", p.PodIn, nil
	case d.Role == Port && h.ingress:
		return "port_in", p.PortIn, nil
	case d.Role == Pod || d.Role == Port:
		return "pod_out", p.PodOut, nil
	case h.ingress:
		return "node_in", p.NodeIn, nil
	default:
		return "node_out", p.NodeOut, nil
	}
}

// attachTCX attaches first at ingress and last at egress: everyone else sees real addresses, as the stack.
func (l *Loader) attachTCX(h hook, name string, p *ebpf.Program) (link.Link, bool, error) {
	opts := link.TCXOptions{Interface: h.device, Program: p, Attach: ebpf.AttachTCXEgress, Anchor: link.Tail()}
	if h.ingress {
		opts.Attach, opts.Anchor = ebpf.AttachTCXIngress, link.Head()
	}
	tcx, err := link.AttachTCX(opts)
	if err != nil {
		return nil, false, err
	}
	if l.config.LinkDir == "" {
		return tcx, false, nil
	}
	// Between the two lines a crash detaches again, and the next start attaches anew.
	if err := tcx.Pin(filepath.Join(l.config.LinkDir, pinName(name, h.device))); err != nil {
		tcx.Close()
		return nil, false, fmt.Errorf("pin the link: %w", err)
	}
	return tcx, true, nil
}

func (l *Loader) detach(h hook) error {
	a := l.hooks[h]
	if err := l.drop(h, a); err != nil {
		return fmt.Errorf("detach %s from device %d: %w", a.program, h.device, err)
	}
	delete(l.hooks, h)
	return nil
}

// drop takes a program from its hook; that it is gone already is no error.
func (l *Loader) drop(h hook, a attachment) error {
	if a.link == nil {
		return removeFilters(h.device, func(program string) bool { return program == a.program })
	}
	errs := []error{detachLink(a.link, h)}
	if a.pinned {
		err := os.Remove(filepath.Join(l.config.LinkDir, pinName(a.program, h.device)))
		if !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(append(errs, a.link.Close())...)
}

// detachLink takes a link's program from its hook at once; without it the kernel would do so some time after
// the last pin and file descriptor are gone.
func detachLink(l link.Link, h hook) error {
	if !alive(l, h) {
		return nil
	}
	return l.Detach()
}

// Filters of ours are known by this prefix of their name.
const filterPrefix = "lbagent/"

func filterName(program string) string { return filterPrefix + program }

// setFilter attaches by a clsact filter, for kernels before 6.6, replacing what an earlier process left in
// one netlink call. The smallest preference is first at ingress, the largest is last at egress.
func (l *Loader) setFilter(h hook, name string, p *ebpf.Program) error {
	qdisc := &netlink.GenericQdisc{
		QdiscAttrs: netlink.QdiscAttrs{LinkIndex: h.device, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_CLSACT},
		QdiscType:  "clsact",
	}
	if err := netlink.QdiscAdd(qdisc); err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("add a clsact qdisc: %w", err)
	}
	attrs := netlink.FilterAttrs{LinkIndex: h.device, Parent: netlink.HANDLE_MIN_EGRESS, Handle: 1, Protocol: unix.ETH_P_ALL, Priority: 0xffff}
	if h.ingress {
		attrs.Parent, attrs.Priority = netlink.HANDLE_MIN_INGRESS, 1
	}
	filter := &netlink.BpfFilter{FilterAttrs: attrs, Fd: p.FD(), Name: filterName(name), DirectAction: true}
	if err := netlink.FilterReplace(filter); err != nil {
		return fmt.Errorf("set a clsact filter: %w", err)
	}
	return nil
}

// eachFilter calls f for every filter of a device's clsact hooks, with the name of our program it holds, or
// "" where it is another's.
func eachFilter(dev netlink.Link, f func(filter netlink.Filter, program string) error) error {
	for _, parent := range []uint32{netlink.HANDLE_MIN_INGRESS, netlink.HANDLE_MIN_EGRESS} {
		filters, err := netlink.FilterList(dev, parent)
		if err != nil {
			return ignoreGone(err)
		}
		for _, filter := range filters {
			program := ""
			if bpf, ok := filter.(*netlink.BpfFilter); ok && strings.HasPrefix(bpf.Name, filterPrefix) {
				program = strings.TrimPrefix(bpf.Name, filterPrefix)
			}
			if err := f(filter, program); err != nil {
				return err
			}
		}
	}
	return nil
}

// removeFilters removes the filters of those programs of ours that fit from a device, and the clsact qdisc if
// that leaves it empty. A device without them, or one that is gone, is no error.
func removeFilters(device int, fits func(program string) bool) error {
	dev, err := netlink.LinkByIndex(device)
	if err != nil {
		return ignoreGone(err)
	}
	left := 0
	err = eachFilter(dev, func(f netlink.Filter, program string) error {
		if program == "" || !fits(program) {
			left++
			return nil
		}
		return netlink.FilterDel(f)
	})
	if err != nil || left > 0 {
		return ignoreGone(err)
	}
	qdiscs, err := netlink.QdiscList(dev)
	if err != nil {
		return ignoreGone(err)
	}
	for _, q := range qdiscs {
		if q.Type() == "clsact" {
			return ignoreGone(netlink.QdiscDel(q))
		}
	}
	return nil
}

// ignoreGone is nil for the errors that say that a device, or what hung on it, is not there.
func ignoreGone(err error) error {
	var notFound netlink.LinkNotFoundError
	if errors.As(err, &notFound) || errors.Is(err, unix.ENODEV) || errors.Is(err, unix.ENOENT) {
		return nil
	}
	return err
}
