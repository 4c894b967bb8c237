//! Carries pages between hosts: the page link's frames, and the stores where pages wait when the
//! source leaves before the destination is ready (scatter-gather).
//!
//! ```text
//!  source's agent                     intermediaries                destination's agent
//!  page -> pack (+ seal) -> redundancy -> store .. store -> pack -> ledger -> page
//! ```
//!
//! `link` is pure. So are [`pack`] (bytes that wait), [`seal`] (their encryption), [`redundancy`]
//! (which store holds what, and what is left when one is lost), [`scatter`] (what is acknowledged, and
//! when the source may go) and [`ledger`] (where each page is and that it is placed once). [`store`] speaks with Redis and runs redis-server.
//!
//! This room knows bytes and who they belong to; it knows nothing of QMP, FUSE, switches or the
//! controller. Sockets belong to its user, `migrate-agent`.

pub mod ledger;
pub mod link;
pub mod pack;
pub mod page;
pub mod redundancy;
pub mod scatter;
pub mod seal;
pub mod store;
mod tasks;
