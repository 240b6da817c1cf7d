//! New types for what must not be mixed.

use std::fmt;

use serde::{Deserialize, Serialize};

/// A Requester ID: the bus, device and function of an endpoint (PCIe 6.0, 2.2.6.2).
///
/// Bits 15:8 bus, 7:3 device, 2:0 function. nestling has one PCI segment, so a RID names an
/// endpoint of a VM completely.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema), schema(value_type = String, example = "00:05.0"))]
pub struct Rid(pub u16);

impl Rid {
    /// The RID of `bus`:`device`.`function`; `device` and `function` are cut to 5 and 3 bits.
    pub const fn new(bus: u8, device: u8, function: u8) -> Self {
        Self((bus as u16) << 8 | (device as u16 & 0x1f) << 3 | (function as u16 & 7))
    }

    /// The bus number.
    pub const fn bus(self) -> u8 {
        (self.0 >> 8) as u8
    }

    /// The device number, 0 to 31.
    pub const fn device(self) -> u8 {
        (self.0 >> 3) as u8 & 0x1f
    }

    /// The function number, 0 to 7.
    pub const fn function(self) -> u8 {
        self.0 as u8 & 7
    }

    /// Device and function as one number, the index into a VT-d context table.
    pub const fn devfn(self) -> u8 {
        self.0 as u8
    }
}

impl fmt::Display for Rid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:02x}:{:02x}.{}",
            self.bus(),
            self.device(),
            self.function()
        )
    }
}

impl fmt::Debug for Rid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl From<Rid> for String {
    fn from(rid: Rid) -> Self {
        rid.to_string()
    }
}

impl std::str::FromStr for Rid {
    type Err = String;

    /// Parses `bb:dd.f` (hexadecimal), with an optional segment `0000:` before it.
    fn from_str(text: &str) -> Result<Self, String> {
        let wrong =
            || format!("{text:?} is not a PCI address: write bus:device.function, as 00:03.0");
        let short = text.strip_prefix("0000:").unwrap_or(text);
        let (bus, rest) = short.split_once(':').ok_or_else(wrong)?;
        let (device, function) = rest.split_once('.').ok_or_else(wrong)?;
        let hex = |part: &str, most: u8| {
            let plain = !part.is_empty() && part.bytes().all(|b| b.is_ascii_hexdigit());
            u8::from_str_radix(part, 16)
                .ok()
                .filter(|&n| plain && n <= most)
                .ok_or_else(wrong)
        };
        Ok(Self::new(
            hex(bus, 0xff)?,
            hex(device, 0x1f)?,
            hex(function, 7)?,
        ))
    }
}

impl TryFrom<String> for Rid {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

/// A Process Address Space ID, 20 bits (PCIe 6.0, 6.20).
///
/// Traffic without a PASID is not PASID 0: it is `None` in a [`Target`].
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[serde(transparent)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct Pasid(pub u32);

impl Pasid {
    /// Number of bits in a PASID.
    pub const BITS: u8 = 20;
    /// The largest PASID.
    pub const MAX: Self = Self((1 << Self::BITS) - 1);

    /// `Some` when `raw` fits 20 bits.
    pub const fn new(raw: u32) -> Option<Self> {
        if raw <= Self::MAX.0 {
            Some(Self(raw))
        } else {
            None
        }
    }
}

/// A guest-physical address, in bytes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct Gpa(pub u64);

/// An I/O virtual address: what an endpoint puts on the bus, in bytes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct Iova(pub u64);

/// A back end's own number for a domain (an address space whose mappings the front end keeps).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[serde(transparent)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct DomainId(pub u32);

/// The host kernel's own number for a hardware page table (an iommufd HWPT).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[serde(transparent)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct HwptId(pub u32);

macro_rules! hex {
    ($($t:ty),*) => {$(
        impl fmt::Debug for $t {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#x}", self.0)
            }
        }
        impl fmt::Display for $t {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#x}", self.0)
            }
        }
    )*};
}
hex!(Gpa, Iova);

/// What a translation is for: an endpoint's plain requests, or its requests with one PASID.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct Target {
    /// The endpoint.
    pub endpoint: Rid,
    /// `None`: requests without PASID ("RID traffic"). `Some`: requests that carry this PASID.
    pub pasid: Option<Pasid>,
}

impl Target {
    /// The endpoint's requests without PASID.
    pub const fn rid(endpoint: Rid) -> Self {
        Self {
            endpoint,
            pasid: None,
        }
    }

    /// The endpoint's requests with `pasid`.
    pub const fn pasid(endpoint: Rid, pasid: Pasid) -> Self {
        Self {
            endpoint,
            pasid: Some(pasid),
        }
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.pasid {
            None => write!(f, "{}", self.endpoint),
            Some(Pasid(pasid)) => write!(f, "{} PASID {pasid:#x}", self.endpoint),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rid_prints_as_the_field_writes_it_and_parses_back() {
        for raw in 0..=u16::MAX {
            let rid = Rid(raw);
            assert_eq!(rid, Rid::new(rid.bus(), rid.device(), rid.function()));
            assert_eq!(rid.to_string().parse(), Ok(rid));
        }
        assert_eq!("0000:00:1f.7".parse(), Ok(Rid(0xff)));
    }

    #[test]
    fn what_is_not_a_pci_address_is_refused_with_the_text() {
        for text in [
            "",
            "00",
            "00:20.0",
            "00:1f.8",
            "0001:00:00.0",
            "00:+1.0",
            "1ff:00.0",
            "::.",
        ] {
            let error = text.parse::<Rid>().unwrap_err();
            assert!(error.contains(text), "{error}");
        }
    }

    #[test]
    fn a_pasid_has_20_bits() {
        assert_eq!(Pasid::new(0xf_ffff), Some(Pasid::MAX));
        assert_eq!(Pasid::new(0x10_0000), None);
    }
}
