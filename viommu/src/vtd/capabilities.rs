//! What a unit offers: what nestling implements, AND what every back end can do, AND what the
//! user asked for (promise 4 of this crate).

use serde::{Deserialize, Serialize};

use crate::backend::Capabilities;
use crate::spec::vtd::descriptor::Offered;
use crate::spec::vtd::registers::{self, Cap, Ecap};

/// Number of fault recording registers.
pub(super) const FAULT_RECORDS: usize = 8;
/// CAP.MAMV: page-selective IOTLB invalidations of up to 2^18 pages (1 GiB).
const MAMV: u8 = 18;
/// ECAP.MHMV: interrupt entry cache invalidations of up to 2^15 entries.
const MHMV: u8 = 15;

/// How the guest programs the unit.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub enum Mode {
    /// Scalable mode: first-stage tables, which the guest changes without an exit, and PASIDs.
    /// A guest that does not know it can still use legacy tables.
    #[default]
    Scalable,
    /// Legacy mode only: second-stage tables.
    Legacy,
}

/// One unit as the user asks for it: `type=vtd,id=ID,mode=…` and the same names in JSON. What is
/// left out is right by itself.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct UnitConfig {
    /// The unit's name in options, errors and state.
    pub id: String,
    /// Scalable or legacy mode. All units of a VM agree.
    pub mode: Mode,
    /// Bits of DMA address, 39, 48 or 57; left out, the most that all hosts and devices have, up
    /// to 48.
    pub address_width: Option<u8>,
    /// Bits of PASID, 1 to 20, or 0 for none; left out, what all hosts have.
    pub pasid_bits: Option<u8>,
    /// Interrupts of the endpoints are remapped.
    pub interrupt_remapping: bool,
    /// The guest may nest: it can be a host itself, with second-stage tables in scalable mode.
    pub nested: bool,
    /// Until the guest enables translation, DMA passes unchanged rather than not at all.
    pub bypass: bool,
    /// The unit remaps interrupts and nothing else: no address width is supported (SAGAW), so
    /// that the guest does not have it translate, and what is behind it does DMA as if it were
    /// behind nothing.
    #[serde(skip)]
    pub interrupts_only: bool,
}

impl Default for UnitConfig {
    fn default() -> Self {
        Self {
            id: "viommu0".into(),
            mode: Mode::Scalable,
            address_width: None,
            pasid_bits: None,
            interrupt_remapping: false,
            nested: false,
            bypass: false,
            interrupts_only: false,
        }
    }
}

/// Why a unit, or an endpoint, cannot be as asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Unsupported {
    /// An option has no such value.
    #[error("vIOMMU {unit}: {option}={value} is not one of {choices}")]
    Value {
        /// The unit.
        unit: String,
        /// The option.
        option: &'static str,
        /// Its value.
        value: String,
        /// What it can be.
        choices: &'static str,
    },
    /// The hosts or devices have less than what was asked for.
    #[error(
        "vIOMMU {unit}: {option}={asked} needs {needs}, but its back ends have {have}; {remedy}"
    )]
    Asked {
        /// The unit.
        unit: String,
        /// The option.
        option: &'static str,
        /// Its value.
        asked: String,
        /// What that needs.
        needs: &'static str,
        /// What there is.
        have: String,
        /// What to do.
        remedy: &'static str,
    },
    /// What was offered to the guest at boot, a later endpoint cannot have.
    #[error(
        "vIOMMU {unit} promised the guest {field}={promised} at boot, but this endpoint has {has}; \
         start the VM with the device, or with options that promise less"
    )]
    Promised {
        /// The unit.
        unit: String,
        /// The field, by its name in the registers.
        field: &'static str,
        /// What was promised.
        promised: u64,
        /// What the endpoint's back end has.
        has: u64,
    },
    /// Units of one VM differ in what must be the same.
    #[error("vIOMMUs {first} and {second} disagree: {what}; make them the same")]
    Disagree {
        /// One unit.
        first: String,
        /// The other.
        second: String,
        /// In what, with both values.
        what: String,
    },
}

