//! The rules of a scenario, and how a file becomes a checked [`Scenario`].
//!
//! Addresses that nobody chooses follow from the order in the file: host number N has 10.0.0.N
//! on the data network and 10.99.0.N on the management network; ports are named after what they
//! face (`s1-h2` on s1, `h2-up` on h2). Switches get the datapath ids 1, 2, ..., hosts' own
//! bridges 0x1001, 0x1002, ..., the client's 0x2001.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Display;
use std::net::Ipv4Addr;
use std::str::FromStr;

use lifeboat_protocol::ids::{DatapathId, HostId, NameError, SwitchId, VmId};
use lifeboat_protocol::units::{BitsPerSec, Bytes, PagesPerSec, ParseUnitError};
use toml::Spanned;

use super::{
    Client, End, Host, Link, Network, Nic, Plug, Scenario, ScenarioError, Switch, Vm, file,
};
use crate::proportions::{Role, share};

/// Linux allows 15 bytes in an interface's name; `NAME-NAME` and `NAME-up` must fit, with a
/// suffix for the cable.
const NAME_LENGTH: usize = 6;
const DISK_LEAST: u64 = 1 << 20;
const DISK_MOST: u64 = 1 << 30;
/// A guest checks its whole region in this time.
const CHECK_SECONDS: u64 = 20;
const HOSTS: usize = 90;
/// Packet sizes in bytes: Ethernet's, to what jumbo frames usually carry.
const MTU: std::ops::RangeInclusive<u32> = 1500..=9000;
/// Queues of links, ms: what a switch with little memory has, and what is called bufferbloat.
const QUEUE_MS: std::ops::RangeInclusive<u32> = 5..=500;
const QUEUE_MS_USUAL: u32 = 25;
const VM_MEMORY_LEAST: u64 = 96 << 20;
/// The management network's own number for the client.
const CLIENT_NUMBER: usize = 100;

/// What can be wrong with a scenario.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum Problem {
    /// Not TOML, a key that does not exist, or a value of a wrong type.
    #[error("{0}")]
    Form(toml::de::Error),
    /// Not a name.
    #[error(transparent)]
    Name(#[from] NameError),
    /// Longer than interface names allow.
    #[error("`{0}` is longer than {NAME_LENGTH} characters, which interface names do not allow")]
    LongName(String),
    /// Given twice.
    #[error("`{0}` is there already; names and addresses are given once")]
    Twice(String),
    /// Not a rate or a size.
    #[error(transparent)]
    Unit(#[from] ParseUnitError),
    /// A link that carries nothing, or more than can be emulated.
    #[error("a link carries between 1 Mbit/s and 10 Gbit/s, not {0}")]
    Capacity(BitsPerSec),
    /// Less than the guests' own, or more than Ethernet's jumbo frames.
    #[error("an MTU of {mtu} is not within 1500 to {most} bytes")]
    Mtu {
        /// What was given.
        mtu: u32,
        /// The most: 9000 between hosts, and what they have for guests.
        most: u32,
    },
    /// A queue that no link has.
    #[error("a queue of {0} ms is not within 5 to 500")]
    Queue(u32),
    /// A load factor that makes no sense.
    #[error("load is a factor between 0 and 10, not {0}")]
    Load(f64),
    /// A name that nothing has.
    #[error("there is no {kind} `{name}`; there are {known}")]
    Nobody {
        /// What was looked for.
        kind: &'static str,
        /// The name given.
        name: String,
        /// The names that exist.
        known: String,
    },
    /// Switches that flood must form a tree, listed from the root down.
    #[error("the switches must form one tree, listed from its root: only the first has no uplink")]
    NoTree,
    /// Nothing to move between.
    #[error("there are {0} hosts; an evacuation needs 2 and the lab numbers at most {HOSTS}")]
    HostCount(usize),
    /// Not an address.
    #[error("`{0}` is not an IPv4 address with its prefix length such as `10.0.0.101/24`")]
    Address(String),
    /// Not a VLAN.
    #[error("a VLAN tag is 1 to 4094, not {0}")]
    Vlan(u16),
    /// The client cannot watch this NIC.
    #[error("the client has no network with {address} in VLAN {vlan} (0: untagged)")]
    OutOfSight {
        /// The NIC's address.
        address: String,
        /// Its VLAN.
        vlan: u16,
    },
    /// A VM without a network cannot be watched.
    #[error("a VM has 1 or 2 NICs, not {0}")]
    NicCount(usize),
    /// Too little memory for the guest's kernel.
    #[error("{0} is too little: the guest needs 96 MiB")]
    SmallVm(Bytes),
    /// VMs do not fit.
    #[error("with this VM the VMs on {host} take {taken}, but it has {has}")]
    Full {
        /// The host.
        host: HostId,
        /// What its VMs take together.
        taken: Bytes,
        /// What it has.
        has: Bytes,
    },
    /// More for others' pages than there is.
    #[error("{stores} for stores is more than the host's memory, {memory}")]
    LargeStores {
        /// What was asked for.
        stores: Bytes,
        /// What the host has.
        memory: Bytes,
    },
    /// Too small to be one, or too large to be filled while a demonstration begins.
    #[error("a disk of {0} is out of range: 1 MiB to 1 GiB are written and checked")]
    Disk(Bytes),
    /// More seeded pages than memory.
    #[error("a region of {region} does not fit a VM of {memory}: 76 MiB stay with its kernel")]
    LargeRegion {
        /// The region.
        region: Bytes,
        /// The VM's memory.
        memory: Bytes,
    },
}

type Checked<T> = Result<T, ScenarioError>;

pub(super) struct Checker<'a> {
    file: &'a str,
    text: &'a str,
    taken: BTreeSet<String>,
}

