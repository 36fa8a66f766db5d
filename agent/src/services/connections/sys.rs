//! The door to the socket calls that no crate wraps: TCP_REPAIR and what goes with it, as plain numbers and bytes.
#![expect(unsafe_code, reason = "nix and socket2 know no option of TCP_REPAIR")]
#![expect(clippy::host_endian_bytes, reason = "the kernel's socket options are words of the machine's own order")]

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::sys::socket::{MsgFlags, Shutdown, SockaddrStorage, getpeername, getsockname};

/// `SOL_SOCKET`, `IPPROTO_TCP` and so on.
pub type Level = i32;
/// The level of TCP's own options.
pub const TCP: Level = libc::IPPROTO_TCP;
/// The level of every socket's options.
pub const SOCKET: Level = libc::SOL_SOCKET;

/// Which queue of a socket under repair is meant (`include/uapi/linux/tcp.h`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(i32)]
pub enum Queue {
    /// None.
    None = 0,
    /// What was received and not read.
    Receive = 1,
    /// What was written and not acknowledged.
    Send = 2,
}

/// Into repair, or out of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(i32)]
pub enum Repair {
    /// Out of it, and nothing is sent to the peer (`TCP_REPAIR_OFF_NO_WP`).
    Off = -1,
    /// Into it: from here on nothing that is done to the socket is told to the peer.
    On = 1,
}

/// Fills `into` with an option's value; says how long the value is.
pub fn get(socket: BorrowedFd<'_>, level: Level, option: i32, into: &mut [u8]) -> io::Result<usize> {
    let mut len = into.len() as libc::socklen_t;
    // SAFETY: 1. `into` is valid for writes of `len` bytes, of which the kernel writes no more. 2. `len` lives across the call. 3. The kernel
    // keeps neither pointer.
    let result = unsafe { libc::getsockopt(socket.as_raw_fd(), level, option, into.as_mut_ptr().cast(), &raw mut len) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(len as usize) }
}

