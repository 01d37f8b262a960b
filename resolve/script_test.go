// SPDX-License-Identifier: Apache-2.0

package resolve

import (
	"cmp"
	"flag"
	"fmt"
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
//	options FILE             begin anew with these Options
//	host FILE                say what is known of the node
//	apply FILE...            put the Services, EndpointSlices and Pods of manifests in place
//	delete KIND NS/NAME...   take Services, EndpointSlices or Pods away
//	dump                     print all services, then all health checks, then all problems
//	view NS/NAME             print the services of one Service or Pod with all that is known of them
//
// host, apply and delete print what changed: + a service new or different, - one that went.
func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir:           "testdata",
		UpdateScripts: *update,
		Setup: func(env *testscript.Env) error {
			env.Values[clusterKey{}] = &cluster{
				table:    NewTable(Options{}),
				state:    follower{},
				services: map[Name]*corev1.Service{},
				slices:   map[Name]*discoveryv1.EndpointSlice{},
			}
			return nil
		},
		Cmds: map[string]func(ts *testscript.TestScript, neg bool, args []string){
			"options": func(ts *testscript.TestScript, _ bool, args []string) {
				var o Options
				ts.Check(yaml.UnmarshalStrict([]byte(ts.ReadFile(args[0])), &o))
				clusterOf(ts).table = NewTable(o)
			},
			"host": func(ts *testscript.TestScript, _ bool, args []string) {
				var h Host
				ts.Check(yaml.UnmarshalStrict([]byte(ts.ReadFile(args[0])), &h))
				clusterOf(ts).took(ts, clusterOf(ts).table.SetHost(h))
			},
			"view": func(ts *testscript.TestScript, _ bool, args []string) {
				fmt.Fprint(ts.Stdout(), viewsText(clusterOf(ts).table.View(nameOf(args[0]))))
			},
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
			case "Pod":
				var pod corev1.Pod
				ts.Check(yaml.UnmarshalStrict([]byte(doc), &pod))
				c.took(ts, c.table.UpdatePod(Name{cmp.Or(pod.Namespace, "default"), pod.Name}, &pod))
			default:
				ts.Fatalf("%s: unknown kind %q", file, kind.Kind)
			}
		}
	}
}

func (c *cluster) delete(ts *testscript.TestScript, args []string) {
	for _, arg := range args[1:] {
		n := nameOf(arg)
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
		case "Pod":
			c.took(ts, c.table.UpdatePod(n, nil))
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
	c.took(ts, c.table.Update(name, c.services[name], its))
}

// took applies a change, and prints it.
func (c *cluster) took(ts *testscript.TestScript, change Change) {
	c.state.apply(change)
	text := ""
	for line := range strings.SplitSeq(change.text(), ", ") {
		if line != "" {
			text += line + "\n"
		}
	}
	fmt.Fprint(ts.Stdout(), text) // also where it is empty: else stdout stays what it was
}

func (c *cluster) dump(ts *testscript.TestScript) {
	fmt.Fprint(ts.Stdout(), c.state.text())
	for _, h := range c.table.HealthChecks() {
		fmt.Fprintf(ts.Stdout(), "health check %s/%s at port %d: %d local endpoints\n", h.Namespace, h.Name, h.Port, h.LocalEndpoints)
	}
	fmt.Fprint(ts.Stdout(), problemText(c.table.Problems()))
}

func nameOf(arg string) Name {
	namespace, name, _ := strings.Cut(arg, "/")
	return Name{namespace, name}
}

func serviceOf(s *discoveryv1.EndpointSlice) Name {
	return Name{s.Namespace, s.Labels[discoveryv1.LabelServiceName]}
}
