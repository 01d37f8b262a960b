// SPDX-License-Identifier: Apache-2.0

package node

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"runtime"
	"sync"
	"syscall"
	"time"

	"github.com/vishvananda/netlink/nl"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

const (
	// receiveBuffer holds some thousand messages. When it overflows all is listed again, so its size is a
	// matter of cost only.
	receiveBuffer = 4 << 20
	// maxBatch bounds how many messages are brought in between two looks at whether to stop.
	maxBatch = 1024
	// maxDumps is how often a listing that changes interrupt is begun again.
	maxDumps = 100
)

// Follower knows the host's addresses, devices and routes, and learns of their changes. It belongs to the
// network namespace that it was opened in, whichever thread calls it later.
type Follower struct {
	events   *os.File // subscribed to changes; nobody sends on it
	raw      syscall.RawConn
	requests *nl.SocketHandle // for listings
	buffer   []byte           // of receive
	changed  chan struct{}    // holds one token while there is news for Next

	mu     sync.Mutex
	tables tables
}

// Open lists the host in the network namespace of the calling thread and subscribes to its changes, which
// [Follower.Run] brings in. Close it when Run has returned.
func Open() (*Follower, error) {
	return open(receiveBuffer)
}

func open(receiveBuffer int) (_ *Follower, err error) {
	// Both sockets must be of one namespace.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()

	f := &Follower{buffer: make([]byte, 64<<10), changed: make(chan struct{}, 1)}
	if f.events, err = subscribe(receiveBuffer); err != nil {
		return nil, fmt.Errorf("subscribe to network changes: %w", err)
	}
	if f.raw, err = f.events.SyscallConn(); err != nil {
		f.events.Close()
		return nil, fmt.Errorf("subscribe to network changes: %w", err)
	}
	socket, err := nl.GetNetlinkSocketAt(netns.None(), netns.None(), unix.NETLINK_ROUTE)
	if err != nil {
		f.events.Close()
		return nil, fmt.Errorf("open a netlink socket: %w", err)
	}
	f.requests = &nl.SocketHandle{Socket: socket}
	// What changes from here on is both in the listing and in a message, or in the message only. A message
	// sets or removes a whole thing and the last one has the last word, so to hear of a change that the
	// listing knew does no harm.
	if err := f.list(); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// List returns the host as it is now, in the network namespace of the calling thread.
func List() (Snapshot, error) {
	f, err := Open()
	if err != nil {
		return Snapshot{}, err
	}
	defer f.Close()
	return f.Snapshot(), nil
}

func subscribe(receiveBuffer int) (*os.File, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_ROUTE)
	if err != nil {
		return nil, err
	}
	file := os.NewFile(uintptr(fd), "netlink")
	// Beyond net.core.rmem_max this needs CAP_NET_ADMIN in the first user namespace; a small buffer works too.
	if unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, receiveBuffer) != nil {
		_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, receiveBuffer)
	}
	groups := uint32(0)
	for _, g := range []uint{unix.RTNLGRP_LINK, unix.RTNLGRP_IPV4_IFADDR, unix.RTNLGRP_IPV6_IFADDR,
		unix.RTNLGRP_IPV4_ROUTE, unix.RTNLGRP_IPV6_ROUTE} {
		groups |= 1 << (g - 1)
	}
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: groups}); err != nil {
		file.Close()
		return nil, err
	}
	return file, nil
}

// Close releases the sockets.
func (f *Follower) Close() {
	f.events.Close()
	f.requests.Close()
}

