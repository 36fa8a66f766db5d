/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Every difference between the kernels that baton.ko builds for, and nowhere else. A feature is tested by its macro
 * where it has one, so that backports need no list of versions.
 */
#ifndef _BATON_COMPAT_H
#define _BATON_COMPAT_H

#include <linux/gfp.h>

/* The third argument of alloc_contig_range(): a migrate type until 6.16 or so, a set of flags since. */
#ifdef ACR_FLAGS_NONE
#define COMPAT_ACR_NONE ACR_FLAGS_NONE
#else
#define COMPAT_ACR_NONE MIGRATE_MOVABLE
#endif

#endif
