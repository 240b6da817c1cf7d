//! The I/O APIC (82093AA, with the EOI register of version 0x20).
//!
//! KVM runs the local APICs and hands us everything else (split irqchip), since interrupt
//! remapping has to see an interrupt as the I/O APIC sends it. A redirection entry is turned into
//! the MSI that it stands for, with the remappable format's bits where they are; whoever remaps
//! stands behind the [`IoapicSink`].

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use viommu::interrupt::Msi;

use crate::bus::BusDevice;
use crate::interrupt::{EndOfInterrupt, IrqLine, LevelLine};

/// Number of pins.
pub const PINS: u8 = 24;

/// Register selectors.
const ID: u8 = 0x00;
const VERSION: u8 = 0x01;
const ARBITRATION: u8 = 0x02;
const REDIRECTION: u8 = 0x10;

/// Bits of a redirection entry.
const VECTOR: u64 = 0xff;
const DELIVERY_MODE: u64 = 7 << 8;
const DESTINATION_MODE: u64 = 1 << 11;
const DELIVERY_STATUS: u64 = 1 << 12;
const REMOTE_IRR: u64 = 1 << 14;
const LEVEL: u64 = 1 << 15;
const MASKED: u64 = 1 << 16;
const READ_ONLY: u64 = DELIVERY_STATUS | REMOTE_IRR;
/// Bits 63:48: the destination, or the remappable format's handle and format bit.
const KEPT: u64 =
    VECTOR | DELIVERY_MODE | DESTINATION_MODE | 1 << 13 | LEVEL | MASKED | 0xffff << 48;

/// Where interrupts of the I/O APIC go.
///
/// Called on vCPU threads and device threads with the I/O APIC locked: an implementation must not
/// call back and must not block.
pub trait IoapicSink: Send + Sync {
    /// Pin `pin` now stands for `msi`, masked or not; called only when that changed. KVM learns
    /// from the routes of the first 24 GSIs which EOIs it has to report, so they are kept in step
    /// with this. Before the first call a pin stands for nothing.
    fn route(&self, pin: u8, msi: Msi);

    /// Pin `pin` interrupts.
    fn deliver(&self, pin: u8, msi: Msi);
}

/// An I/O APIC with 24 pins.
pub struct Ioapic {
    sink: Arc<dyn IoapicSink>,
    state: Mutex<State>,
    /// Who is told of ends of interrupts, by pin. Never held while another lock is taken.
    observers: Mutex<[Option<Weak<dyn EndOfInterrupt>>; PINS as usize]>,
}

struct State {
    id: u8,
    selected: u8,
    pins: [Pin; PINS as usize],
}

#[derive(Clone, Copy)]
struct Pin {
    entry: u64,
    /// The level of the line.
    high: bool,
    /// A rising edge that was not delivered yet.
    edge: bool,
}

const RESET: Pin = Pin {
    entry: MASKED,
    high: false,
    edge: false,
};

impl Ioapic {
    /// Where it goes on the MMIO bus.
    pub const BASE: u64 = 0xfec0_0000;
    /// Bytes it takes.
    pub const LENGTH: u64 = 0x1000;

    const SELECT: u64 = 0x00;
    const WINDOW: u64 = 0x10;
    const EOI: u64 = 0x40;

    /// An I/O APIC after power-on: everything masked.
    pub fn new(sink: Arc<dyn IoapicSink>) -> Arc<Self> {
        Arc::new(Self {
            sink,
            state: Mutex::new(State::new()),
            observers: Mutex::default(),
        })
    }

    /// The line into `pin`; a pin that does not exist leads nowhere.
    pub fn line(self: &Arc<Self>, pin: u8) -> Arc<dyn LevelLine> {
        Arc::new(Line {
            ioapic: Arc::clone(self),
            pin,
        })
    }

    /// Raises or lowers `pin`.
    pub fn set(&self, pin: u8, level: bool) {
        let mut state = self.state();
        let Some(at) = state.pins.get_mut(usize::from(pin)) else {
            return;
        };
        // An edge on a masked pin is kept until it is unmasked. Hardware drops it; a driver
        // bears a spurious interrupt better than a lost one.
        at.edge |= level && !at.high;
        at.high = level;
        self.service(pin, at);
    }

