//! The waist: one contract between front ends and back ends.
//!
//! A *front end* ([`crate::vtd`], [`crate::virtio`]) decodes what the guest asked for into one
//! small [`Translation`] per [`Target`]; a *back end* ([`software`], [`iommufd`]) makes it true.
//! Nothing else crosses. What every back end promises, and the `conformance` suite checks:
//!
//! 1. **Fail closed.** A target is [`Translation::Blocked`] from the moment its endpoint is
//!    claimed. If [`Backend::apply`] fails the target *is* Blocked when the call returns, whatever
//!    it was before: never the old translation, never a wider one.
//! 2. **Done means done.** When `apply`, [`Backend::invalidate`] or [`Backend::unmap`] returns, no
//!    DMA that started under what was removed is still in flight.
//! 3. **Bounded.** The time of a call depends on what is passed to it and on what exists, never on
//!    a value the guest wrote.
//! 4. **Nothing left behind.** After [`Backend::release`] the back end holds nothing for the
//!    endpoint: [`Backend::objects`] is what it was before the claim.
//!
//! Locks: a back end calls an [`EventSink`] with none of its own locks held, so a front end may
//! take its lock there and call the back end again; and a front end may call the back end with
//! its own lock held. A front end's `EventSink` must therefore not be called from inside `apply`,
//! `invalidate`, `map`, `unmap` or `release` on the calling thread.

#[cfg(any(test, feature = "conformance"))]
pub mod conformance;
pub mod iommufd;
pub mod software;

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::doorbell::Doorbell;
use crate::{DomainId, Gpa, HwptId, Iova, Rid, Target};

/// What translates the DMA of one [`Target`].
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default, Serialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub enum Translation {
    /// No DMA passes; each attempt is a fault.
    #[default]
    Blocked,
    /// IOVA = GPA: all guest RAM, and nothing else.
    Identity,
    /// A guest's stage-1 table (VT-d: first-stage); its output is GPA.
    Stage1(Stage1),
    /// A guest's stage-2 table (VT-d: second-stage) used alone; its output is GPA.
    ///
    /// A back end whose hardware cannot run it mirrors it into a domain of its own, refreshed by
    /// each invalidation.
    Stage2(Stage2),
    /// A guest hypervisor's nesting: `stage1`, whose tables and output are addresses that
    /// `stage2` translates to GPA.
    Nested {
        /// The inner table.
        stage1: Stage1,
        /// The outer table.
        stage2: Stage2,
    },
    /// Mappings that the front end keeps, given by [`Backend::map`].
    Domain(DomainId),
}

/// A guest's stage-1 (first-stage) table in VT-d's format, which is x86-64's (VT-d 9.8).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct Stage1 {
    /// The 4 KiB-aligned root table.
    pub root: Gpa,
    /// Input width in bits: 48 (4 levels) or 57 (5 levels). Input addresses are canonical.
    pub width: u8,
    /// Supervisor Request Enable: privileged requests are served (VT-d 9.6, PASID entry).
    pub sre: bool,
    /// Write Protect Enable: supervisor writes honour R/W.
    pub wpe: bool,
    /// Extended Accessed Flag Enable.
    pub eafe: bool,
    /// Instruction fetches are served (VT-d ECAP.ERS).
    pub ere: bool,
    /// Page-walk Snoop: accessed and dirty flags can be set. Without it a walk that has to set one
    /// is a fault (VT-d table 30, SFS.9). Hardware may always have it.
    pub pwsnp: bool,
    /// Leaves may be pages of 1 GiB (VT-d CAP.FS1GP). Hardware may always have it.
    pub fs1gp: bool,
}

/// A guest's stage-2 (second-stage) table in VT-d's format (VT-d 9.7, 9.10).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct Stage2 {
    /// The 4 KiB-aligned root table.
    pub root: Gpa,
    /// Input width in bits: 39, 48 or 57 (3, 4 or 5 levels).
    pub width: u8,
    /// Second Stage Access/Dirty Enable.
    pub ad: bool,
}

