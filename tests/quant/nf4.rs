//! NF4 against bitsandbytes 0.50.2: its bytes, bit for bit, both ways.

use handmill::quant::{decode, decode_with_magnitude, encode, nf4, Format, Packed};
use handmill::tensor::{Dtype, HostTensor};
use safetensors::SafeTensors;

/// The committed tensors: weights f32[256,256] and what bitsandbytes made of them.
struct Fixture(Vec<u8>);

impl Fixture {
    fn open() -> Fixture {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/nf4_256.safetensors");
        Fixture(std::fs::read(path).unwrap_or_else(|error| panic!("{path}: {error}")))
    }

    fn bytes(&self, name: &str) -> Vec<u8> {
        SafeTensors::deserialize(&self.0).unwrap().tensor(name).unwrap().data().to_vec()
    }

    fn f32(&self, name: &str) -> Vec<f32> {
        self.bytes(name).chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
    }
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

#[test]
fn the_tables_are_those_of_bitsandbytes() {
    let fixture = Fixture::open();
    assert_eq!(bits(&fixture.f32("plain.code")), bits(&nf4::LEVELS));
    assert_eq!(bits(&fixture.f32("dq.code")), bits(&nf4::LEVELS));
    assert_eq!(bits(&fixture.f32("dq.state2_code")), bits(&nf4::dynamic_map()));
    let json = include_str!("../fixtures/nf4_256.json");
    let json: serde_json::Value = serde_json::from_str(json).unwrap();
    let code: Vec<f32> = json["code"].as_array().unwrap().iter().map(|v| v.as_f64().unwrap() as f32).collect();
    assert_eq!(bits(&code), bits(&nf4::LEVELS));
    assert_eq!((json["blocksize"].as_u64(), json["dq"]["state2_blocksize"].as_u64()), (Some(64), Some(256)));
}

#[test]
fn encoding_gives_the_bytes_of_bitsandbytes() {
    let fixture = Fixture::open();
    let weights = fixture.f32("W");

    let packed = encode(Format::Nf4, 256, 256, &weights).unwrap();
    assert_eq!(packed.parts[0].as_slice::<u8>(), fixture.bytes("plain.packed"));
    assert_eq!(bits(packed.parts[1].f32()), bits(&fixture.f32("plain.absmax")));

    let packed = encode(Format::Nf4Dq, 256, 256, &weights).unwrap();
    assert_eq!(packed.parts[0].as_slice::<u8>(), fixture.bytes("dq.packed"));
    assert_eq!(bits(packed.parts[4].f32()), bits(&fixture.f32("dq.offset")));
    assert_eq!(bits(packed.parts[3].f32()), bits(&fixture.f32("dq.state2_absmax")));
    assert_eq!(packed.parts[1].as_slice::<u8>(), fixture.bytes("dq.absmax"));
    assert_eq!(bits(packed.parts[2].f32()), bits(&fixture.f32("dq.state2_code")));
}

#[test]
fn decoding_gives_the_weights_of_bitsandbytes() {
    let fixture = Fixture::open();
    let u8s = |name: &str, shape: &[usize]| HostTensor::from_slice(Dtype::U8, shape, &fixture.bytes(name));
    let f32s = |name: &str, shape: &[usize]| HostTensor::from_f32(shape, &fixture.f32(name));

    let parts = vec![u8s("plain.packed", &[256, 128]), f32s("plain.absmax", &[256, 4])];
    let packed = Packed::new(Format::Nf4, 256, 256, parts).unwrap();
    assert_eq!(bits(&decode(&packed)), bits(&fixture.f32("plain.dequant")));

    let parts = vec![
        u8s("dq.packed", &[256, 128]),
        u8s("dq.absmax", &[256, 4]),
        f32s("dq.state2_code", &[256]),
        f32s("dq.state2_absmax", &[4]),
        f32s("dq.offset", &[1]),
    ];
    let packed = Packed::new(Format::Nf4Dq, 256, 256, parts).unwrap();
    assert_eq!(bits(&decode(&packed)), bits(&fixture.f32("dq.dequant")));

    // The real absmax: within two roundings of the f32 one that bitsandbytes rebuilt.
    let (values, _) = decode_with_magnitude(&packed.parts, packed.format, 256, 256);
    let rebuilt = fixture.f32("dq.absmax_rebuilt");
    let code = fixture.bytes("dq.packed");
    for (i, value) in values.iter().enumerate() {
        let level = nf4::LEVELS[(code[i / 2] >> (4 * (1 - i % 2)) & 15) as usize] as f64;
        let absmax = rebuilt[i / 64] as f64;
        let offset = packed.parts[4].f32()[0] as f64;
        let bound = level.abs() * 2f64.powi(-24) * (absmax.abs() + (absmax - offset).abs()) * 1.0001;
        assert!((value - level * absmax).abs() <= bound, "weight {i}");
    }
}

#[test]
fn ties_zeros_and_the_smallest_weights() {
    // Absmax 1, then every midpoint exactly: the lower level; and its neighbour above: the upper one.
    let mut weights = [0.0f32; 128];
    for i in 0..15 {
        let middle = (nf4::LEVELS[i] + nf4::LEVELS[i + 1]) / 2.0;
        weights[i] = middle;
        weights[15 + i] = middle.next_up();
    }
    weights[63] = 1.0;
    let packed = encode(Format::Nf4, 1, 128, &weights).unwrap();
    let y = decode(&packed);
    assert_eq!(y[..15], nf4::LEVELS[..15]);
    assert_eq!(y[15..30], nf4::LEVELS[1..]);
    // A block of zeros has absmax 0 and the code of 0, 7, everywhere.
    assert_eq!(packed.parts[0].as_slice::<u8>()[32..], [0x77; 32]);
    assert_eq!(packed.parts[1].f32()[1], 0.0);
    assert!(y[64..].iter().all(|&v| v == 0.0));

    // Blocks all alike: absmax less its mean is 0, so the 8-bit codes are 0 and decoding gives the mean back.
    let packed = encode(Format::Nf4Dq, 2, 64, &[0.75; 128]).unwrap();
    assert_eq!(packed.parts[1].as_slice::<u8>(), [0, 0]);
    assert_eq!(packed.parts[3].f32(), [0.0]);
    assert_eq!(decode(&packed), [0.75; 128]);

    // Below 1e-38 weights are divided by 1e-38 and not by absmax: small, but never beyond it.
    let tiny = f32::from_bits(7);
    let y = decode(&encode(Format::Nf4, 1, 64, &[tiny; 64]).unwrap());
    assert!(y.iter().all(|v| v.abs() <= tiny));
}
