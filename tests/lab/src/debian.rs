//! Debian packages without touching the system: apt with a package list and folders of its own.
//!
//! Everything is verified by apt (signed indices, sums of every package) with the Debian archive
//! keyring of the machine.

use std::cmp::Ordering;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::cache::{Cache, remove};

/// The archive's keys, as every Debian has them.
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// The suites that the lab takes packages from.
const SUITES: [&str; 3] = ["bookworm", "bookworm-backports", "trixie-backports"];
/// The suites of a system that is put together beside this one, to build what needs its compiler.
const OTHER_SUITES: [&str; 2] = ["trixie", "trixie-backports"];

/// apt, set up beside the system's.
#[derive(Debug)]
pub struct Apt {
    config: PathBuf,
    archives: PathBuf,
}

impl Apt {
    /// Sets it up in the cache and reads the package lists, once for each day.
    ///
    /// # Errors
    /// There is no apt, no keyring or no mirror, or the lists cannot be read.
    pub fn open(cache: &Cache) -> Result<Self> {
        Self::set_up(cache.root().join("apt"), &SUITES, None)
    }

    /// The same for Debian 13, as if nothing were installed: what a package depends on is all
    /// fetched with it.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn open_trixie(cache: &Cache) -> Result<Self> {
        Self::set_up(cache.root().join("apt-trixie"), &OTHER_SUITES, Some(""))
    }

    /// In the folder `root`. `installed` is what dpkg's status says; the system's when `None`.
    fn set_up(root: PathBuf, suites: &[&str], installed: Option<&str>) -> Result<Self> {
        if !Path::new(KEYRING).exists() {
            bail!("{KEYRING} is missing; install it: apt-get install debian-archive-keyring");
        }
        let apt = Self {
            config: root.join("apt.conf"),
            archives: root.join("archives"),
        };
        for folder in ["lists/partial", "archives/partial", "cache"] {
            fs::create_dir_all(root.join(folder))?;
        }
        let mirror = mirror()?;
        let mut list = String::new();
        for suite in suites {
            list += &format!("deb [arch=amd64 signed-by={KEYRING}] {mirror} {suite} main\n");
        }
        let fresh = fs::read_to_string(root.join("sources.list")).is_ok_and(|old| old == list)
            && fs::metadata(root.join("lists/lock"))
                .and_then(|m| m.modified())
                .is_ok_and(|t| t.elapsed().is_ok_and(|age| age.as_secs() < 24 * 3600));
        fs::write(root.join("sources.list"), list)?;
        let path = root.display();
        let mut config = String::new();
        if let Some(installed) = installed {
            fs::write(root.join("status"), installed)?;
            config = format!("Dir::State::status \"{path}/status\";\n");
        }
        config += &format!(
            "Dir::Etc::sourcelist \"{path}/sources.list\";\n\
             Dir::Etc::sourceparts \"/dev/null\";\n\
             Dir::Etc::preferences \"/dev/null\";\n\
             Dir::Etc::preferencesparts \"/dev/null\";\n\
             Dir::State::lists \"{path}/lists\";\n\
             Dir::Cache \"{path}/cache\";\n\
             Dir::Cache::archives \"{path}/archives\";\n\
             APT::Architecture \"amd64\";\n\
             APT::Sandbox::User \"root\";\n\
             Acquire::Languages \"none\";\n\
             Acquire::Retries \"3\";\n\
             Acquire::http::Timeout \"60\";\n\
             Debug::NoLocking \"true\";\n"
        );
        fs::write(&apt.config, config)?;
        if !fresh {
            crate::report::step("read Debian's package lists", || {
                apt.get(&["update", "-q"], &root)?;
                fs::write(root.join("lists/lock"), "")?;
                Ok(())
            })?;
        }
        Ok(apt)
    }

    /// Unpacks the newest version of a package, without what it depends on, into `to`.
    ///
    /// # Errors
    /// It cannot be fetched or unpacked.
    pub fn unpack(&self, package: &str, to: &Path) -> Result<()> {
        self.fetch(package, |deb| unpack(deb, to))
    }

    /// Fetches a package and gives its file to `with`; the file is removed afterwards.
    ///
    /// # Errors
    /// It cannot be fetched; whatever `with` says.
    pub fn fetch<T>(&self, package: &str, with: impl FnOnce(&Path) -> Result<T>) -> Result<T> {
        let folder = self.archives.join("one");
        remove(&folder)?;
        fs::create_dir_all(&folder)?;
        self.get(&["download", "-q", package], &folder)?;
        let [deb] = debs(&folder)?.try_into().map_err(|_| {
            anyhow::anyhow!(
                "apt-get download {package} left no package in {}",
                folder.display()
            )
        })?;
        let result = with(&deb);
        remove(&folder)?;
        result
    }

    /// Unpacks a package of `suite`, and what it depends on that the system lacks, into `to`.
    ///
    /// # Errors
    /// It cannot be fetched or unpacked.
    pub fn unpack_with_dependencies(&self, package: &str, suite: &str, to: &Path) -> Result<()> {
        self.unpack_all(&[package], suite, to)
    }

    /// The same for several packages. The first one is unpacked first.
    ///
    /// # Errors
    /// One cannot be fetched or unpacked.
    pub fn unpack_all(&self, packages: &[&str], suite: &str, to: &Path) -> Result<()> {
        for old in debs(&self.archives)? {
            fs::remove_file(old)?;
        }
        let arguments = [
            "install",
            "-q",
            "-y",
            "--download-only",
            "--no-install-recommends",
            "-t",
            suite,
        ];
        self.get(&[arguments.as_slice(), packages].concat(), &self.archives)?;
        let mut all = debs(&self.archives)?;
        let first = packages.first().map(|first| format!("{first}_"));
        all.sort_by_key(|deb| {
            let name = deb.file_name().unwrap_or_default().to_string_lossy();
            first.as_ref().is_none_or(|first| !name.starts_with(first))
        });
        for deb in all {
            unpack(&deb, to)?;
            fs::remove_file(deb)?;
        }
        Ok(())
    }

    /// The newest package whose name is `before`, numbers and dots, `after`.
    ///
    /// # Errors
    /// There is none.
    pub fn newest(&self, before: &str, after: &str) -> Result<String> {
        let pattern = format!("^{}", before.replace('.', "\\."));
        let output = Command::new("apt-cache")
            .args(["search", "--names-only", &pattern])
            .env("APT_CONFIG", &self.config)
            .output()
            .context("cannot run apt-cache")?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let numbers = |name: &str| -> Option<Vec<u64>> {
            let middle = name.strip_prefix(before)?.strip_suffix(after)?;
            middle.split(['.', '-']).map(|n| n.parse().ok()).collect()
        };
        text.lines()
            .filter_map(|line| line.split_once(' '))
            .filter_map(|(name, _)| Some((numbers(name)?, name)))
            .max_by(|a, b| a.0.cmp(&b.0).then(Ordering::Equal))
            .map(|(_, name)| name.to_owned())
            .with_context(|| format!("the Debian mirror has no package {before}*{after}"))
    }

    fn get(&self, arguments: &[&str], folder: &Path) -> Result<()> {
        let output = Command::new("apt-get")
            .args(arguments)
            .env("APT_CONFIG", &self.config)
            .env("LC_ALL", "C")
            .current_dir(folder)
            .stdin(Stdio::null())
            .output()
            .context("cannot run apt-get; the lab needs a Debian or a system like it")?;
        if !output.status.success() {
            bail!(
                "apt-get {} failed:\n{}",
                arguments.join(" "),
                String::from_utf8_lossy(&output.stderr).trim()
            );
        }
        Ok(())
    }
}

