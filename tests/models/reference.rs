//! Forward passes in f64, plain loops, sharing nothing with the library: what decoder and encoder are held against.

use rayon::prelude::*;
use std::collections::BTreeMap;

/// Tensors by Hugging Face name.
pub type Weights = BTreeMap<String, (Vec<usize>, Vec<f32>)>;

/// A decoder's sizes and constants.
#[derive(Clone)]
pub struct Shape {
    pub arch: &'static str,
    pub layers: usize,
    pub hidden: usize,
    pub ffn: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub vocab: usize,
    pub eps: f64,
    pub theta: f64,
    /// Positions are divided by this.
    pub stretch: f64,
    pub bias: bool,
    pub tied: bool,
}

/// y[m,n] = x[m,k]·W[n,k]ᵀ + bias.
pub fn linear(weights: &Weights, name: &str, x: &[f64]) -> Vec<f64> {
    let (shape, w) = &weights[&format!("{name}.weight")];
    let (n, k) = (shape[0], shape[1]);
    let bias = weights.get(&format!("{name}.bias"));
    let row = |x: &[f64]| -> Vec<f64> {
        let dot = |j: usize| w[j * k..(j + 1) * k].iter().zip(x).map(|(&w, x)| w as f64 * x).sum::<f64>();
        (0..n).map(|j| dot(j) + bias.map_or(0.0, |bias| bias.1[j] as f64)).collect()
    };
    x.par_chunks(k).flat_map_iter(row).collect()
}

fn gather(weights: &Weights, name: &str, ids: impl Iterator<Item = usize>) -> Vec<f64> {
    let (shape, w) = &weights[name];
    ids.flat_map(|id| w[id * shape[1]..(id + 1) * shape[1]].iter().map(|&v| v as f64)).collect()
}

fn rmsnorm(weights: &Weights, name: &str, eps: f64, x: &[f64]) -> Vec<f64> {
    let gain = &weights[&format!("{name}.weight")].1;
    let row = |x: &[f64]| {
        let scale = 1.0 / (x.iter().map(|v| v * v).sum::<f64>() / x.len() as f64 + eps).sqrt();
        x.iter().zip(gain).map(|(v, &g)| v * scale * g as f64).collect::<Vec<_>>()
    };
    x.chunks(gain.len()).flat_map(row).collect()
}

fn layernorm(weights: &Weights, name: &str, x: &[f64]) -> Vec<f64> {
    let (gain, bias) = (&weights[&format!("{name}.weight")].1, &weights[&format!("{name}.bias")].1);
    let row = |x: &[f64]| {
        let mean = x.iter().sum::<f64>() / x.len() as f64;
        let variance = x.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / x.len() as f64;
        let scale = 1.0 / (variance + 1e-12).sqrt();
        x.iter().zip(gain).zip(bias).map(|((v, &g), &b)| (v - mean) * scale * g as f64 + b as f64).collect::<Vec<_>>()
    };
    x.chunks(gain.len()).flat_map(row).collect()
}

/// Rotates each head of row m by position m / stretch; columns i and i + D/2 are a pair.
fn rope(x: &mut [f64], heads: usize, shape: &Shape) {
    let Shape { head_dim, theta, stretch, .. } = *shape;
    let half = head_dim / 2;
    for (m, row) in x.chunks_mut(heads * head_dim).enumerate() {
        for head in row.chunks_mut(head_dim) {
            for i in 0..half {
                let angle = m as f64 / stretch * theta.powf(-2.0 * i as f64 / head_dim as f64);
                let (a, b) = (head[i], head[i + half]);
                head[i] = a * angle.cos() - b * angle.sin();
                head[i + half] = b * angle.cos() + a * angle.sin();
            }
        }
    }
}

/// Softmax attention of every row over the rows `span(m)`.
fn attention(
    q: &[f64],
    k: &[f64],
    v: &[f64],
    [heads, kv_heads, d]: [usize; 3],
    span: impl Fn(usize) -> (usize, usize) + Sync,
) -> Vec<f64> {
    let kv = kv_heads * d;
    let row = |(m, q): (usize, &[f64])| -> Vec<f64> {
        let (begin, end) = span(m);
        let mut y = Vec::with_capacity(heads * d);
        for head in 0..heads {
            let q = &q[head * d..(head + 1) * d];
            let at = |row: usize| row * kv + head / (heads / kv_heads) * d;
            let score = |row: usize| q.iter().zip(&k[at(row)..at(row) + d]).map(|(a, b)| a * b).sum::<f64>();
            let scores: Vec<f64> = (begin..end).map(|row| score(row) / (d as f64).sqrt()).collect();
            let max = scores.iter().fold(f64::NEG_INFINITY, |max, &s| max.max(s));
            let p: Vec<f64> = scores.iter().map(|s| (s - max).exp()).collect();
            let total: f64 = p.iter().sum();
            y.extend((0..d).map(|i| (begin..end).zip(&p).map(|(row, p)| p * v[at(row) + i]).sum::<f64>() / total));
        }
        y
    };
    q.par_chunks(heads * d).enumerate().flat_map_iter(row).collect()
}

