//! Runs PTX on the CPU, exactly checked: for people who write kernels and have no card at hand, and for tests.
//!
//! ```
//! let source = "
//!     .version 7.8
//!     .target sm_80
//!     .address_size 64
//!     .visible .entry double (.param .u64 x) {
//!         .reg .u32 %i, %v;  .reg .u64 %x;
//!         ld.param.u64 %x, [x];
//!         mov.u32 %i, %tid.x;
//!         mad.wide.u32 %x, %i, 4, %x;
//!         ld.global.u32 %v, [%x];
//!         shl.b32 %v, %v, 1;
//!         st.global.u32 [%x], %v;
//!         ret;
//!     }";
//! use ptx_sim::{launch, Launch, Memory, Module, Options, Param};
//! let module = Module::parse(source, "double.ptx")?;
//! let mut memory = Memory::new();
//! let x = memory.alloc_from(&[7, 0, 0, 0, 9, 0, 0, 0])?;
//! let shape = Launch { grid: [1; 3], block: [2, 1, 1], dynamic_shared: 0, params: vec![Param::Buffer(x)] };
//! let report = launch(&module, "double", &mut memory, &shape, &Options { checked: true, ..Options::default() })?;
//! assert!(report.findings.is_empty());
//! assert_eq!(memory.bytes(x), [14, 0, 0, 0, 18, 0, 0, 0]);
//! # Ok::<(), ptx_sim::Error>(())
//! ```
//!
//! Warps run in lockstep; lanes that part meet again at the first instruction both reach. A launch runs each warp to
//! its next barrier, blocks in parallel. Checked launches go on after a finding: a refused load gives a NaN, a
//! refused store writes nothing. Races in shared memory are judged by vector clocks over barriers, exactly but for
//! more than two unordered readers of one place; races between blocks by who touched each byte, where a block that
//! has both used a device-wide fence and an atomic is taken to have ordered itself. Register pressure is an estimate:
//! values live at once. What is not supported (calls, local memory, textures, tensor maps, clusters, fp8) is refused by
//! name and line.
//!
//! Of sm_90a: `mbarrier`, bulk copies that complete on one, and `wgmma` in f16 and bf16 from K-major operands. A bulk
//! copy's bytes are poison until a wait on its mbarrier has succeeded, accumulators belong to the tensor cores until
//! `wgmma.wait_group`, and what threads write reaches them only over a `fence.proxy.async`. Knowledge is a warp's: a wait
//! by some of its lanes counts for all, and what some of its lanes release by an `arrive` is what came before the last
//! `bar.warp.sync` of the warp. A warp that waits is not run until its phase ends, so that waiting costs no steps.
//!
//! Integers, f32 and f64 arithmetic and 16-bit arithmetic round exactly as PTX says; approximate instructions and float
//! `mma` lie within PTX's bounds but not on any card's bits.

// Loops over lanes index several arrays at once; iterators would hide that.
#![allow(clippy::needless_range_loop)]

mod ast;
mod barrier;
mod cache;
mod check;
mod compare;
mod constexpr;
mod counts;
mod decode;
mod decode_hopper;
mod decode_memory;
mod decode_predicates;
mod decode_warp;
mod error;
mod exec;
mod exec_bulk;
mod exec_copy;
mod exec_memory;
mod exec_warp;
mod exec_wgmma;
mod float;
mod flow;
mod forms;
mod forms_float;
mod inst;
mod lanes;
mod launch;
mod lexer;
mod memory;
mod mma;
mod mutate;
mod parse;
mod parse_body;
mod span;
mod trace;
mod types;
mod warp;

pub use ast::ParamDecl;
pub use check::{Finding, Kind};
pub use counts::{BufferCount, Counts, LineCount, SharedTraffic, Traffic};
pub use error::{Error, Place};
pub use launch::{launch, shared_limit, Entry, Launch, Module, Options, Param, Report};
pub use memory::{BufferId, Memory};
pub use mutate::{mutants, Class, Mutant};
pub use trace::{TraceStep, TraceWarp, Traced};
