// Attention over cached keys in bfloat16, and products with weights in int8, for a few dozen rows by AMX tiles, where the
// processor has them (Linux, x86-64). Same arithmetic as the torch functions in attention.py and linear.py, which they are
// tested against. Built by native.py, called from there.
//
// Attention. The keys of a group of heads are cut into pieces. A piece and all query rows of its group are one task: scores by
// tiles, softmax of the piece alone, then the weighted values by tiles. In the end the pieces of a row are merged by
// their largest score and their sum of weights.
//
// Products. A weight holds whole numbers up to 127, which are exact in bfloat16: each tile of them is widened on its way to
// the processor's tiles, so only half as much is read from memory, and rows are rounded no further than bfloat16 is.

#include <cstdint>

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AVX512F__) && defined(__AVX512BW__) && \
    defined(__AVX512BF16__) && defined(__linux__)
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cmath>
#include <cstring>
#include <vector>

namespace {

constexpr int64_t TILE = 16;     // rows of a tile; columns of a result tile
constexpr int64_t PAIRS = 32;    // bf16 columns of an operand tile
constexpr int64_t PIECE = 128;   // keys of a task
constexpr int64_t WIDEST = 256;  // of a head
constexpr float NOWHERE = -1e30f;

struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
    TileConfig() {
        for (int i = 0; i < 8; i++) row_bytes[i] = 64, rows[i] = TILE;
    }
};

