//! Who looks on while a kernel is changed: the open-loop prober, and a load that knows which of its writes were acknowledged. Both
//! are on the lab's network, outside the machine.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::stage::service;
use crate::lab::Door;
use crate::load::{Halted, Load, LoadOptions, LoadReport};
use crate::measure::{ProbeOptions, ProbeReport, Prober, Samples};

/// How long the clients look at the machine before it is changed, and after.
pub const CALM: Duration = Duration::from_secs(2);
/// How long all writes are read back at most.
const READ_BACK: Duration = Duration::from_secs(60);
/// How often it is looked at whether something has come about.
const LOOK: Duration = Duration::from_millis(20);

/// Prober and load at work.
pub struct Clients {
    door: Door,
    prober: Prober,
    load: Load,
}

/// What they saw of one change of kernel.
pub struct Seen {
    /// The prober's samples between the change's beginning and the calm after it.
    pub probe: ProbeReport,
    /// When that began, in nanoseconds since the prober's start.
    pub from: u64,
    /// Every sample.
    pub samples: Samples,
    /// The zero of the prober's times.
    pub started: Instant,
    /// The load has stopped; its writes are yet to be read back.
    pub halted: Halted,
}

impl Clients {
    /// Starts both.
    pub fn start(door: &Door, rate_hz: u32) -> Result<Self> {
        let work = move || -> io::Result<_> {
            let prober = Prober::start(ProbeOptions { rate_hz, ..ProbeOptions::new(service()) })?;
            Ok((prober, Load::start(LoadOptions::new(service()))?))
        };
        let (prober, load) = in_there(door, "clients", work)?.context("starting prober and load")?;
        Ok(Self { door: door.clone(), prober, load })
    }

    /// Lets them work in peace for a while; the service must answer both.
    pub fn calm(&self, patience: Duration) -> Result<()> {
        let (answered, acknowledged) = (self.prober.answered(), self.load.acknowledged());
        let served = || self.prober.answered() > answered && self.load.acknowledged() > acknowledged;
        let began = Instant::now();
        while !served() {
            if began.elapsed() > patience {
                bail!(
                    "the service answered {} probes and acknowledged {} writes in {:.0} s",
                    self.prober.answered() - answered,
                    self.load.acknowledged() - acknowledged,
                    patience.as_secs_f64()
                );
            }
            std::thread::sleep(LOOK);
        }
        std::thread::sleep(CALM);
        Ok(())
    }

    /// Ends them. What the prober saw is told from `from` on; every sample goes to a file in `logs`.
    pub fn stop(self, from: Instant, logs: &Path) -> Result<Seen> {
        let started = self.prober.started();
        let halted = self.load.halt()?;
        let samples = self.prober.stop();
        let file = (1..).map(|n| logs.join(format!("probes-{n}.csv.log"))).find(|file| !file.exists());
        let file = file.context("the folder of logs is full")?;
        let writing = || format!("writing {}", file.display());
        samples.write_csv(io::BufWriter::new(File::create(&file).with_context(writing)?)).with_context(writing)?;
        let window: Range<u64> = from.saturating_duration_since(started).as_nanos() as u64..u64::MAX;
        Ok(Seen { probe: samples.report(window.clone()), from: window.start, samples, started, halted })
    }

    /// The network they are on.
    pub fn door(&self) -> &Door {
        &self.door
    }
}

/// Reads a load's writes back.
pub fn read_back(door: &Door, halted: Halted) -> Result<LoadReport> {
    Ok(in_there(door, "read-back", move || halted.verify(READ_BACK))??)
}

fn in_there<T: Send + 'static>(door: &Door, name: &str, work: impl FnOnce() -> T + Send + 'static) -> Result<T> {
    door.spawn(name, work)?.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)).map_err(Into::into)
}
