// SPDX-License-Identifier: Apache-2.0

package testenv

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// Namespace is a network namespace without a name. Only what uses it keeps it: this value, its sockets and
// its processes. So it vanishes with the process that made it, however that ends.
type Namespace struct {
	Name string // for messages; the kernel does not know it

	file  *os.File
	links *netlink.Handle
}

// NewNamespace makes a namespace with lo up and IPv6 addresses that are usable at once.
func NewNamespace(name string) (*Namespace, error) {
	n, err := newNamespace(name)
	if err != nil {
		return nil, fmt.Errorf("make network namespace %s: %w", name, err)
	}
	return n, nil
}

func newNamespace(name string) (_ *Namespace, err error) {
	n := &Namespace{Name: name}
	defer func() {
		if err != nil {
			n.Close()
		}
	}()
	err = onThread(func() error { return unix.Unshare(unix.CLONE_NEWNET) }, func() error {
		n.file, err = os.Open("/proc/thread-self/ns/net")
		return err
	})
	if err != nil {
		return nil, err
	}
	if n.links, err = netlink.NewHandleAt(netns.NsHandle(n.file.Fd()), unix.NETLINK_ROUTE); err != nil {
		return nil, fmt.Errorf("open netlink: %w", err)
	}
	// Every value that a host may set otherwise for new namespaces, and that our links depend on.
	if err = n.sysctls([][2]string{
		{"net.ipv6.conf.all.accept_dad", "0"},
		{"net.ipv6.conf.default.accept_dad", "0"},
		{"net.ipv6.conf.default.dad_transmits", "0"},
		{"net.ipv6.conf.default.addr_gen_mode", "0"},
		{"net.ipv6.conf.default.accept_ra", "0"},
		{"net.ipv6.conf.default.router_solicitations", "0"},
		{"net.ipv6.conf.all.disable_ipv6", "0"},
		{"net.ipv6.conf.default.disable_ipv6", "0"},
	}); err != nil {
		return nil, err
	}
	return n, n.setUp("lo")
}

// MAC returns the MAC address of a device.
func (n *Namespace) MAC(device string) (mac MAC, err error) {
	link, err := n.links.LinkByName(device)
	if err != nil {
		return mac, fmt.Errorf("find %s in %s: %w", device, n.Name, err)
	}
	copy(mac[:], link.Attrs().HardwareAddr)
	return mac, nil
}

// Close lets go of the namespace; it ends when its last socket and process do.
func (n *Namespace) Close() error {
	if n.links != nil {
		n.links.Close()
		n.links = nil
	}
	if n.file == nil {
		return nil
	}
	err := n.file.Close()
	n.file = nil
	return err
}

// Path names the namespace for other processes (nsenter --net=PATH) while this one holds it.
func (n *Namespace) Path() string {
	return fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), n.file.Fd())
}

// Do runs f on a thread that is in the namespace, and returns its error. What f opens stays in the namespace
// for good; goroutines that f starts are not in it.
func (n *Namespace) Do(f func() error) error {
	if n.file == nil {
		return fmt.Errorf("enter network namespace %s: %w", n.Name, os.ErrClosed)
	}
	done := make(chan error, 1)
	go func() {
		err := errors.New("the function left its goroutine")
		defer func() { done <- err }()
		err = n.do(f)
	}()
	return <-done
}

// do is Do on this goroutine's thread.
func (n *Namespace) do(f func() error) error {
	return onThread(func() error {
		if err := unix.Setns(int(n.file.Fd()), unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("enter network namespace %s: %w", n.Name, err)
		}
		return nil
	}, f)
}

// onThread keeps a thread for itself, moves it to another namespace by `enter`, calls f and moves it back. A
// thread that cannot be moved back stays locked, and so ends with its goroutine.
func onThread(enter, f func() error) error {
	runtime.LockOSThread()
	home, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		runtime.UnlockOSThread()
		return err
	}
	defer home.Close()
	defer func() {
		if unix.Setns(int(home.Fd()), unix.CLONE_NEWNET) == nil {
			runtime.UnlockOSThread()
		}
	}()
	if err := enter(); err != nil {
		return err
	}
	return f()
}

