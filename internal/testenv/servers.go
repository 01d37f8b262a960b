// SPDX-License-Identifier: Apache-2.0

package testenv

import (
	"bufio"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"strconv"
	"sync"
	"time"
)

// Answer is what a server says of itself and of whom it answers.
type Answer struct {
	Server  string         // its name
	Client  netip.AddrPort // who asks, as the server's socket sees it; never v4-mapped
	Payload string         // what was asked; of UDP only
}

// Server is a running server in a namespace.
type Server struct {
	Name string
	Addr net.Addr

	close func() error
	done  chan struct{} // closed when the last of its goroutines has ended
}

// Close ends the server and all its connections.
func (s *Server) Close() error {
	err := s.close()
	<-s.done
	if err != nil && !errors.Is(err, net.ErrClosed) {
		return fmt.Errorf("close server %s: %w", s.Name, err)
	}
	return nil
}

// ServeHTTP starts an HTTP server; ":80" serves both families.
//
//	GET  /                          an Answer, as JSON
//	GET  /bulk?bytes=N&seed=S       N bytes of the stream of that seed
//	POST /bulk                      the SHA-256 of the body, in hexadecimal
func ServeHTTP(ctx context.Context, n *Namespace, name, address string) (*Server, error) {
	l, err := n.Listen(ctx, "tcp", address)
	if err != nil {
		return nil, fmt.Errorf("serve HTTP in %s: %w", n.Name, err)
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /{$}", func(w http.ResponseWriter, r *http.Request) {
		client, _ := netip.ParseAddrPort(r.RemoteAddr)
		json.NewEncoder(w).Encode(Answer{Server: name, Client: unmapped(client)})
	})
	mux.HandleFunc("GET /bulk", func(w http.ResponseWriter, r *http.Request) {
		size, err1 := strconv.ParseInt(r.FormValue("bytes"), 10, 64)
		seed, err2 := strconv.ParseUint(r.FormValue("seed"), 10, 64)
		if err := errors.Join(err1, err2); err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		w.Header().Set("Content-Length", strconv.FormatInt(size, 10))
		io.Copy(w, stream(seed, size))
	})
	mux.HandleFunc("POST /bulk", func(w http.ResponseWriter, r *http.Request) {
		hash := sha256.New()
		if _, err := io.Copy(hash, r.Body); err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		fmt.Fprint(w, hex.EncodeToString(hash.Sum(nil)))
	})
	h := &http.Server{Handler: mux, ErrorLog: log.New(io.Discard, "", 0)}
	s := &Server{Name: name, Addr: l.Addr(), close: h.Close, done: make(chan struct{})}
	go func() {
		defer close(s.done)
		h.Serve(l)
	}()
	return s, nil
}

// ServeEcho starts a TCP server that writes "NAME CLIENT\n" and then whatever it reads.
func ServeEcho(ctx context.Context, n *Namespace, name, address string) (*Server, error) {
	l, err := n.Listen(ctx, "tcp", address)
	if err != nil {
		return nil, fmt.Errorf("serve TCP in %s: %w", n.Name, err)
	}
	e := &echo{name: name, listener: l, open: map[net.Conn]bool{}}
	s := &Server{Name: name, Addr: l.Addr(), close: e.close, done: make(chan struct{})}
	go func() {
		defer close(s.done)
		e.serve()
	}()
	return s, nil
}

type echo struct {
	name     string
	listener net.Listener
	answers  sync.WaitGroup

	mu     sync.Mutex
	closed bool
	open   map[net.Conn]bool
}

func (e *echo) serve() {
	defer e.answers.Wait()
	for {
		c, err := e.listener.Accept()
		if err != nil {
			return
		}
		e.mu.Lock()
		if e.closed {
			e.mu.Unlock()
			c.Close()
			return
		}
		e.open[c] = true
		e.mu.Unlock()
		e.answers.Go(func() {
			if _, err := fmt.Fprintf(c, "%s %v\n", e.name, remote(c)); err == nil {
				io.Copy(c, c)
			}
			e.mu.Lock()
			delete(e.open, c)
			e.mu.Unlock()
			c.Close()
		})
	}
}

func (e *echo) close() error {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.closed = true
	for c := range e.open {
		c.Close()
	}
	return e.listener.Close()
}

