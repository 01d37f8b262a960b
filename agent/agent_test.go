// SPDX-License-Identifier: Apache-2.0

package agent_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/lbagent/lbagent/agent"
	"github.com/lbagent/lbagent/api"
	"github.com/lbagent/lbagent/internal/testenv"
	"github.com/lbagent/lbagent/lb"
	"github.com/lbagent/lbagent/loader"
	"github.com/lbagent/lbagent/maps"
)

// childConfig is the variable by which a child of these tests knows that it is an agent, and which.
const childConfig = "LBAGENT_TEST_AGENT"

// childPause is the variable by which it knows how long to wait before every write to a map, so that what a packet
// meets between two of them is met.
const childPause = "LBAGENT_TEST_PAUSE"

func TestMain(m *testing.M) {
	if text := os.Getenv(childConfig); text != "" {
		os.Exit(child(text))
	}
	goleak.VerifyTestMain(m)
}

// child is an agent in a process of its own, which can be killed.
func child(text string) int {
	var c agent.Config
	if err := json.Unmarshal([]byte(text), &c); err != nil {
		panic(err)
	}
	c.Defaults()
	c.Log = slog.New(slog.NewTextHandler(os.Stderr, nil))
	if pause, err := time.ParseDuration(os.Getenv(childPause)); err == nil {
		c.BeforeWrite(func(string) error { time.Sleep(pause); return nil })
	}
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGTERM)
	defer stop()
	err := errors.Join(c.Validate(), agent.Run(ctx, c))
	// What Run started has ended, whatever it returned.
	if leak := goleak.Find(); leak != nil {
		err = errors.Join(err, leak)
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "FAILED %+v\n", err)
		return 1
	}
	return 0
}

// site is a lab with what an agent on its node needs.
type site struct {
	*testenv.Lab
	t      *testing.T
	config agent.Config
	last   *running // the last that was started
}

func newSite(t *testing.T) *site {
	t.Helper()
	return newSiteLike(t, testenv.Config{Backends: 3})
}

func newSiteLike(t *testing.T, c testenv.Config) *site {
	t.Helper()
	s := &site{t: t, Lab: testenv.NewLab(t, c)}
	for _, b := range s.Backends {
		server, err := testenv.ServeHTTP(t.Context(), b.Namespace, b.Name, ":8080")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { server.Close() })
	}
	work := t.TempDir()
	bpffs := filepath.Join(work, "bpf")
	s.config = agent.Config{
		Manifests: filepath.Join(work, "manifests"), NodeName: "node",
		BPFRoot: filepath.Join(bpffs, "lbagent"), Socket: filepath.Join(work, "run", "lbagent.sock"),
		Sizes:         maps.Sizes{Frontends: 64, Services: 16, Slots: 1024, Backends: 64, Flows: 1024},
		SweepInterval: time.Hour, // expired entries stay where a test has put them
	}
	for _, dir := range []string{bpffs, s.config.Manifests} {
		if err := os.Mkdir(dir, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	// The agent would mount one; this one is the test's to unmount.
	if err := unix.Mount("bpf", bpffs, "bpf", 0, ""); err != nil {
		t.Fatal("mount bpffs:", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(bpffs, 0); err != nil {
			t.Error("unmount bpffs:", err)
		}
	})
	s.CheckWhenDone(t) // before the pins go, and with them the programs
	return s
}

// running is an agent that runs.
type running struct {
	*testenv.Process
	t   *testing.T
	log *output
}

// output collects what a process writes.
type output struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (o *output) Write(b []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.text.Write(b)
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.text.String()
}

// start starts an agent on the node.
func (s *site) start(c agent.Config) *running {
	s.t.Helper()
	text, err := json.Marshal(c)
	if err != nil {
		s.t.Fatal(err)
	}
	r := &running{t: s.t, log: &output{}}
	s.last = r
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), childConfig+"="+string(text))
	cmd.Stdout, cmd.Stderr = r.log, r.log
	if r.Process, err = s.Node.Start(cmd); err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() {
		r.Close()
		if s.t.Failed() {
			s.t.Logf("log of the agent, pid %d:\n%s", r.PID(), r.log)
		}
	})
	return r
}

// terminate ends an agent as an operator does.
func (r *running) terminate() {
	r.t.Helper()
	if err := r.Stop(30 * time.Second); err != nil {
		r.t.Errorf("the agent does not end well: %v", err)
	}
}

