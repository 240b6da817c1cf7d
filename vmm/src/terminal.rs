//! The terminal nestling was started from: raw while a guest uses it, and restored whatever
//! happens.
//!
//! In raw mode every key goes to the guest, Ctrl-C too. Ctrl-A x ends nestling, Ctrl-A Ctrl-A
//! sends one Ctrl-A.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// What to restore, where the panic hook finds it.
static SAVED: Mutex<Option<libc::termios>> = Mutex::new(None);

fn saved() -> MutexGuard<'static, Option<libc::termios>> {
    SAVED.lock().unwrap_or_else(PoisonError::into_inner)
}

fn stdin() -> BorrowedFd<'static> {
    // SAFETY: file descriptor 0 is open for the life of the process (Rust's runtime opens
    // /dev/null there if nothing is).
    unsafe { BorrowedFd::borrow_raw(libc::STDIN_FILENO) }
}

/// Keeps the terminal raw; it is restored when this is dropped, and on a panic.
#[derive(Debug)]
pub struct RawMode(());

impl RawMode {
    /// Makes the terminal at standard input raw; `None` if there is none, or if it is raw
    /// already.
    ///
    /// # Errors
    /// The terminal refuses.
    pub fn enter() -> io::Result<Option<Self>> {
        let fd = stdin().as_raw_fd();
        // SAFETY: isatty only looks at the descriptor.
        if unsafe { libc::isatty(fd) } != 1 {
            return Ok(None);
        }
        let mut slot = saved();
        if slot.is_some() {
            return Ok(None);
        }
        // SAFETY: termios is a plain C struct for which all zeroes is a value.
        let mut before: libc::termios = unsafe { std::mem::zeroed() };
        // SAFETY: `before` is a writable termios.
        if unsafe { libc::tcgetattr(fd, &raw mut before) } != 0 {
            return Err(io::Error::last_os_error());
        }
        let mut raw = before;
        // SAFETY: `raw` is an initialized termios.
        unsafe { libc::cfmakeraw(&raw mut raw) };
        // Output keeps its newlines: nestling's own messages go there, too.
        raw.c_oflag = before.c_oflag;
        set(fd, &raw)?;
        *slot = Some(before);
        drop(slot);
        restore_on_panic();
        Ok(Some(Self(())))
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        restore();
    }
}

/// Restores the terminal if it is raw.
pub fn restore() {
    if let Some(before) = saved().take() {
        // Nothing can be done about a terminal that is gone.
        let _ = set(stdin().as_raw_fd(), &before);
    }
}

fn set(fd: i32, mode: &libc::termios) -> io::Result<()> {
    // SAFETY: `mode` is an initialized termios.
    match unsafe { libc::tcsetattr(fd, libc::TCSANOW, mode) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Where a panic aborts, nothing is dropped.
fn restore_on_panic() {
    static ONCE: std::sync::Once = std::sync::Once::new();
    ONCE.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            restore();
            before(info);
        }));
    });
}

/// Finds the escape sequences in what is typed.
#[derive(Debug, Default)]
pub struct Escape {
    armed: bool,
}

impl Escape {
    const CTRL_A: u8 = 1;

    /// Takes the escape sequences out of `typed`; the result is what goes to the guest, and
    /// whether the user wants to end.
    pub fn filter(&mut self, typed: &[u8]) -> (Vec<u8>, bool) {
        let mut through = Vec::with_capacity(typed.len());
        for &byte in typed {
            match (std::mem::take(&mut self.armed), byte) {
                (false, Self::CTRL_A) => self.armed = true,
                (true, b'x') => return (through, true),
                (true, Self::CTRL_A) | (false, _) => through.push(byte),
                (true, other) => through.extend([Self::CTRL_A, other]),
            }
        }
        (through, false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_goes_to_the_guest_but_the_escape_sequences() {
        let mut escape = Escape::default();
        assert_eq!(escape.filter(b"ls\r\x03"), (b"ls\r\x03".to_vec(), false));
        assert_eq!(escape.filter(b"\x01"), (vec![], false));
        assert_eq!(escape.filter(b"\x01a"), (b"\x01a".to_vec(), false));
        assert_eq!(escape.filter(b"\x01q"), (b"\x01q".to_vec(), false));
        assert_eq!(escape.filter(b"a\x01xb"), (b"a".to_vec(), true));
    }
}
