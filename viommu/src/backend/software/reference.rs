//! The walker against a reference that is written to be read next to the specification: bits by
//! their numbers, no caches, no atomics, one level after the other. Both see the same random
//! tables, which point at each other, at themselves, beyond RAM and at the interrupt range; both
//! must agree on every result and on every flag they leave in memory.

use std::collections::BTreeMap;
use std::sync::Arc;

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::{Config, EndpointConfig, Engine};
use crate::backend::{
    Access, Backend, EventSink, Fault, FaultCause, PageRequest, Stage, Stage1, Stage2, Translation,
};
use crate::{Gpa, Iova, Pasid, Rid, Target};

const RAM: u64 = 64 * 4096;
/// The first pages are tables, with entries at `INDICES`.
const TABLES: u64 = 12;
/// The pages after them are one table for each level, from 1 up, of a second stage that maps
/// memory to itself, so that nested walks often come to an end.
const IDENTITY: u64 = TABLES;
const HAW: u8 = 40;
const RID: Rid = Rid(0x10);

const fn bit(number: u32) -> u64 {
    1 << number
}

/// What a request is, as the specification's tables have it.
#[derive(Clone, Copy, Debug)]
struct Ask {
    iova: u64,
    access: Access,
    pasid: bool,
    privileged: bool,
    execute: bool,
}

/// Memory as the reference sees it: entries by their address, everything else 0.
struct Reference(BTreeMap<u64, u64>);

impl Reference {
    fn entry(&self, at: u64) -> Option<u64> {
        (at < RAM).then(|| self.0.get(&at).copied().unwrap_or(0))
    }

    fn set(&mut self, at: u64, bits: u64) {
        *self.0.entry(at).or_insert(0) |= bits;
    }

    /// Bytes that an entry of `level` stands for.
    fn span(level: u8) -> u64 {
        4096 * 512u64.pow(u32::from(level) - 1)
    }

    /// Reserved bits by number; `low` is the lowest reserved one of a large page.
    fn reserved(level: u8, large: bool, low: u32, table: &[u32]) -> u64 {
        let mut bits: Vec<u32> = (u32::from(HAW)..52).collect();
        if large {
            bits.extend(low..Self::span(level).trailing_zeros());
        } else if level > 1 {
            bits.extend(table);
        }
        if level > 3 {
            bits.push(7);
        }
        bits.into_iter().fold(0, |all, number| all | bit(number))
    }

    fn second(
        &mut self,
        stage2: &Stage2,
        address: u64,
        access: Access,
        stage: Stage,
        privileged: bool,
    ) -> Result<u64, FaultCause> {
        let levels = match stage2.width {
            39 => 3,
            48 => 4,
            _ => 5,
        };
        if address >= bit(stage2.width.into()) {
            return Err(FaultCause::BeyondSecondStage);
        }
        let (mut table, mut readable, mut writable) = (stage2.root.0, true, true);
        for level in (1..=levels).rev() {
            let at = table + address / Self::span(level) % 512 * 8;
            let entry = self
                .entry(at)
                .ok_or(FaultCause::TableAccess { stage, level })?;
            if entry & (bit(0) | bit(1)) == 0 {
                return Err(FaultCause::NotMapped { stage, level });
            }
            let large = (level == 2 || level == 3) && entry & bit(7) != 0;
            if entry & Self::reserved(level, large, 12, &[11, 62]) != 0 {
                return Err(FaultCause::Reserved { stage, level });
            }
            readable &= entry & bit(0) != 0;
            writable &= entry & bit(1) != 0;
            let address_bits = entry % bit(52) / 4096 * 4096;
            if !(large || level == 1) {
                if stage2.ad {
                    self.set(at, bit(8));
                }
                table = address_bits;
                continue;
            }
            if !readable && !writable {
                return Err(FaultCause::NotMapped { stage, level });
            }
            if access.read && !readable || access.write && !writable {
                return Err(FaultCause::Permission { stage, privileged });
            }
            if stage2.ad {
                self.set(at, bit(8) | if access.write { bit(9) } else { 0 });
            }
            let span = Self::span(level);
            return Ok(address_bits / span * span + address % span);
        }
        unreachable!("level 1 is a leaf");
    }

