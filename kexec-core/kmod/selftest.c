// SPDX-License-Identifier: GPL-2.0
/*
 * selftest: asks a loaded baton.ko for everything that uapi/baton.h promises, and prints TAP.
 *
 *   selftest --layout      only the struct sizes and offsets, for whoever mirrors them (needs no module)
 *   selftest [options]     as root, on a machine that has nothing better to do: CPUs go offline and come back
 *     --outside PA         2 MiB of memory that was reserved on this kernel's command line (memmap=2M$PA)
 *     --not-ours PA        a page that no way of taking memory may give out; as often as there are such pages
 *     --adopt PA           a memory block that this kernel does not know (mem=), hot-added for good
 *     --pci ECAM BDF       a function to show through a root of ours (the kernel booted with pci=off)
 *     --behind BDF BDF     a bridge, and a function behind it
 *     --panic PA           last of all: panic, with a notice into the word at PA
 *     --hibernate WHAT...  only tests/hibernate.c, which says what
 *     --lockdown           last of all: lock the kernel down and see every changing call refused
 * RESERVED is tested where the kernel was booted with crashkernel= and nothing is loaded there.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/capability.h>
#include <linux/futex.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>
#include "tests/selftest.h"
#include "uapi/baton.h"

#define SIPI_PAGE 0x8000ull

int device;
static int tests, failures;
static struct baton_info info = { .size = sizeof(info) };

static bool check(bool good, const char *what, const char *got)
{
	printf("%sok %d - %s%s%s\n", good ? "" : "not ", ++tests, what, good ? "" : " # got ", good ? "" : got);
	failures += !good;
	return good;
}

bool is(const char *what, int ret, int want)
{
	return check((ret < 0 ? errno : 0) == want, what, ret < 0 ? strerrorname_np(errno) : "success");
}

static void skip(const char *what, const char *why)
{
	printf("ok %d - %s # SKIP %s\n", ++tests, what, why);
}

bool truth(const char *what, bool good)
{
	return check(good, what, "false");
}

/* Calls */

int create(const char *name, uint32_t *id)
{
	struct baton_instance arg = { .size = sizeof(arg), .state = BATON_STATE_CREATED };
	int ret;

	memcpy(arg.name, name, strnlen(name, sizeof(arg.name)));
	ret = ioctl(device, BATON_IOC_INSTANCE_CREATE, &arg);
	*id = arg.id;
	return ret;
}

int destroy(uint32_t id)
{
	struct baton_instance arg = { .size = sizeof(arg), .id = id };

	return ioctl(device, BATON_IOC_INSTANCE_DESTROY, &arg);
}

static int mem(unsigned long cmd, uint32_t instance, uint32_t how, uint64_t start, uint64_t len)
{
	struct baton_mem arg = { .size = sizeof(arg), .instance = instance, .how = how, .start = start, .len = len };

	return ioctl(device, cmd, &arg);
}

int take(uint32_t instance, uint32_t how, uint64_t start, uint64_t len)
{
	return mem(BATON_IOC_MEM_TAKE, instance, how, start, len);
}

int give_back(uint32_t instance, uint64_t start, uint64_t len)
{
	return mem(BATON_IOC_MEM_GIVE_BACK, instance, 0, start, len);
}

int mem_fd(uint64_t start, uint64_t len, uint32_t flags)
{
	struct baton_mem_fd arg = { .size = sizeof(arg), .flags = flags, .start = start, .len = len };
	int ret = ioctl(device, BATON_IOC_MEM_FD, &arg);

	return ret ? ret : arg.fd;
}

static void *map(uint64_t start, uint64_t len)
{
	int fd = mem_fd(start, len, 0);
	void *at = fd < 0 ? MAP_FAILED : mmap(NULL, len, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);

	if (fd >= 0)
		close(fd);
	return at;
}

int cpu(unsigned long cmd, uint32_t instance, uint32_t apic_id, uint32_t how, uint64_t start_pa)
{
	struct baton_cpu arg = {
		.size = sizeof(arg), .instance = instance, .apic_id = apic_id, .how = how, .start_pa = start_pa
	};

	return ioctl(device, cmd, &arg);
}

/* The machine */

static int write_file(const char *path, const char *text)
{
	int fd = open(path, O_WRONLY), ret;

	if (fd < 0)
		return -1;
	ret = write(fd, text, strlen(text)) < 0 ? -1 : 0;
	close(fd);
	return ret;
}

int set_online(uint32_t number, bool online)
{
	char path[64];

	snprintf(path, sizeof(path), "/sys/devices/system/cpu/cpu%u/online", number);
	return write_file(path, online ? "1" : "0");
}

uint32_t apic_id_of(uint32_t number, uint32_t *flags)
{
	struct baton_cpu_info arg = { .size = sizeof(arg), .cpu = number };

	if (ioctl(device, BATON_IOC_CPU_INFO, &arg))
		return UINT32_MAX;
	if (flags)
		*flags = arg.flags;
	return arg.apic_id;
}

long meminfo(const char *key)
{
	FILE *file = fopen("/proc/meminfo", "r");
	char line[128];
	long kib = -1;

	while (file && fgets(line, sizeof(line), file))
		if (!strncmp(line, key, strlen(key)) && line[strlen(key)] == ':')
			kib = atol(line + strlen(key) + 1);
	if (file)
		fclose(file);
	return kib;
}

/* The first range of that name in /proc/iomem that holds @at, or any when @at is 0. */
static bool iomem(const char *name, uint64_t at, uint64_t *start, uint64_t *end)
{
	FILE *file = fopen("/proc/iomem", "r");
	char line[256], *colon;
	bool found = false;

	while (file && !found && fgets(line, sizeof(line), file)) {
		colon = strstr(line, " : ");
		line[strcspn(line, "\n")] = 0;
		if (colon && !strncmp(colon + 3, name, strlen(name)) && sscanf(line, " %lx-%lx", start, end) == 2)
			found = !at || (at >= *start && at < *end);
		*end += 1;
	}
	if (file)
		fclose(file);
	return found;
}

static char *proc_row(uint32_t id, char *row, size_t size)
{
	FILE *file = fopen("/proc/multikernel", "r");
	char *found = NULL;

	while (file && !found && fgets(row, size, file))
		if (row[0] >= '0' && row[0] <= '9' && strtoul(row, NULL, 10) == id)
			found = row;
	if (file)
		fclose(file);
	return found;
}

/* @len bytes that this kernel can do without, wherever they are. */
uint64_t alloc_anywhere(uint32_t instance, uint64_t len)
{
	for (uint64_t at = 64 * MIB; at < 4096 * MIB; at += len > 16 * MIB ? 16 * MIB : len)
		if (!take(instance, BATON_MEM_ALLOC, at, len))
			return at;
	return 0;
}

/* MemFree, with the per-CPU lists of free pages emptied into it, which is what taking a page does on its way. */
long free_kib(uint32_t instance)
{
	uint64_t page = alloc_anywhere(instance, PAGE);
	long kib = meminfo("MemFree");

	give_back(instance, page, PAGE);
	return kib;
}

/* Tests */

static void test_info(void)
{
	struct { struct baton_info known; uint64_t future; } longer = { .known.size = sizeof(longer) };
	struct baton_info shorter = { .size = offsetof(struct baton_info, tsc_khz), .tsc_khz = 77 };
	struct baton_info tiny = { .size = 4 };
	uint32_t flags = 0;

	is("INFO", ioctl(device, BATON_IOC_INFO, &info), 0);
	truth("INFO: abi", info.abi == BATON_ABI_VERSION);
	truth("INFO: tsc, memory block, cpus", info.tsc_khz && info.memory_block_size >= 2 * MIB && info.possible_cpus);
	is("a longer struct whose surplus is zero", ioctl(device, BATON_IOC_INFO, &longer), 0);
	longer.future = 1;
	is("a longer struct whose surplus is not zero", ioctl(device, BATON_IOC_INFO, &longer), E2BIG);
	is("a shorter struct", ioctl(device, BATON_IOC_INFO, &shorter), 0);
	truth("a shorter struct is written no further than it goes", shorter.tsc_khz == 77 && shorter.abi);
	is("a struct too short to mean anything", ioctl(device, BATON_IOC_INFO, &tiny), EINVAL);
	is("a bad pointer", ioctl(device, BATON_IOC_INFO, (void *)8), EFAULT);
	is("an unknown call", ioctl(device, BATON_IOC(0x7f), &info), ENOTTY);
	truth("CPU_INFO: cpu 0 is online", apic_id_of(0, &flags) != UINT32_MAX && flags & BATON_CPU_ONLINE);
	truth("CPU_INFO: past the last one", apic_id_of(info.possible_cpus, NULL) == UINT32_MAX && errno == ENOENT);
}

