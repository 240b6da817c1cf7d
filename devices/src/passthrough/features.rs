//! Which features of a vIOMMU a device of the host shows the guest: PASIDs, address translation
//! services and page requests. A pure decision, made once, when the device becomes a function of
//! the guest.
//!
//! Each feature is either there and works, or it is not shown. What the user asked for (`on`) and
//! cannot be is refused with the reason and the remedy; what was left to us (`auto`) is hidden,
//! and the reason is told once.
//!
//! # The width gate
//!
//! A device that shares a process's page tables gets whatever addresses the process has: nobody
//! looks at what the device can put on the bus. So PASIDs are shown only where the device's DMA
//! addresses are at least as wide as the addresses that the guest's CPUs translate (48 bits, or 57
//! with 5-level paging). A device's width is what its host IOMMU translates for it, or less: what
//! is known of the device, or the user's word for it ([`DmaWidth`]).
#![forbid(unsafe_code)]

use std::fmt;

use viommu::backend::Capabilities;

use super::config::{self, Offer, OfferedPasid, SIZE};

/// What the user wants of a feature.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Switch {
    /// There if it can be, else hidden.
    #[default]
    Auto,
    /// There, or the device is refused.
    On,
    /// Hidden.
    Off,
}

/// What the user wants of a device.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Wishes {
    /// PASIDs.
    pub pasid: Switch,
    /// Page requests.
    pub pri: Switch,
    /// Bits of address that the device can put on the bus, as the user knows it.
    pub dma_width: Option<u8>,
    /// Where in extended configuration space the PASID capability goes.
    pub pasid_offset: Option<u16>,
}

/// Bits of DMA address, and who says so.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DmaWidth {
    /// Bits.
    pub bits: u8,
    /// Who says so.
    pub from: WidthSource,
}

/// Who knows how wide a device's DMA addresses are.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum WidthSource {
    /// The host's IOMMU translates no more, and nothing narrower is known of the device.
    HostIommu,
    /// The device's kind.
    Device,
    /// The user (`dma_width=`).
    User,
}

impl fmt::Display for DmaWidth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let from = match self.from {
            WidthSource::HostIommu => "by the host's IOMMU",
            WidthSource::Device => "by the device's kind",
            WidthSource::User => "by dma_width=",
        };
        write!(f, "{} bits ({from})", self.bits)
    }
}

impl DmaWidth {
    /// The width of the function with configuration space `raw`, behind a host IOMMU that
    /// translates `iommu` bits for it. The user's word is taken for the device; nobody's is taken
    /// for the IOMMU.
    pub fn of(raw: &[u8; SIZE], iommu: u8, user: Option<u8>) -> Self {
        let device = user
            .map(|bits| (bits, WidthSource::User))
            .or_else(|| known(raw).map(|bits| (bits, WidthSource::Device)));
        match device {
            Some((bits, from)) if bits < iommu => Self { bits, from },
            _ => Self {
                bits: iommu,
                from: WidthSource::HostIommu,
            },
        }
    }

    /// What helps when it is too narrow for `cpu` bits.
    fn remedy(&self, cpu: u8) -> String {
        match self.from {
            WidthSource::HostIommu => {
                "no device of this host can share page tables with such CPUs".into()
            }
            WidthSource::Device => {
                format!("say dma_width={cpu} if this one can do more than its kind")
            }
            WidthSource::User => format!("say dma_width={cpu} if the device can do that"),
        }
    }
}

/// Bits of DMA address of kinds of devices whose registers have a fixed width for them.
fn known(raw: &[u8; SIZE]) -> Option<u8> {
    let word = |at: usize| u16::from_le_bytes([raw[at], raw[at + 1]]);
    match (word(0), word(2), [raw[0x0b], raw[0x0a], raw[0x09]]) {
        // nestling's DMA test engine: SOURCE and DESTINATION have 8 bytes.
        (0x1af4, 0x10f0, _) => Some(64),
        // QEMU's edu device drops bits above its mask of 28.
        (0x1234, 0x11e8, _) => Some(28),
        // NVM Express: PRP entries and SGL addresses have 64 bits (NVMe base 2.0, 4.1).
        (_, _, [0x01, 0x08, 0x02]) => Some(64),
        _ => None,
    }
}

/// What there is.
#[derive(Clone, Copy, Debug)]
pub struct Facts<'d> {
    /// The device's configuration space as the host has it.
    pub raw: &'d [u8; SIZE],
    /// What the vIOMMU offers the guest; all off in front of nothing.
    pub offered: Capabilities,
    /// Bits of address that the guest's CPUs translate: 48 or 57.
    pub cpu_width: u8,
    /// Bits of first-stage address that the host's IOMMU translates for the device.
    pub iommu_width: u8,
    /// Bits of PASID that the device has on this host.
    pub pasid_bits: u8,
    /// The host lets the device ask for privileged mode.
    pub privileged: bool,
    /// The host's IOMMU can do ATS with the device.
    pub ats: bool,
    /// The device's page requests reach the guest.
    pub page_requests: bool,
}

