//! A child process that is a copy of this one.

use anyhow::{Context, Result, ensure};

/// A child, to be waited for.
#[derive(Debug)]
pub(crate) struct Child(libc::pid_t);

/// Forks. The child runs `work` and ends; its status says whether that succeeded.
///
/// # Errors
/// What the kernel said.
pub(crate) fn fork(work: impl FnOnce() -> Result<()>) -> Result<Child> {
    // SAFETY: this program has one thread, so the child has all of what it needs.
    match unsafe { libc::fork() } {
        -1 => Err(std::io::Error::last_os_error()).context("fork"),
        0 => {
            let result = work();
            if let Err(error) = &result {
                eprintln!("dma-engine, in a forked child: {error:#}");
            }
            std::process::exit(result.is_err().into())
        }
        child => Ok(Child(child)),
    }
}

impl Child {
    /// Waits for its end.
    ///
    /// # Errors
    /// Its work failed.
    pub(crate) fn wait(self) -> Result<()> {
        let mut status = 0;
        // SAFETY: the child is ours and was not waited for; `status` is a place for one number.
        let waited = unsafe { libc::waitpid(self.0, &mut status, 0) };
        ensure!(
            waited == self.0,
            "waitpid: {}",
            std::io::Error::last_os_error()
        );
        ensure!(status == 0, "a forked child failed (status {status:#x})");
        Ok(())
    }
}
