//! The translated side of a [`DmaPort`](crate::dma::DmaPort): what happens on the device's thread.

use std::cell::{Cell, RefCell};
use std::marker::PhantomData;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use arc_swap::Guard;
use vm_memory::GuestMemoryMmap;

use super::Shared;
use super::endpoint::Endpoint;
use super::inflight::{EVERYTHING, Slot};
use super::iotlb::{IN_RAM, Iotlb};
use super::target::{INTERRUPT_RANGE, Space, TargetState, lock};
use super::walk::{Allowed, Page, Request, Walker};
use crate::backend::{self, Fault, FaultCause, PageRequest, Translation};
use crate::doorbell::Doorbell;
use crate::interrupt::{MessageSink, Msi};
use crate::page_requests::Refusal;
use crate::{Gpa, Iova, Pasid, Target};

/// Faults that one access reports; a device that goes on after so many is not worth more.
const FAULTS: usize = 16;

/// Why a page request was not sent.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum PageRequestRefused {
    /// The endpoint does not do page requests.
    #[error("the endpoint was made without page requests; give it a page response sink")]
    NotOffered,
    /// The endpoint has no front end.
    #[error("the endpoint is behind no vIOMMU; add it to a unit first")]
    NotClaimed,
    /// The group cannot have it now.
    #[error(transparent)]
    Group(Refusal),
}

/// A translated port.
pub(crate) struct Port {
    shared: Arc<Shared>,
    endpoint: Arc<Endpoint>,
    state: Arc<TargetState>,
    own: Own,
    privileged: bool,
    execute: bool,
}

/// Makes a slot known to those that wait for its target, and for all.
fn register(shared: &Shared, state: &TargetState, slot: &Arc<Slot>) {
    state.add_slot(slot);
    lock(&shared.slots).push(Arc::clone(slot));
}

fn unregister(shared: &Shared, state: &TargetState, slot: &Arc<Slot>) {
    state.remove_slot(slot);
    let mut slots = lock(&shared.slots);
    if let Some(at) = slots.iter().position(|other| Arc::ptr_eq(other, slot)) {
        slots.swap_remove(at);
    }
}

/// What only the access that has begun the slot touches.
#[derive(Default)]
struct Own {
    slot: Arc<Slot>,
    iotlb: OnceLock<Box<Iotlb>>,
    /// Generations that the cache has caught up with.
    seen: AtomicU64,
    seen_by_all: AtomicU64,
}

impl Port {
    pub(super) fn new(
        shared: Arc<Shared>,
        endpoint: Arc<Endpoint>,
        state: Arc<TargetState>,
    ) -> Self {
        let own = Own::default();
        // Registered before its first use, so no change after this one passes it by.
        register(&shared, &state, &own.slot);
        Self {
            shared,
            endpoint,
            state,
            own,
            privileged: false,
            execute: false,
        }
    }

    pub(crate) fn target(&self) -> Target {
        self.state.target
    }

    pub(crate) fn with_pasid(&self, pasid: Pasid) -> Option<Self> {
        if !self.endpoint.can_send(pasid) {
            return None;
        }
        let state = self.endpoint.target_or_new(Some(pasid));
        Some(Self::new(
            Arc::clone(&self.shared),
            Arc::clone(&self.endpoint),
            state,
        ))
    }

    pub(crate) fn set_privileged(&mut self, privileged: bool) {
        self.privileged = privileged && self.target().pasid.is_some();
    }

    pub(crate) fn set_execute(&mut self, execute: bool) {
        self.execute = execute && self.target().pasid.is_some();
    }

    pub(crate) fn access(&self) -> Access<'_> {
        // When another access of this port is in flight, this one has a slot of its own, and no
        // cache.
        let extra = (!self.own.slot.begin()).then(|| {
            let own = Own::default();
            register(&self.shared, &self.state, &own.slot);
            own.slot.begin();
            own
        });
        Access {
            port: self,
            extra,
            announced: Cell::new(NOTHING),
            space: RefCell::default(),
            faults: RefCell::default(),
            one_thread: PhantomData,
        }
    }

    pub(crate) fn message(&self, msi: Msi) -> bool {
        let Some(sink) = self.messages() else {
            return false;
        };
        let msi = match self.endpoint.config.doorbell {
            Doorbell::Intercepted if INTERRUPT_RANGE.contains(&msi.address) => msi,
            Doorbell::Intercepted => return false,
            doorbell => {
                // Delivered as a part of this access: an invalidation waits for it.
                let access = self.access();
                return match access.message(doorbell, msi) {
                    Ok(msi) => {
                        sink.message(self.endpoint.rid, msi);
                        true
                    }
                    Err(cause) => {
                        access.report(Iova(msi.address), backend::Access::WRITE, cause);
                        false
                    }
                };
            }
        };
        sink.message(self.endpoint.rid, msi);
        true
    }

    /// Who takes messages; only requests without PASID are some.
    fn messages(&self) -> Option<&Arc<dyn MessageSink>> {
        let sink = self.endpoint.config.messages.as_ref();
        sink.filter(|_| self.target().pasid.is_none())
    }

    pub(crate) fn translation_request(&self, iova: Iova) -> bool {
        self.endpoint
            .translation_request(self.target(), Iova(iova.0 & !0xfff))
    }

    pub(crate) fn page_request(
        &self,
        iova: Iova,
        access: backend::Access,
        group: u16,
        last: bool,
    ) -> Result<(), PageRequestRefused> {
        let request = PageRequest {
            target: self.target(),
            group,
            last,
            iova: Iova(iova.0 & !0xfff),
            access,
            execute: self.execute,
            privileged: self.privileged,
        };
        let translation = self.state.translation();
        // What led to the request is forgotten, rights of tables on the way included: the guest
        // may make the page valid or more than it was without an invalidation (VT-d 6.5.3.1).
        // What the second stage says of tables goes only with everything.
        let Iova(first) = request.iova;
        self.state.post(
            match translation {
                Translation::Nested { .. } => EVERYTHING,
                _ => first..=first | 0xfff,
            },
            false,
        );
        let blocked = translation == Translation::Blocked;
        self.endpoint.page_request(request, blocked)
    }
}