/// What the guest sees, and what decoding its tables depends on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Offer {
    /// Capability Register.
    pub cap: Cap,
    /// Extended Capability Register.
    pub ecap: Ecap,
}

/// What only a part outside the unit can provide.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Extras {
    /// Somebody remaps interrupts.
    pub interrupt_remapping: bool,
    /// Somebody allocates PASIDs (VCMD).
    pub pasid_allocation: bool,
}

/// What the user asks for, beside what there is.
struct Wishes<'c> {
    config: &'c UnitConfig,
    have: Capabilities,
}

impl Wishes<'_> {
    fn refused(
        &self,
        option: &'static str,
        asked: impl ToString,
        needs: &'static str,
        have: impl ToString,
        remedy: &'static str,
    ) -> Unsupported {
        Unsupported::Asked {
            unit: self.config.id.clone(),
            option,
            asked: asked.to_string(),
            needs,
            have: have.to_string(),
            remedy,
        }
    }

    fn no_value(&self, option: &'static str, value: u8, choices: &'static str) -> Unsupported {
        Unsupported::Value {
            unit: self.config.id.clone(),
            option,
            value: value.to_string(),
            choices,
        }
    }

    /// Whether the unit has scalable mode.
    fn scalable(&self) -> Result<bool, Unsupported> {
        let scalable = self.config.mode == Mode::Scalable;
        if scalable && !self.have.stage1 {
            return Err(self.refused(
                "mode",
                "scalable",
                "first-stage tables",
                "none",
                "use mode=legacy, or leave mode out",
            ));
        }
        Ok(scalable)
    }

    /// Bits of DMA address.
    fn address_width(&self) -> Result<u8, Unsupported> {
        let most = self.have.address_width;
        let width = match self.config.address_width {
            None => most.min(48),
            Some(width @ (39 | 48 | 57)) if width <= most => width,
            Some(width @ (39 | 48 | 57)) => {
                return Err(self.refused(
                    "address_width",
                    width,
                    "as many bits on every host IOMMU and device",
                    format!("{most} bits"),
                    "leave address_width out to use what there is",
                ));
            }
            Some(width) => return Err(self.no_value("address_width", width, "39, 48 and 57")),
        };
        if width > 48 && self.config.mode == Mode::Scalable && !self.have.stage1_57 {
            return Err(self.refused(
                "address_width",
                width,
                "5-level first-stage tables (FS5LP)",
                "4 levels",
                "use address_width=48",
            ));
        }
        Ok(width)
    }

    /// CAP.SAGAW: second-stage widths that reach no further than the one that MGAW needs.
    fn second_stage_widths(&self, width: u8) -> Result<u8, Unsupported> {
        let (config, have) = (self.config, &self.have);
        let scalable = config.mode == Mode::Scalable;
        let deepest = match width {
            0..=39 => 0,
            40..=48 => 1,
            _ => 2,
        };
        let mut sagaw = (0..=deepest)
            .filter(|&i| have.stage2[i])
            .fold(0u8, |bits, i| bits | 2 << i);
        if !scalable && !have.stage2[deepest] {
            return Err(self.refused(
                "mode",
                "legacy",
                "second-stage tables as deep as address_width",
                format!("second-stage widths {:?}", widths(have.stage2)),
                "use mode=scalable or a smaller address_width",
            ));
        }
        if config.nested {
            if !scalable || !have.nested {
                return Err(self.refused(
                    "nested",
                    "on",
                    "mode=scalable and nesting on every back end",
                    format!(
                        "mode={} and {}",
                        if scalable { "scalable" } else { "legacy" },
                        if have.nested { "nesting" } else { "no nesting" }
                    ),
                    "use nested=off",
                ));
            }
            // Linux takes the widths that both stages have, and first-stage tables have no 39.
            sagaw |= 2 << 1;
        }
        Ok(if config.interrupts_only { 0 } else { sagaw })
    }

    /// Bits of PASID; 0 without.
    fn pasid_bits(&self) -> Result<u8, Unsupported> {
        let most = match self.config.mode {
            Mode::Scalable => self.have.pasid_bits.min(20),
            Mode::Legacy => 0,
        };
        match self.config.pasid_bits {
            None => Ok(most),
            Some(bits) if bits <= most => Ok(bits),
            Some(bits @ 0..=20) => Err(self.refused(
                "pasid_bits",
                bits,
                "mode=scalable and as many PASID bits on every host IOMMU",
                format!("{most} bits"),
                "leave pasid_bits out to use what there is",
            )),
            Some(bits) => Err(self.no_value("pasid_bits", bits, "0 to 20")),
        }
    }
}

