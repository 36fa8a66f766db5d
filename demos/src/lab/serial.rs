//! The machine's serial ports: everything a kernel prints, kept in a log file and at hand for whoever waits for a line of it.

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::error::{Doing, Result, last_lines};

/// How long to wait for something that a guest does. Guests are emulated on machines of any speed, so silence says more than time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Patience {
    /// Longest time without a byte on the port.
    pub silence: Duration,
    /// Longest time in all.
    pub total: Duration,
}

impl Patience {
    /// For a whole boot.
    pub const BOOT: Self = Self { silence: Duration::from_secs(90), total: Duration::from_secs(300) };

    /// The same limit for both.
    #[must_use]
    pub const fn of(total: Duration) -> Self {
        Self { silence: total, total }
    }
}

#[derive(Debug, Default)]
struct Log {
    text: Vec<u8>,
    closed: bool,
    last_byte: Option<Instant>,
}

#[derive(Debug, Default)]
struct Shared {
    log: Mutex<Log>,
    grown: Condvar,
}

/// One port. Clones are the same port.
#[derive(Clone, Debug)]
pub struct Serial {
    shared: Arc<Shared>,
    input: Arc<UnixStream>,
}

/// Why a wait ended without what was waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NotSeen {
    /// The patience ran out.
    TimedOut,
    /// The machine closed the port: QEMU has ended.
    Closed,
}

impl Serial {
    /// Follows a port; what arrives also goes to `log_file`.
    pub fn follow(port: UnixStream, log_file: &Path) -> Result<Self> {
        let mut file = File::create(log_file).doing(format_args!("creating {}", log_file.display()))?;
        let mut source = port.try_clone().doing("reading a serial port")?;
        let shared = Arc::new(Shared::default());
        let writer = Arc::clone(&shared);
        let body = move || {
            let mut buffer = [0; 4096];
            loop {
                let read = source.read(&mut buffer).unwrap_or(0);
                // The copy in memory serves waiters; a full disk must not end a machine.
                let _ = file.write_all(&buffer[..read]);
                let mut log = writer.log.lock().unwrap_or_else(PoisonError::into_inner);
                log.text.extend_from_slice(&buffer[..read]);
                log.last_byte = Some(Instant::now());
                log.closed = read == 0;
                writer.grown.notify_all();
                if read == 0 {
                    return;
                }
            }
        };
        std::thread::Builder::new().name("serial".into()).spawn(body).doing("starting a thread")?;
        Ok(Self { shared, input: Arc::new(port) })
    }

    /// How much has arrived: a position to wait from.
    #[must_use]
    pub fn position(&self) -> usize {
        self.lock().text.len()
    }

    /// Waits until `wanted` stands after `from`; the position behind it.
    pub fn wait_for(&self, wanted: &str, from: usize, patience: Patience) -> std::result::Result<usize, NotSeen> {
        let mut searched = from;
        self.wait_until(patience, |text| {
            let found =
                find(&text[searched.min(text.len())..], wanted.as_bytes()).map(|at| searched + at + wanted.len());
            // What was searched stays searched, except for an end that may be the beginning of `wanted`.
            searched = searched.max(text.len().saturating_sub(wanted.len()));
            found
        })
    }

    /// Waits until QEMU has closed the port.
    pub fn wait_closed(&self, patience: Patience) -> std::result::Result<(), NotSeen> {
        match self.wait_until(patience, |_| None::<()>) {
            Err(NotSeen::Closed) => Ok(()),
            other => other,
        }
    }

    fn wait_until<T>(
        &self,
        patience: Patience,
        mut look: impl FnMut(&[u8]) -> Option<T>,
    ) -> std::result::Result<T, NotSeen> {
        let began = Instant::now();
        let mut log = self.lock();
        loop {
            if let Some(found) = look(&log.text) {
                return Ok(found);
            }
            if log.closed {
                return Err(NotSeen::Closed);
            }
            let quiet_since = log.last_byte.map_or(began, |t| t.max(began));
            let left = patience
                .total
                .saturating_sub(began.elapsed())
                .min(patience.silence.saturating_sub(quiet_since.elapsed()));
            if left.is_zero() {
                return Err(NotSeen::TimedOut);
            }
            log = self.shared.grown.wait_timeout(log, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// All text from a position on.
    #[must_use]
    pub fn text_from(&self, from: usize) -> String {
        let log = self.lock();
        String::from_utf8_lossy(&log.text[from.min(log.text.len())..]).into_owned()
    }

    /// The last lines.
    #[must_use]
    pub fn tail(&self, lines: usize) -> String {
        last_lines(&self.text_from(self.position().saturating_sub(64 << 10)), lines)
    }

    /// Types on the port.
    pub fn send(&self, bytes: &[u8]) -> Result<()> {
        (&*self.input).write_all(bytes).doing("writing to a serial port")
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Log> {
        self.shared.log.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn find(text: &[u8], wanted: &[u8]) -> Option<usize> {
    text.windows(wanted.len()).position(|w| w == wanted)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHORT: Patience = Patience { silence: Duration::from_millis(50), total: Duration::from_secs(20) };

    #[test]
    fn text_is_found_across_reads_and_only_after_the_position() {
        let dir = tempfile::tempdir().unwrap();
        let (mut guest, port) = UnixStream::pair().unwrap();
        let serial = Serial::follow(port, &dir.path().join("log")).unwrap();
        let waiter = std::thread::spawn({
            let serial = serial.clone();
            move || serial.wait_for("ready", 0, Patience::of(Duration::from_secs(20)))
        });
        guest.write_all(b"not rea").unwrap();
        guest.write_all(b"dy yet: ready").unwrap();
        let first = waiter.join().unwrap().unwrap();
        assert_eq!(first, "not ready".len());
        let second = serial.wait_for("ready", first, SHORT).unwrap();
        assert_eq!(second, "not ready yet: ready".len());
        assert_eq!(serial.wait_for("ready", second, SHORT), Err(NotSeen::TimedOut));
        drop(guest);
        assert_eq!(serial.wait_for("never", 0, Patience::BOOT), Err(NotSeen::Closed));
        assert_eq!(std::fs::read_to_string(dir.path().join("log")).unwrap(), "not ready yet: ready");
    }
}
