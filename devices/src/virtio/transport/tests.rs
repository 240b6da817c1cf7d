//! The transport as a driver meets it: through configuration space and the BAR.

use viommu::Rid;
use viommu::backend::software::{EndpointConfig, Engine};
use virtio_bindings::virtio_config::{VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER};

use super::*;
use crate::testing::{FakeMsi, ram};
use crate::virtio::ring::RING_FEATURES;

const ACKNOWLEDGE: u8 = VIRTIO_CONFIG_S_ACKNOWLEDGE as u8;
const DRIVER: u8 = VIRTIO_CONFIG_S_DRIVER as u8;
const DRIVER_OK: u8 = VIRTIO_CONFIG_S_DRIVER_OK as u8;
const FEATURES_OK: u8 = VIRTIO_CONFIG_S_FEATURES_OK as u8;
const NEEDS_RESET: u8 = VIRTIO_CONFIG_S_NEEDS_RESET as u8;

/// A device that writes down what the transport does to it.
#[derive(Default)]
struct Dummy {
    log: Mutex<Vec<String>>,
    active: Mutex<Option<Activation>>,
    config: Mutex<[u8; 8]>,
    inline: bool,
    refuses: bool,
}

impl Dummy {
    fn log(&self) -> Vec<String> {
        std::mem::take(&mut self.log.lock().unwrap())
    }

    fn interrupt(&self) -> Arc<dyn VirtioInterrupt> {
        Arc::clone(&self.active.lock().unwrap().as_ref().unwrap().interrupt)
    }
}

impl VirtioDevice for Dummy {
    fn device_type(&self) -> DeviceType {
        DeviceType::Block
    }
    fn features(&self) -> u64 {
        RING_FEATURES | 0b11
    }
    fn queue_sizes(&self) -> &[u16] {
        &[64, 16]
    }
    fn accepts(&self, features: u64) -> bool {
        features & 0b11 != 0b10
    }
    fn read_config(&self, offset: u32, data: &mut [u8]) {
        data.fill(0);
        let config = self.config.lock().unwrap();
        for (to, from) in data.iter_mut().zip(config.iter().skip(offset as usize)) {
            *to = *from;
        }
    }
    fn write_config(&self, offset: u32, data: &[u8]) {
        let mut config = self.config.lock().unwrap();
        for (to, from) in config.iter_mut().skip(offset as usize).zip(data) {
            *to = *from;
        }
    }
    fn activate(&self, activation: Activation) -> io::Result<()> {
        let enabled: Vec<bool> = activation.queues.iter().map(Option::is_some).collect();
        let features = activation.features & 0b11;
        self.log
            .lock()
            .unwrap()
            .push(format!("activate {features:#b} {enabled:?}"));
        *self.active.lock().unwrap() = Some(activation);
        if self.refuses {
            return Err(io::Error::other("no thread"));
        }
        Ok(())
    }
    fn notifies_inline(&self) -> bool {
        self.inline
    }
    fn notify(&self, index: u16) {
        self.log.lock().unwrap().push(format!("notify {index}"));
    }
    fn reset(&self) {
        self.log.lock().unwrap().push("reset".into());
        *self.active.lock().unwrap() = None;
    }
}

struct Guest {
    pci: Arc<VirtioPci>,
    device: Arc<Dummy>,
    msi: FakeMsi,
}

fn guest_with(device: Dummy) -> Guest {
    guest_behind(device, DmaPort::direct(ram()))
}

fn guest_behind(device: Dummy, port: DmaPort) -> Guest {
    let (device, msi) = (Arc::new(device), FakeMsi::default());
    let pci = VirtioPci::new(device.clone(), port, &msi).unwrap();
    let guest = Guest { pci, device, msi };
    guest.set_command(BUS_MASTER);
    guest
}

fn guest() -> Guest {
    guest_with(Dummy::default())
}

/// Bus Master Enable in the Command register.
const BUS_MASTER: u16 = 1 << 2;