impl Offer {
    /// What a unit offers with these back ends.
    ///
    /// # Errors
    /// The user asked for something that is not there; the sentence names the option, what it
    /// needs, what there is and the remedy.
    pub fn compose(
        config: &UnitConfig,
        backends: impl IntoIterator<Item = Capabilities>,
        extras: Extras,
    ) -> Result<Self, Unsupported> {
        let have = backends.into_iter().fold(IMPLEMENTED, Capabilities::and);
        let wishes = Wishes { config, have };
        let scalable = wishes.scalable()?;
        let width = wishes.address_width()?;
        let sagaw = wishes.second_stage_widths(width)?;
        let pasid_bits = wishes.pasid_bits()?;
        if config.interrupt_remapping && !extras.interrupt_remapping {
            return Err(wishes.refused(
                "interrupt_remapping",
                "on",
                "a VMM that remaps interrupts",
                "none",
                "use interrupt_remapping=off",
            ));
        }

        let prs = scalable && have.page_requests;
        let remap = config.interrupt_remapping;
        Ok(Self {
            cap: Cap::new()
                .with_nd(6)
                // The guest's new entries take effect when it says so, not before. Linux does
                // not flush first-stage maps for it, so it costs nothing.
                .with_cm(true)
                .with_sagaw(sagaw)
                .with_mgaw(width - 1)
                .with_zlr(true)
                .with_fro((registers::FRCD / 16) as u16)
                .with_sslps(if sagaw == 0 { 0 } else { 3 })
                .with_psi(true)
                .with_nfr(FAULT_RECORDS as u8 - 1)
                .with_mamv(MAMV)
                .with_dwd(true)
                .with_drd(true)
                .with_fs1gp(scalable && have.stage1_1g)
                .with_fs5lp(scalable && have.stage1_57)
                .with_esirtps(true)
                .with_esrtps(true),
            ecap: Ecap::new()
                .with_c(true)
                .with_qi(true)
                .with_dt(scalable)
                .with_ir(remap)
                .with_eim(remap)
                .with_pt(true)
                .with_sc(have.snoop_control)
                .with_iro((registers::IVA / 16) as u16)
                .with_mhmv(MHMV)
                .with_nest(config.nested)
                .with_prs(prs)
                .with_srs(scalable && have.sre)
                .with_nwfs(scalable)
                .with_eafs(scalable && have.eafe)
                .with_pss(pasid_bits.saturating_sub(1))
                .with_pasid(pasid_bits > 0)
                .with_pds(prs)
                .with_smts(scalable)
                .with_vcs(pasid_bits > 0 && extras.pasid_allocation)
                .with_ssts(config.nested)
                .with_fsts(scalable)
                .with_smpwcs(scalable)
                .with_rps(scalable),
        })
    }

