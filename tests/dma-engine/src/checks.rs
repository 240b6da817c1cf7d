//! The checks, one for each way to own the device. Each says what holds as it goes.

#![forbid(unsafe_code)]

use std::io::{Read, Write};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::fork::fork;
use crate::memory::Memory;
use crate::registers::{Channel, How, Operation, Reason, Registers, Status, checksum, identify};
use crate::sva::{self, Bound};
use crate::sysfs::Function;
use crate::vfio::{Cdev, Event, Group};

pub(crate) const PLAIN: How = How {
    pasid: None,
    privileged: false,
    execute: false,
    ats: false,
    pri: false,
    interrupt: false,
};

/// Where buffers are mapped: above 4 GiB, so that no address is cut to 32 bits unnoticed.
const IOVA: u64 = 0x5_0000_0000;
const PAGE: u64 = 4096;

/// How long an interrupt may take, from the device to who waits for it.
pub const ARRIVES: Duration = Duration::from_secs(200);

pub(crate) fn holds(what: &str) {
    println!("ok: {what}");
}

/// A function that nobody gave an address space reaches nothing, with and without PASID. The
/// guest's kernel reports faults of this, and must.
///
/// # Errors
/// What does not hold.
pub fn blocked(address: &str) -> Result<()> {
    let function = Function::at(address)?;
    function.give_to(None)?;
    function.enable()?;
    let bar = function.registers()?;
    identify(&bar)?;
    let channel = Channel::new(&bar, 0);
    for at in [0x1000, 0x10_0000, 0xfee0_0000, IOVA] {
        let read = channel.checksum(PLAIN, at, 64)?;
        read.expect_failure(Reason::Fault, at, "a read with no mapping")?;
        let written = channel.fill(PLAIN, 0, at, 64)?;
        written.expect_failure(Reason::Fault, at, "a write with no mapping")?;
    }
    holds("nothing is reached without a mapping");
    function.enable_only(0x2)?;
    let write = channel.fill(PLAIN, 0, 0x1000, 64)?;
    ensure!(
        write.status == Status::Failed(Reason::Disabled),
        "a write without bus mastering: {write:x?}"
    );
    holds("nothing is sent without bus mastering");
    Ok(())
}

