//! The path of the socket: who may use it, and what is left of a nestling that was killed.
//!
//! A lock beside it (`PATH.lock`) says whether a nestling lives there. It is taken before anything
//! is looked at, so of two that start at once one is refused. A socket without a living nestling
//! is removed; anything else at that path is somebody's, and is left alone.

use std::fs::{self, File, OpenOptions, Permissions, TryLockError};
use std::io;
use std::os::fd::{AsFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use tokio::net::{UnixListener, UnixSocket};

use crate::inherited::{inherited, listens};

/// How many clients may wait to be let in.
const BACKLOG: u32 = 128;

/// A socket that clients can connect to. Dropping it removes its path.
#[derive(Debug)]
pub(crate) struct Listener {
    listener: std::os::unix::net::UnixListener,
    /// What is to be removed, and the lock on it.
    path: Option<(PathBuf, File)>,
}

impl Listener {
    /// Makes the socket, for this user alone.
    ///
    /// # Errors
    /// One sentence: another nestling has the path, something else is there, or the host refuses.
    pub(crate) fn bind(path: &Path) -> Result<Self, String> {
        let shown = path.display();
        let cannot = |what: &str, why: io::Error| {
            format!("--api-socket path={shown} cannot be {what} ({why}); choose another path")
        };
        let lock = lock(path)?;
        match fs::symlink_metadata(path) {
            Err(why) if why.kind() == io::ErrorKind::NotFound => {}
            Err(why) => return Err(cannot("looked at", why)),
            Ok(there) if !there.file_type().is_socket() => {
                return Err(format!(
                    "--api-socket path={shown} is there and is no socket; choose another path"
                ));
            }
            Ok(_) => {
                if UnixStream::connect(path).is_ok() {
                    return Err(format!(
                        "--api-socket path={shown} belongs to another program that is running; choose another path"
                    ));
                }
                log::info!("the stale socket {shown} is removed");
                fs::remove_file(path).map_err(|why| cannot("removed", why))?;
            }
        }
        let listener = listen(path).map_err(|why| cannot("made", why))?;
        Ok(Self {
            listener,
            path: Some((path.to_owned(), lock)),
        })
    }

    /// Takes over a socket that listens already, from who started nestling.
    ///
    /// # Errors
    /// It is no listening Unix socket.
    pub(crate) fn inherit(fd: RawFd) -> Result<Self, String> {
        let number = fd;
        let fd = inherited(number).map_err(|why| format!("--api-socket {why}"))?;
        // Something that is no socket is told below.
        if listens(fd.as_fd()).is_ok_and(|listens| !listens) {
            return Err(format!(
                "--api-socket fd={number} does not listen; pass a Unix socket on which listen was called"
            ));
        }
        let listener = std::os::unix::net::UnixListener::from(fd);
        let works = listener
            .set_nonblocking(true)
            .and_then(|()| listener.local_addr());
        works.map_err(|why| format!("--api-socket fd is no Unix socket ({why}); pass one"))?;
        Ok(Self {
            listener,
            path: None,
        })
    }

    /// Where it is, if it is ours to remove.
    pub(super) fn path(&self) -> Option<&Path> {
        self.path.as_ref().map(|(path, _)| path.as_path())
    }

    /// For the event loop that is running.
    ///
    /// # Errors
    /// No descriptor is left.
    pub(super) fn for_tokio(&self) -> io::Result<UnixListener> {
        UnixListener::from_std(self.listener.try_clone()?)
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Some((path, _lock)) = &self.path {
            // The lock goes last: whoever waits for it finds neither.
            let _ = fs::remove_file(path);
            let _ = fs::remove_file(lock_path(path));
        }
    }
}

/// Nobody can connect before the mode is set: only then does the socket listen.
fn listen(path: &Path) -> io::Result<std::os::unix::net::UnixListener> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .build()?;
    let _inside = runtime.enter();
    let socket = UnixSocket::new_stream()?;
    socket.bind(path)?;
    fs::set_permissions(path, Permissions::from_mode(0o600))?;
    socket.listen(BACKLOG)?.into_std()
}

fn lock_path(path: &Path) -> PathBuf {
    let mut lock = path.as_os_str().to_owned();
    lock.push(".lock");
    lock.into()
}

fn lock(path: &Path) -> Result<File, String> {
    let at = lock_path(path);
    let cannot = |why: io::Error| {
        format!(
            "{} cannot be locked ({why}); choose another path",
            at.display()
        )
    };
    loop {
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&at)
            .map_err(cannot)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                return Err(format!(
                    "--api-socket path={} is another nestling's; choose another path",
                    path.display()
                ));
            }
            Err(TryLockError::Error(why)) => return Err(cannot(why)),
        }
        // Its owner may have removed it between our two calls: then the lock is on nothing.
        let (ours, there) = (file.metadata().map_err(cannot)?, fs::metadata(&at));
        if there.is_ok_and(|there| there.ino() == ours.ino() && there.dev() == ours.dev()) {
            return Ok(file);
        }
    }
}
