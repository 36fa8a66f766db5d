// SPDX-License-Identifier: GPL-2.0
/*
 * DOC: CPUs, doorbells, the panic notice
 *
 * A CPU that is offline here can be recorded as given to an instance. User space has offlined it through sysfs before; from then on
 * a hotplug callback of ours refuses to online it until its record is taken back, because INIT and SIPI would tear it out of the
 * other kernel.
 *
 * 1. GIVE records it; START also sends INIT, SIPI, SIPI, so that it runs at start_pa in real mode.
 * 2. TAKE ends the record; FENCE first sends INIT, so that it stops whatever it does and waits for a SIPI. Then it can be
 *    onlined here as ever.
 *
 * A doorbell is a vector on CPU 0, which Linux never offlines where it can be the CPU that the firmware booted; affinity is fixed
 * there, so that vector and APIC id can be told to the other kernel once and for all.
 *
 * The ICR is written through struct apic, which knows xAPIC from x2APIC and what a hypervisor put in between. In xAPIC mode it is two
 * registers: icr_write() keeps interrupts off between them, and what Linux sends from NMIs uses a shorthand, which leaves the
 * destination register alone.
 */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/bitmap.h>
#include <linux/cpu.h>
#include <linux/cpuhotplug.h>
#include <linux/delay.h>
#include <linux/eventfd.h>
#include <linux/interrupt.h>
#include <linux/io.h>
#include <linux/irq.h>
#include <linux/irqdomain.h>
#include <linux/list.h>
#include <linux/mm.h>
#include <linux/panic_notifier.h>
#include <linux/seq_file.h>
#include <linux/sizes.h>
#include <linux/slab.h>
#include <linux/smp.h>
#include <linux/spinlock.h>
#include <asm/apic.h>
#include <asm/hw_irq.h>
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
static enum cpuhp_state hotplug_state;

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
	struct given_cpu *found;

	spin_lock(&given_lock);
	found = find_given(cpu_physical_id(cpu));
	spin_unlock(&given_lock);
	return found ? -EBUSY : 0;
}

/* Bounded: an ICR that stays busy this long has nobody at the other end. */
static int wait_icr_idle(void)
{
	if (x2apic_mode)
		return 0;
	for (int us = 0; us < 1000; us++) {
		if (!(apic->icr_read() & APIC_ICR_BUSY))
			return 0;
		udelay(1);
	}
	return -EIO;
}

static int write_icr(u32 apic_id, u32 command)
{
	unsigned long flags;
	int ret;

	/* What was written to shared memory must be there before the interrupt is; in x2APIC mode nothing else orders it. */
	mb();
	rmb();
	/* An interrupt that comes between the wait and the write may send an IPI of its own. */
	local_irq_save(flags);
	ret = wait_icr_idle();
	if (!ret)
		apic->icr_write(command, apic_id);
	local_irq_restore(flags);
	return ret;
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
	int ret = 0;

	for (int i = 0; i < 2 && !ret; i++) {
		ret = write_icr(apic_id, APIC_DM_STARTUP | (start_pa >> PAGE_SHIFT));
		usleep_range(300, 500);
	}
	return ret;
}

static void forget(struct given_cpu *cpu)
{
	spin_lock(&given_lock);
	list_del(&cpu->node);
	spin_unlock(&given_lock);
	kfree(cpu);
	baton_release();
}

