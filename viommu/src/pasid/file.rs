//! The file: what its bytes mean, and who holds which locks on it.
//!
//! Locks and contents share offsets by accident only. Locks are the truth; the contents say who.
//!
//! | lock on byte | means |
//! |---|---|
//! | 0 to 0xf_ffff | that PASID is owned |
//! | 0x10_0000 + seat | that seat is taken: one VM that may own PASIDs |
//!
//! | contents at | what |
//! |---|---|
//! | 0 | [`HEADER`] |
//! | 4096 + 256 seat | the [`Owner`] on that seat, written once, under its lock |
//! | 0x10_1000 + 8 PASID | the [`Slot`] of that PASID, written under its lock |
//!
//! A VM may die between any two writes, so contents are believed only where they agree: a slot
//! counts when its seat is locked and of the same *generation* (which grows each time the seat is
//! taken), and a seat's record when its checksum is right. What does not agree is listed as held
//! by somebody unknown, for the moment that it takes its holder to write.

#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::Error;
use super::locks::{self, Range};
use crate::Pasid;

/// Where the file is unless the user says otherwise.
pub const DEFAULT_DIRECTORY: &str = "/run/nestling";
/// The file's name in its directory.
pub const FILE_NAME: &str = "pasids";

/// How many VMs one file can have.
pub(super) const SEATS: u32 = 4096;

const HEADER: [u8; 16] = *b"nestling-pasids1";
const SEAT_LOCKS: u32 = 1 << Pasid::BITS;
const SEATS_AT: u64 = 4096;
const SEAT_SIZE: usize = 256;
const SLOTS_AT: u64 = SEATS_AT + SEATS as u64 * SEAT_SIZE as u64;
const SLOT_SIZE: usize = 8;
const FILE_SIZE: u64 = SLOTS_AT + ((SLOT_SIZE as u64) << Pasid::BITS);
/// An owner's name is cut to this, in bytes.
const NAME_MAX: usize = 128;

/// Who is on a seat.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Owner {
    /// The VM's name.
    pub name: String,
    /// Its process, as it sees itself (in a container, not as the host sees it).
    pub pid: u32,
}

/// The PASIDs of one owner.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Holder {
    /// Who; `None` while it has taken PASIDs but not yet said who it is.
    pub owner: Option<Owner>,
    /// What it owns, as first and last of each range, ascending.
    pub ranges: Vec<(u32, u32)>,
    /// How many PASIDs that is.
    pub owned: u32,
    /// How many of them its guest uses; the others it keeps for the next allocations.
    pub in_use: u32,
}

/// What is known of one PASID: on which seat its owner is, of which generation, and whether the
/// owner's guest uses it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Slot {
    pub(super) seat: Seat,
    pub(super) in_use: bool,
}

impl Slot {
    // Bits 15:0 seat, 16 in use, 17 valid, 63:18 generation.
    fn encode(self) -> [u8; SLOT_SIZE] {
        let seat = u64::from(self.seat.number) | self.seat.generation << 18;
        (seat | u64::from(self.in_use) << 16 | 1 << 17).to_le_bytes()
    }

    fn decode(bytes: [u8; SLOT_SIZE]) -> Option<Self> {
        let raw = u64::from_le_bytes(bytes);
        let seat = Seat {
            number: raw as u16,
            generation: raw >> 18,
        };
        (raw & 1 << 17 != 0).then_some(Self {
            seat,
            in_use: raw & 1 << 16 != 0,
        })
    }
}

/// One taking of a seat.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) struct Seat {
    pub(super) number: u16,
    /// 46 bits.
    generation: u64,
}

const GENERATION_MASK: u64 = (1 << 46) - 1;

/// FNV-1a: not against malice, against a record that was half written.
fn checksum(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, &byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3)
    })
}

