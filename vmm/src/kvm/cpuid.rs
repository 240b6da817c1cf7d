//! What a vCPU's CPUID says: what KVM supports, with the topology of this VM, without what
//! nestling cannot honour.
//!
//! Pure. The topology is one package of `count` cores of one thread each, APIC ID = index.

#![forbid(unsafe_code)]

use kvm_bindings::{KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

/// The leaf of the hypervisor's signature.
const HYPERVISOR: u32 = 0x4000_0000;
/// KVM's paravirtual features.
const KVM_FEATURES: u32 = 0x4000_0001;

/// Bits of a guest-physical address: CPUID 0x80000008 EAX bits 7:0, or what KVM says it can map where
/// that is less (EAX bits 23:16, since Linux 6.9).
pub fn address_width(supported: &[kvm_cpuid_entry2]) -> u8 {
    let eax = supported
        .iter()
        .find(|e| e.function == 0x8000_0008)
        .map_or(36, |e| e.eax);
    match (eax as u8, (eax >> 16) as u8) {
        // Four levels of host page tables map 48 bits, and an older kernel does not say whether
        // it has a fifth.
        (width, 0) => width.min(48),
        (width, mappable) => width.min(mappable),
    }
}

/// Ways of paging that a CPU may have, and that a device which shares a process's tables has to
/// have too.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Paging {
    /// 5-level paging (LA57: CPUID 7 ECX bit 16).
    pub five_levels: bool,
    /// Pages of 1 GiB (CPUID 0x80000001 EDX bit 26).
    pub pages_1g: bool,
}

impl Paging {
    const LA57: u32 = 1 << 16;
    const PAGE_1GB: u32 = 1 << 26;

    /// What `cpuid` says.
    pub fn of(cpuid: &[kvm_cpuid_entry2]) -> Self {
        let has = |function, bits: fn(&kvm_cpuid_entry2) -> u32| {
            let mut leaves = cpuid.iter();
            leaves.any(|e| e.function == function && e.index == 0 && bits(e) != 0)
        };
        Self {
            five_levels: has(7, |e| e.ecx & Self::LA57),
            pages_1g: has(0x8000_0001, |e| e.edx & Self::PAGE_1GB),
        }
    }

    /// Takes out of `cpuid` what is not in `self`.
    pub fn limit(self, cpuid: &mut [kvm_cpuid_entry2]) {
        for entry in cpuid {
            match (entry.function, entry.index) {
                (7, 0) if !self.five_levels => entry.ecx &= !Self::LA57,
                (0x8000_0001, 0) if !self.pages_1g => entry.edx &= !Self::PAGE_1GB,
                _ => {}
            }
        }
    }

    /// Bits of virtual address.
    pub fn width(self) -> u8 {
        if self.five_levels { 57 } else { 48 }
    }
}

/// The CPUID of vCPU `index` of `count`.
pub fn compose(
    supported: &[kvm_cpuid_entry2],
    index: u8,
    count: u8,
    tsc_deadline: bool,
) -> Vec<kvm_cpuid_entry2> {
    let (id, count) = (u32::from(index), u32::from(count.max(1)));
    // Bits of an APIC ID that tell the cores of the package apart.
    let core_bits = count.next_power_of_two().trailing_zeros();
    let mut entries: Vec<kvm_cpuid_entry2> = supported
        .iter()
        // Ours follow (0xb); V2 topology (0x1f) and AMD's (0x80000026) would have to say the same
        // thing again.
        .filter(|e| !matches!(e.function, 0xb | 0x1f | 0x8000_0026))
        .copied()
        .collect();
    for entry in &mut entries {
        match entry.function {
            0x1 => features(entry, id, count, tsc_deadline),
            0x4 => intel_cache(entry, count),
            // MONITOR/MWAIT is not offered.
            0x5 => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
            // No thermal sensors, no hardware feedback: only the always-running APIC timer.
            0x6 => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (entry.eax & 1 << 2, 0, 0, 0),
            // CmpLegacy: more than one core in the package.
            0x8000_0001 if amd(supported) => {
                entry.ecx = entry.ecx & !(1 << 1) | u32::from(count > 1) << 1;
                // TopologyExtensions are given only with the leaf that they promise.
                if !supported.iter().any(|e| e.function == 0x8000_001e) {
                    entry.ecx &= !(1 << 22);
                }
            }
            0x8000_0008 => {
                entry.ecx = entry.ecx & !0xf0ff | core_bits << 12 | (count - 1);
            }
            0x8000_001d => {
                // Caches of levels 1 and 2 belong to a core, the others to the package.
                let sharing = if entry.eax >> 5 & 7 >= 3 {
                    count - 1
                } else {
                    0
                };
                entry.eax = entry.eax & !(0xfff << 14) | sharing << 14;
            }
            0x8000_001e => {
                entry.eax = id;
                entry.ebx = entry.ebx & !0xffff | id & 0xff;
                entry.ecx = 0;
            }
            HYPERVISOR => entry.eax = entry.eax.max(KVM_FEATURES),
            KVM_FEATURES => {
                // Extended destination IDs in MSIs (bit 15) would need our I/O APIC and MSI path
                // to read them; with at most 64 APICs nobody needs them.
                entry.eax &= !(1 << 15);
            }
            _ => {}
        }
    }
    entries.extend(topology(id, core_bits, count));
    entries
}

