//! The configuration space that the guest sees of a real function: its own, with what must not
//! reach the hardware kept here, what VFIO hides put back, and what a guest cannot use taken out.
//!
//! A pure layer over the 4096 bytes of the function. Each bit is either *kept* (read and written
//! here) or the hardware's. VFIO protects the host in any case; what is decided here is what the
//! guest sees (A9 in `iommufd/linux.md`).
//!
//! | what | where |
//! |---|---|
//! | header: BARs, expansion ROM, capability pointer, interrupt pin and line, multi-function bit | kept |
//! | Command: decoding | kept, and written to the hardware too |
//! | MSI, MSI-X | kept, at their places |
//! | PCI Express: port type (integrated endpoint), links, End-End TLP prefix | kept |
//! | extended headers | kept: the list is relinked without what is hidden |
//! | ATS, PRI | kept (hardware ignores writes, and its status is the host's) |
//! | PASID | made here: VFIO hides it |
//! | SR-IOV, resizable BARs, ARI, TPH, DPC, … | hidden: they are the host's to use |
//! | everything else | the hardware's |
#![forbid(unsafe_code)]

use std::ops::RangeInclusive;

use crate::pci::{Bar, BarKind, Decoded, Space};

/// Bytes of configuration space.
pub const SIZE: usize = 4096;

const COMMAND: u16 = 0x04;
const STATUS: u16 = 0x06;
const HEADER_TYPE: u16 = 0x0e;
const BARS: u16 = 0x10;
const ROM: u16 = 0x30;
const CAPABILITIES: u16 = 0x34;
const INTERRUPT_LINE: u16 = 0x3c;
const INTERRUPT_PIN: u16 = 0x3d;
const EXTENDED: u16 = 0x100;

const COMMAND_IO: u16 = 1;
const COMMAND_MEMORY: u16 = 2;
/// Expansion ROM Enable.
const ROM_ENABLE: u32 = 1;
/// What an expansion ROM may have: its address has 21 bits at most.
const ROM_LENGTHS: RangeInclusive<u64> = 1 << 11..=1 << 24;
/// The number that the expansion ROM has beside the six registers, as VFIO counts.
pub const ROM_BAR: u8 = 6;

/// Standard capabilities that the guest sees.
mod standard {
    pub(super) const POWER: u8 = 0x01;
    pub(super) const VPD: u8 = 0x03;
    pub(super) const MSI: u8 = 0x05;
    pub(super) const VENDOR: u8 = 0x09;
    pub(super) const SUBSYSTEM: u8 = 0x0d;
    pub(super) const EXPRESS: u8 = 0x10;
    pub(super) const MSIX: u8 = 0x11;
    pub(super) const ADVANCED: u8 = 0x13;
    pub(super) const SEEN: [u8; 8] = [POWER, VPD, MSI, VENDOR, SUBSYSTEM, EXPRESS, MSIX, ADVANCED];
}

/// Extended capabilities that the guest sees as the hardware has them.
mod extended {
    pub(super) const AER: u16 = 0x01;
    pub(super) const VC: u16 = 0x02;
    pub(super) const SERIAL: u16 = 0x03;
    pub(super) const POWER_BUDGETING: u16 = 0x04;
    pub(super) const VENDOR: u16 = 0x0b;
    pub(super) const ACS: u16 = 0x0d;
    pub(super) const ATS: u16 = 0x0f;
    pub(super) const PRI: u16 = 0x13;
    pub(super) const LTR: u16 = 0x18;
    pub(super) const PASID: u16 = 0x1b;
    pub(super) const DVSEC: u16 = 0x23;
    pub(super) const SEEN: [u16; 8] = [AER, VC, SERIAL, POWER_BUDGETING, VENDOR, ACS, LTR, DVSEC];
}

/// What is offered to the guest beyond the plain function. Only behind a vIOMMU that has it too.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Offer {
    /// PASIDs, if the host gives this device any.
    pub pasid: Option<OfferedPasid>,
    /// Address translation services, if the device has them.
    pub ats: bool,
    /// Page requests, if the device has them.
    pub pri: bool,
    /// Interrupt pin (1: INTA); 0 for none.
    pub pin: u8,
}

/// A PASID capability.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct OfferedPasid {
    /// Bits of PASID.
    pub bits: u8,
    /// Execute permission.
    pub execute: bool,
    /// Privileged mode.
    pub privileged: bool,
    /// Where in extended space it is: a multiple of 4, 8 bytes that are no capability's.
    pub at: u16,
}

