//! CMOS: the real-time clock (Motorola MC146818 data sheet, registers 0x00–0x0d) and the PC's bytes behind it,
//! where firmware looks for the memory size.
//!
//! The time is always the host's, in UTC: writes to the time registers are ignored. There is no interrupt; its
//! enable bits in register B are stored without effect.

use std::time::{SystemTime, UNIX_EPOCH};

use vm_device::BusDeviceMut;

const BYTES: usize = 128;

/// Offsets of the two ports.
const INDEX_PORT: u64 = 0;
const DATA_PORT: u64 = 1;

const SECONDS: u8 = 0x00;
const MINUTES: u8 = 0x02;
const HOURS: u8 = 0x04;
const DAY_OF_WEEK: u8 = 0x06;
const DAY_OF_MONTH: u8 = 0x07;
const MONTH: u8 = 0x08;
const YEAR: u8 = 0x09;
const CENTURY: u8 = 0x32;
const STATUS_A: u8 = 0x0a;
const STATUS_B: u8 = 0x0b;
const STATUS_C: u8 = 0x0c;
const STATUS_D: u8 = 0x0d;

/// Status A: an update is in progress.
const UPDATE_IN_PROGRESS: u8 = 1 << 7;
/// Status A after power-on: 32.768 kHz, 1024 Hz periodic rate.
const DEFAULT_RATES: u8 = 0x26;
/// Status B: hours from 0 to 23.
const HOURS_24: u8 = 1 << 1;
/// Status B: binary, not BCD.
const BINARY: u8 = 1 << 2;
/// Status D: RAM and time are valid.
const VALID: u8 = 1 << 7;
/// Hours register: afternoon, where hours go from 1 to 12.
const AFTERNOON: u8 = 1 << 7;

/// KiB below 640 KiB, 2 bytes.
const BASE_MEMORY: usize = 0x15;
/// KiB above 1 MiB, 2 bytes, at two places.
const EXTENDED_MEMORY: [usize; 2] = [0x17, 0x30];
/// Units of 64 KiB from 16 MiB to 4 GiB, 2 bytes.
const MEMORY_ABOVE_16M: usize = 0x34;
/// Units of 64 KiB from 4 GiB, 3 bytes.
const MEMORY_ABOVE_4G: usize = 0x5b;

/// The clock and 128 bytes of RAM behind ports 0x70 (index, offset 0) and 0x71 (data, offset 1).
pub struct Cmos {
    index: u8,
    ram: [u8; BYTES],
    now: Box<dyn Fn() -> SystemTime + Send>,
}

impl Cmos {
    /// A CMOS that tells of `ram_below_4g` bytes of RAM from address 0 and of `ram_above_4g` bytes from 4 GiB, each as
    /// much of it as its registers can say. `now` is the clock.
    #[must_use]
    pub fn new(
        ram_below_4g: u64,
        ram_above_4g: u64,
        now: Box<dyn Fn() -> SystemTime + Send>,
    ) -> Self {
        let mut ram = [0; BYTES];
        let mut put = |at: usize, bytes: usize, value: u64| {
            let value = value.min((1 << (8 * bytes)) - 1);
            for (to, byte) in ram.iter_mut().skip(at).zip(value.to_le_bytes()).take(bytes) {
                *to = byte;
            }
        };
        put(BASE_MEMORY, 2, (ram_below_4g >> 10).min(640));
        for at in EXTENDED_MEMORY {
            put(at, 2, ram_below_4g.saturating_sub(1 << 20) >> 10);
        }
        put(
            MEMORY_ABOVE_16M,
            2,
            ram_below_4g.saturating_sub(16 << 20) >> 16,
        );
        put(MEMORY_ABOVE_4G, 3, ram_above_4g >> 16);
        put(STATUS_A.into(), 1, DEFAULT_RATES.into());
        put(STATUS_B.into(), 1, HOURS_24.into());
        Self { index: 0, ram, now }
    }

