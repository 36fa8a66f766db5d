//! ^C while an update runs. `batond` makes the update, not this program: ending this program would leave it running without a
//! word. So the first ^C says that, and the second one calls the update off.

use std::path::{Path, PathBuf};
use std::thread;

use nix::sys::signal::{SigSet, Signal};

use crate::daemon::control::{self, Reply, Request};

/// Heeds ^C from here on. To be called before any other thread starts, so that none of them takes the signal.
pub fn heed(socket: &Path) {
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGINT);
    let socket = socket.to_owned();
    let listening = signals
        .thread_block()
        .map_err(std::io::Error::from)
        .and_then(|()| thread::Builder::new().name("interrupt".into()).spawn(move || listen(signals, socket)));
    if let Err(error) = listening {
        eprintln!("baton: ^C will end this program, and not the update ({error}); `baton cancel` calls the update off");
    }
}

fn listen(signals: SigSet, socket: PathBuf) {
    let mut times = 0;
    while signals.wait().is_ok() {
        times += 1;
        if times == 1 {
            eprintln!("baton: the update goes on, batond makes it. ^C again calls it off (so does `baton cancel`)");
            continue;
        }
        match control::ask(&socket, &Request::Cancel, |_, _| {}) {
            Ok(Reply::CalledOff) => eprintln!("baton: called off; waiting for everything to be undone"),
            Ok(other) => eprintln!("baton: batond answered something else than was asked: {other:?}"),
            Err(failure) => eprintln!("baton: {}", failure.cause),
        }
    }
}
