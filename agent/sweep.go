// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"errors"
	"time"

	"github.com/lbagent/lbagent/api"
	"github.com/lbagent/lbagent/loader"
	"github.com/lbagent/lbagent/maps"
)

const (
	// sweepInterval is from the begin of a walk of the flow tables to the next, and about what a walk takes. An
	// entry costs half a microsecond to read and, if it is a candidate, as much to count and to judge.
	sweepInterval = 30 * time.Second
	// sweepChunk is how many entries are looked at in a row: a millisecond's work.
	sweepChunk = 1024
	// sweepPause is the shortest pause behind a chunk, so that a walk of tables larger than the default ones
	// takes longer, and no more than some hundredths of a CPU.
	sweepPause = 25 * time.Millisecond
	// sweepIdle is the age from which the program is asked whether an entry's twin is another flow's: packets
	// make such an entry no younger.
	sweepIdle = time.Minute
)

// walk is what a walk of both flow tables has found.
type walk struct {
	entries api.FlowCounts      // that stay
	named   map[uint32]struct{} // backends that living halves name
}

// sweep walks the flow tables again and again until ctx ends; it returns nil then. Each walk's begin and end are
// told to the goroutine of run. A failure is logged, and the next walk tries again.
func (a *agent) sweep(ctx context.Context) error {
	ticker := time.NewTicker(a.config.SweepInterval)
	defer ticker.Stop()
	flows := int(a.maps.Sizes().Flows)
	last := api.FlowCounts{Flows: flows, Pending: flows / 4} // nothing is known: as if full
	failure := ""
	for {
		select {
		case a.sweepBegins <- struct{}{}:
		case <-ctx.Done():
			return nil
		}
		chunks := 2 + (last.Flows+last.Pending)/sweepChunk
		w, err := a.walk(ctx, max(a.config.SweepInterval/time.Duration(chunks), sweepPause))
		if ctx.Err() != nil {
			return nil
		}
		if err == nil {
			last, failure = w.entries, ""
			a.flows.Store(&w.entries) // not &last, which the next walk writes to
			select {
			case a.sweepEnds <- w:
			case <-ctx.Done():
				return nil
			}
		} else if text := err.Error(); text != failure {
			a.config.Log.Error("flow tables not swept, tried again", "error", err)
			failure = text
		}
		select {
		case <-ticker.C:
		case <-ctx.Done():
			return nil
		}
	}
}

// walk looks at every entry of `pending` and then of `flows` (copies go that way), has counted what they have carried
// since the last walk, has removed what may go, and pauses between chunks. What was alive when it began counts as
// alive: another walk comes.
func (a *agent) walk(ctx context.Context, pause time.Duration) (walk, error) {
	w := walk{named: map[uint32]struct{}{}}
	now, err := maps.Now()
	if err != nil {
		return w, err
	}
	timeouts := loader.DefaultTimeouts()
	for _, table := range []struct {
		in      maps.Table
		entries *int
	}{{maps.Pending, &w.entries.Pending}, {maps.Flows, &w.entries.Flows}} {
		var candidates []maps.Tuple
		var failed error
		seen := 0
		sweep := func() {
			removed, err := a.programs.Sweep(table.in, candidates)
			*table.entries -= removed
			candidates, failed = candidates[:0], err
		}
		err := a.maps.EachHalf(table.in, func(t maps.Tuple, f maps.Flow) bool {
			*table.entries++
			age := time.Duration(now - f.LastSeenNs) // negative: it was seen since
			_, timeout := timeouts.Phase(f.State, uint8(t.Protocol), table.in)
			if age <= timeout && f.Backend != 0 {
				w.named[f.Backend] = struct{}{}
			}
			uncounted := f.Backend != 0 && f.Packets != f.CountedPackets
			if uncounted || age > min(timeout, sweepIdle) {
				candidates = append(candidates, t)
			}
			if seen++; seen%sweepChunk != 0 {
				return true
			}
			if sweep(); failed != nil {
				return false
			}
			select {
			case <-time.After(pause):
				return true
			case <-ctx.Done():
				return false
			}
		})
		if failed == nil {
			sweep()
		}
		if err := errors.Join(err, failed, ctx.Err()); err != nil {
			return w, err
		}
	}
	return w, nil
}
