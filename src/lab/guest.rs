//! The lab's guest: its image, its dials, and the QEMU command line that runs it.
//!
//! The image is built by `netem-scripts/guest`; what the guest does and says is told in `netem-scripts/guest-src/main.rs`,
//! and read by [`Heartbeat`](super::heartbeat::Heartbeat).

use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// A kernel and an initramfs that boot into the lab's guest.
#[derive(Clone, Debug)]
pub struct Image {
    /// The kernel, as `-kernel` takes it.
    pub kernel: PathBuf,
    /// The initramfs, as `-initrd` takes it.
    pub initramfs: PathBuf,
}

impl Image {
    /// The image that was built in `directory`.
    ///
    /// # Errors
    /// [`ImageError::Missing`] names the file that is not there.
    pub fn open(directory: &Path) -> Result<Self, ImageError> {
        let image = Self {
            kernel: directory.join("vmlinuz"),
            initramfs: directory.join("initramfs"),
        };
        for file in [&image.kernel, &image.initramfs] {
            if !file.is_file() {
                return Err(ImageError::Missing { file: file.clone() });
            }
        }
        Ok(image)
    }

    /// Runs `script` (`netem-scripts/guest`) for `directory` and opens what it made. Takes milliseconds where the image is
    /// up to date, else as long as the download of a kernel. Blocks.
    ///
    /// # Errors
    /// [`ImageError::Script`] with what the script said, [`ImageError::Missing`] where it made nothing.
    pub fn build(script: &Path, directory: &Path) -> Result<Self, ImageError> {
        Self::make(script, directory, &[])
    }

    /// As [`Image::build`], with what `application` needs in a root file system in memory. The first time it downloads the
    /// application's packages.
    ///
    /// # Errors
    /// As [`Image::build`].
    pub fn build_with(script: &Path, directory: &Path, application: Workload) -> Result<Self, ImageError> {
        match application {
            Workload::None => Self::build(script, directory),
            _ => Self::make(script, directory, &["--application", application.name()]),
        }
    }

    fn make(script: &Path, directory: &Path, options: &[&str]) -> Result<Self, ImageError> {
        let unstarted = |source| ImageError::Unstarted {
            script: script.to_owned(),
            source,
        };
        let output = Command::new(script)
            .args(options)
            .arg("--directory")
            .arg(directory)
            .stdin(Stdio::null())
            .output()
            .map_err(unstarted)?;
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr).trim_end().to_owned();
            return Err(ImageError::Script {
                script: script.to_owned(),
                said,
            });
        }
        Self::open(directory)
    }
}

/// What runs under load in the guest beside its working set. All but `None` need an image that has it ([`Image::build_with`]).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, clap::ValueEnum, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Workload {
    /// Nothing.
    #[default]
    None,
    /// Redis; an operation is a GET or a SET of 1 KiB.
    Redis,
    /// nginx; an operation is a GET of a file of 4 to 64 KiB.
    Nginx,
    /// PostgreSQL; an operation is a transaction of pgbench.
    Postgres,
    /// GCC; an operation is the compilation of a small file.
    Compile,
}

impl Workload {
    /// All that need an image of their own.
    pub const APPLICATIONS: [Self; 4] = [Self::Redis, Self::Nginx, Self::Postgres, Self::Compile];

    /// Its name, as the guest takes it and as a report says it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Redis => "redis",
            Self::Nginx => "nginx",
            Self::Postgres => "postgres",
            Self::Compile => "compile",
        }
    }
}

