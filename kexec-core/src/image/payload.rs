//! What only the kernel inside the image knows.
//!
//! `/boot/config-RELEASE` may be missing or belong to another build; the image is the truth. So the compressed vmlinux
//! is unpacked piece by piece (never as a whole: 60 MB) and searched for string literals that exist only with
//! the feature in question. It stops as soon as every question has its answer, or, for those that need no more, behind
//! the first loadable segment: code and read-only data, about half of a vmlinux, and the place of every string literal.

use std::io::Read;

use memchr::memmem::Finder;
use object::LittleEndian;
use object::elf::{FileHeader64, PT_LOAD};
use object::read::elf::{FileHeader, ProgramHeader};
use serde::{Deserialize, Serialize};

use super::BzImage;
use crate::compression::Compression;

/// Largest vmlinux that is unpacked. Debian's are 57 to 63 MB; with debug symbols left in they reach several hundred.
pub const MAX_UNPACKED: u64 = 1 << 30;
const PIECE: usize = 256 << 10;

/// Why an image could not be looked into.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PayloadError {
    /// A compression that we cannot read.
    #[error(
        "the kernel is compressed with {method}, which cannot be looked into: any other compression can (CONFIG_KERNEL_ZSTD, _XZ, _GZIP)"
    )]
    Compression {
        /// Which, by its magic number.
        method: &'static str,
    },
    /// Not a compressed kernel.
    #[error("the kernel's payload of {len} bytes has no known compression: it starts with {start}")]
    Unknown {
        /// Its length.
        len: usize,
        /// Its first bytes, in hex.
        start: String,
    },
    /// The compressed data is damaged.
    #[error("the kernel's payload is damaged after {unpacked} bytes: {reason}")]
    Damaged {
        /// How much came out before.
        unpacked: u64,
        /// What the decoder said.
        reason: String,
    },
    /// It grows beyond all measure.
    #[error("the kernel unpacks to more than {max} bytes")]
    TooLarge {
        /// Limit.
        max: u64,
    },
}

/// One thing to look for.
#[derive(Debug, Clone, Copy)]
pub struct Question<'a> {
    /// What to look for.
    pub text: &'a [u8],
    /// How many bytes behind it belong to the answer; fewer at the end of the kernel.
    pub tail: usize,
    /// Judges those bytes; the search goes on when it says no.
    pub accept: fn(tail: &[u8]) -> bool,
    /// How far to look.
    pub depth: Depth,
}

/// How far a text is looked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Depth {
    /// In code and read-only data. For texts that most kernels do not have.
    Constants,
    /// Everywhere. For texts whose absence is a refusal, which should not hang on how a vmlinux is laid out.
    Everything,
}

impl<'a> Question<'a> {
    /// Is it there at all?
    pub fn contains(text: &'a [u8]) -> Question<'a> {
        Question { text, tail: 0, accept: |_| true, depth: Depth::Everything }
    }
}

/// Searches the kernel for all questions at once. An answer is the text with its tail.
pub fn search(image: &BzImage<'_>, questions: &[Question<'_>]) -> Result<Vec<Option<Vec<u8>>>, PayloadError> {
    search_stream(unpack(&mut image.payload())?, questions, MAX_UNPACKED)
}

/// Whether the kernel contains this text.
pub fn contains(image: &BzImage<'_>, text: &[u8]) -> Result<bool, PayloadError> {
    Ok(search(image, &[Question::contains(text)])?[0].is_some())
}

/// The vmlinux in a payload, as a stream.
fn unpack<'a>(payload: &'a mut &[u8]) -> Result<Box<dyn Read + 'a>, PayloadError> {
    let Some(compression) = Compression::of(payload) else {
        // CONFIG_KERNEL_UNCOMPRESSED
        if payload.starts_with(b"\x7fELF") {
            return Ok(Box::new(payload));
        }
        let start = payload.iter().take(4).map(|b| format!("{b:02x}")).collect();
        return Err(PayloadError::Unknown { len: payload.len(), start });
    };
    if compression == Compression::Lz4 {
        // The kernel build puts the length behind the data (scripts/Makefile.lib, size_append), and in this format only that says where
        // they end.
        *payload = payload.len().checked_sub(4).map_or(&[], |end| &payload[..end]);
    }
    match compression.unpack(payload) {
        Ok(Some(stream)) => Ok(stream),
        Ok(None) => Err(PayloadError::Compression { method: compression.name() }),
        Err(error) => Err(PayloadError::Damaged { unpacked: 0, reason: error.to_string() }),
    }
}

