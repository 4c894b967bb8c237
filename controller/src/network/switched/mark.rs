//! How everything of ours on a switch is recognised: cookies of flows, marks of queues, and the
//! flows themselves. Pure.
//!
//! Used by the rest of `switched`. A controller that was killed finds by these what it left, so
//! their layout is a promise to the next version.
//!
//! ```text
//!  cookie   63 ...... 48 47 .. 44 43 ............ 24 23 ............. 0
//!           0x4c42 "LB"   kind     evacuation's tag   migration's tag
//! ```
//!
//! Tags are the low bits of a hash of the id. Queue rows carry the whole id: the reservation of a
//! [`Mark`] is `EVACUATION SWITCH:PORT` (no id holds a space).
//!
//! A packet's DSCP is its queue's number, so that one number means the same on every port of a
//! path. Of the 64 code points only pool 2 of RFC 2474 (`xxxx11`, experimental or local use) is
//! ours to give: 3, 7, .. 63, one per evacuation, sixteen at a time.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use lifeboat_ovs::lldp;
use lifeboat_ovs::openflow::flow::FlowMod;
use lifeboat_ovs::openflow::multipart::FlowStats;
use lifeboat_ovs::openflow::{Action, Instruction, MacAddr, Masked, Match, Oxm, PortNo};
use lifeboat_ovs::qos::Mark;
use lifeboat_protocol::ids::{EvacuationId, MigrationId, SwitchId};

use crate::network::{PageFlow, PortRef};

/// The owner in the marks of our queue rows.
pub(super) const OWNER: &str = "lifeboat";
/// The bits of a cookie that say it is ours.
pub(super) const OWNER_MASK: u64 = 0xffff << 48;
/// Our cookies' first 16 bits.
pub(super) const OWNER_COOKIE: u64 = 0x4c42 << 48;

const KIND_SHIFT: u32 = 44;
const EVACUATION_SHIFT: u32 = 24;
const EVACUATION_BITS: u64 = (1 << 20) - 1;
const MIGRATION_BITS: u64 = (1 << 24) - 1;

/// Page flows with the same match differ in priority: two migrations over one page link must not
/// replace each other's flow.
const PAGE_PRIORITY: u16 = 61_000;
/// Slots above it.
pub(super) const SLOTS: u16 = 4_000;
/// Above every page flow: nothing else is LLDP.
const PROBE_PRIORITY: u16 = 65_100;
/// Below every page flow, above whatever a network usually has.
const CLEAR_PRIORITY: u16 = 60_000;
/// Above those that clear: what comes in by the link does not leave by it.
const ARRIVING_PRIORITY: u16 = 60_500;
/// Below them: a packet that needs its mark cleared is metered there.
const HOLD_PRIORITY: u16 = 59_000;

const IPV4: u16 = 0x0800;
const ARP: u16 = 0x0806;
const TCP: u8 = 6;

/// The queue numbers that an evacuation can have.
pub(super) fn queue_numbers() -> impl Iterator<Item = u32> {
    (3..=63).step_by(4)
}

/// What a flow of ours is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// Sends one migration's pages to its evacuation's queue.
    Page = 1,
    /// Clears an evacuation's mark on packets that are not its own.
    Clear = 2,
    /// Lets a switch forward that would otherwise drop everything.
    Forward = 3,
    /// Hands LLDP frames up; a lease that nobody has to take away.
    Probe = 4,
    /// Holds back what is not a migration's, by the switch's meter of ours.
    Hold = 5,
}

/// Of the flows that hold others back on a switch: there is one meter, whoever it is for.
const HOLD: Cookie = Cookie { kind: Kind::Hold, evacuation: 0, migration: 0 };

/// What a cookie of ours says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Cookie {
    /// What for.
    pub(super) kind: Kind,
    /// Of which evacuation; 0 for [`Kind::Forward`], [`Kind::Probe`] and [`Kind::Hold`].
    pub(super) evacuation: u64,
    /// Of which migration; 0 unless [`Kind::Page`].
    pub(super) migration: u64,
}

