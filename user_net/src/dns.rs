//! The host's resolver, to which port 53 of the network's DNS server leads (`resolv.conf(5)`).

use std::fs;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::path::Path;
use std::time::SystemTime;

use smoltcp::time::{Duration, Instant};

use crate::config::Resolver;

/// The port of DNS.
const PORT: u16 = 53;
/// Between two looks at the file.
const LOOK: Duration = Duration::from_secs(1);
/// Of the file no more than this is read.
const MAX_FILE: u64 = 64 << 10;

/// The resolver, and what its file said when it was last read.
pub struct HostResolver {
    from: Resolver,
    address: SocketAddrV4,
    changed: Option<SystemTime>,
    look_at: Instant,
}

impl HostResolver {
    pub fn new(from: Resolver) -> HostResolver {
        HostResolver {
            from,
            address: SocketAddrV4::new(Ipv4Addr::LOCALHOST, PORT),
            changed: None,
            look_at: Instant::ZERO,
        }
    }

    /// Whom to ask now.
    pub fn address(&mut self, now: Instant) -> SocketAddrV4 {
        let path = match &self.from {
            Resolver::Address(address) => return *address,
            Resolver::File(path) => path,
        };
        if now >= self.look_at {
            self.look_at = now + LOOK;
            let changed = fs::metadata(path).and_then(|m| m.modified()).ok();
            if changed.is_some() && changed != self.changed {
                self.changed = changed;
                self.address = SocketAddrV4::new(read(path), PORT);
            }
        }
        self.address
    }
}

fn read(path: &Path) -> Ipv4Addr {
    use std::io::Read;
    let mut text = String::new();
    // What cannot be read, or is no text to its end, counts as far as it goes.
    let _ = fs::File::open(path).and_then(|file| file.take(MAX_FILE).read_to_string(&mut text));
    nameserver(&text)
}

/// The first nameserver that has an IPv4 address; without one the host's own, as the C library has it.
fn nameserver(text: &str) -> Ipv4Addr {
    text.lines()
        .filter_map(|line| {
            let mut words = line.split_ascii_whitespace();
            (words.next()? == "nameserver").then(|| words.next()?.parse().ok())?
        })
        .next()
        .unwrap_or(Ipv4Addr::LOCALHOST)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_ipv4_nameserver_counts() {
        let text = "# nameserver 1.1.1.1\nsearch example.org\nnameserver fe80::1%eth0\n\
                    nameserver\nnameserver\t192.0.2.53 # ours\nnameserver 192.0.2.54\n";
        assert_eq!(nameserver(text), Ipv4Addr::new(192, 0, 2, 53));
        assert_eq!(nameserver("nameserver ::1\n"), Ipv4Addr::LOCALHOST);
        assert_eq!(nameserver(""), Ipv4Addr::LOCALHOST);
    }

    #[test]
    fn the_file_is_read_again_when_it_has_changed() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("resolv.conf");
        let mut resolver = HostResolver::new(Resolver::File(path.clone()));
        let local = "127.0.0.1:53".parse().unwrap();
        assert_eq!(resolver.address(Instant::ZERO), local, "no file yet");
        fs::write(&path, "nameserver 192.0.2.1\n").unwrap();
        assert_eq!(resolver.address(Instant::from_millis(500)), local);
        let first = "192.0.2.1:53".parse().unwrap();
        assert_eq!(resolver.address(Instant::from_millis(1000)), first);
        fs::write(&path, "nameserver 192.0.2.2\n").unwrap();
        let later = SystemTime::now() + std::time::Duration::from_secs(9);
        fs::File::open(&path).unwrap().set_modified(later).unwrap();
        assert_eq!(resolver.address(Instant::from_millis(1999)), first);
        let second = "192.0.2.2:53".parse().unwrap();
        assert_eq!(resolver.address(Instant::from_millis(2000)), second);
        fs::remove_file(&path).unwrap();
        assert_eq!(resolver.address(Instant::from_secs(9)), second, "kept");
    }
}
