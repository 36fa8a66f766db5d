/* SPDX-License-Identifier: GPL-2.0 WITH Linux-syscall-note OR MIT */
/*
 * The contract between baton.ko and user space: one device, /dev/baton (0600), sized ioctls.
 *
 * Every struct starts with `__u32 size`, set by the caller to sizeof(its struct) (LUO's style): the module accepts
 * a shorter one (missing fields read as 0) and a longer one whose surplus is all zero (else E2BIG). Fields named
 * `reserved` must be zero (EINVAL).
 *
 * What each errno means, whatever the call:
 *   ENOTTY      this module has no such call            E2BIG       the caller knows fields that this module does not
 *   EINVAL      the arguments contradict themselves     ENOENT      no such instance, or no memory object there
 *   EBUSY       something depends on it, or pages there cannot be moved now
 *   EEXIST      it overlaps what is there already       EPERM       kernel lockdown, or a capability is missing
 *   EOPNOTSUPP  this machine or kernel cannot           ERANGE      address outside what the call is for
 *   EFAULT      the caller's struct cannot be read, or not be written
 *   ENOMEM      no memory for the module's own records or mappings
 *   EINTR       the caller was killed while memory was taken; none of it was
 *   EIO         the interrupt controller was busy for 1 ms: nothing took the interrupt that was sent before
 *
 * Calls that change anything need CAP_SYS_ADMIN and CAP_SYS_BOOT. (kexec's sysctl kernel.kexec_load_disabled is not
 * exported to modules: user space looks at it.)
 *
 * The module knows memory objects, instances (a label with an id, to which CPUs and memory are accounted),
 * CPUs, doorbells and PCI functions. It knows nothing of updates, services or formats.
 */
#ifndef _UAPI_BATON_H
#define _UAPI_BATON_H

#include <linux/types.h>
#include <linux/ioctl.h>

#define BATON_ABI_VERSION	1
#define BATON_DEVICE		"/dev/baton"
#define BATON_NAME_LEN		32
#define BATON_IMAGE_LEN		64
#define BATON_PCI_MAX		32

/* The instance that stands for the kernel the module runs in. It is always there and is never destroyed. */
#define BATON_SELF		0

/* BATON_IOC_INFO: what this kernel is. */
#define BATON_INFO_X2APIC	(1u << 0)	/* ICR is written by MSR */
#define BATON_INFO_LA57		(1u << 1)	/* five-level page tables are in use */
#define BATON_INFO_LOCKDOWN	(1u << 2)	/* kexec is locked down: every call that changes anything gives EPERM */
struct baton_info {
	__u32 size;
	__u32 abi;			/* out: BATON_ABI_VERSION */
	__u32 flags;			/* out: BATON_INFO_* */
	__u32 tsc_khz;			/* out */
	__u64 memory_block_size;	/* out: grain of BATON_IOC_MEM_ADOPT, bytes */
	__u32 possible_cpus;		/* out: one more than the highest CPU number */
	__u32 instances;		/* out: how many, BATON_SELF not counted */
	__u64 rings;			/* out: that the doorbell of this open file has heard */
	__u64 muffled;			/* out: of these, too many at once: one signal came for all of them */
};

/* BATON_IOC_CPU_INFO: one logical CPU. ENOENT past the last possible one. */
#define BATON_CPU_PRESENT	(1u << 0)
#define BATON_CPU_ONLINE	(1u << 1)
struct baton_cpu_info {
	__u32 size;
	__u32 cpu;			/* in: Linux's number */
	__u32 apic_id;			/* out */
	__u32 flags;			/* out: BATON_CPU_* */
};

/*
 * BATON_IOC_INSTANCE_CREATE, _UPDATE, _DESTROY: rows of /proc/multikernel. The state is user space's word; the
 * module only shows it. DESTROY gives EBUSY while a CPU is recorded there or its memory is mapped; else it gives
 * back the memory it holds.
 */
