//! The interrupt line (INTx) of a device whose driver uses nothing better.
//!
//! VFIO masks the line whenever the device interrupts, and tells by an eventfd. The guest's pin is
//! high from then on until the guest ends the interrupt: it falls, and VFIO unmasks the line. A
//! device that still asks for attention is told of again at once.
#![forbid(unsafe_code)]

use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use super::hardware::Hardware;
use crate::interrupt::{EndOfInterrupt, LevelLine};

pub(super) struct Line {
    shared: Arc<Shared>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    event: EventFd,
    hardware: Arc<dyn Hardware>,
    line: Arc<dyn LevelLine>,
    /// Held across each change of the pin, so that both sides agree on what it is.
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// The device interrupts by its line.
    on: bool,
    /// The pin is high, and VFIO holds the line masked.
    high: bool,
}

impl Line {
    pub(super) fn start(hardware: Arc<dyn Hardware>, line: Arc<dyn LevelLine>) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            event: EventFd::new(libc::EFD_NONBLOCK)?,
            hardware,
            line,
            state: Mutex::default(),
        });
        let its_end: Arc<dyn EndOfInterrupt> = shared.clone();
        shared.line.watch(Arc::downgrade(&its_end));
        let stop = Arc::new(AtomicBool::new(false));
        let epoll = Epoll::new()?;
        let interest = EpollEvent::new(EventSet::IN, 0);
        epoll.ctl(ControlOperation::Add, shared.event.as_raw_fd(), interest)?;
        let (its, stopped) = (shared.clone(), stop.clone());
        let thread = viommu::thread::spawn("interrupt-line", move || {
            let mut events = [EpollEvent::default()];
            while !stopped.load(Ordering::Acquire) {
                match epoll.wait(-1, &mut events) {
                    Err(error) if error.kind() != io::ErrorKind::Interrupted => {
                        return log::error!("an interrupt line ends: {error}");
                    }
                    _ => {}
                }
                if its.event.read().is_ok() {
                    its.raise();
                }
            }
        })?;
        Ok(Self {
            shared,
            stop,
            thread: Some(thread),
        })
    }

    /// What VFIO signals.
    pub(super) fn event(&self) -> &EventFd {
        &self.shared.event
    }

    /// The device interrupts by its line from now on, or no longer: then the pin is low, whatever
    /// is still under way.
    pub(super) fn turn(&self, on: bool) {
        let mut state = self.shared.state();
        state.on = on;
        if !on && std::mem::take(&mut state.high) {
            self.shared.line.set(false);
        }
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn raise(&self) {
        let mut state = self.state();
        if state.on {
            state.high = true;
            self.line.set(true);
        }
    }
}

impl EndOfInterrupt for Shared {
    fn ended(&self) {
        let mut state = self.state();
        if std::mem::take(&mut state.high) {
            // In this order: the device may interrupt as soon as it is unmasked.
            self.line.set(false);
            if let Err(error) = self.hardware.unmask_line() {
                log::debug!("an interrupt line stays masked: {error}");
            }
        }
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        self.turn(false);
        self.stop.store(true, Ordering::Release);
        if self.shared.event.write(1).is_ok()
            && let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            log::error!("the thread of an interrupt line panicked");
        }
    }
}
