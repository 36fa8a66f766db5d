// SPDX-License-Identifier: GPL-2.0
/*
 * DOC: Memory objects
 *
 * A memory object is a physical range that is out of this kernel's use and accounted to an instance.
 *
 * 1. TAKE makes it, in one of four ways (ways[]); each way has its way back beside it.
 * 2. MEM_FD makes files that map a part of it. A mapping holds its file, a file holds the object (users), also across fork:
 *    so counting files is enough.
 * 3. GIVE_BACK, or DESTROY of the instance, ends it. EBUSY, and nothing done, while it has users or while a page is still
 *    pinned by I/O that outlived the mapping.
 *
 * ADOPT is not an object: the range becomes this kernel's own RAM, for good.
 *
 * Pages that were ALLOCated are zero; so whatever an instance leaves in them, this kernel's next user of them gets through
 * the allocator, which follows init_on_alloc. Pages taken as RESERVED or OUTSIDE keep their content: that is their point.
 */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/anon_inodes.h>
#include <linux/file.h>
#include <linux/fs.h>
#include <linux/ioport.h>
#include <linux/list.h>
#include <linux/memory.h>
#include <linux/memory_hotplug.h>
#include <linux/mm.h>
#include <linux/sched/signal.h>
#include <linux/seq_file.h>
#include <linux/sizes.h>
#include <linux/slab.h>
#include <linux/uaccess.h>
#include "baton.h"
#include "compat.h"

struct baton_memory {
	struct list_head node;	/* in memories, by address */
	u64 start;
	u64 len;
	u32 instance;
	u32 how;
	unsigned int users;	/* open files of it, panic notices into it */
};

static LIST_HEAD(memories);	/* under baton_lock; no two overlap */

/* Pages are handled this many at a time, so that a caller can be killed and others can run in between. */
#define CHUNK_PAGES (SZ_128M >> PAGE_SHIFT)

static u64 end_of(const struct baton_memory *memory)
{
	return memory->start + memory->len;
}

/* Page-aligned, not empty, and an address that this CPU can form. */
static int check_range(u64 start, u64 len)
{
	u64 end;

	if (!len || !PAGE_ALIGNED(start) || !PAGE_ALIGNED(len) || check_add_overflow(start, len, &end))
		return -EINVAL;
	return end > BIT_ULL(boot_cpu_data.x86_phys_bits) ? -ERANGE : 0;
}

static int add_size(struct resource *res, void *sum)
{
	*(u64 *)sum += resource_size(res);
	return 0;
}

/* How many bytes of the range this kernel calls System RAM, its own or hot-added. */
static u64 ram_bytes(u64 start, u64 len)
{
	u64 sum = 0;

	walk_iomem_res_desc(IORES_DESC_NONE, IORESOURCE_SYSTEM_RAM, start, start + len - 1, &sum, add_size);
	return sum;
}

static void free_pages_range(unsigned long pfn, unsigned long end)
{
	for (; pfn < end; pfn += CHUNK_PAGES) {
		free_contig_range(pfn, min(end - pfn, CHUNK_PAGES));
		cond_resched();
	}
}

/*
 * alloc_contig_range() wants one zone; it is told so in pieces that also give the caller a chance to be killed. In each piece it
 * moves what can be moved, and fails with EBUSY when something cannot.
 */
static int take_alloc(u64 start, u64 len)
{
	unsigned long first = PHYS_PFN(start), end = PHYS_PFN(start + len), pfn, next;
	int ret;

	if (ram_bytes(start, len) != len)
		return -ERANGE;
	for (pfn = first; pfn < end; pfn++)
		if (!pfn_to_online_page(pfn))
			return -ERANGE;
	for (pfn = first; pfn < end; pfn = next) {
		struct zone *zone = page_zone(pfn_to_page(pfn));

		next = min(end, ALIGN_DOWN(pfn, CHUNK_PAGES) + CHUNK_PAGES);
		next = min(next, zone_end_pfn(zone));
		ret = fatal_signal_pending(current) ? -EINTR :
		      compat_alloc_contig_range(pfn, next, GFP_KERNEL | __GFP_ZERO | __GFP_NOWARN);
		if (ret) {
			free_pages_range(first, pfn);
			return ret;
		}
		cond_resched();
	}
	return 0;
}

static int take_outside(u64 start, u64 len)
{
	return ram_bytes(start, len) ? -EEXIST : 0;
}

static bool all_reserved(u64 start, u64 len)
{
	for (unsigned long pfn = PHYS_PFN(start); pfn < PHYS_PFN(start + len); pfn++) {
		struct page *page = pfn_to_online_page(pfn);

		if (!page || !PageReserved(page))
			return false;
	}
	return true;
}

