# SPDX-License-Identifier: Apache-2.0
# Needs root, Go (1.21 or newer; go.mod names the toolchain and Go fetches it) and, for what is missing
# else, a Debian-like apt. `make help` lists the targets.

GO ?= go
CLANG_FORMAT ?= clang-format-19
GOTESTFLAGS ?=

.DEFAULT_GOAL := help
.PHONY: help build demo test bench fuzz vmtest vmtest-shell lint generate generated-current deps deps-generate deps-vmtest clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 20

build: ## bin/lbagent
	$(GO) build -o bin/ ./cmd/lbagent

demo: deps ## a lab on this machine: the agent balances real clients over real servers, and survives
	$(GO) run ./examples/demo

test: deps ## every test: unit, script, program and node rungs
	$(GO) test -timeout 20m $(GOTESTFLAGS) ./...

bench: ## ns a packet, beside programs that do only part of the work (docs/performance.md)
	$(GO) run ./internal/bench

fuzz: ## each fuzz target for FUZZTIME (30s)
	@for package in $$($(GO) list ./...); do \
		for target in $$($(GO) test -list '^Fuzz' $$package | grep '^Fuzz'); do \
			echo "$$package $$target"; \
			$(GO) test -run '^$$' -fuzz "^$$target$$" -fuzztime $(or $(FUZZTIME),30s) $$package || exit 1; \
		done; \
	done

# Not by `go run`, which passes no signal on: guests would outlive it.
vmtest: deps deps-vmtest ## what kernels decide, on each kernel of vmtest/kernels.txt [KERNEL=6.1,...] [RUN=regexp] [UPDATE=1]
	$(GO) build -o .cache/vmtest/ ./vmtest
	.cache/vmtest/vmtest -kernel '$(KERNEL)' -run '$(value RUN)' $(if $(UPDATE),-update)
	$(if $(KERNEL)$(RUN)$(UPDATE),,$(GO) test -timeout 20m -count 1 -tags vmtest -parallel 2 -run Deliberate -v ./vmtest)

vmtest-shell: deps-vmtest ## a shell in a guest of KERNEL
	$(GO) build -o .cache/vmtest/ ./vmtest
	.cache/vmtest/vmtest -kernel '$(KERNEL)' -shell

lint: deps-generate ## go vet, staticcheck, gofmt, clang-format
	$(GO) vet -tags vmtest ./... ./vmtest/testdata/failures
	$(GO) tool staticcheck -tags vmtest ./...
	@test -z "$$(gofmt -l .)" || { gofmt -d .; exit 1; }
	$(CLANG_FORMAT) --dry-run -Werror bpf/*.c bpf/*.h

generate: deps-generate ## the BPF objects and their Go types, from bpf/ (clang 19)
	$(GO) generate ./maps ./loader ./internal/bench

generated-current: generate ## fail unless the committed objects are those of bpf/
	git diff --exit-code -- maps loader internal/bench

# Tools are installed only where one is missing, so that a second run costs nothing.
deps: ## what tests and demo call: nft, ethtool, bpftool
	@for tool in nft ethtool bpftool; do command -v $$tool >/dev/null || missing="$$missing $$tool"; done; \
	test -z "$$missing" || $(call install,nftables ethtool bpftool)

deps-generate: ## what generate and lint call: clang 19
	@for tool in clang-19 llvm-strip-19 $(CLANG_FORMAT); do command -v $$tool >/dev/null || missing="$$missing $$tool"; done; \
	test -z "$$missing" || $(call install,clang-19 llvm-19 clang-format-19)

deps-vmtest: ## what vmtest calls: QEMU, what virtme-ng builds a guest with, wg
	@command -v qemu-system-x86_64 >/dev/null || missing="$$missing qemu-system-x86"; \
	command -v depmod >/dev/null || missing="$$missing kmod"; \
	command -v udevadm >/dev/null || missing="$$missing udev"; \
	command -v file >/dev/null || missing="$$missing file"; \
	command -v wg >/dev/null || missing="$$missing wireguard-tools"; \
	{ busybox --help 2>&1 | grep -q BusyBox && ldd "$$(command -v busybox)" 2>&1 | grep -q 'not a dynamic'; } || missing="$$missing busybox-static"; \
	python3 -c 'import ensurepip, venv' 2>/dev/null || missing="$$missing python3-venv"; \
	apt-cache pkgnames linux-image-6.1. | grep -q . || apt-get update -qq; \
	test -z "$$missing" || $(call install,$$missing)

install = { echo "installing $(1)"; apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $(1) >/dev/null; }

clean: ## what the targets above leave in this folder
	rm -rf bin
