use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use rustix::event::poll;
use rustix::fs::Timespec;
use tempfile::TempDir;

use super::dials::word;
use super::layout::{COUNTERS, COUNTERS_SIZE, PARAMETERS, TABLE, WORKING_SET, counter, parameter};
use super::*;
use crate::hypervisor::kvm::vmm::{Vmm, VmmError};
use crate::proto::page::PAGE_SIZE;

/// A guest whose lines go to a file.
struct Running {
    vmm: Arc<DemoVmm>,
    dials: Dials,
    directory: TempDir,
}

impl Running {
    /// `None`: this host has no KVM, which is said.
    fn start(vcpus: usize, dials: Dials) -> Option<Running> {
        let running = Running::load(vcpus, dials)?;
        running.vmm.start().unwrap();
        Some(running)
    }

    fn load(vcpus: usize, dials: Dials) -> Option<Running> {
        let directory = tempfile::tempdir().unwrap();
        let config = DemoConfig {
            guest: Some(dials.clone()),
            ..machine(vcpus, directory.path().join("lines"))
        };
        match DemoVmm::new(config) {
            Ok(vmm) => Some(Running { vmm, dials, directory }),
            Err(error @ DemoError::NoKvm(_)) => {
                println!("SKIP: {error}");
                None
            }
            Err(error) => panic!("{error}"),
        }
    }

    fn lines(&self) -> Vec<String> {
        let text = fs::read_to_string(self.directory.path().join("lines")).unwrap();
        text.lines().map(str::to_owned).collect()
    }

    fn pages(&self) -> u64 {
        self.vmm.counters().pages
    }

    /// The page that a vCPU writes, or wrote last.
    fn in_hand(&self, vcpu: usize) -> u64 {
        let mut page = [0; PAGE_SIZE];
        self.vmm.ram().read(0, COUNTERS / PAGE_SIZE as u64, &mut page);
        word(&page, vcpu * COUNTERS_SIZE as usize + counter::WRITING)
    }

    fn verify(&self) -> Result<u64, CheckError> {
        verify(&self.vmm.ram(), &self.dials)
    }

    /// Waits for `condition`, for as long as the guest does not fail.
    fn until(&self, what: &str, condition: impl Fn(&Counters) -> bool) -> Counters {
        for _ in 0..12_000 {
            let counters = self.vmm.counters();
            if condition(&counters) {
                return counters;
            }
            assert_eq!(self.vmm.failure(), None);
            pause(Duration::from_millis(5));
        }
        panic!("{what} does not happen: {:?}", self.vmm.counters());
    }
}

fn machine(vcpus: usize, lines: PathBuf) -> DemoConfig {
    DemoConfig {
        memory_bytes: SMALLEST_MEMORY,
        vcpus,
        has_pit: true,
        guest: None,
        serial: SerialOutput::File(lines),
        heartbeat: None,
    }
}

/// As fast as it goes, over a few pages, so that each is written often.
fn busy() -> Dials {
    Dials {
        working_set_bytes: 256 << 10,
        pages_per_second: 0,
        ..Dials::default()
    }
}

fn pause(time: Duration) {
    let time = Timespec::try_from(time).unwrap();
    let _ = poll(&mut [], Some(&time));
}

#[test]
fn a_guest_counts_pages_and_ticks_without_an_error_and_says_so() {
    for vcpus in [1, 2, 4] {
        let Some(guest) = Running::start(vcpus, busy()) else {
            return;
        };
        let counters = guest.until("work of every vCPU", |now| {
            let is_busy = now.vcpus.iter().all(|vcpu| vcpu.pages > 200 && vcpu.ticks > 2);
            is_busy && guest.lines().len() >= 2
        });
        guest.vmm.pause().unwrap();
        assert_eq!((counters.errors, counters.vcpus.len()), (0, vcpus));
        assert_eq!(guest.verify(), Ok(64));
        let lines = guest.lines();
        assert!(lines[0].starts_with("beat 1 pages "), "{lines:?}");
        let words: Vec<_> = lines[1].split(' ').collect();
        assert_eq!((words[0], words[1], words[4], words[5]), ("beat", "2", "errors", "0"));
        assert_eq!((words[6], words.len()), ("ticks", 8));
        assert!(words[3].parse::<u64>().unwrap() > 0 && words[7].parse::<u64>().unwrap() > 0);
    }
}

