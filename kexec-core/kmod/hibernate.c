// SPDX-License-Identifier: GPL-2.0
/*
 * DOC: PCI functions that hibernate while another kernel has them
 *
 * 1. FREEZE does to one function, and to every device below it, what hibernation does before it takes its image. It
 *    locks them all, so that nobody unbinds, resets or removes one; looks for what stands against it;
 *    prepare, freeze, freeze_late, interrupts off, freeze_noirq; bus mastership off.
 * 2. RESTORE does the same backwards. Always `restore`: `thaw` is for a device that nobody has touched meanwhile.
 * Unhappy path: what was frozen is restored. The locks are given up last: whoever waits for one finds the device as its
 * driver knows it. What is called, and when, is as in drivers/base/power/main.c (device_suspend() and its relatives).
 *
 * Locks belong to a task, so each function has a thread that does it all, without baton_lock. A driver whose device
 * never answers blocks that thread and whoever waits for it, and he can be killed.
 */
#include <linux/completion.h>
#include <linux/interrupt.h>
#include <linux/kref.h>
#include <linux/kthread.h>
#include <linux/netdevice.h>
#include <linux/pci.h>
#include <linux/pm_runtime.h>
#include <linux/rtnetlink.h>
#include <linux/suspend.h>
#include <linux/virtio.h>
#include "baton.h"
#include "compat.h"

/*
 * An interface. Its driver closes it when it freezes, unseen by the network stack, which may stop it once more, open
 * it, ask for statistics. So from before that until after restore, its operations are ours. Under the rtnl lock.
 */
struct netdev_guard {
	struct list_head node;
	struct net_device *dev;
	const struct net_device_ops *theirs;
	struct net_device_ops ours;
	struct rtnl_link_stats64 stats;	/* as they were */
	bool frozen;			/* its driver is not to be called any more */
	bool stopped;			/* the stack has stopped it since */
	bool had_carrier;		/* which its driver has not taken away itself */
};

enum frozen_state { FREEZING, FROZEN, RESTORING };

/* One function. The first part is under baton_lock, the second is its thread's. */
struct baton_frozen {
	struct list_head node;
	struct kref users;		/* its thread, and whoever waits for it */
	enum frozen_state state;
	struct baton_file *file;	/* who froze it; NULL when that is closed */
	int result;			/* of what was asked for last */
	struct baton_pci_function said;	/* what was asked for, and the answer */
	struct completion settled, wanted_back, over;	/* FREEZE has ended; RESTORE begins; it has ended */

	struct pci_dev *pdev;
	struct device **devs;		/* locked; parents before children */
	unsigned int count, prepared;	/* of these: all; with `prepare` behind them */
	unsigned int frozen, late, noirq;	/* from the end: that have come so far */
	unsigned int irqs;		/* disabled; most drivers have freed theirs by then */
	struct list_head guards;
};

static LIST_HEAD(all_frozen);	/* under baton_lock */

/* The first obstacle is the telling one. */
static int obstacle(struct baton_frozen *held, struct device *dev, u32 what, int error)
{
	if (!held->said.obstacle) {
		held->said.obstacle = what;
		held->said.error = -error;
		strscpy(held->said.device, dev_name(dev));
	}
	return error ? -EIO : -EOPNOTSUPP;
}

#define PHASE(name) offsetof(struct dev_pm_ops, name)

/* Domain, else type, else class, else bus; the driver where that has none. */
static void *callback_of(struct device *dev, size_t phase)
{
	const struct dev_pm_ops *ops = dev->pm_domain ? &dev->pm_domain->ops :
				       dev->type && dev->type->pm ? dev->type->pm :
				       dev->class && dev->class->pm ? dev->class->pm : dev->bus ? dev->bus->pm : NULL;
	void *callback = ops ? *(void **)((void *)ops + phase) : NULL;

	if (!callback && dev->driver && dev->driver->pm)
		callback = *(void **)((void *)dev->driver->pm + phase);
	return callback;
}