/// FNV-1a: stable for ever, and spread well enough for a handful of ids.
fn hash(text: &str) -> u64 {
    text.bytes().fold(0xcbf2_9ce4_8422_2325, |hash: u64, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

fn folded(text: &str) -> u64 {
    let hash = hash(text);
    hash ^ (hash >> 32)
}

/// An evacuation's tag; never 0.
pub(super) fn evacuation_tag(id: &EvacuationId) -> u64 {
    (folded(id.as_str()) & EVACUATION_BITS).max(1)
}

/// A migration's tag; never 0.
pub(super) fn migration_tag(id: &MigrationId) -> u64 {
    (folded(id.as_str()) & MIGRATION_BITS).max(1)
}

/// The evacuation that a migration belongs to, by the form that the controller gives its ids:
/// `EVACUATION-mNUMBER`.
pub(super) fn evacuation_of(migration: &MigrationId) -> Option<EvacuationId> {
    let (evacuation, _) = migration.as_str().rsplit_once("-m")?;
    EvacuationId::new(evacuation).ok()
}

impl Cookie {
    fn page(evacuation: &EvacuationId, migration: &MigrationId) -> Self {
        let (evacuation, migration) = (evacuation_tag(evacuation), migration_tag(migration));
        Self { kind: Kind::Page, evacuation, migration }
    }

    fn clear(evacuation: &EvacuationId) -> Self {
        Self { kind: Kind::Clear, evacuation: evacuation_tag(evacuation), migration: 0 }
    }

    /// As it travels.
    pub(super) fn to_bits(self) -> u64 {
        OWNER_COOKIE
            | (self.kind as u64) << KIND_SHIFT
            | self.evacuation << EVACUATION_SHIFT
            | self.migration
    }

    /// `None` for somebody else's.
    pub(super) fn from_bits(bits: u64) -> Option<Self> {
        if bits & OWNER_MASK != OWNER_COOKIE {
            return None;
        }
        let kind = match bits >> KIND_SHIFT & 0xf {
            1 => Kind::Page,
            2 => Kind::Clear,
            3 => Kind::Forward,
            4 => Kind::Probe,
            5 => Kind::Hold,
            _ => return None,
        };
        let evacuation = bits >> EVACUATION_SHIFT & EVACUATION_BITS;
        Some(Self { kind, evacuation, migration: bits & MIGRATION_BITS })
    }

    /// Deletes the flows with exactly this cookie.
    pub(super) fn delete(self) -> FlowMod {
        FlowMod::delete_by_cookie(self.to_bits(), u64::MAX)
    }
}

/// The deletion of one migration's page flows.
pub(super) fn delete_page(evacuation: &EvacuationId, migration: &MigrationId) -> FlowMod {
    Cookie::page(evacuation, migration).delete()
}

/// The deletion of all page flows of an evacuation.
pub(super) fn delete_pages(evacuation: &EvacuationId) -> FlowMod {
    let bits = Cookie { migration: 0, ..Cookie { kind: Kind::Page, ..Cookie::clear(evacuation) } };
    FlowMod::delete_by_cookie(bits.to_bits(), !MIGRATION_BITS)
}

/// The deletion of the flow that clears an evacuation's mark.
pub(super) fn delete_clear(evacuation: &EvacuationId) -> FlowMod {
    Cookie::clear(evacuation).delete()
}

/// The deletion of [`forward_flow`].
pub(super) fn delete_forward() -> FlowMod {
    Cookie { kind: Kind::Forward, evacuation: 0, migration: 0 }.delete()
}

/// The deletion of all [`hold_flows`].
pub(super) fn delete_hold() -> FlowMod {
    HOLD.delete()
}

/// The two ends of a page link as a switch matches them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Link {
    /// The source host.
    pub(super) source: Ipv4Addr,
    /// The destination host.
    pub(super) destination: Ipv4Addr,
    /// Its page listener.
    pub(super) port: u16,
    /// What counts comes from the listener.
    pub(super) served: bool,
}

impl Link {
    /// `None` for IPv6, whose DSCP the classifier beside HTB does not read.
    pub(super) fn of(traffic: &PageFlow) -> Option<Self> {
        let SocketAddr::V4(listener) = traffic.destination else { return None };
        let IpAddr::V4(source) = traffic.source else { return None };
        let (destination, port) = (*listener.ip(), listener.port());
        Some(Self { source, destination, port, served: traffic.served })
    }

    fn matching(self) -> Match {
        if self.served { self.by_listener() } else { self.to_listener() }
    }

    /// What comes back.
    fn answering(self) -> Match {
        if self.served { self.to_listener() } else { self.by_listener() }
    }

    fn to_listener(self) -> Match {
        Match::any()
            .with(Oxm::EthType(IPV4))
            .with(Oxm::IpProto(TCP))
            .with(Oxm::Ipv4Src(Masked::exact(self.source)))
            .with(Oxm::Ipv4Dst(Masked::exact(self.destination)))
            .with(Oxm::TcpDst(self.port))
    }

    fn by_listener(self) -> Match {
        Match::any()
            .with(Oxm::EthType(IPV4))
            .with(Oxm::IpProto(TCP))
            .with(Oxm::Ipv4Src(Masked::exact(self.destination)))
            .with(Oxm::Ipv4Dst(Masked::exact(self.source)))
            .with(Oxm::TcpSrc(self.port))
    }

    fn from_match(matching: &Match) -> Option<Self> {
        let (mut from, mut to, mut port) = (None, None, None);
        for field in &matching.fields {
            match field {
                Oxm::Ipv4Src(address) => from = Some(address.value),
                Oxm::Ipv4Dst(address) => to = Some(address.value),
                Oxm::TcpDst(number) => port = Some((*number, false)),
                Oxm::TcpSrc(number) => port = Some((*number, true)),
                _ => {}
            }
        }
        let (from, to, (port, served)) = (from?, to?, port?);
        let (source, destination) = if served { (to, from) } else { (from, to) };
        Some(Self { source, destination, port, served })
    }
}

fn apply(actions: Vec<Action>) -> Vec<Instruction> {
    vec![Instruction::ApplyActions(actions)]
}

fn dscp(value: u32) -> u8 {
    u8::try_from(value).unwrap_or_default()
}

/// Sends a migration's pages to `queue` and on to `out`. The queue works on the kernel's datapath, the mark on the
/// userspace one, so that the same flow is right on both.
pub(super) fn page_flow(
    evacuation: &EvacuationId,
    migration: &MigrationId,
    slot: u16,
    queue: u32,
    link: Link,
    out: PortNo,
) -> FlowMod {
    let cookie = Cookie::page(evacuation, migration).to_bits();
    let actions = vec![
        Action::SetQueue(queue),
        Action::SetField(Oxm::IpDscp(dscp(queue))),
        Action::output(out),
    ];
    FlowMod::add(cookie, PAGE_PRIORITY + slot.min(SLOTS), link.matching(), apply(actions))
}

/// Brings a pinned migration's acknowledgements back by the way that its pages take.
pub(super) fn back_flow(
    evacuation: &EvacuationId,
    migration: &MigrationId,
    slot: u16,
    link: Link,
    out: PortNo,
) -> FlowMod {
    let cookie = Cookie::page(evacuation, migration).to_bits();
    let actions = vec![Action::output(out)];
    FlowMod::add(cookie, PAGE_PRIORITY + slot.min(SLOTS), link.answering(), apply(actions))
}

/// Hands LLDP frames to the controller, from one port or from all, for `lease` seconds.
pub(super) fn probe_flow(from: Option<PortNo>, lease: u16) -> FlowMod {
    let cookie = Cookie { kind: Kind::Probe, evacuation: 0, migration: 0 }.to_bits();
    let nearest = Masked::exact(MacAddr(lldp::NEAREST_BRIDGE));
    let matching = from.map_or_else(Match::any, |port| Match::any().with(Oxm::InPort(port)));
    let matching = matching.with(Oxm::EthDst(nearest)).with(Oxm::EthType(lldp::ETHERTYPE));
    let actions = vec![Action::output(PortNo::CONTROLLER)];
    let flow = FlowMod::add(cookie, PROBE_PRIORITY, matching, apply(actions));
    FlowMod { hard_timeout: lease, ..flow }
}

/// Takes the mark of `queue` from packets that nobody has reserved anything for: an application
/// that sets it would share the evacuation's queue. They pass `meter`, where their switch has one.
pub(super) fn clear_flow(evacuation: &EvacuationId, queue: u32, meter: Option<u32>) -> FlowMod {
    let cookie = Cookie::clear(evacuation).to_bits();
    let matching = Match::any().with(Oxm::EthType(IPV4)).with(Oxm::IpDscp(dscp(queue)));
    let actions = vec![Action::SetField(Oxm::IpDscp(0)), Action::output(PortNo::NORMAL)];
    FlowMod::add(cookie, CLEAR_PRIORITY, matching, metered(meter, actions))
}

/// Has everything pass `meter` that does not come in by the port `link`, but for what has a flow of
/// its own above, and ARP, without which nobody would find anybody.
pub(super) fn hold_flows(link: PortNo, meter: u32) -> [FlowMod; 3] {
    let normal = || vec![Action::output(PortNo::NORMAL)];
    let arriving = Match::any().with(Oxm::InPort(link));
    let arp = Match::any().with(Oxm::EthType(ARP));
    let flow = |priority, matching, meter| {
        FlowMod::add(HOLD.to_bits(), priority, matching, metered(meter, normal()))
    };
    [
        flow(ARRIVING_PRIORITY, arriving, None),
        flow(ARRIVING_PRIORITY, arp, None),
        flow(HOLD_PRIORITY, Match::any(), Some(meter)),
    ]
}

fn metered(meter: Option<u32>, actions: Vec<Action>) -> Vec<Instruction> {
    meter.map(Instruction::Meter).into_iter().chain(apply(actions)).collect()
}

/// Lets a switch forward as a learning switch does.
pub(super) fn forward_flow() -> FlowMod {
    let cookie = Cookie { kind: Kind::Forward, evacuation: 0, migration: 0 }.to_bits();
    FlowMod::add(cookie, 0, Match::any(), apply(vec![Action::output(PortNo::NORMAL)]))
}

/// A page flow of ours as a switch shows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct FoundPage {
    /// Whose.
    pub(super) cookie: Cookie,
    /// Its slot.
    pub(super) slot: u16,
    /// Which packets.
    pub(super) link: Link,
    /// Whether it names the port that they leave by.
    pub(super) pinned: bool,
    /// The queue that it sends them to.
    pub(super) queue: u32,
}

