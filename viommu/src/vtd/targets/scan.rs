//! Finding what changed in an endpoint's PASID tables when the guest does not say which PASID: all
//! present tables are read, and what is in force is looked at only for those that changed.

use std::collections::BTreeMap;
use std::hash::{BuildHasher, Hasher};

use super::live::Live;
use super::{Targets, View};
use crate::spec::vtd::tables::{PASID_DIRECTORY_ENTRY_SIZE, PASID_TABLE_ENTRIES};
use crate::vtd::context::{ScalableContext, read_words};
use crate::vtd::pasid;
use crate::{Pasid, Rid, Target};

/// Entries of a PASID directory that are read at a time: as many as the smallest one has.
const DIRECTORY_CHUNK: usize = 128;
/// Present entries from which on a table is worth to be known: so that what is kept for it is
/// little beside what they take.
const WORTH_KNOWING: usize = 8;

/// Tables whose entries are all in force as they were when they had this sum. It is keyed, so a
/// guest cannot make two tables that have the same.
#[derive(Default)]
pub(super) struct KnownTables {
    /// By PASID / 64.
    sums: BTreeMap<u32, u64>,
}

impl KnownTables {
    fn is(&self, table: u32, sum: u64) -> bool {
        self.sums.get(&table) == Some(&sum)
    }

    fn remember(&mut self, table: u32, sum: u64) {
        self.sums.insert(table, sum);
    }

    /// What `pasid` has changes.
    pub(super) fn forget(&mut self, pasid: Pasid) {
        if !self.sums.is_empty() {
            self.sums.remove(&(pasid.0 / PASID_TABLE_ENTRIES));
        }
    }

    pub(super) fn clear(&mut self) {
        self.sums.clear();
    }
}

type Table = [[u64; 8]; PASID_TABLE_ENTRIES as usize];

/// How far a scan of an endpoint's PASID tables is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Scan {
    /// The directory entry that comes next.
    entry: u32,
    /// The first PASID that was not looked at.
    next: u32,
    /// How many tables may still be read.
    tables: u32,
}

impl Scan {
    pub(super) fn new(tables: u32) -> Self {
        Self {
            entry: 0,
            next: 0,
            tables,
        }
    }
}

impl Targets {
    /// Makes true what the PASID entries of an endpoint say, but RID_PASID's: page by page of the
    /// directory, present tables only, at most `tables` of them.
    pub(super) fn scan_pasids(&mut self, view: View, rid: Rid, tables: &mut u32) {
        let mut scan = Scan::new(*tables);
        while self.scan_some(view, rid, &mut scan, u32::MAX) {}
        *tables = scan.tables;
    }

    /// The next part of a scan: no more than `most` tables of one page of the directory. Whether
    /// there is more.
    pub(super) fn scan_some(
        &mut self,
        view: View,
        rid: Rid,
        scan: &mut Scan,
        mut most: u32,
    ) -> bool {
        let Some(context) = self.endpoints.get(&rid).and_then(|e| e.context) else {
            return false;
        };
        let entries = match context.paside {
            true => context.serveable().div_ceil(PASID_TABLE_ENTRIES),
            false => 0,
        };
        if scan.entry >= entries {
            self.block_range(rid, scan.next, u32::MAX);
            return false;
        }
        let done = scan.entry % DIRECTORY_CHUNK as u32;
        let chunk_at = scan.entry - done;
        let at = context.directory.0 + u64::from(chunk_at) * PASID_DIRECTORY_ENTRY_SIZE;
        let chunk = read_words::<DIRECTORY_CHUNK>(view.ram, at);
        let numbered = (chunk_at..).zip(chunk.into_iter().flatten());
        for (number, bits) in numbered.skip(done as usize) {
            let Ok((table, fpd)) = pasid::directory_entry(bits, context.fpd) else {
                continue;
            };
            if scan.tables == 0 {
                self.counts.over_limit += 1;
                continue;
            }
            if most == 0 {
                self.pause_scan(rid, scan, number);
                return true;
            }
            most -= 1;
            scan.tables -= 1;
            self.counts.tables_scanned += 1;
            let Some(table) = pasid::table(view.ram, table) else {
                continue;
            };
            let first = number * PASID_TABLE_ENTRIES;
            self.block_range(rid, scan.next, first);
            self.scan_table(view, rid, &context, number, fpd, &table);
            scan.next = first + PASID_TABLE_ENTRIES;
        }
        self.pause_scan(rid, scan, chunk_at + DIRECTORY_CHUNK as u32);
        true
    }

