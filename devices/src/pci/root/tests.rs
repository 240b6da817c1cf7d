//! The root complex as a guest meets it: through ECAM, the ports and the buses.

use proptest::prelude::*;
use vmm_sys_util::eventfd::EventFd;

use super::*;
use crate::legacy::power::tests::Wishes;
use crate::pci::config::{ConfigSpace, Identity};

const MMIO32: u64 = 0xc000_0000;
const MMIO64: u64 = 0x10_0000_0000;

/// A function whose BARs answer with its device number, and which writes down what happens.
struct Dummy {
    name: u8,
    config: Mutex<ConfigSpace>,
    log: Mutex<Vec<String>>,
    events: Vec<IoEvent>,
}

fn dummy(name: u8, bars: &[Bar]) -> Arc<Dummy> {
    let mut config = ConfigSpace::new(Identity {
        vendor: 0x1234,
        device: name.into(),
        ..Identity::default()
    });
    for bar in bars {
        config.add_bar(*bar).unwrap();
    }
    let event = |offset| IoEvent {
        bar: 0,
        offset,
        length: 0,
        eventfd: Arc::new(EventFd::new(0).unwrap()),
    };
    Arc::new(Dummy {
        name,
        config: Mutex::new(config),
        log: Mutex::default(),
        events: vec![event(0x10), event(0x14)],
    })
}

impl PciFunction for Dummy {
    fn config_read(&self, offset: u16, data: &mut [u8]) {
        assert!(matches!(data.len(), 1 | 2 | 4));
        assert_eq!(
            usize::from(offset) / 4,
            (usize::from(offset) + data.len() - 1) / 4
        );
        self.config.lock().unwrap().read(offset, data);
    }
    fn config_write(&self, offset: u16, data: &[u8]) -> Effect {
        assert!(matches!(data.len(), 1 | 2 | 4));
        self.config.lock().unwrap().write(offset, data)
    }
    fn decoded(&self) -> Vec<Decoded> {
        self.config.lock().unwrap().decoded()
    }
    fn bars(&self) -> Vec<(Bar, u64)> {
        self.config.lock().unwrap().bars()
    }
    fn assign_bar(&self, bar: u8, address: u64) {
        self.config.lock().unwrap().assign_bar(bar, address);
    }
    fn bar_read(&self, bar: u8, _offset: u64, data: &mut [u8]) {
        data.fill(self.name << 4 | bar);
    }
    fn bar_write(&self, _bar: u8, _offset: u64, _data: &[u8]) -> Effect {
        Effect::default()
    }
    fn io_events(&self) -> Vec<IoEvent> {
        self.events.clone()
    }
    fn bar_mapped(&self, decoded: Decoded) {
        let note = format!("+{} {:#x}", decoded.bar, decoded.base);
        self.log.lock().unwrap().push(note);
    }
    fn bar_unmapped(&self, decoded: Decoded) {
        let note = format!("-{} {:#x}", decoded.bar, decoded.base);
        self.log.lock().unwrap().push(note);
    }
    fn reset(&self) -> Effect {
        let mut config = self.config.lock().unwrap();
        let _ = config.write(4, &[0, 0]);
        for (bar, _) in config.bars() {
            config.assign_bar(bar.index, 0);
        }
        Effect { decode: true }
    }
}

/// The addresses that are registered.
#[derive(Default)]
struct Doorbells(Mutex<BTreeSet<u64>>);

impl IoEventRegistry for Doorbells {
    fn add(&self, _space: Space, address: u64, _event: &IoEvent) -> io::Result<()> {
        assert!(self.0.lock().unwrap().insert(address), "registered twice");
        Ok(())
    }
    fn remove(&self, _space: Space, address: u64, _event: &IoEvent) {
        assert!(
            self.0.lock().unwrap().remove(&address),
            "was not registered"
        );
    }
}

struct Machine {
    root: Arc<PciRoot>,
    mmio: Arc<Bus>,
    pio: Arc<Bus>,
    doorbells: Arc<Doorbells>,
    ecam: Ecam,
}

fn machine() -> Machine {
    let (mmio, pio) = (Arc::new(Bus::mmio()), Arc::new(Bus::pio()));
    let doorbells = Arc::new(Doorbells::default());
    let root = PciRoot::new(
        RootConfig {
            mmio32: MMIO32..=0xdfff_ffff,
            mmio64: MMIO64..=0x1f_ffff_ffff,
            pio: 0xc000..=0xffff,
        },
        mmio.clone(),
        pio.clone(),
        doorbells.clone(),
    );
    Machine {
        ecam: Ecam(root.clone()),
        root,
        mmio,
        pio,
        doorbells,
    }
}

