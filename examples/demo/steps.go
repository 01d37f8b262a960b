// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/lbagent/lbagent/api"
	"github.com/lbagent/lbagent/internal/testenv"
)

// What the example manifests say.
const (
	webPort, echoPort     = 80, 7      // of the Services
	webTarget, echoTarget = 8080, 7007 // of the endpoints
	web4, web6            = "10.96.0.80", "fd00:96::80"
	echo4, echo6          = "10.96.0.7", "fd00:96::7"
	endpoints             = 3
)

// patience is how long a change may take to be seen before the demo gives up.
const patience = 20 * time.Second

// demo is what there is of it at a time. What is opened is closed by cleanUp.
type demo struct {
	config
	screen *screen
	ledger *ledger
	fail   context.CancelCauseFunc // ends the play

	folder    string // temporary; all files are in it
	program   string // lbagent, built
	bpffs     string // a BPF file system
	manifests string // a copy of the examples
	lab       *testenv.Lab
	agent     *agent
	client    *client

	closers []func(context.Context) error // run from the last
}

// server returns the name of the server in the lab's backend i, from 0.
func server(i int) string { return fmt.Sprintf("backend%d", i+1) }

func servers(n int) (names []string) {
	for i := range n {
		names = append(names, server(i))
	}
	return names
}

// onCleanUp has f called when the demo ends, before what was given earlier.
func (d *demo) onCleanUp(f func(context.Context) error) { d.closers = append(d.closers, f) }

// build builds lbagent into the temporary folder.
func (d *demo) build(ctx context.Context) (err error) {
	if d.folder, err = os.MkdirTemp(d.Temp, "lbagent-demo-"); err != nil {
		return err
	}
	d.onCleanUp(func(context.Context) error { return os.RemoveAll(d.folder) })
	d.screen.say("build lbagent (a minute or so, the first time)")
	d.program = filepath.Join(d.folder, "lbagent")
	cmd := exec.CommandContext(ctx, "go", "build", "-o", d.program, "github.com/lbagent/lbagent/cmd/lbagent")
	// At an interrupt it removes its own temporary files and waits for the compilers.
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	cmd.WaitDelay = 10 * time.Second
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("go build: %w\n%s", err, out)
	}
	return nil
}

// openLab makes the namespaces, and starts the servers of three backends. The fourth has none yet.
func (d *demo) openLab(ctx context.Context) (err error) {
	if d.lab, err = testenv.OpenLab(ctx, testenv.Config{Backends: endpoints + 1}); err != nil {
		return err
	}
	d.onCleanUp(func(context.Context) error { return d.lab.Close() })
	d.screen.say("a lab in network namespaces: client %v, node %v, and behind it", d.lab.Client.IPv4, d.lab.Node.IPv4)
	for i := range endpoints {
		if err := d.serve(ctx, i); err != nil {
			return err
		}
	}
	d.screen.say("the node is strict: rp_filter=1, and its firewall drops and counts each packet with a VIP in it")
	return nil
}

// serve starts the servers of a backend.
func (d *demo) serve(ctx context.Context, i int) error {
	type start func(context.Context, *testenv.Namespace, string, string) (*testenv.Server, error)
	for _, s := range []struct {
		start start
		port  int
	}{{testenv.ServeHTTP, webTarget}, {testenv.ServeUDP, echoTarget}, {testenv.ServeEcho, echoTarget}} {
		running, err := s.start(ctx, d.lab.Backends[i].Namespace, server(i), fmt.Sprintf(":%d", s.port))
		if err != nil {
			return err
		}
		d.onCleanUp(func(context.Context) error { return running.Close() })
	}
	d.screen.say("%s %v and %v: an HTTP server, a UDP echo, a TCP echo", server(i), d.lab.Backends[i].IPv4, d.lab.Backends[i].IPv6)
	return nil
}

