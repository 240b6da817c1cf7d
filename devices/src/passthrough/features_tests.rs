use proptest::prelude::*;
use viommu::Pasid;

use super::super::config::GuestConfig;
use super::super::config::tests::{LENGTHS, nvme};
use super::*;

/// A device and a host that can do everything.
fn facts(raw: &[u8; SIZE]) -> Facts<'_> {
    Facts {
        raw,
        offered: Capabilities {
            stage1: true,
            stage1_57: true,
            sre: true,
            pasid_bits: Pasid::BITS,
            page_requests: true,
            ..Capabilities::NOTHING
        },
        cpu_width: 48,
        iommu_width: 57,
        pasid_bits: 16,
        privileged: true,
        ats: true,
        page_requests: true,
    }
}

fn wishes(pasid: Switch, dma_width: Option<u8>) -> Wishes {
    Wishes {
        pasid,
        dma_width,
        ..Wishes::default()
    }
}

/// A function of which nothing is known but that it is a PCI Express one.
fn unknown() -> [u8; SIZE] {
    let mut raw = nvme();
    raw[9..12].copy_from_slice(&[0, 0, 0xff]);
    raw
}

#[test]
fn what_is_there_is_offered_without_being_asked_for() {
    let raw = nvme();
    let decision = decide(&Wishes::default(), &facts(&raw)).unwrap();
    let pasid = decision.offer.pasid.unwrap();
    assert_eq!((pasid.bits, pasid.privileged), (16, true));
    assert!(!pasid.execute, "the unit offers no execute requests");
    assert!(decision.offer.ats && decision.offer.pri);
    assert_eq!(decision.hidden, []);
}

#[test]
fn a_device_narrower_than_the_guests_cpus_gets_no_pasids() {
    let raw = unknown();
    for (user, iommu_width, cpu_width, fits) in [
        (None, 57, 57, true),
        (None, 48, 48, true),
        (None, 48, 57, false),
        (Some(47), 57, 48, false),
        (Some(48), 57, 48, true),
        (Some(48), 57, 57, false),
        // The user's word is no more than the host's IOMMU can do.
        (Some(64), 48, 57, false),
        (Some(32), 57, 48, false),
    ] {
        let facts = Facts {
            iommu_width,
            cpu_width,
            ..facts(&raw)
        };
        let auto = decide(&wishes(Switch::Auto, user), &facts).unwrap();
        assert_eq!(auto.offer.pasid.is_some(), fits, "{user:?} {facts:?}");
        assert_eq!(auto.hidden.len(), usize::from(!fits));
        let on = decide(&wishes(Switch::On, user), &facts);
        assert_eq!(on.is_ok(), fits);
        let off = decide(&wishes(Switch::Off, user), &facts).unwrap();
        assert_eq!((off.offer.pasid, off.hidden), (None, vec![]));
    }
}

#[test]
fn a_refusal_says_both_widths_and_where_the_devices_comes_from() {
    let raw = unknown();
    let refused = decide(&wishes(Switch::On, Some(40)), &facts(&raw)).unwrap_err();
    assert_eq!(
        refused.to_string(),
        "pasid=on cannot be: the device's DMA addresses have 40 bits (by dma_width=), but the \
         guest's CPUs translate 48 bits; say dma_width=48 if the device can do that; or leave it \
         to auto"
    );
    let narrow_host = Facts {
        iommu_width: 47,
        ..facts(&raw)
    };
    let refused = decide(&wishes(Switch::On, None), &narrow_host).unwrap_err();
    assert!(
        refused
            .to_string()
            .contains("47 bits (by the host's IOMMU)")
    );
}

#[test]
fn kinds_with_fixed_addresses_are_known_and_the_users_word_goes_before() {
    let (drive, mut edu) = (nvme(), nvme());
    edu[..4].copy_from_slice(&[0x34, 0x12, 0xe8, 0x11]);
    let width = |raw, user| DmaWidth::of(raw, 57, user);
    let of = |bits, from| DmaWidth { bits, from };
    assert_eq!(width(&drive, None), of(57, WidthSource::HostIommu));
    assert_eq!(width(&drive, Some(40)), of(40, WidthSource::User));
    assert_eq!(width(&edu, None), of(28, WidthSource::Device));
    assert_eq!(width(&edu, Some(32)), of(32, WidthSource::User));
    assert_eq!(width(&unknown(), None), of(57, WidthSource::HostIommu));
}

#[test]
fn a_device_without_pasids_on_the_host_is_never_given_any() {
    let raw = nvme();
    let none = Facts {
        pasid_bits: 0,
        ..facts(&raw)
    };
    let auto = decide(&Wishes::default(), &none).unwrap();
    assert_eq!(auto.offer.pasid, None);
    assert_eq!(auto.hidden, [("pasid", Missing::Host)]);
    let on = decide(&wishes(Switch::On, None), &none).unwrap_err();
    assert_eq!(on.why, Missing::Host);
}

