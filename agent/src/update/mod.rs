//! An update, from the incumbent's side. [`upgrade`] is the main path; [`plan`] says whether it can be done, [`hands`] do it.

pub mod check;
pub mod findings;
pub mod hands;
pub mod kho;
pub mod line;
pub mod plan;
pub mod report;
pub mod setup;
pub mod stock;
pub mod timeline;
pub mod trial;
pub mod upgrade;
pub mod versions;

#[cfg(test)]
mod tests;