// startAgent runs lbagent on a copy of the examples, and shows what it says of itself.
func (d *demo) startAgent(ctx context.Context) error {
	from, err := examples()
	if err != nil {
		return err
	}
	d.manifests = filepath.Join(d.folder, "manifests")
	if err := copyManifests(from, d.manifests); err != nil {
		return err
	}
	if err := d.mountBPF(); err != nil {
		return err
	}
	root := filepath.Join(d.bpffs, "lbagent")
	d.agent = &agent{
		node:    d.lab.Node.Namespace,
		program: d.program,
		args:    []string{"--bpf-root", root, "--socket", filepath.Join(d.folder, "lbagent.sock")},
		log:     filepath.Join(d.folder, "agent.log"),
	}
	d.screen.say("$ lbagent run --manifests %s --bpf-root %s ...", d.manifests, root)
	d.onCleanUp(d.removeAgent)
	if err := d.agent.start(d.manifests, d.fail); err != nil {
		return err
	}
	took, err := d.until(ctx, func(ctx context.Context) (string, error) { return d.agent.settled(ctx) })
	if err != nil {
		return err
	}
	programs, err := d.attachedPrograms(ctx)
	if err == nil && len(programs) == 0 {
		err = errors.New("the agent serves, and the kernel shows none of its programs") // nor would it in the end
	}
	if err != nil {
		return err
	}
	d.screen.say("it serves, %s after its start", took)
	return errors.Join(d.showCommand(ctx, whole, "service", "list"), d.showCommand(ctx, programsOf, "status"))
}

func (d *demo) mountBPF() error {
	d.bpffs = filepath.Join(d.folder, "bpf")
	if err := os.Mkdir(d.bpffs, 0o700); err != nil {
		return err
	}
	if err := syscall.Mount("bpf", d.bpffs, "bpf", 0, "mode=0700"); err != nil {
		return fmt.Errorf("mount a BPF file system at %s: %w", d.bpffs, err)
	}
	d.onCleanUp(func(context.Context) error {
		if err := syscall.Unmount(d.bpffs, 0); err != nil {
			return errors.Join(fmt.Errorf("unmount %s: %w", d.bpffs, err), syscall.Unmount(d.bpffs, syscall.MNT_DETACH))
		}
		return nil
	})
	return nil
}

// showCommand shows a verb and what it prints, or a part of that.
func (d *demo) showCommand(ctx context.Context, part func(string) string, verb ...string) error {
	text, err := d.agent.run(ctx, verb...)
	if err == nil {
		d.screen.show("$ lbagent " + strings.Join(verb, " ") + "\n" + part(text))
	}
	return err
}

func whole(text string) string { return text }

// programsOf leaves out of a status what comes behind the programs.
func programsOf(text string) string {
	sections := strings.SplitAfter(text, "\n\n")
	return strings.Join(sections[:min(2, len(sections))], "") + "...\n"
}

// spread starts the client, and sees requests in each way reach each backend.
func (d *demo) spread(ctx context.Context) error {
	d.ledger.begin("spread requests over three backends")
	d.client = &client{
		host: d.lab.Client, ledger: d.ledger,
		web:  addresses(web4, web6, webPort),
		echo: addresses(echo4, echo6, echoPort),
	}
	if err := openClient(ctx, d.client, servers(endpoints), d.Rate); err != nil {
		return err
	}
	d.screen.say("   the client makes requests from now to the end: %d a second in each of HTTP v4, HTTP v6, UDP v4 and UDP v6,",
		d.Rate)
	d.screen.say("   each over a new connection, and some over %d connections and UDP sockets that stay", len(d.client.kept))
	go d.pulse(ctx)
	if err := d.watch(ctx, d.reached(servers(endpoints)...)); err != nil {
		return err
	}
	d.screen.show(d.ledger.byServer(servers(endpoints)))
	d.ledger.saw("new connections: %s", d.shares(endpoints))
	return nil
}

