//! Configuration space: 4 KiB of bytes, each with the bits a guest may write.
//!
//! Section numbers are those of the PCI Express Base Specification 6.0.

#![forbid(unsafe_code)]

use std::fmt;

use thiserror::Error;

use super::bar::Bar;
use super::function::{Decoded, Effect, Space};

/// Bytes of configuration space that a function has.
pub const CONFIG_SIZE: usize = 4096;

/// First byte after the type 0 header: where standard capabilities go.
const CAPABILITIES: u16 = 0x40;
/// First byte of extended configuration space.
const EXTENDED: u16 = 0x100;

const COMMAND: u16 = 0x04;
const STATUS: u16 = 0x06;
const CAPABILITIES_POINTER: u16 = 0x34;
const INTERRUPT_LINE: u16 = 0x3c;

/// Command register: I/O Space Enable, Memory Space Enable, Bus Master Enable (7.5.1.1.3).
const COMMAND_IO: u16 = 1 << 0;
const COMMAND_MEMORY: u16 = 1 << 1;
const COMMAND_BUS_MASTER: u16 = 1 << 2;
/// Parity Error Response, SERR# Enable, Interrupt Disable: kept for the guest, no effect.
const COMMAND_KEPT: u16 = 1 << 6 | 1 << 8 | 1 << 10;
const STATUS_CAPABILITIES_LIST: u16 = 1 << 4;

/// Who a function is (7.5.1.1, 7.5.1.2).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Identity {
    /// Vendor ID.
    pub vendor: u16,
    /// Device ID.
    pub device: u16,
    /// Revision ID.
    pub revision: u8,
    /// Class Code, 24 bits: base class, sub-class, programming interface.
    pub class: u32,
    /// Subsystem Vendor ID.
    pub subsystem_vendor: u16,
    /// Subsystem ID.
    pub subsystem: u16,
}

/// Why a configuration space could not be built.
#[derive(Error, Clone, PartialEq, Eq, Debug)]
pub enum ConfigError {
    /// The list is full.
    #[error(
        "no room in configuration space for capability {id:#x} of {length} bytes: take another \
         capability out"
    )]
    NoRoom {
        /// The capability's ID.
        id: u16,
        /// Its length in bytes, header included.
        length: usize,
    },
    /// The register is not one, or is taken.
    #[error("base address register {0:?} is malformed or its registers are taken")]
    Bar(Bar),
}

/// The configuration space of one type 0 function.
#[derive(Clone)]
pub struct ConfigSpace {
    bytes: Box<[u8; CONFIG_SIZE]>,
    /// Bits that a guest's write replaces.
    writable: Box<[u8; CONFIG_SIZE]>,
    /// Bits that a guest's 1 clears.
    clearable: Box<[u8; CONFIG_SIZE]>,
    bars: Vec<Bar>,
    /// Where the next capability's pointer is written, and where the next one may begin.
    standard: Chain,
    extended: Chain,
}

#[derive(Clone, Copy, Debug)]
struct Chain {
    last: u16,
    free: u16,
}

impl ConfigSpace {
    /// The header of a type 0 function, with no BARs and no capabilities yet.
    pub fn new(identity: Identity) -> Self {
        let mut config = Self {
            bytes: Box::new([0; CONFIG_SIZE]),
            writable: Box::new([0; CONFIG_SIZE]),
            clearable: Box::new([0; CONFIG_SIZE]),
            bars: Vec::new(),
            standard: Chain {
                last: CAPABILITIES_POINTER,
                free: CAPABILITIES,
            },
            extended: Chain {
                last: 0,
                free: EXTENDED,
            },
        };
        config.set(0x00, &identity.vendor.to_le_bytes());
        config.set(0x02, &identity.device.to_le_bytes());
        let class = identity.class << 8 | u32::from(identity.revision);
        config.set(0x08, &class.to_le_bytes());
        config.set(0x2c, &identity.subsystem_vendor.to_le_bytes());
        config.set(0x2e, &identity.subsystem.to_le_bytes());
        let command = COMMAND_MEMORY | COMMAND_BUS_MASTER | COMMAND_KEPT;
        config.allow(COMMAND, &command.to_le_bytes());
        config.allow(INTERRUPT_LINE, &[0xff]);
        config
    }

