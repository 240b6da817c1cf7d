//! `nestling run`: one option per section of the configuration, generated from its tables.

use std::fmt::Write as _;
use std::os::fd::RawFd;
use std::path::PathBuf;

use clap::{Arg, ArgAction, ArgMatches, Command};
use vmm::config::{Builder, Field, SECTIONS, Section, Validated, schema};
use vmm::control::{self, Descriptors, Given, Shared};
use vmm::outcome::STATUSES;
use vmm::sandbox::Sandbox;
use vmm::vm::Control;

use crate::Failure;
use crate::inherited::inherited;
use crate::server::{Listener, Monitor, Server, Services};

const API_SOCKET: &str = "api-socket";
const EVENT_MONITOR: &str = "event-monitor";

/// The subcommand with its whole help.
pub(crate) fn command() -> Command {
    let spread = SECTIONS.iter().filter(|section| section.spread);
    let spread =
        spread.flat_map(|section| section.group.fields.iter().map(|f| field_arg(section, f)));
    let sections = SECTIONS.iter().filter(|section| !section.spread);
    let sections = sections.map(section_arg);
    Command::new("run")
        .about("Runs a VM until it ends")
        .arg(
            Arg::new("config")
                .long("config")
                .value_name("FILE")
                .help("Take the configuration from a JSON file; options add to it or replace it."),
        )
        .args(spread)
        .args(sections)
        .arg(
            Arg::new(API_SOCKET)
                .long(API_SOCKET)
                .value_name("path=PATH|fd=N")
                .help(
                    "Serve the API on this Unix socket; without a kernel, a client creates the VM",
                )
                .long_help(
                    "Serve the API (HTTP/1.1 with JSON, see nestling api) on a Unix socket that is \
                     made for this user alone, or on a listening one that is descriptor N. When no \
                     VM is described by other options, none runs until a client creates it.",
                ),
        )
        .arg(
            Arg::new(EVENT_MONITOR)
                .long(EVENT_MONITOR)
                .value_name("path=PATH|fd=N")
                .help(
                    "Write what happens, one JSON object per line, to a file, pipe or descriptor.",
                ),
        )
        .after_long_help(after_help())
}

fn field_arg(section: &Section, field: &Field) -> Arg {
    let mut help = schema::paragraph(field.docs);
    if let Some(default) = (field.default)() {
        let _ = write!(help, " [default: {default}]");
    }
    let long = format!("{help} In JSON: {}.{}.", section.key, field.key);
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

/// Runs the VM, if there is one, and serves clients; returns the exit status.
pub(crate) fn run(options: &ArgMatches) -> Result<u8, Failure> {
    let services = services(options).map_err(Failure::Usage)?;
    let asked = configuration(options).map_err(Failure::Usage)?;
    let (sandbox, rules) = asked
        .sandbox()
        .map_err(|why| Failure::Usage(why.to_string()))?;
    let config = match services.listener.is_some() && !describes_a_vm(options) {
        true => None,
        false => Some(
            asked
                .build()
                .map_err(|why| why.to_string())
                .and_then(|config| config.validate().map_err(|why| why.to_string()))
                .map_err(Failure::Usage)?,
        ),
    };
    let descriptors = inherited_by_devices(config.as_ref()).map_err(Failure::Usage)?;
    let sandbox = Sandbox::new(&sandbox, &rules, services.listener.is_some());
    let landlock = sandbox.landlock;
    let error = |why: Box<dyn std::error::Error>| Failure::Error(why);
    let nestling = vmm::vm::prepare(sandbox).map_err(|why| error(why.into()))?;
    let (controller, requests) = control::channel().map_err(|why| error(why.into()))?;
    let shared = Shared::default();
    let served = services.listener.is_some() || services.monitor.is_some();
    // Dropped last: answers that are on their way arrive.
    let _server = served
        .then(|| Server::start(services, controller, shared.clone(), landlock))
        .transpose()
        .map_err(|why| error(why.into()))?;
    let control = Control {
        requests,
        shared,
        descriptors,
    };
    match nestling.run(config, control) {
        Ok(outcome) => Ok(outcome.status()),
        Err(why) => Err(error(why.into())),
    }
}

/// The descriptors that options name with `fd=` and `iommufd=`.
fn inherited_by_devices(config: Option<&Validated>) -> Result<Descriptors, String> {
    let descriptors = Descriptors::default();
    for (id, fd, iommufd) in config.iter().flat_map(|config| config.descriptors()) {
        let copy = |number: Option<u32>| {
            let number = number.map(|number| RawFd::try_from(number).unwrap_or(RawFd::MAX));
            let copied = number.map(inherited).transpose();
            copied.map_err(|why| format!("device id={id}: {why}"))
        };
        let given = Given {
            device: copy(fd)?,
            iommufd: copy(iommufd)?,
        };
        descriptors.keep(id, given);
    }
    Ok(descriptors)
}

fn services(options: &ArgMatches) -> Result<Services, String> {
    let listener = match place(options, API_SOCKET)? {
        Some(Place::Path(path)) => Some(Listener::bind(&path)?),
        Some(Place::Descriptor(fd)) => Some(Listener::inherit(fd)?),
        None => None,
    };
    let monitor = match place(options, EVENT_MONITOR)? {
        Some(Place::Path(path)) => Some(Monitor::open(&path)?),
        Some(Place::Descriptor(fd)) => Some(Monitor::inherit(fd)?),
        None => None,
    };
    Ok(Services { listener, monitor })
}

/// `path=PATH`, `fd=N`, or just a path, as Cloud Hypervisor takes it.
enum Place {
    Path(PathBuf),
    Descriptor(RawFd),
}

fn place(options: &ArgMatches, option: &str) -> Result<Option<Place>, String> {
    let Some(text) = options.get_one::<String>(option) else {
        return Ok(None);
    };
    let wrong = || {
        Err(format!(
            "--{option} {text} is wrong; write path=PATH or fd=N"
        ))
    };
    match text.split_once('=') {
        Some(("fd", number)) => match number.parse() {
            Ok(fd) => Ok(Some(Place::Descriptor(fd))),
            Err(_) => wrong(),
        },
        Some(("path", "")) => wrong(),
        Some(("path", path)) => Ok(Some(Place::Path(path.into()))),
        None if !text.is_empty() => Ok(Some(Place::Path(text.into()))),
        _ => wrong(),
    }
}

/// Whether any option is about a VM.
fn describes_a_vm(options: &ArgMatches) -> bool {
    let of_nestling = ["sandbox", "landlock_rules"];
    let of_the_vm = SECTIONS.iter().filter(|s| !of_nestling.contains(&s.key));
    let mut options_of_it = of_the_vm.flat_map(option_names).chain(["config"]);
    options_of_it.any(|option| options.contains_id(option))
}

/// The options of the command line that stand for a section.
fn option_names(section: &Section) -> Vec<&'static str> {
    match section.spread {
        true => section.group.fields.iter().map(|f| f.option).collect(),
        false => vec![section.option],
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
    for option in SECTIONS.iter().flat_map(option_names) {
        for text in options.get_many::<String>(option).into_iter().flatten() {
            builder
                .option(option, text)
                .map_err(|why| why.to_string())?;
        }
    }
    Ok(builder)
}
