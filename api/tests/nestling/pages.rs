//! What the pages say of commands and options is so: every link leads somewhere, and every option
//! is one that nestling, or the program that is named here, has.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use vmm::config::SECTIONS;

use super::support::NESTLING;

/// Options of other programs that pages name.
const OTHERS: &[&str] = &[
    "--fail-with-body", // curl
    "--unix-socket",
    "--all-targets", // cargo
    "--bench",
    "--open",
    "--package",
    "--release",
    "--workspace",
    "--getsize", // blockdev
    "--emulate", // cargo lab
    "--no-guests",
];

/// Every page of the repository, with its text.
fn pages() -> Vec<(PathBuf, String)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let (mut folders, mut pages) = (vec![root], Vec::new());
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            if path.is_dir() && name != "target" && !name.starts_with('.') {
                folders.push(path);
            } else if name.ends_with(".md") {
                let text = fs::read_to_string(&path).unwrap();
                pages.push((path, text));
            }
        }
    }
    assert!(pages.len() > 8, "where are the pages?");
    pages
}

/// What follows each `start` in `text`, up to the first character that `ends`.
fn after<'t>(text: &'t str, start: &str, ends: fn(char) -> bool) -> Vec<&'t str> {
    let pieces = text.split(start).skip(1);
    pieces.map(|p| p.split(ends).next().unwrap()).collect()
}

/// A heading's name in links.
fn anchor(heading: &str) -> String {
    let kept = heading.trim().chars().filter_map(|c| match c {
        ' ' => Some('-'),
        c if c.is_alphanumeric() || c == '-' || c == '_' => Some(c.to_ascii_lowercase()),
        _ => None,
    });
    kept.collect()
}

#[test]
fn every_link_of_a_page_leads_somewhere() {
    for (page, text) in pages() {
        for link in after(&text, "](", |c| c == ')') {
            // Names of items are rustdoc's to check.
            let is_item = link.contains("::") || !link.contains(['/', '.', '#']);
            if is_item || link.starts_with("http") {
                continue;
            }
            let (file, heading) = link.split_once('#').unwrap_or((link, ""));
            let target = match file {
                "" => page.clone(),
                file => page.parent().unwrap().join(file),
            };
            assert!(target.exists(), "{}: {link}", page.display());
            if !heading.is_empty() {
                let text = fs::read_to_string(&target).unwrap();
                let mut headings = text.lines().filter_map(|line| line.strip_prefix('#'));
                let found = headings.any(|h| anchor(h.trim_start_matches('#')) == heading);
                assert!(found, "{}: no heading for {link}", page.display());
            }
        }
    }
}

fn help(words: &[&str]) -> String {
    let output = Command::new(NESTLING).args(words).arg("--help").output();
    String::from_utf8(output.unwrap().stdout).unwrap()
}

/// `--name` wherever it stands in `text`.
fn options(text: &str) -> BTreeSet<String> {
    let ends = |c: char| !c.is_ascii_lowercase() && c != '-';
    let names = after(text, "--", ends).into_iter();
    let names = names.filter(|name| name.starts_with(|c: char| c.is_ascii_lowercase()));
    names
        .map(|name| format!("--{}", name.trim_end_matches('-')))
        .collect()
}

#[test]
fn every_option_that_a_page_names_is_there() {
    let api = help(&["api"]);
    let commands = api.lines().skip_while(|line| *line != "Commands:").skip(1);
    let commands = commands.map_while(|line| line.split_whitespace().next());
    let mut known: BTreeSet<String> = OTHERS.iter().map(|&option| option.to_owned()).collect();
    for words in [&["run"][..], &["doctor"], &["pasids"], &["api"]] {
        known.extend(options(&help(words)));
    }
    for command in commands {
        known.extend(options(&help(&["api", command])));
    }
    for (page, text) in pages() {
        for option in options(&text) {
            assert!(known.contains(&option), "{}: {option}", page.display());
        }
    }
}

#[test]
fn every_key_of_an_option_that_a_page_names_is_there() {
    let mut seen = 0;
    for (page, text) in pages() {
        for section in SECTIONS.iter().filter(|section| !section.spread) {
            let ends = |c: char| c.is_whitespace() || "`|".contains(c);
            for value in after(&text, &format!("--{} ", section.option), ends) {
                let parts = value.split([',', '[', ']']);
                let parts = parts.filter(|part| !part.contains("=value…"));
                for (key, _) in parts.filter_map(|part| part.split_once('=')) {
                    let mut fields = section.group.fields.iter();
                    let known = fields.any(|field| field.option == key);
                    assert!(known, "{}: --{} {value}", page.display(), section.option);
                    seen += 1;
                }
            }
        }
        // Tables of options: the names in their first column.
        let mut rows = text.lines();
        while let Some(row) = rows.next() {
            if !row.starts_with("| option") {
                continue;
            }
            let names = rows
                .by_ref()
                .skip(1)
                .map_while(|row| row.strip_prefix("| `"));
            for name in names.filter_map(|row| row.split('`').next()) {
                let mut groups = SECTIONS.iter().map(|section| &section.group);
                let known = groups.any(|g| g.fields.iter().any(|field| field.option == name));
                assert!(known, "{}: {name}", page.display());
                seen += 1;
            }
        }
    }
    assert!(seen > 30, "only {seen} were found");
}
