// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/lbagent/lbagent/internal/testenv"
)

const (
	requestTimeout = 2 * time.Second        // no request is ever made twice
	keptPeriod     = 250 * time.Millisecond // of the requests of a kept connection or socket
	keptPerServer  = 2                      // kept connections, and sockets, in each family
)

// client makes requests all the time, from the lab's client to the addresses of the two Services.
type client struct {
	host   *testenv.Host
	ledger *ledger
	web    map[int]netip.AddrPort // by family
	echo   map[int]netip.AddrPort

	stop context.CancelFunc // makes no new request
	work sync.WaitGroup
	kept []*keeper
}

// keeper is a kept connection or socket.
type keeper struct {
	way   way
	ask   func(context.Context) (server string, err error)
	close func()

	mu     sync.Mutex
	server string // who answered last
	failed bool   // the last request did
}

// openClient makes the kept connections and sockets, enough of them that each server has some, and then
// requests in all ways until it is closed or ctx ends.
func openClient(ctx context.Context, c *client, servers []string, rate int) error {
	running, stop := context.WithCancel(ctx)
	c.stop = stop
	for _, w := range ways() {
		var err error
		switch w.method {
		case tcpKept:
			err = c.keep(ctx, w, servers, c.dialTCP)
		case udpKept:
			err = c.keep(ctx, w, servers, c.dialUDP)
		case httpNew:
			c.repeat(ctx, running, w, rate, c.askHTTP)
		case udpNew:
			c.repeat(ctx, running, w, rate, c.askUDP)
		}
		if err != nil {
			return err
		}
	}
	for i, k := range c.kept {
		c.work.Go(func() {
			// Not all of them at once.
			select {
			case <-running.Done():
			case <-time.After(keptPeriod * time.Duration(i) / time.Duration(len(c.kept))):
			}
			every(running, keptPeriod, func() bool { return running.Err() != nil || c.askKept(ctx, k) })
		})
	}
	return nil
}

// close waits for the requests that are under way, and ends the kept connections as a client does.
func (c *client) close() {
	c.stop()
	c.work.Wait()
	for _, k := range c.kept {
		k.close()
	}
	c.kept = nil
}

// repeat makes requests at a rate, each beginning in time however long the others take.
func (c *client) repeat(ctx, running context.Context, w way, rate int, ask func(context.Context, int) (string, error)) {
	c.work.Go(func() {
		every(running, time.Second/time.Duration(rate), func() bool {
			if running.Err() == nil {
				c.work.Go(func() { c.request(ctx, w, func(ctx context.Context) (string, error) { return ask(ctx, w.family) }) })
			}
			return true
		})
	})
}

// request makes one request, notes what comes of it, and returns who answered. ok is false if it failed.
func (c *client) request(ctx context.Context, w way, ask func(context.Context) (string, error)) (server string, ok bool) {
	r := c.ledger.request(w)
	limited, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	server, err := ask(limited)
	if err != nil && ctx.Err() != nil {
		r.drop()
		return "", false
	}
	r.end(server, err)
	return server, err == nil
}

// keep opens connections or sockets until each server has enough; those that one has too many are closed.
func (c *client) keep(ctx context.Context, w way, servers []string, dial func(context.Context, int) (*keeper, error)) error {
	have := map[string]int{}
	const tries = 100 // with three servers, more than enough once in 10^13 runs
	for range tries {
		var k *keeper
		server, ok := c.request(ctx, w, func(ctx context.Context) (server string, err error) {
			if k, err = dial(ctx, w.family); err == nil {
				server, err = k.ask(ctx)
			}
			return server, err
		})
		if k == nil {
			return fmt.Errorf("make a connection to keep: %s: it failed", w)
		}
		k.way, k.server = w, server
		if !ok || have[server] >= keptPerServer {
			k.close()
			continue
		}
		c.kept = append(c.kept, k)
		have[server]++
		if !slices.ContainsFunc(servers, func(s string) bool { return have[s] < keptPerServer }) {
			return nil
		}
	}
	return fmt.Errorf("%d connections do not reach all servers: %s: %v", tries, w, have)
}

// askKept makes a request over a kept connection or socket. It returns false if no other can be made: a broken
// connection stays so, and was counted.
func (c *client) askKept(ctx context.Context, k *keeper) bool {
	server, ok := c.request(ctx, k.way, k.ask)
	k.mu.Lock()
	defer k.mu.Unlock()
	k.server, k.failed = server, !ok
	return ok || k.way.method == udpKept
}

// keptAt returns how many kept connections, or sockets, a server answered last.
func (c *client) keptAt(m method, server string) int {
	n := 0
	for _, k := range c.kept {
		k.mu.Lock()
		if k.way.method == m && k.server == server && !k.failed {
			n++
		}
		k.mu.Unlock()
	}
	return n
}

func (c *client) askHTTP(ctx context.Context, family int) (server string, err error) {
	h := testenv.NewHTTPClient(c.host.Namespace, netip.AddrPort{})
	t := h.Transport.(*http.Transport)
	t.DisableKeepAlives = true // so that the transport never tries again either, as it does on a kept connection
	var local netip.AddrPort
	dial := t.DialContext
	t.DialContext = func(ctx context.Context, network, address string) (net.Conn, error) {
		conn, err := dial(ctx, network, address)
		if err == nil {
			local = conn.LocalAddr().(*net.TCPAddr).AddrPort()
		}
		return conn, err
	}
	defer h.Close()
	a, err := h.Who(ctx, c.web[family])
	return c.answered(a, err, family, local)
}

func (c *client) askUDP(ctx context.Context, family int) (server string, err error) {
	k, err := c.dialUDP(ctx, family)
	if err != nil {
		return "", err
	}
	defer k.close()
	return k.ask(ctx)
}

// dialUDP opens a socket that is not connected, so that an answer from another address than was asked is seen.
func (c *client) dialUDP(ctx context.Context, family int) (*keeper, error) {
	u, err := testenv.NewUDPClient(ctx, c.host.Namespace, netip.AddrPortFrom(c.host.Addr(family), 0))
	if err != nil {
		return nil, err
	}
	number := 0
	return &keeper{
		ask: func(ctx context.Context) (string, error) {
			number++
			a, err := u.Ask(ctx, c.echo[family], fmt.Sprintf("datagram %d of %v", number, u.LocalAddr()))
			return c.answered(a, err, family, u.LocalAddr())
		},
		close: func() { u.Close() },
	}, nil
}

func (c *client) dialTCP(ctx context.Context, family int) (*keeper, error) {
	e, err := testenv.DialEcho(ctx, c.host.Namespace, netip.AddrPort{}, c.echo[family])
	if err != nil {
		return nil, err
	}
	local := e.LocalAddr().(*net.TCPAddr).AddrPort()
	number := 0
	return &keeper{
		ask: func(ctx context.Context) (string, error) {
			number++
			text := strings.Repeat(fmt.Sprintf("line %d of %v, ", number, local), 100) + "\n"
			return c.answered(e.Answer, e.Say(ctx, text), family, local)
		},
		close: func() { e.Close() },
	}, nil
}

// answered returns the server's name, and an error if the server saw another client than there is: nobody on
// the way may put another address or port in place of the client's.
func (c *client) answered(a testenv.Answer, err error, family int, local netip.AddrPort) (server string, _ error) {
	if err == nil && (a.Client.Addr() != c.host.Addr(family) || a.Client.Port() != local.Port()) {
		err = fmt.Errorf("%v asked, and %s saw %v", local, a.Server, a.Client)
	}
	return a.Server, err
}
