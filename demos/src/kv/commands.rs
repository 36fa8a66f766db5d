//! One request → one reply. Whatever a command changes is in the arena before the first byte of its reply is appended.
//!
//! The set of commands is what `redis-benchmark`, `redis-cli` and client libraries need, and what the checker reads back.
//! Anything else is refused in the words of redis 5, so that clients fall back (`HELLO`: to RESP2).

use std::ops::Range;

use handover::arena::{ArenaError, Store, StoreError, store::Kind};

use super::resp::{Reply, number};

/// What the commands can say about the server.
#[derive(Debug, Clone)]
pub struct Facts {
    /// Release of the kernel that this process runs on.
    pub kernel: String,
    /// The epoch held (0: standalone).
    pub epoch: u64,
    /// Connected clients.
    pub clients: usize,
    /// Most bytes that one reply may have.
    pub reply_limit: usize,
}

/// What becomes of the connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum After {
    /// Next request.
    GoOn,
    /// Send what there is, then close.
    Close,
}

/// A request's arguments, the command's name not among them.
#[derive(Debug, Clone, Copy)]
pub struct Args<'a> {
    input: &'a [u8],
    ranges: &'a [Range<usize>],
}

impl<'a> Args<'a> {
    fn get(self, index: usize) -> Option<&'a [u8]> {
        self.ranges.get(index).map(|range| &self.input[range.clone()])
    }

    fn iter(self) -> impl ExactSizeIterator<Item = &'a [u8]> {
        self.ranges.iter().map(move |range| &self.input[range.clone()])
    }

    /// Exactly `N` arguments.
    fn fixed<const N: usize>(self) -> Result<[&'a [u8]; N], Refusal> {
        if self.ranges.len() != N {
            return Err(Refusal::Arity);
        }
        Ok(std::array::from_fn(|i| self.get(i).unwrap_or_default()))
    }

    /// One argument and at least one more.
    fn key_and_more(self) -> Result<(&'a [u8], Self), Refusal> {
        match (self.get(0), self.ranges.get(1..)) {
            (Some(key), Some(more @ [_, ..])) => Ok((key, Self { ranges: more, ..self })),
            _ => Err(Refusal::Arity),
        }
    }

    fn at_least_one(self) -> Result<Self, Refusal> {
        if self.ranges.is_empty() { Err(Refusal::Arity) } else { Ok(self) }
    }
}

/// Why a command was not carried out.
#[derive(Debug)]
enum Refusal {
    Arity,
    Unknown,
    Syntax,
    NotANumber,
    Database,
    TooLong(usize),
    Store(StoreError),
}

impl<E: Into<StoreError>> From<E> for Refusal {
    fn from(error: E) -> Self {
        Self::Store(error.into())
    }
}

/// Carries out one request and appends its one reply to `out`.
pub fn execute(
    store: &mut Store<'_>,
    facts: &Facts,
    input: &[u8],
    request: &[Range<usize>],
    out: &mut Vec<u8>,
) -> After {
    let Some((name, ranges)) = request.split_first() else { return After::GoOn };
    let name = &input[name.clone()];
    let args = Args { input, ranges };
    let start = out.len();
    match dispatch(store, facts, name, args, out) {
        Ok(after) => after,
        Err(refusal) => {
            // A reply that was begun is taken back: a client reads the error in its place.
            out.truncate(start);
            refuse(refusal, name, args, out);
            After::GoOn
        }
    }
}

