//! Unified kernel images (UKI, <https://uapi-group.org/specifications/specs/unified_kernel_image/>): a PE program whose sections are a
//! kernel, its initrd and its command line. Taken apart, the parts are what an update takes.

use std::borrow::Cow;

use object::LittleEndian;
use object::read::pe::{ImageNtHeaders, PeFile64};

/// What is in one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unified<'a> {
    /// The kernel, a bzImage.
    pub linux: &'a [u8],
    /// The initrd; empty where there is none.
    pub initrd: Cow<'a, [u8]>,
    /// The command line; empty where there is none.
    pub cmdline: String,
    /// The kernel's release, if it says so.
    pub uname: Option<String>,
}

impl<'a> Unified<'a> {
    /// Takes an image apart; nothing for a file that is none. Of several profiles (sections of one name more than once) the first is taken,
    /// as a boot loader does.
    pub fn parse(file: &'a [u8]) -> Option<Unified<'a>> {
        let pe = PeFile64::parse(file).ok()?;
        let section = |name: &[u8]| {
            let sections = pe.nt_headers().file_header().number_of_sections.get(LittleEndian);
            let found = pe.section_table().iter().take(sections.into()).find(|section| section.raw_name() == name)?;
            let (at, len) = found.pe_file_range();
            // What is in memory may be shorter than what the file has, which is padded.
            let len = len.min(found.virtual_size.get(LittleEndian)) as usize;
            file.get(at as usize..)?.get(..len)
        };
        let text = |name: &[u8]| {
            let text = String::from_utf8_lossy(section(name)?).trim_end_matches('\0').trim().to_owned();
            Some(text).filter(|text| !text.is_empty())
        };
        Some(Unified {
            linux: section(b".linux")?,
            initrd: section(b".initrd").unwrap_or_default().into(),
            cmdline: text(b".cmdline").unwrap_or_default(),
            uname: text(b".uname"),
        })
    }
}
