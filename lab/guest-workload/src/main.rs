//! `guest-workload`: the program inside a lab guest, and its counterpart outside.
//!
//! `guest-workload guest` is started by the guest image's init; its parameters come from the
//! kernel command line. `guest-workload client ...` runs in the lab's client host. Neither knows
//! of Lifeboat: they prove what it did. No async runtime: a guest has one emulated CPU.

mod checked;
mod client;
mod clock;
mod disk;
mod gaps;
mod guest;
mod heartbeat;
mod pace;
mod params;
mod pattern;
mod peer;
mod ports;
mod report;
mod stream;
mod sys;
mod traffic;

use std::process::ExitCode;
use std::{env, error::Error, fs};

use params::{ClientParams, GuestParams};

const USAGE: &str = "usage: guest-workload guest
       guest-workload client --guest name=NAME,ip=IP[,source=BITS_PER_S][,transport=udp|tcp]...
           --out FILE [--status FILE] [--interval MS] [--threshold MS] [--duration S]
           [--stream BYTES_PER_S]";

fn main() -> ExitCode {
    let args: Vec<String> = env::args().skip(1).collect();
    let result = match args.first().map(String::as_str) {
        Some("guest") => guest(),
        Some("client") => client(&args[1..]),
        _ => Err(USAGE.into()),
    };
    let Err(error) = result else { return ExitCode::SUCCESS };
    eprintln!("guest-workload: {error}");
    let mut cause = error.source();
    while let Some(error) = cause {
        eprintln!("  because: {error}");
        cause = error.source();
    }
    ExitCode::FAILURE
}

fn guest() -> Result<(), Box<dyn Error>> {
    let params = GuestParams::from_command_line(&fs::read_to_string("/proc/cmdline")?)?;
    let boot_id = fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    Ok(guest::run(params, boot_id_bytes(&boot_id))?)
}

fn client(args: &[String]) -> Result<(), Box<dyn Error>> {
    sys::catch_stop_signals()?;
    Ok(client::run(ClientParams::from_args(args)?)?)
}

/// The 16 bytes of a boot id such as `0b5e8c7a-...`: its hexadecimal digits, two by two.
fn boot_id_bytes(text: &str) -> [u8; 16] {
    let digits: Vec<u8> =
        text.chars().filter_map(|c| c.to_digit(16)).map(|digit| digit as u8).collect();
    let mut bytes = [0; 16];
    for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
        *byte = pair[0] << 4 | pair[1];
    }
    bytes
}
