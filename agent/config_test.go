// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/lbagent/lbagent/api"
	"github.com/lbagent/lbagent/health"
	"github.com/lbagent/lbagent/maps"
	"github.com/lbagent/lbagent/node"
)

func TestConfig(t *testing.T) {
	for name, c := range map[string]struct {
		change func(*Config)
		want   []string // flags that are named
	}{
		"defaults and a folder": {func(*Config) {}, nil},
		"no folder":             {func(c *Config) { c.Manifests = "" }, []string{"--manifests: want a folder"}},
		"no such folder":        {func(c *Config) { c.Manifests = "/none" }, []string{"--manifests: stat /none"}},
		"a file":                {func(c *Config) { c.Manifests = "/proc/self/exe" }, []string{"--manifests: /proc/self/exe is no folder"}},
		"relative paths": {func(c *Config) { c.BPFRoot, c.Socket = "a/b", "s" },
			[]string{`--bpf-root: "a/b"`, `--socket: "s"`}},
		"no servers":    {func(c *Config) { c.MetricsAddress, c.HealthzAddress = "", "" }, nil},
		"other servers": {func(c *Config) { c.MetricsAddress, c.HealthzAddress = "0.0.0.0:1", "[::]:65535" }, nil},
		"no such servers": {func(c *Config) { c.MetricsAddress, c.HealthzAddress = "127.0.0.1", "localhost:10256" },
			[]string{`--metrics-bind-address: "127.0.0.1" is`, `--healthz-bind-address: "localhost:10256" is`}},
		"no port":       {func(c *Config) { c.MetricsAddress = "127.0.0.1:0" }, []string{"--metrics-bind-address: "}},
		"no parent":     {func(c *Config) { c.BPFRoot = "/lbagent" }, []string{"--bpf-root: /lbagent"}},
		"a long socket": {func(c *Config) { c.Socket = "/" + strings.Repeat("s", 107) }, []string{"--socket: "}},
		"a pattern":     {func(c *Config) { c.Devices = node.Config{Devices: []string{"["}} }, []string{"--devices: "}},
		"no name":       {func(c *Config) { c.NodeName = "" }, []string{"--hostname-override"}},
		"addresses": {func(c *Config) {
			c.NodePortAddresses, c.NodePortRange = []string{"primary", "10.0.0.1"}, "5"
			c.ServiceCIDRs, c.ExternalIPsAllow, c.HairpinAddresses = []string{"10.96.0.0"}, []string{"::ffff:10.0.0.0/104"}, []string{"169.254.77.1"}
		}, []string{`--nodeport-addresses: "10.0.0.1"`, `--nodeport-range: "5"`, `--service-cluster-ip-range: "10.96.0.0"`,
			`--external-ips-allow: "::ffff:10.0.0.0/104"`, "--hairpin-addresses: want an IPv4 address and an IPv6 one"}},
		"good addresses": {func(c *Config) {
			c.NodePortAddresses, c.NodePortRange = []string{"all", "10.0.0.0/8"}, "80-90"
			c.ServiceCIDRs, c.ExternalIPsAllow, c.HairpinAddresses = []string{"10.96.0.0/16", "fd00::/112"}, []string{"192.0.2.0/24"}, []string{"fd77::2", "169.254.77.2"}
		}, nil},
		"no NodePorts at all": {func(c *Config) { c.NodePortAddresses = []string{} }, nil},
		"too many prefixes": {func(c *Config) { c.ServiceCIDRs = slices.Repeat([]string{"10.96.0.0/16"}, maps.MaxServicePrefixes+1) },
			[]string{"--service-cluster-ip-range: "}},
		"hairpin addresses of one family":   {func(c *Config) { c.HairpinAddresses = []string{"fd77::1", "fd77::2"} }, []string{"--hairpin-addresses: fd77::1 and fd77::2"}},
		"a hairpin address of the loopback": {func(c *Config) { c.HairpinAddresses = []string{"127.0.0.1", "fd77::2"} }, []string{`--hairpin-addresses: "127.0.0.1"`}},
		"sizes": {func(c *Config) {
			c.Sizes = maps.Sizes{Flows: 1, Services: 1, Frontends: 1 << 27, Backends: 1, Slots: 1}
		},
			[]string{"--flows: 1", "--max-services: 1", "--max-frontends: 134217728", "--max-backends: 1", "--max-slots: 1"}},
	} {
		config := Config{Manifests: t.TempDir()}
		config.Defaults()
		c.change(&config)
		err := config.Validate()
		if (err == nil) != (len(c.want) == 0) {
			t.Errorf("%s: %v", name, err)
			continue
		}
		for _, want := range c.want {
			if !strings.Contains(err.Error(), want) {
				t.Errorf("%s: %v lacks %q", name, err, want)
			}
		}
	}
}

