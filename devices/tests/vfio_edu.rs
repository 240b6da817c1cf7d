//! A real VFIO device under a real IOMMU driver: QEMU's `edu` (a programmable DMA engine), on the
//! lab's host. Its DMA goes through every translation that the host back end makes, and what it
//! must not reach stays as it is.
//!
//! Runs where there is an `edu`, as root; elsewhere it says why it does nothing. It takes the
//! device from the host (no host driver wants it) and leaves it bound to vfio-pci.
//!
//! `cargo lab test kernel::` runs it on the lab's host.

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test's helpers fail as the test does"
)]

use std::fs;
use std::io;
use std::os::fd::FromRawFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use devices::interrupt::fake::FakeMsi;
use devices::passthrough::features::{Switch, Wishes};
use devices::passthrough::hardware::Mapping;
use devices::passthrough::{
    Admitted, Before, Connections, DirectMemory, HostError, LegacyContainer, PassthroughHost,
    VfioPci,
};
use devices::pci::PciFunction;
use viommu::backend::{
    Access, Backend, Capabilities, EventSink, Fault, Invalidation, InvalidationRange,
    Mapping as Map, Objects, PageRequest, Scope, Stage2, Translation,
};
use viommu::interrupt::Msi;
use viommu::{Gpa, GuestRam, Iova, Rid, Target};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};

const RID: Rid = Rid::new(0, 3, 0);
const TARGET: Target = Target::rid(RID);
/// The engine's addresses have 28 bits.
const RAM: u64 = 64 << 20;

/// Registers of the engine.
const SOURCE: u64 = 0x80;
const DESTINATION: u64 = 0x88;
const COUNT: u64 = 0x90;
const COMMAND: u64 = 0x98;
const BUFFER: u64 = 0x4_0000;

/// One test at a time has the device.
static TAKEN: Mutex<()> = Mutex::new(());

/// The engine's place in sysfs, bound to vfio-pci.
fn find() -> Option<PathBuf> {
    if !Path::new("/dev/iommu").exists() {
        eprintln!("skipped: this host has no /dev/iommu");
        return None;
    }
    let at = fs::read_dir("/sys/bus/pci/devices")
        .ok()?
        .flatten()
        .find(|entry| {
            let id = |name| fs::read_to_string(entry.path().join(name)).unwrap_or_default();
            id("vendor").trim() == "0x1234" && id("device").trim() == "0x11e8"
        });
    let Some(at) = at.map(|entry| entry.path()) else {
        eprintln!("skipped: this host has no edu device");
        return None;
    };
    if !at.join("iommu_group").exists() {
        eprintln!("skipped: the edu device stands behind no IOMMU");
        return None;
    }
    if !at.join("vfio-dev").exists() {
        fs::write(at.join("driver_override"), "vfio-pci").unwrap();
        fs::write(
            "/sys/bus/pci/drivers_probe",
            at.file_name().unwrap().as_encoded_bytes(),
        )
        .unwrap();
    }
    Some(at)
}

fn ram() -> GuestRam {
    // SAFETY: the name is a C string that lives through the call.
    let fd = unsafe { libc::memfd_create(c"guest".as_ptr(), libc::MFD_CLOEXEC) };
    assert!(fd >= 0, "{}", io::Error::last_os_error());
    // SAFETY: the call made this descriptor for us alone.
    let file = unsafe { fs::File::from_raw_fd(fd) };
    file.set_len(RAM).unwrap();
    let region = (
        GuestAddress(0),
        RAM as usize,
        Some(FileOffset::new(file, 0)),
    );
    let ram = Arc::new(GuestMemoryMmap::from_ranges_with_files([region]).unwrap());
    viommu::backend::iommufd::prefault(&ram, 2).unwrap();
    ram
}

#[derive(Default)]
struct Slots(Mutex<Vec<(u64, Arc<Mapping>)>>);

impl DirectMemory for Slots {
    fn add(&self, gpa: u64, mapping: Arc<Mapping>) -> io::Result<()> {
        self.0.lock().unwrap().push((gpa, mapping));
        Ok(())
    }
    fn remove(&self, gpa: u64) {
        self.0.lock().unwrap().retain(|(at, _)| *at != gpa);
    }
}

