//! Many processes that are bound to the device at the same time.

#![forbid(unsafe_code)]

use std::collections::BTreeSet;
use std::io::{PipeReader, PipeWriter, Read, Write, pipe};

use anyhow::{Context, Result, ensure};

use crate::checks::{SHARED_PLACE, holds};
use crate::fork::fork;
use crate::memory::Memory;
use crate::registers::{Channel, How, Status};
use crate::sva::Bound;

/// What each process has, in pages of 4 KiB: one half is filled, the other one copied to. The
/// device asks for each of them once.
const PAGES: usize = 8;
/// How often it does so.
const ROUNDS: u64 = 4;
/// What a process that failed says where the others say their PASIDs. No PASID has 32 bits.
const FAILED: u32 = u32::MAX;

/// `processes` processes (up to 64), each with its own address space on the device, at the same
/// addresses. All are bound before the first one works, and until the last one has looked at its
/// memory.
///
/// # Errors
/// What does not hold in any of them.
pub fn together(address: &str, processes: u64) -> Result<()> {
    ensure!(
        (1..=64).contains(&processes),
        "{processes} processes; there are 64 channels"
    );
    let (mut bound, mut done) = (Meeting::new()?, Meeting::new()?);
    let mut children = Vec::new();
    for index in 0..processes {
        children.push(fork(|| one(address, index, &mut bound, &mut done))?);
    }
    let pasids = bound.all(processes)?;
    let different: BTreeSet<u32> = pasids.iter().copied().filter(|p| *p != FAILED).collect();
    done.all(processes)?;
    for child in children {
        child.wait()?;
    }
    ensure!(
        different.len() as u64 == processes,
        "{processes} processes that were bound at the same time had the PASIDs {pasids:?}"
    );
    holds(&format!(
        "{processes} processes share the device, each with its own memory, PASIDs {:?} to {:?}",
        different.first(),
        different.last()
    ));
    Ok(())
}

/// Where all of them wait for the last one.
struct Meeting {
    told: PipeReader,
    tell: PipeWriter,
    /// Each of them takes one byte.
    wait: PipeReader,
    go: PipeWriter,
}

impl Meeting {
    fn new() -> Result<Self> {
        let (told, tell) = pipe()?;
        let (wait, go) = pipe()?;
        Ok(Self {
            told,
            tell,
            wait,
            go,
        })
    }

    /// One of them is there, and waits for the others.
    fn come(&mut self, with: u32) -> Result<()> {
        self.tell.write_all(&with.to_le_bytes())?;
        self.wait.read_exact(&mut [0])?;
        Ok(())
    }

    /// Waits for all of them, lets them go on, and gives what they came with.
    fn all(&mut self, processes: u64) -> Result<Vec<u32>> {
        let mut with = Vec::new();
        for _ in 0..processes {
            let mut number = [0; 4];
            self.told.read_exact(&mut number)?;
            with.push(u32::from_le_bytes(number));
        }
        self.go.write_all(&vec![0; processes as usize])?;
        Ok(with)
    }
}

/// One of the processes. It comes to both meetings whatever happens, or the others would wait.
fn one(address: &str, index: u64, bound: &mut Meeting, done: &mut Meeting) -> Result<()> {
    let device = Bound::new(address);
    bound.come(device.as_ref().map_or(FAILED, Bound::pasid))?;
    let worked = device.and_then(|device| {
        let own = work(&device, index)?;
        Ok((device, own))
    });
    done.come(0)?;
    let (device, own) = worked.with_context(|| format!("process {index}"))?;
    // The others have done all that they did.
    own.check()?;
    device.unbind()?;
    let page = device.channel(index)?;
    let at = own.memory.address();
    let after = Channel::alone(&page).fill(How::sva(device.pasid()), 0, at, 64)?;
    ensure!(
        matches!(after.status, Status::Failed(_)),
        "memory is reached after the process was unbound: {after:x?}"
    );
    own.check()
}

/// What a process's memory has to be.
struct Own {
    memory: Memory,
    pattern: u64,
}

impl Own {
    fn check(&self) -> Result<()> {
        let bytes = self.pattern.to_le_bytes();
        self.memory.check("a process's memory", |at| bytes[at % 8])
    }
}

fn work(device: &Bound, index: u64) -> Result<Own> {
    let page = device.channel(index)?;
    let channel = Channel::alone(&page);
    let mut own = Own {
        memory: Memory::new(PAGES << 12, Some(SHARED_PLACE))?,
        pattern: 0,
    };
    let how = How::sva(device.pasid());
    let (from, half) = (own.memory.address(), own.memory.len() / 2);
    let mut asked = 0;
    for round in 0..ROUNDS {
        own.pattern = ((index + 1) * 0x0101_0101_0101_0101) ^ round;
        // Nobody has touched these pages before the first round: the device faults them in.
        let filled = channel.fill(how, own.pattern, from, half)?;
        let filled = filled.expect_done("a fill")?;
        ensure!(
            filled.page_requests == filled.page_responses,
            "unanswered: {filled:x?}"
        );
        let copied = channel.copy(how, from, from + half, half)?;
        asked += filled.page_requests + copied.expect_done("a copy")?.page_requests;
        own.check()?;
    }
    ensure!(asked > 0, "no page was asked for, though none was there");
    Ok(own)
}
