//! Kexec handover (KHO): what a successor whose kernel was built with it is told, so that it takes arenas and fragments as if kexec had
//! brought them. What the bytes look like is [`handover::kho`]'s; here is where they lie, and what is in them.
//!
//! ```text
//! R            control block
//! R +  1 MiB   room: FDT, scratch list, blobs, radix tree     RAM of the successor, for these and nothing else while it boots
//! R + 32 MiB   the image, where it is loaded
//! ...          scratch: where it goes (KASLR), and all that it takes before it knows what is preserved
//! ...          ordinary memory: scratch is for movable pages ever after (MIGRATE_CMA), so it cannot be all
//! end, down    initrd
//! ```
//! A kernel without KHO is told of the same memory by `SETUP_INDIRECT` nodes ([`kexec_core::boot_params::SetupData::Reserve`]).

use anyhow::Result;
use handover::kho::abi::SPOKEN;
use handover::kho::v4::SCRATCH_ALIGN;
use handover::kho::{Abi, Outgoing, Written};
use kexec_core::image::BzImage;
use kexec_core::layout::KERNEL_OFFSET;
use kexec_core::memory_map::{Range, RangeSet, struct_page_bytes};
use kexec_core::placement::place_images;
use state_schemas::Payload;
use state_schemas::control_block;
use state_schemas::latest::handover_record::{HandoverRecord, Kho, PhysRange};

use crate::birth::{phys, range};
use crate::outcome::Failure;

/// The blob with our own record: what the control block has, but for KHO's places, which whoever reads this has found.
pub const BLOB: &str = "baton";
/// What a kernel takes before its page allocator runs, beside itself and its struct pages: page tables, per-CPU areas, hash tables.
const EARLY: u64 = 64 << 20;
/// What must be left for pages that cannot be moved, beside the initrd's and the image's places.
const UNMOVABLE: u64 = 32 << 20;

/// The version to write for a kernel that expects this one; none for a kernel without KHO.
pub fn spoken(expected: Option<&str>, release: &str) -> Result<(Option<Abi>, String)> {
    let Some(expected) = expected else {
        return Ok((None, "not built in: memory is kept by setup_data".to_owned()));
    };
    let ours = SPOKEN.iter().map(|abi| abi.compatible()).collect::<Vec<_>>().join(", ");
    match Abi::from_compatible(expected) {
        Some(abi) => Ok((Some(abi), format!("{expected}, which we speak"))),
        None => Err(Failure::precondition(
            format!("kernel {release} expects kexec handover in version {expected}; this baton speaks {ours}"),
            "update baton first, or choose a kernel of another version, or one without CONFIG_KEXEC_HANDOVER",
        )
        .into()),
    }
}

/// The command line with what a kernel must be told to use KHO, unless the operator decided that.
pub fn cmdline(given: String) -> String {
    let decided = |key: &str| given.split_whitespace().any(|word| word.split('=').next() == Some(key));
    let missing: Vec<_> = ["kho", "liveupdate"].into_iter().filter(|key| !decided(key)).collect();
    missing.into_iter().fold(given, |line, key| format!("{line} {key}=on").trim().to_owned())
}

/// Bytes that a region must have free, beside image and initrd, when its kernel will know `known` bytes of RAM from the start.
pub fn room_to_run(image: &BzImage<'_>, known: u64) -> u64 {
    scratch_needed(image, known) + UNMOVABLE + 2 * SCRATCH_ALIGN
}

fn scratch_needed(image: &BzImage<'_>, known: u64) -> u64 {
    (image.init_size() + struct_page_bytes(known) + EARLY).next_multiple_of(SCRATCH_ALIGN)
}

/// Where in a region the two are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Places {
    /// The handover.
    pub room: Range,
    /// Memory that holds nothing of value.
    pub scratch: Range,
}

impl Places {
    /// For a kernel that will know `known` bytes of RAM from the start.
    pub fn new(image: &BzImage<'_>, initrd_len: u64, region: Range, known: u64) -> Result<Places> {
        let (kernel, initrd) = place_images(image, initrd_len, region)?;
        let free = Range::new(kernel.end(), initrd.start()).shrink_to(SCRATCH_ALIGN);
        let len = scratch_needed(image, known).max((free.len() / 2).next_multiple_of(SCRATCH_ALIGN));
        if len + UNMOVABLE > free.len() {
            return Err(Failure::precondition(
                format!(
                    "the region has {} MiB beside image and initrd, a kernel with KHO needs {} MiB there",
                    free.len() >> 20,
                    (len + UNMOVABLE) >> 20
                ),
                "set update.region_mib to more",
            )
            .into());
        }
        Ok(Places {
            room: Range::new(region.start() + control_block::SIZE, region.start() + KERNEL_OFFSET),
            scratch: Range::new(free.start(), free.start() + len),
        })
    }
}

/// The fragments that nobody's arena lies in: kept while both kernels run, the successor's own afterwards.
pub fn free_fragments(record: &HandoverRecord) -> RangeSet {
    let all = |ranges: &[PhysRange]| ranges.iter().map(|piece| range(*piece)).collect::<RangeSet>();
    let arenas: RangeSet =
        record.arenas.iter().flat_map(|arena| arena.ranges.iter().map(|piece| range(*piece))).collect();
    all(&record.grant.fragments).subtract(&arenas)
}

/// Writes the handover. What the record names is preserved piece by piece: a range that is taken as a whole there
/// (`kho_restore_pages`) must have been preserved as a whole here, not as a part of something larger.
pub fn write(abi: Abi, places: Places, record: &HandoverRecord) -> Result<Written> {
    let mut out = Outgoing::new(abi, phys(places.room))?;
    out.scratch(phys(places.scratch));
    for arena in &record.arenas {
        arena.ranges.iter().try_for_each(|piece| out.preserve(*piece))?;
    }
    free_fragments(record).iter().try_for_each(|free| out.preserve(phys(free)))?;
    out.metadata(&record.incumbent.release, record.hop)?;
    out.subtree(BLOB, &record.to_frame(HandoverRecord::VERSION)?)?;
    Ok(out.write()?)
}

/// What the record says of it.
pub fn places_of(abi: Abi, places: Places, written: &Written) -> Kho {
    Kho {
        abi: abi.compatible().to_owned(),
        fdt: written.handed.fdt,
        scratch: written.handed.scratch,
        room: phys(places.room),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::outcome::Class;

    #[test]
    fn a_version_that_we_do_not_speak_is_refused_by_name() {
        let (abi, _) = spoken(Some("kho-v4"), "7.3.4").unwrap();
        assert_eq!(abi, Some(Abi::V4));
        assert_eq!(spoken(None, "6.12").unwrap().0, None);
        let failure = Failure::from_error(&spoken(Some("kho-v5"), "8.0.1").unwrap_err());
        assert_eq!(failure.class, Class::Precondition);
        for part in ["8.0.1", "kho-v5", "kho-v4"] {
            assert!(failure.cause.contains(part), "{}", failure.cause);
        }
    }

    #[test]
    fn what_the_operator_says_of_kho_counts() {
        assert_eq!(cmdline(String::new()), "kho=on liveupdate=on");
        assert_eq!(cmdline("quiet kho=off".to_owned()), "quiet kho=off liveupdate=on");
        assert_eq!(cmdline("kho=on liveupdate=off".to_owned()), "kho=on liveupdate=off");
    }
}
