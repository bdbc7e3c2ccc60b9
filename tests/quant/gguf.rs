//! GGUF blocks against the published layouts, weight by weight.

use crate::Random;
use half::{bf16, f16};
use handmill::quant::gguf_blocks::{relay, to_gguf_q4_1, to_gguf_q8_0, GgmlType};
use handmill::quant::{decode, encode, Error, Format};
use proptest::prelude::*;

const TYPES: [GgmlType; 9] = [
    GgmlType::F32,
    GgmlType::F16,
    GgmlType::BF16,
    GgmlType::Q4_0,
    GgmlType::Q4_1,
    GgmlType::Q8_0,
    GgmlType::Q4K,
    GgmlType::Q5K,
    GgmlType::Q6K,
];

/// Where the f16 scales (and mins) of a block lie.
fn half_offsets(ty: GgmlType) -> &'static [usize] {
    match ty {
        GgmlType::F32 | GgmlType::F16 | GgmlType::BF16 => &[],
        GgmlType::Q4_0 | GgmlType::Q8_0 => &[0],
        GgmlType::Q4_1 | GgmlType::Q4K | GgmlType::Q5K => &[0, 2],
        GgmlType::Q6K => &[208],
    }
}

/// The weights of blocks, one at a time, straight from the description of each block. Arithmetic in f32, in the order
/// of the published formulas.
fn dequantize_reference(ty: GgmlType, bytes: &[u8]) -> Vec<f32> {
    let mut out = Vec::new();
    for b in bytes.chunks_exact(ty.block_bytes()) {
        let half = |at: usize| f16::from_le_bytes([b[at], b[at + 1]]).to_f32();
        // 6-bit scale and min of sub-block j of a block of Q4_K or Q5_K.
        let scale_min = |j: usize| {
            let s = &b[4..16];
            if j < 4 {
                (s[j] & 0x3f, s[j + 4] & 0x3f)
            } else {
                ((s[j + 4] & 0x0f) | ((s[j - 4] >> 6) << 4), (s[j + 4] >> 4) | ((s[j] >> 6) << 4))
            }
        };
        for i in 0..ty.block() {
            out.push(match ty {
                GgmlType::F32 => f32::from_le_bytes(b.try_into().unwrap()),
                GgmlType::F16 => half(0),
                GgmlType::BF16 => bf16::from_le_bytes([b[0], b[1]]).to_f32(),
                // Byte j: weight j in the low nibble, weight j + 16 in the high one.
                GgmlType::Q4_0 => {
                    let q = if i < 16 { b[2 + i] & 15 } else { b[2 + i - 16] >> 4 };
                    half(0) * (q as i32 - 8) as f32
                }
                GgmlType::Q4_1 => {
                    let q = if i < 16 { b[4 + i] & 15 } else { b[4 + i - 16] >> 4 };
                    half(0) * q as f32 + half(2)
                }
                GgmlType::Q8_0 => half(0) * (b[2 + i] as i8) as f32,
                // 64 weights in 32 bytes: the first 32 low, the others high. Sub-blocks of 32.
                GgmlType::Q4K => {
                    let byte = b[16 + (i / 64) * 32 + i % 32];
                    let q = if i % 64 < 32 { byte & 15 } else { byte >> 4 };
                    let (sc, m) = scale_min(i / 32);
                    half(0) * sc as f32 * q as f32 - half(2) * m as f32
                }
                GgmlType::Q5K => {
                    let byte = b[48 + (i / 64) * 32 + i % 32];
                    let low = if i % 64 < 32 { byte & 15 } else { byte >> 4 };
                    let q = low + 16 * (b[16 + i % 32] >> (i / 32) & 1);
                    let (sc, m) = scale_min(i / 32);
                    half(0) * sc as f32 * q as f32 - half(2) * m as f32
                }
                // Halves of 128 weights, quarters of 32 within.
                GgmlType::Q6K => {
                    let (h, quarter, l) = (i / 128, i % 128 / 32, i % 32);
                    let byte = b[h * 64 + (quarter % 2) * 32 + l];
                    let low = if quarter < 2 { byte & 15 } else { byte >> 4 };
                    let high = b[128 + h * 32 + l] >> (2 * quarter) & 3;
                    let q = (low | high << 4) as i32 - 32;
                    half(208) * (b[192 + i / 16] as i8) as f32 * q as f32
                }
            });
        }
    }
    out
}

