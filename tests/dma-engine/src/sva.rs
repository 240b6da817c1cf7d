//! The process's own address space on the device, through the module `dma_engine`.

use std::fs::{File, OpenOptions};

use anyhow::{Context, Result};

use crate::ioctl::ioctl;
use crate::memory::Memory;
use crate::registers::{CHANNEL_SIZE, CHANNELS_AT};

/// `_IOR('N', 1, __u32)` and `_IO('N', 2)`.
const BIND: u64 = 0x8004_4e01;
const UNBIND: u64 = 0x4e02;

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
        let path = format!("/dev/dma-engine-{address}");
        let node = OpenOptions::new().read(true).write(true).open(&path);
        let node = node.with_context(|| format!("cannot open {path}; load dma_engine.ko"))?;
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
