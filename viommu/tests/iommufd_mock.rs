//! The host back end on the kernel's own iommufd, with its mock devices (`CONFIG_IOMMUFD_TEST`):
//! the real ioctls, objects, fault queues and PASID attaches, without hardware.
//!
//! Runs where `/dev/iommu` takes the mock's command (the lab's host, as root); elsewhere each test
//! says why it does nothing.
//!
//! The mock is not VT-d: its nested tables have a format of their own, its devices are never
//! detached, and a failed replace leaves the old table in force. What differs is translated here,
//! in [`MockKernel`] and [`MockDevice`], and VT-d's own behaviour is tested on the back end's fake.
//!
//! `cargo lab test kernel::` runs it on the lab's host.

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test's helpers fail as the test does"
)]

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io;
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use iommufd_bindings as sys;
use viommu::backend::conformance::{self, Harness};
use viommu::backend::iommufd::hwinfo::{HwInfo, HwModel, VtdHardware};
use viommu::backend::iommufd::kernel::{HwptKind, Kernel, Linux, Partial};
use viommu::backend::iommufd::object::{Hwpt, Ioas, Paging};
use viommu::backend::iommufd::{AttachDevice, Device, HostIommu};
use viommu::backend::{
    Access, Backend, EventSink, Fault, Invalidation, InvalidationRange, Mapping, Objects,
    PageRequest, PageResponse, Refused, ResponseCode, Scope, Stage1, Translation,
};
use viommu::{Gpa, GuestRam, Iova, Pasid, Rid, Target};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};

/// `_IO(';', 0xa0)`
const IOMMU_TEST_CMD: libc::c_ulong = 0x3ba0;

const OP_ADD_RESERVED: u32 = 1;
const OP_MD_CHECK_MAP: u32 = 3;
const OP_MOCK_DOMAIN_REPLACE: u32 = 10;
const OP_MOCK_DOMAIN_FLAGS: u32 = 12;
const OP_MD_CHECK_IOTLB: u32 = 14;
const OP_TRIGGER_IOPF: u32 = 15;
const OP_PASID_ATTACH: u32 = 18;
const OP_PASID_REPLACE: u32 = 19;
const OP_PASID_DETACH: u32 = 20;
const OP_PASID_CHECK_HWPT: u32 = 21;

const DEVICE_PASID: u32 = 4;
const HW_INFO_SELFTEST: u32 = 0xfeed_beef;
const HWPT_DATA_SELFTEST: u32 = 0xdead;
const HWPT_INVALIDATE_SELFTEST: u32 = 0xdead_beef;
const IOTLB_DEFAULT: u32 = 0x0bad_beef;
const INVALIDATE_ALL: u32 = 1;

/// Attaching this PASID a second time fails, by the mock's design.
const PASID_THAT_FAILS: u32 = 1024;

/// How long a page request may take.
const LONG: Duration = Duration::from_secs(10);

/// Guest RAM of the tests; the mock maps 16 MiB to 2 GiB only.
const RAM: u64 = 32 << 20;
const RAM_LENGTH: u64 = 16 << 20;

/// `struct iommu_test_cmd`: its union as 64-bit words.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct TestCommand {
    size: u32,
    op: u32,
    id: u32,
    reserved: u32,
    words: [u64; 6],
    last: u32,
    padding: u32,
}

const fn words(low: u32, high: u32) -> u64 {
    low as u64 | (high as u64) << 32
}

