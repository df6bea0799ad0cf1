//! What the proxy counts, in the form that Prometheus reads.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue, text};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry, Unit};

use crate::error::{Error, Result};

/// The label of a guest.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct OfGuest {
    pub guest: String,
}

/// Why a client was turned away.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelValue)]
#[allow(non_camel_case_types)]
pub(crate) enum Refusal {
    not_allowed,
    total_limit,
    guest_limit,
    client_limit,
    draining,
}

/// The label of a refusal.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct Refused {
    pub reason: Refusal,
}

/// All that is counted. One for the whole proxy; threads share it.
#[derive(Debug)]
pub(crate) struct Metrics {
    registry: Registry,
    pub accepted: Family<OfGuest, Counter>,
    pub open: Family<OfGuest, Gauge>,
    pub refused: Family<Refused, Counter>,
    pub accept_pauses: Counter,
    pub connect_failures: Family<OfGuest, Counter>,
    pub timeouts: Family<OfGuest, Counter>,
    pub to_guest: Family<OfGuest, Counter>,
    pub to_client: Family<OfGuest, Counter>,
    pub moved: Family<OfGuest, Counter>,
    pub move_failures: Family<OfGuest, Counter>,
    pub move_fallbacks: Family<OfGuest, Counter>,
    pub move_cancelled: Family<OfGuest, Counter>,
    pub leases_ended: Family<OfGuest, Counter>,
    pub stall: Family<OfGuest, Histogram>,
    pub buffered: Gauge,
}

/// From half a millisecond to half a minute.
fn stall_histogram() -> Histogram {
    Histogram::new([
        0.0005, 0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.25, 0.3,
        0.5, 1.0, 2.5, 5.0, 10.0, 30.0,
    ])
}

impl Metrics {
    pub(crate) fn new() -> Self {
        let mut registry = Registry::with_prefix("netproxy");
        macro_rules! metric {
            ($name:literal, $help:literal, $metric:expr) => {{
                let metric = $metric;
                registry.register($name, $help, metric.clone());
                metric
            }};
        }
        let accepted = metric!("connections", "Connections accepted", Family::default());
        let open = metric!(
            "connections_open",
            "Connections open now",
            Family::default()
        );
        let refused = metric!("refused", "Clients turned away", Family::default());
        let accept_pauses = metric!(
            "accept_pauses",
            "Times that clients had to wait for descriptors or memory",
            Counter::default()
        );
        let connect_failures = metric!(
            "connect_failures",
            "Connections that no guest took",
            Family::default()
        );
        let timeouts = metric!(
            "timeouts",
            "Connections ended by a limit",
            Family::default()
        );
        let to_guest = metric!("to_guest_bytes", "Bytes given to guests", Family::default());
        let to_client = metric!(
            "to_client_bytes",
            "Bytes given to clients",
            Family::default()
        );
        let moved = metric!("retargets", "Connections re-targeted", Family::default());
        let move_failures = metric!(
            "retarget_failures",
            "Connections closed because they could not be re-targeted",
            Family::default()
        );
        let move_fallbacks = metric!(
            "retarget_fallbacks",
            "Re-targeted connections left to ordinary retransmission",
            Family::default()
        );
        let move_cancelled = metric!(
            "retargets_cancelled",
            "Connections that went back",
            Family::default()
        );
        let leases_ended = metric!(
            "leases_ended",
            "Moves given up because their caller died or took too long",
            Family::default()
        );
        let stall: Family<OfGuest, Histogram> =
            Family::new_with_constructor(stall_histogram as fn() -> Histogram);
        registry.register_with_unit(
            "stall",
            "From the release to the guest's first answer",
            Unit::Seconds,
            stall.clone(),
        );
        let buffered = metric!(
            "buffered_bytes",
            "Bytes held for slow or held sides",
            Gauge::default()
        );
        Self {
            registry,
            accepted,
            open,
            refused,
            accept_pauses,
            connect_failures,
            timeouts,
            to_guest,
            to_client,
            moved,
            move_failures,
            move_fallbacks,
            move_cancelled,
            leases_ended,
            stall,
            buffered,
        }
    }

