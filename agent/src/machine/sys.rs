//! The agent's door to the system calls that no crate wraps safely.
#![expect(
    unsafe_code,
    reason = "packet sockets take a sockaddr_ll, which nix does not build; it has neither LUO nor seccomp"
)]

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// The time stamp counter now. It is the same on all CPUs of a machine that Baton runs on, and no kernel sets it back.
pub fn tsc() -> u64 {
    // SAFETY: RDTSC exists on every x86-64 CPU; Linux forbids it to user space only for those who ask (prctl).
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// Has the allocator give every buffer of a mebibyte or more back as soon as it is free. Left to itself it raises that limit with
/// each large buffer, and keeps up to 64 MiB for each thread that ever held an initrd.
pub fn keep_no_large_buffers() {
    // SAFETY: mallopt(3) takes two numbers and locks what it changes.
    let set = unsafe { libc::mallopt(libc::M_MMAP_THRESHOLD, 1 << 20) };
    debug_assert_eq!(set, 1, "a number below HEAP_MAX_SIZE / 2 is taken");
}

/// A raw socket that sends whole Ethernet frames on one interface and receives nothing.
pub struct PacketSocket {
    fd: OwnedFd,
    index: u32,
}

impl PacketSocket {
    /// Opens it on interface `index`. Needs CAP_NET_RAW.
    pub fn open(index: u32) -> io::Result<PacketSocket> {
        // SAFETY: 1. socket(2) takes no pointers. 2. A non-negative result is a new descriptor that nobody else owns.
        // Protocol 0: nothing is ever received on it.
        let fd = unsafe {
            let raw = libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0);
            if raw < 0 {
                return Err(io::Error::last_os_error());
            }
            OwnedFd::from_raw_fd(raw)
        };
        Ok(PacketSocket { fd, index })
    }

    /// Sends one frame.
    pub fn send(&self, frame: &[u8]) -> io::Result<()> {
        let to = libc::sockaddr_ll {
            sll_family: libc::AF_PACKET as u16,
            sll_protocol: 0,
            sll_ifindex: self.index.cast_signed(),
            sll_hatype: 0,
            sll_pkttype: 0,
            sll_halen: 6,
            sll_addr: [0xff; 8],
        };
        // SAFETY: 1. `frame` is valid for reads of its length. 2. `to` is a sockaddr_ll and lives across the call; its
        // size is the one given. 3. The kernel keeps neither pointer.
        let sent = unsafe {
            libc::sendto(
                self.fd.as_raw_fd(),
                frame.as_ptr().cast(),
                frame.len(),
                0,
                (&raw const to).cast(),
                size_of_val(&to) as libc::socklen_t,
            )
        };
        if sent < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }
}

/// Calls of the Live Update Orchestrator: `include/uapi/linux/liveupdate.h` of Linux 7.0 and newer. Each takes a structure whose first word is
/// its size.
pub mod liveupdate {
    use super::{AsRawFd, FromRawFd, OwnedFd, io};
    use std::os::fd::{AsFd, BorrowedFd};

    const fn io(number: u64) -> u64 {
        // _IO(LIVEUPDATE_IOCTL_TYPE, number)
        0xba << 8 | number
    }

    #[repr(C)]
    struct Session {
        size: u32,
        fd: i32,
        name: [u8; 64],
    }

    #[repr(C)]
    struct File {
        size: u32,
        fd: i32,
        token: u64,
    }

    #[repr(C)]
    struct Finish {
        size: u32,
        reserved: u32,
    }

    const _: () = assert!(size_of::<Session>() == 72 && size_of::<File>() == 16 && size_of::<Finish>() == 8);

