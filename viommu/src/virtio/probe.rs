//! Properties of an endpoint, as PROBE tells them (5.13.6.7 and 5.13.6.8).

use zerocopy::IntoBytes;

use crate::backend::Capabilities;
use crate::reserved::{Kind, Region, Regions};
use crate::spec::virtio_iommu::{
    ProbePgtVtd, ProbeProperty, ProbeResvMem, probe_type, resv_mem_subtype, table_format,
};

const RESV_MEM: usize = size_of::<ProbeResvMem>();

/// How many bytes the properties of an endpoint with `reserved` need.
pub(super) fn size(reserved: &Regions) -> usize {
    reserved.len() * RESV_MEM
}

/// Writes the properties of an endpoint to the front of `properties`, which is zeroed and has
/// room for [`size`].
pub(super) fn fill(properties: &mut [u8], reserved: &Regions) {
    // Where the doorbell has to be mapped, a message to the addresses of x86 is of no use.
    let mut msi = !reserved.iter().any(|r| r.kind == Kind::MappedMsi);
    for (region, room) in reserved.iter().zip(properties.chunks_exact_mut(RESV_MEM)) {
        let is_msi = region.kind == Kind::Msi && msi;
        msi &= !is_msi;
        room.copy_from_slice(property(region, is_msi).as_bytes());
    }
}

/// `msi`: 5.13.6.8.1 wants one such property at most; another doorbell is merely reserved.
fn property(region: &Region, msi: bool) -> ProbeResvMem {
    ProbeResvMem {
        head: ProbeProperty {
            r#type: probe_type::RESV_MEM.into(),
            length: ((RESV_MEM - size_of::<ProbeProperty>()) as u16).into(),
        },
        subtype: if msi {
            resv_mem_subtype::MSI
        } else {
            resv_mem_subtype::RESERVED
        },
        reserved: [0; 3],
        start: region.first.into(),
        end: region.last.into(),
    }
}

/// Writes that first-stage tables of VT-d can be attached, behind the other properties.
pub(super) fn add_tables(properties: &mut [u8], capabilities: &Capabilities) {
    let bit = |set: bool, bit: u32| u64::from(set) << bit;
    let property = ProbePgtVtd {
        head: ProbeProperty {
            r#type: probe_type::PAGE_TABLE_FMT.into(),
            length: ((size_of::<ProbePgtVtd>() - size_of::<ProbeProperty>()) as u16).into(),
        },
        format: table_format::PGTF_VTD.into(),
        reserved: [0; 2],
        // FL1GP and FL5LP.
        cap_reg: (bit(capabilities.stage1_1g, 56) | bit(capabilities.stage1_57, 60)).into(),
        // SMTS, FLTS, SRS and EAFS.
        ecap_reg: (bit(true, 43)
            | bit(true, 47)
            | bit(capabilities.sre, 31)
            | bit(capabilities.eafe, 34))
        .into(),
    };
    let mut rooms = properties.chunks_exact_mut(size_of::<ProbePgtVtd>());
    if let Some(room) = rooms.find(|room| room[0] == 0) {
        room.copy_from_slice(property.as_bytes());
    }
}

#[cfg(test)]
mod tests {
    use zerocopy::FromBytes;

    use super::*;
    use crate::reserved::X86_MSI;

    /// Reads properties as a driver does.
    pub(super) fn parse(mut bytes: &[u8]) -> Vec<ProbeResvMem> {
        let mut list = Vec::new();
        while let Ok((head, _)) = ProbeProperty::read_from_prefix(bytes) {
            if head.r#type.get() & 0xfff == probe_type::NONE {
                break;
            }
            list.push(ProbeResvMem::read_from_prefix(bytes).unwrap().0);
            bytes = &bytes[usize::from(head.length.get()) + 4..];
        }
        list
    }

    #[test]
    fn must_write_the_length_without_the_header_and_put_the_next_property_right_behind() {
        let mut reserved = Regions::new();
        reserved.insert(X86_MSI.first, X86_MSI.last, X86_MSI.kind);
        reserved.insert(1 << 48, u64::MAX, Kind::Reserved);
        let mut bytes = vec![0; 100];
        fill(&mut bytes, &reserved);
        let list = parse(&bytes);
        assert_eq!(list.len(), 2);
        assert!(
            list.iter()
                .all(|p| p.head.length.get() == 20 && p.reserved == [0; 3])
        );
        assert_eq!(list[0].subtype, resv_mem_subtype::MSI);
        assert_eq!(
            (list[0].start.get(), list[0].end.get()),
            (0xfee0_0000, 0xfeef_ffff)
        );
        assert_eq!(list[1].subtype, resv_mem_subtype::RESERVED);
        assert_eq!(
            (list[1].start.get(), list[1].end.get()),
            (1 << 48, u64::MAX)
        );
        assert!(bytes[48..].iter().all(|&b| b == 0));
    }

    #[test]
    fn should_not_present_more_than_one_msi_property() {
        let mut reserved = Regions::new();
        for n in 0..3 {
            reserved.insert(n << 20, (n << 20) + 0xfff, Kind::Msi);
        }
        let mut bytes = vec![0; size(&reserved)];
        fill(&mut bytes, &reserved);
        let msi = |p: &&ProbeResvMem| p.subtype == resv_mem_subtype::MSI;
        assert_eq!(parse(&bytes).iter().filter(msi).count(), 1);
    }

    #[test]
    fn there_are_as_many_properties_as_there_are_regions() {
        let mut reserved = Regions::new();
        for n in 0..100 {
            reserved.insert(n << 20, (n << 20) + 0xfff, Kind::Reserved);
        }
        let mut bytes = vec![0; size(&reserved)];
        fill(&mut bytes, &reserved);
        assert_eq!(parse(&bytes).len(), 100);
    }
}
