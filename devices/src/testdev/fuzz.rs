//! The DMA test engine's fuzz harness: registers, enable bits, responses and steps in any order,
//! deterministic (the harness is the worker thread).

use std::collections::BTreeSet;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use viommu::backend::{Access, PageResponse, ResponseCode};
use viommu::interrupt::Msi;
use viommu::{Pasid, Rid, Target};
use vmm_sys_util::eventfd::EventFd;

use super::CHANNELS;
use super::registers::{Attributes, Enables, PIECE};
use super::requests::{Short, Upstream};
use super::worker::Channels;
use crate::interrupt::{MsiSource, MsiVector};
use crate::pci::Delivery;
use crate::pci::msix::Msix;

/// An address space with holes: pages whose number is a multiple of 3 have no translation, and
/// page requests for a multiple of 5 are not sent.
#[derive(Default)]
struct Holes {
    /// Groups that are owed a response.
    owed: Mutex<BTreeSet<(Option<u32>, u16)>>,
}

impl Holes {
    fn passes(iova: u64, length: usize) -> Result<(), Short> {
        assert!(length <= PIECE, "a step is bounded");
        let hole = (0..length).find(|at| (iova + *at as u64) >> 12 & 0xff == 3);
        hole.map_or(Ok(()), |done| Err(Short(done)))
    }
}

impl Upstream for Holes {
    fn read(&self, _: &Attributes, iova: u64, to: &mut [u8]) -> Result<(), Short> {
        Self::passes(iova, to.len())
    }
    fn write(&self, _: &Attributes, iova: u64, from: &[u8]) -> Result<(), Short> {
        Self::passes(iova, from.len())
    }
    fn translate(&self, _: &Attributes, iova: u64, _: Access) -> Option<u64> {
        Self::passes(iova, 1).ok().map(|()| iova)
    }
    fn message(&self, who: &Attributes, _: Msi) -> bool {
        who.pasid.is_none()
    }
    fn page_request(&self, who: &Attributes, iova: u64, _: Access, group: u16, last: bool) -> bool {
        assert!(group < 512 && iova & 0xfff == 0);
        if (iova >> 12).is_multiple_of(5) {
            return false;
        }
        if last {
            let key = (who.pasid.map(|pasid| pasid.0), group);
            let mut owed = self.owed.lock().unwrap_or_else(PoisonError::into_inner);
            assert!(owed.insert(key), "a group index is used while it waits");
            assert!(
                owed.len() <= CHANNELS,
                "more groups than the capability says"
            );
        }
        true
    }
}

/// Counts interrupts.
struct Counter(Arc<EventFd>);

impl MsiVector for Counter {
    fn eventfd(&self) -> &EventFd {
        &self.0
    }
    fn route(&self, _: Option<Msi>) -> io::Result<()> {
        Ok(())
    }
}

struct Counters(Arc<EventFd>);

impl MsiSource for Counters {
    fn vector(&self) -> io::Result<Arc<dyn MsiVector>> {
        Ok(Arc::new(Counter(Arc::clone(&self.0))))
    }
}

/// Feeds `input` to the channels, nine bytes for each action, and checks: no panic; no step
/// without an end; one interrupt for each operation that ends; one group per index; nothing busy
/// after everything was aborted.
///
/// # Panics
/// When an invariant does not hold, as a fuzz harness must.
#[expect(clippy::expect_used, reason = "a fuzz harness reports by panicking")]
pub fn dma_engine(input: &[u8]) {
    const CONTROL: u64 = 0;
    const FLAGS: u64 = 0x0c;
    const VECTOR: u64 = 0x38;
    let fired = Arc::new(EventFd::new(libc::EFD_NONBLOCK).expect("an eventfd"));
    let msix = Msix::new(
        super::VECTORS,
        Delivery::Emulated,
        &Counters(Arc::clone(&fired)),
    );
    let channels = Channels::new(msix.expect("vectors are eventfds"));
    channels.msix().set_control(1 << 15);
    for vector in 0..u64::from(super::VECTORS) {
        channels.msix().table_write(16 * vector + 12, &[0]);
    }
    let upstream = Holes::default();
    let mut buffer = Box::new([0; PIECE]);
    let mut expected = 0;
    // One of the interrupts that were expected will not come: its operation went with a reset.
    let wants = |index: usize| {
        channels.read(index, FLAGS) & 1 << 7 != 0
            && channels.read(index, VECTOR) < super::VECTORS.into()
    };
    let busy = |index: usize| matches!(channels.read(index, 4), 1 | 2);
    let (actions, _) = input.as_chunks::<9>();
    for &[action, a, b, c, d, e, f, g, h] in actions.iter().take(500) {
        let index = usize::from(a) % 8;
        let word = u32::from_le_bytes([e, f, g, h]);
        match action % 16 {
            // Mostly registers with values that mean something.
            0..6 => {
                let at = u64::from(b & 0x7c);
                let value = if action & 16 == 0 { word } else { word & 0xff };
                if at != CONTROL {
                    channels.write(index, at, value);
                }
            }
            6..9 => {
                let operation = u32::from(b) % 8;
                channels.write(index, 0x08, operation);
                channels.write(index, FLAGS, u32::from(c));
                channels.write(index, 0x10, word & 0x1_ffff);
                channels.write(index, 0x20, u32::from(d) << 8);
                if !busy(index) {
                    expected += u64::from(wants(index));
                    channels.write(index, CONTROL, 1);
                }
            }
            9 => channels.write(index, CONTROL, 2),
            10 => channels.enable(Enables {
                bus_master: b & 1 == 0,
                pasid: b & 2 == 0,
                execute: b & 4 == 0,
                privileged: b & 8 == 0,
                ats: b & 16 == 0,
                pri: b & 32 == 0,
                allocation: if b & 64 == 0 { word } else { c.into() },
            }),
            11 => {
                let owed = upstream
                    .owed
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .pop_first();
                let (pasid, group) = owed.unwrap_or((None, word as u16));
                channels.respond(PageResponse {
                    target: Target {
                        endpoint: Rid(8),
                        pasid: pasid.map(Pasid),
                    },
                    group,
                    code: match b % 4 {
                        0 | 1 => ResponseCode::Success,
                        2 => ResponseCode::Invalid,
                        _ => ResponseCode::Failure,
                    },
                });
            }
            12 if b == 0 => {
                expected -= (0..CHANNELS).filter(|n| busy(*n) && wants(*n)).count() as u64;
                channels.reset();
                upstream
                    .owed
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .clear();
            }
            12 if b == 1 => {
                channels.reset_paging();
                upstream
                    .owed
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .clear();
            }
            _ => {
                for _ in 0..c {
                    if !channels.step(&upstream, &mut buffer) {
                        break;
                    }
                }
            }
        }
        let waiting = (0..CHANNELS).filter(|n| channels.read(*n, 4) == 2).count();
        let (_, outstanding, _) = channels.counters();
        assert!(
            waiting <= outstanding as usize,
            "a channel waits for no response"
        );
    }
    for index in 0..CHANNELS {
        channels.write(index, CONTROL, 2);
        assert!(!busy(index), "aborted but busy");
    }
    assert!(
        !channels.step(&upstream, &mut buffer),
        "aborted but not done"
    );
    assert_eq!(fired.read().unwrap_or(0), expected, "interrupts");
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn any_bytes_keep_the_invariants(input in prop::collection::vec(any::<u8>(), 0..3000)) {
            super::dma_engine(&input);
        }
    }
}