/// Where MSI is, and what it can do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct MsiPlace {
    /// Offset of the capability.
    pub at: u16,
    /// 64-bit addresses.
    pub wide: bool,
    /// Per-vector masking.
    pub maskable: bool,
    /// Vectors that the function asks for: 1 to 32.
    pub count: u16,
}

impl MsiPlace {
    /// Offset of the data register from the capability.
    pub fn data(&self) -> u16 {
        if self.wide { 12 } else { 8 }
    }

    /// Offset of the mask register from the capability.
    pub fn mask(&self) -> Option<u16> {
        self.maskable.then_some(self.data() + 4)
    }

    fn length(&self) -> u16 {
        match self.mask() {
            Some(mask) => mask + 8,
            None => self.data() + 2,
        }
    }
}

/// Where MSI-X is, and where its tables are.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct MsixPlace {
    /// Offset of the capability.
    pub at: u16,
    /// Vectors: 1 to 2048.
    pub count: u16,
    /// Base address register and offset of the table.
    pub table: (u8, u64),
    /// Base address register and offset of the pending bits.
    pub pending: (u8, u64),
}

impl MsixPlace {
    /// What is trapped of BAR `bar`: (offset, length).
    pub fn trapped(&self, bar: u8) -> Vec<(u64, u64)> {
        let count = u64::from(self.count);
        [
            (self.table, count * 16),
            (self.pending, count.div_ceil(64) * 8),
        ]
        .into_iter()
        .filter(|&((of, _), _)| of == bar)
        .map(|((_, offset), length)| (offset, length))
        .collect()
    }
}

/// What a write asks of the function.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Written {
    /// Decoding or a base address register changed.
    pub decode: bool,
    /// MSI's registers changed.
    pub msi: bool,
    /// MSI-X's control changed.
    pub msix: bool,
    /// A function-level reset was asked for.
    pub reset: bool,
    /// Write the same bytes to the hardware.
    pub hardware: bool,
}

/// The guest's view.
#[derive(Clone)]
pub struct GuestConfig {
    /// Values of what is kept.
    bytes: Box<[u8; SIZE]>,
    /// Bits that are kept.
    kept: Box<[u8; SIZE]>,
    /// Kept bits that the guest writes.
    writable: Box<[u8; SIZE]>,
    bars: Vec<Bar>,
    /// Bytes of the expansion ROM; 0 for none.
    rom: u64,
    msi: Option<MsiPlace>,
    msix: Option<MsixPlace>,
    pri: Option<u16>,
    /// Control word that starts a function-level reset, and its bit.
    resets: Vec<(u16, u16)>,
    /// Values after a reset.
    initial: Box<[u8; SIZE]>,
}

impl GuestConfig {
    /// The view of a function whose configuration space is `raw` and whose base address registers
    /// and expansion ROM have the lengths that VFIO says (0: none).
    pub fn new(raw: &[u8; SIZE], lengths: [u64; 7], offer: Offer) -> Self {
        let [bar_lengths @ .., rom] = lengths;
        let can_be = rom.is_power_of_two() && ROM_LENGTHS.contains(&rom);
        let mut view = Self {
            bytes: Box::new([0; SIZE]),
            kept: Box::new([0; SIZE]),
            writable: Box::new([0; SIZE]),
            bars: bars(raw, bar_lengths),
            rom: if can_be { rom } else { 0 },
            msi: None,
            msix: None,
            pri: None,
            resets: Vec::new(),
            initial: Box::new([0; SIZE]),
        };
        view.standard(raw, offer);
        view.header(raw, offer);
        view.extended(raw, offer);
        view.initial = view.bytes.clone();
        view
    }

    fn header(&mut self, raw: &[u8; SIZE], offer: Offer) {
        self.keep(
            COMMAND,
            &[0, 0],
            &(COMMAND_IO | COMMAND_MEMORY).to_le_bytes(),
        );
        // The other functions of the slot are not the guest's.
        self.keep_bits(
            HEADER_TYPE,
            &[raw[usize::from(HEADER_TYPE)] & 0x7f],
            &[0xff],
        );
        self.keep(BARS, &[0; 24], &[]);
        for bar in self.bars.clone() {
            let bytes = 4 * usize::from(bar.registers());
            self.keep(
                bar.offset(),
                &bar.flags().to_le_bytes()[..bytes],
                &bar.mask().to_le_bytes()[..bytes],
            );
        }
        let rom = match self.rom {
            0 => 0,
            length => !(length as u32 - 1) | ROM_ENABLE,
        };
        self.keep(ROM, &[0; 4], &rom.to_le_bytes());
        self.keep(INTERRUPT_LINE, &[0], &[0xff]);
        self.keep(INTERRUPT_PIN, &[offer.pin], &[]);
    }