impl Guest {
    fn set_command(&self, command: u16) {
        let _ = self.pci.config_write(4, &command.to_le_bytes());
    }

    fn get(&self, offset: u64, length: usize) -> u64 {
        let mut data = [0; 8];
        self.pci.bar_read(BAR, offset, &mut data[..length]);
        u64::from_le_bytes(data)
    }

    fn put(&self, offset: u64, value: u64, length: usize) {
        let effect = self
            .pci
            .bar_write(BAR, offset, &value.to_le_bytes()[..length]);
        assert_eq!(effect, Effect::default());
    }

    fn status(&self) -> u8 {
        self.get(20, 1) as u8
    }

    fn set_status(&self, status: u8) {
        self.put(20, status.into(), 1);
    }

    /// Negotiates `features` up to FEATURES_OK; what the device left of the status.
    fn negotiate(&self, features: u64) -> u8 {
        self.set_status(ACKNOWLEDGE);
        self.set_status(ACKNOWLEDGE | DRIVER);
        for half in 0..2 {
            self.put(8, half, 4);
            self.put(12, features >> (32 * half) & 0xffff_ffff, 4);
        }
        self.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK);
        self.status()
    }

    fn enable_queue(&self, index: u16, base: u64) {
        self.put(22, index.into(), 2);
        self.put(32, base, 8);
        self.put(40, base.wrapping_add(0x1000) & 0xffff_ffff, 4);
        self.put(44, 0, 4);
        self.put(48, base.wrapping_add(0x2000), 8);
        self.put(26, u64::from(index) + 1, 2);
        self.put(28, 1, 2);
    }

    fn start(&self) {
        assert_ne!(self.negotiate(FULL) & FEATURES_OK, 0);
        self.enable_queue(0, 0x1_0000);
        self.set_status(self.status() | DRIVER_OK);
    }

    /// Unmasks and enables every vector; vector n sends data 0x40 + n.
    fn enable_msix(&self) {
        for vector in 0..3 {
            let entry = MSIX_TABLE + 16 * vector;
            self.put(entry, 0xfee0_0000, 8);
            self.put(entry + 8, 0x40 + vector, 4);
            self.put(entry + 12, 0, 4);
        }
        let control = self.pci.msix_capability + 2;
        let _ = self.pci.config_write(control, &0x8000u16.to_le_bytes());
    }
}

const FULL: u64 = 1 << VIRTIO_F_VERSION_1 | RING_FEATURES | 1;

#[test]
fn its_capabilities_name_every_structure_inside_the_bar() {
    let guest = guest();
    let read = |offset: u16| {
        let mut byte = [0];
        guest.pci.config_read(offset, &mut byte);
        byte[0]
    };
    let dword = |offset: u16| u32::from_le_bytes([0, 1, 2, 3].map(|n| read(offset + n)));
    assert_eq!(dword(0), 0x1042_1af4);
    let (mut at, mut kinds) = (u16::from(read(0x34)), Vec::new());
    while at != 0 {
        if read(at) == 0x09 {
            let kind = read(at + 3);
            kinds.push(kind);
            assert!(u64::from(dword(at + 8)) + u64::from(dword(at + 12)) <= BAR_LENGTH);
            assert_eq!(
                u16::from(read(at + 2)),
                if kind == 2 || kind == 5 { 20 } else { 16 }
            );
        }
        at = read(at + 1).into();
    }
    assert_eq!(kinds, [1, 3, 4, 2, 5]);
}

#[test]
fn a_driver_sets_up_queues_and_the_device_starts_with_them() {
    let guest = guest();
    assert_eq!(guest.get(18, 2), 2, "num_queues");
    guest.start();
    assert_eq!(
        guest.status(),
        ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK
    );
    assert_eq!(guest.device.log(), ["activate 0b1 [true, false]"]);
}

