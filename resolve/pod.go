// SPDX-License-Identifier: Apache-2.0

package resolve

import (
	"fmt"
	"net/netip"
	"slices"
	"strconv"

	corev1 "k8s.io/api/core/v1"

	"github.com/lbagent/lbagent/lb"
)

// hostPort is a port of a Pod that is served at addresses of its node.
type hostPort struct {
	port  *corev1.ContainerPort
	field string
}

// resolvePod says which hostPorts a Pod asks for. Only those of Pods on this node are served here, ready or
// not, as long as their containers may run: while one terminates, too.
func resolvePod(name Name, pod *corev1.Pod, host *reader) object {
	if pod == nil || pod.Spec.HostNetwork || // what is on the host network has its ports anyway
		pod.Status.Phase == corev1.PodSucceeded || pod.Status.Phase == corev1.PodFailed {
		return object{}
	}
	ports := hostPorts(&pod.Spec)
	ips := podIPs(&pod.Status)
	if len(ports) == 0 || !slices.ContainsFunc(ips, func(ip netip.Addr) bool { return host.isHere(pod.Spec.NodeName, ip) }) {
		return object{}
	}
	var o object
	var wishes []wish
	targets := map[string]int32{} // the container port of a hostPort, by the name of its service
	for _, p := range ports {
		w, wrong := hostPortFrontends(p, ips, host)
		for i := range w {
			if key := w[i].port + "/" + w[i].frontend.VIP.Protocol.String(); targets[key] == 0 {
				targets[key] = p.port.ContainerPort
			}
		}
		wishes, o.problems = append(wishes, w...), append(o.problems, wrong...)
	}
	var wrong []lb.Problem
	o.services, o.claims, wrong = services(lb.ServiceName{Namespace: name.Namespace, Name: name.Name, Pod: true},
		pod.CreationTimestamp.Time, wishes)
	o.problems = append(o.problems, wrong...)
	for service, s := range o.services {
		target, _ := portNumber(targets[service.Port+"/"+service.Protocol.String()])
		i := slices.IndexFunc(ips, func(ip netip.Addr) bool { return lb.FamilyOf(ip) == service.Family })
		s.Backends = []lb.Backend{{Addr: netip.AddrPortFrom(ips[i], target), Cluster: true, Weight: 1}}
		o.services[service] = s
	}
	return o
}

// hostPorts returns the ports of a Pod that have a hostPort: those of its containers and of its sidecars, which
// are init containers that go on.
func hostPorts(spec *corev1.PodSpec) (all []hostPort) {
	appendOf := func(c *corev1.Container, field string) {
		for i := range c.Ports {
			if c.Ports[i].HostPort != 0 {
				all = append(all, hostPort{&c.Ports[i], fmt.Sprintf("%s.ports[%d]", field, i)})
			}
		}
	}
	for i := range spec.InitContainers {
		if deref(spec.InitContainers[i].RestartPolicy, "") == corev1.ContainerRestartPolicyAlways {
			appendOf(&spec.InitContainers[i], fmt.Sprintf("spec.initContainers[%d]", i))
		}
	}
	for i := range spec.Containers {
		appendOf(&spec.Containers[i], fmt.Sprintf("spec.containers[%d]", i))
	}
	return all
}

// podIPs returns the address of a Pod in each family that it has.
func podIPs(status *corev1.PodStatus) (ips []netip.Addr) {
	given := status.PodIPs
	if len(given) == 0 {
		given = []corev1.PodIP{{IP: status.PodIP}}
	}
	for _, s := range given {
		addr, ok := parseAddr(s.IP)
		if ok && !slices.ContainsFunc(ips, func(ip netip.Addr) bool { return lb.FamilyOf(ip) == lb.FamilyOf(addr) }) {
			ips = append(ips, addr)
		}
	}
	return ips
}

// hostPortFrontends returns where a hostPort is served: at its hostIP, or, where it has none or an unspecified
// one, at every address of the node, of the families that the Pod has.
func hostPortFrontends(p hostPort, ips []netip.Addr, host *reader) (wishes []wish, problems []lb.Problem) {
	protocol := protocolOf(p.port.Protocol)
	number, ok := portNumber(p.port.HostPort)
	_, targetOK := portNumber(p.port.ContainerPort)
	switch {
	case !served(protocol):
		return nil, []lb.Problem{notYet(p.field+".protocol", "%s is not yet served", p.port.Protocol)}
	case !ok:
		return nil, []lb.Problem{warning(p.field+".hostPort", "%d is not a port number", p.port.HostPort)}
	case !targetOK:
		return nil, []lb.Problem{warning(p.field+".containerPort", "%d is not a port number", p.port.ContainerPort)}
	}
	ask := func(addr netip.Addr, class class, name string) {
		if slices.ContainsFunc(ips, func(ip netip.Addr) bool { return lb.FamilyOf(ip) == lb.FamilyOf(addr) }) {
			vip := lb.VIP{Addr: addr, Port: number, Protocol: protocol}
			wishes = append(wishes, wish{lb.Frontend{VIP: vip, Kind: lb.HostPort}, class, name, p.field + ".hostPort"})
		}
	}
	if p.port.HostIP == "" {
		for _, addr := range host.addresses() {
			ask(addr, hostPortAny, strconv.Itoa(int(number)))
		}
		return wishes, nil
	}
	field := p.field + ".hostIP"
	hostIP, ok := parseAddr(p.port.HostIP)
	switch {
	case !ok:
		problems = append(problems, warning(field, "%q is not an IP address", p.port.HostIP))
	case hostIP.IsUnspecified():
		for _, addr := range host.addresses() {
			if lb.FamilyOf(addr) == lb.FamilyOf(hostIP) {
				ask(addr, hostPortAny, netip.AddrPortFrom(hostIP, number).String())
			}
		}
	case hostIP.IsLoopback():
		problems = append(problems, notYet(field, "hostPorts at loopback addresses are not yet served"))
	case !slices.Contains(host.addresses(), hostIP):
		problems = append(problems, warning(field, "%s is not an address of this node; it is served once it is", hostIP))
	default:
		ask(hostIP, hostPortAt, netip.AddrPortFrom(hostIP, number).String())
	}
	return wishes, problems
}

// podEndpoints returns the one endpoint of a hostPort, for people.
func podEndpoints(s lb.Service, n *node) (all []lb.Endpoint) {
	for _, b := range s.Backends {
		all = append(all, lb.Endpoint{Addr: b.Addr, Node: n.name, Zone: n.zone, Weight: b.Weight})
	}
	return all
}
