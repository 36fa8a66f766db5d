//! Kexec handover (KHO): what a successor whose kernel was built with it is told, so that it takes arenas and fragments as if kexec had
//! brought them. What the bytes look like is [`handover::kho`]'s; here is where they lie, and what is in them.
//!
//! ```text
//! R            control block
//! R +  1 MiB   room: FDT, scratch list, blobs, radix tree     RAM of the successor, for these and nothing else while it boots
//! R + 31 MiB   pages of our own memfd
//! R + 32 MiB   the image, where it is loaded
//! ...          scratch: where it goes (KASLR), and all that it takes before it knows what is preserved
//! ...          ordinary memory: scratch is for movable pages ever after (MIGRATE_CMA), so it cannot be all
//! end, down    initrd
//! ```
//! A kernel without KHO is told of the same memory by `SETUP_INDIRECT` nodes ([`kexec_core::boot_params::SetupData::Reserve`]).

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};
use handover::kho::abi::Expected;
use handover::kho::v4::SCRATCH_ALIGN;
use handover::kho::{Abi, Handed, Incoming, Limits, Memory, Outgoing, PAGE, Segments, Written};
use handover::luo::{File, Memfd, Names, Orchestration, Session};
use kexec_core::image::{BzImage, KernelFacts};
use kexec_core::layout::KERNEL_OFFSET;
use kexec_core::memory_map::{Range, RangeSet, struct_page_bytes};
use kexec_core::placement::place_images;
use state_schemas::Payload;
use state_schemas::control_block;
use state_schemas::latest::handover_record::{Arena, HandoverRecord, Kho, PhysRange};

use crate::daemon::outcome::Failure;
use crate::services::files::Numbered;
use crate::takeover::birth::{phys, range};

/// The blob with our own record: what the control block has, but for KHO's places, which whoever reads this has found. And the session
/// in which a program of the successor gets the same as a memfd.
pub const NAME: &str = "baton";
/// The memfd's token in that session.
pub const RECORD_TOKEN: u64 = 1;
/// Where copies of what was handed over last are left for people, one file for each blob.
pub const COPIES: &str = "/run/baton/kho";
/// The memfd's page addresses, beside those copies: a list of numbers, JSON.
pub const MEMFD_PAGES: &str = "memfd-pages.json";
/// Room for the memfd's pages.
const FILES: u64 = 1 << 20;
/// What a kernel takes before its page allocator runs, beside itself and its struct pages: page tables, per-CPU areas, hash tables.
const EARLY: u64 = 64 << 20;
/// What must be left for pages that cannot be moved, beside the initrd's and the image's places.
const UNMOVABLE: u64 = 32 << 20;

/// What a kernel with KHO is spoken to in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Spoken {
    /// The version.
    pub abi: Abi,
    /// It has the Live Update Orchestrator too, in versions that we speak: by which names it knows them.
    pub luo: Option<Names>,
}

/// How to speak to a kernel; nothing for one without KHO.
pub fn spoken(facts: &KernelFacts, release: &str) -> Result<(Option<Spoken>, String)> {
    let Some(expected) = &facts.kho else {
        return Ok((None, "not built in: memory is kept by setup_data".to_owned()));
    };
    let abi = Abi::named(expected).map_err(|unspoken| {
        Failure::precondition(
            format!("kernel {release}: {unspoken}"),
            "update baton first, or choose a kernel of another version, or one without CONFIG_KEXEC_HANDOVER",
        )
    })?;
    let set = |name: &Option<String>| name.iter().cloned().collect();
    let luo = Names::of(&Expected { kho: set(&facts.kho), luo: set(&facts.luo), memfd: set(&facts.memfd) });
    let with = match &luo {
        Ok(Some(names)) => format!(" with {} and {}", names.luo, names.memfd),
        Err(unspoken) => format!("; no session is handed over: {unspoken}"),
        Ok(None) => String::new(),
    };
    let luo = luo.ok().flatten();
    Ok((Some(Spoken { abi, luo }), format!("{expected}{with}")))
}

/// The command line with what a kernel must be told to use KHO, unless the operator decided that.
pub fn cmdline(given: String) -> String {
    let decided = |key: &str| given.split_whitespace().any(|word| word.split('=').next() == Some(key));
    let missing: Vec<_> = ["kho", "liveupdate"].into_iter().filter(|key| !decided(key)).collect();
    missing.into_iter().fold(given, |line, key| format!("{line} {key}=on").trim().to_owned())
}

