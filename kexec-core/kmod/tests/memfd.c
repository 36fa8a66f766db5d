// SPDX-License-Identifier: GPL-2.0
/*
 * Pages of a memory object in memfds (BATON_IOC_MEM_FILE): whose content it is, where it lies, what happens to it when
 * the file is mapped, cut, punched, sealed, forked, locked and closed, and what comes back in the end.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/memfd.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>
#include "selftest.h"
#include "../uapi/baton.h"

#define PAGES 64ull
#define LEN (PAGES * PAGE)

static int file_at(int fd, uint64_t start, uint64_t len, uint64_t offset, uint32_t flags)
{
	struct baton_mem_file arg = {
		.size = sizeof(arg), .fd = fd, .flags = flags, .start = start, .len = len, .offset = offset
	};

	return ioctl(device, BATON_IOC_MEM_FILE, &arg);
}

static int file_it(int fd, uint64_t start, uint64_t len, uint32_t flags)
{
	return file_at(fd, start, len, 0, flags);
}

static void *map_file(int fd, int flags)
{
	return mmap(NULL, LEN, PROT_READ | PROT_WRITE, flags, fd, 0);
}

/* Which physical page is mapped there; 0: none. */
static uint64_t physical(const volatile char *at)
{
	int fd = open("/proc/self/pagemap", O_RDONLY);
	uint64_t entry = 0;

	(void)*at;
	if (pread(fd, &entry, 8, (uintptr_t)at / PAGE * 8) != 8)
		entry = 0;
	close(fd);
	return (entry & ((1ull << 55) - 1)) * PAGE;
}

static uint64_t pages_at(const char *at, uint64_t start)
{
	uint64_t count = 0;

	for (uint64_t i = 0; i < PAGES; i++)
		count += physical(at + i * PAGE) == start + i * PAGE;
	return count;
}

static void fill(uint64_t *at, uint64_t seed)
{
	for (uint64_t i = 0; i < LEN / 8; i++)
		at[i] = seed + i * 0x9e3779b97f4a7c15ull;
}

static bool holds(const uint64_t *at, uint64_t seed)
{
	for (uint64_t i = 0; i < LEN / 8; i++)
		if (at[i] != seed + i * 0x9e3779b97f4a7c15ull)
			return false;
	return true;
}

static int sized(uint64_t size, unsigned int flags)
{
	int fd = memfd_create("memo", MFD_CLOEXEC | flags);

	return ftruncate(fd, size) ? -1 : fd;
}

static void refusals(uint32_t id, uint64_t at)
{
	int fd = sized(LEN, 0), other = sized(LEN, 0), pipes[2], view;
	char *map = map_file(fd, MAP_SHARED);
	uint64_t low = 0x8000;

	is("MEM_FILE: no descriptor", file_it(-1, at, LEN, 0), EINVAL);
	is("MEM_FILE: a pipe", pipe(pipes) ?: file_it(pipes[0], at, LEN, 0), EINVAL);
	is("MEM_FILE: the device itself", file_it(device, at, LEN, 0), EINVAL);
	is("MEM_FILE: no such flag", file_it(fd, at, LEN, 2), EINVAL);
	is("MEM_FILE: outside every object", file_it(fd, at + 2 * MIB, LEN, 0), ENOENT);
	is("MEM_FILE: not a page", file_it(fd, at, LEN - 1, 0), EINVAL);
	is("MEM_FILE: longer than the file", file_it(fd, at, LEN + PAGE, 0), ERANGE);
	is("MEM_FILE: behind its end", file_at(fd, at, PAGE, LEN, 0), ERANGE);
	is("MEM_FILE: past its end", file_at(fd, at, 2 * PAGE, LEN - PAGE, 0), ERANGE);
	is("MEM_FILE: an offset that wraps", file_at(fd, at, LEN, -PAGE, 0), ERANGE);
	is("MEM_FILE: an offset that is not a page's", file_at(fd, at, PAGE, 8, 0), EINVAL);
	is("TAKE BORROW", take(id, BATON_MEM_BORROW, low, PAGE), 0);
	is("MEM_FILE: memory without pages of its own", file_it(fd, low, PAGE, 0), EINVAL);
	is("GIVE_BACK", give_back(id, low, PAGE), 0);
	close(pipes[0]);
	close(pipes[1]);

	/* The refusals above have left it what it was: it can be mapped by page, and then it is in use. */
	view = mem_fd(at, LEN, BATON_FD_PAGES);
	is("MEM_FILE: a file of the memory is open", view < 0 ? view : file_it(fd, at, LEN, 0), EBUSY);
	close(view);
	is("MEM_FILE", file_it(fd, at, LEN, 0), 0);
	is("MEM_FD: PAGES of what was filed", mem_fd(at, LEN, BATON_FD_PAGES), EINVAL);
	is("MEM_FILE: pages that another memfd has", file_it(other, at, LEN, 0), EBUSY);
	is("GIVE_BACK: a memfd has pages", give_back(id, at, 2 * MIB), EBUSY);
	is("DESTROY: a memfd has pages", destroy(id), EBUSY);
	munmap(map, LEN);
	close(fd);
	is("MEM_FILE: the other, when the first is gone", file_it(other, at, LEN, 0), 0);
	close(other);
	is("DESTROY", destroy(id), 0);
}