fn amd(supported: &[kvm_cpuid_entry2]) -> bool {
    // "Auth" or "Hygo".
    supported
        .iter()
        .any(|e| e.function == 0 && matches!(e.ebx, 0x6874_7541 | 0x6f67_7948))
}

fn features(entry: &mut kvm_cpuid_entry2, id: u32, count: u32, tsc_deadline: bool) {
    const MONITOR: u32 = 1 << 3;
    const X2APIC: u32 = 1 << 21;
    const TSC_DEADLINE: u32 = 1 << 24;
    const OSXSAVE: u32 = 1 << 27;
    const UNDER_HYPERVISOR: u32 = 1 << 31;
    const HTT: u32 = 1 << 28;
    entry.ecx &= !(MONITOR | TSC_DEADLINE | OSXSAVE);
    entry.ecx |= X2APIC | UNDER_HYPERVISOR;
    if tsc_deadline {
        entry.ecx |= TSC_DEADLINE;
    }
    entry.edx &= !HTT;
    if count > 1 {
        entry.edx |= HTT;
    }
    let logical = count.next_power_of_two().min(255);
    entry.ebx = entry.ebx & 0xffff | logical << 16 | id << 24;
}

/// Leaf 4: caches of levels 1 and 2 belong to a core, the others to the package.
fn intel_cache(entry: &mut kvm_cpuid_entry2, count: u32) {
    if entry.eax & 0x1f == 0 {
        return;
    }
    let ids = count.next_power_of_two();
    let sharing = if entry.eax >> 5 & 7 >= 3 { ids - 1 } else { 0 };
    entry.eax = entry.eax & 0x3fff | sharing << 14 | (ids - 1).min(63) << 26;
}