#[test]
fn feature_negotiation_fails_where_the_specification_says_so() {
    for (features, why) in [
        (RING_FEATURES | 1, "VERSION_1 is missing: a legacy driver"),
        (FULL | 1 << 40, "a bit that was not offered"),
        (
            1 << VIRTIO_F_VERSION_1 | 0b10,
            "the device does not accept it",
        ),
    ] {
        let guest = guest();
        assert_eq!(guest.negotiate(features) & FEATURES_OK, 0, "{why}");
        guest.set_status(guest.status() | DRIVER_OK);
        assert_ne!(guest.status() & NEEDS_RESET, 0, "{why}");
        assert!(guest.device.log().is_empty(), "{why}");
    }
}

#[test]
fn behind_a_viommu_a_driver_must_take_access_platform_and_rings_need_a_translation() {
    let engine = Engine::new(ram());
    let rid = Rid::new(0, 4, 0);
    let port = engine.add_endpoint(rid, EndpointConfig::default()).unwrap();
    let guest = guest_behind(Dummy::default(), port);
    guest.put(0, 1, 4);
    assert_eq!(guest.get(4, 4), 0b11, "VERSION_1 and ACCESS_PLATFORM");
    assert_eq!(
        guest.negotiate(FULL) & FEATURES_OK,
        0,
        "it would hand out GPAs"
    );
    guest.set_status(0);
    let features = FULL | 1 << VIRTIO_F_ACCESS_PLATFORM;
    assert_ne!(guest.negotiate(features) & FEATURES_OK, 0);
    guest.enable_queue(0, 0x1_0000);
    guest.set_status(guest.status() | DRIVER_OK);
    assert_ne!(guest.status() & NEEDS_RESET, 0, "Blocked");
}

#[test]
fn features_cannot_change_after_features_ok() {
    let guest = guest();
    guest.negotiate(FULL);
    guest.put(8, 0, 4);
    guest.put(12, 0, 4);
    assert_eq!(guest.get(12, 4), FULL & 0xffff_ffff);
}

#[test]
fn the_offered_features_are_read_in_halves() {
    let guest = guest();
    assert_eq!(guest.get(4, 4), RING_FEATURES | 0b11);
    guest.put(0, 1, 4);
    assert_eq!(guest.get(4, 4), 1, "VERSION_1 is bit 32");
    guest.put(0, 2, 4);
    assert_eq!(guest.get(4, 4), 0);
}

#[test]
fn a_queue_that_does_not_exist_has_size_0() {
    let guest = guest();
    guest.put(22, 1, 2);
    assert_eq!(guest.get(24, 2), 16);
    guest.put(22, 2, 2);
    assert_eq!(guest.get(24, 2), 0);
    assert_eq!(guest.get(26, 2), 0xffff);
    guest.put(28, 1, 2);
    assert_eq!(guest.get(28, 2), 0);
}

#[test]
fn a_queue_takes_sizes_that_are_powers_of_two_up_to_its_own() {
    let guest = guest();
    for (written, read) in [(128, 64), (24, 64), (0, 64), (32, 32), (64, 64)] {
        guest.put(24, written, 2);
        assert_eq!(guest.get(24, 2), read);
    }
}

#[test]
fn an_enabled_queue_is_frozen_until_reset() {
    let guest = guest();
    guest.negotiate(FULL);
    guest.enable_queue(0, 0x1_0000);
    guest.put(32, 0x5_0000, 8);
    guest.put(24, 16, 2);
    guest.put(28, 0, 2);
    assert_eq!(guest.get(32, 8), 0x1_0000);
    assert_eq!(guest.get(24, 2), 64);
    assert_eq!(guest.get(28, 2), 1);
    guest.set_status(0);
    assert_eq!(guest.get(28, 2), 0);
}

#[test]
fn a_vector_that_does_not_exist_reads_back_as_none() {
    let guest = guest();
    for (written, read) in [(0, 0), (2, 2), (3, 0xffff), (0xffff, 0xffff)] {
        guest.put(16, written, 2);
        assert_eq!(guest.get(16, 2), read);
        guest.put(26, written, 2);
        assert_eq!(guest.get(26, 2), read);
    }
}