// Run brings in changes until ctx ends; it returns nil then. It is called once. After an error, what
// Snapshot returns is what was known last.
func (f *Follower) Run(ctx context.Context) error {
	stop := context.AfterFunc(ctx, func() { _ = f.events.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	for {
		messages, err := f.receive()
		switch {
		case errors.Is(err, unix.ENOBUFS):
			err = f.resync()
		case err != nil:
			err = fmt.Errorf("receive network changes: %w", err)
		default:
			err = f.apply(messages)
		}
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// Next blocks until something has changed since the last call, and returns the host as it is then; changes
// that came meanwhile are in it. The first call returns at once. It returns an error only when ctx ends.
// One goroutine may call it; others have Snapshot.
func (f *Follower) Next(ctx context.Context) (Snapshot, error) {
	select {
	case <-f.changed:
		return f.Snapshot(), nil
	case <-ctx.Done():
		return Snapshot{}, ctx.Err()
	}
}

// Snapshot returns the host as it was known to be last.
func (f *Follower) Snapshot() Snapshot {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.tables.snapshot()
}

// signal tells Next that there is news.
func (f *Follower) signal() {
	select {
	case f.changed <- struct{}{}:
	default:
	}
}

// apply brings in a batch of messages.
func (f *Follower) apply(messages []syscall.NetlinkMessage) error {
	f.mu.Lock()
	changed := false
	for _, m := range messages {
		did, err := f.tables.apply(m.Header, m.Data)
		if err != nil {
			f.mu.Unlock()
			return err
		}
		changed = changed || did
	}
	stale := f.tables.staleRoutes
	f.mu.Unlock()

	if stale {
		if err := f.listRoutes(); err != nil {
			return err
		}
	}
	if changed || stale {
		f.signal()
	}
	return nil
}

// list reads all anew.
func (f *Follower) list() error {
	fresh := newTables()
	for _, request := range []uint16{unix.RTM_GETLINK, unix.RTM_GETADDR, unix.RTM_GETROUTE} {
		if err := f.dump(request, &fresh); err != nil {
			return err
		}
	}
	f.mu.Lock()
	f.tables = fresh
	f.mu.Unlock()
	f.signal()
	return nil
}

// listRoutes reads the routes anew.
func (f *Follower) listRoutes() error {
	fresh := newTables()
	if err := f.dump(unix.RTM_GETROUTE, &fresh); err != nil {
		return err
	}
	f.mu.Lock()
	f.tables.hops, f.tables.staleRoutes = fresh.hops, false
	f.mu.Unlock()
	return nil
}

// dump brings one kind of thing into t, which has none of it yet.
func (f *Follower) dump(request uint16, t *tables) error {
	kind := map[uint16]string{
		unix.RTM_GETLINK: "devices", unix.RTM_GETADDR: "addresses", unix.RTM_GETROUTE: "routes",
	}[request]
	answer := request - 2 // RTM_NEW..., RTM_DEL... and RTM_GET... follow each other
	var replies [][]byte
	var err error
	for range maxDumps {
		r := nl.NewNetlinkRequest(int(request), unix.NLM_F_DUMP)
		r.Sockets = map[int]*nl.SocketHandle{unix.NETLINK_ROUTE: f.requests}
		r.AddData(nl.NewIfInfomsg(unix.AF_UNSPEC))
		// An interrupted listing may lack what was there all the time, of which no message will tell.
		if replies, err = r.Execute(unix.NETLINK_ROUTE, answer); !errors.Is(err, nl.ErrDumpInterrupted) {
			break
		}
	}
	if err != nil {
		return fmt.Errorf("list %s: %w", kind, err)
	}
	for _, data := range replies {
		if _, err := t.apply(syscall.NlMsghdr{Type: answer}, data); err != nil {
			return fmt.Errorf("list %s: %w", kind, err)
		}
	}
	return nil
}

// resync makes good for messages that were lost. Those still queued are older than the loss: brought in
// after the listing, they could bring back what has gone since, so they are thrown away before it.
func (f *Follower) resync() error {
	var failed error
	err := f.raw.Read(func(fd uintptr) bool {
		for {
			_, _, err := unix.Recvfrom(int(fd), f.buffer, 0)
			switch err {
			case nil, unix.EINTR, unix.ENOBUFS:
				continue
			case unix.EAGAIN:
			default:
				failed = err
			}
			return true
		}
	})
	if err := cmp.Or(failed, err); err != nil {
		return fmt.Errorf("receive network changes: %w", err)
	}
	return f.list()
}

// receive waits for messages and returns all that are queued, up to maxBatch datagrams. Returns ENOBUFS if
// messages were lost.
func (f *Follower) receive() ([]syscall.NetlinkMessage, error) {
	var messages []syscall.NetlinkMessage
	var failed error
	err := f.raw.Read(func(fd uintptr) bool {
		for range maxBatch {
			n, from, err := unix.Recvfrom(int(fd), f.buffer, 0)
			switch {
			case err == unix.EINTR:
				continue
			case err == unix.EAGAIN:
				return len(messages) > 0
			case err != nil:
				failed = err
				return true
			}
			if sender, ok := from.(*unix.SockaddrNetlink); !ok || sender.Pid != nl.PidKernel {
				continue
			}
			parsed, err := syscall.ParseNetlinkMessage(append([]byte(nil), f.buffer[:n]...))
			if err != nil { // larger than the buffer
				failed = unix.ENOBUFS
				return true
			}
			messages = append(messages, parsed...)
		}
		return true
	})
	return messages, cmp.Or(failed, err)
}