/*
 * What free_reserved_page() does, less the freeing. Struct pages of reserved memory are initialised at boot even where
 * DEFERRED_STRUCT_PAGE_INIT puts off the others, so PageReserved can be trusted; but it is also set for memory that the kernel
 * itself took at boot, which nothing tells apart: the caller must know that the range is its own.
 */
static int take_reserved(u64 start, u64 len)
{
	if (ram_bytes(start, len) != len || !all_reserved(start, len))
		return -EINVAL;
	for (unsigned long pfn = PHYS_PFN(start); pfn < PHYS_PFN(start + len); pfn++) {
		struct page *page = pfn_to_page(pfn);

		ClearPageReserved(page);
		init_page_count(page);
		adjust_managed_page_count(page, 1);
		if (!(pfn % CHUNK_PAGES))
			cond_resched();
	}
	return 0;
}

static int take_borrow(u64 start, u64 len)
{
	if (start + len > SZ_1M)
		return -ERANGE;
	return all_reserved(start, len) ? 0 : -EINVAL;
}

static void give_back_pages(u64 start, u64 len)
{
	free_pages_range(PHYS_PFN(start), PHYS_PFN(start + len));
}

static void give_back_nothing(u64 start, u64 len)
{
}

static const struct {
	int (*take)(u64 start, u64 len);
	void (*give_back)(u64 start, u64 len);
	bool pages;		/* ordinary allocated pages of this kernel */
} ways[] = {
	[BATON_MEM_ALLOC] = { take_alloc, give_back_pages, true },
	[BATON_MEM_OUTSIDE] = { take_outside, give_back_nothing, false },
	[BATON_MEM_RESERVED] = { take_reserved, give_back_pages, true },
	[BATON_MEM_BORROW] = { take_borrow, give_back_nothing, false },
};

/* The object that holds all of the range; NULL when there is none. */
static struct baton_memory *find_around(u64 start, u64 len)
{
	struct baton_memory *memory;

	lockdep_assert_held(&baton_lock);
	list_for_each_entry(memory, &memories, node)
		if (start >= memory->start && start - memory->start < memory->len &&
		    len <= end_of(memory) - start)
			return memory;
	return NULL;
}

/* Where an object for this range belongs: the element before which to put it. NULL when it overlaps one. */
static struct list_head *find_gap(u64 start, u64 len)
{
	struct baton_memory *memory;

	lockdep_assert_held(&baton_lock);
	list_for_each_entry(memory, &memories, node) {
		if (start + len <= memory->start)
			return &memory->node;
		if (start < end_of(memory))
			return NULL;
	}
	return &memories;
}

struct baton_memory *baton_memory_hold(u64 start, u64 len, int how)
{
	struct baton_memory *memory = find_around(start, len);

	if (!memory || (how >= 0 && memory->how != how))
		return NULL;
	memory->users++;
	return memory;
}

void baton_memory_unhold(struct baton_memory *memory)
{
	lockdep_assert_held(&baton_lock);
	memory->users--;
}

int baton_mem_take(struct baton_call *call)
{
	struct baton_mem *arg = &call->mem;
	struct baton_memory *memory;
	struct list_head *gap;
	int ret;

	if (arg->reserved || arg->how >= ARRAY_SIZE(ways))
		return -EINVAL;
	ret = check_range(arg->start, arg->len);
	if (ret)
		return ret;
	memory = kzalloc(sizeof(*memory), GFP_KERNEL);
	if (!memory)
		return -ENOMEM;
	memory->start = arg->start;
	memory->len = arg->len;
	memory->instance = arg->instance;
	memory->how = arg->how;

	ret = mutex_lock_killable(&baton_lock);
	if (ret)
		goto free_memory;
	ret = -ENOENT;
	if (!baton_instance_exists(arg->instance))
		goto unlock;
	ret = -EEXIST;
	gap = find_gap(arg->start, arg->len);
	if (!gap)
		goto unlock;
	ret = ways[arg->how].take(arg->start, arg->len);
	if (ret)
		goto unlock;
	list_add_tail(&memory->node, gap);
	baton_depend();
	mutex_unlock(&baton_lock);
	return 0;

unlock:
	mutex_unlock(&baton_lock);
free_memory:
	kfree(memory);
	return ret;
}

/* With no users there is no mapping, so references to its pages can only become fewer: what is idle now stays idle. */
static bool is_idle(const struct baton_memory *memory)
{
	if (memory->users)
		return false;
	if (ways[memory->how].pages)
		for (unsigned long pfn = PHYS_PFN(memory->start); pfn < PHYS_PFN(end_of(memory)); pfn++)
			if (page_count(pfn_to_page(pfn)) != 1)
				return false;
	return true;
}