    /// All of it as text (OpenMetrics 1.0).
    pub(crate) fn text(&self) -> String {
        let mut out = String::new();
        if text::encode(&mut out, &self.registry).is_err() {
            out.clear();
        }
        out
    }
}

/// The HTTP listener that Prometheus asks. It knows one answer, to one request a connection.
#[derive(Debug)]
pub(crate) struct MetricsServer {
    address: SocketAddr,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl MetricsServer {
    pub(crate) fn start(
        address: SocketAddr,
        render: impl Fn() -> String + Send + 'static,
    ) -> Result<Self> {
        let listen = |source| Error::Listen { address, source };
        let listener = TcpListener::bind(address).map_err(listen)?;
        let address = listener.local_addr().map_err(listen)?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::Builder::new()
            .name("metrics".into())
            .spawn(move || {
                for stream in listener.incoming() {
                    if stopped.load(Ordering::Acquire) {
                        return;
                    }
                    match stream {
                        Ok(stream) => {
                            if let Err(error) = answer(stream, &render) {
                                log::debug!("A request for metrics: {error}");
                            }
                        }
                        Err(_) => std::thread::sleep(Duration::from_millis(100)),
                    }
                }
            })
            .map_err(crate::error::system("Starting a thread"))?;
        Ok(Self {
            address,
            stop,
            thread: Some(thread),
        })
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for MetricsServer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        // Wakes the thread from accept.
        let _ = TcpStream::connect_timeout(&self.address, Duration::from_secs(1));
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn answer(mut stream: TcpStream, render: &impl Fn() -> String) -> std::io::Result<()> {
    const LIMIT: Duration = Duration::from_secs(1);
    stream.set_write_timeout(Some(LIMIT))?;
    // For the whole request: the next one waits for this.
    let deadline = Instant::now() + LIMIT;
    let mut request = Vec::new();
    let mut chunk = [0_u8; 1024];
    while !request.windows(4).any(|end| end == b"\r\n\r\n") {
        let left = deadline.saturating_duration_since(Instant::now());
        // None at all would be no limit.
        stream.set_read_timeout(Some(left.max(Duration::from_millis(1))))?;
        let read = stream.read(&mut chunk)?;
        if read == 0 || request.len() > 8192 {
            return Err(std::io::ErrorKind::InvalidData.into());
        }
        request.extend_from_slice(chunk.get(..read).unwrap_or(&[]));
    }
    let (status, body) = if request.starts_with(b"GET /metrics ") {
        ("200 OK", render())
    } else {
        ("404 Not Found", "Metrics are at /metrics\n".to_owned())
    };
    write!(
        stream,
        "HTTP/1.1 {status}\r\nContent-Type: application/openmetrics-text; version=1.0.0; \
         charset=utf-8\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
        body.len()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ask(address: SocketAddr, request: &str) -> String {
        let mut stream = TcpStream::connect(address).unwrap();
        stream.write_all(request.as_bytes()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    }

    #[test]
    fn counts_are_shown_over_http() {
        let metrics = Arc::new(Metrics::new());
        let desktop = OfGuest {
            guest: "desktop".into(),
        };
        metrics.moved.get_or_create(&desktop).inc_by(3);
        metrics.stall.get_or_create(&desktop).observe(0.004);
        let shown = Arc::clone(&metrics);
        let server =
            MetricsServer::start("127.0.0.1:0".parse().unwrap(), move || shown.text()).unwrap();
        let answer = ask(server.address(), "GET /metrics HTTP/1.1\r\n\r\n");
        assert!(answer.starts_with("HTTP/1.1 200"));
        assert!(
            answer.contains("netproxy_retargets_total{guest=\"desktop\"} 3"),
            "{answer}"
        );
        assert!(answer.contains("netproxy_stall_seconds_bucket{le=\"0.005\",guest=\"desktop\"} 1"));
        assert!(ask(server.address(), "GET / HTTP/1.1\r\n\r\n").starts_with("HTTP/1.1 404"));
    }
}
