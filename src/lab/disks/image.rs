//! Images of the guest's disk, from outside: made before the guest, compared while it rests, checked after it.

use std::io::{Read as _, Write as _};
use std::path::Path;

use crate::lab::error::LabError;
use crate::lab::guest::GuestDisk;
use crate::lab::process::{ProcessError, output, run};
use crate::lab::site::Site;

/// Makes a raw image with an ext4 file system that holds a file of random bytes. It is sparse but for that.
pub(super) async fn make(image: &Path, disk_mb: u64, fill_mb: u64) -> Result<(), LabError> {
    let folder = image.with_extension("content");
    let failed = |source| LabError::file(&folder, source);
    std::fs::create_dir(&folder).map_err(failed)?;
    let filler = folder.join("filler");
    tokio::task::spawn_blocking(move || fill(&filler, fill_mb << 20))
        .await
        .map_err(|error| failed(error.into()))?
        .map_err(failed)?;
    let (size, content, file) = (
        format!("{disk_mb}M"),
        folder.display().to_string(),
        image.display().to_string(),
    );
    // A new file reads as zeroes: neither the guest nor mke2fs has to write them.
    let options = "lazy_itable_init=0,lazy_journal_init=1,nodiscard";
    run(&[
        "mke2fs", "-q", "-F", "-t", "ext4", "-m", "0", "-N", "16384", "-J", "size=64", "-E", options, "-d", &content,
        &file, &size,
    ])
    .await?;
    std::fs::remove_dir_all(&folder).map_err(failed)
}

fn fill(file: &Path, bytes: u64) -> std::io::Result<()> {
    let mut random = std::fs::File::open("/dev/urandom")?.take(bytes);
    let mut file = std::fs::File::create(file)?;
    std::io::copy(&mut random, &mut file)?;
    file.flush()
}

/// Whether a guest sees the same in the images of both sites.
pub(in crate::lab) async fn compare_sites([a, b]: &[Site; 2]) -> Result<Result<(), String>, LabError> {
    match (&a.files.disk, &b.files.disk) {
        (Some(a), Some(b)) => compare(a, b).await,
        _ => Ok(Err("there are no two images".to_owned())),
    }
}

/// Whether a guest sees the same in two images. `-U`: one may be open, with a guest that writes nothing.
pub(in crate::lab) async fn compare(a: &GuestDisk, b: &GuestDisk) -> Result<Result<(), String>, LabError> {
    let files = [a, b].map(|disk| disk.image.display().to_string());
    let compared = output(&[
        "qemu-img", "compare", "-U", "-f", a.format, "-F", b.format, &files[0], &files[1],
    ])
    .await?;
    let said = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim_end().to_owned();
    match compared.status.code() {
        Some(0) => Ok(Ok(())),
        Some(1) => Ok(Err(said(&compared.stdout))),
        _ => Err(ProcessError::Ended {
            name: "qemu-img compare".to_owned(),
            status: compared.status,
            said: said(&compared.stderr),
        }
        .into()),
    }
}

/// What e2fsck says of the file system in the raw image of a site whose guest has ended: whether it is clean in every part.
pub(super) async fn check(site: &Site) -> Result<Result<(), String>, LabError> {
    let Some(disk) = &site.files.disk else {
        return Ok(Err("there is no image".to_owned()));
    };
    let file = disk.image.display().to_string();
    let checked = output(&["e2fsck", "-f", "-n", &file]).await?;
    let said = String::from_utf8_lossy(&checked.stdout).trim_end().to_owned();
    Ok(checked.status.success().then_some(()).ok_or(said))
}
