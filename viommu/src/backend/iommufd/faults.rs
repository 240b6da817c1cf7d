//! Page requests of devices: from the kernel's fault queue to front ends, and their answers back.
//!
//! One queue serves all devices of a VM, since nested tables are shared between them. A group is
//! answered exactly once: by the front end; by us, where nobody could; or by the kernel itself,
//! when the target is detached or gets another table (`linux.md`, A4, A6). The cookie is forgotten in
//! the last case, because the kernel may use its number again.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use iommufd_bindings as sys;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use super::object::FaultQueue;
use crate::backend::{Access, EventSink, PageRequest, PageResponse, ResponseCode, Scope};
use crate::page_requests::PageRequests;
use crate::{Iova, Pasid, Rid, Target};

/// Bytes of one `iommu_hwpt_pgfault`.
const RECORD: usize = size_of::<sys::iommu_hwpt_pgfault>();

/// A read takes whole groups only, and fails when the first does not fit: room for more pages
/// than a device can ask for in one (512 outstanding requests).
const BUFFER: usize = RECORD * 1024;
/// How often a buffer is read by one drain, which is more than devices can have outstanding.
const ROUNDS: usize = 64;

/// Page request groups, from the queue to the sinks and back.
pub(super) struct Faults {
    queue: Arc<FaultQueue>,
    pending: Mutex<Pending>,
    /// Held from reading until what was read is delivered, so that who gets it next knows that
    /// the sinks have everything before. Before `pending` in the order of locks.
    reading: Mutex<Vec<u8>>,
}

#[derive(Default)]
struct Pending {
    /// By the kernel's bind id.
    devices: BTreeMap<u32, (Rid, Arc<dyn EventSink>)>,
    /// The kernel's cookie of each group that is owed an answer.
    book: PageRequests<u32>,
}

/// One record of the queue.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Record {
    flags: u32,
    device: u32,
    pasid: u32,
    group: u32,
    perm: u32,
    addr: u64,
    cookie: u32,
}

impl Record {
    fn decode(bytes: &[u8; RECORD]) -> Self {
        let word = |at: usize| {
            let mut word = [0; 4];
            word.copy_from_slice(&bytes[at..at + 4]);
            u32::from_ne_bytes(word)
        };
        Self {
            flags: word(0),
            device: word(4),
            pasid: word(8),
            group: word(12),
            perm: word(16),
            addr: u64::from(word(24)) | u64::from(word(28)) << 32,
            cookie: word(36),
        }
    }

    fn has(&self, flag: u32) -> bool {
        self.flags & flag != 0
    }

    /// What a front end is told. Only the flags that the kernel defines count: it leaks others.
    fn request(&self, endpoint: Rid) -> Option<PageRequest> {
        let pasid = if self.has(sys::iommu_hwpt_pgfault_flags_IOMMU_PGFAULT_FLAGS_PASID_VALID) {
            Some(Pasid::new(self.pasid)?)
        } else {
            None
        };
        let may = |bit| self.perm & bit != 0;
        Some(PageRequest {
            target: Target { endpoint, pasid },
            group: u16::try_from(self.group).ok()?,
            last: self.has(sys::iommu_hwpt_pgfault_flags_IOMMU_PGFAULT_FLAGS_LAST_PAGE),
            iova: Iova(self.addr),
            access: Access {
                read: may(sys::iommu_hwpt_pgfault_perm_IOMMU_PGFAULT_PERM_READ),
                write: may(sys::iommu_hwpt_pgfault_perm_IOMMU_PGFAULT_PERM_WRITE),
            },
            execute: may(sys::iommu_hwpt_pgfault_perm_IOMMU_PGFAULT_PERM_EXEC),
            privileged: may(sys::iommu_hwpt_pgfault_perm_IOMMU_PGFAULT_PERM_PRIV),
        })
    }
}

impl Faults {
    pub(super) fn new(queue: Arc<FaultQueue>) -> Self {
        Self {
            queue,
            pending: Mutex::default(),
            reading: Mutex::new(vec![0; BUFFER]),
        }
    }

    pub(super) fn queue(&self) -> &Arc<FaultQueue> {
        &self.queue
    }

    fn pending(&self) -> MutexGuard<'_, Pending> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on `device`'s requests go to `sink`.
    pub(super) fn connect(&self, device: u32, endpoint: Rid, sink: Arc<dyn EventSink>) {
        self.pending().devices.insert(device, (endpoint, sink));
    }

    /// From now on `device`'s requests are answered Invalid at once.
    pub(super) fn disconnect(&self, device: u32) {
        self.pending().devices.remove(&device);
    }

    /// Takes the table of `target` away by the call `take`. The kernel answers the target's groups
    /// with it, so they are forgotten.
    ///
    /// # Errors
    /// Those of `take`; nothing is forgotten then.
    pub(super) fn with_table<E>(
        &self,
        target: Target,
        take: impl FnOnce() -> Result<(), E>,
    ) -> Result<(), E> {
        // One step for who reads and who answers: what is on record now is of the old table, and
        // what a new one gets is not. In between, the cookie of an answer could be another group's.
        let mut pending = self.pending();
        take()?;
        pending.book.withdraw(Scope::Target(target));
        Ok(())
    }

