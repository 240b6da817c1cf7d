//! `init kexec KERNEL INITRAMFS WORDS…`: replaces the running kernel by another one, with a command
//! line of these words, and no firmware between them.

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

/// `LINUX_REBOOT_CMD_KEXEC` of `linux/reboot.h`.
const REBOOT_KEXEC: libc::c_int = 0x4558_4543;

/// Loads the kernel and goes. Devices are shut down as for a reboot.
///
/// # Errors
/// A file cannot be opened, or the kernel refused; else this does not return.
pub(crate) fn go(kernel: &str, initramfs: &str, words: &[String]) -> io::Result<()> {
    let (kernel, initramfs) = (File::open(kernel)?, File::open(initramfs)?);
    let line = CString::new(words.join(" "))?;
    // SAFETY: both descriptors are open, and the length is the string's with its NUL.
    let loaded = unsafe {
        libc::syscall(
            libc::SYS_kexec_file_load,
            kernel.as_raw_fd(),
            initramfs.as_raw_fd(),
            line.as_bytes_with_nul().len(),
            line.as_ptr(),
            0,
        )
    };
    if loaded != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: takes numbers only.
    unsafe { libc::reboot(REBOOT_KEXEC) };
    Err(io::Error::last_os_error())
}
