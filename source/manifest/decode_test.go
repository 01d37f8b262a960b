// SPDX-License-Identifier: Apache-2.0

package manifest

import (
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/yaml"

	"github.com/lbagent/lbagent/lb"
)

// lines is problems as an operator reads them.
func lines(problems []lb.Problem) (s []string) {
	for _, p := range problems {
		prefix := ""
		if p.Severity != lb.Error {
			prefix = p.Severity.String() + ": "
		}
		s = append(s, prefix+p.Error())
	}
	return s
}

// serviceWith is a Service default/web with the lines of its spec.
func serviceWith(spec ...string) string {
	return "apiVersion: v1\nkind: Service\nmetadata:\n  name: web\nspec:\n  " + strings.Join(spec, "\n  ") + "\n"
}

// podWith is a Pod default/p with more lines of its spec.
func podWith(spec string) string {
	return "apiVersion: v1\nkind: Pod\nmetadata: {name: p}\nspec:\n  " + spec
}

// sliceWith is an EndpointSlice default/web-1 of IPv4 with more lines.
func sliceWith(more ...string) string {
	return "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata:\n  name: web-1\n" +
		"addressType: IPv4\n" + strings.Join(more, "\n") + "\n"
}

const (
	webProblem   = "f.yaml: document 1: Service default/web: "
	podProblem   = "f.yaml: document 1: Pod default/p: "
	sliceProblem = "f.yaml: document 1: EndpointSlice default/web-1: "
)

