//! `bandtrain info`: devices, and what a configuration takes.

use super::device::{DeviceArgs, Task, with_backend};
use super::eval::check_seq_len;
use super::parse;
use super::train::{learned_blocks, preset_like};
use crate::backend::cpu::Cpu;
use crate::backend::cuda;
use crate::backend::wgpu;
use crate::backend::{Arithmetic, Backend, Device};
use crate::bandwidths::Bandwidths;
use crate::checkpoint;
use crate::config::{GptConfig, preset};
use crate::error::{Error, Result};
use crate::memory::{MemoryEstimate, Room, stored_elements};
use crate::output::{bytes, grouped};
use crate::say;
use crate::shapes::{Param, ParamTable, learned_tensors};
use std::path::PathBuf;

/// The features of an adapter that bear on training; `--json` lists all.
const USEFUL_FEATURES: [&str; 5] =
    ["SHADER_F16", "SUBGROUP", "EXPERIMENTAL_COOPERATIVE_MATRIX", "TIMESTAMP_QUERY", "PIPELINE_CACHE"];

/// Shows devices, and the memory a training takes
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  bandtrain info --preset tinystories-51m -b 16 -w 1024 -2 1024\n  \
                        bandtrain info -e model.safetensors")]
pub struct InfoArgs {
    /// Model to account for
    #[arg(long, default_value = "tinystories-51m", value_name = "NAME")]
    preset: String,
    /// Model to account for, any known format; of learned blocks it says how many are others than at the start
    #[arg(long, short = 'e', value_name = "FILE",
          conflicts_with_all = ["preset", "fc1_bandwidth", "fc2_bandwidth", "mlp_width"])]
    init: Option<PathBuf>,
    /// Sequences per batch [default: the preset's]
    #[arg(long, short = 'b', value_parser = parse::positive, value_name = "N", allow_negative_numbers = true)]
    batch_size: Option<usize>,
    /// Tokens per sequence [default: the model's longest]
    #[arg(long, short = 't', value_parser = parse::positive, value_name = "N", allow_negative_numbers = true)]
    seq_len: Option<usize>,
    /// Bandwidth of FC1, 0 is dense, or pattern, like random:0.438, strided:0.438 or learned:0.438 [default: the preset's]
    #[arg(long, short = 'w', value_parser = parse::bandwidths, value_name = "N", allow_negative_numbers = true)]
    fc1_bandwidth: Option<Bandwidths>,
    /// Bandwidth or pattern of FC2, likewise [default: the preset's]
    #[arg(long, short = '2', value_parser = parse::bandwidths, value_name = "N", allow_negative_numbers = true)]
    fc2_bandwidth: Option<Bandwidths>,
    /// Width of the MLP [default: 4C]
    #[arg(long, value_parser = parse::positive, value_name = "N", allow_negative_numbers = true)]
    mlp_width: Option<usize>,
    #[command(flatten)]
    device: DeviceArgs,
    /// Write every wgpu shader, at every instantiation, to a folder
    #[arg(long, value_name = "DIR")]
    dump_shaders: Option<PathBuf>,
    /// Compile every cuda kernel for an architecture (89 is sm_89), show what each takes, and fail if one spills; needs NVRTC
    /// only
    #[arg(long, value_name = "ARCH", value_parser = clap::value_parser!(u32).range(80..1000))]
    cuda_kernels: Option<u32>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

struct Info {
    config: GptConfig,
    table: ParamTable,
    batch: usize,
    tokens: usize,
    json: bool,
    name: String,
}

/// Runs the command.
///
/// # Errors
/// An unknown preset; a model that cannot be read; sizes that do not fit.
pub fn run(args: InfoArgs) -> Result<()> {
    if let Some(folder) = &args.dump_shaders {
        let count = wgpu::dump_shaders(folder)?;
        return say!("{}: {count} shaders", folder.display());
    }
    if let Some(architecture) = args.cuda_kernels {
        return cuda_kernels(architecture, args.json);
    }
    let (name, defaults, table, config) = match &args.init {
        Some(path) => {
            let weights = checkpoint::load(path)?.weights;
            let config = *weights.config();
            (path.display().to_string(), preset_like(&config)?, weights.table().clone(), config)
        }
        None => {
            let preset = preset(&args.preset)?;
            let config = GptConfig {
                fc1_bandwidth: args.fc1_bandwidth.unwrap_or(preset.model.fc1_bandwidth),
                fc2_bandwidth: args.fc2_bandwidth.unwrap_or(preset.model.fc2_bandwidth),
                ..preset.model
            };
            let config = config.with_mlp_width(args.mlp_width.unwrap_or(config.mlp_width())).checked()?;
            (args.preset, preset, ParamTable::new(&config)?, config)
        }
    };
    let tokens = args.seq_len.unwrap_or(config.max_seq_len);
    check_seq_len(tokens, config.max_seq_len)?;
    let batch = args.batch_size.unwrap_or(defaults.batch_size);
    with_backend(&args.device, Info { config, table, batch, tokens, json: args.json, name })
}

