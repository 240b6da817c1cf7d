//! The requests that one step makes: what it reads, writes, translates.

#![forbid(unsafe_code)]

use std::sync::{Mutex, PoisonError};

use viommu::Iova;
use viommu::backend::Access;
use viommu::dma::{DmaAccess, DmaPort};
use viommu::interrupt::Msi;
use vm_memory::{GuestAddress, GuestMemory, Permissions, VolatileSlice};

use super::registers::{Attributes, Job, Operation, Outcome, PIECE, Stop, checksum};

/// How many bytes passed before a request that did not.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Short(pub(super) usize);

/// A function's upstream port: DMA as its own RID. The worker calls it with no lock held.
pub(super) trait Upstream: Send + Sync {
    /// Reads all of `to`, or as much as passes.
    fn read(&self, who: &Attributes, iova: u64, to: &mut [u8]) -> Result<(), Short>;
    /// Writes all of `from`, or as much as passes.
    fn write(&self, who: &Attributes, iova: u64, from: &[u8]) -> Result<(), Short>;
    /// An ATS translation request.
    fn translate(&self, who: &Attributes, iova: u64, access: Access) -> Option<u64>;
    /// Writes an interrupt message; whether it was taken as one.
    fn message(&self, who: &Attributes, msi: Msi) -> bool;
    /// A page request; `false` when it was not sent.
    fn page_request(
        &self,
        who: &Attributes,
        iova: u64,
        access: Access,
        group: u16,
        last: bool,
    ) -> bool;
}

/// Does one step. `buffer` has [`PIECE`] bytes.
pub(super) fn perform(job: &Job, upstream: &dyn Upstream, buffer: &mut [u8; PIECE]) -> Outcome {
    let who = &job.attributes;
    let piece = job.piece();
    let end = |done: usize, result: u64| Outcome {
        done: done as u64,
        result,
        stop: (job.done + done as u64 == job.length).then_some(Stop::Finished),
    };
    let short = |done: usize, at: u64, access: Access, result: u64| Outcome {
        done: done as u64,
        result,
        stop: Some(match who.ats {
            true => Stop::Missing(at, access),
            false => Stop::Fault(at),
        }),
    };
    // `decode` has seen to it that no sum below overflows.
    match job.operation {
        Operation::Copy { from, to } => {
            let (from, to) = (from + job.done, to + job.done);
            let read = upstream.read(who, from, &mut buffer[..piece]);
            let have = read.map_or_else(|Short(done)| done, |()| piece);
            match (upstream.write(who, to, &buffer[..have]), read) {
                (Err(Short(done)), _) => short(done, to + done as u64, Access::WRITE, 0),
                (Ok(()), Err(_)) => short(have, from + have as u64, Access::READ, 0),
                (Ok(()), Ok(())) => end(have, 0),
            }
        }
        Operation::Fill { to } => {
            let pattern = job.pattern.to_le_bytes();
            let pattern = pattern.iter().cycle().skip((job.done % 8) as usize);
            for (byte, value) in buffer[..piece].iter_mut().zip(pattern) {
                *byte = *value;
            }
            let at = to + job.done;
            match upstream.write(who, at, &buffer[..piece]) {
                Ok(()) => end(piece, 0),
                Err(Short(done)) => short(done, at + done as u64, Access::WRITE, 0),
            }
        }
        Operation::Checksum { from } => {
            let at = from + job.done;
            match upstream.read(who, at, &mut buffer[..piece]) {
                Ok(()) => end(piece, checksum(job.result, &buffer[..piece])),
                Err(Short(done)) => {
                    let sum = checksum(job.result, &buffer[..done]);
                    short(done, at + done as u64, Access::READ, sum)
                }
            }
        }
        Operation::Translate { iova, access } => match upstream.translate(who, iova, access) {
            Some(result) => Outcome {
                done: 0,
                result,
                stop: Some(Stop::Finished),
            },
            None => Outcome {
                done: 0,
                result: 0,
                stop: Some(Stop::Missing(iova, access)),
            },
        },
        Operation::Message { to } => {
            let msi = Msi {
                address: to,
                data: job.pattern as u32,
            };
            Outcome {
                done: 0,
                result: upstream.message(who, msi).into(),
                stop: Some(Stop::Finished),
            }
        }
        Operation::PageRequest { .. } => Outcome {
            done: 0,
            result: 0,
            stop: Some(Stop::Ask),
        },
    }
}