// ServeUDP starts a server that answers each datagram with an Answer, as JSON.
func ServeUDP(ctx context.Context, n *Namespace, name, address string) (*Server, error) {
	c, err := n.ListenPacket(ctx, "udp", address)
	if err != nil {
		return nil, fmt.Errorf("serve UDP in %s: %w", n.Name, err)
	}
	s := &Server{Name: name, Addr: c.LocalAddr(), close: c.Close, done: make(chan struct{})}
	go func() {
		defer close(s.done)
		buffer := make([]byte, 65536)
		for {
			size, from, err := c.(*net.UDPConn).ReadFromUDPAddrPort(buffer)
			if err != nil {
				return // closed: a socket without a peer is told of no ICMP error
			}
			answer, err := json.Marshal(Answer{Server: name, Client: unmapped(from), Payload: string(buffer[:size])})
			if err == nil {
				c.(*net.UDPConn).WriteToUDPAddrPort(answer, from)
			}
		}
	}()
	return s, nil
}

func remote(c net.Conn) netip.AddrPort {
	return unmapped(c.RemoteAddr().(*net.TCPAddr).AddrPort())
}

func unmapped(a netip.AddrPort) netip.AddrPort {
	return netip.AddrPortFrom(a.Addr().Unmap(), a.Port())
}

// HTTPClient is a client in a namespace, for ServeHTTP's servers. It keeps its connections, so all requests
// to one address go to one backend until they are closed.
type HTTPClient struct {
	http.Client
}

// NewHTTPClient returns a client; where source has an address or a port, its connections have that, so with
// a port it can have one connection at a time.
func NewHTTPClient(n *Namespace, source netip.AddrPort) *HTTPClient {
	return &HTTPClient{http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, network, address string) (net.Conn, error) {
			return n.DialFrom(ctx, network, source, address)
		},
		DisableCompression: true,
	}}}
}

// Close closes the connections that are idle.
func (c *HTTPClient) Close() { c.CloseIdleConnections() }

// Who asks a server who it is.
func (c *HTTPClient) Who(ctx context.Context, at netip.AddrPort) (Answer, error) {
	var a Answer
	err := c.do(ctx, http.MethodGet, "http://"+at.String()+"/", nil, func(body io.Reader) error {
		return json.NewDecoder(body).Decode(&a)
	})
	return a, err
}

// Transfer sends `size` bytes and receives as many others; the error says if they are not the right ones.
func (c *HTTPClient) Transfer(ctx context.Context, at netip.AddrPort, size int64) error {
	const up, down = 1, 2 // seeds
	url := "http://" + at.String() + "/bulk"
	hash := sha256.New()
	var got []byte
	err := c.do(ctx, http.MethodPost, url, io.TeeReader(stream(up, size), hash), func(body io.Reader) (err error) {
		got, err = io.ReadAll(body)
		return err
	})
	if err == nil && string(got) != hex.EncodeToString(hash.Sum(nil)) {
		err = errors.New("the bytes that came are not those that were sent")
	}
	if err != nil {
		return fmt.Errorf("send %d bytes to %v: %w", size, at, err)
	}
	var received int64
	hash.Reset()
	err = c.do(ctx, http.MethodGet, fmt.Sprintf("%s?bytes=%d&seed=%d", url, size, down), nil, func(body io.Reader) (err error) {
		received, err = io.Copy(hash, body)
		return err
	})
	if err == nil {
		want := sha256.New()
		io.Copy(want, stream(down, size))
		if received != size || string(want.Sum(nil)) != string(hash.Sum(nil)) {
			err = fmt.Errorf("%d bytes came, or wrong ones", received)
		}
	}
	if err != nil {
		return fmt.Errorf("receive %d bytes from %v: %w", size, at, err)
	}
	return nil
}

func (c *HTTPClient) do(ctx context.Context, method, url string, body io.Reader, read func(io.Reader) error) error {
	request, err := http.NewRequestWithContext(ctx, method, url, body)
	if err != nil {
		return err
	}
	response, err := c.Do(request)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	if response.StatusCode != http.StatusOK {
		return fmt.Errorf("%s %s: %s", method, url, response.Status)
	}
	if err := read(response.Body); err != nil {
		return err
	}
	_, err = io.Copy(io.Discard, response.Body) // else the connection is not used again
	return err
}

// stream returns `size` bytes that depend on the seed alone.
func stream(seed uint64, size int64) io.Reader {
	var key [32]byte
	binary.LittleEndian.PutUint64(key[:], seed)
	return io.LimitReader(rand.NewChaCha8(key), size)
}

// EchoConn is a connection to one of ServeEcho's servers.
type EchoConn struct {
	net.Conn
	Answer // of the server, when the connection was made

	reader *bufio.Reader
}

// DialEcho connects to a server; source is as for Namespace.DialFrom.
func DialEcho(ctx context.Context, n *Namespace, source, at netip.AddrPort) (*EchoConn, error) {
	c, err := n.DialFrom(ctx, "tcp", source, at.String())
	if err != nil {
		return nil, err
	}
	return GreetEcho(ctx, c)
}

