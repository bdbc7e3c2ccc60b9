//! Every WGSL kernel of the table, without a device: it is valid, every backend can write it, and it is what its row
//! and its contract say.

use handmill::op::{Kernel, OpSpec, Role, Source};
use handmill::ops::OPS;
use naga::back::{hlsl, msl, spv};
use naga::valid::{Capabilities, ModuleInfo, ValidationFlags, Validator};
use naga::{AddressSpace, Module, StorageAccess, TypeInner};

/// Every WGSL kernel and its text, its parts joined as the device joins them.
fn kernels() -> Vec<(&'static OpSpec, &'static Kernel, String)> {
    let mut all = Vec::new();
    for &spec in OPS {
        for kernel in spec.kernels() {
            if let Source::Wgsl(files) = kernel.source {
                all.push((spec, kernel, files.iter().map(|file| file.read().unwrap().into_owned()).collect()));
            }
        }
    }
    assert!(all.len() > 20, "{} kernels in WGSL", all.len());
    all
}

/// What a header's `features` ask for.
fn capabilities(stem: &str, text: &str) -> Capabilities {
    let header = text.lines().take_while(|line| line.starts_with("//"));
    let features = header.filter_map(|line| line.split_once("features ")).map(|(_, words)| words).next();
    let words = features.unwrap_or_else(|| panic!("{stem}: no `features` in its header"));
    let words = words.split("  ").next().unwrap_or_default().split(',').map(str::trim);
    // Every adapter unpacks two f16 from a word.
    words.fold(Capabilities::SHADER_FLOAT16_IN_FLOAT32, |all, word| {
        all | match word {
            "none" => Capabilities::empty(),
            "subgroups" => Capabilities::SUBGROUP,
            "f16" => Capabilities::SHADER_FLOAT16,
            "cooperative matrix" => Capabilities::COOPERATIVE_MATRIX,
            _ => panic!("{stem}: feature {word}"),
        }
    })
}

/// The kernel, valid with nothing but what its header asks for, its overrides at their defaults.
fn module(stem: &str, text: &str) -> (Module, ModuleInfo) {
    let module = naga::front::wgsl::parse_str(text).unwrap_or_else(|e| panic!("{stem}: {}", e.emit_to_string(text)));
    let mut validator = Validator::new(ValidationFlags::all(), capabilities(stem, text));
    let info = validator.validate(&module).unwrap_or_else(|e| panic!("{stem}: {}", e.emit_to_string(text)));
    let entry = Some((naga::ShaderStage::Compute, stem));
    let (module, info) =
        naga::back::pipeline_constants::process_overrides(&module, &info, entry, &Default::default()).unwrap();
    (module.into_owned(), info.into_owned())
}

#[test]
fn every_kernel_is_valid_and_every_backend_writes_it() {
    for (_, kernel, text) in kernels() {
        let stem = kernel.stem;
        let (module, info) = module(stem, &text);
        let options = spv::PipelineOptions { shader_stage: naga::ShaderStage::Compute, entry_point: stem.to_string() };
        let words = spv::write_vec(&module, &info, &spv::Options::default(), Some(&options));
        assert!(words.unwrap_or_else(|e| panic!("{stem}: {e}")).len() > 100);
        if capabilities(stem, &text).contains(Capabilities::COOPERATIVE_MATRIX) {
            continue; // Vulkan's only
        }
        let options = msl::Options { lang_version: (2, 4), ..Default::default() };
        let written = msl::write_string(&module, &info, &options, &Default::default());
        assert!(written.unwrap_or_else(|e| panic!("{stem}: {e}")).0.contains("kernel void"));
        let options = hlsl::Options { shader_model: hlsl::ShaderModel::V6_2, ..Default::default() };
        let mut written = String::new();
        let pipeline = hlsl::PipelineOptions::default();
        let result = hlsl::Writer::new(&mut written, &options, &pipeline).write(&module, &info, None);
        result.unwrap_or_else(|e| panic!("{stem}: {e}"));
        assert!(written.contains("numthreads"));
    }
}

