// The three products of a band, over its panels only.
//
//   band_expand    y[m, j] = sum over i in band(j) of x[m, i] P[j, i], then + bias[j] -> pre, gelu; or * gelu'(pre[m, j])
//   band_contract  y[m, i] = sum over j in band(i) of x[m, j] P[j, i] (+ bias[i])
//   band_outer     G[j, i] (+)= sum over m of wide[m, j] narrow[m, i] in the band, 0.0 in every other slot
//
// Shapes: narrow side [M, N], wide side [M, W], P and G packed by panels as the table says (see band.rs): a panel is
//   `bands` wide rows x a window of `cols` narrow columns. Windows start at and are as wide as multiples of 16, so P is
//   always read by vec4; the activations are where N and W are multiples of 4 (`vec`).
// Dtypes: f32 products and sums; activations as stored, P and G f32.
// Grid: expand: (panel, tile of bm rows); contract: (tile of 64 narrow columns, tile of bm rows); outer: (panel's tile of
//   64 narrow columns, share of the rows). Tiles that the band does not touch have no group, are not loaded, not multiplied.
// Determinism: each element is summed by one thread in a fixed order; shares of the rows are added up by reduce.wgsl.
// Caller: src/backend/wgpu/band.rs.
{% import "matrix.wgsl" as matrix %}
{%- include "common.wgsl" %}
{%- if entry == "band_expand" %}{% include "gelu.wgsl" %}{% endif %}

struct Params {
    first: u32,
    end: u32,
    width: u32,
    rows: u32,
    row_tiles: u32,
    // outer: where the list of its tiles starts in the table, rows per share, elements from one share's result to the next
    tiles_at: u32,
    share_depth: u32,
    share_stride: u32,
    add: u32,
}

