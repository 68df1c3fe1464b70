// All layers of a Llama-like target, or the one of a draft, over a few dozen bfloat16 rows in one call, where the weights lie in
// tiles: the functions of rows.cpp, attention.cpp and products.cpp in the order of llama.py and draft_forward.py, shared by one
// team of threads, with nothing of Python between them.

#include "layers.h"

#include <cstring>
#include <vector>

#include "tiles.h"

Ahead::Ahead(const uint16_t* keys, const uint16_t* values, int64_t groups, int64_t group_bytes, int64_t stride)
    : keys(reinterpret_cast<const char*>(keys)), values(reinterpret_cast<const char*>(values)), lines((group_bytes + 63) / 64),
      stride(stride) {
    const int64_t all = groups * lines;
    at = all * team_member() / team_size(), end = all * (team_member() + 1) / team_size();
}

namespace {

// Working memory of one call, n rows: each part is taken once.
class Memory {
    uint16_t* free;
    const int64_t n;

public:
    Memory(int64_t n, int64_t width) : n(n) {
        static thread_local std::vector<uint16_t> memory;
        if (memory.size() < size_t(n * width)) memory.resize(n * width);
        free = memory.data();
    }
    uint16_t* take(int64_t width) { return (free += n * width) - n * width; }
};

// One decoder layer, and what it needs between its products.
struct Work {
    const Shape& s;
    const int64_t n = s.batch * s.rows, queries_width = s.heads * s.head_dim;
    uint16_t *normed, *mixed, *queries, *attended, *both, *gated;
    AttentionRoom* room;

    static int64_t width(const Shape& s, const Layer& layer) {
        return s.width + layer.qkv.outputs + 2 * s.heads * s.head_dim + 3 * layer.down.inputs;
    }
    Work(const Shape& s, const Layer& layer, const uint8_t* mask, Memory& memory)
        : s(s), normed(memory.take(s.width)), mixed(memory.take(layer.qkv.outputs)), queries(memory.take(queries_width)),
          attended(memory.take(queries_width)), both(memory.take(2 * layer.down.inputs)), gated(memory.take(layer.down.inputs)) {
        room = attention_room(mask, s.batch, s.heads, s.groups, s.rows, s.num_keys, s.lead, s.head_dim);
    }

    // What the projections read is `row`, what the layer adds to `entering`; it leaves as two summands, `between` and `delta`.
    // `place` is that of the layer in keys and values, `ahead` what the next layer reads of them.
    void run(const Layer& layer, const uint16_t* row, const uint16_t* entering, const Place& place, const Ahead& ahead,
             uint16_t* between, uint16_t* delta) const {
        share_product(layer.qkv, row, mixed, n);
        share_rotate_bf16(mixed, place.cos, place.sin, layer.head_norms, queries, place.keys, place.values, place.first_slots, s.slots,
                          s.batch, s.rows, s.heads, s.groups, s.head_dim, s.eps);
        share_attention(queries, place.read_keys, place.read_values, place.mask, attended, s.batch, s.heads, s.groups, s.rows,
                        s.num_keys, s.lead, s.head_dim, s.groups * s.slots * s.head_dim, s.slots * s.head_dim, s.scale, room);
        share_product(layer.out, attended, delta, n);
        share_add_norm_bf16(entering, delta, layer.mlp_norm, between, normed, n, s.width, s.eps);
        if (n <= MOST_GATED) {
            share_gated_product(layer.gate_up, normed, gated, n, ahead);
        } else {
            share_product(layer.gate_up, normed, both, n);
            share_gate_bf16(both, gated, n, layer.down.inputs);
        }
        share_product(layer.down, gated, delta, n);
    }
};

}  // namespace