static int run(struct baton_frozen *held, struct device *dev, size_t phase)
{
	int (*callback)(struct device *) = callback_of(dev, phase);
	int ret;

	if (phase == PHASE(freeze_late))
		pm_runtime_disable(dev);
	ret = callback ? callback(dev) : 0;
	if (phase == PHASE(prepare) && ret > 0)
		ret = 0;	/* a wish to be left out, for a machine that sleeps */
	if (phase == PHASE(restore_early) || (phase == PHASE(freeze_late) && ret))
		pm_runtime_enable(dev);
	return ret ? obstacle(held, dev, BATON_OBSTACLE_FAILED, ret) : 0;
}

/* Children before parents. */
static int run_down(struct baton_frozen *held, size_t phase, unsigned int *done)
{
	int ret = 0;

	for (; !ret && *done < held->count; *done += !ret)
		ret = run(held, held->devs[held->count - 1 - *done], phase);
	return ret;
}

/* Parents before children: all that went down, whatever becomes of one. */
static int run_up(struct baton_frozen *held, size_t phase, unsigned int *done)
{
	int ret = 0;

	for (; *done; --*done)
		ret = run(held, held->devs[held->count - *done], phase) ?: ret;
	return ret;
}

/* A driver that detaches an interface closes it under the same rtnl lock: a stop before that is its own. */
static int guarded_stop(struct net_device *dev)
{
	struct netdev_guard *guard = container_of(dev->netdev_ops, struct netdev_guard, ours);

	guard->stopped = guard->frozen || !netif_device_present(dev);
	return guard->stopped || !guard->theirs->ndo_stop ? 0 : guard->theirs->ndo_stop(dev);
}

static int guarded_open(struct net_device *dev)
{
	return -EBUSY;
}

static void guarded_stats(struct net_device *dev, struct rtnl_link_stats64 *stats)
{
	*stats = container_of(dev->netdev_ops, struct netdev_guard, ours)->stats;
}

static int guard_netdevs(struct baton_frozen *held)
{
	for (unsigned int i = 0; i < held->count; i++) {
		struct netdev_guard *guard;

		if (!held->devs[i]->class || strcmp(held->devs[i]->class->name, "net"))
			continue;
		guard = kzalloc(sizeof(*guard), GFP_KERNEL);
		if (!guard)
			return -ENOMEM;
		list_add_tail(&guard->node, &held->guards);
		guard->dev = to_net_dev(held->devs[i]);
		rtnl_lock();
		dev_get_stats(guard->dev, &guard->stats);
		guard->theirs = guard->dev->netdev_ops;
		guard->ours = *guard->theirs;
		guard->ours.ndo_stop = guarded_stop;
		guard->ours.ndo_open = guarded_open;
		guard->ours.ndo_get_stats64 = guarded_stats;
		WRITE_ONCE(guard->dev->netdev_ops, &guard->ours);
		rtnl_unlock();
	}
	synchronize_net();	/* nobody reads statistics of its driver's any more */
	return 0;
}

/* Without a carrier, whoever has another way takes it. net/core/link_watch.c leaves out what is detached: told here. */
static void netdevs_are_frozen(struct baton_frozen *held)
{
	struct netdev_guard *guard;

	rtnl_lock();
	list_for_each_entry(guard, &held->guards, node) {
		guard->frozen = true;
		guard->had_carrier = netif_carrier_ok(guard->dev);
		if (guard->had_carrier)
			netif_carrier_off(guard->dev);
		if (guard->dev->flags & IFF_UP) {
			WRITE_ONCE(guard->dev->operstate, IF_OPER_DOWN);
			netdev_state_change(guard->dev);
		}
	}
	rtnl_unlock();
}

