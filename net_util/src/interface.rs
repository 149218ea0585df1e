//! An interface of the host by its name: addresses, MTU, up and down (netdevice(7)).
#![allow(unsafe_code)]

use std::ffi::CString;
use std::io;
use std::mem;
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use thiserror::Error;

use crate::mac::MacAddr;
use crate::netlink;

/// A network interface. The name is kept, not the interface: it may be renamed, or go away.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Interface {
    name: String,
}

/// What can go wrong with an interface.
#[derive(Debug, Error)]
pub enum InterfaceError {
    /// The name cannot be one.
    #[error(
        "{0:?} cannot name a network interface: it is 1 to 15 bytes without slashes, colons or spaces, and not . or .."
    )]
    Name(String),
    /// The kernel refused.
    #[error("{action} of network interface {name:?}")]
    Configure {
        /// Of the interface.
        name: String,
        /// What was tried, as in "setting the MTU".
        action: &'static str,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
}

impl Interface {
    /// The interface called `name`, which need not exist yet.
    ///
    /// # Errors
    ///
    /// [`InterfaceError::Name`].
    pub fn new(name: &str) -> Result<Interface, InterfaceError> {
        let bad = |b: u8| b == b'/' || b == b':' || b == 0 || b.is_ascii_whitespace();
        if !(1..libc::IFNAMSIZ).contains(&name.len())
            || name.bytes().any(bad)
            || matches!(name, "." | "..")
        {
            return Err(InterfaceError::Name(name.to_owned()));
        }
        Ok(Interface {
            name: name.to_owned(),
        })
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its number in this network namespace.
    ///
    /// # Errors
    ///
    /// [`InterfaceError::Configure`] where there is none of this name; so for all that follow.
    pub fn index(&self) -> Result<u32, InterfaceError> {
        let action = "asking for the number";
        let name = CString::new(self.name.as_str()).map_err(|e| self.failed(action, e.into()))?;
        // SAFETY: the name is a string that ends.
        let index = unsafe { libc::if_nametoindex(name.as_ptr()) };
        if index == 0 {
            return Err(self.failed(action, io::Error::last_os_error()));
        }
        Ok(index)
    }

    /// Its Ethernet address.
    ///
    /// # Errors
    ///
    /// [`InterfaceError::Configure`].
    pub fn mac(&self) -> Result<MacAddr, InterfaceError> {
        let answer = self.ask("asking for the MAC address", libc::SIOCGIFHWADDR)?;
        // SAFETY: the kernel filled in the hardware address.
        let data = unsafe { answer.ifr_ifru.ifru_hwaddr.sa_data };
        let mut bytes = [0; 6];
        for (byte, from) in bytes.iter_mut().zip(data) {
            *byte = from as u8;
        }
        Ok(MacAddr::new(bytes))
    }

    /// Changes its Ethernet address.
    ///
    /// # Errors
    ///
    /// [`InterfaceError::Configure`].
    pub fn set_mac(&self, mac: MacAddr) -> Result<(), InterfaceError> {
        let mut address = empty_address();
        address.sa_family = libc::ARPHRD_ETHER;
        for (to, byte) in address.sa_data.iter_mut().zip(mac.bytes()) {
            *to = byte as libc::c_char;
        }
        let mut request = self.request();
        request.ifr_ifru.ifru_hwaddr = address;
        self.call("setting the MAC address", libc::SIOCSIFHWADDR, &mut request)
    }

    /// The largest packet, in bytes, without the Ethernet header.
    ///
    /// # Errors
    ///
    /// [`InterfaceError::Configure`].
    pub fn mtu(&self) -> Result<u32, InterfaceError> {
        let answer = self.ask("asking for the MTU", libc::SIOCGIFMTU)?;
        // SAFETY: the kernel filled in the MTU.
        let mtu = unsafe { answer.ifr_ifru.ifru_mtu };
        Ok(u32::try_from(mtu).unwrap_or(0))
    }

    /// Changes the MTU, in bytes; a tap takes 68 to 65521.
    ///
    /// # Errors
    ///
    /// [`InterfaceError::Configure`].
    pub fn set_mtu(&self, mtu: u32) -> Result<(), InterfaceError> {
        let mut request = self.request();
        request.ifr_ifru.ifru_mtu = i32::try_from(mtu).unwrap_or(i32::MAX);
        self.call("setting the MTU", libc::SIOCSIFMTU, &mut request)
    }

    /// Its first IPv4 address and mask.
    ///
    /// # Errors
    ///
    /// [`InterfaceError::Configure`], also when it has none.
    pub fn ipv4(&self) -> Result<(Ipv4Addr, Ipv4Addr), InterfaceError> {
        let address = self.ask("asking for the IPv4 address", libc::SIOCGIFADDR)?;
        let mask = self.ask("asking for the IPv4 mask", libc::SIOCGIFNETMASK)?;
        // SAFETY: the kernel filled in these addresses.
        let (address, mask) = unsafe { (address.ifr_ifru.ifru_addr, mask.ifr_ifru.ifru_netmask) };
        Ok((from_sockaddr(&address), from_sockaddr(&mask)))
    }

    /// Gives it an address, beside those that it has, in a network of `prefix` bits: up to 32 for IPv4, 128 for IPv6.
    ///
    /// # Errors
    ///
    /// [`InterfaceError::Configure`].
    pub fn add_address(&self, address: IpAddr, prefix: u8) -> Result<(), InterfaceError> {
        netlink::add_address(self.index()?, address, prefix)
            .map_err(|e| self.failed("setting the address", e))
    }

    /// Whether it is up.
    ///
    /// # Errors
    ///
    /// [`InterfaceError::Configure`].
    pub fn is_up(&self) -> Result<bool, InterfaceError> {
        Ok(i32::from(self.flags()?) & libc::IFF_UP != 0)
    }

    /// Whether it is up and has a carrier, so that packets can go through it. The kernel takes a moment to say so after a change.
    ///
    /// # Errors
    ///
    /// [`InterfaceError::Configure`].
    pub fn has_link(&self) -> Result<bool, InterfaceError> {
        const BOTH: i32 = libc::IFF_UP | libc::IFF_RUNNING;
        Ok(i32::from(self.flags()?) & BOTH == BOTH)
    }

    /// Takes it up, or down.
    ///
    /// # Errors
    ///
    /// [`InterfaceError::Configure`].
    pub fn set_up(&self, up: bool) -> Result<(), InterfaceError> {
        let up_flag = libc::IFF_UP as i16;
        let flags = self.flags()?;
        let mut request = self.request();
        request.ifr_ifru.ifru_flags = if up {
            flags | up_flag
        } else {
            flags & !up_flag
        };
        self.call("setting the state", libc::SIOCSIFFLAGS, &mut request)
    }

    fn flags(&self) -> Result<i16, InterfaceError> {
        let answer = self.ask("asking for the state", libc::SIOCGIFFLAGS)?;
        // SAFETY: the kernel filled in the flags.
        Ok(unsafe { answer.ifr_ifru.ifru_flags })
    }

    /// A request that names the interface and is zero else.
    pub(crate) fn request(&self) -> libc::ifreq {
        named_request(&self.name)
    }

    fn failed(&self, action: &'static str, source: io::Error) -> InterfaceError {
        InterfaceError::Configure {
            name: self.name.clone(),
            action,
            source,
        }
    }

    fn ask(
        &self,
        action: &'static str,
        code: libc::c_ulong,
    ) -> Result<libc::ifreq, InterfaceError> {
        let mut request = self.request();
        self.call(action, code, &mut request)?;
        Ok(request)
    }

    /// Asks the kernel. `code` is one of those that take an `ifreq`.
    fn call(
        &self,
        action: &'static str,
        code: libc::c_ulong,
        request: &mut libc::ifreq,
    ) -> Result<(), InterfaceError> {
        let socket = socket().map_err(|e| self.failed(action, e))?;
        // SAFETY: private to this file, whose codes all read and write one `ifreq`.
        let result = unsafe { libc::ioctl(socket.as_raw_fd(), code, request) };
        if result < 0 {
            return Err(self.failed(action, io::Error::last_os_error()));
        }
        Ok(())
    }
}

/// An `ifreq` with as much of `name` as fits in, and zeroes.
pub(crate) fn named_request(name: &str) -> libc::ifreq {
    // SAFETY: all zeroes is an `ifreq`: integers, and a union of them and a null pointer.
    let mut request: libc::ifreq = unsafe { mem::zeroed() };
    let room = request.ifr_name.len() - 1;
    for (to, byte) in request.ifr_name[..room].iter_mut().zip(name.bytes()) {
        *to = byte as libc::c_char;
    }
    request
}

/// The name in an `ifreq`.
pub(crate) fn name_in(request: &libc::ifreq) -> String {
    let bytes: Vec<u8> = request
        .ifr_name
        .iter()
        .map(|&c| c as u8)
        .take_while(|&b| b != 0)
        .collect();
    String::from_utf8_lossy(&bytes).into_owned()
}

fn socket() -> io::Result<OwnedFd> {
    // SAFETY: no pointers are passed.
    let fd = unsafe { libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor was just created and has no other owner.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn empty_address() -> libc::sockaddr {
    libc::sockaddr {
        sa_family: 0,
        sa_data: [0; 14],
    }
}

/// Of a `sockaddr_in`: the address follows the family and two bytes of port.
fn from_sockaddr(address: &libc::sockaddr) -> Ipv4Addr {
    let [_, _, a, b, c, d, ..] = address.sa_data;
    Ipv4Addr::new(a as u8, b as u8, c as u8, d as u8)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_checked() {
        for good in ["tap0", "a", "fifteen-letters", "vmtap%d"] {
            assert_eq!(Interface::new(good).unwrap().name(), good);
        }
        for bad in [
            "",
            "sixteen-letters!",
            "a/b",
            "a b",
            "a:0",
            ".",
            "..",
            "a\0b",
        ] {
            let error = Interface::new(bad).unwrap_err();
            assert!(matches!(error, InterfaceError::Name(_)), "{bad:?}");
        }
    }

    #[test]
    fn requests_carry_the_name() {
        let request = named_request("sixteen-letters!");
        assert_eq!(name_in(&request), "sixteen-letters");
        assert_eq!(name_in(&named_request("")), "");
    }

    #[test]
    fn an_interface_that_is_not_there_is_named() {
        let missing = Interface::new("no-such-one").unwrap();
        for error in [
            missing.index().unwrap_err(),
            missing.mac().unwrap_err(),
            missing.set_mtu(1500).unwrap_err(),
            missing.set_up(true).unwrap_err(),
        ] {
            assert!(error.to_string().contains("\"no-such-one\""), "{error}");
        }
    }
}
