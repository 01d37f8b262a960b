// SPDX-License-Identifier: Apache-2.0

package metrics

import (
	"flag"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"

	"github.com/lbagent/lbagent/internal/testenv"
	"github.com/lbagent/lbagent/lb"
	"github.com/lbagent/lbagent/maps"
)

var update = flag.Bool("update", false, "write the expected output in testdata anew")

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func newMaps(t testing.TB, sizes maps.Sizes) *maps.Maps {
	t.Helper()
	testenv.RequireRoot(t)
	m, err := maps.New(sizes)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { m.Close() })
	return m
}

// put writes statistics as the programs do.
func put(t testing.TB, m *maps.Maps, name string, id uint32, value any) {
	t.Helper()
	if err := m.All()[name].Put(id, value); err != nil {
		t.Fatal(err)
	}
}

func setName(t testing.TB, m *maps.Maps, id uint32, n lb.ServiceName) {
	t.Helper()
	name, err := maps.NameOf(n)
	if err == nil {
		err = m.SetServiceName(id, name)
	}
	if err != nil {
		t.Fatal(err)
	}
}

func setBackend(t testing.TB, m *maps.Maps, id, service uint32, at string, protocol lb.Protocol, state maps.BackendState) {
	t.Helper()
	addr := netip.MustParseAddrPort(at)
	vip := lb.VIP{Addr: addr.Addr(), Port: addr.Port(), Protocol: protocol}
	if err := m.SetBackend(id, maps.BackendOf(service, vip, maps.BackendLife{State: state})); err != nil {
		t.Fatal(err)
	}
}

func scrape(t testing.TB, x *Metrics) string {
	t.Helper()
	w := httptest.NewRecorder()
	x.Handler().ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/metrics", nil))
	body, err := io.ReadAll(w.Body)
	if err != nil || w.Code != http.StatusOK {
		t.Fatalf("%d %v: %s", w.Code, err, body)
	}
	return string(body)
}

// TestText is the text of a scrape: everything of ours, with every kind of name that the maps can hold.
func TestText(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newMaps(t, maps.Sizes{Frontends: 64, Services: 16, Slots: 64, Backends: 32, Flows: 256})
		x := New(m, "v1.2.3", func() State {
			return State{
				Frontends: 5, Identities: 3, Flows: 7, PendingFlows: 2, Pending: 1, Programs: 6, Uncovered: 1,
				Problems: map[string]int{"warning": 2},
			}
		})
		setName(t, m, 1, lb.ServiceName{Namespace: "default", Name: "web", Port: "http", Protocol: lb.TCP, Family: lb.IPv4})
		setName(t, m, 2, lb.ServiceName{Namespace: "kube-system", Name: "dns", Protocol: lb.UDP, Family: lb.IPv6})
		setName(t, m, 3, lb.ServiceName{Namespace: "default", Name: "web", Port: "8080", Protocol: lb.TCP, Family: lb.IPv4, Pod: true})
		// The same name, but for being a Service's.
		setName(t, m, 4, lb.ServiceName{Namespace: "default", Name: "web", Port: "8080", Protocol: lb.TCP, Family: lb.IPv4})
		put(t, m, "service_stats", 1, maps.ServiceStats{Flows: 11, NoBackend: 12, NoLocalBackend: 13, SourceDenied: 14,
			PacketsIn: 15, BytesIn: 16, PacketsOut: 17, BytesOut: 18})
		put(t, m, "service_stats", 3, maps.ServiceStats{Flows: 3})
		put(t, m, "service_stats", 9, maps.ServiceStats{Flows: 999}) // of no service
		if err := m.SetServiceCluster(1, maps.SlotRange{First: 0, Count: 4}); err != nil {
			t.Fatal(err)
		}
		if err := m.SetServiceLocal(1, maps.SlotRange{First: 4, Count: 2}); err != nil {
			t.Fatal(err)
		}
		setBackend(t, m, 1, 1, "10.244.0.1:8080", lb.TCP, maps.BackendActive)
		setBackend(t, m, 2, 1, "10.244.0.2:8080", lb.TCP, maps.BackendDraining)
		setBackend(t, m, 3, 1, "10.244.0.1:8080", lb.TCP, maps.BackendRemoved) // as it was before it came again
		setBackend(t, m, 4, 2, "[fd00:244::1]:53", lb.UDP, maps.BackendActive)
		setBackend(t, m, 5, 8, "10.244.0.9:80", lb.TCP, maps.BackendRemoved) // its service is gone
		put(t, m, "backend_stats", 1, maps.BackendStats{Flows: 1, PacketsIn: 2, BytesIn: 3, PacketsOut: 4, BytesOut: 5})
		put(t, m, "backend_stats", 3, maps.BackendStats{Flows: 10, PacketsIn: 20, BytesIn: 30, PacketsOut: 40, BytesOut: 50})
		put(t, m, "backend_stats", 5, maps.BackendStats{Flows: 999})
		perCPU := make([]uint64, possibleCPUs(t))
		perCPU[0], perCPU[len(perCPU)-1] = perCPU[0]+20, perCPU[len(perCPU)-1]+22
		put(t, m, "reasons", 18, perCPU)

		time.Sleep(10 * time.Second)
		x.Queued()
		x.Applied(3*time.Millisecond, false)
		time.Sleep(time.Second)
		x.Applied(5*time.Millisecond, true)
		now := time.Now()
		x.Programmed([]time.Time{
			now.Add(-3 * time.Millisecond), now.Add(-400 * time.Millisecond), now.Add(-90 * time.Second / 10),
			now.Add(-12 * time.Second), {}, // from before the start, and none
		})
		ok := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {})
		x.CountProbes("livez", ok).ServeHTTP(httptest.NewRecorder(), httptest.NewRequest(http.MethodGet, "/livez", nil))

		var ours strings.Builder
		for line := range strings.Lines(scrape(t, x)) {
			if !notOurs.MatchString(line) {
				ours.WriteString(goVersion.ReplaceAllString(line, `go_version="go"`))
			}
		}
		golden(t, "scrape.txt", ours.String())
		if again := scrape(t, x); !strings.Contains(again, `reason="no_backend"} 42`) {
			t.Error("the reasons of all CPUs are not summed up")
		}
	})
}

