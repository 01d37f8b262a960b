// SPDX-License-Identifier: Apache-2.0

package manifest

import (
	"context"
	"fmt"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/lbagent/lbagent/source"
)

// TestInformers: what stands in the folder reaches who asks for Services, by client-go's own informers.
func TestInformers(t *testing.T) {
	dir := t.TempDir()
	web := func(port int, address string) string {
		return svc("web", port) + "---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\n" +
			"metadata: {name: web-1, labels: {kubernetes.io/service-name: web}}\naddressType: IPv4\nendpoints: [{addresses: [" + address + "]}]\n"
	}
	write(t, filepath.Join(dir, "web.yaml"), web(80, "10.0.0.1"))
	for i := range 10 {
		write(t, filepath.Join(dir, fmt.Sprintf("%d.yaml", i)), svc(fmt.Sprintf("s%d", i), 80))
	}
	write(t, filepath.Join(dir, "node.yaml"), "apiVersion: v1\nkind: Node\nmetadata: {name: n1, labels: {topology.kubernetes.io/zone: z1}}\n")
	pod := func(hostPort int) string {
		return fmt.Sprintf("apiVersion: v1\nkind: Pod\nmetadata: {name: p}\nspec: {containers: [{name: c, ports: [{containerPort: 80, hostPort: %d}]}]}\n", hostPort)
	}
	write(t, filepath.Join(dir, "pod.yaml"), pod(8080))
	f := follow(t, dir)
	objects, err := source.New(source.Watches{Services: f.Services(), EndpointSlices: f.EndpointSlices(), Pods: f.Pods(), Nodes: f.Nodes(), Node: "n1"})
	must(t, err)
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	done := make(chan error)
	go func() { done <- objects.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})

	name := source.Name{Namespace: "default", Name: "web"}
	expect := func(want source.Dirty) {
		t.Helper()
		dirty, err := objects.Next(ctx)
		must(t, err)
		if diff := cmp.Diff(want, dirty); diff != "" {
			t.Errorf("changed (-want +got):\n%s", diff)
		}
	}
	state := func() string {
		svc, its := objects.Service(name)
		if svc == nil || len(its) != 1 {
			return fmt.Sprintf("%v, %d slices", svc, len(its))
		}
		return fmt.Sprint(svc.Spec.Ports[0].Port, " ", its[0].Endpoints[0].Addresses[0])
	}
	all := source.Dirty{Pods: []source.Name{{Namespace: "default", Name: "p"}}, Node: true}
	for i := range 10 {
		all.Services = append(all.Services, source.Name{Namespace: "default", Name: fmt.Sprintf("s%d", i)})
	}
	all.Services = append(all.Services, name)
	expect(all)
	if got, want := state(), "80 10.0.0.1"; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
	if zone := objects.Node("n1").Labels["topology.kubernetes.io/zone"]; zone != "z1" {
		t.Errorf("zone %q", zone)
	}

	write(t, filepath.Join(dir, "web.yaml"), web(80, "10.0.0.22"))
	expect(source.Dirty{Services: []source.Name{name}})
	if got, want := state(), "80 10.0.0.22"; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
	write(t, filepath.Join(dir, "web.yaml"), web(8080, "10.0.0.22"))
	expect(source.Dirty{Services: []source.Name{name}})
	if got, want := state(), "8080 10.0.0.22"; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
	write(t, filepath.Join(dir, "node.yaml"), "apiVersion: v1\nkind: Node\nmetadata: {name: n1, labels: {topology.kubernetes.io/zone: zone2}}\n")
	expect(source.Dirty{Node: true})
	write(t, filepath.Join(dir, "pod.yaml"), pod(8081))
	expect(source.Dirty{Pods: all.Pods})
	if port := objects.Pod(all.Pods[0]).Spec.Containers[0].Ports[0].HostPort; port != 8081 {
		t.Errorf("hostPort %d", port)
	}
}
