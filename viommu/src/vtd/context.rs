//! Decoding root and context entries of guest memory (chapter 9.1 to 9.4): pure, and bounded to
//! one root and one context entry.

use std::sync::atomic::Ordering;

use vm_memory::{
    Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
    MemoryRegionAddress,
};

use super::capabilities::Offer;
use crate::backend::{Stage2, Translation};
use crate::spec::vtd::fault::FaultReason;
use crate::spec::vtd::registers::{Rtaddr, TranslationTableMode};
use crate::spec::vtd::tables::{
    CONTEXT_ENTRY_SIZE, ContextEntryHigh, ContextEntryLow, ROOT_ENTRY_SIZE, RootEntryLow,
    SCALABLE_CONTEXT_ENTRY_SIZE, ScalableContextHigh, ScalableContextLow, address_width,
};
use crate::{Gpa, Rid};

/// Why tables give no translation.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Problem {
    /// What is wrong.
    pub(super) reason: FaultReason,
    /// An entry on the way has FPD: qualified faults are not recorded.
    pub(super) fpd: bool,
}

/// A translation as the guest's tables give it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Entry {
    /// Its domain, by which invalidations name it.
    pub(super) did: u16,
    /// What translates.
    pub(super) translation: Translation,
    /// Qualified faults are not recorded.
    pub(super) fpd: bool,
}

/// A valid scalable-mode context entry.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct ScalableContext {
    /// The PASID directory.
    pub(super) directory: Gpa,
    /// How many PASIDs it can name.
    pub(super) pasids: u32,
    /// How many PASIDs the unit offers (ECAP.PSS): requests with those from there on are refused,
    /// whatever the tables say.
    pub(super) offered: u32,
    /// The PASID of requests without PASID.
    pub(super) rid_pasid: u32,
    /// Requests with PASID are allowed.
    pub(super) paside: bool,
    /// Translation requests are allowed.
    pub(super) dte: bool,
    /// Page requests are allowed.
    pub(super) pre: bool,
    /// Qualified faults are not recorded.
    pub(super) fpd: bool,
}

impl ScalableContext {
    /// Requests with a PASID from here on are refused.
    pub(super) fn serveable(&self) -> u32 {
        self.pasids.min(self.offered)
    }

    /// Whether requests with `pasid` are served, if it is not RID_PASID and has an entry.
    #[inline]
    pub(super) fn serves(&self, pasid: u32) -> bool {
        self.paside && pasid < self.offered
    }
}

/// What a context entry says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Context {
    /// Legacy mode: everything.
    Legacy {
        /// What translates.
        entry: Entry,
        /// Translation requests are allowed.
        device_tlb: bool,
    },
    /// Scalable mode: where the PASID entries are.
    Scalable(ScalableContext),
}

/// Guest memory as the decoders read it: RAM only, so that a table in MMIO cannot be read.
#[inline]
pub(super) fn read_words<const N: usize>(ram: &GuestMemoryMmap<()>, at: u64) -> Option<[u64; N]> {
    // What tables hold is aligned and in one region; everything else takes the long way.
    let at = GuestAddress(at);
    let region = ram.find_region(at)?;
    let offset = MemoryRegionAddress(at.0 - region.start_addr().0);
    if let Ok(slice) = region.get_slice(offset, N * 8)
        && slice.load::<u64>(0, Ordering::Relaxed).is_ok()
    {
        let word = |n| slice.load(n * 8, Ordering::Relaxed).map_or(0, u64::from_le);
        return Some(std::array::from_fn(word));
    }
    let mut words = [[0u8; 8]; N];
    ram.read_slice(words.as_flattened_mut(), at).ok()?;
    Some(words.map(u64::from_le_bytes))
}

/// Whether guest memory has `known` at `at`. Compared as it is read: words that were just put
/// together would have to be waited for.
#[inline]
pub(super) fn has_words(ram: &GuestMemoryMmap<()>, at: u64, known: &[u64]) -> bool {
    let at = GuestAddress(at);
    let Some(region) = ram.find_region(at) else {
        return false;
    };
    let offset = MemoryRegionAddress(at.0 - region.start_addr().0);
    let Ok(slice) = region.get_slice(offset, known.len() * 8) else {
        return false;
    };
    let is = |(n, known): (usize, &u64)| {
        let word = slice.load::<u64>(n * 8, Ordering::Relaxed);
        word.is_ok_and(|word| u64::from_le(word) == *known)
    };
    known.iter().enumerate().all(is)
}

/// Decodes the context entry of `rid` under the root table that `root` names.
pub(super) fn decode(
    ram: &GuestMemoryMmap<()>,
    offer: &Offer,
    root: Rtaddr,
    rid: Rid,
) -> Result<Context, Problem> {
    match root.mode() {
        TranslationTableMode::Legacy => legacy(ram, offer, root, rid),
        TranslationTableMode::Scalable if offer.ecap.smts() => {
            let words = read_scalable(ram, find_scalable(ram, root, rid)?)?;
            scalable(offer, words).map(Context::Scalable)
        }
        _ => Err(Problem {
            reason: FaultReason::RootTableAddressInvalid,
            fpd: false,
        }),
    }
}

