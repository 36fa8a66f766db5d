//! The bzImage header (Documentation/arch/x86/boot.rst), checked field by field.
//!
//! The bytes may come from anywhere: nothing here indexes, adds or multiplies without a check. The header is *not*
//! proof that the rest is a kernel; a signature is ([`super::signature`]).

use super::unified::Unified;
use zerocopy::byteorder::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// `struct setup_header` (arch/x86/include/uapi/asm/bootparam.h), as of protocol 2.15. At 0x1f1 of image and zero page.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
#[expect(missing_docs, reason = "the names and meanings are the kernel's, in Documentation/arch/x86/boot.rst")]
pub struct SetupHeader {
    pub setup_sects: u8,
    pub root_flags: U16,
    pub syssize: U32,
    pub ram_size: U16,
    pub vid_mode: U16,
    pub root_dev: U16,
    pub boot_flag: U16,
    pub jump: [u8; 2],
    pub header: [u8; 4],
    pub version: U16,
    pub realmode_swtch: U32,
    pub start_sys_seg: U16,
    pub kernel_version: U16,
    pub type_of_loader: u8,
    pub loadflags: u8,
    pub setup_move_size: U16,
    pub code32_start: U32,
    pub ramdisk_image: U32,
    pub ramdisk_size: U32,
    pub bootsect_kludge: U32,
    pub heap_end_ptr: U16,
    pub ext_loader_ver: u8,
    pub ext_loader_type: u8,
    pub cmd_line_ptr: U32,
    pub initrd_addr_max: U32,
    pub kernel_alignment: U32,
    pub relocatable_kernel: u8,
    pub min_alignment: u8,
    pub xloadflags: U16,
    pub cmdline_size: U32,
    pub hardware_subarch: U32,
    pub hardware_subarch_data: U64,
    pub payload_offset: U32,
    pub payload_length: U32,
    pub setup_data: U64,
    pub pref_address: U64,
    pub init_size: U32,
    pub handover_offset: U32,
    pub kernel_info_offset: U32,
}

/// Where the header starts, in the file and in the zero page.
pub const HEADER_AT: usize = 0x1f1;
/// Oldest protocol we take: 2.12 brought `xloadflags` (Linux 3.8).
pub const MIN_PROTOCOL: u16 = 0x020c;
/// Far above any kernel there is; a bound for what is read into memory.
pub const MAX_IMAGE: u64 = 256 << 20;

const SECTOR: usize = 512;
const XLF_KERNEL_64: u16 = 1 << 0;
const XLF_CAN_BE_LOADED_ABOVE_4G: u16 = 1 << 1;
const XLF_5LEVEL: u16 = 1 << 5;
const LOADED_HIGH: u8 = 1 << 0;

const _: () = assert!(size_of::<SetupHeader>() == 0x26c - HEADER_AT);
const _: () = assert!(std::mem::offset_of!(SetupHeader, header) == 0x202 - HEADER_AT);
const _: () = assert!(std::mem::offset_of!(SetupHeader, setup_data) == 0x250 - HEADER_AT);

/// Why an image cannot be booted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ImageError {
    /// It ends too early.
    #[error("kernel image is truncated: {what} needs {needed} bytes, but the file has {len}")]
    Truncated {
        /// What should have been there.
        what: &'static str,
        /// How long the file would have to be.
        needed: u64,
        /// How long it is.
        len: u64,
    },
    /// No Linux image.
    #[error("not a Linux kernel image: {found:#06x} and {magic:?} at 0x1fe and 0x202 instead of 0xaa55 and \"HdrS\"")]
    NotLinux {
        /// Boot flag found.
        found: u16,
        /// Header magic found.
        magic: String,
    },
    /// A vmlinux, not a bzImage.
    #[error(
        "this is an ELF file (vmlinux?), which says nothing of how it is booted: give the bzImage made from it, usually /boot/vmlinuz-RELEASE"
    )]
    Elf,
    /// A kernel with initrd and command line in one file.
    #[error(
        "this is a unified kernel image{}: take it apart (for instance `objcopy -O binary --only-section=.linux IMAGE vmlinuz`, and so .initrd and .cmdline) \
         and give --kernel, --initrd and --cmdline",
        .release.as_ref().map(|release| format!(" of {release}")).unwrap_or_default()
    )]
    Unified {
        /// Its section `.uname`.
        release: Option<String>,
    },
    /// Too old.
    #[error(
        "boot protocol {}.{:02} is too old: 2.12 (Linux 3.8) is needed", .found >> 8, .found & 0xff
    )]
    Protocol {
        /// `version` found.
        found: u16,
    },
    /// A 32-bit kernel.
    #[error("the kernel is 32-bit only (xloadflags {xloadflags:#x} lacks XLF_KERNEL_64)")]
    Only32Bit {
        /// Found.
        xloadflags: u16,
    },
    /// Cannot run where we put it.
    #[error("the kernel was built without CONFIG_RELOCATABLE: it can only run at {pref_address:#x}")]
    NotRelocatable {
        /// Where it wants to be.
        pref_address: u64,
    },
    /// A zImage, or above 4 GiB not supported.
    #[error("the kernel cannot be loaded high (loadflags {loadflags:#x}, xloadflags {xloadflags:#x})")]
    LowOnly {
        /// Found.
        loadflags: u8,
        /// Found.
        xloadflags: u16,
    },
    /// Too large.
    #[error("kernel image of {len} bytes is too large: at most {max} are read")]
    TooLarge {
        /// Found.
        len: u64,
        /// Limit.
        max: u64,
    },
    /// The header says something that cannot be.
    #[error("kernel header is damaged: {field} is {value:#x}")]
    Header {
        /// Which field.
        field: &'static str,
        /// What it says.
        value: u64,
    },
}

