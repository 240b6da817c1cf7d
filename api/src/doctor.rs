//! `nestling doctor`: what this host can do.

use std::io::Write;

use clap::{Arg, ArgAction, ArgMatches, Command};
use vmm::doctor::{Report, Roots};

use crate::Failure;

/// The subcommand.
pub(crate) fn command() -> Command {
    Command::new("doctor")
        .about("Says what this host can do for each device, why not, and the remedy")
        .long_about(
            "Looks at KVM, iommufd and each PCI device of this host: which vIOMMU modes the \
             device can have in a guest, and for every no the reason and the remedy. Changes \
             nothing.",
        )
        .arg(
            Arg::new("json")
                .long("json")
                .action(ArgAction::SetTrue)
                .help("Print JSON"),
        )
}

/// Prints the report.
pub(crate) fn run(options: &ArgMatches) -> Result<u8, Failure> {
    let report = Report::examine(&Roots::default());
    let text = match options.get_flag("json") {
        true => serde_json::to_string_pretty(&report).map_err(|why| Failure::Error(why.into()))?,
        false => report.to_string(),
    };
    // A reader that has seen enough is no failure.
    let _ = writeln!(std::io::stdout(), "{}", text.trim_end());
    Ok(0)
}
