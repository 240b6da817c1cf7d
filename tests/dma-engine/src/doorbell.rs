//! A driver that has the doorbell of messages in its own hands, through the module `dma_engine`:
//! where a vIOMMU wants it mapped (`msi=mapped`), nothing else maps it.

use std::fs::File;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::checks::{PLAIN, holds};
use crate::ioctl::ioctl;
use crate::memory::Memory;
use crate::registers::{CHANNEL_SIZE, CHANNELS_AT, Channel, How};
use crate::sva::node;
use crate::sysfs::Function;

/// `_IO('N', 4)`, `_IO('N', 5)`.
const JOIN: u64 = 0x4e04;
const LEAVE: u64 = 0x4e05;
/// `_IOW('N', 6, …)` and `_IOW('N', 7, …)` of three u64.
const MAP: u64 = 0x4018_4e06;
const UNMAP: u64 = 0x4018_4e07;
/// `_IOR('N', 8, __u32)`.
const INTERRUPTS: u64 = 0x8004_4e08;

/// The place of a page of the driver's.
const OWN: u64 = u64::MAX;
/// Where that page is mapped.
const IOVA: u64 = 0x5_0000_0000;
/// Where messages of x86 go: the whole of it is mapped.
const DOORBELL: u64 = 0xfee0_0000;
const WINDOW: u64 = 1 << 20;
const PAGE: u64 = 4096;
/// Where the driver puts the doorbell that must not be anywhere else.
const ELSEWHERE: u64 = 0x6_0000_0000;

/// How long an interrupt may take, and how long one that must not come is waited for.
const LIMIT: Duration = Duration::from_secs(10);
const PATIENCE: Duration = Duration::from_millis(300);

struct Driver {
    node: File,
    page: Memory,
    came: u32,
}

impl Driver {
    fn new(address: &str) -> Result<Self> {
        Function::at(address)?.give_to(Some("dma_engine"))?;
        let node = node(address)?;
        let page = Memory::of_file(&node, CHANNELS_AT, CHANNEL_SIZE as usize)?;
        let mut driver = Self {
            node,
            page,
            came: 0,
        };
        driver.came = driver.interrupts()?;
        Ok(driver)
    }

    fn command(&self, name: &'static str, command: u64) -> Result<()> {
        // SAFETY: these commands take no argument.
        unsafe { ioctl(name, &self.node, command, std::ptr::null_mut::<u8>()) }?;
        Ok(())
    }

    fn mapping(&self, command: u64, iova: u64, place: u64, size: u64) -> Result<()> {
        let mut mapping = [iova, place, size];
        // SAFETY: the commands read three u64.
        unsafe { ioctl("DMA_ENGINE_MAP", &self.node, command, &mut mapping) }?;
        Ok(())
    }

    /// In a domain of its own, with a page for its DMA and nothing else.
    fn join(&self) -> Result<()> {
        self.command("DMA_ENGINE_JOIN", JOIN)?;
        self.mapping(MAP, IOVA, OWN, PAGE)
    }

    fn interrupts(&self) -> Result<u32> {
        let mut count = 0u32;
        // SAFETY: the command writes one u32 there.
        unsafe { ioctl("DMA_ENGINE_INTERRUPTS", &self.node, INTERRUPTS, &mut count) }?;
        Ok(count)
    }

    /// Reads at `iova`, and interrupts when that is done. How often it interrupted by then is one
    /// more, or is not.
    fn interrupt(&mut self, iova: u64, arrives: bool, when: &str) -> Result<()> {
        let how = How {
            interrupt: true,
            ..PLAIN
        };
        Channel::alone(&self.page)
            .checksum(how, iova, 64)?
            .expect_done(when)?;
        let (began, wanted) = (Instant::now(), self.came + u32::from(arrives));
        let limit = if arrives { LIMIT } else { PATIENCE };
        while began.elapsed() < limit && !(arrives && self.interrupts()? == wanted) {
            std::thread::sleep(Duration::from_millis(5));
        }
        let came = self.interrupts()?;
        ensure!(
            came == wanted,
            "{when}: {} interrupts came, not {}",
            came - self.came,
            wanted - self.came
        );
        self.came = wanted;
        Ok(())
    }
}

/// Who maps the doorbell to itself has interrupts; who maps nothing there, something else, or it
/// elsewhere, has none. Between domains, and between them and the kernel's own identity domain,
/// they go on as that one has it.
///
/// # Errors
/// What does not hold.
pub fn check(address: &str) -> Result<()> {
    let mut driver = Driver::new(address).context("the driver")?;
    // Any address of RAM, to be read, in the kernel's own domain.
    const LOW: u64 = 0x1000;
    driver.interrupt(LOW, true, "the kernel's identity domain")?;
    for round in 0..3 {
        driver.join()?;
        driver.interrupt(IOVA, false, "no doorbell is mapped")?;
        driver.mapping(MAP, DOORBELL, DOORBELL, WINDOW)?;
        for _ in 0..8 {
            driver.interrupt(IOVA, true, "the doorbell is mapped to itself")?;
        }
        driver.mapping(UNMAP, DOORBELL, 0, WINDOW)?;
        driver.interrupt(IOVA, false, "the doorbell is unmapped")?;
        if round == 0 {
            holds("a doorbell that is mapped to itself takes interrupts, and no other");
        }
        // Linux does not say that the unit refused it: that is for the device to find.
        let _ = driver.mapping(MAP, DOORBELL, OWN, PAGE);
        driver.interrupt(IOVA, false, "the doorbell is a page of RAM")?;
        let _ = driver.mapping(UNMAP, DOORBELL, 0, PAGE);
        let _ = driver.mapping(MAP, ELSEWHERE, DOORBELL, WINDOW);
        driver.interrupt(IOVA, false, "the doorbell is elsewhere")?;
        let _ = driver.mapping(UNMAP, ELSEWHERE, 0, WINDOW);
        driver.mapping(MAP, DOORBELL, DOORBELL, WINDOW)?;
        driver.interrupt(IOVA, true, "the doorbell is back")?;
        if round == 0 {
            holds("a doorbell that is moved is no doorbell, until it is back");
        }
        driver.command("DMA_ENGINE_LEAVE", LEAVE)?;
        driver.interrupt(LOW, true, "back in the kernel's domain")?;
    }
    holds("interrupts go on from domain to domain");
    Ok(())
}
