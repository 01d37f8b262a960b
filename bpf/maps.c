// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/* The maps and their types, without a program: Go's types are generated from this object alone, and
 * every program is loaded with the maps made from it. */
#include "maps.h"

char _license[] SEC("license") = "Dual BSD/GPL";

/* Enumerations that no field of a map has for its type, named here so that their names reach BTF. */
const enum flow_state *flow_state_names __attribute__((unused));
const enum flow_flags *flow_flags_names __attribute__((unused));
const enum address_flags *address_flags_names __attribute__((unused));
const enum service_flags *service_flags_names __attribute__((unused));
const enum backend_flags *backend_flags_names __attribute__((unused));
const enum reason *reason_names __attribute__((unused));
const enum table *table_names __attribute__((unused));
