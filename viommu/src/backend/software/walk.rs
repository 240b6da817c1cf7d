//! The walk: from an address on the bus to a page of guest memory, as VT-d 3.6 to 3.9 have it.
//!
//! Tables are the guest's and may change or lie at any moment. A walk reads each entry once (and
//! again only when it lost a race to set an accessed or dirty flag), goes down one level per
//! step, and so ends after at most five steps per stage, whatever the tables contain.

use super::iotlb::{Iotlb, Of};
use super::tables::Ram;
use crate::backend::{FaultCause, Stage, Stage1, Stage2};
use crate::spec::vtd::paging::{FirstStageEntry, SecondStageEntry, entry_offset, level_shift};

/// How often a walk tries to set a flag in an entry that changes under it. The guest can only
/// exhaust this by rewriting the entry all the time.
const RACES: u32 = 64;

/// In a cached table of a second stage: its pages may be read, and written.
pub(super) const R: u64 = 1;
pub(super) const W: u64 = 2;

/// `bit` when it is `on`.
const fn flag(on: bool, bit: u64) -> u64 {
    if on { bit } else { 0 }
}

/// What a request asks for.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Request {
    pub(super) read: bool,
    pub(super) write: bool,
    /// Reads are instruction fetches.
    pub(super) execute: bool,
    pub(super) privileged: bool,
}

/// What a page allows without another walk, as a set of bits that fits beside a page address.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct Allowed(u64);

impl Allowed {
    const READ: u64 = 1;
    /// Allowed, and the dirty flag is set where there is one.
    const WRITE: u64 = 2;
    const EXECUTE: u64 = 4;
    /// The same three for privileged requests, this many bits up.
    const PRIVILEGED: u32 = 3;
    /// The bits of a set.
    pub(super) const MASK: u64 = 0x3f;

    fn bits(read: bool, write: bool, execute: bool) -> u64 {
        flag(read, Self::READ) | flag(write, Self::WRITE) | flag(execute, Self::EXECUTE)
    }

    /// What entries of a first stage with these rights allow (VT-d 3.6.1). `dirty`: the leaf's
    /// dirty flag is set, or will be. What several entries on the way allow is what each of them
    /// does. Without a branch on the entry: rights differ from page to page.
    #[inline]
    pub(super) fn first_stage(
        (sre, wpe): (bool, bool),
        rw: bool,
        us: bool,
        xd: bool,
        dirty: bool,
    ) -> Self {
        let writes = |rw: bool| u64::from(rw & dirty) * Self::WRITE;
        let reads = Self::READ | (u64::from(!xd) * Self::EXECUTE);
        let user = u64::from(us) * (reads | writes(rw));
        if !sre {
            return Self(user);
        }
        let privileged = reads | writes(rw | !wpe);
        Self(user | privileged << Self::PRIVILEGED)
    }

    /// The same for requests of either privilege.
    pub(super) fn both(read: bool, write: bool) -> Self {
        let bits = Self::bits(read, write, read);
        Self(bits | bits << Self::PRIVILEGED)
    }

    pub(super) const fn from_bits(bits: u64) -> Self {
        Self(bits & Self::MASK)
    }

    pub(super) const fn into_bits(self) -> u64 {
        self.0
    }

    /// Whether everything in `needed` is in `self`.
    pub(super) const fn has(self, needed: Self) -> bool {
        self.0 & needed.0 == needed.0
    }

    /// What both allow.
    pub(super) const fn and(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }
}

impl Request {
    /// What a page must allow for this request to pass.
    pub(super) fn needs(self) -> Allowed {
        let bits = Allowed::bits(self.read, self.write, self.execute);
        Allowed(bits << (Allowed::PRIVILEGED * u32::from(self.privileged)))
    }
}

/// The end of a walk: a page of 2^`shift` bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Page {
    /// Where it lies, a multiple of its size.
    pub(super) base: u64,
    pub(super) shift: u32,
    pub(super) allowed: Allowed,
}

impl Page {
    /// Where `address` of the page's input lies.
    pub(super) const fn at(self, address: u64) -> u64 {
        self.base | address & ((1 << self.shift) - 1)
    }

