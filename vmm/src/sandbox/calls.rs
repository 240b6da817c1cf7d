//! Which system calls each role makes, and with which arguments.
//!
//! The sets hold what nestling, Rust's library and the C library (glibc and musl, static or not)
//! call on that thread. Whoever starts a thread may do all that the thread may: filters are
//! inherited.

#![forbid(unsafe_code)]

use std::collections::{BTreeMap, BTreeSet};

use libc::{
    SYS_accept4, SYS_access, SYS_bind, SYS_brk, SYS_clock_getres, SYS_clock_gettime,
    SYS_clock_nanosleep, SYS_clone, SYS_clone3, SYS_close, SYS_dup, SYS_epoll_create1,
    SYS_epoll_ctl, SYS_epoll_pwait, SYS_epoll_pwait2, SYS_epoll_wait, SYS_eventfd2, SYS_exit,
    SYS_exit_group, SYS_faccessat, SYS_faccessat2, SYS_fallocate, SYS_fcntl, SYS_fdatasync,
    SYS_flock, SYS_fstat, SYS_fstatfs, SYS_fsync, SYS_ftruncate, SYS_futex, SYS_getcwd,
    SYS_getdents64, SYS_getegid, SYS_geteuid, SYS_getgid, SYS_getpeername, SYS_getpid,
    SYS_getrandom, SYS_getsockname, SYS_getsockopt, SYS_gettid, SYS_gettimeofday, SYS_getuid,
    SYS_ioctl, SYS_landlock_add_rule, SYS_landlock_create_ruleset, SYS_landlock_restrict_self,
    SYS_listen, SYS_lseek, SYS_lstat, SYS_madvise, SYS_memfd_create, SYS_mincore, SYS_mmap,
    SYS_mprotect, SYS_mremap, SYS_munmap, SYS_nanosleep, SYS_newfstatat, SYS_open, SYS_openat,
    SYS_pipe2, SYS_poll, SYS_ppoll, SYS_prctl, SYS_pread64, SYS_preadv, SYS_pwrite64, SYS_pwritev,
    SYS_read, SYS_readlink, SYS_readlinkat, SYS_readv, SYS_recvfrom, SYS_recvmsg,
    SYS_restart_syscall, SYS_rseq, SYS_rt_sigaction, SYS_rt_sigprocmask, SYS_rt_sigreturn,
    SYS_sched_getaffinity, SYS_sched_yield, SYS_seccomp, SYS_sendmsg, SYS_sendto,
    SYS_set_robust_list, SYS_setsockopt, SYS_shutdown, SYS_sigaltstack, SYS_socket, SYS_stat,
    SYS_statfs, SYS_statx, SYS_sysinfo, SYS_tgkill, SYS_time, SYS_timerfd_create,
    SYS_timerfd_settime, SYS_uname, SYS_unlink, SYS_unlinkat, SYS_write, SYS_writev,
};

use super::Role;

/// That some bits (`mask`) of the lower half of an argument have a value.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) struct Check {
    /// Which argument, from 0.
    pub(super) argument: u8,
    /// Which bits.
    pub(super) mask: u32,
    /// Their value.
    pub(super) value: u32,
}

/// System calls by number. One with checks is allowed if any of them holds, one without always.
#[derive(Clone, Default, Debug)]
pub(super) struct Calls(BTreeMap<i64, BTreeSet<Check>>);

impl Calls {
    pub(super) fn always(&mut self, numbers: &[i64]) {
        for number in numbers {
            self.0.insert(*number, BTreeSet::new());
        }
    }

    /// Allows a call when the bits `mask` of `argument` are `value`.
    fn when(&mut self, number: i64, argument: u8, mask: u32, value: u32) {
        let check = Check {
            argument,
            mask,
            value,
        };
        match self.0.get_mut(&number) {
            Some(checks) if checks.is_empty() => {}
            Some(checks) => drop(checks.insert(check)),
            None => drop(self.0.insert(number, BTreeSet::from([check]))),
        }
    }

    /// Allows a call when `argument` is one of `values`.
    fn only(&mut self, number: i64, argument: u8, values: &[u32]) {
        for value in values {
            self.when(number, argument, u32::MAX, *value);
        }
    }

