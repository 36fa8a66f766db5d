#![doc = include_str!("../README.md")]

pub mod birth;
pub mod check;
pub mod cli;
pub mod config;
pub mod control;
pub mod daemon;
pub mod facts;
pub mod hands;
pub mod init;
pub mod initrd;
pub mod kernel;
pub mod kernels;
pub mod line;
pub mod mkinitrd;
pub mod net;
pub mod outcome;
pub mod plan;
pub mod recover;
pub mod report;
pub mod service;
pub mod services;
pub mod successor;
mod sys;
pub mod sysfs;
pub mod timeline;
pub mod upgrade;
