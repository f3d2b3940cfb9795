//! TUN devices with segmentation offload.

#![expect(unsafe_code, reason = "ioctls on TUN devices have no safe wrapper")]

use std::io::{self, IoSlice};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{Mode, OFlags};
use rustix::ioctl::{IntegerSetter, Setter, Updater, opcode};
use rustix::net::{AddressFamily, SocketType};

/// One end of the link: what the kernel sends out by the device is read here, and what is written here it receives.
#[derive(Debug)]
pub(super) struct Tun {
    file: OwnedFd,
}

impl Tun {
    /// Attaches to the device `name` of this thread's network namespace, creating it where it does not exist, with TCP and
    /// UDP trains (USO needs Linux 6.2). Reads do not block.
    pub(super) fn attach(name: &str) -> io::Result<Self> {
        let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = rustix::fs::open("/dev/net/tun", flags, Mode::empty())?;
        let request = InterfaceRequest::new(name, IFF_TUN | IFF_NO_PI | IFF_VNET_HDR)?;
        // SAFETY: TUNSETIFF reads a `struct ifreq`, which InterfaceRequest mirrors in size and layout, and keeps no pointer.
        unsafe { rustix::ioctl::ioctl(&file, Setter::<TUNSETIFF, InterfaceRequest>::new(request))? };
        // SAFETY: TUNSETOFFLOAD takes its flags by value and touches no memory of ours.
        unsafe { rustix::ioctl::ioctl(&file, IntegerSetter::<TUNSETOFFLOAD>::new_usize(OFFLOADS))? };
        Ok(Self { file })
    }

    /// Reads one frame: an offload header and an IP packet.
    pub(super) fn read(&self, frame: &mut [u8]) -> io::Result<usize> {
        Ok(rustix::io::read(&self.file, frame)?)
    }

    /// Writes one frame, given in parts.
    pub(super) fn write(&self, parts: &[IoSlice<'_>]) -> io::Result<usize> {
        Ok(rustix::io::writev(&self.file, parts)?)
    }
}

impl AsFd for Tun {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// Sets the device `name` of this thread's network namespace up. It has to be attached already: a device that gets its
/// carrier later drops what is sent until the kernel's link watch comes round.
pub(super) fn set_up(name: &str) -> io::Result<()> {
    let socket = rustix::net::socket(AddressFamily::INET, SocketType::DGRAM, None)?;
    let mut request = InterfaceRequest::new(name, 0)?;
    // SAFETY: SIOCGIFFLAGS reads the name from and writes the flags to a `struct ifreq`, which InterfaceRequest mirrors in
    // size and layout; the reference lives across the call.
    unsafe { rustix::ioctl::ioctl(&socket, Updater::<SIOCGIFFLAGS, InterfaceRequest>::new(&mut request))? };
    request.flags |= IFF_UP;
    // SAFETY: SIOCSIFFLAGS reads a `struct ifreq`, which InterfaceRequest mirrors in size and layout, and keeps no pointer.
    unsafe { rustix::ioctl::ioctl(&socket, Setter::<SIOCSIFFLAGS, InterfaceRequest>::new(request))? };
    Ok(())
}

/// `struct ifreq` of `linux/if.h` with flags in its union.
#[derive(Clone, Copy)]
#[repr(C)]
struct InterfaceRequest {
    name: [u8; 16],
    flags: u16,
    rest: [u8; 22],
}

const _: () = assert!(size_of::<InterfaceRequest>() == size_of::<libc::ifreq>());

impl InterfaceRequest {
    /// A request about the device `name`, which has at most 15 bytes.
    fn new(name: &str, flags: u16) -> io::Result<Self> {
        let mut request = Self {
            name: [0; 16],
            flags,
            rest: [0; 22],
        };
        if name.is_empty() || name.len() >= request.name.len() || name.bytes().any(|byte| byte == 0) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "a device's name has 1 to 15 bytes",
            ));
        }
        request.name[..name.len()].copy_from_slice(name.as_bytes());
        Ok(request)
    }
}

// linux/if_tun.h and linux/if.h
const TUNSETIFF: rustix::ioctl::Opcode = opcode::write::<libc::c_int>(b'T', 202);
const TUNSETOFFLOAD: rustix::ioctl::Opcode = opcode::write::<libc::c_uint>(b'T', 208);
const SIOCGIFFLAGS: rustix::ioctl::Opcode = libc::SIOCGIFFLAGS as rustix::ioctl::Opcode;
const SIOCSIFFLAGS: rustix::ioctl::Opcode = libc::SIOCSIFFLAGS as rustix::ioctl::Opcode;
const IFF_TUN: u16 = libc::IFF_TUN as u16;
const IFF_NO_PI: u16 = libc::IFF_NO_PI as u16;
const IFF_VNET_HDR: u16 = libc::IFF_VNET_HDR as u16;
const IFF_UP: u16 = libc::IFF_UP as u16;
/// Checksums, TSO for both IP versions with ECN, USO for both.
const OFFLOADS: usize = (libc::TUN_F_CSUM
    | libc::TUN_F_TSO4
    | libc::TUN_F_TSO6
    | libc::TUN_F_TSO_ECN
    | libc::TUN_F_USO4
    | libc::TUN_F_USO6) as usize;
