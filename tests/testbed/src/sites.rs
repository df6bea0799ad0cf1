//! A running testbed: both sites, the link between them, and their guests.

use crate::guest::{Guest, Kind};
use crate::image::{Hypervisor, Images};
use crate::link::{self, Link};
use crate::pause::Pause;
use crate::programs::{self, Programs};
use crate::run::{self, RunDirectory};
use crate::site::{Site, SiteName};
use crate::watch::Watching;
use crate::{Error, Result, process, qemu, tools};
use nix::sys::stat::Mode;
use nix::unistd::mkfifo;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::fs::{self, OpenOptions};
use std::io::Write;
use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};
use testbed_guest::Status;

/// Starts both QEMUs, and waits for a line or the end of its standard input (or
/// of the pipe `stop`). Then it ends them and removes the run directory.
const SUPERVISOR: &str = r#"
cd "$1" || exit 1
if [ -p stop ]; then exec 3<>stop; else exec 3<&0; fi
sh ./a.command </dev/null >a.log 2>&1 3<&- & a=$!
sh ./b.command </dev/null >b.log 2>&1 3<&- & b=$!
echo "$a $b" >pids.new && mv pids.new pids
read -r line <&3
kill -KILL $a $b 2>/dev/null
wait
cd /
[ "$line" = keep ] || rm -rf "$1"
"#;

/// How long a site may take to boot. Most take 20 s; a loaded machine, more.
const BOOT: Duration = Duration::from_secs(600);
/// How long a guest may take to boot.
const GUEST_BOOT: Duration = Duration::from_secs(360);
/// How often to try what another program may come between.
const ATTEMPTS: u32 = 5;

/// How to start a testbed.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(default)]
pub struct Options {
    /// Its name. Empty: one that is not taken.
    pub name: String,
    /// Which hypervisor.
    pub hypervisor: Hypervisor,
    /// Memory of each site's machine, in MiB.
    pub memory_mib: u32,
    /// CPUs of each site's machine.
    pub cpus: u32,
    /// Memory of dom0, in MiB: at least 256.
    pub dom0_memory_mib: u32,
    /// vCPUs of dom0.
    pub dom0_vcpus: u32,
    /// More for the hypervisor's command line.
    pub xen_arguments: String,
    /// CPU features that site a has and site b has not, in QEMU's words ("+aes").
    pub cpu_features: String,
    /// Whether the machines have an IOMMU: what passing a PCI device through takes.
    pub iommu: bool,
    /// The WAN.
    pub link: Link,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            name: String::new(),
            hypervisor: Hypervisor::Release,
            memory_mib: 2048,
            cpus: 1,
            dom0_memory_mib: 1024,
            dom0_vcpus: 1,
            xen_arguments: String::new(),
            cpu_features: String::new(),
            iommu: false,
            link: Link::default(),
        }
    }
}

/// Two sites that are up.
///
/// From [`Testbed::up`] they live as long as this value; even if this process is
/// killed, their supervisor ends them. From [`Testbed::up_detached`] they live
/// until [`Testbed::down`].
pub struct Testbed {
    run: RunDirectory,
    options: Options,
    sites: [Site; 2],
    /// Whether the sites end with this value.
    owns: bool,
    /// The supervisor, if this process started it.
    supervisor: Option<Child>,
}

impl Testbed {
    /// Starts two sites, and waits until both are ready.
    ///
    /// # Errors
    /// When the images can't be had, or a site does not come up.
    pub fn up(options: &Options) -> Result<Self> {
        Self::start(options, false)
    }

    /// Starts two sites that outlive this process.
    ///
    /// # Errors
    /// As [`Testbed::up`].
    pub fn up_detached(options: &Options) -> Result<Self> {
        Self::start(options, true)
    }

    /// Takes hold of sites that are up. They stay up when this is dropped.
    ///
    /// # Errors
    /// When there are none of this name.
    pub fn attach(name: &str) -> Result<Self> {
        let run = RunDirectory::open(name)?;
        let options = parse(&run.read("options.json")?)?;
        let images = Images::at(run.read("images")?.trim());
        let site = |site| Ok::<_, Error>(Site::new(site, &run, port(&run, site)?, &images));
        let sites = [site(SiteName::A)?, site(SiteName::B)?];
        Ok(Self {
            run,
            options,
            sites,
            owns: false,
            supervisor: None,
        })
    }

