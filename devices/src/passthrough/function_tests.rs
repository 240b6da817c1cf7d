use std::sync::Weak;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use viommu::interrupt::Msi;
use vmm_sys_util::tempfile::TempFile;

use super::super::config::tests::{LENGTHS, nvme};
use super::super::hardware::Region;
use super::*;
use crate::interrupt::fake::FakeMsi;
use crate::interrupt::{EndOfInterrupt, IrqLine};

/// A device of memory, which records what is asked of it.
struct Fake {
    config: Mutex<Vec<u8>>,
    bar: Mutex<Vec<u8>>,
    rom: Mutex<Vec<u8>>,
    backing: TempFile,
    connected: Mutex<BTreeMap<Irq, Vec<i32>>>,
    resets: AtomicUsize,
    /// Command registers as they were at resets.
    commands: Mutex<Vec<u8>>,
    unmasked: AtomicUsize,
    peers: bool,
    intx: bool,
}

impl Fake {
    fn new() -> Self {
        let backing = TempFile::new().unwrap();
        backing.as_file().set_len(0x4000).unwrap();
        Self {
            config: Mutex::new(nvme().to_vec()),
            bar: Mutex::new(vec![0; 0x4000]),
            rom: Mutex::new(vec![0; LENGTHS[6] as usize]),
            backing,
            connected: Mutex::default(),
            resets: AtomicUsize::new(0),
            commands: Mutex::default(),
            unmasked: AtomicUsize::new(0),
            peers: true,
            intx: false,
        }
    }

    fn memory(&self, region: u32) -> &Mutex<Vec<u8>> {
        match region {
            CONFIG => &self.config,
            6 => &self.rom,
            _ => &self.bar,
        }
    }

    fn vectors(&self, irq: Irq) -> usize {
        self.connected.lock().unwrap().get(&irq).map_or(0, Vec::len)
    }
}

impl Hardware for Fake {
    fn read(&self, region: u32, offset: u64, data: &mut [u8]) -> io::Result<()> {
        let memory = self.memory(region).lock().unwrap();
        let start = offset as usize;
        let from = memory.get(start..start + data.len());
        data.copy_from_slice(from.ok_or(io::ErrorKind::InvalidInput)?);
        Ok(())
    }

    fn write(&self, region: u32, offset: u64, data: &[u8]) -> io::Result<()> {
        let mut memory = self.memory(region).lock().unwrap();
        let start = offset as usize;
        let to = memory.get_mut(start..start + data.len());
        to.ok_or(io::ErrorKind::InvalidInput)?.copy_from_slice(data);
        Ok(())
    }

    fn region(&self, region: u32) -> Region {
        let length = match region {
            CONFIG => 4096,
            0..=6 => LENGTHS[region as usize],
            _ => 0,
        };
        let mappable = if region == 0 {
            vec![(0, length)]
        } else {
            Vec::new()
        };
        Region { length, mappable }
    }

    fn map(&self, region: u32, offset: u64, length: u64) -> io::Result<Arc<Mapping>> {
        assert_eq!(region, 0);
        Mapping::new(self.backing.as_file().as_fd(), offset, length).map(Arc::new)
    }

    fn interrupts(&self, irq: Irq) -> u32 {
        match irq {
            Irq::Intx => u32::from(self.intx),
            Irq::Msi => 32,
            Irq::Msix => 33,
            Irq::Error | Irq::Request => 1,
        }
    }

    fn connect(&self, irq: Irq, eventfds: &[std::os::fd::BorrowedFd<'_>]) -> io::Result<()> {
        use std::os::fd::AsRawFd;
        let fds = eventfds.iter().map(|fd| fd.as_raw_fd()).collect();
        self.connected.lock().unwrap().insert(irq, fds);
        Ok(())
    }

    fn unmask_line(&self) -> io::Result<()> {
        self.unmasked.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }

    fn reset(&self) -> io::Result<()> {
        self.resets.fetch_add(1, Ordering::SeqCst);
        let command = self.config.lock().unwrap()[4];
        self.commands.lock().unwrap().push(command);
        Ok(())
    }

    fn export(&self, _region: u32, _offset: u64, _length: u64) -> io::Result<OwnedFd> {
        if !self.peers {
            return Err(io::Error::from_raw_os_error(libc::ENOTTY));
        }
        Ok(self.backing.as_file().try_clone()?.into())
    }
}

#[derive(Default)]
struct Slots(Mutex<BTreeMap<u64, u64>>);

impl DirectMemory for Slots {
    fn add(&self, gpa: u64, mapping: Arc<Mapping>) -> io::Result<()> {
        self.0.lock().unwrap().insert(gpa, mapping.length());
        Ok(())
    }
    fn remove(&self, gpa: u64) {
        self.0.lock().unwrap().remove(&gpa).unwrap();
    }
}

impl PeerMemory for Slots {
    fn add(&self, gpa: u64, _buffer: OwnedFd, length: u64) -> io::Result<()> {
        self.0.lock().unwrap().insert(gpa, length);
        Ok(())
    }
    fn remove(&self, gpa: u64) {
        self.0.lock().unwrap().remove(&gpa).unwrap();
    }
}

struct Bench {
    fake: Arc<Fake>,
    function: Arc<VfioPci>,
    msi: FakeMsi,
    slots: Arc<Slots>,
    peers: Arc<Slots>,
}

impl Bench {
    fn new(fake: Fake, line: Option<Arc<dyn LevelLine>>) -> Self {
        let fake = Arc::new(fake);
        let msi = FakeMsi::default();
        let (slots, peers) = (Arc::<Slots>::default(), Arc::<Slots>::default());
        let offer = Offer {
            pin: 1,
            ..Offer::default()
        };
        let connections = Connections {
            messages: &msi,
            line,
            direct: slots.clone(),
            peers: Some(peers.clone()),
        };
        let function = VfioPci::new(fake.clone(), offer, connections).unwrap();
        Self {
            fake,
            function,
            msi,
            slots,
            peers,
        }
    }

