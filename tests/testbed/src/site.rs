//! One of the two sites: its dom0, by ssh.

use crate::image::Images;
use crate::process;
use crate::qemu::Monitor;
use crate::run::RunDirectory;
use crate::{Error, Result};
use serde_json::json;
use std::fmt;
use std::fs::{self, File};
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::str::FromStr;

/// Which of the two.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Deserialize, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum SiteName {
    /// 10.77.0.11
    A,
    /// 10.77.0.12
    B,
}

impl SiteName {
    /// Both.
    pub const BOTH: [Self; 2] = [Self::A, Self::B];

    /// 1 or 2.
    pub(crate) fn number(self) -> u8 {
        match self {
            Self::A => 1,
            Self::B => 2,
        }
    }

    /// The other one.
    #[must_use]
    pub fn other(self) -> Self {
        match self {
            Self::A => Self::B,
            Self::B => Self::A,
        }
    }

    /// The address on the WAN: what the other site calls it.
    #[must_use]
    pub fn address(self) -> Ipv4Addr {
        Ipv4Addr::new(10, 77, 0, 10 + self.number())
    }
}

impl fmt::Display for SiteName {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::A => "a",
            Self::B => "b",
        })
    }
}

impl FromStr for SiteName {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        match text {
            "a" => Ok(Self::A),
            "b" => Ok(Self::B),
            _ => Err("Neither a nor b".to_owned()),
        }
    }
}

/// A running site. Commands in it run as root.
#[derive(Clone, Debug)]
pub struct Site {
    name: SiteName,
    run: RunDirectory,
    port: u16,
    images: Images,
}

impl Site {
    pub(crate) fn new(name: SiteName, run: &RunDirectory, port: u16, images: &Images) -> Self {
        Self {
            name,
            run: run.clone(),
            port,
            images: images.clone(),
        }
    }

    /// Which one it is.
    #[must_use]
    pub fn name(&self) -> SiteName {
        self.name
    }

    /// The address on the WAN.
    #[must_use]
    pub fn address(&self) -> Ipv4Addr {
        self.name.address()
    }

    /// What the hypervisor and dom0's kernel print.
    #[must_use]
    pub fn console(&self) -> std::path::PathBuf {
        self.run.file(&format!("{}.console", self.name))
    }

    /// `ssh` to this site, over the shared connection if it is there.
    fn ssh(&self) -> Command {
        let mut command = Command::new("ssh");
        let known = format!("UserKnownHostsFile={}", self.images.known_hosts().display());
        let socket = self.run.file(&format!("{}.ssh", self.name));
        let options = [
            "BatchMode=yes",
            "IdentitiesOnly=yes",
            "GlobalKnownHostsFile=/dev/null",
            &known,
            "LogLevel=ERROR",
            "ConnectTimeout=60",
            "ServerAliveInterval=30",
            &format!("ControlPath={}", socket.display()),
        ];
        command.args([
            "-F",
            "none",
            "-l",
            "root",
            "-p",
            &self.port.to_string(),
            "-i",
        ]);
        command.arg(self.images.ssh_key());
        for option in options {
            command.args(["-o", option]);
        }
        command
    }

    /// Opens the connection that all commands share: each then costs milliseconds
    /// instead of a second.
    pub(crate) fn connect(&self) -> Result<()> {
        // It goes to the background, and must not hold anyone's pipes there.
        let status = self
            .ssh()
            .args([
                "-o",
                "ControlMaster=yes",
                "-o",
                "ControlPersist=yes",
                "-N",
                "-f",
            ])
            .arg("127.0.0.1")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()
            .map_err(|source| Error::Start {
                program: "ssh".into(),
                source,
            })?;
        if status.success() {
            return Ok(());
        }
        let command = format!("ssh to site {}", self.name);
        Err(Error::Command {
            command,
            status,
            output: process::tail(&self.console(), 20),
        })
    }

    /// Closes the shared connection.
    pub(crate) fn disconnect(&self) {
        // Without a connection there is nothing to close.
        let _ = self
            .ssh()
            .args(["-O", "exit", "127.0.0.1"])
            .stderr(Stdio::null())
            .output();
    }

    /// A command of this machine that runs a shell command in the site, to be
    /// started by the caller with the pipes it wants.
    #[must_use]
    pub fn command(&self, command: &str) -> Command {
        let mut ssh = self.ssh();
        ssh.arg("127.0.0.1").arg(command).stdin(Stdio::null());
        ssh
    }

