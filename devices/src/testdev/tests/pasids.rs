//! PASIDs.

use super::*;

#[test]
fn pasids_and_no_pasid_are_different_address_spaces() {
    let rig = Rig::new();
    for (n, pasid) in [None, Some(1), Some(0xf_ffff)].into_iter().enumerate() {
        let target = Target {
            endpoint: RID,
            pasid: pasid.map(Pasid),
        };
        rig.domain(
            target,
            &[(0x1000, 0x1_0000 * (n as u64 + 1), Access::READ_WRITE)],
        );
        rig.ram
            .write_obj(n as u8 + 1, GuestAddress(0x1_0000 * (n as u64 + 1)))
            .unwrap();
    }
    for (n, pasid) in [(1, None), (2, Some(1)), (3, Some(0xf_ffff_u64))] {
        let channel = rig
            .channel(n)
            .set(PASID, pasid.unwrap_or(0))
            .range(0x1000, 0, 1);
        let flags = if pasid.is_some() { F_PASID } else { 0 };
        assert_eq!(channel.run(CHECKSUM, flags), IS_DONE);
        assert_eq!(channel.get(RESULT), fnv(&[n as u8]));
    }
    let other = rig.channel(9).set(PASID, 2).range(0x1000, 0, 1);
    assert_eq!(other.run(CHECKSUM, F_PASID), FAULT);
}

#[test]
fn channels_run_side_by_side_each_with_its_own_pasid() {
    let rig = Rig::new();
    for n in 0..64u64 {
        let target = Target::pasid(RID, Pasid(n as u32 + 1));
        let page = 0x10_0000 + 0x1000 * n;
        rig.domain(target, &[(0x7000, page, Access::READ_WRITE)]);
        rig.channel(n)
            .set(PASID, n + 1)
            .set(PATTERN, n)
            .range(0, 0x7000, 4096)
            .start(FILL, F_PASID | F_INTERRUPT);
    }
    for n in 0..64 {
        assert_eq!(rig.channel(n).end(), IS_DONE);
        let page: [u64; 512] = {
            let mut page = [0; 4096];
            rig.ram
                .read_slice(&mut page, GuestAddress(0x10_0000 + 0x1000 * n))
                .unwrap();
            let (words, _) = page.as_chunks();
            std::array::from_fn(|at| u64::from_le_bytes(words[at]))
        };
        assert_eq!(page, [n; 512]);
    }
    until(|| rig.register(0x14) == 0);
    let interrupts = || {
        (0..16)
            .map(|vector| rig.msi.get(vector).signals())
            .sum::<u64>()
    };
    let mut seen = 0;
    until_mut(|| {
        seen += interrupts();
        seen == 64
    });
}
