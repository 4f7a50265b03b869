//! Kernels: WGSL templates, what they are rendered with, and the compiled pipelines.

use super::device::Gpu;
use super::kept::KeptPipelines;
use super::tuning::WORKGROUP_SIZES;
use crate::error::{Error, Result};
use minijinja::{Environment, UndefinedBehavior, Value};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::Path;
use std::rc::Rc;

/// Every shader file, by name.
const SHADERS: [(&str, &str); 11] = [
    ("common.wgsl", include_str!("../../../shaders/common.wgsl")),
    ("matrix.wgsl", include_str!("../../../shaders/matrix.wgsl")),
    ("reduce.wgsl", include_str!("../../../shaders/reduce.wgsl")),
    ("gelu.wgsl", include_str!("../../../shaders/gelu.wgsl")),
    ("embed.wgsl", include_str!("../../../shaders/embed.wgsl")),
    ("layernorm.wgsl", include_str!("../../../shaders/layernorm.wgsl")),
    ("linear.wgsl", include_str!("../../../shaders/linear.wgsl")),
    ("band.wgsl", include_str!("../../../shaders/band.wgsl")),
    ("attention.wgsl", include_str!("../../../shaders/attention.wgsl")),
    ("loss.wgsl", include_str!("../../../shaders/loss.wgsl")),
    ("adamw.wgsl", include_str!("../../../shaders/adamw.wgsl")),
];

/// The type of activations in device memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Element {
    /// 32 bits, the only one there are kernels for so far.
    F32,
}

impl Element {
    fn name(self) -> &'static str {
        match self {
            Element::F32 => "f32",
        }
    }
}

/// One instantiation of a shader: its stem, its entry point and the values of its template's variables.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Kernel {
    stem: &'static str,
    entry: &'static str,
    element: Element,
    variables: Vec<(&'static str, u32)>,
}

impl Kernel {
    /// A kernel of `shaders/STEM.wgsl`; variables that a template only tests may be left out and count as 0.
    pub(super) fn new(stem: &'static str, entry: &'static str, variables: &[(&'static str, u32)]) -> Self {
        Self { stem, entry, element: Element::F32, variables: variables.to_vec() }
    }

    /// The same with more variables.
    pub(super) fn with(mut self, variables: &[(&'static str, u32)]) -> Self {
        self.variables.extend_from_slice(variables);
        self
    }

    /// The entry point.
    pub fn entry(&self) -> &'static str {
        self.entry
    }

    /// A name of its own, fit for a file: entry point, then variables that are not 0.
    pub fn name(&self) -> String {
        let variables = self.variables.iter().filter(|(_, value)| *value != 0);
        let parts =
            variables.map(|(name, value)| if *value == 1 { format!("-{name}") } else { format!("-{name}{value}") });
        format!("{}-{}{}", self.entry, self.element.name(), parts.collect::<String>())
    }

    /// The WGSL text.
    ///
    /// # Errors
    /// A fault in a template: ours.
    pub fn source(&self) -> Result<String> {
        render(&environment()?, self)
    }
}

fn environment() -> Result<Environment<'static>> {
    let mut environment = Environment::new();
    // A variable that is left out is a flag that is off; used as a number it is an error.
    environment.set_undefined_behavior(UndefinedBehavior::SemiStrict);
    environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
    for (name, text) in SHADERS {
        environment.add_template(name, text).map_err(template_fault)?;
    }
    Ok(environment)
}

/// All shader text, with the version of the program that renders it.
pub(super) fn all_sources() -> String {
    SHADERS.iter().map(|(_, text)| *text).chain([env!("CARGO_PKG_VERSION")]).collect()
}

fn template_fault(error: minijinja::Error) -> Error {
    Error::Internal(format!("shader template: {error:#}"))
}

fn render(environment: &Environment<'_>, kernel: &Kernel) -> Result<String> {
    let mut context: BTreeMap<&str, Value> =
        kernel.variables.iter().map(|(name, value)| (*name, Value::from(*value))).collect();
    // The same by one name, for macros.
    context.insert("tile", Value::from_pairs(kernel.variables.iter().copied()));
    context.insert("entry", Value::from(kernel.entry));
    context.insert("element", Value::from(kernel.element.name()));
    let template = environment.get_template(&format!("{}.wgsl", kernel.stem)).map_err(template_fault)?;
    template.render(context).map_err(template_fault)
}

/// Writes every instantiation there is to `dir`, one WGSL file each; returns how many.
///
/// # Errors
/// The folder or a file cannot be written.
pub fn dump_shaders(dir: impl AsRef<Path>) -> Result<usize> {
    let dir = dir.as_ref();
    std::fs::create_dir_all(dir).map_err(Error::io("create", dir))?;
    let kernels: HashSet<Kernel> = WORKGROUP_SIZES.into_iter().flat_map(super::instantiations).collect();
    for kernel in &kernels {
        let path = dir.join(format!("{}.wgsl", kernel.name()));
        std::fs::write(&path, kernel.source()?).map_err(Error::io("write", &path))?;
    }
    Ok(kernels.len())
}

/// A compiled kernel.
pub(super) struct Pipeline {
    pub(super) pipeline: wgpu::ComputePipeline,
    pub(super) layout: Rc<BindLayout>,
}

/// How a kernel's buffers are bound; kernels that bind alike share it, and their bind groups.
pub(super) struct BindLayout {
    pub(super) id: usize,
    pub(super) bindings: wgpu::BindGroupLayout,
    pipelines: wgpu::PipelineLayout,
}

/// Compiled kernels, each compiled when first used.
pub(super) struct Pipelines {
    environment: Environment<'static>,
    checked: bool,
    kept: Option<KeptPipelines>,
    compiled: HashMap<Kernel, Rc<Pipeline>>,
    layouts: HashMap<Vec<bool>, Rc<BindLayout>>,
}

impl Pipelines {
    /// `kept` are those of earlier runs; `checked` compiles bounds checks in.
    pub(super) fn new(checked: bool, kept: Option<KeptPipelines>) -> Result<Self> {
        Ok(Self { environment: environment()?, checked, kept, compiled: HashMap::new(), layouts: HashMap::new() })
    }

    /// Those of this and earlier runs, where the driver gives them out.
    pub(super) fn kept(&mut self) -> Option<&mut KeptPipelines> {
        self.kept.as_mut()
    }

    /// The kernel's pipeline. `writes` says of each of its storage buffers, bound from 1 on, whether it is written.
    pub(super) fn get(&mut self, gpu: &Gpu, kernel: &Kernel, writes: &[bool]) -> Result<Rc<Pipeline>> {
        if let Some(pipeline) = self.compiled.get(kernel) {
            return Ok(pipeline.clone());
        }
        let layout = self.layout(gpu, writes);
        let source = render(&self.environment, kernel)?;
        let scope = gpu.device.push_error_scope(wgpu::ErrorFilter::Validation);
        let internal = gpu.device.push_error_scope(wgpu::ErrorFilter::Internal);
        let module = self.module(gpu, kernel, source);
        let pipeline = gpu.device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
            label: Some(kernel.entry),
            layout: Some(&layout.pipelines),
            module: &module,
            entry_point: Some(kernel.entry),
            // Every kernel writes its workgroup memory before it reads it.
            compilation_options: wgpu::PipelineCompilationOptions {
                zero_initialize_workgroup_memory: false,
                ..Default::default()
            },
            cache: self.kept.as_mut().map(|kept| kept.grow()),
        });
        let errors = [pollster::block_on(internal.pop()), pollster::block_on(scope.pop())];
        if let Some(error) = errors.into_iter().flatten().next() {
            let what = format!("{} does not compile the kernel {}: {error}", gpu.info.describe(), kernel.name());
            return Err(Error::Device(what));
        }
        let pipeline = Rc::new(Pipeline { pipeline, layout });
        self.compiled.insert(kernel.clone(), pipeline.clone());
        Ok(pipeline)
    }

