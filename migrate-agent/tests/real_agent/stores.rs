//! The agent as an intermediary, with the redis-server that is installed: a store is started as
//! another user, outlives the agent, is adopted, and leaves nothing behind.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use lifeboat_protocol::agent::agent_client::AgentClient;
use lifeboat_protocol::agent::{
    DescribeHostRequest, HostDescription, PageStore, PrepareStoreRequest, ReleaseStoreRequest,
};
use lifeboat_protocol::ids::MigrationId;
use lifeboat_protocol::units::Bytes;
use lifeboat_scatter_gather::page::PackId;
use lifeboat_scatter_gather::store::{
    KeySpace, Launch, Login, RedisStore, Secret, Settings, StoreError, StoreServer, User,
};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tonic::Code;
use tonic::transport::Channel;

use crate::agent::{Agent, is_alive};

pub(crate) const PATIENCE: Duration = Duration::from_secs(20);
const MIB: u64 = 1 << 20;

/// An agent with the role, and what `[intermediary]` says.
pub(crate) fn intermediary(section: &str) -> Agent {
    let agent = Agent::prepare(&[]);
    let file = agent.directory.path().join("agent.toml");
    let text = std::fs::read_to_string(&file).unwrap();
    let roles = "roles = [\"hypervisor\", \"intermediary\"]\n";
    std::fs::write(&file, format!("{roles}{text}\n[intermediary]\n{section}\n")).unwrap();
    agent
}

pub(crate) fn wish(agent: &mut Agent, migration: &str, mib: u64) -> PrepareStoreRequest {
    PrepareStoreRequest {
        command: agent.command(),
        migration: migration.to_owned(),
        vm: "web".to_owned(),
        memory_bytes: mib * MIB,
        source_host: "h2".to_owned(),
        destination_host: "h3".to_owned(),
    }
}

pub(crate) fn release(agent: &mut Agent, migration: &str) -> ReleaseStoreRequest {
    ReleaseStoreRequest { command: agent.command(), migration: migration.to_owned() }
}

async fn describe(client: &mut AgentClient<Channel>) -> HostDescription {
    client.describe_host(DescribeHostRequest {}).await.unwrap().into_inner()
}

/// As an agent of the migration comes in, over whatever connection.
pub(crate) async fn enter_by<S>(
    stream: S,
    store: &PageStore,
    migration: &str,
) -> Result<RedisStore, StoreError>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let login = Login {
        user: User { name: store.user.clone(), secret: Secret::given(&store.secret) },
        keys: KeySpace::new(&MigrationId::new(migration).unwrap()),
        patience: PATIENCE,
        expected: None,
    };
    RedisStore::connect(stream, &login).await
}

async fn enter(store: &PageStore, migration: &str) -> RedisStore {
    let stream = TcpStream::connect(&store.address).await.unwrap();
    enter_by(stream, store, migration).await.unwrap()
}

fn record(agent: &Agent, migration: &str) -> serde_json::Value {
    let file = agent.directory.path().join(format!("state/stores/{migration}.json"));
    serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap()
}

fn process(agent: &Agent, migration: &str) -> u32 {
    u32::try_from(record(agent, migration)["process"].as_u64().unwrap()).unwrap()
}

