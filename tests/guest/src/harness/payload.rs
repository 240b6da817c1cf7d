//! The smallest guest: an ELF file with a PVH entry whose first instructions write one byte to
//! the debug-exit port. Its whole life is the VMM's own part of a boot.

/// Where it is loaded and entered.
const BASE: u32 = 0x10_0000;
/// ELF notes of this type, with the name `Xen`, hold the physical address of the 32-bit entry.
const XEN_ELFNOTE_PHYS32_ENTRY: u32 = 18;
/// nestling's debug-exit port; QEMU's isa-debug-exit is put there as well.
pub const PORT: u16 = 0xf4;

/// The file. Under nestling it ends the VM with `status`; QEMU makes `2 * status + 1` of it.
pub fn exits_with(status: u8) -> Vec<u8> {
    let [low, high] = PORT.to_le_bytes();
    #[rustfmt::skip]
    let code = [
        0x66, 0xba, low, high, // mov dx, PORT
        0xb0, status,          // mov al, status
        0xee,                  // out dx, al
        0xf4,                  // 1: hlt
        0xeb, 0xfd,            // jmp 1b
    ];
    let note_at: u64 = 64 + 2 * 56;
    let mut note = Vec::new();
    for word in [4u32, 4, XEN_ELFNOTE_PHYS32_ENTRY] {
        note.extend(word.to_le_bytes());
    }
    note.extend(b"Xen\0");
    note.extend(BASE.to_le_bytes());
    let code_at: u64 = 0x1000;

    let mut file = vec![0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let half = |file: &mut Vec<u8>, value: u16| file.extend(value.to_le_bytes());
    half(&mut file, 2); // ET_EXEC
    half(&mut file, 62); // EM_X86_64
    file.extend(1u32.to_le_bytes());
    for value in [u64::from(BASE), 64, 0] {
        file.extend(value.to_le_bytes());
    }
    file.extend(0u32.to_le_bytes());
    for value in [64, 56, 2, 64, 0, 0] {
        half(&mut file, value);
    }
    let mut segment = |kind: u32, flags: u32, at: u64, address: u64, length: u64| {
        file.extend(kind.to_le_bytes());
        file.extend(flags.to_le_bytes());
        for value in [at, address, address, length, length, 4] {
            file.extend(value.to_le_bytes());
        }
    };
    segment(1, 7, code_at, u64::from(BASE), code.len() as u64); // PT_LOAD
    segment(4, 4, note_at, 0, note.len() as u64); // PT_NOTE
    file.extend(note);
    file.resize(code_at as usize, 0);
    file.extend(code);
    file
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_headers_point_at_the_note_and_the_code() {
        let file = exits_with(42);
        let word = |at: usize| u64::from_le_bytes(file[at..at + 8].try_into().unwrap());
        assert_eq!(word(24), u64::from(BASE), "entry");
        let (load, note) = (64, 64 + 56);
        assert_eq!(file[word(load + 8) as usize..][..2], [0x66, 0xba]);
        let note = &file[word(note + 8) as usize..];
        assert_eq!(&note[12..16], b"Xen\0");
        assert_eq!(note[16..20], BASE.to_le_bytes());
    }
}
