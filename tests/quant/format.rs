//! Names, sizes, and matrices that must be refused.

use crate::all_formats;
use handmill::quant::{decode_with_magnitude, encode, Error, Format, Packed};
use handmill::tensor::{Dtype, HostTensor};

#[test]
fn names_parse_back() {
    for word in ["f32", "f16", "bf16", "q4", "q8", "nf4", "nf4dq"] {
        assert_eq!(Format::parse(word).unwrap().name(), word);
    }
    for format in all_formats() {
        assert_eq!(Format::parse(format.name()).unwrap().name(), format.name());
    }
    let error = Format::parse("q3").unwrap_err();
    assert!(error.to_string().contains("\"q3\"") && error.to_string().contains("nf4dq"), "{error}");
}

#[test]
fn sizes_are_those_of_the_parts() {
    // 768 rows of 2048: N*K/2 codes, and per group two f16; NF4: an f32 per 64, or a byte plus 1/256 f32 and 1 KiB.
    let (n, k) = (768, 2048);
    assert_eq!(Format::F32.bytes(n, k), Some(n * k * 4));
    assert_eq!(Format::BF16.bytes(n, k), Some(n * k * 2));
    assert_eq!(Format::Q4 { group: 32, wide: false }.bytes(n, k), Some(n * k / 2 + n * k / 32 * 4));
    assert_eq!(Format::Q4 { group: 64, wide: true }.bytes(n, k), Some(n * k / 2 + n * k / 64 * 8));
    assert_eq!(Format::Q8 { group: 32, wide: false, affine: false }.bytes(n, k), Some(n * k + n * k / 32 * 2));
    assert_eq!(Format::Q8 { group: 16, wide: true, affine: true }.bytes(n, k), Some(n * k + n * k / 16 * 8));
    assert_eq!(Format::Nf4.bytes(n, k), Some(n * k / 2 + n * k / 64 * 4));
    assert_eq!(Format::Nf4Dq.bytes(n, k), Some(n * k / 2 + n * k / 64 + n * k / 64 / 256 * 4 + 1024 + 4));

    // 3 x 128: 6 blocks, so the last (and only) run of 256 is short.
    for format in all_formats() {
        let packed = encode(format, 3, 128, &[0.5; 384]).unwrap();
        assert_eq!(Some(packed.bytes()), format.bytes(3, 128), "{format:?}");
        assert!(Packed::new(format, 3, 128, packed.parts).is_ok(), "{format:?}");
    }
}

#[test]
fn dims_a_format_cannot_hold_are_errors() {
    let q4 = |group| Format::Q4 { group, wide: false };
    let q8 = |group| Format::Q8 { group, wide: true, affine: true };
    for group in [0, 1, 8, 24, 48, usize::MAX] {
        assert!(matches!(q4(group).check(4, 96), Err(Error::Shape { .. })), "q4 group {group}");
        assert!(matches!(q8(group).check(4, 96), Err(Error::Shape { .. })), "q8 group {group}");
    }
    for (format, cols) in [(q4(32), 48), (q8(64), 96), (Format::Nf4, 96), (Format::Nf4Dq, 32), (q4(32), 31)] {
        assert!(matches!(format.check(4, cols), Err(Error::Shape { .. })), "{format:?} {cols}");
        assert!(encode(format, 4, cols, &vec![0.0; 4 * cols]).is_err());
        assert_eq!(format.bytes(4, cols), None);
    }
    for format in all_formats() {
        assert!(matches!(format.check(0, 128), Err(Error::Shape { .. })), "{format:?} without rows");
        assert!(matches!(format.check(4, 0), Err(Error::Shape { .. })), "{format:?} without columns");
        for (n, k) in [(usize::MAX, 128), (128, usize::MAX - 127), (1 << 40, 1 << 40), (1 << 31, 1 << 30)] {
            assert_eq!(format.check(n, k), Err(Error::Overflow { rows: n, cols: k }), "{format:?}");
            assert_eq!(format.bytes(n, k), None);
            assert!(encode(format, n, k, &[]).is_err());
        }
    }
}

