//! `cargo demo lab`: only the setting up.

use clap::Args;
use demos::lab::{Lab, Progress, server, tree};

#[derive(Debug, Args)]
pub struct LabArguments {
    /// Remove everything that the lab keeps in the cache folder
    #[arg(long)]
    clean: bool,
    /// Build the kernel with kexec handover too, which is else built when a demo or a test first wants it
    #[arg(long, conflicts_with = "clean")]
    kho: bool,
    /// Make the disk of the Debian server too, likewise
    #[arg(long, conflicts_with = "clean")]
    server: bool,
}

pub fn run(arguments: &LabArguments) -> anyhow::Result<()> {
    if arguments.clean {
        return Ok(tree::clean(Progress::auto())?);
    }
    let mut lab = Lab::set_up(Progress::auto())?;
    if arguments.kho {
        lab.kernel_with_kho()?;
    }
    if arguments.server {
        println!("server: {}", server::image::open(lab.tree(), lab.progress())?.display());
    }
    println!("tree: {}", lab.tree().root().display());
    for kernel in lab.tree().kernels() {
        println!("kernel: {} ({})", kernel.release, kernel.version);
    }
    Ok(())
}
