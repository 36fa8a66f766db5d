//! A kernel with kexec handover takes Baton's memory and data as if kexec had brought them: it says that it found them, shows the blobs
//! byte for byte, keeps every preserved page while all other memory is written, and gives a memfd back on its pages. The same from
//! such a kernel to another one, to a stock kernel, and back; and nothing becomes less from update to update. The kernel's own selftests for
//! LUO are a judge: their second stage passes after each update on whose incumbent the first one ran.

use anyhow::Result;
use baton_tests::{NEW, Turn};
use demos::lab::{Lab, Progress};
use demos::story::kho;

/// To it, from it to itself, to the stock kernel, and back.
const HOPS: usize = 4;

#[test]
fn kernels_with_kho_take_what_is_handed_over_and_hand_it_on() -> Result<()> {
    let mut lab = Lab::set_up(Progress::Lines)?;
    // Before it is our turn: it may have to be built.
    lab.kernel_with_kho()?;
    let _turn = Turn::take();
    let report = kho::run(&mut lab, HOPS)?;
    let told = kho::for_people(&report);
    assert_eq!(report.hops.len(), HOPS, "{told}");
    assert_eq!(report.objections, [""; 0], "{told}");
    let without: Vec<_> = report.hops.iter().filter(|hop| hop.kho_abi.is_none()).collect();
    assert_eq!(without.len(), 1, "{told}");
    assert!(without[0].successor_release.starts_with(NEW), "{told}");
    Ok(())
}
