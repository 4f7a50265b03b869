//! The adapter that the wgpu backend's tests run on.

use crate::skip;
use bandtrain::backend::wgpu::{Options, Wgpu, adapters};

/// The device, or `None` with a visible line when there is none.
pub fn device(options: &Options) -> Option<Wgpu> {
    if adapters().is_empty() {
        skip::skip("wgpu", "this machine has no adapter for Vulkan, Metal or DirectX 12");
        return None;
    }
    Some(Wgpu::new(options).unwrap())
}

/// With bounds checks in the shaders.
pub fn checked() -> Options {
    Options { checked: true, ..Options::default() }
}
