//! Reads everything back. Reading changes nothing, so that it may be tried again on a new connection until patience ends.

use std::io;
use std::thread;
use std::time::{Duration, Instant};

use super::LoadReport;
use super::client::Reply;
use super::ledger::{Found, Ledger};
use super::worker::Connection;

/// Keys in one MGET.
const CHUNK: usize = 64;
/// Items in one LRANGE.
const RANGE: usize = 1024;

/// Why nothing can be said about the writes.
#[derive(Debug, thiserror::Error)]
pub enum VerifyError {
    /// The service cannot be read.
    #[error("the service could not be read back within {patience:?}: {last}")]
    Unreadable {
        /// How long it was tried.
        patience: Duration,
        /// The last error.
        last: io::Error,
    },
    /// It answered something that is no answer to the question.
    #[error("reading back: {asked} was answered {reply}")]
    Answer {
        /// The command.
        asked: String,
        /// The reply.
        reply: String,
    },
    /// A bug of the load itself.
    #[error("a thread of the load panicked")]
    WorkerPanicked,
}

struct Reader<'c> {
    connection: &'c mut Connection,
    patience: Duration,
    deadline: Instant,
}

pub(super) fn verify(
    connection: &mut Connection,
    ledgers: Vec<Ledger>,
    patience: Duration,
    report: &mut LoadReport,
) -> Result<(), VerifyError> {
    let mut reader = Reader { connection, patience, deadline: Instant::now() + patience };
    for ledger in ledgers {
        let found = reader.find(&ledger)?;
        let part = ledger.judge(&found);
        report.acknowledged += part.acknowledged;
        report.lost += part.lost;
        report.unknown += part.unknown;
        report.refused += part.refused;
        report.reads += part.reads;
        report.contradictions += part.contradictions;
        part.complaints.into_iter().for_each(|words| report.complain(words));
    }
    Ok(())
}

impl Reader<'_> {
    fn find(&mut self, ledger: &Ledger) -> Result<Found, VerifyError> {
        let mut found = Found::default();
        for from in (0..ledger.texts()).step_by(CHUNK) {
            let keys: Vec<String> = (from..(from + CHUNK).min(ledger.texts())).map(|k| ledger.text_key(k)).collect();
            let words: Vec<&str> = std::iter::once("MGET").chain(keys.iter().map(String::as_str)).collect();
            let values = self.array(&words)?;
            if values.len() != keys.len() {
                return Err(answer(&words, &Reply::Array(Vec::new())));
            }
            found.texts.extend(values);
        }
        found.counter = match self.ask(&["GET", &ledger.key('c')])? {
            Reply::Bulk(value) => value,
            other => return Err(answer(&["GET", &ledger.key('c')], &other)),
        };
        loop {
            let (from, to) = (found.list.len(), found.list.len() + RANGE - 1);
            let part = self.array(&["LRANGE", &ledger.key('l'), &from.to_string(), &to.to_string()])?;
            if part.is_empty() {
                break;
            }
            found.list.extend(part.into_iter().flatten());
        }
        found.set.extend(self.array(&["SMEMBERS", &ledger.key('m')])?.into_iter().flatten());
        Ok(found)
    }

    fn array(&mut self, words: &[&str]) -> Result<Vec<Option<Vec<u8>>>, VerifyError> {
        let reply = self.ask(words)?;
        let Reply::Array(items) = &reply else { return Err(answer(words, &reply)) };
        let bulk = |item: &Reply| if let Reply::Bulk(bulk) = item { Some(bulk.clone()) } else { None };
        items.iter().map(bulk).collect::<Option<_>>().ok_or_else(|| answer(words, &reply))
    }

    fn ask(&mut self, words: &[&str]) -> Result<Reply, VerifyError> {
        let request: Vec<&[u8]> = words.iter().map(|w| w.as_bytes()).collect();
        loop {
            let last = match self.connection.get().and_then(|client| client.ask(&request)) {
                Ok(reply) => return Ok(reply),
                Err(error) => error,
            };
            self.connection.failed(&last);
            if Instant::now() >= self.deadline {
                return Err(VerifyError::Unreadable { patience: self.patience, last });
            }
            thread::sleep(self.connection.backoff());
        }
    }
}

fn answer(words: &[&str], reply: &Reply) -> VerifyError {
    let mut reply = format!("{reply:?}");
    reply.truncate(reply.floor_char_boundary(120));
    VerifyError::Answer { asked: words[..words.len().min(2)].join(" "), reply }
}