/// A bzImage that can be placed. Borrowed from the bytes it was parsed from.
#[derive(Debug, Clone)]
pub struct BzImage<'a> {
    /// The header as it stands in the image; `header_len` bytes of it mean something.
    header: SetupHeader,
    header_len: usize,
    version_text: String,
    protected_mode: &'a [u8],
    payload: &'a [u8],
}

impl<'a> BzImage<'a> {
    /// Reads an image.
    pub fn parse(file: &'a [u8]) -> Result<BzImage<'a>, ImageError> {
        let len = file.len() as u64;
        if len > MAX_IMAGE {
            return Err(ImageError::TooLarge { len, max: MAX_IMAGE });
        }
        if file.starts_with(b"\x7fELF") {
            return Err(ImageError::Elf);
        }
        let truncated = |what, needed: usize| ImageError::Truncated { what, needed: needed as u64, len };
        let Some(Ok((header, _))) = file.get(HEADER_AT..).map(SetupHeader::read_from_prefix) else {
            // A short file that is no kernel at all should not be called a truncated kernel.
            return match file.get(0x1fe..0x200) {
                Some(&[0x55, 0xaa]) | None => Err(truncated("the boot header", HEADER_AT + size_of::<SetupHeader>())),
                Some(flag) => Err(not_linux(u16::from(flag[0]) | u16::from(flag[1]) << 8, b"")),
            };
        };
        if header.boot_flag.get() != 0xaa55 || &header.header != b"HdrS" {
            if let Some(unified) = Unified::parse(file) {
                return Err(ImageError::Unified { release: unified.uname });
            }
            return Err(not_linux(header.boot_flag.get(), &header.header));
        }
        let protocol = header.version.get();
        if protocol < MIN_PROTOCOL {
            return Err(ImageError::Protocol { found: protocol });
        }
        let xloadflags = header.xloadflags.get();
        if xloadflags & XLF_KERNEL_64 == 0 {
            return Err(ImageError::Only32Bit { xloadflags });
        }
        if header.relocatable_kernel == 0 {
            return Err(ImageError::NotRelocatable { pref_address: header.pref_address.get() });
        }
        if header.loadflags & LOADED_HIGH == 0 || xloadflags & XLF_CAN_BE_LOADED_ABOVE_4G == 0 {
            return Err(ImageError::LowOnly { loadflags: header.loadflags, xloadflags });
        }
        check_numbers(&header)?;

        // "The end of setup header can be calculated as 0x0202 + byte value at offset 0x0201." Fields behind it are code.
        let header_len = (0x202 + usize::from(header.jump[1])).saturating_sub(HEADER_AT);
        if header_len < std::mem::offset_of!(SetupHeader, handover_offset) {
            return Err(ImageError::Header { field: "jump (its length)", value: header_len as u64 });
        }

        // 0 means 4, since before time; every kernel of our protocol fills it in.
        let setup_sects = if header.setup_sects == 0 { 4 } else { usize::from(header.setup_sects) };
        let setup_len = (setup_sects + 1) * SECTOR;
        let syssize = header.syssize.get() as usize;
        let image_end = syssize.checked_mul(16).and_then(|n| n.checked_add(setup_len));
        let Some(image_end) = image_end.filter(|&n| n as u64 <= MAX_IMAGE && syssize > 0) else {
            return Err(ImageError::Header { field: "syssize", value: syssize as u64 });
        };
        let protected_mode = file.get(setup_len..image_end).ok_or_else(|| truncated("the kernel", image_end))?;
        if (ENTRY_OFFSET as usize) >= protected_mode.len() {
            return Err(ImageError::Header { field: "syssize", value: syssize as u64 });
        }
        if protected_mode.len() as u64 > u64::from(header.init_size.get()) {
            return Err(ImageError::Header { field: "init_size", value: header.init_size.get().into() });
        }
        let payload_at = header.payload_offset.get() as usize;
        let payload = payload_at
            .checked_add(header.payload_length.get() as usize)
            .and_then(|end| protected_mode.get(payload_at..end))
            .ok_or(ImageError::Header { field: "payload_length", value: header.payload_length.get().into() })?;

        Ok(BzImage {
            version_text: version_text(file, &header, setup_len)?,
            header,
            header_len: header_len.min(size_of::<SetupHeader>()),
            protected_mode,
            payload,
        })
    }

    /// `uname -r` of the kernel: the first word of its version text.
    pub fn release(&self) -> &str {
        self.version_text.split(' ').next().unwrap_or_default()
    }

    /// The whole version text: release, builder, date.
    pub fn version_text(&self) -> &str {
        &self.version_text
    }

    /// Boot protocol, for instance 0x020f.
    pub fn protocol(&self) -> u16 {
        self.header.version.get()
    }

    /// Bytes from the load address on that the kernel uses before it can read its memory map.
    pub fn init_size(&self) -> u64 {
        self.header.init_size.get().into()
    }

    /// Alignment of the load address.
    pub fn alignment(&self) -> u64 {
        self.header.kernel_alignment.get().into()
    }

    /// Below this address the kernel would move itself: `CONFIG_PHYSICAL_START`.
    pub fn pref_address(&self) -> u64 {
        self.header.pref_address.get()
    }

    /// Longest command line, without its NUL.
    pub fn cmdline_size(&self) -> u64 {
        self.header.cmdline_size.get().into()
    }

    /// Whether the kernel can switch to five-level paging.
    pub fn five_level(&self) -> bool {
        self.header.xloadflags.get() & XLF_5LEVEL != 0
    }

    /// What is copied to the load address.
    pub fn protected_mode(&self) -> &'a [u8] {
        self.protected_mode
    }

