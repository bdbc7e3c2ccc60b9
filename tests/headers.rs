//! The header of every GPU kernel says what the table's row does: grid, block and shared memory over all cases; and
//! every file of `kernels/` and `shaders/` belongs to a row.

use handmill::device::{ptx_sim::PtxSim, Device};
use handmill::op::{Caps, DeviceKind, Dims, File, Kernel, OpSpec, Simd, Source};
use handmill::ops::OPS;
use std::collections::BTreeSet;
use std::path::Path;

/// A header's fields, as text.
#[derive(Debug, Default)]
struct Header {
    stem: String,
    contract: String,
    grid: String,
    block: String,
    shared: String,
    /// `sm_80` of a target, or a shader's features.
    target: String,
}

/// The value of a field that begins with `word`, among those of a line; two spaces end a field.
fn field(line: &str, word: &str) -> Option<String> {
    let mut rest = line.strip_prefix("//")?.trim_start();
    loop {
        if let Some(value) = rest.strip_prefix(word).filter(|value| value.starts_with(' ')) {
            let value = value.trim_start();
            return Some(value.split("  ").next().unwrap_or_default().trim().to_string());
        }
        // The word and its value may stand apart by more than one space, so fields are found one word on.
        rest = rest.split_once("  ")?.1.trim_start();
    }
}

fn parse(file: &File, target: &str) -> Result<Header, String> {
    let mut lines = file.text.lines();
    let (first, second, third) =
        (lines.next().unwrap_or_default(), lines.next().unwrap_or_default(), lines.next().unwrap_or_default());
    let missing = |what: &str, line: usize| format!("{}:{line}: the header has no {what} here", file.path);
    let stem = first.strip_prefix("// ").and_then(|l| l.split_once(": ")).ok_or_else(|| missing("`// stem: `", 1))?.0;
    let comments: Vec<&str> = file.text.lines().take_while(|line| line.starts_with("//")).collect();
    for word in ["reads", "writes", "bound:", "idea"] {
        if !comments.iter().any(|line| line.contains(word)) {
            return Err(missing(word, comments.len()));
        }
    }
    Ok(Header {
        stem: stem.to_string(),
        contract: first.split("contract: ").nth(1).ok_or_else(|| missing("contract:", 1))?.trim().to_string(),
        grid: field(second, "grid").ok_or_else(|| missing("grid", 2))?,
        block: field(second, "block").ok_or_else(|| missing("block", 2))?,
        shared: field(third, "smem").ok_or_else(|| missing("smem", 3))?,
        target: field(third, target).ok_or_else(|| missing(target, 3))?,
    })
}

/// An expression over dims: integers, `+ - *`, parentheses, `ceil(a/b)`, `min(a, b)` and `max(a, b)`.
struct Expression<'a> {
    rest: &'a str,
    dims: &'a Dims,
}

impl Expression<'_> {
    fn value(text: &str, dims: &Dims) -> Result<i64, String> {
        let mut parser = Expression { rest: text.trim(), dims };
        let value = parser.sum()?;
        if parser.rest.is_empty() {
            return Ok(value);
        }
        Err(format!("`{text}`: `{}` is left over", parser.rest))
    }

    fn eat(&mut self, symbol: char) -> bool {
        let found = self.rest.strip_prefix(symbol);
        if let Some(rest) = found {
            self.rest = rest.trim_start();
        }
        found.is_some()
    }

    fn expect(&mut self, symbol: char) -> Result<(), String> {
        if self.eat(symbol) {
            return Ok(());
        }
        Err(format!("`{symbol}` is missing before `{}`", self.rest))
    }

    fn sum(&mut self) -> Result<i64, String> {
        let mut value = self.product()?;
        loop {
            if self.eat('+') {
                value += self.product()?;
            } else if self.eat('-') {
                value -= self.product()?;
            } else {
                return Ok(value);
            }
        }
    }

    fn product(&mut self) -> Result<i64, String> {
        let mut value = self.factor()?;
        while self.eat('*') {
            value *= self.factor()?;
        }
        Ok(value)
    }

    fn factor(&mut self) -> Result<i64, String> {
        if self.eat('(') {
            let value = self.sum()?;
            self.expect(')')?;
            return Ok(value);
        }
        let end = self.rest.find(|c: char| !(c.is_alphanumeric() || c == '_')).unwrap_or(self.rest.len());
        let (word, rest) = self.rest.split_at(end);
        self.rest = rest.trim_start();
        if let Ok(number) = word.parse() {
            return Ok(number);
        }
        if let Some(dim) = self.dims.get(word) {
            return Ok(dim as i64);
        }
        self.expect('(').map_err(|_| format!("`{word}` is no dim of {}", self.dims))?;
        let first = self.sum()?;
        self.expect(if word == "ceil" { '/' } else { ',' })?;
        let mut second = self.sum()?;
        while word == "ceil" && self.eat('/') {
            second *= self.sum()?;
        }
        self.expect(')')?;
        match word {
            "ceil" if second > 0 => Ok((first + second - 1) / second),
            "min" => Ok(first.min(second)),
            "max" => Ok(first.max(second)),
            _ => Err(format!("`{word}({first}, {second})` has no value")),
        }
    }
}

