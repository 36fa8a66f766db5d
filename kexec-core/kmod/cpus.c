// SPDX-License-Identifier: GPL-2.0
/*
 * DOC: CPUs, doorbells, the panic notice
 *
 * A CPU that user space has offlined can be recorded as given to an instance. Until its record is taken back, a
 * hotplug callback of ours refuses to online it: INIT and SIPI would tear it out of the other kernel.
 *
 * 1. GIVE records it; START also sends INIT, SIPI, SIPI, so that it runs at start_pa in real mode.
 * 2. TAKE ends the record; FENCE first sends INIT, so that it stops whatever it does and waits for a SIPI.
 * A doorbell is a vector on CPU 0, the one that is offlined last. Its affinity is fixed, so that vector and APIC id
 * can be told to the other kernel once and for all.
 *
 * The ICR is written through struct apic, which knows xAPIC from x2APIC and a hypervisor's. In xAPIC mode it is two
 * registers: icr_write() keeps interrupts off between them, and Linux's NMIs leave the first one alone.
 */
#include <linux/cpu.h>
#include <linux/delay.h>
#include <linux/eventfd.h>
#include <linux/interrupt.h>
#include <linux/irq.h>
#include <linux/irqdomain.h>
#include <linux/panic_notifier.h>
#include <linux/xarray.h>
#include <asm/apic.h>
#include <asm/irqdomain.h>
#include "baton.h"

/* APIC id -> instance. Changed under baton_lock and cpus_read_lock; baton_lock or cpus_write_lock is enough to read. */
static DEFINE_XARRAY(given);
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

/* BATON_SELF, to which no CPU is given, when it is nobody's. */
static u32 given_to(u32 apic_id)
{
	return xa_to_value(xa_load(&given, apic_id));
}

static int refuse_given(unsigned int cpu)
{
	return given_to(cpu_physical_id(cpu)) == BATON_SELF ? 0 : -EBUSY;
}