var (
	notOurs   = regexp.MustCompile(`^(# (HELP|TYPE) )?(go|process)_`)
	goVersion = regexp.MustCompile(`go_version="[^"]*"`)
)

func possibleCPUs(t *testing.T) int {
	t.Helper()
	text, err := os.ReadFile("/sys/devices/system/cpu/possible")
	if err != nil {
		t.Fatal(err)
	}
	_, last, ranged := strings.Cut(strings.TrimSpace(string(text)), "-")
	if !ranged {
		return 1
	}
	n := 0
	for _, digit := range last {
		n = 10*n + int(digit-'0')
	}
	return n + 1
}

func golden(t *testing.T, file, got string) {
	t.Helper()
	path := "testdata/" + file
	if *update {
		if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), got); diff != "" {
		t.Errorf("%s (write it anew with -update): %s", path, diff)
	}
}

// TestUnread: maps that cannot be read fail the scrape; it does not look like one of a node without services.
func TestUnread(t *testing.T) {
	m := newMaps(t, maps.Sizes{Frontends: 4, Services: 4, Slots: 4, Backends: 4, Flows: 64})
	x := New(m, "v1", func() State { return State{} })
	m.All()["service_names"].Close()
	w := httptest.NewRecorder()
	x.Handler().ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/metrics", nil))
	if w.Code != http.StatusInternalServerError {
		t.Errorf("%d: %s", w.Code, w.Body)
	}
}

// TestBuckets: kube-proxy's boundaries are all there, so that what reads its histograms reads ours.
func TestBuckets(t *testing.T) {
	if got, want := syncBuckets(), []float64{0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.128, 0.256, 0.512,
		1.024, 2.048, 4.096, 8.192, 16.384}; !cmp.Equal(got, want, cmp.Comparer(func(a, b float64) bool { return a-b < 1e-9 && b-a < 1e-9 })) {
		t.Errorf("of a sync: %v", got)
	}
	got := programmingBuckets()
	if !slices.IsSorted(got) || len(slices.Compact(slices.Clone(got))) != len(got) {
		t.Errorf("of the programming latency: %v", got)
	}
	want := []float64{0.25, 0.5}
	for s := 1; s < 60; s++ {
		want = append(want, float64(s))
	}
	for s := 60; s < 120; s += 5 {
		want = append(want, float64(s))
	}
	for s := 120; s <= 300; s += 30 {
		want = append(want, float64(s))
	}
	first := slices.Index(got, 0.25)
	if got[0] != 0 || first < 5 || !slices.Equal(got[first:], want) {
		t.Errorf("of the programming latency: %v", got)
	}
}

