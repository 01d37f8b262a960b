// SPDX-License-Identifier: Apache-2.0

package testenv

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"strings"

	"golang.org/x/sys/unix"
)

// The protocols that a Packet knows; any other is a payload straight behind the IP header.
const (
	TCP    uint8 = unix.IPPROTO_TCP
	UDP    uint8 = unix.IPPROTO_UDP
	ICMP   uint8 = unix.IPPROTO_ICMP
	ICMPv6 uint8 = unix.IPPROTO_ICMPV6
)

// The flags of a TCP header.
const (
	FIN uint8 = 1 << iota
	SYN
	RST
	PSH
	ACK
)

// MAC is an Ethernet address.
type MAC [6]byte

func (m MAC) String() string {
	return fmt.Sprintf("%02x:%02x:%02x:%02x:%02x:%02x", m[0], m[1], m[2], m[3], m[4], m[5])
}

// The Ethernet addresses of a Packet that names none.
var (
	defaultSourceMAC      = MAC{0x02, 0, 0, 0, 0, 0x01}
	defaultDestinationMAC = MAC{0x02, 0, 0, 0, 0, 0x02}
)

// Packet is one Ethernet frame as plain values. Bytes writes it with every length and checksum right, Parse
// reads it back. What is wrong on purpose is done to the bytes, at the offsets that Locate tells.
type Packet struct {
	SourceMAC, DestinationMAC MAC      // zero: 02::01 and 02::02
	VLAN                      []uint16 // tags, the outer one first; all but the innermost are 802.1ad

	Source, Destination netip.AddrPort // of one family; ports of TCP and UDP only
	Protocol            uint8
	TOS                 uint8       // or traffic class
	TTL                 uint8       // or hop limit; 0: 64
	ID                  uint16      // IPv4 only, and not of a fragment
	DontFragment        bool        // IPv4 only
	IPOptions           []byte      // IPv4 only; padded to 4 bytes
	Extensions          []Extension // IPv6 only, in this order
	Fragment            *Fragment

	Seq, Ack   uint32
	TCPFlags   uint8
	Window     uint16
	TCPOptions []byte // padded to 4 bytes

	NoChecksum bool // UDP: a checksum of 0, which IPv4 alone allows

	ICMPType, ICMPCode uint8
	ICMPRest           uint32 // the second word of the header: MTU, identifier and sequence number

	Payload []byte
}

// Extension is an IPv6 extension header. One of type fragment says where the header of Packet.Fragment
// stands; without one it stands last.
type Extension struct {
	Type uint8  // unix.IPPROTO_HOPOPTS, unix.IPPROTO_DSTOPTS, unix.IPPROTO_ROUTING, ...
	Body []byte // without its first two bytes; padded with zeros, which are Pad1 options, to 8n-2 bytes
}

// Fragment says which part of a datagram a Packet is. At an Offset other than 0 there is no transport
// header: all is Payload. At Offset 0 the transport header's length and checksum are those of the Payload
// given; Packet.Fragments cuts a datagram so that they are those of the whole.
type Fragment struct {
	ID     uint32 // IPv4 has the low 16 bits
	Offset int    // in bytes, a multiple of 8
	More   bool
}

// SegmentTCP returns a packet of TCP; `flags` are FIN, SYN, ... ORed.
func SegmentTCP(source, destination netip.AddrPort, flags uint8) Packet {
	return Packet{Source: source, Destination: destination, Protocol: TCP, TCPFlags: flags, Window: 65535}
}

// DatagramUDP returns a packet of UDP.
func DatagramUDP(source, destination netip.AddrPort, payload string) Packet {
	return Packet{Source: source, Destination: destination, Protocol: UDP, Payload: []byte(payload)}
}