impl Machine {
    fn plug(&self, function: Arc<Dummy>) -> Rid {
        let slot = self.root.reserve(Placement::Any).unwrap();
        slot.fill(function).unwrap()
    }

    fn get(&self, rid: Rid, offset: u16) -> u32 {
        let mut data = [0; 4];
        self.ecam
            .read(u64::from(rid.0) << 12 | u64::from(offset), &mut data);
        u32::from_le_bytes(data)
    }

    fn put(&self, rid: Rid, offset: u16, value: u32) {
        let address = u64::from(rid.0) << 12 | u64::from(offset);
        self.ecam.write(address, &value.to_le_bytes());
    }

    fn at(&self, address: u64) -> u8 {
        let mut data = [0];
        self.mmio.read(address, &mut data);
        data[0]
    }
}

#[test]
fn the_host_bridge_is_at_00_00_0_and_nothing_reads_as_ones() {
    let machine = machine();
    assert_eq!(machine.get(Rid(0), 0), 0x0008_1b36);
    assert_eq!(machine.get(Rid(0), 8) >> 8, 0x06_00_00);
    assert_eq!(machine.get(Rid::new(0, 1, 0), 0), u32::MAX);
    assert_eq!(machine.get(Rid::new(3, 0, 0), 0), u32::MAX);
    machine.put(Rid::new(3, 0, 0), 4, 7);
}

#[test]
fn a_function_gets_addresses_when_it_is_plugged_and_answers_when_enabled() {
    let machine = machine();
    let function = dummy(3, &[Bar::memory64(0, 0x4000)]);
    let rid = machine.plug(function.clone());
    assert_eq!(rid, Rid::new(0, 1, 0));
    assert_eq!(function.bars()[0].1, MMIO64);
    assert_eq!(machine.at(MMIO64), 0xff, "not enabled yet");
    machine.put(rid, 4, 2);
    assert_eq!(machine.at(MMIO64), 0x30);
    assert_eq!(
        *machine.doorbells.0.lock().unwrap(),
        [MMIO64 + 0x10, MMIO64 + 0x14].into()
    );
    machine.put(rid, 4, 0);
    assert_eq!(machine.at(MMIO64), 0xff);
    assert!(machine.doorbells.0.lock().unwrap().is_empty());
    assert_eq!(
        *function.log.lock().unwrap(),
        ["+0 0x1000000000", "-0 0x1000000000"]
    );
}

#[test]
fn a_guest_moves_a_register_and_its_doorbells_go_along() {
    let machine = machine();
    let rid = machine.plug(dummy(1, &[Bar::memory64(0, 0x1000)]));
    machine.put(rid, 4, 2);
    machine.put(rid, 0x10, MMIO32 as u32);
    assert_eq!(
        machine.at(MMIO64),
        0xff,
        "half-written, and outside every window"
    );
    machine.put(rid, 0x14, 0);
    assert_eq!(machine.at(MMIO32), 0x10);
    assert_eq!(
        *machine.doorbells.0.lock().unwrap(),
        [MMIO32 + 0x10, MMIO32 + 0x14].into()
    );
}

#[test]
fn two_registers_at_one_address_do_not_both_answer_and_the_loser_comes_back() {
    let machine = machine();
    let first = machine.plug(dummy(1, &[Bar::memory64(0, 0x1000)]));
    let second = machine.plug(dummy(2, &[Bar::memory64(0, 0x1000)]));
    machine.put(first, 4, 2);
    machine.put(second, 4, 2);
    assert_eq!(
        (machine.at(MMIO64), machine.at(MMIO64 + 0x1000)),
        (0x10, 0x20)
    );
    machine.put(second, 0x10, MMIO64 as u32);
    assert_eq!(
        (machine.at(MMIO64), machine.at(MMIO64 + 0x1000)),
        (0x10, 0xff)
    );
    machine.put(first, 0x10, MMIO64 as u32 + 0x1000);
    assert_eq!(
        (machine.at(MMIO64), machine.at(MMIO64 + 0x1000)),
        (0x20, 0x10)
    );
}

#[test]
fn a_register_outside_the_windows_is_not_answered() {
    let machine = machine();
    let rid = machine.plug(dummy(1, &[Bar::memory64(0, 0x1000)]));
    machine.put(rid, 4, 2);
    for (high, low) in [(0, 0x10_0000), (0, 0xfee0_0000), (0xffff_ffff, 0xffff_f000)] {
        machine.put(rid, 0x14, high);
        machine.put(rid, 0x10, low);
        assert!(machine.mmio.ranges().is_empty(), "{high:#x} {low:#x}");
    }
}

