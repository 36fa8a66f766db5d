//! The instances of a machine, as a value: who has which memory, which low slot, which CPUs. Several images may be in
//! place at once; nothing may be in two hands.
//!
//! The module keeps the rows of `/proc/multikernel`; this is what a program decides with before it asks the module.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::layout::LowSlot;
use crate::memory_map::{Range, RangeSet};

/// A state, in the module's numbers (`enum baton_state`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[repr(u32)]
pub enum State {
    /// It has a name and memory.
    Created = 0,
    /// Its image is in place.
    Loaded = 1,
    /// Its first CPU was started.
    Booting = 2,
    /// Its agent has answered.
    Running = 3,
    /// It has the services.
    Serving = 4,
    /// It was stopped, or stopped by itself.
    Failed = 5,
    /// It has handed everything on.
    Retired = 6,
}

impl State {
    /// All of them, by their numbers.
    pub const ALL: [State; 7] =
        [State::Created, State::Loaded, State::Booting, State::Running, State::Serving, State::Failed, State::Retired];

    /// Its name in `/proc/multikernel`.
    pub const fn name(self) -> &'static str {
        match self {
            State::Created => "created",
            State::Loaded => "loaded",
            State::Booting => "booting",
            State::Running => "running",
            State::Serving => "serving",
            State::Failed => "failed",
            State::Retired => "retired",
        }
    }

    /// The state of this name, if there is one.
    pub fn named(name: &str) -> Option<State> {
        State::ALL.into_iter().find(|state| state.name() == name)
    }

    /// Whether one may follow the other.
    pub fn may_become(self, next: State) -> bool {
        use State::*;
        match (self, next) {
            (Created, Loaded) | (Loaded, Booting) | (Booting, Running) | (Running, Serving) => true,
            // Put another image in place before it ever ran.
            (Loaded, Loaded) => true,
            // Reverse cutover: alive, but it serves no longer.
            (Serving, Running) => true,
            (Serving, Retired) => true,
            (Retired | Failed, _) => false,
            (_, Failed) => true,
            _ => false,
        }
    }

    /// Whether code of it may run on some CPU: its memory must not be touched then.
    pub fn is_alive(self) -> bool {
        matches!(self, State::Booting | State::Running | State::Serving)
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            State::Created => "created",
            State::Loaded => "loaded",
            State::Booting => "booting",
            State::Running => "running",
            State::Serving => "serving",
            State::Failed => "failed",
            State::Retired => "retired",
        })
    }
}

/// One instance.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Instance {
    /// The module's number for it, never 0 (which is the running kernel).
    pub id: u32,
    /// What people call it.
    pub name: String,
    /// Where it stands.
    pub state: State,
    /// Its region.
    pub region: Range,
    /// Its slot below 1 MiB.
    pub low_slot: LowSlot,
    /// The CPUs it has, by APIC id.
    pub cpus: BTreeSet<u32>,
    /// Release of its image, once it is loaded.
    pub image: Option<String>,
}

