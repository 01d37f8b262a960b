// SPDX-License-Identifier: Apache-2.0

package main

//go:generate go tool bpf2go -cc clang-19 -strip llvm-strip-19 -target bpfel -cflags "-mcpu=v3 -O2 -Wall -Wextra -Werror -nostdlibinc -I../../bpf/include" -no-global-types -type walk -type flow_compact -type flow_small -type vip reference ../../bpf/reference.c
