//! An operator's command line with placeholders.
//!
//! No shell ever sees it: a template is a list of arguments, and values are put inside single arguments. The only value that
//! can come from a peer is the VM's name. Values are validated so that QEMU, which splits arguments at commas, reads them as
//! one thing.

use std::path::{Path, PathBuf};

use super::SOCKET_PATH_LIMIT;

/// An operator's command line with placeholders `{qmp}`, `{vm}` and `{migration}`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LaunchTemplate {
    arguments: Vec<String>,
}

/// What is put in the place of the placeholders.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LaunchValues {
    vm: String,
    pub(super) qmp: PathBuf,
    migration: PathBuf,
}

/// A mistake in a template or its values.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TemplateError {
    /// Nothing to run.
    #[error("The command is empty.")]
    Empty,
    /// The program's name comes from a placeholder or looks like an option.
    #[error("The command's first word must be a program, not {0:?}.")]
    Program(String),
    /// A placeholder that does not exist.
    #[error("The command contains {{{0}}}; the placeholders are {{qmp}}, {{vm}} and {{migration}}.")]
    UnknownPlaceholder(String),
    /// A zero byte.
    #[error("The command contains a zero byte.")]
    ZeroByte,
    /// Without it the process could not be talked to.
    #[error("The command does not contain {{qmp}}, so its QEMU could not be controlled.")]
    NoMonitor,
    /// It would receive, or boot, before the gateway says so.
    #[error(
        "The command does not contain \"-incoming\" (or \"--incoming\"), \"defer\", so the gateway could not decide when the VM is \
         received."
    )]
    NotDeferred,
    /// It would run the VM as soon as it is loaded.
    #[error("The command does not contain \"-S\", so the VM would start before the gateways have agreed that it may.")]
    NotPaused,
    /// A VM name that could be taken for something else.
    #[error(
        "The VM name {0:?} cannot be used in a command: it must have 1 to 64 letters, digits, '.', '_' or '-', and begin \
         with a letter or digit."
    )]
    VmName(String),
    /// A path that QEMU or the kernel would take for something else.
    #[error(
        "The path {0:?} cannot be used in a command: it must be absolute, at most 107 bytes long, and consist of letters, \
         digits and \"/._-+@\"."
    )]
    SocketPath(String),
}

impl LaunchTemplate {
    /// Checks an operator's command: the program and its arguments.
    ///
    /// # Errors
    /// Every mistake.
    pub fn parse(arguments: Vec<String>) -> Result<LaunchTemplate, Vec<TemplateError>> {
        let Some(program) = arguments.first() else {
            return Err(vec![TemplateError::Empty]);
        };
        let mut mistakes = Vec::new();
        if program.is_empty() || program.starts_with('-') || program.contains(['{', '}']) {
            mistakes.push(TemplateError::Program(program.clone()));
        }
        if arguments.iter().any(|argument| argument.contains('\0')) {
            mistakes.push(TemplateError::ZeroByte);
        }
        let mut has_monitor = false;
        for piece in arguments.iter().flat_map(|argument| pieces(argument)) {
            match piece {
                Piece::Placeholder("qmp") => has_monitor = true,
                Piece::Placeholder("vm" | "migration") | Piece::Text(_) => {}
                Piece::Placeholder(other) => mistakes.push(TemplateError::UnknownPlaceholder(other.to_owned())),
            }
        }
        if !has_monitor {
            mistakes.push(TemplateError::NoMonitor);
        }
        // QEMU takes both, `longhaul guest` the longer one.
        let waits = [["-incoming", "defer"], ["--incoming", "defer"]];
        if !arguments.windows(2).any(|pair| waits.iter().any(|wait| pair == wait)) {
            mistakes.push(TemplateError::NotDeferred);
        }
        if !arguments.iter().any(|argument| argument == "-S") {
            mistakes.push(TemplateError::NotPaused);
        }
        if mistakes.is_empty() {
            Ok(LaunchTemplate { arguments })
        } else {
            Err(mistakes)
        }
    }

    /// Whether `text` is in one of its arguments.
    #[must_use]
    pub fn names(&self, text: &str) -> bool {
        self.arguments.iter().any(|argument| argument.contains(text))
    }

    /// The command line with its values.
    pub fn arguments(&self, values: &LaunchValues) -> Vec<String> {
        let filled = |argument: &String| -> String {
            pieces(argument)
                .map(|piece| match piece {
                    Piece::Text(text) => text,
                    Piece::Placeholder("qmp") => path_text(&values.qmp),
                    Piece::Placeholder("migration") => path_text(&values.migration),
                    Piece::Placeholder(_) => &values.vm,
                })
                .collect()
        };
        self.arguments.iter().map(filled).collect()
    }

    /// The program's name.
    pub(super) fn program(&self) -> &str {
        self.arguments.first().map_or("", String::as_str)
    }
}

impl LaunchValues {
    /// Checks values: the VM's name (which may come from a peer), the monitor's socket and the migration's socket.
    ///
    /// # Errors
    /// [`TemplateError::VmName`], [`TemplateError::SocketPath`].
    pub fn new(vm: &str, qmp: &Path, migration: &Path) -> Result<LaunchValues, TemplateError> {
        let is_name_byte = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
        let starts_well = vm.bytes().next().is_some_and(|byte| byte.is_ascii_alphanumeric());
        if !starts_well || vm.len() > VM_NAME_LIMIT || !vm.bytes().all(is_name_byte) {
            return Err(TemplateError::VmName(vm.chars().take(VM_NAME_LIMIT).collect()));
        }
        for path in [qmp, migration] {
            // A comma would begin another option of QEMU, a blank or quote mislead whoever reads a log.
            let is_path_byte = |byte: u8| byte.is_ascii_alphanumeric() || b"/._-+@".contains(&byte);
            let text = path.to_str().unwrap_or_default();
            if !path.is_absolute() || text.len() > SOCKET_PATH_LIMIT || !text.bytes().all(is_path_byte) {
                return Err(TemplateError::SocketPath(path.to_string_lossy().into_owned()));
            }
        }
        Ok(LaunchValues {
            vm: vm.to_owned(),
            qmp: qmp.to_owned(),
            migration: migration.to_owned(),
        })
    }
}

