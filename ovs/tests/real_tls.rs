//! TLS with a real ovsdb-server and a real ovs-vswitchd, and the certificates that `ovs-pki` makes.
//!
//! Needs ovs-pki and openssl besides.

mod lab;

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use lab::{Lab, PATIENCE};
use lifeboat_ovs::openflow::{self, WhatHappened};
use lifeboat_ovs::ovsdb::{self, Client, Operation, Status};
use lifeboat_ovs::{Endpoint, Tls};

/// What `ovs-pki` has made, in a directory of its own.
struct Pki(tempfile::TempDir);

impl Pki {
    /// Two authorities, one certificate of each.
    fn new() -> Self {
        let pki = Self(tempfile::tempdir().unwrap());
        pki.run(&["init"]);
        pki.run(&["req+sign", "switch", "switch"]);
        pki.run(&["req+sign", "controller", "controller"]);
        pki
    }

    fn run(&self, words: &[&str]) {
        let here = self.0.path();
        let mut command = Command::new("ovs-pki");
        command.arg("-d").arg(here.join("pki")).arg("-l").arg(here.join("log")).args(words);
        let status = command.current_dir(here).stdout(Stdio::null()).stderr(Stdio::null()).status();
        assert!(status.expect("ovs-pki must be installed").success(), "{words:?}");
    }

    fn file(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn authority(&self, of: &str) -> PathBuf {
        self.file("pki").join(format!("{of}ca")).join("cacert.pem")
    }

    /// Ours, that believes `authority`.
    fn tls(&self, authority: &Path, who: &str) -> Tls {
        let read = |file: &Path| std::fs::read(file).unwrap();
        let certificate = read(&self.file(&format!("{who}-cert.pem")));
        Tls::new(&read(authority), &certificate, &read(&self.file(&format!("{who}-privkey.pem"))))
            .unwrap()
    }

    /// Has the switch use its certificate, and believe the controllers'.
    fn dress(&self, lab: &Lab) {
        lab.vsctl(&format!(
            "set-ssl {} {} {}",
            self.file("switch-privkey.pem").display(),
            self.file("switch-cert.pem").display(),
            self.authority("controller").display()
        ));
    }
}

#[tokio::test]
async fn a_switch_connects_over_tls_and_a_stranger_does_not_get_through() {
    let (pki, lab) = (Pki::new(), Lab::dummy().await);
    pki.dress(&lab);
    let tls = Some(pki.tls(&pki.authority("switch"), "controller"));
    let settings = openflow::Settings { tls, ..openflow::Settings::default() };
    let (listener, mut switches) =
        openflow::listen("127.0.0.1:0".parse().unwrap(), settings).await.unwrap();
    let address = listener.address();

    // Somebody without a certificate.
    drop(
        openflow::connect(&Endpoint::Tcp(address.to_string()), openflow::Settings::default()).await,
    );
    let event = tokio::time::timeout(PATIENCE, switches.recv()).await.unwrap().unwrap();
    assert!(matches!(event.what, WhatHappened::Disconnected(Some(_))), "{event:?}");

    lab.vsctl(&format!("set-controller br0 ssl:{address}"));
    let connected = loop {
        let event = tokio::time::timeout(PATIENCE, switches.recv()).await.unwrap().unwrap();
        match event.what {
            WhatHappened::Connected { handle, .. } => break handle,
            // What the switch tries before it has read its certificates.
            WhatHappened::Disconnected(_) => {}
            other @ WhatHappened::Message(_) => panic!("{other:?}"),
        }
    };
    let ports = connected.port_desc(PATIENCE).await.unwrap();
    assert!(ports.iter().any(|port| &*port.name == "p1"), "{ports:?}");
}

/// An ovsdb-server that speaks nothing but TLS; ended with this.
struct Server {
    child: Child,
    address: String,
    _dir: tempfile::TempDir,
}

impl Server {
    fn start(pki: &Pki) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let database = dir.path().join("conf.db");
        let schema = "/usr/share/openvswitch/vswitch.ovsschema";
        let made = Command::new("ovsdb-tool").arg("create").arg(&database).arg(schema).status();
        assert!(made.expect("ovsdb-tool must be installed").success());
        let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let option = |name: &str, file: PathBuf| format!("--{name}={}", file.display());
        let child = Command::new("ovsdb-server")
            .arg(&database)
            .arg(format!("--remote=pssl:{free}:127.0.0.1"))
            .arg(option("unixctl", dir.path().join("ctl")))
            .arg(option("private-key", pki.file("switch-privkey.pem")))
            .arg(option("certificate", pki.file("switch-cert.pem")))
            .arg(option("ca-cert", pki.authority("controller")))
            .args(["-vconsole:off", "-vsyslog:off"])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("ovsdb-server must be installed");
        Self { child, address: format!("ssl:127.0.0.1:{free}"), _dir: dir }
    }

    fn client(&self, tls: Option<Tls>) -> Client {
        let settings = ovsdb::Settings { tls, ..ovsdb::Settings::default() };
        Client::start(self.address.parse::<Endpoint>().unwrap(), settings)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Why a client is not connected, once it has tried.
async fn refusal(client: &Client) -> String {
    let mut status = client.status();
    let tried = status.wait_for(|status| matches!(status, Status::Disconnected(Some(_))));
    let tried = tokio::time::timeout(PATIENCE, tried).await.unwrap().unwrap();
    format!("{:?}", *tried)
}

#[tokio::test]
async fn a_database_is_asked_over_tls_and_only_what_our_authority_signed_is_believed() {
    let pki = Pki::new();
    let server = Server::start(&pki);
    let client = server.client(Some(pki.tls(&pki.authority("switch"), "controller")));
    client.connected(PATIENCE).await.expect("the certificates fit");
    let read = Operation::select("Open_vSwitch", Vec::new(), &["cur_cfg"]);
    client.transact(&[read], PATIENCE).await.unwrap();

    // The server's certificate is of the switches' authority, not of this one.
    let doubting = server.client(Some(pki.tls(&pki.authority("controller"), "controller")));
    let why = refusal(&doubting).await;
    assert!(why.contains("certificate"), "{why}");
    let naked = server.client(None);
    let why = refusal(&naked).await;
    assert!(why.contains("no certificates for ssl: are set"), "{why}");
}
