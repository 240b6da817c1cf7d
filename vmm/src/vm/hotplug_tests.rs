//! Transactions on a VM of KVM whose guest never runs: the tests do what its firmware code would.

use std::sync::atomic::{AtomicU32, Ordering};

use proptest::prelude::*;
use vmm_sys_util::tempdir::TempDir;
use vmm_sys_util::tempfile::TempFile;

use super::*;
use crate::config::{MemoryConfig, Size, Validated, VmConfig};
use crate::control::Descriptors;
use crate::interrupts::Interrupts;
use crate::kvm;
use crate::kvm::cpuid::Paging;
use crate::kvm::vcpu::EventLine;
use crate::memory::layout::{Range, compose};
use crate::memory::ram;
use crate::vm::devices::{HOTPLUG_PORT, OfHost};

/// A VM with two vIOMMUs; `None` where there is no KVM.
fn machine(edit: impl FnOnce(&mut VmConfig)) -> Option<Devices> {
    machine_with(edit, |_| ())
}

fn machine_with(
    edit: impl FnOnce(&mut VmConfig),
    narrow: impl FnOnce(&mut crate::memory::layout::Layout),
) -> Option<Devices> {
    let host = kvm::for_test()?;
    let mut config: VmConfig = serde_json::from_str(
        r#"{"payload": {"kernel": "k"}, "serial": {"mode": "Null"}, "viommus": [
            {"type": "Vtd", "id": "unit"}, {"type": "Virtio", "id": "paravirtual"}
        ]}"#,
    )
    .unwrap();
    edit(&mut config);
    let config: Validated = config.validate().unwrap();
    let mut layout = compose(16 << 20, 40, &[]).unwrap();
    let memory = MemoryConfig {
        size: Size::mib(16),
        ..MemoryConfig::default()
    };
    let ram = ram::allocate(&memory, &layout).unwrap();
    narrow(&mut layout);
    let vm = Arc::new(host.create_vm(ram, 1).unwrap());
    let interrupts = Interrupts::new(vm.fd().clone());
    let events = Arc::new(EventLine::new().unwrap());
    let of_host = OfHost {
        passthrough: None,
        paging: Paging::of(host.cpuid()),
        descriptors: &Descriptors::default(),
    };
    let devices = Devices::new(&config, &layout, &vm, &interrupts, &events, of_host).unwrap();
    devices.freeze().unwrap();
    Some(devices)
}

/// An image of its own, so that its descriptors can be counted.
fn image() -> TempFile {
    let file = TempFile::new().unwrap();
    file.as_file().set_len(1 << 20).unwrap();
    file
}

fn disk(image: &TempFile, id: &str, viommu: Option<&str>) -> DiskConfig {
    DiskConfig {
        path: image.as_path().into(),
        id: Some(id.into()),
        viommu: viommu.map(str::to_owned),
        // So that several can have it.
        readonly: true,
        ..DiskConfig::default()
    }
}

/// How often this process has the file open.
fn open(image: &TempFile) -> usize {
    let fds = std::fs::read_dir("/proc/self/fd").unwrap().flatten();
    let links = fds.filter_map(|fd| std::fs::read_link(fd.path()).ok());
    links.filter(|link| link == image.as_path()).count() - 1
}

/// All that a device could leave behind.
fn everything(devices: &Devices) -> String {
    let buses = devices.buses();
    let front_ends = devices.viommus().front_ends();
    format!(
        "{:?} {:?} {:?} {:?} {:?} {} {}",
        devices.root.rids(),
        buses.mmio.ranges(),
        buses.pio.ranges(),
        devices.interrupts,
        devices.interrupts.lines(),
        serde_json::to_string(&crate::vm::viommus::states(&front_ends)).unwrap(),
        read(devices, 0xc),
    )
}

fn read(devices: &Devices, offset: u64) -> u32 {
    let mut data = [0; 4];
    let port = u64::from(HOTPLUG_PORT) + offset;
    assert!(devices.buses().pio.read(port, &mut data));
    u32::from_le_bytes(data)
}

fn eject(devices: &Devices, slots: u32) {
    let port = u64::from(HOTPLUG_PORT) + 0xc;
    assert!(devices.buses().pio.write(port, &slots.to_le_bytes()));
}

fn add(devices: &mut Devices, new: New<'_>) -> Result<Rid, AddError> {
    devices.add(new, &|_| (), |_| Ok(()))?;
    Ok(devices.plugged.last().unwrap().rid)
}

