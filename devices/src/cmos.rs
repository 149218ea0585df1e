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

#[cfg(test)]
mod tests {
    use std::sync::Mutex;
    use std::time::Duration;

    use super::*;
    use crate::test_support::{hostile, inb};

    const GIB: u64 = 1 << 30;

    fn cmos(below_4g: u64, above_4g: u64, seconds: u64) -> Cmos {
        let now = UNIX_EPOCH + Duration::from_secs(seconds);
        Cmos::new(below_4g, above_4g, Box::new(move || now))
    }

    fn get(cmos: &mut Cmos, register: u8) -> u8 {
        cmos.write(0, &[register]);
        inb(cmos, 1)
    }

    fn set(cmos: &mut Cmos, register: u8, value: u8) {
        // Index and data in one access, as some firmware does.
        cmos.write(0, &[register, value]);
    }

    fn clock(cmos: &mut Cmos) -> [u8; 8] {
        [
            CENTURY,
            YEAR,
            MONTH,
            DAY_OF_MONTH,
            DAY_OF_WEEK,
            HOURS,
            MINUTES,
            SECONDS,
        ]
        .map(|r| get(cmos, r))
    }

    #[test]
    fn tells_the_time_in_bcd_or_binary() {
        // Friday, 28 February 2020, 23:59:58.
        let mut cmos = cmos(0, 0, 1_582_934_398);
        assert_eq!(
            clock(&mut cmos),
            [0x20, 0x20, 0x02, 0x28, 0x06, 0x23, 0x59, 0x58]
        );
        set(&mut cmos, STATUS_B, HOURS_24 | BINARY);
        assert_eq!(clock(&mut cmos), [20, 20, 2, 28, 6, 23, 59, 58]);
        set(&mut cmos, STATUS_B, BINARY);
        assert_eq!(get(&mut cmos, HOURS), 11 | AFTERNOON);
        set(&mut cmos, STATUS_B, 0);
        assert_eq!(get(&mut cmos, HOURS), 0x11 | AFTERNOON);
    }

    #[test]
    fn twelve_hour_clocks_know_no_zero() {
        for (hour, told) in [
            (0, 12),
            (1, 1),
            (11, 11),
            (12, 12 | AFTERNOON),
            (13, 1 | AFTERNOON),
        ] {
            let mut cmos = cmos(0, 0, hour * 3600);
            set(&mut cmos, STATUS_B, BINARY);
            assert_eq!(get(&mut cmos, HOURS), told);
        }
    }

    #[test]
    fn every_day_follows_the_one_before() {
        const LENGTHS: [u8; 12] = [31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];
        let (mut year, mut month, mut day, mut weekday) = (1970u16, 1u8, 1u8, 5u8);
        // To the year 2405: over a century that leaps and three that do not.
        for days in 0..159_000u64 {
            let expected = Time {
                second: 0,
                minute: 0,
                hour: 12,
                day_of_week: weekday,
                day,
                month,
                year_of_century: (year % 100) as u8,
                century: (year / 100) as u8,
            };
            let noon = UNIX_EPOCH + Duration::from_secs(days * 86_400 + 43_200);
            assert_eq!(Time::of(noon), expected);
            let leaps = year % 4 == 0 && year % 100 != 0 || year % 400 == 0;
            let length = LENGTHS[usize::from(month) - 1] + u8::from(leaps && month == 2);
            weekday = weekday % 7 + 1;
            day += 1;
            if day > length {
                (day, month) = (1, month + 1);
            }
            if month > 12 {
                (month, year) = (1, year + 1);
            }
        }
        assert_eq!(year, 2405);
    }

    #[test]
    fn a_host_without_a_clock_has_some_time() {
        let before = Cmos::new(0, 0, Box::new(|| UNIX_EPOCH - Duration::from_secs(1)));
        assert_eq!(Time::of((before.now)()).century, 19);
        let far = UNIX_EPOCH + Duration::from_secs(i64::MAX as u64);
        assert!(Time::of(far).century < 100);
    }

    #[test]
    fn status_says_that_the_time_is_good() {
        let mut cmos = cmos(0, 0, 0);
        set(&mut cmos, STATUS_A, 0xff);
        assert_eq!(get(&mut cmos, STATUS_A), 0x7f, "never in an update");
        set(&mut cmos, STATUS_C, 0xff);
        assert_eq!(get(&mut cmos, STATUS_C), 0);
        set(&mut cmos, STATUS_D, 0);
        assert_eq!(get(&mut cmos, STATUS_D), VALID);
    }

    #[test]
    fn memory_sizes() {
        let sizes = |below, above| {
            let mut cmos = cmos(below, above, 0);
            let mut number = |at: usize, bytes: usize| {
                (at..at + bytes)
                    .rev()
                    .fold(0u32, |n, r| n << 8 | u32::from(get(&mut cmos, r as u8)))
            };
            assert_eq!(number(0x17, 2), number(0x30, 2));
            [
                number(0x15, 2),
                number(0x17, 2),
                number(0x34, 2),
                number(0x5b, 3),
            ]
        };
        assert_eq!(sizes(512 << 10, 0), [512, 0, 0, 0]);
        assert_eq!(sizes(32 << 20, 0), [640, 31 << 10, 16 << 4, 0]);
        assert_eq!(
            sizes(3 * GIB, 5 * GIB),
            [640, 0xffff, ((3 * GIB - (16 << 20)) >> 16) as u32, 5 << 14]
        );
        assert_eq!(sizes(u64::MAX, u64::MAX), [640, 0xffff, 0xffff, 0xff_ffff]);
    }

    #[test]
    fn the_rest_is_ram() {
        let mut cmos = cmos(0, 0, 0);
        set(&mut cmos, 0x0f, 0x12);
        set(&mut cmos, 0x7f, 0x34);
        // Bit 7 of the index masks NMIs.
        assert_eq!((get(&mut cmos, 0x8f), get(&mut cmos, 0xff)), (0x12, 0x34));
        assert_eq!(inb(&mut cmos, 0), 0xff, "the index reads back");
    }

    #[test]
    fn survives_any_access() {
        hostile(&Mutex::new(cmos(0, 0, 0)), 2);
    }
}
