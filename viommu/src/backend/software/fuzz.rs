//! Fuzz harness of the engine: a guest that writes any table and asks for anything, and a device
//! that goes anywhere.

use std::sync::{Arc, Mutex, PoisonError};

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::{EndpointConfig, Engine};
use crate::backend::{
    Access, Backend, EventSink, Fault, FaultCause, Invalidation, InvalidationRange, Mapping,
    Objects, PageRequest, Scope, Stage1, Stage2, Translation,
};
use crate::dma::{DmaPort, Translated};
use crate::{DomainId, Gpa, Iova, Pasid, Rid, Target};

const RAM: u64 = 32 * 4096;
const RID: Rid = Rid(0x20);
const PASID: Pasid = Pasid(9);

#[derive(Default)]
struct Faults(Mutex<u64>);

impl EventSink for Faults {
    fn fault(&self, _: Fault) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) += 1;
    }
    fn translation_request(&self, _: Target, _: Iova) -> bool {
        true
    }

    fn page_request(&self, _: PageRequest) {}
}

/// An address in or near RAM, a page boundary more often than not.
fn near_ram(raw: u64) -> u64 {
    match raw >> 60 {
        0..8 => raw % (RAM / 4096) * 4096,
        8..12 => raw % (RAM + 8192),
        _ => raw,
    }
}

/// A bus address: most have the indices 0 to 3 at every level.
fn bus(raw: u64) -> u64 {
    let small = (0..5).fold(0, |all, level| {
        all | (raw >> (level * 2) & 3) << (12 + 9 * level)
    });
    match raw >> 60 {
        0..12 => small | raw >> 16 & 0xfff,
        12 => 0xfee0_0000 | raw & 0x1f_ffff,
        _ => raw,
    }
}

fn translation(choice: u8, raw: u64, domain: DomainId) -> Translation {
    let stage1 = Stage1 {
        root: Gpa(near_ram(raw & !(0xf << 60))),
        width: if choice & 0x80 == 0 { 48 } else { 57 },
        sre: choice & 0x40 != 0,
        wpe: choice & 0x20 != 0,
        eafe: choice & 0x10 != 0,
        ere: raw & 1 << 60 != 0,
        pwsnp: raw & 1 << 61 == 0,
        fs1gp: raw & 1 << 62 == 0,
    };
    let stage2 = Stage2 {
        root: Gpa(near_ram(raw >> 20 & !(0xf << 60))),
        width: [39, 48, 57, 40][raw as usize & 3],
        ad: choice & 8 != 0,
    };
    match choice & 7 {
        0 => Translation::Blocked,
        1 => Translation::Identity,
        2 => Translation::Stage2(stage2),
        3 | 4 => Translation::Nested { stage1, stage2 },
        5 => Translation::Domain(domain),
        _ => Translation::Stage1(stage1),
    }
}

