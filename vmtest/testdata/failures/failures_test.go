// SPDX-License-Identifier: Apache-2.0

// Package failures has tests that fail, each in its way, for the tests of vmtest.
package failures

import (
	"os"
	"strings"
	"testing"
	"time"
)

// say writes to the console, where there is one of our own: it is what must be seen in the end.
func say(t *testing.T, text string) {
	if inGuest() {
		if err := os.WriteFile("/dev/kmsg", []byte("deliberate: "+text+"\n"), 0); err != nil {
			t.Fatal(err)
		}
	}
}

func inGuest() bool {
	cmdline, _ := os.ReadFile("/proc/cmdline")
	return strings.Contains(string(cmdline), "virtme")
}

func TestPass(t *testing.T) {}

func TestFail(t *testing.T) {
	say(t, "fail")
	t.Error("it fails on purpose")
}

func TestHang(t *testing.T) {
	say(t, "hang")
	time.Sleep(time.Hour)
}

func TestSkip(t *testing.T) { t.Skip("no wish to") }

func TestPanic(t *testing.T) {
	if !inGuest() {
		t.Fatal("this would take the host down")
	}
	say(t, "panic")
	os.WriteFile("/proc/sysrq-trigger", []byte("c"), 0)
	time.Sleep(time.Hour)
}

func TestMemory(t *testing.T) {
	if !inGuest() {
		t.Fatal("this would take the host down")
	}
	say(t, "memory")
	var all [][]byte
	for {
		b := make([]byte, 16<<20)
		for i := 0; i < len(b); i += 4096 {
			b[i] = 1
		}
		all = append(all, b)
		_ = all
	}
}
