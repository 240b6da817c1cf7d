//! What a host IOMMU says of itself (`IOMMU_GET_HW_INFO`, or the registers in sysfs), decoded.
#![forbid(unsafe_code)]

use serde::Serialize;

use crate::backend::Capabilities;

/// The answer of `IOMMU_GET_HW_INFO` for one device.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct HwInfo {
    /// The IOMMU in front of the device.
    pub model: HwModel,
    /// Bits of PASID that the device has on this host; 0: none, and a PASID attach would succeed
    /// without doing anything (`linux.md`, A9).
    pub pasid_bits: u8,
    /// `IOMMU_HW_CAP_*` bits.
    pub capabilities: u64,
}

impl HwInfo {
    /// `IOMMU_HW_CAP_DIRTY_TRACKING`.
    pub const DIRTY_TRACKING: u64 = 1;
    /// `IOMMU_HW_CAP_PCI_PASID_EXEC`.
    pub const PASID_EXEC: u64 = 2;
    /// `IOMMU_HW_CAP_PCI_PASID_PRIV`.
    pub const PASID_PRIV: u64 = 4;
    /// `IOMMU_HW_CAP_PCI_ATS_NOT_SUPPORTED`.
    pub const ATS_NOT_SUPPORTED: u64 = 8;

    /// Whether tables on this IOMMU can be made with dirty tracking.
    pub fn dirty_tracking(&self) -> bool {
        self.capabilities & Self::DIRTY_TRACKING != 0
    }
}

/// The kind of an IOMMU, with its capability registers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum HwModel {
    /// Intel VT-d.
    Vtd(VtdHardware),
    /// Another kind, by the kernel's number (4: AMD). Its nested tables are not VT-d's.
    Other(u32),
}

impl HwModel {
    /// Bits of first-stage address that it translates; of an IOMMU without such tables, 48: what
    /// all kernels' own tables cover.
    pub const fn stage1_width(&self) -> u8 {
        match self {
            Self::Vtd(unit) if unit.fl5lp() && unit.mgaw() >= 57 => 57,
            Self::Vtd(unit) if unit.mgaw() < 48 => unit.mgaw(),
            Self::Vtd(_) | Self::Other(_) => 48,
        }
    }

    /// Decodes the kernel's type number and data (as 64-bit words).
    pub fn decode(kind: u32, data: &[u64; 8]) -> Self {
        match kind {
            iommufd_bindings::iommu_hw_info_type_IOMMU_HW_INFO_TYPE_INTEL_VTD => {
                Self::Vtd(VtdHardware {
                    errata: data[0] as u32,
                    cap: data[1],
                    ecap: data[2],
                })
            }
            other => Self::Other(other),
        }
    }
}

/// A VT-d unit's CAP and ECAP registers (VT-d 11.4.2, 11.4.3) and what the kernel adds to them.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct VtdHardware {
    /// `IOMMU_HW_INFO_VTD_ERRATA_*` bits.
    pub errata: u32,
    /// The Capability Register.
    pub cap: u64,
    /// The Extended Capability Register.
    pub ecap: u64,
}

