//! Everything that decides; nothing that acts: who goes first, how fast, when to stop, where to,
//! what it costs.
//!
//! The controller asks for a [`plan`], for [`reserve`]'s next step each second, for what
//! [`reserve::admit`] grants and for the [`saturation`] of links; the agents ask [`stop`] after each
//! iteration and [`pace`] before each chunk; the lab's simulator asks all of them. Every function is
//! pure: what it needs (also the time) is passed in, and the same input gives the same answer.
//! Deliberately not here: sockets, clocks, tasks, randomness, and any state that would have to
//! survive a crash.

pub mod disk;
pub mod intermediary;
pub mod measured;
pub mod mode;
pub mod order;
pub mod pace;
pub mod placement;
pub mod plan;
pub mod predict;
pub mod reserve;
pub mod saturation;
pub mod stop;
