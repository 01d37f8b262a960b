// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/lbagent/lbagent/api"
)

func newService(p *places) *cobra.Command {
	return group("service", "Look at the services that are in force", newServiceList(p), newServiceShow(p))
}

func newServiceList(p *places) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "list",
		Short: "List the services that are in force",
		Long: "List the services that are in force, a line for each address they are reached at, hostPorts of Pods among\n" +
			"them. They are read from the pinned maps: what the programs do, also while no agent is running. SCOPE is\n" +
			"Local where the traffic policy keeps new connections on this node (to an address that is no ClusterIP,\n" +
			"those from outside), and ACTIVE how many backends they choose from.",
		Example: "  lbagent service list\n  lbagent service list -o json | jq '.[].frontends[].address'",
		Args:    usage(cobra.NoArgs),
	}
	out := addOutput(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		services, err := p.services()
		if err != nil {
			return err
		}
		return out.print(cmd.OutOrStdout(), services, func(w io.Writer) { columns(w, serviceRows(services)) })
	}
	return cmd
}

func serviceRows(services []service) [][]string {
	rows := [][]string{{"NAMESPACE", "NAME", "PORT", "PROTOCOL", "ADDRESS", "KIND", "SCOPE", "ACTIVE", "DRAINING"}}
	for _, s := range services {
		row := func(address, kind, scope string, active int) {
			rows = append(rows, []string{s.Namespace, objectName(s.ServiceName), s.Port, s.Protocol, address, kind, scope,
				fmt.Sprint(active), fmt.Sprint(s.count("draining"))})
		}
		for _, f := range s.Frontends {
			row(addrPort(f), f.Kind, f.Scope, s.active(f))
		}
		if len(s.Frontends) == 0 {
			row("", "", "", s.count("active"))
		}
	}
	return rows
}

// objectName tells a Pod's name from a Service's.
func objectName(n api.ServiceName) string {
	if n.Pod {
		return "pod/" + n.Name
	}
	return n.Name
}

func addrPort(f api.Frontend) string { return netip.AddrPortFrom(f.Address, f.Port).String() }

func newServiceShow(p *places) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "show NAMESPACE/NAME",
		Short: "Show one Service, or the hostPorts of one Pod: addresses, policies, endpoints and why each is used or not",
		Long: "Show one Service, or the hostPorts of one Pod: for each port, in each family, the addresses it is reached at\n" +
			"or waits for, its policies, and its endpoints. New connections to an address choose among the endpoints that\n" +
			"its scope uses: Cluster, or Local, which is those on this node; of the others it says why not. The agent is\n" +
			"asked; where none is running, what the pinned maps say is shown, which is what the programs do.",
		Example: "  lbagent service show default/web\n  lbagent service show default/web -o yaml",
		Args:    usage(cobra.ExactArgs(1)),
	}
	out := addOutput(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		namespace, name, err := splitName(args[0])
		if err != nil {
			return err
		}
		services, err := p.service(cmd.Context(), namespace, name)
		noAgent := errors.Is(err, api.ErrNoAgent)
		switch {
		case err != nil && !noAgent:
			return err
		case len(services) == 0:
			return fmt.Errorf("service %s is not in force: `lbagent service list` names those that are, `lbagent status` the problems",
				args[0])
		case noAgent:
			fmt.Fprintf(cmd.ErrOrStderr(), "lbagent: %v: this is what the pinned maps say; where endpoints are, and why they are "+
				"not used, only an agent knows\n", err)
		}
		return out.print(cmd.OutOrStdout(), services, func(w io.Writer) { showServices(w, services) })
	}
	return cmd
}

func showServices(w io.Writer, services []service) {
	for i, s := range services {
		if i > 0 {
			fmt.Fprintln(w)
		}
		fmt.Fprint(w, s.ServiceName)
		if s.ID != 0 {
			fmt.Fprintf(w, ", id %d", s.ID)
		}
		fmt.Fprintln(w)
		if policies := policiesOf(s); len(policies) > 0 {
			fmt.Fprintln(w, strings.Join(policies, ", "))
		}
		rows := [][]string{{"ADDRESS", "KIND", "SCOPE", "STATE"}}
		for _, f := range s.Frontends {
			state := "in force"
			if !s.inForce(f) {
				state = "not written: see lbagent status"
			}
			rows = append(rows, []string{addrPort(f), f.Kind, f.Scope, state})
		}
		if s.known != nil {
			for _, f := range s.Waiting {
				rows = append(rows, []string{addrPort(f.Frontend), f.Kind, f.Scope, "waits for " + f.Holder.String()})
			}
		}
		fmt.Fprintln(w)
		columns(w, rows)
		fmt.Fprintln(w)
		rows = endpointRows(s)
		if len(rows) == 1 {
			fmt.Fprintln(w, "no endpoints: what is sent to it is rejected")
			continue
		}
		columns(w, rows)
	}
}

