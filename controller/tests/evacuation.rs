//! Whole evacuations, controller and agents in one process over real gRPC, with failures and with
//! the controller killed in the middle.

#[allow(dead_code, reason = "agents over TLS are for the other test")]
mod cloud;

use std::sync::Arc;
use std::time::Duration;

use cloud::{Cloud, CountingNetwork};
use lifeboat_controller::daemon::Daemon;
use lifeboat_controller::driver::Patience;
use lifeboat_controller::evacuation::VmPhase;
use lifeboat_controller::network::Network;
use lifeboat_controller::service::{Caller, Service};
use lifeboat_protocol::controller::{
    CancelRequest, CordonRequest, EvacuateRequest, EvacuationStatus, LimitRequest, ReportRequest,
    RetryRequest,
};
use lifeboat_protocol::units::BitsPerSec;
use tokio::runtime::Runtime;

const VMS: [&str; 4] = ["a", "b", "c", "d"];

fn runtime() -> Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

fn caller() -> Caller {
    Caller { name: "ann".to_owned(), by: "certificate" }
}

fn request(hosts: &[&str]) -> EvacuateRequest {
    EvacuateRequest {
        hosts: hosts.iter().map(|host| host.to_string()).collect(),
        urgency: Some(75),
        ..EvacuateRequest::default()
    }
}

/// A controller in a runtime of its own: dropping the runtime is its kill -9.
struct Controller {
    runtime: Runtime,
    service: Arc<Service>,
}

impl Controller {
    fn start(cloud: &Cloud, hosts: usize, network: &Arc<CountingNetwork>) -> Self {
        let runtime = runtime();
        let patience = Patience {
            connect: Duration::from_secs(5),
            watch: Duration::from_secs(5),
            settle: Duration::from_secs(5),
            again: Duration::from_millis(50),
        };
        let daemon = runtime.block_on(async {
            // The journal of one that was just killed is free when its last task is gone.
            for _ in 0..100 {
                let network = Arc::clone(network) as Arc<dyn Network>;
                match Daemon::start(cloud.site(hosts), network, patience) {
                    Ok(daemon) => return daemon,
                    Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
                }
            }
            panic!("the controller does not start");
        });
        let service = Arc::clone(&daemon.service);
        let controller = Self { runtime, service };
        controller.until("all agents are connected", |service| {
            service.inventory.hosts().values().all(|entry| entry.connected)
        });
        controller
    }

    fn kill(self) {
        drop(self.service);
        self.runtime.shutdown_background();
    }

    fn until(&self, what: &str, mut holds: impl FnMut(&Service) -> bool) {
        self.runtime.block_on(async {
            for _ in 0..600 {
                if holds(&self.service) {
                    return;
                }
                tokio::time::sleep(Duration::from_millis(25)).await;
            }
            panic!("waited in vain until {what}");
        });
    }

    fn status(&self, id: &str) -> EvacuationStatus {
        let reply = self.runtime.block_on(self.service.status(id)).unwrap();
        reply.evacuations.into_iter().next().unwrap()
    }

    fn to_the_end(&self, id: &str) -> EvacuationStatus {
        for _ in 0..600 {
            let status = self.status(id);
            if ["done", "partial", "cancelled", "failed"].contains(&status.state.as_str()) {
                return status;
            }
            self.runtime.block_on(async { tokio::time::sleep(Duration::from_millis(25)).await });
        }
        panic!("it does not end: {:?}", self.status(id));
    }

    fn evacuate(&self, request: &EvacuateRequest) -> Result<String, String> {
        let begun = self.runtime.block_on(self.service.evacuate(request, &caller()));
        begun.map(|reply| reply.evacuation).map_err(|error| error.to_string())
    }
}

fn world(hosts: usize) -> (Runtime, Cloud, Arc<CountingNetwork>) {
    let runtime = runtime();
    let cloud = runtime.block_on(async { Cloud::new(hosts, &VMS) });
    (runtime, cloud, Arc::new(CountingNetwork::default()))
}

fn nothing_is_left(cloud: &Cloud, network: &CountingNetwork) {
    assert_eq!(cloud.truth().violations, Vec::<String>::new());
    assert!(network.held.lock().unwrap().is_empty(), "reservations remain");
}