struct Panel {
    row_start: u32,
    rows: u32,
    col_start: u32,
    cols: u32,
    offset: u32,
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> table: array<u32>;

fn narrow_axis() -> u32 { return table[0]; }
fn wide_axis() -> u32 { return table[1]; }

fn panel_of(index: u32) -> Panel {
    let at = 8u + 5u * index;
    return Panel(table[at], table[at + 1u], table[at + 2u], table[at + 3u], table[at + 4u]);
}

// How many of the four elements from c lie before c_end, in a row that exists or not.
fn inside(exists: bool, c: u32, c_end: u32) -> u32 {
    return select(0u, c_end - c, exists && c < c_end);
}

var<workgroup> left_tile: array<vec4<f32>, {{ bm * bk // 4 }}>;
var<workgroup> right_tile: array<vec4<f32>, {{ bn * bk // 4 }}>;

{% if entry == "band_outer" -%}
@group(0) @binding(2) var<storage, read> wide: array<{{ "vec4<Element>" if vec else "Element" }}>;
@group(0) @binding(3) var<storage, read> narrow: array<{{ "vec4<Element>" if vec else "Element" }}>;
@group(0) @binding(4) var<storage, read_write> gradient: array<vec4<f32>>;
{{ matrix.loader("wide", vec) }}
{{- matrix.loader("narrow", vec) }}
fn wide_of(m: u32, j: u32, m_end: u32, j_end: u32) -> vec4<f32> {
    return load_wide(m * wide_axis() + j, inside(m < m_end, j, j_end));
}

fn narrow_of(m: u32, i: u32, m_end: u32) -> vec4<f32> {
    return load_narrow(m * narrow_axis() + i, inside(m < m_end, i, narrow_axis()));
}

// Stores four sums of panel row `row` from narrow column i on; slots outside the exact band receive 0.0.
fn finish(panel: Panel, row: u32, i: u32, share: u32, sums: vec4<f32>) {
    if (row >= panel.rows || i >= panel.col_start + panel.cols) { return; }
    let range_at = table[6] + 2u * (panel.row_start + row);
    let columns = vec4<u32>(i) + vec4<u32>(0u, 1u, 2u, 3u);
    let kept = (columns >= vec4<u32>(table[range_at])) & (columns < vec4<u32>(table[range_at + 1u]));
    let at = (share * p.share_stride + panel.offset + row * panel.cols + i - panel.col_start) / 4u;
    var value = sums;
    if (p.add != 0u) { value += gradient[at]; }
    gradient[at] = select(vec4<f32>(), value, kept);
}

@compute @workgroup_size({{ threads }})
fn band_outer(@builtin(workgroup_id) id: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let group = group_index(id);
    if (group >= p.end) { return; }
    let tx = thread % {{ bn // tn }}u;
    let ty = thread / {{ bn // tn }}u;
    let share = group / p.row_tiles;
    let tile_at = p.tiles_at + 2u * (group % p.row_tiles);
    let panel = panel_of(table[tile_at]);
    let col0 = panel.col_start + table[tile_at + 1u];
    let j_end = panel.row_start + panel.rows;
    let m_end = min(p.rows, (share + 1u) * p.share_depth);
{{ matrix.accumulators("acc", tm, tn) }}
    for (var m0 = share * p.share_depth; m0 < m_end; m0 += {{ bk }}u) {
{{- matrix.stage_direct("left_tile", bm, bk, threads, "wide_of", "m0", "panel.row_start", ", m_end, j_end") }}
{{- matrix.stage_direct("right_tile", bn, bk, threads, "narrow_of", "m0", "col0", ", m_end") }}
    workgroupBarrier();
{{- matrix.multiply("acc", "left_tile", "0u", "right_tile", bm, bn, bk, tm, tn) }}
    workgroupBarrier();
    }
{%- for i in range(tm) %}{% for j in range(tn // 4) %}
    finish(panel, {{ matrix.row(i, bm, tm) }}, col0 + {{ matrix.col(j, bn, tn) }}, share, acc{{ i }}_{{ j }});
{%- endfor %}{% endfor %}
}

{%- else -%}
@group(0) @binding(2) var<storage, read> x: array<{{ "vec4<Element>" if vec else "Element" }}>;
@group(0) @binding(3) var<storage, read> packed: array<vec4<f32>>;
@group(0) @binding(4) var<storage, read_write> y: array<{{ "vec4<Element>" if vec else "Element" }}>;
{%- if bias %}
@group(0) @binding(5) var<storage, read> bias: array<{{ "vec4<f32>" if vec else "f32" }}>;
{%- endif %}
{%- if gelu %}
@group(0) @binding(6) var<storage, read_write> pre: array<{{ "vec4<Element>" if vec else "Element" }}>;
{%- elif gelu_backward %}
@group(0) @binding(5) var<storage, read> pre: array<{{ "vec4<Element>" if vec else "Element" }}>;
{%- endif %}
{{ matrix.loader("x", vec) }}
{{- matrix.storer("y", vec, "Element") }}
{%- if bias %}{{ matrix.loader("bias", vec) }}{% endif %}
{%- if gelu %}{{ matrix.storer("pre", vec, "Element") }}{% endif %}
{%- if gelu_backward %}{{ matrix.loader("pre", vec) }}{% endif %}

// Four elements of row m of x, of `stride` elements, from column c; c_end is where the panel or the axis ends.
fn x_of(m: u32, c: u32, stride: u32, c_end: u32) -> vec4<f32> {
    return load_x(m * stride + c, inside(m < p.rows, c, c_end));
}

{% if entry == "band_expand" -%}
// Four weights of panel row `row`, from window column k.
fn weight_of(row: u32, k: u32, panel: Panel) -> vec4<f32> {
    if (row >= panel.rows) { return vec4<f32>(); }
    return packed[(panel.offset + row * panel.cols + k) / 4u];
}
{%- else -%}
// Weights of panel row `row`, at narrow columns i..i+4.
fn weight_of(row: u32, i: u32, panel: Panel) -> vec4<f32> {
    if (row >= panel.rows || i < panel.col_start || i >= panel.col_start + panel.cols) { return vec4<f32>(); }
    return packed[(panel.offset + row * panel.cols + i - panel.col_start) / 4u];
}
{%- endif %}

// What happens to four sums of row m, column c, before they are stored in rows of `axis` elements; c_end ends the tile.
fn finish(m: u32, c: u32, c_end: u32, axis: u32, sums: vec4<f32>) {
    let valid = inside(m < p.rows, c, c_end);
    let at = m * axis + c;
    var value = sums;
{%- if bias %}
    value += load_bias(c, valid);
{%- endif %}
{%- if gelu %}
    store_pre(at, valid, value);
    value = gelu(value);
{%- elif gelu_backward %}
    value *= gelu_derivative(load_pre(at, valid));
{%- endif %}
    store_y(at, valid, value);
}

@compute @workgroup_size({{ threads }})
fn {{ entry }}(@builtin(workgroup_id) id: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let group = group_index(id);
    if (group >= p.end) { return; }
    let tx = thread % {{ bn // tn }}u;
    let ty = thread / {{ bn // tn }}u;
    let row0 = (group % p.row_tiles) * {{ bm }}u;
{{ matrix.accumulators("acc", tm, tn) }}
{%- if entry == "band_expand" %}
    let panel = panel_of(group / p.row_tiles);
    let x_context = narrow_axis();
    for (var k0 = 0u; k0 < panel.cols; k0 += {{ bk }}u) {
{{- matrix.stage_transposed("left_tile", bm, bk, threads, "x_of", "row0", "panel.col_start + k0", ", x_context, x_context") }}
{{- matrix.stage_transposed("right_tile", bn, bk, threads, "weight_of", "0u", "k0", ", panel") }}
    workgroupBarrier();
{{- matrix.multiply("acc", "left_tile", "0u", "right_tile", bm, bn, bk, tm, tn) }}
    workgroupBarrier();
    }
    let col0 = panel.row_start;
    let col_end = panel.row_start + panel.rows;
    let axis = wide_axis();
{%- else %}
    let tile = group / p.row_tiles;
    let col0 = tile * {{ bn }}u;
    let tile_at = table[7] + 2u * tile;
    let panel_end = table[tile_at + 1u];
    for (var index = table[tile_at]; index < panel_end; index += 1u) {
        let panel = panel_of(index);
        if (panel.cols == 0u) { continue; }
        let j_end = panel.row_start + panel.rows;
        for (var k0 = 0u; k0 < panel.rows; k0 += {{ bk }}u) {
{{- matrix.stage_transposed("left_tile", bm, bk, threads, "x_of", "row0", "panel.row_start + k0", ", wide_axis(), j_end") }}
{{- matrix.stage_direct("right_tile", bn, bk, threads, "weight_of", "k0", "col0", ", panel") }}
        workgroupBarrier();
{{- matrix.multiply("acc", "left_tile", "0u", "right_tile", bm, bn, bk, tm, tn) }}
        workgroupBarrier();
        }
    }
    let col_end = narrow_axis();
    let axis = narrow_axis();
{%- endif %}
{%- for i in range(tm) %}{% for j in range(tn // 4) %}
    finish(row0 + {{ matrix.row(i, bm, tm) }}, col0 + {{ matrix.col(j, bn, tn) }}, col_end, axis, acc{{ i }}_{{ j }});
{%- endfor %}{% endfor %}
}
{%- endif %}
