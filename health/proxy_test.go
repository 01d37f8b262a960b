// SPDX-License-Identifier: Apache-2.0

package health

import (
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// TestProxy: when a proxy is healthy, in the words of the code and of the body, at both paths.
func TestProxy(t *testing.T) {
	type want struct{ healthy, healthz, livez bool }
	for name, c := range map[string]struct {
		going bool // what is said of the node
		story func(*Proxy)
		want  want
	}{
		"at the start":            {false, func(*Proxy) {}, want{}},
		"before the first sync":   {false, func(p *Proxy) { p.Queued() }, want{}},
		"in force":                {false, func(p *Proxy) { p.Queued(); p.Updated() }, want{true, true, true}},
		"nothing for a long time": {false, func(p *Proxy) { p.Updated(); time.Sleep(time.Hour) }, want{true, true, true}},
		"pending for a minute": {false, func(p *Proxy) { p.Updated(); p.Queued(); time.Sleep(time.Minute) },
			want{true, true, true}},
		"pending for longer": {false, func(p *Proxy) { p.Updated(); p.Queued(); time.Sleep(time.Minute + 1) }, want{}},
		"the oldest counts": {false, func(p *Proxy) {
			p.Updated()
			p.Queued()
			time.Sleep(40 * time.Second)
			p.Queued()
			time.Sleep(40 * time.Second)
		}, want{}},
		"late, and then done": {false, func(p *Proxy) { p.Updated(); p.Queued(); time.Sleep(time.Hour); p.Updated() },
			want{true, true, true}},
		"the node goes":           {true, func(p *Proxy) { p.Updated() }, want{true, false, true}},
		"the node goes, and late": {true, func(p *Proxy) { p.Queued(); time.Sleep(time.Hour) }, want{}},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				p := NewProxy(func() bool { return !c.going })
				c.story(p)
				ask := func(h http.Handler) bool {
					w := httptest.NewRecorder()
					h.ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/", nil))
					return w.Code == http.StatusOK
				}
				if got := (want{p.Healthy(), ask(p.Healthz()), ask(p.Livez())}); got != c.want {
					t.Errorf("got %+v, want %+v", got, c.want)
				}
			})
		})
	}
}

// TestProxyBody: the bodies, field by field, of a proxy that does its work and of one that does not.
func TestProxyBody(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		eligible := true
		p := NewProxy(func() bool { return eligible })
		check := func(what string, h http.Handler, code int, want string) {
			t.Helper()
			w := httptest.NewRecorder()
			h.ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/", nil))
			if w.Code != code {
				t.Errorf("%s: %d, want %d", what, w.Code, code)
			}
			for header, want := range map[string]string{"Content-Type": "application/json", "X-Content-Type-Options": "nosniff"} {
				if got := w.Header().Get(header); got != want {
					t.Errorf("%s: %s %q, want %q", what, header, got, want)
				}
			}
			sameJSON(t, what, w.Body.String(), want)
		}
		// The bubble's clock begins at midnight UTC, 2000-01-01.
		at := func(t time.Time) string { text, _ := json.Marshal(t); return string(text) }
		start := time.Now()
		const never = `"0001-01-01T00:00:00Z"`
		body := func(updated, now, status, rest string) string {
			return `{"lastUpdated":` + updated + `,"currentTime":` + now + `,` + rest +
				`"status":{"IPv4":` + status + `,"IPv6":` + status + `}}`
		}
		check("new", p.Healthz(), 503, body(never, at(start), `{"lastUpdated":`+never+`,"healthy":false}`, `"nodeEligible":true,"healthy":false,`))
		check("new", p.Livez(), 503, body(never, at(start), `{"lastUpdated":`+never+`,"healthy":false}`, `"healthy":false,`))

		p.Updated()
		time.Sleep(10 * time.Second)
		now := at(time.Now())
		check("done", p.Healthz(), 200, body(now, now, `{"lastUpdated":`+at(start)+`,"healthy":true}`, `"nodeEligible":true,"healthy":true,`))
		check("done", p.Livez(), 200, body(now, now, `{"lastUpdated":`+at(start)+`,"healthy":true}`, `"healthy":true,`))

		eligible = false
		check("going", p.Healthz(), 503, body(at(start), now, `{"lastUpdated":`+at(start)+`,"healthy":true}`, `"nodeEligible":false,"healthy":true,`))
		check("going", p.Livez(), 200, body(now, now, `{"lastUpdated":`+at(start)+`,"healthy":true}`, `"healthy":true,`))

		p.Queued()
		time.Sleep(61 * time.Second)
		now = at(time.Now())
		check("late", p.Livez(), 503, body(at(start), now, `{"lastUpdated":`+at(start)+`,"healthy":false}`, `"healthy":false,`))
	})
}

// sameJSON compares two bodies whatever their layout: all fields, and no other ones.
func sameJSON(t *testing.T, what, got, want string) {
	t.Helper()
	var g, w any
	if err := json.NewDecoder(strings.NewReader(got)).Decode(&g); err != nil {
		t.Errorf("%s: %q: %v", what, got, err)
	}
	if err := json.Unmarshal([]byte(want), &w); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(w, g); diff != "" {
		t.Errorf("%s (-want +got): %s", what, diff)
	}
}
