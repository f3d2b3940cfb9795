//! `longhaul store`: what is kept of VMs that have moved.

use std::path::PathBuf;
use std::time::SystemTime;

use jiff::Timestamp;
use serde::Serialize;

use super::output::{OutputArgs, bytes, table};
use super::{Failure, NO, YES};
use crate::config::{Config, DEFAULT_PATH, Overrides};
use crate::store::pages::{Listed, PageStore, StoreError};

/// Shows, checks or erases the page store: what both sites of a migration keep so that the next one need not send it again.
///
/// Works on the store's directory, whether the gateway runs or not; a migration that is under way keeps what it has open.
#[derive(Debug, clap::Subcommand)]
pub(super) enum StoreCommand {
    /// Lists the images of VMs that are kept, the one that was used last first.
    Status(Args),
    /// Reads everything in the store and names what is damaged. Changes nothing.
    ///
    /// Exit code: 0 all of it is as it was written, 2 something is not.
    Verify(Args),
    /// Removes what is damaged or half written, and what goes beyond the size, the images that were not used for longest first.
    Gc(GcArgs),
    /// Destroys the store's key, without which nothing in it can be read, and removes the rest.
    ///
    /// The next migration of each VM sends everything again.
    Erase(Args),
}

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Configuration of the gateway.
    #[arg(long, value_name = "FILE", default_value = DEFAULT_PATH)]
    config: PathBuf,

    #[command(flatten)]
    output: OutputArgs,
}

#[derive(Debug, clap::Args)]
pub(super) struct GcArgs {
    /// Leave at most this much, instead of the configured size: 4gib, 500mib.
    #[arg(long, value_name = "SIZE", value_parser = crate::config::units::parse_size)]
    size: Option<u64>,

    #[command(flatten)]
    args: Args,
}

/// What `status` and `verify` say.
#[derive(Debug, Serialize)]
struct Shown {
    dir: PathBuf,
    size_bytes: u64,
    used_bytes: u64,
    images: Vec<ShownImage>,
    damaged: Vec<ShownDamage>,
}

#[derive(Debug, Serialize)]
struct ShownImage {
    migration: String,
    vm: String,
    tenant: String,
    peer: String,
    pages: u32,
    bytes: u64,
    written: String,
    used: String,
}

#[derive(Debug, Serialize)]
struct ShownDamage {
    file: PathBuf,
    reason: String,
}

/// What `gc` did.
#[derive(Debug, Serialize)]
struct Collected {
    removed_damaged: usize,
    removed_for_room: usize,
}

pub(super) fn run(command: &StoreCommand) -> Result<u8, Failure> {
    match command {
        StoreCommand::Status(args) => {
            let store = store(args)?;
            show(&store, args, |_| Ok(()))
        }
        StoreCommand::Verify(args) => {
            let store = store(args)?;
            show(&store, args, |listed| store.verify(listed.head.id))
        }
        StoreCommand::Gc(gc) => {
            let store = store(&gc.args)?;
            let (_, damaged) = store.scrub().map_err(failed)?;
            let most = gc.size.unwrap_or(store.most_bytes());
            let collected = Collected {
                removed_damaged: damaged.len(),
                removed_for_room: store.make_room(most).map_err(failed)?,
            };
            gc.args.output.result(&collected, |collected| {
                format!(
                    "removed {} damaged files, and {} images for room",
                    collected.removed_damaged, collected.removed_for_room
                )
            });
            Ok(YES)
        }
        StoreCommand::Erase(args) => {
            let store = store(args)?;
            store.erase().map_err(failed)?;
            let erased = serde_json::json!({ "erased": store.dir() });
            args.output
                .result(&erased, |_| format!("{} is erased", store.dir().display()));
            Ok(YES)
        }
    }
}

fn show(store: &PageStore, args: &Args, check: impl Fn(&Listed) -> Result<(), StoreError>) -> Result<u8, Failure> {
    let contents = store.contents().map_err(failed)?;
    let mut shown = Shown {
        dir: store.dir().to_owned(),
        size_bytes: store.most_bytes(),
        used_bytes: contents.images.iter().map(|listed| listed.bytes).sum(),
        images: Vec::new(),
        damaged: Vec::new(),
    };
    for (file, reason) in contents.damaged.into_iter().chain(contents.unreadable) {
        shown.damaged.push(ShownDamage { file, reason });
    }
    for listed in &contents.images {
        let checked = check(listed);
        if let Err(StoreError::Io { source, .. }) = &checked
            && source.kind() == std::io::ErrorKind::NotFound
        {
            // Another took its place this moment.
            continue;
        }
        if let Err(error) = checked {
            let file = store.path_of(listed.head.id);
            shown.damaged.push(ShownDamage {
                file,
                reason: error.to_string(),
            });
        }
        shown.images.push(ShownImage {
            migration: listed.head.id.to_string(),
            vm: listed.head.whose.vm.clone(),
            tenant: listed.head.whose.tenant.clone(),
            peer: listed.head.whose.peer.clone(),
            pages: listed.head.contents,
            bytes: listed.bytes,
            written: i64::try_from(listed.head.unix_ms)
                .ok()
                .and_then(|ms| Timestamp::from_millisecond(ms).ok())
                .map(|at| at.to_string())
                .unwrap_or_default(),
            used: time(listed.used),
        });
    }
    args.output.result(&shown, text);
    Ok(if shown.damaged.is_empty() { YES } else { NO })
}

fn text(shown: &Shown) -> String {
    let mut text = format!(
        "{}: {} of {} used\n",
        shown.dir.display(),
        bytes(shown.used_bytes),
        bytes(shown.size_bytes)
    );
    if !shown.images.is_empty() {
        let rows: Vec<_> = shown
            .images
            .iter()
            .map(|image| {
                [
                    image.vm.clone(),
                    image.tenant.clone(),
                    image.peer.clone(),
                    bytes(image.bytes),
                    image.pages.to_string(),
                    image.used.clone(),
                    image.migration.clone(),
                ]
            })
            .collect();
        text.push_str(&table(
            ["VM", "TENANT", "PEER", "SIZE", "PAGES", "USED", "MIGRATION"],
            &rows,
        ));
    }
    for damage in &shown.damaged {
        text.push_str(&format!("damaged: {}\n", damage.reason));
    }
    if !shown.damaged.is_empty() {
        text.push_str("`longhaul store gc` removes what is damaged\n");
    }
    text
}

fn time(at: SystemTime) -> String {
    let at = Timestamp::try_from(at).ok();
    at.and_then(|at| at.round(jiff::Unit::Second).ok())
        .map(|at| at.to_string())
        .unwrap_or_default()
}

fn store(args: &Args) -> Result<PageStore, Failure> {
    let config = Config::load(&args.config, &Overrides::default()).map_err(|error| Failure::no(error.to_string()))?;
    let dir = config.store_dir();
    // What was kept once may be there although nothing is kept any more.
    if config.store.size.is_none() && !dir.exists() {
        return Err(Failure::no(format!(
            "{} keeps nothing of VMs that have moved: state `size` in a [store] section to change that",
            args.config.display()
        )));
    }
    PageStore::open(&dir, config.store.size.unwrap_or_default()).map_err(failed)
}

fn failed(error: StoreError) -> Failure {
    Failure::no(error.to_string())
}