    /// Where a first-stage table lies.
    fn outer(
        &mut self,
        under: Option<&Stage2>,
        table: u64,
        access: Access,
        stage: Stage,
    ) -> Result<u64, FaultCause> {
        match under {
            None => Ok(table),
            Some(stage2) => self.second(stage2, table, access, stage, false),
        }
    }

    fn first(&mut self, s: &Stage1, under: Option<&Stage2>, ask: Ask) -> Result<u64, FaultCause> {
        let stage = Stage::First;
        let half = bit(u32::from(s.width) - 1);
        if ask.iova >= half && ask.iova < half.wrapping_neg() {
            return Err(FaultCause::AddressWidth);
        }
        if ask.privileged && !s.sre {
            return Err(FaultCause::Supervisor);
        }
        let (mut table, mut rw, mut us, mut xd) = (s.root.0, true, true, false);
        let levels = if s.width == 48 { 4 } else { 5 };
        for level in (1..=levels).rev() {
            let index = ask.iova / Self::span(level) % 512;
            let why = match level == levels {
                true => Stage::SecondForRoot,
                false => Stage::SecondForTable,
            };
            let at = self.outer(under, table, Access::READ, why)? + index * 8;
            let entry = self
                .entry(at)
                .ok_or(FaultCause::TableAccess { stage, level })?;
            if entry & bit(0) == 0 {
                return Err(FaultCause::NotMapped { stage, level });
            }
            let large = (level == 2 || level == 3) && entry & bit(7) != 0;
            let no_such_size = level == 3 && large && !s.fs1gp;
            if no_such_size || entry & Self::reserved(level, large, 13, &[]) != 0 {
                return Err(FaultCause::Reserved { stage, level });
            }
            rw &= entry & bit(1) != 0;
            us &= entry & bit(2) != 0;
            xd |= entry & bit(63) != 0;
            let leaf = large || level == 1;
            let mut flags = bit(5) | if s.eafe { bit(10) } else { 0 };
            if leaf {
                let may_read = ask.privileged || us;
                let may_write = if ask.privileged {
                    rw || !s.wpe
                } else {
                    us && rw
                };
                let may_fetch = may_read && !xd;
                if ask.access.read && !may_read
                    || ask.access.write && !may_write
                    || ask.execute && !may_fetch
                {
                    let privileged = ask.privileged;
                    return Err(match privileged || us {
                        true => FaultCause::Permission { stage, privileged },
                        false => FaultCause::SupervisorPage,
                    });
                }
                if ask.access.write {
                    flags |= bit(6);
                }
            }
            if entry & flags != flags {
                if !s.pwsnp {
                    return Err(FaultCause::UpdateNotSnooped);
                }
                self.outer(under, table, Access::WRITE, Stage::SecondForUpdate)?;
                self.set(at, flags);
            }
            let address_bits = entry % bit(52) / 4096 * 4096;
            if leaf {
                let span = Self::span(level);
                let out = address_bits / span * span + ask.iova % span;
                return match under {
                    None => Ok(out),
                    Some(stage2) => {
                        self.second(stage2, out, ask.access, Stage::Second, ask.privileged)
                    }
                };
            }
            table = address_bits;
        }
        unreachable!("level 1 is a leaf");
    }

    fn translate(&mut self, translation: Translation, ask: Ask) -> Result<u64, FaultCause> {
        let interrupt = 0xfee0_0000..0xfef0_0000;
        if !ask.pasid && interrupt.contains(&ask.iova) {
            return Err(FaultCause::NotAMessage);
        }
        let fetches = match translation {
            Translation::Stage1(stage1) | Translation::Nested { stage1, .. } => stage1.ere,
            _ => false,
        };
        if ask.execute && !fetches && translation != Translation::Blocked {
            return Err(FaultCause::ExecuteDisabled);
        }
        let gpa = match translation {
            Translation::Stage1(stage1) => self.first(&stage1, None, ask)?,
            Translation::Stage2(stage2) => {
                if ask.iova >= bit(stage2.width.into()) {
                    return Err(FaultCause::AddressWidth);
                }
                self.second(&stage2, ask.iova, ask.access, Stage::Second, ask.privileged)?
            }
            Translation::Nested { stage1, stage2 } => self.first(&stage1, Some(&stage2), ask)?,
            Translation::Identity => ask.iova,
            _ => return Err(FaultCause::Blocked),
        };
        if interrupt.contains(&gpa) {
            return Err(FaultCause::InterruptRange);
        }
        if gpa >= RAM {
            return Err(FaultCause::OutsideMemory);
        }
        Ok(gpa)
    }
}

