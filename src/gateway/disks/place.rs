//! Where the image of a disk is: at its path of the configuration, or where a symbolic link there leads.
//!
//! `migrate --disk` puts a disk into a pool of the destination by making that path a link. So everything else, the VM's own command among it, goes by
//! the configured path, and who looks at the folder sees where the disk is. A link is there for as long as an image is where it leads: one that leads
//! nowhere may be one whose file system is not mounted, and nothing is made there.

use std::io::ErrorKind;
use std::path::{Component, Path, PathBuf};

use super::{mark, volumes};
use crate::config::{Config, ImageFormat, Vm, VmImage};
use crate::hypervisor::qemu::short_name;
use crate::proto::wire::message::{DiskPlace, OfferedDisk};
use crate::store::file::sync_directory;

/// Links that lead to each other at most, as many as the kernel follows (path_resolution(7)).
const MOST_LINKS: usize = 40;

/// Longest place that is looked at, bytes.
const MOST_PLACE: usize = 1024;

/// The file that opening `path` opens or makes, as far as that can be told: its folder without links.
pub(crate) fn location(path: &Path) -> PathBuf {
    let mut at = path.to_owned();
    for _ in 0..MOST_LINKS {
        let (Some(folder), Some(name)) = (at.parent(), at.file_name()) else {
            break;
        };
        let real = std::fs::canonicalize(folder).unwrap_or_else(|_| folder.to_owned());
        match std::fs::read_link(&at) {
            Ok(target) => at = real.join(target),
            Err(_) => return real.join(name),
        }
    }
    at
}

/// Where disks that are offered are to go, one for each; `None`: where the configured path leads.
///
/// # Errors
/// A sentence for both operators.
pub(crate) fn find(
    config: &Config,
    vm: &Vm,
    disks: &[OfferedDisk],
    places: &[DiskPlace],
) -> Result<Vec<Option<PathBuf>>, String> {
    let mut found = vec![None; disks.len()];
    for place in places {
        let is_meant = |disk: &OfferedDisk| disk.name == place.disk || short_name(&disk.name) == place.disk;
        let number = disks.iter().position(is_meant).ok_or_else(|| {
            let known: Vec<&str> = disks.iter().map(|disk| short_name(&disk.name)).collect();
            format!(
                "--disk: {} has no disk called {}; it has {}",
                vm.name,
                printable(&place.disk),
                known.join(", ")
            )
        })?;
        let image = volumes::image_of(&config.site, &vm.images, &disks[number])?;
        let target = resolve(config, image, &place.place)?;
        if found[number].is_some() || found.contains(&Some(target.clone())) {
            return Err(format!(
                "--disk: {} or its disk is there twice",
                printable(&place.place)
            ));
        }
        found[number] = Some(target);
    }
    Ok(found)
}

/// The file of `POOL/FILE`.
fn resolve(config: &Config, image: &VmImage, place: &str) -> Result<PathBuf, String> {
    let (site, shown) = (&config.site, printable(place));
    let (pool, file) = place.split_once('/').unwrap_or((place, ""));
    let pool = config.pools.iter().find(|known| known.name == pool).ok_or_else(|| {
        let known: Vec<&str> = config.pools.iter().map(|pool| pool.name.as_str()).collect();
        match known.is_empty() {
            true => format!("{site} has no [[pool]], so disks go where its [[vm.image]] tables say"),
            false => format!(
                "{site} has no [[pool]] called {}; it has {}",
                printable(pool),
                known.join(", ")
            ),
        }
    })?;
    let file = Path::new(file);
    let is_plain = |part: Component<'_>| match part {
        Component::Normal(name) => !name.as_encoded_bytes().starts_with(b"."),
        _ => false,
    };
    let is_odd = place.chars().any(char::is_control);
    let has_name = file.file_name().is_some() && !place.ends_with('/');
    if place.len() > MOST_PLACE || is_odd || !has_name || !file.components().all(is_plain) {
        return Err(format!(
            "{shown} cannot be a disk's place: write POOL/FILE, of which no part begins with a dot"
        ));
    }
    let ending = file.extension().and_then(|ending| ending.to_str()).unwrap_or_default();
    if format_of(ending) != Some(image.format) {
        return Err(format!(
            "{shown} does not end with .{format}, which is what the disk {} becomes at {site} by its [[vm.image]]: end it so, or change the format there",
            image.disk,
            format = image.format
        ));
    }
    let path = pool.path.join(file);
    let folder = path.parent().unwrap_or(&pool.path);
    let real = |folder: &Path| {
        std::fs::canonicalize(folder).map_err(|error| format!("{} at {site} cannot be used: {error}", folder.display()))
    };
    let real_folder = real(folder)?;
    if !real_folder.starts_with(real(&pool.path)?) {
        return Err(format!(
            "{} at {site} is not in the pool {}",
            folder.display(),
            pool.name
        ));
    }
    Ok(real_folder.join(file.file_name().unwrap_or_default()))
}

