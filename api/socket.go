// SPDX-License-Identifier: Apache-2.0

package api

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"github.com/lbagent/lbagent/health"
)

var (
	// ErrNoAgent says that nobody answers at a socket.
	ErrNoAgent = errors.New("no agent is running")
	// ErrInUse says that somebody answers at a socket that was to be made.
	ErrInUse = errors.New("another agent answers")
)

// Listen makes the socket, which only this user can open, and its folder where there is none. One that a
// killed agent has left is replaced. Closing the listener removes the socket.
//
// Returns ErrInUse if somebody answers there.
func Listen(path string) (net.Listener, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, fmt.Errorf("make the folder of the admin socket: %w", err)
	}
	if _, err := RemoveStale(path); err != nil {
		return nil, err
	}
	config := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		var err error
		// Before bind, which gives the file the mode of the socket: it is never there with another.
		if e := c.Control(func(fd uintptr) { err = syscall.Fchmod(int(fd), 0o600) }); e != nil {
			return e
		}
		return err
	}}
	l, err := config.Listen(context.Background(), "unix", path)
	if err != nil {
		return nil, fmt.Errorf("listen at the admin socket: %w", err)
	}
	return l, nil
}

// RemoveStale removes a socket that nobody answers at, and tells whether there was one.
//
// Returns ErrInUse if somebody answers, and an error if there is something that is no socket.
func RemoveStale(path string) (removed bool, err error) {
	info, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("look at the admin socket: %w", err)
	}
	if info.Mode().Type() != fs.ModeSocket {
		return false, fmt.Errorf("the admin socket %s: a file that is no socket is there", path)
	}
	c, err := net.DialTimeout("unix", path, time.Second)
	if err == nil {
		c.Close()
		return false, fmt.Errorf("%w at %s", ErrInUse, path)
	}
	if !errors.Is(err, syscall.ECONNREFUSED) {
		return false, fmt.Errorf("try the admin socket: %w", err)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return false, fmt.Errorf("remove the stale admin socket: %w", err)
	}
	return true, nil
}

// Agent is what the socket asks. Its methods are called by several goroutines at once.
type Agent interface {
	Status() (Status, error)
	// Services returns what is known of a Service, and of a Pod of that name; none is no error.
	Services(ctx context.Context, namespace, name string) ([]Service, error)
}

// Serve answers at `l` until ctx ends, and returns nil then. The agent is asked at each request, and not any more
// when Serve has returned.
func Serve(ctx context.Context, l net.Listener, agent Agent) error {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /v1/status", func(w http.ResponseWriter, _ *http.Request) {
		s, err := agent.Status()
		answer(w, s, err)
	})
	mux.HandleFunc("GET /v1/services/{namespace}/{name}", func(w http.ResponseWriter, r *http.Request) {
		s, err := agent.Services(r.Context(), r.PathValue("namespace"), r.PathValue("name"))
		answer(w, s, err)
	})
	if err := health.Serve(ctx, l, mux); err != nil {
		return fmt.Errorf("serve the admin socket: %w", err)
	}
	return nil
}

func answer(w http.ResponseWriter, value any, err error) {
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	// An error here is the reader's going away.
	_ = json.NewEncoder(w).Encode(value)
}

// Client asks the agent at a socket.
type Client struct {
	http http.Client
	path string
}

// NewClient returns a client of the agent at `path`, which it asks only when it is used.
func NewClient(path string) *Client {
	return &Client{path: path, http: http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", path)
		},
	}}}
}

// Status asks for the agent's status. Returns ErrNoAgent if nobody answers.
func (c *Client) Status(ctx context.Context) (Status, error) {
	var s Status
	err := c.get(ctx, "/v1/status", &s)
	return s, err
}

// Services asks what the agent knows of a Service, and of a Pod of that name. Returns ErrNoAgent if nobody answers.
func (c *Client) Services(ctx context.Context, namespace, name string) ([]Service, error) {
	var s []Service
	err := c.get(ctx, "/v1/services/"+url.PathEscape(namespace)+"/"+url.PathEscape(name), &s)
	return s, err
}

func (c *Client) get(ctx context.Context, path string, into any) error {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://lbagent"+path, nil)
	if err != nil {
		return err
	}
	response, err := c.http.Do(request)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ECONNREFUSED) {
		return fmt.Errorf("%w at %s", ErrNoAgent, c.path)
	}
	if err != nil {
		return fmt.Errorf("ask the agent at %s: %w", c.path, err)
	}
	defer response.Body.Close()
	if response.StatusCode != http.StatusOK {
		return fmt.Errorf("ask the agent at %s: it answers %s", c.path, response.Status)
	}
	if err := json.NewDecoder(response.Body).Decode(into); err != nil {
		return fmt.Errorf("read the answer of the agent at %s: %w", c.path, err)
	}
	return nil
}
