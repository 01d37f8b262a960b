// SPDX-License-Identifier: Apache-2.0

package agent

// BeforeWrite has a function called before every write to a map, as maps.Maps.Fault.
func (c *Config) BeforeWrite(f func(mapName string) error) { c.beforeWrite = f }