    /// What comes before directory entry `entry` was looked at. Of what no table had, nothing is
    /// left for later: it may have one when the scan goes on.
    fn pause_scan(&mut self, rid: Rid, scan: &mut Scan, entry: u32) {
        self.block_range(rid, scan.next, entry * PASID_TABLE_ENTRIES);
        scan.next = entry * PASID_TABLE_ENTRIES;
        scan.entry = entry;
    }

    /// Makes true what the entries of one table say.
    fn scan_table(
        &mut self,
        view: View,
        rid: Rid,
        context: &ScalableContext,
        number: u32,
        fpd: bool,
        table: &Table,
    ) {
        let sum = self.sum(fpd, table);
        let Some(endpoint) = self.endpoints.get_mut(&rid) else {
            return;
        };
        if endpoint.tables.is(number, sum) {
            return;
        }
        // The table and what is known are in the same order, so that entries that did not change
        // cost no search.
        let first = number * PASID_TABLE_ENTRIES;
        let last = first + PASID_TABLE_ENTRIES - 1;
        let mut known = endpoint
            .live
            .range(Some(Pasid(first))..=Some(Pasid(last)))
            .map(|(pasid, live)| (pasid.map_or(0, |pasid| pasid.0), live))
            .peekable();
        let (mut gone, mut changed) = (Vec::new(), Vec::new());
        let mut present = 0;
        for (pasid, words) in (first..).zip(table) {
            // Bit 0 of the first word is P.
            if words[0] & 1 == 0 || pasid == context.rid_pasid || !context.serves(pasid) {
                continue;
            }
            present += 1;
            let decoded = pasid::entry(view.offer, *words, fpd);
            while let Some((below, _)) = known.next_if(|(known, _)| *known < pasid) {
                gone.push(below);
            }
            let known = known.next_if(|(known, _)| *known == pasid);
            if !known.is_some_and(|(_, live)| live.is_still(decoded)) {
                changed.push((pasid, decoded));
            }
        }
        gone.extend(known.map(|(pasid, _)| pasid));
        for pasid in gone {
            self.block(Target::pasid(rid, Pasid(pasid)));
        }
        for &(pasid, decoded) in &changed {
            self.set(Target::pasid(rid, Pasid(pasid)), pasid, decoded);
        }
        if present < WORTH_KNOWING {
            return;
        }
        if let Some(endpoint) = self.endpoints.get_mut(&rid) {
            let applied = |&(pasid, _): &(u32, _)| {
                let live = endpoint.live.get(&Some(Pasid(pasid)));
                live.is_some_and(Live::is_applied)
            };
            if changed.iter().all(applied) {
                endpoint.tables.remember(number, sum);
            }
        }
    }

    fn sum(&self, fpd: bool, table: &Table) -> u64 {
        let mut sum = self.sums.build_hasher();
        sum.write_u8(fpd.into());
        for word in table.as_flattened() {
            sum.write_u64(*word);
        }
        sum.finish()
    }

    /// Blocks the PASIDs from `first` to below `end`: no table has them.
    fn block_range(&mut self, rid: Rid, first: u32, end: u32) {
        if first >= end {
            return;
        }
        let Some(endpoint) = self.endpoints.get(&rid) else {
            return;
        };
        let gone = endpoint.live.range(Some(Pasid(first))..Some(Pasid(end)));
        let gone: Vec<_> = gone.map(|(pasid, _)| *pasid).collect();
        for pasid in gone {
            self.block(Target {
                endpoint: rid,
                pasid,
            });
        }
    }
}
