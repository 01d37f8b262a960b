// SPDX-License-Identifier: Apache-2.0

package manifest

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"reflect"
	"strings"
	"unicode/utf8"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	strictjson "sigs.k8s.io/json"
	"sigs.k8s.io/yaml"

	"github.com/lbagent/lbagent/lb"
)

// maxSize is the size in bytes of the largest file that is read.
const maxSize = 8 << 20

// object is what every accepted kind is.
type object interface {
	runtime.Object
	metav1.Object
}

// legacyEndpoints is deprecated in the API, and still what many manifests hold.
//
//lint:ignore SA1019 see above
type legacyEndpoints = corev1.Endpoints

// kind is one of the five kinds that are read.
type kind string

const (
	service       kind = "Service"
	endpointSlice kind = "EndpointSlice"
	node          kind = "Node"
	pod           kind = "Pod"
	endpoints     kind = "Endpoints"
)

// new returns an empty object of the kind with its type set, nil for any kind but the five.
func (k kind) new() object {
	meta := metav1.TypeMeta{APIVersion: k.apiVersion(), Kind: string(k)}
	switch k {
	case service:
		return &corev1.Service{TypeMeta: meta}
	case endpointSlice:
		return &discoveryv1.EndpointSlice{TypeMeta: meta}
	case node:
		return &corev1.Node{TypeMeta: meta}
	case pod:
		return &corev1.Pod{TypeMeta: meta}
	case endpoints:
		return &legacyEndpoints{TypeMeta: meta}
	}
	return nil
}

func (k kind) apiVersion() string {
	if k == endpointSlice {
		return "discovery.k8s.io/v1"
	}
	return "v1"
}

// namespaced reports whether objects of the kind lie in a namespace.
func (k kind) namespaced() bool { return k != node }

// objectName is "Service default/web" or "Node n1", and only the kind where there is no name.
func objectName(kind, namespace, name string) string {
	switch {
	case name == "":
		return kind
	case namespace == "":
		return kind + " " + name
	}
	return kind + " " + namespace + "/" + name
}

// decoded is an object of a file, with defaults and valid.
type decoded struct {
	object   object
	kind     kind
	name     string // "Service default/web"
	document int
}

// parse decodes the text of a file. Its objects count only if no Problem is an Error: a file is all or
// nothing.
func parse(path string, text []byte) ([]decoded, []lb.Problem) {
	p := &parser{path: path, seen: map[string]int{}}
	p.file(text)
	return p.objects, p.problems
}

// parser is the state of parsing one file.
type parser struct {
	path     string
	document int            // number of the current document
	seen     map[string]int // object -> its document
	unread   int            // Endpoints, which no stage reads yet
	objects  []decoded
	problems []lb.Problem
}

func (p *parser) problem(severity lb.Severity, object, field, format string, args ...any) {
	p.problems = append(p.problems, lb.Problem{
		File: p.path, Document: p.document, Object: object, Field: field,
		Message: fmt.Sprintf(format, args...), Severity: severity,
	})
}

func (p *parser) file(text []byte) {
	if i := bytes.IndexByte(text, 0); i >= 0 {
		p.problem(lb.Error, "", "", "not a text file: byte 0 at offset %d", i)
		return
	}
	if !utf8.Valid(text) {
		p.problem(lb.Error, "", "", "not a text file: not UTF-8")
		return
	}
	text = bytes.TrimPrefix(text, []byte("\ufeff"))
	if filepath.Ext(p.path) == ".json" {
		p.jsonFile(text)
	} else {
		p.yamlFile(text)
	}
	if p.document == 0 && len(p.problems) == 0 {
		p.problem(lb.Error, "", "", "empty: to remove its objects delete the file")
	}
	p.document = 0
	if p.unread > 0 {
		p.problem(lb.NotYet, string(endpoints), "", "this kind is not yet read (%d in this file)", p.unread)
	}
}

func (p *parser) jsonFile(text []byte) {
	d := json.NewDecoder(bytes.NewReader(text))
	for {
		var doc json.RawMessage
		start := d.InputOffset()
		err := d.Decode(&doc)
		if errors.Is(err, io.EOF) {
			return
		}
		p.document++
		if err != nil {
			offset := int64(len(text))
			if syntax, ok := errors.AsType[*json.SyntaxError](err); ok {
				offset = min(start+syntax.Offset, offset)
			}
			p.problem(lb.Error, "", "", "does not parse: line %d: %v", 1+bytes.Count(text[:offset], []byte("\n")), err)
			return
		}
		p.json(doc)
	}
}

