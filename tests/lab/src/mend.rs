//! Faults of QEMU's emulated CPU, taken out of the copy that the lab runs.
//!
//! Traces of an emulated host that broke showed them, in QEMU 10.0.2. Each is a store that one or a
//! few instructions make, and each can be mended where it stands, without a build of QEMU.
//!
//! - **The first CPU forgets what it is.** Whenever a CPU loads x87 state without a pending
//!   exception (FXRSTOR or XRSTOR: at every switch of processes), QEMU clears IGNNE#, a pin of the
//!   386, and keeps it in a word of the *first* CPU's state that also holds GIF, "nested paging is
//!   in use" and "virtual interrupts are in use". Read, changed and written back by another
//!   thread, it undoes what the first CPU does to that word at the same moment, in VMRUN, #VMEXIT,
//!   STGI or CLGI. A host whose pages are looked up in the tables of the guest that it just left, a
//!   halted CPU with GIF clear that takes no interrupt, an interrupt taken with IF clear: all come
//!   from it. It is mended by leaving IGNNE# alone; only DOS asks.
//! - **An interrupt is taken twice.** VMRUN delivers an interrupt that is to be injected at once,
//!   but also leaves its vector behind as the exception that its CPU's loop takes next. Most ways
//!   out of the guest overwrite it. A request to leave the loop that comes with no interrupt (the
//!   memory map has changed, a grace period of RCU waits) does not: the guest takes the interrupt
//!   again, between any two of its instructions. It is mended by not leaving the vector behind.
//! - **An interrupt is lost.** VMRUN with `V_IRQ` sets a bit in the word of the CPU's pending
//!   requests, to which other threads add theirs at any time, neither under their lock nor
//!   atomically. It is mended by setting the bit atomically.

use std::ops::Range;

/// A row of bytes; `None` where any may stand.
type Row = [Option<u8>];

const fn b(byte: u8) -> Option<u8> {
    Some(byte)
}
const ANY: Option<u8> = None;

/// In VMRUN: `mov %r13d, error_code(%rbx)`, `mov %esi, exception_index(%rbx)`,
/// `movl $0, exception_is_int(%rbx)`, `movq $-1, exception_next_eip(%rbx)`.
#[rustfmt::skip]
const VECTOR: &Row = &[
    b(0x44), b(0x89), b(0xab), ANY, ANY, ANY, ANY,
    b(0x89), b(0xb3), ANY, ANY, ANY, ANY,
    b(0xc7), b(0x83), ANY, ANY, ANY, ANY, b(0), b(0), b(0), b(0),
    b(0x48), b(0xc7), b(0x83), ANY, ANY, ANY, ANY, b(0xff), b(0xff), b(0xff), b(0xff),
];
/// Where the vector is stored in that row.
const VECTOR_STORE: Range<usize> = 7..13;

/// `andl $~HF2_IGNNE, hflags2(%rax)`, for another CPU's state than the one that runs.
#[rustfmt::skip]
const IGNNE: &Row = &[b(0x81), b(0xa0), ANY, ANY, ANY, ANY, b(0x7f), b(0xff), b(0xff), b(0xff)];

/// In VMRUN, before the vector: `orl $CPU_INTERRUPT_VIRQ, interrupt_request(%rbx)`.
#[rustfmt::skip]
const VIRQ: &Row = &[b(0x81), b(0x8b), ANY, ANY, ANY, ANY, b(0), b(1), b(0), b(0)];
/// How far before.
const VIRQ_BEFORE: usize = 0x400;

/// Instructions of 6, 10 and 2 bytes that do nothing.
const NOTHING_6: [u8; 6] = [0x66, 0x0f, 0x1f, 0x44, 0, 0];
const NOTHING_10: [u8; 10] = [0x66, 0x2e, 0x0f, 0x1f, 0x84, 0, 0, 0, 0, 0];
const NOTHING_2: [u8; 2] = [0x66, 0x90];

/// How many faults there are to mend.
pub const FAULTS: usize = 3;

/// Bytes to write, and where.
type Change = (usize, Vec<u8>);

/// The one place of `row` in `program[range]`; `None` where there is none, or more than one, so that
/// it is not known which.
fn only(program: &[u8], range: Range<usize>, row: &Row) -> Option<usize> {
    let first = row.first().copied().flatten()?;
    let part = program.get(range.clone())?;
    let mut places = part.windows(row.len()).enumerate().filter(|(_, bytes)| {
        // Most are told apart by their first byte.
        bytes.first() == Some(&first)
            && bytes
                .iter()
                .zip(row)
                .all(|(have, want)| want.is_none_or(|want| want == *have))
    });
    let (at, _) = places.next()?;
    places.next().is_none().then_some(range.start + at)
}

/// The offset that an instruction has at `at`, little-endian.
fn offset(program: &[u8], at: usize) -> Option<i32> {
    Some(i32::from_le_bytes(
        program.get(at..at.checked_add(4)?)?.try_into().ok()?,
    ))
}

