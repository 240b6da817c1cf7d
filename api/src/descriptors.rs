//! Descriptors that come over a Unix socket together with bytes (SCM_RIGHTS).

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::{Arc, Mutex, PoisonError};

use vmm_sys_util::sock_ctrl_msg::ScmSocket;

/// How many one connection may hold, and one message may carry.
pub(crate) const MOST: usize = 4;

/// Those of one connection that no request has taken yet.
#[derive(Clone, Debug, Default)]
pub(crate) struct Received(Arc<Mutex<Vec<OwnedFd>>>);

impl Received {
    /// All of them, in the order in which they were sent.
    pub(crate) fn take(&self) -> Vec<OwnedFd> {
        std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Receives bytes into `buffer`, and keeps the descriptors that come with them.
    ///
    /// # Errors
    /// What the socket says; `ENOBUFS` when there are more descriptors than [`MOST`], of which
    /// none is kept then.
    pub(crate) fn receive(&self, socket: &impl AsRawFd, buffer: &mut [u8]) -> io::Result<usize> {
        let mut numbers: [RawFd; MOST] = [-1; MOST];
        let mut parts = [libc::iovec {
            iov_base: buffer.as_mut_ptr().cast(),
            iov_len: buffer.len(),
        }];
        let socket = Socket(socket.as_raw_fd());
        // SAFETY: the one part is `buffer`, which is borrowed for the call.
        let received = unsafe { socket.recv_with_fds(&mut parts, &mut numbers) };
        let (bytes, count) = received.map_err(|why| io::Error::from_raw_os_error(why.errno()))?;
        let numbers = numbers.iter().take(count);
        // SAFETY: the kernel has just made these descriptors for us, so nobody else owns them.
        let new = numbers.map(|fd| unsafe { OwnedFd::from_raw_fd(*fd) });
        let mut held = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        held.extend(new);
        if held.len() > MOST {
            held.clear();
            return Err(io::Error::from_raw_os_error(libc::ENOBUFS));
        }
        Ok(bytes)
    }
}

/// Sends `bytes` with `descriptors`; the number of bytes that were taken.
///
/// # Errors
/// What the socket says.
pub(crate) fn send(
    socket: &impl AsRawFd,
    bytes: &[u8],
    descriptors: &[OwnedFd],
) -> io::Result<usize> {
    let numbers: Vec<RawFd> = descriptors.iter().map(AsRawFd::as_raw_fd).collect();
    Socket(socket.as_raw_fd())
        .send_with_fds(&[bytes], &numbers)
        .map_err(|why| io::Error::from_raw_os_error(why.errno()))
}

/// A socket that is open for as long as it is borrowed here.
struct Socket(RawFd);

impl ScmSocket for Socket {
    fn socket_fd(&self) -> RawFd {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn descriptors_arrive_in_order_and_once() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (read, write) = io::pipe().unwrap();
        let sent = [OwnedFd::from(read), OwnedFd::from(write)];
        assert_eq!(send(&theirs, b"hello", &sent).unwrap(), 5);
        drop(sent);
        (&theirs).write_all(b" world").unwrap();
        let received = Received::default();
        let mut buffer = [0; 64];
        let first = received.receive(&ours, &mut buffer).unwrap();
        let second = received.receive(&ours, &mut buffer[first..]).unwrap();
        assert_eq!(&buffer[..first + second], b"hello world");
        let mut both = received.take().into_iter().map(File::from);
        let (mut read, mut write) = (both.next().unwrap(), both.next().unwrap());
        write.write_all(b"x").unwrap();
        drop(write);
        let mut text = String::new();
        read.read_to_string(&mut text).unwrap();
        assert_eq!(text, "x");
        assert!(received.take().is_empty());
    }

    #[test]
    fn too_many_are_all_closed_at_once_or_one_by_one() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let received = Received::default();
        let mut buffer = [0; 8];
        let (mut end, writer) = io::pipe().unwrap();
        let held: Vec<OwnedFd> = (0..=MOST)
            .map(|_| writer.try_clone().unwrap().into())
            .collect();
        send(&theirs, b"x", &held).unwrap();
        let refused = received.receive(&ours, &mut buffer).unwrap_err();
        assert_eq!(refused.raw_os_error(), Some(libc::ENOBUFS));
        for n in 0..=MOST {
            send(&theirs, b"x", &held[..1]).unwrap();
            let result = received.receive(&ours, &mut buffer);
            assert_eq!(result.is_ok(), n < MOST);
        }
        assert!(received.take().is_empty());
        // Nobody has one any more but this test: without its own, the pipe ends.
        drop((held, writer));
        assert_eq!(end.read(&mut buffer).unwrap(), 0);
    }
}
