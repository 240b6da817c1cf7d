//! A back end of the mock with two devices, and what a test may ask of them.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::FromRawFd;
use std::sync::atomic::AtomicU32;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};

use viommu::backend::conformance::Harness;
use viommu::backend::iommufd::kernel::{HwptKind, Kernel, Linux};
use viommu::backend::iommufd::{AttachDevice, Device, HostIommu};
use viommu::backend::{
    Access, Backend, EventSink, Fault, Mapping, PageRequest, PageResponse, ResponseCode, Stage1,
    Translation,
};
use viommu::{Gpa, GuestRam, Iova, Pasid, Rid, Target};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap};

use super::mock::{
    DEVICE_PASID, MockDevice, MockKernel, OP_MD_CHECK_IOTLB, OP_MOCK_DOMAIN_FLAGS,
    OP_PASID_CHECK_HWPT, OP_TRIGGER_IOPF, words,
};

/// Guest RAM of the tests; the mock maps 16 MiB to 2 GiB only.
pub(super) const RAM: u64 = 32 << 20;
pub(super) const RAM_LENGTH: u64 = 16 << 20;

pub(super) struct Sink(Mutex<Sender<PageRequest>>);

impl EventSink for Sink {
    fn fault(&self, fault: Fault) {
        panic!("{fault:?}");
    }
    fn translation_request(&self, _: Target, _: Iova) -> bool {
        true
    }

    fn page_request(&self, request: PageRequest) {
        self.0.lock().unwrap().send(request).unwrap();
    }
}

pub(super) struct Bench {
    pub(super) host: HostIommu,
    pub(super) kernel: Arc<MockKernel>,
    pub(super) devices: BTreeMap<Rid, (Arc<MockDevice>, u32)>,
    pub(super) requests: Receiver<PageRequest>,
    pub(super) sink: Arc<Sink>,
    pub(super) ram: GuestRam,
}

pub(super) const A: Rid = Rid::new(0, 3, 0);
pub(super) const B: Rid = Rid::new(0, 4, 0);

pub(super) fn memfd() -> File {
    // SAFETY: the name is a C string that lives through the call.
    let fd = unsafe { libc::memfd_create(c"guest".as_ptr(), libc::MFD_CLOEXEC) };
    assert!(fd >= 0, "{}", io::Error::last_os_error());
    // SAFETY: the call made this descriptor for us alone.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(RAM_LENGTH).unwrap();
    file
}

impl Bench {
    /// Two claimed devices with PASIDs and page requests; `None` where there is no mock.
    pub(super) fn open() -> Option<Self> {
        let bench = Self::unclaimed()?;
        for rid in [A, B] {
            bench.host.claim(rid, bench.sink.clone()).unwrap();
        }
        Some(bench)
    }

    pub(super) fn unclaimed() -> Option<Self> {
        let file = match OpenOptions::new().read(true).write(true).open("/dev/iommu") {
            Ok(file) => file,
            Err(error) => {
                eprintln!("skipped: /dev/iommu: {error}");
                return None;
            }
        };
        let kernel = Arc::new(MockKernel {
            linux: Linux::from(file),
        });
        // An operation that does not exist: EOPNOTSUPP with the mock, ENOTTY without.
        match kernel.test(0, 0, &[]) {
            Err(error) if error.raw_os_error() == Some(libc::ENOTTY) => {
                eprintln!("skipped: this kernel has no CONFIG_IOMMUFD_TEST");
                return None;
            }
            _ => {}
        }
        let region = (
            GuestAddress(RAM),
            RAM_LENGTH as usize,
            Some(FileOffset::new(memfd(), 0)),
        );
        let ram = Arc::new(GuestMemoryMmap::from_ranges_with_files([region]).unwrap());
        let host = HostIommu::new(kernel.clone(), ram.clone()).unwrap();
        let (send, requests) = channel();
        let sink = Arc::new(Sink(Mutex::new(send)));
        let mut devices = BTreeMap::new();
        for rid in [A, B] {
            // The mock wants an address space to begin in; it stays as "blocked".
            let empty = kernel.ioas_alloc().unwrap();
            let made = kernel
                .test(OP_MOCK_DOMAIN_FLAGS, empty, &[0, words(0, DEVICE_PASID)])
                .unwrap();
            let (stdev, id) = (made.words[0] as u32, made.words[1] as u32);
            let kind = HwptKind::Paging {
                nest_parent: false,
                dirty: false,
                pasid: true,
            };
            let blocked = kernel.hwpt_alloc(id, empty, kind).unwrap();
            let device = Arc::new(MockDevice {
                kernel: kernel.clone(),
                stdev,
                empty: blocked,
                pasids: Mutex::default(),
                refusals: AtomicU32::new(0),
            });
            device.detach(None).unwrap();
            let description = Device {
                id,
                attach: device.clone(),
                page_requests: true,
                group: None,
            };
            host.add_device(rid, description).unwrap();
            devices.insert(rid, (device, id));
        }
        Some(Self {
            host,
            kernel,
            devices,
            requests,
            sink,
            ram,
        })
    }

