//! Taps (Documentation/networking/tuntap.rst) and macvtaps: Ethernet interfaces of the host whose other end is ours.
#![allow(unsafe_code)]

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use thiserror::Error;
use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_ref, ioctl_with_val};

use crate::interface::{Interface, InterfaceError, name_in, named_request};
use crate::queue::{TapQueue, VNET_HEADER_LEN};

const TUN: &str = "/dev/net/tun";

/// The kernel puts the first free number in the place of `%d`.
const NEW_NAME: &str = "vmtap%d";

/// Ethernet, packets without a header of the tun driver, with one of virtio.
const FLAGS: i32 = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;

/// Most queues that a tap has (MAX_TAP_QUEUES).
const MAX_QUEUES: usize = 256;

bitflags::bitflags! {
    /// What the reader of a tap can do by itself (TUN_F_ of linux/if_tun.h), so that the kernel need not before it hands a
    /// packet over. All but [`Offloads::CSUM`] need that one.
    #[derive(Clone, Copy, Debug, Eq, PartialEq)]
    pub struct Offloads: u32 {
        /// Packets without checksums.
        const CSUM = libc::TUN_F_CSUM;
        /// TCP segments of up to 64 KiB over IPv4.
        const TSO4 = libc::TUN_F_TSO4;
        /// TCP segments of up to 64 KiB over IPv6.
        const TSO6 = libc::TUN_F_TSO6;
        /// Segments with ECN bits.
        const TSO_ECN = libc::TUN_F_TSO_ECN;
        /// UDP fragments; the kernel takes them to send.
        const UFO = libc::TUN_F_UFO;
        /// UDP segments over IPv4 (kernel 6.2; both of them or none).
        const USO4 = libc::TUN_F_USO4;
        /// UDP segments over IPv6.
        const USO6 = libc::TUN_F_USO6;
    }
}

/// How a tap is opened.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct TapOptions {
    /// Of a tap that is there (a macvtap, too), or to be made. `None` and the empty string make one with a new name.
    pub name: Option<String>,
    /// Queues, 1 to 256. A tap that is there was made for one, or for more than one.
    pub queues: usize,
}

