//! Threads: each has a name, and does first what the embedder wants it to (a system call filter).

#![forbid(unsafe_code)]

use std::io;
use std::sync::OnceLock;
use std::thread::{Builder, JoinHandle};

/// Called with the name.
pub type First = fn(&str);

static FIRST: OnceLock<First> = OnceLock::new();

/// Lets every thread that is started from now on call `first`, before anything else. Only the first
/// call counts.
pub fn before_each(first: First) {
    // Set already: the process has one such rule.
    let _ = FIRST.set(first);
}

/// What a thread does first that is not started by [`spawn`] (a scoped one).
pub fn begin(name: &str) {
    if let Some(first) = FIRST.get() {
        first(name);
    }
}

/// Starts a thread of this name, which is cut to the 15 bytes that the kernel shows.
///
/// # Errors
/// The host has no room for another one.
pub fn spawn<T: Send + 'static>(
    name: &str,
    body: impl FnOnce() -> T + Send + 'static,
) -> io::Result<JoinHandle<T>> {
    let name: String = name
        .chars()
        .filter(char::is_ascii_graphic)
        .take(15)
        .collect();
    Builder::new().name(name.clone()).spawn(move || {
        begin(&name);
        body()
    })
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    #[test]
    fn a_thread_does_first_what_its_embedder_wants() {
        static BEGUN: Mutex<Vec<String>> = Mutex::new(Vec::new());
        before_each(|name| {
            let mut begun = BEGUN
                .lock()
                .unwrap_or_else(std::sync::PoisonError::into_inner);
            begun.push(name.to_owned());
        });
        let begun = spawn("one of a long name", || BEGUN.lock().unwrap().clone());
        let begun = begun.unwrap().join().unwrap();
        assert!(
            begun.iter().any(|name| name == "oneofalongname"),
            "{begun:?}"
        );
    }
}
