//! LoRA adapters as PEFT stores them: `adapter_config.json` and `adapter_model.safetensors`.
//!
//! ```text
//! y = x·Wᵀ + s·(x·Aᵀ)·Bᵀ        A[r,k]  B[n,r]        s = alpha/r, or alpha/sqrt(r) for rsLoRA
//!
//! base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight     A of layer 0's queries
//! base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight     B
//! ```
//!
//! Rows of B follow Hugging Face's order, which is also the order of weights on a device, whatever file they came from.
//! Fields of the config that are not known are passed over; known ones that would change the result are refused.

use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::{json, Map, Value};

use super::checkpoint::{Checkpoint, Encoding, Source, TensorView};
use super::config::{Arch, Config};
use super::hf::{HfDir, Shard};
use super::layout;
use super::linear::Lora;
use super::llama::Llama;
use super::write_gguf::{self, Plain};
use crate::aside;
use crate::error::{quote, Error};

/// The projections an adapter may touch, in the order of a layer, with the part of their names before them.
pub const TARGETS: [(&str, &str); 7] = [
    ("q_proj", "self_attn"),
    ("k_proj", "self_attn"),
    ("v_proj", "self_attn"),
    ("o_proj", "self_attn"),
    ("gate_proj", "mlp"),
    ("up_proj", "mlp"),
    ("down_proj", "mlp"),
];

const CONFIG: &str = "adapter_config.json";
const WEIGHTS: &str = "adapter_model.safetensors";
const PREFIX: &str = "base_model.model.model.layers.";
/// The largest rank that is read.
const MAX_RANK: usize = 4096;
/// The longest config that is read, in bytes.
const MAX_CONFIG: u64 = 1 << 20;

/// What an adapter is, beside its numbers.
#[derive(Clone, Debug, PartialEq)]
pub struct LoraConfig {
    /// Rank.
    pub r: usize,
    /// Strength: the low-rank term is scaled by alpha/r, for rsLoRA by alpha/sqrt(r).
    pub alpha: f64,
    /// Scaled by the root of the rank (arXiv 2312.03732).
    pub rslora: bool,
    /// Share of the adapter's inputs that training zeroes.
    pub dropout: f64,
    /// The projections it touches, words of [`TARGETS`] in their order.
    pub targets: Vec<&'static str>,
    /// The base model's name, as whoever trained it wrote it.
    pub base: Option<String>,
}

/// The two factors of one projection.
#[derive(Clone, Debug, PartialEq)]
pub struct Module {
    /// Layer.
    pub layer: usize,
    /// A word of [`TARGETS`].
    pub target: &'static str,
    /// Out features.
    pub n: usize,
    /// In features.
    pub k: usize,
    /// A, f32[r, k].
    pub a: Vec<f32>,
    /// B, f32[n, r].
    pub b: Vec<f32>,
}

/// An adapter on the host.
#[derive(Clone, Debug, PartialEq)]
pub struct Adapter {
    /// What it is.
    pub config: LoraConfig,
    /// Its modules, by layer and in the order of [`TARGETS`].
    pub modules: Vec<Module>,
    /// SHA-256 of the base model's files, where the writer told.
    pub base_sha256: Option<String>,
}

/// The fields of `adapter_config.json` that matter here.
#[derive(Deserialize)]
struct JsonConfig {
    peft_type: Option<String>,
    r: Option<usize>,
    lora_alpha: Option<f64>,
    #[serde(default)]
    use_rslora: bool,
    lora_dropout: Option<f64>,
    base_model_name_or_path: Option<String>,
    #[serde(flatten)]
    other: Map<String, Value>,
}

/// Fields that change the result in ways this runtime has no word for, unless they are null, false, empty or "none".
const REFUSED: [&str; 12] = [
    "use_dora",
    "bias",
    "lora_bias",
    "fan_in_fan_out",
    "modules_to_save",
    "rank_pattern",
    "alpha_pattern",
    "layer_replication",
    "trainable_token_indices",
    "target_parameters",
    "use_qalora",
    "use_bdlora",
];

impl LoraConfig {
    /// What the low-rank term is multiplied with.
    pub fn scale(&self) -> f32 {
        let r = self.r as f64;
        (self.alpha / if self.rslora { r.sqrt() } else { r }) as f32
    }