impl Clone for Port {
    fn clone(&self) -> Self {
        let mut clone = Self::new(
            Arc::clone(&self.shared),
            Arc::clone(&self.endpoint),
            Arc::clone(&self.state),
        );
        (clone.privileged, clone.execute) = (self.privileged, self.execute);
        clone
    }
}

impl Drop for Port {
    fn drop(&mut self) {
        unregister(&self.shared, &self.state, &self.own.slot);
        if let Some(plain) = self.endpoint.target(None) {
            // The device chooses PASIDs, so the state of one that nothing uses must not stay.
            let pasid = self.target().pasid;
            self.state = plain;
            self.endpoint.prune(pasid);
        }
    }
}

/// Where an address lies.
#[derive(Clone, Copy)]
pub(crate) struct Located {
    pub(crate) gpa: u64,
    /// How many bytes of the page follow from there on.
    pub(crate) rest: u64,
    /// They are all RAM, in one region. If not known to be, each may be or not.
    pub(crate) in_ram: bool,
}

impl Located {
    /// `iova` in a page of 2^`shift` bytes, of which `value` has the address and `IN_RAM`.
    #[inline]
    const fn new(iova: u64, value: u64, shift: u32) -> Self {
        let inside = (1u64 << shift) - 1;
        Self {
            gpa: value & !0xfff | iova & inside,
            rest: inside - (iova & inside) + 1,
            in_ram: value & IN_RAM != 0,
        }
    }
}

/// A range that contains nothing.
const NOTHING: (u64, u64) = (1, 0);

/// One piece of DMA work. Bound to its thread, which an invalidation may have to tell from its
/// own.
pub(crate) struct Access<'p> {
    port: &'p Port,
    extra: Option<Own>,
    /// The announced range that was used last.
    announced: Cell<(u64, u64)>,
    /// What is in force, kept for the walks of this access until something changes.
    space: RefCell<Option<Guard<Arc<Space>>>>,
    faults: RefCell<Vec<Fault>>,
    one_thread: PhantomData<*const ()>,
}