int baton_cpu_give(struct baton_call *call)
{
	struct baton_cpu *arg = &call->cpu;
	struct given_cpu *cpu, *known;
	int ret;

	if (arg->how != BATON_CPU_RECORD && arg->how != BATON_CPU_START)
		return -EINVAL;
	if (!apic_id_is_valid(arg->apic_id) || arg->instance == BATON_SELF || !PAGE_ALIGNED(arg->start_pa) ||
	    (arg->how == BATON_CPU_RECORD && arg->start_pa))
		return -EINVAL;
	if (arg->start_pa >= SZ_1M)
		return -ERANGE;
	cpu = kzalloc(sizeof(*cpu), GFP_KERNEL);
	if (!cpu)
		return -ENOMEM;
	cpu->apic_id = arg->apic_id;
	cpu->instance = arg->instance;

	ret = mutex_lock_killable(&baton_lock);
	if (ret)
		goto free_cpu;
	ret = -ENOENT;
	if (!baton_instance_exists(arg->instance))
		goto unlock;

	/* No CPU comes or goes between the check and the record; afterwards refuse_given() keeps it away. */
	cpus_read_lock();
	known = find_given(arg->apic_id);
	ret = apic_id_is_online(arg->apic_id) || (known && known->instance != arg->instance) ? -EBUSY : 0;
	if (!ret && !known) {
		spin_lock(&given_lock);
		list_add_tail(&cpu->node, &given);
		spin_unlock(&given_lock);
		baton_depend();
	}
	cpus_read_unlock();
	if (ret)
		goto unlock;

	if (arg->how == BATON_CPU_START)
		ret = send_init(arg->apic_id) ?: send_startup(arg->apic_id, arg->start_pa);
	if (ret)
		pr_warn("APIC id %u does not take INIT and SIPI: %pe\n", arg->apic_id, ERR_PTR(ret));
	if (ret && !known)
		forget(cpu);
	else if (known)
		kfree(cpu);
	mutex_unlock(&baton_lock);
	return ret;

unlock:
	mutex_unlock(&baton_lock);
free_cpu:
	kfree(cpu);
	return ret;
}

int baton_cpu_take(struct baton_call *call)
{
	struct baton_cpu *arg = &call->cpu;
	struct given_cpu *cpu;
	bool online;
	int ret;

	if (arg->how != BATON_CPU_RECORD && arg->how != BATON_CPU_FENCE)
		return -EINVAL;
	if (!apic_id_is_valid(arg->apic_id) || arg->instance == BATON_SELF || arg->start_pa)
		return -EINVAL;
	ret = mutex_lock_killable(&baton_lock);
	if (ret)
		return ret;
	cpu = find_given(arg->apic_id);
	cpus_read_lock();
	online = apic_id_is_online(arg->apic_id);
	cpus_read_unlock();
	if (online)
		ret = -EBUSY;
	else if (!baton_instance_exists(arg->instance) || !cpu)
		ret = -ENOENT;
	else if (cpu->instance != arg->instance)
		ret = -EBUSY;
	else if (arg->how == BATON_CPU_FENCE)
		ret = send_init(arg->apic_id);
	if (!ret)
		forget(cpu);
	mutex_unlock(&baton_lock);
	return ret;
}

int baton_cpu_info(struct baton_call *call)
{
	struct baton_cpu_info *info = &call->cpu_info;

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
	if (instance == BATON_SELF) {
		cpus_read_lock();
		for_each_online_cpu(number)
			__set_bit(cpu_physical_id(number), ids);
		cpus_read_unlock();
	}
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
	struct baton_line *line = data;

	eventfd_signal(line->eventfd);
	return IRQ_HANDLED;
}

int baton_doorbell_open(struct baton_call *call)
{
	struct baton_doorbell *arg = &call->doorbell;
	struct irq_alloc_info info = { .type = X86_IRQ_ALLOC_TYPE_PCI_MSI, .mask = cpumask_of(0) };
	struct baton_line *line;
	struct irq_cfg *cfg;
	int ret;

	line = kzalloc(sizeof(*line), GFP_KERNEL);
	if (!line)
		return -ENOMEM;
	mutex_lock(&call->file->lock);
	if (call->file->line) {
		ret = -EBUSY;
		goto free_line;
	}
	line->eventfd = eventfd_ctx_fdget(arg->eventfd);
	if (IS_ERR(line->eventfd)) {
		ret = -EINVAL;
		goto free_line;
	}
	ret = irq_domain_alloc_irqs(x86_vector_domain, 1, NUMA_NO_NODE, &info);
	if (ret < 0)
		goto put_eventfd;
	line->irq = ret;
	irq_set_handler(line->irq, handle_edge_irq);
	/* Before the start, so that it starts there; IRQF_NOBALANCING then keeps it there, against user space as well. */
	ret = irq_set_affinity(line->irq, cpumask_of(0));
	if (ret)
		goto dispose_irq;
	ret = request_irq(line->irq, line_rings, IRQF_NOBALANCING, "baton-doorbell", line);
	if (ret)
		goto dispose_irq;
	cfg = irqd_cfg(irq_get_irq_data(line->irq));
	arg->apic_id = cfg->dest_apicid;
	arg->vector = cfg->vector;
	ret = baton_reply(call);
	if (ret)
		goto free_irq;
	call->file->line = line;
	mutex_unlock(&call->file->lock);
	return 0;

free_irq:
	free_irq(line->irq, line);
dispose_irq:
	irq_dispose_mapping(line->irq);
put_eventfd:
	eventfd_ctx_put(line->eventfd);
free_line:
	mutex_unlock(&call->file->lock);
	kfree(line);
	return ret;
}

