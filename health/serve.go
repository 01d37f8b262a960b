// SPDX-License-Identifier: Apache-2.0

// Package health answers, over HTTP, those who ask whether this node is to get traffic: load balancers at the
// healthCheckNodePorts of Services ([Checks]), and everybody else at the proxy's own /healthz and /livez ([Proxy]).
package health

import (
	"context"
	"errors"
	"net"
	"net/http"
	"sync"
	"time"
)

const (
	firstRetry = 200 * time.Millisecond
	lastRetry  = 30 * time.Second
)

// Listen serves at a TCP address until ctx ends. An address that cannot be had, as it is another's or not yet this
// host's, is tried again, later each time. tell is called with what became of each try, nil when it listens, and
// not after ctx has ended; handlers have returned when Listen returns.
func Listen(ctx context.Context, address string, h http.Handler, tell func(error)) {
	delay := firstRetry
	for {
		l, err := new(net.ListenConfig).Listen(ctx, "tcp", address)
		if err == nil {
			tell(nil)
			delay = firstRetry
			err = Serve(ctx, l, h)
		}
		if ctx.Err() != nil {
			return
		}
		tell(err)
		select {
		case <-time.After(delay):
		case <-ctx.Done():
			return
		}
		delay = min(2*delay, lastRetry)
	}
}

// Serve serves at a listener until ctx ends, closes it, and returns nil then. Handlers have returned when it
// returns, though not all of them need to have been waited for by their clients: those have a second.
func Serve(ctx context.Context, l net.Listener, h http.Handler) error {
	var connections sync.WaitGroup // Shutdown waits for them, but only for a while, and Close does not
	server := &http.Server{
		Handler: h, MaxHeaderBytes: 16 << 10,
		ReadTimeout: 5 * time.Second, WriteTimeout: 30 * time.Second, IdleTimeout: time.Minute,
		ConnState: func(_ net.Conn, state http.ConnState) {
			switch state {
			case http.StateNew:
				connections.Add(1)
			case http.StateClosed:
				connections.Done()
			}
		},
	}
	stopped := make(chan struct{})
	cancel := context.AfterFunc(ctx, func() {
		defer close(stopped)
		grace, done := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
		defer done()
		if server.Shutdown(grace) != nil {
			server.Close()
		}
	})
	err := server.Serve(l)
	if !cancel() {
		<-stopped
	}
	server.Close()
	connections.Wait()
	if errors.Is(err, http.ErrServerClosed) {
		return nil
	}
	return err
}
