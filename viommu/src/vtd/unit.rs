//! One VT-d unit: what the guest's accesses do, and what the endpoints' faults and page requests
//! become.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};

use super::capabilities::{Extras, Mode, Offer, UnitConfig, Unsupported};
use super::context::{self, Context};
use super::fault::{self, Faults, Recorded};
use super::invalidate::{Invalidations, Surroundings};
use super::page_request::{PageQueue, Queued};
use super::pasid;
use super::registers::{Action, GlobalChange, Registers};
use super::remap::{InterruptRemapper, Remapping, RemappingTable};
use super::state::{EndpointState, UnitState};
use super::targets::{Targets, View};
use super::vcmd::{VcmdWrite, VirtualCommands};
use crate::backend::{
    Backend, EventSink, Fault, FaultCause, PageRequest, PageResponse, Refused, ResponseCode, Scope,
    Translation,
};
use crate::interrupt::{Msi, MsiSink};
use crate::pasid::PasidAllocator;
use crate::spec::vtd::descriptor::{ContextScope, IotlbScope, function_mask, masked_range};
use crate::spec::vtd::fault::FaultReason;
use crate::spec::vtd::registers::{
    self as offset, Ccmd, Global, InvalidateAddress, Iotlb, Rtaddr, TranslationTableMode,
};
use crate::spec::vtd::vcmd::{VCCAP, VCMD, VCRSP};
use crate::{Gpa, GuestRam, Iova, Rid, Target};

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
    /// Who remaps interrupts; needed for `interrupt-remapping=on`.
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
    commands: Mutex<Commands>,
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
    /// The back ends that `offer` is composed from.
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

/// What back ends hold of a unit: nothing that keeps it alive.
struct Events(Weak<Unit>);

impl EventSink for Events {
    fn fault(&self, fault: Fault) {
        if let Some(unit) = self.0.upgrade() {
            unit.fault(fault);
        }
    }

