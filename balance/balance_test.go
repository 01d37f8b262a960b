// SPDX-License-Identifier: Apache-2.0

package balance

import (
	"net/netip"
	"slices"
	"testing"

	"github.com/lbagent/lbagent/lb"
)

func TestTable(t *testing.T) {
	var (
		a        = lb.Backend{Addr: netip.MustParseAddrPort("10.0.0.1:80"), Cluster: true, Serving: true}
		b        = lb.Backend{Addr: netip.MustParseAddrPort("10.0.0.2:80"), Cluster: true, Serving: true}
		draining = lb.Backend{Addr: netip.MustParseAddrPort("10.0.0.3:80"), Serving: true}
	)
	for _, tt := range []struct {
		name     string
		backends []lb.Backend
		want     []int
	}{
		{"no backends", nil, nil},
		{"each once, in order", []lb.Backend{a, b}, []int{0, 1}},
		{"the order is the caller's", []lb.Backend{b, a}, []int{0, 1}},
		{"a draining backend takes no new flow", []lb.Backend{a, draining, b}, []int{0, 2}},
		{"only draining ones: reject", []lb.Backend{draining}, nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if got := Table(tt.backends); !slices.Equal(got, tt.want) {
				t.Errorf("Table() = %v, want %v", got, tt.want)
			}
		})
	}
}
