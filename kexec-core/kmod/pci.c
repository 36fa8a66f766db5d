// SPDX-License-Identifier: GPL-2.0
/*
 * DOC: PCI roots that show only chosen functions
 *
 * A kernel that was booted with pci=off leaves configuration space alone. ADD gives it the functions that were granted
 * to it and nothing else: of ECAM, only their pages are mapped, and every other address reads as absent. Drivers bind
 * as ever; interrupts are MSI or MSI-X, there is no INTx to route.
 *
 * Each bus that holds a granted function is a root bus of its number alone, all in one domain: no bridge is scanned,
 * functions keep their numbers, and the bridges between stay as whoever set them up left them.
 * 1. ADD: map, scan, claim what the firmware assigned (nothing is moved), add the devices. All functions, or none.
 * 2. REMOVE: stop the drivers, remove the devices and the buses, unmap.
 */
#include <linux/ioport.h>
#include <linux/pci.h>
#include "baton.h"

struct baton_root {
	struct pci_sysdata sysdata;		/* of every bus */
	struct baton_pci granted;
	void __iomem *config[BATON_PCI_MAX];	/* of each function */
	struct resource busn[BATON_PCI_MAX];	/* of each function's bus, as long as there is the bus */
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

/* A bridge is not granted: what is behind it would be scanned. */
static int map_functions(struct baton_root *root)
{
	for (u32 i = 0; i < root->granted.functions; i++) {
		root->config[i] = ioremap(root->granted.ecam_pa + ((u64)root->granted.bdf[i] << 12), SZ_4K);
		if (!root->config[i])
			return -ENOMEM;
		if (PCI_POSSIBLE_ERROR(readl(root->config[i])))
			return -ENOENT;
		if ((readb(root->config[i] + PCI_HEADER_TYPE) & PCI_HEADER_TYPE_MASK) != PCI_HEADER_TYPE_NORMAL)
			return -EINVAL;
	}
	return 0;
}

/* A root bus of the domain, ours or not; NULL when there is none. */
static struct pci_bus *find_root(u32 domain)
{
	struct pci_bus *bus = NULL;

	do {
		bus = pci_find_next_bus(bus);
	} while (bus && pci_domain_nr(bus) != domain);
	return bus;
}

static void remove_buses(u32 domain)
{
	struct pci_bus *bus;

	while ((bus = find_root(domain))) {
		pci_stop_root_bus(bus);
		pci_remove_root_bus(bus);
	}
}

static struct pci_bus *scan_bus(struct baton_root *root, struct resource *busn, u8 number)
{
	struct pci_bus *bus;
	LIST_HEAD(windows);

	*busn = (struct resource) { .name = "baton", .start = number, .end = number, .flags = IORESOURCE_BUS };
	pci_add_resource(&windows, busn);
	pci_add_resource(&windows, &iomem_resource);
	pci_add_resource(&windows, &ioport_resource);
	bus = pci_scan_root_bus(NULL, number, &config_ops, &root->sysdata, &windows);
	if (!bus)
		pci_free_resource_list(&windows);
	return bus;
}

static int scan(struct baton_root *root)
{
	const struct baton_pci *granted = &root->granted;
	struct pci_bus *bus;

	for (u32 i = 0; i < granted->functions; i++) {
		u8 number = PCI_BUS_NUM(granted->bdf[i]);

		bus = pci_find_bus(granted->domain, number);
		if (!bus)
			bus = scan_bus(root, &root->busn[i], number);
		if (!bus)
			return -ENOMEM;
		/* The scan of a bus looks at functions 1-7 only where there is a function 0, which may not be ours. */
		if (!pci_scan_single_device(bus, granted->bdf[i] & 0xff))
			return -ENOENT;
	}
	for (u32 i = 0; i < granted->functions; i++) {
		if (!root->busn[i].flags)
			continue;
		bus = pci_find_bus(granted->domain, PCI_BUS_NUM(granted->bdf[i]));
		pci_bus_claim_resources(bus);
		pci_bus_add_devices(bus);
	}
	return 0;
}

static int check_functions(const struct baton_pci *arg)
{
	u64 len, end;

	if (arg->domain > INT_MAX || arg->bus_end > 0xff || !arg->functions || arg->functions > BATON_PCI_MAX ||
	    !arg->ecam_pa || !IS_ALIGNED(arg->ecam_pa, SZ_1M))
		return -EINVAL;
	for (u32 i = 0; i < arg->functions; i++)
		if (PCI_BUS_NUM(arg->bdf[i]) > arg->bus_end)
			return -EINVAL;
	len = (u64)(arg->bus_end + 1) << 20;
	if (check_add_overflow(arg->ecam_pa, len, &end) || end > BIT_ULL(boot_cpu_data.x86_phys_bits))
		return -ERANGE;
	if (region_intersects(arg->ecam_pa, len, IORESOURCE_SYSTEM_RAM, IORES_DESC_NONE) != REGION_DISJOINT)
		return -ERANGE;
	return 0;
}

static int add_buses(struct baton_root *root)
{
	int ret;

	guard(pci_rescan_remove)();
	if (find_root(root->granted.domain))
		return -EEXIST;
	ret = map_functions(root);
	if (!ret) {
		ret = scan(root);
		if (ret)
			remove_buses(root->granted.domain);
	}
	if (ret)
		unmap_functions(root);
	return ret;
}

int baton_pci_add(struct baton_call *call)
{
	const struct baton_pci *arg = call->arg;
	struct baton_root *root;
	int ret = check_functions(arg);

	if (ret)
		return ret;
	root = kzalloc(sizeof(*root), GFP_KERNEL);
	if (!root)
		return -ENOMEM;
	root->granted = *arg;
	root->sysdata.domain = arg->domain;
	root->sysdata.node = NUMA_NO_NODE;
	ret = add_buses(root);
	if (ret) {
		kfree(root);
		return ret;
	}
	__module_get(THIS_MODULE);
	return 0;	/* REMOVE finds it through its buses */
}

int baton_pci_remove(struct baton_call *call)
{
	const struct baton_pci *arg = call->arg;
	struct baton_root *root;
	struct pci_bus *bus;

	if (arg->domain > INT_MAX)
		return -EINVAL;
	guard(pci_rescan_remove)();
	bus = find_root(arg->domain);
	if (!bus || bus->ops != &config_ops)
		return -ENOENT;
	root = container_of(bus->sysdata, struct baton_root, sysdata);
	remove_buses(arg->domain);
	unmap_functions(root);
	kfree(root);
	module_put(THIS_MODULE);
	return 0;
}
