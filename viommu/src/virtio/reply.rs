//! A request as the transport brings it, and what goes back into its device-writable part.

use std::marker::PhantomData;

use zerocopy::IntoBytes;

use crate::spec::virtio_iommu::{ReqTail, Status};

/// One descriptor chain.
#[derive(Clone, Copy, Debug)]
pub struct Chain<'r> {
    /// The device-readable part, or its first
    /// [`MAX_READABLE`](super::decode::MAX_READABLE) bytes.
    pub readable: &'r [u8],
    /// The length of the device-writable part in bytes, all of which can be written: a transport
    /// checks that before anything is done.
    pub writable: usize,
}

/// Requests that arrived together. A transport may fetch each when it is asked for it, all to the
/// same place.
pub trait Requests {
    /// The next one.
    fn next_chain(&mut self) -> Option<Chain<'_>>;
}

/// Requests that are all there.
pub(super) struct Fetched<'r, I>(I, PhantomData<&'r [u8]>);

impl<'r, I: Iterator<Item = Chain<'r>>> Fetched<'r, I> {
    pub(super) fn new(chains: impl IntoIterator<Item = Chain<'r>, IntoIter = I>) -> Self {
        Self(chains.into_iter(), PhantomData)
    }
}

impl<'r, I: Iterator<Item = Chain<'r>>> Requests for Fetched<'r, I> {
    fn next_chain(&mut self) -> Option<Chain<'_>> {
        self.0.next()
    }
}

/// What to write to the front of the device-writable part. Its length is the used length.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Reply {
    /// Nothing: the request could not be understood or answered.
    Nothing,
    /// The tail.
    Tail(ReqTail),
    /// For PROBE: the properties, then the tail.
    Probe(Box<[u8]>),
}

impl Reply {
    /// A tail alone.
    pub(super) fn tail(status: Status) -> Self {
        Self::Tail(tail(status))
    }

    /// `size` bytes (at least a tail's): empty properties, and the tail at their end.
    pub(super) fn probe(size: usize, status: Status) -> Self {
        let mut bytes = vec![0; size].into_boxed_slice();
        let at = size - size_of::<ReqTail>();
        bytes[at..].copy_from_slice(tail(status).as_bytes());
        Self::Probe(bytes)
    }

    /// The properties of a [`Reply::probe`].
    pub(super) fn properties_mut(&mut self) -> &mut [u8] {
        match self {
            Self::Probe(bytes) => {
                let at = bytes.len() - size_of::<ReqTail>();
                &mut bytes[..at]
            }
            _ => &mut [],
        }
    }

    /// The bytes to write.
    pub fn bytes(&self) -> &[u8] {
        match self {
            Self::Nothing => &[],
            Self::Tail(tail) => tail.as_bytes(),
            Self::Probe(bytes) => bytes,
        }
    }

    /// The status that the guest gets.
    pub fn status(&self) -> Option<u8> {
        let bytes = self.bytes();
        bytes
            .len()
            .checked_sub(size_of::<ReqTail>())
            .map(|at| bytes[at])
    }
}

fn tail(status: Status) -> ReqTail {
    ReqTail {
        status: status as u8,
        reserved: [0; 3],
    }
}