/// What can go wrong with a tap.
#[derive(Debug, Error)]
pub enum TapError {
    /// A name, or an interface that refuses.
    #[error(transparent)]
    Interface(#[from] InterfaceError),
    /// No queues, or more than there can be.
    #[error("a tap has 1 to {MAX_QUEUES} queues, not {0}")]
    Queues(usize),
    /// The device node does not open.
    #[error("opening {path:?} for a tap")]
    Open {
        /// /dev/net/tun, or that of a macvtap.
        path: PathBuf,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// The queue cannot be one of this tap.
    #[error("attaching to tap {name:?} with {queues} queues{}", hint(source))]
    Attach {
        /// Of the tap, or of the one that was to be made.
        name: String,
        /// Queues wanted.
        queues: usize,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// A descriptor that was handed over is none of a tap with virtio headers.
    #[error("descriptor {fd} is no tap or macvtap with IFF_VNET_HDR")]
    NotATap {
        /// The number it had.
        fd: i32,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// The descriptors that were handed over are of different taps.
    #[error("descriptors of different taps, {first:?} and {other:?}")]
    Mixed {
        /// A tap's name.
        first: String,
        /// Another's.
        other: String,
    },
    /// A feature that the kernel does not give.
    #[error("setting the {what} of tap {name:?}")]
    Feature {
        /// Of the tap.
        name: String,
        /// Header size, offloads or mode.
        what: &'static str,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
}

/// Why the kernel says these, as far as it is known.
fn hint(source: &io::Error) -> &'static str {
    match source.raw_os_error() {
        Some(libc::EINVAL) => " (was it made with one queue, or with more?)",
        Some(libc::EBUSY) => " (another process uses it)",
        Some(libc::EPERM) => " (making one needs CAP_NET_ADMIN)",
        _ => "",
    }
}

/// A tap or macvtap, as one to 256 queues. One that was made here goes away with its last queue.
#[derive(Debug)]
pub struct Tap {
    interface: Interface,
    queues: Vec<TapQueue>,
}

impl Tap {
    /// Opens or makes a tap. Interface settings are left as they are: a new one is down.
    ///
    /// # Errors
    ///
    /// [`TapError`]; most of all `Attach`, when it is used already or was made for another number of queues.
    pub fn open(options: &TapOptions) -> Result<Tap, TapError> {
        if !(1..=MAX_QUEUES).contains(&options.queues) {
            return Err(TapError::Queues(options.queues));
        }
        let name = match options.name.as_deref() {
            None | Some("") => NEW_NAME,
            Some(name) => name,
        };
        let wanted = Interface::new(name)?;
        let path = match macvtap_index(&wanted) {
            Some(index) => PathBuf::from(format!("/dev/tap{index}")),
            None => PathBuf::from(TUN),
        };
        let more = if options.queues > 1 {
            libc::IFF_MULTI_QUEUE
        } else {
            0
        };
        let mut interface = wanted;
        let mut queues = Vec::with_capacity(options.queues);
        for _ in 0..options.queues {
            let fd = open_node(&path)?;
            // The first queue of a new tap gives the name that the others attach to.
            let name =
                attach(&fd, interface.name(), FLAGS | more).map_err(|source| TapError::Attach {
                    name: interface.name().to_owned(),
                    queues: options.queues,
                    source,
                })?;
            interface = Interface::new(&name)?;
            queues.push(ready(fd, &name)?);
        }
        Ok(Tap { interface, queues })
    }

    /// Takes queues that another has opened and attached, as descriptors; one tap's.
    ///
    /// # Errors
    ///
    /// [`TapError::NotATap`] for what is none or has no virtio headers, [`TapError::Mixed`].
    pub fn from_fds(fds: Vec<OwnedFd>) -> Result<Tap, TapError> {
        let count = fds.len();
        let mut found: Option<Interface> = None;
        let mut queues = Vec::with_capacity(count);
        for fd in fds {
            let number = fd.as_raw_fd();
            let name = attached(&fd).map_err(|source| TapError::NotATap { fd: number, source })?;
            match &found {
                Some(first) if first.name() != name => {
                    return Err(TapError::Mixed {
                        first: first.name().to_owned(),
                        other: name,
                    });
                }
                Some(_) => {}
                None => found = Some(Interface::new(&name)?),
            }
            queues.push(ready(fd, &name)?);
        }
        let interface = found.ok_or(TapError::Queues(count))?;
        Ok(Tap { interface, queues })
    }

    /// The host's end.
    pub fn interface(&self) -> &Interface {
        &self.interface
    }

    /// Our end.
    pub fn queues(&self) -> &[TapQueue] {
        &self.queues
    }

    /// Gives the queues away, each to its worker.
    pub fn into_queues(self) -> Vec<TapQueue> {
        self.queues
    }

    /// Tells the kernel what the reader can do; starts as nothing.
    ///
    /// # Errors
    ///
    /// [`TapError::Feature`] for a set that this kernel does not have.
    pub fn set_offloads(&self, offloads: Offloads) -> Result<(), TapError> {
        for queue in &self.queues {
            queue
                .set_offloads(offloads)
                .map_err(|source| self.failed("offloads", source))?;
        }
        Ok(())
    }

    /// Those of `wanted` that this kernel takes. Leaves none set.
    pub fn supported_offloads(&self, wanted: Offloads) -> Offloads {
        let Some(queue) = self.queues.first() else {
            return Offloads::empty();
        };
        // What is taken together only is asked for together.
        let groups = [
            Offloads::CSUM,
            Offloads::TSO4,
            Offloads::TSO6,
            Offloads::TSO_ECN,
            Offloads::UFO,
            Offloads::USO4 | Offloads::USO6,
        ];
        let mut supported = Offloads::empty();
        for group in groups.into_iter().filter(|g| wanted.contains(*g)) {
            // ECN needs a kind of segments.
            let more = supported | group;
            if queue.set_offloads(more).is_ok() {
                supported = more;
            }
        }
        let _ = queue.set_offloads(Offloads::empty());
        supported
    }

    fn failed(&self, what: &'static str, source: io::Error) -> TapError {
        TapError::Feature {
            name: self.interface.name().to_owned(),
            what,
            source,
        }
    }
}

impl TapQueue {
    /// As [`Tap::set_offloads`], for a worker that has a queue only: the driver may change its mind
    /// (virtio 1.2 §5.1.6.5.6). A tap's offloads are those of all its queues, a macvtap's of each.
    ///
    /// # Errors
    ///
    /// When the kernel has no such set.
    pub fn set_offloads(&self, offloads: Offloads) -> io::Result<()> {
        // SAFETY: TUNSETOFFLOAD takes its argument by value.
        let result =
            unsafe { ioctl_with_val(self, libc::TUNSETOFFLOAD, u64::from(offloads.bits())) };
        checked(result)
    }

    /// Whether packets come to this queue of several and go out of it, as they do at the start. Those of a queue that has none go to
    /// the others, and it is neither readable nor writable, but polls as an error.
    ///
    /// # Errors
    ///
    /// When it is so already, or the tap was made for one queue.
    pub fn set_attached(&self, attached: bool) -> io::Result<()> {
        let mut request = named_request("");
        request.ifr_ifru.ifru_flags = if attached {
            libc::IFF_ATTACH_QUEUE as i16
        } else {
            libc::IFF_DETACH_QUEUE as i16
        };
        // SAFETY: TUNSETQUEUE reads one `ifreq`.
        checked(unsafe { ioctl_with_ref(self, libc::TUNSETQUEUE, &request) })
    }
}

/// The number of a macvtap, by which its device node goes.
fn macvtap_index(interface: &Interface) -> Option<u32> {
    let directory = Path::new("/sys/class/net").join(interface.name());
    if !directory.join("macvtap").exists() {
        return None;
    }
    interface.index().ok()
}

fn open_node(path: &Path) -> Result<OwnedFd, TapError> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)
        .map(OwnedFd::from)
        .map_err(|source| TapError::Open {
            path: path.to_owned(),
            source,
        })
}

fn checked(result: i32) -> io::Result<()> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Makes the descriptor a queue of tap `name`; the name it got.
fn attach(fd: &OwnedFd, name: &str, flags: i32) -> io::Result<String> {
    let mut request = named_request(name);
    request.ifr_ifru.ifru_flags = flags as i16;
    // SAFETY: TUNSETIFF reads and writes one `ifreq`.
    checked(unsafe { ioctl_with_mut_ref(fd, libc::TUNSETIFF, &mut request) })?;
    Ok(name_in(&request))
}

/// The name of the tap that a descriptor is a queue of, which gives virtio headers.
fn attached(fd: &OwnedFd) -> io::Result<String> {
    let mut request = named_request("");
    // SAFETY: TUNGETIFF writes one `ifreq`.
    checked(unsafe { ioctl_with_mut_ref(fd, libc::TUNGETIFF, &mut request) })?;
    // SAFETY: the kernel filled in the flags.
    let flags = i32::from(unsafe { request.ifr_ifru.ifru_flags });
    if flags & FLAGS == FLAGS {
        return Ok(name_in(&request));
    }
    // A macvtap's flags can still change; a tap refuses.
    let name = name_in(&request);
    attach(fd, &name, FLAGS | flags & libc::IFF_MULTI_QUEUE)?;
    Ok(name)
}

/// Sets what every queue is to have: header size, and no blocking.
fn ready(fd: OwnedFd, name: &str) -> Result<TapQueue, TapError> {
    let failed = |what| {
        move |source| TapError::Feature {
            name: name.to_owned(),
            what,
            source,
        }
    };
    // SAFETY: TUNSETVNETHDRSZ reads one int.
    let result = unsafe {
        ioctl_with_ref(
            &fd,
            libc::TUNSETVNETHDRSZ,
            &(VNET_HEADER_LEN as libc::c_int),
        )
    };
    checked(result).map_err(failed("header size"))?;
    // SAFETY: F_GETFL and F_SETFL take no pointers.
    let result = unsafe {
        let flags = libc::fcntl(fd.as_raw_fd(), libc::F_GETFL);
        libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, flags | libc::O_NONBLOCK)
    };
    checked(result).map_err(failed("mode"))?;
    Ok(TapQueue::new(fd))
}
