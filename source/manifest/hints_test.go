// SPDX-License-Identifier: Apache-2.0

package manifest

import (
	"fmt"
	"log/slog"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	discoveryv1 "k8s.io/api/discovery/v1"
)

// hintsOf says which hints each endpoint of a slice in force has: "1: zone a, node n1".
func hintsOf(s *set, name string) string {
	var all []string
	slice, _ := s.stores.kinds[endpointSlice].objects[name].(*discoveryv1.EndpointSlice)
	if slice == nil {
		return "no slice"
	}
	for _, e := range slice.Endpoints {
		var hints []string
		if e.Hints != nil {
			for _, z := range e.Hints.ForZones {
				hints = append(hints, "zone "+z.Name)
			}
			for _, n := range e.Hints.ForNodes {
				hints = append(hints, "node "+n.Name)
			}
		}
		all = append(all, strings.TrimPrefix(e.Addresses[0], "10.0.0.")+": "+strings.Join(hints, ", "))
	}
	return strings.Join(all, "; ")
}

func webSlice(endpoints ...string) string {
	return `apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: web-1, labels: {kubernetes.io/service-name: web}}
addressType: IPv4
ports: [{port: 8080}]
endpoints:
` + strings.Join(endpoints, "\n") + "\n"
}

func distributed(how string) string {
	return strings.Replace(svc("web", 80), "spec: {", "spec: {trafficDistribution: "+how+", ", 1)
}

func nodeIn(name, zone string) string {
	return fmt.Sprintf("apiVersion: v1\nkind: Node\nmetadata: {name: %s, labels: {topology.kubernetes.io/zone: %s}}\n", name, zone)
}

// TestTrafficDistribution: the hints that it means, for each way to say it.
func TestTrafficDistribution(t *testing.T) {
	two := webSlice(
		"- {addresses: [10.0.0.1], zone: a, nodeName: n1}",
		"- {addresses: [10.0.0.2], nodeName: n2}",
		"- {addresses: [10.0.0.3]}",
		"- {addresses: [10.0.0.4], zone: a, nodeName: n1, conditions: {ready: false, serving: true, terminating: true}}",
		"- {addresses: [10.0.0.5], zone: a, nodeName: n1, conditions: {ready: true}}")
	hinted := webSlice(
		"- {addresses: [10.0.0.1], zone: a}",
		"- {addresses: [10.0.0.2], zone: b, hints: {forZones: [{name: c}]}}")
	zones := "1: zone a; 2: zone b; 3: ; 4: ; 5: zone a"
	for _, tt := range []struct{ name, service, slice, want string }{
		{"none", svc("web", 80), two, "1: ; 2: ; 3: ; 4: ; 5: "},
		{"PreferClose", distributed("PreferClose"), two, zones},
		{"PreferSameZone", distributed("PreferSameZone"), two, zones},
		{"PreferSameNode", distributed("PreferSameNode"), two, "1: zone a, node n1; 2: zone b, node n2; 3: ; 4: ; 5: zone a, node n1"},
		{"a slice that has hints keeps them", distributed("PreferClose"), hinted, "1: ; 2: zone c"},
		{"another Service", strings.ReplaceAll(distributed("PreferClose"), "web", "other"), two, "1: ; 2: ; 3: ; 4: ; 5: "},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := newSet(DefaultNodePorts, slog.New(slog.DiscardHandler))
			s.put(contents("all.yaml", []byte(tt.service+"---\n"+tt.slice+"---\n"+nodeIn("n2", "b")), nil))
			s.settle()
			if got := hintsOf(s, "EndpointSlice default/web-1"); got != tt.want {
				t.Errorf("hints %q, want %q; problems %v", got, tt.want, s.problems())
			}
		})
	}
}

// TestTrafficDistributionFollows: files come and go in steps, and the hints follow all three kinds.
func TestTrafficDistributionFollows(t *testing.T) {
	s := newSet(DefaultNodePorts, slog.New(slog.DiscardHandler))
	const slice = "EndpointSlice default/web-1"
	version := func() string { return s.stores.kinds[endpointSlice].objects[slice].GetResourceVersion() }
	for i, step := range []struct{ file, text, want string }{
		{"slice", webSlice("- {addresses: [10.0.0.1], nodeName: n1}"), "1: "},
		{"web", distributed("PreferClose"), "1: "},
		{"node", nodeIn("n1", "a"), "1: zone a"},
		{"node", nodeIn("n1", "b"), "1: zone b"},
		{"web", distributed("PreferSameNode"), "1: zone b, node n1"},
		{"node", "", "1: node n1"},
		{"web", svc("web", 80), "1: "},
		{"web", distributed("PreferSameNode"), "1: node n1"},
		{"slice", webSlice("- {addresses: [10.0.0.1], nodeName: n2}"), "1: node n2"},
		{"web", "", "1: "},
		{"slice", "", "no slice"},
		{"web", distributed("PreferClose"), "no slice"},
	} {
		if step.text == "" {
			s.remove(step.file)
		} else {
			s.put(contents(step.file, []byte(step.text), nil))
		}
		s.settle()
		if got := hintsOf(s, slice); got != step.want {
			t.Errorf("step %d: hints %q, want %q; problems %v", i, got, step.want, s.problems())
		}
	}

	s.put(contents("slice", []byte(webSlice("- {addresses: [10.0.0.1], zone: a}")), nil))
	s.settle()
	before := version()
	s.put(contents("node", []byte(nodeIn("n9", "a")), nil)) // of no endpoint
	s.settle()
	if diff := cmp.Diff(before, version()); diff != "" {
		t.Errorf("a slice changed that did not (-before +after):\n%s", diff)
	}
	s.remove("slice")
	s.settle()
	if n := len(s.hints.slices) + len(s.hints.hinted) + len(s.members.owner) + len(s.members.of); n > 0 {
		t.Errorf("left behind: %+v, %+v", s.hints, s.members)
	}
}

// A change concerns its own EndpointSlices and those of its Services, and no others, however many there are.
func TestConcerned(t *testing.T) {
	m := members{owner: map[string]string{}, of: map[string]map[string]bool{}}
	slice := func(owner string) decoded {
		s := &discoveryv1.EndpointSlice{}
		s.Namespace, s.Labels = "default", map[string]string{discoveryv1.LabelServiceName: owner}
		return decoded{object: s}
	}
	for i, step := range []struct {
		changed map[string]decoded
		want    map[string]bool
	}{
		{map[string]decoded{"a-1": slice("a"), "a-2": slice("a"), "b-1": slice("b")}, map[string]bool{"a-1": true, "a-2": true, "b-1": true}},
		{map[string]decoded{"Service default/a": {}}, map[string]bool{"a-1": true, "a-2": true}},
		{map[string]decoded{"a-2": slice("b")}, map[string]bool{"a-2": true}},
		{map[string]decoded{"Service default/b": {}, "b-1": {}}, map[string]bool{"a-2": true, "b-1": true}},
		{map[string]decoded{"Node n1": {}}, map[string]bool{}},
	} {
		if diff := cmp.Diff(step.want, m.update(step.changed)); diff != "" {
			t.Errorf("step %d: concerned (-want +got):\n%s", i, diff)
		}
	}
}
