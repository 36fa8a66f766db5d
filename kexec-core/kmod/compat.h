/* SPDX-License-Identifier: GPL-2.0 */
/* Every difference between the kernels that baton.ko builds for; by a feature's macro where it has one (backports). */
#ifndef _BATON_COMPAT_H
#define _BATON_COMPAT_H

#include <linux/gfp.h>
#include <linux/netdevice.h>

/* The third argument of alloc_contig_range(): a migrate type until 6.16 or so, a set of flags since. */
#ifndef ACR_FLAGS_NONE
#define ACR_FLAGS_NONE MIGRATE_MOVABLE
#endif

/* A kernel of before 7.0 has no kexec handover whose pages this could restore. */
#if __has_include(<linux/kho/abi/kexec_handover.h>)
#include <linux/kexec_handover.h>
#else
#define kho_restore_pages(phys, nr_pages) NULL
#endif

/* Since 6.15 some interfaces have a lock of their own, in which their operations are called. */
#if __has_include(<net/netdev_lock.h>)
#include <net/netdev_lock.h>
#else
#define netdev_lock_ops(dev) ((void)(dev))
#define netdev_unlock_ops(dev) ((void)(dev))
#endif

#endif
