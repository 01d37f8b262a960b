// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/lbagent/lbagent/api"
	"github.com/lbagent/lbagent/internal/testenv"
)

// agent is `lbagent` on the lab's node: the process that `lbagent run` is, and the other verbs.
type agent struct {
	node    *testenv.Namespace
	program string
	args    []string // those of every verb: where its things are
	log     string   // file for what `lbagent run` says

	process *testenv.Process
	ended   chan struct{} // closed to say that the process may end
}

// start runs the agent; if that ends before stop or kill is called, fail is told why.
func (a *agent) start(manifests string, fail func(error)) error {
	log, err := os.OpenFile(a.log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	cmd := a.command("run", "--manifests", manifests)
	cmd.Stdout, cmd.Stderr = log, log
	p, err := a.node.Start(cmd)
	if err != nil {
		return err
	}
	ended := make(chan struct{})
	a.process, a.ended = p, ended
	go func() {
		<-p.Done()
		select {
		case <-ended:
		default:
			fail(fmt.Errorf("the agent ended (%v); the end of its log:\n%s", p.Wait(), a.logTail()))
		}
	}()
	return nil
}

func (a *agent) command(verb ...string) *exec.Cmd {
	return command(a.program, append(verb, a.args...)...)
}

// command makes a command line. Its process has a group of its own: a Ctrl-C is for this process alone, which
// ends the others in their order.
func command(name string, args ...string) *exec.Cmd {
	cmd := exec.Command(name, args...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	return cmd
}

// output runs a command in a namespace to its end and returns what it prints. When ctx ends, it is killed.
func output(ctx context.Context, n *testenv.Namespace, cmd *exec.Cmd) (string, error) {
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	p, err := n.Start(cmd)
	if err != nil {
		return "", err
	}
	select {
	case <-p.Done():
	case <-ctx.Done():
		return "", errors.Join(ctx.Err(), p.Close())
	}
	if err := p.Wait(); err != nil {
		return "", fmt.Errorf("%s: %w: %s", filepath.Base(cmd.Path), err, bytes.TrimSpace(stderr.Bytes()))
	}
	return stdout.String(), nil
}

// kill is kill -9.
func (a *agent) kill() error {
	if a.process == nil {
		return nil
	}
	close(a.ended)
	err := a.process.Close()
	a.process = nil
	return err
}

// stop ends the agent as an init system does.
func (a *agent) stop() error {
	if a.process == nil {
		return nil
	}
	close(a.ended)
	err := a.process.Stop(5 * time.Second)
	a.process = nil
	if exit, ok := errors.AsType[*exec.ExitError](err); ok && exit.Sys().(syscall.WaitStatus).Signal() == syscall.SIGTERM {
		return nil // it had just been started, and did not yet handle the signal
	}
	if err != nil {
		return fmt.Errorf("stop the agent: %w", err)
	}
	return nil
}

func (a *agent) logTail() string {
	text, _ := os.ReadFile(a.log) // it can be no more than missing
	lines := strings.Split(strings.TrimSpace(string(text)), "\n")
	return strings.Join(lines[max(0, len(lines)-15):], "\n")
}

// run runs another verb to its end and returns what it prints.
func (a *agent) run(ctx context.Context, verb ...string) (string, error) {
	text, err := output(ctx, a.node, a.command(verb...))
	if err != nil {
		err = fmt.Errorf("run `lbagent %s`: %w", strings.Join(verb, " "), err)
	}
	return text, err
}

func (a *agent) status(ctx context.Context) (api.Status, error) {
	var s api.Status
	text, err := a.run(ctx, "status", "-o", "json")
	if err == nil {
		err = json.Unmarshal([]byte(text), &s)
	}
	return s, err
}

// settled returns what the running agent has still to do; "" if nothing.
func (a *agent) settled(ctx context.Context) (missing string, err error) {
	s, err := a.status(ctx)
	switch {
	case err != nil:
		return "", err
	case !s.Running || s.PID != a.process.PID():
		return "the agent does not answer", nil
	case s.Source == nil || !s.Source.Synced:
		return "the agent has not read the manifests", nil
	case s.Apply == nil || s.Apply.Pending > 0:
		return "the agent has not written all to the maps", nil
	case len(s.Programs) == 0:
		return "no program is attached", nil
	}
	return "", nil
}

// usable tells for how many of the services (ports of a Service, in one family) an endpoint's address is
// that of an active backend, and how many services of its family there are.
func (a *agent) usable(ctx context.Context, endpoint netip.Addr) (active, services int, err error) {
	text, err := a.run(ctx, "service", "list", "-o", "json")
	if err != nil {
		return 0, 0, err
	}
	var list []struct {
		Family   string
		Backends []struct {
			Address netip.Addr
			State   string
		}
	}
	if err := json.Unmarshal([]byte(text), &list); err != nil {
		return 0, 0, fmt.Errorf("read the list of services: %w", err)
	}
	family := "IPv4"
	if endpoint.Is6() {
		family = "IPv6"
	}
	for _, s := range list {
		if s.Family != family {
			continue
		}
		services++
		for _, b := range s.Backends {
			if b.Address == endpoint && b.State == "active" {
				active++
			}
		}
	}
	return active, services, nil
}
