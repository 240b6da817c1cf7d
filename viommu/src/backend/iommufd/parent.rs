//! The parent of nested tables: it exists for a device only with the device's doorbell and reserved
//! regions enforced.
#![forbid(unsafe_code)]

use std::sync::Arc;

use super::admission::Unfit;
use super::hwinfo::HwModel;
use super::object::Hwpt;
use crate::Rid;
use crate::doorbell::Doorbell;

/// A table over guest memory that a device was attached to, so that the kernel has put the
/// device's doorbell and reserved regions into it, and found them in order.
///
/// Whatever else the device is attached to later is made from this: kernels up to 6.12 do none of
/// that work when a device goes straight to a nested table. There is no other way to one, and so no
/// nested table without a doorbell below it.
pub(super) struct Parent {
    table: Arc<Hwpt>,
}

impl Parent {
    /// `table`, which `endpoint` is attached to now and which leaves `usable` (inclusive ranges,
    /// ascending) to be mapped.
    ///
    /// # Errors
    /// The doorbell is among them: a mapping there would take the device's interrupts.
    pub(super) fn enforced(
        table: Arc<Hwpt>,
        endpoint: Rid,
        model: &HwModel,
        usable: &[(u64, u64)],
    ) -> Result<Self, Unfit> {
        // Other models are test devices without interrupts.
        let doorbell = match model {
            HwModel::Vtd(_) => Doorbell::Intercepted.region(),
            HwModel::Other(_) => return Ok(Self { table }),
        };
        let open = |&(first, last): &(u64, u64)| doorbell.overlaps(first, last);
        if usable.iter().any(open) {
            return Err(Unfit::Doorbell { endpoint, doorbell });
        }
        Ok(Self { table })
    }

    /// The table: what Identity is, and what nested tables are over.
    pub(super) fn table(&self) -> &Arc<Hwpt> {
        &self.table
    }
}
