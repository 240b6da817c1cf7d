//! The host's IOMMUs, as sysfs shows them: `/sys/class/iommu/NAME/`.

use std::path::Path;

use serde::Serialize;
use viommu::backend::iommufd::hwinfo::VtdHardware;

use super::{hex, names};

/// One IOMMU.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, utoipa::ToSchema)]
pub struct Iommu {
    /// The kernel's name: `dmar0`, `ivhd0`.
    pub name: String,
    /// What it is.
    #[serde(flatten)]
    pub model: Model,
}

/// The kind of an IOMMU, with what its registers say.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, utoipa::ToSchema)]
#[serde(tag = "model", rename_all = "kebab-case")]
pub enum Model {
    /// Intel VT-d.
    Vtd {
        /// CAP and ECAP, raw.
        registers: VtdHardware,
        /// Bits of address (MGAW).
        address_width: u8,
        /// Scalable mode (SMTS).
        scalable_mode: bool,
        /// Guests' first-stage tables can run in hardware (SMTS, NEST, SLTS, FLTS).
        nesting: bool,
        /// Bits of PASID; 0: none.
        pasid_bits: u8,
        /// Page requests (DT, PRS, PDS).
        page_requests: bool,
        /// 5-level first-stage tables (FL5LP).
        five_level: bool,
        /// Interrupts are remapped (IR), so a device cannot raise others' interrupts.
        interrupt_remapping: bool,
        /// Tables and mappings that can exist at a time.
        domain_ids: u32,
        /// What nestling works around.
        errata: Vec<&'static str>,
    },
    /// AMD-Vi.
    Amd {
        /// The Extended Feature Register, raw.
        features: Option<u64>,
    },
    /// Something else, by the name of its directory.
    Other {
        /// That name.
        kind: String,
    },
}

/// All IOMMUs below `sys`.
pub(super) fn all(sys: &Path) -> Vec<Iommu> {
    let class = sys.join("class/iommu");
    names(&class)
        .into_iter()
        .map(|name| {
            let at = class.join(&name);
            let model = vtd(&at.join("intel-iommu"))
                .or_else(|| amd(&at.join("amd-iommu")))
                .unwrap_or_else(|| Model::Other {
                    kind: name.trim_end_matches(|c: char| c.is_ascii_digit()).into(),
                });
            Iommu { name, model }
        })
        .collect()
}

fn vtd(at: &Path) -> Option<Model> {
    let registers = VtdHardware {
        // The kernel reports it for every unit.
        errata: VtdHardware::ERRATA_772415,
        cap: hex(&at.join("cap"))?,
        ecap: hex(&at.join("ecap"))?,
    };
    Some(Model::Vtd {
        address_width: registers.mgaw(),
        scalable_mode: registers.scalable_mode(),
        nesting: registers.can_nest(),
        pasid_bits: registers.pasid_bits(),
        page_requests: registers.can_page(),
        five_level: registers.fl5lp(),
        interrupt_remapping: registers.ecap & 1 << 3 != 0,
        domain_ids: registers.domains(),
        errata: if registers.can_nest() {
            vec!["772415: no read-only memory under a guest's own tables"]
        } else {
            Vec::new()
        },
        registers,
    })
}

fn amd(at: &Path) -> Option<Model> {
    at.is_dir().then(|| Model::Amd {
        features: hex(&at.join("features")),
    })
}
