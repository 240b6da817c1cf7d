//! The registers that command the unit (10.4), as a pure state machine: a write says what is to
//! be done, and the unit does it and then [commits](Registers::commit) it. Fault and page request
//! registers have their own files.

use super::capabilities::{Mode, Offer};
use super::event::EventInterrupt;
use crate::interrupt::Msi;
use crate::spec::vtd::registers::{
    self as offset, Ccmd, Global, IQ_OFFSET_MASK, InvalidateAddress, Iotlb, Iqa, Irta, Rtaddr,
};

/// What a write to GCMD asks for: one-shot commands, and enables that change.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct GlobalChange {
    /// SRTP: RTADDR takes effect.
    pub(super) root_pointer: bool,
    /// TE.
    pub(super) translation: Option<bool>,
    /// QIE.
    pub(super) queue: Option<bool>,
    /// SIRTP: IRTA takes effect.
    pub(super) interrupt_pointer: bool,
    /// IRE or CFI changes.
    pub(super) interrupts: bool,
}

/// What a write leads to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Action {
    /// Nothing more.
    None,
    /// Do this, then commit the new status.
    Global(GlobalChange, Global),
    /// Invalidate context entries, then [`Registers::context_done`].
    Context(Ccmd),
    /// Invalidate translations, then [`Registers::iotlb_done`].
    Iotlb(Iotlb, InvalidateAddress),
    /// The queue has a new tail.
    Queue,
    /// Send this interrupt.
    Send(Msi),
}

/// The registers. Offsets are of dwords: 64-bit accesses are two, the lower one first.
#[derive(Debug, Default)]
pub(super) struct Registers {
    status: Global,
    /// RTADDR as written.
    rtaddr: Rtaddr,
    /// RTADDR as SRTP latched it.
    root: Rtaddr,
    ccmd: Ccmd,
    iotlb: Iotlb,
    iva: InvalidateAddress,
    /// Offset of the next descriptor, in bytes.
    pub(super) head: u32,
    tail: u32,
    iqa: Iqa,
    /// ICS.IWC.
    completed: bool,
    event: EventInterrupt,
    /// IRTA as written.
    irta: Irta,
    /// IRTA as SIRTP latched it.
    interrupt_table: Irta,
}

/// Replaces the lower half of `bits`.
const fn low(bits: u64, value: u32) -> u64 {
    bits & !0xffff_ffff | value as u64
}

/// Replaces the upper half of `bits`.
const fn high(bits: u64, value: u32) -> u64 {
    bits & 0xffff_ffff | (value as u64) << 32
}

impl Registers {
    /// Reads the dword at `at`. What does not exist is 0.
    pub(super) fn read(&self, offer: &Offer, at: u64) -> u32 {
        let wide = |bits: u64| {
            if at & 4 == 0 {
                bits as u32
            } else {
                (bits >> 32) as u32
            }
        };
        match at {
            // Architecture 6.0 has everything that is offered; legacy mode is 1.0.
            offset::VER => match offer.ecap.smts() {
                true => 0x60,
                false => 0x10,
            },
            0x08 | 0x0c => wide(offer.cap.into_bits()),
            0x10 | 0x14 => wide(offer.ecap.into_bits()),
            offset::GSTS => self.status.into_bits(),
            0x20 | 0x24 => wide(self.rtaddr.into_bits()),
            0x28 | 0x2c => wide(self.ccmd.into_bits()),
            offset::IQH => self.head,
            offset::IQT => self.tail,
            0x90 | 0x94 => wide(self.iqa.into_bits()),
            offset::ICS => self.completed.into(),
            offset::IECTL..=offset::IEUADDR => self.event.read((at - offset::IECTL) / 4),
            0xb8 | 0xbc if offer.ecap.ir() => wide(self.irta.into_bits()),
            0xf00 | 0xf04 => wide(self.iva.into_bits()),
            0xf08 | 0xf0c => wide(self.iotlb.into_bits()),
            _ => 0,
        }
    }

