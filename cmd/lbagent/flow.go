// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"fmt"
	"io"
	"net/netip"
	"slices"
	"time"

	"github.com/spf13/cobra"

	"github.com/lbagent/lbagent/api"
	"github.com/lbagent/lbagent/lb"
	"github.com/lbagent/lbagent/loader"
	"github.com/lbagent/lbagent/maps"
)

func newFlow(p *places) *cobra.Command {
	return group("flow", "Look at the connections that are translated", newFlowList(p))
}

// flow is a living flow: a forward half with its reply half.
type flow struct {
	Client   netip.AddrPort   `json:"client"`
	VIP      netip.AddrPort   `json:"vip"`
	Backend  netip.AddrPort   `json:"backend"`
	Protocol string           `json:"protocol"`
	Service  *api.ServiceName `json:"service,omitempty"` // absent where neither the VIP nor the backend is in force
	State    string           `json:"state"`
	Age      float64          `json:"ageSeconds"` // of the last packet, in either direction
	Forward  traffic          `json:"forward"`
	Reply    traffic          `json:"reply"`
}

type traffic struct {
	Packets uint64 `json:"packets"`
	Bytes   uint64 `json:"bytes"`
}

func newFlowList(p *places) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "list",
		Short: "List the connections that are translated",
		Long: "List the connections that are translated, a line for both directions, read from the pinned maps.\n" +
			"Packets and bytes are those from the client and, after the slash, those back to it. The age is that of\n" +
			"the last packet, to a second or so; flows whose timeout is past are absent, as they are for the programs.",
		Example: "  lbagent flow list\n  lbagent flow list --service default/web -o json",
		Args:    usage(cobra.NoArgs),
	}
	out := addOutput(cmd)
	only := cmd.Flags().String("service", "", "only those of the Service `NAMESPACE/NAME`")
	direct := cmd.Flags().Bool("direct", false, "also the connections straight to a backend's own address")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		keep := func(flow) bool { return true }
		if *only != "" {
			namespace, name, err := splitName(*only)
			if err != nil {
				return err
			}
			keep = func(f flow) bool {
				return f.Service != nil && f.Service.Namespace == namespace && f.Service.Name == name
			}
		}
		m, err := p.openMaps()
		if err != nil {
			return err
		}
		defer m.Close()
		flows, err := readFlows(m, loader.DefaultTimeouts(), *direct)
		if err != nil {
			return err
		}
		flows = slices.DeleteFunc(flows, func(f flow) bool { return !keep(f) })
		return out.print(cmd.OutOrStdout(), flows, func(w io.Writer) {
			rows := [][]string{{"CLIENT", "VIP", "BACKEND", "PROTOCOL", "STATE", "AGE", "PACKETS", "BYTES"}}
			for _, f := range flows {
				rows = append(rows, []string{f.Client.String(), f.VIP.String(), f.Backend.String(), f.Protocol, f.State,
					time.Duration(f.Age * float64(time.Second)).Round(time.Second).String(),
					fmt.Sprintf("%d/%d", f.Forward.Packets, f.Reply.Packets), fmt.Sprintf("%d/%d", f.Forward.Bytes, f.Reply.Bytes)})
			}
			columns(w, rows)
		})
	}
	return cmd
}

// readFlows returns the living flows, by client, VIP and protocol. A reply half alone is none: it only lets
// the last replies of a flow that has ended pass.
func readFlows(m *maps.Maps, timeouts loader.Timeouts, direct bool) ([]flow, error) {
	names, err := readNames(m)
	if err != nil {
		return nil, err
	}
	services := map[lb.VIP]uint32{}
	err = m.EachFrontend(func(k maps.FrontendKey, f maps.Frontend) bool {
		if lb.Kind(f.Kind) != lb.Identity { // which is no service's
			services[k.VIP()] = f.Service
		}
		return true
	})
	if err != nil {
		return nil, err
	}
	type half struct {
		maps.Flow
		assured bool
	}
	halves := map[maps.Tuple]half{}
	err = m.EachFlow(func(t maps.Tuple, f maps.Flow, assured bool) bool {
		halves[t] = half{f, assured}
		return true
	})
	if err != nil {
		return nil, err
	}
	now, err := maps.Now() // after the last read: no age is negative for long
	if err != nil {
		return nil, err
	}
	capacity := m.Sizes().Backends
	flows := []flow{}
	for t, half := range halves {
		if maps.EnumName("flow_role", uint64(half.Role)) != "forward" {
			continue
		}
		if !direct && half.To == t {
			continue
		}
		in := maps.Pending
		if half.assured {
			in = maps.Flows
		}
		state, timeout := timeouts.Phase(half.State, uint8(t.Protocol), in)
		age := max(0, time.Duration(now-half.LastSeenNs))
		if age > timeout {
			continue
		}
		f := flow{
			Client: t.From(), VIP: t.To(), Backend: half.To.To(), Protocol: lb.Protocol(t.Protocol).String(),
			State: state, Age: age.Seconds(), Forward: traffic{half.Packets, half.Bytes},
		}
		if reply, ok := halves[inverse(half.To)]; ok && reply.To == inverse(t) {
			f.Reply = traffic{reply.Packets, reply.Bytes}
		}
		id, ok := services[lb.VIP{Addr: t.To().Addr(), Port: t.To().Port(), Protocol: lb.Protocol(t.Protocol)}]
		if !ok && half.Backend < capacity {
			if b := m.Backend(half.Backend); b.Addr() == f.Backend && b.Life.State != maps.BackendRemoved {
				id = b.Service
			}
		}
		if n, ok := names[id]; ok {
			name := api.NameOf(n)
			f.Service = &name
		}
		flows = append(flows, f)
	}
	slices.SortFunc(flows, func(a, b flow) int {
		return cmp.Or(a.Client.Compare(b.Client), a.VIP.Compare(b.VIP), cmp.Compare(a.Protocol, b.Protocol))
	})
	return flows, nil
}

// inverse is the tuple of a packet's answer.
func inverse(t maps.Tuple) maps.Tuple {
	t.Source, t.Destination = t.Destination, t.Source
	t.SourcePort, t.DestinationPort = t.DestinationPort, t.SourcePort
	return t
}
