//! The lab: everything that proves nestling, on any machine. See tests/README.md.

pub mod cache;
pub mod cpio;
pub mod debian;
pub mod dependencies;
pub mod engine;
pub mod figures;
pub mod fuzz;
pub mod images;
pub mod lost;
pub mod machine;
pub mod mend;
pub mod modules;
pub mod place;
pub mod profile;
pub mod programs;
pub mod report;
pub mod schemathesis;
pub mod setup;
pub mod shell;
pub mod suite;
