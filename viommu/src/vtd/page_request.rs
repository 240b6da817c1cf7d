//! The page request queue: descriptors, overflow, PRS and the page request event (7.4, 10.4.30
//! to 10.4.37).

use std::sync::Arc;

use vm_memory::{Bytes, GuestMemoryMmap};

use super::event::EventInterrupt;
use super::queue::Ring;
use crate::backend::{Backend, PageRequest, ResponseCode};
use crate::interrupt::Msi;
use crate::page_requests::{Limits, PageRequests};
use crate::spec::vtd::page_request::{
    PAGE_REQUEST_SIZE, PAGE_REQUEST_TYPE, PageRequestHigh, PageRequestLow,
};
use crate::spec::vtd::registers::{self, PQ_OFFSET_MASK, Pqa, Prs};

/// What became of a request.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Queued {
    /// It is in the guest's queue.
    Yes,
    /// It is not; if it was the last of its group its device is answered with this now.
    No(ResponseCode),
}

/// PQH, PQT, PQA, PRS, PECTL and its message, and which answers are owed.
pub(super) struct PageQueue {
    head: u32,
    tail: u32,
    address: Pqa,
    status: Prs,
    event: EventInterrupt,
    /// Who is owed an answer, with the back end that passes it on.
    pub(super) book: PageRequests<Arc<dyn Backend>>,
    queued: u64,
    refused: u64,
}

impl Default for PageQueue {
    fn default() -> Self {
        Self {
            head: 0,
            tail: 0,
            address: Pqa::new(),
            status: Prs::new(),
            event: EventInterrupt::default(),
            book: PageRequests::new(Limits::default()),
            queued: 0,
            refused: 0,
        }
    }
}

impl PageQueue {
    /// Whether `offset` (of a dword) is one of these registers.
    pub(super) fn owns(offset: u64) -> bool {
        matches!(offset, registers::PQH..=registers::PEUADDR)
    }

    /// Registers as after reset. The book is the caller's to withdraw.
    pub(super) fn reset_registers(&mut self) {
        self.head = 0;
        self.tail = 0;
        self.address = Pqa::new();
        self.status = Prs::new();
        self.event = EventInterrupt::default();
    }

    fn ring(&self) -> Ring {
        let base = self.address.pqa() << 12;
        Ring::new(base, self.address.pqs(), PAGE_REQUEST_SIZE as u32)
    }

    /// Reads the dword at `offset`.
    pub(super) fn read(&self, offset: u64) -> u32 {
        match offset {
            registers::PQH => self.head,
            registers::PQT => self.tail,
            registers::PQA => self.address.into_bits() as u32,
            0xd4 => (self.address.into_bits() >> 32) as u32,
            registers::PRS => self.status.into_bits(),
            registers::PECTL..=registers::PEUADDR => {
                self.event.read((offset - registers::PECTL) / 4)
            }
            _ => 0,
        }
    }

    /// Writes the dword at `offset`; the interrupt to send.
    pub(super) fn write(&mut self, offset: u64, value: u32) -> Option<Msi> {
        let address = self.address.into_bits();
        match offset {
            registers::PQH => self.head = value & PQ_OFFSET_MASK as u32,
            registers::PQT => self.tail = value & PQ_OFFSET_MASK as u32,
            registers::PQA => {
                let low = u64::from(value) & 0xffff_f007;
                self.address = Pqa::from_bits(address & !0xffff_ffff | low);
            }
            0xd4 => {
                let high = u64::from(value) << 32;
                self.address = Pqa::from_bits(address & 0xffff_ffff | high);
            }
            registers::PRS => {
                let clear = Prs::from_bits(value);
                self.status.set_ppr(self.status.ppr() && !clear.ppr());
                self.status.set_pro(self.status.pro() && !clear.pro());
                if self.status == Prs::new() {
                    self.event.serviced();
                }
            }
            registers::PECTL..=registers::PEUADDR => {
                return self.event.write((offset - registers::PECTL) / 4, value);
            }
            _ => {}
        }
        None
    }

    /// A device asks. With overflow the device is told to try again, as 7.4.1 has it: it will ask
    /// again if the page is still not there.
    pub(super) fn request(
        &mut self,
        ram: &GuestMemoryMmap<()>,
        request: &PageRequest,
        backend: Arc<dyn Backend>,
    ) -> (Queued, Option<Msi>) {
        let ring = self.ring();
        let usable = ring.contains(self.head) && ring.contains(self.tail);
        if self.status.pro() {
            self.refused += 1;
            return (Queued::No(ResponseCode::Success), None);
        }
        if !usable || ring.is_full(self.head, self.tail) {
            return (Queued::No(ResponseCode::Success), self.overflow());
        }
        if let Err(refused) = self.book.request(request, backend) {
            self.refused += 1;
            log::debug!("page request of {}: {}", request.target, refused.why);
            return (Queued::No(ResponseCode::Invalid), None);
        }
        let written = ring
            .address(self.tail)
            .is_some_and(|at| ram.write_slice(&descriptor(request), at).is_ok());
        if !written {
            if request.last {
                self.book.respond(request.target, request.group);
            }
            return (Queued::No(ResponseCode::Success), self.overflow());
        }
        self.tail = ring.next(self.tail);
        self.queued += 1;
        let event = self.status == Prs::new();
        self.status.set_ppr(true);
        (Queued::Yes, if event { self.event.raise() } else { None })
    }

    fn overflow(&mut self) -> Option<Msi> {
        self.refused += 1;
        let event = self.status == Prs::new();
        self.status.set_pro(true);
        if event { self.event.raise() } else { None }
    }

    /// How many were queued and refused.
    pub(super) fn counts(&self) -> (u64, u64) {
        (self.queued, self.refused)
    }
}

fn descriptor(request: &PageRequest) -> [u8; PAGE_REQUEST_SIZE as usize] {
    let pasid = request.target.pasid;
    let low = PageRequestLow::new()
        .with_type(PAGE_REQUEST_TYPE)
        .with_pp(pasid.is_some())
        .with_rid(request.target.endpoint.0)
        .with_pasid(pasid.map_or(0, |pasid| pasid.0))
        .with_exe(pasid.is_some() && request.execute)
        .with_pm(pasid.is_some() && request.privileged);
    let high = PageRequestHigh::new()
        .with_rd(request.access.read)
        .with_wr(request.access.write)
        .with_lpig(request.last)
        .with_prgi(request.group)
        .with_addr(request.iova.0 >> 12);
    let mut bytes = [0; PAGE_REQUEST_SIZE as usize];
    bytes[..8].copy_from_slice(&low.into_bits().to_le_bytes());
    bytes[8..16].copy_from_slice(&high.into_bits().to_le_bytes());
    bytes
}
