//! The network device and a driver that offers it anything, through `virtio_devices::Net` with two pairs of queues on a wire in memory.
//!
//! Holds to what `fuzz::device` says; a packet that is sent arrives as it was; receiving and the control queue work after a reset.

#![no_main]
#![allow(unsafe_code)]

use std::collections::VecDeque;
use std::io::{self, ErrorKind};
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Mutex, MutexGuard};

use arbitrary::Arbitrary;
use block_util::RateLimiterConfig;
use fuzz::device::{Case, Subject, run};
use libfuzzer_sys::fuzz_target;
use net_util::{MAX_PACKET_LEN, MacAddr, Offloads, VNET_HEADER_LEN};
use virtio_devices::{NET_OFFLOADS, Net, NetConfig, NetControl, PacketQueue};
use vm_virtio::VirtioDevice;
use vm_virtio::testing::{Guest, Request, TestMemory};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;
/// With all features.
const CONTROL: u16 = 4;
/// Features of a network device (virtio 1.2 §5.1.3).
const CTRL_VQ: u64 = 1 << 17;
const MQ: u64 = 1 << 22;
/// The most packets that wait.
const MOST: usize = 64;

#[derive(Arbitrary, Debug)]
enum Ask {
    Receive {
        pair: bool,
        room: u16,
    },
    Send {
        pair: bool,
        header: [u8; 12],
        len: u16,
        byte: u8,
    },
    Control {
        class: u8,
        command: u8,
        data: Vec<u8>,
    },
}

#[derive(Arbitrary, Debug)]
enum Event {
    Arrive { pair: bool, len: u16, byte: u8 },
    Link(bool),
}

#[derive(Default)]
struct Wire {
    arriving: VecDeque<Vec<u8>>,
    sent: VecDeque<Vec<u8>>,
}

/// The host's end of a pair, which stays when the device goes.
#[derive(Clone)]
struct End(Arc<(EventFd, Mutex<Wire>)>);

impl End {
    fn new() -> Self {
        let ready = EventFd::new(EFD_NONBLOCK).expect("an eventfd");
        Self(Arc::new((ready, Mutex::default())))
    }

    fn wire(&self) -> MutexGuard<'_, Wire> {
        self.0.1.lock().expect("nobody panics with it")
    }

    fn arrive(&self, packet: Vec<u8>) {
        let mut wire = self.wire();
        if wire.arriving.len() < MOST {
            wire.arriving.push_back(packet);
            self.0.0.write(1).expect("room in a counter");
        }
    }
}

impl AsRawFd for End {
    fn as_raw_fd(&self) -> RawFd {
        self.0.0.as_raw_fd()
    }
}

impl PacketQueue for End {
    unsafe fn read_packet(&self, pieces: &[libc::iovec]) -> io::Result<usize> {
        let mut wire = self.wire();
        let Some(packet) = wire.arriving.pop_front() else {
            return Err(ErrorKind::WouldBlock.into());
        };
        if wire.arriving.is_empty() {
            self.0.0.read().expect("there was a packet");
        }
        let mut left = &packet[..];
        for piece in pieces {
            let (now, later) = left.split_at(piece.iov_len.min(left.len()));
            // SAFETY: the piece has room for as many bytes, by the caller's word.
            unsafe {
                std::ptr::copy_nonoverlapping(now.as_ptr(), piece.iov_base.cast(), now.len())
            };
            left = later;
        }
        Ok(packet.len() - left.len())
    }

    unsafe fn write_packet(&self, pieces: &[libc::iovec]) -> io::Result<usize> {
        let mut packet = Vec::new();
        for piece in pieces {
            let mut bytes = vec![0; piece.iov_len];
            // SAFETY: the piece has as many bytes, by the caller's word.
            unsafe {
                std::ptr::copy_nonoverlapping(
                    piece.iov_base.cast(),
                    bytes.as_mut_ptr(),
                    bytes.len(),
                )
            };
            packet.extend(bytes);
            assert!(
                packet.len() <= MAX_PACKET_LEN,
                "longer than a packet can be"
            );
        }
        let len = packet.len();
        let mut wire = self.wire();
        wire.sent.truncate(MOST);
        wire.sent.push_front(packet);
        Ok(len)
    }

    fn set_offloads(&self, _: Offloads) -> io::Result<()> {
        Ok(())
    }

    fn set_attached(&self, _: bool) -> io::Result<()> {
        Ok(())
    }
}

struct Network {
    ends: [End; 2],
    control: Option<NetControl>,
    features: u64,
}