// 0 checksum of the rest, 8 generation, 16 pid, 20 length of the name, 24 name.
fn encode_seat(generation: u64, owner: &Owner) -> [u8; SEAT_SIZE] {
    let mut cut = owner.name.len().min(NAME_MAX);
    while !owner.name.is_char_boundary(cut) {
        cut -= 1;
    }
    let mut record = [0; SEAT_SIZE];
    record[8..16].copy_from_slice(&generation.to_le_bytes());
    record[16..20].copy_from_slice(&owner.pid.to_le_bytes());
    record[20..24].copy_from_slice(&(cut as u32).to_le_bytes());
    record[24..24 + cut].copy_from_slice(&owner.name.as_bytes()[..cut]);
    let sum = checksum(&record[8..]);
    record[..8].copy_from_slice(&sum.to_le_bytes());
    record
}

fn decode_seat(record: &[u8; SEAT_SIZE]) -> Option<(u64, Owner)> {
    let (sum, rest) = record.split_first_chunk()?;
    if u64::from_le_bytes(*sum) != checksum(rest) {
        return None;
    }
    let (generation, rest) = rest.split_first_chunk()?;
    let (pid, rest) = rest.split_first_chunk()?;
    let (length, rest) = rest.split_first_chunk()?;
    let name = rest.get(..u32::from_le_bytes(*length) as usize)?;
    let name = String::from_utf8_lossy(name);
    let owner = Owner {
        // Whoever wrote it, it is going to a terminal.
        name: name.replace(char::is_control, "?"),
        pid: u32::from_le_bytes(*pid),
    };
    Some((u64::from_le_bytes(*generation), owner))
}

/// The open file.
#[derive(Debug)]
pub(super) struct PasidFile {
    file: File,
    path: PathBuf,
}