#[test]
fn registers_of_every_kind_find_their_window_without_overlap() {
    let machine = machine();
    let bar = |index, kind, length| Bar {
        index,
        kind,
        prefetchable: false,
        length,
    };
    for name in 1..5 {
        machine.plug(dummy(
            name,
            &[
                bar(0, BarKind::Memory32, 0x1000),
                bar(1, BarKind::Memory32, 0x20_0000),
                bar(2, BarKind::Memory64, 0x100_0000),
                bar(4, BarKind::Io, 0x20),
            ],
        ));
    }
    for rid in machine.root.rids() {
        machine.put(rid, 4, 3);
    }
    assert_eq!(machine.mmio.ranges().len(), 12);
    assert_eq!(machine.pio.ranges().len(), 4);
}

#[test]
fn a_window_without_room_is_refused_and_the_slot_is_free_again() {
    let machine = machine();
    let huge = Bar {
        index: 0,
        kind: BarKind::Memory32,
        prefetchable: false,
        length: 0x4000_0000,
    };
    let slot = machine.root.reserve(Placement::Any).unwrap();
    let error = slot.fill(dummy(1, &[huge])).unwrap_err();
    assert_eq!(
        error.to_string(),
        "no 0x40000000 free bytes for base address register 0 of 00:01.0 in the 32-bit window: \
         make the window larger or remove a device"
    );
    assert_eq!(machine.root.rids().len(), 1);
    assert_eq!(machine.plug(dummy(2, &[])), Rid::new(0, 1, 0));
}

#[test]
fn an_address_is_given_once_until_it_is_free() {
    let machine = machine();
    let wanted = Rid::new(0, 5, 0);
    let slot = machine.root.reserve(Placement::At(wanted)).unwrap();
    let again = |rid| machine.root.reserve(Placement::At(rid)).map(drop);
    assert_eq!(again(wanted), Err(RootError::Taken(wanted)));
    assert_eq!(again(Rid(0)), Err(RootError::Taken(Rid(0))));
    assert_eq!(
        again(Rid::new(1, 0, 0)),
        Err(RootError::NoBus(Rid::new(1, 0, 0)))
    );
    drop(slot);
    assert_eq!(again(wanted), Ok(()));
    for _ in 1..32 {
        machine.plug(dummy(1, &[]));
    }
    assert_eq!(
        machine.root.reserve(Placement::Any).map(drop),
        Err(RootError::Full)
    );
}

#[test]
fn removing_a_function_leaves_nothing_of_it_behind() {
    let machine = machine();
    let function = dummy(1, &[Bar::memory64(0, 0x1000)]);
    let rid = machine.plug(function.clone());
    machine.put(rid, 4, 2);
    let gone = machine.root.remove(rid).unwrap();
    assert_eq!(machine.get(rid, 0), u32::MAX);
    assert!(machine.mmio.ranges().is_empty());
    assert!(machine.doorbells.0.lock().unwrap().is_empty());
    drop(gone);
    assert_eq!(Arc::strong_count(&function), 1);
    assert_eq!(
        machine.root.remove(rid).map(drop),
        Err(RootError::NoFunction(rid))
    );
    assert_eq!(machine.plug(dummy(2, &[])), rid);
}

#[test]
fn function_0_says_when_its_device_has_more_functions() {
    let machine = machine();
    let at = |function| Rid::new(0, 4, function);
    let fill = |function| {
        let slot = machine.root.reserve(Placement::At(at(function))).unwrap();
        slot.fill(dummy(function, &[])).unwrap();
    };
    fill(0);
    assert_eq!(machine.get(at(0), 0x0c) >> 16 & 0xff, 0);
    fill(3);
    assert_eq!(machine.get(at(0), 0x0c) >> 16 & 0xff, 0x80);
    assert_eq!(machine.get(at(3), 0x0c) >> 16 & 0xff, 0);
    let mut byte = [0];
    machine.root.config_read(at(0), 0x0e, &mut byte);
    assert_eq!(byte, [0x80]);
}

#[test]
fn a_platform_reset_gives_every_register_an_address_again() {
    let machine = machine();
    let function = dummy(1, &[Bar::memory64(0, 0x1000)]);
    let rid = machine.plug(function.clone());
    machine.put(rid, 0x10, MMIO32 as u32);
    machine.put(rid, 0x14, 0);
    machine.put(rid, 4, 2);
    machine.root.reset();
    assert!(machine.mmio.ranges().is_empty());
    assert_eq!(function.bars()[0].1, MMIO64);
}