    /// The device asks for a page, as a group of one.
    pub(super) fn ask(&self, rid: Rid, number: u32, group: u32) {
        let id = self.devices[&rid].1;
        let words = [words(id, number), words(group, 3), 0xdead_b000];
        self.kernel.test(OP_TRIGGER_IOPF, 0, &words).unwrap();
    }

    pub(super) fn answer(&self, request: PageRequest) {
        self.host.respond(PageResponse {
            target: request.target,
            group: request.group,
            code: ResponseCode::Success,
        });
    }

    /// The table that PASID `number` of `rid` has in the kernel is `hwpt` (0: none at all).
    pub(super) fn has(&self, rid: Rid, number: u32, hwpt: u32) -> bool {
        let stdev = self.devices[&rid].0.stdev;
        self.kernel
            .test(OP_PASID_CHECK_HWPT, stdev, &[words(number, hwpt)])
            .is_ok()
    }

    pub(super) fn hwpt(&self, rid: Rid, number: u32) -> u32 {
        self.devices[&rid].0.pasids.lock().unwrap()[&Pasid(number)]
    }

    /// The value of an entry of a nested table's IOTLB.
    pub(super) fn iotlb(&self, hwpt: u32, entry: u32, value: u32) -> bool {
        self.kernel
            .test(OP_MD_CHECK_IOTLB, hwpt, &[words(entry, value)])
            .is_ok()
    }
}

pub(super) fn stage1(root: u64) -> Translation {
    Translation::Stage1(Stage1 {
        root: Gpa(root),
        width: 48,
        sre: false,
        wpe: false,
        eafe: false,
        ere: true,
        pwsnp: true,
        fs1gp: true,
    })
}

pub(super) fn pasid(endpoint: Rid, number: u32) -> Target {
    Target::pasid(endpoint, Pasid(number))
}

impl Harness for Bench {
    fn backend(&self) -> &(dyn Backend + 'static) {
        &self.host
    }
    fn endpoints(&self) -> [Rid; 2] {
        [A, B]
    }
    fn pasids(&self) -> Vec<Pasid> {
        vec![Pasid(1), Pasid(0xf_ffff)]
    }
    fn translations(&self) -> Vec<Translation> {
        vec![stage1(RAM), Translation::Identity, stage1(RAM + 0x1000)]
    }
    fn refused(&self) -> Vec<Translation> {
        vec![stage1(RAM + 1), stage1(1 << 60)]
    }
    fn mappings(&self) -> Vec<Mapping> {
        let at = |n: u64| Mapping {
            iova: Iova(0x400_0000 + n * 0x4000),
            gpa: Gpa(RAM + n * 0x3000),
            length: 0x2000,
            access: Access::READ_WRITE,
            mmio: false,
        };
        (0..5).map(at).collect()
    }
}
