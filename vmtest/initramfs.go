// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// Where a kernel has no 9p and the machine no virtiofsd, a guest of plain QEMU has no root of the host's but an
// initramfs of busybox, the test binaries and their testdata, and no modules: the program rung needs none.

// initScript is what a guest of plain QEMU runs first. The second serial port is the way of what the tests write, the
// first that of the kernel.
const initScript = `#!/bin/sh
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
sh %s </dev/ttyS1 >/dev/ttyS1
poweroff -f
`

func (m machine) qemuArgs(image, initramfs, console string) []string {
	args := []string{"-smp", m.cpus(), "-m", "1024", "-nodefaults", "-no-reboot", "-display", "none",
		"-serial", "file:" + console, "-serial", "stdio", "-kernel", image, "-initrd", initramfs,
		"-append", "console=ttyS0 panic=-1"}
	if m.kvm {
		return append(args, "-accel", "kvm", "-cpu", "host")
	}
	return append(args, "-accel", "tcg,thread=multi", "-cpu", "max")
}

// writeInitramfs writes an initramfs with the suites, which runs `script`.
func writeInitramfs(path, script string, suites []*built) error {
	busybox, err := exec.LookPath("busybox")
	if err != nil {
		return err
	}
	file, err := os.Create(path)
	if err != nil {
		return err
	}
	defer file.Close()
	buffer := bufio.NewWriter(file)
	a := &archive{w: buffer, folders: map[string]bool{}}
	for _, folder := range []string{"/proc", "/sys", "/dev", "/tmp"} {
		a.folder(folder)
	}
	a.file("/bin/busybox", busybox)
	for _, name := range []string{"sh", "mount", "poweroff", "modprobe", "echo"} {
		a.entry("/bin/"+name, 0o120777, []byte("busybox"))
	}
	a.file(script, script)
	a.entry("/init", 0o100755, fmt.Appendf(nil, initScript, script))
	for _, s := range suites {
		a.file(s.binary, s.binary)
		a.folder(s.dir)
		testdata := filepath.Join(s.dir, "testdata")
		err := filepath.WalkDir(testdata, func(path string, d fs.DirEntry, err error) error {
			if err != nil || d.IsDir() {
				return err
			}
			a.file(path, path)
			return nil
		})
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	a.entry("TRAILER!!!", 0, nil)
	return errors.Join(a.err, buffer.Flush(), file.Close())
}

// archive writes what the kernel unpacks: cpio, "newc".
type archive struct {
	w       io.Writer
	folders map[string]bool
	inode   int
	err     error // the first
}

func (a *archive) folder(path string) {
	if path == "/" || a.folders[path] {
		return
	}
	a.folders[path] = true
	a.folder(filepath.Dir(path))
	a.write(path, 0o040755, nil)
}

// file puts the content of a file of the host's there.
func (a *archive) file(path, from string) {
	content, err := os.ReadFile(from)
	if err != nil && a.err == nil {
		a.err = err
	}
	a.entry(path, 0o100755, content)
}

func (a *archive) entry(path string, mode int, content []byte) {
	if strings.HasPrefix(path, "/") {
		a.folder(filepath.Dir(path))
	}
	a.write(path, mode, content)
}

func (a *archive) write(path string, mode int, content []byte) {
	if a.err != nil {
		return
	}
	a.inode++
	name := strings.TrimPrefix(path, "/") + "\x00"
	var b strings.Builder
	b.WriteString("070701")
	for _, field := range []int{a.inode, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(name), 0} {
		fmt.Fprintf(&b, "%08X", field)
	}
	b.WriteString(name)
	b.WriteString(padding(b.Len()))
	b.Write(content)
	b.WriteString(padding(len(content)))
	_, a.err = io.WriteString(a.w, b.String())
}

// padding fills up to a multiple of 4.
func padding(n int) string { return "\x00\x00\x00"[:(4-n%4)%4] }
