// LayerNorm (Ba et al. 2016) of a row of C channels, alone or after the residual addition, and its gradients.
//
//   layernorm_forward   r = x (+ branch -> residual); mean, rstd = 1/sqrt(var + 1e-5); out = (r - mean) rstd w + b
//   layernorm_backward  n = (x - mean) rstd, dn = dout w: dx (+)= rstd (dn - mean(dn) - n mean(dn n))
//   layernorm_affine    per part of the rows: sums of dout n and of dout, to be added up by reduce.wgsl
//
// Shapes: x, branch, residual, out, dout, dx [M, C]; mean, rstd [M]; w, b [C]; parts [parts][2][C].
// Dtypes: f32 arithmetic and statistics; activations as stored; w, b f32.
// Grid: forward and backward one workgroup per row, which each thread keeps `slots` lanes of in registers; affine one
//   workgroup per part of the rows and `threads` lanes of columns.
// Determinism: trees of fixed shape; parts are added up in order.
// Caller: src/backend/wgpu/layernorm.rs.
{% include "common.wgsl" %}
struct Params {
    first: u32,
    end: u32,
    width: u32,
    rows: u32,
    channels: u32,
    // lanes of a row: channels / 4, or channels
    lanes: u32,
    // affine: rows of a part, groups across the columns
    part_rows: u32,
    across: u32,
    add: u32,
}

const EPS: f32 = 1e-5;
{%- set parameter = "vec4<f32>" if vec else "f32" %}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> x: array<Stored>;
{%- if entry == "layernorm_forward" %}
@group(0) @binding(2) var<storage, read> weight: array<{{ parameter }}>;
@group(0) @binding(3) var<storage, read> bias: array<{{ parameter }}>;
@group(0) @binding(4) var<storage, read_write> out: array<Stored>;
@group(0) @binding(5) var<storage, read_write> means: array<f32>;
@group(0) @binding(6) var<storage, read_write> rstds: array<f32>;
{%- if residual %}
@group(0) @binding(7) var<storage, read> branch: array<Stored>;
@group(0) @binding(8) var<storage, read_write> residual: array<Stored>;
{%- endif %}

@compute @workgroup_size({{ threads }})
fn layernorm_forward(@builtin(workgroup_id) id: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let row = group_index(id);
    if (row >= p.end) { return; }
    let row_at = row * p.lanes;
    var sum = Lane();
{%- for s in range(slots) %}
    var value{{ s }} = Lane();
    if ({{ s * threads }}u + thread < p.lanes) {
        let at = row_at + {{ s * threads }}u + thread;
        value{{ s }} = Lane(x[at]);
{%- if residual %}
        value{{ s }} += Lane(branch[at]);
        residual[at] = Stored(value{{ s }});
{%- endif %}
        sum += value{{ s }};
    }
{%- endfor %}
    let mean = group_sum(thread, total(sum)) / f32(p.channels);
    var squares = Lane();
{%- for s in range(slots) %}
    if ({{ s * threads }}u + thread < p.lanes) {
        value{{ s }} -= Lane(mean);
        squares += value{{ s }} * value{{ s }};
    }
{%- endfor %}
    let rstd = inverseSqrt(group_sum(thread, total(squares)) / f32(p.channels) + EPS);
{%- for s in range(slots) %}
    if ({{ s * threads }}u + thread < p.lanes) {
        let c = {{ s * threads }}u + thread;
        out[row_at + c] = Stored(value{{ s }} * rstd * weight[c] + bias[c]);
    }
{%- endfor %}
    if (thread == 0u) {
        means[row] = mean;
        rstds[row] = rstd;
    }
}
{%- else %}
@group(0) @binding(2) var<storage, read> dout: array<Stored>;
@group(0) @binding(3) var<storage, read> means: array<f32>;
@group(0) @binding(4) var<storage, read> rstds: array<f32>;
{%- if entry == "layernorm_backward" %}
@group(0) @binding(5) var<storage, read> weight: array<{{ parameter }}>;
@group(0) @binding(6) var<storage, read_write> dx: array<Stored>;

@compute @workgroup_size({{ threads }})
fn layernorm_backward(@builtin(workgroup_id) id: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let row = group_index(id);
    if (row >= p.end) { return; }
    let row_at = row * p.lanes;
    let mean = means[row];
    let rstd = rstds[row];
    var sum = Lane();
    var products = Lane();
{%- for s in range(slots) %}
    var normed{{ s }} = Lane();
    var gradient{{ s }} = Lane();
    if ({{ s * threads }}u + thread < p.lanes) {
        let c = {{ s * threads }}u + thread;
        normed{{ s }} = (Lane(x[row_at + c]) - Lane(mean)) * rstd;
        gradient{{ s }} = Lane(dout[row_at + c]) * weight[c];
        sum += gradient{{ s }};
        products += gradient{{ s }} * normed{{ s }};
    }
{%- endfor %}
    let mean_gradient = group_sum(thread, total(sum)) / f32(p.channels);
    let mean_product = group_sum(thread, total(products)) / f32(p.channels);
{%- for s in range(slots) %}
    if ({{ s * threads }}u + thread < p.lanes) {
        let at = row_at + {{ s * threads }}u + thread;
        var value = rstd * (gradient{{ s }} - Lane(mean_gradient) - normed{{ s }} * mean_product);
        if (p.add != 0u) { value += Lane(dx[at]); }
        dx[at] = Stored(value);
    }
{%- endfor %}
}
{%- else %}
@group(0) @binding(5) var<storage, read_write> parts: array<Lane>;

@compute @workgroup_size({{ threads }})
fn layernorm_affine(@builtin(workgroup_id) id: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let group = group_index(id);
    let c = (group % p.across) * {{ threads }}u + thread;
    if (group >= p.end || c >= p.lanes) { return; }
    let part = group / p.across;
    let row_end = min(p.rows, (part + 1u) * p.part_rows);
    var dweight = Lane();
    var dbias = Lane();
    for (var row = part * p.part_rows; row < row_end; row += 1u) {
        let gradient = Lane(dout[row * p.lanes + c]);
        dweight += gradient * ((Lane(x[row * p.lanes + c]) - Lane(means[row])) * rstds[row]);
        dbias += gradient;
    }
    parts[2u * part * p.lanes + c] = dweight;
    parts[(2u * part + 1u) * p.lanes + c] = dbias;
}
{%- endif %}
{%- endif %}
