//! What a journal record says about the vmm of a migration, so that a restarted gateway finds it again.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::hypervisor::process::ProcessIdentity;
use crate::hypervisor::qemu::RememberedSettings;
use crate::proto::ownership::JournalRecord;

/// How to find a vmm again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct VmContext {
    /// Its QMP socket.
    pub(crate) qmp: PathBuf,
    /// Its process, once that is known: a recycled pid is told apart by its start time.
    pub(crate) process: Option<ProcessIdentity>,
    /// Whether the paused vmm stays after success.
    #[serde(default)]
    pub(crate) leave_after_success: bool,
    /// Migration settings that are changed and have to be put back: at the source where the VM stays, at the destination once it runs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) settings: Option<RememberedSettings>,
    /// The VM is off: there is no process, and what migrates is its images.
    #[serde(default, skip_serializing_if = "is_false")]
    pub(crate) is_off: bool,
    /// At the source, and of a VM that is off at both ends: files of the disks that are copied.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) images: Vec<PathBuf>,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "as serde calls it")]
fn is_false(value: &bool) -> bool {
    !value
}

impl VmContext {
    /// Of a VM that is off.
    pub(crate) fn off(qmp: &Path, images: Vec<PathBuf>) -> Self {
        Self {
            qmp: qmp.to_owned(),
            process: None,
            leave_after_success: false,
            settings: None,
            is_off: true,
            images,
        }
    }

    /// Nothing of it is lost in a record.
    ///
    /// # Errors
    /// A sentence.
    pub(crate) fn check_fits(&self) -> Result<(), String> {
        match Self::from_bytes(&self.to_bytes()).as_ref() == Some(self) {
            true => Ok(()),
            false => Err("the paths of its images are too long together to be noted: use shorter ones".to_owned()),
        }
    }

    /// The bytes that go into a record.
    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = serde_json::to_vec(self).expect("a context is plain data");
        if bytes.len() > JournalRecord::MAX_CONTEXT && self.settings.is_some() {
            // Strange settings are lost rather than the way to the vmm.
            return Self {
                settings: None,
                ..self.clone()
            }
            .to_bytes();
        }
        if bytes.len() > JournalRecord::MAX_CONTEXT && !self.images.is_empty() {
            // They stay, unmarked, for a person to look at.
            return Self {
                images: Vec::new(),
                ..self.clone()
            }
            .to_bytes();
        }
        if bytes.len() > JournalRecord::MAX_CONTEXT {
            // Only an absurdly long socket path gets here, and configuration refuses those; the process still leads to the vmm.
            let short = Self {
                qmp: PathBuf::new(),
                ..self.clone()
            };
            bytes = serde_json::to_vec(&short).expect("a context is plain data");
        }
        bytes
    }

    /// The context in a record; `None` where the record has none, as those for unknown migrations.
    pub(crate) fn from_bytes(bytes: &[u8]) -> Option<Self> {
        serde_json::from_slice(bytes).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hypervisor::qemu::ParameterValue;

    #[test]
    fn settings_give_way_where_they_do_not_fit_a_record() {
        let context = |text: String| VmContext {
            qmp: "/run/vm.qmp".into(),
            process: None,
            leave_after_success: true,
            settings: Some(RememberedSettings {
                capabilities: vec![("events".to_owned(), false)],
                parameters: vec![("tls-creds".to_owned(), ParameterValue::Text(text))],
            }),
            is_off: false,
            images: vec!["/pool/vm.qcow2".into()],
        };
        let usual = context("creds".to_owned());
        assert_eq!(VmContext::from_bytes(&usual.to_bytes()), Some(usual));
        let strange = context("x".repeat(JournalRecord::MAX_CONTEXT));
        let without = VmContext {
            settings: None,
            ..strange.clone()
        };
        assert_eq!(VmContext::from_bytes(&strange.to_bytes()), Some(without));
    }
}
