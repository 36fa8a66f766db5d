// SPDX-License-Identifier: GPL-2.0
/*
 * PCI functions that hibernate (BATON_IOC_PCI_FREEZE, _RESTORE).
 *
 *   --hibernate look BDF...    what stands against it: a line for each
 *   --hibernate hold BDF...    all of them are frozen until a line can be read from stdin, then restored
 *   --hibernate give BDF...    the same, while a CPU is recorded for whom they are frozen
 *   --hibernate take BDF...    after a `give` that was killed: that CPU is taken back, and the functions restored
 * BDF: 0000:00:03.0. Results are TAP, as selftest.c prints it.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <time.h>
#include <unistd.h>
#include "selftest.h"
#include "../uapi/baton.h"

/* The CPU that `give` gives, and how many instances there may have been. */
#define GIVEN 1
#define INSTANCES 64

static int function(unsigned long cmd, uint32_t instance, uint32_t how, const char *name, struct baton_pci_function *arg)
{
	unsigned int domain, bus, dev, fn;

	if (sscanf(name, "%x:%x:%x.%x", &domain, &bus, &dev, &fn) != 4)
		return errno = EINVAL, -1;
	*arg = (struct baton_pci_function) {
		.size = sizeof(*arg), .instance = instance, .domain = domain,
		.bdf = bus << 8 | dev << 3 | fn, .how = how,
	};
	return ioctl(device, cmd, arg);
}

static double now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return time.tv_sec + time.tv_nsec / 1e9;
}

static bool masters_bus(const char *name)
{
	unsigned char command = 0xff;
	char path[64];
	FILE *file;

	snprintf(path, sizeof(path), "/sys/bus/pci/devices/%s/config", name);
	file = fopen(path, "r");
	if (!file || fseek(file, 4, SEEK_SET) || fread(&command, 1, 1, file) != 1)
		command = 0xff;
	if (file)
		fclose(file);
	return command & 4;
}

static void look(const char *name)
{
	struct baton_pci_function arg;
	int ret = function(BATON_IOC_PCI_FREEZE, BATON_SELF, BATON_FREEZE_LOOK, name, &arg);

	printf("looked at %s: %s, obstacle %u of %s, %u devices\n", name, ret ? strerrorname_np(errno) : "0",
	       arg.obstacle, arg.device[0] ? arg.device : "none", arg.devices);
}

static void restore(const char *name)
{
	struct baton_pci_function arg;
	double began = now();

	if (!is("RESTORE", function(BATON_IOC_PCI_RESTORE, 0, 0, name, &arg), 0))
		printf("# %s: obstacle %u of %s, error %u\n", name, arg.obstacle, arg.device, arg.error);
	printf("# %s restored in %.0f ms\n", name, (now() - began) * 1e3);
}

static void hold(int count, char **names, bool with_cpu)
{
	struct baton_pci_function arg;
	char line[8], label[32];
	uint32_t id;

	snprintf(label, sizeof(label), "holder-%d", getpid());
	is("CREATE", create(label, &id), 0);
	/* First: with a disk frozen that has requests of this CPU's, it would not go offline (blk_mq_hctx_notify_offline()). */
	if (with_cpu) {
		is("offline", set_online(GIVEN, false), 0);
		is("GIVE", cpu(BATON_IOC_CPU_GIVE, id, apic_id_of(GIVEN, NULL), BATON_CPU_RECORD, 0), 0);
	}
	for (int i = 0; i < count; i++) {
		double began = now();

		if (!is("FREEZE", function(BATON_IOC_PCI_FREEZE, id, 0, names[i], &arg), 0))
			printf("# %s: obstacle %u of %s, error %u\n", names[i], arg.obstacle, arg.device, arg.error);
		printf("# %s frozen in %.0f ms, %u devices\n", names[i], (now() - began) * 1e3, arg.devices);
		truth("it is no bus master", !masters_bus(names[i]));
		is("FREEZE: it is frozen", function(BATON_IOC_PCI_FREEZE, id, 0, names[i], &arg), EBUSY);
		is("LOOK: it is frozen", function(BATON_IOC_PCI_FREEZE, 0, BATON_FREEZE_LOOK, names[i], &arg), EBUSY);
	}
	is("DESTROY: functions are frozen for it", destroy(id), EBUSY);
	printf("HELD\n");
	if (!fgets(line, sizeof(line), stdin))
		printf("# nobody says when to restore\n");
	for (int i = count; i--;)
		restore(names[i]);
	for (int i = 0; i < count; i++)
		is("RESTORE: it is not frozen", function(BATON_IOC_PCI_RESTORE, 0, 0, names[i], &arg), ENOENT);
	is("DESTROY", destroy(id), 0);
}

static void take_back(int count, char **names)
{
	uint32_t apic_id = apic_id_of(GIVEN, NULL);
	bool taken = false;

	for (uint32_t id = 1; id < INSTANCES; id++)
		taken |= !cpu(BATON_IOC_CPU_TAKE, id, apic_id, BATON_CPU_RECORD, 0);
	truth("the CPU is taken back", taken);
	is("online", set_online(GIVEN, true), 0);
	for (int i = 0; i < count; i++)
		restore(names[i]);
	for (uint32_t id = 1; id < INSTANCES; id++)
		destroy(id);
}

void hibernate(int count, char **arguments)
{
	if (count && !strcmp(arguments[0], "hold"))
		hold(count - 1, arguments + 1, false);
	else if (count && !strcmp(arguments[0], "give"))
		hold(count - 1, arguments + 1, true);
	else if (count && !strcmp(arguments[0], "take"))
		take_back(count - 1, arguments + 1);
	else if (count && !strcmp(arguments[0], "look"))
		for (int i = 1; i < count; i++)
			look(arguments[i]);
	else
		truth("--hibernate look|hold|give|take", false);
}

/* What contradicts itself; needs no function. */
void test_functions(void)
{
	struct baton_pci_function arg;
	uint32_t id;

	is("CREATE", create("hibernates", &id), 0);
	is("RESTORE: there is no such function", function(BATON_IOC_PCI_RESTORE, 0, 0, "fffe:00:00.0", &arg), ENOENT);
	is("FREEZE: there is no such function", function(BATON_IOC_PCI_FREEZE, id, 0, "fffe:00:00.0", &arg), ENOENT);
	is("FREEZE: an impossible function", function(BATON_IOC_PCI_FREEZE, id, 0, "0:100:00.0", &arg), EINVAL);
	is("FREEZE: an impossible domain", function(BATON_IOC_PCI_FREEZE, id, 0, "80000000:00:00.0", &arg), EINVAL);
	is("FREEZE: an unknown flag", function(BATON_IOC_PCI_FREEZE, id, 2, "0:00:00.0", &arg), EINVAL);
	is("FREEZE: for this kernel itself", function(BATON_IOC_PCI_FREEZE, BATON_SELF, 0, "0:00:00.0", &arg), EINVAL);
	is("FREEZE: no such instance", function(BATON_IOC_PCI_FREEZE, id + 1, 0, "0:00:00.0", &arg), ENOENT);
	is("DESTROY", destroy(id), 0);
}
