//! Metrics: a scrape is exactly the table, in both formats, over HTTP, whatever migrations run.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use longhaul::api::{Outcome, Pages, Phase, Role};
use longhaul::config::Hook;
use longhaul::metrics::{Direction, Kind, Look, Metrics, SERIES, Stage, Values, Waiting, serve};
use longhaul::proto::page::ByteRate;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

/// One family of a scrape.
#[derive(Debug, Default)]
struct Family {
    kind: String,
    help: String,
    samples: Vec<Sample>,
}

#[derive(Debug)]
struct Sample {
    suffix: String,
    labels: BTreeMap<String, String>,
    value: f64,
}

/// Parses the Prometheus text format 0.0.4 strictly: each sample follows the announcement of its family.
fn parse(text: &str) -> BTreeMap<String, Family> {
    let mut families: BTreeMap<String, Family> = BTreeMap::new();
    let mut current = String::new();
    for line in text.lines() {
        if let Some(rest) = line.strip_prefix("# HELP ") {
            let (name, help) = rest.split_once(' ').expect("a help has a text");
            assert!(!families.contains_key(name), "{name} is announced twice");
            current = name.to_owned();
            families.entry(current.clone()).or_default().help = help.to_owned();
        } else if let Some(rest) = line.strip_prefix("# TYPE ") {
            let (name, kind) = rest.split_once(' ').expect("a type has a kind");
            assert_eq!(name, current, "type and help are announced together");
            families.get_mut(name).expect("announced").kind = kind.to_owned();
        } else {
            assert!(!line.starts_with('#'), "a comment of another format: {line}");
            let (name_and_labels, value) = line.rsplit_once(' ').expect("a sample has a value");
            let (name, labels) = match name_and_labels.split_once('{') {
                Some((name, labels)) => (name, labels.strip_suffix('}').expect("labels are closed")),
                None => (name_and_labels, ""),
            };
            let suffix = name
                .strip_prefix(&current)
                .unwrap_or_else(|| panic!("{name} is not announced"));
            let labels = labels.split(',').filter(|label| !label.is_empty()).map(|label| {
                let (key, value) = label.split_once('=').expect("a label has a value");
                (key.to_owned(), value.trim_matches('"').to_owned())
            });
            let sample = Sample {
                suffix: suffix.to_owned(),
                labels: labels.collect(),
                value: value.parse().expect("a value is a number"),
            };
            families.get_mut(&current).expect("announced").samples.push(sample);
        }
    }
    families
}

/// Metrics of a gateway with two peers that has done a bit of everything. That a gateway does all this is seen in
/// `tests/migration.rs`.
#[expect(clippy::disallowed_methods, reason = "an arbitrary instant to count from")]
fn busy() -> Arc<Metrics> {
    let metrics = Arc::new(Metrics::new("1.2.3"));
    metrics.add_vmm_bytes(Direction::In, 1000);
    metrics.add_frame_bytes(Direction::Out, 100);
    metrics.add_pages(&Pages {
        zero: 1,
        same: 2,
        reference: 3,
        delta: 4,
        literal: 5,
        raw: 6,
    });
    metrics.round_ended(Duration::from_millis(1500));
    metrics.observe_downtime(Duration::from_millis(300));
    metrics.add_shaper_wait(Duration::from_millis(250));
    metrics.count_journal_error();
    metrics.count_hook(Hook::BeforeSwitchover, false);
    metrics.set_in_doubt(1);
    metrics.set_link_rate(ByteRate(25_000_000));
    for name in ["tokyo", "oslo"] {
        let peer = metrics.peer(name);
        peer.connected();
        peer.set_open_migrations(2);
        peer.set_rtt(Duration::from_millis(150));
        peer.set_rate(ByteRate(12_500_000));
        peer.set_controller_rate(ByteRate(125_000_000));
        peer.add_packets(1000, 1);
        peer.add_wan_bytes(Direction::Out, 150_000);
    }
    let start = Instant::now();
    let migration = metrics.migration(Role::Source);
    migration.enters(start, Phase::Precopy);
    migration.ended(start + Duration::from_millis(2500), Outcome::Completed);
    metrics
}

