//! Model files: tiny models of each architecture, whole here and damaged in [`damaged`], and the real models.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::fs;
use std::path::{Path, PathBuf};

use handmill::model::checkpoint::{Checkpoint, Encoding, Source};
use handmill::model::config::{Activation, Arch};
use handmill::model::gguf::Gguf;
use handmill::ops::rope::Scaling;
use serde_json::json;
use tempfile::TempDir;
use tiny_models::*;

#[path = "files/damaged.rs"]
mod damaged;
#[path = "support/tiny_models.rs"]
mod tiny_models;

/// The system's allocator, counting what each thread holds and the most it has held.
struct Counting;

thread_local! {
    static LIVE: Cell<isize> = const { Cell::new(0) };
    static PEAK: Cell<isize> = const { Cell::new(0) };
}

fn count(bytes: isize) {
    LIVE.set(LIVE.get() + bytes);
    PEAK.set(PEAK.get().max(LIVE.get()));
}

// SAFETY: every call goes to the system's allocator unchanged; the counters are plain cells that never allocate.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize);
        // SAFETY: the caller's promises are those of the system's allocator.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        count(-(layout.size() as isize));
        // SAFETY: `block` came from `alloc` above with this layout.
        unsafe { System.dealloc(block, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Opens a model and returns with it the most bytes that were allocated at once meanwhile.
fn open_measured(path: &Path) -> (Result<Checkpoint, String>, usize) {
    let before = LIVE.get();
    PEAK.set(before);
    let result = Checkpoint::open(path).map_err(|error| error.to_string());
    (result, (PEAK.get() - before) as usize)
}

/// Checks that the model holds exactly these tensors, each with its shape and its own bytes.
fn holds(model: &Checkpoint, expected: &[Tensor], stored: &[Tensor]) {
    let mut names: Vec<&str> = expected.iter().map(|tensor| tensor.0.as_str()).collect();
    names.sort_unstable();
    assert_eq!(model.names().collect::<Vec<_>>(), names);
    for (expected, stored) in expected.iter().zip(stored) {
        let view = model.tensor(&expected.0).unwrap();
        assert_eq!(view.stored_name, stored.0);
        assert_eq!(view.encoding.name(), expected.1, "{}", expected.0);
        assert_eq!(view.shape.iter().map(|&dim| dim as u64).collect::<Vec<_>>(), expected.2, "{}", expected.0);
        assert_eq!(view.bytes.len() as u64, stored.size());
        assert!(view.bytes.iter().all(|&byte| byte == stored.fill()), "{}: bytes of another tensor", expected.0);
        assert_eq!(&view.mmap[view.offset..view.offset + view.bytes.len()], view.bytes);
    }
}

/// GGUF models under Hugging Face names, and the same directory-shaped.
#[test]
fn tiny_models_open_with_names_shapes_and_bytes() {
    let dir = TempDir::new().unwrap();
    for (arch, tied, kind) in
        [("llama", true, Arch::Llama), ("qwen2", false, Arch::Qwen2), ("qwen3", true, Arch::Qwen3)]
    {
        let path = dir.path().join(format!("{arch}.gguf"));
        write(&path, gguf_file(arch, tied).bytes());
        let model = Checkpoint::open(&path).unwrap();
        holds(&model, &decoder(arch, "Q8_0", tied, false), &decoder(arch, "Q8_0", tied, true));
        let config = &model.config;
        assert_eq!((config.arch, config.tie_embeddings, config.attention_bias), (kind, tied, arch == "qwen2"));
        assert_eq!((config.layers, config.hidden, config.ffn, config.vocab), (2, 32, 64, 6));
        assert_eq!((config.heads, config.kv_heads), (4, 2));
        assert_eq!(config.head_dim, if arch == "qwen3" { 16 } else { 8 });
        assert_eq!((config.norm_eps, config.rope_theta), (1e-5, 5e5));
        assert_eq!((config.bos, &config.eos[..], config.pad, config.add_bos), (Some(0), &[1, 2][..], None, Some(true)));
        assert_eq!(model.bytes(), fs::metadata(&path).unwrap().len());
        for name in model.names() {
            let rotated = name.contains("q_proj") || name.contains("k_proj");
            assert_eq!(model.tensor(name).unwrap().rope_permuted, rotated && arch == "llama", "{arch}: {name}");
        }

        let path = dir.path().join(arch);
        fs::create_dir(&path).unwrap();
        let tensors = decoder(arch, "BF16", false, false);
        write_single(&path, &hf_config(arch), &safetensors(&tensors, |header| header));
        let model = Checkpoint::open(&path).unwrap();
        holds(&model, &tensors, &tensors);
        assert_eq!(model.config.eos, [1, 2]);
        assert!(!model.config.tie_embeddings && model.names().all(|name| !model.tensor(name).unwrap().rope_permuted));
    }
}

#[test]
fn sharded_directory_opens() {
    let dir = TempDir::new().unwrap();
    write_sharded(dir.path());
    let model = Checkpoint::open(dir.path()).unwrap();
    let tensors = decoder("llama", "BF16", false, false);
    holds(&model, &tensors, &tensors);
    assert_eq!(model.files, SHARDS.map(|file| dir.path().join(file)));
    assert_eq!(model.bytes(), model.files.iter().map(|file| fs::metadata(file).unwrap().len()).sum::<u64>());
    assert_eq!((&model.config.eos[..], model.config.pad, model.config.add_bos), (&[1, 2, 3][..], Some(5), Some(true)));
}

/// BERT as the encoder alone, and as saved with a task head by older software.
#[test]
fn bert_opens() {
    for (prefix, gain, shift) in [("", "weight", "bias"), ("bert.", "gamma", "beta")] {
        let dir = TempDir::new().unwrap();
        write_single(dir.path(), &hf_config("bert"), &safetensors(&bert(prefix, gain, shift), |header| header));
        let model = Checkpoint::open(dir.path()).unwrap();
        holds(&model, &bert("", "weight", "bias"), &bert(prefix, gain, shift));
        let config = &model.config;
        assert_eq!((config.arch, config.activation, config.type_vocab), (Arch::Bert, Activation::Gelu, 2));
        assert_eq!((config.heads, config.kv_heads, config.head_dim, config.norm_eps), (4, 4, 8, 1e-12));
    }
}

/// Rope scaling, divisors of the frequencies in a GGUF file, and the values of vectors.
#[test]
fn rope_scaling_is_read() {
    let dir = TempDir::new().unwrap();
    let weights = safetensors(&decoder("llama", "BF16", false, false), |header| header);
    let llama3 = Scaling::Llama3 { factor: 8.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original_max: 64 };
    for (key, scaling, expected, theta) in [
        ("rope_scaling", json!(null), Scaling::None, 5e5),
        ("rope_scaling", json!({"type": "linear", "factor": 2}), Scaling::Linear { factor: 2.0 }, 5e5),
        (
            "rope_scaling",
            json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64}),
            llama3,
            5e5,
        ),
        ("rope_parameters", json!({"rope_type": "default", "rope_theta": 1e6}), Scaling::None, 1e6),
    ] {
        let mut config = hf_config("llama");
        config[key] = scaling;
        write_single(dir.path(), &config, &weights);
        let config = Checkpoint::open(dir.path()).unwrap().config;
        assert_eq!((config.rope_scaling, config.rope_theta), (expected, theta));
    }

    let mut file = gguf_file("llama", true);
    let tensor = Tensor("rope_freqs.weight".into(), "F32", vec![4]);
    let fill = f32::from_le_bytes([tensor.fill(); 4]);
    file.tensors.push(Row { tensor, dims: vec![4], kind: 0, offset: None });
    file.set("llama.rope.scaling.type", strv("linear"));
    file.set("llama.rope.scaling.factor", f32v(4.0));
    let path = dir.path().join("scaled.gguf");
    write(&path, file.bytes());
    let model = Checkpoint::open(&path).unwrap();
    assert_eq!(model.tensor("model.rope_freqs").unwrap().to_f32().unwrap(), [fill; 4]);
    assert_eq!(model.config.rope_scaling, Scaling::Linear { factor: 4.0 });
}

