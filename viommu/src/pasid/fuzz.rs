//! Fuzz harnesses of what a guest reaches here: the virtual command registers, and the book of
//! page request groups.

#![forbid(unsafe_code)]

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, PoisonError};

use super::{Error, PasidAllocator};
use crate::backend::{Access, PageRequest, Scope};
use crate::page_requests::{Limits, PageRequests};
use crate::spec::vtd::vcmd::{FREE_PASID, Vcmd, Vcrsp};
use crate::vtd::vcmd::{VcmdWrite, VirtualCommands};
use crate::{Iova, Pasid, Rid, Target};

/// PASIDs 1 to 15, lowest first.
#[derive(Default)]
struct Few(Mutex<BTreeSet<u32>>);

impl Few {
    fn out(&self) -> BTreeSet<u32> {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }
}

impl PasidAllocator for Few {
    fn allocate(&self) -> Result<Pasid, Error> {
        let mut out = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let free = (1..16).find(|n| !out.contains(n));
        let pasid = free.ok_or(Error::Quota { quota: 15 })?;
        out.insert(pasid);
        Ok(Pasid(pasid))
    }

    fn free(&self, pasid: Pasid) -> Result<(), Error> {
        let mut out = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match out.remove(&pasid.0) {
            true => Ok(()),
            false => Err(Error::NotOwned { pasid: pasid.0 }),
        }
    }

    fn free_all(&self) {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clear();
    }
}

/// Feeds `input`, nine bytes for each action, to VCMD: writes of any size and value, resets,
/// completions that come late. Checks that IP clears, and that the PASIDs that are out are those
/// that the guest was told of.
///
/// # Panics
/// When an invariant does not hold, as a fuzz harness must.
pub fn virtual_commands(input: &[u8]) {
    let (mut registers, allocator) = (VirtualCommands::new(), Few::default());
    let (mut running, mut known) = (Vec::new(), BTreeSet::new());
    let (actions, _) = input.as_chunks::<9>();
    for &[action, raw @ ..] in actions {
        let raw = u64::from_le_bytes(raw);
        // Every other one is a command that exists, with a PASID that may.
        let raw = if action & 1 == 0 {
            raw
        } else {
            raw & 0x1f_0003
        };
        let write = match action >> 1 & 7 {
            0 => VcmdWrite::Low(raw as u32),
            1 => VcmdWrite::High((raw >> 32) as u32),
            2 => {
                registers.reset();
                continue;
            }
            _ => VcmdWrite::Whole(raw),
        };
        if let Some(command) = registers.write(write) {
            let free = Vcmd::from_bits(raw).command() == FREE_PASID;
            let completion = command.run(&allocator);
            // What a guest frees is gone, whether or not it waits for the answer.
            if free {
                known.retain(|pasid| allocator.out().contains(pasid));
            }
            running.push(completion);
        } else {
            assert!(matches!(write, VcmdWrite::High(_)) || registers.vcrsp() & 1 == 1);
        }
        // Every fourth action leaves its command in progress for a while.
        if action >> 4 & 3 == 0 {
            continue;
        }
        for completion in running.drain(..) {
            if let Some(orphan) = registers.complete(completion) {
                // The guest may have guessed its number and freed it.
                let _ = allocator.free(orphan);
            } else if let Some(pasid) = Pasid::new(Vcrsp::from_bits(registers.vcrsp()).pasid())
                && registers.vcrsp() & 1 == 0
                && pasid.0 != 0
            {
                known.insert(pasid.0);
            }
        }
        assert_eq!(
            registers.vcrsp() & 1,
            0,
            "IP is clear when every command is completed"
        );
        known.retain(|pasid| allocator.out().contains(pasid));
        assert_eq!(allocator.out(), known, "out, and told to the guest");
    }
}

/// Feeds `input`, four bytes for each action, to a book of page requests, and checks that every
/// group that is complete is answered exactly once and that nothing grows beyond its limit.
///
/// # Panics
/// When an invariant does not hold, as a fuzz harness must.
pub fn page_requests(input: &[u8]) {
    let limits = Limits {
        per_endpoint: 6,
        total: 10,
        per_group: 4,
    };
    let mut book = PageRequests::new(limits);
    let mut owed = BTreeMap::new();
    let (actions, _) = input.as_chunks::<4>();
    for (ticket, &[action, who, index, high]) in actions.iter().enumerate() {
        let target = Target {
            endpoint: Rid(u16::from(who & 3)),
            pasid: (who & 4 != 0).then(|| Pasid(u32::from(who >> 3 & 3))),
        };
        let group = u16::from_le_bytes([index & 7, high >> 6]);
        match action % 8 {
            0..4 => {
                let request = PageRequest {
                    target,
                    group,
                    last: action & 8 != 0,
                    iova: Iova(0),
                    access: Access::READ,
                    execute: false,
                    privileged: false,
                };
                match book.request(&request, ticket) {
                    Ok(()) if request.last => {
                        assert_eq!(owed.insert((target, group), ticket), None);
                    }
                    Ok(()) => {}
                    Err(refused) => assert_eq!(refused.ticket, ticket),
                }
            }
            4..7 => assert_eq!(book.respond(target, group), owed.remove(&(target, group))),
            _ => {
                let scope = match high & 3 {
                    0 => Scope::Endpoint(target.endpoint),
                    1 => Scope::All,
                    _ => Scope::Target(target),
                };
                for out in book.withdraw(scope) {
                    assert_eq!(owed.remove(&(out.target, out.group)), Some(out.ticket));
                }
            }
        }
        assert_eq!(book.waiting(), owed.len());
        let groups: Vec<_> = (0..4).map(|rid| book.groups_of(Rid(rid))).collect();
        assert!(groups.iter().all(|count| *count <= limits.per_endpoint));
        assert!(groups.iter().sum::<usize>() <= limits.total);
    }
    assert_eq!(book.withdraw(Scope::All).len(), owed.len());
    assert!(book.is_empty());
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn any_bytes_keep_the_invariants(input in prop::collection::vec(any::<u8>(), 0..2000)) {
            super::virtual_commands(&input);
            super::page_requests(&input);
        }
    }
}
