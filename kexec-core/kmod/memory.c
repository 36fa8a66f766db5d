// SPDX-License-Identifier: GPL-2.0
/*
 * DOC: Memory objects
 *
 * A memory object is a physical range that is out of this kernel's use and accounted to an instance.
 *
 * 1. TAKE makes it, in one of four ways (ways[]).
 * 2. MEM_FD makes files that map a part of it. A mapping holds its file and a file holds the object (users), also
 *    across fork: so counting files is enough. Or MEM_FILE puts its pages into a memfd; each page counts who has it.
 * 3. GIVE_BACK, or DESTROY of the instance, ends it. EBUSY, and nothing done, while it has users or while a page is
 *    still pinned by I/O that outlived the mapping.
 * ADOPT is not an object: the range becomes this kernel's own RAM, for good.
 * Pages that were ALLOCated are zero. Pages taken as RESERVED or OUTSIDE keep their content: that is their point.
 */
#include <linux/anon_inodes.h>
#include <linux/capability.h>
#include <linux/file.h>
#include <linux/memory.h>
#include <linux/memory_hotplug.h>
#include <linux/pagemap.h>
#include <linux/sched/signal.h>
#include <linux/shmem_fs.h>
#include <asm/e820/api.h>
#include <asm/pgtable.h>
#include "baton.h"
#include "compat.h"

static LIST_HEAD(memories);	/* under baton_lock; no two overlap */

/* Pages are handled this many at a time, so that a caller can be killed and others can run in between. */
#define CHUNK_PAGES (SZ_128M >> PAGE_SHIFT)

#define for_each_pfn(pfn, start, len) \
	for (unsigned long pfn = PHYS_PFN(start); pfn < PHYS_PFN((start) + (len)); pfn++)

/* Page-aligned, not empty, and addresses that this CPU can form. */
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

/* How many bytes of the range are resources of this kind. */
static u64 resource_bytes(u64 start, u64 len, unsigned long flags)
{
	u64 sum = 0;

	walk_iomem_res_desc(IORES_DESC_NONE, flags, start, start + len - 1, &sum, add_size);
	return sum;
}

/* System RAM of this kernel, its own or hot-added. */
static u64 ram_bytes(u64 start, u64 len)
{
	return resource_bytes(start, len, IORESOURCE_SYSTEM_RAM);
}

/* Not free_contig_range(): a page that was in a memfd may be charged to a cgroup, which only the last put ends. */
static void give_back_pages(u64 start, u64 len)
{
	for_each_pfn(pfn, start, len) {
		put_page(pfn_to_page(pfn));
		cond_resched();
	}
}

/*
 * alloc_contig_range() wants one zone at a time. It moves what can be moved; EBUSY when something cannot be.
 * Not every kernel of ours heeds __GFP_ZERO there, so the pages are cleared here: they are to be mapped by a service.
 */
static int take_alloc(u64 start, u64 len)
{
	unsigned long end = PHYS_PFN(start + len), next;
	int ret = 0;

	if (ram_bytes(start, len) != len)
		return -ERANGE;
	for_each_pfn(pfn, start, len)
		if (!pfn_to_online_page(pfn))
			return -ERANGE;
	for (unsigned long pfn = PHYS_PFN(start); pfn < end; pfn = next) {
		next = min3(end, ALIGN_DOWN(pfn, CHUNK_PAGES) + CHUNK_PAGES, zone_end_pfn(page_zone(pfn_to_page(pfn))));
		if (fatal_signal_pending(current))
			ret = -EINTR;
		else
			ret = alloc_contig_range(pfn, next, ACR_FLAGS_NONE, GFP_KERNEL | __GFP_NOWARN);
		if (ret) {
			give_back_pages(start, PFN_PHYS(pfn) - start);
			return ret;
		}
		for_each_pfn(taken, PFN_PHYS(pfn), PFN_PHYS(next - pfn)) {
			memset(page_address(pfn_to_page(taken)), 0, PAGE_SIZE);
			cond_resched();
		}
	}
	return 0;
}

/*
 * Memory that the map of boot calls reserved (memmap=, a control block) and that nobody uses. Not what it is silent
 * about: device registers, RAM that mem= hides. Below the ISA hole it is the other way round: a successor's map is
 * silent about all low memory that is not its own, and what is reserved there is the firmware's.
 */
