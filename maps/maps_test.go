// SPDX-License-Identifier: Apache-2.0

package maps

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"unsafe"

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
	record := m.bpf.Record
	for _, layout := range []uint32{LayoutVersion + 1, LayoutVersion - 1} {
		must(t, record.Put(uint32(0), bpfRecord{Layout: layout}))
		if m != nil {
			if record, err = record.Clone(); err != nil {
				t.Fatal(err)
			}
			defer record.Close()
			must(t, m.Close())
			m = nil
		}
		for _, name := range []string{"service_stats", "affinity"} { // which the version before did not have
			if err := os.Remove(filepath.Join(dir, name)); err != nil && !errors.Is(err, os.ErrNotExist) {
				t.Fatal(err)
			}
		}
		if _, err := Open(dir, small); !errors.Is(err, ErrLayout) {
			t.Errorf("Open of layout %d: %v, want ErrLayout", layout, err)
		}
		if _, err := Read(dir); !errors.Is(err, ErrLayout) {
			t.Errorf("Read of layout %d: %v, want ErrLayout", layout, err)
		}
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
		"local": m.SetServiceLocal(1, SlotRange{}), "policy": m.SetServicePolicy(1, Policy{}),
		"source range": m.SetSourceRange(1, netip.MustParsePrefix("::/0")), "no source range": m.DeleteSourceRange(1, netip.MustParsePrefix("::/0")),
		"prefixes": m.SetServicePrefixes(nil, true), "stats": m.ClearServiceStats(1), "stats of a backend": m.ClearBackendStats(1),
	} {
		if !errors.Is(err, broken) {
			t.Errorf("%s: %v, want the injected fault", what, err)
		}
	}
	m.Fault = nil
	must(t, m.DeleteFrontend(FrontendKey{}), m.DeleteServiceName(1), m.DeleteSourceRange(1, netip.MustParsePrefix("::/0"))) // of the missing
}

func newMaps(t *testing.T) *Maps {
	t.Helper()
	needRoot(t)
	m, err := New(small)
	must(t, err)
	t.Cleanup(func() { m.Close() })
	return m
}

// The parts of a service are written each for itself.
func TestService(t *testing.T) {
	m := newMaps(t)
	want := Service{Cluster: SlotRange{First: 8, Count: 3}, Local: SlotRange{First: 16, Count: 1}, Policy: Policy{Flags: ExternalLocal | HasSourceRanges, AffinityTimeoutS: 10800}}
	must(t, m.SetServiceCluster(3, want.Cluster), m.SetServiceLocal(3, want.Local), m.SetServicePolicy(3, want.Policy))
	if got := m.Service(3); got != want {
		t.Errorf("service 3 is %+v, want %+v", got, want)
	}
	if got := m.Service(2); got != (Service{}) {
		t.Errorf("service 2 is %+v", got)
	}
	var inKernel Service
	must(t, m.bpf.Services.Lookup(uint32(3), &inKernel))
	if inKernel != want {
		t.Errorf("the kernel has %+v, want %+v", inKernel, want)
	}
}

func TestServiceNames(t *testing.T) {
	for _, name := range []lb.ServiceName{
		{Namespace: "default", Name: "web", Port: "http", Protocol: lb.TCP, Family: lb.IPv4},
		{Namespace: "default", Name: "web", Protocol: lb.SCTP, Family: lb.IPv6},
		{Namespace: "default", Name: "web-0", Port: "192.0.2.1:8080", Protocol: lb.UDP, Family: lb.IPv4, Pod: true},
		{ // a Pod's name may be four times as long as a Service's
			Namespace: strings.Repeat("n", 63), Name: strings.Repeat("p", 253), Port: "[2001:db8:1111:2222:3333:4444:5555:6666]:30080",
			Protocol: lb.TCP, Family: lb.IPv6, Pod: true,
		},
	} {
		wire, err := NameOf(name)
		if must(t, err); wire.LB() != name {
			t.Errorf("%s became %s", name, wire.LB())
		}
	}
}

// Source ranges come back as they were written, and the kernel matches clients to them: those of a service alone.
func TestSourceRanges(t *testing.T) {
	m := newMaps(t)
	type of struct {
		service uint32
		prefix  netip.Prefix
	}
	want := map[of]bool{}
	for _, p := range []string{"0.0.0.0/0", "10.0.0.0/8", "192.0.2.7/32", "::/0", "2001:db8::/32", "2001:db8::1/128"} {
		for service := range uint32(2) {
			want[of{service + 1, netip.MustParsePrefix(p)}] = true
			must(t, m.SetSourceRange(service+1, netip.MustParsePrefix(p)))
		}
	}
	lookup := func(service uint32, addr string) bool {
		var v uint8
		a := netip.MustParseAddr(addr)
		err := m.bpf.SourceRanges.Lookup(bpfSourceRange{PrefixLength: 32 + 128, Service: service, Address: a.As16()}, &v)
		return err == nil && v == 1
	}
	must(t, m.DeleteSourceRange(2, netip.MustParsePrefix("0.0.0.0/0")), m.DeleteSourceRange(2, netip.MustParsePrefix("::/0")))
	delete(want, of{2, netip.MustParsePrefix("0.0.0.0/0")})
	delete(want, of{2, netip.MustParsePrefix("::/0")})
	for _, tt := range []struct {
		service uint32
		addr    string
		in      bool
	}{
		{1, "203.0.113.1", true}, {2, "203.0.113.1", false}, {2, "10.1.2.3", true}, {2, "192.0.2.7", true}, {2, "192.0.2.8", false},
		{1, "fd00::1", true}, {2, "fd00::1", false}, {2, "2001:db8::9", true}, {3, "10.1.2.3", false},
	} {
		if got := lookup(tt.service, tt.addr); got != tt.in {
			t.Errorf("%s is let in by service %d: %v, want %v", tt.addr, tt.service, got, tt.in)
		}
	}
	must(t, m.EachSourceRange(func(service uint32, p netip.Prefix) bool {
		if !want[of{service, p}] {
			t.Errorf("service %d has %s", service, p)
		}
		delete(want, of{service, p})
		return true
	}))
	if len(want) > 0 {
		t.Errorf("not read: %v", want)
	}
}

