//! TCP as an engine's hosts have it: congestion control and buffers of each site's namespace.

use std::path::Path;

use serde_json::{Map, Value};

use super::Engine;
use crate::lab::process::{ProcessError, run};

/// What is set in a namespace and written into every result.
const SETTINGS: [&str; 3] = ["tcp_congestion_control", "tcp_rmem", "tcp_wmem"];

/// Sets the TCP of a namespace as the engine's hosts have it.
pub(in crate::lab) async fn tune(namespace: &str, engine: Engine) -> Result<(), ProcessError> {
    let [receive, send] = engine.buffers();
    let [control_key, receive_key, send_key] = SETTINGS;
    let values = [
        (control_key, engine.congestion_control()),
        (receive_key, receive),
        (send_key, send),
        // Nothing that one move learnt about the path may help the next.
        ("tcp_no_metrics_save", "1"),
    ];
    let mut argv = vec!["ip", "netns", "exec", namespace, "sh", "-c"];
    // Pairs of a name and a value.
    argv.push("while [ $# -gt 1 ]; do printf %s \"$2\" >\"/proc/sys/net/ipv4/$1\" || exit; shift 2; done");
    argv.push("sh");
    argv.extend(values.iter().flat_map(|&(key, value)| [key, value]));
    run(&argv).await?;
    Ok(())
}

/// The TCP of a namespace as it is.
pub(in crate::lab) async fn settings(namespace: &str) -> Result<Map<String, Value>, ProcessError> {
    let mut argv = vec!["ip", "netns", "exec", namespace, "sh", "-c"];
    argv.extend(["cd /proc/sys/net/ipv4 && cat \"$@\"", "sh"]);
    argv.extend(SETTINGS);
    let values = run(&argv).await?;
    let one_space = |line: &str| line.split_ascii_whitespace().collect::<Vec<_>>().join(" ");
    Ok(SETTINGS
        .iter()
        .zip(values.lines())
        .map(|(key, value)| ((*key).to_owned(), Value::from(one_space(value))))
        .collect())
}

/// Lets namespaces use the congestion controls of the engines, which only the host's own list can allow. What the list was is
/// kept in `note`, for [`restore_controls`].
///
/// What the kernel does not have stays out; the engines that need it then say so.
pub(in crate::lab) async fn allow_controls(note: &Path) -> std::io::Result<()> {
    let before = std::fs::read_to_string(ALLOWED)?;
    let mut wanted: Vec<&str> = before.split_ascii_whitespace().collect();
    let allowed = wanted.len();
    for control in ["cubic", "bbr"] {
        if !is_available(control) {
            // A module that is not loaded yet. Where there is none, the kernel has it built in or not at all.
            let _ = run(&["modprobe", &format!("tcp_{control}")]).await;
        }
        if is_available(control) && !wanted.contains(&control) {
            wanted.push(control);
        }
    }
    if wanted.len() > allowed {
        std::fs::write(note, before.trim())?;
        std::fs::write(ALLOWED, wanted.join(" "))?;
    }
    Ok(())
}

/// Puts the host's list back to what `note` says; nothing where there is no note.
pub(in crate::lab) fn restore_controls(note: &Path) -> std::io::Result<()> {
    match std::fs::read_to_string(note) {
        Ok(before) => std::fs::write(ALLOWED, before),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    }
}

fn is_available(control: &str) -> bool {
    let path = Path::new("/proc/sys/net/ipv4/tcp_available_congestion_control");
    std::fs::read_to_string(path).is_ok_and(|list| list.split_ascii_whitespace().any(|name| name == control))
}

const ALLOWED: &str = "/proc/sys/net/ipv4/tcp_allowed_congestion_control";