    /// The part of 2^`shift` bytes that `address` of the input lies in, when that is smaller.
    pub(super) const fn part(self, address: u64, shift: u32) -> Self {
        if shift >= self.shift {
            return self;
        }
        Self {
            base: self.at(address) >> shift << shift,
            shift,
            allowed: self.allowed,
        }
    }
}

/// Walks tables in `ram`, with the help of a port's paging-structure caches when there are some.
#[derive(Clone, Copy)]
pub(super) struct Walker<'a> {
    pub(super) ram: &'a Ram,
    /// Host address width in bits, at most 52: address bits above are reserved in entries.
    pub(super) haw: u8,
    pub(super) cache: Option<&'a Iotlb>,
}

/// How far a first-stage walk has come: the table to read next, and the rights so far.
#[derive(Clone, Copy)]
pub(super) struct First {
    level: u8,
    /// Where the table lies in guest memory.
    table: u64,
    /// Whether its entries may be updated: always without a second stage, else if that allows
    /// writes there and has its dirty flag set.
    writable: bool,
    rw: bool,
    us: bool,
    xd: bool,
}

impl First {
    const WRITABLE: u64 = 1;
    const RW: u64 = 2;
    const US: u64 = 4;
    const XD: u64 = 8;
    /// How far up the same rights are as a set.
    const ALLOWED: u32 = 4;

    /// What a cached table allows.
    #[inline]
    pub(super) const fn allowed_of(cached: u64) -> Allowed {
        Allowed::from_bits(cached >> Self::ALLOWED)
    }

    fn into_cached(self, stage1: &Stage1) -> u64 {
        self.table
            | self.allowed(stage1, true).into_bits() << Self::ALLOWED
            | flag(self.writable, Self::WRITABLE)
            | flag(self.rw, Self::RW)
            | flag(self.us, Self::US)
            | flag(self.xd, Self::XD)
    }

    fn from_cached(level: u8, cached: u64) -> Self {
        Self {
            level,
            table: cached & !0xfff,
            writable: cached & Self::WRITABLE != 0,
            rw: cached & Self::RW != 0,
            us: cached & Self::US != 0,
            xd: cached & Self::XD != 0,
        }
    }

    /// The rights with those of `entry`.
    fn through(mut self, entry: FirstStageEntry) -> Self {
        self.rw &= entry.rw();
        self.us &= entry.us();
        self.xd |= entry.xd();
        self
    }

    /// What is allowed, after the entries so far.
    fn allowed(self, stage1: &Stage1, dirty: bool) -> Allowed {
        Allowed::first_stage((stage1.sre, stage1.wpe), self.rw, self.us, self.xd, dirty)
    }
}