/// What is spoken when the kernel is told this: an operator may have switched its orchestrator off.
pub fn as_told(spoken: Spoken, cmdline: &str) -> Spoken {
    let says = |key: &str, off: &[&str]| {
        let last = cmdline.split_whitespace().rev().find_map(|word| word.strip_prefix(key)?.strip_prefix('='));
        last.is_some_and(|value| off.contains(&value))
    };
    // kstrtobool()
    let off = ["off", "of", "0", "n", "N", "no", "f", "F"];
    Spoken { luo: spoken.luo.filter(|_| !says("liveupdate", &off) && !says("kho", &off)), ..spoken }
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

/// A handover, ready to be put in place.
pub struct HandedOver {
    /// For [`kexec_core::placement::PlacementRequest::kho`].
    pub setup_data: Vec<u8>,
    /// What to write where; all of it in the room.
    pub segments: Segments,
    /// Where it is, for the record.
    pub places: Kho,
    memfd: Vec<u64>,
    handed: Handed,
}

/// Writes the handover. What the record names is preserved piece by piece: a range that is taken as a whole there
/// (`kho_restore_pages`) must have been preserved as a whole here, not as a part of something larger.
///
/// Files of `kept` that are a session's become the kernel's, if it has an orchestrator.
pub fn write(spoken: Spoken, places: Places, record: &HandoverRecord, kept: &Numbered) -> Result<HandedOver> {
    let files = Range::new(places.room.end() - FILES, places.room.end());
    let mut out = Outgoing::new(spoken.abi, phys(Range::new(places.room.start(), files.start())))?;
    out.scratch(phys(places.scratch));
    let to_kernel: Vec<_> = kept.to_kernel().collect();
    let is_kernels = |arena: &&Arena| to_kernel.iter().any(|(id, ..)| *id == arena.id);
    for arena in record.arenas.iter().filter(|arena| !is_kernels(arena)) {
        arena.ranges.iter().try_for_each(|piece| out.preserve(*piece))?;
    }
    free_fragments(record).iter().try_for_each(|free| out.preserve(phys(free)))?;
    out.metadata(&record.incumbent.release, record.hop)?;
    let mut frame = record.to_frame(HandoverRecord::VERSION)?;
    out.subtree(NAME, &frame)?;
    let mut memfd = Vec::new();
    if let Some(names) = spoken.luo {
        let len = frame.len() as u64;
        if len > files.len() {
            bail!("the handover record has {len} bytes, the memfd for it {}", files.len());
        }
        frame.resize(frame.len().next_multiple_of(PAGE as usize), 0);
        let pages = PhysRange { start: files.start(), len: frame.len() as u64 };
        let data = Memfd::over(pages, len, 0).write(&mut out)?;
        let own = Session { name: NAME.to_owned(), files: vec![File::memfd(RECORD_TOKEN, data)] };
        let mut sessions = vec![own];
        for (_, file, place) in &to_kernel {
            place.add(file, &mut sessions, &mut out)?;
        }
        Orchestration { update: record.hop.into(), sessions, flbs: Vec::new(), names }.write(&mut out)?;
        memfd = (pages.start..pages.start + pages.len).step_by(PAGE as usize).collect();
    }
    let written = out.write()?;
    let (setup_data, handed) = (written.setup_data(), written.handed);
    let places = places_of(spoken.abi, places, &written);
    let mut segments = written.segments;
    if spoken.luo.is_some() {
        segments.insert(files.start(), frame);
    }
    let over = HandedOver { setup_data, segments, places, memfd, handed };
    over.leave_copies(Path::new(COPIES))?;
    Ok(over)
}

impl HandedOver {
    /// Reads it as the other kernel will, and leaves a file for each blob that it finds.
    fn leave_copies(&self, folder: &Path) -> Result<()> {
        let incoming = Incoming::read(&self.segments, self.handed, &Limits::default())
            .context("what was written for the successor cannot be read")?;
        // Blobs of an earlier handover would be taken for this one's.
        let _ = fs::remove_dir_all(folder);
        let save = |name: &str, bytes: &[u8]| {
            let path = folder.join(name);
            fs::write(&path, bytes).with_context(|| format!("cannot write {}", path.display()))
        };
        fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
        for subtree in &incoming.alleged().subtrees {
            let mut bytes = vec![0; usize::try_from(subtree.blob.len)?];
            self.segments.read(subtree.blob.start, &mut bytes)?;
            save(&subtree.name, &bytes)?;
        }
        save(MEMFD_PAGES, &serde_json::to_vec(&self.memfd)?)
    }
}

fn places_of(abi: Abi, places: Places, written: &Written) -> Kho {
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
    use crate::daemon::outcome::Class;

    fn facts(kho: &str, luo: &str) -> KernelFacts {
        let name = |name: &str| (!name.is_empty()).then(|| name.to_owned());
        let memfd = name(luo).map(|_| "memfd-v2".to_owned());
        KernelFacts { mailbox_reset_vector: true, kho: name(kho), luo: name(luo), memfd }
    }

    #[test]
    fn a_version_that_we_do_not_speak_is_refused_by_name() {
        let of = |kho, luo| spoken(&facts(kho, luo), "8.0.1");
        assert_eq!(of("kho-v4", "luo-v5").unwrap().0, Some(Spoken { abi: Abi::V4, luo: Some(Names::default()) }));
        assert_eq!(of("kho-v4", "luo-v6").unwrap().0, Some(Spoken { abi: Abi::V4, luo: None }));
        assert!(of("kho-v4", "luo-v5;block-v2").unwrap().1.contains("block-v2 is not spoken"));
        assert_eq!(of("kho-v4", "").unwrap().0, Some(Spoken { abi: Abi::V4, luo: None }));
        let newer = Names { luo: "luo-v5;block-v1", ..Names::default() };
        let expected = Spoken { abi: Abi::V4RadixVmalloc, luo: Some(newer) };
        assert_eq!(of("kho-v4;radix-v1;vmalloc-v1", "luo-v5;block-v1").unwrap().0, Some(expected));
        let failure = Failure::from_error(&of("kho-v4;radix-v7", "luo-v5").unwrap_err());
        assert!(failure.cause.contains("radix-v7 is not spoken"), "{}", failure.cause);
        assert_eq!(of("", "").unwrap().0, None);
        let failure = Failure::from_error(&of("kho-v5", "luo-v5").unwrap_err());
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
        let has_luo = |cmdline| as_told(Spoken { abi: Abi::V4, luo: Some(Names::default()) }, cmdline).luo.is_some();
        assert!(has_luo("kho=on liveupdate=on") && has_luo("liveupdate=0 liveupdate=1"));
        assert!(!has_luo("kho=on liveupdate=off") && !has_luo("kho=0 liveupdate=on"));
    }
}