    fn and(mut self, other: &Self) -> Self {
        for (number, checks) in &other.0 {
            match checks.is_empty() {
                true => self.always(&[*number]),
                false => {
                    for check in checks {
                        self.when(*number, check.argument, check.mask, check.value);
                    }
                }
            }
        }
        self
    }

    pub(super) fn all(&self) -> impl Iterator<Item = (i64, &BTreeSet<Check>)> {
        self.0.iter().map(|(number, checks)| (*number, checks))
    }
}

/// The call whose flags are in memory, where no filter sees them.
pub(super) fn clone3() -> Calls {
    let mut calls = Calls::default();
    calls.always(&[SYS_clone3]);
    calls
}

/// Opening a file to read or write it; `O_PATH` names one only.
pub(super) fn opening() -> Calls {
    let mut calls = Calls::default();
    calls.when(SYS_open, 1, libc::O_PATH as u32, 0);
    calls.when(SYS_openat, 2, libc::O_PATH as u32, 0);
    calls
}

/// What this role may call.
pub(super) fn of(role: Role) -> Calls {
    let mut calls = every();
    match role {
        Role::Main => {
            files(&mut calls);
            spawns(&mut calls);
            waits(&mut calls);
            main(&mut calls);
            return of(Role::Vcpu)
                .and(&of(Role::Prefault))
                .and(&of(Role::Watchdog))
                .and(&calls);
        }
        Role::Vcpu => {
            spawns(&mut calls);
            waits(&mut calls);
            interrupts(&mut calls);
            host_iommu(&mut calls);
            device_memory(&mut calls);
            calls.always(&[SYS_pread64, SYS_pwrite64]);
            calls.only(SYS_fcntl, 1, DESCRIPTORS);
            calls.only(SYS_ioctl, 1, &[KVM_RUN, KVM_KVMCLOCK_CTRL, KVM_GET_REGS]);
            // Its feature negotiation configures the tap.
            calls.only(SYS_ioctl, 1, &[TUNSETOFFLOAD, TUNSETVNETHDRSZ]);
            let its = [
                Role::Block,
                Role::Net,
                Role::Rng,
                Role::Console,
                Role::TestEngine,
                Role::Line,
                Role::PageRequests,
                Role::BlockedIrqs,
            ];
            return its.iter().fold(calls, |calls, its| calls.and(&of(*its)));
        }
        Role::Block => {
            waits(&mut calls);
            interrupts(&mut calls);
            calls.always(&[
                SYS_preadv,
                SYS_pwritev,
                SYS_pread64,
                SYS_pwrite64,
                SYS_fdatasync,
                SYS_fsync,
                SYS_fallocate,
                SYS_lseek,
            ]);
        }
        Role::Net => {
            waits(&mut calls);
            interrupts(&mut calls);
            calls.always(&[SYS_readv]);
            calls.only(SYS_ioctl, 1, &[TUNSETOFFLOAD, TUNSETVNETHDRSZ]);
        }
        Role::Rng => {
            waits(&mut calls);
            interrupts(&mut calls);
            calls.always(&[SYS_readv]);
        }
        Role::Console => {
            waits(&mut calls);
            interrupts(&mut calls);
            calls.always(&[
                SYS_readv,
                SYS_accept4,
                SYS_recvfrom,
                SYS_sendto,
                SYS_sendmsg,
                SYS_recvmsg,
                SYS_shutdown,
                SYS_lseek,
            ]);
            calls.only(SYS_fcntl, 1, DESCRIPTORS);
            calls.only(SYS_ioctl, 1, &[FIONBIO]);
        }
        Role::TestEngine => {
            waits(&mut calls);
            interrupts(&mut calls);
        }
        Role::Line => {
            waits(&mut calls);
            interrupts(&mut calls);
            calls.always(&[SYS_pread64]);
            calls.only(SYS_ioctl, 1, &[VFIO_DEVICE_SET_IRQS]);
        }
        Role::PageRequests => {
            waits(&mut calls);
            interrupts(&mut calls);
            host_iommu(&mut calls);
        }
        Role::BlockedIrqs => {
            waits(&mut calls);
            interrupts(&mut calls);
        }
        // Whether memory is there.
        Role::Prefault => calls.always(&[SYS_mincore]),
        Role::Api => {
            waits(&mut calls);
            calls.always(&[
                SYS_accept4,
                SYS_getpeername,
                SYS_getsockname,
                SYS_getsockopt,
                SYS_lseek,
                SYS_newfstatat,
                SYS_fstat,
                SYS_poll,
                SYS_readv,
                SYS_recvfrom,
                SYS_recvmsg,
                SYS_sendmsg,
                SYS_sendto,
                SYS_setsockopt,
                SYS_shutdown,
                SYS_statx,
                // Its socket, at the end.
                SYS_unlink,
                SYS_unlinkat,
            ]);
            calls.only(SYS_fcntl, 1, DESCRIPTORS);
            calls.only(SYS_ioctl, 1, &[FIONBIO]);
            confines_itself(&mut calls);
        }
        Role::Inspector => {
            waits(&mut calls);
            files(&mut calls);
            calls.only(SYS_ioctl, 1, &[IOMMU_IOAS_IOVA_RANGES, IOMMU_GET_HW_INFO]);
            // Whether the kernel has landlock; a domain of its own when it begins.
            confines_itself(&mut calls);
        }
        Role::Watchdog => {
            calls.always(&[SYS_read, SYS_poll, SYS_ppoll]);
            // It restores the terminal.
            calls.only(SYS_ioctl, 1, TERMINAL);
        }
    }
    calls
}