struct baton_instance {
	__u32 size;
	__u32 id;			/* CREATE: out; else in */
	__u32 state;			/* enum baton_state */
	__u32 reserved;
	char name[BATON_NAME_LEN];	/* NUL-terminated, [A-Za-z0-9._+-]; UPDATE: ignored */
	char image[BATON_IMAGE_LEN];	/* NUL-terminated, printable; UPDATE: empty = leave */
};
enum baton_state {
	BATON_STATE_CREATED = 0,
	BATON_STATE_LOADED = 1,
	BATON_STATE_BOOTING = 2,
	BATON_STATE_RUNNING = 3,
	BATON_STATE_SERVING = 4,
	BATON_STATE_FAILED = 5,
	BATON_STATE_RETIRED = 6,
};

/*
 * BATON_IOC_MEM_TAKE: make [start, start + len) a memory object. Page-aligned. How it is got:
 *   ALLOC     out of this kernel's allocator, at exactly this place, moving what can be moved (EBUSY if not).
 *   OUTSIDE   memory that this kernel's map of boot calls reserved (a control block, memmap=N$S), in use by nobody; or
 *             that it says nothing of, below 0xa0000. ERANGE for the rest: device registers, ACPI's memory, persistent
 *             memory, what mem= hides. EEXIST for RAM of this kernel. Needs CAP_SYS_RAWIO.
 *   RESERVED  e820 RAM that was reserved at boot (struct pages exist, PageReserved), or that KHO preserved as exactly
 *             this range: it becomes ordinary allocated memory, counted in MemTotal. EINVAL if any page there is
 *             neither, has no struct page, or belongs to the kernel's image.
 *   BORROW    RAM below 1 MiB, which Linux reserves at boot and leaves alone (the SIPI page). It stays reserved.
 *             ERANGE above 1 MiB, EINVAL where a page is no RAM or not reserved.
 * BATON_IOC_MEM_GIVE_BACK: the same range, whole: to the allocator (ALLOC, RESERVED), or just forgotten
 * (OUTSIDE, BORROW).
 * EBUSY while mapped or while a file of it is open, and while a CPU is recorded for its instance.
 */
#define BATON_MEM_ALLOC		0
#define BATON_MEM_OUTSIDE	1
#define BATON_MEM_RESERVED	2
#define BATON_MEM_BORROW	3
struct baton_mem {
	__u32 size;
	__u32 instance;			/* TAKE: to whom it is accounted; GIVE_BACK: must match */
	__u32 how;			/* BATON_MEM_* (TAKE) */
	__u32 reserved;
	__u64 start;
	__u64 len;
};

/*
 * BATON_IOC_MEM_FD: a file for [start, start + len), which must lie within one memory object. The file can be
 * mmapped (MAP_SHARED, offset 0 = start) and nothing else; it may be passed to an unprivileged process.
 * PAGES maps by struct page, so that O_DIRECT, private futexes and ptrace work on it (ALLOC and RESERVED only; a
 * shared futex gets EFAULT); otherwise by frame number.
 */
#define BATON_FD_READONLY	(1u << 0)
#define BATON_FD_PAGES		(1u << 1)
struct baton_mem_fd {
	__u32 size;
	__u32 flags;			/* BATON_FD_* */
	__u64 start;
	__u64 len;
	__s32 fd;			/* out, close-on-exec */
	__u32 reserved;
};

/*
 * BATON_IOC_MEM_FILE: the pages of [start, start + len), which must lie within one memory object (ALLOC or RESERVED),
 * take the place of a memfd's own (of any file of shmem), page by page from its offset. What is mapped stays mapped:
 * it shows the new pages from its next access on. Without KEEP the file keeps its content, which is copied; with KEEP
 * the pages do, and the file shows it. Pages that are there already are left alone, so a call can be repeated: after an
 * error in the middle, or when the file's owner has punched or cut off pages and written new ones.
 * The object keeps its pages when the file is cut or gone, and GIVE_BACK gives EBUSY until it is. (Pages that were
 * mlocked may stay counted in lists of each CPU until something empties them, such as TAKE ALLOC of a page elsewhere.)
 *   EINVAL: no such file     ERANGE: it ends (at a page's end) before offset + len     EOPNOTSUPP: it has large folios
 *   EBUSY: a MEM_FD file of the object is open, a page is in another memfd, or one of the memfd's is pinned for DMA
 * PAGES of MEM_FD gives EINVAL on an object of which this was ever asked.
 */