fn value(families: &BTreeMap<String, Family>, name: &str, labels: &[(&str, &str)]) -> f64 {
    let wanted: BTreeMap<String, String> = labels
        .iter()
        .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
        .collect();
    let family = families.get(name).unwrap_or_else(|| panic!("{name} is not there"));
    let found: Vec<f64> = family
        .samples
        .iter()
        .filter(|sample| sample.suffix.is_empty() && sample.labels == wanted)
        .map(|sample| sample.value)
        .collect();
    assert_eq!(found.len(), 1, "{name} {labels:?}");
    found[0]
}

#[test]
fn a_scrape_is_exactly_the_table() {
    let metrics = busy();
    let families = parse(&metrics.prometheus().unwrap());
    let scraped: BTreeSet<&str> = families.keys().map(String::as_str).collect();
    let table: BTreeSet<&str> = SERIES.iter().map(|series| series.name).collect();
    assert_eq!(scraped, table);
    assert_eq!(table.len(), SERIES.len(), "a series is there twice");
    for series in SERIES {
        let family = &families[series.name];
        let (kind, suffixes): (&str, &[&str]) = match series.kind {
            Kind::Counter => ("counter", &[""]),
            Kind::Gauge => ("gauge", &[""]),
            Kind::Histogram => ("histogram", &["_bucket", "_sum", "_count"]),
        };
        assert_eq!(family.kind, kind, "{}", series.name);
        assert_eq!(family.help, format!("{}.", series.help), "{}", series.name);
        assert!(series.name.starts_with("longhaul_"), "{}", series.name);
        assert_eq!(
            series.kind == Kind::Counter,
            series.name.ends_with("_total"),
            "{}",
            series.name
        );
        let found: BTreeSet<&str> = family.samples.iter().map(|sample| sample.suffix.as_str()).collect();
        assert_eq!(found, suffixes.iter().copied().collect(), "{}", series.name);

        for sample in &family.samples {
            let keys: BTreeSet<&str> = sample
                .labels
                .keys()
                .map(String::as_str)
                .filter(|key| *key != "le")
                .collect();
            assert_eq!(
                keys,
                series.labels.iter().map(|(key, _)| *key).collect(),
                "{}",
                series.name
            );
        }
        // Every word of a closed label is there from the start, and no other.
        for (label, values) in series.labels {
            let found: BTreeSet<&str> = family
                .samples
                .iter()
                .map(|sample| sample.labels[*label].as_str())
                .collect();
            let expected = match values {
                Values::Closed(words) => words.iter().copied().collect(),
                Values::Peer => BTreeSet::from(["tokyo", "oslo"]),
                Values::Version => BTreeSet::from(["1.2.3"]),
            };
            assert_eq!(found, expected, "{} {label}", series.name);
        }
    }
}

#[test]
fn what_is_counted_comes_out_under_its_labels() {
    let metrics = busy();
    let arriving = metrics.migration(Role::Destination);
    arriving.look(&Look {
        waiting: Waiting::default().with(Stage::Restore, 3072),
        ..Look::default()
    });
    let families = parse(&metrics.prometheus().unwrap());
    assert_eq!(
        value(&families, "longhaul_vmm_bytes_total", &[("direction", "in")]),
        1000.0
    );
    assert_eq!(
        value(&families, "longhaul_frame_bytes_total", &[("direction", "out")]),
        100.0
    );
    for (encoding, pages) in [
        ("zero", 1.0),
        ("same", 2.0),
        ("reference", 3.0),
        ("delta", 4.0),
        ("literal", 5.0),
        ("raw", 6.0),
    ] {
        assert_eq!(
            value(&families, "longhaul_pages_total", &[("encoding", encoding)]),
            pages
        );
    }
    assert_eq!(
        value(&families, "longhaul_phase_seconds_total", &[("phase", "precopy")]),
        2.5
    );
    assert_eq!(value(&families, "longhaul_shaper_wait_seconds_total", &[]), 0.25);
    assert_eq!(
        value(&families, "longhaul_queue_bytes", &[("stage", "restore")]),
        3072.0
    );
    assert_eq!(value(&families, "longhaul_peer_rtt_seconds", &[("peer", "oslo")]), 0.15);
    assert_eq!(
        value(
            &families,
            "longhaul_wan_bytes_total",
            &[("peer", "oslo"), ("direction", "out")]
        ),
        150_000.0
    );
    let hook = [("hook", "before_switchover"), ("result", "failed")];
    assert_eq!(value(&families, "longhaul_hooks_total", &hook), 1.0);
    assert_eq!(value(&families, "longhaul_link_rate_bytes_per_second", &[]), 25e6);
    assert_eq!(
        value(&families, "longhaul_peer_rate_bytes_per_second", &[("peer", "oslo")]),
        12.5e6
    );
    let completed = [("role", "source"), ("outcome", "completed")];
    assert_eq!(value(&families, "longhaul_migrations_total", &completed), 1.0);
    assert_eq!(
        value(&families, "longhaul_migrations_active", &[("role", "source")]),
        0.0
    );
}