// Sysctl sets a value below net, such as net.ipv4.ip_forward.
func (n *Namespace) Sysctl(key, value string) error {
	return n.sysctls([][2]string{{key, value}})
}

func (n *Namespace) sysctls(values [][2]string) error {
	return n.Do(func() error {
		for _, v := range values {
			// /proc/sys/net is that of the thread which opens it.
			path := "/proc/sys/" + strings.ReplaceAll(v[0], ".", "/")
			if err := os.WriteFile(path, []byte(v[1]), 0); err != nil {
				return fmt.Errorf("set %s to %s in %s: %w", v[0], v[1], n.Name, err)
			}
		}
		return nil
	})
}

// Listen is net.Listen in the namespace; the address is literal.
func (n *Namespace) Listen(ctx context.Context, network, address string) (net.Listener, error) {
	var l net.Listener
	err := n.Do(func() (err error) {
		c := net.ListenConfig{Control: reuseAddress}
		c.SetMultipathTCP(false) // what is tested is TCP
		l, err = c.Listen(ctx, network, address)
		return err
	})
	return l, err
}

// ListenPacket is net.ListenPacket in the namespace; the address is literal.
func (n *Namespace) ListenPacket(ctx context.Context, network, address string) (net.PacketConn, error) {
	var c net.PacketConn
	err := n.Do(func() (err error) {
		c, err = new(net.ListenConfig).ListenPacket(ctx, network, address)
		return err
	})
	return c, err
}

// DialContext connects from the namespace; the address is literal.
func (n *Namespace) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	return n.DialFrom(ctx, network, netip.AddrPort{}, address)
}

// DialFrom connects from a source address, or port, or both. A TCP source port can be used again while an
// earlier connection is in TIME_WAIT.
func (n *Namespace) DialFrom(ctx context.Context, network string, source netip.AddrPort, address string) (net.Conn, error) {
	var c net.Conn
	err := n.Do(func() (err error) {
		d := net.Dialer{}
		d.SetMultipathTCP(false)
		switch {
		case !source.IsValid() && source.Port() == 0:
		case strings.HasPrefix(network, "udp"):
			d.LocalAddr = &net.UDPAddr{IP: source.Addr().AsSlice(), Port: int(source.Port())}
		default:
			d.LocalAddr = &net.TCPAddr{IP: source.Addr().AsSlice(), Port: int(source.Port())}
			d.Control = reuseAddress
		}
		c, err = d.DialContext(ctx, network, address)
		return err
	})
	return c, err
}

func reuseAddress(_, _ string, c syscall.RawConn) error {
	var err error
	if e := c.Control(func(fd uintptr) {
		err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)
	}); e != nil {
		return e
	}
	return err
}

// Process is a child in a namespace. It is killed when this process ends, however it ends.
type Process struct {
	cmd  *exec.Cmd
	done chan struct{}
	err  error // of Wait; set before done is closed
}

// Start starts a command in the namespace. Unlike under `ip netns exec`, the mounts are those of this
// process, so /sys/fs/bpf and the cgroups are there. Of cmd.SysProcAttr it sets Pdeathsig alone.
func (n *Namespace) Start(cmd *exec.Cmd) (*Process, error) {
	if n.file == nil {
		return nil, fmt.Errorf("start %s in network namespace %s: %w", cmd.Path, n.Name, os.ErrClosed)
	}
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	cmd.SysProcAttr.Pdeathsig = unix.SIGKILL
	if cmd.WaitDelay == 0 {
		cmd.WaitDelay = time.Second // for a grandchild that holds the output open
	}
	p := &Process{cmd: cmd, done: make(chan struct{})}
	started := make(chan error)
	go func() {
		defer close(p.done)
		// The signal of Pdeathsig comes when the *thread* that made the child ends, so that one is kept.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := n.do(cmd.Start)
		started <- err
		if err == nil {
			p.err = cmd.Wait()
		}
	}()
	if err := <-started; err != nil {
		<-p.done
		return nil, fmt.Errorf("start %s in network namespace %s: %w", cmd.Path, n.Name, err)
	}
	return p, nil
}