impl PasidFile {
    /// Opens the file in `directory`, making it if it is not there.
    pub(super) fn open(directory: &Path) -> Result<Self, Error> {
        let path = directory.join(FILE_NAME);
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o660)
            .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
            .open(&path);
        let file = file.map_err(|error| match error.kind() {
            ErrorKind::NotFound | ErrorKind::NotADirectory => {
                Error::NoDirectory(directory.to_owned())
            }
            _ if error.raw_os_error() == Some(libc::ELOOP) => Error::NotOurs(path.clone()),
            _ => refused("open", &path, error),
        })?;
        let this = Self { file, path };
        let meta = this.file.metadata().map_err(|e| this.error("inspect", e))?;
        if !meta.is_file() {
            return Err(Error::NotOurs(this.path.clone()));
        }
        // Many VMs may do this at once: they all write the same, and the header first, so that
        // nobody sees a file of full size without it.
        match meta.len() {
            0 => this.write(0, &HEADER)?,
            _ => this.check_header()?,
        }
        if meta.len() < FILE_SIZE {
            let sized = this.file.set_len(FILE_SIZE);
            sized.map_err(|e| this.error("size", e))?;
        }
        Ok(this)
    }

    /// Opens the file to list it; `None` when no VM ever made it.
    fn open_to_list(directory: &Path) -> Result<Option<Self>, Error> {
        let path = directory.join(FILE_NAME);
        let file = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
            .open(&path);
        let this = match file {
            Ok(file) => Self { file, path },
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(refused("open", &path, error)),
        };
        let empty = this
            .file
            .metadata()
            .map_err(|e| this.error("inspect", e))?
            .len()
            == 0;
        if empty {
            return Ok(None);
        }
        this.check_header()?;
        Ok(Some(this))
    }

    fn check_header(&self) -> Result<(), Error> {
        let mut header = [0; HEADER.len()];
        match self.read(0, &mut header)? && header == HEADER {
            true => Ok(()),
            false => Err(Error::NotOurs(self.path.clone())),
        }
    }

    fn error(&self, verb: &'static str, source: io::Error) -> Error {
        refused(verb, &self.path, source)
    }

    /// `false`: the file ends there.
    fn read(&self, at: u64, bytes: &mut [u8]) -> Result<bool, Error> {
        match self.file.read_exact_at(bytes, at) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == ErrorKind::UnexpectedEof => Ok(false),
            Err(error) => Err(self.error("read", error)),
        }
    }

    fn write(&self, at: u64, bytes: &[u8]) -> Result<(), Error> {
        let written = self.file.write_all_at(bytes, at);
        written.map_err(|error| self.error("write", error))
    }

    /// That VMs which start now still see our locks.
    pub(super) fn check_in_place(&self) -> Result<(), Error> {
        let open = self.file.metadata().map_err(|e| self.error("inspect", e))?;
        let there = std::fs::symlink_metadata(&self.path);
        let same =
            |there: &std::fs::Metadata| (there.dev(), there.ino()) == (open.dev(), open.ino());
        match there {
            // A sandbox that hides the path leaves the link count as the only witness.
            Err(_) if open.nlink() != 0 => Ok(()),
            Ok(there) if same(&there) => Ok(()),
            _ => Err(Error::Removed(self.path.clone())),
        }
    }

    /// Takes the first free seat for `owner`.
    pub(super) fn take_seat(&self, owner: &Owner) -> Result<Seat, Error> {
        let most = SEAT_LOCKS + SEATS - 1;
        let mut at = SEAT_LOCKS;
        while at <= most {
            let one = Range::new(at, at);
            if !self.try_lock(one)? {
                at = self
                    .conflict(one)?
                    .map_or(at, |taken| taken.last)
                    .saturating_add(1);
                continue;
            }
            let number = (at - SEAT_LOCKS) as u16;
            let place = SEATS_AT + u64::from(number) * SEAT_SIZE as u64;
            let mut old = [0; 8];
            self.read(place + 8, &mut old)?;
            let generation = u64::from_le_bytes(old).wrapping_add(1) & GENERATION_MASK;
            self.write(place, &encode_seat(generation, owner))?;
            return Ok(Seat { number, generation });
        }
        Err(Error::NoSeat {
            path: self.path.clone(),
            most: SEATS,
        })
    }

    /// Owns all of `range`, or nothing (`false`).
    pub(super) fn try_lock(&self, range: Range) -> Result<bool, Error> {
        locks::try_lock(&self.file, range).map_err(|e| self.error("lock a range of", e))
    }

    /// Owns `range` no more.
    pub(super) fn unlock(&self, range: Range) -> Result<(), Error> {
        locks::unlock(&self.file, range).map_err(|e| self.error("unlock a range of", e))
    }

    /// Something in `range` that another owns.
    pub(super) fn conflict(&self, range: Range) -> Result<Option<Range>, Error> {
        locks::conflict(&self.file, range).map_err(|e| self.error("query the locks of", e))
    }

    /// Says the same of every PASID in `range`.
    pub(super) fn set_slots(&self, range: Range, slot: Slot) -> Result<(), Error> {
        let at = SLOTS_AT + u64::from(range.first) * SLOT_SIZE as u64;
        self.write(at, &slot.encode().repeat(range.len() as usize))
    }

    /// Every lock of others in `range`, ascending. Costs two calls per lock.
    fn locks_of_others(&self, range: Range) -> Result<Vec<Range>, Error> {
        let (mut found, mut rest) = (Vec::new(), vec![range]);
        while let Some(part) = rest.pop() {
            let Some(lock) = self.conflict(part)? else {
                continue;
            };
            let lock = lock.cut_to(part);
            found.push(lock);
            if lock.first > part.first {
                rest.push(Range::new(part.first, lock.first - 1));
            }
            if lock.last < part.last {
                rest.push(Range::new(lock.last + 1, part.last));
            }
        }
        found.sort_unstable_by_key(|range| range.first);
        Ok(found)
    }
}

impl Drop for PasidFile {
    /// Closing would unlock too, but not while a child process that is just being started has
    /// the same open file.
    fn drop(&mut self) {
        if let Err(error) = self.unlock(Range::new(0, SEAT_LOCKS + SEATS - 1)) {
            log::warn!("locks stay until this process ends: {error}");
        }
    }
}

fn refused(verb: &'static str, path: &Path, source: io::Error) -> Error {
    let path = path.to_owned();
    match source.kind() {
        ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem => {
            Error::NoPermission { verb, path }
        }
        _ => Error::Host { verb, path, source },
    }
}

