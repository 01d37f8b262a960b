// SPDX-License-Identifier: Apache-2.0

package health

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"sync"

	"github.com/lbagent/lbagent/lb"
)

// Checks serves the healthCheckNodePorts of Services. It is safe for concurrent use.
type Checks struct {
	healthy func() bool
	wake    chan struct{} // holds one token while the ports may be other ones than those to be served

	mu        sync.Mutex
	checks    map[uint16]lb.HealthCheck
	addresses []netip.Addr
	clashes   []lb.Problem
	ports     map[netip.AddrPort]*port
	changed   chan struct{}
}

// port is one port at one address.
type port struct {
	close func()
	err   error // why it is not served; nil when it is, and before the first try
	tried bool
}

// NewChecks returns Checks of nothing. healthy tells whether the proxy does its work.
func NewChecks(healthy func() bool) *Checks {
	return &Checks{
		healthy: healthy, wake: make(chan struct{}, 1),
		checks: map[uint16]lb.HealthCheck{}, ports: map[netip.AddrPort]*port{}, changed: make(chan struct{}),
	}
}

// Set says which Services have a port for health checks, what is to be answered there, and at which addresses.
// What Set does not name any more is closed; a port that stays is not touched. Of two Services with one port the
// first has it, and the other has a problem.
func (c *Checks) Set(checks []lb.HealthCheck, addresses []netip.Addr) {
	c.mu.Lock()
	defer c.mu.Unlock()
	before, clashed, listened := c.checks, c.clashes, c.addresses
	c.checks, c.clashes, c.addresses = map[uint16]lb.HealthCheck{}, nil, slices.Clone(addresses)
	for _, check := range checks {
		if first, taken := c.checks[check.Port]; taken {
			c.clashes = append(c.clashes, problem(check, fmt.Sprintf("port %d is Service %s/%s's, for its health checks",
				check.Port, first.Namespace, first.Name)))
			continue
		}
		c.checks[check.Port] = check
	}
	if maps.Equal(before, c.checks) && slices.Equal(clashed, c.clashes) && slices.Equal(listened, c.addresses) {
		return
	}
	c.tell()
	select {
	case c.wake <- struct{}{}:
	default:
	}
}

// tell says that Problems may be others, with the lock held.
func (c *Checks) tell() {
	close(c.changed)
	c.changed = make(chan struct{})
}

// Changed returns a channel that is closed when Problems may have changed. Ask for it before them.
func (c *Checks) Changed() <-chan struct{} {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.changed
}

// Problems returns, sorted, which Services cannot be asked about at which address, and why.
func (c *Checks) Problems() []lb.Problem {
	c.mu.Lock()
	defer c.mu.Unlock()
	all := slices.Clone(c.clashes)
	for at, p := range c.ports {
		if check, ok := c.checks[at.Port()]; ok && p.err != nil {
			all = append(all, problem(check, fmt.Sprintf("health checks are not answered at %s: %s; tried again", at, reason(p.err))))
		}
	}
	slices.SortFunc(all, lb.Problem.Compare)
	return all
}

func problem(check lb.HealthCheck, message string) lb.Problem {
	return lb.Problem{
		Object: "Service " + check.Namespace + "/" + check.Name, Field: "spec.healthCheckNodePort",
		Message: message, Severity: lb.Warning,
	}
}

// reason is an error without what names the address once more.
func reason(err error) string {
	if call, ok := errors.AsType[*os.SyscallError](err); ok {
		return call.Error()
	}
	return err.Error()
}

// Listening is a port that is, or is to be, served.
type Listening struct {
	Check lb.HealthCheck
	At    netip.AddrPort
	Err   error // why it is not; nil when it is
}

// Listening returns every port that was tried, sorted by port and address.
func (c *Checks) Listening() []Listening {
	c.mu.Lock()
	defer c.mu.Unlock()
	var all []Listening
	for at, p := range c.ports {
		if check, ok := c.checks[at.Port()]; ok && p.tried {
			all = append(all, Listening{check, at, p.err})
		}
	}
	slices.SortFunc(all, func(a, b Listening) int {
		return cmp.Or(cmp.Compare(a.At.Port(), b.At.Port()), a.At.Compare(b.At))
	})
	return all
}

// Run serves what Set says until ctx ends; it returns nil then, with all ports closed. It is called once.
func (c *Checks) Run(ctx context.Context) error {
	var serving sync.WaitGroup
	defer serving.Wait()
	for {
		select {
		case <-c.wake:
			c.open(ctx, &serving)
		case <-ctx.Done():
			return nil
		}
	}
}

// open closes the ports that are not to be served any more and opens those that are missing.
func (c *Checks) open(ctx context.Context, serving *sync.WaitGroup) {
	c.mu.Lock()
	defer c.mu.Unlock()
	want := map[netip.AddrPort]bool{}
	for number := range c.checks {
		for _, addr := range c.addresses {
			want[netip.AddrPortFrom(addr, number)] = true
		}
	}
	for at, p := range c.ports {
		if !want[at] {
			p.close()
			delete(c.ports, at)
		}
	}
	for at := range want {
		if c.ports[at] != nil {
			continue
		}
		ctx, cancel := context.WithCancel(ctx)
		p := &port{close: cancel}
		c.ports[at] = p
		serving.Go(func() {
			defer cancel()
			Listen(ctx, at.String(), c.handler(at.Port()), func(err error) {
				c.mu.Lock()
				defer c.mu.Unlock()
				p.err, p.tried = err, true
				c.tell()
			})
		})
	}
}

// answer is the body of the answer, with kube-proxy's keys.
type answer struct {
	Service             serviceName `json:"service"`
	LocalEndpoints      int         `json:"localEndpoints"`
	ServiceProxyHealthy bool        `json:"serviceProxyHealthy"`
}

type serviceName struct {
	Namespace string `json:"namespace"`
	Name      string `json:"name"`
}

func (c *Checks) handler(port uint16) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		c.mu.Lock()
		check, ok := c.checks[port]
		c.mu.Unlock()
		if !ok { // it is about to be closed
			http.Error(w, "no Service has this port", http.StatusServiceUnavailable)
			return
		}
		a := answer{serviceName{check.Namespace, check.Name}, check.LocalEndpoints, c.healthy()}
		code := http.StatusServiceUnavailable
		if a.LocalEndpoints > 0 && a.ServiceProxyHealthy {
			code = http.StatusOK
		}
		w.Header().Set("X-Load-Balancing-Endpoint-Weight", strconv.Itoa(check.LocalEndpoints))
		writeJSON(w, code, a)
	})
}