// ErrorICMP returns an ICMP or ICMPv6 error about `frame`, of which it quotes as much as is customary: the
// IP header and 128 bytes, or all that fits into 1,280 bytes. `rest` is the second word of the ICMP header.
func ErrorICMP(source, destination netip.Addr, kind, code uint8, rest uint32, frame []byte) (Packet, error) {
	at, err := Locate(frame)
	if err != nil {
		return Packet{}, fmt.Errorf("quote a frame: %w", err)
	}
	p := Packet{
		Source: netip.AddrPortFrom(source, 0), Destination: netip.AddrPortFrom(destination, 0),
		Protocol: ICMP, ICMPType: kind, ICMPCode: code, ICMPRest: rest,
	}
	limit := at.Transport - at.Network + 128
	if source.Is6() {
		p.Protocol = ICMPv6
		limit = 1280 - 40 - 8
	}
	p.Payload = frame[at.Network:min(at.End, at.Network+limit)]
	return p, nil
}

// Bytes returns the frame. It panics on a Packet that no frame can be: addresses of two families or none, a
// header that is too long.
func (p Packet) Bytes() []byte {
	if p.Fragment != nil && p.Fragment.Offset != 0 {
		return p.frame(p.Payload)
	}
	return p.frame(p.datagram())
}

// Fragments returns the packet cut into fragments with the given identification, each with at most `size`
// bytes (a multiple of 8) behind the IP header and the extension headers.
func (p Packet) Fragments(id uint32, size int) [][]byte {
	p.Fragment = &Fragment{ID: id}
	whole := p.datagram()
	var frames [][]byte
	for at := 0; at < len(whole); at += size {
		end := min(at+size, len(whole))
		p.Fragment = &Fragment{ID: id, Offset: at, More: end < len(whole)}
		frames = append(frames, p.frame(whole[at:end]))
	}
	return frames
}

// datagram returns what fragments are cut from.
func (p Packet) datagram() []byte {
	_, behind := p.extensions()
	return append(p.headers(behind, p.Protocol), p.transport()...)
}

// transport returns the transport header and the payload.
func (p Packet) transport() []byte {
	be := binary.BigEndian
	var b []byte
	sum := 0 // offset of the checksum
	switch p.Protocol {
	case TCP:
		options := padded(p.TCPOptions, 4, 0)
		b = be.AppendUint16(b, p.Source.Port())
		b = be.AppendUint16(b, p.Destination.Port())
		b = be.AppendUint32(b, p.Seq)
		b = be.AppendUint32(b, p.Ack)
		b = append(b, byte(5+len(options)/4)<<4, p.TCPFlags)
		b = be.AppendUint16(b, p.Window)
		b = append(b, 0, 0, 0, 0)
		b = append(b, options...)
		sum = 16
	case UDP:
		b = be.AppendUint16(b, p.Source.Port())
		b = be.AppendUint16(b, p.Destination.Port())
		b = be.AppendUint16(b, uint16(8+len(p.Payload)))
		b = append(b, 0, 0)
		sum = 6
	case ICMP, ICMPv6:
		b = append(b, p.ICMPType, p.ICMPCode, 0, 0)
		b = be.AppendUint32(b, p.ICMPRest)
		sum = 2
	default:
		return p.Payload
	}
	b = append(b, p.Payload...)
	if p.Protocol == UDP && p.NoChecksum {
		return b
	}
	c := transportSum(p.Source.Addr(), p.Destination.Addr(), p.Protocol, b)
	if p.Protocol == UDP && c == 0 {
		c = 0xffff // 0 would mean that there is none
	}
	be.PutUint16(b[sum:], c)
	return b
}