    /// Relinks the standard capabilities, at their own places.
    fn standard(&mut self, raw: &[u8; SIZE], offer: Offer) {
        let mut last = CAPABILITIES;
        self.keep(CAPABILITIES, &[0], &[]);
        for (at, id) in standard_headers(raw) {
            if !standard::SEEN.contains(&id) {
                continue;
            }
            self.keep(last, &[at as u8], &[]);
            self.keep(at, &[id, 0], &[]);
            last = at + 1;
            match id {
                standard::MSI => self.msi(raw, at),
                standard::MSIX => self.msix(raw, at),
                standard::EXPRESS => self.express(raw, at, offer),
                standard::ADVANCED => self.resets.push((at + 4, 1)),
                _ => {}
            }
        }
    }

    fn msi(&mut self, raw: &[u8; SIZE], at: u16) {
        let control = word(raw, at + 2);
        let place = MsiPlace {
            at,
            wide: control & 1 << 7 != 0,
            maskable: control & 1 << 8 != 0,
            count: 1 << (control >> 1 & 7).min(5),
        };
        if at + place.length() > EXTENDED {
            return;
        }
        let mut value = vec![0; usize::from(place.length())];
        let mut mask = value.clone();
        let seen = control & 0x18e;
        value[2..4].copy_from_slice(&seen.to_le_bytes());
        mask[2..4].copy_from_slice(&0x71u16.to_le_bytes());
        mask[4..8].copy_from_slice(&(!3u32).to_le_bytes());
        if place.wide {
            mask[8..12].fill(0xff);
        }
        let data = usize::from(place.data());
        mask[data..data + 2].fill(0xff);
        if let Some(register) = place.mask() {
            let vectors = u32::MAX >> (32 - u32::from(place.count));
            let register = usize::from(register);
            mask[register..register + 4].copy_from_slice(&vectors.to_le_bytes());
        }
        self.keep(at + 2, &value[2..], &mask[2..]);
        self.msi = Some(place);
    }

    fn msix(&mut self, raw: &[u8; SIZE], at: u16) {
        if at + 12 > EXTENDED {
            return;
        }
        let place = |register: u16| {
            let dword = dword(raw, register);
            ((dword & 7) as u8, u64::from(dword & !7))
        };
        let msix = MsixPlace {
            at,
            count: (word(raw, at + 2) & 0x7ff) + 1,
            table: place(at + 4),
            pending: place(at + 8),
        };
        // A table outside of any register cannot be used.
        let fits = |(bar, offset): (u8, u64), length: u64| {
            self.bars
                .iter()
                .any(|of| of.index == bar && offset + length <= of.length)
        };
        let count = u64::from(msix.count);
        if !fits(msix.table, count * 16) || !fits(msix.pending, count.div_ceil(64) * 8) {
            return;
        }
        let size = (msix.count - 1).to_le_bytes();
        self.keep(at + 2, &size, &0xc000u16.to_le_bytes());
        self.msix = Some(msix);
    }

    fn express(&mut self, raw: &[u8; SIZE], at: u16, offer: Offer) {
        let capabilities = word(raw, at + 2);
        // On bus 0 an endpoint is an integrated one (type 9): that is what a guest gives PASIDs,
        // ATS and page requests without looking for a port above.
        if at + 2 <= EXTENDED && capabilities >> 4 & 0xf <= 1 {
            let integrated = capabilities & !0xf0 | 9 << 4;
            self.keep(at + 2, &integrated.to_le_bytes(), &[]);
            // It has no link and no slot.
            if at + 0x1c <= EXTENDED {
                self.keep(at + 0x0c, &[0; 0x10], &[]);
            }
        }
        if dword(raw, at + 4) & 1 << 28 != 0 {
            self.resets.push((at + 8, 1 << 15));
        }
        // End-End TLP prefixes carry PASIDs.
        if offer.pasid.is_some() && capabilities & 0xf >= 2 && at + 0x28 <= EXTENDED {
            let has = raw[usize::from(at) + 0x26] | 1 << 5;
            self.keep(at + 0x26, &[has], &[]);
        }
    }

