//! The one fault sink: recording registers, FSTS, the fault event, and which reason a blocked
//! access has (chapter 7).

use std::collections::BTreeSet;

use serde::Serialize;

use super::capabilities::FAULT_RECORDS;
use super::event::EventInterrupt;
use crate::backend::{Fault, FaultCause, Stage, Translation};
use crate::interrupt::Msi;
use crate::spec::vtd::fault::{
    FAULT_RECORD_SIZE, FaultReason, FaultRecord, FaultRecordHigh, FaultRecordLow,
};
use crate::spec::vtd::registers::{self, Fsts, Iqercd, QueueError, Rtaddr, TranslationTableMode};
use crate::{Iova, Target};

/// How many of the last faults are kept for `vm.viommu`, whatever the guest clears.
const HISTORY: usize = 16;

/// A fault as it is recorded.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct Recorded {
    /// Whose access.
    pub target: Target,
    /// At which address.
    pub iova: Iova,
    /// What kind of request it was.
    pub request: RequestKind,
    /// It was a write.
    pub write: bool,
    /// It was an instruction fetch.
    pub execute: bool,
    /// It was privileged.
    pub privileged: bool,
    /// Why it was blocked.
    pub reason: FaultReason,
}

/// The kinds of requests that a record tells apart.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize)]
#[serde(rename_all = "kebab-case")]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub enum RequestKind {
    /// DMA, or an interrupt.
    #[default]
    Untranslated,
    /// A translation request (ATS).
    Translation,
    /// A page request (PRI).
    Page,
}

/// FSTS, FECTL and its message, the fault recording registers, IQERCD.
#[derive(Debug, Default)]
pub(super) struct Faults {
    records: [FaultRecord; FAULT_RECORDS],
    /// Where the next fault is recorded; records are used round robin.
    next: usize,
    /// IQE, ICE, ITE and PFO; PPF and FRI follow from the records.
    status: Fsts,
    queue_error: Iqercd,
    event: EventInterrupt,
    /// Which tables are in force, as the fault path needs them. `None` while translation is off.
    pub(super) root: Option<Rtaddr>,
    /// Targets whose translation the back end refused.
    pub(super) refused: BTreeSet<Target>,
    history: Vec<Recorded>,
    recorded: u64,
    lost: u64,
}

/// What a write to the fault registers leads to.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct FaultWrite {
    /// An interrupt to send.
    pub(super) message: Option<Msi>,
    /// The invalidation queue may go on.
    pub(super) resume: bool,
}

impl Faults {
    /// Everything as after reset. What is counted is not forgotten.
    pub(super) fn reset(&mut self) {
        *self = Self {
            history: std::mem::take(&mut self.history),
            recorded: self.recorded,
            lost: self.lost,
            ..Self::default()
        };
    }

    /// The Fault Status Register.
    pub(super) fn status(&self) -> Fsts {
        let first = (0..FAULT_RECORDS)
            .map(|i| (self.next + i) % FAULT_RECORDS)
            .find(|&i| self.records[i].hi.f());
        self.status
            .with_ppf(first.is_some())
            .with_fri(first.unwrap_or(0) as u8)
    }

    /// Whether `offset` (of a dword) is one of these registers.
    pub(super) fn owns(offset: u64) -> bool {
        matches!(
            offset,
            registers::FSTS..=registers::FEUADDR | registers::IQERCD..registers::IRTA
        ) || Self::record_of(offset).is_some()
    }

    fn record_of(offset: u64) -> Option<(usize, u64)> {
        let inside = offset.checked_sub(registers::FRCD)?;
        let index = (inside / FAULT_RECORD_SIZE) as usize;
        (index < FAULT_RECORDS).then_some((index, inside % FAULT_RECORD_SIZE))
    }

