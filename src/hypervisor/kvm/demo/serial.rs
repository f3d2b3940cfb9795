//! The guest's serial port: takes whole lines out.

use std::fs::OpenOptions;
use std::io::{self, Write};
use std::sync::mpsc::{SyncSender, TrySendError};

use super::{DemoError, SerialOutput};
use crate::hypervisor::kvm::vmm::VmmError;

/// COM1. Only its data register does anything, and its transmitter is always empty.
pub(super) struct Serial {
    /// What the guest has written since the last end of a line.
    line: Vec<u8>,
    output: Box<dyn Write + Send>,
    is_broken: bool,
}

impl Serial {
    pub(super) fn open(output: &SerialOutput) -> Result<Self, DemoError> {
        let output: Box<dyn Write + Send> = match output {
            SerialOutput::Stdout => Box::new(Lines::to_stdout()?),
            SerialOutput::File(path) => {
                let file = OpenOptions::new().create(true).append(true).open(path);
                Box::new(file.map_err(|source| DemoError::Serial {
                    path: path.clone(),
                    source,
                })?)
            }
        };
        Ok(Self {
            line: Vec::new(),
            output,
            is_broken: false,
        })
    }

    /// The guest writes to a port.
    pub(super) fn write(&mut self, port: u16, bytes: &[u8]) {
        if port != DATA {
            return;
        }
        for &byte in bytes {
            self.line.push(byte);
            if byte == b'\n' || self.line.len() == LONGEST_LINE {
                self.put_out();
            }
        }
    }

    /// The guest reads from a port.
    pub(super) fn read(port: u16, into: &mut [u8]) {
        into.fill(if port == LINE_STATUS { TRANSMITTER_EMPTY } else { 0xff });
    }

    /// What has not been put out: the line that goes on at the destination.
    pub(super) fn save(&self) -> Vec<u8> {
        let mut state = vec![VERSION];
        state.extend_from_slice(&self.line);
        state
    }

    pub(super) fn load(&mut self, state: &[u8]) -> Result<(), VmmError> {
        match state {
            [VERSION, line @ ..] if line.len() < LONGEST_LINE => {
                self.line = line.to_vec();
                Ok(())
            }
            [VERSION, ..] => Err(VmmError("The serial port's line is longer than any can be.".into())),
            _ => Err(VmmError(
                "The state of the demo guest's devices is of another version of longhaul.".into(),
            )),
        }
    }

    /// A guest does not fail for want of a listener.
    fn put_out(&mut self) {
        let outcome = self.output.write_all(&self.line).and_then(|()| self.output.flush());
        self.line.clear();
        match outcome {
            Ok(()) => self.is_broken = false,
            Err(error) if !self.is_broken => {
                self.is_broken = true;
                tracing::warn!(%error, "lines of the guest are lost");
            }
            Err(_) => {}
        }
    }
}

/// Standard output that nobody may be reading: the guest does not wait for it.
struct Lines(SyncSender<Vec<u8>>);

impl Lines {
    fn to_stdout() -> Result<Self, DemoError> {
        let (lines, waiting) = std::sync::mpsc::sync_channel::<Vec<u8>>(LINES);
        let thread = std::thread::Builder::new().name("stdout".to_owned());
        let write = move || {
            for line in waiting {
                let mut out = io::stdout();
                if let Err(error) = out.write_all(&line).and_then(|()| out.flush()) {
                    tracing::warn!(%error, "lines of the guest are lost");
                    return;
                }
            }
        };
        thread.spawn(write).map_err(DemoError::Thread)?;
        Ok(Self(lines))
    }
}

impl Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self.0.try_send(bytes.to_vec()) {
            Ok(()) | Err(TrySendError::Disconnected(_)) => Ok(bytes.len()),
            Err(TrySendError::Full(_)) => Err(io::ErrorKind::WouldBlock.into()),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Lines that wait for whoever reads standard output.
const LINES: usize = 256;
const DATA: u16 = 0x3f8;
const LINE_STATUS: u16 = 0x3fd;
const TRANSMITTER_EMPTY: u8 = 0x60;
/// A longer one is put out in parts.
const LONGEST_LINE: usize = 256;
const VERSION: u8 = 1;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_begun_at_the_source_is_put_out_at_the_destination() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("lines");
        let open = || Serial::open(&SerialOutput::File(path.clone())).unwrap();
        let mut source = open();
        source.write(DATA, b"one\ntw");
        source.write(DATA + 1, b"ignored");
        let mut destination = open();
        destination.load(&source.save()).unwrap();
        destination.write(DATA, b"o\nthree");
        assert_eq!(std::fs::read(&path).unwrap(), b"one\ntwo\n");
    }

    #[test]
    fn state_of_another_version_or_too_much_of_it_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let mut serial = Serial::open(&SerialOutput::File(directory.path().join("lines"))).unwrap();
        assert!(serial.load(&[]).is_err());
        assert!(serial.load(&[VERSION + 1]).is_err());
        assert!(serial.load(&[VERSION; LONGEST_LINE + 1]).is_err());
        assert!(serial.load(&[VERSION; LONGEST_LINE]).is_ok());
    }
}
