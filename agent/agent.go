// SPDX-License-Identifier: Apache-2.0

// Package agent wires the stages together: a Config says how, Run runs them. What it does by itself is to
// wait for the right moment: see [Run] and, for what goes on from then on, loop.go.
package agent

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/lbagent/lbagent/api"
	"github.com/lbagent/lbagent/health"
	"github.com/lbagent/lbagent/loader"
	"github.com/lbagent/lbagent/maps"
	"github.com/lbagent/lbagent/metrics"
	"github.com/lbagent/lbagent/node"
	"github.com/lbagent/lbagent/reconcile"
	"github.com/lbagent/lbagent/resolve"
	"github.com/lbagent/lbagent/source"
	"github.com/lbagent/lbagent/source/manifest"
)

// Run runs the agent until ctx ends, and returns nil then. It must be called in the network namespace of the
// devices by a process that is in it with all its threads.
//
// The order is that in which nothing breaks. The socket and the maps come first: they make this agent the only
// one, and until the first Apply they say what they said before. The programs are loaded before
// anything is changed, so that a kernel that refuses them refuses early. All objects are read and resolved
// before the first Apply, else it would remove what was not read yet. Devices get the programs when the maps
// are right. Programs that an earlier agent attached run all the while.
//
// Run leaves maps and programs in place however it ends: a restart is no reason to break a connection.
//
// Returns maps.ErrInUse if another agent has the folder, api.ErrInUse if one has the socket, ErrLayout or
// ErrSize of package maps if what is pinned cannot be adopted, an *ebpf.VerifierError if the kernel refuses
// the programs.
func Run(ctx context.Context, c Config) (err error) {
	closing := func(close func() error) { err = errors.Join(err, close()) }

	flags, err := c.values()
	if err != nil {
		return err
	}
	if err := loader.MountBPF(c.BPFRoot); err != nil {
		return err
	}
	socket, err := api.Listen(c.Socket) // before the maps: who is refused here has made none
	if err != nil {
		return err
	}
	defer socket.Close() // where Serve did not get to it
	m, err := maps.Open(filepath.Join(c.BPFRoot, "maps"), c.Sizes)
	if err != nil {
		return err
	}
	defer closing(m.Close)
	m.Fault = c.beforeWrite
	reconciler, err := reconcile.New(m, c.Log)
	if err != nil {
		return err
	}
	if err := reconciler.SetPrefixes(flags.serviceCIDRs); err != nil {
		return err
	}
	programs, err := loader.Load(m, loader.Config{
		LinkDir: filepath.Join(c.BPFRoot, "links"), SilentBackend: c.SilentBackend, Hairpin: flags.hairpin,
	})
	if err != nil {
		return err
	}
	defer closing(programs.Close)
	host, err := node.Open()
	if err != nil {
		return err
	}
	defer host.Close()
	folder, err := manifest.Open(c.Manifests, flags.nodePortRange, c.Log)
	if err != nil {
		return err
	}
	objects, err := source.New(source.Watches{
		Services: folder.Services(), EndpointSlices: folder.EndpointSlices(), Pods: folder.Pods(), Nodes: folder.Nodes(),
		Node:   c.NodeName,
		Latest: folder.Latest,
	})
	if err != nil {
		return fmt.Errorf("follow the objects: %w", err)
	}

	a := &agent{
		config: c, flags: flags, started: time.Now(), maps: m, folder: folder, objects: objects,
		table: resolve.NewTable(resolve.Options{ExternalIPsAllow: flags.externalIPsAllow}), reconciler: reconciler, programs: programs,
		dirty: make(chan source.Dirty), shows: make(chan show), hosts: make(chan node.Snapshot), host: host.Snapshot(),
		sweepBegins: make(chan struct{}), sweepEnds: make(chan walk),
		holding: len(folder.Held()) > 0,
	}
	a.proxy = health.NewProxy(func() bool { return source.Eligible(objects.Node(c.NodeName)) })
	a.checks = health.NewChecks(a.proxy.Healthy)
	a.metrics = metrics.New(m, Version(), a.metricsState)
	a.servers = a.newServers()
	if a.holding {
		reconciler.Hold(true)
		c.Log.Warn("nothing is removed until manifests are mended or deleted", "files", folder.Held())
	}
	a.publish()
	c.Log.Info("agent started", "version", Version(), "node", c.NodeName, "manifests", c.Manifests, "bpfRoot", c.BPFRoot)
	defer func() { c.Log.Info("agent ends; the programs go on with what they know") }()
	// Each of these owns what it starts, and returns nil when the context ends.
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return folder.Run(ctx) })
	g.Go(func() error { return objects.Run(ctx) })
	g.Go(func() error { return host.Run(ctx) })
	g.Go(func() error { return pump(ctx, a.next, a.dirty) })
	g.Go(func() error { return pump(ctx, host.Next, a.hosts) })
	g.Go(func() error { return api.Serve(ctx, socket, a) })
	g.Go(func() error { return a.checks.Run(ctx) })
	for _, s := range a.servers {
		g.Go(func() error { return a.serve(ctx, s) })
	}
	g.Go(func() error { return a.sweep(ctx) })
	g.Go(func() error { return a.run(ctx) })
	return g.Wait()
}

// pump hands on what next returns, until ctx ends. What comes while a value waits to be taken is in the next
// one.
func pump[T any](ctx context.Context, next func(context.Context) (T, error), to chan<- T) error {
	for {
		value, err := next(ctx)
		if err != nil {
			return nil // ctx has ended
		}
		select {
		case to <- value:
		case <-ctx.Done():
			return nil
		}
	}
}
