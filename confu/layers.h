// What layers.cpp and growth.cpp have in common: the functions of rows.cpp, attention.cpp and products.cpp, and what one decoder
// layer is told. layers.py keeps the same structures.

#pragma once

#include <cstdint>

extern "C" {
void add_norm_bf16(const uint16_t*, const uint16_t*, const uint16_t*, uint16_t*, uint16_t*, int64_t, int64_t, float);
void rotate_bf16(const uint16_t*, const uint16_t*, const uint16_t*, const uint16_t*, uint16_t*, uint16_t*, uint16_t*,
                 const int64_t*, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, float);
void best_bf16(const uint16_t*, float*, int64_t*, int64_t, int64_t, int64_t);
void gate_bf16(const uint16_t*, uint16_t*, int64_t, int64_t);
void attention_bf16(const uint16_t*, const uint16_t*, const uint16_t*, const uint8_t*, uint16_t*, int64_t, int64_t, int64_t,
                    int64_t, int64_t, int64_t, int64_t, int64_t, float);
void tile_product(const uint16_t*, const uint8_t*, const float*, const float*, uint16_t*, int64_t, int64_t, int64_t, int64_t);
}

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
    Product head;
    const uint16_t *hidden_norm, *norm;
    const int64_t* target_ids;  // of the tokens that the head knows
    int64_t residual_normed;
};

extern "C" void draft_layer_bf16(const Draft*, const Shape*, const Place*, const uint16_t* embeddings, const uint16_t* hidden,
                                 uint16_t* out);