#[test]
fn four_vms_leave_one_after_the_other_and_everything_is_given_back() {
    let (_cloud_runtime, cloud, network) = world(3);
    let controller = Controller::start(&cloud, 3, &network);
    let plan =
        controller.runtime.block_on(controller.service.plan(&request(&["h1"]), &caller())).unwrap();
    assert_eq!((plan.vms.len(), plan.left_behind.len()), (4, 0));
    assert_eq!(plan.reservations[0].reserved_bits_per_sec, 150_000_000);
    let id = controller.evacuate(&request(&["h1"])).unwrap();
    let mut live_most = 0;
    let mut done = [0.0; 4];
    controller.until("it ends", |service| {
        let fleet = service.driver.fleet();
        let evacuation = fleet.all()[0];
        live_most = live_most.max(evacuation.live().count());
        for (record, before) in evacuation.vms.iter().zip(&mut done) {
            assert!(record.done >= *before, "{} ran backwards", record.vm);
            *before = record.done;
        }
        evacuation.state.is_final()
    });
    assert_eq!(controller.status(&id).state, "done");
    assert_eq!(live_most, 1);
    assert!(cloud.truth().at.values().all(|at| at != "h1"));
    let request = ReportRequest { evacuation: id };
    let report = controller.service.report(&request).unwrap();
    assert!(report.vms.iter().all(|vm| vm.outcome == "moved" && vm.downtime_us == 42_000));
    assert!(report.predicted_total_ms > 0 && report.host_reports[0].moved == 4);
    // Source's uplink and the port that faces the destination, at 75 % of the link.
    let first = network.reserved.lock().unwrap()[0].clone();
    assert_eq!(first.hops.len(), 2);
    assert_eq!(first.hops[0].rate, BitsPerSec::from_mbit(150));
    assert_eq!(network.followed.lock().unwrap().len(), 4);
    nothing_is_left(&cloud, &network);
}

#[test]
fn the_ways_to_a_vm_s_stores_are_reserved_and_given_back() {
    let (_cloud_runtime, cloud, network) = world(5);
    let controller = Controller::start(&cloud, 5, &network);
    let mut asked = request(&["h1"]);
    asked.mode = "scatter-gather".to_owned();
    let id = controller.evacuate(&asked).unwrap();
    assert_eq!(controller.to_the_end(&id).state, "done");
    let reserved = network.reserved.lock().unwrap().clone();
    let to_stores: Vec<_> =
        reserved.iter().filter(|r| r.migration.as_str().contains(".s")).collect();
    // Four VMs, three stores each.
    assert_eq!(to_stores.len(), 12);
    for way in &to_stores {
        let rates: Vec<_> = way.hops.iter().map(|hop| hop.rate).collect();
        // All of what is reserved for the source leaves it; each store takes in a half (SOLive, figure 8).
        assert_eq!(rates, [BitsPerSec::from_mbit(150), BitsPerSec::from_mbit(75)]);
        assert_eq!(way.traffic.source.to_string(), "10.0.0.1");
        assert_eq!(way.traffic.destination.port(), 7100);
    }
    // And from there to the destination, to which they send by their own port.
    let gathered: Vec<_> =
        reserved.iter().filter(|r| r.migration.as_str().contains(".g")).collect();
    assert_eq!(gathered.len(), 12);
    for way in &gathered {
        let rates: Vec<_> = way.hops.iter().map(|hop| hop.rate).collect();
        // One at a time, so each may have all of what the destination takes in.
        assert_eq!(rates, [BitsPerSec::from_mbit(150); 2]);
        assert!(way.traffic.served && way.traffic.destination.port() == 7100);
        assert_ne!(way.traffic.source.to_string(), "10.0.0.1");
    }
    // The destination's link is none that the source has to wait for: it keeps to its own.
    let told: Vec<_> = cloud.truth().migrations.values().map(|p| p.limit_bits_per_sec).collect();
    assert_eq!(told, [200_000_000; 4]);
    controller.until("the stores have gone", |_| cloud.truth().stores.is_empty());
    nothing_is_left(&cloud, &network);
}

#[test]
fn who_finds_no_room_in_stores_waits_until_those_before_it_have_been_gathered() {
    let (_cloud_runtime, cloud, network) = world(5);
    {
        // Of the 1.5 * 1.25 / 3 of 240 MiB that the stores of one VM take, one fits and two do not.
        let mut truth = cloud.truth();
        (truth.store_room, truth.gathers_on) = (200 << 20, true);
    }
    let controller = Controller::start(&cloud, 5, &network);
    let mut asked = request(&["h1"]);
    asked.mode = "scatter-gather".to_owned();
    let plan = controller.runtime.block_on(controller.service.plan(&asked, &caller())).unwrap();
    let waits = |note: &&String| note.contains("until theirs have been gathered");
    assert_eq!((plan.vms.len(), plan.notes.iter().filter(waits).count()), (4, 3), "{plan:?}");
    let id = controller.evacuate(&asked).unwrap();
    controller.until("the others wait", |service| {
        let fleet = service.driver.fleet();
        let said = fleet.all()[0].vms.iter().map(lifeboat_controller::evacuation::VmRecord::said);
        said.filter(|said| said.contains("no place for it yet: its pages find no room")).count()
            == 3
    });
    cloud.truth().gathers_on = false;
    let status = controller.to_the_end(&id);
    assert_eq!((status.state.as_str(), status.left_behind.len()), ("done", 0), "{status:?}");
    assert_eq!(cloud.truth().migrations.len(), 4, "nothing was tried in vain");
    controller.until("the stores have gone", |_| cloud.truth().stores.is_empty());
    nothing_is_left(&cloud, &network);
}

