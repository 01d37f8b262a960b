// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"errors"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/lbagent/lbagent/internal/testenv"
	"github.com/lbagent/lbagent/source/manifest"
)

// transcript is the screen of a test. A test can wait until a text has come.
type transcript struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (o *transcript) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.text.Write(p)
}

func (o *transcript) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.text.String()
}

// short returns a quick run's config, whose files are the test's own, and its output, logged at the end.
func short(t *testing.T) (config, *transcript) {
	t.Helper()
	testenv.RequireRoot(t)
	if err := check(); err != nil {
		t.Fatal(err)
	}
	out := &transcript{}
	t.Cleanup(func() { t.Log(out) })
	return config{Step: 300 * time.Millisecond, Rate: 30, Temp: t.TempDir()}, out
}

// nothingLeft fails a test whose run has left something. The run looks for itself; this looks once more from
// outside.
func nothingLeft(t *testing.T, c config) {
	t.Helper()
	files, err := os.ReadDir(c.Temp)
	if err != nil || len(files) > 0 {
		t.Errorf("files are left: %v, %v", files, err)
	}
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil || strings.Contains(string(mounts), c.Temp) {
		t.Errorf("a mount is left, or: %v", err)
	}
	children, err := childProcesses()
	if err != nil || len(children) > 0 {
		t.Errorf("processes are left: %v, %v", children, err)
	}
}

func TestManifests(t *testing.T) {
	for _, p := range manifest.Validate("..") {
		t.Error(p.Severity, p)
	}
	folder := t.TempDir() + "/manifests"
	if err := copyManifests("..", folder); err != nil {
		t.Fatal(err)
	}
	if _, err := editManifests(folder, func(text string) string { return strings.Replace(text, goodPort, badPort, 1) }); err != nil {
		t.Fatal(err)
	}
	problems := manifest.Validate(folder)
	if len(problems) != 1 || !strings.HasSuffix(problems[0].File, "/web.yaml") || problems[0].Document != 1 ||
		problems[0].Object != "Service default/web" || problems[0].Field != "spec.ports[0].port" {
		t.Errorf("the broken manifest has the problems %v", problems)
	}
}

func TestDemo(t *testing.T) {
	c, out := short(t)
	if err := run(t.Context(), c, out); err != nil {
		t.Error(err)
	}
	if !strings.HasSuffix(out.String(), " requests, 0 failed\n") {
		t.Error("it does not end with `0 failed`")
	}
	for _, want := range []string{"nothing is left", "0 packets with a VIP", "10 programs detached", "web.yaml: document 1: Service default/web: spec.ports[0].port"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("it does not say %q", want)
		}
	}
	nothingLeft(t, c)
}

// TestInterrupt: wherever the demo is, when it is interrupted it leaves nothing.
func TestInterrupt(t *testing.T) {
	for _, at := range []string{
		"build lbagent", "a lab in network", "$ lbagent run", "1. spread", "3. take", "4. kill", "5. start", "the client stops",
	} {
		t.Run(at, func(t *testing.T) {
			c, out := short(t)
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			go every(ctx, time.Millisecond, func() bool {
				if strings.Contains(out.String(), at) {
					cancel()
				}
				return true
			})
			if err := run(ctx, c, out); !errors.Is(err, errInterrupted) {
				t.Errorf("run returns %v", err)
			}
			nothingLeft(t, c)
		})
	}
}

// TestFailure: a request that fails is counted, shown and no success.
func TestFailure(t *testing.T) {
	var out transcript
	l := newLedger(newScreen(&out, false))
	l.begin("do something")
	good, bad, late := l.request(way{httpNew, 4}), l.request(way{udpNew, 6}), way{udpKept, 4}
	l.forbid("backend3")
	good.end("backend3", nil) // it began before
	bad.end("", errors.New("no answer"))
	l.request(late).end("backend3", nil)
	l.request(way{tcpKept, 4}).end("backend3", nil)
	l.request(late).drop()
	if requests, failed := l.all(); requests != 4 || failed != 2 {
		t.Errorf("%d requests, %d failed; want 4 and 2", requests, failed)
	}
	if report := l.report(false); !strings.HasSuffix(report, "of 4 requests failed 2\n") {
		t.Error(report)
	}
	for _, want := range []string{"FAILED: UDP v6: no answer", "FAILED: kept UDP v4: backend3 answered"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("%q is not shown, but this: %s", want, out.String())
		}
	}
}
