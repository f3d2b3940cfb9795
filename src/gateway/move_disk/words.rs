//! What a person has to do once a disk is moved: whatever starts the VM still names the old image.

use std::path::Path;

use crate::config::Vm;

/// Sentences for the operator, the most important first.
pub(super) fn todo(vm: &Vm, disk: &str, from: Option<&Path>, to: &Path, format: &str) -> Vec<String> {
    let new = to.display();
    let mut todo = Vec::new();
    let old = from.map_or_else(|| "the old image".to_owned(), |from| from.display().to_string());
    todo.push(format!(
        "whatever starts {} must name {new} ({format}) in the place of {old} from now on: with the old one the guest would run on what is not \
         its disk any more",
        vm.name
    ));
    if let Some(image) = vm.images.iter().find(|image| image.disk == disk && image.path != to) {
        todo.push(format!(
            "[[vm.image]] of {disk} in this gateway's configuration names {}: say path = \"{new}\" and format = \"{format}\"",
            image.path.display()
        ));
    }
    let names = |from: &Path| {
        vm.command
            .as_ref()
            .is_some_and(|command| command.names(&from.to_string_lossy()))
    };
    if from.is_some_and(names) {
        todo.push(format!(
            "`command` of {} in this gateway's configuration names {old} too",
            vm.name
        ));
    }
    todo
}

/// Why a copy failed, in one sentence.
pub(super) fn failure(error: &str, to: &Path, operation: Option<&str>) -> String {
    let to = to.display();
    match operation {
        _ if error.contains("No space left") => format!(
            "there is no room left for {to}: make room there or choose another place; what was copied is removed again"
        ),
        Some("read") => format!("the old image cannot be read: {error}; what was copied is removed again"),
        _ => format!("{to} cannot be written: {error}; what was copied is removed again"),
    }
}
