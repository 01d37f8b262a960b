// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"fmt"
	"slices"
	"unsafe"

	"github.com/cilium/ebpf"

	"github.com/lbagent/lbagent/maps"
)

// Sweep adds what the entries with these keys have carried to the statistics of their backends and services, once
// each packet. It removes those that have expired, or whose twin is another flow's, and returns how many. The program
// judges each, under the flow's lock; where that is held, the entry stays. It may be called beside any other method
// but Close.
//
// A call of the kernel does as many keys as fit into a step, so that no CPU is held for more than some tens of
// microseconds.
func (l *Loader) Sweep(in maps.Table, keys []maps.Tuple) (removed int, err error) {
	var step sweepSweepStep
	step.Table = uint8(in)
	data := unsafe.Slice((*byte)(unsafe.Pointer(&step)), unsafe.Sizeof(step))
	head, keySize := unsafe.Offsetof(step.Keys), unsafe.Sizeof(step.Keys[0])
	for some := range slices.Chunk(keys, len(step.Keys)) {
		for i, k := range some {
			*(*maps.Tuple)(unsafe.Pointer(&step.Keys[i])) = k
		}
		n, err := l.sweeper.Sweep.Run(&ebpf.RunOptions{Data: data[:head+uintptr(len(some))*keySize]})
		if err != nil {
			return removed, fmt.Errorf("run the sweeper: %w", err)
		}
		removed += int(n)
	}
	return removed, nil
}