fn changes(program: &[u8]) -> Vec<Change> {
    let whole = 0..program.len();
    let ignne = only(program, whole.clone(), IGNNE).map(|at| (at, NOTHING_10.to_vec()));
    let vector = only(program, whole, VECTOR).filter(|at| {
        // The three of the CPU's state lie beside each other; the vector does not.
        let place = |within: usize| offset(program, at + within).map(i64::from);
        place(3)
            .zip(place(15))
            .is_some_and(|(code, is_int)| is_int == code + 4)
            && place(15)
                .zip(place(26))
                .is_some_and(|(is_int, next)| next == is_int + 4)
    });
    let store = vector.map(|at| (at + VECTOR_STORE.start, NOTHING_6.to_vec()));
    // Where the vector is, mended or not, is in VMRUN; so many bytes before it has to be.
    let virq = in_vmrun(program).and_then(|vector| {
        let at = only(program, vector.saturating_sub(VIRQ_BEFORE)..vector, VIRQ)?;
        // `lock orb $1, interrupt_request + 1(%rbx)`: the same bit, in two bytes less.
        let byte = offset(program, at + 2)?.checked_add(1)?;
        let mut bytes = vec![0xf0, 0x80, 0x8b];
        bytes.extend(byte.to_le_bytes());
        bytes.push(1);
        bytes.extend(NOTHING_2);
        Some((at, bytes))
    });
    [ignne, store, virq].into_iter().flatten().collect()
}

/// Where VMRUN begins to inject an interrupt, whether or not it still leaves the vector behind.
fn in_vmrun(program: &[u8]) -> Option<usize> {
    let mut mended = VECTOR.to_vec();
    for (byte, nothing) in mended.get_mut(VECTOR_STORE)?.iter_mut().zip(NOTHING_6) {
        *byte = Some(nothing);
    }
    let whole = 0..program.len();
    only(program, whole.clone(), VECTOR).or_else(|| only(program, whole, &mended))
}

/// Takes the faults out of `program`, the bytes of QEMU's executable, that are found in it; says how many of [`FAULTS`].
pub fn mend(program: &mut [u8]) -> usize {
    let changes = changes(program);
    for (at, bytes) in &changes {
        if let Some(place) = program.get_mut(*at..*at + bytes.len()) {
            place.copy_from_slice(bytes);
        }
    }
    changes.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As QEMU 10.0.2 of Debian has them, each with what stands before and after.
    const SET_VIRQ: &[u8] = b"\x74\x0a\x81\x8b\x10\xd5\xff\xff\x00\x01\x00\x00\x48\x8b";
    const INJECT: &[u8] = b"\x41\x0f\xb6\xf4\x44\x89\xab\xe0\x33\x00\x00\x89\xb3\x10\xd7\xff\xff\
        \xc7\x83\xe4\x33\x00\x00\x00\x00\x00\x00\x48\xc7\x83\xe8\x33\x00\x00\xff\xff\xff\xff\
        \xf6\x05\x9a\xa7\x3c\x01\x02";
    const CLEAR_IGNNE: &[u8] = b"\xe8\x06\x5f\x14\x00\x81\xa0\x74\x2c\x00\x00\x7f\xff\xff\xff\x48";

    fn program() -> Vec<u8> {
        [
            &[0x90; 64],
            SET_VIRQ,
            &[0x90; 300],
            INJECT,
            &[0x90; 64],
            CLEAR_IGNNE,
            &[0x90; 64],
        ]
        .concat()
    }

    fn place(program: &[u8], of: &[u8]) -> usize {
        program
            .windows(of.len())
            .position(|bytes| bytes == of)
            .unwrap()
    }

    #[test]
    fn every_fault_is_mended_and_nothing_else_changes() {
        let mut mended = program();
        assert_eq!(mend(&mut mended), FAULTS);
        let mut want = program();
        let virq = place(&want, SET_VIRQ) + 2;
        want[virq..virq + 10].copy_from_slice(b"\xf0\x80\x8b\x11\xd5\xff\xff\x01\x66\x90");
        let vector = place(&want, INJECT) + 11;
        want[vector..vector + 6].copy_from_slice(&NOTHING_6);
        let ignne = place(&want, CLEAR_IGNNE) + 5;
        want[ignne..ignne + 10].copy_from_slice(&NOTHING_10);
        assert_eq!(mended, want);
        // Once is enough.
        assert_eq!(mend(&mut mended), 0);
        assert_eq!(mended, want);
    }

    #[test]
    fn what_is_not_the_known_row_or_is_there_twice_is_left_alone() {
        let vector = place(&program(), INJECT);
        for at in [4, 12, 17, 19, 28, 30, 34] {
            let mut other = program();
            other[vector + at] ^= 0x01;
            // Without it, VMRUN is not known, and what is before it neither.
            let before = other.clone();
            mend(&mut other);
            assert_eq!(
                other[vector..vector + INJECT.len()],
                before[vector..vector + INJECT.len()]
            );
        }
        let mut twice = [program(), program()].concat();
        assert_eq!(mend(&mut twice), 0);
        let mut other = program();
        other.extend(b"\x81\x8b\x10\x00\x00\x00\x00\x01\x00\x00");
        assert_eq!(mend(&mut other), FAULTS, "as much as there is elsewhere");
        assert_eq!(mend(&mut []), 0);
        assert_eq!(mend(&mut INJECT[..20].to_vec()), 0);
    }
}
