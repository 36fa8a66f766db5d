//! What kernels say on their serial ports, and what they must never say.

use demos::lab::Machine;

/// Words that no kernel of ours may print: its own warnings, and those of the module, which the tests would otherwise not see.
const FORBIDDEN: [&str; 11] = [
    "WARNING:",
    "BUG:",
    "cut here",
    "Oops:",
    "general protection",
    "Kernel panic",
    "insecure W+X",
    "detected stalls",
    "soft lockup",
    "blocked for more than",
    "Call Trace",
];
/// A warning about the processor's flaws, not about the kernel.
const ALLOWED: &str = "Speculative Return Stack Overflow: WARNING: See https://kernel.org/doc/";
/// CONFIG_DEBUG_WX's verdict on a kernel's page tables, after its boot.
pub const NO_WX: &str = "Checked W+X mappings: passed";

/// The lines that no kernel may print.
pub fn complaints_in(text: &str) -> Vec<String> {
    let bad = |line: &&str| !line.contains(ALLOWED) && FORBIDDEN.iter().any(|word| line.contains(word));
    text.lines().filter(bad).map(|line| line.trim().to_owned()).collect()
}

/// Those of both ports, from the beginning on.
pub fn complaints(machine: &Machine) -> Vec<String> {
    (0..2).flat_map(|port| complaints_in(&machine.serial(port).text_from(0))).collect()
}

/// How often a text stands in a port's log.
pub fn count(machine: &Machine, port: usize, text: &str) -> usize {
    machine.serial(port).text_from(0).matches(text).count()
}