/// Why the registry refuses.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RegistryError {
    /// Id in use, or 0.
    #[error("instance id {id} is in use")]
    IdTaken {
        /// Which.
        id: u32,
    },
    /// Name in use.
    #[error("instance name {name:?} is in use by instance {id}")]
    NameTaken {
        /// Which.
        name: String,
        /// By whom.
        id: u32,
    },
    /// Memory in use.
    #[error("region {region} overlaps {taken} of {owner}")]
    Overlap {
        /// Asked for.
        region: Range,
        /// What is there.
        taken: Range,
        /// Whose.
        owner: Owner,
    },
    /// All slots are in use.
    #[error("all {} low slots are in use: retire an instance first", crate::layout::LOW_SLOT_COUNT)]
    NoSlot,
    /// That slot is in use.
    #[error("low slot at {range} is in use by {owner}", range = .slot.range())]
    SlotTaken {
        /// Which.
        slot: LowSlot,
        /// By whom.
        owner: Owner,
    },
    /// CPU in use.
    #[error("APIC id {apic_id:#x} belongs to {owner}")]
    CpuTaken {
        /// Which.
        apic_id: u32,
        /// By whom.
        owner: Owner,
    },
    /// CPU not there.
    #[error("instance {id} does not have APIC id {apic_id:#x}")]
    CpuNotThere {
        /// Who.
        id: u32,
        /// Which.
        apic_id: u32,
    },
    /// No such instance.
    #[error("there is no instance {id}")]
    NoSuch {
        /// Which.
        id: u32,
    },
    /// Not a step that exists.
    #[error("instance {id} is {from}, and cannot become {to}")]
    OutOfOrder {
        /// Who.
        id: u32,
        /// Where it stands.
        from: State,
        /// What was asked.
        to: State,
    },
    /// Something depends on it.
    #[error("instance {id} is {state} and has {cpus} CPUs: it cannot be removed")]
    InUse {
        /// Who.
        id: u32,
        /// Where it stands.
        state: State,
        /// How many it has.
        cpus: usize,
    },
}

/// Who has something.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Owner {
    /// The running kernel.
    Host,
    /// An instance.
    Instance(u32),
}

impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Owner::Host => f.write_str("the running kernel"),
            Owner::Instance(id) => write!(f, "instance {id}"),
        }
    }
}

/// All instances beside the running kernel.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Registry {
    /// The slot that the running kernel itself was booted with, if it is a successor.
    host_slot: Option<LowSlot>,
    /// What can never be in a region: the running kernel's own region's control block, arenas, devices.
    host_memory: RangeSet,
    instances: BTreeMap<u32, Instance>,
}

impl Registry {
    /// No instance; the running kernel has these.
    pub fn new(host_slot: Option<LowSlot>, host_memory: RangeSet) -> Registry {
        Registry { host_slot, host_memory, instances: BTreeMap::new() }
    }

    /// All instances, by id.
    pub fn iter(&self) -> impl Iterator<Item = &Instance> {
        self.instances.values()
    }

    /// One of them.
    pub fn get(&self, id: u32) -> Result<&Instance, RegistryError> {
        self.instances.get(&id).ok_or(RegistryError::NoSuch { id })
    }

    /// All memory that no new region may touch.
    pub fn taken_memory(&self) -> RangeSet {
        self.host_memory.union(&self.instances.values().map(|i| i.region).collect())
    }

    /// The first free slot.
    pub fn free_slot(&self) -> Result<LowSlot, RegistryError> {
        LowSlot::all().find(|&slot| self.slot_owner(slot).is_none()).ok_or(RegistryError::NoSlot)
    }

    /// Whether an instance with this name and region could be added. To be asked before the module is.
    pub fn check_new(&self, name: &str, region: Range) -> Result<LowSlot, RegistryError> {
        if let Some(other) = self.instances.values().find(|i| i.name == name) {
            return Err(RegistryError::NameTaken { name: name.to_owned(), id: other.id });
        }
        if let Some(taken) = self.host_memory.iter().find(|taken| taken.overlaps(region)) {
            return Err(RegistryError::Overlap { region, taken, owner: Owner::Host });
        }
        if let Some(other) = self.instances.values().find(|i| i.region.overlaps(region)) {
            return Err(RegistryError::Overlap { region, taken: other.region, owner: Owner::Instance(other.id) });
        }
        self.free_slot()
    }

    /// Adds an instance under the id that the module gave it. It gets the first free slot unless one is given.
    pub fn add(
        &mut self,
        id: u32,
        name: &str,
        region: Range,
        low_slot: Option<LowSlot>,
    ) -> Result<&Instance, RegistryError> {
        if id == 0 || self.instances.contains_key(&id) {
            return Err(RegistryError::IdTaken { id });
        }
        let free = self.check_new(name, region)?;
        let low_slot = low_slot.unwrap_or(free);
        if let Some(owner) = self.slot_owner(low_slot) {
            return Err(RegistryError::SlotTaken { slot: low_slot, owner });
        }
        Ok(self.instances.entry(id).or_insert(Instance {
            id,
            name: name.to_owned(),
            state: State::Created,
            region,
            low_slot,
            cpus: BTreeSet::new(),
            image: None,
        }))
    }