    /// Reads the dword at `offset`.
    pub(super) fn read(&self, offset: u64) -> u32 {
        if let Some((index, at)) = Self::record_of(offset) {
            let record = self.records[index];
            return match at {
                0 => record.lo.into_bits() as u32,
                4 => (record.lo.into_bits() >> 32) as u32,
                8 => record.hi.into_bits() as u32,
                _ => (record.hi.into_bits() >> 32) as u32,
            };
        }
        match offset {
            registers::FSTS => self.status().into_bits(),
            registers::FECTL..=registers::FEUADDR => {
                self.event.read((offset - registers::FECTL) / 4)
            }
            registers::IQERCD => self.queue_error.into_bits() as u32,
            _ => (self.queue_error.into_bits() >> 32) as u32,
        }
    }

    /// Writes the dword at `offset`.
    pub(super) fn write(&mut self, offset: u64, value: u32) -> FaultWrite {
        let mut done = FaultWrite::default();
        if let Some((index, at)) = Self::record_of(offset) {
            if at == 12 && value >> 31 != 0 {
                self.records[index] = FaultRecord::default();
            }
        } else if offset == registers::FSTS {
            let clear = Fsts::from_bits(value);
            let stopped = self.stopped();
            self.status.set_pfo(self.status.pfo() && !clear.pfo());
            self.status.set_iqe(self.status.iqe() && !clear.iqe());
            self.status.set_ice(self.status.ice() && !clear.ice());
            self.status.set_ite(self.status.ite() && !clear.ite());
            if !self.status.iqe() {
                self.queue_error.set_iqei(0);
            }
            done.resume = stopped && !self.stopped();
        } else if let registers::FECTL..=registers::FEUADDR = offset {
            done.message = self.event.write((offset - registers::FECTL) / 4, value);
        }
        if !self.pending() {
            self.event.serviced();
        }
        done
    }

    /// The invalidation queue must not go on until software has cleared an error.
    pub(super) fn stopped(&self) -> bool {
        self.status.iqe() || self.status.ice() || self.status.ite()
    }

    fn pending(&self) -> bool {
        let status = self.status();
        status.ppf() || status.pfo() || self.stopped()
    }

    /// Neither DMA nor interrupts are remapped: recording begins at the first register (7.2.1).
    pub(super) fn rewind(&mut self) {
        self.next = 0;
    }

    /// The invalidation queue stops.
    pub(super) fn stop_queue(&mut self, error: QueueError) -> Option<Msi> {
        let event = !self.pending();
        self.status.set_iqe(true);
        self.queue_error.set_iqei(error as u8);
        if event { self.event.raise() } else { None }
    }

    /// Records a fault, or notes that there was no room (7.3.1). The interrupt is sent for the
    /// first of several that software has not serviced.
    pub(super) fn record(&mut self, fault: Recorded) -> Option<Msi> {
        self.remember(fault);
        let event = !self.pending();
        if self.status.pfo() {
            self.lost += 1;
            return None;
        }
        if self.records[self.next].hi.f() {
            self.lost += 1;
            self.status.set_pfo(true);
            return if event { self.event.raise() } else { None };
        }
        self.recorded += 1;
        let pasid = fault.target.pasid;
        self.records[self.next] = FaultRecord {
            lo: FaultRecordLow::new().with_fi(fault.iova.0 >> 12),
            hi: FaultRecordHigh::new()
                .with_sid(fault.target.endpoint.0)
                .with_t1(!fault.write && fault.request != RequestKind::Page)
                .with_t2(fault.request == RequestKind::Page)
                .with_at((fault.request == RequestKind::Translation).into())
                .with_pp(pasid.is_some())
                .with_pv(pasid.map_or(0, |pasid| pasid.0))
                .with_exe(pasid.is_some() && fault.execute)
                .with_priv(pasid.is_some() && fault.privileged)
                .with_fr(fault.reason.code())
                .with_f(true),
        };
        self.next = (self.next + 1) % FAULT_RECORDS;
        if event { self.event.raise() } else { None }
    }

    /// Records an interrupt request that was blocked: `index` is its handle.
    pub(super) fn record_interrupt(&mut self, fault: Recorded, index: u16) -> Option<Msi> {
        self.record(Recorded {
            iova: Iova(u64::from(index) << 48),
            ..fault
        })
    }

    fn remember(&mut self, fault: Recorded) {
        if self.history.len() == HISTORY {
            self.history.remove(0);
        }
        self.history.push(fault);
    }