/* Each driver comes back to what it left: a running interface. */
static void netdevs_run_again(struct baton_frozen *held)
{
	struct netdev_guard *guard;

	rtnl_lock();
	list_for_each_entry(guard, &held->guards, node)
		if (guard->stopped)
			set_bit(__LINK_STATE_START, &guard->dev->state);
	rtnl_unlock();
}

/* What was stopped meanwhile is stopped now. */
static void unguard_netdevs(struct baton_frozen *held)
{
	struct netdev_guard *guard, *next;

	rtnl_lock();
	list_for_each_entry(guard, &held->guards, node) {
		WRITE_ONCE(guard->dev->netdev_ops, guard->theirs);
		if (guard->had_carrier)
			netif_carrier_on(guard->dev);
		if (!guard->stopped)
			continue;
		netdev_lock_ops(guard->dev);
		clear_bit(__LINK_STATE_START, &guard->dev->state);
		smp_mb__after_atomic();
		if (guard->theirs->ndo_stop)
			guard->theirs->ndo_stop(guard->dev);
		netdev_unlock_ops(guard->dev);
	}
	rtnl_unlock();
	synchronize_net();
	list_for_each_entry_safe(guard, next, &held->guards, node)
		kfree(guard);
}

/* Drivers differ in whether they do it. What they know of it stays as it is: not pci_clear_master(). */
static int bus_master_off(struct pci_dev *pdev)
{
	u16 command;

	pci_read_config_word(pdev, PCI_COMMAND, &command);
	pci_write_config_word(pdev, PCI_COMMAND, command & ~PCI_COMMAND_MASTER);
	pci_read_config_word(pdev, PCI_COMMAND, &command);
	pci_wait_for_pending_transaction(pdev);
	return command & PCI_COMMAND_MASTER;
}

static int bring_up(struct baton_frozen *held)
{
	int ret;

	if (held->noirq)	/* the other kernel may have left it running */
		bus_master_off(held->pdev);
	netdevs_run_again(held);
	ret = run_up(held, PHASE(restore_noirq), &held->noirq);
	for (; held->irqs; held->irqs--)
		enable_irq(pci_irq_vector(held->pdev, held->irqs - 1));
	ret = run_up(held, PHASE(restore_early), &held->late) ?: ret;
	ret = run_up(held, PHASE(restore), &held->frozen) ?: ret;
	unguard_netdevs(held);
	while (held->prepared) {
		struct device *dev = held->devs[--held->prepared];
		void (*complete)(struct device *) = callback_of(dev, PHASE(complete));

		if (complete)
			complete(dev);
	}
	for (unsigned int i = held->count; i--;)
		pm_runtime_put(held->devs[i]);
	return ret;
}

static int bring_down(struct baton_frozen *held)
{
	struct pci_dev *pdev = held->pdev;
	int ret;

	for (unsigned int i = 0; i < held->count; i++) {
		pm_runtime_get_sync(held->devs[i]);
		pm_runtime_barrier(held->devs[i]);
	}
	ret = guard_netdevs(held);
	for (; !ret && held->prepared < held->count; held->prepared += !ret)
		ret = run(held, held->devs[held->prepared], PHASE(prepare));
	ret = ret ?: run_down(held, PHASE(freeze), &held->frozen);
	ret = ret ?: run_down(held, PHASE(freeze_late), &held->late);
	if (!ret && (pdev->msi_enabled || pdev->msix_enabled))
		for (int irq; (irq = pci_irq_vector(pdev, held->irqs)) > 0; held->irqs++)
			disable_irq(irq);
	ret = ret ?: run_down(held, PHASE(freeze_noirq), &held->noirq);
	if (!ret) {
		netdevs_are_frozen(held);
		if (bus_master_off(pdev))
			ret = obstacle(held, &pdev->dev, BATON_OBSTACLE_MASTER, -EIO);
	}
	if (ret)
		bring_up(held);
	return ret;
}

