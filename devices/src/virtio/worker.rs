//! Threads of devices: named, counted, stopped by an eventfd and joined when dropped.

#![forbid(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::JoinHandle;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

static RUNNING: AtomicUsize = AtomicUsize::new(0);

/// How many device threads run in this process now.
pub fn running() -> usize {
    RUNNING.load(Ordering::Acquire)
}

/// Tells the threads of a device to end: an event to wait for, and a flag to look at between two
/// pieces of work, so that a guest that keeps a queue full cannot hold up a reset.
pub(super) struct Stop {
    event: EventFd,
    set: AtomicBool,
}

impl Stop {
    /// Whether the threads are to end.
    pub(super) fn is_set(&self) -> bool {
        self.set.load(Ordering::Acquire)
    }
}

impl AsRawFd for Stop {
    /// Becomes and stays readable when the threads are to end.
    fn as_raw_fd(&self) -> RawFd {
        self.event.as_raw_fd()
    }
}

/// The threads of one active device. Dropping it stops them and waits for them.
pub(super) struct Workers {
    stop: Arc<Stop>,
    threads: Vec<JoinHandle<()>>,
}

impl Workers {
    /// No threads yet.
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self {
            stop: Arc::new(Stop {
                event: EventFd::new(EFD_NONBLOCK)?,
                set: AtomicBool::new(false),
            }),
            threads: Vec::new(),
        })
    }

    /// What the threads look at to know when to end.
    pub(super) fn stop(&self) -> Arc<Stop> {
        Arc::clone(&self.stop)
    }

    /// Adds a thread. Its name is cut to the 15 bytes that the kernel shows.
    pub(super) fn spawn(
        &mut self,
        name: &str,
        body: impl FnOnce() + Send + 'static,
    ) -> io::Result<()> {
        let counted = Counted::new();
        let thread = viommu::thread::spawn(name, move || {
            let _counted = counted;
            body();
        })?;
        self.threads.push(thread);
        Ok(())
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        self.stop.set.store(true, Ordering::Release);
        // Only a counter at its limit fails, and then the event is readable already.
        let _ = self.stop.event.write(1);
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                log::error!("a device thread ended by a panic");
            }
        }
    }
}

struct Counted;

impl Counted {
    fn new() -> Self {
        RUNNING.fetch_add(1, Ordering::AcqRel);
        Self
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        RUNNING.fetch_sub(1, Ordering::AcqRel);
    }
}

/// What a worker waits for: file descriptors, each with a number of the worker's choice.
pub(super) struct Waiter {
    epoll: Epoll,
    events: [EpollEvent; 8],
}

impl Waiter {
    /// Waits for nothing yet.
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self {
            epoll: Epoll::new()?,
            events: [EpollEvent::default(); 8],
        })
    }

    /// Waits for `events` of `source` too; `token` names it.
    pub(super) fn add(
        &self,
        source: &impl AsRawFd,
        token: u64,
        events: EventSet,
    ) -> io::Result<()> {
        self.control(ControlOperation::Add, source, token, events)
    }

    /// Waits for `source` no more.
    pub(super) fn remove(&self, source: &impl AsRawFd) -> io::Result<()> {
        self.control(ControlOperation::Delete, source, 0, EventSet::empty())
    }

    fn control(
        &self,
        operation: ControlOperation,
        source: &impl AsRawFd,
        token: u64,
        events: EventSet,
    ) -> io::Result<()> {
        self.epoll.ctl(
            operation,
            source.as_raw_fd(),
            EpollEvent::new(events, token),
        )
    }

    /// Blocks until something happens; tells what.
    pub(super) fn wait(&mut self) -> io::Result<impl Iterator<Item = (u64, EventSet)>> {
        let count = loop {
            match self.epoll.wait(-1, &mut self.events) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                other => break other?,
            }
        };
        let ready = self.events.get(..count).unwrap_or_default();
        Ok(ready.iter().map(|event| (event.data(), event.event_set())))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dropping_the_workers_stops_and_joins_them() {
        let mut workers = Workers::new().unwrap();
        let stop = workers.stop();
        let ended = Arc::new(AtomicUsize::new(0));
        for index in 0..3 {
            let (stop, ended) = (Arc::clone(&stop), Arc::clone(&ended));
            workers
                .spawn(&format!("a very long name {index}"), move || {
                    let mut waiter = Waiter::new().unwrap();
                    waiter.add(&*stop, 7, EventSet::IN).unwrap();
                    assert_eq!(waiter.wait().unwrap().next().unwrap().0, 7);
                    assert!(stop.is_set());
                    ended.fetch_add(1, Ordering::AcqRel);
                })
                .unwrap();
        }
        drop(workers);
        assert_eq!(ended.load(Ordering::Acquire), 3);
    }
}
