//! The line between the two kernels as one end sees it: typed messages over the channel, the doorbell that announces
//! them, and the peer's panic word. Waiting is poll(2) on the doorbell's eventfd, so a message costs one interrupt.

use std::marker::PhantomData;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use handover::channel::{Channel, Side};
use kexec_core::device::{Bell, Device, DeviceError, Mapping, SELF};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use state_schemas::Payload;
use state_schemas::checked::Check;
use state_schemas::control_block::words;
use state_schemas::latest::message::MessageError;
use state_schemas::latest::message::{ToIncumbent, ToSuccessor};
use state_schemas::shared::SharedMemory;

use crate::machine::sys::tsc;

/// A bell is rung again after this long without an answer: an interrupt that comes while the other side takes its
/// vector over is lost, a message is not.
const RING_AGAIN: Duration = Duration::from_millis(if cfg!(test) { 1 } else { 250 }); // a played bell rings nobody

/// Who waits on whatever the operator says.
static NEVER: AtomicBool = AtomicBool::new(false);

/// What a panicking kernel writes; anything but zero.
const PANICKED: u64 = 1;

/// Why the other side gave no answer, or not the one that was wanted.
#[derive(Debug, thiserror::Error)]
pub enum Unanswered {
    /// It will never answer: its module said so at the end.
    #[error("the {0} panicked, or was restarted")]
    Panicked(&'static str),
    /// Nobody waits for it any more.
    #[error("the operator called the update off")]
    CalledOff,
    /// It has not answered in time.
    #[error("the {peer} was silent for {:.3} s", .patience.as_secs_f64())]
    Silent {
        /// Who.
        peer: &'static str,
        /// How long it was waited for.
        patience: Duration,
    },
    /// It answered that it cannot.
    #[error("the successor cannot {what}: {cause}")]
    Refused {
        /// What was asked.
        what: String,
        /// Why not.
        cause: String,
    },
}

/// A side of the line, and its words in the control block.
pub trait End {
    /// The other side.
    type Peer: End<Peer = Self>;
    /// What this side says.
    type Says;
    /// For the rings.
    const SIDE: Side;
    /// Where this side says where its bell is.
    const BELL_AT: u64;
    /// Where this side's module says that its kernel panicked.
    const PANIC_AT: u64;
    /// What this side is called.
    const NAME: &'static str;
}

/// What a side hears.
type Heard<E> = <<E as End>::Peer as End>::Says;

/// The incumbent's end.
pub struct Incumbent;
/// The successor's end.
pub struct Successor;

impl End for Incumbent {
    type Peer = Successor;
    type Says = ToSuccessor;
    const SIDE: Side = Side::Incumbent;
    const BELL_AT: u64 = words::INCUMBENT_BELL_AT;
    const PANIC_AT: u64 = words::INCUMBENT_PANIC_AT;
    const NAME: &'static str = "incumbent";
}

impl End for Successor {
    type Peer = Incumbent;
    type Says = ToIncumbent;
    const SIDE: Side = Side::Successor;
    const BELL_AT: u64 = words::SUCCESSOR_BELL_AT;
    const PANIC_AT: u64 = words::SUCCESSOR_PANIC_AT;
    const NAME: &'static str = "successor";
}

/// One end of the line.
pub struct Line<E: End> {
    device: Device,
    /// Whose bell the other end's is: the instance that the incumbent started, or [`SELF`] for a successor, whose bell at the other
    /// end is the one that it found at its beginning.
    peer: u32,
    bell: EventFd,
    memory: Arc<Mapping>,
    channel: Channel<Arc<Mapping>>,
    end: PhantomData<E>,
}

impl Line<Incumbent> {
    /// Opens the incumbent's end: empties the rings first. Before the successor starts, which is `instance`.
    pub fn open(device: &Device, control: Mapping, base: u64, instance: u32) -> Result<Line<Incumbent>> {
        let memory = Arc::new(control);
        Channel::reset(&memory)?;
        Line::take_end(device, memory, base, instance)
    }
}

impl Line<Successor> {
    /// Takes the successor's end. `base` is the control block's address.
    pub fn attach(device: &Device, memory: Arc<Mapping>, base: u64) -> Result<Line<Successor>> {
        Line::take_end(device, memory, base, SELF)
    }
}

impl<E: End> Line<E>
where
    E::Says: Payload + std::fmt::Debug,
    Heard<E>: Payload + Check<Against = (), Error = MessageError> + std::fmt::Debug,
{
    /// Takes this side's end: publishes the bell, and leaves word where to write when this kernel panics. The doorbell
    /// belongs to an open file of the device, so the line has one of its own.
    fn take_end(device: &Device, memory: Arc<Mapping>, base: u64, peer: u32) -> Result<Line<E>> {
        let device = device.open_again()?;
        let bell = EventFd::from_value_and_flags(0, EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?;
        let own = device.open_doorbell(bell.as_fd())?;
        memory.store(E::BELL_AT, own.to_word());
        // The predecessor's bell is there before this kernel is; an instance's is not, and may be moved, but not out of the instance.
        let predecessor = if peer == SELF { Bell::from_word(memory.load(E::Peer::BELL_AT)) } else { None };
        if let Some(there) = predecessor {
            device.connect_doorbell(there).context("the predecessor's doorbell")?;
        }
        device.panic_notice(base + E::PANIC_AT, PANICKED, predecessor)?;
        let channel = Channel::attach(memory.clone(), E::SIDE)?;
        Ok(Line { device, peer, bell, memory, channel, end: PhantomData })
    }

    /// The control block.
    pub fn memory(&self) -> &Mapping {
        &self.memory
    }

    /// Sends a message and rings.
    pub fn send(&mut self, message: &E::Says) -> Result<()> {
        self.channel.send(message)?;
        self.ring();
        Ok(())
    }

    /// Rings, if the other side has a bell yet. What was sent can be read without it, so a bell that cannot be rung now
    /// is rung again while an answer is awaited.
    fn ring(&self) {
        let Some(bell) = Bell::from_word(self.memory.load(E::Peer::BELL_AT)) else { return };
        let rung = match self.device.ring(self.peer, bell) {
            // The predecessor's agent began anew, and its bell with it: on the same CPU, as the module sees to.
            Err(DeviceError::NoSuch { .. }) if self.peer == SELF => {
                self.device.connect_doorbell(bell).and_then(|()| self.device.ring(SELF, bell))
            }
            rung => rung,
        };
        if let Err(error) = rung {
            tracing::warn!("cannot ring the {}: {error}", E::Peer::NAME);
        }
    }

    /// The next message, waiting for it.
    pub fn receive(&mut self, patience: Duration) -> Result<Heard<E>> {
        self.receive_unless(patience, &NEVER)
    }

    /// The next message, waiting for it until `called_off` is set.
    pub fn receive_unless(&mut self, patience: Duration, called_off: &AtomicBool) -> Result<Heard<E>> {
        let deadline = Instant::now() + patience;
        loop {
            if let Some(message) = self.channel.receive()? {
                return Ok(message);
            }
            if self.memory.load(E::Peer::PANIC_AT) != 0 {
                return Err(Unanswered::Panicked(E::Peer::NAME).into());
            }
            if called_off.load(Ordering::SeqCst) {
                return Err(Unanswered::CalledOff.into());
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Unanswered::Silent { peer: E::Peer::NAME, patience }.into());
            }
            self.wait(left.min(RING_AGAIN))?;
        }
    }

    fn wait(&self, patience: Duration) -> Result<()> {
        let timeout = PollTimeout::try_from(patience.as_millis().max(1)).unwrap_or(PollTimeout::MAX);
        let mut fds = [PollFd::new(self.bell.as_fd(), PollFlags::POLLIN)];
        match poll(&mut fds, timeout) {
            Ok(0) => self.ring(),
            // The count of rings is of no use: what has arrived is looked up in the channel.
            Ok(_) => drop(self.bell.read()),
            Err(nix::errno::Errno::EINTR) => {}
            Err(errno) => return Err(errno).context("cannot wait for the doorbell"),
        }
        Ok(())
    }
}

impl Line<Incumbent> {
    /// Takes up the line of an incumbent's agent that has died, to `instance`. [`Line::greet`] comes next.
    pub fn take_up(device: &Device, control: Arc<Mapping>, base: u64, instance: u32) -> Result<Line<Incumbent>> {
        Line::take_end(device, control, base, instance)
    }

