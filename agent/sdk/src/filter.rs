//! A listener that lets nobody new in: its own filter loses the first segment of every connection, which whoever sent it sends again
//! after a second, to the kernel that listens then. Refusing it would be heard.
#![expect(unsafe_code, reason = "nix and socket2 attach no classic filter")]

use std::io;
use std::os::fd::{AsFd, AsRawFd};

/// Loses what begins a connection from now on. What is under way still gets into the accept queue: accept after this until nobody waits.
/// Needs no privilege.
///
/// # Errors
/// As setsockopt(2): a socket whose filter is locked.
pub fn hold(listener: impl AsFd) -> io::Result<()> {
    // A TCP socket's filter sees the TCP header first (net/ipv4/tcp_ipv4.c, tcp_filter()); its flags are byte 13.
    let mut program = [
        libc_filter(0x30, 0, 0, 13),       // BPF_LD | BPF_B | BPF_ABS
        libc_filter(0x54, 0, 0, 0x12),     // BPF_ALU | BPF_AND | BPF_K: SYN and ACK
        libc_filter(0x15, 0, 1, 0x02),     // BPF_JMP | BPF_JEQ | BPF_K: SYN alone
        libc_filter(0x06, 0, 0, 0),        // BPF_RET | BPF_K: nothing of it
        libc_filter(0x06, 0, 0, u32::MAX), // all of it
    ];
    let program = nix::libc::sock_fprog { len: program.len() as u16, filter: program.as_mut_ptr() };
    // SAFETY: 1. `program` is a sock_fprog, and its pointer and length are those of an array that lives across the call. 2. The kernel copies
    // both and keeps neither.
    let result = unsafe {
        nix::libc::setsockopt(
            listener.as_fd().as_raw_fd(),
            nix::libc::SOL_SOCKET,
            nix::libc::SO_ATTACH_FILTER,
            (&raw const program).cast(),
            size_of_val(&program) as nix::libc::socklen_t,
        )
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// The undo of [`hold`].
///
/// # Errors
/// As setsockopt(2): it was not held.
pub fn release(listener: impl AsFd) -> io::Result<()> {
    let nothing: i32 = 0;
    // SAFETY: 1. The option's value is not looked at; `nothing` is an int that lives across the call. 2. The kernel keeps no pointer.
    let result = unsafe {
        nix::libc::setsockopt(
            listener.as_fd().as_raw_fd(),
            nix::libc::SOL_SOCKET,
            nix::libc::SO_DETACH_FILTER,
            (&raw const nothing).cast(),
            size_of_val(&nothing) as nix::libc::socklen_t,
        )
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

const fn libc_filter(code: u16, jt: u8, jf: u8, k: u32) -> nix::libc::sock_filter {
    nix::libc::sock_filter { code, jt, jf, k }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{TcpListener, TcpStream};
    use std::time::Duration;

    #[test]
    fn a_held_listener_refuses_nobody_and_lets_nobody_in() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let waiting = TcpStream::connect(address).unwrap();
        hold(&listener).unwrap();
        listener.set_nonblocking(true).unwrap();
        // Who was there before comes in; who comes now hears nothing.
        assert_eq!(listener.accept().unwrap().1, waiting.local_addr().unwrap());
        let refused = TcpStream::connect_timeout(&address, Duration::from_millis(200)).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::TimedOut);
        assert!(listener.accept().is_err());
        // One that insists is let in as soon as that is possible.
        let insists = std::thread::spawn(move || TcpStream::connect_timeout(&address, Duration::from_secs(20)));
        while !insists.is_finished() && listener.accept().is_err() {
            release(&listener).ok();
            std::thread::sleep(Duration::from_millis(5));
        }
        assert!(insists.join().unwrap().is_ok());
    }
}