struct Deaf;

impl EventSink for Deaf {
    fn fault(&self, fault: Fault) {
        panic!("the kernel reports no faults: {fault:?}");
    }
    fn translation_request(&self, _: Target, _: Iova) -> bool {
        true
    }

    fn page_request(&self, request: PageRequest) {
        panic!("the engine has no PRI: {request:?}");
    }
}

struct Bench {
    ram: GuestRam,
    host: PassthroughHost,
    function: Arc<VfioPci>,
    admitted: Option<Admitted>,
    messages: FakeMsi,
    slots: Arc<Slots>,
}

fn viommu(offered: Capabilities) -> Before {
    Before::Viommu {
        offered,
        cpu_width: 48,
    }
}

impl Bench {
    fn open(before: fn(Capabilities) -> Before) -> Option<Self> {
        let at = find()?;
        let ram = ram();
        let host = PassthroughHost::open(ram.clone()).unwrap();
        let admitted = host.admit(RID, &at).unwrap();
        let messages = FakeMsi::default();
        let slots = Arc::<Slots>::default();
        let connections = || Connections {
            messages: &messages,
            line: None,
            direct: slots.clone(),
            peers: Some(host.backend().unwrap().clone()),
        };
        let before = before(host.backend().unwrap().capabilities());
        // A conventional function without PASIDs: never a capability that does nothing.
        let asked = Wishes {
            pasid: Switch::On,
            ..Wishes::default()
        };
        let refused = admitted.connect(before, &asked, connections());
        assert!(matches!(refused, Err(HostError::NotOffered(_))));
        let function = admitted
            .connect(before, &Wishes::default(), connections())
            .unwrap();
        function.assign_bar(0, 0xf000_0000);
        // Memory and bus mastering.
        let effect = function.config_write(4, &6u16.to_le_bytes());
        assert!(effect.decode);
        for decoded in function.decoded() {
            function.bar_mapped(decoded);
        }
        Some(Self {
            ram,
            host,
            function,
            admitted: Some(admitted),
            messages,
            slots,
        })
    }

    fn backend(&self) -> &dyn Backend {
        &**self.host.backend().unwrap()
    }

    fn register(&self, at: u64) -> u64 {
        let mut data = [0; 4];
        self.function.bar_read(0, at, &mut data);
        u32::from_le_bytes(data).into()
    }

    fn set(&self, at: u64, value: u64) {
        let _ = self.function.bar_write(0, at, &value.to_le_bytes());
    }