/* A driver that cannot hibernate would go on with its DMA, or not find again what the other kernel has reset. */
static int look_for_obstacles(struct baton_frozen *held)
{
	struct pci_dev *pdev = held->pdev;
	const struct dev_pm_ops *pm = pdev->dev.driver ? pdev->dev.driver->pm : NULL;

	held->said.devices = held->count;
	if (pdev->hdr_type != PCI_HEADER_TYPE_NORMAL)
		return obstacle(held, &pdev->dev, BATON_OBSTACLE_BRIDGE, 0);
	if (pdev->dev.driver && (!pm || !(pm->freeze || pm->freeze_late || pm->freeze_noirq) ||
				 !(pm->restore || pm->restore_early || pm->restore_noirq)))
		return obstacle(held, &pdev->dev, BATON_OBSTACLE_NO_CALLBACKS, 0);
	if (pdev->dev.driver ? !pdev->msi_enabled && !pdev->msix_enabled : !pdev->msi_cap && !pdev->msix_cap)
		return obstacle(held, &pdev->dev, BATON_OBSTACLE_INTX, 0);
	/* The virtio bus calls its drivers' own two, and resets the device also where there are none. */
	for (unsigned int i = 0; i < held->count; i++) {
		const struct device *dev = held->devs[i];

		if (dev->driver && dev->bus && !strcmp(dev->bus->name, "virtio") &&
		    (!drv_to_virtio(dev->driver)->freeze || !drv_to_virtio(dev->driver)->restore))
			return obstacle(held, held->devs[i], BATON_OBSTACLE_NO_CALLBACKS, 0);
	}
	return 0;
}

static int add_device(struct device *dev, void *data)
{
	struct baton_frozen *held = data;
	struct device **more = krealloc_array(held->devs, held->count + 1, sizeof(*more), GFP_KERNEL);

	if (!more)
		return -ENOMEM;
	held->devs = more;
	held->devs[held->count++] = get_device(dev);
	device_lock(dev);
	return device_for_each_child(dev, held, add_device);
}

static void free_frozen(struct kref *users)
{
	struct baton_frozen *held = container_of(users, struct baton_frozen, users);

	pci_dev_put(held->pdev);
	kfree(held->devs);
	kfree(held);
}

static int hold_function(void *data)
{
	struct baton_frozen *held = data;
	/* A sleep that is under way ends first; a later one is refused, because there is an instance (platform.c). */
	unsigned int flags = lock_system_sleep();
	int ret;

	wait_for_device_probe();
	ret = add_device(&held->pdev->dev, held) ?: look_for_obstacles(held);
	if (!ret && !(held->said.how & BATON_FREEZE_LOOK))
		ret = bring_down(held);
	unlock_system_sleep(flags);
	if (!ret && !(held->said.how & BATON_FREEZE_LOOK)) {
		scoped_guard(mutex, &baton_lock)
			if (held->state == FREEZING)
				held->state = FROZEN;
		complete_all(&held->settled);
		wait_for_completion_state(&held->wanted_back, TASK_IDLE);
		ret = bring_up(held);
	}
	while (held->count) {
		device_unlock(held->devs[--held->count]);
		put_device(held->devs[held->count]);
	}
	scoped_guard(mutex, &baton_lock) {
		held->result = ret;
		list_del(&held->node);
	}
	complete_all(&held->settled);
	complete_all(&held->over);
	kref_put(&held->users, free_frozen);
	module_put_and_kthread_exit(0);
}

bool baton_functions_frozen(u32 instance)
{
	struct baton_frozen *held;

	list_for_each_entry(held, &all_frozen, node)
		if (held->said.instance == instance)
			return true;
	return false;
}

static void begin_restore(struct baton_frozen *held)
{
	lockdep_assert_held(&baton_lock);
	if (held->state != RESTORING) {
		held->state = RESTORING;
		complete(&held->wanted_back);
	}
}

