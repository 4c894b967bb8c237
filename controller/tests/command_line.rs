//! The real binary: its daemon killed with -9 while a VM is under way, and its commands over a unix
//! socket and over TCP with certificates of every role.

#[allow(dead_code, unused_imports, reason = "the counting switches are for the other test")]
mod cloud;

use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use cloud::Cloud;

const BINARY: &str = env!("CARGO_BIN_EXE_lifeboat");

/// A daemon that is killed when the test ends, however it ends.
struct Daemon(Child);

impl Drop for Daemon {
    fn drop(&mut self) {
        // It may have been killed already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn daemon(config: &Path) -> Daemon {
    let child = Command::new(BINARY)
        .args(["controller", "--config"])
        .arg(config)
        .env("LIFEBOAT_LOG", "warn")
        .stderr(Stdio::inherit())
        .spawn();
    Daemon(child.unwrap())
}

fn lifeboat(server: &str, tls: Option<&Path>, line: &str) -> Output {
    let mut command = Command::new(BINARY);
    command.env_remove("LIFEBOAT_TLS_DIR").args(["--server", server]).args(line.split(' '));
    if let Some(dir) = tls {
        command.arg("--tls-dir").arg(dir);
    }
    command.stdin(Stdio::null()).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Tries until the command succeeds: a daemon that was just started is not there yet.
async fn eventually(server: &str, line: &str, wanted: &str) -> String {
    let mut last = String::new();
    for _ in 0..200 {
        let output = lifeboat(server, None, line);
        last = format!("{}{}", text(&output.stdout), text(&output.stderr));
        if output.status.success() && last.contains(wanted) {
            return last;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("`lifeboat {line}` never said {wanted}: {last}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_controller_killed_with_9_finishes_when_it_is_started_again() {
    let cloud = Cloud::new(3, &["a", "b"]);
    let config = cloud.path("lab.toml");
    std::fs::write(&config, cloud.config(3)).unwrap();
    let server = format!("unix:{}", cloud.path("c.sock").display());
    let mut first = daemon(&config);
    eventually(&server, "hosts --json", "\"state\": \"active\"").await;
    eventually(&server, "vms", "running").await;
    let begun = lifeboat(&server, None, "evacuate h1 --urgency 0 --yes --detach");
    assert!(begun.status.success(), "{}", text(&begun.stderr));
    while cloud.truth().migrations.is_empty() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    first.0.kill().unwrap();
    first.0.wait().unwrap();
    let _second = daemon(&config);
    let report = eventually(&server, "report e1", "e1 of h1: done").await;
    assert!(report.contains("moved"), "{report}");
    assert_eq!(cloud.truth().violations, Vec::<String>::new());
    assert!(cloud.truth().at.values().all(|at| at != "h1"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_exit_code_and_the_last_lines_say_how_it_ended() {
    let cloud = Cloud::new(2, &["a", "b"]);
    cloud.truth().failing.insert("a".to_owned());
    let config = cloud.path("lab.toml");
    std::fs::write(&config, cloud.config(2)).unwrap();
    let server = format!("unix:{}", cloud.path("c.sock").display());
    let _daemon = daemon(&config);
    eventually(&server, "vms", "running").await;
    let plan = text(&lifeboat(&server, None, "plan h1 --urgency 75").stdout);
    assert!(
        plan.starts_with("evacuation of h1: 2 to move, 0 stay; mode auto, urgency 75 %"),
        "{plan}"
    );
    assert!(plan.contains("h1 > h1.br0:h1-eth0 > s1:s1-eth2 > h2"), "{plan}");
    let asked = lifeboat(&server, None, "evacuate h1 --urgency 0");
    assert_eq!(asked.status.code(), Some(1));
    assert!(text(&asked.stderr).contains("add --yes"), "{}", text(&asked.stderr));
    let refused = lifeboat(&server, None, "evacuate h1 --urgency 75 --yes");
    assert_eq!(refused.status.code(), Some(3), "{}", text(&refused.stdout));
    assert!(text(&refused.stdout).contains("openflow_listen"), "{}", text(&refused.stdout));
    let ended = lifeboat(&server, None, "evacuate h1 --urgency 0 --yes");
    let said = text(&ended.stdout);
    assert_eq!(ended.status.code(), Some(2), "{said}{}", text(&ended.stderr));
    assert!(said.contains("a: left-behind: ") && said.contains("the page link broke"), "{said}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_certificates_of_operators_and_controllers_give_commands() {
    let cloud = Cloud::new(2, &["a"]);
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let pki = cloud.path("pki");
    let init =
        format!("certs init {} --agent h1 --controller c1=127.0.0.1 --operator ann", pki.display());
    let made = lifeboat("unix:/none", None, &init);
    assert!(made.status.success(), "{}", text(&made.stderr));
    let dir = cloud.dir.path().display();
    let tls = format!(
        "listen = [\"unix:{dir}/c.sock\", \"127.0.0.1:{port}\"]\ntls_dir = \"{dir}/pki/controller-c1\""
    );
    let config = cloud.path("lab.toml");
    let plain = format!("listen = [\"unix:{dir}/c.sock\"]");
    std::fs::write(&config, cloud.config(2).replace(&plain, &tls)).unwrap();
    let _daemon = daemon(&config);
    let socket = format!("unix:{dir}/c.sock");
    eventually(&socket, "vms", "running").await;
    let server = format!("127.0.0.1:{port}");
    let by = |role: &str| lifeboat(&server, Some(&pki.join(role)), "cordon h2");
    let operator = by("operator-ann");
    assert!(operator.status.success(), "{}", text(&operator.stderr));
    assert!(by("controller-c1").status.success());
    let agent = by("agent-h1");
    assert_eq!(agent.status.code(), Some(1));
    assert!(text(&agent.stderr).contains("may not give commands"), "{}", text(&agent.stderr));
    let nobody = lifeboat(&server, None, "cordon h2");
    assert_eq!(nobody.status.code(), Some(1), "{}", text(&nobody.stdout));
    // A certificate of another authority opens nothing.
    let other = cloud.path("other");
    let init = format!("certs init {} --operator eve", other.display());
    assert!(lifeboat("unix:/none", None, &init).status.success());
    let stranger = lifeboat(&server, Some(&other.join("operator-eve")), "cordon h2");
    assert_eq!(stranger.status.code(), Some(1));
    let audit = std::fs::read_to_string(cloud.path("state/audit.jsonl")).unwrap();
    assert_eq!(audit.lines().count(), 2, "{audit}");
    assert!(audit.contains("\"operator\":\"ann\",\"by\":\"certificate\""), "{audit}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_is_believed_only_with_the_certificate_of_its_own_host() {
    let cloud = Cloud::new(2, &["a"]);
    let dir = cloud.dir.path().display();
    let init = format!("certs init {dir}/pki --agent h1,h2 --controller c1 --operator ann");
    assert!(lifeboat("unix:/none", None, &init).status.success());
    let own = cloud.path("pki/agent-h1");
    let h1 = cloud.serve_tls("h1", &own).await;
    let h2 = cloud.serve_tls("h2", &own).await;
    let state = format!("state_dir = \"{dir}/state\"");
    let with_tls = format!("{state}\ntls_dir = \"{dir}/pki/controller-c1\"");
    let text = cloud
        .config(2)
        .replace(&state, &with_tls)
        .replace(&format!("unix:{dir}/h1.sock"), &h1.to_string())
        .replace(&format!("unix:{dir}/h2.sock"), &h2.to_string());
    let config = cloud.path("lab.toml");
    std::fs::write(&config, text).unwrap();
    let _daemon = daemon(&config);
    let server = format!("unix:{dir}/c.sock");
    eventually(&server, "vms h1", "running").await;
    let hosts = eventually(&server, "hosts", "active").await;
    let second = hosts.lines().find(|line| line.starts_with("h2")).unwrap();
    assert!(second.contains("unreachable"), "{hosts}");
}
