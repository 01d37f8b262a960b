/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
#ifndef LBAGENT_VERDICT_H
#define LBAGENT_VERDICT_H

#include "maps.h"

/* Every exit of every program is `return verdict(REASON_..., VERDICT_...)`. */
static __always_inline int verdict(enum reason reason, int action)
{
	__u32 key = reason;
	__u64 *packets = bpf_map_lookup_elem(&reasons, &key);

	if (packets)
		(*packets)++; /* of this CPU alone */
	return action;
}

#endif
