//! What kernels, initrds and modules are compressed with: recognised as Linux recognises it (lib/decompress.c), and unpacked as a stream,
//! so that nobody has to hold what comes out.

use std::io::{self, Read};

use lzma_rust2::{LzmaReader, XzReader};
use ruzstd::decoding::StreamingDecoder;

/// A way to compress.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[expect(missing_docs, reason = "each is called by its name")]
pub enum Compression {
    Gzip,
    Bzip2,
    Lzma,
    Xz,
    Lzo,
    Lz4,
    Zstd,
}

/// By the first two bytes, as Linux does.
const MAGICS: [([u8; 2], Compression); 8] = [
    ([0x1f, 0x8b], Compression::Gzip),
    ([0x1f, 0x9e], Compression::Gzip),
    ([0x42, 0x5a], Compression::Bzip2),
    ([0x5d, 0x00], Compression::Lzma),
    ([0xfd, 0x37], Compression::Xz),
    ([0x89, 0x4c], Compression::Lzo),
    ([0x02, 0x21], Compression::Lz4),
    ([0x28, 0xb5], Compression::Zstd),
];

/// Largest window that a stream may ask for: the kernel build uses `zstd -22 --ultra`, 128 MiB, and xz with at most 64 MiB.
const MAX_WINDOW: u64 = 128 << 20;
/// The same, with what the decoder itself takes, in KiB.
const MAX_LZMA_KIB: u32 = (MAX_WINDOW >> 10) as u32 + 1024;

impl Compression {
    /// What begins like this, if it is compressed at all.
    pub fn of(start: &[u8]) -> Option<Compression> {
        MAGICS.iter().find(|(magic, _)| start.starts_with(magic)).map(|(_, compression)| *compression)
    }

    /// Its name, as the kernel's configuration has it (`CONFIG_RD_GZIP`, `CONFIG_KERNEL_GZIP`) in small letters.
    pub fn name(self) -> &'static str {
        match self {
            Compression::Gzip => "gzip",
            Compression::Bzip2 => "bzip2",
            Compression::Lzma => "lzma",
            Compression::Xz => "xz",
            Compression::Lzo => "lzo",
            Compression::Lz4 => "lz4",
            Compression::Zstd => "zstd",
        }
    }

    /// Unpacks one stream from the beginning of `input`; nothing for one that we cannot unpack (lzo: no library of it is kept well).
    ///
    /// When the reader has come to its end, `input` begins behind the stream; but for lzma, of which more was read.
    pub fn unpack<'a>(self, input: &'a mut &[u8]) -> io::Result<Option<Box<dyn Read + 'a>>> {
        Ok(Some(match self {
            Compression::Lzo => return Ok(None),
            Compression::Gzip => Box::new(flate2::bufread::GzDecoder::new(input)),
            Compression::Bzip2 => Box::new(bzip2::bufread::BzDecoder::new(input)),
            Compression::Lzma => Box::new(LzmaReader::new_mem_limit(input, MAX_LZMA_KIB, None)?),
            Compression::Xz => Box::new(XzReader::new_mem_limit(input, false, MAX_LZMA_KIB)),
            Compression::Lz4 => Box::new(Lz4::new(input)?),
            Compression::Zstd => {
                let decoder = StreamingDecoder::new_with_max_window_size(input, MAX_WINDOW);
                Box::new(decoder.map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error.to_string()))?)
            }
        }))
    }
}

/// LZ4's legacy format (`lz4 -l`), which has no end: blocks follow each other until there are no more, or a length of 0.
struct Lz4<'a, 'b> {
    input: &'a mut &'b [u8],
    /// The block that is given out.
    block: Vec<u8>,
    at: usize,
}

impl<'a, 'b> Lz4<'a, 'b> {
    const MAGIC: u32 = 0x184c_2102;
    /// Bytes of a block, unpacked.
    const BLOCK: usize = 8 << 20;

