//! What happened, in order, for whoever follows.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use serde::Serialize;

/// How many records are kept for those who fall behind.
const KEPT: usize = 1024;
/// How many faults are told in one [`PERIOD`], and how many other events that a guest causes at will.
const AT_WILL: u32 = 16;
const PERIOD: Duration = Duration::from_secs(1);

/// Something that happened.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, utoipa::ToSchema)]
#[serde(tag = "event", content = "properties", rename_all = "kebab-case")]
pub enum Event {
    /// A configuration is there.
    Created,
    /// The VM is being built.
    Booting,
    /// The guest runs.
    Booted,
    /// The vCPUs stand still.
    Paused,
    /// They go on.
    Resumed,
    /// The VM starts again.
    Rebooted {
        /// Whose wish it was: `guest` or `request`.
        by: String,
    },
    /// The VM stopped, or could not be built (`failed` after `booting`).
    Shutdown {
        /// Why: `power-off`, `reset`, `triple-fault`, `debug-exit`, `failed`, `signal`, `request`.
        reason: String,
        /// The exit status that goes with it, when nestling ends too.
        status: Option<u8>,
    },
    /// Its configuration is forgotten.
    Deleted,
    /// A device is in the guest.
    DeviceAdded {
        /// Its name.
        id: String,
        /// Its address in the guest.
        bdf: String,
    },
    /// A device is gone, with everything that belonged to it.
    DeviceRemoved {
        /// Its name, which is free again.
        id: String,
        /// Its address in the guest, which is free again.
        bdf: String,
    },
    /// A device was not plugged, and nothing of it is left.
    DeviceRefused {
        /// Its name, if it had one.
        id: Option<String>,
        /// At which step.
        step: String,
        /// The code of the error.
        code: String,
        /// The error in one sentence.
        message: String,
    },
    /// DMA was refused, and the guest was told.
    ViommuFault {
        /// The vIOMMU.
        viommu: String,
        /// The function that did it, by its address in the guest.
        endpoint: String,
        /// The PASID that it used, if any.
        pasid: Option<u32>,
        /// Where it went, in hexadecimal.
        address: String,
        /// What is wrong, in the front end's words.
        reason: String,
        /// How many faults were not told since the last one that was.
        suppressed: u64,
    },
    /// The host refused a translation that the guest asked for; the endpoint is blocked.
    AttachFailed {
        /// The vIOMMU.
        viommu: String,
        /// The function, by its address in the guest.
        endpoint: String,
        /// The PASID, if it is about one.
        pasid: Option<u32>,
        /// What the host said.
        reason: String,
    },
    /// It took it when it was tried again.
    AttachRecovered {
        /// The vIOMMU.
        viommu: String,
        /// The function, by its address in the guest.
        endpoint: String,
        /// The PASID, if it is about one.
        pasid: Option<u32>,
    },
    /// The guest wanted a PASID, and the host or the VM's quota has none.
    PasidExhausted {
        /// How many the VM owns.
        owned: u32,
    },
}

impl Event {
    fn source(&self) -> &'static str {
        match self {
            Self::ViommuFault { .. }
            | Self::AttachFailed { .. }
            | Self::AttachRecovered { .. }
            | Self::PasidExhausted { .. } => "viommu",
            _ => "vm",
        }
    }

    /// Whether a guest can cause it as often as it likes.
    fn is_at_will(&self) -> bool {
        self.source() == "viommu"
    }
}

/// Since the start of nestling.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, utoipa::ToSchema)]
pub struct Timestamp {
    /// Whole seconds.
    pub secs: u64,
    /// And nanoseconds.
    pub nanos: u32,
}

/// An event with its number and time.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, utoipa::ToSchema)]
pub struct Record {
    /// Counts from 1, without gaps.
    pub seq: u64,
    /// When it happened.
    pub timestamp: Timestamp,
    /// What told it: `vm` or `viommu`.
    pub source: &'static str,
    /// What happened.
    #[serde(flatten)]
    pub event: Event,
}

/// Where events are told, and read by any number of followers. One that falls behind by more than
/// is kept learns how many it lost.
pub struct Events {
    start: Instant,
    ring: Mutex<Ring>,
    wake: OnceLock<Box<dyn Fn() + Send + Sync>>,
}

#[derive(Default)]
struct Ring {
    records: VecDeque<Arc<Record>>,
    /// The number of the last record.
    last: u64,
    faults: Budget,
    others: Budget,
    suppressed: u64,
}

/// What was told of [`AT_WILL`].
#[derive(Default)]
struct Budget {
    period: Option<Instant>,
    told: u32,
}

impl Budget {
    /// Whether one more can be told.
    fn take(&mut self, now: Instant) -> bool {
        let fresh = self
            .period
            .is_none_or(|since| now.duration_since(since) >= PERIOD);
        if fresh {
            (self.period, self.told) = (Some(now), 0);
        }
        let left = self.told < AT_WILL;
        self.told += u32::from(left);
        left
    }
}

/// What a follower gets.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Batch {
    /// In order.
    pub records: Vec<Arc<Record>>,
    /// How many came before them and are not kept any more.
    pub lost: u64,
}

impl Default for Events {
    fn default() -> Self {
        Self {
            start: Instant::now(),
            ring: Mutex::default(),
            wake: OnceLock::new(),
        }
    }
}

