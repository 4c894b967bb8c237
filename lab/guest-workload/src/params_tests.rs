//! Tests of the parameters: what is accepted, and what an error says.

use super::*;

fn client(args: &[&str]) -> Result<ClientParams, ParamError> {
    ClientParams::from_args(&args.iter().map(|arg| (*arg).to_owned()).collect::<Vec<_>>())
}

#[test]
fn a_kernel_command_line_is_read_and_the_kernels_words_are_left_alone() {
    let line = "console=ttyS0 quiet lb.role=NO lb.client=10.0.0.100 lb.ip=10.0.0.101/24 \
                lb.rate=40000000 lb.region=64MiB lb.dirty=21";
    let params = GuestParams::from_command_line(line).unwrap();
    assert_eq!(params.role, Role::No);
    assert_eq!((params.rate, params.region, params.dirty), (40_000_000, 64 << 20, 21));
}

#[test]
fn a_wrong_value_says_which_key_and_what_would_be_right() {
    let error = GuestParams::from_command_line("lb.role=XL").unwrap_err();
    assert_eq!(error.to_string(), "lb.role=XL cannot be used: expected NO, NI, M, C or idle");
}

#[test]
fn a_misspelt_key_is_refused() {
    let error = GuestParams::from_command_line("lb.rolle=NO").unwrap_err();
    assert!(error.to_string().starts_with("lb.rolle is not a parameter; known are lb.name"));
}

#[test]
fn a_sending_guest_needs_a_client() {
    let error = GuestParams::from_command_line("lb.role=NO").unwrap_err();
    assert_eq!(error.to_string(), "lb.client is missing: give the client's address");
}

#[test]
fn a_size_that_no_guest_has_is_refused() {
    for size in ["99999999999999999999", "18014398509481985KiB", "2097152MiB", "1GB", ""] {
        assert!(GuestParams::from_command_line(&format!("lb.region={size}")).is_err(), "{size}");
    }
}

#[test]
fn a_block_that_no_disk_has_is_refused() {
    let read = |block: &str| GuestParams::from_command_line(&format!("lb.disk_block={block}"));
    assert_eq!(read("64KiB").unwrap().disk_block, 64 << 10);
    for block in ["0", "2KiB", "5000", "2MiB"] {
        assert!(read(block).is_err(), "{block}");
    }
}

#[test]
fn the_client_knows_its_guests() {
    let params =
        client(&["--guest", "name=log,ip=10.0.0.104,source=1000", "--out", "report.json"]).unwrap();
    assert_eq!((params.guests[0].name.as_str(), params.guests[0].source), ("log", 1000));
    assert_eq!(params.status, PathBuf::from("report.json.status"));
}

#[test]
fn a_client_without_guests_or_file_says_so() {
    assert!(client(&["--out", "x"]).unwrap_err().to_string().contains("--guest is missing"));
    let error = client(&["--guest", "name=a,ip=10.0.0.1"]).unwrap_err();
    assert!(error.to_string().contains("--out is missing"));
}

#[test]
fn a_name_that_would_break_the_report_is_refused() {
    assert!(client(&["--guest", "name=a\"b,ip=10.0.0.1", "--out", "x"]).is_err());
}
