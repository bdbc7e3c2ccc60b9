//! The tiny models damaged in every way a reader must notice: each case an error that names the file and the fault,
//! without a panic and without allocating what the file claims to hold.

use std::fs;
use std::path::Path;

use handmill::model::bnb4::Absmax;
use handmill::model::checkpoint::{Checkpoint, Source};
use proptest::prelude::*;
use proptest::test_runner::TestRunner;
use serde_json::{json, Value};
use tempfile::TempDir;

use crate::open_measured;
use crate::tiny_models::*;

/// What opening a file may allocate: every header entry becomes a few small heap objects, of a total below 16 times its
/// bytes, over a base of messages and directory names. Measured: up to 8 times.
fn allowed(file_bytes: usize) -> usize {
    (64 << 10) + 16 * file_bytes
}

/// Opens a damaged model, which must be refused cheaply by an error that has every one of `words`.
fn refused(case: &str, path: &Path, file_bytes: usize, words: &[&str]) {
    let (result, peak) = open_measured(path);
    let error = result.err().unwrap_or_else(|| panic!("{case}: was opened"));
    for word in words {
        assert!(error.contains(word), "{case}: the error does not say {word:?}: {error}");
    }
    assert!(error.chars().count() < 700 && !error.contains('\n'), "{case}: not one short line: {error}");
    assert!(peak <= allowed(file_bytes), "{case}: allocated {peak} bytes for a file of {file_bytes}");
}