    /// One transfer, to its end.
    fn transfer(&self, source: u64, destination: u64, command: u64) {
        self.set(SOURCE, source);
        self.set(DESTINATION, destination);
        self.set(COUNT, 64);
        self.set(COMMAND, command);
        let end = Instant::now() + Duration::from_secs(200);
        while self.register(COMMAND) & 1 != 0 {
            assert!(Instant::now() < end, "the engine does not end");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// What the device finds at `iova`, seen by writing its buffer to `out` by way of Identity.
    fn load(&self, iova: u64) {
        self.transfer(iova, BUFFER, 1);
    }

    /// The device writes its buffer to `iova`.
    fn store(&self, iova: u64) {
        self.transfer(BUFFER, iova, 3);
    }

    fn fill(&self, gpa: u64, byte: u8) {
        self.ram
            .write_slice(&[byte; 64], GuestAddress(gpa))
            .unwrap();
    }

    /// The 64 bytes at `gpa` are all `byte`.
    fn is(&self, gpa: u64, byte: u8) -> bool {
        let mut data = [0; 64];
        self.ram.read_slice(&mut data, GuestAddress(gpa)).unwrap();
        data == [byte; 64]
    }
}

#[test]
fn a_device_without_a_viommu_reaches_guest_memory_interrupts_and_resets() {
    let _taken = TAKEN.lock().unwrap();
    let Some(bench) = Bench::open(|_| Before::Nothing) else {
        return;
    };
    let mut id = [0; 4];
    bench.function.config_read(0, &mut id);
    assert_eq!(id, [0x34, 0x12, 0xe8, 0x11]);
    assert_eq!(bench.register(0), 0x0100_00ed);
    bench.set(4, 0x1234_5678);
    assert_eq!(bench.register(4), 0xedcb_a987);
    // The register is shown to the guest directly, all of it: it has no MSI-X table.
    assert_eq!(bench.slots.0.lock().unwrap()[0].1.length(), 1 << 20);

    bench.fill(0x10_0000, 0x5a);
    bench.fill(0x20_0000, 0);
    bench.load(0x10_0000);
    bench.store(0x20_0000);
    assert!(bench.is(0x20_0000, 0x5a));

    // MSI, wherever its capability is.
    let mut at = 0;
    bench
        .function
        .config_read(0x34, std::slice::from_mut(&mut at));
    let msi = loop {
        assert_ne!(at, 0, "the engine has MSI");
        let mut header = [0; 2];
        bench.function.config_read(at.into(), &mut header);
        if header[0] == 5 {
            break u16::from(at);
        }
        at = header[1];
    };
    let _ = bench
        .function
        .config_write(msi + 4, &0xfee0_1000u32.to_le_bytes());
    let _ = bench
        .function
        .config_write(msi + 12, &0x4041u16.to_le_bytes());
    let _ = bench.function.config_write(msi + 2, &1u16.to_le_bytes());
    let vector = bench.messages.get(0);
    let expected = Msi {
        address: 0xfee0_1000,
        data: 0x4041,
    };
    assert_eq!(vector.route(), Some(expected));
    let _ = bench.function.bar_write(0, 0x60, &1u32.to_le_bytes());
    let end = Instant::now() + Duration::from_secs(200);
    while vector.signals() == 0 {
        assert!(Instant::now() < end, "no interrupt");
        std::thread::sleep(Duration::from_millis(1));
    }

    let _ = bench.function.reset();
    assert!(bench.function.decoded().is_empty());
    assert_eq!(vector.route(), None);
}

#[test]
fn behind_a_viommu_dma_reaches_what_is_mapped_and_nothing_else() {
    let _taken = TAKEN.lock().unwrap();
    let Some(mut bench) = Bench::open(viommu) else {
        return;
    };
    let width = bench.backend().capabilities().address_width;
    assert!((39..=57).contains(&width), "{width}");
    bench.backend().claim(RID, Arc::new(Deaf)).unwrap();

    // Blocked from the beginning.
    bench.fill(0x20_0000, 0x11);
    bench.store(0x20_0000);
    assert!(bench.is(0x20_0000, 0x11), "DMA passed a blocked endpoint");

    // Identity.
    bench.fill(0x10_0000, 0x22);
    bench
        .backend()
        .apply(TARGET, Translation::Identity)
        .unwrap();
    bench.load(0x10_0000);
    bench.store(0x20_0000);
    assert!(bench.is(0x20_0000, 0x22));

    // A domain: read-only and read-write, mapped before and after the attach.
    let domain = bench.backend().create_domain().unwrap();
    let map = |iova, gpa, access| Map {
        iova: Iova(iova),
        gpa: Gpa(gpa),
        length: 0x1000,
        access,
        mmio: false,
    };
    let first = [map(0x80_0000, 0x30_0000, Access::READ)];
    bench.backend().map(domain, &first).unwrap();
    bench
        .backend()
        .apply(TARGET, Translation::Domain(domain))
        .unwrap();
    let second = [map(0x90_0000, 0x40_0000, Access::READ_WRITE)];
    bench.backend().map(domain, &second).unwrap();
    bench.fill(0x30_0000, 0x33);
    bench.fill(0x40_0000, 0);
    bench.load(0x80_0000);
    bench.store(0x90_0000);
    assert!(bench.is(0x40_0000, 0x33));
    bench.fill(0x30_0000, 0x44);
    bench.store(0x80_0000);
    assert!(bench.is(0x30_0000, 0x44), "a read-only mapping was written");
    // What Identity had there is not there any more.
    bench.fill(0x10_0000, 0x55);
    bench.store(0x10_0000);
    assert!(
        bench.is(0x10_0000, 0x55),
        "the old translation is still there"
    );
    // Unmapped is gone when the call returns.
    bench
        .backend()
        .unmap(domain, Iova(0), Iova(u64::MAX))
        .unwrap();
    bench.fill(0x40_0000, 0x66);
    bench.store(0x90_0000);
    assert!(bench.is(0x40_0000, 0x66), "an unmapped address was written");

    // A guest's second-stage table, mirrored.
    let entry = |at: u64, value: u64| {
        bench
            .ram
            .write_obj(value.to_le(), GuestAddress(at))
            .unwrap();
    };
    entry(0x100_0000, 0x100_1003);
    entry(0x100_1000, 0x100_2003);
    entry(0x100_2000, 0x100_3003);
    entry(0x100_3000 + 8 * 7, 0x50_0003);
    let table = Stage2 {
        root: Gpa(0x100_0000),
        width: 48,
        ad: false,
    };
    bench
        .backend()
        .apply(TARGET, Translation::Stage2(table))
        .unwrap();
    bench.fill(0x50_0000, 0);
    bench.store(0x7000);
    assert!(bench.is(0x50_0000, 0x33));
    entry(0x100_3000 + 8 * 7, 0);
    entry(0x100_3000 + 8 * 8, 0x60_0003);
    let range = InvalidationRange::Pages {
        first: Iova(0x7000),
        count: 2,
        leaf: true,
    };
    let scope = Scope::Target(TARGET);
    assert_eq!(
        bench.backend().invalidate(&[Invalidation { scope, range }]),
        1
    );
    bench.fill(0x50_0000, 0x77);
    bench.fill(0x60_0000, 0);
    bench.store(0x7000);
    bench.store(0x8000);
    assert!(bench.is(0x50_0000, 0x77), "a removed entry was used");
    assert!(bench.is(0x60_0000, 0x33));

    // And blocked again.
    bench.backend().apply(TARGET, Translation::Blocked).unwrap();
    bench.fill(0x60_0000, 0x88);
    bench.store(0x8000);
    assert!(bench.is(0x60_0000, 0x88));

    bench.backend().destroy_domain(domain);
    bench.backend().release(RID);
    assert_eq!(bench.backend().objects(), Objects::default());
    bench.admitted = None;
    assert_eq!(bench.host.backend().unwrap().pasid_bits(RID), 0);
}

#[test]
fn a_device_that_is_in_use_is_refused_and_said_to_be() {
    let _taken = TAKEN.lock().unwrap();
    let Some(bench) = Bench::open(viommu) else {
        return;
    };
    let at = find().unwrap();
    let other = PassthroughHost::open(ram()).unwrap();
    let error = other.admit(RID, &at).unwrap_err();
    eprintln!("refused: {error}");
    let legacy = LegacyContainer::new(ram()).unwrap();
    let error = legacy.open(&at).unwrap_err();
    eprintln!("refused: {error}");
    drop(bench);
    // And once it is free, it is taken.
    let other = other.admit(RID, &at).unwrap();
    drop(other);
}

#[test]
fn the_group_container_works_where_there_is_nothing_else() {
    let _taken = TAKEN.lock().unwrap();
    let Some(at) = find() else { return };
    if !Path::new("/dev/vfio/vfio").exists() {
        eprintln!("skipped: this host has no VFIO containers");
        return;
    }
    let ram = ram();
    let legacy = LegacyContainer::new(ram.clone()).unwrap();
    // The group leaves with its device, and comes again to an empty container.
    drop(legacy.open(&at).unwrap());
    let (device, group) = legacy.open(&at).unwrap();
    let device = Arc::new(device);
    let messages = FakeMsi::default();
    let connections = Connections {
        messages: &messages,
        line: None,
        direct: Arc::<Slots>::default(),
        peers: None,
    };
    let offer = devices::passthrough::config::Offer::default();
    let function = VfioPci::new(device, offer, connections).unwrap();
    let _ = function.config_write(4, &6u16.to_le_bytes());
    let mut id = [0; 4];
    function.bar_read(0, 0, &mut id);
    assert_eq!(u32::from_le_bytes(id), 0x0100_00ed);
    drop((function, group));
    assert!(legacy.open(&at).is_ok());
}
