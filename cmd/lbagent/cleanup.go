// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/lbagent/lbagent/api"
	"github.com/lbagent/lbagent/loader"
)

func newCleanup(p *places) *cobra.Command {
	return &cobra.Command{
		Use:   "cleanup",
		Short: "Detach the programs and remove every trace of them",
		Long: "Detach the programs from the devices of this network namespace and remove all pinned maps and links, of\n" +
			"any version, and the socket of an agent that was killed. Services stop being served at once, and\n" +
			"connections through them break. Refused while an agent is running.",
		Example: "  systemctl stop lbagent && lbagent cleanup",
		Args:    usage(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			removed, err := loader.Cleanup(p.bpfRoot)
			for _, what := range removed { // in force whatever the error says
				fmt.Fprintln(cmd.OutOrStdout(), "removed", what)
			}
			if err != nil {
				return err
			}
			stale, err := api.RemoveStale(p.socket)
			if err != nil && !errors.Is(err, api.ErrInUse) { // an agent with another --bpf-root may answer there
				return err
			}
			if stale {
				fmt.Fprintln(cmd.OutOrStdout(), "removed socket", p.socket)
			}
			if !stale && len(removed) == 0 {
				fmt.Fprintln(cmd.OutOrStdout(), "nothing to remove")
			}
			return nil
		},
	}
}
