// SPDX-License-Identifier: Apache-2.0

package agent

import "runtime/debug"

// Version is that of this build, as the go command recorded it.
func Version() string {
	info, ok := debug.ReadBuildInfo()
	if !ok || info.Main.Version == "" {
		return "unknown"
	}
	return info.Main.Version
}
