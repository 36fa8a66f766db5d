//! Initrds in which something goes wrong, in the successor only: its first program is theirs (`rdinit=/trap`), and goes on as the agent's.

use agent::userland::initrd::Initrd;
use anyhow::Result;

/// The demo service is replaced by a script of these commands before `baton-init` runs.
///
/// # Errors
/// The initrd cannot be packed.
pub fn service(commands: &str) -> Result<Vec<u8>> {
    packed(&format!(
        "rm /usr/sbin/baton-kv\n\
         printf '#!/bin/sh\\n{commands}\\n' > /usr/sbin/baton-kv\nchmod 755 /usr/sbin/baton-kv"
    ))
}

/// These commands are given as soon as the successor has had so many CPUs for a second: when it serves, and the CPUs that can follow have.
///
/// # Errors
/// The initrd cannot be packed.
pub fn once_it_has(cpus: u32, commands: &str) -> Result<Vec<u8>> {
    packed(&format!(
        "(\n\
         until [ \"$(grep -c ^processor /proc/cpuinfo 2> /dev/null)\" -ge {cpus} ] 2> /dev/null; do sleep 0.2; done\n\
         sleep 1\n{commands}\n) &"
    ))
}

fn packed(commands: &str) -> Result<Vec<u8>> {
    let mut initrd = Initrd::new();
    initrd.file("/trap", 0o755, format!("#!/bin/sh\n{commands}\nexec /init\n"));
    Ok(initrd.bytes()?)
}