/// Memory, locks, time, messages on standard error, the end: what any thread does.
fn every() -> Calls {
    let mut calls = Calls::default();
    calls.always(&[
        SYS_brk,
        SYS_clock_getres,
        SYS_clock_gettime,
        SYS_clock_nanosleep,
        SYS_close,
        SYS_exit,
        SYS_exit_group,
        SYS_futex,
        SYS_getpid,
        SYS_getrandom,
        SYS_gettid,
        SYS_gettimeofday,
        SYS_madvise,
        SYS_mremap,
        SYS_munmap,
        SYS_nanosleep,
        // They fail where a role opens no files: see `opening`.
        SYS_open,
        SYS_openat,
        SYS_restart_syscall,
        SYS_rseq,
        SYS_rt_sigaction,
        SYS_rt_sigprocmask,
        SYS_rt_sigreturn,
        SYS_sched_getaffinity,
        SYS_sched_yield,
        SYS_set_robust_list,
        SYS_sigaltstack,
        SYS_time,
        SYS_write,
        SYS_writev,
    ]);
    // No memory that can be executed comes after the program's own.
    for number in [SYS_mmap, SYS_mprotect] {
        calls.when(number, 2, libc::PROT_EXEC as u32, 0);
    }
    // Builds with assertions look whether a descriptor is open before they close it.
    calls.only(SYS_fcntl, 1, &[libc::F_GETFD as u32]);
    // Signals to threads of this process: an abort, a kick.
    calls.only(SYS_tgkill, 0, &[std::process::id()]);
    // The C library names what it maps.
    calls.only(
        SYS_prctl,
        0,
        &[libc::PR_SET_NAME as u32, libc::PR_SET_VMA as u32],
    );
    calls
}

/// Starts threads, which install their filters.
fn spawns(calls: &mut Calls) {
    let thread = (libc::CLONE_VM | libc::CLONE_THREAD) as u32;
    calls.when(SYS_clone, 0, thread, thread);
    // Another filter has it fail.
    calls.always(&[SYS_clone3]);
    // SECCOMP_SET_MODE_FILTER
    calls.only(SYS_seccomp, 0, &[1]);
    calls.only(SYS_prctl, 0, &[libc::PR_SET_NO_NEW_PRIVS as u32]);
}

/// Waits for descriptors.
fn waits(calls: &mut Calls) {
    calls.always(&[
        SYS_epoll_create1,
        SYS_epoll_ctl,
        SYS_epoll_pwait,
        SYS_epoll_pwait2,
        SYS_epoll_wait,
        SYS_eventfd2,
        SYS_read,
    ]);
}

