//! The configuration: the shipped files agree with the defaults, every mistake is named at once, flags go over the
//! file.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Duration;

use longhaul::config::{
    AfterSuccess, Config, ConfigError, Disks, ImageFormat, Overrides, Place, Preallocation, Problem, stated_state_dir,
};
use longhaul::hypervisor::qemu::LaunchValues;
use longhaul::proto::page::ByteRate;

fn shipped(name: &str) -> String {
    std::fs::read_to_string(PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("config").join(name))
        .expect("the file is shipped")
}

fn parse(text: &str) -> Result<Config, Vec<Problem>> {
    Config::parse(text, &Overrides::default())
}

/// The reference file with every commented key made active.
fn all_keys_active() -> String {
    let mut text = String::new();
    for line in shipped("gateway.toml").lines() {
        let key = line
            .strip_prefix('#')
            .filter(|rest| rest.starts_with(|c: char| c == '[' || c.is_ascii_lowercase()));
        text.push_str(key.unwrap_or(line));
        text.push('\n');
    }
    text
}

#[test]
fn the_reference_file_states_exactly_the_defaults() {
    assert_eq!(parse(&shipped("gateway.toml")), Ok(Config::for_site("frankfurt")));
}

#[test]
fn the_reference_file_documents_every_key_that_is_read() {
    let text = all_keys_active();
    parse(&text).expect("the examples in the comments are valid");
    let documented: BTreeSet<String> = text
        .lines()
        .filter(|line| !line.starts_with('#'))
        .scan(String::new(), |table, line| {
            if line.starts_with('[') {
                *table = line.trim_matches(['[', ']']).to_owned();
                return Some(Some(table.clone()));
            }
            let key = line.split_once(" = ").map(|(key, _)| key);
            Some(key.map(|key| {
                if table.is_empty() {
                    key.to_owned()
                } else {
                    format!("{table}.{key}")
                }
            }))
        })
        .flatten()
        .collect();

    // An unknown key in each table is answered with the keys that are known there.
    let mut read = BTreeSet::new();
    let entry = "days = \"mon\"\nhours = \"08:00-18:00\"\nrate = \"1mbit\"\nno_such = 1\n";
    let probe = "no_such = 1\nsite = \"x\"\n[link]\nrate = \"1gbit\"\nno_such = 1\n[[link.calendar]]\nENTRY[metrics]\nno_such = 1\n[store]\nno_such = 1\n[migration]\nno_such = 1\n[hooks]\nno_such = 1\n[log]\nno_such = 1\n\
                 [[pool]]\nname = \"f\"\npath = \"/f\"\nno_such = 1\n[[peer]]\nname = \"p\"\nno_such = 1\n[[peer.calendar]]\nENTRY[[vm]]\nname = \"v\"\nqmp = \"/q\"\ndisks = \"copied\"\nno_such = 1\n\
                 [[vm.image]]\ndisk = \"d\"\npath = \"/i\"\nno_such = 1\n\
                 [[tunnel]]\nname = \"t\"\nconnect = \"/c\"\nno_such = 1\n";
    for problem in parse(&probe.replace("ENTRY", entry)).unwrap_err() {
        let table = problem
            .key
            .trim_end_matches("no_such")
            .trim_end_matches('.')
            .replace("[1]", "");
        let (_, known) = problem
            .message
            .split_once("known here: ")
            .expect("only unknown keys are wrong");
        for key in known.split(", ") {
            read.insert(if table.is_empty() {
                key.to_owned()
            } else {
                format!("{table}.{key}")
            });
        }
    }
    assert!(read.contains("vm.qmp") && read.contains("link.rate"), "{read:?}");
    assert_eq!(documented, read);
}

