// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"runtime"
	"slices"
	"sync"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// test is one program on packets of one kind.
type test struct {
	rig     *rig
	program string
	family  family
	way     way
	flags   uint8
	flows   uint32 // that the packets are of; 0: every packet is of a flow of its own
	cpus    int    // 1, or 2 at once
	same    bool   // the CPUs' packets are of the same flows
	// The reason that the program must count for every packet; empty where it counts none. With
	// several reasons, their sum.
	reasons []string
	// In each round, before and after what is measured.
	before, after func() error

	seed   uint32
	rounds []float64 // ns per packet
	shares map[string]uint64
}

// measure runs every test once a round, in another order each round: what ran before has its part in what is
// in the caches.
func measure(tests []*test, s sizes) error {
	order := rand.New(rand.NewPCG(1, 1))
	for range s.rounds {
		for _, i := range order.Perm(len(tests)) {
			t := tests[i]
			ns, err := t.run(s.packets, s.cold)
			if err != nil {
				return fmt.Errorf("%s, %s, %d flows: %w", t.program, t.family, t.flows, err)
			}
			t.rounds = append(t.rounds, ns)
		}
	}
	return nil
}

func (t *test) run(packets int, cold bool) (float64, error) {
	if t.before != nil {
		if err := t.before(); err != nil {
			return 0, err
		}
	}
	program, err := t.rig.walk(t.family, t.program)
	if err != nil {
		return 0, err
	}
	counted, err := t.rig.maps.Reasons()
	if err != nil {
		return 0, err
	}
	// Every flow speaks once before its packets count, where there are not too many.
	warm := min(packets, int(t.flows))
	if t.flows < 4096 {
		warm = packets / 4
	}
	if cold || t.before != nil {
		warm = 0 // what is measured happens once to each flow
	}
	cpus, err := allowedCPUs()
	if err != nil {
		return 0, err
	}
	ns := make([]float64, t.cpus)
	errs := make([]error, t.cpus)
	var ready, done sync.WaitGroup
	ready.Add(t.cpus)
	for i := range t.cpus {
		seed := t.seed
		if !t.same {
			seed += uint32(i) << 31
		}
		done.Go(func() {
			ns[i], errs[i] = t.onCPU(program, cpus[i], seed, warm, packets, &ready)
		})
	}
	done.Wait()
	t.seed = t.state(warm + packets)
	if err := errors.Join(errs...); err != nil {
		return 0, err
	}
	if err := t.count(counted, uint64(t.cpus*(warm+packets))); err != nil {
		return 0, err
	}
	if t.after != nil {
		return slices.Max(ns), t.after()
	}
	return slices.Max(ns), nil
}

// allowedCPUs are those that this process may run on.
func allowedCPUs() (cpus []int, err error) {
	var set unix.CPUSet
	if err := unix.SchedGetaffinity(0, &set); err != nil {
		return nil, fmt.Errorf("read the affinity: %w", err)
	}
	for cpu := range len(set) * 64 {
		if set.IsSet(cpu) {
			cpus = append(cpus, cpu)
		}
	}
	return cpus, nil
}

// state is where the walk of bpf/reference.c is after n packets.
func (t *test) state(n int) uint32 {
	s := t.seed
	for range n {
		s = s*1664525 + 1013904223
	}
	return s
}

// onCPU runs the program on one CPU. It counts the time of this thread, so that others' use of the CPU does
// not count.
func (t *test) onCPU(program *ebpf.Program, cpu int, seed uint32, warm, packets int, ready *sync.WaitGroup) (float64, error) {
	runtime.LockOSThread() // and never unlocked: the thread goes with its affinity
	var set unix.CPUSet
	set.Set(cpu)
	err := unix.SchedSetaffinity(0, &set)
	if err != nil {
		err = fmt.Errorf("pin a thread to CPU %d: %w", cpu, err)
	}
	// The runtime's own signals would end a run early, and the library begin it anew.
	var signals unix.Sigset_t
	for i := range signals.Val {
		signals.Val[i] = ^signals.Val[i]
	}
	err = errors.Join(err, unix.PthreadSigmask(unix.SIG_BLOCK, &signals, nil))
	frame, frameErr := t.family.frame(t.way, t.flows, seed, t.flags)
	err = errors.Join(err, frameErr)
	if err == nil && warm > 0 {
		out := make([]byte, len(frame)+256)
		opts := ebpf.RunOptions{Data: frame, DataOut: out, Repeat: uint32(warm)}
		_, err = program.Run(&opts)
		frame = opts.DataOut // the walk goes on from there
	}
	ready.Done()
	ready.Wait()
	if err != nil {
		return 0, err
	}
	var from, to unix.Timespec
	err = unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &from)
	verdict, runErr := program.Run(&ebpf.RunOptions{Data: frame, Repeat: uint32(packets)})
	err = errors.Join(err, runErr, unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &to))
	if err != nil {
		return 0, err
	}
	if verdict != math.MaxUint32 && t.cpus == 1 {
		return 0, fmt.Errorf("the last packet's verdict is %d", int32(verdict))
	}
	return float64(to.Nano()-from.Nano()) / float64(packets), nil
}

// count holds what the programs counted against what every packet should have met.
func (t *test) count(before map[string]uint64, want uint64) error {
	after, err := t.rig.maps.Reasons()
	if err != nil {
		return err
	}
	got := uint64(0)
	for name, n := range after {
		n -= before[name]
		if n != 0 && len(t.reasons) != 0 {
			if t.shares == nil {
				t.shares = map[string]uint64{}
			}
			t.shares[name] += n
		}
		if slices.Contains(t.reasons, name) {
			got += n
		}
	}
	if len(t.reasons) != 0 && got != want {
		return fmt.Errorf("%d of %d packets met %v; all: %v", got, want, t.reasons, t.shares)
	}
	return nil
}

func median(values []float64) float64 {
	s := slices.Sorted(slices.Values(values))
	if n := len(s); n%2 == 0 {
		return (s[n/2-1] + s[n/2]) / 2
	}
	return s[len(s)/2]
}

// less returns what remains of each round without what the other took in it.
func less(of, other []float64) []float64 {
	rest := make([]float64, len(of))
	for i := range of {
		rest[i] = of[i] - other[i]
	}
	return rest
}

func ratios(of, to []float64) []float64 {
	r := make([]float64, len(of))
	for i := range of {
		r[i] = of[i] / to[i]
	}
	return r
}
