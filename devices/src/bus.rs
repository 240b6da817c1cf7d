//! The address buses (MMIO and port I/O) that vCPU threads look devices up on.

/// A device on a bus. Called on vCPU threads, several at a time: a device does its own locking.
pub trait BusDevice: Send + Sync {
    /// Reads `data.len()` bytes (1, 2, 4 or 8) at `offset` bytes into the device's range. All of
    /// `data` is written; what does not exist reads as all ones.
    fn read(&self, offset: u64, data: &mut [u8]);

    /// Writes `data` (1, 2, 4 or 8 bytes) at `offset` bytes into the device's range.
    fn write(&self, offset: u64, data: &[u8]);
}