impl Network {
    /// Without MQ there is one pair, and what comes after it is the control queue (§5.1.2).
    fn pair(&self, second: bool) -> u16 {
        u16::from(second && self.features & MQ != 0)
    }

    fn control_queue(&self) -> u16 {
        2 + 2 * self.pair(true)
    }
}

fn packet(header: &[u8; 12], len: u16, byte: u8) -> Vec<u8> {
    let body = (0..14 + len % 2048).map(|at| byte ^ at as u8);
    header.iter().copied().chain(body).collect()
}

fn send(packet: Vec<u8>) -> Request {
    Request {
        readable: packet,
        writable: 0,
    }
}

impl Subject for Network {
    type Ask = Ask;
    type Event = Event;

    fn device(&mut self) -> Box<dyn VirtioDevice<TestMemory>> {
        let config = NetConfig {
            id: "net".into(),
            mac: MacAddr::new([2, 0, 0, 0, 0, 1]),
            mtu: Some(1500),
            queue_pairs: 2,
            queue_size: 64,
            offloads: NET_OFFLOADS,
            limit: RateLimiterConfig::default(),
        };
        let ends = self
            .ends
            .iter()
            .map(|end| Box::new(end.clone()) as Box<dyn PacketQueue>);
        let net = Net::with_queues(config, Offloads::all(), ends.collect()).expect("a device");
        self.control = Some(net.control());
        Box::new(net)
    }

    fn negotiated(&mut self, features: u64) {
        self.features = features;
    }

    fn request(&self, ask: &Ask) -> (u16, Request) {
        match ask {
            // Pairs that the driver did not switch on are left alone by the device.
            Ask::Receive { pair, room } => {
                let writable = 1526 + u32::from(room % 4096);
                (
                    RECEIVE + 2 * self.pair(*pair),
                    Request {
                        readable: Vec::new(),
                        writable,
                    },
                )
            }
            Ask::Send {
                pair,
                header,
                len,
                byte,
            } => (
                TRANSMIT + 2 * self.pair(*pair),
                send(packet(header, *len, *byte)),
            ),
            Ask::Control {
                class,
                command,
                data,
            } => {
                let readable = [&[*class, *command][..], data].concat();
                (
                    self.control_queue(),
                    Request {
                        readable,
                        writable: 1,
                    },
                )
            }
        }
    }

    fn answers(&self, ask: &Ask) -> bool {
        match ask {
            Ask::Receive { .. } => false,
            // The second pair need not be in use.
            Ask::Send { pair, .. } => !pair,
            Ask::Control { .. } => self.features & CTRL_VQ != 0,
        }
    }

    fn check(&mut self, ask: &Ask, answer: &[u8]) {
        match ask {
            Ask::Receive { .. } => {}
            Ask::Send {
                header, len, byte, ..
            } => {
                let sent = self.ends[0].wire().sent.pop_front().expect("it was sent");
                let wanted = packet(header, *len, *byte);
                assert_eq!(sent.len(), wanted.len());
                let bodies = (&sent[VNET_HEADER_LEN..], &wanted[VNET_HEADER_LEN..]);
                assert!(bodies.0 == bodies.1, "not what was sent");
            }
            Ask::Control { .. } => assert!(answer == [0] || answer == [1], "{answer:?}"),
        }
    }

    fn event(&mut self, event: &Event) {
        match event {
            Event::Arrive { pair, len, byte } => {
                self.ends[usize::from(*pair)].arrive(packet(&[0; 12], *len, *byte));
            }
            Event::Link(up) => {
                if let Some(control) = &self.control {
                    control.set_link(*up);
                }
            }
        }
    }

    fn alive(&mut self, guest: &mut Guest) {
        let sent = packet(&[0; 12], 100, 7);
        guest.ask(TRANSMIT, &send(sent.clone()));
        assert!(
            self.ends[0].wire().sent.pop_front() == Some(sent),
            "not what was sent"
        );

        // Promiscuous mode, on.
        let on = Request {
            readable: vec![0, 0, 1],
            writable: 1,
        };
        assert_eq!(guest.ask(CONTROL, &on), [0]);

        self.ends[0].arrive(packet(&[0; 12], 200, 9));
        let room = Request {
            readable: Vec::new(),
            writable: 65562,
        };
        assert!(guest.ask(RECEIVE, &room).len() > VNET_HEADER_LEN);
    }
}

fuzz_target!(|case: Case<Ask, Event>| {
    let ends = [End::new(), End::new()];
    run(
        &case,
        &mut Network {
            ends,
            control: None,
            features: 0,
        },
    );
});
