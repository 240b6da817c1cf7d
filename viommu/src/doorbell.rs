//! How a platform's doorbell for message-signalled interrupts works, as an IOMMU sees it.
//!
//! A device interrupts by writing to the doorbell. On x86 the IOMMU takes such a write before
//! translation, so the doorbell's addresses are of no other use to a device. On platforms such as
//! Arm's the write is translated like any other: the doorbell has to be where the last stage leads
//! to, and a guest that has a stage of its own has to map the doorbell's window to itself there, or
//! its devices never interrupt.

#![forbid(unsafe_code)]

use std::fmt;

use serde::Serialize;

use crate::interrupt::Msi;
use crate::reserved::{Kind, Region, X86_MSI};
use crate::{Gpa, Iova};

/// Bytes of a doorbell's window: the 1 MiB whose address bits 19:2 are a part of the message on
/// x86.
pub const WINDOW: u64 = 1 << 20;

/// How the doorbell of an endpoint works.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Doorbell {
    /// The IOMMU takes what is written to 0xfee0_0000-0xfeef_ffff, before it translates.
    Intercepted,
    /// What is written is translated. The doorbell is the window of [`WINDOW`] bytes from this
    /// guest-physical address on, a multiple of that; the guest maps it to itself.
    Mapped(Gpa),
}

impl Doorbell {
    /// The window as a reserved region.
    pub fn region(self) -> Region {
        match self {
            Self::Intercepted => X86_MSI,
            Self::Mapped(Gpa(first)) => Region {
                first,
                last: first | (WINDOW - 1),
                kind: Kind::MappedMsi,
            },
        }
    }

    /// Whether all of `gpa..=last` is in a window that can be mapped.
    pub fn covers(self, gpa: u64, last: u64) -> bool {
        let region = self.region();
        self != Self::Intercepted && region.first <= gpa && last <= region.last
    }

    /// The message that a write of `data` to guest-physical `gpa` is, if that is in a window that
    /// is mapped: the window stands for 0xfee0_0000-0xfeef_ffff.
    pub fn message(self, gpa: u64, data: u32) -> Option<Msi> {
        self.covers(gpa, gpa).then_some(Msi {
            address: X86_MSI.first | gpa & (WINDOW - 1),
            data,
        })
    }
}

impl fmt::Display for Doorbell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Region { first, last, .. } = self.region();
        match self {
            Self::Intercepted => write!(f, "{first:#x}-{last:#x}, intercepted"),
            Self::Mapped(_) => write!(f, "{first:#x}-{last:#x}, mapped"),
        }
    }
}

/// Whether a mapping may be where `region` is: nowhere, but for a doorbell that has to be mapped,
/// and that to itself.
pub fn permits(region: &Region, iova: Iova, gpa: Gpa) -> bool {
    region.kind == Kind::MappedMsi && iova.0 == gpa.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mapped_window_stands_for_the_addresses_of_x86_messages() {
        let doorbell = Doorbell::Mapped(Gpa(0x800_0000));
        let msi = doorbell.message(0x800_300c, 0x41).unwrap();
        assert_eq!((msi.address, msi.data), (0xfee0_300c, 0x41));
        assert_eq!(doorbell.message(0x7ff_ffff, 0), None);
        assert_eq!(doorbell.message(0x810_0000, 0), None);
        assert_eq!(Doorbell::Intercepted.message(0xfee0_0000, 0), None);
        let in_place = Doorbell::Mapped(Gpa(0xfee0_0000));
        assert_eq!(
            in_place.message(0xfeef_fffc, 1).unwrap().address,
            0xfeef_fffc
        );
    }

    #[test]
    fn only_a_doorbell_that_has_to_be_mapped_may_be_and_that_to_itself() {
        let mapped = Doorbell::Mapped(Gpa(0x800_0000)).region();
        assert!(permits(&mapped, Iova(0x800_0000), Gpa(0x800_0000)));
        assert!(!permits(&mapped, Iova(0x800_0000), Gpa(0x801_0000)));
        let intercepted = Doorbell::Intercepted.region();
        assert!(!permits(&intercepted, Iova(0xfee0_0000), Gpa(0xfee0_0000)));
    }
}
