//! The story of sizes, for people.

use std::fmt::Write;

use super::{Writes, phase_table, table, title, wrapped};
use crate::measure::Distribution;
use crate::story::scale::{OfSize, Scale};

/// The sizes beside each other, for people.
#[must_use]
pub fn scale_for_people(scale: &Scale) -> String {
    let mut text = title(&scale.machine, Some(scale.accelerator));
    let mut rows = table(&["ms", "arena MiB", "runs", "min", "median", "max"], &[1, 2, 3, 4, 5]);
    let mut add = |name: &str, of: &dyn Fn(&OfSize) -> Option<Distribution>| {
        for size in &scale.sizes {
            if let Some(d) = of(size) {
                let ms = |value: f64| format!("{value:.2}");
                let figures = [d.count().to_string(), ms(d.min()), ms(d.median()), ms(d.max())];
                rows.add_row(
                    [name.to_owned(), size.arena_mib.to_string()].into_iter().chain(figures).collect::<Vec<_>>(),
                );
            }
        }
    };
    add("before: place", &|size| Some(size.place_ms.clone()));
    add("before: take over pages", &|size| Some(size.take_over_ms.clone()));
    let steps = scale.sizes.first().map(|size| size.steps.as_slice()).unwrap_or_default();
    for step in steps {
        add(&step.name, &|size| size.steps.iter().find(|same| same.name == step.name).map(|same| same.ms.clone()));
    }
    add("whole cutover", &|size| Some(size.cutover_ms.clone()));
    add("longest silence", &|size| Some(size.blackout_ms.clone()));
    let _ = writeln!(text, "{rows}");
    if let Some(ratio) = scale.cutover_ratio {
        let _ =
            writeln!(text, "whole cutover, medians: the largest arena takes {ratio:.2} times what the smallest takes");
    }
    for failed in &scale.failures {
        let _ = writeln!(text, "FAILED: {} MiB, update {}: {}", failed.arena_mib, failed.run, first_line(&failed.why));
    }
    let _ = writeln!(text, "\nall phases, medians");
    for size in &scale.sizes {
        let Writes { acknowledged, lost, unread, .. } = size.writes;
        let unread = if unread > 0 { format!(", {unread} more could not be read back") } else { String::new() };
        let _ = writeln!(
            text,
            "{} MiB, {} filled; {acknowledged} writes acknowledged, {lost} lost{unread}; logs: {}",
            size.arena_mib,
            size.filled_mib,
            size.logs.join(", ")
        );
        let _ = writeln!(text, "{}", phase_table(&size.phases, &["phase", "at ms", "ms", "steps (ms)"]));
    }
    let mut rows =
        table(&["described only, on the host", "pieces", "setup_data, median µs", "KHO, median µs"], &[1, 2, 3]);
    for one in &scale.described {
        let us = |value: f64| format!("{value:.1}");
        rows.add_row([
            format!("{} MiB", one.arena_mib),
            one.pieces.to_string(),
            us(one.divide_us.median()),
            us(one.kho_us.median()),
        ]);
    }
    let _ = writeln!(text, "\n{rows}\n");
    if let Some(failure) = &scale.failure {
        let _ = writeln!(text, "failed: {failure}\n");
    }
    text + &wrapped(
        "For reference, measured by others on bare metal, never to be compared with an emulated machine: PKRAM, KHO's ancestor, saved \
         100 GB in 13 ms and restored them in 101 ms, with huge pages.",
    )
}

fn first_line(text: &str) -> &str {
    text.lines().next().unwrap_or_default()
}
