// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"io"
	"runtime"

	"github.com/spf13/cobra"

	"github.com/lbagent/lbagent/agent"
	"github.com/lbagent/lbagent/maps"
)

func newVersion() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "version",
		Short: "Print the version",
		Long: "Print the version of lbagent, that of the layout of its maps (an agent adopts maps of its own layout\n" +
			"only) and that of the Go it was built with.",
		Example: "  lbagent version",
		Args:    usage(cobra.NoArgs),
	}
	out := addOutput(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		v := struct {
			Version string `json:"version"`
			Layout  int    `json:"layout"`
			Go      string `json:"go"`
		}{agent.Version(), maps.LayoutVersion, runtime.Version()}
		return out.print(cmd.OutOrStdout(), v, func(w io.Writer) {
			fmt.Fprintf(w, "lbagent %s, map layout %d, %s\n", v.Version, v.Layout, v.Go)
		})
	}
	return cmd
}