/// Why a feature is not there: the rest of a sentence that begins with its name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Missing {
    /// No vIOMMU that has it.
    #[error(
        "the device is behind no vIOMMU that offers it; put it behind a scalable-mode VT-d unit (--viommu type=vtd, iommu=on) with pasid_bits above 0"
    )]
    Viommu,
    /// A conventional PCI function.
    #[error("the device has no PCI Express capability, which PASIDs need")]
    Conventional,
    /// The host has none for it.
    #[error(
        "the host gives this device none; it needs a PASID capability and a host IOMMU in scalable mode (nestling doctor shows both)"
    )]
    Host,
    /// The width gate.
    #[error(
        "the device's DMA addresses have {device}, but the guest's CPUs translate {cpu} bits; {}",
        .device.remedy(*.cpu)
    )]
    Narrow {
        /// The device's.
        device: DmaWidth,
        /// The CPUs'.
        cpu: u8,
    },
    /// No place for the capability.
    #[error("there is no free place for it in configuration space; name one with pasid_offset=")]
    NoPlace,
    /// The named place is not free.
    #[error(
        "pasid_offset={0} is not a multiple of 4 in 256 to 4088 with 8 bytes that no other capability begins in"
    )]
    Taken(u16),
    /// The device has no capability for it.
    #[error("the device has no ATS and PRI capabilities of its own (virtual functions have none)")]
    NoRequests,
}

/// A feature that was asked for and cannot be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{option}=on cannot be: {why}; or leave it to auto")]
pub struct NotOffered {
    /// The option.
    pub option: &'static str,
    /// Why.
    pub why: Missing,
}

/// What is decided: what the guest is shown, and what it might have been shown, with the reason.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decision {
    /// What the guest is shown.
    pub offer: Offer,
    /// How wide the device's addresses are.
    pub width: DmaWidth,
    /// What is hidden although the vIOMMU has it, to be told once.
    pub hidden: Vec<(&'static str, Missing)>,
}

/// Decides.
///
/// # Errors
/// What was asked for and is not there.
pub fn decide(wishes: &Wishes, facts: &Facts<'_>) -> Result<Decision, NotOffered> {
    let width = DmaWidth::of(facts.raw, facts.iommu_width, wishes.dma_width);
    let mut hidden = Vec::new();
    let mut settle = |option, switch, found: Result<OfferedPasid, Missing>| match (switch, found) {
        (Switch::Off, _) => Ok(None),
        (_, Ok(there)) => Ok(Some(there)),
        (Switch::On, Err(why)) => Err(NotOffered { option, why }),
        // Not for want of it here: nobody expects it.
        (Switch::Auto, Err(Missing::Viommu)) => Ok(None),
        (Switch::Auto, Err(why)) => {
            hidden.push((option, why));
            Ok(None)
        }
    };
    let pasid = settle("pasid", wishes.pasid, pasid(wishes, facts, width))?;
    let ats = facts.offered.stage1 && facts.ats;
    let pri = match (wishes.pri, page_requests(facts)) {
        (Switch::Off, _) => false,
        (_, Ok(())) => true,
        (Switch::On, Err(why)) => return Err(NotOffered { option: "pri", why }),
        // Most devices have none: nothing to tell.
        (Switch::Auto, Err(_)) => false,
    };
    Ok(Decision {
        offer: Offer {
            pasid,
            ats,
            pri,
            pin: 0,
        },
        width,
        hidden,
    })
}

fn pasid(wishes: &Wishes, facts: &Facts<'_>, width: DmaWidth) -> Result<OfferedPasid, Missing> {
    let bits = facts.offered.pasid_bits.min(facts.pasid_bits);
    if facts.offered.pasid_bits == 0 {
        return Err(Missing::Viommu);
    }
    if !config::has_express(facts.raw) {
        return Err(Missing::Conventional);
    }
    if bits == 0 {
        return Err(Missing::Host);
    }
    if width.bits < facts.cpu_width {
        return Err(Missing::Narrow {
            device: width,
            cpu: facts.cpu_width,
        });
    }
    let at = place(facts.raw, wishes.pasid_offset)?;
    Ok(OfferedPasid {
        bits,
        // The unit offers no execute requests (ECAP.ERS).
        execute: false,
        privileged: facts.privileged && facts.offered.sre,
        at,
    })
}

fn page_requests(facts: &Facts<'_>) -> Result<(), Missing> {
    if !facts.offered.page_requests {
        return Err(Missing::Viommu);
    }
    if !facts.page_requests || !facts.ats || !config::has_page_requests(facts.raw) {
        return Err(Missing::NoRequests);
    }
    Ok(())
}

/// Eight bytes for a PASID capability: where the user says, else the highest place that reads as
/// zero, is no capability's and has zeros around it.
///
/// Space without a capability belongs to the vendor, who may have registers there that happen to
/// be zero: a user who knows better says so.
fn place(raw: &[u8; SIZE], wanted: Option<u16>) -> Result<u16, Missing> {
    let taken = config::extended_headers(raw);
    if let Some(at) = wanted {
        let inside = at % 4 == 0 && (0x100..=0xff8).contains(&at);
        // None is shorter than 8 bytes.
        let free = taken.iter().all(|&(other, _)| at.abs_diff(other) >= 8);
        return (inside && free).then_some(at).ok_or(Missing::Taken(at));
    }
    let last = taken.iter().map(|&(at, _)| at).max();
    // A capability's length is not told by its header: keep clear of the last one.
    let lowest = last.map_or(0x100, |last| last.saturating_add(0x100));
    let is_free = |at: &u16| {
        let around = usize::from(*at).saturating_sub(16)..(usize::from(*at) + 24).min(SIZE);
        raw[around].iter().all(|&byte| byte == 0)
    };
    let mut places = (lowest..=0xff8).rev().filter(|at| at % 8 == 0);
    places.find(is_free).ok_or(Missing::NoPlace)
}

#[cfg(test)]
#[path = "features_tests.rs"]
mod tests;
