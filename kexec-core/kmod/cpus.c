// SPDX-License-Identifier: GPL-2.0
/*
 * DOC: CPUs, doorbells, the panic notice
 *
 * A CPU that user space has offlined can be recorded as given to an instance. Until its record is taken back, a
 * hotplug callback of ours refuses to online it: INIT and SIPI would tear it out of the other kernel.
 *
 * 1. GIVE records it; START also sends INIT, SIPI, SIPI, so that it runs at start_pa in real mode.
 * 2. TAKE ends the record; FENCE first sends INIT, so that it stops whatever it does and waits for a SIPI.
 *
 * A doorbell is a vector on CPU 0, the one that is offlined last. Its affinity is fixed, so that vector and APIC id
 * can be told to the other kernel once and for all.
 *
 * The ICR is written through struct apic, which knows xAPIC from x2APIC and what a hypervisor put in between. In
 * xAPIC mode it is two registers: icr_write() keeps interrupts off between them, and what Linux sends from NMIs uses
 * a shorthand, which leaves the destination register alone.
 */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/cpu.h>
#include <linux/delay.h>
#include <linux/eventfd.h>
#include <linux/interrupt.h>
#include <linux/irq.h>
#include <linux/irqdomain.h>
#include <linux/panic_notifier.h>
#include <asm/apic.h>
#include <asm/irqdomain.h>
#include "baton.h"

struct given_cpu {
	struct list_head node;
	u32 apic_id;
	u32 instance;
};

/* Changed under baton_lock and given_lock, so either is enough to read. given_lock is for the hotplug callback. */
static LIST_HEAD(given);
static DEFINE_SPINLOCK(given_lock);
static int hotplug_state;

/* No broadcast, and in xAPIC mode only 8 bits. */
static bool apic_id_is_valid(u32 apic_id)
{
	return apic_id < (x2apic_mode ? MAX_LOCAL_APIC : 0xff);
}

static bool apic_id_is_online(u32 apic_id)
{
	int cpu;

	for_each_online_cpu(cpu)
		if (cpu_physical_id(cpu) == apic_id)
			return true;
	return false;
}

static struct given_cpu *find_given(u32 apic_id)
{
	struct given_cpu *cpu;

	list_for_each_entry(cpu, &given, node)
		if (cpu->apic_id == apic_id)
			return cpu;
	return NULL;
}

static int refuse_given(unsigned int cpu)
{
	guard(spinlock)(&given_lock);
	return find_given(cpu_physical_id(cpu)) ? -EBUSY : 0;
}

static int write_icr(u32 apic_id, u32 command)
{
	/* What was written to shared memory must be there before the interrupt is; in x2APIC mode nothing else orders it. */
	mb();
	rmb();
	/* An interrupt between the wait and the write may send an IPI of its own. Busy for 1 ms: nobody is at the other end. */
	guard(irqsave)();
	for (int us = 0; !x2apic_mode && apic->icr_read() & APIC_ICR_BUSY; us++) {
		if (us == 1000)
			return -EIO;
		udelay(1);
	}
	apic->icr_write(command, apic_id);
	return 0;
}

/* Sleeps instead of spinning: each write is complete in itself, so it does not matter which CPU sends the next. */
static int send_init(u32 apic_id)
{
	int ret = write_icr(apic_id, APIC_INT_LEVELTRIG | APIC_INT_ASSERT | APIC_DM_INIT);

	usleep_range(10000, 11000);
	return ret ?: write_icr(apic_id, APIC_INT_LEVELTRIG | APIC_DM_INIT);
}

/* Twice, as the specification asks for; a CPU that runs already ignores the second. */
static int send_startup(u32 apic_id, u64 start_pa)
{
	int ret = write_icr(apic_id, APIC_DM_STARTUP | PHYS_PFN(start_pa));

	usleep_range(300, 500);
	return ret ?: write_icr(apic_id, APIC_DM_STARTUP | PHYS_PFN(start_pa));
}

static void forget(struct given_cpu *cpu)
{
	scoped_guard(spinlock, &given_lock)
		list_del(&cpu->node);
	kfree(cpu);
	baton_release();
}

/* No CPU comes or goes between the check and the record; afterwards refuse_given() keeps it away. */
static int record(u32 apic_id, u32 instance)
{
	struct given_cpu *known = find_given(apic_id);
	struct given_cpu *cpu __free(kfree) = kzalloc(sizeof(*cpu), GFP_KERNEL);

	if (!cpu)
		return -ENOMEM;
	*cpu = (struct given_cpu) { .apic_id = apic_id, .instance = instance };
	guard(cpus_read_lock)();
	if (apic_id_is_online(apic_id) || (known && known->instance != instance))
		return -EBUSY;
	if (known)
		return 0;
	scoped_guard(spinlock, &given_lock)
		list_add_tail(&no_free_ptr(cpu)->node, &given);
	baton_depend();
	return 0;
}

