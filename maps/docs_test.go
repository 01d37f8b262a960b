// SPDX-License-Identifier: Apache-2.0

package maps

import (
	"fmt"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
	"github.com/google/go-cmp/cmp"
)

// TestMapsDocument holds docs/maps.md against the BTF of every map: its type and size, its fields in order,
// and their types.
func TestMapsDocument(t *testing.T) {
	documented := documentedMaps(t)
	spec, err := loadBpf()
	if err != nil {
		t.Fatal(err)
	}
	for name, m := range spec.Maps {
		if strings.HasPrefix(name, ".") {
			continue
		}
		doc, ok := documented[name]
		if !ok {
			t.Errorf("docs/maps.md has no section %s", name)
			continue
		}
		delete(documented, name)
		kind := map[ebpf.MapType]string{
			ebpf.Hash: "Hash", ebpf.Array: "Array", ebpf.LRUHash: "LRU hash", ebpf.PerCPUArray: "Per-CPU array",
			ebpf.LPMTrie: "LPM trie",
		}[m.Type]
		if m.Flags&1 != 0 { // BPF_F_NO_PREALLOC
			kind += ", not preallocated"
		}
		if m.Flags&(1<<10) != 0 { // BPF_F_MMAPABLE
			kind += ", mmapable"
		}
		first := fmt.Sprintf("%s, %d entr", kind, m.MaxEntries)
		if !strings.HasPrefix(doc.text, first) {
			t.Errorf("docs/maps.md: %s should begin with %q, not %q", name, first, doc.text[:min(len(doc.text), 60)])
		}
		if name == "changes" {
			continue // scratch memory
		}
		var want []string
		if s, ok := btf.UnderlyingType(m.Key).(*btf.Struct); ok {
			want = fields("key.", s)
		} else {
			want = []string{"key: " + typeName(m.Key)}
		}
		if s, ok := btf.UnderlyingType(m.Value).(*btf.Struct); ok {
			want = append(want, fields("", s)...)
		} else {
			want = append(want, "value: "+typeName(m.Value))
		}
		if diff := cmp.Diff(want, doc.fields); diff != "" {
			t.Errorf("docs/maps.md: %s (-BTF +document):\n%s", name, diff)
		}
	}
	for name := range documented {
		t.Errorf("docs/maps.md has a section %s, which is no map", name)
	}
}

type documentedMap struct {
	text   string
	fields []string // "NAME: TYPE"
}

func documentedMaps(t *testing.T) map[string]documentedMap {
	t.Helper()
	content, err := os.ReadFile("../docs/maps.md")
	if err != nil {
		t.Fatal(err)
	}
	row := regexp.MustCompile(`(?m)^\| ([a-z_.0-9]+) \| ([^|]+) \|`)
	sections := map[string]documentedMap{}
	for _, section := range strings.Split(string(content), "\n### ")[1:] {
		name, text, _ := strings.Cut(section, "\n")
		m := documentedMap{text: strings.TrimSpace(text)}
		for _, r := range row.FindAllStringSubmatch(text, -1) {
			if r[1] != "field" {
				m.fields = append(m.fields, r[1]+": "+r[2])
			}
		}
		sections[name] = m
	}
	return sections
}

func fields(prefix string, s *btf.Struct) []string {
	var all []string
	for _, m := range s.Members {
		if inner, ok := btf.UnderlyingType(m.Type).(*btf.Struct); ok {
			all = append(all, fields(prefix+m.Name+".", inner)...)
		} else {
			all = append(all, prefix+m.Name+": "+typeName(m.Type))
		}
	}
	return all
}

func typeName(typ btf.Type) string {
	switch typ := btf.UnderlyingType(typ).(type) {
	case *btf.Enum:
		return "enum " + typ.Name
	case *btf.Int:
		return fmt.Sprintf("u%d", typ.Size*8)
	case *btf.Array:
		if element, ok := btf.UnderlyingType(typ.Type).(*btf.Struct); ok {
			return fmt.Sprintf("%d %s", typ.Nelems, element.Name)
		}
		element := btf.UnderlyingType(typ.Type).(*btf.Int)
		switch {
		case element.Encoding == btf.Char || element.Encoding == btf.Signed:
			return fmt.Sprintf("%d characters", typ.Nelems)
		case element.Size == 1:
			return fmt.Sprintf("%d bytes", typ.Nelems)
		}
		return fmt.Sprintf("%d u%d", typ.Nelems, element.Size*8)
	}
	return fmt.Sprintf("%T", typ)
}

// TestReasonsDocument holds the table of reasons in docs/operations.md against the enumeration.
func TestReasonsDocument(t *testing.T) {
	content, err := os.ReadFile("../docs/operations.md")
	if err != nil {
		t.Fatal(err)
	}
	_, section, found := strings.Cut(string(content), "\n## Reasons\n")
	if !found {
		t.Fatal("docs/operations.md has no section Reasons")
	}
	var documented []string
	for _, r := range regexp.MustCompile("(?m)^\\| (\\d+) \\| `([a-z_]+)` \\|").FindAllStringSubmatch(section, -1) {
		documented = append(documented, r[1]+" "+r[2])
	}
	types, err := enums()
	if err != nil {
		t.Fatal(err)
	}
	var e *btf.Enum
	if err := types.TypeByName("reason", &e); err != nil {
		t.Fatal(err)
	}
	var want []string
	for _, v := range e.Values {
		if v.Name != "REASON_NONE" && v.Name != "REASON_COUNT" {
			want = append(want, fmt.Sprintf("%d %s", v.Value, EnumName("reason", v.Value)))
		}
	}
	if !slices.Equal(documented, want) {
		t.Errorf("docs/operations.md (-enumeration +document):\n%s", cmp.Diff(want, documented))
	}
}
