//! How many objects a process has in the kernel's iommufd. The kernel shows no count; but it gives
//! each new object the lowest number that is free, so that numbers which it skips are in use.

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::path::Path;

use anyhow::{Context, Result};

/// New objects for one count: more than a process under test has, or an object beyond the last of
/// them would not be seen.
const NEW: u32 = 256;

/// Objects (IOASes, HWPTs, fault queues, devices) of each `/dev/iommu` that the process has open.
///
/// # Errors
/// The process is gone, or the kernel does not let this one look.
pub fn objects(pid: u32) -> Result<Vec<u32>> {
    let folder = format!("/proc/{pid}/fd");
    let mut counts = Vec::new();
    for entry in fs::read_dir(&folder).with_context(|| format!("cannot read {folder}"))? {
        let entry = entry?;
        // One that is closed meanwhile is none.
        let is = fs::read_link(entry.path()).is_ok_and(|to| to == Path::new("/dev/iommu"));
        if is
            && let Some(number) = entry.file_name().to_str().and_then(|n| n.parse().ok())
            && !is_place(pid, number)
        {
            let iommufd = duplicate(pid, number).context("cannot look at another's iommufd")?;
            counts.push(count(&iommufd).context("IOMMU_IOAS_ALLOC")?);
        }
    }
    Ok(counts)
}

/// Whether a descriptor only names its file, as a sandbox's rules do, and is no open iommufd.
fn is_place(pid: u32, number: RawFd) -> bool {
    let info = fs::read_to_string(format!("/proc/{pid}/fdinfo/{number}")).unwrap_or_default();
    let flags = info.lines().find_map(|line| line.strip_prefix("flags:"));
    let flags = flags.and_then(|flags| i32::from_str_radix(flags.trim(), 8).ok());
    flags.is_none_or(|flags| flags & libc::O_PATH != 0)
}

/// The descriptor `number` of another process.
fn duplicate(pid: u32, number: RawFd) -> io::Result<OwnedFd> {
    let pid = libc::pid_t::try_from(pid).map_err(io::Error::other)?;
    // SAFETY: the call takes numbers only.
    let process = descriptor(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) })?;
    // SAFETY: the call takes numbers only.
    descriptor(unsafe { libc::syscall(libc::SYS_pidfd_getfd, process.as_raw_fd(), number, 0) })
}

fn descriptor(made: libc::c_long) -> io::Result<OwnedFd> {
    match RawFd::try_from(made) {
        // SAFETY: the kernel made this descriptor for us alone.
        Ok(fd) if fd >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        _ => Err(io::Error::last_os_error()),
    }
}

fn count(iommufd: &OwnedFd) -> io::Result<u32> {
    /// `_IO(';', 0x81)` and `_IO(';', 0x80)`.
    const IOAS_ALLOC: libc::c_ulong = 0x3b81;
    const DESTROY: libc::c_ulong = 0x3b80;
    let ask = |request, words: &mut [u32]| {
        words[0] = 4 * words.len() as u32;
        // SAFETY: the first word is the size of the structure that the kernel reads and writes.
        let done = unsafe { libc::ioctl(iommufd.as_raw_fd(), request, words.as_mut_ptr()) };
        if done < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    };
    let mut new = Vec::new();
    let mut failed = None;
    for _ in 0..NEW {
        // Size, flags, the new object's number.
        let mut words = [0; 3];
        match ask(IOAS_ALLOC, &mut words) {
            Ok(()) => new.push(words[2]),
            Err(error) => failed = Some(error),
        }
    }
    for &object in &new {
        ask(DESTROY, &mut [0, object])?;
    }
    match failed {
        Some(error) => Err(error),
        // Numbers begin with 1.
        None => Ok(new.iter().copied().max().unwrap_or(0) - NEW),
    }
}