/// Sets an option to these bytes.
pub fn set(socket: BorrowedFd<'_>, level: Level, option: i32, value: &[u8]) -> io::Result<()> {
    // SAFETY: 1. `value` is valid for reads of its length. 2. The kernel copies it and keeps no pointer. (An option whose value holds pointers
    // has a function of its own below.)
    let result = unsafe {
        libc::setsockopt(socket.as_raw_fd(), level, option, value.as_ptr().cast(), value.len() as libc::socklen_t)
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// An option that is one number.
pub fn get_number(socket: BorrowedFd<'_>, level: Level, option: i32) -> io::Result<i32> {
    let mut value = [0; 4];
    // Some of IPv4's answer with a single byte where that is enough.
    get(socket, level, option, &mut value)?;
    Ok(i32::from_ne_bytes(value))
}

/// Sets an option that is one number.
pub fn set_number(socket: BorrowedFd<'_>, level: Level, option: i32, value: i32) -> io::Result<()> {
    set(socket, level, option, &value.to_ne_bytes())
}

/// Into repair, or out of it.
pub fn repair(socket: BorrowedFd<'_>, repair: Repair) -> io::Result<()> {
    set_number(socket, TCP, libc::TCP_REPAIR, repair as i32)
}

/// The queue that the next calls are about.
pub fn choose(socket: BorrowedFd<'_>, queue: Queue) -> io::Result<()> {
    set_number(socket, TCP, libc::TCP_REPAIR_QUEUE, queue as i32)
}

/// The next number of the chosen queue.
pub fn sequence(socket: BorrowedFd<'_>) -> io::Result<u32> {
    get_number(socket, TCP, libc::TCP_QUEUE_SEQ).map(i32::cast_unsigned)
}

/// Sets it, on a socket that is not connected yet.
pub fn set_sequence(socket: BorrowedFd<'_>, next: u32) -> io::Result<()> {
    set_number(socket, TCP, libc::TCP_QUEUE_SEQ, next.cast_signed())
}

/// What lies in the chosen queue; at most `most` bytes.
pub fn peek(socket: BorrowedFd<'_>, most: usize) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; most];
    let mut have = 0;
    let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
    match nix::sys::socket::recv(socket.as_raw_fd(), &mut bytes, flags) {
        Ok(len) => have = len,
        // There is nothing.
        Err(nix::errno::Errno::EAGAIN) => {}
        Err(errno) => return Err(errno.into()),
    }
    bytes.truncate(have);
    Ok(bytes)
}

/// Puts bytes into the chosen queue, or sends them where none is chosen; says how many.
pub fn fill(socket: BorrowedFd<'_>, bytes: &[u8]) -> io::Result<usize> {
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
    Ok(nix::sys::socket::send(socket.as_raw_fd(), bytes, flags)?)
}

/// Bytes that one of `SIOCINQ`, `SIOCOUTQ` and [`SIOCOUTQNSD`] tells.
pub fn count(socket: BorrowedFd<'_>, request: libc::c_ulong) -> io::Result<u32> {
    let mut count: libc::c_int = 0;
    // SAFETY: 1. All three requests write one int (net/ipv4/tcp.c, tcp_ioctl()). 2. It lives across the call; the kernel keeps no pointer.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), request as _, &raw mut count) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    u32::try_from(count).map_err(|_| io::Error::new(io::ErrorKind::InvalidData, format!("a count of {count} bytes")))
}

/// Bytes that are not read.
pub const SIOCINQ: libc::c_ulong = 0x541b;
/// Bytes that are not acknowledged.
pub const SIOCOUTQ: libc::c_ulong = 0x5411;
/// Bytes that are not sent.
pub const SIOCOUTQNSD: libc::c_ulong = 0x894b;

/// From now on every segment that comes for this socket is lost before TCP sees it: none is acknowledged, none is refused. It is the
/// socket's own filter, so that it needs neither a ruleset nor a module. (It is dropped in tcp_v4_rcv(), tcp_filter().)
pub fn hold(socket: BorrowedFd<'_>) -> io::Result<()> {
    // BPF_RET | BPF_K: 0 bytes of it are let through.
    let mut program = [libc::sock_filter { code: 0x06, jt: 0, jf: 0, k: 0 }];
    let program = libc::sock_fprog { len: program.len() as u16, filter: program.as_mut_ptr() };
    // SAFETY: 1. `program` is a sock_fprog, and its pointer and length are those of an array that lives across the call. 2. The kernel copies
    // both and keeps neither.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            SOCKET,
            libc::SO_ATTACH_FILTER,
            (&raw const program).cast(),
            size_of_val(&program) as libc::socklen_t,
        )
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// The undo of [`hold`].
pub fn release(socket: BorrowedFd<'_>) -> io::Result<()> {
    set_number(socket, SOCKET, libc::SO_DETACH_FILTER, 0)
}

/// Whether somebody has given the socket a filter.
pub fn has_filter(socket: BorrowedFd<'_>) -> io::Result<bool> {
    match get(socket, SOCKET, libc::SO_ATTACH_FILTER, &mut []) {
        Ok(instructions) => Ok(instructions > 0),
        // One of eBPF, which has no classic form that could be told.
        Err(error) if error.raw_os_error() == Some(libc::EACCES) => Ok(true),
        Err(error) => Err(error),
    }
}

/// Whether an urgent byte waits, or was announced.
pub fn has_urgent(socket: BorrowedFd<'_>) -> io::Result<bool> {
    let flags = MsgFlags::MSG_OOB | MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
    match nix::sys::socket::recv(socket.as_raw_fd(), &mut [0], flags) {
        // It was never there, or was read (net/ipv4/tcp.c, tcp_recv_urg()).
        Err(nix::errno::Errno::EINVAL) => Ok(false),
        Ok(0) => Ok(false),
        Ok(_) | Err(nix::errno::Errno::EAGAIN) => Ok(true),
        Err(errno) => Err(errno.into()),
    }
}

/// Our end's address and the peer's; nothing where the socket is not connected, or not of IP.
pub fn ends(socket: BorrowedFd<'_>) -> io::Result<Option<(SocketAddr, SocketAddr)>> {
    let local = getsockname::<SockaddrStorage>(socket.as_raw_fd())?;
    let peer = match getpeername::<SockaddrStorage>(socket.as_raw_fd()) {
        Err(nix::errno::Errno::ENOTCONN) => return Ok(None),
        other => other?,
    };
    let ip = |address: &SockaddrStorage| match (address.as_sockaddr_in(), address.as_sockaddr_in6()) {
        (Some(v4), _) => Some(SocketAddr::V4((*v4).into())),
        (_, Some(v6)) => Some(SocketAddr::V6((*v6).into())),
        _ => None,
    };
    Ok(ip(&local).zip(ip(&peer)))
}

/// Says that we end, on the socket's own behalf.
pub fn finish(socket: BorrowedFd<'_>) -> io::Result<()> {
    Ok(nix::sys::socket::shutdown(socket.as_raw_fd(), Shutdown::Write)?)
}

/// Forgets the connection. Under repair, nobody is told.
pub fn forget(socket: BorrowedFd<'_>) -> io::Result<()> {
    let nowhere = libc::sockaddr { sa_family: libc::AF_UNSPEC as u16, sa_data: [0; 14] };
    // SAFETY: 1. `nowhere` is a sockaddr of the size given, and lives across the call. 2. The kernel keeps no pointer.
    let result =
        unsafe { libc::connect(socket.as_raw_fd(), &raw const nowhere, size_of_val(&nowhere) as libc::socklen_t) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// A way to give this kernel's own sockets a segment as if it had come from outside: a raw socket, whose packets to an address of this
/// kernel go round over `lo` and never leave it.
pub fn injector(v6: bool) -> io::Result<OwnedFd> {
    use nix::sys::socket::{AddressFamily, SockFlag, SockProtocol, SockType, socket};
    let family = if v6 { AddressFamily::Inet6 } else { AddressFamily::Inet };
    // With IPPROTO_RAW whoever sends writes the IP header, too (raw(7)).
    let fd = socket(family, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::Raw)?;
    if v6 {
        set_number(fd.as_fd(), libc::IPPROTO_IPV6, libc::IPV6_HDRINCL, 1)?;
    }
    Ok(fd)
}

/// Sends a whole IP packet to an address.
pub fn inject(injector: BorrowedFd<'_>, packet: &[u8], to: IpAddr) -> io::Result<()> {
    let to = SockaddrStorage::from(SocketAddr::new(to, 0));
    nix::sys::socket::sendto(injector.as_raw_fd(), packet, &to, MsgFlags::empty())?;
    Ok(())
}

/// Raises this process's limit of descriptors as far as it may: every connection that crosses is one for a moment, and a system's usual limit
/// of 1024 is meant for programs that use select(2).
pub fn raise_descriptor_limit() -> io::Result<()> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: both calls read or write one rlimit, which lives across them; the kernel keeps no pointer.
    unsafe {
        if libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) < 0 {
            return Err(io::Error::last_os_error());
        }
        limit.rlim_cur = limit.rlim_max;
        if libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}
