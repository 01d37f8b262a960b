// SPDX-License-Identifier: Apache-2.0

package manifest

import (
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	"k8s.io/apimachinery/pkg/api/equality"
	"sigs.k8s.io/yaml"

	"github.com/lbagent/lbagent/lb"
)

// FuzzParse: whatever a file holds, it is decoded without panic; each object of an accepted file is valid, has
// its defaults, and is the same again when it is written out and read.
func FuzzParse(f *testing.F) {
	seeds, err := filepath.Glob("testdata/*")
	if err != nil {
		f.Fatal(err)
	}
	for _, seed := range seeds {
		if info, err := os.Stat(seed); err != nil || info.IsDir() {
			continue
		}
		text, err := os.ReadFile(seed)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(text, filepath.Ext(seed) == ".json")
	}
	f.Fuzz(func(t *testing.T, text []byte, json bool) {
		path := "f.yaml"
		if json {
			path = "f.json"
		}
		objects, problems := parse(path, text)
		for _, p := range problems {
			if p.File != path || p.Message == "" {
				t.Errorf("incomplete problem %q", p)
			}
		}
		if slices.ContainsFunc(problems, isError) {
			return
		}
		var again []byte
		for _, o := range objects {
			if errs := validate(o.object); len(errs) > 0 {
				t.Errorf("%s is accepted and not valid: %v", o.name, errs)
			}
			defaulted := o.object.DeepCopyObject().(object)
			setDefaults(defaulted)
			if !equality.Semantic.DeepEqual(o.object, defaulted) {
				t.Errorf("%s has not all its defaults:\n%s", o.name, cmp.Diff(o.object, defaulted))
			}
			doc, err := yaml.Marshal(o.object)
			if err != nil {
				t.Fatalf("%s: %v", o.name, err)
			}
			again = append(append(again, "---\n"...), doc...)
		}
		if len(objects) == 0 {
			return
		}
		second, problems := parse("g.yaml", again)
		for _, p := range problems {
			if p.Severity == lb.Error {
				t.Errorf("written out it is refused: %v\n%s", p, again)
			}
		}
		if len(second) != len(objects) {
			t.Fatalf("%d objects, %d after they were written out", len(objects), len(second))
		}
		for i, o := range objects {
			if s := second[i]; s.name != o.name || s.document != i+1 || !equality.Semantic.DeepEqual(o.object, s.object) {
				t.Errorf("%s differs after it was written out:\n%s", o.name, cmp.Diff(o.object, s.object))
			}
		}
	})
}

// TestSeeds: which seeds of the fuzz target are accepted. Those that are not begin with "bad".
func TestSeeds(t *testing.T) {
	seeds, err := filepath.Glob("testdata/*.*")
	must(t, err)
	if len(seeds) == 0 {
		t.Fatal("there are none")
	}
	for _, seed := range seeds {
		text, err := os.ReadFile(seed)
		must(t, err)
		_, problems := parse(seed, text)
		bad, err := filepath.Match("bad*", filepath.Base(seed))
		must(t, err)
		if slices.ContainsFunc(problems, isError) != bad {
			t.Errorf("%s: %v", seed, lines(problems))
		}
	}
}