#[test]
fn a_paused_guest_stands_and_goes_on_after_it() {
    let Some(guest) = Running::start(2, busy()) else {
        return;
    };
    for _ in 0..50 {
        let before = guest.pages();
        guest.until("progress", |now| now.pages > before);
        guest.vmm.pause().unwrap();
        let standing = guest.vmm.counters();
        pause(Duration::from_millis(2));
        assert_eq!(guest.vmm.counters(), standing);
        assert_eq!(guest.verify(), Ok(64));
        guest.vmm.resume().unwrap();
    }
    assert_eq!(guest.vmm.counters().errors, 0);
}

#[test]
fn vcpus_are_shown_while_the_guest_runs_and_while_it_stands() {
    let Some(guest) = Running::start(3, busy()) else {
        return;
    };
    let visit = || {
        let mut seen = Vec::new();
        let mut look = |number: usize, vcpu: &mut kvm_ioctls::VcpuFd| {
            let registers = vcpu.get_regs().map_err(|error| VmmError(error.to_string()))?;
            let counters = COUNTERS + number as u64 * COUNTERS_SIZE;
            assert_eq!(registers.r12, counters);
            seen.push(number);
            Ok(())
        };
        guest.vmm.visit_vcpus(&mut look).unwrap();
        seen
    };
    for _ in 0..50 {
        assert_eq!(visit(), [0, 1, 2]);
    }
    let before = guest.vmm.counters();
    guest.until("progress after visits", |now| {
        (0..3).all(|number| now.vcpus[number].pages > before.vcpus[number].pages)
    });
    guest.vmm.pause().unwrap();
    let standing = guest.vmm.counters();
    assert_eq!(visit(), [0, 1, 2]);
    assert_eq!(guest.vmm.counters(), standing);
    let refused = guest
        .vmm
        .visit_vcpus(&mut |number, _| Err(VmmError(number.to_string())));
    assert_eq!(refused, Err(VmmError("0".into())));
    guest.vmm.resume().unwrap();
    guest.until("progress after a refused visit", |now| now.pages > standing.pages);
    assert_eq!(guest.vmm.counters().errors, 0);
}

#[test]
fn a_line_is_whole_however_often_its_writer_is_interrupted() {
    let Some(guest) = Running::load(1, busy()) else {
        return;
    };
    // A line in every two milliseconds.
    let ram = guest.vmm.ram();
    let mut page = [0; PAGE_SIZE];
    ram.read(0, PARAMETERS / PAGE_SIZE as u64, &mut page);
    let second = &mut page[parameter::SECOND..parameter::SECOND + 8];
    let cycles = u64::from_le_bytes(second.try_into().unwrap());
    second.copy_from_slice(&(cycles / 500).to_le_bytes());
    ram.write(0, PARAMETERS / PAGE_SIZE as u64, &page);
    guest.vmm.start().unwrap();
    // An access to the port that was not complete would be made once more, or be lost.
    let mut put_back = |_: usize, vcpu: &mut kvm_ioctls::VcpuFd| {
        let registers = vcpu.get_regs().unwrap();
        vcpu.set_regs(&registers).unwrap();
        Ok(())
    };
    for turn in 0.. {
        if guest.vmm.counters().beats >= 100 {
            break;
        }
        guest.vmm.visit_vcpus(&mut put_back).unwrap();
        assert_eq!(guest.vmm.failure(), None);
        // A vCPU that is called out before it got anywhere needs a moment to itself now and then.
        if turn % 100 == 99 {
            pause(Duration::from_millis(1));
        }
        assert!(turn < 1_000_000, "{:?}", guest.vmm.counters());
    }
    guest.vmm.pause().unwrap();
    let lines = guest.lines();
    assert!(lines.len() >= 99);
    for (number, line) in lines.iter().enumerate() {
        let words: Vec<_> = line.split(' ').collect();
        assert_eq!(words[..2], ["beat", &(number + 1).to_string()], "{line}");
        assert_eq!(
            (words[2], words[4], words[5], words[6]),
            ("pages", "errors", "0", "ticks"),
            "{line}"
        );
        assert!(
            words[3].parse::<u64>().is_ok() && words[7].parse::<u64>().is_ok(),
            "{line}"
        );
    }
}

