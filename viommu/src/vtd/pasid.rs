//! Decoding the PASID directory and PASID entries of guest memory (9.5, 9.6): pure, and bounded
//! to one directory and one table entry, or to one table for [`table`].

use vm_memory::GuestMemoryMmap;

use super::capabilities::Offer;
use super::context::{self, Context, Entry, Problem, ScalableContext, read_words};
use crate::backend::{Stage1, Stage2, Translation};
use crate::spec::vtd::fault::FaultReason;
use crate::spec::vtd::registers::{Rtaddr, TranslationTableMode};
use crate::spec::vtd::tables::{
    PASID_DIRECTORY_ENTRY_SIZE, PASID_ENTRY_SIZE, PASID_TABLE_ENTRIES, PasidDirectoryEntry,
    PasidEntry, PasidEntry0, PasidEntry1, PasidEntry2, Pgtt, address_width,
};
use crate::{Gpa, Target};

/// What the guest's tables say now about `target`, from the root on.
pub(super) fn lookup(
    ram: &GuestMemoryMmap<()>,
    offer: &Offer,
    root: Rtaddr,
    target: Target,
) -> Result<Entry, Problem> {
    if target.pasid.is_some() && root.mode() == TranslationTableMode::Legacy {
        return Err(Problem {
            reason: FaultReason::PasidInLegacyMode,
            fpd: false,
        });
    }
    match (
        context::decode(ram, offer, root, target.endpoint)?,
        target.pasid,
    ) {
        (Context::Legacy { entry, .. }, _) => Ok(entry),
        (Context::Scalable(context), None) => decode(ram, offer, &context, context.rid_pasid),
        (Context::Scalable(context), Some(pasid)) if pasid.0 == context.rid_pasid => Err(Problem {
            reason: FaultReason::PasidIsRidPasid,
            fpd: context.fpd,
        }),
        (Context::Scalable(context), Some(_)) if !context.paside => Err(Problem {
            reason: FaultReason::PasidDisabled,
            fpd: context.fpd,
        }),
        (Context::Scalable(context), Some(pasid)) if pasid.0 >= context.offered => Err(Problem {
            reason: FaultReason::PasidNotSupported,
            fpd: context.fpd,
        }),
        (Context::Scalable(context), Some(pasid)) => decode(ram, offer, &context, pasid.0),
    }
}

/// Decodes the entry of `pasid`.
pub(super) fn decode(
    ram: &GuestMemoryMmap<()>,
    offer: &Offer,
    context: &ScalableContext,
    pasid: u32,
) -> Result<Entry, Problem> {
    let (words, fpd) = read(ram, context, pasid)?;
    entry(offer, words, fpd)
}

/// Reads the entry of `pasid`, and FPD down to it.
pub(super) fn read(
    ram: &GuestMemoryMmap<()>,
    context: &ScalableContext,
    pasid: u32,
) -> Result<([u64; 8], bool), Problem> {
    let (at, fpd) = find(ram, context, pasid)?;
    let words = read_words(ram, at).ok_or(Problem {
        reason: FaultReason::PasidTableAccess,
        fpd,
    })?;
    Ok((words, fpd))
}

/// Where the entry of `pasid` is, and FPD down to it.
#[inline]
pub(super) fn find(
    ram: &GuestMemoryMmap<()>,
    context: &ScalableContext,
    pasid: u32,
) -> Result<(u64, bool), Problem> {
    let fpd = context.fpd;
    let fault = |reason| Problem { reason, fpd };
    if pasid >= context.pasids {
        return Err(fault(FaultReason::PasidBeyondDirectory));
    }
    let index = u64::from(pasid / PASID_TABLE_ENTRIES);
    let [bits] = read_words(
        ram,
        context.directory.0 + index * PASID_DIRECTORY_ENTRY_SIZE,
    )
    .ok_or(fault(FaultReason::PasidDirectoryAccess))?;
    let (table, fpd) = directory_entry(bits, fpd)?;
    let index = u64::from(pasid % PASID_TABLE_ENTRIES);
    Ok((table.0 + index * PASID_ENTRY_SIZE, fpd))
}

