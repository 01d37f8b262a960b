// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"cmp"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/lbagent/lbagent/loader"
	"github.com/lbagent/lbagent/maps"
	"github.com/lbagent/lbagent/node"
	"github.com/lbagent/lbagent/source/manifest"
)

// Config is what an operator chooses; its fields are the flags of `lbagent run`.
type Config struct {
	Manifests string // --manifests: the folder of manifests
	NodeName  string // --hostname-override
	Devices   node.Config
	// Of these, the values of flags as they are written.
	NodePortAddresses []string // --nodeport-addresses
	NodePortRange     string   // --nodeport-range
	ServiceCIDRs      []string // --service-cluster-ip-range
	ExternalIPsAllow  []string // --external-ips-allow; nil: all are
	HairpinAddresses  []string // --hairpin-addresses

	// Addresses and ports; "" is off, to be set after Defaults.
	MetricsAddress string // --metrics-bind-address
	HealthzAddress string // --healthz-bind-address

	BPFRoot string     // --bpf-root: the folder of pins
	Socket  string     // --socket
	Sizes   maps.Sizes // --flows, --max-services and so on
	// --silent-backend-timeout; negative: off. 0 is at once, to be set after Defaults.
	SilentBackend time.Duration

	SweepInterval time.Duration // no flag: shorter in tests

	Flags map[string]string // all flags by name, as they are written: what /configz answers

	Log *slog.Logger

	beforeWrite func(mapName string) error // as [maps.Maps.Fault]; of tests
}

// Defaults fills in what is not set and has a default.
func (c *Config) Defaults() {
	if c.NodeName == "" {
		c.NodeName, _ = os.Hostname() // that it fails is seen by Validate
	}
	c.NodeName = strings.ToLower(strings.TrimSpace(c.NodeName)) // as kube-proxy and the kubelet do
	c.Devices.Defaults()
	if c.NodePortAddresses == nil {
		c.NodePortAddresses = []string{"primary", "localhost"}
	}
	c.NodePortRange = cmp.Or(c.NodePortRange, manifest.DefaultNodePorts.String())
	if c.HairpinAddresses == nil {
		for _, a := range loader.DefaultHairpin() {
			c.HairpinAddresses = append(c.HairpinAddresses, a.String())
		}
	}
	sizes := maps.DefaultSizes()
	c.Sizes = maps.Sizes{
		Frontends: cmp.Or(c.Sizes.Frontends, sizes.Frontends), Services: cmp.Or(c.Sizes.Services, sizes.Services),
		Slots: cmp.Or(c.Sizes.Slots, sizes.Slots), Backends: cmp.Or(c.Sizes.Backends, sizes.Backends),
		Flows: c.Sizes.Flows, // 0: what is pinned, or what fits the memory
	}
	c.SilentBackend = cmp.Or(c.SilentBackend, 5*time.Second)
	c.SweepInterval = cmp.Or(c.SweepInterval, sweepInterval)
	c.MetricsAddress = cmp.Or(c.MetricsAddress, "127.0.0.1:10249")
	c.HealthzAddress = cmp.Or(c.HealthzAddress, "127.0.0.1:10256")
	c.BPFRoot = cmp.Or(c.BPFRoot, "/sys/fs/bpf/lbagent")
	c.Socket = cmp.Or(c.Socket, "/run/lbagent/lbagent.sock")
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
}

// values are what the flags say that are lists and ranges.
type values struct {
	nodePorts        node.NodePorts
	nodePortRange    manifest.PortRange
	serviceCIDRs     []netip.Prefix
	externalIPsAllow []netip.Prefix // nil: all are
	hairpin          [2]netip.Addr
}

// values reads them. The error names each flag that does not read.
func (c Config) values() (v values, err error) {
	var errs []error
	wrong := func(flag string, err error) {
		if err != nil {
			errs = append(errs, fmt.Errorf("--%s: %w", flag, err))
		}
	}
	v.nodePorts, err = node.ParseNodePorts(c.NodePortAddresses)
	wrong("nodeport-addresses", err)
	v.nodePortRange, err = manifest.ParsePortRange(c.NodePortRange)
	wrong("nodeport-range", err)
	v.serviceCIDRs, err = parsePrefixes(c.ServiceCIDRs)
	if err == nil && len(v.serviceCIDRs) > maps.MaxServicePrefixes {
		err = fmt.Errorf("%d CIDRs are more than %d", len(v.serviceCIDRs), maps.MaxServicePrefixes)
	}
	wrong("service-cluster-ip-range", err)
	v.externalIPsAllow, err = parsePrefixes(c.ExternalIPsAllow)
	wrong("external-ips-allow", err)
	if c.ExternalIPsAllow != nil && v.externalIPsAllow == nil {
		v.externalIPsAllow = []netip.Prefix{} // given, and empty
	}
	v.hairpin, err = parseHairpin(c.HairpinAddresses)
	wrong("hairpin-addresses", err)
	return v, errors.Join(errs...)
}