#[test]
fn an_active_device_that_loses_bus_mastering_stops_and_needs_a_reset() {
    let guest = guest();
    guest.start();
    guest.device.log();
    guest.set_command(BUS_MASTER | 1 << 1);
    assert_eq!(guest.device.log(), Vec::<String>::new(), "it kept it");
    guest.set_command(0);
    assert_eq!(guest.device.log(), ["reset"]);
    assert_ne!(guest.status() & NEEDS_RESET, 0);
    guest.set_command(BUS_MASTER);
    assert_eq!(
        guest.device.log(),
        Vec::<String>::new(),
        "old rings stay untouched"
    );
    guest.set_status(0);
    guest.start();
    assert_eq!(guest.status() & NEEDS_RESET, 0);
    assert_eq!(guest.device.log(), ["activate 0b1 [true, false]"]);
}

#[test]
fn a_device_does_not_start_without_bus_mastering() {
    let guest = guest();
    guest.set_command(0);
    guest.start();
    assert_ne!(guest.status() & NEEDS_RESET, 0);
    assert_eq!(guest.device.log(), Vec::<String>::new());
    guest.set_command(BUS_MASTER);
    let _ = guest.pci.reset();
    guest.start();
    assert_ne!(guest.status() & NEEDS_RESET, 0, "a reset clears it");
}

#[test]
fn messages_wait_for_bus_mastering() {
    let guest = guest();
    guest.enable_msix();
    guest.start();
    let interrupt = guest.device.interrupt();
    guest.set_command(0);
    interrupt.queue(0);
    assert_eq!(guest.get(MSIX_PBA, 8) & 1 << 1, 1 << 1);
    guest.set_command(BUS_MASTER);
    assert_eq!(guest.get(MSIX_PBA, 8), 0);
    assert_eq!(guest.msi.get(1).signals(), 1);
}

#[test]
fn a_status_of_0_resets_and_waits_for_the_device() {
    let guest = guest();
    guest.start();
    guest.device.log();
    guest.put(16, 1, 2);
    guest.set_status(0);
    assert_eq!(guest.device.log(), ["reset"]);
    assert_eq!(guest.status(), 0);
    assert_eq!(guest.get(16, 2), 0xffff);
    guest.start();
    assert_eq!(guest.device.log(), ["activate 0b1 [true, false]"]);
}

#[test]
fn a_ring_outside_memory_needs_a_reset() {
    let guest = guest();
    guest.negotiate(FULL);
    guest.enable_queue(0, !0xfff);
    guest.set_status(guest.status() | DRIVER_OK);
    assert_ne!(guest.status() & NEEDS_RESET, 0);
    assert!(guest.device.log().is_empty());
}

#[test]
fn a_device_that_does_not_start_needs_a_reset() {
    let guest = guest_with(Dummy {
        refuses: true,
        ..Dummy::default()
    });
    guest.start();
    assert_ne!(guest.status() & NEEDS_RESET, 0);
    guest.set_status(0);
    assert_eq!(guest.status(), 0);
}

#[test]
fn interrupts_go_to_the_vectors_that_the_driver_chose() {
    let guest = guest();
    guest.enable_msix();
    guest.put(16, 0, 2);
    guest.start();
    let interrupt = guest.device.interrupt();
    interrupt.queue(0);
    assert_eq!(guest.msi.get(1).signals(), 1);
    assert_eq!(guest.msi.get(1).route().unwrap().data, 0x41);
    interrupt.queue(1);
    interrupt.queue(77);
    assert_eq!(guest.msi.get(2).signals(), 0, "queue 1 has no vector");
    let generation = guest.get(21, 1);
    interrupt.config();
    assert_eq!(guest.msi.get(0).signals(), 1);
    assert_ne!(guest.get(21, 1), generation);
    assert_eq!(guest.get(ISR, 1), 0, "not used while MSI-X is enabled");
    interrupt.needs_reset();
    assert_eq!(guest.msi.get(0).signals(), 1);
    assert_ne!(guest.status() & NEEDS_RESET, 0);
    guest.set_status(0);
    assert_eq!(guest.status(), 0);
}