// takeIn starts the fourth backend and writes it into the manifests.
func (d *demo) takeIn(ctx context.Context) error {
	const added = endpoints
	d.ledger.begin("take a fourth backend in")
	if err := d.serve(ctx, added); err != nil {
		return err
	}
	behind, host := d.lab.Backends[added-1], d.lab.Backends[added]
	took, err := d.edit(ctx, host, true, addEndpoint(behind.IPv4, host.IPv4), addEndpoint(behind.IPv6, host.IPv6))
	if err != nil {
		return err
	}
	if err := d.watch(ctx, d.reached(servers(endpoints+1)...)); err != nil {
		return err
	}
	d.screen.show(d.ledger.byServer(servers(endpoints + 1)))
	d.ledger.saw("in force after %s; new connections: %s", took, d.shares(endpoints+1))
	return nil
}

// takeOut takes the third backend out of the manifests. Its servers go on.
func (d *demo) takeOut(ctx context.Context) error {
	const removed = endpoints - 1
	name, host := server(removed), d.lab.Backends[removed]
	d.ledger.begin("take " + name + " out, whose servers run on")
	sockets := d.client.keptAt(udpKept, name)
	took, err := d.edit(ctx, host, false, removeEndpoint(host.IPv4), removeEndpoint(host.IPv6))
	if err != nil {
		return err
	}
	d.ledger.forbid(name)
	connections := d.client.keptAt(tcpKept, name)
	before4, before6 := d.ledger.answers(way{tcpKept, 4}, name), d.ledger.answers(way{tcpKept, 6}, name)
	rest := slices.DeleteFunc(servers(endpoints+1), func(s string) bool { return s == name })
	if err := d.watch(ctx, func() string {
		if d.client.keptAt(udpKept, name) > 0 {
			return "a UDP socket has not moved from " + name
		}
		if d.ledger.answers(way{tcpKept, 4}, name) <= before4+connections || d.ledger.answers(way{tcpKept, 6}, name) <= before6+connections {
			return "the connections that " + name + " has do not go on"
		}
		return d.reached(rest...)()
	}); err != nil {
		return err
	}
	d.screen.show(d.ledger.byServer(servers(endpoints + 1)))
	if err := d.showCommand(ctx, func(text string) string { return keptFlows(text, host.IPv4, host.IPv6) }, "flow", "list"); err != nil {
		return err
	}
	d.ledger.saw("in force after %s; from then on no new request reached it, %d UDP sockets moved, %d TCP connections went on",
		took, sockets, connections)
	return nil
}

// keptFlows leaves in a list of flows the TCP ones of a host that are established.
func keptFlows(text string, addresses ...netip.Addr) string {
	lines := strings.SplitAfter(text, "\n")
	return lines[0] + strings.Join(slices.DeleteFunc(lines[1:], func(line string) bool {
		ours := slices.ContainsFunc(addresses, func(a netip.Addr) bool {
			return strings.Contains(line, netip.AddrPortFrom(a, echoTarget).String())
		})
		return !ours || !strings.Contains(line, "TCP") || !strings.Contains(line, "established")
	}), "") + "...\n"
}

// killAgent ends the agent without a chance to do anything, and goes on without one.
func (d *demo) killAgent(ctx context.Context) error {
	d.ledger.begin("kill -9 the agent")
	if err := d.agent.kill(); err != nil {
		return err
	}
	killed := time.Now()
	if err := d.showCommand(ctx, func(text string) string { return head(text, 6) }, "status"); err != nil {
		return err
	}
	if err := d.watch(ctx, d.reached(d.inForce()...)); err != nil {
		return err
	}
	d.ledger.saw("%s without an agent: the kernel goes on", seconds(time.Since(killed)))
	return nil
}

