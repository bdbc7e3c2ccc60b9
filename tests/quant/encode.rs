//! Encoding and decoding: error bounds, exact cases, and that decoded weights encode to themselves.

use crate::{all_formats, Random};
use half::{bf16, f16};
use handmill::quant::{decode, decode_row, decode_with_magnitude, encode, nf4, Format, Packed};
use handmill::tensor::{Dtype, HostTensor};
use proptest::prelude::*;

/// Unit roundoff of f32.
const U: f64 = 1.0 / (1u64 << 24) as f64;

/// Weights of one of several characters, among them those that groups handle worst.
fn weights(kind: usize, len: usize, random: &mut Random) -> Vec<f32> {
    let size = [1.0, 0.02, 1e-6, 300.0][random.below(4)];
    (0..len)
        .map(|i| match kind {
            0 => size * random.normal(),
            1 => size * random.normal() * if random.below(40) == 0 { 20.0 } else { 1.0 },
            2 => size * (5.0 + 0.01 * random.normal()),
            3 => [0.0, -0.0, size, -size][random.below(4)],
            4 => size * (i / 64) as f32,
            5 => f32::from_bits(random.below(1 << 23) as u32 | (random.below(2) as u32) << 31),
            _ => size * random.unit(),
        })
        .collect()
}

/// Scales or mins of group `g`, as f64.
fn scale(packed: &Packed, part: usize, g: usize) -> f64 {
    packed.parts[part].to_f64()[g]
}

/// The largest error of a group of q4 that only min and max give: min = lo and scale = (hi - min)/15 as stored, codes
/// nearest. Half a step inside; outside, what the rounded ends leave uncovered. Roundings of w - min, of the division,
/// of scale*code and of + min move a value by at most 4U of what they are applied to, 15 steps or the weight.
fn q4_bound(group: &[f32], wide: bool) -> f64 {
    let store = |v: f32| if wide { v } else { f16::from_f32(v).to_f32() };
    let lo = group.iter().copied().fold(f32::INFINITY, f32::min);
    let hi = group.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let min = store(lo);
    let step = store(((hi - min) / 15.0).max(0.0));
    let (lo, hi, min, step) = (lo as f64, hi as f64, min as f64, step as f64);
    let largest = lo.abs().max(hi.abs());
    (step / 2.0).max((lo - min).abs()).max(hi - (min + 15.0 * step)) + 4.0 * U * (15.0 * step + largest)
}

/// The largest error of a group of q8 with this scale and min: as q4, on codes lowest..=127.
fn q8_bound(group: &[f32], scale: f64, min: f64, lowest: f64) -> f64 {
    let lo = group.iter().copied().fold(f32::INFINITY, f32::min) as f64;
    let hi = group.iter().copied().fold(f32::NEG_INFINITY, f32::max) as f64;
    let largest = lo.abs().max(hi.abs());
    let uncovered = (hi - (min + 127.0 * scale)).max(min + lowest * scale - lo);
    (scale / 2.0).max(uncovered) + 4.0 * U * (128.0 * scale + largest)
}

