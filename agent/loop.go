// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/lbagent/lbagent/api"
	"github.com/lbagent/lbagent/health"
	"github.com/lbagent/lbagent/lb"
	"github.com/lbagent/lbagent/loader"
	"github.com/lbagent/lbagent/maps"
	"github.com/lbagent/lbagent/metrics"
	"github.com/lbagent/lbagent/node"
	"github.com/lbagent/lbagent/reconcile"
	"github.com/lbagent/lbagent/resolve"
	"github.com/lbagent/lbagent/source"
	"github.com/lbagent/lbagent/source/manifest"
)

// releaseDelay is how often to look whether the objects of mended files have arrived.
const releaseDelay = 100 * time.Millisecond

// maxBegan is how many begins of changes are remembered while writes fail, for the metrics.
const maxBegan = 4096

// agent is what is between the stages. All of it belongs to the goroutine of run, but for what is said to
// be another's and what [agent.Status] says it reads.
type agent struct {
	config  Config
	flags   values // of config
	started time.Time

	maps       *maps.Maps
	folder     *manifest.Folder
	objects    *source.Objects
	table      *resolve.Table
	reconciler *reconcile.Reconciler
	programs   *loader.Loader

	dirty chan source.Dirty          // objects that may have changed
	hosts chan node.Snapshot         // the host, after a change
	shows chan show                  // what the admin socket asks of the table
	page  atomic.Pointer[api.Status] // replaced as a whole

	// Of the goroutine of sweep, which tells run when a walk begins and what it has found.
	sweepBegins chan struct{}
	sweepEnds   chan walk
	flows       atomic.Pointer[api.FlowCounts] // of the last walk; nil before

	synced  bool // all that the folder held at the start is in the table
	holding bool // what was found in the maps and nobody names is kept
	release retry

	// Readers of the others, each safe for concurrent use.
	proxy   *health.Proxy
	checks  *health.Checks
	metrics *metrics.Metrics
	servers []*server
	stats   atomic.Pointer[reconcile.Stats] // as of the page

	lastChange time.Time
	began      []time.Time // when what is not in force yet began, as far as that is known; maxBegan at most
	apply      api.Apply
	applyRetry retry
	problems   problemLog
	ofFolder   []lb.Problem    // the folder's, which logs them itself
	changed    <-chan struct{} // closed when those, or what is held, are out of date

	host        node.Snapshot
	here        resolve.Host // what the table knows of the host and of its object
	elsewhere   []netip.Addr // those addresses of its object that the host does not have
	overlaps    []overlap
	attached    []loader.Attached
	uncovered   []node.Uncovered
	attachError string
	attachRetry retry
}

// overlap is a prefix of cluster IPs with pods of this host in it.
type overlap struct{ prefix, pods netip.Prefix }

// run brings changes into the maps and programs onto devices until ctx ends; it returns nil then. A failure
// is logged and tried again, later each time; what is in force stays in force.
func (a *agent) run(ctx context.Context) error {
	defer a.release.stop()
	defer a.applyRetry.stop()
	defer a.attachRetry.stop()
	for {
		listening := a.checks.Changed()
		a.publish()
		if a.holding && !a.release.pending() && len(a.folder.Held()) == 0 {
			a.release.after(releaseDelay)
		}
		select {
		case <-ctx.Done():
			return nil
		case dirty := <-a.dirty:
			a.resolve(dirty)
			a.write()
			if !a.synced { // the first that are dirty are all there are
				a.synced = true
				a.attach()
				stats := a.reconciler.Stats()
				a.config.Log.Info("ready", "services", stats.Services, "backends", stats.Backends, "programs", len(a.attached))
			}
		case a.host = <-a.hosts:
			if !a.synced {
				break
			}
			a.attach() // first: a new pod sends its first packet now
			if a.setHost() {
				a.write()
			}
		case show := <-a.shows:
			show.answer <- a.table.View(show.name)
		case <-a.sweepBegins:
			a.reconciler.BeginSweep()
		case w := <-a.sweepEnds:
			a.endSweep(w)
			a.attach() // others' filters, and what others did to ours, are told by nobody
		case <-a.changed: // problems or what is held
		case <-listening: // problems
		case <-a.release.due():
			a.letGo(ctx)
		case <-a.applyRetry.due():
			a.write()
		case <-a.attachRetry.due():
			a.attach()
		}
	}
}

