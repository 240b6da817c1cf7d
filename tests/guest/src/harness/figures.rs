//! Figures of benchmarks: shown as soon as they are there, and left for the lab, which compares those
//! of several tests.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use serde::Serialize;

use super::{Lab, show};

/// One figure, as the lab reads it.
#[derive(Debug, Serialize)]
pub struct Figure {
    quantity: String,
    vmm: String,
    viommu: String,
    value: f64,
}

impl Figure {
    /// The vIOMMU of the figures that others are relative to.
    pub const BASE: &str = "no vIOMMU";
}

/// Which of the samples counts.
#[derive(Clone, Copy, Debug)]
pub enum Of {
    /// What is right where they scatter to both sides.
    Median,
    /// What other work on this machine disturbed least.
    Highest,
}

/// Those of one test, kept among its logs.
#[derive(Debug)]
pub struct Figures {
    file: PathBuf,
    known: Vec<Figure>,
}

impl Figures {
    /// None yet.
    pub fn new(lab: &Lab) -> Self {
        Self {
            file: lab.logs().join("figures.json"),
            known: Vec::new(),
        }
    }

    /// Adds one of some samples, and says how far they lie apart.
    ///
    /// # Errors
    /// There is no sample, or the file cannot be written.
    pub fn add(
        &mut self,
        quantity: &str,
        vmm: &str,
        viommu: &str,
        of: Of,
        mut samples: Vec<f64>,
    ) -> Result<()> {
        ensure!(!samples.is_empty(), "{vmm}, {viommu}: no sample");
        samples.sort_by(f64::total_cmp);
        let [least, middle, most] = [0, samples.len() / 2, samples.len() - 1].map(|n| samples[n]);
        let value = match of {
            Of::Median => middle,
            Of::Highest => most,
        };
        show(format!(
            "{vmm}, {viommu}: {quantity}: {value:.0} (least {least:.0}, median {middle:.0}, most {most:.0})"
        ));
        self.known.push(Figure {
            quantity: quantity.to_owned(),
            vmm: vmm.to_owned(),
            viommu: viommu.to_owned(),
            value,
        });
        fs::write(&self.file, serde_json::to_vec(&self.known)?)
            .with_context(|| format!("cannot write {}", self.file.display()))
    }
}