    fn start(options: &Options, detached: bool) -> Result<Self> {
        run::sweep()?;
        let (images, programs) = needs()?;
        let mut options = options.clone();
        if options.name.is_empty() {
            static TAKEN: AtomicU32 = AtomicU32::new(0);
            let number = TAKEN.fetch_add(1, Ordering::Relaxed);
            options.name = format!("run-{}-{number}", std::process::id());
        }
        for attempt in 1.. {
            let mut testbed = Self::start_machines(&images, &programs, &options, detached)?;
            match testbed.wait_until_ready() {
                Ok(()) => {
                    testbed.set_link(&testbed.options.link)?;
                    testbed.owns = !detached;
                    return Ok(testbed);
                }
                Err(Error::Ended { log, .. })
                    if attempt < ATTEMPTS && log.contains("host forwarding") =>
                {
                    log::debug!("A port was taken in between: {log}");
                }
                Err(error) => return Err(error),
            }
        }
        Err(Error::Unfit("No free port on loopback".to_owned()))
    }

    /// Starts the machines, and does not wait for them.
    fn start_machines(
        images: &Images,
        programs: &Programs,
        options: &Options,
        detached: bool,
    ) -> Result<Self> {
        let run = RunDirectory::create(&options.name)?;
        let ports = [free_port()?, free_port()?];
        let [a, b] = ports;
        let sites = [
            Site::new(SiteName::A, &run, a, images),
            Site::new(SiteName::B, &run, b, images),
        ];
        let options = options.clone();
        // From here on, dropping it removes the directory.
        let mut testbed = Self {
            run,
            options,
            sites,
            owns: true,
            supervisor: None,
        };
        let (run, options) = (&testbed.run, &testbed.options);
        run.write("images", &images.directory().to_string_lossy())?;
        run.write("options.json", &to_json(options)?)?;
        run.write("link.json", &to_json(&options.link)?)?;
        tools::write(run, images, programs)?;
        for (site, port) in SiteName::BOTH.into_iter().zip(ports) {
            run.write(&format!("{site}.port"), &port.to_string())?;
            process::run(
                Command::new("qemu-img")
                    .args(["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b"])
                    .arg(images.disk(options.hypervisor))
                    .arg(run.file(&format!("{site}.qcow2"))),
            )?;
            let words = qemu::command_line(images, options, run, site, port);
            let words: Vec<String> = words.iter().map(|word| process::quote(word)).collect();
            run.write(
                &format!("{site}.command"),
                &format!("exec {}\n", words.join(" ")),
            )?;
        }
        if detached {
            let stop = run.file("stop");
            mkfifo(&stop, Mode::S_IRUSR | Mode::S_IWUSR).map_err(|errno| Error::File {
                path: stop,
                source: errno.into(),
            })?;
        }
        let mut command = Command::new("sh");
        command
            .args(["-c", SUPERVISOR, "testbed-supervisor"])
            .arg(run.path());
        // Away from a terminal's Ctrl-C: it is told by its pipe.
        command
            .process_group(0)
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        command.stdin(if detached {
            Stdio::null()
        } else {
            Stdio::piped()
        });
        let child = command.spawn().map_err(|source| Error::Start {
            program: "sh".into(),
            source,
        })?;
        run.give_to(child.id())?;
        testbed.supervisor = Some(child);
        Ok(testbed)
    }

    fn wait_until_ready(&self) -> Result<()> {
        let started = Instant::now();
        for site in &self.sites {
            self.wait_for_boot(site, 1, started)?;
        }
        self.connect()
    }

    fn connect(&self) -> Result<()> {
        thread::scope(|scope| {
            let [a, b] = &self.sites;
            let other = scope.spawn(|| b.connect());
            a.connect()?;
            other
                .join()
                .map_err(|_| Error::Unfit("A thread died".to_owned()))?
        })
    }

    /// Waits until the site's console has said so many times that it is ready.
    fn wait_for_boot(&self, site: &Site, times: usize, started: Instant) -> Result<()> {
        let ready = format!("testbed: site {} is ready", site.name());
        loop {
            let console = fs::read(site.console()).unwrap_or_default();
            if String::from_utf8_lossy(&console).matches(&ready).count() >= times {
                return Ok(());
            }
            if self.ended(site.name()) {
                let log = process::tail(&self.run.file(&format!("{}.log", site.name())), 20);
                return Err(Error::Ended {
                    site: site.name(),
                    log,
                });
            }
            if started.elapsed() > BOOT {
                let what = format!("site {} boots", site.name());
                return Err(Error::Timeout {
                    what,
                    log: process::tail(&site.console(), 40),
                });
            }
            thread::sleep(Duration::from_millis(100));
        }
    }

