//! The cache: what is downloaded or built once, outside the build tree, and verified before use.
//!
//! Each component is a folder with a `SHA256SUMS` of its files. A component is made in a folder
//! beside its place and moved there when whole, so that an interrupted set-up leaves nothing that
//! looks finished.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

/// The sums of a component's files.
const SUMS: &str = "SHA256SUMS";

/// The cache's folder.
#[derive(Clone, Debug)]
pub struct Cache {
    root: PathBuf,
}

impl Cache {
    /// `$NESTLING_CACHE`, else `nestling` in the user's cache folder.
    ///
    /// # Errors
    /// Neither `NESTLING_CACHE`, `XDG_CACHE_HOME` nor `HOME` says where.
    pub fn open() -> Result<Self> {
        let set = |name| {
            std::env::var_os(name)
                .filter(|v| !v.is_empty())
                .map(PathBuf::from)
        };
        let root = set("NESTLING_CACHE")
            .or_else(|| set("XDG_CACHE_HOME").map(|d| d.join("nestling")))
            .or_else(|| set("HOME").map(|d| d.join(".cache/nestling")))
            .context("no place for the cache: set NESTLING_CACHE to a folder")?;
        Ok(Self { root })
    }

    /// The cache in this folder.
    #[cfg(test)]
    pub fn at(root: &Path) -> Self {
        Self {
            root: root.to_owned(),
        }
    }

    /// The cache's folder.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The folder of the component `name`, made by `make` unless it is there and its sums hold.
    ///
    /// `make` is given an empty folder to fill.
    ///
    /// # Errors
    /// Whatever `make` says; the folder cannot be written.
    pub fn component(&self, name: &str, make: impl FnOnce(&Path) -> Result<()>) -> Result<PathBuf> {
        let place = self.root.join(name);
        if place.join(SUMS).exists() {
            if holds(&place)? {
                return Ok(place);
            }
            crate::report::note(&format!("{} does not match its sums; making it anew", name));
        }
        let half = self.root.join(format!("{}.making", name.replace('/', "-")));
        remove(&half)?;
        fs::create_dir_all(&half).with_context(|| format!("cannot make {}", half.display()))?;
        make(&half)?;
        write_sums(&half)?;
        remove(&place)?;
        if let Some(parent) = place.parent() {
            fs::create_dir_all(parent)?;
        }
        fs::rename(&half, &place).with_context(|| format!("cannot make {}", place.display()))?;
        Ok(place)
    }

    /// Removes the whole cache.
    ///
    /// # Errors
    /// A file cannot be removed.
    pub fn remove(&self) -> Result<()> {
        remove(&self.root)
    }
}

/// Removes a folder that may not be there.
///
/// # Errors
/// A file cannot be removed.
pub fn remove(folder: &Path) -> Result<()> {
    match fs::remove_dir_all(folder) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            Err(e).with_context(|| format!("cannot remove {}", folder.display()))
        }
        _ => Ok(()),
    }
}

/// The SHA-256 of a file, in lower-case hexadecimal.
///
/// # Errors
/// `sha256sum` cannot be run or cannot read the file.
pub fn sha256(file: &Path) -> Result<String> {
    let output = Command::new("sha256sum")
        .arg("--")
        .arg(file)
        .output()
        .context("sha256sum")?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    match text.split_whitespace().next() {
        Some(sum) if output.status.success() => Ok(sum.to_owned()),
        _ => bail!(
            "sha256sum {}: {}",
            file.display(),
            String::from_utf8_lossy(&output.stderr)
        ),
    }
}

fn holds(place: &Path) -> Result<bool> {
    let status = Command::new("sha256sum")
        .args(["--check", "--quiet", "--strict", SUMS])
        .current_dir(place)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .context("cannot run sha256sum (package coreutils)")?;
    Ok(status.success())
}

fn write_sums(place: &Path) -> Result<()> {
    let script = format!(
        "find . -type f ! -name '{SUMS}*' -print0 | sort -z | xargs -0 sha256sum -- > {SUMS}.new \
         && mv {SUMS}.new {SUMS}"
    );
    let status = Command::new("sh")
        .args(["-c", &script])
        .current_dir(place)
        .status()?;
    if !status.success() {
        bail!("cannot record the sums of {}", place.display());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(to: &Path, text: &str) -> Result<()> {
        fs::create_dir_all(to.join("sub"))?;
        fs::write(to.join("sub/a file"), text)?;
        Ok(())
    }

    #[test]
    fn a_component_is_made_once_whole_and_anew_when_it_was_changed() {
        let root = std::env::temp_dir().join(format!("lab-cache-{}", std::process::id()));
        let cache = Cache::at(&root);
        // One that was not finished is not there, and is no hindrance.
        let broken = cache.component("guests/x", |to| {
            write(to, "half")?;
            bail!("interrupted")
        });
        assert!(broken.is_err() && !root.join("guests/x").exists());
        let place = cache.component("guests/x", |to| write(to, "one")).unwrap();
        let text = || fs::read_to_string(root.join("guests/x/sub/a file")).unwrap();
        assert_eq!((place, text().as_str()), (root.join("guests/x"), "one"));
        cache.component("guests/x", |to| write(to, "two")).unwrap();
        assert_eq!(text(), "one", "it was there");
        fs::write(root.join("guests/x/sub/a file"), "other").unwrap();
        cache.component("guests/x", |to| write(to, "two")).unwrap();
        assert_eq!(text(), "two", "it was not what it had been");
        assert_eq!(fs::read_dir(&root).unwrap().count(), 1, "nothing is left");
        cache.remove().unwrap();
        assert!(!root.exists());
    }
}