#[test]
fn a_device_comes_is_told_and_goes_with_everything_it_had() {
    let image = image();
    for viommu in [None, Some("unit"), Some("paravirtual")] {
        let Some(mut devices) = machine(|_| ()) else {
            return;
        };
        let before = everything(&devices);
        let config = disk(&image, "disk", viommu);
        let mut first = None;
        for _ in 0..3 {
            let rid = add(&mut devices, New::Disk(&config)).unwrap();
            assert_eq!(*first.get_or_insert(rid), rid, "the slot is free at once");
            assert_eq!(open(&image), 1);
            assert_eq!(read(&devices, 0), 1 << rid.device());
            assert_eq!(devices.find("disk").unwrap().rid, rid);
            devices.ask(rid);
            assert_eq!(read(&devices, 4), 1 << rid.device());
            assert!(devices.ejected().is_empty(), "the guest has not let go");
            eject(&devices, 1 << rid.device());
            assert!(devices.root.function(rid).is_none(), "gone for the guest");
            let gone = devices.ejected();
            assert_eq!((gone.len(), &*gone[0].id), (1, "disk"));
            assert_eq!(open(&image), 0);
            assert_eq!(everything(&devices), before);
        }
    }
}

#[test]
fn a_step_that_fails_leaves_nothing_and_is_named() {
    let image = image();
    let narrow = |layout: &mut crate::memory::layout::Layout| {
        // Room for the rng's registers and two more.
        layout.mmio64 = Range::new(layout.mmio64.first, layout.mmio64.first + 0x1_7fff);
        layout.mmio32 = Range::new(layout.mmio32.first, layout.mmio32.first);
    };
    let no_viommus = |config: &mut VmConfig| config.viommus.truncate(1);
    let Some(mut devices) = machine_with(no_viommus, narrow) else {
        return;
    };
    let good = disk(&image, "disk", Some("unit"));
    let fails = |devices: &mut Devices, new: New<'_>, step: Step, words: &str| {
        let before = everything(devices);
        let reached = AtomicU32::new(0);
        let progress = |step: Step| {
            let last = reached.fetch_max(step as u32, Ordering::Relaxed);
            assert!(last <= step as u32, "{step} came too late");
        };
        let nothing_to_watch_with = |_: &mut Plugged| match step {
            Step::Notify => Err(io::Error::from_raw_os_error(libc::EMFILE)),
            _ => Ok(()),
        };
        let error = devices.add(new, &progress, nothing_to_watch_with);
        let error = error.unwrap_err();
        assert_eq!(error.step, step, "{error}");
        let api = error.to_api();
        assert!(format!("{api}").contains(words), "{api}");
        assert_eq!(everything(devices), before);
        assert!(devices.find(new.id()).is_none());
    };
    // Open.
    let absent = DiskConfig {
        path: "/no/such/image".into(),
        ..good.clone()
    };
    fails(
        &mut devices,
        New::Disk(&absent),
        Step::Open,
        "/no/such/image",
    );
    let tap = NetConfig {
        tap: "no/such".into(),
        id: Some("card".into()),
        ..NetConfig::default()
    };
    fails(&mut devices, New::Net(&tap), Step::Open, "no/such");
    let host = DeviceConfig {
        path: "/sys/bus/pci/devices/none".into(),
        id: Some("host".into()),
        ..DeviceConfig::default()
    };
    fails(&mut devices, New::Device(&host), Step::Open, "none");
    // What a device of the host reserves: in the middle of guest memory, or where nothing is.
    let sysfs = TempDir::new().unwrap();
    std::fs::create_dir_all(sysfs.as_path().join("vfio-dev")).unwrap();
    std::fs::create_dir_all(sysfs.as_path().join("iommu_group")).unwrap();
    let reserves = |region: &str| {
        let file = sysfs.as_path().join("iommu_group/reserved_regions");
        std::fs::write(file, region).unwrap();
    };
    let host = DeviceConfig {
        path: sysfs.as_path().into(),
        ..host
    };
    reserves("0x0000000000200000 0x00000000002fffff reserved\n");
    let step = Step::ReservedRegions;
    fails(&mut devices, New::Device(&host), step, "0x200000");
    reserves("0x00000000fee00000 0x00000000feefffff msi\n");
    fails(&mut devices, New::Device(&host), Step::Open, "");
    assert!(devices.passthrough.is_none());
    // The vIOMMU: something is there already.
    let rid = devices.free_slot(Some(0)).unwrap().rid();
    let endpoint = viommu::backend::software::EndpointConfig::default();
    let taken = devices.viommus.port(rid, Behind::Named("unit"), endpoint);
    assert!(taken.is_ok());
    let before = devices.viommus.front_ends();
    let before = serde_json::to_string(&crate::vm::viommus::states(&before)).unwrap();
    let error = devices.plug(New::Disk(&good), &|_| ()).map(|p| p.rid);
    assert_eq!(error.unwrap_err().step, Step::Viommu);
    let after = devices.viommus.front_ends();
    let after = serde_json::to_string(&crate::vm::viommus::states(&after)).unwrap();
    assert_eq!(before, after, "the endpoint that was there stays");
    devices.viommus.remove(rid);
    // The function: features that do not go together.
    let engine = TestDeviceConfig {
        id: Some("engine".into()),
        pasid_bits: 21,
        viommu: Some("unit".into()),
        ..TestDeviceConfig::default()
    };
    fails(&mut devices, New::Test(&engine), Step::Function, "20 bits");
    // Telling: no descriptor is left to listen with.
    fails(
        &mut devices,
        New::Disk(&good),
        Step::Notify,
        "raise the limits",
    );
    assert_eq!(open(&image), 0);
    // The bus: no address is left for its registers.
    let mut added = 0;
    while let Ok(rid) = add(&mut devices, New::Disk(&disk(&image, "some", Some("unit")))) {
        assert!(rid.device() > 0);
        added += 1;
        assert!(added < 4);
    }
    assert!(added > 0);
    fails(
        &mut devices,
        New::Disk(&good),
        Step::Bus,
        "make the window larger",
    );
    assert_eq!(open(&image), added);
}