    fn routes(&self) -> Vec<Option<Msi>> {
        let vectors = self.msi.vectors();
        vectors
            .iter()
            .flat_map(|vector| vector.take_routes())
            .collect()
    }

    fn write(&self, at: u16, data: &[u8]) {
        let _ = self.function.config_write(at, data);
    }
}

const MSI: Msi = Msi {
    address: 0xfee0_1000,
    data: 0x4041,
};

#[test]
fn error_and_request_events_are_connected_from_the_start() {
    let bench = Bench::new(Fake::new(), None);
    assert_eq!(bench.fake.vectors(Irq::Error), 1);
    assert_eq!(bench.fake.vectors(Irq::Request), 1);
    assert!(bench.function.error_event().read().is_err());
}

#[test]
fn msix_is_programmed_by_the_guest_and_delivered_by_the_kernel() {
    let bench = Bench::new(Fake::new(), None);
    // Entry 3, unmasked.
    bench
        .function
        .bar_write(0, 0x2030, &MSI.address.to_le_bytes())
        .decode
        .then(|| panic!());
    let _ = bench.function.bar_write(0, 0x2038, &MSI.data.to_le_bytes());
    let _ = bench.function.bar_write(0, 0x203c, &0u32.to_le_bytes());
    assert_eq!(bench.fake.vectors(Irq::Msix), 0, "not enabled yet");
    bench.write(0xb2, &0x8000u16.to_le_bytes());
    assert_eq!(bench.fake.vectors(Irq::Msix), 33);
    assert!(bench.routes().contains(&Some(MSI)));
    // The table that the guest reads is ours; the device's own was never touched.
    let mut data = [0; 4];
    bench.function.bar_read(0, 0x2038, &mut data);
    assert_eq!(u32::from_le_bytes(data), MSI.data);
    assert!(bench.fake.bar.lock().unwrap().iter().all(|&byte| byte == 0));
    bench.write(0xb2, &0u16.to_le_bytes());
    assert_eq!(bench.fake.vectors(Irq::Msix), 0);
}

#[test]
fn msi_is_programmed_in_the_devices_own_layout() {
    let bench = Bench::new(Fake::new(), None);
    bench.write(0x54, &(MSI.address as u32).to_le_bytes());
    bench.write(0x58, &0u32.to_le_bytes());
    bench.write(0x5c, &(MSI.data as u16).to_le_bytes());
    // Four of the 32 vectors, with vector 2 masked.
    bench.write(0x60, &4u32.to_le_bytes());
    bench.write(0x52, &(1u16 | 2 << 4).to_le_bytes());
    assert_eq!(bench.fake.vectors(Irq::Msi), 4);
    let routes = bench.routes();
    let with = |data| Some(Msi { data, ..MSI });
    assert!(routes.contains(&with(0x4040)) && routes.contains(&with(0x4043)));
    assert!(!routes.contains(&with(0x4042)), "masked");
    bench.write(0x52, &0u16.to_le_bytes());
    assert_eq!(bench.fake.vectors(Irq::Msi), 0);
}

#[test]
fn msix_and_msi_are_never_connected_together() {
    let bench = Bench::new(Fake::new(), None);
    bench.write(0x52, &1u16.to_le_bytes());
    bench.write(0xb2, &0x8000u16.to_le_bytes());
    assert_eq!(
        (bench.fake.vectors(Irq::Msi), bench.fake.vectors(Irq::Msix)),
        (0, 33)
    );
}

#[test]
fn bars_are_direct_but_for_the_pages_of_tables_and_follow_their_moves() {
    let bench = Bench::new(Fake::new(), None);
    bench.function.assign_bar(0, 0x8000_0000);
    bench.write(0x04, &2u16.to_le_bytes());
    let at = |base| Decoded {
        space: Space::Mmio,
        base,
        length: 0x4000,
        bar: 0,
    };
    assert_eq!(bench.function.decoded(), [at(0x8000_0000)]);
    bench.function.bar_mapped(at(0x8000_0000));
    let shown = BTreeMap::from([(0x8000_0000, 0x2000)]);
    assert_eq!(*bench.slots.0.lock().unwrap(), shown);
    assert_eq!(*bench.peers.0.lock().unwrap(), shown);
    bench.function.bar_unmapped(at(0x8000_0000));
    bench.function.bar_mapped(at(0x9000_0000));
    let shown = BTreeMap::from([(0x9000_0000, 0x2000)]);
    assert_eq!(*bench.slots.0.lock().unwrap(), shown);
    bench.function.bar_unmapped(at(0x9000_0000));
    assert!(bench.slots.0.lock().unwrap().is_empty() && bench.peers.0.lock().unwrap().is_empty());
}

#[test]
fn a_host_without_p2p_loses_p2p_and_nothing_else() {
    let fake = Fake {
        peers: false,
        ..Fake::new()
    };
    let bench = Bench::new(fake, None);
    let decoded = Decoded {
        space: Space::Mmio,
        base: 0x8000_0000,
        length: 0x4000,
        bar: 0,
    };
    bench.function.bar_mapped(decoded);
    assert_eq!(bench.slots.0.lock().unwrap().len(), 1);
    assert!(bench.peers.0.lock().unwrap().is_empty());
    bench.function.bar_unmapped(decoded);
}

#[test]
fn what_is_trapped_and_no_table_reaches_the_device() {
    let bench = Bench::new(Fake::new(), None);
    let _ = bench.function.bar_write(0, 0x2800, &7u32.to_le_bytes());
    assert_eq!(bench.fake.bar.lock().unwrap()[0x2800], 7);
    let mut data = [0; 4];
    bench.function.bar_read(0, 0x2800, &mut data);
    assert_eq!(data, [7, 0, 0, 0]);
    // Beyond the register nobody answers.
    bench.function.bar_read(0, 0x4000, &mut data);
    assert_eq!(data, [0xff; 4]);
}

#[test]
fn command_reaches_the_hardware_and_interrupt_registers_do_not() {
    let bench = Bench::new(Fake::new(), None);
    bench.write(0x04, &6u16.to_le_bytes());
    assert_eq!(bench.fake.config.lock().unwrap()[4], 6);
    let before = bench.fake.config.lock().unwrap()[0x50..0x68].to_vec();
    for at in (0x50..0x68).step_by(4) {
        bench.write(at, &[0xff; 4]);
    }
    assert_eq!(bench.fake.config.lock().unwrap()[0x50..0x68], before);
}

#[test]
fn a_function_level_reset_resets_the_device_and_all_that_the_guest_had_set() {
    let bench = Bench::new(Fake::new(), None);
    bench.function.assign_bar(0, 0x8000_0000);
    bench.write(0x04, &6u16.to_le_bytes());
    bench.write(0xb2, &0x8000u16.to_le_bytes());
    let effect = bench.function.config_write(0x78, &0x8000u16.to_le_bytes());
    assert!(effect.decode);
    assert_eq!(bench.fake.resets.load(Ordering::SeqCst), 1);
    // The kernel restores it after the reset, so bus mastering is off before.
    assert_eq!(*bench.fake.commands.lock().unwrap(), [2]);
    assert_eq!(bench.fake.vectors(Irq::Msix), 0);
    assert!(bench.function.decoded().is_empty());
    let _ = bench.function.reset();
    assert_eq!(bench.fake.resets.load(Ordering::SeqCst), 2);
}

/// A pin whose observer is the test's to call.
#[derive(Default)]
struct Pin {
    levels: Mutex<Vec<bool>>,
    observer: Mutex<Option<Weak<dyn EndOfInterrupt>>>,
}

impl Pin {
    fn levels(&self) -> Vec<bool> {
        self.levels.lock().unwrap().clone()
    }

