// SPDX-License-Identifier: Apache-2.0

package testenv

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
	"golang.org/x/sys/unix"
)

var (
	source4      = netip.MustParseAddrPort("192.0.2.2:40001")
	destination4 = netip.MustParseAddrPort("10.96.0.1:80")
	source6      = netip.MustParseAddrPort("[fd00:c::2]:40001")
	destination6 = netip.MustParseAddrPort("[fd00:96::1]:80")
)

// fullPacket has a value in every field that Parse can read back.
func fullPacket(source, destination netip.AddrPort, protocol uint8, payload int) Packet {
	p := Packet{
		SourceMAC: MAC{2, 1, 2, 3, 4, 5}, DestinationMAC: MAC{2, 5, 4, 3, 2, 1},
		Source: source, Destination: destination, Protocol: protocol, TOS: 0xb9, TTL: 7,
		Payload: bytes.Repeat([]byte{0xa5, 0x11, 0x7f}, payload)[:payload],
	}
	if payload == 0 {
		p.Payload = nil
	}
	if source.Addr().Is4() {
		p.ID, p.DontFragment = 77, true
	}
	switch protocol {
	case TCP:
		p.Seq, p.Ack, p.TCPFlags, p.Window = 1<<31, 12345, SYN|ACK, 4096
		p.TCPOptions = []byte{2, 4, 5, 0xb4}
	case ICMP, ICMPv6:
		p.Source = netip.AddrPortFrom(source.Addr(), 0)
		p.Destination = netip.AddrPortFrom(destination.Addr(), 0)
		p.ICMPType, p.ICMPRest = 128, 0x12345678
		if protocol == ICMP {
			p.ICMPType = 8
		}
	}
	return p
}

// allPackets returns one valid packet for each shape.
func allPackets() map[string]Packet {
	extension := func(kind uint8, size int) Extension {
		return Extension{Type: kind, Body: make([]byte, size)}
	}
	packets := map[string]Packet{}
	for _, payload := range []int{0, 1, 2, 1001} {
		for name, protocol := range map[string]uint8{"TCP": TCP, "UDP": UDP, "other": 99} {
			source4, destination4, source6, destination6 := source4, destination4, source6, destination6
			if name == "other" {
				source4, destination4 = netip.AddrPortFrom(source4.Addr(), 0), netip.AddrPortFrom(destination4.Addr(), 0)
				source6, destination6 = netip.AddrPortFrom(source6.Addr(), 0), netip.AddrPortFrom(destination6.Addr(), 0)
			}
			p := fullPacket(source4, destination4, protocol, payload)
			packets[fmt.Sprint(name, "4 plain ", payload)] = p
			p.VLAN = []uint16{0x6001}
			p.IPOptions = []byte{148, 4, 0, 0, 1, 1, 1, 0}
			packets[fmt.Sprint(name, "4 VLAN options ", payload)] = p

			p = fullPacket(source6, destination6, protocol, payload)
			packets[fmt.Sprint(name, "6 plain ", payload)] = p
			p.VLAN = []uint16{100, 200}
			p.Extensions = []Extension{extension(unix.IPPROTO_HOPOPTS, 6), extension(unix.IPPROTO_ROUTING, 22),
				extension(unix.IPPROTO_DSTOPTS, 14)}
			packets[fmt.Sprint(name, "6 VLANs extensions ", payload)] = p
			p.Extensions = []Extension{extension(unix.IPPROTO_DSTOPTS, 6), {Type: unix.IPPROTO_FRAGMENT},
				extension(unix.IPPROTO_HOPOPTS, 6)}
			p.Fragment = &Fragment{ID: 1 << 30}
			packets[fmt.Sprint(name, "6 atomic fragment ", payload)] = p
		}
		packets[fmt.Sprint("ICMP ", payload)] = fullPacket(source4, destination4, ICMP, payload)
		packets[fmt.Sprint("ICMPv6 ", payload)] = fullPacket(source6, destination6, ICMPv6, payload)
	}
	return packets
}