fn format_of(ending: &str) -> Option<ImageFormat> {
    match ending {
        "img" => Some(ImageFormat::Raw),
        ending => ending.parse().ok(),
    }
}

/// What a peer has written, for a sentence.
fn printable(text: &str) -> String {
    format!("{:?}", text.chars().take(100).collect::<String>())
}

/// Looks whether an image can be put there: no other image of the configuration is or would be, and nothing else is there than what a gateway has
/// begun to make and no path leads to.
///
/// # Errors
/// A sentence.
pub(super) fn check_target(config: &Config, image: &VmImage, target: &Path) -> Result<(), String> {
    if location(&image.path) == target {
        return Ok(());
    }
    let (site, shown) = (&config.site, target.display());
    let images = config.vms.iter().flat_map(|vm| &vm.images);
    let others = images.filter(|other| other.path != image.path);
    let bases = config
        .vms
        .iter()
        .flat_map(|vm| &vm.images)
        .filter_map(|image| image.base.as_ref());
    let mut taken = others.map(|other| &other.path).chain(bases.map(|base| &base.path));
    if let Some(other) = taken.find(|other| location(other) == target) {
        return Err(format!(
            "{shown} at {site} is where {} leads: say another name",
            other.display()
        ));
    }
    match std::fs::symlink_metadata(target) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        Err(error) => Err(format!("{shown} at {site} cannot be looked at: {error}")),
        Ok(about) if about.is_file() && mark::is_begun(target) => Ok(()),
        Ok(_) => Err(format!(
            "{shown} is at {site} already: say another name, or move it away"
        )),
    }
}

/// Whether the path is a link that leads to nothing.
pub(super) fn is_dangling(path: &Path) -> bool {
    is_link(path) && std::fs::metadata(path).is_err_and(|error| error.kind() == ErrorKind::NotFound)
}

/// Whether the path is a link, wherever that leads.
pub(super) fn is_link(path: &Path) -> bool {
    std::fs::symlink_metadata(path).is_ok_and(|about| about.is_symlink())
}

/// Makes a path a link to `target`, durably, in the place of what it is.
///
/// # Errors
/// Of the file system: the path is what it was.
pub(super) fn link(path: &Path, target: &Path) -> std::io::Result<()> {
    let mut beside = path.as_os_str().to_owned();
    beside.push(".longhaul-link");
    let beside = Path::new(&beside);
    // What a crash left.
    if is_link(beside) {
        std::fs::remove_file(beside)?;
    }
    std::os::unix::fs::symlink(target, beside)?;
    std::fs::rename(beside, path).inspect_err(|_| drop(std::fs::remove_file(beside)))?;
    sync_directory(target)?;
    sync_directory(path)
}