// frame puts the IP and Ethernet headers in front of what follows them.
func (p Packet) frame(rest []byte) []byte {
	source, destination := p.Source.Addr(), p.Destination.Addr()
	if !source.IsValid() || source.Is4() != destination.Is4() || source.Is4In6() != destination.Is4In6() {
		panic(fmt.Sprintf("testenv: a packet from %v to %v", source, destination))
	}
	if p.SourceMAC == (MAC{}) {
		p.SourceMAC = defaultSourceMAC
	}
	if p.DestinationMAC == (MAC{}) {
		p.DestinationMAC = defaultDestinationMAC
	}
	if p.TTL == 0 {
		p.TTL = 64
	}
	b := append(p.DestinationMAC[:], p.SourceMAC[:]...)
	for i, tag := range p.VLAN {
		ethertype := uint16(unix.ETH_P_8021AD)
		if i == len(p.VLAN)-1 {
			ethertype = unix.ETH_P_8021Q
		}
		b = binary.BigEndian.AppendUint16(b, ethertype)
		b = binary.BigEndian.AppendUint16(b, tag)
	}
	if source.Is4() {
		b = binary.BigEndian.AppendUint16(b, unix.ETH_P_IP)
		b = append(b, p.ipv4(len(rest))...)
	} else {
		b = binary.BigEndian.AppendUint16(b, unix.ETH_P_IPV6)
		b = append(b, p.ipv6(len(rest))...)
	}
	return append(b, rest...)
}

func (p Packet) ipv4(length int) []byte {
	be := binary.BigEndian
	options := padded(p.IPOptions, 4, 0)
	if len(options) > 40 {
		panic(fmt.Sprintf("testenv: %d bytes of IPv4 options", len(options)))
	}
	id, fragment := p.ID, uint16(0)
	if f := p.Fragment; f != nil {
		id, fragment = uint16(f.ID), uint16(f.Offset/8)
		if f.More {
			fragment |= 0x2000
		}
	}
	if p.DontFragment {
		fragment |= 0x4000
	}
	b := []byte{0x45 + byte(len(options)/4), p.TOS}
	b = be.AppendUint16(b, uint16(20+len(options)+length))
	b = be.AppendUint16(b, id)
	b = be.AppendUint16(b, fragment)
	b = append(b, p.TTL, p.Protocol, 0, 0)
	b = append(b, p.Source.Addr().AsSlice()...)
	b = append(b, p.Destination.Addr().AsSlice()...)
	b = append(b, options...)
	be.PutUint16(b[10:], ^sum(0, b))
	return b
}

func (p Packet) ipv6(length int) []byte {
	be := binary.BigEndian
	before, behind := p.extensions()
	next := p.Protocol
	if len(behind) > 0 {
		next = behind[0].Type
	}
	headers := p.headers(before, next)
	if len(before) > 0 {
		next = before[0].Type
	}
	b := []byte{0x60 | p.TOS>>4, p.TOS << 4, 0, 0}
	b = be.AppendUint16(b, uint16(len(headers)+length))
	b = append(b, next, p.TTL)
	b = append(b, p.Source.Addr().AsSlice()...)
	b = append(b, p.Destination.Addr().AsSlice()...)
	return append(b, headers...)
}

// extensions returns the extension headers up to that of the fragment, which every fragment has, and those
// behind it, which are part of what is cut.
func (p Packet) extensions() (before, behind []Extension) {
	for i, e := range p.Extensions {
		if e.Type == unix.IPPROTO_FRAGMENT {
			return p.Extensions[:i+1], p.Extensions[i+1:]
		}
	}
	before = p.Extensions
	if p.Fragment != nil && p.Source.Addr().Is6() {
		before = append(before[:len(before):len(before)], Extension{Type: unix.IPPROTO_FRAGMENT})
	}
	return before, nil
}

// headers writes extension headers; `next` is what follows them.
func (p Packet) headers(extensions []Extension, next uint8) []byte {
	be := binary.BigEndian
	var b []byte
	for i, e := range extensions {
		following := next
		if i+1 < len(extensions) {
			following = extensions[i+1].Type
		}
		b = append(b, following)
		if e.Type != unix.IPPROTO_FRAGMENT {
			body := padded(e.Body, 8, 2)
			b = append(b, byte((len(body)+2)/8-1))
			b = append(b, body...)
			continue
		}
		if p.Fragment == nil {
			panic("testenv: a fragment header of no fragment")
		}
		offset := uint16(p.Fragment.Offset)
		if p.Fragment.More {
			offset |= 1
		}
		b = append(b, 0)
		b = be.AppendUint16(b, offset)
		b = be.AppendUint32(b, p.Fragment.ID)
	}
	return b
}

