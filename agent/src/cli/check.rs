//! `baton check`: whether an upgrade would be started, and why not. Touches nothing.

use std::fmt::Write;
use std::process::ExitCode;

use serde::Serialize;

use super::output::{print_json, unexpected};
use crate::daemon::control::{Finding, Reply, Verdict};
use crate::daemon::outcome::Failure;
use crate::update::stock::accept::Accept;

/// Prints what batond found.
pub fn run(json: bool, reply: Reply) -> Result<ExitCode, Failure> {
    let Reply::Checked { findings } = reply else {
        return Err(unexpected(&reply));
    };
    Ok(print(&findings, json))
}

/// Prints findings; the exit code is the first refusal's.
pub fn print(findings: &[Finding], json: bool) -> ExitCode {
    #[derive(Serialize)]
    struct Checked<'a> {
        schema_version: u32,
        possible: bool,
        findings: &'a [Finding],
    }
    let refused = findings.iter().find_map(Finding::refusal);
    if json {
        print_json(&Checked { schema_version: 2, possible: refused.is_none(), findings });
    } else {
        print!("{}", table(findings));
        println!("{}", summary(findings));
    }
    refused.map_or(ExitCode::SUCCESS, |failure| ExitCode::from(failure.class.exit_code()))
}

/// Verdict, check, what was found; below it what becomes of it and what to do.
fn table(findings: &[Finding]) -> String {
    let width = findings.iter().map(|finding| finding.check.len()).max().unwrap_or(0);
    let mut text = String::new();
    for finding in findings {
        let verdict = match finding.verdict {
            Verdict::Ok => "ok",
            Verdict::Lost => "lost",
            Verdict::Refused => "REFUSED",
        };
        let lines = [&finding.found, &finding.cause, &finding.advice].into_iter().filter(|line| !line.is_empty());
        for (n, line) in lines.enumerate() {
            let (verdict, check) = if n == 0 { (verdict, finding.check.as_str()) } else { ("", "") };
            // Writing to a string cannot fail.
            let _ = writeln!(text, "{verdict:<8} {check:<width$}  {line}");
        }
    }
    text
}

/// `refused by 3 findings; 2 can be accepted: --accept routes,logins`.
pub fn summary(findings: &[Finding]) -> String {
    let refused: Vec<&Finding> = findings.iter().filter(|finding| finding.verdict == Verdict::Refused).collect();
    let lost = findings.iter().filter(|finding| finding.verdict == Verdict::Lost).count();
    let count = |n: usize| if n == 1 { "1 finding".to_owned() } else { format!("{n} findings") };
    if refused.is_empty() {
        let lost = if lost == 0 { String::new() } else { format!("; {} lost with this kernel", count(lost)) };
        return format!("nothing refuses{lost}");
    }
    let mut names: Vec<Accept> = refused.iter().filter_map(|finding| finding.accept).collect();
    let acceptable = names.len();
    names.sort_unstable();
    names.dedup();
    let names = names.iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
    let accept = match acceptable {
        0 => "none can be accepted".to_owned(),
        n => format!("{n} can be accepted: --accept {names}"),
    };
    format!("refused by {}; {accept}", count(refused.len()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn finding(check: &str, verdict: Verdict, accept: Option<Accept>) -> Finding {
        let text = |word: &str| if verdict == Verdict::Ok { String::new() } else { format!("{check}'s {word}") };
        Finding {
            check: check.into(),
            verdict,
            found: format!("{check} found"),
            cause: text("cause"),
            advice: text("advice"),
            accept,
            class: None,
        }
    }

    #[test]
    fn the_last_line_counts_and_names_what_can_be_accepted() {
        let refused = |check, accept| finding(check, Verdict::Refused, accept);
        let all = [
            finding("module", Verdict::Ok, None),
            refused("mounts", None),
            refused("logins", Some(Accept::Logins)),
            refused("routes", Some(Accept::Routes)),
        ];
        assert_eq!(summary(&all), "refused by 3 findings; 2 can be accepted: --accept routes,logins");
        assert_eq!(summary(&all[..2]), "refused by 1 finding; none can be accepted");
        assert_eq!(summary(&all[..1]), "nothing refuses");
        let lost = finding("swap", Verdict::Lost, Some(Accept::Swap));
        assert_eq!(summary(&[lost]), "nothing refuses; 1 finding lost with this kernel");
    }

    #[test]
    fn the_table_has_a_line_for_each_thing_that_is_said() {
        let text =
            table(&[finding("module", Verdict::Ok, None), finding("swap", Verdict::Refused, Some(Accept::Swap))]);
        let expected = "\
ok       module  module found
REFUSED  swap    swap found
                 swap's cause
                 swap's advice
";
        assert_eq!(text, expected);
    }

    #[test]
    fn json_has_the_fields_that_are_promised() {
        let mut busy = finding("update", Verdict::Refused, None);
        busy.class = Some(crate::daemon::outcome::Class::Busy);
        let json = serde_json::to_value(finding("swap", Verdict::Lost, Some(Accept::Swap))).unwrap();
        let keys: Vec<&str> = json.as_object().unwrap().keys().map(String::as_str).collect();
        assert_eq!(keys, ["accept", "advice", "cause", "check", "found", "verdict"]);
        assert_eq!((json["verdict"].as_str(), json["accept"].as_str()), (Some("lost"), Some("swap")));
        let json = serde_json::to_value(busy).unwrap();
        assert!(json["accept"].is_null() && json["class"] == "busy");
    }
}
