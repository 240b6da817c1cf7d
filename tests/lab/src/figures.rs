//! Figures that several benchmarks left, each from a host of its own, side by side.

use std::fmt::Write;
use std::fs;
use std::io::ErrorKind;
use std::path::Path;

use anyhow::{Context, Result};
use serde::Deserialize;

use crate::place::Test;

/// What others are relative to.
const BASE: &str = "no vIOMMU";

/// One figure, as a benchmark wrote it into `figures.json` among its logs.
#[derive(Clone, Debug, Deserialize, PartialEq)]
pub struct Figure {
    quantity: String,
    vmm: String,
    viommu: String,
    value: f64,
}

/// The figures that these tests left in this run.
///
/// # Errors
/// A file of figures cannot be read.
pub fn of(tests: &[Test], lab: &Path) -> Result<Vec<Figure>> {
    let mut figures = Vec::new();
    for test in tests {
        let path = lab.join("logs").join(&test.name).join("figures.json");
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == ErrorKind::NotFound => continue,
            Err(error) => return Err(error).context(path.display().to_string()),
        };
        let more: Vec<Figure> =
            serde_json::from_slice(&text).context(path.display().to_string())?;
        figures.extend(more);
    }
    Ok(figures)
}

/// A table for each quantity: a line for each vIOMMU with what each VMM has, in percent of what the
/// same VMM has without.
pub fn table(figures: &[Figure]) -> String {
    let mut text = String::new();
    for quantity in distinct(figures, |figure| &figure.quantity) {
        let of = |vmm: &str, viommu: &str| {
            let is = |f: &&Figure| f.quantity == quantity && f.vmm == vmm && f.viommu == viommu;
            figures.iter().find(is).map(|figure| figure.value)
        };
        let _ = writeln!(text, "{quantity}:");
        for viommu in distinct(figures, |figure| &figure.viommu) {
            let _ = write!(text, "  {viommu:24}");
            for vmm in distinct(figures, |figure| &figure.vmm) {
                let _ = match (of(vmm, viommu), of(vmm, BASE)) {
                    (Some(value), Some(base)) => {
                        write!(text, "  {vmm} {value:8.0} {:6.1} %", 100.0 * value / base)
                    }
                    (Some(value), None) => write!(text, "  {vmm} {value:8.0}    ?   %"),
                    (None, _) => write!(text, "  {vmm}        -    -   %"),
                };
            }
            text.push('\n');
        }
    }
    text
}

/// In the order in which they are met first.
fn distinct(figures: &[Figure], what: impl Fn(&Figure) -> &String) -> Vec<&str> {
    let mut known: Vec<&str> = Vec::new();
    for figure in figures {
        let name = what(figure);
        if !known.contains(&name.as_str()) {
            known.push(name);
        }
    }
    known
}

#[cfg(test)]
mod tests {
    use super::*;

    fn figure(vmm: &str, viommu: &str, value: f64) -> Figure {
        Figure {
            quantity: "reads".into(),
            vmm: vmm.into(),
            viommu: viommu.into(),
            value,
        }
    }

    #[test]
    fn each_figure_stands_beside_what_the_same_vmm_does_without() {
        let table = table(&[
            figure("a", BASE, 200.0),
            figure("b", BASE, 100.0),
            figure("a", "virtio", 150.0),
            figure("b", "virtio", 100.0),
        ]);
        let lines: Vec<&str> = table.lines().collect();
        assert_eq!(lines[0], "reads:");
        assert!(lines[2].contains("a      150   75.0 %"), "{table}");
        assert!(lines[2].contains("b      100  100.0 %"), "{table}");
    }

    #[test]
    fn a_figure_that_was_lost_takes_no_other_with_it() {
        let table = table(&[
            figure("a", BASE, 200.0),
            figure("a", "virtio", 150.0),
            figure("b", "virtio", 100.0),
        ]);
        assert!(table.contains("75.0 %"), "{table}");
        assert!(table.contains("b      100    ?   %"), "{table}");
        assert!(table.contains("b        -"), "{table}");
    }
}