/// Random blocks whose scales are any finite f16 (kind 0), subnormal or zero (1), of the size models have (2), or near
/// the largest (3).
fn random_blocks(ty: GgmlType, blocks: usize, kind: usize, random: &mut Random) -> Vec<u8> {
    let mut bytes: Vec<u8> = (0..blocks * ty.block_bytes()).map(|_| random.bits() as u8).collect();
    for block in bytes.chunks_exact_mut(ty.block_bytes()) {
        for &at in half_offsets(ty) {
            let bits = loop {
                let magnitude = match kind {
                    0 => random.below(0x7c00),
                    1 => random.below(0x400),
                    2 => f16::from_f32(0.02 * random.unit()).to_bits() as usize,
                    _ => 0x7b00 + random.below(0x100),
                } as u16;
                let value = f16::from_bits(magnitude | (random.below(2) as u16) << 15);
                if value.is_finite() {
                    break value.to_bits();
                }
            };
            block[at..at + 2].copy_from_slice(&bits.to_le_bytes());
        }
    }
    bytes
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn relaying_changes_no_value(
        seed: u64, which in 0usize..9, kind in 0usize..4, rows in 1usize..4, wide in 1usize..4,
    ) {
        let ty = TYPES[which];
        let cols = wide * ty.block();
        let bytes = random_blocks(ty, rows * wide, kind, &mut Random(seed));
        let packed = relay(ty, &bytes, rows, cols).unwrap();
        let want = dequantize_reference(ty, &bytes);
        for (i, (have, want)) in decode(&packed).iter().zip(&want).enumerate() {
            // Q4_0 alone may give +0 for -0; see the module.
            let same = have.to_bits() == want.to_bits() || (ty == GgmlType::Q4_0 && *have == 0.0 && *want == 0.0);
            prop_assert!(same, "{} weight {}: {:e} for {:e}", ty.name(), i, have, want);
        }
    }

    #[test]
    fn writing_gguf_blocks_is_the_inverse_of_reading_them(
        seed: u64, kind in 0usize..4, rows in 1usize..4, wide in 1usize..5,
    ) {
        let random = &mut Random(seed);
        let blocks = random_blocks(GgmlType::Q4_1, rows * wide, kind, random);
        prop_assert_eq!(to_gguf_q4_1(&relay(GgmlType::Q4_1, &blocks, rows, 32 * wide).unwrap()).unwrap(), blocks);
        let blocks = random_blocks(GgmlType::Q8_0, rows * wide, kind, random);
        prop_assert_eq!(to_gguf_q8_0(&relay(GgmlType::Q8_0, &blocks, rows, 32 * wide).unwrap()).unwrap(), blocks);
    }
}

/// Enough blocks that several runs are re-laid side by side, the last one short.
#[test]
fn long_matrices_are_relaid_in_runs() {
    for (ty, rows, cols) in [
        (GgmlType::F16, 1100, 1024),
        (GgmlType::Q4_0, 100, 32 * 90),
        (GgmlType::Q8_0, 3, 32 * 4096),
        (GgmlType::Q5K, 50, 256 * 90),
        (GgmlType::Q6K, 4097, 256),
    ] {
        let bytes = random_blocks(ty, rows * cols / ty.block(), 2, &mut Random(cols as u64));
        let (have, want) = (decode(&relay(ty, &bytes, rows, cols).unwrap()), dequantize_reference(ty, &bytes));
        let wrong =
            (0..want.len()).find(|&i| have[i].to_bits() != want[i].to_bits() && (have[i] != 0.0 || want[i] != 0.0));
        assert!(wrong.is_none(), "{} at {wrong:?}", ty.name());
    }
}

#[test]
fn each_type_becomes_the_format_of_the_table() {
    let q4 = |wide| Format::Q4 { group: 32, wide };
    let q8 = |group, wide, affine| Format::Q8 { group, wide, affine };
    let formats = [
        Format::F32,
        Format::F16,
        Format::BF16,
        q4(false),
        q4(false),
        q8(32, false, false),
        q4(true),
        q8(32, true, true),
        q8(16, true, false),
    ];
    for (ty, format) in TYPES.into_iter().zip(formats) {
        let bytes = random_blocks(ty, 2, 2, &mut Random(5));
        assert_eq!(relay(ty, &bytes, 2, ty.block()).unwrap().format, format, "{}", ty.name());
    }
    // The largest d whose eightfold fits f16 is 8188; the next one needs f32, as does every block beside it.
    for (d, format) in [(8188.0, q4(false)), (-8188.0, q4(false)), (8192.0, q4(true)), (-65504.0, q4(true))] {
        let mut bytes = random_blocks(GgmlType::Q4_0, 3, 1, &mut Random(6));
        bytes[18..20].copy_from_slice(&f16::from_f32(d).to_le_bytes());
        let packed = relay(GgmlType::Q4_0, &bytes, 1, 96).unwrap();
        assert_eq!(packed.format, format, "d = {d}");
        assert_eq!(decode(&packed), dequantize_reference(GgmlType::Q4_0, &bytes), "d = {d}");
    }
}