// PID is the child's.
func (p *Process) PID() int { return p.cmd.Process.Pid }

// Done is closed when the child has ended.
func (p *Process) Done() <-chan struct{} { return p.done }

// Wait waits for the child's end; the error is that of exec.Cmd.Wait.
func (p *Process) Wait() error {
	<-p.done
	return p.err
}

// Signal sends a signal; one to a child that has ended is os.ErrProcessDone.
func (p *Process) Signal(s os.Signal) error { return p.cmd.Process.Signal(s) }

// Stop sends SIGTERM and waits for the end. After the grace period it kills the child and says so.
func (p *Process) Stop(grace time.Duration) error {
	if err := p.Signal(unix.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("stop %s: %w", p.cmd.Path, err)
	}
	timer := time.NewTimer(grace)
	defer timer.Stop()
	select {
	case <-p.done:
		return p.err
	case <-timer.C:
		return errors.Join(fmt.Errorf("%s does not end within %v of SIGTERM", p.cmd.Path, grace), p.Close())
	}
}

// Close kills the child, if it still runs, and waits for its end.
func (p *Process) Close() error {
	err := p.cmd.Process.Kill()
	<-p.done
	if err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("kill %s: %w", p.cmd.Path, err)
	}
	return nil
}

// Run runs a command in the namespace to its end and returns what it wrote to its standard output. The error
// has what it wrote to the other one.
func (n *Namespace) Run(ctx context.Context, stdin, name string, args ...string) ([]byte, error) {
	var stdout, stderr bytes.Buffer
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(stdin), &stdout, &stderr
	p, err := n.Start(cmd)
	if err != nil {
		return nil, err
	}
	if err := p.Wait(); err != nil {
		return stdout.Bytes(), fmt.Errorf("%s in %s: %w: %s", strings.Join(cmd.Args, " "), n.Name, err, bytes.TrimSpace(stderr.Bytes()))
	}
	return stdout.Bytes(), nil
}

// ChecksumErrors returns how many packets this namespace's stack threw away for a wrong checksum. A stack
// does not look where the sender left the checksum to a device (tx-checksum on) and none was on the way.
func (n *Namespace) ChecksumErrors() (uint64, error) {
	var total uint64
	err := n.Do(func() error {
		for _, file := range []string{"/proc/thread-self/net/snmp", "/proc/thread-self/net/snmp6"} {
			content, err := os.ReadFile(file)
			if err != nil {
				return err
			}
			count, err := checksumErrors(content)
			if err != nil {
				return fmt.Errorf("%s: %w", file, err)
			}
			total += count
		}
		return nil
	})
	return total, err
}

// checksumErrors adds up the counters named InCsumErrors in either form: names in one line and their values
// in the next (snmp), or a name and its value in each (snmp6).
func checksumErrors(content []byte) (uint64, error) {
	var total uint64
	add := func(value string) error {
		count, err := strconv.ParseUint(value, 10, 64)
		total += count
		return err
	}
	lines := bufio.NewScanner(bytes.NewReader(content))
	for lines.Scan() {
		names := strings.Fields(lines.Text())
		if len(names) == 2 {
			if strings.HasSuffix(names[0], "InCsumErrors") {
				if err := add(names[1]); err != nil {
					return 0, err
				}
			}
			continue
		}
		if !lines.Scan() {
			break
		}
		values := strings.Fields(lines.Text())
		for i, name := range names {
			// The header checksum of IPv4 has no such counter; UDP-Lite is nobody's here.
			if name == "InCsumErrors" && i < len(values) {
				if err := add(values[i]); err != nil {
					return 0, err
				}
			}
		}
	}
	return total, lines.Err()
}
