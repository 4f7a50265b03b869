// A dense product in any orientation, with what may follow it.
//
//   out[r, c] (+)= sum over k of L[r, k] R[k, c]      then nothing, + bias[c], gelu(+ bias[c]) or * gelu'(pre[r, c])
//
// Shapes: L is stored [rows, depth], or [depth, rows] with `left_by_depth`; R [cols, depth], or [depth, cols] with
//   `right_by_depth`; out and pre [rows, cols]. Row strides and first elements are parameters; any size is right, whole
//   vec4s are loaded where strides and sizes are multiples of 4 (`vec`, `vec_out`), and where rows and columns are too and
//   the depth is a multiple of bk (`whole`), operands are walked through instead of being looked up.
// Dtypes: f32 products and sums; operands and results as stored.
// Grid: one workgroup per tile of bm x bn; or groups among which all tiles' depths are dealt out (`deal`; `even` if tiles
//   come in as many parts each), each part of a tile to its own part of `out`. Neighbouring groups walk along the shorter
//   side of the grid of tiles, so the larger operand is read once.
// Determinism: each element is summed by one thread in order of k; parts of tiles are added up by reduce.wgsl.
// Caller: src/backend/wgpu/matrix.rs, for linear.rs and loss.rs.
{% import "matrix.wgsl" as matrix %}
{%- include "common.wgsl" %}
{%- if gelu or gelu_backward %}{% include "gelu.wgsl" %}{% endif %}

struct Params {
    first: u32,
    end: u32,
    width: u32,
    rows: u32,
    cols: u32,
    depth: u32,
    left_at: u32,
    left_stride: u32,
    right_at: u32,
    right_stride: u32,
    out_at: u32,
    out_stride: u32,
    pre_at: u32,
    tiles_down: u32,
    tiles_across: u32,
    add: u32,
    // deal: tiles, steps of bk in a tile and for a group, parts of a tile at most, elements from one to the next
    tiles: u32,
    tile_steps: u32,
    group_steps: u32,
    shares: u32,
    share_stride: u32,
}

// Gradients and statistics are f32 whatever activations are.
alias Result = {{ "f32" if out_f32 else "Element" }};

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> left: array<{{ "vec4<Element>" if vec else "Element" }}>;
@group(0) @binding(2) var<storage, read> right: array<{{ "vec4<Element>" if vec else "Element" }}>;
@group(0) @binding(3) var<storage, read_write> out: array<{{ "vec4<Result>" if vec_out else "Result" }}>;
{%- if bias %}
@group(0) @binding(4) var<storage, read> bias: array<{{ "vec4<f32>" if vec_out else "f32" }}>;
{%- endif %}
{%- if gelu %}
@group(0) @binding(5) var<storage, read_write> pre: array<{{ "vec4<Element>" if vec_out else "Element" }}>;
{%- elif gelu_backward %}
@group(0) @binding(4) var<storage, read> pre: array<{{ "vec4<Element>" if vec_out else "Element" }}>;
{%- endif %}

{{ matrix.product_memory(tile) }}
{{- matrix.loader("left", vec) }}
{{- matrix.loader("right", vec) }}
{{- matrix.loader("out", vec_out) }}
{{- matrix.storer("out", vec_out, "Result") }}
{%- if bias %}{{ matrix.loader("bias", vec_out) }}{% endif %}
{%- if gelu %}{{ matrix.storer("pre", vec_out, "Element") }}{% endif %}
{%- if gelu_backward %}{{ matrix.loader("pre", vec_out) }}{% endif %}