/// What the guest is and does. The default is the guest of the published figures.
#[derive(Clone, Debug, PartialEq, Eq, clap::Args, serde::Serialize, serde::Deserialize)]
#[serde(default, deny_unknown_fields)]
#[command(next_help_heading = "Guest")]
pub struct GuestDials {
    /// RAM of the VM, in MiB; the kernel needs about 80 of them beside the working set.
    #[arg(long, default_value_t = 512)]
    pub memory_mb: u64,
    /// Memory that is filled, rewritten and checked, in MiB.
    #[arg(long, default_value_t = 200)]
    pub working_set_mb: u64,
    /// Pages rewritten a second.
    #[arg(long, default_value_t = 2_000)]
    pub pages_per_second: u64,
    /// Bytes that change in a rewritten page; at least 16, its version and checksum.
    #[arg(long, default_value_t = 64)]
    pub bytes_per_page: u64,
    /// Share of the pages that hold random bytes, in percent; what no share claims holds text.
    #[arg(long, default_value_t = 25)]
    pub incompressible_percent: u64,
    /// Share of the pages that hold zeroes, in percent; they are never rewritten.
    #[arg(long, default_value_t = 0)]
    pub zero_percent: u64,
    /// Share of the pages that hold the same text as seven others, in percent; they are never rewritten.
    #[arg(long, default_value_t = 0)]
    pub duplicated_percent: u64,
    /// Share of the pages that are hot, in percent, of those that are rewritten.
    #[arg(long, default_value_t = 10)]
    pub hot_pages_percent: u64,
    /// Share of the writes that go to the hot pages, in percent; 0 spreads all writes evenly.
    #[arg(long, default_value_t = 0)]
    pub hot_writes_percent: u64,
    /// Pages verified a second, beside those that are verified on demand.
    #[arg(long, default_value_t = 1_000)]
    pub checks_per_second: u64,
    /// Microseconds between two signs of life: the resolution of a downtime measured from outside.
    #[arg(long, default_value_t = 5_000)]
    pub beat_us: u64,
    /// The same seed gives the same pages.
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// The guest's address in its /24; without one it has no network.
    #[arg(long, value_name = "IPV4")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub address: Option<Ipv4Addr>,
    /// What runs under load beside the working set.
    #[arg(long, value_enum, default_value_t)]
    pub application: Workload,
}

impl Default for GuestDials {
    fn default() -> Self {
        Self {
            memory_mb: 512,
            working_set_mb: 200,
            pages_per_second: 2_000,
            bytes_per_page: 64,
            incompressible_percent: 25,
            zero_percent: 0,
            duplicated_percent: 0,
            hot_pages_percent: 10,
            hot_writes_percent: 0,
            checks_per_second: 1_000,
            beat_us: 5_000,
            seed: 1,
            address: None,
            application: Workload::None,
        }
    }
}

impl GuestDials {
    /// A guest that boots fast and moves in a moment, for tests: 128 MiB with a working set of 16 MiB.
    #[must_use]
    pub fn small() -> Self {
        Self {
            memory_mb: 128,
            working_set_mb: 16,
            pages_per_second: 200,
            ..Self::default()
        }
    }

    /// A guest with room for `application` and a small working set that proves the memory: 1 GiB. The proof goes before the application,
    /// which runs at a lower priority, so it is kept cheap.
    #[must_use]
    pub fn with_application(application: Workload) -> Self {
        Self {
            memory_mb: 1024,
            working_set_mb: 16,
            pages_per_second: 100,
            checks_per_second: 100,
            application,
            ..Self::default()
        }
    }

    /// Finds what a guest cannot do.
    ///
    /// # Errors
    /// [`DialsError`] says which dials do not fit together. The guest would refuse them when it boots.
    pub fn check(&self) -> Result<(), DialsError> {
        let shares = [self.incompressible_percent, self.zero_percent, self.duplicated_percent];
        let sum = shares.iter().fold(0_u64, |sum, share| sum.saturating_add(*share));
        if sum > 100 {
            return Err(DialsError::Shares { sum });
        }
        if self.working_set_mb >= self.memory_mb {
            return Err(DialsError::Room {
                working_set_mb: self.working_set_mb,
                memory_mb: self.memory_mb,
            });
        }
        Ok(())
    }

    /// Pages of the working set, of 4 KiB.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.working_set_mb * 256
    }

    /// The kernel command line. The console is serial; a guest whose program ends resets the VM.
    #[must_use]
    pub fn kernel_command_line(&self) -> String {
        let dials = [
            ("working_set_mb", self.working_set_mb),
            ("pages_per_second", self.pages_per_second),
            ("bytes_per_page", self.bytes_per_page),
            ("incompressible_percent", self.incompressible_percent),
            ("zero_percent", self.zero_percent),
            ("duplicated_percent", self.duplicated_percent),
            ("hot_pages_percent", self.hot_pages_percent),
            ("hot_writes_percent", self.hot_writes_percent),
            ("checks_per_second", self.checks_per_second),
            ("beat_us", self.beat_us),
            ("seed", self.seed),
        ];
        // HPET counts QEMU's virtual time; a TSC that the kernel calibrated on a busy host is off by whatever it was delayed.
        let mut line = "console=ttyS0 quiet panic=-1 clocksource=hpet".to_owned();
        for (name, value) in dials {
            line.push_str(&format!(" longhaul.{name}={value}"));
        }
        let address = self.address.map_or("none".to_owned(), |address| address.to_string());
        let application = self.application.name();
        line.push_str(&format!(
            " longhaul.address={address} longhaul.application={application}"
        ));
        line
    }
}

