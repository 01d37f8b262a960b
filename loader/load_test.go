// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/lbagent/lbagent/maps"
)

// TestLoad: this kernel takes every program under every set of constants that the loader can choose. How many
// instructions its verifier looks at is compared with a golden file, by the kernel's series: a jump is to be seen
// in review, before it becomes a refusal. `make vmtest UPDATE=1` writes the file.
func TestLoad(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: loads BPF programs")
	}
	m, err := maps.New(maps.Sizes{Frontends: 64, Services: 16, Slots: 1024, Backends: 256, Flows: 1024})
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	found, err := Probe()
	if err != nil {
		t.Fatal(err)
	}
	features := []Features{{}}
	if found.CsumIPv6 {
		features = append(features, Features{CsumIPv6: true})
	}
	counts := map[string]int{} // the most of all sets, by program
	for _, f := range features {
		for _, silent := range []time.Duration{-1, 0, 10 * time.Second} {
			for _, header := range []int{14, 0} {
				l := &Loader{maps: m, features: f, config: Config{Timeouts: DefaultTimeouts(), SilentBackend: silent}}
				for _, object := range []func() (*ebpf.CollectionSpec, error){loadTc, loadSweep} {
					err := l.count(object, header, counts)
					var refusal *ebpf.VerifierError
					if errors.As(err, &refusal) && !t.Failed() {
						t.Logf("the verifier's first refusal: %+v", refusal)
					}
					if err != nil {
						t.Errorf("with %+v, silent backend %v, link header %d: %v", f, silent, header, err)
					}
				}
			}
		}
	}
	compareCounts(t, counts)
}

// count loads all programs of an object, and notes their instructions.
func (l *Loader) count(object func() (*ebpf.CollectionSpec, error), header int, counts map[string]int) error {
	spec, err := object()
	if err != nil {
		return err
	}
	if err := l.configure(spec, header); err != nil {
		return err
	}
	l.maps.Sizes().Apply(spec)
	c, err := ebpf.NewCollectionWithOptions(spec, ebpf.CollectionOptions{MapReplacements: l.maps.All()})
	if err != nil {
		return err
	}
	defer c.Close()
	for name, p := range c.Programs {
		info, err := p.Info()
		if err != nil {
			return err
		}
		n, ok := info.VerifiedInstructions()
		if !ok {
			return fmt.Errorf("%s: the kernel does not say how many instructions it verified", name)
		}
		counts[name] = max(counts[name], int(n))
	}
	return nil
}

func compareCounts(t *testing.T, counts map[string]int) {
	t.Helper()
	var uts unix.Utsname
	if err := unix.Uname(&uts); err != nil {
		t.Fatal(err)
	}
	series := strings.Join(strings.SplitN(unix.ByteSliceToString(uts.Release[:]), ".", 3)[:2], ".")
	text, err := os.ReadFile(filepath.Join("testdata", "instructions.txt"))
	if err != nil {
		t.Fatal(err)
	}
	golden := map[string]int{}
	for line := range strings.Lines(string(text)) {
		if f := strings.Fields(line); len(f) == 3 && f[0] == series {
			if golden[f[1]], err = strconv.Atoi(f[2]); err != nil {
				t.Fatal(err)
			}
		}
	}
	var names []string
	for name, n := range counts {
		names = append(names, name)
		want, known := golden[name]
		switch {
		case len(golden) == 0: // a kernel of someone's own
		case !known:
			t.Errorf("%s is not in the golden file of %s", name, series)
		case n > want+want/10 || n < want-want/10:
			t.Errorf("%s: the verifier of %s looks at %d instructions, the golden file says %d: more than 10 %% off", name, series, n, want)
		}
	}
	slices.Sort(names)
	for _, name := range names {
		t.Logf("instructions: %s %s %d", series, name, counts[name])
	}
}