/// Opens files and looks at them.
fn files(calls: &mut Calls) {
    calls.always(&[
        SYS_access,
        SYS_faccessat,
        SYS_faccessat2,
        SYS_fstat,
        SYS_fstatfs,
        SYS_getcwd,
        SYS_getdents64,
        SYS_lseek,
        SYS_lstat,
        SYS_newfstatat,
        SYS_pread64,
        SYS_readlink,
        SYS_readlinkat,
        SYS_readv,
        SYS_stat,
        SYS_statfs,
        SYS_statx,
        SYS_sysinfo,
        SYS_uname,
        SYS_getuid,
        SYS_geteuid,
        SYS_getgid,
        SYS_getegid,
    ]);
    calls.only(SYS_fcntl, 1, DESCRIPTORS);
}

/// Landlock: opens what the rules name, without any right to it.
fn confines_itself(calls: &mut Calls) {
    calls.always(&[
        SYS_landlock_create_ruleset,
        SYS_landlock_add_rule,
        SYS_landlock_restrict_self,
    ]);
    let no_new_privileges = [
        libc::PR_SET_NO_NEW_PRIVS as u32,
        libc::PR_GET_NO_NEW_PRIVS as u32,
    ];
    calls.only(SYS_prctl, 0, &no_new_privileges);
    calls.always(&[
        SYS_fstat,
        SYS_getcwd,
        SYS_lstat,
        SYS_newfstatat,
        SYS_readlink,
        SYS_readlinkat,
        SYS_stat,
        SYS_statx,
    ]);
}

/// Builds a VM and takes it down.
fn main(calls: &mut Calls) {
    confines_itself(calls);
    calls.always(&[
        SYS_accept4,
        SYS_bind,
        SYS_dup,
        SYS_fdatasync,
        SYS_flock,
        SYS_fsync,
        SYS_ftruncate,
        SYS_fallocate,
        SYS_getsockname,
        SYS_getsockopt,
        SYS_listen,
        SYS_memfd_create,
        SYS_pipe2,
        SYS_poll,
        SYS_ppoll,
        SYS_pwrite64,
        SYS_recvfrom,
        SYS_recvmsg,
        SYS_sendmsg,
        SYS_sendto,
        SYS_setsockopt,
        SYS_shutdown,
        SYS_timerfd_create,
        SYS_timerfd_settime,
        SYS_unlink,
        SYS_unlinkat,
    ]);
    calls.only(SYS_socket, 0, &[libc::AF_UNIX as u32]);
    // All of KVM, of VFIO and iommufd.
    calls.when(SYS_ioctl, 1, 0xff00, KVM << 8);
    calls.when(SYS_ioctl, 1, 0xff00, VFIO << 8);
    calls.only(SYS_ioctl, 1, TERMINAL);
    calls.only(
        SYS_ioctl,
        1,
        &[TUNSETIFF, TUNGETIFF, FIONBIO, FIOCLEX, SIOCGIFINDEX],
    );
}

/// Interrupts the guest, or sees that it is not.
fn interrupts(calls: &mut Calls) {
    let numbers = [
        KVM_IRQ_LINE,
        KVM_IRQFD,
        KVM_IOEVENTFD,
        KVM_SIGNAL_MSI,
        KVM_SET_GSI_ROUTING,
    ];
    calls.only(SYS_ioctl, 1, &numbers);
}

/// What a guest makes its vIOMMU do in the host's.
fn host_iommu(calls: &mut Calls) {
    calls.only(
        SYS_ioctl,
        1,
        &[
            IOMMU_DESTROY,
            IOMMU_IOAS_ALLOC,
            IOMMU_IOAS_ALLOW_IOVAS,
            IOMMU_IOAS_COPY,
            IOMMU_IOAS_IOVA_RANGES,
            IOMMU_IOAS_MAP,
            IOMMU_IOAS_MAP_FILE,
            IOMMU_IOAS_UNMAP,
            IOMMU_HWPT_ALLOC,
            IOMMU_GET_HW_INFO,
            IOMMU_HWPT_INVALIDATE,
            IOMMU_FAULT_QUEUE_ALLOC,
            VFIO_DEVICE_ATTACH_IOMMUFD_PT,
            VFIO_DEVICE_DETACH_IOMMUFD_PT,
        ],
    );
    // Configuration space: a device is stopped before its table goes.
    calls.always(&[SYS_pread64, SYS_pwrite64]);
}

