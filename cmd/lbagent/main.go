// SPDX-License-Identifier: Apache-2.0

// Command lbagent is the agent and the tools that look at what it does: `lbagent --help`.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/cilium/ebpf"
	"github.com/spf13/cobra"

	"github.com/lbagent/lbagent/agent"
	"github.com/lbagent/lbagent/maps"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // a second signal ends the process at once
	os.Exit(execute(ctx, os.Args[1:], os.Stdout, os.Stderr))
}

// The exit codes, which scripts rely on.
const (
	exitDone   = 0
	exitFailed = 1 // one line on stderr says why, unless the output did
	exitUsage  = 2
)

// usageError is a mistake of the command line, not of the machine.
type usageError struct{ error }

// errSaid fails a command whose output has said why.
var errSaid = errors.New("failed, as the output says")

// execute runs one command line and returns its exit code.
func execute(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	root := newRoot()
	root.SetArgs(args)
	root.SetOut(stdout)
	root.SetErr(stderr)
	err := root.ExecuteContext(ctx)
	if err == nil {
		return exitDone
	}
	if errors.Is(err, errSaid) {
		return exitFailed
	}
	if refusal, ok := errors.AsType[*ebpf.VerifierError](err); ok {
		fmt.Fprintf(stderr, "%+v\n", refusal) // the log, for whoever mends it
	}
	fmt.Fprintf(stderr, "lbagent: %s\n", strings.ReplaceAll(err.Error(), "\n", "; "))
	if _, ok := errors.AsType[usageError](err); ok {
		return exitUsage
	}
	return exitFailed
}

// places are where an agent's things are; every command that needs one has them from the same flags.
type places struct {
	bpfRoot string
	socket  string
}

// openMaps opens the pinned maps to read them, whether or not an agent is running.
func (p *places) openMaps() (*maps.Maps, error) { return maps.Read(filepath.Join(p.bpfRoot, "maps")) }

func newRoot() *cobra.Command {
	var defaults agent.Config
	defaults.Defaults()
	p := &places{}
	root := group("lbagent", "An eBPF load balancer for Kubernetes Services on a Linux node",
		newRun(p), newCheck(p), newValidate(), newStatus(p),
		newService(p), newBackend(p), newFlow(p), newCleanup(p), newVersion())
	root.RunE = func(cmd *cobra.Command, args []string) error {
		if len(args) == 0 {
			return cmd.Help()
		}
		return unknownCommand(cmd, args)
	}
	root.SilenceErrors, root.SilenceUsage = true, true
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return usageError{err} })
	root.PersistentFlags().StringVar(&p.bpfRoot, "bpf-root", defaults.BPFRoot, "`folder` of the pinned maps and links, on a BPF file system")
	root.PersistentFlags().StringVar(&p.socket, "socket", defaults.Socket, "`path` of the agent's admin socket")
	return root
}

// group is a command that has only commands below it.
func group(use, short string, commands ...*cobra.Command) *cobra.Command {
	cmd := &cobra.Command{Use: use, Short: short, Args: cobra.ArbitraryArgs, RunE: unknownCommand}
	cmd.AddCommand(commands...)
	return cmd
}

func unknownCommand(cmd *cobra.Command, args []string) error {
	if len(args) == 0 {
		var names []string
		for _, c := range cmd.Commands() {
			names = append(names, c.Name())
		}
		return usageError{fmt.Errorf("%s wants one of: %s", cmd.CommandPath(), strings.Join(names, ", "))}
	}
	return usageError{fmt.Errorf("%s knows no %q; see %s --help", cmd.CommandPath(), args[0], cmd.CommandPath())}
}

// usage makes an error of `check` one of usage, which says what is wanted: what cobra says of one argument too
// many is that it is no command.
func usage(check cobra.PositionalArgs) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if check(cmd, args) == nil {
			return nil
		}
		got := "no arguments"
		if len(args) > 0 {
			got = fmt.Sprintf("arguments %q", args)
		}
		return usageError{fmt.Errorf("%s: got %s, want: %s", cmd.CommandPath(), got, cmd.UseLine())}
	}
}
