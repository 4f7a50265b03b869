//! Every operation has the same name in every language: the stem `layernorm` is a file in each backend's folder and among
//! its kernels.

use std::collections::BTreeSet;
use std::path::Path;

/// What is no operation: a backend's machinery, what kernels share, and second ways to what `attention` and `band` do.
const HELPERS: [&str; 22] = [
    "mod",
    "common",
    "matrix",
    "reduce",
    "device",
    "kept",
    "memory",
    "buffer",
    "pipelines",
    "profile",
    "recorder",
    "tuning",
    "attention_hopper",
    "band_hopper",
    "blas",
    "compiler",
    "driver",
    "libraries",
    "outer",
    "product",
    "report",
    "tape",
];

/// Stems of the files with this extension in a folder.
fn stems(folder: &str, extension: &str) -> BTreeSet<String> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join(folder);
    let files = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let stems = files.filter(|path| path.extension().is_some_and(|found| found == extension));
    let stems = stems.map(|path| path.file_stem().unwrap().to_str().unwrap().to_string());
    stems.filter(|stem| !HELPERS.contains(&stem.as_str())).collect()
}

#[test]
fn the_wgpu_backend_has_the_references_stems() {
    let reference = stems("src/backend/cpu", "rs");
    assert!(reference.contains("layernorm"));
    assert_eq!(stems("src/backend/wgpu", "rs"), reference);
    assert_eq!(stems("shaders", "wgsl"), reference);
}

#[test]
fn the_cuda_backend_has_the_references_stems() {
    let reference = stems("src/backend/cpu", "rs");
    assert_eq!(stems("src/backend/cuda", "rs"), reference);
    assert_eq!(stems("kernels", "cu"), reference);
}

#[test]
fn every_kernel_says_what_it_is_before_anything_else() {
    let files = |folder: &'static str, extension: &'static str| {
        let stems = stems(folder, extension).into_iter().chain(["reduce".to_string()]);
        stems.map(move |stem| format!("{folder}/{stem}.{extension}"))
    };
    for file in files("shaders", "wgsl").chain(files("kernels", "cu")) {
        let text = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(&file)).unwrap();
        let header: String = text.lines().take_while(|line| line.starts_with("//")).collect::<Vec<_>>().join("\n");
        for part in ["Shapes:", "Dtypes:", "Grid:", "Determinism:", "Caller:"] {
            assert!(header.contains(part), "{file} does not say its {part}");
        }
    }
}