/// What a mapping or an access may do.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default, Serialize, Deserialize)]
pub struct Access {
    /// Reads pass.
    pub read: bool,
    /// Writes pass.
    pub write: bool,
}

impl Access {
    /// Reads only.
    pub const READ: Self = Self {
        read: true,
        write: false,
    };
    /// Writes only.
    pub const WRITE: Self = Self {
        read: false,
        write: true,
    };
    /// Both.
    pub const READ_WRITE: Self = Self {
        read: true,
        write: true,
    };

    /// Whether everything in `wanted` is allowed by `self`.
    pub const fn allows(self, wanted: Self) -> bool {
        (self.read || !wanted.read) && (self.write || !wanted.write)
    }
}

/// One mapping of a domain.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize)]
pub struct Mapping {
    /// First IOVA, a multiple of the page size.
    pub iova: Iova,
    /// What it maps to.
    pub gpa: Gpa,
    /// Length in bytes, not 0, a multiple of the page size; neither side wraps.
    pub length: u64,
    /// What may be done through it.
    pub access: Access,
    /// The target is MMIO of another device, not RAM.
    pub mmio: bool,
}

/// Cached translations to forget.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Invalidation {
    /// Whose.
    pub scope: Scope,
    /// Which of them.
    pub range: InvalidationRange,
}

/// Whose cached translations an [`Invalidation`] means.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Scope {
    /// Every target that has the same front end as the caller, and more if that is cheaper.
    All,
    /// Every target of one endpoint.
    Endpoint(Rid),
    /// One target.
    Target(Target),
}

/// Which addresses an [`Invalidation`] means.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum InvalidationRange {
    /// All of them, and cached paging structures.
    All,
    /// `count` 4 KiB pages from `first`, which is 4 KiB-aligned; with `leaf` only leaf entries
    /// changed, so paging structures may stay cached. The addresses are those that the endpoint
    /// sends; a change in the outer table of [`Translation::Nested`] is [`All`](Self::All).
    Pages {
        /// First address.
        first: Iova,
        /// How many pages of 4096 bytes; more than the address space has means "to its end".
        count: u64,
        /// VT-d's Invalidation Hint.
        leaf: bool,
    },
}

/// Why a back end did not do what it was asked.
///
/// One sentence each: the thing, the value, the remedy.
#[derive(Debug, thiserror::Error)]
pub enum Refused {
    /// The endpoint is not known here, or not claimed.
    #[error("endpoint {0} is not claimed here; add the device to the unit first")]
    NoEndpoint(Rid),
    /// The endpoint already has a front end.
    #[error("endpoint {0} is already behind another vIOMMU; remove it there first")]
    Claimed(Rid),
    /// The host's IOMMU cannot keep two of its devices apart.
    #[error(
        "devices {endpoint} and {other} are in one IOMMU group of the host, which translates for both alike; put neither behind a vIOMMU, or give the VM one of them"
    )]
    SharesGroup {
        /// What was to be claimed.
        endpoint: Rid,
        /// A device of its group, also here.
        other: Rid,
    },
    /// The domain does not exist.
    #[error("domain {} does not exist here", .0.0)]
    NoDomain(DomainId),
    /// This back end never offered it.
    #[error(
        "{what} = {value} was never offered by this back end ({limit}); compose capabilities before offering it"
    )]
    NotOffered {
        /// The field, by its specification's name.
        what: &'static str,
        /// What was asked for.
        value: u64,
        /// What there is.
        limit: String,
    },
    /// The mapping overlaps one that exists.
    #[error("IOVA {iova} (+{length:#x}) is already mapped; unmap it first")]
    Overlap {
        /// First address asked for.
        iova: Iova,
        /// Length in bytes.
        length: u64,
    },
    /// The mapping's target is not RAM or device memory of this guest.
    #[error("guest-physical {gpa} (+{length:#x}) is not mappable memory of this guest")]
    NotMemory {
        /// First address.
        gpa: Gpa,
        /// Length in bytes.
        length: u64,
    },
    /// A limit on entries or memory was reached.
    #[error("no room for another {what}: the limit is {limit}")]
    NoRoom {
        /// What there are too many of.
        what: &'static str,
        /// How many are allowed.
        limit: u64,
    },
    /// Some mappings were added before one was refused, and could not be removed again.
    #[error("domain {} has mappings that were refused and cannot be removed; destroy it", .domain.0)]
    Torn {
        /// Which domain.
        domain: DomainId,
        /// Why they stay.
        #[source]
        source: std::io::Error,
    },
    /// The host kernel refused.
    #[error("{call} on {object} failed; see the kernel's log of the host")]
    Host {
        /// The call, by the kernel's name.
        call: &'static str,
        /// On which object.
        object: String,
        /// What the kernel said.
        #[source]
        source: std::io::Error,
    },
}

