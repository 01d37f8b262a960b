// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"time"

	"golang.org/x/sys/unix"

	"github.com/lbagent/lbagent/maps"
)

// Timeouts are the ages at which an entry of the flow tables is absent.
type Timeouts struct {
	TCPPending, TCPEstablished, TCPHalfClosed, TCPClosed, Reset, UDPPending, UDP time.Duration
}

// DefaultTimeouts are those of docs/design: a flow without an answer is given up after a minute, an
// established connection after a day, as by conntrack's default in a cluster.
func DefaultTimeouts() Timeouts {
	return Timeouts{
		TCPPending: time.Minute, TCPEstablished: 24 * time.Hour, TCPHalfClosed: time.Hour, TCPClosed: time.Minute,
		Reset: 10 * time.Second, UDPPending: 30 * time.Second, UDP: 2 * time.Minute,
	}
}

// Phase says in which phase an entry of a table is, by its state and protocol, and after which age it is absent.
// flow_timeout_ns of bpf/flow.h is the programs' own word on it.
func (t Timeouts) Phase(state, protocol uint8, in maps.Table) (string, time.Duration) {
	const closed = maps.FlowClientRST | maps.FlowBackendRST | maps.FlowMoved
	const fins = maps.FlowClientFIN | maps.FlowBackendFIN
	switch {
	case state&closed != 0:
		return "reset", t.Reset
	case protocol == unix.IPPROTO_UDP && in == maps.Flows:
		return "assured", t.UDP
	case protocol == unix.IPPROTO_UDP:
		return "pending", t.UDPPending
	case state&fins == fins:
		return "closed", t.TCPClosed
	case in == maps.Pending:
		return "pending", t.TCPPending
	case state != 0:
		return "half-closed", t.TCPHalfClosed
	}
	return "established", t.TCPEstablished
}
