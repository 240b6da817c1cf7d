//! Interrupt remapping (VT-d chapter 5): what an interrupt request becomes by a unit's table.
//!
//! `remap` is pure. [`RemappingUnit`] stands between a unit, which owns the registers and the
//! invalidation queue, and the VM's interrupt routes.

#![forbid(unsafe_code)]

use std::ops::RangeInclusive;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, PoisonError, RwLock, Weak};

use serde::Serialize;
use viommu::interrupt::Msi;
use viommu::spec::vtd::fault::FaultReason;
use viommu::spec::vtd::irte::{IRTE_SIZE, IrteHigh, IrteLow, RemappableAddress};
use viommu::vtd::{InterruptRemapper, Remapping, Unit};
use viommu::{GuestRam, Rid};
use vm_memory::{Bytes, GuestAddress};

use super::{Interrupts, Remapper};

/// How often an entry that changes is read again.
const MIXED: usize = 4;

/// Why an interrupt request is blocked (5.1.4.1).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Blocked {
    index: u16,
    reason: FaultReason,
    /// Fault Processing Disable of the entry.
    fpd: bool,
}

/// What `msi` from `rid` becomes. `entry` reads an entry of the table at an address; `None` where
/// there is no memory.
fn remap(
    remapping: Remapping,
    entry: impl FnOnce(u64) -> Option<(IrteLow, IrteHigh)>,
    rid: Rid,
    msi: Msi,
) -> Result<Msi, Blocked> {
    let Some(table) = remapping.table else {
        return Ok(msi);
    };
    let address = RemappableAddress::from_bits(msi.address as u32);
    let blocked = |index, reason, fpd| Err(Blocked { index, reason, fpd });
    if !address.remappable() {
        return match remapping.compatibility && !table.extended {
            true => Ok(msi),
            false => blocked(0, FaultReason::InterruptCompatibilityBlocked, false),
        };
    }
    let index = index(msi);
    if address.shv() && msi.data >> 16 != 0 {
        return blocked(index as u16, FaultReason::InterruptRequestReserved, false);
    }
    if index >= table.entries {
        return blocked(index as u16, FaultReason::InterruptIndex, false);
    }
    let index = index as u16;
    let Some((low, high)) = entry(table.base.0 + u64::from(index) * IRTE_SIZE) else {
        return blocked(index, FaultReason::InterruptTableAccess, false);
    };
    if !low.p() {
        return blocked(index, FaultReason::InterruptEntryNotPresent, low.fpd());
    }
    // Posted interrupts are not offered (CAP.PI), so their mode is reserved.
    if low.into_bits() & IrteLow::RESERVED != 0
        || high.into_bits() & IrteHigh::RESERVED != 0
        || low.im()
        || high.svt() == 3
    {
        return blocked(index, FaultReason::InterruptEntryReserved, low.fpd());
    }
    if !from_its_source(high, rid) {
        return blocked(index, FaultReason::InterruptSource, low.fpd());
    }
    Ok(message(low, table.extended))
}

/// The index into the table that a remappable request names; it may be outside of any table.
fn index(msi: Msi) -> u32 {
    let address = RemappableAddress::from_bits(msi.address as u32);
    let sub_handle = match address.shv() {
        true => msi.data & 0xffff,
        false => 0,
    };
    u32::from(address.index()) + sub_handle
}

/// Source validation (9.9, SVT, SQ and SID).
fn from_its_source(high: IrteHigh, rid: Rid) -> bool {
    match high.svt() {
        1 => {
            let ignored = [0, 0b100, 0b110, 0b111][usize::from(high.sq() & 3)];
            high.sid() & !ignored == rid.0 & !ignored
        }
        2 => {
            let [last, first] = high.sid().to_le_bytes();
            (first..=last).contains(&rid.bus())
        }
        _ => true,
    }
}

/// The interrupt that an entry makes, as an MSI in compatibility format.
fn message(low: IrteLow, extended: bool) -> Msi {
    const DOORBELL: u64 = 0xfee0_0000;
    const ASSERT: u32 = 1 << 14;
    let destination = match extended {
        true => low.dst(),
        false => low.dst() >> 8 & 0xff,
    };
    let trigger = match low.tm() {
        true => 1 << 15 | ASSERT,
        false => 0,
    };
    Msi {
        address: u64::from(destination & !0xff) << 32
            | DOORBELL
            | u64::from(destination & 0xff) << 12
            | u64::from(low.rh()) << 3
            | u64::from(low.dm()) << 2,
        data: u32::from(low.v()) | u32::from(low.dlm()) << 8 | trigger,
    }
}

