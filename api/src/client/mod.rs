//! `nestling api`: the API's client for the command line.
//!
//! Each subcommand is one request. People get a table where there is one to show; `--json` gives
//! what the server said.

mod http;
mod opened;
mod table;

use std::io::{Read, Write};
use std::path::PathBuf;

use clap::{Arg, ArgAction, ArgMatches, Command, value_parser};
use serde_json::{Value, json};
use vmm::config::{DeviceConfig, DiskConfig, Group, NetConfig, TestDeviceConfig, schema};

use crate::Failure;

/// Where the socket is, when the option does not say.
const VARIABLE: &str = "NESTLING_API_SOCKET";

/// Subcommands that send no body: their names, verbs, requests and descriptions.
const PLAIN: &[(&str, &str, &str, &str)] = &[
    ("ping", "GET", "vmm.ping", "Show which nestling answers"),
    (
        "info",
        "GET",
        "vm.info",
        "Show the VM: state, devices, and what is being done",
    ),
    (
        "counters",
        "GET",
        "vm.counters",
        "Show what the VM's devices counted",
    ),
    (
        "host",
        "GET",
        "host.info",
        "Show what the host can do, as nestling doctor --json does",
    ),
    ("boot", "PUT", "vm.boot", "Boot the VM that was created"),
    ("pause", "PUT", "vm.pause", "Stop the vCPUs"),
    ("resume", "PUT", "vm.resume", "Let the vCPUs go on"),
    ("reboot", "PUT", "vm.reboot", "Reset the VM"),
    (
        "power-button",
        "PUT",
        "vm.power-button",
        "Press the guest's power button",
    ),
    (
        "shutdown",
        "PUT",
        "vm.shutdown",
        "Stop the VM at once; it can be booted again",
    ),
    ("delete", "PUT", "vm.delete", "Stop the VM and forget it"),
    (
        "shutdown-vmm",
        "PUT",
        "vmm.shutdown",
        "End nestling, and the VM with it",
    ),
];

/// Subcommands that add a device, with the options that describe it.
const ADD: &[(&str, &str, &str, Group)] = &[
    ("add-disk", "vm.add-disk", "disk", DiskConfig::GROUP),
    ("add-net", "vm.add-net", "net", NetConfig::GROUP),
    ("add-device", "vm.add-device", "device", DeviceConfig::GROUP),
    (
        "add-test-device",
        "vm.add-test-device",
        "test-device",
        TestDeviceConfig::GROUP,
    ),
];

/// The subcommand.
pub(crate) fn command() -> Command {
    let plain = PLAIN
        .iter()
        .map(|(name, _, _, about)| Command::new(*name).about(*about));
    let add = ADD.iter().map(|(name, _, option, group)| {
        Command::new(*name)
            .about(format!("Add what --{option} of nestling run describes"))
            .arg(
                Arg::new("options")
                    .required(true)
                    .value_name("OPTIONS")
                    .help(group.syntax())
                    .long_help(group.help()),
            )
            .arg(
                Arg::new("pass")
                    .long("pass")
                    .action(ArgAction::SetTrue)
                    .hide(!opened::can(name))
                    .help("Open it here and pass the descriptor: nestling needs no right to it"),
            )
    });
    Command::new("api")
        .about("Asks a running nestling over its API (nestling run --api-socket)")
        .subcommand_required(true)
        .arg_required_else_help(true)
        .arg(
            Arg::new("socket")
                .short('s')
                .long("socket")
                .global(true)
                .value_name("PATH")
                .value_parser(value_parser!(PathBuf))
                .help(format!("The socket; by itself, what ${VARIABLE} says")),
        )
        .arg(
            Arg::new("json")
                .long("json")
                .global(true)
                .action(ArgAction::SetTrue)
                .help("Print what the server says"),
        )
        .subcommands(plain)
        .subcommands(add)
        .subcommand(
            Command::new("create")
                .about("Create a VM from a JSON configuration; it is not booted")
                .arg(
                    Arg::new("file")
                        .value_name("FILE")
                        .default_value("-")
                        .help("The file, or - for standard input"),
                ),
        )
        .subcommand(
            Command::new("remove")
                .about("Remove a device, and wait until it is gone")
                .arg(
                    Arg::new("id")
                        .required(true)
                        .value_name("ID")
                        .help("Its name"),
                )
                .arg(
                    Arg::new("force")
                        .long("force")
                        .action(ArgAction::SetTrue)
                        .help("Take it away when the guest does not let go of it in time"),
                )
                .arg(
                    Arg::new("timeout")
                        .long("timeout")
                        .value_name("SECONDS")
                        .value_parser(value_parser!(u64))
                        .help("How long the guest has"),
                ),
        )
        .subcommand(
            Command::new("viommu")
                .about("Show the live state of the guest's vIOMMUs")
                .arg(
                    Arg::new("endpoint")
                        .long("endpoint")
                        .value_name("BDF")
                        .help("Only this function of the guest, for example 00:05.0"),
                ),
        )
        .subcommand(
            Command::new("events")
                .about("Follow what happens, until nestling ends")
                .arg(
                    Arg::new("after")
                        .long("after")
                        .value_name("N")
                        .value_parser(value_parser!(u64))
                        .help(
                            "Begin after event number N, as far as it is kept; 0: with the first",
                        ),
                ),
        )
}

