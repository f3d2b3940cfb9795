//! Disks whose content is known: bytes that nothing compresses, and clusters of them that are otherwise.

use std::fs::{File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use crate::lab::error::LabError;
use crate::lab::random::Random;

/// What changes at a time: a cluster of qcow2.
pub(super) const CLUSTER: u64 = 64 << 10;

/// Bytes that are written at a time.
const STEP: usize = 4 << 20;

/// Makes a raw image that is full of bytes which nothing compresses. It is on storage afterwards, so that no writing back disturbs what is measured.
pub(super) async fn make(image: &Path, bytes: u64, seed: u64) -> Result<(), LabError> {
    let file = image.to_owned();
    blocking(image, move || {
        let mut noise = Noise::of(seed);
        let mut file = File::create_new(&file)?;
        let mut rest = bytes;
        let mut step = vec![0; STEP];
        while rest > 0 {
            let length = step.len().min(usize::try_from(rest).unwrap_or(usize::MAX));
            noise.fill(&mut step[..length]);
            file.write_all(&step[..length])?;
            rest -= length as u64;
        }
        file.sync_all()
    })
    .await
}

/// Makes a raw image that is `times` as large as what of it is in use: bytes that nothing compresses, in pieces all over it.
pub(in crate::lab) async fn make_sparse(image: &Path, used_bytes: u64, times: u64, seed: u64) -> Result<(), LabError> {
    let file = image.to_owned();
    blocking(image, move || {
        let mut noise = Noise::of(seed);
        let file = File::create_new(&file)?;
        file.set_len(used_bytes * times)?;
        let mut step = vec![0; STEP];
        for number in 0..used_bytes / STEP as u64 {
            noise.fill(&mut step);
            file.write_all_at(&step, number * times * STEP as u64)?;
        }
        file.sync_all()
    })
    .await
}

/// Makes a copy.
pub(super) async fn copy(from: &Path, to: &Path) -> Result<(), LabError> {
    let (source, copy) = (from.to_owned(), to.to_owned());
    blocking(to, move || {
        std::fs::copy(source, &copy)?;
        File::open(copy)?.sync_all()
    })
    .await
}

/// Writes other bytes into these clusters of an image.
pub(super) async fn change(image: &Path, clusters: Vec<u64>, seed: u64) -> Result<(), LabError> {
    let file = image.to_owned();
    blocking(image, move || {
        let mut noise = Noise::of(seed);
        let file = OpenOptions::new().write(true).open(file)?;
        let mut cluster = vec![0; usize::try_from(CLUSTER).expect("a cluster is short")];
        for number in clusters {
            noise.fill(&mut cluster);
            file.write_all_at(&cluster, number * CLUSTER)?;
        }
        file.sync_all()
    })
    .await
}

async fn blocking(file: &Path, work: impl FnOnce() -> io::Result<()> + Send + 'static) -> Result<(), LabError> {
    let failed = |source| LabError::file(file, source);
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|error| failed(error.into()))?.map_err(failed)
}

/// As many of a disk's clusters as the share says, each at a random place in its own part of the disk: in order, and none twice.
pub(super) fn clusters_to_change(disk_bytes: u64, share: f64, random: &mut Random) -> Vec<u64> {
    let all = disk_bytes / CLUSTER;
    let count = (all as f64 * share).round() as u64;
    let place = |number: u64| number * all / count;
    let chosen = (0..count).map(|number| {
        let (start, end) = (place(number), place(number + 1));
        start + (random.unit() * (end - start) as f64) as u64
    });
    chosen.collect()
}

/// Bytes that are the same for a seed.
struct Noise(blake3::OutputReader);

impl Noise {
    fn of(seed: u64) -> Self {
        Self(blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof())
    }

    fn fill(&mut self, bytes: &mut [u8]) {
        self.0.fill(bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_many_clusters_change_as_the_share_says_and_each_once() {
        for (clusters, share, count) in [(1000, 0.05, 50), (1000, 1.0, 1000), (7, 0.5, 4), (1000, 0.0, 0)] {
            let chosen = clusters_to_change(clusters * CLUSTER, share, &mut Random(1));
            assert_eq!(chosen.len(), count);
            assert!(chosen.windows(2).all(|pair| pair[0] < pair[1]), "{chosen:?}");
            assert!(chosen.iter().all(|cluster| *cluster < clusters));
        }
    }

    #[test]
    fn a_seed_gives_the_same_bytes_and_another_one_others() {
        let bytes = |seed| {
            let mut bytes = [0; 64];
            Noise::of(seed).fill(&mut bytes);
            bytes
        };
        assert_eq!(bytes(1), bytes(1));
        assert_ne!(bytes(1), bytes(2));
    }
}