static void test_instances(void)
{
	struct baton_instance arg = { .size = sizeof(arg), .state = BATON_STATE_BOOTING, .image = "Linux 7.3 (x)" };
	uint32_t id, other;
	char row[512];

	is("CREATE", create("alpha", &id), 0);
	is("CREATE: the same name", create("alpha", &other), EEXIST);
	is("CREATE: the name of BATON_SELF", create("self", &other), EEXIST);
	is("CREATE: no name", create("", &other), EINVAL);
	is("CREATE: a blank in the name", create("a b", &other), EINVAL);
	is("CREATE: a name without end", create("0123456789012345678901234567890123456789", &other), EINVAL);
	arg.id = id;
	is("UPDATE", ioctl(device, BATON_IOC_INSTANCE_UPDATE, &arg), 0);
	truth("its row in /proc/multikernel", proc_row(id, row, sizeof(row)) &&
	      strstr(row, " alpha booting - 0 - Linux 7.3 (x)\n"));
	arg.state = 99;
	is("UPDATE: no such state", ioctl(device, BATON_IOC_INSTANCE_UPDATE, &arg), EINVAL);
	arg.state = 0;
	arg.reserved = 1;
	is("UPDATE: reserved is not zero", ioctl(device, BATON_IOC_INSTANCE_UPDATE, &arg), EINVAL);
	arg.reserved = 0;
	arg.image[0] = '\n';
	is("UPDATE: an image that is not printable", ioctl(device, BATON_IOC_INSTANCE_UPDATE, &arg), EINVAL);
	arg.image[0] = 0;
	is("UPDATE: an empty image leaves it", ioctl(device, BATON_IOC_INSTANCE_UPDATE, &arg), 0);
	truth("its row says so", proc_row(id, row, sizeof(row)) && strstr(row, " alpha created - 0 - Linux 7.3 (x)\n"));
	arg.id = 4711;
	is("UPDATE: no such instance", ioctl(device, BATON_IOC_INSTANCE_UPDATE, &arg), ENOENT);
	truth("row 0", proc_row(0, row, sizeof(row)) && !strncmp(row, "0 self running 0", 16));
	is("INFO", ioctl(device, BATON_IOC_INFO, &info), 0);
	truth("INFO: one instance", info.instances == 1);
	is("DESTROY", destroy(id), 0);
	is("DESTROY: again", destroy(id), ENOENT);
	is("DESTROY: BATON_SELF", destroy(BATON_SELF), EINVAL);
}

static void test_files(uint32_t id, uint64_t at, uint64_t len)
{
	uint64_t *by_frame, *by_page, copy = 0, size = 2 * MIB;
	int fd, pages, child, status, pipes[2];
	struct iovec from, to = { &copy, sizeof(copy) };

	is("MEM_FD: outside every object", mem_fd(at + len, PAGE, 0), ENOENT);
	is("MEM_FD: half outside", mem_fd(at + len - PAGE, 2 * PAGE, 0), ENOENT);
	is("MEM_FD: no such flag", mem_fd(at, PAGE, 8), EINVAL);
	is("MEM_FD: not a page", mem_fd(at + 8, PAGE, 0), EINVAL);
	fd = mem_fd(at, size, 0);
	is("MEM_FD", fd, 0);
	truth("MEM_FD: closed on exec", fcntl(fd, F_GETFD) & FD_CLOEXEC);
	is("GIVE_BACK: a file is open", give_back(id, at, len), EBUSY);
	is("DESTROY: a file is open", destroy(id), EBUSY);
	truth("mmap: private", mmap(NULL, PAGE, PROT_READ, MAP_PRIVATE, fd, 0) == MAP_FAILED && errno == EINVAL);
	truth("mmap: too long", mmap(NULL, size + PAGE, PROT_READ, MAP_SHARED, fd, 0) == MAP_FAILED && errno == EINVAL);
	truth("mmap: too far", mmap(NULL, PAGE, PROT_READ, MAP_SHARED, fd, size) == MAP_FAILED && errno == EINVAL);
	truth("read: not that kind of file", read(fd, &copy, 8) < 0 && errno == EINVAL);
	by_frame = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	truth("mmap by frame number", by_frame != MAP_FAILED);
	copy = 0;
	for (uint64_t i = 0; i < size / 8; i++)
		copy |= by_frame[i];
	truth("allocated memory is zero", !copy);
	close(fd);
	is("GIVE_BACK: mapped, no file open", give_back(id, at, len), EBUSY);

	pages = mem_fd(at + PAGE, size - PAGE, BATON_FD_PAGES);
	by_page = mmap(NULL, size - 2 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, pages, PAGE);
	truth("mmap by page, with an offset", by_page != MAP_FAILED);
	by_page[3] = 0x1234567;
	truth("both show the same memory", by_frame[2 * PAGE / 8 + 3] == 0x1234567);
	from = (struct iovec) { by_page + 3, 8 };
	truth("by page: the kernel can pin it", process_vm_readv(getpid(), &to, 1, &from, 1, 0) == 8 && copy == 0x1234567);
	truth("by page: a private futex", !syscall(SYS_futex, by_page, FUTEX_WAKE_PRIVATE, 1, NULL, NULL, 0));
	status = syscall(SYS_futex, by_page, FUTEX_WAKE, 1, NULL, NULL, 0);
	printf("# a shared futex on it: %s\n", status < 0 ? strerrorname_np(errno) : "works");
	from.iov_base = by_frame;
	is("by frame number: it cannot", process_vm_readv(getpid(), &to, 1, &from, 1, 0), EFAULT);

	fd = mem_fd(at, PAGE, BATON_FD_READONLY);
	truth("READONLY: for writing", mmap(NULL, PAGE, PROT_WRITE, MAP_SHARED, fd, 0) == MAP_FAILED && errno == EACCES);
	from.iov_base = mmap(NULL, PAGE, PROT_READ, MAP_SHARED, fd, 0);
	truth("READONLY: for reading", from.iov_base != MAP_FAILED);
	is("READONLY: mprotect", mprotect(from.iov_base, PAGE, PROT_READ | PROT_WRITE), EACCES);
	munmap(from.iov_base, PAGE);
	close(fd);

	/* A page that a pipe still holds when the mapping has gone. */
	truth("vmsplice", !pipe(pipes) && vmsplice(pipes[1], &(struct iovec) { by_page, 8 }, 1, 0) == 8);

	/* A child inherits the mappings; the parent drops them. */
	child = fork();
	if (!child)
		pause();
	munmap(by_frame, size);
	munmap(by_page, size - 2 * PAGE);
	close(pages);
	is("GIVE_BACK: mapped in a child", give_back(id, at, len), EBUSY);
	kill(child, SIGKILL);
	waitpid(child, &status, 0);
	is("GIVE_BACK: a pipe holds a page", give_back(id, at, len), EBUSY);
	is("DESTROY: a pipe holds a page", destroy(id), EBUSY);
	close(pipes[0]);
	close(pipes[1]);
}

