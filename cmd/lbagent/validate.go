// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"io"
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
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		problems, err := validate(cmd.Context(), args)
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
func validate(ctx context.Context, paths []string) ([]lb.Problem, error) {
	folder, problems := manifest.Load(paths...)
	objects, err := source.New(source.Watches{
		Services: folder.Services(), EndpointSlices: folder.EndpointSlices(), Nodes: folder.Nodes(),
	})
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(ctx)
	ended := make(chan error)
	go func() { ended <- objects.Run(ctx) }()
	names, err := objects.Next(ctx)
	table := resolve.NewTable(resolve.Options{})
	for _, name := range names {
		service, endpoints := objects.Service(name)
		table.Update(resolve.Name(name), service, endpoints)
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