// 16 rows of 16 dwords each, `stride` dwords apart and zero from row `count` on, transposed
void transpose(const uint32_t* from, int64_t stride, int64_t count, uint32_t* to) {
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

// 2^x for x <= 0, to four parts in a million
inline __m512 exp2_of(__m512 x) {
    const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 part = _mm512_sub_ps(x, whole);
    __m512 y = _mm512_set1_ps(9.67604e-3f);  // fitted to 2^x from -1/2 to 1/2
    y = _mm512_fmadd_ps(y, part, _mm512_set1_ps(5.592208e-2f));
    y = _mm512_fmadd_ps(y, part, _mm512_set1_ps(2.4022107e-1f));
    y = _mm512_fmadd_ps(y, part, _mm512_set1_ps(6.9312103e-1f));
    y = _mm512_fmadd_ps(y, part, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(y, whole);
}

struct Scratch {  // of one thread
    alignas(64) uint32_t keys[PIECE * WIDEST / 2], values[PIECE * WIDEST / 2];
    alignas(64) uint16_t queries[TILE * WIDEST], weights[TILE * PIECE];
    alignas(64) float scores[TILE * PIECE];
};

struct Call {
    const uint16_t *queries, *keys, *values;
    const uint8_t* mask;
    int64_t heads, groups, rows, num_keys, width, batch_stride, group_stride;
    float scale;
    int64_t per_group() const { return heads / groups; }
    int64_t folded() const { return per_group() * rows; }  // query rows of a group
    int64_t pieces() const { return (num_keys + PIECE - 1) / PIECE; }
};

void pack(const Call& c, int64_t sequence, int64_t group, int64_t first, int64_t count, Scratch& s) {
    const int64_t offset = sequence * c.batch_stride + group * c.group_stride + first * c.width;
    const uint16_t *keys = c.keys + offset, *values = c.values + offset;
    uint32_t* to = s.keys;
    for (int64_t key = 0; key < count; key += TILE)
        for (int64_t column = 0; column < c.width; column += PAIRS, to += TILE * TILE)
            transpose(reinterpret_cast<const uint32_t*>(keys + key * c.width + column), c.width / 2, count - key, to);
    to = s.values;
    const auto row = [&](int64_t key, int64_t column) {
        return key < count ? _mm512_cvtepu16_epi32(_mm256_loadu_si256(
                                 reinterpret_cast<const __m256i*>(values + key * c.width + column)))
                           : _mm512_setzero_si512();
    };
    for (int64_t key = 0; key < count; key += PAIRS)
        for (int64_t column = 0; column < c.width; column += TILE)
            for (int64_t i = 0; i < TILE; i++, to += TILE)
                _mm512_store_si512(to, _mm512_or_si512(row(key + 2 * i, column),
                                                       _mm512_slli_epi32(row(key + 2 * i + 1, column), 16)));
}

// scores of 16 query rows with the keys of the piece
void score(const uint16_t* queries, int64_t width, int64_t count, Scratch& s) {
    const uint32_t* keys = s.keys;
    for (int64_t key = 0; key < count; key += TILE) {
        _tile_zero(0);
        for (int64_t column = 0; column < width; column += PAIRS, keys += TILE * TILE) {
            _tile_loadd(1, queries + column, width * 2);
            _tile_loadd(2, keys, 64);
            _tile_dpbf16ps(0, 1, 2);
        }
        _tile_stored(0, s.scores + key, PIECE * 4);
    }
}

// weights 2^(score - largest) of one row, and {largest, their sum}. A row that sees nothing of the piece has weights, too;
// merged with the others they count for nothing, as its largest says.
inline void weigh(const float* scores, const uint8_t* mask, int64_t count, int64_t tiles, float factor, uint16_t* weights,
                  float* stats) {
    const __m512 nowhere = _mm512_set1_ps(NOWHERE), by = _mm512_set1_ps(factor);
    __m512 scaled[PIECE / TILE], most = nowhere, sum = _mm512_setzero_ps();
    for (int64_t i = 0; i < tiles; i++) {
        const int64_t left = count - i * TILE;
        const __mmask16 real = left >= TILE ? 0xffff : left > 0 ? (1u << left) - 1 : 0;
        const __m128i bytes = _mm_maskz_loadu_epi8(real, mask + i * TILE);
        scaled[i] = _mm512_mask_mul_ps(nowhere, _mm_test_epi8_mask(bytes, bytes), _mm512_load_ps(scores + i * TILE), by);
        most = _mm512_max_ps(most, scaled[i]);
    }
    stats[0] = _mm512_reduce_max_ps(most);
    const __m512 largest = _mm512_set1_ps(stats[0]);
    for (int64_t i = 0; i < tiles; i++) {
        const __m512 weight = exp2_of(_mm512_sub_ps(scaled[i], largest));
        sum = _mm512_add_ps(sum, weight);
        _mm256_store_si256(reinterpret_cast<__m256i*>(weights + i * TILE), __m256i(_mm512_cvtneps_pbh(weight)));
    }
    stats[1] = _mm512_reduce_add_ps(sum);
}

// weights [16, count] times values [count, width] -> out [16, width], float32
void weighted(const Scratch& s, int64_t width, int64_t count, float* out) {
    for (int64_t column = 0; column < width; column += 2 * TILE) {
        const uint32_t* values = s.values + column * TILE;
        _tile_zero(0);
        _tile_zero(1);
        for (int64_t key = 0; key < count; key += PAIRS, values += TILE * width) {
            _tile_loadd(2, s.weights + key, PIECE * 2);
            _tile_loadd(3, values, 64);
            _tile_loadd(4, values + TILE * TILE, 64);
            _tile_dpbf16ps(0, 2, 3);
            _tile_dpbf16ps(1, 2, 4);
        }
        _tile_stored(0, out + column, width * 4);
        _tile_stored(1, out + column + TILE, width * 4);
    }
}

// one piece of one group: partial results [folded, width] and {largest, sum} of every row
void attend_piece(const Call& c, int64_t sequence, int64_t group, int64_t first, Scratch& s, float* partial, float* stats) {
    const int64_t count = c.num_keys - first < PIECE ? c.num_keys - first : PIECE;
    pack(c, sequence, group, first, count, s);
    const uint16_t* queries = c.queries + (sequence * c.heads + group * c.per_group()) * c.rows * c.width;
    const uint8_t* mask = c.mask + sequence * c.rows * c.num_keys + first;
    for (int64_t row = 0; row < c.folded(); row += TILE) {
        const int64_t left = c.folded() - row < TILE ? c.folded() - row : TILE;
        const uint16_t* tile = queries + row * c.width;
        if (left < TILE) tile = static_cast<uint16_t*>(std::memcpy(s.queries, tile, left * c.width * 2));
        score(tile, c.width, count, s);
        for (int64_t i = 0; i < left; i++) {
            const auto* seen = mask + (row + i) % c.rows * c.num_keys;
            const auto weigh_tiles = [&](int64_t tiles) {
                weigh(s.scores + i * PIECE, seen, count, tiles, c.scale, s.weights + i * PIECE, stats + 2 * (row + i));
            };
            if (count == PIECE)
                weigh_tiles(PIECE / TILE);  // unrolled
            else
                weigh_tiles((count + PAIRS - 1) / PAIRS * 2);
        }
        weighted(s, c.width, count, partial + row * c.width);
    }
}

// the pieces of one query row, each `stride` rows behind the one before
void merge(const float* partial, const float* stats, int64_t pieces, int64_t stride, int64_t width, uint16_t* out) {
    float largest = NOWHERE, total = 0;
    for (int64_t p = 0; p < pieces; p++) largest = std::fmax(largest, stats[2 * p * stride]);
    alignas(64) float sum[WIDEST] = {};
    for (int64_t p = 0; p < pieces; p++) {
        const float factor = std::exp2(stats[2 * p * stride] - largest);
        total += factor * stats[2 * p * stride + 1];
        for (int64_t i = 0; i < width; i++) sum[i] += factor * partial[p * stride * width + i];
    }
    const __m512 by = _mm512_set1_ps(total > 0 ? 1 / total : 0);
    for (int64_t i = 0; i < width; i += TILE)
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i),
                            __m256i(_mm512_cvtneps_pbh(_mm512_mul_ps(_mm512_load_ps(sum + i), by))));
}