    /// Answers what still waits for the front end that `endpoint` had. What could be detached has
    /// been answered by the kernel.
    pub(super) fn abandon(&self, endpoint: Rid) {
        let mut pending = self.pending();
        for group in pending.book.withdraw(Scope::Endpoint(endpoint)) {
            self.answer(group.ticket, ResponseCode::Invalid);
        }
    }

    /// How many groups are not answered.
    pub(super) fn unanswered(&self) -> usize {
        self.pending().book.waiting()
    }

    /// Answers a group; one that is not on record was answered already.
    pub(super) fn respond(&self, response: PageResponse) {
        let mut pending = self.pending();
        // The lock is held over the answer: a detach in between (`with_table`) would let the kernel
        // use the cookie's number again, for a group that this is no answer to.
        if let Some(cookie) = pending.book.respond(response.target, response.group) {
            self.answer(cookie, response.code);
        }
    }

    fn answer(&self, cookie: u32, code: ResponseCode) {
        // The kernel knows two codes; "stop asking" is as close to Invalid as it has.
        let code = match code {
            ResponseCode::Success => sys::iommufd_page_response_code_IOMMUFD_PAGE_RESP_SUCCESS,
            ResponseCode::Invalid | ResponseCode::Failure => {
                sys::iommufd_page_response_code_IOMMUFD_PAGE_RESP_INVALID
            }
        };
        let mut bytes = [0; 8];
        bytes[..4].copy_from_slice(&cookie.to_ne_bytes());
        bytes[4..].copy_from_slice(&code.to_ne_bytes());
        // An unknown cookie (EINVAL) means that the kernel answered first, for a detach that is
        // under way on another thread.
        if let Err(error) = self.queue.file().write(&bytes)
            && error.raw_os_error() != Some(libc::EINVAL)
        {
            log::warn!("page response {cookie} was not taken: {error}");
        }
    }

    /// Delivers what is in the queue. Returns when all that was in it is with its sinks. Devices
    /// that ask again as soon as they are answered do not keep it from returning.
    ///
    /// # Errors
    /// The queue cannot be read.
    pub(super) fn drain(&self) -> io::Result<()> {
        let mut buffer = self.reading.lock().unwrap_or_else(PoisonError::into_inner);
        let mut deliver = Vec::new();
        let mut rounds = 0..ROUNDS;
        while rounds.next().is_some() {
            {
                let mut pending = self.pending();
                let length = match self.queue.file().read(&mut buffer) {
                    // The kernel's queue never blocks: it says 0.
                    Ok(0) => return Ok(()),
                    Ok(length) => length,
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                    Err(error) => return Err(error),
                };
                for record in buffer[..length].as_chunks().0 {
                    self.record(&mut pending, Record::decode(record), &mut deliver);
                }
            }
            // No lock: a sink may answer at once.
            for (sink, request) in deliver.drain(..) {
                sink.page_request(request);
            }
        }
        // The queue is still readable, so its thread goes on with it.
        Ok(())
    }

    fn record(
        &self,
        pending: &mut Pending,
        record: Record,
        deliver: &mut Vec<(Arc<dyn EventSink>, PageRequest)>,
    ) {
        let known = pending
            .devices
            .get(&record.device)
            .and_then(|(rid, sink)| Some((record.request(*rid)?, sink.clone())));
        let Some((request, sink)) = known else {
            if record.has(sys::iommu_hwpt_pgfault_flags_IOMMU_PGFAULT_FLAGS_LAST_PAGE) {
                self.answer(record.cookie, ResponseCode::Invalid);
            }
            return;
        };
        if let Err(refused) = pending.book.request(&request, record.cookie) {
            // A group's number that is used again before its answer, or too much that waits.
            log::debug!("page request of {}: {}", request.target, refused.why);
            if request.last {
                self.answer(refused.ticket, ResponseCode::Invalid);
            }
            return;
        }
        deliver.push((sink, request));
    }
}

/// The thread that reads the queue. Dropping it ends the thread.
pub(super) struct Reader {
    stop: EventFd,
    thread: Option<JoinHandle<()>>,
}

impl Reader {
    pub(super) fn start(faults: Arc<Faults>) -> io::Result<Self> {
        let stop = EventFd::new(libc::EFD_NONBLOCK)?;
        let epoll = Epoll::new()?;
        // Only input: the queue is always ready for output.
        for fd in [faults.queue.file().as_raw_fd(), stop.as_raw_fd()] {
            let event = EpollEvent::new(EventSet::IN, fd as u64);
            epoll.ctl(ControlOperation::Add, fd, event)?;
        }
        let stop_fd = stop.as_raw_fd() as u64;
        let thread = crate::thread::spawn("page-requests", move || {
            let mut events = [EpollEvent::default(); 2];
            loop {
                let ready = match epoll.wait(-1, &mut events) {
                    Ok(ready) => ready,
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                    Err(error) => return log::error!("page requests end: {error}"),
                };
                if events[..ready].iter().any(|event| event.data() == stop_fd) {
                    return;
                }
                if let Err(error) = faults.drain() {
                    return log::error!("page requests end: {error}");
                }
            }
        })?;
        Ok(Self {
            stop,
            thread: Some(thread),
        })
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        // A sink may hold the last reference to the back end; its thread cannot wait for itself.
        if self.stop.write(1).is_ok()
            && let Some(thread) = self.thread.take()
            && thread.thread().id() != std::thread::current().id()
            && thread.join().is_err()
        {
            log::error!("the page request thread panicked");
        }
    }
}