    fn call<T>(fd: BorrowedFd<'_>, number: u64, argument: &mut T) -> io::Result<()> {
        // SAFETY: 1. Every T of this module is plain numbers in the kernel's layout, and its first word is its size, which the kernel
        // neither reads nor writes beyond. 2. The reference is exclusive and lives across the call; the kernel keeps no pointer.
        let result = unsafe { libc::ioctl(fd.as_raw_fd(), io(number) as _, std::ptr::from_mut(argument)) };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    fn descriptor(raw: i32) -> io::Result<OwnedFd> {
        if raw < 0 {
            return Err(io::Error::new(io::ErrorKind::InvalidData, format!("the kernel gave descriptor {raw}")));
        }
        // SAFETY: the kernel has just made this descriptor for us, and nobody else knows it.
        Ok(unsafe { OwnedFd::from_raw_fd(raw) })
    }

    /// `LIVEUPDATE_IOCTL_RETRIEVE_SESSION`
    pub fn retrieve_session(device: impl AsFd, name: &str) -> io::Result<OwnedFd> {
        let mut argument = Session { size: size_of::<Session>() as u32, fd: -1, name: [0; 64] };
        let place = argument.name.get_mut(..name.len()).filter(|place| place.len() < 64);
        place.ok_or(io::ErrorKind::InvalidInput)?.copy_from_slice(name.as_bytes());
        call(device.as_fd(), 0x01, &mut argument)?;
        descriptor(argument.fd)
    }

    /// `LIVEUPDATE_SESSION_RETRIEVE_FD`
    pub fn retrieve_file(session: impl AsFd, token: u64) -> io::Result<OwnedFd> {
        let mut argument = File { size: size_of::<File>() as u32, fd: -1, token };
        call(session.as_fd(), 0x41, &mut argument)?;
        descriptor(argument.fd)
    }

    /// `LIVEUPDATE_SESSION_FINISH`
    pub fn finish(session: impl AsFd) -> io::Result<()> {
        call(session.as_fd(), 0x42, &mut Finish { size: size_of::<Finish>() as u32, reserved: 0 })
    }
}

/// Calls of other programs that this one answers: seccomp's user notification (Documentation/userspace-api/seccomp_filter.rst).
pub mod seccomp {
    use super::{AsRawFd, FromRawFd, OwnedFd, io};
    use std::os::fd::BorrowedFd;

    /// `AUDIT_ARCH_X86_64` (include/uapi/linux/audit.h)
    const X86_64: u32 = 0xc000_003e;
    /// Where `struct seccomp_data` has the call's number, the architecture, and the low half of the second argument.
    const NUMBER_AT: u32 = std::mem::offset_of!(libc::seccomp_data, nr) as u32;
    const ARCH_AT: u32 = std::mem::offset_of!(libc::seccomp_data, arch) as u32;
    const SECOND_AT: u32 = std::mem::offset_of!(libc::seccomp_data, args) as u32 + 8;

    const fn request(direction: u64, number: u64, size: usize) -> u64 {
        // _IOC(direction, '!', number, size)
        direction << 30 | (size as u64) << 16 | 0x21 << 8 | number
    }
    const RECEIVE: u64 = request(3, 0, size_of::<libc::seccomp_notif>());
    const SEND: u64 = request(3, 1, size_of::<libc::seccomp_notif_resp>());
    const IS_VALID: u64 = request(1, 2, size_of::<u64>());
    const ADD: u64 = request(1, 3, size_of::<libc::seccomp_notif_addfd>());

    // The sizes are part of the numbers: these are the ones of Linux 5.9 and newer.
    const _: () =
        assert!(RECEIVE == 0xc050_2100 && SEND == 0xc018_2101 && IS_VALID == 0x4008_2102 && ADD == 0x4018_2103);

    /// A call that waits for an answer.
    #[derive(Debug, Clone, Copy)]
    pub struct Notice {
        /// Its number.
        pub id: u64,
        /// The thread that calls.
        pub thread: u32,
        /// The call's arguments.
        pub arguments: [u64; 6],
    }

    /// What is answered.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub enum Answer {
        /// The call returns 0.
        Done,
        /// It fails with this number.
        Failed(i32),
        /// The kernel carries it out, as if nobody had been asked.
        GoOn,
    }

