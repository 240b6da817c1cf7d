//! Memory-mapped registers (chapter 10.4): offsets, in bytes from the unit's base, and layouts.

use bitfield_struct::bitfield;

/// Version Register, 32 bits, read-only.
pub const VER: u64 = 0x00;
/// Capability Register, 64 bits, read-only.
pub const CAP: u64 = 0x08;
/// Extended Capability Register, 64 bits, read-only.
pub const ECAP: u64 = 0x10;
/// Global Command Register, 32 bits, write-only.
pub const GCMD: u64 = 0x18;
/// Global Status Register, 32 bits, read-only.
pub const GSTS: u64 = 0x1c;
/// Root Table Address Register, 64 bits.
pub const RTADDR: u64 = 0x20;
/// Context Command Register, 64 bits.
pub const CCMD: u64 = 0x28;
/// Fault Status Register, 32 bits, write-one-to-clear.
pub const FSTS: u64 = 0x34;
/// Fault Event Control Register, 32 bits.
pub const FECTL: u64 = 0x38;
/// Fault Event Data Register, 32 bits.
pub const FEDATA: u64 = 0x3c;
/// Fault Event Address Register, 32 bits.
pub const FEADDR: u64 = 0x40;
/// Fault Event Upper Address Register, 32 bits.
pub const FEUADDR: u64 = 0x44;
/// Protected Memory Enable Register, 32 bits (CAP.PLMR and CAP.PHMR are never offered).
pub const PMEN: u64 = 0x64;
/// Invalidation Queue Head Register, 64 bits, read-only.
pub const IQH: u64 = 0x80;
/// Invalidation Queue Tail Register, 64 bits.
pub const IQT: u64 = 0x88;
/// Invalidation Queue Address Register, 64 bits.
pub const IQA: u64 = 0x90;
/// Invalidation Completion Status Register, 32 bits, write-one-to-clear.
pub const ICS: u64 = 0x9c;
/// Invalidation Event Control Register, 32 bits.
pub const IECTL: u64 = 0xa0;
/// Invalidation Event Data Register, 32 bits.
pub const IEDATA: u64 = 0xa4;
/// Invalidation Event Address Register, 32 bits.
pub const IEADDR: u64 = 0xa8;
/// Invalidation Event Upper Address Register, 32 bits.
pub const IEUADDR: u64 = 0xac;
/// Invalidation Queue Error Record Register, 64 bits, read-only.
pub const IQERCD: u64 = 0xb0;
/// Interrupt Remapping Table Address Register, 64 bits.
pub const IRTA: u64 = 0xb8;
/// Page Request Queue Head Register, 64 bits.
pub const PQH: u64 = 0xc0;
/// Page Request Queue Tail Register, 64 bits.
pub const PQT: u64 = 0xc8;
/// Page Request Queue Address Register, 64 bits.
pub const PQA: u64 = 0xd0;
/// Page Request Status Register, 32 bits, write-one-to-clear.
pub const PRS: u64 = 0xdc;
/// Page Request Event Control Register, 32 bits.
pub const PECTL: u64 = 0xe0;
/// Page Request Event Data Register, 32 bits.
pub const PEDATA: u64 = 0xe4;
/// Page Request Event Address Register, 32 bits.
pub const PEADDR: u64 = 0xe8;
/// Page Request Event Upper Address Register, 32 bits.
pub const PEUADDR: u64 = 0xec;
/// Fault Recording Registers, 128 bits each: where CAP.FRO says. Ours are here.
pub const FRCD: u64 = 0x220;
/// Invalidate Address Register, 64 bits: where ECAP.IRO says. Ours is here.
pub const IVA: u64 = 0xf00;
/// IOTLB Invalidate Register, 64 bits: 8 bytes behind [`IVA`].
pub const IOTLB: u64 = IVA + 8;
/// Size of the register file, in bytes: one page (DRHD.Size = 0).
pub const SIZE: u64 = 0x1000;