fn dispatch(
    store: &mut Store<'_>,
    facts: &Facts,
    name: &[u8],
    args: Args<'_>,
    out: &mut Vec<u8>,
) -> Result<After, Refusal> {
    let mut upper = [0; 16];
    let upper = upper.get_mut(..name.len()).ok_or(Refusal::Unknown)?;
    upper.copy_from_slice(name);
    upper.make_ascii_uppercase();
    match &*upper {
        b"GET" => {
            let [key] = args.fixed()?;
            match store.get(key)? {
                Some(value) => out.bulk(value),
                None => out.nil(),
            }
        }
        b"SET" => set(store, args, out)?,
        b"SETNX" => {
            let [key, value] = args.fixed()?;
            let new = !store.exists(key)?;
            if new {
                store.set(key, value)?;
            }
            out.integer(new.into());
        }
        b"MSET" => mset(store, args, out)?,
        b"MGET" => {
            out.array(args.at_least_one()?.iter().len());
            for key in args.iter() {
                match store.get(key) {
                    Ok(Some(value)) => out.bulk(value),
                    Ok(None) | Err(StoreError::WrongType { .. }) => out.nil(),
                    Err(error) => return Err(error.into()),
                }
                bounded(out, facts)?;
            }
        }
        b"INCR" => incr(store, args.fixed().map(|[key]| (key, 1))?, out)?,
        b"DECR" => incr(store, args.fixed().map(|[key]| (key, -1))?, out)?,
        b"INCRBY" | b"DECRBY" => {
            let [key, by] = args.fixed()?;
            let by = number(by).ok_or(Refusal::NotANumber)?;
            let by = if &*upper == b"DECRBY" { by.checked_neg().ok_or(Refusal::NotANumber)? } else { by };
            incr(store, (key, by), out)?;
        }
        b"APPEND" => {
            let [key, tail] = args.fixed()?;
            let len = store.append(key, tail)?;
            out.integer(signed(len));
        }
        b"STRLEN" => {
            let [key] = args.fixed()?;
            out.integer(signed(store.get(key)?.map_or(0, <[u8]>::len) as u64));
        }
        b"DEL" | b"UNLINK" => {
            let mut deleted = 0;
            for key in args.at_least_one()?.iter() {
                deleted += i64::from(store.del(key)?);
            }
            out.integer(deleted);
        }
        b"EXISTS" => {
            let mut there = 0;
            for key in args.at_least_one()?.iter() {
                there += i64::from(store.exists(key)?);
            }
            out.integer(there);
        }
        b"TYPE" => {
            let [key] = args.fixed()?;
            out.status(match store.kind(key)? {
                None => "none",
                Some(Kind::String) => "string",
                Some(Kind::List) => "list",
                Some(Kind::Set) => "set",
            });
        }
        b"LPUSH" | b"RPUSH" => {
            let (key, items) = args.key_and_more()?;
            let mut len = 0;
            for item in items.iter() {
                len = if upper[0] == b'L' { store.lpush(key, item)? } else { store.rpush(key, item)? };
            }
            out.integer(signed(len));
        }
        b"LPOP" | b"RPOP" => {
            let [key] = args.fixed()?;
            let item = if upper[0] == b'L' { store.lpop(key)? } else { store.rpop(key)? };
            optional(item, out);
        }
        b"LLEN" => {
            let [key] = args.fixed()?;
            out.integer(signed(store.llen(key)?));
        }
        b"LRANGE" => {
            let [key, start, stop] = args.fixed()?;
            let start = number(start).ok_or(Refusal::NotANumber)?;
            let stop = number(stop).ok_or(Refusal::NotANumber)?;
            array(store.lrange(key, start, stop)?, facts, out)?;
        }
        b"SADD" => {
            let (key, members) = args.key_and_more()?;
            let mut added = 0;
            for member in members.iter() {
                added += i64::from(store.sadd(key, member)?);
            }
            out.integer(added);
        }
        b"SREM" => {
            let (key, members) = args.key_and_more()?;
            let mut removed = 0;
            for member in members.iter() {
                removed += i64::from(store.srem(key, member)?);
            }
            out.integer(removed);
        }
        b"SPOP" => {
            let [key] = args.fixed()?;
            let member = store.spop(key)?;
            optional(member, out);
        }
        b"SISMEMBER" => {
            let [key, member] = args.fixed()?;
            out.integer(store.sismember(key, member)?.into());
        }
        b"SMEMBERS" => {
            let [key] = args.fixed()?;
            array(store.smembers(key)?, facts, out)?;
        }
        b"SCARD" => {
            let [key] = args.fixed()?;
            out.integer(signed(store.scard(key)?));
        }
        b"DBSIZE" => {
            let [] = args.fixed()?;
            out.integer(signed(store.len()?));
        }
        b"FLUSHALL" | b"FLUSHDB" => {
            store.flush()?;
            out.status("OK");
        }
        b"PING" => match (args.get(0), args.ranges.len()) {
            (None, _) => out.status("PONG"),
            (Some(words), 1) => out.bulk(words),
            _ => return Err(Refusal::Arity),
        },
        b"ECHO" => {
            let [words] = args.fixed()?;
            out.bulk(words);
        }
        b"SELECT" => match args.fixed()? {
            [b"0"] => out.status("OK"),
            [_] => return Err(Refusal::Database),
        },
        b"INFO" => out.bulk(info(store, facts)?.as_bytes()),
        b"CONFIG" => config(args, out)?,
        b"CLIENT" => client(args, out)?,
        b"COMMAND" => out.array(0),
        b"QUIT" => {
            out.status("OK");
            return Ok(After::Close);
        }
        _ => return Err(Refusal::Unknown),
    }
    Ok(After::GoOn)
}

