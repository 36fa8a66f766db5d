//! The values whose bytes are golden: every field and every variant is in one of them.

use state_schemas::connection::{
    Agreed, Connection, Endpoint, Family, Keepalive, Lengths, Scale, Settings, State, Window,
};
use state_schemas::connections::Bytes;
use state_schemas::handover_record::*;
use state_schemas::header::{FIRST_CARRIED_KIND, Frame};
use state_schemas::message::{Attached, Counted, Ending, Examination, LiveUpdate, ToIncumbent, ToSuccessor};
use state_schemas::platform::{Platform, PowerButton, PowerOff, Register, Reset};
use state_schemas::v1;

const MIB: u64 = 1 << 20;

pub const REGION: PhysRange = PhysRange { start: 512 * MIB, len: 256 * MIB };

const fn range(start: u64, len: u64) -> PhysRange {
    PhysRange { start, len }
}

/// What version 1 can say. Its bytes were released.
pub fn record_1() -> HandoverRecord {
    HandoverRecord {
        update: UpdateId(*b"0123456789abcdef"),
        hop: 3,
        epoch: 7,
        incumbent: Program { release: "6.12.95+deb13-cloud-amd64".into(), agent_version: "0.1.0".into() },
        clock: ClockPair { tsc: 0x1122_3344_5566_7788, unix_ns: 1_795_000_000_000_000_000, tsc_khz: 2_400_000 },
        machine: Machine {
            ram: vec![range(0x1000, 0x9e000), range(MIB, 2047 * MIB)],
            memory_block: 128 * MIB,
            cpus: (0..4).map(|apic_id| Cpu { apic_id, firmware_boot: apic_id == 0 }).collect(),
        },
        grant: Grant {
            instance: 2,
            boot_cpu: 3,
            region: REGION,
            low_slot: range(0x10000, 0x20000),
            fragments: vec![range(768 * MIB, 64 * MIB)],
            blocks: vec![range(1024 * MIB, 128 * MIB), range(1152 * MIB, 128 * MIB)],
        },
        arenas: vec![Arena {
            id: 1,
            name: "kv".into(),
            ranges: vec![range(768 * MIB, 16 * MIB), range(800 * MIB, 16 * MIB)],
            len: 20 * MIB,
        }],
        services: vec![Service {
            name: "kv".into(),
            schema_kind: u32::from_le_bytes(*b"KVST"),
            schema_version: 1,
            arenas: vec![1],
            port: 6379,
        }],
        files: vec![],
        network: Network {
            service: Some(IpNet { address: Ip::V4([10, 77, 0, 10]), prefix: 24 }),
            gateway: None,
            management: Some(IpNet { address: Ip::V6([0xfd; 16]), prefix: 64 }),
            functions: vec![PciFunction {
                bus: 0,
                devfn: 0x18,
                role: Role::Service,
                mac: Some([0x52, 0x54, 0, 1, 2, 3]),
            }],
        },
        ecam: Some(Ecam { address: 0xb000_0000, segment: 0, bus_end: 255 }),
        retired: vec![Retired { instance: 1, memory: range(0, MIB) }],
        journal: vec![PhaseMark { phase: "granted".into(), start_tsc: 10, end_tsc: 20 }],
        kho: None,
        carried: vec![],
    }
}

/// The same as version 1 has it.
pub fn record_as_1() -> v1::record::HandoverRecord {
    let HandoverRecord {
        update,
        hop,
        epoch,
        incumbent,
        clock,
        machine,
        grant,
        arenas,
        network,
        ecam,
        retired,
        journal,
        ..
    } = record_1();
    let services = vec![v1::record::Service {
        name: "kv".into(),
        schema_kind: u32::from_le_bytes(*b"KVST"),
        schema_version: 1,
        arena: 1,
        port: 6379,
    }];
    v1::record::HandoverRecord {
        update,
        hop,
        epoch,
        incumbent,
        clock,
        machine,
        grant,
        arenas,
        services,
        network,
        ecam,
        retired,
        journal,
    }
}

/// A payload of a Baton that is newer than this one.
pub fn stranger() -> Frame<'static> {
    Frame { kind: FIRST_CARRIED_KIND + 900, version: 17, payload: b"what is this" }
}

/// What version 2 can say: a second arena of the service, one of a file, one of nobody.
pub fn record() -> HandoverRecord {
    let mut record = record_1();
    for (id, name) in [(2, "kv journal"), (3, "fd:cache"), (7, "left")] {
        let ranges = vec![range((816 + 2 * u64::from(id)) * MIB, 2 * MIB)];
        record.arenas.push(Arena { id, name: name.into(), ranges, len: 2 * MIB });
    }
    record.services[0].arenas.push(2);
    record.files = vec![File { service: "web".into(), name: "cache".into(), arena: 3, len: 5000, seals: 0x0e }];
    record.kho = Some(Kho {
        abi: "kho-v4".into(),
        fdt: range(514 * MIB, 4096),
        scratch: range(515 * MIB, 16),
        room: range(513 * MIB, 31 * MIB),
    });
    record.carried = vec![stranger().to_bytes()];
    record
}

pub fn platform() -> Platform {
    let (control, status) = (Register::Port(0x605), Register::Port(0x601));
    Platform {
        power_off: Some(PowerOff { control, status, sleep_type: 5 }),
        reset: Some(Reset { register: Register::Memory(0xfed8_0cf9), value: 15 }),
        power_button: Some(PowerButton { status, enable: Register::Port(0x603) }),
    }
}