#[test]
fn gguf_metadata_is_typed() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("m.gguf");
    let mut file = gguf_file("llama", true);
    let items = [text("a"), text("\u{0}")].concat();
    let broken = [text("fine"), [&2u64.to_le_bytes()[..], &[0xff, 0xfe]].concat()].concat();
    file.set("x.strings", arrayv(8, 2, &items));
    file.set("x.broken", arrayv(8, 2, &broken));
    file.set("x.i64", value(11, &(-1i64).to_le_bytes()));
    file.set("x.u64", value(10, &7u64.to_le_bytes()));
    file.set("x.f64", value(12, &0.25f64.to_le_bytes()));
    file.set("x.text", strv("naïve"));
    write(&path, file.bytes());
    let gguf = Gguf::open(&path).unwrap();

    assert_eq!(gguf.strings("tokenizer.ggml.tokens").unwrap(), ["<s>", "</s>", "a", "b", "é", ""]);
    assert_eq!(gguf.strings("x.strings").unwrap(), ["a", "\u{0}"]);
    assert_eq!(gguf.i32s("tokenizer.ggml.token_type").unwrap(), [3, 3, 1, 1, 1, 1]);
    assert_eq!(gguf.f32s("tokenizer.ggml.scores").unwrap(), [0.5, -1.0]);
    assert_eq!(
        (gguf.u32("x.u64").unwrap(), gguf.f32("x.f64").unwrap(), gguf.str("x.text").unwrap()),
        (7, 0.25, "naïve")
    );
    assert!(gguf.bool("tokenizer.ggml.add_bos_token").unwrap());
    assert_eq!(gguf.optional("x.absent", Gguf::u32).unwrap(), None);
    for (error, words) in [
        (gguf.strings("x.broken").unwrap_err(), ["string 1 of key x.broken", "UTF-8"]),
        (gguf.u32("x.i64").unwrap_err(), ["x.i64", "-1"]),
        (gguf.u32("x.text").unwrap_err(), ["x.text", "an integer, not a string"]),
        (gguf.strings("tokenizer.ggml.token_type").unwrap_err(), ["array of strings", "not an array of 6 i32"]),
        (gguf.str("x.absent").unwrap_err(), ["x.absent", "no key"]),
        (gguf.optional("x.text", Gguf::bool).unwrap_err(), ["x.text", "a bool"]),
    ] {
        let error = error.to_string();
        assert!(words.iter().all(|word| error.contains(word)) && error.contains("m.gguf"), "{error}");
    }
}