/// Splits at the commas that stand in no parentheses.
fn split(text: &str) -> Vec<&str> {
    let (mut parts, mut depth, mut start) = (Vec::new(), 0, 0);
    for (i, c) in text.char_indices() {
        match c {
            '(' => depth += 1,
            ')' => depth -= 1,
            ',' if depth == 0 => {
                parts.push(&text[start..i]);
                start = i + 1;
            }
            _ => {}
        }
    }
    parts.push(&text[start..]);
    parts
}

fn three(values: Vec<i64>) -> Result<[u32; 3], String> {
    let mut out = [1; 3];
    if values.len() > 3 {
        return Err(format!("{values:?} has more than three sizes"));
    }
    for (slot, value) in out.iter_mut().zip(values) {
        *slot = u32::try_from(value).map_err(|_| format!("{value} is no size"))?;
    }
    Ok(out)
}

fn grid(text: &str, dims: &Dims) -> Result<[u32; 3], String> {
    three(split(text).into_iter().map(|part| Expression::value(part, dims)).collect::<Result<_, _>>()?)
}

/// `128 = 4 warps, one warp per output` or `16 x 16 = ..`
fn block(text: &str, dims: &Dims) -> Result<[u32; 3], String> {
    let (sizes, words) = text.split_once('=').unwrap_or((text, ""));
    let block = three(sizes.split(" x ").map(|size| Expression::value(size, dims)).collect::<Result<Vec<_>, _>>()?)?;
    if let Some((warps, "warps")) = words.trim().split([' ', ',']).collect::<Vec<_>>().get(..2).map(|w| (w[0], w[1])) {
        let threads: u32 = block.iter().product();
        if warps.parse() != Ok(threads / 32) {
            return Err(format!("{threads} threads are not {warps} warps"));
        }
    }
    Ok(block)
}

fn shared(text: &str, dims: &Dims) -> Result<i64, String> {
    Expression::value(text.strip_suffix('B').ok_or_else(|| format!("`{text}` is not in B"))?, dims)
}

/// What a row's launches must be: the header's sizes, for each case that the kernel supports.
fn compare(spec: &OpSpec, kernel: &Kernel, header: &Header, fixed: i64, caps: &Caps, faults: &mut Vec<String>) {
    let mut fault = |what: String| faults.push(format!("{}: {what}", kernel.stem));
    if header.stem != kernel.stem {
        fault(format!("the header names it {}", header.stem));
    }
    if !Path::new(env!("CARGO_MANIFEST_DIR")).join(&header.contract).is_file() {
        fault(format!("there is no {}", header.contract));
    }
    let mut supported = 0;
    for dims in spec.cases.iter().map(|case| spec.case_dims(case)).filter(|dims| (kernel.supports)(dims, caps)) {
        supported += 1;
        let launch = (kernel.launch)(&dims);
        let sizes =
            [("grid", grid(&header.grid, &dims), launch.grid), ("block", block(&header.block, &dims), launch.block)];
        for (what, said, is) in sizes {
            if said != Ok(is) {
                fault(format!("{what} of ({dims}) is {is:?}, the header says {said:?}"));
            }
        }
        let (said, is) = (shared(&header.shared, &dims), fixed + i64::from(launch.shared_bytes));
        if said != Ok(is) {
            fault(format!("shared memory of ({dims}) is {is} B, the header says {said:?}"));
        }
    }
    if supported == 0 {
        fault("no case of its op runs it".to_string());
    }
}

