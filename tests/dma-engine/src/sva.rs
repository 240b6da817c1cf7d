//! The process's own address space on the device, or a new one with a PASID of its own, through the
//! module `dma_engine`.

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
/// `_IOR('N', 9, __u32)`.
const SPACE: u64 = 0x8004_4e09;

/// Where the memory of a [`Space`] is for the device.
pub const SPACE_IOVA: u64 = 0x5_0000_0000;
/// Its bytes.
pub const SPACE_SIZE: usize = 0x1_0000;
/// Where it is in the file.
const SPACE_OFFSET: u64 = 0x10_0000;

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
        channel(&self.node, index)
    }

    /// Ends the binding; the node stays open.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn unbind(&self) -> Result<()> {
        unbind(&self.node)
    }
}

/// An address space that the kernel's IOMMU API gave a PASID of the device: [`SPACE_SIZE`] bytes of
/// new memory at [`SPACE_IOVA`]. It ends with the value.
#[derive(Debug)]
pub struct Space {
    node: File,
    pasid: u32,
    memory: Memory,
}

impl Space {
    /// A new one.
    ///
    /// # Errors
    /// What the kernel said: no module, a kernel that attaches no domain to a PASID.
    pub fn new(address: &str) -> Result<Self> {
        let node = node(address)?;
        let mut pasid = 0u32;
        // SAFETY: the command writes one u32 there.
        unsafe { ioctl("DMA_ENGINE_SPACE", &node, SPACE, &mut pasid) }?;
        let memory = Memory::of_file(&node, SPACE_OFFSET, SPACE_SIZE)?;
        Ok(Self {
            node,
            pasid,
            memory,
        })
    }

    /// The PASID that means it.
    pub fn pasid(&self) -> u32 {
        self.pasid
    }

    /// The memory in it.
    pub fn memory(&self) -> &Memory {
        &self.memory
    }

    /// A channel's page.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn channel(&self, index: u64) -> Result<Memory> {
        channel(&self.node, index)
    }

    /// Takes the address space from the PASID, which stays taken; the memory stays.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn detach(&self) -> Result<()> {
        unbind(&self.node)
    }
}

fn channel(node: &File, index: u64) -> Result<Memory> {
    let at = CHANNELS_AT + CHANNEL_SIZE * index;
    Memory::of_file(node, at, CHANNEL_SIZE as usize)
}

fn unbind(node: &File) -> Result<()> {
    // SAFETY: the command takes no argument.
    unsafe {
        ioctl(
            "DMA_ENGINE_UNBIND",
            node,
            UNBIND,
            std::ptr::null_mut::<u8>(),
        )
    }?;
    Ok(())
}
