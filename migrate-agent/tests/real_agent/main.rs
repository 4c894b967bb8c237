//! The agent's binary with the QEMU that is installed: VMs outlive it, and are found again.
//!
//! QEMU is to run as another user here, so these tests need root, as the agent does.

mod agent;
mod stores;
mod tls;

use std::time::Duration;

use agent::{Agent, bare_definition, is_alive, status};
use lifeboat_protocol::agent::{
    Command, DescribeHostRequest, MeasureVmRequest, StartVmRequest, StopVmRequest, VmState,
};
use tonic::Code;

fn start_request(agent: &mut Agent, vm: &str) -> StartVmRequest {
    StartVmRequest { command: agent.command(), vm: vm.to_owned() }
}

fn status_line(pid: u32, key: &str) -> String {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    text.lines().find_map(|line| line.strip_prefix(key)).unwrap().trim().to_owned()
}

#[tokio::test]
async fn a_vm_outlives_a_killed_agent_and_is_found_again() {
    let mut agent = Agent::prepare(&[("web", &bare_definition("web"))]);
    let mut client = agent.start().await;
    assert_eq!(status(&mut client, "web").await.state(), VmState::Stopped);
    let request = start_request(&mut agent, "web");
    let started = client.start_vm(request.clone()).await.unwrap().into_inner().status.unwrap();
    assert_eq!((started.state(), started.generation), (VmState::Running, 1));
    let pid = started.qemu_pid;

    // Unprivileged, confined (seccomp mode 2 is a filter), and in a session of its own.
    assert!(status_line(pid, "Uid:").split('\t').all(|uid| uid != "0"));
    assert_eq!(status_line(pid, "Seccomp:"), "2");
    assert_eq!(status_line(pid, "NoNewPrivs:"), "1");
    let session = rustix::process::getsid(rustix::process::Pid::from_raw(pid.cast_signed()));
    assert_eq!(session.unwrap().as_raw_nonzero().get().cast_unsigned(), pid);

    // The same operation again is the same outcome; another one is told that it runs.
    let again = client.start_vm(request).await.unwrap().into_inner().status.unwrap();
    assert_eq!(again.qemu_pid, pid);
    let other = start_request(&mut agent, "web");
    assert_eq!(client.start_vm(other).await.unwrap_err().code(), Code::AlreadyExists);

    agent.kill();
    assert!(is_alive(pid));
    let mut client = agent.start().await;
    let adopted = status(&mut client, "web").await;
    assert_eq!((adopted.state(), adopted.qemu_pid), (VmState::Running, pid));
    assert!(!adopted.qemu_version.is_empty());

    let stop = StopVmRequest { command: agent.command(), vm: "web".to_owned(), grace_ms: 0 };
    let stopped = client.stop_vm(stop).await.unwrap().into_inner().status.unwrap();
    assert_eq!((stopped.state(), stopped.qemu_pid), (VmState::Stopped, 0));
    assert!(!is_alive(pid) && !agent.run_dir("web").path().exists());
    assert_eq!(agent.terminate(), Some(0));
}

#[tokio::test]
async fn a_qemu_that_died_while_no_agent_ran_is_crashed_and_can_be_started_again() {
    let mut agent = Agent::prepare(&[("db", &bare_definition("db"))]);
    let mut client = agent.start().await;
    let request = start_request(&mut agent, "db");
    let pid = client.start_vm(request).await.unwrap().into_inner().status.unwrap().qemu_pid;
    assert_eq!(agent.terminate(), Some(0));
    assert!(is_alive(pid));
    let raw = rustix::process::Pid::from_raw(pid.cast_signed()).unwrap();
    rustix::process::kill_process(raw, rustix::process::Signal::KILL).unwrap();
    // Its number now belongs to somebody else: to us, who must not be touched.
    std::fs::write(agent.run_dir("db").pid_file(), format!("{}\n", std::process::id())).unwrap();
    let mut client = agent.start().await;
    let crashed = status(&mut client, "db").await;
    assert_eq!((crashed.state(), crashed.qemu_pid), (VmState::Crashed, 0));
    let request = start_request(&mut agent, "db");
    let again = client.start_vm(request).await.unwrap().into_inner().status.unwrap();
    assert_eq!(again.state(), VmState::Running);
    assert_ne!(again.qemu_pid, pid);
}

