//! The state in which a vCPU starts.

use std::io;

use kvm_bindings::{CpuId, Msrs, kvm_msr_entry, kvm_regs, kvm_segment, kvm_sregs};
use kvm_ioctls::VcpuFd;

use super::KvmError;

/// How the boot vCPU enters the guest.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Entry {
    /// Linux's 64-bit boot protocol: long mode, identity-mapped, RSI = zero page
    /// (Documentation/arch/x86/boot.rst, 64-bit boot protocol).
    Linux64 {
        /// First instruction.
        rip: u64,
        /// The zero page.
        zero_page: u64,
        /// The root of identity-mapping page tables.
        page_tables: u64,
        /// The descriptor table that [`GDT`] was written to.
        gdt: u64,
    },
    /// Xen's PVH: 32-bit protected mode without paging, EBX = start info.
    Pvh {
        /// First instruction.
        eip: u32,
        /// The start info.
        start_info: u32,
        /// The descriptor table that [`GDT`] was written to.
        gdt: u64,
    },
    /// Real mode, everything 0 but CS:IP, for tests.
    Real {
        /// First instruction, in segment 0.
        ip: u16,
    },
}

/// The descriptors for both boot protocols: index 2 is code, 3 data, 4 a TSS (bit layout: Intel
/// SDM volume 3, 3.4.5). Code is 64-bit (L) here; PVH's cached code segment is set to 32 bits.
pub const GDT: [u64; 5] = [
    0,
    0,
    0x00af_9b00_0000_ffff,
    0x00cf_9300_0000_ffff,
    0x008f_8b00_0000_ffff,
];

const CODE: u16 = 0x10;
const DATA: u16 = 0x18;
const TSS: u16 = 0x20;

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;

const MSR_MISC_ENABLE: u32 = 0x1a0;
const MSR_MTRR_DEF_TYPE: u32 = 0x2ff;
/// Fast string operations.
const MISC_ENABLE_FAST_STRING: u64 = 1;
/// MTRRs on, all memory write-back.
const MTRR_WRITE_BACK: u64 = 1 << 11 | 6;

/// Offsets in the local APIC's register page, and what is written there.
const APIC_LVT_LINT0: usize = 0x350;
const APIC_LVT_LINT1: usize = 0x360;
const DELIVER_NMI: u32 = 4 << 8;
const DELIVER_EXTINT: u32 = 7 << 8;

/// Gives `vcpu` its CPUID, MSRs and local APIC, and if it is the boot vCPU its registers. Other
/// vCPUs wait for INIT and SIPI.
///
/// # Errors
/// What the kernel said.
pub fn set_up(
    vcpu: &VcpuFd,
    index: u8,
    cpuid: &[kvm_bindings::kvm_cpuid_entry2],
    entry: Option<Entry>,
) -> Result<(), KvmError> {
    let object = || format!("vCPU {index}");
    let too_large = |call| {
        move |_| KvmError::Call {
            call,
            object: format!("vCPU {index}"),
            source: io::Error::from_raw_os_error(libc::E2BIG),
        }
    };
    let cpuid = CpuId::from_entries(cpuid).map_err(too_large("KVM_SET_CPUID2"))?;
    vcpu.set_cpuid2(&cpuid)
        .map_err(KvmError::call("KVM_SET_CPUID2", object()))?;

    let msr = |index, data| kvm_msr_entry {
        index,
        data,
        ..Default::default()
    };
    let msrs = Msrs::from_entries(&[
        msr(MSR_MISC_ENABLE, MISC_ENABLE_FAST_STRING),
        msr(MSR_MTRR_DEF_TYPE, MTRR_WRITE_BACK),
    ])
    .map_err(too_large("KVM_SET_MSRS"))?;
    // A count below the length means that the host does not have the MSR: then the guest does not
    // miss it either.
    vcpu.set_msrs(&msrs)
        .map_err(KvmError::call("KVM_SET_MSRS", object()))?;

    let mut lapic = vcpu
        .get_lapic()
        .map_err(KvmError::call("KVM_GET_LAPIC", object()))?;
    for (offset, mode) in [
        (APIC_LVT_LINT0, DELIVER_EXTINT),
        (APIC_LVT_LINT1, DELIVER_NMI),
    ] {
        for (byte, new) in lapic.regs[offset..offset + 4]
            .iter_mut()
            .zip(mode.to_le_bytes())
        {
            *byte = new as libc::c_char;
        }
    }
    vcpu.set_lapic(&lapic)
        .map_err(KvmError::call("KVM_SET_LAPIC", object()))?;

    if let Some(entry) = entry {
        let sregs = vcpu
            .get_sregs()
            .map_err(KvmError::call("KVM_GET_SREGS", object()))?;
        let (regs, sregs) = entry_state(entry, sregs);
        vcpu.set_sregs(&sregs)
            .map_err(KvmError::call("KVM_SET_SREGS", object()))?;
        vcpu.set_regs(&regs)
            .map_err(KvmError::call("KVM_SET_REGS", object()))?;
    }
    Ok(())
}

/// The registers for `entry`, from those after reset.
fn entry_state(entry: Entry, mut sregs: kvm_sregs) -> (kvm_regs, kvm_sregs) {
    // Bit 1 of RFLAGS is always set; interrupts are off.
    let mut regs = kvm_regs {
        rflags: 2,
        ..Default::default()
    };
    match entry {
        Entry::Linux64 {
            rip,
            zero_page,
            page_tables,
            gdt,
        } => {
            flat_segments(&mut sregs, gdt, true);
            sregs.cr0 = CR0_PE | CR0_ET | CR0_PG;
            sregs.cr3 = page_tables;
            sregs.cr4 = CR4_PAE;
            sregs.efer = EFER_LME | EFER_LMA;
            regs.rip = rip;
            regs.rsi = zero_page;
        }
        Entry::Pvh {
            eip,
            start_info,
            gdt,
        } => {
            flat_segments(&mut sregs, gdt, false);
            sregs.cr0 = CR0_PE | CR0_ET;
            sregs.cr4 = 0;
            regs.rip = eip.into();
            regs.rbx = start_info.into();
        }
        Entry::Real { ip } => {
            sregs.cs.selector = 0;
            sregs.cs.base = 0;
            regs.rip = ip.into();
        }
    }
    (regs, sregs)
}

fn flat_segments(sregs: &mut kvm_sregs, gdt: u64, long: bool) {
    let flat = kvm_segment {
        limit: 0xffff_ffff,
        present: 1,
        s: 1,
        g: 1,
        ..Default::default()
    };
    sregs.cs = kvm_segment {
        selector: CODE,
        // Execute, read, accessed.
        type_: 0xb,
        l: u8::from(long),
        db: u8::from(!long),
        ..flat
    };
    let data = kvm_segment {
        selector: DATA,
        // Read, write, accessed.
        type_: 0x3,
        db: 1,
        ..flat
    };
    sregs.ds = data;
    sregs.es = data;
    sregs.fs = data;
    sregs.gs = data;
    sregs.ss = data;
    sregs.tr = kvm_segment {
        selector: TSS,
        // A busy TSS; PVH wants its limit to be 0x67.
        type_: 0xb,
        limit: 0x67,
        present: 1,
        ..Default::default()
    };
    sregs.gdt.base = gdt;
    sregs.gdt.limit = (size_of_val(&GDT) - 1) as u16;
    sregs.idt.base = 0;
    sregs.idt.limit = 0;
}
