//! The engine's registers, as `devices/src/testdev/README.md` documents them. Written from that
//! text alone, so that it also tests the text.

#![forbid(unsafe_code)]

use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};

/// Where the channels begin in BAR 0, in bytes, and how far apart they are.
pub const CHANNELS_AT: u64 = 0x4_0000;
/// Bytes of one channel.
pub const CHANNEL_SIZE: u64 = 0x1000;
/// Bytes of BAR 0.
pub const BAR_SIZE: u64 = 0x8_0000;

/// How long one operation may take.
const LIMIT: Duration = Duration::from_secs(200);
/// How long to wait between two looks at an operation: twice as long each time, within these.
const SHORTEST_PAUSE: Duration = Duration::from_micros(50);
const LONGEST_PAUSE: Duration = Duration::from_millis(10);

/// A way to reach registers: 4 bytes at `at`, a multiple of 4.
pub trait Registers {
    /// Reads them.
    fn read(&self, at: u64) -> u32;
    /// Writes them.
    fn write(&self, at: u64, value: u32);

    /// Reads 8 bytes.
    fn read64(&self, at: u64) -> u64 {
        u64::from(self.read(at)) | u64::from(self.read(at + 4)) << 32
    }

    /// Writes 8 bytes.
    fn write64(&self, at: u64, value: u64) {
        self.write(at, value as u32);
        self.write(at + 4, (value >> 32) as u32);
    }
}

/// What to do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub enum Operation {
    /// From the source to the destination.
    Copy = 1,
    /// The pattern to the destination.
    Fill = 2,
    /// Reads the source.
    Checksum = 3,
    /// An ATS translation request for the source.
    Translate = 4,
    /// An interrupt message to the destination.
    Message = 5,
    /// Page requests for the source.
    PageRequest = 6,
}

/// How to do it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct How {
    /// With this PASID.
    pub pasid: Option<u32>,
    /// In privileged mode.
    pub privileged: bool,
    /// Reading to execute.
    pub execute: bool,
    /// Translating first.
    pub ats: bool,
    /// Asking for pages that are not there.
    pub pri: bool,
    /// With an interrupt at the end.
    pub interrupt: bool,
}

impl How {
    /// As SVA does it: with the PASID, asking for pages.
    pub fn sva(pasid: u32) -> Self {
        Self {
            pasid: Some(pasid),
            ats: true,
            pri: true,
            ..Self::default()
        }
    }

    /// With a PASID and nothing else.
    pub fn pasid(pasid: u32) -> Self {
        Self {
            pasid: Some(pasid),
            ..Self::default()
        }
    }

    fn flags(self) -> u32 {
        u32::from(self.pasid.is_some())
            | u32::from(self.privileged) << 1
            | u32::from(self.execute) << 2
            | u32::from(self.ats) << 3
            | u32::from(self.pri) << 4
            | u32::from(self.interrupt) << 7
    }
}

/// Where an operation is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Status {
    /// Nothing was started since reset.
    Idle,
    /// It goes on.
    Running,
    /// It waits for a page response.
    Waiting,
    /// It is done.
    Done,
    /// It failed, for this reason.
    Failed(Reason),
    /// It was aborted.
    Aborted,
}

/// Why an operation failed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Reason {
    /// Unknown operation or flags.
    BadOperation,
    /// Configuration space does not allow it.
    Disabled,
    /// The IOMMU stopped it.
    Fault,
    /// An address has no translation.
    NoTranslation,
    /// A page will never be there.
    PageInvalid,
    /// Paging is broken.
    PageFailure,
    /// The page request group is in use.
    GroupBusy,
    /// The page request was not sent.
    PageRefused,
    /// The range is too long.
    AddressWraps,
    /// One that the document does not have.
    Unknown(u8),
}

