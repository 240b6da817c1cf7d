#![doc = include_str!("README.md")]

pub mod config;
mod function;
pub mod layout;
mod legacy;
mod line;
pub mod vfio;

pub use function::{Connections, DirectMemory, PeerMemory, VfioPci};
pub use legacy::{LegacyContainer, LegacyError};
