//! The parts of sysfs and procfs that an update moves: CPUs on- and offline, drivers bound and unbound, DMA stopped,
//! memory blocks onlined. Each write that has an undo is a pair here.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

fn write(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).with_context(|| format!("cannot write `{text}` to {}", path.display()))
}

fn cpu_file(cpu: u32) -> PathBuf {
    PathBuf::from(format!("/sys/devices/system/cpu/cpu{cpu}/online"))
}

/// Takes a CPU offline. Its undo is [`online_cpu`].
pub fn offline_cpu(cpu: u32) -> Result<()> {
    write(&cpu_file(cpu), "0")
}

/// Brings a CPU online.
pub fn online_cpu(cpu: u32) -> Result<()> {
    write(&cpu_file(cpu), "1")
}

/// A PCI function's place: bus, device, function (`bus << 8 | device << 3 | function`), in segment 0.
pub type Bdf = u16;

/// Writes `0000:00:03.0`.
pub fn bdf_name(bdf: Bdf) -> String {
    format!("0000:{:02x}:{:02x}.{}", bdf >> 8, (bdf >> 3) & 0x1f, bdf & 7)
}

/// Reads `0000:00:03.0`, of any segment.
pub fn parse_bdf(name: &str) -> Option<Bdf> {
    let (rest, function) = name.rsplit_once('.')?;
    let mut parts = rest.rsplit(':');
    let device = u16::from_str_radix(parts.next()?, 16).ok()?;
    let bus = u16::from_str_radix(parts.next()?, 16).ok()?;
    let function: u16 = function.parse().ok()?;
    (bus < 256 && device < 32 && function < 8).then_some(bus << 8 | device << 3 | function)
}

/// The PCI function behind a network interface: the nearest ancestor of its device whose name is a PCI address.
pub fn pci_function_of(interface: &str) -> Result<(Bdf, PathBuf)> {
    let device = Path::new("/sys/class/net").join(interface).join("device");
    let real = fs::canonicalize(&device).with_context(|| format!("{interface} has no device"))?;
    real.ancestors()
        .find_map(|folder| {
            let name = folder.file_name()?.to_str()?;
            Some((parse_bdf(name)?, folder.to_owned()))
        })
        .with_context(|| format!("{interface} is no PCI function ({})", real.display()))
}

/// A driver taken off its device; [`Unbound::bind`] is the undo.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Unbound {
    device: String,
    driver: PathBuf,
}

/// Takes the driver off a PCI function, which stops it. Nothing when it has none.
pub fn unbind(folder: &Path) -> Result<Option<Unbound>> {
    let driver = match fs::canonicalize(folder.join("driver")) {
        Ok(driver) => driver,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error).with_context(|| format!("cannot find the driver of {}", folder.display())),
    };
    let name = folder.file_name().and_then(|name| name.to_str()).context("a PCI function without a name")?;
    write(&driver.join("unbind"), name)?;
    Ok(Some(Unbound { device: name.to_owned(), driver }))
}

impl Unbound {
    /// Gives the device back to its driver.
    pub fn bind(&self) -> Result<()> {
        write(&self.driver.join("bind"), &self.device)
    }
}

/// Lets the kernel look for drivers of PCI functions that have none: an interface that was to be granted.
pub fn probe_drivers() -> Result<()> {
    let root = Path::new("/sys/bus/pci");
    for entry in fs::read_dir(root.join("devices")).context("cannot list PCI functions")? {
        let entry = entry?;
        if !entry.path().join("driver").exists() {
            // For a function that no driver wants this write fails, as it should.
            let _ = fs::write(root.join("drivers_probe"), entry.file_name().to_string_lossy().as_bytes());
        }
    }
    Ok(())
}

/// An IOMMU group whose DMA was translated, and is not now; [`Translated::translate_again`] is the undo.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Translated {
    /// The function for whose sake it was done.
    function: PathBuf,
    /// How its group was translated (`DMA`, `DMA-FQ`).
    how: String,
}

/// Where an IOMMU group's kind is written (Documentation/ABI/testing/sysfs-kernel-iommu_groups). It can be changed only while no
/// function of the group has a driver.
const GROUP_TYPE: &str = "iommu_group/type";
/// DMA goes where it says, untranslated.
const IDENTITY: &str = "identity";

/// How a function's DMA is translated; nothing where no IOMMU does that.
pub fn translated(function: &Path) -> Result<Option<Translated>> {
    let path = function.join(GROUP_TYPE);
    match fs::read_to_string(&path) {
        Ok(how) if how.trim() == IDENTITY => Ok(None),
        Ok(how) => Ok(Some(Translated { function: function.to_owned(), how: how.trim().to_owned() })),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).with_context(|| format!("cannot read {}", path.display())),
    }
}

