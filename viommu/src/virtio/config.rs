//! What a virtio-iommu offers: composed from the hosts behind it, then frozen (promise 4 of this crate).

use super::domain::Rules;
use super::mappings;
use crate::Rid;
use crate::backend::{Capabilities, Refused};
use crate::doorbell::Doorbell;
use crate::reserved::Regions;
use crate::spec::virtio_iommu::{self as spec, feature};

/// What one virtio-iommu offers to its driver.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Config {
    /// A bit per page size in bytes; the lowest, of at least 4096, is the granularity.
    pub page_size_mask: u64,
    /// Virtual addresses that can be mapped, inclusive.
    pub input_range: (u64, u64),
    /// Domain numbers, inclusive.
    pub domain_range: (u32, u32),
    /// Bytes of properties that a PROBE tells. Each reserved region takes 24.
    pub probe_size: u32,
    /// Whether endpoints without a domain are in bypass mode at the start: needed to boot from a
    /// disk behind the unit, at the price of what DMA can reach until the driver loads.
    pub bypass: bool,
    /// Bits of a guest-physical address.
    pub gpa_bits: u8,
    /// Mappings that one domain may have. One takes 16 to 36 bytes here, and what the back end
    /// needs.
    pub domain_mappings: usize,
    /// Mappings that all domains together may have.
    pub mappings: usize,
    /// **Experimental**: offer ATTACH_TABLE and INVALIDATE, by which the guest's own first-stage
    /// tables (in VT-d's format) translate. Drafts of the specification; no released driver knows
    /// them.
    pub attach_table: bool,
    /// How the endpoints' interrupts reach their doorbell.
    pub doorbell: Doorbell,
}

/// What cannot be offered.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// No page size.
    #[error(
        "page sizes {0:#x} leave none of 4 KiB to 1 GiB for a virtio-iommu; put these devices behind another unit"
    )]
    PageSizes(u64),
    /// Addresses too narrow.
    #[error("{0} bits of address are too few for a virtio-iommu; 32 is the least")]
    AddressWidth(u8),
}

/// Why an endpoint was not added. Nothing is changed then.
#[derive(Debug, thiserror::Error)]
pub enum AddError {
    /// There is one with that number.
    #[error("endpoint {0} is already behind this virtio-iommu; remove it first")]
    Exists(Rid),
    /// Its IOMMU cannot do what the guest was promised.
    #[error(
        "endpoint {endpoint} has {what} {has:#x} but the guest was offered {offered:#x}; add the device before boot, so that less is offered"
    )]
    Capability {
        /// Which endpoint.
        endpoint: Rid,
        /// What is too small.
        what: &'static str,
        /// What it has.
        has: u64,
        /// What it would need.
        offered: u64,
    },
    /// Its interrupts do not go the way that this unit's do.
    #[error(
        "endpoint {endpoint} has its MSI doorbell at {has}, but this virtio-iommu promises {offered}; put it behind another vIOMMU, with msi={msi}"
    )]
    Doorbell {
        /// Which endpoint.
        endpoint: Rid,
        /// How its doorbell works.
        has: Doorbell,
        /// How the unit's do.
        offered: Doorbell,
        /// What the option would have to be.
        msi: &'static str,
    },
    /// PROBE has no room for its reserved regions.
    #[error(
        "endpoint {endpoint} needs {needs} bytes of properties but the guest was offered {offered}; add the device before boot, so that more is offered"
    )]
    Properties {
        /// Which endpoint.
        endpoint: Rid,
        /// Bytes needed.
        needs: usize,
        /// Bytes there are.
        offered: u32,
    },
    /// The back end refused.
    #[error("endpoint {endpoint} cannot be put behind this virtio-iommu")]
    Refused {
        /// Which endpoint.
        endpoint: Rid,
        /// Why.
        #[source]
        source: Refused,
    },
}

impl Config {
    /// Room for 85 reserved regions.
    const PROBE_SIZE: u32 = 2048;
    /// Page sizes from 4 KiB to 1 GiB.
    const PAGE_SIZES: u64 = (1 << 31) - (1 << mappings::PAGE_SHIFT);

