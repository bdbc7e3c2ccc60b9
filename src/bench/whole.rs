//! Inputs that leave nothing out. What the tests draw has padding, labels that do not count, adapters that are not
//! there and rows asked for twice; a contract's least bytes and operations are those of a launch without any of it, and
//! so are a benchmark's.

use crate::op::{Dims, OpSpec};
use crate::tensor::{Dtype, HostTensor};

/// Replaces, of `spec`'s inputs for these dims, those that say which rows the others are read by.
pub fn leave_nothing_out(spec: &OpSpec, dims: &Dims, args: &mut [HostTensor]) {
    let dim = |name: &str| dims.get(name).unwrap_or(0);
    let (m, c) = (dim("M"), dim("C"));
    let u32s = |values: Vec<u32>| HostTensor::from_u32(&[values.len()], &values);
    for (arg, tensor) in spec.args.iter().zip(args) {
        let made = match (spec.name, arg.name) {
            // Every row of x in one of S sentences.
            ("mean_pool", "span") => {
                let s = dim("S");
                u32s((0..s).flat_map(|i| [i * m / s, (i + 1) * m / s]).map(|row| row as u32).collect())
            }
            // One document of C rows, its last M asked about what is before them. More rows than keys are many
            // documents, which the draw already has.
            ("attention" | "attention_stats" | "attention_backward", "span") if m <= c => {
                u32s((0..m).flat_map(|i| [0, (c - m + i + 1) as u32]).collect())
            }
            // Rows of a text one after another.
            ("rope" | "rope_backward", "position") => u32s((0..m).map(|i| (i % c) as u32).collect()),
            ("cross_entropy", "label") => u32s(spread(m, dim("V"))),
            ("embedding", "ids") => u32s(spread(m, dim("N")).iter().map(|id| dim("N0") as u32 + id).collect()),
            ("gather_rows", "index") => u32s(spread(dim("N"), m)),
            // Every row has an adapter, and as many adapters as there can be are met.
            ("lora_shrink" | "lora_expand", "adapter") if !tensor.bytes.as_slice().is_empty() => {
                let ids: Vec<i32> = (0..m).map(|i| (i % dim("L").max(1)) as i32).collect();
                HostTensor::from_slice(Dtype::I32, &[m], &ids)
            }
            _ => continue,
        };
        *tensor = HostTensor { shape: tensor.shape.clone(), ..made };
    }
}

/// `count` numbers below `most`, far from their neighbours and different as long as there are others.
fn spread(count: usize, most: usize) -> Vec<u32> {
    let step = (most * 5 / 8..most).find(|&step| gcd(step, most) == 1).unwrap_or(1);
    (0..count).map(|i| (i * step % most.max(1)) as u32).collect()
}

/// The greatest common divisor.
pub(super) fn gcd(a: usize, b: usize) -> usize {
    if b == 0 {
        a
    } else {
        gcd(b, a % b)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_spread_differ_and_stay_below() {
        for most in [1, 2, 6, 7, 2048, 49_152] {
            let mut numbers = spread(most, most);
            numbers.sort();
            assert!(numbers.iter().enumerate().all(|(i, &n)| n as usize == i), "{most}");
        }
        assert_eq!(spread(5, 2), [0, 1, 0, 1, 0]);
    }
}
