// AMX tiles of 16 rows, where the compiler's target has them (Linux, x86-64).

#pragma once

#include <cstdint>

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AMX_INT8__) && defined(__AVX512F__) && defined(__AVX512BW__) && \
    defined(__AVX512BF16__) && defined(__linux__)
#define CONFU_TILES

#include <immintrin.h>

#include <cstring>
#include <vector>

constexpr int64_t TILE = 16;   // rows of a tile; columns of a result tile
constexpr int64_t PAIRS = 32;  // bf16 columns of an operand tile

// While there is one, its thread can use tiles.
class alignas(64) Tiles {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};

public:
    Tiles() {
        for (int i = 0; i < 8; i++) row_bytes[i] = 64, rows[i] = TILE;
        _tile_loadconfig(this);
    }
    ~Tiles() { _tile_release(); }
    Tiles(const Tiles&) = delete;
};

// 16 rows of 16 dwords each, `stride` dwords apart and zero from row `count` on, transposed
inline void transpose(const uint32_t* from, int64_t stride, int64_t count, uint32_t* to) {
    __m512i a[16], b[16];
    for (int64_t i = 0; i < 16; i++) a[i] = i < count ? _mm512_loadu_si512(from + i * stride) : _mm512_setzero_si512();
    for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
        a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
        a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
        a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        const __m512i low = _mm512_shuffle_i32x4(a[i], a[i + 4], 0x88), low_odd = _mm512_shuffle_i32x4(a[i], a[i + 4], 0xdd);
        const __m512i high = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0x88);
        const __m512i high_odd = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0xdd);
        _mm512_store_si512(to + (i + 0) * 16, _mm512_shuffle_i32x4(low, high, 0x88));
        _mm512_store_si512(to + (i + 4) * 16, _mm512_shuffle_i32x4(low_odd, high_odd, 0x88));
        _mm512_store_si512(to + (i + 8) * 16, _mm512_shuffle_i32x4(low, high, 0xdd));
        _mm512_store_si512(to + (i + 12) * 16, _mm512_shuffle_i32x4(low_odd, high_odd, 0xdd));
    }
}

#else

struct Tiles {
    Tiles() {}  // so that one is not called unused
};

#endif
