//! The seam to interrupt remapping: the unit owns IRTA, IRE, CFI and the interrupt entry cache
//! invalidation of its queue; who owns the interrupt routes makes them true.

use crate::Gpa;

/// Where a unit's interrupt remapping table is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RemappingTable {
    /// Its first entry.
    pub base: Gpa,
    /// How many entries it has: 2 to 65536, a power of two.
    pub entries: u32,
    /// Extended interrupt mode: destinations have 32 bits.
    pub extended: bool,
}

/// What the guest set.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Remapping {
    /// The table that interrupts are remapped through; `None`: they pass unchanged.
    pub table: Option<RemappingTable>,
    /// With a table: interrupts in compatibility format pass unchanged rather than be blocked.
    pub compatibility: bool,
}

/// Owns the interrupt routes of a unit's endpoints.
///
/// Called on vCPU threads with the unit's command lock held: an implementation may call
/// [`Unit::interrupt_fault`](super::Unit::interrupt_fault) but nothing else of the unit.
pub trait InterruptRemapper: Send + Sync {
    /// Every route follows `remapping` when this returns.
    fn update(&self, remapping: Remapping);

    /// Routes through these entries (`None`: all; else first indexes and how many from each on)
    /// follow the table as it is now, when this returns. What one run of the queue names comes in
    /// one call, since changing routes may cost the same for one as for many.
    fn invalidate(&self, entries: Option<&[(u16, u32)]>);
}
