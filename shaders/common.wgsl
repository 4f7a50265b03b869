// Included first by every kernel.
//
// Every kernel numbers its workgroups with one index: a grid of more than 65535 groups is folded into two dimensions and
// a long one is cut into several dispatches, so a group computes its index and returns when it lies past the end. The
// first three words of every kernel's parameters are `first`, `end` and `width` for that purpose.
//
// `Element` is the type of activations in memory; all arithmetic is in f32. Parameters, gradients, moments and statistics
// are f32 in memory too.
{% if element == "f16" %}enable f16;
{% endif -%}
alias Element = {{ element }};

// What hides a score from a softmax: finite, so that no difference of two of them is NaN.
const HIDDEN: f32 = -1e30;

fn group_index(id: vec3<u32>) -> u32 {
    return p.first + id.x + id.y * p.width;
}
{% if sums %}
var<workgroup> group_sums: array<f32, {{ threads }}>;

// The sum of `value` over the workgroup, for every thread; a tree, so always in the same order.
fn group_sum(thread: u32, value: f32) -> f32 {
    workgroupBarrier();
    group_sums[thread] = value;
    workgroupBarrier();
    for (var count = {{ threads // 2 }}u; count > 0u; count = count / 2u) {
        if (thread < count) {
            group_sums[thread] = group_sums[thread] + group_sums[thread + count];
        }
        workgroupBarrier();
    }
    return group_sums[0];
}
{% endif %}
{%- if lanes %}
// Where a row's length is a multiple of 4 a thread handles four neighbours at once.
{% if vec -%}
alias Lane = vec4<f32>;
alias Stored = vec4<Element>;

fn total(lane: Lane) -> f32 {
    return (lane.x + lane.y) + (lane.z + lane.w);
}
{%- else -%}
alias Lane = f32;
alias Stored = Element;

fn total(lane: Lane) -> f32 {
    return lane;
}
{%- endif %}
{% endif %}