/// Where one QEMU's sockets and files are. Paths of sockets have at most 107 bytes.
#[derive(Clone, Debug)]
pub struct GuestFiles {
    /// QMP socket, served by QEMU. A template may say `{qmp}`.
    pub qmp: PathBuf,
    /// Socket of the guest's virtio port, served by QEMU.
    pub heartbeat: PathBuf,
    /// What the guest's kernel and program say.
    pub console: PathBuf,
    /// The tap device of the guest's network, in the namespace where QEMU runs; it must exist before QEMU starts
    /// ([`Network`](super::network::Network)). `None`: the guest has no network.
    pub tap: Option<String>,
    /// The guest's disk; `None`: it has none.
    pub disk: Option<GuestDisk>,
}

/// The disk of the guest, as one site has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuestDisk {
    /// Its image.
    pub image: PathBuf,
    /// What the image is.
    pub format: &'static str,
    /// Both sites have the same image; otherwise it goes with the guest.
    pub is_shared: bool,
    /// A raw image that the site has, and where the disk begins that arrives there.
    pub base: Option<PathBuf>,
}

impl GuestDisk {
    /// The id of its device.
    pub const ID: &'static str = "vda";
}

impl GuestFiles {
    /// `NAME.qmp`, `NAME.beat` and `NAME.console` in `directory`; no network and no disk.
    #[must_use]
    pub fn named(directory: &Path, name: &str) -> Self {
        let file = |kind: &str| directory.join(format!("{name}.{kind}"));
        Self {
            qmp: file("qmp"),
            heartbeat: file("beat"),
            console: file("console"),
            tap: None,
            disk: None,
        }
    }

    /// The same with a network on `tap`.
    #[must_use]
    pub fn on_tap(self, tap: &str) -> Self {
        Self {
            tap: Some(tap.to_owned()),
            ..self
        }
    }
}

/// How the vCPU runs. Both ends of a migration use the same.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Accelerator {
    /// QEMU's own translator: works everywhere, and alike.
    #[default]
    Tcg,
    /// The host's virtualisation.
    Kvm,
}

/// Whether a QEMU boots the guest or receives it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// Boots and runs.
    Boot,
    /// Waits until `migrate-incoming` says where the guest comes from, and lets it run once it is there.
    Receive,
    /// As `Receive`, but leaves the guest paused: what a gateway needs.
    ReceivePaused,
}

/// Everything that makes one QEMU's command line.
#[derive(Clone, Debug)]
pub struct Launch {
    /// The program: `qemu-system-x86_64` or a path.
    pub qemu: String,
    /// Machine type: `pc`, `q35`, or one with a version where two QEMU versions meet.
    pub machine: String,
    /// How the vCPU runs.
    pub accelerator: Accelerator,
    /// What boots.
    pub image: Image,
    /// What the guest does.
    pub dials: GuestDials,
    /// This program, where the guest is one of its own (`longhaul guest`) and not of QEMU.
    pub native: Option<String>,
}

impl Launch {
    /// The guest under the system's QEMU, machine type `pc`, TCG.
    #[must_use]
    pub fn new(image: Image, dials: GuestDials) -> Self {
        let accelerator = Accelerator::default();
        Self {
            qemu: "qemu-system-x86_64".to_owned(),
            machine: "pc".to_owned(),
            accelerator,
            image,
            dials,
            native: None,
        }
    }

    /// RAM in KiB: what the dial says, and under TCG 8 KiB more.
    ///
    /// Before 9.0, QEMU's fast way of collecting dirty pages, which it takes for a RAM of whole 256 KiB, forgets to make TCG
    /// notice the next write to them. Writes during a migration are then lost: of 8 moves of the default guest by plain QEMU
    /// 7.2.22, 4 arrived damaged (a kernel that crashed, a broken virtqueue, an older page), and none of 8 with this RAM.
    fn memory_kb(&self) -> u64 {
        let odd = match self.accelerator {
            Accelerator::Tcg => 8,
            Accelerator::Kvm => 0,
        };
        self.dials.memory_mb.saturating_mul(1024).saturating_add(odd)
    }