#[test]
fn missing_tensor_names_the_nearest() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("m.gguf");
    write(&path, gguf_file("llama", true).bytes());
    let model = Checkpoint::open(&path).unwrap();
    assert!(model.has("model.norm.weight") && !model.has("lm_head.weight"));
    let error = model.tensor("model.layers.1.self_attn.q_proj.wieght").unwrap_err().to_string();
    assert!(error.contains("m.gguf") && error.contains("nearest"), "{error}");
    assert!(error.contains("model.layers.1.self_attn.q_proj.weight"), "{error}");
}

/// A model of the folder HANDMILL_MODELS, or of its default place.
fn real_model(name: &str) -> PathBuf {
    let folder = std::env::var_os("HANDMILL_MODELS").map(PathBuf::from).unwrap_or_else(|| {
        let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
        let cache = cache.or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache")));
        cache.unwrap_or_default().join("handmill/models")
    });
    let path = folder.join(name);
    assert!(path.exists(), "{} is missing: run tools/fetch_models, or set HANDMILL_MODELS", path.display());
    path
}

/// Resident bytes of the mapping that begins where `bytes` does.
#[cfg(target_os = "linux")]
fn resident(bytes: &[u8]) -> usize {
    let maps = fs::read_to_string("/proc/self/smaps").unwrap();
    let start = format!("{:x}-", bytes.as_ptr() as usize);
    let mut lines = maps.lines().skip_while(|line| !line.starts_with(&start));
    let rss = lines.find_map(|line| line.strip_prefix("Rss:")).expect("the mapping is listed");
    rss.trim().trim_end_matches(" kB").parse::<usize>().unwrap() << 10
}

