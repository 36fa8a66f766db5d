//! What one connection knows about its writes, and how that is compared with what is found. No I/O, no clock.
//!
//! A write ends in one of three ways: *acknowledged* (it must be there), *open* (sent, no answer: it may have happened, or may still happen
//! for as long as the request lies in some socket), *refused* (an error: judged like an open one, since an `MSET` may be refused half-way).
//! After an open write to a key that key is left alone, so that at the end exactly two values are right.

use std::collections::HashMap;

use super::LoadReport;
use super::client::Reply;

/// Keys in one MSET.
const GROUP: usize = 4;

/// A request of the load.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Op {
    /// `SET`: string `key` becomes its version `version`.
    Set {
        /// Index of the string.
        key: usize,
        /// Which value.
        version: u64,
    },
    /// `MSET` of new strings.
    Mset {
        /// Index of the first; [`GROUP`] in all.
        first: usize,
    },
    /// `INCR` of the counter.
    Incr,
    /// `LPUSH` of item number.
    Push(usize),
    /// `SADD` of member number.
    Add(usize),
    /// `GET` of a string whose value is certain.
    Get {
        /// Index of the string.
        key: usize,
    },
}

/// How a write ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    /// Not sent yet, or the answer may still come.
    Under,
    Acknowledged,
    Open,
}

#[derive(Debug, Clone, Copy)]
struct Text {
    /// The newest acknowledged version.
    acknowledged: Option<u64>,
    /// A version that is there or not.
    open: Option<u64>,
    /// A write is under way or open: leave it alone.
    busy: bool,
}

/// One connection's knowledge.
#[derive(Debug)]
pub struct Ledger {
    prefix: String,
    filler: String,
    limit: usize,
    texts: Vec<Text>,
    /// First index of each MSET without an answer.
    open_groups: Vec<usize>,
    counted: u64,
    count_open: u64,
    items: Vec<End>,
    members: Vec<End>,
    rng: u64,
    report: LoadReport,
}

/// What was found at the end, as the server says it.
#[derive(Debug, Clone, Default)]
pub struct Found {
    /// The strings, by index.
    pub texts: Vec<Option<Vec<u8>>>,
    /// The counter.
    pub counter: Option<Vec<u8>>,
    /// The list, from its front.
    pub list: Vec<Vec<u8>>,
    /// The set.
    pub set: Vec<Vec<u8>>,
}