    /// `ssh` with a terminal and nothing to run: a shell in the site.
    #[must_use]
    pub fn shell(&self) -> Command {
        let mut ssh = self.ssh();
        ssh.arg("-t").arg("127.0.0.1");
        ssh
    }

    /// Runs a shell command, and gives what it printed and how it ended.
    ///
    /// # Errors
    /// When ssh can't be started; its own failures, and those of the command,
    /// are in the output.
    pub fn output(&self, command: &str) -> Result<Output> {
        process::output(&mut self.command(command))
    }

    /// Runs a shell command that must succeed, and gives its standard output.
    ///
    /// # Errors
    /// When it fails, with all that it printed.
    pub fn run(&self, command: &str) -> Result<String> {
        let output = self.output(command)?;
        if !output.status.success() {
            return Err(process::failure(
                &format!("site {}: {command}", self.name),
                &output,
            ));
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Copies a file to the site, with these permissions. The name appears there
    /// when the file is whole.
    ///
    /// # Errors
    /// When the file can't be read or written.
    pub fn put(&self, from: &Path, to: &str, mode: u32) -> Result<()> {
        let file = File::open(from).map_err(Error::file(from))?;
        self.receive(file.into(), to, mode)
    }

    /// Writes a file at the site.
    ///
    /// # Errors
    /// When it can't be written.
    pub fn write(&self, to: &str, content: &[u8]) -> Result<()> {
        let draft = self
            .run
            .file(&format!("{}.{}.put", self.name, std::process::id()));
        fs::write(&draft, content).map_err(Error::file(&draft))?;
        let done = self.put(&draft, to, 0o644);
        let _ = fs::remove_file(&draft);
        done
    }

    fn receive(&self, content: Stdio, to: &str, mode: u32) -> Result<()> {
        let to = process::quote(to);
        let command = format!(
            "mkdir -p $(dirname {to}) && cat >{to}.new && chmod {mode:o} {to}.new && mv {to}.new {to}"
        );
        process::run(self.command(&command).stdin(content)).map(drop)
    }

    /// Copies a file from the site.
    ///
    /// # Errors
    /// When it can't be read or written.
    pub fn get(&self, from: &str, to: &Path) -> Result<()> {
        let file = File::create(to).map_err(Error::file(to))?;
        let command = format!("cat {}", process::quote(from));
        process::run(self.command(&command).stdout(file)).map(drop)
    }

    /// Installs a Debian package, or any other file as a program in
    /// /usr/local/bin. With the package vmshadow comes that of the proxy, which
    /// is built beside it.
    ///
    /// # Errors
    /// When it can't be copied, or dpkg fails.
    pub fn install(&self, file: &Path) -> Result<()> {
        let name = file.file_name().unwrap_or_default().to_string_lossy();
        if file.extension().is_none_or(|extension| extension != "deb") {
            return self.put(file, &format!("/usr/local/bin/{name}"), 0o755);
        }
        let mut packages = vec![file.to_owned()];
        packages.extend(proxy_package(file).filter(|proxy| proxy.exists()));
        let mut there = Vec::new();
        for package in &packages {
            let name = package.file_name().unwrap_or_default().to_string_lossy();
            let to = format!("/tmp/{name}");
            self.put(package, &to, 0o644)?;
            there.push(process::quote(&to));
        }
        let there = there.join(" ");
        self.run(&format!("dpkg --install {there} && rm {there}"))
            .map(drop)
    }

    /// Pulls the plug and starts again: what was not synced to the disk by the
    /// site's kernel is lost. The caller waits until it is up.
    pub(crate) fn reset(&self) -> Result<()> {
        let socket = self.run.file(&format!("{}.qmp", self.name));
        Monitor::connect(&socket)?
            .execute("system_reset", &json!({}))
            .map(drop)
    }
}

/// Where the proxy's package is built, beside that of vmshadow. None beside any other file.
#[must_use]
pub fn proxy_package(vmshadow: &Path) -> Option<PathBuf> {
    let rest = vmshadow.file_name()?.to_str()?.strip_prefix("vmshadow_")?;
    Some(vmshadow.with_file_name(format!("netproxy_{rest}")))
}