#[test]
fn parts_that_do_not_belong_are_errors() {
    for format in all_formats() {
        let good = encode(format, 2, 256, &[0.25; 512]).unwrap().parts;
        let refused = |parts: Vec<HostTensor>, why: &str| {
            let error = Packed::new(format, 2, 256, parts).err().unwrap_or_else(|| panic!("{format:?}: {why}"));
            assert!(error.to_string().contains(format.name()) || matches!(error, Error::Length { .. }), "{error}");
        };
        refused(Vec::new(), "no parts");
        refused(good[..good.len() - 1].to_vec(), "a part missing");
        refused([good.clone(), vec![good[0].clone()]].concat(), "a part too many");
        assert!(Packed::new(format, 1, 256, good.clone()).is_err(), "{format:?}: fewer rows");
        assert!(Packed::new(format, 2, 128, good.clone()).is_err(), "{format:?}: fewer columns");
        for index in 0..good.len() {
            let mut parts = good.clone();
            parts[index].dtype = Dtype::I32;
            refused(parts, "another dtype");
            let mut parts = good.clone();
            parts[index].shape.push(1);
            refused(parts, "another rank");
            let mut parts = good.clone();
            let shape = parts[index].shape.clone();
            parts[index] = HostTensor { bytes: HostTensor::zeros(Dtype::U8, &[3]).bytes, ..parts[index].clone() };
            parts[index].shape = shape;
            refused(parts, "other bytes");
        }
    }
}

#[test]
#[should_panic(expected = "part 1 (scales) of a q4 matrix: f16[2, 4] expected, f16[2, 8] found")]
fn bare_parts_are_checked_before_they_are_read() {
    let packed = encode(Format::Q4 { group: 16, wide: false }, 2, 128, &[1.0; 256]).unwrap();
    decode_with_magnitude(&packed.parts, Format::Q4 { group: 32, wide: false }, 2, 128);
}

#[test]
fn weights_that_cannot_be_stored_are_named() {
    for format in all_formats() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut weights = vec![0.5f32; 5 * 128];
            weights[3 * 128 + 77] = bad;
            weights[4 * 128] = bad;
            let error = encode(format, 5, 128, &weights).err().unwrap();
            let Error::NotFinite { what: "weight", row: 3, col: 77, value } = error else { panic!("{error}") };
            assert_eq!(value.to_bits(), bad.to_bits(), "{format:?}");
        }
        assert_eq!(
            encode(format, 5, 128, &[0.0; 639]).err(),
            Some(Error::Length { what: "weights of the matrix", expected: 640, found: 639 })
        );
    }
    // Beyond f16 but within f32: refused where f16 is stored, held where f32 is.
    let mut weights = vec![0.5f32; 2 * 128];
    weights[128 + 70] = 1.0e8;
    for format in all_formats() {
        let f16_scales =
            matches!(format, Format::F16 | Format::Q4 { wide: false, .. } | Format::Q8 { wide: false, .. });
        match encode(format, 2, 128, &weights) {
            Err(Error::Range { row: 1, dtype: "f16", .. }) => assert!(f16_scales, "{format:?}"),
            Err(error) => panic!("{format:?}: {error}"),
            Ok(_) => assert!(!f16_scales, "{format:?}"),
        }
    }
    // A bf16 reaches as far as f32, up to rounding.
    assert!(matches!(encode(Format::BF16, 1, 1, &[f32::MAX]), Err(Error::Range { dtype: "bf16", .. })));
    // A span that overflows f32 has no step.
    let ends: Vec<f32> = (0..64).map(|i| if i % 2 == 0 { f32::MAX } else { f32::MIN }).collect();
    for format in [Format::Q4 { group: 32, wide: true }, Format::Q8 { group: 32, wide: true, affine: true }] {
        assert!(matches!(encode(format, 1, 64, &ends), Err(Error::Range { .. })), "{format:?}");
    }
}