// Prefixes come back as they were written, and while they change a reader finds all that are in both lists at one place.
func TestServicePrefixes(t *testing.T) {
	m := newMaps(t)
	parse := func(all ...string) (to []netip.Prefix) {
		for _, p := range all {
			to = append(to, netip.MustParsePrefix(p))
		}
		return to
	}
	for _, tt := range []struct {
		prefixes  []netip.Prefix
		elsewhere bool
	}{
		{parse("10.96.0.0/12"), false},
		{parse("10.96.0.0/12", "fd00:96::/112", "0.0.0.0/0", "::/0", "192.0.2.1/32"), true},
		{parse("fd00:96::/112"), false},
		{nil, true},
	} {
		must(t, m.SetServicePrefixes(tt.prefixes, tt.elsewhere))
		got, elsewhere := m.ServicePrefixes()
		if !slices.Equal(got, tt.prefixes) || elsewhere != tt.elsewhere {
			t.Errorf("%v %v, want %v %v", got, elsewhere, tt.prefixes, tt.elsewhere)
		}
		var inKernel bpfServicePrefixes
		must(t, m.bpf.ServicePrefixes.Lookup(uint32(0), &inKernel))
		for i, p := range inKernel.List {
			if i >= len(tt.prefixes) && p != (bpfPrefix{}) {
				t.Errorf("prefix %d is left: %v", i, p)
			}
		}
	}
	if m.SetServicePrefixes(make([]netip.Prefix, MaxServicePrefixes+1), false) == nil {
		t.Error("too many prefixes, and no error")
	}

	lists := [][]netip.Prefix{parse("10.96.0.0/12", "172.16.0.0/12"), parse("10.96.0.0/12", "fd00:96::/112", "192.168.0.0/16")}
	must(t, m.SetServicePrefixes(lists[0], false))
	const rounds = 200_000
	done := make(chan struct{})
	go func() {
		defer close(done)
		for i := range rounds {
			m.SetServicePrefixes(lists[i%2], false)
		}
	}()
	all := (*[unsafe.Sizeof(bpfServicePrefixes{}) / 8]uint64)(unsafe.Pointer(unsafe.SliceData(m.servicePrefixes)))
	in := func(addr string) bool { // as the programs look, word by word
		a := netip.MustParseAddr(addr).As16()
		words := *(*[2]uint64)(unsafe.Pointer(&a))
		for i := range MaxServicePrefixes {
			mask := [2]uint64{atomic.LoadUint64(&all[4*i+2]), atomic.LoadUint64(&all[4*i+3])}
			address := [2]uint64{atomic.LoadUint64(&all[4*i]), atomic.LoadUint64(&all[4*i+1])}
			if mask != [2]uint64{} && words[0]&mask[0] == address[0] && words[1]&mask[1] == address[1] {
				return true
			}
		}
		return false
	}
	for reading := true; reading; {
		select {
		case <-done:
			reading = false
		default:
		}
		if !in("10.97.0.1") {
			t.Error("an address that is in both lists was in none")
			reading = false
		}
	}
	<-done
}

// Statistics are what the programs have added, of one id each, and are cleared so.
func TestStats(t *testing.T) {
	m := newMaps(t)
	service, backend := ServiceStats{Flows: 1, NoBackend: 2, NoLocalBackend: 3, SourceDenied: 4, PacketsIn: 5, BytesIn: 6, PacketsOut: 7, BytesOut: 8}, BackendStats{Flows: 1, PacketsIn: 2, BytesIn: 3, PacketsOut: 4, BytesOut: 5}
	for id := range uint32(3) {
		must(t, m.bpf.ServiceStats.Put(id, service), m.bpf.BackendStats.Put(id, backend))
	}
	must(t, m.ClearServiceStats(1), m.ClearBackendStats(2))
	for id := range uint32(3) {
		wantService, wantBackend := service, backend
		if id == 1 {
			wantService = ServiceStats{}
		}
		if id == 2 {
			wantBackend = BackendStats{}
		}
		if got := m.ServiceStats(id); got != wantService {
			t.Errorf("service %d: %+v, want %+v", id, got, wantService)
		}
		if got := m.BackendStats(id); got != wantBackend {
			t.Errorf("backend %d: %+v, want %+v", id, got, wantBackend)
		}
	}
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