    /// Adds a base address register.
    ///
    /// # Errors
    /// [`ConfigError::Bar`].
    pub fn add_bar(&mut self, bar: Bar) -> Result<(), ConfigError> {
        let taken = |b: &Bar| b.index..b.index + b.registers();
        let free = self
            .bars
            .iter()
            .all(|other| taken(other).end <= bar.index || taken(&bar).end <= other.index);
        if !bar.is_valid() || !free {
            return Err(ConfigError::Bar(bar));
        }
        let length = 4 * usize::from(bar.registers());
        self.set(bar.offset(), &bar.flags().to_le_bytes()[..length]);
        self.allow(bar.offset(), &bar.mask().to_le_bytes()[..length]);
        if bar.space() == Space::Pio {
            self.writable[usize::from(COMMAND)] |= COMMAND_IO as u8;
        }
        self.bars.push(bar);
        Ok(())
    }

    /// Appends a standard capability: `body` is what follows the two bytes of ID and next
    /// pointer, `writable` (as long or shorter) the bits of it that a guest may write. Returns
    /// the capability's offset.
    ///
    /// # Errors
    /// [`ConfigError::NoRoom`].
    pub fn add_capability(
        &mut self,
        id: u8,
        body: &[u8],
        writable: &[u8],
    ) -> Result<u16, ConfigError> {
        let length = body.len() + 2;
        let Chain { last, free: at } = self.standard;
        let end = usize::from(at) + length.next_multiple_of(4);
        if end > usize::from(EXTENDED) {
            let id = id.into();
            return Err(ConfigError::NoRoom { id, length });
        }
        // The header's pointer is the byte itself, a capability's is its second byte.
        let pointer = if last == CAPABILITIES_POINTER {
            last
        } else {
            last + 1
        };
        self.set(pointer, &[at as u8]);
        self.set(at, &[id, 0]);
        self.set(at + 2, body);
        self.allow(at + 2, writable);
        self.set(STATUS, &STATUS_CAPABILITIES_LIST.to_le_bytes());
        self.standard = Chain {
            last: at,
            free: end as u16,
        };
        Ok(at)
    }

    /// Appends an extended capability: `body` is what follows the four bytes of header,
    /// `writable` as in [`add_capability`](Self::add_capability). Returns its offset.
    ///
    /// # Errors
    /// [`ConfigError::NoRoom`].
    pub fn add_extended_capability(
        &mut self,
        id: u16,
        version: u8,
        body: &[u8],
        writable: &[u8],
    ) -> Result<u16, ConfigError> {
        let length = body.len() + 4;
        let Chain { last, free: at } = self.extended;
        let end = usize::from(at) + length.next_multiple_of(4);
        if end > CONFIG_SIZE {
            return Err(ConfigError::NoRoom { id, length });
        }
        if last != 0 {
            // Bits 31:20 of the previous header are the offset of the next (7.6.3).
            let header = self.dword(last) & 0x000f_ffff | u32::from(at) << 20;
            self.set(last, &header.to_le_bytes());
        }
        let header = u32::from(id) | u32::from(version & 0xf) << 16;
        self.set(at, &header.to_le_bytes());
        self.set(at + 4, body);
        self.allow(at + 4, writable);
        self.extended = Chain {
            last: at,
            free: end as u16,
        };
        Ok(at)
    }

    /// Appends the PCI Express capability of a root complex integrated endpoint (7.5.3): device
    /// type 9, version 2, no link. PASID, ATS and PRI on bus 0 need a function to be one.
    ///
    /// # Errors
    /// [`ConfigError::NoRoom`].
    pub fn add_express_endpoint(&mut self, express: Express) -> Result<u16, ConfigError> {
        let mut body = [0u8; 0x3a];
        let mut writable = [0u8; 0x3a];
        let mut put = |at: usize, value: u32| {
            body[at - 2..at + 2].copy_from_slice(&value.to_le_bytes());
        };
        // PCI Express Capabilities: version 2, Root Complex Integrated Endpoint.
        put(0x02, 2 | 9 << 4);
        // Device Capabilities: Role-Based Error Reporting is required.
        put(
            0x04,
            1 << 15 | u32::from(express.function_level_reset) << 28,
        );
        // Device Capabilities 2: End-End TLP Prefixes, which carry PASIDs.
        put(0x24, u32::from(express.end_end_tlp_prefix) << 21);
        // Device Control: everything but Initiate FLR, which is an action and reads as 0.
        writable[0x06..0x08].copy_from_slice(&0x7fffu16.to_le_bytes());
        let at = self.add_capability(0x10, &body, &writable)?;
        // Device Status: the error bits are cleared by writing 1.
        self.clear_on_one(at + 0x0a, &[0x0f]);
        Ok(at)
    }

