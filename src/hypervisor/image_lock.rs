//! Who holds the lock of an image that a QEMU was refused.
//!
//! QEMU keeps others off an image with `fcntl` locks on single bytes of its file (`block/file-posix.c`): byte 100 + n is locked by
//! whoever uses permission n, byte 200 + n by whoever does not share it. A refusal names the permission, and not always the image: `cont`
//! never does. What it never names is the holder, and the locks belong to open files, not to processes, so `/proc/locks` has no pid for
//! them. `/proc/PID/fdinfo` shows each at the descriptor that has it.
//!
//! This is asked while the guest stands, so it is bounded, and no file system is waited for but that of the asking QEMU's own files.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{AtFlags, CWD, FileType, OFlags, Statx, StatxFlags, statx};

use super::file_lock::{Of, is_held};
use super::process::Process;

/// Looks for whoever holds the lock of which `text` speaks, and gives a sentence that says it and what to do. `None`: it speaks of no lock,
/// or of an image that cannot be told. `asker`: the QEMU that was refused, where it lives; else the image that `text` names is looked for.
pub(super) async fn explain(text: &str, asker: Option<&Process>) -> Option<String> {
    let lock = Wanted::parse(text)?;
    let asker = asker.map(Process::pid);
    let found = tokio::task::spawn_blocking(move || Found::look(&lock, asker));
    match tokio::time::timeout(LONGEST_LOOK, found).await {
        Ok(found) => found.ok()?.sentence(),
        Err(_) => {
            tracing::warn!("who holds the lock of an image was not found out within {LONGEST_LOOK:?}");
            None
        }
    }
}

/// Who writes to an image, in a sentence that says what to do; `None`: it cannot be told.
pub(crate) async fn who_writes(image: &Path) -> Option<String> {
    let image = image.to_str()?;
    let text = format!("Failed to get shared \"write\" lock\nIs another process using the image [{image}]?");
    explain(&text, None).await
}

/// What a QEMU wanted and did not get.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Wanted {
    byte: u64,
    /// It is not another QEMU that stands in the way, but somebody who has written a lock over QEMU's bytes.
    only_exclusive: bool,
    image: Option<PathBuf>,
}

impl Wanted {
    /// `Failed to get "write" lock`: others do not share it. `Failed to get shared "write" lock`: others use it. `Failed to lock byte 100`:
    /// something else than a QEMU.
    fn parse(text: &str) -> Option<Wanted> {
        let after = |mark: &str| text.split_once(mark).map(|(_, rest)| rest);
        let permission = |rest: &str| {
            let name = rest.split_once("\" lock")?.0;
            PERMISSIONS.iter().position(|known| *known == name)
        };
        let (byte, only_exclusive) = if let Some(rest) = after("Failed to get shared \"") {
            (USED + permission(rest)? as u64, false)
        } else if let Some(rest) = after("Failed to get \"") {
            (NOT_SHARED + permission(rest)? as u64, false)
        } else {
            let rest = after("Failed to lock byte ")?;
            let digits = rest.split(|character: char| !character.is_ascii_digit()).next()?;
            (digits.parse().ok()?, true)
        };
        let image = after("Is another process using the image [").and_then(|rest| {
            // What follows on the same line is not QEMU's; a name may itself have brackets.
            let line = rest.split('\n').next()?;
            let (name, _) = line.split_once("]? | ").or_else(|| line.rsplit_once(']'))?;
            Some(PathBuf::from(name))
        });
        Some(Wanted {
            byte,
            only_exclusive,
            image,
        })
    }
}

/// A lock that an open file has, as `fdinfo` shows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Held {
    exclusive: bool,
    first: u64,
    last: u64,
}

impl Held {
    /// `lock:  1: OFDLCK ADVISORY  READ -1 fe:00:10010726 100 101`. Others than these two kinds do not meet QEMU's.
    fn parse(line: &str) -> Option<Held> {
        let mut fields = line.strip_prefix("lock:")?.split_ascii_whitespace().skip(1);
        if !matches!(fields.next()?, "OFDLCK" | "POSIX") {
            return None;
        }
        let exclusive = match fields.nth(1)? {
            "READ" => false,
            "WRITE" => true,
            _ => return None,
        };
        let first = fields.nth(2)?.parse().ok()?;
        let last = match fields.next()? {
            "EOF" => u64::MAX,
            last => last.parse().ok()?,
        };
        Some(Held { exclusive, first, last })
    }