/// Feeds `input`, eighteen bytes for each action, to an engine: entries written, translations
/// applied, mappings made and removed, caches invalidated, DMA done. Checks that nothing leads
/// out of RAM, that a blocked target stays blocked, that after an invalidation nothing old is
/// used, and that nothing is left in the end.
///
/// # Panics
/// When an invariant does not hold, as a fuzz harness must.
pub fn walks(input: &[u8]) {
    let Ok(ram) = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), RAM as usize)]) else {
        return;
    };
    let ram = Arc::new(ram);
    let engine = Engine::new(Arc::clone(&ram));
    let config = EndpointConfig {
        pasid_bits: 20,
        ..EndpointConfig::default()
    };
    let faults = Arc::<Faults>::default();
    let (Ok(plain), Ok(domain)) = (engine.add_endpoint(RID, config), engine.create_domain()) else {
        return;
    };
    let (Some(pasid), Ok(())) = (plain.with_pasid(PASID), engine.claim(RID, faults.clone())) else {
        return;
    };
    let ports = [
        plain.clone(),
        pasid.clone(),
        pasid.with_privileged(true).with_execute(true),
    ];
    let mut expected = 0;
    let (actions, _) = input.as_chunks::<18>();
    for &[action, choice, ref raw @ ..] in actions {
        let (a, b) = raw.split_at(8);
        let [a, b] =
            [a, b].map(|half| half.iter().fold(0, |all, &byte| all << 8 | u64::from(byte)));
        let port = &ports[usize::from(choice) % ports.len()];
        let target = if choice & 1 == 0 {
            Target::rid(RID)
        } else {
            Target::pasid(RID, PASID)
        };
        let access =
            [Access::READ, Access::WRITE, Access::READ_WRITE][usize::from(choice >> 3) % 3];
        match action % 8 {
            // An entry at one of the first indices of a page, often one that leads to RAM.
            0 | 1 => {
                let at = GuestAddress(a % (RAM / 4096) * 4096 + (a >> 8 & 3) * 8);
                let entry = if choice < 0xe0 {
                    near_ram(b & !(0xf << 60)) & !0xfff | b >> 32 & 0xff | 3
                } else {
                    b
                };
                let written = ram.write_obj(entry, at);
                assert!(written.is_ok());
            }
            2 => {
                let wanted = translation(choice, a, domain);
                let before = engine.translation(target);
                let applied = engine.apply(target, wanted);
                let in_force = if applied.is_ok() {
                    wanted
                } else {
                    Translation::Blocked
                };
                assert_eq!(engine.translation(target), in_force);
                // A change forgets what is cached for this target. To apply what is in force
                // does nothing, as the waist has it: what the tables said before the guest
                // rewrote them is used until an invalidation, and so it is for other targets.
                for port in &ports {
                    if port.target() == Some(target) && before != in_force {
                        same_as_uncached(std::slice::from_ref(port), b, access);
                    } else {
                        some(b).for_each(|iova| _ = in_ram(port, iova, access));
                    }
                }
            }
            3 => {
                let mapping = Mapping {
                    iova: Iova(bus(a) & !0xfff),
                    gpa: Gpa(near_ram(b) & !0xfff),
                    length: (u64::from(choice) + 1) * 4096,
                    access,
                    mmio: choice & 0x80 != 0,
                };
                // Refusals are the rule, and change nothing.
                let _ = engine.map(domain, &[mapping]);
            }
            4 => {
                let (first, last) = (bus(a), bus(a).saturating_add(b % (1 << 22)));
                let removed = engine.unmap(domain, Iova(first), Iova(last));
                assert!(removed.is_ok());
            }
            5 => {
                let scope = [Scope::All, Scope::Endpoint(RID), Scope::Target(target)];
                let scope = scope[usize::from(choice >> 1) % 3];
                let count = if choice & 0x80 == 0 { b % 4 + 1 } else { b };
                let range = InvalidationRange::Pages {
                    first: Iova(bus(a) & !0xfff),
                    count,
                    leaf: false,
                };
                assert_eq!(engine.invalidate(&[Invalidation { scope, range }]), 1);
                for port in &ports {
                    let target = port.target().unwrap_or(target);
                    // A page of a nested table can be stale in its second stage, which has
                    // addresses of its own.
                    let nested = matches!(engine.translation(target), Translation::Nested { .. });
                    let meant =
                        scope == Scope::Target(target) || !matches!(scope, Scope::Target(_));
                    if count > 0 && meant && !nested {
                        same_at(std::slice::from_ref(port), bus(a), access);
                    }
                }
            }
            6 => {
                let range = InvalidationRange::All;
                let scope = Scope::All;
                assert_eq!(engine.invalidate(&[Invalidation { scope, range }]), 1);
                same_as_uncached(&ports, b, access);
            }
            _ => {
                let mut buffer = vec![choice; b as usize % 9000 + 1];
                let dma = port.access();
                let at = GuestAddress(bus(a));
                let done = match access.write {
                    true => dma.write_slice(&buffer, at),
                    false => dma.read_slice(&mut buffer, at),
                };
                drop(dma);
                expected += u64::from(done.is_err());
                let seen = *faults.0.lock().unwrap_or_else(PoisonError::into_inner);
                assert_eq!(seen, expected, "one fault for each access that failed");
                let who = port.target().unwrap_or(target);
                let blocked = engine.translation(who) == Translation::Blocked;
                assert!(!blocked || done.is_err(), "a blocked target stays blocked");
            }
        }
    }
    engine.destroy_domain(domain);
    engine.release(RID);
    assert_eq!(engine.objects(), Objects::default());
}

/// Some bus addresses.
fn some(raw: u64) -> impl Iterator<Item = u64> {
    (0..4).map(move |turn| bus(raw.rotate_right(turn * 7) & !(0xf << 60)))
}

/// Checks some addresses on every port.
fn same_as_uncached(ports: &[DmaPort], raw: u64, access: Access) {
    some(raw).for_each(|iova| same_at(ports, iova, access));
}

/// Checks that a port with its cache finds at `iova` what a new one finds.
fn same_at(ports: &[DmaPort], iova: u64, access: Access) {
    for port in ports {
        let cached = in_ram(port, iova, access);
        let walked = in_ram(&port.clone(), iova, access);
        assert_eq!(cached, walked, "{access:?} at {iova:#x} of {port:?}");
    }
}

/// What the port finds at `iova`, which must be RAM.
fn in_ram(port: &DmaPort, iova: u64, access: Access) -> Result<Translated, FaultCause> {
    let found = port.access().lookup(Iova(iova), 1, access);
    assert!(found.is_err() || found.is_ok_and(|found| found.gpa.0 < RAM));
    found
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(150))]

        #[test]
        fn walks_keep_their_invariants(input in prop::collection::vec(any::<u8>(), 0..4000)) {
            super::walks(&input);
        }
    }

    #[test]
    fn walks_after_a_translation_is_applied_again_may_use_what_is_cached() {
        // A 1 GiB page at entry 0, the table applied and used; entry 0 cleared without an
        // invalidation; the same table applied again.
        super::walks(&[
            0x00, 0xb3, 0x00, 0x00, 0x7f, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0xff,
            0x00, 0x10, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x7a, 0x7a, 0x7a, 0x7a, 0x7a,
            0x7a, 0x7a, 0x7a, 0x7a, 0x7a, 0x7a, 0x7a, 0x7a, 0x7a, 0x7a, 0x7a, 0x7a, 0x7a, 0x00,
            0x00, 0x00, 0x00, 0x00, 0x00, 0xff, 0x1d, 0x00, 0x00, 0xff, 0xff, 0xff, 0x00, 0xff,
            0xff, 0xff, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00,
            0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x7a, 0x00, 0x00,
            0x00, 0x00, 0x7a, 0x7a, 0x7a, 0x7d, 0x7a, 0x7a, 0x7a, 0x00, 0x00, 0x00, 0x00, 0x00,
            0x00, 0x00, 0x00, 0x45, 0x00, 0x00, 0x00, 0x00, 0x00, 0x0a,
        ]);
    }
}