/// Asks, and prints the answer.
///
/// # Errors
/// Nobody answers, or the answer is a refusal.
pub(crate) fn run(options: &ArgMatches) -> Result<u8, Failure> {
    let Some((name, words)) = options.subcommand() else {
        // clap lets nothing else through.
        return Ok(0);
    };
    let socket = words
        .get_one::<PathBuf>("socket")
        .cloned()
        .or_else(|| std::env::var_os(VARIABLE).map(PathBuf::from));
    let socket = socket.ok_or_else(|| {
        Failure::Usage(format!(
            "no socket is given; add --socket PATH or set {VARIABLE}"
        ))
    })?;
    let client = http::Client::new(socket);
    let raw = words.get_flag("json");
    if name == "events" {
        let after = words.get_one::<u64>("after");
        let request = match after {
            Some(after) => format!("vm.events?after={after}"),
            None => "vm.events".into(),
        };
        client.follow(&request, |data| match raw {
            true => show(data),
            false => show(&table::event(data)),
        })?;
        return Ok(0);
    }
    let (verb, request, mut body) = request(name, words)?;
    let pass = words.try_get_one::<bool>("pass").ok().flatten();
    let descriptors = match &mut body {
        Some(body) if pass.is_some() => opened::of(name, pass == Some(&true), body)?,
        _ => Vec::new(),
    };
    let answer = client.ask(verb, &request, body.as_ref(), &descriptors)?;
    let Some(answer) = answer else {
        return Ok(0);
    };
    let text = match raw {
        true => None,
        false => table::of(name, &answer),
    };
    show(text.unwrap_or_else(|| format!("{answer:#}")).trim_end());
    Ok(0)
}

fn show(text: &str) {
    // A reader that has seen enough is no failure.
    let _ = writeln!(std::io::stdout(), "{text}");
}

/// The verb, the request and its body.
fn request(
    name: &str,
    words: &ArgMatches,
) -> Result<(&'static str, String, Option<Value>), Failure> {
    if let Some((_, verb, request, _)) = PLAIN.iter().find(|(plain, ..)| *plain == name) {
        return Ok((verb, (*request).into(), None));
    }
    if let Some((_, request, option, group)) = ADD.iter().find(|(add, ..)| *add == name) {
        let text = words
            .get_one::<String>("options")
            .map_or("", String::as_str);
        let body = group
            .parse(option, text)
            .map_err(|why: schema::SchemaError| Failure::Usage(why.to_string()))?;
        return Ok(("PUT", (*request).into(), Some(body)));
    }
    match name {
        "create" => {
            let file = words.get_one::<String>("file").map_or("-", String::as_str);
            let text = match file {
                "-" => {
                    let mut text = String::new();
                    let read = std::io::stdin().read_to_string(&mut text);
                    read.map(|_| text)
                }
                path => std::fs::read_to_string(path),
            };
            let text = text.map_err(|why| {
                Failure::Usage(format!("{file} cannot be read ({why}); correct the path"))
            })?;
            let config = serde_json::from_str(&text).map_err(|why| {
                Failure::Usage(format!("{file} is not JSON ({why}); correct the file"))
            })?;
            Ok(("PUT", "vm.create".into(), Some(config)))
        }
        "remove" => {
            let mut body = json!({
                "id": words.get_one::<String>("id"),
                "force": words.get_flag("force"),
            });
            if let Some(timeout) = words.get_one::<u64>("timeout") {
                body["timeout"] = (*timeout).into();
            }
            Ok(("PUT", "vm.remove-device".into(), Some(body)))
        }
        _ => {
            let request = match words.get_one::<String>("endpoint") {
                Some(endpoint) => format!("vm.viommu?endpoint={}", http::escaped(endpoint)),
                None => "vm.viommu".into(),
            };
            Ok(("GET", request, None))
        }
    }
}