/// Capability Register (10.4.2).
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct Cap {
    /// Number of Domains: 2^(4 + 2 ND).
    #[bits(3)]
    pub nd: u8,
    /// Advanced Fault Logging.
    pub afl: bool,
    /// Required Write-Buffer Flushing.
    pub rwbf: bool,
    /// Protected Low-Memory Region.
    pub plmr: bool,
    /// Protected High-Memory Region.
    pub phmr: bool,
    /// Caching Mode: not-present entries may be cached.
    pub cm: bool,
    /// Supported Adjusted Guest Address Widths: bit 1 is 39, bit 2 is 48, bit 3 is 57 bits.
    #[bits(5)]
    pub sagaw: u8,
    #[bits(3)]
    __: u8,
    /// Maximum Guest Address Width, minus 1.
    #[bits(6)]
    pub mgaw: u8,
    /// Zero Length Read.
    pub zlr: bool,
    #[bits(1)]
    __: u8,
    /// Fault-recording Register offset, in 16 bytes.
    #[bits(10)]
    pub fro: u16,
    /// Second Stage Large Page Support: bit 0 is 2 MiB, bit 1 is 1 GiB.
    #[bits(4)]
    pub sslps: u8,
    #[bits(1)]
    __: u8,
    /// Page Selective Invalidation.
    pub psi: bool,
    /// Number of Fault-recording Registers, minus 1.
    #[bits(8)]
    pub nfr: u8,
    /// Maximum Address Mask Value.
    #[bits(6)]
    pub mamv: u8,
    /// Write Draining.
    pub dwd: bool,
    /// Read Draining.
    pub drd: bool,
    /// First Stage 1-GByte Page Support.
    pub fs1gp: bool,
    #[bits(2)]
    __: u8,
    /// Posted Interrupts Support.
    pub pi: bool,
    /// First Stage 5-level Paging Support.
    pub fs5lp: bool,
    /// Enhanced Command Support.
    pub ecmds: bool,
    /// Enhanced Set Interrupt Remap Table Pointer Support.
    pub esirtps: bool,
    /// Enhanced Set Root Table Pointer Support.
    pub esrtps: bool,
}

/// Extended Capability Register (10.4.3).
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct Ecap {
    /// Page-walk Coherency.
    pub c: bool,
    /// Queued Invalidation support.
    pub qi: bool,
    /// Device-TLB support.
    pub dt: bool,
    /// Interrupt Remapping support.
    pub ir: bool,
    /// Extended Interrupt Mode.
    pub eim: bool,
    #[bits(1)]
    __: u8,
    /// Pass Through.
    pub pt: bool,
    /// Snoop Control.
    pub sc: bool,
    /// IOTLB Register Offset, in 16 bytes.
    #[bits(10)]
    pub iro: u16,
    #[bits(2)]
    __: u8,
    /// Maximum Handle Mask Value.
    #[bits(4)]
    pub mhmv: u8,
    #[bits(1)]
    __: u8,
    /// Memory Type Support.
    pub mts: bool,
    /// Nested Translation Support.
    pub nest: bool,
    #[bits(2)]
    __: u8,
    /// Page Request Support.
    pub prs: bool,
    /// Execute Request Support.
    pub ers: bool,
    /// Supervisor Request Support.
    pub srs: bool,
    #[bits(1)]
    __: u8,
    /// No Write Flag Support.
    pub nwfs: bool,
    /// Extended Accessed Flag Support.
    pub eafs: bool,
    /// PASID Size Supported: bits of PASID, minus 1.
    #[bits(5)]
    pub pss: u8,
    /// Process Address Space ID Support.
    pub pasid: bool,
    /// Device-TLB Invalidation Throttle.
    pub dit: bool,
    /// Page-request Drain Support.
    pub pds: bool,
    /// Scalable Mode Translation Support.
    pub smts: bool,
    /// Virtual Command Support.
    pub vcs: bool,
    /// Second-Stage Accessed/Dirty Support.
    pub ssads: bool,
    /// Second-stage Translation Support (scalable mode).
    pub ssts: bool,
    /// First-stage Translation Support (scalable mode).
    pub fsts: bool,
    /// Scalable-Mode Page-walk Coherency.
    pub smpwcs: bool,
    /// RID-PASID Support.
    pub rps: bool,
    #[bits(1)]
    __: u8,
    /// Performance Monitoring Support.
    pub pms: bool,
    /// Abort DMA Mode Support.
    pub adms: bool,
    /// RID_PRIV Support.
    pub rprivs: bool,
    #[bits(10)]
    __: u16,
}

/// Global Command Register (10.4.4) and, with the same places, Global Status Register (10.4.5).
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct Global {
    #[bits(23)]
    __: u32,
    /// Compatibility Format Interrupt (status).
    pub cfi: bool,
    /// Set Interrupt Remap Table Pointer (status); one-shot in the command.
    pub sirtp: bool,
    /// Interrupt Remapping Enable (status).
    pub ire: bool,
    /// Queued Invalidation Enable (status).
    pub qie: bool,
    /// Write Buffer Flush (status); one-shot in the command.
    pub wbf: bool,
    /// Enable Advanced Fault Logging (status).
    pub eafl: bool,
    /// Set Fault Log (status); one-shot in the command.
    pub sfl: bool,
    /// Set Root Table Pointer (status); one-shot in the command.
    pub srtp: bool,
    /// Translation Enable (status).
    pub te: bool,
}

