//! `baton config`: whether a configuration is right, and what holds with it.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, Subcommand};
use serde::Serialize;

use super::output::print_json;
use crate::daemon::config::{self, Config, ConfigError};
use crate::daemon::outcome::{Class, Failure};

/// What is asked of it.
#[derive(Debug, Subcommand)]
pub enum Verb {
    /// Say whether the file can be used, and what is wrong with it: batond would say the same.
    Check(Which),
    /// Show what the file says, or with --effective what holds: every key, with its default where the file says nothing.
    Show {
        #[command(flatten)]
        which: Which,
        /// All keys, not only those of the file.
        #[arg(long)]
        effective: bool,
    },
}

/// Which file.
#[derive(Debug, Args)]
pub struct Which {
    /// The configuration.
    #[arg(long, env = "BATON_CONFIG", default_value = config::DEFAULT_PATH)]
    config: PathBuf,
}

/// Answers.
pub fn run(verb: &Verb, json: bool) -> Result<ExitCode, Failure> {
    match verb {
        Verb::Check(Which { config }) => {
            load(config)?;
            let there = config.exists();
            if json {
                #[derive(Serialize)]
                struct Checked<'a> {
                    schema_version: u32,
                    config: &'a Path,
                    exists: bool,
                }
                print_json(&Checked { schema_version: 1, config, exists: there });
            } else {
                let found = if there { "is right" } else { "does not exist: everything is as without wishes" };
                println!("{} {found}", config.display());
            }
        }
        Verb::Show { which: Which { config }, effective } => {
            let loaded = load(config)?;
            let shown = if *effective { Ok(loaded) } else { Err(text(config)?) };
            let table = match &shown {
                Ok(loaded) => toml::Table::try_from(loaded).map_err(|error| Failure::from_error(&error.into()))?,
                Err(text) => text.parse().map_err(|error: toml::de::Error| Failure::from_error(&error.into()))?,
            };
            if json {
                print_json(&table);
            } else {
                // What somebody has written is shown as it was written.
                print!("{}", shown.map_or_else(|text| text, |_| table.to_string()));
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// The file's text; empty where none is needed.
fn text(path: &Path) -> Result<String, Failure> {
    match std::fs::read_to_string(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(String::new()),
        read => read.map_err(|error| Failure::from_error(&error.into())),
    }
}

fn load(path: &Path) -> Result<Config, Failure> {
    Config::load(path).map_err(|error| {
        let advice = match &error {
            ConfigError::Read { .. } => "name a file that can be read with --config",
            _ => "correct the file; batond goes on with the one that it has read. All keys: baton-config.toml(5)",
        };
        Failure::new(Class::Precondition, format!("{:#}", anyhow::Error::from(error)), advice)
    })
}