    /// Relinks the extended capabilities, at their own places, with PASID added.
    fn extended(&mut self, raw: &[u8; SIZE], offer: Offer) {
        let mut chain = Vec::new();
        let all = extended_headers(raw);
        for &(at, header) in &all {
            let (id, version) = ((header & 0xffff) as u16, (header >> 16 & 0xf) as u8);
            let shown = match id {
                extended::ATS => offer.ats && self.ats(raw, at),
                extended::PRI => offer.pri && self.pri(raw, at),
                id => extended::SEEN.contains(&id),
            };
            if shown {
                chain.push((at, id, version));
            } else {
                // Not the header alone: nothing of what is hidden is to be found by chance.
                self.keep(at, &[0; 8], &[]);
            }
        }
        if let Some(pasid) = offer.pasid {
            self.pasid(pasid);
            chain.push((pasid.at, extended::PASID, 1));
        }
        // The list begins at 0x100, with an empty entry where nothing else is there.
        if !chain.is_empty() && chain.iter().all(|&(at, ..)| at != EXTENDED) {
            chain.push((EXTENDED, 0, 0));
        }
        chain.sort_unstable();
        for (index, &(at, id, version)) in chain.iter().enumerate() {
            let next = chain.get(index + 1).map_or(0, |&(next, ..)| next);
            let header = u32::from(id) | u32::from(version) << 16 | u32::from(next) << 20;
            self.keep(at, &header.to_le_bytes(), &[]);
        }
        if chain.is_empty() {
            self.keep(EXTENDED, &[0; 4], &[]);
        }
    }

    fn ats(&mut self, raw: &[u8; SIZE], at: u16) -> bool {
        if usize::from(at) + 8 > SIZE {
            return false;
        }
        // Page Aligned Request: without it Linux does not enable ATS behind VT-d.
        let capability = word(raw, at + 4) | 1 << 5;
        self.keep(at + 4, &capability.to_le_bytes(), &[]);
        self.keep(at + 6, &[0, 0], &0x801fu16.to_le_bytes());
        true
    }

    fn pri(&mut self, raw: &[u8; SIZE], at: u16) -> bool {
        if usize::from(at) + 16 > SIZE {
            return false;
        }
        self.keep(at + 4, &[0, 0], &1u16.to_le_bytes());
        // Stopped, and responses carry the PASID. The hardware's own status is the host's, which
        // has page requests on: a guest would take it for a device that does not stop.
        self.keep(at + 6, &(PRI_STOPPED | 1 << 15).to_le_bytes(), &[]);
        self.keep(at + 8, &raw[usize::from(at) + 8..usize::from(at) + 12], &[]);
        self.keep(at + 12, &[0; 4], &[0xff; 4]);
        self.pri = Some(at);
        true
    }

    fn pasid(&mut self, pasid: OfferedPasid) {
        let at = pasid.at;
        let flags = u16::from(pasid.execute) << 1 | u16::from(pasid.privileged) << 2;
        let capability = flags | u16::from(pasid.bits.min(20)) << 8;
        self.keep(at + 4, &capability.to_le_bytes(), &[]);
        self.keep(at + 6, &[0, 0], &(1 | flags).to_le_bytes());
    }

    /// Keeps bytes: `value`, of which the guest writes `writable` (as long or shorter).
    fn keep(&mut self, at: u16, value: &[u8], writable: &[u8]) {
        let all = vec![0xff; value.len()];
        let kept = if at == COMMAND { writable } else { &all };
        self.keep_bits(at, value, kept);
        for (to, mask) in self.writable.iter_mut().skip(at.into()).zip(writable) {
            *to = *mask;
        }
    }

    fn keep_bits(&mut self, at: u16, value: &[u8], kept: &[u8]) {
        let start = usize::from(at).min(SIZE);
        for (offset, (value, kept)) in (start..SIZE).zip(value.iter().zip(kept)) {
            self.bytes[offset] = *value;
            self.kept[offset] |= *kept;
            self.writable[offset] = 0;
        }
    }

    /// MSI, if the function has it.
    pub fn msi_place(&self) -> Option<MsiPlace> {
        self.msi
    }

