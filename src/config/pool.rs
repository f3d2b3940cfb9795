//! The tables `[[pool]]`: folders into which another site may put disks of VMs that it sends.

use std::path::PathBuf;

use super::section::Section;
use super::units::parse_name;
use super::{Config, parse_absolute};

/// A folder for images.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pool {
    /// What `--disk` calls it at other sites.
    pub name: String,
    /// The folder.
    pub path: PathBuf,
}

/// One table, and its mistakes beside those before it.
pub(super) fn read(mut section: Section<'_>, config: &mut Config) {
    let pool = Pool {
        name: section.required("name", parse_name).unwrap_or_default(),
        path: section.required("path", parse_absolute).unwrap_or_default(),
    };
    if !pool.name.is_empty() && config.pools.iter().any(|other| other.name == pool.name) {
        section.mistake("name", format!("the pool {:?} is there already", pool.name));
    }
    section.finish();
    config.pools.push(pool);
}
