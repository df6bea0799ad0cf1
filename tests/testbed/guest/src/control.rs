//! The servers: echo, and control.

use crate::{Guest, disk, memory, spawn, system, work};
use serde_json::{Value, json};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::thread;
use std::time::Duration;
use testbed_guest::{CONTROL_PORT, ECHO_PORT, Status};

/// Starts the echo servers, TCP and UDP.
pub fn serve_echo() -> Result<(), String> {
    listen(ECHO_PORT, "echo", echo)?;
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, ECHO_PORT))
        .map_err(|error| format!("UDP port {ECHO_PORT}: {error}"))?;
    spawn("echo-udp", move || {
        let mut buffer = [0; 2048];
        loop {
            if let Ok((length, peer)) = socket.recv_from(&mut buffer) {
                // A datagram that can't be answered is lost, as datagrams are.
                let _ = socket.send_to(buffer.get(..length).unwrap_or_default(), peer);
            }
        }
    })
}

fn echo(mut stream: TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut buffer = [0; 65536];
    loop {
        let length = stream.read(&mut buffer)?;
        if length == 0 {
            return Ok(());
        }
        stream.write_all(buffer.get(..length).unwrap_or_default())?;
    }
}

/// Starts the control server.
pub fn serve(guest: &Arc<Guest>) -> Result<(), String> {
    let guest = Arc::clone(guest);
    listen(CONTROL_PORT, "control", move |stream| {
        stream.set_nodelay(true)?;
        let mut answers = stream.try_clone()?;
        for line in BufReader::new(stream).lines() {
            answers.write_all(format!("{}\n", answer(&guest, &line?)).as_bytes())?;
        }
        Ok(())
    })
}

/// Accepts connections on a port, a thread for each.
fn listen(
    port: u16,
    name: &'static str,
    serve: impl Fn(TcpStream) -> io::Result<()> + Clone + Send + 'static,
) -> Result<(), String> {
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, port))
        .map_err(|error| format!("TCP port {port}: {error}"))?;
    spawn(name, move || {
        for stream in listener.incoming().flatten() {
            let serve = serve.clone();
            let started = spawn(name, move || {
                if let Err(error) = serve(stream) {
                    println!("testbed: {name}: {error}");
                }
            });
            if let Err(error) = started {
                println!("testbed: {error}");
            }
        }
    })
}

/// Carries out a command, and says how it went.
pub fn answer(guest: &Arc<Guest>, line: &str) -> Value {
    carry_out(guest, line).unwrap_or_else(|error| json!({ "error": error }))
}

fn carry_out(guest: &Arc<Guest>, line: &str) -> Result<Value, String> {
    let words: Vec<&str> = line.split_whitespace().collect();
    let number = |word: &str| word.parse().map_err(|_| format!("Not a number: {word}"));
    match *words {
        ["status"] => serde_json::to_value(status(guest)?).map_err(|error| error.to_string()),
        ["rewrite", mib] => memory::rewrite(guest, number(mib)?, 0),
        ["rewrite", mib, rate] => memory::rewrite(guest, number(mib)?, number(rate)?),
        ["random", mib] => memory::hold(guest, number(mib)?, true),
        ["text", mib] => memory::hold(guest, number(mib)?, false),
        ["churn"] => memory::churn(guest),
        ["edit"] => work::edit(guest),
        ["build"] => work::build(guest),
        ["browse"] => work::browse(guest),
        ["verify"] => Ok(memory::verify(guest)),
        ["drop"] => Ok(memory::stop(guest)),
        ["disk", path, mib] => disk::start(guest, path, number(mib)?),
        ["call", server] => guest.calls.begin(server),
        ["calls"] => Ok(guest.calls.list()),
        ["balloon", mib] => system::balloon(number(mib)?).map(|()| json!({})),
        ["desktop"] => system::start_desktop().map(|()| json!({})),
        ["online"] => system::online_vcpus().map(|()| json!({})),
        ["reboot"] => leave(|| system::reboot()),
        ["poweroff"] => leave(|| system::power_off()),
        ["crash"] => leave(|| {
            if let Err(error) = system::crash() {
                println!("testbed: {error}");
            }
        }),
        _ => Err(format!("No such command: {line}")),
    }
}

/// Leaves in a moment, so that the answer gets out first.
fn leave(way: impl FnOnce() + Send + 'static) -> Result<Value, String> {
    spawn("leave", move || {
        thread::sleep(Duration::from_millis(200));
        way();
    })?;
    Ok(json!({}))
}

fn status(guest: &Guest) -> Result<Status, String> {
    let seconds = |text: &str| {
        text.split_whitespace()
            .next()
            .and_then(|word| word.parse().ok())
    };
    let uptime = seconds(&system::read_line("/proc/uptime")?).ok_or("Odd /proc/uptime")?;
    let memory_kib = system::read_line("/proc/meminfo")?
        .split_whitespace()
        .nth(1)
        .and_then(|word| word.parse().ok())
        .ok_or("Odd /proc/meminfo")?;
    Ok(Status {
        name: guest.name.clone(),
        boot_id: guest.boot_id.clone(),
        counter: guest.counter.value(),
        uptime,
        time: std::time::UNIX_EPOCH
            .elapsed()
            .map_or(0.0, |time| time.as_secs_f64()),
        vcpus: system::read_line("/sys/devices/system/cpu/online")?,
        memory_kib,
        generation: guest.memory.generation(),
        workload_mib: guest.memory.mib(),
        churned: guest.memory.churned(),
        disk_blocks: guest.disk.blocks(),
        errors: guest.faults.counts(),
    })
}
