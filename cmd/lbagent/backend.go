// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"fmt"
	"io"
	"slices"

	"github.com/spf13/cobra"

	"github.com/lbagent/lbagent/api"
	"github.com/lbagent/lbagent/lb"
	"github.com/lbagent/lbagent/maps"
)

func newBackend(p *places) *cobra.Command {
	return group("backend", "Look at the backends", newBackendList(p))
}

// listedBackend is a backend with its service, which is absent where the backend is removed: the id may be
// another service's by then.
type listedBackend struct {
	Service *api.ServiceName `json:"service,omitempty"`
	backend
}

func newBackendList(p *places) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "list",
		Short: "List the backends of all services",
		Long: "List the backends of all services, read from the pinned maps. New connections go to active ones; a\n" +
			"draining one keeps those that it has; of a removed one no more than the id is held, and the address\n" +
			"for connections that have not ended.",
		Example: "  lbagent backend list\n  lbagent backend list -o json | jq '.[] | select(.state == \"draining\")'",
		Args:    usage(cobra.NoArgs),
	}
	out := addOutput(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		m, err := p.openMaps()
		if err != nil {
			return err
		}
		defer m.Close()
		backends, err := readBackends(m)
		if err != nil {
			return err
		}
		return out.print(cmd.OutOrStdout(), backends, func(w io.Writer) {
			rows := [][]string{{"NAMESPACE", "NAME", "PORT", "PROTOCOL", "BACKEND", "STATE", "GENERATION", "ID"}}
			for _, b := range backends {
				var s api.ServiceName
				if b.Service != nil {
					s = *b.Service
				}
				rows = append(rows, []string{s.Namespace, objectName(s), s.Port, s.Protocol, b.addrPort(), b.State,
					fmt.Sprint(b.Generation), fmt.Sprint(b.ID)})
			}
			columns(w, rows)
		})
	}
	return cmd
}

// readBackends returns every backend that has an id, by service, address and id; removed ones last.
func readBackends(m *maps.Maps) ([]listedBackend, error) {
	names, err := readNames(m)
	if err != nil {
		return nil, err
	}
	all := []listedBackend{}
	services := map[uint32]lb.ServiceName{} // by id of the backend
	for id, b := range m.EachBackend() {
		l := listedBackend{backend: backendOf(id, b)}
		if n, ok := names[b.Service]; ok && b.Life.State != maps.BackendRemoved {
			name := api.NameOf(n)
			l.Service, services[id] = &name, n
		}
		all = append(all, l)
	}
	slices.SortFunc(all, func(a, b listedBackend) int {
		if (a.Service == nil) != (b.Service == nil) {
			if a.Service == nil {
				return 1
			}
			return -1
		}
		return cmp.Or(services[a.ID].Compare(services[b.ID]), a.Address.Compare(b.Address), cmp.Compare(a.Port, b.Port),
			cmp.Compare(a.ID, b.ID))
	})
	return all, nil
}
