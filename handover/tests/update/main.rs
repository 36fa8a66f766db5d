//! The update against a simulated machine: every failure at every point, thousands of histories, and what must hold
//! after each step of each.

mod histories;
mod plans;
mod recovery;
mod roles;
mod sizes;
mod talk;
mod world;
