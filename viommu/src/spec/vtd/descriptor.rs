//! Invalidation queue descriptors (6.5.2): decoding is pure and total.

use bitfield_struct::bitfield;

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

/// What every descriptor has in bits 11:0.
#[bitfield(u64)]
pub struct Header {
    /// Type, bits 3:0.
    #[bits(4)]
    pub type_lo: u8,
    /// Granularity, where a type has one.
    #[bits(2)]
    pub g: u8,
    #[bits(3)]
    __: u8,
    /// Type, bits 6:4.
    #[bits(3)]
    pub type_hi: u8,
    #[bits(52)]
    __: u64,
}

/// Context-cache Invalidate Descriptor, bits 63:0.
#[bitfield(u64)]
pub struct ContextCacheLow {
    #[bits(4)]
    pub type_lo: u8,
    /// Granularity: 1 global, 2 domain, 3 device.
    #[bits(2)]
    pub g: u8,
    #[bits(10)]
    __: u16,
    /// Domain-ID.
    #[bits(16)]
    pub did: u16,
    /// Source-ID.
    #[bits(16)]
    pub sid: u16,
    /// Function Mask.
    #[bits(2)]
    pub fm: u8,
    #[bits(14)]
    __: u16,
}

/// IOTLB Invalidate Descriptor, bits 63:0.
#[bitfield(u64)]
pub struct IotlbLow {
    #[bits(4)]
    pub type_lo: u8,
    /// Granularity: 1 global, 2 domain, 3 page.
    #[bits(2)]
    pub g: u8,
    /// Drain Writes.
    pub dw: bool,
    /// Drain Reads.
    pub dr: bool,
    #[bits(8)]
    __: u8,
    /// Domain-ID.
    #[bits(16)]
    pub did: u16,
    #[bits(32)]
    __: u32,
}

/// PASID-cache and PASID-based IOTLB Invalidate Descriptor, bits 63:0.
#[bitfield(u64)]
pub struct PasidLow {
    #[bits(4)]
    pub type_lo: u8,
    /// Granularity. PASID-cache: 0 domain, 1 PASID, 3 global. IOTLB: 2 PASID, 3 page.
    #[bits(2)]
    pub g: u8,
    #[bits(10)]
    __: u16,
    /// Domain-ID.
    #[bits(16)]
    pub did: u16,
    /// PASID.
    #[bits(20)]
    pub pasid: u32,
    #[bits(12)]
    __: u16,
}

/// Device-TLB Invalidate Descriptor, bits 63:0.
#[bitfield(u64)]
pub struct DeviceTlbLow {
    #[bits(4)]
    pub type_lo: u8,
    #[bits(8)]
    __: u8,
    /// Physical Function Source-ID, bits 3:0.
    #[bits(4)]
    pub pfsid_lo: u8,
    /// Max Invalidations Pending.
    #[bits(5)]
    pub mip: u8,
    #[bits(11)]
    __: u16,
    /// Source-ID.
    #[bits(16)]
    pub sid: u16,
    #[bits(4)]
    __: u8,
    /// Physical Function Source-ID, bits 15:4.
    #[bits(12)]
    pub pfsid_hi: u16,
}

/// Device-TLB Invalidate Descriptor, bits 127:64.
#[bitfield(u64)]
pub struct DeviceTlbHigh {
    /// Size: the address encodes a range.
    pub s: bool,
    #[bits(11)]
    __: u16,
    /// Address, bits 63:12.
    #[bits(52)]
    pub addr: u64,
}

/// PASID-based Device-TLB Invalidate Descriptor, bits 63:0.
#[bitfield(u64)]
pub struct PasidDeviceTlbLow {
    #[bits(4)]
    pub type_lo: u8,
    /// Max Invalidations Pending.
    #[bits(5)]
    pub mip: u8,
    #[bits(3)]
    __: u8,
    /// Physical Function Source-ID, bits 3:0.
    #[bits(4)]
    pub pfsid_lo: u8,
    /// Source-ID.
    #[bits(16)]
    pub sid: u16,
    /// PASID.
    #[bits(20)]
    pub pasid: u32,
    /// Physical Function Source-ID, bits 15:4.
    #[bits(12)]
    pub pfsid_hi: u16,
}

/// PASID-based Device-TLB Invalidate Descriptor, bits 127:64.
#[bitfield(u64)]
pub struct PasidDeviceTlbHigh {
    /// Global: all PASIDs of the device.
    pub g: bool,
    #[bits(10)]
    __: u16,
    /// Size: the address encodes a range.
    pub s: bool,
    /// Address, bits 63:12.
    #[bits(52)]
    pub addr: u64,
}