    fn read(path: &Path) -> Result<LoraConfig, Error> {
        let meta = std::fs::metadata(path).map_err(|cause| Error::io(path, cause))?;
        if !meta.is_file() || meta.len() > MAX_CONFIG {
            return Err(Error::file(path, format!("is no file of at most {MAX_CONFIG} bytes")));
        }
        let bytes = std::fs::read(path).map_err(|cause| Error::io(path, cause))?;
        let config: JsonConfig = serde_json::from_slice(&bytes).map_err(|error| Error::json(path, &error))?;
        let kind = config.peft_type.as_deref().unwrap_or("none");
        if kind != "LORA" {
            return Err(Error::file(path, format!("peft_type is {}; only LORA is supported", quote(kind))));
        }
        for field in REFUSED {
            let plain = match config.other.get(field) {
                None | Some(Value::Null | Value::Bool(false)) => true,
                Some(Value::String(word)) => word == "none",
                Some(Value::Array(list)) => list.is_empty(),
                Some(Value::Object(map)) => map.is_empty(),
                Some(_) => false,
            };
            if !plain {
                let value = quote(&config.other[field].to_string());
                return Err(Error::file(path, format!("{field} is {value}, which is not supported")));
            }
        }
        let Some(r) = config.r.filter(|r| (1..=MAX_RANK).contains(r)) else {
            return Err(Error::file(path, format!("r must be a rank of 1 to {MAX_RANK}")));
        };
        let alpha = config.lora_alpha.unwrap_or(8.0); // PEFT's default
        if !(alpha.is_finite() && alpha.abs() < 1e6) {
            return Err(Error::file(path, format!("lora_alpha is {alpha}; a number below 1e6 is expected")));
        }
        Ok(LoraConfig {
            r,
            alpha,
            rslora: config.use_rslora,
            dropout: config.lora_dropout.filter(|p| (0.0..1.0).contains(p)).unwrap_or(0.0),
            targets: Vec::new(),
            base: config.base_model_name_or_path,
        })
    }

    /// The config's file as PEFT writes it; `layers` where not every layer is touched.
    fn json(&self, layers: Option<Vec<usize>>) -> Value {
        let whole = |x: f64| if x.fract() == 0.0 { json!(x as i64) } else { json!(x) };
        json!({
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": self.base,
            "r": self.r,
            "lora_alpha": whole(self.alpha),
            "lora_dropout": self.dropout,
            "use_rslora": self.rslora,
            "use_dora": false,
            "target_modules": self.targets,
            "layers_to_transform": layers,
            "bias": "none",
            "fan_in_fan_out": false,
            "inference_mode": true,
            "init_lora_weights": true,
            "modules_to_save": null,
            "rank_pattern": {},
            "alpha_pattern": {},
        })
    }
}

/// Out and in features of a projection.
pub fn shape_of(config: &Config, target: &str) -> [usize; 2] {
    let Config { hidden, ffn, head_dim, heads, kv_heads, .. } = *config;
    match target {
        "q_proj" => [heads * head_dim, hidden],
        "k_proj" | "v_proj" => [kv_heads * head_dim, hidden],
        "o_proj" => [hidden, heads * head_dim],
        "down_proj" => [hidden, ffn],
        _ => [ffn, hidden],
    }
}

/// The words of [`TARGETS`] that `words` names, in their order. An error names the one that is not known.
pub fn parse_targets(words: &[&str]) -> Result<Vec<&'static str>, Error> {
    let known = || TARGETS.iter().map(|target| target.0);
    if let Some(word) = words.iter().find(|word| !known().any(|target| target == **word)) {
        let known: Vec<_> = known().collect();
        let what = format!("there is no projection {}; an adapter can touch {}", quote(word), known.join(", "));
        return Err(Error::Request(what));
    }
    Ok(known().filter(|target| words.contains(target)).collect())
}

/// The Hugging Face name of a projection's weight.
pub fn weight_name(layer: usize, target: &str) -> String {
    let part = TARGETS.iter().find(|row| row.0 == target).map_or("mlp", |row| row.1);
    format!("model.layers.{layer}.{part}.{target}.weight")
}

