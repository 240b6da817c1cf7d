//! What a unit is doing, as a value for `vm.viommu`.

use serde::Serialize;

use super::capabilities::Mode;
use super::fault::Recorded;
use super::invalidate::QueueCounts;
use super::targets::{TargetCounts, TargetState};
use crate::{Gpa, Rid};

/// The live state of a unit.
#[derive(Clone, PartialEq, Debug, Serialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct UnitState {
    /// Its name.
    pub id: String,
    /// Its mode.
    pub mode: Mode,
    /// Whether the guest may have seen what is offered, so that it no longer changes.
    pub frozen: bool,
    /// Bits of DMA address.
    pub address_width: u8,
    /// Bits of PASID.
    pub pasid_bits: u8,
    /// Capability Register.
    pub cap: u64,
    /// Extended Capability Register.
    pub ecap: u64,
    /// Global Status Register.
    pub gsts: u32,
    /// Fault Status Register.
    pub fsts: u32,
    /// The root table, once the guest has set one.
    pub root_table: Option<Gpa>,
    /// Whether that is a scalable-mode one.
    pub scalable_tables: bool,
    /// Endpoints.
    pub endpoints: Vec<EndpointState>,
    /// What is in force for them, at most 1024; what is not named is Blocked.
    pub targets: Vec<TargetState>,
    /// How many there are.
    pub live_targets: usize,
    /// Descriptors.
    pub queue: QueueCounts,
    /// What was asked of back ends.
    pub back_end: TargetCounts,
    /// Page requests that reached the guest's queue.
    pub page_requests: u64,
    /// Those that did not: overflow, or too many without an answer.
    pub page_requests_refused: u64,
    /// Privileged ones, which are answered Invalid.
    pub privileged_page_requests: u64,
    /// Faults that the guest could read.
    pub faults_recorded: u64,
    /// Faults for which there was no room.
    pub faults_lost: u64,
    /// The last faults, oldest first.
    pub last_faults: Vec<Recorded>,
}

/// An endpoint.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct EndpointState {
    /// Its name on the bus.
    pub endpoint: Rid,
    /// Page request groups that are not complete or not answered.
    pub page_requests_waiting: usize,
}