    /// Whether a site's QEMU was started and is gone.
    fn ended(&self, site: SiteName) -> bool {
        let Ok(pids) = self.run.read("pids") else {
            return false;
        };
        let pid = pids.split_whitespace().nth(usize::from(site.number()) - 1);
        pid.and_then(|pid| pid.parse().ok())
            .is_some_and(|pid| process::start_time(pid).is_none())
    }

    /// The testbed's name.
    #[must_use]
    pub fn name(&self) -> &str {
        self.run.name()
    }

    /// How it was started.
    #[must_use]
    pub fn options(&self) -> &Options {
        &self.options
    }

    /// A site.
    #[must_use]
    pub fn site(&self, name: SiteName) -> &Site {
        let [a, b] = &self.sites;
        match name {
            SiteName::A => a,
            SiteName::B => b,
        }
    }

    /// Both sites.
    #[must_use]
    pub fn sites(&self) -> &[Site; 2] {
        &self.sites
    }

    /// Gives the WAN another shape. Mends it, too.
    ///
    /// # Errors
    /// When a site fails to.
    pub fn set_link(&self, link: &Link) -> Result<()> {
        self.run.write("link.json", &to_json(link)?)?;
        self.on_both(&link.command())
    }

    /// Cuts the WAN: what either site sends is lost, and no interface goes down.
    ///
    /// # Errors
    /// When a site fails to.
    pub fn cut_link(&self) -> Result<()> {
        self.on_both(link::CUT)
    }

    /// Mends the WAN: it gets the shape again that it had.
    ///
    /// # Errors
    /// When a site fails to.
    pub fn mend_link(&self) -> Result<()> {
        self.set_link(&parse(&self.run.read("link.json")?)?)
    }

    fn on_both(&self, command: &str) -> Result<()> {
        for site in &self.sites {
            site.run(command)?;
        }
        Ok(())
    }

