//! `/etc/baton/config.toml`: what the operator decides. Everything else is found out or handed over.
//!
//! The same file serves both roles: [`crate::userland::mkinitrd`] carries it into the successor unchanged.

use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};

use baton_sdk::protocol::MAX_ARENA;
use kexec_core::memory_map::{Range, RangeSet};
use schemars::JsonSchema;
use schemars::generate::SchemaSettings;
use serde::{Deserialize, Serialize};

use crate::daemon::config_keys::{self, Key, Unknown};
use crate::update::stock::accept::Accept;

/// Where the configuration is looked for unless `--config` or `BATON_CONFIG` says otherwise.
pub const DEFAULT_PATH: &str = "/etc/baton/config.toml";

/// An IPv4 address with its prefix length, written `10.77.0.10/24`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "String", into = "String")]
pub struct Cidr {
    /// The address.
    pub address: Ipv4Addr,
    /// How many leading bits name the network, 0..=32.
    pub prefix: u8,
}

impl Cidr {
    /// The network that it names: the address's leading bits, and how many.
    pub fn network(self) -> (u32, u8) {
        let host_bits = 32 - u32::from(self.prefix.min(32));
        (u32::from(self.address).checked_shr(host_bits).unwrap_or(0), self.prefix)
    }
}

impl TryFrom<String> for Cidr {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        let bad = || format!("`{text}` is not ADDRESS/PREFIX, such as 10.0.0.5/24");
        let (address, prefix) = text.split_once('/').ok_or_else(bad)?;
        let cidr = Cidr { address: address.parse().map_err(|_| bad())?, prefix: prefix.parse().map_err(|_| bad())? };
        if cidr.prefix > 32 { Err(bad()) } else { Ok(cidr) }
    }
}

impl From<Cidr> for String {
    fn from(cidr: Cidr) -> String {
        format!("{}/{}", cidr.address, cidr.prefix)
    }
}

/// A network interface that Baton may give to a successor.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Nic {
    /// Its MAC address, by which every kernel finds it again.
    pub mac: String,
    /// The address that stays on it, whichever kernel drives it.
    pub address: Cidr,
}

/// The addresses that an update moves.
#[derive(Debug, Clone, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Network {
    /// The address that clients of the services use; it moves at the cutover. None: no address is moved.
    pub service_address: Option<Cidr>,
    /// Interfaces, at least two for an update with a service address: the successor gets one that is not in use.
    #[serde(default)]
    pub nic: Vec<Nic>,
    /// Whether batond itself sets the addresses of the interfaces on a kernel that was booted by firmware.
    #[serde(default)]
    pub configure: bool,
    /// The interfaces cannot reach each other, though they are in one network: do not try that in the trial.
    #[serde(default)]
    pub skip_reach_check: bool,
}

/// A service: a program that keeps its state in an arena or in files ([`baton_sdk`]).
#[derive(Debug, Clone, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Service {
    /// Unique; the arena carries it.
    pub name: String,
    /// Program and arguments; the successor's initrd carries the program.
    pub exec: Vec<String>,
    /// The user as whom it runs, by name or number, and who alone (with root) may be it; root without one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// It knows nothing of Baton, and keeps memfds in the fd store that systemd has too: it is started by `baton run`.
    #[serde(default)]
    pub fd_store: bool,
}

/// A program that `baton-init` starts in every kernel, beside the services; it keeps no state across an update.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Program {
    /// For messages.
    pub name: String,
    /// Program and arguments.
    pub exec: Vec<String>,
}

/// A range of memory, written as on the kernel's command line: `512M$0x40000000`, size and address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "String", into = "String")]
pub struct Reserved(Range);

impl Reserved {
    /// From where to where.
    pub fn range(self) -> Range {
        self.0
    }
}

