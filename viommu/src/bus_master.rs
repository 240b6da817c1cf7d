//! Bus Master Enable (PCI Local Bus 3.0, 6.2.2): whether a function may send requests of its own,
//! and the DMA that it has under way.

#![forbid(unsafe_code)]

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};

/// In `state`: requests are not allowed. The bits below count accesses under way.
const OFF: u64 = 1 << 63;

/// The switch of one function; its ports (see
/// [`DmaPort::of_bus_master`](crate::dma::DmaPort::of_bus_master)) obey it. Off at first, as after a
/// reset.
#[derive(Debug)]
pub struct BusMaster {
    state: AtomicU64,
    asleep: Mutex<()>,
    over: Condvar,
}

impl Default for BusMaster {
    fn default() -> Self {
        Self {
            state: AtomicU64::new(OFF),
            asleep: Mutex::new(()),
            over: Condvar::new(),
        }
    }
}

impl BusMaster {
    /// Allows requests or not. When this returns from forbidding them, none is under way. Returns
    /// whether that is news.
    ///
    /// To be called without an access of the function's own, which it would wait for.
    pub fn set(&self, allowed: bool) -> bool {
        if allowed {
            // Release: an access that begins sees what the guest wrote before.
            return self.state.fetch_and(!OFF, Ordering::AcqRel) & OFF != 0;
        }
        let was = self.state.fetch_or(OFF, Ordering::AcqRel);
        if was & !OFF != 0 {
            let asleep = self.asleep.lock().unwrap_or_else(PoisonError::into_inner);
            let under_way = |_: &mut ()| self.state.load(Ordering::Acquire) & !OFF != 0;
            drop(self.over.wait_while(asleep, under_way));
        }
        was & OFF == 0
    }

    /// Begins an access, if that is allowed.
    pub(crate) fn begin(&self) -> Option<Request<'_>> {
        // One instruction counts the access and sees the switch, so that `set` either waits for
        // the access or is seen by it.
        if self.state.fetch_add(1, Ordering::AcqRel) & OFF == 0 {
            return Some(Request(self));
        }
        drop(Request(self));
        None
    }
}

/// An access under way.
#[derive(Debug)]
pub(crate) struct Request<'m>(&'m BusMaster);

impl Drop for Request<'_> {
    fn drop(&mut self) {
        // Release: who waits for the end sees the DMA done.
        if self.0.state.fetch_sub(1, Ordering::AcqRel) == OFF | 1 {
            // Between a waiter's check and its sleep it holds the lock.
            drop(self.0.asleep.lock().unwrap_or_else(PoisonError::into_inner));
            self.0.over.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::thread;
    use std::time::Duration;

    use super::*;

    #[test]
    fn it_is_off_at_first_and_says_what_is_news() {
        let master = BusMaster::default();
        assert!(master.begin().is_none());
        assert!(master.set(true));
        assert!(!master.set(true));
        assert!(master.begin().is_some());
        assert!(master.set(false));
        assert!(!master.set(false));
        assert!(master.begin().is_none());
    }

    #[test]
    fn forbidding_waits_for_what_is_under_way() {
        let master = Arc::new(BusMaster::default());
        master.set(true);
        let access = master.begin();
        let switch = {
            let master = Arc::clone(&master);
            thread::spawn(move || master.set(false))
        };
        while master.state.load(Ordering::Relaxed) & OFF == 0 {
            thread::sleep(Duration::from_millis(1));
        }
        assert!(master.begin().is_none(), "nothing begins meanwhile");
        assert!(!switch.is_finished());
        drop(access);
        assert!(switch.join().unwrap());
    }
}