func (d *demo) restartAgent(ctx context.Context) error {
	d.ledger.begin("start the agent again")
	if err := d.agent.start(d.manifests, d.fail); err != nil {
		return err
	}
	took, err := d.until(ctx, d.agent.settled)
	if err != nil {
		return err
	}
	if err := d.watch(ctx, d.reached(d.inForce()...)); err != nil {
		return err
	}
	d.ledger.saw("it took over what it found in the kernel in %s", took)
	return nil
}

// breakManifest writes a port that there is not into a manifest, and shows what is said about it.
func (d *demo) breakManifest(ctx context.Context) error {
	d.ledger.begin("break a manifest")
	files, err := editManifests(d.manifests, func(text string) string { return strings.Replace(text, goodPort, badPort, 1) })
	if err != nil {
		return err
	}
	d.showEdit(files, "-"+goodPort, "+"+badPort)
	var refusal string
	_, err = d.until(ctx, func(ctx context.Context) (string, error) {
		s, err := d.agent.status(ctx)
		if err != nil {
			return "", err
		}
		i := slices.IndexFunc(s.Problems, isError)
		if i < 0 {
			return "the broken manifest is not refused", nil
		}
		if p := s.Problems[i]; p.File == "" || p.Document == 0 || p.Object == "" || p.Field == "" {
			return "", fmt.Errorf("the refusal of the manifest does not say where: %s", p)
		}
		refusal = strings.ReplaceAll(s.Problems[i].String(), d.manifests+"/", "")
		return "", nil
	})
	if err != nil {
		return err
	}
	if err := d.showCommand(ctx, problemsOf, "status"); err != nil {
		return err
	}
	if err := d.watch(ctx, d.reached(d.inForce()...)); err != nil {
		return err
	}
	d.ledger.saw("refused, what it said before goes on: %s", refusal)
	return nil
}

func (d *demo) mendManifest(ctx context.Context) error {
	d.ledger.begin("mend it")
	files, err := editManifests(d.manifests, func(text string) string { return strings.Replace(text, badPort, goodPort, 1) })
	if err != nil {
		return err
	}
	d.showEdit(files, "-"+badPort, "+"+goodPort)
	took, err := d.until(ctx, func(ctx context.Context) (string, error) {
		s, err := d.agent.status(ctx)
		if err == nil && slices.ContainsFunc(s.Problems, isError) {
			return "the mended manifest is still refused", nil
		}
		return "", err
	})
	if err != nil {
		return err
	}
	if err := d.watch(ctx, d.reached(d.inForce()...)); err != nil {
		return err
	}
	d.ledger.saw("no problem left after %s", took)
	return nil
}

func isError(p api.Problem) bool { return p.Severity == "error" }

// problemsOf leaves in a status its problems alone.
func problemsOf(text string) string {
	_, problems, _ := strings.Cut(text, "\nProblems\n")
	return "...\nProblems\n" + problems
}

// stopClient waits for the last answers.
func (d *demo) stopClient(context.Context) error {
	d.client.close()
	requests, failed := d.ledger.all()
	d.screen.say("the client stops: %d requests, %d failed", requests, failed)
	return nil
}

// checkStack reads what the node's firewall has counted: a VIP in the stack, a packet that connection tracking
// does not know, a wrong checksum anywhere.
func (d *demo) checkStack(ctx context.Context) error {
	d.ledger.begin("ask the node's firewall")
	c, err := d.lab.Counters(ctx)
	if err != nil {
		return err
	}
	packets, err := d.lab.VIPPackets(ctx)
	if err != nil {
		return err
	}
	d.ledger.saw("%d packets with a VIP in the node's stack, %d invalid, %d refused", packets, c.Invalid, c.Refused)
	if c.Refused > 0 {
		err = fmt.Errorf("the node's firewall refused %d packets", c.Refused)
	}
	return errors.Join(err, d.lab.CheckStrict(ctx))
}

