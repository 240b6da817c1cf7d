//! The invalidation queue (6.5.2): from the head to the tail within the write of the tail, all
//! effects before any completion.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use serde::Serialize;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::queue::Ring;
use super::registers::Registers;
use super::remap::InterruptRemapper;
use super::targets::{Targets, View};
use crate::backend::{Backend, PageResponse, ResponseCode, Scope};
use crate::interrupt::Msi;
use crate::spec::vtd::descriptor::{self, Descriptor, Words};
use crate::spec::vtd::registers::{QueueError, TranslationTableMode};
use crate::{Pasid, Rid, Target};

/// How many bytes of the queue are read at a time: one page.
const CHUNK: usize = 4096;
/// Ranges of interrupt entries that are collected. Of more, all entries are invalidated.
const INTERRUPT_RANGES: usize = 256;

/// A wait descriptor that is to be reported as done.
#[derive(Clone, Copy, Debug)]
struct Completion {
    status: Option<(u64, u32)>,
    interrupt: bool,
}

/// How many descriptors of each kind were obeyed, for `vm.viommu`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct QueueCounts {
    /// Context-cache invalidations.
    pub context_cache: u64,
    /// PASID-cache invalidations.
    pub pasid_cache: u64,
    /// IOTLB invalidations.
    pub iotlb: u64,
    /// PASID-based IOTLB invalidations.
    pub pasid_iotlb: u64,
    /// Device-TLB invalidations, with and without PASID.
    pub device_tlb: u64,
    /// Interrupt entry cache invalidations.
    pub interrupt_entry_cache: u64,
    /// Page group responses.
    pub page_group_response: u64,
    /// Waits.
    pub wait: u64,
    /// Descriptors that stopped the queue.
    pub errors: u64,
    /// Status writes to where there is no RAM.
    pub lost_status: u64,
}

/// What one run of the queue needs from the unit around it.
pub(super) struct Surroundings<'u> {
    pub(super) view: View<'u>,
    pub(super) remapper: Option<&'u dyn InterruptRemapper>,
    /// Takes the answer that a group is owed off the book, with the back end that passes it on.
    pub(super) owed: &'u dyn Fn(Target, u16) -> Option<Arc<dyn Backend>>,
    /// Returns when every page request that came before is in the guest's queue.
    pub(super) drain_page_requests: &'u dyn Fn(),
}

/// Interrupt entries that are to be invalidated.
#[derive(Debug, Default)]
struct InterruptEntries {
    all: bool,
    ranges: Vec<(u16, u32)>,
}

impl InterruptEntries {
    fn add(&mut self, entries: Option<(u16, u32)>) {
        match entries {
            Some(range) if self.ranges.len() < INTERRUPT_RANGES => self.ranges.push(range),
            _ => self.all = true,
        }
    }

    /// Tells the remapper, in one call.
    fn finish(&mut self, remapper: Option<&dyn InterruptRemapper>) {
        if let Some(remapper) = remapper
            && (self.all || !self.ranges.is_empty())
        {
            remapper.invalidate((!self.all).then_some(&self.ranges));
        }
        self.all = false;
        self.ranges.clear();
    }
}

/// Buffers and counts of the queue; nothing is allocated per descriptor.
#[derive(Debug, Default)]
pub(super) struct Invalidations {
    completions: Vec<Completion>,
    /// A page of the queue.
    buffer: Vec<u8>,
    drain: bool,
    interrupts: InterruptEntries,
    pub(super) counts: QueueCounts,
}

impl Invalidations {
    /// Obeys everything from the head to the tail that the guest wrote, once. All effects take
    /// place before the first wait descriptor is reported as done, so that one run is one batch
    /// per back end; nobody can tell it from a run that went descriptor by descriptor.
    ///
    /// # Errors
    /// The queue stops at the head; what came before is done and reported.
    pub(super) fn run(
        &mut self,
        registers: &mut Registers,
        targets: &mut Targets,
        around: &Surroundings,
        interrupts: &mut Vec<Msi>,
    ) -> Result<(), QueueError> {
        let mut buffer = std::mem::take(&mut self.buffer);
        buffer.resize(CHUNK, 0);
        let result = self.walk(registers, targets, around, &mut buffer);
        self.buffer = buffer;
        self.counts.errors += u64::from(result.is_err());
        targets.finish(around.view);
        self.interrupts.finish(around.remapper);
        self.complete(around, registers, interrupts);
        result
    }

