//! RESP2: bytes → requests, replies → bytes. Everything a stranger may send is bounded here, before anything is kept.
//!
//! The parser is resumable: bytes that came are looked at once, however small the pieces they come in.

use std::ops::Range;

/// What a client may send at most.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// One line: an inline command or a length.
    pub line: usize,
    /// One argument.
    pub bulk: usize,
    /// One request, framing included.
    pub request: usize,
    /// Arguments in one request.
    pub args: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self { line: 4096, bulk: 512 << 10, request: 1 << 20, args: 4096 }
    }
}

/// Why a client is told off and its connection closed; the words are redis's, so that clients recognise them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ProtocolError {
    /// A line without an end.
    #[error("Protocol error: too big inline request")]
    LineTooLong,
    /// The number behind `*`.
    #[error("Protocol error: invalid multibulk length")]
    ArgCount,
    /// The number behind `$`.
    #[error("Protocol error: invalid bulk length")]
    BulkLength,
    /// Something else where `$` belongs.
    #[error("Protocol error: expected '$', got '{}'", char::from(*.0).escape_default())]
    NoDollar(u8),
    /// An argument that does not end where it said.
    #[error("Protocol error: argument is not followed by a line end")]
    NoLineEnd,
    /// Each argument is within its limit, all of them together are not.
    #[error("Protocol error: request of more than {0} bytes")]
    RequestTooLong(usize),
    /// An inline command with quotes, which this server does not unquote.
    #[error("Protocol error: quotes in an inline request are not supported")]
    Quotes,
}

/// Where in a request the parser is. One per connection; holds positions relative to the request's first byte.
#[derive(Debug, Default)]
pub struct Parser {
    /// The arguments of the request that [`Parser::parse`] has completed.
    pub args: Vec<Range<usize>>,
    at: usize,
    /// How far the current line was searched for its end.
    searched: usize,
    /// Arguments still to come; `None` before the request's first line.
    awaited: Option<usize>,
    /// The length of the argument under way.
    bulk: Option<usize>,
}

impl Parser {
    /// Looks for a whole request at the beginning of `input`. `Some(n)`: it takes `n` bytes and its arguments are in `args`
    /// (none for an empty line). `None`: call again with more bytes behind the same ones.
    ///
    /// # Errors
    /// Input that cannot become a request. Nothing behind it can be understood.
    pub fn parse(&mut self, input: &[u8], limits: &Limits) -> Result<Option<usize>, ProtocolError> {
        if self.awaited.is_none() {
            // The previous request's.
            self.args.clear();
            (self.at, self.bulk) = (0, None);
            let Some(line) = self.line(input, limits)? else { return Ok(None) };
            match input.get(line.clone()) {
                Some([b'*', digits @ ..]) => match number(digits) {
                    Some(count) if count <= 0 => self.awaited = Some(0),
                    Some(count) if usize::try_from(count).is_ok_and(|c| c <= limits.args) => {
                        self.awaited = usize::try_from(count).ok();
                    }
                    _ => return Err(ProtocolError::ArgCount),
                },
                Some(words) => {
                    self.inline(words, line.start)?;
                    return Ok(Some(std::mem::take(&mut self.at)));
                }
                None => return Ok(None),
            }
        }
        while let Some(left @ 1..) = self.awaited {
            let len = match self.bulk {
                Some(len) => len,
                None => {
                    let Some(line) = self.line(input, limits)? else { return Ok(None) };
                    let len = match &input[line] {
                        [b'$', digits @ ..] => number(digits).and_then(|n| usize::try_from(n).ok()),
                        [other, ..] => return Err(ProtocolError::NoDollar(*other)),
                        [] => return Err(ProtocolError::NoDollar(b'\r')),
                    };
                    let len = len.filter(|len| *len <= limits.bulk).ok_or(ProtocolError::BulkLength)?;
                    if self.at + len + 2 > limits.request {
                        return Err(ProtocolError::RequestTooLong(limits.request));
                    }
                    *self.bulk.insert(len)
                }
            };
            let Some(rest) = input.get(self.at..self.at + len + 2) else { return Ok(None) };
            if &rest[len..] != b"\r\n" {
                return Err(ProtocolError::NoLineEnd);
            }
            self.args.push(self.at..self.at + len);
            self.at += len + 2;
            self.searched = self.at;
            (self.awaited, self.bulk) = (Some(left - 1), None);
        }
        self.awaited = None;
        self.searched = 0;
        Ok(Some(std::mem::take(&mut self.at)))
    }