#define BATON_FILE_KEEP		(1u << 0)
struct baton_mem_file {
	__u32 size;
	__u32 flags;			/* BATON_FILE_* */
	__s32 fd;			/* in */
	__u32 reserved;
	__u64 start;
	__u64 len;
	__u64 offset;			/* in the file, page-aligned */
};

/*
 * BATON_IOC_MEM_ADOPT: RAM becomes this kernel's own. There is no way back. Either RAM that it has not seen yet, in
 * whole memory blocks: hot-added, and onlined as /sys/devices/system/memory/auto_online_blocks says. Or pages that are
 * RESERVED as above: they go to the allocator. EINVAL: RAM that is neither, or no whole blocks; EEXIST: there is a memory
 * object; ERANGE: the map of boot says that it is something else.
 */
struct baton_adopt {
	__u32 size;
	__u32 reserved;
	__u64 start;
	__u64 len;
};

/*
 * BATON_IOC_CPU_GIVE: a CPU that is offline here goes to an instance; until it comes back, it is not present here.
 * START sends INIT, SIPI, SIPI to page `start_pa` (below 1 MiB); RECORD only accounts for it (user space wakes it
 * through a mailbox).
 * BATON_IOC_CPU_TAKE: the account ends. FENCE sends INIT first, so that whatever ran there stops; never use it on
 * the CPU that the firmware booted: it would reset the machine. RECORD sends nothing.
 * EBUSY: the APIC id is online here, or belongs to another instance.
 */
#define BATON_CPU_RECORD	0
#define BATON_CPU_START		1
#define BATON_CPU_FENCE		2
struct baton_cpu {
	__u32 size;
	__u32 instance;
	__u32 apic_id;
	__u32 how;			/* BATON_CPU_* */
	__u64 start_pa;			/* START only, else 0 */
};

/*
 * BATON_IOC_DOORBELL_OPEN: an interrupt vector on the CPU that Linux calls 0; an arrival signals the eventfd. Of more
 * than 32 in about 10 ms, the first 32 do; one signal at the end of that time stands for the others (baton_info: muffled).
 * One per open file of /dev/baton (EBUSY); it ends with the file.
 * BATON_IOC_DOORBELL_RING: send vector to an APIC id that is recorded for the instance. For BATON_SELF: to the bell that
 * CONNECT named, while no CPU of this kernel is there, or to the file's own. ENOENT: none of these.
 * BATON_IOC_DOORBELL_CONNECT: the bell of a kernel that is no instance here, the predecessor. Called again for the same
 * open file, it may change the vector, not the APIC id (EBUSY). EBUSY, too, when that is online here or an instance's.
 * Vectors below 32 and broadcast ids: EINVAL.
 */
struct baton_doorbell {
	__u32 size;
	__s32 eventfd;			/* OPEN: in */
	__u32 apic_id;			/* OPEN: out, else in */
	__u32 vector;			/* OPEN: out, else in */
	__u32 instance;			/* RING: in, else 0 */
};

/*
 * BATON_IOC_YIELD: this kernel's last online CPU (EBUSY when it is not the last) leaves the kernel: interrupts off,
 * table_pa (one page in a memory object of ours) becomes a top-level page table made of this kernel's upper half
 * and the lower half of ident_pa, and the CPU jumps to physical entry_pa with
 *   rsi = arg_pa, rdi = address to return to, CR4.PCIDE and CR4.PGE clear.
 * If it comes back to that address (any stack, same tables), the call returns with the time away; else never.
 */
struct baton_yield {
	__u32 size;
	__u32 reserved;
	__u64 entry_pa;
	__u64 arg_pa;
	__u64 table_pa;
	__u64 ident_pa;
	__u64 away_tsc;			/* out: TSC ticks between leaving and coming back */
};