// eventually waits for a status for which what returns "".
func (s *site) eventually(what func(api.Status) string) api.Status {
	s.t.Helper()
	deadline := time.Now().Add(time.Minute)
	for {
		status, err := api.NewClient(s.config.Socket).Status(s.t.Context())
		complaint := fmt.Sprint(err)
		if err == nil {
			complaint = what(status)
		}
		if complaint == "" {
			return status
		}
		if time.Now().After(deadline) {
			s.t.Fatalf("still not so: %s; status %+v", complaint, status)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// settled waits until an agent has put in force what it read, with so many backends. The last that it writes
// are the backends' own addresses.
func (s *site) settled(backends int) api.Status {
	s.t.Helper()
	return s.eventually(func(status api.Status) string {
		switch {
		case status.Source == nil || !status.Source.Synced || status.Apply.LastApply.IsZero() || len(status.Programs) == 0:
			return "not started"
		case status.Maps[0].Entries != backends:
			return fmt.Sprintf("%d backends, want %d", status.Maps[0].Entries, backends)
		}
		return s.unnamed()
	})
}

// unnamed returns which backend's own address is not among the frontends, "" if all are.
func (s *site) unnamed() (missing string) {
	s.t.Helper()
	m, err := maps.Read(filepath.Join(s.config.BPFRoot, "maps"))
	if err != nil {
		s.t.Fatal(err)
	}
	defer m.Close()
	there := map[lb.VIP]bool{}
	if err := m.EachFrontend(func(k maps.FrontendKey, _ maps.Frontend) bool { there[k.VIP()] = true; return true }); err != nil {
		s.t.Fatal(err)
	}
	for _, b := range m.EachBackend() {
		if b.Life.State != maps.BackendRemoved && !there[b.VIP()] {
			missing = fmt.Sprintf("%s is not among the frontends", b.VIP())
		}
	}
	return missing
}

// write writes a manifest as an editor does.
func (s *site) write(file, text string) {
	s.t.Helper()
	path := filepath.Join(s.config.Manifests, file)
	if err := os.WriteFile(path+".new", []byte(text), 0o600); err != nil {
		s.t.Fatal(err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		s.t.Fatal(err)
	}
}

// manifest is a Service in both families of the first n backends.
func (s *site) manifest(name string, number, n int) string {
	var b strings.Builder
	fmt.Fprintf(&b, `apiVersion: v1
kind: Service
metadata: {name: %[1]s, namespace: default}
spec:
  clusterIP: 10.96.0.%[2]d
  clusterIPs: [10.96.0.%[2]d, "fd00:96::%[2]d"]
  ipFamilyPolicy: RequireDualStack
  ports: [{name: http, port: 80, targetPort: 8080}]
`, name, number)
	for family, backend := range map[string]func(*testenv.Host) netip.Addr{
		"IPv4": func(h *testenv.Host) netip.Addr { return h.IPv4 }, "IPv6": func(h *testenv.Host) netip.Addr { return h.IPv6 },
	} {
		fmt.Fprintf(&b, `---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: %s-%s, namespace: default, labels: {kubernetes.io/service-name: %s}}
addressType: %s
ports: [{name: http, port: 8080, protocol: TCP}]
endpoints:
`, name, strings.ToLower(family), name, family)
		for _, host := range s.Backends[:n] {
			fmt.Fprintf(&b, "- addresses: [%q]\n", backend(host))
		}
	}
	return b.String()
}

// ids is what the maps say, for comparison over a restart.
func (s *site) ids() map[string]string {
	s.t.Helper()
	m, err := maps.Read(filepath.Join(s.config.BPFRoot, "maps"))
	if err != nil {
		s.t.Fatal(err)
	}
	defer m.Close()
	all := map[string]string{}
	err = errors.Join(
		m.EachFrontend(func(k maps.FrontendKey, f maps.Frontend) bool {
			all[k.VIP().String()] = fmt.Sprint("service ", f.Service)
			return true
		}),
		m.EachServiceName(func(id uint32, n maps.ServiceName) bool {
			all[n.LB().String()] = fmt.Sprint("id ", id, " slots ", m.Slots(m.Service(id).Cluster))
			return true
		}))
	if err != nil {
		s.t.Fatal(err)
	}
	for id, b := range m.EachBackend() {
		all[fmt.Sprint("backend ", id)] = fmt.Sprint(b.Addr(), " of ", b.Service, " state ", b.Life.State)
	}
	return all
}

// request makes one request from the client outside to each VIP of a number.
func (s *site) request(number int) {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(s.t.Context(), 30*time.Second)
	defer cancel()
	for _, vip := range []string{fmt.Sprintf("10.96.0.%d:80", number), fmt.Sprintf("[fd00:96::%d]:80", number)} {
		c := testenv.NewHTTPClient(s.Client.Namespace, netip.AddrPort{})
		if _, err := c.Who(ctx, netip.MustParseAddrPort(vip)); err != nil {
			s.t.Errorf("request to %s: %v", vip, err)
		}
		c.Close()
	}
}

// TestLife: a service appears, changes and outlives its agent, which finds all of it again.
func TestLife(t *testing.T) {
	s := newSite(t)
	s.write("web.yaml", s.manifest("web", 10, 2))
	first := s.start(s.config)
	status := s.settled(4)
	if len(status.Uncovered) != 0 || len(status.Programs) != 2*(1+len(s.Backends)) {
		t.Errorf("programs %+v, uncovered %+v", status.Programs, status.Uncovered)
	}
	if len(status.Problems) != 0 {
		t.Errorf("problems: %v", status.Problems)
	}
	s.request(10)

	s.write("web.yaml", s.manifest("web", 10, 3))
	s.write("shop.yaml", s.manifest("shop", 11, 1))
	s.settled(8)
	s.request(10)
	s.request(11)

	// A second agent is refused and changes nothing, by the maps or by the socket.
	before := s.ids()
	elsewhere := s.config
	elsewhere.Socket += ".other"
	for by, config := range map[error]agent.Config{api.ErrInUse: s.config, maps.ErrInUse: elsewhere} {
		second := s.start(config)
		if err := second.Wait(); err == nil || !strings.Contains(second.log.String(), by.Error()) {
			t.Errorf("a second agent: %v, want %v: %s", err, by, second.log)
		}
	}
	s.settled(8)

	// Killed: everything stays. Started again: everything has its id.
	first.Close()
	s.request(10)
	if diff := cmp.Diff(before, s.ids()); diff != "" {
		t.Errorf("a killed agent changed the maps: %s", diff)
	}
	third := s.start(s.config)
	s.settled(8)
	if diff := cmp.Diff(before, s.ids()); diff != "" {
		t.Errorf("over a restart: %s", diff)
	}
	s.request(11)

	// A manifest that went while no agent ran is made good at the start.
	third.terminate()
	if _, err := os.Lstat(s.config.Socket); err == nil {
		t.Error("the socket is still there")
	}
	s.request(10)
	if err := os.Remove(filepath.Join(s.config.Manifests, "shop.yaml")); err != nil {
		t.Fatal(err)
	}
	fourth := s.start(s.config)
	s.settled(6)
	s.request(10)
	fourth.terminate()

	// Pins outlive it, until cleanup.
	status = s.pinned()
	if len(status.Programs) != 8 || len(status.Maps) == 0 {
		t.Errorf("after SIGTERM: %+v", status)
	}
	if err := s.CheckStrict(t.Context()); err != nil {
		t.Error(err)
	}
	if err := s.Node.Do(func() error { _, err := loader.Cleanup(s.config.BPFRoot); return err }); err != nil {
		t.Fatal(err)
	}
	if status = s.pinned(); len(status.Programs) != 0 || len(status.Maps) != 0 {
		t.Errorf("after cleanup: %+v", status)
	}
	if err := s.ResetCounters(t.Context()); err != nil { // VIPs are nobody's from the cleanup on
		t.Error(err)
	}
}

// TestMapsBeforePrograms: no device has programs while the maps do not say yet what the folder does.
func TestMapsBeforePrograms(t *testing.T) {
	s := newSite(t)
	s.write("web.yaml", s.manifest("web", 10, 2))
	t.Setenv(childPause, "20ms")
	s.start(s.config)
	status := s.eventually(func(status api.Status) string {
		if len(status.Programs) == 0 {
			return "no programs"
		}
		return ""
	})
	if !status.Source.Synced || status.Apply.LastApply.IsZero() {
		t.Errorf("%d programs are attached; source %+v, apply %+v", len(status.Programs), status.Source, status.Apply)
	}
	s.request(10)
}

func (s *site) pinned() (status api.Status) {
	s.t.Helper()
	if err := s.Node.Do(func() (err error) { status, err = api.FromPins(s.config.BPFRoot); return err }); err != nil {
		s.t.Fatal(err)
	}
	return status
}

// TestHeld: what a broken manifest had in force stays, over restarts, until it is mended.
func TestHeld(t *testing.T) {
	s := newSite(t)
	s.write("web.yaml", s.manifest("web", 10, 2))
	s.write("shop.yaml", s.manifest("shop", 11, 1))
	first := s.start(s.config)
	s.settled(6)
	const broken = "apiVersion: v1\nkind: Service\nmetadata: {name: [}\n"

	// While it runs
	s.write("web.yaml", broken)
	status := s.eventually(func(status api.Status) string {
		if len(status.Problems) == 0 {
			return "no problem"
		}
		return ""
	})
	web := filepath.Join(s.config.Manifests, "web.yaml")
	if p := status.Problems[0]; p.File != web || p.Severity != "error" {
		t.Errorf("problem %+v", p)
	}
	if status.Source.Held {
		t.Error("held, though what the file held is known")
	}
	s.request(10)
	before := s.ids()

	// Over a restart
	first.terminate()
	second := s.start(s.config)
	status = s.settled(6)
	if !status.Source.Held || len(status.Source.HeldFiles) != 1 || status.Source.HeldFiles[0] != web {
		t.Errorf("source %+v", status.Source)
	}
	if diff := cmp.Diff(before, s.ids()); diff != "" {
		t.Errorf("over a restart with a broken manifest: %s", diff)
	}
	s.request(10)
	s.request(11)
	if log := second.log.String(); strings.Count(log, "level=ERROR") != 1 {
		t.Error("the problem is not logged once")
	}

	// Mended: the same ids, and nothing is held any more.
	s.write("web.yaml", s.manifest("web", 10, 2))
	s.eventually(func(status api.Status) string {
		if status.Source.Held || len(status.Problems) > 0 {
			return "still held"
		}
		return ""
	})
	if diff := cmp.Diff(before, s.ids()); diff != "" {
		t.Errorf("after it was mended: %s", diff)
	}

	// Broken at a start, then deleted: its service goes.
	second.terminate()
	s.write("web.yaml", broken)
	third := s.start(s.config)
	s.settled(6)
	if err := os.Remove(web); err != nil {
		t.Fatal(err)
	}
	s.settled(2)
	s.request(11)
	third.terminate()
}

// TestEmptyFolder: an agent without a manifest is up, with programs attached, and removes what nobody wants.
func TestEmptyFolder(t *testing.T) {
	s := newSite(t)
	s.write("web.yaml", s.manifest("web", 10, 2))
	first := s.start(s.config)
	s.settled(4)
	first.terminate()
	if err := os.Remove(filepath.Join(s.config.Manifests, "web.yaml")); err != nil {
		t.Fatal(err)
	}
	second := s.start(s.config)
	s.settled(0)
	second.terminate()
}

// TestDevices: programs follow the devices, and the problems of Services have their place.
func TestDevices(t *testing.T) {
	s := newSite(t)
	s.write("web.yaml", s.manifest("web", 10, 1)+"---\n"+strings.ReplaceAll(s.manifest("thief", 10, 1), "    ", "      "))
	agent := s.start(s.config)
	status := s.eventually(func(status api.Status) string {
		if len(status.Problems) == 0 {
			return "no problem"
		}
		return ""
	})
	if p := status.Problems[0]; p.Object != "Service web" && (p.File == "" || p.Document == 0 || p.Severity != "warning") {
		t.Errorf("problem %+v", p)
	}
	programs := len(status.Programs)
	veth := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "vethnew"}, PeerName: "other"}
	if err := s.Node.Do(func() error { return netlink.LinkAdd(veth) }); err != nil {
		t.Fatal(err)
	}
	s.eventually(func(status api.Status) string {
		if len(status.Programs) != programs+2 {
			return "the new device has no programs"
		}
		return ""
	})
	if err := s.Node.Do(func() error { return netlink.LinkDel(veth) }); err != nil {
		t.Fatal(err)
	}
	s.eventually(func(status api.Status) string {
		if len(status.Programs) != programs {
			return "the programs of a device that went are still listed"
		}
		return ""
	})
	if log := agent.log.String(); strings.Count(log, "service problem") < 1 {
		t.Error("the conflict is not logged")
	}
	agent.terminate()
}

// TestFull: what has no room is named and tried again, all else is served, and room that comes is used.
func TestFull(t *testing.T) {
	s := newSite(t)
	s.config.Sizes.Backends = 8 // the first is none
	s.config.SweepInterval = 100 * time.Millisecond
	s.write("web.yaml", s.manifest("web", 10, 3))
	agent := s.start(s.config)
	s.settled(6)
	s.write("shop.yaml", s.manifest("shop", 11, 1)) // one of its two families has room
	status := s.eventually(func(status api.Status) string {
		if status.Apply.Failures < 3 {
			return "not tried again"
		}
		return ""
	})
	if a := status.Apply; !strings.Contains(a.LastError, "default/shop") || !strings.Contains(a.LastError, "--max-backends") || a.Pending == 0 {
		t.Errorf("apply %+v", a)
	}
	if n := strings.Count(agent.log.String(), "maps not written"); n != 1 {
		t.Errorf("the failure is logged %d times", n)
	}
	s.request(10)
	s.write("web.yaml", s.manifest("web", 10, 1))
	status = s.eventually(func(status api.Status) string {
		if status.Apply.LastError != "" || status.Apply.Pending > 0 {
			s.ageFlows(48 * time.Hour) // the connections have ended, and hold ids
			return "still failing"
		}
		return ""
	})
	s.settled(4)
	s.request(10)
	s.request(11)
	agent.terminate()
}
