// SPDX-License-Identifier: Apache-2.0

package maps

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
	"golang.org/x/sys/unix"

	"github.com/lbagent/lbagent/lb"
)

var small = Sizes{Frontends: 64, Services: 16, Slots: 128, Backends: 32, Flows: 256}

func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: makes BPF maps")
	}
}

// pinDir returns a folder on a BPF file system of the test's own.
func pinDir(t *testing.T) string {
	t.Helper()
	needRoot(t)
	fs := t.TempDir()
	if err := unix.Mount("bpf", fs, "bpf", 0, ""); err != nil {
		t.Fatal("mount bpffs:", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(fs, 0); err != nil {
			t.Error("unmount bpffs:", err)
		}
	})
	return filepath.Join(fs, "maps")
}

// A hole in a key is garbage in a hash; padding in a value is an unnamed field.
func TestLayoutsHaveNoHoles(t *testing.T) {
	spec, err := loadBpf()
	if err != nil {
		t.Fatal(err)
	}
	for name, m := range spec.Maps {
		for what, typ := range map[string]btf.Type{"key": m.Key, "value": m.Value} {
			if err := holes(typ); err != nil {
				t.Errorf("%s of map %s: %v", what, name, err)
			}
		}
	}
}

// holes returns an error that names the first gap between the members of a type, or behind the last one.
func holes(typ btf.Type) error {
	switch typ := btf.UnderlyingType(typ).(type) {
	case *btf.Struct:
		var end uint32
		for _, m := range typ.Members {
			if m.Offset.Bytes() != end {
				return fmt.Errorf("%s: a hole of %d bytes before %s", typ.Name, m.Offset.Bytes()-end, m.Name)
			}
			size, err := btf.Sizeof(m.Type)
			if err != nil {
				return err
			}
			end += uint32(size)
			if err := holes(m.Type); err != nil {
				return err
			}
		}
		if end != typ.Size {
			return fmt.Errorf("%s: %d bytes of padding at the end", typ.Name, typ.Size-end)
		}
	case *btf.Array:
		return holes(typ.Type)
	}
	return nil
}

func TestHolesAreFound(t *testing.T) {
	u8, u64 := &btf.Int{Size: 1}, &btf.Int{Size: 8}
	for _, s := range []*btf.Struct{
		{Name: "hole", Size: 16, Members: []btf.Member{{Name: "a", Type: u8}, {Name: "b", Type: u64, Offset: 64}}},
		{Name: "tail", Size: 16, Members: []btf.Member{{Name: "a", Type: u64}, {Name: "b", Type: u8, Offset: 64}}},
	} {
		if holes(s) == nil {
			t.Errorf("%s was not found", s.Name)
		}
	}
}

func TestConstantsMatchTypes(t *testing.T) {
	for _, k := range []lb.Kind{lb.ClusterIP, lb.NodePort, lb.LoadBalancer, lb.External, lb.HostPort, lb.Identity, lb.Address} {
		names := map[lb.Kind]string{
			lb.ClusterIP: "cluster_ip", lb.NodePort: "node_port", lb.LoadBalancer: "load_balancer",
			lb.External: "external", lb.HostPort: "host_port", lb.Identity: "identity", lb.Address: "address",
		}
		if got := EnumName("frontend_kind", uint64(k)); got != names[k] {
			t.Errorf("lb.Kind %s is %q in C", k, got)
		}
	}
	for p, name := range map[lb.Protocol]string{lb.TCP: "tcp", lb.UDP: "udp", lb.SCTP: "sctp"} {
		if got := EnumName("protocol", uint64(p)); got != name {
			t.Errorf("lb.Protocol %s is %q in C", p, got)
		}
	}
	if got := EnumName("reason", 1<<20); got != "1048576" {
		t.Errorf("a value without a name is %q", got)
	}
	header, err := os.ReadFile("../bpf/types.h")
	if err != nil {
		t.Fatal(err)
	}
	var inC int
	for line := range strings.Lines(string(header)) {
		fmt.Sscanf(line, "#define LAYOUT_VERSION %d", &inC)
	}
	if inC != LayoutVersion {
		t.Errorf("LAYOUT_VERSION is %d in C, %d in Go", inC, LayoutVersion)
	}
}