/// Damage to the fields of a GGUF file.
#[test]
fn damaged_gguf_fields_are_refused() {
    type Damage = fn(&mut GgufFile);
    let cases: &[(&str, Damage, &[&str])] = &[
        ("version 1", |f| f.version = 1, &["version 1", "convert"]),
        ("version 4", |f| f.version = 4, &["version 4"]),
        ("big-endian", |f| f.version = 3u32.swap_bytes(), &["big-endian"]),
        ("2^60 tensors", |f| f.counts = Some((1 << 60, 3)), &["1152921504606846976 tensors"]),
        ("2^60 pairs", |f| f.counts = Some((3, 1 << 60)), &["1152921504606846976 key-value pairs"]),
        ("one tensor too many", |f| f.counts = Some((f.tensors.len() as u64 + 1, f.pairs.len() as u64)), &["tensor"]),
        ("array of 2^61 strings", |f| f.set("x", arrayv(8, 1 << 61, &[])), &["key x", "2305843009213693952"]),
        ("array of 2^63 u64", |f| f.set("x", arrayv(10, 1 << 63, &[])), &["key x"]),
        ("array of arrays", |f| f.set("x", arrayv(9, 1, &arrayv(9, 1, &[0; 12]))), &["key x", "array of arrays"]),
        ("array of nothing known", |f| f.set("x", arrayv(99, 1, &[0; 8])), &["key x", "type 99"]),
        (
            "string of 2^63 bytes",
            |f| f.set("x", value(8, &(1u64 << 63).to_le_bytes())),
            &["key x", "9223372036854775808"],
        ),
        ("string of 2^64-1 bytes", |f| f.set("x", value(8, &[255; 8])), &["key x", "18446744073709551615"]),
        ("long string in an array", |f| f.set("x", arrayv(8, 1, &[255; 8])), &["string 0 of key x"]),
        ("string that is not UTF-8", |f| f.set("x", value(8, &[1, 0, 0, 0, 0, 0, 0, 0, 0xff])), &["key x", "UTF-8"]),
        ("value type 13", |f| f.set("x", value(13, &[0; 8])), &["key x", "type 13"]),
        ("bool of 2", |f| f.set("x", value(7, &[2])), &["key x", "byte 2"]),
        ("key twice", |f| f.pairs.push(f.pairs[3].clone()), &["twice", "llama.feed_forward_length"]),
        ("terminal escapes", |f| f.set("general.architecture", strv("\u{1b}[2J\n")), &["\\u{1b}[2J\\n"]),
        ("alignment 0", |f| f.set("general.alignment", u32v(0)), &["general.alignment is 0"]),
        ("alignment 48", |f| f.set("general.alignment", u32v(48)), &["general.alignment is 48"]),
        ("alignment 2^31", |f| f.set("general.alignment", u32v(1 << 31)), &["general.alignment"]),
        ("alignment as text", |f| f.set("general.alignment", strv("32")), &["general.alignment", "integer"]),
        ("alignment other than that of the data", |f| f.set("general.alignment", u32v(4096)), &["tensor", "4096"]),
        ("part of a split", |f| f.set("split.count", u32v(3)), &["one of 3 parts"]),
        ("no dims", |f| f.row("output_norm.weight").dims.clear(), &["output_norm.weight", "0 dims"]),
        ("five dims", |f| f.row("output_norm.weight").dims = vec![2; 5], &["output_norm.weight", "5 dims"]),
        ("4096 dims", |f| f.row("output_norm.weight").dims = vec![1; 4096], &["output_norm.weight", "4096 dims"]),
        ("zero dim", |f| f.row("output_norm.weight").dims = vec![32, 0], &["output_norm.weight", "zero"]),
        ("dims overflow", |f| f.row("output_norm.weight").dims = vec![1 << 32; 3], &["output_norm.weight", "overflow"]),
        ("bytes overflow", |f| f.row("output_norm.weight").dims = vec![1 << 62], &["output_norm.weight", "overflow"]),
        ("exabytes", |f| f.row("output_norm.weight").dims = vec![1 << 58], &["output_norm.weight", "past"]),
        ("rows of 33 values", |f| f.row("blk.1.ffn_up.weight").dims[0] = 33, &["blk.1.ffn_up.weight", "33", "Q8_0"]),
        ("ggml type 4", |f| f.row("output_norm.weight").kind = 4, &["output_norm.weight", "ggml type 4,"]),
        ("ggml type 2^32-1", |f| f.row("output_norm.weight").kind = u32::MAX, &["output_norm.weight", "4294967295"]),
        ("offset at the end", |f| f.row("output_norm.weight").offset = Some(1 << 20), &["output_norm.weight", "past"]),
        ("offset overflow", |f| f.row("output_norm.weight").offset = Some(!31), &["output_norm.weight", "past"]),
        ("offset misaligned", |f| f.row("output_norm.weight").offset = Some(33), &["output_norm.weight", "33"]),
        ("overlap", |f| f.row("output_norm.weight").offset = Some(0), &["overlap", "token_embd.weight"]),
        ("tensor twice", |f| f.tensors.push(f.tensors[2].clone()), &["blk.0.attn_q.weight", "twice"]),
        (
            "same weight twice",
            |f| f.tensors[2].tensor.0 = "model.norm.weight".into(),
            &["output_norm.weight", "same weight"],
        ),
        (
            "unknown tensor",
            |f| f.tensors[2].tensor.0 = "blk.0.attn_p.weight".into(),
            &["self_attn.q_proj.weight", "missing"],
        ),
        ("tensor without a name", |f| f.tensors[2].tensor.0.clear(), &["0 bytes"]),
        ("name of 5000 bytes", |f| f.tensors[2].tensor.0 = "a".repeat(5000), &["5000 bytes"]),
        (
            "a bias in one layer",
            |f| {
                f.tensors
                    .extend(gguf_file("qwen2", false).tensors.into_iter().filter(|r| r.tensor.0 == "blk.1.attn_q.bias"))
            },
            &["blk.1.attn_q.bias", "no part"],
        ),
        ("a layer more than said", |f| f.set("llama.block_count", u32v(1)), &["blk.1.", "no part"]),
        ("a layer less than said", |f| f.set("llama.block_count", u32v(3)), &["model.layers.2.", "missing"]),
        ("no layers", |f| f.set("llama.block_count", u32v(0)), &["layers", "is 0"]),
        ("2^32-1 layers", |f| f.set("llama.block_count", u32v(u32::MAX)), &["layers", "4294967295"]),
        ("layers as text", |f| f.set("llama.block_count", strv("2")), &["llama.block_count", "integer"]),
        (
            "another width",
            |f| f.set("llama.feed_forward_length", u32v(96)),
            &["ffn_gate.weight", "[64, 32]", "[96, 32]"],
        ),
        ("bert in GGUF", |f| f.set("general.architecture", strv("bert")), &["bert", "qwen3"]),
        ("unknown architecture", |f| f.set("general.architecture", strv("mamba")), &["mamba", "not supported"]),
        ("no architecture", |f| f.pairs.retain(|p| p.0 != "general.architecture"), &["general.architecture"]),
        ("experts", |f| f.set("llama.expert_count", u32v(8)), &["llama.expert_count is 8"]),
        ("3 kv heads", |f| f.set("llama.attention.head_count_kv", u32v(3)), &["4 heads", "3 kv heads"]),
        ("no heads", |f| f.set("llama.attention.head_count", u32v(0)), &["heads", "0"]),
        ("5 heads", |f| f.set("llama.attention.head_count", u32v(5)), &["32", "5 heads"]),
        ("odd heads", |f| f.set("llama.attention.key_length", u32v(7)), &["head_dim is 7", "even"]),
        ("half-rotary", |f| f.set("llama.rope.dimension_count", u32v(4)), &["llama.rope.dimension_count is 4"]),
        ("epsilon NaN", |f| f.set("llama.attention.layer_norm_rms_epsilon", f32v(f32::NAN)), &["epsilon", "NaN"]),
        ("theta 0", |f| f.set("llama.rope.freq_base", f32v(0.0)), &["theta is 0"]),
        ("theta infinite", |f| f.set("llama.rope.freq_base", f32v(f32::INFINITY)), &["theta is inf"]),
        ("yarn", |f| f.set("llama.rope.scaling.type", strv("yarn")), &["yarn", "not supported"]),
        (
            "scaling without factor",
            |f| f.set("llama.rope.scaling.type", strv("linear")),
            &["llama.rope.scaling.factor"],
        ),
        ("eos beyond the vocab", |f| f.set("tokenizer.ggml.eos_token_id", u32v(6)), &["eos token id 6", "vocab of 6"]),
        ("vocab of 5", |f| f.set("llama.vocab_size", u32v(5)), &["6 tokens", "vocab of 5"]),
        ("vocab of 7", |f| f.set("llama.vocab_size", u32v(7)), &["token_embd.weight", "[7, 32]"]),
        ("norm in blocks", |f| (f.row("output_norm.weight").kind, f.version) = (8, 2), &["output_norm.weight", "Q8_0"]),
        ("norm in I32", |f| f.row("output_norm.weight").kind = 26, &["output_norm.weight", "I32"]),
    ];
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("damaged.gguf");
    for (case, damage, words) in cases {
        let mut file = gguf_file("llama", true);
        damage(&mut file);
        let bytes = file.bytes();
        write(&path, &bytes);
        refused(case, &path, bytes.len(), &[words, &["damaged.gguf"][..]].concat());
    }
}

