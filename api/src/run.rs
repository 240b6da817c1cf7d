//! `nestling run`: one option per section of the configuration, generated from its tables.

use std::fmt::Write as _;

use clap::{Arg, ArgAction, ArgMatches, Command};
use vmm::config::{Builder, Field, PayloadConfig, SECTIONS, Section, schema};
use vmm::control::{self, Shared};
use vmm::outcome::STATUSES;
use vmm::vm::Control;

use crate::Failure;

/// The subcommand with its whole help.
pub(crate) fn command() -> Command {
    let payload = PayloadConfig::GROUP.fields.iter().map(payload_arg);
    let sections = SECTIONS.iter().filter(|s| !is_payload(s)).map(section_arg);
    Command::new("run")
        .about("Runs a VM until it ends")
        .arg_required_else_help(true)
        .arg(
            Arg::new("config")
                .long("config")
                .value_name("FILE")
                .help("Take the configuration from a JSON file; options add to it or replace it"),
        )
        .args(payload)
        .args(sections)
        .after_long_help(after_help())
}

fn is_payload(section: &Section) -> bool {
    section.key == "payload"
}

fn payload_arg(field: &Field) -> Arg {
    let mut help = schema::paragraph(field.docs);
    if let Some(default) = (field.default)() {
        let _ = write!(help, " [default: {default}]");
    }
    let long = format!("{help} In JSON: payload.{}.", field.key);
    Arg::new(field.option)
        .long(field.option)
        .value_name(field.syntax)
        .help(help)
        .long_help(long)
}

fn section_arg(section: &Section) -> Arg {
    let (action, json) = match section.many {
        true => (ArgAction::Append, format!("an array, \"{}\"", section.key)),
        false => (ArgAction::Set, format!("an object, \"{}\"", section.key)),
    };
    Arg::new(section.option)
        .long(section.option)
        .value_name("OPTIONS")
        .action(action)
        .help(format!(
            "{} {}",
            schema::paragraph(section.group.docs),
            section.group.syntax()
        ))
        .long_help(format!("{}\n\n  In JSON: {json}.", section.group.help()))
}

fn after_help() -> String {
    let mut text = String::from("Exit status:\n");
    for (status, meaning) in STATUSES {
        let _ = writeln!(text, "  {status:<6} {meaning}");
    }
    text.push_str(
        "
Signals:
  SIGINT, SIGTERM, SIGHUP  end the VM at once
  SIGPWR                   press the guest's power button
  SIGUSR1                  print the VM's live state to standard error

Keys, where the guest has the terminal:
  Ctrl-A x                 end the VM at once
  Ctrl-A Ctrl-A            send one Ctrl-A

Sizes are bytes, or have K, M, G or T (powers of 1024). A value with a comma goes in double quotes.

Example:
  nestling run --kernel bzImage --initramfs initrd --cpus boot=2 --memory size=1G \\
    --disk path=root.img --cmdline \"console=ttyS0 root=/dev/vda\"
",
    );
    text
}

/// Runs the VM and returns the exit status.
pub(crate) fn run(options: &ArgMatches) -> Result<u8, Failure> {
    let config = configuration(options)
        .and_then(|config| config.build().map_err(|why| why.to_string()))
        .and_then(|config| config.validate().map_err(|why| why.to_string()))
        .map_err(Failure::Usage)?;
    let (_controller, requests) = control::channel().map_err(|why| Failure::Error(why.into()))?;
    let control = Control {
        requests,
        shared: Shared::default(),
    };
    match vmm::vm::run(Some(config), control) {
        Ok(outcome) => Ok(outcome.status()),
        Err(why) => Err(Failure::Error(Box::new(why))),
    }
}

fn configuration(options: &ArgMatches) -> Result<Builder, String> {
    let mut builder = match options.get_one::<String>("config") {
        Some(path) => {
            let text = std::fs::read_to_string(path).map_err(|why| {
                format!("--config {path} cannot be read ({why}); correct the path")
            })?;
            Builder::from_json(path, &text).map_err(|why| why.to_string())?
        }
        None => Builder::default(),
    };
    let payload = PayloadConfig::GROUP.fields.iter().map(|f| f.option);
    let sections = SECTIONS.iter().filter(|s| !is_payload(s)).map(|s| s.option);
    for option in payload.chain(sections) {
        for text in options.get_many::<String>(option).into_iter().flatten() {
            builder
                .option(option, text)
                .map_err(|why| why.to_string())?;
        }
    }
    Ok(builder)
}
