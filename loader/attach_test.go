// SPDX-License-Identifier: Apache-2.0

package loader_test

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/lbagent/lbagent/internal/testenv"
	"github.com/lbagent/lbagent/lb"
	"github.com/lbagent/lbagent/loader"
	"github.com/lbagent/lbagent/maps"
)

// host is a network namespace with two veth devices, and a folder for pins.
type host struct {
	t    *testing.T
	ns   *testenv.Namespace
	root string
	maps *maps.Maps
}

func newHost(t *testing.T) *host {
	t.Helper()
	testenv.RequireRoot(t)
	ns, err := testenv.NewNamespace("host")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ns.Close() })
	fs := t.TempDir()
	if err := unix.Mount("bpf", fs, "bpf", 0, ""); err != nil {
		t.Fatal("mount bpffs:", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(fs, 0); err != nil {
			t.Error("unmount bpffs:", err)
		}
	})
	h := &host{t: t, ns: ns, root: filepath.Join(fs, "lbagent")}
	h.maps, err = maps.Open(filepath.Join(h.root, "maps"), maps.Sizes{Frontends: 64, Services: 16, Slots: 1024, Backends: 256, Flows: 1024})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { h.maps.Close() })
	h.do(func() error { return addVeth("up0", 10) })
	return h
}

func addVeth(name string, index int) error {
	return netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: name, Index: index}, PeerName: name + "peer"})
}

func (h *host) do(f func() error) {
	h.t.Helper()
	if err := h.ns.Do(f); err != nil {
		h.t.Fatal(err)
	}
}

// load returns what an agent that has just started has.
func (h *host) load(clsact bool) *loader.Loader {
	h.t.Helper()
	var l *loader.Loader
	h.do(func() (err error) {
		l, err = loader.Load(h.maps, loader.Config{LinkDir: filepath.Join(h.root, "links"), Clsact: clsact})
		return err
	})
	h.t.Cleanup(func() { l.Close() })
	return l
}

// tcxPrograms returns what tcx links hold at a device: nothing, where the kernel has no tcx.
func tcxPrograms(device int, at ebpf.AttachType) ([]link.AttachedProgram, error) {
	f, err := loader.Probe()
	if err != nil || !f.TCX {
		return nil, err
	}
	result, err := link.QueryPrograms(link.QueryOptions{Target: device, Attach: at})
	if err != nil {
		return nil, err
	}
	return result.Programs, nil
}

// attached returns what the kernel has at a device, as "ingress NAME" and "egress NAME", in order.
func (h *host) attached(device int) []string {
	h.t.Helper()
	var all []string
	h.do(func() error {
		for _, at := range []ebpf.AttachType{ebpf.AttachTCXIngress, ebpf.AttachTCXEgress} {
			direction := map[ebpf.AttachType]string{ebpf.AttachTCXIngress: "ingress", ebpf.AttachTCXEgress: "egress"}[at]
			programs, err := tcxPrograms(device, at)
			if err != nil {
				return err
			}
			for _, p := range programs {
				program, err := ebpf.NewProgramFromID(p.ID)
				if err != nil {
					return err
				}
				info, err := program.Info()
				program.Close()
				if err != nil {
					return err
				}
				all = append(all, direction+" "+info.Name)
			}
		}
		dev, err := netlink.LinkByIndex(device)
		if err != nil {
			return err
		}
		for _, parent := range []uint32{netlink.HANDLE_MIN_INGRESS, netlink.HANDLE_MIN_EGRESS} {
			direction := map[uint32]string{netlink.HANDLE_MIN_INGRESS: "ingress", netlink.HANDLE_MIN_EGRESS: "egress"}[parent]
			filters, err := netlink.FilterList(dev, parent)
			if err != nil {
				return err
			}
			for _, f := range filters {
				all = append(all, direction+" "+f.(*netlink.BpfFilter).Name)
			}
		}
		return nil
	})
	return all
}