static void test_memory(void)
{
	uint64_t at, len = 128 * MIB, start = 0, end = 0, ram_end = 0;
	uint32_t id, other;
	struct baton_adopt adopt = { .size = sizeof(adopt), .len = PAGE };
	char row[512], want[128];
	long before, total, held = 0, lost;
	int rounds = 0;

	create("memory", &id);
	create("other", &other);
	at = alloc_anywhere(id, len);
	if (!truth("TAKE ALLOC: 128 MiB", at))
		return;
	printf("# 128 MiB at %#lx\n", at);
	iomem("System RAM", at, &start, &ram_end);
	snprintf(want, sizeof(want), " memory created - %lu %lx-%lx -\n", len, at, at + len - 1);
	truth("its row in /proc/multikernel", proc_row(id, row, sizeof(row)) && strstr(row, want));
	is("TAKE: the same again", take(id, BATON_MEM_ALLOC, at, len), EEXIST);
	is("TAKE: a part of it, another way", take(other, BATON_MEM_OUTSIDE, at + len - PAGE, 2 * PAGE), EEXIST);
	is("TAKE: around it", take(other, BATON_MEM_ALLOC, at - PAGE, len + 2 * PAGE), EEXIST);
	is("TAKE: no such way", take(id, 9, at, len), EINVAL);
	is("TAKE: nothing", take(id, BATON_MEM_ALLOC, at, 0), EINVAL);
	is("TAKE: not a page", take(id, BATON_MEM_ALLOC, at + 1, PAGE), EINVAL);
	is("TAKE: past the end of all addresses", take(id, BATON_MEM_ALLOC, -PAGE, 2 * PAGE), EINVAL);
	is("TAKE: past what the CPU can form", take(id, BATON_MEM_OUTSIDE, 1ull << 56, PAGE), ERANGE);
	is("TAKE: for nobody", take(4711, BATON_MEM_ALLOC, at + len, PAGE), ENOENT);
	is("TAKE ALLOC: no RAM", take(id, BATON_MEM_ALLOC, 0xfee00000, PAGE), ERANGE);
	is("TAKE ALLOC: beyond the RAM", take(id, BATON_MEM_ALLOC, ram_end - PAGE, 64 * MIB), ERANGE);
	is("TAKE OUTSIDE: this kernel's RAM", take(id, BATON_MEM_OUTSIDE, at + len, PAGE), EEXIST);
	is("TAKE RESERVED: not reserved", take(id, BATON_MEM_RESERVED, at + len, PAGE), EINVAL);
	is("TAKE RESERVED: no RAM", take(id, BATON_MEM_RESERVED, 0xfee00000, PAGE), EINVAL);
	is("TAKE BORROW: above 1 MiB", take(id, BATON_MEM_BORROW, MIB, PAGE), ERANGE);
	if (truth("where the kernel's image is", iomem("Kernel code", 0, &start, &end))) {
		is("TAKE ALLOC: where nothing can be moved", take(id, BATON_MEM_ALLOC, start & ~(PAGE - 1), 2 * MIB), EBUSY);
		is("TAKE RESERVED: the kernel's text", take(id, BATON_MEM_RESERVED, start & ~(PAGE - 1), PAGE), EINVAL);
		adopt.start = start & ~(PAGE - 1);
		is("ADOPT: the kernel's text", ioctl(device, BATON_IOC_MEM_ADOPT, &adopt), EINVAL);
	}
	if (iomem("Kernel bss", 0, &start, &end))
		is("TAKE RESERVED: the kernel's data", take(id, BATON_MEM_RESERVED, start & ~(PAGE - 1), PAGE), EINVAL);
	is("TAKE OUTSIDE: the local APIC", take(id, BATON_MEM_OUTSIDE, 0xfee00000, PAGE), ERANGE);
	is("TAKE OUTSIDE: the I/O APIC", take(id, BATON_MEM_OUTSIDE, 0xfec00000, PAGE), ERANGE);
	is("TAKE OUTSIDE: the VGA's memory", take(id, BATON_MEM_OUTSIDE, 0xa0000, PAGE), ERANGE);
	is("TAKE OUTSIDE: the firmware", take(id, BATON_MEM_OUTSIDE, 0xf0000, PAGE), ERANGE);
	is("TAKE BORROW", take(id, BATON_MEM_BORROW, SIPI_PAGE, PAGE), 0);
	is("MEM_FD: PAGES of borrowed memory", mem_fd(SIPI_PAGE, PAGE, BATON_FD_PAGES), EINVAL);
	is("GIVE_BACK: a part", give_back(id, at, PAGE), EINVAL);
	is("GIVE_BACK: another's", give_back(other, at, len), ENOENT);
	is("GIVE_BACK: nothing there", give_back(id, at + len, PAGE), ENOENT);
	test_files(id, at, len);
	is("GIVE_BACK", give_back(id, at, len), 0);
	is("DESTROY gives back the rest", destroy(id), 0);
	is("TAKE BORROW: it is free again", take(other, BATON_MEM_BORROW, SIPI_PAGE, PAGE), 0);
	is("DESTROY", destroy(other), 0);

	create("again", &id);
	total = meminfo("MemTotal");
	before = free_kib(id);
	for (int i = 0; i < 20; i++) {
		at = alloc_anywhere(id, len);
		held = before - free_kib(id);
		if (!at || held < (long)(len >> 10) - 1024 || give_back(id, at, len))
			break;
		rounds++;
	}
	lost = before - free_kib(id);
	printf("# MemFree is %ld KiB lower while 128 MiB are taken, %ld KiB lower in the end\n", held, lost);
	truth("20 times taken and given back: nothing is lost", rounds == 20 && lost < 1024 && meminfo("MemTotal") == total);
	is("DESTROY", destroy(id), 0);
}

/* What somebody has had is not shown to whoever has it next, whatever init_on_alloc= says. */
static void test_zero(void)
{
	uint64_t at, len = 4 * MIB, *content, seen = 0;
	uint32_t id;

	create("zero", &id);
	at = alloc_anywhere(id, len);
	content = map(at, len);
	if (!truth("memory to be left dirty", at && content != MAP_FAILED))
		return;
	memset(content, 0xa5, len);
	munmap(content, len);
	is("GIVE_BACK", give_back(id, at, len), 0);
	is("TAKE ALLOC: the same again", take(id, BATON_MEM_ALLOC, at, len), 0);
	content = map(at, len);
	for (uint64_t i = 0; i < len / 8; i++)
		seen |= content[i];
	truth("it is zero", !seen);
	munmap(content, len);
	is("DESTROY", destroy(id), 0);
}

static void test_not_ours(uint64_t pa)
{
	struct baton_adopt adopt = { .size = sizeof(adopt), .start = pa, .len = PAGE };
	uint32_t id;
	int ret;

	create("not-ours", &id);
	printf("# %#lx\n", pa);
	for (uint32_t how = BATON_MEM_ALLOC; how <= BATON_MEM_BORROW; how++) {
		ret = take(id, how, pa, PAGE);
		truth("TAKE: what is not ours", ret && (errno == ERANGE || errno == EINVAL));
	}
	truth("ADOPT: what is not ours", ioctl(device, BATON_IOC_MEM_ADOPT, &adopt) && (errno == ERANGE || errno == EINVAL));
	adopt.start = pa / info.memory_block_size * info.memory_block_size;
	adopt.len = info.memory_block_size;
	truth("ADOPT: its block", ioctl(device, BATON_IOC_MEM_ADOPT, &adopt) && (errno == ERANGE || errno == EINVAL));
	if (pa < MIB) {
		ret = take(id, BATON_MEM_BORROW, pa - PAGE, 3 * PAGE);
		truth("TAKE BORROW: with its neighbours", ret && errno == EINVAL);
		is("TAKE OUTSIDE: with its neighbours", take(id, BATON_MEM_OUTSIDE, pa - PAGE, 3 * PAGE), EEXIST);
	}
	is("DESTROY", destroy(id), 0);
}

