{#- Macros for products of matrices in registers, imported by linear, band and attention.

A workgroup computes a tile of `bm` x `bn` results, `bk` of the depth at a time; each thread `tm` x `tn` of them, in
accumulators named by the caller. A thread's rows come in fours, `ty` being its place among the groups of four, and its
columns likewise (`tx`), so that neighbours read neighbouring vec4s from workgroup memory. Both operands lie there by depth:
tile[k][4 rows or columns]. They come there in blocks of 4 x 4, so that an operand that lies in memory along the depth is
transposed in registers on its way. -#}

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

{#- `tx` and `ty` of `thread`, among `across` x `down` threads. -#}
{%- macro place(across, down) %}
{%- if across % 8 == 0 and down % 4 == 0 %}
    // 32 threads take 8 x 4 places. Of each four of them two share a row and two a column: hardware that serves a vec4 of
    // workgroup memory to a few threads at a time serves those that want the same one together.
    let tx = (thread / 32u % {{ across // 8 }}u) * 8u + (thread & 1u) + ((thread >> 1u) & 6u);
    let ty = (thread / {{ 4 * across }}u) * 4u + ((thread >> 1u) & 1u) + ((thread >> 3u) & 2u);
{%- else %}
    let tx = thread % {{ across }}u;
    let ty = thread / {{ across }}u;
{%- endif %}
{% endmacro -%}

{#- Block `index` of an operand of `extent` rows or columns: its place down the depth and across, in fours. Eight threads
that follow each other write neighbouring vec4s, and read whole 32 bytes at least. -#}
{%- macro block(index, by_depth, extent, depth) %}
{%- if by_depth %}
        let kb = ({{ index }}) / {{ extent // 4 }}u;
        let rb = ({{ index }}) % {{ extent // 4 }}u;
{%- else %}
        let kb = ({{ index }}) / 8u % {{ depth // 4 }}u;
        let rb = ({{ index }}) / {{ 2 * depth }}u * 8u + ({{ index }}) % 8u;
{%- endif %}
{%- endmacro -%}

{#- The r-th vec4 of the block (kb, rb) in memory: `of(row, k)`, or `of(k, column)` of an operand that lies across the
depth. -#}
{%- macro element(of, by_depth, r, first, k, context) %}
{%- if by_depth -%}
{{ of }}({{ k }} + kb * 4u + {{ r }}u, {{ first }} + rb * 4u{{ context }})
{%- else -%}
{{ of }}({{ first }} + rb * 4u + {{ r }}u, {{ k }} + kb * 4u{{ context }})
{%- endif %}
{%- endmacro -%}

{#- The block's r-th vec4 in workgroup memory, from its four in memory. -#}
{%- macro turned(part, by_depth, r) %}
{%- if by_depth -%}
{{ part }}{{ r }}
{%- else -%}
{%- set lane = ["x", "y", "z", "w"][r] -%}
vec4<f32>({{ part }}0.{{ lane }}, {{ part }}1.{{ lane }}, {{ part }}2.{{ lane }}, {{ part }}3.{{ lane }})
{%- endif %}
{%- endmacro -%}

{#- Fills `tile`, from `at` on, with `depth` x `extent` elements of an operand, at once. -#}
{%- macro stage(tile, at, by_depth, extent, depth, threads, of, first, k, context) %}
    for (var index = thread; index < {{ extent * depth // 16 }}u; index += {{ threads }}u) {
{{- block("index", by_depth, extent, depth) }}
{%- for r in range(4) %}
        let part{{ r }} = {{ element(of, by_depth, r, first, k, context) }};
{%- endfor %}
{%- for r in range(4) %}
        {{ tile }}[{{ at }} + kb * {{ extent }}u + rb + {{ r * extent // 4 }}u] = {{ turned("part", by_depth, r) }};
{%- endfor %}
    }
{% endmacro -%}

{#- acc += left^T right over `depth` staged steps, `unroll` of them at a time; `left_at` and `right_at` are where the tiles
start, in vec4s. -#}
{%- macro multiply(acc, left, left_at, right, right_at, bm, bn, depth, tm, tn, unroll) %}
    {
        let left_place = {{ left_at }} + ty;
        let right_place = {{ right_at }} + tx;
{%- if unroll < depth %}
    for (var s = 0u; s < {{ depth }}u; s += {{ unroll }}u) {
{%- endif %}
{%- for u in range([unroll, depth] | min) %}
        {
{%- set left_step = "s * " ~ (bm // 4) ~ "u + " if unroll < depth else "" %}
{%- set right_step = "s * " ~ (bn // 4) ~ "u + " if unroll < depth else "" %}
{%- for i in range(tm // 4) %}
        let left{{ i }} = {{ left }}[left_place + {{ left_step }}{{ u * (bm // 4) + i * (bm // tm) }}u];
{%- endfor %}
{%- for j in range(tn // 4) %}
        let right{{ j }} = {{ right }}[right_place + {{ right_step }}{{ u * (bn // 4) + j * (bn // tn) }}u];
{%- endfor %}
{%- for i in range(tm) %}{% for j in range(tn // 4) %}
        {{ acc }}{{ i }}_{{ j }} = fma(vec4<f32>(left{{ i // 4 }}.{{ ["x", "y", "z", "w"][i % 4] }}), right{{ j }}, {{ acc }}{{ i }}_{{ j }});
{%- endfor %}{% endfor %}
        }
{%- endfor %}
{%- if unroll < depth %}
    }
{%- endif %}
    }
{% endmacro -%}

{#- Workgroup memory of `product`: as many buffers of both operands' tiles as there is room for. -#}
{%- macro product_memory(tile) %}
var<workgroup> tiles: array<vec4<f32>, {{ tile.buffers * (tile.bm + tile.bn) * tile.bk // 4 }}>;
{% endmacro -%}

{#- Brings (`fetch`) a thread's blocks of both operands from memory to registers, or (else) from these to the tiles that
start at `into`. The blocks of both are dealt out as one list, so that all threads have as many. -#}
{%- macro blocks(fetch, tile, left, right, k, into) %}
{%- set lefts = tile.bm * tile.bk // 16 %}
{%- set all = lefts + tile.bn * tile.bk // 16 %}
{%- for first in range(0, all, tile.threads) %}
{%- set part = "part" ~ loop.index0 ~ "_" %}
{%- set end = [first + tile.threads, all] | min %}
{%- if first < lefts and end > lefts %}
    if (thread < {{ lefts - first }}u) {
{%- elif end - first < tile.threads %}
    if (thread < {{ end - first }}u) {
{%- else %}
    {
{%- endif %}
{%- if first < lefts %}
{{- one_block(fetch, part, "thread + " ~ first ~ "u", left, tile.bm, tile.bk, k, into) }}
{%- else %}
{{- one_block(fetch, part, "thread + " ~ (first - lefts) ~ "u", right, tile.bn, tile.bk, k, into ~ " + " ~ (tile.bm * tile.bk // 4) ~ "u") }}
{%- endif %}
{%- if first < lefts and end > lefts %}
    } else {% if end - first < tile.threads %}if (thread < {{ end - first }}u) {% endif %}{
{{- one_block(fetch, part, "thread - " ~ (lefts - first) ~ "u", right, tile.bn, tile.bk, k, into ~ " + " ~ (tile.bm * tile.bk // 4) ~ "u") }}
{%- endif %}
    }
{%- endfor %}
{% endmacro -%}

{%- macro one_block(fetch, part, index, operand, extent, depth, k, into) %}
{{- block(index, operand.by_depth, extent, depth) }}
{%- for r in range(4) %}
{%- if fetch %}
        {{ part }}{{ r }} = {{ element(operand.of, operand.by_depth, r, operand.first, k, operand.context) }};
{%- else %}
        tiles[{{ into }} + kb * {{ extent }}u + rb + {{ r * extent // 4 }}u] = {{ turned(part, operand.by_depth, r) }};
{%- endif %}
{%- endfor %}
{%- endmacro -%}

{#- acc += left^T right over the depth from `start` to `end`, in steps of tile.bk. An operand is {of, by_depth, first,
context}: a function of (row, k), or of (k, column) where it lies across the depth, its first row or column, and further
arguments. `context` is a statement that every step's loads are preceded by. The next step's blocks are on their way from
memory while one is multiplied; with two buffers a step has one barrier. -#}
{%- macro product(acc, tile, left, right, start, end, context="") %}
{%- set blocks_of_a_thread = ((tile.bm + tile.bn) * tile.bk // 16 + tile.threads - 1) // tile.threads %}
{%- set size = (tile.bm + tile.bn) * tile.bk // 4 %}
    if ({{ start }} < {{ end }}) {
{%- for n in range(blocks_of_a_thread) %}{% for r in range(4) %}
    var part{{ n }}_{{ r }} = vec4<f32>();
{%- endfor %}{% endfor %}
    var k = {{ start }};
    {
        {{ context }}
{{- blocks(true, tile, left, right, "k", "0u") }}
    }
{{- blocks(false, tile, left, right, "k", "0u") }}
    workgroupBarrier();
{%- if tile.buffers == 2 %}
    var buffer = 0u;
{%- endif %}
{%- set at = "buffer" if tile.buffers == 2 else "0u" %}
    loop {
        k += {{ tile.bk }}u;
        if (k < {{ end }}) {
            {{ context }}
{{- blocks(true, tile, left, right, "k", "0u") }}
        }
{{- multiply(acc, "tiles", at, "tiles", at ~ " + " ~ (tile.bm * tile.bk // 4) ~ "u", tile.bm, tile.bn, tile.bk, tile.tm, tile.tn, tile.unroll) }}
        if (k >= {{ end }}) { break; }
{%- if tile.buffers == 2 %}
        buffer = {{ size }}u - buffer;
{%- else %}
        workgroupBarrier();
{%- endif %}
{{- blocks(false, tile, left, right, "k", at) }}
        workgroupBarrier();
    }
    }
{% endmacro -%}

{#- The row, and the first of four columns, in the tile that accumulator (i, j) stands for. -#}
{%- macro row(i, bm, tm) %}(ty + {{ (i // 4) * (bm // tm) }}u) * 4u + {{ i % 4 }}u{% endmacro -%}
{%- macro col(j, bn, tn) %}(tx + {{ j * (bn // tn) }}u) * 4u{% endmacro -%}