static int take_outside(u64 start, u64 len)
{
	if (!capable(CAP_SYS_RAWIO))	/* as for /dev/mem */
		return -EPERM;
	if (ram_bytes(start, len))
		return -EEXIST;
	if (start + len <= ISA_START_ADDRESS)
		return e820__mapped_any(start, start + len, 0) ? -ERANGE : 0;
	if (resource_bytes(start, len, IORESOURCE_MEM | IORESOURCE_BUSY))
		return -ERANGE;
	for_each_pfn(pfn, start, len) {
		if (!e820__mapped_any(PFN_PHYS(pfn), PFN_PHYS(pfn + 1), E820_TYPE_RESERVED))
			return -ERANGE;
		cond_resched();
	}
	return 0;
}

/* The kernel's image is all that is mapped at __START_KERNEL_map: what the kernel frees of it is unmapped there. */
static bool is_kernel_image(unsigned long pfn)
{
	unsigned long address = PFN_PHYS(pfn) - phys_base + __START_KERNEL_map;
	unsigned int level;
	pte_t *pte;

	if (address < __START_KERNEL_map || address - __START_KERNEL_map >= KERNEL_IMAGE_SIZE)
		return false;
	pte = lookup_address(address, &level);
	return pte && pte_present(*pte);
}

/*
 * Reserved at boot, and not for the kernel's image. Or preserved by KHO, which marks the private word of each piece
 * (kexec_handover.c): just this range, divided as kho_preserve_pages() does it. kho_restore_pages() warns at others,
 * and stops half-way.
 */
#define KHO_MARK(order) (0x4b484f50ull << 32 | (order))
static bool all_kept(u64 start, u64 len, bool by_kho)
{
	unsigned long end = PHYS_PFN(start + len), order;

	for (unsigned long pfn = PHYS_PFN(start); pfn < end; pfn += 1UL << order) {
		struct page *page = pfn_to_online_page(pfn);

		order = by_kho ? min_t(int, __ffs(pfn | BIT(63)), ilog2(end - pfn)) : 0;
		if (!page || (by_kho && page_private(page) != KHO_MARK(order)))
			return false;
		if (!by_kho && (!PageReserved(page) || is_kernel_image(pfn)))
			return false;
	}
	return true;
}

/*
 * What free_reserved_page() does, less the freeing. PageReserved can be trusted even with DEFERRED_STRUCT_PAGE_INIT;
 * but what the kernel allocated at boot has it too. Its image is told apart, the rest the caller must know.
 */
static int take_reserved(u64 start, u64 len)
{
	if (ram_bytes(start, len) != len)
		return -EINVAL;
	if (all_kept(start, len, true))
		return kho_restore_pages(start, PHYS_PFN(len)) ? 0 : -EINVAL;
	if (!all_kept(start, len, false))
		return -EINVAL;
	for_each_pfn(pfn, start, len) {
		struct page *page = pfn_to_page(pfn);

		ClearPageReserved(page);
		init_page_count(page);
		adjust_managed_page_count(page, 1);
	}
	return 0;
}

/* RAM, every page of it: firmware and memmap= reserve pages below 1 MiB that have a struct page as well. */
static int take_borrow(u64 start, u64 len)
{
	if (start + len > SZ_1M)
		return -ERANGE;
	if (ram_bytes(start, len) != len || !all_kept(start, len, false))
		return -EINVAL;
	return 0;
}

static int (* const ways[])(u64 start, u64 len) = {
	[BATON_MEM_ALLOC] = take_alloc,
	[BATON_MEM_OUTSIDE] = take_outside,
	[BATON_MEM_RESERVED] = take_reserved,
	[BATON_MEM_BORROW] = take_borrow,
};

/* The object that holds all of the range; NULL when there is none. */
struct baton_memory *baton_memory_find(u64 start, u64 len)
{
	struct baton_memory *memory;

	lockdep_assert_held(&baton_lock);
	list_for_each_entry(memory, &memories, node)
		if (start >= memory->start && len <= memory->len && start - memory->start <= memory->len - len)
			return memory;
	return NULL;
}

