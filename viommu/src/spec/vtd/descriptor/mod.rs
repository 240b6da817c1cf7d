//! Invalidation queue descriptors (6.5.2): decoding is pure and total.

pub mod layout;
#[cfg(test)]
mod tests;

use self::layout::{
    ContextCacheLow, DeviceTlbHigh, DeviceTlbLow, Header, InterruptEntryCacheLow, IotlbLow,
    PageGroupResponseHigh, PageGroupResponseLow, PasidDeviceTlbHigh, PasidDeviceTlbLow, PasidLow,
    WaitLow,
};
use super::registers::{InvalidateAddress, QueueError};

/// What a 128-bit descriptor, or a 256-bit one, has as words, lowest first. The upper two are 0
/// for a 128-bit descriptor.
pub type Words = [u64; 4];

/// Descriptor types (Type bits 6:0 are bits 11:9 and 3:0).
pub mod kind {
    /// Context-cache Invalidate (6.5.2.1).
    pub const CONTEXT_CACHE: u8 = 1;
    /// IOTLB Invalidate (6.5.2.3).
    pub const IOTLB: u8 = 2;
    /// Device-TLB Invalidate (6.5.2.5).
    pub const DEVICE_TLB: u8 = 3;
    /// Interrupt Entry Cache Invalidate (6.5.2.7).
    pub const INTERRUPT_ENTRY_CACHE: u8 = 4;
    /// Invalidation Wait (6.5.2.8).
    pub const WAIT: u8 = 5;
    /// PASID-based IOTLB Invalidate (6.5.2.4).
    pub const PASID_IOTLB: u8 = 6;
    /// PASID-cache Invalidate (6.5.2.2).
    pub const PASID_CACHE: u8 = 7;
    /// PASID-based Device-TLB Invalidate (6.5.2.6).
    pub const PASID_DEVICE_TLB: u8 = 8;
    /// Page Group Response (7.6.1).
    pub const PAGE_GROUP_RESPONSE: u8 = 9;
}

/// Whose context entries.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ContextScope {
    /// All.
    Global,
    /// Those of a domain.
    Domain(u16),
    /// Those of a device, with some function bits ignored.
    Device {
        /// The device.
        sid: u16,
        /// Bits of the function number that are ignored.
        mask: u8,
    },
}

/// A range of addresses.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Range {
    /// All.
    All,
    /// `pages` 4 KiB pages, a power of two, from `first`, naturally aligned.
    Pages {
        /// First address, in bytes.
        first: u64,
        /// How many.
        pages: u64,
        /// Only leaf entries changed.
        leaf: bool,
    },
}

/// Whose IOTLB entries.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum IotlbScope {
    /// All.
    Global,
    /// Those of a domain.
    Domain(u16),
    /// Those of a domain's second stage in a range.
    Pages {
        /// The domain.
        did: u16,
        /// Which.
        range: Range,
    },
}

/// Whose PASID entries.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PasidScope {
    /// All.
    Global,
    /// Those of a domain.
    Domain(u16),
    /// One PASID of a domain.
    Pasid {
        /// The domain.
        did: u16,
        /// The PASID.
        pasid: u32,
    },
}

/// A decoded descriptor.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Descriptor {
    /// Forget context entries.
    ContextCache(ContextScope),
    /// Forget PASID entries.
    PasidCache(PasidScope),
    /// Forget translations of a domain.
    Iotlb(IotlbScope),
    /// Forget first-stage translations of a PASID of a domain.
    PasidIotlb {
        /// The domain.
        did: u16,
        /// The PASID.
        pasid: u32,
        /// Which.
        range: Range,
    },
    /// Forget what a device cached for requests without PASID.
    DeviceTlb {
        /// The device.
        sid: u16,
        /// Which.
        range: Range,
    },
    /// Forget what a device cached for a PASID.
    PasidDeviceTlb {
        /// The device.
        sid: u16,
        /// The PASID; `None` for all of them.
        pasid: Option<u32>,
        /// Which.
        range: Range,
    },
    /// Forget interrupt entries.
    InterruptEntryCache {
        /// `None` for all; else the first index and how many, a power of two.
        entries: Option<(u16, u32)>,
    },
    /// Answer a page request group.
    PageGroupResponse {
        /// Who asked.
        rid: u16,
        /// With which PASID.
        pasid: Option<u32>,
        /// Which group.
        prgi: u16,
        /// Response Code.
        code: u8,
    },
    /// Complete when everything before has taken effect.
    Wait {
        /// Write this 32-bit value to this address.
        status: Option<(u64, u32)>,
        /// Send the completion interrupt.
        interrupt: bool,
        /// What follows must wait.
        fence: bool,
        /// Page requests must have reached the queue.
        drain: bool,
    },
}