fn add(a: &[f64], b: &[f64]) -> Vec<f64> {
    a.iter().zip(b).map(|(a, b)| a + b).collect()
}

/// The hidden states (0 after the embedding, then after each layer, the last one normed) and the logits of a decoder.
pub fn decoder(shape: &Shape, weights: &Weights, ids: &[u32]) -> (Vec<Vec<f64>>, Vec<f64>) {
    let Shape { heads, kv_heads, head_dim, .. } = *shape;
    let mut x = gather(weights, "model.embed_tokens.weight", ids.iter().map(|&id| id as usize));
    let mut hidden = vec![x.clone()];
    for layer in 0..shape.layers {
        let name = |part: &str| format!("model.layers.{layer}.{part}");
        let h = rmsnorm(weights, &name("input_layernorm"), shape.eps, &x);
        let mut q = linear(weights, &name("self_attn.q_proj"), &h);
        let mut k = linear(weights, &name("self_attn.k_proj"), &h);
        let v = linear(weights, &name("self_attn.v_proj"), &h);
        if shape.arch == "qwen3" {
            q = rmsnorm(weights, &name("self_attn.q_norm"), shape.eps, &q);
            k = rmsnorm(weights, &name("self_attn.k_norm"), shape.eps, &k);
        }
        rope(&mut q, heads, shape);
        rope(&mut k, kv_heads, shape);
        let y = attention(&q, &k, &v, [heads, kv_heads, head_dim], |m| (0, m + 1));
        x = add(&x, &linear(weights, &name("self_attn.o_proj"), &y));

        let h = rmsnorm(weights, &name("post_attention_layernorm"), shape.eps, &x);
        let (gate, up) = (linear(weights, &name("mlp.gate_proj"), &h), linear(weights, &name("mlp.up_proj"), &h));
        let product: Vec<f64> = gate.iter().zip(&up).map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect();
        x = add(&x, &linear(weights, &name("mlp.down_proj"), &product));
        hidden.push(x.clone());
    }
    let normed = rmsnorm(weights, "model.norm", shape.eps, &x);
    *hidden.last_mut().unwrap() = normed.clone();
    let head = if shape.tied { "model.embed_tokens" } else { "lm_head" };
    (hidden, linear(weights, head, &normed))
}

/// The unit vector of one sentence by a BERT encoder of 12 heads of 32 columns, MiniLM's.
pub fn minilm(weights: &Weights, ids: &[u32]) -> Vec<f64> {
    let word = gather(weights, "embeddings.word_embeddings.weight", ids.iter().map(|&id| id as usize));
    let kind = gather(weights, "embeddings.token_type_embeddings.weight", ids.iter().map(|_| 0));
    let position = gather(weights, "embeddings.position_embeddings.weight", 0..ids.len());
    let mut x = layernorm(weights, "embeddings.LayerNorm", &add(&add(&word, &kind), &position));
    for layer in 0..6 {
        let name = |part: &str| format!("encoder.layer.{layer}.{part}");
        let [q, k, v] = ["query", "key", "value"].map(|p| linear(weights, &name(&format!("attention.self.{p}")), &x));
        let y = attention(&q, &k, &v, [12, 12, 32], |_| (0, ids.len()));
        let y = linear(weights, &name("attention.output.dense"), &y);
        x = layernorm(weights, &name("attention.output.LayerNorm"), &add(&x, &y));
        let up = linear(weights, &name("intermediate.dense"), &x);
        let activated: Vec<f64> = up.iter().map(|&v| v * normal_cdf(v)).collect();
        let y = linear(weights, &name("output.dense"), &activated);
        x = layernorm(weights, &name("output.LayerNorm"), &add(&x, &y));
    }
    let width = x.len() / ids.len();
    let mean: Vec<f64> = (0..width).map(|i| x.iter().skip(i).step_by(width).sum::<f64>()).collect();
    let norm = mean.iter().map(|v| v * v).sum::<f64>().sqrt();
    mean.iter().map(|v| v / norm).collect()
}

/// Φ(x) by its power series about 0 (exact to 1e-12 within |x| < 6, where it is summed), the limits beyond.
fn normal_cdf(x: f64) -> f64 {
    if x.abs() > 6.0 {
        return if x > 0.0 { 1.0 } else { 0.0 };
    }
    let (mut term, mut sum) = (x, x);
    for n in 1..120 {
        term *= x * x / (2 * n + 1) as f64;
        sum += term;
    }
    0.5 + sum * (-0.5 * x * x).exp() / std::f64::consts::TAU.sqrt()
}
