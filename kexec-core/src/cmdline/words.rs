//! A command line in words, split as Linux splits it (`next_arg()` of lib/cmdline.c, `parse_args()` of kernel/params.c).

/// One word.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Word<'a> {
    /// As it stands in the line, quotes and all.
    pub raw: &'a str,
    /// What is before the first `=`, without quotes.
    pub param: &'a str,
    /// What is behind it, without quotes; nothing where there is no `=`.
    pub value: Option<&'a str>,
}

impl Word<'_> {
    /// Whether the kernel takes this word for the parameter `name`: it makes no difference between `-` and `_`.
    pub fn is(&self, name: &str) -> bool {
        same(self.param, name)
    }

    /// The parameter's name, each `-` as `_`: equal for words that set the same thing.
    pub fn key(&self) -> String {
        self.param.replace('-', "_")
    }

    /// The value, empty where there is none.
    pub fn value(&self) -> &str {
        self.value.unwrap_or_default()
    }
}

/// Two names of one parameter.
pub(super) fn same(one: &str, other: &str) -> bool {
    let plain = |byte: u8| if byte == b'-' { b'_' } else { byte };
    one.len() == other.len() && one.bytes().zip(other.bytes()).all(|(a, b)| plain(a) == plain(b))
}

/// A line, split.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Line<'a> {
    /// What the kernel reads, and where it stands in the line.
    pub kernel: &'a str,
    /// Its words.
    pub words: Vec<Word<'a>>,
    /// What is behind the word `--`: for the first program.
    pub init: Option<&'a str>,
}

impl<'a> Line<'a> {
    /// Splits a line. Every line can be split: quotes that are never closed go to its end.
    pub fn parse(line: &'a str) -> Line<'a> {
        let mut words = Vec::new();
        let mut at = 0;
        while let Some((word, start, end)) = next(line, at) {
            if word.value.is_none() && word.param == "--" {
                return Line { kernel: &line[..start], words, init: Some(line[end..].trim_matches(blank)) };
            }
            words.push(word);
            at = end;
        }
        Line { kernel: line, words, init: None }
    }

    /// Whether some word sets this parameter.
    pub fn has(&self, name: &str) -> bool {
        self.words.iter().any(|word| word.is(name))
    }

    /// The last word that sets this parameter; for most parameters it is the one that counts.
    pub fn last(&self, name: &str) -> Option<&Word<'a>> {
        self.words.iter().rev().find(|word| word.is(name))
    }
}

/// The kernel's `isspace()`, but for the byte 0xa0, which [`super::complete`] refuses.
fn blank(c: char) -> bool {
    matches!(c, '\t'..='\r' | ' ')
}

/// The word that starts at or behind `at`, with its place.
fn next(line: &str, at: usize) -> Option<(Word<'_>, usize, usize)> {
    let bytes = line.as_bytes();
    let is_blank = |&byte: &u8| blank(char::from(byte));
    let start = at + bytes[at..].iter().position(|byte| !is_blank(byte))?;
    let quoted = bytes[start] == b'"';
    let from = start + usize::from(quoted);
    let mut in_quotes = quoted;
    let mut end = from;
    let mut equals = None;
    while end < bytes.len() && (in_quotes || !is_blank(&bytes[end])) {
        // An `=` at the very beginning belongs to the name.
        if bytes[end] == b'=' && equals.is_none() && end > from {
            equals = Some(end);
        }
        in_quotes ^= bytes[end] == b'"';
        end += 1;
    }
    let mut close = end;
    let strip = |close: &mut usize| {
        if *close > from && *close == end && bytes[*close - 1] == b'"' {
            *close -= 1;
        }
    };
    let value_at = equals.map(|equals| equals + 1);
    let value_at = match value_at {
        Some(value) if bytes.get(value) == Some(&b'"') && value < end => {
            strip(&mut close);
            Some(value + 1)
        }
        other => other,
    };
    if quoted {
        strip(&mut close);
    }
    let param = &line[from..equals.unwrap_or(close)];
    let value = value_at.map(|value| line.get(value..close).unwrap_or_default());
    Some((Word { raw: &line[start..end], param, value }, start, end))
}

