// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"io"
	"net/netip"
	"slices"

	"github.com/spf13/cobra"

	"github.com/lbagent/lbagent/api"
	"github.com/lbagent/lbagent/lb"
	"github.com/lbagent/lbagent/resolve"
	"github.com/lbagent/lbagent/source"
	"github.com/lbagent/lbagent/source/manifest"
)

func newValidate() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "validate FILE|FOLDER...",
		Short: "Say what is wrong with manifests, without running anything",
		Long: "Say what is wrong with manifests: errors, for which a file is not taken; warnings, such as an address that\n" +
			"two Services ask for; and what is accepted but not yet served. They are read as `lbagent run` reads them, all\n" +
			"together. Exits 1 if there is an error, 0 otherwise.",
		Example: "  lbagent validate /etc/lbagent/manifests\n  lbagent validate web.yaml shop.yaml -o json",
		Args:    usage(cobra.MinimumNArgs(1)),
	}
	out := addOutput(cmd)
	nodePorts := cmd.Flags().String("nodeport-range", manifest.DefaultNodePorts.String(), "`range` of the node ports, as of lbagent run")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		ports, err := manifest.ParsePortRange(*nodePorts)
		if err != nil {
			return usageError{fmt.Errorf("--nodeport-range: %w", err)}
		}
		problems, err := validate(cmd.Context(), ports, args)
		if err != nil {
			return err
		}
		listed := api.ProblemsOf(problems)
		err = out.print(cmd.OutOrStdout(), listed, func(w io.Writer) {
			printProblems(w, listed)
			if len(listed) == 0 {
				fmt.Fprintln(w, "no problems")
			}
		})
		if err != nil {
			return err
		}
		if slices.ContainsFunc(problems, func(p lb.Problem) bool { return p.Severity == lb.Error }) {
			return errSaid
		}
		return nil
	}
	return cmd
}

// validate puts manifests through the stages of the agent up to resolve.
func validate(ctx context.Context, nodePorts manifest.PortRange, paths []string) ([]lb.Problem, error) {
	folder, problems := manifest.Load(nodePorts, paths...)
	objects, err := source.New(source.Watches{
		Services: folder.Services(), EndpointSlices: folder.EndpointSlices(), Pods: folder.Pods(), Nodes: folder.Nodes(),
	})
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(ctx)
	ended := make(chan error)
	go func() { ended <- objects.Run(ctx) }()
	dirty, err := objects.Next(ctx)
	table := resolve.NewTable(resolve.Options{})
	// Of no node; what two Services ask for at all addresses of one shows at any.
	table.SetHost(resolve.Host{NodePorts: []netip.Addr{netip.IPv4Unspecified(), netip.IPv6Unspecified()}})
	for _, name := range dirty.Services {
		service, endpoints := objects.Service(name)
		table.Update(resolve.Name(name), service, endpoints)
	}
	for _, name := range dirty.Pods {
		table.UpdatePod(resolve.Name(name), objects.Pod(name))
	}
	cancel()
	if runErr := <-ended; err == nil {
		err = runErr
	}
	for _, p := range table.Problems() {
		p.File, p.Document = folder.FileOf(p.Object)
		problems = append(problems, p)
	}
	return problems, err
}