/// The table of what the cuda kernels take.
fn cuda_kernels(architecture: u32, json: bool) -> Result<()> {
    let (major, minor) = cuda::nvrtc_version()?;
    let mut uses = Vec::new();
    for arithmetic in [Arithmetic::Fp32, Arithmetic::Tf32, Arithmetic::Bf16] {
        uses.extend(cuda::kernel_uses(arithmetic, architecture)?);
    }
    let is_slow = |kernel: &&cuda::KernelUse| kernel.spills != [0; 3] || kernel.serialized;
    let slow: Vec<&cuda::KernelUse> = uses.iter().filter(is_slow).collect();
    if json {
        say!("{}", serde_json::json!({ "nvrtc": [major, minor], "architecture": architecture, "kernels": uses }))?;
    } else {
        say!("NVRTC {major}.{minor}, sm_{architecture}; occupancy as on sm_89, of 48 warps")?;
        say!(
            "{:<27} {:>9} {:>7} {:>9} {:>12} {:>6}  unit",
            "kernel",
            "precision",
            "threads",
            "registers",
            "shared bytes",
            "warps"
        )?;
        for kernel in &uses {
            let cuda::KernelUse { unit, entry, precision, threads, registers, shared_memory, sm89_warps, .. } = kernel;
            say!("{entry:<27} {precision:>9} {threads:>7} {registers:>9} {shared_memory:>12} {sm89_warps:>6}  {unit}")?;
        }
        say!("{} kernels, {} of them spill, use a stack or wait between products", uses.len(), slow.len())?;
    }
    match slow.first() {
        None => Ok(()),
        Some(kernel) => Err(Error::Internal(format!(
            "{} kernels spill, use a stack or wait between products on sm_{architecture} with NVRTC {major}.{minor}, the first \
             is {} of {}",
            slow.len(),
            kernel.entry,
            kernel.unit
        ))),
    }
}

/// The card with where its libraries came from, or why there is none.
fn describe_cuda() -> String {
    let of = |library: cuda::Library| {
        let from =
            cuda::loaded_from(library).map_or("a place the system does not tell".into(), |p| p.display().to_string());
        format!("{} from {from}", library.name())
    };
    let card = cuda::card().and_then(|card| cuda::Library::ALL.into_iter().try_for_each(cuda::ensure).map(|()| card));
    match card {
        Err(why) => format!("none: {why}"),
        Ok(cuda::Card { name, architecture, memory, multiprocessors, driver, .. }) => format!(
            "{name} (sm_{architecture}, {multiprocessors} multiprocessors, {}, driver for CUDA {}.{})\n           {}",
            bytes(memory),
            driver.0,
            driver.1,
            cuda::Library::ALL.map(of).join("\n           ")
        ),
    }
}

impl Task for Info {
    type Output = ();

    fn run<B: Backend>(self, backend: B) -> Result<()> {
        let estimate = MemoryEstimate::new(&backend, &self.config, self.batch, self.tokens)?;
        let room = Room::of(&backend);
        let largest = match room.free {
            None => None,
            Some(_) => Some(MemoryEstimate::largest_batch(&backend, &self.config, self.tokens, room)?),
        };
        match self.json {
            true => self.print_json(&backend, &estimate, room, largest),
            false => self.print(&backend, &estimate, room.free.zip(largest)),
        }
    }
}