func TestOpenAdopts(t *testing.T) {
	dir := pinDir(t)
	m, err := Open(dir, small)
	if err != nil {
		t.Fatal(err)
	}
	key, err := m.HashKey()
	if err != nil {
		t.Fatal(err)
	}
	if key == [2]uint64{} {
		t.Error("the hash key is 0")
	}
	vip := lb.VIP{Addr: netip.MustParseAddr("10.96.0.1"), Port: 80, Protocol: lb.TCP}
	name := lb.ServiceName{Namespace: "default", Name: "web", Port: "http", Protocol: lb.TCP, Family: lb.IPv4}
	inMap, err := NameOf(name)
	if err != nil {
		t.Fatal(err)
	}
	backend := Backend{Address: netip.MustParseAddr("10.244.0.5").As16(), Service: 3,
		Life: BackendLife{Generation: 7, State: BackendActive, Port: 8080}}
	must(t, m.SetBackend(9, backend), m.SetSlots(5, []uint32{9, 9}), m.SetServiceName(3, inMap),
		m.SetServiceCluster(3, SlotRange{First: 5, Count: 2}), m.SetFrontend(KeyOf(vip), FrontendOf(3, lb.ClusterIP)))

	if _, err := Open(dir, small); !errors.Is(err, ErrInUse) {
		t.Errorf("a second Open: %v, want ErrInUse", err)
	}
	must(t, m.Close())
	if _, err := Open(dir, Sizes{Frontends: 65, Services: 16, Slots: 128, Backends: 32, Flows: 256}); !errors.Is(err, ErrSize) {
		t.Errorf("Open with another size: %v, want ErrSize", err)
	}

	for _, open := range []func() (*Maps, error){
		func() (*Maps, error) { return Open(dir, small) },
		func() (*Maps, error) { return Read(dir) },
	} {
		m, err := open()
		if err != nil {
			t.Fatal(err)
		}
		if got, _ := m.HashKey(); got != key {
			t.Error("the hash key changed")
		}
		if got := m.Backend(9); got != backend {
			t.Errorf("backend 9 is %v", got)
		}
		if got := m.Slots(m.Service(3).Cluster); fmt.Sprint(got) != "[9 9]" {
			t.Errorf("slots of service 3 are %v", got)
		}
		must(t, m.EachServiceName(func(id uint32, n ServiceName) bool {
			if id != 3 || n.LB() != name {
				t.Errorf("service %d is %s", id, n.LB())
			}
			return true
		}))
		found := 0
		must(t, m.EachFrontend(func(k FrontendKey, f Frontend) bool {
			if found++; k.VIP() != vip || f.Service != 3 || f.Kind != bpfFrontendKind(lb.ClusterIP) || f.KeyTag != k.Tag() {
				t.Errorf("frontend %s is %v", k.VIP(), f)
			}
			return true
		}))
		if found != 1 {
			t.Errorf("%d frontends", found)
		}
		must(t, m.Close())
	}
}

func TestOtherLayout(t *testing.T) {
	dir := pinDir(t)
	m, err := Open(dir, small)
	if err != nil {
		t.Fatal(err)
	}
	must(t, m.bpf.Record.Put(uint32(0), bpfRecord{Layout: LayoutVersion + 1}), m.Close())
	if _, err := Open(dir, small); !errors.Is(err, ErrLayout) {
		t.Errorf("Open: %v, want ErrLayout", err)
	}
	if _, err := Read(dir); !errors.Is(err, ErrLayout) {
		t.Errorf("Read: %v, want ErrLayout", err)
	}
}

func TestReadWithoutPins(t *testing.T) {
	if _, err := Read(pinDir(t)); !errors.Is(err, ErrNotPinned) {
		t.Errorf("Read: %v, want ErrNotPinned", err)
	}
}

// A crash between two pins leaves some maps; the next Open makes the rest.
func TestOpenCompletes(t *testing.T) {
	dir := pinDir(t)
	m, err := Open(dir, small)
	if err != nil {
		t.Fatal(err)
	}
	must(t, m.bpf.Slots.Unpin())
	if _, err := Read(dir); !errors.Is(err, ErrNotPinned) {
		t.Errorf("Read of some maps: %v, want ErrNotPinned", err)
	}
	must(t, m.bpf.Record.Unpin(), m.Close())
	if m, err = Open(dir, small); err != nil {
		t.Fatal(err)
	}
	must(t, m.Close())
}

func TestFault(t *testing.T) {
	needRoot(t)
	m, err := New(small)
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	broken := errors.New("broken")
	m.Fault = func(string) error { return broken }
	for what, err := range map[string]error{
		"frontend": m.SetFrontend(FrontendKey{}, Frontend{}), "delete": m.DeleteFrontend(FrontendKey{}),
		"name": m.SetServiceName(1, ServiceName{}), "no name": m.DeleteServiceName(1),
		"service": m.SetServiceCluster(1, SlotRange{}), "slots": m.SetSlots(1, []uint32{1}),
		"backend": m.SetBackend(1, Backend{}), "life": m.SetBackendLife(1, BackendLife{}),
	} {
		if !errors.Is(err, broken) {
			t.Errorf("%s: %v, want the injected fault", what, err)
		}
	}
	m.Fault = nil
	must(t, m.DeleteFrontend(FrontendKey{}), m.DeleteServiceName(1)) // of the missing
}