    /// The argument vector, the program first. Both ends of a migration need the same but for `files` and `start`.
    #[must_use]
    pub fn command(&self, files: &GuestFiles, start: Start) -> Vec<String> {
        if let Some(longhaul) = &self.native {
            return self.native_command(longhaul, files, start);
        }
        let accelerator = match self.accelerator {
            Accelerator::Tcg => "tcg",
            Accelerator::Kvm => "kvm",
        };
        let text = |path: &Path| path.display().to_string();
        let mut command: Vec<String> = [
            self.qemu.as_str(),
            "-nodefaults",
            "-no-user-config",
            "-no-reboot",
            "-display",
            "none",
            "-accel",
            accelerator,
            "-machine",
            &self.machine,
            "-smp",
            "1",
            "-m",
            &format!("{}k", self.memory_kb()),
            "-kernel",
            &text(&self.image.kernel),
            "-initrd",
            &text(&self.image.initramfs),
            "-append",
            &self.dials.kernel_command_line(),
            "-qmp",
            &format!("unix:{},server=on,wait=off", files.qmp.display()),
            "-serial",
            &format!("file:{}", files.console.display()),
            "-chardev",
            &format!("socket,id=beat,path={},server=on,wait=off", files.heartbeat.display()),
            "-device",
            "virtio-serial-pci,max_ports=2",
            "-device",
            "virtserialport,nr=1,chardev=beat,name=longhaul.beat",
        ]
        .map(str::to_owned)
        .into();
        if let Some(tap) = &files.tap {
            // No boot ROM: nobody boots from it, and a migration would carry its 256 KiB.
            let device = format!("virtio-net-pci,netdev=lan,mac={MAC},romfile=");
            let network = format!("tap,id=lan,ifname={tap},script=no,downscript=no,vhost=off");
            command.extend(["-netdev".to_owned(), network, "-device".to_owned(), device]);
        }
        if let Some(disk) = &files.disk {
            let node = serde_json::json!({
                "driver": disk.format,
                "node-name": "disk",
                "discard": "unmap",
                "file": { "driver": "file", "filename": disk.image, "discard": "unmap" },
            });
            let device = format!("virtio-blk-pci,id={},drive=disk", GuestDisk::ID);
            command.extend(["-blockdev".to_owned(), node.to_string(), "-device".to_owned(), device]);
        }
        match start {
            Start::Boot => {}
            Start::Receive => command.extend(["-incoming", "defer"].map(str::to_owned)),
            Start::ReceivePaused => command.extend(["-incoming", "defer", "-S"].map(str::to_owned)),
        }
        command
    }
}

impl Launch {
    fn native_command(&self, longhaul: &str, files: &GuestFiles, start: Start) -> Vec<String> {
        let text = |path: &Path| path.display().to_string();
        let dials = &self.dials;
        let mut command: Vec<String> = [
            longhaul,
            "guest",
            "--qmp",
            &text(&files.qmp),
            "--heartbeat",
            &text(&files.heartbeat),
            "--serial",
            &text(&files.console),
            "--memory",
            &format!("{}mib", dials.memory_mb),
            "--vcpus",
            NATIVE_VCPUS,
            "--working-set",
            &format!("{}mib", dials.working_set_mb),
            "--pages-per-second",
            &dials.pages_per_second.to_string(),
            "--bytes-per-page",
            &dials.bytes_per_page.to_string(),
            "--skew",
            &dials.hot_writes_percent.to_string(),
            "--random-percent",
            &dials.incompressible_percent.to_string(),
            "--beat",
            &format!("{}us", dials.beat_us),
            "--seed",
            &dials.seed.to_string(),
        ]
        .map(str::to_owned)
        .into();
        match start {
            Start::Boot => {}
            Start::Receive => command.extend(["--incoming", "defer"].map(str::to_owned)),
            Start::ReceivePaused => command.extend(["--incoming", "defer", "-S"].map(str::to_owned)),
        }
        command
    }
}

/// One alone does not write 64 bytes into more than some 6 700 pages a second on a host that emulates its code (2026-11-29).
const NATIVE_VCPUS: &str = "2";

/// The guest's hardware address, at every site: locally administered.
const MAC: &str = "52:4c:48:00:00:02";

/// Dials that do not fit together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DialsError {
    /// More than every page has a content.
    #[error("incompressible, zero and duplicated pages are {sum} percent together, which is more than 100")]
    Shares {
        /// Their sum.
        sum: u64,
    },
    /// The kernel needs memory too.
    #[error("a working set of {working_set_mb} MiB has no room in a memory of {memory_mb} MiB")]
    Room {
        /// The working set.
        working_set_mb: u64,
        /// RAM of the VM.
        memory_mb: u64,
    },
}