func (h *host) expect(device int, want ...string) {
	h.t.Helper()
	if got := h.attached(device); !slices.Equal(got, want) {
		h.t.Errorf("device %d has %q, want %q", device, got, want)
	}
}

func (h *host) pins() []string {
	h.t.Helper()
	entries, err := os.ReadDir(filepath.Join(h.root, "links"))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		h.t.Fatal(err)
	}
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

func (h *host) set(l *loader.Loader, devices ...loader.Device) {
	h.t.Helper()
	h.do(func() error { return l.Set(devices) })
}

var (
	up0     = loader.Device{Index: 10, Name: "up0", Role: loader.Node, LinkHeader: 14}
	up0Pod  = loader.Device{Index: 10, Name: "up0", Role: loader.Pod, LinkHeader: 14}
	up0Port = loader.Device{Index: 10, Name: "up0", Role: loader.Port, LinkHeader: 14}
)

func requireTCX(t *testing.T) {
	t.Helper()
	testenv.RequireRoot(t)
	if f, err := loader.Probe(); err != nil {
		t.Fatal(err)
	} else if !f.TCX {
		t.Skip("this kernel has no tcx")
	}
}

// methods runs a test with tcx links and with clsact filters. `name` is how the kernel shows a program then.
func methods(t *testing.T, test func(t *testing.T, clsact bool, name func(string) string)) {
	t.Run("tcx", func(t *testing.T) {
		requireTCX(t)
		test(t, false, func(s string) string { return s })
	})
	t.Run("clsact", func(t *testing.T) {
		test(t, true, func(s string) string { return "lbagent/" + s })
	})
}

func TestAttach(t *testing.T) {
	methods(t, func(t *testing.T, clsact bool, name func(string) string) {
		h := newHost(t)
		l := h.load(clsact)
		h.set(l, up0)
		h.expect(10, "ingress "+name("node_in"), "egress "+name("node_out"))
		h.set(l, up0) // once more is nothing
		h.expect(10, "ingress "+name("node_in"), "egress "+name("node_out"))
		method := map[bool]string{false: "tcx", true: "clsact"}[clsact]
		want := []loader.Attached{
			{Device: "up0", Index: 10, Program: "node_in", Method: method},
			{Device: "up0", Index: 10, Program: "node_out", Method: method},
		}
		if got := l.Attached(); !slices.Equal(got, want) {
			t.Errorf("Attached: %v, want %v", got, want)
		}

		// The agent dies: nothing changes. The next one takes over what is there.
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
		h.expect(10, "ingress "+name("node_in"), "egress "+name("node_out"))
		old := h.programIDs(10)
		l = h.load(clsact)
		h.set(l, up0)
		h.expect(10, "ingress "+name("node_in"), "egress "+name("node_out"))
		for _, id := range h.programIDs(10) {
			if slices.Contains(old, id) {
				t.Errorf("program %d of the agent that died is still attached", id)
			}
		}

		// Another role, by an agent that never saw the device in the old one.
		l.Close()
		l = h.load(clsact)
		h.set(l, up0Pod)
		h.expect(10, "ingress "+name("pod_in"), "egress "+name("pod_out"))

		// The pod's device becomes a port of a bridge.
		h.set(l, up0Port)
		h.expect(10, "ingress "+name("port_in"), "egress "+name("pod_out"))

		// No longer wanted, by an agent that did not attach it.
		l.Close()
		l = h.load(clsact)
		h.set(l)
		h.expect(10)
		if pins := h.pins(); len(pins) != 0 {
			t.Errorf("pins are left: %v", pins)
		}
	})
}

