// SPDX-License-Identifier: Apache-2.0

package resolve

import (
	"testing"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// podWith is a Pod without a node, with one container that has the ports.
func podWith(ports ...corev1.ContainerPort) *corev1.Pod {
	return &corev1.Pod{
		Spec:   corev1.PodSpec{Containers: []corev1.Container{{Ports: ports}}},
		Status: corev1.PodStatus{PodIPs: []corev1.PodIP{{IP: "10.0.0.1"}}},
	}
}

func TestHostPorts(t *testing.T) {
	host := Host{Name: "here", Addresses: addrs("192.0.2.1", "2001:db8::1"), NodePorts: addrs("192.0.2.9")}
	routed := host
	routed.PodRoutes = prefixes("10.0.0.0/24")
	own := host
	own.PodRoutes = prefixes()
	own.Addresses = addrs("192.0.2.1", "10.0.0.1")
	port := corev1.ContainerPort{ContainerPort: 8080, HostPort: 80}
	all := []string{"pod default/web:80/TCP IPv4 192.0.2.1:80/TCP to 10.0.0.1:8080"}
	edited := func(edit func(*corev1.Pod)) *corev1.Pod {
		pod := podWith(port)
		pod.Spec.NodeName = "here"
		edit(pod)
		return pod
	}
	hostIP := func(ip string) *corev1.Pod {
		return edited(func(p *corev1.Pod) { p.Spec.Containers[0].Ports[0].HostIP = ip })
	}
	for _, tt := range []struct {
		name     string
		host     Host
		pod      *corev1.Pod
		want     []string
		problems []string
	}{
		{"on this node", host, edited(func(*corev1.Pod) {}), all, nil},
		{"no Pod", host, nil, nil, nil},
		{"on another", host, edited(func(p *corev1.Pod) { p.Spec.NodeName = "there" }), nil, nil},
		{"the name of this node is not known", Host{Addresses: host.Addresses}, edited(func(*corev1.Pod) {}), nil, nil},
		{"no nodeName in a cluster", host, podWith(port), nil, nil},
		{"no nodeName, and a route", routed, podWith(port), all, nil},
		{"no nodeName, and the node's own address", own, podWith(port),
			append([]string{"pod default/web:80/TCP IPv4 10.0.0.1:80/TCP to 10.0.0.1:8080"}, all...), nil},
		{"a nodeName goes before a route", routed, edited(func(p *corev1.Pod) { p.Spec.NodeName = "there" }), nil, nil},
		{"hostNetwork", host, edited(func(p *corev1.Pod) { p.Spec.HostNetwork = true }), nil, nil},
		{"Succeeded", host, edited(func(p *corev1.Pod) { p.Status.Phase = corev1.PodSucceeded }), nil, nil},
		{"Failed", host, edited(func(p *corev1.Pod) { p.Status.Phase = corev1.PodFailed }), nil, nil},
		{"Running and not ready", host, edited(func(p *corev1.Pod) {
			p.Status.Phase = corev1.PodRunning
			p.Status.Conditions = []corev1.PodCondition{{Type: corev1.PodReady, Status: corev1.ConditionFalse}}
		}), all, nil},
		{"terminating", host, edited(func(p *corev1.Pod) { p.DeletionTimestamp = new(metav1.Now()) }), all, nil},
		{"no address yet", host, edited(func(p *corev1.Pod) { p.Status.PodIPs = nil }), nil, nil},
		{"podIP alone", host, edited(func(p *corev1.Pod) { p.Status = corev1.PodStatus{PodIP: "10.0.0.1"} }), all, nil},
		{"two families", host, edited(func(p *corev1.Pod) {
			p.Status.PodIPs = []corev1.PodIP{{IP: "fd00::1"}, {IP: "10.0.0.1"}, {IP: "10.0.0.2"}}
		}), append(all, "pod default/web:80/TCP IPv6 [2001:db8::1]:80/TCP to [fd00::1]:8080"), nil},
		{"a port without hostPort", host, edited(func(p *corev1.Pod) { p.Spec.Containers[0].Ports[0].HostPort = 0 }), nil, nil},
		{"a sidecar", host, edited(func(p *corev1.Pod) {
			p.Spec.InitContainers, p.Spec.Containers = p.Spec.Containers, nil
			p.Spec.InitContainers[0].RestartPolicy = new(corev1.ContainerRestartPolicyAlways)
		}), all, nil},
		{"an init container", host, edited(func(p *corev1.Pod) {
			p.Spec.InitContainers, p.Spec.Containers = p.Spec.Containers, nil
		}), nil, nil},
		{"two protocols", host, edited(func(p *corev1.Pod) {
			p.Spec.Containers[0].Ports = append(p.Spec.Containers[0].Ports,
				corev1.ContainerPort{ContainerPort: 8081, HostPort: 80, Protocol: "UDP"})
		}), append(all, "pod default/web:80/UDP IPv4 192.0.2.1:80/UDP to 10.0.0.1:8081"), nil},
		{"one hostPort twice: the first", host, edited(func(p *corev1.Pod) {
			p.Spec.Containers[0].Ports = append(p.Spec.Containers[0].Ports, corev1.ContainerPort{ContainerPort: 8081, HostPort: 80})
		}), all, nil},
		{"any and a hostIP: the hostIP where it is", host, edited(func(p *corev1.Pod) {
			p.Spec.Containers[0].Ports = append(p.Spec.Containers[0].Ports,
				corev1.ContainerPort{ContainerPort: 8081, HostPort: 80, HostIP: "192.0.2.1"})
		}), []string{"pod default/web:192.0.2.1:80/TCP IPv4 192.0.2.1:80/TCP to 10.0.0.1:8081"},
			[]string{"warning: spec.containers[0].ports[0].hostPort"}},
		{"hostIP", host, hostIP("192.0.2.1"), []string{"pod default/web:192.0.2.1:80/TCP IPv4 192.0.2.1:80/TCP to 10.0.0.1:8080"}, nil},
		{"hostIP 0.0.0.0", host, hostIP("0.0.0.0"), []string{"pod default/web:0.0.0.0:80/TCP IPv4 192.0.2.1:80/TCP to 10.0.0.1:8080"}, nil},
		{"hostIP of a family that the Pod has not", host, hostIP("::"), nil, nil},
		{"hostIP of another node", host, hostIP("192.0.2.2"), nil, []string{"warning: spec.containers[0].ports[0].hostIP"}},
		{"hostIP of loopback", host, hostIP("127.0.0.1"), nil, []string{"not yet: spec.containers[0].ports[0].hostIP"}},
		{"hostIP of loopback, IPv6", host, hostIP("::1"), nil, []string{"not yet: spec.containers[0].ports[0].hostIP"}},
		{"hostIP that is none", host, hostIP("x"), nil, []string{"warning: spec.containers[0].ports[0].hostIP"}},
		{"SCTP", host, edited(func(p *corev1.Pod) { p.Spec.Containers[0].Ports[0].Protocol = "SCTP" }), nil,
			[]string{"not yet: spec.containers[0].ports[0].protocol"}},
		{"no port number", host, edited(func(p *corev1.Pod) { p.Spec.Containers[0].Ports[0].HostPort = 65536 }), nil,
			[]string{"warning: spec.containers[0].ports[0].hostPort"}},
		{"no container port", host, edited(func(p *corev1.Pod) { p.Spec.Containers[0].Ports[0].ContainerPort = 0 }), nil,
			[]string{"warning: spec.containers[0].ports[0].containerPort"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			table := NewTable(Options{})
			table.SetHost(tt.host)
			state := follower{}
			state.apply(table.UpdatePod(defaultWeb, tt.pod))
			if diff := cmp.Diff(tt.want, hostPortText(state), equateEmpty); diff != "" {
				t.Errorf("frontends (-want +got):\n%s", diff)
			}
			if diff := cmp.Diff(tt.problems, fieldsOf(table.Problems())); diff != "" {
				t.Errorf("problems (-want +got):\n%s", diff)
			}
			for _, p := range table.Problems() {
				if p.Object != "Pod default/web" {
					t.Errorf("problem of %q", p.Object)
				}
			}

			late := NewTable(Options{}) // that learns of its node last
			late.UpdatePod(defaultWeb, tt.pod)
			state = follower{}
			state.apply(late.SetHost(tt.host))
			if diff := cmp.Diff(tt.want, hostPortText(state), equateEmpty); diff != "" {
				t.Errorf("frontends when the node comes last (-want +got):\n%s", diff)
			}
		})
	}
}

func hostPortText(f follower) (all []string) {
	for _, name := range slicesSorted(f) {
		for _, fe := range f[name].Frontends {
			all = append(all, name.String()+" "+fe.VIP.String()+" to "+f[name].Backends[0].Addr.String())
		}
	}
	return all
}