fn legacy(
    ram: &GuestMemoryMmap<()>,
    offer: &Offer,
    root: Rtaddr,
    rid: Rid,
) -> Result<Context, Problem> {
    let fault = |reason| Problem { reason, fpd: false };
    let at = root.address() + u64::from(rid.bus()) * ROOT_ENTRY_SIZE;
    let [low, high] = read_words(ram, at).ok_or(fault(FaultReason::RootTableAccess))?;
    let entry = RootEntryLow::from_bits(low);
    if !entry.p() {
        return Err(fault(FaultReason::RootEntryNotPresent));
    }
    if low & RootEntryLow::RESERVED != 0 || high != 0 {
        return Err(fault(FaultReason::RootEntryReserved));
    }

    let at = entry.context_table() + u64::from(rid.devfn()) * CONTEXT_ENTRY_SIZE;
    let [low_bits, high_bits] =
        read_words(ram, at).ok_or(fault(FaultReason::ContextTableAccess))?;
    let low = ContextEntryLow::from_bits(low_bits);
    let high = ContextEntryHigh::from_bits(high_bits);
    let fpd = low.fpd();
    let fault = |reason| Problem { reason, fpd };
    if !low.p() {
        return Err(fault(FaultReason::ContextEntryNotPresent));
    }
    if low_bits & ContextEntryLow::RESERVED != 0 || high_bits & ContextEntryHigh::RESERVED != 0 {
        return Err(fault(FaultReason::ContextEntryReserved));
    }
    let width = address_width(high.aw())
        .filter(|_| offer.has_width(high.aw()))
        .ok_or(fault(FaultReason::ContextEntryInvalid))?;
    let translation = match low.tt() {
        0 => second_stage(low.second_stage(), width, false),
        1 if offer.ecap.dt() => second_stage(low.second_stage(), width, false),
        2 if offer.ecap.pt() => Translation::Identity,
        _ => return Err(fault(FaultReason::ContextEntryInvalid)),
    };
    let entry = Entry {
        did: high.did(),
        translation,
        fpd,
    };
    Ok(Context::Legacy {
        entry,
        device_tlb: low.tt() == 1,
    })
}

fn second_stage(root: u64, width: u8, ad: bool) -> Translation {
    Translation::Stage2(Stage2 {
        root: Gpa(root),
        width,
        ad,
    })
}

/// Where the scalable-mode context entry of `rid` is.
#[inline]
pub(super) fn find_scalable(
    ram: &GuestMemoryMmap<()>,
    root: Rtaddr,
    rid: Rid,
) -> Result<u64, Problem> {
    let fault = |reason| Problem { reason, fpd: false };
    let devfn = u64::from(rid.devfn());
    let at = root.address() + u64::from(rid.bus()) * ROOT_ENTRY_SIZE;
    // Each half stands alone: the other one may be anything.
    let at = at + u64::from(devfn >= 0x80) * 8;
    let [half] = read_words(ram, at).ok_or(fault(FaultReason::ScalableRootTableAccess))?;
    let entry = RootEntryLow::from_bits(half);
    if !entry.p() {
        return Err(fault(FaultReason::ScalableRootNotPresent));
    }
    if half & RootEntryLow::RESERVED != 0 {
        return Err(fault(FaultReason::ScalableRootReserved));
    }

    Ok(entry.context_table() + (devfn & 0x7f) * SCALABLE_CONTEXT_ENTRY_SIZE)
}

/// Reads the scalable-mode context entry at `at`.
pub(super) fn read_scalable(ram: &GuestMemoryMmap<()>, at: u64) -> Result<[u64; 4], Problem> {
    read_words(ram, at).ok_or(Problem {
        reason: FaultReason::ScalableContextTableAccess,
        fpd: false,
    })
}

/// Decodes a scalable-mode context entry.
pub(super) fn scalable(offer: &Offer, words: [u64; 4]) -> Result<ScalableContext, Problem> {
    let [low_bits, high_bits, rest @ ..] = words;
    let low = ScalableContextLow::from_bits(low_bits);
    let high = ScalableContextHigh::from_bits(high_bits);
    let fpd = low.fpd();
    let fault = |reason| Problem { reason, fpd };
    if !low.p() {
        return Err(fault(FaultReason::ScalableContextNotPresent));
    }
    // A field of a capability that is not offered is a reserved field.
    let reserved = low_bits & ScalableContextLow::RESERVED != 0
        || high_bits & ScalableContextHigh::RESERVED != 0
        || rest != [0; 2]
        || low.dte() && !offer.ecap.dt()
        || low.paside() && !offer.ecap.pasid()
        || low.pre() && !offer.ecap.prs()
        || high.rid_priv() && !offer.ecap.rprivs();
    if reserved {
        return Err(fault(FaultReason::ScalableContextReserved));
    }
    // Page requests without the translations that they ask for, and a RID_PASID that the
    // directory has no room for (SCT.4).
    if low.pre() && !low.dte() || high.rid_pasid() >= low.pasids() {
        return Err(fault(FaultReason::ScalableContextInvalid));
    }
    Ok(ScalableContext {
        directory: Gpa(low.directory()),
        pasids: low.pasids(),
        offered: 1 << offer.pasid_bits(),
        rid_pasid: high.rid_pasid(),
        paside: low.paside(),
        dte: low.dte(),
        pre: low.pre(),
        fpd,
    })
}
