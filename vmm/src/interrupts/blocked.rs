//! Eventfds whose interrupts are blocked: nobody else reads them, so one thread of the VM waits for
//! their signals, in order that each becomes the fault that it is.

#![forbid(unsafe_code)]

use std::io;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Weak};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use super::Interrupts;

/// The number that stands for the end, which is no GSI.
const END: u64 = u64::MAX;
/// Signals that one call takes.
const AT_ONCE: usize = 32;

/// The eventfds that are waited for.
pub(super) struct Watch {
    shared: Arc<Shared>,
}

struct Shared {
    epoll: Epoll,
    end: EventFd,
}

impl Watch {
    /// Starts the thread, with nothing to wait for.
    ///
    /// # Errors
    /// The host has no more threads or descriptors.
    pub(super) fn start(interrupts: Weak<Interrupts>) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            epoll: Epoll::new()?,
            end: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?,
        });
        shared.control(ControlOperation::Add, &shared.end, END)?;
        let its = Arc::clone(&shared);
        viommu::thread::spawn("blocked-irqs", move || its.run(&interrupts))?;
        Ok(Self { shared })
    }

    /// Waits for signals of `eventfd`, which are interrupts of `gsi`.
    pub(super) fn add(&self, eventfd: &EventFd, gsi: u32) -> io::Result<()> {
        self.shared
            .control(ControlOperation::Add, eventfd, gsi.into())
    }

    /// Waits no longer.
    pub(super) fn remove(&self, eventfd: &EventFd, gsi: u32) -> io::Result<()> {
        self.shared
            .control(ControlOperation::Delete, eventfd, gsi.into())
    }
}

impl Drop for Watch {
    /// The thread ends by itself: it may be the one that drops the last of the VM.
    fn drop(&mut self) {
        if let Err(why) = self.shared.end.write(1) {
            log::error!("the thread for blocked interrupts does not end: {why}");
        }
    }
}

impl Shared {
    fn control(&self, what: ControlOperation, eventfd: &EventFd, data: u64) -> io::Result<()> {
        let event = EpollEvent::new(EventSet::IN, data);
        self.epoll.ctl(what, eventfd.as_raw_fd(), event)
    }

    fn run(&self, interrupts: &Weak<Interrupts>) {
        let mut events = [EpollEvent::default(); AT_ONCE];
        loop {
            let count = match self.epoll.wait(-1, &mut events) {
                Ok(count) => count,
                Err(why) if why.kind() == io::ErrorKind::Interrupted => continue,
                Err(why) => {
                    log::error!("blocked interrupts are no longer reported: {why}");
                    return;
                }
            };
            for event in &events[..count] {
                let (Ok(gsi), Some(interrupts)) =
                    (u32::try_from(event.data()), interrupts.upgrade())
                else {
                    return;
                };
                interrupts.blocked_signal(gsi);
            }
        }
    }
}
