//! Real QEMU processes and a gateway that is nothing but two sockets.

#[path = "../common/qemu_under_test.rs"]
pub(crate) mod qemu_under_test;

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use longhaul::hypervisor::process::{Process, ProcessIdentity};
use longhaul::hypervisor::qemu::{
    DestinationError, DestinationVm, Launch, LaunchTemplate, LaunchValues, Loaded, PermitConditions, SourceVm,
};
use longhaul::hypervisor::qmp::{QemuVersion, QmpClient};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};

/// Time for anything that happens soon on an idle machine; CI machines are not idle.
pub(crate) const SOON: Duration = Duration::from_secs(60);

/// Downtime limit of migrations.
pub(crate) const LIMIT: Duration = Duration::from_millis(300);

/// The QEMU for destinations: `LONGHAUL_TEST_QEMU_DESTINATION`, or the same.
pub(crate) fn destination_qemu(source: &Path) -> PathBuf {
    std::env::var_os("LONGHAUL_TEST_QEMU_DESTINATION").map_or_else(|| source.to_owned(), PathBuf::from)
}

/// Ends the test early where there is no QEMU.
macro_rules! qemu_or_return {
    () => {
        match harness::qemu_under_test::qemu() {
            Some(qemu) => qemu,
            None => return,
        }
    };
}
pub(crate) use qemu_or_return;

/// A folder with the sockets of one test.
pub(crate) struct Site {
    folder: TempDir,
    pub(crate) qemu: PathBuf,
}

/// A QEMU that the test started itself; ended with the test.
pub(crate) struct Guest {
    child: Child,
    pub(crate) qmp: PathBuf,
    /// A monitor for third parties.
    pub(crate) other: PathBuf,
}

impl Site {
    pub(crate) fn new(qemu: &Path) -> Site {
        Site {
            folder: tempfile::Builder::new().prefix("longhaul-qemu-").tempdir().unwrap(),
            qemu: qemu.to_owned(),
        }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Starts a QEMU with two monitors, `name` and `name-other`.
    pub(crate) async fn start(&self, qemu: &Path, name: &str, arguments: &[&str]) -> Guest {
        let (qmp, other) = (self.path(name), self.path(&format!("{name}-other")));
        let child = Command::new(qemu)
            .args(MACHINE)
            .args(arguments)
            .args(["-qmp", &format!("unix:{},server=on,wait=off", qmp.display())])
            .args(["-qmp", &format!("unix:{},server=on,wait=off", other.display())])
            .stdin(Stdio::null())
            .stderr(std::fs::File::create(self.path(&format!("{name}.log"))).unwrap())
            .spawn()
            .unwrap();
        let mut guest = Guest { child, qmp, other };
        until("the monitors listen", || {
            assert!(guest.child.try_wait().unwrap().is_none(), "{}", self.log(name));
            // QEMU creates them in this order.
            listens(&guest.other)
        })
        .await;
        guest
    }

    pub(crate) fn log(&self, name: &str) -> String {
        std::fs::read_to_string(self.path(&format!("{name}.log"))).unwrap_or_default()
    }

    pub(crate) async fn source(&self, arguments: &[&str]) -> (Guest, SourceVm) {
        let guest = self.start(&self.qemu, "source", arguments).await;
        let source = SourceVm::connect(&guest.qmp, SOON).await.unwrap();
        (guest, source)
    }

    /// A destination that the code under test launches; ended with the guard.
    pub(crate) async fn destination(&self, arguments: &[&str]) -> (KillOnDrop, DestinationVm) {
        let destination = DestinationVm::launch(&self.launch(arguments)).await.unwrap();
        (KillOnDrop(destination.identity().clone()), destination)
    }

    pub(crate) fn launch(&self, arguments: &[&str]) -> Launch {
        let program = destination_qemu(&self.qemu);
        let command = std::iter::once(program.to_str().unwrap())
            .chain(MACHINE)
            .chain(arguments.iter().copied())
            .chain(["-S", "-incoming", "defer", "-qmp", "unix:{qmp},server=on,wait=off"])
            .map(str::to_owned);
        self.launch_command(command.collect())
    }

    /// A command of which a template demands that it waits for a migration; a shell takes what is added for its parameters.
    pub(crate) fn launch_command(&self, mut command: Vec<String>) -> Launch {
        if !command.iter().any(|argument| argument == "-incoming") {
            command.extend(["-S", "-incoming", "defer"].map(str::to_owned));
        }
        Launch {
            template: LaunchTemplate::parse(command).unwrap(),
            values: LaunchValues::new("vm", &self.path("destination"), &self.path("stream")).unwrap(),
            log: self.path("destination.log"),
            ready_within: SOON,
        }
    }

    /// Lets `source` migrate and takes in the whole stream, up to its EOF.
    pub(crate) async fn take_stream(&self, source: &SourceVm) -> Vec<u8> {
        let mut stream = self.begin(source).await;
        let mut bytes = Vec::new();
        let whole = tokio::time::timeout(SOON, stream.read_to_end(&mut bytes)).await;
        whole.expect("the source never ended its stream").unwrap();
        let conditions = source.wait_for_permit_conditions(SOON).await.unwrap();
        assert_eq!(conditions, PermitConditions::Met);
        bytes
    }

    /// Lets `source` migrate and gives the connection it makes.
    pub(crate) async fn begin(&self, source: &SourceVm) -> UnixStream {
        let path = self.path("outgoing");
        let _ = std::fs::remove_file(&path);
        let listener = UnixListener::bind(&path).unwrap();
        source.migrate(&path).await.unwrap();
        listener.accept().await.unwrap().0
    }

    /// Connects to a prepared destination.
    pub(crate) async fn feed(&self, bytes: &[u8]) -> UnixStream {
        let mut stream = UnixStream::connect(self.path("stream")).await.unwrap();
        stream.write_all(bytes).await.unwrap();
        stream
    }
}

/// A loaded guest with a disk that both sides reach, at its destination.
pub(crate) struct Handed {
    pub(crate) disk: String,
    pub(crate) source: (Guest, SourceVm),
    pub(crate) destination: DestinationVm,
    pub(crate) loaded: Loaded,
    _guard: KillOnDrop,
    _stream: UnixStream,
}

impl Handed {
    pub(crate) async fn over(site: &Site) -> Handed {
        let disk = site.path("shared.img");
        std::fs::File::create(&disk).unwrap().set_len(1 << 20).unwrap();
        let words = disk_words(&disk);
        let words = words.each_ref().map(String::as_str);
        let (guest, mut source) = site.source(&words).await;
        let (guard, mut destination) = site.destination(&words).await;
        destination.prepare(&site.path("stream")).await.unwrap();
        source.prepare(LIMIT).await.unwrap();
        let stream = site.feed(&site.take_stream(&source).await).await;
        let loaded = destination.wait_loaded(SOON).await.unwrap();
        Handed {
            disk: disk.display().to_string(),
            source: (guest, source),
            destination,
            loaded,
            _guard: guard,
            _stream: stream,
        }
    }