impl Status {
    fn decode(raw: u32) -> Result<Self> {
        Ok(match raw & 0xff {
            0 => Self::Idle,
            1 => Self::Running,
            2 => Self::Waiting,
            3 => Self::Done,
            4 => Self::Failed(match (raw >> 8) as u8 {
                1 => Reason::BadOperation,
                2 => Reason::Disabled,
                3 => Reason::Fault,
                4 => Reason::NoTranslation,
                5 => Reason::PageInvalid,
                6 => Reason::PageFailure,
                7 => Reason::GroupBusy,
                8 => Reason::PageRefused,
                9 => Reason::AddressWraps,
                other => Reason::Unknown(other),
            }),
            5 => Self::Aborted,
            _ => bail!("STATUS is {raw:#x}, which is none: the device is gone or was never there"),
        })
    }
}

/// What came of an operation.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Outcome {
    /// How it ended.
    pub status: Status,
    /// Bytes done.
    pub done: u64,
    /// The operation's own result.
    pub result: u64,
    /// Where it failed.
    pub fault_address: u64,
    /// How many pages it asked for.
    pub page_requests: u32,
    /// How many answers came.
    pub page_responses: u32,
}

impl Outcome {
    /// The outcome, if the operation is done.
    ///
    /// # Errors
    /// How it ended instead.
    pub fn expect_done(self, what: &str) -> Result<Self> {
        ensure!(self.status == Status::Done, "{what}: {self:x?}");
        Ok(self)
    }

    /// The outcome, if the operation failed for this reason at this address.
    ///
    /// # Errors
    /// How it ended instead.
    pub fn expect_failure(self, reason: Reason, at: u64, what: &str) -> Result<Self> {
        let right = self.status == Status::Failed(reason) && self.fault_address == at;
        ensure!(right, "{what}: {self:x?} instead of {reason:?} at {at:#x}");
        Ok(self)
    }
}

/// Checks that the device registers at `registers` are the engine's.
///
/// # Errors
/// They are not.
pub fn identify(registers: &dyn Registers) -> Result<()> {
    let found = [0x00, 0x04, 0x08].map(|at| registers.read(at));
    ensure!(
        found == [0x414d_444e, 1, 64],
        "no DMA test engine of version 1 with 64 channels: {found:x?}"
    );
    Ok(())
}

/// One channel.
#[derive(Clone, Copy)]
pub struct Channel<'r> {
    registers: &'r dyn Registers,
    base: u64,
}

impl<'r> Channel<'r> {
    /// Channel `index` of a whole BAR.
    pub fn new(registers: &'r dyn Registers, index: u64) -> Self {
        Self {
            registers,
            base: CHANNELS_AT + CHANNEL_SIZE * index,
        }
    }

    /// The channel whose page is all there is.
    pub fn alone(registers: &'r dyn Registers) -> Self {
        Self { registers, base: 0 }
    }

    /// Starts an operation.
    pub fn start(self, operation: Operation, how: How, source: u64, destination: u64, length: u64) {
        let Self { registers, base } = self;
        registers.write(base + 0x08, operation as u32);
        registers.write(base + 0x0c, how.flags());
        registers.write64(base + 0x10, source);
        registers.write64(base + 0x18, destination);
        registers.write64(base + 0x20, length);
        registers.write(base + 0x30, how.pasid.unwrap_or(0));
        registers.write(base, 1);
    }

    /// What FILL and MESSAGE write from now on.
    pub fn set_pattern(self, pattern: u64) {
        self.registers.write64(self.base + 0x28, pattern);
    }

    /// Where the operation is.
    ///
    /// # Errors
    /// The device does not answer.
    pub fn status(self) -> Result<Status> {
        Status::decode(self.registers.read(self.base + 0x04))
    }

    /// Asks the operation to end.
    pub fn abort(self) {
        self.registers.write(self.base, 2);
    }