// programIDs returns the ids of the programs at a device, by either method.
func (h *host) programIDs(device int) []int {
	h.t.Helper()
	var ids []int
	h.do(func() error {
		for _, at := range []ebpf.AttachType{ebpf.AttachTCXIngress, ebpf.AttachTCXEgress} {
			programs, err := tcxPrograms(device, at)
			if err != nil {
				return err
			}
			for _, p := range programs {
				ids = append(ids, int(p.ID))
			}
		}
		dev, err := netlink.LinkByIndex(device)
		if err != nil {
			return err
		}
		for _, parent := range []uint32{netlink.HANDLE_MIN_INGRESS, netlink.HANDLE_MIN_EGRESS} {
			filters, err := netlink.FilterList(dev, parent)
			if err != nil {
				return err
			}
			for _, f := range filters {
				ids = append(ids, f.(*netlink.BpfFilter).Id)
			}
		}
		return nil
	})
	return ids
}

// TestMethod: tcx links where the kernel has them, clsact filters where it has not; no one has to choose.
func TestMethod(t *testing.T) {
	h := newHost(t)
	l := h.load(false)
	h.set(l, up0)
	want, program := "clsact", "lbagent/node_in"
	if l.Features().TCX {
		want, program = "tcx", "node_in"
	}
	for _, a := range l.Attached() {
		if a.Method != want {
			t.Errorf("%s is attached by %s, want %s", a.Program, a.Method, want)
		}
	}
	if all := h.attached(up0.Index); len(all) != 2 || all[0] != "ingress "+program {
		t.Errorf("the kernel has %q, want %s and its like", all, program)
	}
	t.Logf("attached by %s", want)
}

// A device goes and another comes with its index, while the agent runs and while it does not.
func TestDeviceReplaced(t *testing.T) {
	methods(t, func(t *testing.T, clsact bool, name func(string) string) {
		h := newHost(t)
		l := h.load(clsact)
		h.set(l, up0)
		replace := func() {
			h.do(func() error {
				dev, err := netlink.LinkByIndex(10)
				if err != nil {
					return err
				}
				return errors.Join(netlink.LinkDel(dev), addVeth("up0", 10))
			})
			h.expect(10)
		}
		replace()
		h.set(l, up0)
		h.expect(10, "ingress "+name("node_in"), "egress "+name("node_out"))
		l.Close()
		replace()
		l = h.load(clsact)
		h.set(l, up0)
		h.expect(10, "ingress "+name("node_in"), "egress "+name("node_out"))

		// A device that is gone is no error, and leaves no pin.
		h.do(func() error {
			dev, err := netlink.LinkByIndex(10)
			if err != nil {
				return err
			}
			return netlink.LinkDel(dev)
		})
		h.set(l, up0)
		h.set(l)
		if pins := h.pins(); len(pins) != 0 {
			t.Errorf("pins are left: %v", pins)
		}
	})
}

// otherProgram is a program of somebody else's, which passes every packet on.
func otherProgram(t *testing.T) *ebpf.Program {
	t.Helper()
	p, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Name: "other", Type: ebpf.SchedCLS, License: "GPL",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, -1), asm.Return()},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Close() })
	return p
}

// Ours is first at ingress and last at egress, and cleanup leaves others' programs alone.
func TestOthers(t *testing.T) {
	requireTCX(t)
	h := newHost(t)
	other := otherProgram(t)
	var links []link.Link
	attach := func() {
		h.do(func() error {
			for _, at := range []ebpf.AttachType{ebpf.AttachTCXIngress, ebpf.AttachTCXEgress} {
				l, err := link.AttachTCX(link.TCXOptions{Interface: 10, Program: other, Attach: at})
				if err != nil {
					return err
				}
				links = append(links, l)
			}
			return nil
		})
	}
	attach()
	defer func() {
		for _, l := range links {
			l.Close()
		}
	}()
	l := h.load(false)
	h.set(l, up0)
	h.expect(10, "ingress node_in", "ingress other", "egress other", "egress node_out")
	l.Close()
	h.maps.Close()
	h.do(func() error {
		_, err := loader.Cleanup(h.root)
		return err
	})
	h.expect(10, "ingress other", "egress other")
}