fn check_bounds(format: Format, rows: usize, cols: usize, x: &[f32]) {
    let packed = encode(format, rows, cols, x).unwrap();
    let y = decode(&packed);
    let error = |i: usize| (y[i] as f64 - x[i] as f64).abs();
    match format {
        Format::F32 => (0..x.len()).for_each(|i| assert_eq!(y[i].to_bits(), x[i].to_bits())),
        // To nearest: half a unit in the last place, or half the smallest subnormal.
        Format::F16 => (0..x.len()).for_each(|i| assert!(error(i) <= (x[i].abs() as f64 / 2048.0).max(2f64.powi(-25)))),
        Format::BF16 => {
            (0..x.len()).for_each(|i| assert!(error(i) <= (x[i].abs() as f64 / 256.0).max(2f64.powi(-134))))
        }
        Format::Q4 { group, wide } => {
            for (g, x) in x.chunks(group).enumerate() {
                let squares: f64 = (0..group).map(|i| error(g * group + i).powi(2)).sum();
                let (rms, bound) = ((squares / group as f64).sqrt(), q4_bound(x, wide));
                assert!(rms <= bound * (1.0 + 1e-12), "{format:?} group {g}: rms {rms:e} > {bound:e}");
            }
        }
        Format::Q8 { group, wide, affine } => {
            for (g, x) in x.chunks(group).enumerate() {
                let step = scale(&packed, 1, g);
                let (min, lowest) = if affine { (scale(&packed, 2, g), -128.0) } else { (0.0, -127.0) };
                // The scale itself: the range over its codes, half an f16 step (or subnormal) off at most, and where
                // the min was rounded too, stretched to reach the farther end.
                let lo = x.iter().copied().fold(f32::INFINITY, f32::min) as f64;
                let hi = x.iter().copied().fold(f32::NEG_INFINITY, f32::max) as f64;
                let range = if affine { (hi - lo) / 255.0 } else { lo.abs().max(hi.abs()) / 127.0 };
                let (unit, least) = if wide { (8.0 * U, 2f64.powi(-149)) } else { (1.0 / 2048.0, 2f64.powi(-25)) };
                let moved = if affine { (unit * lo.abs().max(hi.abs())).max(least) / 127.0 } else { 0.0 };
                assert!(
                    (step - range).abs() <= 1.001 * (unit * range + moved).max(least) + moved,
                    "{format:?} group {g}"
                );
                let bound = q8_bound(x, step, min, lowest);
                for i in 0..group {
                    let error = error(g * group + i);
                    assert!(error <= bound, "{format:?} group {g} weight {i}: {error:e} > {bound:e}");
                }
            }
        }
        Format::Nf4 | Format::Nf4Dq => {
            let rebuilt = absmax(&packed);
            for (b, x) in x.chunks(64).enumerate() {
                let absmax = x.iter().fold(0.0f32, |max, w| max.max(w.abs())) as f64;
                // Half the widest gap, -1 to -0.6962; below 1e-38 every weight counts as nearly zero.
                let gap = if absmax < 1e-38 { 1.0 } else { 0.5 * (nf4::LEVELS[1] - nf4::LEVELS[0]) as f64 };
                // Levels are within 1, so an absmax that is off moves a weight by no more than that.
                let bound = (gap + 4.0 * U) * absmax + (rebuilt[b] - absmax).abs() + 2f64.powi(-149);
                for i in 0..64 {
                    let error = error(b * 64 + i);
                    assert!(error <= bound, "{format:?} block {b} weight {i}: {error:e} > {bound:e}");
                }
            }
        }
    }
    // Real values: the f32 ones up to their roundings, each relative to the magnitude (two, four for an 8-bit absmax).
    let (values, magnitudes) = decode_with_magnitude(&packed.parts, format, rows, cols);
    for i in 0..x.len() {
        let (y, value, magnitude) = (y[i] as f64, values[i], magnitudes[i]);
        assert!((y - value).abs() <= 4.0 * U * magnitude + 2f64.powi(-149), "{format:?} {i}: {y:e} {value:e}");
        assert!(value.abs() <= magnitude * (1.0 + 1e-15), "{format:?} {i}: {value:e} beyond {magnitude:e}");
    }
    // One row alone gives what the whole does.
    let mut row = vec![0.0; cols];
    decode_row(&packed, rows - 1, &mut row);
    assert!(row.iter().zip(&y[(rows - 1) * cols..]).all(|(a, b)| a.to_bits() == b.to_bits()));
}

/// The absmax of each NF4 block as decoding sees it.
fn absmax(packed: &Packed) -> Vec<f64> {
    let p = &packed.parts;
    if packed.format == Format::Nf4 {
        return p[1].to_f64();
    }
    let (code, absmax2, offset) = (p[2].to_f64(), p[3].to_f64(), p[4].to_f64()[0]);
    p[1].as_slice::<u8>().iter().enumerate().map(|(b, &a)| code[a as usize] * absmax2[b / 256] + offset).collect()
}

/// Failing seeds are printed, not kept in files.
fn cases() -> ProptestConfig {
    ProptestConfig { cases: 128, failure_persistence: None, ..ProptestConfig::default() }
}