    /// One step of its life.
    pub fn set_state(&mut self, id: u32, to: State) -> Result<(), RegistryError> {
        let instance = self.get_mut(id)?;
        if !instance.state.may_become(to) {
            return Err(RegistryError::OutOfOrder { id, from: instance.state, to });
        }
        instance.state = to;
        Ok(())
    }

    /// An image is in place.
    pub fn set_loaded(&mut self, id: u32, release: &str) -> Result<(), RegistryError> {
        self.set_state(id, State::Loaded)?;
        self.get_mut(id)?.image = Some(release.to_owned());
        Ok(())
    }

    /// A CPU goes to it.
    pub fn give_cpu(&mut self, id: u32, apic_id: u32) -> Result<(), RegistryError> {
        self.get(id)?;
        if let Some(owner) = self.cpu_owner(apic_id) {
            return Err(RegistryError::CpuTaken { apic_id, owner: Owner::Instance(owner) });
        }
        self.get_mut(id)?.cpus.insert(apic_id);
        Ok(())
    }

    /// A CPU comes back from it.
    pub fn take_cpu(&mut self, id: u32, apic_id: u32) -> Result<(), RegistryError> {
        match self.get_mut(id)?.cpus.remove(&apic_id) {
            true => Ok(()),
            false => Err(RegistryError::CpuNotThere { id, apic_id }),
        }
    }

    /// The instance that has this CPU.
    pub fn cpu_owner(&self, apic_id: u32) -> Option<u32> {
        self.instances.values().find(|i| i.cpus.contains(&apic_id)).map(|i| i.id)
    }

    /// Forgets an instance that has no CPU and cannot be running.
    pub fn remove(&mut self, id: u32) -> Result<Instance, RegistryError> {
        let instance = self.get(id)?;
        if instance.state.is_alive() || !instance.cpus.is_empty() {
            return Err(RegistryError::InUse { id, state: instance.state, cpus: instance.cpus.len() });
        }
        self.instances.remove(&id).ok_or(RegistryError::NoSuch { id })
    }

    fn get_mut(&mut self, id: u32) -> Result<&mut Instance, RegistryError> {
        self.instances.get_mut(&id).ok_or(RegistryError::NoSuch { id })
    }

