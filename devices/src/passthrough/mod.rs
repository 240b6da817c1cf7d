#![doc = include_str!("README.md")]

pub mod config;
pub mod features;
mod function;
pub mod hardware;
mod host;
pub mod layout;
mod legacy;
mod line;
pub mod vfio;

pub use function::{Connections, DirectMemory, PeerMemory, VfioPci};
pub use host::{
    Admitted, Before, HostError, PassthroughHost, reserved_regions, reserved_regions_of_host,
};
pub use legacy::{Group, LegacyContainer, LegacyError};
