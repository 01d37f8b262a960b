// SPDX-License-Identifier: Apache-2.0

package manifest

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	apivalidation "k8s.io/apimachinery/pkg/api/validation"
	metavalidation "k8s.io/apimachinery/pkg/apis/meta/v1/validation"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/apimachinery/pkg/util/validation"
	"k8s.io/apimachinery/pkg/util/validation/field"
)

// Limits of the API server.
const (
	maxAffinitySeconds   = 86400
	maxEndpoints         = 1000  // of a slice
	maxEndpointAddresses = 100   // of an endpoint
	maxEndpointPorts     = 20000 // of a slice
	maxHints             = 8     // zones, and nodes, of an endpoint
	kubeletPort          = 10250
)

// validate says what an API server would refuse of an object that has its defaults. Of Pods, Nodes and
// Endpoints only what concerns a load balancer is looked at.
func validate(o object) field.ErrorList {
	metadata := field.NewPath("metadata")
	switch o := o.(type) {
	case *corev1.Service:
		// A label of RFC 1123: an API server of 1.34 refuses one that begins with a digit, newer ones do not.
		errs := apivalidation.ValidateObjectMeta(&o.ObjectMeta, true, apivalidation.NameIsDNSLabel, metadata)
		return append(errs, validateService(o)...)
	case *discoveryv1.EndpointSlice:
		errs := apivalidation.ValidateObjectMeta(&o.ObjectMeta, true, apivalidation.NameIsDNSSubdomain, metadata)
		return append(errs, validateEndpointSlice(o)...)
	case *corev1.Node:
		errs := apivalidation.ValidateObjectMeta(&o.ObjectMeta, false, apivalidation.NameIsDNSSubdomain, metadata)
		return append(errs, validateNode(o)...)
	case *corev1.Pod:
		errs := apivalidation.ValidateObjectMeta(&o.ObjectMeta, true, apivalidation.NameIsDNSSubdomain, metadata)
		return append(errs, validatePod(o)...)
	case *legacyEndpoints:
		errs := apivalidation.ValidateObjectMeta(&o.ObjectMeta, true, apivalidation.NameIsDNSSubdomain, metadata)
		return append(errs, validateEndpoints(o)...)
	}
	return nil
}

func validateService(svc *corev1.Service) (errs field.ErrorList) {
	spec, path := &svc.Spec, field.NewPath("spec")
	headless := spec.ClusterIP == corev1.ClusterIPNone

	errs = append(errs, oneOf(path.Child("type"), spec.Type, corev1.ServiceTypeClusterIP, corev1.ServiceTypeExternalName,
		corev1.ServiceTypeLoadBalancer, corev1.ServiceTypeNodePort)...)
	switch {
	case spec.Type == corev1.ServiceTypeExternalName:
		errs = append(errs, validateExternalName(spec, path)...)
	case headless && (spec.Type == corev1.ServiceTypeNodePort || spec.Type == corev1.ServiceTypeLoadBalancer):
		errs = append(errs, field.Invalid(path.Child("clusterIPs").Index(0), spec.ClusterIP,
			fmt.Sprintf("may not be set to 'None' for %s services", spec.Type)))
	}
	if spec.Type != corev1.ServiceTypeExternalName {
		errs = append(errs, validateClusterIPs(spec, path)...)
	}
	if len(spec.Ports) == 0 && !headless && spec.Type != corev1.ServiceTypeExternalName {
		errs = append(errs, field.Required(path.Child("ports"), ""))
	}
	errs = append(errs, validateServicePorts(spec, path.Child("ports"))...)
	errs = append(errs, metavalidation.ValidateLabels(spec.Selector, path.Child("selector"))...)
	errs = append(errs, validateAffinity(spec, path)...)
	errs = append(errs, validatePolicies(spec, path)...)
	for i, ip := range spec.ExternalIPs {
		errs = append(errs, usableIP(path.Child("externalIPs").Index(i), ip)...)
	}
	errs = append(errs, validateLoadBalancer(svc, path)...)
	return errs
}