#[tokio::test]
async fn commands_are_checked_before_anything_happens() {
    let large = bare_definition("large").replace("64 MiB", "4096 MiB");
    let images = bare_definition("images") + "kernel = \"vmlinuz\"\n";
    let mut agent = Agent::prepare(&[("large", &large), ("images", &images)]);
    let mut client = agent.start().await;
    let mut refused = async |request: StartVmRequest| client.start_vm(request).await.unwrap_err();
    let unknown = refused(start_request(&mut agent, "nobody")).await;
    assert_eq!(unknown.code(), Code::NotFound);
    assert!(unknown.message().contains("`nobody`"), "{unknown}");
    let no_name = refused(start_request(&mut agent, "../x")).await;
    assert_eq!(no_name.code(), Code::InvalidArgument);
    let too_large = refused(start_request(&mut agent, "large")).await;
    assert_eq!(too_large.code(), Code::ResourceExhausted);
    assert!(too_large.message().contains("of 1 GiB are free"), "{too_large}");
    let no_image = refused(start_request(&mut agent, "images")).await;
    assert!(no_image.message().contains("image `vmlinuz` is not in"), "{no_image}");
    let without = StartVmRequest { command: None, vm: "large".to_owned() };
    assert_eq!(refused(without).await.code(), Code::InvalidArgument);
    let reused = Command { operation_id: "op1".to_owned(), term: 1 };
    let reused = StartVmRequest { command: Some(reused), vm: "large".to_owned() };
    assert!(refused(reused).await.message().contains("used for another command"));
    // A new controller's term is obeyed, and from then on the old one's is not.
    let newer = Command { operation_id: "new".to_owned(), term: 2 };
    let newer = StartVmRequest { command: Some(newer), vm: "nobody".to_owned() };
    assert_eq!(refused(newer).await.code(), Code::NotFound);
    let stale = refused(start_request(&mut agent, "nobody")).await;
    assert_eq!(stale.code(), Code::FailedPrecondition);
    assert!(stale.message().contains("term 2"), "{stale}");
}

#[tokio::test]
async fn a_host_is_described_and_a_vm_measured() {
    let mut agent = Agent::prepare(&[("web", &bare_definition("web"))]);
    let mut client = agent.start().await;
    let host = client.describe_host(DescribeHostRequest {}).await.unwrap().into_inner();
    assert_eq!(host.host, "h1");
    assert!(host.machine_types.iter().any(|machine| machine == "pc-i440fx-7.2"));
    assert!(host.cpu_models.iter().any(|model| model == "qemu64"));
    assert!(host.devices.iter().any(|device| device == "virtio-net-pci"));
    assert_eq!(host.memory_free_bytes, 1 << 30);
    let request = start_request(&mut agent, "web");
    client.start_vm(request).await.unwrap();
    let described = client.describe_host(DescribeHostRequest {}).await.unwrap().into_inner();
    let taken = host.memory_free_bytes - described.memory_free_bytes;
    assert_eq!(taken >> 20, 64 + 64 + 32 + 1);
    // The firmware writes to some of its memory, once it has come to that, and to little of it.
    let mut written = async || loop {
        let window = MeasureVmRequest { vm: "web".to_owned(), window_ms: 500 };
        let measured = client.measure_vm(window).await.unwrap().into_inner();
        assert_eq!(measured.memory_pages, (64 << 20 >> 12) + 2);
        assert!(measured.non_zero_pages < 4000, "{measured:?}");
        if measured.non_zero_pages >= 10 {
            break measured;
        }
    };
    let measured = tokio::time::timeout(Duration::from_secs(60), written()).await.unwrap();
    assert!(measured.window_ms >= 500 && measured.sampled_pages > 0);
}

#[tokio::test]
async fn an_agent_says_what_is_wrong_with_its_configuration_and_a_second_one_is_refused() {
    let mut agent = Agent::prepare(&[]);
    let path = agent.directory.path().join("agent.toml");
    let run = |check: bool| {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_lifeboat-agent"));
        command.arg("--config").arg(&path);
        let command = if check { command.arg("--check") } else { &mut command };
        let output = command.output().unwrap();
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    };
    assert_eq!(run(true).0, Some(0));
    let _client = agent.start().await;
    let (code, said) = run(false);
    assert_eq!(code, Some(1));
    assert!(said.contains("another agent runs"), "{said}");
    let text = std::fs::read_to_string(&path).unwrap().replace("\"1 GiB\"", "1");
    std::fs::write(&path, text).unwrap();
    let (code, said) = run(true);
    assert_eq!(code, Some(1));
    assert!(said.contains("agent.toml:9: `memory`: invalid type: integer `1`"), "{said}");
}

/// A process that looks like a libvirt guest is named, and nothing of it is touched.
#[tokio::test]
async fn a_qemu_of_somebody_else_is_recognised() {
    let mut agent = Agent::prepare(&[]);
    let mut client = agent.start().await;
    let fake = agent.directory.path().join("qemu-system-fake");
    std::fs::copy("/bin/sleep", &fake).unwrap();
    let mut child = std::process::Command::new("/bin/sh")
        .arg("-c")
        .arg("exec \"$0\" 60 2>/dev/null")
        .arg(&fake)
        .spawn()
        .unwrap();
    let mut owner = None;
    for _ in 0..50 {
        let host = client.describe_host(DescribeHostRequest {}).await.unwrap().into_inner();
        owner = host.foreign_vms.into_iter().find(|vm| vm.pid == child.id()).map(|vm| vm.owner);
        if owner.is_some() {
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
    let untouched = child.try_wait().unwrap().is_none();
    child.kill().unwrap();
    child.wait().unwrap();
    assert_eq!(owner.as_deref(), Some("an unknown manager"));
    assert!(untouched);
}
