//! KHO's structures as a whole, where their memory can be read: in the region of a successor that an update is starting.

use handover::kho::{Handed, Incoming, Limits, Machine, Memory, OutOfReach};
use handover::luo::Orchestration;
use kexec_core::device::Mapping;
use serde_json::{Value, json};
use state_schemas::latest::handover_record::{HandoverRecord, Kho, PhysRange};
use state_schemas::shared::SharedMemory;

use super::show::{Piece, chain, plain};

/// A region, mapped.
pub struct Region {
    /// Where it lies.
    pub range: PhysRange,
    /// Its memory.
    pub mapping: Mapping,
}

impl Memory for Region {
    fn read(&self, phys: u64, into: &mut [u8]) -> Result<(), OutOfReach> {
        let range = PhysRange { start: phys, len: into.len() as u64 };
        if !self.range.contains(range) {
            return Err(OutOfReach { range });
        }
        self.mapping.read(phys - self.range.start, into);
        Ok(())
    }
}

/// What the successor's kernel will find, read as it will read it.
pub fn piece(memory: &impl Memory, record: &HandoverRecord, kho: &Kho) -> Piece {
    let limits = Limits::default();
    let (value, problem) = match Incoming::read(memory, Handed { fdt: kho.fdt, scratch: kho.scratch }, &limits) {
        Err(error) => (Value::Null, Some(chain(&error))),
        Ok(received) => {
            let incoming = received.alleged();
            let mut value = json!({
                "version": incoming.abi.compatible(),
                "preserved_bytes": incoming.preserved_bytes(),
                "preserved_runs": incoming.preserved.len(),
                "tree_pages": incoming.tree_nodes.len(),
                "scratch": plain(&incoming.scratch),
                "blobs": incoming.subtrees.iter().map(|tree| json!({ "name": tree.name, "blob": plain(&tree.blob) })).collect::<Vec<_>>(),
            });
            let mut problem = None;
            match incoming.metadata(memory, &limits) {
                Ok(None) => {}
                Ok(Some(metadata)) => {
                    value["previous_release"] = metadata.previous_release.into();
                    value["kexec_count"] = metadata.kexec_count.into();
                }
                Err(error) => problem = Some(chain(&error)),
            }
            match Orchestration::read(memory, incoming, &limits) {
                Ok(None) => {}
                Ok(Some(orchestration)) => value["live_update"] = sessions(orchestration.alleged()),
                Err(error) => problem = problem.or(Some(chain(&error))),
            }
            let machine = Machine { ram: record.machine.ram.clone() };
            (value, problem.or_else(|| received.check(&machine).err().map(|error| chain(&error))))
        }
    };
    Piece { format: "KHO".to_owned(), at: format!("device tree at {:#x}", kho.fdt.start), value, problem }
}

fn sessions(orchestration: &Orchestration) -> Value {
    let session = |session: &handover::luo::Session| {
        let files: Vec<Value> =
            session.files.iter().map(|file| json!({ "token": file.token, "handler": file.compatible })).collect();
        json!({ "name": session.name, "files": files })
    };
    json!({ "update": orchestration.update, "sessions": orchestration.sessions.iter().map(session).collect::<Vec<_>>() })
}
