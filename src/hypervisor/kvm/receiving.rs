//! Takes a guest in: its memory as it comes, then what is not memory, once the whole stream is there.

use std::io::BufReader;
use std::os::unix::net::UnixStream;

use super::clock;
use super::machine::Machine;
use super::mover::MoveError;
use super::state::MachineState;
use super::stream::Reader;
use crate::proto::page::PAGE_SIZE;

/// Bytes that are read at once.
const BUFFER: usize = 256 << 10;

/// Loads the guest that comes from `stream` into `machine`, where it stands afterwards.
pub(super) fn receive(machine: &Machine, stream: &UnixStream) -> Result<(), MoveError> {
    let ram = &machine.ram;
    let mut here = Box::new([0; PAGE_SIZE]);
    let reader = Reader::new(BufReader::with_capacity(BUFFER, stream));
    let state = reader.read(ram.blocks(), |at, content| {
        let block = usize::from(at.block);
        match content {
            Some(content) => ram.write(block, at.page, content),
            None => {
                ram.read(block, at.page, &mut here);
                // Zeroes that are written take memory, where those that are only read take none.
                if *here != [0; PAGE_SIZE] {
                    ram.write(block, at.page, &[0; PAGE_SIZE]);
                }
            }
        }
    })?;
    // Nothing of the machine is touched before all of it is known to be good.
    let saved = MachineState::decode(&state.machine)?;
    saved.check(&machine.kvm, &machine.vm, &*machine.vmm)?;
    saved.restore(&machine.vm, &*machine.vmm, clock::wall())?;
    machine.vmm.load_devices(&state.devices)?;
    Ok(())
}
