// SPDX-License-Identifier: Apache-2.0

package health

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/lbagent/lbagent/lb"
)

// The addresses of all these tests; each takes ports that the kernel has just given and got back.
var (
	loopback4 = netip.MustParseAddr("127.0.0.1")
	loopback6 = netip.MustParseAddr("::1")
)

// rig is Checks that run.
type rig struct {
	*Checks
	t       *testing.T
	healthy atomic.Bool
	end     func() // and wait until all is closed
}

func newRig(t *testing.T) *rig {
	r := &rig{t: t}
	r.healthy.Store(true)
	r.Checks = NewChecks(r.healthy.Load)
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- r.Run(ctx) }()
	done := false
	r.end = func() {
		if cancel(); !done {
			done = true
			if err := <-ended; err != nil {
				t.Error("Run:", err)
			}
		}
	}
	t.Cleanup(r.end)
	return r
}

// free returns a port that nobody has at either address, most likely.
func free(t *testing.T) uint16 {
	t.Helper()
	for range 100 {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		port := l.Addr().(*net.TCPAddr).AddrPort().Port()
		other, err := net.Listen("tcp", netip.AddrPortFrom(loopback6, port).String())
		l.Close()
		if err == nil {
			other.Close()
			return port
		}
	}
	t.Fatal("no port is free at both loopback addresses")
	return 0
}

func check(name string, port uint16, local int) lb.HealthCheck {
	return lb.HealthCheck{Namespace: "default", Name: name, Port: port, LocalEndpoints: local}
}

// client makes a connection for each request.
var client = &http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: 10 * time.Second}

// eventually waits until ask returns "".
func eventually(t *testing.T, ask func() string) {
	t.Helper()
	deadline := time.Now().Add(10 * time.Second)
	for {
		complaint := ask()
		if complaint == "" {
			return
		}
		if time.Now().After(deadline) {
			t.Fatal("still not so: ", complaint)
		}
		time.Sleep(time.Millisecond)
	}
}

func (r *rig) open(at netip.AddrPort) {
	r.t.Helper()
	eventually(r.t, func() string {
		response, err := client.Get("http://" + at.String())
		if err != nil {
			return err.Error()
		}
		response.Body.Close()
		return ""
	})
}

// closed waits until a port can be had: a connection that is refused says less.
func closed(t *testing.T, at netip.AddrPort) {
	t.Helper()
	eventually(t, func() string {
		l, err := net.Listen("tcp", at.String())
		if err != nil {
			return err.Error()
		}
		l.Close()
		return ""
	})
}

// TestAnswers: code, body and headers, at any path and by any method, on each address.
func TestAnswers(t *testing.T) {
	r := newRig(t)
	port := free(t)
	for _, c := range []struct {
		local   int
		healthy bool
		code    int
		body    string
	}{
		{0, true, 503, `{"service":{"namespace":"default","name":"web"},"localEndpoints":0,"serviceProxyHealthy":true}`},
		{1, true, 200, `{"service":{"namespace":"default","name":"web"},"localEndpoints":1,"serviceProxyHealthy":true}`},
		{12, true, 200, `{"service":{"namespace":"default","name":"web"},"localEndpoints":12,"serviceProxyHealthy":true}`},
		{12, false, 503, `{"service":{"namespace":"default","name":"web"},"localEndpoints":12,"serviceProxyHealthy":false}`},
		{0, false, 503, `{"service":{"namespace":"default","name":"web"},"localEndpoints":0,"serviceProxyHealthy":false}`},
	} {
		r.Set([]lb.HealthCheck{check("web", port, c.local)}, []netip.Addr{loopback4, loopback6})
		r.healthy.Store(c.healthy)
		for _, addr := range []netip.Addr{loopback4, loopback6} {
			at := netip.AddrPortFrom(addr, port)
			r.open(at)
			for _, request := range []struct{ method, path string }{{"GET", "/"}, {"GET", "/healthz"}, {"GET", "/a/b?c"}, {"POST", "/"}} {
				what := fmt.Sprint(request, " of ", at, " with ", c.local, " and ", c.healthy)
				q, err := http.NewRequest(request.method, "http://"+at.String()+request.path, nil)
				if err != nil {
					t.Fatal(err)
				}
				response, err := client.Do(q)
				if err != nil {
					t.Fatal(what, ": ", err)
				}
				body, err := io.ReadAll(response.Body)
				response.Body.Close()
				if err != nil || response.StatusCode != c.code {
					t.Errorf("%s: %d, want %d (%v)", what, response.StatusCode, c.code, err)
				}
				sameJSON(t, what, string(body), c.body)
				for header, want := range map[string]string{
					"Content-Type": "application/json", "X-Content-Type-Options": "nosniff",
					"X-Load-Balancing-Endpoint-Weight": fmt.Sprint(c.local),
				} {
					if got := response.Header.Get(header); got != want {
						t.Errorf("%s: %s %q, want %q", what, header, got, want)
					}
				}
			}
		}
	}
}