/// Interrupt Entry Cache Invalidate Descriptor, bits 63:0.
#[bitfield(u64)]
pub struct InterruptEntryCacheLow {
    #[bits(4)]
    pub type_lo: u8,
    /// Granularity: index-selective.
    pub g: bool,
    #[bits(22)]
    __: u32,
    /// Index Mask: 2^IM entries.
    #[bits(5)]
    pub im: u8,
    /// Interrupt Index.
    #[bits(16)]
    pub iidx: u16,
    #[bits(16)]
    __: u16,
}

/// Invalidation Wait Descriptor, bits 63:0.
#[bitfield(u64)]
pub struct WaitLow {
    #[bits(4)]
    pub type_lo: u8,
    /// Interrupt Flag.
    pub r#if: bool,
    /// Status Write.
    pub sw: bool,
    /// Fence flag.
    pub r#fn: bool,
    /// Page-request Drain.
    pub pd: bool,
    #[bits(24)]
    __: u32,
    /// Status Data.
    #[bits(32)]
    pub status_data: u32,
}

/// Page Group Response Descriptor, bits 63:0.
#[bitfield(u64)]
pub struct PageGroupResponseLow {
    #[bits(4)]
    pub type_lo: u8,
    /// PASID Present.
    pub pp: bool,
    /// Private Data Present.
    pub pdp: bool,
    #[bits(6)]
    __: u8,
    /// Response Code: 0 success, 1 invalid request, 15 failure.
    #[bits(4)]
    pub rc: u8,
    /// Requester-ID.
    #[bits(16)]
    pub rid: u16,
    /// PASID (valid with PP).
    #[bits(20)]
    pub pasid: u32,
    #[bits(12)]
    __: u16,
}

/// Page Group Response Descriptor, bits 127:64.
#[bitfield(u64)]
pub struct PageGroupResponseHigh {
    #[bits(3)]
    __: u8,
    /// Page Request Group Index.
    #[bits(9)]
    pub prgi: u16,
    #[bits(52)]
    __: u64,
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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const EVERYTHING: Offered = Offered {
        mamv: 18,
        scalable: true,
        device_tlb: true,
        page_requests: true,
        interrupt_remapping: true,
        mhmv: 15,
    };

    fn all(low: u64, high: u64) -> Result<Descriptor, QueueError> {
        decode([low, high, 0, 0], EVERYTHING)
    }

    #[test]
    fn what_linux_writes_is_understood() {
        assert_eq!(
            all(0x1 | (1 << 4), 0),
            Ok(Descriptor::ContextCache(ContextScope::Global))
        );
        assert_eq!(
            all(0x1 | (3 << 4) | (7 << 16) | (0x18 << 32) | (3 << 48), 0),
            Ok(Descriptor::ContextCache(ContextScope::Device {
                sid: 0x18,
                mask: 7
            }))
        );
        assert_eq!(
            all(0x7 | (1 << 4) | (9 << 16) | (5 << 32), 0),
            Ok(Descriptor::PasidCache(PasidScope::Pasid {
                did: 9,
                pasid: 5
            }))
        );
        // IOTLB, page-selective, both drains, 4 pages.
        assert_eq!(
            all(
                0x2 | (3 << 4) | (3 << 6) | (9 << 16),
                0x1234_7000 | (1 << 6) | 2
            ),
            Ok(Descriptor::Iotlb(IotlbScope::Pages {
                did: 9,
                range: Range::Pages {
                    first: 0x1234_4000,
                    pages: 4,
                    leaf: true
                }
            }))
        );
        // Wait: status write and drain.
        assert_eq!(
            all(0x5 | (1 << 5) | (1 << 7) | (2 << 32), 0x1000_0004),
            Ok(Descriptor::Wait {
                status: Some((0x1000_0004, 2)),
                interrupt: false,
                fence: false,
                drain: true
            })
        );
        // Page group response with PASID.
        assert_eq!(
            all(
                0x9 | (1 << 4) | (1 << 12) | (0x18 << 16) | (5 << 32),
                (3 << 3) | 4
            ),
            Ok(Descriptor::PageGroupResponse {
                rid: 0x18,
                pasid: Some(5),
                prgi: 3,
                code: 1
            })
        );
        // Device-TLB of everything: address all ones but the top, S.
        assert_eq!(
            all(0x3 | (0x18 << 32), 0x7fff_ffff_ffff_f001),
            Ok(Descriptor::DeviceTlb {
                sid: 0x18,
                range: Range::All
            })
        );
        assert_eq!(
            all(0x8 | (0x18 << 16) | (5 << 32), 0x1_3000 | (1 << 11)),
            Ok(Descriptor::PasidDeviceTlb {
                sid: 0x18,
                pasid: Some(5),
                range: Range::Pages {
                    first: 0x1_0000,
                    pages: 8,
                    leaf: false
                }
            })
        );
        assert_eq!(
            all(0x4 | (1 << 4) | (3 << 27) | (0x13 << 32), 0),
            Ok(Descriptor::InterruptEntryCache {
                entries: Some((0x10, 8))
            })
        );
    }