/// Makes sure that programs are there, from packages of the system's own release: installed when
/// this is root, else asked for.
///
/// # Errors
/// Not root and something is missing (the error is the command to type), or apt-get failed.
pub fn require(programs: &[(&str, &str)]) -> Result<()> {
    let mut missing: Vec<&str> = programs
        .iter()
        .filter(|(test, _)| !present(test))
        .map(|(_, package)| *package)
        .collect();
    missing.sort_unstable();
    missing.dedup();
    if missing.is_empty() {
        return Ok(());
    }
    let command = format!(
        "apt-get install -y --no-install-recommends {}",
        missing.join(" ")
    );
    if !is_root() {
        bail!("the lab needs packages that are not installed; run: sudo {command}");
    }
    crate::report::step(&command, || {
        let install = || run_shell(&format!("DEBIAN_FRONTEND=noninteractive {command} -q"));
        install().or_else(|_| {
            run_shell("apt-get update -q")?;
            install()
        })
    })
}

/// Whether this process may do what only root may.
pub fn is_root() -> bool {
    // SAFETY: geteuid has no preconditions.
    unsafe { libc::geteuid() == 0 }
}

/// Whether a program is on the path, or a file is there.
fn present(test: &str) -> bool {
    if test.starts_with('/') {
        return Path::new(test).exists();
    }
    std::env::var_os("PATH")
        .is_some_and(|path| std::env::split_paths(&path).any(|folder| folder.join(test).exists()))
}