fn set(store: &mut Store<'_>, args: Args<'_>, out: &mut Vec<u8>) -> Result<(), Refusal> {
    let (key, value) = match args.ranges.len() {
        0 | 1 => return Err(Refusal::Arity),
        _ => (args.get(0).unwrap_or_default(), args.get(1).unwrap_or_default()),
    };
    let wanted = match args.iter().skip(2).collect::<Vec<_>>()[..] {
        [] => None,
        [option] if option.eq_ignore_ascii_case(b"NX") => Some(false),
        [option] if option.eq_ignore_ascii_case(b"XX") => Some(true),
        // Expiry above all: to accept it and not keep to it would be a lie.
        _ => return Err(Refusal::Syntax),
    };
    if wanted.is_some_and(|wanted| store.exists(key).is_ok_and(|there| there != wanted)) {
        out.nil();
        return Ok(());
    }
    store.set(key, value)?;
    out.status("OK");
    Ok(())
}

/// Pair by pair: should the arena be full in the middle, the error says so and the pairs before it stay.
fn mset(store: &mut Store<'_>, args: Args<'_>, out: &mut Vec<u8>) -> Result<(), Refusal> {
    let count = args.at_least_one()?.ranges.len();
    if !count.is_multiple_of(2) {
        return Err(Refusal::Arity);
    }
    for pair in (0..count).step_by(2) {
        store.set(args.get(pair).unwrap_or_default(), args.get(pair + 1).unwrap_or_default())?;
    }
    out.status("OK");
    Ok(())
}

fn incr(store: &mut Store<'_>, (key, by): (&[u8], i64), out: &mut Vec<u8>) -> Result<(), Refusal> {
    let sum = store.incr(key, by)?;
    out.integer(sum);
    Ok(())
}

fn optional(item: Option<Vec<u8>>, out: &mut Vec<u8>) {
    match item {
        Some(item) => out.bulk(&item),
        None => out.nil(),
    }
}

/// As many as there are: counted while they are written, since the arena's own count is only what it alleges.
fn array<'s>(
    items: impl Iterator<Item = Result<&'s [u8], StoreError>>,
    facts: &Facts,
    out: &mut Vec<u8>,
) -> Result<(), Refusal> {
    let mut body = Vec::new();
    let mut count = 0;
    for item in items {
        body.bulk(item?);
        bounded(&body, facts)?;
        count += 1;
    }
    out.array(count);
    out.extend_from_slice(&body);
    Ok(())
}

