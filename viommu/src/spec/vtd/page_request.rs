//! Page Request Descriptor (7.4.1): what a unit writes to the page request queue.

use bitfield_struct::bitfield;

/// Size of a descriptor in the queue, in bytes. The upper half is private data, which this
/// product never has.
pub const PAGE_REQUEST_SIZE: u64 = 32;
/// The Type field.
pub const PAGE_REQUEST_TYPE: u8 = 1;

/// Page Request Descriptor, bits 63:0.
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct PageRequestLow {
    /// Type: [`PAGE_REQUEST_TYPE`].
    #[bits(8)]
    pub r#type: u8,
    /// PASID Present.
    pub pp: bool,
    /// Private Data Present.
    pub pdp: bool,
    #[bits(6)]
    __: u8,
    /// Requester-ID.
    #[bits(16)]
    pub rid: u16,
    /// PASID (valid with PP).
    #[bits(20)]
    pub pasid: u32,
    /// Execute Requested.
    pub exe: bool,
    /// Privilege Mode Requested.
    pub pm: bool,
    #[bits(10)]
    __: u16,
}

/// Page Request Descriptor, bits 127:64.
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct PageRequestHigh {
    /// Read access Requested.
    pub rd: bool,
    /// Write access Requested.
    pub wr: bool,
    /// Last Page In Group.
    pub lpig: bool,
    /// Page Request Group Index.
    #[bits(9)]
    pub prgi: u16,
    /// Address, bits 63:12.
    #[bits(52)]
    pub addr: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_where_linux_reads_them() {
        let low = PageRequestLow::new()
            .with_exe(true)
            .with_pm(true)
            .with_pasid(0xf_ffff);
        assert_eq!(low.into_bits(), (3 << 52) | (0xf_ffff << 32));
        let high = PageRequestHigh::new()
            .with_lpig(true)
            .with_prgi(0x1ff)
            .with_addr(1);
        assert_eq!(high.into_bits(), 0x1000 | (0x1ff << 3) | 4);
    }
}