#[test]
fn a_downtime_at_the_limit_is_within_it_and_one_above_is_not() {
    let metrics = Metrics::new("1");
    metrics.observe_downtime(Duration::from_millis(300));
    metrics.observe_downtime(Duration::from_millis(301));
    let families = parse(&metrics.prometheus().unwrap());
    let within = families["longhaul_downtime_seconds"]
        .samples
        .iter()
        .find(|sample| sample.labels.get("le").is_some_and(|edge| edge == "0.3"))
        .expect("0.3 s is an edge");
    assert_eq!(within.value, 1.0);
}

#[test]
fn a_hundred_migrations_make_no_new_series() {
    let metrics = busy();
    let lines = metrics.prometheus().unwrap().lines().count();
    let running: Vec<_> = (0..100).map(|_| metrics.migration(Role::Destination)).collect();
    for migration in &running {
        migration.look(&Look {
            dirty_rate: ByteRate(1),
            ..Look::default()
        });
    }
    let text = metrics.prometheus().unwrap();
    assert_eq!(text.lines().count(), lines);
    assert_eq!(value(&parse(&text), "longhaul_dirty_rate_bytes_per_second", &[]), 100.0);
}

#[test]
fn a_peer_that_was_forgotten_has_no_series() {
    let metrics = busy();
    assert!(metrics.prometheus().unwrap().contains("tokyo"));
    metrics.forget_peer("tokyo");
    let text = metrics.prometheus().unwrap();
    assert!(!text.contains("tokyo") && text.contains("oslo"));
}

/// Status line, headers and body of a GET.
async fn get(address: std::net::SocketAddr, path: &str, accept: &str) -> (String, String) {
    let mut stream = TcpStream::connect(address).await.expect("it listens");
    let request = format!("GET {path} HTTP/1.1\r\nhost: x\r\naccept: {accept}\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.expect("it reads");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.expect("it answers");
    let (head, body) = answer.split_once("\r\n\r\n").expect("an answer has a head");
    (head.to_ascii_lowercase(), body.to_owned())
}

#[tokio::test]
async fn metrics_live_and_ready_are_served_until_shutdown() {
    let metrics = busy();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let server = tokio::spawn(serve(listener, metrics.clone(), async {
        let _ = stopped.await;
    }));

    let (head, body) = get(address, "/metrics", "*/*").await;
    assert!(
        head.starts_with("http/1.1 200") && head.contains("text/plain; version=0.0.4"),
        "{head}"
    );
    assert_eq!(parse(&body).len(), SERIES.len());
    let (head, body) = get(
        address,
        "/metrics",
        "application/openmetrics-text;version=1.0.0,text/plain;q=0.5",
    )
    .await;
    assert!(head.contains("application/openmetrics-text; version=1.0.0"), "{head}");
    assert!(
        body.ends_with("# EOF\n") && body.contains("# TYPE longhaul_pages counter\n"),
        "{body}"
    );

    assert!(get(address, "/live", "*/*").await.0.starts_with("http/1.1 200"));
    assert!(get(address, "/ready", "*/*").await.0.starts_with("http/1.1 503"));
    metrics.set_ready(true);
    assert!(get(address, "/ready", "*/*").await.0.starts_with("http/1.1 200"));
    assert!(get(address, "/other", "*/*").await.0.starts_with("http/1.1 404"));

    stop.send(()).unwrap();
    server.await.unwrap().unwrap();
}

/// `PROMTOOL` says where it is; otherwise it is looked for in the path.
#[test]
#[ignore = "needs promtool, of the Debian package prometheus"]
fn promtool_finds_nothing_to_complain_about() {
    use std::io::Write as _;
    use std::process::{Command, Stdio};

    let promtool = std::env::var("PROMTOOL").unwrap_or_else(|_| "promtool".to_owned());
    let mut child = Command::new(&promtool)
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("promtool can be run");
    let text = busy().prometheus().unwrap();
    child.stdin.take().expect("piped").write_all(text.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && said.trim().is_empty(), "{said}");
}
