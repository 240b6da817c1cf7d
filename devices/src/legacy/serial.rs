//! The 16550 serial port (vm-superio's model) as a bus device with an interrupt line.

use std::convert::Infallible;
use std::fmt;
use std::io::{self, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vm_superio::serial::SerialEvents;
use vm_superio::{Serial, Trigger};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::bus::BusDevice;
use crate::interrupt::IrqLine;

/// A 16550 UART.
pub struct SerialPort {
    uart: Mutex<Serial<Edge, Room, Box<dyn Write + Send>>>,
    room: Arc<EventFd>,
}

impl SerialPort {
    /// Where COM1 goes on the port I/O bus.
    pub const COM1: u64 = 0x3f8;
    /// Ports it takes.
    pub const LENGTH: u64 = 8;
    /// The interrupt of COM1, edge-triggered.
    pub const COM1_IRQ: u8 = 4;

    /// A port that writes what the guest sends to `output` and interrupts on `irq`. A byte that
    /// `output` refuses is lost, as on a line with nobody at its end.
    ///
    /// # Errors
    /// No file descriptor was left for the event.
    pub fn new(irq: Arc<dyn IrqLine>, output: Box<dyn Write + Send>) -> io::Result<Self> {
        let room = Arc::new(EventFd::new(EFD_NONBLOCK)?);
        let uart = Serial::with_events(Edge(irq), Room(Arc::clone(&room)), output);
        Ok(Self {
            uart: Mutex::new(uart),
            room,
        })
    }

    /// Gives `input` to the guest; the number of bytes that found room in the FIFO. Offer the
    /// rest again when [`room_event`](Self::room_event) is signalled.
    pub fn receive(&self, input: &[u8]) -> usize {
        // It fails only when the FIFO is full.
        self.uart().enqueue_raw_bytes(input).unwrap_or(0)
    }

    /// Signalled when the guest has emptied the FIFO.
    pub fn room_event(&self) -> &Arc<EventFd> {
        &self.room
    }

    fn uart(&self) -> MutexGuard<'_, Serial<Edge, Room, Box<dyn Write + Send>>> {
        self.uart.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for SerialPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SerialPort").finish_non_exhaustive()
    }
}

impl BusDevice for SerialPort {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let [byte] = data {
            *byte = self.uart().read(offset as u8);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let &[byte] = data {
            // What is refused is a byte of output that was lost.
            let _ = self.uart().write(offset as u8, byte);
        }
    }
}

/// The UART's interrupt as an edge.
struct Edge(Arc<dyn IrqLine>);

impl Trigger for Edge {
    type E = Infallible;

    fn trigger(&self) -> Result<(), Infallible> {
        self.0.set(true);
        self.0.set(false);
        Ok(())
    }
}

struct Room(Arc<EventFd>);

impl SerialEvents for Room {
    fn buffer_read(&self) {}
    fn out_byte(&self) {}
    fn tx_lost_byte(&self) {}

    fn in_buffer_empty(&self) {
        // Only a counter at its limit fails, and then the event is signalled already.
        let _ = self.0.write(1);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[derive(Default)]
    struct Edges(AtomicUsize);

    impl IrqLine for Edges {
        fn set(&self, level: bool) {
            self.0.fetch_add(usize::from(level), Ordering::Relaxed);
        }
    }

    #[derive(Clone, Default)]
    struct Screen(Arc<Mutex<Vec<u8>>>);

    impl Write for Screen {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn what_the_guest_sends_comes_out_and_what_is_typed_interrupts_it() {
        let (edges, screen) = (Arc::new(Edges::default()), Screen::default());
        let port = SerialPort::new(edges.clone(), Box::new(screen.clone())).unwrap();
        port.write(0, b"o");
        port.write(0, b"k");
        assert_eq!(*screen.0.lock().unwrap(), b"ok");

        port.write(1, &[1]); // interrupt on received data
        assert_eq!(port.receive(b"hi"), 2);
        assert_eq!(edges.0.load(Ordering::Relaxed), 1);
        let mut byte = [0];
        port.read(0, &mut byte);
        assert_eq!(&byte, b"h");
        assert!(port.room_event().read().is_err(), "one byte is left");
        port.read(0, &mut byte);
        assert!(port.room_event().read().is_ok());
    }

    #[test]
    fn a_full_fifo_takes_no_more_until_the_guest_reads() {
        let port = SerialPort::new(Arc::new(Edges::default()), Box::new(io::sink())).unwrap();
        let taken = port.receive(&[b'x'; 1000]);
        assert!(taken > 0 && taken < 1000);
        assert_eq!(port.receive(b"y"), 0);
        port.read(0, &mut [0]);
        assert_eq!(port.receive(b"yz"), 1);
    }

    #[test]
    fn an_access_of_more_than_a_byte_reads_as_ones_and_writes_nothing() {
        let screen = Screen::default();
        let port = SerialPort::new(Arc::new(Edges::default()), Box::new(screen.clone())).unwrap();
        let mut word = [0; 2];
        port.read(0, &mut word);
        assert_eq!(word, [0xff; 2]);
        port.write(0, b"no");
        assert!(screen.0.lock().unwrap().is_empty());
    }
}