/// Keeps the end of each piece, so that a text across the border of two pieces is found.
fn search_stream(
    mut stream: impl Read,
    questions: &[Question<'_>],
    max: u64,
) -> Result<Vec<Option<Vec<u8>>>, PayloadError> {
    let finders: Vec<Finder<'_>> = questions.iter().map(|q| Finder::new(q.text)).collect();
    let mut answers: Vec<Option<Vec<u8>>> = vec![None; questions.len()];
    let longest = questions.iter().map(|q| q.text.len() + q.tail).max().unwrap_or(0);
    let mut window: Vec<u8> = Vec::with_capacity(longest + PIECE);
    let mut unpacked = 0u64;
    let mut constants_end = u64::MAX;
    let mut more = true;
    let open = |answers: &[Option<Vec<u8>>], beyond_constants: bool| {
        let mut pairs = questions.iter().zip(answers);
        pairs.any(|(question, answer)| answer.is_none() && (!beyond_constants || question.depth == Depth::Everything))
    };
    while more && open(&answers, unpacked >= constants_end) {
        let kept = window.len();
        window.resize(kept + PIECE, 0);
        let mut filled = kept;
        while filled < window.len() {
            match stream.read(&mut window[filled..]) {
                Ok(0) => {
                    more = false;
                    break;
                }
                Ok(n) => filled += n,
                Err(error) => return Err(PayloadError::Damaged { unpacked, reason: error.to_string() }),
            }
        }
        unpacked += (filled - kept) as u64;
        if unpacked > max {
            return Err(PayloadError::TooLarge { max });
        }
        window.truncate(filled);
        if unpacked == filled as u64 {
            // the first piece
            constants_end = constants_end_of(&window);
        }
        for ((question, finder), answer) in questions.iter().zip(&finders).zip(&mut answers) {
            if answer.is_some() {
                continue;
            }
            *answer = finder.find_iter(&window).find_map(|at| {
                let tail_at = at + question.text.len();
                let end = (tail_at + question.tail).min(window.len());
                // An incomplete tail is judged with the next piece, unless there is none.
                let complete = end == tail_at + question.tail || !more;
                (complete && (question.accept)(&window[tail_at..end])).then(|| window[at..end].to_vec())
            });
        }
        let keep = longest.saturating_sub(1).min(window.len());
        window.drain(..window.len() - keep);
    }
    Ok(answers)
}

/// Where the first loadable segment ends in the file, from the file's beginning; no end where that is no ELF file.
fn constants_end_of(start: &[u8]) -> u64 {
    let segments = FileHeader64::<LittleEndian>::parse(start).and_then(|h| h.program_headers(LittleEndian, start));
    segments
        .ok()
        .and_then(|segments| segments.iter().find(|s| s.p_type(LittleEndian) == PT_LOAD))
        .and_then(|s| s.p_offset(LittleEndian).checked_add(s.p_filesz(LittleEndian)))
        .unwrap_or(u64::MAX)
}

/// What an update has to know of a kernel. Costs seconds where the machine is emulated: ask once for each image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KernelFacts {
    /// It can take CPUs through the ACPI mailbox **and** give them back through the reset vector: Linux 6.10 or newer with
    /// `CONFIG_ACPI_MADT_WAKEUP`.
    pub mailbox_reset_vector: bool,
    /// The KHO format it reads ("kho-v4", in newer trees with its parts: "kho-v4;radix-v1;vmalloc-v1"), if it was built with `CONFIG_KEXEC_HANDOVER`.
    pub kho: Option<String>,
    /// The format of the Live Update Orchestrator's state ("luo-v5"), if it was built with `CONFIG_LIVEUPDATE`.
    pub luo: Option<String>,
    /// The format of memfds in it ("memfd-v2"), if it was built with `CONFIG_LIVEUPDATE_MEMFD`.
    pub memfd: Option<String>,
}