/// A size as the kernel's `memparse()` reads it, to its end: a number, and perhaps one of K, M, G, T, P, E.
pub(super) fn size(text: &str) -> Option<u64> {
    let (digits, shift) = match text.as_bytes().last()?.to_ascii_uppercase() {
        b'K' => (&text[..text.len() - 1], 10),
        b'M' => (&text[..text.len() - 1], 20),
        b'G' => (&text[..text.len() - 1], 30),
        b'T' => (&text[..text.len() - 1], 40),
        b'P' => (&text[..text.len() - 1], 50),
        b'E' => (&text[..text.len() - 1], 60),
        _ => (text, 0),
    };
    let number: u64 = match digits.strip_prefix("0x") {
        Some(hex) => u64::from_str_radix(hex, 16).ok()?,
        None => digits.parse().ok()?,
    };
    number.checked_mul(1 << shift)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn split(line: &str) -> Vec<(&str, Option<&str>)> {
        Line::parse(line).words.iter().map(|word| (word.param, word.value)).collect()
    }

    /// Each line of this table was given to the kernel's own `next_arg()` (lib/cmdline.c of 7.3, compiled for user space).
    #[test]
    fn lines_are_split_as_linux_splits_them() {
        type Words<'a> = &'a [(&'a str, Option<&'a str>)];
        let table: &[(&str, Words<'_>)] = &[
            ("", &[]),
            (" \t a  b=c ", &[("a", None), ("b", Some("c"))]),
            ("\"maxcpus=4\"", &[("maxcpus", Some("4"))]),
            ("maxcpus=\"4\"", &[("maxcpus", Some("4"))]),
            ("\"maxcpus\"=4", &[("maxcpus\"", Some("4"))]),
            ("dyndbg=\"file a.c +p; pci=on\" quiet", &[("dyndbg", Some("file a.c +p; pci=on")), ("quiet", None)]),
            ("\"a b\"", &[("a b", None)]),
            ("a=\"b", &[("a", Some("b"))]),
            ("a=b\"c d\"e f", &[("a", Some("b\"c d\"e")), ("f", None)]),
            ("=x=y", &[("=x", Some("y"))]),
            ("a=", &[("a", Some(""))]),
            ("a=\"\"", &[("a", Some(""))]),
            ("\"\"", &[("", None)]),
            ("a==b", &[("a", Some("=b"))]),
        ];
        for (line, expected) in table {
            assert_eq!(split(line), *expected, "{line:?}");
        }
    }

    #[test]
    fn two_dashes_end_the_kernels_part() {
        for line in ["quiet -- single maxcpus=4", "quiet \"--\" single maxcpus=4"] {
            let parsed = Line::parse(line);
            assert_eq!((parsed.kernel, parsed.init), ("quiet ", Some("single maxcpus=4")), "{line}");
            assert_eq!(parsed.words.len(), 1);
        }
        assert_eq!(Line::parse("--x").init, None);
        assert_eq!(Line::parse("a --").init, Some(""));
    }

    #[test]
    fn dashes_are_underscores() {
        let line = Line::parse("nohz-full=1 kvm-intel.x=1");
        assert!(line.has("nohz_full") && line.has("kvm_intel.x") && !line.has("nohz"));
        assert_eq!(line.words[1].key(), "kvm_intel.x");
    }

    #[test]
    fn sizes() {
        let sizes = [("4096", Some(4096)), ("0x10", Some(16)), ("2M", Some(2 << 20)), ("1g", Some(1 << 30))];
        for (text, bytes) in sizes.into_iter().chain([("", None), ("M", None), ("16E", None), ("-1", None)]) {
            assert_eq!(size(text), bytes, "{text}");
        }
    }

    proptest! {
        #[test]
        fn any_text_can_be_split(line in "[a\"= \\-é]{0,30}") {
            let parsed = Line::parse(&line);
            for word in parsed.words {
                prop_assert!(word.raw.contains(word.param) && word.raw.contains(word.value()));
            }
        }
    }
}
