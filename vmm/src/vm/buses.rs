//! From a vCPU's exits to the devices on the buses.

#![forbid(unsafe_code)]

use std::sync::Arc;

use devices::bus::Bus;
use devices::legacy::Ioapic;

use crate::kvm::vcpu::Exits;

/// The two address buses and the I/O APIC.
#[derive(Clone)]
pub(super) struct Buses {
    pub(super) mmio: Arc<Bus>,
    pub(super) pio: Arc<Bus>,
    pub(super) ioapic: Arc<Ioapic>,
}

impl Exits for Buses {
    fn port_read(&self, port: u16, data: &mut [u8]) {
        if !self.pio.read(port.into(), data) {
            log::trace!("the guest read port {port:#x}, where nothing is");
        }
    }

    fn port_write(&self, port: u16, data: &[u8]) {
        if !self.pio.write(port.into(), data) {
            log::trace!("the guest wrote port {port:#x}, where nothing is");
        }
    }

    fn mmio_read(&self, address: u64, data: &mut [u8]) {
        for piece in pieces(data.len()) {
            let at = address.wrapping_add(piece.start as u64);
            if !self.mmio.read(at, &mut data[piece]) {
                log::debug!("the guest read {at:#x}, where nothing is");
            }
        }
    }

    fn mmio_write(&self, address: u64, data: &[u8]) {
        for piece in pieces(data.len()) {
            let at = address.wrapping_add(piece.start as u64);
            if !self.mmio.write(at, &data[piece]) {
                log::debug!("the guest wrote {at:#x}, where nothing is");
            }
        }
    }

    fn end_of_interrupt(&self, vector: u8) {
        self.ioapic.end_of_interrupt(vector);
    }
}

/// Cuts an access into pieces of 8, 4, 2 and 1 bytes: an access that crosses a page comes in
/// parts of any length, and devices know only these.
fn pieces(length: usize) -> impl Iterator<Item = std::ops::Range<usize>> {
    let mut done = 0;
    std::iter::from_fn(move || {
        let left = length - done;
        let size = [8, 4, 2, 1].into_iter().find(|size| *size <= left)?;
        done += size;
        Some(done - size..done)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_of_an_access_is_in_one_piece_of_a_size_devices_know() {
        for length in 0..=8 {
            let all: Vec<_> = pieces(length).collect();
            assert!(all.iter().all(|p| p.len().is_power_of_two()));
            assert_eq!(all.iter().map(|p| p.len()).sum::<usize>(), length);
        }
        assert_eq!(pieces(8).count(), 1);
    }
}
