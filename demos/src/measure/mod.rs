//! Clients that measure a machine from outside: the open-loop prober and what is made of its samples.
