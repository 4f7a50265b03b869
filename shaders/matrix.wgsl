{#- Macros for products of matrices in registers, imported by linear, band and attention.

A workgroup computes a tile of `bm` x `bn` results; each thread `tm` x `tn` of them, in accumulators named by the caller.
Threads are numbered (ty, tx), tx fastest: bm/tm rows of bn/tn threads. A thread's rows come in fours, ty being its place
among the groups of four, and its columns likewise, so that neighbours read neighbouring vec4s from workgroup memory.
Both operands lie in workgroup memory by depth: tile[k][4 rows or columns]. An operand that lies in memory along the depth
is transposed in registers on its way, 4 x 4 at a time. -#}

{#- A function `load_NAME(at, valid)`: four elements of `buffer` from `at`, of which the first `valid` exist. -#}
{%- macro loader(name, vec) %}
fn load_{{ name }}(at: u32, valid: u32) -> vec4<f32> {
    var value = vec4<f32>();
{%- if vec %}
    if (valid > 0u) { value = vec4<f32>({{ name }}[at / 4u]); }
{%- else %}
    if (valid > 0u) { value.x = f32({{ name }}[at]); }
    if (valid > 1u) { value.y = f32({{ name }}[at + 1u]); }
    if (valid > 2u) { value.z = f32({{ name }}[at + 2u]); }
    if (valid > 3u) { value.w = f32({{ name }}[at + 3u]); }
{%- endif %}
    return value;
}
{% endmacro -%}

{#- A function `store_NAME(at, valid, value)`, the counterpart of `loader`. -#}
{%- macro storer(name, vec, type) %}
fn store_{{ name }}(at: u32, valid: u32, value: vec4<f32>) {
{%- if vec %}
    if (valid > 0u) { {{ name }}[at / 4u] = vec4<{{ type }}>(value); }
{%- else %}
    if (valid > 0u) { {{ name }}[at] = {{ type }}(value.x); }
    if (valid > 1u) { {{ name }}[at + 1u] = {{ type }}(value.y); }
    if (valid > 2u) { {{ name }}[at + 2u] = {{ type }}(value.z); }
    if (valid > 3u) { {{ name }}[at + 3u] = {{ type }}(value.w); }
{%- endif %}
}
{% endmacro -%}

{#- Accumulators, at zero. -#}
{%- macro accumulators(acc, tm, tn) %}
{%- for i in range(tm) %}{% for j in range(tn // 4) %}
    var {{ acc }}{{ i }}_{{ j }} = vec4<f32>();
{%- endfor %}{% endfor %}
{% endmacro -%}

{#- Fills `tile` with `depth` x `extent` elements of an operand that lies along the depth; `load(r, k)` gives 4 of row r. -#}
{%- macro stage_transposed(tile, extent, depth, threads, load, row, k, context) %}
    for (var block = thread; block < {{ (extent // 4) * (depth // 4) }}u; block += {{ threads }}u) {
        let kb = block % {{ depth // 4 }}u;
        let rb = block / {{ depth // 4 }}u;
        let r0 = {{ load }}({{ row }} + rb * 4u, {{ k }} + kb * 4u{{ context }});
        let r1 = {{ load }}({{ row }} + rb * 4u + 1u, {{ k }} + kb * 4u{{ context }});
        let r2 = {{ load }}({{ row }} + rb * 4u + 2u, {{ k }} + kb * 4u{{ context }});
        let r3 = {{ load }}({{ row }} + rb * 4u + 3u, {{ k }} + kb * 4u{{ context }});
        let at = kb * {{ extent }}u + rb;
        {{ tile }}[at] = vec4<f32>(r0.x, r1.x, r2.x, r3.x);
        {{ tile }}[at + {{ extent // 4 }}u] = vec4<f32>(r0.y, r1.y, r2.y, r3.y);
        {{ tile }}[at + {{ extent // 2 }}u] = vec4<f32>(r0.z, r1.z, r2.z, r3.z);
        {{ tile }}[at + {{ 3 * extent // 4 }}u] = vec4<f32>(r0.w, r1.w, r2.w, r3.w);
    }
{% endmacro -%}

{#- The same for an operand that lies across the depth; `load(k, c)` gives 4 from column c. -#}
{%- macro stage_direct(tile, extent, depth, threads, load, k, col, context) %}
    for (var item = thread; item < {{ (extent // 4) * depth }}u; item += {{ threads }}u) {
        {{ tile }}[item] = {{ load }}({{ k }} + item / {{ extent // 4 }}u, {{ col }} + (item % {{ extent // 4 }}u) * 4u{{ context }});
    }
{% endmacro -%}

{#- acc += left^T right over `depth` staged steps; `left_at` is where the left tile's first step starts, in vec4s. -#}
{%- macro multiply(acc, left, left_at, right, bm, bn, depth, tm, tn) %}
    for (var k = 0u; k < {{ depth }}u; k += 1u) {
{%- for i in range(tm // 4) %}
        let left{{ i }} = {{ left }}[{{ left_at }} + k * {{ bm // 4 }}u + ty + {{ i * (bm // tm) }}u];
{%- endfor %}
{%- for j in range(tn // 4) %}
        let right{{ j }} = {{ right }}[k * {{ bn // 4 }}u + tx + {{ j * (bn // tn) }}u];
{%- endfor %}
{%- for i in range(tm) %}{% for j in range(tn // 4) %}
        {{ acc }}{{ i }}_{{ j }} = fma(vec4<f32>(left{{ i // 4 }}.{{ ["x", "y", "z", "w"][i % 4] }}), right{{ j }}, {{ acc }}{{ i }}_{{ j }});
{%- endfor %}{% endfor %}
    }
{% endmacro -%}

{#- The row, and the first of four columns, in the tile that accumulator (i, j) stands for. -#}
{%- macro row(i, bm, tm) %}(ty + {{ (i // 4) * (bm // tm) }}u) * 4u + {{ i % 4 }}u{% endmacro -%}
{%- macro col(j, bn, tn) %}(tx + {{ j * (bn // tn) }}u) * 4u{% endmacro -%}