/* For a kernel that ends with the machine: device_shutdown() wants the locks. Who never answers is left behind. */
void baton_frozen_restore_all(void)
{
	struct baton_frozen *held;
	bool over = true;

	while (over) {
		scoped_guard(mutex, &baton_lock) {
			held = list_first_entry_or_null(&all_frozen, struct baton_frozen, node);
			if (!held)
				return;
			begin_restore(held);
			kref_get(&held->users);
		}
		over = wait_for_completion_timeout(&held->over, 30 * HZ);
		kref_put(&held->users, free_frozen);
	}
}

/* Where a CPU of the instance is, the other kernel may be using the function: then only RESTORE ends it. */
void baton_frozen_close(const struct baton_file *file)
{
	struct baton_frozen *held;

	guard(mutex)(&baton_lock);
	list_for_each_entry(held, &all_frozen, node) {
		if (held->file != file)
			continue;
		held->file = NULL;
		if (!baton_cpus_recorded(held->said.instance))
			begin_restore(held);
	}
}

static struct baton_frozen *find_frozen(const struct baton_pci_function *arg)
{
	struct baton_frozen *held;

	list_for_each_entry(held, &all_frozen, node)
		if (held->said.domain == arg->domain && held->said.bdf == arg->bdf)
			return held;
	return NULL;
}

/* Has a reference of ours to @held. Whoever is killed leaves the work to the thread. */
static int wait_and_reply(struct baton_call *call, struct baton_frozen *held, struct completion *done)
{
	struct baton_pci_function *arg = call->arg;
	int ret = wait_for_completion_killable(done) ? -EINTR : 0;

	if (!ret) {
		held->said.size = arg->size;
		*arg = held->said;
		ret = baton_reply(call) ?: held->result;
	}
	kref_put(&held->users, free_frozen);
	return ret;
}

int baton_pci_freeze(struct baton_call *call)
{
	const struct baton_pci_function *arg = call->arg;
	struct task_struct *thread;
	struct baton_frozen *held;

	if (arg->domain > INT_MAX || arg->bdf > U16_MAX || arg->how & ~BATON_FREEZE_LOOK)
		return -EINVAL;
	held = kzalloc(sizeof(*held), GFP_KERNEL);
	if (!held)
		return -ENOMEM;
	kref_init(&held->users);
	INIT_LIST_HEAD(&held->guards);
	init_completion(&held->settled);
	init_completion(&held->wanted_back);
	init_completion(&held->over);
	held->file = call->file;
	held->said = (struct baton_pci_function) {
		.instance = arg->instance, .domain = arg->domain, .bdf = arg->bdf, .how = arg->how,
	};
	held->pdev = pci_get_domain_bus_and_slot(arg->domain, PCI_BUS_NUM(arg->bdf), arg->bdf & 0xff);
	scoped_guard(mutex, &baton_lock) {
		bool wrong = !(arg->how & BATON_FREEZE_LOOK) && arg->instance == BATON_SELF;
		int ret = wrong ? -EINVAL : !held->pdev || !baton_instance_exists(arg->instance) ? -ENOENT :
			  find_frozen(arg) ? -EBUSY : 0;

		thread = ret ? ERR_PTR(ret) : kthread_create(hold_function, held, "baton/%s", pci_name(held->pdev));
		if (!IS_ERR(thread)) {
			kref_get(&held->users);
			list_add_tail(&held->node, &all_frozen);
			__module_get(THIS_MODULE);
		}
	}
	if (IS_ERR(thread)) {
		kref_put(&held->users, free_frozen);
		return PTR_ERR(thread);
	}
	wake_up_process(thread);
	return wait_and_reply(call, held, &held->settled);
}

int baton_pci_restore(struct baton_call *call)
{
	const struct baton_pci_function *arg = call->arg;
	struct baton_frozen *held;

	scoped_guard(mutex, &baton_lock) {
		held = find_frozen(arg);
		if (!held)
			return -ENOENT;
		begin_restore(held);
		kref_get(&held->users);
	}
	return wait_and_reply(call, held, &held->over);
}