impl<'a> Checker<'a> {
    pub(super) fn new(file: &'a str, text: &'a str) -> Self {
        Self { file, text, taken: BTreeSet::new() }
    }

    pub(super) fn scenario(mut self) -> Checked<Scenario> {
        let file: file::File = toml::from_str(self.text).map_err(|error| self.form(error))?;
        self.parsed::<SwitchId>("name", &file.name)?;
        let (switches, links) = self.switches(&file)?;
        let hosts = self.hosts(&file, &switches)?;
        let client = self.client(&file, &switches)?;
        let mut vms = self.vms(&file, &hosts, &client)?;
        let ((mtu, guest_mtu), queue_ms) = (self.mtus(&file)?, self.queue_ms(&file)?);
        if guest_mtu != *MTU.start() {
            vms.iter_mut().for_each(|vm| vm.arguments.push_str(&format!(" lb.mtu={guest_mtu}")));
        }
        let (name, transport) = (file.name.into_inner(), file.workload.transport);
        Ok(Scenario {
            name,
            transport,
            mtu,
            guest_mtu,
            queue_ms,
            switches,
            links,
            hosts,
            client,
            vms,
        })
    }

    fn queue_ms(&self, file: &file::File) -> Checked<u32> {
        let Some(given) = &file.links.queue_ms else { return Ok(QUEUE_MS_USUAL) };
        match QUEUE_MS.contains(given.get_ref()) {
            true => Ok(*given.get_ref()),
            false => Err(self.wrong("links.queue_ms", given, Problem::Queue(*given.get_ref()))),
        }
    }

    /// Between hosts, and of guests.
    fn mtus(&self, file: &file::File) -> Checked<(u32, u32)> {
        let of = |key: &str, given: &Option<Spanned<u32>>, most: u32| match given {
            None => Ok(*MTU.start()),
            Some(mtu) if (*MTU.start()..=most).contains(mtu.get_ref()) => Ok(*mtu.get_ref()),
            Some(mtu) => Err(self.wrong(key, mtu, Problem::Mtu { mtu: *mtu.get_ref(), most })),
        };
        let hosts = of("links.mtu", &file.links.mtu, *MTU.end())?;
        Ok((hosts, of("workload.mtu", &file.workload.mtu, hosts)?))
    }