func validateExternalName(spec *corev1.ServiceSpec, path *field.Path) (errs field.ErrorList) {
	forbid := func(child string, set bool) {
		if set {
			errs = append(errs, field.Forbidden(path.Child(child), "may not be set for ExternalName services"))
		}
	}
	forbid("clusterIP", spec.ClusterIP != "")
	forbid("clusterIPs", len(spec.ClusterIPs) > 0)
	forbid("ipFamilies", len(spec.IPFamilies) > 0)
	forbid("ipFamilyPolicy", spec.IPFamilyPolicy != nil)
	name := strings.TrimSuffix(spec.ExternalName, ".")
	if name == "" {
		return append(errs, field.Required(path.Child("externalName"), ""))
	}
	return append(errs, invalid(path.Child("externalName"), spec.ExternalName, validation.IsDNS1123Subdomain(name))...)
}

func validateClusterIPs(spec *corev1.ServiceSpec, path *field.Path) (errs field.ErrorList) {
	ips, families := path.Child("clusterIPs"), path.Child("ipFamilies")
	switch {
	case spec.ClusterIP == "" && len(spec.ClusterIPs) > 0:
		errs = append(errs, field.Invalid(ips, spec.ClusterIPs, "must be empty when `clusterIP` is not specified"))
	case spec.ClusterIP != "" && spec.ClusterIPs[0] != spec.ClusterIP:
		errs = append(errs, field.Invalid(ips, spec.ClusterIPs, "first value must match `clusterIP`"))
	}
	if len(spec.ClusterIPs) > 2 {
		errs = append(errs, field.Invalid(ips, spec.ClusterIPs, "may only hold up to 2 values"))
	}
	if slices.Contains(spec.ClusterIPs, corev1.ClusterIPNone) {
		if len(spec.ClusterIPs) > 1 {
			errs = append(errs, field.Invalid(ips, spec.ClusterIPs, "'None' must be the first and only value"))
		}
	} else {
		seen := map[corev1.IPFamily]bool{}
		for i, ip := range spec.ClusterIPs {
			bad := usableIP(ips.Index(i), ip)
			errs = append(errs, bad...)
			family := familyOf(ip)
			switch {
			case len(bad) > 0:
			case seen[family]:
				errs = append(errs, field.Invalid(ips.Index(i), ip, fmt.Sprintf("may only hold one value of %s", family)))
			case i < len(spec.IPFamilies) && spec.IPFamilies[i] != family:
				errs = append(errs, field.Invalid(ips.Index(i), ip,
					fmt.Sprintf("expected an %s value as indicated by `ipFamilies[%d]`", spec.IPFamilies[i], i)))
			}
			seen[family] = true
		}
	}
	for i, f := range spec.IPFamilies {
		errs = append(errs, oneOf(families.Index(i), f, corev1.IPv4Protocol, corev1.IPv6Protocol)...)
		if slices.Contains(spec.IPFamilies[:i], f) {
			errs = append(errs, field.Duplicate(families.Index(i), f))
		}
	}
	if spec.IPFamilyPolicy != nil {
		errs = append(errs, oneOf(path.Child("ipFamilyPolicy"), *spec.IPFamilyPolicy, corev1.IPFamilyPolicySingleStack,
			corev1.IPFamilyPolicyPreferDualStack, corev1.IPFamilyPolicyRequireDualStack)...)
		if *spec.IPFamilyPolicy == corev1.IPFamilyPolicySingleStack && (len(spec.IPFamilies) > 1 || len(spec.ClusterIPs) > 1) {
			errs = append(errs, field.Invalid(path.Child("ipFamilyPolicy"), *spec.IPFamilyPolicy,
				"must be 'RequireDualStack' or 'PreferDualStack' when multiple IP families are specified"))
		}
	}
	return errs
}