    /// What is said when it cannot be started.
    pub(crate) async fn refusal(&self) -> String {
        let refused = self.destination.cont(&self.loaded, SOON).await.unwrap_err();
        assert!(matches!(refused, DestinationError::ContRefused(_)), "{refused}");
        refused.to_string()
    }
}

/// What a machine is given to have it.
pub(crate) fn disk_words(disk: &Path) -> [String; 4] {
    let drive = format!("if=none,id=data,format=raw,file={}", disk.display());
    ["-drive", &drive, "-device", "virtio-blk-pci,drive=data"].map(str::to_owned)
}

impl Guest {
    /// A third party's monitor.
    pub(crate) async fn third_party(&self) -> QmpClient {
        QmpClient::connect(&self.other, SOON).await.unwrap()
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Ends a process that is not our child when the test is over.
pub(crate) struct KillOnDrop(pub(crate) ProcessIdentity);

impl Drop for KillOnDrop {
    fn drop(&mut self) {
        if let Ok(Some(process)) = Process::reattach(&self.0) {
            let pid = rustix::process::Pid::from_raw(process.pid().try_into().unwrap()).unwrap();
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
        }
    }
}

/// Whether a process listens at `socket`: its path is there a moment before.
fn listens(socket: &Path) -> bool {
    const ACCEPTS: &str = "00010000";
    let sockets = std::fs::read_to_string("/proc/net/unix").unwrap();
    sockets.lines().any(|line| {
        let mut fields = line.split_whitespace().skip(3);
        fields.next() == Some(ACCEPTS) && fields.last().map(Path::new) == Some(socket)
    })
}

/// Waits for a condition, with a deadline.
pub(crate) async fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let wait = async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(SOON, wait)
        .await
        .unwrap_or_else(|_| panic!("not in time: {what}"));
}

/// Whether this QEMU has `avail-switchover-bandwidth`.
pub(crate) fn has_switchover_bandwidth(version: QemuVersion) -> bool {
    (version.major, version.minor) >= (8, 2)
}

/// A machine that exists in every QEMU from 7.2 to 10.0, without files of its own.
pub(crate) const MACHINE: [&str; 14] = [
    "-M",
    "pc-i440fx-7.2",
    "-accel",
    "tcg",
    "-m",
    "64",
    "-nodefaults",
    "-display",
    "none",
    "-serial",
    "null",
    "-nic",
    "none",
    "-no-user-config",
];
