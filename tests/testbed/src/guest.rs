//! Test guests: Debian's kernel with `testbed-guest` as its only process, or a kernel that leaves
//! its memory zero.

use crate::{Error, Result, edge};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::net::Ipv4Addr;
use std::str::FromStr;
use testbed_guest::{CONTROL_PORT, ECHO_PORT, SSH_PORT, VNC_PORT};

/// Where a site keeps what guests need: the same paths at both, for the guest is
/// to reboot wherever it is.
pub const DIRECTORY: &str = "/var/lib/vmshadow-testbed";

/// How a guest runs.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// Paravirtualised.
    #[default]
    Pv,
    /// Hardware-assisted, without emulated devices.
    Pvh,
    /// Paravirtualised, with `testbed-empty-guest` as its kernel: memory stays zero, and it has
    /// neither network nor workloads.
    Empty,
}

impl Kind {
    /// The domain's type, in xl's words.
    fn domain_type(self) -> &'static str {
        match self {
            Self::Pv | Self::Empty => "pv",
            Self::Pvh => "pvh",
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Pv => "pv",
            Self::Pvh => "pvh",
            Self::Empty => "empty",
        })
    }
}

impl FromStr for Kind {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        match text {
            "pv" => Ok(Self::Pv),
            "pvh" => Ok(Self::Pvh),
            "empty" => Ok(Self::Empty),
            _ => Err("None of pv, pvh, empty".to_owned()),
        }
    }
}

/// A guest to start. Change what [`Guest::new`] gives as needed.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
pub struct Guest {
    /// The domain's name.
    pub name: String,
    /// How it runs.
    pub kind: Kind,
    /// Memory in MiB.
    pub memory_mib: u32,
    /// What the balloon may grow to, in MiB; [`Guest::memory_mib`] if it is less.
    pub maximum_mib: u32,
    /// vCPUs.
    pub vcpus: u32,
    /// The physical CPUs to run on, in xl's words ("1", "0-1"). None: any.
    pub cpus: Option<String>,
    /// The last byte of the address 10.77.0.X, and of the MAC address.
    pub address: u8,
    /// Commands of the control port to run at boot: workloads.
    pub run: Vec<String>,
    /// Size of the disk /dev/xvda in MiB: a raw file, of this name at both sites.
    /// 0: no disk.
    pub disk_mib: u32,
    /// Whether it is on its site's own network, with 10.7.0.X as its address, and its clients reach
    /// it by the edge: see [`Edge`](crate::Edge).
    #[serde(default)]
    pub behind_edge: bool,
    /// Whether it serves a desktop by VNC, and ssh. That takes 32 MiB more.
    #[serde(default)]
    pub desktop: bool,
    /// More lines for the domain's configuration.
    pub extra: Vec<String>,
}

impl Guest {
    /// A PV guest with 128 MiB and one vCPU. `address` is the last byte of its
    /// address, by convention from 101 on.
    #[must_use]
    pub fn new(name: &str, address: u8) -> Self {
        Self {
            name: name.to_owned(),
            kind: Kind::Pv,
            memory_mib: 128,
            maximum_mib: 0,
            vcpus: 1,
            cpus: None,
            address,
            run: Vec::new(),
            disk_mib: 0,
            behind_edge: false,
            desktop: false,
            extra: Vec::new(),
        }
    }

    /// The address on the WAN: its own, or that of the edge for it.
    #[must_use]
    pub fn address(&self) -> Ipv4Addr {
        Ipv4Addr::new(10, 77, 0, self.address)
    }

    /// The address that the guest gives its interface.
    #[must_use]
    pub fn own_address(&self) -> Ipv4Addr {
        match self.behind_edge {
            true => Ipv4Addr::new(10, 7, 0, self.address),
            false => self.address(),
        }
    }

    /// The file of the disk.
    #[must_use]
    pub fn disk_path(&self) -> String {
        format!("{DIRECTORY}/{}.disk", self.name)
    }

    /// The configuration for `xl create`.
    #[must_use]
    pub fn config(&self) -> String {
        let mut lines = vec![
            format!("name = \"{}\"", self.name),
            format!("type = \"{}\"", self.kind.domain_type()),
        ];
        lines.extend(self.kernel());
        lines.extend([
            format!("memory = {}", self.memory_mib),
            format!("maxmem = {}", self.maximum_mib.max(self.memory_mib)),
            format!("vcpus = {}", self.vcpus),
            format!(
                "vif = [\"mac=00:16:3e:4d:00:{:02x},bridge={}\"]",
                self.address,
                if self.behind_edge {
                    edge::BRIDGE
                } else {
                    "xenbr0"
                }
            ),
        ]);
        if let Some(cpus) = &self.cpus {
            lines.push(format!("cpus = \"{cpus}\""));
        }
        if self.disk_mib > 0 {
            lines.push(format!("disk = [\"{},raw,xvda,w\"]", self.disk_path()));
        }
        lines.extend(self.extra.iter().cloned());
        lines.join("\n") + "\n"
    }

