//! Opens the files of a payload and recognizes what they are, before anything is loaded.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

use super::BootError;

/// What a kernel file is.
pub(super) enum Image {
    /// A bzImage with a 64-bit entry, as long as its header says.
    BzImage,
    /// An ELF file for x86-64 whose segments are in the file.
    Elf {
        /// One past the last guest-physical byte of its segments.
        end: u64,
    },
}

/// Opens a regular file and returns its length.
pub(super) fn open(what: &'static str, path: &Path) -> Result<(File, u64), BootError> {
    let unreadable = |source| BootError::Unreadable {
        what,
        path: path.into(),
        source,
    };
    let file = File::open(path).map_err(unreadable)?;
    let meta = file.metadata().map_err(unreadable)?;
    if !meta.is_file() {
        return Err(unreadable(std::io::Error::other(
            "it is not a regular file",
        )));
    }
    Ok((file, meta.len()))
}

/// Recognizes a kernel of `length` bytes.
pub(super) fn recognize(file: &mut File, path: &Path, length: u64) -> Result<Image, BootError> {
    let mut head = [0; 0x270];
    let got = read_at(file, path, 0, &mut head)?;
    if head[..4] == *b"\x7fELF" {
        return elf(file, path, length, &head[..64]);
    }
    let not = |why: &str| {
        Err(BootError::NotAKernel {
            path: path.into(),
            why: why.into(),
        })
    };
    if got < head.len() {
        return not("it is too short");
    }
    if head[0x202..0x206] != *b"HdrS" {
        return not("it has neither a bzImage header nor an ELF header");
    }
    // boot.rst, "The real-mode kernel header".
    let version = u16::from_le_bytes([head[0x206], head[0x207]]);
    let xloadflags = u16::from_le_bytes([head[0x236], head[0x237]]);
    if version < 0x20c || xloadflags & 1 == 0 {
        return not("it has no 64-bit entry");
    }
    let sectors = match head[0x1f1] {
        0 => 4,
        n => u64::from(n),
    };
    let paragraphs = u32::from_le_bytes([head[0x1f4], head[0x1f5], head[0x1f6], head[0x1f7]]);
    let needs = (sectors + 1) * 512 + u64::from(paragraphs) * 16;
    match length < needs {
        true => Err(BootError::Truncated {
            path: path.into(),
            has: length,
            needs,
        }),
        false => Ok(Image::BzImage),
    }
}

/// Checks an ELF header and its program headers (System V ABI, chapter 5): the loader trusts
/// their offsets.
fn elf(file: &mut File, path: &Path, length: u64, head: &[u8]) -> Result<Image, BootError> {
    const CLASS_64: u8 = 2;
    const LITTLE_ENDIAN: u8 = 1;
    const MACHINE_X86_64: u16 = 62;
    const HEADER: usize = 56;
    const PT_LOAD: u32 = 1;
    let not = |why: &str| BootError::NotAKernel {
        path: path.into(),
        why: why.into(),
    };
    let truncated = |needs| BootError::Truncated {
        path: path.into(),
        has: length,
        needs,
    };
    let half = |bytes: &[u8], at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
    let word = |bytes: &[u8], at: usize| u64::from_le_bytes(std::array::from_fn(|n| bytes[at + n]));
    if head[4] != CLASS_64 || head[5] != LITTLE_ENDIAN || half(head, 18) != MACHINE_X86_64 {
        return Err(not("it is an ELF file for another machine"));
    }
    let (table, count) = (word(head, 32), half(head, 56));
    if usize::from(half(head, 54)) != HEADER {
        return Err(not(
            "it is an ELF file with program headers of the wrong size",
        ));
    }
    let mut end = 0;
    for n in 0..u64::from(count) {
        let mut header = [0; HEADER];
        let at = table.saturating_add(n * HEADER as u64);
        if read_at(file, path, at, &mut header)? < HEADER {
            return Err(truncated(at.saturating_add(HEADER as u64)));
        }
        let [offset, physical, in_file, in_memory] = [8, 24, 32, 40].map(|at| word(&header, at));
        let needs = offset.saturating_add(in_file);
        if needs > length {
            return Err(truncated(needs));
        }
        if header[..4] == PT_LOAD.to_le_bytes() {
            end = end.max(physical.saturating_add(in_memory.max(in_file)));
        }
    }
    match end {
        0 => Err(not("it is an ELF file with nothing to load")),
        end => Ok(Image::Elf { end }),
    }
}

/// Reads as much of `buffer` as the file has at `offset`.
fn read_at(
    file: &mut File,
    path: &Path,
    offset: u64,
    buffer: &mut [u8],
) -> Result<usize, BootError> {
    let mut read = || {
        file.seek(SeekFrom::Start(offset))?;
        let mut done = 0;
        while done < buffer.len() {
            match file.read(&mut buffer[done..])? {
                0 => break,
                n => done += n,
            }
        }
        Ok(done)
    };
    read().map_err(|source| BootError::Unreadable {
        what: "kernel",
        path: path.into(),
        source,
    })
}