impl Info {
    /// `budget` is what is free, and the largest B that fits.
    fn print<B: Backend>(&self, backend: &B, estimate: &MemoryEstimate, budget: Option<(usize, usize)>) -> Result<()> {
        let Info { config, table, batch, tokens, name, .. } = self;
        say!("Devices")?;
        say!(
            "  cpu      {}, {} of memory free",
            Cpu::new().description(),
            bytes(Cpu::new().free_bytes().unwrap_or(0))
        )?;
        say!("  cuda     {}", describe_cuda())?;
        let adapters = wgpu::adapters();
        if adapters.is_empty() {
            say!("  wgpu     no adapter: there is no driver for Vulkan, Metal or DirectX 12")?;
        }
        for adapter in &adapters {
            let limits = adapter.limits.iter().map(|(name, value)| format!("{name} {value}")).collect::<Vec<_>>();
            say!("  wgpu {:>2}  {}", adapter.index, adapter.describe())?;
            say!("           {}", limits.join(", "))?;
            let useful = adapter.features.iter().map(String::as_str).filter(|name| USEFUL_FEATURES.contains(name));
            say!("           {}", useful.collect::<Vec<_>>().join(" "))?;
        }
        let count = grouped(table.count(config));
        say!(
            "\n{name}: C={} L={} NH={} T={} V={}, {count} parameters",
            config.channels,
            config.num_layers,
            config.num_heads,
            config.max_seq_len,
            config.vocab_size
        )?;
        let layers = [("FC1", Param::Fcw, config.fc1_bandwidth), ("FC2", Param::Fcprojw, config.fc2_bandwidth)];
        for (name, param, bandwidth) in layers {
            let (stored, dense) = stored_elements(config, table, param);
            match bandwidth.is_dense() {
                true => say!("  {name} dense: {} weights", grouped(dense))?,
                false => say!(
                    "  {name} {}: density {:.3} %, {} of {} weights stored ({:.1} %)",
                    bandwidth.title(),
                    100.0 * table.weights(config, param) as f64 / dense as f64,
                    grouped(stored),
                    grouped(dense),
                    100.0 * stored as f64 / dense as f64
                )?,
            }
            if let Some((learned, others)) = learned(config, table, param)? {
                say!("      {learned} learned blocks, {others} of them others than at the start")?;
            }
        }
        say!("\nMemory of training on {} with B={batch} T={tokens}", backend.description())?;
        for row in estimate.parameters.iter().chain(&estimate.activations) {
            say!(
                "  {:<16} {:>4} x {:>12}  {:>12}",
                row.name,
                row.copies,
                bytes(row.bytes / row.copies),
                bytes(row.bytes)
            )?;
        }
        say!("  {:<16} {:>35}", "total", bytes(estimate.total()))?;
        match budget {
            None => say!("The largest batch is not known: the device does not tell how much memory is free"),
            Some((free, 0)) => {
                say!("No batch of T={tokens} fits into the {} that are free", bytes(free))
            }
            Some((free, largest)) => {
                say!("Largest batch of T={tokens} that fits into the {} that are free: B={largest}", bytes(free))
            }
        }
    }

    fn print_json<B: Backend>(
        &self,
        backend: &B,
        estimate: &MemoryEstimate,
        room: Room,
        largest: Option<usize>,
    ) -> Result<()> {
        let rows = |rows: &[crate::memory::MemoryRow]| -> Vec<_> {
            rows.iter().map(|r| serde_json::json!({ "name": r.name, "copies": r.copies, "bytes": r.bytes })).collect()
        };
        let json = serde_json::json!({
            "devices": devices_json(),
            "device": backend.description(),
            "config": self.config,
            "parameters": self.table.count(&self.config),
            "blocks": learned_blocks(&self.config, &self.table),
            "batch_size": self.batch,
            "seq_len": self.tokens,
            "memory": { "parameters": rows(&estimate.parameters), "activations": rows(&estimate.activations) },
            "total_bytes": estimate.total(),
            "free_bytes": room.free,
            "max_buffer_bytes": room.max_buffer,
            "largest_batch": largest,
        });
        say!("{json}")
    }
}

/// The learned blocks of all layers' tensors of a kind, and those of them that they did not start from; `None` when there are none.
fn learned(config: &GptConfig, table: &ParamTable, param: Param) -> Result<Option<(usize, usize)>> {
    let start = ParamTable::new(config)?;
    let of = |layer| {
        let [now, start] = [table, &start].map(|table| table.band(param, layer).and_then(|(band, _)| band.blocks()));
        Some((now?.count(), now?.count_beside(start?)))
    };
    let tensors = learned_tensors(config).into_iter().filter(|tensor| tensor.0 == param);
    let counts = tensors.filter_map(|(_, layer, _)| of(layer));
    Ok(counts.reduce(|sum, layer| (sum.0 + layer.0, sum.1 + layer.1)))
}

/// Every device there is, with what it offers.
fn devices_json() -> Vec<serde_json::Value> {
    let cpu = Cpu::new();
    let cpu = serde_json::json!({ "backend": "cpu", "name": cpu.description(), "free_bytes": cpu.free_bytes() });
    let adapters = wgpu::adapters().into_iter().map(|adapter| {
        serde_json::json!({
            "backend": "wgpu",
            "index": adapter.index,
            "name": adapter.name,
            "kind": adapter.kind.name(),
            "api": adapter.backend,
            "driver": adapter.driver,
            "limits": adapter.limits.iter().copied().collect::<std::collections::BTreeMap<_, _>>(),
            "features": adapter.features,
        })
    });
    let card = cuda::card().ok().map(|card| {
        serde_json::json!({
            "backend": "cuda",
            "name": card.name,
            "architecture": card.architecture,
            "memory_bytes": card.memory,
            "multiprocessors": card.multiprocessors,
        })
    });
    std::iter::once(cpu).chain(card).chain(adapters).collect()
}
