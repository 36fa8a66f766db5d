//! The bytes that cross: the same as ever (`golden`), and whatever a lying kernel makes of them (`hostile`).

mod golden;
mod hostile;
mod layouts;
mod samples;
mod table;
