//! Clients that keep a machine busy and remember which writes were acknowledged.