    fn is_in_the_way_of(&self, wanted: &Wanted) -> bool {
        (self.first..=self.last).contains(&wanted.byte) && (self.exclusive || !wanted.only_exclusive)
    }
}

/// A file, by whatever name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct FileId {
    device: (u32, u32),
    inode: u64,
}

impl FileId {
    /// Of something that can be an image. What is known of it is enough: a file server that does not answer is not asked.
    fn of(path: &Path) -> Option<FileId> {
        let wanted = StatxFlags::INO | StatxFlags::TYPE;
        let found: Statx = statx(CWD, path, AtFlags::STATX_DONT_SYNC, wanted).ok()?;
        let is_image = matches!(
            FileType::from_raw_mode(found.stx_mode.into()),
            FileType::RegularFile | FileType::BlockDevice
        );
        is_image.then_some(FileId {
            device: (found.stx_dev_major, found.stx_dev_minor),
            inode: found.stx_ino,
        })
    }
}

/// An image that the asker has open, or would have opened.
#[derive(Debug)]
struct Image {
    /// As people know it.
    name: String,
    /// Where it can be opened, also if its name means something else to us.
    opened_at: PathBuf,
    holders: Vec<Holder>,
    /// The asker itself has a lock that would be in another's way: it leaves some behind when it is refused (QEMU 7.2).
    asker_holds: bool,
    /// Somebody else has the lock, whether or not we can see who.
    is_locked: bool,
}

/// A process that has a lock.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Holder {
    pid: u32,
    program: String,
    vm: Option<String>,
}

/// What was found.
#[derive(Debug, Default)]
struct Found {
    /// Those with a lock in the way.
    locked: Vec<Image>,
    /// There was an image to ask about.
    has_asked: bool,
    /// There are processes that may not be looked into.
    has_hidden: bool,
}

impl Found {
    fn look(wanted: &Wanted, asker: Option<u32>) -> Found {
        let mut images = match (asker, &wanted.image) {
            (Some(pid), _) => opened_by(pid, wanted),
            (None, Some(path)) => at_path(path),
            (None, None) => BTreeMap::new(),
        };
        let mut found = Found {
            has_asked: !images.is_empty(),
            ..Found::default()
        };
        if !found.has_asked {
            return found;
        }
        for (pid, descriptor) in open_files(asker, &mut found.has_hidden) {
            let locks = locks_of(pid, &descriptor);
            if !locks.iter().any(|held| held.is_in_the_way_of(wanted)) {
                continue;
            }
            let Some(image) = FileId::of(&descriptor).and_then(|id| images.get_mut(&id)) else {
                continue;
            };
            image.is_locked = true;
            if !image.holders.iter().any(|known| known.pid == pid) {
                image.holders.push(Holder::of(pid));
            }
        }
        let unseen = |image: &&mut Image| !image.is_locked && !image.asker_holds;
        for image in images.values_mut().filter(unseen) {
            image.is_locked = is_locked(&image.opened_at, wanted);
        }
        // Where the asker holds one itself the file system names no other. It has been refused one of these.
        let is_certain = images.values().any(|image| image.is_locked);
        let may_be = |image: &Image| image.is_locked || !is_certain && image.asker_holds;
        found.locked = images.into_values().filter(may_be).collect();
        found
    }