#[test]
fn the_ports_reach_the_same_functions_and_0xcf9_resets() {
    let machine = machine();
    let rid = machine.plug(dummy(7, &[]));
    let wishes = Arc::new(Wishes::default());
    let ports = ConfigPorts::new(machine.root.clone(), wishes.clone());
    let mut data = [0; 4];
    ports.read(4, &mut data);
    assert_eq!(data, [0xff; 4], "not enabled");
    ports.write(0, &(0x8000_0003 | u32::from(rid.0) << 8).to_le_bytes());
    ports.read(0, &mut data);
    assert_eq!(
        u32::from_le_bytes(data),
        0x8000_0000 | u32::from(rid.0) << 8
    );
    ports.read(4, &mut data);
    assert_eq!(u32::from_le_bytes(data), 0x0007_1234);
    let mut word = [0; 2];
    ports.read(6, &mut word);
    assert_eq!(word, [7, 0]);
    ports.write(0, &(0x8000_003c | u32::from(rid.0) << 8).to_le_bytes());
    ports.write(4, &[11]);
    assert_eq!(machine.get(rid, 0x3c), 11);
    ports.write(1, &[2]);
    assert!(wishes.0.lock().unwrap().is_empty());
    ports.write(1, &[6]);
    assert_eq!(*wishes.0.lock().unwrap(), ["reset"]);
}

#[test]
fn an_access_of_8_bytes_or_across_a_dword_is_cut_into_what_functions_understand() {
    let machine = machine();
    let rid = machine.plug(dummy(7, &[]));
    let base = u64::from(rid.0) << 12;
    let mut data = [0; 8];
    machine.ecam.read(base, &mut data);
    assert_eq!(data[..4], [0x34, 0x12, 7, 0]);
    let mut word = [0; 4];
    machine.ecam.read(base + 1, &mut word);
    assert_eq!(word[..3], [0x12, 7, 0]);
    machine.ecam.write(base + 0x3b, &[9; 4]);
    assert_eq!(machine.get(rid, 0x3c), 9);
    machine.ecam.read(base + 0xfff, &mut word);
    assert_eq!(word[1..], [0xff; 3], "no function beyond its 4 KiB");
}

proptest! {
    #[test]
    fn an_address_found_is_free_aligned_and_in_the_window(
        start in 0..1000u64, size in 1..4000u64, exponent in 0..10u32,
        taken in prop::collection::vec((0..5000u64, 1..200u64), 0..20),
    ) {
        let (window, length) = (start..=start + size, 1u64 << exponent);
        let mut taken: Vec<_> = taken.into_iter().map(|(at, n)| at..=at + n - 1).collect();
        taken.sort_by_key(|range| *range.start());
        let free = |at: u64| {
            let last = at + length - 1;
            at > 0
                && window.contains(&at)
                && window.contains(&last)
                && taken.iter().all(|range| *range.end() < at || last < *range.start())
        };
        let lowest = (0..6000).map(|n| n * length).find(|&at| free(at));
        prop_assert_eq!(first_fit(&window, length, &taken), lowest);
    }

    #[test]
    fn whatever_a_guest_writes_to_configuration_space_the_buses_stay_in_step(
        writes in prop::collection::vec((0..4u8, 0..12u16, any::<u32>(), any::<u8>()), 0..120)
    ) {
        let machine = machine();
        for name in 1..4 {
            machine.plug(dummy(name, &[Bar::memory64(0, 0x1000), Bar::memory64(2, 0x10_0000)]));
        }
        for (device, register, value, near) in writes {
            // Mostly addresses near each other, so that registers meet.
            let value = match near % 4 {
                0 => value,
                1 => MMIO32 as u32 | value & 0x1f_f000,
                2 => u32::from(near) & 7,
                _ => 0x10,
            };
            machine.put(Rid::new(0, device, 0), 4 * register, value);
        }
        let mut decoded: Vec<Decoded> = Vec::new();
        for rid in machine.root.rids() {
            decoded.extend(machine.root.function(rid).unwrap().decoded());
        }
        let ranges = machine.mmio.ranges();
        for range in &ranges {
            let wanted = |d: &Decoded| {
                d.base == *range.start() && d.length - 1 == range.end() - range.start()
            };
            prop_assert!(decoded.iter().any(wanted));
            prop_assert!(*range.start() >= MMIO32);
        }
        let bells = machine.doorbells.0.lock().unwrap().clone();
        for bell in &bells {
            prop_assert!(ranges.iter().any(|range| range.contains(bell)));
        }
        // What is wanted, allowed and meets nothing is there.
        for one in &decoded {
            let Some(last) = one.base.checked_add(one.length - 1) else { continue };
            let meets = ranges.iter().any(|r| *r.start() <= last && one.base <= *r.end());
            prop_assert!(meets || !machine.root.in_window(one));
        }
    }
}
