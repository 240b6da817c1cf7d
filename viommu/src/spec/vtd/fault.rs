//! Fault reasons (chapter 7, tables 25 and 26) and the Fault Recording Register (10.4.14).

use bitfield_struct::bitfield;
use serde::Serialize;

macro_rules! reasons {
    ($($(#[doc = $doc:literal])* $name:ident = $code:literal,)*) => {
        /// Why a request was blocked. The number is what the record's FR field says.
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize)]
        #[serde(rename_all = "kebab-case")]
        #[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
        #[repr(u8)]
        pub enum FaultReason {
            $($(#[doc = $doc])* $name = $code,)*
        }

        impl FaultReason {
            /// Every reason, in order of its number.
            pub const ALL: &'static [Self] = &[$(Self::$name),*];
        }
    };
}

reasons! {
    /// LRT.2: the root entry is not present.
    RootEntryNotPresent = 0x1,
    /// LCT.2: the context entry is not present.
    ContextEntryNotPresent = 0x2,
    /// LCT.4: the context entry names a width or type that is not supported.
    ContextEntryInvalid = 0x3,
    /// LGN.1: the address is beyond the width.
    AddressBeyondWidth = 0x4,
    /// LGN.2: no permission to write.
    WriteNotPermitted = 0x5,
    /// LGN.3: no permission to read.
    ReadNotPermitted = 0x6,
    /// LSS.1: a second-stage table cannot be read.
    SecondStageAccess = 0x7,
    /// LRT.1: the root table cannot be read.
    RootTableAccess = 0x8,
    /// LCT.1: the context table cannot be read.
    ContextTableAccess = 0x9,
    /// LRT.3: a reserved field of the root entry is set.
    RootEntryReserved = 0xa,
    /// LCT.3: a reserved field of the context entry is set.
    ContextEntryReserved = 0xb,
    /// LSS.2: a reserved field of a second-stage entry is set.
    SecondStageReserved = 0xc,
    /// LCT.5: the context entry's type blocks this kind of request.
    RequestBlocked = 0xd,
    /// LGN.4: the output lies in the interrupt range.
    InterruptRange = 0xe,

    /// A reserved field of an interrupt request is set.
    InterruptRequestReserved = 0x20,
    /// The interrupt index is beyond the table.
    InterruptIndex = 0x21,
    /// The interrupt entry is not present.
    InterruptEntryNotPresent = 0x22,
    /// The interrupt table cannot be read.
    InterruptTableAccess = 0x23,
    /// A reserved field of the interrupt entry is set.
    InterruptEntryReserved = 0x24,
    /// A compatibility-format interrupt was blocked.
    InterruptCompatibilityBlocked = 0x25,
    /// The interrupt's source is not the one the entry allows.
    InterruptSource = 0x26,
    /// A request to the interrupt range that is not an interrupt message.
    NotAnInterrupt = 0x29,

    /// RTA.1: RTADDR names no mode of this unit.
    RootTableAddressInvalid = 0x30,
    /// RTA.2: a request with PASID in legacy mode.
    PasidInLegacyMode = 0x31,
    /// RTA.3: a page request in legacy mode.
    PageRequestInLegacyMode = 0x32,
    /// SRT.1: the root table cannot be read.
    ScalableRootTableAccess = 0x38,
    /// SRT.2: the half of the root entry is not present.
    ScalableRootNotPresent = 0x39,
    /// SRT.3: a reserved field of the root entry is set.
    ScalableRootReserved = 0x3a,
    /// SCT.1: the context table cannot be read.
    ScalableContextTableAccess = 0x40,
    /// SCT.2: the context entry is not present.
    ScalableContextNotPresent = 0x41,
    /// SCT.3: a reserved field of the context entry is set.
    ScalableContextReserved = 0x42,
    /// SCT.4: PRE without DTE, or a RID_PASID beyond the directory.
    ScalableContextInvalid = 0x43,
    /// SCT.5: DTE is clear.
    DeviceTlbDisabled = 0x44,
    /// SCT.6: PASIDE is clear.
    PasidDisabled = 0x45,
    /// SCT.7: the PASID is beyond the directory.
    PasidBeyondDirectory = 0x46,
    /// SCT.8: PRE is clear.
    PageRequestDisabled = 0x47,
    /// SCT.9: a request carries the PASID that RID_PASID sets aside for those without one.
    PasidIsRidPasid = 0x48,
    /// SPD.1: the PASID directory cannot be read.
    PasidDirectoryAccess = 0x50,
    /// SPD.2: the PASID directory entry is not present.
    PasidDirectoryNotPresent = 0x51,
    /// SPD.3: a reserved field of the PASID directory entry is set.
    PasidDirectoryReserved = 0x52,
    /// SPT.1: the PASID table cannot be read.
    PasidTableAccess = 0x58,
    /// SPT.2: the PASID entry is not present.
    PasidEntryNotPresent = 0x59,
    /// SPT.3: a reserved field of the PASID entry is set.
    PasidEntryReserved = 0x5a,
    /// SPT.4: the PASID entry names a type, width or mode that is not supported.
    PasidEntryInvalid = 0x5b,
    /// SPT.5: execute requests are not enabled.
    ExecuteDisabled = 0x5c,
    /// SPT.6: supervisor requests are not enabled.
    SupervisorDisabled = 0x5d,
    /// SFS.1: a first-stage table cannot be read.
    FirstStageAccess = 0x70,
    /// SFS.2: a first-stage entry is not present.
    FirstStageNotPresent = 0x71,
    /// SFS.3: a reserved field of a first-stage entry is set.
    FirstStageReserved = 0x72,
    /// SFS.4: the first-stage root table cannot be read.
    FirstStageRootAccess = 0x73,
    /// SFS.5: the address of a first-stage table is beyond the second stage's width.
    FirstStageTableBeyondWidth = 0x74,
    /// SFS.6: the second stage forbids to read the first-stage root table.
    FirstStageRootNotReadable = 0x75,
    /// SFS.7: the second stage forbids to read a first-stage table.
    FirstStageNotReadable = 0x76,
    /// SFS.8: the second stage forbids to write a first-stage entry's A/D bits.
    FirstStageNotWritable = 0x77,
    /// SSS.1: a second-stage table cannot be read.
    ScalableSecondStageAccess = 0x78,
    /// SSS.2: a second-stage entry has neither R nor W.
    ScalableSecondStageNotPresent = 0x79,
    /// SSS.3: a reserved field of a second-stage entry is set.
    ScalableSecondStageReserved = 0x7a,
    /// SSS.4: the second-stage root table cannot be read.
    SecondStageRootAccess = 0x7b,
    /// SGN.1: the address is not canonical.
    NotCanonical = 0x80,
    /// SGN.2: a user request to a supervisor page.
    UserRequestToSupervisorPage = 0x81,
    /// SGN.3: no permission to execute.
    ExecuteNotPermitted = 0x82,
    /// SGN.4: a pass-through address beyond what there is.
    PassThroughBeyondWidth = 0x83,
    /// SGN.5: the input of the second stage is beyond its width.
    SecondStageBeyondWidth = 0x84,
    /// SGN.6: no permission to write.
    ScalableWriteNotPermitted = 0x85,
    /// SGN.7: no permission to read.
    ScalableReadNotPermitted = 0x86,
    /// SGN.8: the output lies in the interrupt range.
    ScalableInterruptRange = 0x87,
    /// SGN.10: the PASID is beyond those that ECAP.PSS offers.
    PasidNotSupported = 0x89,
    /// SFS.9: an A/D update was needed where walks are not snooped.
    FirstStageAccessedDirty = 0x90,
    /// SFS.10: an atomic A/D update failed.
    FirstStageUpdateFailed = 0x91,
}

impl FaultReason {
    /// What FR says.
    pub const fn code(self) -> u8 {
        self as u8
    }

    /// Whether FPD suppresses the record ("qualified" in table 30). What is wrong with the root
    /// table, and a table that cannot be read, is always recorded.
    pub const fn is_qualified(self) -> bool {
        !matches!(
            self,
            Self::RootEntryNotPresent
                | Self::RootTableAccess
                | Self::RootEntryReserved
                | Self::ContextTableAccess
                | Self::InterruptRequestReserved
                | Self::InterruptIndex
                | Self::InterruptTableAccess
                | Self::InterruptCompatibilityBlocked
                | Self::NotAnInterrupt
                | Self::RootTableAddressInvalid
                | Self::PasidInLegacyMode
                | Self::PageRequestInLegacyMode
                | Self::ScalableRootTableAccess
                | Self::ScalableRootNotPresent
                | Self::ScalableRootReserved
                | Self::ScalableContextTableAccess
                | Self::PasidDirectoryAccess
                | Self::PasidTableAccess
        )
    }
}

/// Fault Recording Register, bits 63:0.
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct FaultRecordLow {
    #[bits(12)]
    __: u16,
    /// Fault Info: the page that was accessed, bits 63:12.
    #[bits(52)]
    pub fi: u64,
}

/// Fault Recording Register, bits 127:64.
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct FaultRecordHigh {
    /// Source Identifier.
    #[bits(16)]
    pub sid: u16,
    #[bits(12)]
    __: u16,
    /// Type bit 2: with T1, 0b00 write, 0b10 read, 0b01 page request, 0b11 AtomicOp (T1 first).
    pub t2: bool,
    /// Privilege Mode Requested (valid with PP).
    pub r#priv: bool,
    /// Execute Permission Requested (valid with PP).
    pub exe: bool,
    /// PASID Present.
    pub pp: bool,
    /// Fault Reason.
    #[bits(8)]
    pub fr: u8,
    /// PASID Value (valid with PP).
    #[bits(20)]
    pub pv: u32,
    /// Address Type.
    #[bits(2)]
    pub at: u8,
    /// Type bit 1.
    pub t1: bool,
    /// Fault: the record is in use; write-one-to-clear.
    pub f: bool,
}

/// A whole Fault Recording Register.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct FaultRecord {
    /// Bits 63:0.
    pub lo: FaultRecordLow,
    /// Bits 127:64.
    pub hi: FaultRecordHigh,
}

/// Size of a Fault Recording Register, in bytes.
pub const FAULT_RECORD_SIZE: u64 = 16;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_has_its_fields_where_linux_reads_them() {
        let hi = FaultRecordHigh::new()
            .with_f(true)
            .with_t1(true)
            .with_pv(0xabcde)
            .with_fr(0x71)
            .with_pp(true)
            .with_sid(0x0018);
        let dword3 = (hi.into_bits() >> 32) as u32;
        let dword2 = hi.into_bits() as u32;
        assert_eq!(dword3 & 0xff, 0x71);
        assert_eq!((dword3 >> 8) & 0xf_ffff, 0xabcde);
        assert_eq!((dword3 >> 30) & 1, 1);
        assert_eq!(dword3 >> 31, 1);
        assert_eq!(dword2 & 0xffff, 0x18);
        assert_eq!(dword2 >> 31, 1);
    }

    #[test]
    fn reasons_are_unique_and_ascending() {
        assert!(
            FaultReason::ALL
                .windows(2)
                .all(|pair| pair[0].code() < pair[1].code())
        );
    }
}
