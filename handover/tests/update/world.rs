//! A machine with two kernels in it, as far as an update can see it. It carries effects out the way real ones go: done,
//! refused, or with an outcome that nobody knows, and with a successor that may do late what it was told early.
//!
//! It asserts what no effect may do at the moment it happens; [`World::check`] says what must hold between steps.

use std::collections::{BTreeMap, BTreeSet};

use handover::update::blame::Blame;
use handover::update::cpu::{Cpu, Moving};
use handover::update::effect::Effect;
use handover::update::error::{Cause, Left};
use handover::update::machine::{Event, Serves, Update};
use handover::update::plan::Plan;

/// Where a CPU is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum At {
    Incumbent,
    /// In nobody's hands; the incumbent can take it online.
    Offline,
    Parked,
    Successor,
}

/// How an effect goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    Done,
    Failed,
    /// Time ran out; it had happened.
    UnknownDone,
    /// Time ran out; it had not.
    UnknownNot,
    /// Time ran out; if it is something the successor was told, it does it later.
    UnknownLater,
    /// The successor dies during it; it had not happened.
    Died,
    /// The same, and it had.
    DiedAfter,
    /// The operator calls it off, and the wait is broken off.
    CalledOff,
    /// The operator calls it off while it is done.
    DoneCalledOff,
}

/// What the successor is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kernel {
    Absent,
    Alive,
    /// Runs, serves if it was told to, and hears nothing any more.
    Deaf,
    /// Panicked: still on its CPUs, answers nobody.
    Dead,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct World {
    pub cpus: BTreeMap<u32, At>,
    /// CPUs that were offline before, by APIC id, and stay so wherever they wait.
    pub stay_offline: BTreeSet<u32>,
    pub memory_taken: bool,
    pub devices_granted: bool,
    pub instance: bool,
    pub successor: Kernel,
    /// Epoch in which the successor serves.
    pub successor_active: Option<u64>,
    /// The incumbent's services are silent.
    pub frozen: bool,
    pub sealed: bool,
    pub arena_epoch: u64,
    /// The incumbent has the address.
    pub address: bool,
    pub quiesced: bool,
    /// The incumbent is gone.
    pub gone: bool,
    pub confirmed: bool,
    /// The epoch word of the control block.
    pub epoch_word: u64,
    /// What the successor was told and has not done yet.
    pub later: Vec<Effect>,
}

impl World {
    pub fn before(plan: &Plan) -> World {
        let here = |moving: &Moving| if moving.online { At::Incumbent } else { At::Offline };
        let moving = plan.cpus.others.iter().chain([&plan.cpus.spare]);
        let mut cpus: BTreeMap<u32, At> = moving.map(|moving| (moving.cpu.apic_id, here(moving))).collect();
        cpus.insert(plan.cpus.last.apic_id, At::Incumbent);
        let stay_offline = plan.cpus.others.iter().filter(|moving| !moving.online).map(|moving| moving.cpu.apic_id);
        World {
            cpus,
            stay_offline: stay_offline.collect(),
            memory_taken: false,
            devices_granted: false,
            instance: false,
            successor: Kernel::Absent,
            successor_active: None,
            frozen: false,
            sealed: false,
            arena_epoch: plan.epoch,
            address: true,
            quiesced: false,
            gone: false,
            confirmed: false,
            epoch_word: plan.epoch,
            later: Vec::new(),
        }
    }

    /// Where a CPU is when all has gone well.
    pub fn destination(&self, apic_id: u32) -> At {
        if self.stay_offline.contains(&apic_id) { At::Parked } else { At::Successor }
    }

    pub fn incumbent_answers(&self) -> bool {
        !self.frozen && self.address && !self.sealed && !self.gone
    }

    pub fn successor_answers(&self) -> bool {
        self.successor_active.is_some() && matches!(self.successor, Kernel::Alive | Kernel::Deaf)
    }