    /// Writes the dword at `at`. What does not exist is not written.
    pub(super) fn write(&mut self, offer: &Offer, at: u64, value: u32) -> Action {
        match at {
            offset::GCMD => return self.command(offer, Global::from_bits(value)),
            0x20 => self.rtaddr = Rtaddr::from_bits(low(self.rtaddr.into_bits(), value & !0x3ff)),
            0x24 => self.rtaddr = Rtaddr::from_bits(high(self.rtaddr.into_bits(), value)),
            0x28 => self.ccmd = Ccmd::from_bits(low(self.ccmd.into_bits(), value)),
            0x2c => {
                let writable = value & 0xe000_0003;
                self.ccmd = Ccmd::from_bits(high(self.ccmd.into_bits(), writable));
                if self.ccmd.icc() {
                    return Action::Context(self.ccmd);
                }
            }
            offset::IQT => {
                self.tail = value & IQ_OFFSET_MASK as u32;
                return Action::Queue;
            }
            0x90 => self.iqa = Iqa::from_bits(low(self.iqa.into_bits(), value & 0xffff_f807)),
            0x94 => self.iqa = Iqa::from_bits(high(self.iqa.into_bits(), value)),
            offset::ICS if value & 1 != 0 => {
                self.completed = false;
                self.event.serviced();
            }
            offset::IECTL..=offset::IEUADDR => {
                if let Some(message) = self.event.write((at - offset::IECTL) / 4, value) {
                    return Action::Send(message);
                }
            }
            0xb8 if offer.ecap.ir() => {
                self.irta = Irta::from_bits(low(self.irta.into_bits(), value & 0xffff_f80f));
            }
            0xbc if offer.ecap.ir() => {
                self.irta = Irta::from_bits(high(self.irta.into_bits(), value));
            }
            0xf00 => {
                let bits = low(self.iva.into_bits(), value & 0xffff_f07f);
                self.iva = InvalidateAddress::from_bits(bits);
            }
            0xf04 => self.iva = InvalidateAddress::from_bits(high(self.iva.into_bits(), value)),
            0xf0c => {
                let writable = value & 0xb003_ffff;
                self.iotlb = Iotlb::from_bits(high(self.iotlb.into_bits(), writable));
                if self.iotlb.ivt() {
                    return Action::Iotlb(self.iotlb, self.iva);
                }
            }
            _ => {}
        }
        Action::None
    }

    fn command(&self, offer: &Offer, command: Global) -> Action {
        let now = self.status;
        let remapping = offer.ecap.ir();
        let wanted = now
            .with_te(command.te())
            .with_qie(command.qie())
            .with_srtp(now.srtp() || command.srtp())
            .with_ire(remapping && command.ire())
            .with_cfi(remapping && command.cfi())
            .with_sirtp(now.sirtp() || remapping && command.sirtp());
        let changed = |was: bool, is: bool| (was != is).then_some(is);
        let change = GlobalChange {
            root_pointer: command.srtp(),
            translation: changed(now.te(), wanted.te()),
            queue: changed(now.qie(), wanted.qie()),
            interrupt_pointer: remapping && command.sirtp(),
            interrupts: now.ire() != wanted.ire() || now.cfi() != wanted.cfi(),
        };
        if change == GlobalChange::default() {
            Action::None
        } else {
            Action::Global(change, wanted)
        }
    }

    /// RTADDR takes effect.
    pub(super) fn latch_root(&mut self) {
        self.root = self.rtaddr;
    }

    /// IRTA takes effect.
    pub(super) fn latch_interrupt_table(&mut self) {
        self.interrupt_table = self.irta;
    }

    /// The queue is switched on or off: it begins at its start again.
    pub(super) fn restart_queue(&mut self) {
        self.head = 0;
    }

    /// A global command was done.
    pub(super) fn commit(&mut self, status: Global) {
        self.status = status;
    }

    /// A context-cache invalidation was done at granularity `caig` (0: it could not be obeyed).
    pub(super) fn context_done(&mut self, caig: u8) {
        self.ccmd.set_icc(false);
        self.ccmd.set_caig(caig);
    }

    /// An IOTLB invalidation was done at granularity `iaig` (0: it could not be obeyed).
    pub(super) fn iotlb_done(&mut self, iaig: u8) {
        self.iotlb.set_ivt(false);
        self.iotlb.set_iaig(iaig);
    }

    /// A wait descriptor with IF completed. The interrupt is sent unless the last is unserviced.
    pub(super) fn completion(&mut self) -> Option<Msi> {
        if std::mem::replace(&mut self.completed, true) {
            return None;
        }
        self.event.raise()
    }

    /// Global Status.
    pub(super) fn status(&self) -> Global {
        self.status
    }

    /// The root table that is in force.
    pub(super) fn root(&self) -> Rtaddr {
        self.root
    }

