//! The FUSE layer under the programs that use disk images: qemu-img, qemu-io, fio. Takes root and
//! /dev/fuse.

mod bare_qemu;
mod disk_lab;

use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bare_qemu::BareQemu;
use disk_lab::{Folders, Mounted, qemu_io, run, start_holder, start_server_with, try_run};
use lifeboat_agent::disk::fuse::{Expiry, Hook, Image, Op, PassThrough, Request};
use lifeboat_agent::disk::local::LocalDisk;
use lifeboat_agent::disk::parameters::Parameters;
use lifeboat_agent::disk::process::client::{ANSWER_LIMIT, Mover, Movers};
use lifeboat_agent::disk::process::control::{Limits, Request as Asked};
use lifeboat_agent::disk::process::plain;
use lifeboat_agent::{clock, tasks};
use lifeboat_protocol::ids::VmId;
use lifeboat_protocol::units::BytesPerSec;

fn pass_through() -> Mounted {
    Mounted::with(Arc::new(PassThrough))
}

/// What QEMU does with an image: writes, zeroes, discards, flushes, reads back.
const SCRIPT: [&str; 9] = [
    "write -P 0x11 0 4M",
    "write -P 0x22 1M 70k",
    "write -z 2M 64k",
    "write -z -u 3M 64k",
    "discard 512k 128k",
    "flush",
    "write -P 0x33 3584k 4k",
    "read -P 0x22 1M 70k",
    "read -P 0 2M 64k",
];

#[test]
fn qemu_io_finds_through_the_mount_what_it_wrote_in_every_mode() {
    let mount = pass_through();
    for (number, cache) in ["none", "writeback", "directsync"].into_iter().enumerate() {
        for aio in ["threads", "native", "io_uring"] {
            // libaio without O_DIRECT is refused by QEMU itself.
            if aio == "native" && cache == "writeback" {
                continue;
            }
            for format in ["raw", "qcow2"] {
                let (one, other) = (format!("{aio}{number}.{format}"), format!("b.{format}"));
                run("qemu-img", &["create", "-q", "-f", format, &mount.through(&one), "64M"]);
                run("qemu-img", &["create", "-q", "-f", format, &mount.native(&other), "64M"]);
                let options = ["-f", format, "-t", cache, "-i", aio, "-d", "unmap"];
                qemu_io(&options, &mount.through(&one), &SCRIPT);
                qemu_io(&["-f", format, "-d", "unmap"], &mount.native(&other), &SCRIPT);
                let formats = ["compare", "-f", format, "-F", format];
                let images = [&mount.native(&one), &mount.native(&other)];
                run("qemu-img", &[&formats[..], &images.map(String::as_str)].concat());
            }
        }
    }
}

#[test]
fn qemu_img_creates_resizes_converts_and_sees_holes() {
    let mount = pass_through();
    run("qemu-img", &["create", "-q", "-f", "raw", &mount.through("a.raw"), "256M"]);
    qemu_io(&["-f", "raw"], &mount.through("a.raw"), &["write -P 7 100M 1M"]);
    run("qemu-img", &["resize", "-q", "-f", "raw", &mount.through("a.raw"), "300M"]);
    assert_eq!(std::fs::metadata(mount.native("a.raw")).unwrap().len(), 300 << 20);
    let map = run("qemu-img", &["map", "-f", "raw", "--output=json", &mount.through("a.raw")]);
    let native = run("qemu-img", &["map", "-f", "raw", "--output=json", &mount.native("a.raw")]);
    assert_eq!(map, native);
    // The first block, which qemu-img itself writes, and the one that was written.
    assert_eq!(map.matches("\"data\": true").count(), 2, "{map}");
    let (from, to) = (mount.through("a.raw"), mount.through("a.qcow2"));
    run("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", &from, &to]);
    run("qemu-img", &["compare", "-f", "raw", "-F", "qcow2", &mount.native("a.raw"), &to]);
    run("qemu-img", &["check", "-q", &to]);
    std::fs::remove_file(&from).unwrap();
    assert!(!std::path::Path::new(&mount.native("a.raw")).exists());
}