/*
 * BATON_IOC_PCI_ADD: a domain of root buses that show only these functions, through ECAM: one for each bus that a
 * function is on, so that no bridge has to be granted (EINVAL: one is). EEXIST when the domain has a bus (in a
 * successor, to which neither PCI nor ACPI shows one, 0 has none). ENOENT: one of the functions is not there; none is
 * shown then.
 * BATON_IOC_PCI_REMOVE: takes the domain away with its devices (size and domain only).
 */
struct baton_pci {
	__u32 size;
	__u32 domain;
	__u64 ecam_pa;			/* of bus 0 */
	__u32 bus_end;			/* buses 0..=bus_end */
	__u32 functions;		/* how many of bdf[] count */
	__u16 bdf[BATON_PCI_MAX];	/* bus << 8 | device << 3 | function */
};

/*
 * BATON_IOC_PCI_FREEZE: one function, with every device below it, hibernates here, so that another kernel can have it.
 * What its drivers have made stays (disks, mounts, interfaces, addresses, connections); requests to it wait, interfaces
 * have no carrier, nothing here touches it, and it cannot be unbound, reset or removed. It is no bus master afterwards.
 * With LOOK nothing of that is done: it is only said what stands against it, as far as that is known beforehand.
 * BATON_IOC_PCI_RESTORE: it is this kernel's again, in whatever state the other one has left it; where FREEZE is still
 * under way, as soon as that has ended; again does no harm. The same happens when the file that froze it is closed, if no
 * CPU is recorded for the instance then (with one, the function may be in use there), and when this kernel ends and the
 * machine with it (END). Some drivers (NVMe) go on by themselves after RESTORE has returned; requests wait for that.
 *   EOPNOTSUPP: an obstacle; nothing was touched     EIO: a driver's callback failed, or it stays bus master; FREEZE has
 *   restored all that it had frozen     EBUSY: it is frozen, or about to be
 *   ENOENT: no such function or instance; RESTORE: it is not frozen     EINTR: the caller was killed; the work goes on
 * DESTROY of the instance gives EBUSY while a function is frozen for it.
 */
#define BATON_FREEZE_LOOK		(1u << 0)
#define BATON_OBSTACLE_NONE		0
#define BATON_OBSTACLE_BRIDGE		1	/* it is one */
#define BATON_OBSTACLE_NO_CALLBACKS	2	/* a driver cannot hibernate */
#define BATON_OBSTACLE_INTX		3	/* its driver uses neither MSI nor MSI-X, and another kernel has nothing else */
#define BATON_OBSTACLE_FAILED		4	/* a driver said `error` */
#define BATON_OBSTACLE_MASTER		5	/* it does not stop being a bus master */
struct baton_pci_function {
	__u32 size;
	__u32 instance;			/* FREEZE: for whom; LOOK and RESTORE: BATON_SELF */
	__u32 domain;
	__u32 bdf;			/* bus << 8 | device << 3 | function */
	__u32 how;			/* FREEZE: BATON_FREEZE_* */
	__u32 devices;			/* out: how many there are, the function itself included */
	__u32 obstacle;			/* out: BATON_OBSTACLE_*, also with EOPNOTSUPP and EIO */
	__u32 error;			/* out: an errno */
	char device[BATON_NAME_LEN];	/* out: the name of the device where the obstacle is */
};

/*
 * BATON_IOC_PANIC_NOTICE: when this kernel panics, write `value` to the 8-aligned word at pa (in a memory
 * object) and ring (apic_id, vector), unless vector is 0; a bell that CONNECT has named for this file (ENOENT).
 * Ends with the file. One per machine (EBUSY).
 */
struct baton_panic_notice {
	__u32 size;
	__u32 apic_id;
	__u32 vector;
	__u32 reserved;
	__u64 pa;
	__u64 value;
};

