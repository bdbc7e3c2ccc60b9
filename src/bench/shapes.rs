//! What is measured: every op of the table on the shapes that real models give it.

use crate::op::{Cost, DeviceKind, Dims, OpSpec};
use crate::ops::OPS;

/// The sizes of a decoder that its shapes follow from.
pub struct Model {
    /// As `--shapes` names it.
    pub name: &'static str,
    hidden: usize,
    heads: usize,
    kv_heads: usize,
    head: usize,
    feed_forward: usize,
    vocabulary: usize,
    layers: usize,
}

const fn model(name: &'static str, sizes: [usize; 7]) -> Model {
    let [hidden, heads, kv_heads, head, feed_forward, vocabulary, layers] = sizes;
    Model { name, hidden, heads, kv_heads, head, feed_forward, vocabulary, layers }
}

/// Hidden width, heads, key heads, width of a head, feed-forward width, vocabulary, layers, as their files say.
pub const MODELS: [Model; 4] = [
    model("smollm2-135m", [576, 9, 3, 64, 1536, 49_152, 30]),
    model("llama-3.2-1b", [2048, 32, 8, 64, 8192, 128_256, 16]),
    model("llama-3.2-3b", [3072, 24, 8, 128, 8192, 128_256, 28]),
    model("llama-3.1-8b", [4096, 32, 8, 128, 14_336, 128_256, 32]),
];

/// Tokens at once: chats' next ones, chunks of a prompt, steps of training.
pub const TOKENS: [usize; 10] = [1, 2, 4, 8, 16, 64, 256, 512, 2048, 4096];
/// Ops that [`model_shapes`] knows; of any other its last case is taken.
const OF_MODELS: [&str; 21] = [
    "qmatmul",
    "qmatmul_t",
    "lora_shrink",
    "lora_expand",
    "lora_backward",
    "lora_backward_a",
    "attention",
    "attention_stats",
    "attention_backward",
    "rmsnorm",
    "rmsnorm_backward",
    "add",
    "swiglu",
    "swiglu_backward",
    "rope",
    "rope_backward",
    "embedding",
    "cross_entropy",
    "squared_norm",
    "adamw",
    "cosine_topk",
];
/// From so many tokens on a launch may be one of training.
const TRAINED: usize = 64;
/// The head is not asked for more rows than this: prompts need their last row, losses go chunk by chunk.
const HEAD_ROWS: usize = 64;
/// Rows of a table of embeddings: what is not read costs nothing.
const TABLE_ROWS: usize = 2048;
/// Rank of adapters.
const RANK: usize = 8;
/// Rows of a corpus and their width: MiniLM's.
const CORPUS: (usize, usize) = (100_000, 384);

/// An op with the dims of a real use.
pub struct Shape {
    /// The op.
    pub spec: &'static OpSpec,
    /// Its dims.
    pub dims: Dims,
    /// Whose shape it is, such as `smollm2-135m gate, up`.
    pub of: String,
}

/// Which shapes to take.
#[derive(Clone, Debug, Default)]
pub struct Select {
    /// Models by their names in [`MODELS`]; none means those that suit the device.
    pub models: Vec<String>,
    /// Tokens at once; none means [`TOKENS`], or a few of them where `quick`.
    pub tokens: Vec<usize>,
    /// A set that takes about a minute.
    pub quick: bool,
}

impl Select {
    /// The shapes, op by op in the table's order. A card has work enough only with a large model's.
    pub fn shapes(&self, kind: DeviceKind) -> Vec<Shape> {
        let default = match (self.quick, kind) {
            (true, DeviceKind::Cpu | DeviceKind::PtxSim) => &["smollm2-135m"][..],
            (true, _) => &["llama-3.1-8b"],
            (false, DeviceKind::Cpu | DeviceKind::PtxSim) => &["smollm2-135m", "llama-3.2-1b"],
            (false, _) => &["smollm2-135m", "llama-3.2-1b", "llama-3.2-3b", "llama-3.1-8b"],
        };
        let wanted = |model: &&Model| match self.models.is_empty() {
            true => default.contains(&model.name),
            false => self.models.iter().any(|name| name == model.name),
        };
        let tokens = match (self.tokens.is_empty(), self.quick, kind) {
            (false, ..) => self.tokens.clone(),
            (true, false, _) => TOKENS.to_vec(),
            (true, true, DeviceKind::Cpu | DeviceKind::PtxSim) => vec![1, 16, 512],
            (true, true, _) => vec![1, 16, 512, 2048],
        };
        let mut shapes: Vec<Shape> = Vec::new();
        for &spec in OPS {
            for model in MODELS.iter().filter(wanted) {
                for (dims, of) in model_shapes(spec, model, &tokens, self.quick) {
                    shapes.push(Shape { spec, dims, of: format!("{} {of}", model.name) });
                }
            }
            for (dims, of) in other_shapes(spec, self.quick) {
                shapes.push(Shape { spec, dims, of });
            }
        }
        // Models may share a shape.
        let mut seen = std::collections::HashSet::new();
        shapes.retain(|shape| seen.insert((shape.spec.id(), shape.label())));
        shapes
    }
}