impl TryFrom<String> for Reserved {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        /// As the kernel reads it (lib/cmdline.c, memparse): decimal or hexadecimal, with K, M, G or T behind it.
        fn bytes(text: &str) -> Option<u64> {
            let shift = match text.chars().last()?.to_ascii_uppercase() {
                'K' => 10,
                'M' => 20,
                'G' => 30,
                'T' => 40,
                _ => 0,
            };
            let digits = if shift == 0 { text } else { &text[..text.len() - 1] };
            let number = match digits.strip_prefix("0x") {
                Some(hex) => u64::from_str_radix(hex, 16).ok()?,
                None => digits.parse().ok()?,
            };
            number.checked_mul(1 << shift)
        }
        let range = text.split_once('$').and_then(|(size, start)| {
            let (size, start) = (bytes(size)?, bytes(start)?);
            Range::checked(start, start.checked_add(size)?)
        });
        let range = range.filter(|range| !range.is_empty());
        range.map(Reserved).ok_or_else(|| format!("`{text}` is not SIZE$ADDRESS, such as 512M$0x40000000"))
    }
}

impl From<Reserved> for String {
    fn from(Reserved(range): Reserved) -> String {
        format!("{:#x}${:#x}", range.len(), range.start())
    }
}

/// How updates are made.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Update {
    /// The successor's own memory until the rest is handed over, MiB; whole memory blocks are taken.
    pub region_mib: u64,
    /// Refuse images that are not what their signature (Authenticode) is for: unsigned ones, and those that were changed since. Whose
    /// signature it is, is asked only with [`Update::signing_certificates`].
    pub require_signature: bool,
    /// Certificates (files, PEM or DER) of which one must be the signer's, or have issued it. With one, a signature is required.
    pub signing_certificates: Vec<PathBuf>,
    /// Added to the command line of every successor.
    pub cmdline: String,
    /// How long the phase `booting` may take, seconds: from writing the image to the hello of the successor's agent.
    pub boot_timeout_s: u64,
    /// How long each other phase, each CPU that moves, and each undo may take, seconds.
    pub step_timeout_s: u64,
    /// How long the cutover may take before it is undone, milliseconds.
    pub cutover_timeout_ms: u64,
    /// How long a successor that serves is watched before it stays for good, seconds. 0: not at all.
    pub probation_s: u64,
    /// When that time is over, the update turns back unless an operator has said `baton commit`.
    pub require_commit: bool,
    /// Memory that was kept from this kernel on its command line (`memmap=SIZE$ADDRESS`) for a successor. What is not named here is
    /// somebody else's.
    pub reserved: Vec<Reserved>,
    /// What may end, change or be given up with this kernel, by name, in every update.
    pub accept: Vec<Accept>,
}

impl Default for Update {
    fn default() -> Self {
        Update {
            region_mib: 512,
            require_signature: false,
            signing_certificates: Vec::new(),
            cmdline: String::new(),
            boot_timeout_s: 120,
            step_timeout_s: 60,
            cutover_timeout_ms: 5_000,
            probation_s: 0,
            require_commit: false,
            reserved: Vec::new(),
            accept: Vec::new(),
        }
    }
}

/// What the successor's initrd carries besides the agent and the services.
#[derive(Debug, Clone, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Initrd {
    /// Files and folders, taken whole.
    pub include: Vec<PathBuf>,
    /// Modules that the successor loads before its agent starts, such as the driver of its network interface.
    pub modules: Vec<String>,
}

/// What those may have whom the configuration does not name.
#[derive(Debug, Clone, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// Memory that all services together may have which are neither listed nor root's, MiB; 0: there are none.
    pub unlisted_mib: u64,
}

/// The whole file.
#[derive(Debug, Clone, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// The addresses that move.
    pub network: Network,
    /// Programs that cross.
    pub service: Vec<Service>,
    /// Programs that are started anew.
    pub program: Vec<Program>,
    /// What others may have.
    pub limits: Limits,
    /// How updates are made.
    pub update: Update,
    /// What the successor's initrd carries.
    pub initrd: Initrd,
}

/// Why there is no configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read {path}; create it, or name another with --config")]
    Read {
        /// Which file.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: std::io::Error,
    },
    /// The file is not what it should be; the source names line and key.
    #[error("{path} is not a valid configuration")]
    Parse {
        /// Which file.
        path: PathBuf,
        /// Where and what.
        #[source]
        source: Box<toml::de::Error>,
    },
    /// A key that means nothing.
    #[error("{path}: there is no key `{}`{}", unknown.path, meant(unknown))]
    UnknownKey {
        /// Which file.
        path: PathBuf,
        /// Which key, and what may have been meant.
        unknown: Unknown,
    },
    /// The values contradict each other.
    #[error("{path}: {problem}")]
    Contradiction {
        /// Which file.
        path: PathBuf,
        /// What is wrong, and with which entry.
        problem: String,
    },
}

