//! What the configuration asks of a vIOMMU, in the words of the front ends.

use viommu::Gpa;
use viommu::doorbell::Doorbell;
use viommu::reserved::X86_MSI;
use viommu::vtd::{Mode, UnitConfig};

use crate::config::{Behind, MsiMode, UnitMode, ViommuConfig, ViommuKind, VmConfig};

/// The mode of units that do not say it: that of one that does, as all have the same; else
/// scalable mode, unless that needs a host that `nests`, and this one does not.
pub(super) fn mode_of_units(vm: &VmConfig, nests: bool) -> UnitMode {
    let units = || vm.viommus.iter().filter(|c| c.kind == ViommuKind::Vtd);
    if let Some(mode) = units().find_map(|unit| unit.mode) {
        return mode;
    }
    // Who asks for what only scalable mode has is told why it cannot be had.
    let scalable = |unit: &ViommuConfig| {
        unit.nested || unit.vcmd || unit.pasid_bits.is_some_and(|bits| bits > 0)
    };
    let is_unit = |behind: Behind<'_>| match behind {
        Behind::Nothing => false,
        Behind::Default => vm
            .viommus
            .first()
            .is_some_and(|c| c.kind == ViommuKind::Vtd),
        Behind::Named(id) => units().any(|unit| unit.id == id),
    };
    let mut devices = vm.devices.iter();
    let needs_it = devices.any(|d| is_unit(Behind::new(d.iommu, d.viommu.as_deref())));
    if nests || !needs_it || units().any(scalable) {
        return UnitMode::Scalable;
    }
    log::info!(
        "the host's IOMMU cannot nest: the guest's has legacy mode, and its tables are mirrored"
    );
    UnitMode::Legacy
}

pub(super) fn doorbell(config: &ViommuConfig) -> Doorbell {
    match config.msi {
        MsiMode::Intercepted => Doorbell::Intercepted,
        MsiMode::Mapped => Doorbell::Mapped(Gpa(config.doorbell.map_or(X86_MSI.first, |at| at.0))),
    }
}

pub(super) fn unit_config(config: &ViommuConfig, mode: UnitMode) -> UnitConfig {
    UnitConfig {
        id: config.id.clone(),
        mode: match config.mode.unwrap_or(mode) {
            UnitMode::Scalable => Mode::Scalable,
            UnitMode::Legacy => Mode::Legacy,
        },
        address_width: config.address_width,
        pasid_bits: config.pasid_bits,
        interrupt_remapping: config.interrupt_remapping,
        nested: config.nested,
        bypass: config.bypass,
        interrupts_only: false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::DeviceConfig;

    fn vm(units: &[ViommuConfig], behind: Option<&str>) -> VmConfig {
        VmConfig {
            viommus: units.to_vec(),
            devices: vec![DeviceConfig {
                iommu: behind == Some(""),
                viommu: behind.filter(|id| !id.is_empty()).map(Into::into),
                ..DeviceConfig::default()
            }],
            ..VmConfig::default()
        }
    }

    fn unit(change: impl FnOnce(&mut ViommuConfig)) -> ViommuConfig {
        let mut unit = ViommuConfig::default();
        change(&mut unit);
        unit
    }

    #[test]
    fn a_unit_before_a_device_of_a_host_that_cannot_nest_has_legacy_mode() {
        let plain = [unit(|_| ())];
        assert_eq!(
            mode_of_units(&vm(&plain, Some("")), false),
            UnitMode::Legacy
        );
        assert_eq!(
            mode_of_units(&vm(&plain, Some("viommu0")), false),
            UnitMode::Legacy
        );
        assert_eq!(
            mode_of_units(&vm(&plain, Some("")), true),
            UnitMode::Scalable
        );
        // The device is behind none of them.
        assert_eq!(mode_of_units(&vm(&plain, None), false), UnitMode::Scalable);
        let other = [
            unit(|_| ()),
            unit(|u| (u.kind, u.id) = (ViommuKind::Virtio, "b".into())),
        ];
        assert_eq!(
            mode_of_units(&vm(&other, Some("b")), false),
            UnitMode::Scalable
        );
    }

    #[test]
    fn what_a_user_asks_for_is_not_taken_away_in_silence() {
        let mode = |units: &[ViommuConfig]| mode_of_units(&vm(units, Some("")), false);
        let scalable = |u: &mut ViommuConfig| u.mode = Some(UnitMode::Scalable);
        assert_eq!(
            mode(&[unit(|u| u.id = "b".into()), unit(scalable)]),
            UnitMode::Scalable
        );
        let wishes: [fn(&mut ViommuConfig); 3] = [
            |u| u.nested = true,
            |u| u.vcmd = true,
            |u| u.pasid_bits = Some(8),
        ];
        for wish in wishes {
            assert_eq!(mode(&[unit(wish)]), UnitMode::Scalable);
        }
        assert_eq!(mode(&[unit(|u| u.pasid_bits = Some(0))]), UnitMode::Legacy);
    }
}
