// SPDX-License-Identifier: Apache-2.0

package maps

//go:generate go tool bpf2go -cc clang-19 -strip llvm-strip-19 -target bpfel -cflags "-mcpu=v3 -O2 -Wall -Wextra -Werror -nostdlibinc -I../bpf/include" -type frontend_kind -type address_flags -type service_flags -type backend_flags -type backend_state -type flow_hook -type flow_role -type flow_state -type flow_flags -type protocol -type reason -type table -type slot_range -type service_policy -type prefix -type backend_life -type tuple bpf ../bpf/maps.c