// padded returns b with zeros behind it, so that `before` bytes and the result are a multiple of n, and at
// least one.
func padded(b []byte, n, before int) []byte {
	b = b[:len(b):len(b)]
	for (before+len(b))%n != 0 {
		b = append(b, 0)
	}
	return b
}

// Offsets are where the parts of a frame begin.
type Offsets struct {
	Network   int   // the IP header
	Transport int   // behind the IP header and its options or extension headers
	End       int   // of the IP packet; the frame may be longer
	Protocol  uint8 // at Transport
	Ports     bool  // a transport header is there: not so in a fragment after the first
	Partial   bool  // a fragment: the transport's checksum cannot be told from it
}

var errNotIP = errors.New("not an IP packet")

// Locate finds the headers of a frame. The error says which of them is missing or impossible.
func Locate(frame []byte) (Offsets, error) {
	var at Offsets
	if len(frame) < 14 {
		return at, fmt.Errorf("a frame of %d bytes", len(frame))
	}
	at.Network = 14
	for ethertype := binary.BigEndian.Uint16(frame[12:]); ; ethertype = binary.BigEndian.Uint16(frame[at.Network-2:]) {
		switch ethertype {
		case unix.ETH_P_8021Q, unix.ETH_P_8021AD:
			at.Network += 4
			if len(frame) < at.Network {
				return at, errors.New("a VLAN tag that is cut off")
			}
		case unix.ETH_P_IP:
			return at, at.ipv4(frame)
		case unix.ETH_P_IPV6:
			return at, at.ipv6(frame)
		default:
			return at, fmt.Errorf("ethertype %#04x: %w", ethertype, errNotIP)
		}
	}
}

func (at *Offsets) ipv4(frame []byte) error {
	ip := frame[at.Network:]
	if len(ip) < 20 {
		return fmt.Errorf("an IPv4 header of %d bytes", len(ip))
	}
	header, total := int(ip[0]&15)*4, int(binary.BigEndian.Uint16(ip[2:]))
	if ip[0]>>4 != 4 || header < 20 || total < header || total > len(ip) {
		return fmt.Errorf("an IPv4 header with first byte %#02x and length %d in %d bytes", ip[0], total, len(ip))
	}
	fragment := binary.BigEndian.Uint16(ip[6:])
	at.Transport, at.End, at.Protocol = at.Network+header, at.Network+total, ip[9]
	at.Ports = fragment&0x1fff == 0
	at.Partial = fragment&0x3fff != 0
	return nil
}

func (at *Offsets) ipv6(frame []byte) error {
	ip := frame[at.Network:]
	if len(ip) < 40 {
		return fmt.Errorf("an IPv6 header of %d bytes", len(ip))
	}
	total := 40 + int(binary.BigEndian.Uint16(ip[4:]))
	if ip[0]>>4 != 6 || total > len(ip) {
		return fmt.Errorf("an IPv6 header with first byte %#02x and length %d in %d bytes", ip[0], total, len(ip))
	}
	at.Transport, at.End, at.Protocol = at.Network+40, at.Network+total, ip[6]
	at.Ports = true
	for {
		switch at.Protocol {
		case unix.IPPROTO_HOPOPTS, unix.IPPROTO_DSTOPTS, unix.IPPROTO_ROUTING, unix.IPPROTO_FRAGMENT:
		default:
			return nil
		}
		rest := frame[at.Transport:at.End]
		if len(rest) < 8 {
			return fmt.Errorf("an IPv6 extension header %d that is cut off", at.Protocol)
		}
		length := 8
		if at.Protocol == unix.IPPROTO_FRAGMENT {
			fragment := binary.BigEndian.Uint16(rest[2:])
			at.Partial = at.Partial || fragment&0xfff9 != 0
			at.Ports = fragment&0xfff8 == 0
		} else {
			length = int(rest[1])*8 + 8
		}
		if length > len(rest) {
			return fmt.Errorf("an IPv6 extension header %d that is cut off", at.Protocol)
		}
		at.Protocol = rest[0]
		at.Transport += length
		if !at.Ports {
			return nil // what the datagram goes on with is not here
		}
	}
}