/// Where the first tensor's number of dims stands in a tiny file.
fn dims_at(bytes: &[u8]) -> usize {
    let name = b"token_embd.weight";
    bytes.windows(name.len()).position(|window| window == name).unwrap() + name.len()
}

/// A GGUF file cut anywhere is refused, and so are things that are no GGUF file at all.
#[test]
fn cut_and_foreign_files_are_refused() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("m.gguf");
    let whole = gguf_file("qwen3", true).bytes();
    // The padding behind the last tensor belongs to no one: 32 F32 fill their 128 bytes, so here there is none.
    write(&path, &whole);
    let file = fs::File::options().write(true).open(&path).unwrap();
    for length in (0..whole.len()).rev().filter(|&n| n < 4096 || n % 61 == 0 || n + 1 == whole.len()) {
        file.set_len(length as u64).unwrap();
        refused(&format!("{length} bytes"), &path, length, &["m.gguf"]);
    }
    let weights = safetensors(&decoder("llama", "BF16", false, false), |header| header);
    for (case, bytes, word) in [
        ("safetensors", &weights[..], "not a GGUF file"),
        ("zip", b"PK\x03\x04", "not a GGUF file"),
        ("reversed magic", b"FUGG\0\0\0\x03", "not a GGUF file"),
        ("zeros", &[0; 4096], "not a GGUF file"),
        ("empty", &[], "is empty"),
    ] {
        write(&path, bytes);
        refused(case, &path, bytes.len(), &[word, "m.gguf"]);
    }
    for (case, at, patch, word) in [
        ("key of 2^63 bytes", 24, &(1u64 << 63).to_le_bytes()[..], "pair 0"),
        ("key of 2^64-1 bytes", 24, &[255; 8], "pair 0"),
        ("key that is not UTF-8", 32, &[0xff], "UTF-8"),
        ("2^32-1 dims", dims_at(&whole), &[255; 4], "4294967295 dims"),
        ("a tensor's name that is not UTF-8", dims_at(&whole) - 1, &[0xc3], "UTF-8"),
    ] {
        let mut bytes = whole.clone();
        bytes[at..at + patch.len()].copy_from_slice(patch);
        write(&path, &bytes);
        refused(case, &path, bytes.len(), &[word, "m.gguf"]);
    }
    refused("no such file", &dir.path().join("none.gguf"), 0, &["none.gguf"]);
    write(&dir.path().join("lone.safetensors"), &weights);
    refused("lone weights", &dir.path().join("lone.safetensors"), 0, &["lone.safetensors", "directory"]);
    #[cfg(unix)]
    refused("a device", Path::new("/dev/zero"), 0, &["/dev/zero", "regular"]);
}