    /// Makes bits writable in addition to those that are.
    pub fn allow(&mut self, offset: u16, mask: &[u8]) {
        Self::merge(&mut self.writable, offset, mask);
    }

    /// Makes bits such that a guest's 1 clears them.
    pub fn clear_on_one(&mut self, offset: u16, mask: &[u8]) {
        Self::merge(&mut self.clearable, offset, mask);
    }

    fn merge(masks: &mut [u8; CONFIG_SIZE], offset: u16, mask: &[u8]) {
        for (old, new) in masks.iter_mut().skip(offset.into()).zip(mask) {
            *old |= new;
        }
    }

    /// Writes as the device: no mask applies. What lies beyond the space is dropped.
    pub fn set(&mut self, offset: u16, data: &[u8]) {
        for (byte, new) in self.bytes.iter_mut().skip(offset.into()).zip(data) {
            *byte = *new;
        }
    }

    /// Reads as the guest. What lies beyond the space reads as 0.
    pub fn read(&self, offset: u16, data: &mut [u8]) {
        data.fill(0);
        for (to, from) in data.iter_mut().zip(self.bytes.iter().skip(offset.into())) {
            *to = *from;
        }
    }

    /// Writes as the guest: writable bits are replaced, clear-on-one bits cleared, the rest kept.
    pub fn write(&mut self, offset: u16, data: &[u8]) -> Effect {
        let start = usize::from(offset).min(CONFIG_SIZE);
        for (at, new) in (start..CONFIG_SIZE).zip(data) {
            let writable = self.writable[at];
            let kept = self.bytes[at] & !writable & !(new & self.clearable[at]);
            self.bytes[at] = kept | new & writable;
        }
        let end = start + data.len();
        let touches = |from: u16, to: u16| start < usize::from(to) && usize::from(from) < end;
        Effect {
            decode: touches(COMMAND, COMMAND + 2) || touches(0x10, 0x28),
        }
    }

    /// The 16 bits at `offset`.
    pub fn word(&self, offset: u16) -> u16 {
        let mut data = [0; 2];
        self.read(offset, &mut data);
        u16::from_le_bytes(data)
    }

    /// The 32 bits at `offset`.
    pub fn dword(&self, offset: u16) -> u32 {
        let mut data = [0; 4];
        self.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    /// Whether the guest lets the function start DMA and send MSIs.
    pub fn bus_master(&self) -> bool {
        self.word(COMMAND) & COMMAND_BUS_MASTER != 0
    }

    /// The base address registers and the address each holds.
    pub fn bars(&self) -> Vec<(Bar, u64)> {
        self.bars
            .iter()
            .map(|bar| (*bar, self.bar_address(bar)))
            .collect()
    }

    /// The ranges answered now: registers whose space is enabled in the command register.
    pub fn decoded(&self) -> Vec<Decoded> {
        let command = self.word(COMMAND);
        self.bars
            .iter()
            .filter(|bar| match bar.space() {
                Space::Mmio => command & COMMAND_MEMORY != 0,
                Space::Pio => command & COMMAND_IO != 0,
            })
            .map(|bar| Decoded {
                space: bar.space(),
                base: self.bar_address(bar),
                length: bar.length,
                bar: bar.index,
            })
            .collect()
    }

    /// Sets the address that a register holds, as firmware does.
    pub fn assign_bar(&mut self, index: u8, address: u64) {
        let Some(bar) = self.bars.iter().find(|bar| bar.index == index).copied() else {
            return;
        };
        let register = address & bar.mask() | bar.flags();
        let length = 4 * usize::from(bar.registers());
        self.set(bar.offset(), &register.to_le_bytes()[..length]);
    }

    fn bar_address(&self, bar: &Bar) -> u64 {
        let low = u64::from(self.dword(bar.offset()));
        let high = match bar.registers() {
            2 => u64::from(self.dword(bar.offset() + 4)),
            _ => 0,
        };
        (high << 32 | low) & bar.mask()
    }
}

impl fmt::Debug for ConfigSpace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ConfigSpace")
            .field("vendor", &format_args!("{:#06x}", self.word(0)))
            .field("device", &format_args!("{:#06x}", self.word(2)))
            .field("decoded", &self.decoded())
            .finish_non_exhaustive()
    }
}