func parsePrefixes(list []string) (prefixes []netip.Prefix, err error) {
	for _, text := range list {
		p, err := netip.ParsePrefix(strings.TrimSpace(text))
		if err != nil || p.Addr().Is4In6() {
			return nil, fmt.Errorf("%q is no CIDR such as 10.96.0.0/16", text)
		}
		prefixes = append(prefixes, p.Masked())
	}
	return prefixes, nil
}

// parseHairpin reads an IPv4 address and an IPv6 one, in either order.
func parseHairpin(list []string) (addresses [2]netip.Addr, err error) {
	for _, text := range list {
		a, err := netip.ParseAddr(strings.TrimSpace(text))
		if err != nil || a.Is4In6() || a.Zone() != "" || a.IsUnspecified() || a.IsLoopback() || a.IsMulticast() {
			return addresses, fmt.Errorf("%q is no address that a pod could answer to", text)
		}
		i := 0
		if a.Is6() {
			i = 1
		}
		if addresses[i].IsValid() {
			return addresses, fmt.Errorf("%s and %s: want one address of each family", addresses[i], a)
		}
		addresses[i] = a
	}
	if !addresses[0].IsValid() || !addresses[1].IsValid() {
		return addresses, fmt.Errorf("want an IPv4 address and an IPv6 one, not %q", strings.Join(list, ","))
	}
	return addresses, nil
}

// Validate names each flag whose value cannot be, and says why.
func (c Config) Validate() error {
	_, err := c.values()
	errs := []error{c.Devices.Validate(), err}
	wrong := func(flag, format string, args ...any) {
		errs = append(errs, fmt.Errorf("--"+flag+": "+format, args...))
	}
	if c.Manifests == "" {
		wrong("manifests", "want a folder of manifests")
	} else if info, err := os.Stat(c.Manifests); err != nil {
		wrong("manifests", "%w", err)
	} else if !info.IsDir() {
		wrong("manifests", "%s is no folder", c.Manifests)
	}
	if c.NodeName == "" {
		wrong("hostname-override", "this host has no name: give one")
	}
	for _, address := range []struct{ flag, value string }{{"metrics-bind-address", c.MetricsAddress}, {"healthz-bind-address", c.HealthzAddress}} {
		if at, err := netip.ParseAddrPort(address.value); address.value != "" && (err != nil || at.Port() == 0) {
			wrong(address.flag, "%q is no address and port such as 127.0.0.1:10249", address.value)
		}
	}
	for _, path := range []struct{ flag, value string }{{"bpf-root", c.BPFRoot}, {"socket", c.Socket}} {
		if !filepath.IsAbs(path.value) {
			wrong(path.flag, "%q is no absolute path", path.value)
		}
	}
	if filepath.Dir(c.BPFRoot) == "/" {
		wrong("bpf-root", "%s: want a folder inside of one that can be a BPF file system", c.BPFRoot)
	}
	const longest = 107 // of a unix socket's path
	if len(c.Socket) > longest {
		wrong("socket", "%s is longer than %d bytes", c.Socket, longest)
	}
	for _, size := range []struct {
		flag         string
		value, least uint32
	}{
		// Service 0 and backend 0 are none.
		{"flows", c.Sizes.Flows, 2}, {"max-services", c.Sizes.Services, 2}, {"max-frontends", c.Sizes.Frontends, 1},
		{"max-backends", c.Sizes.Backends, 2}, {"max-slots", c.Sizes.Slots, 2},
	} {
		const most = 1 << 26 // beyond that the kernel's own limits are near, and a mistake is likelier
		if size.flag == "flows" && size.value == 0 {
			continue
		}
		if size.value < size.least || size.value > most {
			wrong(size.flag, "%d is not between %d and %d", size.value, size.least, most)
		}
	}
	return errors.Join(errs...)
}