    fn switches(&mut self, file: &file::File) -> Checked<(Vec<Switch>, Vec<Link>)> {
        let (mut switches, mut links): (Vec<Switch>, Vec<Link>) = (Vec::new(), Vec::new());
        for (index, given) in file.switch.iter().enumerate() {
            let name: SwitchId = self.node_name("switch.name", &given.name)?;
            let key = format!("switch.{name}.uplink");
            match &given.uplink {
                None if index == 0 => {}
                Some(uplink) if index > 0 => {
                    let above =
                        self.known(&key, "switch", uplink, switches.iter().map(|s| &s.name))?;
                    let core = given.link.as_ref().unwrap_or(&file.links.core);
                    let capacity = self.capacity(&format!("switch.{name}.link"), core)?;
                    let ends = [end(&name, &above), end(&above, &name)];
                    links.push(Link { ends, capacity });
                }
                _ => return Err(self.wrong(&key, &given.name, Problem::NoTree)),
            }
            switches.push(Switch { name, datapath: DatapathId(index as u64 + 1) });
        }
        Ok((switches, links))
    }

    fn hosts(&mut self, file: &file::File, switches: &[Switch]) -> Checked<Vec<Host>> {
        if !(2..=HOSTS).contains(&file.host.len()) {
            return Err(self.wrong("host", &file.name, Problem::HostCount(file.host.len())));
        }
        let mut hosts = Vec::new();
        for (given, number) in file.host.iter().zip(1..) {
            let name: HostId = self.node_name("host.name", &given.name)?;
            let key = format!("host.{name}");
            let link = given.link.as_ref().unwrap_or(&file.links.host);
            let plug = self.plug(&key, name.as_str(), (&given.switch, link), switches, number)?;
            let capacity_in = match &given.link_in {
                Some(link) => self.capacity(&format!("{key}.link_in"), link)?,
                None => plug.capacity,
            };
            let plug = Plug { capacity_in, ..plug };
            let memory = self.parsed(&format!("{key}.memory"), &given.memory)?;
            let stores = self.stores(&format!("{key}.stores"), given.stores.as_ref(), memory)?;
            let address = format!("10.0.0.{number}/24");
            self.taken.insert(format!("10.0.0.{number}"));
            hosts.push(Host { name, plug, address, memory, stores });
        }
        Ok(hosts)
    }

    fn stores(&self, key: &str, given: Option<&Spanned<String>>, memory: Bytes) -> Checked<Bytes> {
        let Some(given) = given else { return Ok(Bytes::ZERO) };
        let stores = self.parsed(key, given)?;
        if stores > memory {
            return Err(self.wrong(key, given, Problem::LargeStores { stores, memory }));
        }
        Ok(stores)
    }

    fn client(&mut self, file: &file::File, switches: &[Switch]) -> Checked<Client> {
        let given = &file.client;
        let link = given.link.as_ref().unwrap_or(&file.links.host);
        self.taken.insert("client".to_owned());
        let plug = (&given.switch, link);
        let plug = self.plug("client", "client", plug, switches, CLIENT_NUMBER)?;
        let mut networks = Vec::new();
        for network in &given.network {
            networks.push(self.network("client.network", network)?);
        }
        Ok(Client { plug, networks })
    }

    fn plug(
        &self,
        key: &str,
        name: &str,
        (switch, link): (&Spanned<String>, &Spanned<String>),
        switches: &[Switch],
        number: usize,
    ) -> Checked<Plug> {
        let names = switches.iter().map(|switch| &switch.name);
        let switch: SwitchId = self.known(&format!("{key}.switch"), "switch", switch, names)?;
        let datapath = if number == CLIENT_NUMBER { 0x2001 } else { 0x1000 + number as u64 };
        let capacity = self.capacity(&format!("{key}.link"), link)?;
        Ok(Plug {
            uplink: format!("{name}-up"),
            edge: End { port: format!("{switch}-{name}"), switch },
            capacity,
            capacity_in: capacity,
            datapath: DatapathId(datapath),
            management: format!("10.99.0.{number}"),
        })
    }