fn rows() -> impl Iterator<Item = (&'static OpSpec, &'static Kernel)> {
    OPS.iter().flat_map(|&spec| spec.kernels().map(move |kernel| (spec, kernel)))
}

fn check(faults: &[String]) {
    assert!(faults.is_empty(), "\n{}\n", faults.join("\n"));
}

#[test]
fn ptx_kernels_are_what_their_headers_say() {
    let (mut faults, sim) = (Vec::new(), PtxSim::new());
    for (spec, kernel) in rows() {
        let Source::Ptx(file) = kernel.source else { continue };
        let mut fault = |what: String| faults.push(format!("{}: {what}", file.path));
        if let Some(line) = file.text.lines().position(|line| !line.is_ascii()) {
            fault(format!("line {} is not ASCII, which new assemblers refuse", line + 1));
        }
        let module = match ptx_sim::Module::parse(file.text, file.path) {
            Ok(module) => module,
            Err(error) => {
                fault(error.to_string());
                continue;
            }
        };
        let [entry] = module.entries() else {
            fault(format!("{} entries, one is expected", module.entries().len()));
            continue;
        };
        if entry.name != kernel.stem {
            fault(format!("its entry is {}", entry.name));
        }
        let names: Vec<&str> = entry.params.iter().map(|p| p.name.as_str()).collect();
        let expected: Vec<&str> = spec.args.iter().map(|arg| arg.name).chain(["dims"]).collect();
        if names != expected {
            fault(format!("its parameters are {names:?}, the contract's arguments {expected:?}"));
        }
        if entry.params.last().is_none_or(|p| (p.size, p.align) != (64, 16)) {
            fault("its last parameter is not `.align 16 .b8 dims[64]`".to_string());
        }
        let header = match parse(&file, "target") {
            Ok(header) => header,
            Err(error) => {
                faults.push(error);
                continue;
            }
        };
        if header.target != entry.target {
            fault(format!("its target is {}, the header says {}", entry.target, header.target));
        }
        let any = spec.cases.iter().map(|case| spec.case_dims(case)).find(|dims| (kernel.supports)(dims, sim.caps()));
        let block = any.map(|dims| (kernel.launch)(&dims).block);
        if entry.reqntid.is_none() || entry.reqntid != block {
            fault(format!(".reqntid is {:?}, its launches' block {block:?}", entry.reqntid));
        }
        compare(spec, kernel, &header, i64::from(entry.static_shared), sim.caps(), &mut faults);
    }
    check(&faults);
}

#[test]
fn shaders_are_what_their_headers_say() {
    // Devices on one of which every shader may run: only the headers are read here.
    let hardware = Caps {
        kind: DeviceKind::Wgpu,
        simd: Simd::Portable,
        sm: 0,
        software: false,
        coopmat: true,
        f16: true,
        subgroup: (32, 32),
        shared_bytes: 32 << 10,
        max_binding: 128 << 20,
        view_alignment: 256,
        batch_invariant: false,
    };
    let software = Caps { software: true, ..hardware.clone() };
    let mut faults = Vec::new();
    for (spec, kernel) in rows() {
        let Source::Wgsl(files) = kernel.source else { continue };
        let runs = |caps: &Caps| spec.cases.iter().any(|case| (kernel.supports)(&spec.case_dims(case), caps));
        let caps = if runs(&hardware) { &hardware } else { &software };
        match parse(&files[0], "features") {
            // Workgroup memory is declared in the shader; the row repeats it, so that `supports` and reports know.
            Ok(header) => compare(spec, kernel, &header, 0, caps, &mut faults),
            Err(error) => faults.push(error),
        }
        let source: String = files.iter().map(|file| file.text).collect::<Vec<_>>().join("\n");
        match workgroup(&source, kernel.stem) {
            Ok((block, bytes)) => {
                for dims in spec.cases.iter().map(|case| spec.case_dims(case)).filter(|d| (kernel.supports)(d, caps)) {
                    let launch = (kernel.launch)(&dims);
                    if (launch.block, launch.shared_bytes) != (block, bytes) {
                        faults.push(format!("{}: {block:?} and {bytes} B in the shader, {launch:?}", kernel.stem));
                    }
                }
            }
            Err(error) => faults.push(format!("{}: {error}", files[0].path)),
        }
    }
    check(&faults);
}

