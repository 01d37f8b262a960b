// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// examples finds the folder of the example manifests, from anywhere in the module.
func examples() (string, error) {
	out, err := exec.Command("go", "env", "GOMOD").Output()
	if err != nil {
		return "", fmt.Errorf("find the module: %w", err)
	}
	return filepath.Join(filepath.Dir(strings.TrimSpace(string(out))), "examples"), nil
}

// copyManifests copies the manifests that the demo edits from one folder to another.
func copyManifests(from, to string) error {
	if err := os.Mkdir(to, 0o755); err != nil {
		return err
	}
	for _, name := range []string{"echo.yaml", "web.yaml"} {
		text, err := os.ReadFile(filepath.Join(from, name))
		if err == nil {
			err = os.WriteFile(filepath.Join(to, name), text, 0o644)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// editManifests changes files as one should: write the new one beside, then rename it over the old one. It
// returns the names of those that the edit changes; none is an error.
func editManifests(folder string, edit func(text string) string) (changed []string, err error) {
	files, err := filepath.Glob(filepath.Join(folder, "*.yaml"))
	if err != nil {
		return nil, err
	}
	for _, f := range files {
		before, err := os.ReadFile(f)
		if err != nil {
			return nil, err
		}
		after := edit(string(before))
		if after == string(before) {
			continue
		}
		beside := f + ".new"
		if err := os.WriteFile(beside, []byte(after), 0o644); err != nil {
			return nil, err
		}
		if err := os.Rename(beside, f); err != nil {
			return nil, err
		}
		changed = append(changed, filepath.Base(f))
	}
	if len(changed) == 0 {
		return nil, fmt.Errorf("the manifests in %s are not what the demo expects: nothing to edit", folder)
	}
	return changed, nil
}

// endpointLine is how the examples write an endpoint.
func endpointLine(a netip.Addr) string { return fmt.Sprintf("- addresses: [%q]\n", a) }

// addEndpoint returns an edit that adds an endpoint behind another one.
func addEndpoint(behind, added netip.Addr) func(string) string {
	return func(text string) string {
		return strings.ReplaceAll(text, endpointLine(behind), endpointLine(behind)+endpointLine(added))
	}
}

// removeEndpoint returns an edit that removes an endpoint.
func removeEndpoint(a netip.Addr) func(string) string {
	return func(text string) string { return strings.ReplaceAll(text, endpointLine(a), "") }
}

// The first port number of web.yaml, and one that there is not.
const (
	goodPort = "    port: 80 "
	badPort  = "    port: 70000 "
)