/// Removes an image, and the link by which it was found.
///
/// # Errors
/// Of the file system.
pub(super) async fn remove(path: &Path) -> std::io::Result<()> {
    tokio::fs::remove_file(location(path)).await?;
    match is_dangling(path) {
        true => tokio::fs::remove_file(path).await,
        false => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;
    use crate::config::{Overrides, Pool};

    /// A site with the VM `x`, whose disk `vda` is `x.qcow2`, the VM `y` with `y.qcow2`, and the pool `fast`.
    fn site(folder: &Path) -> Config {
        let vm = |name: &str| {
            format!(
                "[[vm]]\nname = \"{name}\"\nqmp = \"/{name}\"\ndisks = \"copied\"\n[[vm.image]]\ndisk = \"vda\"\npath = \"{}/{name}.qcow2\"\n",
                folder.display()
            )
        };
        let text = format!("site = \"b\"\n{}{}", vm("x"), vm("y"));
        let mut config = Config::parse(&text, &Overrides::default()).unwrap();
        std::fs::create_dir_all(folder.join("pool/in")).unwrap();
        symlink(folder, folder.join("pool/out")).unwrap();
        config.pools.push(Pool {
            name: "fast".to_owned(),
            path: folder.join("pool"),
        });
        config
    }

    fn found(config: &Config, place: &str) -> Result<PathBuf, String> {
        let disks = [OfferedDisk {
            name: "/machine/peripheral/vda/virtio-backend".to_owned(),
            size_bytes: 1,
            allocated_bytes: 1,
        }];
        let places = [DiskPlace {
            disk: "vda".to_owned(),
            place: place.to_owned(),
        }];
        let found = find(config, &config.vms[0], &disks, &places);
        found.map(|mut found| found.remove(0).unwrap())
    }

    #[test]
    fn a_place_is_a_new_file_in_a_pool() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path().canonicalize().unwrap();
        let config = site(&folder);
        assert_eq!(found(&config, "fast/in/a.qcow2"), Ok(folder.join("pool/in/a.qcow2")));
        assert_eq!(found(&config, "fast/in//a.qcow2"), Ok(folder.join("pool/in/a.qcow2")));
        for (place, says) in [
            ("slow/a.qcow2", "has no [[pool]] called \"slow\"; it has fast"),
            ("fast", "cannot be a disk's place"),
            ("fast/", "cannot be a disk's place"),
            ("fast/a.qcow2/", "cannot be a disk's place"),
            ("fast//etc/a.qcow2", "cannot be a disk's place"),
            ("fast/../a.qcow2", "cannot be a disk's place"),
            ("fast/in/../../a.qcow2", "cannot be a disk's place"),
            ("fast/.a.qcow2", "cannot be a disk's place"),
            ("fast/a\0.qcow2", "cannot be a disk's place"),
            ("fast/a\nb.qcow2", "cannot be a disk's place"),
            ("fast/a.raw", "does not end with .qcow2"),
            ("fast/a", "does not end with .qcow2"),
            ("fast/none/a.qcow2", "cannot be used"),
            ("fast/out/a.qcow2", "is not in the pool fast"),
        ] {
            let refused = found(&config, place).unwrap_err();
            assert!(refused.contains(says), "{place}: {refused}");
        }
    }

    #[test]
    fn no_two_images_are_one_file_whatever_links_lead_there() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path().canonicalize().unwrap();
        let config = site(&folder);
        let (x, y) = (&config.vms[0].images[0], &config.vms[1].images[0]);
        let target = folder.join("pool/in/a.qcow2");
        check_target(&config, x, &target).unwrap();
        link(&x.path, &target).unwrap();
        assert!(is_dangling(&x.path));
        assert_eq!(location(&x.path), target);
        // Its own, there or not.
        check_target(&config, x, &target).unwrap();
        let taken = check_target(&config, y, &target).unwrap_err();
        assert!(taken.contains("x.qcow2 leads"), "{taken}");
        std::fs::write(&target, "an image").unwrap();
        check_target(&config, x, &target).unwrap();
        let other = folder.join("pool/b.qcow2");
        std::fs::write(&other, "somebody's").unwrap();
        assert!(check_target(&config, x, &other).unwrap_err().contains("already"));
        symlink("in/c.qcow2", folder.join("pool/d.qcow2")).unwrap();
        assert!(check_target(&config, x, &folder.join("pool/d.qcow2")).is_err());
        // The next one takes the place of the link, not of what it leads to.
        link(&x.path, &folder.join("pool/e.qcow2")).unwrap();
        assert_eq!(std::fs::read(&target).unwrap(), b"an image");
        assert_eq!(location(&x.path), folder.join("pool/e.qcow2"));
    }

    #[test]
    fn a_file_is_where_links_lead_and_links_in_a_ring_lead_nowhere() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path().canonicalize().unwrap();
        let at = |name: &str| folder.join(name);
        std::fs::create_dir(at("real")).unwrap();
        symlink("real", at("folder")).unwrap();
        symlink("folder/b", at("a")).unwrap();
        symlink("c", at("real/b")).unwrap();
        assert_eq!(location(&at("a")), at("real/c"));
        assert_eq!(location(&at("folder/c")), at("real/c"));
        assert_eq!(location(&at("none/c")), at("none/c"));
        symlink("ring", at("ring")).unwrap();
        location(&at("ring"));
    }
}
