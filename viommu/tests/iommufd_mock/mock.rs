//! The kernel's mock in the place of VT-d: its test command, its formats, its devices.

use std::collections::BTreeMap;
use std::io;
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use iommufd_bindings as sys;
use viommu::Pasid;
use viommu::backend::Access;
use viommu::backend::iommufd::AttachDevice;
use viommu::backend::iommufd::hwinfo::{HwInfo, HwModel, VtdHardware};
use viommu::backend::iommufd::kernel::{HwptKind, Kernel, Linux, Partial};

/// `_IO(';', 0xa0)`
pub(super) const IOMMU_TEST_CMD: libc::c_ulong = 0x3ba0;

pub(super) const OP_ADD_RESERVED: u32 = 1;
pub(super) const OP_MD_CHECK_MAP: u32 = 3;
pub(super) const OP_MOCK_DOMAIN_REPLACE: u32 = 10;
pub(super) const OP_MOCK_DOMAIN_FLAGS: u32 = 12;
pub(super) const OP_MD_CHECK_IOTLB: u32 = 14;
pub(super) const OP_TRIGGER_IOPF: u32 = 15;
pub(super) const OP_PASID_ATTACH: u32 = 18;
pub(super) const OP_PASID_REPLACE: u32 = 19;
pub(super) const OP_PASID_DETACH: u32 = 20;
pub(super) const OP_PASID_CHECK_HWPT: u32 = 21;

pub(super) const DEVICE_PASID: u32 = 4;
pub(super) const HW_INFO_SELFTEST: u32 = 0xfeed_beef;
pub(super) const HWPT_DATA_SELFTEST: u32 = 0xdead;
pub(super) const HWPT_INVALIDATE_SELFTEST: u32 = 0xdead_beef;
pub(super) const IOTLB_DEFAULT: u32 = 0x0bad_beef;
pub(super) const INVALIDATE_ALL: u32 = 1;

/// Attaching this PASID a second time fails, by the mock's design.
pub(super) const PASID_THAT_FAILS: u32 = 1024;

/// `struct iommu_test_cmd`: its union as 64-bit words.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) struct TestCommand {
    pub(super) size: u32,
    pub(super) op: u32,
    pub(super) id: u32,
    pub(super) reserved: u32,
    pub(super) words: [u64; 6],
    pub(super) last: u32,
    pub(super) padding: u32,
}

pub(super) const fn words(low: u32, high: u32) -> u64 {
    low as u64 | (high as u64) << 32
}