func validateServicePorts(spec *corev1.ServiceSpec, path *field.Path) (errs field.ErrorList) {
	type number struct {
		protocol corev1.Protocol
		port     int32
	}
	names, ports, nodePorts := map[string]bool{}, map[number]bool{}, map[number]bool{}
	for i, p := range spec.Ports {
		path := path.Index(i)
		switch {
		case p.Name == "" && len(spec.Ports) > 1:
			errs = append(errs, field.Required(path.Child("name"), ""))
		case p.Name != "":
			errs = append(errs, invalid(path.Child("name"), p.Name, validation.IsDNS1123Label(p.Name))...)
			if names[p.Name] {
				errs = append(errs, field.Duplicate(path.Child("name"), p.Name))
			}
			names[p.Name] = true
		}
		errs = append(errs, portNumber(path.Child("port"), p.Port)...)
		errs = append(errs, protocol(path.Child("protocol"), p.Protocol)...)
		switch p.TargetPort.Type {
		case intstr.Int:
			// Without one it is the port, and that was looked at.
			if p.TargetPort.IntVal != p.Port {
				errs = append(errs, portNumber(path.Child("targetPort"), p.TargetPort.IntVal)...)
			}
		case intstr.String:
			errs = append(errs, invalid(path.Child("targetPort"), p.TargetPort.StrVal,
				validation.IsValidPortName(p.TargetPort.StrVal))...)
		}
		errs = append(errs, appProtocol(path.Child("appProtocol"), p.AppProtocol)...)
		if n := (number{p.Protocol, p.Port}); ports[n] {
			errs = append(errs, field.Duplicate(path, fmt.Sprintf("port %d/%s", p.Port, p.Protocol)))
		} else {
			ports[n] = true
		}

		if spec.Type == corev1.ServiceTypeLoadBalancer && p.Port == kubeletPort {
			errs = append(errs, field.Invalid(path, p.Port,
				fmt.Sprintf("may not expose port %d externally since it is used by kubelet", kubeletPort)))
		}
		if p.NodePort == 0 {
			continue
		}
		if spec.Type == corev1.ServiceTypeClusterIP || spec.Type == corev1.ServiceTypeExternalName {
			errs = append(errs, field.Forbidden(path.Child("nodePort"), fmt.Sprintf("may not be used when `type` is '%s'", spec.Type)))
			continue
		}
		errs = append(errs, portNumber(path.Child("nodePort"), p.NodePort)...)
		if n := (number{p.Protocol, p.NodePort}); nodePorts[n] {
			errs = append(errs, field.Duplicate(path.Child("nodePort"), p.NodePort))
		} else {
			nodePorts[n] = true
		}
	}
	return errs
}

func validateAffinity(spec *corev1.ServiceSpec, path *field.Path) (errs field.ErrorList) {
	errs = oneOf(path.Child("sessionAffinity"), spec.SessionAffinity, corev1.ServiceAffinityClientIP, corev1.ServiceAffinityNone)
	if spec.SessionAffinity != corev1.ServiceAffinityClientIP {
		return errs
	}
	timeout := *spec.SessionAffinityConfig.ClientIP.TimeoutSeconds
	return append(errs, invalid(path.Child("sessionAffinityConfig", "clientIP", "timeoutSeconds"), timeout,
		validation.IsInRange(int(timeout), 1, maxAffinitySeconds))...)
}

func validatePolicies(spec *corev1.ServiceSpec, path *field.Path) (errs field.ErrorList) {
	if p := spec.InternalTrafficPolicy; p != nil {
		errs = append(errs, oneOf(path.Child("internalTrafficPolicy"), *p,
			corev1.ServiceInternalTrafficPolicyCluster, corev1.ServiceInternalTrafficPolicyLocal)...)
	}
	switch {
	case externallyAccessible(spec):
		errs = append(errs, oneOf(path.Child("externalTrafficPolicy"), spec.ExternalTrafficPolicy,
			corev1.ServiceExternalTrafficPolicyCluster, corev1.ServiceExternalTrafficPolicyLocal)...)
	case spec.ExternalTrafficPolicy != "":
		errs = append(errs, field.Invalid(path.Child("externalTrafficPolicy"), spec.ExternalTrafficPolicy,
			"may only be set for externally-accessible services"))
	}
	if d := spec.TrafficDistribution; d != nil {
		errs = append(errs, oneOf(path.Child("trafficDistribution"), *d, corev1.ServiceTrafficDistributionPreferClose,
			corev1.ServiceTrafficDistributionPreferSameNode, corev1.ServiceTrafficDistributionPreferSameZone)...)
	}
	return errs
}