#[test]
fn what_counts_is_named_as_the_device_and_keeps_nothing_of_it() {
    let image = image();
    let Some(mut devices) = machine(|_| ()) else {
        return;
    };
    let engine = TestDeviceConfig {
        id: Some("engine".into()),
        ..TestDeviceConfig::default()
    };
    add(&mut devices, New::Test(&engine)).unwrap();
    let rid = add(&mut devices, New::Disk(&disk(&image, "disk", None))).unwrap();
    let counting = devices.counting();
    let names = |of: &str| -> Vec<String> {
        let (_, counting) = counting.iter().find(|(id, _)| id == of).unwrap();
        let mut names = Vec::new();
        for counters in counting {
            counters.read(&mut |name, _| names.push(name.to_owned()));
        }
        names
    };
    for (id, name) in [
        ("disk", "read_bytes"),
        ("disk", "queue0_used"),
        ("engine", "page_requests"),
        ("__rng", "interrupts"),
        ("paravirtual", "queue1_used"),
    ] {
        assert!(names(id).iter().any(|n| n == name), "{id} has no {name}");
    }
    let front_ends = devices.viommus().front_ends();
    let units = crate::vm::viommus::counters(&front_ends);
    assert_eq!(units["unit"]["iotlb_invalidations"], 0);
    assert_eq!(units["paravirtual"]["requests"], 0);
    eject(&devices, 1 << rid.device());
    assert_eq!(devices.ejected().len(), 1);
    assert_eq!(open(&image), 0, "its counters do not hold the file");
    assert!(names("disk").iter().any(|n| n == "write_ops"));
}

#[test]
fn every_slot_of_a_home_can_be_filled_and_then_the_refusal_names_it() {
    let image = image();
    let Some(mut devices) = machine(|_| ()) else {
        return;
    };
    let homes: [(Option<&str>, Home); 3] = [
        (None, None),
        (Some("unit"), Some(0)),
        (Some("paravirtual"), Some(1)),
    ];
    for (viommu, home) in homes {
        let count = devices.slots.of(home).count();
        assert!(count >= 8, "{count} slots");
        for n in 0..count {
            let config = disk(&image, &format!("{n}"), viommu);
            let rid = add(&mut devices, New::Disk(&config)).unwrap();
            assert!(devices.slots.of(home).any(|slot| slot == rid));
        }
        let config = disk(&image, "more", viommu);
        let full = devices.plug(New::Disk(&config), &|_| ()).map(|p| p.rid);
        let full = full.unwrap_err();
        assert_eq!(full.step, Step::Slot);
        assert_eq!(full.to_api().code, Code::NoFreeSlot);
        let named = viommu.unwrap_or("no vIOMMU");
        assert!(full.to_string().contains(named), "{full}");
    }
}

#[test]
fn what_is_taken_away_is_told_and_its_slot_is_used_last() {
    let image = image();
    let Some(mut devices) = machine(|_| ()) else {
        return;
    };
    let config = disk(&image, "disk", None);
    let rid = add(&mut devices, New::Disk(&config)).unwrap();
    assert!(devices.take_away(rid).is_some());
    assert!(devices.take_away(rid).is_none());
    assert_eq!(open(&image), 0);
    assert_eq!(read(&devices, 8), 1 << rid.device());
    let next = add(&mut devices, New::Disk(&config)).unwrap();
    assert_ne!(next, rid, "the guest may not have looked yet");
    // The guest lets go just before it would be taken away.
    eject(&devices, 1 << next.device());
    assert!(devices.take_away(next).is_none());
    assert_eq!(devices.ejected().len(), 1);
    assert_eq!(open(&image), 0);
}