/// A unit's remapping, in front of the VM's interrupt routes.
///
/// Lock order: the unit's, then those of [`Interrupts`], then `current`.
pub struct RemappingUnit {
    ram: GuestRam,
    interrupts: Weak<Interrupts>,
    /// Where blocked requests are recorded; set once the unit exists.
    unit: OnceLock<Weak<Unit>>,
    current: RwLock<Remapping>,
    blocked: AtomicU64,
    invalidations: AtomicU64,
}

/// The live state of a unit's remapping.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, utoipa::ToSchema)]
pub struct RemappingState {
    /// Whether interrupts are remapped.
    pub enabled: bool,
    /// Extended interrupt mode: destinations have 32 bits.
    pub extended: bool,
    /// Whether interrupts in compatibility format pass.
    pub compatibility: bool,
    /// Invalidations of the entry cache.
    pub invalidations: u64,
    /// Interrupts that were sent and blocked.
    pub blocked: u64,
}

impl RemappingUnit {
    /// Remapping that is off.
    pub fn new(ram: GuestRam, interrupts: &Arc<Interrupts>) -> Arc<Self> {
        Arc::new(Self {
            ram,
            interrupts: Arc::downgrade(interrupts),
            unit: OnceLock::new(),
            current: RwLock::default(),
            blocked: AtomicU64::new(0),
            invalidations: AtomicU64::new(0),
        })
    }

    /// Names the unit that records faults. The first call counts.
    pub fn belongs_to(&self, unit: &Arc<Unit>) {
        let _ = self.unit.set(Arc::downgrade(unit));
    }

    fn decide(&self, rid: Rid, msi: Msi) -> Result<Msi, Blocked> {
        let current = *self.current.read().unwrap_or_else(PoisonError::into_inner);
        remap(current, |at| self.entry_at(at), rid, msi)
    }

    /// The entry at `at`, which guests write with one instruction of 128 bits: read once more
    /// when it changed meanwhile, so that no half of it is of another interrupt. A guest that never
    /// stops writing gets some mixture of what it wrote.
    fn entry_at(&self, at: u64) -> Option<(IrteLow, IrteHigh)> {
        let half = |at| self.ram.load::<u64>(GuestAddress(at), Ordering::Acquire);
        let mut low = half(at).ok()?;
        let mut high = half(at + 8).ok()?;
        for _ in 0..MIXED {
            let again = half(at).ok()?;
            if again == low {
                break;
            }
            (low, high) = (again, half(at + 8).ok()?);
        }
        Some((IrteLow::from_bits(low), IrteHigh::from_bits(high)))
    }

    /// What the guest set, and what came of it.
    pub fn state(&self) -> RemappingState {
        let current = *self.current.read().unwrap_or_else(PoisonError::into_inner);
        let table = current.table;
        RemappingState {
            enabled: table.is_some(),
            extended: table.is_some_and(|table| table.extended),
            compatibility: current.compatibility,
            invalidations: self.invalidations.load(Ordering::Relaxed),
            blocked: self.blocked.load(Ordering::Relaxed),
        }
    }

    fn reevaluate(&self, entries: Option<&[RangeInclusive<u32>]>) {
        if let Some(interrupts) = self.interrupts.upgrade()
            && let Err(why) = interrupts.reevaluate(self, entries)
        {
            log::error!("interrupt routes were lost when a table was invalidated: {why}");
        }
    }
}

impl Remapper for RemappingUnit {
    fn remap(&self, rid: Rid, msi: Msi) -> Option<Msi> {
        self.decide(rid, msi).ok()
    }

    fn send(&self, rid: Rid, msi: Msi) -> Option<Msi> {
        let decided = self.decide(rid, msi);
        if let Err(blocked) = decided {
            self.blocked.fetch_add(1, Ordering::Relaxed);
            if let Some(unit) = self.unit.get().and_then(Weak::upgrade) {
                unit.interrupt_fault(rid, blocked.index, blocked.reason, blocked.fpd);
            }
        }
        decided.ok()
    }

    fn entry(&self, msi: Msi) -> Option<u32> {
        let address = RemappableAddress::from_bits(msi.address as u32);
        address.remappable().then(|| index(msi))
    }
}

impl InterruptRemapper for RemappingUnit {
    fn update(&self, remapping: Remapping) {
        *self.current.write().unwrap_or_else(PoisonError::into_inner) = remapping;
        self.reevaluate(None);
    }