    /// The last faults, oldest first; recorded and lost ones are counted.
    pub(super) fn history(&self) -> (Vec<Recorded>, u64, u64) {
        (self.history.clone(), self.recorded, self.lost)
    }
}

/// The reason that a fault of a back end has for the guest. `translation` is what its tables say
/// the target has. For [`FaultCause::Blocked`] the tables know better: see the caller.
pub(super) fn reason(
    mode: TranslationTableMode,
    translation: Translation,
    fault: &Fault,
) -> FaultReason {
    use FaultReason as R;
    let legacy = mode == TranslationTableMode::Legacy;
    let pick = |in_legacy, in_scalable| if legacy { in_legacy } else { in_scalable };
    let not_permitted = if fault.access.write {
        pick(R::WriteNotPermitted, R::ScalableWriteNotPermitted)
    } else {
        pick(R::ReadNotPermitted, R::ScalableReadNotPermitted)
    };
    match fault.cause {
        FaultCause::Blocked => pick(R::ContextEntryNotPresent, R::PasidEntryNotPresent),
        FaultCause::AddressWidth => match translation {
            _ if legacy => R::AddressBeyondWidth,
            Translation::Stage2(_) => R::SecondStageBeyondWidth,
            Translation::Identity => R::PassThroughBeyondWidth,
            _ => R::NotCanonical,
        },
        FaultCause::SupervisorPage => R::UserRequestToSupervisorPage,
        FaultCause::BeyondSecondStage => R::FirstStageTableBeyondWidth,
        FaultCause::NotMapped { stage, .. } => match stage {
            Stage::First => R::FirstStageNotPresent,
            _ if legacy => not_permitted,
            _ => R::ScalableSecondStageNotPresent,
        },
        FaultCause::Permission { stage, .. } => match stage {
            Stage::First if fault.execute && !fault.access.write => R::ExecuteNotPermitted,
            Stage::First | Stage::Second => not_permitted,
            Stage::SecondForRoot => R::FirstStageRootNotReadable,
            Stage::SecondForTable => R::FirstStageNotReadable,
            Stage::SecondForUpdate => R::FirstStageNotWritable,
        },
        FaultCause::Reserved { stage, .. } => match stage {
            Stage::First => R::FirstStageReserved,
            _ => pick(R::SecondStageReserved, R::ScalableSecondStageReserved),
        },
        FaultCause::TableAccess { stage, level } => match (stage, translation) {
            (Stage::First, Translation::Stage1(stage1) | Translation::Nested { stage1, .. })
                if level == levels(stage1.width) =>
            {
                R::FirstStageRootAccess
            }
            (Stage::First, _) => R::FirstStageAccess,
            // A root that the context entry names wrongly is that entry's fault (LCT.4.3).
            (_, Translation::Stage2(stage2)) if legacy && level == levels(stage2.width) => {
                R::ContextEntryInvalid
            }
            _ if legacy => R::SecondStageAccess,
            (_, Translation::Stage2(stage2) | Translation::Nested { stage2, .. })
                if level == levels(stage2.width) =>
            {
                R::SecondStageRootAccess
            }
            _ => R::ScalableSecondStageAccess,
        },
        FaultCause::OutsideMemory => match translation {
            Translation::Identity => pick(R::AddressBeyondWidth, R::PassThroughBeyondWidth),
            _ => not_permitted,
        },
        FaultCause::Supervisor => R::SupervisorDisabled,
        FaultCause::ExecuteDisabled => R::ExecuteDisabled,
        FaultCause::UpdateNotSnooped => R::FirstStageAccessedDirty,
        FaultCause::NotAMessage => R::NotAnInterrupt,
        FaultCause::InterruptRange | FaultCause::Doorbell(_) => {
            pick(R::InterruptRange, R::ScalableInterruptRange)
        }
        FaultCause::DomainAccess | FaultCause::DomainUnmapped => not_permitted,
    }
}

/// Levels of a table for addresses of `width` bits.
const fn levels(width: u8) -> u8 {
    width.saturating_sub(12).div_ceil(9)
}