func TestEachReadsAll(t *testing.T) {
	needRoot(t)
	m, err := New(Sizes{Frontends: 5000, Services: 16, Slots: 128, Backends: 32, Flows: 256})
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	want := map[FrontendKey]Frontend{}
	for i := range 4000 {
		k := FrontendKey{Port: uint16(i), Protocol: 6}
		want[k] = Frontend{Service: uint32(i), KeyTag: k.Tag()}
		must(t, m.SetFrontend(k, want[k]))
	}
	must(t, m.EachFrontend(func(k FrontendKey, f Frontend) bool {
		if want[k] != f {
			t.Errorf("frontend %v is %v", k, f)
		}
		delete(want, k)
		return true
	}))
	if len(want) != 0 {
		t.Errorf("%d frontends were not read", len(want))
	}
}

// TestFlowsFor: the flow table grows with the memory, and never so that a restart meets another size.
func TestFlowsFor(t *testing.T) {
	for memory, want := range map[uint64]uint32{
		0: 16384, 1 << 30: 16384, 2 << 30: 16384, 4 << 30: 32768, 16 << 30: 131072, 24 << 30: 262144, 24<<30 - 1<<28: 262144,
		1 << 40: 4194304, 1 << 45: 4194304,
	} {
		if got := flowsFor(memory); got != want {
			t.Errorf("%d MiB: %d entries, want %d", memory>>20, got, want)
		}
	}
	dir := pinDir(t)
	m, err := Open(dir, small)
	must(t, err)
	must(t, m.Close())
	sizes := small
	sizes.Flows = 0
	m, err = Open(dir, sizes)
	must(t, err)
	if got := m.Sizes().Flows; got != small.Flows {
		t.Errorf("%d entries, %d are pinned", got, small.Flows)
	}
	must(t, m.Close())
}

func TestGrace(t *testing.T) {
	must(t, Grace())
}

func TestAllNamesMaps(t *testing.T) {
	spec, err := loadBpf()
	if err != nil {
		t.Fatal(err)
	}
	m := &Maps{}
	for name := range spec.Maps {
		if _, ok := m.All()[name]; !ok && spec.Maps[name].Type != ebpf.UnspecifiedMap && name[0] != '.' {
			t.Errorf("All lacks map %s", name)
		}
	}
}

func must(t *testing.T, errs ...error) {
	t.Helper()
	for _, err := range errs {
		if err != nil {
			t.Fatal(err)
		}
	}
}

func TestDefaultSizes(t *testing.T) {
	needRoot(t)
	m, err := New(Sizes{})
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	if got, want := DefaultSizes(), m.Sizes(); got != want {
		t.Errorf("DefaultSizes() = %+v, the maps are of %+v", got, want)
	}
}

// TestDumpIsReadable: what bpftool prints of each pinned map says what it is, ports as people write them.
func TestDumpIsReadable(t *testing.T) {
	if _, err := exec.LookPath("bpftool"); err != nil {
		t.Skip("bpftool is not installed")
	}
	dir := pinDir(t)
	m, err := Open(dir, small)
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	name, err := NameOf(lb.ServiceName{Namespace: "default", Name: "web", Port: "http", Protocol: lb.TCP, Family: lb.IPv4})
	must(t, err)
	vip := lb.VIP{Addr: netip.MustParseAddr("10.96.0.10"), Port: 80, Protocol: lb.TCP}
	must(t, m.SetServiceName(1, name), m.SetFrontend(KeyOf(vip), FrontendOf(1, lb.ClusterIP)),
		m.SetBackend(2, Backend{Address: netip.MustParseAddr("10.244.1.5").As16(), Service: 1,
			Life: BackendLife{Generation: 3, State: BackendActive, Port: 8080}}),
		m.SetSlots(1, []uint32{2}), m.SetServiceCluster(1, SlotRange{First: 1, Count: 1}),
		m.bpf.Flows.Put(Tuple{SourcePort: 40000, DestinationPort: 80, Protocol: 6}, Flow{Hook: 1, Role: 1}))
	for name, want := range map[string][]string{
		"frontends":     {`"address": [0,0,0,0,0,0,0,0,0,0,255,255,10,96,0,10`, `"port": 80`, `"protocol": "PROTOCOL_TCP"`, `"kind": "KIND_CLUSTER_IP"`, `"service": 1`},
		"services":      {`"cluster": {`, `"first": 1`, `"count": 1`},
		"service_names": {`"namespace": "default"`, `"name": "web"`, `"port": "http"`, `"family": 4`},
		"slots":         {`"key": 1,`, `"value": 2`},
		"backends":      {`"generation": 3`, `"state": "BACKEND_ACTIVE"`, `"port": 8080`},
		"flows":         {`"source_port": 40000`, `"destination_port": 80`, `"hook": "AT_INGRESS"`, `"role": "ROLE_FORWARD"`},
		"reasons":       {`"cpu": 0`},
		"record":        {`"layout": `, `"hash_key": [`},
	} {
		out, err := exec.Command("bpftool", "map", "dump", "pinned", filepath.Join(dir, name)).CombinedOutput()
		if err != nil {
			t.Errorf("dump %s: %v: %s", name, err, out)
		}
		for _, w := range want {
			if !strings.Contains(string(out), w) {
				t.Errorf("the dump of %s has no %s", name, w)
			}
		}
	}
}
