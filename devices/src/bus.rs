//! The address buses (MMIO and port I/O) that vCPU threads look devices up on.
//!
//! A look-up takes no lock: vCPU threads read a snapshot, and a change of the bus publishes a new
//! one. An access that began before [`Bus::remove`] returned may still be running in the device
//! afterwards; a device therefore never assumes that it is off the bus because it was removed.

#![forbid(unsafe_code)]

use std::fmt;
use std::ops::RangeInclusive;
use std::sync::{Arc, Mutex, PoisonError};

use arc_swap::ArcSwap;
use thiserror::Error;

/// A device on a bus. Called on vCPU threads, several at a time: a device does its own locking.
pub trait BusDevice: Send + Sync {
    /// Reads `data.len()` bytes (1, 2, 4 or 8) at `offset` bytes into the device's range. All of
    /// `data` is written; what does not exist reads as all ones.
    fn read(&self, offset: u64, data: &mut [u8]);

    /// Writes `data` (1, 2, 4 or 8 bytes) at `offset` bytes into the device's range.
    fn write(&self, offset: u64, data: &[u8]);
}

/// Why a bus did not take or give up a range. Addresses and lengths are in bytes.
#[derive(Error, Clone, PartialEq, Eq, Debug)]
pub enum BusError {
    /// The range meets one that is taken.
    #[error(
        "{base:#x} (+{length:#x}) on the {bus} bus overlaps {taken_base:#x} (+{taken_length:#x}), \
         which is taken: choose another address"
    )]
    Overlap {
        /// Which bus.
        bus: &'static str,
        /// First address wanted.
        base: u64,
        /// Bytes wanted.
        length: u64,
        /// First address of the range in the way.
        taken_base: u64,
        /// Its bytes.
        taken_length: u64,
    },
    /// The range is empty or reaches beyond the last address of the bus.
    #[error(
        "{base:#x} (+{length:#x}) is not a range of the {bus} bus, whose last address is {last:#x}"
    )]
    NotARange {
        /// Which bus.
        bus: &'static str,
        /// First address wanted.
        base: u64,
        /// Bytes wanted.
        length: u64,
        /// The last address of the bus.
        last: u64,
    },
    /// Nothing begins at this address.
    #[error("no device begins at {base:#x} on the {bus} bus")]
    NoDevice {
        /// Which bus.
        bus: &'static str,
        /// The address.
        base: u64,
    },
}

#[derive(Clone)]
struct Claim {
    base: u64,
    /// Inclusive, so that a range may end at the last address there is.
    last: u64,
    device: Arc<dyn BusDevice>,
}

/// One address bus.
///
/// Locks: `changes` orders writers and is never held while a device is called.
pub struct Bus {
    name: &'static str,
    last: u64,
    /// Sorted by base; no two overlap.
    claims: ArcSwap<Vec<Claim>>,
    changes: Mutex<()>,
}

impl Bus {
    /// The memory bus, 64 bits of guest-physical address.
    pub fn mmio() -> Self {
        Self::new("MMIO", u64::MAX)
    }

    /// The port I/O bus, 16 bits of address.
    pub fn pio() -> Self {
        Self::new("port I/O", u64::from(u16::MAX))
    }

    fn new(name: &'static str, last: u64) -> Self {
        Self {
            name,
            last,
            claims: ArcSwap::from_pointee(Vec::new()),
            changes: Mutex::new(()),
        }
    }

    /// Puts `device` at `base`, `length` bytes.
    ///
    /// # Errors
    /// [`BusError::Overlap`] and [`BusError::NotARange`]; the bus is unchanged then.
    pub fn insert(
        &self,
        base: u64,
        length: u64,
        device: Arc<dyn BusDevice>,
    ) -> Result<(), BusError> {
        self.change(|claims| self.place(claims, base, length, device))
    }

    /// Takes away the device whose range begins at `base`.
    ///
    /// # Errors
    /// [`BusError::NoDevice`].
    pub fn remove(&self, base: u64) -> Result<Arc<dyn BusDevice>, BusError> {
        self.change(|claims| Ok(claims.remove(self.index_of(claims, base)?).device))
    }

