//! I/O ports, for the one register that nobody watches after an update: the power button's. (`/dev/port` is not in every kernel.)

#![expect(unsafe_code, reason = "the door: ioperm, and the two instructions")]

use std::marker::PhantomData;

use nix::errno::Errno;

/// A register of 16 bits, in two ports, which this thread may read and write as long as this lives. The kernel gives the right to
/// threads, so it cannot be sent to another one.
#[derive(Debug)]
pub struct Port {
    number: u16,
    stays_here: PhantomData<*const ()>,
}

impl Port {
    /// Asks the kernel for this port and the next: needs CAP_SYS_RAWIO, and a kernel that is not locked down.
    pub fn open(number: u16) -> Result<Port, Errno> {
        permit(number, true)?;
        Ok(Port { number, stays_here: PhantomData })
    }

    /// Reads the register.
    pub fn read(&self) -> u16 {
        let value: u16;
        // SAFETY: 1. the kernel has given this thread the right to both ports (`open`), which it keeps as long as `self` lives;
        // without it there would be a fault, which is a signal. 2. Reading a port changes no memory and no flag.
        unsafe {
            std::arch::asm!("in ax, dx", in("dx") self.number, out("ax") value, options(nomem, nostack, preserves_flags))
        };
        value
    }

    /// Writes it. What that does to the machine is the caller's business.
    pub fn write(&self, value: u16) {
        // SAFETY: as for `read`; registers behind I/O ports reach no memory of this process.
        unsafe {
            std::arch::asm!("out dx, ax", in("dx") self.number, in("ax") value, options(nomem, nostack, preserves_flags))
        };
    }
}

impl Drop for Port {
    fn drop(&mut self) {
        // Taking a right away from oneself is always allowed.
        let _ = permit(self.number, false);
    }
}

fn permit(number: u16, allowed: bool) -> Result<(), Errno> {
    let (from, count) = (libc::c_ulong::from(number), 2 as libc::c_ulong);
    // SAFETY: ioperm(2) takes three numbers; it changes which instructions of this thread fault, and no memory.
    let result = unsafe { libc::syscall(libc::SYS_ioperm, from, count, libc::c_int::from(allowed)) };
    Errno::result(result).map(drop)
}
