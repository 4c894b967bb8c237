//! `lifeboat certs init DIR`: a certificate authority and one directory per agent, controller and
//! operator, each with `ca.pem`, `cert.pem`, `key.pem`.
//!
//! The role is in a URI (`lifeboat://agent/h1`), the names by which it is called are beside it.
//! Private keys are readable by their owner only, also the CA's; whoever has that can make an
//! operator. Nothing is ever overwritten.

use std::fs::OpenOptions;
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use clap::Subcommand;
use rcgen::{
    BasicConstraints, Certificate, CertificateParams, CertifiedIssuer, DnType,
    ExtendedKeyUsagePurpose, IsCa, KeyPair, KeyUsagePurpose, SanType,
};

use super::CliError;
use super::output::print;
use crate::tls::Role;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Make a CA and the certificates of a whole site.
    Init(Init),
}

#[derive(Debug, clap::Args)]
struct Init {
    /// Where to; made if it is not there.
    dir: PathBuf,
    /// An agent by its host's name and the addresses it is called by: h1=10.99.0.1; h1 alone is enough.
    #[arg(long, value_delimiter = ',', value_name = "HOST=ADDR,..")]
    agent: Vec<String>,
    /// A controller with its addresses: c1=10.99.0.254.
    #[arg(long, value_delimiter = ',', value_name = "NAME=ADDR,..")]
    controller: Vec<String>,
    /// An operator by name.
    #[arg(long, value_delimiter = ',', value_name = "NAME,..")]
    operator: Vec<String>,
}

type Issuer = CertifiedIssuer<'static, KeyPair>;

pub(super) fn run(args: Args) -> Result<u8, CliError> {
    let Command::Init(init) = args.command;
    let made = make(&init)?;
    let list: Vec<String> = made.iter().map(|dir| format!("  {}\n", dir.display())).collect();
    print(&format!(
        "made {} certificates; copy each directory to its machine and keep {} in a safe place\n{}",
        made.len(),
        init.dir.join("ca-key.pem").display(),
        list.concat()
    ))?;
    Ok(0)
}

fn make(init: &Init) -> Result<Vec<PathBuf>, CliError> {
    make_dir(&init.dir)?;
    let issuer = authority()?;
    write(&init.dir.join("ca.pem"), &issuer.pem(), 0o644)?;
    write(&init.dir.join("ca-key.pem"), &issuer.key().serialize_pem(), 0o600)?;
    let roles = [
        (Role::Agent, &init.agent),
        (Role::Controller, &init.controller),
        (Role::Operator, &init.operator),
    ];
    let mut made = Vec::new();
    for (role, entries) in roles {
        for (name, addresses) in grouped(entries) {
            made.push(member(&init.dir, &issuer, role, &name, &addresses)?);
        }
    }
    Ok(made)
}

/// `h1=a`, `h1=b` and `h2` as h1 with two addresses and h2 with none.
fn grouped(entries: &[String]) -> Vec<(String, Vec<String>)> {
    let mut grouped: Vec<(String, Vec<String>)> = Vec::new();
    for entry in entries {
        let (name, address) = match entry.split_once('=') {
            Some((name, address)) => (name, Some(address.to_owned())),
            None => (entry.as_str(), None),
        };
        match grouped.iter_mut().find(|(known, _)| known == name) {
            Some((_, addresses)) => addresses.extend(address),
            None => grouped.push((name.to_owned(), address.into_iter().collect())),
        }
    }
    grouped
}

fn authority() -> Result<Issuer, CliError> {
    let failed = |source| CliError::Certificate { of: "the authority".to_owned(), source };
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, "Lifeboat CA");
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let key = KeyPair::generate().map_err(failed)?;
    CertifiedIssuer::self_signed(params, key).map_err(failed)
}

