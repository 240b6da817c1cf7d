//! The report as people read it.

use std::fmt;

use super::{Finding, Iommu, Model, PciDevice, Report};

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        line(f, "", "KVM", &self.kvm)?;
        line(f, "", "iommufd", &self.iommufd)?;
        line(f, "", "locked memory", &self.locked_memory)?;
        line(f, "", "landlock", &self.landlock)?;
        writeln!(f)?;
        if self.iommus.is_empty() {
            writeln!(
                f,
                "No IOMMU: enable VT-d (or AMD-Vi) in the firmware, boot with intel_iommu=on"
            )?;
        }
        for iommu in &self.iommus {
            writeln!(f, "{iommu}")?;
        }
        for device in &self.devices {
            writeln!(f)?;
            write!(f, "{device}")?;
        }
        Ok(())
    }
}

fn line(f: &mut fmt::Formatter<'_>, indent: &str, name: &str, finding: &Finding) -> fmt::Result {
    let answer = if finding.ok { "yes" } else { "no" };
    writeln!(f, "{indent}{name:<14} {answer:<4} {}", finding.what)?;
    match &finding.remedy {
        Some(remedy) => writeln!(f, "{indent}{:<14} {:<4} -> {remedy}", "", ""),
        None => Ok(()),
    }
}

impl fmt::Display for Iommu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = &self.name;
        match &self.model {
            Model::Vtd {
                registers,
                address_width,
                scalable_mode,
                nesting,
                pasid_bits,
                page_requests,
                five_level,
                interrupt_remapping,
                domain_ids,
                errata,
            } => {
                let yes = |on: &bool| if *on { "yes" } else { "no" };
                write!(
                    f,
                    "{name}: VT-d, {address_width}-bit addresses, scalable mode {}, nesting {}, \
                     PASID {pasid_bits} bits, page requests {}, 5-level tables {}, interrupt \
                     remapping {}, {domain_ids} domain ids (CAP {:#x}, ECAP {:#x})",
                    yes(scalable_mode),
                    yes(nesting),
                    yes(page_requests),
                    yes(five_level),
                    yes(interrupt_remapping),
                    registers.cap,
                    registers.ecap
                )?;
                for erratum in errata {
                    write!(f, "\n{:width$}  erratum {erratum}", "", width = name.len())?;
                }
                Ok(())
            }
            Model::Amd { features } => {
                write!(f, "{name}: AMD-Vi")?;
                match features {
                    Some(features) => write!(f, " (EFR {features:#x})"),
                    None => Ok(()),
                }
            }
            Model::Other { kind } => write!(f, "{name}: {kind}"),
        }
    }
}

impl fmt::Display for PciDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} [{}] class {:06x}", self.address, self.id, self.class)?;
        match &self.driver {
            Some(driver) => write!(f, ", driver {driver}")?,
            None => write!(f, ", no driver")?,
        }
        if let Some(group) = self.group {
            write!(f, ", group {group}")?;
        }
        if let Some(iommu) = &self.iommu {
            write!(f, " behind {iommu}")?;
        }
        writeln!(f)?;
        for member in &self.members {
            let driver = member.driver.as_deref().unwrap_or("no driver");
            writeln!(f, "  in its group   {} ({driver})", member.address)?;
        }
        for region in &self.reserved {
            writeln!(
                f,
                "  reserved       {:#x} to {:#x} ({})",
                region.first, region.last, region.kind
            )?;
        }
        // What fails for the same reason is told once.
        let mut told: Vec<(&Finding, String)> = Vec::new();
        for (name, finding) in &self.modes {
            match told.iter_mut().find(|(other, _)| *other == finding) {
                Some((_, names)) if !finding.ok => *names += &format!(", {name}"),
                _ => told.push((finding, (*name).to_owned())),
            }
        }
        for (finding, names) in told {
            match names.split_once(", ") {
                None => line(f, "  ", &names, finding)?,
                Some((first, rest)) => {
                    line(f, "  ", first, finding)?;
                    writeln!(f, "  {:<14} {:<4} nor: {rest}", "", "")?;
                }
            }
        }
        Ok(())
    }
}