    /// Carries an effect out, and says what happened to it.
    pub fn carry_out(&mut self, effect: &Effect, fate: Fate) -> Event {
        let deadline = || Event::Unknown(Cause::broken(Blame::Successor, "time ran out"));
        let died = || Event::Unknown(Cause::successor_died("it panicked"));
        // What needs the successor cannot be done without it, whatever fate wanted.
        let fate = match fate {
            Fate::Done if !self.can(effect) => Fate::UnknownNot,
            // A CPU that waits at the mailbox does not hear this kernel.
            Fate::Done | Fate::UnknownDone | Fate::DiedAfter if self.is_parked(effect) => Fate::Failed,
            Fate::Died | Fate::DiedAfter if self.successor == Kernel::Absent => Fate::Failed,
            // After the fence a successor's death is no news.
            fate => fate,
        };
        // The agent writes the word before it does anything else for these.
        if let Effect::Activate { epoch } | Effect::Unfreeze { epoch } = effect {
            self.epoch_word = *epoch;
        }
        match fate {
            Fate::Done => {
                self.perform(effect);
                Event::Done
            }
            Fate::Failed => Event::Failed(Cause::broken(Blame::Incumbent, "it did not work")),
            Fate::UnknownDone => {
                if self.can(effect) {
                    self.perform(effect);
                }
                deadline()
            }
            Fate::UnknownNot => deadline(),
            Fate::UnknownLater => {
                if asks_successor(effect) && self.successor == Kernel::Alive {
                    self.successor = Kernel::Deaf;
                    self.later.push(effect.clone());
                }
                deadline()
            }
            Fate::Died => {
                self.successor = Kernel::Dead;
                died()
            }
            Fate::DiedAfter => {
                if self.can(effect) {
                    self.perform(effect);
                }
                if self.successor != Kernel::Absent {
                    self.successor = Kernel::Dead;
                }
                died()
            }
            Fate::CalledOff => Event::Unknown(Cause::called_off("the test")),
            Fate::DoneCalledOff if self.can(effect) && !self.is_parked(effect) && !is_undo(effect) => {
                self.perform(effect);
                Event::CalledOff(Cause::called_off("the test"))
            }
            Fate::DoneCalledOff => self.carry_out(effect, Fate::Done),
        }
    }

    /// The successor does something that it was told long ago.
    pub fn catch_up(&mut self) {
        if self.successor != Kernel::Deaf || self.later.is_empty() {
            return;
        }
        let effect = self.later.remove(0);
        match effect {
            // The arena's own epoch decides: too late is too late.
            Effect::Activate { epoch } if self.arena_epoch > epoch || !self.sealed => {}
            Effect::HandCpu { cpu } if self.cpus[&cpu.apic_id] != At::Parked => {}
            effect => self.perform(&effect),
        }
    }

    fn can(&self, effect: &Effect) -> bool {
        !asks_successor(effect) || self.successor == Kernel::Alive
    }

    fn is_parked(&self, effect: &Effect) -> bool {
        matches!(effect, Effect::OnlineCpu { cpu } if self.at(cpu) == At::Parked)
    }

    /// It is so already: carried out before by a driver that died. Only what may be asked for again is meant here.
    fn is_so(&self, effect: &Effect) -> bool {
        match effect {
            Effect::Activate { epoch } => self.successor_active == Some(*epoch),
            Effect::OfflineCpu { cpu } => self.successor_active.is_some() && self.at(cpu) != At::Incumbent,
            Effect::ParkCpu { cpu } => matches!(self.at(cpu), At::Parked | At::Successor),
            Effect::HandCpu { cpu } => self.at(cpu) == At::Successor,
            _ => false,
        }
    }