    /// Waits until the successor answers this agent: what it answered to one that died is of no use any more. (The successor may ring
    /// the bell of the one that died. Its answers are looked for without a bell, too.)
    ///
    /// # Errors
    /// It does not answer until then.
    pub fn greet(&mut self, until: Instant) -> Result<()> {
        let ours = tsc();
        self.send(&ToSuccessor::Ping { nonce: ours })?;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            match self.receive(left).context("the successor does not answer a new batond")? {
                ToIncumbent::Pong { nonce } if nonce == ours => return Ok(()),
                late => tracing::info!("an answer for the batond that died: {late:?}"),
            }
        }
    }

    /// Sends a message and waits for its answer. Everything else that arrives is refused: one thing at a time.
    pub fn ask<T>(
        &mut self,
        message: &ToSuccessor,
        patience: Duration,
        answer: impl Fn(ToIncumbent) -> Option<T>,
    ) -> Result<T> {
        self.ask_unless(message, patience, &NEVER, answer)
    }

    /// The same, waiting until `called_off` is set. What is answered later would be taken for the answer to the next question: so only
    /// where nothing else is asked.
    pub fn ask_unless<T>(
        &mut self,
        message: &ToSuccessor,
        patience: Duration,
        called_off: &AtomicBool,
        answer: impl Fn(ToIncumbent) -> Option<T>,
    ) -> Result<T> {
        self.send(message)?;
        match self.receive_unless(patience, called_off).with_context(|| format!("no answer to {}", told(message)))? {
            ToIncumbent::Failed { what, cause } => {
                Err(Unanswered::Refused { what: what.into(), cause: cause.into() }.into())
            }
            other => {
                let shown = format!("{other:?}");
                answer(other).with_context(|| format!("the successor answered {} with {shown}", told(message)))
            }
        }
    }
}

/// A message, for people: without the bytes of a table.
fn told(message: &ToSuccessor) -> String {
    match message {
        ToSuccessor::Connections { at, total, bytes } => {
            format!("{} bytes at {at} of a table of {total}", bytes.len())
        }
        other => format!("{other:?}"),
    }
}
