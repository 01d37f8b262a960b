// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"cmp"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/lbagent/lbagent/maps"
	"github.com/lbagent/lbagent/node"
)

// Config is what an operator chooses; its fields are the flags of `lbagent run`.
type Config struct {
	Manifests string // --manifests: the folder of manifests
	NodeName  string // --hostname-override
	Devices   node.Config
	BPFRoot   string     // --bpf-root: the folder of pins
	Socket    string     // --socket
	Sizes     maps.Sizes // --flows, --max-services and so on
	// --silent-backend-timeout; negative: off. 0 is at once, to be set after Defaults.
	SilentBackend time.Duration

	SweepInterval time.Duration // no flag: shorter in tests

	Log *slog.Logger
}

// Defaults fills in what is not set and has a default.
func (c *Config) Defaults() {
	if c.NodeName == "" {
		// As kube-proxy does; that it fails is seen by Validate.
		name, _ := os.Hostname()
		c.NodeName = strings.ToLower(name)
	}
	c.Devices.Defaults()
	sizes := maps.DefaultSizes()
	c.Sizes = maps.Sizes{
		Frontends: cmp.Or(c.Sizes.Frontends, sizes.Frontends), Services: cmp.Or(c.Sizes.Services, sizes.Services),
		Slots: cmp.Or(c.Sizes.Slots, sizes.Slots), Backends: cmp.Or(c.Sizes.Backends, sizes.Backends),
		Flows: c.Sizes.Flows, // 0: what is pinned, or what fits the memory
	}
	c.SilentBackend = cmp.Or(c.SilentBackend, 5*time.Second)
	c.SweepInterval = cmp.Or(c.SweepInterval, sweepInterval)
	c.BPFRoot = cmp.Or(c.BPFRoot, "/sys/fs/bpf/lbagent")
	c.Socket = cmp.Or(c.Socket, "/run/lbagent/lbagent.sock")
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
}

// Validate names each flag whose value cannot be, and says why.
func (c Config) Validate() error {
	errs := []error{c.Devices.Validate()}
	wrong := func(flag, format string, args ...any) {
		errs = append(errs, fmt.Errorf("--"+flag+": "+format, args...))
	}
	if c.Manifests == "" {
		wrong("manifests", "want a folder of manifests")
	} else if info, err := os.Stat(c.Manifests); err != nil {
		wrong("manifests", "%w", err)
	} else if !info.IsDir() {
		wrong("manifests", "%s is no folder", c.Manifests)
	}
	if c.NodeName == "" {
		wrong("hostname-override", "this host has no name: give one")
	}
	for _, path := range []struct{ flag, value string }{{"bpf-root", c.BPFRoot}, {"socket", c.Socket}} {
		if !filepath.IsAbs(path.value) {
			wrong(path.flag, "%q is no absolute path", path.value)
		}
	}
	if filepath.Dir(c.BPFRoot) == "/" {
		wrong("bpf-root", "%s: want a folder inside of one that can be a BPF file system", c.BPFRoot)
	}
	const longest = 107 // of a unix socket's path
	if len(c.Socket) > longest {
		wrong("socket", "%s is longer than %d bytes", c.Socket, longest)
	}
	for _, size := range []struct {
		flag         string
		value, least uint32
	}{
		// Service 0 and backend 0 are none.
		{"flows", c.Sizes.Flows, 2}, {"max-services", c.Sizes.Services, 2}, {"max-frontends", c.Sizes.Frontends, 1},
		{"max-backends", c.Sizes.Backends, 2}, {"max-slots", c.Sizes.Slots, 2},
	} {
		const most = 1 << 26 // beyond that the kernel's own limits are near, and a mistake is likelier
		if size.flag == "flows" && size.value == 0 {
			continue
		}
		if size.value < size.least || size.value > most {
			wrong(size.flag, "%d is not between %d and %d", size.value, size.least, most)
		}
	}
	return errors.Join(errs...)
}