#[test]
fn the_shipped_pair_of_sites_is_valid() {
    let a = parse(&shipped("site-a.toml")).unwrap();
    let b = parse(&shipped("site-b.toml")).unwrap();
    assert_eq!((a.site.as_str(), b.site.as_str()), ("site-a", "site-b"));
    assert!(b.vm("demo").unwrap().command.is_some());

    // Something has to make the directory of their sockets, and nothing may remove it under a VM that lives on.
    let unit = shipped("longhaul.service");
    let set = |key: &str| unit.lines().find_map(|line| line.strip_prefix(&format!("{key}=")));
    let directory = Path::new("/run").join(set("RuntimeDirectory").unwrap());
    assert_eq!(set("RuntimeDirectoryPreserve"), Some("yes"));
    for site in [&a, &b] {
        assert_eq!(site.vm("demo").unwrap().qmp.parent(), Some(directory.as_path()));
    }
}

#[test]
fn the_unit_goes_on_trying_to_start_the_gateway_for_which_a_paused_vm_may_wait() {
    let unit = shipped("longhaul.service");
    let lines: Vec<&str> = unit.lines().collect();
    assert!(lines.contains(&"StartLimitIntervalSec=0") && lines.contains(&"Restart=on-failure"));
    assert!(!unit.contains("RestartPreventExitStatus"));
}

#[test]
fn every_mistake_is_named_with_its_key_and_line() {
    let text = r#"
state_dir = "var"
listen = "0.0.0.0:65535"
memory_budget = 512
liste = "typo"

[link]
rate = "800"

[migration]
downtime_limit = "500"
after_success = "destroy"

[[peer]]
name = "tokyo"
address = "tokyo:0"

[[peer]]
name = "tokyo"

[[vm]]
name = "db 1"
qmp = "db.qmp"
disks = true
command = ["qemu", "{nonsense}"]

[[vm]]
"#;
    let problems = parse(text).unwrap_err();
    let found: Vec<(Option<usize>, &str)> = problems
        .iter()
        .map(|problem| (problem.line, problem.key.as_str()))
        .collect();
    let expected = [
        (Some(2), "state_dir"),
        (Some(3), "listen"),
        (Some(4), "memory_budget"),
        (Some(5), "liste"),
        (Some(8), "link.rate"),
        (Some(11), "migration.downtime_limit"),
        (Some(12), "migration.after_success"),
        (Some(16), "peer[1].address"),
        (Some(19), "peer[2].name"),
        (Some(22), "vm[1].name"),
        (Some(23), "vm[1].qmp"),
        (Some(24), "vm[1].disks"),
        (Some(25), "vm[1].command"),
        (Some(27), "vm[2].name"),
        (Some(27), "vm[2].qmp"),
        (None, "site"),
    ];
    for entry in expected {
        assert!(found.contains(&entry), "{entry:?} is missing in {problems:#?}");
    }
    // The command has four mistakes of its own: a placeholder, -incoming defer, -S, and {qmp}.
    assert_eq!(found.len(), expected.len() + 3, "{problems:#?}");
}

#[test]
fn what_no_gateway_could_work_with_is_a_mistake() {
    let wrong = |text: &str| parse(&format!("site = \"a\"\n{text}\n")).unwrap_err().remove(0);
    for (text, key, word) in [
        ("advertise = \"0.0.0.0:4646\"", "advertise", "reach this gateway"),
        ("advertise = \"[::]\"", "advertise", "reach this gateway"),
        ("[link]\nrtt = \"10000h\"", "link.rtt", "above 10s"),
        ("[[peer]]\nname = \"b\"\nrtt = \"11s\"", "peer[1].rtt", "above 10s"),
        (
            "[[peer]]\nname = \"b\"\nbulk_connections = \"0\"",
            "peer[1].bulk_connections",
            "from 1 to 8",
        ),
        (
            "[[peer]]\nname = \"b\"\nbulk_connections = \"9\"",
            "peer[1].bulk_connections",
            "from 1 to 8",
        ),
        ("[metrics]\nlisten = \"127.0.0.1:0\"", "metrics.listen", "port from 1"),
        (
            "[migration]\nannounce_rounds = \"1001\"",
            "migration.announce_rounds",
            "0 to 1000",
        ),
        ("[hooks]\npre_check = \"check\"", "hooks.pre_check", "absolute path"),
        ("[hooks]\ntime_limit = \"26s\"", "hooks.time_limit", "25s at most"),
    ] {
        let problem = wrong(text);
        assert_eq!(problem.key, key, "{problem}");
        assert!(problem.message.contains(word), "{problem}");
    }
    assert!(parse("site = \"a\"\nadvertise = \"192.0.2.1\"\n[link]\nrtt = \"10s\"\n").is_ok());
}