    /// What came of the operation, once it has ended.
    ///
    /// # Errors
    /// It does not end.
    pub fn end(self) -> Result<Outcome> {
        let Self { registers, base } = self;
        let began = Instant::now();
        // Many processes that ask often leave the CPU no time to serve what they wait for.
        let mut pause = SHORTEST_PAUSE;
        loop {
            let status = self.status()?;
            if !matches!(status, Status::Running | Status::Waiting) {
                return Ok(Outcome {
                    status,
                    done: registers.read64(base + 0x40),
                    result: registers.read64(base + 0x48),
                    fault_address: registers.read64(base + 0x50),
                    page_requests: registers.read(base + 0x58),
                    page_responses: registers.read(base + 0x5c),
                });
            }
            if began.elapsed() > LIMIT {
                self.abort();
                bail!("an operation is {status:?} after {LIMIT:?}");
            }
            std::thread::sleep(pause);
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    /// Copies and waits.
    ///
    /// # Errors
    /// The operation does not end.
    pub fn copy(self, how: How, from: u64, to: u64, length: u64) -> Result<Outcome> {
        self.start(Operation::Copy, how, from, to, length);
        self.end()
    }

    /// Fills and waits.
    ///
    /// # Errors
    /// The operation does not end.
    pub fn fill(self, how: How, pattern: u64, to: u64, length: u64) -> Result<Outcome> {
        self.set_pattern(pattern);
        self.start(Operation::Fill, how, 0, to, length);
        self.end()
    }

    /// Sums and waits.
    ///
    /// # Errors
    /// The operation does not end.
    pub fn checksum(self, how: How, from: u64, length: u64) -> Result<Outcome> {
        self.start(Operation::Checksum, how, from, 0, length);
        self.end()
    }
}

/// What CHECKSUM makes of these bytes.
pub fn checksum(bytes: impl IntoIterator<Item = u8>) -> u64 {
    bytes.into_iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3)
    })
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::sync::Arc;

    use devices::interrupt::fake::FakeMsi;
    use devices::pci::PciFunction;
    use devices::testdev::{Features, TestDevice};
    use viommu::dma::DmaPort;
    use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

    use super::*;

    impl Registers for TestDevice {
        fn read(&self, at: u64) -> u32 {
            let mut bytes = [0; 4];
            self.bar_read(0, at, &mut bytes);
            u32::from_le_bytes(bytes)
        }
        fn write(&self, at: u64, value: u32) {
            let _ = self.bar_write(0, at, &value.to_le_bytes());
        }
    }

    #[test]
    fn the_driver_and_the_device_understand_the_document_alike() -> Result<()> {
        let ram = Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)])?);
        let port = DmaPort::direct(Arc::clone(&ram));
        let device = TestDevice::new(Features::default(), &FakeMsi::default(), |_| {
            Ok::<_, io::Error>(port)
        })?;
        identify(&device)?;
        let channel = Channel::new(&device, 63);
        let none = How::default();
        let outcome = channel.fill(none, 1, 0, 8)?;
        assert_eq!(outcome.status, Status::Failed(Reason::Disabled));
        let _ = device.config_write(4, &[6, 0]);
        channel
            .fill(none, 0x0807_0605_0403_0201, 0x1000, 64)?
            .expect_done("fill")?;
        let copied = channel
            .copy(none, 0x1000, 0x8003, 64)?
            .expect_done("copy")?;
        assert_eq!(copied.done, 64);
        let mut bytes = [0; 64];
        ram.read_slice(&mut bytes, GuestAddress(0x8003))?;
        assert!(
            bytes
                .iter()
                .enumerate()
                .all(|(n, byte)| usize::from(*byte) == n % 8 + 1)
        );
        let sum = channel
            .checksum(none, 0x8003, 64)?
            .expect_done("checksum")?;
        assert_eq!(sum.result, checksum(bytes));
        let end = 1 << 20;
        channel
            .fill(none, 0, end, 8)?
            .expect_failure(Reason::Fault, end, "beyond memory")?;
        assert_eq!(
            channel.fill(How::sva(1), 0, 0, 8)?.status,
            Status::Failed(Reason::Disabled)
        );
        Ok(())
    }
}
