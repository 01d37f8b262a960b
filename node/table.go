// SPDX-License-Identifier: Apache-2.0

package node

import (
	"cmp"
	"maps"
	"net/netip"
	"slices"
	"syscall"

	"golang.org/x/sys/unix"
)

// tables is the host as the kernel's messages have told of it so far.
//
// The kernel says nothing when IPv4 routes go because their device went down, lost its last address or was
// deleted (for IPv6 that is a sysctl), nor when a hop of a multipath route comes back with its device. To
// list the routes at such a message would be a race: it is sent before the routes are touched. So hops by
// a device that is down stay here, unseen; whether they are still there is asked when it comes up.
type tables struct {
	devices   map[int]Device
	addresses map[addressKey]Address
	hops      map[hop]struct{}
	// staleRoutes: a message left it open which routes there are; they must be listed again.
	staleRoutes bool
}

// addressKey is what the kernel tells addresses apart by.
type addressKey struct {
	device int
	prefix netip.Prefix
}

func newTables() tables {
	return tables{devices: map[int]Device{}, addresses: map[addressKey]Address{}, hops: map[hop]struct{}{}}
}

// apply brings in one message, of a listing or a notification, and reports whether anything changed by it.
func (t *tables) apply(header syscall.NlMsghdr, data []byte) (changed bool, err error) {
	switch header.Type {
	case unix.RTM_NEWLINK, unix.RTM_DELLINK:
		d, ok, err := decodeDevice(data)
		if !ok {
			return false, err
		}
		if header.Type == unix.RTM_DELLINK {
			return t.deleteDevice(d.Index), nil
		}
		return t.setDevice(d), nil
	case unix.RTM_NEWADDR, unix.RTM_DELADDR:
		a, ok, err := decodeAddress(data)
		if !ok {
			return false, err
		}
		if header.Type == unix.RTM_DELADDR {
			return t.deleteAddress(a), nil
		}
		key := addressKey{a.Device, a.Prefix}
		old, had := t.addresses[key]
		t.addresses[key] = a
		return !had || old != a, nil
	case unix.RTM_NEWROUTE, unix.RTM_DELROUTE:
		slot, hops, ok, err := decodeRoute(data)
		if !ok {
			return false, err
		}
		before := len(t.hops)
		if header.Type == unix.RTM_DELROUTE {
			for _, h := range hops {
				delete(t.hops, h)
			}
			return len(t.hops) != before, nil
		}
		if header.Flags&unix.NLM_F_REPLACE != 0 {
			t.replaceIn(slot)
			changed = len(t.hops) != before
		}
		before = len(t.hops)
		for _, h := range hops {
			t.hops[h] = struct{}{}
		}
		return changed || len(t.hops) != before, nil
	}
	return false, nil
}

func (t *tables) setDevice(d Device) bool {
	old, had := t.devices[d.Index]
	t.devices[d.Index] = d
	if had && d.Up && !old.Up && t.anyHopBy(d.Index) {
		t.staleRoutes = true
	}
	return !had || old != d
}

func (t *tables) anyHopBy(device int) bool {
	for h := range t.hops {
		if h.Device == device {
			return true
		}
	}
	return false
}

func (t *tables) deleteDevice(index int) bool {
	_, had := t.devices[index]
	delete(t.devices, index)
	maps.DeleteFunc(t.addresses, func(key addressKey, _ Address) bool { return key.device == index })
	maps.DeleteFunc(t.hops, func(h hop, _ struct{}) bool { return h.Device == index })
	return had
}

// deleteAddress also drops the IPv4 routes that go with an address: all by a device that has lost its last
// one, and those that prefer a source which is no longer the host's. A hop of several may stay, dead, until
// the device has an address again; the kernel still lists it then, and so do we.
func (t *tables) deleteAddress(a Address) bool {
	key := addressKey{a.Device, a.Prefix}
	_, had := t.addresses[key]
	delete(t.addresses, key)
	if !a.Prefix.Addr().Is4() {
		return had
	}
	deviceHasOne, hostHasIt := false, false
	for _, other := range t.addresses {
		deviceHasOne = deviceHasOne || other.Device == a.Device && other.Prefix.Addr().Is4()
		hostHasIt = hostHasIt || other.Prefix.Addr() == a.Prefix.Addr()
	}
	if deviceHasOne && hostHasIt {
		return had
	}
	before := len(t.hops)
	maps.DeleteFunc(t.hops, func(h hop, _ struct{}) bool {
		if !h.Destination.Addr().Is4() {
			return false
		}
		byDevice := !deviceHasOne && h.Device == a.Device
		if byDevice && h.multipath {
			t.staleRoutes = true
			return false
		}
		return byDevice || !hostHasIt && h.source == a.Prefix.Addr()
	})
	return had || len(t.hops) != before
}

// replaceIn removes what a new route replaces. The message does not say what that is. With one hop in the
// slot it is clear; several may be one route or not.
func (t *tables) replaceIn(slot hop) {
	var replaced []hop
	for h := range t.hops {
		if h.slot() == slot {
			replaced = append(replaced, h)
		}
	}
	switch len(replaced) {
	case 0:
	case 1:
		delete(t.hops, replaced[0])
	default:
		t.staleRoutes = true
	}
}

func (t *tables) snapshot() Snapshot {
	var s Snapshot
	for _, d := range t.devices {
		s.Devices = append(s.Devices, d)
	}
	for _, a := range t.addresses {
		if _, ok := t.devices[a.Device]; ok {
			s.Addresses = append(s.Addresses, a)
		}
	}
	for h := range t.hops {
		if t.devices[h.Device].Up {
			s.Routes = append(s.Routes, h.Route)
		}
	}
	slices.SortFunc(s.Devices, func(a, b Device) int { return cmp.Compare(a.Index, b.Index) })
	slices.SortFunc(s.Addresses, func(a, b Address) int {
		return cmp.Or(cmp.Compare(a.Device, b.Device), a.Prefix.Compare(b.Prefix))
	})
	slices.SortFunc(s.Routes, func(a, b Route) int {
		return cmp.Or(cmp.Compare(a.Table, b.Table), a.Destination.Compare(b.Destination),
			cmp.Compare(a.Metric, b.Metric), cmp.Compare(a.Device, b.Device), a.Gateway.Compare(b.Gateway))
	})
	s.Routes = slices.Compact(s.Routes) // hops that differ only in what is not published
	return s
}