int baton_cpu_give(struct baton_call *call)
{
	const struct baton_cpu *arg = &call->arg.cpu;
	bool start = arg->how == BATON_CPU_START;
	int ret;

	if ((!start && (arg->how != BATON_CPU_RECORD || arg->start_pa)) || !apic_id_is_valid(arg->apic_id) ||
	    arg->instance == BATON_SELF || !PAGE_ALIGNED(arg->start_pa))
		return -EINVAL;
	if (arg->start_pa >= SZ_1M)
		return -ERANGE;
	guard(mutex)(&baton_lock);
	if (!baton_instance_exists(arg->instance))
		return -ENOENT;
	ret = record(arg->apic_id, arg->instance);
	if (ret || !start)
		return ret;
	ret = send_init(arg->apic_id) ?: send_startup(arg->apic_id, arg->start_pa);
	if (ret) {
		pr_warn("APIC id %u does not take INIT and SIPI: %pe\n", arg->apic_id, ERR_PTR(ret));
		forget(find_given(arg->apic_id));
	}
	return ret;
}

int baton_cpu_take(struct baton_call *call)
{
	const struct baton_cpu *arg = &call->arg.cpu;
	struct given_cpu *cpu;
	int ret = 0;

	if ((arg->how != BATON_CPU_RECORD && arg->how != BATON_CPU_FENCE) || !apic_id_is_valid(arg->apic_id) ||
	    arg->instance == BATON_SELF || arg->start_pa)
		return -EINVAL;
	guard(mutex)(&baton_lock);
	scoped_guard(cpus_read_lock)
		if (apic_id_is_online(arg->apic_id))
			return -EBUSY;
	cpu = find_given(arg->apic_id);
	if (!cpu || !baton_instance_exists(arg->instance))
		return -ENOENT;
	if (cpu->instance != arg->instance)
		return -EBUSY;
	if (arg->how == BATON_CPU_FENCE)
		ret = send_init(arg->apic_id);
	if (!ret)
		forget(cpu);
	return ret;
}

int baton_cpu_info(struct baton_call *call)
{
	struct baton_cpu_info *info = &call->arg.cpu_info;

	if (info->cpu >= nr_cpu_ids || !cpu_possible(info->cpu))
		return -ENOENT;
	info->apic_id = cpu_physical_id(info->cpu);
	info->flags = (cpu_present(info->cpu) ? BATON_CPU_PRESENT : 0) | (cpu_online(info->cpu) ? BATON_CPU_ONLINE : 0);
	return baton_reply(call);
}

bool baton_cpus_recorded(u32 instance)
{
	struct given_cpu *cpu;

	lockdep_assert_held(&baton_lock);
	list_for_each_entry(cpu, &given, node)
		if (cpu->instance == instance)
			return true;
	return false;
}

/* A list of APIC ids such as "0-2,5". */
void baton_cpus_show(struct seq_file *seq, u32 instance)
{
	unsigned long *ids = bitmap_zalloc(MAX_LOCAL_APIC, GFP_KERNEL);
	struct given_cpu *cpu;
	int number;

	if (!ids)
		return seq_putc(seq, '?');
	if (instance == BATON_SELF)
		for_each_online_cpu(number)
			__set_bit(cpu_physical_id(number), ids);
	list_for_each_entry(cpu, &given, node)
		if (cpu->instance == instance)
			__set_bit(cpu->apic_id, ids);
	if (bitmap_empty(ids, MAX_LOCAL_APIC))
		seq_putc(seq, '-');
	else
		seq_printf(seq, "%*pbl", MAX_LOCAL_APIC, ids);
	bitmap_free(ids);
}

struct baton_line {
	int irq;
	struct eventfd_ctx *eventfd;
};

static irqreturn_t line_rings(int irq, void *data)
{
	eventfd_signal(((struct baton_line *)data)->eventfd);
	return IRQ_HANDLED;
}

void baton_doorbell_close(struct baton_line *line)
{
	free_irq(line->irq, line);
	irq_dispose_mapping(line->irq);
	eventfd_ctx_put(line->eventfd);
	kfree(line);
}

