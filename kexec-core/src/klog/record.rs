//! One message.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Facility of messages of the kernel itself. What user space writes to /dev/kmsg never gets it (`devkmsg_write`).
const LOG_KERN: u8 = 0;

/// Who wrote it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Caller {
    /// A task, by its thread id.
    Thread(u32),
    /// An interrupt, or what ran before there were tasks, on a CPU.
    Cpu(u32),
}

impl Caller {
    /// As `printk_info.caller_id` has it.
    pub(super) fn of(id: u32) -> Caller {
        const CPU: u32 = 1 << 31;
        if id & CPU == 0 { Caller::Thread(id) } else { Caller::Cpu(id & !CPU) }
    }
}

/// One message of a kernel's log. Its texts can be printed: see [`escaped`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Its number, from 0 on.
    pub seq: u64,
    /// When, in nanoseconds of that kernel's clock.
    pub ts_ns: u64,
    /// 0 (the system is unusable) to 7 (for debugging).
    pub level: u8,
    /// 0: the kernel; others: programs, through /dev/kmsg.
    pub facility: u8,
    /// Who wrote it.
    pub caller: Caller,
    /// What it says; more than one line where it has newlines.
    pub text: String,
    /// Kind of the device that it is about, if any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub subsystem: Option<String>,
    /// And the device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device: Option<String>,
}

impl Record {
    /// Written by the kernel itself.
    pub fn is_kernels(&self) -> bool {
        self.facility == LOG_KERN
    }

    /// Its lines as dmesg(1) shows them, the time before each.
    pub fn lines(&self) -> impl Iterator<Item = String> + '_ {
        let (seconds, micros) = (self.ts_ns / 1_000_000_000, self.ts_ns % 1_000_000_000 / 1000);
        let text = if self.text.is_empty() { "\n" } else { &self.text };
        text.lines().map(move |line| format!("[{seconds:5}.{micros:06}] {line}"))
    }
}

impl fmt::Display for Record {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.lines().collect::<Vec<_>>().join("\n"))
    }
}

/// Text that a terminal shows and does not obey, whatever the bytes are: control characters, escape sequences and characters that
/// change the direction of writing are spelled out (`\u{1b}`), bytes that are no UTF-8 too (`\xff`). Newlines and tabs stay.
pub fn escaped(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len());
    for chunk in bytes.utf8_chunks() {
        for c in chunk.valid().chars() {
            match c {
                '\n' | '\t' | '"' | '\'' | '\\' => text.push(c),
                _ => text.extend(c.escape_debug()),
            }
        }
        text.extend(chunk.invalid().iter().map(|byte| format!("\\x{byte:02x}")));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_could_command_a_terminal_is_spelled_out() {
        let hostile = b"a\x1b[31mred\x07\r\x9b\xff \xe2\x80\xaeevil\xe2\x80\xa8\x00\x7f \"q\" \\ \xc3\xa9\n\tb";
        let text = escaped(hostile);
        assert_eq!(text, "a\\u{1b}[31mred\\u{7}\\r\\x9b\\xff \\u{202e}evil\\u{2028}\\0\\u{7f} \"q\" \\ é\n\tb");
        for byte in 0..=u8::MAX {
            assert!(escaped(&[byte]).chars().all(|c| c == '\n' || c == '\t' || !c.is_control()));
        }
    }

    #[test]
    fn lines_look_like_those_of_dmesg() {
        let record = Record {
            seq: 1,
            ts_ns: 12_000_345_999,
            level: 6,
            facility: 0,
            caller: Caller::of(0x8000_0003),
            text: "one\ntwo".into(),
            subsystem: None,
            device: None,
        };
        assert_eq!(record.to_string(), "[   12.000345] one\n[   12.000345] two");
        assert_eq!(record.caller, Caller::Cpu(3));
        assert_eq!(Record { text: String::new(), ..record }.to_string(), "[   12.000345] ");
    }
}