/// [`Upstream`] of a real port. Remembers the last port with attributes, since a piece usually
/// has the same as the one before, and a port has a translation cache.
pub(super) struct Port {
    plain: DmaPort,
    last: Mutex<Option<(Attributes, DmaPort)>>,
}

impl Port {
    pub(super) fn new(plain: DmaPort) -> Self {
        Self {
            plain,
            last: Mutex::new(None),
        }
    }

    /// Runs `work` on the port whose requests have these attributes; `None` when the endpoint
    /// cannot send them.
    fn with<R>(&self, who: &Attributes, work: impl FnOnce(&DmaPort) -> R) -> Option<R> {
        let Some(pasid) = who.pasid else {
            return Some(work(&self.plain));
        };
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        if last.as_ref().is_none_or(|(of, _)| of != who) {
            *last = None;
            let port = self.plain.with_pasid(pasid)?;
            let port = port
                .with_privileged(who.privileged)
                .with_execute(who.execute);
            *last = Some((*who, port));
        }
        last.as_ref().map(|(_, port)| work(port))
    }

    fn transfer(
        &self,
        who: &Attributes,
        iova: u64,
        length: usize,
        permission: Permissions,
        mut piece: impl FnMut(usize, VolatileSlice<'_>),
    ) -> Result<(), Short> {
        let mut done = 0;
        let whole = self.with(who, |port| {
            if who.ats && !port.translation_request(Iova(iova)) {
                return;
            }
            let access = port.access();
            let length = match who.ats {
                true => translated(&access, iova, length, permission),
                false => length,
            };
            let slices = access.get_slices(GuestAddress(iova), length, permission);
            for slice in slices.into_iter().flatten() {
                let Ok(slice) = slice else { return };
                let bytes = slice.len();
                piece(done, slice);
                done += bytes;
            }
        });
        match whole {
            Some(()) if done == length => Ok(()),
            _ => Err(Short(done)),
        }
    }
}

/// How many of `length` bytes have a translation, counted from the first.
fn translated(access: &DmaAccess<'_>, iova: u64, length: usize, permission: Permissions) -> usize {
    let wanted = match permission {
        Permissions::Write => Access::WRITE,
        _ => Access::READ,
    };
    let mut done = 0;
    while done < length as u64 {
        match access.lookup(Iova(iova + done), length as u64 - done, wanted) {
            Ok(piece) => done += piece.length,
            Err(_) => break,
        }
    }
    done as usize
}

impl Upstream for Port {
    fn read(&self, who: &Attributes, iova: u64, to: &mut [u8]) -> Result<(), Short> {
        let length = to.len();
        self.transfer(who, iova, length, Permissions::Read, |done, slice| {
            slice.copy_to(&mut to[done..]);
        })
    }

    fn write(&self, who: &Attributes, iova: u64, from: &[u8]) -> Result<(), Short> {
        self.transfer(who, iova, from.len(), Permissions::Write, |done, slice| {
            slice.copy_from(&from[done..]);
        })
    }

    fn translate(&self, who: &Attributes, iova: u64, access: Access) -> Option<u64> {
        let found = self.with(who, |port| {
            let supported = port.translation_request(Iova(iova));
            let found = supported.then(|| port.access().lookup(Iova(iova), 1, access));
            found?.ok()
        });
        Some(found??.gpa.0)
    }

    fn message(&self, who: &Attributes, msi: Msi) -> bool {
        self.with(who, |port| port.message(msi)).unwrap_or(false)
    }

    fn page_request(
        &self,
        who: &Attributes,
        iova: u64,
        access: Access,
        group: u16,
        last: bool,
    ) -> bool {
        let sent = self.with(who, |port| {
            port.page_request(Iova(iova), access, group, last).is_ok()
        });
        sent.unwrap_or(false)
    }
}