impl Ledger {
    /// An empty one; all its keys begin with `prefix`.
    #[must_use]
    pub fn new(prefix: &str, value_len: usize, limit: usize) -> Self {
        Self {
            prefix: prefix.to_owned(),
            filler: "x".repeat(value_len),
            limit,
            texts: Vec::new(),
            open_groups: Vec::new(),
            counted: 0,
            count_open: 0,
            items: Vec::new(),
            members: Vec::new(),
            rng: prefix.bytes().fold(0xcbf2_9ce4_8422_2325, |h, b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3)),
            report: LoadReport::default(),
        }
    }

    /// Mixes a seed into the order of requests.
    pub fn seed(&mut self, seed: u64) {
        self.rng ^= seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }

    /// Key of a string.
    #[must_use]
    pub fn text_key(&self, index: usize) -> String {
        format!("{}:s:{index}", self.prefix)
    }

    /// Key of the counter (`c`), the list (`l`), the set (`m`).
    #[must_use]
    pub fn key(&self, kind: char) -> String {
        format!("{}:{kind}", self.prefix)
    }

    /// How many strings there are or may be.
    #[must_use]
    pub fn texts(&self) -> usize {
        self.texts.len()
    }

    fn value(&self, index: usize, version: u64) -> String {
        format!("{}:{index}:{version}:{}", self.prefix, self.filler)
    }

    fn element(&self, number: usize) -> String {
        format!("{}#{number}", self.prefix)
    }

    fn random(&mut self, below: usize) -> usize {
        // splitmix64
        self.rng = self.rng.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.rng;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % below.max(1) as u64) as usize
    }

    /// Chooses the next request and notes it as under way. Exactly one of [`Ledger::answered`] and [`Ledger::unanswered`] must
    /// follow for each, in order.
    pub fn choose(&mut self) -> Op {
        match self.random(12) {
            0..3 if self.texts.len() < self.limit => {
                self.texts.push(Text { acknowledged: None, open: None, busy: true });
                Op::Set { key: self.texts.len() - 1, version: 1 }
            }
            3 if self.texts.len() + GROUP <= self.limit => {
                let first = self.texts.len();
                self.texts.resize(first + GROUP, Text { acknowledged: None, open: None, busy: true });
                Op::Mset { first }
            }
            4..6 if self.items.len() < self.limit => {
                self.items.push(End::Under);
                Op::Push(self.items.len() - 1)
            }
            6..8 if self.members.len() < self.limit => {
                self.members.push(End::Under);
                Op::Add(self.members.len() - 1)
            }
            8..10 => match self.settled() {
                Some((key, _)) => Op::Get { key },
                None => self.incr(),
            },
            10 => match self.settled() {
                Some((key, version)) => {
                    self.texts[key].busy = true;
                    Op::Set { key, version: version + 1 }
                }
                None => self.incr(),
            },
            _ => self.incr(),
        }
    }

    fn incr(&mut self) -> Op {
        // Open until the answer comes: several may be under way.
        self.count_open += 1;
        Op::Incr
    }

    /// Some string whose value is certain, and which one.
    fn settled(&mut self) -> Option<(usize, u64)> {
        for _ in 0..8 {
            let key = self.random(self.texts.len());
            if let Some(Text { acknowledged: Some(version), busy: false, .. }) = self.texts.get(key) {
                return Some((key, *version));
            }
        }
        None
    }

    /// The request as it is sent.
    #[must_use]
    pub fn request(&self, op: &Op) -> Vec<Vec<u8>> {
        let words: Vec<String> = match *op {
            Op::Set { key, version } => vec!["SET".into(), self.text_key(key), self.value(key, version)],
            Op::Mset { first } => {
                let pairs = (first..first + GROUP).flat_map(|key| [self.text_key(key), self.value(key, 1)]);
                std::iter::once("MSET".into()).chain(pairs).collect()
            }
            Op::Incr => vec!["INCR".into(), self.key('c')],
            Op::Push(number) => vec!["LPUSH".into(), self.key('l'), self.element(number)],
            Op::Add(number) => vec!["SADD".into(), self.key('m'), self.element(number)],
            Op::Get { key } => vec!["GET".into(), self.text_key(key)],
        };
        words.into_iter().map(String::into_bytes).collect()
    }

    /// The server answered. True: a write was acknowledged.
    pub fn answered(&mut self, op: &Op, reply: &Reply) -> bool {
        if let Reply::Error(words) = reply {
            if !matches!(op, Op::Get { .. }) {
                self.report.refused += 1;
                self.open(op);
            }
            // To be refused for want of memory is the server's right. Anything else is not in this load.
            if !words.starts_with("OOM") {
                self.contradict(format!("{op:?} was answered {words:?}"));
            }
            return false;
        }
        match (op, reply) {
            (Op::Get { key }, Reply::Bulk(found)) => {
                self.report.reads += 1;
                let Text { acknowledged, busy, .. } = self.texts[*key];
                // In a pipeline a write of the same key may have gone out before this read.
                let right = acknowledged.is_some_and(|v| found.as_deref() == Some(self.value(*key, v).as_bytes()));
                if !right && !busy {
                    let found = shown(found.as_deref());
                    self.contradict(format!(
                        "read {found} where version {acknowledged:?} of string {key} was acknowledged"
                    ));
                }
                return false;
            }
            (Op::Set { key, version }, Reply::Status(_)) => {
                self.texts[*key] = Text { acknowledged: Some(*version), open: None, busy: false };
            }
            (Op::Mset { first }, Reply::Status(_)) => {
                self.texts[*first..first + GROUP].fill(Text { acknowledged: Some(1), open: None, busy: false });
            }
            (Op::Incr, Reply::Integer(sum)) => {
                self.counted += 1;
                self.count_open -= 1;
                // Those before this one, at least; and no more than were ever sent.
                let most = self.counted + self.count_open;
                if !u64::try_from(*sum).is_ok_and(|sum| (self.counted..=most).contains(&sum)) {
                    let counted = self.counted;
                    self.contradict(format!("INCR answered {sum}, possible was {counted} to {most}"));
                }
            }
            (Op::Push(number), Reply::Integer(_)) => self.items[*number] = End::Acknowledged,
            (Op::Add(number), Reply::Integer(added)) => {
                self.members[*number] = End::Acknowledged;
                if *added != 1 {
                    self.contradict(format!("SADD of a new member answered {added}"));
                }
            }
            (op, reply) => {
                self.contradict(format!("{op:?} was answered {reply:?}"));
                self.open(op);
                return false;
            }
        }
        self.report.acknowledged += 1;
        true
    }

    /// The connection went away before the answer came.
    pub fn unanswered(&mut self, op: &Op) {
        if !matches!(op, Op::Get { .. }) {
            self.report.unknown += 1;
            self.open(op);
        }
    }

    fn open(&mut self, op: &Op) {
        match *op {
            Op::Set { key, version } => self.texts[key].open = Some(version),
            Op::Mset { first } => {
                self.texts[first..first + GROUP].iter_mut().for_each(|t| t.open = Some(1));
                self.open_groups.push(first);
            }
            Op::Push(number) => self.items[number] = End::Open,
            Op::Add(number) => self.members[number] = End::Open,
            Op::Incr | Op::Get { .. } => {}
        }
    }

    fn contradict(&mut self, words: String) {
        self.report.contradictions += 1;
        self.report.complain(format!("{}: {words}", self.prefix));
    }

    fn lose(&mut self, writes: u64, words: String) {
        self.report.lost += writes;
        self.report.complain(format!("{}: {words}", self.prefix));
    }

    /// Compares everything with what was found, and gives the account.
    #[must_use]
    pub fn judge(mut self, found: &Found) -> LoadReport {
        self.judge_texts(found);
        self.judge_counter(found);
        self.judge_list(found);
        self.judge_set(found);
        self.report
    }

    fn judge_texts(&mut self, found: &Found) {
        for key in 0..self.texts.len() {
            let Text { acknowledged, open, .. } = self.texts[key];
            let there = found.texts.get(key).and_then(Option::as_deref);
            let is = |version: Option<u64>| version.map(|v| self.value(key, v)).as_deref().map(str::as_bytes) == there;
            if is(acknowledged) || (open.is_some() && is(open)) {
                continue;
            }
            let words = format!("string {key} holds {}, acknowledged was version {acknowledged:?}", shown(there));
            match acknowledged {
                Some(_) => self.lose(1, words),
                None => self.contradict(words),
            }
        }
        for first in std::mem::take(&mut self.open_groups) {
            let there = (first..first + GROUP).filter(|k| found.texts.get(*k).is_some_and(Option::is_some)).count();
            // A refused one may be half there; it was answered, and counted as refused.
            if there != 0 && there != GROUP && self.report.refused == 0 {
                self.contradict(format!("{there} of the {GROUP} strings of one MSET are there"));
            }
        }
    }

    fn judge_counter(&mut self, found: &Found) {
        let text = found.counter.as_deref().unwrap_or(b"0");
        let Some(sum) = std::str::from_utf8(text).ok().and_then(|t| t.parse::<u64>().ok()) else {
            let shown = shown(Some(text));
            return self.lose(self.counted, format!("the counter holds {shown}"));
        };
        let (least, most) = (self.counted, self.counted + self.count_open);
        if sum < least {
            self.lose(least - sum, format!("the counter holds {sum}, acknowledged were {least}"));
        } else if sum > most {
            self.contradict(format!("the counter holds {sum}, at most {most} were ever sent"));
        }
    }

    fn judge_list(&mut self, found: &Found) {
        let mut numbers: HashMap<String, usize> = (0..self.items.len()).map(|n| (self.element(n), n)).collect();
        let mut newest = None;
        // From the back: in the order in which they were pushed.
        for item in found.list.iter().rev() {
            let Some(number) = std::str::from_utf8(item).ok().and_then(|text| numbers.remove(text)) else {
                self.contradict(format!(
                    "the list holds {}, which was never pushed or is there twice",
                    shown(Some(item))
                ));
                continue;
            };
            // One without an answer may have been executed late.
            if self.items[number] == End::Acknowledged {
                if newest.is_some_and(|newest| newest > number) {
                    self.contradict(format!("item {number} of the list lies behind a newer one"));
                }
                newest = newest.max(Some(number));
            }
        }
        let missing = numbers.into_values().filter(|n| self.items[*n] == End::Acknowledged).count() as u64;
        if missing > 0 {
            self.lose(missing, format!("{missing} acknowledged items are not in the list of {}", found.list.len()));
        }
    }

    fn judge_set(&mut self, found: &Found) {
        let mut numbers: HashMap<String, usize> = (0..self.members.len()).map(|n| (self.element(n), n)).collect();
        for member in &found.set {
            if std::str::from_utf8(member).ok().and_then(|text| numbers.remove(text)).is_none() {
                self.contradict(format!("the set holds {}, which was never added", shown(Some(member))));
            }
        }
        let missing = numbers.into_values().filter(|n| self.members[*n] == End::Acknowledged).count() as u64;
        if missing > 0 {
            self.lose(missing, format!("{missing} acknowledged members are not in the set of {}", found.set.len()));
        }
    }
}

fn shown(bytes: Option<&[u8]>) -> String {
    bytes.map_or("nothing".to_owned(), |b| format!("{:?}", String::from_utf8_lossy(&b[..b.len().min(48)])))
}