    fn page_request(&self, request: PageRequest) {
        if let Some(unit) = self.0.upgrade() {
            unit.page_request(request);
        }
    }
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
            commands: Mutex::new(Commands {
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
        self.frozen.get_or_init(|| lock(&self.commands).offer)
    }

    /// Puts an endpoint behind the unit. It is Blocked, unless the guest's tables say something
    /// else already or the bypass policy does.
    ///
    /// # Errors
    /// See [`AddError`]; nothing is changed then.
    pub fn add_endpoint(&self, rid: Rid, backend: Arc<dyn Backend>) -> Result<(), AddError> {
        let mut guard = lock(&self.commands);
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
        if !known {
            commands.backends.push(Arc::clone(&backend));
        }
        lock(&self.pages).backends.insert(rid, Arc::clone(&backend));
        commands.targets.add(rid, backend);
        if commands.registers.status().te() {
            let view = view(&self.ram, &commands.offer, &commands.registers);
            commands.targets.refresh_new(view, rid);
        } else {
            commands.targets.default_policy(rid, self.config.bypass);
        }
        let messages = self.settle(commands);
        drop(guard);
        self.send(messages);
        Ok(())
    }

    /// Takes an endpoint away, whatever the guest does: its targets are Blocked, its page
    /// requests are answered, and its back end holds nothing for it. Unknown ones are no error.
    pub fn remove_endpoint(&self, rid: Rid) {
        let mut guard = lock(&self.commands);
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
        let mut guard = lock(&self.commands);
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

    /// The guest reads `data.len()` bytes at `offset` bytes into the registers. What does not
    /// exist reads as 0.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        let mut at = offset;
        let mut rest = data;
        while !rest.is_empty() {
            let dword = self.read_dword(at & !3).to_le_bytes();
            let skip = (at & 3) as usize;
            let count = rest.len().min(4 - skip);
            let (now, later) = rest.split_at_mut(count);
            now.copy_from_slice(&dword[skip..skip + count]);
            at = at.wrapping_add(count as u64);
            rest = later;
        }
    }

    /// The guest writes `data` at `offset` bytes into the registers. Only aligned accesses of 4
    /// and 8 bytes are; others are not obeyed, as 10.2 allows.
    pub fn write(&self, offset: u64, data: &[u8]) {
        let aligned = offset.is_multiple_of(data.len() as u64);
        match *data {
            [a, b, c, d] if aligned => self.write_dword(offset, u32::from_le_bytes([a, b, c, d])),
            [a, b, c, d, e, f, g, h] if aligned => {
                let value = u64::from_le_bytes([a, b, c, d, e, f, g, h]);
                if offset == VCMD {
                    return self.virtual_command(VcmdWrite::Whole(value));
                }
                self.write_dword(offset, value as u32);
                self.write_dword(offset + 4, (value >> 32) as u32);
            }
            _ => {}
        }
    }

    /// What the guest sees and what is in force.
    pub fn state(&self) -> UnitState {
        let guard = lock(&self.commands);
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

    /// Records a blocked interrupt request of `rid` with handle `index` for the guest, unless
    /// `fpd` of its entry says not to.
    pub fn interrupt_fault(&self, rid: Rid, index: u16, reason: FaultReason, fpd: bool) {
        if fpd && reason.is_qualified() {
            return;
        }
        let mut faults = lock(&self.faults);
        let recorded = Recorded {
            target: Target::rid(rid),
            iova: Iova(0),
            write: false,
            execute: false,
            privileged: false,
            reason,
        };
        let message = faults.record_interrupt(recorded, index);
        self.publish_faults(&faults);
        drop(faults);
        self.send(message);
    }

    fn read_dword(&self, at: u64) -> u32 {
        match at {
            // What Linux polls while it waits.
            offset::GSTS => self.status.load(Ordering::Acquire),
            offset::FSTS => self.fault_status.load(Ordering::Acquire),
            offset::IQH => self.head.load(Ordering::Acquire),
            _ if Faults::owns(at) => lock(&self.faults).read(at),
            _ if PageQueue::owns(at) => match self.freeze().ecap.prs() {
                true => lock(&self.pages).queue.read(at),
                false => 0,
            },
            0xe00..0xf00 => self.read_virtual_command(at),
            _ => {
                let offer = self.freeze();
                lock(&self.commands).registers.read(offer, at)
            }
        }
    }

    fn read_virtual_command(&self, at: u64) -> u32 {
        if !self.freeze().ecap.vcs() {
            return 0;
        }
        let registers = lock(&self.virtual_commands);
        let value = match at & !7 {
            VCCAP => registers.vccap(),
            VCRSP => registers.vcrsp(),
            _ => 0,
        };
        if at & 4 == 0 {
            value as u32
        } else {
            (value >> 32) as u32
        }
    }

    fn virtual_command(&self, write: VcmdWrite) {
        let Some(allocator) = self.pasids.as_ref().filter(|_| self.freeze().ecap.vcs()) else {
            return;
        };
        let command = lock(&self.virtual_commands).write(write);
        if let Some(command) = command {
            let completion = command.run(&**allocator);
            let orphan = lock(&self.virtual_commands).complete(completion);
            if let Some(pasid) = orphan
                && let Err(error) = allocator.free(pasid)
            {
                log::debug!("PASID {} of a guest that was reset: {error}", pasid.0);
            }
        }
    }

    fn write_dword(&self, at: u64, value: u32) {
        let offer = self.freeze();
        if Faults::owns(at) {
            let mut faults = lock(&self.faults);
            let done = faults.write(at, value);
            self.publish_faults(&faults);
            drop(faults);
            self.send(done.message);
            if done.resume {
                self.command(|unit, commands| unit.run_queue(offer, commands));
            }
        } else if PageQueue::owns(at) {
            if offer.ecap.prs() {
                let message = lock(&self.pages).queue.write(at, value);
                self.send(message);
            }
        } else if at == VCMD {
            self.virtual_command(VcmdWrite::Low(value));
        } else if at == VCMD + 4 {
            self.virtual_command(VcmdWrite::High(value));
        } else {
            self.command(|unit, commands| {
                match commands.registers.write(offer, at, value) {
                    Action::None => {}
                    Action::Send(message) => return vec![message],
                    Action::Global(change, status) => {
                        return unit.global(offer, commands, change, status);
                    }
                    Action::Queue => return unit.run_queue(offer, commands),
                    Action::Context(command) => unit.invalidate_contexts(offer, commands, command),
                    Action::Iotlb(command, address) => {
                        unit.invalidate_iotlb(offer, commands, command, address);
                    }
                }
                Vec::new()
            });
        }
    }

    /// CCMD.ICC: a context-cache invalidation without the queue.
    fn invalidate_contexts(&self, offer: &Offer, commands: &mut Commands, command: Ccmd) {
        let view = view(&self.ram, offer, &commands.registers);
        let scope = match command.cirg() {
            1 => Some(ContextScope::Global),
            2 => Some(ContextScope::Domain(command.did())),
            3 => Some(ContextScope::Device {
                sid: command.sid(),
                mask: function_mask(command.fm()),
            }),
            _ => None,
        };
        if let Some(scope) = scope {
            commands.targets.invalidate_contexts(view, scope);
            commands.targets.finish(view);
        }
        commands.registers.context_done(command.cirg());
    }

    /// IOTLB.IVT: an IOTLB invalidation without the queue.
    fn invalidate_iotlb(
        &self,
        offer: &Offer,
        commands: &mut Commands,
        command: Iotlb,
        address: InvalidateAddress,
    ) {
        let did = command.did();
        let (scope, done) = match command.iirg() {
            1 => (Some(IotlbScope::Global), 1),
            2 => (Some(IotlbScope::Domain(did)), 2),
            3 if address.am() <= offer.cap.mamv() => {
                let range = masked_range(address);
                (Some(IotlbScope::Pages { did, range }), 3)
            }
            // A mask that is too large is done as the whole domain, and said so.
            3 => (Some(IotlbScope::Domain(did)), 2),
            _ => (None, 0),
        };
        if let Some(scope) = scope {
            let view = view(&self.ram, offer, &commands.registers);
            commands.targets.invalidate_iotlb(scope);
            commands.targets.finish(view);
        }
        commands.registers.iotlb_done(done);
    }

    /// Does something under the command lock, then what follows from it.
    fn command(&self, what: impl FnOnce(&Self, &mut Commands) -> Vec<Msi>) {
        let mut guard = lock(&self.commands);
        let mut messages = what(self, &mut guard);
        messages.extend(self.settle(&mut guard));
        drop(guard);
        self.send(messages);
    }

    fn global(
        &self,
        offer: &Offer,
        commands: &mut Commands,
        change: GlobalChange,
        status: Global,
    ) -> Vec<Msi> {
        let Commands {
            registers, targets, ..
        } = commands;
        if change.root_pointer {
            registers.latch_root();
        }
        if change.queue.is_some() {
            registers.restart_queue();
        }
        if change.root_pointer && status.te() || change.translation == Some(true) {
            let view = View {
                ram: &self.ram,
                offer,
                root: status.srtp().then(|| registers.root()),
            };
            // Faults from here on have the reasons of these tables.
            lock(&self.faults).root = view.root;
            targets.refresh_all(view);
            // CAP.ESRTPS: nothing of what was cached before is used.
            targets.invalidate_iotlb(IotlbScope::Global);
            targets.finish(view);
        } else if change.translation == Some(false) {
            targets.disable(self.config.bypass);
            lock(&self.faults).root = None;
        }
        if (change.interrupt_pointer || change.interrupts)
            && let Some(remapper) = &self.remapper
        {
            let irta = registers.irta();
            remapper.update(Remapping {
                table: status.ire().then(|| RemappingTable {
                    base: Gpa(irta.irta() << 12),
                    entries: 2 << irta.s(),
                    extended: irta.eime(),
                }),
                compatibility: status.cfi(),
            });
        }
        registers.commit(status);
        match change.queue {
            Some(true) => self.run_queue(offer, commands),
            _ => Vec::new(),
        }
    }

    /// Obeys what is in the queue, if it runs.
    fn run_queue(&self, offer: &Offer, commands: &mut Commands) -> Vec<Msi> {
        let Commands {
            registers,
            queue,
            targets,
            ..
        } = commands;
        if !registers.status().qie() || lock(&self.faults).stopped() {
            return Vec::new();
        }
        let mut messages = Vec::new();
        let around = Surroundings {
            view: view(&self.ram, offer, registers),
            remapper: self.remapper.as_deref(),
            owed: &|target, group| lock(&self.pages).queue.book.respond(target, group),
            // A request is put into the queue under this lock, whole.
            drain_page_requests: &|| drop(lock(&self.pages)),
        };
        let stopped = queue.run(registers, targets, &around, &mut messages);
        self.head.store(registers.head, Ordering::Release);
        if let Err(error) = stopped {
            let mut faults = lock(&self.faults);
            messages.extend(faults.stop_queue(error));
            self.publish_faults(&faults);
        }
        messages
    }

    /// Tells the guest what back ends refused and what is wrong with its tables.
    fn settle(&self, commands: &mut Commands) -> Vec<Msi> {
        let outcome = std::mem::take(&mut commands.targets.outcome);
        self.head.store(commands.registers.head, Ordering::Release);
        let status = commands.registers.status().into_bits();
        self.status.store(status, Ordering::Release);
        if outcome.faults.is_empty() && outcome.refused.is_empty() {
            return Vec::new();
        }
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

    fn record(&self, fault: Recorded) {
        let mut faults = lock(&self.faults);
        let message = faults.record(fault);
        self.publish_faults(&faults);
        drop(faults);
        self.send(message);
    }

    /// Which tables are in force, and what is offered; none while translation is off.
    fn tables(&self) -> Option<(&Offer, Rtaddr)> {
        let root = lock(&self.faults).root?;
        Some((self.freeze(), root))
    }
}

impl EventSink for Unit {
    fn fault(&self, fault: Fault) {
        // With translation off, hardware has no tables to blame.
        let Some((offer, root)) = self.tables() else {
            return;
        };
        let decoded = pasid::lookup(&self.ram, offer, root, fault.target);
        let fpd = match decoded {
            Ok(entry) => entry.fpd,
            Err(problem) => problem.fpd,
        };
        let reason = match (fault.cause, decoded) {
            (FaultCause::Blocked, Err(problem)) => problem.reason,
            (FaultCause::Blocked, Ok(_)) if lock(&self.faults).refused.contains(&fault.target) => {
                match root.mode() {
                    TranslationTableMode::Legacy => FaultReason::ContextEntryInvalid,
                    _ => FaultReason::PasidEntryInvalid,
                }
            }
            (_, Ok(entry)) => fault::reason(root.mode(), entry.translation, &fault),
            // The tables changed while the access was under way: as they were then.
            (_, Err(_)) => fault::reason(root.mode(), Translation::Blocked, &fault),
        };
        if fpd && reason.is_qualified() {
            return;
        }
        self.record(Recorded {
            target: fault.target,
            iova: fault.iova,
            write: fault.access.write,
            execute: fault.execute,
            privileged: fault.privileged,
            reason,
        });
    }

    fn page_request(&self, request: PageRequest) {
        let target = request.target;
        let refused = self.page_request_fault(target);
        if let Some((reason, fpd)) = refused
            && !(fpd && reason.is_qualified())
        {
            self.record(Recorded {
                target,
                iova: request.iova,
                write: request.access.write,
                execute: request.execute,
                privileged: request.privileged,
                reason,
            });
        }
        let mut pages = lock(&self.pages);
        // An endpoint that left has its requests answered by its back end.
        let Some(backend) = pages.backends.get(&target.endpoint).cloned() else {
            return;
        };
        let (queued, message) = if refused.is_some() {
            (Queued::No(ResponseCode::Invalid), None)
        } else if request.privileged {
            pages.privileged += 1;
            (Queued::No(ResponseCode::Invalid), None)
        } else {
            pages
                .queue
                .request(&self.ram, &request, Arc::clone(&backend))
        };
        drop(pages);
        self.send(message);
        if let Queued::No(code) = queued
            && request.last
        {
            backend.respond(PageResponse {
                target,
                group: request.group,
                code,
            });
        }
    }
}

impl Unit {
    /// Why a page request of `target` is not for the guest, and FPD.
    fn page_request_fault(&self, target: Target) -> Option<(FaultReason, bool)> {
        // With translation off, or not offered, nobody asked for page requests.
        let Some((offer, root)) = self.tables().filter(|(offer, _)| offer.ecap.prs()) else {
            return Some((FaultReason::PageRequestDisabled, true));
        };
        match context::decode(&self.ram, offer, root, target.endpoint) {
            Err(problem) => Some((problem.reason, problem.fpd)),
            Ok(Context::Legacy(_)) => Some((FaultReason::PageRequestInLegacyMode, false)),
            Ok(Context::Scalable(context)) if !context.pre => {
                Some((FaultReason::PageRequestDisabled, context.fpd))
            }
            Ok(Context::Scalable(context)) if target.pasid.is_some() && !context.paside => {
                Some((FaultReason::PasidDisabled, context.fpd))
            }
            Ok(Context::Scalable(_)) => None,
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
