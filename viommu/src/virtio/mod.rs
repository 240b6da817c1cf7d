#![doc = include_str!("README.md")]
#![forbid(unsafe_code)]

mod config;
pub mod decode;
mod device;
pub mod domain;
mod engine;
mod fault;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzz;
pub mod mappings;
mod probe;
mod reply;
pub mod viot;

pub use config::{AddError, Config, ConfigError};
pub use device::{Counters, DomainSnapshot, EndpointSnapshot, Iommu, Snapshot};
pub use fault::FaultCounters;
pub use reply::{Chain, Reply, Requests};

#[cfg(test)]
mod doorbell_tests;
#[cfg(test)]
mod table_tests;
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod testing;
#[cfg(test)]
mod tests;