impl Shape {
    /// The dims that say something: not the zeros, not y's width where it is N, no seed and no scalar.
    pub fn label(&self) -> String {
        label(&self.dims)
    }

    /// Rows of activations, where the op has them.
    pub fn rows(&self) -> Option<usize> {
        self.dims.get("M").or(self.dims.get("Q"))
    }

    /// Least work and traffic.
    pub fn cost(&self) -> Cost {
        (self.spec.cost)(&self.dims)
    }
}

/// `M=16 N=1536 K=576 G=32`
pub fn label(dims: &Dims) -> String {
    let text = dims.to_string();
    let of_shape = |word: &str| !["LDY=", "SEED=", "STREAM=", "DROP="].iter().any(|name| word.starts_with(name));
    let is_dim = |word: &&str| word.chars().next().is_some_and(char::is_uppercase) && of_shape(word);
    let words = text.split(' ').filter(is_dim).filter(|word| !word.ends_with("=0"));
    words.collect::<Vec<_>>().join(" ")
}

/// The op's last case, a real model's, with other dims; those it does not have are left out.
fn changed(spec: &OpSpec, dims: &[(&str, usize)]) -> Dims {
    let last = spec.case_dims(spec.cases.last().expect("an op has cases"));
    let has: Vec<&(&str, usize)> = dims.iter().filter(|(name, _)| last.get(name).is_some()).collect();
    has.iter().fold(last, |dims, &&(name, value)| dims.with(name, value))
}

/// Matrices of a layer as (names, rows, columns); those of one shape stand together.
fn projections(model: &Model) -> Vec<(&'static str, usize, usize)> {
    let (hidden, keys, queries) = (model.hidden, model.kv_heads * model.head, model.heads * model.head);
    let mut found = vec![("k, v", keys, hidden)];
    match queries == hidden {
        true => found.push(("q, o", hidden, hidden)),
        false => found.extend([("q", queries, hidden), ("o", hidden, queries)]),
    }
    found.extend([("gate, up", model.feed_forward, hidden), ("down", hidden, model.feed_forward)]);
    found
}

