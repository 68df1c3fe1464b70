// All layers of a Llama-like target over a few dozen bfloat16 rows in one call, where its weights lie in tiles: the functions
// of rows.cpp, attention.cpp and products.cpp in the order of llama.py, with nothing of Python between them.

#include <cstdint>
#include <cstring>
#include <vector>

extern "C" {
void add_norm_bf16(const uint16_t*, const uint16_t*, const uint16_t*, uint16_t*, uint16_t*, int64_t, int64_t, float);
void rotate_bf16(const uint16_t*, const uint16_t*, const uint16_t*, const uint16_t*, uint16_t*, uint16_t*, uint16_t*,
                 const int64_t*, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, float);
void gate_bf16(const uint16_t*, uint16_t*, int64_t, int64_t);
void attention_bf16(const uint16_t*, const uint16_t*, const uint16_t*, const uint8_t*, uint16_t*, int64_t, int64_t, int64_t,
                    int64_t, int64_t, int64_t, int64_t, int64_t, float);
void tile_product(const uint16_t*, const uint8_t*, const float*, const float*, uint16_t*, int64_t, int64_t, int64_t, int64_t);
}

namespace {

struct Product {
    const uint8_t* weight;
    const float *scales, *bias;  // scales of int8
    int64_t inputs, outputs, bits;

    void operator()(const uint16_t* x, uint16_t* out, int64_t rows) const {
        tile_product(x, weight, scales, bias, out, rows, inputs, outputs, bits);
    }
};

struct Layer {
    Product qkv, out, gate_up, down;
    const uint16_t *attention_norm, *mlp_norm, *head_norms;
};

struct Shape {
    int64_t layers, batch, rows, width, heads, groups, head_dim, slots, num_keys, num_captured;
    float eps, scale;
};

}  // namespace

// embeddings [batch, rows, width]; cos and sin [batch, rows, head_dim]; mask [batch, rows, num_keys]; keys and values of all
// layers [layers, batch, groups, slots, head_dim], written from first_slots [batch] on and read from where read_keys and
// read_values point to in the first -> final [batch, rows, width], and what enters the layers that are named (their number
// names the last state) in states [batch, rows, num_captured, width]
extern "C" void layers_bf16(const Layer* layers, const Shape* shape, const uint16_t* norm, const uint16_t* embeddings,
                            const uint16_t* cos, const uint16_t* sin, const uint8_t* mask, uint16_t* keys, uint16_t* values,
                            const uint16_t* read_keys, const uint16_t* read_values, const int64_t* first_slots,
                            const int64_t* captured, uint16_t* states, uint16_t* final) {
    const Shape& s = *shape;
    const int64_t n = s.batch * s.rows, inner = layers[0].down.inputs, stride = s.batch * s.groups * s.slots * s.head_dim;
    static thread_local std::vector<uint16_t> memory;
    const int64_t queries_width = s.heads * s.head_dim, mixed_width = queries_width + 2 * s.groups * s.head_dim;
    const size_t needed = n * (4 * s.width + mixed_width + 2 * queries_width + 3 * inner);
    if (memory.size() < needed) memory.resize(needed);
    uint16_t* free = memory.data();
    const auto take = [&](int64_t width) { return (free += n * width) - n * width; };
    uint16_t *entering = take(s.width), *between = take(s.width), *normed = take(s.width), *delta = take(s.width);
    uint16_t *mixed = take(mixed_width), *queries = take(queries_width), *attended = take(queries_width);
    uint16_t *both = take(2 * inner), *gated = take(inner);
    const auto capture = [&](int64_t index, const uint16_t* state) {
        for (int64_t j = 0; j < s.num_captured; j++)
            for (int64_t i = 0; captured[j] == index && i < n; i++)
                std::memcpy(states + (i * s.num_captured + j) * s.width, state + i * s.width, s.width * 2);
    };
    std::memcpy(between, embeddings, n * s.width * 2);
    for (int64_t i = 0; i < s.layers; i++) {
        const Layer& layer = layers[i];
        add_norm_bf16(between, i ? delta : nullptr, layer.attention_norm, i ? entering : nullptr, normed, n, s.width, s.eps);
        if (i == 0) std::memcpy(entering, between, n * s.width * 2);
        capture(i, entering);
        layer.qkv(normed, mixed, n);
        rotate_bf16(mixed, cos, sin, layer.head_norms, queries, keys + i * stride, values + i * stride, first_slots, s.slots,
                    s.batch, s.rows, s.heads, s.groups, s.head_dim, s.eps);
        attention_bf16(queries, read_keys + i * stride, read_values + i * stride, mask, attended, s.batch, s.heads, s.groups,
                       s.rows, s.num_keys, s.head_dim, s.groups * s.slots * s.head_dim, s.slots * s.head_dim, s.scale);
        layer.out(attended, delta, n);
        add_norm_bf16(entering, delta, layer.mlp_norm, between, normed, n, s.width, s.eps);
        layer.gate_up(normed, both, n);
        gate_bf16(both, gated, n, inner);
        layer.down(gated, delta, n);
    }
    add_norm_bf16(between, delta, norm, entering, final, n, s.width, s.eps);
    capture(s.layers, final);
}