// resolve resolves objects anew.
func (a *agent) resolve(dirty source.Dirty) {
	if dirty.Node || !a.synced {
		a.setHost() // before the first objects: without it nothing of them is right
	}
	for _, name := range dirty.Services {
		service, endpoints := a.objects.Service(name)
		a.take(a.table.Update(resolve.Name(name), service, endpoints))
	}
	for _, name := range dirty.Pods {
		a.take(a.table.UpdatePod(resolve.Name(name), a.objects.Pod(name)))
	}
	a.began = append(a.began, dirty.Began[:min(len(dirty.Began), maxBegan-len(a.began))]...)
	a.lastChange = time.Now()
}

// setHost tells the table what is to be known of this node, from the host and from the node's object, and
// reports whether anything of it is different. Most that happens on a host, such as a device or a neighbour's
// route that comes, makes no difference; what does costs what the objects cost that depend on it.
func (a *agent) setHost() bool {
	object := a.objects.Node(a.config.NodeName)
	known := source.AddressesOf(object)
	here := resolve.Host{
		Name: a.config.NodeName, Zone: source.ZoneOf(object), Addresses: a.host.OwnAddresses(),
		NodePorts: node.NodePortAddresses(a.host, a.flags.nodePorts, known),
		PodRoutes: node.PodRoutes(a.host, a.config.Devices),
	}
	a.elsewhere = nil
	if a.flags.nodePorts.Primary {
		a.elsewhere = slices.DeleteFunc(known, func(addr netip.Addr) bool { return slices.Contains(here.Addresses, addr) })
	}
	if here.Name == a.here.Name && here.Zone == a.here.Zone && slices.Equal(here.Addresses, a.here.Addresses) &&
		slices.Equal(here.NodePorts, a.here.NodePorts) && slices.Equal(here.PodRoutes, a.here.PodRoutes) {
		return false
	}
	a.here = here
	a.overlaps = overlapsOf(a.flags.serviceCIDRs, here.PodRoutes)
	a.take(a.table.SetHost(here))
	a.reconciler.SetHostAddresses(here.Addresses)
	return true
}

// overlapsOf returns of each prefix that holds pods one such overlap.
func overlapsOf(prefixes, podRoutes []netip.Prefix) (all []overlap) {
	for _, p := range prefixes {
		if i := slices.IndexFunc(podRoutes, p.Overlaps); i >= 0 {
			all = append(all, overlap{p, podRoutes[i]})
		}
	}
	return all
}

// take hands on what the table says has changed.
func (a *agent) take(change resolve.Change) {
	a.reconciler.Set(change.Changed, change.Removed)
	a.reconciler.SetForeign(change.Foreign)
}

// letGo ends the holding, once everything that the mended files name is in the table: it comes some moments
// after the folder says that they are good, and what is let go before would go, and then be made anew.
func (a *agent) letGo(ctx context.Context) {
	a.release.stop()
	all, current, err := a.objects.Current(ctx)
	if err != nil {
		a.config.Log.Error("objects not listed, tried again", "error", err)
	}
	if !current || !a.synced {
		a.release.after(releaseDelay)
		return
	}
	a.resolve(all)
	a.holding = false
	a.reconciler.Hold(false)
	a.config.Log.Info("all manifests are read, nothing is held any more")
	a.write()
}

// endSweep lets go of the removed backends that a walk of the flow tables has found no flow of.
func (a *agent) endSweep(w walk) {
	free := a.reconciler.EndSweep(func(id uint32) bool { _, ok := w.named[id]; return ok })
	if free > 0 && a.synced { // before, Apply would remove what is not yet read
		a.write()
	}
}