    /// It happens.
    pub fn perform(&mut self, effect: &Effect) {
        if self.is_so(effect) {
            return;
        }
        let running = self.successor != Kernel::Absent;
        match effect {
            Effect::TakeMemory => self.memory_taken = true,
            Effect::GrantDevices => self.devices_granted = true,
            Effect::OfflineCpu { cpu } => {
                assert_eq!(self.at(cpu), At::Incumbent, "offlining what is not here");
                self.move_to(cpu, At::Offline);
            }
            Effect::Place => {
                assert!(self.memory_taken);
                self.instance = true;
            }
            Effect::StartCpu { cpu } => {
                assert!(self.instance && self.at(cpu) == At::Offline);
                self.move_to(cpu, At::Successor);
                self.successor = Kernel::Alive;
            }
            Effect::AwaitHello | Effect::StandBy | Effect::CheckHealth | Effect::RunChecks | Effect::ReadLastWords => {}
            Effect::Freeze => self.frozen = true,
            Effect::Seal => {
                assert!(self.frozen, "sealed under a running service");
                self.sealed = true;
            }
            Effect::ReleaseAddress => {
                assert!(self.frozen);
                self.address = false;
            }
            Effect::Activate { epoch } => {
                assert!(self.sealed && self.frozen && !self.address, "activated too early");
                assert!(*epoch > self.arena_epoch, "epochs only grow");
                self.arena_epoch = *epoch;
                self.sealed = false;
                self.successor_active = Some(*epoch);
            }
            Effect::DropAddress => {
                assert!(!self.address && self.successor_active.is_some(), "dropped an address that clients need");
            }
            Effect::ParkCpu { cpu } => {
                assert_eq!(self.at(cpu), At::Offline);
                self.move_to(cpu, At::Parked);
            }
            Effect::HandCpu { cpu } => {
                assert_eq!(self.at(cpu), At::Parked);
                self.move_to(cpu, At::Successor);
            }
            Effect::Watch { .. } => assert!(self.successor_active.is_some(), "watched a kernel that does not serve"),
            Effect::Commit => self.confirmed = true,
            Effect::QuiesceDevices => self.quiesced = true,
            Effect::YieldLastCpu { cpu } => {
                assert!(self.confirmed, "left before the commit");
                assert!(self.quiesced, "left with devices that still write");
                assert_eq!(self.at(cpu), At::Incumbent);
                let others = self.cpus.iter().filter(|&(&id, _)| id != cpu.apic_id);
                assert!(others.clone().all(|(id, &at)| at == self.destination(*id)), "left CPUs behind");
                self.gone = true;
                self.move_to(cpu, At::Successor);
            }
            Effect::StandDown { .. } => {
                self.later.retain(|effect| !matches!(effect, Effect::Activate { .. }));
                if self.successor_active.take().is_some() {
                    self.sealed = true;
                }
            }
            Effect::TakeAddressBack => {
                assert!(!self.may_answer_yet(), "took the address of a kernel that may answer");
                self.address = true;
            }
            Effect::Unseal { epoch } => {
                assert!(!self.may_answer_yet(), "took the arenas of a kernel that may answer");
                assert!(*epoch >= self.arena_epoch, "epochs only grow");
                self.arena_epoch = *epoch;
                self.sealed = false;
            }
            Effect::Unfreeze { epoch } => {
                assert!(!self.may_answer_yet(), "both would answer");
                assert!(*epoch >= self.arena_epoch);
                self.frozen = false;
            }
            Effect::TakeCpuBack { cpu } => {
                self.later.retain(|effect| *effect != Effect::HandCpu { cpu: *cpu });
                if self.at(cpu) == At::Successor {
                    self.move_to(cpu, At::Parked);
                }
            }
            Effect::UnparkCpu { cpu } => {
                assert_ne!(self.at(cpu), At::Successor, "pulled a CPU from under a running kernel");
                if self.at(cpu) == At::Parked {
                    self.move_to(cpu, At::Offline);
                }
            }
            Effect::Fence { cpus } => {
                let has = |id: u32| cpus.iter().any(|cpu| cpu.apic_id == id);
                for (&id, at) in &mut self.cpus {
                    if *at == At::Successor {
                        assert!(has(id), "cpu {id} of the successor was not fenced");
                        *at = At::Offline;
                    }
                }
                self.successor = Kernel::Absent;
                self.successor_active = None;
                self.confirmed = false; // whatever it was told, nobody remembers
                self.later.clear();
            }
            Effect::DestroyInstance => {
                assert!(!running, "destroyed under a running kernel");
                assert!(!self.devices_granted, "destroyed before the devices that may write there are back");
                self.instance = false;
            }
            Effect::OnlineCpu { cpu } => {
                assert_ne!(self.at(cpu), At::Successor, "two kernels on one CPU");
                assert_ne!(self.at(cpu), At::Parked, "onlined what waits elsewhere");
                self.move_to(cpu, At::Incumbent);
            }
            Effect::TakeDevicesBack => {
                assert!(!running, "devices taken from a running kernel");
                self.devices_granted = false;
            }
            Effect::GiveBackMemory => {
                assert!(!running, "memory of a running kernel given back");
                assert!(!self.devices_granted, "memory given back that a device may still write");
                assert!(!self.cpus.values().any(|at| *at == At::Parked), "memory given back in which a CPU waits");
                self.memory_taken = false;
            }
        }
    }