impl Adapter {
    /// Reads a PEFT directory. Errors name the file, the field or the tensor.
    pub fn open(dir: &Path) -> Result<Adapter, Error> {
        if dir.is_file() {
            return Err(Error::file(dir, format!("is a file; an adapter is the directory that holds its {CONFIG}")));
        }
        let mut config = LoraConfig::read(&dir.join(CONFIG))?;
        let path = dir.join(WEIGHTS);
        if !path.exists() && dir.join("adapter_model.bin").exists() {
            let what = "holds adapter_model.bin, which is not read: save it again with safe_serialization";
            return Err(Error::file(dir, what));
        }
        let shard = Shard::open(&path)?;
        // The two halves of each module, whichever comes first: layer, target, and shape and values of A and B.
        type Half = Option<(Vec<usize>, Vec<f32>)>;
        let mut halves: Vec<(usize, usize, [Half; 2])> = Vec::new();
        for stored in &shard.tensors {
            let wrong = |what: String| Error::tensor(&path, &stored.name, what);
            let (layer, target, half) = parse_name(&stored.name).ok_or_else(|| {
                let what = "is no lora_A or lora_B of a projection of a decoder's layer, and nothing else is supported";
                wrong(what.into())
            })?;
            let &[rows, columns] = &stored.shape[..] else {
                return Err(wrong(format!("has shape {:?}; a matrix is expected", stored.shape)));
            };
            let rank = if half == 0 { rows } else { columns };
            if rank != config.r {
                return Err(wrong(format!("has rank {rank}; {CONFIG} says r is {}", config.r)));
            }
            let view = TensorView {
                name: &stored.name,
                stored_name: &stored.name,
                encoding: stored.encoding,
                shape: stored.shape.clone(),
                bytes: &shard.mmap[stored.offset..stored.offset + stored.len],
                mmap: &shard.mmap,
                offset: stored.offset,
                file: &path,
                rope_permuted: false,
            };
            if !matches!(stored.encoding, Encoding::F32 | Encoding::F16 | Encoding::BF16) {
                return Err(wrong(format!("is stored as {}; F32, F16 or BF16 is expected", stored.encoding.name())));
            }
            let values = view.to_f32()?;
            if let Some(at) = values.iter().position(|value| !value.is_finite()) {
                return Err(wrong(format!("holds {} at element {at}: the adapter is broken", values[at])));
            }
            let at = halves.iter().position(|row| (row.0, row.1) == (layer, target)).unwrap_or_else(|| {
                halves.push((layer, target, [None, None]));
                halves.len() - 1
            });
            if halves[at].2[half].replace((stored.shape.clone(), values)).is_some() {
                return Err(wrong("stands for the same half as another tensor".into()));
            }
        }
        halves.sort_by_key(|row| (row.0, row.1));
        let mut modules = Vec::with_capacity(halves.len());
        for (layer, target, [a, b]) in halves {
            let target = TARGETS[target].0;
            let (Some((a_shape, a)), Some((b_shape, b))) = (a, b) else {
                let name = weight_name(layer, target);
                return Err(Error::tensor(&path, &name, "has only one of lora_A and lora_B"));
            };
            modules.push(Module { layer, target, n: b_shape[0], k: a_shape[1], a, b });
        }
        if modules.is_empty() {
            return Err(Error::file(&path, "holds no module: there is nothing to add to a model"));
        }
        config.targets = TARGETS.iter().map(|row| row.0).filter(|t| modules.iter().any(|m| m.target == *t)).collect();
        let base_sha256 = metadata(&shard).and_then(|map| Some(map.get("base_sha256")?.as_str()?.to_string()));
        Ok(Adapter { config, modules, base_sha256 })
    }

    /// Checks that the adapter was made for a decoder of these sizes. The error names the module.
    pub fn check(&self, base: &Config) -> Result<(), Error> {
        if base.arch == Arch::Bert {
            let what = "adapters of encoders are not supported: name a llama, qwen2 or qwen3 model";
            return Err(Error::Request(what.into()));
        }
        if self.modules.is_empty() {
            return Err(Error::Request("the adapter touches no module of this model".into()));
        }
        for module in &self.modules {
            let Module { layer, target, n, k, .. } = module;
            if *layer >= base.layers {
                let what =
                    format!("the adapter has a {target} of layer {layer}; this model has {} layers", base.layers);
                return Err(Error::Request(what + ": it was made for another model"));
            }
            let expected = shape_of(base, target);
            if [*n, *k] != expected {
                return Err(Error::Request(format!(
                    "the adapter's {target} of layer {layer} is for a weight of {n} x {k}; this model's is {} x {}: it \
                     was made for another model",
                    expected[0], expected[1]
                )));
            }
        }
        Ok(())
    }

    /// Refuses an adapter whose writer named another base than `base`, the model it is to run beside; one that names
    /// none is taken. Reads the model's files whole where it does.
    pub fn check_base(&self, base: &Checkpoint) -> Result<(), Error> {
        match self.base_sha256 {
            Some(_) => self.check_base_sha256(&model_sha256(base)?),
            None => Ok(()),
        }
    }