    /// Pulls a site's plug, and waits until it has booted again, without guests.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn power_cycle(&self, name: SiteName) -> Result<()> {
        let site = self.site(name);
        let ready = format!("testbed: site {name} is ready");
        let console = fs::read(site.console()).unwrap_or_default();
        let before = String::from_utf8_lossy(&console).matches(&ready).count();
        site.disconnect();
        site.reset()?;
        self.wait_for_boot(site, before + 1, Instant::now())?;
        site.connect()?;
        let link: Link = parse(&self.run.read("link.json")?)?;
        site.run(&link.command()).map(drop)
    }

    /// Starts a guest, and waits until it answers. Its disk is made at both sites,
    /// empty. The path from an edge to one behind it is opened.
    ///
    /// # Errors
    /// When it does not start.
    pub fn start_guest(&self, at: SiteName, guest: &Guest) -> Result<()> {
        guest.check()?;
        self.run
            .write(&format!("guests/{}.json", guest.name), &to_json(guest)?)?;
        if guest.disk_mib > 0 {
            let path = guest.disk_path();
            self.on_both(&format!(
                "rm -f {path} && truncate -s {}M {path}",
                guest.disk_mib
            ))?;
        }
        if let Some(provide) = guest.provide() {
            self.on_both(&provide)?;
        }
        let config = format!("/etc/xen/{}.cfg", guest.name);
        for site in &self.sites {
            site.write(&config, guest.config().as_bytes())?;
        }
        self.site(at).run(&format!("xl create {config}"))?;
        if guest.behind_edge {
            let open = format!("vmshadow proxy open {}", guest.name);
            self.site(at).run(&open)?;
        }
        self.wait_for_guest(at, guest)
    }

    /// Waits until a guest answers on its control port, as after its reboot; or, as an empty one
    /// has none, until it says in xenstore that it runs.
    ///
    /// # Errors
    /// When it does not.
    pub fn wait_for_guest(&self, from: SiteName, guest: &Guest) -> Result<()> {
        let started = Instant::now();
        loop {
            let answer = match guest.kind {
                Kind::Empty => self.resumed(guest).map(drop),
                Kind::Pv | Kind::Pvh => self.ask(from, guest, "status").map(drop),
            };
            match answer {
                Ok(()) => return Ok(()),
                Err(error) if started.elapsed() > GUEST_BOOT => {
                    let what = format!("guest {} answers: {error}", guest.name);
                    let log = format!("tail -n 40 /var/log/xen/console/guest-{}.log", guest.name);
                    let log = self.site(from).run(&log).unwrap_or_default();
                    return Err(Error::Timeout { what, log });
                }
                Err(_) => thread::sleep(Duration::from_millis(200)),
            }
        }
    }

    /// Sends a command to a guest's control port, from a site.
    ///
    /// # Errors
    /// When the guest can't be reached, or answers with an error.
    pub fn ask(&self, from: SiteName, guest: &Guest, command: &str) -> Result<Value> {
        let command = process::quote(command);
        let ask = format!("testbed-client ask {} {command}", guest.address());
        let answer: Value = parse(&self.site(from).run(&ask)?)?;
        match answer.get("error").and_then(Value::as_str) {
            Some(error) => Err(Error::Answer {
                from: guest.name.clone(),
                answer: error.to_owned(),
            }),
            None => Ok(answer),
        }
    }

    /// How often an empty guest was resumed since its boot, by its own count.
    ///
    /// # Errors
    /// When it is nowhere, or has not come to say it.
    pub fn resumed(&self, guest: &Guest) -> Result<u32> {
        let mut answer = "nothing".to_owned();
        let name = process::quote(&guest.name);
        for site in self.where_is(&guest.name)? {
            let read = format!("xenstore-read /local/domain/$(xl domid {name})/data/resumed");
            answer = self.site(site).run(&read)?;
            if let Ok(count) = answer.trim().parse() {
                return Ok(count);
            }
        }
        Err(Error::Answer {
            from: guest.name.clone(),
            answer,
        })
    }

    /// What a guest knows of itself.
    ///
    /// # Errors
    /// As [`Testbed::ask`].
    pub fn status(&self, from: SiteName, guest: &Guest) -> Result<Status> {
        let answer = self.ask(from, guest, "status")?;
        let text = answer.to_string();
        serde_json::from_value(answer).map_err(|_| Error::Answer {
            from: guest.name.clone(),
            answer: text,
        })
    }

    /// Watches a guest from a site: an echo connection, pings, the counter.
    ///
    /// # Errors
    /// When it can't be reached.
    pub fn watch(&self, from: SiteName, guest: &Guest) -> Result<Watching> {
        Watching::start(self.site(from), guest.address())
    }

    /// Watches how long an empty guest stands still while it moves away from a site.
    ///
    /// # Errors
    /// When it is not there.
    pub fn watch_pause(&self, from: SiteName, guest: &Guest) -> Result<Pause> {
        Pause::start(self.site(from), self.site(from.other()), guest)
    }

    /// The guests that were started here, wherever they are now.
    ///
    /// # Errors
    /// When their list can't be read.
    pub fn guests(&self) -> Result<Vec<Guest>> {
        let directory = self.run.file("guests");
        let entries = fs::read_dir(&directory).map_err(Error::file(&directory))?;
        let mut guests = Vec::new();
        for path in entries.flatten().map(|entry| entry.path()) {
            let text = fs::read_to_string(&path).map_err(Error::file(&path))?;
            guests.push(parse::<Guest>(&text)?);
        }
        guests.sort_by(|one, two| one.name.cmp(&two.name));
        Ok(guests)
    }

    /// A guest that was started here.
    ///
    /// # Errors
    /// When there was none of this name.
    pub fn guest(&self, name: &str) -> Result<Guest> {
        let guests = self.guests()?;
        let found = guests.into_iter().find(|guest| guest.name == name);
        found.ok_or_else(|| Error::Unfit(format!("No guest {name} was started here")))
    }

    /// The sites where a domain of this name exists.
    ///
    /// # Errors
    /// When a site does not answer.
    pub fn where_is(&self, name: &str) -> Result<Vec<SiteName>> {
        let mut found = Vec::new();
        for site in &self.sites {
            if site
                .output(&format!("xl domid {}", process::quote(name)))?
                .status
                .success()
            {
                found.push(site.name());
            }
        }
        Ok(found)
    }

    /// Ends a guest at once, wherever it is, and removes its disk.
    ///
    /// # Errors
    /// When a site fails to.
    pub fn stop_guest(&self, name: &str) -> Result<()> {
        for site in self.where_is(name)? {
            self.site(site)
                .run(&format!("xl destroy {}", process::quote(name)))?;
        }
        if let Ok(guest) = self.guest(name) {
            self.on_both(&format!("rm -f {} /etc/xen/{name}.cfg", guest.disk_path()))?;
            let path = self.run.file(&format!("guests/{name}.json"));
            fs::remove_file(&path).map_err(Error::file(path))?;
        }
        Ok(())
    }

    /// Copies the logs of both sites to a directory: their consoles, the logs of
    /// Xen, ours, and what is running.
    ///
    /// # Errors
    /// When this machine can't write them. A site that does not answer is left
    /// out.
    pub fn collect_logs(&self, to: &Path) -> Result<()> {
        fs::create_dir_all(to).map_err(Error::file(to))?;
        for site in &self.sites {
            let name = site.name();
            for file in ["console", "log"] {
                let from = self.run.file(&format!("{name}.{file}"));
                let to = to.join(format!("{name}.{file}"));
                fs::copy(&from, &to).map_err(Error::file(from))?;
            }
            let state = to.join(format!("{name}.state"));
            let looks = "for look in 'xl list -v' 'xl info' 'xl dmesg' dmesg 'ps axww -o \
                         pid,ppid,stat,etimes,args' 'xenstore-ls -f' 'ip address' 'free -m'; do \
                         echo \"== $look\"; timeout 10 $look; done 2>&1";
            let text = site.run(looks).unwrap_or_else(|error| error.to_string());
            fs::write(&state, text).map_err(Error::file(state))?;
            let archive = to.join(format!("{name}.var-log.tar"));
            if let Err(error) = site
                .run("tar -C /var -cf /tmp/log.tar log")
                .and_then(|_| site.get("/tmp/log.tar", &archive))
            {
                log::warn!("Site {name} gives no logs: {error}");
            }
        }
        Ok(())
    }

    /// Ends the sites, and removes all that they left on this machine.
    ///
    /// # Errors
    /// When the run directory can't be removed.
    pub fn down(mut self) -> Result<()> {
        self.owns = false;
        self.end()
    }

    fn end(&mut self) -> Result<()> {
        self.sites.iter().for_each(Site::disconnect);
        // The supervisor ends at the end of its input, or at a line in the pipe.
        // To open a pipe with nobody at its other end fails, and does not wait.
        let told = match self
            .supervisor
            .as_mut()
            .and_then(|supervisor| supervisor.stdin.take())
        {
            Some(_ends_here) => true,
            None => OpenOptions::new()
                .write(true)
                .custom_flags(nix::fcntl::OFlag::O_NONBLOCK.bits())
                .open(self.run.file("stop"))
                .and_then(|mut pipe| pipe.write_all(b"down\n"))
                .is_ok(),
        };
        if let Some(mut supervisor) = self.supervisor.take()
            && told
        {
            supervisor.wait().map_err(Error::file(self.run.path()))?;
        }
        for _ in 0..100 {
            if !told || !self.run.path().exists() {
                break;
            }
            thread::sleep(Duration::from_millis(50));
        }
        self.run.remove()
    }
}