impl Access<'_> {
    pub(crate) fn target(&self) -> Target {
        self.port.target()
    }

    pub(crate) fn ram(&self) -> &GuestMemoryMmap<()> {
        self.port.shared.ram.all()
    }

    /// `access` as this port's request.
    pub(crate) fn request(&self, access: backend::Access) -> Request {
        Request {
            read: access.read,
            write: access.write,
            execute: access.read && self.port.execute,
            privileged: self.port.privileged,
        }
    }

    fn own(&self) -> &Own {
        self.extra.as_ref().unwrap_or(&self.port.own)
    }

    /// To be called before anything in the range of `length` bytes (not 0) is translated.
    ///
    /// # Errors
    /// The range does not fit the address space.
    #[inline]
    pub(crate) fn announce(&self, first: u64, length: u64) -> Result<(), FaultCause> {
        let last = first.checked_add(length.saturating_sub(1));
        let last = last.ok_or(FaultCause::AddressWidth)?;
        if !self.has_announced(first, last) {
            self.announced.set(self.own().slot.announce(first, last));
        }
        Ok(())
    }

    #[inline]
    fn has_announced(&self, first: u64, last: u64) -> bool {
        let announced = self.announced.get();
        announced.0 <= first && last <= announced.1
    }

    /// Where `iova`, which is announced, lies in guest memory.
    ///
    /// What most translations find is decided here, in a straight line; the rest is called.
    #[inline]
    pub(crate) fn page(&self, iova: u64, request: Request) -> Result<Located, FaultCause> {
        self.catch_up();
        let needed = request.needs();
        if let Some(iotlb) = self.own().iotlb.get() {
            let place = iotlb.place_4k(iova);
            let value = match place.get() {
                Some(value) => Allowed::from_bits(value).has(needed).then_some(value),
                None => iotlb.walk_short(&self.port.shared.ram, place, iova, needed),
            };
            if let Some(value) = value {
                return Ok(Located::new(iova, value, 12));
            }
        }
        self.page_of_any_size(iova, request)
    }

    /// As [`page`](Self::page), of any size and by a whole walk if need be.
    #[inline(never)]
    fn page_of_any_size(&self, iova: u64, request: Request) -> Result<Located, FaultCause> {
        let needed = request.needs();
        // Once, and once more for each larger page that the guest puts there meanwhile.
        loop {
            self.catch_up();
            let cached = self.own().iotlb.get().and_then(|iotlb| iotlb.get(iova));
            let (value, shift) = match cached {
                Some((value, shift)) if Allowed::from_bits(value).has(needed) => (value, shift),
                _ => self.walk(iova, request)?,
            };
            let inside = (1u64 << shift) - 1;
            let (first, last) = (iova & !inside, iova | inside);
            // To invalidate a part of a large page is to invalidate the page, so all of it is in
            // use; and it was translated before that was announced, so it is translated again.
            if shift > 12 && !self.has_announced(first, last) {
                self.announced.set(self.own().slot.announce(first, last));
                continue;
            }
            return Ok(Located::new(iova, value, shift));
        }
    }

    /// Makes sure that nothing older than the last invalidation is used.
    #[inline]
    fn catch_up(&self) {
        let own = self.own();
        let last = self.port.state.generation();
        let last_of_all = self.port.shared.generation.load(Ordering::SeqCst);
        if last != own.seen.load(Ordering::Relaxed)
            || last_of_all != own.seen_by_all.load(Ordering::Relaxed)
        {
            self.forget(last_of_all);
        }
    }

    #[cold]
    fn forget(&self, last_of_all: u64) {
        let own = self.own();
        let iotlb = own.iotlb.get();
        if own.seen_by_all.swap(last_of_all, Ordering::Relaxed) != last_of_all {
            iotlb.inspect(|iotlb| iotlb.forget_all());
        }
        let seen = own.seen.load(Ordering::Relaxed);
        let last = self.port.state.catch_up(seen, |range, leaves_only| {
            iotlb.inspect(|iotlb| iotlb.forget(range, leaves_only));
        });
        own.seen.store(last, Ordering::Relaxed);
        *self.space.borrow_mut() = None;
    }

    /// `page` as the cache has it.
    #[inline]
    fn cached(&self, page: Page) -> u64 {
        let in_ram = self.port.shared.ram.main_has(page.base, page.shift);
        page.base | if in_ram { IN_RAM } else { 0 } | page.allowed.into_bits()
    }

    /// Walks the tables; returns the page as the cache has it.
    #[inline(never)]
    fn walk(&self, iova: u64, request: Request) -> Result<(u64, u32), FaultCause> {
        let mut space = self.space.borrow_mut();
        let space = space.get_or_insert_with(|| self.port.state.space.load());
        let own = &self.port.own;
        let iotlb = match self.extra {
            None => Some(&**own.iotlb.get_or_init(|| Box::new(Iotlb::new()))),
            Some(_) => None,
        };
        let haw = self.port.shared.config.host_address_width;
        let has_pasid = self.target().pasid.is_some();
        iotlb.inspect(|iotlb| iotlb.belongs_to(space, haw, has_pasid));
        let walker = Walker {
            ram: &self.port.shared.ram,
            haw,
            cache: iotlb,
        };
        let page = space.walk(walker, iova, request, has_pasid)?;
        let value = self.cached(page);
        if let Some(iotlb) = iotlb {
            iotlb.put(iova, page.shift, value);
        }
        Ok((value, page.shift))
    }

    /// What a write of `msi` is where the doorbell is mapped.
    fn message(&self, doorbell: Doorbell, msi: Msi) -> Result<Msi, FaultCause> {
        self.announce(msi.address, 4)?;
        let space = self.port.state.space.load();
        let missed = FaultCause::Doorbell(Gpa(doorbell.region().first));
        let walker = Walker {
            ram: &self.port.shared.ram,
            haw: self.port.shared.config.host_address_width,
            cache: None,
        };
        let gpa = space.doorbell(walker, msi.address);
        let own = gpa.ok().filter(|&gpa| gpa == msi.address);
        let message = own.and_then(|gpa| doorbell.message(gpa, msi.data));
        message.ok_or(missed)
    }

    /// Remembers a fault, to be reported when the access ends.
    pub(crate) fn report(&self, iova: Iova, access: backend::Access, cause: FaultCause) {
        let mut faults = self.faults.borrow_mut();
        if faults.len() < FAULTS {
            let request = self.request(access);
            faults.push(Fault {
                target: self.target(),
                iova,
                access,
                execute: request.execute,
                privileged: request.privileged,
                cause,
            });
        }
    }
}

impl Drop for Access<'_> {
    fn drop(&mut self) {
        self.own().slot.end();
        if let Some(extra) = &self.extra {
            unregister(&self.port.shared, &self.port.state, &extra.slot);
        }
        // Only now: the front end may take a lock that is held by who waits for this access.
        for fault in self.faults.take() {
            self.port.endpoint.fault(fault);
        }
    }
}
