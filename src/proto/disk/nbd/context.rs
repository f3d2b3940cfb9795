//! What can be asked about a disk beside its bytes.

/// A metadata context (section *Metadata querying*).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MetaContext {
    /// `base:allocation`: what is allocated, and what is zero. See [`Allocation`](crate::proto::disk::extents::Allocation).
    Allocation,
    /// `qemu:dirty-bitmap:NAME`: what was written since the bitmap of that name began. The export must name the bitmap
    /// (`block-export-add` with `bitmaps`). See [`Dirtiness`](crate::proto::disk::extents::Dirtiness).
    DirtyBitmap(String),
}

impl MetaContext {
    /// Its name in the protocol.
    #[must_use]
    pub fn name(&self) -> String {
        match self {
            Self::Allocation => "base:allocation".to_owned(),
            Self::DirtyBitmap(bitmap) => format!("qemu:dirty-bitmap:{bitmap}"),
        }
    }
}