#[test]
fn every_vcpu_has_a_thread_of_this_process() {
    let Some(guest) = Running::load(2, busy()) else {
        return;
    };
    let threads = guest.vmm.vcpu_threads();
    assert_eq!(threads.len(), 2);
    for (number, thread) in threads.iter().enumerate() {
        let name = fs::read_to_string(format!("/proc/self/task/{thread}/comm")).unwrap();
        assert_eq!(name.trim(), format!("vcpu{number}"));
    }
}

#[test]
fn one_page_of_an_older_time_is_found_by_the_guest_and_from_outside() {
    let Some(guest) = Running::start(2, busy()) else {
        return;
    };
    let ram = guest.vmm.ram();
    // Of the second vCPU's share.
    let place = WORKING_SET / PAGE_SIZE as u64 + 40;
    let mut old = [0; PAGE_SIZE];
    guest.vmm.pause().unwrap();
    ram.read(0, place, &mut old);
    guest.vmm.resume().unwrap();
    let before = guest.vmm.counters().vcpus[1].pages;
    guest.until("two more passes", |now| now.vcpus[1].pages > before + 64);
    guest.vmm.pause().unwrap();
    // One that it has in hand would be half checked already.
    for turn in 0.. {
        if guest.in_hand(1) != 40 {
            break;
        }
        assert!(turn < 1000, "vCPU 1 stands still");
        guest.vmm.resume().unwrap();
        pause(Duration::from_millis(5));
        guest.vmm.pause().unwrap();
    }
    assert_eq!(guest.verify(), Ok(64));
    ram.write(0, place, &old);
    assert!(matches!(guest.verify(), Err(CheckError::Page { page: 40, .. })));
    guest.vmm.resume().unwrap();
    let counters = guest.until("an error", |now| now.errors > 0);
    assert_eq!((counters.vcpus[0].errors, counters.vcpus[1].errors), (0, 1));
    // It is counted before the page is whole again.
    guest.until("the next page", |now| now.vcpus[1].pages > counters.vcpus[1].pages + 1);
    guest.vmm.pause().unwrap();
    assert_eq!(guest.verify(), Ok(64));
}

#[test]
fn pages_and_table_that_are_both_of_an_older_time_are_found() {
    let Some(guest) = Running::load(1, busy()) else {
        return;
    };
    let ram = guest.vmm.ram();
    let first = WORKING_SET / PAGE_SIZE as u64;
    let places: Vec<u64> = (first..first + 64).chain([TABLE / PAGE_SIZE as u64]).collect();
    let old: Vec<_> = places
        .iter()
        .map(|&place| {
            let mut page = [0; PAGE_SIZE];
            ram.read(0, place, &mut page);
            page
        })
        .collect();
    guest.vmm.start().unwrap();
    guest.until("more than one pass", |now| now.pages > 100);
    guest.vmm.pause().unwrap();
    places
        .iter()
        .zip(&old)
        .for_each(|(&place, page)| ram.write(0, place, page));
    assert!(matches!(guest.verify(), Err(CheckError::Table { vcpu: 0, .. })));
    guest.vmm.resume().unwrap();
    guest.until("an error", |now| now.errors > 0);
}

#[test]
fn a_dial_of_the_rate_slows_the_guest_down() {
    let dials = Dials {
        pages_per_second: 100,
        ..busy()
    };
    let Some(guest) = Running::start(2, dials) else {
        return;
    };
    // By the guest's own clock: a beat is a second.
    let counters = guest.until("three beats", |now| now.beats >= 3);
    let a_beat = counters.pages / counters.beats;
    assert!((50..=800).contains(&a_beat), "{counters:?}");
    assert_eq!(counters.errors, 0);
}

