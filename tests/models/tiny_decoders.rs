//! Decoders of two layers and random weights, from every kind of file, against the reference in f64.

use super::reference::{decoder, Shape, Weights};
use super::tiny::{self, Blocks, LLAMA};
use super::{device, devices, worst};
use handmill::device::Device;
use handmill::model::checkpoint::Checkpoint;
use handmill::model::llama::{Llama, Want};
use handmill::model::weights::LoadOptions;
use handmill::quant::Format;
use handmill::tensor::Dtype;
use handmill::Error;
use std::path::Path;
use std::sync::Arc;

/// An f32 pass against an f64 one. Sums here have at most 1024 terms; independent roundings of 2⁻²⁴ grow as the root of
/// their number, so a product is off by 2e-6 of its terms. A pass chains a dozen products, whose errors are independent
/// too: 7e-6 of the largest value.
const TOLERANCE: f64 = 1e-5;

const IDS: [u32; 13] = [1, 99, 0, 42, 7, 7, 63, 12, 5, 88, 31, 2, 77];

fn load(path: &Path, options: &LoadOptions) -> Llama {
    load_on(device(), path, options)
}

fn load_on(device: Arc<dyn Device>, path: &Path, options: &LoadOptions) -> Llama {
    Llama::load(device, &Checkpoint::open(path).unwrap(), options).unwrap()
}

/// All logits of `ids` in one call.
fn logits(llama: &Llama, ids: &[u32]) -> Vec<f32> {
    let mut all = Vec::new();
    let mut each = |row0: usize, rows: &[f32]| {
        assert_eq!(row0 * llama.config.vocab, all.len());
        all.extend_from_slice(rows);
        Ok(())
    };
    llama.forward(&mut llama.session(ids.len()).unwrap(), ids, Want::All(&mut each)).unwrap();
    all
}

/// Holds hidden states and logits of every device against the reference; one token at a time must give the same.
fn check(path: &Path, shape: &Shape, weights: &Weights, options: &LoadOptions) {
    let reference = decoder(shape, weights, &IDS);
    for device in devices() {
        check_on(load_on(device, path, options), shape, &reference);
    }
}

fn check_on(llama: Llama, shape: &Shape, (hidden, expected): &(Vec<Vec<f64>>, Vec<f64>)) {
    let on = llama.device.id();
    let mut seen = Vec::new();
    let mut each = |layer: usize, row0: usize, rows: &[f32]| {
        assert_eq!((layer, row0), (seen.len(), 0));
        seen.push(worst(rows, &hidden[layer]));
        Ok(())
    };
    llama.forward(&mut llama.session(20).unwrap(), &IDS, Want::Hidden(&mut each)).unwrap();
    assert_eq!(seen.len(), shape.layers + 1);
    assert!(seen.iter().all(|&error| error < TOLERANCE), "{on}: hidden states are off by {seen:?}");

    let error = worst(&logits(&llama, &IDS), expected);
    assert!(error < TOLERANCE, "{on}: logits are off by {error:e}");

    // The executor takes as long for one token as for all: three show what there is to see.
    let tokens = if on == "cpu" { IDS.len() } else { 3 };
    let mut session = llama.session(20).unwrap();
    for (i, id) in IDS[..tokens].iter().enumerate() {
        let row = llama.forward(&mut session, &[*id], Want::Last).unwrap();
        let error = worst(row, &expected[i * shape.vocab..(i + 1) * shape.vocab]);
        assert!(error < TOLERANCE, "{on}, token by token: the logits of token {i} are off by {error:e}");
    }
    assert_eq!(session.len(), tokens);
}

#[test]
fn every_architecture_in_every_plain_dtype() {
    let tied = Shape { tied: true, ..LLAMA };
    let biased = Shape { bias: true, ..LLAMA };
    for shape in [LLAMA, tied, biased, tiny::qwen2(), tiny::qwen3()] {
        for dtype in [Dtype::F32, Dtype::F16, Dtype::BF16] {
            let dir = tempfile::tempdir().unwrap();
            let weights = tiny::rounded(tiny::random(&shape, 1), dtype);
            tiny::write_hf(dir.path(), &shape, &weights, dtype);
            check(dir.path(), &shape, &weights, &LoadOptions::default());
        }
    }
}

#[test]
fn every_architecture_from_gguf() {
    let biased = Shape { bias: true, ..LLAMA };
    // Blocks hold 32 columns, so that the heads' widths must add up to a multiple of it.
    let qwen2 = Shape { heads: 4, head_dim: 16, ..tiny::qwen2() };
    let qwen3 = Shape { head_dim: 24, ..tiny::qwen3() };
    for shape in [LLAMA, biased, qwen2, qwen3] {
        for blocks in [Blocks::F32, Blocks::Q8, Blocks::Q4] {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("tiny.gguf");
            let weights = tiny::write_gguf(&path, &shape, &tiny::random(&shape, 2), blocks);
            check(&path, &shape, &weights, &LoadOptions::default());
        }
    }
}