func TestPacketRoundTrip(t *testing.T) {
	for name, p := range allPackets() {
		t.Run(name, func(t *testing.T) {
			frame := p.Bytes()
			got, err := Parse(frame)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(p, got, cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b })); diff != "" {
				t.Errorf("-written +read\n%s", diff)
			}
			if err := CheckSums(frame); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestPacketReferee has gopacket, which shares no code with us, read and check the frames.
func TestPacketReferee(t *testing.T) {
	for name, p := range allPackets() {
		if p.Fragment != nil {
			continue // gopacket takes what follows any fragment header for a part of a datagram
		}
		t.Run(name, func(t *testing.T) {
			packet := gopacket.NewPacket(p.Bytes(), layers.LayerTypeEthernet, gopacket.Default)
			if p.Protocol != 99 && packet.ErrorLayer() != nil {
				t.Fatal(packet.ErrorLayer().Error())
			}
			for _, layer := range packet.Layers() {
				if l, ok := layer.(interface {
					SetNetworkLayerForChecksum(gopacket.NetworkLayer) error
				}); ok {
					if err := l.SetNetworkLayerForChecksum(packet.NetworkLayer()); err != nil {
						t.Fatal(err)
					}
				}
			}
			err, wrong := packet.VerifyChecksums()
			if err != nil || len(wrong) != 0 {
				t.Errorf("%v, mismatches %v", err, wrong)
			}
			switch p.Protocol {
			case TCP:
				tcp := packet.Layer(layers.LayerTypeTCP).(*layers.TCP)
				if uint16(tcp.DstPort) != p.Destination.Port() || tcp.Seq != p.Seq || !tcp.SYN || !tcp.ACK || tcp.RST ||
					!bytes.Equal(tcp.Payload, p.Payload) {
					t.Errorf("got %+v", tcp)
				}
			case UDP:
				udp := packet.Layer(layers.LayerTypeUDP).(*layers.UDP)
				if uint16(udp.SrcPort) != p.Source.Port() || !bytes.Equal(udp.Payload, p.Payload) {
					t.Errorf("got %+v", udp)
				}
			}
		})
	}
}

// TestCheckSumsFinds flips each byte that a checksum covers.
func TestCheckSumsFinds(t *testing.T) {
	for name, p := range allPackets() {
		if p.Protocol == 99 || len(p.Payload) > 2 {
			continue
		}
		frame := p.Bytes()
		at, err := Locate(frame)
		if err != nil {
			t.Fatal(err)
		}
		for i := at.Transport; i < at.End; i++ {
			frame[i] ^= 0x10
			if CheckSums(frame) == nil {
				t.Errorf("%s: byte %d of the transport may change", name, i-at.Transport)
			}
			frame[i] ^= 0x10
		}
		for i := at.Network; i < at.Transport; i++ {
			frame[i] ^= 0x10
			covered := p.Source.Addr().Is4() || i >= at.Network+8 && i < at.Network+40 && p.Protocol != ICMP
			if covered && CheckSums(frame) == nil {
				t.Errorf("%s: byte %d of the IP header may change", name, i-at.Network)
			}
			frame[i] ^= 0x10
		}
		if err := CheckSums(frame); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestChecksumOfZero(t *testing.T) {
	p := DatagramUDP(source4, destination4, "x")
	p.NoChecksum = true
	if err := CheckSums(p.Bytes()); err != nil {
		t.Error(err)
	}
	p = DatagramUDP(source6, destination6, "x")
	p.NoChecksum = true
	if CheckSums(p.Bytes()) == nil {
		t.Error("IPv6 without a UDP checksum is taken for good")
	}
	// A sum that happens to be 0 is written as 0xffff.
	p = DatagramUDP(source4, destination4, "\x00\x00")
	frame := p.Bytes()
	copy(p.Payload, frame[14+20+6:][:2])
	frame = p.Bytes()
	if got := binary.BigEndian.Uint16(frame[14+20+6:]); got != 0xffff {
		t.Errorf("checksum %#04x, want 0xffff", got)
	}
	if err := CheckSums(frame); err != nil {
		t.Error(err)
	}
}

func TestFragments(t *testing.T) {
	for name, p := range map[string]Packet{
		"IPv4": fullPacket(source4, destination4, UDP, 3000),
		"IPv6": fullPacket(source6, destination6, UDP, 3000),
		"TCP":  fullPacket(source6, destination6, TCP, 3000),
		"IPv6 with extensions on both sides": func() Packet {
			p := fullPacket(source6, destination6, UDP, 3000)
			p.Extensions = []Extension{{Type: unix.IPPROTO_HOPOPTS}, {Type: unix.IPPROTO_FRAGMENT}, {Type: unix.IPPROTO_DSTOPTS}}
			return p
		}(),
	} {
		t.Run(name, func(t *testing.T) {
			p.DontFragment = false
			whole := p
			whole.Fragment = &Fragment{ID: 9}
			want := whole.Bytes()
			frames := p.Fragments(9, 1024)
			var datagram []byte
			for i, frame := range frames {
				at, err := Locate(frame)
				if err != nil {
					t.Fatal(err)
				}
				got, err := Parse(frame)
				if err != nil {
					t.Fatal(err)
				}
				if got.Fragment == nil || got.Fragment.ID != 9 || got.Fragment.Offset != len(datagram) ||
					got.Fragment.More != (i < len(frames)-1) || at.Ports != (i == 0) {
					t.Errorf("fragment %d: %+v, %+v", i, got.Fragment, at)
				}
				if err := CheckSums(frame); err != nil {
					t.Errorf("fragment %d: %v", i, err)
				}
				header := 14 + 20
				if p.Source.Addr().Is6() {
					header = 14 + 40 + 8
				}
				if strings.Contains(name, "extensions") {
					header += 8
				}
				datagram = append(datagram, frame[header:at.End]...)
			}
			if len(frames) != 3 || !bytes.HasSuffix(want, datagram) {
				t.Errorf("%d fragments are not the whole again", len(frames))
			}
		})
	}
}

func TestErrorICMP(t *testing.T) {
	for name, test := range map[string]struct {
		about        Packet
		router       string
		kind         uint8
		quoted       int
		mentionsPort bool
	}{
		"IPv4":       {fullPacket(source4, destination4, UDP, 1000), "192.0.2.1", 3, 20 + 128, true},
		"IPv4 short": {DatagramUDP(source4, destination4, "xyz"), "192.0.2.1", 3, 20 + 8 + 3, true},
		"IPv6":       {fullPacket(source6, destination6, TCP, 2000), "fd00:c::1", 2, 1280 - 48, true},
	} {
		t.Run(name, func(t *testing.T) {
			p, err := ErrorICMP(netip.MustParseAddr(test.router), test.about.Source.Addr(), test.kind, 0, 1400, test.about.Bytes())
			if err != nil {
				t.Fatal(err)
			}
			frame := p.Bytes()
			if err := CheckSums(frame); err != nil {
				t.Error(err)
			}
			if len(p.Payload) != test.quoted {
				t.Errorf("quotes %d bytes, want %d", len(p.Payload), test.quoted)
			}
			want := fmt.Sprintf("about (%v > %v)", test.about.Source, test.about.Destination)
			if got := Describe(frame); !strings.Contains(got, want) {
				t.Errorf("%q does not say %q", got, want)
			}
		})
	}
}

func TestDescribe(t *testing.T) {
	syn := SegmentTCP(source4, destination4, SYN)
	syn.VLAN = []uint16{7}
	wrong := DatagramUDP(source6, destination6, "abc").Bytes()
	wrong[len(wrong)-1]++
	for _, test := range []struct {
		frame []byte
		want  string
	}{
		{syn.Bytes(), "vlan 7 192.0.2.2:40001 > 10.96.0.1:80 TCP SYN seq 0 ack 0 ttl 64 payload 0"},
		{DatagramUDP(source6, destination6, "abc").Fragments(5, 8)[1],
			"fd00:c::2 > fd00:96::1 protocol 17 extension 44 fragment 0x5 at 8 ttl 64 payload 3"},
		{[]byte{1, 2}, "2 bytes: a frame of 2 bytes"},
	} {
		if got := Describe(test.frame); got != test.want {
			t.Errorf("got  %q\nwant %q", got, test.want)
		}
	}
	if got := Describe(wrong); !strings.Contains(got, "BAD: the checksum") {
		t.Errorf("got %q", got)
	}
}

func FuzzParse(f *testing.F) {
	for _, p := range allPackets() {
		f.Add(p.Bytes())
	}
	f.Fuzz(func(t *testing.T, frame []byte) {
		_ = Describe(frame)
		p, err := Parse(frame)
		if err != nil {
			return
		}
		if err := CheckSums(p.Bytes()); err != nil && !p.NoChecksum && !isErrorICMP(p.Protocol, p.ICMPType) {
			t.Errorf("%+v: %v", p, err)
		}
	})
}