static void give_back(struct baton_memory *memory)
{
	ways[memory->how].give_back(memory->start, memory->len);
	list_del(&memory->node);
	kfree(memory);
	baton_release();
}

int baton_mem_give_back(struct baton_call *call)
{
	struct baton_mem *arg = &call->mem;
	struct baton_memory *memory;
	int ret;

	if (arg->reserved)
		return -EINVAL;
	ret = check_range(arg->start, arg->len);
	if (ret)
		return ret;
	ret = mutex_lock_killable(&baton_lock);
	if (ret)
		return ret;
	memory = find_around(arg->start, arg->len);
	if (!memory || memory->instance != arg->instance)
		ret = -ENOENT;
	else if (memory->start != arg->start || memory->len != arg->len)
		ret = -EINVAL;
	else if (!is_idle(memory))
		ret = -EBUSY;
	else
		give_back(memory);
	mutex_unlock(&baton_lock);
	return ret;
}

/* All of an instance's memory, or none of it. */
int baton_memory_give_back_all(u32 instance)
{
	struct baton_memory *memory, *next;

	lockdep_assert_held(&baton_lock);
	list_for_each_entry(memory, &memories, node)
		if (memory->instance == instance && !is_idle(memory))
			return -EBUSY;
	list_for_each_entry_safe(memory, next, &memories, node)
		if (memory->instance == instance)
			give_back(memory);
	return 0;
}

/* A file that maps a part of a memory object. */
struct baton_part {
	struct baton_memory *memory;
	u64 start;
	u64 len;
	bool by_page;
};

static int map_pages(struct vm_area_struct *vma, unsigned long pfn)
{
	enum { BATCH = 256 };
	struct page **pages;
	int ret = 0;

	pages = kmalloc_array(BATCH, sizeof(*pages), GFP_KERNEL);
	if (!pages)
		return -ENOMEM;
	vm_flags_set(vma, VM_MIXEDMAP | VM_DONTEXPAND | VM_DONTDUMP);
	for (unsigned long addr = vma->vm_start; addr < vma->vm_end && !ret; addr += BATCH * PAGE_SIZE) {
		unsigned long count = min_t(unsigned long, BATCH, (vma->vm_end - addr) >> PAGE_SHIFT);

		for (unsigned long i = 0; i < count; i++)
			pages[i] = pfn_to_page(pfn++);
		ret = vm_insert_pages(vma, addr, pages, &count);
		cond_resched();
	}
	kfree(pages);
	return ret;
}

/*
 * Everything is mapped here; there is no fault handler. A READONLY file is open for reading only: do_mmap() then refuses
 * PROT_WRITE for a shared mapping, and takes VM_MAYWRITE, so that mprotect() refuses it later. A private mapping would hand
 * out copies of what is meant to be one memory.
 */
static int part_mmap(struct file *file, struct vm_area_struct *vma)
{
	const struct baton_part *part = file->private_data;
	unsigned long len = vma->vm_end - vma->vm_start;
	unsigned long pfn = PHYS_PFN(part->start) + vma->vm_pgoff;

	if (!(vma->vm_flags & VM_MAYSHARE))
		return -EINVAL;
	if (vma->vm_pgoff >= PHYS_PFN(part->len) || PHYS_PFN(len) > PHYS_PFN(part->len) - vma->vm_pgoff)
		return -EINVAL;
	if (part->by_page)
		return map_pages(vma, pfn);
	return remap_pfn_range(vma, vma->vm_start, pfn, len, vma->vm_page_prot);
}

static int part_release(struct inode *inode, struct file *file)
{
	struct baton_part *part = file->private_data;

	mutex_lock(&baton_lock);
	baton_memory_unhold(part->memory);
	mutex_unlock(&baton_lock);
	kfree(part);
	return 0;
}

static const struct file_operations part_fops = {
	.owner = THIS_MODULE,
	.mmap = part_mmap,
	.release = part_release,
};

