//! Where on bus 0 devices may come and go, and what each place is behind.
//!
//! A guest reads once, at boot, which addresses are behind which vIOMMU (DMAR, VIOT). So each
//! device number of bus 0 has its home from then on, whether a device is there or not: where one
//! was at boot, that is the device's; the free ones are shared out evenly between "behind none"
//! and the vIOMMUs.

#![forbid(unsafe_code)]

use viommu::Rid;

/// Device numbers of bus 0.
const DEVICES: usize = 32;

/// What a slot is behind: the vIOMMU at this place of the configuration, or none.
pub(super) type Home = Option<usize>;

/// The slots of a VM, fixed when the guest can first see them.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Slots {
    /// `None`: no slot, whatever is there stays.
    homes: [Option<Home>; DEVICES],
}

impl Slots {
    /// `fixed` are the functions that stay for ever, `removable` those that may go, and where they
    /// are. All are on bus 0.
    pub(super) fn new(
        fixed: impl IntoIterator<Item = Rid>,
        removable: impl IntoIterator<Item = (Rid, Home)>,
        viommus: usize,
    ) -> Self {
        let mut homes = [None; DEVICES];
        let mut free = [true; DEVICES];
        for (rid, home) in removable {
            homes[usize::from(rid.device())] = Some(home);
            free[usize::from(rid.device())] = false;
        }
        for rid in fixed {
            homes[usize::from(rid.device())] = None;
            free[usize::from(rid.device())] = false;
        }
        let count = free.iter().filter(|free| **free).count();
        let free = homes.iter_mut().zip(free).filter(|(_, free)| *free);
        for (n, (home, _)) in free.enumerate() {
            // In one piece for each, "behind none" first.
            *home = Some((n * (viommus + 1) / count).checked_sub(1));
        }
        Self { homes }
    }

    /// The device numbers of all slots, one bit each.
    pub(super) fn mask(&self) -> u32 {
        let slots = (0..DEVICES).filter(|device| self.homes[*device].is_some());
        slots.fold(0, |mask, device| mask | 1 << device)
    }

    /// The addresses of the slots behind `home`, ascending.
    pub(super) fn of(&self, home: Home) -> impl Iterator<Item = Rid> {
        let devices = (0u8..).zip(&self.homes);
        let here = devices.filter(move |(_, slot)| **slot == Some(home));
        here.map(|(device, _)| Rid::new(0, device, 0))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn at(device: u8) -> Rid {
        Rid::new(0, device, 0)
    }

    #[test]
    fn without_a_viommu_every_free_number_is_a_slot() {
        let slots = Slots::new([at(0), at(2)], [(at(1), None)], 0);
        assert_eq!(slots.mask(), !(1 | 1 << 2));
        assert_eq!(slots.of(None).count(), 30);
    }

    #[test]
    fn a_slot_that_becomes_free_stays_behind_what_its_first_device_was_behind() {
        let slots = Slots::new([at(0)], [(at(1), Some(1)), (at(2), None)], 2);
        assert!(slots.of(Some(1)).any(|rid| rid == at(1)));
        assert!(slots.of(None).any(|rid| rid == at(2)));
    }

    #[test]
    fn a_full_bus_has_only_the_slots_of_its_devices() {
        let slots = Slots::new((1..32).map(at), [(at(0), Some(0))], 1);
        assert_eq!(slots.mask(), 1);
        assert_eq!(slots.of(None).count(), 0);
    }

    proptest! {
        #[test]
        fn free_numbers_are_shared_out_evenly_and_each_slot_has_one_home(
            taken in prop::collection::btree_map(0..32u8, any::<Option<bool>>(), 0..32),
            viommus in 0..17usize,
        ) {
            let fixed = taken.iter().filter(|(_, v)| v.is_none()).map(|(d, _)| at(*d));
            let removable = taken.iter().filter_map(|(d, v)| {
                v.map(|behind| (at(*d), (behind && viommus > 0).then_some(0)))
            });
            let slots = Slots::new(fixed, removable, viommus);
            let homes = std::iter::once(None).chain((0..viommus).map(Some));
            let (mut mask, mut free) = (0u32, Vec::new());
            for home in homes {
                let all: Vec<Rid> = slots.of(home).collect();
                for rid in &all {
                    prop_assert_eq!(mask & 1 << rid.device(), 0);
                    mask |= 1 << rid.device();
                }
                free.push(all.iter().filter(|rid| !taken.contains_key(&rid.device())).count());
            }
            prop_assert_eq!(mask, slots.mask());
            let (least, most) = (free.iter().min().unwrap(), free.iter().max().unwrap());
            prop_assert!(most - least <= 1, "{:?}", free);
            prop_assert_eq!(free.iter().sum::<usize>(), 32 - taken.len());
        }
    }
}