func TestProblems(t *testing.T) {
	const port80 = "ports: [{port: 80}]"
	const protocols = `supported values: "SCTP", "TCP", "UDP"`
	const notRead = "is not read, only v1 Service, Pod, Node and Endpoints, discovery.k8s.io/v1 EndpointSlice, and lists of them"
	tests := []struct {
		name string
		file string // "f.yaml"
		text string
		want []string
	}{
		// What is no manifest.
		{name: "empty", text: "", want: []string{"f.yaml: empty: to remove its objects delete the file"}},
		{name: "blank", text: " \n\n", want: []string{"f.yaml: empty: to remove its objects delete the file"}},
		{name: "comments only", text: "# a\n---\n# b\n...\n", want: []string{"f.yaml: empty: to remove its objects delete the file"}},
		{name: "empty JSON", file: "f.json", text: "\n", want: []string{"f.json: empty: to remove its objects delete the file"}},
		{name: "binary", text: "\x7fELF\x02\x01\x01\x00\x00", want: []string{"f.yaml: not a text file: byte 0 at offset 7"}},
		{name: "not UTF-8", text: "a: \xff\xfe", want: []string{"f.yaml: not a text file: not UTF-8"}},
		{name: "scalar", text: "hello", want: []string{"f.yaml: document 1: must be a mapping, not a string"}},
		{name: "sequence", text: "- a\n", want: []string{"f.yaml: document 1: must be a mapping, not a list"}},
		{name: "no apiVersion", text: "kind: Service\n", want: []string{"f.yaml: document 1: Service: apiVersion: Required value"}},
		{name: "no kind", text: "apiVersion: v1\n", want: []string{"f.yaml: document 1: kind: Required value"}},
		{name: "neither", text: "metadata: {name: web}\n", want: []string{"f.yaml: document 1: kind: Required value"}},
		{name: "kind of a wrong type", text: "apiVersion: v1\nkind: [Service]\n",
			want: []string{"f.yaml: document 1: kind: must be a string, not a list"}},
		{name: "other kind", text: "apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: web, namespace: shop}\n",
			want: []string{"f.yaml: document 1: Deployment shop/web: Deployment of apps/v1 " + notRead}},
		{name: "other version", text: "apiVersion: discovery.k8s.io/v1beta1\nkind: EndpointSlice\nmetadata: {name: web-1}\n",
			want: []string{"f.yaml: document 1: EndpointSlice default/web-1: EndpointSlice of discovery.k8s.io/v1beta1 " + notRead}},
		{name: "other list", text: "apiVersion: v1\nkind: SecretList\nitems: []\n",
			want: []string{"f.yaml: document 1: SecretList: SecretList of v1 " + notRead}},

		// What does not parse.
		{name: "cut in a flow", text: "apiVersion: v1\nkind: Service\nmetadata: {name: web\n",
			want: []string{"f.yaml: document 1: does not parse: line 3: did not find expected ',' or '}'"}},
		{name: "cut in a string", text: "apiVersion: v1\nkind: \"Serv",
			want: []string{"f.yaml: document 1: does not parse: line 2: found unexpected end of stream"}},
		{name: "second document does not parse", text: serviceWith(port80) + "---\na: [\n",
			want: []string{"f.yaml: document 2: does not parse: line 8: did not find expected node content"}},
		{name: "cut after a key", text: "apiVersion: v1\nkind: List\nitems:\n",
			want: []string{"f.yaml: document 1: List: items: Required value: [] if there are none"}},
		{name: "duplicate key", text: serviceWith(port80, "type: ClusterIP", "type: NodePort"),
			want: []string{`f.yaml: document 1: does not parse: line 8: key "type" already set in map`}},
		{name: "duplicate key in JSON", file: "f.json",
			text: `{"apiVersion": "v1", "kind": "Service", "metadata": {"name": "web"}, "spec": {"ports": [{"port": 80, "port": 81}]}}`,
			want: []string{"f.json: document 1: Service default/web: spec.ports[0].port: stands twice"}},
		{name: "cut JSON", file: "f.json", text: "{\"apiVersion\": \"v1\",\n \"kind\": \"Serv",
			want: []string{"f.json: document 1: does not parse: line 2: unexpected EOF"}},
		{name: "YAML in JSON", file: "f.json", text: "{\n\"apiVersion\": \"v1\",\nkind: Service}",
			want: []string{"f.json: document 1: does not parse: line 3: invalid character 'k' looking for beginning of object key string"}},

		// Fields.
		{name: "unknown field", text: serviceWith("prots: [{port: 80}]", port80), want: []string{webProblem + "spec.prots: unknown field"}},
		{name: "unknown field by its case", text: serviceWith("Type: NodePort", port80), want: []string{webProblem + "spec.Type: unknown field"}},
		{name: "unknown field in an element", text: serviceWith("ports: [{port: 80}, {port: 81, name: b, prot: UDP}]"),
			want: []string{webProblem + "spec.ports[0].name: Required value", webProblem + "spec.ports[1].prot: unknown field"}},
		{name: "unknown field in a list",
			text: "apiVersion: v1\nkind: List\nitems:\n- apiVersion: v1\n  kind: Service\n  metadata: {name: web}\n  spec: {ports: [{port: 80}], novel: 1}\n",
			want: []string{"warning: " + webProblem + "spec.novel: unknown field"}},
		{name: "string for a port", text: serviceWith(`ports: [{port: "80"}]`),
			want: []string{webProblem + "spec.ports.port: must be an integer, not a string"}},
		{name: "fraction for a port", text: serviceWith(`ports: [{port: 80.5}]`),
			want: []string{webProblem + "spec.ports.port: must be an integer, not number 80.5"}},
		{name: "mapping for ports", text: serviceWith(`ports: {port: 80}`),
			want: []string{webProblem + "spec.ports: must be a list, not a mapping"}},
		{name: "number for a label", text: "apiVersion: v1\nkind: Node\nmetadata: {name: n1, labels: {a: 1}}\n",
			want: []string{"f.yaml: document 1: Node n1: metadata.labels: must be a string, not a number"}},
		{name: "number for a name", text: "apiVersion: v1\nkind: Node\nmetadata: {name: 1}\n",
			want: []string{"f.yaml: document 1: Node: metadata.name: must be a string, not a number"}},
		{name: "no time", text: "apiVersion: v1\nkind: Node\nmetadata: {name: n1, creationTimestamp: today}\n",
			want: []string{`f.yaml: document 1: Node n1: parsing time "today" as "2006-01-02T15:04:05Z07:00": cannot parse "today" as "2006"`}},

		// Names.
		{name: "no name", text: "apiVersion: v1\nkind: Service\nspec: {ports: [{port: 80}]}\n",
			want: []string{"f.yaml: document 1: Service: metadata.name: Required value: name or generateName is required"}},
		{name: "no name in a list", text: "apiVersion: v1\nkind: ServiceList\nitems:\n- spec: {ports: [{port: 80}]}\n",
			want: []string{"f.yaml: document 1: Service: items[0].metadata.name: Required value: name or generateName is required"}},
		{name: "bad name", text: "apiVersion: v1\nkind: Service\nmetadata: {name: Web_1}\nspec: {ports: [{port: 80}]}\n",
			want: []string{`f.yaml: document 1: Service default/Web_1: metadata.name: Invalid value: "Web_1": a lowercase RFC 1123 label ` +
				`must consist of lower case alphanumeric characters or '-', and must start and end with an alphanumeric character ` +
				`(e.g. 'my-name',  or '123-abc', regex used for validation is '[a-z0-9]([-a-z0-9]*[a-z0-9])?')`}},
		{name: "namespace of a node", text: "apiVersion: v1\nkind: Node\nmetadata: {name: n1, namespace: default}\n",
			want: []string{"f.yaml: document 1: Node n1: metadata.namespace: Forbidden: not allowed on this type"}},
		{name: "the same object twice", text: serviceWith(port80) + "---\n" + serviceWith(port80),
			want: []string{"f.yaml: document 2: Service default/web: already in document 1"}},
		{name: "the same object twice in a list",
			text: "apiVersion: v1\nkind: NodeList\nitems:\n- metadata: {name: n1}\n- metadata: {name: n1}\n",
			want: []string{"f.yaml: document 1: Node n1: already in document 1"}},

		// Services.
		{name: "no spec", text: "apiVersion: v1\nkind: Service\nmetadata: {name: web}\n", want: []string{webProblem + "spec.ports: Required value"}},
		{name: "port 0", text: serviceWith("ports: [{port: 0}]"),
			want: []string{webProblem + "spec.ports[0].port: Invalid value: 0: must be between 1 and 65535, inclusive"}},
		{name: "port 70000", text: serviceWith("ports: [{port: 70000}]"),
			want: []string{webProblem + "spec.ports[0].port: Invalid value: 70000: must be between 1 and 65535, inclusive"}},
		{name: "target port 70000", text: serviceWith("ports: [{port: 80, targetPort: 70000}]"),
			want: []string{webProblem + "spec.ports[0].targetPort: Invalid value: 70000: must be between 1 and 65535, inclusive"}},
		{name: "target port name", text: serviceWith("ports: [{port: 80, targetPort: http_}]"),
			want: []string{webProblem + `spec.ports[0].targetPort: Invalid value: "http_": must contain only alpha-numeric characters (a-z, 0-9), and hyphens (-)`}},
		{name: "protocol", text: serviceWith("ports: [{port: 80, protocol: tcp}]"),
			want: []string{webProblem + `spec.ports[0].protocol: Unsupported value: "tcp": ` + protocols}},
		{name: "the same port twice", text: serviceWith("ports: [{port: 80, name: a}, {port: 80, name: b}, {port: 80, name: c, protocol: UDP}]"),
			want: []string{webProblem + `spec.ports[1]: Duplicate value: "port 80/TCP"`}},
		{name: "the same port name twice", text: serviceWith("ports: [{port: 80, name: a}, {port: 81, name: a}]"),
			want: []string{webProblem + `spec.ports[1].name: Duplicate value: "a"`}},
		{name: "node port of a ClusterIP", text: serviceWith("ports: [{port: 80, nodePort: 30000}]"),
			want: []string{webProblem + "spec.ports[0].nodePort: Forbidden: may not be used when `type` is 'ClusterIP'"}},
		{name: "node port 70000", text: serviceWith("type: NodePort", "ports: [{port: 80, nodePort: 70000}]"),
			want: []string{webProblem + "spec.ports[0].nodePort: Invalid value: 70000: must be between 1 and 65535, inclusive"}},
		{name: "the same node port twice",
			text: serviceWith("type: NodePort", "ports: [{name: a, port: 80, nodePort: 30000}, {name: b, port: 81, nodePort: 30000}]"),
			want: []string{webProblem + "spec.ports[1].nodePort: Duplicate value: 30000"}},
		{name: "port of the kubelet", text: serviceWith("type: LoadBalancer", "ports: [{port: 10250}]"),
			want: []string{webProblem + "spec.ports[0]: Invalid value: 10250: may not expose port 10250 externally since it is used by kubelet"}},
		{name: "type", text: serviceWith("type: Anycast", port80),
			want: []string{webProblem + `spec.type: Unsupported value: "Anycast": supported values: "ClusterIP", "ExternalName", "LoadBalancer", "NodePort"`}},
		{name: "no external name", text: serviceWith("type: ExternalName"), want: []string{webProblem + "spec.externalName: Required value"}},
		{name: "cluster IP of an ExternalName", text: serviceWith("type: ExternalName", "externalName: example.com.", "clusterIP: 10.0.0.1"),
			want: []string{webProblem + "spec.clusterIP: Forbidden: may not be set for ExternalName services"}},
		{name: "headless NodePort", text: serviceWith("type: NodePort", "clusterIP: None", port80),
			want: []string{webProblem + `spec.clusterIPs[0]: Invalid value: "None": may not be set to 'None' for NodePort services`}},
		{name: "cluster IP", text: serviceWith("clusterIP: 10.0.0.256", port80),
			want: []string{webProblem + `spec.clusterIPs[0]: Invalid value: "10.0.0.256": must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)`}},
		{name: "cluster IP with zeros", text: serviceWith("clusterIP: 10.0.0.010", port80),
			want: []string{webProblem + `spec.clusterIPs[0]: Invalid value: "10.0.0.010": must not have leading 0s`}},
		{name: "cluster IPs differ", text: serviceWith("clusterIP: 10.0.0.1", "clusterIPs: [10.0.0.2]", port80),
			want: []string{webProblem + "spec.clusterIPs: Invalid value: [\"10.0.0.2\"]: first value must match `clusterIP`"}},
		{name: "cluster IPs alone", text: serviceWith("clusterIPs: [10.0.0.2]", port80),
			want: []string{webProblem + "spec.clusterIPs: Invalid value: [\"10.0.0.2\"]: must be empty when `clusterIP` is not specified"}},
		{name: "two cluster IPs of a family", text: serviceWith("clusterIP: 10.0.0.1", "clusterIPs: [10.0.0.1, 10.0.0.2]", "ipFamilies: [IPv4]", port80),
			want: []string{
				webProblem + `spec.clusterIPs[1]: Invalid value: "10.0.0.2": may only hold one value of IPv4`,
				webProblem + "spec.ipFamilyPolicy: Invalid value: \"SingleStack\": must be 'RequireDualStack' or 'PreferDualStack' when multiple IP families are specified",
			}},
		{name: "family of a cluster IP", text: serviceWith("clusterIP: 10.0.0.1", "ipFamilies: [IPv6]", port80),
			want: []string{webProblem + "spec.clusterIPs[0]: Invalid value: \"10.0.0.1\": expected an IPv6 value as indicated by `ipFamilies[0]`"}},
		{name: "affinity", text: serviceWith("sessionAffinity: Cookie", port80),
			want: []string{webProblem + `spec.sessionAffinity: Unsupported value: "Cookie": supported values: "ClientIP", "None"`}},
		{name: "affinity for 0 s", text: serviceWith("sessionAffinity: ClientIP", "sessionAffinityConfig: {clientIP: {timeoutSeconds: 0}}", port80),
			want: []string{webProblem + "spec.sessionAffinityConfig.clientIP.timeoutSeconds: Invalid value: 0: must be between 1 and 86400, inclusive"}},
		{name: "affinity for over a day", text: serviceWith("sessionAffinity: ClientIP", "sessionAffinityConfig: {clientIP: {timeoutSeconds: 86401}}", port80),
			want: []string{webProblem + "spec.sessionAffinityConfig.clientIP.timeoutSeconds: Invalid value: 86401: must be between 1 and 86400, inclusive"}},
		{name: "policies", text: serviceWith("internalTrafficPolicy: No", "externalTrafficPolicy: Local", "trafficDistribution: Near", port80),
			want: []string{webProblem + "spec.internalTrafficPolicy: must be a string, not true or false"}},
		{name: "policies", text: serviceWith("internalTrafficPolicy: Node", "externalTrafficPolicy: Local", "trafficDistribution: Near", port80),
			want: []string{
				webProblem + `spec.externalTrafficPolicy: Invalid value: "Local": may only be set for externally-accessible services`,
				webProblem + `spec.internalTrafficPolicy: Unsupported value: "Node": supported values: "Cluster", "Local"`,
				webProblem + `spec.trafficDistribution: Unsupported value: "Near": supported values: "PreferClose", "PreferSameNode", "PreferSameZone"`,
			}},
		{name: "external IP", text: serviceWith("externalIPs: [127.0.0.1, 169.254.1.1, '::', 'ff02::1', 1.2.3]", port80),
			want: []string{
				webProblem + `spec.externalIPs[0]: Invalid value: "127.0.0.1": may not be in the loopback range (127.0.0.0/8, ::1/128)`,
				webProblem + `spec.externalIPs[1]: Invalid value: "169.254.1.1": may not be in the link-local range (169.254.0.0/16, fe80::/10)`,
				webProblem + `spec.externalIPs[2]: Invalid value: "::": may not be unspecified (0.0.0.0 or ::)`,
				webProblem + `spec.externalIPs[3]: Invalid value: "ff02::1": may not be a multicast address (224.0.0.0/4, ff00::/8)`,
				webProblem + `spec.externalIPs[4]: Invalid value: "1.2.3": must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)`,
			}},
		{name: "source ranges", text: serviceWith("type: LoadBalancer", "loadBalancerSourceRanges: [' 10.0.0.0/8 ', 10.0.0.1/8, 10.0.0.0]", port80),
			want: []string{
				webProblem + `spec.loadBalancerSourceRanges[2]: Invalid value: "10.0.0.0": must be a valid CIDR value, (e.g. 10.9.8.0/24 or 2001:db8::/64)`,
			}},
		{name: "source ranges of a ClusterIP", text: serviceWith("loadBalancerSourceRanges: [10.0.0.0/8]", port80),
			want: []string{webProblem + "spec.loadBalancerSourceRanges: Forbidden: may only be used when `type` is 'LoadBalancer'"}},
		{name: "health check", text: serviceWith("type: LoadBalancer", "healthCheckNodePort: 30000", port80),
			want: []string{webProblem + "spec.healthCheckNodePort: Invalid value: 30000: may only be set when `type` is 'LoadBalancer' and `externalTrafficPolicy` is 'Local'"}},
		{name: "status", text: serviceWith("type: LoadBalancer", port80) + "status: {loadBalancer: {ingress: [{ip: x, ipMode: Vip}]}}\n",
			want: []string{
				webProblem + `status.loadBalancer.ingress[0].ip: Invalid value: "x": must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)`,
				webProblem + `status.loadBalancer.ingress[0].ipMode: Unsupported value: "Vip": supported values: "Proxy", "VIP"`,
			}},
		{name: "several in one file", text: serviceWith("ports: [{port: 0}]") + "---\n" + sliceWith("ports: [{port: 0}]") + "---\n" + "kind: Node\n",
			want: []string{
				webProblem + "spec.ports[0].port: Invalid value: 0: must be between 1 and 65535, inclusive",
				"f.yaml: document 2: EndpointSlice default/web-1: ports[0].port: Invalid value: 0: must be between 1 and 65535, inclusive",
				"f.yaml: document 3: Node: apiVersion: Required value",
			}},

		// EndpointSlices.
		{name: "no address type", text: "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {name: web-1}\nendpoints: []\n",
			want: []string{sliceProblem + "addressType: Required value"}},
		{name: "address type", text: "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {name: web-1}\naddressType: IP\nendpoints: []\n",
			want: []string{sliceProblem + `addressType: Unsupported value: "IP": supported values: "FQDN", "IPv4", "IPv6"`}},
		{name: "addresses", text: sliceWith("endpoints:", "- addresses: [10.0.0.1, 'fd00::1', 010.0.0.1, 0.0.0.0, '::ffff:1.2.3.4', 224.0.0.1]", "- {}"),
			want: []string{
				sliceProblem + `endpoints[0].addresses[1]: Invalid value: "fd00::1": must be an IPv4 address`,
				sliceProblem + `endpoints[0].addresses[2]: Invalid value: "010.0.0.1": must not have leading 0s`,
				sliceProblem + `endpoints[0].addresses[3]: Invalid value: "0.0.0.0": may not be unspecified (0.0.0.0 or ::)`,
				sliceProblem + `endpoints[0].addresses[4]: Invalid value: "::ffff:1.2.3.4": must not be an IPv4-mapped IPv6 address`,
				sliceProblem + `endpoints[0].addresses[5]: Invalid value: "224.0.0.1": may not be a multicast address (224.0.0.0/4, ff00::/8)`,
				sliceProblem + "endpoints[1].addresses: Required value: must contain at least 1 address",
			}},
		{name: "endpoint ports", text: sliceWith("ports: [{port: 70000, name: a}, {name: a, protocol: ICMP}]", "endpoints: []"),
			want: []string{
				sliceProblem + "ports[0].port: Invalid value: 70000: must be between 1 and 65535, inclusive",
				sliceProblem + `ports[1].name: Duplicate value: "a"`,
				sliceProblem + `ports[1].protocol: Unsupported value: "ICMP": ` + protocols,
			}},
		{name: "too many endpoints", text: sliceWith("endpoints:", strings.Repeat("- addresses: [10.0.0.1]\n", 1001)),
			want: []string{sliceProblem + "endpoints: Too many: 1001: must have at most 1000 items"}},
		{name: "not ready yet has a wrong type", text: sliceWith("endpoints:", "- addresses: [10.0.0.1]", "  conditions: {ready: 'yes'}"),
			want: []string{sliceProblem + "endpoints.conditions.ready: must be true or false, not a string"}},

		// The other kinds.
		{name: "node", text: "apiVersion: v1\nkind: Node\nmetadata: {name: n1}\nspec: {podCIDRs: [10.1.0.1/16, 10.1.0.1]}\nstatus: {addresses: [{type: InternalIP, address: n1}]}\n",
			want: []string{
				`f.yaml: document 1: Node n1: spec.podCIDRs[1]: Invalid value: "10.1.0.1": must be a valid CIDR value, (e.g. 10.9.8.0/24 or 2001:db8::/64)`,
				`f.yaml: document 1: Node n1: status.addresses[0].address: Invalid value: "n1": must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)`,
			}},
		{name: "pod", text: "apiVersion: v1\nkind: Pod\nmetadata: {name: p}\nspec: {nodeName: N_1, containers: [{name: c, ports: [{containerPort: 0}, {containerPort: 80, hostPort: 70000, hostIP: here, protocol: ICMP, name: x_}]}]}\n" +
			"status: {phase: Gone, podIPs: [{ip: 10.0.0.1}, {ip: 'fd00::1'}, {ip: 10.0.0.2}, {ip: x}]}\n",
			want: []string{
				podProblem + "spec.containers[0].ports[0].containerPort: Invalid value: 0: must be between 1 and 65535, inclusive",
				podProblem + `spec.containers[0].ports[1].hostIP: Invalid value: "here": must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)`,
				podProblem + "spec.containers[0].ports[1].hostPort: Invalid value: 70000: must be between 1 and 65535, inclusive",
				podProblem + `spec.containers[0].ports[1].name: Invalid value: "x_": must contain only alpha-numeric characters (a-z, 0-9), and hyphens (-)`,
				podProblem + `spec.containers[0].ports[1].protocol: Unsupported value: "ICMP": ` + protocols,
				podProblem + `spec.nodeName: Invalid value: "N_1": a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '-' or '.', and must start and end with an alphanumeric character (e.g. 'example.com', regex used for validation is '[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*')`,
				podProblem + `status.phase: Unsupported value: "Gone": supported values: "Pending", "Running", "Succeeded", "Failed", "Unknown"`,
				podProblem + `status.podIPs[2].ip: Invalid value: "10.0.0.2": may only hold one value of IPv4`,
				podProblem + `status.podIPs[3].ip: Invalid value: "x": must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)`,
			}},
		{name: "host ports that meet, and names", text: podWith("containers:\n  - {name: a, ports: [{containerPort: 80, hostPort: 8080, name: x}, {containerPort: 81, name: x}]}\n" +
			"  - {name: b, ports: [{containerPort: 80, hostPort: 8080}, {containerPort: 80, hostPort: 8080, protocol: UDP}, {containerPort: 80, hostPort: 8080, hostIP: 192.0.2.1}]}\n" +
			"  initContainers:\n  - {name: c, ports: [{containerPort: 80, hostPort: 8080}]}\n"),
			want: []string{
				podProblem + `spec.containers[0].ports[1].name: Duplicate value: "x"`,
				podProblem + `spec.containers[1].ports[0].hostPort: Duplicate value: "TCP//8080"`,
			}},
		{name: "host port of a sidecar", text: podWith("containers:\n  - {name: a, ports: [{containerPort: 80, hostPort: 8080}]}\n" +
			"  initContainers:\n  - {name: c, restartPolicy: Always, ports: [{containerPort: 80, hostPort: 8080}]}\n"),
			want: []string{podProblem + `spec.containers[0].ports[0].hostPort: Duplicate value: "TCP//8080"`}},
		{name: "host port on the host's network", text: podWith("hostNetwork: true\n  containers:\n  - {name: a, ports: [{containerPort: 80, hostPort: 8080}, {containerPort: 81}]}\n"),
			want: []string{podProblem + "spec.containers[0].ports[0].hostPort: Invalid value: 8080: must match `containerPort` when `hostNetwork` is true"}},
		{name: "endpoints", text: "apiVersion: v1\nkind: Endpoints\nmetadata: {name: web}\nsubsets: [{addresses: [{ip: '::1'}], ports: [{port: 80}]}]\n",
			want: []string{
				"not yet: f.yaml: Endpoints: this kind is not yet read (1 in this file)",
				`f.yaml: document 1: Endpoints default/web: subsets[0].addresses[0].ip: Invalid value: "::1": may not be in the loopback range (127.0.0.0/8, ::1/128)`,
			}},
		{name: "two Endpoints", text: "apiVersion: v1\nkind: EndpointsList\nitems: [{metadata: {name: p}}, {metadata: {name: q}}]\n",
			want: []string{"not yet: f.yaml: Endpoints: this kind is not yet read (2 in this file)"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			file := tt.file
			if file == "" {
				file = "f.yaml"
			}
			_, problems := parse(file, []byte(tt.text))
			if diff := cmp.Diff(tt.want, lines(limit(problems))); diff != "" {
				t.Errorf("problems (-want +got):\n%s", diff)
			}
		})
	}
}