// TestPorts: ports open and close as they are declared, and none is opened anew for what is answered there.
func TestPorts(t *testing.T) {
	r := newRig(t)
	web, shop := free(t), free(t)
	at := func(addr netip.Addr, port uint16) netip.AddrPort { return netip.AddrPortFrom(addr, port) }
	both := []netip.Addr{loopback4, loopback6}

	r.Set([]lb.HealthCheck{check("web", web, 1)}, both)
	r.open(at(loopback4, web))
	r.open(at(loopback6, web))

	// A connection that is kept tells whether the port was closed in between.
	kept := &http.Client{Transport: &http.Transport{}, Timeout: 10 * time.Second}
	defer kept.CloseIdleConnections()
	dials := 0
	kept.Transport.(*http.Transport).DialContext = func(ctx context.Context, network, addr string) (net.Conn, error) {
		dials++
		return new(net.Dialer).DialContext(ctx, network, addr)
	}
	weight := func() string {
		t.Helper()
		response, err := kept.Get("http://" + at(loopback4, web).String())
		if err != nil {
			t.Fatal(err)
		}
		defer response.Body.Close()
		_, _ = io.Copy(io.Discard, response.Body)
		return response.Header.Get("X-Load-Balancing-Endpoint-Weight")
	}
	for local := range 5 {
		// The other port makes sure that Run has seen it.
		r.Set([]lb.HealthCheck{check("web", web, local), check("shop", shop, 1)}, both)
		r.open(at(loopback6, shop))
		if got := weight(); got != fmt.Sprint(local) {
			t.Errorf("weight %s, want %d", got, local)
		}
		r.Set([]lb.HealthCheck{check("web", web, local)}, both)
		closed(t, at(loopback6, shop))
		closed(t, at(loopback4, shop))
	}
	if dials != 1 {
		t.Errorf("%d connections, want 1: the port was closed in between", dials)
	}

	// An address goes, another port comes.
	r.Set([]lb.HealthCheck{check("web", web, 4)}, both[:1])
	closed(t, at(loopback6, web))
	r.open(at(loopback4, web))
	r.Set([]lb.HealthCheck{check("web", shop, 1)}, both[:1])
	closed(t, at(loopback4, web))
	r.open(at(loopback4, shop))
	if got := r.Listening(); len(got) != 1 || got[0].At != at(loopback4, shop) || got[0].Err != nil {
		t.Errorf("listening: %v", got)
	}

	r.Set(nil, both)
	closed(t, at(loopback4, shop))

	r.Set([]lb.HealthCheck{check("web", web, 1)}, both)
	r.open(at(loopback4, web))
	r.end()
	for _, addr := range both {
		if l, err := net.Listen("tcp", at(addr, web).String()); err != nil {
			t.Error("after Run:", err)
		} else {
			l.Close()
		}
	}
}