#[test]
fn a_failed_move_is_tried_at_another_destination_and_without_one_the_vm_is_left_behind() {
    let (_cloud_runtime, cloud, network) = world(3);
    {
        let mut truth = cloud.truth();
        truth.failing.insert("b".to_owned());
        truth.refusing.insert("h3".to_owned());
    }
    let controller = Controller::start(&cloud, 3, &network);
    let id = controller.evacuate(&request(&["h1"])).unwrap();
    let status = controller.to_the_end(&id);
    let stayed: Vec<_> = status.left_behind.iter().map(|left| left.vm.as_str()).collect();
    assert_eq!((status.state.as_str(), stayed), ("partial", vec!["b"]));
    assert!(status.left_behind[0].reason.contains("every destination"), "{status:?}");
    assert!(cloud.truth().at.iter().all(|(vm, at)| (at == "h1") == (vm == "b")));
    // What was left behind goes when it is tried again.
    cloud.truth().refusing.clear();
    let retry = RetryRequest { evacuation: id, operation_id: "again".to_owned() };
    let again = controller.runtime.block_on(controller.service.retry(&retry, &caller())).unwrap();
    assert_eq!(controller.to_the_end(&again.evacuation).state, "done");
    nothing_is_left(&cloud, &network);
}

#[test]
fn a_controller_killed_in_the_middle_of_each_vm_goes_on_to_the_end() {
    let (_cloud_runtime, cloud, network) = world(3);
    let mut controller = Controller::start(&cloud, 3, &network);
    let mut asked = request(&["h1"]);
    asked.operation_id = "op-1".to_owned();
    let id = controller.evacuate(&asked).unwrap();
    for kill in 1..=4 {
        controller.until("a VM is under way", |_| cloud.truth().migrations.len() >= kill);
        controller.kill();
        controller = Controller::start(&cloud, 3, &network);
        assert_eq!(controller.service.term.0, kill as u64 + 1);
    }
    assert_eq!(controller.to_the_end(&id).state, "done");
    // The same operation again is the same evacuation, also for a new controller.
    assert_eq!(controller.evacuate(&asked).unwrap(), id);
    assert_eq!(cloud.truth().migrations.len(), 4, "a VM was moved twice");
    nothing_is_left(&cloud, &network);
}

#[test]
fn cancelling_keeps_what_has_not_been_committed_and_says_why() {
    let (_cloud_runtime, cloud, network) = world(3);
    let controller = Controller::start(&cloud, 3, &network);
    let id = controller.evacuate(&request(&["h1"])).unwrap();
    controller.until("a VM is under way", |_| !cloud.truth().migrations.is_empty());
    let cancel = CancelRequest { evacuation: id.clone(), ..CancelRequest::default() };
    controller.runtime.block_on(controller.service.cancel(&cancel, &caller())).unwrap();
    let status = controller.to_the_end(&id);
    assert_eq!((status.state.as_str(), status.left_behind.len()), ("cancelled", 4));
    assert!(status.left_behind.iter().all(|left| left.reason.contains("cancelled")));
    assert!(cloud.truth().at.values().all(|at| at == "h1"));
    nothing_is_left(&cloud, &network);
}

