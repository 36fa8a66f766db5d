/* SPDX-License-Identifier: GPL-2.0 */
/* What the files of the self-test share; selftest.c has it all. */
#ifndef _BATON_SELFTEST_H
#define _BATON_SELFTEST_H

#include <stdbool.h>
#include <stdint.h>

#define MIB (1ull << 20)
#define PAGE 4096ull

extern int device;

bool is(const char *what, int ret, int want);
bool truth(const char *what, bool good);
int create(const char *name, uint32_t *id);
int destroy(uint32_t id);
int take(uint32_t instance, uint32_t how, uint64_t start, uint64_t len);
int give_back(uint32_t instance, uint64_t start, uint64_t len);
int mem_fd(uint64_t start, uint64_t len, uint32_t flags);
long meminfo(const char *key);
uint64_t alloc_anywhere(uint32_t instance, uint64_t len);
long free_kib(uint32_t instance);

int cpu(unsigned long cmd, uint32_t instance, uint32_t apic_id, uint32_t how, uint64_t start_pa);
uint32_t apic_id_of(uint32_t number, uint32_t *flags);
int set_online(uint32_t number, bool online);

void test_memfds(void);
void test_functions(void);
void hibernate(int count, char **arguments);

#endif
