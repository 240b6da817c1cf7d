//! Dependencies: permissive licences and one version of each crate, by the rules of `deny.toml`.
//!
//! `cargo deny` says the same and more; it is not on a fresh machine, these rules always run.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};
use serde::Deserialize;

#[derive(Deserialize)]
struct Rules {
    licenses: Licenses,
    bans: Bans,
}

#[derive(Deserialize)]
struct Licenses {
    allow: BTreeSet<String>,
}

#[derive(Deserialize)]
struct Bans {
    skip: Vec<Skip>,
}

#[derive(Deserialize)]
struct Skip {
    #[serde(rename = "crate")]
    name: String,
}

#[derive(Deserialize)]
struct Metadata {
    packages: Vec<Package>,
}

/// One package of the dependency graph.
#[derive(Deserialize)]
struct Package {
    name: String,
    version: String,
    license: Option<String>,
    /// `None` for the workspace's own.
    source: Option<String>,
}

/// Checks the locked dependency graph of the workspace at `root`.
///
/// # Errors
/// Every violation, one per line, with what to do.
pub fn check(root: &Path) -> Result<()> {
    let file = root.join("deny.toml");
    let text = std::fs::read_to_string(&file).with_context(|| format!("{}", file.display()))?;
    let rules: Rules = toml::from_str(&text).with_context(|| format!("{}", file.display()))?;
    let output = Command::new("cargo")
        .args(["metadata", "--format-version=1", "--locked"])
        .args(["--filter-platform", "x86_64-unknown-linux-gnu"])
        .current_dir(root)
        .output()
        .context("cannot start cargo metadata")?;
    if !output.status.success() {
        bail!(
            "cargo metadata: {}",
            String::from_utf8_lossy(&output.stderr)
        );
    }
    let metadata: Metadata = serde_json::from_slice(&output.stdout)?;
    let wrong = violations(&rules, &metadata.packages);
    if wrong.is_empty() {
        Ok(())
    } else {
        bail!("{}", wrong.join("\n"))
    }
}

fn violations(rules: &Rules, packages: &[Package]) -> Vec<String> {
    let mut wrong = Vec::new();
    let mut versions = BTreeMap::<&str, BTreeSet<&str>>::new();
    for package in packages {
        let licence = package.license.as_deref().unwrap_or("none");
        if !permitted(licence, &rules.licenses.allow) {
            wrong.push(format!(
                "{} {} has the licence {licence:?}, which deny.toml does not allow; take another crate",
                package.name, package.version
            ));
        }
        if package.source.is_some() && !rules.bans.skip.iter().any(|s| s.covers(package)) {
            versions
                .entry(&package.name)
                .or_default()
                .insert(&package.version);
        }
    }
    for (name, versions) in versions {
        if versions.len() > 1 {
            let list = versions.into_iter().collect::<Vec<_>>().join(" and ");
            wrong.push(format!(
                "{name} is there as {list}; align who needs it, or say why not under bans.skip in deny.toml"
            ));
        }
    }
    wrong
}

impl Skip {
    fn covers(&self, package: &Package) -> bool {
        let (name, version) = self.name.split_once('@').unwrap_or((&self.name, ""));
        let rest = package.version.strip_prefix(version);
        name == package.name && rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
    }
}

/// Whether the SPDX expression (or cargo's older `A/B`) can be met with `allowed` licences.
/// `AND` binds tighter than `OR`.
fn permitted(expression: &str, allowed: &BTreeSet<String>) -> bool {
    let text = expression
        .replace('/', " OR ")
        .replace('(', " ( ")
        .replace(')', " ) ");
    let words: Vec<&str> = text.split_whitespace().collect();
    let mut rest = words.as_slice();
    let value = any(&mut rest, allowed);
    value && rest.is_empty()
}

fn any(rest: &mut &[&str], allowed: &BTreeSet<String>) -> bool {
    let mut value = all(rest, allowed);
    while rest.first() == Some(&"OR") {
        *rest = &rest[1..];
        value |= all(rest, allowed);
    }
    value
}

fn all(rest: &mut &[&str], allowed: &BTreeSet<String>) -> bool {
    let mut value = one(rest, allowed);
    while rest.first() == Some(&"AND") {
        *rest = &rest[1..];
        value &= one(rest, allowed);
    }
    value
}

fn one(rest: &mut &[&str], allowed: &BTreeSet<String>) -> bool {
    let Some((&word, after)) = rest.split_first() else {
        return false;
    };
    *rest = after;
    if word == "(" {
        let value = any(rest, allowed);
        let closed = rest.first() == Some(&")");
        *rest = rest.get(1..).unwrap_or_default();
        return value && closed;
    }
    if let [with, exception, after @ ..] = *rest
        && *with == "WITH"
    {
        let whole = format!("{word} WITH {exception}");
        *rest = after;
        return allowed.contains(&whole);
    }
    allowed.contains(word)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn allowed() -> BTreeSet<String> {
        ["MIT", "BSD-3-Clause", "Apache-2.0 WITH LLVM-exception"]
            .map(str::to_owned)
            .into()
    }

    #[test]
    fn a_licence_expression_is_met_as_spdx_says() {
        for yes in [
            "MIT",
            "GPL-2.0 OR MIT",
            "MIT/GPL-2.0",
            "(GPL-2.0 OR MIT) AND BSD-3-Clause",
        ] {
            assert!(permitted(yes, &allowed()), "{yes}");
        }
        assert!(permitted("Apache-2.0 WITH LLVM-exception", &allowed()));
        for no in [
            "GPL-2.0",
            "MIT AND GPL-2.0",
            "none",
            "",
            "(MIT",
            "Apache-2.0 WITH x",
            "MIT MIT",
        ] {
            assert!(!permitted(no, &allowed()), "{no}");
        }
        assert!(permitted("GPL-2.0 AND MIT OR BSD-3-Clause", &allowed()));
    }

    #[test]
    fn two_versions_of_a_crate_are_found_unless_skipped() {
        let package = |name: &str, version: &str| Package {
            name: name.into(),
            version: version.into(),
            license: Some("MIT".into()),
            source: Some("registry".into()),
        };
        let rules = Rules {
            licenses: Licenses { allow: allowed() },
            bans: Bans {
                skip: vec![Skip {
                    name: "old@1".into(),
                }],
            },
        };
        let packages = [
            package("old", "1.3.2"),
            package("old", "2.0.0"),
            package("two", "0.1.0"),
            package("two", "0.2.0"),
        ];
        let wrong = violations(&rules, &packages);
        assert_eq!(wrong.len(), 1);
        assert!(
            wrong[0].starts_with("two is there as 0.1.0 and 0.2.0"),
            "{wrong:?}"
        );
    }
}
