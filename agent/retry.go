// SPDX-License-Identifier: Apache-2.0

package agent

import "time"

const (
	firstRetry = 200 * time.Millisecond
	lastRetry  = 30 * time.Second
)

// retry is when to try something again, if at all: later each time that it fails. The zero retry is never
// due. It belongs to one goroutine, which waits for due among other things.
type retry struct {
	timer *time.Timer
	delay time.Duration
}

// due returns the channel that gets a value when it is time.
func (r *retry) due() <-chan time.Time {
	if r.timer == nil {
		return nil
	}
	return r.timer.C
}

// pending tells whether it was set and not stopped since.
func (r *retry) pending() bool { return r.timer != nil }

// after makes it due once, in `delay`.
func (r *retry) after(delay time.Duration) {
	r.stop()
	r.timer, r.delay = time.NewTimer(delay), delay
}

// failed makes it due again, after twice as long as before.
func (r *retry) failed() { r.after(min(max(2*r.delay, firstRetry), lastRetry)) }

// done makes it never due, and the next failure the first.
func (r *retry) done() {
	r.stop()
	r.delay = 0
}

func (r *retry) stop() {
	if r.timer != nil {
		r.timer.Stop()
		r.timer = nil
	}
}
