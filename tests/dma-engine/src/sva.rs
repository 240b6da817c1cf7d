//! The process's own address space on the device, through the module `dma_engine`.

use std::fs::{File, OpenOptions};

use anyhow::{Context, Result};

use crate::ioctl::ioctl;
use crate::memory::Memory;
use crate::registers::{CHANNEL_SIZE, CHANNELS_AT};

/// `_IOR('N', 1, __u32)` and `_IO('N', 2)`.
const BIND: u64 = 0x8004_4e01;
const UNBIND: u64 = 0x4e02;
/// `_IOR('N', 3, __u32)`.
const PASID: u64 = 0x8004_4e03;

pub(crate) fn node(address: &str) -> Result<File> {
    let path = format!("/dev/dma-engine-{address}");
    let node = OpenOptions::new().read(true).write(true).open(&path);
    node.with_context(|| format!("cannot open {path}; load dma_engine.ko"))
}

/// Takes a PASID that no device uses, until the file is closed.
///
/// # Errors
/// What the kernel said: no module, a kernel that has no allocator for it, no PASID.
pub fn take_pasid(address: &str) -> Result<(File, u32)> {
    let node = node(address)?;
    let mut pasid = 0u32;
    // SAFETY: the command writes one u32 there.
    unsafe { ioctl("DMA_ENGINE_PASID", &node, PASID, &mut pasid) }?;
    Ok((node, pasid))
}

/// The device's own registers, without binding anything.
///
/// # Errors
/// What the kernel said: no module.
pub fn registers(address: &str) -> Result<Memory> {
    Memory::of_file(&node(address)?, 0, CHANNEL_SIZE as usize)
}

/// The device, with this process's address space bound to it.
#[derive(Debug)]
pub struct Bound {
    node: File,
    pasid: u32,
}

impl Bound {
    /// Opens the device and binds this process.
    ///
    /// # Errors
    /// What the kernel said: no module, no SVA.
    pub fn new(address: &str) -> Result<Self> {
        let node = node(address)?;
        let mut pasid = 0u32;
        // SAFETY: the command writes one u32 there.
        unsafe { ioctl("DMA_ENGINE_BIND", &node, BIND, &mut pasid) }?;
        Ok(Self { node, pasid })
    }

    /// The PASID that means this process.
    pub fn pasid(&self) -> u32 {
        self.pasid
    }

    /// A channel's page.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn channel(&self, index: u64) -> Result<Memory> {
        let at = CHANNELS_AT + CHANNEL_SIZE * index;
        Memory::of_file(&self.node, at, CHANNEL_SIZE as usize)
    }

    /// Ends the binding; the node stays open.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn unbind(&self) -> Result<()> {
        // SAFETY: the command takes no argument.
        unsafe {
            ioctl(
                "DMA_ENGINE_UNBIND",
                &self.node,
                UNBIND,
                std::ptr::null_mut::<u8>(),
            )
        }?;
        Ok(())
    }
}