// embeddings [batch, rows, width]; cos and sin [batch, rows, head_dim]; mask [batch, rows, num_keys]; keys and values of all
// layers [layers, batch, groups, slots, head_dim], written from first_slots [batch] on and read from where read_keys and
// read_values point to in the first -> final [batch, rows, width], and what enters the layers that are named (their number
// names the last state) in states [batch, rows, num_captured, width]
extern "C" void layers_bf16(const Layer* layers, const Shape* shape, const Place* first, const uint16_t* norm,
                            const uint16_t* embeddings, const int64_t* captured, uint16_t* states, uint16_t* final) {
    const Shape& s = *shape;
    const int64_t n = s.batch * s.rows;
    Memory memory(n, 3 * s.width + Work::width(s, layers[0]));
    uint16_t *entering = memory.take(s.width), *between = memory.take(s.width), *delta = memory.take(s.width);
    Work work(s, layers[0], first->mask, memory);
    const auto capture = [&](int64_t index, const uint16_t* state) {
        for (int64_t j = 0; j < s.num_captured; j++)
            for (int64_t i = 0; captured[j] == index && i < n; i++)
                std::memcpy(states + (i * s.num_captured + j) * s.width, state + i * s.width, s.width * 2);
    };
    std::memcpy(between, embeddings, n * s.width * 2);
    std::memcpy(entering, embeddings, n * s.width * 2);
#pragma omp parallel
    {
        const Tiles tiles;
        for (int64_t i = 0; i < s.layers; i++) {
            share_add_norm_bf16(between, i ? delta : nullptr, layers[i].attention_norm, i ? entering : nullptr, work.normed, n, s.width,
                                s.eps);
#pragma omp master
            capture(i, entering);  // which no thread changes before all have met again
            const Place next = first->of_layer(i + 1, s);
            const Ahead ahead = i + 1 < s.layers ? Ahead(next.read_keys, next.read_values, s.batch * s.groups,
                                                         s.num_keys * s.head_dim * 2, s.slots * s.head_dim * 2)
                                                 : Ahead();
            work.run(layers[i], work.normed, entering, first->of_layer(i, s), ahead, between, delta);
        }
        share_add_norm_bf16(between, delta, norm, entering, final, n, s.width, s.eps);
    }
    capture(s.layers, final);
}

// The layer of a draft: its projections read the normed embeddings beside the normed hidden states, it adds to the latter
// (normed, where residual_normed) -> out [batch, rows, width]
extern "C" void draft_layer_bf16(const Draft* draft, const Shape* shape, const Place* place, const uint16_t* embeddings,
                                 const uint16_t* hidden, uint16_t* out) {
    const Shape& s = *shape;
    const Layer& layer = draft->layer;
    const int64_t n = s.batch * s.rows;
    Memory memory(n, 6 * s.width + Work::width(s, layer));
    uint16_t *row = memory.take(2 * s.width), *first = memory.take(s.width), *second = memory.take(s.width);
    uint16_t *between = memory.take(s.width), *delta = memory.take(s.width);
    const Work work(s, layer, place->mask, memory);
#pragma omp parallel
    {
        const Tiles tiles;
        share_add_norm_bf16(embeddings, nullptr, layer.attention_norm, nullptr, first, n, s.width, s.eps);
        share_add_norm_bf16(hidden, nullptr, draft->hidden_norm, nullptr, second, n, s.width, s.eps);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < n; i++) {
            std::memcpy(row + 2 * i * s.width, first + i * s.width, s.width * 2);
            std::memcpy(row + (2 * i + 1) * s.width, second + i * s.width, s.width * 2);
        }
        work.run(layer, row, draft->residual_normed ? second : hidden, *place, Ahead(), between, delta);
        share_add_norm_bf16(between, delta, nullptr, out, nullptr, n, s.width, s.eps);
    }
}

// What the head makes of states [rows, width], to which `ahead` is added, if there is any, once they are normed -> logits [rows,
// outputs of the head]
extern "C" void draft_head_bf16(const Draft* draft, const uint16_t* states, const uint16_t* ahead, uint16_t* logits, int64_t rows,
                                int64_t width, float eps) {
    Memory memory(rows, 2 * width);
    uint16_t *normed = memory.take(width), *read = memory.take(width);
#pragma omp parallel
    {
        const Tiles tiles;
        share_add_norm_bf16(states, nullptr, draft->norm, nullptr, normed, rows, width, eps);
        if (ahead) share_add_norm_bf16(normed, ahead, nullptr, read, nullptr, rows, width, eps);
        share_product(draft->head, ahead ? read : normed, logits, rows);
    }
}
