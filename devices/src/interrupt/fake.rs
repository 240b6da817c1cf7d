//! Interrupts that lead nowhere and are kept, for tests without a VM. Built for tests and with the
//! feature `testing`.

#![forbid(unsafe_code)]

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use viommu::interrupt::Msi;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{MsiSource, MsiVector};

/// A vector that writes down where it leads.
#[derive(Debug)]
pub struct FakeVector {
    eventfd: EventFd,
    routes: Mutex<Routes>,
}

#[derive(Debug, Default)]
struct Routes {
    now: Option<Msi>,
    since: Vec<Option<Msi>>,
}

impl FakeVector {
    /// How often it was signalled since the last call.
    pub fn signals(&self) -> u64 {
        self.eventfd.read().unwrap_or(0)
    }

    /// Where it leads.
    pub fn route(&self) -> Option<Msi> {
        lock(&self.routes).now
    }

    /// Where it was led since the last call, in order.
    pub fn take_routes(&self) -> Vec<Option<Msi>> {
        std::mem::take(&mut lock(&self.routes).since)
    }
}

impl MsiVector for FakeVector {
    fn eventfd(&self) -> &EventFd {
        &self.eventfd
    }

    fn route(&self, msi: Option<Msi>) -> io::Result<()> {
        let mut routes = lock(&self.routes);
        routes.now = msi;
        routes.since.push(msi);
        Ok(())
    }
}

/// Hands out [`FakeVector`]s and keeps them.
#[derive(Debug, Default)]
pub struct FakeMsi(Mutex<Vec<Arc<FakeVector>>>);

impl FakeMsi {
    /// All that were handed out, in order.
    pub fn vectors(&self) -> Vec<Arc<FakeVector>> {
        lock(&self.0).clone()
    }

    /// The vector that was handed out as number `index`.
    ///
    /// # Panics
    /// There were not so many.
    pub fn get(&self, index: usize) -> Arc<FakeVector> {
        Arc::clone(&lock(&self.0)[index])
    }
}

impl MsiSource for FakeMsi {
    fn vector(&self) -> io::Result<Arc<dyn MsiVector>> {
        let vector = Arc::new(FakeVector {
            eventfd: EventFd::new(EFD_NONBLOCK)?,
            routes: Mutex::default(),
        });
        lock(&self.0).push(Arc::clone(&vector));
        Ok(vector)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