    fn slot_owner(&self, slot: LowSlot) -> Option<Owner> {
        if self.host_slot == Some(slot) {
            return Some(Owner::Host);
        }
        self.instances.values().find(|i| i.low_slot == slot).map(|i| Owner::Instance(i.id))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MIB: u64 = 1 << 20;

    fn region(block: u64) -> Range {
        Range::new(block * 128 * MIB, (block + 2) * 128 * MIB)
    }

    #[test]
    fn a_life() {
        let mut registry = Registry::new(LowSlot::new(0), RangeSet::from(Range::new(0, MIB)));
        let slot = registry.add(1, "next", region(4), None).unwrap().low_slot;
        assert_eq!(Some(slot), LowSlot::new(1));
        registry.set_loaded(1, "7.3.4").unwrap();
        registry.set_state(1, State::Booting).unwrap();
        registry.give_cpu(1, 3).unwrap();
        let error = registry.remove(1).unwrap_err();
        assert_eq!(error.to_string(), "instance 1 is booting and has 1 CPUs: it cannot be removed");
        let error = registry.set_state(1, State::Serving).unwrap_err();
        assert_eq!(error.to_string(), "instance 1 is booting, and cannot become serving");
        registry.set_state(1, State::Failed).unwrap();
        registry.take_cpu(1, 3).unwrap();
        assert_eq!(registry.remove(1).unwrap().image.as_deref(), Some("7.3.4"));
        assert_eq!(registry.iter().count(), 0);
    }

    #[test]
    fn nothing_is_in_two_hands() {
        let mut registry = Registry::new(None, RangeSet::from(region(0)));
        registry.add(1, "a", region(4), None).unwrap();
        let refused = |r: &mut Registry, id, name, at| r.add(id, name, at, None).unwrap_err().to_string();
        assert_eq!(refused(&mut registry, 1, "b", region(8)), "instance id 1 is in use");
        assert_eq!(refused(&mut registry, 2, "a", region(8)), "instance name \"a\" is in use by instance 1");
        assert_eq!(
            refused(&mut registry, 2, "b", region(5)),
            "region 0x28000000-0x37ffffff overlaps 0x20000000-0x2fffffff of instance 1"
        );
        assert!(refused(&mut registry, 2, "b", region(1)).ends_with("of the running kernel"));
        let error = registry.add(2, "b", region(8), LowSlot::new(0)).unwrap_err();
        assert_eq!(error.to_string(), "low slot at 0x10000-0x2ffff is in use by instance 1");
        for id in 2..=4 {
            registry.add(id, &format!("i{id}"), region(2 * u64::from(id) + 4), None).unwrap();
        }
        assert_eq!(registry.check_new("e", region(20)), Err(RegistryError::NoSlot));
    }

    #[derive(Debug, Clone)]
    enum Step {
        Add(u32, u64, Option<u8>),
        State(u32, State),
        Give(u32, u32),
        Take(u32, u32),
        Remove(u32),
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        use State::*;
        let state = prop::sample::select(vec![Created, Loaded, Booting, Running, Serving, Failed, Retired]);
        let id = 0u32..6;
        let step = prop_oneof![
            (id.clone(), 0u64..12, prop::option::of(0u8..4)).prop_map(|(i, b, s)| Step::Add(i, b, s)),
            (id.clone(), state).prop_map(|(i, s)| Step::State(i, s)),
            (id.clone(), 0u32..8).prop_map(|(i, c)| Step::Give(i, c)),
            (id.clone(), 0u32..8).prop_map(|(i, c)| Step::Take(i, c)),
            id.prop_map(Step::Remove),
        ];
        prop::collection::vec(step, 0..60)
    }

    proptest! {
        #[test]
        fn invariants_hold_after_every_step(steps in steps(), host_slot in prop::option::of(0u8..4)) {
            let host_slot = host_slot.and_then(LowSlot::new);
            let mut registry = Registry::new(host_slot, RangeSet::from(region(0)));
            for step in steps {
                let before = registry.clone();
                let result = match step.clone() {
                    Step::Add(id, block, slot) => {
                        registry.add(id, &format!("n{block}"), region(block), slot.and_then(LowSlot::new)).map(drop)
                    }
                    Step::State(id, state) => registry.set_state(id, state),
                    Step::Give(id, cpu) => registry.give_cpu(id, cpu),
                    Step::Take(id, cpu) => registry.take_cpu(id, cpu),
                    Step::Remove(id) => registry.remove(id).map(drop),
                };
                if result.is_err() {
                    prop_assert_eq!(&before, &registry, "a refusal changes nothing: {:?}", step);
                }
                let all: Vec<_> = registry.iter().collect();
                for (i, a) in all.iter().enumerate() {
                    prop_assert!(a.id != 0 && !a.region.overlaps(region(0)) && Some(a.low_slot) != host_slot);
                    for b in &all[i + 1..] {
                        prop_assert!(!a.region.overlaps(b.region) && a.low_slot != b.low_slot);
                        prop_assert!(a.cpus.is_disjoint(&b.cpus) && a.name != b.name);
                    }
                }
                let copy: Registry = serde_json::from_str(&serde_json::to_string(&registry).unwrap()).unwrap();
                prop_assert_eq!(&copy, &registry);
            }
        }
    }
}