/// A part of an argument.
enum Piece<'a> {
    Text(&'a str),
    Placeholder(&'a str),
}

/// Splits at `{name}` where the name has only lower-case letters, digits and underscores. Other braces are text: QEMU takes
/// JSON in its arguments.
fn pieces(argument: &str) -> impl Iterator<Item = Piece<'_>> {
    let mut rest = argument;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let mut from = 0;
        while let Some(open) = rest[from..].find('{').map(|place| place + from) {
            let name = &rest[open + 1..];
            let length = name
                .bytes()
                .take_while(|byte| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'_'))
                .count();
            if length > 0 && name.as_bytes().get(length) == Some(&b'}') {
                let (text, placeholder) = (&rest[..open], &name[..length]);
                if !text.is_empty() {
                    rest = &rest[open..];
                    return Some(Piece::Text(text));
                }
                rest = &name[length + 1..];
                return Some(Piece::Placeholder(placeholder));
            }
            from = open + 1;
        }
        Some(Piece::Text(std::mem::take(&mut rest)))
    })
}

fn path_text(path: &Path) -> &str {
    path.to_str().expect("LaunchValues::new accepts only ASCII paths")
}

/// Longest VM name, in bytes.
const VM_NAME_LIMIT: usize = 64;

#[cfg(test)]
mod tests {
    use super::*;

    /// A command of these words, and of the words that each command needs.
    fn template(arguments: &[&str]) -> Result<LaunchTemplate, Vec<TemplateError>> {
        let words = arguments.iter().chain(&["-incoming", "defer", "-S"]);
        LaunchTemplate::parse(words.map(|&word| word.to_owned()).collect())
    }

    fn values() -> LaunchValues {
        LaunchValues::new("db-1", Path::new("/run/x/qmp"), Path::new("/run/x/mig")).unwrap()
    }

    #[test]
    fn placeholders_are_filled_once_and_json_is_left_alone() {
        let template = template(&[
            "qemu",
            "-name",
            "{vm}",
            "-qmp",
            "unix:{qmp},server=on",
            "{\"driver\":\"x\"}",
            "{vm}{vm}",
            "{{vm}}",
            "{",
            "x{Y}",
        ]);
        let filled = template.unwrap().arguments(&values());
        let wanted = [
            "qemu",
            "-name",
            "db-1",
            "-qmp",
            "unix:/run/x/qmp,server=on",
            "{\"driver\":\"x\"}",
            "db-1db-1",
            "{db-1}",
            "{",
            "x{Y}",
            "-incoming",
            "defer",
            "-S",
        ];
        assert_eq!(filled, wanted);
    }

    #[test]
    fn every_mistake_in_a_template_is_named() {
        let one = |mistake: TemplateError| Err(vec![mistake]);
        assert_eq!(LaunchTemplate::parse(vec![]), one(TemplateError::Empty));
        assert_eq!(template(&["{vm}", "{qmp}"]), one(TemplateError::Program("{vm}".into())));
        assert_eq!(template(&["", "{qmp}"]), one(TemplateError::Program(String::new())));
        assert_eq!(
            template(&["--wait", "{qmp}"]),
            one(TemplateError::Program("--wait".into()))
        );
        assert_eq!(template(&["qemu", "{vm}"]), one(TemplateError::NoMonitor));
        assert_eq!(template(&["qemu", "{qmp}\0"]), one(TemplateError::ZeroByte));
        let words = ["-x", "{qpm}", "{id}", "-incoming", "tcp:0:1", "defer"];
        let all = LaunchTemplate::parse(words.map(str::to_owned).to_vec()).unwrap_err();
        let wanted = [
            TemplateError::Program("-x".into()),
            TemplateError::UnknownPlaceholder("qpm".into()),
            TemplateError::UnknownPlaceholder("id".into()),
            TemplateError::NoMonitor,
            TemplateError::NotDeferred,
            TemplateError::NotPaused,
        ];
        assert_eq!(all, wanted);
        assert!(
            all[1]
                .to_string()
                .contains("contains {qpm}; the placeholders are {qmp}")
        );
    }

    #[test]
    fn a_vm_name_that_could_mean_something_else_is_refused() {
        let with = |name: &str| LaunchValues::new(name, Path::new("/a"), Path::new("/b"));
        assert!(with(&"a".repeat(64)).is_ok());
        let too_long = "a".repeat(65);
        for name in [
            "",
            "-x",
            ".x",
            "a,b",
            "a b",
            "a/b",
            "a\n",
            "{qmp}",
            "ä",
            too_long.as_str(),
        ] {
            assert!(matches!(with(name), Err(TemplateError::VmName(_))), "{name:?}");
        }
    }

    #[test]
    fn a_socket_path_that_qemu_would_misread_is_refused() {
        let with = |path: &str| LaunchValues::new("x", Path::new(path), Path::new("/b"));
        assert!(with(&format!("/{}", "a".repeat(106))).is_ok());
        let too_long = format!("/{}", "a".repeat(107));
        for path in ["relative", "/a,b", "/a b", "/ä", "/{vm}", too_long.as_str()] {
            assert!(matches!(with(path), Err(TemplateError::SocketPath(_))), "{path:?}");
        }
    }
}