    /// IQA.
    pub(super) fn iqa(&self) -> Iqa {
        self.iqa
    }

    /// IQT, in bytes.
    pub(super) fn tail(&self) -> u32 {
        self.tail
    }

    /// The interrupt table that is in force.
    pub(super) fn interrupt_table(&self) -> Irta {
        self.interrupt_table
    }
}

impl Mode {
    /// The mode that a unit with this offer is in.
    pub(super) fn of(offer: &Offer) -> Self {
        if offer.ecap.smts() {
            Self::Scalable
        } else {
            Self::Legacy
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::capabilities::{Extras, UnitConfig};
    use super::*;

    fn offer() -> Offer {
        Offer::compose(&UnitConfig::default(), [], Extras::default()).unwrap()
    }

    #[test]
    fn one_shot_bits_do_not_stick_in_commands_and_status_sticks() {
        let (offer, mut registers) = (offer(), Registers::default());
        let Action::Global(change, status) = registers.write(&offer, offset::GCMD, 1 << 30) else {
            panic!("SRTP does nothing")
        };
        assert!(change.root_pointer && change.translation.is_none());
        assert_eq!(
            registers.read(&offer, offset::GSTS),
            0,
            "not before it is done"
        );
        registers.commit(status);
        assert_eq!(registers.read(&offer, offset::GSTS), 1 << 30);
        assert_eq!(registers.read(&offer, offset::GCMD), 0);
        assert_eq!(registers.write(&offer, offset::GCMD, 0), Action::None);
        assert_eq!(registers.read(&offer, offset::GSTS), 1 << 30);
    }

    #[test]
    fn interrupt_remapping_cannot_be_enabled_where_it_is_not_offered() {
        let (offer, mut registers) = (offer(), Registers::default());
        let ir = Global::new().with_ire(true).with_sirtp(true).with_cfi(true);
        assert_eq!(
            registers.write(&offer, offset::GCMD, ir.into_bits()),
            Action::None
        );
        assert_eq!(registers.write(&offer, 0xb8, u32::MAX), Action::None);
        assert_eq!(registers.read(&offer, 0xb8), 0);
    }

    #[test]
    fn a_command_register_starts_with_its_upper_half() {
        let (offer, mut registers) = (offer(), Registers::default());
        assert_eq!(registers.write(&offer, 0x28, 0x18_0007), Action::None);
        let Action::Context(ccmd) = registers.write(&offer, 0x2c, 7 << 29) else {
            panic!("ICC does nothing")
        };
        assert_eq!((ccmd.did(), ccmd.sid(), ccmd.cirg()), (7, 0x18, 3));
        registers.context_done(3);
        assert_eq!(registers.read(&offer, 0x2c), 3 << 29 | 3 << 27);
    }

    #[test]
    fn completion_is_reported_once_until_it_is_cleared() {
        let (offer, mut registers) = (offer(), Registers::default());
        assert_eq!(registers.write(&offer, offset::IECTL, 0), Action::None);
        assert!(registers.completion().is_some());
        assert!(registers.completion().is_none());
        assert_eq!(registers.read(&offer, offset::ICS), 1);
        assert_eq!(registers.write(&offer, offset::ICS, 1), Action::None);
        assert_eq!(registers.read(&offer, offset::ICS), 0);
        assert!(registers.completion().is_some());
    }

    proptest! {
        #[test]
        fn read_only_registers_and_reserved_bits_survive_any_writes(
            writes in prop::collection::vec((0u64..0x400, any::<u32>()), 0..64),
        ) {
            let (offer, mut registers) = (offer(), Registers::default());
            for (dword, value) in writes {
                let _ = registers.write(&offer, dword * 4, value);
            }
            prop_assert_eq!(registers.read(&offer, 0x08), offer.cap.into_bits() as u32);
            prop_assert_eq!(registers.read(&offer, 0x14), (offer.ecap.into_bits() >> 32) as u32);
            prop_assert_eq!(registers.read(&offer, offset::GSTS), 0);
            prop_assert_eq!(registers.read(&offer, offset::IQH), 0);
            prop_assert_eq!(registers.read(&offer, offset::IQT) & !(IQ_OFFSET_MASK as u32), 0);
            prop_assert_eq!(registers.read(&offer, 0x20) & 0x3ff, 0);
            prop_assert_eq!(registers.read(&offer, 0x90) & 0x7f8, 0);
        }
    }
}