static bool overlaps_any(u64 start, u64 len)
{
	struct baton_memory *memory;

	list_for_each_entry(memory, &memories, node)
		if (start < memory->start + memory->len && memory->start < start + len)
			return true;
	return false;
}

int baton_mem_take(struct baton_call *call)
{
	const struct baton_mem *arg = call->arg;
	int ret;

	if (arg->reserved || arg->how >= ARRAY_SIZE(ways))
		return -EINVAL;
	ret = check_range(arg->start, arg->len);
	if (ret)
		return ret;
	struct baton_memory *memory __free(kfree) = kzalloc(sizeof(*memory), GFP_KERNEL);
	if (!memory)
		return -ENOMEM;
	*memory = (struct baton_memory) { .start = arg->start, .len = arg->len, .instance = arg->instance,
		.has_pages = arg->how == BATON_MEM_ALLOC || arg->how == BATON_MEM_RESERVED };
	guard(mutex)(&baton_lock);
	if (!baton_instance_exists(arg->instance))
		return -ENOENT;
	if (overlaps_any(arg->start, arg->len))
		return -EEXIST;
	ret = ways[arg->how](arg->start, arg->len);
	if (ret)
		return ret;
	list_add_tail(&no_free_ptr(memory)->node, &memories);
	__module_get(THIS_MODULE);
	return 0;
}

/* With no users and no memfd, references to its pages can only become fewer: what is idle stays idle. */
static bool is_idle(const struct baton_memory *memory)
{
	if (memory->users)
		return false;
	for_each_pfn(pfn, memory->start, memory->has_pages ? memory->len : 0)
		if (page_count(pfn_to_page(pfn)) != 1)
			return false;
	return true;
}

static void give_back(struct baton_memory *memory)
{
	if (memory->has_pages)
		give_back_pages(memory->start, memory->len);
	list_del(&memory->node);
	kfree(memory);
	module_put(THIS_MODULE);
}

