//! A tunnel of OpenSSH across the link, into which QEMU at A migrates: keys and servers of its own, nothing of the host's.

use std::net::IpAddr;
use std::path::Path;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use tokio::time::Instant;

use crate::lab::process::{Process, run};
use crate::lab::site::Site;

/// A server at the destination and a client at the source that forwards a port.
#[derive(Debug)]
pub(super) struct Tunnel {
    server: Process,
    client: Process,
}

impl Tunnel {
    /// Forwards [`LOCAL`] of `a` to `target`, as seen from `b`.
    ///
    /// # Errors
    /// A sentence: this machine has no tunnel.
    pub(super) async fn open(a: &Site, b: &Site, target: (IpAddr, u16)) -> Result<Self, String> {
        let sshd = ["/usr/sbin/sshd", "/usr/local/sbin/sshd"]
            .into_iter()
            .find(|path| Path::new(path).exists())
            .ok_or("there is no sshd here (Debian: openssh-server)")?;
        let failed = |error: crate::lab::process::ProcessError| error.to_string();
        let [host_key, user_key] = [b.directory.join("host_key"), a.directory.join("user_key")];
        for key in [&host_key, &user_key] {
            let key = key.display().to_string();
            run(&["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", &key])
                .await
                .map_err(failed)?;
        }
        let file = |path: &Path| path.display().to_string();
        let config = b.directory.join("sshd_config");
        let authorized = a.directory.join("user_key.pub");
        let text = format!(
            "ListenAddress {}:{PORT}\nHostKey {}\nAuthorizedKeysFile {}\nStrictModes no\nPidFile none\n\
             PasswordAuthentication no\nKbdInteractiveAuthentication no\nUsePAM no\nPermitRootLogin yes\n",
            target.0,
            file(&host_key),
            file(&authorized)
        );
        std::fs::write(&config, text).map_err(|error| format!("cannot write {}: {error}", config.display()))?;
        // The directory in which sshd separates its privileges; Debian's service makes it at boot.
        std::fs::create_dir_all("/run/sshd").map_err(|error| format!("cannot make /run/sshd: {error}"))?;
        let argv = [sshd, "-D", "-e", "-f", &file(&config)].map(str::to_owned);
        let server =
            Process::spawn("sshd", Some(&b.namespace), &argv, &b.directory.join("sshd.log")).map_err(failed)?;
        let forward = format!("127.0.0.1:{LOCAL}:{}:{}", target.0, target.1);
        let known = a.directory.join("known_hosts");
        let options = [
            "BatchMode=yes".to_owned(),
            "StrictHostKeyChecking=accept-new".to_owned(),
            format!("UserKnownHostsFile={}", file(&known)),
            "ExitOnForwardFailure=yes".to_owned(),
            "ConnectionAttempts=20".to_owned(),
        ];
        let mut argv = [
            "ssh",
            "-F",
            "none",
            "-N",
            "-i",
            &file(&user_key),
            "-p",
            &PORT.to_string(),
            "-L",
            &forward,
        ]
        .map(str::to_owned)
        .to_vec();
        argv.extend(options.into_iter().flat_map(|option| ["-o".to_owned(), option]));
        argv.push(format!("root@{}", target.0));
        let client = Process::spawn("ssh", Some(&a.namespace), &argv, &a.directory.join("ssh.log")).map_err(failed)?;
        let mut tunnel = Self { server, client };
        match tunnel.wait(client_listens(a)).await {
            Ok(()) => Ok(tunnel),
            Err(reason) => {
                tunnel.close().await;
                Err(reason)
            }
        }
    }

    /// Where QEMU at the source migrates to.
    pub(super) fn uri(&self) -> String {
        format!("tcp:127.0.0.1:{LOCAL}")
    }

    async fn wait(&mut self, listens: impl AsyncFn() -> bool) -> Result<(), String> {
        let deadline = Instant::now() + OPEN;
        loop {
            self.server.check().map_err(|error| error.to_string())?;
            self.client.check().map_err(|error| error.to_string())?;
            if listens().await {
                return Ok(());
            }
            if Instant::now() > deadline {
                return Err(format!("the tunnel did not open; ssh said: {}", self.client.said()));
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    pub(super) async fn close(self) {
        self.client.kill().await;
        // A session's process would notice that its client is gone only when the link has told it.
        let sessions = self.server.id().map(children).unwrap_or_default();
        self.server.kill().await;
        for session in sessions.into_iter().filter_map(Pid::from_raw) {
            // One that has ended meanwhile needs nothing.
            let _ = kill_process(session, Signal::KILL);
        }
    }
}

fn children(process: u32) -> Vec<i32> {
    let listed = std::fs::read_to_string(format!("/proc/{process}/task/{process}/children")).unwrap_or_default();
    listed
        .split_ascii_whitespace()
        .filter_map(|child| child.parse().ok())
        .collect()
}

/// Whether the forwarded port is listened to: ssh does so once it is connected. A connection would be QEMU's only one.
fn client_listens(site: &Site) -> impl AsyncFn() -> bool {
    let namespace = site.namespace.clone();
    async move || {
        let filter = format!("sport = :{LOCAL}");
        let listed = run(&["ip", "netns", "exec", &namespace, "ss", "-Hltn", &filter]).await;
        listed.is_ok_and(|text| !text.trim().is_empty())
    }
}

/// The server's port at the destination.
const PORT: u16 = 4722;
/// The forwarded port at the source.
const LOCAL: u16 = 4701;
/// Connecting takes some RTTs.
const OPEN: Duration = Duration::from_secs(30);
