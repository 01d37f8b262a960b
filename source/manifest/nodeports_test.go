// SPDX-License-Identifier: Apache-2.0

package manifest

import (
	"log/slog"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestParsePortRange(t *testing.T) {
	for text, want := range map[string]PortRange{"30000-32767": DefaultNodePorts, "1-65535": {1, 65535}, "80-80": {80, 80}} {
		if got, err := ParsePortRange(text); err != nil || got != want || got.String() != text {
			t.Errorf("%s: %s, %v", text, got, err)
		}
	}
	for _, text := range []string{"", "30000", "30000-", "-1", "0-10", "32767-30000", "1-65536", "a-b"} {
		if got, err := ParsePortRange(text); err == nil {
			t.Errorf("%q is taken for %s", text, got)
		}
	}
}

// TestNodePortRange: a file with a node port outside of the range is not taken, and the field is named.
func TestNodePortRange(t *testing.T) {
	text := serviceWith("type: LoadBalancer", "externalTrafficPolicy: Local", "healthCheckNodePort: 29999",
		"ports: [{name: a, port: 80, nodePort: 30000}, {name: b, port: 81, nodePort: 32768}, {name: c, port: 82}]")
	for ports, want := range map[PortRange][]string{
		DefaultNodePorts: {
			webProblem + "spec.healthCheckNodePort: Invalid value: 29999: provided port is not in the valid range: 30000-32767",
			webProblem + "spec.ports[1].nodePort: Invalid value: 32768: provided port is not in the valid range: 30000-32767",
		},
		{29999, 32768}: nil,
	} {
		s := newSet(ports, slog.New(slog.DiscardHandler))
		s.put(contents("f.yaml", []byte(text), nil))
		s.settle()
		if diff := cmp.Diff(want, lines(s.problems())); diff != "" {
			t.Errorf("%s: problems (-want +got):\n%s", ports, diff)
		}
		if _, inForce := s.owners["Service default/web"]; inForce != (want == nil) {
			t.Errorf("%s: in force: %v", ports, inForce)
		}
	}
}