/// The guest's image is not to be had.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// A part of the image does not exist.
    #[error("the guest's image has no {}; build it with netem-scripts/guest", file.display())]
    Missing {
        /// The part.
        file: PathBuf,
    },
    /// The script could not be started.
    #[error("cannot run {}: {source}", script.display())]
    Unstarted {
        /// The script.
        script: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The script ended with an error.
    #[error("{} could not build the guest's image: {said}", script.display())]
    Script {
        /// The script.
        script: PathBuf,
        /// What it said.
        said: String,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_dial_reaches_the_program_of_the_guest() {
        // The program refuses a dial it does not know; this finds the one that it knows and is never told.
        let program = include_str!("../../netem-scripts/guest-src/main.rs");
        let line = GuestDials::default().kernel_command_line();
        let known: Vec<&str> = program
            .lines()
            .filter_map(|line| line.trim().strip_prefix("/// `longhaul.")?.split_once('`'))
            .map(|(name, _)| name)
            .collect();
        assert!(!known.is_empty());
        for name in &known {
            assert!(line.contains(&format!(" longhaul.{name}=")), "{name} is not in {line}");
        }
        assert_eq!(line.matches("longhaul.").count(), known.len(), "{line}");
    }

    #[test]
    fn the_flags_have_the_defaults_of_the_program() {
        #[derive(clap::Parser)]
        struct Flags {
            #[command(flatten)]
            dials: GuestDials,
        }
        let parsed = <Flags as clap::Parser>::try_parse_from(["flags"]).unwrap();
        assert_eq!(parsed.dials, GuestDials::default());
    }

    #[test]
    fn the_name_of_an_application_is_what_a_plan_and_a_flag_call_it() {
        for workload in [Workload::None].into_iter().chain(Workload::APPLICATIONS) {
            let flag = clap::ValueEnum::to_possible_value(&workload).unwrap();
            assert_eq!(flag.get_name(), workload.name());
            assert_eq!(serde_json::to_value(workload).unwrap(), workload.name());
        }
    }

    #[test]
    fn shares_of_everything_fit_and_shares_of_more_do_not() {
        let mut dials = GuestDials {
            zero_percent: 50,
            duplicated_percent: 25,
            ..GuestDials::default()
        };
        assert_eq!(dials.check(), Ok(()));
        dials.zero_percent += 1;
        assert_eq!(dials.check(), Err(DialsError::Shares { sum: 101 }));
    }

    #[test]
    fn a_guest_has_a_network_where_it_has_a_tap() {
        let image = Image {
            kernel: "/k".into(),
            initramfs: "/i".into(),
        };
        let launch = Launch::new(image, GuestDials::small());
        let files = GuestFiles::named(Path::new("/t"), "a");
        let without = launch.command(&files, Start::Boot);
        let with = launch.command(&files.on_tap("tap-a"), Start::Boot);
        assert_eq!(with[..without.len()], without);
        assert!(with[without.len() + 1].contains("ifname=tap-a,"), "{with:?}");
    }

    #[test]
    fn a_disk_is_the_last_of_the_guests_devices() {
        let image = Image {
            kernel: "/k".into(),
            initramfs: "/i".into(),
        };
        let launch = Launch::new(image, GuestDials::small());
        let mut files = GuestFiles::named(Path::new("/t"), "a").on_tap("tap-a");
        let without = launch.command(&files, Start::Boot);
        files.disk = Some(GuestDisk {
            image: "/t/a,b.raw".into(),
            format: "raw",
            is_shared: false,
            base: None,
        });
        let with = launch.command(&files, Start::Boot);
        assert_eq!(with[..without.len()], without);
        assert!(with[without.len() + 1].contains(r#""/t/a,b.raw""#), "{with:?}");
        assert_eq!(with.last().unwrap(), "virtio-blk-pci,id=vda,drive=disk");
    }

    #[test]
    fn both_ends_of_a_migration_differ_only_in_their_files_and_in_what_comes_in() {
        let image = Image {
            kernel: "/k".into(),
            initramfs: "/i".into(),
        };
        let launch = Launch::new(image, GuestDials::small());
        let source = launch.command(&GuestFiles::named(Path::new("/t"), "a"), Start::Boot);
        let destination = launch.command(&GuestFiles::named(Path::new("/t"), "a"), Start::ReceivePaused);
        assert_eq!(destination[..source.len()], source);
        assert_eq!(destination[source.len()..], ["-incoming", "defer", "-S"]);
    }
}
