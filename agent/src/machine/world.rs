//! The machine as texts: files, folders and links of /proc and /sys. Whoever judges them takes a [`World`], so that a test can play any
//! machine.

use std::fs;
use std::io::{self, Read};

use anyhow::Result;

use crate::machine::net::Net;
use crate::machine::network::Network;
use crate::machine::nft::{self, Table};

/// No file of /proc or /sys that is looked at is longer; what is behind this is not read.
const LIMIT: u64 = 8 << 20;

/// How full a file system is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Space {
    /// Bytes in use.
    pub used: u64,
    /// Files and folders, its root among them. 0 where it does not count them.
    pub files: u64,
}

/// What can be read of a machine.
pub trait World: Sync {
    /// The content of a file.
    fn bytes(&self, path: &str) -> io::Result<Vec<u8>>;
    /// The names in a folder.
    fn list(&self, path: &str) -> io::Result<Vec<String>>;
    /// Where a symbolic link points to.
    fn link(&self, path: &str) -> io::Result<String>;
    /// How full the file system at this place is.
    fn space(&self, path: &str) -> io::Result<Space>;
    /// The network namespace of this process.
    fn network(&self) -> Result<Network>;
    /// How a hypervisor names itself to its guests (CPUID leaf 0x4000_0000); nothing on bare metal.
    fn hypervisor(&self) -> Option<String>;
    /// What nf_tables holds.
    fn ruleset(&self) -> io::Result<Vec<Table>>;

    /// The text in a file, without white space around it; nothing when it cannot be read.
    fn text(&self, path: &str) -> Option<String> {
        Some(String::from_utf8_lossy(&self.bytes(path).ok()?).trim().to_owned())
    }

    /// The number in a file.
    fn number(&self, path: &str) -> Option<u64> {
        self.text(path)?.parse().ok()
    }

    /// The names in a folder, in order; none when there is no such folder.
    fn names(&self, path: &str) -> Vec<String> {
        let mut names = self.list(path).unwrap_or_default();
        names.sort();
        names
    }

    /// The last part of what a link points to.
    fn link_name(&self, path: &str) -> Option<String> {
        Some(self.link(path).ok()?.rsplit('/').next()?.to_owned())
    }

    /// Whether there is such a file or folder.
    fn exists(&self, path: &str) -> bool {
        self.bytes(path).is_ok() || self.list(path).is_ok()
    }
}

/// This machine.
#[derive(Clone, Copy)]
pub struct Live<'a>(pub &'a dyn Net);

impl World for Live<'_> {
    fn network(&self) -> Result<Network> {
        self.0.look()
    }

    fn ruleset(&self) -> io::Result<Vec<Table>> {
        nft::tables()
    }

    fn hypervisor(&self) -> Option<String> {
        let cpuid = raw_cpuid::CpuId::new();
        // The bit says that the leaf means something; without it, CPUs answer with that of another leaf.
        cpuid.get_feature_info().filter(raw_cpuid::FeatureInfo::has_hypervisor)?;
        let leaf = raw_cpuid::cpuid!(0x4000_0000);
        let bytes: Vec<u8> = [leaf.ebx, leaf.ecx, leaf.edx].iter().flat_map(|word| word.to_le_bytes()).collect();
        Some(String::from_utf8_lossy(&bytes).trim_end_matches(['\0', ' ']).to_owned())
    }

    fn bytes(&self, path: &str) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        fs::File::open(path)?.take(LIMIT).read_to_end(&mut bytes)?;
        Ok(bytes)
    }

    fn list(&self, path: &str) -> io::Result<Vec<String>> {
        fs::read_dir(path)?.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect()
    }

    fn link(&self, path: &str) -> io::Result<String> {
        Ok(fs::read_link(path)?.to_string_lossy().into_owned())
    }

    fn space(&self, path: &str) -> io::Result<Space> {
        let space = nix::sys::statvfs::statvfs(path)?;
        let used = space.blocks().saturating_sub(space.blocks_free()).saturating_mul(space.fragment_size());
        Ok(Space { used, files: space.files().saturating_sub(space.files_free()) })
    }

    fn exists(&self, path: &str) -> bool {
        fs::exists(path).unwrap_or(false)
    }
}

/// Machines for tests.
#[cfg(test)]
pub mod played {
    use std::collections::{BTreeMap, BTreeSet};

    use super::*;

    /// A machine that is made of the texts that a test gives it.
    #[derive(Debug, Clone, Default)]
    pub struct Played {
        /// Files by path.
        pub files: BTreeMap<String, Vec<u8>>,
        /// Links by path.
        pub links: BTreeMap<String, String>,
        /// File systems by mount point.
        pub spaces: BTreeMap<String, Space>,
        /// What [`World::network`] gives.
        pub network: Network,
        /// What [`World::ruleset`] gives; nothing is an error.
        pub ruleset: Option<Vec<Table>>,
        /// What [`World::hypervisor`] gives.
        pub hypervisor: Option<String>,
    }

    impl Played {
        /// With a file more.
        #[must_use]
        pub fn file(mut self, path: &str, content: &str) -> Played {
            self.files.insert(path.to_owned(), content.as_bytes().to_vec());
            self
        }

        /// With a link more.
        #[must_use]
        pub fn linked(mut self, path: &str, target: &str) -> Played {
            self.links.insert(path.to_owned(), target.to_owned());
            self
        }

        /// With this much in a file system.
        #[must_use]
        pub fn filled(mut self, path: &str, used: u64, files: u64) -> Played {
            self.spaces.insert(path.to_owned(), Space { used, files });
            self
        }
    }

    impl World for Played {
        fn network(&self) -> Result<Network> {
            Ok(self.network.clone())
        }

        fn hypervisor(&self) -> Option<String> {
            self.hypervisor.clone()
        }

        fn ruleset(&self) -> io::Result<Vec<Table>> {
            self.ruleset.clone().ok_or_else(|| io::ErrorKind::Unsupported.into())
        }

        fn bytes(&self, path: &str) -> io::Result<Vec<u8>> {
            self.files.get(path).cloned().ok_or_else(|| io::ErrorKind::NotFound.into())
        }

        fn list(&self, path: &str) -> io::Result<Vec<String>> {
            let below = format!("{path}/");
            let names: BTreeSet<String> = (self.files.keys().chain(self.links.keys()))
                .filter_map(|file| file.strip_prefix(&below)?.split('/').next().map(str::to_owned))
                .collect();
            if names.is_empty() { Err(io::ErrorKind::NotFound.into()) } else { Ok(names.into_iter().collect()) }
        }

        fn link(&self, path: &str) -> io::Result<String> {
            self.links.get(path).cloned().ok_or_else(|| io::ErrorKind::NotFound.into())
        }

        fn space(&self, path: &str) -> io::Result<Space> {
            self.spaces.get(path).copied().ok_or_else(|| io::ErrorKind::NotFound.into())
        }
    }
}
