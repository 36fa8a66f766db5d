//! QEMU's control protocol over the child's own stdin and stdout: no socket file to wait for, and end-of-file says that QEMU is gone.

use std::io::{BufRead, BufReader, Write};
use std::process::{ChildStdin, ChildStdout};

use serde_json::{Value, json};

use super::error::{Doing, LabError, Result};

/// A negotiated connection.
#[derive(Debug)]
pub struct Qmp {
    to: ChildStdin,
    from: BufReader<ChildStdout>,
}

impl Qmp {
    /// Waits for QEMU's greeting (its devices exist then) and negotiates.
    pub fn greet(to: ChildStdin, from: ChildStdout) -> Result<Self> {
        let mut qmp = Self { to, from: BufReader::new(from) };
        let greeting = qmp.read()?;
        if greeting.get("QMP").is_none() {
            return Err(LabError::Reply { from: "QEMU".into(), problem: format!("no greeting: {greeting}") });
        }
        qmp.execute("qmp_capabilities", Value::Null)?;
        Ok(qmp)
    }

    /// Runs one command. Events that arrive meanwhile are passed over: nobody here waits for one.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value> {
        let mut request = json!({ "execute": command });
        if !arguments.is_null() {
            request["arguments"] = arguments;
        }
        writeln!(self.to, "{request}")
            .and_then(|()| self.to.flush())
            .doing(format_args!("sending {command} to QEMU"))?;
        loop {
            let mut reply = self.read()?;
            if let Some(error) = reply.get("error") {
                return Err(LabError::Refused { who: "QEMU".into(), why: format!("{command}: {error}") });
            }
            if let Some(result) = reply.get_mut("return") {
                return Ok(result.take());
            }
        }
    }

    fn read(&mut self) -> Result<Value> {
        let mut line = String::new();
        let read = self.from.read_line(&mut line).doing("reading from QEMU")?;
        if read == 0 {
            return Err(LabError::Reply { from: "QEMU".into(), problem: "it ended".into() });
        }
        serde_json::from_str(&line)
            .map_err(|e| LabError::Reply { from: "QEMU".into(), problem: format!("{e}: {line}") })
    }
}