impl Walker<'_> {
    /// Walks a first-stage table; with `under`, nested on that second stage.
    pub(super) fn first_stage(
        &self,
        stage1: &Stage1,
        under: Option<&Stage2>,
        iova: u64,
        request: Request,
    ) -> Result<Page, FaultCause> {
        let unused = 64 - u32::from(stage1.width);
        if (iova << unused).cast_signed() >> unused != iova.cast_signed() {
            return Err(FaultCause::AddressWidth);
        }
        if request.privileged && !stage1.sre {
            return Err(FaultCause::Supervisor);
        }
        let near = self
            .cache
            .and_then(|cache| cache.structure(Of::Input, iova));
        let mut at = match near {
            Some((level, cached)) => First::from_cached(level, cached),
            None => self.first_stage_root(stage1, under)?,
        };
        loop {
            let before = at;
            let (entry, passed) = self.first_stage_entry(stage1, under, at, iova, request)?;
            at = passed;
            if entry.is_leaf(before.level) {
                let page = Page {
                    base: entry.page(before.level).0,
                    shift: level_shift(before.level),
                    allowed: at.allowed(stage1, entry.d()),
                };
                return match under {
                    None => Ok(page),
                    Some(stage2) => self.under(stage2, page, iova, request),
                };
            }
            at.level -= 1;
            let table = entry.table().0;
            (at.table, at.writable) =
                self.first_stage_table(under, table, Stage::SecondForTable)?;
            if let Some(cache) = self.cache {
                cache.put_structure(Of::Input, at.level, iova, at.into_cached(stage1));
            }
        }
    }

    fn first_stage_root(
        &self,
        stage1: &Stage1,
        under: Option<&Stage2>,
    ) -> Result<First, FaultCause> {
        let root = stage1.root.0;
        let (table, writable) = self.first_stage_table(under, root, Stage::SecondForRoot)?;
        Ok(First {
            level: if stage1.width == 57 { 5 } else { 4 },
            table,
            writable,
            rw: true,
            us: true,
            xd: false,
        })
    }

    /// Where the first-stage table at `table` lies in guest memory, and whether it may be updated.
    fn first_stage_table(
        &self,
        under: Option<&Stage2>,
        table: u64,
        stage: Stage,
    ) -> Result<(u64, bool), FaultCause> {
        let Some(stage2) = under else {
            return Ok((table, true));
        };
        let read = Request {
            read: true,
            ..Request::default()
        };
        let page = self.second_stage(stage2, table, read, stage)?;
        Ok((page.at(table), page.allowed.has(Allowed(Allowed::WRITE))))
    }

    /// Reads the entry for `iova` of the table at `at`, checks it and sets its flags. Returns it
    /// with the rights including its own.
    fn first_stage_entry(
        &self,
        stage1: &Stage1,
        under: Option<&Stage2>,
        at: First,
        iova: u64,
        request: Request,
    ) -> Result<(FirstStageEntry, First), FaultCause> {
        let (stage, level) = (Stage::First, at.level);
        let gone = FaultCause::TableAccess { stage, level };
        let gpa = at.table + entry_offset(iova, level);
        for _ in 0..RACES {
            let bits = self.ram.load(gpa).ok_or(gone)?;
            let entry = FirstStageEntry::from_bits(bits);
            if !entry.p() {
                return Err(FaultCause::NotMapped { stage, level });
            }
            let no_such_size = level == 3 && entry.ps() && !stage1.fs1gp;
            if no_such_size || entry.has_reserved(level, self.haw) {
                return Err(FaultCause::Reserved { stage, level });
            }
            let leaf = entry.is_leaf(level);
            let passed = at.through(entry);
            if leaf && !passed.allowed(stage1, true).has(request.needs()) {
                return Err(if passed.us || request.privileged {
                    FaultCause::Permission {
                        stage,
                        privileged: request.privileged,
                    }
                } else {
                    FaultCause::SupervisorPage
                });
            }
            let flagged = entry
                .with_a(true)
                .with_ea(entry.ea() || stage1.eafe)
                .with_d(entry.d() || leaf && request.write);
            if flagged == entry {
                return Ok((entry, passed));
            }
            if !stage1.pwsnp {
                return Err(FaultCause::UpdateNotSnooped);
            }
            if !at.writable
                && let Some(stage2) = under
            {
                self.allow_update(stage1, stage2, level, iova)?;
            }
            if self
                .ram
                .replace(gpa, bits, flagged.into_bits())
                .ok_or(gone)?
            {
                return Ok((flagged, passed));
            }
        }
        Err(gone)
    }

    /// Makes the second stage agree to an update of the first-stage table of `level` that
    /// translates `iova`: it must allow a write there, and its own dirty flag is set.
    ///
    /// The walk above remembers only where that table lies in guest memory, so this one starts
    /// again at the root. It happens once per page of tables.
    fn allow_update(
        &self,
        stage1: &Stage1,
        stage2: &Stage2,
        level: u8,
        iova: u64,
    ) -> Result<(), FaultCause> {
        let uncached = Self {
            cache: None,
            ..*self
        };
        let mut table = stage1.root.0;
        let mut above = uncached.first_stage_root(stage1, Some(stage2))?;
        while above.level > level {
            let (stage, at) = (Stage::First, above.level);
            let gpa = above.table + entry_offset(iova, at);
            let bits = self
                .ram
                .load(gpa)
                .ok_or(FaultCause::TableAccess { stage, level: at })?;
            let entry = FirstStageEntry::from_bits(bits);
            if !entry.p() || entry.is_leaf(at) {
                // The guest changed it just now.
                return Err(FaultCause::NotMapped { stage, level: at });
            }
            table = entry.table().0;
            above.level -= 1;
            (above.table, above.writable) =
                uncached.first_stage_table(Some(stage2), table, Stage::SecondForTable)?;
        }
        let write = Request {
            write: true,
            ..Request::default()
        };
        self.second_stage(stage2, table, write, Stage::SecondForUpdate)
            .map(|_| ())
    }

    /// The part of the first-stage `page` around `iova` that one page of the second stage maps.
    fn under(
        &self,
        stage2: &Stage2,
        page: Page,
        iova: u64,
        request: Request,
    ) -> Result<Page, FaultCause> {
        let middle = page.at(iova);
        let outer = self.second_stage(stage2, middle, request, Stage::Second)?;
        let part = outer.part(middle, page.shift);
        Ok(Page {
            allowed: part.allowed.and(page.allowed),
            ..part
        })
    }

    /// Walks a second-stage table under a first stage. `stage` is what it is used for.
    pub(super) fn second_stage(
        &self,
        stage2: &Stage2,
        address: u64,
        request: Request,
        stage: Stage,
    ) -> Result<Page, FaultCause> {
        if address >> stage2.width != 0 {
            return Err(FaultCause::BeyondSecondStage);
        }
        self.second_stage_from(stage2, address, request, stage, Of::Second)
    }

    /// As [`second_stage`](Self::second_stage), for a second stage that is used alone.
    pub(super) fn second_stage_alone(
        &self,
        stage2: &Stage2,
        iova: u64,
        request: Request,
    ) -> Result<Page, FaultCause> {
        if iova >> stage2.width != 0 {
            return Err(FaultCause::AddressWidth);
        }
        self.second_stage_from(stage2, iova, request, Stage::Second, Of::Input)
    }

    fn second_stage_from(
        &self,
        stage2: &Stage2,
        address: u64,
        request: Request,
        stage: Stage,
        of: Of,
    ) -> Result<Page, FaultCause> {
        let near = self.cache.and_then(|cache| cache.structure(of, address));
        let near =
            near.map(|(level, cached)| (level, cached & !0xfff, cached & R != 0, cached & W != 0));
        let root = ((stage2.width - 12) / 9, stage2.root.0, true, true);
        let (mut level, mut table, mut r, mut w) = near.unwrap_or(root);
        loop {
            let (entry, rights) =
                self.second_stage_entry(stage2, (level, table, r, w), address, request, stage)?;
            (r, w) = rights;
            if entry.is_leaf(level) {
                let dirty = entry.d() || !stage2.ad;
                return Ok(Page {
                    base: entry.page(level).0,
                    shift: level_shift(level),
                    allowed: Allowed::both(r, w && dirty),
                });
            }
            level -= 1;
            table = entry.table().0;
            if let Some(cache) = self.cache {
                let rights = flag(r, R) | flag(w, W);
                cache.put_structure(of, level, address, table | rights);
            }
        }
    }

    fn second_stage_entry(
        &self,
        stage2: &Stage2,
        (level, table, r, w): (u8, u64, bool, bool),
        address: u64,
        request: Request,
        stage: Stage,
    ) -> Result<(SecondStageEntry, (bool, bool)), FaultCause> {
        let gone = FaultCause::TableAccess { stage, level };
        let gpa = table + entry_offset(address, level);
        for _ in 0..RACES {
            let bits = self.ram.load(gpa).ok_or(gone)?;
            let entry = SecondStageEntry::from_bits(bits);
            if !entry.is_present() {
                return Err(FaultCause::NotMapped { stage, level });
            }
            if entry.has_reserved(level, self.haw) {
                return Err(FaultCause::Reserved { stage, level });
            }
            let leaf = entry.is_leaf(level);
            let (r, w) = (r && entry.r(), w && entry.w());
            // Each level gave one of them, together they give none: as if nothing was there.
            if leaf && !r && !w {
                return Err(FaultCause::NotMapped { stage, level });
            }
            if leaf && !Allowed::both(r, w).has(request.needs()) {
                return Err(FaultCause::Permission {
                    stage,
                    privileged: request.privileged,
                });
            }
            if !stage2.ad {
                return Ok((entry, (r, w)));
            }
            let flagged = entry
                .with_a(true)
                .with_d(entry.d() || leaf && request.write);
            if flagged == entry
                || self
                    .ram
                    .replace(gpa, bits, flagged.into_bits())
                    .ok_or(gone)?
            {
                return Ok((flagged, (r, w)));
            }
        }
        Err(gone)
    }
}
