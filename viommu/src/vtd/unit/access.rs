//! The guest's reads and writes of the register page, and the commands that they give.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::{Commands, Unit, lock, view};
use crate::Gpa;
use crate::interrupt::Msi;
use crate::spec::vtd::descriptor::{ContextScope, IotlbScope, function_mask, masked_range};
use crate::spec::vtd::registers::{
    self as offset, Ccmd, Fsts, Global, InvalidateAddress, Iotlb, TranslationTableMode,
};
use crate::spec::vtd::vcmd::{VCCAP, VCMD, VCRSP};
use crate::vtd::capabilities::Offer;
use crate::vtd::fault::Faults;
use crate::vtd::invalidate::Surroundings;
use crate::vtd::page_request::PageQueue;
use crate::vtd::registers::{Action, GlobalChange};
use crate::vtd::remap::{Remapping, RemappingTable};
use crate::vtd::targets::View;
use crate::vtd::vcmd::VcmdWrite;

impl Unit {
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
                self.commands.lock().registers.read(offer, at)
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
        // In scalable mode there is only the queue, and this is an incorrect request.
        let asked = match commands.registers.root().mode() {
            TranslationTableMode::Legacy => command.cirg(),
            _ => 0,
        };
        let scope = match asked {
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
        commands.registers.context_done(asked);
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
        let asked = match commands.registers.root().mode() {
            TranslationTableMode::Legacy => command.iirg(),
            _ => 0,
        };
        let (scope, done) = match asked {
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
        let mut guard = self.commands.lock();
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
        if change.interrupt_pointer {
            registers.latch_interrupt_table();
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
            let irta = registers.interrupt_table();
            remapper.update(Remapping {
                table: status.ire().then(|| RemappingTable {
                    base: Gpa(irta.irta() << 12),
                    entries: 2 << irta.s(),
                    extended: irta.eime(),
                }),
                compatibility: status.cfi(),
            });
        }
        if !status.te() && !status.ire() {
            lock(&self.faults).rewind();
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
        // Only this sets it, with `commands` held; who clears it runs the queue after that.
        let faults = Fsts::from_bits(self.fault_status.load(Ordering::Acquire));
        if !registers.status().qie() || faults.iqe() || faults.ite() || faults.ice() {
            return Vec::new();
        }
        let mut messages = Vec::new();
        let around = Surroundings {
            view: view(&self.ram, offer, registers),
            remapper: self.remapper.as_deref(),
            owed: &|target, group| lock(&self.pages).queue.book.respond(target, group),
            // A request is put into the queue under this lock, whole.
            drain_page_requests: &|| {
                // Those of the endpoints that are there: some came late. A back end calls the unit
                // meanwhile, so the lock is let go.
                let mut backends: Vec<_> = lock(&self.pages).backends.values().cloned().collect();
                backends.sort_by_key(|backend| Arc::as_ptr(backend).addr());
                backends.dedup_by(|a, b| Arc::ptr_eq(a, b));
                for backend in backends {
                    backend.drain_page_requests();
                }
                drop(lock(&self.pages));
            },
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
}
