//! virtio-iommu, device 23 (virtio 1.3, section 5.13): wire format and numbers.
//!
//! Structures have the specification's names and fields. A request has a device-readable part
//! (the `Req…` structures here, without the tail) and a device-writable part (for PROBE the
//! properties, then always [`ReqTail`]). All integers are little-endian.

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// The virtio device ID (5.13.1). As a PCI device: vendor 0x1af4, device 0x1040 + 23 = 0x1057.
pub const DEVICE_ID: u32 = 23;

/// The request queue's index (5.13.2).
pub const REQUESTQ: u16 = 0;
/// The event queue's index (5.13.2).
pub const EVENTQ: u16 = 1;

/// Feature bits, as masks (5.13.3).
pub mod feature {
    /// `input_range` says which virtual addresses can be mapped.
    pub const INPUT_RANGE: u64 = 1 << 0;
    /// `domain_range` says which domain numbers there are.
    pub const DOMAIN_RANGE: u64 = 1 << 1;
    /// MAP and UNMAP are there.
    pub const MAP_UNMAP: u64 = 1 << 2;
    /// Superseded by [`BYPASS_CONFIG`], never offered.
    pub const BYPASS: u64 = 1 << 3;
    /// PROBE is there.
    pub const PROBE: u64 = 1 << 4;
    /// [`map_flag::MMIO`](super::map_flag::MMIO) is there.
    pub const MMIO: u64 = 1 << 5;
    /// The `bypass` field and [`attach_flag::BYPASS`](super::attach_flag::BYPASS) are there.
    pub const BYPASS_CONFIG: u64 = 1 << 6;
    /// Experimental: ATTACH_TABLE and INVALIDATE are there.
    pub const ATTACH_TABLE: u64 = 1 << 8;
}

/// Types of requests (5.13.6).
pub mod req_type {
    /// [`ReqAttach`](super::ReqAttach).
    pub const ATTACH: u8 = 1;
    /// [`ReqDetach`](super::ReqDetach).
    pub const DETACH: u8 = 2;
    /// [`ReqMap`](super::ReqMap).
    pub const MAP: u8 = 3;
    /// [`ReqUnmap`](super::ReqUnmap).
    pub const UNMAP: u8 = 4;
    /// [`ReqProbe`](super::ReqProbe).
    pub const PROBE: u8 = 5;
    /// Experimental: [`ReqAttachPgtVtd`](super::ReqAttachPgtVtd).
    pub const ATTACH_TABLE: u8 = 6;
    /// Experimental: [`ReqInvalidate`](super::ReqInvalidate).
    pub const INVALIDATE: u8 = 7;
}

/// Flags of an ATTACH (5.13.6.3).
pub mod attach_flag {
    /// The domain is a bypass domain.
    pub const BYPASS: u32 = 1 << 0;
}

/// Flags of a MAP (5.13.6.5).
pub mod map_flag {
    /// Reads are allowed.
    pub const READ: u32 = 1 << 0;
    /// Writes are allowed.
    pub const WRITE: u32 = 1 << 1;
    /// The target is a memory-mapped device.
    pub const MMIO: u32 = 1 << 2;
}

/// Experimental: table formats of ATTACH_TABLE.
pub mod table_format {
    /// VT-d's first-stage tables.
    pub const PGTF_VTD: u16 = 4;
}

/// Experimental: `fl_flags` of [`ReqAttachPgtVtd`], as iommufd's for VT-d tables.
pub mod fl_flag {
    /// Supervisor Request Enable.
    pub const SRE: u64 = 1 << 0;
    /// Extended Accessed Flag Enable.
    pub const EAFE: u64 = 1 << 1;
    /// Write Protect Enable.
    pub const WPE: u64 = 1 << 2;
}

/// Experimental: `inv_gran` of [`ReqInvalidate`].
pub mod inval_granularity {
    /// Everything of a domain.
    pub const DOMAIN: u16 = 1 << 0;
    /// Pages.
    pub const VA: u16 = 1 << 2;
}

/// Experimental: `flags` of [`ReqInvalidate`].
pub mod inval_flag {
    /// `archid` is valid.
    pub const ARCHID: u16 = 1 << 1;
    /// Only leaf entries changed.
    pub const LEAF: u16 = 1 << 2;
}

/// Types of properties (5.13.6.8).
pub mod probe_type {
    /// The end of the list.
    pub const NONE: u16 = 0;
    /// [`ProbeResvMem`](super::ProbeResvMem).
    pub const RESV_MEM: u16 = 1;
    /// Experimental: [`ProbePgtVtd`](super::ProbePgtVtd).
    pub const PAGE_TABLE_FMT: u16 = 6;
}

/// `subtype` of [`ProbeResvMem`] (5.13.6.8.1).
pub mod resv_mem_subtype {
    /// Cannot be mapped.
    pub const RESERVED: u8 = 0;
    /// The doorbell of message-signalled interrupts.
    pub const MSI: u8 = 1;
}

