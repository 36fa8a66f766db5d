//! Process 1 of an initramfs made by `baton mkinitrd`; see [`agent::userland::init`].
fn main() {
    if let Err(error) = agent::userland::init::run() {
        agent::userland::init::give_up(&error);
    }
}