#[test]
fn every_kernel_is_launched_as_it_was_written() {
    for (spec, kernel, text) in kernels() {
        let stem = kernel.stem;
        let (module, _) = module(stem, &text);
        let entries: Vec<_> = module.entry_points.iter().map(|entry| entry.name.as_str()).collect();
        assert_eq!(entries, [stem]);

        let mut layouter = naga::proc::Layouter::default();
        layouter.update(module.to_ctx()).unwrap();
        let workgroup = module.global_variables.iter().filter(|(_, v)| v.space == AddressSpace::WorkGroup);
        let shared: u32 = workgroup.map(|(_, variable)| layouter[variable.ty].size).sum();
        for case in spec.cases {
            let launch = (kernel.launch)(&spec.case_dims(case));
            assert_eq!(launch.block, module.entry_points[0].workgroup_size, "{stem}: block");
            assert_eq!(launch.shared_bytes, shared, "{stem}: workgroup memory");
        }
    }
}

#[test]
fn every_kernel_binds_what_its_contract_says() {
    for (spec, kernel, text) in kernels() {
        let stem = kernel.stem;
        let (module, _) = module(stem, &text);
        let binding = |index: usize| {
            let found = module.global_variables.iter().find(|(_, variable)| {
                variable.binding == Some(naga::ResourceBinding { group: 0, binding: index as u32 })
            });
            found.map(|(_, variable)| variable)
        };
        let bound = module.global_variables.iter().filter(|(_, variable)| variable.binding.is_some()).count();
        assert_eq!(bound, spec.args.len() + 1, "{stem}: bindings");
        for (i, arg) in spec.args.iter().enumerate() {
            let variable = binding(i).unwrap_or_else(|| panic!("{stem}: binding {i}, {}", arg.name));
            let access = match arg.role {
                Role::In => StorageAccess::LOAD,
                _ => StorageAccess::LOAD | StorageAccess::STORE,
            };
            assert_eq!(variable.space, AddressSpace::Storage { access }, "{stem}: {}", arg.name);
            assert_eq!(variable.name.as_deref(), Some(arg.name), "{stem}: binding {i}");
        }
        let params = binding(spec.args.len()).unwrap_or_else(|| panic!("{stem}: no params"));
        assert_eq!(params.space, AddressSpace::Uniform, "{stem}: params");
        let TypeInner::Struct { members, .. } = &module.types[params.ty].inner else { panic!("{stem}: params") };
        let words: Vec<_> = spec.dims.iter().map(|name| (*name, naga::ScalarKind::Uint)).collect();
        let words = words.into_iter().chain(spec.scalars.iter().map(|name| (*name, naga::ScalarKind::Float)));
        for (i, (member, (name, kind))) in members.iter().zip(words.clone()).enumerate() {
            assert_eq!(member.name.as_deref(), Some(name), "{stem}: params");
            assert_eq!(member.offset, 4 * i as u32, "{stem}: {name}");
            assert_eq!(module.types[member.ty].inner.scalar_kind(), Some(kind), "{stem}: {name}");
        }
        assert_eq!(members.len(), words.count(), "{stem}: params");
    }
}

#[test]
fn every_file_is_one_room() {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("shaders");
    let kernels = kernels();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let (stem, text) = (path.file_stem().unwrap().to_str().unwrap(), std::fs::read_to_string(&path).unwrap());
        assert!(text.starts_with(&format!("// {stem}: ")), "{stem}: its first line names it");
        for (i, line) in text.lines().enumerate() {
            assert!(line.chars().count() <= 120, "{}:{}: {} columns", path.display(), i + 1, line.chars().count());
        }
        let used = kernels.iter().any(|(_, kernel, _)| match kernel.source {
            Source::Wgsl(files) => files.iter().any(|file| file.path == format!("shaders/{stem}.wgsl")),
            _ => false,
        });
        assert!(used, "{stem}: no kernel of the table uses it");
    }
}