    /// Whether a back end can keep what was offered.
    ///
    /// # Errors
    /// [`Unsupported::Promised`] with the first field that it cannot, and both values.
    pub fn check_endpoint(&self, unit: &str, have: Capabilities) -> Result<(), Unsupported> {
        let (cap, ecap) = (self.cap, self.ecap);
        let have = IMPLEMENTED.and(have);
        let stage2 = widths_as_sagaw(have.stage2);
        // SAGAW may name 48 for nesting alone, which FSTS and NEST cover.
        let sagaw = if ecap.nest() { 0 } else { cap.sagaw() };
        let fields: [(&'static str, u64, u64, bool); 11] = [
            at_least("MGAW", self.address_width(), have.address_width),
            (
                "SAGAW",
                cap.sagaw().into(),
                stage2.into(),
                sagaw & !stage2 == 0,
            ),
            flag("FSTS", ecap.fsts(), have.stage1),
            flag("FS5LP", cap.fs5lp(), have.stage1_57),
            flag("FS1GP", cap.fs1gp(), have.stage1_1g),
            flag("NEST", ecap.nest(), have.nested),
            flag("SRS", ecap.srs(), have.sre),
            flag("EAFS", ecap.eafs(), have.eafe),
            flag("SC", ecap.sc(), have.snoop_control),
            flag("PRS", ecap.prs(), have.page_requests),
            at_least("PASID bits", self.pasid_bits(), have.pasid_bits),
        ];
        match fields.into_iter().find(|(.., kept)| !kept) {
            None => Ok(()),
            Some((field, promised, has, _)) => Err(Unsupported::Promised {
                unit: unit.into(),
                field,
                promised,
                has,
            }),
        }
    }

    /// Bits of DMA address (MGAW).
    pub const fn address_width(&self) -> u8 {
        self.cap.mgaw() + 1
    }

    /// Bits of PASID; 0 when there are none.
    pub const fn pasid_bits(&self) -> u8 {
        if self.ecap.pasid() {
            self.ecap.pss() + 1
        } else {
            0
        }
    }

    /// Whether SAGAW has the width that an AW field names.
    pub(super) const fn has_width(&self, aw: u8) -> bool {
        aw < 5 && self.cap.sagaw() & (1 << aw) != 0
    }

    /// What decoding queue descriptors depends on.
    pub(super) const fn descriptors(&self) -> Offered {
        Offered {
            mamv: self.cap.mamv(),
            scalable: self.ecap.smts(),
            device_tlb: self.ecap.dt(),
            page_requests: self.ecap.prs(),
            interrupt_remapping: self.ecap.ir(),
            mhmv: self.ecap.mhmv(),
        }
    }
}

/// Whether the units of one VM can be in it together: all in the same mode (Linux uses scalable
/// mode only if all have it), and no two with the same name.
///
/// # Errors
/// [`Unsupported::Disagree`] with both units and what differs.
pub fn check_agreement<'c>(
    units: impl IntoIterator<Item = &'c UnitConfig>,
) -> Result<(), Unsupported> {
    let mut names = std::collections::BTreeSet::new();
    let mut first: Option<&UnitConfig> = None;
    for unit in units {
        let first = *first.get_or_insert(unit);
        let disagree = |what| Unsupported::Disagree {
            first: first.id.clone(),
            second: unit.id.clone(),
            what,
        };
        if !names.insert(&unit.id) {
            return Err(disagree(format!("both have the id {}", unit.id)));
        }
        if unit.mode != first.mode {
            return Err(disagree(format!(
                "mode is {:?} for one and {:?} for the other",
                first.mode, unit.mode
            )));
        }
        if unit.interrupt_remapping != first.interrupt_remapping {
            return Err(disagree(format!(
                "interrupt_remapping is {} for one and {} for the other",
                first.interrupt_remapping, unit.interrupt_remapping
            )));
        }
    }
    Ok(())
}

/// What this front end implements.
const IMPLEMENTED: Capabilities = Capabilities {
    stage1: true,
    stage1_57: true,
    stage1_1g: true,
    sre: true,
    eafe: true,
    stage2: [true; 3],
    nested: true,
    pasid_bits: 20,
    page_requests: true,
    address_width: 57,
    page_sizes: u64::MAX,
    snoop_control: true,
};

fn widths(stage2: [bool; 3]) -> Vec<u8> {
    let all = [39, 48, 57].into_iter().zip(stage2);
    all.filter(|(_, has)| *has)
        .map(|(width, _)| width)
        .collect()
}

fn widths_as_sagaw(stage2: [bool; 3]) -> u8 {
    stage2
        .iter()
        .enumerate()
        .fold(0, |bits, (i, has)| bits | u8::from(*has) << (i + 1))
}

