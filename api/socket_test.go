// SPDX-License-Identifier: Apache-2.0

package api

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
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

// fake answers by functions.
type fake struct {
	status   func() (Status, error)
	services func(namespace, name string) ([]Service, error)
}

func (f fake) Status() (Status, error) { return f.status() }

func (f fake) Services(_ context.Context, namespace, name string) ([]Service, error) {
	return f.services(namespace, name)
}

// serve answers with `status` at a socket until the test ends, and returns its path.
func serve(t *testing.T, status func() (Status, error)) string {
	t.Helper()
	return serveAgent(t, fake{status: status})
}

func serveAgent(t *testing.T, agent Agent) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "run", "lbagent.sock")
	l, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	done := make(chan error)
	go func() { done <- Serve(ctx, l, agent) }()
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

// TestServices: a name reaches the agent as it is, and its answer comes back whole.
func TestServices(t *testing.T) {
	web := lb.ServiceName{Namespace: "default", Name: "web", Port: "http", Protocol: lb.TCP, Family: lb.IPv4}
	at := func(address string, kind lb.Kind) lb.Frontend {
		a := netip.MustParseAddrPort(address)
		return lb.Frontend{VIP: lb.VIP{Addr: a.Addr(), Port: a.Port(), Protocol: lb.TCP}, Kind: kind}
	}
	views := []lb.View{{
		Service: lb.Service{
			Name: web, Algorithm: lb.Maglev, ExternalLocal: true, Affinity: time.Minute,
			SourceRanges: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")},
			Frontends:    []lb.Frontend{at("10.96.0.1:80", lb.ClusterIP), at("192.0.2.1:30080", lb.NodePort)},
		},
		Endpoints: []lb.Endpoint{{Addr: netip.MustParseAddrPort("10.244.0.1:8080"), Node: "n1", Zone: "z1", Weight: 5, Local: "on another node"}},
		Waiting: []lb.Waiting{{Frontend: at("203.0.113.1:80", lb.External),
			Holder: lb.ServiceName{Namespace: "default", Name: "p", Port: "80", Protocol: lb.TCP, Family: lb.IPv4, Pod: true}}},
	}}
	client := NewClient(serveAgent(t, fake{services: func(namespace, name string) ([]Service, error) {
		if namespace != "default" || name != "web/../x?y" {
			return nil, fmt.Errorf("asked for %q, %q", namespace, name)
		}
		return ServicesOf(views), nil
	}}))
	got, err := client.Services(t.Context(), "default", "web/../x?y")
	if err != nil {
		t.Fatal(err)
	}
	text, err := json.Marshal(got)
	if err != nil {
		t.Fatal(err)
	}
	want := `[{"namespace":"default","name":"web","port":"http","protocol":"TCP","family":"IPv4","affinitySeconds":60,` +
		`"sourceRanges":["10.0.0.0/8"],"algorithm":"maglev",` +
		`"frontends":[{"address":"10.96.0.1","port":80,"protocol":"TCP","kind":"ClusterIP","scope":"Cluster"},` +
		`{"address":"192.0.2.1","port":30080,"protocol":"TCP","kind":"NodePort","scope":"Local"}],` +
		`"waiting":[{"address":"203.0.113.1","port":80,"protocol":"TCP","kind":"external","scope":"Local",` +
		`"holder":{"namespace":"default","name":"p","port":"80","protocol":"TCP","family":"IPv4","pod":true}}],` +
		`"endpoints":[{"address":"10.244.0.1","port":8080,"node":"n1","zone":"z1","weight":5,` +
		`"cluster":{"used":true},"local":{"used":false,"reason":"on another node"}}]}]`
	if diff := cmp.Diff(want, string(text)); diff != "" {
		t.Error(diff)
	}
	if got := got[0].Waiting[0].Holder.String(); got != "pod default/p:80/TCP IPv4" {
		t.Errorf("holder %s", got)
	}
	if _, err := client.Services(t.Context(), "default", "other"); err == nil {
		t.Error("no error where the agent has one")
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
		served <- Serve(ctx, l, fake{status: func() (Status, error) {
			stop()
			<-time.After(1500 * time.Millisecond) // as over a large flow table, and longer than Serve is polite
			ended.Store(true)
			return Status{}, nil
		}})
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