#[test]
fn a_skewed_guest_writes_mostly_to_the_first_tenth() {
    let dials = Dials {
        skew_percent: 90,
        working_set_bytes: 100 * 4096,
        bytes_per_page: 8,
        ..busy()
    };
    let Some(guest) = Running::start(1, dials) else {
        return;
    };
    guest.until("some writes", |now| now.pages > 2000);
    guest.vmm.pause().unwrap();
    assert_eq!(guest.verify(), Ok(100));
    let mut table = [0; PAGE_SIZE];
    guest.vmm.ram().read(0, TABLE / PAGE_SIZE as u64, &mut table);
    let generations: Vec<u64> = table
        .chunks_exact(4)
        .map(|entry| u64::from(u32::from_le_bytes(entry.try_into().unwrap())))
        .collect();
    let (hot, all) = (generations[..10].iter().sum::<u64>(), generations.iter().sum::<u64>());
    assert!((85..=95).contains(&(hot * 100 / all)), "{hot} of {all}");
    assert!(
        generations[10..100].iter().all(|&times| times > 0) || all < 4000,
        "{generations:?}"
    );
}

#[test]
fn every_content_is_there_at_the_beginning_and_is_kept() {
    for content in [Content::Zero, Content::Text, Content::Random] {
        for bytes_per_page in [8, 100, 4096] {
            let dials = Dials {
                content,
                bytes_per_page,
                seed: 99,
                // One page for each vCPU, and some that differ in number.
                working_set_bytes: 7 * 4096,
                ..busy()
            };
            let Some(guest) = Running::load(2, dials) else {
                return;
            };
            assert_eq!(guest.verify(), Ok(7));
            guest.vmm.start().unwrap();
            guest.until("some writes", |now| now.pages > 100);
            guest.vmm.pause().unwrap();
            assert_eq!((guest.verify(), guest.vmm.counters().errors), (Ok(7), 0));
        }
    }
}

#[test]
fn an_instruction_that_leads_nowhere_stops_the_guest_with_its_place() {
    let Some(guest) = Running::start(2, busy()) else {
        return;
    };
    guest.until("work", |now| now.pages > 10);
    let mut stray = |number: usize, vcpu: &mut kvm_ioctls::VcpuFd| {
        let mut registers = vcpu.get_regs().unwrap();
        if number == 1 {
            registers.rip = 1 << 40;
            vcpu.set_regs(&registers).unwrap();
        }
        Ok(())
    };
    guest.vmm.visit_vcpus(&mut stray).unwrap();
    let failure = (0..12_000).find_map(|_| {
        pause(Duration::from_millis(5));
        guest.vmm.failure()
    });
    let failure = failure.unwrap();
    // KVM on AMD's CPUs resets a vCPU that has shut down, and says 0xfff0.
    let begins = "vCPU 1 of the guest ended at rip 0x";
    assert!(failure.0.starts_with(begins) && failure.0.contains(" by "), "{failure}");
    guest.vmm.pause().unwrap();
    assert_eq!(guest.vmm.resume(), Err(failure.clone()));
    guest.vmm.quit();
    assert_eq!(guest.vmm.wait(), Err(failure));
}

#[test]
fn waiting_ends_when_somebody_quits() {
    let Some(guest) = Running::start(2, busy()) else {
        return;
    };
    let vmm = guest.vmm.clone();
    let waiting = std::thread::spawn(move || vmm.wait());
    guest.until("work", |now| now.pages > 10);
    guest.vmm.quit();
    assert_eq!(waiting.join().unwrap(), Ok(()));
    assert!(guest.vmm.resume().is_err());
    guest.vmm.pause().unwrap();
}

