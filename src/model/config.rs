//! What a model is: the sizes and constants of its architecture, read from `config.json` or from GGUF's header.
//! Every field is checked against what the architecture and this runtime can do before any tensor is looked at.

use serde::Deserialize;

use super::gguf::{Gguf, Value};
use super::hf::HfDir;
use crate::error::{quote, Error};
use crate::ops::rope::Scaling;

/// The architectures this runtime knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arch {
    /// Llama, and what shares its layout under this name (SmolLM2, TinyLlama, ...).
    Llama,
    /// Qwen 2 and 2.5: Llama with biases on q, k and v.
    Qwen2,
    /// Qwen 3: Llama with an RMS norm over each head of q and k.
    Qwen3,
    /// BERT encoders such as MiniLM.
    Bert,
}

impl Arch {
    /// The name in `model_type` and `general.architecture`.
    pub fn name(self) -> &'static str {
        match self {
            Arch::Llama => "llama",
            Arch::Qwen2 => "qwen2",
            Arch::Qwen3 => "qwen3",
            Arch::Bert => "bert",
        }
    }

    fn from_name(name: &str) -> Option<Arch> {
        [Arch::Llama, Arch::Qwen2, Arch::Qwen3, Arch::Bert].into_iter().find(|arch| arch.name() == name)
    }
}

/// The function between the two products of the feed-forward part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// x·sigmoid(x), gating (SwiGLU).
    Silu,
    /// The exact GELU, x·Φ(x).
    Gelu,
}

/// A model's sizes and constants, all checked when it was opened.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// Architecture.
    pub arch: Arch,
    /// Transformer layers.
    pub layers: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Width of the feed-forward part.
    pub ffn: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Width of a head. `heads * head_dim` need not be `hidden`.
    pub head_dim: usize,
    /// Rows of the token embedding.
    pub vocab: usize,
    /// Positions the model was made for; for BERT also the rows of the position embedding.
    pub max_positions: usize,
    /// Rows of BERT's token type embedding; 0 for decoders.
    pub type_vocab: usize,
    /// Epsilon of the RMS norms, or of BERT's layer norms.
    pub norm_eps: f32,
    /// Base of the rotary frequencies; 0 for BERT, which has none.
    pub rope_theta: f64,
    /// Scaling of the rotary frequencies.
    pub rope_scaling: Scaling,
    /// The output head is the token embedding: there is no `lm_head.weight`, or it is to be ignored.
    pub tie_embeddings: bool,
    /// The q, k and v projections have biases.
    pub attention_bias: bool,
    /// The o projection has a bias.
    pub output_bias: bool,
    /// Activation of the feed-forward part.
    pub activation: Activation,
    /// Beginning of a sequence.
    pub bos: Option<u32>,
    /// Tokens that end a generation: of the model's config, then of `generation_config.json`, each once.
    pub eos: Vec<u32>,
    /// Padding.
    pub pad: Option<u32>,
    /// Whether a prompt begins with `bos`. `None` where the metadata is silent and the tokenizer file decides.
    pub add_bos: Option<bool>,
}

/// `config.json`, as far as it matters here. Unknown keys are skipped, null is the same as absent.
#[derive(Deserialize)]
struct Json {
    model_type: Option<String>,
    num_hidden_layers: Option<usize>,
    hidden_size: Option<usize>,
    intermediate_size: Option<usize>,
    num_attention_heads: Option<usize>,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    vocab_size: Option<usize>,
    type_vocab_size: Option<usize>,
    max_position_embeddings: Option<usize>,
    rms_norm_eps: Option<f64>,
    layer_norm_eps: Option<f64>,
    rope_theta: Option<f64>,
    rope_scaling: Option<JsonRope>,
    rope_parameters: Option<JsonRope>,
    partial_rotary_factor: Option<f64>,
    tie_word_embeddings: Option<bool>,
    attention_bias: Option<bool>,
    mlp_bias: Option<bool>,
    hidden_act: Option<String>,
    position_embedding_type: Option<String>,
    is_decoder: Option<bool>,
    use_sliding_window: Option<bool>,
    layer_types: Option<Vec<String>>,
    quantization_config: Option<JsonQuantization>,
    bos_token_id: Option<Ids>,
    eos_token_id: Option<Ids>,
    pad_token_id: Option<Ids>,
}