/// Why one DMA access failed, as far as a back end can know. The front end turns it into its own
/// fault reason.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum FaultCause {
    /// The target is Blocked, or nothing was ever applied to it.
    Blocked,
    /// Not canonical, or above the input width.
    AddressWidth,
    /// A first-stage entry names an address above the input width of the second stage.
    BeyondSecondStage,
    /// An entry of the stage that is named was not present or did not permit the access.
    NotMapped {
        /// Which stage's table.
        stage: Stage,
        /// The level of the entry: 1 is the leaf of 4 KiB pages.
        level: u8,
    },
    /// A request without privilege met a first-stage entry that is for privileged ones.
    SupervisorPage,
    /// An entry was present but did not permit the access.
    Permission {
        /// Which stage's table.
        stage: Stage,
        /// Whether the request was privileged.
        privileged: bool,
    },
    /// A table entry has a reserved bit set.
    Reserved {
        /// Which stage's table.
        stage: Stage,
        /// The level of the entry.
        level: u8,
    },
    /// A table lies where there is no RAM.
    TableAccess {
        /// Which stage's table.
        stage: Stage,
        /// The level of the table.
        level: u8,
    },
    /// The translation's output is not memory of this guest.
    OutsideMemory,
    /// A privileged request where supervisor requests are not enabled.
    Supervisor,
    /// An instruction fetch where execute requests are not served.
    ExecuteDisabled,
    /// An accessed or dirty flag of a first-stage entry had to be set where walks do not snoop.
    UpdateNotSnooped,
    /// The address hits the interrupt range 0xfee0_0000 to 0xfeef_ffff with a request that is
    /// not an interrupt message.
    NotAMessage,
    /// A table maps to the interrupt range.
    InterruptRange,
    /// An interrupt message does not lead to the doorbell, which is mapped and begins at this
    /// guest-physical address: the guest has to map it to itself.
    Doorbell(Gpa),
    /// The mapping was there but the domain forbids the access.
    DomainAccess,
    /// Nothing is mapped there in the domain.
    DomainUnmapped,
}

/// The stage of a translation.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Stage {
    /// First-stage.
    First,
    /// Second-stage, for the final address.
    Second,
    /// Second-stage, for the address of the first-stage root table.
    SecondForRoot,
    /// Second-stage, for the address of another first-stage table.
    SecondForTable,
    /// Second-stage, to set a flag in a first-stage table.
    SecondForUpdate,
}

/// One DMA access that did not pass.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize)]
pub struct Fault {
    /// Whose access.
    pub target: Target,
    /// At which address.
    pub iova: Iova,
    /// What was tried.
    pub access: Access,
    /// An instruction fetch.
    pub execute: bool,
    /// A privileged request.
    pub privileged: bool,
    /// Why it failed.
    pub cause: FaultCause,
}

/// A device's wish for a page (PCIe 6.0, 10.4).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize)]
pub struct PageRequest {
    /// Who asks.
    pub target: Target,
    /// Page Request Group Index, 9 bits.
    pub group: u16,
    /// Whether this is the last of its group: only then is there a response.
    pub last: bool,
    /// For which page.
    pub iova: Iova,
    /// For which access.
    pub access: Access,
    /// For execution.
    pub execute: bool,
    /// For privileged mode.
    pub privileged: bool,
}