fn meant(unknown: &Unknown) -> String {
    unknown
        .nearest
        .as_ref()
        .map_or_else(|| "; baton-config.toml(5) lists all".to_owned(), |key| format!(": did you mean `{key}`?"))
}

/// All keys, with what they mean.
pub fn keys() -> Vec<Key> {
    let settings = SchemaSettings::default().with(|settings| settings.inline_subschemas = true);
    config_keys::of(&settings.into_generator().into_root_schema_for::<Config>())
}

impl Update {
    /// How long a step may take.
    pub fn step_timeout(&self) -> std::time::Duration {
        std::time::Duration::from_secs(self.step_timeout_s)
    }

    /// All memory that was kept for a successor.
    pub fn reserved(&self) -> RangeSet {
        self.reserved.iter().map(|reserved| reserved.range()).collect()
    }
}

impl Config {
    /// Reads and checks the file. Where nobody has written one at [`DEFAULT_PATH`], everything is as it is without wishes; a file that was
    /// named must be there.
    pub fn load(path: &Path) -> Result<Config, ConfigError> {
        match std::fs::read_to_string(path) {
            Ok(text) => Config::parse(path, &text),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound && path == Path::new(DEFAULT_PATH) => {
                Ok(Config::default())
            }
            Err(source) => Err(ConfigError::Read { path: path.to_owned(), source }),
        }
    }

    /// Checks the text of a file; `path` is for errors.
    pub fn parse(path: &Path, text: &str) -> Result<Config, ConfigError> {
        let at = || path.to_owned();
        let parse = |source| ConfigError::Parse { path: at(), source: Box::new(source) };
        let table: toml::Table = toml::from_str(text).map_err(parse)?;
        if let Some(unknown) = config_keys::unknown(&keys(), &table) {
            return Err(ConfigError::UnknownKey { path: at(), unknown });
        }
        let config: Config = toml::from_str(text).map_err(parse)?;
        match config.contradiction() {
            None => Ok(config),
            Some(problem) => Err(ConfigError::Contradiction { path: at(), problem }),
        }
    }