/// What the PCI Express capability of an integrated endpoint says.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Express {
    /// Function Level Reset is implemented (the function acts on Device Control bit 15 itself).
    pub function_level_reset: bool,
    /// End-End TLP prefixes are sent: needed for PASID.
    pub end_end_tlp_prefix: bool,
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::bar::BarKind;
    use super::*;

    fn identity() -> Identity {
        Identity {
            vendor: 0x1af4,
            device: 0x1042,
            revision: 1,
            class: 0x01_80_00,
            subsystem_vendor: 0x1af4,
            subsystem: 0x1100,
        }
    }

    /// A function with one of everything.
    fn sample() -> ConfigSpace {
        let mut config = ConfigSpace::new(identity());
        config.add_bar(Bar::memory64(0, 0x8000)).unwrap();
        config
            .add_bar(Bar {
                index: 2,
                kind: BarKind::Memory32,
                prefetchable: true,
                length: 0x1000,
            })
            .unwrap();
        config
            .add_bar(Bar {
                index: 3,
                kind: BarKind::Io,
                prefetchable: false,
                length: 0x20,
            })
            .unwrap();
        config
            .add_express_endpoint(Express {
                function_level_reset: false,
                end_end_tlp_prefix: true,
            })
            .unwrap();
        config.add_capability(0x09, &[1, 2, 3], &[0, 0xf0]).unwrap();
        config
            .add_extended_capability(0x1b, 1, &[0xff, 0, 0, 0], &[0, 0, 7, 0])
            .unwrap();
        config
            .add_extended_capability(0x0f, 1, &[0; 4], &[0, 0, 0x1f, 0x80])
            .unwrap();
        config
    }

    fn put(config: &mut ConfigSpace, offset: u16, value: u32) {
        let _ = config.write(offset, &value.to_le_bytes());
    }

    #[test]
    fn a_register_answers_the_sizing_protocol() {
        let mut config = sample();
        for (offset, before, sized) in [
            (0x10, 4, 0xffff_8004),
            (0x14, 0, 0xffff_ffff),
            (0x18, 8, 0xffff_f008),
            (0x1c, 1, 0x0000_ffe1),
            (0x20, 0, 0),
            (0x30, 0, 0),
        ] {
            assert_eq!(config.dword(offset), before);
            put(&mut config, offset, u32::MAX);
            assert_eq!(config.dword(offset), sized, "{offset:#x}");
            put(&mut config, offset, 0);
            assert_eq!(config.dword(offset), before);
        }
    }

    #[test]
    fn a_range_is_decoded_where_its_register_says_while_its_space_is_enabled() {
        let mut config = sample();
        put(&mut config, 0x10, 0xc000_1234);
        put(&mut config, 0x14, 0x3f);
        put(&mut config, 0x1c, 0x0000_c000);
        assert!(config.decoded().is_empty());
        assert!(config.write(0x04, &[2]).decode);
        let memory: Vec<_> = config.decoded().iter().map(|d| (d.bar, d.base)).collect();
        assert_eq!(memory, [(0, 0x3f_c000_0000), (2, 0)]);
        let _ = config.write(0x04, &[1]);
        let ports: Vec<_> = config.decoded().iter().map(|d| (d.bar, d.base)).collect();
        assert_eq!(ports, [(3, 0xc000)]);
        assert!(!config.write(0x3c, &[5]).decode);
    }

    #[test]
    fn a_register_that_overlaps_another_is_refused() {
        let mut config = sample();
        for index in [1, 2, 5] {
            let bar = Bar::memory64(index, 0x1000);
            assert_eq!(config.add_bar(bar), Err(ConfigError::Bar(bar)));
        }
        config.add_bar(Bar::memory64(4, 0x1000)).unwrap();
    }

    #[test]
    fn a_full_list_refuses_another_capability_and_keeps_what_it_has() {
        let mut config = sample();
        let standard = std::iter::from_fn(|| config.add_capability(9, &[0; 30], &[]).ok()).count();
        assert!(standard > 0);
        assert!(config.add_capability(9, &[0; 190], &[]).is_err());
        let extended =
            std::iter::from_fn(|| config.add_extended_capability(0x0b, 1, &[0; 252], &[]).ok());
        assert_eq!(extended.count(), 14);
        check_chains(&config);
    }

    #[test]
    fn an_integrated_endpoint_says_so_and_can_carry_pasids() {
        let config = sample();
        let at = u16::from(config.bytes[0x34]);
        assert_eq!(config.bytes[usize::from(at)], 0x10);
        assert_eq!(config.word(at + 2) >> 4 & 0xf, 9, "device/port type");
        assert_eq!(config.word(at + 2) & 0xf, 2, "version");
        assert_eq!(config.dword(at + 0x24) >> 21 & 1, 1, "End-End TLP prefix");
        assert_eq!(config.dword(at + 0x0c), 0, "no link");
    }

    #[test]
    fn a_one_clears_and_a_zero_keeps_a_status_bit() {
        let mut config = sample();
        let status = u16::from(config.bytes[0x34]) + 0x0a;
        config.set(status, &[0x0f]);
        let _ = config.write(status, &[0x05]);
        assert_eq!(config.word(status), 0x0a);
        let _ = config.write(status, &[0xff, 0xff]);
        assert_eq!(config.word(status), 0);
    }

    #[test]
    fn accesses_beyond_the_space_read_zero_and_write_nothing() {
        let mut config = sample();
        let before = config.clone();
        let mut data = [1; 4];
        config.read(0xffff, &mut data);
        assert_eq!(data, [0; 4]);
        let _ = config.write(0xffff, &[0xff; 4]);
        let _ = config.write(0xffe, &[0xff; 4]);
        assert_eq!(config.bytes, before.bytes);
    }

    /// Both lists end, stay inside their part, are aligned and do not meet.
    fn check_chains(config: &ConfigSpace) {
        let (mut at, mut seen) = (u16::from(config.bytes[0x34]), Vec::new());
        while at != 0 {
            assert!((0x40..0x100).contains(&at) && at.is_multiple_of(4));
            assert!(!seen.contains(&at) && seen.len() < 48);
            seen.push(at);
            at = config.bytes[usize::from(at) + 1].into();
        }
        let (mut at, mut seen) = (0x100, Vec::new());
        while at != 0 && config.dword(at) != 0 {
            assert!((0x100..0x1000).contains(&at) && at.is_multiple_of(4));
            assert!(!seen.contains(&at) && seen.len() < 960);
            seen.push(at);
            at = (config.dword(at) >> 20) as u16;
        }
    }

    proptest! {
        #[test]
        fn whatever_a_guest_writes_read_only_bits_keep_their_values(
            writes in prop::collection::vec((0..4096u16, any::<u64>(), 1..9usize), 0..200)
        ) {
            let mut config = sample();
            let fresh = config.clone();
            for (offset, value, length) in writes {
                let _ = config.write(offset, &value.to_le_bytes()[..length]);
            }
            for at in 0..CONFIG_SIZE {
                let fixed = !(fresh.writable[at] | fresh.clearable[at]);
                prop_assert_eq!(config.bytes[at] & fixed, fresh.bytes[at] & fixed, "{:#x}", at);
            }
            check_chains(&config);
            for (bar, address) in config.bars() {
                prop_assert_eq!(address % bar.length, 0);
            }
        }

        #[test]
        fn a_write_replaces_exactly_the_writable_bits(offset in 0..4093u16, value: u32) {
            let mut config = sample();
            let (old, mask) = (config.dword(offset), {
                let at = usize::from(offset);
                u32::from_le_bytes(config.writable[at..at + 4].try_into().unwrap())
            });
            put(&mut config, offset, value);
            prop_assert_eq!(config.dword(offset), old & !mask | value & mask);
        }

        #[test]
        fn capabilities_of_any_lengths_are_chained_well(
            lengths in prop::collection::vec((any::<bool>(), 0..120usize), 0..60)
        ) {
            let mut config = ConfigSpace::new(identity());
            for (extended, length) in lengths {
                let body = vec![0xaa; length];
                let _ = if extended {
                    config.add_extended_capability(0x0b, 1, &body, &body)
                } else {
                    config.add_capability(9, &body, &body)
                };
            }
            check_chains(&config);
        }
    }
}