impl Drop for Testbed {
    fn drop(&mut self) {
        if !self.owns {
            return;
        }
        if thread::panicking()
            && let Some(directory) = std::env::var_os("VMSHADOW_TESTBED_LOGS")
        {
            let to = Path::new(&directory).join(self.name());
            match self.collect_logs(&to) {
                Ok(()) => eprintln!("The sites' logs are in {}", to.display()),
                Err(error) => eprintln!("No logs of the sites: {error}"),
            }
        }
        if let Err(error) = self.end() {
            eprintln!("Testbed {}: {error}", self.name());
        }
    }
}

/// The images, and what runs in guests and sites: made once for this process.
fn needs() -> Result<(Images, Programs)> {
    static MADE: Mutex<Option<(Images, Programs)>> = Mutex::new(None);
    let mut made = MADE.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(made) = &*made {
        return Ok(made.clone());
    }
    let programs = programs::build()?;
    let images = Images::obtain()?;
    Ok(made.insert((images, programs)).clone())
}

/// A port of loopback that is free now.
fn free_port() -> Result<u16> {
    TcpListener::bind((Ipv4Addr::LOCALHOST, 0))
        .and_then(|listener| listener.local_addr())
        .map(|address| address.port())
        .map_err(Error::file("127.0.0.1"))
}

fn port(run: &RunDirectory, site: SiteName) -> Result<u16> {
    let text = run.read(&format!("{site}.port"))?;
    text.trim().parse().map_err(|_| Error::Answer {
        from: run.name().to_owned(),
        answer: text,
    })
}

fn parse<T: serde::de::DeserializeOwned>(text: &str) -> Result<T> {
    serde_json::from_str(text).map_err(|error| Error::Answer {
        from: "JSON".to_owned(),
        answer: format!("{error}: {}", process::last_lines(text, 5)),
    })
}

fn to_json(value: &impl Serialize) -> Result<String> {
    serde_json::to_string_pretty(value).map_err(|error| Error::Unfit(error.to_string()))
}
