//! The bits of each descriptor type (6.5.2, and 7.6.1 for page group responses).

use bitfield_struct::bitfield;

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