constexpr int64_t WEIGHTS = TILE * PAIRS;  // of a tile
constexpr int64_t BLOCKS = 4;             // tiles of rows that share what is read of a weight
constexpr int64_t AHEAD = 4, RING = 8;    // tiles are widened so many before they are needed, into so many places,
constexpr int64_t FETCH = 24;             // and asked of memory so many before

// the weights of one tile: whole numbers as float32, whose upper half is all there is of them; pairs of these halves
inline void widen(const int8_t* from, uint16_t* to) {
    const auto wide = [&](int64_t at) {
        return _mm512_castps_si512(
            _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + at)))));
    };
    const __m512i upper = _mm512_set1_epi32(int(0xffff0000));
    for (int64_t i = 0; i < WEIGHTS; i += PAIRS)  // 0xca: where the mask has ones the second, else the third
        _mm512_store_si512(to + i, _mm512_ternarylogic_epi32(upper, wide(i + TILE), _mm512_srli_epi32(wide(i), 16), 0xca));
}

// 16 outputs of up to 64 rows: sums [16 COUNT, 16]
template <int COUNT>
void multiply(const uint16_t* const* blocks, const int8_t* weight, int64_t inputs, uint16_t* ring, float* sums) {
    const int64_t tiles = inputs / PAIRS;
    _tile_zero(0);
    if constexpr (COUNT > 1) _tile_zero(1);
    if constexpr (COUNT > 2) _tile_zero(2);
    if constexpr (COUNT > 3) _tile_zero(3);
    for (int64_t k = 0; k < AHEAD && k < tiles; k++) widen(weight + k * WEIGHTS, ring + k * WEIGHTS);
    for (int64_t k = 0; k < tiles; k++) {
        for (int64_t line = 0; line < WEIGHTS; line += 64)
            _mm_prefetch(reinterpret_cast<const char*>(weight + (k + FETCH) * WEIGHTS + line), _MM_HINT_T0);
        if (k + AHEAD < tiles) widen(weight + (k + AHEAD) * WEIGHTS, ring + (k + AHEAD) % RING * WEIGHTS);
        _tile_loadd(6, ring + k % RING * WEIGHTS, 64);
        _tile_loadd(4, blocks[0] + k * PAIRS, inputs * 2);
        _tile_dpbf16ps(0, 4, 6);
        if constexpr (COUNT > 1) {
            _tile_loadd(5, blocks[1] + k * PAIRS, inputs * 2);
            _tile_dpbf16ps(1, 5, 6);
        }
        if constexpr (COUNT > 2) {
            _tile_loadd(4, blocks[2] + k * PAIRS, inputs * 2);
            _tile_dpbf16ps(2, 4, 6);
        }
        if constexpr (COUNT > 3) {
            _tile_loadd(5, blocks[3] + k * PAIRS, inputs * 2);
            _tile_dpbf16ps(3, 5, 6);
        }
    }
    _tile_stored(0, sums, 64);
    if constexpr (COUNT > 1) _tile_stored(1, sums + TILE * TILE, 64);
    if constexpr (COUNT > 2) _tile_stored(2, sums + 2 * TILE * TILE, 64);
    if constexpr (COUNT > 3) _tile_stored(3, sums + 3 * TILE * TILE, 64);
}

}  // namespace

extern "C" int64_t tiles_granted() {
    static const bool granted = syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */) == 0;
    return granted;
}

