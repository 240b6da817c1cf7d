//! Landlock: the paths that a thread, and those that it starts, may open from now on.

use std::fmt;
use std::path::{Path, PathBuf};

use landlock::{
    ABI, AccessFs, AccessNet, BitFlags, PathBeneath, PathFd, Ruleset, RulesetAttr,
    RulesetCreatedAttr, RulesetError, RulesetStatus, Scope,
};

use super::Access as Use;
use super::Need;

/// The newest rules that are asked for; what the kernel does not know is left out.
const NEWEST: ABI = ABI::V9;

/// Why paths are not confined.
#[derive(Debug, thiserror::Error)]
#[error("landlock refuses a rule ({0}); report it, or use --landlock off")]
pub struct PathsError(#[from] RulesetError);

/// Why something cannot be opened any more.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{what} is outside of what nestling may open since it booted its first VM; {remedy}")]
pub struct Refusal {
    /// What needs it.
    pub what: String,
    /// What to do.
    pub remedy: String,
}

/// What may be opened, as it was fixed once. Keep it for as long as it is to be so.
#[derive(Debug)]
pub struct Paths {
    allowed: Vec<(PathBuf, Use)>,
    enforced: bool,
    /// A rule is about an inode. Some file systems (9p) make a new one for each look-up, unless
    /// somebody has the file open.
    _kept: Vec<PathFd>,
}

impl Paths {
    /// Confines this thread and those that it starts to `needs`. What is not there is left out.
    ///
    /// # Errors
    /// The kernel has landlock and does not take the rules. A kernel without is no error.
    pub fn restrict(needs: &[Need]) -> Result<Self, PathsError> {
        let mut rules = Ruleset::default()
            .handle_access(AccessFs::from_read(NEWEST) | AccessFs::from_write(NEWEST))?
            .handle_access(AccessNet::BindTcp | AccessNet::ConnectTcp)?
            .scope(Scope::AbstractUnixSocket)?
            .create()?;
        let (mut allowed, mut kept) = (Vec::new(), Vec::new());
        for need in needs {
            // Something else reports what is not there, in its own words.
            let Ok(fd) = PathFd::new(&need.path) else {
                continue;
            };
            let file = !need.path.is_dir();
            let rule = PathBeneath::new(&fd, rights(need.access, file));
            match (&mut rules).add_rule(rule) {
                Ok(_) => {
                    allowed.push((whole(&need.path), need.access));
                    kept.push(fd);
                }
                // A pipe at standard output: nothing confines that.
                Err(why) if !need.named => {
                    log::debug!("no rule for {}: {why}", need.path.display());
                }
                Err(why) => return Err(why.into()),
            }
        }
        let status = rules.restrict_self()?;
        let enforced = status.ruleset != RulesetStatus::NotEnforced;
        log::debug!("landlock: {status:?}");
        Ok(Self {
            allowed,
            enforced,
            _kept: kept,
        })
    }

    /// Whether the kernel does it.
    pub fn enforced(&self) -> bool {
        self.enforced
    }

    /// Whether all of `needs` can still be opened.
    ///
    /// # Errors
    /// The first that cannot.
    pub fn admit(&self, needs: &[Need]) -> Result<(), Refusal> {
        match needs.iter().find(|need| !self.has(need)) {
            Some(need) => Err(Refusal {
                what: need.what.clone(),
                remedy: format!(
                    "start nestling with --landlock-rules path={},access={}, or pass a descriptor (nestling api … --pass)",
                    folder(need).display(),
                    if need.access == Use::Read { "r" } else { "rw" },
                ),
            }),
            None => Ok(()),
        }
    }

    fn has(&self, need: &Need) -> bool {
        // What is not there is reported in other words.
        if !self.enforced || !need.path.exists() {
            return true;
        }
        let path = whole(&need.path);
        let wanted = rights(need.access, !path.is_dir());
        let mut granted = BitFlags::empty();
        for (root, access) in &self.allowed {
            if path.starts_with(root) {
                granted |= rights(*access, false);
            }
        }
        granted.contains(wanted)
    }
}

/// The folder that a rule would name: later it may have other files, too.
fn folder(need: &Need) -> PathBuf {
    let path = whole(&need.path);
    match path.parent() {
        Some(folder) if need.named && !path.is_dir() => folder.into(),
        _ => path,
    }
}

fn whole(path: &Path) -> PathBuf {
    path.canonicalize().unwrap_or_else(|_| path.into())
}

fn rights(access: Use, file: bool) -> BitFlags<AccessFs> {
    let read = AccessFs::ReadFile | AccessFs::ReadDir;
    let write = AccessFs::WriteFile | AccessFs::Truncate;
    let rights = match access {
        Use::Read => read,
        Use::Write => write,
        Use::ReadWrite => read | write,
        Use::Device => read | write | AccessFs::IoctlDev,
        Use::Make => write | AccessFs::MakeReg,
        Use::Socket => AccessFs::MakeSock | AccessFs::RemoveFile,
        Use::Remove => AccessFs::RemoveFile.into(),
    };
    match file {
        true => rights & AccessFs::from_file(NEWEST),
        false => rights,
    }
}

/// What the kernel can do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Support {
    /// Nothing.
    None,
    /// Rules of this version.
    Version(i32),
}

impl fmt::Display for Support {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => f.write_str("none"),
            Self::Version(version) => write!(f, "version {version}"),
        }
    }
}

/// Asks the kernel.
pub fn support() -> Support {
    const VERSION: libc::c_uint = 1; // LANDLOCK_CREATE_RULESET_VERSION
    // SAFETY: with this flag the call makes nothing and reads no memory.
    let version = unsafe {
        libc::syscall(
            libc::SYS_landlock_create_ruleset,
            std::ptr::null::<libc::c_void>(),
            0_usize,
            VERSION,
        )
    };
    match i32::try_from(version) {
        Ok(version) if version > 0 => Support::Version(version),
        _ => Support::None,
    }
}
