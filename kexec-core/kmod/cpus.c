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
 * Where the other kernel's bell is, user space reads in memory that the other can write. So a ring goes to a CPU that
 * is recorded for the named instance, or to the one bell that was named to this file (CONNECT): how a successor rings
 * its predecessor. Never to a CPU of this kernel. The local APIC has no mask for what other CPUs send; a flood is made
 * cheap instead: past BELL_LIMIT rings in a window none wakes anybody, and one signal follows for all of them.
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
#include <linux/xarray.h>
#include <asm/apic.h>
#include <asm/irqdomain.h>
#include "baton.h"

/* APIC id -> instance. Changed under baton_lock and cpus_read_lock; read under one lock of theirs, or RCU (RING). */
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

	if (ret)
		return ret;
	fsleep(us_between);
	return write_icr(apic_id, second);
}

static int send_init(u32 apic_id)
{
	return write_icr_twice(apic_id, APIC_INT_LEVELTRIG | APIC_INT_ASSERT | APIC_DM_INIT,
			       APIC_INT_LEVELTRIG | APIC_DM_INIT, 10000);
}

/* SIPI twice, as the specification asks for; a CPU that runs already ignores the second. */
static int send_start(u32 apic_id, u64 start_pa)
{
	u32 sipi = APIC_DM_STARTUP | PHYS_PFN(start_pa);
	int ret = send_init(apic_id);

	return ret ? ret : write_icr_twice(apic_id, sipi, sipi, 300);
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
	bool start = arg->how == BATON_CPU_START, is_new;
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
	is_new = given_to(arg->apic_id) == BATON_SELF;
	if (is_new) {
		ret = xa_err(xa_store(&given, arg->apic_id, xa_mk_value(arg->instance), GFP_KERNEL));
		if (ret)
			return ret;
		__module_get(THIS_MODULE);
	}
	if (start)
		ret = send_start(arg->apic_id, arg->start_pa);
	/* One that was the instance's before may run there still. */
	if (ret && is_new)
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
	ret = check_cpu(arg);
	if (ret)
		return ret;
	if (given_to(arg->apic_id) == BATON_SELF)
		return -ENOENT;
	if (arg->how == BATON_CPU_FENCE) {
		ret = send_init(arg->apic_id);
		if (ret)
			return ret;
	}
	forget(arg->apic_id);
	synchronize_rcu();	/* no RING is on its way to a CPU that can be this kernel's again */
	return 0;
}

