// SPDX-License-Identifier: GPL-2.0
/*
 * DOC: Leaving this kernel and coming back
 *
 * YIELD takes the last online CPU out of this kernel: to a loop that waits in memory of another kernel, from where it
 * either comes back or does not. For this kernel no time passes in between.
 *
 * 1. Hotplug is disabled, so that the last CPU stays the last; interrupts are off.
 * 2. The top-level table at table_pa gets this kernel's upper half over the identity map's lower half: the code that
 *    leaves, its stack, the GDT, the IDT and the NMI stacks stay mapped where they were, and the physical addresses
 *    are mapped too.
 * 3. baton_leave() saves what C expects to survive a call, plus CR3 and CR4, and jumps.
 * 4. The way back is a jump to baton_return, in the same tables, on any stack.
 *
 * What is not saved is what nobody changes on the way: no segment register, FS/GS base, FPU or vector register, MSR,
 * GDTR or IDTR. CR4 and CR3 are restored raw, so that the kernel's own copies of them (cpu_tlbstate) stay true.
 * Changing CR4.PGE empties the TLB, all PCIDs and global entries included.
 * NMIs cannot be turned off. They find their handlers through the upper half, and go back to where they interrupted.
 */
#include <linux/cpu.h>
#include <linux/irqflags.h>
#include <linux/linkage.h>
#include <linux/nmi.h>
#include <linux/objtool.h>
#include <asm/ibt.h>
#include <asm/nospec-branch.h>
#include <asm/processor.h>
#include <asm/tsc.h>
#include "baton.h"

DEFINE_FREE(memunmap, void *, if (_T) memunmap(_T))
DEFINE_LOCK_GUARD_0(no_hotplug, cpu_hotplug_disable(), cpu_hotplug_enable())

/* Written by baton_leave(), read by baton_return. One CPU at a time can be the last. */
static struct {
	u64 rsp, rbp, rbx, r12, r13, r14, r15, cr3, cr4;
} baton_left __used;

void baton_leave(u64 entry_pa, u64 arg_pa, u64 table_pa);

/*
 * Both are entered by jumps that IBT checks where it is on: the code at entry_pa starts with ENDBR64, and so does
 * baton_return. Table first, then CR4: CR4.PCIDE may be set or cleared only while CR3 names PCID 0, as table_pa does.
 */
asm(
	".pushsection .text\n"
	".globl baton_leave\n"
	".type baton_leave, @function\n"
	"baton_leave:\n"
	"	mov	%rsp, baton_left+0(%rip);	mov	%rbp, baton_left+8(%rip)\n"
	"	mov	%rbx, baton_left+16(%rip);	mov	%r12, baton_left+24(%rip)\n"
	"	mov	%r13, baton_left+32(%rip);	mov	%r14, baton_left+40(%rip)\n"
	"	mov	%r15, baton_left+48(%rip)\n"
	"	mov	%cr3, %rax;			mov	%rax, baton_left+56(%rip)\n"
	"	mov	%cr4, %rcx;			mov	%rcx, baton_left+64(%rip)\n"
	"	mov	%rdi, %r8;			lea	baton_return(%rip), %rdi\n"
	"	mov	%rdx, %cr3\n"
	"	and	$~0x20080, %rcx;		mov	%rcx, %cr4\n"	/* PCIDE, PGE */
	ANNOTATE_RETPOLINE_SAFE
	"	jmp	*%r8\n"
	".size baton_leave, . - baton_leave\n"

	".type baton_return, @function\n"
	"baton_return:\n"
	"	" ASM_ENDBR
	"	mov	baton_left+64(%rip), %rax;	mov	%rax, %cr4\n"
	"	mov	baton_left+56(%rip), %rax;	mov	%rax, %cr3\n"
	"	mov	baton_left+0(%rip), %rsp;	mov	baton_left+8(%rip), %rbp\n"
	"	mov	baton_left+16(%rip), %rbx;	mov	baton_left+24(%rip), %r12\n"
	"	mov	baton_left+32(%rip), %r13;	mov	baton_left+40(%rip), %r14\n"
	"	mov	baton_left+48(%rip), %r15\n"
	"	pushq	$2;				popfq\n"	/* the flag always set; IF, DF, NT, AC clear */
	"	" ASM_RET
	".size baton_return, . - baton_return\n"
	".popsection\n"
);
STACK_FRAME_NON_STANDARD(baton_leave);

/* The upper half of the tables in use over the lower half of @ident; the same whether they have four levels or five. */
static void compose_table(u64 *table, const u64 *ident)
{
	const u64 *current_table = __va(read_cr3_pa());

	memcpy(table, ident, PAGE_SIZE / 2);
	memcpy(table + PTRS_PER_PGD / 2, current_table + PTRS_PER_PGD / 2, PAGE_SIZE / 2);
}

static u64 leave_and_return(const struct baton_yield *arg)
{
	u64 left;

	guard(irqsave)();
	left = rdtsc_ordered();
	baton_leave(arg->entry_pa, arg->arg_pa, arg->table_pa);
	touch_softlockup_watchdog();
	return rdtsc_ordered() - left;
}

int baton_yield(struct baton_call *call)
{
	struct baton_yield *arg = call->arg;

	if (arg->reserved || !PAGE_ALIGNED(arg->table_pa) || !PAGE_ALIGNED(arg->ident_pa) ||
	    arg->table_pa == arg->ident_pa || !arg->entry_pa)
		return -EINVAL;
	/* With page table isolation, the NMI entry takes a CR3 with this bit for user space's and "corrects" it. */
	if (cpu_feature_enabled(X86_FEATURE_PTI) && arg->table_pa & PAGE_SIZE)
		return -EINVAL;
	guard(mutex)(&baton_lock);	/* what the objects are now, they stay */
	if (!baton_memory_find(arg->table_pa, PAGE_SIZE) || !baton_memory_find(arg->ident_pa, PAGE_SIZE))
		return -ENOENT;
	u64 *table __free(memunmap) = memremap(arg->table_pa, PAGE_SIZE, MEMREMAP_WB);
	if (!table)
		return -ENOMEM;
	u64 *ident __free(memunmap) = memremap(arg->ident_pa, PAGE_SIZE, MEMREMAP_WB);
	if (!ident)
		return -ENOMEM;
	guard(no_hotplug)();
	if (num_online_cpus() != 1)
		return -EBUSY;
	compose_table(table, ident);
	arg->away_tsc = leave_and_return(arg);
	return baton_reply(call);
}