#[test]
fn without_a_viommu_nothing_is_offered_and_what_is_asked_for_is_refused() {
    let raw = nvme();
    let alone = Facts {
        offered: Capabilities::NOTHING,
        cpu_width: 0,
        ..facts(&raw)
    };
    let auto = decide(&Wishes::default(), &alone).unwrap();
    assert_eq!((auto.offer, auto.hidden), (Offer::default(), vec![]));
    let on = decide(&wishes(Switch::On, None), &alone).unwrap_err();
    assert_eq!((on.option, on.why), ("pasid", Missing::Viommu));
    let pri = Wishes {
        pri: Switch::On,
        ..Wishes::default()
    };
    assert_eq!(decide(&pri, &alone).unwrap_err().option, "pri");
}

#[test]
fn a_conventional_function_has_no_pasids() {
    let mut raw = nvme();
    raw[0x34] = 0x50;
    raw[0x51] = 0; // MSI alone
    let auto = decide(&Wishes::default(), &facts(&raw)).unwrap();
    assert_eq!(auto.hidden, [("pasid", Missing::Conventional)]);
}

#[test]
fn page_requests_need_the_device_the_host_and_the_unit() {
    let raw = nvme();
    let bare = {
        let mut raw = raw;
        // The list ends at AER.
        raw[0x102..0x104].copy_from_slice(&[0x02, 0x00]);
        raw
    };
    let shows = |facts: &Facts<'_>| decide(&Wishes::default(), facts).unwrap().offer.pri;
    let all = facts(&raw);
    assert!(shows(&all));
    assert!(!shows(&Facts {
        page_requests: false,
        ..all
    }));
    assert!(!shows(&Facts { ats: false, ..all }));
    assert!(!shows(&Facts { raw: &bare, ..all }));
    let offered = Capabilities {
        page_requests: false,
        ..all.offered
    };
    assert!(!shows(&Facts { offered, ..all }));
    let on = Wishes {
        pri: Switch::On,
        ..Wishes::default()
    };
    let refused = decide(&on, &Facts { raw: &bare, ..all }).unwrap_err();
    assert_eq!((refused.option, refused.why), ("pri", Missing::NoRequests));
    let off = Wishes {
        pri: Switch::Off,
        ..Wishes::default()
    };
    assert!(!decide(&off, &all).unwrap().offer.pri);
}

#[test]
fn privileged_mode_is_shown_only_where_the_unit_serves_it() {
    let raw = nvme();
    let privileged = |facts: &Facts<'_>| {
        let decision = decide(&Wishes::default(), facts).unwrap();
        decision.offer.pasid.unwrap().privileged
    };
    let all = facts(&raw);
    assert!(privileged(&all));
    let offered = Capabilities {
        sre: false,
        ..all.offered
    };
    assert!(!privileged(&Facts { offered, ..all }));
    assert!(!privileged(&Facts {
        privileged: false,
        ..all
    }));
}

#[test]
fn a_place_that_the_user_names_is_used_and_a_wrong_one_is_refused() {
    let raw = nvme();
    let with = |at| {
        let wishes = Wishes {
            pasid: Switch::On,
            pasid_offset: Some(at),
            ..Wishes::default()
        };
        decide(&wishes, &facts(&raw)).map(|decision| decision.offer.pasid.unwrap().at)
    };
    assert_eq!(with(0x800), Ok(0x800));
    // Not a multiple of 4, not in extended space, at its end, on ATS, in ATS, before ATS.
    for wrong in [0x802, 0x80, 0xffc, 0x200, 0x204, 0x1fc] {
        assert_eq!(with(wrong).unwrap_err().why, Missing::Taken(wrong));
    }
    // With `auto` it is hidden, and that is told.
    let auto = Wishes {
        pasid_offset: Some(0x200),
        ..Wishes::default()
    };
    let decision = decide(&auto, &facts(&raw)).unwrap();
    assert_eq!(decision.hidden, [("pasid", Missing::Taken(0x200))]);
}

#[test]
fn a_full_configuration_space_has_no_place() {
    let mut raw = nvme();
    raw[0x300..].fill(0xff);
    let on = decide(&wishes(Switch::On, None), &facts(&raw)).unwrap_err();
    assert_eq!(on.why, Missing::NoPlace);
}

proptest! {
    #[test]
    fn no_register_of_the_vendor_is_hidden_by_a_place_of_ours(
        vendor in prop::collection::vec((0x220usize..SIZE - 4, 1u32..), 0..64),
    ) {
        let mut raw = nvme();
        for (at, value) in vendor {
            raw[at..at + 4].copy_from_slice(&value.to_le_bytes());
        }
        let decision = decide(&Wishes::default(), &facts(&raw)).unwrap();
        let Some(pasid) = decision.offer.pasid else {
            prop_assert_eq!(decision.hidden, [("pasid", Missing::NoPlace)]);
            return Ok(());
        };
        // What was not zero reads as the hardware has it.
        let view = GuestConfig::new(&raw, LENGTHS, decision.offer);
        for at in 0x220..SIZE as u16 {
            let mut byte = [raw[usize::from(at)]];
            view.overlay(at, &mut byte);
            let ours = (pasid.at..pasid.at + 8).contains(&at);
            prop_assert!(ours || byte[0] == raw[usize::from(at)]);
            prop_assert!(!ours || raw[usize::from(at)] == 0);
        }
    }
}