func (p *parser) yamlFile(text []byte) {
	lines := 0 // before the current document
	for _, doc := range splitYAML(text) {
		p.document++
		data := doc
		var err error
		if !json.Valid(doc) { // JSON may be indented by tabs, YAML may not
			data, err = yaml.YAMLToJSONStrict(doc)
		}
		switch {
		case err != nil:
			// Once more with the lines that precede it, so that the error tells the line of the file.
			if len(p.problems) < maxProblems {
				if _, again := yaml.YAMLToJSONStrict(append(bytes.Repeat([]byte("\n"), lines), doc...)); again != nil {
					err = again
				}
			}
			p.problem(lb.Error, "", "", "does not parse: %s", oneLine(err.Error()))
		case string(data) == "null": // nothing, or comments only
			p.document--
		default:
			p.json(data)
		}
		lines += bytes.Count(doc, []byte("\n"))
	}
}

// splitYAML cuts text before each "---" and after each "..." that stands at the beginning of a line. YAML
// forbids both there within a document, also within a quoted or block scalar.
func splitYAML(text []byte) (docs [][]byte) {
	start, at := 0, 0
	for line := range bytes.Lines(text) {
		end := at + len(line)
		switch {
		case isMarker(line, "---") && at > start:
			docs = append(docs, text[start:at])
			start = at
		case isMarker(line, "..."):
			docs = append(docs, text[start:end])
			start = end
		}
		at = end
	}
	return append(docs, text[start:])
}

func isMarker(line []byte, marker string) bool {
	rest, ok := bytes.CutPrefix(line, []byte(marker))
	return ok && (len(rest) == 0 || bytes.IndexByte([]byte(" \t\r\n"), rest[0]) >= 0)
}

// json takes in one document: an object or a list of objects.
func (p *parser) json(doc []byte) {
	var head struct {
		APIVersion string            `json:"apiVersion"`
		Kind       string            `json:"kind"`
		Items      []json.RawMessage `json:"items"`
	}
	if err := strictjson.UnmarshalCaseSensitivePreserveInts(doc, &head); err != nil {
		field, message := typeError(doc, &head, err)
		p.problem(lb.Error, "", field, "%s", message)
		return
	}
	item, isList := strings.CutSuffix(head.Kind, "List")
	switch {
	case !isList:
		p.object(doc, head.APIVersion, head.Kind, "")
		return
	case item != "" && kind(item).new() == nil, head.APIVersion != kind(item).apiVersion():
		p.unknownKind(doc, head.APIVersion, head.Kind)
		return
	case head.Items == nil: // a list that was cut short would remove what it held
		p.problem(lb.Error, head.Kind, "items", "Required value: [] if there are none")
		return
	}
	for i, raw := range head.Items {
		var own metav1.TypeMeta
		prefix := fmt.Sprintf("items[%d]", i)
		if err := strictjson.UnmarshalCaseSensitivePreserveInts(raw, &own); err != nil {
			field, message := typeError(raw, &own, err)
			p.problem(lb.Error, head.Kind, strings.TrimSuffix(prefix+"."+field, "."), "%s", message)
			continue
		}
		if item != "" { // an API server leaves them out in a typed list
			own.APIVersion, own.Kind = cmp.Or(own.APIVersion, head.APIVersion), cmp.Or(own.Kind, item)
		}
		p.object(raw, own.APIVersion, own.Kind, prefix)
	}
}

