//! From the bytes of a request to a [`Request`]: pure, total, and everything that can be told
//! without knowing the device's state.

use zerocopy::FromBytes;

use crate::backend::{Access, InvalidationRange, Mapping, Stage1};
use crate::spec::virtio_iommu::{
    ReqAttach, ReqAttachPgtVtd, ReqDetach, ReqHead, ReqInvalidate, ReqMap, ReqProbe, ReqUnmap,
    Status, attach_flag, feature, fl_flag, inval_flag, inval_granularity, map_flag, req_type,
    table_format,
};
use crate::{Gpa, Iova};

/// The longest device-readable part of a request, in bytes. What a driver puts behind it is
/// ignored, so a transport need not fetch more.
pub const MAX_READABLE: usize = size_of::<ReqAttachPgtVtd>();

/// A well-formed request.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Request {
    /// ATTACH (5.13.6.3).
    Attach(Attach),
    /// DETACH (5.13.6.4).
    Detach(Detach),
    /// MAP (5.13.6.5).
    Map(Map),
    /// UNMAP (5.13.6.6).
    Unmap(Unmap),
    /// PROBE (5.13.6.7).
    Probe {
        /// Which endpoint.
        endpoint: u32,
    },
    /// INVALIDATE (experimental).
    Invalidate(Invalidate),
}

/// What translates for the endpoints of a domain.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub enum Mode {
    /// The mappings that the guest makes by MAP.
    #[default]
    Mapped,
    /// Nothing: they are in bypass mode.
    Bypass,
    /// A table in guest memory (experimental).
    Table(Stage1),
}

/// Attach `endpoint` to `domain`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Attach {
    /// To which domain; it is made when it does not exist.
    pub domain: u32,
    /// Which endpoint.
    pub endpoint: u32,
    /// What the domain is.
    pub mode: Mode,
}

/// Detach `endpoint` from `domain`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Detach {
    /// From which domain.
    pub domain: u32,
    /// Which endpoint.
    pub endpoint: u32,
}

/// Map `virt_start..=virt_end`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Map {
    /// In which domain.
    pub domain: u32,
    /// First virtual address.
    pub virt_start: u64,
    /// Last virtual address.
    pub virt_end: u64,
    /// What `virt_start` maps to.
    pub phys_start: u64,
    /// What is allowed.
    pub access: Access,
    /// The target is a memory-mapped device.
    pub mmio: bool,
}

impl Map {
    /// The mapping, of a request whose addresses are in order and do not wrap.
    #[inline]
    pub(super) fn mapping(&self) -> Mapping {
        Mapping {
            iova: Iova(self.virt_start),
            gpa: Gpa(self.phys_start),
            length: self.virt_end.wrapping_sub(self.virt_start).wrapping_add(1),
            access: self.access,
            mmio: self.mmio,
        }
    }
}

/// Remove all mappings in `virt_start..=virt_end`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Unmap {
    /// In which domain.
    pub domain: u32,
    /// First virtual address.
    pub virt_start: u64,
    /// Last virtual address.
    pub virt_end: u64,
}

/// Forget what is cached of the tables of `domain`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Invalidate {
    /// Of which domain.
    pub domain: u32,
    /// Which addresses.
    pub range: InvalidationRange,
}

/// Why bytes are not a [`Request`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Malformed {
    /// The type is not known or was not negotiated: the buffer is returned unwritten.
    Unrecognised,
    /// The request is answered with INVAL.
    Invalid,
}

impl Malformed {
    /// The status that the guest gets, if any.
    pub fn status(self) -> Option<Status> {
        match self {
            Self::Unrecognised => None,
            Self::Invalid => Some(Status::Inval),
        }
    }
}

