//! The sites' disk images: built by the recipe beside this crate (`image/build`)
//! and cached under a key.
//!
//! ```text
//! $VMSHADOW_CACHE, or $XDG_CACHE_HOME/vmshadow, or ~/.cache/vmshadow
//! └─ testbed
//!    ├─ lock                one builder at a time
//!    ├─ KEY                 the images of this recipe and these package versions
//!    └─ KEY.tmp             under construction; renamed when whole
//! ```
//! The key is a digest of the recipe's text, of the package sources, and of the
//! versions that this machine's apt has on offer for the packages that matter: a
//! new kernel or hypervisor gives new images. Images that were not used for a
//! month go when new ones are built.
//!
//! The packages come from where this machine's own apt takes Debian's archive
//! from, and its proxy settings hold for them. Building takes root, for it makes
//! a root file system with mmdebstrap.

use crate::process;
use crate::{Error, Result};
use nix::fcntl::{Flock, FlockArg};
use std::fmt;
use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::str::FromStr;
use std::time::{Duration, SystemTime};
use xxhash_rust::xxh3::xxh3_128;

/// The files of the recipe.
const RECIPE: [(&str, &str); 3] = [
    ("build", include_str!("../image/build")),
    ("init", include_str!("../image/init")),
    ("initrd-init", include_str!("../image/initrd-init")),
];

/// Packages whose versions make new images.
const PACKAGES: [&str; 6] = [
    "xen-hypervisor-4.17-amd64",
    "xen-utils-4.17",
    "linux-image-amd64",
    "openssh-server",
    "libc6",
    "busybox-static",
];

/// Debian's release that the sites run.
const RELEASE: &str = "bookworm";

/// After this time without use, an image makes room for others.
const KEPT: Duration = Duration::from_secs(30 * 24 * 3600);

/// Which of Debian 12's hypervisors a testbed runs. The Xen libraries and tools
/// in dom0 are of the same version.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Deserialize, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Hypervisor {
    /// That of the main suite (4.17.5): with shadow paging, so with log-dirty for
    /// PV guests.
    #[default]
    Release,
    /// That of the security suite (4.17.7): without shadow paging.
    Security,
}

impl fmt::Display for Hypervisor {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Release => "release",
            Self::Security => "security",
        })
    }
}

impl FromStr for Hypervisor {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        match text {
            "release" => Ok(Self::Release),
            "security" => Ok(Self::Security),
            _ => Err("Neither release nor security".to_owned()),
        }
    }
}

/// Images that are there.
#[derive(Clone, Debug)]
pub struct Images {
    directory: PathBuf,
}

impl Images {
    /// The images of this recipe: from the cache, or built now, which takes about
    /// a minute.
    ///
    /// # Errors
    /// When the packages can't be had, or when this process is not root and must
    /// build.
    pub fn obtain() -> Result<Self> {
        let root = cache_root()?.join("testbed");
        fs::create_dir_all(&root).map_err(Error::file(&root))?;
        let sources = sources()?;
        let directory = root.join(key(&sources)?);
        if !directory.exists() {
            let _lock = lock(&root)?;
            // Another builder may have been faster.
            if !directory.exists() {
                build(&root, &directory, &sources)?;
            }
        }
        let used = directory.join("used");
        fs::write(&used, "").map_err(Error::file(&used))?;
        Ok(Self { directory })
    }

    /// The images in a directory, as [`Images::directory`] gave it.
    #[must_use]
    pub fn at(directory: impl Into<PathBuf>) -> Self {
        Self {
            directory: directory.into(),
        }
    }