#[test]
fn blocks_that_are_cut_short_or_not_finite_are_errors() {
    for ty in TYPES {
        let (rows, cols) = (2, 2 * ty.block());
        let bytes = random_blocks(ty, 4, 2, &mut Random(9));
        for wrong in [&bytes[..bytes.len() - 1], &bytes[..0], &[&bytes[..], &[0]].concat()] {
            let error = relay(ty, wrong, rows, cols).err().unwrap();
            let (expected, found) = (bytes.len(), wrong.len());
            assert_eq!(error, Error::Length { what: "bytes of the matrix's blocks", expected, found });
        }
        if ty.block() > 1 {
            let error = relay(ty, &bytes, rows, cols - 1).err().unwrap();
            assert_eq!(error, Error::Block { ty, block: ty.block(), cols: cols - 1 });
        }
        assert!(matches!(relay(ty, &[], 0, cols), Err(Error::Shape { .. })), "{} without rows", ty.name());
        assert!(matches!(relay(ty, &[], rows, 0), Err(Error::Shape { .. })), "{} without columns", ty.name());
        let huge = usize::MAX / ty.block() * ty.block();
        assert_eq!(relay(ty, &bytes, 1 << 20, huge).err(), Some(Error::Overflow { rows: 1 << 20, cols: huge }));

        for (&at, what) in half_offsets(ty).iter().zip(["scale", "minimum"]) {
            for bad in [f16::NAN, f16::INFINITY, f16::NEG_INFINITY] {
                let mut bytes = bytes.clone();
                let block = 3 * ty.block_bytes();
                bytes[block + at..block + at + 2].copy_from_slice(&bad.to_le_bytes());
                let error = relay(ty, &bytes, rows, cols).err().unwrap();
                let Error::NotFinite { what: found, row: 1, col, .. } = error else { panic!("{}: {error}", ty.name()) };
                assert_eq!((found, col), (what, ty.block()), "{}", ty.name());
            }
        }
    }
}

#[test]
fn other_ggml_types_are_refused_by_name() {
    for ty in TYPES {
        assert_eq!(GgmlType::from_id(ty.id()), Ok(ty));
    }
    let message = |id| GgmlType::from_id(id).unwrap_err().to_string();
    assert!(message(10).starts_with("Q2_K (ggml type 10) is not supported; use a file in F32, F16"), "{}", message(10));
    for (id, name) in [(6, "Q5_0"), (11, "Q3_K"), (20, "IQ4_NL"), (35, "TQ2_0"), (39, "MXFP4")] {
        assert!(message(id).starts_with(&format!("{name} ")), "{}", message(id));
    }
    for id in [43, 1000, u32::MAX] {
        assert_eq!(GgmlType::from_id(id), Err(Error::UnknownType(id)));
    }
    // No number below the last one is left without a name.
    assert!((0..43).all(|id| !matches!(GgmlType::from_id(id), Err(Error::UnknownType(_)))));
}

#[test]
fn only_the_matching_format_is_written_as_gguf() {
    let x = [0.5f32; 256];
    for format in crate::all_formats() {
        let packed = encode(format, 1, 256, &x).unwrap();
        let (q4_1, q8_0) = (to_gguf_q4_1(&packed), to_gguf_q8_0(&packed));
        assert_eq!(q4_1.is_ok(), format == Format::Q4 { group: 32, wide: false }, "{format:?}");
        assert_eq!(q8_0.is_ok(), format == Format::Q8 { group: 32, wide: false, affine: false }, "{format:?}");
        if let Err(error) = q4_1 {
            assert!(matches!(error, Error::NotThatBlock { ty: GgmlType::Q4_1, .. }));
        }
    }
    let mut packed = encode(Format::Q4 { group: 32, wide: false }, 1, 256, &x).unwrap();
    packed.rows = 2;
    assert!(matches!(to_gguf_q4_1(&packed), Err(Error::Part { .. })));
}