/// Decodes the device-readable part of a request under the negotiated `features`.
///
/// # Errors
/// [`Malformed`]; nothing may happen then.
#[inline]
pub fn decode(readable: &[u8], features: u64) -> Result<Request, Malformed> {
    let has = |bit| features & bit != 0;
    let (head, _) = ReqHead::ref_from_prefix(readable).map_err(|_| Malformed::Unrecognised)?;
    match head.r#type {
        req_type::ATTACH => {
            let request: &ReqAttach = read(readable)?;
            let flags = request.flags.get();
            let known = if has(feature::BYPASS_CONFIG) {
                attach_flag::BYPASS
            } else {
                0
            };
            if request.reserved != [0; 4] || flags & !known != 0 {
                return Err(Malformed::Invalid);
            }
            Ok(Request::Attach(Attach {
                domain: request.domain.get(),
                endpoint: request.endpoint.get(),
                mode: match flags & attach_flag::BYPASS {
                    0 => Mode::Mapped,
                    _ => Mode::Bypass,
                },
            }))
        }
        req_type::DETACH => {
            let request: &ReqDetach = read(readable)?;
            Ok(Request::Detach(Detach {
                domain: request.domain.get(),
                endpoint: request.endpoint.get(),
            }))
        }
        req_type::MAP if has(feature::MAP_UNMAP) => {
            let request: &ReqMap = read(readable)?;
            let flags = request.flags.get();
            let mmio = if has(feature::MMIO) {
                map_flag::MMIO
            } else {
                0
            };
            if flags & !(map_flag::READ | map_flag::WRITE | mmio) != 0 {
                return Err(Malformed::Invalid);
            }
            Ok(Request::Map(Map {
                domain: request.domain.get(),
                virt_start: request.virt_start.get(),
                virt_end: request.virt_end.get(),
                phys_start: request.phys_start.get(),
                access: Access {
                    read: flags & map_flag::READ != 0,
                    write: flags & map_flag::WRITE != 0,
                },
                mmio: flags & map_flag::MMIO != 0,
            }))
        }
        req_type::UNMAP if has(feature::MAP_UNMAP) => {
            let request: &ReqUnmap = read(readable)?;
            if request.reserved != [0; 4] {
                return Err(Malformed::Invalid);
            }
            Ok(Request::Unmap(Unmap {
                domain: request.domain.get(),
                virt_start: request.virt_start.get(),
                virt_end: request.virt_end.get(),
            }))
        }
        req_type::PROBE if has(feature::PROBE) => {
            let request: &ReqProbe = read(readable)?;
            Ok(Request::Probe {
                endpoint: request.endpoint.get(),
            })
        }
        req_type::ATTACH_TABLE if has(feature::ATTACH_TABLE) => attach_table(read(readable)?),
        req_type::INVALIDATE if has(feature::ATTACH_TABLE) => invalidate(read(readable)?),
        _ => Err(Malformed::Unrecognised),
    }
}

/// What is passed on is checked bit by bit, since a kernel may not: address bits that are no
/// address must not become flags of a table entry.
fn attach_table(request: &ReqAttachPgtVtd) -> Result<Request, Malformed> {
    let (root, flags) = (request.pgd.get(), request.fl_flags.get());
    let width = request.addr_width.get();
    let in_order = request.format.get() == table_format::PGTF_VTD
        && request.flags.get() == 0
        && request.pasid.get() == 0
        && request.reserved == [0; 2]
        && request.reserved2 == [0; 36]
        && matches!(width, 48 | 57)
        && root & 0xfff == 0
        && root >> super::mappings::GPA_BITS == 0
        && flags & !(fl_flag::SRE | fl_flag::EAFE | fl_flag::WPE) == 0;
    if !in_order {
        return Err(Malformed::Invalid);
    }
    Ok(Request::Attach(Attach {
        domain: request.domain.get(),
        endpoint: request.endpoint.get(),
        mode: Mode::Table(Stage1 {
            root: Gpa(root),
            width: width as u8,
            sre: flags & fl_flag::SRE != 0,
            wpe: flags & fl_flag::WPE != 0,
            eafe: flags & fl_flag::EAFE != 0,
            ere: false,
            pwsnp: true,
            fs1gp: true,
        }),
    }))
}

fn invalidate(request: &ReqInvalidate) -> Result<Request, Malformed> {
    let flags = request.flags.get();
    let (first, granule) = (request.virt_start.get(), request.granule);
    let pages = request.nr_pages.get();
    let in_order = flags & !(inval_flag::ARCHID | inval_flag::LEAF) == 0
        && matches!(request.inv_type.get(), 1..=7);
    let range = match request.inv_gran.get() {
        inval_granularity::DOMAIN => InvalidationRange::All,
        inval_granularity::VA if matches!(granule, 12..=30) && first & 0xfff == 0 && pages != 0 => {
            InvalidationRange::Pages {
                first: Iova(first),
                count: pages.saturating_mul(1 << (granule - 12)),
                leaf: flags & inval_flag::LEAF != 0,
            }
        }
        _ => return Err(Malformed::Invalid),
    };
    if !in_order {
        return Err(Malformed::Invalid);
    }
    Ok(Request::Invalidate(Invalidate {
        domain: request.domain.get(),
        range,
    }))
}