/// The device in an address space of VFIO's, by its group.
///
/// # Errors
/// What does not hold.
pub fn vfio(address: &str) -> Result<()> {
    let group = Group::open(address)?;
    let bar = group.device.enable()?;
    identify(&bar)?;
    let memory = Memory::new(4 << 20, None)?;
    let read_only = Memory::new(1 << 16, None)?;
    group.map(&memory, IOVA, true)?;
    group.map(&read_only, IOVA + (8 << 20), false)?;
    let pattern = |at: usize| ((at * 31) >> 4) as u8;
    memory.fill_with(pattern);
    read_only.fill_with(pattern);

    let channel = Channel::new(&bar, 0);
    let half = memory.len() / 2;
    let odd = half - 5;
    channel
        .fill(PLAIN, 0, IOVA + half, half)?
        .expect_done("a fill")?;
    channel
        .copy(PLAIN, IOVA + 3, IOVA + half + 1, odd)?
        .expect_done("a copy")?;
    memory.check("a copy", |at| match at.checked_sub(half as usize + 1) {
        None if at < half as usize => pattern(at),
        Some(at) if (at as u64) < odd => pattern(at + 3),
        _ => 0,
    })?;
    holds("copies of any length and alignment arrive whole, and nowhere else");

    let sum = channel.checksum(PLAIN, IOVA + (8 << 20), read_only.len())?;
    let sum = sum.expect_done("a read of read-only memory")?;
    ensure!(
        sum.result == checksum(read_only.bytes()),
        "the sum differs: {sum:x?}"
    );
    let write = channel.fill(PLAIN, 0, IOVA + (8 << 20), 64)?;
    write.expect_failure(
        Reason::Fault,
        IOVA + (8 << 20),
        "a write to read-only memory",
    )?;
    read_only.check("read-only memory", pattern)?;
    let write = channel.fill(PLAIN, 0, IOVA + memory.len() - 64, 128)?;
    write.expect_failure(Reason::Fault, IOVA + memory.len(), "a write beyond the end")?;
    holds("what is not mapped, or not for writing, is a fault at its address");

    let size = memory.len() / 64;
    for n in 0..64 {
        let channel = Channel::new(&bar, n);
        channel.set_pattern(n * 0x0101_0101_0101_0101);
        channel.start(Operation::Fill, PLAIN, 0, IOVA + n * size, size);
    }
    for n in 0..64 {
        Channel::new(&bar, n)
            .end()?
            .expect_done("one of 64 fills")?;
    }
    memory.check("64 fills at once", |at| (at as u64 / size) as u8)?;
    holds("64 channels work side by side");

    interrupts(&group, &bar)?;

    channel.start(Operation::Copy, PLAIN, IOVA, IOVA + half, half);
    group.unmap(IOVA, memory.len())?;
    memory.fill_with(|_| 0xa5);
    channel.end()?;
    memory.check("memory after its unmap", |_| 0xa5)?;
    // The guest's kernel tells of three faults in five seconds, and this one shall be among them.
    std::thread::sleep(Duration::from_secs(6));
    let read = channel.checksum(PLAIN, IOVA, 64)?;
    read.expect_failure(Reason::Fault, IOVA, "a read after an unmap")?;
    holds("nothing is written after an unmap returned, and nothing is reached");

    group.device.reset()?;
    ensure!(
        channel.status()? == Status::Idle,
        "reset leaves {:?}",
        channel.status()?
    );
    holds("a reset leaves every channel idle");
    Ok(())
}

fn interrupts(group: &Group, bar: &dyn Registers) -> Result<()> {
    let events = (0..16).map(|_| Event::new()).collect::<Result<Vec<_>>>()?;
    group.device.connect(&events)?;
    let how = How {
        interrupt: true,
        ..PLAIN
    };
    for n in 0..16 {
        Channel::new(bar, n)
            .checksum(how, IOVA, 64)?
            .expect_done("a sum")?;
    }
    let began = Instant::now();
    let mut counts = [0; 16];
    while counts.contains(&0) {
        for (count, event) in counts.iter_mut().zip(&events) {
            *count += event.take();
        }
        ensure!(
            began.elapsed() < ARRIVES,
            "interrupts are missing: {counts:?}"
        );
        std::thread::sleep(Duration::from_millis(1));
    }
    ensure!(counts == [1; 16], "interrupts: {counts:?}");
    holds("each of 16 vectors interrupts once");
    Ok(())
}