static void content(uint32_t id, uint64_t at)
{
	int fd = sized(LEN - 100, 0), status, child;
	uint64_t *map = map_file(fd, MAP_SHARED), *private = map_file(fd, MAP_PRIVATE), word = 0;

	fill(map, 1);
	truth("before: its own pages", !pages_at((char *)map, at) && private[1] == map[1]);
	private[8] = 4711;	/* a copy of its first page */
	mlock(map, LEN / 2);
	is("MEM_FILE: while mapped, its second half", file_at(fd, at + LEN / 2, LEN / 2, LEN / 2, 0), 0);
	truth("half of it lies in the object", holds(map, 1) && pages_at((char *)map, at) == PAGES / 2);
	is("MEM_FILE: all of it", file_it(fd, at, LEN, 0), 0);
	truth("the mapping shows the same", holds(map, 1));
	truth("and all of it lies in the object", pages_at((char *)map, at) == PAGES);
	truth("a private copy stays one", private[8] == 4711 && private[PAGE] == map[PAGE]);
	map[9] = 0xabcdef;
	truth("write by mapping, read by file", pread(fd, &word, 8, 72) == 8 && word == 0xabcdef);
	word = 0x1234;
	truth("write by file, read by mapping", pwrite(fd, &word, 8, 80) == 8 && map[10] == 0x1234);
	fill(map, 2);
	is("MEM_FILE: again", file_it(fd, at, LEN, 0), 0);
	truth("nothing has changed", holds(map, 2) && pages_at((char *)map, at) == PAGES);
	madvise(map, LEN, MADV_PAGEOUT);
	madvise(map, LEN, MADV_COLD);
	truth("MADV_PAGEOUT does not move it", holds(map, 2) && pages_at((char *)map, at) == PAGES);
	truth("nor do drop_caches and compaction", !system("echo 3 > /proc/sys/vm/drop_caches; "
							     "echo 1 > /proc/sys/vm/compact_memory") &&
	      holds(map, 2) && pages_at((char *)map, at) == PAGES);

	/* Pages that leave the file, and the ones that come in their place. */
	is("punch a hole", fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 3 * PAGE, 2 * PAGE), 0);
	truth("zero, and not in the object", !map[3 * PAGE / 8] && pages_at((char *)map, at) == PAGES - 2);
	is("MEM_FILE: after a hole", file_it(fd, at, LEN, 0), 0);
	truth("zero, and in the object", !map[3 * PAGE / 8] && pages_at((char *)map, at) == PAGES);
	is("cut", ftruncate(fd, PAGE) ?: ftruncate(fd, LEN), 0);
	map[5 * PAGE / 8] = 55;
	is("MEM_FILE: after a cut", file_it(fd, at, LEN, 0), 0);
	truth("what came after", map[5 * PAGE / 8] == 55 && !map[6 * PAGE / 8] && pages_at((char *)map, at) == PAGES);

	fill(map, 3);
	fflush(stdout);
	child = fork();
	if (!child) {
		bool good = holds(map, 3);

		map[0] = 77;
		_exit(good ? 0 : 1);
	}
	waitpid(child, &status, 0);
	truth("a child sees it and writes to it", !status && map[0] == 77);
	fflush(stdout);
	child = fork();
	if (!child)
		pause();
	munmap(map, LEN);
	munmap(private, LEN);
	close(fd);
	is("GIVE_BACK: a child has it", give_back(id, at, 2 * MIB), EBUSY);
	kill(child, SIGKILL);
	waitpid(child, &status, 0);
	free_kib(id);	/* mlock() leaves references in lists of each CPU, which this empties */
	is("GIVE_BACK: nobody has it", give_back(id, at, 2 * MIB), 0);
}