func TestNodeName(t *testing.T) {
	c := Config{NodeName: " Node-1 "}
	if c.Defaults(); c.NodeName != "node-1" {
		t.Errorf("the name is %q", c.NodeName)
	}
	c = Config{NodeName: " "}
	if c.Defaults(); c.NodeName != "" { // which Validate refuses
		t.Errorf("the name is %q", c.NodeName)
	}
}

func TestRetry(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var r retry
		if r.due() != nil || r.pending() {
			t.Error("the zero retry is due")
		}
		wait := func() time.Duration {
			start := time.Now()
			<-r.due()
			return time.Since(start)
		}
		for _, want := range []time.Duration{200 * time.Millisecond, 400 * time.Millisecond, 800 * time.Millisecond} {
			r.failed()
			if got := wait(); got != want {
				t.Errorf("after %v, want %v", got, want)
			}
		}
		for range 10 {
			r.failed()
		}
		if got := wait(); got != lastRetry {
			t.Errorf("after many failures: %v", got)
		}
		r.done()
		if r.pending() {
			t.Error("pending when done")
		}
		r.failed()
		if got := wait(); got != firstRetry {
			t.Errorf("after a success: %v", got)
		}
		r.stop()
	})
}

func TestBrief(t *testing.T) {
	var errs []error
	for i, want := range []string{"e0", "e0; e1", "e0; e1; e2", "e0; e1; e2; e3", "e0; e1; e2; e3; e4", "e0; e1; e2; e3; e4; and 1 more"} {
		errs = append(errs, fmt.Errorf("e%d", i))
		if got := brief(errors.Join(errs...)); got != want {
			t.Errorf("%d errors: %q, want %q", i+1, got, want)
		}
	}
}

// TestValues: what is written is what is meant.
func TestValues(t *testing.T) {
	c := Config{HairpinAddresses: []string{"fd77::2", "169.254.77.2"}, ServiceCIDRs: []string{"10.96.0.1/16", " fd00::/112"}}
	c.Defaults()
	v, err := c.values()
	if err != nil {
		t.Fatal(err)
	}
	got := fmt.Sprint(v.nodePorts, v.nodePortRange, v.serviceCIDRs, v.externalIPsAllow == nil, v.hairpin)
	if want := "{true true false []} 30000-32767 [10.96.0.0/16 fd00::/112] true [169.254.77.2 fd77::2]"; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
	c.ExternalIPsAllow = []string{} // as --external-ips-allow= is: whoever writes that does not mean all
	if v, err = c.values(); err != nil || v.externalIPsAllow == nil {
		t.Errorf("external IPs in no CIDR are allowed everywhere; error %v", err)
	}
}

// A node is healthy when the maps say what they should and the programs are where they should be, not before.
func TestTellHealth(t *testing.T) {
	for _, tt := range []struct {
		what    string
		of      *agent
		healthy bool
	}{
		{"all in force", &agent{synced: true}, true},
		{"nothing read yet", &agent{}, false},
		{"maps not written", &agent{synced: true, apply: api.Apply{LastError: "full"}}, false},
		{"programs not attached", &agent{synced: true, attachError: "refused"}, false},
	} {
		tt.of.proxy = health.NewProxy(func() bool { return true })
		if tt.of.tellHealth(); tt.of.proxy.Healthy() != tt.healthy {
			t.Errorf("%s: healthy %v", tt.what, !tt.healthy)
		}
	}
}
