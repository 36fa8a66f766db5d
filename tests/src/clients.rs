//! Clients of the service, inside the machine's network.

use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use demos::load::{Load, LoadOptions, LoadReport};
use demos::story::stage::{Stage, service};

/// How long reading everything back may be tried.
const READ_BACK: Duration = Duration::from_secs(120);

/// A load that began before whatever the test does, and is checked after it.
pub struct Clients {
    load: Load,
    door: demos::lab::Door,
}

impl Clients {
    /// Starts it and waits until the first writes are acknowledged.
    pub fn start(stage: &Stage, ops_per_second: u32) -> Result<Clients> {
        let options = LoadOptions {
            ops_per_second,
            connections: 4,
            timeout: Duration::from_secs(20),
            ..LoadOptions::new(service())
        };
        let door = stage.machine.door().clone();
        let load = within(&door, move || Load::start(options))??;
        let clients = Clients { load, door };
        clients.await_more(20)?;
        Ok(clients)
    }

    /// Acknowledged writes so far.
    pub fn acknowledged(&self) -> u64 {
        self.load.acknowledged()
    }

    /// Waits until this many more writes are acknowledged: the service serves.
    pub fn await_more(&self, writes: u64) -> Result<()> {
        let wanted = self.acknowledged() + writes;
        let began = std::time::Instant::now();
        while self.acknowledged() < wanted {
            if began.elapsed() > READ_BACK {
                return Err(anyhow!("the service does not acknowledge writes: {} of {wanted}", self.acknowledged()));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    /// Stops the load and reads everything back.
    pub fn finish(self) -> Result<LoadReport> {
        let Clients { load, door } = self;
        Ok(within(&door, move || load.finish(READ_BACK))??)
    }
}

/// A client that says little: one connection, made before whatever the test does, with half a request on it all the time.
pub struct Quiet {
    socket: std::net::TcpStream,
}

impl Quiet {
    /// Connects, and begins a request.
    pub fn connect(stage: &Stage) -> Result<Quiet> {
        let socket = within(stage.machine.door(), || std::net::TcpStream::connect(service()))??;
        socket.set_read_timeout(Some(READ_BACK))?;
        let mut quiet = Quiet { socket };
        quiet.finish_request("PI")?;
        Ok(quiet)
    }

    /// Ends the request that was begun before, hears its answer, and begins the next.
    pub fn ask(&mut self) -> Result<()> {
        use std::io::Read;
        self.finish_request("NG\r\n")?;
        let mut answer = [0; 7];
        self.socket.read_exact(&mut answer).context("the connection made before the update gives no answer")?;
        anyhow::ensure!(&answer == b"+PONG\r\n", "it answered {:?}", String::from_utf8_lossy(&answer));
        self.finish_request("PI")
    }

    fn finish_request(&mut self, text: &str) -> Result<()> {
        use std::io::Write;
        self.socket.write_all(text.as_bytes()).context("the connection made before the update")
    }
}

fn within<T: Send + 'static>(door: &demos::lab::Door, work: impl FnOnce() -> T + Send + 'static) -> Result<T> {
    let thread = door.spawn("clients", work)?;
    Ok(thread.join().map_err(|_| anyhow!("panicked")).context("a client's thread")??)
}