    fn walk(
        &mut self,
        registers: &mut Registers,
        targets: &mut Targets,
        around: &Surroundings,
        buffer: &mut [u8],
    ) -> Result<(), QueueError> {
        let offer = around.view.offer;
        let iqa = registers.iqa();
        let mut offered = offer.descriptors();
        match registers.root().mode() {
            TranslationTableMode::Legacy => offered.scalable = false,
            TranslationTableMode::Scalable if offer.ecap.smts() => {
                // Scalable mode has descriptors of 256 bits only.
                if !iqa.dw() {
                    return Err(QueueError::Width);
                }
            }
            _ => return Err(QueueError::TableMode),
        }
        if iqa.dw() && !offer.ecap.smts() {
            return Err(QueueError::Width);
        }
        let size: u32 = if iqa.dw() { 32 } else { 16 };
        let ring = Ring::new(iqa.iqa() << 12, iqa.qs(), size);
        let tail = registers.tail();
        if !ring.is_aligned(tail) {
            return Err(QueueError::Alignment);
        }
        if !ring.contains(tail) || !ring.contains(registers.head) {
            return Err(QueueError::Tail);
        }
        // A head from before the width changed.
        if !ring.is_aligned(registers.head) {
            return Err(QueueError::Alignment);
        }
        while registers.head != tail {
            let length = CHUNK.min(ring.contiguous(registers.head, tail) as usize);
            let at = ring.address(registers.head).ok_or(QueueError::Fetch)?;
            let chunk = &mut buffer[..length];
            around
                .view
                .ram
                .read_slice(chunk, at)
                .map_err(|_| QueueError::Fetch)?;
            for bytes in chunk.chunks_exact(size as usize) {
                // Obeyed where it is: copying it at once would wait for its words to be written.
                match &descriptor::decode(words(bytes), offered) {
                    Ok(decoded) => self.obey(decoded, targets, around),
                    Err(error) => return Err(*error),
                }
                registers.head = ring.next(registers.head);
            }
        }
        Ok(())
    }

    #[inline]
    fn obey(&mut self, descriptor: &Descriptor, targets: &mut Targets, around: &Surroundings) {
        let counts = &mut self.counts;
        match *descriptor {
            Descriptor::ContextCache(scope) => {
                counts.context_cache += 1;
                targets.invalidate_contexts(around.view, scope);
            }
            Descriptor::PasidCache(scope) => {
                counts.pasid_cache += 1;
                targets.invalidate_pasids(around.view, scope);
            }
            Descriptor::Iotlb(scope) => {
                counts.iotlb += 1;
                targets.invalidate_iotlb(scope);
            }
            Descriptor::PasidIotlb { did, pasid, range } => {
                counts.pasid_iotlb += 1;
                targets.invalidate_pasid_iotlb(did, pasid, range);
            }
            Descriptor::DeviceTlb { sid, range } => {
                counts.device_tlb += 1;
                targets.invalidate_device(Scope::Target(Target::rid(Rid(sid))), range);
            }
            Descriptor::PasidDeviceTlb { sid, pasid, range } => {
                counts.device_tlb += 1;
                let scope = match pasid {
                    Some(pasid) => Scope::Target(Target::pasid(Rid(sid), Pasid(pasid))),
                    None => Scope::Endpoint(Rid(sid)),
                };
                targets.invalidate_device(scope, range);
            }
            Descriptor::InterruptEntryCache { entries } => {
                counts.interrupt_entry_cache += 1;
                self.interrupts.add(entries);
            }
            Descriptor::PageGroupResponse {
                rid,
                pasid,
                prgi,
                code,
            } => {
                counts.page_group_response += 1;
                let target = Target {
                    endpoint: Rid(rid),
                    pasid: pasid.map(Pasid),
                };
                // A group that nobody waits for is no error: its device may be gone.
                if let Some(backend) = (around.owed)(target, prgi) {
                    // The device acts on the answer: what was said before must be true by then.
                    targets.finish(around.view);
                    self.interrupts.finish(around.remapper);
                    backend.respond(PageResponse {
                        target,
                        group: prgi,
                        code: match code {
                            0 => ResponseCode::Success,
                            1 => ResponseCode::Invalid,
                            _ => ResponseCode::Failure,
                        },
                    });
                }
            }
            Descriptor::Wait {
                status,
                interrupt,
                fence: _,
                drain,
            } => {
                counts.wait += 1;
                self.drain |= drain;
                if status.is_some() || interrupt {
                    self.completions.push(Completion { status, interrupt });
                }
            }
        }
    }

    /// Reports wait descriptors as done, in order. There are at most as many as the queue has
    /// entries.
    fn complete(
        &mut self,
        around: &Surroundings,
        registers: &mut Registers,
        interrupts: &mut Vec<Msi>,
    ) {
        if std::mem::take(&mut self.drain) {
            (around.drain_page_requests)();
        }
        for completion in self.completions.drain(..) {
            if let Some((at, data)) = completion.status {
                let written = store(around.view.ram, at, data);
                self.counts.lost_status += u64::from(!written);
            }
            if completion.interrupt {
                interrupts.extend(registers.completion());
            }
        }
    }
}

/// Writes a status word so that no vCPU sees half of it, or sees it before the effects.
fn store(ram: &GuestMemoryMmap<()>, at: u64, data: u32) -> bool {
    ram.store(data.to_le(), GuestAddress(at), Ordering::Release)
        .is_ok()
}

/// The words of a descriptor of 16 or 32 bytes.
#[inline]
fn words(bytes: &[u8]) -> Words {
    match *bytes.as_chunks::<8>().0 {
        [a, b, c, d] => [a, b, c, d].map(u64::from_le_bytes),
        [a, b, ..] => [u64::from_le_bytes(a), u64::from_le_bytes(b), 0, 0],
        _ => [0; 4],
    }
}
