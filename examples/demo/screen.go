// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"time"
)

// screen is where the demo says what it does. On a terminal its last line may be one that changes.
type screen struct {
	begun time.Time
	live  bool

	mu    sync.Mutex
	out   io.Writer
	shown bool // the last line is the one that changes
	blank bool // the last line is empty
}

func newScreen(out io.Writer, live bool) *screen {
	return &screen{begun: time.Now(), live: live, out: out}
}

func isTerminal(f *os.File) bool {
	info, err := f.Stat()
	return err == nil && info.Mode()&os.ModeCharDevice != 0
}

// say writes a line of progress, with the time.
func (s *screen) say(format string, args ...any) {
	s.print(fmt.Sprintf("%6.1fs  %s\n", time.Since(s.begun).Seconds(), fmt.Sprintf(format, args...)))
}

// show writes the output of a command, or a table, below the line of progress it belongs to.
func (s *screen) show(text string) {
	s.mu.Lock()
	before := "\n"
	if s.blank {
		before = ""
	}
	s.mu.Unlock()
	s.print(before + indent(text, "         ") + "\n")
}

// print writes a text as it is. An error would be that of a reader who has gone, which a signal tells too.
func (s *screen) print(text string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.clear()
	_, _ = io.WriteString(s.out, text)
	s.blank = strings.HasSuffix(text, "\n\n")
}

// pulse writes the line that changes.
func (s *screen) pulse(text string) {
	if !s.live {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.clear()
	_, _ = io.WriteString(s.out, text)
	s.shown = true
}

func (s *screen) clear() {
	if s.shown {
		_, _ = io.WriteString(s.out, "\r\033[K")
	}
	s.shown = false
}

func indent(text, by string) string {
	var b strings.Builder
	for line := range strings.Lines(strings.TrimRight(text, "\n") + "\n") {
		if strings.TrimSpace(line) != "" {
			b.WriteString(by)
		}
		b.WriteString(line)
	}
	return b.String()
}

// head returns the first lines of a text, and says how many there are behind them.
func head(text string, lines int) string {
	all := strings.SplitAfter(strings.TrimRight(text, "\n")+"\n", "\n")
	all = all[:len(all)-1]
	if len(all) <= lines {
		return strings.Join(all, "")
	}
	return strings.Join(all[:lines], "") + fmt.Sprintf("... and %d lines more\n", len(all)-lines)
}
