// SPDX-License-Identifier: Apache-2.0

package health

import (
	"encoding/json"
	"net/http"
	"sync"
	"time"

	"github.com/lbagent/lbagent/lb"
)

// patience is how long a change may wait before the proxy counts as unhealthy, as with kube-proxy.
const patience = time.Minute

// Proxy knows whether this proxy does its work: whether what it is told comes into force. It is safe for
// concurrent use.
type Proxy struct {
	eligible func() bool

	mu      sync.Mutex
	updated time.Time // when all was in force last; zero: never yet
	waiting time.Time // since when a change waits; zero: none does
}

// NewProxy returns a Proxy that has done nothing yet and so is not healthy. eligible tells whether the node, as its
// object says, is to get traffic from outside at all.
func NewProxy(eligible func() bool) *Proxy { return &Proxy{eligible: eligible} }

// Queued says that there is a change which is not in force.
func (p *Proxy) Queued() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.waiting.IsZero() {
		p.waiting = time.Now()
	}
}

// Updated says that everything is in force.
func (p *Proxy) Updated() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.updated, p.waiting = time.Now(), time.Time{}
}

// Healthy tells whether everything has been in force once, and no change has waited for a minute since. What
// becomes of the node makes no difference.
func (p *Proxy) Healthy() bool {
	healthy, _ := p.state(time.Now())
	return healthy
}

func (p *Proxy) state(now time.Time) (healthy bool, updated time.Time) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return !p.updated.IsZero() && (p.waiting.IsZero() || now.Sub(p.waiting) <= patience), p.updated
}

// report is the body of /healthz and /livez, with kube-proxy's keys.
type report struct {
	LastUpdated  time.Time               `json:"lastUpdated"`
	CurrentTime  time.Time               `json:"currentTime"`
	NodeEligible *bool                   `json:"nodeEligible,omitempty"` // /healthz only
	Healthy      bool                    `json:"healthy"`
	Status       map[string]familyReport `json:"status"`
}

type familyReport struct {
	LastUpdated time.Time `json:"lastUpdated"`
	Healthy     bool      `json:"healthy"`
}

// Healthz answers /healthz, which is for those who send traffic from outside: 503 also while the node is going.
func (p *Proxy) Healthz() http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		eligible := p.eligible()
		p.answer(w, &eligible)
	})
}

// Livez answers /livez, which is for those who would restart the agent.
func (p *Proxy) Livez() http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { p.answer(w, nil) })
}

func (p *Proxy) answer(w http.ResponseWriter, eligible *bool) {
	now := time.Now()
	healthy, updated := p.state(now)
	// One write is of both families, so they have one state.
	r := report{LastUpdated: updated, CurrentTime: now, NodeEligible: eligible, Healthy: healthy, Status: map[string]familyReport{}}
	for _, f := range []lb.Family{lb.IPv4, lb.IPv6} {
		r.Status[f.String()] = familyReport{LastUpdated: updated, Healthy: healthy}
	}
	code := http.StatusServiceUnavailable
	if healthy && (eligible == nil || *eligible) {
		code = http.StatusOK
		r.LastUpdated = now // as with kube-proxy, whose clients take it for a sign of life
	}
	writeJSON(w, code, r)
}

func writeJSON(w http.ResponseWriter, code int, body any) {
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("X-Content-Type-Options", "nosniff")
	w.WriteHeader(code)
	_ = json.NewEncoder(w).Encode(body) // an error here is the client's going away
}