/// Newer files keep theta here too, under `rope_parameters`; older ones call the type `type`.
#[derive(Deserialize)]
struct JsonRope {
    rope_type: Option<String>,
    r#type: Option<String>,
    rope_theta: Option<f64>,
    partial_rotary_factor: Option<f64>,
    factor: Option<f64>,
    low_freq_factor: Option<f64>,
    high_freq_factor: Option<f64>,
    original_max_position_embeddings: Option<usize>,
}

#[derive(Deserialize)]
struct JsonQuantization {
    quant_method: Option<String>,
    load_in_8bit: Option<bool>,
}

/// `generation_config.json`.
#[derive(Deserialize)]
struct JsonGeneration {
    bos_token_id: Option<Ids>,
    eos_token_id: Option<Ids>,
    pad_token_id: Option<Ids>,
}

/// `tokenizer_config.json`.
#[derive(Deserialize)]
struct JsonTokenizer {
    add_bos_token: Option<bool>,
}

/// One token id or a list of them. A negative id stands for none.
#[derive(Clone, Deserialize)]
#[serde(untagged)]
enum Ids {
    One(i64),
    Many(Vec<i64>),
}

impl Ids {
    /// The ids that stand for something, each once.
    fn list(sources: [Option<Ids>; 2]) -> Result<Vec<u32>, String> {
        let mut list = Vec::new();
        for id in sources.into_iter().flatten().flat_map(|ids| match ids {
            Ids::One(id) => vec![id],
            Ids::Many(ids) => ids,
        }) {
            let Some(id) = (id >= 0).then(|| u32::try_from(id)) else { continue };
            let id = id.map_err(|_| "a token id is beyond u32".to_string())?;
            if !list.contains(&id) {
                list.push(id);
            }
        }
        if list.len() > MAX_EOS {
            return Err(format!("lists {} special token ids; {MAX_EOS} are read", list.len()));
        }
        Ok(list)
    }
}

/// More end-of-sequence ids than any model has.
const MAX_EOS: usize = 64;

impl Config {
    /// The config of a Hugging Face directory, checked. Errors name the file and the field.
    pub(crate) fn from_hf(dir: &HfDir) -> Result<Config, Error> {
        let path = dir.path.join("config.json");
        let json: Json = dir.json("config.json")?.ok_or_else(|| Error::file(&dir.path, "holds no config.json"))?;
        let generation: Option<JsonGeneration> = dir.json("generation_config.json")?;
        let tokenizer: Option<JsonTokenizer> = dir.json("tokenizer_config.json")?;
        let mut config = Config::from_json(json, generation).map_err(|what| Error::file(&path, what))?;
        config.add_bos = tokenizer.and_then(|tokenizer| tokenizer.add_bos_token);
        config.check().map_err(|what| Error::file(&path, what))?;
        Ok(config)
    }