    /// Moves the range that begins at `from` to begin at `to`, in one step: no access misses it
    /// at both places.
    ///
    /// # Errors
    /// As [`remove`](Self::remove) and [`insert`](Self::insert); the bus is unchanged then.
    pub fn relocate(&self, from: u64, to: u64) -> Result<(), BusError> {
        self.change(|claims| {
            let claim = claims.remove(self.index_of(claims, from)?);
            // A claim never covers all 2^64 addresses: `insert` takes a u64 length.
            let length = claim.last - claim.base + 1;
            self.place(claims, to, length, claim.device)
        })
    }

    /// Reads at `address`. Returns whether a device claimed all of the access; if none did,
    /// `data` is all ones, as on real hardware.
    pub fn read(&self, address: u64, data: &mut [u8]) -> bool {
        let claims = self.claims.load();
        match Self::find(&claims, address, data.len()) {
            Some(claim) => {
                claim.device.read(address - claim.base, data);
                true
            }
            None => {
                data.fill(0xff);
                false
            }
        }
    }

    /// Writes at `address`. Returns whether a device claimed all of the access; if none did,
    /// nothing happens.
    pub fn write(&self, address: u64, data: &[u8]) -> bool {
        let claims = self.claims.load();
        match Self::find(&claims, address, data.len()) {
            Some(claim) => {
                claim.device.write(address - claim.base, data);
                true
            }
            None => false,
        }
    }

    /// Every claimed range, in order.
    pub fn ranges(&self) -> Vec<RangeInclusive<u64>> {
        let claims = self.claims.load();
        claims.iter().map(|claim| claim.base..=claim.last).collect()
    }

    fn find(claims: &[Claim], address: u64, length: usize) -> Option<&Claim> {
        let after = claims.partition_point(|claim| claim.base <= address);
        let claim = claims.get(after.checked_sub(1)?)?;
        let last = address.checked_add((length as u64).checked_sub(1)?)?;
        (last <= claim.last).then_some(claim)
    }

    fn index_of(&self, claims: &[Claim], base: u64) -> Result<usize, BusError> {
        claims
            .binary_search_by_key(&base, |claim| claim.base)
            .map_err(|_| BusError::NoDevice {
                bus: self.name,
                base,
            })
    }

    fn place(
        &self,
        claims: &mut Vec<Claim>,
        base: u64,
        length: u64,
        device: Arc<dyn BusDevice>,
    ) -> Result<(), BusError> {
        let last = length
            .checked_sub(1)
            .and_then(|more| base.checked_add(more))
            .filter(|&last| last <= self.last)
            .ok_or(BusError::NotARange {
                bus: self.name,
                base,
                length,
                last: self.last,
            })?;
        let at = claims.partition_point(|claim| claim.base <= last);
        if let Some(taken) = claims[..at].last().filter(|taken| taken.last >= base) {
            return Err(BusError::Overlap {
                bus: self.name,
                base,
                length,
                taken_base: taken.base,
                taken_length: taken.last - taken.base + 1,
            });
        }
        claims.insert(at, Claim { base, last, device });
        Ok(())
    }

    /// Applies `edit` to a copy and publishes it if all went well.
    fn change<T>(
        &self,
        edit: impl FnOnce(&mut Vec<Claim>) -> Result<T, BusError>,
    ) -> Result<T, BusError> {
        let _one_writer = self.changes.lock().unwrap_or_else(PoisonError::into_inner);
        let mut claims = Vec::clone(&self.claims.load());
        let result = edit(&mut claims)?;
        self.claims.store(Arc::new(claims));
        Ok(result)
    }
}