/// The answer to a page request group; there is exactly one per group.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize)]
pub struct PageResponse {
    /// Who asked.
    pub target: Target,
    /// Page Request Group Index.
    pub group: u16,
    /// What to do.
    pub code: ResponseCode,
}

/// What a page response says (PCIe 6.0, table 10-7).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum ResponseCode {
    /// The pages are there: try again.
    Success,
    /// They will never be there.
    Invalid,
    /// Catastrophic: stop asking.
    Failure,
}

/// Where a back end reports what endpoints did. Implemented by front ends.
///
/// Called on device threads and on a back end's own threads, with no lock of the back end held.
/// An event that raced with a [`release`](Backend::release) may still arrive after it.
pub trait EventSink: Send + Sync {
    /// An access did not pass. Reported once, when the piece of DMA work it belongs to has ended,
    /// so that the sink may take a lock that is held across an invalidation.
    fn fault(&self, fault: Fault);

    /// An endpoint sends a translation request (ATS) for `iova`: whether it may get a translation
    /// or, from what is in force, the answer that there is none. If not, its request is not
    /// supported and the front end has told the guest as much as it wants to know. Called before
    /// the piece of DMA work that the translation is for.
    fn translation_request(&self, target: Target, iova: Iova) -> bool;

    /// An endpoint asks for a page. The sink owes the back end one
    /// [`respond`](Backend::respond) per group, whatever happens to the guest.
    fn page_request(&self, request: PageRequest);
}

/// What one back end can do for the endpoints it has, to be composed by AND over all of them
/// (promise 4 of [this crate](crate)). Widths are in bits.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
pub struct Capabilities {
    /// First-stage tables can be run (as stage-1 over guest memory).
    pub stage1: bool,
    /// 5-level first-stage tables (VT-d FL5LP).
    pub stage1_57: bool,
    /// 1 GiB first-stage leaves (VT-d FL1GP).
    pub stage1_1g: bool,
    /// Supervisor requests (VT-d SRS).
    pub sre: bool,
    /// Extended accessed flags (VT-d EAFS).
    pub eafe: bool,
    /// Second-stage tables of 3, 4 and 5 levels can be run or mirrored.
    pub stage2: [bool; 3],
    /// A guest's own nesting can be run.
    pub nested: bool,
    /// Bits of PASID; 0: requests with PASID are not translated.
    pub pasid_bits: u8,
    /// Page requests reach [`EventSink::page_request`].
    pub page_requests: bool,
    /// The widest address (bits) that every endpoint and IOMMU here can use: MGAW.
    pub address_width: u8,
    /// Page sizes a domain's mappings may have, as a bit per size in bytes.
    pub page_sizes: u64,
    /// Snoop control (VT-d SC).
    pub snoop_control: bool,
}

impl Capabilities {
    /// What offers the guest nothing.
    pub const NOTHING: Self = Self {
        stage1: false,
        stage1_57: false,
        stage1_1g: false,
        sre: false,
        eafe: false,
        stage2: [false; 3],
        nested: false,
        pasid_bits: 0,
        page_requests: false,
        address_width: 0,
        page_sizes: 0,
        snoop_control: false,
    };

    /// What both can do.
    pub fn and(self, other: Self) -> Self {
        Self {
            stage1: self.stage1 && other.stage1,
            stage1_57: self.stage1_57 && other.stage1_57,
            stage1_1g: self.stage1_1g && other.stage1_1g,
            sre: self.sre && other.sre,
            eafe: self.eafe && other.eafe,
            stage2: std::array::from_fn(|i| self.stage2[i] && other.stage2[i]),
            nested: self.nested && other.nested,
            pasid_bits: self.pasid_bits.min(other.pasid_bits),
            page_requests: self.page_requests && other.page_requests,
            address_width: self.address_width.min(other.address_width),
            page_sizes: self.page_sizes & other.page_sizes,
            snoop_control: self.snoop_control && other.snoop_control,
        }
    }
}