    fn new(input: &'a mut &'b [u8]) -> io::Result<Lz4<'a, 'b>> {
        let mut lz4 = Lz4 { input, block: Vec::new(), at: 0 };
        match lz4.word() {
            Some(Self::MAGIC) => Ok(lz4),
            _ => Err(damaged("not in the legacy format of lz4 (`lz4 -l`), the only one that Linux unpacks")),
        }
    }

    fn word(&mut self) -> Option<u32> {
        self.input.first_chunk().map(|bytes| u32::from_le_bytes(*bytes))
    }

    /// Unpacks the next block; `false` at the end.
    fn next(&mut self) -> io::Result<bool> {
        loop {
            let len = match self.word() {
                None | Some(0) => return Ok(false),
                Some(Self::MAGIC) => {
                    *self.input = &self.input[4..];
                    continue;
                }
                Some(len) => len as usize,
            };
            let packed = self.input[4..].get(..len).ok_or_else(|| damaged("its last block is cut off"))?;
            self.block.resize(Self::BLOCK, 0);
            let unpacked = lz4_flex::block::decompress_into(packed, &mut self.block);
            let unpacked = unpacked.map_err(|error| damaged(&error.to_string()))?;
            self.block.truncate(unpacked);
            self.at = 0;
            *self.input = &self.input[4 + len..];
            if unpacked > 0 {
                return Ok(true);
            }
        }
    }
}

impl Read for Lz4<'_, '_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        if self.at == self.block.len() && !self.next()? {
            return Ok(0);
        }
        let n = into.len().min(self.block.len() - self.at);
        into[..n].copy_from_slice(&self.block[self.at..self.at + n]);
        self.at += n;
        Ok(n)
    }
}

fn damaged(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// "hello, kernel\n", 2000 times, by the programs of Debian 13.
    const SAMPLES: [(&str, &[u8]); 6] = [
        ("gzip", include_bytes!("../tests/data/hello.gz")),
        ("bzip2", include_bytes!("../tests/data/hello.bz2")),
        ("lzma", include_bytes!("../tests/data/hello.lzma")),
        ("xz", include_bytes!("../tests/data/hello.xz")),
        ("lz4", include_bytes!("../tests/data/hello.lz4")),
        ("zstd", include_bytes!("../tests/data/hello.zst")),
    ];

    fn unpack(input: &mut &[u8]) -> io::Result<Vec<u8>> {
        let mut out = Vec::new();
        let compression = Compression::of(input).ok_or_else(|| damaged("not compressed"))?;
        compression.unpack(input)?.ok_or_else(|| damaged("lzo"))?.read_to_end(&mut out)?;
        Ok(out)
    }

    #[test]
    fn each_is_known_and_unpacked_to_its_end() {
        for (name, packed) in SAMPLES {
            assert_eq!(Compression::of(packed).unwrap().name(), name);
            let mut padded = packed.to_vec();
            padded.extend([0; 8]);
            let mut input: &[u8] = &padded;
            assert_eq!(unpack(&mut input).unwrap(), b"hello, kernel\n".repeat(2000), "{name}");
            if name != "lzma" {
                assert_eq!(input, [0; 8], "{name}");
            }
        }
        assert_eq!(Compression::of(b"\x89LZO\0").map(Compression::name), Some("lzo"));
        for not in [b"".as_slice(), b"\x1f", b"0707", b"MZ", b"\x7fELF"] {
            assert_eq!(Compression::of(not), None);
        }
    }

    #[test]
    fn what_is_cut_off_is_an_error() {
        for (name, packed) in SAMPLES {
            for len in 2..packed.len() - 1 {
                // The legacy format has no end: it may be cut between two blocks, which this short one has not.
                let unpacked = unpack(&mut &packed[..len]);
                assert!(
                    unpacked.is_err() || name == "lz4" && len <= 7,
                    "{name} {len} {:?}",
                    unpacked.map(|out| out.len())
                );
            }
        }
    }

    #[test]
    fn lz4_frames_are_not_what_linux_unpacks() {
        let mut modern: &[u8] = b"\x02\x21\x4d\x18";
        assert!(unpack(&mut modern).unwrap_err().to_string().contains("lz4 -l"));
    }
}