    fn selected(&self) -> u8 {
        // Bit 7 of the index port masks NMIs.
        self.index & 0x7f
    }

    fn stored(&self, register: u8) -> u8 {
        self.ram.get(usize::from(register)).copied().unwrap_or(0)
    }

    fn read_data(&self) -> u8 {
        let time = || Time::of((self.now)());
        match self.selected() {
            SECONDS => self.coded(time().second),
            MINUTES => self.coded(time().minute),
            HOURS => self.hours(time().hour),
            DAY_OF_WEEK => self.coded(time().day_of_week),
            DAY_OF_MONTH => self.coded(time().day),
            MONTH => self.coded(time().month),
            YEAR => self.coded(time().year_of_century),
            CENTURY => self.coded(time().century),
            STATUS_A => self.stored(STATUS_A) & !UPDATE_IN_PROGRESS,
            STATUS_C => 0,
            STATUS_D => VALID,
            register => self.stored(register),
        }
    }

    fn write_data(&mut self, value: u8) {
        if let Some(byte) = self.ram.get_mut(usize::from(self.index & 0x7f)) {
            *byte = value;
        }
    }

    /// A number below 100 as register B wants it.
    fn coded(&self, value: u8) -> u8 {
        if self.stored(STATUS_B) & BINARY != 0 {
            value
        } else {
            ((value / 10 % 10) << 4) | (value % 10)
        }
    }

    fn hours(&self, hour: u8) -> u8 {
        if self.stored(STATUS_B) & HOURS_24 != 0 {
            return self.coded(hour);
        }
        let twelve = (hour + 11) % 12 + 1;
        let half = if hour >= 12 { AFTERNOON } else { 0 };
        self.coded(twelve) | half
    }
}

impl BusDeviceMut for Cmos {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        crate::read_bytes(offset, data, |port| match port {
            INDEX_PORT => self.index,
            DATA_PORT => self.read_data(),
            _ => 0xff,
        });
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        crate::write_bytes(offset, data, |port, value| match port {
            INDEX_PORT => self.index = value,
            DATA_PORT => self.write_data(value),
            _ => {}
        });
    }
}

/// A moment in the Gregorian calendar, UTC. Every field is below 100.
#[derive(Debug, Eq, PartialEq)]
struct Time {
    second: u8,
    minute: u8,
    hour: u8,
    /// 1 is Sunday.
    day_of_week: u8,
    day: u8,
    month: u8,
    year_of_century: u8,
    century: u8,
}

impl Time {
    /// The moment `time`; a moment before 1970 becomes the first of it.
    fn of(time: SystemTime) -> Self {
        let seconds = time
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default()
            .as_secs();
        let (days, second) = (seconds / 86_400, seconds % 86_400);
        // Years that start in March have the leap day at their end; 400 of them are 146,097 days.
        let since_march_0 = days + 719_468;
        let (era, day_of_era) = (since_march_0 / 146_097, since_march_0 % 146_097);
        let year_of_era =
            (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
        let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        // Five months from March or August on are 153 days.
        let month_from_march = (5 * day_of_year + 2) / 153;
        let month = if month_from_march < 10 {
            month_from_march + 3
        } else {
            month_from_march - 9
        };
        let year = era * 400 + year_of_era + u64::from(month <= 2);
        Self {
            second: low(second % 60),
            minute: low(second / 60 % 60),
            hour: low(second / 3600),
            // 1 January 1970 was a Thursday.
            day_of_week: low((days + 4) % 7 + 1),
            day: low(day_of_year - (153 * month_from_march + 2) / 5 + 1),
            month: low(month),
            year_of_century: low(year % 100),
            century: low(year / 100 % 100),
        }
    }
}

/// A number below 100 as a byte.
fn low(value: u64) -> u8 {
    u8::try_from(value).unwrap_or(0)
}