macro_rules! bits {
    ($($(#[$doc:meta])* $name:ident = $register:ident[$bit:literal];)*) => {$(
        $(#[$doc])*
        pub const fn $name(&self) -> bool {
            self.$register >> $bit & 1 != 0
        }
    )*};
}

impl VtdHardware {
    /// Read-only mappings on a nest parent are not honoured by the hardware, so the kernel refuses
    /// them (erratum 772415; Linux 7.2 reports it for every CPU).
    pub const ERRATA_772415: u32 = 1;

    bits! {
        /// CAP.FL1GP: 1 GiB first-stage leaves.
        fl1gp = cap[56];
        /// CAP.FL5LP: 5-level first-stage tables.
        fl5lp = cap[60];
        /// ECAP.DT: device TLBs (ATS).
        device_tlb = ecap[2];
        /// ECAP.SC: snoop control.
        snoop_control = ecap[7];
        /// ECAP.NEST: nested translation.
        nest = ecap[26];
        /// ECAP.PRS: page requests.
        page_requests = ecap[29];
        /// ECAP.SRS: supervisor requests.
        supervisor_requests = ecap[31];
        /// ECAP.EAFS: the extended accessed flag.
        extended_accessed = ecap[34];
        /// ECAP.PASID: process address space ids.
        pasid = ecap[40];
        /// ECAP.PDS: page requests drained by invalidation wait.
        page_drain = ecap[42];
        /// ECAP.SMTS: scalable mode.
        scalable_mode = ecap[43];
        /// ECAP.SLADS: second-stage accessed and dirty flags.
        second_stage_dirty = ecap[45];
        /// ECAP.SLTS: second-stage translation.
        second_stage = ecap[46];
        /// ECAP.FLTS: first-stage translation.
        first_stage = ecap[47];
        /// ECAP.SMPWC: snooped page walks.
        snooped_walks = ecap[48];
    }

    /// CAP.MGAW: the widest guest address, in bits.
    pub const fn mgaw(&self) -> u8 {
        (self.cap >> 16 & 0x3f) as u8 + 1
    }

    /// CAP.ND: how many domain ids the unit has. Each nested table takes one.
    pub const fn domains(&self) -> u32 {
        1 << (4 + 2 * (self.cap & 7))
    }

    /// CAP.SLLPS: 2 MiB and 1 GiB second-stage leaves.
    pub const fn second_stage_large(&self) -> [bool; 2] {
        [self.cap >> 34 & 1 != 0, self.cap >> 35 & 1 != 0]
    }

    /// ECAP.PSS + 1: bits of PASID; 0 without PASIDs.
    pub const fn pasid_bits(&self) -> u8 {
        if self.pasid() && self.scalable_mode() {
            let bits = (self.ecap >> 35 & 0x1f) as u8 + 1;
            if bits > 20 { 20 } else { bits }
        } else {
            0
        }
    }

    /// Whether the kernel makes nest parents here: scalable mode, nesting and both stages. The
    /// kernel does not look at FLTS (`linux.md`, A2), so we do.
    pub const fn can_nest(&self) -> bool {
        self.scalable_mode() && self.nest() && self.second_stage() && self.first_stage()
    }

    /// Whether the unit delivers page requests.
    pub const fn can_page(&self) -> bool {
        self.can_nest() && self.device_tlb() && self.page_requests() && self.page_drain()
    }
}

/// What the kernel can make of an endpoint behind `model`, whose addresses end at
/// `address_width` bits.
///
/// PASIDs are the unit's: an endpoint without them has none whatever the unit says.
pub fn capabilities(model: &HwModel, address_width: u8) -> Capabilities {
    let mirrored = Capabilities {
        stage1: false,
        stage1_57: false,
        stage1_1g: false,
        sre: false,
        eafe: false,
        // Guests' second-stage tables are mirrored in software, so all their depths are.
        stage2: [true; 3],
        nested: false,
        pasid_bits: 0,
        page_requests: false,
        address_width,
        page_sizes: PAGE_SIZES,
        // The kernel makes every DMA mapping coherent, or refuses the device at bind.
        snoop_control: true,
    };
    match model {
        HwModel::Vtd(unit) => Capabilities {
            stage1: unit.can_nest(),
            // 5 levels are of use only where addresses have as many bits.
            stage1_57: unit.can_nest() && model.stage1_width() == 57,
            stage1_1g: unit.can_nest() && unit.fl1gp(),
            sre: unit.can_nest() && unit.supervisor_requests(),
            eafe: unit.can_nest() && unit.extended_accessed(),
            pasid_bits: unit.pasid_bits(),
            page_requests: unit.can_page(),
            snoop_control: unit.snoop_control(),
            ..mirrored
        },
        HwModel::Other(_) => mirrored,
    }
}

/// What a host back end without any device could do: the composition starts here.
pub const ANYTHING: Capabilities = Capabilities {
    stage1: true,
    stage1_57: true,
    stage1_1g: true,
    sre: true,
    eafe: true,
    stage2: [true; 3],
    nested: false,
    pasid_bits: 20,
    page_requests: true,
    address_width: 57,
    page_sizes: PAGE_SIZES,
    snoop_control: true,
};

/// Any multiple of 4 KiB: the kernel splits a mapping into the sizes that the hardware has.
const PAGE_SIZES: u64 = !0xfff;

#[cfg(test)]
mod tests {
    use super::*;

    /// A unit that has everything: ND 65536, MGAW 57, large second-stage leaves; DT, SC, NEST, PRS,
    /// SRS, EAFS, PSS 20 bits, PASID, PDS, SMTS, SLADS, SLTS, FLTS, SMPWC.
    const SPR: VtdHardware = VtdHardware {
        errata: VtdHardware::ERRATA_772415,
        cap: 0x1100_000c_0038_0006,
        ecap: 0x0001_fd9c_a400_0084,
    };

    #[test]
    fn a_scalable_mode_unit_is_decoded_as_the_specification_numbers_its_bits() {
        assert!(SPR.scalable_mode() && SPR.nest() && SPR.second_stage() && SPR.first_stage());
        assert_eq!(SPR.pasid_bits(), 20);
        assert_eq!(SPR.mgaw(), 57);
        assert_eq!(SPR.domains(), 65536);
        let all = capabilities(&HwModel::Vtd(SPR), SPR.mgaw());
        assert!(all.stage1 && all.stage1_57 && all.stage1_1g && all.page_requests);
        assert!(!all.nested, "three stages do not fit into two");
    }

    #[test]
    fn nesting_is_not_offered_without_first_stage_although_the_kernel_would_take_it() {
        let unit = VtdHardware {
            ecap: SPR.ecap & !(1 << 47),
            ..SPR
        };
        assert!(!unit.can_nest());
        let all = capabilities(&HwModel::Vtd(unit), 48);
        assert!(!all.stage1 && !all.stage1_57 && !all.sre && !all.page_requests);
    }

    #[test]
    fn five_levels_are_not_offered_where_addresses_end_before() {
        let narrow = VtdHardware {
            cap: SPR.cap & !(0x3f << 16) | 47 << 16,
            ..SPR
        };
        assert!(narrow.fl5lp() && narrow.mgaw() == 48);
        let model = HwModel::Vtd(narrow);
        assert_eq!(model.stage1_width(), 48);
        assert!(!capabilities(&model, 48).stage1_57);
        assert_eq!(HwModel::Vtd(SPR).stage1_width(), 57);
    }

    #[test]
    fn pasids_need_scalable_mode_and_are_never_wider_than_20_bits() {
        let legacy = VtdHardware {
            ecap: SPR.ecap & !(1 << 43),
            ..SPR
        };
        assert_eq!(legacy.pasid_bits(), 0);
        let wide = VtdHardware {
            ecap: SPR.ecap | 0x1f << 35,
            ..SPR
        };
        assert_eq!(wide.pasid_bits(), 20);
    }

    #[test]
    fn an_unknown_iommu_translates_in_software_made_domains_only() {
        let model = HwModel::decode(4, &[!0; 8]);
        assert_eq!(model, HwModel::Other(4));
        let all = capabilities(&model, 47);
        assert!(!all.stage1 && all.stage2 == [true; 3] && all.address_width == 47);
    }

    #[test]
    fn composition_never_widens() {
        let one = capabilities(&HwModel::Vtd(SPR), 57);
        assert_eq!(ANYTHING.and(one), one);
        let both = one.and(capabilities(&HwModel::Other(4), 47));
        assert_eq!((both.stage1, both.address_width), (false, 47));
    }
}