impl Translated {
    /// Has the function's DMA go where it says. It has no driver.
    pub fn pass_through(&self) -> Result<()> {
        write(&self.function.join(GROUP_TYPE), IDENTITY)
    }

    /// As it was. The function is stopped first: whoever had it gave it addresses that mean something else now.
    pub fn translate_again(&self) -> Result<()> {
        stop_function(&self.function)?;
        write(&self.function.join(GROUP_TYPE), &self.how)
    }
}

/// Offset of the command register, and its bus-master bit (PCI Local Bus Specification 3.0, section 6.2.2).
const PCI_COMMAND: u64 = 0x04;
const PCI_COMMAND_MASTER: u8 = 1 << 2;

/// All PCI functions that this kernel sees.
const PCI_DEVICES: &str = "/sys/bus/pci/devices";

/// Where a function is that this kernel sees in this segment.
pub fn function_folder(segment: u32, bdf: Bdf) -> PathBuf {
    Path::new(PCI_DEVICES).join(format!("{segment:04x}{}", &bdf_name(bdf)[4..]))
}

/// A PCI function that this kernel sees.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Function {
    /// Its folder.
    pub folder: PathBuf,
    /// A driver has it.
    pub has_driver: bool,
}

/// A function that this kernel sees, in whichever segment; nothing when it does not.
pub fn function(bdf: Bdf) -> Result<Option<Function>> {
    let folders = fs::read_dir(PCI_DEVICES).context("cannot list PCI functions")?;
    let named = |folder: &fs::DirEntry| folder.file_name().to_str().and_then(parse_bdf) == Some(bdf);
    let found = folders.flatten().find(named).map(|entry| entry.path());
    Ok(found.map(|folder| Function { has_driver: folder.join("driver").exists(), folder }))
}

/// Stops a PCI function: driver off, bus mastering off.
pub fn stop_function(folder: &Path) -> Result<()> {
    use std::os::unix::fs::FileExt;
    unbind(folder)?;
    let config = fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(folder.join("config"))
        .with_context(|| format!("cannot open the configuration space of {}", folder.display()))?;
    let mut command = [0u8; 1];
    config.read_exact_at(&mut command, PCI_COMMAND)?;
    if command[0] & PCI_COMMAND_MASTER != 0 {
        config.write_all_at(&[command[0] & !PCI_COMMAND_MASTER], PCI_COMMAND)?;
    }
    Ok(())
}

/// Stops every PCI function of this kernel, for one that is about to leave the machine: what DMA wrote afterwards would hit its
/// heir's memory. Bridges are left alone; they start nothing themselves. So is `granted`: this kernel still sees the heir's
/// functions, and must not touch them.
pub fn quiesce_pci(granted: &[Bdf]) -> Result<Vec<String>> {
    const BRIDGE_CLASS: &str = "0x06";
    let mut stopped = Vec::new();
    let Ok(folders) = fs::read_dir(PCI_DEVICES) else { return Ok(stopped) };
    for folder in folders {
        let folder = folder?.path();
        let folder = fs::canonicalize(&folder).with_context(|| format!("cannot follow {}", folder.display()))?;
        let name = folder.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let is_granted = parse_bdf(&name).is_some_and(|bdf| granted.contains(&bdf));
        if is_granted || fs::read_to_string(folder.join("class"))?.starts_with(BRIDGE_CLASS) {
            continue;
        }
        stop_function(&folder)?;
        stopped.push(name);
    }
    Ok(stopped)
}

/// Stops watchdogs that are armed, for a kernel that is about to leave: nobody would pet them. One whose driver is in use by a
/// program is stopped by taking its driver away. Says which; what cannot be stopped is only logged, since there is no way back here.
pub fn quiesce_watchdogs() -> Vec<String> {
    let mut stopped = Vec::new();
    let Ok(folders) = fs::read_dir("/sys/class/watchdog") else { return stopped };
    for folder in folders.flatten().map(|entry| entry.path()) {
        if fs::read_to_string(folder.join("state")).is_ok_and(|state| state.trim() == "active") {
            let name = folder.file_name().unwrap_or_default().to_string_lossy().into_owned();
            match stop_watchdog(&folder, &name) {
                Ok(()) => stopped.push(name),
                Err(error) => tracing::error!("{name} is armed and will reset the machine: {error:#}"),
            }
        }
    }
    stopped
}

