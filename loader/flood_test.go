// SPDX-License-Identifier: Apache-2.0

package loader_test

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/lbagent/lbagent/internal/testenv"
	"github.com/lbagent/lbagent/maps"
)

const (
	floodTime        = 30 * time.Second
	floodConnections = 1000
	floodTuples      = 200_000 // three times what `pending` holds
)

// TestFlood: a flood of what anyone can send, as fast as one CPU can. Connections that are established and
// mostly idle live through it, and others connect no worse than through plain nftables DNAT in the same flood.
func TestFlood(t *testing.T) {
	if testing.Short() {
		t.Skip("too long for -short: minutes")
	}
	for _, kind := range []string{"SYN", "spoofed UDP", "stray ACK"} {
		t.Run(kind, func(t *testing.T) {
			ours := flooded(t, kind, func(t *testing.T) *testenv.Lab { return newEchoLab(t).Lab })
			plain := flooded(t, kind, newPlainLab)
			for name, f := range map[string]*floodResult{"lbagent": ours, "plain nftables": plain} {
				t.Logf("%s: %d packets a second, %d of %d new connections, %d of %d established ones broke",
					name, int(float64(f.packets)/floodTime.Seconds()), f.connected, f.tried, f.broken, floodConnections)
			}
			if ours.broken > 0 {
				t.Errorf("%d established connections broke", ours.broken)
			}
			share := func(f *floodResult) float64 { return float64(f.connected) / float64(f.tried) }
			if share(ours) < 0.99*share(plain) {
				t.Errorf("%.3f of the new connections succeed; through plain nftables %.3f", share(ours), share(plain))
			}
		})
	}
}

var floodVIP = ap("10.96.0.10:7")

// newEchoLab is a strict lab with the programs and a service of one echo server.
func newEchoLab(t *testing.T) *lab {
	t.Helper()
	l := newLab(t, testenv.Config{Backends: 1, ClientPods: 1})
	serveEcho(t, l.Backends[0])
	l.rig.backend(101, 3, netip.AddrPortFrom(l.Backends[0].IPv4, echoPort), maps.BackendActive, 1)
	l.rig.slots(3, 101)
	l.rig.frontend(floodVIP, 3)
	return l
}

// newPlainLab is the same without the programs: the kernel's own NAT has their part, and no strict rules, which
// would drop what it is to see.
func newPlainLab(t *testing.T) *testenv.Lab {
	t.Helper()
	l := testenv.NewLab(t, testenv.Config{Backends: 1, ClientPods: 1, NoRules: true})
	serveEcho(t, l.Backends[0])
	rules := fmt.Sprintf(`table ip plain {
	chain prerouting {
		type nat hook prerouting priority dstnat;
		ip daddr %[1]s tcp dport %[2]d dnat to %[3]s:%[4]d
		ip daddr %[1]s udp dport %[2]d dnat to %[3]s:%[4]d
	}
}`, floodVIP.Addr(), floodVIP.Port(), l.Backends[0].IPv4, echoPort)
	if _, err := l.Node.Run(t.Context(), rules, "nft", "-f", "-"); err != nil {
		t.Fatal(err)
	}
	return l
}

func serveEcho(t *testing.T, h *testenv.Host) {
	t.Helper()
	server, err := testenv.ServeEcho(t.Context(), h.Namespace, h.Name, fmt.Sprint(":", echoPort))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { server.Close() })
}

type floodResult struct {
	packets          int
	tried, connected int
	broken           int
}