    /// The successor answers, or may yet do so for something that it was told.
    fn may_answer_yet(&self) -> bool {
        self.successor_answers()
            || (self.successor == Kernel::Deaf
                && self.later.iter().any(|effect| matches!(effect, Effect::Activate { .. })))
    }

    fn at(&self, cpu: &Cpu) -> At {
        self.cpus[&cpu.apic_id]
    }

    fn move_to(&mut self, cpu: &Cpu, at: At) {
        self.cpus.insert(cpu.apic_id, at);
    }

    /// What must hold between any two steps.
    pub fn check(&self, update: &Update) {
        assert!(!(self.incumbent_answers() && self.successor_answers()), "two kernels answer");
        match update.serves() {
            Serves::Incumbent => assert!(!self.successor_answers()),
            Serves::Successor => assert!(!self.incumbent_answers()),
            Serves::Nobody => {}
        }
        // Whatever is not as it was has its undo on the list, or under way; unless it is too late for that.
        if !self.confirmed {
            let mut undone = self.clone();
            let left = update.left().iter().map(|left| &left.effect);
            let doing = update.under_way().into_iter().filter(|effect| is_undo(effect));
            undone.undo_by_hand(left.chain(doing).chain(update.undo_list()));
            undone.is_as_before(&World::before(update.plan()), &[]);
        }
    }

    /// Performs undos with a fence that works and without asking anybody.
    pub fn undo_by_hand<'a>(&mut self, undos: impl Iterator<Item = &'a Effect>) {
        let mut undos: Vec<_> = undos.cloned().collect();
        undos.sort_by_key(|undo| match undo {
            Effect::GiveBackMemory => 2,
            Effect::DestroyInstance => 1,
            _ => 0,
        });
        if undos.iter().any(|effect| matches!(effect, Effect::Fence { .. })) {
            let cpus = self.cpus.keys().map(|&apic_id| Cpu { number: apic_id, apic_id }).collect();
            self.perform(&Effect::Fence { cpus });
        }
        for effect in undos {
            match effect {
                Effect::StandDown { .. } | Effect::TakeCpuBack { .. } | Effect::Fence { .. } => {}
                Effect::Unseal { .. } => self.sealed = false,
                Effect::Unfreeze { .. } => self.frozen = false,
                effect => self.perform(&effect),
            }
        }
    }

    /// Everything is as it was, but for the epoch and for what is `left`.
    pub fn is_as_before(&self, before: &World, left: &[Left]) {
        let mut now = self.clone();
        now.undo_by_hand(left.iter().map(|left| &left.effect));
        (now.arena_epoch, now.epoch_word) = (before.arena_epoch, before.epoch_word);
        assert_eq!(&now, before);
    }
}

pub fn asks_successor(effect: &Effect) -> bool {
    matches!(
        effect,
        Effect::AwaitHello
            | Effect::StandBy
            | Effect::CheckHealth
            | Effect::RunChecks
            | Effect::Activate { .. }
            | Effect::HandCpu { .. }
            | Effect::Watch { .. }
            | Effect::Commit
            | Effect::StandDown { .. }
            | Effect::TakeCpuBack { .. }
    )
}

pub fn is_undo(effect: &Effect) -> bool {
    matches!(
        effect,
        Effect::StandDown { .. }
            | Effect::TakeAddressBack
            | Effect::Unseal { .. }
            | Effect::Unfreeze { .. }
            | Effect::TakeCpuBack { .. }
            | Effect::UnparkCpu { .. }
            | Effect::Fence { .. }
            | Effect::ReadLastWords
            | Effect::DestroyInstance
            | Effect::OnlineCpu { .. }
            | Effect::TakeDevicesBack
            | Effect::GiveBackMemory
    )
}