/// What a guest makes a passed-through device do, and where it puts its registers.
fn device_memory(calls: &mut Calls) {
    calls.only(
        SYS_ioctl,
        1,
        &[
            KVM_SET_USER_MEMORY_REGION,
            VFIO_DEVICE_GET_REGION_INFO,
            VFIO_DEVICE_GET_IRQ_INFO,
            VFIO_DEVICE_SET_IRQS,
            VFIO_DEVICE_RESET,
            VFIO_DEVICE_FEATURE,
        ],
    );
}

/// The letters that the kernel gives to groups of ioctls.
const KVM: u32 = 0xae;
const VFIO: u32 = b';' as u32;

const KVM_SET_USER_MEMORY_REGION: u32 = 0x4020_ae46;
const KVM_IRQ_LINE: u32 = 0x4008_ae61;
const KVM_SET_GSI_ROUTING: u32 = 0x4008_ae6a;
const KVM_IRQFD: u32 = 0x4020_ae76;
const KVM_IOEVENTFD: u32 = 0x4040_ae79;
const KVM_RUN: u32 = 0xae80;
const KVM_GET_REGS: u32 = 0x8090_ae81;
const KVM_SIGNAL_MSI: u32 = 0x4020_aea5;
const KVM_KVMCLOCK_CTRL: u32 = 0xaead;

const VFIO_DEVICE_GET_REGION_INFO: u32 = 0x3b6c;
const VFIO_DEVICE_GET_IRQ_INFO: u32 = 0x3b6d;
const VFIO_DEVICE_SET_IRQS: u32 = 0x3b6e;
const VFIO_DEVICE_RESET: u32 = 0x3b6f;
const VFIO_DEVICE_FEATURE: u32 = 0x3b75;
const VFIO_DEVICE_ATTACH_IOMMUFD_PT: u32 = 0x3b77;
const VFIO_DEVICE_DETACH_IOMMUFD_PT: u32 = 0x3b78;

const IOMMU_DESTROY: u32 = 0x3b80;
const IOMMU_IOAS_ALLOC: u32 = 0x3b81;
const IOMMU_IOAS_ALLOW_IOVAS: u32 = 0x3b82;
const IOMMU_IOAS_COPY: u32 = 0x3b83;
const IOMMU_IOAS_IOVA_RANGES: u32 = 0x3b84;
const IOMMU_IOAS_MAP: u32 = 0x3b85;
const IOMMU_IOAS_UNMAP: u32 = 0x3b86;
const IOMMU_HWPT_ALLOC: u32 = 0x3b89;
const IOMMU_GET_HW_INFO: u32 = 0x3b8a;
const IOMMU_HWPT_INVALIDATE: u32 = 0x3b8d;
const IOMMU_FAULT_QUEUE_ALLOC: u32 = 0x3b8e;
const IOMMU_IOAS_MAP_FILE: u32 = 0x3b8f;

const TUNSETIFF: u32 = 0x4004_54ca;
const TUNSETOFFLOAD: u32 = 0x4004_54d0;
const TUNGETIFF: u32 = 0x8004_54d2;
const TUNSETVNETHDRSZ: u32 = 0x4004_54d8;

/// Copies of descriptors, their flags, and locks. Not who is signalled about one, and how: that
/// would be a way to signal any process.
const DESCRIPTORS: &[u32] = &[
    libc::F_DUPFD as u32,
    libc::F_DUPFD_CLOEXEC as u32,
    libc::F_GETFD as u32,
    libc::F_SETFD as u32,
    libc::F_GETFL as u32,
    libc::F_SETFL as u32,
    libc::F_OFD_GETLK as u32,
    libc::F_OFD_SETLK as u32,
];

const FIOCLEX: u32 = 0x5451;
const FIONBIO: u32 = 0x5421;
const SIOCGIFINDEX: u32 = 0x8933;
/// TCGETS, TCSETS, TCSETSW, TCSETSF, TIOCGWINSZ, and the second generation of the first two.
const TERMINAL: &[u32] = &[
    0x5401,
    0x5402,
    0x5403,
    0x5404,
    0x5413,
    0x802c_542a,
    0x402c_542b,
];
