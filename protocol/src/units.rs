//! Units as types, and the one place that converts between them.
//!
//! OVS queues are in bit/s, OVS policing in kbit/s, port counters in bytes, QEMU's
//! `max-bandwidth` in bytes/s and its `mbps` in Mbit/s, the papers' disks in KB/s. A figure
//! therefore never travels as a bare number: it is one of these types, and every conversion
//! is a named method here. Arithmetic saturates: a rate that overflowed is a fast link, not
//! a panic.

use std::fmt;
use std::ops::{Add, AddAssign, Sub};
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// A rate on the wire in bit/s (decimal: 1 Mbit/s is 1 000 000 bit/s), as OVS queues count.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct BitsPerSec(pub u64);

/// A rate in bytes/s, as QEMU's `max-bandwidth` counts.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct BytesPerSec(pub u64);

/// An amount of data in bytes.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct Bytes(pub u64);

/// A number of target pages (4 KiB each: QEMU's target page on x86).
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct Pages(pub u64);

/// A rate at which distinct pages are dirtied, in pages/s ("unique dirty page rate", SOLive IV-B).
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct PagesPerSec(pub u64);

/// Bytes of one target page on x86.
pub const PAGE_BYTES: u64 = 4096;

macro_rules! saturating {
    ($($t:ident),*) => {$(
        impl Add for $t {
            type Output = Self;
            fn add(self, other: Self) -> Self { Self(self.0.saturating_add(other.0)) }
        }
        impl Sub for $t {
            type Output = Self;
            fn sub(self, other: Self) -> Self { Self(self.0.saturating_sub(other.0)) }
        }
        impl AddAssign for $t {
            fn add_assign(&mut self, other: Self) { *self = *self + other; }
        }
        impl std::iter::Sum for $t {
            fn sum<I: Iterator<Item = Self>>(items: I) -> Self {
                items.fold(Self(0), |sum, item| sum + item)
            }
        }
        impl $t {
            /// Nothing of it.
            pub const ZERO: Self = Self(0);

            /// `share` of it, rounded down; a share that is negative or not a number gives zero.
            #[must_use]
            pub fn scale(self, share: f64) -> Self {
                // `as` saturates and maps NaN to zero, which is what a rate should do.
                Self((self.0 as f64 * share) as u64)
            }
        }
    )*};
}
saturating!(BitsPerSec, BytesPerSec, Bytes, Pages, PagesPerSec);

impl BitsPerSec {
    /// From decimal megabits per second.
    #[must_use]
    pub const fn from_mbit(mbit: u64) -> Self {
        Self(mbit.saturating_mul(1_000_000))
    }

    /// The same rate in bytes/s, rounded down.
    #[must_use]
    pub const fn bytes_per_sec(self) -> BytesPerSec {
        BytesPerSec(self.0 / 8)
    }

    /// The same rate in kbit/s, rounded down: the unit of OVS meters and of OVS policing.
    #[must_use]
    pub const fn kbit(self) -> u64 {
        self.0 / 1000
    }
}

impl BytesPerSec {
    /// The same rate in bit/s.
    #[must_use]
    pub const fn bits_per_sec(self) -> BitsPerSec {
        BitsPerSec(self.0.saturating_mul(8))
    }

    /// From the papers' KB/s (1024 bytes, MigrateFS Table 1).
    #[must_use]
    pub const fn from_kib(kib: u64) -> Self {
        Self(kib.saturating_mul(1024))
    }

    /// What passes at this rate in `time`.
    #[must_use]
    pub fn over(self, time: Duration) -> Bytes {
        Bytes((self.0 as f64 * time.as_secs_f64()) as u64)
    }
}

impl Bytes {
    /// From MiB.
    #[must_use]
    pub const fn from_mib(mib: u64) -> Self {
        Self(mib.saturating_mul(1 << 20))
    }

    /// In whole MiB, rounded down.
    #[must_use]
    pub const fn mib(self) -> u64 {
        self.0 >> 20
    }

    /// The pages that hold so many bytes, rounded up.
    #[must_use]
    pub const fn pages(self) -> Pages {
        Pages(self.0.div_ceil(PAGE_BYTES))
    }

    /// How long so much takes at `rate`; `None` at a rate of zero, or when no clock counts so far.
    #[must_use]
    pub fn time_at(self, rate: BytesPerSec) -> Option<Duration> {
        Duration::try_from_secs_f64(self.0 as f64 / rate.0 as f64).ok()
    }
}

impl Pages {
    /// Their bytes.
    #[must_use]
    pub const fn bytes(self) -> Bytes {
        Bytes(self.0.saturating_mul(PAGE_BYTES))
    }
}

impl PagesPerSec {
    /// The bytes of the pages dirtied each second.
    #[must_use]
    pub const fn bytes_per_sec(self) -> BytesPerSec {
        BytesPerSec(self.0.saturating_mul(PAGE_BYTES))
    }
}

/// `value` with the largest unit that leaves at least 1, with at most one decimal.
fn scaled(f: &mut fmt::Formatter<'_>, value: u64, base: f64, units: &[&str]) -> fmt::Result {
    let mut figure = value as f64;
    let mut unit = 0;
    while figure >= base && unit + 1 < units.len() {
        figure /= base;
        unit += 1;
    }
    if unit == 0 || figure >= 100.0 || figure.fract() < 0.05 {
        write!(f, "{figure:.0} {}", units[unit])
    } else {
        write!(f, "{figure:.1} {}", units[unit])
    }
}