    /// From now on each ioctl of this type, of this thread and of what it starts, waits for an answer of whoever has the descriptor.
    pub fn divert_ioctls(kind: u8) -> io::Result<OwnedFd> {
        let load = libc::BPF_LD | libc::BPF_W | libc::BPF_ABS;
        let equal = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
        let (and, end) = (libc::BPF_ALU | libc::BPF_AND | libc::BPF_K, libc::BPF_RET | libc::BPF_K);
        let step = |code: u32, k: u32, otherwise: u8| libc::sock_filter { code: code as u16, jt: 0, jf: otherwise, k };
        let mut filter = [
            step(load, ARCH_AT, 0),
            step(equal, X86_64, 6),
            step(load, NUMBER_AT, 0),
            step(equal, libc::SYS_ioctl as u32, 4),
            step(load, SECOND_AT, 0),
            step(and, 0xffff_ff00, 0),
            step(equal, u32::from(kind) << 8, 1),
            step(end, libc::SECCOMP_RET_USER_NOTIF, 0),
            step(end, libc::SECCOMP_RET_ALLOW, 0),
        ];
        let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_mut_ptr() };
        // SAFETY: 1. `program` names `filter` with its length, and both live across the call; the kernel copies the filter and keeps no
        // pointer. 2. A non-negative result is a new descriptor that nobody else owns.
        unsafe {
            let (mode, flags) = (libc::SECCOMP_SET_MODE_FILTER, libc::SECCOMP_FILTER_FLAG_NEW_LISTENER);
            let raw = libc::syscall(libc::SYS_seccomp, mode, flags, &raw const program);
            if raw < 0 {
                return Err(io::Error::last_os_error());
            }
            Ok(OwnedFd::from_raw_fd(raw as i32))
        }
    }

    fn call<T>(listener: BorrowedFd<'_>, number: u64, argument: &mut T) -> io::Result<i32> {
        // SAFETY: 1. Every T here is plain numbers in the kernel's layout, and its size is in `number`, so the kernel touches no byte beyond.
        // 2. The reference is exclusive and lives across the call; the kernel keeps no pointer.
        let result = unsafe { libc::ioctl(listener.as_raw_fd(), number as _, std::ptr::from_mut(argument)) };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
    }

    /// The next call; waits for it. ENOENT if the caller was interrupted meanwhile.
    pub fn receive(listener: BorrowedFd<'_>) -> io::Result<Notice> {
        let data = libc::seccomp_data { nr: 0, arch: 0, instruction_pointer: 0, args: [0; 6] };
        // The kernel wants zeros.
        let mut notice = libc::seccomp_notif { id: 0, pid: 0, flags: 0, data };
        call(listener, RECEIVE, &mut notice)?;
        Ok(Notice { id: notice.id, thread: notice.pid, arguments: notice.data.args })
    }

    /// Whether the caller still waits: what was read of it before is its, and not another thread's with its number.
    pub fn is_valid(listener: BorrowedFd<'_>, id: u64) -> bool {
        let mut id = id;
        call(listener, IS_VALID, &mut id).is_ok()
    }

    /// Gives the caller a descriptor, closed by exec; its number over there.
    pub fn give(listener: BorrowedFd<'_>, id: u64, file: BorrowedFd<'_>) -> io::Result<i32> {
        let srcfd = file.as_raw_fd().cast_unsigned();
        let newfd_flags = libc::O_CLOEXEC.cast_unsigned();
        call(listener, ADD, &mut libc::seccomp_notif_addfd { id, flags: 0, srcfd, newfd: 0, newfd_flags })
    }

    /// Lets the caller go on.
    pub fn answer(listener: BorrowedFd<'_>, id: u64, answer: Answer) -> io::Result<()> {
        let (error, flags) = match answer {
            Answer::Done => (0, 0),
            Answer::Failed(number) => (-number, 0),
            Answer::GoOn => (0, libc::SECCOMP_USER_NOTIF_FLAG_CONTINUE as u32),
        };
        call(listener, SEND, &mut libc::seccomp_notif_resp { id, val: 0, error, flags }).map(drop)
    }
}

