// SPDX-License-Identifier: GPL-2.0
/*
 * DOC: baton.ko, the kernel half of a live update
 *
 * Mechanism only: memory, CPUs, doorbells, leaving this kernel and coming back, chosen PCI functions. Why and when is
 * decided in user space; whatever can be computed there, is.
 *
 * 1. A caller with CAP_SYS_ADMIN and, as for kexec, CAP_SYS_BOOT opens /dev/baton and creates an instance.
 * 2. Memory objects and CPUs are taken out of this kernel and accounted to it.
 * 3. Doorbells, panic notices and mappings of memory are files: they end with their file, also when its owner dies.
 * 4. A frozen PCI function is restored with its file, unless the instance that it was frozen for has a CPU.
 * 5. Instances, memory objects, CPU records and PCI roots do not end with a file. The daemon that made them may
 *    crash, be restarted, and find them in /proc/multikernel. Each holds a reference on the module.
 * Unhappy path: every call either does all of what it says or none of it.
 */
#include <linux/capability.h>
#include <linux/cc_platform.h>
#include <linux/cpumask.h>
#include <linux/memory.h>
#include <linux/miscdevice.h>
#include <linux/proc_fs.h>
#include <linux/security.h>
#include <linux/uaccess.h>
#include <asm/apic.h>
#include <asm/cpufeature.h>
#include <asm/tsc.h>
#include "baton.h"

DEFINE_MUTEX(baton_lock);

int baton_reply(const struct baton_call *call)
{
	return copy_to_user(call->user, call->arg, call->copied) ? -EFAULT : 0;
}

static int baton_info(struct baton_call *call)
{
	struct baton_info *info = call->arg;

	info->abi = BATON_ABI_VERSION;
	info->flags = (x2apic_mode ? BATON_INFO_X2APIC : 0) |
		      (cpu_feature_enabled(X86_FEATURE_LA57) ? BATON_INFO_LA57 : 0) |
		      (security_locked_down(LOCKDOWN_KEXEC) ? BATON_INFO_LOCKDOWN : 0);
	info->tsc_khz = tsc_khz;
	info->memory_block_size = memory_block_size_bytes();
	info->possible_cpus = nr_cpu_ids;
	info->instances = baton_instances_count();
	info->rings = READ_ONCE(call->file->bell.rings);
	info->muffled = READ_ONCE(call->file->bell.muffled);
	return baton_reply(call);
}

/*
 * @min_size: up to the last field without which the call means nothing; shorter is EINVAL.
 * @mutates: needs CAP_SYS_ADMIN and CAP_SYS_BOOT, no lockdown, and a machine where the ways of baton.ko are open.
 */
struct baton_op {
	unsigned int cmd;
	size_t size;
	size_t min_size;
	bool mutates;
	baton_call_fn *run;
};

#define ARG_SIZE 128	/* the longest of our structs fits */

#define OP(_cmd, _run, _struct, _last, _mutates) \
	{ BATON_IOC_##_cmd, sizeof(struct _struct) + BUILD_BUG_ON_ZERO(sizeof(struct _struct) > ARG_SIZE), \
	  offsetofend(struct _struct, _last), _mutates, _run }

static const struct baton_op baton_ops[] = {
	OP(INFO, baton_info, baton_info, abi, false),
	OP(CPU_INFO, baton_cpu_info, baton_cpu_info, flags, false),
	OP(INSTANCE_CREATE, baton_instance_create, baton_instance, name, true),
	OP(INSTANCE_UPDATE, baton_instance_update, baton_instance, state, true),
	OP(INSTANCE_DESTROY, baton_instance_destroy, baton_instance, id, true),
	OP(MEM_TAKE, baton_mem_take, baton_mem, len, true),
	OP(MEM_GIVE_BACK, baton_mem_give_back, baton_mem, len, true),
	OP(MEM_FD, baton_mem_fd, baton_mem_fd, fd, true),
	OP(MEM_FILE, baton_mem_file, baton_mem_file, offset, true),
	OP(MEM_ADOPT, baton_mem_adopt, baton_adopt, len, true),
	OP(CPU_GIVE, baton_cpu_give_away, baton_cpu, how, true),
	OP(CPU_TAKE, baton_cpu_take_back, baton_cpu, how, true),
	OP(DOORBELL_OPEN, baton_doorbell_open, baton_doorbell, vector, true),
	OP(DOORBELL_RING, baton_doorbell_ring, baton_doorbell, vector, true),
	OP(DOORBELL_CONNECT, baton_doorbell_connect, baton_doorbell, vector, true),
	OP(YIELD, baton_yield, baton_yield, ident_pa, true),
	OP(PCI_ADD, baton_pci_add, baton_pci, functions, true),
	OP(PCI_REMOVE, baton_pci_remove, baton_pci, domain, true),
	OP(PCI_FREEZE, baton_pci_freeze, baton_pci_function, bdf, true),
	OP(PCI_RESTORE, baton_pci_restore, baton_pci_function, bdf, true),
	OP(PANIC_NOTICE, baton_panic_notice_set, baton_panic_notice, value, true),
	OP(END, baton_end, baton_end, how, true),
	OP(SLEEP_TYPE, baton_sleep_type, baton_sleep_type, type_b, false),
	OP(IOAPIC_MASK, baton_ioapic_mask, baton_ioapic, pa, true),
	OP(IOMMU_OFF, baton_iommu_off, baton_iommu, reserved, true),
};