/// Who holds PASIDs of the file in `directory`, as far as this user may know; nobody where no VM
/// ever made one. PASIDs of an owner that is still starting may be listed with no owner.
///
/// # Errors
/// The file is there but cannot be read, or is something else.
pub fn holders(directory: &Path) -> Result<Vec<Holder>, Error> {
    let Some(file) = PasidFile::open_to_list(directory)? else {
        return Ok(Vec::new());
    };
    let mut owners = BTreeMap::new();
    for seats in file.locks_of_others(Range::new(SEAT_LOCKS, SEAT_LOCKS + SEATS - 1))? {
        for at in seats.first..=seats.last {
            let number = (at - SEAT_LOCKS) as u16;
            let mut record = [0; SEAT_SIZE];
            file.read(SEATS_AT + u64::from(number) * SEAT_SIZE as u64, &mut record)?;
            if let Some((generation, owner)) = decode_seat(&record) {
                owners.insert(Seat { number, generation }, owner);
            }
        }
    }
    let mut holders: BTreeMap<Option<Seat>, Holder> = BTreeMap::new();
    for range in file.locks_of_others(Range::new(0, Pasid::MAX.0))? {
        let mut slots = vec![0; range.len() as usize * SLOT_SIZE];
        file.read(
            SLOTS_AT + u64::from(range.first) * SLOT_SIZE as u64,
            &mut slots,
        )?;
        let (slots, _) = slots.as_chunks();
        for (pasid, slot) in (range.first..).zip(slots) {
            let slot = Slot::decode(*slot).filter(|slot| owners.contains_key(&slot.seat));
            let seat = slot.map(|slot| slot.seat);
            let holder = holders.entry(seat).or_insert_with(|| Holder {
                owner: seat.and_then(|seat| owners.get(&seat).cloned()),
                ranges: Vec::new(),
                owned: 0,
                in_use: 0,
            });
            holder.owned += 1;
            holder.in_use += u32::from(slot.is_some_and(|slot| slot.in_use));
            match holder.ranges.last_mut() {
                Some((_, last)) if *last + 1 == pasid => *last = pasid,
                _ => holder.ranges.push((pasid, pasid)),
            }
        }
    }
    Ok(holders.into_values().collect())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn an_owner_is_read_as_it_was_written(
            name in ".{0,200}", pid: u32, generation in 0..=GENERATION_MASK
        ) {
            let owner = Owner { name, pid };
            let (read_generation, read) = decode_seat(&encode_seat(generation, &owner)).unwrap();
            prop_assert_eq!((read_generation, read.pid), (generation, pid));
            prop_assert!(!read.name.contains(char::is_control));
            prop_assert!(owner.name.replace(char::is_control, "?").starts_with(&read.name));
        }

        #[test]
        fn a_record_that_was_half_written_is_nobodys(
            old in "[a-z]{1,99}", new in "[A-Z]{1,99}", generation in 1..99u64, torn in 1..120usize
        ) {
            let old = encode_seat(generation, &Owner { name: old, pid: 1 });
            let new = encode_seat(generation + 1, &Owner { name: new, pid: 2 });
            let mut mixed = old;
            mixed[..torn].copy_from_slice(&new[..torn]);
            // As far as it was written both may say the same.
            prop_assume!(mixed != new && mixed != old);
            prop_assert_eq!(decode_seat(&mixed), None);
        }

        #[test]
        fn a_slot_is_read_as_it_was_written(
            number: u16, generation in 0..=GENERATION_MASK, in_use: bool
        ) {
            let slot = Slot { seat: Seat { number, generation }, in_use };
            prop_assert_eq!(Slot::decode(slot.encode()), Some(slot));
        }

        #[test]
        fn any_bytes_are_a_record_or_not(bytes in prop::collection::vec(any::<u8>(), SEAT_SIZE)) {
            decode_seat(&bytes.try_into().unwrap());
        }
    }

    #[test]
    fn a_slot_of_a_new_file_is_nobodys() {
        assert_eq!(Slot::decode([0; SLOT_SIZE]), None);
        assert_eq!(decode_seat(&[0; SEAT_SIZE]), None);
    }
}
