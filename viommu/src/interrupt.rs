//! Message-signalled interrupts, as a unit sends them and as it remaps those of its endpoints.

use serde::Serialize;

/// One message-signalled interrupt: a write of `data` to `address` (PCIe 6.0, 6.1.4).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Hash, Serialize)]
pub struct Msi {
    /// The doorbell, in bytes. On x86 0xfee0_0000 to 0xfeef_ffff in the low half; the high half
    /// carries destination bits 31:8 for interrupts that a VT-d unit itself sends.
    pub address: u64,
    /// What is written there.
    pub data: u32,
}

/// Delivers the interrupts that a unit sends for itself (fault events, page request events,
/// invalidation completion). They are never remapped (VT-d 5.1.6).
///
/// Called on vCPU threads and device threads, with unit locks held: an implementation must not
/// call back into the unit and must not block.
pub trait MsiSink: Send + Sync {
    /// Delivers `msi` once. Losing it is allowed only where real hardware would lose it (no such
    /// APIC).
    fn send(&self, msi: Msi);
}

/// Takes the interrupt messages that an endpoint sends as DMA writes: requests without PASID to
/// 0xfee0_0000-0xfeef_ffff, which never reach memory (VT-d 3.14). The front end of the endpoint
/// remaps them, whatever the endpoint's translation is.
pub trait MessageSink: Send + Sync {
    /// `endpoint` wrote `msi.data` to `msi.address`. Called on device threads with no lock of the
    /// back end held.
    fn message(&self, endpoint: crate::Rid, msi: Msi);

    /// Where the messages of `endpoint` lead may have changed: only told of one whose doorbell is
    /// mapped. Called before the call that made the change returns, with no lock of the back end
    /// held, but perhaps with the front end's.
    fn moved(&self, _endpoint: crate::Rid) {}
}
