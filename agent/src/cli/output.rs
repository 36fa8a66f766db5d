//! What the commands print alike.

use serde::Serialize;

use crate::daemon::control::Reply;
use crate::daemon::outcome::{Class, Failure};

/// One object on stdout.
pub fn print_json(value: &impl Serialize) {
    let text = serde_json::to_string(value).expect("results are plain data");
    println!("{text}");
}

/// A failure on stderr: what is wrong, and what to do.
pub fn complain(cause: &str, advice: &str) {
    eprintln!("baton: {cause}");
    if !advice.is_empty() {
        eprintln!("  {advice}");
    }
}

/// An answer to another question.
pub fn unexpected(reply: &Reply) -> Failure {
    Failure::new(
        Class::Unknown,
        format!("batond answered something else than was asked: {reply:?}"),
        "install the same version of baton and batond",
    )
}
