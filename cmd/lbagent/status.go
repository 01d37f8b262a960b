// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/lbagent/lbagent/api"
)

func newStatus(p *places) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "status",
		Short: "Show on one page how the agent and its data plane are",
		Long: "Show on one page how the agent and its data plane are: programs, maps, the source, problems. Where no\n" +
			"agent answers at the socket, the page has what is pinned: the data plane goes on without an agent, with\n" +
			"what it knew last.",
		Example: "  lbagent status\n  lbagent status -o json | jq .problems",
		Args:    usage(cobra.NoArgs),
	}
	out := addOutput(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		s, err := readStatus(cmd.Context(), p)
		if err != nil {
			return err
		}
		return out.print(cmd.OutOrStdout(), s, func(w io.Writer) { showStatus(w, s, time.Now()) })
	}
	return cmd
}

func readStatus(ctx context.Context, p *places) (api.Status, error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	s, err := api.NewClient(p.socket).Status(ctx)
	if errors.Is(err, api.ErrNoAgent) {
		return api.FromPins(p.bpfRoot)
	}
	return s, err
}

func showStatus(w io.Writer, s api.Status, now time.Time) {
	rows := agentRows(s, now)
	t := &strings.Builder{}
	columns(t, rows)
	fmt.Fprint(w, t)

	section := func(title string, rows [][]string, none string) {
		fmt.Fprintf(w, "\n%s\n", title)
		if len(rows) < 2 {
			fmt.Fprintln(w, none)
			return
		}
		columns(w, rows)
	}

	rows = [][]string{{"DEVICE", "PROGRAM", "METHOD"}}
	for _, a := range s.Programs {
		rows = append(rows, []string{a.Device, a.Program, a.Method})
	}
	section("Programs", rows, "none: no packet is translated")
	if len(s.Uncovered) > 0 {
		rows = [][]string{{"DEVICE", "REASON"}}
		for _, u := range s.Uncovered {
			rows = append(rows, []string{u.Device, u.Reason})
		}
		section("Devices without programs", rows, "")
	}

	if len(s.Listeners) > 0 {
		rows = [][]string{{"SERVER", "ADDRESS", "STATE"}}
		for _, l := range s.Listeners {
			rows = append(rows, []string{l.Name, l.Address, cmp.Or(l.Error, "listening")})
		}
		section("Servers", rows, "")
	}

	rows = [][]string{{"MAP", "ENTRIES", "OF", "FULL"}}
	for _, m := range s.Maps {
		full := fmt.Sprintf("%d%%", 100*m.Entries/int(max(m.MaxEntries, 1)))
		rows = append(rows, []string{m.Name, fmt.Sprint(m.Entries), fmt.Sprint(m.MaxEntries), full})
	}
	section("Maps", rows, "none")

	rows = [][]string{{"REASON", "PACKETS"}}
	for _, name := range slices.Sorted(maps.Keys(s.Reasons)) {
		rows = append(rows, []string{name, fmt.Sprint(s.Reasons[name])})
	}
	section("Packets", rows, "none yet")

	if !s.Running {
		return
	}
	fmt.Fprintln(w, "\nProblems")
	if len(s.Problems) == 0 {
		fmt.Fprintln(w, "none")
	}
	printProblems(w, s.Problems)
}

// agentRows is the head of the page: a line for each thing that there is one of.
func agentRows(s api.Status, now time.Time) [][]string {
	if !s.Running {
		line := "not running; nothing is attached"
		if len(s.Programs) > 0 {
			line = "not running; the data plane goes on with what it knew last"
		}
		return [][]string{{"Agent", line}}
	}
	rows := [][]string{
		{"Agent", fmt.Sprintf("running, started %s, pid %d, version %s", ago(s.Started, now), s.PID, s.Version)},
		{"Node", s.NodeName},
	}
	at := "at " + strings.Trim(fmt.Sprint(s.NodePortAddresses), "[]")
	if len(s.NodePortAddresses) == 0 {
		at = "nowhere: this host has no address that --nodeport-addresses means"
	}
	rows = append(rows, []string{"NodePorts", at})
	if s.Source != nil {
		state := "not yet read"
		switch {
		case s.Source.Held:
			state = "held: nothing is removed until " + strings.Join(s.Source.HeldFiles, ", ") + " can be read"
		case s.Source.Synced:
			state = "read, last change " + ago(s.Source.LastChange, now)
		}
		rows = append(rows, []string{"Source", s.Source.Path + ", " + state})
	}
	if s.Apply != nil {
		line := "all in the maps"
		if s.Apply.Pending > 0 {
			line = fmt.Sprintf("changes pending: %d", s.Apply.Pending)
		}
		line += ", last written " + ago(s.Apply.LastApply, now)
		if s.Apply.LastError != "" {
			line += "; " + s.Apply.LastError
		}
		rows = append(rows, []string{"Services", line})
	}
	if s.AttachError != "" {
		rows = append(rows, []string{"Attach", s.AttachError})
	}
	if s.Features != nil {
		rows = append(rows, []string{"Kernel", fmt.Sprintf("tcx %s, csumIPv6 %s", yes(s.Features.TCX), yes(s.Features.CsumIPv6))})
	}
	return rows
}

func yes(b bool) string {
	if b {
		return "yes"
	}
	return "no"
}

// ago is how long ago something was, to a second.
func ago(t, now time.Time) string {
	if t.IsZero() {
		return "never"
	}
	return max(0, now.Sub(t)).Round(time.Second).String() + " ago"
}

// printProblems writes a line for each problem: its severity, where it is, and what it is.
func printProblems(w io.Writer, problems []api.Problem) {
	for _, p := range problems {
		fmt.Fprintf(w, "%s: %s\n", p.Severity, p)
	}
}
