//! The `nestling` command.

mod client;
mod descriptors;
mod doctor;
mod inherited;
mod logger;
mod pasids;
mod run;
mod server;

use std::error::Error;
use std::process::ExitCode;

use clap::error::ErrorKind;
use clap::{Arg, ArgAction, Command};
use clap_complete::Shell;
use vmm::control::sentence;
use vmm::outcome::{STATUS_ERROR, STATUS_USAGE};

/// Why the command ends without having done its work.
enum Failure {
    /// The command line or the configuration is wrong.
    Usage(String),
    /// Something else is.
    Error(Box<dyn Error>),
}

fn main() -> ExitCode {
    let matches = match command().try_get_matches() {
        Ok(matches) => matches,
        Err(why) if !why.use_stderr() => {
            // Standard output may be gone.
            let _ = why.print();
            return ExitCode::SUCCESS;
        }
        Err(why) if why.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
            let _ = why.print();
            return ExitCode::from(STATUS_USAGE);
        }
        Err(why) => return fail(Failure::Usage(usage(&why))),
    };
    logger::start(matches.get_count("verbose"));
    let done = match matches.subcommand() {
        Some(("run", options)) => run::run(options),
        Some(("doctor", options)) => doctor::run(options),
        Some(("pasids", options)) => pasids::list(options),
        Some(("api", options)) => client::run(options),
        Some(("completion", options)) => {
            if let Some(shell) = options.get_one::<Shell>("shell") {
                clap_complete::generate(*shell, &mut command(), "nestling", &mut std::io::stdout());
            }
            Ok(0)
        }
        // clap lets nothing else through.
        _ => Ok(0),
    };
    match done {
        Ok(status) => ExitCode::from(status),
        Err(failure) => fail(failure),
    }
}

fn command() -> Command {
    Command::new("nestling")
        .version(env!("CARGO_PKG_VERSION"))
        .about("Runs virtual machines whose guests have an IOMMU of their own")
        .max_term_width(100)
        .subcommand_required(true)
        .arg_required_else_help(true)
        .disable_help_subcommand(true)
        .arg(
            Arg::new("verbose")
                .short('v')
                .long("verbose")
                .global(true)
                .action(ArgAction::Count)
                .help("Say more on standard error; -vv and -vvv say yet more"),
        )
        .subcommand(run::command())
        .subcommand(doctor::command())
        .subcommand(pasids::command())
        .subcommand(client::command())
        .subcommand(
            Command::new("completion")
                .about("Prints what makes a shell complete this command")
                .arg(
                    Arg::new("shell")
                        .value_name("SHELL")
                        .required(true)
                        .value_parser(clap::value_parser!(Shell))
                        .help("Which shell"),
                ),
        )
}

fn fail(failure: Failure) -> ExitCode {
    let (status, text) = match failure {
        Failure::Usage(text) => (STATUS_USAGE, text),
        Failure::Error(why) => (STATUS_ERROR, sentence(&*why)),
    };
    eprintln!("nestling: {text}");
    ExitCode::from(status)
}

/// clap's report as one line: what is wrong, and its tip.
fn usage(error: &clap::Error) -> String {
    let report = error.render().to_string();
    let lines: Vec<&str> = report
        .lines()
        .map(str::trim)
        .take_while(|line| !line.starts_with("Usage:") && !line.starts_with("For more"))
        .filter(|line| !line.is_empty())
        .collect();
    let text = lines.join("; ").replace(":; ", ": ");
    let text = text.strip_prefix("error: ").unwrap_or(&text);
    format!("{text}; see nestling --help")
}