int baton_mem_fd(struct baton_call *call)
{
	struct baton_mem_fd *arg = &call->mem_fd;
	struct baton_part *part;
	struct file *file;
	int ret;

	if (arg->reserved || arg->flags & ~(BATON_FD_READONLY | BATON_FD_PAGES))
		return -EINVAL;
	ret = check_range(arg->start, arg->len);
	if (ret)
		return ret;
	part = kzalloc(sizeof(*part), GFP_KERNEL);
	if (!part)
		return -ENOMEM;
	part->start = arg->start;
	part->len = arg->len;
	part->by_page = arg->flags & BATON_FD_PAGES;

	ret = mutex_lock_killable(&baton_lock);
	if (ret)
		goto free_part;
	part->memory = baton_memory_hold(arg->start, arg->len, -1);
	mutex_unlock(&baton_lock);
	if (!part->memory) {
		ret = -ENOENT;
		goto free_part;
	}
	if (part->by_page && !ways[part->memory->how].pages) {
		ret = -EINVAL;
		goto unhold;
	}
	ret = get_unused_fd_flags(O_CLOEXEC);
	if (ret < 0)
		goto unhold;
	arg->fd = ret;
	file = anon_inode_getfile("[baton-memory]", &part_fops, part,
				  arg->flags & BATON_FD_READONLY ? O_RDONLY : O_RDWR);
	if (IS_ERR(file)) {
		ret = PTR_ERR(file);
		goto put_fd;
	}
	ret = baton_reply(call);
	if (ret) {
		put_unused_fd(arg->fd);
		fput(file);	/* and with it, part */
		return ret;
	}
	fd_install(arg->fd, file);
	return 0;

put_fd:
	put_unused_fd(arg->fd);
unhold:
	mutex_lock(&baton_lock);
	baton_memory_unhold(part->memory);
	mutex_unlock(&baton_lock);
free_part:
	kfree(part);
	return ret;
}

/*
 * The resource tree keeps a pointer to the name for as long as the memory is there, that is, for ever. The name is therefore not
 * the module's, but a string that is never freed: the module can then be exchanged for a newer one, which the next update
 * of a kernel that was itself a successor may need.
 */
static const char *adopted_name(void)
{
	static const char *name;

	lockdep_assert_held(&baton_lock);
	if (!name)
		name = kstrdup("System RAM (baton)", GFP_KERNEL);
	return name;
}

int baton_mem_adopt(struct baton_call *call)
{
	struct baton_adopt *arg = &call->adopt;
	u64 grain = memory_block_size_bytes();
	int nid, ret;

	if (arg->reserved || !IS_ALIGNED(arg->start, grain) || !IS_ALIGNED(arg->len, grain))
		return -EINVAL;
	ret = check_range(arg->start, arg->len);
	if (ret)
		return ret;
	ret = mutex_lock_killable(&baton_lock);
	if (ret)
		return ret;
	nid = memory_add_physaddr_to_nid(arg->start);
	if (ram_bytes(arg->start, arg->len) || !find_gap(arg->start, arg->len))
		ret = -EEXIST;
	else if (!adopted_name())
		ret = -ENOMEM;
	else
		ret = add_memory_driver_managed(nid == NUMA_NO_NODE ? first_online_node : nid, arg->start, arg->len,
						adopted_name(), MHP_NONE);
	mutex_unlock(&baton_lock);
	if (ret)
		pr_warn("cannot adopt %#llx+%#llx: %pe\n", arg->start, arg->len, ERR_PTR(ret));
	return ret == -E2BIG ? -ERANGE : ret;	/* E2BIG: beyond what the direct map can hold */
}

struct show_state {
	struct seq_file *seq;
	bool any;
};

static void show_range(struct show_state *show, u64 start, u64 len)
{
	seq_printf(show->seq, "%s%llx-%llx", show->any ? "," : "", start, start + len - 1);
	show->any = true;
}

static int show_resource(struct resource *res, void *show)
{
	show_range(show, res->start, resource_size(res));
	return 0;
}

/*
 * "<bytes> <ranges>". BATON_SELF holds what it calls System RAM; of its bytes, what it allocated for others is taken off.
 */
void baton_memory_show(struct seq_file *seq, u32 instance, bool with_addresses)
{
	u64 bytes = instance == BATON_SELF ? (u64)totalram_pages() << PAGE_SHIFT : 0;
	struct show_state show = { .seq = seq };
	struct baton_memory *memory;

	list_for_each_entry(memory, &memories, node) {
		if (instance != BATON_SELF && memory->instance == instance)
			bytes += memory->len;
		else if (instance == BATON_SELF && memory->instance != BATON_SELF && ways[memory->how].pages)
			bytes -= memory->len;
	}
	seq_printf(seq, "%llu ", bytes);
	if (with_addresses && instance == BATON_SELF)
		walk_iomem_res_desc(IORES_DESC_NONE, IORESOURCE_SYSTEM_RAM, 0, U64_MAX, &show, show_resource);
	list_for_each_entry(memory, &memories, node)
		if (with_addresses && instance != BATON_SELF && memory->instance == instance)
			show_range(&show, memory->start, memory->len);
	if (!show.any)
		seq_putc(seq, '-');
}