int baton_doorbell_open(struct baton_call *call)
{
	struct irq_alloc_info info = { .type = X86_IRQ_ALLOC_TYPE_PCI_MSI, .mask = cpumask_of(0) };
	struct baton_doorbell *arg = &call->arg.doorbell;
	struct baton_line *line;
	struct irq_cfg *cfg;
	int ret;

	guard(mutex)(&baton_lock);
	if (call->file->line)
		return -EBUSY;
	line = kzalloc(sizeof(*line), GFP_KERNEL);
	if (!line)
		return -ENOMEM;
	line->eventfd = eventfd_ctx_fdget(arg->eventfd);
	ret = -EINVAL;
	if (IS_ERR(line->eventfd))
		goto free_line;
	ret = line->irq = irq_domain_alloc_irqs(x86_vector_domain, 1, NUMA_NO_NODE, &info);
	if (ret < 0)
		goto put_eventfd;
	irq_set_handler(line->irq, handle_edge_irq);
	/* Before the start, so that it starts there; IRQF_NOBALANCING then keeps it there, against user space as well. */
	ret = irq_set_affinity(line->irq, cpumask_of(0)) ?:
	      request_irq(line->irq, line_rings, IRQF_NOBALANCING, "baton-doorbell", line);
	if (ret)
		goto dispose_irq;
	cfg = irqd_cfg(irq_get_irq_data(line->irq));
	arg->apic_id = cfg->dest_apicid;
	arg->vector = cfg->vector;
	ret = baton_reply(call);
	if (ret)
		goto free_irq;
	call->file->line = line;
	return 0;

free_irq:
	free_irq(line->irq, line);
dispose_irq:
	irq_dispose_mapping(line->irq);
put_eventfd:
	eventfd_ctx_put(line->eventfd);
free_line:
	kfree(line);
	return ret;
}

static bool may_ring(u32 apic_id, u32 vector)
{
	return apic_id_is_valid(apic_id) && vector >= 32 && vector <= 255;
}

/* Does not wait for delivery: the next write does, and a ring must not cost more than it has to. */
int baton_doorbell_ring(struct baton_call *call)
{
	struct baton_doorbell *arg = &call->arg.doorbell;

	if (!may_ring(arg->apic_id, arg->vector))
		return -EINVAL;
	return write_icr(arg->apic_id, APIC_DM_FIXED | arg->vector);
}

struct baton_notice {
	struct notifier_block block;
	struct baton_memory *memory;
	struct baton_panic_notice arg;
	u64 *word;
};

static bool notice_is_set;	/* under baton_lock */

/* Runs on a dying kernel: one store, one ICR write, no lock, no allocation, no wait without an end. */
static int notice_panic(struct notifier_block *block, unsigned long action, void *message)
{
	struct baton_notice *notice = container_of(block, struct baton_notice, block);

	WRITE_ONCE(*notice->word, notice->arg.value);
	if (notice->arg.vector)
		write_icr(notice->arg.apic_id, APIC_DM_FIXED | notice->arg.vector);
	return NOTIFY_DONE;
}

int baton_panic_notice_set(struct baton_call *call)
{
	const struct baton_panic_notice *arg = &call->arg.panic_notice;

	if (arg->reserved || !IS_ALIGNED(arg->pa, sizeof(u64)) || (arg->vector && !may_ring(arg->apic_id, arg->vector)))
		return -EINVAL;
	struct baton_notice *notice __free(kfree) = kzalloc(sizeof(*notice), GFP_KERNEL);
	if (!notice)
		return -ENOMEM;
	notice->block.notifier_call = notice_panic;
	notice->block.priority = INT_MAX;
	notice->arg = *arg;
	guard(mutex)(&baton_lock);
	if (notice_is_set)
		return -EBUSY;
	notice->memory = baton_memory_hold(arg->pa, sizeof(u64));
	if (!notice->memory)
		return -ENOENT;
	notice->word = memremap(arg->pa, sizeof(u64), MEMREMAP_WB);
	if (!notice->word) {
		baton_memory_unhold(notice->memory);
		return -ENOMEM;
	}
	notice_is_set = true;
	call->file->notice = no_free_ptr(notice);
	return atomic_notifier_chain_register(&panic_notifier_list, &call->file->notice->block);
}

void baton_panic_notice_clear(struct baton_notice *notice)
{
	atomic_notifier_chain_unregister(&panic_notifier_list, &notice->block);
	memunmap(notice->word);
	guard(mutex)(&baton_lock);
	baton_memory_unhold(notice->memory);
	notice_is_set = false;
	kfree(notice);
}

int baton_cpus_init(void)
{
	hotplug_state = cpuhp_setup_state_nocalls(CPUHP_BP_PREPARE_DYN, "baton:given", refuse_given, NULL);
	return min(hotplug_state, 0);
}

void baton_cpus_exit(void)
{
	cpuhp_remove_state_nocalls(hotplug_state);
}