#[test]
fn fio_verifies_random_writes_at_depth_and_beside_each_other() {
    let mount = pass_through();
    let file = format!("--filename={}", mount.through("fio.raw"));
    let common = [
        "--name=x",
        "--size=48M",
        "--verify=crc32c",
        "--verify_state_save=0",
        "--do_verify=1",
        &file,
    ];
    for engine in [
        &["--ioengine=libaio", "--iodepth=16", "--direct=1", "--bs=4k", "--rw=randwrite"][..],
        &["--ioengine=io_uring", "--iodepth=8", "--direct=1", "--bs=64k", "--rw=randwrite"][..],
        &["--ioengine=psync", "--direct=0", "--bs=3000", "--rw=write", "--fsync=100"][..],
    ] {
        run("fio", &[&common[..], engine].concat());
    }
    let numjobs = ["--name=y", "--size=8M", "--numjobs=4", "--offset_increment=8M", "--direct=1"];
    let four = [
        "--ioengine=psync",
        "--bs=4k",
        "--rw=randwrite",
        "--verify=crc32c",
        "--verify_state_save=0",
        &file,
    ];
    run("fio", &[&numjobs[..], &four[..]].concat());
}

#[test]
fn an_image_is_opened_natively_or_through_the_mount_and_never_twice() {
    let mount = pass_through();
    run("qemu-img", &["create", "-q", "-f", "raw", &mount.native("a.raw"), "8M"]);
    // Natively, QEMU's own locks refuse what this one has open.
    let open = |path: &str| {
        let file = format!("driver=file,node-name=f,filename={path}");
        BareQemu::start(&["-blockdev", &file, "-device", "virtio-blk-pci,drive=f"])
    };
    let refused = |path: &str| {
        let (ok, said) = try_run("qemu-io", &["-f", "raw", "-c", "write 0 4k", path]);
        !ok && (said.contains("lock") || said.contains("busy"))
    };
    let (native, through) = (mount.native("a.raw"), mount.through("a.raw"));
    for (first, second) in [(&native, &through), (&through, &native), (&through, &through)] {
        let user = open(first);
        // It listens once it has opened its disk.
        while !user.qmp_path().exists() {
            clock::pause_thread(Duration::from_millis(10));
        }
        clock::pause_thread(Duration::from_millis(300));
        assert!(refused(second), "{first} then {second}");
        drop(user);
        let printed = qemu_io(&["-f", "raw"], second, &["write 0 4k"]);
        assert!(printed.contains("wrote"), "{printed}");
    }
}

#[test]
fn a_limit_is_kept_can_be_changed_and_be_lifted() {
    let mount = pass_through();
    let file = std::fs::File::create(mount.through("a.raw")).unwrap();
    let time = |blocks: u64| {
        let begin = clock::now();
        (0..blocks).for_each(|i| file.write_all_at(&[1; 65536], i * 65536).unwrap());
        (blocks * 65536) as f64 / begin.elapsed().as_secs_f64()
    };
    for (rate, blocks) in [(1_000_000, 20), (20_000_000, 400)] {
        mount.server.limit().set(Some(BytesPerSec(rate)));
        let measured = time(blocks) / rate as f64;
        assert!((0.9..1.1).contains(&measured), "{rate}: {measured}");
    }
    mount.server.limit().set(Some(BytesPerSec(20_000)));
    assert_eq!(mount.server.limit().rate(), Some(BytesPerSec(20_000)));
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| time(4));
        clock::pause_thread(Duration::from_millis(100));
        assert!(!writer.is_finished());
        mount.server.limit().set(None);
        assert!(writer.join().unwrap() > 1e6);
    });
}

#[test]
fn before_a_pause_nothing_is_held_for_long_and_a_small_writer_keeps_its_rate() {
    let mount = pass_through();
    let file = std::fs::File::create(mount.through("a.raw")).unwrap();
    let time = |blocks: u64| {
        let begin = clock::now();
        (0..blocks).for_each(|i| file.write_all_at(&[1; 65536], i * 65536).unwrap());
        begin.elapsed()
    };
    let longest = Duration::from_millis(15);
    // Three seconds a write. One is waiting when the pause comes near.
    mount.server.limit().set(Some(BytesPerSec(20_000)));
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| time(2));
        clock::pause_thread(Duration::from_millis(100));
        assert!(!writer.is_finished());
        mount.server.limit().hold_at_most(Some(longest));
        assert!(writer.join().unwrap() < Duration::from_secs(1));
    });
    let took = time(10);
    assert!(took >= longest * 9 && took < Duration::from_secs(2), "{took:?}");
    // What went too early is not paid for later.
    mount.server.limit().hold_at_most(None);
    mount.server.limit().set(Some(BytesPerSec(20_000_000)));
    for held in [None, Some(longest)] {
        mount.server.limit().hold_at_most(held);
        let measured = 400.0 * 65536.0 / time(400).as_secs_f64() / 20e6;
        assert!((0.9..1.1).contains(&measured), "{held:?}: {measured}");
    }
}