    /// What is wrong with values that are each well-formed, if anything.
    fn contradiction(&self) -> Option<String> {
        let mut names: Vec<&str> = self.service.iter().map(|s| s.name.as_str()).collect();
        names.sort_unstable();
        if let Some(twice) = names.windows(2).find(|pair| pair[0] == pair[1]) {
            return Some(format!("service `{}` is listed twice", twice[0]));
        }
        let programs = self.program.iter().map(|p| (&p.name, &p.exec));
        for (name, exec) in self.service.iter().map(|s| (&s.name, &s.exec)).chain(programs) {
            if exec.first().is_none_or(|program| !program.starts_with('/')) {
                return Some(format!("`{name}`: exec must begin with the absolute path of a program"));
            }
        }
        // It starts programs with the rights of root, and hands out memory by name.
        if let Some(service) = self.service.iter().find(|service| service.fd_store && service.user.is_some()) {
            return Some(format!(
                "service `{}`: with fd_store, `user` is not taken: let the program give up root's rights itself",
                service.name
            ));
        }
        if self.limits.unlisted_mib > MAX_ARENA >> 20 {
            return Some(format!("limits.unlisted_mib is {}, more than any arena", self.limits.unlisted_mib));
        }
        if self.update.require_commit && self.update.probation_s == 0 {
            return Some(
                "update.require_commit needs a time in which it can be said: set update.probation_s".to_owned(),
            );
        }
        if self.network.service_address.is_some() && self.network.nic.len() < 2 {
            return Some(format!(
                "a service address needs two network.nic entries to move between, there are {}",
                self.network.nic.len()
            ));
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Config, toml::de::Error> {
        toml::from_str(text)
    }

    #[test]
    fn an_empty_file_is_the_default() {
        let config = parse("").unwrap();
        assert_eq!(config.update.region_mib, 512);
        assert!(config.contradiction().is_none());
    }

    /// Every key that there is, each with a value: whoever adds one is told by the compiler to add it here.
    fn full() -> Config {
        let cidr = Cidr { address: Ipv4Addr::LOCALHOST, prefix: 8 };
        Config {
            network: Network {
                service_address: Some(cidr),
                nic: vec![Nic { mac: "52:54:00:00:00:01".into(), address: cidr }],
                configure: true,
                skip_reach_check: true,
            },
            service: vec![Service {
                name: "kv".into(),
                exec: vec!["/kv".into()],
                user: Some("kv".into()),
                fd_store: true,
            }],
            program: vec![Program { name: "sshd".into(), exec: vec!["/sshd".into()] }],
            limits: Limits { unlisted_mib: 1 },
            update: Update {
                region_mib: 1,
                require_signature: true,
                signing_certificates: vec!["/c".into()],
                cmdline: "quiet".into(),
                boot_timeout_s: 1,
                step_timeout_s: 1,
                cutover_timeout_ms: 1,
                probation_s: 1,
                require_commit: true,
                reserved: vec![Reserved::try_from("1M$1G".to_owned()).unwrap()],
                accept: vec![Accept::Mounts],
            },
            initrd: Initrd { include: vec!["/bin".into()], modules: vec!["virtio_net".into()] },
        }
    }

    /// The paths of all keys in a file.
    fn paths(value: &toml::Value, above: &str, into: &mut Vec<String>) {
        match value {
            toml::Value::Table(table) => {
                for (name, value) in table {
                    let path = if above.is_empty() { name.clone() } else { format!("{above}.{name}") };
                    into.push(path.clone());
                    paths(value, &path, into);
                }
            }
            toml::Value::Array(items) if items.iter().any(toml::Value::is_table) => {
                items.iter().for_each(|item| paths(item, &format!("{above}[]"), into));
            }
            _ => {}
        }
    }

    #[test]
    fn each_key_is_known_with_its_meaning_and_its_default() {
        let mut written = Vec::new();
        paths(&toml::Value::try_from(full()).unwrap(), "", &mut written);
        let keys = keys();
        let mut known: Vec<String> = keys.iter().map(|key| key.path.clone()).collect();
        written.sort();
        known.sort();
        assert_eq!(known, written);
        let defaults = serde_json::to_value(Config::default()).unwrap();
        for key in &keys {
            assert!(key.meaning.len() > 10 && !key.meaning.contains(['`', '[']), "{key:?}");
            assert!(key.kind != "value", "{key:?}");
            // Keys of list entries have no file to be left out of; `default` of the others is what the code does.
            if !key.is_table() && !key.path.contains("[]") {
                let pointer = format!("/{}", key.path.replace('.', "/"));
                let really = defaults.pointer(&pointer).map(ToString::to_string).filter(|default| default != "null");
                assert_eq!(key.default.clone().filter(|default| default != "null"), really, "{key:?}");
            }
        }
        let readme = include_str!("../../README.md");
        for key in keys.iter().filter(|key| !key.is_table()) {
            assert!(readme.contains(&format!("\n{} = ", key.name())), "agent/README.md does not show {}", key.path);
        }
    }

    #[test]
    fn without_a_file_there_are_no_wishes_but_a_file_that_is_named_must_be_there() {
        let missing = Path::new("/nowhere/config.toml");
        assert!(matches!(Config::load(missing), Err(ConfigError::Read { .. })));
        if !Path::new(DEFAULT_PATH).exists() {
            let config = Config::load(Path::new(DEFAULT_PATH)).unwrap();
            assert_eq!(toml::to_string(&config).unwrap(), toml::to_string(&Config::default()).unwrap());
        }
    }

    #[test]
    fn a_key_that_is_not_known_is_told_with_the_one_that_was_meant() {
        let told = |text: &str| match Config::parse(Path::new("/f"), text).unwrap_err() {
            ConfigError::UnknownKey { unknown, .. } => (unknown.path, unknown.nearest.unwrap_or_default()),
            other => panic!("{other:?}"),
        };
        let pair = |path: &str, nearest: &str| (path.to_owned(), nearest.to_owned());
        assert_eq!(told("[update]\nregoin_mib = 3"), pair("update.regoin_mib", "update.region_mib"));
        assert_eq!(told("[updates]\n"), pair("updates", "update"));
        assert_eq!(told("region_mib = 3"), pair("region_mib", "update.region_mib"));
        assert_eq!(
            told("[[network.nic]]\nmac = 'x'\naddress = '1.2.3.4/8'\n[[network.nic]]\nadress = '1.2.3.4/8'"),
            pair("network.nic[].adress", "network.nic[].address")
        );
        assert_eq!(told("[update]\nqqq = 1"), pair("update.qqq", ""));
        let error = Config::parse(Path::new("/f"), "[update]\nregoin_mib = 3").unwrap_err().to_string();
        assert_eq!(error, "/f: there is no key `update.regoin_mib`: did you mean `update.region_mib`?");
        // What is no table at all is the parser's: it names the line.
        assert!(matches!(Config::parse(Path::new("/f"), "update = 3"), Err(ConfigError::Parse { .. })));
    }

    #[test]
    fn an_unknown_key_is_refused_by_name() {
        let error = parse("[update]\nregoin_mib = 3").unwrap_err().to_string();
        assert!(error.contains("regoin_mib"), "{error}");
    }

    #[test]
    fn a_network_is_shared_with_the_same_leading_bits_and_no_fewer() {
        let cidr = |text: &str| Cidr::try_from(text.to_owned()).unwrap();
        let shares = |one: &str, other: &str| cidr(one).network() == cidr(other).network();
        assert!(shares("10.77.0.10/24", "10.77.0.12/24") && shares("1.2.3.4/0", "9.9.9.9/0"));
        assert!(!shares("10.77.0.10/24", "10.77.1.10/24") && !shares("10.77.0.10/24", "10.77.0.12/16"));
        assert!(shares("10.0.0.1/32", "10.0.0.1/32") && !shares("10.0.0.1/32", "10.0.0.2/32"));
    }

    #[test]
    fn a_bad_address_says_what_is_expected() {
        for bad in ["10.0.0.1", "10.0.0/24", "10.0.0.1/33"] {
            let error = parse(&format!("[network]\nservice_address = \"{bad}\"")).unwrap_err().to_string();
            assert!(error.contains("ADDRESS/PREFIX"), "{error}");
        }
    }

    #[test]
    fn what_is_accepted_has_a_name() {
        let accept = |names: &str| parse(&format!("[update]\naccept = [{names}]")).map(|config| config.update.accept);
        assert_eq!(accept("\"mounts\", \"dns\"").unwrap(), [Accept::Mounts, Accept::Dns]);
        let error = accept("\"all\"").unwrap_err().to_string();
        assert!(error.contains("`all`") && error.contains("`mounts`") && error.contains("`sysctls`"), "{error}");
    }

    #[test]
    fn memory_is_written_as_on_the_command_line() {
        let update = |value: &str| parse(&format!("[update]\nreserved = [\"{value}\"]")).map(|config| config.update);
        let range = Range::new(0x4000_0000, 0x6000_0000);
        for same in ["512M$0x40000000", "0x20000000$1G", "536870912$1073741824", "524288k$1g"] {
            assert_eq!(update(same).unwrap().reserved(), range.into(), "{same}");
        }
        assert_eq!(String::from(update("512M$1G").unwrap().reserved[0]), "0x20000000$0x40000000");
        for bad in ["512M", "512M!1G", "0$1G", "$", "M$G", "512M$", "99999999999999999999$1", "16777216T$1", "é$1"] {
            let error = update(bad).unwrap_err().to_string();
            assert!(error.contains("SIZE$ADDRESS"), "{bad}: {error}");
        }
    }

    #[test]
    fn contradictions_name_the_entry() {
        let one_nic =
            parse("[network]\nservice_address=\"10.0.0.1/24\"\n[[network.nic]]\nmac=\"x\"\naddress=\"10.0.0.2/24\"");
        assert!(one_nic.unwrap().contradiction().unwrap().contains("there are 1"));
        let relative = parse("[[service]]\nname=\"kv\"\nexec=[\"baton-kv\"]");
        assert!(relative.unwrap().contradiction().unwrap().contains("`kv`"));
        let stored = parse("[[service]]\nname=\"memo\"\nexec=[\"/m\"]\nfd_store=true\nuser=\"memo\"");
        assert!(stored.unwrap().contradiction().unwrap().contains("`memo`: with fd_store"));
        let twice = "[[service]]\nname=\"kv\"\nexec=[\"/a\"]\n";
        let twice = parse(&format!("{twice}{twice}"));
        assert!(twice.unwrap().contradiction().unwrap().contains("twice"));
    }
}