    fn end(&self) {
        let observer = self.observer.lock().unwrap().clone();
        observer.unwrap().upgrade().unwrap().ended();
    }
}

impl IrqLine for Pin {
    fn set(&self, level: bool) {
        self.levels.lock().unwrap().push(level);
    }
}

impl LevelLine for Pin {
    fn watch(&self, observer: Weak<dyn EndOfInterrupt>) {
        *self.observer.lock().unwrap() = Some(observer);
    }
}

/// A function with a line, and its pin.
fn with_line() -> (Bench, Arc<Pin>) {
    let fake = Fake {
        intx: true,
        ..Fake::new()
    };
    let pin = Arc::new(Pin::default());
    (Bench::new(fake, Some(pin.clone())), pin)
}

fn until(done: impl Fn() -> bool) {
    let end = Instant::now() + Duration::from_secs(200);
    while !done() {
        assert!(Instant::now() < end);
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// The device interrupts, as VFIO says it.
fn interrupt(bench: &Bench) {
    let line = bench.function.line.as_ref().unwrap();
    line.event().write(1).unwrap();
}

#[test]
fn a_line_is_high_until_the_guest_ends_the_interrupt_and_is_then_unmasked() {
    let (bench, pin) = with_line();
    let unmasked = || bench.fake.unmasked.load(Ordering::SeqCst);
    assert_eq!(bench.fake.vectors(Irq::Intx), 1);
    pin.end();
    assert_eq!((pin.levels(), unmasked()), (vec![], 0), "it was not high");
    interrupt(&bench);
    until(|| pin.levels() == [true]);
    assert_eq!(unmasked(), 0);
    pin.end();
    assert_eq!((pin.levels(), unmasked()), (vec![true, false], 1));
    interrupt(&bench);
    until(|| pin.levels() == [true, false, true]);
}

#[test]
fn a_line_falls_when_messages_take_over_and_with_a_reset() {
    let (bench, pin) = with_line();
    let unmasked = || bench.fake.unmasked.load(Ordering::SeqCst);
    interrupt(&bench);
    until(|| pin.levels() == [true]);
    bench.write(0xb2, &0x8000u16.to_le_bytes());
    assert_eq!(pin.levels(), [true, false]);
    pin.end();
    assert_eq!(unmasked(), 0, "the line is not in use");
    bench.write(0xb2, &0u16.to_le_bytes());
    interrupt(&bench);
    until(|| pin.levels() == [true, false, true]);
    let _ = bench.function.reset();
    assert_eq!(pin.levels(), [true, false, true, false]);
    assert_eq!(bench.fake.vectors(Irq::Intx), 1, "and serves again");
}

#[test]
fn a_line_serves_until_messages_are_enabled_and_again_after_them() {
    let (bench, _) = with_line();
    let connected = || (bench.fake.vectors(Irq::Intx), bench.fake.vectors(Irq::Msix));
    assert_eq!(connected(), (1, 0));
    bench.write(0xb2, &0x8000u16.to_le_bytes());
    assert_eq!(connected().0, 0, "both at once");
    assert_ne!(connected().1, 0);
    bench.write(0xb2, &0u16.to_le_bytes());
    assert_eq!(connected(), (1, 0));
}

#[test]
fn a_guest_that_writes_anything_anywhere_breaks_only_itself() {
    let bench = Bench::new(Fake::new(), None);
    for at in (0..4096u16).step_by(4) {
        let effect = bench.function.config_write(at, &[0xff; 4]);
        let mut data = [0; 4];
        bench.function.config_read(at, &mut data);
        if effect.decode {
            assert!(bench.function.decoded().len() <= 6);
        }
    }
    for offset in (0..0x4000).step_by(8) {
        let _ = bench.function.bar_write(0, offset, &[0xff; 8]);
    }
    let _ = bench.function.reset();
}

#[test]
fn the_rom_is_read_once_from_the_device_and_never_written() {
    let bench = Bench::new(Fake::new(), None);
    let read = |offset| {
        let mut data = [0; 4];
        bench.function.bar_read(ROM_BAR, offset, &mut data);
        data
    };
    bench.fake.rom.lock().unwrap()[..4].copy_from_slice(&[0x55, 0xaa, 7, 8]);
    bench.write(0x30, &0xd123_0001u32.to_le_bytes());
    bench.write(0x04, &2u16.to_le_bytes());
    let decoded = bench.function.decoded();
    assert!(decoded.iter().any(|at| at.bar == ROM_BAR));
    assert_eq!(read(0), [0x55, 0xaa, 7, 8]);
    let _ = bench.function.bar_write(ROM_BAR, 0, &[0; 4]);
    bench.fake.rom.lock().unwrap().clear();
    assert_eq!(read(0), [0x55, 0xaa, 7, 8]);
    assert_eq!(read(u64::MAX), [0xff; 4], "nothing there");
    // One that the host cannot read is one with nothing in it.
    let bench = Bench::new(Fake::new(), None);
    bench.fake.rom.lock().unwrap().clear();
    let mut data = [0; 2];
    bench.function.bar_read(ROM_BAR, 0, &mut data);
    assert_eq!(data, [0xff; 2]);
}
