//! Process 1 of an initramfs made by `baton mkinitrd`; see [`agent::init`].
fn main() {
    if let Err(error) = agent::init::run() {
        agent::init::give_up(&error);
    }
}
