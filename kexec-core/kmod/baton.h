/* SPDX-License-Identifier: GPL-2.0 */
/*
 * What the files of baton.ko know of each other. The contract with user space is uapi/baton.h.
 *
 * Lock order: baton_lock -> cpu_hotplug_lock, or -> i_rwsem of a memfd -> folio lock. pci_rescan_remove_lock is alone.
 * Devices' locks and the rtnl lock are taken by a thread that has none of these.
 * BATON_IOC_DOORBELL_RING takes none: it lies on the path that is measured.
 */
#ifndef _BATON_H
#define _BATON_H

#include <linux/cleanup.h>
#include <linux/io.h>
#include <linux/list.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/mutex.h>
#include <linux/seq_file.h>
#include <linux/sizes.h>
#include <linux/slab.h>
#include <linux/timer.h>
#include "uapi/baton.h"

struct eventfd_ctx;

/* A doorbell. The counters and the window belong to CPU 0, which takes the rings; the rest is under baton_lock. */
struct baton_bell {
	struct eventfd_ctx *eventfd;	/* what it signals; NULL: there is no doorbell */
	int irq;
	u64 place;			/* APIC id and vector, as bell_place() of cpus.c packs them */
	u64 rings;			/* heard */
	u64 muffled;			/* of these: too many at once, so that the timer signals for all of them */
	unsigned long window_end;	/* jiffies */
	unsigned int in_window;
	struct timer_list timer;
};

/* One open file of /dev/baton: what ends with it. Under baton_lock. */
struct baton_file {
	struct baton_bell bell;
	u64 peer;			/* the bell that CONNECT named; 0: none. RING reads it without a lock */
	bool has_notice;		/* the panic notice is its */
};

/* One memory object. Under baton_lock. */
struct baton_memory {
	struct list_head node;
	u64 start;
	u64 len;
	u32 instance;
	bool has_pages;			/* ordinary allocated pages of this kernel: it was ALLOC or RESERVED */
	bool filed;			/* a memfd has or had pages of it */
	unsigned int users;		/* open files of it, a panic notice into it; until 0 it cannot be given back */
};

/* One ioctl. */
struct baton_call {
	struct baton_file *file;
	void *arg;			/* our copy of the caller's struct, padded with zeroes */
	void __user *user;		/* the caller's own */
	size_t copied;			/* how much of ours the caller has */
};

/* All of them have this form. */
typedef int baton_call_fn(struct baton_call *call);

/* main.c */
extern struct mutex baton_lock;		/* instances, memory objects, CPU records, the panic notice */
int baton_reply(const struct baton_call *call);

/* instances.c */
void baton_instances_init(void);
bool baton_instance_exists(u32 id);
u32 baton_instances_count(void);
int baton_instances_show(struct seq_file *seq, void *unused);
baton_call_fn baton_instance_create, baton_instance_update, baton_instance_destroy;

/* memory.c */
struct baton_memory *baton_memory_find(u64 start, u64 len);
int baton_memory_give_back_all(u32 instance);
void baton_memory_show(struct seq_file *seq, u32 instance, bool with_addresses);
baton_call_fn baton_mem_take, baton_mem_give_back, baton_mem_fd, baton_mem_file, baton_mem_adopt;

/* cpus.c */
int baton_cpus_init(void);
void baton_cpus_exit(void);
bool baton_cpus_recorded(u32 instance);
void baton_cpus_show(struct seq_file *seq, u32 instance);
void baton_doorbell_close(struct baton_file *file);
void baton_panic_notice_clear(void);
void baton_notice_give(void);
void baton_cpus_stop_given(void);
baton_call_fn baton_cpu_info, baton_cpu_give, baton_cpu_take;
baton_call_fn baton_doorbell_open, baton_doorbell_ring, baton_doorbell_connect, baton_panic_notice_set;

/* jump.c, pci.c */
baton_call_fn baton_yield, baton_pci_add, baton_pci_remove;

/* hibernate.c */
bool baton_functions_frozen(u32 instance);
void baton_frozen_restore_all(void);
void baton_frozen_close(const struct baton_file *file);
baton_call_fn baton_pci_freeze, baton_pci_restore;

/* platform.c */
void baton_platform_init(void);
void baton_platform_exit(void);
baton_call_fn baton_cpu_give_away, baton_cpu_take_back, baton_end, baton_ioapic_mask, baton_iommu_off;
baton_call_fn baton_sleep_type;

#endif
