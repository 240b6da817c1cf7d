//! The interrupt line of a device that has nothing better.
//!
//! VFIO masks the line whenever it interrupts, and tells by an eventfd. The line is then held up
//! for the guest until the device itself lets go of it (Interrupt Status in its Status register),
//! and unmasked. The device's word is asked for rather than the guest's end of interrupt, so that
//! it does not matter which interrupt controller the guest uses and how.
#![forbid(unsafe_code)]

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use super::vfio::{CONFIG, Hardware};
use crate::interrupt::IrqLine;

const STATUS: u64 = 6;
const STATUS_INTERRUPT: u16 = 1 << 3;

/// How often the device is asked while its line is up.
const PERIOD: Duration = Duration::from_micros(100);

pub(super) struct Line {
    event: Arc<EventFd>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Line {
    pub(super) fn start(hardware: Arc<dyn Hardware>, line: Arc<dyn IrqLine>) -> io::Result<Self> {
        let event = Arc::new(EventFd::new(libc::EFD_NONBLOCK)?);
        let stop = Arc::new(AtomicBool::new(false));
        let epoll = Epoll::new()?;
        let interest = EpollEvent::new(EventSet::IN, 0);
        epoll.ctl(ControlOperation::Add, event.as_raw_fd(), interest)?;
        let (raised, stopped) = (event.clone(), stop.clone());
        let thread = viommu::thread::spawn("interrupt-line", move || {
            let mut events = [EpollEvent::default()];
            while !stopped.load(Ordering::Acquire) {
                match epoll.wait(-1, &mut events) {
                    Err(error) if error.kind() != io::ErrorKind::Interrupted => {
                        return log::error!("an interrupt line ends: {error}");
                    }
                    _ => {}
                }
                if raised.read().is_ok() {
                    hold(&*hardware, &*line, &stopped);
                }
            }
        })?;
        Ok(Self {
            event,
            stop,
            thread: Some(thread),
        })
    }

    /// What VFIO signals.
    pub(super) fn event(&self) -> &EventFd {
        &self.event
    }
}

/// Holds the line up until the device lets go of it.
fn hold(hardware: &dyn Hardware, line: &dyn IrqLine, stopped: &AtomicBool) {
    let is_up = || {
        let mut status = [0; 2];
        let read = hardware.read(CONFIG, STATUS, &mut status);
        read.is_ok() && u16::from_le_bytes(status) & STATUS_INTERRUPT != 0
    };
    line.set(true);
    while is_up() && !stopped.load(Ordering::Acquire) {
        std::thread::sleep(PERIOD);
    }
    line.set(false);
    if let Err(error) = hardware.unmask_line() {
        log::debug!("an interrupt line stays masked: {error}");
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        if self.event.write(1).is_ok()
            && let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            log::error!("the thread of an interrupt line panicked");
        }
    }
}
