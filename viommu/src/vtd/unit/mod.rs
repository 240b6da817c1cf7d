//! One VT-d unit: its endpoints, its locks, its state. What the guest's accesses do is in
//! [`access`], what becomes of the endpoints' faults and page requests in [`events`].

mod access;
mod events;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};

use parking_lot::{Mutex as FairMutex, MutexGuard as FairGuard};

use self::events::Events;
use super::capabilities::{Extras, Mode, Offer, UnitConfig, Unsupported};
use super::fault::Faults;
use super::invalidate::Invalidations;
use super::page_request::PageQueue;
use super::registers::Registers;
use super::remap::{InterruptRemapper, Remapping};
use super::state::{EndpointState, UnitState};
use super::targets::{Replay, Targets, View};
use super::vcmd::VirtualCommands;
use crate::backend::{Backend, PageResponse, Refused, ResponseCode, Scope};
use crate::interrupt::{Msi, MsiSink};
use crate::pasid::PasidAllocator;
use crate::spec::vtd::registers::TranslationTableMode;
use crate::{Gpa, GuestRam, Rid};

/// How many targets the state lists; it says how many there are.
const TARGETS_IN_STATE: usize = 1024;

/// What a unit is connected to.
pub struct Connections {
    /// Guest RAM, where tables and queues are.
    pub ram: GuestRam,
    /// Where the unit's own interrupts go.
    pub msi: Arc<dyn MsiSink>,
    /// Back ends that endpoints may come from: what they cannot do is never offered, so that
    /// they can still come after the guest has started.
    pub backends: Vec<Arc<dyn Backend>>,
    /// Who remaps interrupts; needed for `interrupt_remapping=on`.
    pub remapper: Option<Arc<dyn InterruptRemapper>>,
    /// Who allocates PASIDs; with it the unit offers the virtual command registers.
    pub pasids: Option<Arc<dyn PasidAllocator>>,
}

/// Why an endpoint is not behind the unit now.
#[derive(Debug, thiserror::Error)]
pub enum AddError {
    /// It is there already.
    #[error("endpoint {rid} is already behind vIOMMU {unit}; remove it first")]
    Known {
        /// The endpoint.
        rid: Rid,
        /// The unit.
        unit: String,
    },
    /// Its back end cannot keep what the unit offers.
    #[error("endpoint {rid} cannot be behind its vIOMMU")]
    Unsupported {
        /// The endpoint.
        rid: Rid,
        /// Why.
        #[source]
        source: Unsupported,
    },
    /// Its back end did not let it be claimed.
    #[error("endpoint {rid} could not be claimed")]
    Claim {
        /// The endpoint.
        rid: Rid,
        /// Why.
        #[source]
        source: Refused,
    },
}

/// A VT-d unit. Cheap to share; all methods may be called on any thread.
pub struct Unit {
    config: UnitConfig,
    ram: GuestRam,
    msi: Arc<dyn MsiSink>,
    remapper: Option<Arc<dyn InterruptRemapper>>,
    pasids: Option<Arc<dyn PasidAllocator>>,
    this: Weak<Self>,
    /// Set when the guest can first see it; it never changes then.
    frozen: OnceLock<Offer>,
    // Lock order: commands, then one of faults, pages and virtual_commands. The last three are
    // never held while a back end is called, so that its threads, which a back end may wait for,
    // can always report; commands is, and is never taken on a back end's thread.
    commands: FairMutex<Commands>,
    faults: Mutex<Faults>,
    pages: Mutex<Pages>,
    virtual_commands: Mutex<VirtualCommands>,
    /// GSTS, FSTS and IQH as the guest polls them, without a lock.
    status: AtomicU32,
    fault_status: AtomicU32,
    head: AtomicU32,
}

/// What the guest's commands change.
struct Commands {
    /// What will be offered; what is, once frozen.
    offer: Offer,
    /// The back ends that `offer` is composed from, until it is frozen: from then on a back end is
    /// kept by its endpoints alone, and goes with the last one.
    backends: Vec<Arc<dyn Backend>>,
    registers: Registers,
    queue: Invalidations,
    targets: Targets,
}