static int baton_may_mutate(void)
{
	if (!capable(CAP_SYS_ADMIN) || !capable(CAP_SYS_BOOT) || security_locked_down(LOCKDOWN_KEXEC))
		return -EPERM;
	/* Page tables of our own need plain physical addresses, INIT/SIPI a real (or fully virtualised) APIC. */
	if (cc_platform_has(CC_ATTR_MEM_ENCRYPT) || cpu_feature_enabled(X86_FEATURE_XENPV) ||
	    !boot_cpu_has(X86_FEATURE_APIC))
		return -EOPNOTSUPP;
	return 0;
}

static long baton_ioctl(struct file *file, unsigned int cmd, unsigned long arg)
{
	u64 copy[ARG_SIZE / sizeof(u64)];
	struct baton_call call = { .file = file->private_data, .user = (void __user *)arg, .arg = copy };
	const struct baton_op *op;
	u32 user_size;
	int ret;

	for (op = baton_ops; op->cmd != cmd; op++)
		if (op == &baton_ops[ARRAY_SIZE(baton_ops) - 1])
			return -ENOTTY;
	ret = op->mutates ? baton_may_mutate() : 0;
	if (ret)
		return ret;
	if (get_user(user_size, (u32 __user *)call.user))
		return -EFAULT;
	if (user_size < op->min_size)
		return -EINVAL;
	if (user_size > PAGE_SIZE)
		return -E2BIG;
	ret = copy_struct_from_user(copy, op->size, call.user, user_size);
	if (ret)
		return ret;
	call.copied = min_t(size_t, user_size, op->size);
	return op->run(&call);
}

static int baton_open(struct inode *inode, struct file *file)
{
	file->private_data = kzalloc(sizeof(struct baton_file), GFP_KERNEL);
	return file->private_data ? 0 : -ENOMEM;
}

static int baton_close(struct inode *inode, struct file *file)
{
	struct baton_file *open = file->private_data;

	baton_frozen_close(open);
	if (open->has_notice)
		baton_panic_notice_clear();
	if (open->bell.eventfd)
		baton_doorbell_close(open);
	kfree(open);
	return 0;
}

static const struct file_operations baton_fops = {
	.owner = THIS_MODULE, .open = baton_open, .release = baton_close,
	.unlocked_ioctl = baton_ioctl, .compat_ioctl = compat_ptr_ioctl,
};

static struct miscdevice baton_device = {
	.minor = MISC_DYNAMIC_MINOR, .name = "baton", .fops = &baton_fops, .mode = 0600,
};

static struct proc_dir_entry *proc_entry;

static int __init baton_init(void)
{
	int ret;

	baton_instances_init();
	ret = baton_cpus_init();
	if (ret)
		return ret;
	baton_platform_init();
	proc_entry = proc_create_single("multikernel", 0444, NULL, baton_instances_show);
	ret = proc_entry ? misc_register(&baton_device) : -ENOMEM;
	if (ret) {
		proc_remove(proc_entry);
		baton_platform_exit();
		baton_cpus_exit();
	}
	return ret;
}

/* Whatever depends on the module holds a reference, so nothing is left to give back here. */
static void __exit baton_exit(void)
{
	misc_deregister(&baton_device);
	proc_remove(proc_entry);
	baton_platform_exit();
	baton_cpus_exit();
}

module_init(baton_init);
module_exit(baton_exit);
MODULE_LICENSE("GPL");
MODULE_DESCRIPTION("Mechanism of a live update: memory, CPUs, doorbells, yield, PCI functions");
MODULE_VERSION("1");