static int write_icr(u32 apic_id, u32 command)
{
	/* What was written to shared memory must be there first; in x2APIC mode nothing else orders it. */
	mb();
	rmb();
	/* An interrupt between the wait and the write may send an IPI of its own. Busy for 1 ms: nobody is there. */
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
static int write_icr_twice(u32 apic_id, u32 first, u32 second, unsigned int us_between)
{
	int ret = write_icr(apic_id, first);

	fsleep(us_between);
	return ret ?: write_icr(apic_id, second);
}

static int send_init(u32 apic_id)
{
	return write_icr_twice(apic_id, APIC_INT_LEVELTRIG | APIC_INT_ASSERT | APIC_DM_INIT,
			       APIC_INT_LEVELTRIG | APIC_DM_INIT, 10000);
}

static void forget(u32 apic_id)
{
	xa_erase(&given, apic_id);
	module_put(THIS_MODULE);
}

/* Whether the CPU is the instance's, or can be: it is offline here and nobody else's. */
static int check_cpu(const struct baton_cpu *arg)
{
	u32 owner = given_to(arg->apic_id);

	if (!baton_instance_exists(arg->instance))
		return -ENOENT;
	if (apic_id_is_online(arg->apic_id) || (owner != BATON_SELF && owner != arg->instance))
		return -EBUSY;
	return 0;
}

int baton_cpu_give(struct baton_call *call)
{
	const struct baton_cpu *arg = call->arg;
	u32 sipi = APIC_DM_STARTUP | PHYS_PFN(arg->start_pa);
	bool start = arg->how == BATON_CPU_START;
	int ret;

	if ((!start && (arg->how != BATON_CPU_RECORD || arg->start_pa)) || !apic_id_is_valid(arg->apic_id) ||
	    arg->instance == BATON_SELF || !PAGE_ALIGNED(arg->start_pa))
		return -EINVAL;
	if (arg->start_pa >= SZ_1M)
		return -ERANGE;
	guard(mutex)(&baton_lock);
	guard(cpus_read_lock)();	/* no CPU comes between the check and the record, which then keeps it away */
	ret = check_cpu(arg);
	if (ret)
		return ret;
	if (given_to(arg->apic_id) == BATON_SELF) {
		ret = xa_err(xa_store(&given, arg->apic_id, xa_mk_value(arg->instance), GFP_KERNEL));
		if (ret)
			return ret;
		__module_get(THIS_MODULE);
	}
	/* SIPI twice, as the specification asks for; a CPU that runs already ignores the second. */
	if (start)
		ret = send_init(arg->apic_id) ?: write_icr_twice(arg->apic_id, sipi, sipi, 300);
	if (ret)
		forget(arg->apic_id);
	return ret;
}

int baton_cpu_take(struct baton_call *call)
{
	const struct baton_cpu *arg = call->arg;
	int ret;

	if ((arg->how != BATON_CPU_RECORD && arg->how != BATON_CPU_FENCE) || !apic_id_is_valid(arg->apic_id) ||
	    arg->instance == BATON_SELF || arg->start_pa)
		return -EINVAL;
	guard(mutex)(&baton_lock);
	guard(cpus_read_lock)();
	ret = check_cpu(arg) ?: given_to(arg->apic_id) == BATON_SELF ? -ENOENT : 0;
	if (!ret && arg->how == BATON_CPU_FENCE)
		ret = send_init(arg->apic_id);
	if (!ret)
		forget(arg->apic_id);
	return ret;
}

int baton_cpu_info(struct baton_call *call)
{
	struct baton_cpu_info *info = call->arg;

	if (info->cpu >= nr_cpu_ids || !cpu_possible(info->cpu))
		return -ENOENT;
	info->apic_id = cpu_physical_id(info->cpu);
	info->flags = (cpu_present(info->cpu) ? BATON_CPU_PRESENT : 0) | (cpu_online(info->cpu) ? BATON_CPU_ONLINE : 0);
	return baton_reply(call);
}

bool baton_cpus_recorded(u32 instance)
{
	unsigned long apic_id;
	void *owner;

	lockdep_assert_held(&baton_lock);
	xa_for_each(&given, apic_id, owner)
		if (xa_to_value(owner) == instance)
			return true;
	return false;
}

/* A list of APIC ids such as "0-2,5". */
void baton_cpus_show(struct seq_file *seq, u32 instance)
{
	unsigned long *ids __free(bitmap) = bitmap_zalloc(MAX_LOCAL_APIC, GFP_KERNEL), apic_id;
	void *owner;
	int cpu;

	if (!ids)
		return seq_putc(seq, '?');
	if (instance == BATON_SELF)
		for_each_online_cpu(cpu)
			__set_bit(cpu_physical_id(cpu), ids);
	xa_for_each(&given, apic_id, owner)
		if (xa_to_value(owner) == instance)
			__set_bit(apic_id, ids);
	if (bitmap_empty(ids, MAX_LOCAL_APIC))
		seq_putc(seq, '-');
	else
		seq_printf(seq, "%*pbl", MAX_LOCAL_APIC, ids);
}

static irqreturn_t doorbell_rings(int irq, void *eventfd)
{
	eventfd_signal(eventfd);
	return IRQ_HANDLED;
}

void baton_doorbell_close(struct baton_file *file)
{
	free_irq(file->irq, file->doorbell);
	irq_dispose_mapping(file->irq);
	eventfd_ctx_put(file->doorbell);
}

int baton_doorbell_open(struct baton_call *call)
{
	struct irq_alloc_info info = { .type = X86_IRQ_ALLOC_TYPE_PCI_MSI, .mask = cpumask_of(0) };
	struct baton_doorbell *arg = call->arg;
	struct eventfd_ctx *eventfd;
	struct irq_cfg *cfg;
	int irq, ret;

	guard(mutex)(&baton_lock);
	if (call->file->doorbell)
		return -EBUSY;
	eventfd = eventfd_ctx_fdget(arg->eventfd);
	if (IS_ERR(eventfd))
		return -EINVAL;
	ret = irq = irq_domain_alloc_irqs(x86_vector_domain, 1, NUMA_NO_NODE, &info);
	if (ret < 0)
		goto put_eventfd;
	irq_set_handler(irq, handle_edge_irq);
	/* Before the start, so that it starts there; IRQF_NOBALANCING then keeps it, against user space as well. */
	ret = irq_set_affinity(irq, cpumask_of(0)) ?:
	      request_irq(irq, doorbell_rings, IRQF_NOBALANCING, "baton-doorbell", eventfd);
	if (ret)
		goto dispose_irq;
	cfg = irqd_cfg(irq_get_irq_data(irq));
	arg->apic_id = cfg->dest_apicid;
	arg->vector = cfg->vector;
	ret = baton_reply(call);
	if (ret)
		goto free_irq;
	call->file->doorbell = eventfd;
	call->file->irq = irq;
	return 0;

free_irq:
	free_irq(irq, eventfd);
dispose_irq:
	irq_dispose_mapping(irq);
put_eventfd:
	eventfd_ctx_put(eventfd);
	return ret;
}

static bool may_ring(u32 apic_id, u32 vector)
{
	return apic_id_is_valid(apic_id) && vector >= 32 && vector <= 255;
}

/* Does not wait for delivery: the next write does, and a ring must not cost more than it has to. */
int baton_doorbell_ring(struct baton_call *call)
{
	struct baton_doorbell *arg = call->arg;

	if (!may_ring(arg->apic_id, arg->vector))
		return -EINVAL;
	return write_icr(arg->apic_id, APIC_DM_FIXED | arg->vector);
}

/* One per machine, so there is no more than this; under baton_lock. */
static struct {
	struct baton_panic_notice arg;
	struct baton_memory *memory;
	u64 *word;			/* NULL: no notice is set */
} notice;

/* Runs on a dying kernel: one store, one ICR write, no lock, no allocation, no wait without an end. */
static int notice_panic(struct notifier_block *block, unsigned long action, void *message)
{
	WRITE_ONCE(*notice.word, notice.arg.value);
	if (notice.arg.vector)
		write_icr(notice.arg.apic_id, APIC_DM_FIXED | notice.arg.vector);
	return NOTIFY_DONE;
}

static struct notifier_block notice_block = { .notifier_call = notice_panic, .priority = INT_MAX };

int baton_panic_notice_set(struct baton_call *call)
{
	const struct baton_panic_notice *arg = call->arg;
	struct baton_memory *memory;
	u64 *word;

	if (arg->reserved || !IS_ALIGNED(arg->pa, sizeof(u64)) || (arg->vector && !may_ring(arg->apic_id, arg->vector)))
		return -EINVAL;
	guard(mutex)(&baton_lock);
	if (notice.word)
		return -EBUSY;
	memory = baton_memory_find(arg->pa, sizeof(u64));
	if (!memory)
		return -ENOENT;
	word = memremap(arg->pa, sizeof(u64), MEMREMAP_WB);
	if (!word)
		return -ENOMEM;
	memory->users++;
	notice = (typeof(notice)) { .arg = *arg, .memory = memory, .word = word };
	call->file->has_notice = true;
	return atomic_notifier_chain_register(&panic_notifier_list, &notice_block);
}

void baton_panic_notice_clear(void)
{
	guard(mutex)(&baton_lock);
	atomic_notifier_chain_unregister(&panic_notifier_list, &notice_block);
	memunmap(notice.word);
	notice.word = NULL;
	notice.memory->users--;
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