/* What a successor does: the pages have content, the file is new and gets its seals first. */
static void kept(uint32_t id, uint64_t at)
{
	const unsigned int seals = F_SEAL_WRITE | F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL;
	int fd = sized(LEN, MFD_ALLOW_SEALING), again = sized(LEN, MFD_ALLOW_SEALING);
	uint64_t *map = map_file(fd, MAP_SHARED), word = 0;

	fill(map, 4);
	is("MEM_FILE", file_it(fd, at, LEN, 0), 0);
	is("a seal that counts references is refused later", munmap(map, LEN) ?: fcntl(fd, F_ADD_SEALS, F_SEAL_WRITE), EBUSY);
	close(fd);
	is("seals first", fcntl(again, F_ADD_SEALS, seals), 0);
	is("MEM_FILE: KEEP", file_it(again, at, LEN, BATON_FILE_KEEP), 0);
	map = mmap(NULL, LEN, PROT_READ, MAP_PRIVATE, again, 0);
	truth("the file shows what the pages held", holds(map, 4));
	truth("and lies there", pages_at((char *)map, at) == PAGES);
	truth("its seals hold", pwrite(again, &word, 8, 0) < 0 && errno == EPERM && ftruncate(again, 0) && errno == EPERM);
	munmap(map, LEN);
	close(again);
	is("GIVE_BACK", give_back(id, at, 2 * MIB), 0);
}

void test_memfds(void)
{
	long before, total = meminfo("MemTotal"), shmem = meminfo("Shmem"), lost;
	uint64_t at;
	uint32_t id;

	create("filed", &id);
	before = free_kib(id);
	at = alloc_anywhere(id, 2 * MIB);
	refusals(id, at);
	create("content", &id);
	is("TAKE ALLOC", take(id, BATON_MEM_ALLOC, at, 2 * MIB), 0);
	content(id, at);
	is("TAKE ALLOC", take(id, BATON_MEM_ALLOC, at, 2 * MIB), 0);
	kept(id, at);
	for (int i = 0; i < 20; i++) {
		int fd = sized(2 * MIB, 0);

		if (take(id, BATON_MEM_ALLOC, at, 2 * MIB) || file_it(fd, at, 2 * MIB, 0) || close(fd) ||
		    give_back(id, at, 2 * MIB))
			truth("20 times filed and given back", false);
	}
	lost = before - free_kib(id);
	printf("# MemFree is %ld KiB lower in the end, Shmem %ld KiB higher\n", lost, meminfo("Shmem") - shmem);
	truth("nothing is lost", lost < 1024 && meminfo("MemTotal") == total && labs(meminfo("Shmem") - shmem) < 512);
	is("DESTROY", destroy(id), 0);
}
