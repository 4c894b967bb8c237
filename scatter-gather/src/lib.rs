//! Carries pages between hosts: the page link's frames, and (with post-copy and scatter-gather,
//! which are not here yet) the stores where pages wait.
//!
//! This room knows bytes and who they belong to; it knows nothing of QMP, FUSE, switches or the
//! controller. Sockets belong to its user, `migrate-agent`.

pub mod link;
