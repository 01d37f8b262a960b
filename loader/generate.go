// SPDX-License-Identifier: Apache-2.0

package loader

//go:generate go tool bpf2go -cc clang-19 -strip llvm-strip-19 -target bpfel -cflags "-mcpu=v3 -O2 -Wall -Wextra -Werror -nostdlibinc -I../bpf/include" -no-global-types -type flow_timeouts tc ../bpf/tc.c
//go:generate go tool bpf2go -cc clang-19 -strip llvm-strip-19 -target bpfel -cflags "-mcpu=v3 -O2 -Wall -Wextra -Werror -nostdlibinc -I../bpf/include" -no-global-types probe ../bpf/probe.c
//go:generate go tool bpf2go -cc clang-19 -strip llvm-strip-19 -target bpfel -cflags "-mcpu=v3 -O2 -Wall -Wextra -Werror -nostdlibinc -I../bpf/include" -no-global-types -type sweep_step sweep ../bpf/sweep.c
