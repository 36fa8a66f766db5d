//! A small kernel image that passes every check, for tests and for the fuzz targets (`fuzz/`).

/// Sectors of setup code behind the boot sector.
const SETUP_SECTS: u8 = 4;
/// Where the setup code ends, and the protected-mode kernel begins.
const SETUP: usize = (SETUP_SECTS as usize + 1) * 512;
/// Where the payload begins in that kernel.
const PAYLOAD_AT: usize = 0x300;

/// An image whose kernel has `kernel` bytes or what the payload needs. What each field is for is in `bzimage.rs`.
pub fn with_payload(payload: &[u8], kernel: usize) -> Vec<u8> {
    let kernel = kernel.max(PAYLOAD_AT + payload.len()).next_multiple_of(16);
    let mut file = vec![0; SETUP + kernel];
    let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
    put(0x1f1, &[SETUP_SECTS]);
    put(0x1f4, &(kernel as u32 / 16).to_le_bytes());
    put(0x1fe, &0xaa55u16.to_le_bytes());
    put(0x200, &[0xeb, 0x6a]);
    put(0x202, b"HdrS");
    put(0x206, &0x020fu16.to_le_bytes());
    put(0x20e, &0x400u16.to_le_bytes());
    put(0x211, &[1]);
    put(0x22c, &0x7fff_ffffu32.to_le_bytes());
    put(0x230, &0x20_0000u32.to_le_bytes());
    put(0x234, &[1, 21]);
    put(0x236, &0x7fu16.to_le_bytes());
    put(0x238, &2047u32.to_le_bytes());
    put(0x248, &(PAYLOAD_AT as u32).to_le_bytes());
    put(0x24c, &(payload.len() as u32).to_le_bytes());
    put(0x258, &0x100_0000u64.to_le_bytes());
    put(0x260, &0x300_0000u32.to_le_bytes());
    put(0x600, b"6.99.1-test (builder@host) #1\0");
    put(SETUP + PAYLOAD_AT, payload);
    file
}