// flooded opens connections in a lab, floods it from the client outside, and has a pod connect meanwhile.
func flooded(t *testing.T, kind string, newLab func(t *testing.T) *testenv.Lab) (result *floodResult) {
	// A test of its own, so that the lab is gone before the next one.
	t.Run("lab", func(t *testing.T) {
		l := newLab(t)
		result = &floodResult{}
		var connections []*testenv.EchoConn
		for i := range floodConnections {
			from := []*testenv.Host{l.Client, l.ClientPods[0]}[i%2]
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
			c, err := testenv.DialEcho(ctx, from.Namespace, netip.AddrPort{}, floodVIP)
			if err == nil {
				err = c.Say(ctx, "hello") // assured
			}
			cancel()
			if err != nil {
				t.Fatalf("connection %d: %v", i, err)
			}
			defer c.Close()
			connections = append(connections, c)
		}

		var stop atomic.Bool
		ended := make(chan struct{})
		var all sync.WaitGroup
		all.Go(func() { result.packets = flood(t, l, kind, &stop) })
		var broken atomic.Int64
		for i, c := range connections {
			all.Go(func() {
				// Once in ten seconds, each at another moment.
				next := time.NewTimer(time.Duration(i) * 10 * time.Second / floodConnections)
				defer next.Stop()
				for {
					select {
					case <-next.C:
						next.Reset(10 * time.Second)
					case <-ended:
						return
					}
					ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), 30*time.Second)
					err := c.Say(ctx, "still here")
					cancel()
					if err != nil {
						if broken.Add(1) <= 3 {
							t.Logf("connection %d: %v", i, err)
						}
						return
					}
				}
			})
		}
		var connected, tried atomic.Int64
		for range 4 {
			all.Go(func() {
				for !stop.Load() {
					ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), 5*time.Second)
					c, err := testenv.DialEcho(ctx, l.ClientPods[0].Namespace, netip.AddrPort{}, floodVIP)
					if err == nil {
						if c.Say(ctx, "hello") == nil {
							connected.Add(1)
						}
						c.Close()
					}
					cancel()
					tried.Add(1)
					time.Sleep(20 * time.Millisecond)
				}
			})
		}
		time.Sleep(floodTime)
		stop.Store(true)
		close(ended)
		all.Wait()
		if kind == "stray ACK" {
			// The node's connection tracking is right to call them invalid, behind the translation.
			if n, err := l.VIPPackets(t.Context()); err != nil || n != 0 {
				t.Errorf("the node's stack saw %d packets with a VIP: %v", n, err)
			}
			for _, c := range connections {
				c.Close()
			}
			if err := l.ResetCounters(t.Context()); err != nil {
				t.Error(err)
			}
		}
		result.connected, result.tried, result.broken = int(connected.Load()), int(tried.Load()), int(broken.Load())
	})
	if result == nil {
		t.FailNow()
	}
	return result
}

// flood sends until it is told to stop, in batches, from a thread that keeps a CPU to itself as far as it can,
// and returns how many packets it sent.
func flood(t *testing.T, l *testenv.Lab, kind string, stop *atomic.Bool) int {
	to, err := l.Node.MAC(l.Client.NodeDevice)
	if err != nil {
		t.Error(err)
		return 0
	}
	frames := make([][]byte, floodTuples)
	for i := range frames {
		a := rand.Uint32()
		source := netip.AddrPortFrom(netip.AddrFrom4([4]byte{100, 64 | byte(a>>16)&63, byte(a >> 8), byte(a)}), uint16(1024+rand.IntN(60000)))
		var p testenv.Packet
		switch kind {
		case "SYN":
			p = testenv.SegmentTCP(source, floodVIP, testenv.SYN)
		case "stray ACK":
			p = testenv.SegmentTCP(source, floodVIP, testenv.ACK)
			p.Ack = rand.Uint32()
		default:
			p = testenv.DatagramUDP(source, floodVIP, "spoofed")
		}
		p.Seq, p.DestinationMAC = rand.Uint32(), to
		frames[i] = p.Bytes()
	}
	socket, err := testenv.Capture(l.Client.Namespace, "eth0")
	if err != nil {
		t.Error(err)
		return 0
	}
	defer socket.Close()
	runtime.LockOSThread() // the thread ends with the goroutine
	sent := 0
	err = socket.SendAll(func() [][]byte {
		if stop.Load() {
			return nil
		}
		first := sent % (len(frames) - 64)
		sent += 64
		return frames[first : first+64]
	})
	if err != nil {
		t.Error("flood:", err)
	}
	return sent
}