    /// A processor ended an interrupt with `vector`: level-triggered pins that wait for it may
    /// interrupt again. Called for each EOI broadcast.
    ///
    /// Their observers are asked first: what they let fall does not interrupt again.
    pub fn end_of_interrupt(&self, vector: u8) {
        let waits = |at: &Pin| at.entry & REMOTE_IRR != 0 && at.entry & VECTOR == u64::from(vector);
        let ended: [bool; PINS as usize] = self.state().pins.each_ref().map(waits);
        for (pin, _) in (0..).zip(ended).filter(|&(_, ended)| ended) {
            if let Some(observer) = self.observer(pin) {
                observer.ended();
            }
        }
        let mut state = self.state();
        for ((pin, at), ended) in (0..).zip(&mut state.pins).zip(ended) {
            // The guest may have written the entry meanwhile.
            if ended && waits(at) {
                at.entry &= !REMOTE_IRR;
                self.service(pin, at);
            }
        }
    }

    fn observer(&self, pin: usize) -> Option<Arc<dyn EndOfInterrupt>> {
        let observers = self.observers.lock();
        let observers = observers.unwrap_or_else(PoisonError::into_inner);
        observers.get(pin)?.as_ref()?.upgrade()
    }

    /// Back to the state after power-on. The lines keep their levels: they are the devices'.
    pub fn reset(&self) {
        let mut state = self.state();
        let before = std::mem::replace(&mut *state, State::new());
        for ((pin, at), old) in (0..).zip(&mut state.pins).zip(before.pins) {
            at.high = old.high;
            self.route(pin, old.entry, at.entry);
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A change of routes is a slow call into the kernel; masking is not one.
    fn route(&self, pin: u8, old: u64, new: u64) {
        if message(old) != message(new) {
            self.sink.route(pin, message(new));
        }
    }

    /// Delivers what is due on a pin.
    fn service(&self, pin: u8, at: &mut Pin) {
        if at.entry & MASKED != 0 {
            return;
        }
        let due = if at.entry & LEVEL != 0 {
            at.edge = false;
            at.high && at.entry & REMOTE_IRR == 0
        } else {
            std::mem::take(&mut at.edge)
        };
        if due {
            if at.entry & LEVEL != 0 {
                at.entry |= REMOTE_IRR;
            }
            self.sink.deliver(pin, message(at.entry));
        }
    }

    fn read_window(&self) -> u32 {
        let state = self.state();
        match state.selected {
            ID | ARBITRATION => u32::from(state.id) << 24,
            VERSION => u32::from(PINS - 1) << 16 | 0x20,
            other => state.entry_half(other).map_or(0, |(pin, shift)| {
                state
                    .pins
                    .get(pin)
                    .map_or(0, |at| (at.entry >> shift) as u32)
            }),
        }
    }

    fn write_window(&self, value: u32) {
        let mut state = self.state();
        if state.selected == ID {
            state.id = (value >> 24) as u8 & 0xf;
            return;
        }
        let Some((pin, shift)) = state.entry_half(state.selected) else {
            return;
        };
        let Some(at) = state.pins.get_mut(pin) else {
            return;
        };
        let half = u64::from(u32::MAX) << shift;
        let written = u64::from(value) << shift & half & KEPT;
        let before = at.entry;
        at.entry = at.entry & (!half | READ_ONLY) | written;
        if at.entry & LEVEL == 0 {
            // An edge-triggered pin waits for no EOI. Older drivers end an interrupt this way.
            at.entry &= !REMOTE_IRR;
        }
        self.route(pin as u8, before, at.entry);
        self.service(pin as u8, at);
    }
}

impl State {
    fn new() -> Self {
        Self {
            id: 0,
            selected: 0,
            pins: [RESET; PINS as usize],
        }
    }

    /// The pin that a selector names, and how far the half is shifted.
    fn entry_half(&self, selector: u8) -> Option<(usize, u32)> {
        let half = selector.checked_sub(REDIRECTION)?;
        Some((usize::from(half / 2), 32 * u32::from(half % 2)))
    }
}

/// The MSI that a redirection entry stands for (VT-d 5.1.2.1 and 5.1.5.1): bits 63:48 become
/// address bits 19:4, which is the destination with its extension bits, or, in remappable format,
/// the handle and the format bit.
fn message(entry: u64) -> Msi {
    let logical = u64::from(entry & DESTINATION_MODE != 0);
    Msi {
        address: 0xfee0_0000 | entry >> 48 << 4 | logical << 2,
        data: (entry & (VECTOR | DELIVERY_MODE | LEVEL)) as u32,
    }
}

impl BusDevice for Ioapic {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let value = match offset {
            Self::SELECT => u32::from(self.state().selected),
            Self::WINDOW => self.read_window(),
            _ => 0,
        };
        data.fill(0);
        for (to, from) in data.iter_mut().zip(value.to_le_bytes()) {
            *to = from;
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let mut bytes = [0; 4];
        for (to, from) in bytes.iter_mut().zip(data) {
            *to = *from;
        }
        let value = u32::from_le_bytes(bytes);
        match offset {
            Self::SELECT => self.state().selected = value as u8,
            Self::WINDOW if data.len() == 4 => self.write_window(value),
            Self::EOI => self.end_of_interrupt(value as u8),
            _ => {}
        }
    }
}

struct Line {
    ioapic: Arc<Ioapic>,
    pin: u8,
}

impl IrqLine for Line {
    fn set(&self, level: bool) {
        self.ioapic.set(self.pin, level);
    }
}

impl LevelLine for Line {
    fn watch(&self, observer: Weak<dyn EndOfInterrupt>) {
        let observers = self.ioapic.observers.lock();
        let mut observers = observers.unwrap_or_else(PoisonError::into_inner);
        if let Some(of_pin) = observers.get_mut(usize::from(self.pin)) {
            *of_pin = Some(observer);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[derive(Default)]
    struct Recorder {
        routes: Mutex<Vec<(u8, Msi)>>,
        delivered: Mutex<Vec<(u8, Msi)>>,
    }

    impl IoapicSink for Recorder {
        fn route(&self, pin: u8, msi: Msi) {
            self.routes.lock().unwrap().push((pin, msi));
        }
        fn deliver(&self, pin: u8, msi: Msi) {
            self.delivered.lock().unwrap().push((pin, msi));
        }
    }

    fn ioapic() -> (Arc<Recorder>, Arc<Ioapic>) {
        let recorder = Arc::new(Recorder::default());
        (recorder.clone(), Ioapic::new(recorder))
    }

    fn write_register(ioapic: &Ioapic, selector: u8, value: u32) {
        ioapic.write(0x00, &[selector]);
        ioapic.write(0x10, &value.to_le_bytes());
    }

    fn read_register(ioapic: &Ioapic, selector: u8) -> u32 {
        ioapic.write(0x00, &u32::from(selector).to_le_bytes());
        let mut data = [0; 4];
        ioapic.read(0x10, &mut data);
        u32::from_le_bytes(data)
    }

    fn program(ioapic: &Ioapic, pin: u8, entry: u64) {
        write_register(ioapic, 0x11 + 2 * pin, (entry >> 32) as u32);
        write_register(ioapic, 0x10 + 2 * pin, entry as u32);
    }

    fn count(recorder: &Recorder) -> usize {
        recorder.delivered.lock().unwrap().len()
    }

    #[test]
    fn it_says_24_pins_and_a_version_with_directed_eoi() {
        let (_, ioapic) = ioapic();
        assert_eq!(read_register(&ioapic, 0x01), 0x0017_0020);
        assert_eq!(read_register(&ioapic, 0x10), 0x0001_0000, "masked");
        write_register(&ioapic, 0, 0x0500_0000);
        assert_eq!(read_register(&ioapic, 0), 0x0500_0000);
    }

    #[test]
    fn an_entry_stands_for_the_msi_with_the_same_destination_and_vector() {
        let (recorder, ioapic) = ioapic();
        // Destination 3, logical, lowest priority, level, vector 0x31, unmasked.
        program(
            &ioapic,
            4,
            3 << 56 | LEVEL | DESTINATION_MODE | 1 << 8 | 0x31,
        );
        let msi = Msi {
            address: 0xfee0_3004,
            data: 0x8131,
        };
        assert_eq!(recorder.routes.lock().unwrap().last(), Some(&(4, msi)));
        ioapic.set(4, true);
        assert_eq!(*recorder.delivered.lock().unwrap(), [(4, msi)]);
    }

    #[test]
    fn masking_changes_no_route_and_a_reset_takes_back_those_that_were_made() {
        let (recorder, ioapic) = ioapic();
        assert!(recorder.routes.lock().unwrap().is_empty());
        program(&ioapic, 7, 0x33);
        for _ in 0..5 {
            program(&ioapic, 7, MASKED | 0x33);
            program(&ioapic, 7, 0x33);
        }
        assert_eq!(recorder.routes.lock().unwrap().len(), 1);
        ioapic.reset();
        assert_eq!(recorder.routes.lock().unwrap()[1..], [(7, message(0))]);
    }

    #[test]
    fn an_entry_in_remappable_format_keeps_its_handle_and_its_format_bit() {
        // VT-d 5.1.5.1: handle 14:0 in bits 63:49, format in 48, handle 15 in 11.
        let entry = 0x1234 << 49 | 1 << 48 | DESTINATION_MODE | 0x55;
        let msi = message(entry);
        assert_eq!(msi.address >> 5 & 0x7fff, 0x1234);
        assert_eq!(msi.address >> 4 & 1, 1);
        assert_eq!(msi.address >> 2 & 1, 1);
    }

    #[test]
    fn a_level_interrupt_comes_again_after_eoi_while_the_line_is_high() {
        let (recorder, ioapic) = ioapic();
        program(&ioapic, 9, LEVEL | 0x40);
        ioapic.set(9, true);
        ioapic.set(9, true);
        assert_eq!(count(&recorder), 1, "once until EOI");
        assert_ne!(read_register(&ioapic, 0x10 + 18) & REMOTE_IRR as u32, 0);
        ioapic.end_of_interrupt(0x41);
        assert_eq!(count(&recorder), 1, "another vector's EOI");
        ioapic.end_of_interrupt(0x40);
        assert_eq!(count(&recorder), 2);
        ioapic.set(9, false);
        ioapic.write(0x40, &0x40u32.to_le_bytes()); // directed EOI
        assert_eq!(count(&recorder), 2, "the line is low");
        assert_eq!(read_register(&ioapic, 0x10 + 18) & REMOTE_IRR as u32, 0);
    }

    /// A device: as often as it is told of an end, the line falls, and rises while there is work.
    struct Device {
        line: Arc<dyn LevelLine>,
        work: Mutex<u32>,
    }

    impl EndOfInterrupt for Device {
        fn ended(&self) {
            self.line.set(false);
            let mut work = self.work.lock().unwrap();
            *work -= 1;
            if *work > 0 {
                self.line.set(true);
            }
        }
    }

    #[test]
    fn who_watches_a_line_lets_it_fall_before_it_can_interrupt_again() {
        let (recorder, ioapic) = ioapic();
        program(&ioapic, 16, LEVEL | 0x40);
        let device: Arc<dyn EndOfInterrupt> = Arc::new(Device {
            line: ioapic.line(16),
            work: Mutex::new(2),
        });
        ioapic.line(16).watch(Arc::downgrade(&device));
        ioapic.set(16, true);
        assert_eq!(count(&recorder), 1);
        ioapic.end_of_interrupt(0x41);
        assert_eq!(count(&recorder), 1, "another vector's EOI");
        ioapic.end_of_interrupt(0x40);
        assert_eq!(count(&recorder), 2, "it had more to do: once, not twice");
        ioapic.end_of_interrupt(0x40);
        assert_eq!(count(&recorder), 2, "it is content");
        drop(device);
        ioapic.set(16, true);
        ioapic.end_of_interrupt(0x40);
        assert_eq!(
            count(&recorder),
            4,
            "nobody watches: high until it is lowered"
        );
    }

    #[test]
    fn an_edge_interrupts_once_and_one_on_a_masked_pin_waits_for_unmask() {
        let (recorder, ioapic) = ioapic();
        let line = ioapic.line(4);
        program(&ioapic, 4, 0x30);
        line.set(true);
        line.set(true);
        assert_eq!(count(&recorder), 1);
        line.set(false);
        program(&ioapic, 4, MASKED | 0x30);
        line.set(true);
        line.set(false);
        assert_eq!(count(&recorder), 1);
        program(&ioapic, 4, 0x30);
        assert_eq!(count(&recorder), 2);
    }

    #[test]
    fn the_guest_cannot_write_remote_irr_or_delivery_status() {
        let (_, ioapic) = ioapic();
        program(&ioapic, 2, READ_ONLY | LEVEL | MASKED);
        assert_eq!(u64::from(read_register(&ioapic, 0x14)) & READ_ONLY, 0);
    }

    proptest! {
        #[test]
        fn whatever_is_written_a_masked_pin_is_silent_and_routes_follow_entries(
            steps in prop::collection::vec((any::<u8>(), any::<u32>(), any::<bool>()), 0..200)
        ) {
            let (recorder, ioapic) = ioapic();
            let mut routes = [message(MASKED); PINS as usize];
            for (selector, value, high) in steps {
                let before = count(&recorder);
                write_register(&ioapic, selector, value);
                ioapic.set(selector % 32, high);
                for &(pin, msi) in recorder.routes.lock().unwrap().iter() {
                    routes[usize::from(pin)] = msi;
                }
                for &(pin, msi) in &recorder.delivered.lock().unwrap()[before..] {
                    let low = read_register(&ioapic, 0x10 + 2 * pin);
                    prop_assert_eq!(u64::from(low) & MASKED, 0);
                    prop_assert_eq!(routes[usize::from(pin)], msi);
                }
            }
        }
    }
}