/// A `V` before the close stops it (Documentation/watchdog/watchdog-api.rst), unless the driver was told never to.
fn stop_watchdog(folder: &Path, name: &str) -> Result<()> {
    if fs::write(Path::new("/dev").join(name), "V").is_err() {
        // Somebody has it open, or its node is not here.
        let device = fs::canonicalize(folder.join("device")).context("it has no device")?;
        unbind(&device)?;
    }
    match fs::read_to_string(folder.join("state")) {
        Ok(state) if state.trim() == "active" => bail!("it does not stop (is `nowayout` set?)"),
        _ => Ok(()),
    }
}

/// How hot-added memory is onlined from now on: `online_movable` keeps it free of what cannot be moved away again.
pub fn set_auto_online(policy: &str) -> Result<()> {
    write(Path::new("/sys/devices/system/memory/auto_online_blocks"), policy)
}

/// A successor's panic restarts nothing (`kexec_core::cmdline`); once the machine is its own, it does what was asked for.
pub fn grant_panic_wish() -> Result<()> {
    match kexec_core::cmdline::panic_wish(&fs::read_to_string("/proc/cmdline")?) {
        Some(seconds) => write(Path::new("/proc/sys/kernel/panic"), &seconds.to_string()),
        None => Ok(()),
    }
}

/// No kernel is loaded for kexec any more, but for one that is to run after a panic: one that was started so would have the tables and the
/// memory map with which this kernel was booted, which tell of a part of the machine. There is no way back in this kernel (`kexec_load_limit_reboot`
/// only goes down).
pub fn hold_kexec() -> Result<()> {
    let limit = Path::new("/proc/sys/kernel/kexec_load_limit_reboot");
    // A kernel without kexec has no such file.
    if limit.exists() { write(limit, "0") } else { Ok(()) }
}

/// Says how many KiB of RAM this kernel manages (`MemTotal`).
pub fn mem_total_kib() -> Result<u64> {
    let text = fs::read_to_string("/proc/meminfo")?;
    text.lines()
        .find_map(|line| line.strip_prefix("MemTotal:")?.split_whitespace().next()?.parse().ok())
        .context("/proc/meminfo has no MemTotal")
}

/// Where the memory-mapped configuration space of PCI segment 0 is: `(address of bus 0, last bus)`.
///
/// ACPI table MCFG (PCI Firmware Specification 3.3, section 4.1.2): 44 bytes of header, then 16 bytes per segment:
/// base address, segment, first bus, last bus.
pub fn ecam() -> Result<(u64, u8)> {
    let path = "/sys/firmware/acpi/tables/MCFG";
    let table = fs::read(path).with_context(|| format!("cannot read {path}: is this a PCIe machine?"))?;
    parse_mcfg(&table).with_context(|| format!("{path} describes no segment 0"))
}

fn parse_mcfg(table: &[u8]) -> Option<(u64, u8)> {
    table.get(44..)?.chunks_exact(16).find_map(|entry| {
        let base = u64::from_le_bytes(entry[..8].try_into().ok()?);
        let segment = u16::from_le_bytes(entry[8..10].try_into().ok()?);
        let (first, last) = (entry[10], entry[11]);
        // The address is that of bus 0, even where the first decoded bus is another.
        (segment == 0 && first <= last).then_some((base, last))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pci_addresses_round_trip() {
        for bdf in [0u16, 0x0018, 0x0120, 0xffff] {
            assert_eq!(parse_bdf(&bdf_name(bdf)), Some(bdf));
            let elsewhere = function_folder(2, bdf).file_name().unwrap().to_string_lossy().into_owned();
            assert!(elsewhere.starts_with("0002:") && parse_bdf(&elsewhere) == Some(bdf), "{elsewhere}");
        }
        assert_eq!(parse_bdf("virtio0"), None);
        assert_eq!(parse_bdf("0000:00:20.0"), None);
        assert_eq!(parse_bdf("pci0000:00"), None);
    }

    #[test]
    fn mcfg_is_read_with_bounds() {
        let mut table = vec![0u8; 44];
        assert_eq!(parse_mcfg(&table), None);
        table.extend_from_slice(&0xb000_0000u64.to_le_bytes());
        table.extend_from_slice(&[0, 0, 0, 0xff, 0, 0, 0, 0]);
        assert_eq!(parse_mcfg(&table), Some((0xb000_0000, 0xff)));
        assert_eq!(parse_mcfg(&table[..50]), None);
    }
}