/// Keeps every write, and lets deadlines answer them.
#[derive(Default)]
struct Keeper {
    kept: Mutex<Vec<Request>>,
    expired: Mutex<Vec<Op>>,
}

impl Hook for Keeper {
    fn arrived(&self, request: Request) {
        if matches!(request.op(), Op::Write { .. }) {
            request.set_deadline(clock::now() + Duration::from_millis(50));
            self.kept.lock().unwrap().push(request);
        }
    }

    fn expired(&self, _: &Image, op: &Op) -> Expiry {
        self.expired.lock().unwrap().push(*op);
        Expiry::Answer
    }
}

#[test]
fn a_request_that_a_hook_keeps_is_answered_by_its_deadline_and_others_pass() {
    let hook = Arc::new(Keeper::default());
    let own: Arc<dyn Hook> = Arc::clone(&hook) as _;
    let mount = Mounted::with(own);
    let mut file = std::fs::File::create_new(mount.through("a.raw")).unwrap();
    let begin = clock::now();
    std::thread::scope(|scope| {
        scope.spawn(|| file.write_all(b"kept").unwrap());
        clock::pause_thread(Duration::from_millis(10));
        // More writers than threads that read requests: nothing else waits for them.
        for at in 1..8 {
            let path = mount.through("a.raw");
            scope.spawn(move || {
                let file = std::fs::File::options().write(true).open(path).unwrap();
                file.write_all_at(b"kept", at * 4096).unwrap();
            });
        }
        let asked = clock::now();
        std::fs::metadata(mount.through("a.raw")).unwrap();
        assert!(asked.elapsed() < Duration::from_millis(35), "{:?}", asked.elapsed());
    });
    assert!(begin.elapsed() >= Duration::from_millis(50));
    assert_eq!(hook.expired.lock().unwrap().len(), 8);
    let mut text = [0; 4];
    std::fs::File::open(mount.through("a.raw")).unwrap().read_exact(&mut text).unwrap();
    assert_eq!(&text, b"kept");
    hook.kept.lock().unwrap().clear();
}

#[test]
fn what_is_changed_through_a_plain_mount_is_told_once_and_held_to_its_limit() {
    let folders = Folders::new();
    let images = folders.images();
    std::fs::File::create(images.join("a.raw")).unwrap().set_len(8 << 20).unwrap();
    let _holder = start_holder(&folders);
    let control = folders.path("control").to_str().unwrap().to_owned();
    let serve =
        |more: &[&str]| start_server_with(&folders, &[&["--control", &control][..], more].concat());
    let mut server = serve(&["--limit", "1000000"]);
    let disk = env!("CARGO_BIN_EXE_lifeboat-disk");
    let changed = |more: &[&str]| run(disk, &[&["changed", "--control", &control], more].concat());
    let through = |name: &str| folders.mount().join(name).to_str().unwrap().to_owned();

    assert_eq!(changed(&[]), "");
    let begin = clock::now();
    let commands = ["write 1M 4k", "write 2000k 600k", "discard 5M 64k", "read 7M 4k"];
    qemu_io(&["-f", "raw", "-d", "unmap"], &through("a.raw"), &commands);
    assert!(begin.elapsed() > Duration::from_millis(500), "{:?}", begin.elapsed());
    std::fs::write(through("b.raw"), vec![1; 100_000]).unwrap();
    let wanted = "1048576 65536 a.raw\n2031616 655360 a.raw\n5242880 65536 a.raw\n0 100000 b.raw\n";
    assert_eq!(changed(&[]), wanted);
    assert_eq!(changed(&["--reset"]), wanted);
    assert_eq!(changed(&["--reset"]), "");

    // Another limit, and none.
    let (ok, said) = try_run(disk, &["limit", "--control", &control, "1000"]);
    assert!(!ok && said.contains("1000 is not in 16384.."), "{said}");
    let ask = |words| plain::ask(control.as_ref(), words, &mut Vec::new()).unwrap_err().to_string();
    assert!(ask("limit 1000").contains("16384 at least"));
    assert!(ask("changed again").contains("it is `changed`"));
    run(disk, &["limit", "--control", &control]);
    // A hole at its end is content as well, and so are zeroes in the place of what was cut off.
    let file = std::fs::File::options().write(true).open(through("b.raw")).unwrap();
    file.set_len(70_000).unwrap();
    file.set_len(300_000).unwrap();
    assert_eq!(changed(&["--reset"]), "65536 234464 b.raw\n");
    drop(file);

    // What the server knew is lost with it.
    server.kill();
    let _server = serve(&[]);
    assert_eq!(changed(&["--reset"]), "0 8388608 a.raw\n0 300000 b.raw\n");
    assert_eq!(changed(&[]), "");
}