    /// A file of the images.
    fn file(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// The root file system, to put an overlay on.
    #[must_use]
    pub fn disk(&self, hypervisor: Hypervisor) -> PathBuf {
        self.file(&format!("{hypervisor}.qcow2"))
    }

    /// The hypervisor's ELF file.
    #[must_use]
    pub fn hypervisor(&self, hypervisor: Hypervisor) -> PathBuf {
        self.file(&format!("{hypervisor}.xen"))
    }

    /// The kernel of dom0.
    #[must_use]
    pub fn kernel(&self) -> PathBuf {
        self.file("vmlinux")
    }

    /// What dom0's kernel needs to find its root.
    #[must_use]
    pub fn dom0_initrd(&self) -> PathBuf {
        self.file("dom0.initrd")
    }

    /// A guest's modules and busybox, without an init.
    #[must_use]
    pub fn guest_initrd(&self) -> PathBuf {
        self.file("guest.initrd")
    }

    /// The private key that opens the sites.
    #[must_use]
    pub fn ssh_key(&self) -> PathBuf {
        self.file("id")
    }

    /// The sites' host key.
    #[must_use]
    pub fn known_hosts(&self) -> PathBuf {
        self.file("known_hosts")
    }

    /// The directory that holds the images.
    #[must_use]
    pub fn directory(&self) -> &Path {
        &self.directory
    }
}

/// Removes every image.
///
/// # Errors
/// When a file can't be removed.
pub fn remove_all() -> Result<()> {
    let root = cache_root()?.join("testbed");
    if !root.exists() {
        return Ok(());
    }
    let _lock = lock(&root)?;
    for entry in entries(&root)? {
        if entry.is_dir() {
            fs::remove_dir_all(&entry).map_err(Error::file(&entry))?;
        }
    }
    Ok(())
}

/// Where recordings of guests' memory are kept.
///
/// # Errors
/// When nothing says where a cache may be.
pub fn recordings() -> Result<PathBuf> {
    Ok(cache_root()?.join("recordings"))
}

fn cache_root() -> Result<PathBuf> {
    let variable = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
    variable("VMSHADOW_CACHE")
        .map(PathBuf::from)
        .or_else(|| variable("XDG_CACHE_HOME").map(|path| PathBuf::from(path).join("vmshadow")))
        .or_else(|| variable("HOME").map(|path| PathBuf::from(path).join(".cache/vmshadow")))
        .ok_or_else(|| Error::Unfit("None of VMSHADOW_CACHE, XDG_CACHE_HOME, HOME is set".into()))
}

fn lock(root: &Path) -> Result<Flock<File>> {
    let path = root.join("lock");
    let file = File::create(&path).map_err(Error::file(&path))?;
    Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, errno)| Error::File {
        path,
        source: errno.into(),
    })
}

fn entries(directory: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(directory).map_err(Error::file(directory))?;
    Ok(entries.flatten().map(|entry| entry.path()).collect())
}

/// Where this machine's apt takes Debian's archive from, in the one-line form of
/// sources.list.
fn sources() -> Result<String> {
    let format = "$(REPO_URI)|$(RELEASE)|$(COMPONENT)|$(ORIGIN)";
    let targets = process::run(Command::new("apt-get").args([
        "indextargets",
        "--format",
        format,
        "Created-By: Packages",
    ]))?;
    let sources = debian_sources(&targets);
    if !sources.lines().any(|line| line.ends_with("-security main")) {
        return Err(Error::Unfit(format!(
            "This machine's apt has no Debian {RELEASE} with its security suite; is there need \
             for `apt-get update`?"
        )));
    }
    Ok(sources)
}

/// Picks Debian's own sources out of apt's index targets, and gives them as lines
/// of sources.list. Others may use the same names for their suites, but not the
/// same origin.
fn debian_sources(targets: &str) -> String {
    let mut lines = Vec::new();
    for target in targets.lines() {
        let fields: Vec<&str> = target.split('|').collect();
        let [uri, release, "main", "Debian"] = *fields else {
            continue;
        };
        let suites = ["", "-updates", "-security"];
        if release
            .strip_prefix(RELEASE)
            .is_some_and(|suite| suites.contains(&suite))
        {
            let line = format!("deb {uri} {release} main");
            if !lines.contains(&line) {
                lines.push(line);
            }
        }
    }
    lines.join("\n") + "\n"
}

/// Picks the settings out of `apt-config dump` that say how to reach the archive:
/// proxies, retries, and whether an old index is taken.
fn transport_settings(dump: &str) -> String {
    let wanted = [
        "Acquire::http::",
        "Acquire::https::",
        "Acquire::Check-",
        "Acquire::Retries",
    ];
    dump.lines()
        .filter(|line| wanted.iter().any(|prefix| line.starts_with(prefix)))
        .filter(|line| !line.ends_with(" \"\";"))
        .map(|line| format!("{}\n", line.trim_end_matches(';')))
        .collect()
}

fn key(sources: &str) -> Result<String> {
    let versions = process::run(Command::new("apt-cache").arg("madison").args(PACKAGES))?;
    let mut text = String::new();
    for (name, content) in RECIPE {
        text.push_str(&format!("{name} {}\n{content}", content.len()));
    }
    text.push_str(sources);
    text.push_str(&versions);
    Ok(format!("{:032x}", xxh3_128(text.as_bytes())))
}