// TestProblemsAreLimited: the errors come first when there are too many.
func TestProblemsAreLimited(t *testing.T) {
	var text strings.Builder
	text.WriteString("apiVersion: v1\nkind: List\nitems:\n")
	for i := range 30 {
		fmt.Fprintf(&text, "- {apiVersion: v1, kind: Service, metadata: {name: s%02d}, spec: {novel: 1, ports: [{port: %d}]}}\n", i, i/15)
	}
	_, problems := parse("f.yaml", []byte(text.String()))
	got := lines(limit(problems))
	if len(got) != maxProblems+1 {
		t.Fatalf("%d problems, want %d", len(got), maxProblems+1)
	}
	errors := 0
	for _, line := range got {
		if strings.Contains(line, "spec.ports[0].port: Invalid value: 0") {
			errors++
		}
	}
	if errors != 15 {
		t.Errorf("%d of 15 errors are told:\n%s", errors, strings.Join(got, "\n"))
	}
	if want := "warning: f.yaml: and 25 more"; got[maxProblems] != want {
		t.Errorf("last is %q, want %q", got[maxProblems], want)
	}
}

func TestDefaults(t *testing.T) {
	tests := []struct {
		name, text, want string
	}{
		{"ClusterIP", serviceWith("ports: [{port: 80}]"), `
type: ClusterIP
internalTrafficPolicy: Cluster
ports: [{port: 80, protocol: TCP, targetPort: 80}]
sessionAffinity: None
`},
		{"given address", serviceWith("clusterIP: 10.0.0.1", "ports: [{port: 53, protocol: UDP, targetPort: dns}]"), `
type: ClusterIP
clusterIP: 10.0.0.1
clusterIPs: [10.0.0.1]
ipFamilies: [IPv4]
ipFamilyPolicy: SingleStack
internalTrafficPolicy: Cluster
ports: [{port: 53, protocol: UDP, targetPort: dns}]
sessionAffinity: None
`},
		{"two addresses", serviceWith("clusterIP: fd00::1", "clusterIPs: ['fd00::1', 10.0.0.1]", "sessionAffinity: ClientIP", "ports: [{port: 80}]"), `
type: ClusterIP
clusterIP: fd00::1
clusterIPs: ['fd00::1', 10.0.0.1]
ipFamilies: [IPv6, IPv4]
ipFamilyPolicy: RequireDualStack
internalTrafficPolicy: Cluster
ports: [{port: 80, protocol: TCP, targetPort: 80}]
sessionAffinity: ClientIP
sessionAffinityConfig: {clientIP: {timeoutSeconds: 10800}}
`},
		{"headless", serviceWith("clusterIP: None", "selector: {app: web}"), `
type: ClusterIP
clusterIP: None
clusterIPs: [None]
internalTrafficPolicy: Cluster
selector: {app: web}
sessionAffinity: None
`},
		{"LoadBalancer", serviceWith("type: LoadBalancer", "loadBalancerSourceRanges: [' 10.0.0.0/8']", "ports: [{port: 80}]"), `
type: LoadBalancer
allocateLoadBalancerNodePorts: true
externalTrafficPolicy: Cluster
internalTrafficPolicy: Cluster
loadBalancerSourceRanges: [10.0.0.0/8]
ports: [{port: 80, protocol: TCP, targetPort: 80}]
sessionAffinity: None
`},
		{"ExternalName", serviceWith("type: ExternalName", "externalName: example.com"), `
type: ExternalName
externalName: example.com
sessionAffinity: None
`},
		{"no affinity, but its timeout", serviceWith("externalIPs: [192.0.2.1]", "sessionAffinityConfig: {clientIP: {timeoutSeconds: 5}}", "ports: [{port: 80}]"), `
type: ClusterIP
externalIPs: [192.0.2.1]
externalTrafficPolicy: Cluster
internalTrafficPolicy: Cluster
ports: [{port: 80, protocol: TCP, targetPort: 80}]
sessionAffinity: None
`},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			objects, problems := parse("f.yaml", []byte(tt.text))
			if len(problems) > 0 {
				t.Fatal(lines(problems))
			}
			var want corev1.ServiceSpec
			if err := yaml.UnmarshalStrict([]byte(tt.want), &want); err != nil {
				t.Fatal(err)
			}
			svc := objects[0].object.(*corev1.Service)
			if svc.Namespace != "default" {
				t.Errorf("namespace %q", svc.Namespace)
			}
			if diff := cmp.Diff(want, svc.Spec); diff != "" {
				t.Errorf("spec (-want +got):\n%s", diff)
			}
		})
	}
}

