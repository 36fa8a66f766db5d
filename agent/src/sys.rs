//! The agent's door to the system calls that no crate wraps safely.
#![expect(unsafe_code, reason = "packet sockets take a sockaddr_ll, which nix does not build")]

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