/// A file in memory, mapped for reading.
pub struct Seen {
    start: std::ptr::NonNull<u8>,
    len: usize,
}

impl Seen {
    /// Maps all of it.
    pub fn map(file: &std::fs::File) -> io::Result<Seen> {
        let len = usize::try_from(file.metadata()?.len()).map_err(io::Error::other)?;
        // SAFETY: 1. No address is asked for, so no other mapping is replaced. 2. A read-only shared mapping of a file; its length is
        // not 0, or mmap(2) refuses.
        let at = unsafe {
            let (protection, flags) = (libc::PROT_READ, libc::MAP_SHARED | libc::MAP_POPULATE);
            libc::mmap(std::ptr::null_mut(), len, protection, flags, file.as_raw_fd(), 0)
        };
        if at == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let start = std::ptr::NonNull::new(at.cast()).ok_or(io::ErrorKind::AddrNotAvailable)?;
        Ok(Seen { start, len })
    }

    /// Where it is mapped.
    pub fn address(&self) -> usize {
        self.start.as_ptr().addr()
    }

    /// A copy of the content: others may write the file meanwhile, so no reference is given out.
    pub fn bytes(&self) -> Vec<u8> {
        // SAFETY: 1. `start` and every byte up to `len` are mapped as long as `self` is; u8 has no alignment. 2. Volatile reads, each of one
        // byte, say nothing about what another process does to the page.
        (0..self.len).map(|at| unsafe { self.start.as_ptr().add(at).read_volatile() }).collect()
    }
}

impl Drop for Seen {
    fn drop(&mut self) {
        // SAFETY: mapped by `map` with this length, and no reference into it was given out.
        let unmapped = unsafe { libc::munmap(self.start.as_ptr().cast(), self.len) };
        debug_assert_eq!(unmapped, 0, "it was mapped by us");
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::AsFd;
    use std::sync::mpsc::channel;

    use super::seccomp::{Answer, answer, divert_ioctls, give, is_valid, receive};
    use super::{io, liveupdate};

    /// What a call on /dev/null came to, which knows nothing of LUO.
    fn ask() -> io::Result<()> {
        liveupdate::retrieve_session(File::open("/dev/null")?, "state").map(drop)
    }

    #[test]
    fn calls_of_one_type_wait_for_an_answer_and_no_others() {
        let (send, sent) = channel();
        // A filter is its thread's, which ends with the test.
        let caller = std::thread::spawn(move || {
            match divert_ioctls(0xba) {
                Ok(listener) => send.send(listener).unwrap(),
                Err(error) if error.kind() == io::ErrorKind::PermissionDenied => return None,
                Err(error) => panic!("{error}"),
            }
            let terminal = io::IsTerminal::is_terminal(&File::open("/dev/null").unwrap());
            assert!(!terminal, "an ioctl of another type is the kernel's");
            Some([ask(), ask(), ask()].map(|result| result.map_err(|error| error.raw_os_error())))
        });
        let Ok(listener) = sent.recv() else {
            assert!(caller.join().unwrap().is_none());
            return println!("SKIPPED: a seccomp filter needs root");
        };
        for n in 0..3 {
            let notice = receive(listener.as_fd()).unwrap();
            assert_eq!(notice.arguments[1], 0xba01, "LIVEUPDATE_IOCTL_RETRIEVE_SESSION");
            assert!(is_valid(listener.as_fd(), notice.id) && !is_valid(listener.as_fd(), notice.id + 1));
            let given = give(listener.as_fd(), notice.id, File::open("/dev/zero").unwrap().as_fd()).unwrap();
            assert!(given > 2);
            let with = [Answer::Failed(libc::ENOENT), Answer::GoOn, Answer::Done][n];
            answer(listener.as_fd(), notice.id, with).unwrap();
        }
        let results = caller.join().unwrap().unwrap();
        // Done without a descriptor in the structure: it is not believed.
        assert_eq!(results, [Err(Some(libc::ENOENT)), Err(Some(libc::ENOTTY)), Err(None)]);
    }
}
