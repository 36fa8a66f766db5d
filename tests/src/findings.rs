//! What `baton check --json` says, finding by finding.

use std::collections::BTreeSet;

use anyhow::{Context, Result, ensure};
use demos::lab::Guest;
use serde_json::Value;

use crate::refusal::{baton, said};

/// One finding.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// What was looked at.
    pub check: String,
    /// `ok`, `lost` or `refused`.
    pub verdict: String,
    /// What was found, why it matters and what to do, in one text.
    pub text: String,
    /// By what name an operator accepts it, if that can be accepted.
    pub accept: Option<String>,
}

/// A check's outcome.
#[derive(Debug, Clone)]
pub struct Checked {
    /// Exit code of `baton check`.
    pub exit: Option<i32>,
    /// Everything that it found.
    pub findings: Vec<Finding>,
}

impl Checked {
    /// `baton check --json` for an image, with more words.
    pub fn ask(guest: &Guest, image: &str, more: &[&str]) -> Result<Checked> {
        let ran = baton(guest, &[&["check", "--json", "--kernel", image], more].concat())?;
        let value: Value = serde_json::from_slice(&ran.stdout).with_context(|| said(&ran))?;
        let list = value["findings"].as_array().with_context(|| format!("no findings in {value}"))?;
        let findings = list.iter().map(finding).collect::<Result<_>>().with_context(|| value.to_string())?;
        Ok(Checked { exit: ran.exit.code, findings })
    }

    /// The names under which something was refused and could be accepted.
    #[must_use]
    pub fn refused_names(&self) -> BTreeSet<&str> {
        self.refused().filter_map(|finding| finding.accept.as_deref()).collect()
    }

    /// What is refused.
    pub fn refused(&self) -> impl Iterator<Item = &Finding> {
        self.findings.iter().filter(|finding| finding.verdict == "refused")
    }

    /// It is refused, in words that have all of these, under the name by which it could be accepted; or by a check of that name, where nobody can
    /// accept it.
    pub fn assert_refuses(&self, what: &str, name: &str, words: &[&str]) -> Result<()> {
        ensure!(self.exit == Some(3), "{what}: exit {:?} instead of 3: {:#?}", self.exit, self.findings);
        let is_named = |finding: &&Finding| finding.accept.as_ref().unwrap_or(&finding.check) == name;
        let named: Vec<&Finding> = self.refused().filter(is_named).collect();
        ensure!(!named.is_empty(), "{what}: nothing is refused as {name}: {:#?}", self.findings);
        let has = |word: &&&str| named.iter().any(|finding| finding.text.contains(**word));
        let missing: Vec<_> = words.iter().filter(|word| !has(word)).collect();
        ensure!(missing.is_empty(), "{what}: {missing:?} is not in {named:#?}");
        Ok(())
    }

    /// Nothing is refused.
    pub fn assert_possible(&self, what: &str) -> Result<()> {
        let refused: Vec<_> = self.refused().collect();
        ensure!(self.exit == Some(0) && refused.is_empty(), "{what}: exit {:?}: {refused:#?}", self.exit);
        Ok(())
    }
}

fn finding(value: &Value) -> Result<Finding> {
    let text = |key: &str| value[key].as_str().map(str::to_owned);
    let verdict = text("verdict").context("a finding without a verdict")?;
    ensure!(["ok", "lost", "refused"].contains(&verdict.as_str()), "a verdict of {verdict:?}");
    let parts = ["found", "cause", "advice"].map(|key| text(key).unwrap_or_default());
    Ok(Finding {
        check: text("check").context("a finding without a check")?,
        verdict,
        text: parts.join(" "),
        accept: text("accept"),
    })
}
