// SPDX-License-Identifier: Apache-2.0

package source

import (
	"fmt"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

func TestAddressesOf(t *testing.T) {
	internal, external, name := corev1.NodeInternalIP, corev1.NodeExternalIP, corev1.NodeHostName
	tests := []struct {
		name      string
		addresses []corev1.NodeAddress
		want      string
	}{
		{"none", nil, "[]"},
		{"the first InternalIP of each family", []corev1.NodeAddress{{Type: name, Address: "n1"}, {Type: external, Address: "198.51.100.1"},
			{Type: internal, Address: "fd00::1"}, {Type: internal, Address: "10.0.0.1"}, {Type: internal, Address: "10.0.0.2"},
			{Type: internal, Address: "fd00::2"}}, "[10.0.0.1 fd00::1]"},
		{"an ExternalIP where there is no InternalIP", []corev1.NodeAddress{{Type: external, Address: "2001:db8::1"},
			{Type: external, Address: "2001:db8::2"}, {Type: internal, Address: "10.0.0.1"}}, "[10.0.0.1 2001:db8::1]"},
		{"no address", []corev1.NodeAddress{{Type: internal, Address: "n1"}, {Type: name, Address: "10.0.0.1"}}, "[]"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			n := node("this", "z")
			n.Status.Addresses = tt.addresses
			if got := fmt.Sprint(AddressesOf(n)); got != tt.want {
				t.Errorf("got %s, want %s", got, tt.want)
			}
		})
	}
	if AddressesOf(nil) != nil || ZoneOf(nil) != "" || ZoneOf(node("this", "z")) != "z" {
		t.Error("a node without an object, or its zone")
	}
}

func TestEligible(t *testing.T) {
	now := metav1.Now()
	for name, c := range map[string]struct {
		change func(*corev1.Node)
		want   bool
	}{
		"as it is":      {func(*corev1.Node) {}, true},
		"other taints":  {func(n *corev1.Node) { n.Spec.Taints = []corev1.Taint{{Key: "node.kubernetes.io/unreachable"}} }, true},
		"unschedulable": {func(n *corev1.Node) { n.Spec.Unschedulable = true }, true},
		"being deleted": {func(n *corev1.Node) { n.DeletionTimestamp = &now }, false},
		"to be deleted": {func(n *corev1.Node) {
			n.Spec.Taints = []corev1.Taint{{Key: "a"}, {Key: toBeDeleted, Effect: corev1.TaintEffectNoSchedule}}
		}, false},
	} {
		n := node("this", "z")
		c.change(n)
		if got := Eligible(n); got != c.want {
			t.Errorf("%s: %v, want %v", name, got, c.want)
		}
	}
	if !Eligible(nil) {
		t.Error("a node without an object is not eligible")
	}
}
