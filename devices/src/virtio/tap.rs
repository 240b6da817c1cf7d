//! A tap interface of the host.

use std::ffi::CString;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use thiserror::Error;

const TUN: &str = "/dev/net/tun";
/// Bytes of struct virtio_net_hdr_v1, which precedes each frame both ways.
pub(super) const HEADER: usize = 12;

// linux/if_tun.h; 'T' ioctls with a 4-byte argument.
const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
const TUNSETOFFLOAD: libc::c_ulong = 0x4004_54d0;
const TUNGETIFF: libc::c_ulong = 0x8004_54d2;
const TUNSETVNETHDRSZ: libc::c_ulong = 0x4004_54d8;

/// What the host may hand us unfinished (TUN_F_*): no checksum, TCPv4 and TCPv6 not segmented.
pub(super) const OFFLOAD_CSUM: u32 = 1;
pub(super) const OFFLOAD_TSO4: u32 = 2;
pub(super) const OFFLOAD_TSO6: u32 = 4;

const KIND: libc::c_int = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;

/// How a tap interface is reached.
#[derive(Debug)]
pub enum TapSource {
    /// An existing interface of this network namespace.
    Name(String),
    /// A file descriptor of `/dev/net/tun` that is attached to a tap interface with
    /// `IFF_NO_PI` and `IFF_VNET_HDR`.
    Fd(OwnedFd),
}

/// Why a tap interface cannot be used.
#[derive(Error, Debug)]
pub enum TapError {
    /// There is no such interface.
    #[error(
        "tap interface {0} does not exist: create it with `ip tuntap add dev {0} mode tap && \
         ip link set dev {0} up`"
    )]
    Missing(String),
    /// The name cannot be an interface's.
    #[error("{0:?} cannot be the name of a tap interface: it has 1 to 15 bytes and no '/'")]
    Name(String),
    /// This user may not attach to it.
    #[error(
        "tap interface {0} is not this user's: create it with `ip tuntap add dev {0} mode tap \
         user $USER`, or run with CAP_NET_ADMIN"
    )]
    Permission(String),
    /// Another process has it.
    #[error("tap interface {0} is in use by another process: stop that or give another")]
    InUse(String),
    /// It is not a single-queue tap.
    #[error(
        "{0} is not a tap interface with one queue: create one with `ip tuntap add dev NAME mode \
         tap`"
    )]
    Kind(String),
    /// The host has no tap driver.
    #[error("/dev/net/tun cannot be opened: load the module `tun` and check its permissions")]
    Driver(#[source] io::Error),
    /// The file descriptor is not a tap's.
    #[error(
        "the file descriptor given for a network device is not attached to a tap interface with \
         IFF_NO_PI and IFF_VNET_HDR"
    )]
    Fd,
    /// Anything else.
    #[error("tap interface {name}: {call} failed")]
    Host {
        /// The interface.
        name: String,
        /// The kernel's name of the call.
        call: &'static str,
        /// What the host said.
        #[source]
        source: io::Error,
    },
}

/// An attached tap interface, non-blocking, with a virtio-net header of [`HEADER`] bytes.
#[derive(Debug)]
pub(super) struct Tap {
    file: File,
    name: String,
    offloads: bool,
}

impl Tap {
    pub(super) fn open(source: TapSource) -> Result<Self, TapError> {
        let (file, name) = match source {
            TapSource::Name(name) => (attach(&name)?, name),
            TapSource::Fd(fd) => adopt(fd)?,
        };
        let size = HEADER as libc::c_int;
        // SAFETY: the argument is a valid pointer to the int that the call reads.
        let set = unsafe { libc::ioctl(file.as_raw_fd(), TUNSETVNETHDRSZ, &size) };
        if set < 0 {
            return Err(TapError::Host {
                name,
                call: "TUNSETVNETHDRSZ",
                source: io::Error::last_os_error(),
            });
        }
        let mut tap = Self {
            file,
            name,
            offloads: false,
        };
        let all = OFFLOAD_CSUM | OFFLOAD_TSO4 | OFFLOAD_TSO6;
        tap.offloads = tap.set_offloads(all).is_ok() && tap.set_offloads(0).is_ok();
        Ok(tap)
    }

    /// A tap whose other end is `fd`: one datagram is one frame with its header.
    #[cfg(any(test, feature = "fuzzing"))]
    pub(super) fn fake(fd: OwnedFd) -> Self {
        Self {
            file: File::from(fd),
            name: "fake".into(),
            offloads: false,
        }
    }

    /// The interface's name.
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// Whether the host can hand over frames that are not finished.
    pub(super) fn has_offloads(&self) -> bool {
        self.offloads
    }

