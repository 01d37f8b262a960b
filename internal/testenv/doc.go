// SPDX-License-Identifier: Apache-2.0

// Package testenv is a network for tests in one process: network namespaces, a node with routed pods and
// clients outside, real servers and clients in them, and packets byte by byte. It depends on no test
// framework, so that examples run in it too.
package testenv