fn bounded(reply: &[u8], facts: &Facts) -> Result<(), Refusal> {
    if reply.len() > facts.reply_limit { Err(Refusal::TooLong(facts.reply_limit)) } else { Ok(()) }
}

fn info(store: &Store<'_>, facts: &Facts) -> Result<String, Refusal> {
    let usage = store.usage();
    Ok(format!(
        "# Server\r\nredis_version:5.0.0\r\nredis_mode:standalone\r\nserver_name:baton-kv\r\nos:Linux {}\r\nprocess_id:{}\r\n\
         baton_epoch:{}\r\n\r\n# Clients\r\nconnected_clients:{}\r\n\r\n# Memory\r\nused_memory:{}\r\nmaxmemory:{}\r\n\r\n\
         # Keyspace\r\ndb0:keys={},expires=0,avg_ttl=0\r\n",
        facts.kernel,
        std::process::id(),
        facts.epoch,
        facts.clients,
        usage.used,
        usage.length,
        store.len()?,
    ))
}

/// `redis-benchmark` asks what persistence it competes with.
fn config(args: Args<'_>, out: &mut Vec<u8>) -> Result<(), Refusal> {
    let [verb, what] = args.fixed()?;
    if !verb.eq_ignore_ascii_case(b"GET") {
        return Err(Refusal::Syntax);
    }
    let value: &[u8] = match &what.to_ascii_lowercase()[..] {
        b"save" => b"",
        b"appendonly" => b"no",
        b"databases" => b"1",
        _ => {
            out.array(0);
            return Ok(());
        }
    };
    out.array(2);
    out.bulk(what);
    out.bulk(value);
    Ok(())
}

/// Names are accepted and forgotten.
fn client(args: Args<'_>, out: &mut Vec<u8>) -> Result<(), Refusal> {
    match &args.get(0).ok_or(Refusal::Arity)?.to_ascii_uppercase()[..] {
        b"SETNAME" | b"SETINFO" => out.status("OK"),
        b"GETNAME" => out.nil(),
        _ => return Err(Refusal::Syntax),
    }
    Ok(())
}

fn refuse(refusal: Refusal, name: &[u8], args: Args<'_>, out: &mut Vec<u8>) {
    match refusal {
        Refusal::Arity => {
            let name = printable(name, 64).to_ascii_lowercase();
            out.error(&format!("ERR wrong number of arguments for '{name}' command"));
        }
        Refusal::Unknown => {
            let mut words = format!("ERR unknown command `{}`, with args beginning with: ", printable(name, 64));
            for arg in args.iter().take(8) {
                words.push_str(&format!("`{}`, ", printable(arg, 32)));
            }
            out.error(&words);
        }
        Refusal::Syntax => out.error("ERR syntax error"),
        Refusal::NotANumber | Refusal::Store(StoreError::NotAnInteger) => {
            out.error("ERR value is not an integer or out of range");
        }
        Refusal::Database => out.error("ERR DB index is out of range"),
        Refusal::TooLong(limit) => out.error(&format!("ERR the reply would exceed {limit} bytes")),
        Refusal::Store(StoreError::WrongType { .. }) => {
            out.error("WRONGTYPE Operation against a key holding the wrong kind of value");
        }
        Refusal::Store(StoreError::Overflow { .. }) => out.error("ERR increment or decrement would overflow"),
        Refusal::Store(StoreError::Arena(error @ ArenaError::OutOfMemory { .. })) => out.error(&format!("OOM {error}")),
        Refusal::Store(error) => out.error(&format!("ERR {error}")),
    }
}

/// A stranger's bytes in a reply that is one line of text.
fn printable(bytes: &[u8], most: usize) -> String {
    bytes.iter().take(most).map(|&b| if b.is_ascii_graphic() || b == b' ' { char::from(b) } else { '?' }).collect()
}

fn signed(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}