#[test]
fn without_msix_the_isr_says_what_happened_and_reading_clears_it() {
    let guest = guest();
    guest.start();
    guest.device.interrupt().queue(0);
    guest.device.interrupt().config();
    assert_eq!(guest.get(ISR, 1), 3);
    assert_eq!(guest.get(ISR, 1), 0);
}

#[test]
fn a_notification_signals_its_queue_or_is_served_inline() {
    let guest = guest();
    let events = guest.pci.io_events();
    let places: Vec<u64> = events.iter().map(|event| event.offset).collect();
    assert_eq!(places, [NOTIFY, NOTIFY + 4]);
    guest.put(NOTIFY + 4, 1, 2);
    guest.put(NOTIFY + 8, 2, 2);
    assert!(events[0].eventfd.read().is_err());
    assert_eq!(events[1].eventfd.read().unwrap(), 1);

    let inline = guest_with(Dummy {
        inline: true,
        ..Dummy::default()
    });
    assert!(
        inline.pci.io_events().is_empty(),
        "an exit is what it wants"
    );
    inline.put(NOTIFY + 4, 1, 2);
    assert_eq!(inline.device.log(), ["notify 1"]);
}

#[test]
fn the_window_in_configuration_space_shows_the_bar() {
    let guest = guest();
    let cap = guest.pci.pci_capability;
    let point = |bar: u8, offset: u32, length: u32| {
        let _ = guest.pci.config_write(cap + 4, &[bar]);
        let _ = guest.pci.config_write(cap + 8, &offset.to_le_bytes());
        let _ = guest.pci.config_write(cap + 12, &length.to_le_bytes());
    };
    let window = || {
        let mut data = [0; 4];
        guest.pci.config_read(cap + 16, &mut data);
        u32::from_le_bytes(data)
    };
    point(0, 18, 2);
    assert_eq!(window(), 2, "num_queues");
    point(0, DEVICE as u32, 4);
    let _ = guest.pci.config_write(cap + 16, &[1, 2, 3, 4]);
    assert_eq!(window(), 0x0403_0201);
    assert_eq!(guest.get(DEVICE, 4), 0x0403_0201);
    for (bar, offset, length) in [
        (1, DEVICE as u32, 4),
        (0, DEVICE as u32 + 1, 4),
        (0, DEVICE as u32, 3),
        (0, BAR_LENGTH as u32, 4),
        (0, u32::MAX, 1),
        (0, !3, 4),
    ] {
        point(bar, offset, length);
        let _ = guest.pci.config_write(cap + 16, &[9; 4]);
        assert_eq!(
            guest.get(DEVICE, 4),
            0x0403_0201,
            "{bar} {offset:#x} {length}"
        );
    }
}

#[test]
fn a_function_reset_forgets_everything_the_guest_wrote() {
    let guest = guest();
    guest.enable_msix();
    guest.start();
    guest.pci.assign_bar(BAR, 0x8000_0000);
    let _ = guest.pci.config_write(4, &[6]);
    assert_eq!(guest.pci.decoded().len(), 1);
    assert!(guest.pci.reset().decode);
    assert!(guest.pci.decoded().is_empty());
    assert_eq!(guest.status(), 0);
    assert_eq!(guest.msi.get(1).route(), None);
    assert_eq!(guest.get(MSIX_TABLE + 12, 4), 1, "masked");
}

#[test]
fn dropping_the_function_stops_the_device() {
    let guest = guest();
    guest.start();
    let device = Arc::clone(&guest.device);
    drop(guest);
    assert_eq!(device.log().last().unwrap(), "reset");
}
