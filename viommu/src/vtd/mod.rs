//! See the crate.

pub mod vcmd;