/// Leaf 0xb: the thread level (1 thread, 0 bits), the core level, and the end.
fn topology(id: u32, core_bits: u32, count: u32) -> [kvm_cpuid_entry2; 3] {
    let level = |index: u32, kind: u32, shift: u32, number: u32| kvm_cpuid_entry2 {
        function: 0xb,
        index,
        flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax: shift,
        ebx: number,
        ecx: kind << 8 | index,
        edx: id,
        ..Default::default()
    };
    [
        level(0, 1, 0, 1),
        level(1, 2, core_bits, count),
        level(2, 0, 0, 0),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(function: u32, index: u32, regs: [u32; 4]) -> kvm_cpuid_entry2 {
        let [eax, ebx, ecx, edx] = regs;
        kvm_cpuid_entry2 {
            function,
            index,
            eax,
            ebx,
            ecx,
            edx,
            ..Default::default()
        }
    }

    fn amd_host() -> Vec<kvm_cpuid_entry2> {
        vec![
            leaf(0, 0, [0x10, 0x6874_7541, 0x444d_4163, 0x6974_6e65]),
            leaf(1, 0, [0xa20f10, 0x0310_0800, 0x0820_0008, 0x1781_fbff]),
            leaf(5, 0, [0x40, 0x40, 3, 0x11]),
            leaf(0xb, 0, [1, 2, 0x100, 3]),
            leaf(0x1f, 0, [1, 2, 0x100, 3]),
            leaf(0x8000_0001, 0, [0, 0, 1 << 22, 0]),
            leaf(0x8000_0008, 0, [0x3030, 0, 0x700f, 0]),
            leaf(0x8000_001d, 3, [3 << 5 | 3, 0, 0, 0]),
            leaf(0x8000_001e, 0, [9, 0x0101, 1, 0]),
            leaf(HYPERVISOR, 0, [0x4000_0001, 0x4b4d_564b, 0x564b_4d56, 0x4d]),
            leaf(KVM_FEATURES, 0, [1 << 15 | 1 << 3, 0, 0, 0]),
        ]
    }

    fn find(entries: &[kvm_cpuid_entry2], function: u32, index: u32) -> kvm_cpuid_entry2 {
        *entries
            .iter()
            .find(|e| e.function == function && e.index == index)
            .unwrap()
    }

    #[test]
    fn every_vcpu_has_its_own_apic_id_in_every_leaf_that_has_one() {
        for count in 1..=64 {
            for index in 0..count {
                let cpuid = compose(&amd_host(), index, count, true);
                let id = u32::from(index);
                assert_eq!(find(&cpuid, 1, 0).ebx >> 24, id);
                assert_eq!(find(&cpuid, 0xb, 0).edx, id);
                assert_eq!(find(&cpuid, 0xb, 1).edx, id);
                assert_eq!(find(&cpuid, 0x8000_001e, 0).eax, id);
                assert!(1 << find(&cpuid, 0xb, 1).eax >= u32::from(count));
                assert_eq!(
                    find(&cpuid, 0x8000_0008, 0).ecx & 0xff,
                    u32::from(count) - 1
                );
            }
        }
    }

    #[test]
    fn what_cannot_be_honoured_is_not_offered() {
        let cpuid = compose(&amd_host(), 0, 2, false);
        let one = find(&cpuid, 1, 0);
        assert_eq!(one.ecx & (1 << 3), 0, "MONITOR");
        assert_eq!(one.ecx & (1 << 24), 0, "TSC deadline without KVM's support");
        assert_eq!(find(&cpuid, 5, 0).eax, 0);
        assert_eq!(find(&cpuid, KVM_FEATURES, 0).eax, 1 << 3);
        assert!(!cpuid.iter().any(|e| e.function == 0x1f));
    }

    #[test]
    fn a_guest_knows_that_it_is_one_and_has_x2apic_and_the_tsc_deadline() {
        let one = find(&compose(&amd_host(), 0, 1, true), 1, 0);
        for bit in [21, 24, 31] {
            assert_ne!(one.ecx & 1 << bit, 0, "bit {bit}");
        }
        assert_eq!(one.edx & 1 << 28, 0, "HTT with one vCPU");
    }

    #[test]
    fn the_address_width_is_what_can_be_mapped() {
        assert_eq!(
            address_width(&[leaf(0x8000_0008, 0, [0x3028, 0, 0, 0])]),
            0x28
        );
        assert_eq!(
            address_width(&[leaf(0x8000_0008, 0, [0x0030_3934, 0, 0, 0])]),
            0x30
        );
        assert_eq!(address_width(&[]), 36);
    }

    #[test]
    fn paging_that_devices_lack_is_taken_out_and_nothing_else() {
        let entry = |function, ecx, edx| kvm_cpuid_entry2 {
            function,
            ecx,
            edx,
            ..Default::default()
        };
        let all = [entry(7, !0, !0), entry(0x8000_0001, !0, !0)];
        let have = Paging::of(&all);
        assert_eq!(
            (have.five_levels, have.pages_1g, have.width()),
            (true, true, 57)
        );
        let mut cpuid = all;
        have.limit(&mut cpuid);
        assert_eq!(cpuid, all);
        let less = Paging {
            five_levels: false,
            pages_1g: false,
        };
        less.limit(&mut cpuid);
        assert_eq!(
            cpuid,
            [entry(7, !(1 << 16), !0), entry(0x8000_0001, !0, !(1 << 26))]
        );
        assert_eq!((Paging::of(&cpuid), less.width()), (less, 48));
        assert_eq!(Paging::of(&[]), less);
    }
}