    /// What a person is told; `None` where nothing is known.
    fn sentence(&self) -> Option<String> {
        if !self.has_asked {
            return None;
        }
        let held: Vec<String> = self
            .locked
            .iter()
            .filter(|image| !image.holders.is_empty())
            .map(|image| {
                let holders: Vec<String> = image.holders.iter().map(Holder::to_string).collect();
                format!(
                    "The lock of {} is held on the same host by {}.",
                    image.name,
                    listed(&holders)
                )
            })
            .collect();
        if !held.is_empty() {
            let mut text = held[..held.len().min(SHOWN)].join(" ");
            text += " End what holds it, or wait until it lets go of the image.";
            return Some(text);
        }
        if self.locked.is_empty() {
            return Some("By now nobody holds that lock any more: whoever did has let go of the image.".to_owned());
        }
        let names: Vec<String> = self.locked.iter().map(|image| image.name.clone()).collect();
        let mut text = format!(
            "Nobody who can be seen on the same host holds the lock of {}",
            listed(&names)
        );
        if self.has_hidden {
            text += ", but not every process there can be looked into (the gateway does not run as root)";
        }
        text += ". Another host of the shared storage does, unless it was let go meanwhile: look there for a QEMU, the VM's old one \
                 included, or a backup that has the image open, and end it. A file server keeps the locks of a client that crashed \
                 until that is back or its lease is over.";
        Some(text)
    }
}

/// `a, b and c`, and no more than a person reads.
fn listed(names: &[String]) -> String {
    let shown = &names[..names.len().min(SHOWN)];
    let more = names.len() - shown.len();
    match shown {
        _ if more > 0 => format!("{} and {more} more", shown.join(", ")),
        [first @ .., last] if !first.is_empty() => format!("{} and {last}", first.join(", ")),
        _ => shown.concat(),
    }
}

impl Holder {
    fn of(pid: u32) -> Holder {
        let arguments = Process::open(pid).and_then(|process| process.arguments());
        Holder::from_arguments(pid, &arguments.unwrap_or_default())
    }

    fn from_arguments(pid: u32, arguments: &[String]) -> Holder {
        let path = arguments.first().map_or("", String::as_str);
        let program = path.rsplit('/').next().unwrap_or_default();
        let is_qemu = program.contains("qemu") || program.contains("kvm");
        Holder {
            pid,
            program: if program.is_empty() { "a program" } else { program }.to_owned(),
            vm: is_qemu.then(|| vm_name(arguments)).flatten(),
        }
    }
}

impl std::fmt::Display for Holder {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(out, "{} (process {}", printable(&self.program, NAME_LENGTH), self.pid)?;
        if let Some(vm) = &self.vm {
            write!(out, ", VM {}", printable(vm, NAME_LENGTH))?;
        }
        out.write_str(")")
    }
}

/// The VM's name of a QEMU's arguments: `-name x`, `-name x,process=y`, `-name guest=x,debug-threads=on`. Two commas are one.
fn vm_name(arguments: &[String]) -> Option<String> {
    let at = arguments
        .iter()
        .rposition(|argument| argument == "-name" || argument == "--name")?;
    let value = arguments.get(at + 1)?.replace(",,", "\0");
    let mut options = value.split(',');
    let first = options.next()?;
    let guest = |option: &str| option.strip_prefix("guest=").map(str::to_owned);
    let name = match guest(first) {
        None if !first.contains('=') => Some(first.to_owned()),
        named => named.or_else(|| options.find_map(guest)),
    };
    name.map(|name| name.replace('\0', ",")).filter(|name| !name.is_empty())
}

/// What another user's file or process is called may be anything.
fn printable(text: &str, length: usize) -> String {
    let characters = text.chars().take(length);
    characters
        .map(|character| if character.is_control() { '?' } else { character })
        .collect()
}

/// `/proc/PID/fd/N` of every process but one, and whether there are some that may not be looked into.
fn open_files(but: Option<u32>, has_hidden: &mut bool) -> impl Iterator<Item = (u32, PathBuf)> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let processes = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let files = processes.filter(move |pid| Some(*pid) != but).flat_map(|pid: u32| {
        let files = fs::read_dir(format!("/proc/{pid}/fd"));
        // One that has ended meanwhile holds nothing.
        *has_hidden |= files
            .as_ref()
            .is_err_and(|error| error.kind() == ErrorKind::PermissionDenied);
        let files = files.into_iter().flatten().flatten();
        files.map(move |file| (pid, file.path()))
    });
    files.take(DESCRIPTORS)
}

/// The locks of an open file of a process, `/proc/PID/fd/N`; none where it has ended or is another user's.
fn locks_of(pid: u32, descriptor: &Path) -> Vec<Held> {
    let number = descriptor.file_name().unwrap_or_default().to_string_lossy();
    let mut text = String::new();
    let read = File::open(format!("/proc/{pid}/fdinfo/{number}"))
        .and_then(|file| file.take(FDINFO_LIMIT).read_to_string(&mut text));
    match read {
        Ok(_) => text.lines().filter_map(Held::parse).collect(),
        Err(_) => Vec::new(),
    }
}