    #[test]
    fn a_pasid_iotlb_mask_above_mamv_is_no_error() {
        for am in 0..64 {
            let decoded = all(0x6 | (3 << 4), am).unwrap();
            let Descriptor::PasidIotlb { range, .. } = decoded else {
                panic!("{decoded:?}")
            };
            assert_eq!(range == Range::All, am >= 52);
        }
        assert_eq!(all(0x2 | (3 << 4), 18).map(|_| ()), Ok(()));
        assert_eq!(all(0x2 | (3 << 4), 19), Err(QueueError::Reserved));
    }

    #[test]
    fn a_type_that_was_not_offered_is_an_unknown_type() {
        let none = Offered {
            scalable: false,
            device_tlb: false,
            page_requests: false,
            interrupt_remapping: false,
            ..EVERYTHING
        };
        for kind in 0..128u64 {
            let words = [kind & 15 | (kind >> 4) << 9 | (1 << 4), 0, 0, 0];
            let known = decode(words, none) != Err(QueueError::Type);
            assert_eq!(known, matches!(kind, 1 | 2 | 5), "type {kind}");
            let known = decode(words, EVERYTHING) != Err(QueueError::Type);
            assert_eq!(known, (1..=9).contains(&kind), "type {kind}");
        }
    }

    #[test]
    fn every_reserved_bit_is_refused() {
        // One valid descriptor of each type; each bit outside its fields must be refused.
        let valid = [
            (1, 1u64 << 4),
            (2, 1 << 4),
            (3, 0),
            (4, 0),
            (5, 0),
            (6, 2 << 4),
            (7, 3 << 4),
            (8, 0),
            (9, 0),
        ];
        for (kind, extra) in valid {
            let low = kind | extra;
            assert!(all(low, 0).is_ok(), "type {kind}");
            let (low_fields, high_fields) = fields(kind as u8);
            for bit in 0..64 {
                let refused = all(low | 1 << bit, 0).is_err();
                assert!(
                    refused || low_fields & (1 << bit) != 0,
                    "type {kind} bit {bit}"
                );
                if low_fields & (1 << bit) == 0 {
                    assert_eq!(all(low | 1 << bit, 0), Err(QueueError::Reserved));
                }
                if high_fields & (1 << bit) == 0 {
                    assert_eq!(all(low, 1 << bit), Err(QueueError::Reserved));
                }
                for word in 2..4 {
                    let mut words = [low, 0, 0, 0];
                    words[word] = 1 << bit;
                    assert_eq!(decode(words, EVERYTHING), Err(QueueError::Reserved));
                }
            }
        }
    }

    proptest! {
        #[test]
        fn decoding_is_total_and_ranges_are_aligned(words: [u64; 4], scalable: bool) {
            let offered = Offered { scalable, ..EVERYTHING };
            let range = match decode(words, offered) {
                Ok(Descriptor::PasidIotlb { range, .. }
                    | Descriptor::DeviceTlb { range, .. }
                    | Descriptor::PasidDeviceTlb { range, .. }
                    | Descriptor::Iotlb(IotlbScope::Pages { range, .. })) => range,
                _ => Range::All,
            };
            if let Range::Pages { first, pages, .. } = range {
                prop_assert!(pages.is_power_of_two());
                prop_assert_eq!((first >> 12) % pages, 0);
            }
        }

        #[test]
        fn a_sized_range_contains_its_address(page in 0u64..1 << 52, s: bool) {
            if let Range::Pages { first, pages, .. } = sized_range(page, s) {
                prop_assert!(first >> 12 <= page && page < (first >> 12) + pages);
            }
        }
    }
}
