// Sums over rows and over parts: the gradients of biases, and the end of every sum that was shared out.
//
//   column_sums  per part of the rows: sums of a matrix's columns
//   add_parts    out[c] (+)= sum over parts of parts[part][c]
//
// Shapes: matrix [M, columns]; parts [parts][stride]; out [columns].
// Dtypes: f32 arithmetic, parts and out; the matrix as stored.
// Grid: column_sums: one workgroup per part of the rows and `threads` lanes of columns; add_parts: one per
//   threads/share lanes of columns, `share` threads sharing a column's parts.
// Determinism: parts are dealt to the threads in turn and the threads' sums added in order.
// Caller: src/backend/wgpu/reduce.rs, for linear, band and layernorm.
{% include "common.wgsl" %}
struct Params {
    first: u32,
    end: u32,
    width: u32,
    rows: u32,
    // lanes of columns: columns / 4, or columns
    lanes: u32,
    part_rows: u32,
    across: u32,
    parts: u32,
    stride: u32,
    at: u32,
    add: u32,
}

@group(0) @binding(0) var<uniform> p: Params;
{%- if entry == "column_sums" %}
@group(0) @binding(1) var<storage, read> matrix: array<Stored>;
@group(0) @binding(2) var<storage, read_write> parts: array<Lane>;

@compute @workgroup_size({{ threads }})
fn column_sums(@builtin(workgroup_id) id: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let group = group_index(id);
    let c = (group % p.across) * {{ threads }}u + thread;
    if (group >= p.end || c >= p.lanes) { return; }
    let part = group / p.across;
    let row_end = min(p.rows, (part + 1u) * p.part_rows);
    var sum = Lane();
    for (var row = part * p.part_rows; row < row_end; row += 1u) {
        sum += Lane(matrix[row * p.lanes + c]);
    }
    parts[part * p.lanes + c] = sum;
}
{%- else %}
@group(0) @binding(1) var<storage, read> parts: array<Lane>;
@group(0) @binding(2) var<storage, read_write> out: array<Lane>;
{%- set columns = threads // share %}

var<workgroup> shares: array<Lane, {{ threads }}>;

@compute @workgroup_size({{ threads }})
fn add_parts(@builtin(workgroup_id) id: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let group = group_index(id);
    if (group >= p.end) { return; }
    let c = group * {{ columns }}u + thread % {{ columns }}u;
    var sum = Lane();
    if (c < p.lanes) {
        for (var part = thread / {{ columns }}u; part < p.parts; part += {{ share }}u) {
            sum += parts[p.at + part * p.stride + c];
        }
    }
    shares[thread] = sum;
    workgroupBarrier();
    if (thread < {{ columns }}u && c < p.lanes) {
        var value = shares[thread];
        for (var s = 1u; s < {{ share }}u; s += 1u) { value += shares[s * {{ columns }}u + thread]; }
        if (p.add != 0u) { value += out[c]; }
        out[c] = value;
    }
}
{%- endif %}