/// Two functions in one address space of VFIO's, and one of them in its own again.
///
/// # Errors
/// What does not hold.
pub fn together(one: &str, two: &str) -> Result<()> {
    const MARK: u64 = 0x0101_0101_0101_0101;
    let first = Group::open(one)?;
    let memory = Memory::new(1 << 20, None)?;
    first.map(&memory, IOVA, true)?;
    // What is mapped already is there for one that comes later.
    let second = first.beside(two)?;
    let bars = [first.device.enable()?, second.device.enable()?];
    let half = memory.len() / 2;
    for (n, bar) in (0u64..).zip(&bars) {
        identify(bar)?;
        Channel::new(bar, 0)
            .fill(PLAIN, (n + 1) * MARK, IOVA + n * half, half)?
            .expect_done("a fill")?;
    }
    memory.check("memory of both", |at| (at as u64 / half) as u8 + 1)?;
    let sum = Channel::new(&bars[1], 0)
        .checksum(PLAIN, IOVA, 64)?
        .expect_done("a read of what the other wrote")?;
    ensure!(sum.result == checksum([1; 64]), "the sum differs: {sum:x?}");
    holds("two functions share one address space");

    let [bar, other] = bars;
    drop((other, second));
    Channel::new(&bar, 0)
        .checksum(PLAIN, IOVA, 64)?
        .expect_done("a read by the one that stayed")?;
    let alone = Group::open(two)?;
    let own = Memory::new(1 << 16, None)?;
    alone.map(&own, IOVA + memory.len(), true)?;
    let other = alone.device.enable()?;
    Channel::new(&other, 0)
        .fill(PLAIN, 3 * MARK, IOVA + memory.len(), own.len())?
        .expect_done("a fill of its own memory")?;
    own.check("memory of one", |_| 3)?;
    Channel::new(&other, 0)
        .fill(PLAIN, 3 * MARK, IOVA, 64)?
        .expect_failure(Reason::Fault, IOVA, "a write to the other's memory")?;
    holds("one that left sees nothing of what the others have");

    drop((other, alone));
    let back = first.beside(two)?;
    let other = back.device.enable()?;
    Channel::new(&other, 0)
        .checksum(PLAIN, IOVA, 64)?
        .expect_done("a read by the one that came back")?;
    first.unmap(IOVA, memory.len())?;
    for bar in [&bar, &other] {
        Channel::new(bar, 0)
            .checksum(PLAIN, IOVA, 64)?
            .expect_failure(Reason::Fault, IOVA, "a read after an unmap")?;
    }
    holds("one that came back has what there is, and an unmap counts for both");
    Ok(())
}

/// The device moves between address spaces of iommufd's.
///
/// # Errors
/// What does not hold.
pub fn cdev(address: &str) -> Result<()> {
    const MARK: u64 = 0x0101_0101_0101_0101;
    let cdev = Cdev::open(address)?;
    let mut spaces = Vec::new();
    for _ in 0..2 {
        let (space, memory) = (cdev.space()?, Memory::new(1 << 20, None)?);
        cdev.map(space, &memory, IOVA)?;
        spaces.push((space, memory));
    }
    let (one, two) = (&spaces[0], &spaces[1]);
    cdev.attach(one.0, None)?;
    let bar = cdev.device.enable()?;
    identify(&bar)?;
    let channel = Channel::new(&bar, 0);
    for (n, (space, memory)) in (1u64..).zip(&spaces) {
        // The second takes the place of the first, with no detach between.
        cdev.attach(*space, None)?;
        channel
            .fill(PLAIN, n * MARK, IOVA, memory.len())?
            .expect_done("a fill")?;
    }
    one.1.check("the first address space", |_| 1)?;
    two.1.check("the second address space", |_| 2)?;
    cdev.attach(one.0, None)?;
    let sum = channel
        .checksum(PLAIN, IOVA, 64)?
        .expect_done("a read in the first address space")?;
    ensure!(sum.result == checksum([1; 64]), "the sum differs: {sum:x?}");
    holds("an attach takes the place of the one before, and back");

    channel.set_pattern(u64::MAX);
    channel.start(Operation::Fill, PLAIN, 0, IOVA, one.1.len());
    cdev.unmap(one.0, IOVA, one.1.len())?;
    one.1.fill_with(|_| 0xa5);
    channel.end()?;
    one.1.check("memory after its unmap", |_| 0xa5)?;
    holds("nothing is written after an unmap returned");

    cdev.attach(two.0, None)?;
    cdev.detach(None)?;
    channel.checksum(PLAIN, IOVA, 64)?.expect_failure(
        Reason::Fault,
        IOVA,
        "a read when detached",
    )?;
    cdev.attach(two.0, None)?;
    let sum = channel
        .checksum(PLAIN, IOVA, 64)?
        .expect_done("a read when attached again")?;
    ensure!(sum.result == checksum([2; 64]), "the sum differs: {sum:x?}");
    holds("a detached function reaches nothing, and one attached again what there is");
    Ok(())
}