    /// What boots, as lines of the configuration.
    fn kernel(&self) -> Vec<String> {
        if self.kind == Kind::Empty {
            return vec![format!("kernel = \"{DIRECTORY}/empty-guest\"")];
        }
        let mut run: Vec<String> = self
            .run
            .iter()
            .map(|command| command.replace(' ', ","))
            .collect();
        if self.desktop {
            run.push("desktop".to_owned());
        }
        let gateway = match self.behind_edge {
            true => format!(" testbed.gateway={}", edge::GATEWAY),
            false => String::new(),
        };
        vec![
            format!("kernel = \"{DIRECTORY}/vmlinux\""),
            format!("ramdisk = \"{}\"", self.initrd()),
            format!(
                "extra = \"console=hvc0 mitigations=off testbed.name={} testbed.address={}/24{gateway} testbed.run={}\"",
                self.name,
                self.own_address(),
                run.join(";")
            ),
        ]
    }

    /// Its initial RAM disk.
    fn initrd(&self) -> String {
        match self.desktop {
            true => format!("{DIRECTORY}/desktop-guest.initrd"),
            false => format!("{DIRECTORY}/guest.initrd"),
        }
    }

    /// The command that puts in place at a site what only some guests need.
    pub(crate) fn provide(&self) -> Option<String> {
        let initrd = self.initrd();
        self.desktop
            .then(|| format!("cat {DIRECTORY}/guest.initrd {DIRECTORY}/desktop.initrd > {initrd}"))
    }

    /// The TCP ports of its services, with their names.
    pub(crate) fn services(&self) -> Vec<(&'static str, u16)> {
        let mut services = vec![("echo", ECHO_PORT), ("control", CONTROL_PORT)];
        if self.desktop {
            services.extend([("ssh", SSH_PORT), ("vnc", VNC_PORT)]);
        }
        services
    }

    /// Refuses what would break the configuration's quoting.
    pub(crate) fn check(&self) -> Result<()> {
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
        if self.name.is_empty() || !self.name.bytes().all(plain) {
            return Err(Error::Unfit(format!("Not a guest's name: {:?}", self.name)));
        }
        if self.kind == Kind::Empty && !self.run.is_empty() {
            return Err(Error::Unfit("An empty guest runs nothing".to_owned()));
        }
        if self
            .run
            .iter()
            .any(|command| command.contains(['"', '\'', '\\', ';', ',', '\n']))
        {
            return Err(Error::Unfit(
                "A guest's commands are of plain words".to_owned(),
            ));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_configuration_says_all() {
        let guest = Guest {
            kind: Kind::Pvh,
            vcpus: 2,
            cpus: Some("1".into()),
            maximum_mib: 256,
            run: vec!["rewrite 8".into(), "random 40".into()],
            disk_mib: 64,
            extra: vec!["on_reboot = \"destroy\"".into()],
            ..Guest::new("g1", 101)
        };
        guest.check().unwrap();
        assert_eq!(
            guest.config(),
            "name = \"g1\"\n\
             type = \"pvh\"\n\
             kernel = \"/var/lib/vmshadow-testbed/vmlinux\"\n\
             ramdisk = \"/var/lib/vmshadow-testbed/guest.initrd\"\n\
             extra = \"console=hvc0 mitigations=off testbed.name=g1 testbed.address=10.77.0.101/24 \
             testbed.run=rewrite,8;random,40\"\n\
             memory = 128\n\
             maxmem = 256\n\
             vcpus = 2\n\
             vif = [\"mac=00:16:3e:4d:00:65,bridge=xenbr0\"]\n\
             cpus = \"1\"\n\
             disk = [\"/var/lib/vmshadow-testbed/g1.disk,raw,xvda,w\"]\n\
             on_reboot = \"destroy\"\n"
        );
    }

    #[test]
    fn an_empty_guest_has_a_kernel_of_its_own_and_runs_nothing() {
        let guest = Guest {
            kind: Kind::Empty,
            ..Guest::new("e1", 101)
        };
        guest.check().unwrap();
        assert_eq!(
            guest.config(),
            "name = \"e1\"\n\
             type = \"pv\"\n\
             kernel = \"/var/lib/vmshadow-testbed/empty-guest\"\n\
             memory = 128\n\
             maxmem = 128\n\
             vcpus = 1\n\
             vif = [\"mac=00:16:3e:4d:00:65,bridge=xenbr0\"]\n"
        );
        let busy = Guest {
            run: vec!["random 1".into()],
            ..guest
        };
        assert!(busy.check().is_err());
    }

    #[test]
    fn what_breaks_the_quoting_is_refused() {
        assert!(Guest::new("a b", 101).check().is_err());
        assert!(
            Guest {
                run: vec!["x\"".into()],
                ..Guest::new("g1", 101)
            }
            .check()
            .is_err()
        );
    }
}
