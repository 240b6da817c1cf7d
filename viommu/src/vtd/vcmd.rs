//! The virtual command registers' state machine: PASIDs that the guest asks its host for.
//!
//! How a unit wires it, under the lock that guards its registers:
//!
//! - `VCCAP` reads as [`VirtualCommands::vccap`], `VCMD` as 0, `VCRSP` as
//!   [`VirtualCommands::vcrsp`]; the last two ignore what is written to the rest of their bytes.
//! - A write to `VCMD` goes to [`write`](VirtualCommands::write), whole or by halves. If that
//!   gives a [`Command`], the unit drops its lock, calls [`Command::run`] with the VM's allocator,
//!   takes the lock again and calls [`complete`](VirtualCommands::complete). Until then another
//!   vCPU sees IP set.
//! - A reset of the unit calls [`reset`](VirtualCommands::reset). The PASIDs themselves belong to
//!   the VM: its reset frees them with [`PasidAllocator::free_all`].
//!
//! With no allocator there are no registers: `ECAP.VCS` is 0 and the unit never makes one of
//! these. Whether allocation can work is proved before the first vCPU runs.

#![forbid(unsafe_code)]

use crate::Pasid;
use crate::pasid::PasidAllocator;
use crate::spec::vtd::vcmd::{
    ALLOCATE_PASID, FREE_PASID, NULL, SC_INVALID_PASID, SC_NO_PASID, SC_SUCCESS, SC_UNDEFINED,
    Vccap, Vcmd, Vcrsp,
};

/// VCCAP, VCMD and VCRSP of one unit.
#[derive(Debug, Default)]
pub struct VirtualCommands {
    /// The last VCRSP, with IP while a command runs.
    response: Vcrsp,
    /// VCMD's upper half, for guests that write it by halves.
    high: u32,
    /// Which command is running. A reset forgets it, so that a late completion is dropped.
    running: Option<u64>,
    submitted: u64,
}

/// Which bytes of VCMD are written.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum VcmdWrite {
    /// All 8 bytes.
    Whole(u64),
    /// Bytes 3:0, which submit the command with the upper half as last written.
    Low(u32),
    /// Bytes 7:4, which are kept for the next [`VcmdWrite::Low`].
    High(u32),
}

/// A submitted command, to be [`run`](Self::run) without the unit's lock.
#[derive(Debug, PartialEq, Eq)]
#[must_use = "the guest waits for VCRSP.IP until the command is run and completed"]
pub struct Command {
    number: u64,
    vcmd: Vcmd,
}

/// A command that was run, to be [completed](VirtualCommands::complete).
#[derive(Debug, PartialEq, Eq)]
#[must_use = "the guest waits for VCRSP.IP until the command is completed"]
pub struct Completion {
    number: u64,
    response: Vcrsp,
}

impl VirtualCommands {
    /// The registers after reset: no command was ever submitted.
    pub fn new() -> Self {
        Self::default()
    }

    /// What VCCAP reads as.
    pub fn vccap(&self) -> u64 {
        let all = Vccap::new().with_ns(true).with_pas(true).with_fps(true);
        all.into_bits()
    }

    /// What VCRSP reads as.
    pub fn vcrsp(&self) -> u64 {
        self.response.into_bits()
    }

    /// The guest wrote VCMD. A command written while one is in progress is dropped: software must
    /// wait for IP = 0 first.
    pub fn write(&mut self, write: VcmdWrite) -> Option<Command> {
        let raw = match write {
            VcmdWrite::Whole(raw) => raw,
            VcmdWrite::Low(low) => u64::from(self.high) << 32 | u64::from(low),
            VcmdWrite::High(high) => {
                self.high = high;
                return None;
            }
        };
        if self.running.is_some() {
            return None;
        }
        self.high = (raw >> 32) as u32;
        self.submitted += 1;
        self.running = Some(self.submitted);
        self.response = Vcrsp::new().with_ip(true);
        Some(Command {
            number: self.submitted,
            vcmd: Vcmd::from_bits(raw),
        })
    }

