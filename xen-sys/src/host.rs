//! Whether this machine can run VMShadow at all, and if not, why.
//!
//! Each condition needs the one before it, so a probe ends at the first that fails:
//!
//! ```text
//! Xen ─► control domain ─► root ─► /dev/xen/privcmd ─► versions match ─► xenstored
//! ```

use std::fs::{self, File};
use std::io;
use std::path::Path;

use crate::ctl::{Ctl, PhysicalInfo, Version};
use crate::store::Store;
use crate::{DomId, Error};

/// The version of the libraries that this program was built with.
pub const LIBRARIES_VERSION: &str = env!("XEN_LIBRARIES_VERSION");

/// What a probe found.
#[derive(Debug)]
pub struct Host {
    /// The running hypervisor, where it could be asked.
    pub version: Option<Version>,
    /// The machine, where the hypervisor could be asked.
    pub physical: Option<PhysicalInfo>,
    /// What stands in the way; `None` if nothing does.
    pub missing: Option<Missing>,
}

/// What stands in the way. The message says what to do about it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Missing {
    /// No hypervisor below this kernel, or not Xen.
    #[error("This machine does not run under Xen: install xen-system-amd64 and boot it")]
    Xen,
    /// A guest, not the control domain.
    #[error("This is a guest of Xen: run it in the control domain (dom0)")]
    ControlDomain,
    /// Not root.
    #[error("Only root may control Xen")]
    Root,
    /// No way to the hypervisor.
    #[error("Can't use /dev/xen/privcmd: is the module xen-privcmd loaded, and /dev mounted?")]
    Privcmd(#[source] io::Error),
    /// The hypervisor can't be asked, for another reason.
    #[error("Can't talk to the hypervisor")]
    Hypervisor(#[source] Error),
    /// The hypervisor speaks another version of its interface than the libraries.
    #[error(
        "The hypervisor is {hypervisor}, but Xen's libraries are {}: boot the one that belongs to \
         them, or install the others",
        LIBRARIES_VERSION
    )]
    MatchingVersions {
        /// The running hypervisor's version.
        hypervisor: Version,
    },
    /// xenstored does not answer.
    #[error("Can't reach xenstored: start it with 'systemctl start xen'")]
    Xenstore(#[source] Error),
}

/// Looks for all that is needed.
pub fn probe() -> Host {
    let mut host = Host {
        version: None,
        physical: None,
        missing: None,
    };
    host.missing = look(&mut host).err();
    host
}

fn look(host: &mut Host) -> Result<(), Missing> {
    platform(Path::new("/"))?;
    // SAFETY: takes nothing, can't fail.
    if unsafe { libc::geteuid() } != 0 {
        return Err(Missing::Root);
    }
    privcmd(Path::new("/dev/xen/privcmd"))?;

    let ctl = Ctl::open().map_err(Missing::Hypervisor)?;
    let version = ctl.version().map_err(Missing::Hypervisor)?;
    host.version = Some(version.clone());
    // The version itself is answered to any; only such a call compares interface versions.
    match ctl.physical_info() {
        Ok(physical) => host.physical = Some(physical),
        Err(error) if error.errno() == Some(libc::EACCES) => {
            return Err(Missing::MatchingVersions {
                hypervisor: version,
            });
        }
        Err(error) => return Err(Missing::Hypervisor(error)),
    }
    match ctl.domain_info(DomId::DOM0) {
        Ok(_) => {}
        Err(error) if error.errno() == Some(libc::EACCES) => {
            return Err(Missing::MatchingVersions {
                hypervisor: version,
            });
        }
        Err(error) => return Err(Missing::Hypervisor(error)),
    }

    let store = Store::open().map_err(Missing::Xenstore)?;
    store.list("/local/domain").map_err(Missing::Xenstore)?;
    Ok(())
}

/// The kernel says what it runs under.
fn platform(root: &Path) -> Result<(), Missing> {
    let hypervisor = fs::read_to_string(root.join("sys/hypervisor/type")).unwrap_or_default();
    if hypervisor.trim() != "xen" {
        return Err(Missing::Xen);
    }
    // Only the control domain has this, and only where xenfs is mounted: without it, the
    // hypervisor's own answers decide.
    match fs::read_to_string(root.join("proc/xen/capabilities")) {
        Ok(capabilities) if !capabilities.contains("control_d") => Err(Missing::ControlDomain),
        _ => Ok(()),
    }
}

fn privcmd(device: &Path) -> Result<(), Missing> {
    File::options()
        .read(true)
        .write(true)
        .open(device)
        .map_err(Missing::Privcmd)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::error::Error as _;

    use super::*;

    /// A root directory with these files, removed at the end.
    fn with_files(name: &str, files: &[(&str, &str)], test: impl FnOnce(&Path)) {
        let root = std::env::temp_dir().join(format!("xen-sys-{}-{name}", std::process::id()));
        for (path, content) in files {
            let path = root.join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, content).unwrap();
        }
        test(&root);
        let _ = fs::remove_dir_all(&root);
    }

    #[test]
    fn a_machine_without_xen_is_told_so() {
        with_files("none", &[], |root| {
            assert!(matches!(platform(root), Err(Missing::Xen)));
        });
        with_files("other", &[("sys/hypervisor/type", "other\n")], |root| {
            assert!(matches!(platform(root), Err(Missing::Xen)));
        });
    }

    #[test]
    fn a_guest_is_no_control_domain() {
        let guest = [
            ("sys/hypervisor/type", "xen\n"),
            ("proc/xen/capabilities", ""),
        ];
        with_files("guest", &guest, |root| {
            assert!(matches!(platform(root), Err(Missing::ControlDomain)));
        });
        let control = [
            ("sys/hypervisor/type", "xen\n"),
            ("proc/xen/capabilities", "control_d\n"),
        ];
        with_files("control", &control, |root| assert!(platform(root).is_ok()));
        with_files("unmounted", &[("sys/hypervisor/type", "xen\n")], |root| {
            assert!(platform(root).is_ok());
        });
    }

    #[test]
    fn a_missing_device_comes_with_its_reason() {
        let missing = privcmd(Path::new("/dev/xen/no-such-device")).unwrap_err();
        let source = missing.source().unwrap();
        assert_eq!(
            source.downcast_ref::<io::Error>().unwrap().kind(),
            io::ErrorKind::NotFound
        );
    }
}
