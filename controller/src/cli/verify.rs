//! `lifeboat verify VM`: whether other hosts have what the VM's overlays lie on, and its images that
//! nobody writes to.

use lifeboat_protocol::controller::VerifyRequest;

use super::client::Context;
use super::output::{print, print_json, size, table};
use super::{CliError, PARTIAL};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The VM.
    vm: String,
    /// Only this host instead of every one that is connected.
    #[arg(long)]
    host: Option<String>,
}

pub(super) async fn run(context: &Context, args: Args) -> Result<u8, CliError> {
    let request = VerifyRequest { vm: args.vm, host: args.host.unwrap_or_default() };
    let reply = context.client().await?.verify(request).await?.into_inner();
    let code = if reply.same { 0 } else { PARTIAL };
    if context.json {
        print_json(&reply)?;
        return Ok(code);
    }
    if reply.files.is_empty() {
        let none = "none of its local disks is an overlay or read-only";
        print(&format!("{} at {}: {none}\n", reply.vm, reply.host))?;
        return Ok(code);
    }
    let rows = reply.files.iter().map(|file| {
        let cells = [&file.host, &file.disk, &file.path, &file.state, &file.detail];
        let [host, disk, path, state, detail] = cells.map(Clone::clone);
        vec![host, disk, path, size(file.bytes), file.hash.clone(), state, detail]
    });
    let rows: Vec<Vec<String>> = rows.collect();
    let head = ["HOST", "DISK", "FILE", "SIZE", "XXH3", "", ""];
    print(&table(&head, &rows))?;
    Ok(code)
}