/// A site with a link of 1 Gbit/s and a peer of 400 Mbit/s, each with such a calendar.
fn with_calendars(link: &str, peer: &str) -> String {
    format!(
        "site = \"a\"\n[link]\nrate = \"1gbit\"\ntime_zone = \"Europe/Berlin\"\n{link}\n\
         [[peer]]\nname = \"b\"\nrate = \"400mbit\"\n{peer}\n"
    )
}

fn entry(table: &str, days: &str, hours: &str, rate: &str) -> String {
    format!("[[{table}.calendar]]\ndays = \"{days}\"\nhours = \"{hours}\"\nrate = \"{rate}\"\n")
}

#[test]
fn calendars_go_by_the_clocks_of_the_links_time_zone_and_the_first_entry_holds() {
    let link =
        entry("link", "mon-thu, sat", "08:00-18:00", "200mbit") + &entry("link", "daily", "00:00-24:00", "300mbit");
    let config = parse(&with_calendars(&link, &entry("peer", "mon", "22:00-06:00", "400mbit"))).unwrap();
    let rates = |time: &str| {
        let at = time.parse().unwrap();
        [config.link_rate_at(at), config.peers[0].calendar.rate_at(at)]
    };
    let megabit = |rate: u64| Some(ByteRate::from_bits_per_second(rate * 1_000_000));
    assert_eq!(rates("2026-07-06T05:59:59Z"), [megabit(300), None]);
    assert_eq!(rates("2026-07-06T06:00:00Z"), [megabit(200), None], "08:00 in summer");
    assert_eq!(rates("2026-11-23T06:30:00Z"), [megabit(300), None]);
    assert_eq!(rates("2026-11-23T07:00:00Z"), [megabit(200), None], "08:00 in winter");
    assert_eq!(
        rates("2026-11-24T04:59:59Z"),
        [megabit(300), megabit(400)],
        "still Monday's night"
    );
    assert!(config.has_calendar() && !Config::for_site("a").has_calendar());
}

#[test]
fn each_mistake_in_a_calendar_is_named() {
    let link = "[[link.calendar]]\ndays = \"mo-fr\"\nhours = \"8-18\"\nrate = \"200\"\nday = \"mon\"\n".to_owned()
        + "[[link.calendar]]\n"
        + &entry("link", "mon", "08:00-08:00", "2gbit");
    let problems = parse(&with_calendars(
        &link,
        &entry("peer", "sat-sun", "00:00-24:00", "401mbit"),
    ))
    .unwrap_err();
    let expected = [
        (Some(6), "link.calendar[1].days", "for example mon-fri"),
        (Some(7), "link.calendar[1].hours", "for example 08:00-18:00"),
        (Some(8), "link.calendar[1].rate", "write a rate with its unit"),
        (Some(9), "link.calendar[1].day", "known here: days, hours, rate"),
        (Some(10), "link.calendar[2].days", "is missing"),
        (Some(10), "link.calendar[2].hours", "is missing"),
        (Some(10), "link.calendar[2].rate", "is missing"),
        (Some(13), "link.calendar[3].hours", "a whole day is 00:00-24:00"),
        (Some(14), "link.calendar[3].rate", "2gbit is above link.rate, 1gbit"),
        (
            Some(22),
            "peer[1].calendar[1].rate",
            "401mbit is above the peer's rate, 400mbit",
        ),
    ];
    for (line, key, words) in expected {
        let found = problems
            .iter()
            .any(|problem| (problem.line, problem.key.as_str()) == (line, key) && problem.message.contains(words));
        assert!(found, "{line:?} {key} {words} is missing in {problems:#?}");
    }
    assert_eq!(problems.len(), expected.len(), "{problems:#?}");
}

