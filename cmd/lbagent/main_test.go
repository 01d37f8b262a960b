// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/rogpeppe/go-internal/testscript"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/lbagent/lbagent/api"
	"github.com/lbagent/lbagent/internal/testenv"
	"github.com/lbagent/lbagent/lb"
	"github.com/lbagent/lbagent/maps"
)

var update = flag.Bool("update", false, "write the expected output in testdata anew")

func TestMain(m *testing.M) {
	const apart = "LBAGENT_TEST_APART"
	asCommand := filepath.Base(os.Args[0]) == "lbagent"
	if os.Geteuid() == 0 && os.Getenv(apart) == "" && !asCommand {
		// Again in a network namespace of its own: `cleanup` takes filters from every device that it sees.
		runtime.LockOSThread() // Pdeathsig is that of the thread
		cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
		cmd.Env = append(os.Environ(), apart+"=1")
		cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
		cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET, Pdeathsig: unix.SIGKILL}
		if err := cmd.Run(); err != nil {
			fmt.Fprintln(os.Stderr, "tests in a network namespace of their own:", err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	testscript.Main(m, map[string]func(){"lbagent": main})
}

// TestScripts runs command lines against maps in a folder of the script's own, $ROOT, which the command
// `fill` makes.
func TestScripts(t *testing.T) {
	testenv.RequireRoot(t)
	testscript.Run(t, testscript.Params{
		Dir:           "testdata/script",
		UpdateScripts: *update,
		Setup: func(e *testscript.Env) error {
			bpffs := filepath.Join(e.WorkDir, "bpf")
			if err := os.Mkdir(bpffs, 0o700); err != nil {
				return err
			}
			if err := unix.Mount("bpf", bpffs, "bpf", 0, ""); err != nil {
				return err
			}
			e.Defer(func() {
				if err := unix.Unmount(bpffs, 0); err != nil {
					t.Error("unmount bpffs:", err)
				}
			})
			e.Setenv("ROOT", filepath.Join(bpffs, "lbagent"))
			e.Setenv("SOCKET", filepath.Join(e.WorkDir, "lbagent.sock"))
			return nil
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"fill": func(ts *testscript.TestScript, _ bool, _ []string) {
				ts.Check(fill(filepath.Join(ts.Getenv("ROOT"), "maps")))
			},
			// answer has an agent answer at $SOCKET until the script ends.
			"answer": func(ts *testscript.TestScript, _ bool, _ []string) {
				l, err := api.Listen(ts.Getenv("SOCKET"))
				ts.Check(err)
				ctx, stop := context.WithCancel(t.Context())
				served := make(chan error)
				go func() { served <- api.Serve(ctx, l, answers{}) }()
				ts.Defer(func() {
					stop()
					if err := <-served; err != nil {
						t.Error(err)
					}
				})
			},
		},
	})
}

// answers is an agent that knows default/web, two Services that wait for another's addresses, and one that the maps
// have no room for.
type answers struct{}

func (answers) Status() (api.Status, error) { return api.Status{Running: true}, nil }

func (answers) Services(_ context.Context, namespace, name string) ([]api.Service, error) {
	web := lb.ServiceName{Namespace: "default", Name: "web", Port: "http", Protocol: lb.TCP, Family: lb.IPv4}
	late := lb.ServiceName{Namespace: "default", Name: "late", Protocol: lb.TCP, Family: lb.IPv4}
	at := func(address string, kind lb.Kind) lb.Frontend {
		a := netip.MustParseAddrPort(address)
		return lb.Frontend{VIP: lb.VIP{Addr: a.Addr(), Port: a.Port(), Protocol: lb.TCP}, Kind: kind}
	}
	endpoint := func(address, node, zone, cluster, local string) lb.Endpoint {
		return lb.Endpoint{Addr: netip.MustParseAddrPort(address), Node: node, Zone: zone, Weight: 1, Cluster: cluster, Local: local}
	}
	switch namespace + "/" + name {
	case "default/web":
		return api.ServicesOf([]lb.View{{
			Service: lb.Service{
				Name: web, Algorithm: lb.Maglev, ExternalLocal: true, Affinity: 3 * time.Hour,
				SourceRanges: []netip.Prefix{netip.MustParsePrefix("192.0.2.0/24"), netip.MustParsePrefix("198.51.100.0/24")},
				Frontends:    []lb.Frontend{at("10.96.0.10:80", lb.ClusterIP), at("192.0.2.1:30080", lb.NodePort), at("203.0.113.1:80", lb.LoadBalancer)},
			},
			Waiting: []lb.Waiting{{Frontend: at("203.0.113.9:80", lb.External),
				Holder: lb.ServiceName{Namespace: "shop", Name: "cart", Port: "http", Protocol: lb.TCP, Family: lb.IPv4}}},
			Endpoints: []lb.Endpoint{
				endpoint("10.244.0.1:8080", "n1", "z1", "", ""),
				endpoint("10.244.0.2:8080", "n1", "z1", "terminating, and ready ones exist", "terminating, and ready ones exist"),
				endpoint("10.244.7.1:8080", "n7", "z2", "another zone", "on another node"),
				endpoint("10.244.7.2:8080", "", "", "not ready", "on another node"),
			},
		}}), nil
	case "default/late":
		return api.ServicesOf([]lb.View{{
			Service: lb.Service{Name: late},
			Waiting: []lb.Waiting{{Frontend: at("10.96.0.10:80", lb.ClusterIP), Holder: web}},
		}}), nil
	case "default/full":
		full := lb.ServiceName{Namespace: "default", Name: "full", Protocol: lb.TCP, Family: lb.IPv4}
		return api.ServicesOf([]lb.View{{Service: lb.Service{Name: full, Frontends: []lb.Frontend{at("10.96.0.11:80", lb.ClusterIP)}}}}), nil
	}
	return []api.Service{}, nil
}

// fill pins maps with three services and a hostPort, and flows of 90 s ago.
func fill(dir string) error {
	m, err := maps.Open(dir, maps.Sizes{Frontends: 64, Services: 16, Slots: 128, Backends: 32, Flows: 256})
	if err != nil {
		return err
	}
	defer m.Close()
	addr := netip.MustParseAddr
	web4 := lb.ServiceName{Namespace: "default", Name: "web", Port: "http", Protocol: lb.TCP, Family: lb.IPv4}
	web6 := web4
	web6.Family = lb.IPv6
	dns := lb.ServiceName{Namespace: "kube-system", Name: "dns", Protocol: lb.UDP, Family: lb.IPv4}
	pod := lb.ServiceName{Namespace: "default", Name: "web-0", Port: "8080", Protocol: lb.TCP, Family: lb.IPv4, Pod: true}
	for id, name := range map[uint32]lb.ServiceName{1: web4, 2: web6, 3: dns, 4: pod} {
		n, err := maps.NameOf(name)
		if err != nil {
			return err
		}
		if err := m.SetServiceName(id, n); err != nil {
			return err
		}
	}
	for _, f := range []struct {
		id      uint32
		kind    lb.Kind
		address string
		p       lb.Protocol
	}{
		{1, lb.ClusterIP, "10.96.0.10:80", lb.TCP}, {1, lb.NodePort, "192.0.2.1:30080", lb.TCP},
		{1, lb.LoadBalancer, "203.0.113.1:80", lb.TCP}, {2, lb.ClusterIP, "[fd00:96::10]:80", lb.TCP},
		{3, lb.ClusterIP, "10.96.0.53:53", lb.UDP}, {4, lb.HostPort, "192.0.2.1:8080", lb.TCP},
	} {
		a := netip.MustParseAddrPort(f.address)
		vip := lb.VIP{Addr: a.Addr(), Port: a.Port(), Protocol: f.p}
		if err := m.SetFrontend(maps.KeyOf(vip), maps.FrontendOf(f.id, f.kind)); err != nil {
			return err
		}
	}
	if err := m.SetServicePolicy(1, maps.Policy{Flags: maps.ExternalLocal | maps.HasSourceRanges, AffinityTimeoutS: 10800}); err != nil {
		return err
	}
	for _, p := range []string{"198.51.100.0/24", "192.0.2.0/24"} {
		if err := m.SetSourceRange(1, netip.MustParsePrefix(p)); err != nil {
			return err
		}
	}
	for id, b := range map[uint32]struct {
		service uint32
		address string
		state   maps.BackendState
		flags   uint8
	}{
		1: {1, "10.244.0.1", maps.BackendActive, maps.BackendCluster | maps.BackendLocal}, 2: {1, "10.244.0.2", maps.BackendDraining, 0},
		3: {1, "10.244.0.3", maps.BackendRemoved, 0}, 4: {2, "fd00:244::1", maps.BackendActive, maps.BackendCluster},
		5: {1, "10.244.7.3", maps.BackendActive, maps.BackendCluster}, 6: {4, "10.244.0.1", maps.BackendActive, maps.BackendCluster},
	} {
		err := m.SetBackend(id, maps.Backend{
			Address: addr(b.address).As16(), Service: b.service,
			Life: maps.BackendLife{Generation: 10 + id, State: b.state, Flags: b.flags, Port: 8080},
		})
		if err != nil {
			return err
		}
	}
	if err := m.SetSlots(1, []uint32{1, 1}); err != nil {
		return err
	}
	if err := m.SetServiceCluster(1, maps.SlotRange{First: 1, Count: 1}); err != nil {
		return err
	}
	if err := m.SetServiceLocal(1, maps.SlotRange{First: 2, Count: 1}); err != nil {
		return err
	}

	now, err := maps.Now()
	if err != nil {
		return err
	}
	pair := func(client, vip, backend string, p lb.Protocol, assured bool, state uint8, id uint32) error {
		t := tuple(client, vip, p)
		to := tuple(client, backend, p)
		forward := maps.Flow{To: to, Hook: 1, Role: 1, State: state, Backend: id, Packets: 10, Bytes: 1000, LastSeenNs: now - uint64(90*time.Second)}
		reply := maps.Flow{To: inverse(t), Hook: 2, Role: 2, State: state, Backend: id, Packets: 9, Bytes: 9000, LastSeenNs: forward.LastSeenNs}
		flows := m.All()["pending"]
		if assured {
			flows = m.All()["flows"]
		}
		if err := flows.Put(t, forward); err != nil {
			return err
		}
		return flows.Put(inverse(to), reply)
	}
	for _, f := range []struct {
		client, vip, backend string
		p                    lb.Protocol
		assured              bool
		state                uint8
		id                   uint32
	}{
		{"192.0.2.2:40000", "10.96.0.10:80", "10.244.0.1:8080", lb.TCP, true, 0, 1},
		{"192.0.2.2:40001", "10.96.0.10:80", "10.244.0.3:8080", lb.TCP, true, maps.FlowClientFIN, 3},
		{"192.0.2.2:40002", "10.96.0.10:80", "10.244.0.1:8080", lb.TCP, false, 0, 1},                                       // expired: not assured in 60 s
		{"192.0.2.2:40003", "10.96.0.10:80", "10.244.0.1:8080", lb.TCP, true, maps.FlowClientRST, 1},                       // expired
		{"[fd00:c::2]:40000", "[fd00:96::10]:80", "[fd00:244::1]:8080", lb.TCP, true, 0, 4},                                //
		{"192.0.2.2:50000", "10.96.0.53:53", "10.244.0.9:53", lb.UDP, true, 0, 9},                                          //
		{"192.0.2.2:50001", "10.96.0.53:53", "10.244.0.9:53", lb.UDP, false, 0, 9},                                         // expired
		{"192.0.2.2:50002", "10.96.0.99:53", "10.244.0.9:53", lb.UDP, true, 0, 9},                                          // of no service any more
		{"192.0.2.2:40004", "10.96.0.99:80", "10.244.0.2:8080", lb.TCP, true, 0, 2},                                        // its VIP went, its backend drains
		{"192.0.2.2:40005", "10.96.0.10:80", "10.244.0.1:8080", lb.TCP, true, maps.FlowClientFIN | maps.FlowBackendFIN, 1}, // expired
	} {
		if err := pair(f.client, f.vip, f.backend, f.p, f.assured, f.state, f.id); err != nil {
			return err
		}
	}
	return nil
}

func tuple(from, to string, p lb.Protocol) maps.Tuple {
	source, destination := netip.MustParseAddrPort(from), netip.MustParseAddrPort(to)
	t := maps.Tuple{
		Source: source.Addr().As16(), Destination: destination.Addr().As16(),
		SourcePort: source.Port(), DestinationPort: destination.Port(),
	}
	t.Protocol = maps.KeyOf(lb.VIP{Addr: destination.Addr(), Protocol: p}).Protocol
	return t
}

// TestFlowKeys holds the keys of `flow list -o json`, the age of which no script can hold.
func TestFlowKeys(t *testing.T) {
	f := flow{
		Client: netip.MustParseAddrPort("192.0.2.2:40000"), VIP: netip.MustParseAddrPort("[fd00::1]:80"),
		Backend: netip.MustParseAddrPort("10.244.0.1:8080"), Protocol: "TCP", State: "pending", Age: 1.5,
		Service: &api.ServiceName{Namespace: "default", Name: "web", Port: "http", Protocol: "TCP", Family: "IPv4"}, Forward: traffic{1, 2}, Reply: traffic{3, 4},
	}
	got, err := json.Marshal(f)
	if err != nil {
		t.Fatal(err)
	}
	want := `{"client":"192.0.2.2:40000","vip":"[fd00::1]:80","backend":"10.244.0.1:8080","protocol":"TCP",` +
		`"service":{"namespace":"default","name":"web","port":"http","protocol":"TCP","family":"IPv4"},` +
		`"state":"pending","ageSeconds":1.5,"forward":{"packets":1,"bytes":2},"reply":{"packets":3,"bytes":4}}`
	if diff := cmp.Diff(want, string(got)); diff != "" {
		t.Error(diff)
	}
}

func TestDurationOrOff(t *testing.T) {
	for text, want := range map[string]time.Duration{"5s": 5 * time.Second, "0": 0, "0s": 0, "off": -1, "1m30s": 90 * time.Second} {
		var d durationOrOff
		if err := d.Set(text); err != nil || time.Duration(d) != want {
			t.Errorf("%s: %v, %v", text, time.Duration(d), err)
		}
		var again durationOrOff
		if err := again.Set(d.String()); err != nil || again != d {
			t.Errorf("%s is shown as %s, which is read as %s: %v", text, d.String(), again.String(), err)
		}
	}
	for _, text := range []string{"", "5", "-1s", "never", "OFF"} {
		var d durationOrOff
		if err := d.Set(text); err == nil {
			t.Errorf("%q is taken for %s", text, d.String())
		}
	}
}

// TestHelp: every command says what it does, and every verb shows how it is used.
func TestHelp(t *testing.T) {
	var walk func(*cobra.Command)
	walk = func(cmd *cobra.Command) {
		if cmd.Short == "" {
			t.Errorf("%s: says nothing of itself", cmd.CommandPath())
		}
		if !cmd.HasSubCommands() && (cmd.Long == "" || cmd.Example == "") {
			t.Errorf("%s: no description or no example", cmd.CommandPath())
		}
		for _, c := range cmd.Commands() {
			walk(c)
		}
	}
	walk(newRoot())
	var out strings.Builder
	if code := execute(context.Background(), []string{"--help"}, &out, &out); code != exitDone {
		t.Errorf("--help exits %d", code)
	}
}