    /// MSI-X, if the function has it.
    pub fn msix_place(&self) -> Option<MsixPlace> {
        self.msix
    }

    /// Whether all of what is read is kept, so that the hardware need not be asked.
    pub fn is_kept(&self, offset: u16, length: usize) -> bool {
        let start = usize::from(offset).min(SIZE);
        let end = (start + length).min(SIZE);
        self.kept[start..end].iter().all(|&kept| kept == 0xff)
    }

    /// Puts what is kept over `data`, which the hardware has at `offset`.
    pub fn overlay(&self, offset: u16, data: &mut [u8]) {
        let start = usize::from(offset).min(SIZE);
        for (at, byte) in (start..SIZE).zip(data) {
            *byte = *byte & !self.kept[at] | self.bytes[at] & self.kept[at];
        }
    }

    /// The guest writes.
    pub fn write(&mut self, offset: u16, data: &[u8]) -> Written {
        let start = usize::from(offset).min(SIZE);
        let end = (start + data.len()).min(SIZE);
        for (at, new) in (start..end).zip(data) {
            let mask = self.writable[at];
            self.bytes[at] = self.bytes[at] & !mask | new & mask;
        }
        let touches = |from: u16, to: u16| start < usize::from(to) && usize::from(from) < end;
        let set = |at: u16, bit: u16| {
            let byte = usize::from(at) + usize::from(bit > 0xff);
            let bit = if bit > 0xff { bit >> 8 } else { bit } as u8;
            byte.checked_sub(start)
                .and_then(|index| data.get(index))
                .is_some_and(|new| new & bit != 0)
        };
        if let Some(pri) = self.pri
            && touches(pri + 4, pri + 6)
        {
            let enabled = self.bytes[usize::from(pri) + 4] & 1 != 0;
            let status = usize::from(pri) + 7;
            // Stopped as soon as it is disabled: what was under way is the host's to answer.
            let stopped = (PRI_STOPPED >> 8) as u8;
            self.bytes[status] = self.bytes[status] & !stopped | if enabled { 0 } else { stopped };
        }
        Written {
            decode: touches(COMMAND, COMMAND + 2)
                || touches(BARS, BARS + 24)
                || touches(ROM, ROM + 4),
            msi: self
                .msi
                .is_some_and(|msi| touches(msi.at + 2, msi.at + msi.length())),
            msix: self
                .msix
                .is_some_and(|msix| touches(msix.at + 2, msix.at + 4)),
            reset: self.resets.iter().any(|&(at, bit)| set(at, bit)),
            // Command is kept in part, and the hardware is to follow it.
            hardware: touches(COMMAND, COMMAND + 2) || (start..end).any(|at| self.kept[at] != 0xff),
        }
    }

    /// A word as the guest sees it, of what is kept.
    pub fn word(&self, at: u16) -> u16 {
        word(&self.bytes, at)
    }

    /// A double word as the guest sees it, of what is kept.
    pub fn dword(&self, at: u16) -> u32 {
        dword(&self.bytes, at)
    }

    /// Sets bytes that are kept, as the function.
    pub fn set(&mut self, at: u16, data: &[u8]) {
        for (byte, new) in self.bytes.iter_mut().skip(at.into()).zip(data) {
            *byte = *new;
        }
    }

    /// The base address registers and their addresses.
    pub fn bars(&self) -> Vec<(Bar, u64)> {
        let with = |bar: &Bar| (*bar, self.address(bar));
        self.bars.iter().map(with).collect()
    }

    /// The ranges that are answered. The expansion ROM is among them while it is enabled.
    pub fn decoded(&self) -> Vec<Decoded> {
        let command = self.word(COMMAND);
        let on = |bar: &&Bar| match bar.space() {
            Space::Mmio => command & COMMAND_MEMORY != 0,
            Space::Pio => command & COMMAND_IO != 0,
        };
        let bars = self.bars.iter().filter(on).map(|bar| Decoded {
            space: bar.space(),
            base: self.address(bar),
            length: bar.length,
            bar: bar.index,
        });
        let rom = self.dword(ROM);
        let rom_is_on = self.rom != 0 && command & COMMAND_MEMORY != 0 && rom & ROM_ENABLE != 0;
        let rom = rom_is_on.then(|| Decoded {
            space: Space::Mmio,
            base: u64::from(rom & !ROM_ENABLE),
            length: self.rom,
            bar: ROM_BAR,
        });
        bars.chain(rom).collect()
    }