/// `rounds` rounds of one interrupt on each of 16 vectors, each awaited and counted, while whoever
/// calls this moves them between CPUs: none is lost, and none comes twice. One that has not come
/// after `limit` is lost.
///
/// # Errors
/// What does not hold.
pub fn interrupts_counted(address: &str, rounds: u64, limit: Duration) -> Result<()> {
    let group = Group::open(address)?;
    let bar = group.device.enable()?;
    identify(&bar)?;
    let memory = Memory::new(PAGE as usize, None)?;
    group.map(&memory, IOVA, true)?;
    let events = (0..16).map(|_| Event::new()).collect::<Result<Vec<_>>>()?;
    group.device.connect(&events)?;
    let how = How {
        interrupt: true,
        ..PLAIN
    };
    let mut counts = [0; 16];
    let count = |counts: &mut [u64; 16]| {
        for (count, event) in counts.iter_mut().zip(&events) {
            *count += event.take();
        }
    };
    for round in 0..rounds {
        for n in 0..16 {
            Channel::new(&bar, n)
                .checksum(how, IOVA, 64)?
                .expect_done("a sum")?;
            let mut right = [round; 16];
            right[..=n as usize].fill(round + 1);
            let began = Instant::now();
            count(&mut counts);
            while counts != right {
                ensure!(
                    began.elapsed() < limit,
                    "interrupts: {counts:?} instead of {right:?}"
                );
                std::thread::sleep(Duration::from_micros(200));
                count(&mut counts);
            }
        }
    }
    std::thread::sleep(Duration::from_millis(100));
    count(&mut counts);
    ensure!(counts == [rounds; 16], "interrupts: {counts:?}");
    holds(&format!(
        "{} interrupts were sent and arrived once",
        16 * rounds
    ));
    Ok(())
}

/// Interrupt messages that the device writes as it likes, where remapping is on: its own arrives,
/// and three forged ones do not (another's handle, one that has no entry, and one in compatibility
/// format). The guest's kernel reports three faults, and must.
///
/// # Errors
/// What does not hold.
pub fn forge(address: &str) -> Result<()> {
    /// Where the MSI-X table is in BAR 0.
    const TABLE: u64 = 0x1000;
    let group = Group::open(address)?;
    let bar = group.device.enable()?;
    identify(&bar)?;
    let events = (0..16).map(|_| Event::new()).collect::<Result<Vec<_>>>()?;
    group.device.connect(&events)?;
    let (to, data) = (bar.read64(TABLE), bar.read(TABLE + 8));
    ensure!(
        to >> 20 == 0xfee && to & 1 << 4 != 0,
        "the message {to:#x} of vector 0 is not in remappable format"
    );
    let channel = Channel::new(&bar, 0);
    let send = |to: u64, data: u32| -> Result<()> {
        channel.set_pattern(data.into());
        channel.start(Operation::Message, PLAIN, 0, to, 4);
        let sent = channel.end()?.expect_done("a message")?;
        ensure!(sent.result == 1, "nobody took the message: {sent:x?}");
        Ok(())
    };
    // Its own message comes after all that were sent before it.
    let mut counts = [0; 16];
    let mut own_arrives = |right: u64| -> Result<()> {
        send(to, data)?;
        let began = Instant::now();
        while counts[0] < right {
            ensure!(began.elapsed() < ARRIVES, "its own message does not arrive");
            std::thread::sleep(Duration::from_millis(1));
            for (count, event) in counts.iter_mut().zip(&events) {
                *count += event.take();
            }
        }
        let mut expected = [0; 16];
        expected[0] = right;
        ensure!(
            counts == expected,
            "messages: {counts:?} instead of {expected:?}"
        );
        Ok(())
    };
    own_arrives(1)?;
    holds("the device's own message arrives");
    // Address bits 19:5 and 2 are the handle; without bit 3 the data counts for nothing.
    let handle = |n: u64| 0xfee0_0000 | (n & 0x7fff) << 5 | 1 << 4 | (n >> 15) << 2;
    for (own, (what, to)) in (2..).zip([
        ("with the handle of another source", handle(0)),
        ("with a handle that has no entry", handle(0xffff)),
        ("in compatibility format", 0xfee0_0000),
    ]) {
        send(to, 0x30)?;
        own_arrives(own).with_context(|| format!("after a message {what}"))?;
        holds(&format!("a message {what} is not delivered"));
    }
    // What came late would be here by now.
    std::thread::sleep(Duration::from_millis(200));
    own_arrives(5)?;
    Ok(())
}

