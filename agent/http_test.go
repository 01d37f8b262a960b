// SPDX-License-Identifier: Apache-2.0

package agent_test

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/lbagent/lbagent/api"
	"github.com/lbagent/lbagent/internal/testenv"
	"github.com/lbagent/lbagent/maps"
)

const nodeManifest = `apiVersion: v1
kind: Node
metadata: {name: node}
spec: {%s}
status: {addresses: [{type: InternalIP, address: 192.0.2.1}, {type: InternalIP, address: "fd00:c::1"}]}
`

// checked is a load balancer's Service with a port for health checks, and a slice of the first n backends, of
// whom as many are ready as it says. Where policy is Cluster there is no such port.
func (s *site) checked(name string, number, port int, policy string, n, ready int) string {
	s.t.Helper()
	var b strings.Builder
	fmt.Fprintf(&b, `apiVersion: v1
kind: Service
metadata: {name: %s, namespace: default}
spec:
  type: LoadBalancer
  clusterIP: 10.96.0.%[2]d
  clusterIPs: [10.96.0.%[2]d]
  ports: [{name: http, port: 80, targetPort: 8080, nodePort: %[3]d}]
  externalTrafficPolicy: %s
`, name, number, 30000+number, policy)
	if policy == "Local" {
		fmt.Fprintf(&b, "  healthCheckNodePort: %d\n", port)
	}
	fmt.Fprintf(&b, `---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata:
  {name: %s-1, namespace: default, labels: {kubernetes.io/service-name: %[1]s},
   annotations: {endpoints.kubernetes.io/last-change-trigger-time: %q}}
addressType: IPv4
ports: [{name: http, port: 8080, protocol: TCP}]
endpoints:
`, name, time.Now().UTC().Format(time.RFC3339Nano))
	for i, host := range s.Backends[:n] {
		fmt.Fprintf(&b, "- {addresses: [%q], conditions: {ready: %v, serving: true, terminating: %v}}\n", host.IPv4, i < ready, i >= ready)
	}
	return b.String()
}