/// The files that a QEMU has open, by identity.
fn opened_by(pid: u32, wanted: &Wanted) -> BTreeMap<FileId, Image> {
    let descriptors = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
    let mut images = BTreeMap::new();
    for descriptor in descriptors {
        let opened_at = descriptor.path();
        let (Some(id), Ok(name)) = (FileId::of(&opened_at), fs::read_link(&opened_at)) else {
            continue;
        };
        let locks = locks_of(pid, &opened_at);
        let image = images.entry(id).or_insert_with(|| Image::new(&name, opened_at));
        image.asker_holds |= locks.iter().any(|held| held.is_in_the_way_of(wanted));
    }
    images
}

/// The image that a QEMU named before it ended.
fn at_path(path: &Path) -> BTreeMap<FileId, Image> {
    let id = FileId::of(path);
    id.map(|id| (id, Image::new(path, path.to_owned())))
        .into_iter()
        .collect()
}

impl Image {
    fn new(name: &Path, opened_at: PathBuf) -> Image {
        Image {
            name: printable(&name.to_string_lossy(), PATH_LENGTH),
            opened_at,
            holders: Vec::new(),
            asker_holds: false,
            is_locked: false,
        }
    }
}

/// Asks the file system itself, as QEMU does. For NFS and cluster file systems that means the other hosts too.
fn is_locked(path: &Path, wanted: &Wanted) -> bool {
    let flags = OFlags::NONBLOCK.bits();
    let opened = OpenOptions::new()
        .read(true)
        .custom_flags(i32::try_from(flags).unwrap_or_default())
        .open(path);
    let of = match wanted.only_exclusive {
        true => Of::Exclusive,
        false => Of::Any,
    };
    let byte = i64::try_from(wanted.byte).unwrap_or(i64::MAX - 1);
    opened.is_ok_and(|file| is_held(&file, byte..byte + 1, of))
}

/// QEMU's permissions in the order of their numbers (`bdrv_perm_names`, QEMU `block.c`).
const PERMISSIONS: [&str; 4] = ["consistent read", "write", "write unchanged", "resize"];
/// Byte of permission 0 where it is used (`RAW_LOCK_PERM_BASE`, QEMU `block/file-posix.c`).
const USED: u64 = 100;
/// Byte of permission 0 where it is not shared (`RAW_LOCK_SHARED_BASE`).
const NOT_SHARED: u64 = 200;

/// The guest stands meanwhile. With 100 processes it takes less than 10 ms (2026-11-29).
const LONGEST_LOOK: Duration = Duration::from_secs(3);
/// Open files that are looked at, of all processes together.
const DESCRIPTORS: usize = 1_000_000;
/// Bytes read of one `fdinfo`: some kinds of descriptors list without end, and a QEMU's image has a handful of locks.
const FDINFO_LIMIT: u64 = 64 << 10;
/// Names in a sentence.
const SHOWN: usize = 4;
/// Longest name of a program or VM that is shown.
const NAME_LENGTH: usize = 64;
/// Longest name of an image that is shown.
const PATH_LENGTH: usize = 512;

#[cfg(test)]
mod tests {
    use super::*;

    fn wanted(byte: u64, only_exclusive: bool, image: Option<&str>) -> Option<Wanted> {
        Some(Wanted {
            byte,
            only_exclusive,
            image: image.map(PathBuf::from),
        })
    }