/// The device with several address spaces at once, through iommufd.
///
/// # Errors
/// What does not hold.
pub fn pasid(address: &str) -> Result<()> {
    /// The last is the largest that a device of 20 bits has.
    const PASIDS: [Option<u32>; 4] = [None, Some(1), Some(2), Some(0xf_ffff)];
    let cdev = Cdev::open(address)?;
    let mut spaces = Vec::new();
    for pasid in PASIDS {
        let (space, memory) = (cdev.space_for_pasids()?, Memory::new(1 << 20, None)?);
        cdev.map(space, &memory, IOVA)?;
        cdev.attach(space, pasid)
            .with_context(|| format!("PASID {pasid:?}"))?;
        spaces.push((pasid, space, memory));
    }
    let bar = cdev.device.enable()?;
    identify(&bar)?;
    let how = |pasid: Option<u32>| How { pasid, ..PLAIN };

    for (n, (pasid, _, memory)) in (0u64..).zip(&spaces) {
        let channel = Channel::new(&bar, n);
        channel.set_pattern((n + 1) * 0x0101_0101_0101_0101);
        channel.start(Operation::Fill, how(*pasid), 0, IOVA, memory.len());
    }
    for (n, (_, _, memory)) in (0u64..).zip(&spaces) {
        Channel::new(&bar, n)
            .end()?
            .expect_done("a fill with a PASID")?;
        memory.check("an address space", |_| n as u8 + 1)?;
    }
    holds("the same address is different memory for each PASID, and for none");

    let channel = Channel::new(&bar, 0);
    let other = channel.checksum(how(Some(3)), IOVA, 64)?;
    other.expect_failure(Reason::Fault, IOVA, "a PASID that has nothing")?;
    holds("a PASID that has nothing reaches nothing");

    let (_, space, memory) = &spaces[1];
    channel.start(Operation::Fill, how(Some(1)), 0, IOVA, memory.len());
    cdev.unmap(*space, IOVA, memory.len())?;
    memory.fill_with(|_| 0xa5);
    channel.end()?;
    memory.check("memory after its unmap", |_| 0xa5)?;
    holds("nothing is written to a PASID's memory after its unmap");

    cdev.detach(Some(2))?;
    let gone = channel.checksum(how(Some(2)), IOVA, 64)?;
    gone.expect_failure(Reason::Fault, IOVA, "a detached PASID")?;
    let sum = channel
        .checksum(PLAIN, IOVA, 64)?
        .expect_done("requests without PASID")?;
    ensure!(
        sum.result == checksum([1; 64]),
        "requests without PASID changed: {sum:x?}"
    );
    let (_, space, _) = &spaces[3];
    cdev.attach(*space, Some(2))?;
    let sum = channel
        .checksum(how(Some(2)), IOVA, 64)?
        .expect_done("a PASID used again")?;
    ensure!(
        sum.result == checksum([4; 64]),
        "a PASID used again sees old memory: {sum:x?}"
    );
    holds("a detached PASID reaches nothing, and one used again only what it has now");
    Ok(())
}

/// Where every process has its buffers.
pub(crate) const SHARED_PLACE: usize = 0x6000_0000_0000;