/* Pages that are in use move away, and keep what is in them. */
static void test_pressure(void)
{
	uint64_t len = (meminfo("MemAvailable") / 1024 * 2 / 5) * MIB, at, *content;
	int fd = memfd_create("pressure", 0);
	struct timespec from, to;
	uint32_t id;
	bool kept = true;

	create("pressure", &id);
	if (ftruncate(fd, len))
		return;
	content = mmap(NULL, len, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	for (uint64_t i = 0; i < len / PAGE; i++)
		content[i * PAGE / 8] = i * 0x9e3779b97f4a7c15;
	clock_gettime(CLOCK_MONOTONIC, &from);
	at = alloc_anywhere(id, 256 * MIB);
	clock_gettime(CLOCK_MONOTONIC, &to);
	truth("TAKE ALLOC: 256 MiB beside a large memfd", at);
	printf("# at %#lx, beside %llu MiB, in %ld ms\n", at, len / MIB,
	       (to.tv_sec - from.tv_sec) * 1000 + (to.tv_nsec - from.tv_nsec) / 1000000);
	for (uint64_t i = 0; i < len / PAGE; i++)
		kept &= content[i * PAGE / 8] == i * 0x9e3779b97f4a7c15;
	truth("the memfd kept its content", kept);
	is("DESTROY", destroy(id), 0);
	munmap(content, len);
	close(fd);
}

static void test_reserved(void)
{
	uint64_t start, end, len = 32 * MIB, *at;
	uint32_t id;
	long total = meminfo("MemTotal"), available;

	if (!iomem("Crash kernel", 0, &start, &end) || end - start < 2 * len)
		return skip("RESERVED", "no crashkernel= to take for it");
	create("reserved", &id);
	is("TAKE RESERVED", take(id, BATON_MEM_RESERVED, start, len), 0);
	truth("MemTotal counts it", meminfo("MemTotal") == total + (long)(len >> 10));
	is("TAKE RESERVED: once only", take(id, BATON_MEM_RESERVED, start, len), EEXIST);
	at = map(start, len);
	truth("it can be mapped", at != MAP_FAILED);
	at[0] = at[len / 8 - 1] = 1;
	munmap(at, len);
	available = free_kib(id);
	is("GIVE_BACK", give_back(id, start, len), 0);
	truth("the allocator has it", free_kib(id) - available > (long)(len >> 10) - 1024);
	struct baton_adopt adopt = { .size = sizeof(adopt), .start = start, .len = 2 * len };
	is("ADOPT: a part of it is no longer reserved", ioctl(device, BATON_IOC_MEM_ADOPT, &adopt), EINVAL);
	adopt.start += len;
	adopt.len = len;
	is("TAKE RESERVED: of what is to be adopted", take(id, BATON_MEM_RESERVED, adopt.start, PAGE), 0);
	is("ADOPT: it holds an object", ioctl(device, BATON_IOC_MEM_ADOPT, &adopt), EEXIST);
	is("GIVE_BACK", give_back(id, adopt.start, PAGE), 0);
	adopt.start += PAGE;
	adopt.len -= PAGE;
	available = free_kib(id);
	is("ADOPT: reserved pages", ioctl(device, BATON_IOC_MEM_ADOPT, &adopt), 0);
	truth("the allocator has them", free_kib(id) - available > (long)(len >> 10) - 1024);
	truth("MemTotal counts them", meminfo("MemTotal") == total + 2 * (long)(len >> 10));
	is("ADOPT: once only", ioctl(device, BATON_IOC_MEM_ADOPT, &adopt), EINVAL);
	is("TAKE RESERVED: no longer reserved", take(id, BATON_MEM_RESERVED, start, len), EINVAL);
	is("TAKE ALLOC: like any memory", take(id, BATON_MEM_ALLOC, start, len), 0);
	is("DESTROY", destroy(id), 0);
}

static void test_outside(uint64_t pa)
{
	struct baton_panic_notice arg = { .size = sizeof(arg), .pa = pa + 64, .value = 1 };
	int second = open(BATON_DEVICE, O_RDWR | O_CLOEXEC), third;
	uint64_t *at;
	uint32_t id;

	if (!pa)
		return skip("OUTSIDE", "--outside was not given");
	create("outside", &id);
	is("PANIC_NOTICE: no object there", ioctl(second, BATON_IOC_PANIC_NOTICE, &arg), ENOENT);
	is("TAKE OUTSIDE", take(id, BATON_MEM_OUTSIDE, pa, 2 * MIB), 0);
	is("MEM_FD: PAGES of what has none", mem_fd(pa, PAGE, BATON_FD_PAGES), EINVAL);
	at = map(pa, 2 * MIB);
	truth("it can be mapped", at != MAP_FAILED);
	at[8] = 0x5a5a;
	truth("and keeps what is written", at[8] == 0x5a5a);
	munmap(at, 2 * MIB);
	arg.pa = pa + 4;
	is("PANIC_NOTICE: not aligned", ioctl(second, BATON_IOC_PANIC_NOTICE, &arg), EINVAL);
	arg.pa = pa + 64;
	arg.vector = 3;
	is("PANIC_NOTICE: an exception's vector", ioctl(second, BATON_IOC_PANIC_NOTICE, &arg), EINVAL);
	arg.vector = 0;
	is("PANIC_NOTICE", ioctl(second, BATON_IOC_PANIC_NOTICE, &arg), 0);
	third = open(BATON_DEVICE, O_RDWR | O_CLOEXEC);
	is("PANIC_NOTICE: one per machine", ioctl(third, BATON_IOC_PANIC_NOTICE, &arg), EBUSY);
	is("GIVE_BACK: a panic notice is there", give_back(id, pa, 2 * MIB), EBUSY);
	close(second);
	is("PANIC_NOTICE: the first one's file is closed", ioctl(third, BATON_IOC_PANIC_NOTICE, &arg), 0);
	close(third);
	is("GIVE_BACK", give_back(id, pa, 2 * MIB), 0);
	is("DESTROY", destroy(id), 0);
}

static void test_adopt(uint64_t pa)
{
	struct baton_adopt arg = { .size = sizeof(arg), .start = pa ? pa : info.memory_block_size, .len = PAGE };
	long total = meminfo("MemTotal");
	uint32_t id;

	if (pa) {
		is("ADOPT: not a whole block", ioctl(device, BATON_IOC_MEM_ADOPT, &arg), EINVAL);
		arg.len = info.memory_block_size;
		create("holder", &id);
		is("TAKE OUTSIDE: what mem= hides", take(id, BATON_MEM_OUTSIDE, pa + arg.len - PAGE, PAGE), ERANGE);
		is("DESTROY", destroy(id), 0);
		is("ADOPT", ioctl(device, BATON_IOC_MEM_ADOPT, &arg), 0);
		printf("# MemTotal grew by %ld of %llu KiB\n", meminfo("MemTotal") - total, arg.len >> 10);
		truth("MemTotal counts it", meminfo("MemTotal") - total > (long)(arg.len >> 10) * 9 / 10);
	} else {
		skip("ADOPT", "--adopt was not given");
	}
	arg.len = info.memory_block_size;
	is("ADOPT: what is RAM already", ioctl(device, BATON_IOC_MEM_ADOPT, &arg), EINVAL);
	arg.start = (1ull << 56) / arg.len * arg.len;
	is("ADOPT: past what the CPU can form", ioctl(device, BATON_IOC_MEM_ADOPT, &arg), ERANGE);
}

static bool rings(int fd, int ms)
{
	struct pollfd arg = { .fd = fd, .events = POLLIN };
	uint64_t count;

	return poll(&arg, 1, ms) == 1 && read(fd, &count, 8) == 8;
}

static int ring(int file, uint32_t instance, uint32_t apic_id, uint32_t vector)
{
	struct baton_doorbell arg = {
		.size = sizeof(arg), .instance = instance, .apic_id = apic_id, .vector = vector
	};

	return ioctl(file, BATON_IOC_DOORBELL_RING, &arg);
}

static int connect_bell(int file, uint32_t apic_id, uint32_t vector)
{
	struct baton_doorbell arg = { .size = sizeof(arg), .apic_id = apic_id, .vector = vector };

	return ioctl(file, BATON_IOC_DOORBELL_CONNECT, &arg);
}

static double seconds(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec + now.tv_nsec / 1e9;
}

static void run_on(uint32_t number)
{
	cpu_set_t set;

	CPU_ZERO(&set);
	CPU_SET(number, &set);
	sched_setaffinity(0, sizeof(set), &set);
}

/* How often CPU 0 comes round in half a second. */
static double laps(void)
{
	double end = seconds() + 0.5, count = 0;

	for (; seconds() < end; count++)
		;
	return count;
}

/* Another CPU rings as fast as it can. Most of it wakes nobody, and the last of it is heard. */
static void test_flood(void)
{
	struct baton_info before = { .size = sizeof(before) }, after = { .size = sizeof(after) };
	int file = open(BATON_DEVICE, O_RDWR | O_CLOEXEC), child;
	struct baton_doorbell bell = { .size = sizeof(bell), .eventfd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK) };
	uint64_t signals = 0, count = 0;
	double quiet, busy, began, took;

	if (info.possible_cpus < 2)
		return skip("a flood", "there is only one CPU");
	is("DOORBELL_OPEN", ioctl(file, BATON_IOC_DOORBELL_OPEN, &bell), 0);
	run_on(0);
	quiet = laps();
	began = seconds();
	child = fork();
	if (!child) {
		run_on(1);
		for (;;)
			ring(file, BATON_SELF, bell.apic_id, bell.vector);
	}
	busy = laps();
	for (int i = 0; i < 100 && !ioctl(file, BATON_IOC_INFO, &after) && !after.muffled; i++)
		usleep(100000);
	kill(child, SIGKILL);
	waitpid(child, NULL, 0);
	is("INFO", ioctl(file, BATON_IOC_INFO, &before), 0);
	took = seconds() - began;
	usleep(100000);		/* ten times what the last signal may take */
	is("INFO", ioctl(file, BATON_IOC_INFO, &after), 0);
	if (read(bell.eventfd, &count, 8) == 8)
		signals = count;
	printf("# %llu rings in %.2f s, %llu muffled, %lu signals; CPU 0 did %.0f %% of its work meanwhile\n",
	       after.rings, took, after.muffled, signals, 100 * busy / quiet);
	truth("a flood is muffled", after.muffled && after.muffled < after.rings && after.rings == before.rings);
	truth("each ring is signalled, or muffled", signals >= after.rings - after.muffled);
	/* A window has 10 ms at least, 32 signals of its own and one at its end. */
	truth("so many signals and no more", signals <= (uint64_t)(took / 0.010 + 2) * 33);
	for (uint32_t i = 0; i < info.possible_cpus; i++)
		run_on(i);
	close(file);
	close(bell.eventfd);
}