// Parse is the inverse of Packet.Bytes; padding of options and extension headers stays part of them. It
// looks at no checksum.
func Parse(frame []byte) (Packet, error) {
	be := binary.BigEndian
	at, err := Locate(frame)
	if err != nil {
		return Packet{}, err
	}
	p := Packet{Protocol: at.Protocol}
	copy(p.DestinationMAC[:], frame)
	copy(p.SourceMAC[:], frame[6:])
	for tag := 14; tag < at.Network; tag += 4 {
		p.VLAN = append(p.VLAN, be.Uint16(frame[tag:]))
	}
	ip, rest := frame[at.Network:at.Transport], frame[at.Transport:at.End]
	source, destination := addresses(ip)
	if source.Is4() {
		p.TOS, p.TTL, p.ID = ip[1], ip[8], be.Uint16(ip[4:])
		fragment := be.Uint16(ip[6:])
		p.DontFragment = fragment&0x4000 != 0
		if at.Partial {
			p.Fragment = &Fragment{ID: uint32(p.ID), Offset: int(fragment&0x1fff) * 8, More: fragment&0x2000 != 0}
			p.ID = 0
		}
		p.IPOptions = cloned(ip[20:])
	} else {
		p.TOS, p.TTL = ip[0]<<4|ip[1]>>4, ip[7]
		p.Extensions, p.Fragment = parseExtensions(ip)
	}
	var ports [2]uint16
	switch {
	case !at.Ports:
		p.Payload = cloned(rest)
	case p.Protocol == TCP:
		if len(rest) < 20 || int(rest[12]>>4)*4 < 20 || int(rest[12]>>4)*4 > len(rest) {
			return Packet{}, fmt.Errorf("a TCP header that does not fit into %d bytes", len(rest))
		}
		header := int(rest[12]>>4) * 4
		ports = [2]uint16{be.Uint16(rest), be.Uint16(rest[2:])}
		p.Seq, p.Ack, p.TCPFlags, p.Window = be.Uint32(rest[4:]), be.Uint32(rest[8:]), rest[13], be.Uint16(rest[14:])
		p.TCPOptions, p.Payload = cloned(rest[20:header]), cloned(rest[header:])
	case p.Protocol == UDP:
		if len(rest) < 8 {
			return Packet{}, fmt.Errorf("a UDP header of %d bytes", len(rest))
		}
		ports = [2]uint16{be.Uint16(rest), be.Uint16(rest[2:])}
		p.NoChecksum = be.Uint16(rest[6:]) == 0
		p.Payload = cloned(rest[8:])
	case p.Protocol == ICMP || p.Protocol == ICMPv6:
		if len(rest) < 8 {
			return Packet{}, fmt.Errorf("an ICMP header of %d bytes", len(rest))
		}
		p.ICMPType, p.ICMPCode, p.ICMPRest = rest[0], rest[1], be.Uint32(rest[4:])
		p.Payload = cloned(rest[8:])
	default:
		p.Payload = cloned(rest)
	}
	p.Source, p.Destination = netip.AddrPortFrom(source, ports[0]), netip.AddrPortFrom(destination, ports[1])
	return p, nil
}