impl FoundPage {
    /// `None` for any other flow, also for one that brings acknowledgements back, which has no queue.
    pub(super) fn of(flow: &FlowStats) -> Option<Self> {
        let cookie = Cookie::from_bits(flow.cookie).filter(|cookie| cookie.kind == Kind::Page)?;
        let slot = flow.priority.checked_sub(PAGE_PRIORITY)?;
        let normal = |instruction: &Instruction| match instruction {
            Instruction::ApplyActions(actions) => actions.contains(&Action::output(PortNo::NORMAL)),
            _ => false,
        };
        let pinned = !flow.instructions.iter().any(normal);
        let applied = flow.instructions.iter().flat_map(|instruction| match instruction {
            Instruction::ApplyActions(actions) => &actions[..],
            _ => &[],
        });
        let mut queues = applied.filter_map(|action| match action {
            Action::SetQueue(queue) => Some(*queue),
            _ => None,
        });
        let queue = queues.next()?;
        Some(Self { cookie, slot, link: Link::from_match(&flow.matching)?, pinned, queue })
    }
}

/// The mark of an evacuation's queue on a port.
pub(super) fn queue_mark(evacuation: &EvacuationId, at: &PortRef, expires: u64) -> Mark {
    Mark { owner: OWNER.to_owned(), reservation: format!("{evacuation} {at}"), expires }
}