static void test_doorbell(void)
{
	struct baton_doorbell bell = { .size = sizeof(bell) }, bad;
	int file = open(BATON_DEVICE, O_RDWR | O_CLOEXEC);
	uint32_t everybody = info.flags & BATON_INFO_X2APIC ? UINT32_MAX : 0xff, id;
	double from;
	int heard = 0;

	bell.eventfd = -1;
	is("DOORBELL_OPEN: no eventfd", ioctl(file, BATON_IOC_DOORBELL_OPEN, &bell), EINVAL);
	bell.eventfd = eventfd(0, EFD_CLOEXEC);
	bell.instance = 1;
	is("DOORBELL_OPEN: for an instance", ioctl(file, BATON_IOC_DOORBELL_OPEN, &bell), EINVAL);
	bell.instance = 0;
	is("DOORBELL_OPEN", ioctl(file, BATON_IOC_DOORBELL_OPEN, &bell), 0);
	printf("# apic id %u, vector %#x\n", bell.apic_id, bell.vector);
	truth("it is on CPU 0", bell.apic_id == apic_id_of(0, NULL) && bell.vector >= 32);
	bad = bell;
	is("DOORBELL_OPEN: one per file", ioctl(file, BATON_IOC_DOORBELL_OPEN, &bad), EBUSY);
	from = seconds();
	for (int i = 0; i < 32; i++)
		heard += !ring(file, BATON_SELF, bell.apic_id, bell.vector) && rings(bell.eventfd, 2000);
	printf("# %.0f ns a ring\n", (seconds() - from) * 1e9 / 32);
	for (int i = 0; i < 1000; i++)
		heard += !ring(file, BATON_SELF, bell.apic_id, bell.vector) && rings(bell.eventfd, 2000);
	truth("1032 rings heard", heard == 1032);
	is("DOORBELL_RING: an exception's vector", ring(file, BATON_SELF, bell.apic_id, 31), EINVAL);
	is("DOORBELL_RING: no vector", ring(file, BATON_SELF, bell.apic_id, 256), EINVAL);
	is("DOORBELL_RING: everybody", ring(file, BATON_SELF, everybody, bell.vector), EINVAL);
	is("DOORBELL_RING: another vector of this kernel", ring(file, BATON_SELF, bell.apic_id, 0xf8), ENOENT);
	is("DOORBELL_RING: from a file without a bell", ring(device, BATON_SELF, bell.apic_id, bell.vector), ENOENT);
	create("liar", &id);
	is("DOORBELL_RING: an instance that says it runs here", ring(file, id, bell.apic_id, bell.vector), ENOENT);
	is("DOORBELL_CONNECT: a CPU of this kernel", connect_bell(file, bell.apic_id, bell.vector), EBUSY);
	is("DOORBELL_CONNECT: an exception's vector", connect_bell(file, 0x70, 31), EINVAL);
	is("DOORBELL_CONNECT: everybody", connect_bell(file, everybody, 64), EINVAL);
	is("DESTROY", destroy(id), 0);
	close(file);
	bell.eventfd = eventfd(0, EFD_CLOEXEC);
	file = open(BATON_DEVICE, O_RDWR | O_CLOEXEC);
	is("DOORBELL_OPEN: after the first one's file was closed", ioctl(file, BATON_IOC_DOORBELL_OPEN, &bell), 0);
	close(file);
}

/* With a CPU that is offline here and recorded for @id. */
static void test_bells_of_others(uint32_t id, uint32_t other, uint32_t apic_id)
{
	struct baton_panic_notice notice = { .size = sizeof(notice), .apic_id = apic_id, .vector = 64, .pa = SIPI_PAGE };
	int file = open(BATON_DEVICE, O_RDWR | O_CLOEXEC);

	is("DOORBELL_RING: a CPU of the instance", ring(device, id, apic_id, 64), 0);
	is("DOORBELL_RING: in another's name", ring(device, other, apic_id, 64), ENOENT);
	is("DOORBELL_RING: in nobody's name", ring(device, 4711, apic_id, 64), ENOENT);
	is("DOORBELL_RING: it is not the predecessor's", ring(device, BATON_SELF, apic_id, 64), ENOENT);
	is("DOORBELL_CONNECT: an instance's CPU", connect_bell(file, apic_id, 64), EBUSY);
	is("TAKE RECORD", cpu(BATON_IOC_CPU_TAKE, id, apic_id, BATON_CPU_RECORD, 0), 0);
	is("DOORBELL_RING: the CPU is no longer its", ring(device, id, apic_id, 64), ENOENT);
	is("PANIC_NOTICE: a bell that was not connected", ioctl(file, BATON_IOC_PANIC_NOTICE, &notice), ENOENT);
	is("DOORBELL_CONNECT: a CPU that is nobody's here", connect_bell(file, apic_id, 64), 0);
	is("DOORBELL_CONNECT: to another CPU", connect_bell(file, apic_id + 0x40, 64), EBUSY);
	is("DOORBELL_RING: the predecessor", ring(file, BATON_SELF, apic_id, 64), 0);
	is("DOORBELL_RING: another vector there", ring(file, BATON_SELF, apic_id, 65), ENOENT);
	is("DOORBELL_CONNECT: the same CPU, another vector", connect_bell(file, apic_id, 65), 0);
	is("DOORBELL_RING: the predecessor's new bell", ring(file, BATON_SELF, apic_id, 65), 0);
	is("DOORBELL_RING: from another file", ring(device, BATON_SELF, apic_id, 64), ENOENT);
	close(file);
}

/* cli; ds = cs; dword [0xff0] = 0x600d600d; hlt for ever */
static const uint8_t real_mode_stub[] = {
	0xfa, 0x8c, 0xc8, 0x8e, 0xd8, 0x66, 0xc7, 0x06, 0xf0, 0x0f, 0x0d, 0x60, 0x0d, 0x60, 0xf4, 0xeb, 0xfd,
};

static bool becomes(volatile uint32_t *word, uint32_t value)
{
	for (int i = 0; i < 5000 && *word != value; i++)
		usleep(1000);
	return *word == value;
}