fn run_shell(command: &str) -> Result<()> {
    let output = Command::new("sh")
        .args(["-c", command])
        .stdin(Stdio::null())
        .output()?;
    if !output.status.success() {
        bail!(
            "{command} failed:\n{}",
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(())
}

fn debs(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.extension().is_some_and(|e| e == "deb") {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

/// Unpacks one package file.
///
/// # Errors
/// `dpkg-deb` fails.
pub fn unpack(deb: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to)?;
    let output = Command::new("dpkg-deb")
        .arg("-x")
        .arg(deb)
        .arg(to)
        .output()
        .context("dpkg-deb")?;
    if !output.status.success() {
        bail!(
            "dpkg-deb -x {}: {}",
            deb.display(),
            String::from_utf8_lossy(&output.stderr)
        );
    }
    Ok(())
}

/// The Debian mirror that this machine uses.
fn mirror() -> Result<String> {
    if let Ok(set) = std::env::var("NESTLING_DEBIAN_MIRROR") {
        return Ok(set);
    }
    let mut texts = vec![fs::read_to_string("/etc/apt/sources.list").unwrap_or_default()];
    if let Ok(parts) = fs::read_dir("/etc/apt/sources.list.d") {
        for part in parts.flatten() {
            let path = part.path();
            if path
                .extension()
                .is_some_and(|e| e == "list" || e == "sources")
            {
                texts.push(fs::read_to_string(path).unwrap_or_default());
            }
        }
    }
    texts.iter().find_map(|text| mirror_in(text)).context(
        "no Debian mirror in /etc/apt/sources.list or sources.list.d; \
         set NESTLING_DEBIAN_MIRROR to the address of one",
    )
}

/// The first address of the main archive in a one-line or a deb822 list of sources.
fn mirror_in(text: &str) -> Option<String> {
    let is_archive =
        |uri: &&str| uri.contains("://") && uri.trim_end_matches('/').ends_with("/debian");
    for line in text.lines() {
        let line = line.trim();
        let rest = match line.split_once(char::is_whitespace) {
            Some(("deb" | "URIs:", rest)) => rest,
            _ => continue,
        };
        if let Some(uri) = rest.split_whitespace().find(is_archive) {
            return Some(uri.to_owned());
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mirror_is_read_from_both_kinds_of_list() {
        let old = "# deb http://no.example/debian x\ndeb [arch=amd64] http://a.example/debian/ \
                   bookworm main\n";
        assert_eq!(mirror_in(old).as_deref(), Some("http://a.example/debian/"));
        let new = "Types: deb\nURIs: http://b.example/debian-security http://b.example/debian\n";
        assert_eq!(mirror_in(new).as_deref(), Some("http://b.example/debian"));
        assert_eq!(mirror_in("deb http://c.example/other bookworm main"), None);
    }
}
