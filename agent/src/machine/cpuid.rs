//! What this machine's CPUs say of themselves (the instruction CPUID).

use raw_cpuid::{CpuId, CpuIdReaderNative, ExtendedTopologyIter, TopologyType};

/// Whether they have pages of 1 GiB (`pdpe1gb`).
pub fn gigabyte_pages() -> bool {
    CpuId::new().get_extended_processor_and_feature_identifiers().is_some_and(|features| features.has_1gib_pages())
}

/// Bits of an APIC id that tell the threads of one core apart: by the leaves of the topology, as Linux reads them, else by AMD's own.
pub fn thread_bits() -> u32 {
    let cpuid = CpuId::new();
    let of_threads = |levels: Option<ExtendedTopologyIter<CpuIdReaderNative>>| {
        let level = levels?.find(|level| level.level_type() == TopologyType::SMT)?;
        Some(level.shift_right_for_next_apic_id())
    };
    let amd = || Some(u32::from(cpuid.get_processor_topology_info()?.threads_per_core()).next_power_of_two().ilog2());
    of_threads(cpuid.get_extended_topology_info_v2())
        .or_else(|| of_threads(cpuid.get_extended_topology_info()))
        .or_else(amd)
        .unwrap_or(0)
}