#[test]
fn stretched_positions() {
    // The same stretch as a scaling of the config and as divisors in a GGUF file.
    let shape = Shape { stretch: 3.0, ..LLAMA };
    let dir = tempfile::tempdir().unwrap();
    let mut weights = tiny::random(&shape, 10);
    tiny::write_hf(dir.path(), &shape, &weights, Dtype::F32);
    check(dir.path(), &shape, &weights, &LoadOptions::default());
    weights.insert("model.rope_freqs".into(), (vec![8], vec![3.0; 8]));
    let path = dir.path().join("tiny.gguf");
    tiny::write_gguf(&path, &shape, &weights, Blocks::F32);
    check(&path, &shape, &weights, &LoadOptions::default());
}

#[test]
fn bitsandbytes_four_bits() {
    // 9 blocks a row and 576 rows: nested blocks end inside rows.
    let shape = Shape { hidden: 576, ffn: 640, heads: 4, kv_heads: 2, head_dim: 64, ..LLAMA };
    let weights = tiny::random(&shape, 3);
    for (nested, format) in [(false, Format::Nf4), (true, Format::Nf4Dq)] {
        let dir = tempfile::tempdir().unwrap();
        tiny::write_bnb4(dir.path(), &shape, &weights, nested);
        // 256 rows a shard: 288 bytes of codes each.
        for max_binding in [None, Some(256 * 288)] {
            let options = LoadOptions { max_binding, ..LoadOptions::default() };
            let llama = load(dir.path(), &options);
            assert_eq!(llama.layers[0].q.matrix.format, format);
            assert_eq!(llama.layers[0].gate.matrix.shards.len(), if max_binding.is_some() { 3 } else { 1 });
            check(dir.path(), &shape, &tiny::through(&weights, format), &options);
        }
    }
}

#[test]
fn quantized_on_load() {
    let shape = Shape { ffn: 1024, ..LLAMA };
    let weights = tiny::random(&shape, 4);
    let formats = [
        Format::Q4 { group: 32, wide: false },
        Format::Q8 { group: 16, wide: true, affine: true },
        Format::Nf4,
        Format::Nf4Dq,
        Format::BF16,
    ];
    let dir = tempfile::tempdir().unwrap();
    tiny::write_hf(dir.path(), &shape, &weights, Dtype::F32);
    let gguf = dir.path().join("tiny.gguf");
    let held = tiny::write_gguf(&gguf, &shape, &weights, Blocks::Q8);
    for format in formats {
        // Room for 600 rows of 64 codes of 4 bits, of which nested blocks allow 512.
        for max_binding in [None, Some(600 * 32)] {
            let options = LoadOptions { quant: Some(format), max_binding, ..LoadOptions::default() };
            let llama = load(dir.path(), &options);
            assert_eq!(llama.layers[1].down.matrix.format, format);
            assert_eq!((llama.embedding.matrix.format, llama.head.matrix.format), (Format::F32, Format::F32));
            check(dir.path(), &shape, &tiny::through(&weights, format), &options);
            check(&gguf, &shape, &tiny::through(&held, format), &options);
        }
    }
}

#[test]
fn shards_change_nothing() {
    let shape = tiny::qwen2();
    let dir = tempfile::tempdir().unwrap();
    let gguf = dir.path().join("tiny.gguf");
    tiny::write_gguf(
        &gguf,
        &Shape { bias: true, ..LLAMA },
        &tiny::random(&Shape { bias: true, ..LLAMA }, 5),
        Blocks::Q4,
    );
    tiny::write_hf(dir.path(), &shape, &tiny::random(&shape, 5), Dtype::F32);
    for path in [dir.path(), &gguf] {
        let whole = load(path, &LoadOptions::default());
        let options = LoadOptions { max_binding: Some(12 * 4 * 64), ..LoadOptions::default() };
        let cut = load(path, &options);
        let shards = |llama: &Llama| {
            let Llama { layers, embedding, head, .. } = llama;
            [&layers[0].k.matrix, &layers[0].gate.matrix, &embedding.matrix, &head.matrix].map(|m| m.shards.len())
        };
        assert_eq!(shards(&whole), [1; 4]);
        assert!(shards(&cut)[1..].iter().all(|&count| count > 1), "{:?}", shards(&cut));
        // Each result is the same sum, wherever its row lies; kernels may take sums of another shape in another order.
        let expected: Vec<f64> = logits(&whole, &IDS).iter().map(|&v| v as f64).collect();
        let error = worst(&logits(&cut, &IDS), &expected);
        assert!(error < TOLERANCE, "shards change the logits by {error:e}");
    }
}

