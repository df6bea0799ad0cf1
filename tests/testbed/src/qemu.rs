//! A site's QEMU: its command line, and its monitor (QMP).

use crate::image::Images;
use crate::run::RunDirectory;
use crate::site::SiteName;
use crate::sites::Options;
use crate::{Error, Result};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

/// The command line of a site.
///
/// `-cpu max` has features that crash dom0; qemu64 with SVM and nested paging has
/// what Xen needs for PVH guests, and PV guests need none. Xen is loaded by
/// multiboot, with dom0's kernel and initial RAM disk as its modules.
pub fn command_line(
    images: &Images,
    options: &Options,
    run: &RunDirectory,
    site: SiteName,
    port: u16,
) -> Vec<String> {
    let file = |name: &str| path(&run.file(&format!("{site}.{name}")));
    let tools = path(&run.file("tools.tar"));
    let wan = |site: SiteName| path(&run.file(&format!("{site}.wan")));
    let Options {
        memory_mib,
        cpus,
        dom0_memory_mib,
        dom0_vcpus,
        hypervisor,
        ..
    } = options;
    let xen = format!(
        "console=com1 com1=115200,8n1 guest_loglvl=all dom0_mem={dom0_memory_mib}M,\
         max:{dom0_memory_mib}M dom0_max_vcpus={dom0_vcpus} noreboot spec-ctrl=no bootscrub=0 {}",
        options.xen_arguments
    );
    let modules = format!(
        "{} root=/dev/vda console=hvc0 quiet mitigations=off site={site},{}",
        path(&images.kernel()),
        path(&images.dom0_initrd())
    );
    let number = site.number();
    let mut cpu = "qemu64,+svm,+npt".to_owned();
    if site == SiteName::A && !options.cpu_features.is_empty() {
        cpu = format!("{cpu},{}", options.cpu_features);
    }
    let words = [
        "qemu-system-x86_64",
        "-name",
        &format!("vmshadow-testbed-{}-{site}", run.name()),
        "-accel",
        "tcg,thread=multi",
        "-machine",
        "q35",
        "-cpu",
        &cpu,
        "-smp",
        &cpus.to_string(),
        "-m",
        &memory_mib.to_string(),
        "-nodefaults",
        "-display",
        "none",
        "-kernel",
        &path(&images.hypervisor(*hypervisor)),
        "-append",
        xen.trim_end(),
        "-initrd",
        &modules,
        "-drive",
        &format!("file={},if=virtio,format=qcow2,cache=unsafe", file("qcow2")),
        "-drive",
        &format!("file={tools},if=virtio,format=raw,readonly=on"),
        "-serial",
        &format!("file:{}", file("console")),
        "-qmp",
        &format!("unix:{},server=on,wait=off", file("qmp")),
        "-netdev",
        &format!("user,id=host,hostfwd=tcp:127.0.0.1:{port}-:22"),
        "-device",
        &format!("virtio-net-pci,netdev=host,mac=52:54:00:4d:00:{number:02x},romfile="),
        "-netdev",
        &format!(
            "dgram,id=wan,local.type=unix,local.path={},remote.type=unix,remote.path={}",
            wan(site),
            wan(site.other())
        ),
        "-device",
        &format!("virtio-net-pci,netdev=wan,mac=52:54:00:4d:01:{number:02x},romfile="),
    ];
    let mut words = words.map(str::to_owned).to_vec();
    if options.iommu {
        words.extend(["-device", "amd-iommu"].map(str::to_owned));
    }
    words
}

fn path(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

/// A connection to a QEMU's monitor.
pub struct Monitor {
    reader: BufReader<UnixStream>,
}

impl Monitor {
    /// Connects, and leaves the mode for negotiations.
    pub fn connect(socket: &Path) -> Result<Self> {
        let stream = UnixStream::connect(socket).map_err(Error::file(socket))?;
        stream
            .set_read_timeout(Some(Duration::from_secs(120)))
            .map_err(Error::file(socket))?;
        let mut monitor = Self {
            reader: BufReader::new(stream),
        };
        monitor.read()?;
        monitor.execute("qmp_capabilities", &json!({}))?;
        Ok(monitor)
    }

    /// Runs a command and gives what it returns.
    pub fn execute(&mut self, command: &str, arguments: &Value) -> Result<Value> {
        let request = json!({ "execute": command, "arguments": arguments });
        self.reader
            .get_mut()
            .write_all(format!("{request}\n").as_bytes())
            .map_err(Error::file("QMP"))?;
        loop {
            let mut answer = self.read()?;
            if let Some(value) = answer.get_mut("return") {
                return Ok(value.take());
            }
            if answer.get("error").is_some() {
                return Err(odd(&answer.to_string()));
            }
            // Else it is an event.
        }
    }

    fn read(&mut self) -> Result<Value> {
        let mut line = String::new();
        self.reader
            .read_line(&mut line)
            .map_err(Error::file("QMP"))?;
        serde_json::from_str(&line).map_err(|_| odd(&line))
    }
}

fn odd(answer: &str) -> Error {
    Error::Answer {
        from: "QEMU".into(),
        answer: answer.to_owned(),
    }
}
