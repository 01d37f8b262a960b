// SPDX-License-Identifier: Apache-2.0

package testenv

import (
	"context"
	"net"
	"net/netip"
	"time"
)

// PingID is the identifier and the sequence number of Ping's requests.
const PingID = 0x04d2_0001

// Ping sends an echo request and returns the ICMP message that comes from that address, whatever it is.
func Ping(ctx context.Context, n *Namespace, to netip.Addr, payload string) ([]byte, error) {
	network, own, request := "ip4:icmp", "0.0.0.0", byte(8)
	if to.Is6() {
		network, own, request = "ip6:ipv6-icmp", "::", 128
	}
	conn, err := n.ListenPacket(ctx, network, own)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) })()
	// Its sum is that of IPv4; that of IPv6, which has a pseudo header, the kernel computes.
	nobody := netip.AddrPortFrom(netip.IPv4Unspecified(), 0)
	message := Packet{
		Source: nobody, Destination: nobody,
		Protocol: ICMP, ICMPType: request, ICMPRest: PingID, Payload: []byte(payload),
	}.Bytes()[14+20:]
	if _, err := conn.WriteTo(message, &net.IPAddr{IP: to.AsSlice()}); err != nil {
		return nil, err
	}
	buffer := make([]byte, 65536)
	for {
		size, from, err := conn.ReadFrom(buffer)
		if err != nil {
			return nil, err
		}
		if got, _ := netip.AddrFromSlice(from.(*net.IPAddr).IP); got.Unmap() == to {
			return buffer[:size], nil
		}
	}
}
