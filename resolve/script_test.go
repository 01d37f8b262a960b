// SPDX-License-Identifier: Apache-2.0

package resolve

import (
	"cmp"
	"flag"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/yaml"
)

var update = flag.Bool("update", false, "rewrite what the scripts in testdata expect")

// TestScripts runs the scripts in testdata: manifests in, services and problems out. Their commands:
//
//	apply FILE...            put the Services and EndpointSlices of manifests in place
//	delete KIND NS/NAME...   take Services or EndpointSlices away
//	dump                     print all services, then all problems
//
// apply and delete print what changed: + a service new or different, - one that went.
func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir:           "testdata",
		UpdateScripts: *update,
		Setup: func(env *testscript.Env) error {
			env.Values[clusterKey{}] = &cluster{
				table:    NewTable(),
				state:    follower{},
				services: map[Name]*corev1.Service{},
				slices:   map[Name]*discoveryv1.EndpointSlice{},
			}
			return nil
		},
		Cmds: map[string]func(ts *testscript.TestScript, neg bool, args []string){
			"apply":  func(ts *testscript.TestScript, _ bool, args []string) { clusterOf(ts).apply(ts, args) },
			"delete": func(ts *testscript.TestScript, _ bool, args []string) { clusterOf(ts).delete(ts, args) },
			"dump":   func(ts *testscript.TestScript, _ bool, _ []string) { clusterOf(ts).dump(ts) },
		},
	})
}

// cluster is the objects of a script, and the Table that follows them.
type cluster struct {
	table    *Table
	state    follower
	services map[Name]*corev1.Service
	slices   map[Name]*discoveryv1.EndpointSlice
}

type clusterKey struct{}

func clusterOf(ts *testscript.TestScript) *cluster { return ts.Value(clusterKey{}).(*cluster) }

func (c *cluster) apply(ts *testscript.TestScript, files []string) {
	for _, file := range files {
		for doc := range strings.SplitSeq(ts.ReadFile(file), "\n---\n") {
			var kind metav1.TypeMeta
			ts.Check(yaml.Unmarshal([]byte(doc), &kind))
			switch kind.Kind {
			case "Service":
				var svc corev1.Service
				ts.Check(yaml.UnmarshalStrict([]byte(doc), &svc))
				name := Name{cmp.Or(svc.Namespace, "default"), svc.Name}
				c.services[name] = &svc
				c.changed(ts, name)
			case "EndpointSlice":
				var s discoveryv1.EndpointSlice
				ts.Check(yaml.UnmarshalStrict([]byte(doc), &s))
				s.Namespace = cmp.Or(s.Namespace, "default")
				c.slices[Name{s.Namespace, s.Name}] = &s
				c.changed(ts, serviceOf(&s))
			default:
				ts.Fatalf("%s: unknown kind %q", file, kind.Kind)
			}
		}
	}
}

func (c *cluster) delete(ts *testscript.TestScript, args []string) {
	for _, arg := range args[1:] {
		namespace, name, _ := strings.Cut(arg, "/")
		n := Name{namespace, name}
		switch args[0] {
		case "Service":
			delete(c.services, n)
			c.changed(ts, n)
		case "EndpointSlice":
			s := c.slices[n]
			if s == nil {
				ts.Fatalf("no EndpointSlice %s", n)
			}
			delete(c.slices, n)
			c.changed(ts, serviceOf(s))
		default:
			ts.Fatalf("unknown kind %q", args[0])
		}
	}
}

// changed tells the Table of a Service again, and prints what that changed.
func (c *cluster) changed(ts *testscript.TestScript, name Name) {
	var its []*discoveryv1.EndpointSlice
	for _, s := range c.slices {
		if serviceOf(s) == name {
			its = append(its, s)
		}
	}
	change := c.table.Update(name, c.services[name], its)
	c.state.apply(change)
	if text := change.text(); text != "" {
		fmt.Fprintln(ts.Stdout(), strings.Join(slices.Collect(strings.SplitSeq(text, ", ")), "\n"))
	}
}

func (c *cluster) dump(ts *testscript.TestScript) {
	fmt.Fprint(ts.Stdout(), c.state.text(), problemText(c.table.Problems()))
}

func serviceOf(s *discoveryv1.EndpointSlice) Name {
	return Name{s.Namespace, s.Labels[discoveryv1.LabelServiceName]}
}
