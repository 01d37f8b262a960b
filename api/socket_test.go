// SPDX-License-Identifier: Apache-2.0

package api

import (
	"context"
	"errors"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"

	"github.com/lbagent/lbagent/lb"
	"github.com/lbagent/lbagent/loader"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// serve answers with `status` at a socket until the test ends, and returns its path.
func serve(t *testing.T, status func() (Status, error)) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "run", "lbagent.sock")
	l, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	done := make(chan error)
	go func() { done <- Serve(ctx, l, status) }()
	t.Cleanup(func() {
		stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
		if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("the socket is still there: %v", err)
		}
	})
	return path
}

func TestStatus(t *testing.T) {
	want := Status{
		Running: true, Version: "v1", PID: 7, Started: time.Unix(1000, 0).UTC(), NodeName: "n",
		Source:    &Source{Path: "/m", Synced: true, Held: true, HeldFiles: []string{"a.yaml"}, LastChange: time.Unix(2000, 0).UTC()},
		Apply:     &Apply{Pending: 1, Failures: 2, LastError: "no space", LastApply: time.Unix(3000, 0).UTC()},
		Programs:  []loader.Attached{{Device: "eth0", Index: 2, Program: "node_in", Method: "tcx"}},
		Uncovered: []Uncovered{{Device: "cni0", Index: 3, Reason: "a bridge"}},
		Maps:      []Map{{"flows", 1, 2}},
		Reasons:   map[string]uint64{"forward": 5},
		Problems:  ProblemsOf([]lb.Problem{{File: "b", Message: "m", Severity: lb.NotYet}, {File: "a", Document: 1, Message: "m"}}),
		Features:  &loader.Features{TCX: true},
	}
	client := NewClient(serve(t, func() (Status, error) { return want, nil }))
	got, err := client.Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	if p := got.Problems; p[0].String() != "a: document 1: m" || p[1].Severity != "not yet" {
		t.Errorf("problems: %v", p)
	}
}

func TestStatusFails(t *testing.T) {
	client := NewClient(serve(t, func() (Status, error) { return Status{}, errors.New("no maps") }))
	if _, err := client.Status(t.Context()); err == nil || !strings.Contains(err.Error(), "500") {
		t.Errorf("got %v", err)
	}
}

// TestServeEndsLast: when Serve returns nobody asks for a status any more, which may read what is closed then.
func TestServeEndsLast(t *testing.T) {
	path := filepath.Join(t.TempDir(), "lbagent.sock")
	l, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	var ended atomic.Bool
	served := make(chan error)
	go func() {
		served <- Serve(ctx, l, func() (Status, error) {
			stop()
			<-time.After(1500 * time.Millisecond) // as over a large flow table, and longer than Serve is polite
			ended.Store(true)
			return Status{}, nil
		})
	}()
	_, _ = NewClient(path).Status(t.Context())
	if err := <-served; err != nil {
		t.Error(err)
	}
	if !ended.Load() {
		t.Error("a status is still being made")
	}
}

func TestNobodyAnswers(t *testing.T) {
	if _, err := NewClient(filepath.Join(t.TempDir(), "none")).Status(t.Context()); !errors.Is(err, ErrNoAgent) {
		t.Errorf("no socket: %v", err)
	}
	if _, err := NewClient(stale(t)).Status(t.Context()); !errors.Is(err, ErrNoAgent) {
		t.Errorf("a stale socket: %v", err)
	}
}

// stale returns a socket as a killed process leaves it.
func stale(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "stale.sock")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	l.(*net.UnixListener).SetUnlinkOnClose(false)
	l.Close()
	return path
}

func TestListen(t *testing.T) {
	path := serve(t, func() (Status, error) { return Status{}, nil })
	for name, want := range map[string]fs.FileMode{path: fs.ModeSocket | 0o600, filepath.Dir(path): fs.ModeDir | 0o700} {
		if info, err := os.Stat(name); err != nil || info.Mode() != want {
			t.Errorf("%s: %v, %v, want %v", name, info.Mode(), err, want)
		}
	}
	if _, err := Listen(path); !errors.Is(err, ErrInUse) {
		t.Errorf("while somebody answers: %v, want ErrInUse", err)
	}
	if _, err := NewClient(path).Status(t.Context()); err != nil {
		t.Errorf("after that: %v", err)
	}
}

func TestListenAtWhatIsThere(t *testing.T) {
	l, err := Listen(stale(t))
	if err != nil {
		t.Errorf("at a stale socket: %v", err)
	} else {
		l.Close()
	}
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Listen(file); err == nil {
		t.Error("at a file: no error")
	}
	if text, err := os.ReadFile(file); err != nil || string(text) != "precious" {
		t.Errorf("the file is gone: %v", err)
	}
}