int baton_cpu_info(struct baton_call *call)
{
	struct baton_cpu_info *info = call->arg;

	if (info->cpu >= nr_cpu_ids || !cpu_possible(info->cpu))
		return -ENOENT;
	info->apic_id = cpu_physical_id(info->cpu);
	info->flags = cpu_online(info->cpu) ? BATON_CPU_ONLINE : 0;
	if (cpu_present(info->cpu) || given_to(info->apic_id) != BATON_SELF)
		info->flags |= BATON_CPU_PRESENT;
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

/* On the way to a restart: without baton_lock, whose holder may have been stopped. */
void baton_cpus_stop_given(void)
{
	unsigned long apic_id;
	void *owner;

	xa_for_each(&given, apic_id, owner)
		send_init(apic_id);
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

/* As many as any update needs; the last of too many waits a window. */
#define BELL_WINDOW	msecs_to_jiffies(10)
#define BELL_LIMIT	32

static u64 bell_place(u32 apic_id, u32 vector)
{
	return (u64)vector << 32 | apic_id;
}

static irqreturn_t bell_rings(int irq, void *data)
{
	struct baton_bell *bell = data;

	WRITE_ONCE(bell->rings, bell->rings + 1);
	if (time_after(jiffies, bell->window_end)) {
		bell->window_end = jiffies + BELL_WINDOW;
		bell->in_window = 0;
	}
	if (bell->in_window++ < BELL_LIMIT) {
		eventfd_signal(bell->eventfd);
		return IRQ_HANDLED;
	}
	WRITE_ONCE(bell->muffled, bell->muffled + 1);
	if (bell->in_window == BELL_LIMIT + 1)
		mod_timer(&bell->timer, bell->window_end + 2);	/* after all that count to this window */
	return IRQ_HANDLED;
}

static void bell_window_ends(struct timer_list *timer)
{
	eventfd_signal(container_of(timer, struct baton_bell, timer)->eventfd);
}

/* A vector on CPU 0, for good. */
static int request_vector(struct baton_bell *bell)
{
	struct irq_alloc_info info = { .type = X86_IRQ_ALLOC_TYPE_PCI_MSI, .mask = cpumask_of(0) };
	struct irq_cfg *cfg;
	int irq, ret;

	irq = irq_domain_alloc_irqs(x86_vector_domain, 1, NUMA_NO_NODE, &info);
	if (irq < 0)
		return irq;
	irq_set_handler(irq, handle_edge_irq);
	/* Before the start, so that it starts there; IRQF_NOBALANCING then keeps it, against user space as well. */
	ret = irq_set_affinity(irq, cpumask_of(0));
	if (!ret)
		ret = request_irq(irq, bell_rings, IRQF_NOBALANCING, "baton-doorbell", bell);
	if (ret) {
		irq_dispose_mapping(irq);
		return ret;
	}
	cfg = irqd_cfg(irq_get_irq_data(irq));
	bell->irq = irq;
	bell->place = bell_place(cfg->dest_apicid, cfg->vector);
	return 0;
}

/* First what rings, then the timer that it may have started, then what both signal. */
void baton_doorbell_close(struct baton_file *file)
{
	struct baton_bell *bell = &file->bell;

	free_irq(bell->irq, bell);
	irq_dispose_mapping(bell->irq);
	timer_delete_sync(&bell->timer);
	eventfd_ctx_put(bell->eventfd);
	bell->eventfd = NULL;
	bell->place = 0;
}

int baton_doorbell_open(struct baton_call *call)
{
	struct baton_bell *bell = &call->file->bell;
	struct baton_doorbell *arg = call->arg;
	struct eventfd_ctx *eventfd;
	int ret;

	if (arg->instance)
		return -EINVAL;
	guard(mutex)(&baton_lock);
	if (bell->eventfd)
		return -EBUSY;
	eventfd = eventfd_ctx_fdget(arg->eventfd);
	if (IS_ERR(eventfd))
		return -EINVAL;
	bell->eventfd = eventfd;
	bell->window_end = jiffies;
	timer_setup(&bell->timer, bell_window_ends, 0);
	ret = request_vector(bell);
	if (ret) {
		eventfd_ctx_put(eventfd);
		bell->eventfd = NULL;
		return ret;
	}
	arg->apic_id = lower_32_bits(bell->place);
	arg->vector = upper_32_bits(bell->place);
	ret = baton_reply(call);
	if (ret)
		baton_doorbell_close(call->file);
	return ret;
}

static bool can_be_bell(u32 apic_id, u32 vector)
{
	return apic_id_is_valid(apic_id) && vector >= 32 && vector <= 255;
}

/* The predecessor's bell, which is no instance's. It may get another vector (its agent began anew), no other CPU. */
int baton_doorbell_connect(struct baton_call *call)
{
	const struct baton_doorbell *arg = call->arg;

	if (arg->instance || !can_be_bell(arg->apic_id, arg->vector))
		return -EINVAL;
	guard(mutex)(&baton_lock);
	if (call->file->peer && lower_32_bits(call->file->peer) != arg->apic_id)
		return -EBUSY;
	if (apic_id_is_online(arg->apic_id) || given_to(arg->apic_id) != BATON_SELF)
		return -EBUSY;
	WRITE_ONCE(call->file->peer, bell_place(arg->apic_id, arg->vector));
	return 0;
}

/* A file's own bell can be rung as well, to try it. */
static bool may_ring(const struct baton_file *file, const struct baton_doorbell *arg)
{
	u64 place = bell_place(arg->apic_id, arg->vector);

	if (arg->instance != BATON_SELF)
		return given_to(arg->apic_id) == arg->instance;
	if (place == READ_ONCE(file->bell.place))
		return true;
	return place == READ_ONCE(file->peer) && !apic_id_is_online(arg->apic_id);
}

/* Does not wait for delivery: the next write does, and a ring must not cost more than it has to. */
int baton_doorbell_ring(struct baton_call *call)
{
	const struct baton_doorbell *arg = call->arg;

	if (!can_be_bell(arg->apic_id, arg->vector))
		return -EINVAL;
	guard(rcu)();
	if (!may_ring(call->file, arg))
		return -ENOENT;
	return write_icr(arg->apic_id, APIC_DM_FIXED | arg->vector);
}

/* One per machine, so there is no more than this; under baton_lock. */
static struct {
	struct baton_panic_notice arg;
	struct baton_memory *memory;
	u64 *word;			/* NULL: no notice is set */
} notice;

/* Runs on a dying kernel: one store, one ICR write, no lock, no allocation, no wait without an end. */
void baton_notice_give(void)
{
	u64 *word = smp_load_acquire(&notice.word);

	if (!word)
		return;
	WRITE_ONCE(*word, notice.arg.value);
	if (notice.arg.vector && !apic_id_is_online(notice.arg.apic_id))
		write_icr(notice.arg.apic_id, APIC_DM_FIXED | notice.arg.vector);
}

int baton_panic_notice_set(struct baton_call *call)
{
	const struct baton_panic_notice *arg = call->arg;
	struct baton_memory *memory;
	u64 *word;

	if (arg->reserved || !IS_ALIGNED(arg->pa, sizeof(u64)) ||
	    (arg->vector && !can_be_bell(arg->apic_id, arg->vector)))
		return -EINVAL;
	guard(mutex)(&baton_lock);
	if (notice.word)
		return -EBUSY;
	if (arg->vector && bell_place(arg->apic_id, arg->vector) != call->file->peer)
		return -ENOENT;
	memory = baton_memory_find(arg->pa, sizeof(u64));
	if (!memory)
		return -ENOENT;
	word = memremap(arg->pa, sizeof(u64), MEMREMAP_WB);
	if (!word)
		return -ENOMEM;
	memory->users++;
	notice.arg = *arg;
	notice.memory = memory;
	smp_store_release(&notice.word, word);
	call->file->has_notice = true;
	return 0;
}

void baton_panic_notice_clear(void)
{
	guard(mutex)(&baton_lock);
	/* A panic stops this CPU before it looks here: it sees the word, or none. */
	memunmap(xchg(&notice.word, NULL));
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