    /// What can be offered in front of back ends that together can do `capabilities`, for
    /// endpoints of which none has more reserved regions than `regions`.
    ///
    /// # Errors
    /// [`ConfigError`] when that is nothing.
    pub fn compose(capabilities: &Capabilities, regions: usize) -> Result<Self, ConfigError> {
        let lowest = 1u64.checked_shl(capabilities.page_sizes.trailing_zeros());
        // A smaller page of the host is no reason for smaller ones of the guest.
        let page_size_mask = match lowest {
            Some(lowest) if lowest < 1 << mappings::PAGE_SHIFT => {
                capabilities.page_sizes & Self::PAGE_SIZES | 1 << mappings::PAGE_SHIFT
            }
            _ => capabilities.page_sizes & Self::PAGE_SIZES,
        };
        if page_size_mask == 0 {
            return Err(ConfigError::PageSizes(capabilities.page_sizes));
        }
        if capabilities.address_width < 32 {
            return Err(ConfigError::AddressWidth(capabilities.address_width));
        }
        let bits = u32::from(capabilities.address_width).min(mappings::IOVA_BITS);
        // One more for the interrupt window, one for tables.
        let needs = ((regions + 2) * size_of::<spec::ProbeResvMem>()).next_power_of_two();
        Ok(Self {
            page_size_mask,
            input_range: (0, (1 << bits) - 1),
            domain_range: (0, u32::from(u16::MAX)),
            probe_size: Self::PROBE_SIZE.max(u32::try_from(needs).unwrap_or(u32::MAX)),
            bypass: false,
            gpa_bits: mappings::GPA_BITS as u8,
            domain_mappings: 1 << 20,
            mappings: 1 << 21,
            attach_table: false,
            doorbell: Doorbell::Intercepted,
        })
    }

    /// The features that are always offered, without those of the transport.
    pub const FEATURES: u64 = feature::INPUT_RANGE
        | feature::DOMAIN_RANGE
        | feature::MAP_UNMAP
        | feature::PROBE
        | feature::MMIO
        | feature::BYPASS_CONFIG;

    /// The features that this unit offers, without those of the transport.
    pub fn features(&self) -> u64 {
        match self.attach_table {
            true => Self::FEATURES | feature::ATTACH_TABLE,
            false => Self::FEATURES,
        }
    }

    /// What the state machine checks requests against: the store's own limits hold whatever the
    /// fields say.
    pub(super) fn rules(&self) -> Rules {
        let lowest = self.page_size_mask.trailing_zeros();
        Rules {
            granule: 1 << lowest.clamp(mappings::PAGE_SHIFT, 63),
            input_range: (
                self.input_range.0,
                self.input_range.1.min((1 << mappings::IOVA_BITS) - 1),
            ),
            domain_range: self.domain_range,
            gpa_bits: u32::from(self.gpa_bits).min(mappings::GPA_BITS),
            domain_mappings: self.domain_mappings,
            mappings: self.mappings,
        }
    }

    /// The configuration space, with the `bypass` that is in force.
    pub(super) fn space(&self, bypass: bool) -> spec::Config {
        let rules = self.rules();
        spec::Config {
            page_size_mask: (self.page_size_mask & !(rules.granule - 1) | rules.granule).into(),
            input_range: spec::Range64 {
                start: rules.input_range.0.into(),
                end: rules.input_range.1.into(),
            },
            domain_range: spec::Range32 {
                start: self.domain_range.0.into(),
                end: self.domain_range.1.into(),
            },
            probe_size: self.probe_size.into(),
            bypass: bypass.into(),
            reserved: [0; 3],
        }
    }

    /// Whether the interrupts of an endpoint go the way that was promised.
    pub(super) fn admits_doorbell(&self, endpoint: Rid, has: Doorbell) -> Result<(), AddError> {
        if has == self.doorbell {
            return Ok(());
        }
        Err(AddError::Doorbell {
            endpoint,
            has,
            offered: self.doorbell,
            msi: match has {
                Doorbell::Intercepted => "intercepted",
                Doorbell::Mapped(_) => "mapped",
            },
        })
    }

    /// Whether an endpoint with such a back end keeps what was offered.
    pub(super) fn admits(
        &self,
        endpoint: Rid,
        capabilities: &Capabilities,
        reserved: &Regions,
    ) -> Result<(), AddError> {
        let granule = self.rules().granule;
        if capabilities.page_sizes & (granule | (granule - 1)) == 0 {
            return Err(AddError::Capability {
                endpoint,
                what: "page sizes",
                has: capabilities.page_sizes,
                offered: granule,
            });
        }
        let last = self.rules().input_range.1;
        let width = u32::from(capabilities.address_width);
        if last.checked_shr(width).is_some_and(|above| above != 0) {
            return Err(AddError::Capability {
                endpoint,
                what: "addresses up to",
                has: (1 << width) - 1,
                offered: last,
            });
        }
        let tables = usize::from(self.attach_table) * size_of::<spec::ProbePgtVtd>();
        let needs = super::probe::size(reserved) + tables;
        if needs > self.probe_size as usize {
            return Err(AddError::Properties {
                endpoint,
                needs,
                offered: self.probe_size,
            });
        }
        Ok(())
    }
}