/// `munmap`, `rounds` times, and the end of the process, while the device works in its memory.
///
/// # Errors
/// What does not hold.
pub fn unmap(address: &str, rounds: u32) -> Result<()> {
    let bound = Bound::new(address)?;
    let page = bound.channel(0)?;
    let channel = Channel::alone(&page);
    let how = How::sva(bound.pasid());
    for _ in 0..rounds {
        let memory = Memory::new(64 << 12, Some(SHARED_PLACE))?;
        channel.set_pattern(u64::MAX);
        channel.start(Operation::Fill, how, 0, memory.address(), memory.len());
        drop(memory);
        // New memory in the same place: what is in flight must not reach it through old tables.
        let memory = Memory::new(64 << 12, Some(SHARED_PLACE))?;
        let end = channel.end()?;
        let failed = matches!(end.status, Status::Failed(Reason::PageInvalid));
        ensure!(
            failed || end.status == Status::Done,
            "a fill after munmap: {end:x?}"
        );
        channel
            .fill(how, 0, memory.address(), memory.len())?
            .expect_done("a fill")?;
        memory.check("new memory", |_| 0)?;
    }
    holds("munmap while DMA runs ends it or moves it to new pages");
    let memory = Memory::new(1024 << 12, None)?;
    channel.start(Operation::Fill, how, 0, memory.address(), memory.len());
    holds("a process ends while DMA runs");
    Ok(())
}

/// How often [`reuse`] binds one process.
const BINDINGS: u64 = 64;

/// A PASID that is freed and used again never shows old memory.
///
/// # Errors
/// What does not hold.
pub fn reuse(address: &str) -> Result<()> {
    for round in 0..BINDINGS {
        let bound = Bound::new(address)?;
        let page = bound.channel(round % 64)?;
        let channel = Channel::alone(&page);
        let memory = Memory::new(PAGE as usize, Some(SHARED_PLACE))?;
        memory.fill_with(|_| round as u8);
        let sum = channel.checksum(How::sva(bound.pasid()), memory.address(), PAGE)?;
        let sum = sum.expect_done("a sum")?;
        let right = checksum(std::iter::repeat_n(round as u8, PAGE as usize));
        if sum.result != right {
            bail!("PASID {} sees old memory in round {round}", bound.pasid());
        }
    }
    holds(&format!(
        "a process that is bound {BINDINGS} times never sees its old memory"
    ));

    // One process after the other, each with its own memory at the same place. (The first has a
    // PASID that this process had no longer than its last binding, or another.)
    let mut seen = Vec::new();
    for round in 0..32u8 {
        let (mut told, mut tell) = std::io::pipe()?;
        let child = fork(|| {
            let bound = Bound::new(address)?;
            let page = bound.channel(0)?;
            let memory = Memory::new(PAGE as usize, Some(SHARED_PLACE))?;
            memory.fill_with(|_| !round);
            let how = How::sva(bound.pasid());
            let sum = Channel::alone(&page).checksum(how, memory.address(), PAGE)?;
            let right = checksum(std::iter::repeat_n(!round, PAGE as usize));
            ensure!(
                sum.expect_done("a sum")?.result == right,
                "PASID {} sees the memory of a process that ended",
                bound.pasid()
            );
            tell.write_all(&bound.pasid().to_le_bytes())?;
            Ok(())
        })?;
        child.wait()?;
        let mut pasid = [0; 4];
        told.read_exact(&mut pasid)?;
        seen.push(u32::from_le_bytes(pasid));
    }
    let processes = seen.len();
    seen.sort_unstable();
    seen.dedup();
    ensure!(seen.len() < processes, "no PASID was used again: {seen:?}");
    holds(&format!(
        "{processes} processes with {} PASIDs, one after the other, never see old memory",
        seen.len()
    ));
    Ok(())
}

/// Takes a PASID for this process and stays until it is killed.
///
/// # Errors
/// There is none.
pub fn hold(address: &str) -> Result<()> {
    let (_until_the_end, pasid) = sva::take_pasid(address)?;
    holds(&format!("this process has PASID {pasid}"));
    loop {
        std::thread::park();
    }
}