func validateLoadBalancer(svc *corev1.Service, path *field.Path) (errs field.ErrorList) {
	spec := &svc.Spec
	isLB := spec.Type == corev1.ServiceTypeLoadBalancer
	only := func(child string, set bool) {
		if set && !isLB {
			errs = append(errs, field.Forbidden(path.Child(child), "may only be used when `type` is 'LoadBalancer'"))
		}
	}
	only("loadBalancerSourceRanges", len(spec.LoadBalancerSourceRanges) > 0)
	only("allocateLoadBalancerNodePorts", spec.AllocateLoadBalancerNodePorts != nil)
	only("loadBalancerClass", spec.LoadBalancerClass != nil)
	for i, r := range spec.LoadBalancerSourceRanges {
		errs = append(errs, validation.IsValidCIDRForLegacyField(path.Child("loadBalancerSourceRanges").Index(i), r, false, nil)...)
	}
	if c := spec.LoadBalancerClass; c != nil {
		errs = append(errs, metavalidation.ValidateLabelName(*c, path.Child("loadBalancerClass"))...)
	}
	if spec.LoadBalancerIP != "" && isLB {
		errs = append(errs, usableIP(path.Child("loadBalancerIP"), spec.LoadBalancerIP)...)
	}
	if p := spec.HealthCheckNodePort; p != 0 {
		errs = append(errs, portNumber(path.Child("healthCheckNodePort"), p)...)
		if !isLB || spec.ExternalTrafficPolicy != corev1.ServiceExternalTrafficPolicyLocal {
			errs = append(errs, field.Invalid(path.Child("healthCheckNodePort"), p,
				"may only be set when `type` is 'LoadBalancer' and `externalTrafficPolicy` is 'Local'"))
		}
	}

	ingress := field.NewPath("status", "loadBalancer", "ingress")
	for i, in := range svc.Status.LoadBalancer.Ingress {
		path := ingress.Index(i)
		if in.IP != "" {
			errs = append(errs, validation.IsValidIPForLegacyField(path.Child("ip"), in.IP, true, nil)...)
		}
		if in.IPMode != nil {
			errs = append(errs, oneOf(path.Child("ipMode"), *in.IPMode, corev1.LoadBalancerIPModeProxy, corev1.LoadBalancerIPModeVIP)...)
			if in.IP == "" {
				errs = append(errs, field.Forbidden(path.Child("ipMode"), "may not be specified when `ip` is not set"))
			}
		}
		if in.Hostname != "" {
			errs = append(errs, invalid(path.Child("hostname"), in.Hostname, validation.IsDNS1123Subdomain(in.Hostname))...)
		}
	}
	return errs
}

func validateEndpointSlice(s *discoveryv1.EndpointSlice) (errs field.ErrorList) {
	if s.AddressType == "" {
		errs = append(errs, field.Required(field.NewPath("addressType"), ""))
	} else {
		errs = append(errs, oneOf(field.NewPath("addressType"), s.AddressType,
			discoveryv1.AddressTypeFQDN, discoveryv1.AddressTypeIPv4, discoveryv1.AddressTypeIPv6)...)
	}
	path := field.NewPath("endpoints")
	if len(s.Endpoints) > maxEndpoints {
		errs = append(errs, field.TooMany(path, len(s.Endpoints), maxEndpoints))
	} else {
		for i := range s.Endpoints {
			errs = append(errs, validateEndpoint(s.AddressType, &s.Endpoints[i], path.Index(i))...)
		}
	}

	path = field.NewPath("ports")
	if len(s.Ports) > maxEndpointPorts {
		return append(errs, field.TooMany(path, len(s.Ports), maxEndpointPorts))
	}
	names := map[string]bool{}
	for i, p := range s.Ports {
		path := path.Index(i)
		if *p.Name != "" {
			errs = append(errs, invalid(path.Child("name"), *p.Name, validation.IsDNS1123Label(*p.Name))...)
		}
		if names[*p.Name] {
			errs = append(errs, field.Duplicate(path.Child("name"), *p.Name))
		}
		names[*p.Name] = true
		errs = append(errs, protocol(path.Child("protocol"), *p.Protocol)...)
		if p.Port != nil { // none is all of them
			errs = append(errs, portNumber(path.Child("port"), *p.Port)...)
		}
		errs = append(errs, appProtocol(path.Child("appProtocol"), p.AppProtocol)...)
	}
	return errs
}

