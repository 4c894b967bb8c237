//! `lifeboat limit VM`: what it may send, and what its guest may change on its disks, from now on.

use lifeboat_protocol::controller::LimitRequest;
use lifeboat_protocol::units::{BitsPerSec, BytesPerSec};

use super::CliError;
use super::client::Context;
use super::output::{print, print_json};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The VM; it has to be on its way.
    vm: String,
    /// What it may send, in Mbit/s; `none`: what its way carries.
    #[arg(long, value_name = "MBIT", value_parser = limit, required_unless_present = "disk")]
    network: Option<u64>,
    /// What its guest may change on its disks, in MB/s; `none`: no limit.
    #[arg(long, value_name = "MB", value_parser = limit)]
    disk: Option<u64>,
}

/// Millions a second; 0 stands for `none`.
pub(super) fn limit(text: &str) -> Result<u64, String> {
    if text == "none" {
        return Ok(0);
    }
    let millions: u64 = text.parse().map_err(|_| "neither a whole number nor `none`")?;
    let limit = millions.checked_mul(1_000_000).ok_or("too large")?;
    if limit == 0 { Err("nothing would ever move; at least 1".to_owned()) } else { Ok(limit) }
}

pub(super) async fn run(context: &Context, args: Args) -> Result<u8, CliError> {
    let request = LimitRequest {
        vm: args.vm,
        network_bits_per_sec: args.network,
        disk_bytes_per_sec: args.disk,
    };
    let reply = context.client().await?.limit(request).await?.into_inner();
    if context.json {
        print_json(&reply)?;
        return Ok(0);
    }
    if let Some(bits) = reply.network_bits_per_sec {
        print(&format!("{} sends at most {}\n", reply.vm, BitsPerSec(bits)))?;
    }
    match reply.disk_bytes_per_sec {
        Some(0) => print(&format!("{} changes its disks as fast as it likes\n", reply.vm))?,
        Some(rate) => {
            let rate = BytesPerSec(rate);
            print(&format!("{} changes its disks by at most {rate}\n", reply.vm))?;
        }
        None => {}
    }
    Ok(0)
}
