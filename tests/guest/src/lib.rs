//! The guest tests: nestling runs real guests on a host with KVM, and every promise is checked
//! from inside. The lab starts this program there once for each test (`guest-test run NAME`).
//! See tests/README.md for how to add one.

pub mod api;
pub mod bench;
pub mod boot;
pub mod demo;
pub mod disk;
pub mod ending;
pub mod engine;
pub mod harness;
pub mod hotplug;
pub mod interrupts;
pub mod kernel;
pub mod mapping;
pub mod memory;
pub mod nested;
pub mod net;
pub mod passthrough;
pub mod pci;
mod plugging;
pub mod refuse;
pub mod soak;
pub mod virtio_iommu;
pub mod vtd;

use anyhow::{Context, Result, bail};

use harness::Test;

/// Every module's tests.
pub const ALL: &[(&str, &[Test])] = &[
    ("api", api::TESTS),
    ("bench", bench::TESTS),
    ("boot", boot::TESTS),
    ("demo", demo::TESTS),
    ("disk", disk::TESTS),
    ("ending", ending::TESTS),
    ("engine", engine::TESTS),
    ("hotplug", hotplug::TESTS),
    ("interrupts", interrupts::TESTS),
    ("kernel", kernel::TESTS),
    ("mapping", mapping::TESTS),
    ("memory", memory::TESTS),
    ("nested", nested::TESTS),
    ("net", net::TESTS),
    ("passthrough", passthrough::TESTS),
    ("pci", pci::TESTS),
    ("refuse", refuse::TESTS),
    ("soak", soak::TESTS),
    ("virtio_iommu", virtio_iommu::TESTS),
    ("vtd", vtd::TESTS),
];

/// Whether a test ended so since its host was broken: it may be run again, in another.
pub fn is_no_verdict(error: &anyhow::Error) -> bool {
    error
        .downcast_ref::<harness::process::HostBroken>()
        .is_some()
}

/// Does what the command line says: `list`, or `run MODULE::TEST`.
///
/// # Errors
/// The test failed, or the command line is none.
pub fn run(words: &[&str]) -> Result<()> {
    match words {
        ["list"] => {
            println!("{}", serde_json::to_string(&harness::list(ALL))?);
            Ok(())
        }
        ["run", name] => {
            let (module, test) = name
                .split_once("::")
                .context("a test is named module::test")?;
            let tests = ALL
                .iter()
                .find(|(m, _)| *m == module)
                .map(|(_, tests)| tests);
            let test = tests.and_then(|tests| tests.iter().find(|t| t.name == test));
            harness::run(
                name,
                test.with_context(|| format!("there is no test {name}"))?,
            )
        }
        ["shell-open", kernel] => harness::shell::open(kernel),
        ["shell-run", command] => harness::shell::run(command),
        ["shell-close"] => harness::shell::close(),
        _ => bail!("usage: guest-test list | run MODULE::TEST; the lab starts this program"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Names of guest tests in backquotes, as `module::` and the beginning of a name.
    #[test]
    fn every_guest_test_that_a_page_names_is_there() {
        let pages = [
            include_str!("../../README.md"),
            include_str!("../../../README.md"),
        ];
        let mut seen = 0;
        for name in pages
            .iter()
            .flat_map(|page| page.split('`').skip(1).step_by(2))
        {
            let Some((module, test)) = name.split_once("::") else {
                continue;
            };
            let Some((_, tests)) = ALL.iter().find(|(known, _)| *known == module) else {
                continue;
            };
            let begins = test.split('…').next().unwrap_or("");
            let found = tests.iter().any(|test| test.name.starts_with(begins));
            assert!(found, "{name} is no guest test");
            seen += 1;
        }
        assert!(seen > 20, "only {seen} were found");
    }
}