/// The PASID table that a directory entry names, and FPD down to it.
pub(super) fn directory_entry(bits: u64, fpd: bool) -> Result<(Gpa, bool), Problem> {
    let entry = PasidDirectoryEntry::from_bits(bits);
    let fpd = fpd || entry.fpd();
    if !entry.p() {
        let reason = FaultReason::PasidDirectoryNotPresent;
        return Err(Problem { reason, fpd });
    }
    if bits & PasidDirectoryEntry::RESERVED != 0 {
        let reason = FaultReason::PasidDirectoryReserved;
        return Err(Problem { reason, fpd });
    }
    Ok((Gpa(entry.table()), fpd))
}

/// Reads a whole PASID table.
pub(super) fn table(
    ram: &GuestMemoryMmap<()>,
    table: Gpa,
) -> Option<[[u64; 8]; PASID_TABLE_ENTRIES as usize]> {
    let words: [u64; 8 * PASID_TABLE_ENTRIES as usize] = read_words(ram, table.0)?;
    let mut entries = [[0; 8]; PASID_TABLE_ENTRIES as usize];
    entries.as_flattened_mut().copy_from_slice(&words);
    Some(entries)
}

/// Decodes a PASID entry; `fpd` is what the levels above say.
pub(super) fn entry(offer: &Offer, words: [u64; 8], fpd: bool) -> Result<Entry, Problem> {
    let PasidEntry { q0, q1, q2, rest } = PasidEntry::from_words(words);
    let fpd = fpd || q0.fpd();
    let fault = |reason| Problem { reason, fpd };
    if !q0.p() {
        return Err(fault(FaultReason::PasidEntryNotPresent));
    }
    // A field of a capability that is not offered is a reserved field.
    let ecap = &offer.ecap;
    let reserved = words[0] & PasidEntry0::RESERVED != 0
        || words[1] & PasidEntry1::RESERVED != 0
        || words[2] & PasidEntry2::RESERVED != 0
        || rest != [0; 5]
        || !ecap.mts() && words[1] & PasidEntry1::MEMORY_TYPE != 0
        || !ecap.ssads() && q0.ssade()
        || !ecap.smpwcs() && q1.pwsnp()
        || !ecap.sc() && q1.pgsnp()
        || !ecap.srs() && (q2.sre() || q2.wpe())
        || !ecap.eafs() && q2.eafe();
    if reserved {
        return Err(fault(FaultReason::PasidEntryReserved));
    }

    let invalid = fault(FaultReason::PasidEntryInvalid);
    let stage1 = || {
        let width = match q2.fspm() {
            0 => 48,
            1 if offer.cap.fs5lp() => 57,
            _ => return Err(invalid),
        };
        Ok(Stage1 {
            root: Gpa(q2.first_stage()),
            width,
            sre: q2.sre(),
            wpe: q2.wpe(),
            eafe: q2.eafe(),
            ere: ecap.ers(),
            pwsnp: q1.pwsnp(),
            fs1gp: offer.cap.fs1gp(),
        })
    };
    let stage2 = || {
        let width = address_width(q0.aw()).filter(|_| offer.has_width(q0.aw()));
        Ok(Stage2 {
            root: Gpa(q0.second_stage()),
            width: width.ok_or(invalid)?,
            ad: q0.ssade(),
        })
    };
    let nested = || {
        let (stage1, stage2) = (stage1()?, stage2()?);
        // The second stage must be able to say where the first-stage table lies (SPT.4.4).
        let width = stage2.width.min(offer.address_width());
        if stage1.root.0 >> width != 0 {
            return Err(invalid);
        }
        Ok(Translation::Nested { stage1, stage2 })
    };
    let translation = match q0.translation_type() {
        Pgtt::FirstStage if ecap.fsts() => Translation::Stage1(stage1()?),
        Pgtt::SecondStage if ecap.ssts() => Translation::Stage2(stage2()?),
        Pgtt::Nested if ecap.nest() => nested()?,
        Pgtt::PassThrough if ecap.pt() => Translation::Identity,
        _ => return Err(invalid),
    };
    Ok(Entry {
        did: q1.did(),
        translation,
        fpd,
    })
}
