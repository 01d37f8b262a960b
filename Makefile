# SPDX-License-Identifier: Apache-2.0
# Needs root, Go (1.21 or newer; go.mod names the toolchain and Go fetches it) and, for what is missing
# else, a Debian-like apt. `make help` lists the targets.

GO ?= go
CLANG_FORMAT ?= clang-format-19
GOTESTFLAGS ?=

.DEFAULT_GOAL := help
.PHONY: help build demo test bench fuzz lint generate generated-current deps deps-generate clean

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

lint: deps-generate ## go vet, staticcheck, gofmt, clang-format
	$(GO) vet ./...
	$(GO) tool staticcheck ./...
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

install = { echo "installing $(1)"; apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $(1) >/dev/null; }

clean: ## what the targets above leave in this folder
	rm -rf bin
