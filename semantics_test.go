// SPDX-License-Identifier: Apache-2.0

package lbagent_test

import (
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
)

// TestSemanticsDocument holds docs/semantics.md against the tests: each rule names one at least, or is said to be not
// yet there; those that it names exist, and no row of TestSemantics is without a rule.
func TestSemanticsDocument(t *testing.T) {
	text, err := os.ReadFile("docs/semantics.md")
	if err != nil {
		t.Fatal(err)
	}
	rows := semanticsRows(t)
	unnamed := map[string]bool{}
	for name := range rows {
		unnamed[name] = true
	}
	// A name, and where its package stands before it.
	name := regexp.MustCompile("`([a-z/]+)`|(?:Test|Fuzz)[A-Za-z0-9]+(?:/[^ ;]+)?|[a-z]+\\.txtar")
	rules := 0
	for line := range strings.Lines(string(text)) {
		if !strings.HasPrefix(line, "| ") || strings.HasPrefix(line, "| rule |") {
			continue
		}
		rules++
		cells := strings.Split(strings.Trim(strings.TrimSpace(line), "|"), "|")
		if len(cells) != 4 {
			t.Errorf("%d columns, want 4: %s", len(cells), line)
			continue
		}
		tests, folder := 0, ""
		for _, m := range name.FindAllStringSubmatch(cells[2], -1) {
			if m[1] != "" {
				folder = m[1]
				continue
			}
			test := strings.TrimSuffix(m[0], ",")
			tests++
			if !testExists(t, folder, test, rows) {
				t.Errorf("%s: there is no test %s in %q", strings.TrimSpace(cells[0]), test, folder)
			}
			delete(unnamed, strings.TrimPrefix(test, "TestSemantics/"))
		}
		if tests == 0 && !strings.Contains(cells[1], "not yet") {
			t.Errorf("no test: %s", strings.TrimSpace(cells[0]))
		}
	}
	for row := range unnamed {
		t.Errorf("TestSemantics/%s is of no rule", row)
	}
	if rules < 50 {
		t.Errorf("%d rules were found", rules)
	}
}

// testExists tells whether a folder has a test, a row of TestSemantics or a script.
func testExists(t *testing.T, folder, test string, rows map[string]bool) bool {
	t.Helper()
	if strings.HasSuffix(test, ".txtar") {
		_, err := os.Stat(filepath.Join(folder, "testdata", test))
		return err == nil
	}
	if row, ok := strings.CutPrefix(test, "TestSemantics/"); ok {
		return folder == "agent" && rows[row]
	}
	for _, file := range testFiles(t, folder) {
		for _, d := range file.Decls {
			if f, ok := d.(*ast.FuncDecl); ok && f.Recv == nil && f.Name.Name == test {
				return true
			}
		}
	}
	return false
}

// semanticsRows are the rows of agent's TestSemantics as `go test -run` names them: of each []row, the first string
// of its elements.
func semanticsRows(t *testing.T) map[string]bool {
	t.Helper()
	rows := map[string]bool{}
	for _, file := range testFiles(t, "agent") {
		ast.Inspect(file, func(n ast.Node) bool {
			list, ok := n.(*ast.CompositeLit)
			if !ok {
				return true
			}
			array, ok := list.Type.(*ast.ArrayType)
			if !ok {
				return true
			}
			if of, ok := array.Elt.(*ast.Ident); !ok || of.Name != "row" {
				return true
			}
			for _, e := range list.Elts {
				name, err := strconv.Unquote(e.(*ast.CompositeLit).Elts[0].(*ast.BasicLit).Value)
				if err != nil {
					t.Fatal(err)
				}
				rows[strings.ReplaceAll(name, " ", "_")] = true
			}
			return true
		})
	}
	return rows
}

func testFiles(t *testing.T, folder string) (files []*ast.File) {
	t.Helper()
	paths, err := filepath.Glob(filepath.Join(folder, "*_test.go"))
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range paths {
		file, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.SkipObjectResolution)
		if err != nil {
			t.Fatal(err)
		}
		files = append(files, file)
	}
	return files
}