/// What a unit offers, as far as decoding depends on it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Offered {
    /// CAP.MAMV.
    pub mamv: u8,
    /// Scalable mode is in force: in legacy mode there are types 1 to 5 only (table 26).
    pub scalable: bool,
    /// ECAP.DT.
    pub device_tlb: bool,
    /// ECAP.PRS and PDS.
    pub page_requests: bool,
    /// ECAP.IR.
    pub interrupt_remapping: bool,
    /// ECAP.MHMV.
    pub mhmv: u8,
}

/// Decodes one descriptor.
///
/// # Errors
/// [`QueueError::Type`] for a type that is unknown or not offered, [`QueueError::Reserved`] for a
/// reserved bit, granularity or mask.
#[inline]
pub const fn decode(words: Words, offered: Offered) -> Result<Descriptor, QueueError> {
    let [low, high, upper0, upper1] = words;
    let header = Header::from_bits(low);
    let kind = header.type_lo() | header.type_hi() << 4;
    let known = match kind {
        kind::CONTEXT_CACHE | kind::IOTLB | kind::WAIT => true,
        kind::DEVICE_TLB => offered.device_tlb,
        kind::INTERRUPT_ENTRY_CACHE => offered.interrupt_remapping,
        kind::PASID_IOTLB | kind::PASID_CACHE => offered.scalable,
        kind::PASID_DEVICE_TLB => offered.scalable && offered.device_tlb,
        kind::PAGE_GROUP_RESPONSE => offered.scalable && offered.page_requests,
        _ => false,
    };
    if !known {
        return Err(QueueError::Type);
    }
    let (low_fields, high_fields) = fields(kind);
    if low & !low_fields != 0 || high & !high_fields != 0 || upper0 != 0 || upper1 != 0 {
        return Err(QueueError::Reserved);
    }
    match kind {
        kind::CONTEXT_CACHE => {
            let low = ContextCacheLow::from_bits(low);
            Ok(Descriptor::ContextCache(match low.g() {
                1 => ContextScope::Global,
                2 => ContextScope::Domain(low.did()),
                3 => ContextScope::Device {
                    sid: low.sid(),
                    mask: function_mask(low.fm()),
                },
                _ => return Err(QueueError::Reserved),
            }))
        }
        kind::PASID_CACHE => {
            let low = PasidLow::from_bits(low);
            Ok(Descriptor::PasidCache(match low.g() {
                0 => PasidScope::Domain(low.did()),
                1 => PasidScope::Pasid {
                    did: low.did(),
                    pasid: low.pasid(),
                },
                3 => PasidScope::Global,
                _ => return Err(QueueError::Reserved),
            }))
        }
        kind::IOTLB => {
            let low = IotlbLow::from_bits(low);
            let address = InvalidateAddress::from_bits(high);
            Ok(Descriptor::Iotlb(match low.g() {
                1 => IotlbScope::Global,
                2 => IotlbScope::Domain(low.did()),
                3 if address.am() <= offered.mamv => IotlbScope::Pages {
                    did: low.did(),
                    range: masked_range(address),
                },
                _ => return Err(QueueError::Reserved),
            }))
        }
        kind::PASID_IOTLB => {
            let low = PasidLow::from_bits(low);
            let range = match low.g() {
                2 => Range::All,
                // MAMV does not limit this one, and Linux relies on that.
                3 => masked_range(InvalidateAddress::from_bits(high)),
                _ => return Err(QueueError::Reserved),
            };
            Ok(Descriptor::PasidIotlb {
                did: low.did(),
                pasid: low.pasid(),
                range,
            })
        }
        kind::DEVICE_TLB => {
            let high = DeviceTlbHigh::from_bits(high);
            Ok(Descriptor::DeviceTlb {
                sid: DeviceTlbLow::from_bits(low).sid(),
                range: sized_range(high.addr(), high.s()),
            })
        }
        kind::PASID_DEVICE_TLB => {
            let low = PasidDeviceTlbLow::from_bits(low);
            let high = PasidDeviceTlbHigh::from_bits(high);
            Ok(Descriptor::PasidDeviceTlb {
                sid: low.sid(),
                pasid: if high.g() { None } else { Some(low.pasid()) },
                range: sized_range(high.addr(), high.s()),
            })
        }
        kind::INTERRUPT_ENTRY_CACHE => {
            let low = InterruptEntryCacheLow::from_bits(low);
            let entries = if !low.g() {
                None
            } else if low.im() <= offered.mhmv {
                let count = 1u32 << low.im();
                Some((low.iidx() & !(count - 1) as u16, count))
            } else {
                return Err(QueueError::Reserved);
            };
            Ok(Descriptor::InterruptEntryCache { entries })
        }
        kind::PAGE_GROUP_RESPONSE => {
            let low = PageGroupResponseLow::from_bits(low);
            Ok(Descriptor::PageGroupResponse {
                rid: low.rid(),
                pasid: if low.pp() { Some(low.pasid()) } else { None },
                prgi: PageGroupResponseHigh::from_bits(high).prgi(),
                code: low.rc(),
            })
        }
        _ => {
            let low = WaitLow::from_bits(low);
            if low.pd() && !offered.page_requests {
                return Err(QueueError::Reserved);
            }
            Ok(Descriptor::Wait {
                status: if low.sw() {
                    Some((high, low.status_data()))
                } else {
                    None
                },
                interrupt: low.r#if(),
                fence: low.r#fn(),
                drain: low.pd(),
            })
        }
    }
}

