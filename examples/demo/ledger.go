// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"fmt"
	"strings"
	"sync"
	"text/tabwriter"
)

// method is how a request is made.
type method string

const (
	httpNew method = "HTTP"     // HTTP over a connection of its own
	tcpKept method = "kept TCP" // a line and its echo, over a connection that stays
	udpNew  method = "UDP"      // one datagram and its answer, from a socket of its own
	udpKept method = "kept UDP" // the same, from a socket that stays and so has one port
)

// way is a method in a family, 4 or 6.
type way struct {
	method method
	family int
}

func (w way) String() string { return fmt.Sprintf("%s v%d", w.method, w.family) }

func ways() []way {
	var all []way
	for _, m := range []method{httpNew, tcpKept, udpNew, udpKept} {
		all = append(all, way{m, 4}, way{m, 6})
	}
	return all
}

// ledger counts the requests: by the step in which they began, the way they were made and who answered.
type ledger struct {
	screen *screen

	mu       sync.Mutex
	steps    []*step
	out      string // the server that no request should reach any more; "" for none
	complain int    // failures that are still shown one by one
}

// step is one of the things that the demo does.
type step struct {
	title, seen string
	counts      map[way]*count
}

type count struct {
	requests, failed int
	servers          map[string]int // answers by server
}

func newLedger(s *screen) *ledger {
	return &ledger{screen: s, complain: 10}
}

// begin starts a step: requests that begin from now on are its own.
func (l *ledger) begin(title string) {
	l.mu.Lock()
	l.steps = append(l.steps, &step{title: title, counts: map[way]*count{}})
	number := len(l.steps)
	l.mu.Unlock()
	l.screen.say("%d. %s", number, title)
}

// saw says what came of the step, and notes it for the table.
func (l *ledger) saw(format string, args ...any) {
	text := fmt.Sprintf(format, args...)
	l.mu.Lock()
	l.steps[len(l.steps)-1].seen = text
	l.mu.Unlock()
	l.screen.say("   %s", text)
}

// forbid says that requests which begin from now on should not reach a server, kept TCP aside.
func (l *ledger) forbid(server string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.out = server
}

// request is one that is under way.
type request struct {
	ledger *ledger
	way    way
	count  *count
	out    string // ledger.out, when it began
}

func (l *ledger) request(w way) *request {
	l.mu.Lock()
	defer l.mu.Unlock()
	s := l.steps[len(l.steps)-1]
	if s.counts[w] == nil {
		s.counts[w] = &count{servers: map[string]int{}}
	}
	s.counts[w].requests++
	return &request{l, w, s.counts[w], l.out}
}

// end notes who answered, or why nobody did.
func (r *request) end(server string, err error) {
	if err == nil && server == r.out && r.way.method != tcpKept {
		err = fmt.Errorf("%s answered, which was out before the request began", server)
	}
	r.ledger.mu.Lock()
	if err == nil {
		r.count.servers[server]++
		r.ledger.mu.Unlock()
		return
	}
	r.count.failed++
	r.ledger.complain--
	complain := r.ledger.complain >= 0
	r.ledger.mu.Unlock()
	if complain {
		r.ledger.screen.say("   FAILED: %s: %v", r.way, err)
	}
}

// drop forgets a request that nobody waits for any more.
func (r *request) drop() {
	r.ledger.mu.Lock()
	defer r.ledger.mu.Unlock()
	r.count.requests--
}

// answers returns how many requests of this step a server has answered.
func (l *ledger) answers(w way, server string) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	c := l.steps[len(l.steps)-1].counts[w]
	if c == nil {
		return 0
	}
	return c.servers[server]
}

// share returns how much of this step's requests over new connections a server has answered.
func (l *ledger) share(server string) float64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	var its, all int
	for w, c := range l.steps[len(l.steps)-1].counts {
		if w.method != httpNew && w.method != udpNew {
			continue
		}
		for s, answers := range c.servers {
			all += answers
			if s == server {
				its += answers
			}
		}
	}
	return float64(its) / float64(max(1, all))
}

// all returns how many requests there were, and how many of them failed.
func (l *ledger) all() (requests, failed int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, s := range l.steps {
		r, f := s.all()
		requests, failed = requests+r, failed+f
	}
	return requests, failed
}

func (l *ledger) failed() int {
	_, failed := l.all()
	return failed
}

func (s *step) all() (requests, failed int) {
	for _, c := range s.counts {
		requests, failed = requests+c.requests, failed+c.failed
	}
	return requests, failed
}

// byServer is a table of this step's answers.
func (l *ledger) byServer(servers []string) string {
	var rows [][]string
	rows = append(rows, append([]string{"ANSWERS BY"}, servers...))
	for _, w := range ways() {
		row := []string{w.String()}
		for _, s := range servers {
			row = append(row, fmt.Sprint(l.answers(w, s)))
		}
		rows = append(rows, row)
	}
	return table(rows)
}

// report is the end of the demo: what was done and seen, and what became of the requests meanwhile. If not all
// was as it should be, its last line does not read as if.
func (l *ledger) report(good bool) string {
	l.mu.Lock()
	defer l.mu.Unlock()
	done := [][]string{{"", "DONE", "REQUESTS", "FAILED", "SEEN"}}
	made := [][]string{{"REQUESTS"}}
	for _, w := range ways() {
		made[0] = append(made[0], w.String())
	}
	total := &step{counts: map[way]*count{}}
	for i, s := range l.steps {
		number := fmt.Sprintf("%d.", i+1)
		requests, failed := s.all()
		done = append(done, []string{number, s.title, fmt.Sprint(requests), fmt.Sprint(failed), s.seen})
		if requests > 0 {
			made = append(made, append([]string{number}, s.cells()...))
		}
		total.add(s)
	}
	requests, failed := total.all()
	made = append(made, append([]string{"all"}, total.cells()...))
	verdict := fmt.Sprintf("%d requests, %d failed", requests, failed)
	if !good {
		verdict = fmt.Sprintf("NOT AS IT SHOULD BE: of %d requests failed %d", requests, failed)
	}
	return fmt.Sprintf("\n%s\n%s\n%s\n", table(done), table(made), verdict)
}

// add adds the requests of another step.
func (s *step) add(other *step) {
	for w, c := range other.counts {
		if s.counts[w] == nil {
			s.counts[w] = &count{}
		}
		s.counts[w].requests += c.requests
		s.counts[w].failed += c.failed
	}
}

// cells are a step's requests, a cell for each way; those that failed are named in it.
func (s *step) cells() []string {
	var cells []string
	for _, w := range ways() {
		c := s.counts[w]
		switch {
		case c == nil:
			cells = append(cells, "0")
		case c.failed > 0:
			cells = append(cells, fmt.Sprintf("%d (%d failed)", c.requests, c.failed))
		default:
			cells = append(cells, fmt.Sprint(c.requests))
		}
	}
	return cells
}

func table(rows [][]string) string {
	var b bytes.Buffer
	w := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
	for _, row := range rows {
		fmt.Fprintln(w, strings.Join(row, "\t"))
	}
	w.Flush() // writes to memory
	return b.String()
}