impl fmt::Display for BitsPerSec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        scaled(f, self.0, 1000.0, &["bit/s", "kbit/s", "Mbit/s", "Gbit/s", "Tbit/s"])
    }
}

impl fmt::Display for BytesPerSec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        scaled(f, self.0, 1024.0, &["B/s", "KiB/s", "MiB/s", "GiB/s", "TiB/s"])
    }
}

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        scaled(f, self.0, 1024.0, &["B", "KiB", "MiB", "GiB", "TiB"])
    }
}

impl fmt::Display for Pages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} pages", self.0)
    }
}

impl fmt::Display for PagesPerSec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} pages/s", self.0)
    }
}

/// A text that is not a quantity of the wanted kind.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{given}` is not {wanted}")]
pub struct ParseUnitError {
    /// What was given.
    pub given: String,
    /// What was wanted, with an example.
    pub wanted: &'static str,
}

fn parse_scaled(
    text: &str,
    units: &[(&str, u64)],
    wanted: &'static str,
) -> Result<u64, ParseUnitError> {
    let error = || ParseUnitError { given: text.to_owned(), wanted };
    let trimmed = text.trim();
    let split = trimmed.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(trimmed.len());
    let (number, unit) = trimmed.split_at(split);
    let number: f64 = number.parse().map_err(|_| error())?;
    let (_, factor) =
        units.iter().find(|(name, _)| name.eq_ignore_ascii_case(unit.trim())).ok_or_else(error)?;
    let value = number * *factor as f64;
    if value.is_finite() && value < u64::MAX as f64 { Ok(value as u64) } else { Err(error()) }
}

impl FromStr for BitsPerSec {
    type Err = ParseUnitError;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        const UNITS: &[(&str, u64)] = &[
            ("bit/s", 1),
            ("kbit/s", 1000),
            ("mbit/s", 1_000_000),
            ("gbit/s", 1_000_000_000),
            ("kbit", 1000),
            ("mbit", 1_000_000),
            ("gbit", 1_000_000_000),
        ];
        parse_scaled(text, UNITS, "a rate such as `200 Mbit/s`").map(Self)
    }
}

impl FromStr for Bytes {
    type Err = ParseUnitError;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        const UNITS: &[(&str, u64)] =
            &[("b", 1), ("kib", 1 << 10), ("mib", 1 << 20), ("gib", 1 << 30), ("tib", 1 << 40)];
        parse_scaled(text, UNITS, "a size such as `256 MiB`").map(Self)
    }
}

/// Serde as text with a unit (`"200 Mbit/s"`, `"256 MiB"`), for configuration files:
/// `#[serde(with = "lifeboat_protocol::units::text")]`.
pub mod text {
    use serde::{Deserialize, Deserializer, Serializer, de};
    use std::fmt::Display;
    use std::str::FromStr;

    /// Writes the quantity with its unit.
    ///
    /// # Errors
    /// What the serializer says.
    pub fn serialize<T: Display, S: Serializer>(value: &T, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(value)
    }

    /// Reads a quantity with its unit.
    ///
    /// # Errors
    /// When the text is not a quantity of this kind.
    pub fn deserialize<'de, T, D>(from: D) -> Result<T, D::Error>
    where
        T: FromStr,
        T::Err: Display,
        D: Deserializer<'de>,
    {
        let given = String::deserialize(from)?;
        given.parse().map_err(de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_reads_as_it_prints() {
        for text in ["200 Mbit/s", "1.5 Gbit/s", "64 kbit/s", "7 bit/s"] {
            let rate: BitsPerSec = text.parse().unwrap();
            assert_eq!(rate.to_string(), text);
        }
    }

    #[test]
    fn sizes_are_binary_and_rates_decimal() {
        assert_eq!("256 MiB".parse(), Ok(Bytes(256 << 20)));
        assert_eq!("200 Mbit/s".parse(), Ok(BitsPerSec(200_000_000)));
        assert_eq!(BitsPerSec::from_mbit(200).bytes_per_sec(), BytesPerSec(25_000_000));
        assert_eq!(BitsPerSec::from_mbit(25).kbit(), 25_000);
    }

    #[test]
    fn a_wrong_unit_is_named() {
        let error = "256 Mbit".parse::<Bytes>().unwrap_err();
        assert_eq!(error.to_string(), "`256 Mbit` is not a size such as `256 MiB`");
        assert!("".parse::<BitsPerSec>().is_err());
        assert!("1e400 Mbit/s".parse::<BitsPerSec>().is_err());
    }

    #[test]
    fn nothing_overflows() {
        assert_eq!(Bytes(u64::MAX) + Bytes(1), Bytes(u64::MAX));
        assert_eq!(Bytes(1) - Bytes(2), Bytes(0));
        assert_eq!(BitsPerSec(100).scale(f64::NAN), BitsPerSec(0));
        assert_eq!(Bytes(1).time_at(BytesPerSec(0)), None);
        assert_eq!(Bytes(u64::MAX).time_at(BytesPerSec(1)), None);
    }
}