impl KernelFacts {
    /// Looks into the image.
    pub fn of(image: &BzImage<'_>) -> Result<KernelFacts, PayloadError> {
        // As long as the longest field for such a name (LIVEUPDATE_HNDL_COMPAT_LENGTH).
        const NAME: usize = 48;
        let format = |text| Question { text, tail: NAME, accept: is_version_and_nul, depth: Depth::Constants };
        let questions = [
            // acpi_parse_mp_wake(): printed when the version 1 structure cannot be set up.
            Question::contains(b"Failed to setup MADT reset vector"),
            format(b"kho-v"),
            format(b"luo-v"),
        ];
        let found = <[_; 3]>::try_from(search(image, &questions)?).expect("one answer for each question");
        let [reset_vector, kho, luo] = found;
        // It lies in a handler's structure, so in writable data (mm/memfd_luo.c), behind all that a kernel without LUO is searched for.
        let memfd = match &luo {
            Some(_) => search(image, &[Question { depth: Depth::Everything, ..format(b"memfd-v") }])?.pop().flatten(),
            None => None,
        };
        let text = |answer: Option<Vec<u8>>| {
            answer.map(|text| {
                let text: Vec<u8> = text.into_iter().take_while(|&b| b != 0).collect();
                String::from_utf8_lossy(&text).into_owned()
            })
        };
        Ok(KernelFacts {
            mailbox_reset_vector: reset_vector.is_some(),
            kho: text(kho),
            luo: text(luo),
            memfd: text(memfd),
        })
    }
}