/*
 * BATON_IOC_END: whose the machine is, when this kernel restarts, powers off, halts, executes another one, or panics.
 *   MACHINE  this kernel's, as it is when the module is loaded. The CPUs that were given away get INIT first.
 *   ALONE    another kernel's: this one gives its panic notice, stops its own CPUs and nothing else. It does not reset
 *            after a panic, whatever kernel.panic says. The module cannot be unloaded.
 * It does not end with the file. System sleep gives EBUSY while it is ALONE, or while there is an instance.
 */
#define BATON_END_MACHINE	0
#define BATON_END_ALONE		1
struct baton_end {
	__u32 size;
	__u32 how;			/* BATON_END_* */
};

/*
 * BATON_IOC_SLEEP_TYPE: what ACPI's \_Sx says is written to the sleep type fields of PM1a_CNT and PM1b_CNT.
 * EOPNOTSUPP: this machine has no such state. (The registers are in the FADT, which user space can read.)
 */
struct baton_sleep_type {
	__u32 size;
	__u32 state;			/* 0 to 5 */
	__u32 type_a;			/* out: 0 to 7 */
	__u32 type_b;			/* out: 0 to 7 */
	__u32 reserved;
};

/*
 * BATON_IOC_IOAPIC_MASK: masks every pin of the I/O APIC whose registers are at pa (as the MADT says), but for SMIs.
 * There is no way back: for a kernel that leaves.
 * EBUSY: another CPU is online, which may use it. ENOENT: nothing answers there. ERANGE: there is RAM, or it is too high.
 */
struct baton_ioapic {
	__u32 size;
	__u32 reserved;
	__u64 pa;
};

/*
 * BATON_IOC_IOMMU_OFF: switches off the translation of DMA by every IOMMU that this kernel has set up, as kexec does:
 * what its tables say lies in memory that gets another owner. There is no way back: for a kernel that leaves, whose
 * own devices are stopped. (Remapped interrupts stay remapped.) Nothing happens where no IOMMU is in use.
 * EBUSY: another CPU is online, which may use a device.
 */
struct baton_iommu {
	__u32 size;
	__u32 reserved;
};

#define BATON_IOC(nr)			_IO(0xBA, nr)
#define BATON_IOC_INFO			BATON_IOC(0x00)
#define BATON_IOC_CPU_INFO		BATON_IOC(0x01)
#define BATON_IOC_INSTANCE_CREATE	BATON_IOC(0x10)
#define BATON_IOC_INSTANCE_UPDATE	BATON_IOC(0x11)
#define BATON_IOC_INSTANCE_DESTROY	BATON_IOC(0x12)
#define BATON_IOC_MEM_TAKE		BATON_IOC(0x20)
#define BATON_IOC_MEM_GIVE_BACK		BATON_IOC(0x21)
#define BATON_IOC_MEM_FD		BATON_IOC(0x22)
#define BATON_IOC_MEM_ADOPT		BATON_IOC(0x23)
#define BATON_IOC_MEM_FILE		BATON_IOC(0x24)
#define BATON_IOC_CPU_GIVE		BATON_IOC(0x30)
#define BATON_IOC_CPU_TAKE		BATON_IOC(0x31)
#define BATON_IOC_DOORBELL_OPEN		BATON_IOC(0x40)
#define BATON_IOC_DOORBELL_RING		BATON_IOC(0x41)
#define BATON_IOC_DOORBELL_CONNECT	BATON_IOC(0x42)
#define BATON_IOC_YIELD			BATON_IOC(0x50)
#define BATON_IOC_PCI_ADD		BATON_IOC(0x60)
#define BATON_IOC_PCI_REMOVE		BATON_IOC(0x61)
#define BATON_IOC_PCI_FREEZE		BATON_IOC(0x62)
#define BATON_IOC_PCI_RESTORE		BATON_IOC(0x63)
#define BATON_IOC_PANIC_NOTICE		BATON_IOC(0x70)
#define BATON_IOC_END			BATON_IOC(0x80)
#define BATON_IOC_SLEEP_TYPE		BATON_IOC(0x81)
#define BATON_IOC_IOAPIC_MASK		BATON_IOC(0x82)
#define BATON_IOC_IOMMU_OFF		BATON_IOC(0x83)

#endif
