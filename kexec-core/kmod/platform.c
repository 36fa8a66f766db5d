// SPDX-License-Identifier: GPL-2.0
/*
 * DOC: What two kernels on one machine must not do to each other by ending, sleeping, leaving
 *
 * 1. END says whose the machine is. As long as it is this kernel's (MACHINE), a restart, kexec or power-off first
 *    stops the CPUs that were given away, so that nothing runs on in memory that the next kernel takes. When it is
 *    another kernel's (ALONE), the same stops this kernel's own CPUs and touches nothing else; a panic never resets.
 * 2. System sleep is refused while there is another kernel: it would not wake up again.
 * 3. A CPU that is given away is not present here. Linux sends IPIs to "all but self" by shorthand, which reaches
 *    every CPU of the machine, unless a CPU that it once booted is no longer present (apic_smt_update()).
 * 4. IOAPIC_MASK silences an I/O APIC, IOMMU_OFF has DMA go untranslated, for a kernel that leaves; SLEEP_TYPE says how
 *    its heir powers the machine off.
 */
#include <linux/acpi.h>
#include <linux/cpu.h>
#include <linux/panic_notifier.h>
#include <linux/reboot.h>
#include <linux/suspend.h>
#include <asm/apic.h>
#include <asm/x86_init.h>
#include "baton.h"

/* Written under baton_lock, read by notifiers, which cannot take it. While it is set, the module stays. */
static bool ends_alone;

int baton_end(struct baton_call *call)
{
	const struct baton_end *arg = call->arg;

	if (arg->how != BATON_END_MACHINE && arg->how != BATON_END_ALONE)
		return -EINVAL;
	guard(mutex)(&baton_lock);
	if (arg->how == BATON_END_ALONE && !ends_alone)
		__module_get(THIS_MODULE);
	if (arg->how == BATON_END_MACHINE && ends_alone)
		module_put(THIS_MODULE);
	WRITE_ONCE(ends_alone, arg->how == BATON_END_ALONE);
	return 0;
}

static int on_reboot(struct notifier_block *block, unsigned long action, void *command)
{
	if (!READ_ONCE(ends_alone)) {
		baton_cpus_stop_given();
		baton_frozen_restore_all();
		return NOTIFY_DONE;
	}
	pr_emerg("baton: the machine is another kernel's: this one stops here, and nothing else does\n");
	local_irq_disable();
	smp_send_stop();
	baton_notice_give();
	for (;;)
		halt();
}

/* The other CPUs have stopped. Whether panic() restarts the machine next depends on this variable alone. */
static int on_panic(struct notifier_block *block, unsigned long action, void *message)
{
	baton_notice_give();
	if (READ_ONCE(ends_alone))
		panic_timeout = 0;
	return NOTIFY_DONE;
}

static int on_sleep(struct notifier_block *block, unsigned long event, void *unused)
{
	if (event != PM_SUSPEND_PREPARE && event != PM_HIBERNATION_PREPARE && event != PM_RESTORE_PREPARE)
		return NOTIFY_DONE;
	return notifier_from_errno(READ_ONCE(ends_alone) || baton_instances_count() ? -EBUSY : 0);
}

static struct notifier_block reboot_block = { .notifier_call = on_reboot, .priority = INT_MAX };
static struct notifier_block panic_block = { .notifier_call = on_panic, .priority = INT_MAX };
static struct notifier_block sleep_block = { .notifier_call = on_sleep };

static void set_present(u32 apic_id, bool present)
{
	int cpu;

	for_each_possible_cpu(cpu)
		if (cpu_physical_id(cpu) == apic_id) {
			set_cpu_present(cpu, present);
			/* Refused where it is not present; but it has Linux choose anew how it sends IPIs. */
			if (!present)
				add_cpu(cpu);
		}
}

int baton_cpu_give_away(struct baton_call *call)
{
	const struct baton_cpu *arg = call->arg;
	int ret = baton_cpu_give(call);

	if (!ret)
		set_present(arg->apic_id, false);
	return ret;
}

int baton_cpu_take_back(struct baton_call *call)
{
	const struct baton_cpu *arg = call->arg;
	int ret = baton_cpu_take(call);

	if (!ret)
		set_present(arg->apic_id, true);
	return ret;
}

/* Index and data register of an I/O APIC (82093AA, section 3.1): one pair, which is why nobody else may run. */
static u32 ioapic_read(void __iomem *base, u32 reg)
{
	writel(reg, base);
	return readl(base + 0x10);
}

int baton_ioapic_mask(struct baton_call *call)
{
	const struct baton_ioapic *arg = call->arg;
	void __iomem *base;
	int ret = 0;

	if (arg->reserved || !IS_ALIGNED(arg->pa, 16))
		return -EINVAL;
	if (arg->pa >= BIT_ULL(32) || region_intersects(arg->pa & PAGE_MASK, PAGE_SIZE, IORESOURCE_SYSTEM_RAM,
							 IORES_DESC_NONE) != REGION_DISJOINT)
		return -ERANGE;
	base = ioremap(arg->pa, 0x20);
	if (!base)
		return -ENOMEM;
	scoped_guard(cpus_read_lock) {
		guard(irqsave)();
		u32 version = ioapic_read(base, 1);

		if (num_online_cpus() != 1)
			ret = -EBUSY;
		else if (version == U32_MAX)
			ret = -ENOENT;
		for (u32 pin = 0; !ret && pin <= (version >> 16 & 0xff); pin++) {
			u32 low = ioapic_read(base, 0x10 + 2 * pin);

			/* Bit 16 masks. The firmware's SMIs are left alone, as clear_IO_APIC() leaves them. */
			if ((low & APIC_MODE_MASK) != APIC_DM_SMI)
				writel(low | BIT(16), base + 0x10);
		}
	}
	iounmap(base);
	return ret;
}

/* What kexec calls before it jumps; it sleeps, and does nothing where there is no IOMMU. */
int baton_iommu_off(struct baton_call *call)
{
	const struct baton_iommu *arg = call->arg;

	if (arg->reserved)
		return -EINVAL;
	if (num_online_cpus() != 1)
		return -EBUSY;
	x86_platform.iommu_shutdown();
	return 0;
}

int baton_sleep_type(struct baton_call *call)
{
	struct baton_sleep_type *arg = call->arg;
	u8 type_a, type_b;

	if (arg->reserved || arg->state > ACPI_STATE_S5)
		return -EINVAL;
	if (acpi_disabled || ACPI_FAILURE(acpi_get_sleep_type_data(arg->state, &type_a, &type_b)))
		return -EOPNOTSUPP;
	arg->type_a = type_a;
	arg->type_b = type_b;
	return baton_reply(call);
}

void baton_platform_init(void)
{
	register_reboot_notifier(&reboot_block);
	register_pm_notifier(&sleep_block);
	atomic_notifier_chain_register(&panic_notifier_list, &panic_block);
}

void baton_platform_exit(void)
{
	atomic_notifier_chain_unregister(&panic_notifier_list, &panic_block);
	unregister_pm_notifier(&sleep_block);
	unregister_reboot_notifier(&reboot_block);
}
