//! A peer whose address changes in the middle of a transfer, as a NAT or another uplink makes it: the transfer goes on.

use std::net::SocketAddr;
use std::time::{Duration, SystemTime};

use longhaul::wan::LinkSettings;

use super::{Bulk, Connected, RTT, SEED, SimulatedLink, achievable, link_of, mbit, site, site_with};

const SECOND: Duration = Duration::from_secs(1);

/// Where a NAT shows the dialling site's bulk socket from now on.
#[derive(Clone, Copy)]
enum Seen {
    AtAnotherPort,
    AtAnotherIp,
}

/// The share of what the link carries that arrives from 2 s after the change on; the cap of the answering site holds at any time.
async fn share_after(seen: Seen, dialler_sends: bool) -> f64 {
    let link: LinkSettings = link_of(mbit(100), 0.1);
    let cap = link.rate;
    let simulated = SimulatedLink::new(link.clone(), SEED);
    let capped = site_with(&simulated, 1, SystemTime::now(), |settings| settings.link = Some(cap));
    let sites = [site(&simulated, 0), capped];
    let connected = Connected::between(simulated, sites, Some(link.rate), RTT).await;
    let bulk = if dialler_sends {
        connected.send_bulk()
    } else {
        Bulk::start(&connected.to.bulk, &connected.from.bulk)
    };
    tokio::time::sleep(3 * SECOND).await;

    let before = connected.to.bulk[0].remote_address();
    let after = match seen {
        Seen::AtAnotherPort => SocketAddr::new(before.ip(), before.port() + 1000),
        Seen::AtAnotherIp => SocketAddr::new("10.77.0.9".parse().unwrap(), before.port()),
    };
    let unrestricted = connected.to.bulk.stats().rate;
    connected.link.rebind(before, after);
    tokio::time::sleep(2 * SECOND).await;
    assert_eq!(connected.to.bulk[0].remote_address(), after);
    // A cap that is set now must reach the controller and the route of the new path.
    connected.to.set_rate(Some(mbit(50)));
    if !dialler_sends {
        assert_eq!(
            (unrestricted, connected.to.bulk.stats().rate),
            (Some(cap), Some(mbit(50)))
        );
    }
    tokio::time::sleep(SECOND).await;
    connected.to.set_rate(Some(cap));
    tokio::time::sleep(3 * SECOND).await;

    let during = bulk.arrived_between(3 * SECOND, 5 * SECOND) as f64 / achievable(&link, 2 * SECOND);
    let capped = bulk.arrived_between(SECOND * 11 / 2, 6 * SECOND) as f64 / achievable(&link, SECOND / 2);
    let share = bulk.arrived_between(7 * SECOND, 9 * SECOND) as f64 / achievable(&link, 2 * SECOND);
    let (way, kind) = (
        if dialler_sends { "from" } else { "to" },
        match seen {
            Seen::AtAnotherPort => "port",
            Seen::AtAnotherIp => "IP address",
        },
    );
    eprintln!(
        "another {kind} in a transfer {way} the site that moves, seed {SEED}: {during:.4} in the 2 s after, {capped:.4} with a cap of half, \
         then {share:.4} of what the link carries"
    );
    if !dialler_sends {
        assert!(capped <= 0.53, "the cap does not hold on the new path: {capped}");
    }
    bulk.complete().await;
    share
}

#[tokio::test(start_paused = true)]
async fn a_sender_behind_a_nat_that_forgot_it_goes_on() {
    for seen in [Seen::AtAnotherPort, Seen::AtAnotherIp] {
        let share = share_after(seen, true).await;
        assert!(share >= 0.97, "{share}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_receiver_behind_a_nat_that_forgot_it_is_found_again() {
    for seen in [Seen::AtAnotherPort, Seen::AtAnotherIp] {
        let share = share_after(seen, false).await;
        assert!(share >= 0.95, "{share}");
    }
}
