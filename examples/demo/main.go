// SPDX-License-Identifier: Apache-2.0

// Command demo shows on one machine what lbagent does: `make demo`. It builds the agent and a lab of network
// namespaces, lets a client make requests all the time, and edits the manifests of this repository's
// examples, kills the agent and breaks a manifest meanwhile. It leaves nothing behind.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"syscall"
	"time"
)

func main() {
	// SIGPIPE is among them for `make demo | head`: it must not end this process before its mount is gone.
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGPIPE)
	ctx = whileParentLives(ctx)
	err := check()
	if err == nil {
		err = run(ctx, config{Step: 3 * time.Second, Rate: 30, Temp: os.TempDir(), Live: isTerminal(os.Stdout)}, os.Stdout)
	}
	stop()
	os.Exit(exitCode(err))
}

// exitCode says on stderr what went wrong and returns the code for it.
func exitCode(err error) int {
	switch err {
	case nil:
		return 0
	case errInterrupted: // and nothing else with it
		return 130
	}
	fmt.Fprintln(os.Stderr, "demo:", err)
	return 1
}

// check says what this machine lacks.
func check() error {
	if os.Geteuid() != 0 {
		return errors.New("network namespaces and BPF programs want root: sudo make demo")
	}
	if _, err := os.Stat("/proc/net/if_inet6"); err != nil {
		return errors.New("this machine has no IPv6, and the demo shows both families: boot it without ipv6.disable=1")
	}
	for _, tool := range []string{"nft", "bpftool"} {
		if _, err := exec.LookPath(tool); err != nil {
			return fmt.Errorf("there is no %s: `make demo` installs it", tool)
		}
	}
	return nil
}

// whileParentLives ends a context when the parent does: `go run` ends at a SIGTERM and tells its child nothing.
func whileParentLives(ctx context.Context) context.Context {
	ctx, cancel := context.WithCancel(ctx)
	parent := os.Getppid()
	go func() {
		defer cancel()
		every(ctx, 200*time.Millisecond, func() bool { return os.Getppid() == parent })
	}()
	return ctx
}

// every calls f once in each period until it returns false or ctx ends.
func every(ctx context.Context, period time.Duration, f func() bool) {
	t := time.NewTicker(period)
	defer t.Stop()
	for f() {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		}
	}
}

// config says how a run is made.
type config struct {
	Step time.Duration // least time of a step, in which the client goes on
	Rate int           // new connections in a second, each of HTTP and UDP in each family
	Temp string        // folder for the one temporary folder
	Live bool          // the output is a terminal: show what goes on in a line that changes
}

// errInterrupted says that the user has ended the run.
var errInterrupted = errors.New("interrupted")

// run is the whole demo. It returns nil if all went as it should and no request failed. When ctx ends, it
// cleans up and returns errInterrupted.
func run(ctx context.Context, c config, out io.Writer) error {
	d := &demo{config: c, screen: newScreen(out, c.Live)}
	d.ledger = newLedger(d.screen)
	err := d.play(ctx)
	if err != nil {
		// A Ctrl-C is for the processes that were started too, and it may have been seen by its effect on them.
		select {
		case <-ctx.Done():
		case <-time.After(300 * time.Millisecond):
		}
	}
	if ctx.Err() != nil {
		d.screen.say("interrupted")
		if err := d.cleanUp(); err != nil {
			return err
		}
		return errInterrupted
	}
	err = errors.Join(err, d.cleanUp())
	if failed := d.ledger.failed(); failed > 0 {
		err = errors.Join(err, fmt.Errorf("%d requests failed", failed))
	}
	d.screen.print(d.ledger.report(err == nil))
	return err
}

// play is the story, up to the last request.
func (d *demo) play(ctx context.Context) error {
	ctx, d.fail = context.WithCancelCause(ctx)
	defer d.fail(nil)
	for _, act := range []func(context.Context) error{
		d.build,
		d.openLab,
		d.startAgent,

		d.spread,
		d.takeIn,
		d.takeOut,
		d.killAgent,
		d.restartAgent,
		d.breakManifest,
		d.mendManifest,

		d.stopClient,
		d.checkStack,
	} {
		if err := act(ctx); err != nil {
			if cause := context.Cause(ctx); cause != nil {
				return cause // such as the agent's end
			}
			return err
		}
	}
	return nil
}