// How many of the four elements from (r, c) lie inside.
fn inside(r: u32, r_end: u32, c: u32, c_end: u32) -> u32 {
    return select(0u, c_end - c, r < r_end && c < c_end);
}
{#- Four elements, along the depth or across it, of an operand of `count` rows or columns x. Those beyond the depth are 0;
what is read for rows and columns beyond the last makes results that no one stores. -#}
{% macro operand(name, by_depth, count) %}
{%- if whole %}
// The vec4 at row or column x, depth k.
fn {{ name }}_start(x: u32, k: u32) -> u32 {
    let near = min(x, {{ count }} - 4u);
    return (p.{{ name }}_at + {{ "k" if by_depth else "near" }} * p.{{ name }}_stride + {{ "near" if by_depth else "k" }}) / 4u;
}
{%- else %}
fn {{ name }}_of({{ "k: u32, x: u32" if by_depth else "x: u32, k: u32" }}, k_end: u32) -> vec4<f32> {
{%- if vec %}
    if (k >= k_end) { return vec4<f32>(); }
    let near = min(x, {{ count }} - {{ 4 if by_depth else 1 }}u);
{%- else %}
    let near = x;
{%- endif %}
    let at = p.{{ name }}_at + {{ "k" if by_depth else "near" }} * p.{{ name }}_stride + {{ "near" if by_depth else "k" }};
{%- if vec %}
    return vec4<f32>({{ name }}[at / 4u]);
{%- elif by_depth %}
    return load_{{ name }}(at, inside(k, k_end, x, {{ count }}));
{%- else %}
    return load_{{ name }}(at, inside(x, {{ count }}, k, k_end));
{%- endif %}
}
{%- endif %}
{% endmacro %}
{{ operand("left", left_by_depth, "p.rows") }}
{{ operand("right", right_by_depth, "p.cols") }}
// What happens to four sums before they are stored.
fn finish(row: u32, col: u32, share: u32, sums: vec4<f32>) {
    let valid = inside(row, p.rows, col, p.cols);
    let at = p.out_at + share * p.share_stride + row * p.out_stride + col;
    var value = sums;
{%- if bias %}
    value += load_bias(col, valid);
{%- endif %}
{%- if gelu %}
    store_pre(p.pre_at + row * p.out_stride + col, valid, value);
    value = gelu(value);
{%- elif gelu_backward %}
    value *= gelu_derivative(load_pre(p.pre_at + row * p.out_stride + col, valid));
{%- endif %}
    if (p.add != 0u) { value += load_out(at, valid); }
    store_out(at, valid, value);
}

{#- How `product` comes by an operand whose tile's first row or column is `first`. -#}
{%- macro walk(name, first) -%}
{{ name }}_start({{ first }} + rb * 4u, k + kb * 4u)
{%- endmacro %}
{%- set left = {"by_depth": left_by_depth, "of": "left_of", "first": "row0", "context": ", end"} %}
{%- set right = {"by_depth": right_by_depth, "of": "right_of", "first": "col0", "context": ", end"} %}
{%- if whole %}
{%- set left = {"by_depth": left_by_depth, "walk": {"name": "left", "start": walk("left", "row0"), "stride": "(p.left_stride / 4u)"}} %}
{%- set right = {"by_depth": right_by_depth, "walk": {"name": "right", "start": walk("right", "col0"), "stride": "(p.right_stride / 4u)"}} %}
{%- endif %}
{#- The results of `tile` over the depth from start to end. -#}
{%- macro results() %}
    let down_first = p.tiles_down < p.tiles_across;
    let row0 = select(tile / p.tiles_across, tile % p.tiles_down, down_first) * {{ bm }}u;
    let col0 = select(tile % p.tiles_across, tile / p.tiles_down, down_first) * {{ bn }}u;
{{ matrix.accumulators("acc", tm, tn) }}
{{- matrix.product("acc", tile, left, right, "start", "end") }}
{%- endmacro %}
{%- macro finish(share) %}
{%- for i in range(tm) %}{% for j in range(tn // 4) %}
    finish(row0 + {{ matrix.row(i, bm, tm) }}, col0 + {{ matrix.col(j, bn, tn) }}, {{ share }}, acc{{ i }}_{{ j }});
{%- endfor %}{% endfor %}
{%- endmacro %}
@compute @workgroup_size({{ threads }})
fn linear(@builtin(workgroup_id) id: vec3<u32>, {{ matrix.invocation(subgroup) }}) {
    let group = group_index(id);
    if (group >= p.end) { return; }
{{- matrix.place(bn, bm // tm, tn, bn, subgroup) }}
{%- if deal %}
{%- call matrix.dealt(even, bk, "p.depth") %}
{{- results() }}
    for (var part = share; part < shares; part += 1u) {
{{- finish("part") }}
{{- matrix.clear("acc", tm, tn) }}
    }
{%- endcall %}
{%- else %}
    let tile = group;
    let start = 0u;
    let end = p.depth;
{{- results() }}
{{- finish("0u") }}
{%- endif %}
}
