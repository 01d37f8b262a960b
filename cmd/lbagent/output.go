// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"
	"sigs.k8s.io/yaml"
)

// output is the form in which a command prints, the value of its flag -o.
type output string

const (
	outputTable output = "table"
	outputJSON  output = "json"
	outputYAML  output = "yaml"
)

// addOutput gives a command the flag -o.
func addOutput(cmd *cobra.Command) *output {
	o := outputTable
	cmd.Flags().VarP(&o, "output", "o", "form of the output: table, json or yaml")
	return &o
}

func (o *output) String() string { return string(*o) }

// Type is the flag's in the help.
func (o *output) Type() string { return "form" }

// Set refuses what is no form.
func (o *output) Set(s string) error {
	switch output(s) {
	case outputTable, outputJSON, outputYAML:
		*o = output(s)
		return nil
	}
	return fmt.Errorf("want table, json or yaml")
}

// print writes a value as JSON or YAML, or what `table` writes of it for people.
func (o output) print(w io.Writer, value any, table func(w io.Writer)) error {
	var text []byte
	var err error
	switch o {
	case outputJSON:
		text, err = json.MarshalIndent(value, "", "  ")
		text = append(text, '\n')
	case outputYAML:
		text, err = yaml.Marshal(value)
	default:
		var b strings.Builder
		table(&b)
		text = []byte(b.String())
	}
	if err != nil {
		return fmt.Errorf("write the output as %s: %w", o, err)
	}
	_, err = w.Write(text)
	return err
}

// columns writes rows of fields, the first of which names the columns.
func columns(w io.Writer, rows [][]string) {
	t := tabwriter.NewWriter(w, 0, 0, 3, ' ', 0)
	for _, row := range rows {
		for i, field := range row {
			if field == "" {
				row[i] = "-"
			}
		}
		fmt.Fprintln(t, strings.Join(row, "\t"))
	}
	t.Flush() // writes to memory
}