static void test_cpus(void)
{
	uint32_t last = info.possible_cpus - 1, apic_id = apic_id_of(last, NULL), id, other;
	volatile uint32_t *word;
	char row[512], want[64];
	uint64_t at;
	uint8_t *page;

	if (!last)
		return skip("CPUs", "there is only one");
	create("cpus", &id);
	create("other", &other);
	is("GIVE: an online CPU", cpu(BATON_IOC_CPU_GIVE, id, apic_id, BATON_CPU_RECORD, 0), EBUSY);
	is("TAKE: an online CPU", cpu(BATON_IOC_CPU_TAKE, id, apic_id, BATON_CPU_FENCE, 0), EBUSY);
	is("offline it", set_online(last, false), 0);
	is("GIVE: no such way", cpu(BATON_IOC_CPU_GIVE, id, apic_id, BATON_CPU_FENCE, 0), EINVAL);
	is("TAKE: no such way", cpu(BATON_IOC_CPU_TAKE, id, apic_id, BATON_CPU_START, 0), EINVAL);
	is("GIVE: to nobody", cpu(BATON_IOC_CPU_GIVE, 4711, apic_id, BATON_CPU_RECORD, 0), ENOENT);
	is("GIVE: to BATON_SELF", cpu(BATON_IOC_CPU_GIVE, BATON_SELF, apic_id, BATON_CPU_RECORD, 0), EINVAL);
	is("GIVE: everybody", cpu(BATON_IOC_CPU_GIVE, id, UINT32_MAX, BATON_CPU_RECORD, 0), EINVAL);
	is("GIVE RECORD: with a start", cpu(BATON_IOC_CPU_GIVE, id, apic_id, BATON_CPU_RECORD, PAGE), EINVAL);
	is("GIVE START: not a page", cpu(BATON_IOC_CPU_GIVE, id, apic_id, BATON_CPU_START, SIPI_PAGE + 1), EINVAL);
	is("GIVE START: above 1 MiB", cpu(BATON_IOC_CPU_GIVE, id, apic_id, BATON_CPU_START, MIB), ERANGE);
	is("TAKE: never given", cpu(BATON_IOC_CPU_TAKE, id, apic_id, BATON_CPU_RECORD, 0), ENOENT);
	is("GIVE RECORD", cpu(BATON_IOC_CPU_GIVE, id, apic_id, BATON_CPU_RECORD, 0), 0);
	is("GIVE RECORD: to the same again", cpu(BATON_IOC_CPU_GIVE, id, apic_id, BATON_CPU_RECORD, 0), 0);
	is("GIVE: it belongs to another", cpu(BATON_IOC_CPU_GIVE, other, apic_id, BATON_CPU_RECORD, 0), EBUSY);
	is("TAKE: it belongs to another", cpu(BATON_IOC_CPU_TAKE, other, apic_id, BATON_CPU_RECORD, 0), EBUSY);
	at = alloc_anywhere(id, PAGE);
	truth("memory of an instance that has a CPU", at);
	is("GIVE_BACK: a CPU is recorded", give_back(id, at, PAGE), EBUSY);
	is("DESTROY: a CPU is recorded", destroy(id), EBUSY);
	is("online a CPU that was given away", set_online(last, true), EINVAL);
	snprintf(want, sizeof(want), " cpus created %u 4096 %lx-%lx -\n", apic_id, at, (unsigned long)(at + PAGE - 1));
	truth("its row in /proc/multikernel", proc_row(id, row, sizeof(row)) && strstr(row, want));
	test_bells_of_others(id, other, apic_id);
	is("GIVE_BACK: the CPU has been taken back", give_back(id, at, PAGE), 0);

	is("TAKE BORROW: the SIPI page", take(id, BATON_MEM_BORROW, SIPI_PAGE, PAGE), 0);
	page = map(SIPI_PAGE, PAGE);
	memcpy(page, real_mode_stub, sizeof(real_mode_stub));
	word = (volatile uint32_t *)(page + 0xff0);
	for (int i = 0; i < 3; i++) {
		*word = 0;
		is("GIVE START", cpu(BATON_IOC_CPU_GIVE, id, apic_id, BATON_CPU_START, SIPI_PAGE), 0);
		truth("it ran our code", becomes(word, 0x600d600d));
		*word = 0;
		is("GIVE START: again", cpu(BATON_IOC_CPU_GIVE, id, apic_id, BATON_CPU_START, SIPI_PAGE), 0);
		truth("it began anew", becomes(word, 0x600d600d));
		is("TAKE FENCE", cpu(BATON_IOC_CPU_TAKE, id, apic_id, BATON_CPU_FENCE, 0), 0);
	}
	munmap(page, PAGE);
	is("online it again", set_online(last, true), 0);
	is("DESTROY", destroy(other), 0);
	is("DESTROY", destroy(id), 0);
}

/*
 * Waits [rsi] ticks, notes CR4 in [rsi + 8], spoils whatever it may: all registers, the stack, the direction flag.
 */
static const uint8_t away_stub[] = {
	0xf3, 0x0f, 0x1e, 0xfa,				/* endbr64 */
	0x0f, 0x31, 0x48, 0xc1, 0xe2, 0x20,		/* rdtsc; shl $32, %rdx */
	0x48, 0x09, 0xd0, 0x48, 0x8b, 0x0e,		/* or %rdx, %rax; mov (%rsi), %rcx */
	0x48, 0x01, 0xc1, 0xf3, 0x90,			/* add %rax, %rcx; 1: pause */
	0x0f, 0x31, 0x48, 0xc1, 0xe2, 0x20,		/* rdtsc; shl $32, %rdx */
	0x48, 0x09, 0xd0, 0x48, 0x39, 0xc8,		/* or %rdx, %rax; cmp %rcx, %rax */
	0x72, 0xf0, 0x0f, 0x20, 0xe0,			/* jb 1b; mov %cr4, %rax */
	0x48, 0x89, 0x46, 0x08,				/* mov %rax, 8(%rsi) */
	0x31, 0xdb, 0x31, 0xed, 0x4d, 0x31, 0xe4,	/* rbx = rbp = r12 = */
	0x4d, 0x31, 0xed, 0x4d, 0x31, 0xf6, 0x4d, 0x31, 0xff,	/* r13 = r14 = r15 = */
	0x48, 0x31, 0xe4, 0xfd, 0xff, 0xe7,		/* rsp = 0; std; jmp *%rdi */
};

static void test_yield(void)
{
	enum { IDENT, P4, P3, P2, TABLE, STUB, ARG };
	uint64_t at, len = 2 * MIB, (*pages)[PAGE / 8], top;
	struct baton_yield arg = { .size = sizeof(arg) };
	struct timespec from, to;
	uint32_t id, flags;
	long ms;

	create("yield", &id);
	at = alloc_anywhere(id, len);
	pages = map(at, len);
	if (!truth("memory for a yield", at && pages != MAP_FAILED))
		return;
	arg.entry_pa = at + STUB * PAGE;
	arg.arg_pa = at + ARG * PAGE;
	arg.table_pa = at + TABLE * PAGE;
	arg.ident_pa = at + IDENT * PAGE;
	top = info.flags & BATON_INFO_LA57 ? IDENT : P4;
	if (top == P4)
		arg.ident_pa = at + P4 * PAGE;
	pages[IDENT][0] = (at + P4 * PAGE) | 3;
	pages[P4][0] = (at + P3 * PAGE) | 3;
	pages[P3][at >> 30] = (at + P2 * PAGE) | 3;
	for (uint64_t i = 0; i < 512; i++)
		pages[P2][i] = (at >> 30 << 30) | i << 21 | 0x83;
	memcpy(pages[STUB], away_stub, sizeof(away_stub));

	if (info.possible_cpus > 1)
		is("YIELD: not the last CPU", ioctl(device, BATON_IOC_YIELD, &arg), EBUSY);
	for (uint32_t i = 1; i < info.possible_cpus; i++)
		set_online(i, false);
	arg.table_pa = at + len;
	is("YIELD: the table is nobody's", ioctl(device, BATON_IOC_YIELD, &arg), ENOENT);
	arg.table_pa = at + TABLE * PAGE + 8;
	is("YIELD: the table is not a page", ioctl(device, BATON_IOC_YIELD, &arg), EINVAL);
	arg.table_pa = at + TABLE * PAGE;
	arg.reserved = 1;
	is("YIELD: reserved is not zero", ioctl(device, BATON_IOC_YIELD, &arg), EINVAL);
	arg.reserved = 0;
	for (int i = 0; i < 100; i++)
		if (ioctl(device, BATON_IOC_YIELD, &arg))
			break;
	is("YIELD: 100 times there and back", ioctl(device, BATON_IOC_YIELD, &arg), 0);
	printf("# %llu ticks away\n", arg.away_tsc);
	truth("PCIDE and PGE were clear", pages[ARG][1] && !(pages[ARG][1] & 0x20080));
	pages[ARG][0] = info.tsc_khz * 1000ull;
	clock_gettime(CLOCK_MONOTONIC, &from);
	is("YIELD: a second away", ioctl(device, BATON_IOC_YIELD, &arg), 0);
	clock_gettime(CLOCK_MONOTONIC, &to);
	ms = (to.tv_sec - from.tv_sec) * 1000 + (to.tv_nsec - from.tv_nsec) / 1000000;
	printf("# %llu ticks away, %ld ms by the clock\n", arg.away_tsc, ms);
	truth("both clocks agree", arg.away_tsc >= pages[ARG][0] && ms >= 990 && ms < 3000);
	for (uint32_t i = 1; i < info.possible_cpus; i++)
		set_online(i, true);
	truth("the other CPUs come back", info.possible_cpus < 2 || (apic_id_of(1, &flags) != UINT32_MAX && flags & BATON_CPU_ONLINE));
	munmap(pages, len);
	is("DESTROY", destroy(id), 0);
}