    fn from_json(json: Json, generation: Option<JsonGeneration>) -> Result<Config, String> {
        let name = json.model_type.as_deref().ok_or("has no model_type: not a model's config")?;
        let arch = Arch::from_name(name)
            .ok_or_else(|| format!("model_type {} is not supported: llama, qwen2, qwen3, bert are", quote(name)))?;
        refuse(&json)?;
        let bert = arch == Arch::Bert;

        // A missing size is 0, which `check` refuses by name. The defaults are those of the reference configs.
        let (hidden, heads) = (json.hidden_size.unwrap_or(0), json.num_attention_heads.unwrap_or(0));
        let head_dim = match json.head_dim {
            Some(head_dim) => head_dim,
            None if arch == Arch::Qwen3 => 128,
            None => quotient(hidden, heads)?,
        };
        let activation = match (json.hidden_act.as_deref(), bert) {
            (Some("silu" | "swish") | None, false) => Activation::Silu,
            (Some("gelu") | None, true) => Activation::Gelu,
            (other, _) => {
                let other = quote(other.unwrap_or("absent"));
                return Err(format!("hidden_act {other} is not supported for {}", arch.name()));
            }
        };
        let rope = json.rope_parameters.as_ref().or(json.rope_scaling.as_ref());
        let rope_theta = rope.and_then(|rope| rope.rope_theta).or(json.rope_theta).unwrap_or(10_000.0);
        let generation =
            generation.unwrap_or(JsonGeneration { bos_token_id: None, eos_token_id: None, pad_token_id: None });
        let first = |ids: [Option<Ids>; 2]| Ids::list(ids).map(|ids| ids.first().copied());
        Ok(Config {
            arch,
            layers: json.num_hidden_layers.unwrap_or(0),
            hidden,
            ffn: json.intermediate_size.unwrap_or(0),
            heads,
            kv_heads: if bert { heads } else { json.num_key_value_heads.unwrap_or(heads) },
            head_dim,
            vocab: json.vocab_size.unwrap_or(0),
            max_positions: json.max_position_embeddings.unwrap_or(0),
            type_vocab: if bert { json.type_vocab_size.unwrap_or(2) } else { 0 },
            norm_eps: match bert {
                true => json.layer_norm_eps.unwrap_or(1e-12) as f32,
                false => json.rms_norm_eps.unwrap_or(1e-6) as f32,
            },
            rope_theta: if bert { 0.0 } else { rope_theta },
            rope_scaling: if bert { Scaling::None } else { rope.map_or(Ok(Scaling::None), rope_scaling)? },
            tie_embeddings: json.tie_word_embeddings.unwrap_or(bert),
            attention_bias: json.attention_bias.unwrap_or(false) || matches!(arch, Arch::Qwen2 | Arch::Bert),
            output_bias: json.attention_bias.unwrap_or(false) && arch != Arch::Qwen2 || bert,
            activation,
            bos: first([json.bos_token_id, generation.bos_token_id])?,
            eos: Ids::list([json.eos_token_id, generation.eos_token_id])?,
            pad: first([json.pad_token_id, generation.pad_token_id])?,
            add_bos: None,
        })
    }

    /// The config in a GGUF header, checked. Errors name the file and the key.
    pub(crate) fn from_gguf(gguf: &Gguf) -> Result<Config, Error> {
        let wrong = |what: String| Error::file(&gguf.path, what);
        let prefix = gguf.str("general.architecture")?;
        let arch = Arch::from_name(prefix).filter(|&arch| arch != Arch::Bert).ok_or_else(|| {
            let what = "is not supported: llama, qwen2, qwen3 are";
            wrong(format!("general.architecture {} {what}", quote(prefix)))
        })?;
        let key = |name: &str| format!("{prefix}.{name}");
        let size = |name: &str| gguf.u32(&key(name)).map(|size| size as usize);
        let maybe = |name: &str| Ok::<_, Error>(gguf.optional(&key(name), Gguf::u32)?.map(|size| size as usize));

        for name in ["expert_count", "attention.sliding_window"] {
            if let Some(count) = maybe(name)?.filter(|&count| count > 0) {
                return Err(wrong(format!("{} is {count}, which is not supported", key(name))));
            }
        }
        let (hidden, heads) = (size("embedding_length")?, size("attention.head_count")?);
        let head_dim = match maybe("attention.key_length")? {
            Some(head_dim) => head_dim,
            None => quotient(hidden, heads).map_err(wrong)?,
        };
        for name in ["attention.value_length", "rope.dimension_count"] {
            if let Some(other) = maybe(name)?.filter(|&other| other != head_dim) {
                return Err(wrong(format!(
                    "{} is {other}; only the width of a head, {head_dim}, is supported",
                    key(name)
                )));
            }
        }
        let embedding = gguf.tensor("token_embd.weight").map(|tensor| tensor.shape[0]);
        let vocab = maybe("vocab_size")?.or(embedding).unwrap_or(0);
        if let Some(Value::Array(tokens)) = gguf.meta("tokenizer.ggml.tokens") {
            if tokens.len > vocab {
                return Err(wrong(format!("tokenizer.ggml.tokens holds {} tokens for a vocab of {vocab}", tokens.len)));
            }
        }
        let id = |name: &str| gguf.optional(&format!("tokenizer.ggml.{name}_token_id"), Gguf::u32);
        let mut eos: Vec<u32> = [id("eos")?, id("eot")?].into_iter().flatten().collect();
        eos.dedup();

        let config = Config {
            arch,
            layers: size("block_count")?,
            hidden,
            ffn: size("feed_forward_length")?,
            heads,
            kv_heads: maybe("attention.head_count_kv")?.unwrap_or(heads),
            head_dim,
            vocab,
            max_positions: size("context_length")?,
            type_vocab: 0,
            norm_eps: gguf.f32(&key("attention.layer_norm_rms_epsilon"))?,
            rope_theta: gguf.optional(&key("rope.freq_base"), Gguf::f32)?.unwrap_or(10_000.0).into(),
            rope_scaling: gguf_rope_scaling(gguf, prefix)?,
            tie_embeddings: gguf.tensor("output.weight").is_none(),
            attention_bias: gguf.tensor("blk.0.attn_q.bias").is_some(),
            output_bias: gguf.tensor("blk.0.attn_output.bias").is_some(),
            activation: Activation::Silu,
            bos: id("bos")?,
            eos,
            pad: id("padding")?,
            add_bos: gguf.optional("tokenizer.ggml.add_bos_token", Gguf::bool)?,
        };
        config.check().map_err(wrong)?;
        Ok(config)
    }