// queries [batch, heads, rows, width]; keys and values [batch, groups, num_keys, width] with the given strides; mask
// [batch, rows, num_keys] -> out [batch, rows, heads, width]; width is a multiple of 32, scale holds log2(e)
extern "C" void attention_bf16(const uint16_t* queries, const uint16_t* keys, const uint16_t* values, const uint8_t* mask,
                               uint16_t* out, int64_t batch, int64_t heads, int64_t groups, int64_t rows, int64_t num_keys,
                               int64_t width, int64_t batch_stride, int64_t group_stride, float scale) {
    const Call c{queries, keys, values, mask, heads, groups, rows, num_keys, width, batch_stride, group_stride, scale};
    const int64_t pieces = c.pieces(), padded = (c.folded() + TILE - 1) / TILE * TILE;
    static thread_local std::vector<float> partial, stats;
    const size_t results = batch * groups * pieces * padded;
    if (stats.size() < results * 2) stats.resize(results * 2);
    if (partial.size() < results * width) partial.resize(results * width);
    float *all_partial = partial.data(), *all_stats = stats.data();
#pragma omp parallel
    {
        static thread_local Scratch scratch;
        const TileConfig config;
        _tile_loadconfig(&config);
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < batch * groups * pieces; task++) {
            const int64_t pair = task / pieces;
            attend_piece(c, pair / groups, pair % groups, task % pieces * PIECE, scratch,
                         all_partial + task * padded * width, all_stats + task * padded * 2);
        }
        _tile_release();
#pragma omp for
        for (int64_t row = 0; row < batch * heads * rows; row++) {
            const int64_t pair = row / c.folded(), at = row % c.folded(), first = pair * pieces * padded + at;
            const int64_t head = pair % groups * c.per_group() + at / rows;
            merge(all_partial + first * width, all_stats + first * 2, pieces, padded, width,
                  out + ((pair / groups * rows + at % rows) * heads + head) * width);
        }
    }
}

// x [rows, inputs] times whole numbers [outputs / 16, inputs / 32, 16, 2, 16] (blocks of outputs, of inputs, pairs of inputs,
// the two of a pair, outputs), times scales [outputs], plus bias [outputs] if there is one -> out [rows, outputs]
extern "C" void int8_product(const uint16_t* x, const int8_t* weight, const float* scales, const float* bias, uint16_t* out,
                             int64_t rows, int64_t inputs, int64_t outputs) {
#pragma omp parallel
    {
        alignas(64) uint16_t ring[RING * WEIGHTS];
        alignas(64) float sums[BLOCKS * TILE * TILE];
        static thread_local std::vector<uint16_t> rest;  // a last tile of rows that is not full
        const TileConfig config;
        _tile_loadconfig(&config);
        for (int64_t first = 0; first < rows; first += BLOCKS * TILE) {
            const int64_t here = rows - first < BLOCKS * TILE ? rows - first : BLOCKS * TILE, count = (here + TILE - 1) / TILE;
            const uint16_t* blocks[BLOCKS];
            for (int64_t b = 0; b < count; b++) blocks[b] = x + (first + b * TILE) * inputs;
            if (const int64_t left = here % TILE) {
                if (rest.size() < size_t(TILE * inputs)) rest.resize(TILE * inputs);
                std::memcpy(rest.data(), blocks[count - 1], left * inputs * 2);
                blocks[count - 1] = rest.data();
            }
#pragma omp for schedule(static) nowait
            for (int64_t column = 0; column < outputs; column += TILE) {
                const int8_t* mine = weight + column * inputs;
                if (count == 1) multiply<1>(blocks, mine, inputs, ring, sums);
                if (count == 2) multiply<2>(blocks, mine, inputs, ring, sums);
                if (count == 3) multiply<3>(blocks, mine, inputs, ring, sums);
                if (count == 4) multiply<4>(blocks, mine, inputs, ring, sums);
                const __m512 by = _mm512_loadu_ps(scales + column);
                const __m512 plus = bias ? _mm512_loadu_ps(bias + column) : _mm512_setzero_ps();
                for (int64_t i = 0; i < here; i++)
                    _mm256_storeu_si256(
                        reinterpret_cast<__m256i*>(out + (first + i) * outputs + column),
                        __m256i(_mm512_cvtneps_pbh(_mm512_fmadd_ps(_mm512_load_ps(sums + i * TILE), by, plus))));
            }
        }
        _tile_release();
    }
}

#else

extern "C" int64_t tiles_granted() { return 0; }
extern "C" void int8_product(const uint16_t*, const int8_t*, const float*, const float*, uint16_t*, int64_t, int64_t, int64_t) {}
extern "C" void attention_bf16(const uint16_t*, const uint16_t*, const uint16_t*, const uint8_t*, uint16_t*, int64_t, int64_t,
                               int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, float) {}

#endif