/// Damage to the header and the length of a safetensors file.
#[test]
fn damaged_safetensors_are_refused() {
    let tensors = || decoder("llama", "BF16", false, false);
    let whole = |change: fn(String) -> String| safetensors(&tensors(), change);
    let edit = |from: &str, to: &str| {
        safetensors(&tensors(), |header| {
            assert!(header.contains(from), "no {from} in {header}");
            header.replacen(from, to, 1)
        })
    };
    let length = |n: u64| [&n.to_le_bytes()[..], &whole(|h| h)[8..]].concat();
    let name = "model.embed_tokens.weight";
    let cases: &[(&str, Vec<u8>, &[&str])] = &[
        ("empty", vec![], &["empty"]),
        ("7 bytes", vec![0; 7], &["7 bytes"]),
        ("header of 0 bytes", vec![0; 8], &["line 1"]),
        ("header longer than the file", length(1 << 20), &["1048576", "truncated"]),
        ("header of 2^64-1", length(u64::MAX), &["18446744073709551615"]),
        ("header a byte short", length(whole(|h| h).len() as u64 / 99), &["line 1"]),
        ("one byte more", [whole(|h| h), vec![0]].concat(), &["followed by others"]),
        ("not JSON", edit(":", ";"), &["line 1 column"]),
        ("not UTF-8", whole(|h| h).iter().map(|&b| if b == b'w' { 0xff } else { b }).collect(), &["line 1 column"]),
        ("an array", whole(|_| "[]".into()), &["object of tensors"]),
        ("100,000 brackets", whole(|_| "[".repeat(100_000)), &["line 1"]),
        ("deep shape", edit("[6,32]", &"[".repeat(100_000)), &[name, "usize"]),
        (
            "twice",
            whole(|h| {
                let a = r#""a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"#;
                h.replacen('{', &format!("{{{a}{a}"), 1)
            }),
            &["tensor a", "twice"],
        ),
        ("unknown dtype", edit("BF16", "Q4_1"), &[name, "Q4_1"]),
        ("F8", edit(r#""BF16""#, r#""F8_E4M3""#), &[name, "F8_E4M3", "not supported"]),
        ("no shape", edit("shape", "form"), &[name, "shape"]),
        ("negative dim", edit("[6,32]", "[-6,32]"), &[name, "-6"]),
        ("fractional dim", edit("[6,32]", "[6.5,32]"), &[name, "6.5"]),
        ("dims overflow", edit("[6,32]", "[9007199254740992,4096]"), &[name, "overflow"]),
        ("bytes overflow", edit("[6,32]", "[9223372036854775808]"), &[name, "overflow"]),
        ("other shape", edit("[6,32]", "[6,33]"), &[name, "[6, 33]", "396 bytes, not 384"]),
        ("another width", edit("[6,32]", "[32,6]"), &[name, "[32, 6]", "[6, 32]"]),
        ("past the end", edit("[0,384]", "[0,38400000]"), &[name, "38400000"]),
        ("backwards", edit("[0,384]", "[384,0]"), &[name, "384 to 0"]),
        ("offset 2^64-1", edit("[0,384]", "[18446744073709551615,384]"), &[name]),
        ("overlap", edit("[384,512]", "[0,128]"), &[name, "shared"]),
        ("renamed", edit("model.norm.weight", "model.morn.weight"), &["model.norm.weight", "missing"]),
        ("stored as U8", edit(r#"BF16","shape":[6,32]"#, r#"U8","shape":[6,64]"#), &[name, "U8"]),
        ("stored as I16", edit("BF16", "I16"), &[name, "I16"]),
    ];
    let dir = TempDir::new().unwrap();
    for (case, bytes, words) in cases {
        write_single(dir.path(), &hf_config("llama"), bytes);
        refused(case, dir.path(), bytes.len(), &[words, &["model"][..]].concat());
    }
    let bytes = whole(|h| h);
    write_single(dir.path(), &hf_config("llama"), &bytes);
    let file = fs::File::options().write(true).open(dir.path().join("model.safetensors")).unwrap();
    for cut in (0..bytes.len()).rev().filter(|&n| n < 4096 || n % 61 == 0 || n + 1 == bytes.len()) {
        file.set_len(cut as u64).unwrap();
        refused(&format!("{cut} bytes"), dir.path(), cut, &["model.safetensors"]);
    }
}

/// Damage to `config.json` and its neighbours.
#[test]
fn damaged_configs_are_refused() {
    type Damage = fn(&mut Value);
    let cases: &[(&str, Damage, &[&str])] = &[
        ("no model_type", |c| c["model_type"] = json!(null), &["model_type"]),
        ("unknown model", |c| c["model_type"] = json!("mixtral"), &["mixtral", "qwen2"]),
        ("no layers", |c| c["num_hidden_layers"] = json!(null), &["num_hidden_layers", "absent"]),
        ("negative layers", |c| c["num_hidden_layers"] = json!(-1), &["-1"]),
        ("3 layers", |c| c["num_hidden_layers"] = json!(3), &["model.layers.2.input_layernorm.weight", "missing"]),
        ("2^63 wide", |c| c["hidden_size"] = json!(1u64 << 63), &["hidden_size", "9223372036854775808"]),
        ("text for a number", |c| c["vocab_size"] = json!("6"), &["line 1 column", "\\\"6\\\""]),
        ("null heads", |c| c["num_attention_heads"] = json!(0), &["heads", "is 0"]),
        ("3 kv heads", |c| c["num_key_value_heads"] = json!(3), &["4 heads", "3 kv heads"]),
        ("other kv heads", |c| c["num_key_value_heads"] = json!(1), &["k_proj.weight", "[16, 32]", "[8, 32]"]),
        ("head_dim 0", |c| c["head_dim"] = json!(0), &["head_dim", "is 0"]),
        ("tanh", |c| c["hidden_act"] = json!("gelu_pytorch_tanh"), &["hidden_act gelu_pytorch_tanh"]),
        ("epsilon 0", |c| c["rms_norm_eps"] = json!(0.0), &["epsilon is 0"]),
        ("theta 0", |c| c["rope_theta"] = json!(0), &["theta is 0"]),
        ("yarn", |c| c["rope_scaling"] = json!({"type": "yarn", "factor": 4.0}), &["yarn", "not supported"]),
        ("dynamic", |c| c["rope_scaling"] = json!({"rope_type": "dynamic", "factor": 4.0}), &["dynamic"]),
        ("linear by nothing", |c| c["rope_scaling"] = json!({"type": "linear"}), &["no factor"]),
        ("linear by 0", |c| c["rope_scaling"] = json!({"type": "linear", "factor": 0.0}), &["scaling by 0"]),
        (
            "llama3 without limits",
            |c| c["rope_scaling"] = json!({"type": "llama3", "factor": 8.0}),
            &["low_freq_factor"],
        ),
        ("experts' biases", |c| c["mlp_bias"] = json!(true), &["mlp_bias"]),
        ("biases", |c| c["attention_bias"] = json!(true), &["q_proj.bias", "missing"]),
        ("sliding window", |c| c["use_sliding_window"] = json!(true), &["use_sliding_window"]),
        ("layer types", |c| c["layer_types"] = json!(["full_attention", "mamba"]), &["layer type mamba"]),
        ("gptq", |c| c["quantization_config"] = json!({"quant_method": "gptq"}), &["gptq"]),
        (
            "8 bits",
            |c| c["quantization_config"] = json!({"quant_method": "bitsandbytes", "load_in_8bit": true}),
            &["4 bits"],
        ),
        ("eos beyond", |c| c["eos_token_id"] = json!([1, 6]), &["eos token id 6"]),
        ("eos 2^40", |c| c["eos_token_id"] = json!(1u64 << 40), &["u32"]),
        ("bos beyond", |c| c["bos_token_id"] = json!(99), &["bos token id 99"]),
        ("1000 eos", |c| c["eos_token_id"] = json!((0..1000).collect::<Vec<_>>()), &["1000", "64"]),
    ];
    let dir = TempDir::new().unwrap();
    let weights = safetensors(&decoder("llama", "BF16", false, false), |header| header);
    for (case, damage, words) in cases {
        let mut config = hf_config("llama");
        damage(&mut config);
        write_single(dir.path(), &config, &weights);
        refused(case, dir.path(), weights.len(), words);
    }
    let deep = format!("{{\"x\": {}", "[".repeat(100_000));
    for (file, bytes, words) in [
        ("config.json", "", ["config.json", "empty"]),
        ("config.json", "{\"model_type\": \"llama\"", ["config.json", "line 1 column"]),
        ("config.json", "{\"vocab_size\": 1, \"vocab_size\": 2}", ["config.json", "duplicate field"]),
        ("config.json", &deep, ["config.json", "line 1 column"]),
        ("generation_config.json", "[]", ["generation_config.json", "line 1"]),
        ("tokenizer_config.json", "{\"add_bos_token\": 3}", ["tokenizer_config.json", "3"]),
    ] {
        let dir = TempDir::new().unwrap();
        write_single(dir.path(), &hf_config("llama"), &weights);
        write(&dir.path().join(file), bytes);
        refused(file, dir.path(), weights.len() + bytes.len(), &words);
    }
}

/// Directories that lack files, and indices that name what they must not.
#[test]
fn damaged_directories_are_refused() {
    type Damage = fn(&Path);
    const INDEX: &str = "model.safetensors.index.json";
    /// The index, with `from` replaced once.
    fn index(dir: &Path, from: &str, to: &str) {
        let text = fs::read_to_string(dir.join(INDEX)).unwrap();
        assert!(text.contains(from));
        write(&dir.join(INDEX), text.replacen(from, to, 1));
    }
    fn point(dir: &Path, to: &str) {
        index(dir, SHARDS[0], to);
    }
    let cases: &[(&str, Damage, &[&str])] = &[
        ("no config", |d| fs::remove_file(d.join("config.json")).unwrap(), &["no config.json"]),
        ("no index", |d| fs::remove_file(d.join(INDEX)).unwrap(), &[INDEX, "neither"]),
        ("no shard", |d| fs::remove_file(d.join(SHARDS[1])).unwrap(), &[SHARDS[1]]),
        ("empty index", |d| write(&d.join(INDEX), "{}"), &[INDEX, "weight_map"]),
        ("nothing in the index", |d| write(&d.join(INDEX), r#"{"weight_map": {}}"#), &["embed_tokens", "missing"]),
        ("parent", |d| point(d, "../x.safetensors"), &[INDEX, "model.embed_tokens.weight", "../x.safetensors"]),
        ("absolute", |d| point(d, "/etc/x.safetensors"), &[INDEX, "/etc/x.safetensors"]),
        ("below", |d| point(d, "a/b.safetensors"), &[INDEX, "a/b.safetensors"]),
        ("drive", |d| point(d, "c:x.safetensors"), &[INDEX, "c:x.safetensors"]),
        ("NUL", |d| point(d, "\\u0000.safetensors"), &[INDEX, "\\0.safetensors"]),
        ("itself", |d| point(d, INDEX), &[INDEX, "not the name"]),
        ("number", |d| index(d, &format!("\"{}\"", SHARDS[0]), "3"), &[INDEX, "line 1 column"]),
        (
            "promised",
            |d| index(d, "{\"model.embed", "{\"x\": \"model-00001-of-00002.safetensors\", \"model.embed"),
            &["tensor x"],
        ),
        ("other shard", |d| point(d, SHARDS[1]), &["model.embed_tokens.weight", SHARDS[1], "does not hold"]),
        ("same shard twice", |d| write(&d.join(SHARDS[1]), fs::read(d.join(SHARDS[0])).unwrap()), &["is also in"]),
        (
            "a directory",
            |d| {
                fs::remove_file(d.join(SHARDS[0])).unwrap();
                fs::create_dir(d.join(SHARDS[0])).unwrap();
            },
            &[SHARDS[0], "regular"],
        ),
        #[cfg(unix)]
        (
            "cycle of links",
            |d| {
                for (from, to) in [(0, 1), (1, 0)] {
                    fs::remove_file(d.join(SHARDS[from])).unwrap();
                    std::os::unix::fs::symlink(SHARDS[to], d.join(SHARDS[from])).unwrap();
                }
            },
            &[SHARDS[0]],
        ),
        #[cfg(unix)]
        (
            "config that links to itself",
            |d| {
                fs::remove_file(d.join("config.json")).unwrap();
                std::os::unix::fs::symlink("config.json", d.join("config.json")).unwrap();
            },
            &["config.json"],
        ),
    ];
    for (case, damage, words) in cases {
        let dir = TempDir::new().unwrap();
        write_sharded(dir.path());
        damage(dir.path());
        refused(case, dir.path(), 64 << 10, words);
    }
    refused("an empty directory", TempDir::new().unwrap().path(), 0, &["no config.json"]);
}

/// Headers as crowded as the formats allow: the memory they take is still in proportion to the file.
#[test]
fn crowded_headers_are_read_in_proportion() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("m.gguf");
    let mut pairs = gguf_file("llama", true);
    pairs.pairs.extend((0..20_000).map(|i| (format!("{i:x}"), value(0, &[0]))));
    let mut tensors = gguf_file("llama", true);
    tensors.tensors.extend((0..20_000).map(|i| {
        let tensor = Tensor(format!("{i:x}"), "F32", vec![1]);
        Row { tensor, dims: vec![1], kind: 0, offset: None }
    }));
    let mut strings = gguf_file("llama", true);
    strings.set("x", arrayv(8, 100_000, &[0; 800_000]));
    for (file, opens) in [(pairs, true), (tensors, false), (strings, true)] {
        let bytes = file.bytes();
        write(&path, &bytes);
        let (model, peak) = open_measured(&path);
        assert!(peak <= allowed(bytes.len()), "{peak} bytes for a file of {}", bytes.len());
        assert_eq!(model.is_ok(), opens);
    }

    let weights = decoder("llama", "BF16", false, false);
    let entries: String =
        (0..20_000).map(|i| format!(r#","{i:x}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}"#)).collect();
    let many = safetensors(&weights, |header| header.replacen(r#"{"format":"pt"}"#, &format!(r#"{{}}{entries}"#), 1));
    let ones = safetensors(&weights, |header| header.replacen("[6,32]", &format!("[6,32{}]", ",1".repeat(100_000)), 1));
    let metadata =
        safetensors(&weights, |header| header.replacen(r#""pt""#, &format!("[{}0]", "0,".repeat(100_000)), 1));
    for (bytes, opens) in [(many, true), (ones, false), (metadata, true)] {
        write_single(dir.path(), &hf_config("llama"), &bytes);
        let (model, peak) = open_measured(dir.path());
        assert!(peak <= allowed(bytes.len()), "{peak} bytes for a file of {}", bytes.len());
        assert_eq!(model.err().map(|error| error.contains("100002 dims")), (!opens).then_some(true));
    }
}

/// bitsandbytes' 4 bits, plain and nested, whole and damaged.
#[test]
fn bnb4_parts_are_checked() {
    let name = "model.layers.0.mlp.gate_proj.weight";
    let dir = TempDir::new().unwrap();
    let mut config = hf_config("llama");
    config["quantization_config"] = json!({"quant_method": "bitsandbytes", "load_in_4bit": true});
    for nested in [false, true] {
        write_single(dir.path(), &config, &safetensors_of(&bnb4(nested), |header| header));
        let model = Checkpoint::open(dir.path()).unwrap();
        assert!(model.bnb4("model.layers.1.mlp.gate_proj.weight").is_none());
        let view = model.bnb4(name).unwrap().unwrap();
        assert_eq!((view.shape, view.codes.bytes.len(), view.quant_map.bytes.len()), ([64, 32], 1024, 64));
        match view.absmax {
            Absmax::Plain(absmax) => assert_eq!((nested, absmax.bytes.len()), (false, 128)),
            Absmax::Nested { codes, absmax, quant_map, offset } => {
                assert_eq!((nested, codes.bytes.len(), absmax.bytes.len(), offset), (true, 32, 4, 0.25));
                assert_eq!(quant_map.bytes.len(), 1024);
            }
        }
    }
    let state = |change: &[(&str, Value)]| {
        let mut state = json!({"quant_type": "nf4", "blocksize": 64, "shape": [64, 32], "nested_blocksize": 256,
            "nested_dtype": "float32", "nested_offset": 0.25});
        change.iter().for_each(|(key, value)| state[key] = value.clone());
        quant_state(&state)
    };
    let part = |part: &str, kind, shape: &[u64]| {
        let tensor = Tensor(format!("{name}{part}"), kind, shape.to_vec());
        let bytes = vec![0; tensor.size() as usize];
        (tensor, bytes)
    };
    let big = 1u64 << 40;
    for (changed, words) in [
        (state(&[("quant_type", json!("fp4"))]), ["quant_state", "fp4"]),
        (state(&[("blocksize", json!(128))]), ["quant_state", "blocksize is 128"]),
        (state(&[("nested_blocksize", json!(64))]), ["quant_state", "nested_blocksize is 64"]),
        (state(&[("nested_dtype", json!("float16"))]), ["quant_state", "float16"]),
        (state(&[("nested_offset", json!(null))]), ["quant_state", "nested_offset"]),
        (state(&[("nested_offset", json!(1e300))]), ["quant_state", "nested_offset"]),
        (state(&[("shape", json!([2048]))]), ["quant_state", "[2048]"]),
        (state(&[("shape", json!([big, big]))]), ["quant_state", "a matrix is expected"]),
        (state(&[("shape", json!([32, 64]))]), ["gate_proj.weight", "[32, 64]"]),
        (state(&[("shape", json!([64, 64]))]), ["gate_proj.weight", "2048 of U8"]),
        (state(&[("nested_blocksize", json!(null))]), ["weight.absmax", "32 of F32"]),
        ((quant_state(&json!(3)).0, b"3".to_vec()), ["quant_state", "JSON"]),
        (quant_state(&json!("x".repeat(5000))), ["quant_state", "4096"]),
        (part(".absmax", "U8", &[31]), ["weight.absmax", "32 of U8"]),
        (part(".nested_absmax", "F32", &[2]), ["weight.nested_absmax", "1 of F32"]),
        (part(".nested_quant_map", "F16", &[256]), ["weight.nested_quant_map", "256 of F32"]),
        (part(".quant_map", "F32", &[15]), ["weight.quant_map", "16 of F32"]),
        (part("", "U8", &[1023, 1]), ["gate_proj.weight", "1024 of U8"]),
    ] {
        let mut tensors = bnb4(true);
        let at = tensors.iter().position(|tensor| tensor.0 .0 == changed.0 .0).unwrap();
        tensors[at] = changed;
        let weights = safetensors_of(&tensors, |header| header);
        write_single(dir.path(), &config, &weights);
        refused(words[1], dir.path(), weights.len(), &words);
    }
    for missing in [".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", ".quant_state.bitsandbytes__nf4"] {
        let mut tensors = bnb4(true);
        tensors.retain(|tensor| tensor.0 .0 != format!("{name}{missing}"));
        let weights = safetensors_of(&tensors, |header| header);
        write_single(dir.path(), &config, &weights);
        let word = if missing.starts_with(".quant_state") { "stored as U8" } else { "missing" };
        refused(missing, dir.path(), weights.len(), &[name, word]);
    }
}

/// Touches everything a caller could.
fn use_all(model: &Checkpoint) {
    for name in model.names() {
        let tensor = model.tensor(name).unwrap();
        std::hint::black_box(tensor.bytes.iter().fold(0u8, |sum, byte| sum ^ byte));
        let _ = tensor.to_f32();
        let _ = model.bnb4(name).map(|view| view.is_ok());
    }
    if let Source::Gguf(gguf) = &model.source {
        for key in gguf.keys() {
            let _ = (gguf.strings(key), gguf.i32s(key), gguf.f32s(key), gguf.str(key));
            let _ = (gguf.u32(key), gguf.f32(key), gguf.bool(key));
        }
    }
}

/// Bytes overwritten at random places, and a cut: more often in the header, where the meaning is.
fn damage() -> impl Strategy<Value = (Vec<(usize, bool, u8)>, Option<usize>)> {
    (
        prop::collection::vec((any::<usize>(), any::<bool>(), any::<u8>()), 0..8),
        prop::option::weighted(0.2, any::<usize>()),
    )
}

fn damaged(mut bytes: Vec<u8>, header: usize, (flips, cut): (Vec<(usize, bool, u8)>, Option<usize>)) -> Vec<u8> {
    for (at, anywhere, byte) in flips {
        let range = if anywhere { bytes.len() } else { header };
        bytes[at % range] = byte;
    }
    bytes.truncate(cut.map_or(bytes.len(), |cut| cut % bytes.len()));
    bytes
}

/// Opens `whole` damaged in 1500 random ways at `path`, and uses what still opens.
fn survives(whole: &[u8], header: usize, path: &Path, open: &Path) {
    let config = ProptestConfig { cases: 1500, failure_persistence: None, ..ProptestConfig::default() };
    let result = TestRunner::new(config).run(&damage(), |damage| {
        let bytes = damaged(whole.to_vec(), header, damage);
        write(path, &bytes);
        let (model, peak) = open_measured(open);
        prop_assert!(peak <= allowed(bytes.len()), "{peak} bytes allocated for a file of {}", bytes.len());
        model.iter().for_each(use_all);
        Ok(())
    });
    result.unwrap_or_else(|failure| panic!("{failure}"));
}

#[test]
fn random_damage_to_gguf_never_panics() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("m.gguf");
    let whole = gguf_file("llama", true).bytes();
    survives(&whole, dims_at(&whole) + 1000, &path, &path);
}

#[test]
fn random_damage_to_safetensors_never_panics() {
    let dir = TempDir::new().unwrap();
    let whole = safetensors_of(&bnb4(true), |header| header);
    write_single(dir.path(), &hf_config("llama"), &whole);
    survives(&whole, 3000, &dir.path().join("model.safetensors"), dir.path());
}
