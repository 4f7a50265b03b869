//! Shaders without hardware: every instantiation is accepted by naga with the capabilities every adapter has (the path that
//! is taken where there are subgroups: with these), and becomes SPIR-V, MSL and HLSL; where `tint`, Chrome's compiler, is
//! installed, it accepts every one too.

mod skip;

use bandtrain::backend::wgpu::{Kernel, WORKGROUP_SIZES, dump_shaders, instantiations};
use naga::back::{hlsl, msl, spv};
use naga::valid::{Capabilities, ModuleInfo, ValidationFlags, Validator};
use std::collections::HashSet;
use std::process::Command;

/// Invocations of a workgroup and storage buffers that every WebGPU adapter has.
const INVOCATIONS: u32 = 256;
const STORAGE_BUFFERS: usize = 8;

/// Those for little workgroup memory, and those for much that differ.
fn all_instantiations() -> HashSet<Kernel> {
    WORKGROUP_SIZES.into_iter().flat_map(instantiations).collect()
}

/// Whether a kernel is for adapters with subgroups only.
fn has_subgroups(source: &str) -> bool {
    source.contains("@builtin(subgroup_id)")
}

fn parse(kernel: &Kernel) -> (naga::Module, ModuleInfo) {
    let source = kernel.source().unwrap();
    let module = naga::front::wgsl::parse_str(&source)
        .unwrap_or_else(|error| panic!("{}: {}", kernel.name(), error.emit_to_string(&source)));
    let capabilities = if has_subgroups(&source) { Capabilities::SUBGROUP } else { Capabilities::empty() };
    let info = Validator::new(ValidationFlags::all(), capabilities)
        .validate(&module)
        .unwrap_or_else(|error| panic!("{}: {}", kernel.name(), error.emit_to_string(&source)));
    (module, info)
}

#[test]
fn every_instantiation_becomes_spirv_msl_and_hlsl() {
    for kernel in all_instantiations() {
        let (module, info) = parse(&kernel);
        let name = kernel.name();
        let words = spv::write_vec(&module, &info, &spv::Options::default(), None).expect(&name);
        assert_eq!(words[0], 0x0723_0203, "{name}: no SPIR-V");
        let options = msl::Options { fake_missing_bindings: true, ..msl::Options::default() };
        let (text, _) = msl::write_string(&module, &info, &options, &msl::PipelineOptions::default()).expect(&name);
        assert!(text.contains(&format!("kernel void {}", kernel.entry())), "{name}: no Metal kernel");
        let mut text = String::new();
        let (options, pipeline) = (hlsl::Options::default(), hlsl::PipelineOptions::default());
        hlsl::Writer::new(&mut text, &options, &pipeline).write(&module, &info, None).expect(&name);
        assert!(text.contains("numthreads("), "{name}: no HLSL kernel");
    }
}

/// Chrome's compiler reads WGSL to the letter where naga is lenient: uniform control flow above all.
#[test]
fn tint_accepts_every_instantiation() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("shader.wgsl");
    let tint = |source: &str| {
        std::fs::write(&path, source).unwrap();
        // Written again as WGSL, because only what is written is validated.
        Command::new("tint").args(["--format", "wgsl", "-o"]).arg(dir.path().join("out.wgsl")).arg(&path).output()
    };
    let Ok(output) = tint("@compute @workgroup_size(1) fn broken() { barrier_of_no_kind(); }") else {
        skip::skip("tint", "no program of that name, which compiles WGSL as Chrome does, is installed");
        return;
    };
    assert!(!output.status.success(), "tint accepts anything");
    for kernel in all_instantiations() {
        let source = kernel.source().unwrap();
        // The language wants the extension named; naga 30 has it, but not the directive.
        let extension = if has_subgroups(&source) { "enable subgroups;\n" } else { "" };
        let output = tint(&format!("{extension}{source}")).unwrap();
        assert!(output.status.success(), "{}: {}", kernel.name(), String::from_utf8_lossy(&output.stderr));
    }
}

#[test]
fn every_instantiation_fits_the_limits_it_is_for() {
    let of_limit = |limit| instantiations(limit).into_iter().map(move |kernel| (kernel, limit));
    for (kernel, limit) in WORKGROUP_SIZES.into_iter().flat_map(of_limit) {
        let (module, _) = parse(&kernel);
        let name = kernel.name();
        let mut layouter = naga::proc::Layouter::default();
        layouter.update(module.to_ctx()).unwrap();
        let in_space = |space: naga::AddressSpace| {
            module.global_variables.iter().map(|(_, variable)| variable).filter(move |variable| variable.space == space)
        };
        let bytes: u32 = in_space(naga::AddressSpace::WorkGroup).map(|variable| layouter[variable.ty].size).sum();
        assert!(bytes as usize <= limit, "{name}: {bytes} bytes of workgroup memory");
        let buffers = module
            .global_variables
            .iter()
            .filter(|(_, variable)| matches!(variable.space, naga::AddressSpace::Storage { .. }));
        assert!(buffers.count() <= STORAGE_BUFFERS, "{name}: too many storage buffers");
        let [x, y, z] = module.entry_points[0].workgroup_size;
        assert!(x * y * z <= INVOCATIONS, "{name}: {x}x{y}x{z} invocations");
        let parameters = in_space(naga::AddressSpace::Uniform).map(|variable| layouter[variable.ty].size).max();
        assert!(parameters.unwrap() <= 256, "{name}: more parameters than a slot holds");
        assert_eq!(module.entry_points.len(), 1, "{name}: one entry point each");
    }
}

#[test]
fn instantiations_have_names_of_their_own_and_are_written_one_file_each() {
    let kernels = all_instantiations();
    let names: HashSet<String> = kernels.iter().map(Kernel::name).collect();
    assert_eq!(names.len(), kernels.len());
    let dir = tempfile::tempdir().unwrap();
    let count = dump_shaders(dir.path().join("shaders")).unwrap();
    assert_eq!(count, kernels.len());
    assert_eq!(std::fs::read_dir(dir.path().join("shaders")).unwrap().count(), count);
}
