//! What a target has, in 24 bytes: a guest decides how many PASIDs are live.

use crate::backend::{Stage1, Stage2, Translation};
use crate::spec::vtd::fault::FaultReason;
use crate::vtd::context::{Entry, Problem};
use crate::{DomainId, Gpa};

/// What a target has.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Live {
    /// Blocked when the tables are wrong.
    translation: Packed,
    did: u16,
    fpd: bool,
    standing: Standing,
}

const _: () = assert!(size_of::<Live>() == 24);

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Standing {
    /// The back end has what the tables give.
    Applied,
    /// It refused that: the target is Blocked, and it is asked again.
    Refused,
    /// The tables are wrong. The guest was told.
    Wrong(FaultReason),
}

impl Live {
    /// The tables give `entry`, which the back end has or (not `applied`) refused.
    pub(super) fn entry(entry: Entry, applied: bool) -> Self {
        Self {
            translation: Packed::from(entry.translation),
            did: entry.did,
            fpd: entry.fpd,
            standing: match applied {
                true => Standing::Applied,
                false => Standing::Refused,
            },
        }
    }

    /// The tables are wrong, and the guest was told.
    pub(super) fn wrong(problem: Problem) -> Self {
        Self {
            translation: Packed::from(Translation::Blocked),
            did: 0,
            fpd: problem.fpd,
            standing: Standing::Wrong(problem.reason),
        }
    }

    /// What the tables give, if they are right.
    pub(super) fn given(&self) -> Option<Entry> {
        let right = !matches!(self.standing, Standing::Wrong(_));
        right.then(|| Entry {
            did: self.did,
            translation: self.translation.into(),
            fpd: self.fpd,
        })
    }

    /// What is wrong with the tables, if they are.
    pub(super) fn problem(&self) -> Option<Problem> {
        match self.standing {
            Standing::Wrong(reason) => Some(Problem {
                reason,
                fpd: self.fpd,
            }),
            Standing::Applied | Standing::Refused => None,
        }
    }

    /// The domain, if the tables are right.
    pub(super) fn domain(&self) -> Option<u16> {
        let right = !matches!(self.standing, Standing::Wrong(_));
        right.then_some(self.did)
    }

    /// The back end has what the tables give.
    pub(super) fn is_applied(&self) -> bool {
        self.standing == Standing::Applied
    }

    /// The back end no longer has it; whether it had.
    pub(super) fn lose(&mut self) -> bool {
        let had = self.is_applied();
        if had {
            self.standing = Standing::Refused;
        }
        had
    }

    /// Whether this is in force and still what the tables say.
    #[inline]
    pub(super) fn is_still(&self, decoded: Result<Entry, Problem>) -> bool {
        self.is_applied()
            && matches!(decoded, Ok(entry) if entry.did == self.did
                && entry.fpd == self.fpd
                && Packed::from(entry.translation) == self.translation)
    }
}

/// A [`Translation`] in two words. Roots are whole pages, as decoded from tables, so that their
/// low 12 bits have the rest: for the first stage width (6 bits), SRE, WPE and EAFE; for the
/// second width, AD, and what the first has no room for. The kind is in the first word's upper
/// three of them.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Packed([u64; 2]);

const BLOCKED: u64 = 0;
const IDENTITY: u64 = 1;
const STAGE1: u64 = 2;
const STAGE2: u64 = 3;
const NESTED: u64 = 4;
const DOMAIN: u64 = 5;

const KIND: u32 = 9;
const ROOT: u64 = !0xfff;
const WIDTH: u64 = 0x3f;
const SRE: u64 = 1 << 6;
const WPE: u64 = 1 << 7;
const EAFE: u64 = 1 << 8;
const AD: u64 = 1 << 6;
const ERE: u64 = 1 << 7;
const PWSNP: u64 = 1 << 8;
const FS1GP: u64 = 1 << 9;

fn flag(set: bool, bit: u64) -> u64 {
    if set { bit } else { 0 }
}

fn first(stage1: Stage1) -> u64 {
    debug_assert!(stage1.root.0 & !ROOT == 0 && u64::from(stage1.width) <= WIDTH);
    stage1.root.0 & ROOT
        | u64::from(stage1.width) & WIDTH
        | flag(stage1.sre, SRE)
        | flag(stage1.wpe, WPE)
        | flag(stage1.eafe, EAFE)
}