    fn vms(&mut self, file: &file::File, hosts: &[Host], client: &Client) -> Checked<Vec<Vm>> {
        let mut used: BTreeMap<HostId, Bytes> = BTreeMap::new();
        let mut vms = Vec::new();
        for (given, number) in file.vm.iter().zip(1..) {
            let vm = self.vm(given, number, file, hosts, client)?;
            let taken = used.entry(vm.host.clone()).or_default();
            *taken += vm.memory;
            let has = hosts.iter().find(|host| host.name == vm.host).map_or(Bytes(0), |h| h.memory);
            if *taken > has {
                let problem = Problem::Full { host: vm.host.clone(), taken: *taken, has };
                return Err(self.wrong(&format!("vm.{}.host", vm.name), &given.host, problem));
            }
            vms.push(vm);
        }
        Ok(vms)
    }

    fn vm(
        &mut self,
        given: &file::Vm,
        number: usize,
        file: &file::File,
        hosts: &[Host],
        client: &Client,
    ) -> Checked<Vm> {
        let name: VmId = self.unique("vm.name", &given.name)?;
        let key = |field: &str| format!("vm.{name}.{field}");
        let names = hosts.iter().map(|host| &host.name);
        let host: HostId = self.known(&key("host"), "host", &given.host, names)?;
        let memory: Bytes = self.parsed(&key("memory"), &given.memory)?;
        if memory.0 < VM_MEMORY_LEAST {
            return Err(self.wrong(&key("memory"), &given.memory, Problem::SmallVm(memory)));
        }
        let nics = self.nics(&key("nic"), &given.nic, number, client)?;
        let capacity = hosts.iter().find(|h| h.name == host).map(|h| h.plug.capacity);
        let load = self.load(file)?;
        let share = share(given.role, memory, capacity.unwrap_or_default(), load);
        let region = self.region(&key("region"), given.region.as_ref(), memory, share.region)?;
        let rate = match &given.rate {
            Some(rate) => self.parsed(&key("rate"), rate)?,
            None => share.rate,
        };
        let disk = match &given.disk {
            Some(disk) => self.disk(&key("disk"), disk)?,
            None => Bytes::ZERO,
        };
        let mut vm = Vm {
            name: name.clone(),
            host,
            role: given.role,
            memory,
            nics,
            region,
            dirty: given.dirty.as_ref().map_or(share.dirty, |dirty| PagesPerSec(*dirty.get_ref())),
            check: PagesPerSec(match &given.check {
                Some(check) => *check.get_ref(),
                None => region.pages().0.div_ceil(CHECK_SECONDS),
            }),
            rate,
            cpu: given.cpu.as_ref().map_or(share.cpu, |cpu| *cpu.get_ref()),
            disk,
            arguments: String::new(),
        };
        vm.arguments = arguments(&vm, client, file.workload.transport);
        Ok(vm)
    }

    fn nics(
        &mut self,
        key: &str,
        given: &Spanned<Vec<file::Network>>,
        vm: usize,
        client: &Client,
    ) -> Checked<Vec<Nic>> {
        if !(1..=2).contains(&given.get_ref().len()) {
            return Err(self.wrong(key, given, Problem::NicCount(given.get_ref().len())));
        }
        let mut nics = Vec::new();
        for (nic, index) in given.get_ref().iter().zip(0..) {
            let Network { address, vlan } = self.network(key, nic)?;
            if client_beside(client, &address, vlan).is_none() {
                let problem = Problem::OutOfSight { address, vlan };
                return Err(self.wrong(key, &nic.address, problem));
            }
            let mac = format!("52:54:00:{:02x}:{:02x}:{index:02x}", vm >> 8 & 0xff, vm & 0xff);
            nics.push(Nic { mac, address, vlan });
        }
        Ok(nics)
    }

