// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/lbagent/lbagent/agent"
	"github.com/lbagent/lbagent/maps"
	"github.com/lbagent/lbagent/source"
)

func newRun(p *places) *cobra.Command {
	var c agent.Config
	c.Defaults()
	cmd := &cobra.Command{
		Use:   "run --manifests FOLDER",
		Short: "Run the agent: serve the Services of a folder of manifests",
		Long: "Run the agent in the foreground: make the programs serve what a folder of manifests says, and follow its\n" +
			"changes and those of the host's devices. SIGTERM and Ctrl-C end the agent, not the data plane, which goes on\n" +
			"with what it knew last; the next `lbagent run` takes it over without a connection lost, and\n" +
			"`lbagent cleanup` removes it. Needs root.",
		Example: "  lbagent run --manifests /etc/lbagent/manifests",
		Args:    usage(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			c.BPFRoot, c.Socket = p.bpfRoot, p.socket
			c.Log = slog.New(slog.NewTextHandler(cmd.ErrOrStderr(), nil))
			if err := c.Validate(); err != nil {
				return usageError{err}
			}
			c.Flags = written(cmd.Flags())
			source.LogTo(c.Log)
			return agent.Run(cmd.Context(), c)
		},
	}
	f := cmd.Flags()
	f.StringVar(&c.Manifests, "manifests", c.Manifests, "`folder` of Services, EndpointSlices, Pods and Nodes, in YAML or JSON; its changes are followed (required)")
	f.StringVar(&c.NodeName, "hostname-override", c.NodeName, "this node's `name`, as nodeName and Node objects have it")
	f.StringSliceVar(&c.Devices.Devices, "devices", c.Devices.Devices, "`patterns` of the node's own devices (default those with a default route, and overlay devices)")
	f.StringSliceVar(&c.Devices.PodDevices, "pod-devices", c.Devices.PodDevices, "`patterns` of the host's ends of pods' devices")
	f.StringSliceVar(&c.NodePortAddresses, "nodeport-addresses", c.NodePortAddresses, "`list` of the host's own addresses that NodePorts are served at: primary (one of each family: the Node object's first InternalIP, else ExternalIP; without them that of the device with the default route), all, CIDRs (of one family only: all addresses of the other), localhost (where only health checks are answered yet)")
	f.StringVar(&c.NodePortRange, "nodeport-range", c.NodePortRange, "`range` of the node ports of Services; a manifest with another is refused")
	f.StringSliceVar(&c.ServiceCIDRs, "service-cluster-ip-range", c.ServiceCIDRs, fmt.Sprintf("`CIDRs` that cluster IPs are from, at most %d; what is sent to an address there that no Service has is dropped", maps.MaxServicePrefixes))
	f.StringSliceVar(&c.ExternalIPsAllow, "external-ips-allow", c.ExternalIPsAllow, "`CIDRs` that external IPs of Services may be from; empty: none (default any: who may write a Service may then draw traffic to any address)")
	f.StringSliceVar(&c.HairpinAddresses, "hairpin-addresses", c.HairpinAddresses, "`addresses`, an IPv4 and an IPv6 one, that a pod sees as the client when it reaches itself through its Service")
	f.StringVar(&c.MetricsAddress, "metrics-bind-address", c.MetricsAddress, "`address` and port of /metrics, /proxyMode and /configz, for whoever reaches it by HTTP; empty: nowhere")
	f.StringVar(&c.HealthzAddress, "healthz-bind-address", c.HealthzAddress, "`address` and port of /healthz and /livez, for whoever reaches it by HTTP; empty: nowhere")
	f.Var((*durationOrOff)(&c.SilentBackend), "silent-backend-timeout", "`time` that a TCP backend which is gone from every EndpointSlice may leave a segment unanswered before its client is told by a reset; 0: at once, off: never")
	f.Uint32Var(&c.Sizes.Flows, "flows", c.Sizes.Flows, "largest `number` of entries of the flow table, two to a connection, and a quarter as many for those that begin; the least recently used make room (default what the pinned one has, else a four-hundredth of the memory)")
	f.Uint32Var(&c.Sizes.Services, "max-services", c.Sizes.Services, "largest `number` of services, one to a port and family of a Service")
	f.Uint32Var(&c.Sizes.Frontends, "max-frontends", c.Sizes.Frontends, "largest `number` of addresses that services are reached at")
	f.Uint32Var(&c.Sizes.Backends, "max-backends", c.Sizes.Backends, "largest `number` of backends of all services")
	f.Uint32Var(&c.Sizes.Slots, "max-slots", c.Sizes.Slots, "largest `number` of entries of all services' lookup tables")
	return cmd
}

// written is every flag with its value, as it is or would be written on the command line.
func written(flags *pflag.FlagSet) map[string]string {
	all := map[string]string{}
	flags.VisitAll(func(f *pflag.Flag) {
		if f.Name == "help" {
			return
		}
		all[f.Name] = f.Value.String()
		if list, ok := f.Value.(pflag.SliceValue); ok {
			all[f.Name] = strings.Join(list.GetSlice(), ",")
		}
	})
	return all
}

// durationOrOff is a flag's value that is a duration, or "off", which is a negative one.
type durationOrOff time.Duration

func (d *durationOrOff) String() string {
	if *d < 0 {
		return "off"
	}
	return time.Duration(*d).String()
}

func (d *durationOrOff) Set(text string) error {
	if text == "off" {
		*d = -1
		return nil
	}
	value, err := time.ParseDuration(text)
	if err != nil || value < 0 {
		return errors.New("want a duration such as 5s, or off")
	}
	*d = durationOrOff(value)
	return nil
}

func (d *durationOrOff) Type() string { return "duration" }