    /// Puts a register at `address`.
    pub fn assign(&mut self, index: u8, address: u64) {
        let Some(bar) = self.bars.iter().find(|bar| bar.index == index).copied() else {
            return;
        };
        let value = (address & bar.mask() | bar.flags()).to_le_bytes();
        self.set(bar.offset(), &value[..4 * usize::from(bar.registers())]);
    }

    fn address(&self, bar: &Bar) -> u64 {
        let low = u64::from(self.dword(bar.offset()));
        let high = match bar.registers() {
            2 => u64::from(self.dword(bar.offset() + 4)),
            _ => 0,
        };
        (high << 32 | low) & bar.mask()
    }

    /// Back to the values after power-on.
    pub fn reset(&mut self) {
        self.bytes = self.initial.clone();
    }
}

/// Page Request Status: Stopped.
const PRI_STOPPED: u16 = 1 << 8;

fn word(bytes: &[u8; SIZE], at: u16) -> u16 {
    let at = usize::from(at);
    let two = bytes.get(at..).and_then(|rest| rest.first_chunk());
    two.map_or(0, |two| u16::from_le_bytes(*two))
}

fn dword(bytes: &[u8; SIZE], at: u16) -> u32 {
    let at = usize::from(at);
    let four = bytes.get(at..).and_then(|rest| rest.first_chunk());
    four.map_or(0, |four| u32::from_le_bytes(*four))
}

/// Whether the function has both ATS and PRI. Virtual functions have neither of their own.
pub fn has_page_requests(raw: &[u8; SIZE]) -> bool {
    let (mut ats, mut pri) = (false, false);
    for (_, header) in extended_headers(raw) {
        match (header & 0xffff) as u16 {
            extended::ATS => ats = true,
            extended::PRI => pri = true,
            _ => {}
        }
    }
    ats && pri
}

/// The standard capabilities: offset and ID. 48 fit; the list of a broken device can be a circle.
fn standard_headers(raw: &[u8; SIZE]) -> Vec<(u16, u8)> {
    let mut found: Vec<(u16, u8)> = Vec::new();
    let has_list = raw[usize::from(STATUS)] & 1 << 4 != 0;
    let mut next = if has_list {
        raw[usize::from(CAPABILITIES)] & 0xfc
    } else {
        0
    };
    while next >= 0x40 && found.len() < 48 && found.iter().all(|&(at, _)| at != u16::from(next)) {
        found.push((next.into(), raw[usize::from(next)]));
        next = raw[usize::from(next) + 1] & 0xfc;
    }
    found
}

/// Whether the function is a PCI Express one.
pub(super) fn has_express(raw: &[u8; SIZE]) -> bool {
    let mut capabilities = standard_headers(raw).into_iter();
    capabilities.any(|(_, id)| id == standard::EXPRESS)
}

/// The extended capabilities: offset and header. As many as fit, each once: the list of a broken
/// device can be a circle.
pub(super) fn extended_headers(raw: &[u8; SIZE]) -> Vec<(u16, u32)> {
    let mut found: Vec<(u16, u32)> = Vec::new();
    let mut at = EXTENDED;
    while at >= EXTENDED && found.len() < 960 && found.iter().all(|&(seen, _)| seen != at) {
        let header = dword(raw, at);
        if header == 0 || header == u32::MAX {
            break;
        }
        found.push((at, header));
        at = (header >> 20) as u16 & 0xffc;
    }
    found
}

/// The registers: kind from the raw value, length from VFIO.
fn bars(raw: &[u8; SIZE], lengths: [u64; 6]) -> Vec<Bar> {
    let mut bars = Vec::new();
    let mut index = 0;
    while index < 6 {
        let register = dword(raw, BARS + 4 * u16::from(index));
        let kind = match (register & 1, register >> 1 & 3) {
            (1, _) => BarKind::Io,
            (_, 2) => BarKind::Memory64,
            _ => BarKind::Memory32,
        };
        let bar = Bar {
            index,
            kind,
            prefetchable: kind != BarKind::Io && register & 1 << 3 != 0,
            length: lengths[usize::from(index)],
        };
        if bar.length != 0 && bar.is_valid() {
            bars.push(bar);
            index += bar.registers();
        } else {
            index += 1;
        }
    }
    bars
}

#[cfg(test)]
#[path = "config_tests.rs"]
pub(super) mod tests;