#[test]
fn a_guest_goes_on_in_another_machine() {
    let Some(source) = Running::start(2, busy()) else {
        return;
    };
    source.until("a beat", |now| now.beats > 0);
    let directory = tempfile::tempdir().unwrap();
    let empty = DemoVmm::new(machine(2, directory.path().join("lines"))).unwrap();
    assert_eq!(verify(&empty.ram(), &source.dials), Err(CheckError::NoGuest));
    assert_eq!(empty.counters(), Counters::default());
    source.vmm.pause().unwrap();
    copy_machine(&source.vmm, &empty);
    let destination = Running {
        vmm: empty,
        dials: source.dials.clone(),
        directory,
    };
    let before = destination.vmm.counters();
    assert_eq!(before, source.vmm.counters());
    assert_eq!(destination.verify(), Ok(64));
    destination.vmm.announce();
    destination.vmm.start().unwrap();
    let after = destination.until("beats at the destination", |now| {
        now.beats > before.beats + 1 && (0..2).all(|number| now.vcpus[number].ticks > before.vcpus[number].ticks + 2)
    });
    destination.vmm.pause().unwrap();
    assert_eq!((after.errors, destination.verify()), (0, Ok(64)));
    let line = destination.lines().pop().unwrap();
    assert!(line.starts_with("beat "), "{line}");
}

/// What a migration carries, as far as this guest needs it.
fn copy_machine(source: &DemoVmm, destination: &DemoVmm) {
    let (from, to) = (source.ram(), destination.ram());
    let mut page = [0; PAGE_SIZE];
    for number in 0..from.blocks()[0].len / PAGE_SIZE as u64 {
        from.read(0, number, &mut page);
        to.write(0, number, &page);
    }
    let mut vcpus = Vec::new();
    let mut take = |_: usize, vcpu: &mut kvm_ioctls::VcpuFd| {
        let (registers, special) = (vcpu.get_regs().unwrap(), vcpu.get_sregs().unwrap());
        vcpus.push((
            registers,
            special,
            vcpu.get_lapic().unwrap(),
            vcpu.get_mp_state().unwrap(),
        ));
        Ok(())
    };
    source.visit_vcpus(&mut take).unwrap();
    let mut give = |number: usize, vcpu: &mut kvm_ioctls::VcpuFd| {
        let (registers, special, controller, state) = &vcpus[number];
        vcpu.set_sregs(special).unwrap();
        vcpu.set_regs(registers).unwrap();
        vcpu.set_lapic(controller).unwrap();
        vcpu.set_mp_state(*state).unwrap();
        Ok(())
    };
    destination.visit_vcpus(&mut give).unwrap();
    destination.load_devices(&source.save_devices().unwrap()).unwrap();
}

#[test]
fn machines_that_cannot_be_are_refused() {
    let lines = PathBuf::from("/dev/null");
    let refused = |config| DemoVmm::new(config).err().unwrap();
    assert!(matches!(refused(machine(0, lines.clone())), DemoError::Vcpus(0)));
    assert!(matches!(refused(machine(17, lines.clone())), DemoError::Vcpus(17)));
    for memory_bytes in [
        0,
        SMALLEST_MEMORY - 4096,
        SMALLEST_MEMORY + 1,
        LARGEST_MEMORY + 4096,
        u64::MAX,
    ] {
        let config = DemoConfig {
            memory_bytes,
            ..machine(1, lines.clone())
        };
        assert!(matches!(refused(config), DemoError::MemorySize(_)));
    }
    let dials = [
        Dials {
            working_set_bytes: 4096,
            ..busy()
        },
        Dials {
            working_set_bytes: SMALLEST_MEMORY,
            ..busy()
        },
        Dials {
            working_set_bytes: 8193,
            ..busy()
        },
        Dials {
            pages_per_second: u64::MAX,
            ..busy()
        },
        Dials {
            skew_percent: 101,
            ..busy()
        },
        Dials {
            bytes_per_page: 7,
            ..busy()
        },
        Dials {
            bytes_per_page: 4097,
            ..busy()
        },
    ];
    for dials in dials {
        let config = DemoConfig {
            guest: Some(dials.clone()),
            ..machine(2, lines.clone())
        };
        assert!(matches!(refused(config), DemoError::Dial(_)), "{dials:?}");
    }
}