// TestDocument holds the table of docs/operations.md against what is registered: names, kinds and labels.
func TestDocument(t *testing.T) {
	content, err := os.ReadFile("../docs/operations.md")
	if err != nil {
		t.Fatal(err)
	}
	_, section, found := strings.Cut(string(content), "\n## Metrics\n")
	if !found {
		t.Fatal("docs/operations.md has no section Metrics")
	}
	section, _, _ = strings.Cut(section, "\n## ")
	documented := map[string]string{}
	for _, r := range regexp.MustCompile("(?m)^\\| `((?:lbagent|kubeproxy)_[a-z_]+)` \\| ([a-z]+) \\|([^|]*)\\|").FindAllStringSubmatch(section, -1) {
		documented[r[1]] = strings.TrimSpace(r[2] + " " + strings.ReplaceAll(strings.TrimSpace(r[3]), "`", ""))
	}
	m := newMaps(t, maps.Sizes{Frontends: 4, Services: 4, Slots: 4, Backends: 4, Flows: 64})
	setName(t, m, 1, lb.ServiceName{Namespace: "a", Name: "a", Port: "a", Protocol: lb.TCP, Family: lb.IPv4})
	setBackend(t, m, 1, 1, "10.0.0.1:1", lb.TCP, maps.BackendActive)
	families, err := New(m, "v1", func() State { return State{} }).registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	registered := map[string]string{}
	for _, f := range families {
		if notOurs.MatchString(f.GetName()) {
			continue
		}
		var labels []string
		for _, l := range f.GetMetric()[0].GetLabel() {
			labels = append(labels, l.GetName())
		}
		// The order of the document is that of what is told apart.
		order := append(slices.Clone(backendLabels), "state", "direction", "reason")
		slices.SortStableFunc(labels, func(a, b string) int { return slices.Index(order, a) - slices.Index(order, b) })
		text := strings.Join(labels, ", ")
		text = strings.ReplaceAll(text, strings.Join(backendLabels, ", "), "a backend's")
		text = strings.ReplaceAll(text, strings.Join(serviceLabels, ", "), "a service's")
		registered[f.GetName()] = strings.TrimSpace(strings.ToLower(f.GetType().String()) + " " + text)
	}
	if diff := cmp.Diff(registered, documented); diff != "" {
		t.Errorf("docs/operations.md (-registered +document):\n%s", diff)
	}
	// Every description is told: none is dead.
	for _, d := range descriptions {
		_, name, _ := strings.Cut(d.String(), `fqName: "`)
		name, _, _ = strings.Cut(name, `"`)
		if _, ok := registered[name]; !ok {
			t.Errorf("%s is described, and never told", name)
		}
	}
}

// BenchmarkScrape: what a scrape costs, by the number of backends; docs/operations.md says so.
func BenchmarkScrape(b *testing.B) {
	const services, each = 1000, 10
	m := newMaps(b, maps.Sizes{Frontends: 64, Services: services + 1, Slots: 64, Backends: services*each + 1, Flows: 64})
	for s := range uint32(services) {
		setName(b, m, s+1, lb.ServiceName{Namespace: "default", Name: fmt.Sprint("service-", s), Port: "http", Protocol: lb.TCP, Family: lb.IPv4})
		for i := range uint32(each) {
			at := netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, byte(s >> 8), byte(s), byte(i + 1)}), 8080)
			setBackend(b, m, s*each+i+1, s+1, at.String(), lb.TCP, maps.BackendActive)
		}
	}
	x := New(m, "v1", func() State { return State{} })
	b.ReportAllocs()
	size := 0
	for b.Loop() {
		size = len(scrape(b, x))
	}
	b.ReportMetric(float64(size), "B/scrape")
}

// What damaged maps call a service fails no scrape.
func TestDamagedName(t *testing.T) {
	m := newMaps(t, maps.Sizes{Frontends: 8, Services: 8, Slots: 8, Backends: 8, Flows: 64})
	setName(t, m, 1, lb.ServiceName{Namespace: "default", Name: "w\xffb", Protocol: lb.TCP, Family: lb.IPv4})
	got := scrape(t, New(m, "v", func() State { return State{} }))
	if want := "service=\"w\ufffdb\""; !strings.Contains(got, want) {
		t.Errorf("no %s in\n%s", want, got)
	}
}