    fn invalidate(&self, entries: Option<&[(u16, u32)]>) {
        let count = entries.map_or(1, <[_]>::len);
        self.invalidations
            .fetch_add(count as u64, Ordering::Relaxed);
        let range = |&(first, count): &(u16, u32)| {
            let first = u32::from(first);
            first..=first + (count.max(1) - 1)
        };
        match entries {
            // Nearly always.
            Some([one]) => self.reevaluate(Some(&[range(one)])),
            Some(many) => self.reevaluate(Some(&many.iter().map(range).collect::<Vec<_>>())),
            None => self.reevaluate(None),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use viommu::Gpa;
    use viommu::vtd::RemappingTable;

    use super::*;

    const RID: Rid = Rid::new(0, 3, 1);

    fn on(extended: bool) -> Remapping {
        Remapping {
            table: Some(RemappingTable {
                base: Gpa(0x1000),
                entries: 256,
                extended,
            }),
            compatibility: false,
        }
    }

    fn request(handle: u16) -> Msi {
        let address = RemappableAddress::new()
            .with_doorbell(0xfee)
            .with_remappable(true)
            .with_handle(handle & 0x7fff)
            .with_handle_15(handle >> 15 == 1);
        Msi {
            address: address.into_bits().into(),
            data: 0,
        }
    }

    fn entry() -> IrteLow {
        IrteLow::new().with_p(true).with_v(0x41).with_dst(0x300)
    }

    fn through(low: IrteLow, high: IrteHigh, msi: Msi) -> Result<Msi, FaultReason> {
        remap(on(false), |_| Some((low, high)), RID, msi).map_err(|blocked| blocked.reason)
    }

    #[test]
    fn without_a_table_everything_passes_unchanged() {
        let msi = Msi {
            address: 0xfee0_1000,
            data: 0x30,
        };
        let got = remap(Remapping::default(), |_| None, RID, msi);
        assert_eq!(got, Ok(msi));
    }

    #[test]
    fn a_compatibility_request_passes_only_where_the_guest_allows_it() {
        let msi = Msi {
            address: 0xfee0_1000,
            data: 0x30,
        };
        let with = |extended, compatibility| Remapping {
            compatibility,
            ..on(extended)
        };
        let reason = |remapping| remap(remapping, |_| None, RID, msi).map_err(|b| b.reason);
        let blocked = Err(FaultReason::InterruptCompatibilityBlocked);
        assert_eq!(reason(with(false, true)), Ok(msi));
        assert_eq!(reason(with(false, false)), blocked);
        assert_eq!(
            reason(with(true, true)),
            blocked,
            "EIME blocks it whatever CFI says"
        );
    }

    #[test]
    fn an_entry_makes_the_interrupt() {
        let high = IrteHigh::new();
        let got = through(
            entry().with_tm(true).with_dm(true).with_rh(true),
            high,
            request(7),
        );
        assert_eq!(
            got,
            Ok(Msi {
                address: 0xfee0_300c,
                data: 0xc041
            })
        );
        let wide = remap(
            on(true),
            |_| Some((entry().with_dst(0x1234_5678), high)),
            RID,
            request(7),
        );
        assert_eq!(wide.map(|msi| msi.address), Ok(0x1234_5600_fee7_8000));
    }

    #[test]
    fn the_entry_is_the_one_that_handle_and_sub_handle_name() {
        let at = |msi| {
            let mut seen = 0;
            let read = |address| {
                seen = address;
                Some((entry(), IrteHigh::new()))
            };
            let _ = remap(on(false), read, RID, msi);
            seen
        };
        assert_eq!(at(request(5)), 0x1050);
        let mut sub = request(5);
        sub.address |= 1 << 3;
        sub.data = 2;
        assert_eq!(at(sub), 0x1070);
        let mut ignored = request(5);
        ignored.data = 2;
        assert_eq!(at(ignored), 0x1050, "no SHV: the data counts for nothing");
    }

    #[test]
    fn every_violation_has_its_reason() {
        let none = IrteHigh::new();
        let cases = [
            (
                entry().with_p(false),
                none,
                FaultReason::InterruptEntryNotPresent,
            ),
            (
                entry().with_im(true),
                none,
                FaultReason::InterruptEntryReserved,
            ),
            (
                IrteLow::from_bits(entry().into_bits() | 1 << 12),
                none,
                FaultReason::InterruptEntryReserved,
            ),
            (
                entry(),
                none.with_svt(3),
                FaultReason::InterruptEntryReserved,
            ),
            (
                entry(),
                none.with_svt(1).with_sid(RID.0 + 1),
                FaultReason::InterruptSource,
            ),
            (
                entry(),
                none.with_svt(2).with_sid(0x0102),
                FaultReason::InterruptSource,
            ),
        ];
        for (low, high, reason) in cases {
            assert_eq!(through(low, high, request(0)), Err(reason));
        }
        assert_eq!(
            through(entry(), none, request(256)),
            Err(FaultReason::InterruptIndex)
        );
        let outside = remap(on(false), |_| None, RID, request(0));
        assert_eq!(
            outside.map_err(|b| b.reason),
            Err(FaultReason::InterruptTableAccess)
        );
        let mut reserved = request(0);
        reserved.address |= 1 << 3;
        reserved.data = 1 << 16;
        assert_eq!(
            through(entry(), none, reserved),
            Err(FaultReason::InterruptRequestReserved)
        );
    }

    #[test]
    fn a_source_is_compared_without_the_bits_that_sq_names() {
        let high = |sq| {
            IrteHigh::new()
                .with_svt(1)
                .with_sq(sq)
                .with_sid(RID.0 ^ 0b100)
        };
        assert!(through(entry(), high(0), request(0)).is_err());
        assert!(through(entry(), high(1), request(0)).is_ok());
        let buses = IrteHigh::new().with_svt(2).with_sid(0x0003);
        assert!(through(entry(), buses, request(0)).is_ok());
    }

    /// Every APIC ID of 32 bits can be named in extended interrupt mode, in physical and in
    /// logical mode (where bits 31:16 are the cluster), and arrives in the message as KVM takes it:
    /// bits 7:0 in the low half, 31:8 in the high one.
    #[test]
    fn more_than_255_apics_can_be_addressed_with_extended_interrupt_mode() {
        for destination in (0..1 << 12).chain([0xffff, 0x1_0001, 0x00ff_ff00, u32::MAX]) {
            for logical in [false, true] {
                let low = entry().with_dst(destination).with_dm(logical);
                let got = remap(on(true), |_| Some((low, IrteHigh::new())), RID, request(1));
                let Msi { address, data } = got.unwrap();
                let named = (address >> 32) as u32 | (address >> 12) as u32 & 0xff;
                assert_eq!((named, data), (destination, 0x41));
                assert_eq!(address >> 2 & 1 == 1, logical);
            }
        }
    }

    /// Without it there are 8 bits, wherever else the guest wrote some.
    #[test]
    fn without_extended_interrupt_mode_a_destination_has_8_bits() {
        for destination in [0u32, 0xfe00, 0xff00, 0xffff_ffff, 0x0001_0000] {
            let low = entry().with_dst(destination);
            let got = through(low, IrteHigh::new(), request(1)).unwrap();
            assert_eq!(got.address >> 32, 0);
            assert_eq!(got.address >> 12 & 0xff, u64::from(destination >> 8 & 0xff));
        }
    }

    /// Delivery modes, the redirection hint and the destination mode go through unchanged: it is
    /// the APICs that choose among several destinations.
    #[test]
    fn delivery_mode_destination_mode_and_redirection_hint_reach_the_apics() {
        for (mode, hint, logical) in [
            (0, false, false), // fixed, physical
            (0, true, true),   // fixed to one of a logical set
            (1, true, true),   // lowest priority
            (4, false, false), // NMI
        ] {
            let low = entry().with_dlm(mode).with_rh(hint).with_dm(logical);
            let got = through(low, IrteHigh::new(), request(1)).unwrap();
            assert_eq!(got.data >> 8 & 7, u32::from(mode));
            assert_eq!(
                (got.address >> 3 & 1 == 1, got.address >> 2 & 1 == 1),
                (hint, logical)
            );
        }
    }

    proptest! {
        #[test]
        fn whatever_the_guest_writes_the_result_is_an_interrupt_or_a_reason(
            low: u64, high: u64, address: u64, data: u32, extended: bool, rid: u16,
        ) {
            let entry = (IrteLow::from_bits(low), IrteHigh::from_bits(high));
            let msi = Msi { address, data };
            if let Ok(msi) = remap(on(extended), |_| Some(entry), Rid(rid), msi) {
                prop_assert_eq!(msi.address as u32 >> 20, 0xfee);
            }
        }
    }
}