pub(super) fn call<T>(
    fd: BorrowedFd<'_>,
    number: libc::c_ulong,
    argument: &mut T,
) -> io::Result<()> {
    // SAFETY: each caller passes the structure that the kernel has for this command, whose first
    // field is its size, and pointers in it to memory that outlives the call.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), number, argument) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// The running kernel, with the mock's table and invalidation formats in place of VT-d's.
pub(super) struct MockKernel {
    pub(super) linux: Linux,
}

impl MockKernel {
    pub(super) fn test(&self, op: u32, id: u32, words: &[u64]) -> io::Result<TestCommand> {
        let mut command = TestCommand {
            size: 72,
            op,
            id,
            reserved: 0,
            words: [0; 6],
            last: 0,
            padding: 0,
        };
        command.words[..words.len()].copy_from_slice(words);
        call(self.linux.as_fd(), IOMMU_TEST_CMD, &mut command)?;
        Ok(command)
    }
}

impl Kernel for MockKernel {
    fn destroy(&self, id: u32) -> io::Result<()> {
        self.linux.destroy(id)
    }
    fn ioas_alloc(&self) -> io::Result<u32> {
        self.linux.ioas_alloc()
    }
    fn allow_iovas(&self, ioas: u32, ranges: &[(u64, u64)]) -> io::Result<()> {
        self.linux.allow_iovas(ioas, ranges)
    }
    fn iova_ranges(&self, ioas: u32) -> io::Result<Vec<(u64, u64)>> {
        self.linux.iova_ranges(ioas)
    }
    fn map_file(
        &self,
        ioas: u32,
        file: BorrowedFd<'_>,
        offset: u64,
        length: u64,
        iova: u64,
        access: Access,
    ) -> io::Result<()> {
        self.linux
            .map_file(ioas, file, offset, length, iova, access)
    }
    fn map(&self, ioas: u32, at: u64, length: u64, iova: u64, access: Access) -> io::Result<()> {
        self.linux.map(ioas, at, length, iova, access)
    }
    fn copy(
        &self,
        to: u32,
        to_iova: u64,
        from: u32,
        from_iova: u64,
        length: u64,
        access: Access,
    ) -> io::Result<()> {
        self.linux
            .copy(to, to_iova, from, from_iova, length, access)
    }
    fn unmap(&self, ioas: u32, iova: u64, length: u64) -> io::Result<u64> {
        self.linux.unmap(ioas, iova, length)
    }

    fn hwpt_alloc(&self, device: u32, under: u32, kind: HwptKind<'_>) -> io::Result<u32> {
        let HwptKind::Nested {
            pasid, fault_queue, ..
        } = kind
        else {
            return self.linux.hwpt_alloc(device, under, kind);
        };
        let data = [IOTLB_DEFAULT, 0];
        let mut flags = 0;
        if pasid {
            flags |= sys::iommufd_hwpt_alloc_flags_IOMMU_HWPT_ALLOC_PASID;
        }
        if fault_queue.is_some() {
            flags |= sys::iommufd_hwpt_alloc_flags_IOMMU_HWPT_FAULT_ID_VALID;
        }
        let mut argument = sys::iommu_hwpt_alloc {
            size: size_of::<sys::iommu_hwpt_alloc>() as u32,
            flags,
            dev_id: device,
            pt_id: under,
            data_type: HWPT_DATA_SELFTEST,
            data_len: 4,
            data_uptr: data.as_ptr() as u64,
            fault_id: fault_queue.unwrap_or(0),
            ..Default::default()
        };
        call(self.linux.as_fd(), 0x3b89, &mut argument)?;
        Ok(argument.out_hwpt_id)
    }

    fn hw_info(&self, device: u32) -> io::Result<HwInfo> {
        let info = self.linux.hw_info(device)?;
        assert_eq!(info.model, HwModel::Other(HW_INFO_SELFTEST));
        // What a VT-d unit with the mock's abilities would say: everything, 48 bits.
        let unit = VtdHardware {
            errata: 0,
            cap: 47 << 16 | 1 << 56 | 6,
            ecap: 0x0001_fd9c_2400_0084,
        };
        Ok(HwInfo {
            model: HwModel::Vtd(unit),
            ..info
        })
    }

    fn invalidate(
        &self,
        hwpt: u32,
        entries: &[sys::iommu_hwpt_vtd_s1_invalidate],
    ) -> Result<(), Partial> {
        // "Everything" clears all four of the mock's entries, a range the one of its number.
        let entries = entries
            .iter()
            .map(|entry| match entry.npages {
                u64::MAX => [INVALIDATE_ALL, 0],
                _ => [0, (entry.addr >> 12) as u32],
            })
            .collect::<Vec<_>>();
        let mut argument = sys::iommu_hwpt_invalidate {
            size: size_of::<sys::iommu_hwpt_invalidate>() as u32,
            hwpt_id: hwpt,
            data_uptr: entries.as_ptr() as u64,
            data_type: HWPT_INVALIDATE_SELFTEST,
            entry_len: 8,
            entry_num: entries.len() as u32,
            ..Default::default()
        };
        call(self.linux.as_fd(), 0x3b8d, &mut argument).map_err(|source| Partial {
            handled: argument.entry_num as usize,
            source,
        })
    }

    fn fault_queue_alloc(&self) -> io::Result<(u32, OwnedFd)> {
        self.linux.fault_queue_alloc()
    }
    fn pause(&self) {
        self.linux.pause();
    }
}

/// A mock device. The mock cannot leave it without a table, so "detached" is a table of an empty
/// address space.
pub(super) struct MockDevice {
    pub(super) kernel: Arc<MockKernel>,
    pub(super) stdev: u32,
    pub(super) empty: u32,
    pub(super) pasids: Mutex<BTreeMap<Pasid, u32>>,
    /// Attaches of PASIDs that the kernel refused.
    pub(super) refusals: AtomicU32,
}

impl AttachDevice for MockDevice {
    fn attach(&self, pasid: Option<Pasid>, hwpt: u32) -> io::Result<()> {
        let Some(pasid) = pasid else {
            let words = [hwpt.into()];
            return self
                .kernel
                .test(OP_MOCK_DOMAIN_REPLACE, self.stdev, &words)
                .map(drop);
        };
        let mut pasids = self.pasids.lock().unwrap();
        let op = if pasids.contains_key(&pasid) {
            OP_PASID_REPLACE
        } else {
            OP_PASID_ATTACH
        };
        let result = self.kernel.test(op, self.stdev, &[words(pasid.0, hwpt)]);
        if result.is_err() {
            self.refusals.fetch_add(1, Ordering::Relaxed);
        }
        result?;
        pasids.insert(pasid, hwpt);
        Ok(())
    }

    fn detach(&self, pasid: Option<Pasid>) -> io::Result<()> {
        let Some(pasid) = pasid else {
            return self.attach(None, self.empty);
        };
        if self.pasids.lock().unwrap().remove(&pasid).is_some() {
            self.kernel
                .test(OP_PASID_DETACH, self.stdev, &[pasid.0.into()])?;
        }
        Ok(())
    }

    fn stop(&self) {
        panic!("a detach failed");
    }

    fn resume(&self) {}
}