// write brings what is different into the maps.
func (a *agent) write() {
	defer a.setChecks() // after the maps: who is told to send traffic here finds what could be written
	a.proxy.Queued()
	start := time.Now()
	err := a.reconciler.Apply()
	a.metrics.Applied(time.Since(start), err == nil)
	if err == nil {
		a.metrics.Programmed(a.began)
		a.began = nil
		if a.apply.LastError != "" {
			a.config.Log.Info("maps written again")
		}
		a.apply.LastError, a.apply.LastApply = "", time.Now()
		a.applyRetry.done()
		a.tellHealth()
		return
	}
	a.apply.Failures++
	if text := brief(err); text != a.apply.LastError { // once, however often it is tried
		a.config.Log.Error("maps not written, tried again", "error", text)
		a.apply.LastError = text
	}
	a.applyRetry.failed()
}

// tellHealth says that everything is in force, if it is: in the maps, and by programs at all devices that are to have
// them.
func (a *agent) tellHealth() {
	if a.synced && a.apply.LastError == "" && a.attachError == "" {
		a.proxy.Updated()
	}
}

// attach gives programs to the devices that are to have them, and takes them from all others: not before the maps are
// right.
func (a *agent) attach() {
	if !a.synced {
		return
	}
	attach, uncovered := node.Select(a.host, a.config.Devices)
	devices := make([]loader.Device, 0, len(attach))
	ports := map[uint32]maps.Device{}
	for _, d := range attach {
		role := loader.Node
		switch d.Role {
		case node.RolePod:
			role = loader.Pod
		case node.RolePort:
			role = loader.Port
		}
		if d.Bridge != 0 {
			ports[uint32(d.Index)] = maps.Device{Bridge: uint32(d.Bridge), BridgeMac: d.BridgeMAC}
		}
		devices = append(devices, loader.Device{Index: d.Index, Name: d.Name, Role: role, LinkHeader: d.LinkHeader})
	}
	err := errors.Join(reconcile.Devices(a.maps, ports, a.vlans()), a.programs.Set(devices))
	a.tellDevices(a.programs.Attached(), uncovered)
	if err == nil {
		if a.attachError != "" {
			a.config.Log.Info("programs attached again")
		}
		a.attachError = ""
		a.attachRetry.done()
		a.tellHealth()
		return
	}
	a.proxy.Queued()
	if text := brief(err); text != a.attachError {
		a.config.Log.Error("programs not attached, tried again", "error", text)
		a.attachError = text
	}
	a.attachRetry.failed()
}

// vlans are the VLANs of the host's devices that have a device of their own.
func (a *agent) vlans() map[maps.VLANKey]uint32 {
	vlans := map[maps.VLANKey]uint32{}
	for _, d := range a.host.Devices {
		if d.Kind == "vlan" && d.Parent != 0 {
			vlans[maps.VLANKey{Parent: uint32(d.Parent), Id: d.VLAN}] = uint32(d.Index)
		}
	}
	return vlans
}

// tellDevices logs what is different about the devices.
func (a *agent) tellDevices(attached []loader.Attached, uncovered []node.Uncovered) {
	log := a.config.Log
	for _, p := range attached {
		if !slices.Contains(a.attached, p) {
			log.Info("program attached", "device", p.Device, "program", p.Program, "method", p.Method)
		}
	}
	for _, p := range a.attached {
		if !slices.Contains(attached, p) {
			log.Info("program detached", "device", p.Device, "program", p.Program)
		}
	}
	for _, u := range uncovered {
		if !slices.Contains(a.uncovered, u) {
			log.Warn("device without programs", "device", u.Name, "reason", u.Reason)
		}
	}
	a.attached, a.uncovered = attached, uncovered
}

// brief is an error on one line, and no more than some of many that are joined: where a map is full, each
// Service that is left out has one.
func brief(err error) string {
	const most = 5
	lines := strings.Split(err.Error(), "\n")
	if more := len(lines) - most; more > 0 {
		lines = append(lines[:most], fmt.Sprintf("and %d more", more))
	}
	return strings.Join(lines, "; ")
}