/// The bits that a type uses, in the low and the high quadword.
const fn fields(kind: u8) -> (u64, u64) {
    /// Type in bits 11:9 and 3:0.
    const TYPE: u64 = 0xe0f;
    /// Address, IH and AM.
    const ADDRESS: u64 = !0xf80;
    let (low, high) = match kind {
        kind::CONTEXT_CACHE => (0x0003_ffff_ffff_0030, 0),
        kind::IOTLB => (0xffff_00f0, ADDRESS),
        // PFSID 3:0 is bits 15:12, MIP 20:16, SID 47:32, PFSID 15:4 is 63:52.
        kind::DEVICE_TLB => (0xfff0_ffff_001f_f000, !0xffe),
        kind::INTERRUPT_ENTRY_CACHE => (0x0000_ffff_f800_0010, 0),
        kind::PASID_IOTLB => (0x000f_ffff_ffff_0030, ADDRESS),
        kind::PASID_CACHE => (0x000f_ffff_ffff_0030, 0),
        // MIP is bits 8:4, PFSID 3:0 15:12, SID 31:16, PASID 51:32, PFSID 15:4 63:52.
        kind::PASID_DEVICE_TLB => (0xffff_ffff_ffff_f1f0, !0x7fe),
        // PDP and LPIG (bit 2) were fields once; Linux still writes LPIG.
        kind::PAGE_GROUP_RESPONSE => (0x000f_ffff_ffff_f010, 0xffc),
        _ => (0xffff_ffff_0000_00f0, !3),
    };
    (low | TYPE, high)
}

/// The function bits that FM says to ignore (6.5.2.1).
pub const fn function_mask(fm: u8) -> u8 {
    match fm & 3 {
        0 => 0,
        1 => 0b100,
        2 => 0b110,
        _ => 0b111,
    }
}

/// The range of an address with AM.
pub const fn masked_range(address: InvalidateAddress) -> Range {
    let am = address.am();
    if am >= 52 {
        return Range::All;
    }
    let pages = 1u64 << am;
    Range::Pages {
        first: (address.addr() & !(pages - 1)) << 12,
        pages,
        leaf: address.ih(),
    }
}

/// The range of an address whose trailing ones say how large it is, when `s` (PCIe 6.0, 10.3.2).
const fn sized_range(page: u64, s: bool) -> Range {
    if !s {
        return Range::Pages {
            first: page << 12,
            pages: 1,
            leaf: false,
        };
    }
    let order = page.trailing_ones() + 1;
    // A range of half the address space or more is written as all ones: everything.
    if order >= 51 {
        return Range::All;
    }
    let pages = 1u64 << order;
    Range::Pages {
        first: (page & !(pages - 1)) << 12,
        pages,
        leaf: false,
    }
}
