// Numbers of float32 and bfloat16, and what rows.cpp and products.cpp both make of them.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

struct bf16 {
    uint16_t bits;
};

inline float wide(float x) { return x; }
inline float wide(bf16 x) {
    uint32_t bits = uint32_t(x.bits) << 16;
    float y;
    std::memcpy(&y, &bits, 4);
    return y;
}
inline void put(float& to, float x) { to = x; }
inline void put(bf16& to, float x) {  // round to nearest, ties to even
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    to.bits = uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
template <typename T> inline float rounded(float x) {
    T y;
    put(y, x);
    return wide(y);
}

// silu(gate) * up
template <typename T> inline void put_gated(T& to, T gate, T up) {
    const float x = wide(gate);
    const float e = std::exp(std::fmin(-x, 80.0f));  // beyond, e would overflow; x / (1 + e) is below 1e-31 there
    put(to, rounded<T>(x / (1.0f + e)) * wide(up));
}

constexpr int64_t LANES = 16;

// As many at once, and always by the same instructions: how many rows there are must not decide a last bit of any.
template <typename T> __attribute__((noinline)) void put_gated_lanes(T* __restrict__ to, const T* gate, const T* up) {
    for (int64_t i = 0; i < LANES; i++) put_gated(to[i], gate[i], up[i]);
}
