// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"io"
	"net/netip"
	"slices"
	"strings"

	"github.com/spf13/cobra"
)

func newService(p *places) *cobra.Command {
	return group("service", "Look at the services that are in force", newServiceList(p), newServiceShow(p))
}

func newServiceList(p *places) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "list",
		Short: "List the services that are in force",
		Long: "List the services that are in force, a line for each address they are reached at. They are read from\n" +
			"the pinned maps: what the programs do, also while no agent is running.",
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
	rows := [][]string{{"NAMESPACE", "NAME", "PORT", "PROTOCOL", "ADDRESS", "KIND", "ACTIVE", "DRAINING"}}
	for _, s := range services {
		row := func(address, kind string) {
			rows = append(rows, []string{s.Namespace, s.Name, s.Port, s.Protocol, address, kind,
				fmt.Sprint(s.count("active")), fmt.Sprint(s.count("draining"))})
		}
		for _, f := range s.Frontends {
			row(netip.AddrPortFrom(f.Address, f.Port).String(), f.Kind)
		}
		if len(s.Frontends) == 0 {
			row("", "")
		}
	}
	return rows
}

func newServiceShow(p *places) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "show NAMESPACE/NAME",
		Short: "Show one Service: its addresses, and its backends with their state",
		Long: "Show one Service: for each of its ports, in each family, the addresses it is reached at and its\n" +
			"backends. New connections go to active backends; a draining one keeps those that it has.",
		Example: "  lbagent service show default/web\n  lbagent service show default/web -o yaml",
		Args:    usage(cobra.ExactArgs(1)),
	}
	out := addOutput(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		namespace, name, err := splitName(args[0])
		if err != nil {
			return err
		}
		services, err := p.services()
		if err != nil {
			return err
		}
		services = slices.DeleteFunc(services, func(s service) bool { return s.Namespace != namespace || s.Name != name })
		if len(services) == 0 {
			return fmt.Errorf("service %s is not in force: `lbagent service list` names those that are, `lbagent status` the problems",
				args[0])
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
		port := ""
		if s.Port != "" {
			port = ":" + s.Port
		}
		fmt.Fprintf(w, "%s/%s%s/%s %s, id %d\n\n", s.Namespace, s.Name, port, s.Protocol, s.Family, s.ID)
		rows := [][]string{{"ADDRESS", "KIND"}}
		for _, f := range s.Frontends {
			rows = append(rows, []string{netip.AddrPortFrom(f.Address, f.Port).String(), f.Kind})
		}
		columns(w, rows)
		fmt.Fprintln(w)
		if len(s.Backends) == 0 {
			fmt.Fprintln(w, "no backends: its packets are dropped")
			continue
		}
		rows = [][]string{{"BACKEND", "STATE", "GENERATION", "ID"}}
		for _, b := range s.Backends {
			rows = append(rows, []string{b.addrPort(), b.State, fmt.Sprint(b.Generation), fmt.Sprint(b.ID)})
		}
		columns(w, rows)
	}
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