/// Builds the images; called with the lock held.
fn build(root: &Path, directory: &Path, sources: &str) -> Result<()> {
    if !nix::unistd::geteuid().is_root() {
        return Err(Error::Unfit(
            "Only root can build the testbed's disk images".into(),
        ));
    }
    make_room(root)?;
    log::info!("Building the testbed's disk images: about a minute");
    let mut work = directory.as_os_str().to_owned();
    work.push(".tmp");
    let work = PathBuf::from(work);
    fs::create_dir(&work).map_err(Error::file(&work))?;
    let recipe = work.join("recipe");
    fs::create_dir(&recipe).map_err(Error::file(&recipe))?;
    for (name, content) in RECIPE {
        let path = recipe.join(name);
        fs::write(&path, content)
            .and_then(|()| fs::set_permissions(&path, fs::Permissions::from_mode(0o755)))
            .map_err(Error::file(&path))?;
    }
    let settings = transport_settings(&process::run(Command::new("apt-config").arg("dump"))?);
    for (name, content) in [("sources.list", sources), ("apt.conf", &settings)] {
        let path = work.join(name);
        fs::write(&path, content).map_err(Error::file(&path))?;
    }
    let log_path = work.join("build.log");
    let log = File::create(&log_path).map_err(Error::file(&log_path))?;
    let errors = log.try_clone().map_err(Error::file(&log_path))?;
    let status = Command::new(recipe.join("build"))
        .arg(&work)
        .stdin(Stdio::null())
        .stdout(log)
        .stderr(errors)
        .status()
        .map_err(|source| Error::Start {
            program: "build".into(),
            source,
        })?;
    if !status.success() {
        // The place stays until the next build, to be looked at.
        return Err(Error::Command {
            command: format!("{} {}", recipe.join("build").display(), work.display()),
            status,
            output: process::tail(&log_path, 40),
        });
    }
    fs::rename(&work, directory).map_err(Error::file(directory))
}

/// Removes broken builds, and images that nobody has used for long.
fn make_room(root: &Path) -> Result<()> {
    for entry in entries(root)? {
        let broken = entry
            .extension()
            .is_some_and(|extension| extension == "tmp");
        let used = fs::metadata(entry.join("used")).and_then(|used| used.modified());
        let old = used.is_ok_and(|used| {
            SystemTime::now()
                .duration_since(used)
                .is_ok_and(|unused| unused > KEPT)
        });
        if broken || old {
            fs::remove_dir_all(&entry).map_err(Error::file(&entry))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_debians_own_suites_are_taken() {
        let targets = "\
http://mirror.test/debian/|bookworm|main|Debian
http://mirror.test/debian/|bookworm|contrib|Debian
http://mirror.test/debian/|bookworm-updates|main|Debian
http://mirror.test/debian/|bookworm-backports|main|Debian Backports
http://mirror.test/debian/|trixie|main|Debian
http://mirror.test/debian-security/|bookworm-security|main|Debian
http://mirror.test/debian/|bookworm|main|Debian
http://other.test/|bookworm|main|Other
http://other.test/|bookworm|main|
";
        assert_eq!(
            debian_sources(targets),
            "deb http://mirror.test/debian/ bookworm main\n\
             deb http://mirror.test/debian/ bookworm-updates main\n\
             deb http://mirror.test/debian-security/ bookworm-security main\n"
        );
    }

    #[test]
    fn proxies_are_passed_on_and_nothing_else() {
        let dump = "\
APT::Architecture \"amd64\";
Acquire::http \"\";
Acquire::http::Proxy \"http://proxy.test:3128\";
Acquire::https::Verify-Peer \"\";
Acquire::Check-Date \"false\";
Acquire::Languages:: \"none\";
";
        assert_eq!(
            transport_settings(dump),
            "Acquire::http::Proxy \"http://proxy.test:3128\"\nAcquire::Check-Date \"false\"\n"
        );
    }

    #[test]
    fn hypervisors_have_names() {
        for hypervisor in [Hypervisor::Release, Hypervisor::Security] {
            assert_eq!(hypervisor.to_string().parse(), Ok(hypervisor));
        }
        assert!("newest".parse::<Hypervisor>().is_err());
    }
}
