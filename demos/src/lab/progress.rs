//! What the lab shows while it works: a spinner with the current step on a terminal, plain lines otherwise. Always on stderr: stdout
//! belongs to results.

use std::io::IsTerminal;
use std::sync::LazyLock;
use std::time::{Duration, Instant};

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

/// All spinners of this process: several tasks may run at a time.
static BARS: LazyLock<MultiProgress> = LazyLock::new(MultiProgress::new);

/// Where progress goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// Spinner.
    Terminal,
    /// One line a step.
    Lines,
    /// Nothing.
    Quiet,
}

impl Progress {
    /// Spinner when stderr is a terminal, else lines.
    #[must_use]
    pub fn auto() -> Self {
        if std::io::stderr().is_terminal() { Self::Terminal } else { Self::Lines }
    }

    /// Begins a piece of work that is worth showing.
    #[must_use]
    pub fn task(self, name: &str) -> Task {
        let bar = (self == Self::Terminal).then(|| {
            let style = ProgressStyle::with_template("{spinner} {prefix}: {wide_msg} {elapsed}")
                .unwrap_or_else(|_| ProgressStyle::default_spinner());
            let bar = BARS.add(ProgressBar::new_spinner()).with_style(style).with_prefix(name.to_owned());
            bar.enable_steady_tick(Duration::from_millis(120));
            bar
        });
        Task { name: name.to_owned(), progress: self, bar, began: Instant::now() }
    }
}

/// A piece of work under way; dropped without [`Task::done`] it disappears (the error message says the rest).
#[derive(Debug)]
pub struct Task {
    name: String,
    progress: Progress,
    bar: Option<ProgressBar>,
    began: Instant,
}

impl Task {
    /// The step that begins now.
    pub fn step(&self, what: &str) {
        match (&self.bar, self.progress) {
            (Some(bar), _) => bar.set_message(what.to_owned()),
            (None, Progress::Lines) => eprintln!("lab: {}: {what}", self.name),
            _ => {}
        }
    }

    /// A detail that is worth showing only where it replaces the one before.
    pub fn detail(&self, what: &str) {
        if let Some(bar) = &self.bar {
            bar.set_message(what.to_owned());
        }
    }

    /// The work is done; its duration is shown.
    pub fn done(self, result: &str) {
        let line = format!("lab: {}: {result} ({:.1} s)", self.name, self.began.elapsed().as_secs_f64());
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
        if self.progress != Progress::Quiet {
            eprintln!("{line}");
        }
    }
}

impl Drop for Task {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