    /// Says what the guest takes unfinished (OFFLOAD_*).
    pub(super) fn set_offloads(&self, offloads: u32) -> io::Result<()> {
        // SAFETY: the argument is a number, not a pointer.
        let set = unsafe {
            libc::ioctl(
                self.file.as_raw_fd(),
                TUNSETOFFLOAD,
                libc::c_ulong::from(offloads),
            )
        };
        check(set)
    }

    /// One frame with its header; `WouldBlock` when there is none.
    pub(super) fn receive(&self, frame: &mut [u8]) -> io::Result<usize> {
        io::Read::read(&mut &self.file, frame)
    }
}

impl AsRawFd for Tap {
    fn as_raw_fd(&self) -> libc::c_int {
        self.file.as_raw_fd()
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

fn attach(name: &str) -> Result<File, TapError> {
    let bad = name.is_empty()
        || name.len() >= libc::IFNAMSIZ
        || name.bytes().any(|b| b == b'/' || b == b'%');
    if bad {
        return Err(TapError::Name(name.into()));
    }
    // TUNSETIFF would create what is missing: down, without an address, and gone with us.
    // Not /sys/class/net: it shows the network namespace that it was mounted in.
    let text = CString::new(name).map_err(|_| TapError::Name(name.into()))?;
    // SAFETY: the argument is a string with a NUL at its end.
    if unsafe { libc::if_nametoindex(text.as_ptr()) } == 0 {
        return Err(TapError::Missing(name.into()));
    }
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(TUN)
        .map_err(TapError::Driver)?;
    let mut request = request(KIND);
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    // SAFETY: the argument is a valid pointer to the ifreq that the call reads and writes.
    let set = unsafe { libc::ioctl(file.as_raw_fd(), TUNSETIFF, &mut request) };
    check(set).map_err(|source| match source.raw_os_error() {
        Some(libc::EPERM) => TapError::Permission(name.into()),
        Some(libc::EBUSY) => TapError::InUse(name.into()),
        Some(libc::EINVAL) => TapError::Kind(name.into()),
        _ => TapError::Host {
            name: name.into(),
            call: "TUNSETIFF",
            source,
        },
    })?;
    Ok(file)
}

fn adopt(fd: OwnedFd) -> Result<(File, String), TapError> {
    let file = File::from(fd);
    let mut request = request(0);
    // SAFETY: the argument is a valid pointer to the ifreq that the call writes.
    let got = unsafe { libc::ioctl(file.as_raw_fd(), TUNGETIFF, &mut request) };
    check(got).map_err(|_| TapError::Fd)?;
    // SAFETY: the kernel filled in the flags, and every bit pattern is one.
    let flags = libc::c_int::from(unsafe { request.ifr_ifru.ifru_flags });
    if flags & KIND != KIND {
        return Err(TapError::Fd);
    }
    let name: String = request
        .ifr_name
        .iter()
        .take_while(|&&byte| byte != 0)
        .map(|&byte| char::from(byte as u8))
        .collect();
    let host = |source| TapError::Host {
        name: name.clone(),
        call: "fcntl",
        source,
    };
    // SAFETY: the calls take numbers only.
    let flags = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETFL) };
    check(flags).map_err(host)?;
    // SAFETY: the calls take numbers only.
    let set = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETFL, flags | libc::O_NONBLOCK) };
    check(set).map_err(host)?;
    Ok((file, name))
}

fn request(flags: libc::c_int) -> libc::ifreq {
    libc::ifreq {
        ifr_name: [0; libc::IFNAMSIZ],
        ifr_ifru: libc::__c_anonymous_ifr_ifru {
            ifru_flags: flags as libc::c_short,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_tap_is_refused_with_the_command_that_creates_it() {
        let error = Tap::open(TapSource::Name("no-such-tap0".into())).unwrap_err();
        assert_eq!(
            error.to_string(),
            "tap interface no-such-tap0 does not exist: create it with `ip tuntap add dev \
             no-such-tap0 mode tap && ip link set dev no-such-tap0 up`"
        );
    }

    #[test]
    fn what_cannot_be_an_interface_is_refused() {
        for name in ["", "a/b", "tap%d", "sixteen-bytes-xx"] {
            let error = Tap::open(TapSource::Name(name.into())).unwrap_err();
            assert!(matches!(error, TapError::Name(_)), "{error}");
        }
        let error = Tap::open(TapSource::Name("lo".into())).unwrap_err();
        assert!(!matches!(error, TapError::Missing(_)), "{error}");
    }

    #[test]
    fn a_file_descriptor_that_is_no_tap_is_refused() {
        let file = File::open("/dev/null").unwrap();
        let error = Tap::open(TapSource::Fd(file.into())).unwrap_err();
        assert!(matches!(error, TapError::Fd), "{error}");
    }
}