    /// Checks every field; an error names the field. Upper limits are far above any model there is, and low enough that
    /// no product of three sizes overflows 64 bits.
    fn check(&self) -> Result<(), String> {
        let bert = self.arch == Arch::Bert;
        let sizes = [
            ("layers (num_hidden_layers, block_count)", self.layers, 1 << 12),
            ("hidden (hidden_size, embedding_length)", self.hidden, 1 << 18),
            ("ffn (intermediate_size, feed_forward_length)", self.ffn, 1 << 20),
            ("heads (num_attention_heads, attention.head_count)", self.heads, 1 << 12),
            ("kv heads (num_key_value_heads, attention.head_count_kv)", self.kv_heads, 1 << 12),
            ("head_dim (head_dim, attention.key_length)", self.head_dim, 1 << 12),
            ("vocab (vocab_size)", self.vocab, 1 << 24),
            ("positions (max_position_embeddings, context_length)", self.max_positions, 1 << 26),
            ("token types (type_vocab_size)", if bert { self.type_vocab } else { 1 }, 1 << 16),
        ];
        for (name, size, max) in sizes {
            if !(1..=max).contains(&size) {
                return Err(format!("{name} is {size} or absent; it must be 1 to {max}"));
            }
        }
        if !self.heads.is_multiple_of(self.kv_heads) {
            return Err(format!("{} heads cannot share {} kv heads evenly", self.heads, self.kv_heads));
        }
        if !bert && !self.head_dim.is_multiple_of(2) {
            return Err(format!("head_dim is {}; rotary embeddings need an even one", self.head_dim));
        }
        if bert && self.heads * self.head_dim != self.hidden {
            return Err(format!("{} heads of {} do not make {}", self.heads, self.head_dim, self.hidden));
        }
        if !(self.norm_eps > 0.0 && self.norm_eps <= 0.1) {
            return Err(format!("the norms' epsilon is {}; it must be above 0 and at most 0.1", self.norm_eps));
        }
        if !bert && !(1.0..=1e12).contains(&self.rope_theta) {
            return Err(format!("rope theta is {}; it must be 1 to 1e12", self.rope_theta));
        }
        let factors = match self.rope_scaling {
            Scaling::None => [1.0, 1.0, 2.0],
            Scaling::Linear { factor } => [factor, 1.0, 2.0],
            Scaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max } => {
                if !(1..=self.max_positions).contains(&original_max) {
                    return Err(format!("rope scaling: original_max_position_embeddings is {original_max}"));
                }
                [factor, low_freq_factor, high_freq_factor]
            }
        };
        let [factor, low, high] = factors;
        if !((1.0..=1e6).contains(&factor) && 0.0 < low && low < high && high <= 1e6) {
            return Err(format!("rope scaling by {factor} between factors {low} and {high} makes no sense"));
        }
        let named = [("bos", self.bos), ("pad", self.pad)];
        let ids = named.into_iter().filter_map(|(name, id)| Some((name, id?)));
        for (name, id) in ids.chain(self.eos.iter().map(|&id| ("eos", id))) {
            if id as usize >= self.vocab {
                return Err(format!("{name} token id {id} is beyond the vocab of {}", self.vocab));
            }
        }
        Ok(())
    }
}