#[test]
fn a_vm_under_way_is_limited_by_a_word_and_one_that_is_not_is_not() {
    let (_cloud_runtime, cloud, network) = world(3);
    cloud.truth().frozen = true;
    let controller = Controller::start(&cloud, 3, &network);
    let limit = |vm: &str, network: Option<u64>, disk: Option<u64>| {
        let asked = LimitRequest {
            vm: vm.to_owned(),
            network_bits_per_sec: network,
            disk_bytes_per_sec: disk,
        };
        let limited = controller.runtime.block_on(controller.service.limit(&asked, &caller()));
        limited.map_err(|error| error.to_string())
    };
    assert!(limit("a", Some(8), None).unwrap_err().contains("not being sent now"));
    let id = controller.evacuate(&request(&["h1"])).unwrap();
    let first = |service: &Service| {
        let fleet = service.driver.fleet();
        let mut vms = fleet.all()[0].vms.iter();
        vms.find(|record| record.phase == VmPhase::Sending).map(|record| record.vm.to_string())
    };
    controller.until("a VM is sent", |service| first(service).is_some());
    let vm = first(&controller.service).unwrap();
    let limited = limit(&vm, Some(80_000_000), None).unwrap();
    assert_eq!((limited.migration.as_str(), limited.host.as_str()), ("e1-m1", "h1"));
    // More than its way carries is what its way carries, and so is none.
    let most = limit(&vm, Some(0), None).unwrap().network_bits_per_sec.unwrap();
    assert_eq!(limit(&vm, Some(u64::MAX), None).unwrap().network_bits_per_sec, Some(most));
    let refused = limit(&vm, Some(8), Some(5_000_000)).unwrap_err();
    assert!(refused.contains("no disk that only its host has"), "{refused}");
    let set = [10_000_000, most / 8, most / 8].map(|rate| ("network", "e1-m1".to_owned(), rate));
    assert_eq!(cloud.truth().limits, set);
    let audit = std::fs::read_to_string(cloud.path("state/audit.jsonl")).unwrap();
    let line = format!("limit {vm} --network 8 bit/s --disk 5000000 byte/s");
    assert!(audit.contains(&line), "{audit}");
    cloud.truth().frozen = false;
    assert_eq!(controller.to_the_end(&id).state, "done");
    assert!(limit(&vm, None, Some(1)).unwrap_err().contains("not being sent now"));
}

#[test]
fn what_an_order_sets_is_not_limited_by_a_word() {
    let (_cloud_runtime, cloud, network) = world(3);
    cloud.truth().frozen = true;
    let controller = Controller::start(&cloud, 3, &network);
    let mut asked = request(&["h1"]);
    asked.reservation = "strict".to_owned();
    let id = controller.evacuate(&asked).unwrap();
    let limited = |network| {
        let vm = controller.status(&id).migrations.first().map(|m| m.vm.clone());
        let asked = LimitRequest {
            vm: vm.unwrap_or_default(),
            network_bits_per_sec: network,
            disk_bytes_per_sec: None,
        };
        controller.runtime.block_on(controller.service.limit(&asked, &caller()))
    };
    controller.until("a VM is sent", |service| {
        let fleet = service.driver.fleet();
        fleet.all()[0].vms.iter().any(|record| record.phase == VmPhase::Sending)
    });
    let refused = limited(Some(8_000_000)).unwrap_err().to_string();
    assert!(refused.contains("strict"), "{refused}");
    cloud.truth().frozen = false;
    assert_eq!(controller.to_the_end(&id).state, "done");
}

#[test]
fn bad_orders_say_what_why_and_what_to_do_and_change_nothing() {
    let (_cloud_runtime, cloud, network) = world(2);
    let controller = Controller::start(&cloud, 2, &network);
    let refused = |change: &dyn Fn(&mut EvacuateRequest)| {
        let mut asked = request(&["h1"]);
        change(&mut asked);
        controller.evacuate(&asked).unwrap_err()
    };
    let unknown = refused(&|r| r.hosts = vec!["h9".to_owned()]);
    assert_eq!(unknown, "there is no host `h9`; the hosts are h1, h2");
    assert!(refused(&|r| r.urgency = Some(140)).contains("urgency 140 is out of range"));
    assert!(refused(&|r| r.redundancy = "raid6".to_owned()).contains("none, mirror, parity"));
    assert!(refused(&|r| r.hosts.clear()).contains("no host was named"));
    assert!(refused(&|r| r.to = vec!["h1".to_owned()]).contains("named as a destination"));
    assert!(cloud.truth().migrations.is_empty());
    // A cordoned destination is no place: the plan says so, per host.
    let cordon = CordonRequest { host: "h2".to_owned(), cordoned: true };
    controller.runtime.block_on(controller.service.cordon(&cordon, &caller())).unwrap();
    let (asked, who) = (request(&["h1"]), caller());
    let plan = controller.runtime.block_on(controller.service.plan(&asked, &who)).unwrap();
    assert!(plan.vms.is_empty());
    assert!(plan.left_behind[0].refusals[0].contains("h2: it is cordoned"), "{plan:?}");
    let audit = std::fs::read_to_string(cloud.path("state/audit.jsonl")).unwrap();
    assert_eq!(audit.lines().count(), 6, "{audit}");
    assert!(audit.contains("\"operator\":\"ann\"") && audit.contains("cordon h2"));
}