#[test]
fn prompts_longer_than_a_chunk() {
    let dir = tempfile::tempdir().unwrap();
    let shape = tiny::qwen3();
    let weights = tiny::random(&shape, 6);
    tiny::write_hf(dir.path(), &shape, &weights, Dtype::F32);
    let llama = load(dir.path(), &LoadOptions::default());
    let ids: Vec<u32> = (0..1024).map(|i| (i * i + 3 * i) as u32 % 100).collect();
    let (_, expected) = decoder(&shape, &weights, &ids);
    let error = worst(&logits(&llama, &ids), &expected);
    assert!(error < TOLERANCE, "logits are off by {error:e}");

    let mut session = llama.session(1024).unwrap();
    assert!(llama.forward(&mut session, &ids[..700], Want::None).unwrap().is_empty());
    let last = llama.forward(&mut session, &ids[700..], Want::Last).unwrap();
    let error = worst(last, &expected[1023 * 100..]);
    assert!(error < TOLERANCE, "the last logits are off by {error:e}");
}

#[test]
fn a_truncated_session_continues_another_way() {
    let dir = tempfile::tempdir().unwrap();
    let weights = tiny::random(&LLAMA, 7);
    tiny::write_hf(dir.path(), &LLAMA, &weights, Dtype::F32);
    let llama = load(dir.path(), &LoadOptions::default());
    let mut session = llama.session(8).unwrap();
    llama.forward(&mut session, &[5, 6, 7, 8, 9], Want::None).unwrap();
    session.truncate(2);
    let got = llama.forward(&mut session, &[40, 50], Want::Last).unwrap();
    let (_, expected) = decoder(&LLAMA, &weights, &[5, 6, 40, 50]);
    assert!(worst(got, &expected[300..]) < TOLERANCE);
}

#[test]
fn a_tied_head_shares_the_embedding() {
    let dir = tempfile::tempdir().unwrap();
    let shape = tiny::qwen2();
    tiny::write_hf(dir.path(), &shape, &tiny::random(&shape, 8), Dtype::F16);
    let llama = load(dir.path(), &LoadOptions::default());
    let part = |matrix: &handmill::model::linear::Matrix| matrix.shards[0].parts[0].clone();
    assert!(part(&llama.embedding.matrix).overlaps(&part(&llama.head.matrix)));
}

#[test]
fn impossible_requests_are_errors_in_words() {
    let dir = tempfile::tempdir().unwrap();
    tiny::write_hf(dir.path(), &LLAMA, &tiny::random(&LLAMA, 9), Dtype::F32);
    let llama = load(dir.path(), &LoadOptions::default());
    let text = |result: Result<&[f32], Error>| result.unwrap_err().to_string();
    for capacity in [0, 1025, usize::MAX] {
        let error = llama.session(capacity).err().unwrap().to_string();
        assert!(error.contains("takes 1 to 1024"), "{error}");
    }
    let mut session = llama.session(4).unwrap();
    let error = text(llama.forward(&mut session, &[], Want::Last));
    assert!(error.contains("no tokens"), "{error}");
    let error = text(llama.forward(&mut session, &[1, 100], Want::Last));
    assert!(error.contains("token 1 has id 100"), "{error}");
    llama.forward(&mut session, &[1, 2, 3], Want::None).unwrap();
    let error = text(llama.forward(&mut session, &[1, 2], Want::Last));
    assert!(error.contains("holds 3 of 4 tokens and 2 more"), "{error}");
    assert_eq!(session.len(), 3);

    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    let options = LoadOptions { max_binding: Some(100), ..LoadOptions::default() };
    let error = Llama::load(device(), &checkpoint, &options).err().unwrap().to_string();
    assert!(error.contains("model.embed_tokens.weight") && error.contains("binds at most 100"), "{error}");
    // 3 heads of 48 columns: nf4 needs multiples of 64.
    let narrow = Shape { hidden: 48, ..LLAMA };
    let dir = tempfile::tempdir().unwrap();
    tiny::write_hf(dir.path(), &narrow, &tiny::random(&narrow, 9), Dtype::F32);
    let options = LoadOptions { quant: Some(Format::Nf4), ..LoadOptions::default() };
    let error = Llama::load(device(), &Checkpoint::open(dir.path()).unwrap(), &options).err().unwrap().to_string();
    assert!(error.contains("q_proj") && error.contains("multiple of 64"), "{error}");
}