// parseExtensions reads the extension headers that Locate found whole.
func parseExtensions(ip []byte) ([]Extension, *Fragment) {
	var list []Extension
	var fragment *Fragment
	next := ip[6]
	for rest := ip[40:]; len(rest) > 0; {
		length := 8
		e := Extension{Type: next}
		if next == unix.IPPROTO_FRAGMENT {
			offset := binary.BigEndian.Uint16(rest[2:])
			fragment = &Fragment{ID: binary.BigEndian.Uint32(rest[4:]), Offset: int(offset &^ 7), More: offset&1 != 0}
		} else {
			length = int(rest[1])*8 + 8
			e.Body = cloned(rest[2:length])
		}
		list = append(list, e)
		next, rest = rest[0], rest[length:]
	}
	return list, fragment
}

// cloned returns a copy of b, nil where there is nothing.
func cloned(b []byte) []byte { return append([]byte(nil), b...) }

// addresses reads the addresses of an IP header that Locate found whole.
func addresses(ip []byte) (source, destination netip.Addr) {
	if ip[0]>>4 == 4 {
		return netip.AddrFrom4([4]byte(ip[12:16])), netip.AddrFrom4([4]byte(ip[16:20]))
	}
	return netip.AddrFrom16([16]byte(ip[8:24])), netip.AddrFrom16([16]byte(ip[24:40]))
}

// CheckSums computes every checksum of a frame again: that of the IPv4 header, that of the transport (which
// a fragment does not show), and in an ICMP error that of the IPv4 header it quotes. The error names the
// first that is wrong.
func CheckSums(frame []byte) error {
	at, err := Locate(frame)
	if err != nil {
		return err
	}
	ip, rest := frame[at.Network:at.Transport], frame[at.Transport:at.End]
	source, destination := addresses(ip)
	if source.Is4() && sum(0, ip) != 0xffff {
		return fmt.Errorf("the IPv4 header's checksum %#04x is wrong", ip[10:12])
	}
	if at.Partial {
		return nil
	}
	field := 0
	switch at.Protocol {
	case TCP:
		field = 16
	case UDP:
		field = 6
	case ICMP, ICMPv6:
		field = 2
	default:
		return nil
	}
	if len(rest) < field+2 {
		return fmt.Errorf("a header of protocol %d in %d bytes", at.Protocol, len(rest))
	}
	got := binary.BigEndian.Uint16(rest[field:])
	if at.Protocol == UDP && got == 0 {
		if source.Is4() {
			return nil
		}
		return errors.New("a UDP checksum of 0 in IPv6")
	}
	if transportSum(source, destination, at.Protocol, rest) != 0 {
		return fmt.Errorf("the checksum %#04x of protocol %d is wrong", got, at.Protocol)
	}
	if at.Protocol == ICMP && isErrorICMP(at.Protocol, rest[0]) && len(rest) >= 28 {
		quoted := rest[8:]
		if header := int(quoted[0]&15) * 4; header >= 20 && header <= len(quoted) && sum(0, quoted[:header]) != 0xffff {
			return fmt.Errorf("the quoted IPv4 header's checksum %#04x is wrong", quoted[10:12])
		}
	}
	return nil
}

func isErrorICMP(protocol, kind uint8) bool {
	if protocol == ICMPv6 {
		return kind < 128
	}
	return kind == 3 || kind == 4 || kind == 5 || kind == 11 || kind == 12
}

// transportSum returns the checksum of a transport header and payload: 0 if it already stands in it and is
// right. ICMP alone has no pseudo header.
func transportSum(source, destination netip.Addr, protocol uint8, b []byte) uint16 {
	var pseudo []byte
	if protocol != ICMP {
		pseudo = append(source.AsSlice(), destination.AsSlice()...)
		pseudo = binary.BigEndian.AppendUint32(pseudo, uint32(len(b)))
		pseudo = append(pseudo, 0, 0, 0, protocol)
	}
	return ^sum(sum(0, pseudo), b)
}

