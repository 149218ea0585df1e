//! Networks: packets between the guest's driver and a tap in a network namespace of our own, and the same by a host program that
//! makes one system call a packet on a tap. No VMM that does so can be faster than it.

mod station;
mod tap;

use std::ffi::OsString;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::counters::{Plain, own_time};
use crate::stats::Summary;
use crate::vmm::{Measured, Vmm, limits};
use station::Station;
use tap::Tap;

pub use station::{Isolated, isolate};

/// Bytes of the header before a packet on a tap (virtio 1.2 §5.1.6).
const HEADER: usize = 12;
/// Ethertype of our frames: local experiments.
const ETHERTYPE: u16 = 0x88b5;
/// The longest frame that is not cut into segments.
const LONGEST: usize = 1514;
/// Packets that wait in the tap when receiving begins; of segments fewer, which take up more memory.
const WAITING: u32 = 16384;
const WAITING_SEGMENTS: u32 = 1024;
/// After so long without a packet the rest is lost.
const IDLE: Duration = Duration::from_millis(50);
/// Round trips of a measurement.
const ROUNDS: usize = 1000;

/// What is measured.
#[derive(Clone, Copy, Debug)]
pub enum Job {
    /// Frames from the guest, of so many bytes.
    Transmit(usize),
    /// Frames to the guest.
    Receive(usize),
    /// Microseconds from a frame to the guest until it is back.
    RoundTrip,
}

impl Job {
    /// By a VMM with the bare-metal guest: frames a second or microseconds, and what the guest measured.
    ///
    /// # Errors
    /// What the VMM, the guest or the tap says; or packets that got lost.
    pub fn in_guest(
        &self,
        _: Isolated,
        binary: &Path,
        guest: &Path,
        time: Duration,
        tracing: bool,
    ) -> Result<(f64, Measured)> {
        let before = station::interfaces()?;
        let options: [OsString; 2] = ["--net".into(), "tap=".into()];
        let start = |words: &str| Vmm::start(binary, guest, words, &options, tracing);
        let tap = || -> Result<Station> {
            let all = station::interfaces()?;
            let new = all.into_iter().find(|name| !before.contains(name));
            Station::open(&new.context("the VMM has made no tap")?)
        };
        match *self {
            Self::Transmit(size) => {
                // Its tap is there as long as it is.
                let words = format!("test=bench_net_tx size={size} end=halt {}", limits(time));
                let mut vmm = start(&words)?;
                let measured = vmm.measured()?;
                vmm.done()?;
                let counted = tap()?.received()?;
                ensure!(
                    counted >= measured.operations,
                    "the guest sent {} packets, of which {counted} came out of the tap",
                    measured.operations
                );
                Ok((measured.rate(), measured))
            }
            Self::Receive(size) => {
                let waiting = waiting(size);
                let words = format!(
                    "test=bench_net_rx count={waiting} segments={} idle={} {}",
                    u8::from(size > LONGEST),
                    crate::clock::ticks(IDLE),
                    limits(time * 20)
                );
                let mut vmm = start(&words)?;
                vmm.value("bench_ready")?;
                let station = tap()?;
                station.make_room(waiting)?;
                station.send(size, waiting)?;
                vmm.type_line()?;
                let measured = vmm.measured()?;
                vmm.finish()?;
                ensure!(
                    measured.operations == u64::from(waiting),
                    "of {waiting} packets {} came to the guest",
                    measured.operations
                );
                Ok((measured.rate(), measured))
            }
            Self::RoundTrip => {
                let words = format!("test=bench_net_echo {}", limits(time));
                let mut vmm = start(&words)?;
                vmm.value("bench_ready")?;
                let mut value = None;
                let measured = vmm.measured_while(|vmm| {
                    value = round_trips(&tap()?)?;
                    vmm.type_line()
                })?;
                vmm.finish()?;
                Ok((value.context("no round trips")?, measured))
            }
        }
    }

    /// By a host program on a tap of its own, with one system call a packet.
    ///
    /// # Errors
    /// What the tap says.
    pub fn on_host(&self, _: Isolated, time: Duration) -> Result<Plain> {
        let tap = Tap::new()?;
        let station = Station::open(tap.name())?;
        match *self {
            Self::Transmit(size) => {
                let packet = tap::packet(size);
                let (before, start) = (own_time(), Instant::now());
                let mut count = 0u32;
                loop {
                    tap.write(&packet)?;
                    count += 1;
                    let passed = start.elapsed();
                    if passed >= time {
                        return Ok(Plain::rate(count, passed.as_secs_f64(), before));
                    }
                }
            }
            Self::Receive(size) => {
                let waiting = waiting(size);
                tap.take_segments(size > LONGEST)?;
                station.make_room(waiting)?;
                station.send(size, waiting)?;
                let mut buffer = vec![0; HEADER + size.max(LONGEST)];
                let mut count = 0;
                let (before, start) = (own_time(), Instant::now());
                while count < waiting {
                    let length = tap.read(&mut buffer)?;
                    let length = length.context("packets got lost on the way to a tap")?;
                    let kind = buffer.get(HEADER + 12..HEADER + 14);
                    let ours = length > HEADER && kind == Some(&ETHERTYPE.to_be_bytes());
                    count += u32::from(ours || length > HEADER + LONGEST);
                }
                let seconds = start.elapsed().as_secs_f64();
                Ok(Plain::rate(count, seconds, before))
            }
            Self::RoundTrip => {
                let stop = std::sync::atomic::AtomicBool::new(false);
                let before = own_time();
                let trips = std::thread::scope(|scope| {
                    let echo = scope.spawn(|| tap.echo(&stop));
                    let trips = round_trips(&station);
                    stop.store(true, std::sync::atomic::Ordering::Relaxed);
                    match echo.join() {
                        Ok(echoed) => echoed.and(trips),
                        Err(_) => trips,
                    }
                })?;
                Ok(Plain {
                    value: trips.context("no round trips")?,
                    cpu_us: own_time().saturating_sub(before) as f64 / 1e3 / ROUNDS as f64,
                })
            }
        }
    }
}

fn waiting(size: usize) -> u32 {
    if size > LONGEST {
        WAITING_SEGMENTS
    } else {
        WAITING
    }
}

/// Microseconds of a round trip, in the middle.
fn round_trips(station: &Station) -> Result<Option<f64>> {
    let mut times = Vec::with_capacity(ROUNDS);
    for _ in 0..ROUNDS {
        let start = Instant::now();
        station.send(60, 1)?;
        station.receive()?;
        times.push(start.elapsed().as_secs_f64() * 1e6);
    }
    Ok(Summary::of(&times).map(|summary| summary.median))
}