/// What of a first stage is in the second word.
fn rest(stage1: Stage1) -> u64 {
    flag(stage1.ere, ERE) | flag(stage1.pwsnp, PWSNP) | flag(stage1.fs1gp, FS1GP)
}

fn second(stage2: Stage2) -> u64 {
    debug_assert!(stage2.root.0 & !ROOT == 0 && u64::from(stage2.width) <= WIDTH);
    stage2.root.0 & ROOT | u64::from(stage2.width) & WIDTH | flag(stage2.ad, AD)
}

impl From<Translation> for Packed {
    #[inline]
    fn from(translation: Translation) -> Self {
        let (kind, one, two) = match translation {
            Translation::Blocked => (BLOCKED, 0, 0),
            Translation::Identity => (IDENTITY, 0, 0),
            Translation::Stage1(stage1) => (STAGE1, first(stage1), rest(stage1)),
            Translation::Stage2(stage2) => (STAGE2, 0, second(stage2)),
            Translation::Nested { stage1, stage2 } => {
                (NESTED, first(stage1), second(stage2) | rest(stage1))
            }
            Translation::Domain(DomainId(number)) => (DOMAIN, 0, number.into()),
        };
        Self([one | kind << KIND, two])
    }
}

impl From<Packed> for Translation {
    fn from(Packed([one, two]): Packed) -> Self {
        let stage1 = Stage1 {
            root: Gpa(one & ROOT),
            width: (one & WIDTH) as u8,
            sre: one & SRE != 0,
            wpe: one & WPE != 0,
            eafe: one & EAFE != 0,
            ere: two & ERE != 0,
            pwsnp: two & PWSNP != 0,
            fs1gp: two & FS1GP != 0,
        };
        let stage2 = Stage2 {
            root: Gpa(two & ROOT),
            width: (two & WIDTH) as u8,
            ad: two & AD != 0,
        };
        match one >> KIND & 7 {
            IDENTITY => Self::Identity,
            STAGE1 => Self::Stage1(stage1),
            STAGE2 => Self::Stage2(stage2),
            NESTED => Self::Nested { stage1, stage2 },
            DOMAIN => Self::Domain(DomainId(two as u32)),
            _ => Self::Blocked,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn stage1() -> impl Strategy<Value = Stage1> {
        (any::<u64>(), 0u8..64, any::<[bool; 6]>()).prop_map(
            |(root, width, [sre, wpe, eafe, ere, pwsnp, fs1gp])| Stage1 {
                root: Gpa(root & ROOT),
                width,
                sre,
                wpe,
                eafe,
                ere,
                pwsnp,
                fs1gp,
            },
        )
    }

    fn stage2() -> impl Strategy<Value = Stage2> {
        (any::<u64>(), 0u8..64, any::<bool>()).prop_map(|(root, width, ad)| Stage2 {
            root: Gpa(root & ROOT),
            width,
            ad,
        })
    }

    fn translation() -> impl Strategy<Value = Translation> {
        prop_oneof![
            Just(Translation::Blocked),
            Just(Translation::Identity),
            stage1().prop_map(Translation::Stage1),
            stage2().prop_map(Translation::Stage2),
            (stage1(), stage2())
                .prop_map(|(stage1, stage2)| Translation::Nested { stage1, stage2 }),
            any::<u32>().prop_map(|number| Translation::Domain(DomainId(number))),
        ]
    }

    proptest! {
        #[test]
        fn what_is_kept_is_what_was_given(
            translation in translation(),
            did in any::<u16>(),
            [fpd, applied] in any::<[bool; 2]>(),
        ) {
            let entry = Entry { did, translation, fpd };
            let mut live = Live::entry(entry, applied);
            prop_assert_eq!(live.given(), Some(entry));
            prop_assert_eq!(live.is_still(Ok(entry)), applied);
            prop_assert_eq!(live.lose(), applied);
            prop_assert!(!live.is_still(Ok(entry)));
        }

        #[test]
        fn two_translations_never_look_the_same(a in translation(), b in translation()) {
            prop_assert_eq!(Packed::from(a) == Packed::from(b), a == b);
        }
    }

    #[test]
    fn what_is_wrong_is_no_entry() {
        for &reason in FaultReason::ALL {
            let problem = Problem { reason, fpd: true };
            let mut live = Live::wrong(problem);
            assert_eq!((live.given(), live.problem()), (None, Some(problem)));
            assert!(!live.is_still(Err(problem)) && !live.lose());
        }
    }
}