/// What RTADDR.TTM selects (10.4.6).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum TranslationTableMode {
    /// 00b.
    Legacy,
    /// 01b.
    Scalable,
    /// 10b, reserved.
    Reserved,
    /// 11b: every request is aborted (ECAP.ADMS).
    AbortDma,
}

/// Root Table Address Register (10.4.6).
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct Rtaddr {
    #[bits(10)]
    __: u16,
    /// Translation Table Mode, see [`Rtaddr::mode`].
    #[bits(2)]
    pub ttm: u8,
    /// Root Table Address, bits 63:12.
    #[bits(52)]
    pub rta: u64,
}

impl Rtaddr {
    /// What TTM means.
    pub const fn mode(self) -> TranslationTableMode {
        match self.ttm() {
            0 => TranslationTableMode::Legacy,
            1 => TranslationTableMode::Scalable,
            2 => TranslationTableMode::Reserved,
            _ => TranslationTableMode::AbortDma,
        }
    }

    /// The root table's address, in bytes.
    pub const fn address(self) -> u64 {
        self.rta() << 12
    }
}

/// Context Command Register (10.4.7).
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct Ccmd {
    /// Domain-ID.
    #[bits(16)]
    pub did: u16,
    /// Source-ID.
    #[bits(16)]
    pub sid: u16,
    /// Function Mask.
    #[bits(2)]
    pub fm: u8,
    #[bits(25)]
    __: u32,
    /// Context Actual Invalidation Granularity.
    #[bits(2)]
    pub caig: u8,
    /// Context Invalidation Request Granularity: 1 global, 2 domain, 3 device.
    #[bits(2)]
    pub cirg: u8,
    /// Invalidate Context-Cache.
    pub icc: bool,
}

/// IOTLB Invalidate Register (10.4.8.1).
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct Iotlb {
    #[bits(32)]
    __: u32,
    /// Domain-ID.
    #[bits(16)]
    pub did: u16,
    /// Drain Writes.
    pub dw: bool,
    /// Drain Reads.
    pub dr: bool,
    #[bits(7)]
    __: u8,
    /// IOTLB Actual Invalidation Granularity.
    #[bits(2)]
    pub iaig: u8,
    #[bits(1)]
    __: u8,
    /// IOTLB Invalidation Request Granularity: 1 global, 2 domain, 3 page.
    #[bits(2)]
    pub iirg: u8,
    #[bits(1)]
    __: u8,
    /// Invalidate IOTLB.
    pub ivt: bool,
}

/// Invalidate Address Register (10.4.8.2); also the second quadword of both IOTLB descriptors.
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct InvalidateAddress {
    /// Address Mask: 2^AM pages.
    #[bits(6)]
    pub am: u8,
    /// Invalidation Hint: only leaf entries changed.
    pub ih: bool,
    #[bits(5)]
    __: u8,
    /// Address, bits 63:12.
    #[bits(52)]
    pub addr: u64,
}

/// Fault Status Register (10.4.9).
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct Fsts {
    /// Primary Fault Overflow.
    pub pfo: bool,
    /// Primary Pending Fault: the OR of all F fields.
    pub ppf: bool,
    #[bits(2)]
    __: u8,
    /// Invalidation Queue Error.
    pub iqe: bool,
    /// Invalidation Completion Error.
    pub ice: bool,
    /// Invalidation Time-out Error.
    pub ite: bool,
    #[bits(1)]
    __: u8,
    /// Fault Record Index: the first pending record.
    #[bits(8)]
    pub fri: u8,
    #[bits(16)]
    __: u16,
}

/// Control register of an event interrupt: FECTL, IECTL and PECTL (10.4.10, 10.4.22, 10.4.34).
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct EventControl {
    #[bits(30)]
    __: u32,
    /// Interrupt Pending, read-only.
    pub ip: bool,
    /// Interrupt Mask.
    pub im: bool,
}

/// Invalidation Queue Head and Tail (10.4.17, 10.4.18): bits 18:4 are an offset in bytes.
pub const IQ_OFFSET_MASK: u64 = 0x7_fff0;

/// Invalidation Queue Address Register (10.4.19).
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct Iqa {
    /// Queue Size: 2^QS pages of 4 KiB.
    #[bits(3)]
    pub qs: u8,
    #[bits(8)]
    __: u8,
    /// Descriptor Width: 256 bits.
    pub dw: bool,
    /// Invalidation Queue base Address, bits 63:12.
    #[bits(52)]
    pub iqa: u64,
}

