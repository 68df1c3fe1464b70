// What the compiled parts of a layer have in common: the functions of rows.cpp, attention.cpp and products.cpp, and what one decoder
// layer is told. layers.py keeps the same structures.

#pragma once

#include <cstdint>
#ifdef _OPENMP
extern "C" int omp_get_num_threads(void), omp_get_thread_num(void);  // a compiler may know OpenMP and lack its header

inline int64_t team_size() { return omp_get_num_threads(); }
inline int64_t team_member() { return omp_get_thread_num(); }
#else
inline int64_t team_size() { return 1; }
inline int64_t team_member() { return 0; }
#endif

struct AttentionRoom;  // what attention.cpp needs for one mask, whatever the layer

// What is shared by a team: each thread calls it, takes its part, and leaves when all have done theirs.
extern "C" {
void share_add_norm_bf16(const uint16_t*, const uint16_t*, const uint16_t*, uint16_t*, uint16_t*, int64_t, int64_t, float);
void share_rotate_bf16(const uint16_t*, const uint16_t*, const uint16_t*, const uint16_t*, uint16_t*, uint16_t*, uint16_t*,
                       const int64_t*, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, float);
void share_gate_bf16(const uint16_t*, uint16_t*, int64_t, int64_t);
void tile_product(const uint16_t*, const uint8_t*, const float*, const float*, uint16_t*, int64_t, int64_t, int64_t, int64_t, int64_t);
void best_bf16(const uint16_t*, float*, int64_t*, int64_t, int64_t, int64_t);
}
void share_attention(const uint16_t*, const uint16_t*, const uint16_t*, const uint8_t*, uint16_t*, int64_t, int64_t, int64_t, int64_t,
                     int64_t, int64_t, int64_t, int64_t, int64_t, float, AttentionRoom*);
AttentionRoom* attention_room(const uint8_t* mask, int64_t batch, int64_t heads, int64_t groups, int64_t rows, int64_t num_keys,
                              int64_t lead, int64_t width);  // of the calling thread

// Memory that is soon to be read, asked for piece by piece while something else is computed: a thread's part of the keys and
// values of all groups.
class Ahead {
    const char *keys = nullptr, *values = nullptr;
    int64_t lines = 0, stride = 0, at = 0, end = 0;  // of a group; from one group to the next; of all groups

public:
    Ahead() = default;
    Ahead(const uint16_t* keys, const uint16_t* values, int64_t groups, int64_t group_bytes, int64_t stride);
    void fetch(int64_t count) {
        for (const int64_t stop = at + count < end ? at + count : end; at < stop; at++) {
            const int64_t offset = at / lines * stride + at % lines * 64;
            __builtin_prefetch(keys + offset, 0, 2);
            __builtin_prefetch(values + offset, 0, 2);
        }
    }
    int64_t left() const { return end - at; }
};

struct Product {
    const uint8_t* weight;
    const float *scales, *bias;  // scales of int8
    int64_t inputs, outputs, bits, rounds_rows;
};

constexpr int64_t MOST_GATED = 32;  // rows

// x [rows, inputs] -> out [rows, outputs]; of up to MOST_GATED rows, and of a gate's product beside another, silu(gate) * up [rows,
// outputs / 2], where a half of the outputs fills tiles
void share_product(const Product&, const uint16_t* x, uint16_t* out, int64_t rows);
void share_gated_product(const Product&, const uint16_t* x, uint16_t* out, int64_t rows, Ahead ahead);

struct Layer {
    Product qkv, out, gate_up, down;
    const uint16_t *attention_norm, *mlp_norm, *head_norms;
};

struct Shape {
    int64_t layers, batch, rows, width, heads, groups, head_dim, slots, num_keys, lead, num_captured;
    float eps, scale;
};

// Where the rows of a layer stand: what turns them, whom they see, where their keys and values go and are read from.
struct Place {
    const uint16_t *cos, *sin;
    const uint8_t* mask;
    uint16_t *keys, *values;
    const uint16_t *read_keys, *read_values;
    const int64_t* first_slots;

    Place of_layer(int64_t i, const Shape& s) const {
        const int64_t by = i * s.batch * s.groups * s.slots * s.head_dim;
        return {cos, sin, mask, keys + by, values + by, read_keys + by, read_values + by, first_slots};
    }
};

struct Draft {
    Layer layer;
    Product fc, head, looks;  // looks: all W_j, one below the other
    const uint16_t *hidden_norm, *norm, *ones;  // ones: the weights of a norm that has none
    const int64_t* target_ids;  // of the tokens that the head knows
    int64_t residual_normed;
};

extern "C" void draft_layer_bf16(const Draft*, const Shape*, const Place*, const uint16_t* embeddings, const uint16_t* hidden,
                                 uint16_t* out);
extern "C" void draft_head_bf16(const Draft*, const uint16_t* states, const uint16_t* ahead, uint16_t* logits, int64_t rows,
                                int64_t width, float eps);