/// A process that serves two disks, which lie in directories of their own.
async fn disks_in_two_directories(folders: &Folders) -> Mover {
    let disk = |number: usize| {
        let path = folders.path(["images", "others"][number]).join(format!("disk{number}"));
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, vec![7; 1 << 20]).unwrap();
        LocalDisk { number, path, format: "raw".into(), read_only: false }
    };
    let parameters = Parameters::default();
    let program = env!("CARGO_BIN_EXE_lifeboat-disk").into();
    let movers = Movers { run_dir: folders.path("run"), program, tls_dir: None, parameters };
    movers.start(&VmId::new("vm").unwrap(), &[0, 1].map(disk)).await.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_vms_limit_holds_whichever_of_its_directories_it_writes_to() {
    const RATE: u64 = 4_000_000;
    let folders = Folders::new();
    let mut mover = disks_in_two_directories(&folders).await;
    let limits = Limits { disk: Some(RATE), ..Limits::default() };
    mover.ask(&Asked::Limit(limits), ANSWER_LIMIT).await.unwrap();
    let setting = mover.setting().clone();
    // So many writes of 64 KiB to each disk, side by side; all of them by the limit.
    let measure = move |writes: [u64; 2]| {
        let begin = clock::now();
        std::thread::scope(|scope| {
            for (disk, writes) in setting.disks.iter().zip(writes) {
                let image = std::fs::File::options().write(true).open(setting.paths(disk).1);
                let image = image.unwrap();
                scope.spawn(move || {
                    (0..writes).for_each(|_| image.write_all_at(&[1; 65536], 0).unwrap());
                });
            }
        });
        (writes[0] + writes[1]) as f64 * 65536.0 / begin.elapsed().as_secs_f64() / RATE as f64
    };
    let measured = tasks::blocking(move || {
        // Alone it has all of it, and both have no more.
        [[60, 0], [0, 60], [30, 30]].map(|writes| (writes, measure(writes)))
    });
    for (writes, rate) in measured.await {
        assert!((0.9..1.1).contains(&rate), "{writes:?}: {rate}");
    }
    mover.finish().await.unwrap();
}

/// What a copy ahead of a migration does to the migration that ends it: the process before has just been
/// told to finish.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_disk_process_starts_when_the_one_before_it_has_just_finished() {
    let folders = Folders::new();
    let path = folders.images().join("disk");
    std::fs::write(&path, vec![7; 1 << 20]).unwrap();
    let disks =
        [LocalDisk { number: 0, path: path.clone(), format: "raw".into(), read_only: false }];
    let program = env!("CARGO_BIN_EXE_lifeboat-disk").into();
    let parameters = Parameters::default();
    let movers = Movers { run_dir: folders.path("run"), program, tls_dir: None, parameters };
    let vm = VmId::new("vm").unwrap();
    for round in 0..20 {
        let mover = movers.start(&vm, &disks).await.unwrap_or_else(|e| panic!("{round}: {e:#}"));
        mover.finish().await.unwrap();
        assert!(!movers.knows(&vm));
    }
    assert_eq!(std::fs::read(&path).unwrap(), vec![7; 1 << 20]);
}