// object takes in one object. In a list, prefix is its place there.
func (p *parser) object(raw []byte, apiVersion, kindName, prefix string) {
	k := kind(kindName)
	if k.new() == nil || k.apiVersion() != apiVersion {
		p.unknownKind(raw, apiVersion, kindName)
		return
	}
	name := p.nameOf(raw, kindName)
	place := func(field string) string { // a nameless object is found by its place
		if name != kindName || prefix == "" {
			return field
		}
		return strings.TrimSuffix(prefix+"."+field, ".")
	}

	obj := k.new()
	strict, err := strictjson.UnmarshalStrict(raw, obj)
	if err != nil {
		field, message := typeError(raw, k.new(), err)
		p.problem(lb.Error, name, place(field), "%s", message)
		return
	}
	if len(strict) > 0 {
		// A newer API server may have written a list, so there an unknown field is no error.
		severity := lb.Error
		if prefix != "" {
			severity = lb.Warning
		}
		p.strict(raw, k, name, place, severity, "unknown field", strictjson.DisallowUnknownFields)
		p.strict(raw, k, name, place, lb.Error, "stands twice", strictjson.DisallowDuplicateFields)
	}
	setDefaults(obj)
	for _, e := range validate(obj) {
		p.problem(lb.Error, name, place(e.Field), "%s", e.ErrorBody())
	}
	if obj.GetName() == "" {
		return
	}
	if first, ok := p.seen[name]; ok {
		p.problem(lb.Error, name, "", "already in document %d", first)
		return
	}
	p.seen[name] = p.document
	if k == endpoints {
		p.unread++
	}
	p.objects = append(p.objects, decoded{object: obj, kind: k, name: name, document: p.document})
}

// strict adds what one kind of strictness has to say of an object that is otherwise well formed.
func (p *parser) strict(raw []byte, k kind, name string, place func(string) string, severity lb.Severity,
	message string, option strictjson.StrictOption) {
	found, _ := strictjson.UnmarshalStrict(raw, k.new(), option)
	for _, err := range found {
		if e, ok := errors.AsType[strictjson.FieldError](err); ok {
			p.problem(severity, name, place(e.FieldPath()), "%s", message)
		}
	}
}

func (p *parser) unknownKind(raw []byte, apiVersion, kindName string) {
	switch {
	case kindName == "":
		p.problem(lb.Error, "", "kind", "Required value")
	case apiVersion == "":
		p.problem(lb.Error, p.nameOf(raw, kindName), "apiVersion", "Required value")
	default:
		p.problem(lb.Error, p.nameOf(raw, kindName), "",
			"%s of %s is not read, only v1 Service, Pod, Node and Endpoints, discovery.k8s.io/v1 EndpointSlice, and lists of them",
			kindName, apiVersion)
	}
}

// nameOf is the name of an object that may be ill-formed.
func (p *parser) nameOf(raw []byte, kindName string) string {
	var head struct {
		Metadata struct{ Namespace, Name json.RawMessage } `json:"metadata"`
	}
	_ = json.Unmarshal(raw, &head)
	var namespace, name string
	_ = json.Unmarshal(head.Metadata.Namespace, &namespace)
	_ = json.Unmarshal(head.Metadata.Name, &name)
	switch k := kind(kindName); {
	case k.new() == nil: // whatever it is
	case k.namespaced():
		namespace = cmp.Or(namespace, metav1.NamespaceDefault)
	default:
		namespace = ""
	}
	return objectName(kindName, namespace, name)
}

// typeError says which field of raw does not fit into the type of into, and why. The strict decoder's own
// error type is not exported, encoding/json's is.
func typeError(raw []byte, into any, err error) (field, message string) {
	e, ok := errors.AsType[*json.UnmarshalTypeError](json.Unmarshal(raw, into))
	if !ok {
		return "", oneLine(err.Error())
	}
	got := map[string]string{"object": "a mapping", "array": "a list", "string": "a string", "bool": "true or false", "number": "a number"}
	return e.Field, fmt.Sprintf("must be %s, not %s", typeName(e.Type), cmp.Or(got[e.Value], e.Value))
}

func typeName(t reflect.Type) string {
	switch t.Kind() {
	case reflect.String:
		return "a string"
	case reflect.Bool:
		return "true or false"
	case reflect.Slice, reflect.Array:
		return "a list"
	case reflect.Struct, reflect.Map:
		return "a mapping"
	case reflect.Int, reflect.Int32, reflect.Int64:
		return "an integer"
	}
	return t.String()
}

// oneLine makes the several lines of a YAML error one.
func oneLine(s string) string {
	for _, prefix := range []string{"error converting YAML to JSON: ", "yaml: ", "unmarshal errors:"} {
		s = strings.TrimPrefix(s, prefix)
	}
	return strings.Join(strings.Fields(s), " ")
}