// TestDocuments: which objects a file holds, and in which document.
func TestDocuments(t *testing.T) {
	const node = "{apiVersion: v1, kind: Node, metadata: {name: %s}}"
	n := func(name string) string { return fmt.Sprintf(node, name) }
	tests := []struct {
		name, file, text, want string
	}{
		{"one", "f.yml", n("a"), "Node a 1"},
		{"several", "f.yaml", n("a") + "\n---\n" + n("b") + "\n--- # again\n" + n("c"), "Node a 1, Node b 2, Node c 3"},
		{"begin with a marker", "f.yaml", "# licence\n---\n" + n("a") + "\n---\n---\n# nothing\n---\n" + n("b"), "Node a 1, Node b 2"},
		{"content after the marker", "f.yaml", "--- " + n("a") + "\n--- " + n("b"), "Node a 1, Node b 2"},
		{"end marker", "f.yaml", n("a") + "\n...\n" + n("b"), "Node a 1, Node b 2"},
		{"line ends of Windows", "f.yaml", n("a") + "\r\n---\r\n" + n("b") + "\r\n", "Node a 1, Node b 2"},
		{"byte order mark", "f.yaml", "\ufeff" + n("a"), "Node a 1"},
		{"byte order mark in JSON", "f.json", "\ufeff" + `{"apiVersion": "v1", "kind": "Node", "metadata": {"name": "a"}}`, "Node a 1"},
		{"no marker within a scalar", "f.yaml", "apiVersion: v1\nkind: Node\nmetadata:\n  name: a\n  annotations:\n    x: |\n      ---\n      ...\n", "Node a 1"},
		{"anchors", "f.yaml", "apiVersion: v1\nkind: &k Node\nmetadata: {name: a, labels: {kind: *k}}\n", "Node a 1"},
		{"list", "f.yaml", "apiVersion: v1\nkind: List\nmetadata: {resourceVersion: ''}\nitems: [" + n("a") + ", " + n("b") + "]\n---\n" + n("c"),
			"Node a 1, Node b 1, Node c 2"},
		{"typed list", "f.yaml", "apiVersion: discovery.k8s.io/v1\nkind: EndpointSliceList\nitems: [{metadata: {name: s}, addressType: IPv6, endpoints: []}]\n",
			"EndpointSlice default/s 1"},
		{"empty list", "f.yaml", "apiVersion: v1\nkind: List\nitems: []\n", ""},
		{"JSON", "f.json", "{\"apiVersion\": \"v1\",\t\"kind\": \"Node\", \"metadata\": {\"name\": \"a\"}}\n{\"apiVersion\": \"v1\", \"kind\": \"NodeList\", \"items\": []}", "Node a 1"},
		{"JSON with tabs in YAML", "f.yaml", "{\n\t\"apiVersion\": \"v1\",\n\t\"kind\": \"Node\", \"metadata\": {\"name\": \"a\"}\n}\n", "Node a 1"},
		{"all kinds", "f.yaml", serviceWith("ports: [{port: 80}]") + "---\n" + sliceWith("endpoints: []") + "---\n" + n("a") +
			"\n---\n{apiVersion: v1, kind: Pod, metadata: {name: p, namespace: x}}\n---\n{apiVersion: v1, kind: Endpoints, metadata: {name: e}}",
			"Service default/web 1, EndpointSlice default/web-1 2, Node a 3, Pod x/p 4, Endpoints default/e 5"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			objects, problems := parse(tt.file, []byte(tt.text))
			for _, p := range problems {
				if p.Severity == lb.Error {
					t.Error(p)
				}
			}
			var got []string
			for _, o := range objects {
				got = append(got, fmt.Sprintf("%s %d", o.name, o.document))
			}
			if diff := cmp.Diff(tt.want, strings.Join(got, ", ")); diff != "" {
				t.Errorf("objects (-want +got):\n%s", diff)
			}
		})
	}
}

// TestPodDefaults: as an API server fills in.
func TestPodDefaults(t *testing.T) {
	objects, problems := parse("f.yaml", []byte(podWith("hostNetwork: true\n  containers: [{name: c, ports: [{containerPort: 80}]}]\nstatus: {podIP: 10.0.0.1, podIPs: [{ip: 10.0.0.2}]}\n")))
	if len(problems) > 0 {
		t.Fatal(problems)
	}
	p := objects[0].object.(*corev1.Pod)
	port := p.Spec.Containers[0].Ports[0]
	if p.Namespace != "default" || port.Protocol != corev1.ProtocolTCP || port.HostPort != 80 || fmt.Sprint(p.Status.PodIPs) != "[{10.0.0.1}]" {
		t.Errorf("namespace %s, port %+v, addresses %v", p.Namespace, port, p.Status.PodIPs)
	}
}
