// SPDX-License-Identifier: Apache-2.0

package reconcile

import (
	"errors"

	"github.com/lbagent/lbagent/maps"
)

// Devices makes the maps say which devices are ports of a bridge, by index, and which VLANs have a device of
// their own, by that device's index. It writes what is different. What fails is in the error; all else is done,
// and another call tries it again.
//
// It comes before the programs are attached: they take a port that they do not find for a device of no bridge.
func Devices(m *maps.Maps, ports map[uint32]maps.Device, vlans map[maps.VLANKey]uint32) error {
	return errors.Join(
		sync(ports, m.EachDevice, m.SetDevice, m.DeleteDevice),
		sync(vlans, m.EachVLAN, m.SetVLAN, m.DeleteVLAN))
}

// sync makes a small map what is desired.
func sync[K, V comparable](desired map[K]V, each func(func(K, V) bool) error, set func(K, V) error, remove func(K) error) error {
	actual := map[K]V{}
	if err := each(func(k K, v V) bool {
		actual[k] = v
		return true
	}); err != nil {
		return err
	}
	var errs []error
	for k, v := range desired {
		if have, ok := actual[k]; !ok || have != v {
			errs = append(errs, set(k, v))
		}
	}
	for k := range actual {
		if _, ok := desired[k]; !ok {
			errs = append(errs, remove(k))
		}
	}
	return errors.Join(errs...)
}
