//! The table of ops. A new op is a room here, a line in [`OPS`] and its kernels.

pub mod adamw;
pub mod add;
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
pub(crate) mod amx;
pub mod attention;
pub mod attention_backward;
pub mod cast;
pub mod cosine_topk;
pub mod cross_entropy;
pub mod dropout;
pub mod embedding;
pub mod gather_rows;
pub mod gelu;
mod lanes;
pub mod layernorm;
pub mod lora_backward;
pub mod lora_expand;
pub mod lora_shrink;
pub mod mean_pool;
pub mod qmatmul;
pub mod qmatmul_t;
pub mod rmsnorm;
pub mod rmsnorm_backward;
pub mod rope;
pub mod rope_backward;
pub mod simd;
mod skinny;
pub mod swiglu;
pub mod swiglu_backward;
mod team;
pub mod vector;
pub mod weights;

use crate::op::OpSpec;

/// Every op in every format.
pub static OPS: &[&OpSpec] = &[
    &qmatmul::QMATMUL_F32,
    &qmatmul::QMATMUL_F16,
    &qmatmul::QMATMUL_BF16,
    &qmatmul::QMATMUL_Q4,
    &qmatmul::QMATMUL_Q8,
    &qmatmul::QMATMUL_NF4,
    &qmatmul::QMATMUL_NF4DQ,
    &embedding::EMBEDDING_F32,
    &embedding::EMBEDDING_F16,
    &embedding::EMBEDDING_BF16,
    &embedding::EMBEDDING_Q4,
    &embedding::EMBEDDING_Q8,
    &embedding::EMBEDDING_NF4,
    &embedding::EMBEDDING_NF4DQ,
    &rmsnorm::RMSNORM,
    &layernorm::LAYERNORM,
    &rope::ROPE,
    &attention::ATTENTION,
    &swiglu::SWIGLU,
    &gelu::GELU,
    &add::ADD,
    &mean_pool::MEAN_POOL,
    &cast::CAST,
    &lora_shrink::LORA_SHRINK,
    &lora_expand::LORA_EXPAND,
    &lora_backward::LORA_BACKWARD,
    &lora_backward::LORA_BACKWARD_A,
    &dropout::DROPOUT,
    &qmatmul_t::QMATMUL_T_F32,
    &qmatmul_t::QMATMUL_T_F16,
    &qmatmul_t::QMATMUL_T_BF16,
    &qmatmul_t::QMATMUL_T_Q4,
    &qmatmul_t::QMATMUL_T_Q8,
    &qmatmul_t::QMATMUL_T_NF4,
    &qmatmul_t::QMATMUL_T_NF4DQ,
    &rmsnorm_backward::RMSNORM_BACKWARD,
    &rope_backward::ROPE_BACKWARD,
    &swiglu_backward::SWIGLU_BACKWARD,
    &attention_backward::ATTENTION_STATS,
    &attention_backward::ATTENTION_BACKWARD,
    &gather_rows::GATHER_ROWS,
    &cross_entropy::CROSS_ENTROPY,
    &adamw::SQUARED_NORM,
    &adamw::ADAMW,
    &cosine_topk::COSINE_TOPK_F32,
    &cosine_topk::COSINE_TOPK_F16,
    &cosine_topk::COSINE_TOPK_I8,
    &cosine_topk::TOPK_MERGE,
];

/// The op of this name for a weight format, `f32` where it has no weights. Panics when the table has no such op.
pub fn find(name: &str, format: &str) -> &'static OpSpec {
    let found = OPS.iter().find(|op| op.name == name && op.format == format);
    found.unwrap_or_else(|| panic!("the table has no op {name}_{format}"))
}