/// The guest ejects on a vCPU's thread; what belonged to the device goes on another one, later.
#[test]
fn a_slot_is_used_again_when_its_device_is_gone_and_no_earlier() {
    let image = image();
    let Some(mut devices) = machine(|_| ()) else {
        return;
    };
    let config = |id: &str| disk(&image, id, Some("unit"));
    let first = add(&mut devices, New::Disk(&config("first"))).unwrap();
    assert!(!devices.is_let_go(first));
    eject(&devices, 1 << first.device());
    assert!(devices.is_let_go(first));
    let second = add(&mut devices, New::Disk(&config("second"))).unwrap();
    assert_ne!(first, second);
    let gone = devices.ejected();
    assert_eq!((gone.len(), &*gone[0].id), (1, "first"));
    assert!(!devices.is_let_go(first));
    assert!(devices.root.function(second).is_some());
    assert_eq!(
        add(&mut devices, New::Disk(&config("third"))).unwrap(),
        first
    );
}

#[test]
fn devices_of_the_boot_can_go_and_those_of_the_platform_cannot() {
    let image = image();
    let boot = |config: &mut VmConfig| config.disks.push(disk(&image, "boot", Some("unit")));
    let Some(mut devices) = machine(boot) else {
        return;
    };
    let rid = devices.find("boot").unwrap().rid;
    assert_eq!(read(&devices, 0), 0, "it was always there");
    let before = devices.root.rids();
    eject(&devices, u32::MAX);
    let gone = devices.ejected();
    assert_eq!((gone.len(), gone[0].rid), (1, rid));
    let stay: Vec<Rid> = before.into_iter().filter(|other| *other != rid).collect();
    assert_eq!(devices.root.rids(), stay);
    // What comes there is behind what the first one was behind.
    let again = add(
        &mut devices,
        New::Disk(&disk(&image, "again", Some("unit"))),
    )
    .unwrap();
    assert_eq!(again, rid);
}

#[test]
fn a_viommu_that_somebody_still_looks_at_has_no_endpoint_of_a_vm_that_is_gone() {
    let image = image();
    let Some(mut devices) = machine(|_| ()) else {
        return;
    };
    for viommu in ["unit", "paravirtual"] {
        let disk = disk(&image, viommu, Some(viommu));
        add(&mut devices, New::Disk(&disk)).unwrap();
    }
    let front_ends = devices.viommus().front_ends();
    let endpoints = || {
        let states = crate::vm::viommus::states(&front_ends).viommus;
        let count = states.iter().map(|state| match state {
            crate::vm::ViommuState::Vtd { unit, .. } => unit.endpoints.len(),
            crate::vm::ViommuState::Virtio { snapshot, .. } => snapshot.endpoints.len(),
        });
        count.collect::<Vec<_>>()
    };
    assert_eq!(endpoints(), [1, 1]);
    drop(devices);
    assert_eq!(endpoints(), [0, 0]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]
    #[test]
    fn whatever_order_devices_come_and_go_in_nothing_is_left(
        steps in prop::collection::vec((0..3u8, 0..3usize, any::<prop::sample::Index>()), 0..40)
    ) {
        let image = image();
        let Some(mut devices) = machine(|_| ()) else { return Ok(()) };
        let before = everything(&devices);
        let behind = [None, Some("unit"), Some("paravirtual")];
        let mut there: Vec<Rid> = Vec::new();
        for (n, (what, place, which)) in steps.into_iter().enumerate() {
            if what == 0 || there.is_empty() {
                let config = disk(&image, &format!("d{n}"), behind[place]);
                if let Ok(rid) = add(&mut devices, New::Disk(&config)) {
                    prop_assert!(!there.contains(&rid));
                    there.push(rid);
                }
                continue;
            }
            let rid = there.swap_remove(which.index(there.len()));
            if what == 1 {
                eject(&devices, 1 << rid.device());
                prop_assert_eq!(devices.ejected().len(), 1);
            } else {
                prop_assert!(devices.take_away(rid).is_some());
            }
            prop_assert_eq!(open(&image), there.len());
        }
        for rid in there {
            eject(&devices, 1 << rid.device());
        }
        devices.ejected();
        prop_assert_eq!(everything(&devices), before);
    }
}