fn call<T>(fd: BorrowedFd<'_>, number: libc::c_ulong, argument: &mut T) -> io::Result<()> {
    // SAFETY: each caller passes the structure that the kernel has for this command, whose first
    // field is its size, and pointers in it to memory that outlives the call.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), number, argument) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// The running kernel, with the mock's table and invalidation formats in place of VT-d's.
struct MockKernel {
    linux: Linux,
}

impl MockKernel {
    fn test(&self, op: u32, id: u32, words: &[u64]) -> io::Result<TestCommand> {
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
struct MockDevice {
    kernel: Arc<MockKernel>,
    stdev: u32,
    empty: u32,
    pasids: Mutex<BTreeMap<Pasid, u32>>,
    /// Attaches of PASIDs that the kernel refused.
    refusals: AtomicU32,
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

struct Sink(Mutex<Sender<PageRequest>>);

impl EventSink for Sink {
    fn fault(&self, fault: Fault) {
        panic!("{fault:?}");
    }
    fn page_request(&self, request: PageRequest) {
        self.0.lock().unwrap().send(request).unwrap();
    }
}

struct Bench {
    host: HostIommu,
    kernel: Arc<MockKernel>,
    devices: BTreeMap<Rid, (Arc<MockDevice>, u32)>,
    requests: Receiver<PageRequest>,
    sink: Arc<Sink>,
    ram: GuestRam,
}

const A: Rid = Rid::new(0, 3, 0);
const B: Rid = Rid::new(0, 4, 0);

fn memfd() -> File {
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
    fn open() -> Option<Self> {
        let bench = Self::unclaimed()?;
        for rid in [A, B] {
            bench.host.claim(rid, bench.sink.clone()).unwrap();
        }
        Some(bench)
    }

    fn unclaimed() -> Option<Self> {
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
    fn ask(&self, rid: Rid, number: u32, group: u32) {
        let id = self.devices[&rid].1;
        let words = [words(id, number), words(group, 3), 0xdead_b000];
        self.kernel.test(OP_TRIGGER_IOPF, 0, &words).unwrap();
    }

    fn answer(&self, request: PageRequest) {
        self.host.respond(PageResponse {
            target: request.target,
            group: request.group,
            code: ResponseCode::Success,
        });
    }

    /// The table that PASID `number` of `rid` has in the kernel is `hwpt` (0: none at all).
    fn has(&self, rid: Rid, number: u32, hwpt: u32) -> bool {
        let stdev = self.devices[&rid].0.stdev;
        self.kernel
            .test(OP_PASID_CHECK_HWPT, stdev, &[words(number, hwpt)])
            .is_ok()
    }

    fn hwpt(&self, rid: Rid, number: u32) -> u32 {
        self.devices[&rid].0.pasids.lock().unwrap()[&Pasid(number)]
    }

    /// The value of an entry of a nested table's IOTLB.
    fn iotlb(&self, hwpt: u32, entry: u32, value: u32) -> bool {
        self.kernel
            .test(OP_MD_CHECK_IOTLB, hwpt, &[words(entry, value)])
            .is_ok()
    }
}

fn stage1(root: u64) -> Translation {
    Translation::Stage1(Stage1 {
        root: Gpa(root),
        width: 48,
        sre: false,
        wpe: false,
        eafe: false,
    })
}

fn pasid(endpoint: Rid, number: u32) -> Target {
    Target::pasid(endpoint, Pasid(number))
}

#[test]
fn guest_ram_is_what_the_device_sees() {
    let Some(bench) = Bench::open() else { return };
    bench
        .ram
        .write_slice(b"through the mock", GuestAddress(RAM + 0x5000))
        .unwrap();
    let domain = bench.host.create_domain().unwrap();
    let mapping = Mapping {
        iova: Iova(0x4000_0000),
        gpa: Gpa(RAM + 0x5000),
        length: 0x3000,
        access: Access::READ,
        mmio: false,
    };
    bench
        .host
        .apply(pasid(A, 1), Translation::Domain(domain))
        .unwrap();
    bench.host.map(domain, &[mapping]).unwrap();
    // The mock compares its page table with the pages of an address of ours.
    let address = {
        use vm_memory::GuestMemoryBackend;
        bench
            .ram
            .get_host_address(GuestAddress(RAM + 0x5000))
            .unwrap() as u64
    };
    let check = || {
        let words = [0x4000_0000, 0x3000, address];
        bench.kernel.test(OP_MD_CHECK_MAP, bench.hwpt(A, 1), &words)
    };
    check().unwrap();
    assert_eq!(
        bench.host.unmap(domain, Iova(0), Iova(u64::MAX)).unwrap(),
        0x3000
    );
    bench.host.destroy_domain(domain);
}

#[test]
fn targets_switch_between_all_translations_and_the_kernel_agrees() {
    let Some(bench) = Bench::open() else { return };
    let domain = bench.host.create_domain().unwrap();
    let all = [
        stage1(RAM),
        Translation::Identity,
        Translation::Domain(domain),
        stage1(RAM + 0x1000),
    ];
    for first in all {
        for second in all {
            for target in [Target::rid(A), pasid(A, 7), pasid(B, 7)] {
                bench.host.apply(target, first).unwrap();
                bench.host.apply(target, second).unwrap();
                assert_eq!(bench.host.translation(target), second);
                if let Some(Pasid(number)) = target.pasid {
                    let hwpt = bench.hwpt(target.endpoint, number);
                    assert!(bench.has(target.endpoint, number, hwpt));
                }
            }
        }
    }
    for rid in [A, B] {
        bench
            .host
            .apply(pasid(rid, 7), Translation::Blocked)
            .unwrap();
        assert!(bench.has(rid, 7, 0));
    }
    bench.host.destroy_domain(domain);
}

#[test]
fn invalidations_reach_the_shared_table_and_an_error_says_how_far() {
    let Some(bench) = Bench::open() else { return };
    bench.host.apply(Target::rid(A), stage1(RAM)).unwrap();
    bench.host.apply(pasid(B, 3), stage1(RAM)).unwrap();
    assert_eq!(bench.host.objects().translations, 1);
    let hwpt = bench.hwpt(B, 3);
    assert!((0..4).all(|entry| bench.iotlb(hwpt, entry, IOTLB_DEFAULT)));
    let page = |entry: u64| Invalidation {
        scope: Scope::Target(Target::rid(A)),
        range: InvalidationRange::Pages {
            first: Iova(entry << 12),
            count: 1,
            leaf: true,
        },
    };
    assert_eq!(bench.host.invalidate(&[page(2)]), 1);
    assert!(bench.iotlb(hwpt, 2, 0) && bench.iotlb(hwpt, 1, IOTLB_DEFAULT));
    // The mock has entries 0 to 3: 9 is refused, after 1 took effect.
    assert_eq!(bench.host.invalidate(&[page(1), page(9), page(0)]), 1);
    assert!(bench.iotlb(hwpt, 1, 0) && bench.iotlb(hwpt, 0, IOTLB_DEFAULT));
    let all = Invalidation {
        scope: Scope::All,
        range: InvalidationRange::All,
    };
    assert_eq!(bench.host.invalidate(&[all]), 1);
    assert!((0..4).all(|entry| bench.iotlb(hwpt, entry, 0)));
}

#[test]
fn a_page_request_goes_to_the_front_end_and_its_answer_back() {
    let Some(bench) = Bench::open() else { return };
    bench.host.apply(pasid(A, 5), stage1(RAM)).unwrap();
    for group in [1u32, 2, 3] {
        bench.ask(A, 5, group);
        let request = bench.requests.recv_timeout(LONG).unwrap();
        assert_eq!(request.target, pasid(A, 5));
        assert_eq!((request.group, request.last), (group as u16, true));
        assert_eq!(request.iova, Iova(0xdead_b000));
        assert_eq!(request.access, Access::READ_WRITE);
        assert_eq!(bench.host.objects().page_requests, 1);
        if group < 3 {
            bench.answer(request);
            assert_eq!(bench.host.objects().page_requests, 0);
        }
    }
    // The last is not answered: the kernel does it when the table goes.
    bench.host.apply(pasid(A, 5), Translation::Blocked).unwrap();
    assert_eq!(bench.host.objects().page_requests, 0);
}

#[test]
fn an_index_that_waits_is_refused_and_what_waits_is_still_answered() {
    let Some(bench) = Bench::open() else { return };
    bench.host.apply(pasid(A, 5), stage1(RAM)).unwrap();
    bench.ask(A, 5, 1);
    let first = bench.requests.recv_timeout(LONG).unwrap();
    // The device uses the index again: it has its answer from us, and the front end hears nothing.
    bench.ask(A, 5, 1);
    bench.ask(A, 5, 2);
    let second = bench.requests.recv_timeout(LONG).unwrap();
    assert_eq!((first.group, second.group), (1, 2));
    assert_eq!(bench.host.objects().page_requests, 2);
    for request in [second, first] {
        bench.answer(request);
    }
    assert_eq!(bench.host.objects().page_requests, 0);
}

#[test]
fn requests_of_many_pasids_are_answered_in_any_order_while_tables_are_replaced() {
    let Some(bench) = Bench::open() else { return };
    let targets = [A, B].map(|rid| (1..=8).map(move |number| (rid, number)));
    let targets: Vec<(Rid, u32)> = targets.into_iter().flatten().collect();
    for &(rid, number) in &targets {
        bench.host.apply(pasid(rid, number), stage1(RAM)).unwrap();
    }
    for round in 0..8u64 {
        let mut waiting = Vec::new();
        for group in 0..16 {
            for &(rid, number) in &targets {
                bench.ask(rid, number, group);
                waiting.push(bench.requests.recv_timeout(LONG).unwrap());
            }
        }
        assert_eq!(bench.host.objects().page_requests, waiting.len());
        // A replaced table takes its requests with it: the kernel answers them.
        let root = stage1(RAM + ((round + 1) << 12));
        for &(rid, number) in targets.iter().step_by(3) {
            bench.host.apply(pasid(rid, number), root).unwrap();
        }
        let gone = 16 * targets.len().div_ceil(3);
        assert_eq!(bench.host.objects().page_requests, waiting.len() - gone);
        // The rest from both ends, and then all once more: nothing is answered twice.
        let half = waiting.len() / 2;
        let (front, back) = waiting.split_at(half);
        for request in back.iter().rev().chain(front).chain(&waiting) {
            bench.answer(*request);
        }
        assert_eq!(bench.host.objects().page_requests, 0);
    }
    assert!(bench.requests.try_recv().is_err(), "a request came twice");
}

#[test]
fn a_replace_that_fails_ends_with_the_new_table_or_none() {
    let Some(bench) = Bench::open() else { return };
    let target = pasid(A, PASID_THAT_FAILS);
    bench.host.apply(target, stage1(RAM)).unwrap();
    for round in 1..4u64 {
        bench.ask(A, PASID_THAT_FAILS, 1);
        bench.requests.recv_timeout(LONG).unwrap();
        let old = bench.hwpt(A, PASID_THAT_FAILS);
        let new = stage1(RAM + (round << 12));
        // The mock fails the replace; from detached the attach works, and nothing of the old
        // table is left: not in the kernel, and no page request of its.
        bench.host.apply(target, new).unwrap();
        assert_eq!(bench.host.translation(target), new);
        assert!(!bench.has(A, PASID_THAT_FAILS, old));
        assert!(bench.has(A, PASID_THAT_FAILS, bench.hwpt(A, PASID_THAT_FAILS)));
        assert_eq!(bench.host.objects().page_requests, 0);
        assert_eq!(bench.host.objects().translations, 1);
    }
    assert_eq!(bench.devices[&A].0.refusals.load(Ordering::Relaxed), 3);
}

#[test]
fn reserved_addresses_are_refused_with_the_kernels_own_ranges() {
    let Some(bench) = Bench::open() else { return };
    let domain = bench.host.create_domain().unwrap();
    let map = |iova| {
        let mapping = Mapping {
            iova: Iova(iova),
            gpa: Gpa(RAM),
            length: 0x1000,
            access: Access::READ_WRITE,
            mmio: false,
        };
        bench.host.map(domain, &[mapping])
    };
    // The mock's aperture begins at 16 MiB and ends at 2 GiB.
    assert!(matches!(map(0), Err(Refused::NotOffered { .. })));
    assert!(matches!(map(1 << 31), Err(Refused::NotOffered { .. })));
    map(0x100_0000).unwrap();
    assert_eq!(bench.host.capabilities().address_width, 31);
    bench.host.destroy_domain(domain);
}

#[test]
fn a_reserved_region_in_guest_ram_is_refused_at_admission() {
    let Some(bench) = Bench::open() else { return };
    // An address space with a mapping does not take a reservation over it: the same check that
    // refuses a device.
    let kernel: Arc<dyn Kernel> = bench.kernel.clone();
    let ioas = Ioas::new(kernel).unwrap();
    bench
        .kernel
        .test(OP_ADD_RESERVED, ioas.id(), &[0x200_0000, 0x1000])
        .unwrap();
    let file = memfd();
    let map = |iova| ioas.map_file(file.as_fd(), 0, 0x1000, iova, Access::READ_WRITE);
    assert_eq!(
        map(0x200_0000).unwrap_err().raw_os_error(),
        Some(libc::EINVAL)
    );
    map(0x200_1000).unwrap();
    assert_eq!(
        map(0x200_1000).unwrap_err().raw_os_error(),
        Some(libc::EEXIST)
    );
    // Areas go whole or not at all.
    ioas.map_file(file.as_fd(), 0, 0x4000, 0x300_0000, Access::READ)
        .unwrap();
    assert_eq!(
        ioas.unmap(0x300_0000, 0x1000).unwrap_err().raw_os_error(),
        Some(libc::ENOENT)
    );
    // Several, with a hole between them, go with one call.
    assert_eq!(ioas.unmap(0x200_0000, 0x200_0000).unwrap(), 0x5000);
}

#[test]
fn a_part_of_a_mapping_can_be_copied() {
    let Some(bench) = Bench::open() else { return };
    let kernel: Arc<dyn Kernel> = bench.kernel.clone();
    let (from, to) = (
        Ioas::new(kernel.clone()).unwrap(),
        Ioas::new(kernel).unwrap(),
    );
    let file = memfd();
    from.map_file(file.as_fd(), 0, 0x10_0000, 0x200_0000, Access::READ_WRITE)
        .unwrap();
    to.copy(0x400_0000, &from, 0x204_3000, 0x2000, Access::READ)
        .unwrap();
    assert_eq!(to.unmap(0x400_0000, 0x2000).unwrap(), 0x2000);
}

/// Pages that this process has pinned, in KiB.
fn pinned() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|l| l.starts_with("VmPin:")).unwrap();
    let value = line.split_whitespace().nth(1).unwrap();
    value.parse().unwrap()
}

/// The two ways to fill a domain, pages of 4 KiB one by one as a guest maps them. Their times are
/// printed; what is checked is that a copy pins nothing, since guest RAM is pinned already.
#[test]
fn a_copy_shares_the_pins_of_guest_memory_and_a_file_pins_anew() {
    const PAGES: u64 = 1024;
    let Some(bench) = Bench::open() else { return };
    let (_, device) = bench.devices[&A].clone();
    let kernel: Arc<dyn Kernel> = bench.kernel.clone();
    let file = memfd();
    let space = || {
        let ioas = Arc::new(Ioas::new(kernel.clone()).unwrap());
        let kind = Paging {
            nest_parent: false,
            dirty: false,
            pasid: false,
        };
        // With a table, or nothing is pinned at all.
        let table = Hwpt::paging(kernel.clone(), device, &ioas, kind).unwrap();
        (table, ioas)
    };
    let (_memory_table, memory) = space();
    let ram = || memory.map_file(file.as_fd(), 0, PAGES << 12, RAM, Access::READ_WRITE);
    ram().unwrap();
    let run = |copies: bool| {
        let (_table, ioas) = space();
        let (before, began) = (pinned(), Instant::now());
        for page in 0..PAGES {
            let (at, from) = (RAM + (page << 13), page << 12);
            match copies {
                true => ioas.copy(at, &memory, RAM + from, 1 << 12, Access::READ_WRITE),
                false => ioas.map_file(file.as_fd(), from, 1 << 12, at, Access::READ_WRITE),
            }
            .unwrap();
        }
        let (mapped, more) = (began.elapsed(), pinned() - before);
        for page in 0..PAGES {
            ioas.unmap(RAM + (page << 13), 1 << 12).unwrap();
        }
        assert_eq!(pinned(), before);
        (mapped, began.elapsed() - mapped, more)
    };
    let mut best = [[Duration::MAX; 2]; 2];
    for _ in 0..5 {
        for (copies, best) in [true, false].into_iter().zip(&mut best) {
            let (map, unmap, more) = run(copies);
            assert_eq!(more, if copies { 0 } else { PAGES << 2 }, "KiB pinned");
            *best = [best[0].min(map), best[1].min(unmap)];
        }
    }
    let [copy, file] = best;
    let ratio = |n: usize| file[n].as_secs_f64() / copy[n].as_secs_f64();
    println!(
        "measured, {PAGES} pages: IOAS_COPY {:?} and its unmap {:?}; MAP_FILE takes {:.2} and {:.2} \
         times as long",
        copy[0],
        copy[1],
        ratio(0),
        ratio(1)
    );
}

#[test]
fn nothing_is_left_behind() {
    let Some(bench) = Bench::open() else { return };
    let domain = bench.host.create_domain().unwrap();
    for number in 1..64 {
        let translation = match number % 3 {
            0 => stage1(RAM + (u64::from(number) << 12)),
            1 => Translation::Identity,
            _ => Translation::Domain(domain),
        };
        bench.host.apply(pasid(A, number), translation).unwrap();
        bench.host.apply(pasid(B, number), translation).unwrap();
    }
    for rid in [A, B] {
        bench.host.release(rid);
        assert!((1..64).all(|number| bench.has(rid, number, 0)));
        bench.host.claim(rid, bench.sink.clone()).unwrap();
        bench.host.remove_device(rid);
    }
    bench.host.destroy_domain(domain);
    assert_eq!(bench.host.objects(), Objects::default());
    // Every object that the back end had has an id that is free again: destroying any fails with
    // ENOENT, except those of the mock's devices and our own.
    drop(bench.host);
    let live = (1..1024)
        .filter(|&id| match bench.kernel.destroy(id) {
            Ok(()) => true,
            Err(error) => error.raw_os_error() == Some(libc::EBUSY),
        })
        .count();
    // For each of the two devices: an address space, its two tables, the device and its binding.
    assert!(live <= 10, "{live} objects are left");
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

#[test]
fn the_host_back_end_conforms_on_the_kernel() {
    if Bench::unclaimed().is_none() {
        return;
    }
    for (name, check) in conformance::CHECKS {
        // The mock has four cache entries where VT-d has an address space.
        if name.contains("invalidation of existing") {
            continue;
        }
        eprintln!("conformance: {name}");
        check(&Bench::unclaimed().unwrap());
    }
}

#[test]
fn where_there_is_no_iommufd_the_file_is_named() {
    assert!(Linux::open(Path::new("/nonexistent")).is_err());
}
