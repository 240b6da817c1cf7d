//! A tap interface of the host, which ends with the value.

use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;
use std::process::Command;

use anyhow::{Context, Result, bail};

// linux/if_tun.h
const TUNSETIFF: libc::Ioctl = 0x4004_54ca;
const TUNSETPERSIST: libc::Ioctl = 0x4004_54cb;
const IFF_TAP: i16 = 0x0002;
const IFF_NO_PI: i16 = 0x1000;
const IFF_VNET_HDR: i16 = 0x4000;

/// A tap interface that is up and has an address.
#[derive(Debug)]
pub struct Tap {
    name: String,
}

impl Tap {
    /// Makes it, with an address such as `192.168.77.1/24`.
    ///
    /// # Errors
    /// This user may not, or the kernel has no tap.
    pub fn new(name: &str, address: &str) -> Result<Self> {
        let file = attach(name)?;
        persist(&file, true)?;
        let tap = Self {
            name: name.to_owned(),
        };
        for command in [
            format!("ip addr add {address} dev {name}"),
            format!("ip link set {name} up"),
        ] {
            let output = Command::new("sh").args(["-c", &command]).output()?;
            if !output.status.success() {
                bail!("{command}: {}", String::from_utf8_lossy(&output.stderr));
            }
        }
        Ok(tap)
    }

    /// The interface's name.
    pub fn name(&self) -> &str {
        &self.name
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        let _ = attach(&self.name).and_then(|file| persist(&file, false));
    }
}

fn attach(name: &str) -> Result<File> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/net/tun")
        .context("cannot open /dev/net/tun; be root or make the tap beforehand")?;
    // struct ifreq: 16 bytes of name, then a union that starts with the flags; 40 bytes in all.
    let mut request = [0u8; 40];
    request[..name.len().min(15)].copy_from_slice(&name.as_bytes()[..name.len().min(15)]);
    request[16..18].copy_from_slice(&(IFF_TAP | IFF_NO_PI | IFF_VNET_HDR).to_ne_bytes());
    // SAFETY: the descriptor is open and the buffer has the size of struct ifreq.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), TUNSETIFF, request.as_mut_ptr()) };
    if result < 0 {
        return Err(std::io::Error::last_os_error()).with_context(|| format!("TUNSETIFF {name}"));
    }
    Ok(file)
}

fn persist(file: &File, keep: bool) -> Result<()> {
    // SAFETY: the descriptor is open; this request takes a number.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), TUNSETPERSIST, libc::c_int::from(keep)) };
    if result < 0 {
        return Err(std::io::Error::last_os_error()).context("TUNSETPERSIST");
    }
    Ok(())
}
