// SPDX-License-Identifier: Apache-2.0

package manifest

import (
	"cmp"
	"strings"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
)

// setDefaults fills in what an API server would, as far as it needs no other object. What does (cluster IPs
// and node ports) is not allocated here.
func setDefaults(o object) {
	switch o := o.(type) {
	case *corev1.Service:
		defaultNamespace(&o.ObjectMeta)
		defaultService(o)
	case *discoveryv1.EndpointSlice:
		defaultNamespace(&o.ObjectMeta)
		for i := range o.Ports {
			p := &o.Ports[i]
			p.Name = cmp.Or(p.Name, new(""))
			p.Protocol = cmp.Or(p.Protocol, new(corev1.ProtocolTCP))
		}
	case *corev1.Pod:
		defaultNamespace(&o.ObjectMeta)
		defaultPod(o)
	case *legacyEndpoints:
		defaultNamespace(&o.ObjectMeta)
		for i := range o.Subsets {
			for j := range o.Subsets[i].Ports {
				p := &o.Subsets[i].Ports[j]
				p.Protocol = cmp.Or(p.Protocol, corev1.ProtocolTCP)
			}
		}
	}
}

func defaultNamespace(meta *metav1.ObjectMeta) {
	meta.Namespace = cmp.Or(meta.Namespace, metav1.NamespaceDefault)
}

func defaultPod(p *corev1.Pod) {
	for _, containers := range [][]corev1.Container{p.Spec.InitContainers, p.Spec.Containers} {
		for i := range containers {
			for j := range containers[i].Ports {
				port := &containers[i].Ports[j]
				port.Protocol = cmp.Or(port.Protocol, corev1.ProtocolTCP)
				if p.Spec.HostNetwork {
					port.HostPort = cmp.Or(port.HostPort, port.ContainerPort)
				}
			}
		}
	}
	// Of the two forms the older one has the say where they differ, as in the API.
	status := &p.Status
	if status.PodIP != "" && (len(status.PodIPs) == 0 || status.PodIPs[0].IP != status.PodIP) {
		status.PodIPs = []corev1.PodIP{{IP: status.PodIP}}
	}
}

func defaultService(svc *corev1.Service) {
	spec := &svc.Spec
	spec.Type = cmp.Or(spec.Type, corev1.ServiceTypeClusterIP)
	for i := range spec.Ports {
		p := &spec.Ports[i]
		p.Protocol = cmp.Or(p.Protocol, corev1.ProtocolTCP)
		if p.TargetPort == intstr.FromInt32(0) || p.TargetPort == intstr.FromString("") {
			p.TargetPort = intstr.FromInt32(p.Port)
		}
	}

	spec.SessionAffinity = cmp.Or(spec.SessionAffinity, corev1.ServiceAffinityNone)
	switch spec.SessionAffinity {
	case corev1.ServiceAffinityNone:
		spec.SessionAffinityConfig = nil // as the API server does, whatever it said
	case corev1.ServiceAffinityClientIP:
		c := spec.SessionAffinityConfig
		if c == nil || c.ClientIP == nil || c.ClientIP.TimeoutSeconds == nil {
			spec.SessionAffinityConfig = &corev1.SessionAffinityConfig{
				ClientIP: &corev1.ClientIPConfig{TimeoutSeconds: new(corev1.DefaultClientIPServiceAffinitySeconds)},
			}
		}
	}

	if spec.Type != corev1.ServiceTypeExternalName {
		spec.InternalTrafficPolicy = cmp.Or(spec.InternalTrafficPolicy, new(corev1.ServiceInternalTrafficPolicyCluster))
	}
	if externallyAccessible(spec) {
		spec.ExternalTrafficPolicy = cmp.Or(spec.ExternalTrafficPolicy, corev1.ServiceExternalTrafficPolicyCluster)
	}
	if spec.Type == corev1.ServiceTypeLoadBalancer {
		spec.AllocateLoadBalancerNodePorts = cmp.Or(spec.AllocateLoadBalancerNodePorts, new(true))
		for i := range svc.Status.LoadBalancer.Ingress {
			if in := &svc.Status.LoadBalancer.Ingress[i]; in.IP != "" {
				in.IPMode = cmp.Or(in.IPMode, new(corev1.LoadBalancerIPModeVIP))
			}
		}
	}
	for i, r := range spec.LoadBalancerSourceRanges {
		spec.LoadBalancerSourceRanges[i] = strings.TrimSpace(r)
	}

	if spec.Type == corev1.ServiceTypeExternalName {
		return
	}
	if len(spec.ClusterIPs) == 0 && spec.ClusterIP != "" {
		spec.ClusterIPs = []string{spec.ClusterIP}
	}
	if len(spec.IPFamilies) == 0 {
		for _, ip := range spec.ClusterIPs {
			if family := familyOf(ip); family != "" {
				spec.IPFamilies = append(spec.IPFamilies, family)
			}
		}
	}
	if spec.IPFamilyPolicy == nil && len(spec.IPFamilies) > 0 {
		policy := corev1.IPFamilyPolicySingleStack
		if len(spec.IPFamilies) > 1 {
			policy = corev1.IPFamilyPolicyRequireDualStack
		}
		spec.IPFamilyPolicy = &policy
	}
}

// externallyAccessible reports whether an external traffic policy means something to a Service.
func externallyAccessible(spec *corev1.ServiceSpec) bool {
	return spec.Type == corev1.ServiceTypeLoadBalancer || spec.Type == corev1.ServiceTypeNodePort ||
		spec.Type == corev1.ServiceTypeClusterIP && len(spec.ExternalIPs) > 0
}