#[test]
fn smollm2_opens_without_touching_its_weights() {
    let path = real_model("smollm2/SmolLM2-135M-Instruct.Q4_1.gguf");
    let (model, peak) = open_measured(&path);
    let model = model.unwrap();
    let Source::Gguf(gguf) = &model.source else { panic!("not a GGUF source") };
    // The header ends at byte 1,785,664 of 98 million. A fault may map the large page around it: 2 MiB.
    #[cfg(target_os = "linux")]
    assert!(resident(&gguf.mmap) <= 1_785_664 + (2 << 20), "{} bytes are resident", resident(&gguf.mmap));

    assert!(peak < 512 << 10, "opening allocated {peak} bytes");

    let config = &model.config;
    assert_eq!((config.arch, config.layers, config.hidden, config.ffn), (Arch::Llama, 30, 576, 1536));
    assert_eq!((config.heads, config.kv_heads, config.head_dim), (9, 3, 64));
    assert_eq!((config.vocab, config.max_positions, config.rope_theta), (49152, 8192, 1e5));
    assert_eq!((config.norm_eps, config.rope_scaling, config.activation), (1e-5, Scaling::None, Activation::Silu));
    assert!(config.tie_embeddings && !config.attention_bias && !config.output_bias);
    assert_eq!((config.bos, &config.eos[..], config.pad, config.add_bos), (Some(1), &[2][..], Some(2), Some(false)));

    assert_eq!((model.names().count(), model.bytes()), (272, fs::metadata(&path).unwrap().len()));
    for (name, stored, encoding, shape, rope_permuted) in [
        ("model.embed_tokens.weight", "token_embd.weight", "Q8_0", &[49152, 576][..], false),
        ("model.layers.0.self_attn.k_proj.weight", "blk.0.attn_k.weight", "Q4_1", &[192, 576], true),
        ("model.layers.29.mlp.down_proj.weight", "blk.29.ffn_down.weight", "Q4_1", &[576, 1536], false),
        ("model.norm.weight", "output_norm.weight", "F32", &[576], false),
    ] {
        let view = model.tensor(name).unwrap();
        assert_eq!((view.stored_name, view.encoding.name(), &view.shape[..]), (stored, encoding, shape));
        assert_eq!(view.rope_permuted, rope_permuted);
    }
    assert_eq!(model.tensor("model.embed_tokens.weight").unwrap().encoding, Encoding::Ggml(8));
    assert_eq!(model.tensor("model.norm.weight").unwrap().offset, 1_785_664 + 96_574_464);
    let tokens = gguf.strings("tokenizer.ggml.tokens").unwrap();
    assert_eq!((tokens.len(), tokens[1], tokens[2]), (49152, "<|im_start|>", "<|im_end|>"));
    let types = gguf.i32s("tokenizer.ggml.token_type").unwrap();
    assert_eq!((types.len(), types[0], gguf.strings("tokenizer.ggml.merges").unwrap()[0]), (49152, 3, "Ġ t"));
    assert!(gguf.str("tokenizer.chat_template").unwrap().starts_with("{% for message in messages %}"));
}

#[test]
fn minilm_opens_without_touching_its_weights() {
    let path = real_model("minilm");
    let model = Checkpoint::open(&path).unwrap();
    let Source::Hf(dir) = &model.source else { panic!("not a directory") };
    #[cfg(target_os = "linux")]
    assert!(resident(&dir.shards[0].mmap) <= 2 << 20, "{} bytes are resident", resident(&dir.shards[0].mmap));

    let config = &model.config;
    assert_eq!((config.arch, config.layers, config.hidden, config.ffn), (Arch::Bert, 6, 384, 1536));
    assert_eq!((config.heads, config.kv_heads, config.head_dim), (12, 12, 32));
    assert_eq!((config.vocab, config.max_positions, config.type_vocab), (30522, 512, 2));
    assert_eq!((config.norm_eps, config.activation, config.pad), (1e-12, Activation::Gelu, Some(0)));

    // The safetensors crate's own view of every tensor.
    let theirs = safetensors_crate(&dir.shards[0].mmap);
    assert_eq!(model.names().count(), theirs.len());
    for (name, tensor) in theirs.iter() {
        let view = model.tensor(name).unwrap();
        assert_eq!((&view.shape[..], view.bytes), (tensor.shape(), tensor.data()), "{name}");
    }
}

fn safetensors_crate(bytes: &[u8]) -> ::safetensors::SafeTensors<'_> {
    ::safetensors::SafeTensors::deserialize(bytes).unwrap()
}