#[test]
fn a_calendar_needs_a_rate_above_it_and_a_time_zone_that_exists() {
    let of = |text: String| parse(&format!("site = \"a\"\n{text}")).map_err(|mut problems| problems.remove(0));
    let night = |table| entry(table, "daily", "22:00-06:00", "1mbit");
    let peer = |rate: &str| format!("[[peer]]\nname = \"b\"\n{rate}{}", night("peer"));
    for (text, key, words) in [
        (night("link"), "link.calendar", "needs link.rate"),
        (peer(""), "peer[1].calendar", "needs link.rate"),
        (
            "[link]\ntime_zone = \"Berlin\"".to_owned(),
            "link.time_zone",
            "Europe/Berlin",
        ),
        (
            "[link]\ntime_zone = \"Etc/Unknown\"".to_owned(),
            "link.time_zone",
            "IANA name",
        ),
        (
            "[link]\ntime_zone = \"../../etc/passwd\"".to_owned(),
            "link.time_zone",
            "IANA name",
        ),
        (
            "[link]\nrate = \"1gbit\"\ncalendar = \"night\"".to_owned(),
            "link.calendar",
            "[[link.calendar]]",
        ),
        (
            format!("[link]\nrate = \"1gbit\"\n{}", night("link").repeat(65)),
            "link.calendar",
            "65 entries; there may be 64",
        ),
    ] {
        let problem = of(text).unwrap_err();
        assert_eq!(problem.key, key, "{problem}");
        assert!(problem.message.contains(words), "{problem}");
    }
    for text in [
        peer("rate = \"1mbit\"\n"),
        format!("[link]\nrate = \"1gbit\"\n{}", peer("")),
        format!("[link]\nrate = \"1gbit\"\n{}", night("link").repeat(64)),
        "[link]\ntime_zone = \"asia/kolkata\"".to_owned(),
    ] {
        assert!(of(text.clone()).is_ok(), "{text}");
    }
    // A rate that is there and wrong is the only mistake.
    let problems = parse(&format!("site = \"a\"\n[link]\nrate = \"fast\"\n{}", night("link"))).unwrap_err();
    assert_eq!(problems.len(), 1, "{problems:#?}");
}

#[test]
fn a_tunnel_begins_here_or_ends_here() {
    let config = parse(
        "site = \"x\"\n[[tunnel]]\nname = \"t\"\nlisten = \"127.0.0.1:7000\"\npeer = \"y\"\n\
         [[tunnel]]\nname = \"t\"\nconnect = \"/run/t.sock\"\nfrom = [\"y\", \"z\"]\n",
    )
    .unwrap();
    let [entrance] = &config.entrances[..] else {
        panic!("{config:?}");
    };
    assert_eq!(entrance.listen, Place::Tcp("127.0.0.1:7000".parse().unwrap()));
    assert_eq!((entrance.name.as_str(), entrance.peer.as_str()), ("t", "y"));
    let [exit] = &config.exits[..] else {
        panic!("{config:?}");
    };
    assert_eq!(exit.connect, Place::Unix("/run/t.sock".into()));
    assert_eq!(exit.from.as_deref(), Some(&["y".to_owned(), "z".to_owned()][..]));
}