/* A path below the function's folder. */
static const char *pci_path(uint32_t domain, uint32_t bdf, const char *name)
{
	static char path[96];

	snprintf(path, sizeof(path), "/sys/bus/pci/devices/%04x:%02x:%02x.%x%s",
		 domain, bdf >> 8, bdf >> 3 & 31, bdf & 7, name);
	return path;
}

/* A function behind a bridge, beside one that is not: each on a root bus of its own. */
static void test_pci_behind(uint64_t ecam, uint32_t bdf, uint32_t bridge, uint32_t behind)
{
	struct baton_pci arg = {
		.size = sizeof(arg), .domain = 2, .ecam_pa = ecam, .bus_end = 0xff, .functions = 2, .bdf = { bdf, bridge }
	};

	is("PCI_ADD: a bridge", ioctl(device, BATON_IOC_PCI_ADD, &arg), EINVAL);
	truth("nothing is shown", access(pci_path(2, bdf, ""), F_OK));
	arg.bdf[1] = behind;
	for (int i = 0; i < 3; i++) {
		is("PCI_ADD: a function behind a bridge", ioctl(device, BATON_IOC_PCI_ADD, &arg), 0);
		truth("the function is there", !access(pci_path(2, behind, "/resource"), F_OK));
		truth("so is the other", !access(pci_path(2, bdf, ""), F_OK));
		truth("the bridge is not", access(pci_path(2, bridge, ""), F_OK));
		is("PCI_ADD: the domain has buses", ioctl(device, BATON_IOC_PCI_ADD, &arg), EEXIST);
		is("PCI_REMOVE", ioctl(device, BATON_IOC_PCI_REMOVE, &arg), 0);
		truth("both have gone", access(pci_path(2, behind, ""), F_OK) && access(pci_path(2, bdf, ""), F_OK));
	}
}

static void test_pci(uint64_t ecam, uint32_t bdf, uint32_t bridge, uint32_t behind)
{
	struct baton_pci arg = { .size = sizeof(arg), .domain = 1, .ecam_pa = ecam, .functions = 1 };

	is("PCI_REMOVE: none there", ioctl(device, BATON_IOC_PCI_REMOVE, &arg), ENOENT);
	arg.functions = 0;
	is("PCI_ADD: no function", ioctl(device, BATON_IOC_PCI_ADD, &arg), EINVAL);
	arg.functions = BATON_PCI_MAX + 1;
	is("PCI_ADD: too many functions", ioctl(device, BATON_IOC_PCI_ADD, &arg), EINVAL);
	arg.functions = 1;
	arg.ecam_pa = 64 * MIB;
	is("PCI_ADD: ECAM in RAM", ioctl(device, BATON_IOC_PCI_ADD, &arg), ERANGE);
	arg.ecam_pa = -MIB;
	is("PCI_ADD: ECAM at the end of all addresses", ioctl(device, BATON_IOC_PCI_ADD, &arg), ERANGE);
	if (!ecam)
		return skip("PCI", "--pci was not given");
	arg.ecam_pa = ecam;
	arg.bdf[0] = 0x100;
	is("PCI_ADD: a bus past the last", ioctl(device, BATON_IOC_PCI_ADD, &arg), EINVAL);
	arg.bdf[0] = 0xf8 - 8;
	is("PCI_ADD: no such function", ioctl(device, BATON_IOC_PCI_ADD, &arg), ENOENT);
	if (bridge)
		test_pci_behind(ecam, bdf, bridge, behind);
	arg.bdf[0] = bdf;
	for (int i = 0; i < 3; i++) {
		is("PCI_ADD", ioctl(device, BATON_IOC_PCI_ADD, &arg), 0);
		truth("the function is there", !access(pci_path(1, bdf, ""), F_OK));
		is("PCI_ADD: there is one", ioctl(device, BATON_IOC_PCI_ADD, &arg), EEXIST);
		truth("its neighbour is not", access(pci_path(1, 0, ""), F_OK) || !bdf);
		is("PCI_REMOVE", ioctl(device, BATON_IOC_PCI_REMOVE, &arg), 0);
		truth("the function has gone", access(pci_path(1, bdf, ""), F_OK));
	}
	is("PCI_ADD: and stays", ioctl(device, BATON_IOC_PCI_ADD, &arg), 0);
}

/* Runs @asks as root without one capability; says whether it was refused with EPERM. */
static bool refused_without(int capability, int (*asks)(uint32_t id), uint32_t id)
{
	struct __user_cap_header_struct header = { _LINUX_CAPABILITY_VERSION_3, 0 };
	struct __user_cap_data_struct data[2];
	int status;

	fflush(stdout);
	if (!fork()) {
		if (syscall(SYS_capget, &header, data))
			_exit(1);
		data[capability / 32].effective &= ~(1u << capability % 32);
		if (syscall(SYS_capset, &header, data))
			_exit(2);
		_exit(asks(id) && errno == EPERM ? 0 : 3);
	}
	wait(&status);
	return !status;
}

static int asks_for_instance(uint32_t id)
{
	return create("without", &id);
}

static int asks_for_outside(uint32_t id)
{
	return take(id, BATON_MEM_OUTSIDE, 0xfee00000, PAGE);
}

/* With the device open, but no right to use it: what a service that inherits the file could do. */
static void test_rights(void)
{
	uint32_t id, hidden;
	int status;
	char row[512];

	create("hidden", &hidden);
	truth("memory whose place is not for everybody", alloc_anywhere(hidden, 2 * MIB));
	fflush(stdout);
	if (!fork()) {
		if (setresuid(65534, 65534, 65534))
			_exit(1);
		if (ioctl(device, BATON_IOC_INFO, &info))
			_exit(2);
		if (!create("nobody", &id) || errno != EPERM)
			_exit(3);
		_exit(proc_row(hidden, row, sizeof(row)) && strstr(row, " 2097152 - ") ? 0 : 4);
	}
	wait(&status);
	truth("without CAP_SYS_ADMIN: INFO, no change, no addresses", !status);
	truth("root without CAP_SYS_ADMIN", refused_without(CAP_SYS_ADMIN, asks_for_instance, 0));
	truth("root without CAP_SYS_BOOT", refused_without(CAP_SYS_BOOT, asks_for_instance, 0));
	truth("root without CAP_SYS_RAWIO: OUTSIDE", refused_without(CAP_SYS_RAWIO, asks_for_outside, hidden));
	is("DESTROY", destroy(hidden), 0);
}

static void test_unload(const char *when, int want)
{
	is(when, syscall(SYS_delete_module, "baton", O_NONBLOCK), want);
}

static int end(uint32_t how)
{
	struct baton_end arg = { .size = sizeof(arg), .how = how };

	return ioctl(device, BATON_IOC_END, &arg);
}

static int ioapic_mask(uint64_t pa)
{
	struct baton_ioapic arg = { .size = sizeof(arg), .pa = pa };

	return ioctl(device, BATON_IOC_IOAPIC_MASK, &arg);
}

static void test_platform(void)
{
	struct baton_sleep_type sleep = { .size = sizeof(sleep), .state = 5 };
	struct baton_iommu iommu = { .size = sizeof(iommu) };
	uint32_t id;

	is("END: no such way", end(2), EINVAL);
	is("END ALONE", end(BATON_END_ALONE), 0);
	is("END ALONE: again", end(BATON_END_ALONE), 0);
	is("suspend: another kernel has the machine", write_file("/sys/power/state", "freeze"), EBUSY);
	is("END MACHINE", end(BATON_END_MACHINE), 0);
	create("asleep", &id);
	is("suspend: there is an instance", write_file("/sys/power/state", "freeze"), EBUSY);
	is("hibernation: there is an instance", write_file("/sys/power/disk", "reboot") ?:
	   write_file("/sys/power/state", "disk"), EBUSY);
	is("DESTROY", destroy(id), 0);

	is("SLEEP_TYPE: S5", ioctl(device, BATON_IOC_SLEEP_TYPE, &sleep), 0);
	truth("SLEEP_TYPE: three bits each", sleep.type_a < 8 && sleep.type_b < 8);
	sleep.state = 6;
	is("SLEEP_TYPE: there is no S6", ioctl(device, BATON_IOC_SLEEP_TYPE, &sleep), EINVAL);

	is("IOAPIC_MASK: that is RAM", ioapic_mask(64 * MIB), ERANGE);
	is("IOAPIC_MASK: no such place", ioapic_mask(0xfec00008), EINVAL);
	is("IOAPIC_MASK: above 4 GiB", ioapic_mask(1ull << 32), ERANGE);
	is("IOAPIC_MASK: other CPUs are online", ioapic_mask(0xfec00000), EBUSY);
	is("IOMMU_OFF: other CPUs are online", ioctl(device, BATON_IOC_IOMMU_OFF, &iommu), EBUSY);
	iommu.reserved = 1;
	is("IOMMU_OFF: reserved", ioctl(device, BATON_IOC_IOMMU_OFF, &iommu), EINVAL);
}

