//! `nestling pasids`: which VMs of this host hold which PASIDs.

use std::path::PathBuf;

use clap::{Arg, ArgAction, ArgMatches, Command, value_parser};
use viommu::pasid::{DEFAULT_DIRECTORY, Holder, holders};

use crate::Failure;

/// The command line.
pub(crate) fn command() -> Command {
    Command::new("pasids")
        .about("Lists the PASIDs that the VMs of this host own")
        .arg(
            Arg::new("directory")
                .long("directory")
                .value_name("DIRECTORY")
                .value_parser(value_parser!(PathBuf))
                .default_value(DEFAULT_DIRECTORY)
                .help("Where the VMs keep the host's PASID file"),
        )
        .arg(
            Arg::new("json")
                .long("json")
                .action(ArgAction::SetTrue)
                .help("Print JSON: an array of owners"),
        )
}

/// Does it.
///
/// # Errors
/// The file cannot be read.
pub(crate) fn list(options: &ArgMatches) -> Result<u8, Failure> {
    let default = || PathBuf::from(DEFAULT_DIRECTORY);
    let directory = options
        .get_one("directory")
        .cloned()
        .unwrap_or_else(default);
    let found = holders(&directory).map_err(|why| Failure::Error(Box::new(why)))?;
    match options.get_flag("json") {
        true => {
            let json = serde_json::to_string_pretty(&found);
            println!("{}", json.map_err(|why| Failure::Error(Box::new(why)))?);
        }
        false => print!("{}", table(&found)),
    }
    Ok(0)
}

fn table(holders: &[Holder]) -> String {
    if holders.is_empty() {
        return "No VM of this host owns a PASID.\n".into();
    }
    let mut text = format!(
        "{:24} {:>8} {:>8} {:>8}  PASIDS\n",
        "OWNER", "PROCESS", "IN USE", "OWNED"
    );
    for holder in holders {
        let (name, pid) = match &holder.owner {
            Some(owner) => (owner.name.as_str(), owner.pid.to_string()),
            None => ("(starting)", "-".into()),
        };
        let ranges: Vec<_> = holder
            .ranges
            .iter()
            .map(|(first, last)| match first == last {
                true => first.to_string(),
                false => format!("{first}-{last}"),
            })
            .collect();
        text += &format!(
            "{name:24} {pid:>8} {:>8} {:>8}  {}\n",
            holder.in_use,
            holder.owned,
            ranges.join(",")
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use viommu::pasid::Owner;

    #[test]
    fn the_table_says_who_has_how_many_and_which() {
        let holders = [
            Holder {
                owner: Some(Owner {
                    name: "vm1".into(),
                    pid: 42,
                }),
                ranges: vec![(1, 63), (65, 65)],
                owned: 64,
                in_use: 3,
            },
            Holder {
                owner: None,
                ranges: vec![(128, 191)],
                owned: 64,
                in_use: 0,
            },
        ];
        let table = table(&holders);
        let lines: Vec<Vec<_>> = table
            .lines()
            .map(|l| l.split_whitespace().collect())
            .collect();
        assert_eq!(lines[1], ["vm1", "42", "3", "64", "1-63,65"]);
        assert_eq!(lines[2], ["(starting)", "-", "0", "64", "128-191"]);
    }

    #[test]
    fn a_host_without_owners_says_so() {
        assert_eq!(table(&[]).lines().count(), 1);
    }
}