/// The page request queue, and who answers for an endpoint.
#[derive(Default)]
struct Pages {
    queue: PageQueue,
    backends: BTreeMap<Rid, Arc<dyn Backend>>,
    privileged: u64,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Every change under these locks leaves what they guard usable, so a panic elsewhere in the
    // VMM must not take the guest's IOMMU away too.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Unit {
    /// A unit with no endpoints.
    ///
    /// # Errors
    /// The configuration asks for what the back ends or connections do not have.
    pub fn new(config: UnitConfig, connections: Connections) -> Result<Arc<Self>, Unsupported> {
        let Connections {
            ram,
            msi,
            backends,
            remapper,
            pasids,
        } = connections;
        let extras = Extras {
            interrupt_remapping: remapper.is_some(),
            pasid_allocation: pasids.is_some(),
        };
        let offer = Offer::compose(&config, backends.iter().map(|b| b.capabilities()), extras)?;
        Ok(Arc::new_cyclic(|this| Self {
            config,
            ram,
            msi,
            remapper,
            pasids,
            this: this.clone(),
            frozen: OnceLock::new(),
            commands: FairMutex::new(Commands {
                offer,
                backends,
                registers: Registers::default(),
                queue: Invalidations::default(),
                targets: Targets::new(),
            }),
            faults: Mutex::new(Faults::default()),
            pages: Mutex::new(Pages::default()),
            virtual_commands: Mutex::new(VirtualCommands::new()),
            status: AtomicU32::new(0),
            fault_status: AtomicU32::new(0),
            head: AtomicU32::new(0),
        }))
    }

    /// What the user asked for.
    pub fn config(&self) -> &UnitConfig {
        &self.config
    }

    /// What the guest sees, from now on for ever. The first access that could show it does this
    /// too; calling it before the first vCPU runs makes it certain.
    pub fn freeze(&self) -> &Offer {
        self.frozen.get_or_init(|| {
            let mut commands = self.commands.lock();
            commands.backends = Vec::new();
            commands.offer
        })
    }

    /// Puts an endpoint behind the unit. It is Blocked, unless the guest's tables say something
    /// else already or the bypass policy does.
    ///
    /// # Errors
    /// See [`AddError`]; nothing is changed then.
    pub fn add_endpoint(&self, rid: Rid, backend: Arc<dyn Backend>) -> Result<(), AddError> {
        let mut replay = self.begin_endpoint(rid, backend)?;
        while let Some(left) = replay {
            replay = self.replay_step(rid, left);
        }
        Ok(())
    }

    /// Puts an endpoint behind the unit; what is left of the replay of its tables.
    pub(super) fn begin_endpoint(
        &self,
        rid: Rid,
        backend: Arc<dyn Backend>,
    ) -> Result<Option<Replay>, AddError> {
        let mut guard = self.commands.lock();
        let commands = &mut *guard;
        if commands.targets.contains(rid) {
            let unit = self.config.id.clone();
            return Err(AddError::Known { rid, unit });
        }
        let unsupported = |source| AddError::Unsupported { rid, source };
        let known = commands.backends.iter().any(|b| Arc::ptr_eq(b, &backend));
        let mut composed = commands.offer;
        match self.frozen.get() {
            Some(offer) => offer
                .check_endpoint(&self.config.id, backend.capabilities())
                .map_err(unsupported)?,
            // Also for a back end that is known: it may have got narrower with the endpoint.
            None => {
                let new = (!known).then_some(&backend);
                let all = commands.backends.iter().chain(new);
                let extras = Extras {
                    interrupt_remapping: self.remapper.is_some(),
                    pasid_allocation: self.pasids.is_some(),
                };
                composed = Offer::compose(&self.config, all.map(|b| b.capabilities()), extras)
                    .map_err(unsupported)?;
            }
        }
        backend
            .claim(rid, Arc::new(Events(self.this.clone())))
            .map_err(|source| AddError::Claim { rid, source })?;
        commands.offer = composed;
        if !known && self.frozen.get().is_none() {
            commands.backends.push(Arc::clone(&backend));
        }
        lock(&self.pages).backends.insert(rid, Arc::clone(&backend));
        commands.targets.add(rid, backend);
        let mut replay = None;
        if commands.registers.status().te() {
            let view = view(&self.ram, &commands.offer, &commands.registers);
            replay = Some(commands.targets.refresh_new(view, rid));
        } else {
            commands.targets.default_policy(rid, self.config.bypass);
        }
        let messages = self.settle(commands);
        drop(guard);
        self.send(messages);
        Ok(replay)
    }

    /// A step of the replay of a new endpoint; what is left of it. Whoever waits for the lock is
    /// next: the guest's own commands, and who asks for the state.
    pub(super) fn replay_step(&self, rid: Rid, mut replay: Replay) -> Option<Replay> {
        let mut guard = self.commands.lock();
        let commands = &mut *guard;
        // When translation is turned on again, everything is scanned.
        if !commands.registers.status().te() {
            return None;
        }
        let view = view(&self.ram, &commands.offer, &commands.registers);
        let more = commands.targets.replay(view, rid, &mut replay);
        let messages = self.settle(commands);
        FairGuard::unlock_fair(guard);
        self.send(messages);
        more.then_some(replay)
    }

