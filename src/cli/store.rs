//! `longhaul store`: what is kept of VMs that have moved.

use std::path::PathBuf;
use std::time::SystemTime;

use jiff::Timestamp;
use serde::Serialize;

use super::output::{OutputArgs, bytes, table};
use super::{Failure, NO, YES};
use crate::config::{Config, DEFAULT_PATH, Overrides};
use crate::proto::page::MigrationId;
use crate::store::pages::{Listed, PageStore, Seeded, StoreError};

/// Shows, checks or erases the page store: what both sites of a migration keep so that the next one need not send it again.
///
/// Works on the store's directory, whether the gateway runs or not; a migration that is under way keeps what it has open.
#[derive(Debug, clap::Subcommand)]
pub(super) enum StoreCommand {
    /// Lists the images of VMs that are kept, and seeds, the one that was used last first.
    Status(Args),
    /// Reads everything in the store and names what is damaged. Changes nothing.
    ///
    /// Exit code: 0 all of it is as it was written, 2 something is not.
    Verify(Args),
    /// Reads a raw disk image, so that what VMs have in memory of such a disk is not sent, in their first migration too.
    ///
    /// Do the same at both sites, with one and the same image and tenant, as the user that the gateway runs as: both print the same name then. Take the
    /// image that VMs were installed or cloned from, or one snapshot of a VM's disk, copied. Blocks of 4 KiB count, at most 3 GiB of them that differ;
    /// they have to find room in the store's size beside what VMs leave, some of which is thrown out for it. The image is not needed any more then.
    /// Within a minute or so a gateway that runs has read it; a migration that begins with it says so (`known_pages`). Given again, it only prints its name.
    ///
    /// Exit code: 0 it is in the store, 2 it is not.
    Seed(SeedArgs),
    /// Removes one image or seed, by the name that `status` shows.
    ///
    /// Exit code: 0 it is removed, 2 it was not there.
    Forget(ForgetArgs),
    /// Removes what is damaged or half written, and what goes beyond the size: images of which there is a newer one first, then those that were
    /// not used for longest, seeds last.
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
pub(super) struct SeedArgs {
    /// The disk image, or the disk: raw, as the guest sees it.
    disk: PathBuf,

    /// Only VMs of this tenant may use it. Otherwise all may: how much of a migration is not sent then tells what of the image a VM has in memory.
    #[arg(long, value_name = "NAME", value_parser = crate::config::units::parse_name)]
    tenant: Option<String>,

    #[command(flatten)]
    args: Args,
}

#[derive(Debug, clap::Args)]
pub(super) struct ForgetArgs {
    /// Its name.
    #[arg(value_name = "NAME", value_parser = parse_image)]
    image: MigrationId,

    #[command(flatten)]
    args: Args,
}

fn parse_image(text: &str) -> Result<MigrationId, String> {
    text.parse()
        .map_err(|_| "the name of an image is 32 hexadecimal digits; longhaul store status shows it".to_owned())
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
    /// No VM's memory, but what was given with `seed`.
    seed: bool,
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

/// What `seed` did.
#[derive(Debug, Serialize)]
struct ShownSeed {
    image: String,
    tenant: String,
    pages: u32,
    left_out_pages: u64,
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
        StoreCommand::Seed(seed) => {
            let tenant = seed.tenant.as_deref().unwrap_or_default();
            let store = store(&seed.args)?;
            let now = crate::gateway::clock::unix_ms();
            let seeded = store.seed(&seed.disk, tenant, now).map_err(failed)?;
            let Some(Seeded { head, left_out }) = seeded else {
                return Err(Failure::no(format!(
                    "the store has no room for {}: it may take {}, of which seeds that are there keep theirs (store.size, or longhaul store \
                     forget), and leaves a quarter of its disk's room to others",
                    seed.disk.display(),
                    bytes(store.most_bytes())
                )));
            };
            let shown = ShownSeed {
                image: head.id.to_string(),
                tenant: head.whose.tenant,
                pages: head.contents,
                left_out_pages: left_out,
            };
            seed.args.output.result(&shown, |shown| {
                let mut text = format!(
                    "seed {}: {} pages; do the same at the other site",
                    shown.image, shown.pages
                );
                if shown.left_out_pages > 0 {
                    text.push_str(&format!(
                        "\n{} more pages of {} found no room in it",
                        shown.left_out_pages,
                        seed.disk.display()
                    ));
                }
                text
            });
            Ok(YES)
        }
        StoreCommand::Forget(forget) => {
            let store = store(&forget.args)?;
            let id = forget.image;
            if !store.forget(id).map_err(failed)? {
                return Err(Failure::no(format!(
                    "the store has no image {id}; longhaul store status shows what it has"
                )));
            }
            let forgotten = serde_json::json!({ "forgotten": id.to_string() });
            forget
                .args
                .output
                .result(&forgotten, |_| format!("image {id} is removed"));
            Ok(YES)
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
            seed: listed.head.whose.is_seed(),
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
                    if image.seed {
                        "(seed)".to_owned()
                    } else {
                        image.vm.clone()
                    },
                    image.tenant.clone(),
                    image.peer.clone(),
                    bytes(image.bytes),
                    image.pages.to_string(),
                    image.used.clone(),
                    image.migration.clone(),
                ]
            })
            .collect();
        text.push_str(&table(["VM", "TENANT", "PEER", "SIZE", "PAGES", "USED", "NAME"], &rows));
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