#[test]
fn each_mistake_in_a_tunnel_is_named() {
    for (lines, key, message) in [
        ("name = \"t\"", "tunnel[1].name", "either `listen`"),
        (
            "name = \"t\"\nlisten = \"/l\"\npeer = \"y\"\nconnect = \"/c\"",
            "tunnel[1].connect",
            "either `listen`",
        ),
        ("name = \"t\"\nlisten = \"/l\"", "tunnel[1].listen", "needs `peer`"),
        (
            "name = \"t\"\nconnect = \"/c\"\npeer = \"y\"",
            "tunnel[1].peer",
            "`from`",
        ),
        (
            "name = \"t\"\nlisten = \"/l\"\npeer = \"y\"\nfrom = [\"y\"]",
            "tunnel[1].from",
            "`peer`",
        ),
        (
            "name = \"t\"\nconnect = \"/c\"\nfrom = [\"no name\"]",
            "tunnel[1].from",
            "no name",
        ),
        (
            "name = \"t\"\nconnect = \"/c\"\nfrom = []",
            "tunnel[1].from",
            "names no site",
        ),
        (
            "name = \"t\"\nconnect = \"localhost\"",
            "tunnel[1].connect",
            "127.0.0.1:16509",
        ),
        (
            "name = \"t\"\nconnect = \"127.0.0.1:0\"",
            "tunnel[1].connect",
            "127.0.0.1:16509",
        ),
        ("connect = \"/c\"", "tunnel[1].name", "missing"),
        (
            "name = \"t\"\nconnect = \"/c\"\n[[tunnel]]\nname = \"t\"\nconnect = \"/d\"",
            "tunnel[2].name",
            "there already",
        ),
        (
            "name = \"t\"\nlisten = \"/l\"\npeer = \"y\"\n[[tunnel]]\nname = \"u\"\nlisten = \"/l\"\npeer = \"y\"",
            "tunnel[2].listen",
            "the tunnel \"t\" listens",
        ),
    ] {
        let problems = parse(&format!("site = \"x\"\n[[tunnel]]\n{lines}\n")).unwrap_err();
        let named = |problem: &&Problem| problem.key == key && problem.message.contains(message);
        assert_eq!(problems.iter().filter(named).count(), 1, "{lines}: {problems:?}");
        assert_eq!(problems.len(), 1, "{lines}: {problems:?}");
    }
}

#[test]
fn a_key_that_is_there_twice_is_named() {
    let problems = parse("site = \"a\"\nlisten = \"0.0.0.0:4646\"\nsite = \"b\"\n").unwrap_err();
    assert_eq!(
        (problems[0].line, problems[0].key.as_str()),
        (Some(3), "site"),
        "{problems:?}"
    );
}

#[test]
fn who_asks_the_gateway_needs_no_more_of_the_file_than_its_state_dir() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("gateway.toml");
    for (text, expected) in [
        (
            "state_dir = \"/srv/a\"\nmemory_budget = \"none\"\nnonsense = 1\n",
            Some("/srv/a"),
        ),
        ("state_dir = \"/srv/a\"\nsite = \n[[vm]\n", Some("/srv/a")),
        ("site = \"a\"\n", None),
    ] {
        std::fs::write(&file, text).unwrap();
        assert_eq!(stated_state_dir(&file).unwrap(), expected.map(PathBuf::from), "{text}");
    }
    std::fs::write(&file, "state_dir = \"srv\"\n").unwrap();
    assert!(matches!(stated_state_dir(&file), Err(ConfigError::Invalid { .. })));
}

#[test]
fn several_mistakes_of_syntax_are_reported_together() {
    let problems = parse("site = \nlisten = \"0.0.0.0:1\nstate_dir == 1\n").unwrap_err();
    assert!(problems.len() >= 2, "{problems:?}");
    assert!(problems.iter().all(|problem| problem.line.is_some()), "{problems:?}");
}