pub fn to_successor() -> Vec<ToSuccessor> {
    vec![
        ToSuccessor::StandBy,
        ToSuccessor::CheckHealth,
        ToSuccessor::Activate { epoch: 8 },
        ToSuccessor::CpuParked { apic_id: 2 },
        ToSuccessor::ReleaseCpu { apic_id: 2 },
        ToSuccessor::StandDown { epoch: 8 },
        ToSuccessor::Commit { timeline: record().journal },
        ToSuccessor::LastCpu { apic_id: 0 },
        ToSuccessor::Abort { reason: "the operator asked".into() },
        ToSuccessor::Ping { nonce: u64::MAX },
        ToSuccessor::Examine,
        ToSuccessor::RunCheck { command: "redis-cli ping".into(), limit_ms: 30_000 },
        ToSuccessor::Connections { at: 3, total: 9, bytes: vec![1, 2, 3] },
    ]
}

pub fn to_incumbent() -> Vec<ToIncumbent> {
    vec![
        ToIncumbent::Hello {
            program: Program { release: "7.3.4+deb13-cloud-amd64".into(), agent_version: "0.1.0".into() },
            abi: 1,
        },
        ToIncumbent::Standing { services: vec!["kv".into()] },
        ToIncumbent::Healthy,
        ToIncumbent::Activated { epoch: 8, tsc: 99 },
        ToIncumbent::CpuOnline { apic_id: 2, cpu: 1 },
        ToIncumbent::CpuReleased { apic_id: 2 },
        ToIncumbent::StoodDown { epoch: 8 },
        ToIncumbent::Committed,
        ToIncumbent::Failed { what: "activate".into(), cause: "address in use".into() },
        ToIncumbent::Pong { nonce: u64::MAX },
        ToIncumbent::Examined {
            examination: Examination {
                cpus: vec![3, 1],
                tsc: 99,
                unix_ns: 1_795_000_000_000_000_000,
                taint: 0x1000,
                services: vec![Attached {
                    name: "kv".into(),
                    state: "standby".into(),
                    schema_kind: 1,
                    schema_version: 2,
                    mapped: 64 << 20,
                    trouble: "".into(),
                }],
                modules: Counted { count: 4, wrong: vec!["virtio_net".into()] },
                functions: Counted { count: 1, wrong: vec![] },
                live_update: LiveUpdate::Opened,
            },
        },
        ToIncumbent::CheckEnded { ending: Ending::Exited { code: 1 }, output: "no".into(), took_ms: 12 },
        ToIncumbent::CheckEnded { ending: Ending::Killed { signal: 9 }, output: "".into(), took_ms: 0 },
        ToIncumbent::CheckEnded { ending: Ending::TimedOut, output: "half".into(), took_ms: 30_000 },
        ToIncumbent::CheckEnded {
            ending: Ending::NotStarted { cause: "no shell".into() },
            output: "".into(),
            took_ms: 0,
        },
        ToIncumbent::ConnectionsTaken { have: 6 },
    ]
}

pub fn connection() -> Connection {
    Connection {
        service: "kv".into(),
        family: Family::V4,
        local: Endpoint { address: Ip::V4([10, 77, 0, 10]), port: 6379 },
        peer: Endpoint { address: Ip::V4([10, 77, 0, 1]), port: 40_000 },
        state: State::CloseWait,
        tsc: 0x1122_3344_5566_7788,
        receive_next: 1_000_004,
        write_next: 7,
        window: Window { updated_by: 999_990, send: 64_256, send_most: 64_256, receive: 65_280, told_at: 1_000_004 },
        agreed: Agreed {
            segment: 1460,
            scale: Some(Scale { send: 7, receive: 8 }),
            selective: true,
            timestamp: Some(0x1234_5679),
        },
        settings: Settings {
            nonblocking: true,
            no_delay: true,
            cork: false,
            reuse_address: true,
            reuse_port: false,
            keepalive: Keepalive { on: true, idle_s: 60, interval_s: 5, count: 3 },
            user_timeout_ms: 30_000,
            unsent_low: 0,
            linger_s: Some(2),
            send_buffer: Some(1 << 20),
            receive_buffer: None,
            tos: 0x10,
            traffic_class: 0,
            mark: 9,
            priority: 6,
            congestion: "cubic".into(),
        },
        lengths: Lengths { note: 4, received: 3, unacknowledged: 2, unsent: 1 },
        bytes_crc: 0x0bad_cafe,
    }
}

/// An IPv4 peer of an IPv6 socket, with nothing that can be left out.
pub fn connection_mapped() -> Connection {
    let mapped = |last| Ip::V6([0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 10, 77, 0, last]);
    let bare = connection();
    Connection {
        family: Family::V6,
        local: Endpoint { address: mapped(10), port: 6379 },
        peer: Endpoint { address: mapped(1), port: 40_001 },
        state: State::Established,
        agreed: Agreed { segment: 536, scale: None, selective: false, timestamp: None },
        settings: Settings { linger_s: None, send_buffer: None, ..bare.settings },
        lengths: Lengths { note: 0, received: 0, unacknowledged: 0, unsent: 0 },
        ..bare
    }
}

pub fn connection_bytes() -> Bytes {
    Bytes { note: b"note".into(), received: b"get".into(), unacknowledged: b"$1".into(), unsent: b"x".into() }
}