fn read<T: FromBytes + zerocopy::KnownLayout + zerocopy::Immutable + zerocopy::Unaligned>(
    readable: &[u8],
) -> Result<&T, Malformed> {
    match T::ref_from_prefix(readable) {
        Ok((request, _)) => Ok(request),
        Err(_) => Err(Malformed::Invalid),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use zerocopy::IntoBytes;

    use super::*;

    const ALL: u64 = u64::MAX;

    fn bytes(r#type: u8, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        bytes[0] = r#type;
        bytes
    }

    #[test]
    fn each_type_has_its_size_and_one_byte_less_is_invalid() {
        for (r#type, len) in [(1, 20), (2, 20), (3, 36), (4, 28), (5, 72)] {
            let whole = bytes(r#type, len);
            assert!(decode(&whole, ALL).is_ok());
            assert_eq!(decode(&whole[..len - 1], ALL), Err(Malformed::Invalid));
            assert_eq!(decode(&whole[..4], ALL), Err(Malformed::Invalid));
            assert_eq!(decode(&whole[..3], ALL), Err(Malformed::Unrecognised));
            let long = [&whole[..], &[0xff; 32]].concat();
            assert_eq!(decode(&long, ALL), decode(&whole, ALL));
        }
    }

    #[test]
    fn a_type_that_is_not_recognised_is_returned_unwritten() {
        for r#type in [0, 8, 0x80, 0xff] {
            assert_eq!(
                decode(&bytes(r#type, 100), ALL),
                Err(Malformed::Unrecognised)
            );
        }
    }

    #[test]
    fn what_was_not_negotiated_is_not_recognised() {
        let without = |bit: u64| ALL & !bit;
        let unrecognised = Err(Malformed::Unrecognised);
        assert_eq!(
            decode(&bytes(3, 36), without(feature::MAP_UNMAP)),
            unrecognised
        );
        assert_eq!(
            decode(&bytes(4, 28), without(feature::MAP_UNMAP)),
            unrecognised
        );
        assert_eq!(decode(&bytes(5, 72), without(feature::PROBE)), unrecognised);
        let mut mmio = bytes(3, 36);
        mmio[32] = 4;
        assert!(decode(&mmio, ALL).is_ok());
        assert_eq!(
            decode(&mmio, without(feature::MMIO)),
            Err(Malformed::Invalid)
        );
        let mut bypass = bytes(1, 20);
        bypass[12] = 1;
        assert!(decode(&bypass, ALL).is_ok());
        let features = without(feature::BYPASS_CONFIG);
        assert_eq!(decode(&bypass, features), Err(Malformed::Invalid));
    }

    #[test]
    fn must_ignore_reserved_of_the_head_of_a_detach_and_of_a_probe() {
        let mut detach = vec![0xff; 20];
        detach[..12].copy_from_slice(&[2, 9, 9, 9, 1, 0, 0, 0, 2, 0, 0, 0]);
        let expected = Detach {
            domain: 1,
            endpoint: 2,
        };
        assert_eq!(decode(&detach, ALL), Ok(Request::Detach(expected)));
        let mut probe = vec![0xff; 72];
        probe[..8].copy_from_slice(&[5, 9, 9, 9, 2, 0, 0, 0]);
        assert_eq!(decode(&probe, ALL), Ok(Request::Probe { endpoint: 2 }));
    }

    #[test]
    fn must_reject_attach_with_reserved_not_zero_or_unknown_flags_with_inval() {
        for at in 12..20 {
            for bit in 0..8 {
                let mut attach = bytes(1, 20);
                attach[at] |= 1 << bit;
                let known = at == 12 && bit == 0;
                assert_eq!(decode(&attach, ALL).is_ok(), known, "byte {at} bit {bit}");
            }
        }
        assert_eq!(Malformed::Invalid.status(), Some(Status::Inval));
        assert_eq!(Malformed::Unrecognised.status(), None);
    }

    #[test]
    fn must_reject_map_with_unknown_flags_with_inval() {
        for bit in 0..32 {
            let mut map = bytes(3, 36);
            map[32..].copy_from_slice((1u32 << bit).as_bytes());
            assert_eq!(decode(&map, ALL).is_ok(), bit < 3, "bit {bit}");
        }
    }

    #[test]
    fn may_reject_unmap_with_reserved_not_zero_and_does_so_with_inval() {
        let mut unmap = bytes(4, 28);
        unmap[27] = 1;
        assert_eq!(decode(&unmap, ALL), Err(Malformed::Invalid));
    }

    proptest! {
        #[test]
        fn any_bytes_under_any_features_decode_or_are_malformed(
            bytes in prop::collection::vec(any::<u8>(), 0..100),
            r#type in 0u8..8,
            features in any::<u64>(),
        ) {
            let _ = decode(&bytes, features);
            if let [_, rest @ ..] = &bytes[..] {
                let _ = decode(&[&[r#type], rest].concat(), features);
            }
        }
    }
}