#[test]
fn a_flag_goes_over_the_file_and_is_blamed_for_its_own_mistakes() {
    let text = "site = \"a\"\n[link]\nrate = \"1gbit\"\n";
    let mut overrides = Overrides::default();
    overrides.set("link.rate", Some("100mbit"));
    overrides.set("link.rtt", None);
    let config = Config::parse(text, &overrides).unwrap();
    assert_eq!(config.link.rate, Some(ByteRate::from_bits_per_second(100_000_000)));
    assert_eq!(config.link.rtt, Duration::from_millis(150));

    overrides.set("link.rtt", Some("fast"));
    let problems = Config::parse(text, &overrides).unwrap_err();
    assert_eq!(problems.len(), 1);
    assert_eq!(problems[0].key, "link.rtt");
    assert!(problems[0].message.contains("--link-rtt"), "{}", problems[0]);
}

#[test]
fn a_site_may_come_from_a_flag_alone() {
    let mut overrides = Overrides::default();
    overrides.set("site", Some("osaka"));
    assert_eq!(Config::parse("", &overrides), Ok(Config::for_site("osaka")));
}

#[test]
fn a_vm_overrides_what_becomes_of_its_source() {
    let text = "site = \"a\"\n[[vm]]\nname = \"x\"\nqmp = \"/x\"\nafter_success = \"leave\"\ndisks = \"shared\"\n\
                [[vm]]\nname = \"y\"\nqmp = \"/y\"\n";
    let config = parse(text).unwrap();
    let (x, y) = (config.vm("x").unwrap(), config.vm("y").unwrap());
    assert_eq!(
        (config.after_success(x), config.after_success(y)),
        (AfterSuccess::Leave, AfterSuccess::Quit)
    );
    assert_eq!((x.disks, y.disks), (Disks::Shared, Disks::None));
}

#[test]
fn images_of_disks_are_read_with_their_mistakes() {
    let vm = |disks: &str, images: &str| {
        parse(&format!(
            "site = \"a\"\n[[vm]]\nname = \"x\"\nqmp = \"/x\"\ndisks = \"{disks}\"\n{images}"
        ))
    };
    let image =
        |disk: &str, path: &str, more: &str| format!("[[vm.image]]\ndisk = \"{disk}\"\npath = \"{path}\"\n{more}\n");
    let two = image("vda", "/p/a", "base = \"/b\"\nbase-format = \"raw\"")
        + &image("vdb", "/p/b", "format = \"raw\"\npreallocation = \"falloc\"");
    let config = vm("copied", &two).unwrap();
    let images = &config.vm("x").unwrap().images;
    assert_eq!(
        (images[0].format, images[0].preallocation),
        (ImageFormat::Qcow2, Preallocation::Off)
    );
    let base = images[0].base.as_ref().unwrap();
    assert_eq!((base.path.to_str(), base.format), (Some("/b"), ImageFormat::Raw));
    assert_eq!(images[1].base, None);
    assert_eq!(
        (images[1].format, images[1].preallocation),
        (ImageFormat::Raw, Preallocation::Falloc)
    );
    for (disks, images, wanted) in [
        ("shared", two.as_str(), "disks = \"copied\" only"),
        ("copied", &image("vda", "a", ""), "absolute"),
        (
            "copied",
            &image("vda", "/a", "format = \"iso\""),
            "write one of raw, qcow2",
        ),
        (
            "copied",
            &image("vda", "/a", "format = \"vdi\"\npreallocation = \"full\""),
            "not there for vdi",
        ),
        (
            "copied",
            &image("vda", "/a", "base-format = \"raw\""),
            "of no use without base",
        ),
        ("copied", &image("vda", "/a", "base = \"/a\""), "is the image itself"),
        (
            "copied",
            &image("vda", "/a", "base = \"/b\"\npreallocation = \"full\""),
            "on top of a base",
        ),
        (
            "copied",
            &(image("vda", "/a", "") + &image("vda", "/b", "")),
            "\"vda\" is there twice",
        ),
        (
            "copied",
            &(image("vda", "/a", "") + &image("vdb", "/a", "")),
            "/a is there twice",
        ),
    ] {
        let problems = vm(disks, images).unwrap_err();
        let said = problems.iter().any(|problem| problem.to_string().contains(wanted));
        assert!(said, "{wanted}: {problems:?}");
    }
}

