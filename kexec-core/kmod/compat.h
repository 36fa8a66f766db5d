/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Every difference between the kernels that baton.ko builds for, and nowhere else. A feature is tested by its macro
 * where it has one, so that backports need no list of versions.
 *
 * Not here because it needs nothing: free_reserved_page() left the exports in 7.x (memory.c never frees a page that
 * it has not first made an ordinary one), irq_domain_free_irqs() has joined them (irq_dispose_mapping() does the same
 * in both), the ICR is written by way of struct apic, whose layout differs but whose names do not.
 */
#ifndef _BATON_COMPAT_H
#define _BATON_COMPAT_H

#include <linux/gfp.h>
#include <linux/mmzone.h>

/* The third argument was a migrate type until 6.16 or so, and is a set of flags since. */
static inline int compat_alloc_contig_range(unsigned long start_pfn, unsigned long end_pfn, gfp_t gfp)
{
#ifdef ACR_FLAGS_NONE
	return alloc_contig_range_noprof(start_pfn, end_pfn, ACR_FLAGS_NONE, gfp);
#else
	return alloc_contig_range_noprof(start_pfn, end_pfn, MIGRATE_MOVABLE, gfp);
#endif
}

#endif