proptest! {
    #![proptest_config(cases())]

    #[test]
    fn errors_stay_within_the_derived_bounds(
        seed: u64, kind in 0usize..7, rows in 1usize..6, groups in 1usize..4, which in 0usize..29,
    ) {
        let format = all_formats()[which];
        let cols = groups * match format {
            Format::Q4 { group, .. } | Format::Q8 { group, .. } => group,
            Format::Nf4 | Format::Nf4Dq => 64,
            _ => 1 + seed as usize % 37, // any number of columns
        };
        check_bounds(format, rows, cols, &weights(kind, rows * cols, &mut Random(seed)));
    }

    #[test]
    fn double_quantized_absmax_stays_within_half_a_step(seed: u64, kind in 0usize..7, rows in 1usize..40) {
        let x = weights(kind, rows * 1024, &mut Random(seed));
        let packed = encode(Format::Nf4Dq, rows, 1024, &x).unwrap();
        let plain = encode(Format::Nf4, rows, 1024, &x).unwrap();
        prop_assert_eq!(plain.parts[0].as_slice::<u8>(), packed.parts[0].as_slice::<u8>());
        let (exact, rebuilt) = (absmax(&plain), absmax(&packed));
        let absmax2 = packed.parts[3].to_f64();
        let largest = exact.iter().copied().fold(0.0, f64::max);
        // The widest gap of the map is 0.9/64, and -0.993 ends it half a gap short of -1; the grid of 65,536 points
        // moves a value by 1/65535 at most, and so does the midpoint it is compared with.
        let step = 0.5 * 0.9 / 64.0 + 2.0 / 65535.0;
        for b in 0..exact.len() {
            // An absmax2 below 2^-126 has no f32 inverse; any code of the map is then within twice of it.
            let step = if absmax2[b / 256] < f32::MIN_POSITIVE as f64 { 2.0 } else { step };
            let bound = step * absmax2[b / 256] + 4.0 * U * largest + 2f64.powi(-149);
            let error = (rebuilt[b] - exact[b]).abs();
            prop_assert!(error <= bound, "block {}: {:e} > {:e}", b, error, bound);
        }
    }

    #[test]
    fn what_was_decoded_encodes_to_itself(seed: u64, kind in 0usize..5, which in 0usize..29) {
        // Not so by design: f32 scales come back only up to their last bits; the rounded min of affine q8 moves with
        // the range, and the mean of an 8-bit absmax with each of them.
        let (format, random) = (all_formats()[which], &mut Random(seed));
        let packed = match format {
            Format::Q4 { wide: true, .. } | Format::Q8 { wide: true, .. } => return Ok(()),
            Format::Q8 { affine: true, .. } | Format::Nf4Dq => return Ok(()),
            Format::Q4 { group, .. } | Format::Q8 { group, .. } => packed_reaching_both_ends(format, group, random),
            _ => encode(format, 3, 256, &weights(kind, 3 * 256, random)).unwrap(),
        };
        let again = encode(format, 3, 256, &decode(&packed)).unwrap();
        for (part, (a, b)) in packed.parts.iter().zip(&again.parts).enumerate() {
            prop_assert!(a.bytes.as_slice() == b.bytes.as_slice(), "{:?} part {}", format, part);
        }
    }
}

/// A 3 x 256 matrix of q4 or q8 with f16 scales that its values determine: each group has a code at either end (q8: at
/// one), scales are not subnormal, and mins are within 64 steps, so that dividing the range gives the scale back.
fn packed_reaching_both_ends(format: Format, group: usize, random: &mut Random) -> Packed {
    let specs = format.parts(3, 256);
    let groups = 3 * 256 / group;
    let scales: Vec<f64> = (0..groups).map(|_| f16::from_f32(0.001 + random.unit()).to_f64()).collect();
    let mut mins: Vec<f64> = scales.iter().map(|step| step * (random.unit() - 0.5) as f64 * 128.0).collect();
    let mut codes: Vec<u8> = (0..specs[0].bytes().unwrap()).map(|_| random.bits() as u8).collect();
    if let Format::Q8 { .. } = format {
        mins.clear();
        codes.iter_mut().filter(|code| **code == 0x80).for_each(|code| *code = 0); // -128 is not used
        codes
            .chunks_mut(group)
            .for_each(|codes| codes[random.below(group)] = if random.below(2) == 0 { 127 } else { 129 });
    } else {
        codes.chunks_mut(group / 2).for_each(|codes| codes[random.below(group / 2)] = 0xf0);
    }
    let parts = vec![
        HostTensor::from_slice(specs[0].dtype, &specs[0].dims(), &codes),
        HostTensor::from_f64(Dtype::F16, &specs[1].dims(), &scales),
        HostTensor::from_f64(Dtype::F16, &specs[2].dims(), &mins),
    ];
    Packed::new(format, 3, 256, parts).unwrap()
}

/// What min and max alone would give, to compare the search with: codes nearest on 15 even steps from lo to hi.
fn plain_q4_error(x: &[f32]) -> f64 {
    let lo = x.iter().copied().fold(f32::INFINITY, f32::min);
    let hi = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let min = f16::from_f32(lo).to_f32();
    let scale = f16::from_f32((hi - min) / 15.0).to_f32();
    let decoded = |w: f32| scale * ((w - min) / scale).round().clamp(0.0, 15.0) + min;
    x.iter().map(|&w| (w as f64 - decoded(w) as f64).powi(2)).sum()
}