impl fmt::Debug for Bus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bus {:x?}", self.name, self.ranges())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    /// Reads as its own number, so that a test sees which device answered and at which offset.
    struct Named(u8);

    impl BusDevice for Named {
        fn read(&self, offset: u64, data: &mut [u8]) {
            data.fill(self.0);
            data[0] = offset as u8;
        }
        fn write(&self, _offset: u64, _data: &[u8]) {}
    }

    fn device(name: u8) -> Arc<dyn BusDevice> {
        Arc::new(Named(name))
    }

    fn read(bus: &Bus, address: u64) -> [u8; 4] {
        let mut data = [0; 4];
        bus.read(address, &mut data);
        data
    }

    #[test]
    fn an_access_reaches_the_device_that_claims_all_of_it() {
        let bus = Bus::mmio();
        bus.insert(0x1000, 0x100, device(7)).unwrap();
        assert_eq!(read(&bus, 0x1010), [0x10, 7, 7, 7]);
        assert_eq!(read(&bus, 0x10fc), [0xfc, 7, 7, 7]);
        assert_eq!(read(&bus, 0x10fd), [0xff; 4], "reaches beyond the device");
        assert_eq!(read(&bus, 0xffe), [0xff; 4], "begins before the device");
    }

    #[test]
    fn unclaimed_reads_are_all_ones_and_unclaimed_writes_do_nothing() {
        let bus = Bus::pio();
        assert_eq!(read(&bus, 0x80), [0xff; 4]);
        assert!(!bus.write(0x80, &[1]));
        assert_eq!(read(&Bus::mmio(), u64::MAX), [0xff; 4]);
    }

    #[test]
    fn a_range_may_end_at_the_last_address_and_not_beyond_it() {
        let bus = Bus::mmio();
        bus.insert(u64::MAX - 0xf, 0x10, device(1)).unwrap();
        assert!(matches!(
            bus.insert(u64::MAX, 2, device(2)),
            Err(BusError::NotARange { .. })
        ));
        let ports = Bus::pio();
        ports.insert(0xffff, 1, device(1)).unwrap();
        assert!(ports.insert(0x1_0000, 1, device(2)).is_err());
        assert!(ports.insert(0x10, 0, device(2)).is_err(), "empty");
    }

    #[test]
    fn an_overlap_is_refused_by_naming_both_ranges() {
        let bus = Bus::mmio();
        bus.insert(0x1000, 0x1000, device(1)).unwrap();
        let error = bus.insert(0x1800, 0x1000, device(2)).unwrap_err();
        assert_eq!(
            error.to_string(),
            "0x1800 (+0x1000) on the MMIO bus overlaps 0x1000 (+0x1000), which is taken: choose \
             another address"
        );
    }

    #[test]
    fn a_refused_move_leaves_the_device_where_it_was() {
        let bus = Bus::mmio();
        bus.insert(0x1000, 0x1000, device(1)).unwrap();
        bus.insert(0x4000, 0x1000, device(2)).unwrap();
        assert!(bus.relocate(0x1000, 0x3800).is_err());
        assert_eq!(read(&bus, 0x1000), [0, 1, 1, 1]);
        bus.relocate(0x1000, 0x1800).unwrap();
        assert_eq!(read(&bus, 0x1800), [0, 1, 1, 1]);
        assert_eq!(read(&bus, 0x1000), [0xff; 4]);
    }

    #[derive(Clone, Debug)]
    enum Step {
        Insert(u8, u8),
        Remove(u8),
        Relocate(u8, u8),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            (any::<u8>(), 0..9u8).prop_map(|(base, length)| Step::Insert(base, length)),
            any::<u8>().prop_map(Step::Remove),
            (any::<u8>(), any::<u8>()).prop_map(|(from, to)| Step::Relocate(from, to)),
        ]
    }

    proptest! {
        #[test]
        fn the_bus_is_a_map_from_disjoint_ranges_to_devices(
            steps in prop::collection::vec(step(), 0..60)
        ) {
            let bus = Bus::mmio();
            let mut model = BTreeMap::<u64, u64>::new();
            let free = |model: &BTreeMap<u64, u64>, base: u64, length: u64| {
                length > 0 && model.iter().all(|(&b, &l)| base + length <= b || b + l <= base)
            };
            for step in steps {
                match step {
                    Step::Insert(base, length) => {
                        let (base, length) = (base.into(), length.into());
                        let fits = free(&model, base, length);
                        prop_assert_eq!(bus.insert(base, length, device(1)).is_ok(), fits);
                        if fits {
                            model.insert(base, length);
                        }
                    }
                    Step::Remove(base) => {
                        let gone = model.remove(&base.into()).is_some();
                        prop_assert_eq!(bus.remove(base.into()).is_ok(), gone);
                    }
                    Step::Relocate(from, to) => {
                        let (from, to) = (from.into(), to.into());
                        let moved = model.remove(&from).is_some_and(|length| {
                            let fits = free(&model, to, length);
                            model.insert(if fits { to } else { from }, length);
                            fits
                        });
                        prop_assert_eq!(bus.relocate(from, to).is_ok(), moved);
                    }
                }
            }
            let ranges: Vec<_> = model.iter().map(|(&b, &l)| b..=b + l - 1).collect();
            prop_assert_eq!(bus.ranges(), ranges);
        }
    }
}
