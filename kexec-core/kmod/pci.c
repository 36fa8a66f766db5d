// SPDX-License-Identifier: GPL-2.0
/*
 * DOC: A PCI root that shows only chosen functions
 *
 * A kernel that was booted with pci=off leaves configuration space alone. ADD gives it a root bus, in a domain of its
 * own, with the functions that were granted to it and nothing else: of ECAM, only their pages are mapped, and every
 * other address reads as absent. Drivers bind as ever; interrupts are MSI or MSI-X, there is no INTx to route.
 * 1. ADD: map, scan, claim what the firmware assigned (nothing is moved), add the devices.
 * 2. REMOVE: stop the drivers, remove the devices and the bus, unmap.
 */
#include <linux/ioport.h>
#include <linux/pci.h>
#include "baton.h"

struct baton_root {
	struct pci_sysdata sysdata;	/* bus->sysdata, for child buses too */
	struct resource busn;
	struct baton_pci granted;
	void __iomem *config[BATON_PCI_MAX];	/* of each function */
};

DEFINE_LOCK_GUARD_0(pci_rescan_remove, pci_lock_rescan_remove(), pci_unlock_rescan_remove())

static void __iomem *config_address(struct pci_bus *bus, unsigned int devfn, int where)
{
	struct baton_root *root = container_of(bus->sysdata, struct baton_root, sysdata);

	for (u32 i = 0; i < root->granted.functions; i++)
		if (root->granted.bdf[i] == PCI_DEVID(bus->number, devfn))
			return root->config[i] + where;
	return NULL;	/* the generic accessors make it PCIBIOS_DEVICE_NOT_FOUND and all ones */
}

static struct pci_ops config_ops = {
	.map_bus = config_address, .read = pci_generic_config_read, .write = pci_generic_config_write,
};

static void unmap_functions(struct baton_root *root)
{
	for (u32 i = 0; i < root->granted.functions && root->config[i]; i++)
		iounmap(root->config[i]);
}

/* What is mapped when it fails, the caller unmaps. */
static int map_functions(struct baton_root *root)
{
	for (u32 i = 0; i < root->granted.functions; i++) {
		root->config[i] = ioremap(root->granted.ecam_pa + ((u64)root->granted.bdf[i] << 12), SZ_4K);
		if (!root->config[i])
			return -ENOMEM;
		if (PCI_POSSIBLE_ERROR(readl(root->config[i])))
			return -ENOENT;
	}
	return 0;
}

static int scan(struct baton_root *root)
{
	struct pci_bus *bus, *child;
	LIST_HEAD(windows);

	pci_add_resource(&windows, &root->busn);
	pci_add_resource(&windows, &iomem_resource);
	pci_add_resource(&windows, &ioport_resource);
	bus = pci_scan_root_bus(NULL, 0, &config_ops, &root->sysdata, &windows);
	if (!bus) {
		pci_free_resource_list(&windows);
		return -ENOMEM;
	}
	/* A scan looks at functions 1-7 only where there is a function 0, which may not be ours. */
	for (u32 i = 0; i < root->granted.functions; i++) {
		child = pci_find_bus(root->granted.domain, PCI_BUS_NUM(root->granted.bdf[i]));
		if (child)
			pci_scan_single_device(child, root->granted.bdf[i] & 0xff);
	}
	pci_bus_claim_resources(bus);
	pci_bus_add_devices(bus);
	return 0;
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
	const struct baton_pci *arg = call->arg;
	int ret = check_functions(arg);

	if (ret)
		return ret;
	struct baton_root *root __free(kfree) = kzalloc(sizeof(*root), GFP_KERNEL);
	if (!root)
		return -ENOMEM;
	*root = (struct baton_root) { .granted = *arg, .sysdata = { .domain = arg->domain, .node = NUMA_NO_NODE },
		.busn = { .name = "baton", .end = arg->bus_end, .flags = IORESOURCE_BUS } };

	guard(pci_rescan_remove)();
	if (pci_find_bus(arg->domain, 0))
		return -EEXIST;
	ret = map_functions(root) ?: scan(root);
	if (ret) {
		unmap_functions(root);
		return ret;
	}
	root = NULL;	/* REMOVE finds it through its bus */
	__module_get(THIS_MODULE);
	return 0;
}

int baton_pci_remove(struct baton_call *call)
{
	const struct baton_pci *arg = call->arg;
	struct baton_root *root;
	struct pci_bus *bus;

	if (arg->domain > INT_MAX)
		return -EINVAL;
	guard(pci_rescan_remove)();
	bus = pci_find_bus(arg->domain, 0);
	if (!bus || bus->ops != &config_ops)
		return -ENOENT;
	root = container_of(bus->sysdata, struct baton_root, sysdata);
	pci_stop_root_bus(bus);
	pci_remove_root_bus(bus);
	unmap_functions(root);
	kfree(root);
	module_put(THIS_MODULE);
	return 0;
}
