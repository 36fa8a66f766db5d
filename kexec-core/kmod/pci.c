// SPDX-License-Identifier: GPL-2.0
/*
 * DOC: A PCI root that shows only chosen functions
 *
 * A kernel that was booted with pci=off leaves configuration space alone. ADD gives it a root bus, in a domain of its
 * own, through which it finds the functions that were granted to it and nothing else: of ECAM, only their pages are
 * mapped, and every other address reads as absent. Drivers bind as ever; interrupts are MSI or MSI-X, there is no
 * INTx to route.
 *
 * 1. ADD: map, scan, claim what the firmware assigned (nothing is moved), add the devices.
 * 2. REMOVE: stop the drivers, remove the devices and the bus, unmap.
 */
#include <linux/ioport.h>
#include <linux/pci.h>
#include "baton.h"

struct baton_root {
	struct list_head node;
	struct pci_sysdata sysdata;	/* bus->sysdata, for child buses too */
	struct resource busn;
	struct pci_bus *bus;
	u32 functions;
	struct {
		u16 bdf;
		void __iomem *config;
	} function[BATON_PCI_MAX];
};

static LIST_HEAD(roots);
static DEFINE_MUTEX(pci_roots_lock);

static void __iomem *config_address(struct pci_bus *bus, unsigned int devfn, int where)
{
	struct baton_root *root = container_of(bus->sysdata, struct baton_root, sysdata);

	for (u32 i = 0; i < root->functions; i++)
		if (root->function[i].bdf == PCI_DEVID(bus->number, devfn))
			return root->function[i].config + where;
	return NULL;	/* the generic accessors make it PCIBIOS_DEVICE_NOT_FOUND and all ones */
}

static struct pci_ops config_ops = {
	.map_bus = config_address,
	.read = pci_generic_config_read,
	.write = pci_generic_config_write,
};

static void unmap_functions(struct baton_root *root)
{
	while (root->functions)
		iounmap(root->function[--root->functions].config);
}

/* What is mapped when it fails, the caller unmaps. */
static int map_functions(struct baton_root *root, const struct baton_pci *arg)
{
	for (u32 i = 0; i < arg->functions; i++) {
		u64 pa = arg->ecam_pa + ((u64)arg->bdf[i] << 12);
		void __iomem *config = ioremap(pa, SZ_4K);

		if (!config)
			return -ENOMEM;
		root->function[i].bdf = arg->bdf[i];
		root->function[i].config = config;
		root->functions++;
		if (PCI_POSSIBLE_ERROR(readl(config)))
			return -ENOENT;
	}
	return 0;
}

static int scan(struct baton_root *root)
{
	LIST_HEAD(windows);

	pci_add_resource(&windows, &root->busn);
	pci_add_resource(&windows, &iomem_resource);
	pci_add_resource(&windows, &ioport_resource);
	root->bus = pci_scan_root_bus(NULL, 0, &config_ops, &root->sysdata, &windows);
	if (!root->bus) {
		pci_free_resource_list(&windows);
		return -ENOMEM;
	}
	/* A scan looks at functions 1-7 only where there is a function 0, which may not be ours. */
	for (u32 i = 0; i < root->functions; i++) {
		struct pci_bus *bus = pci_find_bus(root->sysdata.domain, PCI_BUS_NUM(root->function[i].bdf));

		if (bus)
			pci_scan_single_device(bus, root->function[i].bdf & 0xff);
	}
	pci_bus_claim_resources(root->bus);
	pci_bus_add_devices(root->bus);
	return 0;
}

static struct baton_root *find_root(int domain)
{
	struct baton_root *root;

	lockdep_assert_held(&pci_roots_lock);
	list_for_each_entry(root, &roots, node)
		if (root->sysdata.domain == domain)
			return root;
	return NULL;
}

static int check_functions(const struct baton_pci *arg)
{
	if (arg->domain > INT_MAX || arg->bus_end > 0xff || !arg->functions || arg->functions > BATON_PCI_MAX ||
	    !arg->ecam_pa || !IS_ALIGNED(arg->ecam_pa, SZ_1M))
		return -EINVAL;
	for (u32 i = 0; i < arg->functions; i++)
		if (PCI_BUS_NUM(arg->bdf[i]) > arg->bus_end)
			return -EINVAL;
	if (arg->ecam_pa + ((u64)(arg->bus_end + 1) << 20) > BIT_ULL(boot_cpu_data.x86_phys_bits) ||
	    region_intersects(arg->ecam_pa, (u64)(arg->bus_end + 1) << 20, IORESOURCE_SYSTEM_RAM,
			      IORES_DESC_NONE) != REGION_DISJOINT)
		return -ERANGE;
	return 0;
}

int baton_pci_add(struct baton_call *call)
{
	const struct baton_pci *arg = &call->arg.pci;
	int ret = check_functions(arg);

	if (ret)
		return ret;
	struct baton_root *root __free(kfree) = kzalloc(sizeof(*root), GFP_KERNEL);
	if (!root)
		return -ENOMEM;
	root->sysdata.domain = arg->domain;
	root->sysdata.node = NUMA_NO_NODE;
	root->busn = (struct resource) { .name = "baton", .end = arg->bus_end, .flags = IORESOURCE_BUS };

	guard(mutex)(&pci_roots_lock);
	if (find_root(arg->domain) || pci_find_bus(arg->domain, 0))
		return -EEXIST;
	ret = map_functions(root, arg);
	if (!ret) {
		pci_lock_rescan_remove();
		ret = scan(root);
		pci_unlock_rescan_remove();
	}
	if (ret) {
		unmap_functions(root);
		return ret;
	}
	list_add_tail(&no_free_ptr(root)->node, &roots);
	baton_depend();
	return 0;
}

int baton_pci_remove(struct baton_call *call)
{
	struct baton_root *root;

	if (call->arg.pci.domain > INT_MAX)
		return -EINVAL;
	guard(mutex)(&pci_roots_lock);
	root = find_root(call->arg.pci.domain);
	if (!root)
		return -ENOENT;
	pci_lock_rescan_remove();
	pci_stop_root_bus(root->bus);
	pci_remove_root_bus(root->bus);
	pci_unlock_rescan_remove();
	list_del(&root->node);
	unmap_functions(root);
	kfree(root);
	baton_release();
	return 0;
}