// TestOthersFilters: tcx programs run before every clsact filter, so where others have filters at egress ours is the
// last of those, for as long as they are there, over a restart too.
func TestOthersFilters(t *testing.T) {
	requireTCX(t)
	h := newHost(t)
	other := otherProgram(t)
	filter := &netlink.BpfFilter{
		FilterAttrs: netlink.FilterAttrs{LinkIndex: 10, Parent: netlink.HANDLE_MIN_EGRESS, Handle: 1, Protocol: unix.ETH_P_ALL, Priority: 49152},
		Fd:          other.FD(), Name: "other", DirectAction: true,
	}
	qdisc := &netlink.GenericQdisc{
		QdiscAttrs: netlink.QdiscAttrs{LinkIndex: 10, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_CLSACT}, QdiscType: "clsact",
	}
	add := func() {
		h.do(func() error { return errors.Join(netlink.QdiscReplace(qdisc), netlink.FilterReplace(filter)) })
	}
	alone := []string{"ingress node_in", "egress node_out"}
	beside := []string{"ingress node_in", "egress other", "egress lbagent/node_out"}
	l := h.load(false)
	h.set(l, up0)
	h.expect(10, alone...)
	add()
	h.set(l, up0)
	h.expect(10, beside...)
	if pins := h.pins(); !slices.Equal(pins, []string{"node_in_10"}) {
		t.Errorf("pins %v", pins)
	}
	h.set(l, up0)
	h.expect(10, beside...)
	l.Close()
	l = h.load(false)
	h.set(l, up0)
	h.expect(10, beside...)
	h.do(func() error { return netlink.FilterDel(filter) })
	h.set(l, up0)
	h.expect(10, alone...)

	// Gone while no agent ran.
	add()
	h.set(l, up0)
	l.Close()
	h.do(func() error { return netlink.FilterDel(filter) })
	l = h.load(false)
	h.set(l, up0)
	h.expect(10, alone...)

	add()
	h.set(l, up0)
	h.set(l)
	h.expect(10, "egress other")
}

func TestCleanup(t *testing.T) {
	methods(t, func(t *testing.T, clsact bool, name func(string) string) {
		h := newHost(t)
		l := h.load(clsact)
		h.set(l, up0)
		var removed []string
		cleanup := func() error {
			return h.ns.Do(func() (err error) {
				removed, err = loader.Cleanup(h.root)
				return err
			})
		}
		if err := cleanup(); !errors.Is(err, maps.ErrInUse) {
			t.Errorf("cleanup beside a running agent: %v, want ErrInUse", err)
		}
		h.expect(10, "ingress "+name("node_in"), "egress "+name("node_out"))
		l.Close()
		h.maps.Close()
		if err := cleanup(); err != nil {
			t.Fatal(err)
		}
		h.expect(10)
		want := []string{"node_in", "node_out", "frontends", "flows", "record"}
		for _, w := range want {
			if !slices.ContainsFunc(removed, func(s string) bool { return strings.Contains(s, w) }) {
				t.Errorf("cleanup did not name %s: %q", w, removed)
			}
		}
		if _, err := os.Stat(h.root); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s is left: %v", h.root, err)
		}
		if err := cleanup(); err != nil || len(removed) != 0 {
			t.Errorf("a second cleanup: %v, %q", err, removed)
		}
		if clsact {
			h.do(func() error {
				dev, err := netlink.LinkByIndex(10)
				if err != nil {
					return err
				}
				qdiscs, err := netlink.QdiscList(dev)
				for _, q := range qdiscs {
					if q.Type() == "clsact" {
						t.Error("the clsact qdisc is left")
					}
				}
				return err
			})
		}
	})
}