func validateEndpoint(addresses discoveryv1.AddressType, e *discoveryv1.Endpoint, path *field.Path) (errs field.ErrorList) {
	child := path.Child("addresses")
	switch {
	case len(e.Addresses) == 0:
		errs = append(errs, field.Required(child, "must contain at least 1 address"))
	case len(e.Addresses) > maxEndpointAddresses:
		errs = append(errs, field.TooMany(child, len(e.Addresses), maxEndpointAddresses))
	}
	for i, a := range e.Addresses {
		switch addresses {
		case discoveryv1.AddressTypeIPv4, discoveryv1.AddressTypeIPv6:
			bad := usableIP(child.Index(i), a)
			if len(bad) == 0 && string(familyOf(a)) != string(addresses) {
				bad = field.ErrorList{field.Invalid(child.Index(i), a, fmt.Sprintf("must be an %s address", addresses))}
			}
			errs = append(errs, bad...)
		case discoveryv1.AddressTypeFQDN:
			errs = append(errs, validation.IsFullyQualifiedDomainName(child.Index(i), a)...)
		}
	}
	if e.NodeName != nil {
		errs = append(errs, invalid(path.Child("nodeName"), *e.NodeName, apivalidation.NameIsDNSSubdomain(*e.NodeName, false))...)
	}
	if e.Hostname != nil {
		errs = append(errs, invalid(path.Child("hostname"), *e.Hostname, validation.IsDNS1123Label(*e.Hostname))...)
	}
	if e.Hints == nil {
		return errs
	}
	zones, nodes := path.Child("hints", "forZones"), path.Child("hints", "forNodes")
	if len(e.Hints.ForZones) > maxHints {
		errs = append(errs, field.TooMany(zones, len(e.Hints.ForZones), maxHints))
	}
	if len(e.Hints.ForNodes) > maxHints {
		errs = append(errs, field.TooMany(nodes, len(e.Hints.ForNodes), maxHints))
	}
	for i, z := range e.Hints.ForZones {
		errs = append(errs, invalid(zones.Index(i).Child("name"), z.Name, validation.IsValidLabelValue(z.Name))...)
	}
	for i, n := range e.Hints.ForNodes {
		errs = append(errs, invalid(nodes.Index(i).Child("name"), n.Name, apivalidation.NameIsDNSSubdomain(n.Name, false))...)
	}
	return errs
}

func validateNode(n *corev1.Node) (errs field.ErrorList) {
	for i, a := range n.Status.Addresses {
		if a.Type == corev1.NodeInternalIP || a.Type == corev1.NodeExternalIP {
			path := field.NewPath("status", "addresses").Index(i).Child("address")
			errs = append(errs, validation.IsValidIPForLegacyField(path, a.Address, true, nil)...)
		}
	}
	for i, c := range n.Spec.PodCIDRs {
		errs = append(errs, validation.IsValidCIDRForLegacyField(field.NewPath("spec", "podCIDRs").Index(i), c, false, nil)...)
	}
	return errs
}

func validatePod(p *corev1.Pod) (errs field.ErrorList) {
	spec := field.NewPath("spec")
	if p.Spec.NodeName != "" {
		errs = append(errs, invalid(spec.Child("nodeName"), p.Spec.NodeName, apivalidation.NameIsDNSSubdomain(p.Spec.NodeName, false))...)
	}
	hostPorts := map[string]bool{}
	for i, c := range p.Spec.InitContainers {
		// Those that end before the others begin may have the same hostPorts.
		sidecar := c.RestartPolicy != nil && *c.RestartPolicy == corev1.ContainerRestartPolicyAlways
		its := hostPorts
		if !sidecar {
			its = map[string]bool{}
		}
		errs = append(errs, validateContainerPorts(c.Ports, p.Spec.HostNetwork, its, spec.Child("initContainers").Index(i).Child("ports"))...)
	}
	for i, c := range p.Spec.Containers {
		errs = append(errs, validateContainerPorts(c.Ports, p.Spec.HostNetwork, hostPorts, spec.Child("containers").Index(i).Child("ports"))...)
	}

	status := field.NewPath("status")
	if p.Status.Phase != "" {
		errs = append(errs, oneOf(status.Child("phase"), p.Status.Phase, corev1.PodPending, corev1.PodRunning, corev1.PodSucceeded,
			corev1.PodFailed, corev1.PodUnknown)...)
	}
	families := map[corev1.IPFamily]bool{}
	for i, ip := range p.Status.PodIPs {
		path := status.Child("podIPs").Index(i).Child("ip")
		bad := validation.IsValidIPForLegacyField(path, ip.IP, true, nil)
		errs = append(errs, bad...)
		if family := familyOf(ip.IP); len(bad) == 0 && families[family] {
			errs = append(errs, field.Invalid(path, ip.IP, fmt.Sprintf("may only hold one value of %s", family)))
		} else {
			families[family] = true
		}
	}
	return errs
}