// GreetEcho reads the greeting of a server that was connected to. When it fails, the connection is closed.
func GreetEcho(ctx context.Context, c net.Conn) (*EchoConn, error) {
	e := &EchoConn{Conn: c, reader: bufio.NewReader(c)}
	stop := closeOn(ctx, c)
	line, err := e.reader.ReadString('\n')
	if err == nil && !stop() {
		err = ctx.Err()
	}
	if err == nil {
		var client string
		if _, err = fmt.Sscanf(line, "%s %s\n", &e.Server, &client); err == nil {
			e.Client, err = netip.ParseAddrPort(client)
		}
	}
	if err != nil {
		c.Close()
		return nil, fmt.Errorf("read the greeting of %v: %w", c.RemoteAddr(), err)
	}
	return e, nil
}

// Say sends a text and waits for it to come back. When ctx ends before, the connection is closed.
func (e *EchoConn) Say(ctx context.Context, text string) error {
	defer closeOn(ctx, e.Conn)()
	got := make([]byte, len(text))
	_, err := io.WriteString(e.Conn, text)
	if err == nil {
		_, err = io.ReadFull(e.reader, got)
	}
	if err != nil {
		return cmp.Or(ctx.Err(), err) // what closed the connection, if that was us
	}
	if string(got) != text {
		return fmt.Errorf("%q came back as %q", text, got)
	}
	return nil
}

// Reset ends the connection with an RST.
func (e *EchoConn) Reset() error {
	return errors.Join(e.Conn.(*net.TCPConn).SetLinger(0), e.Conn.Close())
}

// closeOn closes c when ctx ends, until the returned function is called.
func closeOn(ctx context.Context, c io.Closer) (stop func() bool) {
	return context.AfterFunc(ctx, func() { c.Close() })
}

// UDPClient is one socket, for ServeUDP's servers.
type UDPClient struct {
	conn      *net.UDPConn
	connected bool
}

// NewUDPClient returns a socket that is not connected, bound to a source address and port.
func NewUDPClient(ctx context.Context, n *Namespace, source netip.AddrPort) (*UDPClient, error) {
	c, err := n.ListenPacket(ctx, "udp", source.String())
	if err != nil {
		return nil, err
	}
	return &UDPClient{conn: c.(*net.UDPConn)}, nil
}

// DialUDP returns a socket that is connected; source is as for Namespace.DialFrom.
func DialUDP(ctx context.Context, n *Namespace, source, to netip.AddrPort) (*UDPClient, error) {
	c, err := n.DialFrom(ctx, "udp", source, to.String())
	if err != nil {
		return nil, err
	}
	return &UDPClient{conn: c.(*net.UDPConn), connected: true}, nil
}

// Close closes the socket.
func (c *UDPClient) Close() error { return c.conn.Close() }

// LocalAddr is the socket's address and port.
func (c *UDPClient) LocalAddr() netip.AddrPort {
	return unmapped(c.conn.LocalAddr().(*net.UDPAddr).AddrPort())
}

// Ask sends one datagram and waits for the answer to it until ctx ends. It is never sent again. An answer
// that does not come from `to`, which of a connected socket is its peer, is an error.
func (c *UDPClient) Ask(ctx context.Context, to netip.AddrPort, payload string) (Answer, error) {
	if err := c.Send(to, payload); err != nil {
		return Answer{}, err
	}
	return c.Receive(ctx, to, payload)
}

// Send sends one datagram.
func (c *UDPClient) Send(to netip.AddrPort, payload string) error {
	if c.connected {
		_, err := c.conn.Write([]byte(payload))
		return err
	}
	_, err := c.conn.WriteToUDPAddrPort([]byte(payload), to)
	return err
}

// Receive waits for the answer to what was sent; answers to other payloads, which come late, are passed over.
func (c *UDPClient) Receive(ctx context.Context, to netip.AddrPort, payload string) (Answer, error) {
	if err := c.conn.SetReadDeadline(time.Time{}); err != nil {
		return Answer{}, err
	}
	expired := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		c.conn.SetReadDeadline(time.Unix(1, 0))
		close(expired)
	})
	defer func() {
		if !stop() {
			<-expired // or it would end the next call
		}
	}()
	buffer := make([]byte, 65536)
	for {
		size, from, err := c.conn.ReadFromUDPAddrPort(buffer)
		if err != nil {
			if ctx.Err() != nil {
				err = fmt.Errorf("no answer from %v: %w", to, ctx.Err())
			}
			return Answer{}, err
		}
		var a Answer
		if err := json.Unmarshal(buffer[:size], &a); err != nil {
			return Answer{}, fmt.Errorf("read the answer of %v: %w", from, err)
		}
		if a.Payload != payload {
			continue
		}
		if unmapped(from) != to {
			return a, fmt.Errorf("asked %v, answered by %v", to, from)
		}
		return a, nil
	}
}