fn model_shapes(spec: &OpSpec, model: &Model, tokens: &[usize], quick: bool) -> Vec<(Dims, String)> {
    let Model { hidden, heads, kv_heads, head, feed_forward, vocabulary, .. } = *model;
    let plain = |m: usize| [("M", m), ("Y0", 0), ("BIAS", 0), ("R", 0), ("ACC", 0), ("IDS", 0), ("L", 0)];
    let of = |m: usize, dims: &[(&str, usize)]| changed(spec, &[&plain(m)[..], dims].concat());
    let product = |m: usize, n: usize, k: usize| of(m, &[("N", n), ("K", k), ("LDY", n)]);
    let trained = || tokens.iter().copied().filter(|&m| m >= TRAINED);
    let all = || tokens.iter().copied();
    let layer = || match quick {
        true => projections(model).into_iter().filter(|(name, ..)| ["gate, up", "down"].contains(name)).collect(),
        false => projections(model),
    };
    let mut found: Vec<(Dims, String)> = Vec::new();
    match spec.name {
        "qmatmul" if quick && !["q4", "q8", "nf4", "bf16"].contains(&spec.format) => {}
        "qmatmul" => {
            for m in all() {
                found.extend(layer().iter().map(|&(name, n, k)| (product(m, n, k), name.to_string())));
                if m <= HEAD_ROWS && ["q8", "q4", "bf16"].contains(&spec.format) && (!quick || m == 1) {
                    found.push((product(m, vocabulary, hidden), "head".into()));
                }
            }
        }
        "qmatmul_t" if quick && !["q4", "nf4"].contains(&spec.format) => {}
        "qmatmul_t" => {
            for m in trained() {
                let with_adapter = |n: usize, k: usize| product(m, n, k).with("R", RANK);
                found.extend(layer().iter().map(|&(name, n, k)| (with_adapter(n, k), name.to_string())));
            }
        }
        "lora_shrink" | "lora_backward_a" => {
            for m in all().filter(|&m| spec.name == "lora_shrink" || m >= TRAINED) {
                for (name, k) in [("q, k, v, gate, up", hidden), ("down", feed_forward)] {
                    found.push((of(m, &[("K", k), ("R", RANK), ("T", RANK)]), format!("{name}, rank {RANK}")));
                }
            }
        }
        "lora_backward" => {
            for m in trained() {
                for (name, n) in [("o, down", hidden), ("gate, up", feed_forward)] {
                    found.push((of(m, &[("N", n), ("LDY", n), ("R", RANK)]), format!("{name}, rank {RANK}")));
                }
            }
        }
        "lora_expand" => {
            // A batch of chats, each with one of eight adapters.
            for m in all().filter(|&m| m <= TRAINED) {
                for (name, n) in [("o, down", hidden), ("gate, up", feed_forward)] {
                    let dims = [("N", n), ("LDY", n), ("R", RANK), ("T", 8 * RANK), ("L", 8)];
                    found.push((of(m, &dims), format!("{name}, 8 adapters of rank {RANK}")));
                }
            }
        }
        "attention" => {
            let sizes = [("H", heads), ("KV", kv_heads), ("D", head)];
            for c in if quick { vec![512] } else { vec![512, 4096] } {
                found.push((of(1, &[&sizes[..], &[("C", c)]].concat()), format!("one token after {c}")));
            }
            for m in trained().filter(|&m| m <= 2048) {
                found.push((of(m, &[&sizes[..], &[("C", m)]].concat()), format!("prompt of {m}")));
            }
        }
        "attention_stats" | "attention_backward" => {
            let sizes = [("H", heads), ("KV", kv_heads), ("D", head)];
            for m in trained().filter(|&m| m <= 2048) {
                found.push((of(m, &[&sizes[..], &[("C", m)]].concat()), format!("rows of {m}")));
            }
        }
        "rmsnorm" | "add" => found.extend(all().map(|m| (of(m, &[("K", hidden)]), "hidden".to_string()))),
        "rmsnorm_backward" => found.extend(trained().map(|m| (of(m, &[("K", hidden)]), "hidden".to_string()))),
        "swiglu" => found.extend(all().map(|m| (of(m, &[("F", feed_forward)]), "feed-forward".to_string()))),
        "swiglu_backward" => {
            found.extend(trained().map(|m| (of(m, &[("F", feed_forward)]), "feed-forward".to_string())));
        }
        "rope" => found.extend(all().map(|m| (of(m, &[("H", heads), ("D", head)]), "queries".to_string()))),
        "rope_backward" => {
            found.extend(trained().map(|m| (of(m, &[("H", heads), ("D", head)]), "queries".to_string())))
        }
        "embedding" if quick && spec.format != "q8" => {}
        "embedding" => {
            let rows = vocabulary.min(TABLE_ROWS);
            found.extend(
                all().map(|m| (of(m, &[("N", rows), ("N0", 0), ("K", hidden)]), format!("{rows} of its rows"))),
            );
        }
        "cross_entropy" => found.push((of(HEAD_ROWS, &[("V", vocabulary)]), "a chunk of logits".to_string())),
        "squared_norm" | "adamw" => {
            let layer: usize = [(1, heads * head), (2, kv_heads * head), (2, feed_forward)]
                .iter()
                .map(|(count, rows)| count * (hidden + rows))
                .sum();
            let numbers = model.layers * RANK * (layer + heads * head + hidden + feed_forward + hidden);
            found.push((changed(spec, &[("N", numbers), ("P", 64)]), format!("adapters of rank {RANK}")));
        }
        _ => {}
    }
    found
}

/// Shapes that are no decoder's, and for the rest the last of the op's cases.
fn other_shapes(spec: &OpSpec, quick: bool) -> Vec<(Dims, String)> {
    let (n, d) = CORPUS;
    match spec.name {
        "cosine_topk" => {
            let batches = if quick { vec![1, 64] } else { vec![1, 16, 64, 256] };
            let corpus = |q: usize| [("Q", q), ("N", n), ("D", d), ("K", 10), ("S", 32), ("BASE", 0), ("FILTER", 0)];
            batches.into_iter().map(|q| (changed(spec, &corpus(q)), format!("{n} rows of {d}"))).collect()
        }
        _ if OF_MODELS.contains(&spec.name) => Vec::new(),
        _ => {
            let case = spec.cases.last().expect("an op has cases");
            vec![(spec.case_dims(case), case.why.to_string())]
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_op_has_a_shape_and_no_shape_stands_twice() {
        let shapes = Select::default().shapes(DeviceKind::Cuda);
        for spec in OPS {
            assert!(shapes.iter().any(|shape| shape.spec.id() == spec.id()), "{}", spec.id());
        }
        let mut labels: Vec<_> = shapes.iter().map(|shape| (shape.spec.id(), shape.label())).collect();
        let all = labels.len();
        labels.sort();
        labels.dedup();
        assert_eq!(labels.len(), all);
    }

    #[test]
    fn quick_is_quick() {
        let select = Select { quick: true, ..Select::default() };
        let shapes = select.shapes(DeviceKind::Cpu);
        assert!((20..90).contains(&shapes.len()), "{}", shapes.len());
        assert!(shapes.iter().all(|shape| shape.cost().flops < 5_000_000_000), "none takes seconds");
    }

    #[test]
    fn adapters_of_rank_8_are_as_many_as_the_table_says() {
        let find = |name: &str| OPS.iter().find(|spec| spec.name == name).unwrap();
        let adamw = model_shapes(find("adamw"), &MODELS[0], &[1], true);
        assert_eq!(adamw[0].0["N"], 2_442_240, "SmolLM2-135M's, as the op's own case has it");
    }
}
