//! Initrds in which something goes wrong, for the successor only.

use agent::userland::initrd::Initrd;
use anyhow::Result;

/// With `rdinit=/trap`: before `baton-init` runs, the demo service is replaced by a script of these commands.
pub fn service(commands: &str) -> Result<Vec<u8>> {
    let mut initrd = Initrd::new();
    let script = format!(
        "#!/bin/sh\nrm /usr/sbin/baton-kv\n\
         printf '#!/bin/sh\\n{commands}\\n' > /usr/sbin/baton-kv\nchmod 755 /usr/sbin/baton-kv\nexec /init\n"
    );
    initrd.file("/trap", 0o755, script);
    Ok(initrd.bytes()?)
}
