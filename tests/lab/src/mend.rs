//! A fault of QEMU's emulated CPU, taken out of the copy that the lab runs.
//!
//! The helper for VMRUN delivers an interrupt that is to be injected at once, but it also leaves
//! the vector behind as the exception that its CPU's loop takes next. Most ways out of the guest
//! overwrite it. A request to leave the loop that comes with no interrupt (the memory map has
//! changed, a grace period of RCU waits) does not: then the guest takes the same interrupt again,
//! whether its interrupts are enabled or not, between any two instructions of it. A guest's kernel
//! that is interrupted where it cannot be ends in a triple fault, a lock that is never given back,
//! or with the tables of another process. Seen in QEMU 10.0.2, whose source still has it in 11.1.
//!
//! The store is one instruction in a row of four that nothing else in the program has, so it can be
//! found and be made to do nothing.

/// `mov %r13d, error_code(%rbx)`, `mov %esi, exception_index(%rbx)`, `movl $0, is_int(%rbx)`,
/// `movq $-1, next_eip(%rbx)`; `None` where an offset stands.
const ROW: &[Option<u8>] = &{
    const fn b(byte: u8) -> Option<u8> {
        Some(byte)
    }
    const ANY: Option<u8> = None;
    [
        b(0x44),
        b(0x89),
        b(0xab),
        ANY,
        ANY,
        ANY,
        ANY, // the error code
        b(0x89),
        b(0xb3),
        ANY,
        ANY,
        ANY,
        ANY, // the vector that is left behind
        b(0xc7),
        b(0x83),
        ANY,
        ANY,
        ANY,
        ANY,
        b(0),
        b(0),
        b(0),
        b(0), // no software interrupt
        b(0x48),
        b(0xc7),
        b(0x83),
        ANY,
        ANY,
        ANY,
        ANY,
        b(0xff),
        b(0xff),
        b(0xff),
        b(0xff),
    ]
};
/// Where the store of the vector begins in the row.
const STORE: usize = 7;
/// An instruction of its length that does nothing.
const NOTHING: [u8; 6] = [0x66, 0x0f, 0x1f, 0x44, 0x00, 0x00];

/// The one place in `program` where the vector is left behind; `None` where it is not to be found,
/// or more than once, so that it is not known which.
fn fault(program: &[u8]) -> Option<usize> {
    let is_row = |row: &[u8]| {
        let same = row
            .iter()
            .zip(ROW)
            .all(|(have, want)| want.is_none_or(|want| want == *have));
        let offset = |at: usize| {
            let bytes = row.get(at..at + 4)?.try_into().ok()?;
            Some(i32::from_le_bytes(bytes))
        };
        // The three of the CPU's state lie beside each other; the vector does not.
        same && offset(3)
            .zip(offset(15))
            .is_some_and(|(code, is_int)| is_int == code + 4)
            && offset(15)
                .zip(offset(26))
                .is_some_and(|(is_int, next)| next == is_int + 4)
    };
    let mut rows = program.windows(ROW.len()).enumerate().filter(|(_, row)| {
        // Most are told apart by their first byte.
        row.first() == Some(&0x44) && is_row(row)
    });
    match (rows.next(), rows.next()) {
        (Some((at, _)), None) => Some(at + STORE),
        _ => None,
    }
}

/// Whether the fault can be found in `program`, the bytes of QEMU's executable.
pub fn is_needed(program: &[u8]) -> bool {
    fault(program).is_some()
}

/// Takes the fault out of `program`; says whether it was there.
pub fn mend(program: &mut [u8]) -> bool {
    let store = fault(program).and_then(|at| program.get_mut(at..at + NOTHING.len()));
    store.map(|store| store.copy_from_slice(&NOTHING)).is_some()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As QEMU 10.0.2 of Debian has it, with what stands before and after.
    const VMRUN: [u8; 54] = [
        0x41, 0x0f, 0xb6, 0xf4, 0x44, 0x89, 0xab, 0xe0, 0x33, 0x00, 0x00, 0x89, 0xb3, 0x10, 0xd7,
        0xff, 0xff, 0xc7, 0x83, 0xe4, 0x33, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x48, 0xc7, 0x83,
        0xe8, 0x33, 0x00, 0x00, 0xff, 0xff, 0xff, 0xff, 0xf6, 0x05, 0x9a, 0xa7, 0x3c, 0x01, 0x02,
        0x0f, 0x85, 0x6c, 0x01, 0x00, 0x00, 0xba, 0x01, 0x00,
    ];

    #[test]
    fn the_vector_is_not_left_behind_and_nothing_else_changes() {
        let mut program = VMRUN.to_vec();
        assert!(is_needed(&program));
        assert!(mend(&mut program));
        let mut want = VMRUN;
        want[11..17].copy_from_slice(&NOTHING);
        assert_eq!(program, want);
        // Once is enough.
        assert!(!is_needed(&program));
        assert!(!mend(&mut program));
        assert_eq!(program, want);
    }

    #[test]
    fn a_program_that_is_another_or_has_it_twice_is_left_alone() {
        for at in [4, 12, 17, 19, 28, 30, 34] {
            let mut other = VMRUN.to_vec();
            other[at] ^= 0x01;
            let before = other.clone();
            assert!(!mend(&mut other), "byte {at}");
            assert_eq!(other, before);
        }
        let mut twice = [VMRUN, VMRUN].concat();
        assert!(!mend(&mut twice));
        assert!(!mend(&mut []));
        assert!(!mend(&mut VMRUN[..20].to_vec()));
    }
}