    #[allow(unsafe_code)]
    fn module(&self, gpu: &Gpu, kernel: &Kernel, source: String) -> wgpu::ShaderModule {
        let source = wgpu::ShaderSource::Wgsl(source.into());
        let descriptor = wgpu::ShaderModuleDescriptor { label: Some(kernel.stem), source };
        if self.checked {
            return gpu.device.create_shader_module(descriptor);
        }
        // SAFETY: the kernels are our own; their indices are held inside their bindings by the sizes they are given, which
        // the parity suite tests at sizes that fit no tile, and all their loops end.
        unsafe { gpu.device.create_shader_module_trusted(descriptor, wgpu::ShaderRuntimeChecks::unchecked()) }
    }

    fn layout(&mut self, gpu: &Gpu, writes: &[bool]) -> Rc<BindLayout> {
        let id = self.layouts.len();
        self.layouts.entry(writes.to_vec()).or_insert_with(|| Rc::new(BindLayout::new(gpu, id, writes))).clone()
    }
}

impl BindLayout {
    fn new(gpu: &Gpu, id: usize, writes: &[bool]) -> Self {
        let entry = |binding, ty, has_dynamic_offset| wgpu::BindGroupLayoutEntry {
            binding,
            visibility: wgpu::ShaderStages::COMPUTE,
            ty: wgpu::BindingType::Buffer { ty, has_dynamic_offset, min_binding_size: None },
            count: None,
        };
        let storage = |(binding, writes): (u32, &bool)| {
            entry(binding, wgpu::BufferBindingType::Storage { read_only: !writes }, false)
        };
        let mut entries = vec![entry(0, wgpu::BufferBindingType::Uniform, true)];
        entries.extend((1..).zip(writes).map(storage));
        let layout = wgpu::BindGroupLayoutDescriptor { label: None, entries: &entries };
        let bindings = gpu.device.create_bind_group_layout(&layout);
        let pipelines = gpu.device.create_pipeline_layout(&wgpu::PipelineLayoutDescriptor {
            label: None,
            bind_group_layouts: &[Some(&bindings)],
            immediate_size: 0,
        });
        Self { id, bindings, pipelines }
    }
}