// get asks at an address of the node, from there, until the answer is as wanted: a code, and a part of the text.
// Code 0 is that nobody listens.
func (s *site) get(from *testenv.Namespace, url string, code int, part string) (http.Header, string) {
	s.t.Helper()
	client := &http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{DialContext: from.DialContext, DisableKeepAlives: true}}
	deadline := time.Now().Add(15 * time.Second)
	for {
		response, err := client.Get("http://" + url)
		got, body := 0, []byte(nil)
		var header http.Header
		if err == nil {
			got, header = response.StatusCode, response.Header
			body, err = io.ReadAll(response.Body)
			response.Body.Close()
		}
		if got == code && strings.Contains(string(body), part) {
			return header, string(body)
		}
		if time.Now().After(deadline) {
			s.t.Fatalf("%s: %d %q %v, want %d with %q", url, got, body, err, code, part)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// TestHTTP asks an agent for all that it says by HTTP, while what it says changes.
func TestHTTP(t *testing.T) {
	s := newSite(t)
	here := s.Node.Namespace
	s.config.Flags = map[string]string{"manifests": s.config.Manifests, "flows": "0", "nodeport-addresses": "[primary,localhost]"}
	s.write("node.yaml", fmt.Sprintf(nodeManifest, ""))
	s.write("web.yaml", s.checked("web", 10, 32000, "Local", 2, 2))
	s.write("shop.yaml", s.manifest("shop", 11, 1))
	// Somebody has one port.
	taken, err := here.Listen(t.Context(), "tcp", "192.0.2.1:32001")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	agent := s.start(s.config)
	s.settled(4)

	// The proxy's own.
	_, body := s.get(here, "127.0.0.1:10256/healthz", 200, `"nodeEligible":true`)
	var report struct {
		Healthy     bool
		LastUpdated time.Time
		Status      map[string]struct{ Healthy bool }
	}
	if err := json.Unmarshal([]byte(body), &report); err != nil || !report.Healthy || !report.Status["IPv4"].Healthy ||
		!report.Status["IPv6"].Healthy || time.Since(report.LastUpdated) > time.Minute {
		t.Errorf("%v: %s", err, body)
	}
	if _, body := s.get(here, "127.0.0.1:10256/livez", 200, `"healthy":true`); strings.Contains(body, "nodeEligible") {
		t.Error("livez:", body)
	}
	s.get(here, "127.0.0.1:10256/metrics", 404, "")
	if _, body := s.get(here, "127.0.0.1:10249/healthz", 200, ""); body != "ok" {
		t.Errorf("healthz: %q", body)
	}
	if _, body := s.get(here, "127.0.0.1:10249/proxyMode", 200, ""); body != "lbagent" {
		t.Errorf("proxyMode: %q", body)
	}
	var config map[string]map[string]string
	_, body = s.get(here, "127.0.0.1:10249/configz", 200, "")
	if err := json.Unmarshal([]byte(body), &config); err != nil || config["lbagent"]["manifests"] != s.config.Manifests ||
		config["lbagent"]["flows"] != "1024" {
		t.Errorf("configz: %s", body)
	}
	s.get(s.Client.Namespace, "192.0.2.1:10256/healthz", 0, "") // loopback alone

	// A Service's, at each address, from the node and from outside.
	const two = `{"service":{"namespace":"default","name":"web"},"localEndpoints":2,"serviceProxyHealthy":true}`
	for _, at := range []string{"127.0.0.1", "[::1]", "192.0.2.1", "[fd00:c::1]"} {
		header, _ := s.get(here, at+":32000/any/path", 200, two)
		if w := header.Get("X-Load-Balancing-Endpoint-Weight"); w != "2" {
			t.Errorf("%s: weight %q", at, w)
		}
	}
	s.get(s.Client.Namespace, "192.0.2.1:32000", 200, two)
	s.eventually(func(status api.Status) string {
		want := []string{"metrics", "healthz"}
		for range 4 {
			want = append(want, "health check default/web")
		}
		var got []string
		for _, l := range status.Listeners {
			if got = append(got, l.Name); l.Error != "" {
				return fmt.Sprint(l)
			}
		}
		if fmt.Sprint(got) != fmt.Sprint(want) {
			return fmt.Sprint(got)
		}
		return ""
	})

	// Ready ones go; those that drain do not count. A node that goes makes no difference here, but for /healthz.
	s.write("web.yaml", s.checked("web", 10, 32000, "Local", 2, 1))
	s.get(here, "127.0.0.1:32000", 200, `"localEndpoints":1`)
	s.write("web.yaml", s.checked("web", 10, 32000, "Local", 2, 0))
	s.get(here, "127.0.0.1:32000", 503, `"localEndpoints":0,"serviceProxyHealthy":true`)
	s.write("web.yaml", s.checked("web", 10, 32000, "Local", 2, 2))
	s.get(here, "127.0.0.1:32000", 200, two)
	s.write("node.yaml", fmt.Sprintf(nodeManifest, "taints: [{key: ToBeDeletedByClusterAutoscaler, effect: NoSchedule}]"))
	s.get(here, "127.0.0.1:10256/healthz", 503, `"nodeEligible":false,"healthy":true`)
	s.get(here, "127.0.0.1:10256/livez", 200, `"healthy":true`)
	s.get(here, "127.0.0.1:32000", 200, two)
	s.write("node.yaml", fmt.Sprintf(nodeManifest, ""))
	s.get(here, "127.0.0.1:10256/healthz", 200, `"nodeEligible":true`)

	// Another port, and none.
	s.write("web.yaml", s.checked("web", 10, 32001, "Local", 2, 2))
	s.get(here, "127.0.0.1:32000", 0, "")
	s.get(here, "127.0.0.1:32001", 200, two)
	const busy = "health checks are not answered at 192.0.2.1:32001: bind: address already in use; tried again"
	s.eventually(func(status api.Status) string {
		for _, p := range status.Problems {
			if p.Object == "Service default/web" && p.Message == busy && p.File == filepath.Join(s.config.Manifests, "web.yaml") &&
				p.Document == 1 && p.Severity == "warning" && p.Field == "spec.healthCheckNodePort" {
				return ""
			}
		}
		return "no such problem"
	})
	taken.Close()
	s.get(here, "192.0.2.1:32001", 200, two)
	s.eventually(func(status api.Status) string {
		for _, p := range status.Problems {
			if p.Message == busy {
				return "still a problem"
			}
		}
		return ""
	})
	if n := strings.Count(agent.log.String(), `msg="service problem" problem="`+filepath.Join(s.config.Manifests, "web.yaml")+": document 1: Service default/web: spec.healthCheckNodePort: "+busy); n != 1 {
		t.Errorf("the problem is logged %d times, want once", n)
	}
	s.write("web.yaml", s.checked("web", 10, 0, "Cluster", 2, 2))
	for _, at := range []string{"127.0.0.1", "[::1]", "192.0.2.1", "[fd00:c::1]"} {
		s.get(here, at+":32001", 0, "")
	}

	agent.terminate()
	for _, at := range []string{"127.0.0.1:10256", "127.0.0.1:10249"} {
		l, err := here.Listen(t.Context(), "tcp", at)
		if err != nil {
			t.Error("after the agent's end:", err)
			continue
		}
		l.Close()
	}
}

// TestMetrics: what a scrape says of packets, of writes, and of how long changes took.
func TestMetrics(t *testing.T) {
	s := newSite(t)
	here := s.Node.Namespace
	s.write("node.yaml", fmt.Sprintf(nodeManifest, ""))
	s.write("web.yaml", s.checked("web", 10, 32000, "Local", 2, 2)) // from before the agent's start
	s.write("shop.yaml", s.manifest("shop", 11, 1))
	// Somebody has its address: that is no reason not to start.
	taken, err := here.Listen(t.Context(), "tcp", "127.0.0.1:10249")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	s.start(s.config)
	s.settled(4)
	s.request(11)
	s.eventually(func(status api.Status) string {
		if l := status.Listeners[0]; l.Name != "metrics" || !strings.Contains(l.Error, "address already in use") {
			return fmt.Sprint(l)
		}
		return ""
	})
	taken.Close()
	text := s.scrape()
	for series, want := range map[string]float64{
		`lbagent_packets_total{reason="new_flow"}`: 2, // one in each family
		`lbagent_map_entries{map="services"}`:      3,
		`lbagent_map_entries{map="backends"}`:      4,
		`lbagent_map_max_entries{map="backends"}`:  64,
		`lbagent_pending_changes`:                  0,
		`lbagent_attached_programs`:                8,
		`lbagent_uncovered_devices`:                0,
		`lbagent_problems{severity="error"}`:       0,
		`lbagent_service_backends{family="IPv4",namespace="default",pod="",port="http",protocol="TCP",service="web",state="active"}`: 2,
		`kubeproxy_network_programming_duration_seconds_count`:                                                                       0,
	} {
		if got := value(t, text, series); got != want {
			t.Errorf("%s is %v, want %v", series, got, want)
		}
	}
	if n := value(t, text, "kubeproxy_sync_proxy_rules_duration_seconds_count"); n < 1 {
		t.Errorf("%v syncs", n)
	}
	if age := float64(time.Now().Unix()) - value(t, text, "lbagent_last_apply_timestamp_seconds"); age < -1 || age > 60 {
		t.Errorf("the last Apply was %v s ago", age)
	}

	// What the programs count, a Service's and a backend's.
	m, err := maps.Read(filepath.Join(s.config.BPFRoot, "maps"))
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	for id, b := range m.EachBackend() {
		if b.Addr().Addr() == s.Backends[1].IPv4 {
			if err := m.All()["backend_stats"].Put(id, maps.BackendStats{Flows: 41}); err != nil {
				t.Fatal(err)
			}
			if err := m.All()["service_stats"].Put(b.Service, maps.ServiceStats{Flows: 42}); err != nil {
				t.Fatal(err)
			}
		}
	}
	text = s.scrape()
	for series, want := range map[string]float64{
		`lbagent_service_flows_total{family="IPv4",namespace="default",pod="",port="http",protocol="TCP",service="web"}`: 42,
		fmt.Sprintf(`lbagent_backend_flows_total{address="%s:8080",family="IPv4",namespace="default",pod="",port="http",protocol="TCP",service="web"}`,
			s.Backends[1].IPv4): 41,
	} {
		if got := value(t, text, series); got != want {
			t.Errorf("%s is %v, want %v", series, got, want)
		}
	}

	// A change with a note of when it began counts once, and one without does not.
	before := time.Now()
	s.write("web.yaml", s.checked("web", 10, 32000, "Local", 3, 3))
	s.settled(5)
	s.write("shop.yaml", s.manifest("shop", 11, 2))
	s.settled(7)
	text = s.scrape()
	if n := value(t, text, "kubeproxy_network_programming_duration_seconds_count"); n != 1 {
		t.Errorf("%v changes, want 1", n)
	}
	if sum := value(t, text, "kubeproxy_network_programming_duration_seconds_sum"); sum <= 0 || sum > time.Since(before).Seconds() {
		t.Errorf("it took %v s", sum)
	}
	s.get(here, "127.0.0.1:10256/livez", 200, "")
	if n := value(t, s.scrape(), `kubeproxy_proxy_livez_total{code="200"}`); n != 1 {
		t.Errorf("%v answers at /livez", n)
	}
}

func (s *site) scrape() string {
	s.t.Helper()
	_, text := s.get(s.Node.Namespace, "127.0.0.1:10249/metrics", 200, "lbagent_build_info")
	return text
}

// value returns the value of a series in the text of a scrape.
func value(t *testing.T, text, series string) float64 {
	t.Helper()
	found := regexp.MustCompile(`(?m)^` + regexp.QuoteMeta(series) + ` (.*)$`).FindStringSubmatch(text)
	if found == nil {
		t.Errorf("no series %s", series)
		return -1
	}
	n, err := strconv.ParseFloat(found[1], 64)
	if err != nil {
		t.Error(err)
	}
	return n
}