static void test_lockdown(void)
{
	uint32_t id;

	if (write_file("/sys/kernel/security/lockdown", "integrity"))
		return skip("lockdown", "no /sys/kernel/security/lockdown");
	is("CREATE: the kernel is locked down", create("locked", &id), EPERM);
	is("TAKE: the kernel is locked down", take(0, BATON_MEM_ALLOC, 64 * MIB, PAGE), EPERM);
	is("INFO: it says so", ioctl(device, BATON_IOC_INFO, &info), 0);
	truth("INFO: lockdown flag", info.flags & BATON_INFO_LOCKDOWN);
}

static void panic_with_notice(uint64_t pa)
{
	struct baton_panic_notice arg = { .size = sizeof(arg), .pa = pa + 8, .value = 0xdeadbea7 };
	uint32_t id;

	create("panic", &id);
	is("TAKE OUTSIDE", take(id, BATON_MEM_OUTSIDE, pa, PAGE), 0);
	is("PANIC_NOTICE", ioctl(device, BATON_IOC_PANIC_NOTICE, &arg), 0);
	fflush(stdout);
	write_file("/proc/sysrq-trigger", "c");
}

static void print_layout(void)
{
#define SIZE(type) printf("sizeof %s %zu\n", #type, sizeof(struct type))
#define AT(type, field) printf("offsetof %s.%s %zu\n", #type, #field, offsetof(struct type, field))
	SIZE(baton_info), AT(baton_info, abi), AT(baton_info, flags), AT(baton_info, tsc_khz);
	AT(baton_info, memory_block_size), AT(baton_info, possible_cpus), AT(baton_info, instances);
	AT(baton_info, rings), AT(baton_info, muffled);
	SIZE(baton_cpu_info), AT(baton_cpu_info, cpu), AT(baton_cpu_info, apic_id), AT(baton_cpu_info, flags);
	SIZE(baton_instance), AT(baton_instance, id), AT(baton_instance, state), AT(baton_instance, reserved);
	AT(baton_instance, name), AT(baton_instance, image);
	SIZE(baton_mem), AT(baton_mem, instance), AT(baton_mem, how), AT(baton_mem, reserved);
	AT(baton_mem, start), AT(baton_mem, len);
	SIZE(baton_mem_fd), AT(baton_mem_fd, flags), AT(baton_mem_fd, start), AT(baton_mem_fd, len);
	AT(baton_mem_fd, fd), AT(baton_mem_fd, reserved);
	SIZE(baton_mem_file), AT(baton_mem_file, flags), AT(baton_mem_file, fd), AT(baton_mem_file, reserved);
	AT(baton_mem_file, start), AT(baton_mem_file, len), AT(baton_mem_file, offset);
	SIZE(baton_adopt), AT(baton_adopt, reserved), AT(baton_adopt, start), AT(baton_adopt, len);
	SIZE(baton_cpu), AT(baton_cpu, instance), AT(baton_cpu, apic_id), AT(baton_cpu, how), AT(baton_cpu, start_pa);
	SIZE(baton_doorbell), AT(baton_doorbell, eventfd), AT(baton_doorbell, apic_id), AT(baton_doorbell, vector);
	AT(baton_doorbell, instance);
	SIZE(baton_yield), AT(baton_yield, reserved), AT(baton_yield, entry_pa), AT(baton_yield, arg_pa);
	AT(baton_yield, table_pa), AT(baton_yield, ident_pa), AT(baton_yield, away_tsc);
	SIZE(baton_pci), AT(baton_pci, domain), AT(baton_pci, ecam_pa), AT(baton_pci, bus_end);
	AT(baton_pci, functions), AT(baton_pci, bdf);
	SIZE(baton_pci_function), AT(baton_pci_function, instance), AT(baton_pci_function, domain);
	AT(baton_pci_function, bdf), AT(baton_pci_function, how), AT(baton_pci_function, devices);
	AT(baton_pci_function, obstacle), AT(baton_pci_function, error), AT(baton_pci_function, device);
	SIZE(baton_panic_notice), AT(baton_panic_notice, apic_id), AT(baton_panic_notice, vector);
	AT(baton_panic_notice, reserved), AT(baton_panic_notice, pa), AT(baton_panic_notice, value);
	SIZE(baton_end), AT(baton_end, how), SIZE(baton_ioapic), AT(baton_ioapic, reserved), AT(baton_ioapic, pa);
	SIZE(baton_sleep_type), AT(baton_sleep_type, state), AT(baton_sleep_type, type_a);
	AT(baton_sleep_type, type_b), AT(baton_sleep_type, reserved);
}

int main(int argc, char **argv)
{
	uint64_t outside = 0, adopt = 0, ecam = 0, panic_at = 0, not_ours[8];
	bool lockdown = false;
	uint32_t bdf = 0, bridge = 0, behind = 0, id;
	int not_ours_count = 0;

	setvbuf(stdout, NULL, _IOLBF, 0);
	if (argc > 1 && !strcmp(argv[1], "--hibernate")) {
		device = open(BATON_DEVICE, O_RDWR | O_CLOEXEC);
		if (device < 0)
			return fprintf(stderr, "selftest: %s: %s\n", BATON_DEVICE, strerror(errno)), 2;
		return hibernate(argc - 2, argv + 2), failures ? 1 : 0;
	}
	for (int i = 1; i < argc; i++) {
		if (!strcmp(argv[i], "--layout"))
			return print_layout(), 0;
		else if (!strcmp(argv[i], "--lockdown"))
			lockdown = true;
		else if (!strcmp(argv[i], "--outside") && i + 1 < argc)
			outside = strtoull(argv[++i], NULL, 0);
		else if (!strcmp(argv[i], "--not-ours") && i + 1 < argc && not_ours_count < 8)
			not_ours[not_ours_count++] = strtoull(argv[++i], NULL, 0);
		else if (!strcmp(argv[i], "--adopt") && i + 1 < argc)
			adopt = strtoull(argv[++i], NULL, 0);
		else if (!strcmp(argv[i], "--panic") && i + 1 < argc)
			panic_at = strtoull(argv[++i], NULL, 0);
		else if (!strcmp(argv[i], "--pci") && i + 2 < argc)
			ecam = strtoull(argv[i + 1], NULL, 0), bdf = strtoul(argv[i + 2], NULL, 0), i += 2;
		else if (!strcmp(argv[i], "--behind") && i + 2 < argc)
			bridge = strtoul(argv[i + 1], NULL, 0), behind = strtoul(argv[i + 2], NULL, 0), i += 2;
		else
			return fprintf(stderr, "selftest: unknown argument %s\n", argv[i]), 2;
	}
	device = open(BATON_DEVICE, O_RDWR | O_CLOEXEC);
	if (device < 0)
		return fprintf(stderr, "selftest: %s: %s\n", BATON_DEVICE, strerror(errno)), 2;

	test_info();
	test_instances();
	test_memory();
	test_zero();
	for (int i = 0; i < not_ours_count; i++)
		test_not_ours(not_ours[i]);
	test_memfds();
	test_pressure();
	test_reserved();
	test_outside(outside);
	test_adopt(adopt);
	test_doorbell();
	test_flood();
	test_cpus();
	test_yield();
	test_pci(ecam, bdf, bridge, behind);
	test_functions();
	test_platform();
	test_rights();
	test_unload("unload: the device is open", EAGAIN);
	if (panic_at)
		panic_with_notice(panic_at);
	if (lockdown) {
		test_lockdown();
	} else if (!ecam) {
		create("stays", &id);
		close(device);
		test_unload("unload: there is an instance", EAGAIN);
		device = open(BATON_DEVICE, O_RDWR | O_CLOEXEC);
		is("DESTROY", destroy(id), 0);
	}
	close(device);
	printf("1..%d\n# %d failed\n", tests, failures);
	return failures ? 1 : 0;
}
