//! Filters from tables of system calls, and their installation.

#![forbid(unsafe_code)]

use std::collections::BTreeMap;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};

use super::Role;
use super::calls::{self, Calls, Check};
use crate::config::SeccompMode;

/// Why a thread is not sandboxed.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    /// A filter cannot be made: a bug.
    #[error("a system call filter cannot be made ({0}); report it, or use --seccomp off")]
    Make(String),
    /// The kernel does not take it.
    #[error(
        "the kernel takes no system call filter ({0}); use one with CONFIG_SECCOMP_FILTER, or --seccomp off"
    )]
    Install(String),
    /// The thread has no role: a bug.
    #[error("thread {0} has no system call filter; report it, or use --seccomp off")]
    NoRole(String),
}

/// The filter of each role.
pub(super) struct Filters {
    /// For all threads, beside their own: see [`Filters::begin`].
    no_clone3: BpfProgram,
    /// For roles that open no files, beside their own: opening one fails. It does not kill, since C
    /// libraries look at /sys when they please, and live without it.
    no_files: BpfProgram,
    roles: Vec<BpfProgram>,
}

impl Filters {
    pub(super) fn new(mode: SeccompMode) -> Result<Self, SandboxError> {
        let forbidden = match mode {
            SeccompMode::Log => SeccompAction::Log,
            _ => SeccompAction::KillProcess,
        };
        let program = |role: &Role| compile(&calls::of(*role), &forbidden, &SeccompAction::Allow);
        let failing = |calls: &Calls, error: libc::c_int| {
            let fails = SeccompAction::Errno(error as u32);
            compile(calls, &SeccompAction::Allow, &fails)
        };
        Ok(Self {
            no_clone3: failing(&calls::clone3(), libc::ENOSYS)?,
            no_files: failing(&calls::opening(), libc::EACCES)?,
            roles: Role::ALL.iter().map(program).collect::<Result<_, _>>()?,
        })
    }

    /// For the first thread: `clone3`, whose flags no filter can see, does as if the kernel did not
    /// have it, upon which C libraries take `clone`.
    pub(super) fn begin(&self) -> Result<(), SandboxError> {
        apply(&self.no_clone3)
    }

    pub(super) fn install(&self, role: Role) -> Result<(), SandboxError> {
        if !role.opens_files() {
            apply(&self.no_files)?;
        }
        self.roles.get(role as usize).map_or(Ok(()), apply)
    }
}

fn apply(program: &BpfProgram) -> Result<(), SandboxError> {
    // For this thread and those that it starts (no TSYNC).
    seccompiler::apply_filter(program).map_err(|why| SandboxError::Install(why.to_string()))
}

/// `otherwise` is done for what is not in `calls`.
fn compile(
    calls: &Calls,
    otherwise: &SeccompAction,
    matched: &SeccompAction,
) -> Result<BpfProgram, SandboxError> {
    let make = |why: seccompiler::BackendError| SandboxError::Make(why.to_string());
    let mut rules = BTreeMap::new();
    for (number, checks) in calls.all() {
        let checks: Vec<SeccompRule> = checks
            .iter()
            .map(|check| SeccompRule::new(vec![condition(*check)?]))
            .collect::<Result<_, _>>()
            .map_err(make)?;
        rules.insert(number, checks);
    }
    let filter = SeccompFilter::new(
        rules,
        otherwise.clone(),
        matched.clone(),
        TargetArch::x86_64,
    );
    filter.and_then(TryInto::try_into).map_err(make)
}

fn condition(check: Check) -> Result<SeccompCondition, seccompiler::BackendError> {
    // The kernel looks at the lower half of all arguments that are checked, but that of ioctl.
    SeccompCondition::new(
        check.argument,
        SeccompCmpArgLen::Dword,
        SeccompCmpOp::MaskedEq(check.mask.into()),
        check.value.into(),
    )
}