void baton_doorbell_close(struct baton_line *line)
{
	free_irq(line->irq, line);
	irq_dispose_mapping(line->irq);
	eventfd_ctx_put(line->eventfd);
	kfree(line);
}

static bool may_ring(u32 apic_id, u32 vector)
{
	return apic_id_is_valid(apic_id) && vector >= 32 && vector <= 255;
}

/* Does not wait for delivery: the next write does, and a ring must not cost more than it has to. */
int baton_doorbell_ring(struct baton_call *call)
{
	struct baton_doorbell *arg = &call->doorbell;

	if (!may_ring(arg->apic_id, arg->vector))
		return -EINVAL;
	return write_icr(arg->apic_id, APIC_DM_FIXED | arg->vector);
}

struct baton_notice {
	struct notifier_block block;
	struct baton_memory *memory;
	u64 *word;
	u64 value;
	u32 apic_id;
	u32 vector;
};

static bool notice_is_set;	/* under baton_lock */

/* Runs on a dying kernel: one store, one ICR write, no lock, no allocation, no wait without an end. */
static int notice_panic(struct notifier_block *block, unsigned long action, void *message)
{
	struct baton_notice *notice = container_of(block, struct baton_notice, block);

	WRITE_ONCE(*notice->word, notice->value);
	if (notice->vector)
		write_icr(notice->apic_id, APIC_DM_FIXED | notice->vector);
	return NOTIFY_DONE;
}

int baton_panic_notice_set(struct baton_call *call)
{
	struct baton_panic_notice *arg = &call->panic_notice;
	struct baton_notice *notice;
	int ret;

	if (arg->reserved || !IS_ALIGNED(arg->pa, sizeof(u64)) || (arg->vector && !may_ring(arg->apic_id, arg->vector)))
		return -EINVAL;
	notice = kzalloc(sizeof(*notice), GFP_KERNEL);
	if (!notice)
		return -ENOMEM;
	notice->block.notifier_call = notice_panic;
	notice->block.priority = INT_MAX;
	notice->value = arg->value;
	notice->apic_id = arg->apic_id;
	notice->vector = arg->vector;

	mutex_lock(&call->file->lock);
	mutex_lock(&baton_lock);
	ret = -EBUSY;
	if (notice_is_set)
		goto unlock;
	ret = -ENOENT;
	notice->memory = baton_memory_hold(arg->pa, sizeof(u64), BATON_MEM_OUTSIDE);
	if (!notice->memory)
		goto unlock;
	ret = -ENOMEM;
	notice->word = memremap(arg->pa, sizeof(u64), MEMREMAP_WB);
	if (!notice->word)
		goto unhold;
	atomic_notifier_chain_register(&panic_notifier_list, &notice->block);
	notice_is_set = true;
	call->file->notice = notice;
	mutex_unlock(&baton_lock);
	mutex_unlock(&call->file->lock);
	return 0;

unhold:
	baton_memory_unhold(notice->memory);
unlock:
	mutex_unlock(&baton_lock);
	mutex_unlock(&call->file->lock);
	kfree(notice);
	return ret;
}

void baton_panic_notice_clear(struct baton_notice *notice)
{
	atomic_notifier_chain_unregister(&panic_notifier_list, &notice->block);
	memunmap(notice->word);
	mutex_lock(&baton_lock);
	baton_memory_unhold(notice->memory);
	notice_is_set = false;
	mutex_unlock(&baton_lock);
	kfree(notice);
}

int baton_cpus_init(void)
{
	int ret = cpuhp_setup_state_nocalls(CPUHP_BP_PREPARE_DYN, "baton:given", refuse_given, NULL);

	if (ret < 0)
		return ret;
	hotplug_state = ret;
	return 0;
}

void baton_cpus_exit(void)
{
	cpuhp_remove_state_nocalls(hotplug_state);
}
