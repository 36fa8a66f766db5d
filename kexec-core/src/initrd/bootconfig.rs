//! The boot configuration behind an initrd (Documentation/admin-guide/bootconfig.rst), which can hold words for the kernel's command line.

/// How it ends.
const MAGIC: &[u8] = b"#BOOTCONFIG\n";
/// Linux looks for the end in the last bytes only: a boot loader may have padded the initrd to four.
const PADDING: usize = 3;
/// `XBC_DATA_MAX`.
const MOST: usize = 32767;

/// A boot configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BootConfig {
    /// Where it begins in the initrd; it goes to the end.
    pub at: usize,
    /// Its text.
    pub text: String,
}

/// Why it is none.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BootConfigError {
    /// The numbers before its end make no sense.
    #[error("its boot configuration is damaged: a length of {size} bytes")]
    Size {
        /// What it says.
        size: u32,
    },
    /// Another text than what was summed up.
    #[error("its boot configuration is damaged: the sum is {found:#x}, not {stated:#x}")]
    Sum {
        /// Of the text.
        found: u32,
        /// In the trailer.
        stated: u32,
    },
}

impl BootConfig {
    /// The boot configuration of an initrd, if it has one.
    pub(super) fn find(initrd: &[u8]) -> Result<Option<BootConfig>, BootConfigError> {
        let end = (0..=PADDING)
            .filter_map(|padding| initrd.len().checked_sub(padding))
            .find(|&end| initrd[..end].ends_with(MAGIC));
        let Some(end) = end else { return Ok(None) };
        let before = &initrd[..end - MAGIC.len()];
        let Some((before, numbers)) = before.split_last_chunk::<8>() else {
            return Err(BootConfigError::Size { size: 0 });
        };
        let [size, stated] = [0, 4].map(|at| u32::from_le_bytes(numbers[at..at + 4].try_into().expect("four bytes")));
        let at = before.len().checked_sub(size as usize).filter(|_| size as usize <= MOST);
        let at = at.ok_or(BootConfigError::Size { size })?;
        let text = &before[at..];
        let found = text.iter().fold(0u32, |sum, &byte| sum.wrapping_add(byte.into()));
        if found != stated {
            return Err(BootConfigError::Sum { found, stated });
        }
        Ok(Some(BootConfig { at, text: String::from_utf8_lossy(text).trim_end_matches('\0').to_owned() }))
    }

    /// Whether it has words for the kernel's command line: a key `kernel`. (They are not read here: that takes the kernel's own parser.)
    pub fn has_kernel_words(&self) -> bool {
        let plain = self.text.lines().map(|line| line.split('#').next().unwrap_or_default());
        let mut tokens = plain.flat_map(|line| line.split(|c: char| c.is_whitespace() || ";{}=,+:".contains(c)));
        tokens.any(|token| token == "kernel" || token.starts_with("kernel."))
    }
}
