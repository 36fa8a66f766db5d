//! Kernel images with one thing wrong with them, made from a good one.

use anyhow::{Context, Result};

/// `setup_sects` of the boot header (Documentation/arch/x86/boot.rst).
const SETUP_SECTS: usize = 0x1f1;
const XLOADFLAGS: usize = 0x236;
const XLF_KERNEL_64: u8 = 1;
const PAYLOAD_OFFSET: usize = 0x248;
/// Where the offset of the PE header stands, and where in that header the size of the certificate table is: PE32+ has its
/// data directories 112 bytes behind the start of the optional header, which is 24 bytes behind "PE"; certificates are number 4.
const PE_AT: usize = 0x3c;
const CERTIFICATES_IN_PE: usize = 24 + 112 + 4 * 8;

/// A 32-bit kernel, by its header.
pub fn only_32_bit(good: &[u8]) -> Vec<u8> {
    let mut image = good.to_vec();
    image[XLOADFLAGS] &= !XLF_KERNEL_64;
    image
}

/// Without its certificate table.
pub fn unsigned(good: &[u8]) -> Result<Vec<u8>> {
    let mut image = good.to_vec();
    let entry = number(good, PE_AT)? + CERTIFICATES_IN_PE;
    image.get_mut(entry..entry + 8).context("no PE header")?.fill(0);
    Ok(image)
}

/// A kernel in which nothing is found that is looked for: what an older one looks like, or one built without ACPI wakeup.
pub fn without_wakeup(good: &[u8]) -> Result<Vec<u8>> {
    with_content(good, b"nothing to be found in here")
}

/// A kernel that is fit for an update, and expects kexec handover in a version that nobody speaks.
pub fn of_unspoken_kho(good: &[u8]) -> Result<Vec<u8>> {
    with_content(good, b"Failed to setup MADT reset vector\0kho-v99\0luo-v5\0memfd-v2\0")
}

/// With another kernel inside, of which only these bytes are left.
fn with_content(good: &[u8], text: &[u8]) -> Result<Vec<u8>> {
    let mut image = good.to_vec();
    let payload = (usize::from(good[SETUP_SECTS]) + 1) * 512 + number(good, PAYLOAD_OFFSET)?;
    // RFC 8878: magic, a frame that is one segment with its size in a byte, one last raw block.
    let mut frame = vec![0x28, 0xb5, 0x2f, 0xfd, 0x20, u8::try_from(text.len())?];
    frame.extend(&(1 | u32::try_from(text.len())? << 3).to_le_bytes()[..3]);
    frame.extend(text);
    image.get_mut(payload..payload + frame.len()).context("no payload")?.copy_from_slice(&frame);
    Ok(image)
}

fn number(image: &[u8], at: usize) -> Result<usize> {
    let bytes = image.get(at..at + 4).context("the image is too short")?;
    Ok(u32::from_le_bytes(bytes.try_into()?) as usize)
}
