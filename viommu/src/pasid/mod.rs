//! PASIDs that are unique on a whole host.
//!
//! A guest that shares a work queue with other guests, or with the host, must not pick its PASIDs
//! itself: two guests would pick the same. [`HostPasids`] hands out numbers that no other VM of
//! the host has, without a daemon: owning PASID *n* means holding an open-file-description lock
//! on byte *n* of one file, so the kernel takes everything back from a VM that dies, however it
//! dies. [`holders`] lists who has what.
//!
//! The VT-d front end forwards its virtual commands here ([`crate::vtd`], through
//! [`PasidAllocator`]); an embedder or the REST API may use it without.
//!
//! [`HostPasids::open`] is called before the first vCPU runs and proves everything there: the
//! directory, the permission, and that there is a PASID, which it keeps. A guest therefore never
//! finds virtual commands that cannot work.

mod file;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzz;
mod host;
mod locks;

use std::path::PathBuf;

pub use file::{DEFAULT_DIRECTORY, FILE_NAME, Holder, Owner, holders};
pub use host::{Config, Counts, HostPasids};

use crate::Pasid;

/// Hands out PASIDs to one VM. PASID 0 is never among them.
///
/// Called on vCPU threads, with no unit's lock held; an implementation does its own locking.
pub trait PasidAllocator: Send + Sync {
    /// A PASID that nobody else has.
    ///
    /// # Errors
    /// There is none for this VM now; it may succeed later.
    fn allocate(&self) -> Result<Pasid, Error>;

    /// Gives one back.
    ///
    /// # Errors
    /// [`Error::NotOwned`] when [`allocate`](Self::allocate) did not give it, or it was freed
    /// already.
    fn free(&self, pasid: Pasid) -> Result<(), Error>;

    /// Gives all back, as when the guest is reset.
    fn free_all(&self);
}

/// Why there is no PASID.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The directory does not exist.
    #[error("{} does not exist; create it, writable for every user who runs VMs that share PASIDs", .0.display())]
    NoDirectory(PathBuf),
    /// It may not be used.
    #[error("no permission to {verb} {}; give this user write access to it and to its directory", path.display())]
    NoPermission {
        /// What was tried.
        verb: &'static str,
        /// The file.
        path: PathBuf,
    },
    /// It is something else.
    #[error(
        "{} is not a PASID file of this version of nestling; stop all VMs that use it, then remove it",
        .0.display()
    )]
    NotOurs(PathBuf),
    /// It was removed or replaced while in use: VMs that start now would get the same numbers.
    #[error("{} was removed while VMs use it; stop all VMs that use it and start them again", .0.display())]
    Removed(PathBuf),
    /// Every VM that the file has room for is there.
    #[error("{} already has {most} VMs, the most it can have; stop one", path.display())]
    NoSeat {
        /// The file.
        path: PathBuf,
        /// How many VMs it can have.
        most: u32,
    },
    /// All PASIDs of the range are taken.
    #[error(
        "no PASID from {min} to {max} is free on this host; `nestling pasids` shows who holds them"
    )]
    Exhausted {
        /// The lowest that was allowed.
        min: u32,
        /// The highest that was allowed.
        max: u32,
    },
    /// This VM has as many as it may have.
    #[error(
        "this VM has all {quota} PASIDs of its quota; free some, or start it with a larger quota"
    )]
    Quota {
        /// How many it may have.
        quota: u32,
    },
    /// This VM does not have that one.
    #[error("PASID {pasid:#x} is not allocated to this VM; free only what was allocated, once")]
    NotOwned {
        /// The number.
        pasid: u32,
    },
    /// The limits allow nothing.
    #[error(
        "PASIDs from {min} to {max} with a quota of {quota} cannot be had; \
         choose 1 <= min <= max <= 1048575 and a quota of at least 1"
    )]
    Limits {
        /// The lowest that was asked for.
        min: u32,
        /// The highest that was asked for.
        max: u32,
        /// The quota that was asked for.
        quota: u32,
    },
    /// The host kernel refused.
    #[error("cannot {verb} {}; see the cause, and the space left on its file system", path.display())]
    Host {
        /// What was tried.
        verb: &'static str,
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: std::io::Error,
    },
}