fn flag(name: &'static str, promised: bool, has: bool) -> (&'static str, u64, u64, bool) {
    (name, promised.into(), has.into(), has || !promised)
}

fn at_least(name: &'static str, promised: u8, has: u8) -> (&'static str, u64, u64, bool) {
    (name, promised.into(), has.into(), has >= promised)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(change: impl FnOnce(&mut Capabilities)) -> Capabilities {
        let mut host = IMPLEMENTED;
        change(&mut host);
        host
    }

    fn compose(config: UnitConfig, hosts: &[Capabilities]) -> Result<Offer, Unsupported> {
        Offer::compose(&config, hosts.iter().copied(), Extras::default())
    }

    #[test]
    fn the_default_is_scalable_with_caching_mode_and_48_bits() {
        let offer = compose(UnitConfig::default(), &[IMPLEMENTED]).unwrap();
        assert!(offer.cap.cm() && offer.ecap.smts() && offer.ecap.fsts() && offer.ecap.pt());
        assert!(!offer.ecap.ssts() && !offer.ecap.nest() && !offer.ecap.vcs() && !offer.ecap.ir());
        assert!(!offer.cap.rwbf() && !offer.cap.afl() && !offer.cap.plmr() && !offer.cap.phmr());
        assert!(!offer.cap.pi() && !offer.cap.ecmds() && !offer.ecap.pms());
        assert_eq!((offer.address_width(), offer.pasid_bits()), (48, 20));
        assert!(offer.cap.esrtps() && offer.cap.esirtps());
        assert_eq!(usize::from(offer.cap.nfr()) + 1, FAULT_RECORDS);
    }

    #[test]
    fn widths_are_composed_from_the_hosts() {
        for (host_bits, expected) in [(39, 39), (46, 46), (48, 48), (57, 48)] {
            let hosts = [IMPLEMENTED, host(|h| h.address_width = host_bits)];
            let offer = compose(UnitConfig::default(), &hosts).unwrap();
            assert_eq!(offer.address_width(), expected);
        }
        for width in [39, 48, 57] {
            for mode in [Mode::Scalable, Mode::Legacy] {
                let config = UnitConfig {
                    address_width: Some(width),
                    mode,
                    ..UnitConfig::default()
                };
                let offer = compose(config, &[IMPLEMENTED]).unwrap();
                assert_eq!(offer.address_width(), width);
                assert!(offer.has_width(match width {
                    39 => 1,
                    48 => 2,
                    _ => 3,
                }));
            }
        }
    }

    #[test]
    fn what_is_not_there_is_refused_with_the_option_both_values_and_a_remedy() {
        let wide = UnitConfig {
            address_width: Some(57),
            ..UnitConfig::default()
        };
        let error = compose(wide.clone(), &[host(|h| h.address_width = 46)]).unwrap_err();
        let text = error.to_string();
        for part in [
            "viommu0",
            "address_width=57",
            "46 bits",
            "leave address_width out",
        ] {
            assert!(text.contains(part), "{text}");
        }
        assert!(compose(wide, &[host(|h| h.stage1_57 = false)]).is_err());
        let odd = UnitConfig {
            address_width: Some(40),
            ..UnitConfig::default()
        };
        assert!(matches!(compose(odd, &[]), Err(Unsupported::Value { .. })));
        let nested = UnitConfig {
            nested: true,
            ..UnitConfig::default()
        };
        assert!(compose(nested, &[host(|h| h.nested = false)]).is_err());
        let pasids = UnitConfig {
            pasid_bits: Some(16),
            ..UnitConfig::default()
        };
        assert!(compose(pasids, &[host(|h| h.pasid_bits = 15)]).is_err());
        let remap = UnitConfig {
            interrupt_remapping: true,
            ..UnitConfig::default()
        };
        assert!(compose(remap, &[]).is_err());
        assert!(compose(UnitConfig::default(), &[host(|h| h.stage1 = false)]).is_err());
        let legacy = UnitConfig {
            mode: Mode::Legacy,
            ..UnitConfig::default()
        };
        assert!(compose(legacy, &[host(|h| h.stage2 = [false; 3])]).is_err());
    }

    #[test]
    fn nesting_offers_a_width_that_both_stages_have() {
        for width in [39, 48, 57] {
            let nested = UnitConfig {
                nested: true,
                address_width: Some(width),
                ..UnitConfig::default()
            };
            let offer = compose(nested, &[IMPLEMENTED]).unwrap();
            assert!(offer.ecap.nest() && offer.ecap.ssts());
            assert!(offer.has_width(2), "no width for Linux with {width} bits");
        }
    }

    #[test]
    fn a_later_endpoint_that_cannot_keep_the_promise_is_refused_with_field_and_both_values() {
        let offer = compose(UnitConfig::default(), &[IMPLEMENTED]).unwrap();
        assert_eq!(offer.check_endpoint("u", IMPLEMENTED), Ok(()));
        let narrow = host(|h| h.address_width = 39);
        assert_eq!(
            offer.check_endpoint("u", narrow),
            Err(Unsupported::Promised {
                unit: "u".into(),
                field: "MGAW",
                promised: 48,
                has: 39
            })
        );
        type Break = fn(&mut Capabilities);
        let breaks: [(&str, Break); 9] = [
            ("SAGAW", |h| h.stage2 = [true, false, true]),
            ("FSTS", |h| h.stage1 = false),
            ("FS5LP", |h| h.stage1_57 = false),
            ("FS1GP", |h| h.stage1_1g = false),
            ("SRS", |h| h.sre = false),
            ("EAFS", |h| h.eafe = false),
            ("SC", |h| h.snoop_control = false),
            ("PRS", |h| h.page_requests = false),
            ("PASID bits", |h| h.pasid_bits = 16),
        ];
        for (name, change) in breaks {
            match offer.check_endpoint("u", host(change)) {
                Err(Unsupported::Promised { field, .. }) => assert_eq!(field, name),
                other => panic!("{name}: {other:?}"),
            }
        }
    }

    #[test]
    fn units_agree_on_scalable_mode_or_are_refused() {
        let a = UnitConfig::default();
        let b = UnitConfig {
            id: "b".into(),
            ..UnitConfig::default()
        };
        assert_eq!(check_agreement([&a, &b]), Ok(()));
        let legacy = UnitConfig {
            mode: Mode::Legacy,
            ..b.clone()
        };
        let text = check_agreement([&a, &legacy]).unwrap_err().to_string();
        assert!(
            text.contains("viommu0") && text.contains("Legacy"),
            "{text}"
        );
        assert!(check_agreement([&a, &a.clone()]).is_err());
    }

    #[test]
    fn a_unit_for_interrupts_only_offers_no_width_and_remaps() {
        let config = UnitConfig {
            mode: Mode::Legacy,
            interrupt_remapping: true,
            interrupts_only: true,
            ..UnitConfig::default()
        };
        let extras = Extras {
            interrupt_remapping: true,
            pasid_allocation: false,
        };
        let offer = Offer::compose(&config, [], extras).unwrap();
        // What Linux looks at: no SAGAW and no SMTS, so it does not translate.
        assert_eq!((offer.cap.sagaw(), offer.ecap.smts()), (0, false));
        assert!(offer.ecap.ir() && offer.ecap.eim() && offer.ecap.qi());
    }

    #[test]
    fn options_and_json_have_the_same_names() {
        let text = r#"{"id":"x","mode":"legacy","address-width":39,"pasid-bits":0,
            "interrupt-remapping":false,"nested":false,"bypass":true}"#;
        let config: UnitConfig = serde_json::from_str(text).unwrap();
        assert_eq!((config.address_width, config.bypass), (Some(39), true));
        assert!(serde_json::from_str::<UnitConfig>(r#"{"caching-mode":true}"#).is_err());
        assert_eq!(
            serde_json::from_str::<UnitConfig>("{}").unwrap(),
            UnitConfig::default()
        );
    }
}