    /// A command is done: VCRSP says how. Returns the PASID that must go back to the allocator:
    /// one that was allocated for a guest that reset the unit meanwhile and will never know of it.
    /// Freeing it may fail, where the reset freed everything already.
    #[must_use = "a PASID that nobody knows of must be freed"]
    pub fn complete(&mut self, completion: Completion) -> Option<Pasid> {
        if self.running == Some(completion.number) {
            self.running = None;
            self.response = completion.response;
            return None;
        }
        Pasid::new(completion.response.pasid()).filter(|pasid| pasid.0 != 0)
    }

    /// The unit is reset. A command in progress answers nobody.
    pub fn reset(&mut self) {
        self.running = None;
        self.response = Vcrsp::new();
        self.high = 0;
    }
}

impl Command {
    /// Does it.
    pub fn run(self, allocator: &dyn PasidAllocator) -> Completion {
        let response = match self.vcmd.command() {
            NULL => Vcrsp::new().with_sc(SC_SUCCESS),
            ALLOCATE_PASID => match allocator.allocate() {
                Ok(pasid) => Vcrsp::new().with_sc(SC_SUCCESS).with_pasid(pasid.0),
                Err(error) => {
                    log::debug!("VCMD: no PASID for the guest: {error}");
                    Vcrsp::new().with_sc(SC_NO_PASID)
                }
            },
            FREE_PASID => match allocator.free(Pasid(self.vcmd.pasid())) {
                Ok(()) => Vcrsp::new().with_sc(SC_SUCCESS),
                Err(error) => {
                    log::debug!("VCMD: the guest's free failed: {error}");
                    Vcrsp::new().with_sc(SC_INVALID_PASID)
                }
            },
            _ => Vcrsp::new().with_sc(SC_UNDEFINED),
        };
        Completion {
            number: self.number,
            response,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::sync::Mutex;

    use proptest::prelude::*;

    use super::*;
    use crate::pasid::Error;

    /// Numbers 1 to `most`, lowest first.
    struct Few {
        most: u32,
        out: Mutex<BTreeSet<u32>>,
    }

    impl Few {
        fn new(most: u32) -> Self {
            Self {
                most,
                out: Mutex::default(),
            }
        }
    }

    impl PasidAllocator for Few {
        fn allocate(&self) -> Result<Pasid, Error> {
            let mut out = self.out.lock().unwrap();
            let free = (1..=self.most).find(|n| !out.contains(n));
            let pasid = free.ok_or(Error::Quota { quota: self.most })?;
            out.insert(pasid);
            Ok(Pasid(pasid))
        }

        fn free(&self, pasid: Pasid) -> Result<(), Error> {
            match self.out.lock().unwrap().remove(&pasid.0) {
                true => Ok(()),
                false => Err(Error::NotOwned { pasid: pasid.0 }),
            }
        }

        fn free_all(&self) {
            self.out.lock().unwrap().clear();
        }
    }

    fn run(registers: &mut VirtualCommands, allocator: &Few, raw: u64) -> Vcrsp {
        let command = registers.write(VcmdWrite::Whole(raw)).unwrap();
        assert_eq!(registers.vcrsp(), 1, "only IP is set while a command runs");
        let completion = command.run(allocator);
        assert_eq!(registers.complete(completion), None);
        Vcrsp::from_bits(registers.vcrsp())
    }

    #[test]
    fn linux_6_1_finds_pasid_allocation_and_uses_it() {
        let (mut registers, allocator) = (VirtualCommands::new(), Few::new(2));
        assert_eq!(registers.vccap() & 1, 1);
        assert_eq!(registers.vcrsp(), 0);
        for wanted in [1, 2] {
            let response = run(&mut registers, &allocator, 1);
            assert_eq!((response.ip(), response.sc()), (false, 0));
            assert_eq!(response.pasid(), wanted);
        }
        assert_eq!(run(&mut registers, &allocator, 1).sc(), 16);
        assert_eq!(run(&mut registers, &allocator, 1 << 16 | 2).sc(), 0);
        assert_eq!(run(&mut registers, &allocator, 1 << 16 | 2).sc(), 16);
        assert_eq!(run(&mut registers, &allocator, 1).pasid(), 1);
    }

    #[test]
    fn a_failed_allocation_leaves_no_pasid_in_the_response() {
        let (mut registers, allocator) = (VirtualCommands::new(), Few::new(1));
        run(&mut registers, &allocator, 1);
        assert_eq!(run(&mut registers, &allocator, 1).pasid(), 0);
    }

    #[test]
    fn an_undefined_command_is_answered_and_changes_nothing() {
        let (mut registers, allocator) = (VirtualCommands::new(), Few::new(1));
        for opcode in 3..=255 {
            let response = run(&mut registers, &allocator, opcode);
            assert_eq!((response.ip(), response.sc()), (false, SC_UNDEFINED));
        }
        assert_eq!(run(&mut registers, &allocator, 0).sc(), SC_SUCCESS);
        assert!(allocator.out.lock().unwrap().is_empty());
    }

    #[test]
    fn a_command_while_one_is_in_progress_is_dropped() {
        let (mut registers, allocator) = (VirtualCommands::new(), Few::new(9));
        let first = registers.write(VcmdWrite::Whole(1)).unwrap();
        assert_eq!(registers.write(VcmdWrite::Whole(1)), None);
        assert_eq!(registers.write(VcmdWrite::Low(1)), None);
        assert_eq!(registers.complete(first.run(&allocator)), None);
        assert_eq!(allocator.out.lock().unwrap().len(), 1);
    }

    #[test]
    fn halves_submit_with_the_low_one() {
        let (mut registers, allocator) = (VirtualCommands::new(), Few::new(0));
        allocator.out.lock().unwrap().insert(0xa_0001);
        assert_eq!(registers.write(VcmdWrite::High(0xa)), None);
        let free = registers.write(VcmdWrite::Low(1 << 16 | 2)).unwrap();
        assert_eq!(registers.complete(free.run(&allocator)), None);
        assert_eq!(Vcrsp::from_bits(registers.vcrsp()).sc(), 0);
    }

    #[test]
    fn a_reset_during_an_allocation_gives_its_pasid_back() {
        let (mut registers, allocator) = (VirtualCommands::new(), Few::new(9));
        let old = registers.write(VcmdWrite::Whole(1)).unwrap();
        registers.reset();
        let new = registers.write(VcmdWrite::Whole(0)).unwrap();
        let orphan = registers.complete(old.run(&allocator)).unwrap();
        assert_eq!(registers.vcrsp(), 1, "the new command is still in progress");
        allocator.free(orphan).unwrap();
        assert_eq!(registers.complete(new.run(&allocator)), None);
        assert_eq!(registers.vcrsp(), 0);
    }

    proptest! {
        #[test]
        fn whatever_is_written_ip_clears_and_the_books_balance(
            writes in prop::collection::vec((any::<u64>(), 0..4u8), 0..200)
        ) {
            let (mut registers, allocator) = (VirtualCommands::new(), Few::new(16));
            let mut known = BTreeSet::new();
            for (raw, kind) in writes {
                // Mostly commands that exist, on few PASIDs.
                let raw = if kind == 0 { raw } else { raw & 0x1f_0003 };
                let write = match kind {
                    1 => VcmdWrite::Low(raw as u32),
                    2 => VcmdWrite::High((raw >> 32) as u32),
                    _ => VcmdWrite::Whole(raw),
                };
                let Some(command) = registers.write(write) else { continue };
                let freed = (command.vcmd.command() == FREE_PASID).then(|| command.vcmd.pasid());
                let completion = command.run(&allocator);
                prop_assert_eq!(registers.complete(completion), None);
                let response = Vcrsp::from_bits(registers.vcrsp());
                prop_assert!(!response.ip());
                if response.pasid() != 0 {
                    prop_assert!(known.insert(response.pasid()));
                }
                if let Some(pasid) = freed {
                    prop_assert_eq!(response.sc() == 0, known.remove(&pasid));
                }
                prop_assert_eq!(&*allocator.out.lock().unwrap(), &known);
            }
        }
    }
}