/// A shader's workgroup size and the bytes of its workgroup variables.
fn workgroup(source: &str, entry: &str) -> Result<([u32; 3], u32), String> {
    let module = naga::front::wgsl::parse_str(source).map_err(|error| error.message().to_string())?;
    let entry = module.entry_points.iter().find(|e| e.name == entry).ok_or("its entry has another name")?;
    let variables = module.global_variables.iter().filter(|(_, v)| v.space == naga::AddressSpace::WorkGroup);
    let bytes = variables.map(|(_, v)| module.types[v.ty].inner.size(module.to_ctx())).sum();
    Ok((entry.workgroup_size, bytes))
}

#[test]
fn every_file_belongs_to_a_row_and_every_row_has_its_file() {
    let mut named: Vec<&str> = Vec::new();
    let mut shared = BTreeSet::new();
    for (_, kernel) in rows() {
        match kernel.source {
            Source::Ptx(file) => named.push(file.path),
            Source::Wgsl(files) => {
                named.push(files[0].path);
                shared.extend(files[1..].iter().map(|file| file.path));
            }
            Source::Rust(_) => {}
        }
    }
    let once: BTreeSet<&str> = named.iter().copied().chain(shared.iter().copied()).collect();
    assert_eq!(once.len(), named.len() + shared.len(), "a file is the kernel of one row, or a part that kernels share");
    let mut there = BTreeSet::new();
    for (folder, suffix) in [("kernels", ".ptx"), ("shaders", ".wgsl")] {
        let Ok(files) = Path::new(env!("CARGO_MANIFEST_DIR")).join(folder).read_dir() else { continue };
        let names = files.map(|file| file.expect("a file").file_name().into_string().expect("a name in UTF-8"));
        there.extend(names.filter(|name| name.ends_with(suffix)).map(|name| format!("{folder}/{name}")));
    }
    assert_eq!(once.into_iter().map(str::to_string).collect::<BTreeSet<_>>(), there);
}

#[test]
fn expressions_and_fields_are_read() {
    let dims = handmill::ops::find("rmsnorm", "f32").dims(&[7, 33], &[0.0]);
    assert_eq!(grid("ceil(K/4), min(M, 3)*2, ceil(K/2/4)", &dims), Ok([9, 6, 5]));
    assert_eq!(grid("512*(32*ceil(K/32)+4)-1", &dims), Ok([34815, 1, 1]));
    assert_eq!(block("16 x 16 = 8 warps, tiles", &dims), Ok([16, 16, 1]));
    assert!(block("128 = 5 warps, tiles", &dims).is_err() && grid("N", &dims).is_err() && grid("M M", &dims).is_err());
    assert_eq!(shared("4*K + 32 B", &dims), Ok(164));
    assert!(shared("4*K", &dims).is_err() && grid("1,1,1,1", &dims).is_err() && grid("ceil(K/0)", &dims).is_err());
    let line = "// grid   ceil(N/4), M     block 128 = 4 warps, one warp per output";
    assert_eq!(field(line, "grid").as_deref(), Some("ceil(N/4), M"));
    assert_eq!(field(line, "block").as_deref(), Some("128 = 4 warps, one warp per output"));
    assert_eq!(field(line, "smem"), None);
}
