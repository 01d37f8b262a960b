// SPDX-License-Identifier: Apache-2.0

package reconcile

import (
	"math/bits"

	"github.com/lbagent/lbagent/maps"
)

// idQueue is a queue of free ids, the one that is free for longest first: something in the kernel might still
// name it. It is a ring through 0, which is no id, so that an id can leave it from the middle.
type idQueue struct {
	next, prev []uint32
	length     int
}

// newIDQueue returns an empty queue for ids below size.
func newIDQueue(size uint32) idQueue {
	return idQueue{next: make([]uint32, size), prev: make([]uint32, size)}
}

// oldest returns the id that is free for longest, 0 where none is. It stays in the queue.
func (q *idQueue) oldest() uint32 { return q.next[0] }

// push appends an id that is not in the queue.
func (q *idQueue) push(id uint32) {
	last := q.prev[0]
	q.next[last], q.prev[id] = id, last
	q.next[id], q.prev[0] = 0, id
	q.length++
}

// remove takes an id out that is in the queue.
func (q *idQueue) remove(id uint32) {
	q.next[q.prev[id]], q.prev[q.next[id]] = q.next[id], q.prev[id]
	q.length--
}

// slotAllocator hands out ranges of slots: a buddy allocator. A range of n slots has a block of the next
// power of two to itself, which begins at a multiple of its size; a block that is freed joins the other half
// of the block that it was cut from. So it needs no record beside the ranges themselves: after a restart
// they tell which blocks are taken.
type slotAllocator struct {
	free [32][]uint32         // by order: first slots of the free blocks of 1<<order
	at   map[uint32]freeBlock // by first slot
}

type freeBlock struct {
	order, index int // free[order][index] is the block
}

func newSlotAllocator(size uint32) slotAllocator {
	a := slotAllocator{at: map[uint32]freeBlock{}}
	for first := uint32(0); first < size; {
		order := bits.Len32(size-first) - 1
		if first != 0 {
			order = min(order, bits.TrailingZeros32(first))
		}
		a.put(first, order)
		first += 1 << order
	}
	return a
}

// orderOf returns the order of the block that n slots need; n is not 0.
func orderOf(n uint32) int { return bits.Len32(n - 1) }

func (a *slotAllocator) put(first uint32, order int) {
	a.at[first] = freeBlock{order, len(a.free[order])}
	a.free[order] = append(a.free[order], first)
}

func (a *slotAllocator) remove(first uint32) {
	b := a.at[first]
	delete(a.at, first)
	last := len(a.free[b.order]) - 1
	if b.index != last {
		moved := a.free[b.order][last]
		a.free[b.order][b.index] = moved
		a.at[moved] = b
	}
	a.free[b.order] = a.free[b.order][:last]
}

// alloc returns a range of n slots, n not 0, or false where there is no block for it.
func (a *slotAllocator) alloc(n uint32) (maps.SlotRange, bool) {
	for order := orderOf(n); order < len(a.free); order++ {
		if last := len(a.free[order]) - 1; last >= 0 {
			r := maps.SlotRange{First: a.free[order][last], Count: n}
			return r, a.take(r)
		}
	}
	return maps.SlotRange{}, false
}

// take makes a range taken, and returns false where it is none that alloc could have returned, or meets one
// that is taken.
func (a *slotAllocator) take(r maps.SlotRange) bool {
	if r.Count == 0 || r.Count > 1<<31 {
		return false
	}
	want := orderOf(r.Count)
	if r.First&(1<<want-1) != 0 {
		return false
	}
	for order := want; order < len(a.free); order++ {
		first := r.First &^ (1<<order - 1)
		b, ok := a.at[first]
		if !ok || b.order != order {
			continue
		}
		a.remove(first)
		for order > want { // cut it, keep the half that the range is in
			order--
			half := first ^ 1<<order
			if r.First&(1<<order) != 0 {
				first, half = half, first
			}
			a.put(half, order)
		}
		return true
	}
	return false
}

// release frees a range that was taken.
func (a *slotAllocator) release(r maps.SlotRange) {
	first, order := r.First, orderOf(r.Count)
	for {
		buddy := first ^ 1<<order
		b, ok := a.at[buddy]
		if !ok || b.order != order {
			break
		}
		a.remove(buddy)
		first, order = min(first, buddy), order+1
	}
	a.put(first, order)
}
