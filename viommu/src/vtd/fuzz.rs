//! Entry points for fuzzers: bytes become what a guest does, and invariants are checked.

use super::testing::{Guest, NIC, QUEUE, RAM, ROOT, first_stage, pass_through};
use super::{UnitConfig, pasid};
use crate::backend::Translation;
use crate::spec::vtd::registers::{self as offset, Rtaddr};

/// Takes pieces off the input.
struct Input<'d>(&'d [u8]);

impl Input<'_> {
    fn bytes<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (now, later) = self.0.split_first_chunk::<N>()?;
        self.0 = later;
        Some(*now)
    }
}

/// The promises that hold whatever the guest does.
fn check(guest: &Guest) {
    let status = guest.r32(offset::GSTS);
    let iqa = guest.r64(offset::IQA);
    let stopped = guest.r32(offset::FSTS) & (1 << 4) != 0;
    let head = guest.r64(offset::IQH);
    // The queue was walked to its tail, or stopped with an error.
    if status & 1 << 26 != 0 && !stopped && head < 4096 << (iqa & 7) {
        assert_eq!(head, guest.r64(offset::IQT));
    }
    let offer = guest.unit.freeze();
    assert_eq!(guest.r64(offset::CAP), offer.cap.into_bits());
    assert_eq!(guest.r64(offset::ECAP), offer.ecap.into_bits());
    let translating = status & 1 << 31 != 0;
    assert!(
        translating || guest.backend.targets().is_empty(),
        "Blocked while TES is clear"
    );
    // No interrupt is sent that nobody asked for: the doorbells are the guest's own writes, and
    // what is recorded is bounded.
    assert!(guest.unit.state().last_faults.len() <= 16);
}

/// After everything is invalidated, what is in force is exactly what the tables say.
fn check_tables(guest: &Guest, root: u64) {
    let offer = guest.unit.freeze();
    for (target, translation) in guest.backend.targets() {
        let says = pasid::lookup(&guest.ram, offer, Rtaddr::from_bits(root), target);
        assert_eq!(
            says.map(|entry| entry.translation).ok(),
            Some(translation),
            "{target}"
        );
        assert_ne!(translation, Translation::Blocked);
    }
}

/// Register accesses of any size and place, with a queue and tables in place.
pub fn registers(data: &[u8]) {
    let mut guest = Guest::scalable();
    let directory = guest.context(NIC);
    guest.bind(directory, 0, first_stage(2, 0x5000));
    let mut input = Input(data);
    while let Some([low, high, size]) = input.bytes() {
        let at = u64::from(u16::from_le_bytes([low, high]) & 0x1fff);
        // Half the inputs aim at the registers that do something.
        let at = if size & 0x80 == 0 { at & 0x2fc } else { at };
        match size & 3 {
            0 => guest
                .unit
                .read(at, &mut vec![0; usize::from(size >> 2 & 15)]),
            1 => match input.bytes::<4>() {
                Some(value) => guest.unit.write(at, &value),
                None => return,
            },
            _ => match input.bytes::<8>() {
                Some(value) => guest.unit.write(at & !7, &value),
                None => return,
            },
        }
        check(&guest);
    }
    guest.unit.reset();
    assert!(guest.backend.targets().is_empty());
}

/// A queue of any content, with valid tables.
pub fn queue(data: &[u8]) {
    let mut guest = Guest::scalable();
    let directory = guest.context(NIC);
    guest.bind(directory, 0, first_stage(2, 0x5000));
    guest.bind(directory, 7, pass_through(3));
    let (tail, queue) = match data.split_first_chunk::<2>() {
        Some((tail, queue)) => (u16::from_le_bytes(*tail), queue),
        None => return,
    };
    for (at, word) in queue.as_chunks::<8>().0.iter().take(512).enumerate() {
        // Status writes may change tables, so they are kept to the first page.
        let word = u64::from_le_bytes(*word);
        let is_address = at % 4 == 1 && word & 0xf == 0;
        guest.poke(
            QUEUE + at as u64 * 8,
            &[if is_address { word & 0xffc } else { word }],
        );
    }
    guest.w32(offset::IQT, tail.into());
    check(&guest);
    // The tables did not change, so neither did what is in force.
    if guest.peek(ROOT) != 0 {
        check_tables(&guest, ROOT | 1 << 10);
    }
}

/// Tables of any content.
pub fn tables(data: &[u8]) {
    let nested = data.first().is_some_and(|byte| byte & 1 != 0);
    let legacy = data.first().is_some_and(|byte| byte & 2 != 0);
    let config = UnitConfig {
        nested,
        ..UnitConfig::default()
    };
    let guest = Guest::with(config, super::testing::CAPABLE);
    // The words repeat over the first 16 pages, and mostly name pages there.
    let words: Vec<u64> = data
        .as_chunks::<8>()
        .0
        .iter()
        .copied()
        .map(u64::from_le_bytes)
        .collect();
    if words.is_empty() {
        return;
    }
    let page: Vec<u64> = words.iter().copied().cycle().take(512).collect();
    for (index, at) in (0..0x1_0000u64).step_by(4096).enumerate() {
        let near = page.iter().map(|word| match (word >> 60) & 3 {
            0 => *word,
            1 => word & 0xffff | 1,
            2 => ((word & 0xf000) + ((index as u64) << 12)) | 1,
            _ => word & 0xf_ffff,
        });
        guest.poke(at, &near.collect::<Vec<_>>());
    }
    let root = words[0] & 0xf000 | if legacy { 0 } else { 1 << 10 };
    guest.w64(offset::RTADDR, root);
    guest.w32(offset::GCMD, 1 << 30);
    guest.w32(offset::GCMD, 1 << 31);
    check(&guest);
    check_tables(&guest, root);
    let scanned = guest.unit.state().back_end.tables_scanned;
    assert!(scanned <= u64::from(super::MAX_TABLES_PER_SCAN));
    assert!(root < RAM);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        #[test]
        fn registers_survive_anything(data in prop::collection::vec(any::<u8>(), 0..512)) {
            super::registers(&data);
        }

        #[test]
        fn the_queue_survives_anything(data in prop::collection::vec(any::<u8>(), 0..4100)) {
            super::queue(&data);
        }

        #[test]
        fn tables_survive_anything(data in prop::collection::vec(any::<u8>(), 0..1024)) {
            super::tables(&data);
        }
    }
}