    /// Takes an endpoint away, whatever the guest does: its targets are Blocked, its page
    /// requests are answered, and its back end holds nothing for it. Unknown ones are no error.
    pub fn remove_endpoint(&self, rid: Rid) {
        let mut guard = self.commands.lock();
        let commands = &mut *guard;
        {
            let mut pages = lock(&self.pages);
            pages.backends.remove(&rid);
            // The back end answers them when it releases the endpoint.
            drop(pages.queue.book.withdraw(Scope::Endpoint(rid)));
        }
        if let Some(backend) = commands.targets.remove(rid) {
            backend.release(rid);
        }
        let messages = self.settle(commands);
        drop(guard);
        self.send(messages);
    }

    /// The unit as after power-on, with its endpoints: translation is off, everything is Blocked
    /// or bypassed, and every page request is answered. What is offered stays.
    pub fn reset(&self) {
        let mut guard = self.commands.lock();
        let commands = &mut *guard;
        commands.targets.disable(self.config.bypass);
        commands.registers = Registers::default();
        let withdrawn = {
            let mut pages = lock(&self.pages);
            pages.queue.reset_registers();
            pages.queue.book.withdraw(Scope::All)
        };
        for group in withdrawn {
            group.ticket.respond(PageResponse {
                target: group.target,
                group: group.group,
                code: ResponseCode::Invalid,
            });
        }
        if let Some(remapper) = &self.remapper {
            remapper.update(Remapping::default());
        }
        lock(&self.virtual_commands).reset();
        // What the reset itself refused goes with it.
        drop(self.settle(commands));
        let mut faults = lock(&self.faults);
        faults.reset();
        self.publish(&commands.registers, &faults);
    }

    /// What the guest sees and what is in force.
    pub fn state(&self) -> UnitState {
        let guard = self.commands.lock();
        let commands = &*guard;
        let offer = self.frozen.get().copied().unwrap_or(commands.offer);
        let root = commands.registers.root();
        let (targets, live_targets) = commands.targets.state(TARGETS_IN_STATE);
        let pages = lock(&self.pages);
        let endpoints = commands.targets.rids().iter().map(|&rid| EndpointState {
            endpoint: rid,
            page_requests_waiting: pages.queue.book.groups_of(rid),
        });
        let endpoints = endpoints.collect();
        let (page_requests, page_requests_refused) = pages.queue.counts();
        let privileged_page_requests = pages.privileged;
        drop(pages);
        let (last_faults, faults_recorded, faults_lost) = lock(&self.faults).history();
        UnitState {
            id: self.config.id.clone(),
            mode: Mode::of(&offer),
            frozen: self.frozen.get().is_some(),
            address_width: offer.address_width(),
            pasid_bits: offer.pasid_bits(),
            cap: offer.cap.into_bits(),
            ecap: offer.ecap.into_bits(),
            gsts: commands.registers.status().into_bits(),
            fsts: self.fault_status.load(Ordering::Relaxed),
            root_table: commands
                .registers
                .status()
                .srtp()
                .then_some(Gpa(root.address())),
            scalable_tables: root.mode() == TranslationTableMode::Scalable,
            endpoints,
            targets,
            live_targets,
            queue: commands.queue.counts,
            back_end: commands.targets.counts,
            page_requests,
            page_requests_refused,
            privileged_page_requests,
            faults_recorded,
            faults_lost,
            last_faults,
        }
    }

    /// Tells the guest what back ends refused and what is wrong with its tables.
    fn settle(&self, commands: &mut Commands) -> Vec<Msi> {
        self.head.store(commands.registers.head, Ordering::Release);
        let status = commands.registers.status().into_bits();
        self.status.store(status, Ordering::Release);
        let outcome = &mut commands.targets.outcome;
        if outcome.faults.is_empty() && outcome.refused.is_empty() {
            return Vec::new();
        }
        let outcome = std::mem::take(outcome);
        let mut faults = lock(&self.faults);
        for (target, refused) in outcome.refused {
            if refused {
                faults.refused.insert(target);
            } else {
                faults.refused.remove(&target);
            }
        }
        let mut messages = Vec::new();
        for fault in outcome.faults {
            messages.extend(faults.record(fault));
        }
        self.publish_faults(&faults);
        messages
    }

    fn publish(&self, registers: &Registers, faults: &Faults) {
        self.head.store(registers.head, Ordering::Release);
        self.status
            .store(registers.status().into_bits(), Ordering::Release);
        self.publish_faults(faults);
    }

    fn publish_faults(&self, faults: &Faults) {
        self.fault_status
            .store(faults.status().into_bits(), Ordering::Release);
    }

    fn send(&self, messages: impl IntoIterator<Item = Msi>) {
        for message in messages {
            self.msi.send(message);
        }
    }
}

/// What decoding depends on, while translation is on; no root otherwise.
fn view<'u>(ram: &'u GuestRam, offer: &'u Offer, registers: &Registers) -> View<'u> {
    let status = registers.status();
    View {
        ram,
        offer,
        root: (status.te() && status.srtp()).then(|| registers.root()),
    }
}