#[tokio::test]
async fn a_store_outlives_its_agent_and_leaves_nothing_when_it_is_released() {
    let mut agent = intermediary("memory = \"400 MiB\"\nports = \"27100-27119\"");
    let mut client = agent.start().await;
    let before = describe(&mut client).await;
    assert_eq!((before.store_obstacle.as_str(), before.stores.len()), ("", 0));
    assert!(before.roles.contains(&"intermediary".to_owned()));

    let request = wish(&mut agent, "e1-m1", 64);
    let store = client.prepare_store(request.clone()).await.unwrap().into_inner().store.unwrap();
    assert_eq!((store.host.as_str(), store.memory_bytes, store.plain), ("h1", 64 * MIB, true));
    let pid = process(&agent, "e1-m1");
    let uid = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let uid = uid.lines().find(|line| line.starts_with("Uid:")).unwrap();
    assert!(uid.split_whitespace().skip(1).all(|uid| uid != "0"), "{uid}");
    let again = client.prepare_store(request).await.unwrap().into_inner().store.unwrap();
    assert_eq!(again, store);
    // Its memory is neither a VM's any more nor another store's.
    let after = describe(&mut client).await;
    let aside = after.stores[0].memory_bytes;
    assert!(aside > 64 * MIB && before.memory_free_bytes - after.memory_free_bytes == aside);
    let large = wish(&mut agent, "e1-m2", 400);
    let refused = client.prepare_store(large).await.unwrap_err();
    assert_eq!(refused.code(), Code::ResourceExhausted);
    assert!(refused.message().contains("of 400 MiB for stores are free"), "{refused}");

    let inside = enter(&store, "e1-m1").await;
    let key = inside.keys().pack(PackId(0));
    inside.put(&key, &[7; 9000]).await.unwrap();
    agent.kill();
    assert!(is_alive(pid));
    let mut client = agent.start().await;
    let adopted = describe(&mut client).await;
    assert_eq!(adopted.memory_free_bytes, after.memory_free_bytes);
    assert_eq!(adopted.stores[0].migration, "e1-m1");
    assert_eq!(inside.get(&key).await.unwrap(), [7; 9000][..]);

    let request = release(&mut agent, "e1-m1");
    assert!(client.release_store(request).await.unwrap().into_inner().held_pages);
    assert!(!is_alive(pid));
    let request = release(&mut agent, "e1-m1");
    assert!(!client.release_store(request).await.unwrap().into_inner().held_pages);
    let gone = describe(&mut client).await;
    assert_eq!((gone.memory_free_bytes, gone.stores.len()), (before.memory_free_bytes, 0));
    let left = std::fs::read_dir(agent.directory.path().join("state/stores")).unwrap().count();
    assert_eq!(left, 0);
    assert_eq!(agent.terminate(), Some(0));
}

/// Where this machine has groups for memory that are ours to make, the word for them in `/proc/PID/cgroup`,
/// and the file with a group's limit.
fn groups() -> Option<(PathBuf, &'static str, &'static str)> {
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    let mounted = |kind: &str, option: &str| {
        let of_kind = |line: &&str| {
            let own = line.split(" - ").nth(1).unwrap_or_default();
            own.starts_with(kind) && own.contains(option)
        };
        let line = mounts.lines().find(of_kind)?;
        Some(PathBuf::from(line.split(' ').nth(4).unwrap()))
    };
    let second = mounted("cgroup2 ", "").filter(|root| {
        let all = std::fs::read_to_string(root.join("cgroup.controllers")).unwrap_or_default();
        all.split_whitespace().any(|controller| controller == "memory")
    });
    let found = match second {
        Some(root) => (root, ":", "memory.max"),
        None => (mounted("cgroup ", ",memory")?, "memory:", "memory.limit_in_bytes"),
    };
    let ours = found.0.join(format!("lifeboat-test-{}", std::process::id()));
    std::fs::create_dir(&ours).ok()?;
    std::fs::remove_dir(ours).unwrap();
    Some(found)
}

#[tokio::test]
async fn the_kernel_sets_memory_aside_for_a_store_before_a_page_comes() {
    let mut agent = intermediary("ports = \"27170-27179\"");
    let mut client = agent.start().await;
    let request = wish(&mut agent, "e7-m1", 64);
    client.prepare_store(request).await.unwrap();
    let aside = describe(&mut client).await.stores[0].memory_bytes;
    let pid = process(&agent, "e7-m1");
    let mut group = None;
    if let Some((root, word, limit)) = groups() {
        let all = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
        let own = all.lines().find_map(|line| line.split_once(':')?.1.strip_prefix(word));
        let own = root.join(own.unwrap().trim_start_matches('/'));
        assert!(own.ends_with("lifeboat-stores/h1-e7-m1"), "{}", own.display());
        let most = std::fs::read_to_string(own.join(limit)).unwrap();
        let most: u64 = most.trim().parse().unwrap();
        assert!((aside..=aside / 4 * 5 + 64 * MIB).contains(&most), "{aside} {most}");
        let swaps = ["memory.swappiness", "memory.swap.max"].map(|file| own.join(file));
        let swaps = swaps.iter().filter_map(|file| std::fs::read_to_string(file).ok());
        assert!(swaps.into_iter().all(|swaps| swaps.trim() == "0"), "it may be swapped");
        group = Some(own);
    } else {
        eprintln!(
            "no control groups for memory that are ours to make: only that it is counted is seen"
        );
        assert!(aside > 64 * MIB && is_alive(pid));
    }
    let request = release(&mut agent, "e7-m1");
    client.release_store(request).await.unwrap();
    assert!(group.is_none_or(|group| !group.exists()), "its group is left");
}