    fn network(&mut self, key: &str, given: &file::Network) -> Checked<Network> {
        let address = given.address.get_ref().clone();
        let wrong_address = || Problem::Address(address.clone());
        let (ip, _) =
            split(&address).ok_or_else(|| self.wrong(key, &given.address, wrong_address()))?;
        if !self.taken.insert(ip.to_string()) {
            return Err(self.wrong(key, &given.address, Problem::Twice(ip.to_string())));
        }
        let vlan = given.vlan.as_ref().map_or(0, |vlan| *vlan.get_ref());
        if let Some(given) = given.vlan.as_ref().filter(|_| !(1..=4094).contains(&vlan)) {
            return Err(self.wrong(key, given, Problem::Vlan(vlan)));
        }
        Ok(Network { address, vlan })
    }

    fn region(
        &self,
        key: &str,
        given: Option<&Spanned<String>>,
        memory: Bytes,
        default: Bytes,
    ) -> Checked<Bytes> {
        let Some(given) = given else { return Ok(default) };
        let region: Bytes = self.parsed(key, given)?;
        if region + Bytes::from_mib(76) > memory {
            return Err(self.wrong(key, given, Problem::LargeRegion { region, memory }));
        }
        Ok(region)
    }

    fn disk(&self, key: &str, given: &Spanned<String>) -> Checked<Bytes> {
        let disk: Bytes = self.parsed(key, given)?;
        match (DISK_LEAST..=DISK_MOST).contains(&disk.0) {
            true => Ok(disk),
            false => Err(self.wrong(key, given, Problem::Disk(disk))),
        }
    }

    fn load(&self, file: &file::File) -> Checked<f64> {
        let Some(load) = &file.workload.load else { return Ok(1.0) };
        if (0.0..=10.0).contains(load.get_ref()) {
            return Ok(*load.get_ref());
        }
        Err(self.wrong("workload.load", load, Problem::Load(*load.get_ref())))
    }

    fn capacity(&self, key: &str, given: &Spanned<String>) -> Checked<BitsPerSec> {
        let rate: BitsPerSec = self.parsed(key, given)?;
        if (1_000_000..=10_000_000_000).contains(&rate.0) {
            return Ok(rate);
        }
        Err(self.wrong(key, given, Problem::Capacity(rate)))
    }

    fn node_name<T>(&mut self, key: &str, given: &Spanned<String>) -> Checked<T>
    where
        T: FromStr,
        Problem: From<T::Err>,
    {
        if given.get_ref().len() > NAME_LENGTH {
            return Err(self.wrong(key, given, Problem::LongName(given.get_ref().clone())));
        }
        self.unique(key, given)
    }

    fn unique<T>(&mut self, key: &str, given: &Spanned<String>) -> Checked<T>
    where
        T: FromStr,
        Problem: From<T::Err>,
    {
        let name = self.parsed(key, given)?;
        if !self.taken.insert(given.get_ref().clone()) {
            return Err(self.wrong(key, given, Problem::Twice(given.get_ref().clone())));
        }
        Ok(name)
    }

    fn known<'b, T: Display + Clone + 'b>(
        &self,
        key: &str,
        kind: &'static str,
        given: &Spanned<String>,
        names: impl Iterator<Item = &'b T> + Clone,
    ) -> Checked<T> {
        let wanted = given.get_ref();
        if let Some(name) = names.clone().find(|name| name.to_string() == *wanted) {
            return Ok(name.clone());
        }
        let known = names.map(ToString::to_string).collect::<Vec<_>>().join(", ");
        let problem = Problem::Nobody { kind, name: wanted.clone(), known };
        Err(self.wrong(key, given, problem))
    }

