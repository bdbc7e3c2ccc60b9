//! The annotated trace of `handmill sim`: each source line beside what it wrote.

use std::io::Write;

use anyhow::Result;
use ptx_sim::{TraceStep, Traced};

/// Columns of the source text.
const TEXT: usize = 58;
/// Lanes whose values are shown where no shorter word for all of them is found.
const LANES: usize = 6;

/// An argument's name and address.
type Named = (&'static str, u64);

/// Prints the steps of one warp; `most` is how many were asked for.
pub fn print(steps: &[TraceStep], most: usize, args: &[Named], out: &mut impl Write) -> Result<()> {
    writeln!(out, "\n{:>5} {:>8}  {:<TEXT$}  values", "line", "lanes", "source")?;
    let mut same_line = 0;
    for (i, step) in steps.iter().enumerate() {
        same_line = if i > 0 && steps[i - 1].line == step.line { same_line + 1 } else { 0 };
        let shown = |result: &Traced| format!("{} = {}", result.name, values(result, step.lanes, args));
        let values: Vec<_> = step.results.iter().map(shown).collect();
        let text = statement(&step.text, same_line);
        writeln!(out, "{:>5} {:08x}  {text:<TEXT$}  {}", step.line, step.lanes, values.join("; "))?;
    }
    if steps.len() == most {
        writeln!(out, "      the first {most} instructions; --trace-steps shows more")?;
    }
    Ok(())
}

/// The statement of a source line that runs as its `nth`, counted from 0.
fn statement(line: &str, nth: usize) -> &str {
    let code = line.split("//").next().unwrap_or_default();
    let statements: Vec<_> = code.split_inclusive(';').map(str::trim).filter(|text| text.ends_with(';')).collect();
    match statements.len() {
        0 => code.trim(),
        n => statements[nth % n],
    }
}

/// The values of the lanes that ran: one if all agree, a sequence by its ends, else those of the first lanes.
fn values(result: &Traced, lanes: u32, args: &[Named]) -> String {
    let ran: Vec<u64> = (0..32).filter(|lane| lanes >> lane & 1 == 1).map(|lane| result.bits[lane]).collect();
    let Some((&first, rest)) = ran.split_first() else { return "-".to_string() };
    if rest.iter().all(|&value| value == first) {
        return value(result.ty, first, args);
    }
    if result.ty == "pred" {
        let mask = (0..32).filter(|lane| result.bits[*lane] == 1).fold(0, |mask, lane| mask | 1u32 << lane);
        return format!("lanes {:08x}", mask & lanes);
    }
    let step = ran[1].wrapping_sub(first);
    let last = ran[ran.len() - 1];
    let counts = !result.ty.starts_with(['f', 'b']) || result.ty == "b64";
    let even = ran.windows(2).all(|pair| pair[1].wrapping_sub(pair[0]) == step);
    if counts && even && ran.len() > 2 {
        let [first, second, last] = [first, ran[1], last].map(|bits| value(result.ty, bits, args));
        return format!("{first}, {second} .. {last}");
    }
    let shown: Vec<_> = ran.iter().take(LANES).map(|&bits| value(result.ty, bits, args)).collect();
    let more = if ran.len() > LANES { " .." } else { "" };
    format!("{}{more}", shown.join(" "))
}

/// Bits as their declared type writes them; an address as an argument's name and bytes from its start.
fn value(ty: &str, bits: u64, args: &[Named]) -> String {
    match ty {
        "f32" => format!("{:?}", f32::from_bits(bits as u32)),
        "f64" => format!("{:?}", f64::from_bits(bits)),
        "s32" => (bits as u32 as i32).to_string(),
        "s16" => (bits as u16 as i16).to_string(),
        "s64" => (bits as i64).to_string(),
        "pred" => if bits == 1 { "true" } else { "false" }.to_string(),
        "b32" | "f16x2" | "bf16x2" => format!("{bits:#010x}"),
        "b16" | "f16" | "bf16" => format!("{bits:#06x}"),
        "b64" | "u64" if bits >> 32 != 0 => match args.iter().find(|arg| arg.1 >> 32 == bits >> 32) {
            Some((name, address)) => format!("{name}+{}", bits - address),
            None => format!("{bits:#x}"),
        },
        _ => bits.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(ty: &'static str, of: impl Fn(u64) -> u64, lanes: u32) -> String {
        let bits = std::array::from_fn(|lane| of(lane as u64));
        values(&Traced { name: "%v".into(), ty, bits }, lanes, &[("x", 1 << 33)])
    }

    #[test]
    fn lanes_are_told_in_few_words() {
        assert_eq!(shown("u32", |_| 7, u32::MAX), "7");
        assert_eq!(shown("u32", |lane| 4 * lane, u32::MAX), "0, 4 .. 124");
        assert_eq!(shown("u32", |lane| lane * lane, u32::MAX), "0 1 4 9 16 25 ..");
        assert_eq!(shown("f32", |lane| u64::from((lane as f32 / 2.0).to_bits()), 0b111), "0.0 0.5 1.0");
        assert_eq!(shown("pred", |lane| lane & 1, u32::MAX), "lanes aaaaaaaa");
        assert_eq!(shown("pred", |_| 1, 3), "true");
        assert_eq!(shown("s32", |_| u64::from(u32::MAX), 1), "-1");
        assert_eq!(shown("u32", |_| 7, 0), "-");
        assert_eq!(shown("u64", |lane| (1 << 33) + 16 * lane, u32::MAX), "x+0, x+16 .. x+496");
    }

    #[test]
    fn statements_of_one_line_are_told_apart() {
        let line = "shfl.sync.bfly.b32 %a, %b, 1, 31, -1;  add.f32 %b, %b, %a; // a butterfly; twice";
        assert_eq!(statement(line, 0), "shfl.sync.bfly.b32 %a, %b, 1, 31, -1;");
        assert_eq!((statement(line, 1), statement(line, 2)), ("add.f32 %b, %b, %a;", statement(line, 0)));
        assert_eq!(statement("label:", 3), "label:");
    }
}
