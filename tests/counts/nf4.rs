//! What decoding NF4 costs, by shuffles and by byte permutations: the numbers in the header of `qmatmul_nf4_splitk`.

use handmill::quant::nf4::LEVELS;
use ptx_sim::{launch, Launch, Memory, Module, Options, Param};

const SHFL: &str = include_str!("nf4_shfl.ptx");
const PRMT: &str = include_str!("nf4_prmt.ptx");

/// Instructions of one decoding of eight codes, those of each mnemonic, after its result is held against the levels.
fn decode(name: &str, source: &str) -> Vec<(String, u64)> {
    let codes: Vec<u32> = (0..32u32).map(|i| i.wrapping_mul(0x9e37_79b9) ^ 0x0123_4567).collect();
    let module = Module::parse(source, name).expect("PTX");
    let mut memory = Memory::new();
    let from = memory.alloc_from(bytemuck::cast_slice(&codes)).expect("memory");
    let to = memory.alloc(32 * 8 * 2, false).expect("memory");
    let params = vec![Param::Buffer(from), Param::Buffer(to)];
    let shape = Launch { grid: [1, 1, 1], block: [32, 1, 1], dynamic_shared: 0, params };
    let options = Options { checked: true, count: true, ..Options::default() };
    let report = launch(&module, name, &mut memory, &shape, &options).expect("a run");
    assert!(report.findings.is_empty(), "{name}: {:?}", report.findings);

    let got: Vec<u16> = memory.bytes(to).chunks_exact(2).map(|b| u16::from_le_bytes([b[0], b[1]])).collect();
    for (i, bits) in got.iter().enumerate() {
        // The even column of a byte is its high nibble.
        let code = codes[i / 8] >> (4 * ((i % 8) ^ 1)) & 15;
        let level = half::bf16::from_f32(LEVELS[code as usize]);
        assert_eq!(*bits, level.to_bits(), "{name}: column {i}");
    }
    // What lies between the load of the codes and the next load: of the weights' address.
    let lines = &report.counts.lines;
    let start = lines.iter().position(|l| l.name.starts_with("ld.global")).expect("a load") + 1;
    let end = start + lines[start..].iter().position(|l| l.name.starts_with("ld.param")).expect("a load");
    let mut mix: Vec<(String, u64)> = Vec::new();
    for line in &lines[start..end] {
        let word = line.name.split('.').next().expect("a mnemonic");
        match mix.iter_mut().find(|(name, _)| name == word) {
            Some((_, n)) => *n += line.warps,
            None => mix.push((word.to_string(), line.warps)),
        }
    }
    mix.sort();
    mix
}

/// By the CUDA programming guide a multiprocessor of compute capability 8.0 or 9.0 takes a warp's shuffle in a cycle,
/// its logic and shifts in half of one, beside each other; with byte permutations taken for logic, eight codes of 32
/// lanes take 8 cycles of the one kind, or 10.5 of the other.
#[test]
fn shuffles_decode_nf4_in_fewer_instructions_than_byte_permutations() {
    let of = |pairs: &[(&str, u64)]| pairs.iter().map(|(name, n)| (name.to_string(), *n)).collect::<Vec<_>>();
    assert_eq!(decode("nf4_shfl", SHFL), of(&[("prmt", 4), ("shfl", 8), ("shr", 7)]));
    assert_eq!(decode("nf4_prmt", PRMT), of(&[("and", 1), ("lop3", 1), ("prmt", 16), ("shr", 3)]));
}