#[test]
fn an_image_of_one_vm_is_neither_that_of_another_nor_what_it_stands_on() {
    let vms = |of_y: &str| {
        let vm = |name: &str, image: &str| {
            format!(
                "[[vm]]\nname = \"{name}\"\nqmp = \"/{name}\"\ndisks = \"copied\"\n[[vm.image]]\ndisk = \"vda\"\n{image}\n"
            )
        };
        let x = vm("x", "path = \"/p/x\"\nbase = \"/p/base\"");
        parse(&format!("site = \"a\"\n{x}{}", vm("y", of_y)))
    };
    assert!(vms("path = \"/p/y\"\nbase = \"/p/base\"").is_ok(), "a base is for many");
    for (of_y, wanted) in [
        ("path = \"/p/x\"", "/p/x is an image of the VM \"x\" too"),
        ("path = \"/p/base\"", "/p/base is the base of an image"),
        ("path = \"/p/y\"\nbase = \"/p/x\"", "/p/x is the base of an image"),
    ] {
        let problems = vms(of_y).unwrap_err();
        let said = problems.iter().any(|problem| problem.to_string().contains(wanted));
        assert!(said, "{wanted}: {problems:?}");
    }
}

#[test]
fn a_command_is_filled_in_once_and_json_in_it_is_left_alone() {
    let text = "site = \"a\"\n[[vm]]\nname = \"x\"\nqmp = \"/run/x.qmp\"\n\
                command = [\"q\", \"-qmp\", \"unix:{qmp}\", \"-blockdev\", '{\"driver\":\"null-co\",\"id\":\"{vm}\"}', \"-incoming\", \"defer\", \"-S\"]\n";
    let config = parse(text).unwrap();
    let vm = config.vm("x").unwrap();
    let values = LaunchValues::new(&vm.name, &vm.qmp, Path::new("/run/m")).unwrap();
    let argv = vm.command.as_ref().unwrap().arguments(&values);
    assert_eq!(argv[2], "unix:/run/x.qmp");
    assert_eq!(argv[4], "{\"driver\":\"null-co\",\"id\":\"x\"}");
}

#[test]
fn a_name_or_socket_that_a_command_cannot_take_is_a_mistake() {
    let of = |name: &str, qmp: &str| {
        let words = "\"q\", \"{qmp}\", \"-incoming\", \"defer\", \"-S\"";
        parse(&format!(
            "site = \"a\"\n[[vm]]\nname = \"{name}\"\nqmp = \"{qmp}\"\ncommand = [{words}]\n"
        ))
    };
    assert!(of("x", "/run/x.qmp").is_ok());
    for (name, qmp) in [("x", "/run/x,server=off"), ("x", "/run/x y")] {
        let problems = of(name, qmp).unwrap_err();
        assert_eq!(problems[0].key, "vm[1].command", "{problems:?}");
    }
    // Without a command no argument holds them.
    assert!(parse("site = \"a\"\n[[vm]]\nname = \"x\"\nqmp = \"/run/x y\"\n").is_ok());
}

#[test]
fn a_file_that_is_missing_or_too_large_is_refused_by_name() {
    let directory = tempfile::tempdir().unwrap();
    let missing = directory.path().join("none.toml");
    let error = Config::load(&missing, &Overrides::default()).unwrap_err();
    assert!(matches!(error, ConfigError::Unreadable { .. }));
    assert!(error.to_string().contains("none.toml"));

    let large = directory.path().join("large.toml");
    std::fs::File::create(&large).unwrap().set_len((4 << 20) + 1).unwrap();
    assert!(matches!(
        Config::load(&large, &Overrides::default()),
        Err(ConfigError::Invalid { .. })
    ));
}