    fn parsed<T>(&self, key: &str, given: &Spanned<String>) -> Checked<T>
    where
        T: FromStr,
        Problem: From<T::Err>,
    {
        given.get_ref().parse().map_err(|error: T::Err| self.wrong(key, given, error.into()))
    }

    fn form(&self, error: toml::de::Error) -> ScenarioError {
        let at = error.span().map_or(0, |span| span.start);
        let key = self.key_at(at);
        self.error(at, key, Problem::Form(error))
    }

    fn wrong<T>(&self, key: &str, at: &Spanned<T>, problem: Problem) -> ScenarioError {
        self.error(at.span().start, key.to_owned(), problem)
    }

    fn error(&self, at: usize, key: String, problem: Problem) -> ScenarioError {
        ScenarioError {
            file: self.file.to_owned(),
            line: self.line_at(at),
            key,
            problem: Box::new(problem),
        }
    }

    fn line_at(&self, at: usize) -> usize {
        1 + self.text.bytes().take(at).filter(|byte| *byte == b'\n').count()
    }

    /// The key on the line of a form error: the parser tells a place, a reader wants a name.
    fn key_at(&self, at: usize) -> String {
        let line = self.text.lines().nth(self.line_at(at) - 1).unwrap_or_default();
        line.split('=').next().unwrap_or_default().trim().to_owned()
    }
}

fn end(of: &SwitchId, towards: &SwitchId) -> End {
    End { switch: of.clone(), port: format!("{of}-{towards}") }
}

/// What `guest-workload` reads from the kernel's command line (its `params.rs`).
fn arguments(vm: &Vm, client: &Client, transport: file::Transport) -> String {
    let client = vm.nics.first().and_then(|nic| client_beside(client, &nic.address, nic.vlan));
    let mut words = vec![
        format!("lb.name={} lb.role={}", vm.name, vm.role.as_str()),
        format!("lb.region={} lb.dirty={} lb.check={}", vm.region.0, vm.dirty.0, vm.check.0),
    ];
    if let Some(client) = client.filter(|_| vm.role == Role::No) {
        let transport = if transport == file::Transport::Tcp { "tcp" } else { "udp" };
        words.push(format!("lb.client={client} lb.rate={} lb.transport={transport}", vm.rate.0));
    }
    if vm.cpu > 0 {
        words.push(format!("lb.cpu={}", vm.cpu));
    }
    if vm.disk > Bytes::ZERO {
        // It is read again as fast as memory is: two checks for each write.
        let blocks = vm.disk.pages().0.div_ceil(CHECK_SECONDS * 2);
        words.push(format!("lb.disk={} lb.disk_rate={blocks}", vm.disk.0));
    }
    for (nic, key) in vm.nics.iter().zip(["lb.ip", "lb.ip2"]) {
        words.push(format!("{key}={}", nic.address));
    }
    words.join(" ")
}

/// The client's address in the network of `address`.
fn client_beside(client: &Client, address: &str, vlan: u16) -> Option<Ipv4Addr> {
    let (ip, prefix) = split(address)?;
    let networks = client.networks.iter().filter(|network| network.vlan == vlan);
    networks
        .filter_map(|network| split(&network.address))
        .find(|(other, length)| *length == prefix && within(ip, *other, prefix))
        .map(|(other, _)| other)
}

fn within(one: Ipv4Addr, other: Ipv4Addr, prefix: u32) -> bool {
    let different = u32::from(one) ^ u32::from(other);
    different.checked_shr(32 - prefix).is_none_or(|rest| rest == 0)
}

/// An address with its prefix length, 8 to 30.
fn split(address: &str) -> Option<(Ipv4Addr, u32)> {
    let (ip, prefix) = address.split_once('/')?;
    let prefix: u32 = prefix.parse().ok()?;
    Some((ip.parse().ok()?, prefix)).filter(|_| (8..=30).contains(&prefix))
}