// validateContainerPorts looks at the ports of one container. hostPorts are those of the containers before it.
func validateContainerPorts(ports []corev1.ContainerPort, hostNetwork bool, hostPorts map[string]bool, path *field.Path) (errs field.ErrorList) {
	names := map[string]bool{}
	for i, port := range ports {
		path := path.Index(i)
		if port.Name != "" {
			errs = append(errs, invalid(path.Child("name"), port.Name, validation.IsValidPortName(port.Name))...)
			if names[port.Name] {
				errs = append(errs, field.Duplicate(path.Child("name"), port.Name))
			}
			names[port.Name] = true
		}
		errs = append(errs, portNumber(path.Child("containerPort"), port.ContainerPort)...)
		errs = append(errs, protocol(path.Child("protocol"), port.Protocol)...)
		if port.HostIP != "" {
			errs = append(errs, validation.IsValidIPForLegacyField(path.Child("hostIP"), port.HostIP, true, nil)...)
		}
		if port.HostPort == 0 {
			continue
		}
		errs = append(errs, portNumber(path.Child("hostPort"), port.HostPort)...)
		if hostNetwork && port.HostPort != port.ContainerPort {
			errs = append(errs, field.Invalid(path.Child("hostPort"), port.HostPort, "must match `containerPort` when `hostNetwork` is true"))
		}
		at := fmt.Sprintf("%s/%s/%d", port.Protocol, port.HostIP, port.HostPort)
		if hostPorts[at] {
			errs = append(errs, field.Duplicate(path.Child("hostPort"), at))
		}
		hostPorts[at] = true
	}
	return errs
}

func validateEndpoints(e *legacyEndpoints) (errs field.ErrorList) {
	for i, s := range e.Subsets {
		path := field.NewPath("subsets").Index(i)
		for j, a := range s.Addresses {
			errs = append(errs, usableIP(path.Child("addresses").Index(j).Child("ip"), a.IP)...)
		}
		for j, a := range s.NotReadyAddresses {
			errs = append(errs, usableIP(path.Child("notReadyAddresses").Index(j).Child("ip"), a.IP)...)
		}
		for j, p := range s.Ports {
			path := path.Child("ports").Index(j)
			if p.Name == "" && len(s.Ports) > 1 {
				errs = append(errs, field.Required(path.Child("name"), ""))
			} else if p.Name != "" {
				errs = append(errs, invalid(path.Child("name"), p.Name, validation.IsDNS1123Label(p.Name))...)
			}
			errs = append(errs, portNumber(path.Child("port"), p.Port)...)
			errs = append(errs, protocol(path.Child("protocol"), p.Protocol)...)
		}
	}
	return errs
}

// familyOf is the family of an address, "" if it is none.
func familyOf(ip string) corev1.IPFamily {
	a, err := netip.ParseAddr(ip)
	switch {
	case err != nil:
		return ""
	case a.Is4():
		return corev1.IPv4Protocol
	}
	return corev1.IPv6Protocol
}

// usableIP allows the addresses that packets may be sent to by a load balancer.
func usableIP(path *field.Path, ip string) field.ErrorList {
	if errs := validation.IsValidIPForLegacyField(path, ip, true, nil); len(errs) > 0 {
		return errs
	}
	why := ""
	switch a := netip.MustParseAddr(ip); { // the check above parses with netip too
	case a.IsUnspecified():
		why = "may not be unspecified (0.0.0.0 or ::)"
	case a.IsLoopback():
		why = "may not be in the loopback range (127.0.0.0/8, ::1/128)"
	case a.IsLinkLocalUnicast():
		why = "may not be in the link-local range (169.254.0.0/16, fe80::/10)"
	case a.IsMulticast():
		why = "may not be a multicast address (224.0.0.0/4, ff00::/8)"
	default:
		return nil
	}
	return field.ErrorList{field.Invalid(path, ip, why)}
}

func oneOf[T ~string](path *field.Path, value T, allowed ...T) field.ErrorList {
	if slices.Contains(allowed, value) {
		return nil
	}
	return field.ErrorList{field.NotSupported(path, value, allowed)}
}

func protocol(path *field.Path, p corev1.Protocol) field.ErrorList {
	return oneOf(path, p, corev1.ProtocolSCTP, corev1.ProtocolTCP, corev1.ProtocolUDP)
}

func portNumber(path *field.Path, port int32) field.ErrorList {
	return invalid(path, port, validation.IsValidPortNum(int(port)))
}

func appProtocol(path *field.Path, p *string) field.ErrorList {
	if p == nil {
		return nil
	}
	return metavalidation.ValidateLabelName(*p, path)
}

// invalid makes errors of what the library's checks of plain values return.
func invalid(path *field.Path, value any, messages []string) (errs field.ErrorList) {
	for _, m := range messages {
		errs = append(errs, field.Invalid(path, value, m))
	}
	return errs
}