impl std::fmt::Debug for Events {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Events")
    }
}

impl Events {
    /// Tells `event`. For any thread; waits for nobody but others who tell.
    pub fn emit(&self, event: Event) {
        let now = Instant::now();
        {
            let mut ring = self.lock();
            let Some(event) = ring.admit(event, now) else {
                return;
            };
            ring.last += 1;
            let since = now.duration_since(self.start);
            let record = Record {
                seq: ring.last,
                timestamp: Timestamp {
                    secs: since.as_secs(),
                    nanos: since.subsec_nanos(),
                },
                source: event.source(),
                event,
            };
            if ring.records.len() == KEPT {
                ring.records.pop_front();
            }
            ring.records.push_back(Arc::new(record));
        }
        if let Some(wake) = self.wake.get() {
            wake();
        }
    }

    /// `wake` is called after each event from then on, on the thread that told it; it must not
    /// wait. Only the first one counts.
    pub fn on_event(&self, wake: impl Fn() + Send + Sync + 'static) {
        // A second one has no followers to wake: there is one server.
        let _ = self.wake.set(Box::new(wake));
    }

    /// The number of the last event, 0 when there was none.
    pub fn last(&self) -> u64 {
        self.lock().last
    }

    /// What came after the event number `seq`.
    pub fn after(&self, seq: u64) -> Batch {
        let ring = self.lock();
        let first_kept = ring.last - ring.records.len() as u64 + 1;
        let skip = (seq + 1).saturating_sub(first_kept) as usize;
        Batch {
            records: ring.records.iter().skip(skip).cloned().collect(),
            lost: first_kept.saturating_sub(seq + 1),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Ring> {
        self.ring.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Ring {
    /// Lets through what a guest cannot cause at will, and so many of the others.
    fn admit(&mut self, mut event: Event, now: Instant) -> Option<Event> {
        if !event.is_at_will() {
            return Some(event);
        }
        let Event::ViommuFault { suppressed, .. } = &mut event else {
            // Of their own: faults do not hide them.
            return self.others.take(now).then_some(event);
        };
        if !self.faults.take(now) {
            self.suppressed += 1;
            return None;
        }
        *suppressed = std::mem::take(&mut self.suppressed);
        Some(event)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;

    fn fault() -> Event {
        Event::ViommuFault {
            viommu: "viommu0".into(),
            endpoint: "0000:00:01.0".into(),
            pasid: None,
            address: "0x1000".into(),
            reason: "no entry".into(),
            suppressed: 0,
        }
    }

    #[test]
    fn a_follower_gets_everything_in_order_or_learns_what_it_lost() {
        let events = Events::default();
        let woken = Arc::new(AtomicU64::new(0));
        let counter = woken.clone();
        events.on_event(move || {
            counter.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(events.after(0), Batch::default());
        for _ in 0..KEPT + 10 {
            events.emit(Event::Paused);
        }
        let batch = events.after(0);
        assert_eq!(batch.lost, 10);
        assert_eq!(batch.records.len(), KEPT);
        assert_eq!(batch.records[0].seq, 11);
        assert_eq!(events.last(), KEPT as u64 + 10);
        assert_eq!(events.after(events.last() - 3).records.len(), 3);
        assert_eq!(events.after(events.last()), Batch::default());
        assert_eq!(events.after(events.last() + 5), Batch::default());
        assert_eq!(woken.load(Ordering::Relaxed), KEPT as u64 + 10);
    }

    #[test]
    fn a_guest_that_faults_without_end_does_not_push_other_events_out() {
        let events = Events::default();
        events.emit(Event::Booted);
        for _ in 0..100 * KEPT {
            events.emit(fault());
        }
        let batch = events.after(0);
        assert_eq!(batch.lost, 0);
        assert_eq!(batch.records[0].event, Event::Booted);
        assert!(events.lock().suppressed > 0);
    }

    #[test]
    fn a_guest_that_faults_without_end_does_not_hide_what_the_host_refused_it() {
        let events = Events::default();
        let failed = Event::AttachFailed {
            viommu: "viommu0".into(),
            endpoint: "0000:00:01.0".into(),
            pasid: None,
            reason: "no room".into(),
        };
        for _ in 0..100 {
            events.emit(fault());
        }
        events.emit(failed.clone());
        let told = events.after(0).records;
        assert_eq!(told.last().unwrap().event, failed);
        // It is bounded all the same, and is no fault.
        for _ in 0..100 * KEPT {
            events.emit(failed.clone());
        }
        assert!(events.last() < KEPT as u64);
        assert!(events.lock().suppressed <= 100);
    }

    #[test]
    fn a_record_has_the_shape_that_clients_know() {
        let events = Events::default();
        events.emit(Event::DeviceAdded {
            id: "d".into(),
            bdf: "0000:00:05.0".into(),
        });
        events.emit(Event::Booted);
        let batch = events.after(0);
        let json = serde_json::to_value(&*batch.records[0]).unwrap();
        assert_eq!(json["source"], "vm");
        assert_eq!(json["event"], "device-added");
        assert_eq!(json["properties"]["bdf"], "0000:00:05.0");
        assert!(json["timestamp"]["secs"].is_u64());
        let json = serde_json::to_value(&*batch.records[1]).unwrap();
        assert_eq!(json["event"], "booted");
        assert_eq!(json["seq"], 2);
    }
}