struct Nobody;

impl EventSink for Nobody {
    fn fault(&self, _: Fault) {}
    fn translation_request(&self, _: Target, _: Iova) -> bool {
        true
    }

    fn page_request(&self, _: PageRequest) {}
}

/// Indices at which tables have entries.
const INDICES: [u64; 4] = [0, 1, 255, 511];

/// An entry: mostly good, sometimes anything.
fn entry() -> impl Strategy<Value = u64> {
    let address = prop_oneof![
        // A table, possibly the one the entry is in.
        40 => (0..TABLES).prop_map(|page| page * 4096),
        10 => (TABLES..RAM / 4096).prop_map(|page| page * 4096),
        1 => Just(RAM),
        1 => Just(0xfee0_0000u64),
        1 => (0u64..1 << 41).prop_map(|address| address & !0xfff),
    ];
    // Present and everything allowed, less what is taken away.
    let flags = prop_oneof![
        30 => Just(7u64),
        2 => Just(3u64),
        2 => Just(5u64),
        1 => Just(1u64),
        1 => Just(2u64),
        1 => 0u64..0x1000,
        2 => Just(7u64 | bit(63)),
        1 => Just(7u64 | bit(62)),
    ];
    let size = prop_oneof![8 => Just(0u64), 1 => Just(bit(7))];
    prop_oneof![
        60 => (address, flags, size).prop_map(|(address, flags, size)| address | flags | size),
        1 => any::<u64>(),
    ]
}

fn memory() -> impl Strategy<Value = BTreeMap<u64, u64>> {
    let all = TABLES as usize * INDICES.len();
    let tables = prop::collection::vec(entry(), all);
    let changed = prop::collection::vec((0..RAM / 4096, entry()), 0..6);
    (tables, changed).prop_map(|(tables, changed)| {
        let mut memory = BTreeMap::new();
        for (place, entry) in tables.into_iter().enumerate() {
            let (page, index) = (place / INDICES.len(), place % INDICES.len());
            memory.insert(page as u64 * 4096 + INDICES[index] * 8, entry);
        }
        for level in 1..5 {
            let (lower, upper) = (IDENTITY + level - 1, IDENTITY + level);
            memory.insert(upper * 4096, lower * 4096 + 3);
        }
        for page in 0..RAM / 4096 {
            memory.insert(IDENTITY * 4096 + page * 8, page * 4096 + 3);
        }
        for (page, entry) in changed {
            memory.insert(IDENTITY * 4096 + page * 8, entry);
        }
        memory
    })
}

fn ask() -> impl Strategy<Value = Ask> {
    let part = (0..INDICES.len()).prop_map(|index| INDICES[index]);
    let parts = prop::collection::vec(part, 5);
    let built = (parts, 0u64..4096, 0u8..4).prop_map(|(parts, offset, width)| {
        let iova = parts.iter().fold(0, |all, part| all << 9 | part) << 12 | offset;
        match width {
            0 => iova << 25 >> 25,
            1 => iova & 0x1ff_f000 | offset,
            // Canonical for 48 and for 57 bits.
            2 => ((iova << 16).cast_signed() >> 16).cast_unsigned(),
            _ => ((iova << 7).cast_signed() >> 7).cast_unsigned(),
        }
    });
    let iova = prop_oneof![
        40 => built,
        1 => 0xfedf_f000u64..0xfef0_1000,
        1 => any::<u64>(),
    ];
    let access = prop_oneof![
        Just(Access::READ),
        Just(Access::WRITE),
        Just(Access::READ_WRITE),
    ];
    (iova, access, any::<[bool; 3]>()).prop_map(|(iova, access, [pasid, privileged, execute])| {
        Ask {
            iova,
            access,
            pasid,
            privileged: pasid && privileged,
            execute: pasid && execute && access.read,
        }
    })
}