// TestTaken: a port that somebody has is a problem of its Service, and is served once it is let go of; a second
// Service with one port is a problem too.
func TestTaken(t *testing.T) {
	port := free(t)
	other, err := net.Listen("tcp", netip.AddrPortFrom(loopback4, port).String())
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	r := newRig(t)
	changed := r.Changed()
	r.Set([]lb.HealthCheck{check("shop", port, 1), check("web", port, 1)}, []netip.Addr{loopback4, loopback6})
	eventually(t, func() string {
		changed := r.Changed()
		if len(r.Problems()) == 2 {
			return ""
		}
		<-changed
		return "one problem"
	})
	select {
	case <-changed:
	default:
		t.Error("problems have changed, and nobody was told")
	}
	want := []lb.Problem{
		{Object: "Service default/shop", Field: "spec.healthCheckNodePort", Severity: lb.Warning,
			Message: fmt.Sprintf("health checks are not answered at 127.0.0.1:%d: bind: address already in use; tried again", port)},
		{Object: "Service default/web", Field: "spec.healthCheckNodePort", Severity: lb.Warning,
			Message: fmt.Sprintf("port %d is Service default/shop's, for its health checks", port)},
	}
	if got := r.Problems(); fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("problems %v, want %v", got, want)
	}
	r.open(netip.AddrPortFrom(loopback6, port)) // where nobody has it

	// The port goes over to the other Service, with what is wrong with it.
	r.Set([]lb.HealthCheck{check("shop", port, 1)}, []netip.Addr{loopback4, loopback6})
	changed = r.Changed()
	r.Set([]lb.HealthCheck{check("web", port, 1)}, []netip.Addr{loopback4, loopback6})
	select {
	case <-changed:
	default:
		t.Error("the problem is another Service's, and nobody was told")
	}
	if got := r.Problems(); len(got) != 1 || got[0].Object != "Service default/web" {
		t.Errorf("problems %v", got)
	}
	r.Set([]lb.HealthCheck{check("shop", port, 1), check("web", port, 1)}, []netip.Addr{loopback4, loopback6})

	other.Close()
	r.open(netip.AddrPortFrom(loopback4, port))
	eventually(t, func() string {
		if got := r.Problems(); len(got) != 1 || !strings.Contains(got[0].Message, "is Service default/shop's") {
			return fmt.Sprint(got)
		}
		return ""
	})
	r.Set([]lb.HealthCheck{check("web", port, 3)}, []netip.Addr{loopback4, loopback6})
	if got := r.Problems(); len(got) != 0 {
		t.Errorf("problems when the other is gone: %v", got)
	}
	response, err := client.Get("http://" + netip.AddrPortFrom(loopback4, port).String())
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	body, _ := io.ReadAll(response.Body)
	if !strings.Contains(string(body), `"name":"web"`) {
		t.Errorf("the port's new Service is not answered for: %s", body)
	}
}

// TestListen: an address that cannot be had is tried again, later each time, and told each time.
func TestListen(t *testing.T) {
	port := free(t)
	other, err := net.Listen("tcp", netip.AddrPortFrom(loopback4, port).String())
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	told := make(chan error)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		Listen(ctx, netip.AddrPortFrom(loopback4, port).String(), http.NotFoundHandler(), func(err error) { told <- err })
	}()
	start := time.Now()
	for range 3 {
		if err := <-told; err == nil {
			t.Error("listens where another does")
		}
	}
	if took := time.Since(start); took < 3*firstRetry {
		t.Errorf("three tries within %v", took)
	}
	other.Close()
	if err := <-told; err != nil {
		t.Error("where nobody listens any more:", err)
	}
	// A client that holds a request open does not hold up the end.
	c, err := net.Dial("tcp", netip.AddrPortFrom(loopback4, port).String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	fmt.Fprint(c, "GET / HTTP/1.1\r\n")
	cancel()
	select {
	case <-ended:
	case <-time.After(5 * time.Second):
		t.Error("a slow client holds up the end")
	}
}