// sum adds b, in words of 16 bits, to a one's complement sum.
func sum(start uint16, b []byte) uint16 {
	s := uint64(start)
	for ; len(b) >= 2; b = b[2:] {
		s += uint64(binary.BigEndian.Uint16(b))
	}
	if len(b) == 1 {
		s += uint64(b[0]) << 8
	}
	for s > 0xffff {
		s = s>>16 + s&0xffff
	}
	return uint16(s)
}

// Describe returns a frame as one line.
func Describe(frame []byte) string {
	p, err := Parse(frame)
	if err != nil {
		return fmt.Sprintf("%d bytes: %v", len(frame), err)
	}
	var s strings.Builder
	for _, tag := range p.VLAN {
		fmt.Fprintf(&s, "vlan %d ", tag&0xfff)
	}
	at, _ := Locate(frame) // Parse has just done it
	switch {
	case !at.Ports:
		fmt.Fprintf(&s, "%v > %v protocol %d", p.Source.Addr(), p.Destination.Addr(), p.Protocol)
	case p.Protocol == TCP:
		fmt.Fprintf(&s, "%v > %v TCP %s seq %d ack %d", p.Source, p.Destination, flagNames(p.TCPFlags), p.Seq, p.Ack)
	case p.Protocol == UDP:
		fmt.Fprintf(&s, "%v > %v UDP", p.Source, p.Destination)
	case p.Protocol == ICMP || p.Protocol == ICMPv6:
		fmt.Fprintf(&s, "%v > %v ICMP type %d code %d", p.Source.Addr(), p.Destination.Addr(), p.ICMPType, p.ICMPCode)
	default:
		fmt.Fprintf(&s, "%v > %v protocol %d", p.Source.Addr(), p.Destination.Addr(), p.Protocol)
	}
	if p.IPOptions != nil {
		fmt.Fprintf(&s, " options %d", len(p.IPOptions))
	}
	for _, e := range p.Extensions {
		fmt.Fprintf(&s, " extension %d", e.Type)
	}
	if f := p.Fragment; f != nil {
		fmt.Fprintf(&s, " fragment %#x at %d", f.ID, f.Offset)
		if f.More {
			s.WriteString(" and more")
		}
	}
	fmt.Fprintf(&s, " ttl %d payload %d", p.TTL, len(p.Payload))
	if at.Ports && isErrorICMP(p.Protocol, p.ICMPType) && (p.Protocol == ICMP || p.Protocol == ICMPv6) {
		fmt.Fprintf(&s, " about (%s)", describeQuoted(p.Payload))
	}
	if err := CheckSums(frame); err != nil {
		fmt.Fprintf(&s, " BAD: %v", err)
	}
	return s.String()
}

// describeQuoted describes what an ICMP error quotes, which is cut off where the error wants.
func describeQuoted(b []byte) string {
	ethertype, source, destination := uint16(unix.ETH_P_IP), 12, 16
	if len(b) > 0 && b[0]>>4 == 6 {
		ethertype, source, destination = unix.ETH_P_IPV6, 8, 24
	}
	size := destination - source
	if len(b) < destination+size {
		return "cut off"
	}
	from, _ := netip.AddrFromSlice(b[source : source+size])
	to, _ := netip.AddrFromSlice(b[destination : destination+size])
	ports := 40
	if ethertype == unix.ETH_P_IP {
		ports = int(b[0]&15) * 4
	}
	if len(b) < ports+4 {
		return fmt.Sprintf("%v > %v", from, to)
	}
	return fmt.Sprintf("%v > %v", netip.AddrPortFrom(from, binary.BigEndian.Uint16(b[ports:])),
		netip.AddrPortFrom(to, binary.BigEndian.Uint16(b[ports+2:])))
}

func flagNames(flags uint8) string {
	var names []string
	for i, name := range []string{"FIN", "SYN", "RST", "PSH", "ACK"} {
		if flags&(1<<i) != 0 {
			names = append(names, name)
		}
	}
	if names == nil {
		return "none"
	}
	return strings.Join(names, ",")
}
