// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"log/slog"
	"time"

	"github.com/spf13/cobra"

	"github.com/lbagent/lbagent/agent"
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
			source.LogTo(c.Log)
			return agent.Run(cmd.Context(), c)
		},
	}
	f := cmd.Flags()
	f.StringVar(&c.Manifests, "manifests", c.Manifests, "`folder` of Services and EndpointSlices, in YAML or JSON; its changes are followed (required)")
	f.StringVar(&c.NodeName, "hostname-override", c.NodeName, "this node's `name`, as nodeName and Node objects have it")
	f.StringSliceVar(&c.Devices.Devices, "devices", c.Devices.Devices, "`patterns` of the node's own devices (default those with a default route, and overlay devices)")
	f.StringSliceVar(&c.Devices.PodDevices, "pod-devices", c.Devices.PodDevices, "`patterns` of the host's ends of pods' devices")
	f.Var((*durationOrOff)(&c.SilentBackend), "silent-backend-timeout", "`time` that a TCP backend which is gone from every EndpointSlice may leave a segment unanswered before its client is told by a reset; 0: at once, off: never")
	f.Uint32Var(&c.Sizes.Flows, "flows", c.Sizes.Flows, "largest `number` of entries of the flow table, two to a connection, and a quarter as many for those that begin; the least recently used make room (default what the pinned one has, else a four-hundredth of the memory)")
	f.Uint32Var(&c.Sizes.Services, "max-services", c.Sizes.Services, "largest `number` of services, one to a port and family of a Service")
	f.Uint32Var(&c.Sizes.Frontends, "max-frontends", c.Sizes.Frontends, "largest `number` of addresses that services are reached at")
	f.Uint32Var(&c.Sizes.Backends, "max-backends", c.Sizes.Backends, "largest `number` of backends of all services")
	f.Uint32Var(&c.Sizes.Slots, "max-slots", c.Sizes.Slots, "largest `number` of entries of all services' lookup tables")
	return cmd
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