fn member(
    dir: &Path,
    issuer: &Issuer,
    role: Role,
    name: &str,
    addresses: &[String],
) -> Result<PathBuf, CliError> {
    let failed = |source| CliError::Certificate { of: format!("{role} {name}"), source };
    // The name becomes a directory: it is checked as any other name.
    let checked = lifeboat_protocol::ids::HostId::new(name)
        .map_err(|error| CliError::Refused { sentence: error.to_string() })?;
    let key = KeyPair::generate().map_err(failed)?;
    let certificate =
        certificate(issuer, &key, role, checked.as_str(), addresses).map_err(failed)?;
    let own = dir.join(format!("{role}-{checked}"));
    make_dir(&own)?;
    write(&own.join("ca.pem"), &issuer.pem(), 0o644)?;
    write(&own.join("cert.pem"), &certificate.pem(), 0o644)?;
    write(&own.join("key.pem"), &key.serialize_pem(), 0o600)?;
    Ok(own)
}

fn certificate(
    issuer: &Issuer,
    key: &KeyPair,
    role: Role,
    name: &str,
    addresses: &[String],
) -> Result<Certificate, rcgen::Error> {
    // An operator is never called, so it needs no name that could be taken for a host's.
    let names: Vec<String> = match role {
        Role::Operator => Vec::new(),
        Role::Agent | Role::Controller => {
            std::iter::once(name.to_owned()).chain(addresses.iter().cloned()).collect()
        }
    };
    let mut params = CertificateParams::new(names)?;
    params.distinguished_name.push(DnType::CommonName, format!("{role} {name}"));
    let uri = format!("lifeboat://{role}/{name}").try_into()?;
    params.subject_alt_names.push(SanType::URI(uri));
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = match role {
        Role::Operator => vec![ExtendedKeyUsagePurpose::ClientAuth],
        Role::Agent | Role::Controller => {
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth]
        }
    };
    params.use_authority_key_identifier_extension = true;
    params.signed_by(key, issuer)
}

fn make_dir(dir: &Path) -> Result<(), CliError> {
    let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(dir);
    made.map_err(|source| CliError::Write { file: dir.to_owned(), source })
}

fn write(file: &Path, text: &str, mode: u32) -> Result<(), CliError> {
    let opened = OpenOptions::new().write(true).create_new(true).mode(mode).open(file);
    let failed = |source: std::io::Error| match source.kind() {
        std::io::ErrorKind::AlreadyExists => CliError::Exists { file: file.to_owned() },
        _ => CliError::Write { file: file.to_owned(), source },
    };
    let mut out = opened.map_err(failed)?;
    out.write_all(text.as_bytes()).and_then(|()| out.sync_all()).map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn init(dir: &Path) -> Init {
        Init {
            dir: dir.to_owned(),
            agent: vec!["h1=10.99.0.1".to_owned(), "h1=h1.example".to_owned(), "h2".to_owned()],
            controller: vec!["c1=127.0.0.1".to_owned()],
            operator: vec!["ann".to_owned()],
        }
    }

    #[test]
    fn each_role_gets_a_directory_with_a_private_key_and_its_role_in_the_certificate() {
        let dir = tempfile::tempdir().unwrap();
        let made = make(&init(dir.path())).unwrap();
        assert_eq!(made.len(), 4);
        let key = std::fs::metadata(dir.path().join("agent-h1/key.pem")).unwrap();
        assert_eq!(key.permissions().mode() & 0o777, 0o600);
        let pem = std::fs::read(dir.path().join("operator-ann/cert.pem")).unwrap();
        let der = rustls_pemfile::certs(&mut pem.as_slice()).next().unwrap().unwrap();
        assert_eq!(crate::tls::role_of(&der).unwrap(), (Role::Operator, "ann".to_owned()));
    }

    #[test]
    fn nothing_is_overwritten() {
        let dir = tempfile::tempdir().unwrap();
        make(&init(dir.path())).unwrap();
        let error = make(&init(dir.path())).unwrap_err().to_string();
        assert!(error.contains("ca.pem") && error.contains("never overwritten"), "{error}");
    }
}
