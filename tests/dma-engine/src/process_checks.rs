//! Checks of what a process and the device share, beyond [`processes`](crate::processes).

#![forbid(unsafe_code)]

use std::io::{Read, Write};

use anyhow::{Result, ensure};

use crate::checks::{PLAIN, SHARED_PLACE, holds};
use crate::fork::fork;
use crate::memory::Memory;
use crate::registers::{Channel, How, Operation, Reason, Registers, checksum};
use crate::sva::{self, Bound, SPACE_IOVA, SPACE_SIZE, Space};

/// Copies between two buffers that `malloc` gave.
///
/// # Errors
/// What does not hold.
pub fn heap(address: &str) -> Result<()> {
    let bound = Bound::new(address)?;
    let page = bound.channel(0)?;
    let how = How::sva(bound.pasid());
    let (from, to) = (Memory::heap(1 << 20)?, Memory::heap(1 << 20)?);
    let pattern = |at: usize| ((at * 31) >> 3) as u8;
    from.fill_with(pattern);
    let odd = from.len() - 7;
    let copied = Channel::alone(&page).copy(how, from.address() + 3, to.address() + 1, odd)?;
    let copied = copied.expect_done("a copy between malloc'd buffers")?;
    ensure!(
        copied.page_requests > 0,
        "no page of the target was asked for"
    );
    let end = 1 + odd as usize;
    for (at, byte) in to.bytes().enumerate().take(end).skip(1) {
        ensure!(
            byte == pattern(at + 2),
            "byte {at:#x} of the copy is {byte:#x}"
        );
    }
    holds("what malloc gave is copied by the device, where the process sees it");
    Ok(())
}

/// `fork` while the device works in the process's memory: the child's copy is the child's.
///
/// # Errors
/// What does not hold.
pub fn forked(address: &str) -> Result<()> {
    let bound = Bound::new(address)?;
    let page = bound.channel(0)?;
    let channel = Channel::alone(&page);
    let how = How::sva(bound.pasid());
    for round in 1..=4u8 {
        // Half of it is there, the other half is faulted in while the process forks.
        let memory = Memory::new(64 << 12, Some(SHARED_PLACE))?;
        let filled = channel.fill(how, 0, memory.address(), memory.len() / 2)?;
        filled.expect_done("a fill")?;
        channel.set_pattern(u64::from_le_bytes([round; 8]));
        channel.start(Operation::Fill, how, 0, memory.address(), memory.len());
        let (mut told, mut tell) = std::io::pipe()?;
        let child = fork(|| {
            let before = checksum(memory.bytes());
            told.read_exact(&mut [0])?;
            ensure!(
                checksum(memory.bytes()) == before,
                "the device wrote into the memory of a forked child"
            );
            Ok(())
        })?;
        channel
            .end()?
            .expect_done("a fill while the process forks")?;
        tell.write_all(&[0])?;
        child.wait()?;
        memory.check("the parent's memory", |_| round)?;
    }
    holds("a fork while DMA runs leaves the parent's memory the device's, and the child's its own");
    Ok(())
}

/// What a bound process does not give: privileged access, requests without PASID, other PASIDs.
/// The guest's kernel reports faults of this.
///
/// # Errors
/// What does not hold.
pub fn apart(address: &str) -> Result<()> {
    let bound = Bound::new(address)?;
    let page = bound.channel(0)?;
    let channel = Channel::alone(&page);
    let memory = Memory::new(1 << 12, Some(SHARED_PLACE))?;
    memory.fill_with(|_| 0x5a);
    let (at, how) = (memory.address(), How::sva(bound.pasid()));
    channel
        .checksum(how, at, 64)?
        .expect_done("a user's read")?;
    let privileged = How {
        privileged: true,
        ..how
    };
    let refused = channel.fill(privileged, 0, at, 64)?;
    refused.expect_failure(Reason::PageInvalid, at, "a privileged page request")?;
    holds("a privileged page request is answered Invalid");
    let plain = channel.checksum(PLAIN, at, 64)?;
    plain.expect_failure(Reason::Fault, at, "a request without PASID")?;
    let other = How::pasid(bound.pasid() + 1);
    let other = channel.checksum(other, at, 64)?;
    other.expect_failure(Reason::Fault, at, "another PASID")?;
    memory.check("a process's memory", |_| 0x5a)?;
    holds("no PASID and another PASID do not reach a process's memory");
    Ok(())
}

/// Domains that the kernel attaches to PASIDs: address spaces side by side, at the same addresses.
/// The guest's kernel reports the fault of one that is gone, and must.
///
/// # Errors
/// What does not hold.
pub fn spaces(address: &str) -> Result<()> {
    const COUNT: u8 = 8;
    let spaces = (0..COUNT)
        .map(|_| Space::new(address))
        .collect::<Result<Vec<_>>>()?;
    let how = |space: &Space| How {
        pasid: Some(space.pasid()),
        ..PLAIN
    };
    let pages = (0..COUNT.into())
        .zip(&spaces)
        .map(|(n, space)| space.channel(n))
        .collect::<Result<Vec<_>>>()?;
    // All at once: the first half is filled, and copied to the second.
    let half = SPACE_SIZE as u64 / 2;
    for (n, (space, page)) in (1..).zip(spaces.iter().zip(&pages)) {
        let channel = Channel::alone(page);
        channel.set_pattern(n * 0x0101_0101_0101_0101);
        channel.start(Operation::Fill, how(space), 0, SPACE_IOVA, half);
    }
    for page in &pages {
        Channel::alone(page)
            .end()?
            .expect_done("a fill with a PASID")?;
    }
    for (n, (space, page)) in (1..).zip(spaces.iter().zip(&pages)) {
        let copied = Channel::alone(page).copy(how(space), SPACE_IOVA, SPACE_IOVA + half, half)?;
        copied.expect_done("a copy with a PASID")?;
        space.memory().check("an address space", |_| n)?;
    }
    holds(&format!(
        "{COUNT} PASIDs mean {COUNT} address spaces at the same addresses"
    ));

    let (gone, stays) = (&spaces[0], &spaces[1]);
    let channel = Channel::alone(&pages[0]);
    channel.start(Operation::Fill, how(gone), 0, SPACE_IOVA, SPACE_SIZE as u64);
    gone.detach()?;
    gone.memory().fill_with(|_| 0xa5);
    channel.end()?;
    gone.memory().check("memory after its detach", |_| 0xa5)?;
    let after = channel.fill(how(gone), 0, SPACE_IOVA, 64)?;
    after.expect_failure(Reason::Fault, SPACE_IOVA, "a detached PASID")?;
    stays.memory().check("another PASID's memory", |_| 2)?;
    let sum = Channel::alone(&pages[1]).checksum(how(stays), SPACE_IOVA, 64)?;
    let sum = sum.expect_done("another PASID")?;
    ensure!(sum.result == checksum([2; 64]), "the sum differs: {sum:x?}");
    println!("detached={:#x}", gone.pasid());
    holds("a detached PASID reaches nothing, and the others go on");
    Ok(())
}

/// Prints the device's counts of page requests, and fails when a group has no answer.
///
/// # Errors
/// What does not hold.
pub fn counts(address: &str) -> Result<()> {
    let device = sva::registers(address)?;
    let outstanding = device.read(0x14);
    let [asked, answered, stray] = [0x18, 0x20, 0x28].map(|at| device.read64(at));
    println!("asked={asked} answered={answered} stray={stray} outstanding={outstanding}");
    ensure!(outstanding == 0, "{outstanding} groups wait for an answer");
    ensure!(stray == 0, "{stray} answers were to nothing");
    Ok(())
}