    /// The line at `at`, without its end; moves behind it.
    fn line(&mut self, input: &[u8], limits: &Limits) -> Result<Option<Range<usize>>, ProtocolError> {
        let until = input.len().min(self.at + limits.line);
        let window = input.get(self.searched..until).unwrap_or_default();
        let Some(end) = window.iter().position(|b| *b == b'\n') else {
            self.searched = until;
            if until == self.at + limits.line {
                return Err(ProtocolError::LineTooLong);
            }
            return Ok(None);
        };
        let end = self.searched + end;
        let line = self.at..if end > self.at && input[end - 1] == b'\r' { end - 1 } else { end };
        self.at = end + 1;
        self.searched = self.at;
        Ok(Some(line))
    }

    fn inline(&mut self, words: &[u8], start: usize) -> Result<(), ProtocolError> {
        if words.iter().any(|b| matches!(b, b'"' | b'\'')) {
            return Err(ProtocolError::Quotes);
        }
        let mut from = 0;
        for word in words.split(u8::is_ascii_whitespace) {
            if !word.is_empty() {
                self.args.push(start + from..start + from + word.len());
            }
            from += word.len() + 1;
        }
        self.searched = 0;
        Ok(())
    }
}

/// A decimal number as RESP and redis write it: an optional minus, digits, nothing else.
#[must_use]
pub fn number(digits: &[u8]) -> Option<i64> {
    let (plain, negative) = match digits {
        [b'-', rest @ ..] => (rest, true),
        rest => (rest, false),
    };
    if plain.is_empty() || plain.len() > 19 || !plain.iter().all(u8::is_ascii_digit) {
        return None;
    }
    // Summed up below zero, where i64::MIN has room.
    let below = plain.iter().try_fold(0i64, |sum, d| sum.checked_mul(10)?.checked_sub(i64::from(d - b'0')))?;
    if negative { Some(below) } else { below.checked_neg() }
}

/// Replies, appended to a connection's output.
pub trait Reply {
    /// `+OK`
    fn status(&mut self, words: &str);
    /// `-ERR ...`; a line end within would end the reply, so it becomes a space.
    fn error(&mut self, words: &str);
    /// `:1`
    fn integer(&mut self, value: i64);
    /// `$3` and the bytes.
    fn bulk(&mut self, value: &[u8]);
    /// `$-1`
    fn nil(&mut self);
    /// `*2`, to be followed by so many replies.
    fn array(&mut self, len: usize);
}

impl Reply for Vec<u8> {
    fn status(&mut self, words: &str) {
        self.push(b'+');
        self.extend_from_slice(words.as_bytes());
        self.extend_from_slice(b"\r\n");
    }

    fn error(&mut self, words: &str) {
        self.push(b'-');
        self.extend(words.bytes().map(|b| if matches!(b, b'\r' | b'\n') { b' ' } else { b }));
        self.extend_from_slice(b"\r\n");
    }

    fn integer(&mut self, value: i64) {
        self.push(b':');
        if value < 0 {
            self.push(b'-');
        }
        digits(self, value.unsigned_abs());
        self.extend_from_slice(b"\r\n");
    }

    fn bulk(&mut self, value: &[u8]) {
        self.push(b'$');
        digits(self, value.len() as u64);
        self.extend_from_slice(b"\r\n");
        self.extend_from_slice(value);
        self.extend_from_slice(b"\r\n");
    }

    fn nil(&mut self) {
        self.extend_from_slice(b"$-1\r\n");
    }

    fn array(&mut self, len: usize) {
        self.push(b'*');
        digits(self, len as u64);
        self.extend_from_slice(b"\r\n");
    }
}