func TestMountBPF(t *testing.T) {
	testenv.RequireRoot(t)
	root := filepath.Join(t.TempDir(), "bpf", "lbagent")
	for range 2 { // the second time it is there
		if err := loader.MountBPF(root); err != nil {
			t.Fatal(err)
		}
	}
	if err := unix.Unmount(filepath.Dir(root), 0); err != nil {
		t.Fatal(err)
	}
	if err := unix.Unmount(filepath.Dir(root), 0); err == nil {
		t.Error("it was mounted twice")
	}
}

// TestNoLinkHeader: packets of a device whose frames begin with the IP header, through the real stack.
func TestNoLinkHeader(t *testing.T) {
	for _, f := range families {
		methods(t, func(t *testing.T, clsact bool, _ func(string) string) {
			h := newHost(t)
			r := &rig{t: t, maps: h.maps}
			// The backend is a socket of the node itself.
			r.backend(1, 1, f.backend, maps.BackendActive, 1)
			r.slots(1, 1)
			r.frontend(f.vip, 1)
			tun := &netlink.Tuntap{
				LinkAttrs: netlink.LinkAttrs{Name: "tun0"}, Mode: netlink.TUNTAP_MODE_TUN, NonPersist: true,
				Flags: netlink.TUNTAP_NO_PI | netlink.TUNTAP_ONE_QUEUE, Queues: 1,
			}
			h.do(func() error {
				if err := netlink.LinkAdd(tun); err != nil {
					return fmt.Errorf("make a tun device: %w", err)
				}
				address := netlink.NewIPNet(f.backend.Addr().AsSlice())
				if err := netlink.AddrAdd(tun, &netlink.Addr{IPNet: address, Flags: unix.IFA_F_NODAD}); err != nil {
					return err
				}
				if err := netlink.LinkSetUp(tun); err != nil {
					return err
				}
				return netlink.RouteAdd(&netlink.Route{LinkIndex: tun.Index, Dst: netlink.NewIPNet(f.client.Addr().AsSlice())})
			})
			wire := tun.Fds[0]
			defer wire.Close()
			l := h.load(clsact)
			h.set(l, loader.Device{Index: tun.Index, Name: "tun0", Role: loader.Node, LinkHeader: 0})
			socket, err := h.ns.ListenPacket(t.Context(), "udp", f.backend.String())
			if err != nil {
				t.Fatal(err)
			}
			defer socket.Close()

			frame := testenv.DatagramUDP(f.client, f.vip, "ping").Bytes()
			if _, err := wire.Write(frame[14:]); err != nil {
				t.Fatal(err)
			}
			buffer := make([]byte, 2048)
			socket.SetDeadline(time.Now().Add(30 * time.Second))
			n, from, err := socket.ReadFrom(buffer)
			if err != nil {
				t.Fatal(err)
			}
			if string(buffer[:n]) != "ping" || netip.MustParseAddrPort(from.String()) != f.client {
				t.Errorf("the backend got %q from %s", buffer[:n], from)
			}
			if _, err := socket.WriteTo([]byte("pong"), from); err != nil {
				t.Fatal(err)
			}
			for {
				wire.SetReadDeadline(time.Now().Add(30 * time.Second))
				n, err := wire.Read(buffer)
				if err != nil {
					t.Fatal(err)
				}
				reply, err := testenv.Parse(append(slices.Clone(frame[:14]), buffer[:n]...))
				if err != nil || reply.Protocol != testenv.UDP {
					continue // the kernel's own talk
				}
				if reply.Source != f.vip || reply.Destination != f.client || string(reply.Payload) != "pong" {
					t.Errorf("the client gets %s > %s %q", reply.Source, reply.Destination, reply.Payload)
				}
				if err := testenv.CheckSums(append(slices.Clone(frame[:14]), buffer[:n]...)); err != nil {
					t.Error(err)
				}
				break
			}
			if flow, in := r.flow(f.backend, f.client, lb.UDP); in == "" || flow.Packets != 1 {
				t.Errorf("the reply half is %v", flow)
			}
		})
	}
}