/// Why a queue stopped: IQERCD.IQEI (10.4.27).
#[derive(Clone, Copy, PartialEq, Eq, Debug, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
#[repr(u8)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub enum QueueError {
    /// The tail lies beyond the queue's size.
    Tail = 1,
    /// A descriptor could not be fetched.
    Fetch = 2,
    /// A descriptor has an unknown type.
    Type = 3,
    /// A descriptor has a reserved field set, or a field that cannot be obeyed.
    Reserved = 4,
    /// The descriptor width does not fit the mode.
    Width = 5,
    /// The tail is not aligned to 256-bit descriptors.
    Alignment = 6,
    /// RTADDR.TTM is not a mode of this unit.
    TableMode = 7,
}

/// Invalidation Queue Error Record Register (10.4.27).
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct Iqercd {
    /// Invalidation Queue Error Info: a [`QueueError`].
    #[bits(4)]
    pub iqei: u8,
    #[bits(28)]
    __: u32,
    /// Invalidation Time-out Error Source Identifier.
    #[bits(16)]
    pub itesid: u16,
    /// Invalidation Completion Error Source Identifier.
    #[bits(16)]
    pub icesid: u16,
}

/// Interrupt Remapping Table Address Register (10.4.29).
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct Irta {
    /// Size: 2^(S+1) entries.
    #[bits(4)]
    pub s: u8,
    #[bits(7)]
    __: u8,
    /// Extended Interrupt Mode Enable.
    pub eime: bool,
    /// Interrupt Remapping Table Address, bits 63:12.
    #[bits(52)]
    pub irta: u64,
}

/// Page Request Queue Head and Tail (10.4.30, 10.4.31): bits 18:5 are an offset in bytes.
pub const PQ_OFFSET_MASK: u64 = 0x7_ffe0;

/// Page Request Queue Address Register (10.4.32).
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct Pqa {
    /// Page Queue Size: 2^PQS pages of 4 KiB.
    #[bits(3)]
    pub pqs: u8,
    #[bits(9)]
    __: u16,
    /// Page Request Queue Base Address, bits 63:12.
    #[bits(52)]
    pub pqa: u64,
}

/// Page Request Status Register (10.4.33).
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct Prs {
    /// Pending Page Request.
    pub ppr: bool,
    /// Page Request Overflow.
    pub pro: bool,
    #[bits(30)]
    __: u32,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capability_fields_are_where_linux_reads_them() {
        let example = Cap::from_bits(0xc1d2_0080_222f_0086);
        assert_eq!((example.nd(), example.cm(), example.sagaw()), (6, true, 0));
        assert_eq!(
            (example.mgaw(), example.fro(), example.nfr()),
            (47, 0x22, 0)
        );
        assert!(example.psi() && example.fs1gp() && example.esirtps() && example.esrtps());
        assert_eq!(example.mamv(), 18);
        assert_eq!(Cap::new().with_fs5lp(true).into_bits(), 1 << 60);
    }

    #[test]
    fn extended_capability_fields_are_where_linux_reads_them() {
        let example = Ecap::from_bits(0x0001_8d9a_20f0_f0de);
        assert!(example.qi() && example.dt() && example.ir() && example.eim() && example.pt());
        assert!(example.sc() && example.prs() && example.nwfs() && example.pasid());
        assert!(example.pds() && example.smts() && example.fsts() && example.smpwcs());
        assert!(!example.nest() && !example.ssts() && !example.vcs());
        assert_eq!(
            (example.iro(), example.mhmv(), example.pss()),
            (0xf0, 15, 19)
        );
    }

    #[test]
    fn command_fields_are_where_linux_writes_them() {
        assert_eq!(Global::new().with_te(true).into_bits(), 1 << 31);
        assert_eq!(Global::new().with_qie(true).into_bits(), 1 << 26);
        assert_eq!(Global::new().with_cfi(true).into_bits(), 1 << 23);
        assert_eq!(Ccmd::new().with_icc(true).with_cirg(1).into_bits(), 5 << 61);
        assert_eq!(
            Iotlb::new().with_ivt(true).with_iirg(2).into_bits(),
            (1 << 63) | (2 << 60)
        );
        assert_eq!(Iqa::new().with_dw(true).with_qs(1).into_bits(), 0x801);
        assert_eq!(Fsts::new().with_iqe(true).with_fri(3).into_bits(), 0x310);
        assert_eq!(Irta::new().with_eime(true).with_s(15).into_bits(), 0x80f);
    }
}