// edit edits the manifests and waits until they are in force: until an endpoint is, or is not, a backend of all
// services of its family. It returns how long that took.
func (d *demo) edit(ctx context.Context, host *testenv.Host, wanted bool, edits ...func(string) string) (string, error) {
	files, err := editManifests(d.manifests, func(text string) string {
		for _, e := range edits {
			text = e(text)
		}
		return text
	})
	if err != nil {
		return "", err
	}
	sign := "-"
	if wanted {
		sign = "+"
	}
	d.showEdit(files, sign+endpointLine(host.IPv4), sign+endpointLine(host.IPv6))
	return d.until(ctx, func(ctx context.Context) (string, error) {
		for _, address := range []netip.Addr{host.IPv4, host.IPv6} {
			active, services, err := d.agent.usable(ctx, address)
			if err != nil {
				return "", err
			}
			if wanted && (active < services || services == 0) || !wanted && active > 0 {
				return fmt.Sprintf("%v is active in %d of %d services", address, active, services), nil
			}
		}
		return "", nil
	})
}

func (d *demo) showEdit(files []string, lines ...string) {
	text := ""
	for _, line := range lines {
		text += strings.TrimRight(line, " \n") + "\n"
	}
	d.screen.show("$ edit " + strings.Join(files, " ") + "\n" + text)
}

// inForce names the backends that are left after takeIn and takeOut.
func (d *demo) inForce() []string {
	return slices.Delete(servers(endpoints+1), endpoints-1, endpoints)
}

// reached returns a condition of watch: a request over a new connection has reached each server in each way.
func (d *demo) reached(servers ...string) func() string {
	return func() string {
		for _, w := range ways() {
			for _, s := range servers {
				if (w.method == httpNew || w.method == udpNew) && d.ledger.answers(w, s) == 0 {
					return fmt.Sprintf("no %s request has reached %s", w, s)
				}
			}
		}
		return ""
	}
}

func (d *demo) shares(n int) string {
	var shares []string
	for _, s := range servers(n) {
		shares = append(shares, fmt.Sprintf("%s %.0f %%", s, 100*d.ledger.share(s)))
	}
	return strings.Join(shares, ", ")
}

// watch lets a step last, until the condition returns "" at its end; else it returns what that says.
func (d *demo) watch(ctx context.Context, condition func() string) error {
	least := time.Now().Add(d.Step)
	_, err := d.until(ctx, func(context.Context) (string, error) {
		if time.Now().Before(least) {
			return "the step lasts", nil
		}
		return condition(), nil
	})
	return err
}

// until tries a condition again and again until it returns "". It returns how long that took.
func (d *demo) until(ctx context.Context, condition func(context.Context) (missing string, err error)) (took string, err error) {
	ctx, cancel := context.WithTimeout(ctx, patience+d.Step)
	defer cancel()
	begun := time.Now()
	var missing string
	every(ctx, 50*time.Millisecond, func() bool {
		var m string
		if m, err = condition(ctx); ctx.Err() == nil {
			missing = m
		}
		return missing != "" && err == nil
	})
	switch {
	case ctx.Err() != nil && missing != "":
		return "", fmt.Errorf("after %s: %s", seconds(time.Since(begun)), missing)
	case err != nil:
		return "", err
	}
	return seconds(time.Since(begun)), nil
}

// pulse shows how the requests go, until ctx ends.
func (d *demo) pulse(ctx context.Context) {
	before, _ := d.ledger.all()
	every(ctx, time.Second, func() bool {
		requests, failed := d.ledger.all()
		d.screen.pulse(fmt.Sprintf("         %d requests/s, %d so far, %d failed", requests-before, requests, failed))
		before = requests
		return true
	})
}

func seconds(d time.Duration) string { return fmt.Sprintf("%.1f s", d.Seconds()) }

func addresses(ipv4, ipv6 string, port uint16) map[int]netip.AddrPort {
	return map[int]netip.AddrPort{
		4: netip.AddrPortFrom(netip.MustParseAddr(ipv4), port),
		6: netip.AddrPortFrom(netip.MustParseAddr(ipv6), port),
	}
}