    #[test]
    fn qemus_refusals_name_a_byte_and_sometimes_an_image() {
        let cases = [
            (
                r#"QEMU refused `cont`: Failed to get "write" lock"#,
                wanted(201, false, None),
            ),
            (r#"Failed to get shared "write" lock"#, wanted(101, false, None)),
            (r#"Failed to get "consistent read" lock"#, wanted(200, false, None)),
            (r#"Failed to get shared "resize" lock"#, wanted(103, false, None)),
            ("-drive file=d.img: Failed to lock byte 100", wanted(100, true, None)),
            (
                "qemu: -drive file=d: Failed to get \"write\" lock\nIs another process using the image [d/a]b.img]?\n",
                wanted(201, false, Some("d/a]b.img")),
            ),
            (
                "Failed to get \"write\" lock | Is another process using the image [/d.img]? | [more]",
                wanted(201, false, Some("/d.img")),
            ),
        ];
        for (text, expected) in cases {
            assert_eq!(Wanted::parse(text), expected, "{text}");
        }
        for text in [
            "",
            "Failed to get \"strange\" lock",
            "Failed to get \"write",
            "Failed to lock byte x",
        ] {
            assert_eq!(Wanted::parse(text), None, "{text}");
        }
    }

    #[test]
    fn a_lock_is_in_the_way_where_it_covers_the_byte() {
        let line = |line| Held::parse(line).unwrap();
        let two = line("lock:\t1: OFDLCK ADVISORY  READ -1 fe:00:10010726 100 101");
        let whole = line("lock:\t1: POSIX  ADVISORY  WRITE 11063 fe:00:10010726 0 EOF");
        let of = |byte, only_exclusive| wanted(byte, only_exclusive, None).unwrap();
        for (byte, covered) in [(99, false), (100, true), (101, true), (102, false)] {
            assert_eq!(two.is_in_the_way_of(&of(byte, false)), covered, "{byte}");
            assert!(whole.is_in_the_way_of(&of(byte, true)), "{byte}");
        }
        assert!(!two.is_in_the_way_of(&of(100, true)));
        for other in [
            "lock:\t1: FLOCK  ADVISORY  WRITE 1 fe:00:1 0 EOF",
            "lock:\t1: -> OFDLCK ADVISORY  READ -1 fe:00:1 0 1",
            "lock:\t1: OFDLCK ADVISORY  READ -1 fe:00:1 0",
            "flags:\t02",
        ] {
            assert_eq!(Held::parse(other), None, "{other}");
        }
    }

    #[test]
    fn a_qemu_is_called_by_the_name_of_its_vm_and_others_by_their_program() {
        let holder = |line: &str| {
            let arguments: Vec<String> = line.split_terminator(' ').map(str::to_owned).collect();
            Holder::from_arguments(7, &arguments).to_string()
        };
        for (line, expected) in [
            (
                "/usr/bin/qemu-system-x86_64 -name web -m 64",
                "qemu-system-x86_64 (process 7, VM web)",
            ),
            ("qemu-kvm --name web,process=x", "qemu-kvm (process 7, VM web)"),
            ("kvm -name debug-threads=on,guest=a,,b", "kvm (process 7, VM a,b)"),
            ("qemu-img convert a b", "qemu-img (process 7)"),
            ("/opt/backup -name x", "backup (process 7)"),
            ("qemu -name", "qemu (process 7)"),
            ("b\x1bd", "b?d (process 7)"),
            ("", "a program (process 7)"),
        ] {
            assert_eq!(holder(line), expected, "{line}");
        }
    }

    #[test]
    fn a_lock_that_nobody_here_holds_is_another_hosts() {
        let mut found = Found {
            has_asked: true,
            ..Found::default()
        };
        let released = found.sentence().unwrap();
        assert!(released.contains("nobody holds that lock any more"), "{released}");
        let mut image = Image::new(Path::new("/a"), PathBuf::new());
        image.is_locked = true;
        found.locked.push(image);
        let elsewhere = found.sentence().unwrap();
        assert!(
            elsewhere.contains("the lock of /a. Another host of the shared storage does"),
            "{elsewhere}"
        );
        found.has_hidden = true;
        assert!(found.sentence().unwrap().contains("/a, but not every process there"));
        assert_eq!(Found::default().sentence(), None);
    }

    #[test]
    fn many_holders_are_counted() {
        let names: Vec<String> = (0..6).map(|number| number.to_string()).collect();
        assert_eq!(listed(&names[..1]), "0");
        assert_eq!(listed(&names[..2]), "0 and 1");
        assert_eq!(listed(&names[..4]), "0, 1, 2 and 3");
        assert_eq!(listed(&names), "0, 1, 2, 3 and 2 more");
    }
}