fn translation() -> impl Strategy<Value = Translation> {
    let root = || (0..TABLES).prop_map(|page| Gpa(page * 4096));
    let stage1 = (root(), any::<[bool; 4]>(), 0u8..32);
    let stage1 = stage1.prop_map(|(root, [wide, sre, wpe, eafe], rare)| Stage1 {
        root,
        width: if wide { 57 } else { 48 },
        sre,
        wpe,
        eafe,
        ere: rare != 0,
        pwsnp: rare != 1,
        fs1gp: rare > 4,
    });
    let width = prop_oneof![Just(39u8), Just(48), Just(57)];
    let random = prop_oneof![1 => root().prop_map(Some), 5 => Just(None)];
    let stage2 = (random, width, any::<bool>()).prop_map(|(random, width, ad)| {
        let levels = u64::from(width - 12) / 9;
        let identity = Gpa((IDENTITY + levels - 1) * 4096);
        let root = random.unwrap_or(identity);
        Stage2 { root, width, ad }
    });
    prop_oneof![
        4 => stage1.clone().prop_map(Translation::Stage1),
        2 => stage2.clone().prop_map(Translation::Stage2),
        6 => (stage1, stage2).prop_map(|(stage1, stage2)| Translation::Nested { stage1, stage2 }),
        1 => Just(Translation::Identity),
        1 => Just(Translation::Blocked),
    ]
}

/// What the engine and the reference say to the same questions, one after the other on the same
/// ports, and the memory they leave.
fn compare(memory: &BTreeMap<u64, u64>, translation: Translation, asks: &[Ask]) {
    let ram = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), RAM as usize)]).unwrap();
    let ram = Arc::new(ram);
    for (&at, &entry) in memory {
        ram.write_obj(entry, GuestAddress(at)).unwrap();
    }
    let config = Config {
        host_address_width: HAW,
        ..Config::for_ram(&ram)
    };
    let engine = Engine::with_config(Arc::clone(&ram), config);
    let endpoint = EndpointConfig {
        pasid_bits: 20,
        ..EndpointConfig::default()
    };
    let plain = engine.add_endpoint(RID, endpoint).unwrap();
    engine.claim(RID, Arc::new(Nobody)).unwrap();
    let pasid = Pasid(7);
    engine.apply(Target::rid(RID), translation).unwrap();
    engine
        .apply(Target::pasid(RID, pasid), translation)
        .unwrap();
    let with_pasid = plain.with_pasid(pasid).unwrap();
    let mut ports = BTreeMap::new();
    let mut reference = Reference(memory.clone());
    for &ask in asks {
        // Each kind of request has one port, which keeps its cache from question to question.
        let kind = (ask.pasid, ask.privileged, ask.execute);
        let port = ports.entry(kind).or_insert_with(|| {
            let port = if ask.pasid { &with_pasid } else { &plain }.clone();
            port.with_privileged(ask.privileged)
                .with_execute(ask.execute)
        });
        let found = port.access().lookup(Iova(ask.iova), 1, ask.access);
        let expected = reference.translate(translation, ask);
        assert_eq!(found.map(|found| found.gpa.0), expected, "{ask:x?}");
    }
    let mut left = vec![0; RAM as usize];
    ram.read_slice(&mut left, GuestAddress(0)).unwrap();
    for (index, left) in left.as_chunks::<8>().0.iter().enumerate() {
        let at = index as u64 * 8;
        let expected = reference.0.get(&at).copied().unwrap_or(0);
        assert_eq!(u64::from_le_bytes(*left), expected, "the entry at {at:#x}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn the_walker_agrees_with_the_reference(
        memory in memory(),
        translation in translation(),
        asks in prop::collection::vec(ask(), 1..60),
    ) {
        compare(&memory, translation, &asks);
    }
}