#[test]
fn the_search_of_q4_lowers_the_squared_error() {
    let mut random = Random(7);
    let x: Vec<f32> = (0..64 * 1024).map(|_| 0.02 * random.normal()).collect();
    for (group, at_most) in [(16, 0.80), (32, 0.85), (64, 0.88), (128, 0.88)] {
        let y = decode(&encode(Format::Q4 { group, wide: false }, 64, 1024, &x).unwrap());
        let (mut searched, mut plain) = (0.0, 0.0);
        for (x, y) in x.chunks(group).zip(y.chunks(group)) {
            let error: f64 = x.iter().zip(y).map(|(&x, &y)| (x as f64 - y as f64).powi(2)).sum();
            let without = plain_q4_error(x);
            assert!(error <= without * (1.0 + 1e-12), "group of {group}: {error:e} > {without:e}");
            searched += error;
            plain += without;
        }
        println!("q4 groups of {group}: squared error {:.3} of that without the search", searched / plain);
        assert!(searched <= at_most * plain, "groups of {group}: {searched:e} of {plain:e}");
    }
}

#[test]
fn a_byte_of_codes_is_two_neighbours() {
    // Scale 1, min 0: values are codes. All 256 bytes, so every pair of codes at every place of a byte.
    let bytes: Vec<u8> = (0..=255).collect();
    let parts = vec![
        HostTensor::from_slice(Dtype::U8, &[2, 128], &bytes),
        HostTensor::from_f32(&[2, 1], &[1.0, 1.0]),
        HostTensor::from_f32(&[2, 1], &[0.0, 0.0]),
    ];
    let packed = Packed::new(Format::Q4 { group: 256, wide: true }, 2, 256, parts).unwrap();
    let codes = decode(&packed);
    for (j, byte) in (0..=255u8).enumerate() {
        assert_eq!((codes[2 * j], codes[2 * j + 1]), ((byte % 16) as f32, (byte / 16) as f32), "q4 byte {j}");
    }
    assert_eq!(encode(packed.format, 2, 256, &codes).unwrap().parts[0].as_slice::<u8>(), bytes);

    let parts = vec![HostTensor::from_slice(Dtype::U8, &[2, 128], &bytes), HostTensor::from_f32(&[2, 4], &[1.0; 8])];
    let packed = Packed::new(Format::Nf4, 2, 256, parts).unwrap();
    let levels = decode(&packed);
    for (j, byte) in (0..=255usize).enumerate() {
        assert_eq!(
            (levels[2 * j], levels[2 * j + 1]),
            (nf4::LEVELS[byte / 16], nf4::LEVELS[byte % 16]),
            "nf4 byte {j}"
        );
    }
}

#[test]
fn signed_codes_and_plain_floats_keep_their_values() {
    // q8: scale 0.5, codes -127..=127, so absmax 63.5 gives the scale back.
    let x: Vec<f32> = (0..256).map(|i| 0.5 * (i as f32 - 127.0).min(127.0)).collect();
    let packed = encode(Format::Q8 { group: 256, wide: true, affine: false }, 1, 256, &x).unwrap();
    assert_eq!(packed.parts[1].f32(), [0.5]);
    assert_eq!(packed.parts[2].shape, [0, 1]);
    assert_eq!(decode(&packed), x);
    // q8 affine: 256 even steps of 1/4 from -3: all of them codes.
    let x: Vec<f32> = (0..256).map(|i| -3.0 + 0.25 * i as f32).collect();
    let packed = encode(Format::Q8 { group: 256, wide: true, affine: true }, 1, 256, &x).unwrap();
    let codes: Vec<i8> = (-128..=127).collect();
    assert_eq!(packed.parts[0].as_slice::<i8>(), codes);
    assert_eq!(decode(&packed), x);

    let x = [1.0f32, -2.5, 65504.0, 6.1e-5, 0.0, -0.0, 1.0 / 3.0];
    let f16s: Vec<f32> = x.iter().map(|&v| f16::from_f32(v).to_f32()).collect();
    let bf16s: Vec<f32> = x.iter().map(|&v| bf16::from_f32(v).to_f32()).collect();
    assert_eq!(decode(&encode(Format::F32, 1, 7, &x).unwrap()), x);
    assert_eq!(decode(&encode(Format::F16, 1, 7, &x).unwrap()), f16s);
    assert_eq!(decode(&encode(Format::BF16, 7, 1, &x).unwrap()), bf16s);
}
