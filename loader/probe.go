// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"errors"
	"fmt"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// csumIPv6 is CSUM_IPV6 of bpf/ctx_skb.h.
const csumIPv6 = 1 << 7

// Probe finds out what the kernel can do by doing it: stable kernels have features that their version does
// not tell. It leaves nothing behind.
func Probe() (Features, error) {
	var f Features
	var p probePrograms
	if err := loadProbeObjects(&p, nil); err != nil {
		return f, fmt.Errorf("load the probe: %w", err)
	}
	defer p.Close()

	frame := make([]byte, 128)
	frame[12], frame[13] = 0x86, 0xdd // IPv6
	frame[14] = 0x60
	result, err := p.ProbeCsumIpv6.Run(&ebpf.RunOptions{Data: frame})
	if err != nil {
		return f, fmt.Errorf("run the probe: %w", err)
	}
	f.CsumIPv6 = result == 0

	// No device has this index: a kernel that knows tcx says so, one that does not says that instead.
	_, err = link.AttachTCX(link.TCXOptions{Interface: 1<<31 - 1, Program: p.ProbeCsumIpv6, Attach: ebpf.AttachTCXIngress})
	switch {
	case errors.Is(err, unix.ENODEV):
		f.TCX = true
	case errors.Is(err, ebpf.ErrNotSupported):
	default:
		return f, fmt.Errorf("probe tcx: %w", err)
	}
	return f, nil
}