    /// The same where [`model_sha256`] of the base is known.
    pub fn check_base_sha256(&self, found: &str) -> Result<(), Error> {
        let Some(expected) = self.base_sha256.as_ref().filter(|expected| *expected != found) else { return Ok(()) };
        let first = |hash: &str| hash.chars().take(12).collect::<String>();
        Err(Error::Request(format!(
            "the adapter was trained over another base{}: the SHA-256 of that began with {}, this model's with {}; name \
             that model, or give --any-base where this one has the same weights in another form",
            self.config.base.as_ref().map_or(String::new(), |base| format!(", {}", quote(base))),
            quote(&first(expected)),
            first(found)
        )))
    }

    /// Numbers that training changes.
    pub fn parameters(&self) -> usize {
        self.modules.iter().map(|module| module.a.len() + module.b.len()).sum()
    }

    /// Layers that are touched, where not all below `layers` are.
    fn layers(&self) -> Option<Vec<usize>> {
        let mut layers: Vec<usize> = self.modules.iter().map(|module| module.layer).collect();
        layers.dedup();
        (layers.last().is_some_and(|last| last + 1 != layers.len())).then_some(layers)
    }

    /// The two files of a PEFT directory: their names and bytes. The same adapter gives the same bytes.
    pub fn files(&self) -> [(&'static str, Vec<u8>); 2] {
        let mut tensors = Vec::with_capacity(2 * self.modules.len());
        for Module { layer, target, n, k, a, b } in &self.modules {
            let name = weight_name(*layer, target);
            let stem = format!("base_model.model.{}", name.trim_end_matches(".weight"));
            tensors.push((format!("{stem}.lora_A.weight"), [self.config.r, *k], &a[..]));
            tensors.push((format!("{stem}.lora_B.weight"), [*n, self.config.r], &b[..]));
        }
        let config = format!("{:#}\n", self.config.json(self.layers()));
        let mut about = json!({ "format": "pt" });
        if let Some(hash) = &self.base_sha256 {
            about["base_sha256"] = hash.as_str().into();
        }
        [(WEIGHTS, safetensors(about, &tensors)), (CONFIG, config.into_bytes())]
    }

    /// Writes the PEFT directory `dir`, which is made where it is missing; each file appears whole or not at all.
    pub fn save(&self, dir: &Path) -> Result<(), Error> {
        std::fs::create_dir_all(dir).map_err(|cause| Error::io(dir, cause))?;
        for (name, bytes) in self.files() {
            aside::write(&dir.join(name), &bytes)?;
        }
        Ok(())
    }

    /// Writes the adapter as one GGUF file for llama.cpp: `general.type` adapter, `adapter.type` lora. Its alpha is
    /// that of plain LoRA with the same scale, since GGUF has no word for rsLoRA.
    pub fn save_gguf(&self, path: &Path, base: &Config) -> Result<(), Error> {
        self.check(base)?;
        let alpha = f64::from(self.config.scale()) * self.config.r as f64;
        let mut tensors = Vec::with_capacity(2 * self.modules.len());
        for Module { layer, target, n, k, a, b } in &self.modules {
            let name = weight_name(*layer, target);
            let stored = layout::name_to_gguf(&name).unwrap_or_else(|| name.clone());
            let r = self.config.r;
            let permuted = layout::is_rope_permuted(base, &name);
            tensors.push(Plain { name: format!("{stored}.lora_a"), shape: [r, *k], values: a, head_dim: None });
            let head_dim = permuted.then_some(base.head_dim);
            tensors.push(Plain { name: format!("{stored}.lora_b"), shape: [*n, r], values: b, head_dim });
        }
        write_gguf::write_adapter(path, base.arch.name(), alpha as f32, &tensors)
    }
}

/// Layer, index in [`TARGETS`], and 0 for A or 1 for B. Names may say `.default` before `.weight`, as those of a model
/// in memory do.
fn parse_name(name: &str) -> Option<(usize, usize, usize)> {
    let (layer, rest) = name.strip_prefix(PREFIX)?.split_once('.')?;
    let rest = rest.strip_suffix(".weight")?;
    let rest = rest.strip_suffix(".default").unwrap_or(rest);
    let (module, half) = rest.rsplit_once('.')?;
    let target = TARGETS.iter().position(|(word, part)| module.strip_prefix(part) == Some(&format!(".{word}")))?;
    let half = ["lora_A", "lora_B"].iter().position(|word| *word == half)?;
    Some((layer.parse().ok()?, target, half))
}

/// What a safetensors file says of itself.
fn metadata(shard: &Shard) -> Option<Map<String, Value>> {
    let length = u64::from_le_bytes(*shard.mmap.first_chunk::<8>()?) as usize;
    let header: Value = serde_json::from_slice(shard.mmap.get(8..8 + length)?).ok()?;
    header.get("__metadata__")?.as_object().cloned()
}

/// A safetensors file of f32 tensors in this order.
fn safetensors(about: Value, tensors: &[(String, [usize; 2], &[f32])]) -> Vec<u8> {
    let mut table = Map::new();
    table.insert("__metadata__".into(), about);
    let mut begin = 0;
    for (name, shape, values) in tensors {
        let end = begin + 4 * values.len();
        table.insert(name.clone(), json!({ "dtype": "F32", "shape": shape, "data_offsets": [begin, end] }));
        begin = end;
    }
    let mut text = Value::Object(table).to_string().into_bytes();
    text.resize((8 + text.len()).next_multiple_of(64) - 8, b' ');
    let mut bytes = Vec::with_capacity(8 + text.len() + begin);
    bytes.extend((text.len() as u64).to_le_bytes());
    bytes.extend(text);
    tensors.iter().for_each(|(_, _, values)| bytes.extend_from_slice(bytemuck::cast_slice(values)));
    bytes
}

impl Llama {
    /// Puts an adapter beside the weights, in place of any other; sessions opened from now on run with it. Errors: an
    /// adapter for a model of other sizes, memory.
    pub fn attach(&mut self, adapter: &Adapter) -> Result<(), Error> {
        adapter.check(&self.config)?;
        self.detach();
        let device = self.device.clone();
        if device.caps().batch_invariant {
            // The same sums in the same order as where many adapters share a pass.
            self.lora_rank = adapter.config.r;
            return self.stack(0, adapter);
        }
        let upload = |values: &[f32]| {
            let buffer = device.alloc(4 * values.len())?;
            device.write(&buffer, 0, bytemuck::cast_slice(values))?;
            Ok::<_, Error>(buffer)
        };
        let (r, scale) = (adapter.config.r, adapter.config.scale());
        for module in &adapter.modules {
            let linear = self.layers[module.layer].projection_mut(module.target);
            let rows = linear.matrix.shards.iter().map(|shard| shard.y0 * r..(shard.y0 + shard.n) * r);
            let b = rows.map(|rows| upload(&module.b[rows])).collect::<Result<_, _>>()?;
            linear.lora = Some(Lora { r, scale, a: upload(&module.a)?, b });
        }
        self.lora_rank = r;
        Ok(())
    }