#[tokio::test]
async fn a_store_that_died_while_no_agent_ran_is_tidied_up() {
    let mut agent = intermediary("ports = \"27120-27129\"");
    let mut client = agent.start().await;
    let request = wish(&mut agent, "e2-m1", 16);
    client.prepare_store(request).await.unwrap();
    let pid = process(&agent, "e2-m1");
    agent.kill();
    let raw = rustix::process::Pid::from_raw(pid.cast_signed()).unwrap();
    rustix::process::kill_process(raw, rustix::process::Signal::KILL).unwrap();
    while is_alive(pid) {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let mut client = agent.start().await;
    assert!(describe(&mut client).await.stores.is_empty());
    // Its name is free for another.
    let request = wish(&mut agent, "e2-m1", 16);
    client.prepare_store(request).await.unwrap();
    let request = release(&mut agent, "e2-m1");
    assert!(!client.release_store(request).await.unwrap().into_inner().held_pages);
}

#[tokio::test]
async fn a_redis_that_runs_already_keeps_what_is_not_the_migrations() {
    let folder = tempfile::tempdir().unwrap();
    let plain: SocketAddr = "127.0.0.1:27140".parse().unwrap();
    let user = |name: &str| User { name: name.to_owned(), secret: Secret::given("hush") };
    let settings = Settings {
        folder: folder.path().to_owned(),
        room: Bytes::from_mib(64),
        keys: KeySpace::new(&MigrationId::new("e3-m1").unwrap()),
        owner: user("lb"),
        migration: user("other"),
        tls: None,
    };
    let launch = Launch { program: Path::new("redis-server"), user: None, plain: Some(plain) };
    let server = StoreServer::launch(launch, &settings, PATIENCE).await.unwrap();

    let mut agent = intermediary("redis = \"redis://lb:hush@127.0.0.1:27140\"");
    let mut client = agent.start().await;
    let request = wish(&mut agent, "e3-m2", 4096);
    let refused = client.prepare_store(request).await.unwrap_err();
    assert!(refused.message().contains("are needed"), "{refused}");
    let request = wish(&mut agent, "e3-m1", 16);
    let store = client.prepare_store(request).await.unwrap().into_inner().store.unwrap();
    assert_eq!((store.address.as_str(), store.user.as_str()), ("127.0.0.1:27140", "lb"));
    let (ours, foreign) = (enter(&store, "e3-m1").await, enter(&store, "another").await);
    for side in [&ours, &foreign] {
        side.put(&side.keys().pack(PackId(1)), b"page").await.unwrap();
    }
    agent.kill();
    let mut client = agent.start().await;
    assert_eq!(describe(&mut client).await.stores[0].migration, "e3-m1");
    let request = release(&mut agent, "e3-m1");
    assert!(client.release_store(request).await.unwrap().into_inner().held_pages);
    assert!(ours.packs().await.unwrap().is_empty());
    assert_eq!(foreign.packs().await.unwrap(), [PackId(1)]);
    server.stop(PATIENCE).await.unwrap();
}

#[tokio::test]
async fn an_agent_without_the_role_or_the_program_says_so() {
    let mut agent = Agent::prepare(&[]);
    let mut client = agent.start().await;
    let request = wish(&mut agent, "e4-m1", 16);
    let refused = client.prepare_store(request).await.unwrap_err();
    assert!(refused.message().contains("add it to `roles`"), "{refused}");
    assert!(describe(&mut client).await.store_obstacle.contains("role intermediary"));

    let mut agent = intermediary("program = \"/no/redis-server\"");
    let mut client = agent.start().await;
    assert!(describe(&mut client).await.store_obstacle.contains("install redis-server"));
    let request = wish(&mut agent, "e4-m1", 16);
    let refused = client.prepare_store(request).await.unwrap_err();
    assert!(refused.message().contains("/no/redis-server"), "{refused}");
}