    /// The compressed vmlinux in it.
    pub fn payload(&self) -> &'a [u8] {
        self.payload
    }

    /// The header for the zero page: what the image says, and zeros behind its end.
    pub fn header_for_boot(&self) -> SetupHeader {
        let mut bytes = [0; size_of::<SetupHeader>()];
        bytes[..self.header_len].copy_from_slice(&self.header.as_bytes()[..self.header_len]);
        zerocopy::transmute!(bytes)
    }
}

use crate::layout::ENTRY_OFFSET;

fn not_linux(found: u16, magic: &[u8]) -> ImageError {
    ImageError::NotLinux { found, magic: magic.escape_ascii().to_string() }
}

/// Numbers that arithmetic elsewhere relies on.
fn check_numbers(header: &SetupHeader) -> Result<(), ImageError> {
    let alignment = header.kernel_alignment.get();
    // CONFIG_PHYSICAL_ALIGN: 2 MiB to 16 MiB for 64-bit kernels.
    if !alignment.is_power_of_two() || !(0x20_0000..=0x100_0000).contains(&alignment) {
        return Err(ImageError::Header { field: "kernel_alignment", value: alignment.into() });
    }
    let init_size = header.init_size.get();
    if init_size == 0 || u64::from(init_size) > 4 * MAX_IMAGE {
        return Err(ImageError::Header { field: "init_size", value: init_size.into() });
    }
    let cmdline_size = header.cmdline_size.get();
    if cmdline_size < 255 {
        return Err(ImageError::Header { field: "cmdline_size", value: cmdline_size.into() });
    }
    Ok(())
}

/// The NUL-terminated text that `kernel_version` points to, 0x200 bytes before.
fn version_text(file: &[u8], header: &SetupHeader, setup_len: usize) -> Result<String, ImageError> {
    let pointer = header.kernel_version.get();
    let damaged = || ImageError::Header { field: "kernel_version", value: pointer.into() };
    let at = usize::from(pointer) + 0x200;
    let setup = file.get(..setup_len).ok_or_else(damaged)?;
    let text = setup.get(at..).filter(|_| pointer != 0).ok_or_else(damaged)?;
    let text = &text[..text.iter().take(1024).position(|&b| b == 0).ok_or_else(damaged)?];
    // Printed to terminals and journals, and the release becomes part of paths.
    if text.is_empty() || !text.iter().all(|&b| b == b' ' || b.is_ascii_graphic()) {
        return Err(damaged());
    }
    let release = text.split(|&b| b == b' ').next().unwrap_or_default();
    if release.is_empty() || release.contains(&b'/') || release.starts_with(b".") || release.len() > 64 {
        return Err(damaged());
    }
    Ok(String::from_utf8_lossy(text).into_owned())
}