    /// Takes every adapter away.
    pub fn detach(&mut self) {
        for layer in &mut self.layers {
            for (target, _) in TARGETS {
                let linear = layer.projection_mut(target);
                (linear.lora, linear.stack) = (None, None);
            }
        }
        self.lora_rank = 0;
    }
}

/// SHA-256 of a model's files in hexadecimal: of its GGUF file, or of every file of its directory that bears on what
/// the model computes, by name. Reads them whole.
pub fn model_sha256(checkpoint: &Checkpoint) -> Result<String, Error> {
    match &checkpoint.source {
        Source::Gguf(gguf) => Ok(hex(&file_sha256(&gguf.path)?)),
        Source::Hf(HfDir { path, .. }) => {
            let beside = ["config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"];
            let mut files: Vec<PathBuf> = beside.iter().map(|name| path.join(name)).collect();
            files.retain(|file| file.is_file());
            files.extend(checkpoint.files.iter().cloned());
            let mut text = String::new();
            for file in files {
                let name = file.file_name().unwrap_or_default().to_string_lossy().into_owned();
                text += &format!("{}  {name}\n", hex(&file_sha256(&file)?));
            }
            Ok(hex(&sha256(text.as_bytes())))
        }
    }
}

/// SHA-256 of an adapter's weights file in hexadecimal.
pub fn weights_sha256(dir: &Path) -> Result<String, Error> {
    Ok(hex(&file_sha256(&dir.join(WEIGHTS))?))
}

/// SHA-256 of a file, read a piece at a time: a mapped one would count as memory of this process.
fn file_sha256(path: &Path) -> Result<[u8; 32], Error> {
    use sha2::{Digest, Sha256};
    use std::io::Read;
    let fail = |cause| Error::io(path, cause);
    let mut file = std::fs::File::open(path).map_err(fail)?;
    let (mut hasher, mut piece) = (Sha256::new(), vec![0; 1 << 20]);
    loop {
        match file.read(&mut piece).map_err(fail)? {
            0 => return Ok(hasher.finalize().into()),
            read => hasher.update(&piece[..read]),
        }
    }
}

/// SHA-256.
pub fn sha256(bytes: &[u8]) -> [u8; 32] {
    use sha2::{Digest, Sha256};
    Sha256::digest(bytes).into()
}

/// Bytes in hexadecimal.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