/// Appends a number in decimal, without allocating.
pub(super) fn digits(out: &mut Vec<u8>, mut value: u64) {
    let mut text = [0; 20];
    let mut from = text.len();
    loop {
        from -= 1;
        // Always below ten.
        text[from] = b'0' + (value % 10) as u8;
        value /= 10;
        if value == 0 {
            break;
        }
    }
    out.extend_from_slice(&text[from..]);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn requests(input: &[u8], piece: usize, limits: &Limits) -> Result<Vec<Vec<Vec<u8>>>, ProtocolError> {
        let (mut parser, mut found, mut start, mut end) = (Parser::default(), Vec::new(), 0, 0);
        while end < input.len() {
            end = (end + piece).min(input.len());
            while let Some(len) = parser.parse(&input[start..end], limits)? {
                found.push(parser.args.iter().map(|r| input[start..][r.clone()].to_vec()).collect());
                start += len;
            }
        }
        Ok(found)
    }

    fn words(input: &[u8]) -> Vec<String> {
        let found = requests(input, usize::MAX >> 1, &Limits::default()).expect("understood");
        found
            .iter()
            .map(|r| r.iter().map(|a| String::from_utf8_lossy(a).into_owned()).collect::<Vec<_>>().join("|"))
            .collect()
    }

    #[test]
    fn both_forms_are_understood() {
        assert_eq!(words(b"PING\r\n"), ["PING"]);
        assert_eq!(words(b"  SET  a\tb \n\r\nGET a\r\n"), ["SET|a|b", "", "GET|a"]);
        assert_eq!(
            words(b"*2\r\n$3\r\nGET\r\n$0\r\n\r\n*0\r\n*-1\r\n*1\r\n$4\r\na\r\nb\r\n"),
            ["GET|", "", "", "a\r\nb"]
        );
    }

    #[test]
    fn each_hostile_form_has_its_answer() {
        let limits = Limits { line: 24, bulk: 8, request: 40, args: 3 };
        let refused = |input: &[u8]| requests(input, 1, &limits).expect_err("refused").to_string();
        assert_eq!(refused(b"*4\r\n"), "Protocol error: invalid multibulk length");
        assert_eq!(refused(b"*99999999999999999999\r\n"), "Protocol error: invalid multibulk length");
        assert_eq!(refused(b"*x\r\n"), "Protocol error: invalid multibulk length");
        assert_eq!(refused(b"*1\r\n$9\r\n"), "Protocol error: invalid bulk length");
        assert_eq!(refused(b"*1\r\n$-1\r\n"), "Protocol error: invalid bulk length");
        assert_eq!(refused(b"*1\r\n:1\r\n"), "Protocol error: expected '$', got ':'");
        assert_eq!(refused(b"*1\r\n$1\r\nabc"), "Protocol error: argument is not followed by a line end");
        assert_eq!(
            refused(b"*3\r\n$8\r\n12345678\r\n$8\r\n12345678\r\n$8\r\n"),
            "Protocol error: request of more than 40 bytes"
        );
        assert_eq!(refused(&[b'x'; 25]), "Protocol error: too big inline request");
        assert_eq!(refused(b"SET a \"b\"\r\n"), "Protocol error: quotes in an inline request are not supported");
    }

    #[test]
    fn numbers_are_exact() {
        for value in [0, 1, -1, i64::MAX, i64::MIN] {
            assert_eq!(number(value.to_string().as_bytes()), Some(value));
            let mut out = Vec::new();
            out.integer(value);
            assert_eq!(out, format!(":{value}\r\n").as_bytes());
        }
        for bad in ["", "-", "+1", "1 ", "9223372036854775808", "-9223372036854775809", "0x1"] {
            assert_eq!(number(bad.as_bytes()), None, "{bad}");
        }
    }

    proptest! {
        #[test]
        fn any_request_survives_any_fragmentation(
            args in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..20), 1..6),
            times in 1usize..4,
            piece in 1usize..30,
        ) {
            let mut input = Vec::new();
            for _ in 0..times {
                input.array(args.len());
                args.iter().for_each(|a| input.bulk(a));
            }
            prop_assert_eq!(requests(&input, piece, &Limits::default()).expect("understood"), vec![args; times]);
        }

        #[test]
        fn hostile_bytes_mean_the_same_however_they_come(input in proptest::collection::vec(prop_oneof![
            Just(b'*'), Just(b'$'), Just(b'\r'), Just(b'\n'), Just(b'1'), Just(b'2'), Just(b'-'), any::<u8>()], 0..200), piece in 1usize..9) {
            let limits = Limits { line: 16, bulk: 8, request: 40, args: 3 };
            prop_assert_eq!(requests(&input, piece, &limits), requests(&input, 1, &limits));
        }
    }
}