/// A number, then the NUL of the string literal, maybe with the names of parts between them: "kho-v4", "kho-v4;radix-v1", and not
/// "kho-vmalloc". A name with a dash ("luo-v4-block-v1", of patches that were never released) is one too: of a format that nobody speaks.
fn is_version_and_nul(tail: &[u8]) -> bool {
    let digits = tail.iter().take_while(|b| b.is_ascii_digit()).count();
    let Some(end) = tail.iter().position(|b| *b == 0) else { return false };
    let parts = &tail[digits.min(end)..end];
    let printable = |b: &u8| b.is_ascii_alphanumeric() || b"-._;".contains(b);
    (1..=4).contains(&digits) && (parts.is_empty() || b"-;".contains(&parts[0])) && parts.iter().all(printable)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Gives out its bytes in pieces of the given sizes.
    struct Drip<'a>(&'a [u8], Vec<usize>);

    impl Read for Drip<'_> {
        fn read(&mut self, into: &mut [u8]) -> std::io::Result<usize> {
            let n = self.1.pop().unwrap_or(usize::MAX).clamp(1, into.len().max(1)).min(self.0.len()).min(into.len());
            into[..n].copy_from_slice(&self.0[..n]);
            self.0 = &self.0[n..];
            Ok(n)
        }
    }

    #[test]
    fn finds_text_across_pieces_and_judges_the_tail() {
        let mut kernel = vec![b'x'; 2 * PIECE + 100];
        kernel[PIECE - 3..PIECE + 3].copy_from_slice(b"needle");
        kernel[10..15].copy_from_slice(b"kho-v");
        let late = 2 * PIECE - 6;
        kernel[late..late + 7].copy_from_slice(b"kho-v4\0");
        let questions = [
            Question::contains(b"needle"),
            Question { tail: 4, accept: is_version_and_nul, ..Question::contains(b"kho-v") },
            Question::contains(b"absent"),
        ];
        let answers = search_stream(kernel.as_slice(), &questions, MAX_UNPACKED).unwrap();
        assert_eq!(answers[0].as_deref(), Some(b"needle".as_slice()));
        assert_eq!(answers[1].as_deref(), Some(b"kho-v4\0xx".as_slice()));
        assert_eq!(answers[2], None);
    }

    #[test]
    fn the_parts_of_a_format_belong_to_its_name() {
        for name in ["4", "12", "4;radix-v1;vmalloc-v1", "5;block-v1", "4-block-v1"] {
            assert!(is_version_and_nul(format!("{name}\0kho-v9;x").as_bytes()), "{name}");
        }
        for name in ["", "malloc", "4 ", "4x", "4;a b", "12345", ";radix-v1"] {
            assert!(!is_version_and_nul(format!("{name}\0").as_bytes()), "{name}");
        }
        assert!(!is_version_and_nul(b"4;radix-v1"), "no end");
    }

    #[test]
    fn a_tail_cut_by_the_end_is_judged_as_it_is() {
        let questions = [Question { tail: 4, accept: is_version_and_nul, ..Question::contains(b"kho-v") }];
        assert!(search_stream(b"..kho-v4\0".as_slice(), &questions, 100).unwrap()[0].is_some());
        assert!(search_stream(b"..kho-v4".as_slice(), &questions, 100).unwrap()[0].is_none());
    }

    #[test]
    fn shallow_questions_end_with_the_constants() {
        // An ELF header, one program header: PT_LOAD of the first PIECE bytes.
        let mut kernel = vec![0u8; 3 * PIECE];
        kernel[..7].copy_from_slice(b"\x7fELF\x02\x01\x01");
        kernel[0x20] = 64; // e_phoff
        kernel[0x34..0x3a].copy_from_slice(&[64, 0, 56, 0, 1, 0]); // e_ehsize, e_phentsize, e_phnum
        kernel[64] = 1; // PT_LOAD
        kernel[64 + 0x20..64 + 0x28].copy_from_slice(&(PIECE as u64).to_le_bytes());
        assert_eq!(constants_end_of(&kernel[..PIECE]), PIECE as u64);
        kernel[2 * PIECE..2 * PIECE + 6].copy_from_slice(b"needle");
        let deep = Question::contains(b"needle");
        let shallow = Question { depth: Depth::Constants, ..deep };
        let found = |questions: &[Question<'_>]| search_stream(kernel.as_slice(), questions, MAX_UNPACKED).unwrap();
        assert_eq!(found(&[shallow]), [None]);
        assert!(found(&[deep])[0].is_some());
        assert_eq!(constants_end_of(b"no ELF file"), u64::MAX);
    }

    #[test]
    fn growth_is_bounded() {
        let questions = [Question::contains(b"absent")];
        let error = search_stream(std::io::repeat(0), &questions, 1 << 20).unwrap_err();
        assert_eq!(error.to_string(), "the kernel unpacks to more than 1048576 bytes");
    }

    #[test]
    fn a_compression_that_cannot_be_unpacked_is_named() {
        let name = |mut payload: &[u8]| unpack(&mut payload).map(|_| ()).unwrap_err().to_string();
        assert!(name(b"\x89LZO\0").contains("lzo"));
        assert_eq!(
            name(b"garbage"),
            "the kernel's payload of 7 bytes has no known compression: it starts with 67617262"
        );
        assert!(matches!(unpack(&mut b"\x28\xb5\x2f\xfd".as_slice()).map(|_| ()), Err(PayloadError::Damaged { .. })));
    }

    /// A kernel of each compression that the kernel's build knows, with the length behind it as that build puts it there.
    #[test]
    fn every_compression_is_looked_into() {
        let samples: [&[u8]; 6] = [
            include_bytes!("../../tests/data/hello.gz"),
            include_bytes!("../../tests/data/hello.bz2"),
            include_bytes!("../../tests/data/hello.lzma"),
            include_bytes!("../../tests/data/hello.xz"),
            include_bytes!("../../tests/data/hello.lz4"),
            include_bytes!("../../tests/data/hello.zst"),
        ];
        let questions = [Question::contains(b"kernel\nhello"), Question::contains(b"absent")];
        let plain = [b"\x7fELF".as_slice(), b"kernel\nhello"].concat();
        for sample in samples.into_iter().chain([plain.as_slice()]) {
            let payload = [sample, &28_000u32.to_le_bytes()].concat();
            let found = search_stream(unpack(&mut payload.as_slice()).unwrap(), &questions, MAX_UNPACKED).unwrap();
            assert_eq!((found[0].is_some(), found[1].is_some()), (true, false), "{:02x?}", &sample[..2]);
        }
    }

    proptest! {
        #[test]
        fn how_the_stream_is_cut_does_not_matter(
            kernel in prop::collection::vec(prop::sample::select(b"abn".as_slice()), 0..400),
            cuts in prop::collection::vec(1usize..50, 0..20),
        ) {
            let questions = [Question::contains(b"banana"), Question { tail: 3, accept: |t| t == b"baa", ..Question::contains(b"nab") }];
            let cut = search_stream(Drip(&kernel, cuts), &questions, MAX_UNPACKED).unwrap();
            let find = |text: &[u8]| kernel.windows(6).any(|w| w == text);
            prop_assert_eq!(cut[0].is_some(), find(b"banana"));
            prop_assert_eq!(cut[1].is_some(), find(b"nabbaa"));
        }
    }
}