int baton_mem_give_back(struct baton_call *call)
{
	const struct baton_mem *arg = call->arg;
	struct baton_memory *memory;
	int ret;

	if (arg->reserved)
		return -EINVAL;
	ret = check_range(arg->start, arg->len);
	if (ret)
		return ret;
	guard(mutex)(&baton_lock);
	memory = baton_memory_find(arg->start, arg->len);
	if (!memory || memory->instance != arg->instance)
		return -ENOENT;
	if (memory->start != arg->start || memory->len != arg->len)
		return -EINVAL;
	/* A CPU of the instance may run in any of its memory. */
	if (baton_cpus_recorded(memory->instance) || !is_idle(memory))
		return -EBUSY;
	give_back(memory);
	return 0;
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

/* What a file of a memory object shows. */
struct baton_part {
	struct baton_memory *memory;
	u64 start;
	u64 len;
	bool by_page;
};

static int map_pages(struct vm_area_struct *vma, unsigned long pfn)
{
	enum { BATCH = 256 };
	struct page **pages __free(kfree) = kmalloc_array(BATCH, sizeof(*pages), GFP_KERNEL);
	int ret;

	if (!pages)
		return -ENOMEM;
	vm_flags_set(vma, VM_MIXEDMAP | VM_DONTEXPAND | VM_DONTDUMP);
	for (unsigned long addr = vma->vm_start; addr < vma->vm_end; addr += BATCH * PAGE_SIZE) {
		unsigned long count = min(BATCH, (vma->vm_end - addr) >> PAGE_SHIFT);

		for (unsigned long i = 0; i < count; i++)
			pages[i] = pfn_to_page(pfn++);
		ret = vm_insert_pages(vma, addr, pages, &count);
		if (ret)
			return ret;
		cond_resched();
	}
	return 0;
}

/*
 * Everything is mapped here; there is no fault handler. A READONLY file is open for reading only: do_mmap() then
 * refuses PROT_WRITE for a shared mapping, and takes VM_MAYWRITE away, so that mprotect() refuses it later. A private
 * mapping would hand out copies of what is meant to be one memory.
 */
static int part_mmap(struct file *file, struct vm_area_struct *vma)
{
	const struct baton_part *part = file->private_data;
	unsigned long pfn = PHYS_PFN(part->start) + vma->vm_pgoff, len = vma->vm_end - vma->vm_start;

	if (!(vma->vm_flags & VM_MAYSHARE) || vma->vm_pgoff >= PHYS_PFN(part->len) ||
	    PHYS_PFN(len) > PHYS_PFN(part->len) - vma->vm_pgoff)
		return -EINVAL;
	if (part->by_page)
		return map_pages(vma, pfn);
	return remap_pfn_range(vma, vma->vm_start, pfn, len, vma->vm_page_prot);
}

static int part_release(struct inode *inode, struct file *file)
{
	struct baton_part *part = file->private_data;

	guard(mutex)(&baton_lock);
	part->memory->users--;
	kfree(part);
	return 0;
}

static const struct file_operations part_fops = {
	.owner = THIS_MODULE, .mmap = part_mmap, .release = part_release,
};

int baton_mem_fd(struct baton_call *call)
{
	struct baton_mem_fd *arg = call->arg;
	struct baton_memory *memory;
	struct file *file;
	int ret;

	if (arg->reserved || arg->flags & ~(BATON_FD_READONLY | BATON_FD_PAGES))
		return -EINVAL;
	ret = check_range(arg->start, arg->len);
	if (ret)
		return ret;
	guard(mutex)(&baton_lock);
	memory = baton_memory_find(arg->start, arg->len);
	if (!memory)
		return -ENOENT;
	if (arg->flags & BATON_FD_PAGES && (!memory->has_pages || memory->filed))
		return -EINVAL;
	struct baton_part *part __free(kfree) = kzalloc(sizeof(*part), GFP_KERNEL);
	if (!part)
		return -ENOMEM;
	*part = (struct baton_part) { memory, arg->start, arg->len, arg->flags & BATON_FD_PAGES };
	CLASS(get_unused_fd, fd)(O_CLOEXEC);
	if (fd < 0)
		return fd;
	arg->fd = fd;
	if (baton_reply(call))
		return -EFAULT;
	file = anon_inode_getfile("[baton-memory]", &part_fops, part,
				  arg->flags & BATON_FD_READONLY ? O_RDONLY : O_RDWR);
	if (IS_ERR(file))
		return PTR_ERR(file);
	part = NULL;	/* it ends with the file */
	memory->users++;
	fd_install(take_fd(fd), file);
	return 0;
}

/*
 * Puts a page of ours in place of the file's own, both locked: neither a fault nor a write comes between. It is on no
 * LRU list, so it is never swapped out or moved. What is pinned for DMA would be written on after it had left.
 */
static int file_page(struct inode *inode, pgoff_t index, struct folio *new, bool keep)
{
	struct folio *old;
	int ret = shmem_get_folio(inode, index, 0, &old, SGP_CACHE);

	if (ret)
		return ret;
	if (old == new)
		goto put_old;
	folio_lock(new);
	unmap_mapping_pages(inode->i_mapping, index, 1, false);
	if (folio_test_large(old)) {
		ret = -EOPNOTSUPP;
	} else if (new->mapping || folio_maybe_dma_pinned(old)) {
		ret = -EBUSY;
	} else {
		if (!keep)
			folio_copy(new, old);
		folio_mark_uptodate(new);
		folio_set_swapbacked(new);	/* first: the counters of shmem go by it */
		replace_page_cache_folio(old, new);
		folio_mark_dirty(new);
	}
	folio_unlock(new);
put_old:
	folio_unlock(old);
	folio_put(old);
	return ret;
}

static int file_pages(struct inode *inode, struct baton_memory *memory, const struct baton_mem_file *arg)
{
	u64 size = PAGE_ALIGN(i_size_read(inode));
	int ret;

	if (arg->offset >= size || arg->len > size - arg->offset)
		return -ERANGE;
	memory->filed = true;
	for (u64 at = 0; at < arg->len; at += PAGE_SIZE) {
		if (fatal_signal_pending(current))
			return -EINTR;
		ret = file_page(inode, PHYS_PFN(arg->offset + at), pfn_folio(PHYS_PFN(arg->start + at)),
				arg->flags & BATON_FILE_KEEP);
		if (ret)
			return ret;
		cond_resched();
	}
	return 0;
}

int baton_mem_file(struct baton_call *call)
{
	const struct baton_mem_file *arg = call->arg;
	struct baton_memory *memory;
	struct inode *inode;
	int ret;

	if (arg->reserved || arg->flags & ~BATON_FILE_KEEP || !PAGE_ALIGNED(arg->offset))
		return -EINVAL;
	ret = check_range(arg->start, arg->len);
	if (ret)
		return ret;
	CLASS(fd, file)(arg->fd);
	if (fd_empty(file) || !shmem_mapping(file_inode(fd_file(file))->i_mapping))
		return -EINVAL;
	inode = file_inode(fd_file(file));
	guard(mutex)(&baton_lock);
	memory = baton_memory_find(arg->start, arg->len);
	if (!memory)
		return -ENOENT;
	if (!memory->has_pages)
		return -EINVAL;
	/* A page's count of mappings must be one file's, so what is filed is not mapped by page, and the reverse. */
	if (memory->users && !memory->filed)
		return -EBUSY;
	inode_lock(inode);
	ret = file_pages(inode, memory, arg);
	inode_unlock(inode);
	return ret;
}

static int adopt_reserved(u64 start, u64 len)
{
	int ret = take_reserved(start, len);

	if (ret)
		return ret;
	for_each_pfn(pfn, start, len)	/* told, but no reason to refuse: nobody has them from us */
		if (page_count(pfn_to_page(pfn)) != 1)
			pr_notice("baton: page %lx has %d users\n", pfn, page_count(pfn_to_page(pfn)));
	give_back_pages(start, len);
	return 0;
}

static int adopt_blocks(u64 start, u64 len)
{
	u64 grain = memory_block_size_bytes();
	/* The resource tree points to it for ever, and is never freed: the module can be exchanged for a newer one. */
	static const char *name;
	int ret, nid;

	if (!IS_ALIGNED(start, grain) || !IS_ALIGNED(len, grain))
		return -EINVAL;
	/* What the map of boot has another word for is no RAM that was kept from this kernel. */
	if (e820__mapped_any(start, start + len, 0))
		return -ERANGE;
	if (!name)
		name = kstrdup("System RAM (baton)", GFP_KERNEL);
	if (!name)
		return -ENOMEM;
	/* memory_add_physaddr_to_nid() knows no node of which nothing was this kernel's RAM when it booted. */
	nid = phys_to_target_node(start);
	if (nid == NUMA_NO_NODE)
		nid = first_online_node;
	ret = add_memory_driver_managed(nid, start, len, name, MHP_NONE);
	return ret == -E2BIG ? -ERANGE : ret;	/* E2BIG: beyond what the direct map can hold */
}

int baton_mem_adopt(struct baton_call *call)
{
	const struct baton_adopt *arg = call->arg;
	int ret;

	if (arg->reserved)
		return -EINVAL;
	ret = check_range(arg->start, arg->len);
	if (ret)
		return ret;
	guard(mutex)(&baton_lock);
	if (overlaps_any(arg->start, arg->len))
		return -EEXIST;
	if (ram_bytes(arg->start, arg->len))
		return adopt_reserved(arg->start, arg->len);
	return adopt_blocks(arg->start, arg->len);
}

/* "<bytes> <ranges>". BATON_SELF: its System RAM, less what it allocated for others; /proc/iomem says where that is. */
void baton_memory_show(struct seq_file *seq, u32 instance, bool with_addresses)
{
	u64 bytes = instance == BATON_SELF ? (u64)totalram_pages() << PAGE_SHIFT : 0;
	struct baton_memory *memory;
	char separator = ' ';

	list_for_each_entry(memory, &memories, node) {
		if (instance == BATON_SELF)
			bytes -= memory->instance != BATON_SELF && memory->has_pages ? memory->len : 0;
		else if (memory->instance == instance)
			bytes += memory->len;
	}
	seq_printf(seq, "%llu", bytes);
	list_for_each_entry(memory, &memories, node)
		if (with_addresses && memory->instance == instance) {
			seq_printf(seq, "%c%llx-%llx", separator, memory->start, memory->start + memory->len - 1);
			separator = ',';
		}
	if (separator == ' ')
		seq_puts(seq, " -");
}
