// SPDX-License-Identifier: Apache-2.0

package manifest

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"github.com/lbagent/lbagent/lb"
)

// Validate says what is wrong with manifests, each a file or a folder of files. Nothing is followed.
func Validate(paths ...string) []lb.Problem {
	_, problems := Load(DefaultNodePorts, paths...)
	return problems
}

// Load reads manifests once, each a file or a folder of files, and returns them as a folder that is not
// followed, and what is wrong with them.
func Load(nodePorts PortRange, paths ...string) (*Folder, []lb.Problem) {
	s := newSet(nodePorts, slog.New(slog.DiscardHandler))
	var problems []lb.Problem
	for _, path := range paths {
		files := []string{path}
		if info, err := os.Stat(path); err == nil && info.IsDir() {
			names, err := list(path)
			switch {
			case err != nil:
				problems = append(problems, lb.Problem{File: path, Message: unread(err)})
			case len(names) == 0:
				problems = append(problems, lb.Problem{
					File: path, Severity: lb.Warning, Message: "holds no file that ends in .yaml, .yml or .json",
				})
			}
			files = nil
			for _, name := range names {
				files = append(files, filepath.Join(path, name))
			}
		}
		for _, file := range files {
			file = filepath.Clean(file) // a file that is given twice is one file
			text, err := read(file)
			s.put(contents(file, text, err))
		}
	}
	s.settle()
	return &Folder{set: s, changed: make(chan struct{})}, append(problems, s.problems()...)
}

// list returns the names of the manifests in a folder, those that cannot be read too.
func list(dir string) (names []string, err error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	for _, e := range entries {
		if name := e.Name(); !strings.HasPrefix(name, ".") && slices.Contains([]string{".yaml", ".yml", ".json"}, filepath.Ext(name)) {
			names = append(names, name)
		}
	}
	return names, nil
}

// fingerprint is what changes when a file does. The zero one is of no file.
type fingerprint struct {
	modified, changed int64 // in ns; changed also when a mode or an owner does, so that a denied file is tried again
	size              int64
	device, inode     uint64
	failure           string // why there is none: a link to nothing
}

// look returns the fingerprint of a file. It follows links.
func look(path string) fingerprint {
	info, err := os.Stat(path)
	if err == nil {
		st := info.Sys().(*syscall.Stat_t)
		return fingerprint{
			modified: st.Mtim.Nano(), changed: st.Ctim.Nano(), size: st.Size, device: uint64(st.Dev), inode: st.Ino,
		}
	}
	if _, lerr := os.Lstat(path); errors.Is(lerr, fs.ErrNotExist) {
		return fingerprint{}
	}
	return fingerprint{failure: err.Error()}
}

// read returns the text of a file of moderate size.
func read(path string) ([]byte, error) {
	// Not to wait for a writer of a named pipe.
	file, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	info, err := file.Stat()
	switch {
	case err != nil:
		return nil, err
	case !info.Mode().IsRegular():
		return nil, errors.New("not a regular file")
	case info.Size() > maxSize:
		return nil, fmt.Errorf("too large: %d bytes, at most %d are read", info.Size(), maxSize)
	}
	text, err := io.ReadAll(io.LimitReader(file, maxSize+1))
	if err == nil && len(text) > maxSize {
		err = fmt.Errorf("too large: over %d bytes", maxSize)
	}
	return text, err
}

// contents decodes what read returned.
func contents(path string, text []byte, err error) (string, []decoded, []lb.Problem) {
	if err != nil {
		return path, nil, []lb.Problem{{File: path, Message: unread(err)}}
	}
	objects, problems := parse(path, text)
	return path, objects, problems
}

// unread says why a file or folder was not read, without its path: a Problem has that.
func unread(err error) string {
	if pathErr, ok := errors.AsType[*fs.PathError](err); ok {
		return "cannot be read: " + pathErr.Err.Error()
	}
	return err.Error()
}