/// Whose queue a mark is on, and where; `None` for a mark that is not ours or not of a queue.
pub(super) fn read_mark(mark: &Mark) -> Option<(EvacuationId, PortRef)> {
    if mark.owner != OWNER {
        return None;
    }
    let (evacuation, at) = mark.reservation.split_once(' ')?;
    let (switch, port) = at.split_once(':')?;
    let at = PortRef { switch: SwitchId::new(switch).ok()?, port: port.to_owned() };
    Some((EvacuationId::new(evacuation).ok()?, at))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ids() -> (EvacuationId, MigrationId) {
        (EvacuationId::new("e1").unwrap(), MigrationId::new("e1-m1").unwrap())
    }

    #[test]
    fn cookies_read_as_they_are_written_and_others_are_nobodys() {
        let (evacuation, migration) = ids();
        let page = Cookie::page(&evacuation, &migration);
        assert_eq!(Cookie::from_bits(page.to_bits()), Some(page));
        assert_eq!(page.to_bits() >> 44, 0x4c421);
        for foreign in [0, 0x4c43_1000_0000_0000, 0x4c42_f000_0000_0000, 1] {
            assert_eq!(Cookie::from_bits(foreign), None, "{foreign:x}");
        }
    }

    #[test]
    fn ids_that_differ_by_one_have_different_tags() {
        let tags =
            (1..=2000).map(|n| migration_tag(&MigrationId::new(format!("e1-m{n}")).unwrap()));
        let distinct: std::collections::BTreeSet<u64> = tags.collect();
        assert!(distinct.len() >= 1999, "{}", distinct.len());
        assert_eq!(evacuation_of(&ids().1), Some(ids().0));
        assert_eq!(evacuation_of(&MigrationId::new("other").unwrap()), None);
    }

    #[test]
    fn queue_numbers_are_pool_2_of_the_dscp_code_points() {
        let numbers: Vec<u32> = queue_numbers().collect();
        assert_eq!((numbers.len(), numbers[0], numbers[15]), (16, 3, 63));
        assert!(numbers.iter().all(|number| number & 3 == 3));
    }

    #[test]
    fn a_page_flow_is_recognised_and_a_deletion_of_its_evacuation_covers_it() {
        let (evacuation, migration) = ids();
        let link = Link {
            source: [10, 0, 0, 1].into(),
            destination: [10, 0, 0, 2].into(),
            port: 7445,
            served: false,
        };
        let flow = page_flow(&evacuation, &migration, 5, 7, link, PortNo::NORMAL);
        assert_eq!(Link::from_match(&flow.matching), Some(link));
        let all = delete_pages(&evacuation);
        assert_eq!(flow.cookie & all.cookie_mask, all.cookie);
        let back = back_flow(&evacuation, &migration, 5, link, PortNo(4));
        let other_way = Link { served: true, ..link };
        assert_eq!(back.cookie, flow.cookie);
        assert_eq!(Link::from_match(&back.matching), Some(other_way));
        let gathered = page_flow(&evacuation, &migration, 5, 7, other_way, PortNo::NORMAL);
        assert_eq!(gathered.matching, back.matching);
        assert_eq!(Link::from_match(&gathered.matching), Some(other_way));
        assert_ne!(clear_flow(&evacuation, 7, None).cookie & all.cookie_mask, all.cookie);
        assert_eq!(delete_page(&evacuation, &migration).cookie, flow.cookie);
    }

    #[test]
    fn what_arrives_and_pages_pass_no_meter_and_everything_else_does_also_with_a_forged_mark() {
        let (evacuation, migration) = ids();
        let link = Link {
            source: [10, 0, 0, 1].into(),
            destination: [10, 0, 0, 2].into(),
            port: 7445,
            served: false,
        };
        let page = page_flow(&evacuation, &migration, 0, 7, link, PortNo::NORMAL);
        let clear = clear_flow(&evacuation, 7, Some(9));
        let [arriving, arp, rest] = hold_flows(PortNo(1), 9);
        let is_metered = |flow: &FlowMod| flow.instructions.contains(&Instruction::Meter(9));
        assert!(!is_metered(&page) && !is_metered(&arriving) && !is_metered(&arp));
        assert!(is_metered(&clear) && is_metered(&rest));
        assert!(page.priority > arriving.priority && arriving.priority > clear.priority);
        assert!(clear.priority > rest.priority && rest.matching.fields.is_empty());
        let cookie = Cookie::from_bits(rest.cookie).unwrap();
        assert_eq!((cookie.kind, delete_hold().cookie), (Kind::Hold, rest.cookie));
    }

    #[test]
    fn marks_of_queues_read_as_they_are_written() {
        let (evacuation, _) = ids();
        let at = PortRef { switch: SwitchId::new("h1.br0").unwrap(), port: "h1-eth0".to_owned() };
        let mark = queue_mark(&evacuation, &at, 9);
        assert_eq!(mark.reservation, "e1 h1.br0:h1-eth0");
        assert_eq!(read_mark(&mark), Some((evacuation, at)));
        let shared = Mark { reservation: String::new(), ..mark.clone() };
        assert_eq!(read_mark(&shared), None);
        assert_eq!(read_mark(&Mark { owner: "other".to_owned(), ..mark }), None);
    }
}
