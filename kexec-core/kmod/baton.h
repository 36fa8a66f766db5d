/* SPDX-License-Identifier: GPL-2.0 */
/*
 * What the files of baton.ko know of each other. The contract with user space is uapi/baton.h.
 *
 * Lock order: baton_lock -> cpu_hotplug_lock -> given_lock. pci_roots_lock -> pci_rescan_remove_lock stand alone.
 * BATON_IOC_DOORBELL_RING takes none: it lies on the path that is measured.
 */
#ifndef _BATON_H
#define _BATON_H

#include <linux/cleanup.h>
#include <linux/io.h>
#include <linux/list.h>
#include <linux/mm.h>
#include <linux/mutex.h>
#include <linux/seq_file.h>
#include <linux/sizes.h>
#include <linux/slab.h>
#include "uapi/baton.h"

struct baton_memory;
struct baton_line;
struct baton_notice;

/* One open file of /dev/baton: what ends with it. Under baton_lock. */
struct baton_file {
	struct baton_line *line;	/* its doorbell */
	struct baton_notice *notice;	/* its panic notice */
};

/* One ioctl: our copy of the caller's struct, padded with zeroes, and the way back to it. */
struct baton_call {
	struct baton_file *file;
	void __user *user;
	size_t copied;			/* how much of our struct the caller has */
	union {
		struct baton_info info;
		struct baton_cpu_info cpu_info;
		struct baton_instance instance;
		struct baton_mem mem;
		struct baton_mem_fd mem_fd;
		struct baton_adopt adopt;
		struct baton_cpu cpu;
		struct baton_doorbell doorbell;
		struct baton_yield yield;
		struct baton_pci pci;
		struct baton_panic_notice panic_notice;
	} arg;
};

/* main.c */
extern struct mutex baton_lock;		/* guards instances and memory objects, and keeps CPU records in step with them */
int baton_reply(const struct baton_call *call);
void baton_depend(void);
void baton_release(void);

/* instances.c */
void baton_instances_init(void);
bool baton_instance_exists(u32 id);
u32 baton_instances_count(void);
int baton_instances_show(struct seq_file *seq, void *unused);
int baton_instance_create(struct baton_call *call);
int baton_instance_update(struct baton_call *call);
int baton_instance_destroy(struct baton_call *call);

/* memory.c */
struct baton_memory *baton_memory_find(u64 start, u64 len);
struct baton_memory *baton_memory_hold(u64 start, u64 len);
void baton_memory_unhold(struct baton_memory *memory);
int baton_memory_give_back_all(u32 instance);
void baton_memory_show(struct seq_file *seq, u32 instance, bool with_addresses);
int baton_mem_take(struct baton_call *call);
int baton_mem_give_back(struct baton_call *call);
int baton_mem_fd(struct baton_call *call);
int baton_mem_adopt(struct baton_call *call);

/* cpus.c */
int baton_cpus_init(void);
void baton_cpus_exit(void);
bool baton_cpus_recorded(u32 instance);
void baton_cpus_show(struct seq_file *seq, u32 instance);
int baton_cpu_info(struct baton_call *call);
int baton_cpu_give(struct baton_call *call);
int baton_cpu_take(struct baton_call *call);
int baton_doorbell_open(struct baton_call *call);
int baton_doorbell_ring(struct baton_call *call);
void baton_doorbell_close(struct baton_line *line);
int baton_panic_notice_set(struct baton_call *call);
void baton_panic_notice_clear(struct baton_notice *notice);

/* jump.c */
int baton_yield(struct baton_call *call);

/* pci.c */
int baton_pci_add(struct baton_call *call);
int baton_pci_remove(struct baton_call *call);

#endif