/// What a config may ask for that would change the results and is not implemented.
fn refuse(json: &Json) -> Result<(), String> {
    let no = |what: String| Err(format!("{what} is not supported"));
    if json.mlp_bias == Some(true) {
        return no("mlp_bias".into());
    }
    if json.is_decoder == Some(true) {
        return no("is_decoder".into());
    }
    if json.use_sliding_window == Some(true) {
        return no("use_sliding_window".into());
    }
    if let Some(other) = json.layer_types.iter().flatten().find(|kind| *kind != "full_attention") {
        return no(format!("layer type {}", quote(other)));
    }
    if let Some(other) = json.position_embedding_type.as_deref().filter(|&kind| kind != "absolute") {
        return no(format!("position_embedding_type {}", quote(other)));
    }
    let rope = json.rope_parameters.as_ref().and_then(|rope| rope.partial_rotary_factor);
    if let Some(part) = json.partial_rotary_factor.or(rope).filter(|&part| part != 1.0) {
        return no(format!("partial_rotary_factor {part}"));
    }
    if let Some(quantization) = &json.quantization_config {
        let method = quantization.quant_method.as_deref().unwrap_or("absent");
        if method != "bitsandbytes" || quantization.load_in_8bit == Some(true) {
            return no(format!("quantization_config (quant_method {}) other than bitsandbytes' 4 bits", quote(method)));
        }
    }
    Ok(())
}

/// The width of a head, where only `hidden` and `heads` are given.
fn quotient(hidden: usize, heads: usize) -> Result<usize, String> {
    match hidden.checked_rem(heads) {
        Some(0) => Ok(hidden / heads),
        Some(_) => Err(format!("hidden size {hidden} does not divide into {heads} heads, and no head_dim is given")),
        None => Err("the number of heads (num_attention_heads, attention.head_count) is 0 or absent".into()),
    }
}

fn rope_scaling(rope: &JsonRope) -> Result<Scaling, String> {
    let need = |name: &str, value: Option<f64>| {
        value.map(|value| value as f32).ok_or_else(|| format!("rope scaling has no {name}"))
    };
    match rope.rope_type.as_deref().or(rope.r#type.as_deref()).unwrap_or("default") {
        "default" => Ok(Scaling::None),
        "linear" => Ok(Scaling::Linear { factor: need("factor", rope.factor)? }),
        "llama3" => Ok(Scaling::Llama3 {
            factor: need("factor", rope.factor)?,
            low_freq_factor: need("low_freq_factor", rope.low_freq_factor)?,
            high_freq_factor: need("high_freq_factor", rope.high_freq_factor)?,
            original_max: rope.original_max_position_embeddings.unwrap_or(0),
        }),
        other => Err(format!("rope scaling {} is not supported: linear and llama3 are", quote(other))),
    }
}

/// Llama 3's scaling is not in a GGUF header: the file carries its divisors as the tensor `rope_freqs.weight`.
fn gguf_rope_scaling(gguf: &Gguf, prefix: &str) -> Result<Scaling, Error> {
    let key = format!("{prefix}.rope.scaling.type");
    match gguf.optional(&key, Gguf::str)?.unwrap_or("none") {
        "none" => Ok(Scaling::None),
        "linear" => Ok(Scaling::Linear { factor: gguf.f32(&format!("{prefix}.rope.scaling.factor"))? }),
        other => {
            let what = format!("{key} {} is not supported: linear is", quote(other));
            Err(Error::file(&gguf.path, what))
        }
    }
}