func policiesOf(s service) (policies []string) {
	if s.known != nil {
		policies = append(policies, "algorithm "+s.Algorithm)
	}
	if s.AffinitySeconds > 0 {
		policies = append(policies, fmt.Sprintf("affinity ClientIP for %s", time.Duration(s.AffinitySeconds)*time.Second))
	}
	if len(s.SourceRanges) > 0 {
		policies = append(policies, "LoadBalancer addresses from "+strings.Trim(fmt.Sprint(s.SourceRanges), "[]")+" only")
	}
	return policies
}

// endpointRows has a line for each endpoint that the agent knows and each backend that the maps have.
func endpointRows(s service) [][]string {
	rows := [][]string{{"ENDPOINT", "NODE", "ZONE", "WEIGHT", "CLUSTER", "LOCAL", "STATE", "GENERATION", "ID"}}
	use := func(u api.Use) string {
		switch {
		case u.Used:
			return "used"
		case u.Reason == "":
			return "not used"
		}
		return u.Reason
	}
	backends := map[string]backend{}
	for _, b := range s.Backends {
		backends[b.addrPort()] = b
	}
	state := func(address string) []string {
		b, ok := backends[address]
		if !ok {
			return []string{"", "", ""}
		}
		delete(backends, address)
		return []string{b.State, fmt.Sprint(b.Generation), fmt.Sprint(b.ID)}
	}
	if s.known != nil {
		for _, e := range s.Endpoints {
			address := netip.AddrPortFrom(e.Address, e.Port).String()
			rows = append(rows, append([]string{address, e.Node, e.Zone, fmt.Sprint(e.Weight), use(e.Cluster), use(e.Local)}, state(address)...))
		}
	}
	for _, b := range s.Backends {
		if _, left := backends[b.addrPort()]; left {
			rows = append(rows, append([]string{b.addrPort(), "", "", "", use(api.Use{Used: b.Cluster}), use(api.Use{Used: b.Local})},
				state(b.addrPort())...))
		}
	}
	return rows
}

func splitName(s string) (namespace, name string, err error) {
	namespace, name, ok := strings.Cut(s, "/")
	if !ok || namespace == "" || name == "" || strings.Contains(name, "/") {
		return "", "", usageError{fmt.Errorf("%q is not NAMESPACE/NAME of a Service", s)}
	}
	return namespace, name, nil
}

func (p *places) services() ([]service, error) {
	m, err := p.openMaps()
	if err != nil {
		return nil, err
	}
	defer m.Close()
	return readServices(m)
}

// service returns the services of a Service and of a Pod of that name: what the maps say, and what the agent
// knows. Returns what the maps say and ErrNoAgent if nobody answers.
func (p *places) service(ctx context.Context, namespace, name string) ([]service, error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	answers, noAgent := api.NewClient(p.socket).Services(ctx, namespace, name)
	if noAgent != nil && !errors.Is(noAgent, api.ErrNoAgent) {
		return nil, noAgent
	}
	services, err := p.services()
	if err != nil {
		return nil, err
	}
	services = slices.DeleteFunc(services, func(s service) bool { return s.Namespace != namespace || s.Name != name })
	return with(services, answers), noAgent
}

// with adds to what the maps say what an agent answers, which may be newer.
func with(services []service, answers []api.Service) []service {
	for _, a := range answers {
		i := slices.IndexFunc(services, func(s service) bool { return s.ServiceName == a.ServiceName })
		if i < 0 { // all of its addresses are another's, or the maps are full
			services = append(services, service{ServiceName: a.ServiceName, Backends: []backend{}})
			i = len(services) - 1
		}
		s := &services[i]
		s.Policy, s.Frontends, s.written = a.Policy, a.Frontends, s.Frontends
		s.known = &known{a.Algorithm, a.Waiting, a.Endpoints}
	}
	return services
}
