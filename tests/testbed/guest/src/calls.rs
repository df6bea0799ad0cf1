//! Connections that the guest begins itself, to servers that say as whom it came and then echo.

use crate::spawn;
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

/// How often each says something.
const PAUSE: Duration = Duration::from_millis(50);

/// The connections, in the order in which they were begun.
#[derive(Default)]
pub struct Calls(Mutex<Vec<Arc<Mutex<Call>>>>);

#[derive(Default)]
struct Call {
    /// As whom the server sees it.
    known_as: String,
    /// Messages that came back as they were.
    echoed: u64,
    /// What ended it.
    ended: Option<String>,
}

impl Calls {
    /// Begins one, and says as whom the server sees it.
    pub fn begin(&self, server: &str) -> Result<Value, String> {
        let failed = |error: std::io::Error| format!("{server}: {error}");
        let stream = TcpStream::connect(server).map_err(failed)?;
        stream.set_nodelay(true).map_err(failed)?;
        let mut answers = BufReader::new(stream.try_clone().map_err(failed)?);
        let mut line = String::new();
        answers.read_line(&mut line).map_err(failed)?;
        let known_as = line.trim().to_owned();
        let call = Arc::new(Mutex::new(Call {
            known_as: known_as.clone(),
            ..Call::default()
        }));
        let shared = Arc::clone(&call);
        spawn("call", move || talk(stream, answers, &shared))?;
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(call);
        Ok(json!({ "known_as": known_as }))
    }

    /// What became of each.
    pub fn list(&self) -> Value {
        let calls = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let show = |call: &Arc<Mutex<Call>>| {
            let call = call.lock().unwrap_or_else(PoisonError::into_inner);
            json!({ "known_as": call.known_as, "echoed": call.echoed, "ended": call.ended })
        };
        json!({ "calls": calls.iter().map(show).collect::<Vec<_>>() })
    }
}

fn talk(mut stream: TcpStream, mut answers: BufReader<TcpStream>, call: &Mutex<Call>) {
    for number in 0_u64.. {
        let message = number.to_le_bytes();
        let mut answer = [0; 8];
        let result = stream
            .write_all(&message)
            .and_then(|()| answers.read_exact(&mut answer));
        let mut call = call.lock().unwrap_or_else(PoisonError::into_inner);
        match result {
            Ok(()) if answer == message => call.echoed += 1,
            Ok(()) => call.ended = Some(format!("Message {number} came back as another")),
            Err(error) => call.ended = Some(error.to_string()),
        }
        if call.ended.is_some() {
            return;
        }
        drop(call);
        thread::sleep(PAUSE);
    }
}
