//! The guest's own network, at both sites, and a client in it.
//!
//! ```text
//!   site A              client              site B
//!   tap-a ─ lan0 ─ up-a ══ lan-a ─ lan0 ─ lan-b ══ up-b ─ lan0 ─ tap-b
//!                              10.78.0.1/24
//! ```
//!
//! A bridge at each site holds the tap device of its QEMU; a third bridge, in the client's namespace, joins them and is the client's own
//! device. Frames cross it without delay, loss or limit, and none of them crosses the measured link: what a client sees is the guest's
//! absence and not a way to it. The guest takes its addresses along, as in a network that spans both sites. Bridges learn of its new place
//! by what it sends, at the latest by what QEMU and the guest announce when it arrives.

use std::net::Ipv4Addr;
use std::path::Path;

use super::process::{ProcessError, run};

/// Address of the client.
pub const CLIENT_ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 78, 0, 1);
/// Address for the guest's dial.
pub const GUEST_ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 78, 0, 2);

/// The network of one run, whether it is up or not.
#[derive(Clone, Debug)]
pub struct Network {
    client: String,
    sites: [SiteEnd; 2],
}

/// What one site has of it.
#[derive(Clone, Debug)]
struct SiteEnd {
    namespace: String,
    tap: &'static str,
    uplink: &'static str,
    port: &'static str,
}

impl Network {
    /// The network between the namespaces of two sites, of which each must exist before [`Network::up`]; they may be the same one. The client's is `NAME-c`.
    #[must_use]
    pub fn named(name: &str, [a, b]: [&str; 2]) -> Self {
        let end = |namespace: &str, tap, uplink, port| SiteEnd {
            namespace: namespace.to_owned(),
            tap,
            uplink,
            port,
        };
        Self {
            client: format!("{name}-c"),
            sites: [end(a, "tap-a", "up-a", "lan-a"), end(b, "tap-b", "up-b", "lan-b")],
        }
    }

    /// The client's namespace.
    #[must_use]
    pub fn client(&self) -> &str {
        &self.client
    }

    /// The tap devices for QEMU at the first and at the second site ([`GuestFiles::tap`](super::guest::GuestFiles::tap)).
    #[must_use]
    pub fn taps(&self) -> [&'static str; 2] {
        [self.sites[0].tap, self.sites[1].tap]
    }

    /// Whether the client's namespace exists, also of a network that is half made or half gone.
    #[must_use]
    pub fn is_there(&self) -> bool {
        Path::new("/run/netns").join(&self.client).exists()
    }

    /// Makes the network.
    ///
    /// # Errors
    /// [`ProcessError`] of the `ip` that failed. What was made by then is removed by [`Network::down`].
    pub async fn up(&self) -> Result<(), ProcessError> {
        let client = self.client.as_str();
        run(&["ip", "netns", "add", client]).await?;
        self.bridge(client).await?;
        let address = format!("{CLIENT_ADDRESS}/24");
        run(&["ip", "-n", client, "address", "add", &address, "dev", BRIDGE]).await?;
        let mut bridged: Option<&str> = None;
        for site in &self.sites {
            let namespace = site.namespace.as_str();
            if bridged != Some(namespace) {
                self.bridge(namespace).await?;
                let ends = ["ip", "link", "add", site.port, "netns", client, "type", "veth"];
                let peer = ["peer", "name", site.uplink, "netns", namespace];
                run(&[&ends[..], &peer].concat()).await?;
                self.attach(client, site.port).await?;
                self.attach(namespace, site.uplink).await?;
                bridged = Some(namespace);
            }
            run(&["ip", "-n", namespace, "tuntap", "add", "dev", site.tap, "mode", "tap"]).await?;
            self.attach(namespace, site.tap).await?;
        }
        Ok(())
    }

    /// Removes what there is of the network. QEMUs on its tap devices have none from then on.
    ///
    /// # Errors
    /// [`ProcessError`] of the `ip` that failed.
    pub async fn down(&self) -> Result<(), ProcessError> {
        for site in &self.sites {
            // Of a pair of devices one is removed with the other, and all of them with their namespace.
            for device in [site.tap, site.uplink, BRIDGE] {
                let listed = run(&["ip", "-n", &site.namespace, "link", "show", "dev", device]).await;
                if listed.is_ok() {
                    run(&["ip", "-n", &site.namespace, "link", "delete", "dev", device]).await?;
                }
            }
        }
        if self.is_there() {
            run(&["ip", "netns", "delete", &self.client]).await?;
        }
        Ok(())
    }

    async fn bridge(&self, namespace: &str) -> Result<(), ProcessError> {
        // No snooping of multicast, which would first ask who wants it.
        let kind = ["type", "bridge", "stp_state", "0", "mcast_snooping", "0"];
        run(&[&["ip", "-n", namespace, "link", "add", BRIDGE][..], &kind].concat()).await?;
        self.raise(namespace, BRIDGE).await
    }

    async fn attach(&self, namespace: &str, device: &str) -> Result<(), ProcessError> {
        run(&["ip", "-n", namespace, "link", "set", device, "master", BRIDGE]).await?;
        self.raise(namespace, device).await
    }

    /// No address of its own: a site has no place in the guest's network, and nothing but the guest and the client speaks in it.
    async fn raise(&self, namespace: &str, device: &str) -> Result<(), ProcessError> {
        if Path::new("/proc/net/if_inet6").exists() {
            run(&["ip", "-n", namespace, "link", "set", device, "addrgenmode", "none"]).await?;
        }
        run(&["ip", "-n", namespace, "link", "set", device, "up"]).await?;
        Ok(())
    }
}

const BRIDGE: &str = "lan0";
