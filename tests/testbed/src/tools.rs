//! What guests and sites need besides the images: an archive on a second disk, which a site unpacks
//! when it boots. To copy it by ssh takes an emulated site ten seconds.

use crate::guest::DIRECTORY;
use crate::image::Images;
use crate::initramfs::{self, Entry};
use crate::programs::Programs;
use crate::run::RunDirectory;
use crate::{Error, Result, process};
use std::fs;
use std::process::Command;

/// Writes the archive into a run directory.
pub fn write(run: &RunDirectory, images: &Images, programs: &Programs) -> Result<()> {
    let (path, init) = (images.guest_initrd(), &programs.guest);
    let mut initrd = fs::read(&path).map_err(Error::file(path))?;
    let init = fs::read(init).map_err(Error::file(init))?;
    initrd.extend(initramfs::archive(&[
        ("init", Entry::Program(&init)),
        ("sbin", Entry::Directory),
        ("sbin/poweroff", Entry::Link("/init")),
        ("sbin/reboot", Entry::Link("/init")),
    ]));
    let tools = run.file("tools");
    let guests = tools.join(DIRECTORY.trim_start_matches('/'));
    let commands = tools.join("usr/local/bin");
    for directory in [&guests, &commands] {
        fs::create_dir_all(directory).map_err(Error::file(directory))?;
    }
    fs::write(guests.join("guest.initrd"), &initrd).map_err(Error::file(&guests))?;
    fs::copy(&programs.empty, guests.join("empty-guest")).map_err(Error::file(&guests))?;
    fs::copy(&programs.client, commands.join("testbed-client")).map_err(Error::file(&commands))?;
    process::run(
        Command::new("tar")
            .args(["--create", "--owner=0", "--group=0", "--directory"])
            .arg(&tools)
            .arg("--file")
            .arg(run.file("tools.tar"))
            .args(["usr", "var"]),
    )?;
    fs::remove_dir_all(&tools).map_err(Error::file(tools))
}
