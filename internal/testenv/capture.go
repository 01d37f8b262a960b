// SPDX-License-Identifier: Apache-2.0

package testenv

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// PacketSocket sees and sends the frames of one device.
type PacketSocket struct {
	file *os.File
	conn syscall.RawConn
}

// Frame is what a PacketSocket has seen.
type Frame struct {
	Data     []byte // with its VLAN tag, even where the kernel keeps that apart
	Outgoing bool   // sent by the device's own namespace
	// Unfinished: the transport's checksum is still to be computed by the device, so CheckSums would fail.
	Unfinished bool
}

func (f Frame) String() string { return Describe(f.Data) }

// Capture begins to collect the frames of a device, up to some megabytes of them.
func Capture(n *Namespace, device string) (*PacketSocket, error) {
	var p *PacketSocket
	err := n.Do(func() (err error) {
		p, err = openPacketSocket(device)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("capture on %s in %s: %w", device, n.Name, err)
	}
	return p, nil
}

func openPacketSocket(device string) (*PacketSocket, error) {
	i, err := net.InterfaceByName(device)
	if err != nil {
		return nil, err
	}
	// With no protocol, it sees nothing before it is bound to the device.
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	err = errors.Join(
		unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_AUXDATA, 1),
		unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 8<<20),
		unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: networkOrder(unix.ETH_P_ALL), Ifindex: i.Index}))
	file := os.NewFile(uintptr(fd), "packets of "+device)
	if err != nil {
		file.Close()
		return nil, err
	}
	conn, err := file.SyscallConn()
	if err != nil {
		file.Close()
		return nil, err
	}
	return &PacketSocket{file: file, conn: conn}, nil
}

func networkOrder(v uint16) uint16 {
	return binary.NativeEndian.Uint16(binary.BigEndian.AppendUint16(nil, v))
}

// Close ends the capture.
func (p *PacketSocket) Close() error { return p.file.Close() }

// Send sends a frame out of the device, as it is.
func (p *PacketSocket) Send(frame []byte) error {
	_, err := p.file.Write(frame)
	return err
}

// SendAll sends what `next` returns, a batch by one system call, until it returns none. Frames that find the
// device's queue full are lost, as on any network.
func (p *PacketSocket) SendAll(next func() [][]byte) error {
	type message struct { // struct mmsghdr
		header unix.Msghdr
		length uint32
		_      uint32
	}
	var failed error
	err := p.conn.Control(func(fd uintptr) {
		var messages []message
		var parts []unix.Iovec
		for frames := next(); len(frames) > 0; frames = next() {
			messages, parts = slices.Grow(messages[:0], len(frames))[:len(frames)], slices.Grow(parts[:0], len(frames))[:len(frames)]
			for i, frame := range frames {
				parts[i].Base = &frame[0]
				parts[i].SetLen(len(frame))
				messages[i] = message{header: unix.Msghdr{Iov: &parts[i]}}
				messages[i].header.SetIovlen(1)
			}
			_, _, errno := unix.Syscall6(unix.SYS_SENDMMSG, fd, uintptr(unsafe.Pointer(&messages[0])), uintptr(len(messages)), 0, 0, 0)
			if errno != 0 && errno != unix.ENOBUFS && errno != unix.EAGAIN {
				failed = fmt.Errorf("send a batch of frames: %w", errno)
				return
			}
		}
	})
	return errors.Join(err, failed)
}

// Next returns the next frame. Within the timeout there is none: os.ErrDeadlineExceeded. With a timeout of 0
// it returns what there already is.
func (p *PacketSocket) Next(timeout time.Duration) (Frame, error) {
	if err := p.file.SetReadDeadline(time.Now().Add(timeout)); err != nil {
		return Frame{}, err
	}
	buffer, control := make([]byte, 1<<18), make([]byte, 256)
	var size, controlSize int
	var from unix.Sockaddr
	var err error
	// A deadline that has passed is seen before the socket is, so look once without it.
	receive := func(fd uintptr) bool {
		size, controlSize, _, from, err = unix.Recvmsg(int(fd), buffer, control, 0)
		return err != unix.EAGAIN
	}
	if e := p.conn.Control(func(fd uintptr) { receive(fd) }); e != nil {
		return Frame{}, e
	}
	if err == unix.EAGAIN {
		if e := p.conn.Read(receive); e != nil {
			return Frame{}, e
		}
	}
	if err != nil {
		return Frame{}, err
	}
	f := Frame{Data: buffer[:size:size]}
	if sender, ok := from.(*unix.SockaddrLinklayer); ok {
		f.Outgoing = sender.Pkttype == unix.PACKET_OUTGOING
	}
	messages, err := unix.ParseSocketControlMessage(control[:controlSize])
	if err != nil {
		return Frame{}, err
	}
	for _, m := range messages {
		if m.Header.Level == unix.SOL_PACKET && m.Header.Type == unix.PACKET_AUXDATA {
			f.apply(m.Data)
		}
	}
	return f, nil
}

// apply reads a struct tpacket_auxdata.
func (f *Frame) apply(auxdata []byte) {
	var a unix.TpacketAuxdata
	if _, err := binary.Decode(auxdata, binary.NativeEndian, &a); err != nil {
		return
	}
	f.Unfinished = a.Status&unix.TP_STATUS_CSUMNOTREADY != 0
	if a.Status&unix.TP_STATUS_VLAN_VALID == 0 || len(f.Data) < 12 {
		return
	}
	ethertype := uint16(unix.ETH_P_8021Q)
	if a.Status&unix.TP_STATUS_VLAN_TPID_VALID != 0 {
		ethertype = a.Vlan_tpid
	}
	tag := binary.BigEndian.AppendUint16(nil, ethertype)
	tag = binary.BigEndian.AppendUint16(tag, a.Vlan_tci)
	f.Data = append(append(f.Data[:12:12], tag...), f.Data[12:]...)
}

// Find returns the first frame that `want` says yes to, within the timeout; the others before it are gone.
// Without one, the error has the last of those it saw.
func (p *PacketSocket) Find(timeout time.Duration, want func(Frame) bool) (Frame, error) {
	var last string
	for end := time.Now().Add(timeout); ; {
		f, err := p.Next(time.Until(end))
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return Frame{}, fmt.Errorf("no such frame within %v (the last one was: %s): %w", timeout, last, err)
		}
		if err != nil {
			return Frame{}, err
		}
		if want(f) {
			return f, nil
		}
		last = f.String()
	}
}

// All returns the frames that there already are.
func (p *PacketSocket) All() ([]Frame, error) {
	var frames []Frame
	for {
		f, err := p.Next(0)
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return frames, nil
		}
		if err != nil {
			return frames, err
		}
		frames = append(frames, f)
	}
}