/// How much a back end holds. All zero is "nothing left behind".
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize)]
pub struct Objects {
    /// Claimed endpoints.
    pub endpoints: usize,
    /// Targets with something other than Blocked.
    pub targets: usize,
    /// Distinct translation objects (nested HWPTs, walk contexts).
    pub translations: usize,
    /// Domains.
    pub domains: usize,
    /// Mappings in all domains.
    pub mappings: usize,
    /// Page request groups not answered yet.
    pub page_requests: usize,
}

/// What really translates. See the module's text for the promises.
pub trait Backend: Send + Sync {
    /// What this back end can do for every endpoint it has or may get.
    fn capabilities(&self) -> Capabilities;

    /// Binds `endpoint` to a front end. It is Blocked until [`apply`](Self::apply).
    ///
    /// # Errors
    /// [`Refused::NoEndpoint`] for an endpoint this back end does not have, [`Refused::SharesGroup`]
    /// for one that the host cannot keep apart from another that is here, [`Refused::Claimed`]
    /// when it has a front end already.
    fn claim(&self, endpoint: Rid, sink: Arc<dyn EventSink>) -> Result<(), Refused>;

    /// Ends a claim: all targets Blocked, in-flight DMA drained, pending page request groups
    /// answered [`ResponseCode::Invalid`], nothing kept. Unknown endpoints are no error.
    fn release(&self, endpoint: Rid);

    /// Makes `translation` true for `target` and forgets everything cached for it. Asking for
    /// what is already in force is a success and does nothing.
    ///
    /// # Errors
    /// The target is Blocked then, and asking again may succeed.
    fn apply(&self, target: Target, translation: Translation) -> Result<(), Refused>;

    /// What is in force for `target` (Blocked when nothing is known).
    fn translation(&self, target: Target) -> Translation;

    /// The host kernel's object that translates for `target`, where there is one: to find it in
    /// what the host's own tools show.
    fn hwpt(&self, target: Target) -> Option<HwptId> {
        let _ = target;
        None
    }

    /// Forgets cached translations, in order, and drains in-flight DMA that used them. Returns
    /// how many of `batch` took effect, counted from the front; the caller must treat the targets
    /// of the rest as having stale translations (and apply Blocked).
    fn invalidate(&self, batch: &[Invalidation]) -> usize;

    /// Returns when every page request that a device had sent before the call is with its front
    /// end. Those of a back end that hands them on as they come are; one that keeps them in a
    /// queue calls [`EventSink::page_request`] meanwhile, on this thread or another. The caller
    /// holds no lock that its sink takes.
    fn drain_page_requests(&self);

    /// Answers a page request group. Unknown groups are ignored (the endpoint may be gone).
    fn respond(&self, response: PageResponse);

    /// A new, empty domain.
    ///
    /// # Errors
    /// [`Refused::NoRoom`] or what the host said.
    fn create_domain(&self) -> Result<DomainId, Refused>;

    /// Removes a domain and its mappings. Targets that use it become Blocked first.
    fn destroy_domain(&self, domain: DomainId);

    /// Adds mappings, all or none.
    ///
    /// # Errors
    /// Nothing is changed then, but with [`Refused::Torn`]: then the domain has to be destroyed.
    fn map(&self, domain: DomainId, mappings: &[Mapping]) -> Result<(), Refused>;

    /// Removes every mapping that lies inside `first..=last` (inclusive, so that the whole
    /// address space can be named), and returns the bytes removed. A mapping that reaches out of
    /// the range is not touched: the front end checks that first.
    ///
    /// # Errors
    /// [`Refused::NoDomain`].
    fn unmap(&self, domain: DomainId, first: Iova, last: Iova) -> Result<u64, Refused>;

    /// How the interrupts of `endpoint` reach their doorbell: a front end tells its guest, and
    /// has it map what must be mapped.
    fn doorbell(&self, endpoint: Rid) -> Doorbell;

    /// How much is held, for `vm.viommu` and for the tests that count.
    fn objects(&self) -> Objects;
}