/// `reason` of [`Fault`] (5.13.6.9).
pub mod fault_reason {
    /// None of the others.
    pub const UNKNOWN: u8 = 0;
    /// The endpoint is not attached to a domain.
    pub const DOMAIN: u8 = 1;
    /// Not mapped in the domain, or not for this access.
    pub const MAPPING: u8 = 2;
}

/// `flags` of [`Fault`] (5.13.6.9).
pub mod fault_flag {
    /// The access was a read.
    pub const READ: u32 = 1 << 0;
    /// The access was a write.
    pub const WRITE: u32 = 1 << 1;
    /// `address` is valid.
    pub const ADDRESS: u32 = 1 << 8;
}

/// What a request came to (5.13.6).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[repr(u8)]
pub enum Status {
    /// Done.
    Ok = 0,
    /// Virtio communication error.
    IoErr = 1,
    /// Unsupported request.
    Unsupp = 2,
    /// Internal device error.
    DevErr = 3,
    /// Invalid parameters.
    Inval = 4,
    /// Out-of-range parameters.
    Range = 5,
    /// Entry not found.
    NoEnt = 6,
    /// Bad address.
    Fault = 7,
    /// Insufficient resources.
    NoMem = 8,
}

macro_rules! wire {
    ($(#[$doc:meta])* $name:ident, $size:literal { $($(#[$field_doc:meta])* $field:ident: $type:ty,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Debug)]
        #[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
        #[repr(C)]
        pub struct $name { $($(#[$field_doc])* pub $field: $type,)* }
        const _: () = assert!(size_of::<$name>() == $size);
    };
}

wire!(
    /// `struct virtio_iommu_range_64`, both ends inclusive (5.13.4).
    Range64, 16 {
        /// First.
        start: U64,
        /// Last.
        end: U64,
    }
);

wire!(
    /// `struct virtio_iommu_range_32`, both ends inclusive (5.13.4).
    Range32, 8 {
        /// First.
        start: U32,
        /// Last.
        end: U32,
    }
);

wire!(
    /// `struct virtio_iommu_config`: the device's configuration space (5.13.4).
    Config, 40 {
        /// A bit per page size in bytes; the lowest is the granularity.
        page_size_mask: U64,
        /// The virtual addresses that can be mapped.
        input_range: Range64,
        /// The domain numbers there are.
        domain_range: Range32,
        /// Size of the properties in a PROBE request, in bytes.
        probe_size: U32,
        /// 1: endpoints without a domain are in bypass mode.
        bypass: u8,
        /// Zero.
        reserved: [u8; 3],
    }
);

impl Config {
    /// Offset of `bypass`, the only field that a driver may write.
    pub const BYPASS_OFFSET: u64 = 36;
}

wire!(
    /// `struct virtio_iommu_req_head` (5.13.6).
    ReqHead, 4 {
        /// One of [`req_type`].
        r#type: u8,
        /// Ignored.
        reserved: [u8; 3],
    }
);

wire!(
    /// `struct virtio_iommu_req_tail`, the end of the device-writable part (5.13.6).
    ReqTail, 4 {
        /// A [`Status`].
        status: u8,
        /// Zero.
        reserved: [u8; 3],
    }
);

wire!(
    /// Device-readable part of `struct virtio_iommu_req_attach` (5.13.6.3).
    ReqAttach, 20 {
        /// Type ATTACH.
        head: ReqHead,
        /// To which domain.
        domain: U32,
        /// Which endpoint.
        endpoint: U32,
        /// Of [`attach_flag`].
        flags: U32,
        /// Must be zero.
        reserved: [u8; 4],
    }
);

wire!(
    /// Device-readable part of `struct virtio_iommu_req_detach` (5.13.6.4).
    ReqDetach, 20 {
        /// Type DETACH.
        head: ReqHead,
        /// From which domain.
        domain: U32,
        /// Which endpoint.
        endpoint: U32,
        /// Ignored.
        reserved: [u8; 8],
    }
);

wire!(
    /// Device-readable part of `struct virtio_iommu_req_map` (5.13.6.5).
    ReqMap, 36 {
        /// Type MAP.
        head: ReqHead,
        /// In which domain.
        domain: U32,
        /// First virtual address.
        virt_start: U64,
        /// Last virtual address.
        virt_end: U64,
        /// What `virt_start` maps to.
        phys_start: U64,
        /// Of [`map_flag`].
        flags: U32,
    }
);

wire!(
    /// Device-readable part of `struct virtio_iommu_req_unmap` (5.13.6.6).
    ReqUnmap, 28 {
        /// Type UNMAP.
        head: ReqHead,
        /// In which domain.
        domain: U32,
        /// First virtual address.
        virt_start: U64,
        /// Last virtual address.
        virt_end: U64,
        /// Zero.
        reserved: [u8; 4],
    }
);

wire!(
    /// Device-readable part of `struct virtio_iommu_req_probe` (5.13.6.7).
    ReqProbe, 72 {
        /// Type PROBE.
        head: ReqHead,
        /// Which endpoint.
        endpoint: U32,
        /// Ignored.
        reserved: [u8; 64],
    }
);

wire!(
    /// `struct virtio_iommu_probe_property` (5.13.6.7).
    ProbeProperty, 4 {
        /// One of [`probe_type`] in bits 11:0; bits 15:12 zero.
        r#type: U16,
        /// Length of what follows this header, in bytes.
        length: U16,
    }
);

wire!(
    /// `struct virtio_iommu_probe_resv_mem`: virtual addresses that cannot be mapped (5.13.6.8.1).
    ProbeResvMem, 24 {
        /// Type RESV_MEM, length 20.
        head: ProbeProperty,
        /// One of [`resv_mem_subtype`].
        subtype: u8,
        /// Zero.
        reserved: [u8; 3],
        /// First address.
        start: U64,
        /// Last address.
        end: U64,
    }
);

wire!(
    /// Experimental: `struct virtio_iommu_req_attach_pgt_vtd`, an ATTACH_TABLE with a first-stage
    /// table of VT-d (RFC of November 2023 on the list for virtio-iommu's Linux driver).
    ReqAttachPgtVtd, 80 {
        /// Type ATTACH_TABLE.
        head: ReqHead,
        /// To which domain.
        domain: U32,
        /// Which endpoint.
        endpoint: U32,
        /// None are defined.
        flags: U32,
        /// One of [`table_format`].
        format: U16,
        /// Zero.
        reserved: [u8; 2],
        /// Only 0: requests without PASID.
        pasid: U32,
        /// Guest-physical address of the root table.
        pgd: U64,
        /// Of [`fl_flag`].
        fl_flags: U64,
        /// Bits of a virtual address: 48 or 57.
        addr_width: U32,
        /// Zero.
        reserved2: [u8; 36],
    }
);

wire!(
    /// Experimental: `struct virtio_iommu_req_invalidate` (draft 0.13 of the specification).
    ReqInvalidate, 60 {
        /// Type INVALIDATE.
        head: ReqHead,
        /// One of [`inval_granularity`].
        inv_gran: U16,
        /// What to forget: IOTLB (1), device IOTLB (2), PASID cache (4).
        inv_type: U16,
        /// Of [`inval_flag`].
        flags: U16,
        /// Ignored.
        reserved1: [u8; 2],
        /// Of which domain.
        domain: U32,
        /// Ignored: there are no PASIDs.
        pasid: U32,
        /// Ignored.
        reserved2: [u8; 4],
        /// Ignored: VT-d has none.
        archid: U64,
        /// First address.
        virt_start: U64,
        /// How many pages.
        nr_pages: U64,
        /// Bits of a byte offset in such a page.
        granule: u8,
        /// Ignored.
        reserved3: [u8; 11],
    }
);

wire!(
    /// Experimental: `struct virtio_iommu_probe_pgt_vtd`: a VT-d unit's registers, as far as they
    /// matter for first-stage tables.
    ProbePgtVtd, 24 {
        /// Type PAGE_TABLE_FMT, length 20.
        head: ProbeProperty,
        /// PGTF_VTD.
        format: U16,
        /// Zero.
        reserved: [u8; 2],
        /// Capability register.
        cap_reg: U64,
        /// Extended capability register.
        ecap_reg: U64,
    }
);

wire!(
    /// `struct virtio_iommu_fault`: a report on the event queue (5.13.6.9).
    Fault, 24 {
        /// One of [`fault_reason`].
        reason: u8,
        /// Zero.
        reserved: [u8; 3],
        /// Of [`fault_flag`].
        flags: U32,
        /// Which endpoint.
        endpoint: U32,
        /// Zero.
        reserved1: U32,
        /// Which address, when the flag says so.
        address: U64,
    }
);

#[cfg(test)]
mod tests {
    use std::mem::offset_of;

    use super::*;

    #[test]
    fn fields_lie_where_the_specification_puts_them() {
        assert_eq!(offset_of!(Config, input_range), 8);
        assert_eq!(offset_of!(Config, domain_range), 24);
        assert_eq!(offset_of!(Config, probe_size), 32);
        assert_eq!(offset_of!(Config, bypass) as u64, Config::BYPASS_OFFSET);
        assert_eq!(offset_of!(ReqAttach, flags), 12);
        assert_eq!(offset_of!(ReqMap, virt_start), 8);
        assert_eq!(offset_of!(ReqMap, phys_start), 24);
        assert_eq!(offset_of!(ReqMap, flags), 32);
        assert_eq!(offset_of!(ReqUnmap, reserved), 24);
        assert_eq!(offset_of!(ProbeResvMem, start), 8);
        assert_eq!(offset_of!(Fault, endpoint), 8);
        assert_eq!(offset_of!(Fault, address), 16);
    }

    #[test]
    fn a_request_is_little_endian() {
        let map = ReqMap {
            head: ReqHead {
                r#type: req_type::MAP,
                reserved: [0; 3],
            },
            domain: 0x0102_0304.into(),
            virt_start: 0x1000.into(),
            virt_end: 0x1fff.into(),
            phys_start: 0xa000.into(),
            flags: map_flag::READ.into(),
        };
        assert_eq!(
            map.as_bytes()[..12],
            [3, 0, 0, 0, 4, 3, 2, 1, 0, 0x10, 0, 0]
        );
    }
}
